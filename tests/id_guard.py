"""A fake guard that takes ids, for tests of what is done with them."""

from __future__ import annotations

from collections.abc import Sequence

from tidegate.errors import InputError
from tidegate.guards.session import check_written
from tidegate.testing import FakeSession, FakeStreamGuard, Opened
from tidegate.types import Channel, Conversation, TokenVerdict


class IdGuard(FakeStreamGuard):
    """A guard whose ids are the numbers of characters; those from 1000 on stand for none."""

    takes_ids = True

    def open(self, context: Conversation | None, channel: Channel = Channel.ANSWER, **about: str) -> IdSession:
        check_written(channel)
        self.opened.append(Opened(context, channel, about.get("reasoning", ""), about.get("name", "")))
        return IdSession(self)

    async def id_text(self) -> IdGuard:
        return self

    def decode(self, ids: Sequence[int]) -> str:
        for place, number in enumerate(ids):
            if number >= 1000:
                raise InputError("this stands for no text", where=f"ids[{place}]")
        return "".join(map(chr, ids))


class IdSession(FakeSession):
    """Judges ids as the text that they are."""

    async def feed_ids(self, ids: Sequence[int]) -> tuple[TokenVerdict, ...]:
        return await self.feed("".join(map(chr, ids)))
