"""Taking apart what a model's answer is made of: which fields pass, which are texts to judge, which are dropped.

Pure functions over JSON values, for the deltas of a stream and the messages of a whole answer alike. A known field
passes only when its value looks as that field does: numbers, words for programs and identities, but no sentences.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, NamedTuple, TypeGuard

from tidegate.errors import UpstreamError
from tidegate.gateway.schemas import is_name, weight_of
from tidegate.types import Channel, Role, ToolCall, Turn

__all__ = [
    "CHAT_TEXTS",
    "CHOICE_FIELDS",
    "COMPLETION_TEXTS",
    "MODEL_FIELDS",
    "OUR_FIELD",
    "TOP_FIELDS",
    "Known",
    "Parts",
    "Slot",
    "Text",
    "called",
    "carries_text",
    "finish_reason_of",
    "identity",
    "is_json",
    "is_place",
    "numbers",
    "path_of",
    "put",
    "reasoning_of",
    "take_apart",
    "turn_of",
    "without_text",
    "word",
]

Slot = tuple[str | int, ...]
"""Where a text stands in a delta or message, as ``("tool_calls", 0, "function", "arguments")``."""

CHAT_TEXTS: Final[Mapping[str, Channel]] = {
    "content": Channel.ANSWER,
    "reasoning_content": Channel.REASONING,
    "reasoning": Channel.REASONING,
    "refusal": Channel.REFUSAL,
}
COMPLETION_TEXTS: Final[Mapping[str, Channel]] = {
    "text": Channel.ANSWER,
    "reasoning_content": Channel.REASONING,
    "reasoning": Channel.REASONING,
    "refusal": Channel.REFUSAL,
}
OUR_FIELD: Final = "tidegate"
"""The field that is ours alone: an upstream's does not pass."""

_WORD: Final = re.compile(r"[a-z_.]{1,32}")
_IDENTITY: Final = re.compile(r"[\w.:/@+-]{1,128}", re.ASCII)
_NO_NAME: Final = "?"
"""Stands in coverage for a field whose name could be a sentence."""
_ROLES: Final = frozenset(role.value for role in Role)


class Known(NamedTuple):
    """What else may pass: the tools that the request offered, and fields that the operator says carry no text; and the
    fields that are texts."""

    tools: frozenset[str]
    trusted: frozenset[str]
    texts: Mapping[str, Channel] = CHAT_TEXTS


class Text(NamedTuple):
    """One text of a delta or message, where it stood, and which channel it belongs to."""

    slot: Slot
    channel: Channel
    text: str


@dataclass(slots=True)
class Parts:
    """A delta or message taken apart: what passes, what is judged, and how many characters nobody judges, by field; and
    the names of the called tools that pass, by the slot of the call. Fields that we do not know are dropped, unless
    they are ``passing``."""

    plain: dict[str, Any] = field(default_factory=dict)
    texts: list[Text] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)
    names: dict[Slot, str] = field(default_factory=dict)
    passing: bool = False

    def drop(self, name: str, value: Any, prefix: str = "") -> None:
        """Count a value that does not pass; a name that could be a sentence is not said, but counted too."""
        count = weight_of(value)
        if not is_name(name):
            count, name = count + len(name), _NO_NAME
        self.count(prefix + name, count)

    def count(self, name: str, characters: int) -> None:
        """Count so many characters of a field."""
        self.dropped[name] = self.dropped.get(name, 0) + characters

    @staticmethod
    def weigh(value: Any) -> int:
        """How much a value could tell, in characters."""
        return weight_of(value)

    def unknown(self, name: str, value: Any, kept: dict[str, Any], prefix: str = "") -> None:
        """Take a field that we do not know: it passes where it can tell nothing, or where the policy lets it."""
        plain = is_name(name) and not carries_text(value)
        if not plain:
            self.drop(name, value, prefix)
        if (plain or self.passing) and name != OUR_FIELD:
            kept[name] = value


def carries_text(value: Any) -> bool:
    """Whether a value could tell text: strings do, and so do arrays, which may be token ids, and long names."""
    if isinstance(value, dict):
        return any(not is_name(name) or carries_text(inner) for name, inner in value.items())
    return isinstance(value, str | list) and bool(value)


# --- known fields -------------------------------------------------------------------------------------------------

Drop = Callable[[Any], None]
Check = Callable[[Any, Drop], Any]
"""Gives what passes of a field's value, `GONE` when that is nothing; calls the other for what does not pass."""


class _Gone:
    pass


GONE: Final = _Gone()
"""Stands for a value of which nothing passes."""


