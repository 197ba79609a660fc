"""The policy itself, and how it chooses: from verdict and scope to a decision."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from tidegate.policy.carrying import (
    HOLDING,
    NO_CONFIRM,
    ROLLBACK,
    Confirm,
    Hold,
    InterventionWord,
    Messages,
    Rollback,
    in_language,
)
from tidegate.policy.rules import (
    Controversial,
    Degraded,
    History,
    Layer,
    OnGuardError,
    Retention,
    Rule,
    UnjudgedAnswer,
    UnjudgedRequest,
    canonical_rule,
)
from tidegate.types import (
    Action,
    Advice,
    Category,
    Coverage,
    Decision,
    GuardFailure,
    Observed,
    Probabilities,
    Scope,
    Severity,
    Target,
    TokenVerdict,
    Verdict,
)

__all__ = [
    "DEFAULT_MESSAGE",
    "RESERVED_NAMES",
    "UNJUDGED_ANSWER",
    "UNJUDGED_REQUEST",
    "Policy",
    "ScopedPolicy",
    "decide",
    "decide_token",
]

DEFAULT_MESSAGE: Final = "This content was stopped by a safety policy."
RESERVED_NAMES: Final = (
    "otherwise",
    "on_guard_error",
    "controversial",
    "observe",
    "unjudged_request",
    "unjudged_answer",
    "earlier_turn",
)
"""Names that a decision gives when no rule of the file chose; a rule cannot take them."""

UNJUDGED_REQUEST: Final = GuardFailure("UnjudgedRequest", "the request has text that no guard can judge")
UNJUDGED_ANSWER: Final = GuardFailure("UnjudgedAnswer", "the answer has text that no guard can judge")
UNJUDGED: Final = {UNJUDGED_REQUEST.kind: "unjudged_request", UNJUDGED_ANSWER.kind: "unjudged_answer"}
"""Failures that are no guard's fault, and the setting that decides them."""

_REPLACED: Final = (
    "otherwise",
    "controversial",
    "debounce",
    "retention",
    "degraded",
    "deadline_ms",
    "unjudged_request",
    "unjudged_answer",
    "history",
    "observe",
    "message",
    "messages",
    "intervention",
    "hold",
    "rollback",
    "confirm",
)
"""What a layer says in the place of what is below it."""
UNJUDGED_HISTORY: Final = History()
_REMEMBERED: Final = 1024
"""So many scopes are worked out in advance; then it begins anew."""


