"""What a client of Anthropic's Messages API asks for: each text of its body is judged, or counted as not judged.

Content blocks that we know are read as what they are. In any other, and in any field that we do not know, every string
is a text of the turn: what is not text must look like it (an identity, a word for programs, encoded data).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Final

from tidegate.gateway.asked import Asked, Beside, Said, prompt_of
from tidegate.gateway.fields import flag_of, messages_of, model_of, strings_in, unseen_in
from tidegate.gateway.schemas import is_name, kind_of, refuse, weight_of
from tidegate.gateway.unescaped import wholly_unescaped
from tidegate.types import Channel, Coverage, CoverageState, Role, ToolCall, Turn

__all__ = ["CALLS", "DATA", "PLAIN", "SERVER_TOOLS", "MessagesRequest", "is_data", "is_plain", "read_messages"]

MOST_TURNS: Final = 8192

_ROLES: Final = {"user": Role.USER, "assistant": Role.ASSISTANT, "system": Role.SYSTEM}
_CHANNELS: Final = {
    Role.SYSTEM: Channel.SYSTEM,
    Role.USER: Channel.USER,
    Role.ASSISTANT: Channel.ANSWER,
    Role.TOOL: Channel.TOOL_RESULT,
}
_OPERATOR: Final = ("tools", "output_config")
"""What tells the model about its work: the operator's words, as system turns are."""
_OPTIONS_READ: Final = frozenset(("messages", "metadata", "system", *_OPERATOR))
_IDENTITIES: Final = frozenset(
    {
        "cache_control",
        "context_management",
        "inference_geo",
        "model",
        "service_tier",
        "speed",
        "stop_sequences",
        "thinking",
        "tool_choice",
        "user_profile_id",
    }
)
"""Options with words for programs, which the model does not read."""

CALLS: Final = frozenset({"tool_use", "server_tool_use", "mcp_tool_use"})
"""Blocks that call a tool."""

SERVER_TOOLS: Final = frozenset(
    {
        "bash_code_execution",
        "code_execution",
        "text_editor_code_execution",
        "tool_search_tool_bm25",
        "tool_search_tool_regex",
        "web_fetch",
        "web_search",
    }
)
"""Names of the tools that an upstream has itself."""

PLAIN: Final = frozenset(
    {
        "detail",
        "error_code",
        "expires_at",
        "file_id",
        "file_type",
        "id",
        "inference_geo",
        "media_type",
        "retrieved_at",
        "server_name",
        "service_tier",
        "skill_id",
        "speed",
        "tool_id",
        "tool_name",
        "tool_use_id",
        "toolset_name",
        "ttl",
        "type",
        "version",
    }
)
"""Fields of blocks that name something for programs; see `is_plain`."""

DATA: Final = frozenset(
    {"data", "encrypted_content", "encrypted_index", "encrypted_stdout", "redacted_thinking", "signature"}
)
"""Fields of blocks whose strings only the upstream can read; see `is_data`."""

_PLAIN_VALUE: Final = re.compile(r"[\w.:/@+-]{1,128}", re.ASCII)
_DATA_VALUE: Final = re.compile(r"[\w.:/+=-]*", re.ASCII)


def is_plain(name: str, value: str) -> bool:
    """Whether this field of a block is one for programs and looks like it."""
    return name in PLAIN and (not value or _PLAIN_VALUE.fullmatch(value) is not None)


def is_data(name: str, value: str) -> bool:
    """Whether this field of a block is encoded or encrypted data and looks like it: no spaces, ASCII only."""
    return name in DATA and _DATA_VALUE.fullmatch(value) is not None


@dataclass(frozen=True, slots=True)
class MessagesRequest(Asked):
    """A request of the Messages API.

    Attributes:
        stops: the stop sequences: the only words that an answer's ``stop_sequence`` may have.
    """

    stops: frozenset[str] = frozenset()


def read_messages(body: dict[str, Any], *, judge_system: bool = False) -> MessagesRequest:
    """Understand a request; options that are not ours to know are the upstream's business.

    Args:
        body: the request.
        judge_system: whether ``system`` and system turns are judged too, as if a user had written them; and with them
            tools and output_config.

    Raises:
        Problem: 400, with the place of what is wrong.
    """
    messages = messages_of(body)
    model, stream = model_of(body), flag_of(body, "stream")
    tools = frozenset(_tool_names(body))
    said = list(_said(body, messages, tools))
    beside, unseen = list(_beside(body)), list(_unseen(body))
    if len(said) > MOST_TURNS:
        refuse(f"expected at most {MOST_TURNS:,} turns, got {len(said):,}", "too_many", param="messages")
    return MessagesRequest(
        body=body,
        **prompt_of(said, judge_system=judge_system, beside=beside, unseen=unseen)._asdict(),
        model=model,
        stream=stream,
        tools=tools,
        subject=_subject(body),
        stops=frozenset(_stops(body)),
    )


