"""A second opinion on every training example, from a teacher that never saw it.

Labels of the pack are noisy, and a small model that sees each text once learns more from "80 % unsafe" than from
"unsafe". The training rows are split in two by their opening message; a teacher is trained on each half and relabels
the other (label distillation as in the Qwen3Guard report, with a small teacher). The teacher is TF-IDF of
word 1-2-grams and character 2-5-grams with logistic regression: it knows spellings that a token table learns late.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import numpy as np

from tidegate.data.mix import teacher_key
from tidegate.data.ngrams import ClassifierSettings, TfIdfClassifier, count_ngrams
from tidegate.types import Example, Target

__all__ = ["cross_fitted"]


def cross_fitted(
    examples: Sequence[Example], *, epochs: int, progress: Callable[[str], None] | None = None
) -> dict[str, tuple[float, float, float]]:
    """P(Safe), P(Controversial), P(Unsafe) of each labelled example by a teacher that was trained without it.

    Args:
        examples: labelled examples; those that open with the same message are in the same half.
        epochs: passes over the half.
        progress: told what is done; None for silence.

    Returns:
        The probabilities by `mix.teacher_key`.

    Raises:
        ValueError: when the examples of a target cannot be split so that both halves have two severities.
    """
    found: dict[str, tuple[float, float, float]] = {}
    for target in Target:
        rows = [e for e in examples if e.target is target and e.severity is not None]
        if not rows:
            continue
        labels = np.asarray([int(e.severity or 0) for e in rows])
        counts = count_ngrams([e.conversation.turns[-1].content for e in rows])
        half = _halves(rows, labels)
        for place in (0, 1):
            rest, own = np.flatnonzero(half != place), np.flatnonzero(half == place)
            teacher = TfIdfClassifier(counts.rows(rest), labels[rest], ClassifierSettings(epochs=epochs))
            for index, probabilities in zip(own, teacher.of_counts(counts.rows(own)).tolist(), strict=True):
                found[teacher_key(rows[index])] = tuple(probabilities)
            if progress:
                progress(f"teacher of {target.value}s: half {place + 1} of 2")
    return found


def _halves(rows: Sequence[Example], labels: np.ndarray) -> np.ndarray:
    """0 or 1 for each example: by its opening message, or by its id when that leaves a half with nothing to tell."""
    for half_of in (_half, _half_by_id):
        halves = np.asarray([half_of(example) for example in rows])
        if all(len(set(labels[halves == place].tolist())) > 1 for place in (0, 1)):
            return halves
    raise ValueError(f"too few {rows[0].target.value} examples for a teacher: each half needs two severities")


def _half(example: Example) -> int:
    opening = example.conversation.turns[0].content
    return zlib.crc32(opening.encode("utf-8", "replace")) % 2


def _half_by_id(example: Example) -> int:
    return zlib.crc32(example.id.encode("utf-8", "replace")) % 2
