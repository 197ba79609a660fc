"""The table of n-grams learns what words tell, and is stored in 8 bits."""

from __future__ import annotations

import numpy as np
import pytest

from edge_folder import tiny_tokenizer
from tidegate.data.mix import Mix, MixPlan
from tidegate.model.tokens import TextTokenizer
from tidegate.model.wide import NgramHasher, WideTable
from tidegate.train.args import LossPart, TemplatePart, WidePart
from tidegate.types import Conversation, Example, Severity, Target

train_wide = pytest.importorskip("tidegate.train.wide").train_wide

TOKENS = TextTokenizer(tiny_tokenizer())
PLAN = MixPlan({"prompt-en": 1, "response-en": 1}, compose=0.2, disguise=0)
HARM, CALM = "burn the house of the neighbour", "bake the bread of the morning"


def mix() -> Mix:
    rows = []
    for n in range(60):
        for words, severity in ((HARM, Severity.UNSAFE), (CALM, Severity.SAFE)):
            answer = f"on day {n} you {words} and then you sleep"
            parts = (Conversation.of(f"{words}, {n}"), Conversation.of("what now", answer))
            rows += [Example(f"{n}{words}", part, part.target, severity, language="en") for part in parts]
    return Mix(rows, PLAN, 1)


def trained(seed: int = 5) -> tuple[np.ndarray, dict[str, float]]:
    values, scale = train_wide(
        mix(), TOKENS, WidePart(bits=14, texts=2500), TemplatePart(window=48), LossPart(), seed=seed
    )
    return values, dict(scale)


@pytest.mark.parametrize("target", Target)
def test_what_was_harmful_counts_for_unsafe_and_what_was_not_against_it(target: Target) -> None:
    values, scale = trained()
    table = WideTable(NgramHasher(TOKENS.token_bytes()), values)

    def unsafe(text: str) -> float:
        total = table.evidence(target, [token.id for token in TOKENS.encode(text)]).sum(axis=0)
        return float(total[0] * scale[target.value] / total[2] ** 0.5)

    assert unsafe(HARM) > 0.5 + unsafe(CALM)
    assert unsafe(f"on day 3 you {HARM}") > 0 > unsafe(f"on day 3 you {CALM}")


def test_the_same_seed_gives_the_same_table_in_8_bits() -> None:
    (one, scale), (same, _), (other, _) = trained(), trained(), trained(6)
    assert one.dtype == np.int8
    assert one.shape == (2, 2**14, 2)
    assert 100 < np.abs(one).max() <= 127
    assert set(scale) == {"prompt", "response"}
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
