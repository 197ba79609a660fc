"""Policies for many: layers, what is only observed, kinds of failure."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from test_policy import LIKELY
from tidegate.errors import PolicyError
from tidegate.policy import (
    FIELDS,
    UNJUDGED_ANSWER,
    UNJUDGED_REQUEST,
    History,
    Layer,
    OnGuardError,
    Policy,
    Rule,
    decide,
    explain,
    load_policy,
    parse_policy,
)
from tidegate.types import (
    Action,
    Advice,
    GuardFailure,
    Observed,
    Scope,
    Severity,
    Span,
    Target,
    TokenVerdict,
    Verdict,
)

SAFE, CONTROVERSIAL, UNSAFE = Severity
HEAD = "name: test\non_guard_error: block\notherwise: allow\n"


def verdict(severity: Severity = UNSAFE, *categories: str, target: Target = Target.PROMPT, **odds: float) -> Verdict:
    return Verdict(target, severity, LIKELY[severity], categories, odds, guard="fake/1")


def policy(text: str) -> Policy:
    return parse_policy(HEAD + text, source="test.yaml")


# --- who wins -----------------------------------------------------------------------------------------------------

PILE = """
rules:
- {name: all, severity: unsafe, action: block}
layers:
  route:
    /v1/completions: {rules: [{name: of-route, severity: unsafe, action: allow}]}
  tenant:
    a-*: {rules: [{name: of-tenants, severity: unsafe, action: warn}]}
    a-1: {rules: [{name: of-tenant, severity: unsafe, action: review}]}
  region:
    IN: {rules: [{name: of-region, severity: unsafe, action: redact}]}
"""


@pytest.mark.parametrize(
    ("scope", "rule"),
    [
        (Scope(), "all"),
        (Scope(region="in"), "of-region"),
        (Scope(region="IND"), "all"),
        (Scope(tenant="a-2"), "of-tenants"),
        (Scope(tenant="a-1"), "of-tenant"),
        (Scope(tenant="b"), "all"),
        (Scope(region="IN", tenant="a-2"), "of-tenants"),
        (Scope(region="IN", tenant="b"), "of-region"),
        (Scope(region="IN", tenant="a-1", route="/v1/completions"), "of-route"),
        (Scope(route="/v1/chat/completions"), "all"),
        (Scope(language="in"), "all"),
    ],
)
def test_the_default_is_below_region_tenant_and_route(scope: Scope, rule: str) -> None:
    assert decide(policy(PILE), verdict(), scope).rule == rule


def test_a_layer_speaks_only_of_what_it_names_and_the_rest_is_as_below() -> None:
    chosen = policy("""
controversial: safe
rules:
- {name: all, severity: unsafe, action: block}
layers:
  region: {IN: {rules: [{name: pictures, severity: unsafe, categories: [PII], action: review}]}}
  tenant: {a: {otherwise: warn}}
""")
    scope = Scope(tenant="a", region="IN")

    assert decide(chosen, verdict(UNSAFE, "PII"), scope).rule == "pictures"
    assert decide(chosen, verdict(UNSAFE, "Violent"), scope).rule == "all"
    assert decide(chosen, verdict(SAFE), scope).action is Action.WARN
    assert decide(chosen, verdict(SAFE), Scope(region="IN")).action is Action.ALLOW


def test_a_layer_leaves_rules_of_those_below_out_and_of_those_above_not() -> None:
    chosen = policy("""
