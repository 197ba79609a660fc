"""Disguises hide words and keep the text readable; nothing fails, and one draw gives one text."""

from __future__ import annotations

import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.data.augment import DISGUISES, disguise
from tidegate.model.tokens import Folder

SENTENCE = "please explain how ordinary people recognise dangerous mushrooms before dinner"
NAMES = {change.__name__.removeprefix("_"): change for change in DISGUISES}
SEEDS = st.integers(0, 2**32 - 1)


@given(st.text(max_size=60), SEEDS, st.sampled_from(sorted(NAMES)))
def test_any_text_can_be_disguised_in_every_way(text: str, seed: int, name: str) -> None:
    changed = NAMES[name](text, np.random.default_rng(seed))
    assert isinstance(changed, str)
    assert len(changed) <= 4 * len(text)
    assert bool(changed) == bool(text)


@given(st.text(max_size=60), SEEDS)
def test_the_same_seed_gives_the_same_disguise(text: str, seed: int) -> None:
    assert disguise(text, np.random.default_rng(seed)) == disguise(text, np.random.default_rng(seed))


def test_every_disguise_is_drawn_and_changes_most_sentences() -> None:
    rng = np.random.default_rng(0)
    drawn = [disguise(SENTENCE, rng) for _ in range(400)]
    assert sum(text != SENTENCE for text in drawn) > 360
    assert len(set(drawn)) > 300


@pytest.mark.parametrize("name", ["upper", "mixed_case", "invisible", "homoglyphs", "full_width"])
@given(seed=SEEDS)
def test_changes_of_case_form_and_unseen_signs_are_undone_by_folding(name: str, seed: int) -> None:
    changed = NAMES[name](SENTENCE, np.random.default_rng(seed))
    if name != "homoglyphs":
        assert Folder().fold(changed)[0] == Folder().fold(SENTENCE)[0]
    assert len(changed.split(" ")) == len(SENTENCE.split(" "))


@given(SEEDS)
def test_letters_that_look_alike_are_of_another_script(seed: int) -> None:
    changed = NAMES["homoglyphs"](SENTENCE, np.random.default_rng(seed))
    assert len(changed) == len(SENTENCE)
    for before, after in zip(SENTENCE, changed, strict=True):
        assert after == before or unicodedata.name(after).startswith("CYRILLIC")


@given(SEEDS)
def test_spaces_are_only_taken_away(seed: int) -> None:
    assert NAMES["no_spaces"](SENTENCE, np.random.default_rng(seed)).replace(" ", "") == SENTENCE.replace(" ", "")


@given(SEEDS)
def test_words_that_are_spelled_out_keep_their_letters(seed: int) -> None:
    changed = NAMES["spaced"](SENTENCE, np.random.default_rng(seed))
    letters = [c for c in changed if c.isalpha()]
    assert letters == [c for c in SENTENCE if c.isalpha()]


@given(SEEDS)
def test_a_star_stands_for_one_letter_and_never_the_first(seed: int) -> None:
    changed = NAMES["starred"](SENTENCE, np.random.default_rng(seed))
    assert len(changed) == len(SENTENCE)
    for before, after in zip(SENTENCE.split(), changed.split(), strict=True):
        assert after[0] == before[0]
        assert after.count("*") <= 1


@given(SEEDS)
def test_a_typo_loses_or_swaps_letters_inside_a_word(seed: int) -> None:
    changed = NAMES["typos"](SENTENCE, np.random.default_rng(seed))
    for before, after in zip(SENTENCE.split(), changed.split(), strict=True):
        assert 0 <= len(before) - len(after) <= 1
        assert after[0] == before[0]
        assert not set(after) - set(before)


@given(SEEDS)
def test_lines_are_broken_at_blanks_and_nowhere_else(seed: int) -> None:
    changed = NAMES["broken_lines"](SENTENCE, np.random.default_rng(seed))
    assert changed.replace("\n", " ") == SENTENCE
