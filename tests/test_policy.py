from __future__ import annotations

import contextlib
import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.errors import PolicyError
from tidegate.policy import PRESETS, Policy, Rule, decide, decide_token, load_policy, parse_policy
from tidegate.types import (
    CATEGORIES,
    Action,
    Advice,
    Category,
    Channel,
    Coverage,
    CoverageState,
    GuardFailure,
    Probabilities,
    Scope,
    Severity,
    Span,
    Target,
    TokenVerdict,
    Verdict,
)

SAFE, CONTROVERSIAL, UNSAFE = Severity
LIKELY = {
    SAFE: Probabilities(0.9, 0.06, 0.04),
    CONTROVERSIAL: Probabilities(0.1, 0.8, 0.1),
    UNSAFE: Probabilities(0.02, 0.08, 0.9),
}


def verdict(
    severity: Severity = UNSAFE,
    *categories: str,
    target: Target = Target.PROMPT,
    probabilities: Probabilities | None = None,
    category_probabilities: dict[str, float] | None = None,
) -> Verdict:
    return Verdict(
        target, severity, probabilities or LIKELY[severity], categories, category_probabilities or {}, guard="fake/1"
    )


def policy(rules: str = "rules: []", head: str = "") -> Policy:
    return parse_policy(f"name: test\non_guard_error: block\notherwise: allow\n{head}\n{rules}\n", source="test.yaml")


def action(of: Policy, said: Verdict, scope: Scope = Scope()) -> Action:  # noqa: B008
    return decide(of, said, scope).action


# --- choosing -----------------------------------------------------------------------------------------------------


def test_a_decision_names_policy_version_rule_scope_verdict_and_coverage() -> None:
    chosen = policy("rules:\n- {name: stop, severity: unsafe, action: block, advice: throttle}")
    said = verdict(UNSAFE)
    covered = (Coverage("messages[0].content", Channel.USER, CoverageState.JUDGED, 5),)

    decision = decide(chosen, said, Scope(tenant="a"), covered)

    assert (decision.action, decision.rule, decision.policy) == (Action.BLOCK, "stop", "test")
    assert decision.policy_version == chosen.version
    assert (decision.verdict, decision.failure) == (said, None)
    assert decision.scope == Scope(tenant="a")
    assert decision.coverage == covered
    assert decision.advice == (Advice.THROTTLE,)


@pytest.mark.parametrize("word", [a.word for a in Action])
def test_a_guard_that_fails_gets_what_on_guard_error_says(word: str) -> None:
    chosen = parse_policy(f"{{name: x, on_guard_error: {word}, otherwise: allow, rules: []}}")
    failure = GuardFailure("GuardTimeout", "no answer in 5 s", "fake/1")

    decision = decide(chosen, failure, Scope(region="eu"))

    assert decision.action is Action.parse(word)
    assert decision.rule == "on_guard_error"
    assert (decision.verdict, decision.failure) == (None, failure)
    assert decision.scope == Scope(region="eu")


def test_what_no_rule_matches_gets_otherwise() -> None:
    decision = decide(policy(), verdict(SAFE))

    assert (decision.action, decision.rule) == (Action.ALLOW, "otherwise")


def test_a_severity_means_this_one_or_worse() -> None:
    chosen = policy("rules:\n- {name: a, severity: controversial, action: warn}")

    assert [action(chosen, verdict(severity)) for severity in Severity] == [Action.ALLOW, Action.WARN, Action.WARN]


def test_the_first_rule_that_matches_wins() -> None:
    chosen = policy("""
rules:
- {name: friends, severity: unsafe, scope: {tenant: friends}, action: warn}
- {name: all, severity: unsafe, action: block}
""")

    assert action(chosen, verdict(), Scope(tenant="friends")) is Action.WARN
    assert action(chosen, verdict(), Scope(tenant="others")) is Action.BLOCK
    assert action(chosen, verdict()) is Action.BLOCK


def test_a_lenient_rule_for_one_category_does_not_hide_another() -> None:
    chosen = policy("""
rules:
- {name: copies, severity: unsafe, categories: Copyright Violation, action: warn, advice: [take_down]}
- {name: violence, severity: unsafe, categories: [Violent], action: block, advice: [notify]}
""")

    decision = decide(chosen, verdict(UNSAFE, "Copyright Violation", "Violent"))

    assert (decision.action, decision.rule) == (Action.BLOCK, "violence")
    assert decision.advice == (Advice.NOTIFY, Advice.TAKE_DOWN)


def test_of_equal_actions_the_rule_that_comes_first_is_named() -> None:
    chosen = policy("""
rules:
- {name: violence, severity: unsafe, categories: [Violent], action: block}
- {name: rest, severity: unsafe, action: block}
""")

    assert decide(chosen, verdict(UNSAFE, "PII", "Violent")).rule == "violence"


