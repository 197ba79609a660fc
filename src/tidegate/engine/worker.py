"""One thread that computes what event loops ask for: what waits together is computed together.

The oldest work that waits comes first, with what can share its run; work that nobody waits for any more is not
computed. Answers go back to the event loops that asked, with one call for each loop. Nothing here knows a model.

To hand a little work to a thread and its answer back takes longer than the work: where nothing waits and nothing is
computed, it may be done at once in the event loop, as far as an `Allowance` goes.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Generic, Protocol, TypeVar

from tidegate.errors import GuardError, GuardOverloaded, SessionClosed

__all__ = ["Allowance", "Padding", "Waiting", "Work", "Worker", "answers_of", "give"]

R = TypeVar("R")
W = TypeVar("W", bound="Work[Any]")


class Waiting(Protocol):
    """Whatever has a future that is awaited in an event loop."""

    @property
    def future(self) -> asyncio.Future[Any]: ...


def give(answers: Iterable[tuple[Waiting, object]]) -> None:
    """Give results, or a `GuardError`, to those who wait, from any thread, with one call for each event loop."""
    loops: dict[asyncio.AbstractEventLoop, list[tuple[Waiting, object]]] = {}
    for answer in answers:
        loops.setdefault(answer[0].future.get_loop(), []).append(answer)
    for loop, mine in loops.items():
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it everybody who waited
            loop.call_soon_threadsafe(_set, mine)


def _set(answers: Sequence[tuple[Waiting, object]]) -> None:
    for work, result in answers:
        if work.future.done():
            continue
        if isinstance(result, GuardError):
            work.future.set_exception(result)
        else:
            work.future.set_result(result)


async def answers_of(submitted: Iterable[asyncio.Future[R]]) -> list[R]:
    """Wait for work that can share runs; when some of it fails, the rest is dropped.

    Args:
        submitted: best a generator that submits it, so that what was submitted before one is refused is dropped too.

    Raises:
        GuardError: the first of what went wrong.
    """
    futures: list[asyncio.Future[R]] = []
    try:
        futures.extend(submitted)
        return [await future for future in futures]
    finally:
        for future in futures:
            if not future.cancel() and not future.cancelled():
                future.exception()


def _future() -> asyncio.Future[Any]:
    return asyncio.get_running_loop().create_future()


@dataclass(slots=True, eq=False)
class Work(Generic[R]):
    """Something that a caller in a running event loop waits for."""

    future: asyncio.Future[R] = field(default_factory=_future, init=False)

    @property
    def dropped(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.future.cancelled()


@dataclass(slots=True)
class Padding:
    """The rows of one run, all as long as the longest: whether one more would make too much padding.

    Attributes:
        most: most positions of a run, padding included.
        slack: padded positions that are always worth a shared run.
    """

    most: int
    slack: int
    rows: int = 0
    widest: int = 0
    useful: int = 0

    def fits(self, length: int) -> bool:
        """Whether one more row of this length fits; the first one always does."""
        padded = max(self.widest, length) * (self.rows + 1)
        return not self.rows or (padded <= self.most and padded <= 1.35 * (self.useful + length) + self.slack)

    def add(self, length: int) -> None:
        """Count one more row."""
        self.rows, self.widest, self.useful = self.rows + 1, max(self.widest, length), self.useful + length


class Allowance:
    """A share of the time, of which a little can be saved up: for how long an event loop may do what a thread could.

    Args:
        share: of the time, from 0 to 1; with 0 there is none.
        most_s: seconds that can be saved up, greater than 0.
        clock: seconds, from any beginning.
    """

    def __init__(self, share: float, most_s: float, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._share = share
        self._most_s = most_s
        self._clock = clock
        self._since = clock()
        self._left_s = most_s if share else 0.0

    @property
    def left_s(self) -> float:
        """Seconds that may be spent now, 0 or less when none."""
        now = self._clock()
        self._left_s = min(self._most_s, self._left_s + self._share * (now - self._since))
        self._since = now
        return self._left_s

    @contextlib.contextmanager
    def spending(self) -> Iterator[None]:
        """Count the time of this block as spent."""
        begun = self._clock()
        try:
            yield
        finally:
            self._left_s -= self._clock() - begun


class Worker(ABC, Generic[W]):
    """A model and the thread that runs it, which begins with the first work. Usable from several event loops at once.

    Args:
        thread: the name of the thread.
        runtime: what computes, for error messages.
        most_waiting: how many pieces of work may wait before more is refused.
        allowance: how much of their time event loops may compute themselves, see `_at_once`; None for nothing.
    """

    def __init__(self, *, thread: str, runtime: str, most_waiting: int, allowance: Allowance | None = None) -> None:
        self._name: Final = thread
        self._runtime: Final = runtime
        self._most_waiting = most_waiting
        self._waiting: deque[W] = deque()
        self._wake = threading.Condition()
        self._computing = threading.Lock()
        self._allowance = allowance
        self._closed = False
        self._thread: threading.Thread | None = None

    @property
    def waiting(self) -> int:
        """How many pieces of work wait now."""
        return len(self._waiting)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def close(self) -> None:
        """Stop the thread after the run that it is in, refuse what waits, and free the model. Safe to call twice."""
        with self._wake:
            self._closed = True
            waiting = list(self._waiting)
            self._waiting.clear()
            self._wake.notify()
            thread = self._thread
            if thread is None:
                self._forget()
        give([(work, SessionClosed("the guard is closed")) for work in waiting])
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    @abstractmethod
    def _run(self, batch: list[W]) -> list[tuple[W, Any]]:
        """Compute this together; what is complete with it, with its results. What is not is put back with `_again`."""

    @abstractmethod
    def _sharing(self) -> Callable[[W], bool]:
        """What says of work after work, the oldest first, whether it joins a run that is put together."""

    @abstractmethod
    def _free(self) -> None:
        """Forget the model."""

    def _begin(self) -> None:
        """Called in the thread before its first run."""

    def _forget(self) -> None:
        with self._computing:
            self._free()

    def _at_once(self, work: W) -> bool:
        """Compute this in the calling thread, an event loop's, where nothing waits or is computed and the allowance is
        not spent; whether it was done. Only for work that one short run completes.

        Raises:
            SessionClosed: when the guard is closed.
        """
        allowance = self._allowance
        if allowance is None or self._waiting or not self._computing.acquire(blocking=False):
            return False
        try:
            if self._closed:
                raise SessionClosed("the guard is closed")
            if allowance.left_s <= 0:
                return False
            with allowance.spending():
                answers = self._answers([work])
        finally:
            self._computing.release()
        _set(answers)
        return True

    def _put(self, work: W) -> None:
        """Let work wait.

        Raises:
            GuardOverloaded: when too much waits.
            SessionClosed: when the guard is closed.
        """
        with self._wake:
            if self._closed:
                raise SessionClosed("the guard is closed")
            if len(self._waiting) >= self._most_waiting:
                raise GuardOverloaded(f"{self._most_waiting} texts wait already")
            self._waiting.append(work)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
                self._thread.start()
            self._wake.notify()

    def _again(self, works: Sequence[W]) -> None:
        """Let work wait before all other, in this order."""
        with self._wake:
            self._waiting.extendleft(reversed(works))

    def _work(self) -> None:
        self._begin()
        while batch := self._next_batch():
            with self._computing:
                answers = self._answers(batch)
            give(answers)
            del batch, answers
        self._forget()

    def _answers(self, batch: list[W]) -> list[tuple[W, Any]]:
        try:
            return self._run(batch)
        except GuardError as error:
            failure = error
        except Exception as error:
            failure = GuardError(f"{self._runtime} could not compute: {type(error).__name__}")
        return [(work, failure) for work in batch]

    def _next_batch(self) -> list[W]:
        """The oldest work and what shares its run; [] when the guard is closed."""
        with self._wake:
            while True:
                self._wake.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return []
                if batch := self._choose():
                    return batch

    def _choose(self) -> list[W]:
        """Take the oldest work and what may share its run; drop what nobody waits for any more."""
        batch: list[W] = []
        kept: list[W] = []
        dropped: list[W] = []
        joins = self._sharing()
        for work in self._waiting:
            (dropped if work.dropped else batch if joins(work) else kept).append(work)
        self._waiting.clear()
        self._waiting.extend(kept)
        if dropped:
            give([(work, SessionClosed("the session is closed")) for work in dropped])
        return batch