@dataclass(frozen=True, slots=True)
class Policy:
    """From verdict and scope to action, as data.

    Attributes:
        name: of the policy.
        rules: tried in order; see the package's text.
        on_guard_error: what is done when the guard cannot judge, for the kinds of failure that are not in
            ``failure_actions``.
        otherwise: what is done when no rule matches.
        controversial: what a controversial verdict is that no rule speaks of.
        debounce: how many consecutive tokens must call for BLOCK before a stream is stopped; at least 1.
        retention: how the text of a decision is stored.
        thresholds: for each category named, the least probability, given that the text is not safe, at which it counts
            as present, in [0, 1].
        custom_categories: names beside the official nine that rules and thresholds may use.
        message: shown to the sender on a BLOCK.
        failure_actions: what is done after a failure of one kind: ``unavailable``, ``overloaded``, ``timeout``,
            ``unreadable``.
        degraded: ``edge`` lets the edge guard judge alone where the guard cannot; only when that fails too,
            ``on_guard_error`` is done.
        deadline_ms: milliseconds that the guard may take for a text or a piece of one, at least 1; None for as long as
            whoever asks it lets it.
        unjudged_request: whether a request may have text that no guard can judge: in pictures, sound and files, in
            fields that we do not know, as token ids.
        unjudged_answer: what is done about text of an answer that no guard can judge: words that the model did not
            choose (``top_logprobs``), and fields that we do not know.
        history: what becomes of earlier turns.
        observe: nothing is enforced: every decision is ALLOW, and says what it would have been.
        instructions: told to a generative guard beside its own policy; "" for none.
        messages: the message for some languages; ``message`` is for all others.
        intervention: how a BLOCK or REDACT is carried out on an answer; None cuts a stream, and puts the message in the
            place of a whole answer.
        hold: when text of a stream leaves.
        rollback: how an answer is rolled back, where the intervention says so.
        confirm: whether alarms of streams are confirmed by a second guard.
        layers: what is different for a region, a tenant, or a route. A policy that `at` gave has none.
        version: the first 12 hexadecimal digits of the SHA-256 of the canonical form, layers included.

    Raises:
        ValueError: when two rules have the same name, two layers are for the same, or debounce is less than 1.
    """

    name: str
    rules: tuple[Rule, ...]
    on_guard_error: Action
    otherwise: Action
    controversial: Controversial = "review"
    debounce: int = 2
    retention: Retention = "hash"
    thresholds: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    custom_categories: tuple[str, ...] = ()
    message: str = DEFAULT_MESSAGE
    failure_actions: Mapping[str, Action] = field(default_factory=lambda: MappingProxyType({}))
    degraded: Degraded = "none"
    deadline_ms: int | None = None
    observe: bool = False
    instructions: str = ""
    unjudged_request: UnjudgedRequest = "pass"
    unjudged_answer: UnjudgedAnswer = "drop"
    history: History = UNJUDGED_HISTORY
    layers: tuple[Layer, ...] = ()
    messages: Messages = ()
    intervention: InterventionWord | None = None
    hold: Hold = HOLDING
    rollback: Rollback = ROLLBACK
    confirm: Confirm = NO_CONFIRM
    version: str = field(init=False)
    _at: dict[Scope, Policy] = field(init=False, repr=False, compare=False, default_factory=dict)
    _scoped: dict[tuple[Scope, Target], ScopedPolicy] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        if self.debounce < 1:
            raise ValueError(f"debounce must be at least 1, got {self.debounce}")
        names = [rule.name for rule in self.all_rules]
        if len(set(names)) != len(names):
            raise ValueError("two rules of a policy have the same name")
        parts = {(layer.kind, layer.canonical()["pattern"]) for layer in self.layers}
        if len(parts) != len(self.layers):
            raise ValueError("two layers of a policy are for the same")
        object.__setattr__(self, "thresholds", MappingProxyType(dict(self.thresholds)))
        object.__setattr__(self, "failure_actions", MappingProxyType(dict(self.failure_actions)))
        digest = hashlib.sha256(self.canonical().encode("utf-8")).hexdigest()
        object.__setattr__(self, "version", digest[:12])

    def __hash__(self) -> int:
        return hash((self.name, self.version))

    @property
    def current(self) -> Policy:
        """Itself, so that it can stand where a `WatchedPolicy` can."""
        return self

    @property
    def all_rules(self) -> tuple[Rule, ...]:
        """The rules of the default and of every layer."""
        return (*self.rules, *(rule for layer in self.layers for rule in layer.rules))

    @property
    def confirms(self) -> bool:
        """Whether anybody's alarms are to be confirmed by a second guard."""
        return self.confirm.enabled or any(layer.confirm is not None and layer.confirm.enabled for layer in self.layers)

    def canonical(self) -> str:
        """The policy as JSON with sorted keys, defaults written out, and unordered lists sorted.

        Two files have the same canonical form exactly when they mean the same: comments, white space, quoting and the
        order of keys do not count, the order of rules does.
        """
        content = {
            "name": self.name,
            "controversial": self.controversial,
            "on_guard_error": OnGuardError(self.on_guard_error, self.failure_actions).canonical(),
            "otherwise": self.otherwise.word,
            "debounce": self.debounce,
            "retention": self.retention,
            "thresholds": {name: float(value) for name, value in self.thresholds.items()},
            "custom_categories": sorted(self.custom_categories),
            "message": self.message,
            "rules": [canonical_rule(rule) for rule in self.rules],
        } | self._newer()
        return json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))

    def _newer(self) -> dict[str, object]:
        """What came after the first version of the form: only what is set, so that older files keep their version."""
        said: dict[str, object] = {
            "degraded": "" if self.degraded == "none" else self.degraded,
            "deadline_ms": self.deadline_ms,
            "unjudged_request": "" if self.unjudged_request == "pass" else self.unjudged_request,
            "unjudged_answer": "" if self.unjudged_answer == "drop" else self.unjudged_answer,
            "history": None if self.history == UNJUDGED_HISTORY else self.history.canonical(),
            "observe": self.observe,
            "instructions": self.instructions,
            "messages": dict(self.messages),
            "intervention": self.intervention,
            "hold": None if self.hold == HOLDING else self.hold.canonical(),
            "rollback": None if self.rollback == ROLLBACK else self.rollback.canonical(),
            "confirm": None if self.confirm == NO_CONFIRM else self.confirm.canonical(),
            "layers": [layer.canonical() for layer in sorted(self.layers, key=lambda one: (one.height, one.pattern))],
        }
        return {key: value for key, value in said.items() if value}

    # whom it is for

    def layers_for(self, scope: Scope) -> tuple[Layer, ...]:
        """The layers that a scope has, lowest first."""
        return tuple(sorted((layer for layer in self.layers if layer.concerns(scope)), key=lambda one: one.height))

    def at(self, scope: Scope) -> Policy:
        """This policy as it is for a scope, all layers laid on the default; computed once for each scope.

        Its version is that of the whole. What a whole exchange needs, `message_for` and retention as well as rules,
        comes from here.
        """
        if not self.layers:
            return self
        anybodys = replace(scope, language=None, subject=None)
        found = self._at.get(anybodys)
        if found is None:
            if len(self._at) >= _REMEMBERED:
                self._at.clear()
            found = self._at[anybodys] = self._laid(self.layers_for(scope))
        return found

    def _laid(self, layers: Iterable[Layer]) -> Policy:
        laid = replace(self, layers=())
        for layer in layers:
            kept = tuple(rule for rule in laid.rules if rule.name not in layer.without)
            said: dict[str, Any] = {
                name: getattr(layer, name) for name in _REPLACED if getattr(layer, name) is not None
            }
            if layer.on_guard_error is not None:
                said["on_guard_error"] = layer.on_guard_error.default
                said["failure_actions"] = layer.on_guard_error.kinds
            if layer.instructions is not None:
                said["instructions"] = "\n".join(filter(None, (laid.instructions, layer.instructions)))
            thresholds = {**laid.thresholds, **layer.thresholds}
            laid = replace(laid, rules=(*layer.rules, *kept), thresholds=thresholds, **said)
        object.__setattr__(laid, "version", self.version)
        return laid

    def only_observed(self) -> Policy:
        """The same, only observed: for who wants to know what is said, and does nothing. Its version is the same."""
        other = replace(self, observe=True, layers=tuple(replace(layer, observe=None) for layer in self.layers))
        object.__setattr__(other, "version", self.version)
        return other

    def for_scope(self, scope: Scope, target: Target) -> ScopedPolicy:
        """The part of this policy that concerns a scope and target, compiled; computed once for each pair.

        A stream asks once and then calls `ScopedPolicy.action` for each token.
        """
        nobodys = scope if scope.subject is None else replace(scope, subject=None)
        scoped = self._scoped.get((nobodys, target))
        if scoped is None:
            if len(self._scoped) >= _REMEMBERED:
                self._scoped.clear()
            scoped = self._scoped[nobodys, target] = ScopedPolicy(self.at(scope), nobodys, target)
        return scoped if scope.subject is None else scoped.of(scope)

    # what it says

    def on_earlier(self, decision: Decision) -> Decision:
        """What a decision on an earlier turn means now: no more than `History.at_most`, by the rule ``earlier_turn``.

        Unless it counts as if it were new, it advises nothing: that was done when it was. Nobody takes anything out of
        an earlier turn, so that REDACT is BLOCK. Layers do not count: ask `at` first.
        """
        at_most = self.history.at_most
        seen = decision.observed
        now = Observed(*_lowered(decision.action, decision.rule, at_most), self._still(decision.advice))
        if seen is not None:
            seen = Observed(*_lowered(seen.action, seen.rule, at_most), self._still(seen.advice))
        seen = None if seen == now else seen
        return replace(decision, action=now.action, rule=now.rule, advice=now.advice, observed=seen)

    def _still(self, advice: tuple[Advice, ...]) -> tuple[Advice, ...]:
        return advice if self.history.at_most is Action.BLOCK else ()

    def on_failure(self, kind: str) -> Action:
        """What is done when nobody could judge, by the kind of failure; where nothing is enforced, what would be.

        ``kind`` is that of a GuardFailure: the name of its exception's class. Layers do not count: ask `at` first.
        """
        if kind in UNJUDGED:
            return Action.BLOCK if getattr(self, UNJUDGED[kind]) == "refuse" else Action.ALLOW
        return OnGuardError(self.on_guard_error, self.failure_actions).action(kind)

    def message_for(self, rule: str, language: str | None = None) -> str:
        """What the sender is shown when the rule of this name blocks, in a language where there is a text in it."""
        said = self._rule(rule)
        if said is not None and said.message is not None:
            return in_language(said.messages, language) or said.message
        return in_language(self.messages, language) or self.message

    def intervention_for(self, rule: str) -> InterventionWord | None:
        """How a stop by the rule of this name is carried out; None for the usual way."""
        said = self._rule(rule)
        return self.intervention if said is None or said.intervention is None else said.intervention

    @property
    def may_roll_back(self) -> bool:
        """Whether any stop here could be carried out by rolling back."""
        return "rollback" in (self.intervention, *(rule.intervention for rule in self.rules))

    def _rule(self, name: str) -> Rule | None:
        return next((candidate for candidate in self.rules if candidate.name == name), None)