def test_rules_that_name_a_category_do_not_match_a_verdict_that_has_none() -> None:
    chosen = policy("rules:\n- {name: violence, severity: unsafe, categories: [Violent], action: block}")

    assert decide(chosen, verdict(UNSAFE)).rule == "controversial"


THREE_TREATMENTS = """
rules:
- {name: copies, severity: controversial, categories: [Copyright Violation], action: warn}
- {name: rest, severity: unsafe, action: block}
"""


@pytest.mark.parametrize(
    ("treatment", "expected"),
    [("safe", Action.ALLOW), ("review", Action.REVIEW), ("unsafe", Action.BLOCK)],
)
def test_controversial_text_that_no_rule_speaks_of_gets_the_general_treatment(treatment: str, expected: Action) -> None:
    chosen = policy(THREE_TREATMENTS, f"controversial: {treatment}")

    assert action(chosen, verdict(CONTROVERSIAL, "Violent")) is expected
    assert action(chosen, verdict(CONTROVERSIAL, "Copyright Violation")) is Action.WARN
    assert action(chosen, verdict(UNSAFE, "Violent")) is Action.BLOCK
    assert action(chosen, verdict(SAFE)) is Action.ALLOW


def test_review_does_not_soften_a_stricter_otherwise() -> None:
    chosen = parse_policy("{name: x, on_guard_error: block, otherwise: block, controversial: review, rules: []}")

    assert decide(chosen, verdict(CONTROVERSIAL)).rule == "otherwise"
    assert action(chosen, verdict(CONTROVERSIAL)) is Action.BLOCK


def test_a_probability_of_unsafe_makes_a_rule_milder_than_the_guards_call() -> None:
    chosen = policy("rules:\n- {name: a, severity: unsafe, probability: {unsafe: 0.3}, action: block}")

    assert action(chosen, verdict(UNSAFE, probabilities=Probabilities(0.6, 0.1, 0.3))) is Action.BLOCK
    assert action(chosen, verdict(UNSAFE, probabilities=Probabilities(0.5, 0.21, 0.29))) is Action.REVIEW
    assert action(chosen, verdict(SAFE, probabilities=Probabilities(0.6, 0.1, 0.3))) is Action.ALLOW


def test_with_severity_safe_a_probability_makes_a_rule_stricter_than_the_guards_call() -> None:
    chosen = policy("rules:\n- {name: a, severity: safe, probability: {unsafe: 0.3}, action: block}")

    assert action(chosen, verdict(SAFE, probabilities=Probabilities(0.6, 0.1, 0.3))) is Action.BLOCK
    assert action(chosen, verdict(SAFE, probabilities=Probabilities(0.5, 0.21, 0.29))) is Action.ALLOW


def test_a_probability_of_flagged_counts_both_levels() -> None:
    chosen = policy("rules:\n- {name: a, severity: safe, probability: {flagged: 0.5}, action: warn}")

    assert action(chosen, verdict(SAFE, probabilities=Probabilities(0.45, 0.3, 0.25))) is Action.WARN
    assert action(chosen, verdict(SAFE, probabilities=Probabilities(0.55, 0.2, 0.25))) is Action.ALLOW


def test_controversial_unsafe_adds_the_probability_of_both_levels() -> None:
    rules = "rules:\n- {name: a, severity: unsafe, probability: {unsafe: 0.5}, action: block}"
    said = verdict(CONTROVERSIAL, probabilities=Probabilities(0.45, 0.3, 0.25))

    assert action(policy(rules, "controversial: unsafe"), said) is Action.BLOCK
    assert action(policy(rules, "controversial: safe"), said) is Action.ALLOW


def test_a_category_with_a_threshold_is_present_by_its_probability() -> None:
    chosen = policy(
        """
rules:
- {name: violence, severity: unsafe, categories: [Violent], action: block}
- {name: rest, severity: unsafe, action: warn}
""",
        "thresholds: {Violent: 0.3}",
    )

    def chosen_for(probability: float, *named: str) -> str:
        return decide(chosen, verdict(UNSAFE, *named, category_probabilities={"Violent": probability})).rule

    assert chosen_for(0.3) == "violence"
    assert chosen_for(0.29) == "rest"
    assert chosen_for(0.29, "Violent") == "rest"  # the policy's threshold goes before the guard's naming
    assert decide(chosen, verdict(UNSAFE, "Violent")).rule == "violence"  # the guard gives no probability


