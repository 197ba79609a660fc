"""Taking apart what the Responses API answers with: which fields pass, which are texts to judge, which are dropped.

Pure functions over JSON values, for the events of a stream and for whole responses alike. One table by the name of the
field serves every kind of output: the names mean the same wherever they stand. A text leaves "" in its place, so that
it can be put back once it is judged.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, NamedTuple

from tidegate.errors import UpstreamError
from tidegate.gateway.channels import Judging
from tidegate.gateway.deltas import (
    GONE,
    OUR_FIELD,
    TOP_FIELDS,
    Check,
    Drop,
    Known,
    Parts,
    Slot,
    identity,
    is_json,
    numbers,
    word,
)
from tidegate.gateway.logprobs import spelled
from tidegate.gateway.schemas import is_name, mended
from tidegate.gateway.unescaped import wholly_unescaped
from tidegate.types import Channel, Role, ToolCall, Turn

__all__ = [
    "LOGPROBS",
    "Found",
    "Taken",
    "fill",
    "fill_tokens",
    "path_of",
    "take",
    "take_response",
    "take_tokens",
    "turn_of",
    "value_of",
]


class Found(NamedTuple):
    """One text: where it stood, what it is, the text as it is judged, and the value that stood there."""

    slot: Slot
    channel: Channel
    text: str
    value: Any


@dataclass(slots=True)
class Taken:
    """What was taken apart: the texts, and how many characters were dropped, by field.

    ``tokens``: those that spell a text, by its place; they leave with it, and not when it leaves masked. ``left`` is
    how a text may begin whose tokens are only those of the rest; "" for none. ``masks``: texts may leave masked, and
    then nothing may that could spell them.
    """

    known: Known
    texts: list[Found] = field(default_factory=list)
    parts: Parts = field(default_factory=Parts)
    tokens: dict[Slot, list[Any]] = field(default_factory=dict)
    left: str = ""
    masks: bool = False

    @classmethod
    def by(cls, judging: Judging, *, left: str = "") -> Taken:
        """Nothing yet, for an answer that is judged with these."""
        return cls(judging.known({}), parts=Parts(passing=judging.passing), left=left, masks=judging.masks)

    @property
    def dropped(self) -> dict[str, int]:
        return self.parts.dropped

    def unseen(self, name: str, value: Any, prefix: str) -> Any:
        """Count what no guard can judge; what passes of it is nothing, unless the policy lets it."""
        self.parts.drop(name, value, prefix)
        return value if self.parts.passing else GONE

    @property
    def trusts_tokens(self) -> bool:
        """Whether the operator says that log probabilities carry no text."""
        return LOGPROBS in self.known.trusted

    def count(self, prefix: str, parts: Parts) -> None:
        """What no guard can judge of a list of tokens."""
        for name, characters in () if self.trusts_tokens else parts.dropped.items():
            self.parts.count(prefix + name, characters)


LOGPROBS: Final = "logprobs"

# --- the table ----------------------------------------------------------------------------------------------------

_IDENTITIES: Final[Mapping[str, Check]] = {
    "id": identity("id_"),
    "approval_request_id": identity("mcpr_"),
    "call_id": identity("call_"),
    "caller_id": identity("call_"),
    "container_id": identity("cntr_"),
    "file_id": identity("file-"),
    "fingerprint": identity("fp_"),
    "item_id": identity("id_"),
}
_WORDS: Final = frozenset(
    {"background", "button", "execution", "object", "output_format", "phase", "quality", "role", "status", "type"}
)
_NAMES: Final = frozenset({"name", "namespace", "server_label"})
"""What is called: passes when the request offered it, and is judged otherwise."""
_TEXTS: Final[Mapping[str, Channel | None]] = {
    "arguments": Channel.TOOL_CALL,
    "code": Channel.TOOL_CALL,
    "command": Channel.TOOL_CALL,
    "commands": Channel.TOOL_CALL,
    "content": None,
    "description": None,
    "diff": Channel.TOOL_CALL,
    "error": None,
    "filename": None,
    "input": Channel.TOOL_CALL,
    "keys": Channel.TOOL_CALL,
    "logs": None,
    "message": None,
    "output": None,
    "path": Channel.TOOL_CALL,
    "pattern": Channel.TOOL_CALL,
    "queries": Channel.TOOL_CALL,
    "query": Channel.TOOL_CALL,
    "reason": None,
    "refusal": Channel.REFUSAL,
    "revised_prompt": None,
    "stderr": None,
    "stdout": None,
    "summary": None,
    "text": None,
    "title": None,
    "url": None,
    "user": Channel.TOOL_CALL,
    "working_directory": Channel.TOOL_CALL,
}
"""Texts, or arrays of such; None where the channel is that of what they stand in."""
_VALUES: Final[Mapping[str, Channel | None]] = {
    "arguments": Channel.TOOL_CALL,
    "attributes": None,
    "env": Channel.TOOL_CALL,
    "input_schema": None,
}
"""JSON values that are judged as the text that they are when written down."""
_INSIDE: Final = frozenset(
    {
        "action",
        "actions",
        "annotation",
        "annotations",
        "caller",
        "content",
        "environment",
        "error",
        "item",
        "operation",
        "outcome",
        "output",
        "outputs",
        "part",
        "path",
        "pending_safety_checks",
        "results",
        "sources",
        "summary",
        "tools",
    }
)
"""Objects, or arrays of such, that are taken apart themselves."""
_CHANNELS: Final[Mapping[str, Channel]] = {
    "reasoning": Channel.REASONING,
    "reasoning_text": Channel.REASONING,
    "summary_text": Channel.REASONING,
}
"""What stands in something of these types; everything else is an answer."""
_DONE_BY_TOOLS: Final = frozenset({"action", "actions", "operation"})
"""Texts in these are calls."""
_DATA: Final = "data:"


def take(
    value: Mapping[str, Any], slot: Slot, taken: Taken, channel: Channel = Channel.ANSWER, *, prefix: str = ""
) -> dict[str, Any]:
    """What passes of an object, with "" where texts stood; the texts and what is dropped are noted in ``taken``.

    Args:
        value: the object.
        slot: where it stands.
        taken: collects.
        channel: what its texts are, where nothing in it says it.
        prefix: of the names of what is dropped.
    """
    kind = value.get("type")
    channel = _CHANNELS.get(kind, channel) if isinstance(kind, str) else channel
    kept: dict[str, Any] = {}
    for name, inner in value.items():
        if name == "obfuscation":
            continue
        if name == LOGPROBS and inner and isinstance(inner, list) and isinstance(value.get("text"), str):
            passed: Any = take_tokens(inner, value["text"], (*slot, "text"), taken, prefix)
        else:
            passed = _take_field(name, inner, (*slot, name), taken, channel, prefix)
        if passed is not GONE:
            kept[name] = passed
    return kept


def _take_field(name: str, value: Any, slot: Slot, taken: Taken, channel: Channel, prefix: str) -> Any:
    drop = partial(taken.parts.drop, name, prefix=prefix)
    if is_name(name) and (value is None or value == "" or isinstance(value, bool | int | float)):
        return value
    if name == LOGPROBS and value != [] and (taken.masks or not taken.trusts_tokens):  # no text is beside them
        passed = taken.unseen(name, value, prefix)
        passed = GONE if taken.masks else passed
        return [] if passed is GONE and isinstance(value, list) else passed
    if name in _IDENTITIES:
        return _IDENTITIES[name](value, drop)
    if name in _WORDS:
        return word(value, drop)
    if name in _NAMES and isinstance(value, str):
        return value if value in taken.known.tools else _note(slot, Channel.TOOL_CALL, value, taken)
    if name in _TEXTS and isinstance(value, str):
        return _take_text(slot, _TEXTS[name] or channel, value, taken, prefix)
    if name in _TEXTS and isinstance(value, list) and value and all(isinstance(one, str) for one in value):
        kind = _TEXTS[name] or channel
        return [_take_text((*slot, place), kind, one, taken, prefix) for place, one in enumerate(value)]
    if name in _INSIDE and isinstance(value, list | dict) and _has_objects(value):
        kind = Channel.TOOL_CALL if name in _DONE_BY_TOOLS else channel
        return _take_inside(value, slot, taken, kind, f"{prefix}{name}.")
    if name in _VALUES and isinstance(value, list | dict):
        return _note(slot, _VALUES[name] or channel, value, taken) if value else value
    return _unknown(name, value, taken, prefix)


def take_tokens(listed: list[Any], text: str, slot: Slot, taken: Taken, prefix: str) -> list[Any]:
    """Note the tokens that spell the text of this place, which is judged; returns what stands there before it is.

    What else they say nobody has judged: the policy says what becomes of it.
    """
    text, told, own = mended(text), listed, Parts()
    for rest in dict.fromkeys((text, text.removeprefix(taken.left))):
        own = Parts(passing=taken.parts.passing or taken.trusts_tokens)
        told = spelled(listed, rest, own)
        if LOGPROBS not in own.dropped:
            break
    taken.count(prefix, own)
    taken.tokens[slot] = listed if own.dropped and own.passing else told
    return []


def _unknown(name: str, value: Any, taken: Taken, prefix: str = "") -> Any:
    if name in taken.known.trusted:
        return value
    kept: dict[str, Any] = {}
    taken.parts.unknown(name, value, kept, prefix)
    return kept.get(name, GONE)


def _has_objects(value: Any) -> bool:
    return isinstance(value, dict) or all(isinstance(one, dict) for one in value)


def _take_inside(value: Any, slot: Slot, taken: Taken, channel: Channel, prefix: str) -> Any:
    if isinstance(value, dict):
        return take(value, slot, taken, channel, prefix=prefix)
    return [take(one, (*slot, place), taken, channel, prefix=prefix) for place, one in enumerate(value)]


def _take_text(slot: Slot, channel: Channel, text: str, taken: Taken, prefix: str) -> Any:
    if text[: len(_DATA)].lower() == _DATA and slot[-1] == "url":  # an image or a file, which nobody reads as a text
        passed = taken.unseen("url", text, prefix)
        return "" if passed is GONE else passed
    return _note(slot, channel, text, taken)


def _note(slot: Slot, channel: Channel, value: Any, taken: Taken) -> str:
    if isinstance(value, str):
        value = text = wholly_unescaped(value) if is_json(slot) else mended(value)
    else:
        text = mended(json.dumps(value, ensure_ascii=False))
    if text:
        taken.texts.append(Found(slot, channel, text, value))
    return ""


def fill_tokens(kept: Any, slot: Slot, tokens: list[Any]) -> None:
    """Put tokens back beside the text that they spell."""
    fill(kept, (*slot[:-1], LOGPROBS), tokens)


def value_of(text: str, value: Any) -> Any:
    """The value that another text of the same form stands for."""
    return text if isinstance(value, str) else json.loads(text)


def fill(kept: Any, slot: Slot, value: Any) -> None:
    """Put a text back where it stood."""
    for step in slot[:-1]:
        kept = kept[step]
    kept[slot[-1]] = value


# --- a response ---------------------------------------------------------------------------------------------------


_RESPONSE: Final[Mapping[str, Check]] = {
    "id": identity("resp_"),
    "object": word,
    "created_at": TOP_FIELDS["created"],
    "completed_at": TOP_FIELDS["created"],
    "model": identity("model-"),
    "status": word,
    "service_tier": word,
    "usage": numbers,
    "tool_usage": numbers,
}
_OWN: Final = frozenset(
    {
        "conversation",
        "instructions",
        "metadata",
        "previous_response_id",
        "prompt",
        "prompt_cache_key",
        "safety_identifier",
        "tools",
        "user",
    }
)
"""Echoes of the request in which only the client's own words pass."""
_ECHOES: Final = frozenset(
    {"prompt_cache_options", "prompt_cache_retention", "reasoning", "text", "tool_choice", "truncation"}
)
"""Echoes of the request that upstreams complete with words for programs."""
_ECHOED: Final = re.compile(r"[a-z0-9_.-]{1,32}")
_MOST_WORDS: Final = 12


