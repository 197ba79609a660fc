"""Drafts as a tree of tokens: shared beginnings once, and the probability of whole words."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from tidegate.model.draft_tree import ROOT, DraftTree
from tidegate.prompts import OFFICIAL, Draft, LineKind
from tidegate.types import Target


def letters(text: str) -> Sequence[int]:
    return [ord(letter) for letter in text]


def along(tree: DraftTree, text: str) -> int:
    node = ROOT
    for letter in text:
        node = tree.children[node][ord(letter)]
    return node


def test_what_drafts_begin_with_together_is_there_once() -> None:
    drafts = [Draft(LineKind.CATEGORIES, "C:", f" {word}") for word in ("ab", "ac", "b")]
    tree = DraftTree(drafts, letters)
    assert "".join(map(chr, tree.tokens[1:])) == "C: abcb"
    assert [tree.parents[node] < node for node in range(1, len(tree.tokens))] == [True] * 7
    assert tree.depths[along(tree, "C: ac")] == 5


def test_words_that_end_a_line_are_not_computed() -> None:
    tree = DraftTree(OFFICIAL[Target.PROMPT].drafts(""), letters)
    computed = set(tree.computed)
    assert along(tree, "Safety: Saf") in computed
    assert along(tree, "Safety: Safe") not in computed


def test_what_follows_a_safe_response_is_computed() -> None:
    tree = DraftTree(OFFICIAL[Target.RESPONSE].drafts(""), letters)
    assert along(tree, "Safety: Safe\nCategories: None\nRefusal:") in tree.computed


def test_every_category_is_computed_to_its_end_since_another_may_follow() -> None:
    form = OFFICIAL[Target.PROMPT]
    tree = DraftTree(form.drafts("Safety: Unsafe"), letters)
    for name in (*form.categories, "None"):
        assert along(tree, f"\nCategories: {name}") in tree.computed


def test_the_probability_of_a_word_is_that_of_its_tokens_after_what_stands_before() -> None:
    tree = DraftTree([Draft(LineKind.SEVERITY, "S:", " ab"), Draft(LineKind.SEVERITY, "S:", " c")], letters)
    logs = [0.0] * len(tree.tokens)
    for text, probability in [("S:", 0.1), ("S: ", 0.5), ("S: a", 0.4), ("S: ab", 0.9), ("S: c", 0.6)]:
        logs[along(tree, text)] = math.log(probability)
    assert tree.word_probabilities(logs) == pytest.approx({"ab": 0.18, "c": 0.3})


def test_a_word_does_not_get_the_probability_of_a_longer_one() -> None:
    words = ["a", "ab", "abc", "x"]
    tree = DraftTree([Draft(LineKind.CATEGORIES, "", word) for word in words], letters)
    logs = [0.0] * len(tree.tokens)
    for text, probability in [("a", 0.8), ("ab", 0.5), ("abc", 0.25), ("x", 0.2)]:
        logs[along(tree, text)] = math.log(probability)
    assert tree.word_probabilities(logs) == pytest.approx({"a": 0.4, "ab": 0.3, "abc": 0.1, "x": 0.2})


def test_no_drafts_are_a_tree_with_nothing_to_compute() -> None:
    tree = DraftTree((), letters)
    assert (tree.computed, tree.kind, tree.words) == ((), None, {})
