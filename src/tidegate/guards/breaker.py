"""A circuit breaker: a guard that failed several times in a row is left alone for a while, then tried with one text.

Closed: all calls go through. After ``failures`` failures in a row it opens. Open: no call goes through; the caller
learns at once what it would have learnt after a deadline. When the rest is over it is half open: one call at a time
goes through as a probe, the others do not. When ``probes`` of them went well in a row it closes; when one fails it
opens again, for twice as long, up to ``most_rest_s``.

A call that was given up by its caller says nothing, and neither does one whose result comes after the breaker changed.

Method: M. Nygard, Release It! (2007), stability pattern "circuit breaker".
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from tidegate.errors import GuardUnavailable

__all__ = ["Breaker", "BreakerOptions", "Call", "State"]

State = Literal["closed", "open", "half_open"]


@dataclass(frozen=True, slots=True)
class BreakerOptions:
    """When a breaker opens and closes.

    Attributes:
        failures: how many failures in a row open it; at least 1.
        rest_s: seconds that it then stays open; more than 0.
        most_rest_s: the longest rest, after probes that failed; at least ``rest_s``.
        probes: how many probes in a row must go well to close it; at least 1.

    Raises:
        ValueError: when one is out of its range.
    """

    failures: int = 5
    rest_s: float = 5.0
    most_rest_s: float = 60.0
    probes: int = 1

    def __post_init__(self) -> None:
        if self.failures < 1 or self.probes < 1:
            raise ValueError("a breaker needs at least one failure to open, and one probe to close")
        if not 0 < self.rest_s <= self.most_rest_s:
            raise ValueError("the rest of a breaker must be more than 0 seconds, and not more than its longest rest")


class Breaker:
    """One guard's breaker. Used by one event loop, or under a lock.

    Args:
        options: when it opens and closes.
        clock: seconds that only ever go up.
        tell: called with the new state after each change; None for nobody.
    """

    def __init__(
        self,
        options: BreakerOptions = BreakerOptions(),
        *,
        clock: Callable[[], float] = time.monotonic,
        tell: Callable[[State], None] | None = None,
    ) -> None:
        self.options = options
        self._clock = clock
        self._tell = tell
        self._state: State = "closed"
        self._in_a_row = 0
        self._rest_s = options.rest_s
        self._until = 0.0
        self._probing = False
        self._era = 0

    @property
    def state(self) -> State:
        """What it is now. It becomes half open with the first call after its rest."""
        return self._state

    def call(self) -> Call:
        """Ask for one call to the guard. Whoever gets one says how it ended.

        Raises:
            GuardUnavailable: when it is open, or half open and a probe is under way.
        """
        if self._state == "open" and self._clock() >= self._until:
            self._become("half_open")
        if self._state == "open" or (self._state == "half_open" and self._probing):
            raise GuardUnavailable("the guard failed several times in a row, and is left alone for a while")
        self._probing = self._state == "half_open"
        return Call(self, self._era)

    def _become(self, state: State) -> None:
        self._state = state
        self._era += 1
        self._in_a_row = 0
        self._probing = False
        if state == "open":
            self._until = self._clock() + self._rest_s
        if self._tell is not None:
            self._tell(state)

    def _end(self, era: int, *, failed: bool | None) -> None:
        if era != self._era:
            return
        self._probing = False
        if self._state == "half_open":
            self._end_probe(failed)
        elif failed:
            self._in_a_row += 1
            if self._in_a_row >= self.options.failures:
                self._become("open")
        elif failed is False:
            self._in_a_row = 0

    def _end_probe(self, failed: bool | None) -> None:
        if failed:
            self._rest_s = min(2 * self._rest_s, self.options.most_rest_s)
            self._become("open")
        elif failed is False:
            self._in_a_row += 1
            if self._in_a_row >= self.options.probes:
                self._rest_s = self.options.rest_s
                self._become("closed")


class Call:
    """One call that a breaker let through. The first thing said of it counts."""

    __slots__ = ("_breaker", "_era")

    def __init__(self, breaker: Breaker, era: int) -> None:
        self._breaker: Breaker | None = breaker
        self._era = era

    def went_well(self) -> None:
        """The guard judged."""
        self._end(False)

    def failed(self) -> None:
        """The guard failed."""
        self._end(True)

    def given_up(self) -> None:
        """It ended without saying anything of the guard: the caller went away, or asked for what cannot be."""
        self._end(None)

    def _end(self, failed: bool | None) -> None:
        breaker, self._breaker = self._breaker, None
        if breaker is not None:
            breaker._end(self._era, failed=failed)
