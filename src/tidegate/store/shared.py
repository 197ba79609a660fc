"""What gateways share for a short while: a Redis that may go away at any time, and that nobody waits for.

Whoever uses it says what is done without it. A command that fails, or takes longer than its time, makes the Redis count
as down at once: from then on nothing is sent, and in the background it is asked again and again, at growing distances,
whether it takes a value again. What is kept in it may be lost with it.

Commands that come while others are under way go together, in one piece, as soon as those have come back: a burst of a
thousand requests costs a few round trips, and one connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from tidegate.errors import InputError, StoreError

if TYPE_CHECKING:
    from redis.asyncio import Redis

__all__ = ["Shared", "SharedDown", "UnknownScript"]

Command = tuple[str | bytes | int | float, ...]

_log = logging.getLogger("tidegate.store")

FIRST_PAUSE_S: Final = 0.25
LONGEST_PAUSE_S: Final = 10.0
_MOST_CONNECTIONS: Final = 4
_MOST_TOGETHER: Final = 256


class SharedDown(StoreError):
    """The Redis does not answer now."""


class UnknownScript(StoreError):
    """The Redis does not know the script of an EVALSHA; nothing is wrong with it."""


class Shared:
    """A client for one Redis; used by one event loop.

    Args:
        url: ``redis://[[name]:password@]host[:port][/number]``, ``rediss://`` for TLS, or ``unix://path``.
        timeout_s: the longest time of what is sent together, in seconds.
        tell: called with True when it is up and with False when it is down, each time that changes.

    Raises:
        InputError: when the URL is none of these, or the package ``redis`` is not installed.
    """

    def __init__(self, url: str, *, timeout_s: float = 0.5, tell: Callable[[bool], None] | None = None) -> None:
        try:
            from redis.asyncio import BlockingConnectionPool, Redis
            from redis.asyncio.retry import Retry
            from redis.backoff import NoBackoff
            from redis.exceptions import NoScriptError, RedisError
        except ModuleNotFoundError:
            raise InputError("Redis needs a client: pip install 'tidegate[redis]'", where="redis_url") from None
        self._errors: tuple[type[BaseException], ...] = (RedisError, OSError, TimeoutError, asyncio.TimeoutError)
        self._unknown_script: type[BaseException] = NoScriptError
        self._timeout_s = timeout_s
        self._waiting: list[tuple[Command, asyncio.Future[Any]]] = []
        self._sending: asyncio.Task[None] | None = None
        self._tell = tell
        self._up = False
        self._probing: asyncio.Task[None] | None = None
        try:
            pool = BlockingConnectionPool.from_url(
                url,
                max_connections=_MOST_CONNECTIONS,
                timeout=timeout_s,
                socket_timeout=timeout_s,
                socket_connect_timeout=timeout_s,
                retry=Retry(NoBackoff(), 0),
                health_check_interval=0,
            )
        except ValueError:
            raise InputError(
                "expected an address of a Redis, such as redis://127.0.0.1:6379/0", where="redis_url"
            ) from None
        self._redis: Redis = Redis(connection_pool=pool)

    @property
    def up(self) -> bool:
        """Whether it answered the last time that it was asked."""
        return self._up

    async def open(self) -> None:
        """Ask it once; when it does not answer, it is asked again in the background."""
        if not await self._probe():
            self._went_down("it does not answer")

    async def close(self) -> None:
        """End the asking, and all connections."""
        tasks = {task for task in (self._probing, self._sending) if task is not None}
        self._probing = self._sending = None
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self._up = False
        self._fail(self._waiting)
        with contextlib.suppress(*self._errors):
            await self._redis.aclose()
            await self._redis.connection_pool.disconnect()

    async def execute(self, *command: str | bytes | int | float) -> Any:
        """What the Redis answers to one command.

        Raises:
            SharedDown: when it is down, refuses the command, or takes longer than its time.
            UnknownScript: when it does not know a script.
        """
        if not self._up:
            raise SharedDown("the Redis is down")
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append((command, answer))
        if self._sending is None or self._sending.done():
            self._sending = asyncio.ensure_future(self._send())
        return await answer

    async def _send(self) -> None:
        """Send what waits, until nothing does."""
        while self._waiting:
            batch, self._waiting = self._waiting[:_MOST_TOGETHER], self._waiting[_MOST_TOGETHER:]
            try:
                async with asyncio.timeout(self._timeout_s):
                    pipeline = self._redis.pipeline(transaction=False)
                    for command, _ in batch:
                        pipeline.execute_command(*command)
                    answers = await pipeline.execute(raise_on_error=False)
            except BaseException as error:
                if isinstance(error, self._errors):
                    self._went_down(type(error).__name__)
                self._fail(batch)
                self._fail(self._waiting)
                self._waiting = []
                if not isinstance(error, self._errors):
                    raise
                return
            for (_, answer), told in zip(batch, answers, strict=True):
                self._tell_answer(answer, told)

    def _tell_answer(self, answer: asyncio.Future[Any], told: Any) -> None:
        if isinstance(told, Exception) and not isinstance(told, self._unknown_script):
            self._went_down(type(told).__name__)
        if answer.done():  # whoever asked has gone
            return
        if isinstance(told, self._unknown_script):
            answer.set_exception(UnknownScript("the Redis does not know this script"))
        elif isinstance(told, Exception):
            answer.set_exception(SharedDown("the Redis refuses a command"))
        else:
            answer.set_result(told)

    @staticmethod
    def _fail(batch: list[tuple[Command, asyncio.Future[Any]]]) -> None:
        for _, answer in batch:
            if not answer.done():
                answer.set_exception(SharedDown("the Redis does not answer"))

    def _went_down(self, why: str) -> None:
        if self._up or self._probing is None:
            _log.warning("the Redis is down (%s): each gateway goes by what it knows itself", why)
            self._set(up=False)
        if self._probing is None or self._probing.done():
            self._probing = asyncio.ensure_future(self._wait_until_up())

    async def _wait_until_up(self) -> None:
        pause_s = FIRST_PAUSE_S
        while True:
            await asyncio.sleep(pause_s)
            if await self._probe():
                _log.warning("the Redis is up again")
                return
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def _probe(self) -> bool:
        """Whether it takes a value: one that is a replica, or is full, answers and is of no use."""
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._redis.set("tidegate:probe", b"1", px=1000)
        except self._errors:
            return False
        self._set(up=True)
        return True

    def _set(self, *, up: bool) -> None:
        self._up = up
        if self._tell is not None:
            self._tell(up)
