"""What policies say of how a stop is carried out: interventions, holding, rollback, confirming, languages."""

from __future__ import annotations

import pytest

from tidegate.errors import PolicyError
from tidegate.policy import Confirm, Hold, Policy, Rollback, decide, explain, load_policy, parse_policy
from tidegate.types import Category, Probabilities, Scope, Severity, Span, Target, TokenVerdict, Verdict

HEAD = "name: test\non_guard_error: block\notherwise: allow\n"


def policy(text: str = "", rules: str = "rules: []") -> Policy:
    return parse_policy(f"{HEAD}{text}\n{rules}\n", source="my.yaml")


def unsafe(*categories: str, target: Target = Target.RESPONSE) -> Verdict:
    return Verdict(target, Severity.UNSAFE, Probabilities(0, 0.1, 0.9), categories)


def test_what_is_left_out_is_as_it_always_was_and_changes_no_version() -> None:
    plain = policy()

    assert (plain.intervention, plain.hold, plain.rollback, plain.confirm) == (
        None,
        Hold(),
        Rollback(),
        Confirm(enabled=False),
    )
    assert plain.version == policy("hold: hold\nconfirm: false\nrollback: {}").version
    assert load_policy("balanced").hold == Hold()


@pytest.mark.parametrize(
    "text",
    [
        "intervention: cut",
        "hold: release_first",
        "hold: {risk: 0.3}",
        "hold: {mode: release_first, leak: 0}",
        "hold: {delay_ms: 100}",
        "hold: {leak: 5, delay_ms: 100, when_late: release}",
        "rollback: {tries: 3}",
        "rollback: {hint: other}",
        "confirm: true",
        "confirm: {on_error: pass}",
        "message: {default: no, de: nein}",
    ],
)
def test_whatever_changes_what_is_done_changes_the_version(text: str) -> None:
    versions = {policy().version, policy("message: no").version, policy(text).version}

    assert len(versions) == 3


@pytest.mark.parametrize(
    ("text", "where", "message"),
    [
        ("intervention: stop", "4:15", "intervention: unknown intervention 'stop'"),
        ("hold: hld", "4:7", "hold: unknown mode 'hld', did you mean 'hold'"),
        ("hold: {risk: 2}", "4:14", "hold.risk: expected a probability"),
        ("hold: {delay: 5}", "4:8", "unknown key 'delay', did you mean 'delay_ms'"),
        ("hold: {leak: 5}", "4:14", "hold.leak: mode: hold lets nothing out"),
        ("hold: {when_late: fail}", "4:19", "hold.when_late: nothing is ever late"),
        ("hold: {delay_ms: 9, when_late: release}", "4:32", "hold.when_late: nothing may be released"),
        ("hold: {mode: release_first, leak: 0, delay_ms: 9, when_late: release}", "4:62", "nothing may be released"),
        ("rollback: {tries: 0}", "4:19", "rollback.tries: expected a whole number from 1 to 10"),
        ("rollback: {then: redact}", "4:18", "rollback.then: unknown intervention 'redact'"),
        ("rollback: {hint: a <|im_end|>}", "4:18", "<| begins a control token"),
        ("confirm: maybe", "4:10", "expected true or false"),
        ("confirm: {on_error: block}", "4:21", "confirm.on_error: unknown way out 'block'"),
        ("message: {de: nein}", "4:10", "the key 'default' is missing"),
        ("message: {default: no, german language: nein}", "4:41", "expected a BCP-47 tag"),
        ("message: {default: no, de: nein, DE: nein}", "4:38", "the language 'de' is given twice"),
    ],
)
def test_what_cannot_be_used_is_an_error_with_its_place(text: str, where: str, message: str) -> None:
    with pytest.raises(PolicyError) as caught:
        policy(text)

    assert message in str(caught.value)
    assert caught.value.where == f"my.yaml:{where}"


def test_a_rule_that_stops_nothing_has_no_intervention() -> None:
    with pytest.raises(PolicyError, match=r"rules\[0\].intervention: a rule that says warn stops nothing"):
        policy(rules="rules: [{name: a, severity: unsafe, action: warn, intervention: cut}]")


