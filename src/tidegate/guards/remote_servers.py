"""Several servers that do the same: which is asked next, when one is left alone, and what its failures mean.

The one with the fewest open requests is asked. A server that fails several times in a row rests, for longer each time,
and is then tried with one request. One that says when to come again is left alone until then. Knows nothing of guards
beyond their errors.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

import aiohttp

from tidegate.errors import (
    GuardError,
    GuardOverloaded,
    GuardTimeout,
    GuardUnavailable,
    InputError,
    UnreadableVerdict,
)

__all__ = ["Server", "ServerPool", "ServerTrouble", "base_address", "read_key"]

T = TypeVar("T")

_KEEP_ALIVE_S: Final = 1.5
"""Shorter than servers keep idle connections: a request on one that the server just closed would fail."""
_LONGEST_ANSWER: Final = 4 * 1024 * 1024
_LONGEST_PAUSE_S: Final = 3600.0
_LONGEST_REST_S: Final = 300.0
_SHORT_PAUSE_S: Final = 1.0
"""How long a server that is overloaded is left alone when it does not say."""
_REFUSALS: Final = {
    400: "the guard's server cannot use the request, which may be too long for it",
    413: "the guard's server finds the request too long",
    422: "the guard's server cannot use the request, which may be too long for it",
    401: "the guard's server does not take the key",
    403: "the guard's server does not take the key",
    404: "the guard's server does not know the model or the path",
}


def base_address(url: str, path: str = "/v1") -> str:
    """The address that paths are appended to: ``http://host`` means ``http://host/v1``; a path is taken as it is.

    Args:
        url: where the server is.
        path: what an address without a path means.

    Raises:
        InputError: when it is not an http or https address, or has a name, a password, a query or a fragment.
    """
    try:
        parts = urlsplit(url.strip())
        _ = parts.port
    except ValueError:
        raise InputError("this is not an address: expected something like http://127.0.0.1:8000/v1") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError("expected an address such as http://127.0.0.1:8000/v1")
    if parts.username is not None or parts.password is not None:
        raise InputError("an address must not hold a name or a password: use key_file")
    if parts.query or parts.fragment:
        raise InputError("an address has no ?query and no #fragment")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/') or path}"


def read_key(path: Path) -> str:
    """The key that a file holds.

    Raises:
        GuardUnavailable: when it cannot be read, or is not one line of printable ASCII characters.
    """
    try:
        key = path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise GuardUnavailable(f"cannot read the key file {path}: {reason}") from None
    if not key or not (key.isascii() and key.isprintable()):
        raise GuardUnavailable(f"the key file {path} must hold one line of printable ASCII characters")
    return key


class ServerTrouble(Exception):
    """A request to a server failed.

    Args:
        error: what it means for the guard.
        elsewhere: whether another server may do better.
        counts: whether it speaks against the server, so that several in a row make it rest.
        pause_s: seconds for which the server is left alone from now on.
        rests: whether the server rests at once.
        status: the HTTP status; None when there was none.
    """

    def __init__(
        self,
        error: GuardError,
        *,
        elsewhere: bool = True,
        counts: bool = True,
        pause_s: float = 0.0,
        rests: bool = False,
        status: int | None = None,
    ) -> None:
        super().__init__(str(error))
        self.error = error
        self.elsewhere = elsewhere
        self.counts = counts
        self.pause_s = pause_s
        self.rests = rests
        self.status = status


class Server:
    """One server and how it does.

    Attributes:
        url: its base address.
        open: how many requests it has now.
        used: how many it had in all.
        failures: how many in a row failed.
        paused_until: it asked to be left alone until then, on the pool's clock.
        rests_until: it is left alone until then because it failed.
        error: what its last trouble meant; None when it never had any.
        known: whatever the pool's user wants to remember of it; forgotten when it rests.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.open = 0
        self.used = 0
        self.failures = 0
        self.paused_until = -math.inf
        self.rests_until = -math.inf
        self.error: GuardError | None = None
        self.known: dict[Any, Any] = {}


