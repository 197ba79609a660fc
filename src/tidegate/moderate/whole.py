"""A whole text: judge, decide, keep; take personal data out where that is enough."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import replace
from typing import Any, Final, Protocol, TypeVar

from tidegate.deadlines import within
from tidegate.errors import GuardError, GuardTimeout
from tidegate.guards.base import Guard
from tidegate.guards.resilient import ResilientGuard
from tidegate.guards.terms import Terms, on_terms
from tidegate.personal import find
from tidegate.policy import Policy, Retention, ScopedPolicy, decide
from tidegate.types import (
    Action,
    Channel,
    Conversation,
    Coverage,
    CoverageState,
    Decision,
    GuardFailure,
    Intervention,
    InterventionKind,
    Role,
    Scope,
    Turn,
    Verdict,
)

__all__ = ["Keep", "agreed", "coverage_of", "failure_of", "moderate", "surely"]

T = TypeVar("T")
G = TypeVar("G", bound=Guard)


class Keep(Protocol):
    """Where decisions go; a Store's ``keep`` is one. What it returns is the decision's id, a string, or nothing."""

    async def __call__(self, decision: Decision, conversation: Conversation, *, retention: Retention) -> str | None: ...


async def moderate(
    conversation: Conversation,
    *,
    guard: Guard,
    policy: Policy,
    scope: Scope = Scope(),  # noqa: B008 - frozen
    keep: Keep | None = None,
    timeout_s: float | None = None,
    coverage: Sequence[Coverage] | None = None,
) -> Decision:
    """Judge the last turn of a conversation, decide, and keep the decision.

    REDACT means that it is enough to mask what `tidegate.personal` finds in the turn, and that it finds something;
    whoever asks does so. Where a policy says redact and that is not enough, the decision is BLOCK.

    Args:
        conversation: its last turn is judged.
        guard: judges. When it fails, the decision has a failure, and ``policy.on_guard_error`` is done.
        policy: decides.
        scope: for whom.
        keep: where the decision goes; None keeps it nowhere.
        timeout_s: seconds that the guard may take, greater than 0; None for as long as it wants.
        coverage: what became of every text, given that the guard judges; None for one path for each turn.

    Raises:
        StoreError: when the decision could not be kept.
    """
    here = policy.at(scope)
    said = await _verdict(conversation, *agreed(guard, here, timeout_s))
    paths = coverage_of(conversation) if coverage is None else tuple(coverage)
    if isinstance(said, GuardFailure):
        paths = tuple(_not_judged(path) for path in paths)
    decision = decide(policy, said, scope, paths)
    if isinstance(said, GuardFailure):
        decision = replace(decision, action=Action.BLOCK) if decision.action is Action.REDACT else decision
    else:
        decision = _carried_out(decision, said, here.for_scope(scope, said.target), conversation)
    if keep is not None:
        await surely(keep(decision, conversation, retention=here.retention))
    return decision


def _carried_out(decision: Decision, said: Verdict, rules: ScopedPolicy, conversation: Conversation) -> Decision:
    """REDACT where it is enough to take personal data out, and there is some; BLOCK where there is none."""
    if decision.action < Action.REDACT:
        return decision
    turn = conversation.turns[-1]
    found = () if not rules.redacts(said) else tuple(one for _, _, text in _texts_of(0, turn) for one in find(text))
    if not found:
        return replace(decision, action=Action.BLOCK)
    masked = Intervention(InterventionKind.REDACT, "done", len(found), sum(one.end - one.start for one in found))
    return replace(decision, action=Action.REDACT, interventions=(masked,))


def agreed(guard: G, policy: Policy, timeout_s: float | None) -> tuple[G, float | None]:
    """The guard as the policy wants it, and the seconds that are waited for it.

    A `ResilientGuard` keeps the policy's deadline itself, so that there is time for its fallback behind it.
    """
    deadline_s = None if policy.deadline_ms is None else policy.deadline_ms / 1000
    if deadline_s is not None and not isinstance(guard, ResilientGuard):
        timeout_s = deadline_s if timeout_s is None else min(timeout_s, deadline_s)
    return on_terms(guard, Terms(deadline_s, policy.degraded == "edge", policy.instructions)), timeout_s


async def surely(work: Coroutine[Any, Any, T]) -> T:
    """Do this to its end, also when the caller is cancelled meanwhile; the cancellation goes on afterwards."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise


async def _verdict(conversation: Conversation, guard: Guard, timeout_s: float | None) -> Verdict | GuardFailure:
    try:
        return await within(guard.judge(conversation), timeout_s)
    except Exception as error:  # whatever goes wrong inside a guard is the third outcome, and must be decided too
        return failure_of(error, guard.name)


def failure_of(error: Exception, guard: str) -> GuardFailure:
    """What is recorded of an exception that a guard raised. Only our own errors promise to quote no user text."""
    if isinstance(error, GuardError):
        return GuardFailure(type(error).__name__, str(error), guard)
    if isinstance(error, TimeoutError):
        return GuardFailure(GuardTimeout.__name__, "the guard did not answer in time", guard)
    return GuardFailure(type(error).__name__, "the guard broke down", guard)


def _not_judged(path: Coverage) -> Coverage:
    return replace(path, state=CoverageState.NOT_JUDGED) if path.state is CoverageState.JUDGED else path


_CHANNELS: Final = {
    Role.SYSTEM: Channel.SYSTEM,
    Role.USER: Channel.USER,
    Role.ASSISTANT: Channel.ANSWER,
    Role.TOOL: Channel.TOOL_RESULT,
}


def coverage_of(conversation: Conversation) -> tuple[Coverage, ...]:
    """One path for each text of a conversation, given that its last turn is judged and no other."""
    last = len(conversation.turns) - 1
    return tuple(
        Coverage(path, channel, CoverageState.JUDGED if index == last else CoverageState.NOT_JUDGED, len(text))
        for index, turn in enumerate(conversation.turns)
        for path, channel, text in _texts_of(index, turn)
        if text or path.endswith("content")
    )


def _texts_of(index: int, turn: Turn) -> Iterable[tuple[str, Channel, str]]:
    yield f"turns[{index}].content", _CHANNELS[turn.role], turn.content
    yield f"turns[{index}].reasoning", Channel.REASONING, turn.reasoning
    for number, call in enumerate(turn.tool_calls):
        yield f"turns[{index}].tool_calls[{number}].arguments", Channel.TOOL_CALL, call.arguments
