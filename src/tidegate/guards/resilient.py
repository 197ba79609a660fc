"""A guard that fails in time, is left alone while it is down, and has another one to stand in for it.

Three things around any guard, each by itself:

- a deadline for each call: a text, or a piece of one;
- a circuit breaker (`tidegate.guards.breaker`): only what says that the guard is down opens it, that is
  GuardUnavailable, GuardTimeout and errors that are not ours. Overload does not, since the guard then says no at once,
  and neither does an answer that cannot be read or a text that cannot be judged: whoever writes the text could cause
  those, and would shut the guard for everybody.
- degraded mode, where the terms say so: the fallback, the edge guard, judges alone what the guard cannot. Its verdicts
  say it: ``degraded[edge/2; gen/1 GuardTimeout]``.

What is remembered (`tidegate.guards.remembered`) comes before all three: it tells the breaker nothing, and takes
nothing of the deadline.

A stream whose guard fails in its middle goes on with the fallback, which reads the text from its beginning; what the
guard had judged stays judged, and the fallback's tokens begin where those of the guard end. A stream asks the breaker
once, with its first piece of text: one that is under way is not cut because others failed.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any, Final, TypeVar, cast

from tidegate.deadlines import within
from tidegate.errors import GuardError, GuardTimeout, GuardUnavailable, InputError
from tidegate.guards.around import GuardAround
from tidegate.guards.base import IdSession, IdText, RememberingGuard, Session, StreamGuard
from tidegate.guards.breaker import Breaker, Call
from tidegate.guards.second import SecondGuard
from tidegate.guards.session import TextSession, check_written
from tidegate.guards.terms import Terms, on_terms
from tidegate.types import Channel, Conversation, Span, TokenVerdict, Verdict

__all__ = ["FALLBACK_DEADLINE_S", "ResilientGuard", "TellDegraded"]

T = TypeVar("T")
_Stepping = Callable[[Session], Coroutine[Any, Any, tuple[TokenVerdict, ...]]]
TellDegraded = Callable[[str], None]
"""Told that the fallback stood in, with the kind of the failure: the name of its class."""

FALLBACK_DEADLINE_S: Final = 5.0
"""Seconds that the fallback may take for a text or a piece of one."""


def _says_down(error: BaseException) -> bool:
    """Whether an error says that the guard is down, and not only that this text cannot be judged now."""
    if isinstance(error, GuardUnavailable | GuardTimeout):
        return True
    return isinstance(error, Exception) and not isinstance(error, GuardError | InputError)


def _tell_failed(call: Call | None, error: BaseException) -> None:
    if call is not None:
        call.failed() if _says_down(error) else call.given_up()


class ResilientGuard(GuardAround):
    """Any guard with a deadline, a breaker and a fallback; see the module's text.

    Args:
        guard: judges; closed with this one.
        fallback: stands in for it where the terms say so; closed with this one. None when there is none: then a failure
            is a failure on all terms.
        breaker: leaves the guard alone while it is down; None for none.
        deadline_s: seconds that the guard may take for each call; terms can only make it shorter. None for no limit.
        tell_degraded: told of each text and stream for which the fallback stood in; None for nobody.
        second: confirms the alarms of streams where a policy says so; closed with this one. None when there is none.
    """

    def __init__(
        self,
        guard: StreamGuard,
        *,
        fallback: StreamGuard | None = None,
        breaker: Breaker | None = None,
        deadline_s: float | None = None,
        tell_degraded: TellDegraded | None = None,
        second: SecondGuard | None = None,
    ) -> None:
        super().__init__(guard)
        self.fallback = fallback
        self.breaker = breaker
        self.deadline_s = deadline_s
        self.second = second
        self.degraded = False
        self._tell_degraded = tell_degraded

    def on_terms(self, terms: Terms) -> ResilientGuard:
        """The same guard with a shorter deadline, with or without degraded mode, and the rest for the guard inside."""
        termed = ResilientGuard(
            on_terms(self.guard, Terms(instructions=terms.instructions)),
            fallback=self.fallback,
            breaker=self.breaker,
            deadline_s=min((limit for limit in (self.deadline_s, terms.deadline_s) if limit is not None), default=None),
            tell_degraded=self._tell_degraded,
            second=None if self.second is None else self.second.on_terms(terms),
        )
        termed.degraded = terms.degraded
        return termed

    async def judge(self, conversation: Conversation) -> Verdict:
        """Judge with the guard, or with the fallback where the guard cannot and the terms allow it.

        Raises:
            GuardTimeout: when the guard takes too long.
            GuardUnavailable: when it is left alone by the breaker.
            GuardError: what the guard raises.
        """
        judge = self.guard.judge
        if isinstance(self.guard, RememberingGuard):
            if (known := await self.guard.recalled(conversation)) is not None:
                return known
            judge = self.guard.judged
        try:
            return await self.called(self.permit(), judge(conversation))
        except Exception as error:  # whatever goes wrong inside the guard, the fallback can still judge
            if not self.stands_in:
                raise
            verdict = await self._by_fallback(conversation, error)
            self.tell(error)
            return replace(verdict, guard=self.name_after(error))

    def open(
        self, context: Conversation | None, channel: Channel = Channel.ANSWER, *, reasoning: str = "", name: str = ""
    ) -> ResilientSession:
        """Open a session: see `StreamGuard.open`. The guard itself is asked with the first piece of text.

        Raises:
            InputError: for a channel in which no assistant writes.
        """
        check_written(channel)
        about = {"reasoning": reasoning, "name": name}
        return ResilientSession(self, lambda guard: guard.open(context, channel, **about))

    async def close(self) -> None:
        """Close the guard and the fallback; safe to call twice."""
        try:
            await self.guard.close()
        finally:
            for other in (self.fallback, None if self.second is None else self.second.guard):
                if other is not None:
                    await other.close()

    async def id_text(self) -> IdText:
        """Begin to read the ids of one stream, as the guard does. Raises GuardError when it cannot."""
        return await _in_time(super().id_text(), self.deadline_s)

    # what the sessions share

    @property
    def stands_in(self) -> bool:
        """Whether the fallback judges what the guard cannot."""
        return self.degraded and self.fallback is not None

    def name_after(self, error: Exception) -> str:
        """What verdicts of the fallback are signed with."""
        fallback = self.fallback.name if self.fallback else ""
        kind = "GuardTimeout" if isinstance(error, TimeoutError) else type(error).__name__
        return f"degraded[{fallback}; {self.guard.name} {kind}]"

    def tell(self, error: Exception) -> None:
        """Tell that the fallback stands in."""
        if self._tell_degraded is not None:
            self._tell_degraded("GuardTimeout" if isinstance(error, TimeoutError) else type(error).__name__)

    def permit(self) -> Call | None:
        """Ask the breaker for a call; None when there is no breaker. Raises GuardUnavailable when it is open."""
        return None if self.breaker is None else self.breaker.call()

    async def called(self, call: Call | None, work: Coroutine[Any, Any, T]) -> T:
        """The result of one call to the guard, in time; the breaker learns how it went."""
        try:
            result = await _in_time(work, self.deadline_s)
        except BaseException as error:
            _tell_failed(call, error)
            raise
        if call is not None:
            call.went_well()
        return result

    async def _by_fallback(self, conversation: Conversation, error: Exception) -> Verdict:
        assert self.fallback is not None, "only asked where it stands in"
        try:
            return await _in_time(self.fallback.judge(conversation), FALLBACK_DEADLINE_S)
        except Exception:
            raise error from None  # what is recorded is why the guard itself could not judge


async def _in_time(work: Coroutine[Any, Any, T], deadline_s: float | None) -> T:
    try:
        return await within(work, deadline_s)
    except TimeoutError:
        raise GuardTimeout("the guard did not answer in time") from None


class ResilientSession(TextSession):
    """One text that arrives in pieces; see the module's text.

    Args:
        guard: whose session it is.
        begin: opens the session of a guard.
    """

    def __init__(self, guard: ResilientGuard, begin: Callable[[StreamGuard], Session]) -> None:
        super().__init__()
        self._guard = guard
        self._begin = begin
        self._session: Session | None = None
        self._stands_in = False
        self._texts: list[str] = []
        self._ids: IdText | None = None
        self._judged = 0
        self.signed = guard.name
        """What a verdict on this text is signed with: who judged last."""

    def close(self) -> None:
        """Give everything back at once; safe to call any number of times, also while a feed is running."""
        super().close()
        self._texts = []
        if self._session is not None:
            self._session.close()

    async def feed_ids(self, ids: Sequence[int]) -> tuple[TokenVerdict, ...]:
        """Take more tokens, where the guard takes ids: see `tidegate.guards.base.IdSession`.

        Raises:
            InputError: when an id stands for no text; the session is then closed.
            SessionClosed: after ``finish`` or ``close``.
            GuardError: when the guard cannot judge; the session is then closed.
        """
        return await self._alone(lambda: self._judge_ids(ids))

    async def _judge_ids(self, ids: Sequence[int]) -> tuple[TokenVerdict, ...]:
        self._ids = self._ids or await self._guard.id_text()
        text = self._ids.decode(ids)
        return await self._judged_by(text, lambda session: cast(IdSession, session).feed_ids(ids), last=False)

    async def _judge(self, text: str, *, last: bool) -> tuple[TokenVerdict, ...]:
        return await self._judged_by(text, lambda session: self._stepping(session, text, last=last), last=last)

    async def _judged_by(self, text: str, step: _Stepping, *, last: bool) -> tuple[TokenVerdict, ...]:
        if self._guard.stands_in and not self._stands_in:
            self._texts.append(text)
        if self._stands_in:
            return self._after(await self._step(text, last=last, deadline_s=FALLBACK_DEADLINE_S))
        try:
            tokens = await self._by_guard(step)
        except Exception as error:  # whatever goes wrong inside the guard, the fallback can still judge
            if self._closed or not self._guard.stands_in:
                raise
            return await self._change_over(error, last=last)
        if tokens:
            self._judged = tokens[-1].span.end
        return tokens

    async def _by_guard(self, step: _Stepping) -> tuple[TokenVerdict, ...]:
        call = None
        if self._session is None:
            call = self._guard.permit()
            try:
                self._session = self._begin(self._guard.guard)
            except BaseException as error:
                _tell_failed(call, error)
                raise
        elif self._guard.breaker is not None and self._guard.breaker.state == "closed":
            call = self._guard.permit()
        return await self._guard.called(call, step(self._session))

    async def _change_over(self, error: Exception, *, last: bool) -> tuple[TokenVerdict, ...]:
        """Let the fallback read the text from its beginning, and go on from there."""
        if self._session is not None:
            self._session.close()
        assert self._guard.fallback is not None, "only asked where it stands in"
        self._stands_in = True
        whole = "".join(self._texts)
        self._texts = []
        try:
            self._session = self._begin(self._guard.fallback)
            tokens = await self._step(whole, last=False, deadline_s=FALLBACK_DEADLINE_S) if whole else ()
            if last:
                tokens += await self._step("", last=True, deadline_s=FALLBACK_DEADLINE_S)
        except Exception:
            raise error from None  # what is recorded is why the guard itself could not judge
        self.signed = self._guard.name_after(error)
        self._guard.tell(error)
        return self._after(tokens)

    async def _step(self, text: str, *, last: bool, deadline_s: float | None) -> tuple[TokenVerdict, ...]:
        assert self._session is not None, "a session was opened before"
        return await _in_time(self._stepping(self._session, text, last=last), deadline_s)

    @staticmethod
    async def _stepping(session: Session, text: str, *, last: bool) -> tuple[TokenVerdict, ...]:
        return await (session.finish() if last else session.feed(text))

    def _after(self, tokens: tuple[TokenVerdict, ...]) -> tuple[TokenVerdict, ...]:
        """The fallback's tokens, without what the guard had judged before it failed."""
        judged = self._judged
        return tuple(
            replace(token, span=Span(max(token.span.start, judged), token.span.end))
            for token in tokens
            if token.span.end > judged or token.span.start == token.span.end == judged
        )
