"""Answers of Anthropic's Messages API, judged before they leave: `MessageStream` for one that streams, and
`judge_message` for a whole one.

No sockets here: bytes of the upstream go in, bytes for the client come out, in the order of the upstream's events.

- The text blocks of an answer are one text, and so are its thinking blocks: harm that is spread over blocks is still
  seen. Blocks that follow each other are joined as they are; where another block stood between them, by a line break
  that only the guard sees. The guard is told of the thinking so far, and of the called tool.
- A delta leaves with as much of its text as was released; what must be judged whole (citations, what a server's tool
  found, tools that were not offered) leaves when it is. Nothing overtakes anything, but for pings.
- A text is taken to be complete when another begins. Should it go on, it is judged again from its beginning.
- Signatures pass unchanged behind the thinking that they sign. Encrypted data passes, and the coverage says that it
  was not judged. Unknown events, deltas and blocks do not pass, and the coverage counts their text.
- On a BLOCK the open block is closed, and the message ends with the stop_reason ``refusal``; where the policy says
  replace, a block with its message comes before that.
- Masked text leaves in the place of what it covers, in the values of a call's input and of a tool's result too.
- A text is rolled back while nothing but text has left. What the upstream says then goes on in the block that is open,
  in the same message: its own beginning does not pass, and its blocks are numbered behind those that left.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final

from tidegate.errors import UpstreamError
from tidegate.gateway.channels import BLOCKS, Judging, TextChannel, as_found, due_of, judge_text, of_stream, of_whole
from tidegate.gateway.deltas import Parts, is_place, without_text
from tidegate.gateway.messages_blocks import (
    FLOWS,
    Taken,
    Whole,
    head_of,
    labelled_fields,
    put_whole,
    stop_details_of,
    stop_reason_of,
    stop_sequence_of,
    take_block,
    take_citation,
    usage_of,
)
from tidegate.gateway.schemas import decision_field, is_name, json_of, mended, undecided_field
from tidegate.gateway.sse import EventReader, event
from tidegate.gateway.statuses import ANTHROPIC_KINDS, Problem
from tidegate.gateway.unescaped import unescaped
from tidegate.moderate import Retry, ending_of
from tidegate.personal import mask
from tidegate.types import (
    Action,
    Channel,
    Coverage,
    CoverageState,
    Decision,
    InterventionKind,
    Role,
    Span,
    ToolCall,
    Turn,
)

__all__ = ["MessageStream", "error_body", "judge_message", "named_event", "refused", "stopped_by", "text_block"]

_DELTAS: Final = {"text_delta": ("text", "text"), "thinking_delta": ("thinking", "thinking")}
"""The deltas that carry text that flows: the type of their blocks, and the field of the text."""


def named_event(content: Mapping[str, Any]) -> bytes:
    """One event under the name that its ``type`` says."""
    return b"event: %b\n%b" % (content["type"].encode(), event(content))


def _reported(body: Mapping[str, Any]) -> UpstreamError:
    """The upstream's own error in the middle of a stream; of what it says, only the kind is told."""
    error = body.get("error")
    kind = error.get("type") if isinstance(error, dict) else None
    status = next((status for status, name in ANTHROPIC_KINDS.items() if name == kind and status != 503), 500)
    return UpstreamError("the upstream reported an error in the middle of its answer", status=status)


def error_body(problem: Problem) -> dict[str, Any]:
    """An error in Anthropic's shape."""
    return problem.anthropic_body


def stopped_by(message: str) -> dict[str, Any]:
    """How a message stopped that was blocked; ``message`` is the policy's."""
    details = {"type": "refusal", "category": None, "explanation": message}
    return {"stop_reason": "refusal", "stop_sequence": None, "stop_details": details}


def refused(
    head: Mapping[str, Any], message: str, usage: Mapping[str, Any], field: Any, *, cut: bool = False
) -> dict[str, Any]:
    """A whole message that says the policy's message instead of what was blocked, or nothing where it is cut."""
    content = [] if cut else [{"type": "text", "text": message, "citations": None}]
    usage = {"input_tokens": 0, "output_tokens": 0, **usage}
    return {**head, "content": content, **stopped_by(message), "usage": usage, "tidegate": field}


def text_block(index: int, text: str) -> tuple[dict[str, Any], ...]:
    """The events of a block that has this text."""
    return (
        {
            "type": "content_block_start",
            "index": index,
            "content_block": {"type": "text", "text": "", "citations": None},
        },
        {"type": "content_block_delta", "index": index, "delta": {"type": "text_delta", "text": text}},
        {"type": "content_block_stop", "index": index},
    )


# --- where a text stands ------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Place:
    """A stretch of a text that flows through several blocks."""

    path: str
    start: int
    end: int


