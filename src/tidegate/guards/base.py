"""What every guard promises: the protocols that the rest of Tidegate is written against.

A Guard judges a whole conversation. A StreamGuard also opens Sessions: one Session is one text (one channel of one
choice of an answer) that arrives in pieces. A guard that cannot judge raises a GuardError; it never guesses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from tidegate.types import Channel, Conversation, TokenVerdict, Verdict

__all__ = [
    "AdaptableGuard",
    "Guard",
    "IdGuard",
    "IdSession",
    "IdText",
    "RememberingGuard",
    "Session",
    "StreamGuard",
    "TogetherGuard",
    "judges_together",
]


class Session(Protocol):
    """One open stream, seen from outside a guard.

    The verdicts are a function of the text alone: however the text is cut into pieces, the concatenation of what all
    calls returned is the same. Token spans count characters of the text fed so far; the spans of successive tokens
    leave no gap, so the end of the last returned span is the number of characters that have been judged for good.
    """

    async def feed(self, text: str) -> tuple[TokenVerdict, ...]:
        """Take more text; return the tokens that no further text can change, judged, in order. May be ().

        Raises:
            SessionClosed: after ``finish`` or ``close``.
            GuardError: when the guard cannot judge; the session is then closed.
        """
        ...

    async def finish(self) -> tuple[TokenVerdict, ...]:
        """The text is complete: judge and return what remains, and close. The last span then ends at the text's end.

        Raises:
            SessionClosed: after ``finish`` or ``close``.
            GuardError: when the guard cannot judge.
        """
        ...

    def close(self) -> None:
        """Give everything back at once; safe to call any number of times, also while a feed is running."""
        ...


@runtime_checkable
class Guard(Protocol):
    """Anything that judges."""

    @property
    def name(self) -> str:
        """Name and version, as ``edge/1``: part of every verdict."""
        ...

    async def judge(self, conversation: Conversation) -> Verdict:
        """Judge the last turn in the light of the ones before.

        Raises:
            GuardError: when it cannot judge.
        """
        ...

    async def close(self) -> None:
        """Give back threads and memory; safe to call twice."""
        ...


@runtime_checkable
class StreamGuard(Guard, Protocol):
    """A guard that can also watch an answer while it is written."""

    def open(
        self, context: Conversation | None, channel: Channel = Channel.ANSWER, *, reasoning: str = "", name: str = ""
    ) -> Session:
        """Open a session for one text that an assistant writes.

        Cheap: the context is judged with the first piece of text. A guard that makes no difference between channels
        judges every text as an answer, and one that has no use for the rest leaves it out.

        Args:
            context: the turns before; None when nothing came before.
            channel: what the text is: ANSWER (also for REFUSAL), REASONING, or TOOL_CALL for the arguments of a call.
            reasoning: what the assistant thought before the text; "" when nothing, or when it is not to count.
            name: the name of the called tool; "" when it is not known.

        Raises:
            InputError: for a channel in which no assistant writes.
            GuardOverloaded: when no more sessions can be opened now.
        """
        ...


class IdSession(Session, Protocol):
    """A session that also takes the ids of a model whose tokenizer is the guard's; nothing is then held back."""

    async def feed_ids(self, ids: Sequence[int]) -> tuple[TokenVerdict, ...]:
        """Take more tokens; return the verdict of each. A session is given either text or ids.

        Raises:
            InputError: when an id stands for no text, or text was fed before; the session is then closed.
            SessionClosed: after ``finish`` or ``close``.
            GuardError: when the guard cannot judge; the session is then closed.
        """
        ...


class IdText(Protocol):
    """The text that the ids of one stream are."""

    def decode(self, ids: Sequence[int]) -> str:
        """The characters that these ids complete, as the spans of a session count them.

        Raises:
            InputError: when an id stands for no text; says which.
        """
        ...


@runtime_checkable
class IdGuard(StreamGuard, Protocol):
    """A guard whose sessions may be `IdSession`."""

    @property
    def takes_ids(self) -> bool:
        """Whether they are."""
        ...

    async def id_text(self) -> IdText:
        """Begin to read the ids of one stream.

        Raises:
            GuardError: when the guard cannot say what they are.
        """
        ...


@runtime_checkable
class AdaptableGuard(StreamGuard, Protocol):
    """A guard that has adapters: small differences from one model, of which each request may have its own."""

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters."""
        ...

    def adapted(self, adapter: str | None) -> AdaptableGuard:
        """The same guard with one of its adapters, or None for none. Costs nothing; closing one closes all.

        Raises:
            InputError: when there is no such adapter; lists those that exist.
        """
        ...


@runtime_checkable
class RememberingGuard(StreamGuard, Protocol):
    """A guard that remembers what it judged; its ``judge`` is both of these, one after the other."""

    async def recalled(self, conversation: Conversation) -> Verdict | None:
        """What is remembered of this conversation; None when nothing is. Nothing is judged."""
        ...

    async def judged(self, conversation: Conversation) -> Verdict:
        """Judge what is not remembered. Raises GuardError when it cannot."""
        ...


@runtime_checkable
class TogetherGuard(Protocol):
    """A guard that may judge what an assistant says together with the reasoning before it, as one text."""

    @property
    def together(self) -> bool:
        """Whether it does."""
        ...


def judges_together(guard: Guard) -> bool:
    """Whether the guard is to be told the reasoning with each text of a whole answer. Others judge it by itself only,
    as whoever judges every text of an answer asks of them anyway."""
    return isinstance(guard, TogetherGuard) and guard.together
