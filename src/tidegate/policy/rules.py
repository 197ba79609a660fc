"""Rules and layers: the rows of a policy, and for whom they are.

A rule narrows by severity, category, target and scope. A layer is a part of a policy for one region, tenant or route;
layers lie on the default in this order, and of two of the same kind the one with the longer pattern lies above, an
exact name above every prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, Literal

from tidegate.policy.carrying import Confirm, Hold, InterventionWord, Messages, Rollback
from tidegate.types import Action, Advice, Scope, Severity, Target

__all__ = [
    "LAYER_KINDS",
    "Controversial",
    "Degraded",
    "Layer",
    "LayerKind",
    "OnGuardError",
    "Retention",
    "Rule",
    "UnjudgedAnswer",
    "UnjudgedRequest",
]

Controversial = Literal["safe", "unsafe", "review"]
Retention = Literal["full", "redacted", "hash"]
Degraded = Literal["none", "edge"]
UnjudgedRequest = Literal["pass", "refuse"]
UnjudgedAnswer = Literal["drop", "pass", "refuse"]
LayerKind = Literal["region", "tenant", "route"]

LAYER_KINDS: Final[tuple[LayerKind, ...]] = ("region", "tenant", "route")
"""The kinds of layers, lowest first; the default lies below them all."""

SETTINGS: Final = (
    "controversial",
    "on_guard_error",
    "otherwise",
    "debounce",
    "retention",
    "degraded",
    "deadline_ms",
    "unjudged_request",
    "unjudged_answer",
    "history",
    "observe",
    "message",
    "instructions",
    "intervention",
    "hold",
    "rollback",
    "confirm",
)
"""What a policy and each of its layers can set, beside thresholds and rules."""

FAILURE_KINDS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "GuardUnavailable": "unavailable",
        "GuardOverloaded": "overloaded",
        "GuardTimeout": "timeout",
        "UnreadableVerdict": "unreadable",
    }
)
"""The word that a policy uses for each kind of failure; every other kind is ``default``."""


# --- rules --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rule:
    """One row of a policy: what it is about, and what is then done. Whatever is left empty matches everything.

    Attributes:
        name: unique in its policy; part of every decision that it makes.
        severity: this one or a worse one.
        action: what is done.
        min_unsafe: least probability of unsafe, in [0, 1]; None for any.
        min_flagged: least probability of controversial and unsafe together, in [0, 1]; None for any.
        categories: official or custom names, one of which must be present; () for any or none.
        target: only prompts or only responses; None for both.
        tenants: exact names, or prefixes that end in ``*``.
        regions: names, in any case.
        routes: exact paths, or prefixes that end in ``*``.
        languages: BCP-47 tags in any case; ``de`` also matches ``de-AT``.
        advice: what is suggested beside the action.
        message: shown to the sender when this rule blocks; None for the policy's.
        messages: the same for some languages; ``message`` is for all others.
        intervention: how a BLOCK or REDACT of this rule is carried out on an answer; None for as the policy says.
        observe: it is only watched: what it would have done is in the decision, and nothing is done.
    """

    name: str
    severity: Severity
    action: Action
    min_unsafe: float | None = None
    min_flagged: float | None = None
    categories: tuple[str, ...] = ()
    target: Target | None = None
    tenants: tuple[str, ...] = ()
    regions: tuple[str, ...] = ()
    routes: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    advice: tuple[Advice, ...] = ()
    message: str | None = None
    observe: bool = False
    messages: Messages = ()
    intervention: InterventionWord | None = None

    def concerns(self, scope: Scope, target: Target) -> bool:
        """Whether the rule is for this scope and target; what the scope does not know matches no rule that asks."""
        return self.target in (None, target) and self.outside(scope) is None

    def outside(self, scope: Scope) -> str | None:
        """Which part of a scope the rule is not for, as ``region``; None when it is for all of it."""
        asked = (
            ("tenant", self.tenants, scope.tenant, name_or_prefix),
            ("region", self.regions, scope.region, same_word),
            ("route", self.routes, scope.route, name_or_prefix),
            ("language", self.languages, scope.language, same_language),
        )
        return next((kind for kind, patterns, value, same in asked if not _any_match(patterns, value, same)), None)


def _any_match(patterns: tuple[str, ...], value: str | None, matches: Callable[[str, str], bool]) -> bool:
    return not patterns or (value is not None and any(matches(pattern, value) for pattern in patterns))


def name_or_prefix(pattern: str, value: str) -> bool:
    """Whether a value is the pattern, or begins with what stands before its ``*``."""
    return value.startswith(pattern[:-1]) if pattern.endswith("*") else value == pattern


def same_word(pattern: str, value: str) -> bool:
    """Whether two words are the same but for their case."""
    return pattern.casefold() == value.casefold()


def same_language(pattern: str, value: str) -> bool:
    """Whether a BCP-47 tag is the pattern, or a narrower one: ``de-AT`` is ``de``."""
    pattern, value = pattern.casefold().replace("_", "-"), value.casefold().replace("_", "-")
    return value == pattern or value.startswith(f"{pattern}-")


def covers(earlier: Rule, later: Rule) -> bool:
    """Whether whatever the later rule matches is matched, and decided, by the earlier one."""
    return (
        earlier.observe <= later.observe
        and _no_more(earlier.min_unsafe, later.min_unsafe)
        and (_no_more(earlier.min_flagged, later.min_flagged) or _no_more(earlier.min_flagged, later.min_unsafe))
        and earlier.severity <= later.severity
        and earlier.target in (None, later.target)
        and _wider(earlier.categories, later.categories)
        and _wider(earlier.tenants, later.tenants)
        and _wider(earlier.regions, later.regions)
        and _wider(earlier.routes, later.routes)
        and _wider(earlier.languages, later.languages)
    )


def _no_more(earlier: float | None, later: float | None) -> bool:
    return earlier is None or (later is not None and earlier <= later)


def _wider(earlier: tuple[str, ...], later: tuple[str, ...]) -> bool:
    return not earlier or (bool(later) and set(later) <= set(earlier))


def canonical_rule(rule: Rule) -> dict[str, object]:
    """A rule as JSON values, lists sorted where their order says nothing; ``observe`` only when it is set."""
    content: dict[str, object] = {
        "name": rule.name,
        "severity": rule.severity.word,
        "action": rule.action.word,
        "probability": {
            "unsafe": None if rule.min_unsafe is None else float(rule.min_unsafe),
            "flagged": None if rule.min_flagged is None else float(rule.min_flagged),
        },
        "categories": sorted(set(rule.categories)),
        "target": None if rule.target is None else rule.target.value,
        "scope": {
            "tenant": sorted(set(rule.tenants)),
            "region": sorted({region.casefold() for region in rule.regions}),
            "route": sorted(set(rule.routes)),
            "language": sorted({language.casefold() for language in rule.languages}),
        },
        "advice": sorted(set(rule.advice)),
        "message": rule.message,
    }
    newer = {"observe": rule.observe, "messages": dict(rule.messages), "intervention": rule.intervention}
    return content | {key: value for key, value in newer.items() if value}


# --- layers -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class History:
    """What becomes of earlier turns: those before what is new in a request.

    Attributes:
        judge: whether they are judged, each as what it is: what was said before it counts, what came after does not.
        at_most: the most that an earlier turn can lead to, however strict the rules are with it: ALLOW, WARN, REVIEW,
            or BLOCK, as if it were new.
        turns: how many of them are judged, the newest first; at least 1.
    """

    judge: bool = False
    at_most: Action = Action.WARN
    turns: int = 64

    def canonical(self) -> dict[str, object]:
        """As JSON values."""
        return {"judge": self.judge, "at_most": self.at_most.word, "turns": self.turns}


@dataclass(frozen=True, slots=True)
class OnGuardError:
    """What is done when the guard cannot judge.

    Attributes:
        default: for every kind of failure that has no word of its own here.
        kinds: by the words ``unavailable``, ``overloaded``, ``timeout`` and ``unreadable``.
    """

    default: Action
    kinds: Mapping[str, Action] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        object.__setattr__(self, "kinds", MappingProxyType(dict(self.kinds)))

    def action(self, kind: str) -> Action:
        """What is done after a failure of this kind, a class name as ``GuardTimeout``."""
        return self.kinds.get(FAILURE_KINDS.get(kind, ""), self.default)

    def canonical(self) -> object:
        """As a JSON value: one word where all kinds get the same."""
        differing = {kind: action.word for kind, action in self.kinds.items() if action is not self.default}
        return {"default": self.default.word, **differing} if differing else self.default.word


@dataclass(frozen=True, slots=True)
class Layer:
    """What a policy says for one region, tenant or route. Whatever is None is as below.

    Attributes:
        kind: of what it is.
        pattern: a region in any case; a tenant or route by its exact name, or a prefix that ends in ``*``.
        rules: tried before those of the layers below.
        without: names of rules of other layers, or of the default, that do not hold here.
        on_guard_error: as in `Policy`, with ``on_guard_error.kinds`` and all.
        otherwise: as in `Policy`.
        controversial: as in `Policy`.
        debounce: as in `Policy`.
        retention: as in `Policy`.
        degraded: as in `Policy`.
        deadline_ms: as in `Policy`.
        unjudged_request: as in `Policy`.
        unjudged_answer: as in `Policy`.
        history: as in `Policy`.
        observe: as in `Policy`.
        message: as in `Policy`.
        thresholds: laid over those below, category by category.
        instructions: added behind those below.
        messages: as in `Policy`; said together with ``message``.
        intervention: as in `Policy`.
        hold: as in `Policy`.
        rollback: as in `Policy`.
        confirm: as in `Policy`.
    """

    kind: LayerKind
    pattern: str
    rules: tuple[Rule, ...] = ()
    without: tuple[str, ...] = ()
    on_guard_error: OnGuardError | None = None
    otherwise: Action | None = None
    controversial: Controversial | None = None
    debounce: int | None = None
    retention: Retention | None = None
    degraded: Degraded | None = None
    deadline_ms: int | None = None
    observe: bool | None = None
    message: str | None = None
    thresholds: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    instructions: str | None = None
    unjudged_request: UnjudgedRequest | None = None
    unjudged_answer: UnjudgedAnswer | None = None
    history: History | None = None
    messages: Messages | None = None
    intervention: InterventionWord | None = None
    hold: Hold | None = None
    rollback: Rollback | None = None
    confirm: Confirm | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "thresholds", MappingProxyType(dict(self.thresholds)))

    @property
    def name(self) -> str:
        """What it is called, as ``tenant acme-*``."""
        return f"{self.kind} {self.pattern}"

    @property
    def height(self) -> tuple[int, bool, int]:
        """Its place in the pile: the higher one wins."""
        return LAYER_KINDS.index(self.kind), not self.pattern.endswith("*"), len(self.pattern)

    def concerns(self, scope: Scope) -> bool:
        """Whether it is for this scope; what the scope does not know has no layer."""
        value: str | None = getattr(scope, self.kind)
        same = same_word if self.kind == "region" else name_or_prefix
        return value is not None and same(self.pattern, value)

    def canonical(self) -> dict[str, object]:
        """As JSON values, without what it does not say."""
        said = {
            "on_guard_error": None if self.on_guard_error is None else self.on_guard_error.canonical(),
            "otherwise": None if self.otherwise is None else self.otherwise.word,
            "controversial": self.controversial,
            "debounce": self.debounce,
            "retention": self.retention,
            "degraded": self.degraded,
            "deadline_ms": self.deadline_ms,
            "unjudged_request": self.unjudged_request,
            "unjudged_answer": self.unjudged_answer,
            "history": None if self.history is None else self.history.canonical(),
            "observe": self.observe,
            "message": self.message,
            "instructions": self.instructions,
            "messages": dict(self.messages or ()) or None,
            "intervention": self.intervention,
            "hold": None if self.hold is None else self.hold.canonical(),
            "rollback": None if self.rollback is None else self.rollback.canonical(),
            "confirm": None if self.confirm is None else self.confirm.canonical(),
            "thresholds": {name: float(value) for name, value in self.thresholds.items()} or None,
            "without": sorted(set(self.without)) or None,
            "rules": [canonical_rule(rule) for rule in self.rules] or None,
        }
        pattern = self.pattern.casefold() if self.kind == "region" else self.pattern
        return {"kind": self.kind, "pattern": pattern} | {key: said[key] for key in said if said[key] is not None}
