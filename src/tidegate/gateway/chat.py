"""``POST /v1/chat/completions``: how a chat request reads, and how its answers, refusals and errors look.

The life of an exchange is in `tidegate.gateway.exchange`, the judging of answers in `tidegate.gateway.answers`.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from tidegate.gateway import sse
from tidegate.gateway.answers import NO_USAGE, AnswerStream, judge_answer
from tidegate.gateway.asked import Asked, Said, prompt_of
from tidegate.gateway.channels import Judging
from tidegate.gateway.schemas import characters_in, kind_of, refuse
from tidegate.gateway.statuses import Problem
from tidegate.gateway.upstream import KeyHeader
from tidegate.types import Channel, Coverage, CoverageState, Role, ToolCall, Turn

__all__ = ["OPENAI_HEADERS", "ChatDoor", "ChatRequest", "read_chat"]


OPENAI_HEADERS: Final = ("authorization", "openai-organization", "openai-project")
"""A client's headers that an upstream with OpenAI's API understands."""

MOST_MESSAGES: Final = 2048

_CHANNELS: Final = {Role.SYSTEM: Channel.SYSTEM, Role.USER: Channel.USER, Role.TOOL: Channel.TOOL_RESULT}
_ROLES: Final = {
    "system": Role.SYSTEM,
    "developer": Role.SYSTEM,
    "user": Role.USER,
    "assistant": Role.ASSISTANT,
    "tool": Role.TOOL,
    "function": Role.TOOL,
}
_MESSAGE_FIELDS: Final = frozenset(
    ("role", "content", "tool_calls", "tool_call_id", "function_call", "reasoning_content", "reasoning")
)
_PLAIN_OPTIONS: Final = frozenset(
    {
        "function_call",
        "messages",
        "metadata",
        "modalities",
        "model",
        "prompt_cache_key",
        "prompt_cache_retention",
        "reasoning_effort",
        "safety_identifier",
        "service_tier",
        "stop",
        "tool_choice",
        "user",
        "verbosity",
    }
)
"""Options whose words never reach the model as text; the text in any other one is counted as not judged."""


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

    def error(self, problem: Problem) -> dict[str, Any]:
        return problem.body

    def error_event(self, problem: Problem) -> bytes:
        return sse.event(problem.body)


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
        judge_system: whether system and developer turns are judged too, as if a user had written them.

    Raises:
        Problem: 400, with the place of what is wrong.
    """
    messages = body.get("messages")
    if "messages" not in body:
        refuse("'messages' is missing: expected an array of messages", "missing_required_parameter", param="messages")
    if not isinstance(messages, list):
        refuse(f"expected an array of messages, got {kind_of(messages)}", "invalid_type", param="messages")
    if not messages:
        refuse("expected at least one message, got an empty array", "empty_array", param="messages")
    if len(messages) > MOST_MESSAGES:
        refuse(f"expected at most {MOST_MESSAGES:,} messages, got {len(messages):,}", "too_many", param="messages")
    model = body.get("model")
    if not isinstance(model, str) or not model:
        refuse("expected the name of a model, as a string", "missing_required_parameter", param="model")
    choices = body.get("n")
    if choices is not None and (isinstance(choices, bool) or not isinstance(choices, int) or not 1 <= choices <= 128):
        refuse("expected a whole number from 1 to 128", "invalid_value", param="n")
    stream = body.get("stream")
    if stream is not None and not isinstance(stream, bool):
        refuse(f"expected true or false, got {kind_of(stream)}", "invalid_type", param="stream")
    options = body.get("stream_options")
    if options is not None and not isinstance(options, dict):
        refuse(f"expected an object, got {kind_of(options)}", "invalid_type", param="stream_options")
    said = [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]
    prompt = prompt_of(said, judge_system=judge_system, beside=_unjudged_options(body))
    return ChatRequest(
        body=body,
        **prompt._asdict(),
        model=model,
        stream=bool(stream),
        tools=frozenset(_tool_names(body)),
        subject=_subject(body),
        choices=choices or 1,
        wants_usage=bool(options and options.get("include_usage")),
    )


def _subject(body: Mapping[str, Any]) -> str | None:
    given = (body.get(name) for name in ("safety_identifier", "user"))
    return next((value for value in given if isinstance(value, str) and value), None)