def take_response(response: Any, asked: Mapping[str, Any], slot: Slot, taken: Taken) -> dict[str, Any]:
    """What passes of a response object; its output is taken apart, and what it echoes is said in the client's words.

    Args:
        response: the object.
        asked: the request that it answers.
        slot: where it stands.
        taken: collects.

    Raises:
        UpstreamError: when it is no response, or its output is no array of objects.
    """
    if not isinstance(response, dict):
        raise UpstreamError("the upstream's answer is not a response")
    kept: dict[str, Any] = {}
    for name, value in response.items():
        passed = _take_response_field(name, value, asked, (*slot, name), taken)
        if passed is not GONE:
            kept[name] = passed
    return kept


def _take_response_field(name: str, value: Any, asked: Mapping[str, Any], slot: Slot, taken: Taken) -> Any:
    drop = partial(taken.parts.drop, name)
    if name == "output":
        if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
            raise UpstreamError("the upstream's answer has no proper output")
        return [take(one, (*slot, place), taken, prefix="output.") for place, one in enumerate(value)]
    if name in _RESPONSE:
        return _RESPONSE[name](value, drop)
    if name == "error" and isinstance(value, dict):
        return _error(value, taken)
    if name == "incomplete_details" and isinstance(value, dict):
        reason = word(value.get("reason"), drop)
        return {"reason": None if reason is GONE else reason}
    if name in _OWN or name in _ECHOES:
        return _echo(name, value, asked, drop)
    return GONE if name == OUR_FIELD else _unknown(name, value, taken)


