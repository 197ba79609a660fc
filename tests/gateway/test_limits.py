"""How much each may do: in one process by a clock that the test turns, and in several over a real Redis."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import pytest

from redis_server import RedisServer
from serving import until
from tidegate.errors import InputError
from tidegate.gateway import limits as limits_module
from tidegate.gateway.limits import Counts, Limit, LimitOptions, Limits, LocalCounts, SharedCounts
from tidegate.gateway.statuses import Problem
from tidegate.store import Allowance, Key
from tidegate.store.shared import Shared

SECRET = bytes(range(32))
SLOW = Limit("key/1", per_minute=0.001, burst=3)
"""So slow that no test can wait for the next request."""
TWO_AT_ONCE = Limit("key/2", concurrent=2)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@contextlib.asynccontextmanager
async def shared_counts(redis: RedisServer, **options: float) -> AsyncIterator[tuple[SharedCounts, Shared]]:
    shared = Shared(redis.url, timeout_s=5.0)
    await shared.open()
    try:
        yield SharedCounts(shared, SECRET, **options), shared
    finally:
        await shared.close()


@pytest.fixture(params=["local", "shared"])
async def counts(request: pytest.FixtureRequest) -> AsyncIterator[Counts]:
    """The same promises in one process and over Redis."""
    if request.param == "local":
        yield LocalCounts()
        return
    async with shared_counts(request.getfixturevalue("redis")) as (made, _):
        yield made


def key(**allowance: int) -> Key:
    return Key("0123456789ab", "k", "shop", None, frozenset(), Allowance(**allowance), None, datetime.now(UTC))


async def test_a_burst_is_let_in_and_the_next_request_is_told_when_to_come(counts: Counts) -> None:
    seen = [await counts.take([SLOW], f"lease{number}") for number in range(4)]

    assert [one.full for one in seen] == [None, None, None, "requests"]
    assert [one.remaining for one in seen] == [2, 1, 0, 0]
    assert 59_000 < seen[3].wait_s <= 60_000
    assert seen[3].headers["retry-after"].isdigit()


async def test_so_many_exchanges_at_once_and_a_place_is_free_again_when_one_ends(counts: Counts) -> None:
    assert (await counts.take([TWO_AT_ONCE], "a")).full is None
    assert (await counts.take([TWO_AT_ONCE], "b")).full is None
    assert (await counts.take([TWO_AT_ONCE], "c")).full == "concurrent"

    await counts.leave([TWO_AT_ONCE], "a")
    await counts.leave([TWO_AT_ONCE], "a")

    assert (await counts.take([TWO_AT_ONCE], "c")).full is None
    assert (await counts.take([TWO_AT_ONCE], "d")).full == "concurrent"


async def test_a_request_that_one_limit_turns_away_counts_for_no_other(counts: Counts) -> None:
    full = Limit("tenant/1", concurrent=1)
    await counts.take([full], "somebody")
    for _ in range(5):
        assert (await counts.take([SLOW, full], "mine")).full == "concurrent"

    assert [(await counts.take([SLOW], "x")).full for _ in range(4)] == [None, None, None, "requests"]


async def test_a_subject_that_is_told_to_slow_down_has_to_wait_and_longer_when_it_is_told_again(
    counts: Counts,
) -> None:
    assert await counts.take_slowed("ann", 0.001) == 0
    await counts.slow("ann", 0.5, 300)
    assert await counts.take_slowed("ann", 0.001) == 0
    first = await counts.take_slowed("ann", 0.001)
    await counts.slow("ann", 0.5, 300)
    second = await counts.take_slowed("ann", 0.001)

    assert 119_000 < first <= 120_000
    assert 239_000 < second <= 240_000
    assert await counts.take_slowed("bob", 0.001) == 0


async def test_a_bucket_fills_as_time_goes_by_and_never_above_its_burst() -> None:
    clock = Clock()
    counts = LocalCounts(clock)
    limit = Limit("key/1", per_minute=60, burst=2)
    assert [(await counts.take([limit], "x")).full for _ in range(3)] == [None, None, "requests"]
    clock.now += 0.5
    assert (await counts.take([limit], "x")).wait_s == pytest.approx(0.5)
    clock.now += 0.5
    assert (await counts.take([limit], "x")).full is None
    clock.now += 3600

    assert [(await counts.take([limit], "x")).full for _ in range(3)] == [None, None, "requests"]


async def test_a_subject_is_free_again_after_its_time() -> None:
    clock = Clock()
    counts = LocalCounts(clock)
    await counts.slow("ann", 0.5, 300)
    await counts.slow("ann", 0.5, 100)
    clock.now += 299
    await counts.take_slowed("ann", 0.001)
    assert await counts.take_slowed("ann", 0.001) > 0
    clock.now += 1

    assert await counts.take_slowed("ann", 0.001) == 0
    assert counts._slowed == {}


async def test_memory_for_subjects_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits_module, "MOST_SUBJECTS", 3)
    counts = LocalCounts()
    for number in range(10):
        await counts.slow(f"subject{number}", 0.5, 100 + number)

    assert set(counts._slowed) == {"subject7", "subject8", "subject9"}


async def test_a_long_name_of_a_subject_takes_no_more_room_than_a_short_one() -> None:
    counts = LocalCounts()
    limits = Limits(counts, LimitOptions())
    for subject in ("ann", "ann" * 100_000, "\ud800"):
        await limits.throttle("shop", subject)

    assert [len(name) < 100 for name in counts._slowed] == [True, True, True]


async def test_gateways_on_one_redis_count_together_and_it_holds_no_name(redis: RedisServer) -> None:
    async with shared_counts(redis) as (one, _), shared_counts(redis) as (two, _):
        told = [
            (await each.take([SLOW, TWO_AT_ONCE], name)).full for each, name in ((one, "a"), (two, "b"), (one, "c"))
        ]
        await one.slow("subject/4/shop/ann", 0.5, 300)
        waits = [await two.take_slowed("subject/4/shop/ann", 0.001) for _ in range(2)]

    assert told == [None, None, "concurrent"]
    assert waits[1] > 0
    assert b"key/" not in redis.all()
    assert b"ann" not in redis.all()
    assert b"shop" not in redis.all()


async def test_when_redis_dies_nobody_waits_gets_an_error_or_a_new_burst(redis: RedisServer) -> None:
    """And when it is back, empty, gateways count together again; leases that are held are known there again."""
    told: list[bool] = []
    shared = Shared(redis.url, timeout_s=5.0, tell=told.append)
    await shared.open()
    counts = SharedCounts(shared, SECRET)
    try:
        assert (await counts.take([SLOW], "a")).full is None
        assert (await counts.take([TWO_AT_ONCE], "b")).full is None
        redis.kill()
        seen = [(await counts.take([SLOW], "x")).full for _ in range(3)]
        assert seen == [None, None, "requests"]
        assert (await counts.take([TWO_AT_ONCE], "c")).full is None
        assert (await counts.take([TWO_AT_ONCE], "d")).full == "concurrent"
        await counts.slow("ann", 0.5, 300)
        assert await counts.take_slowed("ann", 0.001) == 0
        assert await counts.take_slowed("ann", 0.001) > 0
        assert told == [True, False]

        redis.start()
        await until(lambda: shared.up, "Redis to be found")
        await counts.renew()
        assert told == [True, False, True]
        async with shared_counts(redis) as (other, _):
            assert (await other.take([TWO_AT_ONCE], "e")).full == "concurrent"
            await counts.leave([TWO_AT_ONCE], "b")
            assert (await other.take([TWO_AT_ONCE], "e")).full is None
    finally:
        await shared.close()


async def test_a_redis_that_answers_nothing_holds_a_request_up_for_its_time_only_and_once(redis: RedisServer) -> None:
    shared = Shared(redis.url, timeout_s=0.05)
    await shared.open()
    counts = SharedCounts(shared, SECRET)
    try:
        await until(lambda: shared.up, "Redis")
        redis.pause()
        async with asyncio.timeout(10):
            seen = [(await counts.take([SLOW], "x")).full for _ in range(200)]
        assert seen.count(None) == 3
        assert not shared.up
    finally:
        redis.resume()
        await shared.close()


async def test_a_gateway_that_died_gives_its_places_back_by_itself(redis: RedisServer) -> None:
    async with shared_counts(redis, lease_s=0.05) as (dead, _), shared_counts(redis) as (other, _):
        await dead.take([TWO_AT_ONCE], "a")
        await dead.take([TWO_AT_ONCE], "b")
        found = await other.take([TWO_AT_ONCE], "c")
        while found.full is not None:
            await asyncio.sleep(0.005)
            found = await other.take([TWO_AT_ONCE], "c")


async def test_a_redis_that_is_full_counts_as_down(redis: RedisServer) -> None:
    redis.kill()
    redis.start("--maxmemory", "1")
    shared = Shared(redis.url, timeout_s=5.0)
    try:
        await shared.open()
        assert not shared.up
        assert (await SharedCounts(shared, SECRET).take([SLOW], "x")).full is None
    finally:
        await shared.close()
        redis.kill()


async def test_a_burst_of_a_thousand_goes_together_and_each_has_its_own_answer(redis: RedisServer) -> None:
    """On one connection; also where some who asked have gone meanwhile."""
    async with shared_counts(redis) as (counts, shared):
        limit = Limit("key/1", per_minute=0.001, burst=700)
        asking = [asyncio.create_task(counts.take([limit], f"lease{number}")) for number in range(1000)]
        gone = asyncio.create_task(shared.execute("GET", "x"))
        await asyncio.sleep(0)
        gone.cancel()
        told = await asyncio.gather(*asking)

        assert shared.up
        assert sum(one.full is None for one in told) == 700
        assert sorted({one.remaining for one in told}) == list(range(700))


@pytest.mark.parametrize("url", ["127.0.0.1:6379", "http://127.0.0.1", ""])
async def test_an_address_that_is_none_is_an_error_that_does_not_show_it(url: str) -> None:
    with pytest.raises(InputError, match="redis://"):
        Shared(url)


async def test_an_exchange_stands_under_the_limits_of_its_key_and_of_its_tenant() -> None:
    limits = Limits(LocalCounts(), LimitOptions(tenant=Allowance(concurrent=1)))
    async with limits.exchange(key(per_minute=60, burst=7)) as first:
        assert (first.full, first.limit, first.remaining) == (None, 60, 6)
        async with limits.exchange(key(per_minute=60, burst=7)) as second:
            assert second.full == "concurrent"
    async with limits.exchange(key(per_minute=60, burst=7)) as third:
        assert (third.full, third.remaining) == (None, 5)
    async with Limits(LocalCounts()).exchange(key()) as free:
        assert free.headers == {}


async def test_the_place_is_given_back_when_the_exchange_is_cancelled() -> None:
    limits = Limits(LocalCounts())
    entered = asyncio.Event()

    async def work() -> None:
        async with limits.exchange(key(concurrent=1)):
            entered.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    async with limits.exchange(key(concurrent=1)) as admission:
        assert admission.full is None


async def test_a_throttled_subject_is_told_429_and_the_same_subject_of_another_tenant_is_not() -> None:
    limits = Limits(LocalCounts(), LimitOptions(subject_per_minute=0.001))
    assert await limits.throttle("shop", "ann", factor=0.5, seconds=300)
    await limits.admit_subject("shop", "ann")
    with pytest.raises(Problem) as caught:
        await limits.admit_subject("shop", "ann")
    await limits.admit_subject("bank", "ann")
    await limits.admit_subject(None, "shop/ann")

    assert (caught.value.status, caught.value.code) == (429, "rate_limit_exceeded")
    assert int(caught.value.headers["retry-after"]) > 0
    assert not await limits.throttle("shop", None)
    await limits.admit_subject("shop", None)
    with pytest.raises(InputError):
        await limits.throttle("shop", "ann", factor=0)


@pytest.mark.parametrize(("factor", "wait_s"), [(0.5, 2), (0.1, 10), (1.0, 1)])
async def test_how_much_and_how_long_a_subject_is_throttled_is_set(factor: float, wait_s: int) -> None:
    now = 0.0
    limits = Limits(LocalCounts(clock=lambda: now), LimitOptions(throttle_factor=factor, throttle_s=20))
    await limits.throttle("shop", "ann")
    await limits.admit_subject("shop", "ann")
    with pytest.raises(Problem) as caught:
        await limits.admit_subject("shop", "ann")
    assert caught.value.headers["retry-after"] == str(wait_s)

    now = 20.5  # its time is over
    for _ in range(9):
        await limits.admit_subject("shop", "ann")


@pytest.mark.parametrize(("seconds", "told"), [(0.0, "0ms"), (0.12, "120ms"), (6, "6s"), (89.5, "1m30s")])
def test_durations_are_written_as_openai_does(seconds: float, told: str) -> None:
    assert limits_module._duration(seconds) == told
