"""What the Responses API answers, judged before it leaves: `ResponseStream` for events, `judge_response` for the whole.

No sockets here: bytes of the upstream go in, bytes for the client come out.

What leaves of a stream, and what does not:

- Every text has a place in the output, such as ``output[0].content[0].text``, and is judged there as what it is. Events
  leave in the order in which they came; one with a delta leaves with as much of its text as was released.
- An event that repeats a whole text (``.done``, an item, a part, the response) leaves when that text is judged to its
  end. What it says beyond the deltas is judged with them; what it says otherwise is judged as a text of its own.
- Letters that are written as escapes in the arguments of a call are judged, and leave, as themselves.
- A text ends with its ``done`` event, or that of its part or item, or with the response. It does not go on after that.
- The response objects in events say of the request what the client itself said, and nothing of the upstream's words.
- Log probabilities of chosen tokens leave with the text that they spell, in deltas and in events that repeat it (see
  `tidegate.gateway.logprobs`). What is written anew has its own.
- What the guard cannot see does not pass: other tokens, images, encrypted reasoning, unknown fields and events with
  text. The coverage counts it.
- Events are numbered anew, so that the client's numbers have no gaps.
- On a BLOCK everything open is closed with what was released, and ``response.incomplete`` with ``content_filter`` is
  the last event; where the policy says replace, a message of the policy comes before that.
- A text is rolled back while nothing has left but the beginning of one message with one text. What the upstream says
  then goes on in it: what began already does not begin again, and events that repeat the text repeat all of it.
- Masked text leaves in the place of what it covers, in the events that repeat it too. From the first mask on no log
  probabilities of a text leave, whatever else the policy lets pass: they would spell it.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from tidegate.errors import UpstreamError
from tidegate.gateway.channels import BLOCKS, Judging, TextChannel, as_found, due_of, judge_text, of_stream, of_whole
from tidegate.gateway.deltas import OUR_FIELD, Parts, Slot, carries_text, is_json, is_place
from tidegate.gateway.logprobs import TextTokens
from tidegate.gateway.responses_parts import (
    LOGPROBS,
    Found,
    Taken,
    fill,
    fill_tokens,
    path_of,
    take,
    take_response,
    take_tokens,
    turn_of,
    value_of,
)
from tidegate.gateway.responses_shown import STREAMED, Shown, Streamed, events_of, go_on, place_of
from tidegate.gateway.schemas import decision_field, is_name, json_of, mended, undecided_field
from tidegate.gateway.sse import EventReader, event
from tidegate.gateway.statuses import Problem
from tidegate.gateway.unescaped import unescaped, wholly_unescaped
from tidegate.moderate import Retry, ending_of
from tidegate.personal import mask
from tidegate.types import Action, Channel, Coverage, CoverageState, Decision, InterventionKind

__all__ = ["NO_USAGE", "ResponseStream", "error_event", "judge_response", "new_response", "numbered", "said_by_policy"]

NO_USAGE: Final[Mapping[str, Any]] = {
    "input_tokens": 0,
    "input_tokens_details": {"cached_tokens": 0},
    "output_tokens": 0,
    "output_tokens_details": {"reasoning_tokens": 0},
    "total_tokens": 0,
}
"""The usage of a response that was cut off before its upstream told it."""

FILTERED: Final[Mapping[str, Any]] = {"status": "incomplete", "incomplete_details": {"reason": "content_filter"}}
"""What a response says of itself that the policy stopped."""

_BEGINNINGS: Final = frozenset({"response.created", "response.in_progress", "response.queued"})
_ENDS: Final = frozenset({"response.completed", "response.failed", "response.incomplete"})
_ITEMS: Final = frozenset({"response.output_item.added", "response.output_item.done"})
_PARTS: Final[Mapping[str, tuple[str, str]]] = {
    f"response.{kind}.{end}": place
    for kind, place in (
        ("content_part", ("content", "content_index")),
        ("reasoning_summary_part", ("summary", "summary_index")),
    )
    for end in ("added", "done")
}
_ANNOTATION: Final = "response.output_text.annotation.added"
_PLAIN: Final = frozenset(
    f"response.{kind}_call.{step}"
    for kind, steps in (
        ("code_interpreter", ("in_progress", "interpreting", "completed")),
        ("file_search", ("in_progress", "searching", "completed")),
        ("image_generation", ("in_progress", "generating", "completed")),
        ("mcp", ("in_progress", "completed", "failed")),
        ("web_search", ("in_progress", "searching", "completed")),
    )
    for step in steps
) | frozenset(f"response.mcp_list_tools.{step}" for step in ("in_progress", "completed", "failed"))

# --- what responses and events are made of ------------------------------------------------------------------------


def new_response(asked: Mapping[str, Any], model: str) -> dict[str, Any]:
    """A response of ours to a request, without its output."""
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "instructions": asked.get("instructions"),
        "metadata": asked.get("metadata") or {},
        "model": model,
        "parallel_tool_calls": asked.get("parallel_tool_calls", True),
        "tool_choice": asked.get("tool_choice", "auto"),
        "tools": asked.get("tools") or [],
        "usage": None,
    }


def said_by_policy(message: str) -> dict[str, Any]:
    """An item of the output that says the policy's message."""
    return {
        "id": f"msg_{uuid.uuid4().hex}",
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [{"type": "output_text", "text": message, "annotations": []}],
    }


