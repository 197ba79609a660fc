"""A guard that is asked for a second opinion: in time, and not about too much at once."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from tidegate.errors import GuardError, GuardOverloaded, GuardTimeout
from tidegate.guards.base import Guard
from tidegate.guards.terms import Terms, on_terms
from tidegate.types import Conversation, Verdict

__all__ = ["SecondGuard", "second_of"]


@dataclass(slots=True)
class SecondCounts:
    """What became of the questions: how many were asked, were not answered, and are open now."""

    asked: int = 0
    failed: int = 0
    open: int = 0


class SecondGuard:
    """Asks a guard about conversations, each within a deadline, and so many at once.

    Args:
        guard: is asked; it is not closed by this one.
        timeout_s: seconds that it may take for one answer, more than 0.
        most_asked: how many questions may be open at once; one more is refused as overload.
    """

    def __init__(self, guard: Guard, *, timeout_s: float = 20.0, most_asked: int = 256) -> None:
        self.guard = guard
        self.timeout_s = timeout_s
        self.most_asked = most_asked
        self.counts = SecondCounts()

    @property
    def open_questions(self) -> int:
        """How many questions are open now."""
        return self.counts.open

    def on_terms(self, terms: Terms) -> SecondGuard:
        """The same with the instructions of a policy; what is open is counted together."""
        if not terms.instructions:
            return self
        guard = on_terms(self.guard, Terms(instructions=terms.instructions))
        termed = SecondGuard(guard, timeout_s=self.timeout_s, most_asked=self.most_asked)
        termed.counts = self.counts
        return termed

    async def ask(self, conversation: Conversation, timeout_s: float | None = None) -> Verdict:
        """What it says of the last turn.

        Args:
            conversation: its last turn is judged.
            timeout_s: seconds that it may take, where that is less than it may take anyway; None for no less.

        Raises:
            GuardOverloaded: when too many questions are open.
            GuardTimeout: when it takes too long.
            GuardError: when it fails.
        """
        self.counts.asked += 1
        if self.counts.open >= self.most_asked:
            self.counts.failed += 1
            raise GuardOverloaded(f"{self.counts.open} questions to the second guard are open already")
        allowed = self.timeout_s if timeout_s is None else min(timeout_s, self.timeout_s)
        self.counts.open += 1
        try:
            async with asyncio.timeout(allowed):
                return await self.guard.judge(conversation)
        except TimeoutError:
            self.counts.failed += 1
            raise GuardTimeout(f"the second guard did not answer within {allowed:g} seconds") from None
        except GuardError:
            self.counts.failed += 1
            raise
        finally:
            self.counts.open -= 1


def second_of(guard: Guard) -> SecondGuard | None:
    """The guard that confirms the alarms of this one; None when it has none."""
    found = getattr(guard, "second", None)
    return found if isinstance(found, SecondGuard) else None
