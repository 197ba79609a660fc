"""Which forward comes next: every token once and in order, within the budget, nobody starves, memory bounded."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Ids

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tidegate.engine.scheduler import Limits, Piece, Scheduler, Step
from tidegate.engine.sequence import Sequence, Windows
from tidegate.engine.slots import Slots
from tidegate.errors import GuardOverloaded, InputError
from tidegate.types import Target

WINDOW = 40
POSITIONS = 64
LIMITS = Limits(tokens=24, chunk=16, short=6, patience=2, waiting=300)


class Memory:
    """A cache and a model that are obviously right: a position holds the ids up to it, and the answer is that tuple."""

    def __init__(self, positions: int) -> None:
        self.cells: list[tuple[int, ...] | None] = [None] * positions

    def run(self, step: Step) -> list[list[tuple[int, ...]]]:
        for source, target, length in step.moves:
            self.cells[target : target + length] = self.cells[source : source + length]
        return [self._piece(piece) for piece in step.pieces]

    def _piece(self, piece: Piece) -> list[tuple[int, ...]]:
        before: tuple[int, ...] = ()
        for position in range(piece.cached):
            cell = self.cells[piece.start + position]
            assert cell is not None
            assert cell[:-1] == before, "the cache holds something else than the positions before"
            before = cell
        for position, token in enumerate(piece.ids, start=piece.start + piece.cached):
            before = (*before, token)
            self.cells[position] = before
        stop = piece.start + piece.cached + len(piece.ids)
        return [cell for cell in self.cells[stop - piece.wanted : stop] if cell is not None]


def expected(windows: Windows, tokens: Ids[int], index: int) -> tuple[int, ...]:
    """What a model sees at a token, by the definition of windows."""
    if index < windows.size:
        return tuple(tokens[: index + 1])
    first = windows.size + (index - windows.size) // windows.later * windows.later
    seen = first - windows.overlap
    before = list(tokens[: min(windows.keep, seen)])
    half = windows.header // 2
    header = before if len(before) <= windows.header else before[:half] + before[half - windows.header :]
    return (*header, *tokens[seen : index + 1])


class SchedulerMachine(RuleBasedStateMachine):
    """Streams speak, roll back and leave in any order while steps are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.slots: Slots[Sequence] = Slots(POSITIONS, WINDOW)
        self.scheduler = Scheduler(self.slots, LIMITS)
        self.memory = Memory(POSITIONS)
        self.open: list[Sequence] = []
        self.asked: dict[Sequence, list[int]] = {}
        self.answers: dict[Sequence, list[tuple[int, ...]]] = {}
        self.under_way: Step | None = None
        self.next_id = 0
        self.deadline: dict[Sequence, int] = {}
        self.steps = 0

    @initialize()
    def many(self) -> None:
        for _ in range(6):
            self.begin(3, 10)

    @rule(keep=st.integers(0, 50), overlap=st.integers(0, WINDOW // 2))
    def begin(self, keep: int, overlap: int) -> None:
        if len(self.open) < 9:
            prefix = range(self.next_id, self.next_id + keep // 2)
            self.next_id += keep // 2
            self.open.append(Sequence(Windows(WINDOW, overlap, keep), array("i", prefix)))

    def _idle(self) -> list[Sequence]:
        return [sequence for sequence in self.open if sequence not in self.asked]

    @precondition(lambda self: self._idle())
    @rule(data=st.data(), count=st.integers(1, 70), last_only=st.booleans(), urgent=st.booleans())
    def submit(self, data: st.DataObject, count: int, last_only: bool, urgent: bool) -> None:
        self._submit(data.draw(st.sampled_from(self._idle())), count, last_only=last_only, urgent=urgent)

    def _submit(self, sequence: Sequence, count: int, *, last_only: bool, urgent: bool) -> None:
        ids = list(range(self.next_id, self.next_id + count))
        before = self.scheduler.waiting_tokens
        length = len(sequence.tokens)
        try:
            self.scheduler.submit(sequence, ids, Target.RESPONSE, last_only=last_only, urgent=urgent)
        except GuardOverloaded:
            assert not urgent
            assert len(sequence.tokens) == length
            assert self.scheduler.waiting_tokens == before
            return
        assert urgent or self.scheduler.waiting_tokens <= LIMITS.waiting
        self.next_id += count
        stop = length + count
        self.asked[sequence] = [stop - 1] if last_only else list(range(length, stop))
        self.answers[sequence] = []
        self.deadline[sequence] = self._bound(sequence)

    def _bound(self, sequence: Sequence) -> int:
        """In which step it must be complete at the latest: those that came before need their turns, from nothing."""
        turns = sum(self._turns(other) for other in self.open if other in self.asked)
        return self.steps + (LIMITS.patience + 1) * turns + 1

    def _turns(self, sequence: Sequence) -> int:
        """How often it must be served if nothing of it is cached."""
        windows, stop = sequence.windows, len(sequence.tokens)
        numbers = range(windows.number(sequence.done), windows.number(stop - 1) + 1)
        lengths = [windows.position(number, min(stop, windows.stop(number))) for number in numbers]
        return sum(-(-length // LIMITS.chunk) for length in lengths)

    @precondition(lambda self: self.under_way is None)
    @rule()
    def choose(self) -> None:
        waits = self.scheduler.waiting
        step = self.scheduler.next()
        assert bool(step.pieces) == bool(waits), "work waits and nothing is computed"
        assert sum(len(piece.ids) for piece in step.pieces) <= LIMITS.tokens
        assert all(0 < len(piece.ids) <= LIMITS.chunk for piece in step.pieces)
        assert len({id(piece.sequence) for piece in step.pieces}) == len(step.pieces)
        self.under_way = step

    @precondition(lambda self: self.under_way is not None)
    @rule()
    def compute(self) -> None:
        step, self.under_way = self.under_way, None
        assert step is not None
        for piece, answers in zip(step.pieces, self.memory.run(step), strict=True):
            if not piece.sequence.closed:
                self.answers[piece.sequence] += answers
        self.steps += 1
        assert all(self.steps <= deadline for deadline in self.deadline.values()), "somebody starves"
        for sequence in self.scheduler.finish(step):
            windows = sequence.windows
            assert self.answers.pop(sequence) == [
                expected(windows, sequence.tokens, index) for index in self.asked.pop(sequence)
            ]
            del self.deadline[sequence]

    @precondition(lambda self: self.under_way is None)
    @rule(steps=st.integers(1, 60), count=st.integers(1, LIMITS.short))
    def flood(self, steps: int, count: int) -> None:
        """Whoever is idle speaks again at once, for some steps."""
        for _ in range(steps):
            for sequence in self._idle():
                self._submit(sequence, count, last_only=True, urgent=True)
            self.choose()
            self.compute()

    @precondition(lambda self: self._idle())
    @rule(data=st.data(), share=st.floats(0, 1))
    def crop(self, data: st.DataObject, share: float) -> None:
        sequence = data.draw(st.sampled_from(self._idle()))
        self.scheduler.crop(sequence, int(len(sequence.tokens) * share))

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.open))
        self.open.remove(sequence)
        self.deadline.pop(sequence, None)
        self.asked.pop(sequence, None)
        before = self.slots.used - self.slots.length(sequence)
        self.scheduler.remove(sequence)
        assert self.slots.used == before, "what is removed is not free at once"

    @precondition(lambda self: self.under_way is None)
    @rule()
    def forget(self) -> None:
        self.scheduler.forget()
        assert self.slots.used == 0
        self.memory.cells = [None] * POSITIONS
        self.deadline = {sequence: self._bound(sequence) for sequence in self.asked}

    @invariant()
    def books_are_right(self) -> None:
        self.scheduler.check()
        assert self.scheduler.waiting == sum(sequence in self.asked for sequence in self.open)

    def teardown(self) -> None:
        if self.under_way:
            self.compute()
        for _ in range(10_000):
            if not self.scheduler.waiting:
                return
            self.choose()
            self.compute()
            self.scheduler.check()
        raise AssertionError("the work never ends")


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)


def scheduler(**limits: int) -> Scheduler:
    return Scheduler(Slots(1000, 500), Limits(**limits))


def stream(scheduler: Scheduler, count: int) -> Sequence:
    sequence = Sequence(Windows(500, 50))
    scheduler.submit(sequence, [7] * count, Target.RESPONSE)
    return sequence


def test_live_streams_go_before_prompts_and_prompts_take_what_is_left() -> None:
    books = scheduler(tokens=64, chunk=48, short=8)
    prompt, *live = [stream(books, count) for count in (300, 1, 5, 8)]
    step = books.next()
    assert [piece.sequence for piece in step.pieces] == [*live, prompt]
    assert [len(piece.ids) for piece in step.pieces] == [1, 5, 8, 48]


def test_a_prompt_is_served_although_live_streams_fill_every_forward() -> None:
    books = scheduler(tokens=16, chunk=16, short=8, patience=3)
    prompt = stream(books, 64)
    live = [stream(books, 8) for _ in range(2)]
    steps = 0
    while prompt.waiting:
        books.finish(books.next())
        steps += 1
        for sequence in live:
            if not sequence.waiting:
                books.submit(sequence, [1] * 8, Target.RESPONSE)
        assert steps < 50
    assert steps == 16


def test_an_idle_stream_whose_cache_was_evicted_is_computed_again() -> None:
    books = Scheduler(Slots(64, 50), Limits())
    first, second = Sequence(Windows(50, 5)), Sequence(Windows(50, 5))
    for sequence in (first, second, first):
        books.submit(sequence, [3] * 20, Target.RESPONSE)
        while sequence.waiting:
            books.finish(books.next())
    assert books.recomputed == 0
    books.submit(second, [3] * 20, Target.RESPONSE)
    step = books.next()
    assert books.evictions == 1
    assert first.cached == 0
    books.finish(step)
    books.submit(first, [3], Target.RESPONSE)
    assert books.waiting_tokens == 41
    (piece,) = books.next().pieces
    assert (piece.cached, len(piece.ids), piece.wanted) == (0, 41, 1)


def test_too_much_waiting_is_refused_and_nothing_is_accepted() -> None:
    books = scheduler(waiting=100)
    stream(books, 80)
    late = Sequence(Windows(500, 50))
    with pytest.raises(GuardOverloaded, match="80 tokens wait"):
        books.submit(late, [1] * 21, Target.RESPONSE)
    assert not late.tokens
    books.submit(late, [1] * 20, Target.RESPONSE)
    assert books.waiting_tokens == 100


@given(st.integers(4, 60), st.integers(0, 30), st.integers(0, 100), st.integers(1, 300), st.data())
def test_every_window_holds_what_its_definition_says(
    size: int, overlap: int, keep: int, count: int, data: st.DataObject
) -> None:
    windows = Windows(size, min(overlap, size // 2), keep)
    tokens = array("i", range(count))
    index = data.draw(st.integers(0, count - 1))
    number = windows.number(index)
    ids = windows.ids(tokens, number, 0, windows.position(number, index) + 1)
    assert tuple(ids) == expected(windows, tokens, index)
    assert len(ids) <= size
    assert len(set(ids)) == len(ids), "a token stands twice in a window"
    cut = data.draw(st.integers(0, len(ids)))
    assert windows.ids(tokens, number, 0, cut) + windows.ids(tokens, number, cut, len(ids)) == ids
    assert windows.later >= size // 4


@pytest.mark.parametrize(("size", "overlap"), [(3, 0), (40, 21), (40, -1)])
def test_a_window_leaves_room_for_what_is_new(size: int, overlap: int) -> None:
    with pytest.raises(InputError):
        Windows(size, overlap)


def test_limits_are_positive() -> None:
    with pytest.raises(InputError, match="chunk"):
        Limits(chunk=0)
