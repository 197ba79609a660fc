"""``POST /v1/chat/completions``: how a chat request reads, and how its answers, refusals and errors look.

The life of an exchange is in `tidegate.gateway.exchange`, the judging of answers in `tidegate.gateway.answers`.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, NamedTuple

from tidegate.gateway import sse
from tidegate.gateway.answers import NO_USAGE, AnswerStream, judge_answer
from tidegate.gateway.asked import Asked, Beside, Said, prompt_of
from tidegate.gateway.channels import Judging
from tidegate.gateway.fields import (
    OPENAI_HEADERS,
    count_of,
    flag_of,
    messages_of,
    model_of,
    options_of,
    sentences_in,
    strings_in,
    subject_of,
    unseen_in,
)
from tidegate.gateway.schemas import kind_of, refuse, weight_of
from tidegate.gateway.statuses import Problem
from tidegate.gateway.unescaped import wholly_unescaped
from tidegate.gateway.upstream import KeyHeader
from tidegate.moderate import Retry
from tidegate.settings import Continues
from tidegate.types import Channel, Coverage, CoverageState, Role, ToolCall, Turn

__all__ = ["ChatDoor", "ChatRequest", "read_chat"]


_CHANNELS: Final = {Role.SYSTEM: Channel.SYSTEM, Role.USER: Channel.USER, Role.TOOL: Channel.TOOL_RESULT}
_ROLES: Final = {
    "system": Role.SYSTEM,
    "developer": Role.SYSTEM,
    "user": Role.USER,
    "assistant": Role.ASSISTANT,
    "tool": Role.TOOL,
    "function": Role.TOOL,
}
_MESSAGE_READ: Final = frozenset(("role", "content", "tool_calls", "function_call"))
_MESSAGE_WORDS: Final = ("name", "tool_call_id", "refusal")
_MESSAGE_REASONING: Final = ("reasoning_content", "reasoning")
_MESSAGE_KNOWN: Final = (*_MESSAGE_WORDS, *_MESSAGE_REASONING)
_PART_TEXTS: Final = ("text", "refusal")
_PART_IDENTITIES: Final = frozenset(("type", "cache_control"))
_CALL_IDENTITIES: Final = frozenset(("id", "type", "index"))
_CALL_KINDS: Final = ("function", "custom")
_ARGUMENTS: Final = ("arguments", "input")

_OPTIONS_READ: Final = frozenset(
    ("messages", "tools", "functions", "response_format", "prediction", "web_search_options")
)
_OPERATOR: Final = ("tools", "functions", "response_format")
"""What tells the model about its work: the operator's words, as system turns are."""
_PLAIN: Final = frozenset(("allowed_token_ids", "stop_token_ids"))
_IDENTITIES: Final = frozenset(
    {
        "audio",
        "function_call",
        "metadata",
        "modalities",
        "model",
        "prompt_cache_key",
        "prompt_cache_retention",
        "reasoning_effort",
        "safety_identifier",
        "service_tier",
        "stop",
        "stream_options",
        "tool_choice",
        "user",
        "verbosity",
    }
)
"""Options with words for programs, which the model does not read."""


class ChatDoor:
    """OpenAI's chat completions."""

    route: ClassVar[str] = "/v1/chat/completions"
    path: ClassVar[str] = "/chat/completions"
    key_header: ClassVar[KeyHeader] = "authorization"
    headers: ClassVar[tuple[str, ...]] = OPENAI_HEADERS

    def read(self, body: dict[str, Any], *, judge_system: bool) -> ChatRequest:
        return read_chat(body, judge_system=judge_system)

    def refusal(self, asked: ChatRequest, message: str, field: dict[str, Any]) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": message},
                "finish_reason": "content_filter",
                "tidegate": field,
            }
            for index in range(asked.choices)
        ]
        return {**_head(asked), "object": "chat.completion", "choices": choices, "usage": NO_USAGE, "tidegate": field}

    def refusal_events(self, asked: ChatRequest, message: str, field: dict[str, Any]) -> bytes:
        return b"".join(_refusal_events(_head(asked), asked, message, field))

    def watch(self, asked: ChatRequest, judging: Judging) -> AnswerStream:
        return AnswerStream(judging, choices=asked.choices, wants_usage=asked.wants_usage)

    async def judge(self, asked: ChatRequest, answer: Any, judging: Judging) -> dict[str, Any]:
        judged, _ = await judge_answer(answer, judging, choices=asked.choices)
        return judged

    def again(self, asked: ChatRequest, retry: Retry, continues: Continues) -> dict[str, Any] | None:
        """The turns with the answer's beginning behind them, and the hint where this upstream reads it."""
        messages = asked.body["messages"]
        if asked.choices != 1 or messages[-1].get("role") == "assistant":
            return None
        begun = [{"role": "assistant", "content": retry.prefix}] if retry.prefix else []
        hint = {"role": "system", "content": retry.hint}
        if continues == "no" or not begun:
            return {**asked.body, "messages": [*messages, *begun, hint]}
        body = {**asked.body, "messages": [*_hinted(messages, retry.hint), *begun]}
        if continues == "vllm":
            body |= {"continue_final_message": True, "add_generation_prompt": False}
        return body

    def error(self, problem: Problem) -> dict[str, Any]:
        return problem.body

    def error_event(self, problem: Problem) -> bytes:
        return sse.event(problem.body)


