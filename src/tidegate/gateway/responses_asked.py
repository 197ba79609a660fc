"""How a request of the Responses API reads: which of its texts are judged, and what nobody can judge.

Every field that a client can send with text is judged, refused, or counted as not judged. The upstream may add history
that the gateway never sees (``previous_response_id``, ``conversation``, references to items, stored prompts): that is
counted too, and a policy can refuse it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Final

from tidegate.gateway.asked import Asked, Beside, Said, prompt_of
from tidegate.gateway.fields import (
    flag_of,
    model_of,
    options_of,
    sentences_in,
    strings_in,
    subject_of,
    unseen_in,
)
from tidegate.gateway.schemas import is_name, kind_of, refuse, weight_of
from tidegate.gateway.unescaped import wholly_unescaped
from tidegate.types import Channel, Coverage, CoverageState, Role, ToolCall, Turn

__all__ = ["read_responses"]

MOST_ITEMS: Final = 2048

_ROLES: Final = {
    "system": Role.SYSTEM,
    "developer": Role.SYSTEM,
    "user": Role.USER,
    "assistant": Role.ASSISTANT,
}
_CHANNELS: Final = {Role.SYSTEM: Channel.SYSTEM, Role.USER: Channel.USER, Role.TOOL: Channel.TOOL_RESULT}
_TEXT_PARTS: Final = frozenset({"input_text", "output_text", "reasoning_text", "refusal", "summary_text", "text"})
_MESSAGE_FIELDS: Final = frozenset({"content", "role"})
_REASONING_FIELDS: Final = frozenset({"content", "summary"})
_FOR_PROGRAMS: Final = frozenset(
    {
        "approval_request_id",
        "async",
        "call_id",
        "caller_id",
        "container_id",
        "file_id",
        "fingerprint",
        "id",
        "name",
        "namespace",
        "object",
        "phase",
        "role",
        "server_label",
        "status",
        "type",
    }
)
"""Fields that hold a word for programs, and are read as text when they hold anything else."""
_CALLS: Final = frozenset(
    {
        "apply_patch_call",
        "code_interpreter_call",
        "computer_call",
        "custom_tool_call",
        "file_search_call",
        "function_call",
        "image_generation_call",
        "local_shell_call",
        "mcp_approval_request",
        "mcp_call",
        "mcp_list_tools",
        "program",
        "shell_call",
        "tool_search_call",
        "web_search_call",
    }
)
"""Items that an assistant wrote; what a tool answered stands in some of them too."""
_NAMES: Final = ("name", "namespace", "server_label")
_ANSWERED: Final = frozenset({"error", "output", "outputs", "results", "tools"})
_SEEN_BY_NOBODY: Final = frozenset({"encrypted_content", "file_data", "image_url", "input_audio", "result"})
_DATA: Final = "data:"

_READ: Final = frozenset(
    {"background", "conversation", "input", "instructions", "model", "previous_response_id", "prompt", "stream"}
)
_HISTORY: Final = ("conversation", "previous_response_id")
"""What the upstream puts before the input, and the gateway never sees."""
_OPERATOR: Final = ("text", "tools")
"""What tells the model about its work: the operator's words, as instructions are."""
_IDENTITIES: Final = frozenset(
    {
        "access_programs",
        "background_options",
        "context_management",
        "image",
        "include",
        "metadata",
        "moderation",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "reasoning",
        "safety_identifier",
        "service_tier",
        "stream_options",
        "tool_choice",
        "truncation",
        "user",
    }
)
"""Options with words for programs, which the model does not read."""


