"""Texts in pieces: how tests cut them, feed them, and compare what was said of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest

from tidegate.guards.base import Session
from tidegate.types import Probabilities, TokenVerdict


def cut(text: str, places: Sequence[int]) -> list[str]:
    """The text in pieces, of which some may be empty; a place beyond its end is counted from its beginning again."""
    ends = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[start:end] for start, end in pairwise(ends)]


async def streamed(session: Session, pieces: Sequence[str]) -> list[TokenVerdict]:
    """All that a session says of a text in these pieces."""
    verdicts: list[TokenVerdict] = []
    for piece in pieces:
        verdicts += await session.feed(piece)
    return verdicts + list(await session.finish())


def values(probabilities: Probabilities) -> tuple[float, float, float]:
    """Safe, controversial, unsafe."""
    return probabilities.safe, probabilities.controversial, probabilities.unsafe


def assert_same(some: Sequence[TokenVerdict], others: Sequence[TokenVerdict], noise: float = 1e-5) -> None:
    """The same spans, and probabilities that differ by no more than the noise of another order of adding."""
    assert [v.span for v in some] == [v.span for v in others]
    for one, other in zip(some, others, strict=True):
        assert values(one.probabilities) == pytest.approx(values(other.probabilities), abs=noise)
        assert one.category_probability == pytest.approx(other.category_probability, abs=noise)


def assert_covers(tokens: Sequence[TokenVerdict], text: str) -> None:
    """The spans begin at the text's beginning, leave no gap, and end at its end."""
    ends = [0, *(token.span.end for token in tokens)]
    assert [token.span.start for token in tokens] == ends[:-1]
    assert ends[-1] == len(text)
