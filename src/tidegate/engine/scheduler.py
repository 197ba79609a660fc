"""What the next forward computes: which streams, how many positions of each, and where they lie in the cache.

Short work (the new tokens of live streams) goes first, the oldest first; what is left of the budget goes to long work
(prompts, and streams whose cache was evicted), in chunks. Whoever was not served for ``patience`` steps goes before all
others, the oldest first, so that nobody starves: the oldest waiting stream gets a chunk at least every
``patience + 1`` steps, and can always have its room, because it may evict all that came later.

Back-pressure is counted in positions that must be computed: more than ``most_waiting`` is refused before anything is
accepted. Pure and deterministic; knows no tensors and no time.
"""

from __future__ import annotations

from collections.abc import Sequence as Ids
from dataclasses import dataclass
from typing import NamedTuple

from tidegate.engine.sequence import Sequence
from tidegate.engine.slots import Move, Slots
from tidegate.errors import GuardOverloaded, InputError
from tidegate.types import Target

__all__ = ["Limits", "Piece", "Scheduler", "Step"]


@dataclass(frozen=True, slots=True)
class Limits:
    """How much at once. All but ``patience`` count positions.

    Raises:
        InputError: when one is not positive.
    """

    tokens: int = 512
    """Most new positions in one forward."""
    chunk: int = 256
    """Most new positions of one stream in one forward."""
    short: int = 32
    """Most new positions of work that goes first."""
    patience: int = 4
    """After how many steps without service a stream goes before all others."""
    waiting: int = 65_536
    """Most positions that may wait to be computed before more is refused."""

    def __post_init__(self) -> None:
        for name in ("tokens", "chunk", "short", "patience", "waiting"):
            if getattr(self, name) < 1:
                raise InputError(f"the limit {name} is {getattr(self, name)}: expected 1 or more")


class Piece(NamedTuple):
    """What one forward computes of one stream."""

    sequence: Sequence
    start: int
    """Where its region begins in the cache."""
    cached: int
    """How many positions before the new ones are in the cache; also the position of the first new one."""
    ids: list[int]
    wanted: int
    """How many of the new positions, counted from their end, are asked for."""
    target: Target


class Step(NamedTuple):
    """One forward: first the moves, in order, then all pieces at once."""

    pieces: tuple[Piece, ...]
    moves: tuple[Move, ...]