def test_jailbreak_is_never_present_in_a_response() -> None:
    chosen = policy(
        """
rules:
- {name: jailbreak, severity: unsafe, categories: [Jailbreak], action: block}
- {name: rest, severity: unsafe, action: warn}
""",
        "thresholds: {Jailbreak: 0.3}",
    )
    likely = {"Jailbreak": 0.9}

    assert decide(chosen, verdict(UNSAFE, category_probabilities=likely)).rule == "jailbreak"
    assert decide(chosen, verdict(UNSAFE, category_probabilities=likely, target=Target.RESPONSE)).rule == "rest"
    assert decide(chosen, verdict(UNSAFE, "Jailbreak", target=Target.RESPONSE)).rule == "rest"


def test_custom_categories_are_declared_and_then_used_like_the_official_ones() -> None:
    chosen = policy(
        "rules:\n- {name: tips, severity: unsafe, categories: [Medical Advice], action: block}",
        "custom_categories: [Medical Advice]\nthresholds: {Medical Advice: 0.5}",
    )

    assert action(chosen, verdict(UNSAFE, "Medical Advice")) is Action.BLOCK


def test_a_category_that_the_policy_does_not_know_gets_the_general_rules() -> None:
    chosen = policy("rules:\n- {name: rest, severity: unsafe, action: block}")

    assert decide(chosen, verdict(UNSAFE, "Medical Advice")).rule == "rest"


def test_a_target_limits_a_rule() -> None:
    chosen = policy("rules:\n- {name: a, severity: unsafe, target: response, action: block}", "controversial: safe")

    assert action(chosen, verdict(UNSAFE, target=Target.RESPONSE)) is Action.BLOCK
    assert action(chosen, verdict(UNSAFE, target=Target.PROMPT)) is Action.ALLOW


@pytest.mark.parametrize(
    ("key", "wanted", "value", "matches"),
    [
        ("tenant", "acme", "acme", True),
        ("tenant", "acme", "Acme", False),
        ("tenant", "acme", "acme2", False),
        ("tenant", "acme-*", "acme-paris", True),
        ("tenant", "[a, b]", "b", True),
        ("tenant", "acme", None, False),
        ("region", "EU", "eu", True),
        ("region", "NO", "no", True),  # not YAML's false
        ("language", "no", "nb", False),
        ("language", "no", "no", True),
        ("language", "de", "de-AT", True),
        ("language", "de", "DE_at", True),
        ("language", "de", "den", False),
        ("language", "de-AT", "de", False),
        ("route", "/v1/chat/completions", "/v1/chat/completions", True),
        ("route", "/v1/*", "/v1/chat/completions", True),
        ("route", "/v1/*", "/v2/chat", False),
    ],
)
def test_scopes(key: str, wanted: str, value: str | None, matches: bool) -> None:
    chosen = policy(
        f"rules:\n- {{name: a, severity: unsafe, scope: {{{key}: {wanted}}}, action: block}}", "controversial: safe"
    )

    assert (action(chosen, verdict(), Scope(**{key: value})) is Action.BLOCK) is matches


def test_all_parts_of_a_scope_must_match() -> None:
    chosen = policy(
        "rules:\n- {name: a, severity: unsafe, scope: {tenant: t, region: [eu, uk]}, action: block}",
        "controversial: safe",
    )

    assert action(chosen, verdict(), Scope(tenant="t", region="uk")) is Action.BLOCK
    assert action(chosen, verdict(), Scope(tenant="t", region="us")) is Action.ALLOW
    assert action(chosen, verdict(), Scope(region="uk")) is Action.ALLOW


def test_a_rule_may_have_its_own_message() -> None:
    chosen = policy(
        "rules:\n- {name: a, severity: unsafe, action: block, message: Mine.}\n"
        "- {name: b, severity: controversial, action: block}",
        "message: Ours.",
    )

    assert [chosen.message_for(name) for name in ("a", "b", "otherwise")] == ["Mine.", "Ours.", "Ours."]


def test_defaults_keep_no_text_debounce_two_tokens_and_review_what_is_controversial() -> None:
    chosen = policy()

    assert (chosen.retention, chosen.debounce, chosen.controversial) == ("hash", 2, "review")
    assert chosen.message


# --- properties ---------------------------------------------------------------------------------------------------