def numbered(number: int | None, content: Mapping[str, Any]) -> bytes:
    """An event on the wire, with its type on a line of its own. The type is a name, never a sentence.

    ``number`` is None where nobody knows how many there were before.
    """
    kind = content["type"]
    rest = {name: value for name, value in content.items() if name not in ("type", "sequence_number")}
    head = {"type": kind} if number is None else {"type": kind, "sequence_number": number}
    return f"event: {kind}\n".encode() + event({**head, **rest})


def error_event(number: int | None, problem: Problem) -> bytes:
    """An error in the middle of a stream: in the form of the Responses API, and with ``error`` as all of OpenAI's, so
    that no client takes the answer for complete."""
    error = problem.body["error"]
    flat = {name: error[name] for name in ("code", "message", "param")}
    return numbered(number, {"type": "error", **flat, "error": error})


# --- one text -----------------------------------------------------------------------------------------------------


class _Text:
    """One text of a response while it streams.

    Attributes:
        channel: judges it.
        tokens: those that came with its deltas.
        before: those of them that had left before it was written anew.
        ended: whether it is complete: nothing can follow.
        blocked: whether the policy stopped it.
    """

    __slots__ = ("_escape", "_half", "_pieces", "before", "blocked", "channel", "ended", "tokens")

    def __init__(self, channel: TextChannel, tokens: TextTokens) -> None:
        self.channel = channel
        self.tokens = tokens
        self.before: list[Any] = []
        self._escape = ""
        self.ended = False
        self.blocked = False
        self._half = ""
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        """All that came in, but for half a character whose other half may still come."""
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        return self._pieces[0] if self._pieces else ""

    @property
    def settled(self) -> bool:
        """Whether it is complete and judged, and all of it was released."""
        done = self.ended and not self.channel.has_work
        return done and not self.blocked and self.channel.retry is None

    async def judge(self) -> bool:
        """Judge what is new; returns whether it is blocked."""
        if self.channel.has_work and not self.blocked:
            self.blocked = await self.channel.judge()
        return self.blocked

    def add(self, delta: str) -> str:
        """Take a delta; returns it as it will go out: in arguments of calls, letters as themselves."""
        if is_json(self.channel.slot):
            delta, self._escape = unescaped(self._escape + delta)
        text, self._half = self._half + delta, ""
        if text and "\ud800" <= text[-1] <= "\udbff":
            text, self._half = text[:-1], text[-1]
        return self.extend(mended(text))

    def extend(self, text: str) -> str:
        """Take more text that has whole characters."""
        if text:
            self._pieces.append(text)
            self.channel.add(text)
        return text

    def end(self) -> None:
        self.ended = self.channel.ending = True

    def go_on(self) -> str:
        """What comes next follows the text that was rolled back; returns what stays."""
        self.channel.go_on()
        self.ended = False
        self._half = self._escape = ""
        self.tokens.go_on()
        self.before = list(self.tokens.left)
        self._pieces = [self.channel.text]
        return self.channel.text

    def give_up(self) -> None:
        """The upstream cannot go on."""
        self.channel.give_up()
        self.blocked = True


@dataclass(slots=True)
class _Fill:
    """A text that an event lacks: where it goes, what goes there, and how much of it is yet to be released; and the
    tokens that go with it, None where none do."""

    text: _Text
    place: Slot
    value: Any
    rest: str
    tokens: list[Any] | None = None

    def put(self, event: dict[str, Any]) -> None:
        """Put it into its event, with what of it was masked; the tokens of what was masked do not go."""
        left, text = self.text.channel.moderator.left, self.text
        fill(event, self.place, self.value if left == text.text else value_of(left, self.value))
        if self.tokens is not None:
            fill_tokens(event, self.place, text.before + self.tokens if left == text.text else text.tokens.left)


