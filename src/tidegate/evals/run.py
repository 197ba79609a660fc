"""Put a guard to examples and see how good it is: strict and loose, by target, language group and source.

Severities are the guard's own calls; a guard that fails on a row has *not judged* it: such rows are counted apart and
enter the scores as not flagged. AUROC is of the probability of not being safe (strict) or of being unsafe (loose).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tidegate.data.examples import read_examples
from tidegate.data.mix import language_group
from tidegate.errors import GuardError, InputError
from tidegate.evals.metrics import Scores, expected_calibration_error, score
from tidegate.guards.base import Guard
from tidegate.types import Example, Severity, Verdict

__all__ = ["Judged", "evaluate", "judge_all", "language_group", "report", "scores_by"]

Progress = Callable[[int, int], None]
"""Called with rows judged and rows in all."""


@dataclass(frozen=True, slots=True)
class Judged:
    """An example and what a guard said of it; ``verdict`` None means that the guard failed, as ``failure`` says."""

    example: Example
    verdict: Verdict | None
    failure: str = ""
    benchmark: str = ""


async def evaluate(
    guard: Guard, paths: Sequence[Path], progress: Progress | None = None, *, concurrency: int = 64
) -> dict[str, Any]:
    """Judge every labelled example of the files.

    Args:
        guard: the guard.
        paths: ``.jsonl`` or ``.jsonl.gz`` files of examples; the name of a file is its benchmark's.
        progress: told after every row.
        concurrency: how many rows the guard has at a time, so that it can batch.

    Returns:
        ``{"guard", "rows", "not_judged", "overall", "by": {"target", "language", "source", "benchmark"}}``; each score
        has a ``strict`` and a ``loose`` side (see metrics.Scores).

    Raises:
        InputError: a file cannot be read, or no row has a label.
    """
    named = [(path.name.split(".")[0], example) for path in paths for example in read_examples(path)]
    labelled = [(name, example) for name, example in named if example.severity is not None]
    if not labelled:
        raise InputError("no row has a label: nothing to score", where=", ".join(str(path) for path in paths))
    judged = await judge_all(guard, [example for _, example in labelled], progress, concurrency=concurrency)
    judged = [
        Judged(row.example, row.verdict, row.failure, name) for row, (name, _) in zip(judged, labelled, strict=True)
    ]
    return report(judged, guard.name)


async def judge_all(
    guard: Guard, examples: Sequence[Example], progress: Progress | None = None, *, concurrency: int = 64
) -> list[Judged]:
    """What the guard says of each example, in order. Similar lengths are judged together, which pads less."""
    results: list[Judged | None] = [None] * len(examples)
    order = sorted(range(len(examples)), key=lambda i: _length(examples[i]))
    queue = iter(order)
    done = 0

    async def work() -> None:
        nonlocal done
        for index in queue:
            results[index] = await _judge_one(guard, examples[index])
            done += 1
            if progress:
                progress(done, len(examples))

    await asyncio.gather(*(work() for _ in range(min(concurrency, len(examples)))))
    return [row for row in results if row is not None]


async def _judge_one(guard: Guard, example: Example) -> Judged:
    try:
        return Judged(example, await guard.judge(example.conversation))
    except GuardError as error:
        return Judged(example, None, type(error).__name__)


def report(judged: Sequence[Judged], guard: str) -> dict[str, Any]:
    """All the figures of ``evaluate`` from rows that were judged."""
    groups: Mapping[str, Callable[[Judged], str]] = {
        "target": lambda row: row.example.target.value,
        "target_language": lambda row: f"{row.example.target.value}-{language_group(row.example.language)}",
        "language": lambda row: row.example.language,
        "source": lambda row: row.example.source,
        "benchmark": lambda row: row.benchmark,
    }
    return {
        "guard": guard,
        "rows": len(judged),
        "not_judged": sum(row.verdict is None for row in judged),
        "overall": both_modes(judged),
        "by": {name: scores_by(judged, key) for name, key in groups.items()},
    }


def scores_by(judged: Iterable[Judged], key: Callable[[Judged], str]) -> dict[str, dict[str, Any]]:
    """Scores of each group of rows, by the group's name."""
    groups: dict[str, list[Judged]] = {}
    for row in judged:
        groups.setdefault(key(row), []).append(row)
    return {name: both_modes(rows) for name, rows in sorted(groups.items())}


def both_modes(judged: Sequence[Judged]) -> dict[str, Any]:
    """Scores in strict and in loose mode, and the calibration error of the probability of not being safe."""
    strict, flagged = _mode(judged, Severity.CONTROVERSIAL)
    loose, _ = _mode(judged, Severity.UNSAFE)
    truth = np.asarray([_severity(row) is not Severity.SAFE for row in judged])
    return {
        "strict": strict.as_dict(),
        "loose": loose.as_dict(),
        "calibration_error": expected_calibration_error(truth, flagged),
    }


def _mode(judged: Sequence[Judged], bar: Severity) -> tuple[Scores, np.ndarray]:
    truth = np.asarray([_severity(row) >= bar for row in judged])
    called = np.asarray([row.verdict is not None and row.verdict.severity >= bar for row in judged])
    chances = np.asarray([row.verdict.probabilities.at_least(bar) if row.verdict else 0.0 for row in judged])
    return score(truth, called, chances), chances


def _severity(row: Judged) -> Severity:
    assert row.example.severity is not None
    return row.example.severity


def _length(example: Example) -> int:
    return len(example.conversation.turns[-1].content)
