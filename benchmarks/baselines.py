"""The classifiers that the edge guard is measured against: TF-IDF with logistic regression, and two profanity filters.

The regression is that of tidegate.data.ngrams, one trained for prompts and one for responses.

The filters are alt-profanity-check (a linear classifier of English comments) and better-profanity (a word list). They
are asked exactly as their packages answer; the word list is only looked up faster (see `WordListFilter`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tidegate.types import Example

__all__ = [
    "CommentFilter",
    "WordListFilter",
]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


# --- profanity filters ---------------------------------------------------------------------------------------------


class CommentFilter:
    """alt-profanity-check: the probability that a text is profane, by a linear classifier of English comments."""

    def __init__(self) -> None:
        import profanity_check

        self._check: Any = profanity_check

    def scores(self, texts: Iterable[str]) -> Floats:
        """Probability per text, in [0, 1]."""
        found = [self._check.predict_prob(part) for part in _parts(list(texts), 2000)]
        return np.concatenate(found).astype(np.float64)


class WordListFilter:
    """better-profanity: 1 when a text has a word of its list (or a spelling of one with signs for letters), else 0.

    The package compares every word of a text to every entry of its list in turn, milliseconds a word. Here the same
    comparison of a word is made once and remembered, and only with entries of its length: the answers are the same.
    """

    def __init__(self) -> None:
        from better_profanity import Profanity

        self._filter: Any = Profanity()
        self._filter.CENSOR_WORDSET = _Remembered(self._filter.CENSOR_WORDSET)

    def scores(self, texts: Iterable[str]) -> Floats:
        """0 or 1 per text."""
        return np.asarray([float(self._filter.contains_profanity(text)) for text in texts])


class _Remembered:
    """A list of words with varying letters, that remembers what was looked up."""

    def __init__(self, words: Sequence[Any]) -> None:
        self._by_length: dict[int, list[tuple[frozenset[str], ...]]] = {}
        for word in words:
            letters = tuple(frozenset(choices) for choices in word._char_combos)
            if any(len(choice) != 1 for choices in letters for choice in choices):
                raise ValueError("this version of better-profanity replaces letters by several signs")
            self._by_length.setdefault(len(letters), []).append(letters)
        self._known: dict[str, bool] = {}

    def __len__(self) -> int:
        return sum(map(len, self._by_length.values()))

    def __contains__(self, word: str) -> bool:
        known = self._known.get(word)
        if known is None:
            entries = self._by_length.get(len(word), ())
            known = any(all(c in choices for c, choices in zip(word, entry, strict=True)) for entry in entries)
            self._known[word] = known
        return known


def _parts(texts: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for at in range(0, len(texts), size):
        yield texts[at : at + size]


def severities_of(examples: Iterable[Example]) -> Ints:
    """Labels as integers. Raises ValueError for an example without a label."""
    found = []
    for example in examples:
        if example.severity is None:
            raise ValueError("a baseline is trained on labelled examples only")
        found.append(int(example.severity))
    return np.asarray(found, np.int64)


def versions() -> Mapping[str, str]:
    """Versions of the packages that decide the scores."""
    from importlib.metadata import version

    return {name: version(name) for name in ("scikit-learn", "alt-profanity-check", "better-profanity")}
