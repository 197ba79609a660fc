"""What the store promises on both databases."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import threading
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from kept import TALK, Place, decision
from tidegate.errors import StoreError
from tidegate.store import Store
from tidegate.types import (
    CATEGORIES,
    Action,
    Advice,
    Channel,
    Conversation,
    Coverage,
    CoverageState,
    Decision,
    GuardFailure,
    Intervention,
    InterventionKind,
    Observed,
    Probabilities,
    Role,
    Scope,
    Severity,
    Span,
    Target,
    ToolCall,
    Turn,
    Verdict,
)

# --- what is kept comes back --------------------------------------------------------------------------------------

texts = st.text(st.characters(), max_size=30)  # with surrogates: clients can send them as JSON escapes
turns = st.builds(
    Turn,
    st.sampled_from(Role),
    texts,
    texts,
    st.lists(st.builds(ToolCall, texts, texts), max_size=2).map(tuple),
)
conversations = st.lists(turns, min_size=1, max_size=3).map(lambda found: Conversation(tuple(found)))
probabilities = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(
    lambda pair: Probabilities(1 - max(pair), max(pair) - min(pair), min(pair))
)
plain = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=20)
verdicts = st.builds(
    Verdict,
    st.sampled_from(Target),
    st.sampled_from(Severity),
    probabilities,
    st.lists(st.sampled_from(CATEGORIES), unique=True).map(tuple),
    st.dictionaries(st.sampled_from(CATEGORIES), st.floats(0, 1)),
    st.none() | st.booleans(),
    st.none() | texts,
    st.none() | st.builds(Span, st.integers(0, 9), st.integers(9, 99)),
    plain,
)
failures = st.builds(GuardFailure, plain, plain, plain)
observations = st.builds(
    Observed, st.sampled_from(Action), plain, st.lists(st.sampled_from(Advice), unique=True).map(tuple)
)
interventions = st.builds(
    Intervention, st.sampled_from(InterventionKind), plain, st.integers(1, 9), st.integers(0, 99), st.integers(0, 9)
)
scopes = st.builds(Scope, *[st.none() | texts] * 4)
coverages = st.builds(Coverage, texts, st.sampled_from(Channel), st.sampled_from(CoverageState), st.integers(0, 10_000))


@st.composite
def decisions(draw: st.DrawFn) -> Decision:
    outcome = draw(st.one_of(verdicts, failures))
    return Decision(
        draw(st.sampled_from(Action)),
        draw(plain),
        draw(plain),
        "0123456789ab",
        verdict=outcome if isinstance(outcome, Verdict) else None,
        failure=outcome if isinstance(outcome, GuardFailure) else None,
        scope=draw(scopes),
        coverage=tuple(draw(st.lists(coverages, max_size=3))),
        advice=tuple(draw(st.lists(st.sampled_from(Advice), unique=True))),
        observed=draw(st.none() | observations),
        interventions=tuple(draw(st.lists(interventions, max_size=2))),
        leaked=draw(st.integers(0, 99)),
    )


def test_what_is_kept_in_full_comes_back_equal(place: Place) -> None:
    with place.open() as store, asyncio.Runner() as runner:

        async def keep_and_read(given_decision: Decision, conversation: Conversation) -> None:
            kept = await store.decision(await store.keep(given_decision, conversation, retention="full"))
            assert kept is not None
            assert kept.decision == given_decision
            assert kept.conversation == conversation
            assert kept.fingerprint is None

        @settings(max_examples=100, deadline=None)
        @given(decisions(), conversations)
        def check(given_decision: Decision, conversation: Conversation) -> None:
            runner.run(keep_and_read(given_decision, conversation))

        check()


# --- append-only --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE decisions SET action = 'allow'",
        "UPDATE decisions SET subject = NULL",
        "DELETE FROM decisions",
        "INSERT INTO decisions SELECT * FROM decisions WHERE true ON CONFLICT (id) DO UPDATE SET action = 'allow'",
    ],
)
async def test_a_kept_decision_can_be_neither_changed_nor_deleted_nor_replaced(place: Place, statement: str) -> None:
    with place.open() as store:
        await store.keep(decision(Action.BLOCK), TALK, retention="full")

        with pytest.raises(sa.exc.IntegrityError, match=r"append-only|UNIQUE|unique"):
            place.run(statement)

        assert (await store.counts())[Action.BLOCK] == 1


async def test_in_postgresql_all_of_a_table_cannot_be_emptied_at_once(place: Place) -> None:
    if not place.in_postgresql:
        pytest.skip("SQLite has no TRUNCATE")
    with place.open() as store:
        await store.keep(decision(Action.BLOCK), TALK, retention="full")
        for table in ("decisions", "deletions"):
            with pytest.raises(sa.exc.IntegrityError, match="append-only"):
                place.run(f"TRUNCATE {table}")

        assert (await store.counts())[Action.BLOCK] == 1


# --- many at once and questions -----------------------------------------------------------------------------------


async def test_a_keep_that_need_not_wait_is_written_all_the_same(place: Place) -> None:
    with place.open() as store:
        identity = await store.keep(decision(), TALK, retention="full", wait=False)
    with place.open() as store:
        kept = await store.decision(identity)

    assert kept is not None
    assert kept.conversation == TALK


async def test_one_row_that_the_database_refuses_does_not_cost_its_neighbours_nor_go_to_the_spool(place: Place) -> None:
    impossible = decision()
    object.__setattr__(impossible, "verdict", None)  # neither verdict nor failure: the constructor would refuse

    with place.open() as store:
        keeps = [store.keep(one, TALK, retention="full") for one in (decision(), decision(), impossible, decision())]
        results = await asyncio.gather(*keeps, return_exceptions=True)

        assert [isinstance(result, StoreError) for result in results] == [False, False, True, False]
        assert "ann@" not in str(results[2])
        assert (await store.counts())[Action.ALLOW] == 3
        assert store.state().num_spooled == 0


async def test_the_time_is_utc_and_when_it_was_kept(place: Place) -> None:
    before = datetime.now(UTC)
    with place.open() as store:
        kept = await store.decision(await store.keep(decision(), TALK, retention="full"))

    assert kept is not None
    assert before <= kept.time <= datetime.now(UTC)
    assert kept.time.utcoffset() == timedelta(0)


async def test_a_decision_without_a_conversation_is_kept_too(place: Place) -> None:
    with place.open() as store:
        kept = await store.decision(await store.keep(decision(), None, retention="hash"))

    assert kept is not None
    assert (kept.conversation, kept.fingerprint) == (None, None)


async def test_what_was_kept_is_there_after_opening_again(place: Place) -> None:
    with place.open() as store:
        identity = await store.keep(decision(), TALK, retention="full")
    with place.open() as store:
        kept = await store.decision(identity)

    assert kept is not None
    assert kept.conversation == TALK


async def test_an_unknown_retention_is_refused(place: Place) -> None:
    with place.open() as store, pytest.raises(ValueError, match="expected one of full, redacted, hash"):
        await store.keep(decision(), TALK, retention="forever")  # type: ignore[arg-type]


async def test_recent_decisions_come_newest_first_in_pages_and_by_action(place: Place) -> None:
    with place.open() as store:
        identities = [await store.keep(decision(action), TALK, retention="hash") for action in (*Action, Action.BLOCK)]

        first = await store.decisions(limit=4)
        rest = await store.decisions(limit=4, before=first[-1].id)
        blocked = await store.decisions(action=Action.BLOCK)

    assert [kept.id for kept in first + rest] == identities[::-1]
    assert [kept.id for kept in blocked] == identities[:-3:-1]


async def test_counts_name_every_action_and_go_back_to_a_time(place: Place) -> None:
    with place.open() as store:
        await store.keep(decision(Action.BLOCK), TALK, retention="hash")
        await store.keep(decision(Action.ALLOW), TALK, retention="hash")
        counts = await store.counts()
        later = await store.counts(since=datetime.now(UTC) + timedelta(hours=1))
        earlier = await store.counts(since=datetime.now(UTC) - timedelta(hours=1))

    assert counts == {action: int(action in (Action.BLOCK, Action.ALLOW)) for action in Action}
    assert earlier == counts
    assert later == dict.fromkeys(Action, 0)


async def test_an_unknown_id_gives_nothing(place: Place) -> None:
    with place.open() as store:
        assert await store.decision("dec_none") is None
        assert await store.decision("\ud800") is None
        assert await store.decisions(before="dec_none") == []


@pytest.mark.parametrize("limit", [0, -1, 1001])
async def test_a_limit_out_of_range_is_refused(place: Place, limit: int) -> None:
    with place.open() as store, pytest.raises(ValueError, match="from 1 to 1000"):
        await store.decisions(limit=limit)


async def test_a_keep_that_is_cancelled_is_still_carried_out(place: Place) -> None:
    with place.open() as store, store._database.writing():
        task = asyncio.create_task(store.keep(decision(Action.BLOCK), TALK, retention="full"))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    with place.open() as store:
        assert (await store.counts())[Action.BLOCK] == 1


def test_threads_with_their_own_event_loops_share_a_store(place: Place) -> None:
    async def keep_some(store: Store) -> None:
        await asyncio.gather(*(store.keep(decision(), TALK, retention="redacted") for _ in range(25)))

    with place.open() as store:
        threads = [threading.Thread(target=lambda: asyncio.run(keep_some(store))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert asyncio.run(store.counts())[Action.ALLOW] == 100


async def test_closing_writes_what_is_waiting_and_may_happen_twice(place: Place) -> None:
    store = place.open()
    with store._database.writing():
        keeps = [asyncio.create_task(store.keep(decision(), TALK, retention="full")) for _ in range(50)]
        await asyncio.sleep(0)
    await store.aclose()
    store.close()

    assert len(set(await asyncio.gather(*keeps))) == 50
    with place.open() as store:
        assert (await store.counts())[Action.ALLOW] == 50


async def test_a_closed_store_refuses_with_a_clear_error(place: Place) -> None:
    store = place.open()
    store.close()

    with pytest.raises(StoreError, match="the store is closed"):
        await store.keep(decision(), TALK, retention="full")
    with pytest.raises(StoreError, match="the store is closed"):
        await store.decisions()


def test_a_forgotten_store_gives_its_thread_back(place: Place) -> None:
    store = place.open()
    thread = store._writer._thread
    del store
    gc.collect()

    assert not thread.is_alive()


def _keep_in_process(place: Place, start: Any, name: str, number: int) -> None:
    async def run() -> None:
        start.wait()
        with place.open() as store:
            for _ in range(number):
                await store.keep(decision(scope=Scope(tenant=name)), TALK, retention="hash")

    asyncio.run(run())


async def test_processes_that_open_and_write_the_same_database_at_once_lose_nothing(place: Place) -> None:
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(3)
    processes = [context.Process(target=_keep_in_process, args=(place, start, f"tenant-{i}", 40)) for i in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        await asyncio.to_thread(process.join, 120)

    assert [process.exitcode for process in processes] == [0, 0, 0]
    with place.open() as store:
        store.replay()
        kept = await store.decisions(limit=1000)
    assert Counter(one.decision.scope.tenant for one in kept) == {f"tenant-{i}": 40 for i in range(3)}
    assert len({one.fingerprint for one in kept}) == 1  # they agreed on one key