def _hinted(messages: list[Any], hint: str) -> list[Any]:
    """The turns with a hint behind the system's first words: a template may take a system turn there only."""
    first = messages[0]
    if first.get("role") in ("system", "developer") and isinstance(first.get("content"), str):
        return [{**first, "content": f"{first['content']}\n\n{hint}"}, *messages[1:]]
    return [{"role": "system", "content": hint}, *messages]


def _head(asked: ChatRequest) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": asked.model}


def _refusal_events(head: dict[str, Any], asked: ChatRequest, message: str, field: dict[str, Any]) -> Iterator[bytes]:
    def chunk(index: int, delta: dict[str, Any], finish_reason: str | None, **more: Any) -> bytes:
        choice = {"index": index, "delta": delta, "finish_reason": finish_reason}
        return sse.event({**head, "object": "chat.completion.chunk", "choices": [choice], **more})

    for index in range(asked.choices):
        yield chunk(index, {"role": "assistant", "content": ""}, None)
        yield chunk(index, {"content": message}, None)
        yield chunk(index, {}, "content_filter", tidegate=field)
    if asked.wants_usage:
        yield sse.event({**head, "object": "chat.completion.chunk", "choices": [], "usage": NO_USAGE})
    yield sse.DONE


# --- a chat request -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ChatRequest(Asked):
    """A chat completion request.

    Attributes:
        choices: how many are asked for, at least 1.
        wants_usage: whether a stream is to end with a usage chunk.
    """

    choices: int = 1
    wants_usage: bool = False


def read_chat(body: dict[str, Any], *, judge_system: bool = False) -> ChatRequest:
    """Understand a chat completion request; options that are not ours to know are the upstream's business.

    Args:
        body: the request.
        judge_system: whether system and developer turns are judged too, as if a user had written them; and with them
            tools and response_format.

    Raises:
        Problem: 400, with the place of what is wrong.
    """
    messages = messages_of(body)
    model = model_of(body)
    choices = count_of(body, "n")
    stream = flag_of(body, "stream")
    options = options_of(body)
    tools = frozenset(_tool_names(body))
    said = [_message(message, f"messages[{index}]", tools) for index, message in enumerate(messages)]
    prompt = prompt_of(
        said,
        judge_system=judge_system,
        beside=_beside(body),
        unseen=unseen_in(body, read=_OPTIONS_READ, plain=_PLAIN, identities=_IDENTITIES, channel=Channel.SYSTEM),
    )
    return ChatRequest(
        body=body,
        **prompt._asdict(),
        model=model,
        stream=stream,
        tools=tools,
        subject=subject_of(body),
        choices=choices,
        wants_usage=bool(options.get("include_usage")),
    )


def _beside(body: Mapping[str, Any]) -> Iterator[Beside]:
    """The texts of the options that the model reads."""
    for name in _OPERATOR:
        value = body.get(name)
        if any(strings_in(value)) or (name != "response_format" and weight_of(value)):
            yield Beside(name, Channel.SYSTEM, "\n".join(strings_in(value)), weight_of(value))
    for name in ("prediction", "web_search_options"):
        text = "\n".join(_unlike_words(body.get(name)))
        if text:
            yield Beside(name, Channel.USER, text, len(text))


def _unlike_words(value: Any) -> Iterator[str]:
    """The texts of an option whose fields we know by name: kinds and sizes are words for programs."""
    if isinstance(value, dict):
        value = {name: inner for name, inner in value.items() if name != "search_context_size" or sentences_in(inner)}
    yield from strings_in(value)


def _message(message: Any, path: str, tools: frozenset[str]) -> Said:
    """One message: the turn that it is, its text in other joints, and what in it cannot be judged."""
    if not isinstance(message, dict):
        refuse(f"expected an object with role and content, got {kind_of(message)}", "invalid_type", param=path)
    role = _ROLES.get(str(message.get("role")))
    if role is None:
        refuse(f"expected one of {', '.join(_ROLES)}", "invalid_value", param=f"{path}.role")
    channel = _CHANNELS.get(role, Channel.ANSWER)
    texts, unseen = _content(message.get("content"), f"{path}.content", role, channel)
    if role is Role.TOOL:
        texts = [wholly_unescaped(text) for text in texts]
    reasoning = {name: message[name] for name in _MESSAGE_REASONING if isinstance(message.get(name), str)}
    words = {name: message[name] for name in _MESSAGE_WORDS if isinstance(message.get(name), str)}
    calls = list(_calls(message, path, channel))
    unseen += unseen_in(
        message,
        read={*_MESSAGE_READ, *reasoning, *words},
        identities=("audio",),
        path=path,
        channel=channel,
        reserved=_MESSAGE_KNOWN,
    )
    unseen += (part for call in calls for part in call.unseen)
    return Said(
        Turn(role, "\n".join(texts), "\n".join(reasoning.values()), tuple(call.call for call in calls)),
        f"{path}.content",
        f"{path}.reasoning_content",
        tuple(call.path for call in calls),
        "".join(texts) if len(texts) > 1 else None,
        tuple(unseen),
        (
            *((f"{path}.{name}", text) for name, text in words.items() if _reads(name, text, tools)),
            *((f"{call.path}.name", call.call.name) for call in calls if _reads("name", call.call.name, tools)),
        ),
    )


