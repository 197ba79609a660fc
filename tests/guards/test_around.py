"""Guards around a guard: nothing that the one inside can do gets lost on the way."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from id_guard import IdGuard
from tidegate.gateway.telemetry import Telemetry, TimedGuard
from tidegate.guards.base import IdGuard as TakesIds
from tidegate.guards.base import StreamGuard, judges_together
from tidegate.guards.callers import CallersGuard
from tidegate.guards.remembered import Memory, RememberedGuard
from tidegate.guards.resilient import ResilientGuard
from tidegate.guards.terms import Terms, on_terms
from tidegate.testing import FakeStreamGuard


class Able(IdGuard):
    """Takes ids, and judges reasoning together with what follows it."""

    together = True


AROUND: dict[str, Callable[[StreamGuard], StreamGuard]] = {
    "callers": CallersGuard,
    "timed": lambda guard: TimedGuard(guard, Telemetry()),
    "remembered": lambda guard: RememberedGuard(guard, Memory(b"k" * 32)),
    "resilient": ResilientGuard,
    "all": lambda guard: ResilientGuard(
        RememberedGuard(TimedGuard(CallersGuard(guard), Telemetry()), Memory(b"k" * 32))
    ),
}
around = pytest.mark.parametrize("wrap", AROUND.values(), ids=AROUND)


@around
@pytest.mark.parametrize("terms", [Terms(), Terms(instructions="Judge for readers in region IN.")])
async def test_what_the_guard_inside_can_do_is_known_outside(
    wrap: Callable[[StreamGuard], StreamGuard], terms: Terms
) -> None:
    inner = Able()
    guard = on_terms(wrap(inner), terms)

    assert guard.name == inner.name
    assert judges_together(guard)
    assert isinstance(guard, TakesIds)
    assert guard.takes_ids
    assert (await guard.id_text()).decode([104, 105]) == "hi"


@around
async def test_nothing_is_known_outside_that_the_guard_inside_cannot_do(
    wrap: Callable[[StreamGuard], StreamGuard],
) -> None:
    guard = wrap(FakeStreamGuard())

    assert not judges_together(guard)
    assert not (isinstance(guard, TakesIds) and guard.takes_ids)
