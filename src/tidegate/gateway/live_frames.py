"""The frames that a client of ``/v1/live`` sends, read strictly: JSON objects in text frames, one value for each.

A frame that cannot be read, or belongs to no stream, ends the connection: a piece of a text may be lost with it. What
is wrong with a frame of a stream is that stream's: the frame then carries the `problem`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from tidegate.errors import InputError
from tidegate.gateway.guard import Reading, without_escapes
from tidegate.gateway.schemas import TOO_DEEP, is_too_deep
from tidegate.types import Channel, Conversation, Scope

__all__ = ["PROTOCOL", "Close", "Finish", "Frame", "Ids", "Open", "Text", "Unreadable", "read_frame"]

PROTOCOL: Final = "tidegate.live.v1"
"""The subprotocol; another number means other frames."""

_HALVES: Final = re.compile("[\ud800-\udfff]")
_CHANNELS: Final = {
    channel.value: channel for channel in (Channel.ANSWER, Channel.REFUSAL, Channel.REASONING, Channel.TOOL_CALL)
}
_LARGEST: Final = 2**53 - 1
"""The largest whole number that every JSON reader keeps."""
_LARGEST_ID: Final = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Open:
    """Open a stream.

    Attributes:
        stream: its number.
        context: the turns before the text; None when nothing came before.
        channel: what the text is.
        path: what the coverage calls it.
        reasoning: what the assistant thought before the text.
        name: the name of the called tool.
        scope: for whom.
        tokens: whether the verdict at each token is told.
        observe: whether the policy is only observed: the stream then is never stopped.
        masks: whether the client puts masks into what it releases; else the stream is stopped instead.
        problem: why it cannot be opened; None when it can.
    """

    stream: int
    context: Conversation | None = None
    channel: Channel = Channel.ANSWER
    path: str = "answer"
    reasoning: str = ""
    name: str = ""
    scope: Scope = Scope()  # noqa: RUF009 - frozen
    tokens: bool = True
    observe: bool = False
    masks: bool = False
    problem: InputError | None = None

    @property
    def characters(self) -> int:
        """How many characters come with it."""
        turns = self.context.turns if self.context else ()
        calls = sum(len(call.name) + len(call.arguments) for turn in turns for call in turn.tool_calls)
        return len(self.reasoning) + sum(len(turn.content) + len(turn.reasoning) for turn in turns) + calls


@dataclass(frozen=True, slots=True)
class Text:
    """More text."""

    stream: int
    text: str = ""
    problem: InputError | None = None


@dataclass(frozen=True, slots=True)
class Ids:
    """More tokens, as ids of a model that shares the guard's tokenizer."""

    stream: int
    ids: tuple[int, ...] = ()
    problem: InputError | None = None


@dataclass(frozen=True, slots=True)
class Finish:
    """The text is complete."""

    stream: int


@dataclass(frozen=True, slots=True)
class Close:
    """Nothing more is wanted of the stream."""

    stream: int


Frame = Open | Text | Ids | Finish | Close
_FIELDS: Final[Mapping[str, tuple[str, ...]]] = {
    "open": ("turns", "channel", "path", "reasoning", "name", "scope", "tokens", "observe", "masks"),
    "text": ("text",),
    "ids": ("ids",),
    "finish": (),
    "close": (),
}


class Unreadable(InputError):
    """A frame that ends the connection.

    Args:
        message: what was wrong; quotes nothing.
        code: a word for programs.
        closes: the close code.
        where: the field.
    """

    def __init__(self, message: str, code: str, closes: int, where: str | None = None) -> None:
        super().__init__(message, where=where)
        self.code = code
        self.closes = closes


def read_frame(message: Mapping[str, Any], base: Scope, *, longest: int) -> Frame:
    """A frame of a client.

    Args:
        message: as the ASGI server gives it.
        base: for whom it is, as far as the server knows.
        longest: the most bytes.

    Raises:
        Unreadable: when it ends the connection.
    """
    fields = _json(message, longest)
    kind, stream = fields.pop("type", None), fields.pop("stream", None)
    if not isinstance(kind, str) or kind not in _FIELDS:
        raise Unreadable(f"expected one of {', '.join(_FIELDS)}", "invalid_frame", 1008, "type")
    if not isinstance(stream, int) or isinstance(stream, bool) or not 1 <= stream <= _LARGEST:
        raise Unreadable("expected the number of a stream, 1 or more", "invalid_frame", 1008, "stream")
    problem = None
    try:
        Reading.known(fields, _FIELDS[kind])
    except InputError as error:
        if kind in ("finish", "close"):
            raise Unreadable(error.message, "invalid_frame", 1008, error.where) from None
        problem = error
    match kind:
        case "open":
            return Open(stream, problem=problem) if problem else _open(stream, fields, base)
        case "text":
            return Text(stream, problem=problem) if problem else _text(stream, fields)
        case "ids":
            return Ids(stream, problem=problem) if problem else _ids(stream, fields)
        case "finish":
            return Finish(stream)
    return Close(stream)


def _json(message: Mapping[str, Any], longest: int) -> dict[str, Any]:
    text = message.get("text")
    if text is None:
        raise Unreadable("expected a text frame, got a binary one", "binary_frame", 1003)
    if len(text) > longest or (not text.isascii() and len(text.encode("utf-8", "surrogatepass")) > longest):
        raise Unreadable(f"a frame may have {longest:,} bytes", "frame_too_long", 1009)
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except ValueError:
        raise Unreadable("expected a JSON object", "invalid_json", 1007) from None
    except RecursionError:
        raise Unreadable(TOO_DEEP, "nested_too_deep", 1007) from None
    if is_too_deep(value, text):
        raise Unreadable(TOO_DEEP, "nested_too_deep", 1007)
    if not isinstance(value, dict):
        raise Unreadable("expected a JSON object", "invalid_json", 1007)
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(name)


def _open(stream: int, fields: dict[str, Any], base: Scope) -> Open:
    try:
        turns = Reading.turns(fields.get("turns", []), least=0)
        return Open(
            stream,
            Conversation(without_escapes(turns)) if turns else None,
            Reading.one_of(fields.get("channel", "answer"), _CHANNELS, "channel"),
            Reading.name(fields.get("path", "answer"), "path", least=1),
            Reading.text(fields.get("reasoning", ""), "reasoning"),
            Reading.name(fields.get("name", ""), "name"),
            Reading.scope(fields.get("scope", {}), base),
            Reading.yes_or_no(fields.get("tokens", True), "tokens"),
            Reading.yes_or_no(fields.get("observe", False), "observe"),
            Reading.yes_or_no(fields.get("masks", False), "masks"),
        )
    except InputError as error:
        return Open(stream, problem=error)


def _text(stream: int, fields: dict[str, Any]) -> Text:
    text = fields.get("text")
    if not isinstance(text, str):
        return Text(stream, problem=InputError("expected a string", where="text"))
    if not text.isascii() and _HALVES.search(text):
        said = "half of a surrogate pair: a text is cut between characters, not within one"
        return Text(stream, problem=InputError(said, where="text"))
    return Text(stream, text)


def _ids(stream: int, fields: dict[str, Any]) -> Ids:
    ids = fields.get("ids")
    if not isinstance(ids, list):
        return Ids(stream, problem=InputError("expected an array of whole numbers", where="ids"))
    for place, number in enumerate(ids):
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number <= _LARGEST_ID:
            return Ids(stream, problem=InputError("expected a whole number", where=f"ids[{place}]"))
    return Ids(stream, tuple(ids))
