"""What a client of a streaming response has seen so far, and how it is closed in the middle, or goes on.

A response that is cut off still has to end as its protocol says: every open part and item is closed with as much of its
text as went out, and the last event repeats all of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from tidegate.errors import UpstreamError
from tidegate.gateway.deltas import Slot
from tidegate.types import Channel

__all__ = ["STREAMED", "Shown", "Streamed", "events_of", "go_on", "place_of"]


class Streamed(NamedTuple):
    """A text that comes in deltas.

    Attributes:
        channel: what it is.
        done: the field of its ``done`` event that repeats it.
        place: where it stands in its item: names, and fields of the event that are places in an array.
        part: the ``type`` of the part that it belongs to; None when it stands in the item itself.
    """

    channel: Channel
    done: str
    place: tuple[str, ...]
    part: str | None = None

    @property
    def places(self) -> tuple[str, ...]:
        """The fields of its events that say where it stands."""
        return ("output_index", *(step for step in self.place if step.endswith("_index")))


STREAMED: Final[Mapping[str, Streamed]] = {
    "response.output_text": Streamed(Channel.ANSWER, "text", ("content", "content_index", "text"), "output_text"),
    "response.refusal": Streamed(Channel.REFUSAL, "refusal", ("content", "content_index", "refusal"), "refusal"),
    "response.reasoning_text": Streamed(
        Channel.REASONING, "text", ("content", "content_index", "text"), "reasoning_text"
    ),
    "response.reasoning_summary_text": Streamed(
        Channel.REASONING, "text", ("summary", "summary_index", "text"), "summary_text"
    ),
    "response.function_call_arguments": Streamed(Channel.TOOL_CALL, "arguments", ("arguments",)),
    "response.mcp_call_arguments": Streamed(Channel.TOOL_CALL, "arguments", ("arguments",)),
    "response.custom_tool_call_input": Streamed(Channel.TOOL_CALL, "input", ("input",)),
    "response.code_interpreter_call_code": Streamed(Channel.TOOL_CALL, "code", ("code",)),
    "response.shell_call_command": Streamed(Channel.TOOL_CALL, "command", ("action", "commands", "command_index")),
}
"""By the type of their events, without ``.delta`` and ``.done``."""

_TYPES: Final = {streamed.part: name for name, streamed in STREAMED.items() if streamed.part is not None}
_DELTAS_HAVE: Final[Mapping[str, Any]] = {"response.output_text": {"logprobs": []}}
"""What events of a text have beside, which clients expect to be there."""
_DONE: Final = {"content": "response.content_part.done", "summary": "response.reasoning_summary_part.done"}
_PLACES: Final = {"content": "content_index", "summary": "summary_index"}


def place_of(streamed: Streamed, event: Mapping[str, Any]) -> Slot:
    """Where a text stands in the output: the place of its item, then the way to it there. Places have been checked."""
    steps = (event[step] if step.endswith("_index") else step for step in streamed.place)
    return (event["output_index"], *steps)


def events_of(place: int, item: Mapping[str, Any], cut: Callable[[str], Iterable[str]]) -> Iterator[dict[str, Any]]:
    """The events, without their numbers, in which an item comes whose content is parts with texts.

    Args:
        place: of the item in the output.
        item: as it is when it is done.
        cut: the pieces in which a text comes.
    """
    yield {
        "type": "response.output_item.added",
        "output_index": place,
        "item": {**item, "status": "in_progress", "content": []},
    }
    for index, part in enumerate(item["content"]):
        at = {"item_id": item["id"], "output_index": place, "content_index": index}
        kind = _TYPES[part["type"]]
        name, more = STREAMED[kind].done, _DELTAS_HAVE.get(kind, {})
        yield {"type": "response.content_part.added", **at, "part": {**part, name: ""}}
        for piece in cut(part[name]):
            yield {"type": f"{kind}.delta", **at, "delta": piece, **more}
        yield {"type": f"{kind}.done", **at, name: part[name], **more}
        yield {"type": _DONE["content"], **at, "part": part}
    yield {"type": "response.output_item.done", "output_index": place, "item": item}


@dataclass(slots=True)
class _Part:
    """A part of an item: as it was last shown, the text that came in deltas with its tokens, and what is still to be
    closed."""

    shown: dict[str, Any]
    text: list[str] = field(default_factory=list)
    tokens: list[Any] = field(default_factory=list)
    text_open: bool = False
    open: bool = False


@dataclass(slots=True)
class _Item:
    """An item of the output: as it was last shown, its parts, and its texts that came in deltas by their way."""

    shown: dict[str, Any]
    parts: dict[tuple[str, int], _Part] = field(default_factory=dict)
    texts: dict[Slot, list[str]] = field(default_factory=dict)
    open: bool = True


class Shown:
    """Follows the events that go out.

    Attributes:
        head: the last response object that went out, without its output; {} when none did.
    """

    def __init__(self) -> None:
        self.head: dict[str, Any] = {}
        self._items: dict[int, _Item] = {}

    def note(self, event: Mapping[str, Any]) -> None:
        """An event goes out."""
        kind: str = event["type"]
        response, item = event.get("response"), event.get("item")
        if isinstance(response, dict):
            self.head = {name: value for name, value in response.items() if name != "output"}
        elif isinstance(item, dict):
            self._items[event["output_index"]] = _Item(copy.deepcopy(item), open=kind.endswith(".added"))
        else:
            known = self._items.get(event.get("output_index", -1))
            if known is not None and known.open:
                self._note_inside(known, kind, event)

    def _note_inside(self, item: _Item, kind: str, event: Mapping[str, Any]) -> None:
        stem, _, end = kind.rpartition(".")
        streamed = STREAMED.get(stem)
        if streamed is not None and end in ("delta", "done"):
            self._note_text(item, streamed, end, event)
        elif isinstance(event.get("part"), dict):
            name = "summary" if "summary_index" in event else "content"
            part = _Part(copy.deepcopy(event["part"]), open=end == "added")
            item.parts[name, event[_PLACES[name]]] = part
        elif "annotation" in event:
            known = item.parts.get(("content", event["content_index"]))
            if known is not None:
                known.shown.setdefault("annotations", []).append(event["annotation"])

    @staticmethod
    def _note_text(item: _Item, streamed: Streamed, end: str, event: Mapping[str, Any]) -> None:
        place = place_of(streamed, event)[1:]
        text = event[streamed.done if end == "done" else "delta"]
        if streamed.part is None:
            pieces = item.texts.setdefault(place, [])
        else:
            name, index = str(place[0]), int(place[1])
            part = item.parts.setdefault((name, index), _Part(_empty_part(streamed.part)))
            pieces, part.text_open = part.text, end == "delta"
            if end == "done":
                part.tokens = []
            part.tokens += event.get("logprobs") or ()
        if end == "done":
            pieces.clear()
        pieces.append(text)

    def closing(self) -> Iterator[dict[str, Any]]:
        """The events, without their numbers, that close what is open, in order.

        The arguments of a call get no ``done`` event, which would say that they are complete; its item says that it is
        not.
        """
        for number, item in sorted(self._items.items()):
            if not item.open:
                continue
            for (name, index), part in sorted(item.parts.items()):
                yield from _closing_part(number, item, name, index, part)
            item.open = False
            item.shown = {**_shown(item), "status": "incomplete"}
            yield {"type": "response.output_item.done", "output_index": number, "item": item.shown}

    @property
    def only_text(self) -> bool:
        """Whether all that was shown is the beginning of one message with one text, or less: the text could go on."""
        if set(self._items) - {0}:
            return False
        first = self._items.get(0)
        if first is None:
            return True
        part = first.parts.get(("content", 0))
        plain = part is None or (part.shown.get("type") == "output_text" and not part.shown.get("annotations"))
        alone = set(first.parts) <= {("content", 0)}
        return first.open and first.shown.get("type") == "message" and alone and plain

    def first(self, *, part: bool = False) -> dict[str, Any] | None:
        """The first item as it was last shown, or its first part; None when none was."""
        item = self._items.get(0)
        if item is None or not part:
            return item.shown if item else None
        known = item.parts.get(("content", 0))
        return known.shown if known else None

    @property
    def next_place(self) -> int:
        """The place in the output behind all items."""
        return max(self._items, default=-1) + 1

    @property
    def output(self) -> list[dict[str, Any]]:
        """All items as they were last shown."""
        return [item.shown for _, item in sorted(self._items.items())]


def _empty_part(kind: str) -> dict[str, Any]:
    if kind == "output_text":
        return {"type": kind, "annotations": [], "text": ""}
    return {"type": kind, "refusal" if kind == "refusal" else "text": ""}


def _closing_part(number: int, item: _Item, name: str, index: int, part: _Part) -> Iterator[dict[str, Any]]:
    where = {"item_id": item.shown.get("id"), "output_index": number, _PLACES[name]: index}
    shown = _shown_part(part)
    kind = _TYPES.get(str(part.shown.get("type")))
    if part.text_open and kind is not None:
        field_ = STREAMED[kind].done
        more = dict.fromkeys(_DELTAS_HAVE.get(kind, ()), part.tokens)
        yield {"type": f"{kind}.done", **where, field_: shown[STREAMED[kind].place[-1]], **more}
    if part.open:
        yield {"type": _DONE[name], **where, "part": shown}


def _shown_part(part: _Part) -> dict[str, Any]:
    if not part.text:
        return part.shown
    name = "refusal" if part.shown.get("type") == "refusal" else "text"
    tokens = {"logprobs": part.tokens} if part.tokens else {}
    return {**part.shown, name: "".join(part.text), **tokens}


def _shown(item: _Item) -> dict[str, Any]:
    shown = copy.deepcopy(item.shown)
    for (name, index), part in sorted(item.parts.items()):
        listed = shown[name] = shown.get(name) or []
        listed[index : index + 1] = [_shown_part(part)]
    for place, pieces in item.texts.items():
        if len(place) == 1:
            shown[str(place[0])] = "".join(pieces)
        else:
            commands = shown.setdefault("action", {}).setdefault("commands", [])
            commands.append("".join(pieces))
    return shown


# --- a text that goes on after it was rolled back -----------------------------------------------------------------


_ENDS: Final = ("response.completed", "response.failed", "response.incomplete")
_KEEPS: Final = ("id", "created_at", "instructions")
"""What a response says of itself as long as it lasts; what it was asked to go on with is nobody's but ours."""