def _subject(body: Mapping[str, Any]) -> str | None:
    metadata = body.get("metadata")
    value = metadata.get("user_id") if isinstance(metadata, dict) else None
    return value if isinstance(value, str) and value else None


def _stops(body: Mapping[str, Any]) -> Iterator[str]:
    listed = body.get("stop_sequences")
    for value in listed if isinstance(listed, list) else ():
        if isinstance(value, str):
            yield value


def _tool_names(body: Mapping[str, Any]) -> Iterator[str]:
    listed = body.get("tools")
    for tool in listed if isinstance(listed, list) else ():
        if isinstance(tool, dict) and isinstance(tool.get("name"), str):
            yield tool["name"]


def _beside(body: Mapping[str, Any]) -> Iterator[Beside]:
    """The texts of the options that the model reads."""
    for name in _OPERATOR:
        if weight := weight_of(body.get(name)):
            yield Beside(name, Channel.SYSTEM, "\n".join(strings_in(body[name])), weight)


def _unseen(body: Mapping[str, Any]) -> Iterator[Coverage]:
    """What no guard sees beside the turns."""
    yield from unseen_in(body, read=_OPTIONS_READ, identities=_IDENTITIES, channel=Channel.SYSTEM)
    metadata = body.get("metadata")
    path, rest = ("metadata", metadata) if isinstance(metadata, dict) else ("", {"metadata": metadata})
    yield from unseen_in(rest, read=("user_id",), identities=rest, path=path, channel=Channel.SYSTEM)


# --- turns --------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Texts:
    """The texts of one turn, as they are found."""

    role: Role
    block: int | None
    tools: frozenset[str] = frozenset()
    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    call_paths: list[str] = field(default_factory=list)
    words: list[tuple[str, str]] = field(default_factory=list)
    unseen: list[Coverage] = field(default_factory=list)

    def hide(self, path: str, value: Any, channel: Channel | None = None) -> None:
        """Count a value that no guard sees, as at least one character."""
        count = max(1, weight_of(value))
        self.unseen.append(Coverage(path, channel or _CHANNELS[self.role], CoverageState.NOT_JUDGED, count))


def _said(body: Mapping[str, Any], messages: list[Any], tools: frozenset[str]) -> Iterator[Said]:
    if body.get("system") is not None:
        yield from _turns(body["system"], "system", "system", Role.SYSTEM, tools)
    for number, message in enumerate(messages):
        path = f"messages[{number}]"
        if not isinstance(message, dict):
            refuse(f"expected an object with role and content, got {kind_of(message)}", "invalid_type", param=path)
        role = _ROLES.get(str(message.get("role")))
        if role is None:
            refuse(f"expected one of {', '.join(_ROLES)}", "invalid_value", param=f"{path}.role")
        rest = {name: value for name, value in message.items() if name not in ("role", "content")}
        yield from _turns(message.get("content"), path, f"{path}.content", role, tools, rest)


def _turns(
    content: Any, place: str, path: str, role: Role, tools: frozenset[str], rest: Mapping[str, Any] | None = None
) -> Iterator[Said]:
    """The turns that a message is: tool results between other content are turns by themselves."""
    found = list(_texts(content, path, role, tools))
    if rest:
        one = _Texts(role, None)
        _walk_fields(one, rest, place)
        found.append(one)
    for said_by, group in groupby(found, key=lambda one: one.role):
        run = list(group)
        at = [one.block for one in run if one.block is not None]
        whole = len(run) == len(found)
        contents = [text for one in run for text in one.content]
        if said_by is Role.TOOL:
            contents = [wholly_unescaped(text) for text in contents]
        yield Said(
            Turn(
                said_by,
                "\n".join(contents),
                "\n".join(text for one in run for text in one.reasoning),
                tuple(call for one in run for call in one.calls),
            ),
            path if whole or not at else _range(path, at),
            f"{path}.thinking",
            tuple(call_path for one in run for call_path in one.call_paths),
            "".join(contents) if len(contents) > 1 else None,
            tuple(part for one in run for part in one.unseen),
            tuple(word for one in run for word in one.words),
        )


def _range(path: str, numbers: list[int]) -> str:
    first, last = numbers[0], numbers[-1]
    return f"{path}[{first}]" if first == last else f"{path}[{first}-{last}]"