def read_responses(body: dict[str, Any], *, judge_system: bool = False) -> Asked:
    """Understand a request for a response; options that are not ours to know are the upstream's business.

    Args:
        body: the request.
        judge_system: whether instructions, and system and developer turns are judged too, as if a user had written
            them; and with them tools and the format of the text.

    Raises:
        Problem: 400, with the place of what is wrong.
    """
    model = "" if body.get("model") is None and body.get("prompt") else model_of(body)
    stream = flag_of(body, "stream")
    options_of(body)
    if flag_of(body, "background"):
        message = "a response in the background cannot be guarded: it would be fetched later, past the guard"
        refuse(message, "not_guarded", param="background")
    tools = frozenset(_tool_names(body.get("tools")))
    said = [*_instructions(body.get("instructions")), *_input(body.get("input"), tools)]
    variables, unseen = _variables(body.get("prompt"))
    last = len(said)
    while last and said[last - 1].turn.role is Role.ASSISTANT:
        last -= 1
    said[last:last] = variables
    if not said:
        said = [Said(Turn(Role.USER, ""), "input")]
    options = unseen_in(body, read={*_READ, *_OPERATOR}, identities=_IDENTITIES, channel=Channel.SYSTEM)
    prompt = prompt_of(
        said, judge_system=judge_system, beside=_beside(body), unseen=(*unseen, *_history(body), *options)
    )
    return Asked(body=body, **prompt._asdict(), model=model, stream=stream, tools=tools, subject=subject_of(body))


def _tool_names(tools: Any) -> Iterator[str]:
    """What tools, their servers and their namespaces are called."""
    for tool in tools if isinstance(tools, list) else ():
        if isinstance(tool, dict):
            yield from (tool[name] for name in ("name", "server_label") if isinstance(tool.get(name), str))
            yield from _tool_names(tool.get("tools"))


def _history(body: Mapping[str, Any]) -> Iterator[Coverage]:
    for name in _HISTORY:
        if body.get(name):
            yield _unseen(name, Channel.SYSTEM, max(1, weight_of(body[name])))


def _beside(body: Mapping[str, Any]) -> Iterator[Beside]:
    for name in _OPERATOR:
        value = body.get(name)
        if name == "text" and isinstance(value, dict) and not sentences_in(value.get("verbosity")):
            value = {key: inner for key, inner in value.items() if key != "verbosity"}
        if any(strings_in(value)) or (name == "tools" and weight_of(value)):
            yield Beside(name, Channel.SYSTEM, "\n".join(strings_in(value)), weight_of(value))


def _unseen(path: str, channel: Channel, characters: int) -> Coverage:
    return Coverage(path, channel, CoverageState.NOT_JUDGED, characters)


# --- turns --------------------------------------------------------------------------------------------------------


def _instructions(value: Any) -> Iterator[Said]:
    if value is None:
        return
    if not isinstance(value, str):
        refuse(f"expected a string, got {kind_of(value)}", "invalid_type", param="instructions")
    yield Said(Turn(Role.SYSTEM, value), "instructions")


def _input(value: Any, tools: frozenset[str]) -> Iterator[Said]:
    if value is None:
        return
    if isinstance(value, str):
        yield Said(Turn(Role.USER, value), "input")
        return
    if not isinstance(value, list):
        refuse(f"expected a string or an array of items, got {kind_of(value)}", "invalid_type", param="input")
    if len(value) > MOST_ITEMS:
        refuse(f"expected at most {MOST_ITEMS:,} items, got {len(value):,}", "too_many", param="input")
    for index, item in enumerate(value):
        yield from _item(item, f"input[{index}]", tools)


def _variables(prompt: Any) -> tuple[list[Said], list[Coverage]]:
    """What the client fills into a stored prompt, as if a user had said it; the prompt itself is never seen."""
    if prompt is None:
        return [], []
    if not isinstance(prompt, dict):
        refuse(f"expected an object, got {kind_of(prompt)}", "invalid_type", param="prompt")
    variables = prompt.get("variables")
    if not isinstance(variables, dict | None):
        refuse(f"expected an object, got {kind_of(variables)}", "invalid_type", param="prompt.variables")
    rest = {name: value for name, value in prompt.items() if name != "variables"}
    unseen = [_unseen("prompt", Channel.SYSTEM, max(1, weight_of(rest)))]
    said = []
    for name, value in (variables or {}).items():
        path = f"prompt.variables.{name if is_name(name) else '?'}"
        said.append(_field(Role.USER, value if is_name(name) else [name, value], path))
    return said, unseen


