"""Why a policy decides as it does, and what a candidate would change."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from test_policy import LIKELY
from test_policy_layers import piles, policy, scopes, verdict, verdicts
from tidegate.policy import Explanation, Policy, Replay, decide, explain, parse_policy
from tidegate.types import (
    Action,
    Advice,
    Decision,
    GuardFailure,
    Probabilities,
    Scope,
    Severity,
    Span,
    Target,
    Verdict,
)

SAFE, CONTROVERSIAL, UNSAFE = Severity


def why(of: Explanation) -> dict[str, str]:
    return {each.rule: each.why for each in of.tried}


# --- explain ------------------------------------------------------------------------------------------------------

TEXT = """
controversial: safe
thresholds: {Violent: 0.5}
message: Default.
rules:
- {name: for-answers, severity: unsafe, target: response, action: block}
- {name: of-violence, severity: unsafe, categories: [Violent], action: block}
- {name: sure, severity: unsafe, probability: {unsafe: 0.95}, action: block}
- {name: quite, severity: safe, probability: {flagged: 0.99}, action: block}
- {name: german, severity: unsafe, scope: {language: de}, action: block}
- {name: watched, severity: unsafe, action: block, observe: true}
- {name: rest, severity: unsafe, action: warn}
layers:
  region: {IN: {thresholds: {PII: 0.4}, debounce: 3}}
  tenant: {a: {message: Of a., rules: [{name: of-a, severity: unsafe, categories: [PII], action: review}]}}
"""


def test_every_rule_that_did_not_match_says_why() -> None:
    told = explain(policy(TEXT), verdict(UNSAFE, Violent=0.4), Scope(region="in"))

    assert told.decision.rule == "rest"
    assert why(told) == {
        "for-answers": "it is for a response, and this is a prompt",
        "of-violence": "it is for Violent",
        "sure": "it asks for a probability of unsafe of 0.95, and it is 0.9",
        "quite": "it asks for a probability of flagged of 0.99, and it is 0.98",
        "german": "the language is not known",
        "watched": "all that it asks for is so; but it is only observed",
        "rest": "all that it asks for is so",
    }
    assert told.categories == (("Violent", False, "its probability 0.4 is less than the threshold 0.5"),)
    assert told.because == "it is the first rule that matches, and stands in default"
    assert [each.rule for each in told.tried if each.observed] == ["watched"]


def test_a_rule_for_another_scope_says_for_which_part_it_is_not() -> None:
    told = explain(policy(TEXT), verdict(), Scope(language="fr"))

    assert why(told)["german"] == "it is for another language, not 'fr'"


def test_a_severity_that_is_not_reached_is_said() -> None:
    told = explain(policy(TEXT), verdict(CONTROVERSIAL), Scope())

    assert why(told)["rest"] == "it asks for unsafe, and the guard says controversial"
    assert (told.decision.rule, told.because) == ("otherwise", "no rule matches")


def test_layers_and_settings_say_where_they_come_from() -> None:
    told = explain(policy(TEXT), verdict(UNSAFE, PII=0.4, Violent=0.1), Scope(region="IN", tenant="a"))
    settings = {each.name: (each.value, each.layer) for each in told.settings}

    assert told.layers == ("default", "region IN", "tenant a")
    assert settings["message"] == ("Of a.", "tenant a")
    assert settings["debounce"] == ("3", "region IN")
    assert settings["retention"] == ("hash", "default")
    assert settings["threshold of PII"] == ("0.4", "region IN")
    assert settings["threshold of Violent"] == ("0.5", "default")
    assert told.decision.rule == "of-a"
    assert told.because == "it is the first rule that matches, and stands in tenant a"
    assert ("PII", True, "its probability 0.4 is at least the threshold 0.4") in told.categories


def test_the_second_round_of_controversial_as_unsafe_is_told() -> None:
    told = explain(
        policy("controversial: unsafe\nrules: [{name: a, severity: unsafe, action: block}]"), verdict(CONTROVERSIAL)
    )

    assert [(each.rule, each.matched) for each in told.tried] == [("a", False), ("a", True)]
    assert told.tried[-1].why.endswith("taking what is controversial for unsafe")


def test_of_several_categories_the_one_that_won_is_named() -> None:
    chosen = policy("""
rules:
- {name: copies, severity: unsafe, categories: [Copyright Violation], action: warn}
- {name: violence, severity: unsafe, categories: [Violent], action: block}
""")

    told = explain(chosen, verdict(UNSAFE, "Copyright Violation", "Violent"))

    assert told.because == "of all present categories, Violent gets the strictest action, by the first rule for it"
    assert [(each.category, each.rule, each.matched) for each in told.tried] == [
        ("Copyright Violation", "copies", True),
        ("Violent", "copies", False),
        ("Violent", "violence", True),
    ]


def test_a_guard_that_failed_is_explained_by_the_layer_that_says_what_then() -> None:
    chosen = parse_policy("""
