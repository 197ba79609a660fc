"""Taking apart what an answer of Anthropic's Messages API is made of: what passes, what is judged, what is dropped.

Pure functions over JSON values, for the blocks of a stream and of a whole answer alike. A block has at most one text
that flows (of a text or thinking block, in pieces when it streams), and texts that are judged whole, before the block
may leave: the input of a call, the name of a tool that the request did not offer, citations, what a server's tool
found. Blocks of a type that we do not know are dropped.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, NamedTuple

from tidegate.errors import UpstreamError
from tidegate.gateway.deltas import Known, Parts, Slot, without_text
from tidegate.gateway.messages_asked import CALLS, SERVER_TOOLS, is_data, is_plain
from tidegate.gateway.schemas import is_name, mended
from tidegate.types import Channel, Coverage, CoverageState

__all__ = [
    "FLOWS",
    "Taken",
    "Whole",
    "head_of",
    "input_text",
    "labelled_fields",
    "put_whole",
    "stop_details_of",
    "stop_reason_of",
    "stop_sequence_of",
    "take_block",
    "take_citation",
    "usage_of",
]

FLOWS: Final[Mapping[str, Channel]] = {"text": Channel.ANSWER, "thinking": Channel.REASONING}
"""The types of blocks whose text flows, in the field of the same name."""

_WORD: Final = re.compile(r"[a-z_]{1,48}")
_IDENTITY: Final = re.compile(r"[\w.:/@+-]{1,128}", re.ASCII)
_TOP_FIELDS: Final = frozenset(
    {"container", "content", "context_management", "diagnostics", "id", "model", "role", "stop_details"}
    | {"stop_reason", "stop_sequence", "type", "usage"}
)


class Whole(NamedTuple):
    """A text that is judged whole, before the block that it stands in may leave.

    Attributes:
        path: where it stands in its block, as ``.input``.
        channel: what it is.
        text: all of it.
        name: the name of the called tool, for the input of a call; else "".
        slot: the same place as the steps to it.
        masked: the value that stands there when its text is this one, as long as before.
    """

    path: str
    channel: Channel
    text: str
    name: str = ""
    slot: Slot = ()
    masked: Callable[[str], Any] = str


@dataclass(slots=True)
class Taken:
    """A content block taken apart.

    Attributes:
        kind: its type.
        plain: the block as it leaves, when its whole texts may; the text that flows is "" in it.
        flow: the text that flows, as far as it is there.
        wholes: the texts that are judged whole.
        hidden: data that only the upstream can read; it passes, and nobody has judged it.
        name: the name of the called tool; "" when it is no call.
    """

    kind: str
    plain: dict[str, Any] = field(default_factory=dict)
    flow: str = ""
    wholes: list[Whole] = field(default_factory=list)
    hidden: list[Coverage] = field(default_factory=list)
    name: str = ""


def take_block(block: Any, known: Known, parts: Parts, place: str) -> Taken | None:
    """Take a block apart; None when nothing of it passes, because nobody knows its type.

    Args:
        block: as the upstream sent it.
        known: what else may pass.
        parts: counts what is dropped.
        place: the path of the block, as ``content[0]``.

    Raises:
        UpstreamError: when it is no block, or a text of it is no string.
    """
    if not isinstance(block, dict) or not isinstance(block.get("type"), str):
        raise UpstreamError("the upstream sent a content block without a type")
    taken = Taken(block["type"])
    rest = {name: value for name, value in block.items() if name != "type"}
    if taken.kind in FLOWS:
        _take_flow(taken, rest, parts, place)
    elif taken.kind == "redacted_thinking":
        data = rest.pop("data", "")
        if not isinstance(data, str) or not is_data("data", data):
            parts.drop("data", data, f"{place}.")
            return None
        taken.plain["data"] = data
        taken.hidden.append(_hidden(f"{place}.data", Channel.REASONING, data))
    elif taken.kind in CALLS:
        _take_call(taken, rest, known, parts, place)
    elif taken.kind.endswith("_tool_result") and is_name(taken.kind):
        content = rest.pop("content", None)
        taken.plain["content"] = _take_value(taken, "content", content, ("content",), parts, place)
    elif taken.kind != "container_upload":
        parts.drop(taken.kind, block, f"{place}.")
        if not parts.passing:
            return None
        taken.plain = {"type": taken.kind, **rest}
        return taken
    labels = {
        name: rest.pop(name) for name in ("id", "tool_use_id", "file_id", "server_name", "toolset_name") if name in rest
    }
    for name, value in labels.items():
        taken.plain[name] = _identity(name, value, parts, place)
    if "caller" in rest:
        taken.plain["caller"] = labelled_fields("caller", rest.pop("caller"), parts, f"{place}.")
    taken.plain = {"type": taken.kind, **taken.plain, **without_text(rest, {}, known.trusted, parts, f"{place}.")}
    return taken


def _take_flow(taken: Taken, rest: dict[str, Any], parts: Parts, place: str) -> None:
    text = rest.pop(taken.kind, None)
    if text is not None and not isinstance(text, str):
        raise UpstreamError("the upstream sent a text in a shape that is not known")
    taken.flow = text or ""
    taken.plain[taken.kind] = ""
    if taken.kind == "thinking":
        signature = rest.pop("signature", "")
        good = isinstance(signature, str) and is_data("signature", signature)
        if not good:
            parts.drop("signature", signature, f"{place}.")
        taken.plain["signature"] = signature if good else ""
    elif "citations" in rest:
        citations = rest.pop("citations")
        if citations is not None and not isinstance(citations, list):
            raise UpstreamError("the upstream sent citations in a shape that is not known")
        taken.plain["citations"] = None if citations is None else []
        for number, citation in enumerate(citations or ()):
            taken.plain["citations"].append(take_citation(taken, citation, number, parts, place))


def take_citation(taken: Taken, citation: Any, number: int, parts: Parts, place: str) -> Any:
    """What passes of a citation, once its strings are judged as one text.

    Raises:
        UpstreamError: when it is no object.
    """
    if not isinstance(citation, dict):
        raise UpstreamError("the upstream sent a citation in a shape that is not known")
    return _take_value(taken, "citation", citation, ("citations", number), parts, place)


def _take_call(taken: Taken, rest: dict[str, Any], known: Known, parts: Parts, place: str) -> None:
    name = rest.pop("name", "")
    if not isinstance(name, str):
        raise UpstreamError("the upstream sent a tool's name in a shape that is not known")
    taken.name = taken.plain["name"] = mended(name)
    if name and name not in known.tools and not (taken.kind == "server_tool_use" and name in SERVER_TOOLS):
        taken.wholes.append(Whole(".name", Channel.TOOL_CALL, taken.name, slot=("name",)))
    given = rest.pop("input", {})
    taken.plain["input"] = given
    if given:
        text = mended(input_text(given))
        taken.plain["input"] = json.loads(text)
        taken.wholes.append(Whole(".input", Channel.TOOL_CALL, text, taken.name, ("input",), json.loads))


def input_text(value: Any) -> str:
    """The input of a call as the text that is judged: JSON, with every character as itself."""
    return json.dumps(value, ensure_ascii=False)


def put_whole(plain: dict[str, Any], slot: Slot, value: Any) -> None:
    """Put a value in its place in a block."""
    inner: Any = plain
    for step in slot[:-1]:
        inner = inner[step]
    inner[slot[-1]] = value


def _take_value(taken: Taken, name: str, value: Any, slot: Slot, parts: Parts, place: str) -> Any:
    """What passes of a value, once all its strings are judged as one text."""
    found: list[str] = []
    path = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in slot)
    kept = _walk(taken, name, value, found, parts, f"{place}{path}")
    if found:
        masked = partial(_with_text, name, kept)
        taken.wholes.append(Whole(path, Channel.ANSWER, "\n".join(found), slot=slot, masked=masked))
    return kept


def _with_text(name: str, kept: Any, text: str) -> Any:
    """A value whose strings are those of another text, one after the other, each as long as before."""
    begun = 0

    def walk(name: str, value: Any) -> Any:
        nonlocal begun
        match value:
            case str() if value and not is_data(name, value) and not is_plain(name, value):
                start, begun = begun, begun + len(value) + 1
                return text[start : begun - 1]
            case list():
                return [walk(name, inner) for inner in value]
            case dict():
                return {key: walk(key, inner) for key, inner in value.items()}
        return value

    return walk(name, kept)


def _walk(taken: Taken, name: str, value: Any, found: list[str], parts: Parts, place: str) -> Any:
    match value:
        case str() if value and is_data(name, value):
            taken.hidden.append(_hidden(place, Channel.ANSWER, value))
            return value
        case str():
            text = mended(value)
            if text and not is_plain(name, text):
                found.append(text)
            return text
        case list():
            kept = []
            for number, inner in enumerate(value):
                if isinstance(inner, str | list | dict):
                    kept.append(_walk(taken, name, inner, found, parts, f"{place}[{number}]"))
                else:  # numbers in a row could be the ids of tokens
                    parts.drop(name, [inner], f"{place}.")
            return kept
        case dict():
            fields = {}
            for key, inner in value.items():
                if is_name(key):
                    fields[key] = _walk(taken, key, inner, found, parts, f"{place}.{key}")
                else:
                    parts.drop(key, inner, f"{place}.")
            return fields
    return value


def _hidden(path: str, channel: Channel, data: str) -> Coverage:
    return Coverage(path, channel, CoverageState.NOT_JUDGED, len(data))


# --- around the blocks --------------------------------------------------------------------------------------------


def head_of(message: Mapping[str, Any], known: Known, parts: Parts) -> dict[str, Any]:
    """The fields of a message beside its content and how it stopped, as far as they are what they should be."""
    head: dict[str, Any] = {
        "id": _identity("id", message.get("id", ""), parts, "", "msg_"),
        "type": "message",
        "role": "assistant",
        "model": _identity("model", message.get("model", ""), parts, "", "model-"),
    }
    for name, only in (("type", "message"), ("role", "assistant")):
        if message.get(name, only) != only:
            parts.drop(name, message[name])
    for name in ("container", "context_management", "diagnostics"):
        if name in message:
            head[name] = labelled_fields(name, message[name], parts)
    rest = {name: value for name, value in message.items() if name not in _TOP_FIELDS}
    return {**head, **without_text(rest, {}, known.trusted, parts)}


def usage_of(message: Mapping[str, Any], parts: Parts) -> dict[str, Any]:
    """What was used: numbers, and words such as the service tier."""
    return labelled_fields("usage", message.get("usage"), parts) or {}


def labelled_fields(name: str, value: Any, parts: Parts, prefix: str = "") -> dict[str, Any] | None:
    """What of an object is numbers, and words and identities under names for programs; None when it is no object."""
    if isinstance(value, dict):
        kept: dict[str, Any] = _labelled(name, value, parts, prefix)
        return kept
    if value is not None:
        parts.drop(name, value, prefix)
    return None


def _labelled(name: str, value: Any, parts: Parts, prefix: str = "") -> Any:
    match value:
        case str() if not is_plain(name, value):
            parts.drop(name, value, prefix)
            return None
        case list():
            for inner in value:
                if not isinstance(inner, dict):
                    parts.drop(name, [inner], prefix)
            return [_labelled(name, inner, parts, prefix) for inner in value if isinstance(inner, dict)]
        case dict():
            for key in value:
                if not is_name(key):
                    parts.drop(key, value[key], prefix)
            return {
                key: _labelled(key, inner, parts, f"{prefix}{name}.") for key, inner in value.items() if is_name(key)
            }
    return value


def _identity(name: str, value: Any, parts: Parts, place: str, prefix: str = "id_") -> Any:
    """An identity of the upstream's; another, always the same one, stands in for what could be a sentence."""
    if value is None or value == "" or (isinstance(value, str) and _IDENTITY.fullmatch(value)):
        return value
    parts.drop(name, value, f"{place}." if place else "")
    return prefix + hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:24]


