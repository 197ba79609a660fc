"""Examples on disk: one JSON object a line, plain or gzipped, read strictly.

A row is ``{"id", "messages": [{"role", "content"}, ...], "label", "categories", "refusal", "language", "source",
"licence", "split", "target", "extra"}``. Only ``messages`` is required; ``target`` defaults to what the last message
is. A line that cannot be read raises an InputError that names file and line, and what was expected there.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast

from tidegate.errors import InputError
from tidegate.types import Conversation, Example, Role, Severity, Target, ToolCall, Turn

__all__ = ["example_from_row", "example_to_row", "parse_conversation", "read_examples", "write_examples"]

_ROLE_WORDS = {"developer": Role.SYSTEM, "function": Role.TOOL, **{role.value: role for role in Role}}


def read_examples(path: Path) -> Iterator[Example]:
    """Read examples one by one from a ``.jsonl`` or ``.jsonl.gz`` file; empty lines are skipped.

    Raises:
        InputError: when the file cannot be opened or a line is not a row; names the file and the line.
    """
    try:
        with _open_text(path) as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _parse_line(line, path, number)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise InputError(f"cannot be read as UTF-8 JSON lines: {error}", where=str(path)) from error


def write_examples(path: Path, examples: Iterable[Example]) -> int:
    """Write examples, gzipped when the name ends in ``.gz``; return how many. The folder must exist."""
    count = 0
    with _create_text(path) as file:
        for example in examples:
            file.write(_line(example_to_row(example)) + "\n")
            count += 1
    return count


def example_from_row(row: Mapping[str, Any], *, where: str = "row") -> Example:
    """Make an Example of a parsed row.

    Raises:
        InputError: says what is wrong and where in the row.
    """
    conversation = parse_conversation(row.get("messages"), where=f"{where}.messages")
    target = _parse_target(row.get("target"), conversation, where)
    label = row.get("label")
    try:
        severity = None if label is None else Severity.parse(str(label))
    except ValueError as error:
        raise InputError(str(error), where=f"{where}.label") from error
    categories = row.get("categories") or []
    if not isinstance(categories, list) or not all(isinstance(name, str) for name in categories):
        raise InputError("expected a list of category names", where=f"{where}.categories")
    refusal = row.get("refusal")
    if refusal is not None and not isinstance(refusal, bool):
        raise InputError("expected true, false or null", where=f"{where}.refusal")
    extra = row.get("extra") or {}
    if not isinstance(extra, dict):
        raise InputError("expected an object", where=f"{where}.extra")
    return Example(
        id="" if row.get("id") is None else str(row["id"]),
        conversation=conversation,
        target=target,
        severity=severity,
        categories=tuple(categories),
        refusal=refusal,
        language=str(row.get("language") or ""),
        source=str(row.get("source") or ""),
        licence=str(row.get("licence") or ""),
        split=str(row.get("split") or ""),
        extra=extra,
    )


def example_to_row(example: Example) -> dict[str, Any]:
    """The row that ``example_from_row`` reads back as the same Example."""
    return {
        "id": example.id,
        "messages": [_message(turn) for turn in example.conversation.turns],
        "target": example.target.value,
        "label": None if example.severity is None else example.severity.label,
        "categories": list(example.categories),
        "refusal": example.refusal,
        "language": example.language,
        "source": example.source,
        "licence": example.licence,
        "split": example.split,
        "extra": dict(example.extra),
    }


def parse_conversation(messages: object, *, where: str = "messages") -> Conversation:
    """Make a Conversation of a list of ``{"role", "content"}`` messages.

    ``content`` may be null beside ``tool_calls``; ``reasoning_content`` is kept as reasoning.

    Raises:
        InputError: says what is wrong and where.
    """
    if not isinstance(messages, list) or not messages:
        raise InputError("expected a non-empty list of messages", where=where)
    return Conversation(tuple(_parse_turn(message, f"{where}[{i}]") for i, message in enumerate(messages)))


def _parse_turn(message: object, where: str) -> Turn:
    if not isinstance(message, dict):
        raise InputError("expected an object with role and content", where=where)
    role = _ROLE_WORDS.get(str(message.get("role")))
    if role is None:
        raise InputError(f"expected one of {', '.join(sorted(_ROLE_WORDS))}", where=f"{where}.role")
    content = message.get("content")
    tool_calls = _parse_tool_calls(message.get("tool_calls"), f"{where}.tool_calls")
    reasoning = message.get("reasoning_content") or ""
    if content is None and (tool_calls or reasoning):
        content = ""
    if not isinstance(content, str):
        raise InputError("expected a string", where=f"{where}.content")
    if not isinstance(reasoning, str):
        raise InputError("expected a string", where=f"{where}.reasoning_content")
    return Turn(role, content, reasoning, tool_calls)


def _parse_tool_calls(calls: object, where: str) -> tuple[ToolCall, ...]:
    if calls is None:
        return ()
    if not isinstance(calls, list):
        raise InputError("expected a list", where=where)
    parsed = []
    for i, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("arguments", ""), str):
            raise InputError("expected {function: {name, arguments: string}}", where=f"{where}[{i}]")
        parsed.append(ToolCall(str(function.get("name", "")), function.get("arguments", "")))
    return tuple(parsed)


def _parse_target(word: Any, conversation: Conversation, where: str) -> Target:
    if word is None:
        return conversation.target
    try:
        return Target(word)
    except ValueError:
        raise InputError("expected prompt or response", where=f"{where}.target") from None


def _parse_line(line: str, path: Path, number: int) -> Example:
    where = f"{path}:{number}"
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"not JSON: {error.msg} at column {error.colno}", where=where) from error
    except RecursionError as error:
        raise InputError("not JSON that can be read: nested too deeply", where=where) from error
    if not isinstance(row, dict):
        raise InputError("expected a JSON object", where=where)
    return example_from_row(row, where=where)


def _message(turn: Turn) -> dict[str, Any]:
    message: dict[str, Any] = {"role": turn.role.value, "content": turn.content}
    if turn.reasoning:
        message["reasoning_content"] = turn.reasoning
    if turn.tool_calls:
        message["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in turn.tool_calls
        ]
    return message


def _line(row: Mapping[str, Any]) -> str:
    line = json.dumps(row, ensure_ascii=False)
    try:
        line.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair: only its escape can be written
        return json.dumps(row)
    return line


def _open_text(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def _create_text(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        # mtime 0: the same examples give the same bytes
        return io.TextIOWrapper(cast("IO[bytes]", gzip.GzipFile(path, "wb", mtime=0)), encoding="utf-8")
    return path.open("w", encoding="utf-8")
