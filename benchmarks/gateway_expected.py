"""What each answer must lead to: as the same guard and policy release it when it is judged alone, in this process.

A single character more or less is an error, whoever is between.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from gateway_client import Received
from gateway_upstream import WORDS, answer, prompt
from tidegate.guards import load_guard
from tidegate.guards.base import StreamGuard
from tidegate.moderate import StreamModerator
from tidegate.policy import load_policy
from tidegate.types import Action, Conversation


@dataclass(frozen=True)
class Expected:
    """What one answer leads to when it is judged alone.

    Attributes:
        text: what may leave.
        bounds: how many characters may have left after each chunk; the last is for the end of the stream.
        blocked_from: where the flagged run of tokens begins; None when the answer was not blocked.
    """

    text: str
    bounds: tuple[int, ...]
    blocked_from: int | None = None

    def trigger(self, end: int) -> int:
        """Which chunk made the text up to here releasable."""
        return next(place for place, bound in enumerate(self.bounds) if bound >= end)


def passed(number: int, words: int = WORDS) -> Expected:
    """Without a guard everything leaves at once."""
    said = answer(number, words)
    return Expected("".join(said), tuple(itertools.accumulate(map(len, said))))


async def judged_alone(number: int, guard: StreamGuard, words: int = WORDS) -> Expected:
    """One answer through the policy, with nothing beside it."""
    moderator = StreamModerator(guard, load_policy("balanced"), context=Conversation.of(prompt(number)))
    text, bounds = "", []
    for word in answer(number, words):
        step = await moderator.feed(word)
        text += step.released
        bounds.append(len(text))
        if step.decision is not None:
            break
    else:
        step = await moderator.finish()
        text += step.released
        bounds.append(len(text))
    assert step.decision is not None
    blocked = step.decision.action is Action.BLOCK
    span = step.decision.verdict.span if step.decision.verdict else None
    return Expected(text, tuple(bounds), span.start if blocked and span else None)


async def all_judged_alone(spec: str, wanted: Iterable[tuple[int, int]]) -> tuple[str, dict[tuple[int, int], Expected]]:
    """The guard's name, and what it makes of each answer, by number and words."""
    guard = load_guard(spec)
    try:
        return guard.name, {(number, words): await judged_alone(number, guard, words) for number, words in wanted}
    finally:
        await guard.close()


def compare(name: str, found: Received, expected: Expected, *, tells_place: bool = True) -> list[str]:
    """What is not as it must be; nothing of an error quotes what was said."""
    errors = []
    if found.text != expected.text:
        errors.append(f"{name}: {len(found.text)} characters arrived, not the {len(expected.text)} due")
    reason = "stop" if expected.blocked_from is None else "content_filter"
    if found.finish_reason != reason or not found.done:
        errors.append(f"{name}: ended with {found.finish_reason}, done {found.done}; expected {reason}")
    if expected.blocked_from is not None and len(found.text) > expected.blocked_from:
        errors.append(f"{name}: text from {expected.blocked_from} on left")
    if tells_place and expected.blocked_from is not None and found.blocked_from != expected.blocked_from:
        errors.append(f"{name}: blocked from {found.blocked_from}, not from {expected.blocked_from}")
    return errors
