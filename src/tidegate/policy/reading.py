"""Policy files: YAML in, a Policy out, or an error that says where in the file and what was expected."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar, get_args

import yaml

from tidegate.errors import PolicyError
from tidegate.policy.carrying import (
    NO_CONFIRM,
    Confirm,
    Hold,
    HoldMode,
    InterventionWord,
    Messages,
    OnConfirmError,
    Rollback,
    RollbackThen,
    WhenLate,
)
from tidegate.policy.deciding import RESERVED_NAMES, Policy
from tidegate.policy.rules import (
    FAILURE_KINDS,
    LAYER_KINDS,
    SETTINGS,
    Controversial,
    Degraded,
    History,
    Layer,
    LayerKind,
    OnGuardError,
    Retention,
    Rule,
    UnjudgedAnswer,
    UnjudgedRequest,
    covers,
)
from tidegate.types import CATEGORIES, Action, Advice, Category, Severity, Target

__all__ = [
    "FIELDS",
    "PRESETS",
    "load_policy",
    "parse_policy",
    "parse_policy_file",
    "policy_path",
    "read_policy_file",
]

PRESETS: Final = ("strict", "balanced", "loose")
"""The general policies that ship with the package, strictest first."""

FIELDS: Final = ("social", "customer-service", "education", "health", "public-sector")
"""The policies that ship with the package for a field of work."""

MAX_BYTES: Final = 256 * 1024
MAX_DEPTH: Final = 8
MAX_MESSAGE: Final = 2000


def load_policy(path_or_preset: str | Path) -> Policy:
    """Read a preset by its name, or a policy file.

    Raises:
        PolicyError: when there is no such file, or it is not a policy; says where in the file and what was expected.
    """
    path = policy_path(path_or_preset)
    try:
        return parse_policy_file(read_policy_file(path), source=str(path))
    except OSError as error:
        reason = error.strerror or type(error).__name__
        known = (*PRESETS, *FIELDS)
        raise PolicyError(
            f"cannot read the policy: {reason}{_nearest(str(path_or_preset), known)}; "
            f"expected a YAML file or one of the presets {', '.join(known)}",
            where=str(path),
        ) from error


def policy_path(path_or_preset: str | Path) -> Path:
    """Where a preset lies, or the path itself when it names none."""
    if isinstance(path_or_preset, str) and path_or_preset in (*PRESETS, *FIELDS):
        return _preset_folder() / f"{path_or_preset}.yaml"
    return Path(path_or_preset)


def read_policy_file(path: Path) -> bytes:
    """The bytes of a policy file; of one that is too long only so many that it is seen. Raises OSError."""
    with path.open("rb") as file:
        return file.read(MAX_BYTES + 1)


def parse_policy_file(data: bytes, *, source: str) -> Policy:
    """Read a policy from the bytes of a file. Raises PolicyError as `parse_policy`."""
    return parse_policy(_text(data, source), source=source)


def _preset_folder() -> Path:
    """The presets lie in the package when it is installed, and at the root of the project in a source checkout."""
    packaged = Path(__file__).parents[1] / "policies"
    return packaged if packaged.is_dir() else Path(__file__).parents[3] / "policies"


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

    def mapping(self, known: Sequence[str] | None, *, kind: str = "key") -> dict[str, _At]:
        """The values by key. Repeated keys are errors, and unknown ones unless any will do (None)."""
        if not isinstance(self.node, yaml.MappingNode):
            raise self.error(f"expected a mapping, got {self._kind()}")
        values: dict[str, _At] = {}
        for key_node, value_node in self.node.value:
            at_key = _At(key_node, self.path, self.source)
            key = at_key.text()
            if key in values:
                raise at_key.error(f"the {kind} {key!r} is given twice")
            if known is not None and key not in known:
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

    def yes_or_no(self) -> bool:
        value = self.text()
        if value not in ("true", "false"):
            raise self.error(f"expected true or false, got {value!r}")
        return value == "true"

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


_SETTING_KEYS: Final = (*SETTINGS, "thresholds", "rules")
_POLICY_KEYS: Final = ("name", *_SETTING_KEYS, "custom_categories", "layers")
_LAYER_KEYS: Final = (*_SETTING_KEYS, "without")
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
    "observe",
    "intervention",
)
_PROBABILITY_KEYS: Final = ("unsafe", "flagged")
_SCOPE_KEYS: Final = ("tenant", "region", "route", "language")
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_LANGUAGE: Final = re.compile(r"[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8})*")
_LONGEST_DEADLINE_MS: Final = 600_000
_MOST_TURNS: Final = 8192


def _read_policy(root: _At) -> Policy:
    keys = root.mapping(_POLICY_KEYS)
    for required in ("name", "on_guard_error", "otherwise", "rules"):
        if required not in keys:
            raise root.error(f"the key {required!r} is missing: it has no default, and every policy says it")
    custom = _read_custom(keys.get("custom_categories"))
    categories = (*CATEGORIES, *custom)
    said = _read_settings(keys, categories)
    on_guard_error: OnGuardError = said.pop("on_guard_error")
    return Policy(
        name=_read_name(keys["name"]),
        on_guard_error=on_guard_error.default,
        failure_actions=on_guard_error.kinds,
        custom_categories=custom,
        layers=_optional(keys.get("layers"), lambda at: _read_layers(at, categories, said["rules"]), ()),
        **said,
    )


def _read_settings(keys: Mapping[str, _At], categories: Sequence[str]) -> dict[str, Any]:
    """What a policy and a layer of it can both say, by the name of the attribute: only what is there."""
    read: dict[str, Callable[[_At], Any]] = {
        "controversial": lambda at: _read_literal(at, Controversial, "treatment"),
        "on_guard_error": _read_on_guard_error,
        "otherwise": _read_action,
        "debounce": lambda at: at.whole_number(1, 1000),
        "retention": lambda at: _read_literal(at, Retention, "retention"),
        "degraded": lambda at: _read_literal(at, Degraded, "guard for when the guard fails"),
        "deadline_ms": lambda at: at.whole_number(1, _LONGEST_DEADLINE_MS),
        "unjudged_request": lambda at: _read_literal(at, UnjudgedRequest, "treatment"),
        "unjudged_answer": lambda at: _read_literal(at, UnjudgedAnswer, "treatment"),
        "history": _read_history,
        "observe": _At.yes_or_no,
        "message": _read_messages,
        "intervention": lambda at: _read_literal(at, InterventionWord, "intervention"),
        "hold": _read_hold,
        "rollback": _read_rollback,
        "confirm": _read_confirm,
        "instructions": _read_instructions,
        "thresholds": lambda at: _read_thresholds(at, categories),
        "rules": lambda at: _read_rules(at, categories),
    }
    said = {key: read[key](keys[key]) for key in read if key in keys}
    if "message" in said:
        said["message"], said["messages"] = said["message"]
    return said


def _optional(at: _At | None, read: Callable[[_At], T], default: T) -> T:
    return default if at is None else read(at)


def _read_name(at: _At) -> str:
    name = at.text(longest=100)
    if not _NAME.fullmatch(name):
        raise at.error(f"expected a name of letters, digits, dots, dashes and underscores, got {name!r}")
    return name


def _read_message(at: _At) -> str:
    return at.text(longest=MAX_MESSAGE).strip()


def _read_messages(at: _At) -> tuple[str, Messages]:
    """A text for everybody, or one for each of some languages and a ``default``."""
    if not isinstance(at.node, yaml.MappingNode):
        return _read_message(at), ()
    texts = {tag: (value, _read_message(value)) for tag, value in at.mapping(None, kind="language").items()}
    if "default" not in texts:
        raise at.error("the key 'default' is missing: it is for every language that has no text of its own")
    default = texts.pop("default")[1]
    folded: dict[str, str] = {}
    for tag, (place, text) in texts.items():
        if not _LANGUAGE.fullmatch(tag):
            raise place.error(f"expected a BCP-47 tag such as de or pt-BR, or default, got {tag!r}")
        if tag.casefold() in folded:
            raise place.error(f"the language {tag.casefold()!r} is given twice")
        folded[tag.casefold()] = text
    return default, tuple(sorted(folded.items()))


def _read_hold(at: _At) -> Hold:
    if not isinstance(at.node, yaml.MappingNode):
        return Hold(mode=_read_literal(at, HoldMode, "mode"))
    keys = at.mapping(("mode", "risk", "leak", "delay_ms", "when_late"))
    hold = Hold(
        mode=_optional(keys.get("mode"), lambda one: _read_literal(one, HoldMode, "mode"), "hold"),
        risk=_optional(keys.get("risk"), _At.probability, None),
        leak=_optional(keys.get("leak"), lambda one: one.whole_number(0, 1_000_000), None),
        delay_ms=_optional(keys.get("delay_ms"), lambda one: one.whole_number(1, _LONGEST_DEADLINE_MS), None),
        when_late=_optional(keys.get("when_late"), lambda one: _read_literal(one, WhenLate, "way out"), "fail"),
    )
    if hold.delay_ms is None and "when_late" in keys:
        raise keys["when_late"].error("nothing is ever late: say delay_ms too, or leave this out")
    if hold.when_late == "release" and (hold.leak == 0 or (hold.leak is None and hold.mode == "hold")):
        raise keys["when_late"].error("nothing may be released: say with leak how many characters may be")
    if hold.mode == "hold" and hold.leak and hold.when_late != "release":
        raise keys["leak"].error("mode: hold lets nothing out, so that this would never count: leave it out")
    return hold


def _read_rollback(at: _At) -> Rollback:
    keys = at.mapping(("tries", "buffer", "hint", "then"))
    usual = Rollback()
    return Rollback(
        tries=_optional(keys.get("tries"), lambda one: one.whole_number(1, 10), usual.tries),
        buffer=_optional(keys.get("buffer"), lambda one: one.whole_number(0, 10_000), usual.buffer),
        hint=_optional(keys.get("hint"), _read_instructions, usual.hint),
        then=_optional(keys.get("then"), lambda one: _read_literal(one, RollbackThen, "intervention"), usual.then),
    )


def _read_confirm(at: _At) -> Confirm:
    if not isinstance(at.node, yaml.MappingNode):
        return Confirm() if at.yes_or_no() else NO_CONFIRM
    keys = at.mapping(("deadline_ms", "on_error", "again_after"))
    usual = Confirm()
    return Confirm(
        deadline_ms=_optional(keys.get("deadline_ms"), lambda one: one.whole_number(1, _LONGEST_DEADLINE_MS), None),
        on_error=_optional(
            keys.get("on_error"), lambda one: _read_literal(one, OnConfirmError, "way out"), usual.on_error
        ),
        again_after=_optional(keys.get("again_after"), lambda one: one.whole_number(1, 1_000_000), usual.again_after),
    )


def _read_instructions(at: _At) -> str:
    text = _read_message(at)
    if "<|" in text:
        raise at.error("<| begins a control token of a model, and cannot be part of an instruction")
    return text


def _read_action(at: _At) -> Action:
    return Action.parse(at.word([action.word for action in Action], "action"))


def _read_on_guard_error(at: _At) -> OnGuardError:
    if not isinstance(at.node, yaml.MappingNode):
        return OnGuardError(_read_action(at))
    keys = at.mapping(("default", *FAILURE_KINDS.values()), kind="kind of failure")
    if "default" not in keys:
        raise at.error("the key 'default' is missing: it is for every failure that has no key of its own")
    actions = {kind: _read_action(value) for kind, value in keys.items()}
    return OnGuardError(actions.pop("default"), actions)


def _read_history(at: _At) -> History:
    keys = at.mapping(("judge", "at_most", "turns"))
    if "judge" not in keys:
        raise at.error("the key 'judge' is missing: expected true or false")
    words = [action.word for action in Action if action is not Action.REDACT]
    usual = History(judge=keys["judge"].yes_or_no())
    return History(
        judge=usual.judge,
        at_most=_optional(keys.get("at_most"), lambda one: Action.parse(one.word(words, "action")), usual.at_most),
        turns=_optional(keys.get("turns"), lambda one: one.whole_number(1, _MOST_TURNS), usual.turns),
    )


def _read_literal(at: _At, literal: Any, kind: str) -> Any:
    return at.word(get_args(literal), kind)


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
            if covers(earlier, rule):
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
    action = _read_action(keys["action"])
    intervention = _optional(
        keys.get("intervention"), lambda one: _read_literal(one, InterventionWord, "intervention"), None
    )
    if intervention is not None and action < Action.REDACT:
        raise keys["intervention"].error(f"a rule that says {action.word} stops nothing: leave it out")
    unsaid: tuple[str | None, Messages] = (None, ())
    message, messages = _read_messages(keys["message"]) if "message" in keys else unsaid
    return Rule(
        name=name,
        severity=severity,
        action=action,
        min_unsafe=_optional(least.get("unsafe"), _At.probability, None),
        min_flagged=_optional(least.get("flagged"), _At.probability, None),
        categories=named,
        target=target,
        tenants=_words(scope.get("tenant")),
        regions=_words(scope.get("region")),
        routes=_words(scope.get("route")),
        languages=_words(scope.get("language")),
        advice=tuple(Advice(word) for word in _words(keys.get("advice"), [a.value for a in Advice], "advice")),
        message=message,
        messages=messages,
        intervention=intervention,
        observe=_optional(keys.get("observe"), _At.yes_or_no, False),
    )


def _words(at: _At | None, known: Sequence[str] | None = None, kind: str = "") -> tuple[str, ...]:
    """The words of a list, at least one when the key is there; () when it is not."""
    if at is None:
        return ()
    words = tuple(element.text() if known is None else element.word(known, kind) for element in at.items())
    if not words:
        raise at.error("the list is empty: leave the key out to match everything")
    return words


# --- layers -------------------------------------------------------------------------------------------------------


def _read_layers(at: _At, categories: Sequence[str], rules: Sequence[Rule]) -> tuple[Layer, ...]:
    parts = [
        (kind, pattern, part, part.mapping(_LAYER_KEYS))
        for kind, layers in at.mapping(LAYER_KINDS, kind="kind of layer").items()
        for pattern, part in layers.mapping(None, kind=kind).items()
    ]
    seen: set[tuple[str, str]] = set()
    names = {rule.name for rule in rules}
    read: list[tuple[Layer, _At | None]] = []
    for kind, pattern, part, keys in parts:
        word = pattern.casefold() if kind == "region" else pattern
        if (kind, word) in seen:
            raise part.error(f"two layers are for the {kind} {pattern!r}")
        seen.add((kind, word))
        layer = _read_layer(_kind(kind), pattern, part, keys, categories)
        for number, rule in enumerate(layer.rules):
            if rule.name in names:
                raise keys["rules"].items()[number].error(f"two rules have the name {rule.name!r}")
            names.add(rule.name)
        read.append((layer, keys.get("without")))
    for layer, at_without in read:
        _check_without(layer, at_without, names)
    return tuple(layer for layer, _ in read)


def _kind(word: str) -> LayerKind:
    kinds: tuple[LayerKind, ...] = get_args(LayerKind)
    return kinds[kinds.index(word)]


def _read_layer(kind: LayerKind, pattern: str, at: _At, keys: Mapping[str, _At], categories: Sequence[str]) -> Layer:
    if not keys:
        raise at.error("the layer says nothing: leave it out")
    if "*" in pattern[:-1] or (kind == "region" and "*" in pattern):
        raise at.error(
            f"{pattern!r} has a * that is not at its end" if kind != "region" else "a region has no *: write it out"
        )
    without = _words(keys.get("without"))
    return Layer(kind, pattern, without=without, **_read_settings(keys, categories))


def _check_without(layer: Layer, at: _At | None, names: set[str]) -> None:
    for element in at.items() if at else ():
        name = element.text()
        if name not in names:
            known = sorted(names)
            raise element.error(f"unknown rule {name!r}{_nearest(name, known)}; known: {', '.join(known) or 'none'}")
        if name in {rule.name for rule in layer.rules}:
            raise element.error(f"{name!r} is a rule of this layer: leave it out")