levels = st.sampled_from(Severity)
numbers = st.sampled_from([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 0.9, 1.0]) | st.floats(0, 1)
probabilities = st.tuples(numbers, numbers).map(
    lambda pair: Probabilities(1 - max(pair), max(pair) - min(pair), min(pair))
)
names = st.sampled_from((*CATEGORIES, "Custom"))
verdicts = st.builds(
    Verdict,
    st.sampled_from(Target),
    levels,
    probabilities,
    st.lists(names, max_size=3, unique=True).map(tuple),
    st.dictionaries(names, numbers, max_size=9),
)
scopes = st.builds(Scope, *[st.sampled_from([None, "a", "de", "de-AT"])] * 4)
words = st.lists(st.sampled_from(["a", "de", "b*"]), max_size=2, unique=True).map(tuple)
rules = st.builds(
    Rule,
    st.uuids().map(lambda value: f"r{value.hex}"),
    levels,
    st.sampled_from(Action),
    st.none() | numbers,
    st.none() | numbers,
    st.lists(names, max_size=3, unique=True).map(tuple),
    st.none() | st.sampled_from(Target),
    words,
    words,
    words,
    words,
    st.lists(st.sampled_from(Advice), unique=True).map(tuple),
    st.none() | st.just("A message: with 'quotes' and #."),
)
policies = st.builds(
    Policy,
    st.just("any"),
    st.lists(rules, max_size=6).map(tuple),
    st.sampled_from(Action),
    st.sampled_from(Action),
    st.sampled_from(["safe", "unsafe", "review"]),
    st.integers(1, 5),
    st.sampled_from(["full", "redacted", "hash"]),
    st.dictionaries(names, numbers),
    st.just(("Custom",)),
)
LOADED = [load_policy(name) for name in PRESETS]
presets = st.sampled_from(LOADED)


@given(policies, verdicts, scopes)
def test_every_verdict_has_a_decision_of_a_rule_or_of_a_default(of: Policy, said: Verdict, scope: Scope) -> None:
    decision = decide(of, said, scope)

    by_name = {rule.name: rule.action for rule in of.rules}
    by_name |= {"otherwise": of.otherwise, "controversial": max(Action.REVIEW, of.otherwise)}
    assert decision.action is by_name[decision.rule]
    assert decide(of, said, scope) == decision


@given(policies, levels, probabilities, st.none() | names, numbers, st.sampled_from(Target), scopes)
def test_a_token_calls_for_what_a_verdict_that_says_the_same_would_get(
    of: Policy, severity: Severity, odds: Probabilities, name: str | None, odd: float, target: Target, scope: Scope
) -> None:
    token = TokenVerdict(Span(0, 1), severity, odds, name, odd)
    named = (name,) if name is not None and severity > SAFE else ()
    same = Verdict(target, severity, odds, named, {} if name is None else {name: odd})

    assert decide_token(of, token, target=target, scope=scope) is decide(of, same, scope).action
    assert of.for_scope(scope, target).action(token) is decide(of, same, scope).action


@settings(max_examples=500)
@given(presets, verdicts, levels, scopes)
def test_in_the_presets_a_worse_call_never_lowers_the_action(
    of: Policy, said: Verdict, other: Severity, scope: Scope
) -> None:
    milder, worse = sorted((said.severity, other))

    def with_call(severity: Severity) -> Verdict:
        return Verdict(said.target, severity, said.probabilities, said.categories, dict(said.category_probabilities))

    assert action(of, with_call(milder), scope) <= action(of, with_call(worse), scope)


@settings(max_examples=500)
@given(presets, verdicts, probabilities)
def test_in_the_presets_more_probability_of_harm_never_lowers_the_action(
    of: Policy, said: Verdict, other: Probabilities
) -> None:
    unsafe = sorted((said.probabilities.unsafe, other.unsafe))
    flagged = sorted((said.probabilities.flagged, other.flagged))
    actions = [
        action(
            of,
            Verdict(
                said.target,
                said.severity,
                Probabilities(1 - f, max(0.0, f - u), u),
                said.categories,
                dict(said.category_probabilities),
            ),
        )
        for u, f in zip(unsafe, flagged, strict=True)
    ]

    assert actions[0] <= actions[1]


@given(verdicts)
def test_the_presets_are_ordered_from_strict_to_loose_for_what_is_flagged(said: Verdict) -> None:
    """For the same categories: the presets' thresholds differ, so compare on categories that the guard names."""
    named = Verdict(said.target, said.severity, said.probabilities, said.categories)
    strict, balanced, loose = (action(preset, named) for preset in LOADED)

    assert strict >= balanced >= loose