def _item(item: Any, path: str, tools: frozenset[str]) -> Iterator[Said]:
    if not isinstance(item, dict):
        refuse(f"expected an object, got {kind_of(item)}", "invalid_type", param=path)
    kind = item.get("type", "message" if "role" in item else "item_reference")
    if not isinstance(kind, str | None):
        refuse(f"expected a string, got {kind_of(kind)}", "invalid_type", param=f"{path}.type")
    if kind == "message" or (kind is None and "role" in item):
        yield _message(item, path)
    elif kind == "reasoning":
        yield _reasoning(item, path)
    elif kind in ("item_reference", None):
        count = max(1, weight_of({name: value for name, value in item.items() if name != "type"}))
        yield Said(Turn(Role.USER, ""), path, unseen=(_unseen(f"{path}.id", Channel.USER, count),))
    elif kind == "additional_tools":
        rest = {name: value for name, value in item.items() if name not in _FOR_PROGRAMS or sentences_in(value)}
        yield Said(Turn(Role.SYSTEM, "\n".join(strings_in(rest))), f"{path}.tools")
    elif kind in _CALLS:
        yield from _call(kind, item, path, tools)
    else:
        role = Role.TOOL if kind.endswith("_output") else Role.USER
        for name, value in item.items():
            yield from _said_in(role, name, value, path)


def _message(item: Mapping[str, Any], path: str) -> Said:
    role = _ROLES.get(str(item.get("role")))
    if role is None:
        refuse(f"expected one of {', '.join(_ROLES)}", "invalid_value", param=f"{path}.role")
    content = item.get("content")
    if not isinstance(content, str | list):
        refuse(
            f"expected a string or an array of parts, got {kind_of(content)}", "invalid_type", param=f"{path}.content"
        )
    said = _parts(role, content, f"{path}.content")
    return _with(said, item, _MESSAGE_FIELDS, path, _CHANNELS.get(role, Channel.ANSWER))


def _parts(role: Role, content: str | list[Any], path: str) -> Said:
    """A turn whose content is a string or parts; what is no text is counted."""
    channel = _CHANNELS.get(role, Channel.ANSWER)
    if isinstance(content, str):
        return Said(Turn(role, content), path)
    texts: list[str] = []
    unseen: list[Coverage] = []
    for index, part in enumerate(content):
        where = f"{path}[{index}]"
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            refuse("expected an object with a type", "invalid_type", param=where)
        name = next((name for name in ("text", "refusal") if isinstance(part.get(name), str)), None)
        if name is None and part["type"] in _TEXT_PARTS:
            refuse("expected a string", "invalid_type", param=f"{where}.text")
        if name is not None:
            texts.append(part[name])
        if name is not None:
            unseen += unseen_in(
                part, read=(name,), identities=("type",), path=where, channel=channel, reserved=("refusal", "text")
            )
        else:
            rest = {key: value for key, value in part.items() if key != "type"}
            unseen.append(_unseen(where, channel, max(1, weight_of(rest) + sentences_in(part["type"]))))
    glued = "".join(texts) if len(texts) > 1 else None
    return Said(Turn(role, "\n".join(texts)), path, glued=glued, unseen=tuple(unseen))


def _with(said: Said, item: Mapping[str, Any], read: frozenset[str], path: str, channel: Channel) -> Said:
    """The same, with what stands in the other fields of its item counted."""
    rest = unseen_in(item, read=read, identities=_FOR_PROGRAMS, path=path, channel=channel)
    return replace(said, unseen=(*said.unseen, *rest))


