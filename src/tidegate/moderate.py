"""The whole system on one page: judge, decide, keep.

`moderate` does it for a whole text, `StreamModerator` for a text that is still being written: it takes the text in
pieces and says of each character when it may leave. `moderate_stream` wraps it around an async iterator, `check` is
the one door for scripts and notebooks that are not async.

How a stream is decided. Each token is what the policy says of it alone. Its *debounced* action is the mildest of the
last ``policy.debounce`` tokens, so a single flagged token stops nothing; a text with fewer tokens than that is decided
by all that it has. The worst debounced action is the decision, with the verdict at the token that confirmed it. BLOCK
ends the stream. A character is released when every token that covers it has been judged, and it is not part of a run of
tokens that call for BLOCK and may still be confirmed; when such a run ends unconfirmed, it is released. REDACT is BLOCK
here, because what is to be redacted cannot be known before the text is complete.

A guard may end with a token without width, its verdict about the complete text. It confirms or clears what is pending
before it: the two together are decided as the milder of them.

A guard that fails is decided by ``policy.on_guard_error``. When that is milder than BLOCK, what is held and all that
follows is let through, and the coverage says how many characters were not judged.

What a policy only observes is decided beside, with a debounce of its own, and stops nothing: the decision says what it
would have been, as far as the stream went. A policy has layers; here always those of the scope are meant.
"""

from __future__ import annotations

import asyncio
import functools
import os
import threading
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar, cast

from tidegate.errors import GuardError, GuardTimeout, InputError, SessionClosed, UnreadableVerdict
from tidegate.guards import load_guard
from tidegate.guards.base import Guard, IdGuard, IdSession, IdText, Session, StreamGuard
from tidegate.guards.resilient import ResilientGuard
from tidegate.guards.session import assistant_turn, check_written
from tidegate.guards.terms import Terms, on_terms
from tidegate.policy import Policy, Retention, ScopedPolicy, decide, load_policy, observed
from tidegate.types import (
    Action,
    Channel,
    Conversation,
    Coverage,
    CoverageState,
    Decision,
    GuardFailure,
    Probabilities,
    Role,
    Scope,
    Severity,
    Span,
    Target,
    TokenVerdict,
    Turn,
    Verdict,
)

__all__ = ["Keep", "Step", "StreamModerator", "check", "failure_of", "moderate", "moderate_stream", "surely"]

T = TypeVar("T")
G = TypeVar("G", bound=Guard)


class Keep(Protocol):
    """Where decisions go; a Store's ``keep`` is one. What it returns is the decision's id, a string, or nothing."""

    async def __call__(self, decision: Decision, conversation: Conversation, *, retention: Retention) -> str | None: ...


# --- a whole text -------------------------------------------------------------------------------------------------


async def moderate(
    conversation: Conversation,
    *,
    guard: Guard,
    policy: Policy,
    scope: Scope = Scope(),  # noqa: B008 - frozen
    keep: Keep | None = None,
    timeout_s: float | None = None,
    coverage: Sequence[Coverage] | None = None,
) -> Decision:
    """Judge the last turn of a conversation, decide, and keep the decision.

    Args:
        conversation: its last turn is judged.
        guard: judges. When it fails, the decision has a failure, and ``policy.on_guard_error`` is done.
        policy: decides.
        scope: for whom.
        keep: where the decision goes; None keeps it nowhere.
        timeout_s: seconds that the guard may take, greater than 0; None for as long as it wants.
        coverage: what became of every text, given that the guard judges; None for one path for each turn.

    Raises:
        StoreError: when the decision could not be kept.
    """
    here = policy.at(scope)
    said = await _verdict(conversation, *_agreed(guard, here, timeout_s))
    paths = _paths_of(conversation) if coverage is None else tuple(coverage)
    if isinstance(said, GuardFailure):
        paths = tuple(_not_judged(path) for path in paths)
    decision = decide(policy, said, scope, paths)
    if keep is not None:
        await surely(keep(decision, conversation, retention=here.retention))
    return decision


def _agreed(guard: G, policy: Policy, timeout_s: float | None) -> tuple[G, float | None]:
    """The guard as the policy wants it, and the seconds that are waited for it.

    A `ResilientGuard` keeps the policy's deadline itself, so that there is time for its fallback behind it.
    """
    deadline_s = None if policy.deadline_ms is None else policy.deadline_ms / 1000
    if deadline_s is not None and not isinstance(guard, ResilientGuard):
        timeout_s = deadline_s if timeout_s is None else min(timeout_s, deadline_s)
    return on_terms(guard, Terms(deadline_s, policy.degraded == "edge", policy.instructions)), timeout_s