class ServerPool:
    """Servers that do the same, and one client towards them; used from one event loop at a time.

    Args:
        urls: base addresses, at least one.
        path: what an address without a path means.
        key: sent as bearer token; None for none.
        timeout_s: seconds that one request may take.
        connect_timeout_s: seconds until a connection stands.
        attempts: on how many servers a request is tried.
        most_open: how many requests one server may have at once.
        failures: after how many failures in a row a server rests.
        rest_s: for how many seconds, the first time; each further time twice as long, up to five minutes.
        clock: gives seconds.
    """

    def __init__(
        self,
        urls: tuple[str, ...],
        *,
        path: str = "/v1",
        key: str | None = None,
        timeout_s: float = 20.0,
        connect_timeout_s: float = 5.0,
        attempts: int = 2,
        most_open: int = 64,
        failures: int = 3,
        rest_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.servers = tuple(Server(base_address(url, path)) for url in urls)
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        self._timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=connect_timeout_s)
        self._attempts = attempts
        self._most_open = most_open
        self._failures = failures
        self._rest_s = rest_s
        self._clock = clock
        self._client: aiohttp.ClientSession | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.closed = False

    async def run(self, work: Callable[[Server], Awaitable[T]], *, first: Server | None = None) -> T:
        """Do some work with the server that has least to do, and with another one when that fails.

        Args:
            work: raises ServerTrouble when the server fails; other errors end the attempt and speak for nobody.
            first: the server that is tried first if it may be asked, however much it has to do; None for none.

        Raises:
            GuardOverloaded: when every server is full or asks to be left alone.
            GuardUnavailable: when every server rests, or the pool is closed.
            GuardError: what the last server's trouble means.
        """
        tried: list[Server] = []
        error: GuardError | None = None
        for _ in range(self._attempts):
            server = self._pick(tried, first)
            if server is None:
                break
            tried.append(server)
            server.open += 1
            server.used += 1
            try:
                result = await work(server)
            except ServerTrouble as trouble:
                self._note(server, trouble)
                error = trouble.error
                if not trouble.elsewhere:
                    break
            except GuardError:
                server.failures = 0
                raise
            else:
                server.failures = 0
                return result
            finally:
                server.open -= 1
        raise error or self._nobody()

    async def post(self, server: Server, path: str, body: dict[str, Any]) -> Any:
        """Send JSON to a server; what it answers with status 200, as parsed JSON.

        Raises:
            ServerTrouble: when it does not do that in time.
        """
        data = json.dumps(body).encode()
        headers = {"content-type": "application/json", **self._headers}
        try:
            async with self._session().post(
                server.url + path, data=data, headers=headers, allow_redirects=False
            ) as response:
                if response.status != 200:
                    raise _refused(response.status, response.headers.get("retry-after", ""))
                answer = await response.content.read(_LONGEST_ANSWER + 1)
                while more := await response.content.read(_LONGEST_ANSWER + 1):
                    answer += more
                    if len(answer) > _LONGEST_ANSWER:
                        break
        except TimeoutError as error:
            raise ServerTrouble(GuardTimeout("the guard's server did not answer in time")) from error
        except (aiohttp.ClientConnectorError, aiohttp.ClientConnectorDNSError) as error:
            raise ServerTrouble(GuardUnavailable("the guard's server cannot be reached")) from error
        except (aiohttp.ClientError, OSError) as error:
            raise ServerTrouble(GuardUnavailable("the guard's server broke off")) from error
        return _parsed(answer)

    async def close(self) -> None:
        """Close the client; safe to call twice."""
        self.closed = True
        client, self._client = self._client, None
        if client is not None and self._loop is asyncio.get_running_loop():
            await client.close()

    def _session(self) -> aiohttp.ClientSession:
        if self.closed:
            raise GuardUnavailable("the guard is closed")
        loop = asyncio.get_running_loop()
        if self._client is None or self._loop is not loop:
            self._loop = loop
            self._client = aiohttp.ClientSession(
                timeout=self._timeout,
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S),
                headers={"user-agent": "tidegate"},
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._client

    def _pick(self, tried: list[Server], first: Server | None) -> Server | None:
        free = [server for server in self.servers if server not in tried and self._may_be_asked(server)]
        if first in free:
            return first
        return min(free, key=lambda server: (server.open, server.used), default=None)

    def _may_be_asked(self, server: Server) -> bool:
        now = self._clock()
        if now < server.paused_until or now < server.rests_until:
            return False
        trial = server.failures >= self._failures
        return server.open < (1 if trial else self._most_open)

    def _note(self, server: Server, trouble: ServerTrouble) -> None:
        now = self._clock()
        server.error = trouble.error
        server.paused_until = max(server.paused_until, now + min(trouble.pause_s, _LONGEST_PAUSE_S))
        if now < server.rests_until:
            return
        if trouble.rests:
            server.failures = max(server.failures, self._failures - 1)
        server.failures = server.failures + 1 if trouble.counts else 0
        if server.failures >= self._failures:
            rounds = min(server.failures - self._failures, 16)
            server.rests_until = now + min(self._rest_s * 2**rounds, _LONGEST_REST_S)
            server.known.clear()

    def _nobody(self) -> GuardError:
        """Why no server can be asked now."""
        now = self._clock()
        if all(now < server.rests_until for server in self.servers):
            first = min(self.servers, key=lambda server: server.rests_until)
            wait = first.rests_until - now
            return GuardUnavailable(
                f"every server rests, the next trial is in {wait:.1f} seconds, because {first.error}"
            )
        if any(now < server.paused_until for server in self.servers):
            return GuardOverloaded("the guard's servers ask to be left alone for now")
        return GuardOverloaded("the guard's servers have as many requests as they may have")


def _refused(status: int, retry_after: str) -> ServerTrouble:
    if status in (429, 503):
        pause = _seconds(retry_after)
        return ServerTrouble(
            GuardOverloaded(f"the guard's server is overloaded or not ready (status {status})"),
            pause_s=_SHORT_PAUSE_S if pause is None else pause,
            counts=pause is None,
            status=status,
        )
    said = _REFUSALS.get(status, "the guard's server failed")
    own_fault = status not in (400, 413, 422)
    return ServerTrouble(
        GuardUnavailable(f"{said} (status {status})"), elsewhere=own_fault, counts=own_fault, status=status
    )


def _seconds(retry_after: str) -> float | None:
    """How long a Retry-After header asks to wait, in seconds; None when it says nothing that can be read."""
    text = retry_after.strip()
    if text.isascii() and text.isdigit() and len(text) <= 9:
        return float(text)
    try:
        when = parsedate_to_datetime(text)
    except (TypeError, ValueError):
        return None
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    return max(0.0, (when - datetime.now(UTC)).total_seconds())


def _parsed(data: bytes) -> Any:
    if len(data) > _LONGEST_ANSWER:
        raise ServerTrouble(UnreadableVerdict(f"the server's answer is longer than {_LONGEST_ANSWER:,} bytes"))
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise ServerTrouble(UnreadableVerdict("the server's answer is not JSON")) from None