class Scheduler:
    """Chooses the next forward.

    Args:
        slots: the cache, which must have room for one whole window.
        limits: how much at once.
    """

    def __init__(self, slots: Slots[Sequence], limits: Limits) -> None:
        self._slots = slots
        self._limits = limits
        self._waiting: dict[Sequence, None] = {}
        self._owed = 0
        self._arrivals = 0
        self._clock = 0
        self.evictions = 0
        """How many caches were dropped to make room."""
        self.recomputed = 0
        """How many positions were computed that had been computed before: evicted streams, and overlaps of windows."""

    @property
    def waiting(self) -> int:
        """How many streams wait."""
        return len(self._waiting)

    @property
    def waiting_tokens(self) -> int:
        """How many positions must be computed for them."""
        return self._owed

    def submit(
        self, sequence: Sequence, ids: Ids[int], target: Target, *, last_only: bool = False, urgent: bool = False
    ) -> None:
        """Accept more tokens of a stream that does not wait, and compute them with those that it has already.

        Args:
            sequence: the stream.
            ids: at least one token.
            target: whose heads are read.
            last_only: only the logits of the last token are asked for.
            urgent: accept them however much waits.

        Raises:
            GuardOverloaded: when too much waits; nothing was accepted.
        """
        assert len(ids), "nothing to compute"
        assert sequence not in self._waiting, "the stream waits already"
        assert not sequence.closed, "the stream is over"
        length = len(sequence.tokens)
        sequence.accept(ids, target, last_only=last_only)
        cost = sequence.work
        if not urgent and self._owed + cost > self._limits.waiting:
            sequence.retract(length)
            raise GuardOverloaded(f"{self._owed} tokens wait already, and {self._limits.waiting} is the most")
        self._arrivals += 1
        sequence.arrived, sequence.served, sequence.owed = self._arrivals, self._clock, cost
        self._waiting[sequence] = None
        self._owed += cost
        self._slots.wake(sequence)

    def next(self) -> Step:
        """Choose the next forward. Without pieces only when nothing waits."""
        self._clock += 1
        budget = self._limits.tokens
        chosen: dict[Sequence, int] = {}
        moves: list[Move] = []
        for sequence in sorted(self._waiting, key=self._rank):
            if not budget:
                break
            sequence.begin()
            count = min(sequence.ready, self._limits.chunk, budget)
            made = self._make_room(sequence, count, chosen)
            if made is not None:
                moves += made
                chosen[sequence] = count
                budget -= count
        return Step(tuple(self._piece(sequence, count) for sequence, count in chosen.items()), tuple(moves))

    def finish(self, step: Step) -> list[Sequence]:
        """A step was computed; returns the streams that wait for nothing more."""
        finished = []
        for piece in step.pieces:
            sequence = piece.sequence
            if sequence.closed:
                continue
            before = sequence.done
            sequence.advance(len(piece.ids))
            self.recomputed += len(piece.ids) - (sequence.done - before)
            self._owe(sequence, -len(piece.ids))
            sequence.served = self._clock
            if not sequence.waiting:
                del self._waiting[sequence]
                self._slots.rest(sequence)
                finished.append(sequence)
        return finished

    def remove(self, sequence: Sequence) -> None:
        """A stream is over: what it has is free at once. Safe to call twice, and while a step with it is computed."""
        sequence.closed = True
        self._slots.free(sequence)
        if sequence in self._waiting:
            del self._waiting[sequence]
            self._owe(sequence, -sequence.owed)
        sequence.cached = 0

    def crop(self, sequence: Sequence, length: int) -> None:
        """Forget the tokens of a stream, which does not wait, from a number on."""
        assert sequence not in self._waiting
        sequence.crop(length)
        self._slots.shrink(sequence, sequence.cached)

    def forget(self) -> None:
        """The content of the cache is lost: everything is computed again when it is needed."""
        for sequence in list(self._waiting):
            self._evict(sequence)
        while (idle := self._slots.evict()) is not None:
            idle.cached = 0
            self.evictions += 1

    def check(self) -> None:
        """Raises AssertionError when the books are wrong."""
        self._slots.check()
        assert self._owed == sum(sequence.owed for sequence in self._waiting), "the sum of what is owed is wrong"
        for sequence in self._waiting:
            assert sequence.waiting, "a stream waits for nothing"
            assert not sequence.closed, "a stream that is over waits"
            assert sequence.owed == sequence.work, "a stream owes something else than its work"
            assert sequence.cached <= self._slots.length(sequence), "more is cached than there is room for"

    def _rank(self, sequence: Sequence) -> tuple[bool, bool, int]:
        patient = self._clock - sequence.served <= self._limits.patience
        return patient, patient and sequence.owed > self._limits.short, sequence.arrived

    def _piece(self, sequence: Sequence, count: int) -> Piece:
        start, wanted = self._slots.start(sequence), sequence.answers(count)
        return Piece(sequence, start, sequence.cached, sequence.ids(count), wanted, sequence.target)

    def _make_room(self, sequence: Sequence, count: int, chosen: dict[Sequence, int]) -> list[Move] | None:
        """Room for the next positions of a stream; of those that wait only younger ones make way."""
        length = sequence.cached + count
        missing = length - self._slots.available(sequence)
        if missing > 0 and not self._make_way(sequence, missing, chosen):
            return None
        grant = self._slots.reserve(sequence, length, sequence.cached)
        assert grant is not None, "the room that was made is not there"
        for idle in grant.evicted:
            idle.cached = 0
        self.evictions += len(grant.evicted)
        return list(grant.moves)

    def _make_way(self, sequence: Sequence, missing: int, chosen: dict[Sequence, int]) -> bool:
        younger = [other for other in self._waiting if other.arrived > sequence.arrived and other not in chosen]
        if missing > sum(self._slots.length(other) for other in younger):
            return False
        for other in sorted(younger, key=lambda other: -other.arrived):
            if missing <= 0:
                break
            missing -= self._slots.length(other)
            self._evict(other)
        return True

    def _evict(self, sequence: Sequence) -> None:
        """Drop the cache of a stream that waits."""
        if not self._slots.length(sequence):
            return
        self._slots.free(sequence)
        sequence.cached = 0
        self._owe(sequence, sequence.work - sequence.owed)
        self.evictions += 1

    def _owe(self, sequence: Sequence, change: int) -> None:
        sequence.owed += change
        self._owed += change