def _message(message: Any, path: str) -> Said:
    """One message: the turn that it is, its text in other joints, and what in it cannot be judged."""
    if not isinstance(message, dict):
        refuse(f"expected an object with role and content, got {kind_of(message)}", "invalid_type", param=path)
    role = _ROLES.get(str(message.get("role")))
    if role is None:
        refuse(f"expected one of {', '.join(_ROLES)}", "invalid_value", param=f"{path}.role")
    channel = _CHANNELS.get(role, Channel.ANSWER)
    texts, unseen = _content(message.get("content"), f"{path}.content", role, channel)
    reasoning = [message[name] for name in ("reasoning_content", "reasoning") if isinstance(message.get(name), str)]
    calls = tuple(_tool_calls(message, path))
    for name, value in message.items():
        if name not in _MESSAGE_FIELDS and (count := characters_in(value)):
            unseen.append(Coverage(f"{path}.{name}", channel, CoverageState.NOT_JUDGED, count))
    return Said(
        Turn(role, "\n".join(texts), "\n".join(reasoning), calls),
        f"{path}.content",
        f"{path}.reasoning_content",
        tuple(f"{path}.tool_calls[{number}]" for number in range(len(calls))),
        "".join(texts) if len(texts) > 1 else None,
        tuple(unseen),
    )


def _content(value: Any, path: str, role: Role, channel: Channel) -> tuple[list[str], list[Coverage]]:
    """The texts of a message's content, and the parts of it that are not text."""
    if isinstance(value, str):
        return [value], []
    if value is None and role is Role.ASSISTANT:
        return [], []
    if not isinstance(value, list):
        refuse(f"expected a string or an array of parts, got {kind_of(value)}", "invalid_type", param=path)
    texts: list[str] = []
    unjudged: list[Coverage] = []
    for index, part in enumerate(value):
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            refuse("expected an object with a type", "invalid_type", param=f"{path}[{index}]")
        text = next((part[name] for name in ("text", "refusal") if isinstance(part.get(name), str)), None)
        if text is not None:
            texts.append(text)
        elif part["type"] == "text":
            refuse("expected a string", "invalid_type", param=f"{path}[{index}].text")
        else:
            unjudged.append(Coverage(f"{path}[{index}]", channel, CoverageState.NOT_JUDGED, _payload(part)))
    return texts, unjudged


def _payload(part: Mapping[str, Any]) -> int:
    """How many characters a part that is not text has, such as its address or its data; at least 1."""
    return max(1, characters_in({name: value for name, value in part.items() if name != "type"}))


def _tool_calls(message: Mapping[str, Any], path: str) -> Iterator[ToolCall]:
    calls = message.get("tool_calls")
    if calls is not None and not isinstance(calls, list):
        refuse(f"expected an array, got {kind_of(calls)}", "invalid_type", param=f"{path}.tool_calls")
    for index, call in enumerate(calls or ()):
        if not isinstance(call, dict):
            refuse(f"expected an object, got {kind_of(call)}", "invalid_type", param=f"{path}.tool_calls[{index}]")
    named = [call.get("function") or call.get("custom") for call in calls or ()]
    for call in (*named, message.get("function_call")):
        if isinstance(call, dict):
            arguments = call.get("arguments", call.get("input", ""))
            if not isinstance(arguments, str):
                arguments = json.dumps(arguments, ensure_ascii=False)
            yield ToolCall(str(call.get("name", "")), arguments)


def _unjudged_options(body: Mapping[str, Any]) -> Iterator[Coverage]:
    for name, value in body.items():
        if name not in _PLAIN_OPTIONS and (count := characters_in(value)):
            yield Coverage(name, Channel.SYSTEM, CoverageState.NOT_JUDGED, count)


def _tool_names(body: Mapping[str, Any]) -> Iterator[str]:
    for name, inner in (("tools", "function"), ("tools", "custom"), ("functions", None)):
        listed = body.get(name)
        for tool in listed if isinstance(listed, list) else ():
            named = tool.get(inner) if inner is not None and isinstance(tool, dict) else tool
            if isinstance(named, dict) and isinstance(named.get("name"), str):
                yield named["name"]
