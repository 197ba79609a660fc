"""The wire and our words: JSON bodies are read and checked here, and decisions are written in OpenAI's shapes.

What a request says is judged as the upstream will read it. A body goes on in the client's own bytes when they can be
read in one way only; where a key is given twice, or a character is broken, what was parsed goes on in their place, so
that they cannot mean one thing here and another there.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any, Final, NamedTuple, NoReturn

from starlette.requests import Request

from tidegate.gateway.asked import PromptText
from tidegate.gateway.statuses import Problem
from tidegate.policy import Policy
from tidegate.types import Action, Coverage, Decision, Span

__all__ = [
    "MOST_LEVELS",
    "TOO_DEEP",
    "Body",
    "characters_in",
    "decision_field",
    "is_name",
    "is_too_deep",
    "json_of",
    "kind_of",
    "mended",
    "read_body",
    "read_json",
    "refuse",
    "undecided_field",
    "weight_of",
    "worst_decision",
]

_FIELD: Final = re.compile(r"[\w.:/@+-]{1,64}", re.ASCII)
_SURROGATE: Final = re.compile("[\ud800-\udfff]")


MOST_LEVELS: Final = 100
"""How deep arrays and objects may lie in each other, whoever sent them; so deep, all that walks through them can go."""
TOO_DEEP: Final = f"nested too deep: arrays and objects may lie in each other for at most {MOST_LEVELS} levels"


# --- bodies -------------------------------------------------------------------------------------------------------


class Body(NamedTuple):
    """The body of a request: what it says, and the client's own bytes when nobody can read them in another way."""

    value: dict[str, Any]
    data: bytes | None

    def sent(self, value: dict[str, Any]) -> bytes:
        """The bytes in which a value goes on; the client's own, when it is the very value that was read."""
        if value is self.value and self.data is not None:
            return self.data
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


async def read_json(request: Request, *, longest: int) -> dict[str, Any]:
    """The body of a request as a JSON object. Raises Problem as `read_body`."""
    return (await read_body(request, longest=longest)).value


async def read_body(request: Request, *, longest: int) -> Body:
    """The body of a request, a JSON object.

    Raises:
        Problem: 413 as soon as more than ``longest`` bytes have come; 400 when it is not UTF-8, not JSON or no object.
    """
    data = await _read(request, longest)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        refuse(f"the body is not UTF-8: byte {error.start} cannot be read", code="invalid_utf8")
    repeated = False

    def pairs(listed: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal repeated
        fields = dict(listed)
        repeated = repeated or len(fields) < len(listed)
        return fields

    broken = False
    value: Any = None
    try:
        value = json.loads(text, parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=pairs)
        if "\\ud" in text or "\\uD" in text:
            said = json.dumps(value, ensure_ascii=False)
            whole = mended(said)
            broken = whole != said
            value = json.loads(whole)
    except json.JSONDecodeError as error:
        refuse(f"the body is not JSON: line {error.lineno}, column {error.colno}: {error.msg}", code="invalid_json")
    except RecursionError:
        refuse(TOO_DEEP, "nested_too_deep")
    except ValueError:
        refuse("the body is not JSON: it has a number that JSON does not know, or that is too long", "invalid_json")
    if is_too_deep(value, text):
        refuse(TOO_DEEP, "nested_too_deep")
    if not isinstance(value, dict):
        refuse(f"expected a JSON object, got {kind_of(value)}")
    return Body(value, None if repeated or broken else data)


async def _read(request: Request, longest: int) -> bytes:
    announced = request.headers.get("content-length", "")
    parts: list[bytes] = []
    size = int(announced) if announced.isascii() and announced.isdigit() else 0
    if size <= longest:
        size = 0
        async for part in request.stream():
            size += len(part)
            if size > longest:
                break
            parts.append(part)
    if size > longest:
        raise Problem(413, f"the body is too long: at most {longest:,} bytes are taken", code="body_too_long")
    return b"".join(parts)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError("too large")
    return number


def _finite_or_null(digits: str) -> float | None:
    number = float(digits)
    return number if math.isfinite(number) else None


_NESTING: Final = (dict, list)
_decoded: Final = json.JSONDecoder(parse_constant=lambda _: None, parse_float=_finite_or_null).decode


def json_of(text: str) -> Any:
    """JSON of an upstream, which can be written again: numbers that JSON does not know are null.

    Raises:
        ValueError: when it is not JSON.
        RecursionError: when it is nested deeper than `MOST_LEVELS`.
    """
    value = _decoded(text)
    if is_too_deep(value, text):
        raise RecursionError(f"more than {MOST_LEVELS} levels")
    return value


def is_too_deep(value: Any, text: str) -> bool:
    """Whether a JSON value, read from this text, is nested deeper than `MOST_LEVELS`.

    A text with no more brackets than that cannot be; all others cost a look at each array and object.
    """
    if text.count("[") + text.count("{") <= MOST_LEVELS:
        return False
    level = [value] if type(value) in _NESTING else []
    for _ in range(MOST_LEVELS):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if type(outer) is dict else outer)
            if type(inner) in _NESTING
        ]
        if not level:
            return False
    return True