@dataclass(slots=True)
class _Piece:
    """An event, until all of it has gone out."""

    event: dict[str, Any]
    fills: list[_Fill] = field(default_factory=list)
    ends: list[_Text] = field(default_factory=list)
    """Texts that it says are complete."""
    delta: bool = False

    def ready(self) -> tuple[dict[str, Any] | None, bool]:
        """What of it can go out now, None when that is nothing; and whether that is all of it."""
        if self.delta:
            return self._ready_delta(self.fills[0])
        if not all(text.settled for text in (*self.ends, *(one.text for one in self.fills))):
            return None, False
        for one in self.fills:
            one.text.channel.ready = one.text.channel.ready[len(one.rest) :]
            one.put(self.event)
        return self.event, True

    def _ready_delta(self, one: _Fill) -> tuple[dict[str, Any] | None, bool]:
        channel = one.text.channel
        text = channel.ready[: len(one.rest)]
        channel.ready = channel.ready[len(text) :]
        if one.rest and not text:
            return None, False
        if not one.rest.startswith(text):
            one.text.tokens.silence()
        one.rest = one.rest[len(text) :]
        tokens = one.text.tokens.leave(text)
        told = {LOGPROBS: tokens} if tokens else {}
        return {**self.event, "delta": text, **told}, not one.rest


@dataclass(frozen=True, slots=True)
class _Places:
    """Where the texts of an event stand in the output.

    Attributes:
        here: where they stand in the event; () for the whole of it.
        there: the same place in the output.
        others: those that stand elsewhere.
    """

    here: Slot = ()
    there: Slot = ()
    others: Mapping[Slot, Slot] = field(default_factory=dict)

    def of(self, slot: Slot) -> Slot:
        return self.others.get(slot) or (*self.there, *slot[len(self.here) :])


_NOWHERE: Final = _Places()
_ANSWER: Final[tuple[Slot, Channel]] = ((0, "content", 0, "text"), Channel.ANSWER)
"""The text that can be rolled back: the only one of the only item."""


# --- a streaming response -----------------------------------------------------------------------------------------


