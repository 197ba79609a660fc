"""Work that is done within a time, and what a timer costs where nothing waits."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from tidegate.deadlines import within


@pytest.fixture
def timers(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """When the timers end that are set."""
    found: list[float] = []
    plain = asyncio.timeout_at

    def noted(when: float | None) -> asyncio.Timeout:
        assert when is not None
        found.append(when)
        return plain(when)

    monkeypatch.setattr(asyncio, "timeout_at", noted)
    return found


async def _done(result: Any) -> Any:
    return result


async def _failing() -> None:
    raise LookupError("no")


async def _slow(log: list[str]) -> str:
    try:
        await asyncio.Event().wait()
    finally:
        await asyncio.sleep(0)
        log.append("ended")
    return "never"


async def _in_steps(count: int) -> int:
    for _ in range(count):
        await asyncio.sleep(0)
    return count


async def test_work_that_waits_for_nothing_sets_no_timer(timers: list[float]) -> None:
    assert await within(_done(7), 1.0) == 7
    with pytest.raises(LookupError):
        await within(_failing(), 1.0)
    assert timers == []


async def test_work_that_waits_has_its_time_from_its_beginning(timers: list[float]) -> None:
    begun = asyncio.get_running_loop().time()
    assert await within(_in_steps(5), 60.0) == 5
    assert len(timers) == 1
    assert timers[0] >= begun + 60.0


async def test_without_a_time_work_is_only_awaited(timers: list[float]) -> None:
    assert await within(_in_steps(3), None) == 3
    assert timers == []


async def test_work_that_takes_longer_is_cancelled_and_has_ended_when_that_is_told() -> None:
    log: list[str] = []
    with pytest.raises(TimeoutError):
        await within(_slow(log), 0.0)
    assert log == ["ended"]
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_a_cancellation_reaches_the_work_and_is_no_timeout() -> None:
    log: list[str] = []
    task = asyncio.create_task(within(_slow(log), 60.0))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert log == ["ended"]


async def test_work_may_catch_its_cancellation_and_give_a_result() -> None:
    async def stubborn() -> str:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        await asyncio.sleep(0)
        return "done"

    task = asyncio.create_task(within(stubborn(), 60.0))
    await asyncio.sleep(0)
    task.cancel()
    assert await task == "done"


async def test_errors_after_waiting_are_those_of_the_work() -> None:
    async def fails_later() -> None:
        await asyncio.sleep(0)
        raise LookupError("later")

    with pytest.raises(LookupError, match="later"):
        await within(fails_later(), 60.0)


async def test_times_may_stand_inside_one_another() -> None:
    async def impatient() -> str:
        with contextlib.suppress(TimeoutError):
            await within(asyncio.Event().wait(), 0.0)
        await asyncio.sleep(0)
        return "went on"

    assert await within(impatient(), 60.0) == "went on"
    with pytest.raises(TimeoutError):
        await within(within(asyncio.Event().wait(), 60.0), 0.0)


async def test_futures_and_tasks_are_waited_for_too() -> None:
    future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_soon(future.set_result, 3)
    assert await within(future, 60.0) == 3
    assert await within(future, 60.0) == 3
    assert await within(asyncio.create_task(_in_steps(2)), 60.0) == 2


async def test_work_runs_in_the_task_that_waits_for_it() -> None:
    async def who() -> tuple[Any, Any]:
        before = asyncio.current_task()
        await asyncio.sleep(0)
        return before, asyncio.current_task()

    me = asyncio.current_task()
    assert await within(who(), 60.0) == (me, me)
