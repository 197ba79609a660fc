"""Many live streams on one Stream model: what event loops call, and the thread that computes.

`Engine.open` gives a `Handle` on a new stream; ``await handle.feed(ids)`` gives the logits of these tokens. One worker
thread asks the scheduler for the next forward, runs it, and gives answers back to the loops that wait. A stream that is
closed, or whose feed is cancelled, gives its part of the cache back at once. Event loops only ever wait for the
bookkeeping, never for a forward.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
import weakref
from array import array
from collections import deque
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tidegate.engine.logits import Logits
from tidegate.engine.onnx_runner import OnnxRunner, OnnxStream
from tidegate.engine.scheduler import Limits, Scheduler, Step
from tidegate.engine.sequence import Sequence, Windows
from tidegate.engine.slots import Slots
from tidegate.engine.worker import Work, give
from tidegate.errors import (
    GuardError,
    GuardOverloaded,
    GuardTimeout,
    GuardUnavailable,
    InputError,
    SessionClosed,
    UnreadableVerdict,
)
from tidegate.types import Target

if TYPE_CHECKING:
    from tidegate.engine.runner import Runner
    from tidegate.model.stream import Qwen3ForGuardModel

__all__ = ["Engine", "Handle", "Metrics"]

_LINGER_SHARE = 0.05
"""Which part of a forward's time the next one may wait for streams that are about to speak: those that were answered
together come back one after the other, and a forward takes about as long for one of them as for all."""
_LINGER_SECONDS = 0.005
"""The most that it may wait."""
_GIVE_BACK_SECONDS = 5.0
"""How long nobody must have used the cache before its memory is given back to the system."""
_CANARY_TOKENS = 8
_EXPORT_TOLERANCE = 1e-4
"""By how much a probability of the canary may differ where an export computes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """What an engine did so far and does now. Counts begin at zero with the engine and only grow."""

    streams: int
    """Open now."""
    waiting_streams: int
    """Of these, how many wait for an answer now."""
    waiting_tokens: int
    """Positions that must be computed for them."""
    longest_wait_seconds: float
    """How long the oldest of them has waited; 0 when none waits."""
    forwards: int
    forward_seconds: float
    """In all; divided by ``forwards`` the mean."""
    last_forward_seconds: float
    last_batch_streams: int
    last_batch_tokens: int
    streams_computed: int
    """Sum of the batch sizes of all forwards, in streams."""
    tokens_computed: int
    """The same in positions."""
    tokens_recomputed: int
    """Of these, positions computed again: evicted caches and overlaps of windows."""
    answered: int
    """Feeds that were answered."""
    answer_seconds: float
    """Sum over these of the time from feed to answer."""
    refused: int
    """Feeds and opens that were refused because too much waited or was open."""
    failed: int
    """Feeds that failed because a forward failed or gave what is not a number."""
    evictions: int
    """Caches dropped to make room for others."""
    cache_positions: int
    """Size of the cache."""
    cache_used: int
    """Of these, positions that hold something."""
    cache_reserved: int
    """Of these, positions that belong to a stream, headroom included."""
    cache_bytes: int


@dataclass(slots=True, eq=False)
class _Work(Work[Logits]):
    """A feed that waits for its answer."""

    since: float
    parts: list[Logits] = field(default_factory=list)


@dataclass(slots=True)
class _Counts:
    forwards: int = 0
    seconds: float = 0.0
    last_seconds: float = 0.0
    last_streams: int = 0
    last_tokens: int = 0
    streams: int = 0
    tokens: int = 0
    answered: int = 0
    answer_seconds: float = 0.0
    refused: int = 0
    failed: int = 0


