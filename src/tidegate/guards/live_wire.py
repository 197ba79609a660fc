"""One connection to the ``/v1/live`` of a Tidegate server, with many streams on it; what the frames are is in its docs.

There is no task behind it: what comes in is handed to its stream when the event loop has it, so that a connection that
nobody uses costs nothing, and a stream can be closed at once and from anywhere in the loop. A stream that is forgotten
is closed on the server too.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Final, Self, cast

from websockets.client import ClientProtocol
from websockets.exceptions import InvalidStatus
from websockets.frames import Frame, Opcode
from websockets.http11 import Response
from websockets.protocol import State
from websockets.typing import Subprotocol
from websockets.uri import parse_uri

from tidegate.errors import GuardError, GuardUnavailable, UnreadableVerdict

__all__ = ["PROTOCOL", "BrokenOff", "Connection", "Stream"]

PROTOCOL: Final = "tidegate.live.v1"
_LONGEST_FRAME: Final = 64 * 1024 * 1024
_PERMANENT: Final = {
    400: "does not speak tidegate.live.v1",
    401: "does not take the key",
    403: "does not take the key",
    404: "has no /v1/live",
}


class BrokenOff(Exception):
    """A connection, or the stream on it, is gone: the text may be sent again on another."""


class Stream:
    """One text on a connection, as far as the connection knows it.

    Attributes:
        number: of the stream.
        sent: how many characters were sent.
        told: of how many tokens the server said something.
        connection: where it is.
    """

    def __init__(self, connection: Connection, number: int) -> None:
        self.number = number
        self.sent = 0
        self.told = 0
        self.connection = connection
        self._frames: deque[dict[str, Any]] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def send(self, kind: str, **fields: Any) -> None:
        """Send a frame of this stream; nothing when the connection is gone, which `next` will say."""
        self.connection.send({"type": kind, "stream": self.number, **fields})

    async def next(self) -> dict[str, Any]:
        """The next frame of this stream.

        Raises:
            BrokenOff: when the connection is gone.
        """
        while not self._frames:
            if self.connection.gone:
                raise BrokenOff
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._frames.popleft()

    def close(self) -> None:
        """Tell the server that nothing more is wanted; safe to call any number of times."""
        self.connection.release(self.number)

    def take(self, frame: dict[str, Any]) -> None:
        """Called with each frame of this stream."""
        self._frames.append(frame)
        self.wake()

    def wake(self) -> None:
        """Let `next` look again."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Connection(asyncio.Protocol):
    """Made by `to`.

    Attributes:
        hello: the first frame of the server.
        gone: whether it is closed, or being closed.
        leaving: whether the server opens no more streams here.
    """

    def __init__(self, url: str, key: str | None) -> None:
        self.hello: Mapping[str, Any] = {}
        self.gone = False
        self.leaving = False
        self._key = key
        self._protocol = ClientProtocol(
            parse_uri(url), subprotocols=[Subprotocol(PROTOCOL)], max_size=_LONGEST_FRAME, logger=None
        )
        self._transport: asyncio.Transport | None = None
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._streams: weakref.WeakValueDictionary[int, Stream] = weakref.WeakValueDictionary()
        self._open: set[int] = set()
        self._highest = 0
        self._parts: list[bytes] = []

    @classmethod
    async def to(cls, url: str, key: str | None, timeout_s: float) -> Self:
        """Connect.

        Args:
            url: as ``ws://host:8080/v1/live``.
            key: sent as bearer token; None for none.
            timeout_s: seconds until the server says hello.

        Raises:
            BrokenOff: when that fails in a way that may pass.
            GuardUnavailable: when it would fail again.
        """
        uri = parse_uri(url)
        made = cls(url, key)
        try:
            async with asyncio.timeout(timeout_s):
                context = ssl.create_default_context() if uri.secure else None
                await asyncio.get_running_loop().create_connection(lambda: made, uri.host, uri.port, ssl=context)
                await made._ready
        except ssl.SSLCertVerificationError as error:
            raise GuardUnavailable("the server's certificate cannot be verified") from error
        except (OSError, TimeoutError) as error:
            raise BrokenOff from error
        finally:
            if not made.hello:
                made.close()
        return made

    @property
    def streams(self) -> int:
        """How many streams it has open."""
        return len(self._open)

    @property
    def limits(self) -> Mapping[str, Any]:
        """What the server holds us to."""
        limits: Mapping[str, Any] = self.hello["limits"]
        return limits

    @property
    def has_room(self) -> bool:
        """Whether another stream may be opened here."""
        return not self.gone and not self.leaving and self.streams < self.limits["streams"]

    def open(self, fields: Mapping[str, Any]) -> Stream:
        """Open a stream; ``fields`` are those of its ``open`` frame."""
        self._highest += 1
        stream = Stream(self, self._highest)
        self._streams[stream.number] = stream
        self._open.add(stream.number)
        forgotten = weakref.finalize(stream, _release, asyncio.get_running_loop(), self.release, stream.number)
        forgotten.atexit = False
        stream.send("open", **fields)
        return stream

    def release(self, number: int) -> None:
        """Nothing more is wanted of this stream."""
        if number in self._open:
            self._open.discard(number)
            self.send({"type": "close", "stream": number})

    def send(self, frame: Mapping[str, Any]) -> None:
        """Send a frame; nothing when the connection is gone."""
        if not self.gone:
            self._protocol.send_text(json.dumps(frame, separators=(",", ":")).encode())
            self._flush()

    def close(self) -> None:
        """Close it; what waits for its streams is told that it broke off. Safe to call twice."""
        if not self.gone and self._protocol.state is State.OPEN:
            self._protocol.send_close(1000)
            self._flush()
        self._lost()

    # what the event loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection stands: ask for the protocol."""
        self._transport = cast(asyncio.Transport, transport)
        request = self._protocol.connect()
        request.headers["User-Agent"] = "tidegate"
        if self._key is not None:
            request.headers["Authorization"] = f"Bearer {self._key}"
        self._protocol.send_request(request)
        self._flush()

    def data_received(self, data: bytes) -> None:
        """Hand each frame to its stream."""
        self._protocol.receive_data(data)
        for event in self._protocol.events_received():
            if isinstance(event, Response):
                self._shake_hands()
            elif not isinstance(event, Frame):
                continue
            elif event.opcode in (Opcode.TEXT, Opcode.CONT):
                self._parts.append(bytes(event.data))
                if event.fin:
                    whole, self._parts = b"".join(self._parts), []
                    self._take(whole)
            elif event.opcode is Opcode.CLOSE:
                self.gone = True
        self._flush()
        if self._protocol.parser_exc is not None or self.gone:
            self._lost()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called when the other side is gone."""
        self._lost()

    def _shake_hands(self) -> None:
        error = self._protocol.handshake_exc
        if error is None or self._ready.done():
            return
        status = error.response.status_code if isinstance(error, InvalidStatus) else 0
        if status in _PERMANENT or not isinstance(error, InvalidStatus):
            said = _PERMANENT.get(status, "does not speak the WebSocket protocol as it should")
            self._ready.set_exception(GuardUnavailable(f"the guard's server {said}"))
        self._lost()

    def _take(self, data: bytes) -> None:
        try:
            frame = json.loads(data)
            kind, number = frame["type"], frame.get("stream")
            if kind == "hello":
                self._greet(frame)
            elif kind == "going_away" or number is None:
                self.leaving = True
            else:
                if kind in ("end", "error"):
                    self._open.discard(number)
                stream = self._streams.get(number)
                if stream is not None:
                    stream.take(frame)
        except (ValueError, KeyError, TypeError, AttributeError):
            self._lost(UnreadableVerdict("the server's frames cannot be read"))

    def _greet(self, frame: Mapping[str, Any]) -> None:
        if isinstance(frame["guard"], str) and all(
            isinstance(frame["limits"][name], int) for name in ("streams", "stream_characters")
        ):
            self.hello = frame
            if not self._ready.done():
                self._ready.set_result(None)
        else:
            raise TypeError

    def _flush(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            for data in self._protocol.data_to_send():
                if data:
                    self._transport.write(data)

    def _lost(self, error: GuardError | None = None) -> None:
        self.gone = True
        if self._transport is not None:
            self._transport.close()
        if not self._ready.done():
            self._ready.set_exception(error or ConnectionError("the server broke off"))
            self._ready.exception()  # nobody may be waiting any more
        self._open.clear()
        for stream in list(self._streams.values()):
            stream.wake()


def _release(loop: asyncio.AbstractEventLoop, release: Callable[[int], None], number: int) -> None:
    """A stream was forgotten, in whatever thread."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(release, number)