class ResponseStream:
    """A response on its way through: the upstream's bytes in, the client's bytes out.

    Args:
        judging: what it is judged with.
        asked: the request that it answers.
        model: the model that was asked for, "" when none was.

    Attributes:
        done: whether all is said: what comes from the upstream after that is of no use.
        complete: whether the upstream itself said that it has no more to say.
        error: what went wrong with the upstream; None when nothing did.
        decisions: the decision on the response, once it has ended; () before, and when it had no text.
        released: how many characters of text went out.
    """

    def __init__(self, judging: Judging, asked: Mapping[str, Any], model: str = "") -> None:
        self.done = False
        self.complete = False
        self.error: UpstreamError | None = None
        self.decisions: tuple[Decision, ...] = ()
        self.released = 0
        self._judging = judging
        self._asked = asked
        self._model = model
        self._reader = EventReader()
        self._texts: dict[tuple[Slot, Channel], list[_Text]] = {}
        self._names: dict[int, str] = {}
        self._dropped: dict[str, int] = {}
        self._working: list[_Text] = []
        self._waiting: deque[_Piece] = deque()
        self._shown = Shown()
        self._number = 0
        self._field: dict[str, Any] = {}
        self._concluded = False
        self._blocked = False
        self._unjudged: Decision | None = None
        self._ending = False
        self._resumed = False
        self._left: str | None = None

    @property
    def held(self) -> int:
        """How many characters are held now."""
        return 0 if self._concluded else sum(one.channel.held for one in self._all())

    @property
    def retry(self) -> Retry | None:
        """From where the upstream is to go on, instead of what it says now; None while it need not."""
        return next((one.channel.retry for one in self._all() if one.channel.retry is not None), None)

    @property
    def due_s(self) -> float | None:
        """In how many seconds `late` is to be called if nothing comes before, at least 0; None for never."""
        return None if self._concluded else due_of(one.channel for one in self._all())

    async def late(self) -> bytes:
        """Nothing came, and what is held may be held no longer. Raises StoreError."""
        for one in self._all():
            one.blocked = one.channel.late() or one.blocked
            self._blocked = self._blocked or one.blocked
        return await self._advance()

    def resume(self) -> None:
        """What is fed next is what the upstream says after it was asked to go on."""
        text = self._texts[_ANSWER][0]
        for other in self._all():
            if other is not text:
                other.channel.moderator.close()
        self._reader = EventReader()
        self.complete = self._ending = False
        self._texts = {_ANSWER: [text]}
        self._names.clear()
        self._working.clear()
        self._waiting.clear()
        self._resumed = True
        left = text.go_on()
        self._left = left if left or self._shown.first() is not None else None

    async def give_up(self) -> bytes:
        """The upstream cannot go on: the response ends as the policy says then. Raises StoreError."""
        self._give_up()
        return await self._advance()

    def _give_up(self) -> None:
        for one in self._rolled_back():
            one.give_up()
            self._waiting.clear()
            self._working.clear()
            self._blocked = True

    def _rolled_back(self) -> list[_Text]:
        return [one for one in self._all() if one.channel.moderator.rolled_back]

    @property
    def _may_go_on(self) -> bool:
        """Whether the text can be written anew: only its beginning has left, and all of it that may leave."""
        text = self._texts.get(_ANSWER, [None])[0]
        goes = text is not None and text.channel.retry is not None and not text.channel.ready
        return goes and self._shown.only_text

    async def feed(self, data: bytes) -> bytes:
        """Take what the upstream sent; returns what may go to the client now, b"" when that is nothing.

        Raises:
            StoreError: when the decision could not be kept.
        """
        error: UpstreamError | None = None
        told = False
        try:
            for content in self._reader.feed(data):
                told = content.strip() == b"[DONE]"
                if told or self._ending or self._blocked or self.retry is not None:
                    break
                await self._take(content)
        except UpstreamError as failed:
            error = failed
        except RecursionError:
            error = UpstreamError("the upstream sent an event that is nested too deep")
        sent = await self._advance()
        if (told or error is not None) and not self.done and self.retry is None:
            sent += await self._end(error)
        return sent

    async def end(self, error: UpstreamError | None = None) -> bytes:
        """The upstream has no more to say, or broke off with an error; returns the end for the client.

        Raises:
            StoreError: when the decision could not be kept.
        """
        sent = b"" if self.done or error is not None else await self.feed(b"\n\n")
        return sent if self.done or self.retry is not None else sent + await self._end(error)

    async def close(self) -> None:
        """Nobody listens any more: give everything back, and keep the decision on what was judged so far."""
        self.done = True
        try:
            await self._conclude()
        finally:
            for one in self._all():
                one.channel.moderator.close()

    # in

    def _taken(self) -> Taken:
        return Taken.by(self._judging, left=self._left or "")

    async def _take(self, content: bytes) -> None:
        try:
            said = json_of(content.decode())
        except ValueError:
            raise UpstreamError("the upstream sent an event that is not JSON") from None
        if not isinstance(said, dict):
            raise UpstreamError("the upstream sent an event that is not a JSON object")
        kind = said.pop("type", None)
        if said.get("error") and kind in (None, "error"):
            raise UpstreamError("the upstream reported an error in the middle of its answer")
        if not isinstance(kind, str):
            raise UpstreamError("the upstream sent an event without a type")
        if kind == "error":
            raise UpstreamError("the upstream reported an error in the middle of its answer")
        said.pop("sequence_number", None)
        if self._resumed and not go_on(kind, said, self._left, self._shown):
            return
        stem, _, end = kind.rpartition(".")
        if kind in _BEGINNINGS:
            await self._take_response(kind, said)
        elif kind in _ENDS:
            await self._take_end(kind, said)
        elif kind in _ITEMS:
            await self._take_item(kind, said)
        elif kind in _PARTS:
            await self._take_part(kind, said)
        elif stem in STREAMED and end in ("delta", "done", "added"):
            await self._take_text(kind, STREAMED[stem], end, said)
        elif kind == _ANNOTATION:
            await self._take_annotation(kind, said)
        elif kind in _PLAIN:
            await self._take_plain(kind, said)
        else:
            await self._take_unknown(kind, said)

    async def _take_response(self, kind: str, said: dict[str, Any]) -> None:
        taken = self._taken()
        response = take_response(said.get("response"), self._asked, ("response",), taken)
        await self._wait_for(kind, {"response": response}, taken)

    async def _take_end(self, kind: str, said: dict[str, Any]) -> None:
        taken = self._taken()
        response = take_response(said.get("response"), self._asked, ("response",), taken)
        await self._wait_for(kind, {"response": response}, taken, _Places(("response", "output"), ()), ends=())
        self._ending = True

    async def _take_item(self, kind: str, said: dict[str, Any]) -> None:
        _expect_places(said, "output_index")
        item = said.get("item")
        if not isinstance(item, dict):
            raise UpstreamError("the upstream sent an item that is no object")
        where = (said["output_index"],)
        name = item.get("name")
        if isinstance(name, str):
            self._names[where[0]] = mended(name)
        await self._take_thing(kind, said, _Places(("item",), where))

    async def _take_part(self, kind: str, said: dict[str, Any]) -> None:
        name, index = _PARTS[kind]
        _expect_places(said, "output_index", index)
        if not isinstance(said.get("part"), dict):
            raise UpstreamError("the upstream sent a part that is no object")
        await self._take_thing(kind, said, _Places(("part",), (said["output_index"], name, said[index])))

    async def _take_thing(self, kind: str, said: dict[str, Any], places: _Places) -> None:
        """An item or a part begins or ends."""
        taken = self._taken()
        kept = take(said, (), taken)
        if kind.endswith(".added"):
            await self._wait_for_beginning(kind, kept, taken, places)
        else:
            await self._wait_for(kind, kept, taken, places, ends=places.there)

    async def _take_text(self, kind: str, streamed: Streamed, end: str, said: dict[str, Any]) -> None:
        _expect_places(said, *streamed.places)
        name = "delta" if end == "delta" else streamed.done
        text = said.pop(name, None)
        if not isinstance(text, str):
            raise UpstreamError("the upstream sent a text in a shape that is not known")
        taken = self._taken()
        place = place_of(streamed, said)
        tokens = said.pop(LOGPROBS) if streamed.done == "text" and isinstance(said.get(LOGPROBS), list) else None
        kept = take(said, (), taken, prefix=f"{kind}.")
        if tokens is not None:
            kept[LOGPROBS] = []
        if end == "delta":
            await self._take_delta({"type": kind, **kept}, text, place, streamed.channel, taken, tokens or [])
            return
        kept[name] = ""
        if tokens:
            take_tokens(tokens, text, (name,), taken, f"{kind}.")
        if text:
            text = wholly_unescaped(text) if is_json((name,)) else mended(text)
            taken.texts.append(Found((name,), streamed.channel, text, text))
        places = _Places((), place[:1], {(name,): place})
        if end == "added":
            await self._wait_for_beginning(kind, kept, taken, places)
        else:
            await self._wait_for(kind, kept, taken, places, ends=place)

    async def _take_delta(
        self, said: dict[str, Any], delta: str, place: Slot, channel: Channel, taken: Taken, listed: list[Any]
    ) -> None:
        """``listed`` are the tokens that came with it."""
        known = self._texts.get((place, channel))
        tokens = known[0].tokens if known else self._tokens(taken)
        own = Parts()
        read = tokens.read(listed, own)
        taken.count(f"{said['type']}.", own)
        if not await self._counted(taken):
            return
        if not delta and not read:
            self._waiting.append(_Piece({**said, "delta": ""}))
            return
        if known and known[0].ended:
            raise UpstreamError("the upstream went on with a text that it had ended")
        await self._turn([(place, channel)])
        text = known[0] if known else self._open(place, channel, tokens)
        out = text.add(delta) if delta else ""
        text.tokens.add(read, out)
        self._note_work(text)
        if out:
            self._waiting.append(_Piece(said, [_Fill(text, ("delta",), out, out)], delta=True))

    def _tokens(self, taken: Taken) -> TextTokens:
        return TextTokens(passing=self._judging.passing or taken.trusts_tokens)

    async def _take_annotation(self, kind: str, said: dict[str, Any]) -> None:
        _expect_places(said, "output_index", "content_index", "annotation_index")
        taken = self._taken()
        kept = take(said, (), taken, prefix=f"{kind}.")
        there = (said["output_index"], "content", said["content_index"], "annotations", said["annotation_index"])
        await self._wait_for(kind, kept, taken, _Places(("annotation",), there))

    async def _take_plain(self, kind: str, said: dict[str, Any]) -> None:
        _expect_places(said, "output_index")
        taken = self._taken()
        kept = take(said, (), taken, prefix=f"{kind}.")
        await self._wait_for(kind, kept, taken, _Places((), (said["output_index"],)))

    async def _take_unknown(self, kind: str, said: dict[str, Any]) -> None:
        """An event that we do not know passes when it carries no text, or the policy lets it."""
        said.pop("obfuscation", None)
        taken = self._taken()
        plain = is_name(kind) and not carries_text(said)
        if not plain:
            taken.parts.drop(kind, said)
        if await self._counted(taken) and (plain or (taken.parts.passing and is_name(kind))):
            self._waiting.append(_Piece({"type": kind, **said}))

    async def _counted(self, taken: Taken) -> bool:
        """Count what no guard can judge; whether the policy lets the response go on.

        When it does not, what came before is judged first, so that it leaves as it would have, had it come alone.
        """
        for name, characters in taken.dropped.items():
            self._dropped[name] = self._dropped.get(name, 0) + characters
        if taken.dropped and self._unjudged is None:
            self._unjudged = self._judging.refused()
            if self._unjudged.action >= BLOCKS:
                await self._judge()
                self._blocked = True
        return not self._blocked

    # texts

    async def _wait_for_beginning(self, kind: str, kept: dict[str, Any], taken: Taken, places: _Places) -> None:
        """Something begins: text in it that deltas may continue is sent after it, as their first."""
        identity = kept["item"].get("id") if isinstance(kept.get("item"), dict) else kept.get("item_id")
        first, rest = [], []
        for one in taken.texts:
            delta = _first_delta(places.of(one.slot), one.channel, identity)
            if delta is None:
                rest.append(one)
            else:
                first.append((delta, one))
        taken.texts = rest
        await self._wait_for(kind, kept, taken, places)
        for delta, one in first if not self._blocked else ():
            tokens = taken.tokens.get(one.slot, [])
            await self._take_delta(delta, one.text, places.of(one.slot), one.channel, self._taken(), tokens)

    async def _wait_for(
        self, kind: str, kept: dict[str, Any], taken: Taken, places: _Places = _NOWHERE, ends: Slot | None = None
    ) -> None:
        """The event leaves when all of its texts are judged to their end, and so are those that it ends."""
        ended = [] if ends is None else [text for text in self._all_at(ends) if not text.ended]
        for text in ended:
            self._close_tokens(text, taken)
        if not await self._counted(taken):
            return
        if taken.texts or ended:
            await self._turn([(places.of(one.slot), one.channel) for one in taken.texts])
        found = [await self._find(one, places.of(one.slot), taken) for one in taken.texts]
        for text in (*ended, *(one.text for one in found)):
            text.end()
            self._note_work(text)
        self._waiting.append(_Piece({"type": kind, **kept}, found, ended))

    async def _find(self, one: Found, place: Slot, taken: Taken) -> _Fill:
        """The text at this place that says the same, or can go on to say it; else one of its own."""
        known, tokens = self._texts.get((place, one.channel), []), taken.tokens.get(one.slot)
        for text in known:
            if text.text == one.text:
                return _Fill(text, one.slot, one.value, "", tokens)
        if known and not known[0].ended and one.text.startswith(known[0].text):
            text = known[0]
        else:
            if known:
                await self._judge()
            text = self._open(place, one.channel, self._tokens(taken))
        return _Fill(text, one.slot, one.value, text.extend(one.text[len(text.text) :]), tokens)

    def _open(self, place: Slot, channel: Channel, tokens: TextTokens) -> _Text:
        thought = ""
        if channel is not Channel.REASONING:
            thought = "\n".join(texts[0].text for (_, kind), texts in self._texts.items() if kind is Channel.REASONING)
        name = ""
        if channel is Channel.TOOL_CALL and place[-1] != "name" and isinstance(place[0], int):
            name = self._names.get(place[0], "")
        path = path_of(("output", *place) if isinstance(place[0], int) else place)
        first = place[1:2] == ("content",) and len(place) == len(_ANSWER[0]) and not self._texts.get((place, channel))
        judging = self._judging if first else replace(self._judging, retries=False)
        opened = _Text(TextChannel(judging, place, channel, path, reasoning=thought, name=name), tokens)
        self._texts.setdefault((place, channel), []).append(opened)
        return opened

    @staticmethod
    def _close_tokens(text: _Text, taken: Taken) -> None:
        """No more tokens come for a text: what never spelled anything is dropped, and counted."""
        own = Parts()
        text.tokens.close(own)
        taken.count("response.output_text.delta.", own)

    def _all(self) -> Iterator[_Text]:
        for texts in self._texts.values():
            yield from texts

    def _all_at(self, there: Slot) -> Iterator[_Text]:
        """Every text at this place, or in what stands there."""
        for (place, _), texts in self._texts.items():
            if place[: len(there)] == there:
                yield from texts

    # judged

    async def _turn(self, keys: Sequence[tuple[Slot, Channel]]) -> None:
        """Other texts get their turn: what came before them is judged first, so that it makes no difference whether
        events come one by one or many at once."""
        if self._working and [(text.channel.slot, text.channel.kind) for text in self._working] != list(keys):
            await self._judge()

    def _note_work(self, text: _Text) -> None:
        if text not in self._working:
            self._working.append(text)

    async def _judge(self) -> None:
        work, self._working = self._working, []
        if work and not self._blocked:
            self._blocked = any(await asyncio.gather(*(text.judge() for text in work)))

    async def _advance(self) -> bytes:
        """Judge all that is new; returns what may go out."""
        await self._judge()
        sent: list[bytes] = []
        if self.retry is not None and not self._blocked:
            self._send_waiting(sent)
            if self._may_go_on:
                return b"".join(sent)
        if self.retry is not None:
            self._give_up()
        if self._ending or self._blocked:
            await self._conclude()
        self._send_waiting(sent)
        if self._blocked:
            sent += map(self._send, self._shown.closing())
            if any(ending_of(one) is InterventionKind.REPLACE for one in self.decisions):
                sent += map(self._send, self._told(self.decisions[0]))
            sent.append(self._send(self._filtered()))
            self.done = True
        elif self._ending:
            self.done = self.complete = True
        return b"".join(sent)

    def _send_waiting(self, sent: list[bytes]) -> None:
        while self._waiting:
            said, complete = self._waiting[0].ready()
            if said is not None:
                sent.append(self._send(said))
            if not complete:
                return
            self._waiting.popleft()

    # out

    def _send(self, said: Mapping[str, Any]) -> bytes:
        if said["type"] in _ENDS:
            said = {**said, "response": {**said["response"], OUR_FIELD: self._field}}
        self._shown.note(said)
        self._number += 1
        return numbered(self._number - 1, said)

    def _told(self, decision: Decision) -> Iterator[dict[str, Any]]:
        """The events of an item with the policy's message, behind what has left."""
        message = self._judging.policy.message_for(decision.rule, self._judging.scope.language)
        yield from events_of(self._shown.next_place, said_by_policy(message), lambda text: [text])

    def _filtered(self) -> dict[str, Any]:
        """The last event of a response that the policy stopped."""
        head = self._shown.head or new_response(self._asked, self._model)
        usage = head.get("usage") or NO_USAGE
        response = {**head, **FILTERED, "output": self._shown.output, "usage": usage}
        return {"type": "response.incomplete", "response": response}

    async def _conclude(self) -> None:
        """Decide on the response, and keep the decision."""
        if self._concluded:
            return
        self._concluded = True
        decided: list[tuple[Decision, str | None]] = [
            (decision, text.channel.path)
            for text in self._all()
            if (decision := text.channel.moderator.close() or text.channel.moderator.decision) is not None
        ]
        unjudged = self._unjudged
        if unjudged is not None and unjudged.action >= BLOCKS and not any(one.action >= BLOCKS for one, _ in decided):
            decided.append((unjudged, None))
        taken = self._taken()
        for text in self._all():
            self._close_tokens(text, taken)
        for name, characters in taken.dropped.items():
            self._dropped[name] = self._dropped.get(name, 0) + characters
        self.released = sum(text.channel.moderator.released for text in self._all())
        coverage = [part for text in self._all() for part in text.channel.moderator.coverage]
        coverage += _unseen(self._dropped)
        if self._judging.delayed is not None and self._texts:
            self._judging.delayed(max(text.channel.moderator.delay_s for text in self._all()))
        if not decided:
            self._field = undecided_field(self._judging.policy, coverage)
            return
        listed = [decision for decision, _ in decided]
        number = self._judging.worst(listed)
        path = decided[number][1]
        decision = of_stream(listed, number, coverage)
        if unjudged is not None and decision.observed is None:
            decision = replace(decision, observed=unjudged.observed)
        self.decisions = (decision,)
        turn = turn_of((place, kind, text.text) for (place, kind), texts in self._texts.items() for text in texts)
        identity = await self._judging.keep(decision, self._judging.prompt.then(turn))
        self._field = decision_field(decision, self._judging.policy, path=path, identity=identity)

    async def _end(self, error: UpstreamError | None) -> bytes:
        """Judge and let out what is left, then say what went wrong."""
        error = error or UpstreamError("the upstream broke off before its answer was complete")
        if self._rolled_back():
            self.error = error
            return await self.give_up()
        for text in self._all():
            if not text.ended:
                text.end()
                self._note_work(text)
        sent = await self._advance()
        if self.done or self.retry is not None:
            return sent
        await self._conclude()
        self.done = True
        self.error = error
        problem = Problem(502, str(self.error), "upstream_error", None, "upstream_error")
        return sent + error_event(self._number, problem)