def _passes(value: Any, drop: Drop, good: bool) -> Any:
    if good:
        return value
    drop(value)
    return GONE


def _whole_number(value: Any, drop: Drop) -> Any:
    """A place, counted from 0."""
    return _passes(value, drop, value is None or is_place(value))


def is_place(value: Any) -> TypeGuard[int]:
    """Whether a value is a whole number from 0 on."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _number(value: Any, drop: Drop) -> Any:
    return _passes(value, drop, value is None or isinstance(value, int | float))


def numbers(value: Any, drop: Drop) -> Any:
    """A number, or an object of such; what else is in it is left out."""
    if not isinstance(value, dict):
        return _number(value, drop)
    kept = {}
    for name, inner in value.items():
        if not is_name(name):
            drop([name, inner])
        elif (number := numbers(inner, drop)) is not GONE:
            kept[name] = number
    return kept


def word(value: Any, drop: Drop) -> Any:
    """A word for programs, as ``chat.completion``; in lower case, because some upstreams shout."""
    found = value.lower() if isinstance(value, str) else value
    return _passes(found, drop, not found or (isinstance(found, str) and _WORD.fullmatch(found) is not None))


def identity(prefix: str) -> Check:
    """An identity of the upstream's; another, always the same one, stands in for what could be a sentence."""

    def check(value: Any, drop: Drop) -> Any:
        if value is None or value == "" or (isinstance(value, int) and not isinstance(value, bool)):
            return value
        if isinstance(value, str) and _IDENTITY.fullmatch(value):
            return value
        drop(value)
        return prefix + hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:24]

    return check


TOP_FIELDS: Final[Mapping[str, Check]] = {
    "id": identity("chatcmpl-"),
    "object": word,
    "created": _number,
    "model": identity("model-"),
    "system_fingerprint": identity("fp_"),
    "service_tier": word,
    "usage": numbers,
}
MODEL_FIELDS: Final[Mapping[str, Check]] = {
    "id": identity("model-"),
    "object": word,
    "type": word,
    "created": _number,
    "owned_by": identity("owner-"),
    "root": identity("model-"),
    "parent": identity("model-"),
    "first_id": identity("model-"),
    "last_id": identity("model-"),
}
CHOICE_FIELDS: Final[Mapping[str, Check]] = {"index": _whole_number, "finish_reason": word}
_CALL_FIELDS: Final[Mapping[str, Check]] = {"index": _whole_number, "id": identity("call_"), "type": word}


def without_text(
    content: Mapping[str, Any], known: Mapping[str, Check], trusted: frozenset[str], parts: Parts, prefix: str = ""
) -> dict[str, Any]:
    """The known fields as far as they are what they should be, and the unknown ones that carry no text."""
    kept = {}
    for name, value in content.items():
        if name in trusted:
            kept[name] = value
        elif name in known:
            passed = known[name](value, partial(parts.drop, name, prefix=prefix))
            if passed is not GONE:
                kept[name] = passed
        elif name != "obfuscation":
            parts.unknown(name, value, kept, prefix)
    return kept


def finish_reason_of(choice: Mapping[str, Any], parts: Parts) -> str | None:
    """Why a choice has ended, None when it has not; ``stop`` stands in for what could be a sentence."""
    value = choice.get("finish_reason")
    reason = word(value, partial(parts.drop, "finish_reason"))
    if isinstance(reason, str):
        return reason or None
    return "stop" if isinstance(value, str) else None


# --- texts --------------------------------------------------------------------------------------------------------


def take_apart(delta: Mapping[str, Any], known: Known, parts: Parts) -> None:
    """What of a delta (or message) passes, what is judged, and what is dropped.

    Raises:
        UpstreamError: when a text has a shape that nobody knows.
    """
    for name, value in delta.items():
        if name in known.texts:
            texts = [Text((of,), known.texts[of], text) for of, text in _texts_in(name, value) if text]
            parts.texts += texts
            if not texts:
                parts.plain[name] = None if value is None else ""
        elif name == "role" and (value is None or (isinstance(value, str) and value in _ROLES)):
            parts.plain[name] = value
        elif name == "tool_calls" and isinstance(value, list):
            calls = [_take_call(call, place, known, parts) for place, call in enumerate(value)]
            parts.plain[name] = [call for call in calls if call is not None]
        elif name == "function_call" and isinstance(value, dict):
            parts.plain[name] = _take_function(value, (name,), known, parts)
        elif name in known.trusted:
            parts.plain[name] = value
        else:
            parts.unknown(name, value, parts.plain)
    joined: dict[Slot, Text] = {}
    for text in parts.texts:
        before = joined[text.slot].text if text.slot in joined else ""
        joined[text.slot] = text._replace(text=before + text.text)
    parts.texts = list(joined.values())


