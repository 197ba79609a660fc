"""N-grams are counted once each, at the token that completes them, however the tokens arrive."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_folder import LINES, tiny_tokenizer
from tidegate.model.tokens import Folder, TextTokenizer
from tidegate.model.wide import LEFT, NgramHasher, WideTable
from tidegate.types import Target

TOKENS = TextTokenizer(tiny_tokenizer())
HASHER = NgramHasher(TOKENS.token_bytes())
TABLE = WideTable(HASHER, np.random.default_rng(3).integers(-127, 128, (2, 512, 2)).astype(np.int8))
IDS = st.lists(st.integers(8, TOKENS.vocab_size - 1), min_size=1, max_size=30)


@pytest.mark.parametrize("line", LINES)
def test_the_bytes_of_the_tokens_of_a_text_are_those_of_the_folded_text(line: str) -> None:
    texts = TOKENS.token_bytes()
    assert b"".join(texts[token.id] for token in TOKENS.encode(line)).decode() == Folder().fold(line)[0]
    assert all(texts[control] == b"" for control in TOKENS.control.values())


@given(IDS, st.data(), st.sampled_from(Target))
def test_evidence_does_not_depend_on_how_the_tokens_are_cut(
    ids: list[int], data: st.DataObject, target: Target
) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(1, len(ids)), max_size=5)) | {len(ids)})
    parts, at = [], 0
    for cut in cuts:
        parts.append(TABLE.evidence(target, ids[at:cut], ids[max(0, at - LEFT) : at]))
        at = cut
    np.testing.assert_array_equal(np.concatenate(parts), TABLE.evidence(target, ids))


@given(IDS)
def test_tokens_one_by_one_say_what_they_say_together(ids: list[int]) -> None:
    one_by_one = [TABLE.evidence(Target.PROMPT, [token], ids[:at]) for at, token in enumerate(ids)]
    np.testing.assert_array_equal(np.concatenate(one_by_one), TABLE.evidence(Target.PROMPT, ids))


def test_every_ngram_of_tokens_and_characters_is_counted_once() -> None:
    ids = [token.id for token in TOKENS.encode("the quick brown fox")]
    tokens, characters = len(ids), len(" the quick brown fox")
    expected = sum(tokens - order + 1 for order in (1, 2, 3)) + sum(characters - order + 1 for order in (2, 3, 4, 5))
    assert TABLE.evidence(Target.PROMPT, ids)[:, 2].sum() == expected


def test_prompts_and_responses_have_tables_of_their_own() -> None:
    ids = [token.id for token in TOKENS.encode("how do i bake bread")]
    prompt, response = (TABLE.evidence(target, ids) for target in Target)
    np.testing.assert_array_equal(prompt[:, 2], response[:, 2])
    assert (prompt[:, :2] != response[:, :2]).any()


def test_the_order_of_tokens_counts() -> None:
    one, other = HASHER.hashes([20, 21])[0], HASHER.hashes([21, 20])[0]
    assert set(one.tolist()) != set(other.tolist())


def test_a_token_that_is_half_a_character_has_ngrams_too() -> None:
    emoji = [token.id for token in TOKENS.encode("🦊")]
    assert len(emoji) > 1
    assert (TABLE.evidence(Target.PROMPT, emoji)[:, 2] > 0).all()


def test_hashes_spread_over_all_rows() -> None:
    ids = [token.id for line in LINES for token in TOKENS.encode(line)]
    hashes = np.unique(HASHER.hashes(ids)[0])
    rows = np.bincount((hashes >> np.uint64(60)).astype(int), minlength=16)
    assert rows.min() > 0.6 * rows.mean()
    assert rows.max() < 1.4 * rows.mean()


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        (np.zeros((2, 500, 2), np.int8), "power of two"),
        (np.zeros((1, 512, 2), np.int8), "expected int8"),
        (np.zeros((2, 512, 3), np.int8), "expected int8"),
        (np.zeros((2, 512, 2), np.float32), "expected int8"),
        (np.zeros(512, np.int8), "expected int8"),
    ],
)
def test_a_table_of_another_form_is_refused(tmp_path: Path, table: np.ndarray, complaint: str) -> None:
    np.save(tmp_path / "ngrams.npy", table)
    with pytest.raises(ValueError, match=complaint):
        WideTable.load(tmp_path / "ngrams.npy", HASHER)


def test_a_saved_table_says_the_same(tmp_path: Path) -> None:
    values = np.random.default_rng(4).integers(-127, 128, (2, 64, 2)).astype(np.int8)
    np.save(tmp_path / "ngrams.npy", values)
    ids = [30, 31, 32, 33]
    np.testing.assert_array_equal(
        WideTable.load(tmp_path / "ngrams.npy", HASHER).evidence(Target.RESPONSE, ids),
        WideTable(HASHER, values).evidence(Target.RESPONSE, ids),
    )
