"""Taking apart what a model's answer is made of: which fields pass, which are texts to judge, which are dropped.

Pure functions over JSON values, for the deltas of a stream and the messages of a whole answer alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from tidegate.gateway.schemas import characters_in
from tidegate.types import Channel, Role, ToolCall, Turn

__all__ = [
    "CHOICE_FIELDS",
    "TOP_FIELDS",
    "Known",
    "Parts",
    "Slot",
    "Text",
    "path_of",
    "put",
    "take_apart",
    "turn_of",
    "without_text",
]

Slot = tuple[str | int, ...]
"""Where a text stands in a delta or message, as ``("tool_calls", 0, "function", "arguments")``."""

_TEXTS: Final = {
    "content": Channel.ANSWER,
    "reasoning_content": Channel.REASONING,
    "reasoning": Channel.REASONING,
    "refusal": Channel.REFUSAL,
}
TOP_FIELDS: Final = frozenset(("id", "object", "created", "model", "system_fingerprint", "service_tier", "usage"))
CHOICE_FIELDS: Final = frozenset(("index", "finish_reason"))
_CALL_FIELDS: Final = frozenset(("index", "id", "type"))
_ROLES: Final = frozenset(role.value for role in Role)


class Known(NamedTuple):
    """What else may pass: the tools that the request offered, and fields that the operator says carry no text."""

    tools: frozenset[str]
    trusted: frozenset[str]


class Text(NamedTuple):
    """One text of a delta or message, where it stood, and which channel it belongs to."""

    slot: Slot
    channel: Channel
    text: str


@dataclass(slots=True)
class Parts:
    """A delta or message taken apart: what passes, what is judged, and how many characters are dropped, by field."""

    plain: dict[str, Any] = field(default_factory=dict)
    texts: list[Text] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)

    def drop(self, name: str, value: Any) -> None:
        self.dropped[name] = self.dropped.get(name, 0) + characters_in(value)


def _carries_text(value: Any) -> bool:
    """Whether a value could tell text: strings do, and so do arrays, which may be token ids."""
    if isinstance(value, dict):
        return any(map(_carries_text, value.values()))
    return isinstance(value, str | list)


def without_text(
    content: Mapping[str, Any], known: frozenset[str], trusted: frozenset[str], parts: Parts, prefix: str = ""
) -> dict[str, Any]:
    """The known fields, and the unknown ones that carry no text."""
    kept = {}
    for name, value in content.items():
        if name in known or name in trusted or not _carries_text(value):
            kept[name] = value
        elif name != "obfuscation":
            parts.drop(prefix + name, value)
    return kept


def take_apart(delta: Mapping[str, Any], known: Known, parts: Parts) -> None:
    """What of a delta (or message) passes, what is judged, and what is dropped."""
    for name, value in delta.items():
        if name in _TEXTS and (value is None or isinstance(value, str)):
            if value:
                parts.texts.append(Text((name,), _TEXTS[name], value))
            else:
                parts.plain[name] = value
        elif name == "role" and (value is None or value in _ROLES):
            parts.plain[name] = value
        elif name == "tool_calls" and isinstance(value, list):
            calls = [_take_call(call, place, known, parts) for place, call in enumerate(value)]
            parts.plain[name] = [call for call in calls if call is not None]
        elif name == "function_call" and isinstance(value, dict):
            parts.plain[name] = _take_function(value, (name,), known, parts)
        elif name in known.trusted or not _carries_text(value):
            parts.plain[name] = value
        else:
            parts.drop(name, value)


def _take_call(call: Any, place: int, known: Known, parts: Parts) -> dict[str, Any] | None:
    if not isinstance(call, dict):
        parts.drop("tool_calls", call)
        return None
    index = call.get("index")
    number = index if isinstance(index, int) else place
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
                kept[name] = value
            else:
                parts.texts.append(Text((*slot, name), Channel.TOOL_CALL, value))
        elif not _carries_text(value) or not value:
            kept[name] = value
        else:
            parts.drop(".".join(str(step) for step in (*slot, name)), value)
    return kept


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

    def joined(*names: str) -> str:
        return "\n".join(texts[(name,)] for name in names if texts.get((name,)))

    calls: dict[Slot, dict[str, str]] = {}
    for slot, text in texts.items():
        if slot[0] in ("tool_calls", "function_call"):
            calls.setdefault(slot[:-1], {})[str(slot[-1])] = text
    return Turn(
        Role.ASSISTANT,
        joined("content", "refusal"),
        joined("reasoning_content", "reasoning"),
        tuple(ToolCall(call.get("name", ""), call.get("arguments", call.get("input", ""))) for call in calls.values()),
    )