class _Flow:
    """One text that may flow through several blocks, and where each part of it stands."""

    __slots__ = ("places",)

    def __init__(self) -> None:
        self.places: list[_Place] = []

    def add(self, path: str, start: int, length: int) -> None:
        """So many characters from ``start`` on stand at this path."""
        if not self.places or self.places[-1].path != path:
            self.places.append(_Place(path, start, start))
        self.places[-1].end = start + length

    def crop(self, end: int) -> None:
        """Nothing stands from this character on any more."""
        self.places[1:] = [place for place in self.places[1:] if place.start < end]
        self.places[-1].end = min(self.places[-1].end, end)

    def where(self, span: Span | None) -> tuple[str, Span | None]:
        """The path that a span lies in, and the same span there; in several blocks, as ``content[0]-content[2].text``,
        and the characters of these joined."""
        for place in self.places:
            if span is not None and place.start <= span.start and span.end <= place.end:
                return place.path, Span(span.start - place.start, span.end - place.start)
        first, last = self.places[0].path, self.places[-1].path
        return (first if first == last else f"{first.rpartition('.')[0]}-{last}"), span

    def coverage(self, said: Iterable[Coverage]) -> Iterator[Coverage]:
        """What became of the part in each block, given what became of the whole text, from its beginning on."""
        begun = 0
        for part in said:
            end = begun + part.characters
            for place in self.places:
                count = min(end, place.end) - max(begun, place.start)
                if count > 0:
                    yield replace(part, path=place.path, characters=count)
            begun = end


def _dropped(fields: Mapping[str, int]) -> Iterator[Coverage]:
    for name, characters in fields.items():
        if characters:
            yield Coverage(name, Channel.ANSWER, CoverageState.NOT_JUDGED, characters)


def _turn(said: Iterable[tuple[Channel, str, str]]) -> Turn:
    """The assistant turn that has these texts: each with its channel, and the name of the called tool."""
    content: list[str] = []
    reasoning: list[str] = []
    calls: list[ToolCall] = []
    for channel, text, name in said:
        if channel is Channel.REASONING:
            reasoning.append(text)
        elif channel is Channel.TOOL_CALL:
            calls.append(ToolCall(name, text))
        else:
            content.append(text)
    return Turn(Role.ASSISTANT, "\n".join(content), "\n".join(reasoning), tuple(calls))


def _observing(decision: Decision, unjudged: Decision | None) -> Decision:
    """The same, which also tells what the policy would have done about text that nobody can judge."""
    return decision if unjudged is None or decision.observed else replace(decision, observed=unjudged.observed)


def _any_blocks(decisions: Iterable[Decision]) -> bool:
    """Whether a verdict stops it already: that says more than that there was text which nobody could judge."""
    return any(decision.action >= BLOCKS for decision in decisions)


def _decision_field(decision: Decision, judging: Judging, flow: _Flow | None, identity: str | None) -> dict[str, Any]:
    """What stands in our field ``tidegate``, with the place of the verdict in its block."""
    if flow is None:
        return decision_field(decision, judging.policy, identity=identity)
    span = decision.verdict.span if decision.verdict else None
    path, span = flow.where(span)
    if decision.verdict is not None:
        decision = replace(decision, verdict=replace(decision.verdict, span=span))
    return decision_field(decision, judging.policy, path=path, identity=identity)


# --- a streaming answer -------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Watched:
    """A text of the answer, and what judges it."""

    channel: TextChannel
    flow: _Flow
    name: str = ""
    length: int = 0
    """How many characters came in, those included that only the guard sees."""
    put: Callable[[str], None] | None = None
    """Puts a masked text in the place of one that leaves whole; None for a text that flows."""


@dataclass(slots=True)
class _Block:
    """A content block on its way."""

    number: int
    kind: str
    name: str
    begun: bool = False
    ended: bool = False
    citations: int = 0
    call: _Watched | None = None
    escape: str = ""
    """The beginning of an escape in the input of a call, at its end so far."""


def _delta_event(block: _Block, delta: dict[str, Any], rest: dict[str, Any]) -> dict[str, Any]:
    return {"type": "content_block_delta", "index": block.number, "delta": delta, **rest}


@dataclass(slots=True)
class _Waiting:
    """An event that waits for its turn, and for its text.

    Attributes:
        event: as it leaves; None for text that only the guard sees.
        text: what flows in it, not gone out yet; "" for none.
        watched: the text that it is part of.
        put: the field of the event's delta that the text stands in.
        wholes: the texts that must be judged whole before it leaves.
        hides: whether there is data in it that nobody can judge.
        begins, ends: the block that it opens or closes.
        last: whether it says how the message stopped.
    """

    event: dict[str, Any] | None
    text: str = ""
    watched: _Watched | None = None
    put: str = ""
    wholes: Sequence[_Watched] = ()
    hides: bool = False
    begins: _Block | None = None
    ends: _Block | None = None
    last: bool = False