def as_yaml(of: Policy, seed: int) -> str:
    """The policy as a file, with keys in any order and comments and white space strewn in."""
    order = random.Random(seed)

    def shuffled(mapping: dict[str, Any]) -> dict[str, Any]:
        items = [(key, value) for key, value in mapping.items() if value not in (None, [], {})]
        order.shuffle(items)
        return dict(items)

    def rule(one: Rule) -> dict[str, Any]:
        return shuffled(
            {
                "name": one.name,
                "severity": one.severity.word,
                "action": one.action.word,
                "probability": shuffled({"unsafe": one.min_unsafe, "flagged": one.min_flagged}),
                "categories": order.sample(one.categories, len(one.categories)),
                "target": one.target and one.target.value,
                "scope": shuffled(
                    {
                        "tenant": list(one.tenants),
                        "region": list(one.regions),
                        "route": list(one.routes),
                        "language": list(one.languages),
                    }
                ),
                "advice": [advice.value for advice in one.advice],
                "message": one.message,
            }
        )

    content = shuffled(
        {
            "name": of.name,
            "on_guard_error": of.on_guard_error.word,
            "otherwise": of.otherwise.word,
            "controversial": of.controversial,
            "debounce": of.debounce,
            "retention": of.retention,
            "message": of.message,
            "custom_categories": list(of.custom_categories),
            "thresholds": shuffled(dict(of.thresholds)),
        }
    ) | {"rules": [rule(one) for one in of.rules]}
    text = yaml.safe_dump(content, sort_keys=False, default_flow_style=order.choice([None, True, False]), width=1000)
    return "# a comment\n\n" + text + "\n   # another\n"


def readable(of: Policy) -> bool:
    try:
        parse_policy(as_yaml(of, 0))
    except PolicyError:  # such as a rule that can never match
        return False
    return True


@settings(max_examples=50)
@given(policies.filter(readable), st.integers(0, 1000))
def test_the_version_does_not_depend_on_comments_white_space_or_the_order_of_keys(of: Policy, seed: int) -> None:
    first, second = parse_policy(as_yaml(of, 0)), parse_policy(as_yaml(of, seed))

    assert first.version == second.version == of.version
    assert first.canonical() == second.canonical()


def test_the_version_changes_with_whatever_changes_a_decision() -> None:
    base = "name: x\non_guard_error: block\notherwise: allow\nrules:\n"
    a = "- {name: a, severity: unsafe, categories: [Violent], action: block}\n"
    b = "- {name: b, severity: unsafe, categories: [PII], action: warn}\n"
    texts = [
        base + a + b,
        base + b + a,
        base + a + b.replace("warn", "block"),
        base + a + b.replace("PII", "Violent").replace("unsafe", "controversial"),
        base + a + b.replace("action: warn", "action: warn, probability: {unsafe: 0.5}"),
        base + a + b.replace("action: warn", "action: warn, target: prompt"),
        base + a + b.replace("action: warn", "action: warn, scope: {tenant: t}"),
        base + a + b.replace("action: warn", "action: warn, scope: {region: t}"),
        "debounce: 3\n" + base + a + b,
        "retention: full\n" + base + a + b,
        "controversial: safe\n" + base + a + b,
        "thresholds: {PII: 0.5}\n" + base + a + b,
        (base + a + b).replace("otherwise: allow", "otherwise: warn"),
        (base + a + b).replace("on_guard_error: block", "on_guard_error: warn"),
        (base + a + b).replace("name: x", "name: y"),
    ]

    versions = [parse_policy(text).version for text in texts]

    assert len(set(versions)) == len(versions)
    assert all(len(version) == 12 and int(version, 16) >= 0 for version in versions)


def test_a_default_that_is_written_out_is_the_same_policy() -> None:
    assert policy().version == policy(head="debounce: 2\nretention: hash\ncontroversial: review").version


# --- reading ------------------------------------------------------------------------------------------------------

HEAD = "name: test\non_guard_error: block\notherwise: allow\n"


