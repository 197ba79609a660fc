"""Disguises: the ways in which people hide words from filters, applied to training text.

Each disguise keeps the meaning for a reader, so the label stays. They are applied to safe and unsafe text alike, so
that the disguise itself says nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np

__all__ = ["DISGUISES", "disguise"]

_LOOKALIKES = str.maketrans("aeopcxyiAEOPCXHKMTB", "аеорсхуіАЕОРСХНКМТВ")
_LEET = str.maketrans("aeiostb", "4310578")
_LEET_SIGNS = str.maketrans("aisoe", "@!$0€")
_INVISIBLE = ("\u200b", "\u200c", "\u2060", "\u00ad")
_SEPARATORS = (" ", ".", "-", "_", "*")
_FULL_WIDTH_SHIFT = 0xFEE0


def disguise(text: str, rng: np.random.Generator) -> str:
    """Apply one disguise, drawn at random, to some words of the text (all of them for a change of case)."""
    return DISGUISES[int(rng.integers(len(DISGUISES)))](text, rng)


def _some_words(text: str, rng: np.random.Generator, change: Callable[[str], str], share: float = 0.35) -> str:
    words = text.split(" ")
    if len(words) == 1:
        return change(text)
    return " ".join(change(word) if len(word) > 2 and rng.random() < share else word for word in words)


def _upper(text: str, rng: np.random.Generator) -> str:
    return text.upper()


def _mixed_case(text: str, rng: np.random.Generator) -> str:
    flips = rng.random(len(text)) < 0.5
    return "".join(c.swapcase() if flip else c for c, flip in zip(text, flips, strict=True))


def _spaced(text: str, rng: np.random.Generator) -> str:
    separator = _SEPARATORS[int(rng.integers(len(_SEPARATORS)))]
    return _some_words(text, rng, lambda word: separator.join(word) if len(word) <= 12 else word, 0.25)


def _invisible(text: str, rng: np.random.Generator) -> str:
    mark = _INVISIBLE[int(rng.integers(len(_INVISIBLE)))]
    return _some_words(text, rng, lambda word: mark.join(word))


def _homoglyphs(text: str, rng: np.random.Generator) -> str:
    return _some_words(text, rng, lambda word: word.translate(_LOOKALIKES), 0.5)


def _leet(text: str, rng: np.random.Generator) -> str:
    table = _LEET if rng.random() < 0.6 else _LEET_SIGNS
    return _some_words(text, rng, lambda word: word.translate(table))


def _stretched(text: str, rng: np.random.Generator) -> str:
    def stretch(word: str) -> str:
        at = int(rng.integers(len(word))) if word else 0
        return word[:at] + word[at : at + 1] * int(rng.integers(2, 4)) + word[at + 1 :]

    return _some_words(text, rng, stretch)


def _typos(text: str, rng: np.random.Generator) -> str:
    def mistype(word: str) -> str:
        if len(word) < 4:
            return word
        at = int(rng.integers(1, len(word) - 1))
        if rng.random() < 0.5:
            return word[:at] + word[at + 1 :]
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]

    return _some_words(text, rng, mistype)


def _starred(text: str, rng: np.random.Generator) -> str:
    def star(word: str) -> str:
        at = int(rng.integers(1, len(word))) if len(word) > 3 else 0
        return word[:at] + "*" + word[at + 1 :] if at else word

    return _some_words(text, rng, star, 0.3)


def _full_width(text: str, rng: np.random.Generator) -> str:
    return "".join(chr(ord(c) + _FULL_WIDTH_SHIFT) if "!" <= c <= "~" else c for c in text)


def _no_spaces(text: str, rng: np.random.Generator) -> str:
    words = text.split(" ")
    joined = words[:1]
    for word in words[1:]:
        if rng.random() < 0.3:
            joined[-1] += word
        else:
            joined.append(word)
    return " ".join(joined)


def _broken_lines(text: str, rng: np.random.Generator) -> str:
    """Line breaks where there were blanks: after a sentence as likely as not, anywhere now and then."""
    words = text.split(" ")
    joined = words[:1]
    for before, word in pairwise(words):
        likely = 0.6 if before[-1:] in tuple(".!?,;:") else 0.12
        joined.append(("\n" if rng.random() < likely else " ") + word)
    return "".join(joined)


DISGUISES: tuple[Callable[[str, np.random.Generator], str], ...] = (
    _upper,
    _mixed_case,
    _spaced,
    _spaced,
    _invisible,
    _homoglyphs,
    _homoglyphs,
    _leet,
    _leet,
    _stretched,
    _typos,
    _typos,
    _starred,
    _full_width,
    _no_spaces,
    _broken_lines,
    _broken_lines,
)