class MessageStream:
    """An answer on its way through: the upstream's bytes in, the client's bytes out.

    Args:
        judging: what it is judged with.
        stops: the request's stop sequences.

    Attributes:
        done: whether all is said: what comes from the upstream after that is of no use.
        complete: whether the upstream itself said that it has no more to say.
        error: what went wrong with the upstream; None when nothing did.
        decisions: the decision on the message, when it has one.
        released: how many characters of text went out.
    """

    def __init__(self, judging: Judging, *, stops: frozenset[str] = frozenset()) -> None:
        self.done = False
        self.complete = False
        self.error: UpstreamError | None = None
        self.decisions: list[Decision] = []
        self.released = 0
        self._judging = judging
        self._stops = stops
        self._reader = EventReader()
        self._known = judging.known({})
        self._parts = Parts(passing=judging.passing)
        self._unjudged: Decision | None = None
        self._hidden: list[Coverage] = []
        self._texts: list[_Watched] = []
        self._flows: dict[str, _Watched] = {}
        self._flowing: _Watched | None = None
        self._blocks: dict[int, _Block] = {}
        self._count = 0
        self._begun = False
        self._stopping = False
        self._concluded = False
        self._blocked = False
        self._field: dict[str, Any] | None = None
        self._message = ""
        self._usage: dict[str, Any] = {}
        self._waiting: deque[_Waiting] = deque()
        self._pings = 0
        self._shown = 0
        self._replaces = False
        self._resumed = False
        self._fixed = False
        self._left: _Block | None = None
        self._overlap = ""

    @property
    def retry(self) -> Retry | None:
        """From where the upstream is to go on, instead of what it says now; None while it need not."""
        text = self._flows.get("text")
        return None if text is None or self._concluded else text.channel.retry

    @property
    def due_s(self) -> float | None:
        """In how many seconds `late` is to be called if nothing comes before, at least 0; None for never."""
        return None if self._concluded else due_of(one.channel for one in self._texts)

    async def late(self) -> bytes:
        """Nothing came, and what is held may be held no longer. Raises StoreError."""
        for one in self._texts:
            self._blocked = one.channel.late() or self._blocked
        return await self._advance()

    def resume(self) -> None:
        """What is fed next is what the upstream says after it was asked to go on."""
        text = self._flows["text"]
        for other in self._texts:
            if other is not text:
                other.channel.moderator.close()
        self._reader = EventReader()
        self.complete = self._stopping = self._begun = False
        self._resumed = True
        self._texts, self._flows, self._flowing = [text], {"text": text}, text
        self._left = next(self._open_blocks(), None)
        if self._left is not None:
            self._left.ended = False
        self._blocks = {}
        self._count = self._shown
        self._hidden.clear()
        self._waiting.clear()
        text.channel.go_on()
        text.length = text.channel.moderator.released
        text.flow.crop(text.length)
        left = text.channel.text
        self._overlap = left[len(left.rstrip()) :]

    async def give_up(self) -> bytes:
        """The upstream cannot go on: the message ends as the policy says then. Raises StoreError."""
        self._give_up()
        return await self._advance()

    def _give_up(self) -> None:
        text = self._flows.get("text")
        if text is not None and text.channel.moderator.rolled_back:
            self._waiting.clear()
            text.channel.give_up()
            self._blocked = True

    @property
    def _may_go_on(self) -> bool:
        """Whether the text can be written anew: only text has left, and all of it that may leave."""
        return not self._fixed and not self._flows["text"].channel.ready and len(list(self._open_blocks())) <= 1

    def _open_blocks(self) -> Iterator[_Block]:
        """The blocks that the client has seen begin, and not end."""
        blocks = [*self._blocks.values()]
        if self._left is not None and self._left not in blocks:
            blocks.append(self._left)
        return (block for block in blocks if block.begun)

    @property
    def held(self) -> int:
        """How many characters are held now."""
        return 0 if self._concluded else sum(watched.channel.held for watched in self._texts)

    async def feed(self, data: bytes) -> bytes:
        """Take what the upstream sent; returns what may go to the client now, b"" when that is nothing.

        Raises:
            StoreError: when a decision could not be kept.
        """
        error: UpstreamError | None = None
        try:
            for content in self._reader.feed(data):
                self._take(content)
                if self.complete:
                    break
        except UpstreamError as failed:
            error = failed
        except RecursionError:
            error = UpstreamError("the upstream sent an event that is nested too deep")
        sent = await self._advance()
        if error is not None and not self.done and self.retry is None:
            sent += await self._end(error)
        return sent

    async def end(self, error: UpstreamError | None = None) -> bytes:
        """The upstream has no more to say, or broke off with an error; returns the end for the client.

        Raises:
            StoreError: when a decision could not be kept.
        """
        sent = b"" if self.done or error is not None else await self.feed(b"\n\n")
        if self.done or self.retry is not None:
            return sent
        if error is None and not self._stopping:
            error = UpstreamError("the upstream broke off before its answer was complete")
        return sent + await self._end(error)

    async def close(self) -> None:
        """Nobody listens any more: give everything back, and keep the decision on what was judged so far."""
        self.done = True
        try:
            if not self._concluded:
                await self._conclude()
        finally:
            for watched in self._texts:
                watched.channel.moderator.close()

    # in

    def _take(self, content: bytes) -> None:
        try:
            body = json_of(content.decode())
        except ValueError:
            raise UpstreamError("the upstream sent an event that is not JSON") from None
        if not isinstance(body, dict) or not isinstance(body.get("type"), str):
            raise UpstreamError("the upstream sent an event without a type")
        kind = body.pop("type")
        if kind == "ping":
            self._pings += 1
        elif kind == "error":
            raise _reported(body)
        elif kind == "message_start":
            self._take_start(body)
        elif not self._begun:
            raise UpstreamError("the upstream sent an event before the message began")
        elif kind == "message_stop":
            self.complete = True
            self._stop(None)
        elif self._stopping:
            return
        elif kind == "content_block_start":
            self._take_block_start(body)
        elif kind == "content_block_delta":
            self._take_delta(body)
        elif kind == "content_block_stop":
            self._take_block_stop(body)
        elif kind == "message_delta":
            self._take_message_delta(body)
        else:
            self._parts.drop(kind, body)
            if self._parts.passing and is_name(kind):
                self._waiting.append(_Waiting({"type": kind, **body}))

    def _take_start(self, body: dict[str, Any]) -> None:
        message = body.pop("message", None)
        if self._begun or not isinstance(message, dict):
            raise UpstreamError("the upstream began a message twice, or without saying what it is")
        self._begun = True
        if message.get("content"):
            self._parts.drop("content", message["content"], "message.")
        self._usage = usage_of(message, self._parts)
        if self._resumed:
            return
        start = {
            **head_of(message, self._known, self._parts),
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {"input_tokens": 0, "output_tokens": 0, **self._usage},
        }
        self._waiting.append(_Waiting({"type": "message_start", "message": start, **self._rest(body)}))

    def _rest(self, body: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        """The fields that we do not know, as far as they carry no text."""
        return without_text(body, {}, self._judging.trusted, self._parts, prefix)

    def _take_block_start(self, body: dict[str, Any]) -> None:
        index, content = body.pop("index", None), body.pop("content_block", None)
        if not is_place(index) or index in self._blocks:
            raise UpstreamError("the upstream sent a content block without a proper index")
        taken = take_block(content, self._known, self._parts, f"content[{self._count}]")
        if taken is None:
            self._blocks[index] = _Block(-1, "", "", ended=True)
            return
        if self._left is not None and taken.kind == "text" and not taken.wholes:
            self._blocks[index], self._left = self._left, None
            if taken.flow:
                self._take_flow(self._blocks[index], "text", "text_delta", taken.flow, {}, {})
            return
        self._end_left()
        block = self._blocks[index] = _Block(self._count, taken.kind, taken.name)
        self._count += 1
        self._hidden += taken.hidden
        if self._flowing is not None and self._flowing is not self._flows.get(taken.kind):
            self._flowing.channel.ending = True
            self._flowing = None
        start = {"type": "content_block_start", "index": block.number, "content_block": taken.plain, **self._rest(body)}
        wholes = [
            self._whole(one, f"content[{block.number}]{one.path}", partial(put_whole, taken.plain, one.slot))
            for one in taken.wholes
        ]
        self._waiting.append(_Waiting(start, wholes=wholes, hides=bool(taken.hidden), begins=block))
        if taken.flow:
            self._take_flow(block, taken.kind, f"{taken.kind}_delta", taken.flow, {}, {})

    def _end_left(self) -> None:
        """The block in which the text was rolled back does not go on."""
        block, self._left = self._left, None
        if block is not None:
            stop = {"type": "content_block_stop", "index": block.number}
            self._blocks[-1] = block  # it is open until that has left
            self._waiting.append(_Waiting(stop, ends=block))

    def _whole(self, whole: Whole, path: str, put: Callable[[Any], None]) -> _Watched:
        watched = self._open(whole.channel, path, whole.name, retries=False)
        watched.put = lambda text: put(whole.masked(text))
        watched.length = len(watched.channel.add(whole.text))
        watched.flow.add(path, 0, watched.length)
        watched.channel.ending = True
        return watched

    def _open(self, channel: Channel, path: str, name: str = "", *, retries: bool = True) -> _Watched:
        """Begin another text."""
        judging = self._judging if retries else replace(self._judging, retries=False)
        thinking = self._flows.get("thinking")
        thought = "" if channel is Channel.REASONING or thinking is None else thinking.channel.text
        text = TextChannel(judging, (path,), channel, path, reasoning=thought, name=name)
        watched = _Watched(text, _Flow(), name)
        self._texts.append(watched)
        return watched

    def _take_delta(self, body: dict[str, Any]) -> None:
        block = self._block(body.pop("index", None))
        delta = body.pop("delta", None)
        if not isinstance(delta, dict) or not isinstance(delta.get("type"), str):
            raise UpstreamError("the upstream sent a delta without a type")
        if block is None:
            self._parts.drop("delta", delta)
            return
        delta = dict(delta)
        kind = delta.pop("type")
        flows = _DELTAS.get(kind)
        if flows is not None and flows[0] == block.kind:
            text = delta.pop(flows[1], "")
            self._take_flow(block, block.kind, kind, text, delta, body)
        elif kind == "input_json_delta" and block.kind.endswith("tool_use"):
            self._take_flow(block, "input", kind, delta.pop("partial_json", ""), delta, body)
        elif kind == "signature_delta" and block.kind == "thinking":
            self._take_signature(block, delta, body)
        elif kind == "citations_delta" and block.kind == "text":
            self._take_citation(block, delta, body)
        else:
            self._parts.drop(kind, delta, f"content[{block.number}].")
            if self._parts.passing:
                self._waiting.append(_Waiting(_delta_event(block, {"type": kind, **delta}, self._rest(body))))

    def _block(self, index: Any) -> _Block | None:
        """The open block of this index; None when it is one that does not pass."""
        block = self._blocks.get(index) if is_place(index) else None
        if block is None or (block.ended and block.number >= 0):
            raise UpstreamError("the upstream sent something for a content block that is not open")
        return block if block.number >= 0 else None

    def _take_flow(
        self, block: _Block, of: str, kind: str, text: Any, delta: dict[str, Any], rest: dict[str, Any]
    ) -> None:
        """Text that flows: of the answer, of the thinking, or of the input of one call."""
        if not isinstance(text, str):
            raise UpstreamError("the upstream sent a text in a shape that is not known")
        put, begun = of, text
        if of == "text" and self._overlap:
            text = self._without_overlap(text)
        if of == "input":
            put = "partial_json"
            text, block.escape = unescaped(block.escape + text)
        plain = {"type": kind, **self._rest(delta, f"content[{block.number}].")}
        told = _delta_event(block, plain, self._rest(rest))
        if not text:
            if not begun:
                self._waiting.append(_Waiting({**told, "delta": {**plain, put: ""}}))
            return
        self._flow(block, of, text, told, put)

    def _without_overlap(self, text: str) -> str:
        """The text without white space that has left already: it may not stand at the end of what is to go on."""
        while text and self._overlap:
            if text[0] != self._overlap[0]:
                self._overlap = ""
                break
            text, self._overlap = text[1:], self._overlap[1:]
        return text

    def _flow(self, block: _Block, of: str, text: str, told: dict[str, Any], put: str) -> None:
        """Let a piece of text wait for its turn."""
        watched = self._watched(block, of)
        path = f"content[{block.number}].{of}"
        if self._flowing is not watched:
            if self._flowing is not None:
                self._flowing.channel.ending = True
            if watched.length:  # something else stood between: a line break that only the guard sees
                watched.length += len(watched.channel.add("\n"))
                self._waiting.append(_Waiting(None, "\n", watched))
            self._flowing = watched
        taken = watched.channel.add(text)
        if taken:
            watched.flow.add(path, watched.length, len(taken))
            watched.length += len(taken)
            self._waiting.append(_Waiting(told, taken, watched, put))

    def _watched(self, block: _Block, of: str) -> _Watched:
        """The text that goes on in a block: one for all text blocks, one for all thinking, one for each call."""
        if of == "input":
            if block.call is None:
                block.call = self._open(Channel.TOOL_CALL, f"content[{block.number}].input", block.name)
            return block.call
        if of not in self._flows:
            self._flows[of] = self._open(FLOWS[of], f"content[{block.number}].{of}")
        return self._flows[of]

    def _take_signature(self, block: _Block, delta: dict[str, Any], rest: dict[str, Any]) -> None:
        checked = take_block(
            {"type": "thinking", "signature": delta.pop("signature", "")},
            self._known,
            self._parts,
            f"content[{block.number}]",
        )
        assert checked is not None
        if checked.plain["signature"]:
            plain = {"type": "signature_delta", "signature": checked.plain["signature"]}
            plain |= self._rest(delta, f"content[{block.number}].")
            self._waiting.append(_Waiting(_delta_event(block, plain, self._rest(rest))))

    def _take_citation(self, block: _Block, delta: dict[str, Any], rest: dict[str, Any]) -> None:
        place = f"content[{block.number}]"
        taken = Taken("text")
        citation = take_citation(taken, delta.pop("citation", None), block.citations, self._parts, place)
        block.citations += 1
        self._hidden += taken.hidden
        plain = {"type": "citations_delta", "citation": citation, **self._rest(delta, f"{place}.")}
        put = partial(put_whole, plain, ("citation",))
        wholes = [self._whole(one, f"{place}{one.path}", put) for one in taken.wholes]
        self._waiting.append(
            _Waiting(_delta_event(block, plain, self._rest(rest)), wholes=wholes, hides=bool(taken.hidden))
        )

    def _take_block_stop(self, body: dict[str, Any]) -> None:
        block = self._block(body.pop("index", None))
        if block is None:
            return
        if block.escape:  # nothing completes it: it is no JSON
            delta = {"type": "input_json_delta"}
            self._flow(block, "input", block.escape, _delta_event(block, delta, {}), "partial_json")
        block.ended = True
        stop = {"type": "content_block_stop", "index": block.number, **self._rest(body)}
        self._waiting.append(_Waiting(stop, ends=block))

    def _take_message_delta(self, body: dict[str, Any]) -> None:
        delta = body.pop("delta", None) or {}
        if not isinstance(delta, dict):
            raise UpstreamError("the upstream sent a message's delta in a shape that is not known")
        used = usage_of(body, self._parts)
        self._usage = {**self._usage, **used}
        if self._resumed:  # the message began with what the first request used
            used = {name: value for name, value in self._usage.items() if is_place(value)}
        body.pop("usage", None)
        details, explanation = stop_details_of(delta, self._parts)
        plain: dict[str, Any] = {
            "stop_reason": stop_reason_of(delta, self._parts),
            "stop_sequence": stop_sequence_of(delta, self._stops, self._parts),
        }
        if details is not None:
            plain["stop_details"] = details
        known = {"container", "stop_details", "stop_reason", "stop_sequence"}
        if "container" in delta:
            plain["container"] = labelled_fields("container", delta["container"], self._parts)
        plain |= self._rest({name: value for name, value in delta.items() if name not in known})
        managed = body.pop("context_management", None)
        told = {
            "type": "message_delta",
            "delta": plain,
            "usage": {"output_tokens": self._usage.get("output_tokens") or 0, **used},
            **self._rest(body),
        }
        if managed is not None:
            told["context_management"] = labelled_fields("context_management", managed, self._parts)
        wholes = []
        if explanation is not None and details is not None:
            wholes.append(self._whole(explanation, explanation.path, partial(put_whole, details, explanation.slot)))
        if plain["stop_reason"] is None:
            self._waiting.append(_Waiting(told, wholes=wholes))
        else:
            self._stop(_Waiting(told, wholes=wholes, last=True))

    def _stop(self, last: _Waiting | None) -> None:
        """The message has stopped: all its texts are complete."""
        if not self._stopping:
            self._stopping = True
            self._end_left()
            if last is None:
                delta = {"stop_reason": None, "stop_sequence": None}
                usage = {"output_tokens": self._usage.get("output_tokens") or 0}
                last = _Waiting({"type": "message_delta", "delta": delta, "usage": usage}, last=True)
            self._waiting.append(last)
        for watched in self._texts:
            watched.channel.ending = True

    # judged

    async def _advance(self) -> bytes:
        """Judge all that is new; returns what may go out."""
        sent: list[bytes] = []
        pings, self._pings = self._pings, 0
        work = [] if self._concluded else [one.channel for one in self._texts if one.channel.has_work]
        if len(work) == 1:
            calls = [await work[0].judge()]
        else:
            calls = await asyncio.gather(*(channel.judge() for channel in work))
        if self.retry is not None and not self._blocked and not self._refuses():
            self._send_waiting(sent)
            if self._may_go_on:
                return b"".join(sent)
        if self.retry is not None:
            self._give_up()
        self._blocked = self._blocked or any(calls) or self._refuses()
        if self._stopping and not self._blocked and not self._concluded:
            await self._conclude()
        self._send_waiting(sent)
        if self._blocked and not self._concluded:
            await self._conclude()
            self._cut(sent)
        elif self.complete and not self._waiting:
            self._finish(sent)
        else:
            sent += [named_event({"type": "ping"})] * pings
        return b"".join(sent)

    def _refuses(self) -> bool:
        """Whether there is text that nobody can judge, and the policy takes no such answer."""
        if self._unjudged is None and (self._hidden or any(self._parts.dropped.values())):
            self._unjudged = self._judging.refused()
        return self._unjudged is not None and self._unjudged.action >= BLOCKS

    def _send_waiting(self, sent: list[bytes]) -> None:
        while self._waiting:
            one = self._waiting[0]
            held = any(len(whole.channel.ready) < whole.length for whole in one.wholes)
            if held or (one.hides and self._refuses()) or (one.last and not self._concluded):
                return
            text = self._ready(one)
            if one.text and not text:
                return
            other = one.begins is not None and one.begins.kind != "text"
            self._fixed = self._fixed or other or one.hides or bool(one.wholes)
            self.released += sum(whole.length for whole in one.wholes)
            for whole in one.wholes:
                if whole.put is not None and whole.channel.ready != whole.channel.text:
                    whole.put(whole.channel.ready)
                whole.channel.ready = ""
            one.wholes = ()
            one.text = one.text[len(text) :]
            if one.event is not None:
                sent.append(self._event(one, text))
            if one.text:
                return
            self._waiting.popleft()

    def _ready(self, one: _Waiting) -> str:
        """The text of an event that may leave now."""
        if one.watched is None or not one.text:
            return ""
        channel = one.watched.channel
        text = channel.ready[: len(one.text)]
        channel.ready = channel.ready[len(text) :]
        if one.event is not None:
            self.released += len(text)
        return text

    def _event(self, one: _Waiting, text: str) -> bytes:
        told = dict(one.event or {})
        if one.put:
            told["delta"] = {**told["delta"], one.put: text}
        if one.begins is not None:
            one.begins.begun = True
            self._shown = one.begins.number + 1
        if one.ends is not None:
            one.ends.begun = False
        if one.last:
            told["tidegate"] = self._field
        return named_event(told)

    def _cut(self, sent: list[bytes]) -> None:
        """End the message well, with nothing of what is held."""
        self._waiting.clear()
        for block in self._open_blocks():
            sent.append(named_event({"type": "content_block_stop", "index": block.number}))
        if self._replaces:
            sent += map(named_event, self._told())
        usage = {"output_tokens": self._usage.get("output_tokens") or 0}
        delta = stopped_by(self._message)
        sent.append(named_event({"type": "message_delta", "delta": delta, "usage": usage, "tidegate": self._field}))
        self.complete = False
        self._finish(sent)

    def _told(self) -> Iterator[dict[str, Any]]:
        """A block with the policy's message, behind what has left."""
        text = self._flows.get("text")
        message = f"\n\n{self._message}" if text is not None and text.channel.moderator.released else self._message
        yield from text_block(self._shown, message)

    def _finish(self, sent: list[bytes]) -> None:
        self.done = True
        sent.append(named_event({"type": "message_stop"}))

    # out

    async def _conclude(self) -> None:
        """Decide on the message, and keep the decision."""
        self._concluded = True
        decided: list[tuple[Decision, _Flow | None]] = [
            (decision, watched.flow)
            for watched in self._texts
            if (decision := watched.channel.moderator.close() or watched.channel.moderator.decision) is not None
        ]
        coverage = [
            part for watched in self._texts for part in watched.flow.coverage(watched.channel.moderator.coverage)
        ]
        coverage += (*self._hidden, *_dropped(self._parts.dropped))
        if self._judging.delayed is not None and self._texts:
            self._judging.delayed(max(watched.channel.moderator.delay_s for watched in self._texts))
        if self._refuses() and self._unjudged is not None and not _any_blocks(one for one, _ in decided):
            decided.append((self._unjudged, None))
        if not decided:
            self._field = undecided_field(self._judging.policy, coverage)
            return
        listed = [decision for decision, _ in decided]
        number = self._judging.worst(listed)
        flow = decided[number][1]
        decision = _observing(of_stream(listed, number, coverage), self._unjudged)
        self.decisions.append(decision)
        said = [(one.channel.kind, one.channel.text, one.name) for one in self._texts if one.length]
        identity = await self._judging.keep(decision, self._judging.prompt.then(_turn(said)))
        self._field = _decision_field(decision, self._judging, flow, identity)
        self._message = self._judging.policy.message_for(decision.rule, self._judging.scope.language)
        self._replaces = ending_of(decision) is InterventionKind.REPLACE

    async def _end(self, error: UpstreamError | None) -> bytes:
        """Judge and let out what is left, then say how it ended."""
        text = self._flows.get("text")
        if error is not None and text is not None and text.channel.moderator.rolled_back:
            self.error = error
            return await self.give_up()
        for watched in self._texts:
            watched.channel.ending = True
        sent = [await self._advance()]
        if self.done or self.retry is not None:
            return sent[0]
        if not self._concluded:
            await self._conclude()
        if error is None:
            self._finish(sent)
        else:
            self.done = True
            self.error = error
            sent.append(named_event(error_body(Problem(error.status or 502, str(error), "upstream_error"))))
        return b"".join(sent)


# --- a whole answer -----------------------------------------------------------------------------------------------


async def judge_message(
    answer: Any, judging: Judging, *, stops: frozenset[str] = frozenset()
) -> tuple[dict[str, Any], Decision | None]:
    """Judge a whole message; returns what may go to the client, and the decision when it has any text.

    A blocked one says the policy's message instead, with the stop_reason ``refusal``.

    Raises:
        UpstreamError: when it is not a message.
        StoreError: when a decision could not be kept.
    """
    content = answer.get("content") if isinstance(answer, dict) else None
    if not isinstance(answer, dict) or not isinstance(content, list):
        raise UpstreamError("the upstream's answer is not a message")
    parts = Parts(passing=judging.passing)
    head = head_of(answer, judging.known({}), parts)
    usage = usage_of(answer, parts)
    found = _Found(judging, parts)
    blocks = [block for one in content if (block := found.take(one)) is not None]
    details, explanation = stop_details_of(answer, parts)
    if explanation is not None and details is not None:
        found.whole(explanation, explanation.path, partial(put_whole, details, explanation.slot))
    stop = {
        "stop_reason": stop_reason_of(answer, parts),
        "stop_sequence": stop_sequence_of(answer, stops, parts),
        **({} if details is None else {"stop_details": details}),
    }
    passed = {**head, "content": blocks, **stop, "usage": {"input_tokens": 0, "output_tokens": 0, **usage}}
    unseen = (*found.hidden, *_dropped(parts.dropped))
    unjudged = judging.refused() if unseen else None
    refusing = [unjudged] if unjudged is not None and unjudged.action >= BLOCKS else []
    if not found.texts and not refusing:
        return {**passed, "tidegate": undecided_field(judging.policy, unseen)}, None
    decided = await found.judge()
    if not _any_blocks(decided):
        decided += refusing
    number = judging.worst(decided)
    coverage = (*(part for one in decided for part in one.coverage), *unseen)
    characters = sum(len(one.text) for one in found.texts)
    decision = _observing(of_whole(judging.policy, decided, number, coverage, characters), unjudged)
    said = [(one.channel, one.text, one.name) for one in found.texts]
    identity = await judging.keep(decision, judging.prompt.then(_turn(said)))
    flow = found.texts[number].flow if number < len(found.texts) else None
    field = _decision_field(decision, judging, flow, identity)
    if decision.action >= BLOCKS:
        message = judging.policy.message_for(decision.rule, judging.scope.language)
        return refused(head, message, usage, field, cut=ending_of(decision) is InterventionKind.CUT), decision
    found.mask([one.action is Action.REDACT for one in decided])
    return {**passed, "tidegate": field}, decision


@dataclass(slots=True)
class _Text:
    """A text of a whole message."""

    channel: Channel
    flow: _Flow
    text: str = ""
    name: str = ""
    puts: list[tuple[int, int, Callable[[str], None]]] = field(default_factory=list)
    """What puts a masked part of it back, and which part that is."""


class _Found:
    """The blocks of a whole message, and the texts in them."""

    def __init__(self, judging: Judging, parts: Parts) -> None:
        self.texts: list[_Text] = []
        self.hidden: list[Coverage] = []
        self._judging = judging
        self._parts = parts
        self._flows: dict[str, _Text] = {}
        self._last = ""
        self._count = 0

    def take(self, block: Any) -> dict[str, Any] | None:
        """What passes of a block, given that all its texts do; None when nothing does."""
        place = f"content[{self._count}]"
        taken = take_block(block, self._judging.known({}), self._parts, place)
        if taken is None:
            return None
        self._count += 1
        self.hidden += taken.hidden
        if taken.kind in FLOWS:
            put = partial(put_whole, taken.plain, (taken.kind,))
            taken.plain[taken.kind] = self._add(taken.kind, mended(taken.flow), f"{place}.{taken.kind}", put)
        for whole in taken.wholes:
            self.whole(whole, f"{place}{whole.path}", partial(put_whole, taken.plain, whole.slot))
        self._last = taken.kind
        return taken.plain

    def whole(self, whole: Whole, path: str, put: Callable[[Any], None]) -> None:
        """Take a text that stands alone."""
        text = _Text(whole.channel, _Flow(), whole.text, whole.name)
        text.puts.append((0, len(whole.text), lambda masked: put(whole.masked(masked))))
        text.flow.add(path, 0, len(whole.text))
        self.texts.append(text)

    def _add(self, kind: str, text: str, path: str, put: Callable[[str], None]) -> str:
        if text:
            if kind not in self._flows:
                self._flows[kind] = _Text(FLOWS[kind], _Flow())
                self.texts.append(self._flows[kind])
            one = self._flows[kind]
            if one.text and self._last != kind:
                one.text += "\n"
            one.flow.add(path, len(one.text), len(text))
            one.puts.append((len(one.text), len(one.text) + len(text), put))
            one.text += text
        return text

    def mask(self, redacted: Sequence[bool]) -> None:
        """Take personal data out of the texts of which the policy says so."""
        for text, taken_out in zip(self.texts, redacted, strict=False):
            if taken_out:
                masked, _ = mask(text.text)
                for start, end, put in text.puts:
                    put(masked[start:end])

    async def judge(self) -> list[Decision]:
        """Judge every text by itself, as what it is."""
        return await asyncio.gather(*map(self._judge, self.texts))

    async def _judge(self, text: _Text) -> Decision:
        thought = "" if "thinking" not in self._flows else self._flows["thinking"].text
        decision = await judge_text(self._judging, text.channel, "", text.text, reasoning=thought, name=text.name)
        return replace(as_found(decision, text.text), coverage=tuple(text.flow.coverage(decision.coverage)))