@pytest.mark.parametrize(
    ("text", "place", "expected"),
    [
        ("", None, "the policy is empty"),
        ("# only a comment\n", None, "the policy is empty"),
        ("- a list", "1:1", "expected a mapping, got a list"),
        ("name: test\nname: test\n", "2:1", "the key 'name' is given twice"),
        ("name: test\nothrwise: allow\n", "2:1", "unknown key 'othrwise', did you mean 'otherwise'?"),
        ("name: test\non_guard_error: block\nrules: []\n", "1:1", "the key 'otherwise' is missing"),
        ("name: test\notherwise: block\nrules: []\n", "1:1", "the key 'on_guard_error' is missing"),
        (HEAD, "1:1", "the key 'rules' is missing"),
        (HEAD + "rules:\n", "4:7", "rules: expected a list of rules"),
        (
            HEAD.replace("allow", "alow") + "rules: []",
            "3:12",
            "otherwise: unknown action 'alow', did you mean 'allow'?",
        ),
        (HEAD.replace("test", "") + "rules: []", "1:6", "name: expected text, got nothing"),
        (HEAD.replace("test", "a b") + "rules: []", "1:7", "name: expected a name of letters"),
        (HEAD + "debounce: 0\nrules: []", "4:11", "debounce: expected a whole number from 1 to 1000, got '0'"),
        (HEAD + "debounce: two\nrules: []", "4:11", "got 'two'"),
        (HEAD + "retention: ful\nrules: []", "4:12", "did you mean 'full'?"),
        (HEAD + "controversial: yes\nrules: []", "4:16", "unknown treatment 'yes'"),
        (HEAD + "message: ''\nrules: []", "4:10", "expected text, got an empty one"),
        (HEAD + f"message: {'x' * 2001}\nrules: []", "4:10", "at most 2000 characters"),
        (HEAD + "thresholds: {Violet: 0.5}\nrules: []", "4:14", "unknown category 'Violet', did you mean 'Violent'?"),
        (
            HEAD + "thresholds:\n  PII: 50%\nrules: []",
            "5:8",
            "thresholds.PII: expected a probability from 0 to 1, got '50%'",
        ),
        (HEAD + "thresholds: {PII: .nan}\nrules: []", "4:19", "from 0 to 1"),
        (HEAD + "thresholds: {PII: 1.01}\nrules: []", "4:19", "from 0 to 1"),
        (HEAD + "custom_categories: [PII]\nrules: []", "4:21", "custom_categories[0]: 'PII' is an official category"),
        (HEAD + "custom_categories: [A, A]\nrules: []", "4:24", "given twice"),
        (HEAD + "rules: {name: a}", "4:8", "expected a list of rules"),
        (HEAD + "rules: [a]", "4:9", "rules[0]: expected a mapping, got 'a'"),
        (HEAD + "rules:\n- {name: a, action: block}", "5:3", "rules[0]: the key 'severity' is missing"),
        (HEAD + "rules:\n- {name: a, severity: unsafe}", "5:3", "the key 'action' is missing"),
        (
            HEAD + "rules:\n- name: a\n  sevrity: unsafe",
            "6:3",
            "rules[0]: unknown key 'sevrity', did you mean 'severity'?",
        ),
        (HEAD + "rules:\n- {name: a, severity: Unsafe, action: block}", "5:23", "did you mean 'unsafe'?"),
        (HEAD + "rules:\n- {name: otherwise, severity: unsafe, action: block}", "5:10", "take another name"),
        (
            HEAD + "rules:\n- {name: a, severity: unsafe, action: block, categories: [violent]}",
            "5:59",
            "rules[0].categories[0]: unknown category 'violent', did you mean 'Violent'?",
        ),
        (HEAD + "rules:\n- {name: a, severity: unsafe, action: block, categories: []}", "5:58", "the list is empty"),
        (HEAD + "rules:\n- {name: a, severity: unsafe, action: block, target: answer}", "5:54", "unknown target"),
        (HEAD + "rules:\n- {name: a, severity: unsafe, action: block, advice: [shout]}", "5:55", "unknown advice"),
        (
            HEAD + "rules:\n- {name: a, severity: unsafe, action: block, scope: {tennant: x}}",
            "5:54",
            "rules[0].scope: unknown key 'tennant', did you mean 'tenant'?",
        ),
        (HEAD + "rules:\n- {name: a, severity: unsafe, action: block, scope: {tenant: }}", "5:61", "got nothing"),
        (HEAD + "rules:\n- {name: a, severity: safe, action: block, probability: 0.5}", "5:57", "expected a mapping"),
        (HEAD + "rules:\n- {name: a, severity: safe, action: block, probability: {unsave: 0.5}}", "5:58", "'unsafe'?"),
        (
            HEAD + "rules:\n- {name: a, severity: unsafe, action: block, target: response, categories: [Jailbreak]}",
            "5:76",
            "Jailbreak is about prompts",
        ),
        (
            HEAD + "rules:\n- {name: a, severity: unsafe, action: block, target: prompt}\n"
            "- {name: a, severity: unsafe, action: block}",
            "6:3",
            "two rules have the name 'a'",
        ),
        ("a: [b\n", "2:1", "this is not YAML"),
        ("a: b: c\n", "1:5", "this is not YAML"),
        ("a: \x07\n", "1:4", "character U+0007 is not allowed"),
        ("name: &n test\nrules: [*n]\n", "2:9", "aliases"),
        (HEAD + "rules: []\n---\nname: b\n", "5:1", "one document"),
        ("[" * 9 + "]" * 9, "1:9", "nested too deep"),
        ("[" * 100_000, "1:9", "nested too deep"),
        ("name: !!python/object:os.system x\n", "1:7", "tag"),
        ("!!binary aGVsbG8=", "1:1", "tag"),
        ("<<: {name: a}\n", "1:1", "unknown key '<<'"),
        ("{a: b}: c", "1:1", "expected text, got a mapping"),
        ("name: {a: 1}\n" + HEAD[11:] + "rules: []", "1:7", "expected text, got a mapping"),
    ],
)
def test_what_cannot_be_used_is_an_error_with_file_line_column_and_key(
    text: str, place: str | None, expected: str
) -> None:
    with pytest.raises(PolicyError) as caught:
        parse_policy(text, source="my.yaml")

    assert expected in str(caught.value)
    assert caught.value.where == ("my.yaml" if place is None else f"my.yaml:{place}")


