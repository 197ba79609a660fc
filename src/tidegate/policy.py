"""Verdict in, decision out: policies as data (YAML), and the pure functions that apply them.

How a policy chooses, in four steps:

1. Which categories are present? A category that has a threshold in the policy, and a probability from the guard, is
   present when the probability is at least the threshold. Any other category is present when the guard names it. The
   probability of a category is conditional: how likely it is that the text is of this category if it is not safe. How
   sure the guard is that it is not safe at all is the rules' business (``probability``). Jailbreak is about prompts
   only, and never present in a response.
2. For each present category the rules are tried in their order, and the first match wins. With no category present
   they are tried once, and only rules that name no category can match.
3. When no rule matches: with ``controversial: unsafe`` the rules are tried again as if what is controversial were
   unsafe; with ``controversial: review`` a verdict that is controversial or worse gets at least REVIEW; then comes
   ``otherwise``. So a rule that speaks of controversial text always goes before the general treatment.
4. Over the present categories the worst action wins, so a lenient rule for one category never hides another category
   in the same text. The advice of every rule that was chosen on the way is kept.

A rule matches when all that it names matches. ``severity`` means this one or a worse one, by the guard's own call.
``probability: {unsafe: p}`` asks beside that for a probability of unsafe of at least p, ``{flagged: p}`` for one of
controversial and unsafe together: with ``severity: unsafe`` a rule is milder than the guard, with ``severity: safe``
stricter. Where controversial is tried as unsafe (step 3), its probability counts as unsafe too.

Pure: no clock, no network; the only reading of disk is `load_policy`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Final, Literal, NamedTuple, TypeVar, get_args

import yaml

from tidegate.errors import PolicyError
from tidegate.types import (
    CATEGORIES,
    Action,
    Advice,
    Category,
    Coverage,
    Decision,
    GuardFailure,
    Probabilities,
    Scope,
    Severity,
    Target,
    TokenVerdict,
    Verdict,
)

__all__ = [
    "PRESETS",
    "Controversial",
    "Policy",
    "Retention",
    "Rule",
    "ScopedPolicy",
    "decide",
    "decide_token",
    "load_policy",
    "parse_policy",
]

Controversial = Literal["safe", "unsafe", "review"]
Retention = Literal["full", "redacted", "hash"]

PRESETS: Final = ("strict", "balanced", "loose")
"""The policies that ship with the package, strictest first."""

DEFAULT_MESSAGE: Final = "This content was stopped by a safety policy."
RESERVED_NAMES: Final = ("otherwise", "on_guard_error", "controversial")
"""Names that a decision gives when no rule of the file chose; a rule cannot take them."""

MAX_BYTES: Final = 256 * 1024
MAX_DEPTH: Final = 8
MAX_MESSAGE: Final = 2000
_COMPILED_SCOPES: Final = 1024


# --- the values ---------------------------------------------------------------------------------------------------


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

    def concerns(self, scope: Scope, target: Target) -> bool:
        """Whether the rule is for this scope and target; what the scope does not know matches no rule that asks."""
        return (
            self.target in (None, target)
            and _any_match(self.tenants, scope.tenant, _name_or_prefix)
            and _any_match(self.regions, scope.region, _same_word)
            and _any_match(self.routes, scope.route, _name_or_prefix)
            and _any_match(self.languages, scope.language, _same_language)
        )


def _any_match(patterns: tuple[str, ...], value: str | None, matches: Callable[[str, str], bool]) -> bool:
    return not patterns or (value is not None and any(matches(pattern, value) for pattern in patterns))


def _name_or_prefix(pattern: str, value: str) -> bool:
    return value.startswith(pattern[:-1]) if pattern.endswith("*") else value == pattern


def _same_word(pattern: str, value: str) -> bool:
    return pattern.casefold() == value.casefold()


def _same_language(pattern: str, value: str) -> bool:
    pattern, value = pattern.casefold().replace("_", "-"), value.casefold().replace("_", "-")
    return value == pattern or value.startswith(f"{pattern}-")


@dataclass(frozen=True, slots=True)
class Policy:
    """From verdict and scope to action, as data.

    Attributes:
        name: of the policy.
        rules: tried in order; see the module's text.
        on_guard_error: what is done when the guard cannot judge.
        otherwise: what is done when no rule matches.
        controversial: what a controversial verdict is that no rule speaks of.
        debounce: how many consecutive tokens must call for BLOCK before a stream is stopped; at least 1.
        retention: how the text of a decision is stored.
        thresholds: for each category named, the least probability, given that the text is not safe, at which it counts
            as present, in [0, 1].
        custom_categories: names beside the official nine that rules and thresholds may use.
        message: shown to the sender on a BLOCK.
        version: the first 12 hexadecimal digits of the SHA-256 of the canonical form.

    Raises:
        ValueError: when two rules have the same name, or debounce is less than 1.
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
    version: str = field(init=False)
    _scoped: dict[tuple[Scope, Target], ScopedPolicy] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        if self.debounce < 1:
            raise ValueError(f"debounce must be at least 1, got {self.debounce}")
        names = [rule.name for rule in self.rules]
        if len(set(names)) != len(names):
            raise ValueError("two rules of a policy have the same name")
        object.__setattr__(self, "thresholds", MappingProxyType(dict(self.thresholds)))
        digest = hashlib.sha256(self.canonical().encode("utf-8")).hexdigest()
        object.__setattr__(self, "version", digest[:12])

    def __hash__(self) -> int:
        return hash((self.name, self.version))

    def canonical(self) -> str:
        """The policy as JSON with sorted keys, defaults written out, and unordered lists sorted.

        Two files have the same canonical form exactly when they mean the same: comments, white space, quoting and the
        order of keys do not count, the order of rules does.
        """
        content = {
            "name": self.name,
            "controversial": self.controversial,
            "on_guard_error": self.on_guard_error.word,
            "otherwise": self.otherwise.word,
            "debounce": self.debounce,
            "retention": self.retention,
            "thresholds": {name: float(value) for name, value in self.thresholds.items()},
            "custom_categories": sorted(self.custom_categories),
            "message": self.message,
            "rules": [_canonical_rule(rule) for rule in self.rules],
        }
        return json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))

    def for_scope(self, scope: Scope, target: Target) -> ScopedPolicy:
        """The part of this policy that concerns a scope and target, compiled; computed once for each pair.

        A stream asks once and then calls `ScopedPolicy.action` for each token.
        """
        key = (scope, target)
        scoped = self._scoped.get(key)
        if scoped is None:
            if len(self._scoped) >= _COMPILED_SCOPES:
                self._scoped.clear()
            scoped = self._scoped[key] = ScopedPolicy(self, scope, target)
        return scoped

    def message_for(self, rule: str) -> str:
        """What the sender is shown when the rule of this name blocks."""
        for candidate in self.rules:
            if candidate.name == rule and candidate.message is not None:
                return candidate.message
        return self.message