def _reasoning(item: Mapping[str, Any], path: str) -> Said:
    texts: list[str] = []
    unseen: list[Coverage] = []
    for name in ("summary", "content"):
        value = item.get(name)
        if not isinstance(value, list | None):
            refuse(f"expected an array of parts, got {kind_of(value)}", "invalid_type", param=f"{path}.{name}")
        if value:
            parts = _parts(Role.ASSISTANT, value, f"{path}.{name}")
            texts.append(parts.turn.content)
            unseen += parts.unseen
    turn = Turn(Role.ASSISTANT, "", "\n".join(texts))
    said = Said(turn, path, f"{path}.summary", unseen=tuple(unseen))
    return _with(said, item, _REASONING_FIELDS, path, Channel.REASONING)


def _call(kind: str, item: Mapping[str, Any], path: str, tools: frozenset[str]) -> Iterator[Said]:
    """What an assistant called, then what the tool answered where that stands in the same item."""
    name = item.get("name")
    words = [
        (f"{path}.{one}", item[one]) for one in _NAMES if isinstance(item.get(one), str) and item[one] not in tools
    ]
    calls: list[tuple[str, str]] = []
    unseen: list[Coverage] = []
    answered: list[Said] = []
    for field, value in item.items():
        if field in _ANSWERED:
            answered += _said_in(Role.TOOL, field, value, path)
        elif field not in _NAMES or not isinstance(value, str):
            for said in _said_in(Role.ASSISTANT, field, value, path):
                unseen += said.unseen
                if said.turn.content:
                    calls.append((said.path, wholly_unescaped(said.turn.content)))
    called = name if isinstance(name, str) else kind
    turn = Turn(Role.ASSISTANT, tool_calls=tuple(ToolCall(called, text) for _, text in calls))
    paths = tuple(where for where, _ in calls)
    yield Said(turn, path, call_paths=paths, unseen=tuple(unseen), words=tuple(words))
    yield from answered


def _said_in(role: Role, name: str, value: Any, path: str) -> Iterator[Said]:
    """What one field of an item says, when it says anything."""
    if is_name(name) and name in _FOR_PROGRAMS and not sentences_in(value):
        return
    if name in _SEEN_BY_NOBODY:
        count = weight_of(value)
        said = Said(Turn(role), f"{path}.{name}", unseen=_uncovered(role, f"{path}.{name}", count))
    elif is_name(name):
        said = _field(role, value, f"{path}.{name}")
    else:
        said = _field(role, [name, value], f"{path}.?")
    if said.turn.content or said.unseen:
        yield said


def _field(role: Role, value: Any, path: str) -> Said:
    """A value of any shape as a turn: its texts, and how much of it nobody can see."""
    texts: list[str] = []
    count = _gather(value, texts)
    if role is Role.TOOL:
        texts = [wholly_unescaped(text) for text in texts]
    glued = "".join(texts) if len(texts) > 1 else None
    return Said(Turn(role, "\n".join(texts)), path, glued=glued, unseen=_uncovered(role, path, count))


def _uncovered(role: Role, path: str, characters: int) -> tuple[Coverage, ...]:
    return (_unseen(path, _CHANNELS.get(role, Channel.ANSWER), characters),) if characters else ()


def _gather(value: Any, texts: list[str]) -> int:
    """Collect the texts of a value; how much of it is images, files and the like, in characters.

    A number in an array counts as one: it may be a token.
    """
    if isinstance(value, str):
        if value[: len(_DATA)].lower() == _DATA:
            return len(value)
        if value:
            texts.append(value)
        return 0
    if isinstance(value, list):
        numbers = sum(isinstance(one, int | float) and not isinstance(one, bool) for one in value)
        return numbers + sum(_gather(one, texts) for one in value)
    if not isinstance(value, dict):
        return 0
    count = 0
    for name, inner in value.items():
        if not is_name(name):
            texts.append(name)
        if name in _SEEN_BY_NOBODY:
            count += weight_of(inner)
        elif name not in _FOR_PROGRAMS or sentences_in(inner):
            count += _gather(inner, texts)
    return count
