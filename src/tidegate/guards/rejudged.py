"""Sessions for guards that judge whole texts only: the text so far is judged again every so many characters.

The places are fixed character counts, so the verdicts are a function of the text alone. Each judgement covers all the
text so far and is given out as one token: the characters since the last one. Costs one judgement for each such piece,
each as long as the text so far: for short answers, or behind a cascade, not for long ones at scale.

Method: a Gen guard that is run again every 32 tokens is what the Qwen3Guard Technical Report (2025), section 4,
compares the Stream models with.
"""

from __future__ import annotations

import asyncio

from tidegate.errors import GuardError, SessionClosed
from tidegate.guards.base import Guard
from tidegate.types import Conversation, Role, Span, TokenVerdict, Turn, Verdict

__all__ = ["RejudgedSession", "token_verdict"]


class RejudgedSession:
    """One text that arrives in pieces: see `tidegate.guards.base.Session`. Calls must not overlap, except ``close``.

    Args:
        guard: judges the text so far, after these turns.
        context: the turns before the text; None when nothing came before.
        every: after how many characters the text is judged again, at least 1.
    """

    def __init__(self, guard: Guard, context: Conversation | None, *, every: int) -> None:
        self._guard = guard
        self._before = context.turns if context else ()
        self._every = every
        self._text = ""
        self._rest: list[str] = []
        self._waiting = 0
        self._judging: asyncio.Task[Verdict] | None = None
        self._busy = False
        self._closed = False

    async def feed(self, text: str) -> tuple[TokenVerdict, ...]:
        """Take more text; return a verdict for each piece of ``every`` characters that is complete. May be ().

        Raises:
            SessionClosed: after ``finish`` or ``close``.
            GuardError: when the guard cannot judge; the session is then closed.
        """
        return await self._take(text, ends=False)

    async def finish(self) -> tuple[TokenVerdict, ...]:
        """The text is complete: return the verdict of the last piece, if there is one, and close.

        Raises:
            SessionClosed: after ``finish`` or ``close``.
            GuardError: when the guard cannot judge.
        """
        tokens = await self._take("", ends=True)
        self.close()
        return tokens

    def close(self) -> None:
        """Give everything back at once; safe to call any number of times, also while a feed is running."""
        self._closed = True
        if self._judging is not None:
            self._judging.cancel()

    async def _take(self, text: str, *, ends: bool) -> tuple[TokenVerdict, ...]:
        if self._closed:
            raise SessionClosed("the session is closed")
        if self._busy:
            raise GuardError("a session takes one piece of text at a time")
        self._busy = True
        try:
            self._rest.append(text)
            self._waiting += len(text)
            if self._waiting < self._every and not ends:
                return ()
            return tuple([await self._judged(piece) for piece in self._pieces(ends=ends)])
        except BaseException:
            self.close()
            raise
        finally:
            self._busy = False

    def _pieces(self, *, ends: bool) -> list[str]:
        rest = "".join(self._rest)
        stop = len(rest) if ends else len(rest) - len(rest) % self._every
        self._rest, self._waiting = [rest[stop:]], len(rest) - stop
        return [rest[start : min(start + self._every, stop)] for start in range(0, stop, self._every)]

    async def _judged(self, piece: str) -> TokenVerdict:
        start = len(self._text)
        self._text += piece
        conversation = Conversation((*self._before, Turn(Role.ASSISTANT, self._text)))
        judging = self._judging = asyncio.ensure_future(self._guard.judge(conversation))
        try:
            return token_verdict(Span(start, len(self._text)), await judging)
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if self._closed and not (current and current.cancelling()):
                raise SessionClosed("the session was closed while it judged") from None
            raise
        finally:
            self._judging = None


def token_verdict(span: Span, verdict: Verdict) -> TokenVerdict:
    """What a guard said of a whole text, as a token's. A category that it names without a probability has 1."""
    known = verdict.category_probabilities
    category = verdict.categories[0] if verdict.categories else max(known, key=lambda name: known[name], default=None)
    probability = 0.0 if category is None else known.get(category, 1.0)
    return TokenVerdict(span, verdict.severity, verdict.probabilities, category, probability)