def mended(text: str) -> str:
    """The same text with halves of a surrogate pair joined, and single ones replaced by U+FFFD."""
    if text.isascii() or not _SURROGATE.search(text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def refuse(message: str, code: str | None = None, *, param: str | None = None) -> NoReturn:
    """Raise the Problem of a request that cannot be used: what was wrong and expected, and where."""
    raise Problem(400, message, param=param, code=code)


def kind_of(value: Any) -> str:
    """What a JSON value is, in words for an error."""
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def is_name(name: str) -> bool:
    """Whether this can be the name of a field, and no sentence."""
    return _FIELD.fullmatch(name) is not None


def weight_of(value: Any) -> int:
    """How much a JSON value could tell: the characters of its strings and of names that could be sentences, and one
    for each number in an array, because it may be the id of a token."""
    match value:
        case str():
            return len(value)
        case dict():
            names = sum(0 if is_name(name) else len(name) for name in value)
            return names + sum(map(weight_of, value.values()))
        case list():
            return sum(
                1 if isinstance(one, int | float) and not isinstance(one, bool) else weight_of(one) for one in value
            )
    return 0


def characters_in(value: Any) -> int:
    """How many characters the strings in a JSON value have, keys left out."""
    match value:
        case str():
            return len(value)
        case dict():
            return sum(map(characters_in, value.values()))
        case list():
            return sum(map(characters_in, value))
    return 0


# --- decisions on the wire ----------------------------------------------------------------------------------------


def worst_decision(decisions: Sequence[Decision]) -> int:
    """Which of several decisions counts: by action, then by severity; a failure comes before a verdict."""

    def rank(index: int) -> tuple[int, int, float]:
        decision = decisions[index]
        if decision.verdict is None:
            return decision.action, 3, 0.0
        return decision.action, decision.verdict.severity, decision.verdict.probabilities.flagged

    return max(range(len(decisions)), key=rank)


def decision_field(
    decision: Decision,
    policy: Policy,
    *,
    path: str | None = None,
    identity: str | None = None,
    text: PromptText | None = None,
) -> dict[str, Any]:
    """What stands in our field ``tidegate``: a decision and its reasons, without any of the text.

    ``path`` is where the judged text stands; ``text`` says it instead where messages were judged together.
    """
    verdict, failure = decision.verdict, decision.failure
    stopped = decision.action is Action.BLOCK
    span = verdict.span if verdict else None
    if text is not None:
        path, span = text.where(span)
    return {
        "id": identity,
        "action": decision.action.word,
        "rule": decision.rule,
        "policy": decision.policy,
        "version": decision.policy_version,
        "severity": verdict.severity.word if verdict else None,
        "probabilities": _probabilities(decision),
        "categories": list(verdict.categories) if verdict else [],
        "guard": verdict.guard if verdict else failure.guard if failure else "",
        "failure": {"kind": failure.kind, "message": failure.message} if failure else None,
        "where": _where(path, span),
        "advice": [advice.value for advice in decision.advice],
        "observed": _observed_field(decision),
        "message": policy.message_for(decision.rule, decision.scope.language) if stopped else None,
        "interventions": [
            {
                "kind": one.kind.value,
                "outcome": one.outcome,
                "count": one.count,
                "characters": one.characters,
                "tokens": one.tokens,
            }
            for one in decision.interventions
        ],
        "flagged_released": decision.leaked,
        "coverage": _coverage_field(decision.coverage),
    }


def undecided_field(policy: Policy, coverage: Sequence[Coverage]) -> dict[str, Any]:
    """What stands in our field ``tidegate`` of a choice without any text: nothing was judged, and nothing is kept."""
    return {
        "id": None,
        "action": "allow",
        "rule": None,
        "policy": policy.name,
        "version": policy.version,
        "severity": None,
        "probabilities": None,
        "categories": [],
        "guard": "",
        "failure": None,
        "where": None,
        "advice": [],
        "observed": None,
        "message": None,
        "interventions": [],
        "flagged_released": 0,
        "coverage": _coverage_field(coverage),
    }


def _observed_field(decision: Decision) -> dict[str, Any] | None:
    """What it would have been if all that is only observed were in force; None when that is the same."""
    seen = decision.observed
    if seen is None:
        return None
    return {"action": seen.action.word, "rule": seen.rule, "advice": [advice.value for advice in seen.advice]}


def _coverage_field(coverage: Sequence[Coverage]) -> list[dict[str, Any]]:
    return [
        {"path": part.path, "channel": part.channel.value, "state": part.state.value, "characters": part.characters}
        for part in coverage
    ]


def _probabilities(decision: Decision) -> dict[str, float] | None:
    if decision.verdict is None:
        return None
    known = decision.verdict.probabilities
    return {"safe": known.safe, "controversial": known.controversial, "unsafe": known.unsafe}


def _where(path: str | None, span: Span | None) -> dict[str, Any] | None:
    if path is None:
        return None
    return {"path": path, "start": span.start if span else 0, "end": span.end if span else None}
