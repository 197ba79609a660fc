"""The wire and our words: JSON bodies are read and checked here, and decisions are written in OpenAI's shapes.

What a request says is judged as the upstream will read it: a body is parsed once, and what was parsed is what is sent
on, so that a key given twice or a broken character cannot mean one thing here and another there.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Final, NoReturn

from starlette.requests import Request

from tidegate.gateway.statuses import Problem
from tidegate.policy import Policy
from tidegate.types import (
    Channel,
    Conversation,
    Coverage,
    CoverageState,
    Decision,
    Role,
    Span,
    ToolCall,
    Turn,
)

__all__ = [
    "ChatRequest",
    "PromptText",
    "characters_in",
    "decision_field",
    "json_of",
    "mended",
    "read_chat",
    "read_json",
    "undecided_field",
    "worst_decision",
]

MOST_MESSAGES: Final = 2048

_SURROGATE: Final = re.compile("[\ud800-\udfff]")
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


# --- bodies -------------------------------------------------------------------------------------------------------


async def read_json(request: Request, *, longest: int) -> dict[str, Any]:
    """The body of a request as a JSON object.

    Raises:
        Problem: 413 as soon as more than ``longest`` bytes have come; 400 when it is not UTF-8, not JSON or no object.
    """
    data = await _read(request, longest)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        _refuse(f"the body is not UTF-8: byte {error.start} cannot be read", code="invalid_utf8")
    try:
        body = json.loads(text, parse_constant=_no_constant, parse_float=_finite)
        if "\\ud" in text or "\\uD" in text:
            body = json.loads(mended(json.dumps(body, ensure_ascii=False)))
    except json.JSONDecodeError as error:
        _refuse(f"the body is not JSON: line {error.lineno}, column {error.colno}: {error.msg}", code="invalid_json")
    except (ValueError, RecursionError):
        _refuse("the body is not JSON: it is nested too deep, or has a number that JSON does not know", "invalid_json")
    if not isinstance(body, dict):
        _refuse(f"expected a JSON object, got {_kind(body)}")
    return body


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


json_of: Final = json.JSONDecoder(parse_constant=lambda _: None, parse_float=_finite_or_null).decode
"""JSON of an upstream, which can be written again: numbers that JSON does not know are null. Raises ValueError."""


def mended(text: str) -> str:
    """The same text with halves of a surrogate pair joined, and single ones replaced by U+FFFD."""
    if text.isascii() or not _SURROGATE.search(text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _refuse(message: str, code: str | None = None, *, param: str | None = None) -> NoReturn:
    raise Problem(400, message, param=param, code=code)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


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


# --- a chat request -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PromptText:
    """One new text of the prompt: the conversation that ends with it, and where it stands in the request.

    Attributes:
        conversation: its last turn is the text; messages of one role that follow each other are one turn.
        places: each message's part in it: the path, and how many characters.
        paths: every path of the coverage that is judged with it.
    """

    conversation: Conversation
    places: tuple[tuple[str, int], ...]
    paths: frozenset[str]

    def where(self, span: Span | None) -> tuple[str, Span | None]:
        """The path that a span of the text lies in, and the same span there.

        One that lies in several messages stays as it is, and its path names the first and the last of them, as
        ``messages[0]-messages[2].content``.
        """
        begun = 0
        for path, length in self.places:
            if span is not None and begun <= span.start and span.end <= begun + length + 1:
                return path, Span(span.start - begun, min(span.end - begun, length))
            begun += length + 1
        first, last = self.places[0][0], self.places[-1][0]
        return (first if first == last else f"{first.removesuffix('.content')}-{last}"), span


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A chat completion request, as far as the gateway needs to understand it.

    Attributes:
        body: the whole of it, as it is sent on.
        conversation: all turns.
        new: the texts to judge: all turns since the assistant last spoke, and system turns where that is asked for.
        coverage: every text path of the request, given that the new ones are judged.
        model: the model that is asked for.
        stream: whether the answer is to stream.
        choices: how many are asked for, at least 1.
        wants_usage: whether a stream is to end with a usage chunk.
        tools: the names of the tools that the model may call.
        subject: whose content it is, as the client says it in ``safety_identifier`` or ``user``; None when it does not.
    """

    body: dict[str, Any]
    conversation: Conversation
    new: tuple[PromptText, ...]
    coverage: tuple[Coverage, ...]
    model: str
    stream: bool
    choices: int
    wants_usage: bool
    tools: frozenset[str]
    subject: str | None = None


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
        _refuse("'messages' is missing: expected an array of messages", "missing_required_parameter", param="messages")
    if not isinstance(messages, list):
        _refuse(f"expected an array of messages, got {_kind(messages)}", "invalid_type", param="messages")
    if not messages:
        _refuse("expected at least one message, got an empty array", "empty_array", param="messages")
    if len(messages) > MOST_MESSAGES:
        _refuse(f"expected at most {MOST_MESSAGES:,} messages, got {len(messages):,}", "too_many", param="messages")
    model = body.get("model")
    if not isinstance(model, str) or not model:
        _refuse("expected the name of a model, as a string", "missing_required_parameter", param="model")
    choices = body.get("n")
    if choices is not None and (isinstance(choices, bool) or not isinstance(choices, int) or not 1 <= choices <= 128):
        _refuse("expected a whole number from 1 to 128", "invalid_value", param="n")
    stream = body.get("stream")
    if stream is not None and not isinstance(stream, bool):
        _refuse(f"expected true or false, got {_kind(stream)}", "invalid_type", param="stream")
    options = body.get("stream_options")
    if options is not None and not isinstance(options, dict):
        _refuse(f"expected an object, got {_kind(options)}", "invalid_type", param="stream_options")
    read = [_Message.read(message, f"messages[{index}]") for index, message in enumerate(messages)]
    new = _new_turns(read, judge_system=judge_system)
    return ChatRequest(
        body=body,
        conversation=Conversation(tuple(message.turn for message in read)),
        new=tuple(_new_texts(read, new)),
        coverage=(*_coverage(read, new), *_unjudged_options(body)),
        model=model,
        stream=bool(stream),
        choices=choices or 1,
        wants_usage=bool(options and options.get("include_usage")),
        tools=frozenset(_tool_names(body)),
        subject=_subject(body),
    )


