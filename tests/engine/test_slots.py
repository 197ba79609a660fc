"""Who owns which positions of the cache: none twice, and nobody's content lost by growing, moving or evicting."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tidegate.engine.slots import Grant, Move, Slots

POSITIONS = 200
MOST = 120


def copy(memory: list[object], moves: tuple[Move, ...]) -> None:
    for source, target, length in moves:
        memory[target : target + length] = memory[source : source + length]


class SlotsMachine(RuleBasedStateMachine):
    """Owners grow, shrink, rest and leave; the memory is a list in which each writes its name and position."""

    def __init__(self) -> None:
        super().__init__()
        self.slots: Slots[int] = Slots(POSITIONS, MOST)
        self.memory: list[object] = [None] * POSITIONS
        self.held: dict[int, int] = {}
        self.idle: list[int] = []

    @rule(more=st.lists(st.integers(0, 40), min_size=6, max_size=6))
    def grow_all(self, more: list[int]) -> None:
        for owner, count in enumerate(more):
            self.grow(owner, count)

    @rule(owner=st.integers(0, 5), more=st.integers(0, 60))
    def grow(self, owner: int, more: int) -> None:
        held = self.held.get(owner, 0)
        length = min(MOST, held + more)
        busy = sum(n for other, n in self.held.items() if other != owner and other not in self.idle)
        grant = self.slots.reserve(owner, length, held)
        if grant is None:
            assert length > POSITIONS - busy
            return
        assert length <= POSITIONS - busy
        idle = [other for other in self.idle if other != owner]
        assert list(grant.evicted) == idle[: len(grant.evicted)], "not the one that was idle longest"
        self.idle = idle[len(grant.evicted) :]
        for evicted in grant.evicted:
            del self.held[evicted]
        copy(self.memory, grant.moves)
        start = self.slots.start(owner)
        self.memory[start + held : start + length] = [(owner, n) for n in range(held, length)]
        self.held[owner] = length

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def rest(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(sorted(self.held)))
        self.slots.rest(owner)
        self.idle = [other for other in self.idle if other != owner] + [owner]

    @precondition(lambda self: self.held)
    @rule(data=st.data(), length=st.integers(0, MOST))
    def shrink(self, data: st.DataObject, length: int) -> None:
        owner = data.draw(st.sampled_from(sorted(self.held)))
        self.slots.shrink(owner, length)
        self.held[owner] = min(self.held[owner], length)

    @rule(owner=st.integers(0, 5))
    def free(self, owner: int) -> None:
        self.slots.free(owner)
        self.held.pop(owner, None)
        self.idle = [other for other in self.idle if other != owner]

    @rule()
    def evict(self) -> None:
        expected = self.idle.pop(0) if self.idle else None
        assert self.slots.evict() == expected
        self.held.pop(expected, None) if expected is not None else None

    @invariant()
    def nothing_is_lost(self) -> None:
        self.slots.check()
        assert self.slots.used == sum(self.held.values())
        assert self.slots.owners == len(self.held)
        for owner, length in self.held.items():
            start = self.slots.start(owner)
            assert self.slots.length(owner) == length
            assert self.memory[start : start + length] == [(owner, n) for n in range(length)]


TestSlots = SlotsMachine.TestCase
TestSlots.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_a_region_grows_in_place_while_it_has_headroom() -> None:
    slots: Slots[str] = Slots(1000, 500)
    slots.reserve("a", 10, 0)
    slots.reserve("b", 10, 0)
    for length in range(11, 43):
        assert slots.reserve("a", length, length - 1) == Grant((), ())


def test_free_positions_are_shared_out_when_no_hole_is_large_enough() -> None:
    slots: Slots[str] = Slots(100, 100)
    for owner in "abcd":
        slots.reserve(owner, 20, 0)
    for owner in "ad":
        slots.free(owner)
    grant = slots.reserve("b", 60, 20)
    assert grant is not None
    assert [move.length for move in grant.moves] == [20, 20]
    assert grant.evicted == ()
    assert slots.reserved == 100
    slots.check()


def test_who_is_in_use_is_never_evicted() -> None:
    slots: Slots[str] = Slots(100, 100)
    slots.reserve("a", 60, 0)
    assert slots.reserve("b", 41, 0) is None
    slots.rest("a")
    assert slots.reserve("b", 41, 0) == Grant((), ("a",))


def test_an_idle_owner_goes_before_everything_is_copied_for_a_few_positions() -> None:
    slots: Slots[str] = Slots(320, 320)
    for owner in "abc":
        slots.reserve(owner, 100, 0)
    slots.rest("c")
    grant = slots.reserve("a", 115, 100)
    assert grant is not None
    assert grant.evicted == ("c",)


def test_who_wakes_is_kept() -> None:
    slots: Slots[str] = Slots(100, 100)
    slots.reserve("a", 60, 0)
    slots.rest("a")
    slots.wake("a")
    assert slots.reserve("b", 41, 0) is None


def test_the_books_are_checked() -> None:
    """`check` finds what it is there to find."""
    slots: Slots[str] = Slots(100, 100)
    slots.reserve("a", 10, 0)
    slots.reserve("b", 10, 0)
    slots._regions["b"].start = 5
    with pytest.raises(AssertionError, match="overlap"):
        slots.check()
