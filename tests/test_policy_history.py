"""What a policy says of earlier turns: how it reads, what it means, and that older files keep their version."""

from __future__ import annotations

import pytest

from serving import POLICY, make_policy
from tidegate.errors import PolicyError
from tidegate.policy import History, decide
from tidegate.types import Action, Observed, Probabilities, Scope, Severity, Target, Verdict

UNSAFE = Verdict(Target.PROMPT, Severity.UNSAFE, Probabilities(0.0, 0.1, 0.9), ("Violent",))


def test_a_policy_that_says_nothing_of_earlier_turns_does_not_judge_them_and_keeps_its_version() -> None:
    assert make_policy().history == History(judge=False, at_most=Action.WARN, turns=64)
    assert make_policy(history="{judge: false}").version == make_policy().version
    assert make_policy(history="{judge: true}").version != make_policy().version
    assert make_policy(history="{judge: true}").version == make_policy(history="{at_most: warn, judge: true}").version


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ("{at_most: warn}", "'judge' is missing"),
        ("{judge: maybe}", "expected true or false"),
        ("{judge: true, at_most: redact}", "unknown action 'redact'"),
        ("{judge: true, turns: 0}", "expected a whole number from 1 to"),
        ("{judge: true, most: 3}", "unknown key 'most'"),
        ("yes", "expected a mapping"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(said: str, error: str) -> None:
    with pytest.raises(PolicyError, match=rf"policy:\d+:\d+: history.*{error}"):
        make_policy(history=said)


def test_a_layer_says_it_for_its_own() -> None:
    policy = make_policy(
        history="{judge: true}", layers="{tenant: {forum: {history: {judge: true, at_most: block, turns: 8}}}}"
    )

    assert policy.at(Scope()).history == History(judge=True)
    assert policy.at(Scope(tenant="forum")).history == History(judge=True, at_most=Action.BLOCK, turns=8)
    assert policy.at(Scope(tenant="forum", subject="bob")).version == policy.version


@pytest.mark.parametrize("at_most", ["allow", "warn", "review", "block"])
@pytest.mark.parametrize("action", ["allow", "warn", "review", "redact", "block"])
def test_what_a_rule_says_of_an_earlier_turn_counts_up_to_a_bound(action: str, at_most: str) -> None:
    rules = POLICY.replace("name: unsafe", "name: it").replace("action: block", f"action: {action}, advice: notify")
    policy = make_policy(rules, history=f"{{judge: true, at_most: {at_most}}}")
    bound = Action.parse(at_most)
    meant = Action.BLOCK if action == "redact" else Action.parse(action)

    now = policy.on_earlier(decide(policy, UNSAFE))

    assert now.action is min(meant, bound)
    assert now.rule == ("it" if meant <= bound else "earlier_turn")
    assert bool(now.advice) == (at_most == "block")


def test_what_is_only_observed_of_it_has_the_same_bound() -> None:
    policy = make_policy(history="{judge: true}", observe="true")

    now = policy.on_earlier(decide(policy, UNSAFE))

    assert (now.action, now.observed) == (Action.ALLOW, Observed(Action.WARN, "earlier_turn"))