def go_on(kind: str, event: dict[str, Any], left: str | None, shown: Shown) -> bool:
    """Put an event of a response that goes on with a text together with what was shown; False when it says nothing new.

    Args:
        kind: its type.
        event: the rest of it; what is changed is changed in place.
        left: the text that has left; None when nothing did, and the output begins anew.
        shown: what the client has seen.

    Raises:
        UpstreamError: when it goes on with something else.
    """
    response = event.get("response")
    if isinstance(response, dict):
        if not shown.head:
            return True
        event["response"] = response = {**response, **{name: shown.head[name] for name in _KEEPS if name in shown.head}}
        output = response.get("output")
        if kind in _ENDS and left is not None:
            response["output"] = [
                _item(_first_of(output), left, shown),
                *(output[1:] if isinstance(output, list) else ()),
            ]
        return kind in _ENDS
    if left is None or event.get("output_index") != 0:
        return True
    first = shown.first()
    if isinstance(event.get("item"), dict):
        event["item"] = _item(event["item"], left if kind.endswith(".done") else "", shown)
        return first is None or kind.endswith(".done")
    if first is not None and "item_id" in event:
        event["item_id"] = first.get("id")
    if event.get("content_index") != 0:
        return True
    if isinstance(event.get("part"), dict):
        event["part"] = _part(event["part"], left if kind.endswith(".done") else "")
        return shown.first(part=True) is None or kind.endswith(".done")
    if kind == "response.output_text.done" and isinstance(event.get("text"), str):
        event["text"] = left + event["text"]
    if isinstance(event.get("annotation"), dict):
        event["annotation"] = _moved(event["annotation"], len(left))
    return True