def _lowered(action: Action, rule: str, at_most: Action) -> tuple[Action, str]:
    action = Action.BLOCK if action is Action.REDACT else action
    return (action, rule) if action <= at_most else (at_most, "earlier_turn")


# --- choosing -----------------------------------------------------------------------------------------------------


class _Choice(NamedTuple):
    """What one rule chooses. ``place`` is its position in the order; the built-in choices come last.

    ``redacts``: it is enough to take personal data out, where the text is of that kind.
    """

    action: Action
    rule: str
    place: int
    advice: tuple[Advice, ...] = ()
    redacts: bool = False


_Entry = tuple[Severity, float, float, _Choice]
"""A rule once scope, target and category are settled: severity, least P(unsafe) and P(flagged), and what it chooses."""
_ANY: Final = -1.0


class ScopedPolicy:
    """A policy for one scope and target: only the rules that can still match, grouped by category. Immutable.

    Args:
        policy: without layers, as `Policy.at` gives it.
        scope: for whom.
        target: about what.
        enforced: leave out what is only observed; else it is taken as if it were in force.

    Attributes:
        observing: the same with all that is only observed in force; None when nothing is only observed.
        quiet: the whole policy is only observed: nothing but ALLOW is done.
    """

    __slots__ = (
        "_by_category",
        "_controversial",
        "_fallback",
        "_general",
        "_lift",
        "_thresholds",
        "masks",
        "observing",
        "policy",
        "quiet",
        "scope",
        "target",
    )

    def __init__(self, policy: Policy, scope: Scope, target: Target, *, enforced: bool = True) -> None:
        self.policy = policy
        self.scope = scope
        self.target = target
        concerned = [rule for rule in enumerate(policy.rules) if rule[1].concerns(scope, target)]
        watched = policy.observe or any(rule.observe for _, rule in concerned)
        self.observing = ScopedPolicy(policy, scope, target, enforced=False) if enforced and watched else None
        self.quiet = enforced and policy.observe
        end = len(policy.rules)
        self._fallback = _Choice(policy.otherwise, "otherwise", end, redacts=policy.otherwise is Action.REDACT)
        self._controversial = (
            _Choice(Action.REVIEW, "controversial", end)
            if policy.controversial == "review" and policy.otherwise < Action.REVIEW
            else self._fallback
        )
        self._lift = policy.controversial == "unsafe"
        self._thresholds = dict(policy.thresholds)
        rules = [(place, rule) for place, rule in concerned if not (enforced and rule.observe)]
        self._general = _entries(rules, None, policy)
        named = {category for _, rule in rules for category in rule.categories}
        if target is Target.RESPONSE:
            named.discard(Category.JAILBREAK.value)
        self._by_category = {category: _entries(rules, category, policy) for category in named}
        personal = self._by_category.get(Category.PII.value, self._general)
        self.masks = any(choice.redacts for *_, choice in personal)

    def of(self, scope: Scope) -> ScopedPolicy:
        """The same for a scope that differs in its subject only: decisions are about that one."""
        other = copy.copy(self)
        other.scope = scope
        other.observing = None if self.observing is None else self.observing.of(scope)
        return other

    def action(self, token: TokenVerdict) -> Action:
        """What this token alone calls for. The same as deciding on a verdict that says what the token says."""
        return self.call(token)[0]

    def call(self, token: TokenVerdict) -> tuple[Action, bool]:
        """What this token alone calls for, and whether it is enough to take personal data out."""
        if self.quiet:
            return Action.ALLOW, False
        entries = self._general
        category, personal = token.category, False
        if category is not None:
            threshold = self._thresholds.get(category)
            present = token.severity > 0 if threshold is None else token.category_probability >= threshold
            if present:
                entries = self._by_category.get(category, entries)
                personal = category == Category.PII.value
        chosen = self._first(entries, token.severity, token.probabilities)
        return chosen.action, chosen.redacts and personal

    def decide(self, verdict: Verdict, coverage: Iterable[Coverage] = ()) -> Decision:
        """Apply the policy to a verdict on this target."""
        decision = self.choose(verdict, tuple(coverage))
        if self.observing is None:
            return decision
        return observed(decision, self.observing.choose(verdict), quiet=self.quiet)

    def present(self, verdict: Verdict) -> list[str]:
        """The categories that a verdict on this target has by the thresholds of the policy, sorted."""
        probabilities = verdict.category_probabilities
        judged = self._thresholds.keys() & probabilities.keys()
        present = {name for name in judged if probabilities[name] >= self._thresholds[name]}
        present.update(name for name in verdict.categories if name not in judged)
        if self.target is Target.RESPONSE:
            present.discard(Category.JAILBREAK.value)
        return sorted(present)

    def redacts(self, verdict: Verdict) -> bool:
        """Whether it is enough to take personal data out of the text: all that calls for a stop is of that kind."""
        calling = [
            (category, choice)
            for category in self.present(verdict)
            if (choice := self._chosen(verdict, category)).action >= Action.REDACT
        ]
        return bool(calling) and all(name == Category.PII.value and choice.redacts for name, choice in calling)

    def _chosen(self, verdict: Verdict, category: str) -> _Choice:
        entries = self._by_category.get(category, self._general)
        return self._first(entries, verdict.severity, verdict.probabilities)

    def choose(self, verdict: Verdict | GuardFailure, coverage: tuple[Coverage, ...] = ()) -> Decision:
        """What the rules here choose, without a word on what is only observed."""
        if isinstance(verdict, GuardFailure):
            return self._choose_on_failure(verdict, coverage)
        choices = [self._chosen(verdict, category) for category in self.present(verdict)] or [
            self._first(self._general, verdict.severity, verdict.probabilities)
        ]
        chosen = max(choices, key=lambda choice: (choice.action, -choice.place))
        advice = {advice for choice in choices for advice in choice.advice}
        return Decision(
            chosen.action,
            chosen.rule,
            self.policy.name,
            self.policy.version,
            verdict=verdict,
            scope=self.scope,
            coverage=coverage,
            advice=tuple(sorted(advice, key=list(Advice).index)),
        )

    def _choose_on_failure(self, failure: GuardFailure, coverage: tuple[Coverage, ...]) -> Decision:
        return Decision(
            self.policy.on_failure(failure.kind),
            UNJUDGED.get(failure.kind, "on_guard_error"),
            self.policy.name,
            self.policy.version,
            failure=failure,
            scope=self.scope,
            coverage=coverage,
        )

    def _first(self, entries: tuple[_Entry, ...], severity: Severity, probabilities: Probabilities) -> _Choice:
        unsafe, flagged = probabilities.unsafe, probabilities.flagged
        for least, min_unsafe, min_flagged, choice in entries:
            if severity >= least and unsafe >= min_unsafe and flagged >= min_flagged:
                return choice
        if self._lift:
            lifted = Severity.SAFE if severity == Severity.SAFE else Severity.UNSAFE
            for least, min_unsafe, min_flagged, choice in entries:
                if lifted >= least and flagged >= min_unsafe and flagged >= min_flagged:
                    return choice
        return self._fallback if severity < Severity.CONTROVERSIAL else self._controversial


