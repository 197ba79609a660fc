"""The doors to an upstream, each in its own words, for tests of what holds at all of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from gateway import messages_wire
from tidegate.testing import (
    Act,
    Reply,
    completion,
    response,
    response_events,
    text_chunks,
    text_completion,
)


@dataclass(frozen=True)
class Spoken:
    """A door's protocol.

    Attributes:
        name: of the door.
        path: below ``/v1``.
        ask: the body of a request with one user's text.
        whole: the upstream's whole answer.
        events: the events of its stream, up to its end.
        end: those that end it.
        said: the answer's text, in a whole answer or in one event.
    """

    name: str
    path: str
    ask: Callable[[str], dict[str, Any]]
    whole: Callable[[str], dict[str, Any]]
    events: Callable[[Sequence[str]], list[dict[str, Any]]]
    end: Callable[[Sequence[str]], list[dict[str, Any]]]
    said: Callable[[dict[str, Any]], str]

    def body(self, text: str, *, stream: bool = False, **more: Any) -> dict[str, Any]:
        return {**self.ask(text), **({"stream": True} if stream else {}), **more}

    def reply(self, pieces: Sequence[str], *acts: Act | bytes, stream: bool, end: bool = True) -> Reply:
        """What the upstream sends: the pieces of a text, then these acts, then the end."""
        if not stream:
            return Reply.json(self.whole("".join(pieces)))
        ending = self.end(pieces) if end else []
        return Reply.stream(*self.events(pieces), *acts, *ending, done=end and self.name in ("chat", "completions"))

    def read(self, body: bytes, *, stream: bool) -> str:
        """The text that a client reads."""
        if not stream:
            return self.said(json.loads(body))
        return "".join(self.said(one) for one in events_in(body))


def events_in(body: bytes) -> Iterator[dict[str, Any]]:
    """The data of the events of a stream, each of which must be JSON."""
    for line in body.decode().splitlines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def _texts(value: Any, *places: Any) -> str:
    match places:
        case ():
            return value if isinstance(value, str) else ""
        case ("*", *rest):
            return "".join(_texts(one, *rest) for one in value) if isinstance(value, list) else ""
        case (name, *rest):
            return _texts(value.get(name), *rest) if isinstance(value, dict) else ""
    raise AssertionError


def _said_by_chat(value: dict[str, Any]) -> str:
    return _texts(value, "choices", "*", "delta", "content") + _texts(value, "choices", "*", "message", "content")


def _said_by_responses(value: dict[str, Any]) -> str:
    if value.get("type") == "response.output_text.delta":
        return _texts(value, "delta")
    return _texts(value, "output", "*", "content", "*", "text")


def _said_by_messages(value: dict[str, Any]) -> str:
    return _texts(value, "delta", "text") + _texts(value, "content", "*", "text")


def _turns(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


DOORS = (
    Spoken(
        "chat",
        "/chat/completions",
        lambda text: {"model": "m", "messages": _turns(text)},
        completion,
        lambda pieces: text_chunks(pieces, finish_reason=None),
        lambda pieces: text_chunks([])[1:],
        _said_by_chat,
    ),
    Spoken(
        "completions",
        "/completions",
        lambda text: {"model": "m", "prompt": text},
        text_completion,
        lambda pieces: [text_completion(piece, finish_reason=None) for piece in pieces],  # type: ignore[arg-type]
        lambda pieces: [text_completion("")],
        lambda value: _texts(value, "choices", "*", "text"),
    ),
    Spoken(
        "responses",
        "/responses",
        lambda text: {"model": "m", "input": text},
        response,
        lambda pieces: response_events("".join(pieces), cut=lambda text: pieces)[: 4 + len(pieces)],
        lambda pieces: response_events("".join(pieces), cut=lambda text: pieces)[4 + len(pieces) :],
        _said_by_responses,
    ),
    Spoken(
        "messages",
        "/messages",
        lambda text: {"model": "m", "max_tokens": 64, "messages": _turns(text)},
        messages_wire.message,
        lambda pieces: [messages_wire.start(), *messages_wire.text(0, *pieces)[:-1]],
        lambda pieces: [{"type": "content_block_stop", "index": 0}, *messages_wire.end()],
        _said_by_messages,
    ),
)

every_door = pytest.mark.parametrize("door", DOORS, ids=lambda door: door.name)
both_ways = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
