"""What a policy says of the guard and of its failures is what is done: whole texts and streams."""

from __future__ import annotations

import pytest

from tidegate.errors import GuardError, GuardOverloaded, GuardTimeout, GuardUnavailable, UnreadableVerdict
from tidegate.guards.base import StreamGuard
from tidegate.guards.breaker import Breaker, BreakerOptions
from tidegate.guards.resilient import ResilientGuard
from tidegate.moderate import StreamModerator, moderate
from tidegate.policy import Policy, parse_policy
from tidegate.testing import FakeStreamGuard
from tidegate.types import Action, Conversation, CoverageState, Decision, Observed, Scope

BY_KIND = "{default: block, unavailable: warn, overloaded: review, timeout: allow, unreadable: block}"
KINDS = {
    GuardUnavailable: Action.WARN,
    GuardOverloaded: Action.REVIEW,
    GuardTimeout: Action.ALLOW,
    UnreadableVerdict: Action.BLOCK,
    GuardError: Action.BLOCK,
}
RULES = "[{name: stop, severity: unsafe, action: block}, {name: mark, severity: controversial, action: warn}]"


def policy(head: str = "", rules: str = RULES, on_guard_error: str = BY_KIND) -> Policy:
    text = f"name: x\non_guard_error: {on_guard_error}\notherwise: allow\ndebounce: 1\nrules: {rules}\n{head}\n"
    return parse_policy(text, source="x.yaml")


def failing(kind: type[GuardError]) -> FakeStreamGuard:
    return FakeStreamGuard(error=kind("no"))


def resilient(guard: StreamGuard, **options: float) -> ResilientGuard:
    return ResilientGuard(guard, fallback=FakeStreamGuard(failing="", hanging="", name="small/1"), **options)  # type: ignore[arg-type]