class Handle:
    """One live stream, made by `Engine.open`. Calls must not overlap, except ``close``.

    A handle that is dropped without being closed gives its cache back when it is collected.
    """

    def __init__(self, engine: Engine, sequence: Sequence) -> None:
        self._engine = engine
        self._sequence = sequence
        self._busy = False
        weakref.finalize(self, engine._abandoned.append, sequence).atexit = False

    @property
    def length(self) -> int:
        """How many tokens the stream has, the prefix included."""
        return len(self._sequence.tokens)

    @property
    def room(self) -> int:
        """How many more tokens are judged before the next window begins, which costs its header and overlap once.

        Whoever judges tokens that may be taken back again does well to stop there.
        """
        windows = self._sequence.windows
        return windows.stop(windows.number(self.length)) - self.length

    @property
    def closed(self) -> bool:
        """Whether the stream is over."""
        return self._sequence.closed

    async def feed(self, ids: Ids[int], target: Target = Target.RESPONSE, *, last_only: bool = False) -> Logits:
        """Append tokens and judge them.

        Args:
            ids: token ids; () gives the logits of no position.
            target: whose heads are read.
            last_only: give the logits of the last token alone.

        Returns:
            The logits of each of these tokens, or of the last one.

        Raises:
            InputError: when an id is not in the vocabulary; nothing was appended.
            GuardOverloaded: when too much waits; nothing was appended.
            SessionClosed: when the stream or the engine is closed, also while this waits.
            UnreadableVerdict: when the model computed something that is not a finite number; the stream is closed.
            GuardError: when an earlier feed is not answered yet, or the model could not compute; then it is closed.
        """
        self._check_free()
        self._engine._check_ids(ids)
        length, parts = self.length, []
        self._busy = True
        try:
            for part in self._engine._slices(ids):
                parts.append(await self._engine._submit(self._sequence, part, target, last_only=last_only))
        except GuardOverloaded:
            self._engine._crop(self._sequence, length)
            raise
        except BaseException:
            self.close()
            raise
        finally:
            self._busy = False
        return parts[-1] if last_only else _joined(parts)

    def crop(self, length: int) -> None:
        """Take back all tokens behind the first ``length``.

        Raises:
            InputError: when the stream has fewer tokens.
            GuardError: when a feed is not answered yet.
            SessionClosed: when the stream is closed.
        """
        self._check_free()
        self._engine._crop(self._sequence, length)

    def close(self) -> None:
        """Give everything back at once; safe to call any number of times, also while a feed waits."""
        self._engine._drop(self._sequence)

    def _check_free(self) -> None:
        if self._busy:
            raise GuardError("a stream takes one piece at a time")


