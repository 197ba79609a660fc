"""The client of the gateway's benchmarks: sends a request, stores what arrives and when, and takes it apart afterwards.

It does as little as it can while an exchange runs, because it shares the processor with what it measures.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Exchange:
    """One request and all that came back: the pieces with their time of arrival (ns), as the kernel gave them."""

    begun: int = 0
    ended: int = 0
    arrived: list[tuple[int, bytes]] = field(default_factory=list)
    whole: bool = False
    """Whether the answer came to its end."""

    @property
    def raw(self) -> bytes:
        return b"".join(data for _, data in self.arrived)


class Connection(asyncio.Protocol):
    """A connection that is kept: one exchange after the other.

    Args:
        headers: sent with each request, beside those that it needs.
    """

    def __init__(self, headers: Mapping[str, str] | None = None) -> None:
        lines = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
        self._head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n{lines}"
        self._transport: Any = None
        self._exchange = Exchange()
        self._length: int | None = None
        self._tail = b""
        self._done: asyncio.Future[None] | None = None

    @classmethod
    async def to(cls, url: str, headers: Mapping[str, str] | None = None) -> Connection:
        host, port = url.removeprefix("http://").split(":")
        _, made = await asyncio.get_running_loop().create_connection(lambda: cls(headers), host, int(port))
        return made

    async def ask(self, body: bytes) -> Exchange:
        """Send a request; returns when its answer is complete, or the other side hung up."""
        self._done = asyncio.get_running_loop().create_future()
        self._exchange, self._length, self._tail = Exchange(), None, b""
        data = f"{self._head}content-length: {len(body)}\r\n\r\n".encode() + body
        self._exchange.begun = time.monotonic_ns()
        self._transport.write(data)
        await self._done
        return self._exchange

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    # what the loop calls

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        now = time.monotonic_ns()
        exchange = self._exchange
        exchange.arrived.append((now, data))
        if self._length is None:
            head, found, rest = exchange.raw.partition(b"\r\n\r\n")
            if not found:
                return
            self._length = _length_of(head)
            if self._length >= 0:
                self._length -= len(rest)
        elif self._length >= 0:
            self._length -= len(data)
        self._tail = (self._tail + data)[-5:]
        if self._length == 0 or (self._length < 0 and self._tail == b"0\r\n\r\n"):
            exchange.whole, exchange.ended = True, now
            self._finish()

    def connection_lost(self, error: Exception | None) -> None:
        self._exchange.ended = time.monotonic_ns()
        self._finish()

    def _finish(self) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_result(None)


def _length_of(head: bytes) -> int:
    """The bytes of the body; -1 when it comes in chunks."""
    for line in head.lower().split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name == b"content-length":
            return int(value)
    return -1


@dataclass
class Received:
    """What an answer was.

    Attributes:
        pieces: each piece of text: when it arrived (ns), and its end in characters.
        blocked_from: where the flagged text begins; None when nothing was blocked, or it is not told.
    """

    text: str = ""
    finish_reason: str | None = None
    done: bool = False
    blocked_from: int | None = None
    first_byte: int = 0
    last_byte: int = 0
    pieces: list[tuple[int, int]] = field(default_factory=list)


def read(exchange: Exchange) -> Received:
    """Take an exchange apart, streaming or whole; what is malformed raises ValueError or LookupError."""
    raw = exchange.raw
    head, _, rest = raw.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        raise ValueError(f"unexpected answer: {raw[:300]!r}")
    if not exchange.whole:
        raise ValueError("the answer broke off")
    found = Received(first_byte=exchange.arrived[0][0], last_byte=exchange.arrived[-1][0])
    if b"chunked" not in head.lower():
        _read_whole(json.loads(rest), found)
        return found
    ends = list(itertools.accumulate(len(data) for _, data in exchange.arrived))
    at, part, place = len(head) + 4, 0, 0
    body = b""
    events = b"text/event-stream" in head.lower()
    while True:
        line = rest.index(b"\r\n", place)
        size = int(rest[place:line], 16)
        at += line - place + 2 + size + 2
        if not size:
            break
        body, place = body + rest[line + 2 : line + 2 + size], line + 2 + size + 2
        while ends[part] < at:
            part += 1
        if events:
            *complete, body = body.split(b"\n\n")
            for event in complete:
                _read_event(event, exchange.arrived[part][0], found)
    if not events:
        _read_whole(json.loads(body), found)
    elif body.strip() or at != len(raw):
        raise ValueError("the body does not end with an event")
    return found


def _read_whole(answer: Any, found: Received) -> None:
    choice = answer["choices"][0]
    found.text, found.finish_reason, found.done = choice["message"]["content"], choice["finish_reason"], True
    found.pieces.append((found.last_byte, len(found.text)))


def _read_event(event: bytes, when: int, found: Received) -> None:
    data = event.removeprefix(b"data:").strip()
    if data == b"[DONE]":
        found.done = True
        return
    if not event.startswith(b"data:"):
        return  # a comment, or an event of another kind
    chunk = json.loads(data)
    if "error" in chunk:
        raise ValueError(f"the stream ended with an error: {chunk['error'].get('message', '')[:200]}")
    if not chunk["choices"]:
        return
    choice = chunk["choices"][0]
    if text := choice["delta"].get("content") or "":
        found.text += text
        found.pieces.append((when, len(found.text)))
    found.finish_reason = choice.get("finish_reason") or found.finish_reason
    if chunk.get("tidegate", {}).get("action") == "block":
        found.blocked_from = chunk["tidegate"]["where"]["start"]


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """P50, P90 and P99; empty when there is nothing."""
    import numpy as np

    return {f"p{q}": round(float(np.percentile(values, q)), 3) for q in (50, 90, 99)} if len(values) else {}