def _error(error: Mapping[str, Any], taken: Taken) -> dict[str, Any]:
    """An error in words of ours: the upstream's may quote what nobody has judged."""
    code = word(error.get("code"), partial(taken.parts.drop, "error.code"))
    message = error.get("message")
    if message:
        taken.parts.drop("error.message", message)
    return {
        "code": code if isinstance(code, str) and code else "server_error",
        "message": "the upstream could not complete its answer",
    }


def _echo(name: str, value: Any, asked: Mapping[str, Any], drop: Drop) -> Any:
    if name in asked and value:
        return asked[name]
    if value is None or value in ([], {}, ""):
        return value
    if name in _ECHOES and 0 <= _words_in(value) <= _MOST_WORDS:
        return value
    drop(value)
    return [] if name == "tools" else None


def _words_in(value: Any) -> int:
    """How many words for programs are in a value; far below 0 when something else is."""
    if isinstance(value, str):
        return 1 if _ECHOED.fullmatch(value) else -1_000_000
    if isinstance(value, list):
        return sum(map(_words_in, value))
    if isinstance(value, dict):
        return sum(_words_in(name) + _words_in(inner) for name, inner in value.items())
    return 0


# --- places and turns ---------------------------------------------------------------------------------------------


def path_of(slot: Slot) -> str:
    """The place of a text in the exchange, as ``output[0].content[0].text``."""
    steps = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in slot)
    return steps.removeprefix(".")


def turn_of(texts: Iterable[tuple[Slot, Channel, str]]) -> Turn:
    """The assistant turn that has these texts."""
    said: list[str] = []
    thought: list[str] = []
    names: dict[Slot, str] = {}
    calls: list[tuple[Slot, str]] = []
    for slot, channel, text in texts:
        if channel is Channel.REASONING:
            thought.append(text)
        elif channel is not Channel.TOOL_CALL:
            said.append(text)
        elif slot[-1] == "name":
            names[slot[:-1]] = text
        else:
            calls.append((slot, text))
    named = [slot[:-1] for slot, _ in calls]
    calls += [((*slot, "arguments"), "") for slot in names if slot not in named]
    return Turn(
        Role.ASSISTANT,
        "\n".join(said),
        "\n".join(thought),
        tuple(ToolCall(names.get(slot[:-1], ""), text) for slot, text in calls),
    )
