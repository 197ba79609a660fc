"""How good a guard is, in numbers: AUROC, F1, precision, recall, and the calibration of probabilities. Pure numpy.

A positive is a row whose label counts as unsafe: in *strict* mode Controversial and Unsafe, in *loose* mode Unsafe
alone (the two modes of the Qwen3Guard report).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Calibration", "Scores", "auroc", "best_threshold", "calibrated", "fit_calibration", "score"]

Array = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Scores:
    """Counts and rates of a yes/no call; a rate that is not defined is None (no positive or no negative row)."""

    rows: int
    positives: int
    precision: float | None
    recall: float | None
    f1: float | None
    false_positive_rate: float | None
    auroc: float | None

    def as_dict(self) -> dict[str, float | int | None]:
        """The same as a plain dict."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Calibration:
    """``softmax(logits / temperature + bias + weight * more)``: ``bias`` has one entry per class, ``more`` are the
    logits of a second opinion, where there is one."""

    temperature: float
    bias: tuple[float, ...]
    weight: float = 0.0


def auroc(positive: Flags, scores: Array) -> float | None:
    """Area under the ROC curve by ranks, ties counted half; None when one of the two classes is missing."""
    n_positive = int(positive.sum())
    n_negative = len(positive) - n_positive
    if not n_positive or not n_negative:
        return None
    order = np.argsort(scores, kind="stable")
    ranked = scores[order]
    starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])
    counts = np.diff(np.r_[starts, len(ranked)])
    mean_ranks = np.repeat(starts + (counts + 1) / 2.0, counts)
    ranks = np.empty(len(scores))
    ranks[order] = mean_ranks
    rank_sum = float(ranks[positive].sum())
    return (rank_sum - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative)


def score(positive: Flags, called: Flags, scores: Array | None = None) -> Scores:
    """Precision, recall, F1 and false-positive rate of the calls, and the AUROC of the scores when given."""
    hits = int((positive & called).sum())
    n_positive, n_called = int(positive.sum()), int(called.sum())
    n_negative = len(positive) - n_positive
    return Scores(
        rows=len(positive),
        positives=n_positive,
        precision=hits / n_called if n_called else None,
        recall=hits / n_positive if n_positive else None,
        f1=2 * hits / (n_positive + n_called) if n_positive else None,
        false_positive_rate=(n_called - hits) / n_negative if n_negative else None,
        auroc=None if scores is None else auroc(positive, scores),
    )


def best_threshold(positive: Flags, scores: Array, weights: Array | None = None) -> float:
    """The threshold (call when score >= it) with the highest F1; ``weights`` None counts every row once.

    Raises:
        ValueError: when there is no positive row.
    """
    if not positive.any():
        raise ValueError("a threshold needs at least one positive row")
    weight = np.ones(len(scores)) if weights is None else weights
    order = np.argsort(-scores, kind="stable")
    ranked, hit = scores[order], positive[order] * weight[order]
    hits, called = np.cumsum(hit), np.cumsum(weight[order])
    f1 = 2 * hits / (hit.sum() + called)
    last_of_tie = np.r_[ranked[1:] != ranked[:-1], True]
    best = int(np.argmax(np.where(last_of_tie, f1, -1.0)))
    following = ranked[best + 1] if best + 1 < len(ranked) else min(0.0, ranked[best])
    middle = float((ranked[best] + following) / 2)
    # the middle of two neighbouring floats is one of them
    return middle if middle > following else float(ranked[best])


def softmax(logits: Array) -> Array:
    """Softmax over the last axis, in float64."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    result: Array = shifted / shifted.sum(axis=-1, keepdims=True)
    return result


def calibrated(logits: Array, calibration: Calibration, more: Array | None = None) -> Array:
    """Probabilities ``[rows, classes]`` of logits, and of a second opinion's logits, under a calibration."""
    second = 0.0 if more is None else calibration.weight * more
    return softmax(logits / calibration.temperature + np.asarray(calibration.bias) + second)


def negative_log_likelihood(probabilities: Array, labels: npt.NDArray[np.int64], weights: Array) -> float:
    """Weighted mean of -log p(label), natural logarithm."""
    picked = probabilities[np.arange(len(labels)), labels]
    return float(-(weights * np.log(np.maximum(picked, 1e-12))).sum() / weights.sum())


def fit_calibration(
    logits: Array,
    labels: npt.NDArray[np.int64],
    weights: Array | None = None,
    *,
    more: Array | None = None,
    steps: int = 500,
) -> Calibration:
    """Temperature and bias that minimise the negative log likelihood (Guo et al. 2017, with a bias per class).

    Plain gradient descent with momentum on the inverse temperature, the weight of the second opinion (never negative)
    and the biases: convex, so it ends where it should.

    Args:
        logits: ``[rows, classes]``.
        labels: the class of each row.
        weights: of the rows; None for equal ones.
        more: logits of a second opinion, of the same shape; None when there is none, and its weight is then 0.
        steps: of the descent.
    """
    weight = np.ones(len(labels)) if weights is None else weights
    weight = weight / weight.sum()
    opinions = np.stack([logits] if more is None else [logits, more])
    scales, bias = np.asarray([1.0] if more is None else [1.0, 0.0]), np.zeros(logits.shape[1])
    least = np.asarray([0.05, 0.0])[: len(opinions)]
    speed_scales, speed_bias = np.zeros(len(opinions)), np.zeros(logits.shape[1])
    truth = np.eye(logits.shape[1])[labels]
    for _ in range(steps):
        gradient = (softmax(np.tensordot(scales, opinions, 1) + bias) - truth) * weight[:, None]
        speed_scales = 0.9 * speed_scales - 0.05 * (gradient * opinions).sum(axis=(1, 2))
        speed_bias = 0.9 * speed_bias - 0.3 * gradient.sum(axis=0)
        scales, bias = np.maximum(scales + speed_scales, least), bias + speed_bias
    bias -= bias.mean()
    return Calibration(
        temperature=float(1.0 / scales[0]),
        bias=tuple(float(b) for b in bias),
        weight=0.0 if more is None else float(scales[1]),
    )


def expected_calibration_error(positive: Flags, probabilities: Array, bins: int = 15) -> float:
    """Mean gap between stated probability and observed rate over equal-width bins, weighted by rows; in [0, 1]."""
    places = np.minimum((probabilities * bins).astype(int), bins - 1)
    gaps = 0.0
    for place in np.unique(places):
        inside = places == place
        gaps += inside.sum() * abs(float(probabilities[inside].mean()) - float(positive[inside].mean()))
    return gaps / len(probabilities)