def _canonical_rule(rule: Rule) -> dict[str, object]:
    return {
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


# --- choosing -----------------------------------------------------------------------------------------------------


class _Choice(NamedTuple):
    """What one rule chooses. ``place`` is its position in the file; the built-in choices come last."""

    action: Action
    rule: str
    place: int
    advice: tuple[Advice, ...] = ()


_Entry = tuple[Severity, float, float, _Choice]
"""A rule once scope, target and category are settled: severity, least P(unsafe) and P(flagged), and what it chooses."""
_ANY: Final = -1.0


class ScopedPolicy:
    """A policy for one scope and target: only the rules that can still match, grouped by category. Immutable."""

    __slots__ = (
        "_by_category",
        "_controversial",
        "_fallback",
        "_general",
        "_lift",
        "_thresholds",
        "policy",
        "scope",
        "target",
    )

    def __init__(self, policy: Policy, scope: Scope, target: Target) -> None:
        self.policy = policy
        self.scope = scope
        self.target = target
        end = len(policy.rules)
        self._fallback = _Choice(policy.otherwise, "otherwise", end)
        self._controversial = (
            _Choice(Action.REVIEW, "controversial", end)
            if policy.controversial == "review" and policy.otherwise < Action.REVIEW
            else self._fallback
        )
        self._lift = policy.controversial == "unsafe"
        self._thresholds = dict(policy.thresholds)
        self._general = self._entries(None)
        named = {category for rule in policy.rules for category in rule.categories}
        if target is Target.RESPONSE:
            named.discard(Category.JAILBREAK.value)
        self._by_category = {category: self._entries(category) for category in named}

    def action(self, token: TokenVerdict) -> Action:
        """What this token alone calls for. The same as deciding on a verdict that says what the token says."""
        entries = self._general
        category = token.category
        if category is not None:
            threshold = self._thresholds.get(category)
            present = token.severity > 0 if threshold is None else token.category_probability >= threshold
            if present:
                entries = self._by_category.get(category, entries)
        return self._first(entries, token.severity, token.probabilities).action

    def decide(self, verdict: Verdict, coverage: Iterable[Coverage] = ()) -> Decision:
        """Apply the policy to a verdict on this target."""
        choices = [
            self._first(self._by_category.get(category, self._general), verdict.severity, verdict.probabilities)
            for category in self._present(verdict)
        ] or [self._first(self._general, verdict.severity, verdict.probabilities)]
        chosen = max(choices, key=lambda choice: (choice.action, -choice.place))
        advice = {advice for choice in choices for advice in choice.advice}
        return Decision(
            chosen.action,
            chosen.rule,
            self.policy.name,
            self.policy.version,
            verdict=verdict,
            scope=self.scope,
            coverage=tuple(coverage),
            advice=tuple(sorted(advice, key=list(Advice).index)),
        )

    def _entries(self, category: str | None) -> tuple[_Entry, ...]:
        return tuple(
            (
                rule.severity,
                _ANY if rule.min_unsafe is None else rule.min_unsafe,
                _ANY if rule.min_flagged is None else rule.min_flagged,
                _Choice(rule.action, rule.name, place, rule.advice),
            )
            for place, rule in enumerate(self.policy.rules)
            if rule.concerns(self.scope, self.target) and (not rule.categories or category in rule.categories)
        )

    def _present(self, verdict: Verdict) -> list[str]:
        probabilities = verdict.category_probabilities
        judged = self._thresholds.keys() & probabilities.keys()
        present = {name for name in judged if probabilities[name] >= self._thresholds[name]}
        present.update(name for name in verdict.categories if name not in judged)
        if self.target is Target.RESPONSE:
            present.discard(Category.JAILBREAK.value)
        return sorted(present)

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


def decide(
    policy: Policy,
    verdict: Verdict | GuardFailure,
    scope: Scope = Scope(),  # noqa: B008 - frozen
    coverage: Iterable[Coverage] = (),
) -> Decision:
    """What the policy does about a verdict, or about a guard that could not judge. Every input has a decision."""
    if isinstance(verdict, Verdict):
        return policy.for_scope(scope, verdict.target).decide(verdict, coverage)
    return Decision(
        policy.on_guard_error,
        "on_guard_error",
        policy.name,
        policy.version,
        failure=verdict,
        scope=scope,
        coverage=tuple(coverage),
    )


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


# --- reading ------------------------------------------------------------------------------------------------------


def load_policy(path_or_preset: str | Path) -> Policy:
    """Read a preset by its name, or a policy file.

    Raises:
        PolicyError: when there is no such file, or it is not a policy; says where in the file and what was expected.
    """
    if isinstance(path_or_preset, str) and path_or_preset in PRESETS:
        path = _preset_folder() / f"{path_or_preset}.yaml"
    else:
        path = Path(path_or_preset)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise PolicyError(
            f"cannot read the policy: {reason}{_nearest(str(path_or_preset), PRESETS)}; "
            f"expected a YAML file or one of the presets {', '.join(PRESETS)}",
            where=str(path),
        ) from error
    return parse_policy(_text(data, str(path)), source=str(path))


def _preset_folder() -> Path:
    """The presets lie in the package when it is installed, and at the root of the project in a source checkout."""
    packaged = Path(__file__).parent / "policies"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "policies"


def _text(data: bytes, source: str) -> str:
    if len(data) > MAX_BYTES:
        raise PolicyError(f"the file is too long: a policy has at most {MAX_BYTES:,} bytes", where=source)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - data.rfind(b"\n", 0, error.start)
        raise PolicyError(
            f"byte 0x{data[error.start]:02x} is not UTF-8: save the file as UTF-8", where=f"{source}:{line}:{column}"
        ) from None


def parse_policy(text: str, *, source: str = "policy") -> Policy:
    """Read a policy from YAML text. ``source`` is the file's name in error messages.

    Raises:
        PolicyError: when it is not a policy; names the line, the column and the key, and the nearest known word.
    """
    if len(text) > MAX_BYTES:
        raise PolicyError(f"the text is too long: a policy has at most {MAX_BYTES:,} characters", where=source)
    return _read_policy(_At(_compose(text, source), "", source))


def _compose(text: str, source: str) -> yaml.Node:
    try:
        _refuse_tricks(text, source)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        where = f"{source}:{line}:{error.position - text.rfind(chr(10), 0, error.position)}"
        raise PolicyError(f"character U+{ord(text[error.position]):04X} is not allowed in YAML", where=where) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        raise PolicyError(f"this is not YAML: {error.problem or error.context}", where=where) from None
    if node is None:
        raise PolicyError(
            "the policy is empty; expected a mapping with name, otherwise, on_guard_error, rules", where=source
        )
    return node


def _refuse_tricks(text: str, source: str) -> None:
    """Aliases (which can blow a small file up), deep nesting and several documents have no use in a policy."""
    depth = documents = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        mark = event.start_mark
        where = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        if isinstance(event, yaml.AliasEvent):
            raise PolicyError("YAML aliases (*name) are not allowed in a policy: write the value out", where=where)
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise PolicyError("a policy file holds one document; this is the start of a second", where=where)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise PolicyError(f"nested too deep: a policy has at most {MAX_DEPTH} levels", where=where)


T = TypeVar("T")
_PLAIN_KINDS: Final = ("str", "int", "float", "bool", "null", "timestamp", "map", "seq", "merge", "value")
_PLAIN_TAGS: Final = frozenset(f"tag:yaml.org,2002:{kind}" for kind in _PLAIN_KINDS)


class _At:
    """One node of the YAML tree, with its key path and place for error messages.

    Scalars are read as they are written, so that the language ``no`` and the region ``NO`` stay words.
    """

    __slots__ = ("node", "path", "source")

    def __init__(self, node: yaml.Node, path: str, source: str) -> None:
        self.node = node
        self.path = path
        self.source = source
        if node.tag not in _PLAIN_TAGS:
            raise self.error(f"the YAML tag {node.tag!r} is not allowed in a policy")

    def error(self, message: str) -> PolicyError:
        mark = self.node.start_mark
        full = f"{self.path}: {message}" if self.path else message
        return PolicyError(full, where=f"{self.source}:{mark.line + 1}:{mark.column + 1}")

    def mapping(self, known: Sequence[str], *, kind: str = "key") -> dict[str, _At]:
        """The values by key. Unknown and repeated keys are errors."""
        if not isinstance(self.node, yaml.MappingNode):
            raise self.error(f"expected a mapping, got {self._kind()}")
        values: dict[str, _At] = {}
        for key_node, value_node in self.node.value:
            at_key = _At(key_node, self.path, self.source)
            key = at_key.text()
            if key in values:
                raise at_key.error(f"the {kind} {key!r} is given twice")
            if key not in known:
                raise at_key.error(f"unknown {kind} {key!r}{_nearest(key, known)}; known: {', '.join(known)}")
            values[key] = _At(value_node, f"{self.path}.{key}" if self.path else key, self.source)
        return values

    def items(self) -> list[_At]:
        """The elements of a list; a single scalar stands for a list of one."""
        if isinstance(self.node, yaml.SequenceNode):
            return [_At(node, f"{self.path}[{i}]", self.source) for i, node in enumerate(self.node.value)]
        if isinstance(self.node, yaml.ScalarNode) and not self._is_null():
            return [self]
        raise self.error(f"expected a list, got {self._kind()}")

    def text(self, *, longest: int = 200) -> str:
        """A scalar as it is written. Empty is an error."""
        if not isinstance(self.node, yaml.ScalarNode) or self._is_null():
            raise self.error(f"expected text, got {self._kind()}")
        value: str = self.node.value
        if not value.strip():
            raise self.error("expected text, got an empty one")
        if len(value) > longest:
            raise self.error(f"too long: at most {longest} characters, got {len(value)}")
        return value

    def word(self, known: Sequence[str], kind: str) -> str:
        """A scalar out of a list of known words."""
        value = self.text()
        if value not in known:
            raise self.error(f"unknown {kind} {value!r}{_nearest(value, known)}; known: {', '.join(known)}")
        return value

    def probability(self) -> float:
        value = self.text()
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not 0 <= number <= 1:
            raise self.error(f"expected a probability from 0 to 1, got {value!r}")
        return number

    def whole_number(self, least: int, most: int) -> int:
        value = self.text()
        if not re.fullmatch(r"[0-9]{1,9}", value) or not least <= int(value) <= most:
            raise self.error(f"expected a whole number from {least} to {most}, got {value!r}")
        return int(value)

    def _is_null(self) -> bool:
        return bool(self.node.tag == "tag:yaml.org,2002:null")

    def _kind(self) -> str:
        if isinstance(self.node, yaml.MappingNode):
            return "a mapping"
        if isinstance(self.node, yaml.SequenceNode):
            return "a list"
        return "nothing" if self._is_null() else f"{self.node.value!r}"


def _nearest(word: str, known: Sequence[str]) -> str:
    by_folded = {name.casefold(): name for name in known}
    close = difflib.get_close_matches(word.casefold(), by_folded, n=1, cutoff=0.6)
    return f", did you mean {by_folded[close[0]]!r}?" if close else ""


_POLICY_KEYS: Final = (
    "name",
    "controversial",
    "on_guard_error",
    "otherwise",
    "debounce",
    "retention",
    "message",
    "custom_categories",
    "thresholds",
    "rules",
)
_RULE_KEYS: Final = (
    "name",
    "severity",
    "action",
    "probability",
    "categories",
    "target",
    "scope",
    "advice",
    "message",
)
_PROBABILITY_KEYS: Final = ("unsafe", "flagged")
_SCOPE_KEYS: Final = ("tenant", "region", "route", "language")
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def _read_policy(root: _At) -> Policy:
    keys = root.mapping(_POLICY_KEYS)
    for required in ("name", "on_guard_error", "otherwise", "rules"):
        if required not in keys:
            raise root.error(f"the key {required!r} is missing: it has no default, and every policy says it")
    custom = _read_custom(keys.get("custom_categories"))
    categories = (*CATEGORIES, *custom)
    return Policy(
        name=_read_name(keys["name"]),
        rules=_read_rules(keys["rules"], categories),
        on_guard_error=_read_action(keys["on_guard_error"]),
        otherwise=_read_action(keys["otherwise"]),
        controversial=_optional(keys.get("controversial"), _read_controversial, "review"),
        debounce=_optional(keys.get("debounce"), lambda at: at.whole_number(1, 1000), 2),
        retention=_optional(keys.get("retention"), _read_retention, "hash"),
        thresholds=_optional(keys.get("thresholds"), lambda at: _read_thresholds(at, categories), {}),
        custom_categories=custom,
        message=_optional(keys.get("message"), _read_message, DEFAULT_MESSAGE),
    )


def _optional(at: _At | None, read: Callable[[_At], T], default: T) -> T:
    return default if at is None else read(at)


def _read_name(at: _At) -> str:
    name = at.text(longest=100)
    if not _NAME.fullmatch(name):
        raise at.error(f"expected a name of letters, digits, dots, dashes and underscores, got {name!r}")
    return name


def _read_message(at: _At) -> str:
    return at.text(longest=MAX_MESSAGE).strip()


def _read_action(at: _At) -> Action:
    return Action.parse(at.word([action.word for action in Action], "action"))


def _read_controversial(at: _At) -> Controversial:
    words: tuple[Controversial, ...] = get_args(Controversial)
    return words[words.index(at.word(words, "treatment"))]


def _read_retention(at: _At) -> Retention:
    words: tuple[Retention, ...] = get_args(Retention)
    return words[words.index(at.word(words, "retention"))]


def _read_custom(at: _At | None) -> tuple[str, ...]:
    names: list[str] = []
    for element in at.items() if at else ():
        name = element.text(longest=100)
        if name in CATEGORIES:
            raise element.error(f"{name!r} is an official category already: custom ones have other names")
        if name in names:
            raise element.error(f"the category {name!r} is given twice")
        names.append(name)
    return tuple(names)


def _read_thresholds(at: _At, categories: Sequence[str]) -> dict[str, float]:
    return {name: value.probability() for name, value in at.mapping(categories, kind="category").items()}


def _read_rules(at: _At, categories: Sequence[str]) -> tuple[Rule, ...]:
    if not isinstance(at.node, yaml.SequenceNode):
        raise at.error("expected a list of rules (it may be empty: [])")
    rules: list[Rule] = []
    for element in at.items():
        rule = _read_rule(element, categories)
        for earlier in rules:
            if earlier.name == rule.name:
                raise element.error(f"two rules have the name {rule.name!r}")
            if _covers(earlier, rule):
                raise element.error(
                    f"the rule {rule.name!r} can never match: {earlier.name!r} above it matches all that it would; "
                    "put the narrower rule first"
                )
        rules.append(rule)
    return tuple(rules)


def _read_rule(at: _At, categories: Sequence[str]) -> Rule:
    keys = at.mapping(_RULE_KEYS)
    for required in ("name", "severity", "action"):
        if required not in keys:
            raise at.error(f"the key {required!r} is missing")
    name = _read_name(keys["name"])
    if name in RESERVED_NAMES:
        raise keys["name"].error(f"{name!r} is what decisions say when no rule chose; take another name")
    severity = Severity.parse(keys["severity"].word([level.word for level in Severity], "severity"))
    least = keys["probability"].mapping(_PROBABILITY_KEYS) if "probability" in keys else {}
    target = Target(keys["target"].word([target.value for target in Target], "target")) if "target" in keys else None
    named = _words(keys.get("categories"), categories, "category")
    if target is Target.RESPONSE and Category.JAILBREAK.value in named:
        raise keys["categories"].error("Jailbreak is about prompts: a rule with target: response cannot name it")
    scope = keys["scope"].mapping(_SCOPE_KEYS) if "scope" in keys else {}
    return Rule(
        name=name,
        severity=severity,
        action=_read_action(keys["action"]),
        min_unsafe=_optional(least.get("unsafe"), _At.probability, None),
        min_flagged=_optional(least.get("flagged"), _At.probability, None),
        categories=named,
        target=target,
        tenants=_words(scope.get("tenant")),
        regions=_words(scope.get("region")),
        routes=_words(scope.get("route")),
        languages=_words(scope.get("language")),
        advice=tuple(Advice(word) for word in _words(keys.get("advice"), [a.value for a in Advice], "advice")),
        message=_optional(keys.get("message"), _read_message, None),
    )


def _words(at: _At | None, known: Sequence[str] | None = None, kind: str = "") -> tuple[str, ...]:
    """The words of a list, at least one when the key is there; () when it is not."""
    if at is None:
        return ()
    words = tuple(element.text() if known is None else element.word(known, kind) for element in at.items())
    if not words:
        raise at.error("the list is empty: leave the key out to match everything")
    return words


def _covers(earlier: Rule, later: Rule) -> bool:
    """Whether whatever the later rule matches is matched by the earlier one."""
    return (
        _no_more(earlier.min_unsafe, later.min_unsafe)
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
