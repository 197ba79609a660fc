from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.types import (
    CATEGORIES,
    PROMPT_CATEGORIES,
    RESPONSE_CATEGORIES,
    Action,
    Category,
    Conversation,
    Decision,
    GuardFailure,
    Probabilities,
    Role,
    Severity,
    Span,
    Target,
    Turn,
    Verdict,
    worst,
)

ODDS = Probabilities(0.7, 0.2, 0.1)


def test_the_worst_of_severities_and_actions_is_their_maximum() -> None:
    assert sorted(Severity, reverse=True) == [Severity.UNSAFE, Severity.CONTROVERSIAL, Severity.SAFE]
    assert max(Action.WARN, Action.BLOCK, Action.REVIEW) is Action.BLOCK
    assert [action.word for action in sorted(Action)] == ["allow", "warn", "review", "redact", "block"]


@pytest.mark.parametrize("kind", [Severity, Action])
def test_words_are_read_back_in_any_case(kind: Any) -> None:
    for member in kind:
        assert kind.parse(member.word) is member
        assert kind.parse(f" {member.word.title()} ") is member


@pytest.mark.parametrize(("kind", "word"), [(Severity, "controversial"), (Action, "review")])
def test_an_unknown_word_is_an_error_that_lists_the_known_ones(kind: Any, word: str) -> None:
    with pytest.raises(ValueError, match=rf"'nonsense'.*{word}"):
        kind.parse("nonsense")


def test_there_are_nine_categories_and_only_prompts_have_jailbreak() -> None:
    assert len(CATEGORIES) == 9
    assert set(PROMPT_CATEGORIES) == set(CATEGORIES)
    assert set(PROMPT_CATEGORIES) - set(RESPONSE_CATEGORIES) == {Category.JAILBREAK}
    assert all(type(name) is str for name in CATEGORIES)


def test_a_conversation_is_about_its_last_turn() -> None:
    assert Conversation.of("hello").target is Target.PROMPT
    assert Conversation.of("hello", "hi").target is Target.RESPONSE
    assert Conversation.of("hello", "").target is Target.RESPONSE
    assert Conversation((Turn(Role.TOOL, "42"),)).target is Target.PROMPT


def test_an_empty_conversation_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one turn"):
        Conversation(())


probabilities = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(
    lambda pair: (1 - max(pair), max(pair) - min(pair), min(pair))
)


@given(probabilities)
def test_the_probability_of_at_least_a_severity_falls_as_the_severity_rises(values: tuple[float, float, float]) -> None:
    odds = Probabilities(*values)

    chances = [odds.at_least(severity) for severity in Severity]

    assert chances[0] == 1
    assert chances == sorted(chances, reverse=True)
    assert chances[1] == odds.flagged <= 1


@pytest.mark.parametrize(
    "values",
    [
        (0.5, 0.5, 0.5),
        (0.0, 0.0, 0.0),
        (-0.1, 0.6, 0.5),
        (1.2, -0.1, -0.1),
        (float("nan"), 0.5, 0.5),
        (float("inf"), 0, 0),
    ],
)
def test_numbers_that_are_not_probabilities_of_three_severities_are_refused(
    values: tuple[float, float, float],
) -> None:
    with pytest.raises(ValueError, match="add up to 1"):
        Probabilities(*values)


def test_what_rounding_does_to_a_sum_is_forgiven() -> None:
    assert Probabilities(0.3334, 0.3334, 0.3333).flagged == pytest.approx(0.6667)


def test_a_decision_has_a_verdict_or_a_failure_and_never_both() -> None:
    verdict = Verdict(Target.PROMPT, Severity.SAFE, ODDS)
    failure = GuardFailure("GuardTimeout", "no answer in 5 s")

    for said, failed in itertools.product((None, verdict), (None, failure)):
        if (said is None) == (failed is None):
            with pytest.raises(ValueError, match="either a verdict or a guard failure"):
                Decision(Action.ALLOW, "r", "p", "v", verdict=said, failure=failed)
        else:
            assert Decision(Action.ALLOW, "r", "p", "v", verdict=said, failure=failed)


def test_a_verdict_cannot_be_changed_from_outside() -> None:
    given_probabilities = {"PII": 0.5}
    verdict = Verdict(Target.PROMPT, Severity.UNSAFE, ODDS, category_probabilities=given_probabilities)

    given_probabilities["PII"] = 0.9
    with pytest.raises(TypeError):
        verdict.category_probabilities["PII"] = 0.9  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        verdict.severity = Severity.SAFE  # type: ignore[misc]

    assert verdict.category_probabilities == {"PII": 0.5}


def test_the_worst_verdict_is_by_severity_then_by_the_probability_of_unsafe() -> None:
    def verdict(severity: Severity, safe: float, controversial: float, unsafe: float) -> Verdict:
        return Verdict(Target.RESPONSE, severity, Probabilities(safe, controversial, unsafe), span=Span(0, 1))

    likely_but_controversial = verdict(Severity.CONTROVERSIAL, 0.0, 0.2, 0.8)
    mildly_unsafe = verdict(Severity.UNSAFE, 0.4, 0.1, 0.5)
    surely_unsafe = verdict(Severity.UNSAFE, 0.1, 0.2, 0.7)

    for order in itertools.permutations([likely_but_controversial, mildly_unsafe, surely_unsafe]):
        assert worst(order) is surely_unsafe
    with pytest.raises(ValueError):
        worst([])


def test_the_types_need_nothing_but_the_standard_library() -> None:
    program = (
        "import sys, tidegate.types; print([m for m in ('pydantic', 'numpy', 'yaml', 'torch') if m in sys.modules])"
    )

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)

    assert done.stdout.strip() == "[]"
