"""A guard that remembers: each text once, nobody's text in the memory, no failure in it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping

import pytest

from id_guard import IdGuard
from redis_server import RedisServer
from serving import until
from tidegate.errors import GuardUnavailable
from tidegate.guards.base import judges_together
from tidegate.guards.breaker import Breaker, BreakerOptions
from tidegate.guards.callers import CallersGuard, with_adapter
from tidegate.guards.remembered import Memory, RememberedGuard, verdict_from_json, verdict_to_json
from tidegate.guards.resilient import ResilientGuard
from tidegate.guards.terms import Terms, on_terms
from tidegate.store.shared import Shared
from tidegate.testing import FakeStreamGuard
from tidegate.types import Conversation, Probabilities, Role, Severity, Span, Target, ToolCall, Turn, Verdict

KEY = bytes(range(32))
BREAD = Conversation.of("How do I bake bread?")
SAID = Verdict(
    Target.PROMPT,
    Severity.UNSAFE,
    Probabilities(0.1, 0.2, 0.7),
    ("Violent", "a custom one é"),
    {"Violent": 0.5},
    None,
    "it says bread",
    Span(0, 4),
    "counting/1",
)


class CountingGuard(FakeStreamGuard):
    """Counts, waits where it is told to, and fails where it is told to."""

    def __init__(self, said: Verdict = SAID) -> None:
        super().__init__()
        self.said = said
        self.asked = 0
        self.ended = 0
        self.gate: asyncio.Event | None = None
        self.broken = False
        self.instructions = ""

    async def judge(self, conversation: Conversation) -> Verdict:
        self.asked += 1
        try:
            if self.gate is not None:
                await self.gate.wait()
            if self.broken:
                raise GuardUnavailable("down")
            return self.said
        finally:
            self.ended += 1


def remembered(guard: CountingGuard, **options: object) -> tuple[RememberedGuard, list[str]]:
    told: list[str] = []
    return RememberedGuard(guard, Memory(KEY, tell=told.append, **options)), told  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def sharing(redis: RedisServer) -> AsyncIterator[Shared]:
    shared = Shared(redis.url, timeout_s=5.0)
    await shared.open()
    try:
        yield shared
    finally:
        await shared.close()


async def test_what_was_judged_is_not_judged_again() -> None:
    counting = CountingGuard()
    guard, told = remembered(counting)

    assert [await guard.judge(BREAD) for _ in range(3)] == [SAID] * 3
    assert (counting.asked, told) == (1, ["judged", "local", "local"])


@pytest.mark.parametrize(
    "other",
    [
        Conversation.of("How do I bake bread? "),
        Conversation.of("How do I bake bread?", ""),
        Conversation((Turn(Role.TOOL, "How do I bake bread?"),)),
        Conversation((Turn(Role.USER, "How do I", "bake bread?"),)),
        Conversation((Turn(Role.USER, ""), Turn(Role.USER, "How do I bake bread?"))),
        Conversation((Turn(Role.USER, "How do I bake bread?", "", (ToolCall("a", ""),)),)),
    ],
)
def test_every_difference_of_a_conversation_makes_another_name(other: Conversation) -> None:
    memory = Memory(KEY)

    assert memory.name_of(BREAD, "g") != memory.name_of(other, "g")


def test_names_differ_by_guard_instructions_and_key() -> None:
    names = {
        Memory(key).name_of(BREAD, guard, instructions)
        for key in (KEY, KEY[::-1])
        for guard in ("edge/1", "edge/2", "gen/1+bank")
        for instructions in ("", "for users in IN")
    }

    assert len(names) == 12


def test_parts_that_touch_do_not_run_together() -> None:
    memory = Memory(KEY)
    one = Conversation((Turn(Role.ASSISTANT, "", "", (ToolCall("ab", "c"),)),))
    two = Conversation((Turn(Role.ASSISTANT, "", "", (ToolCall("a", "bc"),)),))

    assert memory.name_of(one, "g") != memory.name_of(two, "g")


async def test_terms_with_other_instructions_are_remembered_apart() -> None:
    counting = CountingGuard()
    guard, told = remembered(counting)
    india = on_terms(guard, Terms(instructions="for users in region IN"))

    await guard.judge(BREAD)
    await india.judge(BREAD)
    await india.judge(BREAD)

    assert told == ["judged", "judged", "local"]


async def test_equal_conversations_at_the_same_time_are_judged_once() -> None:
    counting = CountingGuard()
    counting.gate = asyncio.Event()
    guard, told = remembered(counting)
    asking = [asyncio.create_task(guard.judge(BREAD)) for _ in range(10)]
    await until(lambda: len(told) == 9, "nine to join")
    counting.gate.set()

    assert await asyncio.gather(*asking) == [SAID] * 10
    assert counting.asked == 1


async def test_who_goes_away_does_not_end_the_judging_for_others_and_the_last_one_does() -> None:
    counting = CountingGuard()
    counting.gate = asyncio.Event()
    guard, told = remembered(counting)
    first, second = asyncio.create_task(guard.judge(BREAD)), asyncio.create_task(guard.judge(BREAD))
    await until(lambda: told == ["joined"], "both")
    first.cancel()
    await asyncio.wait({first})
    assert counting.ended == 0
    second.cancel()
    await asyncio.wait({second})
    await until(lambda: counting.ended == 1, "the guard to be left alone")

    third = asyncio.create_task(guard.judge(BREAD))
    await until(lambda: counting.asked == 2, "a new question")
    counting.gate.set()
    assert await third == SAID


async def test_a_failure_is_told_to_all_who_wait_and_never_remembered() -> None:
    counting = CountingGuard()
    counting.broken = True
    guard, _ = remembered(counting)
    answers = await asyncio.gather(*(guard.judge(BREAD) for _ in range(3)), return_exceptions=True)
    assert all(isinstance(answer, GuardUnavailable) for answer in answers)
    counting.broken = False

    assert await guard.judge(BREAD) == SAID
    assert counting.asked == 2


async def test_half_a_cascade_is_not_remembered() -> None:
    counting = CountingGuard(
        Verdict(Target.PROMPT, Severity.SAFE, Probabilities(1, 0, 0), guard="cascade[a; b failed]")
    )
    guard, told = remembered(counting)
    await guard.judge(BREAD)
    await guard.judge(BREAD)

    assert told == ["judged", "judged"]


async def test_memory_has_a_bound_and_forgets_what_was_used_least_recently() -> None:
    counting = CountingGuard()
    guard, told = remembered(counting, most=2)
    for text in ("a", "b", "a", "c", "a", "b"):
        await guard.judge(Conversation.of(text))

    assert told == ["judged", "judged", "local", "judged", "local", "judged"]
    assert len(guard._memory) == 2


async def test_a_verdict_is_forgotten_after_its_time() -> None:
    now = [0.0]
    counting = CountingGuard()
    guard, told = remembered(counting, ttl_s=10.0, clock=lambda: now[0])
    await guard.judge(BREAD)
    now[0] = 9.9
    await guard.judge(BREAD)
    now[0] = 10.0
    await guard.judge(BREAD)

    assert told == ["judged", "local", "judged"]


async def test_a_verdict_that_came_from_redis_is_forgotten_when_its_time_is_over_not_later(redis: RedisServer) -> None:
    async with sharing(redis) as shared:
        mine, theirs = [0.0], [0.0]
        one = Memory(KEY, ttl_s=10.0, shared=shared, wall=lambda: mine[0])
        two = Memory(KEY, ttl_s=10.0, shared=shared, wall=lambda: theirs[0], clock=lambda: theirs[0])
        name = one.name_of(BREAD, "g")
        one.remember(name, SAID)
        await one.shared()
        theirs[0] = 9.0
        assert await two.recall(name) is not None
        assert two.recall_here(name) is not None
        theirs[0] = 10.0

        assert two.recall_here(name) is None
        assert await two.recall(name) is None


async def test_what_another_tidegate_wrote_in_another_form_is_not_remembered(redis: RedisServer) -> None:
    async with sharing(redis) as shared:
        memory = Memory(KEY, shared=shared)
        name = memory.name_of(BREAD, "g")
        text = (1 << 50).to_bytes(8, "big") + b'{"t":"prompt"}'
        await shared.execute("SET", f"tidegate:v:{name.hex()}", memory._mac(name, text) + text)

        assert await memory.recall(name) is None


async def test_what_is_remembered_tells_the_breaker_nothing_and_is_there_while_the_guard_is_down() -> None:
    counting = CountingGuard()
    breaker = Breaker(BreakerOptions(failures=3))
    guard = ResilientGuard(remembered(counting)[0], breaker=breaker)
    await guard.judge(BREAD)
    counting.broken = True
    for number in range(3):
        with pytest.raises(GuardUnavailable):
            await guard.judge(Conversation.of(f"other {number}"))
        assert await guard.judge(BREAD) == SAID

    assert (breaker.state, counting.asked) == ("open", 4)


async def test_a_redis_that_answers_nothing_takes_nothing_of_the_guards_deadline(redis: RedisServer) -> None:
    shared = Shared(redis.url, timeout_s=0.2)
    await shared.open()
    guard = ResilientGuard(remembered(CountingGuard(), shared=shared)[0], deadline_s=0.1)
    redis.pause()
    try:
        assert await guard.judge(BREAD) == SAID
        assert not shared.up
    finally:
        redis.resume()
        await shared.close()


@pytest.mark.parametrize(
    "verdict", [SAID, Verdict(Target.RESPONSE, Severity.SAFE, Probabilities(1, 0, 0), refusal=True, guard="g")]
)
def test_a_verdict_is_read_as_it_was_written(verdict: Verdict) -> None:
    assert verdict_from_json(verdict_to_json(verdict)) == verdict


async def test_gateways_on_one_redis_judge_once_and_no_text_is_in_it(redis: RedisServer) -> None:
    async with sharing(redis) as one, sharing(redis) as two:
        first, second = CountingGuard(), CountingGuard()
        here, _ = remembered(first, shared=one)
        there, told = remembered(second, shared=two)
        secret = Conversation.of("plumtree bread")
        await here.judge(secret)
        await here._memory.shared()
        answers = [await there.judge(secret) for _ in range(2)]

    assert (first.asked, second.asked, told) == (1, 0, ["shared", "local"])
    assert [answer.reason for answer in answers] == [None, None]
    assert (answers[0].severity, answers[0].span) == (SAID.severity, SAID.span)
    assert b"tidegate:v:" in redis.all()
    for text in (b"plumtree", b"bread"):
        assert text not in redis.all()


async def test_what_others_wrote_into_redis_is_not_believed(redis: RedisServer) -> None:
    """Neither a verdict without a signature, nor one that was moved from another text."""
    async with sharing(redis) as shared:
        memory = Memory(KEY, shared=shared)
        harmless, other = memory.name_of(BREAD, "g"), memory.name_of(Conversation.of("other"), "g")
        memory.remember(harmless, SAID)
        await memory.shared()
        moved = await shared.execute("GET", f"tidegate:v:{harmless.hex()}")
        fresh = Memory(KEY, shared=shared)
        assert await fresh.recall(harmless) is not None
        for forged in (moved, b"x" * 16 + verdict_to_json(SAID).encode(), b""):
            await shared.execute("SET", f"tidegate:v:{other.hex()}", forged)
            assert await fresh.recall(other) is None


async def test_a_redis_that_dies_costs_nothing_but_its_memory(redis: RedisServer) -> None:
    async with sharing(redis) as shared:
        counting = CountingGuard()
        guard, told = remembered(counting, shared=shared, most=1)
        await guard.judge(BREAD)
        redis.kill()
        assert await guard.judge(Conversation.of("other")) == SAID
        assert await guard.judge(BREAD) == SAID
        redis.start()
        await until(lambda: shared.up, "Redis")
        await guard.judge(Conversation.of("third"))
        await guard._memory.shared()
        await guard.judge(Conversation.of("fourth"))
        await guard.judge(Conversation.of("third"))

    assert told == ["judged", "judged", "judged", "judged", "judged", "shared"]


class AdaptedGuard(CountingGuard):
    """Has adapters: says which one judged."""

    adapters = ("bank", "school")

    def __init__(self, adapter: str | None = None) -> None:
        super().__init__()
        self.adapter = adapter

    @property
    def name(self) -> str:
        return f"fake/1+{self.adapter}" if self.adapter else "fake/1"

    def adapted(self, adapter: str | None) -> AdaptedGuard:
        from tidegate.errors import InputError

        if adapter not in self.adapters:
            raise InputError("unknown adapter")
        return AdaptedGuard(adapter)

    async def judge(self, conversation: Conversation) -> Verdict:
        return Verdict(Target.PROMPT, Severity.SAFE, Probabilities(1, 0, 0), guard=self.name)


async def test_callers_are_judged_with_their_own_adapters_and_remembered_apart() -> None:
    guard = RememberedGuard(CallersGuard(AdaptedGuard()), Memory(KEY))

    async def judged(adapter: str | None) -> str:
        with with_adapter(adapter):
            return (await asyncio.create_task(guard.judge(BREAD))).guard

    expected: Mapping[str | None, str] = {None: "fake/1", "bank": "fake/1+bank", "school": "fake/1+school"}
    names = [None, "bank", "school"] * 3
    assert await asyncio.gather(*map(judged, names)) == [expected[name] for name in names]


@pytest.mark.parametrize("guard", [AdaptedGuard(), FakeStreamGuard()])
async def test_an_adapter_that_is_not_there_is_a_failure_and_never_the_guard_without_one(
    guard: FakeStreamGuard,
) -> None:
    from tidegate.errors import GuardError

    callers = CallersGuard(guard)
    with with_adapter("unknown"):
        with pytest.raises(GuardError, match="adapter") as caught:
            await callers.judge(BREAD)
        with pytest.raises(GuardError, match="adapter"):
            callers.open(None)
    assert type(caught.value) is GuardError, "a kind that opens no breaker: others have their adapters"
    assert (await callers.judge(BREAD)).severity is Severity.SAFE


async def test_what_the_guard_said_without_an_adapter_is_not_remembered_for_one_that_is_not_there() -> None:
    from tidegate.errors import GuardError

    guard = RememberedGuard(CallersGuard(AdaptedGuard()), Memory(KEY))
    assert (await guard.judge(BREAD)).guard == "fake/1"
    with with_adapter("unknown"):
        assert guard.name == "fake/1+unknown"
        with pytest.raises(GuardError, match="not loaded"):
            await guard.judge(BREAD)


async def test_who_takes_ids_or_judges_reasoning_together_still_does_so_when_it_is_remembered() -> None:
    class Both(IdGuard):
        together = True

    for inner, does in ((Both(), True), (FakeStreamGuard(), False)):
        guard = RememberedGuard(CallersGuard(inner), Memory(KEY))
        assert (guard.takes_ids, judges_together(guard)) == (does, does)
    assert (await RememberedGuard(CallersGuard(Both()), Memory(KEY)).id_text()).decode([98, 99]) == "bc"
