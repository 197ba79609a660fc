"""What every guard around another one has in common: what it does not do itself, the one inside does."""

from __future__ import annotations

from tidegate.guards.base import IdGuard, IdText, Session, StreamGuard, judges_together
from tidegate.types import Channel, Conversation, Verdict

__all__ = ["GuardAround"]


class GuardAround:
    """The same guard; to be inherited from by one that adds something.

    Args:
        guard: the one inside; closed with this one.
    """

    def __init__(self, guard: StreamGuard) -> None:
        self.guard = guard

    @property
    def name(self) -> str:
        """That of the guard."""
        return self.guard.name

    @property
    def together(self) -> bool:
        """Whether the guard judges reasoning together with what follows it."""
        return judges_together(self.guard)

    @property
    def takes_ids(self) -> bool:
        """Whether the guard's sessions take ids."""
        return isinstance(self.guard, IdGuard) and self.guard.takes_ids

    async def judge(self, conversation: Conversation) -> Verdict:
        """Judge: see `Guard.judge`. Raises what the guard raises."""
        return await self.guard.judge(conversation)

    def open(
        self, context: Conversation | None, channel: Channel = Channel.ANSWER, *, reasoning: str = "", name: str = ""
    ) -> Session:
        """Open a session: see `StreamGuard.open`. Raises what the guard raises."""
        return self.guard.open(context, channel, reasoning=reasoning, name=name)

    async def id_text(self) -> IdText:
        """Begin to read the ids of one stream: see `IdGuard.id_text`. Raises GuardError."""
        assert isinstance(self.guard, IdGuard), "only asked where ids are taken"
        return await self.guard.id_text()

    async def close(self) -> None:
        """Close the guard; safe to call twice."""
        await self.guard.close()
