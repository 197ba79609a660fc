"""TF-IDF of n-grams with logistic regression: the usual strong and simple classifier of texts.

Word 1-2-grams and character 2-5-grams, TF-IDF with sublinear counts, and one logistic regression for each of Safe,
Controversial and Unsafe, their probabilities made to add up to 1. The n-grams are hashed into 4 million columns of
which the most frequent are kept: the counts then depend on no data, are computed once for all variants, and the memory
stays small. It is the baseline that the edge guard is measured against, and the teacher of data/distill.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array, hstack, vstack
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.linear_model import SGDClassifier

from tidegate.types import Example, Role, Severity, Target

__all__ = ["ClassifierSettings", "Counts", "TfIdfClassifier", "count_ngrams", "judged_text", "stacked"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def judged_text(example: Example, *, with_prompt: bool = False) -> str:
    """The text that a baseline reads: the judged turn, with the last user turn before an answer when asked for."""
    *before, last = example.conversation.turns
    if not with_prompt or example.target is not Target.RESPONSE:
        return last.content
    prompts = [turn.content for turn in before if turn.role is Role.USER]
    return "\n".join([*prompts[-1:], last.content])


@dataclass(frozen=True, slots=True)
class ClassifierSettings:
    """What decides a TF-IDF classifier.

    Attributes:
        word_features: how many word 1-2-grams are kept at most, the most frequent first.
        char_features: the same for character 2-5-grams.
        min_rows: n-grams that are in fewer training rows are left out.
        penalty: strength of the L2 penalty, per row.
        epochs: passes of stochastic gradient descent over the training rows.
    """

    word_features: int = 200_000
    char_features: int = 400_000
    min_rows: int = 3
    penalty: float = 1e-6
    epochs: int = 12


@dataclass(frozen=True, slots=True)
class Counts:
    """Hashed n-gram counts of texts: one sparse row per text, float32."""

    words: csr_array
    chars: csr_array

    def rows(self, chosen: Ints) -> Counts:
        """The counts of some of the texts, in the order given."""
        return Counts(self.words[chosen], self.chars[chosen])


_WORDS = HashingVectorizer(
    n_features=2**22,
    ngram_range=(1, 2),
    token_pattern=r"\w+",  # noqa: S106 - no password
    alternate_sign=False,
    norm=None,
    dtype=np.float32,
)
_COLUMN_BITS = 22
_AT_A_TIME = 2_000_000
"""Characters counted in one go: some 300 MB while it lasts."""


def count_ngrams(texts: Sequence[str]) -> Counts:
    """Count the n-grams of at least one text (lower case, runs of blanks as one space)."""
    plain = [" ".join(text.lower().split()) for text in texts]
    parts, at = [], 0
    while at < len(plain):
        end, size = at, 0
        while end < len(plain) and (size == 0 or size + len(plain[end]) <= _AT_A_TIME):
            size += len(plain[end])
            end += 1
        parts.append(_count_chars(plain[at:end]))
        at = end
    return Counts(csr_array(_WORDS.transform(plain)), csr_array(vstack(parts, format="csr")))


def _count_chars(texts: Sequence[str]) -> csr_array:
    """Hashed character 2-5-grams of texts, all at once: a rolling hash, then equal ones of a text side by side."""
    codes = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    row = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
    rolling, found = codes, []
    for n in range(2, 6):
        rolling = rolling[:-1] * np.uint64(0x9E3779B97F4A7C15) + codes[n - 1 :]
        inside = row[: max(0, len(row) - n + 1)] == row[n - 1 :]
        mixed = (rolling[inside] ^ (rolling[inside] >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
        column = (mixed >> np.uint64(64 - _COLUMN_BITS)).astype(np.int64)
        found.append((row[: len(inside)][inside] << _COLUMN_BITS) | column)
    keys = np.sort(np.concatenate(found))
    first = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]]) if len(keys) else np.zeros(0, np.int64)
    counts = np.diff(np.r_[first, len(keys)]).astype(np.float32)
    starts = np.searchsorted(keys[first] >> _COLUMN_BITS, np.arange(len(texts) + 1)).astype(np.int32)
    columns = (keys[first] & ((1 << _COLUMN_BITS) - 1)).astype(np.int32)
    return csr_array((counts, columns, starts), shape=(len(texts), 1 << _COLUMN_BITS))


def stacked(parts: Sequence[Counts]) -> Counts:
    """Counts of several groups of texts, one below the other."""
    return Counts(_below([part.words for part in parts]), _below([part.chars for part in parts]))


def _below(parts: Sequence[csr_array]) -> csr_array:
    return csr_array(vstack(parts, format="csr"))


class _Weighting:
    """Which hashed columns are kept, and the inverse document frequency of each."""

    def __init__(self, counts: csr_array, features: int, min_rows: int) -> None:
        frequency = np.bincount(counts.indices, minlength=counts.shape[1])
        kept = np.flatnonzero(frequency >= min_rows)
        if len(kept) > features:
            order = np.argsort(-frequency[kept], kind="stable")[:features]
            kept = np.sort(kept[order])
        self.column = np.full(counts.shape[1], -1, np.int32)
        self.column[kept] = np.arange(len(kept), dtype=np.int32)
        self.inverse = (np.log((1 + counts.shape[0]) / (1 + frequency[kept])) + 1).astype(np.float32)

    def apply(self, counts: csr_array) -> csr_array:
        """TF-IDF rows of length 1."""
        column = self.column[counts.indices]
        kept = column >= 0
        before = np.concatenate([[0], np.cumsum(kept)])
        indptr, indices = before[counts.indptr].astype(np.int32), column[kept]
        values = (1 + np.log(counts.data[kept])) * self.inverse[indices]
        squares = np.concatenate([[0.0], np.cumsum(np.square(values, dtype=np.float64))])
        length = np.sqrt(np.maximum(squares[indptr[1:]] - squares[indptr[:-1]], 1e-12))
        values = values / np.repeat(length, np.diff(indptr)).astype(np.float32)
        return csr_array((values.astype(np.float32), indices, indptr), shape=(counts.shape[0], len(self.inverse)))


class TfIdfClassifier:
    """TF-IDF and logistic regression, each severity against the others, trained once.

    Args:
        counts: of the training texts.
        severities: their labels, as integers.
        settings: sizes, penalty and length of training.
    """

    def __init__(self, counts: Counts, severities: Ints, settings: ClassifierSettings | None = None) -> None:
        self.settings = settings or ClassifierSettings()
        self._words = _Weighting(counts.words, self.settings.word_features, self.settings.min_rows)
        self._chars = _Weighting(counts.chars, self.settings.char_features, self.settings.min_rows)
        # averaged SGD: a fraction of the time of L-BFGS
        self._model = SGDClassifier(
            loss="log_loss",
            alpha=self.settings.penalty,
            max_iter=self.settings.epochs,
            tol=None,
            average=True,
            random_state=0,
        )
        self._model.fit(self._features(counts), severities)

    @classmethod
    def of(
        cls, examples: Sequence[Example], *, with_prompt: bool = False, settings: ClassifierSettings | None = None
    ) -> TfIdfClassifier:
        """Train on labelled examples of one target."""
        severities = np.asarray([int(example.severity) for example in examples if example.severity is not None])
        return cls(count_ngrams([judged_text(e, with_prompt=with_prompt) for e in examples]), severities, settings)

    def probabilities(self, texts: Sequence[str]) -> Floats:
        """Probabilities ``[texts, 3]`` of Safe, Controversial and Unsafe."""
        return self.of_counts(count_ngrams(texts))

    def of_counts(self, counts: Counts) -> Floats:
        """The same for texts whose n-grams were counted before."""
        result = np.zeros((counts.words.shape[0], len(Severity)))
        result[:, self._model.classes_] = self._model.predict_proba(self._features(counts))
        return result

    def _features(self, counts: Counts) -> csr_array:
        return csr_array(hstack([self._words.apply(counts.words), self._chars.apply(counts.chars)], format="csr"))