class Engine:
    """A Stream model, its cache, and the thread that runs it. Usable from several event loops at once.

    Args:
        model: in the dtype and on the device to compute with; must not be changed or trained meanwhile. Or an export.
        positions: size of the cache in positions, shared by all streams. 0.6B takes 112 KiB for each in bf16, twice
            that in fp32 and in an export. Streams beyond it are evicted, those that were idle longest first, and
            computed again when they go on.
        window: most positions of one stream before its window begins anew; None for what the model was made for, or
            all of a smaller cache.
        overlap: how many tokens a new window repeats; None for an eighth of the window.
        limits: how much is computed at once, and how much may wait; ``waiting`` must allow four windows.
        most_streams: how many may be open at once.

    Raises:
        InputError: when these settings contradict each other.
        GuardUnavailable: when the model cannot be run, or there is no memory for the cache.
    """

    def __init__(
        self,
        model: Qwen3ForGuardModel | OnnxStream,
        *,
        positions: int = 32_768,
        window: int | None = None,
        overlap: int | None = None,
        limits: Limits | None = None,
        most_streams: int = 1024,
    ) -> None:
        limits = limits or Limits()
        most = int(model.config.max_position_embeddings)
        self._window = min(most, positions) if window is None else window
        self._overlap = self._window // 8 if overlap is None else overlap
        Windows(self._window, self._overlap)
        if self._window > min(most, positions):
            raise InputError(f"a window of {self._window} is more than the model's {most} or the cache's {positions}")
        if limits.waiting < 4 * self._window:
            raise InputError(f"{limits.waiting} waiting tokens are fewer than four windows of {self._window}")
        self._vocabulary: int = model.config.vocab_size
        self._runner: Runner | OnnxRunner | None
        self._canary = [(7 + 11 * number) % self._vocabulary for number in range(_CANARY_TOKENS)]
        """A known text."""
        self._runner, expected, self._tolerance = _prepared(model, positions, self._canary)
        self._expected = _probabilities(expected.risk)
        self._cache_bytes = self._runner.cache_bytes
        self._categories = {
            Target.PROMPT: int(model.config.num_query_category),
            Target.RESPONSE: int(model.config.num_category),
        }
        self._slots: Slots[Sequence] = Slots(positions, self._window)
        self._scheduler = Scheduler(self._slots, limits)
        self._most_streams = most_streams
        self._most_tokens, self._most_waiting = limits.tokens, limits.waiting
        self._streams: set[Sequence] = set()
        self._works: dict[Sequence, _Work] = {}
        self._abandoned: deque[Sequence] = deque()
        self._counts = _Counts()
        self._wake = threading.Condition()
        self._closed: GuardError | None = None
        self._thread: threading.Thread | None = None
        self._written = False
        """Whether the cache has been written to since it last was given back."""

    @property
    def closed(self) -> bool:
        """Whether the engine computes no more: `close` was called, or its thread broke."""
        return self._closed is not None

    def open(self, prefix: Ids[int] = (), *, keep: int | None = None) -> Handle:
        """Begin a stream.

        Args:
            prefix: tokens before the first that is judged; computed with the first feed.
            keep: how many of the first tokens are repeated when the stream outgrows its window; None for the prefix.

        Raises:
            InputError: when an id is not in the vocabulary, or the prefix is more than may wait.
            GuardOverloaded: when ``most_streams`` are open.
            SessionClosed: when the engine is closed.
        """
        self._check_ids(prefix)
        keep = len(prefix) if keep is None else keep
        sequence = Sequence(Windows(self._window, self._overlap, keep), array("i", prefix))
        if sequence.work > self._most_waiting // 2:
            raise InputError(f"a prefix of {len(prefix)} tokens is too long to wait: feed it")
        with self._wake:
            self._drop_abandoned()
            self._check_open()
            if len(self._streams) >= self._most_streams:
                self._counts.refused += 1
                raise GuardOverloaded(f"{self._most_streams} streams are open already")
            self._streams.add(sequence)
        return Handle(self, sequence)

    async def health(self, timeout_seconds: float = 30.0) -> float:
        """Send a known text through queue, cache, model and heads, and compare with the model's own forward.

        It takes its turn among the streams, whatever waits.

        Returns:
            The seconds it took.

        Raises:
            GuardTimeout: when no answer came in time.
            GuardUnavailable: when the answer is wrong.
            GuardError: when there is none.
        """
        began = time.monotonic()
        sequence = Sequence(Windows(self._window, self._overlap))
        try:
            async with asyncio.timeout(timeout_seconds):
                logits = await self._submit(sequence, self._canary, Target.RESPONSE, urgent=True)
        except TimeoutError:
            raise GuardTimeout(f"the engine did not answer within {timeout_seconds:g} seconds") from None
        finally:
            self._drop(sequence)
        if not np.abs(_probabilities(logits.risk) - self._expected).max() <= self._tolerance:
            raise GuardUnavailable("the engine's answer to a known text is wrong")
        return time.monotonic() - began

    def metrics(self) -> Metrics:
        """What it did so far and does now."""
        with self._wake:
            self._drop_abandoned()
            counts, now = self._counts, time.monotonic()
            return Metrics(
                streams=len(self._streams),
                waiting_streams=self._scheduler.waiting,
                waiting_tokens=self._scheduler.waiting_tokens,
                longest_wait_seconds=max((now - work.since for work in self._works.values()), default=0.0),
                forwards=counts.forwards,
                forward_seconds=counts.seconds,
                last_forward_seconds=counts.last_seconds,
                last_batch_streams=counts.last_streams,
                last_batch_tokens=counts.last_tokens,
                streams_computed=counts.streams,
                tokens_computed=counts.tokens,
                tokens_recomputed=self._scheduler.recomputed,
                answered=counts.answered,
                answer_seconds=counts.answer_seconds,
                refused=counts.refused,
                failed=counts.failed,
                evictions=self._scheduler.evictions,
                cache_positions=self._slots.positions,
                cache_used=self._slots.used,
                cache_reserved=self._slots.reserved,
                cache_bytes=self._cache_bytes,
            )

    def close(self) -> None:
        """Stop the thread after the forward that it is in, fail what waits, free the cache. Safe to call twice."""
        self._end(SessionClosed("the engine is closed"))
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        self._runner = None

    async def aclose(self) -> None:
        """The same, without holding up the event loop."""
        await asyncio.to_thread(self.close)

    async def __aenter__(self) -> Engine:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def _check_ids(self, ids: Ids[int]) -> None:
        if len(ids) and not (min(ids) >= 0 and max(ids) < self._vocabulary):
            raise InputError(f"a token id is not in the vocabulary: expected 0 to {self._vocabulary - 1}")

    def _slices(self, ids: Ids[int]) -> list[Ids[int]]:
        """The ids in pieces that are never too much for an engine on which nothing waits; one at least."""
        return [ids[start : start + self._window] for start in range(0, max(1, len(ids)), self._window)]

    def _submit(
        self, sequence: Sequence, ids: Ids[int], target: Target, *, last_only: bool = False, urgent: bool = False
    ) -> asyncio.Future[Logits]:
        work = _Work(time.monotonic())
        with self._wake:
            self._check_open(sequence)
            if not len(ids):
                work.future.set_result(self._nothing(target))
                return work.future
            try:
                self._scheduler.submit(sequence, ids, target, last_only=last_only, urgent=urgent)
            except GuardOverloaded:
                self._counts.refused += 1
                raise
            self._works[sequence] = work
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="tidegate-stream", daemon=True)
                self._thread.start()
            self._wake.notify()
        return work.future

    def _crop(self, sequence: Sequence, length: int) -> None:
        with self._wake:
            self._check_open(sequence)
            if not 0 <= length <= len(sequence.tokens):
                raise InputError(f"cannot go back to {length} tokens: the stream has {len(sequence.tokens)}")
            self._scheduler.crop(sequence, length)

    def _check_open(self, sequence: Sequence | None = None) -> None:
        if self._closed:
            raise type(self._closed)(*self._closed.args)
        if sequence is not None and sequence.closed:
            raise SessionClosed("the stream is closed")

    def _drop(self, sequence: Sequence) -> None:
        with self._wake:
            self._scheduler.remove(sequence)
            self._streams.discard(sequence)
            work = self._works.pop(sequence, None)
            self._wake.notify()
        if work:
            give([(work, SessionClosed("the stream was closed while it was judged"))])

    def _drop_abandoned(self) -> None:
        while self._abandoned:
            sequence = self._abandoned.popleft()
            self._scheduler.remove(sequence)
            self._streams.discard(sequence)
            self._works.pop(sequence, None)

    def _nothing(self, target: Target) -> Logits:
        return Logits(np.zeros((0, 3), np.float32), np.zeros((0, self._categories[target]), np.float32))

    def _serve(self) -> None:
        try:
            while step := self._next():
                self._compute(step)
        except Exception as error:  # a defect of the engine itself: nobody may wait for ever
            self._end(GuardUnavailable(f"the engine broke: {type(error).__name__}"))

    def _next(self) -> Step | None:
        """What to compute next, as soon as there is something; None when the engine is closed."""
        while True:
            self._await_work()
            with self._wake:
                self._wake.wait_for(lambda: self._closed or self._full, self._linger_seconds)
                if self._closed:
                    return None
                self._drop_abandoned()
                step = self._scheduler.next()
                if step.pieces:
                    return step

    def _await_work(self) -> None:
        """Until there is work, or the engine is closed; a cache that nobody has used for a while is given back."""
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._called or self._unused)
                if self._wake.wait_for(lambda: self._called, _GIVE_BACK_SECONDS):
                    return
                self._written = False
            self._give_back()  # takes a while; only this thread writes to the cache, so that nobody does meanwhile

    @property
    def _called(self) -> bool:
        return bool(self._closed or self._scheduler.waiting)

    @property
    def _unused(self) -> bool:
        return self._written and not self._slots.owners

    def _give_back(self) -> None:
        runner = self._runner
        assert runner is not None
        with contextlib.suppress(RuntimeError, MemoryError, GuardUnavailable):  # no address space for a new one
            runner.give_back()

    @property
    def _full(self) -> bool:
        """Whether waiting longer could add nothing to the next forward."""
        scheduler = self._scheduler
        return scheduler.waiting >= len(self._streams) or scheduler.waiting_tokens >= self._most_tokens

    @property
    def _linger_seconds(self) -> float:
        return min(_LINGER_SECONDS, _LINGER_SHARE * self._counts.last_seconds)

    def _compute(self, step: Step) -> None:
        """Run one forward and give the answers that are complete with it."""
        runner, began = self._runner, time.monotonic()
        assert runner is not None
        self._written = True
        try:
            results: list[Logits | None] = runner.run(step)
        except Exception as error:
            self._fail(step, GuardError(f"the model could not compute: {type(error).__name__}"))
            return
        seconds = time.monotonic() - began
        answers: list[tuple[_Work, Logits | GuardError]] = []
        with self._wake:
            self._count(step, seconds)
            for piece, logits in zip(step.pieces, results, strict=True):
                work = self._works.get(piece.sequence)
                if work is None:
                    continue
                if logits is None:
                    unreadable = UnreadableVerdict("the model computed something that is not a finite number")
                    answers.append((self._failed(piece.sequence), unreadable))
                else:
                    work.parts.append(logits)
            for sequence in self._scheduler.finish(step):
                work = self._works.pop(sequence)
                self._counts.answered += 1
                self._counts.answer_seconds += time.monotonic() - work.since
                answers.append((work, _joined(work.parts)))
        give(answers)

    def _fail(self, step: Step, error: GuardError) -> None:
        """The forward failed: so do the streams in it. Where the cache was being moved, none of it can be trusted."""
        with self._wake:
            mine = [piece.sequence for piece in step.pieces if piece.sequence in self._works]
            failed = [(self._failed(sequence), error) for sequence in mine]
            if step.moves:
                self._scheduler.forget()
        give(failed)

    def _failed(self, sequence: Sequence) -> _Work:
        self._scheduler.remove(sequence)
        self._streams.discard(sequence)
        self._counts.failed += 1
        return self._works.pop(sequence)

    def _count(self, step: Step, seconds: float) -> None:
        counts, tokens = self._counts, sum(len(piece.ids) for piece in step.pieces)
        counts.forwards += 1
        counts.seconds += seconds
        counts.last_seconds, counts.last_streams, counts.last_tokens = seconds, len(step.pieces), tokens
        counts.streams += len(step.pieces)
        counts.tokens += tokens

    def _end(self, error: GuardError) -> None:
        """No more from now on; what waits fails."""
        with self._wake:
            self._closed = self._closed or error
            works = list(self._works.values())
            for sequence in {*self._streams, *self._works}:
                self._scheduler.remove(sequence)
            self._streams.clear()
            self._works.clear()
            self._wake.notify_all()
        give([(work, error) for work in works])


def _prepared(
    model: Qwen3ForGuardModel | OnnxStream, positions: int, canary: list[int]
) -> tuple[Runner | OnnxRunner, Logits, float]:
    """What runs the model, what the model says of the canary alone, and how far the first may be from the second."""
    if isinstance(model, OnnxStream):
        return OnnxRunner(model.backbone, positions), model.logits(canary, Target.RESPONSE), _EXPORT_TOLERANCE
    from tidegate.engine.runner import prepared  # torch, which exports do without

    return prepared(model, positions, canary)


def _probabilities(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(powers / powers.sum(-1, keepdims=True), np.float32)


def _joined(parts: list[Logits]) -> Logits:
    if len(parts) == 1:
        return parts[0]
    return Logits(np.concatenate([part.risk for part in parts]), np.concatenate([part.category for part in parts]))
