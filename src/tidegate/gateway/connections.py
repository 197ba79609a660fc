"""HTTP connections that cannot be held for nothing: uvicorn's own, with bounds on what comes before a request's body.

uvicorn's parser takes headers of any length at any speed, and has no patience to lose. Here the head of a request has a
length, a number of lines, and a time; a whole request has a time too; and there are only so many connections. All of
that is before any of our code runs, so that a client that sends a byte each minute holds nothing but its place, and
that not for long.

A WebSocket is handed over after its head, and counts as a connection all the same.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from tidegate.gateway.statuses import Problem

__all__ = ["BoundedConfig", "BoundedProtocol", "Bounds"]

_ON_ITS_WAY_S: Final = 0.5
"""How long a connection with nothing to answer stays open when the server is told to stop."""
_SPARE_S: Final = 2.0
"""How much later than its time a request that is still on its way is cut off: the answer that says so comes before."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a connection may take.

    Attributes:
        connections: how many there may be at once; more get 503.
        head_bytes: the longest head of a request: its line and all its headers, in bytes.
        head_lines: the most headers.
        head_s: seconds for the head, from its first byte, or from the beginning of the connection.
        request_s: seconds for the whole request, its body included.
    """

    connections: int = 4096
    head_bytes: int = 32 * 1024
    head_lines: int = 100
    head_s: float = 10.0
    request_s: float = 60.0


class BoundedConfig(uvicorn.Config):
    """uvicorn's settings, with bounds."""

    def __init__(self, app: Any, *, bounds: Bounds = Bounds(), **options: Any) -> None:
        super().__init__(app, http=BoundedProtocol, **options)
        self.bounds = bounds


class BoundedProtocol(HttpToolsProtocol):
    """One connection; its bounds are those of the `BoundedConfig`."""

    def __init__(self, config: uvicorn.Config, *rest: Any, **options: Any) -> None:
        super().__init__(config, *rest, **options)
        self._bounds: Bounds = getattr(config, "bounds", Bounds())
        self._in_head = True
        self._head_bytes = 0
        self._declined = False
        self._stopping = False
        self._wrong: Problem | None = None
        self._head_timer: asyncio.TimerHandle | None = None
        self._request_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        full = len(self.connections) >= self._bounds.connections
        super().connection_made(transport)
        if full:
            self._say(Problem(503, "there are too many connections", "server_error", None, "too_many_connections"))
            return
        self._head_timer = self.loop.call_later(self._bounds.head_s, self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timers()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._in_head:
            self._begin_head()
            self._head_bytes += len(data)
        self._feed(data)
        if self._in_head and self._head_bytes > self._bounds.head_bytes and not self.transport.is_closing():
            self._say(_too_long(self._bounds))

    def _feed(self, data: bytes) -> None:
        """uvicorn's ``data_received``, but for requests that offer another protocol than we speak, as clients of HTTP/2
        do with ``Upgrade: h2c``: they are answered as they are. The parser takes no body of these, so that it is given
        the request again without the offer.
        """
        self._unset_keepalive_if_required()
        rest: bytes | None = data
        while rest is not None:
            try:
                rest = self._fed(rest)
            except httptools.HttpParserError:
                self.logger.warning("Invalid HTTP request received.")
                self.send_400_response("")
                return

    def _fed(self, data: bytes) -> bytes | None:
        """Give bytes to the parser; what is still to be given to it, None for nothing."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if self._declined:
                rest = self._without_offer() + data[upgrade.args[0] :]
                self.parser = httptools.HttpRequestParser(self)
                return rest
            if self._should_upgrade():
                self.handle_websocket_upgrade()
        return None

    def _without_offer(self) -> bytes:
        """The head of the request without its offer of another protocol."""
        version = self.parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, version)]
        lines += (b"%b: %b" % header for header in self.headers if header[0] != b"upgrade")
        return b"\r\n".join((*lines, b"", b""))

    def shutdown(self) -> None:
        """Called by uvicorn when it is told to stop. Nothing more is taken than a request that is on its way by now:
        whoever sent it to a server that was open would see its connection break.
        """
        self._stopping = True
        if self._is_asked():
            super().shutdown()
        else:
            self.loop.call_later(_ON_ITS_WAY_S, self._close_if_idle)

    def _is_asked(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _close_if_idle(self) -> None:
        if not self._is_asked() and not self._head_bytes and not self.transport.is_closing():
            self.transport.close()

    def handle_websocket_upgrade(self) -> None:
        self._stop_timers()
        super().handle_websocket_upgrade()
        upgraded: Any = self.transport.get_protocol()
        if self._stopping and upgraded is not self:
            upgraded.shutdown()

    # what the parser says

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        self._seen = 0

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header. What comes behind a body (trailers) is none: who checked the headers on the way did not see it."""
        if self._in_head:
            super().on_header(name, value)
        self._count(len(name) + len(value) + 4)
        if len(self.headers) > self._bounds.head_lines:
            self._refuse(Problem(431, f"expected at most {self._bounds.head_lines} headers", code="too_many_headers"))

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._head_bytes = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        offers = any(name == b"upgrade" for name, _ in self.headers)
        self._declined = offers and self.parser.should_upgrade() and not self._should_upgrade()
        if not self._declined:
            super().on_headers_complete()
            if self._stopping and self.cycle is not None:
                self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        if self._declined:
            return
        if self._request_timer is not None:
            self._request_timer.cancel()
            self._request_timer = None
        self._in_head = True
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._say(self._wrong or Problem(400, "this is not HTTP", code="bad_request"))

    def _count(self, size: int) -> None:
        self._seen += size
        if self._seen > self._bounds.head_bytes:
            self._refuse(_too_long(self._bounds))

    def _refuse(self, problem: Problem) -> None:
        """Stop the parser; the answer follows."""
        self._wrong = problem
        raise httptools.HttpParserError(problem.message)

    # time

    def _begin_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self._bounds.head_s, self._head_is_late)
        if self._request_timer is None:
            self._request_timer = self.loop.call_later(self._bounds.request_s + _SPARE_S, self._request_is_late)

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self.transport.is_closing():
            return
        if not self._head_bytes or self._is_answering():
            self.transport.close()
            return
        self._say(Problem(408, "the headers did not come in time", code="request_timeout"))

    def _request_is_late(self) -> None:
        self._request_timer = None
        if not self.transport.is_closing():
            self.transport.abort()

    def _is_answering(self) -> bool:
        return self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete

    def _stop_timers(self) -> None:
        for timer in (self._head_timer, self._request_timer):
            if timer is not None:
                timer.cancel()
        self._head_timer = self._request_timer = None

    def _say(self, problem: Problem) -> None:
        """Answer without any of our app, and close; what an exchange before is saying is not broken into."""
        self._stop_timers()
        if not self._is_answering():
            body = json.dumps(problem.body).encode()
            lines = [
                f"HTTP/1.1 {problem.status} {HTTPStatus(problem.status).phrase}",
                "content-type: application/json",
                f"content-length: {len(body)}",
                "x-content-type-options: nosniff",
                "cache-control: no-store",
                "connection: close",
            ]
            if problem.status == 503:
                lines.append("retry-after: 1")
            self.transport.write("\r\n".join((*lines, "", "")).encode("ascii") + body)
        self.transport.close()


def _too_long(bounds: Bounds) -> Problem:
    return Problem(431, f"expected headers of at most {bounds.head_bytes:,} bytes", code="headers_too_long")