def _subject(body: Mapping[str, Any]) -> str | None:
    given = (body.get(name) for name in ("safety_identifier", "user"))
    return next((value for value in given if isinstance(value, str) and value), None)


@dataclass(frozen=True, slots=True)
class _Message:
    """One message: the turn that it is, its text in other joints, and what in it cannot be judged."""

    path: str
    turn: Turn
    glued: str | None
    """The parts of the content without anything between them, when there are several; else None."""
    unjudged: tuple[Coverage, ...]

    @classmethod
    def read(cls, message: Any, path: str) -> _Message:
        if not isinstance(message, dict):
            _refuse(f"expected an object with role and content, got {_kind(message)}", "invalid_type", param=path)
        role = _ROLES.get(str(message.get("role")))
        if role is None:
            _refuse(f"expected one of {', '.join(_ROLES)}", "invalid_value", param=f"{path}.role")
        channel = _CHANNELS.get(role, Channel.ANSWER)
        texts, unjudged = _content(message.get("content"), f"{path}.content", role, channel)
        reasoning = [message[name] for name in ("reasoning_content", "reasoning") if isinstance(message.get(name), str)]
        turn = Turn(role, "\n".join(texts), "\n".join(reasoning), tuple(_tool_calls(message, path)))
        for name, value in message.items():
            if name not in _MESSAGE_FIELDS and (count := characters_in(value)):
                unjudged.append(Coverage(f"{path}.{name}", channel, CoverageState.NOT_JUDGED, count))
        return cls(path, turn, "".join(texts) if len(texts) > 1 else None, tuple(unjudged))

    @property
    def has_text(self) -> bool:
        return bool(self.turn.content or self.turn.reasoning or self.turn.tool_calls)

    @property
    def others(self) -> list[tuple[str, str]]:
        """The texts beside the content, by the ends of their paths."""
        calls = [(f"tool_calls[{number}]", call.arguments) for number, call in enumerate(self.turn.tool_calls)]
        return [("reasoning_content", self.turn.reasoning), *calls]


def _content(value: Any, path: str, role: Role, channel: Channel) -> tuple[list[str], list[Coverage]]:
    """The texts of a message's content, and the parts of it that are not text."""
    if isinstance(value, str):
        return [value], []
    if value is None and role is Role.ASSISTANT:
        return [], []
    if not isinstance(value, list):
        _refuse(f"expected a string or an array of parts, got {_kind(value)}", "invalid_type", param=path)
    texts: list[str] = []
    unjudged: list[Coverage] = []
    for index, part in enumerate(value):
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            _refuse("expected an object with a type", "invalid_type", param=f"{path}[{index}]")
        text = next((part[name] for name in ("text", "refusal") if isinstance(part.get(name), str)), None)
        if text is not None:
            texts.append(text)
        elif part["type"] == "text":
            _refuse("expected a string", "invalid_type", param=f"{path}[{index}].text")
        else:
            unjudged.append(Coverage(f"{path}[{index}]", channel, CoverageState.NOT_JUDGED, _payload(part)))
    return texts, unjudged


