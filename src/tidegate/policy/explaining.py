"""Why a policy decides as it does: which layers a scope has, what each rule said, and which one won."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tidegate.policy.deciding import UNJUDGED, Policy, ScopedPolicy, decide
from tidegate.policy.rules import FAILURE_KINDS, SETTINGS, Rule
from tidegate.types import Category, Decision, GuardFailure, Scope, Severity, Target, Verdict

__all__ = ["Explanation", "Setting", "Trying", "explain"]

DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class Setting:
    """What holds for a scope, and which layer says it."""

    name: str
    value: str
    layer: str


@dataclass(frozen=True, slots=True)
class Trying:
    """What became of one rule.

    Attributes:
        category: for which present category it was tried; None when there was none.
        rule: its name.
        layer: where it stands.
        matched: whether it matched.
        observed: whether it is only observed, so that the next one was tried all the same.
        why: what made it match or not.
    """

    category: str | None
    rule: str
    layer: str
    matched: bool
    observed: bool
    why: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """A decision and all its reasons.

    Attributes:
        decision: the same as `decide` gives.
        layers: the layers of the scope, lowest first, beginning with ``default``.
        settings: what holds, and where it comes from.
        categories: for each category that the verdict or the policy speaks of, whether it is present and why.
        tried: the rules in the order in which they were tried, up to the one that matched, for each category.
        because: the last step, in a sentence.
    """

    decision: Decision
    layers: tuple[str, ...]
    settings: tuple[Setting, ...]
    categories: tuple[tuple[str, bool, str], ...]
    tried: tuple[Trying, ...]
    because: str

    def as_json(self) -> dict[str, Any]:
        """As JSON values."""
        one, seen = self.decision, self.decision.observed
        return {
            "action": one.action.word,
            "rule": one.rule,
            "policy": one.policy,
            "version": one.policy_version,
            "advice": [advice.value for advice in one.advice],
            "observed": None if seen is None else {"action": seen.action.word, "rule": seen.rule},
            "because": self.because,
            "layers": list(self.layers),
            "settings": {each.name: {"value": each.value, "layer": each.layer} for each in self.settings},
            "categories": [{"name": name, "present": there, "why": why} for name, there, why in self.categories],
            "tried": [
                {
                    "category": each.category,
                    "rule": each.rule,
                    "layer": each.layer,
                    "matched": each.matched,
                    "observed": each.observed,
                    "why": each.why,
                }
                for each in self.tried
            ],
        }


def explain(policy: Policy, verdict: Verdict | GuardFailure, scope: Scope = Scope()) -> Explanation:  # noqa: B008 - frozen
    """Why the policy decides as it does about a verdict, or about a guard that could not judge."""
    decision = decide(policy, verdict, scope)
    layers = (DEFAULT, *(layer.name for layer in policy.layers_for(scope)))
    settings = tuple(_settings(policy, scope))
    if isinstance(verdict, GuardFailure):
        return Explanation(decision, layers, settings, (), (), _because_of_failure(decision, verdict, settings))
    rules = policy.for_scope(scope, verdict.target)
    tried = tuple(_tried(policy, rules, verdict))
    categories = tuple(_categories(rules, verdict))
    return Explanation(decision, layers, settings, categories, tried, _because(decision, rules, verdict, tried))


# --- what holds ---------------------------------------------------------------------------------------------------


def _settings(policy: Policy, scope: Scope) -> Iterator[Setting]:
    here = policy.at(scope)
    pile = policy.layers_for(scope)
    for name in SETTINGS:
        said = [layer.name for layer in pile if getattr(layer, name) is not None]
        if name == "instructions" and said:
            layer = " + ".join(([DEFAULT] if policy.instructions else []) + said)
        else:
            layer = said[-1] if said else DEFAULT
        yield Setting(name, _value(here, name), layer)
    for category, least in here.thresholds.items():
        said = [layer.name for layer in pile if category in layer.thresholds]
        yield Setting(f"threshold of {category}", f"{least:g}", said[-1] if said else DEFAULT)


def _value(policy: Policy, name: str) -> str:
    if name == "on_guard_error":
        kinds = [f"{kind}: {action.word}" for kind, action in policy.failure_actions.items()]
        return ", ".join([policy.on_guard_error.word, *kinds])
    if name == "otherwise":
        return policy.otherwise.word
    if name == "history":
        said = policy.history
        return f"judged, at most {said.at_most.word}, {said.turns} turns" if said.judge else "not judged"
    value = getattr(policy, name)
    return "yes" if value is True else "no" if value is False else "none" if value in (None, "") else str(value)


def _because_of_failure(decision: Decision, failure: GuardFailure, settings: tuple[Setting, ...]) -> str:
    setting = UNJUDGED.get(failure.kind)
    if setting is not None:
        chosen = next(each for each in settings if each.name == setting)
        because = f"{failure.message}, and {setting} of {chosen.layer} says {chosen.value}"
        return because if decision.rule == setting else f"{because}; but the policy is only observed here"
    kind = FAILURE_KINDS.get(failure.kind, DEFAULT)
    layer = next(each.layer for each in settings if each.name == "on_guard_error")
    seen = decision.observed
    word = decision.action.word if decision.rule == "on_guard_error" else seen.action.word if seen else "allow"
    said = f"the guard could not judge ({failure.kind}), and on_guard_error of {layer} says {word} for {kind}"
    return said if decision.rule == "on_guard_error" else f"{said}; but the policy is only observed here"


# --- the categories -----------------------------------------------------------------------------------------------


def _categories(rules: ScopedPolicy, verdict: Verdict) -> Iterator[tuple[str, bool, str]]:
    present = rules.present(verdict)
    thresholds, known = rules.policy.thresholds, verdict.category_probabilities
    for name in sorted({*verdict.categories, *(thresholds.keys() & known.keys())}):
        there = name in present
        if verdict.target is Target.RESPONSE and name == Category.JAILBREAK.value:
            yield name, False, "it is about prompts, and this is a response"
        elif name in thresholds and name in known:
            sign = "at least" if there else "less than"
            yield name, there, f"its probability {known[name]:.3g} is {sign} the threshold {thresholds[name]:g}"
        elif name in thresholds:
            yield name, there, "the guard names it, and gives no probability to hold against the threshold"
        else:
            yield name, there, "the guard names it, and the policy has no threshold for it"


# --- the rules ----------------------------------------------------------------------------------------------------


def _tried(policy: Policy, rules: ScopedPolicy, verdict: Verdict) -> Iterator[Trying]:
    of_layer = {rule.name: layer.name for layer in policy.layers for rule in layer.rules}
    for category in rules.present(verdict) or (None,):
        yield from _tried_for(category, of_layer, rules, verdict)


def _tried_for(
    category: str | None, of_layer: dict[str, str], rules: ScopedPolicy, verdict: Verdict
) -> Iterator[Trying]:
    lifts = (False, True) if rules.policy.controversial == "unsafe" else (False,)
    for lifted in lifts:
        for rule in rules.policy.rules:
            why_not = _why_not(rule, category, rules, verdict, lifted=lifted)
            matched = why_not is None
            passed = rule.observe and not rules.policy.observe  # where all is only observed, one rule is as another
            why = why_not or _why(lifted=lifted, passed=passed)
            yield Trying(category, rule.name, of_layer.get(rule.name, DEFAULT), matched, passed, why)
            if matched and not passed:
                return


def _why(*, lifted: bool, passed: bool) -> str:
    said = "all that it asks for is so"
    if lifted:
        said += ", taking what is controversial for unsafe"
    return f"{said}; but it is only observed" if passed else said


def _why_not(rule: Rule, category: str | None, rules: ScopedPolicy, verdict: Verdict, *, lifted: bool) -> str | None:
    """What keeps a rule from matching; None when nothing does."""
    if rule.target not in (None, verdict.target):
        return f"it is for a {rule.target}, and this is a {verdict.target}"
    outside = rule.outside(rules.scope)
    if outside is not None:
        value = getattr(rules.scope, outside)
        return f"it is for another {outside}, not {value!r}" if value is not None else f"the {outside} is not known"
    if rule.categories and category not in rule.categories:
        return f"it is for {', '.join(rule.categories)}"
    severity, odds = verdict.severity, verdict.probabilities
    if lifted and severity > Severity.SAFE:
        severity = Severity.UNSAFE
    if severity < rule.severity:
        return f"it asks for {rule.severity.word}, and the guard says {verdict.severity.word}"
    unsafe = odds.flagged if lifted else odds.unsafe
    if rule.min_unsafe is not None and unsafe < rule.min_unsafe:
        return f"it asks for a probability of unsafe of {rule.min_unsafe:g}, and it is {unsafe:.3g}"
    if rule.min_flagged is not None and odds.flagged < rule.min_flagged:
        return f"it asks for a probability of flagged of {rule.min_flagged:g}, and it is {odds.flagged:.3g}"
    return None


def _because(decision: Decision, rules: ScopedPolicy, verdict: Verdict, tried: tuple[Trying, ...]) -> str:
    if decision.rule == "observe":
        seen = decision.observed
        words = f"{seen.rule} would {seen.action.word}" if seen else "nothing would be done"
        return f"{words}, but the policy is only observed here"
    winners = {each.rule: each for each in tried if each.matched and not each.observed}
    if decision.rule in winners:
        winner = winners[decision.rule]
        if len(rules.present(verdict)) > 1:
            return f"of all present categories, {winner.category} gets the strictest action, by the first rule for it"
        return f"it is the first rule that matches, and stands in {winner.layer}"
    if decision.rule == "controversial":
        return "no rule matches, the guard finds the text not safe, and controversial is review"
    return "no rule matches"
