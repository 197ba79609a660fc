"""Earlier turns of a conversation, judged where the policy says so, and what is found in them.

An earlier turn may have been judged when it was new, or a client may have made it up. Each is judged as what it is: a
turn of the assistant as a response to what came before it, every other one as a prompt. A guard with a memory
(`tidegate.guards.remembered`) is asked about each once, so that a conversation that goes on costs its new turns only.

What is found counts for no more than the policy's ``history`` says, because an old false positive would otherwise stop
every request that follows. Only so many are judged at once, and all of them together have as long as one text has; what
that was too short for is a failure of the guard.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Final

from tidegate.errors import GuardTimeout
from tidegate.guards.base import Guard
from tidegate.moderate import moderate
from tidegate.policy import Policy, decide
from tidegate.types import Conversation, Coverage, CoverageState, Decision, GuardFailure, Role, Scope, Turn

__all__ = ["AT_ONCE", "covered_with", "judge_earlier", "judge_turns", "worst_of"]

AT_ONCE: Final = 8
"""So many earlier turns of one request are judged at the same time."""


async def judge_earlier(
    conversations: Sequence[Conversation], *, guard: Guard, policy: Policy, scope: Scope, timeout_s: float | None
) -> list[Decision]:
    """What each earlier turn means now: the decisions on the last turns of these, without coverage.

    Args:
        conversations: each ends with an earlier turn; those that are worth most come last.
        guard: judges.
        policy: decides; without layers, as `Policy.at` gives it.
        scope: for whom.
        timeout_s: seconds for all of them together, greater than 0; None for as long as the guard wants. The policy's
            deadline counts too.
    """
    if policy.deadline_ms is not None:
        deadline_s = policy.deadline_ms / 1000
        timeout_s = deadline_s if timeout_s is None else min(timeout_s, deadline_s)
    loop = asyncio.get_running_loop()
    until = None if timeout_s is None else loop.time() + timeout_s
    gate = asyncio.Semaphore(AT_ONCE)

    async def judge(conversation: Conversation) -> Decision:
        async with gate:
            left_s = None if until is None else until - loop.time()
            if left_s is not None and left_s <= 0:
                late = GuardFailure(GuardTimeout.__name__, "there was no time left for earlier turns", guard.name)
                return policy.on_earlier(decide(policy, late, scope))
            decision = await moderate(
                conversation, guard=guard, policy=policy, scope=scope, timeout_s=left_s, coverage=()
            )
        return policy.on_earlier(decision)

    decisions = await asyncio.gather(*map(judge, reversed(conversations)))
    return decisions[::-1]


async def judge_turns(
    turns: Sequence[Turn], *, guard: Guard, policy: Policy, scope: Scope, timeout_s: float | None
) -> dict[int, Decision]:
    """What these earlier turns mean now, by their places; nothing where the policy has none judged.

    Args:
        turns: those before the text that is new, from the first one on.
        guard: judges.
        policy: decides; without layers, as `Policy.at` gives it.
        scope: for whom.
        timeout_s: as in `judge_earlier`.
    """
    if not policy.history.judge:
        return {}
    places = [
        place
        for place, turn in enumerate(turns)
        if turn.role is not Role.SYSTEM and (turn.content or turn.reasoning or turn.tool_calls)
    ][-policy.history.turns :]
    talks = [Conversation(tuple(turns[: place + 1])) for place in places]
    decisions = await judge_earlier(talks, guard=guard, policy=policy, scope=scope, timeout_s=timeout_s)
    return dict(zip(places, decisions, strict=True))


def worst_of(last: int, decision: Decision, earlier: Mapping[int, Decision]) -> tuple[int, Decision]:
    """The decision that counts and the turn that it is about: the last one, unless an earlier one calls for more."""
    worst = max(earlier, key=lambda place: earlier[place].action, default=last)
    if worst != last and earlier[worst].action > decision.action:
        return worst, earlier[worst]
    return last, decision


def covered_with(coverage: Iterable[Coverage], earlier: Mapping[int, Decision]) -> tuple[Coverage, ...]:
    """The coverage of all turns, by paths as ``turns[3].content``, with the earlier ones that were judged."""
    judged = {place for place, one in earlier.items() if one.failure is None}
    return tuple(
        replace(part, state=CoverageState.JUDGED) if _place_of(part.path) in judged else part for part in coverage
    )


def _place_of(path: str) -> int:
    return int(path[len("turns[") : path.index("]")])