def _first_of(output: Any) -> dict[str, Any]:
    if not isinstance(output, list) or not output or not isinstance(output[0], dict):
        raise UpstreamError("the upstream was asked to go on, and said nothing")
    return dict(output[0])


def _item(item: Mapping[str, Any], left: str, shown: Shown) -> dict[str, Any]:
    """The message that goes on."""
    first, content = shown.first(), item.get("content")
    if item.get("type") != "message":
        raise UpstreamError("the upstream was asked to go on with a text, and went on with something else")
    kept = dict(item) if first is None else {**item, "id": first.get("id")}
    if left:
        kept["content"] = [_part(_first_of(content), left), *(content[1:] if isinstance(content, list) else ())]
    return kept


def _part(part: Mapping[str, Any], left: str) -> dict[str, Any]:
    if part.get("type") != "output_text" or not isinstance(part.get("text"), str):
        raise UpstreamError("the upstream was asked to go on with a text, and went on with something else")
    kept = {**part, "text": left + part["text"]}
    if left:
        listed = part.get("annotations")
        if isinstance(listed, list):
            kept["annotations"] = [_moved(one, len(left)) if isinstance(one, dict) else one for one in listed]
    return kept


def _moved(annotation: Mapping[str, Any], by: int) -> dict[str, Any]:
    """An annotation that counts from the beginning of the whole text."""
    places = {name: annotation.get(name) for name in ("start_index", "end_index")}
    return {**annotation, **{name: place + by for name, place in places.items() if isinstance(place, int)}}