def _entries(rules: Iterable[tuple[int, Rule]], category: str | None, policy: Policy) -> tuple[_Entry, ...]:
    return tuple(
        (
            rule.severity,
            _ANY if rule.min_unsafe is None else rule.min_unsafe,
            _ANY if rule.min_flagged is None else rule.min_flagged,
            _Choice(rule.action, rule.name, place, rule.advice, _takes_out(rule, policy)),
        )
        for place, rule in rules
        if not rule.categories or category in rule.categories
    )


def _takes_out(rule: Rule, policy: Policy) -> bool:
    """Whether a rule stops only what it cannot take out of the text."""
    intervention = rule.intervention or policy.intervention
    return rule.action is Action.REDACT or (rule.action is Action.BLOCK and intervention == "redact")


def observed(decision: Decision, other: Decision, *, quiet: bool = False) -> Decision:
    """What is enforced, with what it would have been.

    Args:
        decision: by what is in force.
        other: by all, what is only observed included.
        quiet: the whole policy is only observed, so that nothing but ALLOW is enforced.
    """
    if quiet:
        if other.action is Action.ALLOW and not other.advice:
            return replace(decision, action=Action.ALLOW, rule=other.rule, advice=())
        decision = replace(decision, action=Action.ALLOW, rule="observe", advice=())
    if (decision.action, decision.rule, decision.advice) == (other.action, other.rule, other.advice):
        return decision
    return replace(decision, observed=Observed(other.action, other.rule, other.advice))


def decide(
    policy: Policy,
    verdict: Verdict | GuardFailure,
    scope: Scope = Scope(),  # noqa: B008 - frozen
    coverage: Iterable[Coverage] = (),
) -> Decision:
    """What the policy does about a verdict, or about a guard that could not judge. Every input has a decision."""
    if isinstance(verdict, Verdict):
        return policy.for_scope(scope, verdict.target).decide(verdict, coverage)
    rules = policy.for_scope(scope, Target.PROMPT)
    decision = rules.choose(verdict, tuple(coverage))
    return observed(decision, decision, quiet=True) if rules.quiet else decision


def decide_token(
    policy: Policy,
    token: TokenVerdict,
    *,
    target: Target = Target.RESPONSE,
    scope: Scope = Scope(),  # noqa: B008 - frozen
) -> Action:
    """What one token of a stream alone calls for, before any debounce.

    A stream of many tokens asks `Policy.for_scope` once, and then its ``action``.
    """
    return policy.for_scope(scope, target).action(token)
