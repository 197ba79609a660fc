"""One thread that computes what event loops ask for: what waits together is computed together.

The oldest work that waits comes first, with what can share its run; work that nobody waits for any more is not
computed. Answers go back to the event loops that asked, with one call for each loop. Nothing here knows a model.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Generic, Protocol, TypeVar

from tidegate.errors import GuardError, GuardOverloaded, SessionClosed

__all__ = ["Padding", "Waiting", "Work", "Worker", "answers_of", "give"]

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


class Worker(ABC, Generic[W]):
    """A model and the thread that runs it, which begins with the first work. Usable from several event loops at once.

    Args:
        thread: the name of the thread.
        runtime: what computes, for error messages.
        most_waiting: how many pieces of work may wait before more is refused.
    """

    def __init__(self, *, thread: str, runtime: str, most_waiting: int) -> None:
        self._name: Final = thread
        self._runtime: Final = runtime
        self._most_waiting = most_waiting
        self._waiting: deque[W] = deque()
        self._wake = threading.Condition()
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
                self._free()
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
            give(self._answers(batch))
            del batch
        self._free()

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
