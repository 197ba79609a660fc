"""A guard with a deadline, a breaker and a stand-in: every way to fail, and what becomes of it."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from id_guard import IdGuard
from tidegate.errors import (
    GuardError,
    GuardOverloaded,
    GuardTimeout,
    GuardUnavailable,
    InputError,
    SessionClosed,
    UnreadableVerdict,
)
from tidegate.guards.base import StreamGuard
from tidegate.guards.breaker import Breaker, BreakerOptions
from tidegate.guards.resilient import ResilientGuard
from tidegate.guards.terms import Terms, on_terms
from tidegate.testing import FakeGuard, FakeStreamGuard
from tidegate.types import Conversation, Severity, TokenVerdict

DEGRADED = Terms(degraded=True)
ERRORS: list[Exception] = [
    GuardUnavailable("away"),
    GuardOverloaded("full"),
    GuardTimeout("late"),
    UnreadableVerdict("what?"),
    GuardError("no"),
    InputError("not so"),
    RuntimeError("broken"),
    MemoryError(),
    TimeoutError(),
]


class Breaking(FakeStreamGuard):
    """Raises any exception at the failing word, ours or not."""

    def __init__(self, raised: Exception = GuardUnavailable("away"), **options: Any) -> None:  # noqa: B008 - a value
        super().__init__(**options)
        self.raised = raised

    async def trouble_at(self, word: str) -> None:
        if word == self.failing:
            raise self.raised
        await super().trouble_at(word)


def fallback() -> FakeStreamGuard:
    return FakeStreamGuard(failing="", hanging="", name="small/1")


def said(guard: StreamGuard, text: str) -> Any:
    return guard.judge(Conversation.of(text))


# --- whole texts --------------------------------------------------------------------------------------------------


async def test_a_guard_that_works_is_not_changed() -> None:
    told: list[str] = []
    guard = ResilientGuard(
        FakeStreamGuard(), fallback=fallback(), breaker=Breaker(), deadline_s=60, tell_degraded=told.append
    )

    for text in ("hello", "a bomb"):
        assert await said(guard.on_terms(DEGRADED), text) == await said(FakeStreamGuard(), text)
    assert (guard.name, told) == ("fake/1", [])


@pytest.mark.parametrize("error", ERRORS, ids=repr)
async def test_a_failure_is_a_failure_unless_the_terms_have_a_stand_in(error: Exception) -> None:
    told: list[str] = []
    guard = ResilientGuard(Breaking(error), fallback=fallback(), tell_degraded=told.append)
    kind = "GuardTimeout" if isinstance(error, TimeoutError) else type(error).__name__

    with pytest.raises(GuardTimeout if isinstance(error, TimeoutError) else type(error)):
        await said(guard, "guardfail")
    assert told == []

    verdict = await said(guard.on_terms(DEGRADED), "guardfail bomb")
    assert verdict.severity is Severity.UNSAFE
    assert verdict.guard == f"degraded[small/1; fake/1 {kind}]"
    assert told == [kind]


async def test_a_guard_that_hangs_is_given_up_at_its_deadline() -> None:
    guard = ResilientGuard(FakeStreamGuard(), fallback=fallback(), deadline_s=0.01)

    with pytest.raises(GuardTimeout, match="did not answer in time"):
        await said(guard, "guardhang")
    verdict = await said(guard.on_terms(DEGRADED), "guardhang")
    assert verdict.guard == "degraded[small/1; fake/1 GuardTimeout]"


async def test_terms_make_a_deadline_shorter_and_never_longer() -> None:
    guard = ResilientGuard(FakeStreamGuard(), deadline_s=60)
    assert guard.on_terms(Terms(deadline_s=100)).deadline_s == 60
    assert guard.on_terms(Terms(deadline_s=0.01)).deadline_s == 0.01
    assert ResilientGuard(FakeStreamGuard()).on_terms(Terms(deadline_s=5)).deadline_s == 5

    with pytest.raises(GuardTimeout):
        await said(guard.on_terms(Terms(deadline_s=0.01)), "guardhang")


async def test_without_a_fallback_degraded_mode_is_a_failure_too() -> None:
    with pytest.raises(GuardUnavailable):
        await said(ResilientGuard(FakeStreamGuard()).on_terms(DEGRADED), "guardfail")


@pytest.mark.parametrize("word", ["guardfail", "guardhang"])
async def test_when_both_fail_the_error_is_the_guards_own(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tidegate.guards.resilient.FALLBACK_DEADLINE_S", 0.01)
    other = FakeStreamGuard(failing=word if word == "guardfail" else "", hanging="guardhang")
    guard = ResilientGuard(Breaking(UnreadableVerdict("what?"), failing=word), fallback=other).on_terms(DEGRADED)

    with pytest.raises(UnreadableVerdict):
        await said(guard, word)


async def test_who_gives_up_cancels_and_nobody_stands_in() -> None:
    told: list[str] = []
    breaker = Breaker(BreakerOptions(failures=1))
    guard = ResilientGuard(FakeStreamGuard(), fallback=fallback(), breaker=breaker, tell_degraded=told.append)

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await said(guard.on_terms(DEGRADED), "guardhang")
    assert (told, breaker.state) == ([], "closed")


async def test_closing_closes_both() -> None:
    first, second = FakeStreamGuard(), fallback()
    await ResilientGuard(first, fallback=second).close()
    assert first.closed
    assert second.closed


# --- the breaker --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", ERRORS, ids=repr)
async def test_only_what_says_that_the_guard_is_down_opens_the_breaker(error: Exception) -> None:
    """Else whoever writes the text could shut the guard for everybody."""
    breaker = Breaker(BreakerOptions(failures=2))
    guard = ResilientGuard(Breaking(error), breaker=breaker)
    for _ in range(5):
        with pytest.raises(Exception):  # noqa: B017 - any of them
            await said(guard, "guardfail")

    down = isinstance(error, GuardUnavailable | GuardTimeout | RuntimeError | MemoryError | TimeoutError)
    assert (breaker.state == "open") is down


async def test_a_guard_that_is_left_alone_is_not_asked_and_the_stand_in_judges() -> None:
    clock = [0.0]
    breaker = Breaker(BreakerOptions(failures=2, rest_s=5), clock=lambda: clock[0])
    inner = FakeStreamGuard()
    guard = ResilientGuard(inner, fallback=fallback(), breaker=breaker)
    for _ in range(2):
        with pytest.raises(GuardUnavailable):
            await said(guard, "guardfail")
    asked = len(inner.judged)

    with pytest.raises(GuardUnavailable, match="left alone"):
        await said(guard, "hello")
    verdict = await said(guard.on_terms(DEGRADED), "bomb")
    assert (verdict.severity, verdict.guard) == (Severity.UNSAFE, "degraded[small/1; fake/1 GuardUnavailable]")
    assert len(inner.judged) == asked

    clock[0] = 5.0
    assert (await said(guard.on_terms(DEGRADED), "hello")).guard == "fake/1"
    assert breaker.state == "closed"


async def test_a_stream_asks_the_breaker_once_and_is_not_cut_because_others_failed() -> None:
    breaker = Breaker(BreakerOptions(failures=1))
    guard = ResilientGuard(FakeStreamGuard(), breaker=breaker)
    open_before = guard.open(None)
    await open_before.feed("one ")
    with pytest.raises(GuardUnavailable):
        await said(guard, "guardfail")
    assert breaker.state == "open"

    assert len(await open_before.feed("two three ")) == 2
    await open_before.finish()
    with pytest.raises(GuardUnavailable, match="left alone"):
        await guard.open(None).feed("one ")


async def test_a_stream_that_fails_in_its_middle_counts() -> None:
    breaker = Breaker(BreakerOptions(failures=1))
    session = ResilientGuard(FakeStreamGuard(), breaker=breaker).open(None)
    await session.feed("one two ")
    with pytest.raises(GuardUnavailable):
        await session.feed("guardfail ")
    assert breaker.state == "open"


async def test_a_session_that_cannot_be_opened_is_no_reason_to_leave_the_guard_alone() -> None:
    breaker = Breaker(BreakerOptions(failures=1))
    guard = ResilientGuard(FakeStreamGuard(most_sessions=0), fallback=fallback(), breaker=breaker)
    with pytest.raises(GuardOverloaded):
        await guard.open(None).feed("one")
    session = guard.on_terms(DEGRADED).open(None)
    assert await session.feed("one two ")
    assert (session.signed, breaker.state) == ("degraded[small/1; fake/1 GuardOverloaded]", "closed")


# --- streams ------------------------------------------------------------------------------------------------------


async def watched(guard: StreamGuard, pieces: list[str]) -> list[TokenVerdict]:
    session = guard.open(None)
    tokens: list[TokenVerdict] = []
    for piece in pieces:
        tokens += await session.feed(piece)
    return [*tokens, *await session.finish()]


def no_gaps(tokens: list[TokenVerdict], length: int) -> bool:
    ends = [0, *(token.span.end for token in tokens)]
    starts = [token.span.start for token in tokens]
    return starts == ends[:-1] and ends[-1] == length


words = st.lists(st.sampled_from(["good", "bomb", "knife", "guardfail", "tea"]), max_size=8).map(" ".join)
cuts = st.lists(st.integers(0, 60), max_size=6)


@given(words, cuts, st.booleans(), st.sampled_from([0, 3]))
async def test_a_stream_that_changes_guards_is_judged_without_a_gap(
    text: str, places: list[int], end_token: bool, more: int
) -> None:
    borders = sorted({0, len(text), *(place for place in places if place < len(text))})
    pieces = [text[a:b] for a, b in itertools.pairwise(borders)]
    guard = ResilientGuard(
        FakeStreamGuard(sticky=bool(more), end_token=end_token),
        fallback=FakeStreamGuard(failing="", end_token=end_token, name="small/1"),
    ).on_terms(DEGRADED)

    tokens = await watched(guard, pieces)

    assert no_gaps(tokens, len(text))
    alone = await watched(FakeStreamGuard(failing="", end_token=end_token), pieces)
    if not more:
        assert [(t.span, t.severity) for t in tokens] == [(t.span, t.severity) for t in alone]


async def test_a_token_across_the_change_begins_where_the_guard_had_judged() -> None:
    class Letters(FakeStreamGuard):
        """One token for each letter, until it fails."""

        def open(self, context: Conversation | None, *_: Any, **__: Any) -> Any:
            return _Letters(self)

    class _Letters:
        def __init__(self, guard: FakeStreamGuard) -> None:
            self.guard, self.at = guard, 0

        async def feed(self, text: str) -> tuple[TokenVerdict, ...]:
            tokens = await watched(FakeStreamGuard(), list("x" * len(text)))
            if self.at:
                raise GuardUnavailable("away")
            self.at += len(text)
            one = tokens[0]
            return tuple(
                TokenVerdict(type(one.span)(i, i + 1), one.severity, one.probabilities) for i in range(len(text))
            )

        def close(self) -> None:
            pass

    guard = ResilientGuard(Letters(), fallback=fallback()).on_terms(DEGRADED)

    tokens = await watched(guard, ["abc", "def ghi"])

    assert [(t.span.start, t.span.end) for t in tokens] == [(0, 1), (1, 2), (2, 3), (3, 6), (6, 10)]


@pytest.mark.parametrize("word", ["guardfail", "guardhang"])
async def test_a_stream_that_fails_at_its_end_is_finished_by_the_stand_in(word: str) -> None:
    told: list[str] = []
    guard = ResilientGuard(FakeStreamGuard(), fallback=fallback(), deadline_s=0.01, tell_degraded=told.append).on_terms(
        DEGRADED
    )
    session = guard.open(None)
    tokens = [*await session.feed(f"one bomb {word}"), *await session.finish()]

    assert [token.severity for token in tokens] == [Severity.SAFE, Severity.UNSAFE, Severity.SAFE]
    assert len(told) == 1
    with pytest.raises(SessionClosed):
        await session.feed("more")


async def test_a_stream_whose_stand_in_fails_too_fails_with_the_guards_own_error() -> None:
    guard = ResilientGuard(Breaking(UnreadableVerdict("what?")), fallback=FakeStreamGuard(name="small/1")).on_terms(
        DEGRADED
    )
    session = guard.open(None)
    await session.feed("one ")

    with pytest.raises(UnreadableVerdict):
        await session.feed("guardfail ")
    with pytest.raises(SessionClosed):
        await session.finish()


async def test_a_stand_in_that_fails_later_is_a_failure_of_its_own() -> None:
    guard = ResilientGuard(FakeStreamGuard(), fallback=FakeStreamGuard(failing="worse", name="small/1")).on_terms(
        DEGRADED
    )
    session = guard.open(None)
    await session.feed("one guardfail ")

    with pytest.raises(GuardUnavailable):
        await session.feed("worse ")


async def test_closing_a_session_ends_the_guards_one_whoever_judges() -> None:
    first, second = FakeStreamGuard(), fallback()
    guard = ResilientGuard(first, fallback=second).on_terms(DEGRADED)
    session = guard.open(None)
    await session.feed("one ")
    assert first.open_sessions == 1
    await session.feed("guardfail ")
    assert (first.open_sessions, second.open_sessions) == (0, 1)
    session.close()
    assert second.open_sessions == 0


async def test_a_session_that_is_closed_while_the_guard_judges_does_not_go_on_with_the_stand_in() -> None:
    closed = asyncio.Event()
    told: list[str] = []

    class Failing(FakeStreamGuard):
        async def trouble_at(self, word: str) -> None:
            await closed.wait()
            raise GuardUnavailable("away")

    guard = ResilientGuard(Failing(), fallback=fallback(), tell_degraded=told.append)
    session = guard.on_terms(DEGRADED).open(None)
    feeding = asyncio.ensure_future(session.feed("one two "))
    await asyncio.sleep(0)
    session.close()
    closed.set()

    with pytest.raises(GuardError):
        await feeding
    assert told == []


async def test_the_text_of_a_stream_is_kept_only_where_a_stand_in_may_need_it() -> None:
    plain = ResilientGuard(FakeStreamGuard(), fallback=fallback()).open(None)
    await plain.feed("one ")

    assert plain._texts == []


# --- terms --------------------------------------------------------------------------------------------------------


def test_terms_reach_only_guards_that_heed_them() -> None:
    guard = FakeGuard()
    assert on_terms(guard, DEGRADED) is guard
    resilient = ResilientGuard(FakeStreamGuard())
    assert on_terms(resilient, Terms()) is resilient
    assert on_terms(resilient, DEGRADED).degraded


# --- ids ----------------------------------------------------------------------------------------------------------


async def test_the_fallback_is_given_the_text_that_the_ids_are() -> None:
    text = "some bread and crash then a knife for it"
    ids = [ord(letter) for letter in text]
    guard = on_terms(ResilientGuard(IdGuard(failing="crash"), fallback=fallback()), DEGRADED)
    alone = FakeStreamGuard().open(None)
    session = guard.open(None)

    assert guard.takes_ids
    tokens = [token for place in range(0, len(ids), 7) for token in await session.feed_ids(ids[place : place + 7])]
    tokens += await session.finish()

    assert tokens == [*await alone.feed(text), *await alone.finish()]
    assert session.signed == "degraded[small/1; fake/1 GuardUnavailable]"


async def test_a_guard_that_takes_text_only_says_so_also_behind_a_deadline() -> None:
    assert not ResilientGuard(FakeStreamGuard()).takes_ids
