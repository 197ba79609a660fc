"""The figures equal their definitions, on small cases by hand and on drawn ones by counting."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.evals.metrics import (
    Calibration,
    auroc,
    best_threshold,
    calibrated,
    expected_calibration_error,
    fit_calibration,
    negative_log_likelihood,
    score,
    softmax,
)

ROWS = st.lists(
    st.tuples(st.booleans(), st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.5000001, 0.9, 1.0])), min_size=1, max_size=30
)


def arrays(rows: list[tuple[bool, float]]) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray([flag for flag, _ in rows]), np.asarray([value for _, value in rows])


def f1_of(positive: np.ndarray, called: np.ndarray, weights: np.ndarray) -> float:
    hits = float((weights * (positive & called)).sum())
    return 2 * hits / float((weights * positive).sum() + (weights * called).sum())


@given(ROWS)
def test_auroc_is_the_share_of_pairs_in_the_right_order_with_ties_counted_half(rows: list[tuple[bool, float]]) -> None:
    positive, scores = arrays(rows)
    pairs = [1.0 if up > down else 0.5 if up == down else 0.0 for up in scores[positive] for down in scores[~positive]]
    found = auroc(positive, scores)
    assert (found is None) == (not pairs)
    if found is not None:
        assert found == pytest.approx(float(np.mean(pairs)), abs=1e-12)


@given(ROWS)
def test_auroc_does_not_depend_on_the_order_of_rows_nor_on_a_rising_change_of_scores(
    rows: list[tuple[bool, float]],
) -> None:
    positive, scores = arrays(rows)
    assert auroc(positive, scores) == auroc(positive[::-1], scores[::-1])
    assert auroc(positive, scores) == auroc(positive, 3 * scores - 7)


def test_rates_by_hand() -> None:
    positive = np.asarray([True, True, True, False, False])
    found = score(positive, np.asarray([True, True, False, True, False]))
    assert (found.rows, found.positives) == (5, 3)
    assert found.precision == pytest.approx(2 / 3)
    assert found.recall == pytest.approx(2 / 3)
    assert found.f1 == pytest.approx(2 / 3)
    assert found.false_positive_rate == pytest.approx(1 / 2)
    assert found.auroc is None
    assert found.as_dict()["rows"] == 5


def test_rates_that_are_not_defined_are_none() -> None:
    safe = score(np.asarray([False, False]), np.asarray([True, False]), np.asarray([0.9, 0.1]))
    assert (safe.recall, safe.f1, safe.auroc) == (None, None, None)
    assert safe.false_positive_rate == 0.5
    unsafe = score(np.asarray([True, True]), np.asarray([False, False]))
    assert (unsafe.precision, unsafe.false_positive_rate) == (None, None)
    assert (unsafe.recall, unsafe.f1) == (0.0, 0.0)


@given(ROWS, st.booleans(), st.booleans())
def test_no_threshold_has_a_better_f1_than_the_best(
    rows: list[tuple[bool, float]], weighted: bool, below_zero: bool
) -> None:
    positive, scores = arrays(rows)
    if not positive.any():
        return
    scores = scores - 2 if below_zero else scores
    weights = np.arange(1, len(rows) + 1, dtype=float) if weighted else np.ones(len(rows))
    threshold = best_threshold(positive, scores, weights if weighted else None)
    best = f1_of(positive, scores >= threshold, weights)
    assert all(best >= f1_of(positive, scores >= other, weights) - 1e-12 for other in scores)


def test_a_threshold_lies_between_the_last_flagged_and_the_first_other_score() -> None:
    positive = np.asarray([True, True, False, False])
    assert best_threshold(positive, np.asarray([0.9, 0.8, 0.2, 0.1])) == pytest.approx(0.5)


def test_a_threshold_between_neighbouring_floats_still_parts_them() -> None:
    low = 0.3
    high = float(np.nextafter(low, 1.0))
    for a, b in ((high, low), (float(np.nextafter(high, 1.0)), high)):
        threshold = best_threshold(np.asarray([True, False]), np.asarray([a, b]))
        assert b < threshold <= a


def test_a_threshold_needs_a_positive_row() -> None:
    with pytest.raises(ValueError, match="at least one positive"):
        best_threshold(np.asarray([False]), np.asarray([0.5]))


def test_softmax_of_large_logits_is_finite() -> None:
    found = softmax(np.asarray([[1000.0, 0.0, -1000.0], [2.0, 2.0, 2.0]]))
    assert np.allclose(found, [[1, 0, 0], [1 / 3, 1 / 3, 1 / 3]])


@pytest.mark.parametrize(("temperature", "spread"), [(2.0, 3.0), (0.5, 1.0), (4.0, 12.0)])
def test_fitting_finds_the_temperature_and_bias_that_labels_were_drawn_with(temperature: float, spread: float) -> None:
    rng = np.random.default_rng(3)
    logits = rng.normal(0, spread, (6_000, 3))
    bias = np.asarray([0.5, -0.3, -0.2])
    true = calibrated(logits, Calibration(temperature, tuple(bias)))
    labels = (rng.random((len(true), 1)) > true.cumsum(axis=1)[:, :2]).sum(axis=1)
    found = fit_calibration(logits, labels)
    assert found.temperature == pytest.approx(temperature, rel=0.08)
    assert np.asarray(found.bias) == pytest.approx(bias, abs=0.12)
    assert sum(found.bias) == pytest.approx(0, abs=1e-9)


def test_fitting_with_weights_equals_fitting_on_repeated_rows() -> None:
    rng = np.random.default_rng(4)
    logits, labels = rng.normal(0, 2, (300, 3)), rng.integers(0, 3, 300)
    weights = rng.integers(1, 4, 300)
    weighted = fit_calibration(logits, labels, weights.astype(float))
    repeated = fit_calibration(np.repeat(logits, weights, axis=0), np.repeat(labels, weights))
    assert weighted.temperature == pytest.approx(repeated.temperature)
    assert weighted.bias == pytest.approx(repeated.bias)


def test_calibration_never_raises_the_likelihood_loss_of_what_it_was_fitted_on() -> None:
    rng = np.random.default_rng(5)
    for spread in (0.1, 1.0, 30.0):
        logits, labels = rng.normal(0, spread, (500, 3)), rng.integers(0, 3, 500)
        ones = np.ones(500)
        before = negative_log_likelihood(softmax(logits), labels, ones)
        after = negative_log_likelihood(calibrated(logits, fit_calibration(logits, labels)), labels, ones)
        assert after <= before + 1e-6


def test_calibration_error_is_nothing_for_honest_and_the_gap_for_boastful_probabilities() -> None:
    honest = np.repeat([0.25, 0.75], 400)
    positive = np.concatenate([np.arange(400) < 100, np.arange(400) < 300])
    assert expected_calibration_error(positive, honest) == pytest.approx(0, abs=1e-12)
    assert expected_calibration_error(positive, np.full(800, 1.0)) == pytest.approx(0.5)


def test_a_second_opinion_gets_the_weight_that_it_deserves() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 3000)
    one = np.eye(3)[labels] + rng.normal(size=(3000, 3))
    other = np.eye(3)[labels] + rng.normal(size=(3000, 3))
    both = fit_calibration(one, labels, more=other)
    assert both.weight == pytest.approx(1 / both.temperature, rel=0.15)
    noise = fit_calibration(one, labels, more=rng.normal(size=(3000, 3)))
    assert noise.weight < 0.1 / noise.temperature
    assert fit_calibration(one, labels).weight == 0
    alone = negative_log_likelihood(calibrated(one, fit_calibration(one, labels)), labels, np.ones(3000))
    assert negative_log_likelihood(calibrated(one, both, other), labels, np.ones(3000)) < alone - 0.05