@pytest.mark.parametrize(
    ("earlier", "later"),
    [
        ("severity: unsafe", "severity: unsafe"),
        ("severity: controversial", "severity: unsafe, categories: [PII]"),
        ("severity: unsafe, categories: [PII, Violent]", "severity: unsafe, categories: [PII]"),
        ("severity: unsafe, scope: {tenant: [a, b]}", "severity: unsafe, scope: {tenant: a, region: eu}"),
        (
            "severity: unsafe, probability: {unsafe: 0.5}",
            "severity: unsafe, probability: {unsafe: 0.6}, target: prompt",
        ),
        ("severity: safe, probability: {flagged: 0.5}", "severity: unsafe, probability: {unsafe: 0.6}"),
        ("severity: safe", "severity: unsafe, probability: {flagged: 0.6}"),
    ],
)
def test_a_rule_that_can_never_match_is_an_error(earlier: str, later: str) -> None:
    text = HEAD + f"rules:\n- {{name: a, action: block, {earlier}}}\n- {{name: b, action: warn, {later}}}\n"

    with pytest.raises(PolicyError, match="'b' can never match: 'a' above"):
        parse_policy(text)


@pytest.mark.parametrize(
    ("earlier", "later"),
    [
        ("severity: unsafe", "severity: controversial"),
        ("severity: unsafe, categories: [PII]", "severity: unsafe"),
        ("severity: unsafe, probability: {unsafe: 0.6}", "severity: unsafe"),
        ("severity: safe, probability: {unsafe: 0.5}", "severity: unsafe, probability: {flagged: 0.6}"),
        ("severity: unsafe, target: prompt", "severity: unsafe"),
        ("severity: unsafe, scope: {tenant: a}", "severity: unsafe, scope: {tenant: [a, b]}"),
    ],
)
def test_rules_that_can_both_match_are_fine(earlier: str, later: str) -> None:
    text = HEAD + f"rules:\n- {{name: a, action: block, {earlier}}}\n- {{name: b, action: warn, {later}}}\n"

    assert len(parse_policy(text).rules) == 2


@given(st.text())
def test_any_text_is_a_policy_or_a_policy_error(text: str) -> None:
    with contextlib.suppress(PolicyError):
        assert parse_policy(text).name


@given(st.binary(max_size=200))
def test_any_file_is_a_policy_or_a_policy_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(data)
    with pytest.raises(PolicyError):
        load_policy(path)


def test_a_file_that_is_not_utf8_is_an_error_that_names_the_place(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"name: x\nmessage: caf\xe9\n")

    with pytest.raises(PolicyError, match="byte 0xe9 is not UTF-8") as caught:
        load_policy(path)

    assert caught.value.where == f"{path}:2:13"


def test_a_byte_order_mark_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "bom.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + (HEAD + "rules: []").encode())

    assert load_policy(str(path)).name == "test"


def test_a_file_that_is_too_long_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "long.yaml"
    path.write_text("#" * 300_000, encoding="utf-8")

    with pytest.raises(PolicyError, match="too long"):
        load_policy(path)
    with pytest.raises(PolicyError, match="too long"):
        parse_policy("#" * 300_000)


def test_a_file_that_is_not_there_is_an_error_that_knows_the_presets(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="did you mean 'balanced'"):
        load_policy("balancd")
    with pytest.raises(PolicyError, match="cannot read the policy"):
        load_policy(tmp_path)


def test_a_policy_built_in_code_is_checked_too() -> None:
    rule = Rule("a", UNSAFE, Action.BLOCK)

    with pytest.raises(ValueError, match="debounce"):
        Policy("x", (), Action.BLOCK, Action.ALLOW, debounce=0)
    with pytest.raises(ValueError, match="same name"):
        Policy("x", (rule, rule), Action.BLOCK, Action.ALLOW)


