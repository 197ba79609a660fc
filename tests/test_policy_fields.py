"""The presets for fields of work: what they promise in their comments."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from test_policy import LIKELY
from tidegate.policy import FIELDS, decide, load_policy
from tidegate.types import CATEGORIES, Action, Advice, GuardFailure, Probabilities, Severity, Target, Verdict

SAFE, CONTROVERSIAL, UNSAFE = Severity
FOLDER = Path(__file__).parents[1] / "policies"
LOADED = {name: load_policy(name) for name in FIELDS}
HARM, DATA, SEX, JAILBREAK = "Suicide & Self-Harm", "PII", "Sexual Content or Sexual Acts", "Jailbreak"
POLITICS, ABUSE, VIOLENT, DRUGS = (
    "Politically Sensitive Topics",
    "Unethical Acts",
    "Violent",
    "Non-violent Illegal Acts",
)


def chosen(name: str, severity: Severity, category: str, target: Target) -> Action:
    return decide(LOADED[name], Verdict(target, severity, LIKELY[severity], (category,))).action


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_says_what_every_severity_means_for_every_category(name: str) -> None:
    of = LOADED[name]

    assert of.name == name
    assert set(of.thresholds) == set(CATEGORIES)
    assert decide(of, Verdict(Target.PROMPT, SAFE, LIKELY[SAFE])).action is Action.ALLOW
    for category, target in itertools.product(CATEGORIES, Target):
        assert chosen(name, UNSAFE, category, target) > Action.ALLOW
        if target is Target.RESPONSE and category not in (POLITICS, ABUSE, JAILBREAK, "Copyright Violation"):
            assert chosen(name, UNSAFE, category, target) is Action.BLOCK


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_gives_a_reason_for_each_of_its_rules(name: str) -> None:
    """Rules that go together have one in common."""
    blocks = (FOLDER / f"{name}.yaml").read_text().split("rules:\n", 1)[1].split("\n\n")
    assert [block for block in blocks if "- name:" in block and "#" not in block] == []


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_points_people_in_distress_to_help_and_tells_a_person(name: str) -> None:
    of = LOADED[name]
    for target in Target:
        decision = decide(of, Verdict(target, UNSAFE, LIKELY[UNSAFE], (HARM,)))
        assert decision.action is Action.BLOCK
        assert "crisis line" in " ".join(of.message_for(decision.rule).split())
        assert Advice.NOTIFY in decision.advice
    talk = decide(of, Verdict(Target.PROMPT, CONTROVERSIAL, LIKELY[CONTROVERSIAL], (HARM,)))
    assert (talk.action, talk.advice) == (Action.REVIEW, (Advice.NOTIFY,))


@pytest.mark.parametrize("name", FIELDS)
def test_a_guard_that_fails_closes_the_gate_and_only_offices_let_no_other_guard_stand_in(name: str) -> None:
    assert decide(LOADED[name], GuardFailure("GuardTimeout", "late")).action is Action.BLOCK
    assert LOADED[name].degraded == ("none" if name == "public-sector" else "edge")
    assert LOADED[name].retention == "redacted"


@pytest.mark.parametrize(
    ("name", "severity", "category", "target", "expected"),
    [
        ("social", CONTROVERSIAL, POLITICS, Target.RESPONSE, Action.WARN),
        ("social", CONTROVERSIAL, ABUSE, Target.PROMPT, Action.REVIEW),
        ("social", UNSAFE, ABUSE, Target.PROMPT, Action.BLOCK),
        ("social", UNSAFE, JAILBREAK, Target.PROMPT, Action.WARN),
        ("customer-service", CONTROVERSIAL, DATA, Target.PROMPT, Action.ALLOW),
        ("customer-service", UNSAFE, DATA, Target.PROMPT, Action.BLOCK),
        ("customer-service", CONTROVERSIAL, POLITICS, Target.RESPONSE, Action.BLOCK),
        ("customer-service", CONTROVERSIAL, ABUSE, Target.PROMPT, Action.WARN),
        ("customer-service", CONTROVERSIAL, VIOLENT, Target.RESPONSE, Action.BLOCK),
        ("education", CONTROVERSIAL, SEX, Target.PROMPT, Action.REVIEW),
        ("education", CONTROVERSIAL, SEX, Target.RESPONSE, Action.BLOCK),
        ("education", UNSAFE, SEX, Target.PROMPT, Action.BLOCK),
        ("education", CONTROVERSIAL, VIOLENT, Target.PROMPT, Action.WARN),
        ("education", CONTROVERSIAL, DATA, Target.PROMPT, Action.BLOCK),
        ("health", CONTROVERSIAL, DRUGS, Target.PROMPT, Action.ALLOW),
        ("health", UNSAFE, DRUGS, Target.PROMPT, Action.BLOCK),
        ("health", CONTROVERSIAL, SEX, Target.RESPONSE, Action.ALLOW),
        ("health", CONTROVERSIAL, DATA, Target.RESPONSE, Action.BLOCK),
        ("health", CONTROVERSIAL, HARM, Target.RESPONSE, Action.BLOCK),
        ("health", CONTROVERSIAL, VIOLENT, Target.PROMPT, Action.WARN),
        ("public-sector", CONTROVERSIAL, POLITICS, Target.PROMPT, Action.ALLOW),
        ("public-sector", UNSAFE, POLITICS, Target.PROMPT, Action.REVIEW),
        ("public-sector", CONTROVERSIAL, POLITICS, Target.RESPONSE, Action.BLOCK),
        ("public-sector", CONTROVERSIAL, ABUSE, Target.PROMPT, Action.ALLOW),
        ("public-sector", CONTROVERSIAL, ABUSE, Target.RESPONSE, Action.BLOCK),
        ("public-sector", UNSAFE, VIOLENT, Target.PROMPT, Action.BLOCK),
    ],
)
def test_what_the_fields_choose(name: str, severity: Severity, category: str, target: Target, expected: Action) -> None:
    assert chosen(name, severity, category, target) is expected


def test_in_health_a_doubt_about_self_harm_is_looked_at_even_where_the_guard_says_safe() -> None:
    said = Verdict(Target.PROMPT, SAFE, Probabilities(0.6, 0.3, 0.1), (), {HARM: 0.5})

    assert decide(LOADED["health"], said).rule == "self-harm-doubt"
    assert decide(LOADED["education"], said).action is Action.ALLOW


@given(
    st.sampled_from(FIELDS),
    st.sampled_from(Target),
    st.lists(st.sampled_from(CATEGORIES), unique=True),
    st.floats(0, 1),
    st.floats(0, 1),
    st.sampled_from(Severity),
    st.sampled_from(Severity),
)
def test_a_worse_call_never_lowers_the_action(
    name: str, target: Target, named: list[str], one: float, two: float, first: Severity, second: Severity
) -> None:
    odds = Probabilities(1 - max(one, two), max(one, two) - min(one, two), min(one, two))
    milder, worse = (
        decide(LOADED[name], Verdict(target, severity, odds, tuple(named))).action
        for severity in sorted((first, second))
    )

    assert milder <= worse