async def surely(work: Coroutine[Any, Any, T]) -> T:
    """Do this to its end, also when the caller is cancelled meanwhile; the cancellation goes on afterwards."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise


async def _verdict(conversation: Conversation, guard: Guard, timeout_s: float | None) -> Verdict | GuardFailure:
    try:
        async with asyncio.timeout(timeout_s):
            return await guard.judge(conversation)
    except Exception as error:  # whatever goes wrong inside a guard is the third outcome, and must be decided too
        return failure_of(error, guard.name)


def failure_of(error: Exception, guard: str) -> GuardFailure:
    """What is recorded of an exception that a guard raised. Only our own errors promise to quote no user text."""
    if isinstance(error, GuardError):
        return GuardFailure(type(error).__name__, str(error), guard)
    if isinstance(error, TimeoutError):
        return GuardFailure(GuardTimeout.__name__, "the guard did not answer in time", guard)
    return GuardFailure(type(error).__name__, "the guard broke down", guard)


def _not_judged(path: Coverage) -> Coverage:
    return replace(path, state=CoverageState.NOT_JUDGED) if path.state is CoverageState.JUDGED else path


_CHANNELS: Final = {
    Role.SYSTEM: Channel.SYSTEM,
    Role.USER: Channel.USER,
    Role.ASSISTANT: Channel.ANSWER,
    Role.TOOL: Channel.TOOL_RESULT,
}


def _paths_of(conversation: Conversation) -> tuple[Coverage, ...]:
    last = len(conversation.turns) - 1
    return tuple(
        Coverage(path, channel, CoverageState.JUDGED if index == last else CoverageState.NOT_JUDGED, len(text))
        for index, turn in enumerate(conversation.turns)
        for path, channel, text in _texts_of(index, turn)
        if text or path.endswith("content")
    )


def _texts_of(index: int, turn: Turn) -> Iterable[tuple[str, Channel, str]]:
    yield f"turns[{index}].content", _CHANNELS[turn.role], turn.content
    yield f"turns[{index}].reasoning", Channel.REASONING, turn.reasoning
    for number, call in enumerate(turn.tool_calls):
        yield f"turns[{index}].tool_calls[{number}].arguments", Channel.TOOL_CALL, call.arguments


# --- a text that is being written ---------------------------------------------------------------------------------

_STOPS: Final = Action.REDACT
"""This action or a worse one ends a stream."""


@dataclass(frozen=True, slots=True)
class Step:
    """What one piece of text led to.

    Attributes:
        released: the text that may leave now: exactly the characters that follow those released before.
        tokens: the tokens judged for good in this step, in order; on a BLOCK, up to the one that confirmed it.
        decision: set when the stream has ended, by BLOCK in its middle or by ``finish``; else None.
    """

    released: str
    tokens: tuple[TokenVerdict, ...] = ()
    decision: Decision | None = None


_Ask = Callable[[Session], Awaitable[tuple[TokenVerdict, ...]]]
"""How a session is asked in one step."""


@dataclass(frozen=True, slots=True)
class _Finding:
    """A debounced action, the token that stands for it, and where the run of tokens began that confirmed it."""

    action: Action
    token: TokenVerdict
    start: int

    @property
    def rank(self) -> tuple[Action, float]:
        return self.action, self.token.probabilities.flagged


class _Debounce:
    """Which of the actions that single tokens call for are confirmed by their neighbours.

    Attributes:
        worst: the worst confirmed so far; None when nothing is.
        pending_from: where the run of tokens begins that call for a stop and may still be confirmed; None when none is.
    """

    def __init__(self, rules: ScopedPolicy) -> None:
        self.worst: _Finding | None = None
        self.pending_from: int | None = None
        self._rules = rules
        self._length = rules.policy.debounce
        self._run: deque[tuple[Action, TokenVerdict]] = deque(maxlen=self._length)

    def note(self, token: TokenVerdict) -> bool:
        """Take the next token; say whether it stops the stream."""
        action = self._rules.action(token)
        if action is Action.ALLOW:
            self._calm(token)
            return False
        self._run.append((action, token))
        if action < _STOPS:
            self.pending_from = None
        elif self.pending_from is None:
            self.pending_from = token.span.start
        return len(self._run) == self._length and self._confirm()

    def note_end(self, token: TokenVerdict) -> bool:
        """Take the verdict on the complete text: it confirms or clears the token before it."""
        action = self._rules.action(token)
        if self._length == 1 or action is Action.ALLOW or (self.worst is None and not self._run):
            return self.note(token) or self.complete()
        if not self._run:
            return False
        before = self._run[-1]
        self._run.clear()
        self._run.extend((before, (action, token)))
        return self._confirm()

    def complete(self) -> bool:
        """The text ends here: when it has fewer tokens than the debounce asks for, those that it has decide."""
        return self.worst is None and bool(self._run) and self._confirm()

    def _calm(self, token: TokenVerdict) -> None:
        self._run.clear()
        self.pending_from = None
        if self.worst is None or self.worst.action is Action.ALLOW:
            self.worst = _Finding(Action.ALLOW, token, 0)

    def _confirm(self) -> bool:
        """The mildest token of the run stands for all of it; the last one, when there are several."""
        action = min(action for action, _ in self._run)
        token = next(token for call, token in reversed(self._run) if call is action)
        found = _Finding(action, token, self._run[0][1].span.start)
        if self.worst is None or found.rank > self.worst.rank:
            self.worst = found
        return action >= _STOPS


class StreamModerator:
    """Watches one text while it is written: one channel of one choice of an answer.

    Args:
        guard: opens the session, at the first piece of text.
        policy: decides.
        scope: for whom.
        context: the turns before the text; None when nothing came before.
        channel: which text it is, for the guard and the coverage.
        path: the same as a place in the exchange, for the coverage.
        reasoning: what the assistant thought before the text; "" when nothing, or when it is not to count.
        name: the name of the called tool, when the text is the arguments of a call.
        timeout_s: seconds that the guard may take for each step, greater than 0; None for as long as it wants.

    Raises:
        InputError: for a channel in which no assistant writes.

    Attributes:
        decision: the decision, once the stream has ended; else None.
        fed: how many characters came in.
        judged: how many of them were judged for good.
        released: how many of them may leave.
    """

    def __init__(
        self,
        guard: StreamGuard,
        policy: Policy,
        scope: Scope = Scope(),  # noqa: B008 - frozen
        context: Conversation | None = None,
        *,
        channel: Channel = Channel.ANSWER,
        path: str = "answer",
        reasoning: str = "",
        name: str = "",
        timeout_s: float | None = None,
    ) -> None:
        check_written(channel)
        self.decision: Decision | None = None
        self.fed = 0
        self.judged = 0
        self.released = 0
        self.channel = channel
        self.path = path
        self._rules = policy.for_scope(scope, Target.RESPONSE)
        self._guard, self._timeout_s = _agreed(guard, self._rules.policy, timeout_s)
        self._context = context
        self._before = {"reasoning": reasoning, "name": name}
        self._debounce = _Debounce(self._rules)
        self._watching = None if self._rules.observing is None else _Debounce(self._rules.observing)
        self._watching_stopped = False
        self._session: Session | None = None
        self._ids: IdText | None = None
        self._failure: GuardFailure | None = None
        self._texts: list[str] = []
        self._held = ""
        self._ended = False

    @property
    def text(self) -> str:
        """All the text that came in, released or not."""
        return "".join(self._texts)

    @property
    def held(self) -> int:
        """How many characters are held now."""
        return len(self._held)

    @property
    def failure(self) -> GuardFailure | None:
        """Why the guard says nothing any more; None while it judges."""
        return self._failure

    @property
    def coverage(self) -> tuple[Coverage, ...]:
        """How many characters were judged, and how many were not."""
        states = ((CoverageState.JUDGED, self.judged), (CoverageState.NOT_JUDGED, self.fed - self.judged))
        return tuple(
            Coverage(self.path, self.channel, state, characters)
            for state, characters in states
            if characters or (state is CoverageState.JUDGED and not self.fed)
        )

    async def feed(self, text: str) -> Step:
        """Take more text; say what may leave.

        Raises:
            SessionClosed: after the stream ended.
        """
        self._note(text)
        return await self._step(lambda session: session.feed(text), new=bool(text), ends=False)

    async def feed_ids(self, ids: Sequence[int]) -> Step:
        """Take more tokens of a model that shares the guard's tokenizer, as ids; say what may leave.

        The text is what the ids are when decoded. A stream is given either text or ids.

        Raises:
            InputError: when the guard takes no ids, or one of them stands for no text; the stream goes on without them.
            SessionClosed: after the stream ended.
        """
        guard = self._guard
        if not isinstance(guard, IdGuard) or not guard.takes_ids:
            raise InputError(f"the guard {guard.name} takes no ids", where="ids")
        if self._ids is None and self._failure is None and not self._ended:
            try:
                async with asyncio.timeout(self._timeout_s):
                    self._ids = await guard.id_text()
            except Exception as error:  # that the guard cannot read them is its failure, and must be decided too
                self._fail(failure_of(error, guard.name))
        self._note("" if self._ids is None else self._ids.decode(ids))
        return await self._step(lambda session: cast(IdSession, session).feed_ids(ids), new=bool(ids), ends=False)

    async def finish(self) -> Step:
        """The text is complete: judge what remains, and decide. The step has the decision.

        Raises:
            SessionClosed: after the stream ended.
        """
        return await self._step(lambda session: session.finish(), new=False, ends=True)

    def close(self) -> Decision | None:
        """Give everything back at once; safe to call any number of times.

        Returns the decision on what was judged so far when the stream had not ended, so that it can be kept; None when
        it had, or when nothing was judged.
        """
        if self._session is not None:
            self._session.close()
        if self._ended:
            return None
        self._ended = True
        self._debounce.complete()
        if self._watching is not None and not self._watching_stopped:
            self._watching.complete()
        if self._debounce.worst is not None or self._failure is not None:
            self.decision = self._decide()
        return self.decision

    def _note(self, text: str) -> None:
        self._texts.append(text)
        self._held += text
        self.fed += len(text)

    async def _step(self, ask: _Ask, *, new: bool, ends: bool) -> Step:
        if self._ended:
            raise SessionClosed("the stream has ended")
        tokens: tuple[TokenVerdict, ...] = ()
        stopped = False
        if self._failure is None and (new or self.fed):
            tokens, stopped = await self._judge(ask, ends=ends)
        if self._failure is not None:
            stopped = stopped or self._stops(self._failure)
        released = self._release(self._bound(stopped=stopped, ends=ends))
        if stopped or ends:
            self._end()
        return Step(released, tokens, self.decision)

    async def _judge(self, ask: _Ask, *, ends: bool) -> tuple[tuple[TokenVerdict, ...], bool]:
        """Ask the guard; the tokens that count, and whether the last of them stops the stream."""
        try:
            async with asyncio.timeout(self._timeout_s):
                if self._session is None:
                    self._session = self._guard.open(self._context, self.channel, **self._before)
                tokens = await ask(self._session)
        except Exception as error:  # whatever goes wrong inside a guard is the third outcome, and must be decided too
            self._fail(failure_of(error, self._guard.name))
            return (), False
        for number, token in enumerate(tokens, 1):
            self.judged = token.span.end
            whole = ends and number == len(tokens) and token.span == Span(self.fed, self.fed)
            self._watch(token, whole=whole)
            if self._debounce.note_end(token) if whole else self._debounce.note(token):
                return tokens[:number], True
        if ends and self.judged != self.fed:
            said = f"the guard judged {self.judged} of {self.fed} characters"
            self._fail(GuardFailure(UnreadableVerdict.__name__, said, self._guard.name))
        if ends and self._watching is not None and not self._watching_stopped:
            self._watching.complete()
        return tokens, ends and self._debounce.complete()

    def _watch(self, token: TokenVerdict, *, whole: bool) -> None:
        """What would have become of the stream if all that is only observed were in force; it ends where that stops."""
        watching = self._watching
        if watching is not None and not self._watching_stopped:
            self._watching_stopped = watching.note_end(token) if whole else watching.note(token)

    def _stops(self, failure: GuardFailure) -> bool:
        return not self._rules.quiet and self._rules.policy.on_failure(failure.kind) >= _STOPS

    def _fail(self, failure: GuardFailure) -> None:
        self._failure = failure
        if self._session is not None:
            self._session.close()

    def _bound(self, *, stopped: bool, ends: bool) -> int:
        """How many characters may leave, counted from the beginning of the text."""
        if self._failure is not None:
            return self.released if stopped else self.fed
        pending = self._debounce.pending_from
        if pending is None or (ends and not stopped):
            return self.judged
        return min(self.judged, pending)

    def _release(self, bound: int) -> str:
        count = max(0, bound - self.released)
        text, self._held = self._held[:count], self._held[count:]
        self.released += count
        return text

    def _end(self) -> None:
        self._ended = True
        if self._session is not None:
            self._session.close()
        self.decision = self._decide()

    def _decide(self) -> Decision:
        decision = self._choose(self._rules, self._debounce)
        if self._watching is None or self._rules.observing is None:
            return decision
        other = self._choose(self._rules.observing, self._watching)
        return observed(other if self._rules.quiet else decision, other, quiet=self._rules.quiet)

    def _choose(self, rules: ScopedPolicy, debounce: _Debounce) -> Decision:
        found = debounce.worst
        choices = [rules.choose(self._failure)] if self._failure else []
        if found is not None or not choices:
            choices.append(rules.choose(self._verdict(found)))
        chosen = max(choices, key=lambda choice: choice.action)
        action = Action.BLOCK if chosen.action >= _STOPS else chosen.action
        return replace(chosen, action=action, coverage=self.coverage)

    def _verdict(self, found: _Finding | None) -> Verdict:
        signed: str = getattr(self._session, "signed", self._guard.name)
        if found is None:
            nothing = Probabilities(1.0, 0.0, 0.0)
            return Verdict(Target.RESPONSE, Severity.SAFE, nothing, reason="there was no text", guard=signed)
        token = found.token
        named = token.category is not None and token.severity > Severity.SAFE
        return Verdict(
            Target.RESPONSE,
            token.severity,
            token.probabilities,
            (token.category,) if named and token.category is not None else (),
            {} if token.category is None else {token.category: token.category_probability},
            span=Span(found.start, token.span.end),
            guard=signed,
        )


async def moderate_stream(
    chunks: AsyncIterable[str],
    *,
    guard: StreamGuard,
    policy: Policy,
    scope: Scope = Scope(),  # noqa: B008 - frozen
    context: Conversation | None = None,
    channel: Channel = Channel.ANSWER,
    path: str = "answer",
    reasoning: str = "",
    name: str = "",
    keep: Keep | None = None,
    timeout_s: float | None = None,
) -> AsyncGenerator[Step, None]:
    """Watch a text that arrives in pieces: one step for each piece, and one for its end unless it was stopped before.

    The last step has the decision, which is kept before the step is given. When the consumer goes away earlier, the
    decision on what was judged so far is kept. The arguments are those of `StreamModerator`; ``keep`` is where
    decisions go, None for nowhere.

    Raises:
        StoreError: when the decision could not be kept.
    """
    moderator = StreamModerator(
        guard,
        policy,
        scope,
        context,
        channel=channel,
        path=path,
        reasoning=reasoning,
        name=name,
        timeout_s=timeout_s,
    )

    async def kept(decision: Decision | None) -> None:
        if decision is not None and keep is not None:
            answer = assistant_turn(moderator.text, channel, reasoning=reasoning, name=name)
            whole = context.then(answer) if context else Conversation((answer,))
            await surely(keep(decision, whole, retention=policy.at(scope).retention))

    try:
        async for text in chunks:
            step = await moderator.feed(text)
            await kept(step.decision)
            yield step
            if step.decision is not None:
                return
        step = await moderator.finish()
        await kept(step.decision)
        yield step
    finally:
        await kept(moderator.close())


# --- for callers that are not async -------------------------------------------------------------------------------


def check(
    text: str, response: str | None = None, *, guard: str | Guard = "edge", policy: str | Path | Policy = "balanced"
) -> Decision:
    """Judge one text from a script or a notebook, also where an event loop is running already.

    Args:
        text: what a person wrote.
        response: what a model answered; when it is given, it is what is judged, and ``text`` is its context.
        guard: a guard, or what `tidegate.load_guard` takes; loaded once for each process.
        policy: a policy, or what `tidegate.load_policy` takes; read once for each process.

    Raises:
        InputError: when a text is not a str.
        GuardUnavailable: when the guard cannot be loaded. One that fails later gives a decision with a failure.
        PolicyError: when the policy cannot be used.
    """
    for where, value in (("text", text), ("response", response)):
        if not isinstance(value, str) and (where == "text" or value is not None):
            raise InputError(f"expected a str, got {type(value).__name__}", where=where)
    return _background_of(os.getpid()).run(_check(Conversation.of(text, response), guard, policy))


async def _check(conversation: Conversation, guard: str | Guard, policy: str | Path | Policy) -> Decision:
    return await moderate(
        conversation,
        guard=_guard_of(os.getpid(), guard) if isinstance(guard, str) else guard,
        policy=policy if isinstance(policy, Policy) else _policy_of(policy),
    )


class _Background:
    """A thread with an event loop of its own, for as long as the process lives."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="tidegate-check", daemon=True).start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise


@functools.cache
def _background_of(process: int) -> _Background:
    """One for each process: a fork copies the memory, but not the thread."""
    return _Background()


@functools.cache
def _guard_of(process: int, spec: str) -> Guard:
    """Called only in the background thread, so that a guard is never loaded twice."""
    return load_guard(spec)


@functools.lru_cache(maxsize=64)
def _policy_of(policy: str | Path) -> Policy:
    return load_policy(policy)