def test_a_message_is_in_the_language_of_the_scope() -> None:
    of = policy(
        "message: {default: no, de: nein, de-CH: nei}",
        "rules: [{name: a, severity: unsafe, action: block, message: {default: stop, fr: arrêt}}]",
    )

    assert [of.message_for("otherwise", tag) for tag in (None, "de", "DE_at", "de-CH-1996", "fr", "deu")] == [
        "no",
        "nein",
        "nein",
        "nei",
        "no",
        "no",
    ]
    assert [of.message_for("a", tag) for tag in (None, "fr-CA", "de")] == ["stop", "arrêt", "stop"]


def test_a_layer_says_its_own_and_takes_back_what_lies_below() -> None:
    of = policy(
        "intervention: replace\nconfirm: true\nmessage: {default: no, de: nein}\nhold: {risk: 0.4}\n"
        "layers:\n  tenant:\n    a: {intervention: rollback, confirm: false, message: other, rollback: {tries: 1}}"
    )
    here = of.at(Scope(tenant="a"))

    assert (here.intervention, here.confirm.enabled, here.rollback.tries, here.hold.risk) == ("rollback", False, 1, 0.4)
    assert here.message_for("otherwise", "de") == "other"
    assert here.may_roll_back
    assert not of.at(Scope()).may_roll_back
    layers = {each.name: each.layer for each in explain(of, unsafe(), Scope(tenant="a")).settings}
    assert (layers["intervention"], layers["hold"], layers["rollback"]) == ("tenant a", "default", "tenant a")


def test_a_rules_intervention_goes_before_the_policys() -> None:
    of = policy(
        "intervention: replace",
        "rules: [{name: a, severity: unsafe, categories: [PII], action: block, intervention: cut},"
        " {name: b, severity: unsafe, action: block}]",
    )

    assert (of.intervention_for("a"), of.intervention_for("b"), of.intervention_for("otherwise")) == (
        "cut",
        "replace",
        "replace",
    )


PII, VIOLENT = Category.PII.value, Category.VIOLENT.value


@pytest.mark.parametrize(
    ("rules", "categories", "enough"),
    [
        ("[{name: a, severity: unsafe, categories: [PII], action: redact}]", (PII,), True),
        ("[{name: a, severity: unsafe, action: redact}]", (PII,), True),
        ("[{name: a, severity: unsafe, action: redact}]", (VIOLENT,), False),
        ("[{name: a, severity: unsafe, action: redact}]", (PII, VIOLENT), False),
        ("[{name: a, severity: unsafe, action: redact}]", (), False),
        ("[{name: a, severity: unsafe, action: block}]", (PII,), False),
        ("[{name: a, severity: unsafe, action: block, intervention: redact}]", (PII,), True),
        ("[{name: a, severity: unsafe, categories: [PII], action: redact}, {name: b, severity: unsafe, action: warn}]",
         (PII, VIOLENT), True),
    ],
)  # fmt: skip
def test_personal_data_is_taken_out_where_nothing_else_is_to_be_stopped(
    rules: str, categories: tuple[str, ...], enough: bool
) -> None:
    scoped = policy(rules=f"rules: {rules}").for_scope(Scope(), Target.RESPONSE)

    assert scoped.redacts(unsafe(*categories)) is enough
    if len(categories) == 1:
        said = TokenVerdict(Span(0, 1), Severity.UNSAFE, Probabilities(0, 0.1, 0.9), categories[0], 0.9)
        action, redacts = scoped.call(said)
        assert redacts is enough
        assert action is decide(scoped.policy, unsafe(*categories)).action


def test_a_policy_without_a_redacting_rule_masks_nothing() -> None:
    assert (
        not policy(rules="rules: [{name: a, severity: unsafe, action: block}]")
        .for_scope(Scope(), Target.RESPONSE)
        .masks
    )
    only_prompts = policy(rules="rules: [{name: a, severity: unsafe, target: prompt, action: redact}]")
    assert only_prompts.for_scope(Scope(), Target.PROMPT).masks
    assert not only_prompts.for_scope(Scope(), Target.RESPONSE).masks