def _texts_in(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """The texts of a field, each with the field that it goes out as: a string, or an array of parts, as some have."""
    if value is None or isinstance(value, str):
        yield name, value or ""
        return
    for part in value if isinstance(value, list) else (value,):
        match part:
            case str(text) | {"type": "text" | "output_text", "text": str(text)} if isinstance(value, list):
                yield name, text
            case {"type": "refusal", "refusal": str(text)} if isinstance(value, list):
                yield "refusal", text
            case {"type": "thinking" | "reasoning", "thinking": str() | list() as thoughts} if isinstance(value, list):
                for _, text in _texts_in("reasoning_content", thoughts):
                    yield "reasoning_content", text
            case _:
                raise UpstreamError("the upstream sent a text in a shape that is not known")


def _take_call(call: Any, place: int, known: Known, parts: Parts) -> dict[str, Any] | None:
    if not isinstance(call, dict):
        parts.drop("tool_calls", call)
        return None
    index = call.get("index")
    number = index if is_place(index) else place
    inner = {name: call[name] for name in ("function", "custom") if isinstance(call.get(name), dict)}
    rest = {name: value for name, value in call.items() if name not in inner}
    kept = without_text(rest, _CALL_FIELDS, known.trusted, parts, "tool_calls.")
    for name, value in inner.items():
        kept[name] = _take_function(value, ("tool_calls", number, name), known, parts)
    return kept


def _take_function(function: Mapping[str, Any], slot: Slot, known: Known, parts: Parts) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for name, value in function.items():
        if value and isinstance(value, str) and name in ("arguments", "input", "name"):
            if name == "name" and value in known.tools:
                kept[name] = parts.names[slot] = value
            else:
                parts.texts.append(Text((*slot, name), Channel.TOOL_CALL, value))
        else:
            parts.unknown(name, value, kept, "".join(f"{step}." for step in slot))
    return kept


def is_json(slot: Slot) -> bool:
    """Whether the text that stands there is JSON: the arguments of a call, unless it is one of free text."""
    return slot[-1] == "arguments"


def called(slot: Slot, names: Mapping[Slot, str], texts: Mapping[Slot, str]) -> str:
    """The name of the tool whose call a text belongs to; "" when it is not known, or the text is no call's arguments.

    Args:
        slot: where the text stands.
        names: those that passed, by the slot of the call.
        texts: what is judged, with the other names, by slot.
    """
    if slot[0] not in ("tool_calls", "function_call") or slot[-1] == "name":
        return ""
    return names.get(slot[:-1]) or texts.get((*slot[:-1], "name"), "")


def reasoning_of(texts: Mapping[Slot, str]) -> str:
    """The reasoning among these texts."""
    return _joined(texts, "reasoning_content", "reasoning")


def _joined(texts: Mapping[Slot, str], *names: str) -> str:
    return "\n".join(texts[(name,)] for name in names if texts.get((name,)))


def put(delta: dict[str, Any], slot: Slot, text: str) -> None:
    """Put a text back where it stood."""
    if slot[0] != "tool_calls":
        place = delta
        for step in slot[:-1]:
            place = place.setdefault(str(step), {})
        place[str(slot[-1])] = text
        return
    _, number, inner, name = slot
    calls = delta.setdefault("tool_calls", [])
    call = next((call for place, call in enumerate(calls) if call.get("index", place) == number), None)
    if call is None:
        call = {"index": number}
        calls.append(call)
    call.setdefault(str(inner), {})[str(name)] = text


def path_of(index: int, slot: Slot) -> str:
    """The place of a text in the exchange, as ``choices[0].content``."""
    steps = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in slot)
    return f"choices[{index}]{steps}"


def turn_of(texts: Mapping[Slot, str]) -> Turn:
    """The assistant turn that has these texts."""
    calls: dict[Slot, dict[str, str]] = {}
    for slot, text in texts.items():
        if slot[0] in ("tool_calls", "function_call"):
            calls.setdefault(slot[:-1], {})[str(slot[-1])] = text
    return Turn(
        Role.ASSISTANT,
        _joined(texts, "content", "text", "refusal"),
        reasoning_of(texts),
        tuple(ToolCall(call.get("name", ""), call.get("arguments", call.get("input", ""))) for call in calls.values()),
    )
