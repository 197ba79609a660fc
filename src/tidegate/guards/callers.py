"""One guard for many callers, of whom each may have an adapter of his own.

Who calls is known where the request comes in, and the guard is asked somewhere deep in the work on it. What is between
has nothing to do with adapters; so the name of the adapter goes along with the request's context, not by hand.

A caller whose adapter is not there is a failure of the guard, for this caller only. The guard without an adapter never
judges in its place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from tidegate.errors import GuardError, InputError
from tidegate.guards.around import GuardAround
from tidegate.guards.base import AdaptableGuard, Session, StreamGuard
from tidegate.guards.terms import Terms, on_terms
from tidegate.types import Channel, Conversation, Verdict

__all__ = ["CallersGuard", "with_adapter"]

_adapter: ContextVar[str | None] = ContextVar("tidegate_adapter", default=None)


@contextmanager
def with_adapter(adapter: str | None) -> Iterator[None]:
    """What is judged inside, also by tasks that begin inside, is judged with this adapter; None for none."""
    token = _adapter.set(adapter)
    try:
        yield
    finally:
        _adapter.reset(token)


class CallersGuard(GuardAround):
    """The same guard, with the adapter of whoever asks it.

    Args:
        guard: asked with its adapter where it has adapters; closed with this one.
    """

    @property
    def name(self) -> str:
        """That of the guard with the caller's adapter, also of one that is not there: it is nobody else's."""
        try:
            return self._now().name
        except GuardError:
            return f"{self.guard.name}+{_adapter.get()}"

    async def judge(self, conversation: Conversation) -> Verdict:
        """Judge with the caller's adapter.

        Raises:
            GuardError: when there is no such adapter, and what the guard raises.
        """
        return await self._now().judge(conversation)

    def open(
        self, context: Conversation | None, channel: Channel = Channel.ANSWER, *, reasoning: str = "", name: str = ""
    ) -> Session:
        """Open a session with the caller's adapter: see `StreamGuard.open`.

        Raises:
            GuardError: when there is no such adapter, and what the guard raises.
        """
        return self._now().open(context, channel, reasoning=reasoning, name=name)

    def on_terms(self, terms: Terms) -> CallersGuard:
        """The same guard on these terms."""
        return CallersGuard(on_terms(self.guard, terms))

    def _now(self) -> StreamGuard:
        adapter = _adapter.get()
        if adapter is None:
            return self.guard
        if not isinstance(self.guard, AdaptableGuard):
            raise GuardError("the guard takes no adapters, and the caller's key names one")
        try:
            return self.guard.adapted(adapter)
        except InputError:
            raise GuardError("the adapter of the caller's key is not loaded") from None
