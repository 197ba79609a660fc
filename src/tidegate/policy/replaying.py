"""A candidate policy on decisions that were kept: what it would change, in numbers and by examples.

What is replayed is the verdict, not the text: no guard is asked. That is exact for whole texts. Of an answer that
streamed, the verdict is the one at the token where the old policy had its reason; a stricter candidate might have found
its reason earlier, so those are counted as estimates. A decision on several texts together has the verdict of the one
that was worst by the old policy.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from typing import Any

from tidegate.policy.deciding import Policy, decide
from tidegate.types import Action, Decision

__all__ = ["Change", "Replay"]


@dataclass(frozen=True, slots=True)
class Change:
    """One decision that the candidate would make differently.

    Attributes:
        identity: its id in the store.
        before: as it was made, or as the policy that is compared with makes it.
        after: as the candidate makes it.
    """

    identity: str
    before: Decision
    after: Decision

    def as_json(self) -> dict[str, Any]:
        """As JSON values."""
        verdict, failure = self.before.verdict, self.before.failure
        return {
            "id": self.identity,
            "before": {"action": self.before.action.word, "rule": self.before.rule},
            "after": {"action": self.after.action.word, "rule": self.after.rule},
            "target": verdict.target.value if verdict else None,
            "severity": verdict.severity.word if verdict else None,
            "unsafe": verdict.probabilities.unsafe if verdict else None,
            "categories": list(verdict.categories) if verdict else [],
            "failure": failure.kind if failure else None,
            "tenant": self.before.scope.tenant,
            "region": self.before.scope.region,
            "route": self.before.scope.route,
            "language": self.before.scope.language,
        }


class Replay:
    """Decisions as a candidate would make them.

    Args:
        candidate: the policy that is tried.
        against: what it is compared with; None for the decisions as they were made, under whatever policy it was.
        most_examples: so many changed decisions are kept of each kind of change, the first ones.

    Attributes:
        decisions: how many were replayed.
        actions: how many had one action before and another, or the same, after.
        rules: the same for pairs of rules, only where the action changed.
        estimates: how many have a verdict from the middle of a stream.
        failures: how many have no verdict: the candidate's word on failures was taken.
        observed: how many the candidate would make differently if all that it only observes were in force.
    """

    def __init__(self, candidate: Policy, *, against: Policy | None = None, most_examples: int = 3) -> None:
        self.candidate = candidate
        self.against = against
        self.decisions = 0
        self.estimates = 0
        self.failures = 0
        self.observed = 0
        self.actions: Counter[tuple[Action, Action]] = Counter()
        self.rules: Counter[tuple[str, str]] = Counter()
        self._most_examples = most_examples
        self._examples: defaultdict[tuple[Action, Action], list[Change]] = defaultdict(list)

    @property
    def changed(self) -> int:
        """How many would get another action."""
        return sum(count for (before, after), count in self.actions.items() if before is not after)

    @property
    def stricter(self) -> int:
        """How many would get a worse one."""
        return sum(count for (before, after), count in self.actions.items() if before < after)

    @property
    def milder(self) -> int:
        """How many would get a milder one."""
        return self.changed - self.stricter

    @property
    def examples(self) -> tuple[Change, ...]:
        """Some changed decisions of each kind of change, the most frequent kind first."""
        kinds = sorted(self._examples, key=lambda kind: (-self.actions[kind], kind))
        return tuple(change for kind in kinds for change in self._examples[kind])

    def add(self, identity: str, kept: Decision) -> None:
        """Replay one decision."""
        said = kept.verdict if kept.verdict is not None else kept.failure
        assert said is not None, "a decision has either a verdict or a failure"
        streamed = kept.verdict is not None and kept.verdict.span is not None
        before = kept if self.against is None else _as_made(decide(self.against, said, kept.scope), streamed=streamed)
        after = _as_made(decide(self.candidate, said, kept.scope), streamed=streamed)
        self.decisions += 1
        self.estimates += streamed
        self.failures += kept.failure is not None
        self.observed += after.observed is not None
        kind = (before.action, after.action)
        self.actions[kind] += 1
        if before.action is after.action:
            return
        self.rules[before.rule, after.rule] += 1
        if len(self._examples[kind]) < self._most_examples:
            self._examples[kind].append(Change(identity, before, after))

    def as_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "candidate": {"name": self.candidate.name, "version": self.candidate.version},
            "against": None if self.against is None else {"name": self.against.name, "version": self.against.version},
            "decisions": self.decisions,
            "changed": self.changed,
            "stricter": self.stricter,
            "milder": self.milder,
            "estimates": self.estimates,
            "failures": self.failures,
            "observed": self.observed,
            "actions": [
                {"before": before.word, "after": after.word, "count": count}
                for (before, after), count in sorted(self.actions.items())
            ],
            "rules": [
                {"before": before, "after": after, "count": count}
                for (before, after), count in self.rules.most_common()
            ],
            "examples": [change.as_json() for change in self.examples],
        }


def _as_made(decision: Decision, *, streamed: bool) -> Decision:
    """Nobody can redact a text that is still being written: there it is stopped."""
    if not streamed or decision.action is not Action.REDACT:
        return decision
    return replace(decision, action=Action.BLOCK)