def _reads(name: str, text: str, tools: frozenset[str]) -> bool:
    """Whether a short text beside a message is one to judge: not an identity, and no tool that is offered anyway."""
    return bool(text) and (sentences_in(text) > 0 if name == "tool_call_id" else text not in tools)


def _content(value: Any, path: str, role: Role, channel: Channel) -> tuple[list[str], list[Coverage]]:
    """The texts of a message's content, and what of it is not text."""
    if isinstance(value, str):
        return [value], []
    if value is None and role is Role.ASSISTANT:
        return [], []
    if not isinstance(value, list):
        refuse(f"expected a string or an array of parts, got {kind_of(value)}", "invalid_type", param=path)
    texts: list[str] = []
    unseen: list[Coverage] = []
    for index, part in enumerate(value):
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            refuse("expected an object with a type", "invalid_type", param=f"{path}[{index}]")
        name = next((name for name in _PART_TEXTS if isinstance(part.get(name), str)), None)
        if name is not None:
            texts.append(part[name])
            place = f"{path}[{index}]"
            unseen += unseen_in(
                part, read=(name,), identities=_PART_IDENTITIES, path=place, channel=channel, reserved=_PART_TEXTS
            )
        elif part["type"] == "text":
            refuse("expected a string", "invalid_type", param=f"{path}[{index}].text")
        else:
            unseen.append(Coverage(f"{path}[{index}]", channel, CoverageState.NOT_JUDGED, _payload(part)))
    return texts, unseen


def _payload(part: Mapping[str, Any]) -> int:
    """How many characters a part that is not text has, such as its address or its data; at least 1."""
    rest = {name: value for name, value in part.items() if name != "type"}
    return max(1, weight_of(rest) + sentences_in(part["type"]))


class _Call(NamedTuple):
    """A call of a tool, where it stands, and what in it no guard sees."""

    call: ToolCall
    path: str
    unseen: tuple[Coverage, ...]


def _calls(message: Mapping[str, Any], path: str, channel: Channel) -> Iterator[_Call]:
    calls = message.get("tool_calls")
    if calls is not None and not isinstance(calls, list):
        refuse(f"expected an array, got {kind_of(calls)}", "invalid_type", param=f"{path}.tool_calls")
    for index, call in enumerate(calls or ()):
        place = f"{path}.tool_calls[{index}]"
        if not isinstance(call, dict):
            refuse(f"expected an object, got {kind_of(call)}", "invalid_type", param=place)
        kind = next((name for name in _CALL_KINDS if isinstance(call.get(name), dict)), None)
        rest = tuple(
            unseen_in(
                call,
                read=(kind,) if kind else (),
                identities=_CALL_IDENTITIES,
                path=place,
                channel=channel,
                reserved=_CALL_KINDS,
            )
        )
        yield _call(call[kind] if kind else {}, place, channel, rest)
    function = message.get("function_call")
    if isinstance(function, dict):
        yield _call(function, f"{path}.function_call", channel, ())
    elif function is not None:
        refuse(f"expected an object, got {kind_of(function)}", "invalid_type", param=f"{path}.function_call")


def _call(function: Mapping[str, Any], path: str, channel: Channel, rest: tuple[Coverage, ...]) -> _Call:
    given = next((name for name in _ARGUMENTS if name in function), None)
    arguments = function.get(given, "") if given else ""
    arguments = wholly_unescaped(arguments) if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    named = function.get("name")
    read = {given, "name"} if isinstance(named, str) else {given}
    unseen = unseen_in(
        function, read=[one for one in read if one], path=path, channel=channel, reserved=("name", *_ARGUMENTS)
    )
    return _Call(ToolCall(named if isinstance(named, str) else "", arguments), path, (*rest, *unseen))


def _tool_names(body: Mapping[str, Any]) -> Iterator[str]:
    for name, inner in (("tools", "function"), ("tools", "custom"), ("functions", None)):
        listed = body.get(name)
        for tool in listed if isinstance(listed, list) else ():
            named = tool.get(inner) if inner is not None and isinstance(tool, dict) else tool
            if isinstance(named, dict) and isinstance(named.get("name"), str):
                yield named["name"]
