"""Token embeddings that know which tokens keep the same company, before training begins.

Positive pointwise mutual information of tokens within a window, factorised by a truncated SVD (Levy and Goldberg 2014;
context distribution smoothing after Levy, Goldberg and Dagan 2015). It takes a minute on unlabelled text and gives a
small model, trained on little, a first idea of meaning in every language of the corpus.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["spectral_embeddings"]


def spectral_embeddings(
    sequences: Sequence[Sequence[int]],
    *,
    vocab_size: int,
    dim: int,
    window: int = 5,
    scale: float = 0.05,
    seed: int = 0,
) -> npt.NDArray[np.float32]:
    """Embeddings ``[vocab_size, dim]`` float32 from token sequences.

    Args:
        sequences: token ids of many texts.
        vocab_size: number of rows.
        dim: number of columns.
        window: how many tokens to either side count as company.
        scale: root mean square of the entries of tokens that were seen.
        seed: of the random projection and of the rows of tokens that were never seen.
    """
    from scipy.sparse import csr_array
    from sklearn.utils.extmath import randomized_svd

    counts = _window_counts(sequences, vocab_size, window)
    counts = csr_array(counts + counts.T)
    totals = np.asarray(counts.sum(axis=1)).ravel()
    smoothed = totals**0.75
    smoothed /= smoothed.sum()
    grand = totals.sum()
    entries = counts.tocoo()
    ratio = entries.data * grand / (totals[entries.row] * smoothed[entries.col] * grand)
    keep = ratio > 1.0
    matrix = csr_array(
        (np.log(ratio[keep]).astype(np.float32), (entries.row[keep], entries.col[keep])), shape=counts.shape
    )
    left, singular, _ = randomized_svd(matrix, n_components=dim, n_iter=3, random_state=seed)
    vectors = left * np.sqrt(singular)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    seen = norms[:, 0] > 1e-6
    vectors[seen] /= norms[seen] ** 0.5
    vectors *= scale / np.sqrt((vectors[seen] ** 2).mean())
    rng = np.random.default_rng(seed)
    vectors[~seen] = rng.normal(0.0, scale / 2, (int((~seen).sum()), dim))
    return np.asarray(vectors, dtype=np.float32)


def _window_counts(sequences: Sequence[Sequence[int]], vocab_size: int, window: int):  # type: ignore[no-untyped-def]
    """How often token b follows token a within the window, nearer ones counting more, as a sparse array."""
    from scipy.sparse import csr_array

    flat = np.concatenate([np.asarray([*sequence, *([-1] * window)], dtype=np.int64) for sequence in sequences])
    total = csr_array((vocab_size, vocab_size), dtype=np.float64)
    for distance in range(1, window + 1):
        first, second = flat[:-distance], flat[distance:]
        inside = (first >= 0) & (second >= 0)
        keys, hits = np.unique(first[inside] * vocab_size + second[inside], return_counts=True)
        part = csr_array((hits / distance, (keys // vocab_size, keys % vocab_size)), shape=(vocab_size, vocab_size))
        total = total + part
    return total
