"""Server-sent events, on bytes: an incremental reader for the upstream's, and a writer for ours.

The reader follows the WHATWG's rules for lines and ``data`` fields, gives back only the data, and refuses events that
never end. Knows nothing of JSON.
"""

from __future__ import annotations

import json
from typing import Any, Final

from tidegate.errors import UpstreamError

__all__ = ["DONE", "HEADERS", "EventReader", "event"]

DONE: Final = b"data: [DONE]\n\n"
"""The event that ends a stream of chunks."""

HEADERS: Final = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)
"""Of a response that is an event stream: nobody on the way should store or buffer it."""

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode
_LINE_BREAKS: Final = {ord(each): f"\\u{ord(each):04x}" for each in "\x85\u2028\u2029"}
"""What Unicode takes for the end of a line, and server-sent events don't: many clients split by Unicode's rules."""
_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"


def event(content: Any) -> bytes:
    """One event whose data is this value as JSON. Raises ValueError for NaN and infinities."""
    line = _encode(content)
    if not line.isascii():
        line = line.translate(_LINE_BREAKS)
    return b"data: %b\n\n" % line.encode("utf-8", "replace")


class EventReader:
    """Cuts a stream of bytes, however it was chunked, into the data of its events.

    Args:
        longest: the most bytes that one event may have, at least 1.
    """

    def __init__(self, *, longest: int = 4 * 1024 * 1024) -> None:
        self._longest = longest
        self._rest: list[bytes] = []
        self._rest_size = 0
        self._data: list[bytes] = []
        self._size = 0
        self._begun = False

    def feed(self, data: bytes) -> list[bytes]:
        """Take more bytes; return the data of the events that are complete now.

        Raises:
            UpstreamError: when an event is longer than allowed.
        """
        if self._begun and b"\n" not in data and b"\r" not in data and not self._ends_in_return():
            self._keep(data)  # a line that goes on: its parts are joined once
            return []
        text = b"".join((*self._rest, data))
        self._rest, self._rest_size = [], 0
        if not self._begun:
            if _BYTE_ORDER_MARK.startswith(text[:3]) and len(text) < 3:
                self._keep(text)
                return []
            self._begun = True
            text = text.removeprefix(_BYTE_ORDER_MARK)
        held = b""
        if b"\r" in text:
            if text.endswith(b"\r"):
                text, held = text[:-1], b"\r"
            text = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        lines = text.split(b"\n")
        rest = lines.pop() + held
        events = [complete for line in lines if (complete := self._line(line)) is not None]
        self._keep(rest)
        return events

    def _ends_in_return(self) -> bool:
        return bool(self._rest) and self._rest[-1].endswith(b"\r")

    def _keep(self, part: bytes) -> None:
        """Keep a part of a line until the line is complete."""
        if part:
            self._rest.append(part)
            self._rest_size += len(part)
        if self._size + self._rest_size > self._longest:
            raise UpstreamError(f"the upstream sent an event of more than {self._longest:,} bytes")

    def finish(self) -> list[bytes]:
        """The stream is complete: the event that lacked only its blank line, if there is one."""
        return self.feed(b"\n\n") if self._rest or self._data else []

    def _line(self, line: bytes) -> bytes | None:
        if not line:
            if not self._data:
                return None
            complete = b"\n".join(self._data)
            self._data = []
            self._size = 0
            return complete
        if line.startswith(b"data:"):
            value = line[6:] if line[5:6] == b" " else line[5:]
            self._data.append(value)
            self._size += len(value) + 1  # with the line break that joins it to the next: empty lines take room too
        return None
