"""How long the text of a stream is held."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

__all__ = ["Delays"]


class Delays:
    """When the characters that are held came, and how long others had been held when they left.

    What waits for the rest of its token, or of its word, waits for the upstream: its time begins anew with the next
    text. From then on all the time counts, the guard's and that of the policy that holds it.

    Args:
        clock: seconds, from any beginning.

    Attributes:
        longest: seconds that a character was held, the longest so far.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.longest = 0.0
        self._clock = clock
        self._came: deque[tuple[int, float]] = deque()
        self._left = 0

    def arrive(self, fed: int, settled: int) -> None:
        """Text came, ``fed`` characters now in all; what lies behind ``settled`` could not be judged before."""
        now = self._clock()
        while self._came and self._came[-1][0] > settled:
            _, came = self._came.pop()
            if settled > max(self._left, self._came[-1][0] if self._came else 0):
                self._came.append((settled, came))
        self._came.append((fed, now))

    def leave(self, released: int) -> None:
        """So many characters have left in all."""
        self._left = released
        if not self._came:
            return
        now = self._clock()
        first = True
        while self._came and (first or self._came[0][0] <= released):
            end, came = self._came[0]
            first = False
            self.longest = max(self.longest, now - came)
            if end > released:
                return
            self._came.popleft()

    def oldest(self) -> float | None:
        """Seconds that the character has been held that is held longest; None when none is."""
        return self._clock() - self._came[0][1] if self._came else None

    def forget(self) -> None:
        """What is held was thrown away."""
        self._came.clear()
