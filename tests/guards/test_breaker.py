"""A breaker opens after failures in a row, rests, tries, and closes."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.errors import GuardUnavailable
from tidegate.guards.breaker import Breaker, BreakerOptions, State


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def made(**options: float) -> tuple[Breaker, Clock, list[State]]:
    clock, told = Clock(), list[State]()
    return Breaker(BreakerOptions(**options), clock=clock, tell=told.append), clock, told  # type: ignore[arg-type]


def refused(breaker: Breaker) -> bool:
    try:
        breaker.call().given_up()
    except GuardUnavailable:
        return True
    return False


def fail(breaker: Breaker, times: int = 1) -> None:
    for _ in range(times):
        breaker.call().failed()


def test_failures_in_a_row_open_it_and_a_success_between_them_does_not() -> None:
    breaker, _, told = made(failures=3)
    fail(breaker, 2)
    breaker.call().went_well()
    fail(breaker, 2)
    assert (breaker.state, told) == ("closed", [])

    fail(breaker)

    assert (breaker.state, told) == ("open", ["open"])
    with pytest.raises(GuardUnavailable, match="left alone"):
        breaker.call()


def test_after_its_rest_one_probe_goes_through_at_a_time() -> None:
    breaker, clock, told = made(failures=1, rest_s=5)
    fail(breaker)
    clock.now += 4.999
    assert refused(breaker)
    clock.now += 0.001

    probe = breaker.call()

    assert breaker.state == "half_open"
    assert refused(breaker)
    probe.went_well()
    assert (breaker.state, told) == ("closed", ["open", "half_open", "closed"])
    assert not refused(breaker)


def test_a_probe_that_fails_opens_it_again_for_twice_as_long() -> None:
    breaker, clock, _ = made(failures=1, rest_s=5, most_rest_s=15)
    fail(breaker)
    for rest in (10.0, 15.0, 15.0):
        clock.now += 1000
        fail(breaker)
        assert breaker.state == "open"
        clock.now += rest - 0.01
        assert refused(breaker)
        clock.now += 0.01
        assert not refused(breaker)
    breaker.call().went_well()
    fail(breaker)
    clock.now += 5
    assert not refused(breaker)  # the rest is the first one again


def test_a_probe_that_was_given_up_makes_room_for_another() -> None:
    breaker, clock, _ = made(failures=1)
    fail(breaker)
    clock.now += 5
    breaker.call().given_up()

    assert breaker.state == "half_open"
    breaker.call().went_well()
    assert breaker.state == "closed"


def test_several_probes_can_be_asked_for() -> None:
    breaker, clock, _ = made(failures=1, probes=2)
    fail(breaker)
    clock.now += 5
    breaker.call().went_well()
    assert breaker.state == "half_open"
    breaker.call().went_well()
    assert breaker.state == "closed"


def test_results_that_come_late_say_nothing_any_more() -> None:
    breaker, clock, _ = made(failures=1, rest_s=5)
    early, other, third = breaker.call(), breaker.call(), breaker.call()
    early.failed()
    other.went_well()
    assert breaker.state == "open"
    clock.now += 5
    probe = breaker.call()
    third.failed()
    assert breaker.state == "half_open"
    assert refused(breaker)
    probe.went_well()
    assert breaker.state == "closed"


def test_the_first_thing_said_of_a_call_counts() -> None:
    breaker, _, _ = made(failures=2)
    call = breaker.call()
    call.failed()
    call.failed()
    call.went_well()

    fail(breaker)
    assert breaker.state == "open"


@pytest.mark.parametrize("options", [{"failures": 0}, {"probes": 0}, {"rest_s": 0}, {"rest_s": 9, "most_rest_s": 8}])
def test_options_out_of_range_are_an_error(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="breaker"):
        BreakerOptions(**options)  # type: ignore[arg-type]


steps = st.lists(st.sampled_from(["call", "well", "fail", "give up"]) | st.floats(0.1, 30), min_size=1, max_size=60)


@given(steps, st.integers(1, 3), st.integers(1, 2))
def test_it_never_shuts_for_good_and_lets_no_second_probe_through(
    course: list[str | float], failures: int, probes: int
) -> None:
    breaker, clock, told = made(failures=failures, probes=probes, rest_s=2, most_rest_s=8)
    under_way = []
    probing = None
    for step in course:
        if isinstance(step, float):
            clock.now += step
        elif step == "call":
            try:
                call = breaker.call()
            except GuardUnavailable:
                assert breaker.state != "closed"
                continue
            under_way.append(call)
            if breaker.state == "half_open":
                assert probing is None
                probing = call
        elif under_way:
            call = under_way.pop()
            {"well": call.went_well, "fail": call.failed, "give up": call.given_up}[step]()
        if probing not in under_way:
            probing = None
    assert all(before != after for before, after in itertools.pairwise(told))
    for call in under_way:
        call.given_up()
    clock.now += 8
    for _ in range(probes):
        breaker.call().went_well()
    assert breaker.state == "closed"