def _payload(part: Mapping[str, Any]) -> int:
    """How many characters a part that is not text has, such as its address or its data; at least 1."""
    return max(1, characters_in({name: value for name, value in part.items() if name != "type"}))


def _tool_calls(message: Mapping[str, Any], path: str) -> Iterator[ToolCall]:
    calls = message.get("tool_calls")
    if calls is not None and not isinstance(calls, list):
        _refuse(f"expected an array, got {_kind(calls)}", "invalid_type", param=f"{path}.tool_calls")
    for index, call in enumerate(calls or ()):
        if not isinstance(call, dict):
            _refuse(f"expected an object, got {_kind(call)}", "invalid_type", param=f"{path}.tool_calls[{index}]")
    named = [call.get("function") or call.get("custom") for call in calls or ()]
    for call in (*named, message.get("function_call")):
        if isinstance(call, dict):
            arguments = call.get("arguments", call.get("input", ""))
            if not isinstance(arguments, str):
                arguments = json.dumps(arguments, ensure_ascii=False)
            yield ToolCall(str(call.get("name", "")), arguments)


def _new_turns(messages: Sequence[_Message], *, judge_system: bool) -> set[int]:
    """All turns since the assistant last spoke, and the given beginning of an answer; system turns all or none."""
    new: set[int] = set()
    index = len(messages) - 1
    while index >= 0 and messages[index].turn.role is Role.ASSISTANT:
        new.add(index)
        index -= 1
    while index >= 0 and messages[index].turn.role is not Role.ASSISTANT:
        new.add(index)
        index -= 1
    system = {index for index, message in enumerate(messages) if message.turn.role is Role.SYSTEM}
    return new | system if judge_system else new - system


def _new_texts(messages: Sequence[_Message], new: set[int]) -> Iterator[PromptText]:
    turns = tuple(message.turn for message in messages)
    texts = [index for index in sorted(new) if messages[index].has_text]
    for role, indices in groupby(texts, key=lambda index: messages[index].turn.role):
        group = list(indices)
        said, before = [messages[index] for index in group], turns[: group[0]]
        turn = _joined([message.turn for message in said])
        places = tuple((f"{message.path}.content", len(message.turn.content)) for message in said)
        paths = {path for path, _ in places}
        if role is Role.ASSISTANT:
            paths |= {f"{message.path}.{name}" for message in said for name, _ in message.others}
        yield PromptText(Conversation((*before, turn)), places, frozenset(paths))
        if any(message.glued is not None for message in said):
            glued = [message.turn.content if message.glued is None else message.glued for message in said]
            places = tuple((path, len(text)) for (path, _), text in zip(places, glued, strict=True))
            yield PromptText(Conversation((*before, replace(turn, content="\n".join(glued)))), places, frozenset(paths))
        if role is not Role.ASSISTANT:
            for message in said:
                yield from _other_texts(message, before)


def _joined(turns: Sequence[Turn]) -> Turn:
    """Turns of one role as one: what is asked for in two messages is asked for."""
    if len(turns) == 1:
        return turns[0]
    return Turn(
        turns[0].role,
        "\n".join(turn.content for turn in turns),
        "\n".join(turn.reasoning for turn in turns if turn.reasoning),
        tuple(call for turn in turns for call in turn.tool_calls),
    )


def _other_texts(message: _Message, before: tuple[Turn, ...]) -> Iterator[PromptText]:
    """What stands beside the content. Guards look there in an assistant's turns only; a client can send it in any."""
    for name, text in message.others:
        path = f"{message.path}.{name}"
        if text:
            said = Conversation((*before, Turn(message.turn.role, text)))
            yield PromptText(said, ((path, len(text)),), frozenset((path,)))


def _coverage(messages: Sequence[_Message], new: set[int]) -> Iterator[Coverage]:
    for index, message in enumerate(messages):
        turn, path = message.turn, message.path
        state = CoverageState.JUDGED if index in new else CoverageState.NOT_JUDGED
        yield Coverage(f"{path}.content", _CHANNELS.get(turn.role, Channel.ANSWER), state, len(turn.content))
        if turn.reasoning:
            yield Coverage(f"{path}.reasoning_content", Channel.REASONING, state, len(turn.reasoning))
        for number, call in enumerate(turn.tool_calls):
            yield Coverage(f"{path}.tool_calls[{number}]", Channel.TOOL_CALL, state, len(call.arguments))
        yield from message.unjudged


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
        "message": policy.message_for(decision.rule) if decision.action.word in ("block", "redact") else None,
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