def _texts(content: Any, path: str, role: Role, tools: frozenset[str]) -> Iterator[_Texts]:
    if isinstance(content, str):
        yield _Texts(role, None, content=[content])
        return
    if not isinstance(content, list):
        refuse(f"expected a string or an array of blocks, got {kind_of(content)}", "invalid_type", param=path)
    if not content:
        yield _Texts(role, None)
    for number, block in enumerate(content):
        where = f"{path}[{number}]"
        result = isinstance(block, dict) and block.get("type") == "tool_result" and role is not Role.ASSISTANT
        one = _Texts(Role.TOOL if result else role, number, tools)
        _take_block(one, block, where)
        yield one


# --- blocks -------------------------------------------------------------------------------------------------------


def _take_block(one: _Texts, block: Any, path: str) -> None:
    """Read one content block; whatever of it is not read as something is walked through."""
    if not isinstance(block, dict) or not isinstance(block.get("type"), str):
        refuse("expected an object with a type", "invalid_type", param=path)
    rest = dict(block)
    kind = block["type"]
    if kind == "text":
        one.content.append(_string(rest, "text", path))
    elif kind == "thinking":
        (one.reasoning if one.role is Role.ASSISTANT else one.content).append(_string(rest, "thinking", path))
        if isinstance(rest.get("signature"), str) and is_data("signature", rest["signature"]):
            del rest["signature"]  # it says that the thinking is the upstream's own; nobody reads it
    elif kind in CALLS:
        _take_call(one, rest, path)
    elif kind in ("tool_result", "search_result") and "content" in rest:
        _take_content(one, rest.pop("content"), f"{path}.content")
    elif kind in ("image", "document") and isinstance(rest.get("source"), dict):
        _take_source(one, rest.pop("source"), f"{path}.source")
    elif kind == "container_upload":
        one.hide(path, rest)
        return
    if kind == "redacted_thinking" and isinstance(rest.get("data"), str) and is_data("data", rest["data"]):
        one.hide(f"{path}.data", rest.pop("data"), Channel.REASONING)
    _walk_fields(one, rest, path)


def _string(block: dict[str, Any], name: str, path: str) -> str:
    value = block.pop(name, None)
    if not isinstance(value, str):
        refuse(f"expected a string, got {kind_of(value)}", "invalid_type", param=f"{path}.{name}")
    return value


def _take_call(one: _Texts, rest: dict[str, Any], path: str) -> None:
    name, given = rest.pop("name", ""), rest.pop("input", {})
    if not isinstance(name, str):
        refuse(f"expected a string, got {kind_of(name)}", "invalid_type", param=f"{path}.name")
    one.calls.append(ToolCall(name, _json(given)))
    one.call_paths.append(f"{path}.input")
    if name and name not in one.tools and name not in SERVER_TOOLS:
        one.words.append((f"{path}.name", name))


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _take_content(one: _Texts, content: Any, path: str) -> None:
    """What stands in a tool's result or in a document: a string, or blocks, which stay in the same turn."""
    if isinstance(content, str):
        one.content.append(content)
    elif isinstance(content, list):
        for number, block in enumerate(content):
            _take_block(one, block, f"{path}[{number}]")
    elif content is not None:
        refuse(f"expected a string or an array of blocks, got {kind_of(content)}", "invalid_type", param=path)


def _take_source(one: _Texts, source: dict[str, Any], path: str) -> None:
    """Where an image or a document is: its text is judged when it stands there."""
    rest = dict(source)
    match source:
        case {"type": "text", "data": str(text)}:
            one.content.append(text)
            del rest["data"]
        case {"type": "content", "content": content}:
            _take_content(one, content, f"{path}.content")
            del rest["content"]
        case _:
            one.hide(path, {name: value for name, value in source.items() if name != "type"})
            return
    _walk_fields(one, rest, path)


def _walk_fields(one: _Texts, fields: Mapping[str, Any], path: str) -> None:
    for name, value in fields.items():
        if is_name(name):
            _walk(one, name, value, f"{path}.{name}")
        else:
            one.content.append(name)
            _walk(one, name, value, f"{path}.?")


def _walk(one: _Texts, name: str, value: Any, path: str) -> None:
    """Every string of a value is a text, unless it is in a field for programs or for data and looks like it."""
    match value:
        case str() if value and is_data(name, value):
            one.hide(path, value)
        case str() if value and not is_plain(name, value):
            one.content.append(value)
        case list():
            numbers = [inner for inner in value if isinstance(inner, int | float) and not isinstance(inner, bool)]
            if numbers:  # they may be the ids of tokens
                one.hide(path, numbers)
            for number, inner in enumerate(value):
                _walk(one, name, inner, f"{path}[{number}]")
        case dict():
            _walk_fields(one, value, path)