def stop_reason_of(fields: Mapping[str, Any], parts: Parts) -> str | None:
    """Why the message has stopped, None when it has not; ``end_turn`` stands in for what could be a sentence."""
    value = fields.get("stop_reason")
    if value is None or (isinstance(value, str) and _WORD.fullmatch(value)):
        return value
    parts.drop("stop_reason", value)
    return "end_turn"


def stop_sequence_of(fields: Mapping[str, Any], stops: frozenset[str], parts: Parts) -> str | None:
    """Which of the request's own stop sequences was met; None when none was."""
    value = fields.get("stop_sequence")
    if isinstance(value, str) and value in stops:
        return value
    if value is not None:
        parts.drop("stop_sequence", value)
    return None


def stop_details_of(fields: Mapping[str, Any], parts: Parts) -> tuple[dict[str, Any] | None, Whole | None]:
    """What the upstream says of its own refusal, and its explanation as a text to be judged."""
    value = fields.get("stop_details")
    if not isinstance(value, dict):
        if value is not None:
            parts.drop("stop_details", value)
        return None, None
    rest = dict(value)
    explanation = rest.pop("explanation", None)
    category = rest.pop("category", None)
    kept = labelled_fields("stop_details", rest, parts) or {}
    if isinstance(category, str) and _WORD.fullmatch(category) is None:
        parts.drop("category", category, "stop_details.")
        category = None
    kept["category"] = category if isinstance(category, str) else None
    kept["explanation"] = None
    if not isinstance(explanation, str) or not explanation:
        return kept, None
    kept["explanation"] = mended(explanation)
    path = "stop_details.explanation"
    return kept, Whole(path, Channel.REFUSAL, kept["explanation"], slot=("explanation",))