name: x
on_guard_error: block
otherwise: allow
rules: []
layers: {tenant: {a: {on_guard_error: {default: review, timeout: warn}}, b: {observe: true}}}
""")
    failure = GuardFailure("GuardTimeout", "late")

    told = explain(chosen, failure, Scope(tenant="a"))
    assert told.because == (
        "the guard could not judge (GuardTimeout), and on_guard_error of tenant a says warn for timeout"
    )
    assert (told.decision.action, told.tried) == (Action.WARN, ())
    watched = explain(chosen, failure, Scope(tenant="b"))
    assert watched.because.endswith("says block for timeout; but the policy is only observed here")


def test_a_policy_that_is_only_observed_says_so() -> None:
    told = explain(policy("observe: true\nrules: [{name: a, severity: unsafe, action: block}]"), verdict())

    assert told.because == "a would block, but the policy is only observed here"
    assert told.as_json()["observed"] == {"action": "block", "rule": "a"}


@given(piles(), scopes, verdicts)
def test_what_is_explained_is_what_is_decided(of: Policy, scope: Scope, said: Verdict) -> None:
    told = explain(of, said, scope)

    assert told.decision == decide(of, said, scope)
    winners = [each for each in told.tried if each.matched and not each.observed]
    if told.decision.rule in {rule.name for rule in of.all_rules}:
        assert told.decision.rule in [each.rule for each in winners]
    elif told.decision.rule != "observe":
        assert len(winners) < max(1, len(told.categories))
    assert json.loads(json.dumps(told.as_json()))["rule"] == told.decision.rule


# --- replay -------------------------------------------------------------------------------------------------------

OLD = policy("rules: [{name: stop, severity: unsafe, action: block}]\ncontroversial: safe")
NEW = policy("""
controversial: safe
rules:
- {name: advice, severity: unsafe, categories: [PII], action: warn}
- {name: stop, severity: controversial, action: block}
- {name: look, severity: safe, action: review, observe: true}
""")


def test_a_replay_counts_what_would_change_and_shows_examples() -> None:
    replay = Replay(NEW, most_examples=2)
    said = [verdict(UNSAFE, "PII")] * 3 + [verdict(CONTROVERSIAL), verdict(UNSAFE), verdict(SAFE)]
    for number, one in enumerate(said):
        replay.add(f"dec_{number}", decide(OLD, one, Scope(tenant="a")))

    assert (replay.decisions, replay.changed, replay.stricter, replay.milder) == (6, 4, 1, 3)
    assert replay.actions == {
        (Action.BLOCK, Action.WARN): 3,
        (Action.ALLOW, Action.BLOCK): 1,
        (Action.BLOCK, Action.BLOCK): 1,
        (Action.ALLOW, Action.ALLOW): 1,
    }
    assert replay.rules == {("stop", "advice"): 3, ("otherwise", "stop"): 1}
    assert [change.identity for change in replay.examples] == ["dec_0", "dec_1", "dec_3"]
    assert replay.observed == 1
    content = json.loads(json.dumps(replay.as_json()))
    assert content["examples"][0] == {
        "id": "dec_0",
        "before": {"action": "block", "rule": "stop"},
        "after": {"action": "warn", "rule": "advice"},
        "target": "prompt",
        "severity": "unsafe",
        "unsafe": 0.9,
        "categories": ["PII"],
        "failure": None,
        "tenant": "a",
        "region": None,
        "route": None,
        "language": None,
    }


def test_a_replay_can_be_held_against_another_policy_instead_of_what_was_done() -> None:
    replay = Replay(NEW, against=NEW)
    replay.add("dec_1", decide(OLD, verdict(CONTROVERSIAL)))

    assert (replay.decisions, replay.changed) == (1, 0)


def test_what_came_from_the_middle_of_a_stream_is_an_estimate_and_is_never_redacted() -> None:
    candidate = policy("rules: [{name: a, severity: unsafe, action: redact}]")
    said = Verdict(Target.RESPONSE, UNSAFE, LIKELY[UNSAFE], span=Span(0, 9))
    replay = Replay(candidate)
    replay.add("dec_1", decide(OLD, said))

    assert (replay.estimates, replay.changed) == (1, 0)


def test_a_failure_is_replayed_by_the_candidates_word_on_it() -> None:
    candidate = parse_policy("{name: x, on_guard_error: {default: block, timeout: warn}, otherwise: allow, rules: []}")
    replay = Replay(candidate)
    replay.add("dec_1", decide(OLD, GuardFailure("GuardTimeout", "late")))
    replay.add("dec_2", decide(OLD, GuardFailure("GuardUnavailable", "away")))

    assert (replay.failures, replay.changed, replay.milder) == (2, 1, 1)
    assert replay.examples[0].as_json()["failure"] == "GuardTimeout"


@given(piles(), piles(), st.lists(st.tuples(verdicts, scopes), max_size=8))
def test_the_numbers_of_a_replay_add_up(of: Policy, candidate: Policy, said: list[tuple[Verdict, Scope]]) -> None:
    made = [decide(of, one, scope) for one, scope in said]
    replay = Replay(candidate)
    for number, decision in enumerate(made):
        replay.add(str(number), decision)
    again: list[Decision] = [decide(candidate, one, scope) for one, scope in said]

    assert replay.decisions == sum(replay.actions.values()) == len(made)
    assert replay.stricter == sum(new.action > old.action for new, old in zip(again, made, strict=True))
    assert replay.milder == sum(new.action < old.action for new, old in zip(again, made, strict=True))
    assert sum(replay.rules.values()) == replay.changed
    same = Replay(of, against=of)
    for number, decision in enumerate(made):
        same.add(str(number), decision)
    assert same.changed == 0


def test_advice_and_probabilities_of_the_example_are_those_of_the_verdict() -> None:
    chosen = policy("rules: [{name: a, severity: unsafe, action: block, advice: [notify]}]")
    said = Verdict(Target.PROMPT, UNSAFE, Probabilities(0.1, 0.2, 0.7))

    assert explain(chosen, said).decision.advice == (Advice.NOTIFY,)
