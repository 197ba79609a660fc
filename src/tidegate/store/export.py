"""Kept decisions as rows of plain values, for files that other programs read."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, TextIO

from tidegate.store.decisions import KeptDecision
from tidegate.store.retention import conversation_to_json

__all__ = ["export_row", "write_jsonl"]


def export_row(kept: KeptDecision) -> dict[str, Any]:
    """One decision as JSON values; all keys are always there, None where there is nothing."""
    decision, verdict, failure = kept.decision, kept.decision.verdict, kept.decision.failure
    return {
        "id": kept.id,
        "time": kept.time.isoformat(),
        "action": decision.action.word,
        "rule": decision.rule,
        "policy": decision.policy,
        "policy_version": decision.policy_version,
        "advice": [advice.value for advice in decision.advice],
        "observed": decision.observed and {"action": decision.observed.action.word, "rule": decision.observed.rule},
        "guard": verdict.guard if verdict else failure.guard if failure else "",
        "target": verdict and verdict.target.value,
        "severity": verdict and verdict.severity.word,
        "probabilities": verdict
        and {
            "safe": verdict.probabilities.safe,
            "controversial": verdict.probabilities.controversial,
            "unsafe": verdict.probabilities.unsafe,
        },
        "categories": list(verdict.categories) if verdict else [],
        "category_probabilities": dict(verdict.category_probabilities) if verdict else {},
        "refusal": verdict and verdict.refusal,
        "reason": verdict and verdict.reason,
        "span": [verdict.span.start, verdict.span.end] if verdict and verdict.span else None,
        "failure": failure and {"kind": failure.kind, "message": failure.message},
        "tenant": decision.scope.tenant,
        "region": decision.scope.region,
        "route": decision.scope.route,
        "language": decision.scope.language,
        "subject": kept.subject,
        "interventions": [asdict(one) for one in decision.interventions],
        "leaked": decision.leaked,
        "coverage": [
            {"path": c.path, "channel": c.channel.value, "state": c.state.value, "characters": c.characters}
            for c in decision.coverage
        ],
        "retention": kept.retention,
        "conversation": None if kept.conversation is None else json.loads(conversation_to_json(kept.conversation)),
        "fingerprint": kept.fingerprint,
    }


def write_jsonl(decisions: Iterable[KeptDecision], out: TextIO) -> int:
    """One JSON object a line, in ASCII, so that any string survives; returns how many."""
    count = 0
    for kept in decisions:
        out.write(json.dumps(export_row(kept)) + "\n")
        count += 1
    return count