async def streamed(
    text: str,
    guard: StreamGuard,
    by: Policy,
    scope: Scope = Scope(),  # noqa: B008
    pieces: int = 1,
) -> tuple[Decision, str]:
    moderator = StreamModerator(guard, by, scope)
    released = ""
    size = max(1, len(text) // pieces)
    for start in range(0, len(text), size):
        step = await moderator.feed(text[start : start + size])
        released += step.released
        if step.decision is not None:
            return step.decision, released
    step = await moderator.finish()
    assert step.decision is not None
    return step.decision, released + step.released


# --- every failure does what the policy says ----------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(("kind", "action"), KINDS.items(), ids=lambda value: getattr(value, "__name__", value))
async def test_each_kind_of_failure_of_a_whole_text(kind: type[GuardError], action: Action, wrapped: bool) -> None:
    guard = resilient(failing(kind)) if wrapped else failing(kind)

    decision = await moderate(Conversation.of("guardfail"), guard=guard, policy=policy())

    assert (decision.action, decision.rule) == (action, "on_guard_error")
    assert decision.failure is not None
    assert decision.failure.kind == kind.__name__
    assert {part.state for part in decision.coverage} == {CoverageState.NOT_JUDGED}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("text", ["guardfail now", "one guardfail now", "one guardfail"], ids=["first", "mid", "end"])
@pytest.mark.parametrize(("kind", "action"), KINDS.items(), ids=lambda value: getattr(value, "__name__", value))
async def test_each_kind_of_failure_of_a_stream_at_each_place(
    kind: type[GuardError], action: Action, text: str, wrapped: bool
) -> None:
    guard = resilient(failing(kind)) if wrapped else failing(kind)

    decision, released = await streamed(text, guard, policy(), pieces=len(text))

    assert (decision.action, decision.rule) == (action, "on_guard_error")
    assert decision.failure is not None
    if action is Action.BLOCK:
        assert released == text[: text.index("guardfail")].rstrip()
    else:
        assert released == text


async def test_a_guard_that_is_full_when_a_stream_begins() -> None:
    decision, released = await streamed("one two", FakeStreamGuard(most_sessions=0), policy())

    assert (decision.action, released) == (Action.REVIEW, "one two")


@pytest.mark.parametrize("wrapped", [False, True])
async def test_a_guard_that_hangs_is_decided_as_a_timeout_after_the_policys_deadline(wrapped: bool) -> None:
    guard: StreamGuard = resilient(FakeStreamGuard(), deadline_s=60) if wrapped else FakeStreamGuard()
    by = policy("deadline_ms: 10")

    whole = await moderate(Conversation.of("guardhang"), guard=guard, policy=by, timeout_s=60)
    assert (whole.action, whole.failure and whole.failure.kind) == (Action.ALLOW, "GuardTimeout")
    decision, released = await streamed("one guardhang two", guard, by)
    assert (decision.action, decision.failure and decision.failure.kind) == (Action.ALLOW, "GuardTimeout")
    assert released == "one guardhang two"


async def test_a_breaker_that_is_open_is_decided_as_unavailable() -> None:
    guard = resilient(FakeStreamGuard(), breaker=Breaker(BreakerOptions(failures=1)))  # type: ignore[arg-type]
    await moderate(Conversation.of("guardfail"), guard=guard, policy=policy())

    decision = await moderate(Conversation.of("hello"), guard=guard, policy=policy())
    assert (decision.action, decision.failure and decision.failure.kind) == (Action.WARN, "GuardUnavailable")
    in_stream, released = await streamed("hello", guard, policy())
    assert (in_stream.action, in_stream.failure and in_stream.failure.kind) == (Action.WARN, "GuardUnavailable")
    assert released == "hello"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
async def test_degraded_mode_judges_with_the_stand_in_and_the_decision_says_so(kind: type[GuardError]) -> None:
    guard, by = resilient(failing(kind)), policy("degraded: edge")
    signed = f"degraded[small/1; fake/1 {kind.__name__}]"

    whole = await moderate(Conversation.of("guardfail bomb"), guard=guard, policy=by)
    assert whole.verdict is not None
    assert (whole.action, whole.verdict.guard) == (Action.BLOCK, signed)
    decision, released = await streamed("tea guardfail and a bomb here", guard, by, pieces=5)
    assert decision.verdict is not None
    assert (decision.action, decision.verdict.guard) == (Action.BLOCK, signed)
    assert released == "tea guardfail and a"
    calm, all_of_it = await streamed("tea guardfail and cake", guard, by, pieces=5)
    assert (calm.action, all_of_it) == (Action.ALLOW, "tea guardfail and cake")
    assert {part.state for part in calm.coverage} == {CoverageState.JUDGED}


async def test_degraded_mode_without_a_stand_in_is_a_failure() -> None:
    decision = await moderate(Conversation.of("guardfail"), guard=FakeStreamGuard(), policy=policy("degraded: edge"))

    assert (decision.action, decision.rule) == (Action.WARN, "on_guard_error")


async def test_each_scope_has_its_own_word_on_failures() -> None:
    by = policy(
        "layers: {tenant: {shut: {on_guard_error: block}, open: {degraded: edge}}, route: {/slow: {deadline_ms: 10}}}",
        on_guard_error="review",
    )
    guard = resilient(FakeStreamGuard(), deadline_s=60)

    async def after(text: str, **scope: str) -> tuple[Action, bool]:
        whole = await moderate(Conversation.of(text), guard=guard, policy=by, scope=Scope(**scope))
        streaming, _ = await streamed(text, guard, by, Scope(**scope))
        assert (streaming.action, streaming.verdict is None) == (whole.action, whole.verdict is None)
        return whole.action, whole.verdict is not None

    assert await after("guardfail") == (Action.REVIEW, False)
    assert await after("guardfail", tenant="shut") == (Action.BLOCK, False)
    assert await after("guardfail", tenant="open") == (Action.ALLOW, True)
    assert await after("guardhang", tenant="shut", route="/slow") == (Action.BLOCK, False)
    assert await after("guardhang", tenant="open", route="/slow") == (Action.ALLOW, True)


# --- layers and what is only observed -----------------------------------------------------------------------------


async def test_retention_and_debounce_are_those_of_the_scope() -> None:
    kept: list[str] = []

    async def keep(decision: Decision, conversation: Conversation, *, retention: str) -> None:
        kept.append(retention)

    by = policy("retention: hash\nlayers: {tenant: {a: {retention: full, debounce: 2}}}")
    for tenant in ("a", "b"):
        await moderate(Conversation.of("x"), guard=FakeStreamGuard(), policy=by, scope=Scope(tenant=tenant), keep=keep)
    assert kept == ["full", "hash"]
    assert (await streamed("a bomb is fine", FakeStreamGuard(), by, Scope(tenant="a")))[0].action is Action.ALLOW
    assert (await streamed("a bomb is fine", FakeStreamGuard(), by, Scope(tenant="b")))[0].action is Action.BLOCK


@pytest.mark.parametrize("end_token", [False, True])
async def test_a_policy_that_is_only_observed_lets_every_stream_through_and_says_what_it_would_do(
    end_token: bool,
) -> None:
    by = policy("observe: true\ndegraded: none")
    guard = FakeStreamGuard(end_token=end_token)

    decision, released = await streamed("a bomb is here", guard, by, pieces=4)
    assert (decision.action, decision.rule, released) == (Action.ALLOW, "observe", "a bomb is here")
    assert decision.observed == Observed(Action.BLOCK, "stop")
    assert decision.verdict is not None
    assert decision.verdict.categories == ("Violent",)

    calm, _ = await streamed("tea and cake", guard, by, pieces=4)
    assert (calm.action, calm.rule, calm.observed) == (Action.ALLOW, "otherwise", None)

    failed, released = await streamed("one guardfail two", guard, policy("observe: true", on_guard_error="block"))
    assert (failed.action, failed.rule, released) == (Action.ALLOW, "observe", "one guardfail two")
    assert failed.observed == Observed(Action.BLOCK, "on_guard_error")


async def test_a_rule_that_is_only_observed_does_not_hold_or_stop_a_stream() -> None:
    new = "{name: new, severity: unsafe, action: block, observe: true}"
    by = policy(rules=f"[{new}, {{name: old, severity: unsafe, action: warn}}]")

    moderator = StreamModerator(FakeStreamGuard(), by)
    step = await moderator.feed("a bomb is here ")
    assert (step.released, step.decision) == ("a bomb is here", None)
    end = (await moderator.finish()).decision

    assert end is not None
    assert (end.action, end.rule, end.observed) == (Action.WARN, "old", Observed(Action.BLOCK, "new"))


async def test_what_is_only_observed_has_a_debounce_of_its_own() -> None:
    text = (
        "{name: x, on_guard_error: block, otherwise: allow, controversial: safe, debounce: 2, "
        "rules: [{name: new, severity: unsafe, action: block, observe: true}]}"
    )
    by = parse_policy(text)
    once, _ = await streamed("a bomb is here now", FakeStreamGuard(), by)
    twice, _ = await streamed("a bomb bomb is here", FakeStreamGuard(), by)

    assert (once.action, once.observed) == (Action.ALLOW, None)
    assert (twice.action, twice.observed) == (Action.ALLOW, Observed(Action.BLOCK, "new"))


async def test_a_stream_that_is_closed_early_says_what_was_observed_so_far() -> None:
    moderator = StreamModerator(FakeStreamGuard(), policy("observe: true"))
    await moderator.feed("a bomb is ")
    decision = moderator.close()

    assert decision is not None
    assert (decision.action, decision.observed) == (Action.ALLOW, Observed(Action.BLOCK, "stop"))
