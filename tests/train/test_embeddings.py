"""Spectral embeddings: tokens that keep the same company lie near each other, and the arithmetic is what it says."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("scipy")
pytest.importorskip("sklearn")

from tidegate.train.embeddings import _window_counts, spectral_embeddings

SIZE = 40


def two_topics(count: int = 400) -> list[list[int]]:
    """Texts about one of two topics: tokens 0 to 9 meet each other, 10 to 19 too; 20 to 24 are everywhere."""
    rng = np.random.default_rng(0)
    found = []
    for n in range(count):
        topic = rng.integers(0, 10, 8) + (10 if n % 2 else 0)
        found.append(rng.permutation([*topic, *rng.integers(20, 25, 3)]).tolist())
    return found


def likeness(vectors: np.ndarray, a: slice, b: slice) -> float:
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return float((unit[a] @ unit[b].T).mean())


def test_tokens_of_one_topic_are_nearer_to_each_other_than_to_the_other_topic() -> None:
    vectors = spectral_embeddings(two_topics(), vocab_size=SIZE, dim=8)
    inside = likeness(vectors, slice(0, 10), slice(0, 10))
    across = likeness(vectors, slice(0, 10), slice(10, 20))
    assert inside > across + 0.3


def test_shape_type_and_scale_are_as_asked() -> None:
    vectors = spectral_embeddings(two_topics(), vocab_size=SIZE, dim=8, scale=0.05)
    assert (vectors.shape, vectors.dtype) == ((SIZE, 8), np.float32)
    assert np.isfinite(vectors).all()
    assert np.sqrt((vectors[:25] ** 2).mean()) == pytest.approx(0.05, rel=0.01)


def test_tokens_never_seen_get_small_random_rows_that_differ() -> None:
    unseen = spectral_embeddings(two_topics(), vocab_size=SIZE, dim=8)[25:]
    assert np.abs(unseen).max() < 0.05 * 3
    assert len(np.unique(unseen, axis=0)) == len(unseen)


def test_the_same_seed_gives_the_same_table() -> None:
    first, again = (spectral_embeddings(two_topics(50), vocab_size=SIZE, dim=4, seed=5) for _ in range(2))
    assert np.array_equal(first, again)


def test_company_counts_within_the_window_nearer_tokens_more_and_never_across_texts() -> None:
    counts = _window_counts([[1, 2, 3, 1], [4, 5]], 6, 2).toarray()
    expected = np.zeros((6, 6))
    expected[1, 2] = expected[2, 3] = expected[3, 1] = expected[4, 5] = 1.0
    expected[1, 3] = expected[2, 1] = 0.5
    assert np.array_equal(counts, expected)