# --- the presets --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_says_what_every_severity_means_for_every_category(name: str) -> None:
    preset = load_policy(name)

    assert preset.name == name
    assert set(preset.thresholds) == set(CATEGORIES)
    assert action(preset, verdict(SAFE)) is Action.ALLOW
    for category, target in itertools.product(CATEGORIES, Target):
        assert action(preset, verdict(UNSAFE, category, target=target)) > Action.ALLOW


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_never_redacts_and_keeps_text_only_for_reviews(name: str) -> None:
    preset = load_policy(name)
    actions = {rule.action for rule in preset.rules} | {preset.otherwise, preset.on_guard_error}
    reviews = Action.REVIEW in actions or preset.controversial == "review"

    assert Action.REDACT not in actions
    assert preset.retention == ("redacted" if reviews else "hash")


S, C, J = Category.SELF_HARM.value, Category.COPYRIGHT.value, Category.JAILBREAK.value


@pytest.mark.parametrize(
    ("severity", "category", "target", "expected"),
    [
        (UNSAFE, S, Target.PROMPT, ("block", "block", "block")),
        (CONTROVERSIAL, S, Target.PROMPT, ("review", "review", "warn")),
        (CONTROVERSIAL, S, Target.RESPONSE, ("block", "review", "warn")),
        (UNSAFE, "Violent", Target.RESPONSE, ("block", "block", "block")),
        (CONTROVERSIAL, "Violent", Target.RESPONSE, ("block", "review", "allow")),
        (UNSAFE, J, Target.PROMPT, ("block", "block", "warn")),
        (CONTROVERSIAL, J, Target.PROMPT, ("block", "warn", "allow")),
        (UNSAFE, C, Target.PROMPT, ("review", "warn", "warn")),
        (UNSAFE, C, Target.RESPONSE, ("block", "block", "warn")),
        (UNSAFE, "PII", Target.RESPONSE, ("block", "block", "block")),
        (CONTROVERSIAL, "PII", Target.PROMPT, ("block", "warn", "allow")),
        (UNSAFE, "Sexual Content or Sexual Acts", Target.RESPONSE, ("block", "block", "block")),
        (CONTROVERSIAL, "Sexual Content or Sexual Acts", Target.RESPONSE, ("block", "warn", "allow")),
    ],
)
def test_what_the_presets_choose(severity: Severity, category: str, target: Target, expected: tuple[str, ...]) -> None:
    said = verdict(severity, category, target=target)

    assert tuple(action(load_policy(name), said).word for name in PRESETS) == expected


def test_the_presets_point_people_in_distress_to_help() -> None:
    for name in PRESETS:
        preset = load_policy(name)
        decision = decide(preset, verdict(UNSAFE, S))
        assert "talk to somebody you trust" in " ".join(preset.message_for(decision.rule).split())
        assert Advice.NOTIFY in decision.advice


def test_a_guard_that_fails_closes_the_gate_except_in_the_loose_preset() -> None:
    failure = GuardFailure("GuardUnavailable", "not loaded")

    assert [decide(load_policy(name), failure).action for name in PRESETS] == [Action.BLOCK, Action.BLOCK, Action.WARN]


# --- the documentation --------------------------------------------------------------------------------------------

PAGE = (Path(__file__).parents[1] / "docs" / "policy.md").read_text(encoding="utf-8")


def test_the_documented_example_is_a_policy_that_does_what_its_comments_say() -> None:
    example = parse_policy(PAGE.split("```yaml\n")[1].split("```")[0], source="docs/policy.md")
    europe = Scope(region="eu", tenant="helpdesk-1")

    assert example.name == "helpdesk"
    assert decide(example, verdict(UNSAFE, "Suicide & Self-Harm")).rule == "self-harm"
    medical = verdict(CONTROVERSIAL, "Medical Advice", target=Target.RESPONSE)
    assert decide(example, medical, europe).rule == "medical-in-the-eu"
    assert decide(example, medical).rule == "controversial"
    assert decide(example, verdict(UNSAFE)).rule == "sure"
    assert decide(example, verdict(UNSAFE, probabilities=Probabilities(0.2, 0.2, 0.6))).rule == "unsure"


def test_the_table_of_presets_in_the_documentation_is_right() -> None:
    for preset in LOADED:
        row = next(line for line in PAGE.splitlines() if line.startswith(f"| `{preset.name}`"))
        tokens, kept = [cell.strip() for cell in row.split("|")][5:7]
        assert int(tokens) == preset.debounce
        assert kept == {"redacted": "redacted", "hash": "fingerprint only"}[preset.retention]


def test_every_category_key_and_action_is_documented() -> None:
    words = [
        *CATEGORIES,
        *(a.word for a in Action),
        *(a.value for a in Advice),
        "tenant",
        "region",
        "route",
        "language",
    ]

    for word in words:
        assert f"`{word}`" in PAGE
