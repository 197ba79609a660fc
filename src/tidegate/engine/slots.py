"""Who owns which part of the cache: a bounded number of positions, shared out without overlap.

Each owner has one contiguous region and not a list of blocks: attention then reads keys and values where they lie,
through a view, with the kernels that every build of torch has. Blocks would need a kernel that follows a table, or a
copy of the whole cache in every forward. The price is that a region which cannot grow where it is must be moved. That
is kept rare by headroom: a region that grows takes half as much again where there is room, and when regions are laid
out anew the free positions are shared out among those that are in use.

Idle owners keep their region until somebody needs the room; the one that was idle longest goes first.

Knows no tensors: what must be copied is returned as `Move`, to be carried out in order.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

__all__ = ["Grant", "Move", "Slots"]

_LEAST_HEADROOM = 32

Owner = TypeVar("Owner", bound=Hashable)


class Move(NamedTuple):
    """Copy ``length`` positions; source and target may overlap, and what was in the source is then in the target."""

    source: int
    target: int
    length: int


class Grant(NamedTuple, Generic[Owner]):
    """What it took to give an owner its room."""

    moves: tuple[Move, ...]
    evicted: tuple[Owner, ...]


class _Gap(NamedTuple):
    start: int
    size: int


@dataclass(slots=True)
class _Region:
    start: int
    capacity: int
    length: int

    @property
    def stop(self) -> int:
        return self.start + self.capacity


class Slots(Generic[Owner]):
    """A cache of ``positions`` positions.

    Args:
        positions: how many there are.
        most: most positions of one owner; more headroom than that is never given.
    """

    def __init__(self, positions: int, most: int) -> None:
        self.positions = positions
        self._most = most
        self._regions: dict[Owner, _Region] = {}
        self._idle: OrderedDict[Owner, None] = OrderedDict()
        self._busy = 0
        """Sum of the lengths of those that are not idle."""

    @property
    def used(self) -> int:
        """Positions that hold something."""
        return sum(region.length for region in self._regions.values())

    @property
    def reserved(self) -> int:
        """Positions that somebody owns, headroom included."""
        return sum(region.capacity for region in self._regions.values())

    @property
    def owners(self) -> int:
        """How many own a region."""
        return len(self._regions)

    def start(self, owner: Owner) -> int:
        """Where the region of an owner begins."""
        return self._regions[owner].start

    def length(self, owner: Owner) -> int:
        """How many positions an owner uses; 0 when it owns none."""
        region = self._regions.get(owner)
        return region.length if region else 0

    def available(self, owner: Owner) -> int:
        """How many positions an owner could have, were all idle ones evicted."""
        own = 0 if owner in self._idle else self.length(owner)
        return self.positions - self._busy + own

    def reserve(self, owner: Owner, length: int, keep: int) -> Grant[Owner] | None:
        """Give an owner room for ``length`` positions, and evict idle ones if that is needed.

        Args:
            owner: who is in use from now on.
            length: how many positions it uses.
            keep: how many of those that it has must move with it.

        Returns:
            None when there is no room; nothing has then changed.
        """
        region = self._regions.get(owner)
        if region and length <= region.capacity:
            self.wake(owner)
            self._busy += length - region.length
            region.length = length
            return Grant((), ())
        if length > self.available(owner):
            return None
        self.wake(owner)
        self._busy += length - self.length(owner)
        evicted: list[Owner] = []
        while (moves := self._grow(owner, length, keep)) is None:
            oldest = self.evict()
            assert oldest is not None, "there is no room where there should be"
            evicted.append(oldest)
        return Grant(tuple(moves), tuple(evicted))

    def evict(self) -> Owner | None:
        """Free the region that was idle longest; returns whose it was, None when none is idle."""
        if not self._idle:
            return None
        oldest, _ = self._idle.popitem(last=False)
        del self._regions[oldest]
        return oldest

    def wake(self, owner: Owner) -> None:
        """An owner is in use from now on, and keeps what it has until it rests or is freed."""
        if owner in self._idle:
            del self._idle[owner]
            self._busy += self._regions[owner].length

    def rest(self, owner: Owner) -> None:
        """An owner is idle from now on, and may be evicted."""
        if owner in self._regions:
            self.wake(owner)
            self._busy -= self._regions[owner].length
            self._idle[owner] = None

    def shrink(self, owner: Owner, length: int) -> None:
        """An owner uses only its first positions from now on."""
        region = self._regions.get(owner)
        if region and length < region.length:
            self._busy -= 0 if owner in self._idle else region.length - length
            region.length = length

    def free(self, owner: Owner) -> None:
        """Take back what an owner has; safe when it has nothing."""
        self.wake(owner)
        self._busy -= self.length(owner)
        self._regions.pop(owner, None)

    def check(self) -> None:
        """Raises AssertionError when two own the same position, or the sums are wrong."""
        stop = 0
        for _, region in self._ordered():
            assert region.start >= stop, "two regions overlap"
            assert 0 <= region.length <= region.capacity, "a region is smaller than what it holds"
            stop = region.stop
        assert stop <= self.positions, "a region ends behind the cache"
        assert self.used <= self.reserved <= self.positions, "more is owned than there is"
        assert all(owner in self._regions for owner in self._idle), "somebody idles who owns nothing"
        busy = sum(region.length for owner, region in self._regions.items() if owner not in self._idle)
        assert self._busy == busy, "the sum of what is in use is wrong"

    def _ordered(self) -> list[tuple[Owner, _Region]]:
        return sorted(self._regions.items(), key=lambda pair: (pair[1].start, pair[1].stop))

    def _gaps(self, without: Owner) -> Iterator[_Gap]:
        """What is free when one owner is left out."""
        start = 0
        for owner, region in self._ordered():
            if owner != without:
                yield _Gap(start, region.start - start)
                start = region.stop
        yield _Gap(start, self.positions - start)

    def _grow(self, owner: Owner, length: int, keep: int) -> list[Move] | None:
        """Find room in place, elsewhere, or by laying everything out anew; None when somebody must go first."""
        region = self._regions.get(owner)
        wish = max(length, min(self._most, length + max(_LEAST_HEADROOM, length // 2)))
        gaps = [gap for gap in self._gaps(owner) if gap.size >= length]
        for gap in gaps:
            if region and gap.start <= region.start and region.start + length <= gap.start + gap.size:
                self._regions[owner] = _Region(region.start, min(wish, gap.start + gap.size - region.start), length)
                return []
        if gaps:
            gap = next((gap for gap in gaps if gap.size >= wish), max(gaps, key=lambda gap: gap.size))
            self._regions[owner] = _Region(gap.start, min(wish, gap.size), length)
            return [Move(region.start, gap.start, keep)] if region and keep else []
        slack = self.positions - length - sum(r.length for other, r in self._regions.items() if other != owner)
        if slack < 0 or (self._idle and slack < self.positions // 32):
            return None  # to copy everything for a few positions, again and again, costs more than an idle stream
        return self._lay_out(owner, length, keep, slack)

    def _lay_out(self, owner: Owner, length: int, keep: int, slack: int) -> list[Move]:
        """Give every region its length and those in use a share of what is left, in the order in which they lie."""
        regions = dict(self._ordered())
        old = {other: (region.start, region.length) for other, region in regions.items()}
        if owner in old:
            old[owner] = (regions[owner].start, keep)
        regions[owner] = _Region(0, 0, length)
        share = slack // sum(other not in self._idle for other in regions)
        start = 0
        for other, region in regions.items():
            extra = 0 if other in self._idle else min(share, max(0, self._most - region.length))
            regions[other] = _Region(start, region.length + extra, region.length)
            start += region.length + extra
        self._regions = regions
        moves = [Move(*old[other][:1], regions[other].start, old[other][1]) for other in regions if other in old]
        moves = [move for move in moves if move.length and move.source != move.target]
        left = [move for move in moves if move.target < move.source]
        right = [move for move in moves if move.target > move.source]
        return left + right[::-1]
