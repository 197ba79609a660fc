"""Work for a client that is of no use any more, because the client left or because a part of it failed: it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive

__all__ = ["all_of", "hang_up", "while_there"]

T = TypeVar("T")


async def hang_up(receive: Receive) -> None:
    """Wait until the client is gone; for a request whose body was read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_there(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Do this for a client, as long as it is there; for a request whose body was read.

    Raises:
        ClientDisconnect: when it left before. The work was cancelled, and has ended.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(hang_up(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.wait({task, gone})


async def all_of(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Do these at once, for results in their order; when one fails, or the caller is cancelled, none goes on."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
