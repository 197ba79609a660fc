"""One live stream as the engine sees it: its tokens, how far they are judged, and what of it is in the cache.

A model takes a bounded number of positions. A stream that is longer is judged in windows that overlap: the first one
holds the first tokens; each later one repeats the header (the first ``keep`` tokens), then the last ``overlap`` tokens
before it, at fresh positions, and goes on from there. Windows begin at fixed token numbers, so that a verdict depends
on the tokens before it and never on how they were cut into pieces. Within the first window all is as in one full
forward.

Knows no tensors, no time and no text.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field

from tidegate.errors import InputError
from tidegate.types import Target

__all__ = ["Sequence", "Windows"]


@dataclass(frozen=True, slots=True)
class Windows:
    """Which tokens of a stream each window holds, and at which positions.

    Args:
        size: most positions of one window.
        overlap: how many tokens before its first new one a later window repeats.
        keep: how many of the first tokens each later window begins with. Of a header that would leave less than a
            quarter of the window for new tokens, the middle is left out.

    Raises:
        InputError: when the window is too small for the overlap.
    """

    size: int
    overlap: int
    keep: int = 0

    def __post_init__(self) -> None:
        if self.size < 4 or not 0 <= self.overlap <= self.size // 2 or self.keep < 0:
            raise InputError(f"a window of {self.size} positions cannot repeat {self.overlap} tokens: at most half")

    @property
    def header(self) -> int:
        """How many positions the header takes in a later window."""
        return min(self.keep, self.size - self.overlap - self.size // 4)

    @property
    def later(self) -> int:
        """How many new tokens a later window takes."""
        return self.size - self.overlap - self.header

    def number(self, token: int) -> int:
        """In which window a token is judged."""
        return 0 if token < self.size else 1 + (token - self.size) // self.later

    def stop(self, window: int) -> int:
        """The number of the first token behind a window."""
        return self.size + window * self.later

    def seen(self, window: int) -> int:
        """The number of the first token that follows the header in a window."""
        return self.stop(window - 1) - self.overlap if window else 0

    def position(self, window: int, token: int) -> int:
        """Where in a window a token stands."""
        return self.header + token - self.seen(window) if window else token

    def token(self, window: int, position: int) -> int:
        """Which token stands at a position behind the header."""
        return self.seen(window) + position - self.header if window else position

    def ids(self, tokens: array[int], window: int, start: int, stop: int) -> list[int]:
        """The ids at the positions ``[start, stop)`` of a window."""
        if not window:
            return tokens[start:stop].tolist()
        body = tokens[self.token(window, max(start, self.header)) : self.token(window, max(stop, self.header))].tolist()
        return self._header(tokens, window)[start:stop] + body

    def _header(self, tokens: array[int], window: int) -> list[int]:
        before = min(self.keep, self.seen(window))
        head = self.header // 2 if before > self.header else self.header
        return tokens[:head].tolist() + tokens[before - (self.header - head) : before].tolist()


@dataclass(slots=True, eq=False)
class Sequence:
    """The state of one stream. What the scheduler alone may change is marked so."""

    windows: Windows
    tokens: array[int] = field(default_factory=lambda: array("i"))
    """Every token so far: of an evicted or rolled back stream any part can be computed again."""
    target: Target = Target.RESPONSE
    """Whose heads are read."""
    wanted: int = 0
    """The number of the first token whose logits are asked for."""
    done: int = 0
    """How many tokens are computed for good. Scheduler."""
    window: int = 0
    """The window that the cache is of. Scheduler."""
    cached: int = 0
    """How many positions of it are in the cache. Scheduler."""
    arrived: int = 0
    """When the tokens that wait now came, as a running number over all sequences. Scheduler."""
    served: int = 0
    """In which step it was last served, or began to wait. Scheduler."""
    owed: int = 0
    """How many positions must still be computed for the tokens that wait. Scheduler."""
    closed: bool = False

    @property
    def waiting(self) -> bool:
        """Whether tokens wait to be computed."""
        return self.done < len(self.tokens)

    @property
    def ready(self) -> int:
        """How many positions can be computed in the window of the next token."""
        window, start = self._next()
        return self.windows.position(window, min(len(self.tokens), self.windows.stop(window))) - start

    @property
    def work(self) -> int:
        """How many positions must be computed for all tokens that wait, in this window and in those behind it."""
        if not self.waiting:
            return 0
        count, window, last = self.ready, self._next()[0] + 1, self.windows.number(len(self.tokens) - 1)
        while window <= last:
            count += self.windows.position(window, min(len(self.tokens), self.windows.stop(window)))
            window += 1
        return count

    def accept(self, ids: Ids[int], target: Target, *, last_only: bool) -> None:
        """Append tokens; the logits of these, or of the last of these, are asked for."""
        self.wanted = len(self.tokens) + (len(ids) - 1 if last_only else 0)
        self.tokens.extend(ids)
        self.target = target

    def retract(self, length: int) -> None:
        """Take back tokens that were accepted and not begun."""
        del self.tokens[length:]

    def begin(self) -> None:
        """Go to the window of the next token; what is cached of another one is forgotten."""
        self.window, self.cached = self._next()

    def ids(self, count: int) -> list[int]:
        """The ids of the next positions."""
        return self.windows.ids(self.tokens, self.window, self.cached, self.cached + count)

    def answers(self, count: int) -> int:
        """How many of the next positions, counted from their end, are asked for."""
        stop = self.windows.token(self.window, self.cached + count)
        return max(0, stop - max(self.done, self.wanted))

    def advance(self, count: int) -> None:
        """The next positions were computed."""
        self.cached += count
        self.done = max(self.done, self.windows.token(self.window, self.cached))

    def crop(self, length: int) -> None:
        """Forget the tokens from a number on."""
        del self.tokens[length:]
        self.done = min(self.done, length)
        kept = self.windows.position(self.window, max(length, self.windows.seen(self.window)))
        self.cached = min(self.cached, kept)

    def _next(self) -> tuple[int, int]:
        """The window of the next token, and how much of it is cached."""
        window = self.windows.number(self.done)
        return window, self.cached if window == self.window else 0
