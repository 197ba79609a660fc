"""The teacher's second opinion: cross-fitted, for every labelled example, by a classifier that learns."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("sklearn")

from tidegate.data.distill import _half, cross_fitted
from tidegate.data.mix import teacher_key
from tidegate.data.ngrams import ClassifierSettings, TfIdfClassifier, count_ngrams
from tidegate.types import Conversation, Example, Severity, Target

SAFE = ("the weather is fine in town {}", "we bake bread with flour {}", "she plants a tree by the river {}")
HARM = ("i will smash the window of shop {}", "they plan to smash and burn house {}", "burn it all down {}")


def examples(count: int) -> list[Example]:
    rows = []
    for number in range(count):
        harmful = number % 2 == 1
        text = (HARM if harmful else SAFE)[number % 3].format(number)
        severity = Severity.UNSAFE if harmful else Severity.SAFE
        rows.append(Example(f"e{number}", Conversation.of(text), Target.PROMPT, severity))
    return rows


def test_every_labelled_example_gets_probabilities_that_tell_its_label() -> None:
    rows = examples(120)
    found = cross_fitted(rows, epochs=8)
    assert set(found) == {teacher_key(row) for row in rows}
    assert all(sum(p) == pytest.approx(1.0) for p in found.values())
    right = [(found[teacher_key(row)][2] > 0.5) == (row.severity is Severity.UNSAFE) for row in rows]
    assert np.mean(right) > 0.9


def test_the_word_on_an_example_does_not_depend_on_its_own_label() -> None:
    rows = examples(120)
    place = next(i for i, row in enumerate(rows) if row.severity is Severity.SAFE)
    turned = list(rows)
    turned[place] = Example(f"e{place}", rows[place].conversation, Target.PROMPT, Severity.UNSAFE)
    key = teacher_key(rows[place])
    assert cross_fitted(rows, epochs=4)[key] == pytest.approx(cross_fitted(turned, epochs=4)[key])


def test_examples_with_one_opening_message_are_in_one_half() -> None:
    first = Example("a", Conversation.of("hello", "one answer"), Target.RESPONSE, Severity.SAFE)
    second = Example("b", Conversation.of("hello", "another answer"), Target.RESPONSE, Severity.UNSAFE)
    assert _half(first) == _half(second)


def test_unlabelled_examples_are_left_out() -> None:
    rows = [*examples(60), Example("none", Conversation.of("no label"), Target.PROMPT, None)]
    assert "prompt:none" not in cross_fitted(rows, epochs=2)


def test_counts_of_rows_are_those_of_their_texts_alone() -> None:
    texts = ["one two", "", "three 日本語 four", "👩‍👩‍👧 x"]
    together, alone = count_ngrams(texts), [count_ngrams([text]) for text in texts]
    for number, part in enumerate(alone):
        assert (together.chars[[number]] != part.chars).nnz == 0
        assert (together.words[[number]] != part.words).nnz == 0


def test_a_severity_that_was_never_seen_has_no_probability() -> None:
    rows = examples(40)
    labels = np.asarray([int(row.severity or 0) for row in rows])
    counts = count_ngrams([row.conversation.turns[-1].content for row in rows])
    found = TfIdfClassifier(counts, labels, ClassifierSettings(epochs=3)).of_counts(counts)
    assert found.shape == (40, 3)
    assert not found[:, int(Severity.CONTROVERSIAL)].any()
