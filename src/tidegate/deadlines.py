"""Waiting for work, but not for longer than allowed; where there is nothing to wait for, no timer is set.

`asyncio.timeout` sets a timer each time, also for work that is done without waiting once. What a gateway does with a
piece of a stream is mostly of that kind, several times over, and timers would be a third of its cost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Generator
from types import coroutine
from typing import Any, TypeVar

__all__ = ["within"]

T = TypeVar("T")


async def within(work: Awaitable[T], seconds: float | None) -> T:
    """The result of work, which is done in this task as if it were awaited.

    The time runs from the beginning of the work; it can end the work only where that waits.

    Args:
        work: a coroutine that has not begun, or anything else to await.
        seconds: how long it may take, at least 0; None for as long as it wants.

    Raises:
        TimeoutError: when it takes longer. The work was cancelled, and has ended.
    """
    if seconds is None:
        return await work
    until = asyncio.get_running_loop().time() + seconds
    steps = work.__await__()
    try:
        waits_for = steps.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    async with asyncio.timeout_at(until):
        return await _rest(steps, waits_for)


@coroutine
def _rest(steps: Generator[Any, Any, T], waits_for: Any) -> Generator[Any, Any, T]:
    """What remains of work that has begun, and waits now."""
    try:
        while True:
            try:
                sent = yield waits_for
            except GeneratorExit:
                raise
            except BaseException as error:  # a cancellation: the work may still wait for its own end
                waits_for = steps.throw(error)
            else:
                waits_for = steps.send(sent)
    except StopIteration as done:
        result: T = done.value
        return result
    finally:
        steps.close()
