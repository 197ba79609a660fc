"""Work that a thread computes, and the little that an event loop computes itself."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tidegate.engine.worker import Allowance, Work, Worker
from tidegate.errors import GuardError, SessionClosed, UnreadableVerdict


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Numbers(Worker[Work[int]]):
    """Gives each piece of work its number; says in which thread, and how long it took."""

    def __init__(self, allowance: Allowance | None, during: Callable[[], None] = lambda: None) -> None:
        super().__init__(thread="numbers", runtime="Numbers", most_waiting=10, allowance=allowance)
        self.threads: list[str] = []
        self.freed = False
        self._during = during

    def ask(self) -> tuple[bool, Work[int]]:
        work: Work[int] = Work()
        at_once = self._at_once(work)
        if not at_once:
            self._put(work)
        return at_once, work

    def _run(self, batch: list[Work[int]]) -> list[tuple[Work[int], Any]]:
        self.threads.append(threading.current_thread().name)
        self._during()
        return [(work, len(self.threads)) for work in batch]

    def _sharing(self) -> Callable[[Work[int]], bool]:
        return lambda work: True

    def _free(self) -> None:
        self.freed = True

    @contextmanager
    def computing(self) -> Iterator[None]:
        """As if the thread were in a run."""
        with self._computing:
            yield


# --- the allowance


def test_an_allowance_is_a_share_of_the_time_of_which_a_little_is_saved_up() -> None:
    clock = Clock()
    allowance = Allowance(0.25, 0.002, clock=clock)
    assert allowance.left_s == pytest.approx(0.002)
    with allowance.spending():
        clock.now += 0.004
    assert allowance.left_s == pytest.approx(-0.001)
    clock.now += 0.004
    assert allowance.left_s == pytest.approx(0.0)
    clock.now += 0.004
    assert allowance.left_s == pytest.approx(0.001)
    clock.now += 1000
    assert allowance.left_s == pytest.approx(0.002)


def test_what_fails_is_spent_too() -> None:
    clock = Clock()
    allowance = Allowance(0.25, 0.002, clock=clock)

    def fail() -> None:
        with allowance.spending():
            clock.now += 0.008
            raise LookupError

    with pytest.raises(LookupError):
        fail()
    assert allowance.left_s == pytest.approx(-0.004)


def test_without_a_share_there_is_nothing_to_spend() -> None:
    clock = Clock()
    allowance = Allowance(0.0, 0.002, clock=clock)
    clock.now += 10
    assert allowance.left_s == 0.0


# --- at once


async def test_a_little_work_is_computed_at_once_by_whoever_asks() -> None:
    worker = Numbers(Allowance(0.25, 1.0))
    at_once, work = worker.ask()
    assert at_once
    assert work.future.result() == 1
    assert worker.threads == [threading.current_thread().name]
    worker.close()


async def test_without_an_allowance_the_thread_computes() -> None:
    worker = Numbers(None)
    at_once, work = worker.ask()
    assert not at_once
    assert await work.future == 1
    assert worker.threads == ["numbers"]
    worker.close()


async def test_when_the_allowance_is_spent_the_thread_computes_until_there_is_more() -> None:
    clock = Clock()

    def slow() -> None:
        clock.now += 0.010

    worker = Numbers(Allowance(0.5, 0.002, clock=clock), slow)
    assert worker.ask()[0]
    at_once, work = worker.ask()
    assert not at_once
    await work.future
    clock.now += 1
    assert worker.ask()[0]
    worker.close()


async def test_while_the_thread_computes_nobody_else_does() -> None:
    worker = Numbers(Allowance(0.25, 1.0))
    with worker.computing():
        at_once, work = worker.ask()
        assert not at_once
    assert await work.future == 1
    assert worker.threads == ["numbers"]
    worker.close()


async def test_what_comes_behind_work_that_waits_waits_too() -> None:
    worker = Numbers(Allowance(0.25, 1.0))
    with worker.computing():
        _, first = worker.ask()
        _, taken = worker.ask()
    assert await first.future == 1
    assert await taken.future in (1, 2)
    assert set(worker.threads) == {"numbers"}
    worker.close()


@pytest.mark.parametrize("error", [UnreadableVerdict("no number"), ZeroDivisionError()])
async def test_work_that_fails_at_once_fails_as_in_the_thread(error: Exception) -> None:
    def failing() -> None:
        raise error

    worker = Numbers(Allowance(0.25, 1.0), failing)
    at_once, work = worker.ask()
    assert at_once
    with pytest.raises(GuardError) as told:
        await work.future
    assert type(told.value) is (type(error) if isinstance(error, GuardError) else GuardError)
    worker.close()


async def test_a_closed_guard_computes_nothing_at_once() -> None:
    worker = Numbers(Allowance(0.25, 1.0))
    worker.close()
    assert worker.freed
    with pytest.raises(SessionClosed):
        worker.ask()
    assert worker.threads == []
