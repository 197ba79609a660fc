"""A text that is still being written: what of it may leave, what is taken out, and how it ends.

`StreamModerator` is one text; `moderate_stream` wraps it around an async iterator.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple, cast

from tidegate.deadlines import within
from tidegate.errors import GuardTimeout, InputError, SessionClosed, UnreadableVerdict
from tidegate.guards.base import IdGuard, IdSession, IdText, Session, StreamGuard
from tidegate.guards.rejudged import token_verdict
from tidegate.guards.second import SecondGuard, second_of
from tidegate.guards.session import assistant_turn, check_written
from tidegate.moderate.debounce import STOPS, Debounce, Finding, Outcome
from tidegate.moderate.delays import Delays
from tidegate.moderate.whole import Keep, agreed, failure_of, surely
from tidegate.personal import LONGEST_RUN, Finder, Found
from tidegate.policy import Policy, ScopedPolicy, observed
from tidegate.types import (
    Action,
    Channel,
    Conversation,
    Coverage,
    CoverageState,
    Decision,
    GuardFailure,
    Intervention,
    InterventionKind,
    Probabilities,
    Scope,
    Severity,
    Span,
    Target,
    TokenVerdict,
    Verdict,
)

__all__ = ["Again", "Masked", "Retry", "Step", "StreamModerator", "ending_of", "moderate_stream"]

PATIENCE: Final = 200
"""Characters behind a confirmed run within which personal data must begin; else there is nothing to take out."""


@dataclass(frozen=True, slots=True)
class Retry:
    """The text was rolled back: the upstream is to go on from here.

    Attributes:
        prefix: the text that stays, which has left already.
        number: which try it is, from 1.
        hint: what the upstream is to be told.
    """

    prefix: str
    number: int
    hint: str


Again = Callable[[Retry], AsyncIterable[str]]
"""Gives what follows the prefix, written anew; fails with any exception where the upstream does."""


class Masked(NamedTuple):
    """A mask in a text: from which of its characters on, and what stands there, as long as what it covers."""

    start: int
    text: str


@dataclass(frozen=True, slots=True)
class Step:
    """What one piece of text led to.

    Attributes:
        released: the text that may leave now: exactly the characters that follow those released before, with personal
            data masked where the policy says so.
        tokens: the tokens judged for good in this step, in order; on a BLOCK, up to the one that confirmed it.
        decision: set when the stream has ended, by BLOCK in its middle or by ``finish``; else None.
        retry: set when the text was rolled back, and what comes next is to be what follows its prefix; else None.
        masks: the masks in what was released, in order, counted from the beginning of the text.
    """

    released: str
    tokens: tuple[TokenVerdict, ...] = ()
    decision: Decision | None = None
    retry: Retry | None = None
    masks: tuple[Masked, ...] = ()


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
        second: confirms alarms where the policy says so; None for the one that the guard brings along, if any.
        retries: whether somebody can ask the upstream to go on from a `Retry`; else nothing is rolled back.
        masks: whether what is released can differ from what came in; else the text is stopped where personal data would
            be taken out.
        clock: seconds, from any beginning.

    Raises:
        InputError: for a channel in which no assistant writes.

    Attributes:
        decision: the decision, once the stream has ended; else None.
        fed: how many characters came in; after a rollback, how many stayed and came since.
        judged: how many of them were judged for good.
        released: how many of them may leave.
        leaked: how many characters had left of text that was flagged afterwards.
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
        second: SecondGuard | None = None,
        retries: bool = False,
        masks: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        check_written(channel)
        self.decision: Decision | None = None
        self.fed = 0
        self.judged = 0
        self.released = 0
        self.leaked = 0
        self.channel = channel
        self.path = path
        self._rules = policy.for_scope(scope, Target.RESPONSE)
        here = self._rules.policy
        self._guard, self._timeout_s = agreed(guard, here, timeout_s)
        self._second = second or second_of(self._guard)
        self._context = context
        self._before = {"reasoning": reasoning, "name": name}
        self._hold = here.hold
        self._aside = self._hold.mode == "release_first" or self._hold.delay_ms is not None
        self._rollback = here.rollback if retries and here.may_roll_back and not self._rules.quiet else None
        self._masks = masks
        self._watching = None if self._rules.observing is None else Debounce(self._rules.observing, masks=masks)
        self._watching_stopped = False
        self._failure: GuardFailure | None = None
        self._delays = Delays(clock)
        self._confirmed: Verdict | None = None
        self._questions: Counter[str] = Counter()
        self._overruled_characters = 0
        self._masked: list[Masked] = []
        self._told = 0
        self._tries = 0
        self._thrown = [0, 0]
        self._rolled_back: Decision | None = None
        self._gave_up = False
        self._first = 0
        self._ids: IdText | None = None
        self._ended = False
        self._begin("")

    def _begin(self, text: str) -> None:
        """Nothing of the text was judged yet; what of it has left stays."""
        self._session: Session | None = None
        self._debounce = Debounce(self._rules, masks=self._masks)
        self._texts = [text] if text else []
        self._new = [text] if text else []
        self._new_ids: list[int] = []
        self._held = ""
        self.fed = len(text)
        self.judged = 0
        self._stopped = False
        self._finder = Finder() if self._masks and self._rules.masks and not self._rules.quiet else None
        self._found: deque[Found] = deque()
        self._calm_start = 0
        self._mask_after: int | None = None
        self._masked_from = 0
        self._need: int | None = None
        self._hot_from: int | None = None
        self._cool = 0
        self._granted = 0
        self._unreleased: deque[Span] = deque()
        self._overruled: TokenVerdict | None = None
        self._passed = False
        self._since = 0
        self._fresh: list[TokenVerdict] = []
        self._task: asyncio.Task[None] | None = None
        self._wants_end = False

    @property
    def text(self) -> str:
        """All the text that came in, released or not, without what was rolled back."""
        return "".join(self._texts)

    @property
    def left(self) -> str:
        """All the text that was released, as it was."""
        parts: list[str] = []
        end = 0
        for start, text in self._masked:
            parts += (self.text[end:start], text)
            end = start + len(text)
        return "".join((*parts, self.text[end : self.released]))

    @property
    def held(self) -> int:
        """How many characters are held now."""
        return len(self._held)

    @property
    def failure(self) -> GuardFailure | None:
        """Why the guard says nothing any more; None while it judges."""
        return self._failure

    @property
    def rolled_back(self) -> bool:
        """Whether the text was rolled back, and has not ended since."""
        return self._rolled_back is not None and not self._ended

    @property
    def delay_s(self) -> float:
        """Seconds that a character was held before it left, the longest so far."""
        return self._delays.longest

    @property
    def due_s(self) -> float | None:
        """In how many seconds `late` is to be called if nothing comes before; at least 0. None for never."""
        if self._ended or self._hold.delay_ms is None or not self._held or self._waits:
            return None
        oldest = self._delays.oldest()
        return None if oldest is None else max(0.0, self._hold.delay_ms / 1000 - oldest)

    @property
    def _waits(self) -> bool:
        """Whether what is held is only what needs more text: then the upstream is late, and nobody else."""
        return self._task is None and self.released >= self._settled

    @property
    def _settled(self) -> int:
        return self.judged if self._finder is None else min(self.judged, self._finder.settled)

    @property
    def coverage(self) -> tuple[Coverage, ...]:
        """How many characters were judged before they left, how many left first, and how many were not judged."""
        ahead = max(0, min(self._first, self.released - self.judged))
        states = (
            (CoverageState.JUDGED, self.judged - (self._first - ahead)),
            (CoverageState.RELEASED_FIRST, self._first),
            (CoverageState.NOT_JUDGED, self.fed - self.judged - ahead),
        )
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
        if self._ended:
            raise SessionClosed("the stream has ended")
        if text:
            self._new.append(text)
            self._arrive(text)
        return await self._step(ends=False)

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
        if self._ended:
            raise SessionClosed("the stream has ended")
        if self._ids is None and self._failure is None:
            try:
                self._ids = await within(guard.id_text(), self._timeout_s)
            except Exception as error:  # that the guard cannot read them is its failure, and must be decided too
                self._fail(failure_of(error, guard.name))
        if self._ids is not None and ids:
            text = self._ids.decode(ids)
            self._new_ids += ids
            self._arrive(text)
        return await self._step(ends=False)

    def _arrive(self, text: str) -> None:
        if not text:
            return
        self._texts.append(text)
        self._held += text
        self.fed += len(text)
        self._delays.arrive(self.fed, self._settled)
        if self._finder is not None:
            self._found.extend(self._finder.feed(text))

    async def finish(self) -> Step:
        """The text is complete: judge what remains, and decide. The step has the decision, or a retry.

        Raises:
            SessionClosed: after the stream ended.
        """
        if self._ended:
            raise SessionClosed("the stream has ended")
        if self._finder is not None:
            self._found.extend(self._finder.finish())
        return await self._step(ends=True)

    def late(self) -> Step:
        """Nothing came, and what is held has been held for as long as the policy allows; see ``due_s``.

        Raises:
            SessionClosed: after the stream ended.
        """
        if self._ended:
            raise SessionClosed("the stream has ended")
        if not self._grant():
            self._fail_late()
        return self._leave(ends=False)

    def give_up(self) -> Step:
        """The upstream could not go on after a retry: the stream ends as the policy says then.

        Raises:
            SessionClosed: after the stream ended, or when nothing was rolled back.
        """
        if self._ended or self._rolled_back is None:
            raise SessionClosed("the stream has ended, or was not rolled back")
        self._gave_up = True
        self._end()
        return Step("", (), self.decision)

    def count_on(self, before: StreamModerator) -> None:
        """This is the same text, judged again from its beginning: what was rolled back before it counts on."""
        self._tries, self._thrown, self._rolled_back = before._tries, before._thrown, before._rolled_back

    def close(self) -> Decision | None:
        """Give everything back at once; safe to call any number of times.

        Returns the decision on what was judged so far when the stream had not ended, so that it can be kept; None when
        it had, or when nothing was judged.
        """
        self._drop()
        if self._ended:
            return None
        self._ended = True
        self._debounce.complete()
        if self._watching is not None and not self._watching_stopped:
            self._watching.complete()
        self._gave_up = self._rolled_back is not None and self._debounce.worst is None
        if self._debounce.worst is not None or self._failure is not None or self._rolled_back is not None:
            self.decision = self._decide()
        return self.decision

    def _drop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            self._task = None
        if self._session is not None:
            self._session.close()

    # judging

    async def _step(self, *, ends: bool) -> Step:
        if self._failure is None and (self._new or self._new_ids or self.fed):
            if self._aside:
                await self._judge_aside(ends=ends)
            else:
                await self._judge(ends=ends)
        return self._leave(ends=ends)

    async def _judge_aside(self, *, ends: bool) -> None:
        """Judge in a task of its own, so that text can leave while the guard is at work."""
        self._wants_end = ends
        if self._task is None:
            self._task = asyncio.create_task(self._pump())
        task = self._task
        if self._hold.mode == "release_first" and not ends and self._hold.delay_ms is None:
            await asyncio.sleep(0)
        else:
            await self._await(task, ends=ends)
        if task.done():
            self._task = None
            task.result()

    async def _await(self, task: asyncio.Task[None], *, ends: bool) -> None:
        """Wait for the task, but not for longer than the policy allows. At the end nothing can leave late."""
        oldest = self._delays.oldest() if self._held else None
        limit = None if self._hold.delay_ms is None else self._hold.delay_ms / 1000
        rest = None if limit is None or oldest is None else max(0.0, limit - oldest)
        await asyncio.wait({task}, timeout=rest)
        late = not task.done() or (limit is not None and self._overdue(limit))
        if late and self._failure is None and not self._stopped and (ends or not self._grant()):
            self._fail_late()

    def _overdue(self, limit: float) -> bool:
        oldest = self._delays.oldest() if self._held else None
        return oldest is not None and oldest > limit and self.released < self._settled

    async def _pump(self) -> None:
        while not self._stopped and self._failure is None:
            if self._new or self._new_ids:
                await self._judge(ends=False)
            else:
                if self._wants_end:
                    self._wants_end = False
                    await self._judge(ends=True)
                return

    async def _judge(self, *, ends: bool) -> None:
        """Ask the guard, and take what it says, up to the token that stops the stream."""
        text, ids = "".join(self._new), tuple(self._new_ids)
        self._new.clear()
        self._new_ids.clear()
        try:
            tokens = await within(self._said(text, ids, ends=ends), self._timeout_s)
        except Exception as error:  # whatever goes wrong inside a guard is the third outcome, and must be decided too
            self._fail(failure_of(error, self._guard.name))
            return
        for number, token in enumerate(tokens, 1):
            self.judged = token.span.end
            whole = ends and number == len(tokens) and token.span == Span(self.fed, self.fed)
            self._fresh.append(token)
            self._watch(token, whole=whole)
            if await self._note(token, whole=whole):
                self._stopped = True
                return
        if ends and self.judged != self.fed:
            said = f"the guard judged {self.judged} of {self.fed} characters"
            self._fail(GuardFailure(UnreadableVerdict.__name__, said, self._guard.name))
        if not ends:
            return
        if self._watching is not None and not self._watching_stopped:
            self._watching.complete()
        last = tokens[-1] if tokens else None
        if await self._take(self._debounce.complete(), last) or self._lacks(complete=True):
            self._stopped = True

    async def _said(self, text: str, ids: Sequence[int], *, ends: bool) -> tuple[TokenVerdict, ...]:
        """What the guard says of more text, or of more ids."""
        if self._session is None:
            self._session = self._guard.open(self._context, self.channel, **self._before)
        if ids:
            tokens = await cast(IdSession, self._session).feed_ids(ids)
        else:
            tokens = await self._session.feed(text) if text or not ends else ()
        return tokens + await self._session.finish() if ends else tokens

    async def _note(self, token: TokenVerdict, *, whole: bool) -> bool:
        """Take a token; whether it stops the stream."""
        if self._need is not None and token.span.start >= self._need + LONGEST_RUN and self._lacks(complete=False):
            return True
        if token.span.end > self.released:
            self._unreleased.append(token.span)
        self._warm(token)
        action, redacts = self._debounce.call(token)
        if action < STOPS:
            if self._mask_after is None and token.span.end > token.span.start:
                self._calm_start = token.span.start
            self._overruled, self._passed = None, False
        elif (self._overruled is not None or self._passed) and not redacts:
            self._since += 1
            self._overruled_characters += token.span.end - token.span.start
            if self._since < self._rules.policy.confirm.again_after:
                if self._overruled is not None:
                    self._debounce.note(replace(self._overruled, span=token.span), most=Action.REVIEW)
                return False
            self._overruled, self._passed = None, False
        outcome = self._debounce.note_end(token) if whole else self._debounce.note(token)
        return await self._take(outcome, token)

    async def _take(self, outcome: Outcome, token: TokenVerdict | None) -> bool:
        if outcome is Outcome.MASK and self._mask_after is None:
            self._mask_after, self._masked_from = self._calm_start, self._debounce.masked_from or 0
            self._need = self.judged + PATIENCE
            self._leak_masked()
        return outcome is Outcome.STOP and (token is None or await self._alarm(token))

    def _warm(self, token: TokenVerdict) -> None:
        """Risk that rises holds text until it has fallen for as many tokens as the debounce says."""
        risk = self._hold.risk
        if risk is None or self._rules.quiet:
            return
        if token.probabilities.flagged >= risk:
            self._cool = 0
            if self._hot_from is None:
                self._hot_from = token.span.start
        elif self._hot_from is not None:
            self._cool += 1
            if self._cool >= self._rules.policy.debounce:
                self._hot_from = None

    def _lacks(self, *, complete: bool) -> bool:
        """Whether personal data is to be taken out, and there is none."""
        if self._need is None or self._mask_after is None:
            return False
        limit = self.fed if complete else self._need
        if any(one.end > self._mask_after and one.start < limit for one in self._found):
            self._need = None
            return False
        return True

    async def _alarm(self, token: TokenVerdict) -> bool:
        """Have an alarm confirmed, where the policy says so; whether it stands."""
        confirm = self._rules.policy.confirm
        if not confirm.enabled or self._rules.quiet:
            return True
        said = await self._asked(token)
        if isinstance(said, GuardFailure):
            self._questions["failed"] += 1
            if confirm.on_error == "stop":
                return True
            self._passed, self._since = True, 0
            self._debounce.forget()
            return False
        if self._rules.choose(said).action >= STOPS:
            self._questions["confirmed"] += 1
            self._confirmed = said
            return True
        self._questions["overruled"] += 1
        pending = self._debounce.pending_from
        self._overruled_characters += token.span.end - (token.span.start if pending is None else pending)
        self._overruled, self._since = token_verdict(token.span, said), 0
        self._debounce.overrule(self._overruled)
        return False

    async def _asked(self, token: TokenVerdict) -> Verdict | GuardFailure:
        if self._second is None:
            return GuardFailure("GuardUnavailable", "there is no guard that confirms alarms")
        turn = assistant_turn(self.text[: token.span.end], self.channel, name=self._before["name"])
        before = self._context.turns if self._context else ()
        deadline_ms = self._rules.policy.confirm.deadline_ms
        try:
            return await self._second.ask(
                Conversation((*before, turn)), None if deadline_ms is None else deadline_ms / 1000
            )
        except Exception as error:  # whatever goes wrong inside the other guard is a failure too
            return failure_of(error, self._second.guard.name)

    def _watch(self, token: TokenVerdict, *, whole: bool) -> None:
        """What would have become of the stream if all that is only observed were in force; it ends where that stops."""
        watching = self._watching
        if watching is not None and not self._watching_stopped:
            outcome = watching.note_end(token) if whole else watching.note(token)
            self._watching_stopped = outcome is Outcome.STOP

    def _stops(self, failure: GuardFailure) -> bool:
        return not self._rules.quiet and self._rules.policy.on_failure(failure.kind) >= STOPS

    def _fail(self, failure: GuardFailure) -> None:
        self._failure = failure
        if self._session is not None:
            self._session.close()

    def _fail_late(self) -> None:
        said = f"text was held for longer than the {self._hold.delay_ms} ms that the policy allows"
        if self._task is not None:
            self._task.cancel()
            self._task = None
        self._fail(GuardFailure(GuardTimeout.__name__, said, self._guard.name))

    # what leaves

    def _leave(self, *, ends: bool) -> Step:
        failure = self._failure
        stopped = self._stopped or (failure is not None and self._stops(failure))
        if stopped and failure is None:
            self._leak()
        again = self._again() if self._stopped and failure is None else None
        bound = self._bound(stopped=stopped, ends=ends)
        released = self._release(bound if again is None else min(bound, self._buffered(1)))
        tokens, self._fresh = tuple(self._fresh), []
        masks, self._told = tuple(self._masked[self._told :]), len(self._masked)
        if again is not None:
            return Step(released, tokens, None, self._roll_back(again), masks)
        if stopped or ends:
            self._end()
        return Step(released, tokens, self.decision, None, masks)

    def _bound(self, *, stopped: bool, ends: bool) -> int:
        """How many characters may leave, counted from the beginning of the text."""
        if self._failure is not None:
            if stopped:
                return self.released
            masking = self._mask_after is not None and not ends
            return min(self.fed, self._finder.settled) if masking and self._finder is not None else self.fed
        safe = self._safe(stopped=stopped, ends=ends)
        hot = self._hot_from is not None or self._mask_after is not None
        if self._hold.mode == "release_first" and not stopped and not hot:
            safe = self.fed if self._hold.leak is None else min(self.fed, safe + self._hold.leak)
        return safe if stopped else max(safe, min(self._granted, self.fed))

    def _safe(self, *, stopped: bool, ends: bool) -> int:
        """How many characters are judged, and wait for nothing."""
        safe = self.judged
        if stopped or not ends:
            for start in (self._debounce.pending_from, self._hot_from):
                safe = safe if start is None else min(safe, start)
        if self._rollback is not None and not stopped and not ends:
            safe = min(safe, self._buffered())
        if self._finder is None or (ends and not stopped):
            return safe
        safe = min(safe, self._finder.settled)
        if self._mask_after is None:
            safe = min([safe, *(one.start for one in self._found if one.end > self._calm_start)])
        elif self._lacks(complete=False):
            safe = min([safe, self._masked_from, *(one.start for one in self._found if one.end > self._mask_after)])
        return min([safe, *(one.start for one in self._found if one.start < safe < one.end)])

    def _buffered(self, more: int = 0) -> int:
        """Where the last tokens begin that are held to be rolled back; ``more`` of them where they stop the text."""
        count = self._rollback.buffer if self._rollback is not None else 0
        if not count:
            return self.judged
        held = self._unreleased
        return self.released if len(held) <= count else held[-count - more].start

    def _grant(self) -> bool:
        """What is late may leave as far as the policy allows; whether that is anything."""
        leak = self._hold.leak
        if self._hold.when_late != "release" or self._mask_after is not None or self._stopped:
            return False
        allowed = self.fed if leak is None else self._safe(stopped=False, ends=False) + leak
        granted = min(self.fed, allowed)
        if granted <= self.released:
            return False
        self._granted = granted
        return True

    def _release(self, bound: int) -> str:
        count = max(0, bound - self.released)
        if not count:
            return ""
        text, self._held = self._held[:count], self._held[count:]
        if self._mask_after is not None:
            text = "".join(self._with_masks(text, bound))
        if self._failure is None:
            self._first += max(0, bound - max(self.released, self.judged))
        self.released += count
        self._delays.leave(self.released)
        while self._found and self._found[0].end <= self.released:
            self._found.popleft()
        while self._unreleased and self._unreleased[0].end <= self.released:
            self._unreleased.popleft()
        return text

    def _with_masks(self, text: str, bound: int) -> Iterator[str]:
        end = begin = self.released
        for one in self._found:
            if one.end <= (self._mask_after or 0) or one.start >= bound or one.end <= begin:
                continue
            start, stop = max(one.start, begin), min(one.end, bound)
            mask = one.mask[start - one.start : stop - one.start]
            self._masked.append(Masked(start, mask))
            yield text[end - begin : start - begin]
            yield mask
            end = stop
        yield text[end - begin :]

    def _leak(self) -> None:
        """What was flagged in the run that stops the text, and has left already."""
        if self._debounce.pending_from is not None:
            self.leaked += max(0, self.released - self._debounce.pending_from)

    def _leak_masked(self) -> None:
        """What is flagged as personal and has left already."""
        self.leaked += max(0, self.released - self._masked_from)

    # how it ends

    def _again(self) -> Decision | None:
        """The decision that stops the text, where it is to be rolled back; None where not, or no tries are left."""
        if self._rollback is None or self._tries >= self._rollback.tries:
            return None
        decision = self._decide()
        return decision if self._rules.policy.intervention_for(decision.rule) == "rollback" else None

    def _roll_back(self, decision: Decision) -> Retry:
        """Begin again from what has left."""
        assert self._rollback is not None, "only asked where it may be"
        self._tries += 1
        self._thrown[0] += self.fed - self.released
        self._thrown[1] += len(self._unreleased)
        self._rolled_back = decision
        prefix = self.text[: self.released]
        self._drop()
        self._delays.forget()
        self._confirmed = None
        self._begin(prefix)
        if self._finder is not None:
            self._found.extend(one for one in self._finder.feed(prefix) if one.end > self.released)
        return Retry(prefix, self._tries, self._rollback.hint)

    def _end(self) -> None:
        self._ended = True
        self._drop()
        self.decision = self._decide()

    def _decide(self) -> Decision:
        decision = self._rolled_back if self._gave_up and self._rolled_back is not None else None
        if decision is None:
            decision = self._choose(self._rules, self._debounce)
        interventions = () if self._rules.quiet else tuple(self._interventions(decision))
        decision = replace(decision, coverage=self.coverage, interventions=interventions, leaked=self.leaked)
        if self._watching is None or self._rules.observing is None:
            return decision
        other = self._choose(self._rules.observing, self._watching)
        return observed(other if self._rules.quiet else decision, other, quiet=self._rules.quiet)

    def _choose(self, rules: ScopedPolicy, debounce: Debounce) -> Decision:
        found = debounce.worst
        choices = [rules.choose(self._failure)] if self._failure else []
        if found is not None or not choices:
            choices.append(self._choice(rules, found))
        chosen = max(choices, key=lambda choice: choice.action)
        masked = found is not None and found.masks and not self._stopped and chosen.verdict is not None
        action = Action.REDACT if masked else Action.BLOCK if chosen.action >= STOPS else chosen.action
        return replace(chosen, action=action, coverage=self.coverage)

    def _choice(self, rules: ScopedPolicy, found: Finding | None) -> Decision:
        if self._confirmed is not None and rules is self._rules:
            span = Span(found.start, found.token.span.end) if found is not None else None
            return rules.choose(replace(self._confirmed, span=span))
        return rules.choose(self._verdict(found))

    def _interventions(self, decision: Decision) -> Iterator[Intervention]:
        for outcome, count in sorted(self._questions.items()):
            characters = self._overruled_characters if outcome == "overruled" else 0
            yield Intervention(InterventionKind.CONFIRM, outcome, count, characters)
        if self._tries:
            outcome = (
                "failed" if self._gave_up or self._failure else "flagged" if decision.action >= Action.BLOCK else "done"
            )
            yield Intervention(InterventionKind.ROLLBACK, outcome, self._tries, *self._thrown)
        if self._masked:
            characters = sum(len(one.text) for one in self._masked)
            yield Intervention(InterventionKind.REDACT, "done", len(self._masked), characters)
        if decision.action >= Action.BLOCK:
            word = self._rules.policy.intervention_for(decision.rule)
            if word == "rollback":
                word = self._rules.policy.rollback.then
            kind = InterventionKind.REPLACE if word == "replace" else InterventionKind.CUT
            yield Intervention(kind, "done", 1, self.fed - self.released)

    def _verdict(self, found: Finding | None) -> Verdict:
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


def ending_of(decision: Decision) -> InterventionKind | None:
    """How a stopped stream ends: CUT, or REPLACE by the policy's message; None when it was not stopped."""
    endings = (InterventionKind.CUT, InterventionKind.REPLACE)
    return next((one.kind for one in reversed(decision.interventions) if one.kind in endings), None)


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
    second: SecondGuard | None = None,
    again: Again | None = None,
) -> AsyncGenerator[Step, None]:
    """Watch a text that arrives in pieces: one step for each piece, and one for its end unless it was stopped before.

    The last step has the decision, which is kept before the step is given. When the consumer goes away earlier, the
    decision on what was judged so far is kept. A step more is given when text was held for as long as the policy
    allows. The arguments are those of `StreamModerator`; ``keep`` is where decisions go, None for nowhere, and
    ``again`` gives what follows a text that was rolled back, None where the upstream cannot be asked.

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
        second=second,
        retries=again is not None,
    )

    async def kept(decision: Decision | None) -> None:
        if decision is not None and keep is not None:
            answer = assistant_turn(moderator.text, channel, reasoning=reasoning, name=name)
            whole = context.then(answer) if context else Conversation((answer,))
            await surely(keep(decision, whole, retention=policy.at(scope).retention))

    source = _Source(chunks)
    tried = False
    try:
        while True:
            try:
                text = await source.next(moderator.due_s)
            except Exception:
                if not tried:
                    raise
                step = moderator.give_up()
            else:
                step = await (_late(moderator) if text is None else _next(moderator, text))
            await kept(step.decision)
            yield step
            if step.decision is not None:
                return
            if step.retry is not None and again is not None:
                await source.close()
                source = _Source(again(step.retry))
                tried = True
    finally:
        await source.close()
        await kept(moderator.close())


async def _late(moderator: StreamModerator) -> Step:
    return moderator.late()


async def _next(moderator: StreamModerator, text: str | _End) -> Step:
    return await (moderator.finish() if isinstance(text, _End) else moderator.feed(text))


class _End:
    """The text is complete."""


class _Source:
    """Pieces of text, one by one, each waited for as long as one may."""

    def __init__(self, chunks: AsyncIterable[str]) -> None:
        self._chunks: AsyncIterator[str] = aiter(chunks)
        self._coming: asyncio.Future[str | _End] | None = None

    async def next(self, patience_s: float | None) -> str | _End | None:
        """The next piece, or that there is none; None when none came in time."""
        if patience_s is None and self._coming is None:
            return await self._next()
        if self._coming is None:
            self._coming = asyncio.ensure_future(self._next())
        await asyncio.wait({self._coming}, timeout=patience_s)
        if not self._coming.done():
            return None
        coming, self._coming = self._coming, None
        return coming.result()

    async def close(self) -> None:
        """Nothing more is wanted."""
        if self._coming is not None:
            self._coming.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await self._coming
            self._coming = None

    async def _next(self) -> str | _End:
        try:
            return await anext(self._chunks)
        except StopAsyncIteration:
            return _End()