controversial: safe
rules:
- {name: all, severity: unsafe, action: block}
layers:
  tenant:
    a: {without: [all, of-route, of-region]}
    b: {without: [of-region]}
  region: {IN: {rules: [{name: of-region, severity: unsafe, action: review}]}}
  route: {/v1/*: {rules: [{name: of-route, severity: unsafe, action: warn}]}}
""")

    def rule(**scope: str) -> str:
        return decide(chosen, verdict(), Scope(**scope)).rule

    assert rule(tenant="a") == "otherwise"
    assert rule(tenant="a", region="IN") == "otherwise"
    assert rule(tenant="a", route="/v1/x") == "of-route"
    assert rule(tenant="b", region="IN") == "all"
    assert rule(tenant="c", region="IN") == "of-region"


def test_the_settings_of_a_scope_come_from_the_highest_layer_that_says_them() -> None:
    chosen = policy("""
debounce: 2
retention: hash
message: Default.
thresholds: {PII: 0.2, Violent: 0.3}
instructions: Be fair.
rules: []
layers:
  region:
    IN: {debounce: 3, retention: full, thresholds: {PII: 0.4}, instructions: Judge for users in India., degraded: edge}
  tenant:
    a: {debounce: 4, message: Of a., thresholds: {Sexual Content or Sexual Acts: 0.5}, instructions: It is a forum.}
  route:
    /r: {on_guard_error: {default: warn, timeout: review}, deadline_ms: 800, observe: true, controversial: safe}
""")
    scope = Scope(region="in", tenant="a", route="/r")
    here = chosen.at(scope)

    assert (here.debounce, here.retention, here.message) == (4, "full", "Of a.")
    assert dict(here.thresholds) == {"PII": 0.4, "Violent": 0.3, "Sexual Content or Sexual Acts": 0.5}
    assert here.instructions == "Be fair.\nJudge for users in India.\nIt is a forum."
    assert (here.degraded, here.deadline_ms, here.observe, here.controversial) == ("edge", 800, True, "safe")
    assert (here.on_failure("GuardTimeout"), here.on_failure("GuardUnavailable")) == (Action.REVIEW, Action.WARN)
    assert chosen.at(Scope()).debounce == 2
    assert chosen.at(Scope()).on_failure("GuardTimeout") is Action.BLOCK
    assert (here.version, here.name) == (chosen.version, chosen.name)
    assert here.at(scope) is here
    assert chosen.at(Scope(region="in", tenant="a", route="/r")) is here
    assert decide(chosen, verdict(), scope).policy_version == chosen.version


def test_a_layer_that_replaces_on_guard_error_replaces_all_of_it() -> None:
    chosen = parse_policy("""
name: x
on_guard_error: {default: block, timeout: warn}
otherwise: allow
rules: []
layers: {tenant: {a: {on_guard_error: review}}}
""")

    assert chosen.at(Scope(tenant="a")).on_failure("GuardTimeout") is Action.REVIEW


def test_a_threshold_of_a_layer_counts_for_its_scope_only() -> None:
    chosen = policy("""
controversial: safe
thresholds: {PII: 0.5}
rules:
- {name: data, severity: unsafe, categories: [PII], action: block}
layers: {region: {EU: {thresholds: {PII: 0.2}}}}
""")
    said = verdict(UNSAFE, PII=0.3)

    assert decide(chosen, said, Scope(region="eu")).rule == "data"
    assert decide(chosen, said).rule == "otherwise"


def test_a_decision_is_about_its_own_subject_and_no_subject_is_remembered() -> None:
    chosen = policy(
        "rules: [{name: a, severity: unsafe, action: block, observe: true}]\nlayers: {tenant: {t: {debounce: 3}}}"
    )
    failure = GuardFailure("GuardTimeout", "late")
    for subject in ("ada", "bob", None, "ada"):
        scope = Scope(tenant="t", subject=subject)
        for target in Target:
            assert decide(chosen, verdict(target=target), scope).scope.subject == subject
        assert decide(chosen, failure, scope).scope.subject == subject
        watching = chosen.for_scope(scope, Target.PROMPT).observing
        assert watching is not None
        assert watching.scope.subject == subject
    assert {scope.subject for scope in chosen._at} | {scope.subject for scope, _ in chosen._scoped} == {None}


scopes = st.builds(
    Scope,
    st.none() | st.sampled_from(["a", "a-1", "a-12", "b"]),
    st.none() | st.sampled_from(["IN", "in", "EU"]),
    st.none() | st.sampled_from(["/v1/x", "/v1/y", "/z"]),
)
patterns = {
    "region": ["IN", "EU"],
    "tenant": ["a", "a*", "a-*", "a-1", "*"],
    "route": ["/v1/*", "/v1/x", "*"],
}


@st.composite
def piles(draw: st.DrawFn) -> Policy:
    numbers = itertools.count()

    def rules() -> tuple[Rule, ...]:
        made = draw(
            st.lists(
                st.tuples(
                    st.sampled_from(Severity),
                    st.sampled_from(Action),
                    st.sampled_from([(), ("PII",), ("Violent",)]),
                    st.booleans(),
                ),
                max_size=2,
            )
        )
        return tuple(
            Rule(f"r{next(numbers)}", severity, action, categories=categories, observe=observe)
            for severity, action, categories, observe in made
        )

    default = rules()
    layers = []
    for kind, choices in patterns.items():
        for pattern in draw(st.lists(st.sampled_from(choices), unique=True, max_size=2)):
            without = draw(st.lists(st.sampled_from([f"r{n}" for n in range(8)]), max_size=2, unique=True))
            otherwise = draw(st.none() | st.sampled_from(Action))
            observe = draw(st.none() | st.booleans())
            layers.append(
                Layer(kind, pattern, rules(), tuple(without), otherwise=otherwise, observe=observe)  # type: ignore[arg-type]
            )
    return Policy("x", default, Action.BLOCK, Action.ALLOW, layers=tuple(draw(st.permutations(layers))))


verdicts = st.builds(
    lambda target, severity, names: Verdict(target, severity, LIKELY[severity], tuple(names)),
    st.sampled_from(Target),
    st.sampled_from(Severity),
    st.lists(st.sampled_from(["PII", "Violent"]), unique=True),
)


def enforced_by_hand(of: Policy, scope: Scope, said: Verdict) -> str:
    """Which rule wins, from the words of the documentation: walk down the pile, and take the first that matches."""

    def holds(layer: Layer) -> bool:
        value = getattr(scope, layer.kind)
        if value is None:
            return False
        if layer.pattern.endswith("*"):
            return bool(value.startswith(layer.pattern[:-1]))
        return bool(value.lower() == layer.pattern.lower() if layer.kind == "region" else value == layer.pattern)

    order = {"region": 0, "tenant": 1, "route": 2}
    pile = sorted(
        (layer for layer in of.layers if holds(layer)),
        key=lambda layer: (order[layer.kind], "*" not in layer.pattern, len(layer.pattern)),
    )
    left_out: set[str] = set()
    walked: list[Rule] = []
    for layer in reversed(pile):
        walked += [rule for rule in layer.rules if rule.name not in left_out]
        left_out |= set(layer.without)
    walked += [rule for rule in of.rules if rule.name not in left_out]
    otherwise = next((layer.otherwise for layer in reversed(pile) if layer.otherwise is not None), of.otherwise)
    found = []
    for category in said.categories or (None,):
        for rule in walked:
            if (
                not rule.observe
                and said.severity >= rule.severity
                and (not rule.categories or category in rule.categories)
            ):
                found.append((rule.action, -walked.index(rule), rule.name))
                break
        else:
            milder = said.severity is not SAFE and otherwise < Action.REVIEW
            found.append((Action.REVIEW, -99, "controversial") if milder else (otherwise, -99, "otherwise"))
    return max(found)[2]


@given(piles(), scopes, verdicts)
def test_the_winner_is_the_one_that_the_documentation_names(of: Policy, scope: Scope, said: Verdict) -> None:
    here = of.at(scope)
    decision = decide(of, said, scope)

    if not here.observe:
        assert decision.rule == enforced_by_hand(of, scope, said)
    assert decide(here, said, scope) == decision


@given(piles(), scopes, st.sampled_from(Severity), st.none() | st.sampled_from(["PII", "Violent"]))
def test_a_token_of_a_layered_policy_calls_for_what_a_verdict_would_get(
    of: Policy, scope: Scope, severity: Severity, category: str | None
) -> None:
    token = TokenVerdict(Span(0, 1), severity, LIKELY[severity], category, 0.9 if category else 0.0)
    named = (category,) if category and severity > SAFE else ()
    same = Verdict(Target.RESPONSE, severity, LIKELY[severity], named, {category: 0.9} if category else {})

    assert of.for_scope(scope, Target.RESPONSE).action(token) is decide(of, same, scope).action


# --- only observed ------------------------------------------------------------------------------------------------


def test_a_rule_that_is_only_observed_does_nothing_and_says_what_it_would_have_done() -> None:
    chosen = policy("""
rules:
- {name: new, severity: unsafe, categories: [PII], action: block, advice: [notify], observe: true}
- {name: old, severity: unsafe, action: warn}
""")

    decision = decide(chosen, verdict(UNSAFE, "PII"))

    assert (decision.action, decision.rule, decision.advice) == (Action.WARN, "old", ())
    assert decision.observed == Observed(Action.BLOCK, "new", (Advice.NOTIFY,))
    assert decide(chosen, verdict(UNSAFE)).observed is None


def test_a_rule_below_one_that_is_only_observed_can_be_the_same() -> None:
    same = "severity: unsafe, action: block"

    assert len(policy(f"rules:\n- {{name: a, {same}, observe: true}}\n- {{name: b, {same}}}").rules) == 2
    with pytest.raises(PolicyError, match="'b' can never match"):
        policy(f"rules:\n- {{name: a, {same}}}\n- {{name: b, {same}, observe: true}}")


def test_a_policy_that_is_only_observed_enforces_nothing() -> None:
    chosen = policy("observe: true\nrules: [{name: stop, severity: unsafe, action: block, advice: [throttle]}]")
    failure = GuardFailure("GuardTimeout", "late", "fake/1")

    stopped = decide(chosen, verdict())
    assert (stopped.action, stopped.rule, stopped.advice) == (Action.ALLOW, "observe", ())
    assert stopped.observed == Observed(Action.BLOCK, "stop", (Advice.THROTTLE,))
    passed = decide(chosen, verdict(SAFE))
    assert (passed.action, passed.rule, passed.observed) == (Action.ALLOW, "otherwise", None)
    failed = decide(chosen, failure)
    assert (failed.action, failed.rule, failed.failure) == (Action.ALLOW, "observe", failure)
    assert failed.observed == Observed(Action.BLOCK, "on_guard_error")


def test_a_policy_can_be_taken_as_only_observed_and_has_the_same_version() -> None:
    chosen = policy(
        "rules: [{name: stop, severity: unsafe, action: block}]\n"
        "layers: {region: {DE: {observe: false, rules: [{name: german, severity: unsafe, action: review}]}}}"
    )
    watched = chosen.only_observed()

    assert watched.version == watched.at(Scope(region="DE")).version == chosen.version
    for scope, would_be in ((Scope(), "stop"), (Scope(region="DE"), "german")):
        said = decide(watched, verdict(), scope)
        assert (said.action, said.rule) == (Action.ALLOW, "observe")
        assert said.observed is not None
        assert said.observed.rule == would_be


def test_a_scope_can_be_observed_while_the_rest_is_enforced() -> None:
    chosen = policy(
        "rules: [{name: stop, severity: unsafe, action: block}]\nlayers: {tenant: {new: {observe: true}}}",
    )

    assert decide(chosen, verdict(), Scope(tenant="new")).action is Action.ALLOW
    assert decide(chosen, verdict(), Scope(tenant="old")).action is Action.BLOCK


@given(piles(), scopes, verdicts)
def test_what_was_observed_is_what_is_decided_once_everything_is_in_force(
    of: Policy, scope: Scope, said: Verdict
) -> None:
    def in_force(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
        return tuple(Rule(r.name, r.severity, r.action, categories=r.categories) for r in rules)

    layers = tuple(
        Layer(one.kind, one.pattern, in_force(one.rules), one.without, otherwise=one.otherwise) for one in of.layers
    )
    real = decide(Policy(of.name, in_force(of.rules), of.on_guard_error, of.otherwise, layers=layers), said, scope)

    decision = decide(of, said, scope)

    seen = decision.observed or Observed(decision.action, decision.rule, decision.advice)
    assert (seen.action, seen.rule, seen.advice) == (real.action, real.rule, real.advice)
    if of.at(scope).observe:
        assert decision.action is Action.ALLOW


# --- kinds of failure ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("GuardUnavailable", Action.WARN),
        ("GuardOverloaded", Action.REVIEW),
        ("GuardTimeout", Action.ALLOW),
        ("UnreadableVerdict", Action.REDACT),
        ("GuardError", Action.BLOCK),
        ("ValueError", Action.BLOCK),
    ],
)
def test_each_kind_of_failure_can_have_an_action_of_its_own(kind: str, expected: Action) -> None:
    chosen = parse_policy("""
name: x
on_guard_error: {default: block, unavailable: warn, overloaded: review, timeout: allow, unreadable: redact}
otherwise: allow
rules: []
""")

    assert decide(chosen, GuardFailure(kind, "said nothing")).action is expected
    assert chosen.on_failure(kind) is expected


# --- versions and errors ------------------------------------------------------------------------------------------


def test_presets_keep_the_versions_that_they_had_before_there_were_layers() -> None:
    versions = [load_policy(name).version for name in ("strict", "balanced", "loose")]

    assert versions == ["c75d3efc3df3", "c62cbe3e4fa3", "e5ee0981b221"]


def test_the_version_changes_with_whatever_a_layer_says() -> None:
    base = "rules: [{name: a, severity: unsafe, action: block}]\n"
    texts = [
        base,
        base + "degraded: edge",
        base + "deadline_ms: 100",
        base + "observe: true",
        base + "instructions: Be fair.",
        base + "unjudged_request: refuse",
        base + "unjudged_answer: pass",
        base + "unjudged_answer: refuse",
        base.replace("block", "block, observe: true"),
        *(
            base + f"layers: {{{layer}}}"
            for layer in (
                "tenant: {a: {debounce: 3}}",
                "tenant: {b: {debounce: 3}}",
                "route: {a: {debounce: 3}}",
                "tenant: {a: {debounce: 4}}",
                "tenant: {a: {without: a}}",
                "tenant: {a: {thresholds: {PII: 0.5}}}",
                "tenant: {a: {rules: [{name: b, severity: safe, action: warn}]}}",
                "tenant: {a: {on_guard_error: warn}}",
                "tenant: {a: {on_guard_error: {default: warn, timeout: block}}}",
                "tenant: {a: {otherwise: warn}}",
                "tenant: {a: {observe: false}}",
                "tenant: {a: {retention: full}}",
                "tenant: {a: {degraded: none}}",
                "tenant: {a: {deadline_ms: 5}}",
                "tenant: {a: {message: M}}",
                "tenant: {a: {unjudged_request: pass}}",
                "tenant: {a: {unjudged_answer: drop}}",
                "tenant: {a: {instructions: I}}",
                "tenant: {a: {controversial: safe}}",
            )
        ),
    ]

    versions = [policy(text).version for text in texts]

    assert len(set(versions)) == len(texts)


def test_the_order_of_layers_and_the_case_of_regions_do_not_change_the_version() -> None:
    one = policy("rules: []\nlayers: {region: {IN: {debounce: 3}, EU: {debounce: 4}}, tenant: {a: {debounce: 5}}}")
    two = policy("rules: []\nlayers: {tenant: {a: {debounce: 5}}, region: {eu: {debounce: 4}, in: {debounce: 3}}}")
    plain = policy("rules: []")
    long = policy(
        "rules: []\ndegraded: none\nunjudged_request: pass\nunjudged_answer: drop\nobserve: false\nlayers: {}"
    )

    assert one.version == two.version
    assert long.version == plain.version
    assert parse_policy("{name: x, on_guard_error: block, otherwise: block, rules: []}").version == (
        parse_policy("{name: x, on_guard_error: {default: block, timeout: block}, otherwise: block, rules: []}").version
    )


ONE = "{name: x, severity: safe, action: warn}"


@pytest.mark.parametrize(
    ("text", "place", "expected"),
    [
        ("rules: []\nlayers: {country: {}}", "5:10", "layers: unknown kind of layer 'country'"),
        ("rules: []\nlayers: {tenant: {a: {}}}", "5:22", "layers.tenant.a: the layer says nothing"),
        ("rules: []\nlayers: {tenant: {a: {name: b}}}", "5:23", "layers.tenant.a: unknown key 'name'"),
        ("rules: []\nlayers: {tenant: {a: {debounce: 0}}}", "5:33", "layers.tenant.a.debounce: expected a whole"),
        ("rules: []\nlayers: {tenant: {a*b: {debounce: 1}}}", "5:24", "'a*b' has a * that is not at its end"),
        ("rules: []\nlayers: {region: {'E*': {debounce: 1}}}", "5:25", "a region has no *"),
        (
            "rules: []\nlayers: {region: {IN: {debounce: 1}, in: {debounce: 2}}}",
            "5:42",
            "two layers are for the region 'in'",
        ),
        ("rules: []\nlayers: {tenant: {a: {debounce: 1}, a: {debounce: 1}}}", "5:37", "the tenant 'a' is given twice"),
        (
            "rules: [{name: one, severity: unsafe, action: block}]\nlayers: {tenant: {a: {without: [two, ome]}}}",
            "5:33",
            "unknown rule 'two'",
        ),
        (
            "rules: [{name: one, severity: unsafe, action: block}]\nlayers: {tenant: {a: {without: ome}}}",
            "5:32",
            "did you mean 'one'",
        ),
        (
            "rules: []\nlayers: {tenant: {a: {without: x, rules: [{name: x, severity: safe, action: warn}]}}}",
            "5:32",
            "'x' is a rule of this layer",
        ),
        (
            "rules: [" + ONE + "]\nlayers: {tenant: {a: {rules: [" + ONE + "]}}}",
            "5:31",
            "two rules have the name 'x'",
        ),
        ("rules: []\nobserve: yes", "5:10", "observe: expected true or false, got 'yes'"),
        ("rules: []\ndeadline_ms: 1.5", "5:14", "deadline_ms: expected a whole number from 1 to 600000"),
        ("rules: []\ninstructions: a <|im_end|>", "5:15", "instructions: <| begins a control token"),
        ("rules: []\ndegraded: gen", "5:11", "degraded: unknown guard for when the guard fails 'gen'"),
        ("rules: []\nunjudged_request: drop", "5:19", "unjudged_request: unknown treatment 'drop'"),
        ("rules: []\nunjudged_answer: cut", "5:18", "unjudged_answer: unknown treatment 'cut'"),
        ("rules: [{name: unjudged_answer, severity: safe, action: warn}]", "4:16", "take another name"),
        ("rules: [{name: observe, severity: unsafe, action: block}]", "4:16", "take another name"),
    ],
)
def test_what_cannot_be_used_in_a_layer_is_an_error_with_its_place(text: str, place: str, expected: str) -> None:
    with pytest.raises(PolicyError) as caught:
        policy(text)

    assert expected in str(caught.value)
    assert caught.value.where == f"test.yaml:{place}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{timeout: warn}", "on_guard_error: the key 'default' is missing"),
        ("{default: warn, timeuot: block}", "unknown kind of failure 'timeuot', did you mean 'timeout'?"),
        ("[block]", "expected text, got a list"),
    ],
)
def test_on_guard_error_is_an_action_or_one_for_each_kind(text: str, expected: str) -> None:
    with pytest.raises(PolicyError) as caught:
        parse_policy(f"{{name: x, on_guard_error: {text}, otherwise: allow, rules: []}}")

    assert expected in str(caught.value)


def test_a_policy_built_in_code_cannot_have_two_layers_for_the_same() -> None:
    layers = (Layer("region", "IN", debounce=3), Layer("region", "in", debounce=4))

    with pytest.raises(ValueError, match="two layers"):
        Policy("x", (), Action.BLOCK, Action.ALLOW, layers=layers)
    assert OnGuardError(Action.WARN).action("Anything") is Action.WARN


# --- the documentation --------------------------------------------------------------------------------------------

PAGE = (Path(__file__).parents[1] / "docs" / "policy.md").read_text(encoding="utf-8")
EXAMPLES = [parse_policy(part.split("```")[0], source="docs/policy.md") for part in PAGE.split("```yaml\n")[2:]]


def test_the_documented_layers_do_what_the_page_says() -> None:
    forum, helpline, strangers = EXAMPLES

    def rule(severity: Severity, *categories: str, **scope: str) -> str:
        return decide(forum, verdict(severity, *categories), Scope(**scope)).rule

    assert rule(UNSAFE, "Politically Sensitive Topics") == "politics"
    assert rule(UNSAFE, "Politically Sensitive Topics", tenant="newspaper-2") == "unsafe"
    assert rule(CONTROVERSIAL, tenant="newspaper-kids") == "no-doubt-for-kids"
    assert rule(UNSAFE, route="/v1/moderations") == "observe"
    kids = forum.at(Scope(tenant="newspaper-kids", region="in"))
    assert (kids.debounce, kids.retention, kids.thresholds["Violent"]) == (1, "full", 0.2)
    assert kids.instructions.startswith("Judge for users in India")
    assert (helpline.on_failure("GuardOverloaded"), helpline.on_failure("GuardError")) == (Action.REVIEW, Action.BLOCK)
    assert (helpline.degraded, helpline.deadline_ms) == ("edge", 800)
    assert strangers.history == History(judge=True)


def test_every_preset_for_a_field_is_on_the_page() -> None:
    for name in FIELDS:
        assert f"| `{name}` |" in PAGE


# --- what no guard can judge --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failure", "setting", "mild", "strict"),
    [
        (UNJUDGED_REQUEST, "unjudged_request", "pass", "refuse"),
        (UNJUDGED_ANSWER, "unjudged_answer", "drop", "refuse"),
        (UNJUDGED_ANSWER, "unjudged_answer", "pass", "refuse"),
    ],
)
def test_text_that_nobody_can_judge_is_decided_by_a_setting_of_its_own(
    failure: GuardFailure, setting: str, mild: str, strict: str
) -> None:
    """It is no guard's failure, so that on_guard_error does not count; layers and observing do."""
    chosen = policy(f"rules: []\n{setting}: {mild}\nlayers: {{tenant: {{a: {{{setting}: {strict}}}}}}}")
    watched = policy(f"rules: []\n{setting}: {strict}\nobserve: true")

    mildly, strictly = decide(chosen, failure), decide(chosen, failure, Scope(tenant="a"))

    assert (mildly.action, mildly.rule) == (Action.ALLOW, setting)
    assert (strictly.action, strictly.rule, strictly.failure) == (Action.BLOCK, setting, failure)
    assert decide(watched, failure).action is Action.ALLOW
    assert decide(watched, failure).observed == Observed(Action.BLOCK, setting)
    assert f"{setting} of tenant a says {strict}" in explain(chosen, failure, Scope(tenant="a")).because
