"""What LiteLLM holds, as the turns of `POST /v1/guard`: plain dictionaries, and nothing of LiteLLM itself.

The same turns are judged as in the gateway: all since the assistant last spoke, and the given beginning of an answer;
system turns only where that is wished. Turns of one role that follow each other are judged as one text. What cannot be
read (images, audio, files, parts that nobody knows) is listed by its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, Final, NamedTuple

__all__ = ["Prompt", "Turn", "answer_turn", "one_turn", "prompt_of", "values_of"]

Turn = dict[str, Any]
"""A turn as ``/v1/guard`` takes it."""

_ROLES: Final[Mapping[str, str]] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
_LONGEST_NAME: Final = 256
_TEXTS: Final = ("text", "input_text", "output_text")


class Prompt(NamedTuple):
    """A request's messages, read.

    Attributes:
        turns: all of them: the context of the answer.
        new: the conversations to be judged, each with its last turn.
        unread: the places of what cannot be read, as ``messages[2].content[1]``.
    """

    turns: list[Turn]
    new: list[list[Turn]]
    unread: list[str]


def prompt_of(messages: Sequence[Any], *, judge_system: bool = False) -> Prompt:
    """Read the messages of a chat, as mappings or as LiteLLM's own objects.

    Args:
        messages: in OpenAI's shape.
        judge_system: whether system turns are judged too.
    """
    unread: list[str] = []
    turns = [_turn(values_of(message), f"messages[{place}]", unread) for place, message in enumerate(messages)]
    new = _new_turns([turn["role"] for turn in turns], judge_system=judge_system)
    return Prompt(turns, list(_conversations(turns, new)), unread)


def answer_turn(message: Any, unread: list[str]) -> Turn:
    """An answer's message as a turn; places of what cannot be read are added to ``unread``."""
    return _turn({"role": "assistant", **values_of(message)}, "message", unread)


def one_turn(role: str, text: str) -> Turn:
    """A turn with nothing but text."""
    return {"role": role, "content": text}


def values_of(value: Any) -> dict[str, Any]:
    """A mapping, or what an object of LiteLLM or pydantic holds, as a dictionary; empty for anything else."""
    if isinstance(value, Mapping):
        return dict(value)
    dump = getattr(value, "model_dump", None)
    return dict(dump()) if callable(dump) else {}


def _turn(message: Mapping[str, Any], where: str, unread: list[str]) -> Turn:
    role = _ROLES.get(str(message.get("role")), "user")
    texts = [_content(message.get("content"), f"{where}.content", unread)]
    if isinstance(message.get("refusal"), str):
        texts.append(message["refusal"])
    unread += [f"{where}.{name}" for name in ("audio", "images") if message.get(name)]
    turn: Turn = {"role": role, "content": "\n".join(text for text in texts if text)}
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    calls = list(_calls(message, where, unread))
    if role == "assistant":
        if isinstance(reasoning, str) and reasoning:
            turn["reasoning"] = reasoning
        if calls:
            turn["tool_calls"] = calls
    else:  # a client can send these in any turn; guards look for them in the assistant's only
        beside = [reasoning] if isinstance(reasoning, str) else []
        beside += [call["arguments"] for call in calls]
        turn["content"] = "\n".join(text for text in (turn["content"], *beside) if text)
    return turn


def _content(content: Any, where: str, unread: list[str]) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, Sequence):
        unread.append(where)
        return ""
    texts = []
    for place, part in enumerate(content):
        fields = values_of(part)
        kind = fields.get("type")
        if isinstance(part, str):
            texts.append(part)
        elif kind in _TEXTS and isinstance(fields.get("text"), str):
            texts.append(fields["text"])
        elif kind == "refusal" and isinstance(fields.get("refusal"), str):
            texts.append(fields["refusal"])
        elif kind == "thinking" and isinstance(fields.get("thinking"), str):
            texts.append(fields["thinking"])
        else:
            unread.append(f"{where}[{place}]")
    return "\n".join(texts)


def _calls(message: Mapping[str, Any], where: str, unread: list[str]) -> Iterator[dict[str, str]]:
    calls = message.get("tool_calls") or []
    old = message.get("function_call")
    for place, call in enumerate([*calls, *([{"function": old}] if old else [])]):
        fields = values_of(call)
        called = values_of(fields.get("function") or fields.get("custom") or {})
        arguments = called.get("arguments", called.get("input"))
        if isinstance(arguments, str) and isinstance(called.get("name") or "", str):
            yield {"name": (called.get("name") or "")[:_LONGEST_NAME], "arguments": arguments}
        else:
            unread.append(f"{where}.tool_calls[{place}]")


def _new_turns(roles: Sequence[str], *, judge_system: bool) -> set[int]:
    new: set[int] = set()
    index = len(roles) - 1
    while index >= 0 and roles[index] == "assistant":
        new.add(index)
        index -= 1
    while index >= 0 and roles[index] != "assistant":
        new.add(index)
        index -= 1
    system = {index for index, role in enumerate(roles) if role == "system"}
    return new | system if judge_system else new - system


def _conversations(turns: Sequence[Turn], new: set[int]) -> Iterator[list[Turn]]:
    with_text = [index for index in sorted(new) if any(turns[index].get(name) for name in _HAS_TEXT)]
    for _, indices in groupby(with_text, key=lambda index: turns[index]["role"]):
        numbers = list(indices)
        yield [*turns[: numbers[0]], _joined([turns[index] for index in numbers])]


_HAS_TEXT: Final = ("content", "reasoning", "tool_calls")


def _joined(turns: Sequence[Turn]) -> Turn:
    """Turns of one role as one: what is asked for in two messages is asked for."""
    if len(turns) == 1:
        return turns[0]
    joined: Turn = {"role": turns[0]["role"], "content": "\n".join(turn["content"] for turn in turns)}
    if reasoning := "\n".join(turn["reasoning"] for turn in turns if turn.get("reasoning")):
        joined["reasoning"] = reasoning
    if calls := [call for turn in turns for call in turn.get("tool_calls", ())]:
        joined["tool_calls"] = calls
    return joined
