"""What the sessions of all guards have in common: one call at a time, and an end that holds.

A guard's own session is a `TextSession` that says what it makes of a piece of text; one that holds more than text gives
it back in its ``close``. `OpenSessions` counts those of a guard. `assistant_turn` puts a text where it belongs in a
turn.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Final, TypeVar
from weakref import WeakSet

from tidegate.errors import GuardError, GuardOverloaded, InputError, SessionClosed
from tidegate.types import Channel, Role, TokenVerdict, ToolCall, Turn

__all__ = ["OpenSessions", "TextSession", "assistant_turn", "check_written"]

T = TypeVar("T")

_WRITTEN: Final = frozenset({Channel.ANSWER, Channel.REFUSAL, Channel.REASONING, Channel.TOOL_CALL})


def check_written(channel: Channel) -> None:
    """Refuse a channel in which no assistant writes.

    Raises:
        InputError: when it is one.
    """
    if channel not in _WRITTEN:
        raise InputError("expected a channel in which an assistant writes", where="channel")


def assistant_turn(text: str, channel: Channel = Channel.ANSWER, *, reasoning: str = "", name: str = "") -> Turn:
    """The turn that says this; the arguments are those of `tidegate.guards.base.StreamGuard.open`.

    Raises:
        InputError: for a channel in which no assistant writes.
    """
    check_written(channel)
    if channel is Channel.REASONING:
        return Turn(Role.ASSISTANT, "", text)
    if channel is Channel.TOOL_CALL:
        return Turn(Role.ASSISTANT, "", reasoning, (ToolCall(name, text),))
    return Turn(Role.ASSISTANT, text, reasoning)


class OpenSessions:
    """The sessions of a guard that are open now. One that was forgotten without being closed is not.

    Args:
        most: how many there may be; None for no limit.
    """

    def __init__(self, most: int | None = None) -> None:
        self.most = most
        self._sessions: WeakSet[TextSession] = WeakSet()

    def __len__(self) -> int:
        return len(self._sessions)

    def add(self, session: TextSession) -> None:
        """Count one more.

        Raises:
            GuardOverloaded: when there are as many as there may be.
        """
        if self.most is not None and len(self) >= self.most:
            raise GuardOverloaded(f"{self.most} sessions are open already")
        self._sessions.add(session)

    def discard(self, session: TextSession) -> None:
        """Count it no more; nothing when it is not counted."""
        self._sessions.discard(session)


class TextSession(ABC):
    """One text that arrives in pieces: see `tidegate.guards.base.Session`. Calls must not overlap, except ``close``.

    A call that fails or is cancelled closes the session.

    Args:
        sessions: where it is counted until it is closed; None for nowhere.

    Raises:
        GuardOverloaded: when no more sessions may be open.
    """

    def __init__(self, sessions: OpenSessions | None = None) -> None:
        self._sessions = sessions
        self._busy = False
        self._closed = False
        self._question: asyncio.Task[Any] | None = None
        if sessions is not None:
            sessions.add(self)

    async def feed(self, text: str) -> tuple[TokenVerdict, ...]:
        """Take more text; return the verdicts that no further text can change. May be ().

        Raises:
            SessionClosed: after ``finish`` or ``close``.
            GuardError: when the guard cannot judge; the session is then closed.
        """
        return await self._take(text, last=False)

    async def finish(self) -> tuple[TokenVerdict, ...]:
        """The text is complete: return the verdicts that remain, and close.

        Raises:
            SessionClosed: after ``finish`` or ``close``.
            GuardError: when the guard cannot judge.
        """
        verdicts = await self._take("", last=True)
        self.close()
        return verdicts

    def close(self) -> None:
        """Give everything back at once; safe to call any number of times, also while a feed is running."""
        self._closed = True
        if self._question is not None:
            self._question.cancel()
        if self._sessions is not None:
            self._sessions.discard(self)

    @abstractmethod
    async def _judge(self, text: str, *, last: bool) -> Sequence[TokenVerdict]:
        """Take more text, or the end of it; the verdicts that no further text can change.

        One that takes several steps asks `_check_open` between them.
        """

    def _check_open(self) -> None:
        """What is computed for a session that was closed meanwhile is computed for nobody."""
        if self._closed:
            raise SessionClosed("the session was closed while it judged")

    async def _asked(self, question: Coroutine[Any, Any, T]) -> T:
        """The answer to a question, which `close` ends.

        Raises:
            SessionClosed: when it was ended so.
        """
        asked: asyncio.Task[T] = asyncio.ensure_future(question)
        self._question = asked
        try:
            return await asked
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if self._closed and not (current and current.cancelling()):
                self._check_open()
            raise
        finally:
            self._question = None

    async def _take(self, text: str, *, last: bool) -> tuple[TokenVerdict, ...]:
        return await self._alone(lambda: self._judge(text, last=last))

    async def _alone(self, work: Callable[[], Awaitable[Sequence[TokenVerdict]]]) -> tuple[TokenVerdict, ...]:
        """The verdicts of one call, beside which there is no other."""
        if self._closed:
            raise SessionClosed("the session is closed")
        if self._busy:
            raise GuardError("a session takes one piece of text at a time")
        self._busy = True
        try:
            verdicts = await work()
            self._check_open()
            return tuple(verdicts)
        except BaseException:
            self.close()
            raise
        finally:
            self._busy = False