def _expect_places(said: Mapping[str, Any], *names: str) -> None:
    if not all(is_place(said.get(name)) for name in names):
        raise UpstreamError("the upstream sent an event without a proper place")


def _first_delta(place: Slot, channel: Channel, identity: Any) -> dict[str, Any] | None:
    """The event with which deltas of the text at a place begin, without its text; None when no delta can."""
    for kind, streamed in STREAMED.items():
        steps = [step for step in streamed.place if not step.endswith("_index")]
        if streamed.channel is channel and [step for step in place if isinstance(step, str)] == steps:
            where = dict(zip(streamed.places, (step for step in place if isinstance(step, int)), strict=False))
            more: dict[str, Any] = {"logprobs": []} if kind == "response.output_text" else {}
            if len(where) == len(streamed.places):
                return {"type": f"{kind}.delta", "item_id": identity, **where, **more}
    return None


def _unseen(dropped: Mapping[str, int]) -> Iterator[Coverage]:
    for name, characters in dropped.items():
        yield Coverage(name, Channel.ANSWER, CoverageState.NOT_JUDGED, characters)


# --- a whole response ---------------------------------------------------------------------------------------------


async def judge_response(
    answer: Any, judging: Judging, asked: Mapping[str, Any]
) -> tuple[dict[str, Any], Decision | None]:
    """Judge a whole response; returns what may go to the client, and the decision when there was text.

    A blocked one has the policy's message as its output, and the status ``incomplete``.

    Args:
        answer: what the upstream said.
        judging: what it is judged with.
        asked: the request that it answers.

    Raises:
        UpstreamError: when it is not a response.
        StoreError: when the decision could not be kept.
    """
    if not isinstance(answer, dict) or "output" not in answer:
        raise UpstreamError("the upstream's answer is not a response")
    taken = Taken.by(judging)
    response = take_response(answer, asked, (), taken)
    unseen = tuple(_unseen(taken.dropped))
    unjudged = judging.refused() if unseen else None
    refused = [unjudged] if unjudged is not None and unjudged.action >= BLOCKS else []
    if not taken.texts and not refused:
        return {**response, OUR_FIELD: undecided_field(judging.policy, unseen)}, None
    names = {one.slot[:2]: one.text for one in taken.texts if one.slot[-1] == "name"}
    names |= {("output", place): item["name"] for place, item in enumerate(response["output"]) if item.get("name")}
    thought = "\n".join(one.text for one in taken.texts if one.channel is Channel.REASONING)
    work = (_judge(one, names.get(one.slot[:2], ""), thought, judging) for one in taken.texts)
    decided = await asyncio.gather(*work)
    if not any(one.action >= BLOCKS for one in decided):
        decided += refused
    number = judging.worst(decided)
    coverage = (*(part for one in decided for part in one.coverage), *unseen)
    characters = sum(len(one.text) for one in taken.texts)
    decision = of_whole(judging.policy, decided, number, coverage, characters)
    if unjudged is not None and decision.observed is None:
        decision = replace(decision, observed=unjudged.observed)
    turn = turn_of((one.slot, one.channel, one.text) for one in taken.texts)
    identity = await judging.keep(decision, judging.prompt.then(turn))
    path = path_of(taken.texts[number].slot) if number < len(taken.texts) else None
    response[OUR_FIELD] = decision_field(decision, judging.policy, path=path, identity=identity)
    if decision.action >= BLOCKS:
        message = said_by_policy(judging.policy.message_for(decision.rule, judging.scope.language))
        output = [] if ending_of(decision) is InterventionKind.CUT else [message]
        return {**response, **FILTERED, "error": None, "output": output}, decision
    for one, said in zip(taken.texts, decided, strict=False):
        masked = value_of(mask(one.text)[0], one.value) if said.action is Action.REDACT else one.value
        fill(response, one.slot, masked)
        if one.slot in taken.tokens and said.action is not Action.REDACT:
            fill_tokens(response, one.slot, taken.tokens[one.slot])
    return response, decision


async def _judge(one: Found, name: str, thought: str, judging: Judging) -> Decision:
    called = name if one.channel is Channel.TOOL_CALL and one.slot[-1] != "name" else ""
    said = await judge_text(judging, one.channel, path_of(one.slot), one.text, reasoning=thought, name=called)
    return as_found(said, one.text)
