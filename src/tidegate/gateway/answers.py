"""What a model answers, judged before it leaves: `AnswerStream` for one that streams, `judge_answer` for a whole one.

No sockets here: bytes of the upstream go in, bytes for the client come out, so that every promise can be tested
without a network.

What leaves, and what does not:

- The texts of a choice (``content``, ``reasoning_content``, ``reasoning``, ``refusal``, the arguments of tool and
  function calls, and the name of a tool that the request did not offer) are judged each by itself, as what it is. In a
  stream the guard is also told of the reasoning so far and of the called tool. A chunk whose text is held goes out
  later, in its turn, with as much of its text as was released.
- Letters that are written as escapes in the arguments of a call are judged, and leave, as themselves.
- A text that another text follows is taken to be complete, so that the end of the reasoning is not held until the end
  of the answer. Should it go on, it is judged again from its beginning, and what has left is not sent twice.
- Known fields without text (ids, index, role, finish_reason, usage, model, ...) pass when they are what they should
  be: numbers, words for programs, identities. What could be a sentence does not, and identities are replaced.
- ``logprobs`` of chosen tokens leave together with the text that they spell (see `tidegate.gateway.logprobs`).
- Other tokens (``top_logprobs``) are words that the guard never saw. So is every field that we do not know and that
  could carry text: strings, arrays, and objects with either. The policy's ``unjudged_answer`` says what becomes of
  them; the coverage of their choice counts them as not judged, in characters of text. Numbers, booleans, null and what
  is empty pass.
- On a BLOCK the choice ends with a chunk whose finish_reason is ``content_filter``; the other choices go on.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from tidegate.errors import UpstreamError
from tidegate.gateway.channels import (
    BLOCKS,
    Judging,
    TextChannel,
    as_found,
    due_of,
    judge_text,
    of_stream,
    of_whole,
)
from tidegate.gateway.deltas import (
    CHOICE_FIELDS,
    TOP_FIELDS,
    Parts,
    Slot,
    Text,
    called,
    finish_reason_of,
    is_json,
    is_place,
    path_of,
    put,
    reasoning_of,
    take_apart,
    turn_of,
    without_text,
)
from tidegate.gateway.forms import CHAT, Form
from tidegate.gateway.logprobs import Tokens
from tidegate.gateway.schemas import decision_field, json_of, mended, undecided_field, worst_decision
from tidegate.gateway.sse import DONE, EventReader, event
from tidegate.gateway.statuses import Problem
from tidegate.gateway.unescaped import wholly_unescaped
from tidegate.moderate import Retry, ending_of
from tidegate.personal import mask
from tidegate.types import Action, Channel, Coverage, CoverageState, Decision, InterventionKind

__all__ = ["NO_USAGE", "AnswerStream", "judge_answer"]

NO_USAGE: Final = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
"""The usage of an answer that was cut off before its upstream told it."""

# --- one choice of a streaming answer -----------------------------------------------------------------------------


class _Piece:
    """What came in one chunk for one choice, until all of it has gone out."""

    __slots__ = (
        "_begun",
        "choice",
        "delta",
        "finish_reason",
        "frame",
        "has_tokens",
        "head",
        "masked",
        "taken",
        "texts",
    )

    def __init__(
        self,
        head: dict[str, Any],
        choice: dict[str, Any],
        delta: dict[str, Any],
        texts: list[tuple[TextChannel, str]],
        finish_reason: str | None,
        frame: Any,
        *,
        has_tokens: bool,
    ) -> None:
        self.frame = frame
        self.has_tokens = has_tokens
        self.masked = False
        self.taken: list[tuple[Slot, str]] = []
        self.head = head
        self.choice = choice
        self.delta = delta
        self.texts = texts
        self.finish_reason = finish_reason
        self._begun = False

    def next_delta(self) -> dict[str, Any] | None:
        """What of it can go out now; None when that is nothing. Afterwards ``texts`` is what remains."""
        taken: list[tuple[Slot, str]] = []
        left: list[tuple[TextChannel, str]] = []
        for channel, text in self.texts:
            ready = "" if left else channel.ready[: len(text)]
            channel.ready = channel.ready[len(ready) :]
            if ready:
                channel.begun = True
                taken.append((channel.slot, ready))
                self.masked = self.masked or not text.startswith(ready)
            if len(ready) < len(text) or left:
                left.append((channel, text[len(ready) :]))
        self.texts = left
        if left and not taken and (self._begun or not self.delta.get("role")):
            return None
        delta, self.delta = self.delta, {}
        self._begun = True
        self.taken = taken
        for slot, ready in taken:
            put(delta, slot, ready)
        return delta


class _Choice:
    """One choice of a streaming answer."""

    __slots__ = (
        "blocked",
        "called",
        "channels",
        "dropped",
        "ended",
        "field",
        "finish_reason",
        "index",
        "judging",
        "names",
        "tokens",
        "unjudged",
        "waiting",
    )

    def __init__(self, index: int, judging: Judging, tokens: Tokens) -> None:
        self.index = index
        self.judging = judging
        self.tokens = tokens
        self.unjudged: Decision | None = None
        self.channels: dict[Slot, TextChannel] = {}
        self.waiting: deque[_Piece] = deque()
        self.dropped: dict[str, int] = {}
        self.names: dict[Slot, str] = {}
        self.finish_reason: str | None = None
        self.field: dict[str, Any] | None = None
        self.blocked = False
        self.called = False
        self.ended = False

    def end_all(self) -> None:
        for channel in self.channels.values():
            channel.ending = True

    @property
    def rolled_back(self) -> list[TextChannel]:
        """The texts that were written anew, or are to be; none once it has ended."""
        return [] if self.ended else [one for one in self.channels.values() if one.moderator.rolled_back]

    @property
    def may_go_on(self) -> bool:
        """Whether the text can be written anew: all that may leave of it has left, and no call of a tool; and another
        text has left as a whole, or not at all."""
        return not self.called and all(
            one.up_to_date if one.retry is not None else not one.begun or not (one.held or one.has_work)
            for one in self.channels.values()
        )

    def go_on(self) -> None:
        """What comes next follows the text that was rolled back; what came behind it is thrown away with it."""
        self.waiting.clear()
        self.names.clear()
        self.finish_reason = None
        self.tokens.go_on()
        for slot, channel in tuple(self.channels.items()):
            if channel.retry is not None:
                channel.go_on()
            elif not channel.begun:
                channel.moderator.close()
                del self.channels[slot]

    def give_up(self) -> None:
        """The upstream cannot go on."""
        for channel in self.rolled_back:
            self.waiting.clear()
            channel.give_up()
            self.blocked = True

    def refuse(self) -> None:
        """There is text that nobody can judge: the policy says whether the choice may go on."""
        if self.unjudged is None:
            self.unjudged = self.judging.refused()
            self.blocked = self.blocked or self.unjudged.action >= BLOCKS

    def close_tokens(self) -> None:
        """No more tokens come: what never spelled anything is dropped, and counted."""
        self.tokens.close(Parts(dropped=self.dropped))
        if self.dropped:
            self.refuse()

    def open(self, slot: Slot, kind: Channel) -> TextChannel:
        """Begin another text."""
        texts = self.texts()
        thought = "" if kind is Channel.REASONING else reasoning_of(texts)
        name = called(slot, self.names, texts)
        path = path_of(self.index, slot)
        channel = self.channels[slot] = TextChannel(
            self.judging, slot, kind, path, reasoning=thought, name=name, json=is_json(slot)
        )
        return channel

    def texts(self) -> dict[Slot, str]:
        """All that came in for it, released or not."""
        return {channel.slot: channel.text for channel in self.channels.values()}


def _dropped(fields: Mapping[str, int], prefix: str = "") -> Iterator[Coverage]:
    for name, characters in fields.items():
        yield Coverage(f"{prefix}{name}", Channel.ANSWER, CoverageState.NOT_JUDGED, characters)


# --- a streaming answer -------------------------------------------------------------------------------------------


class AnswerStream:
    """An answer on its way through: the upstream's bytes in, the client's bytes out.

    Args:
        judging: what it is judged with.
        form: how its choices are written.
        choices: how many choices were asked for, at least 1.
        wants_usage: whether the client asked for a last chunk with the usage.

    Attributes:
        done: whether all is said: what comes from the upstream after that is of no use.
        complete: whether the upstream itself said that it has no more to say.
        error: what went wrong with the upstream; None when nothing did.
        decisions: the decision on each choice that has ended, in the order in which they ended.
        released: how many characters of text went out.
    """

    def __init__(self, judging: Judging, *, form: Form = CHAT, choices: int = 1, wants_usage: bool = False) -> None:
        self._form = form
        self._known = judging.known(form.texts)
        self._passing = judging.passing
        self.done = False
        self.complete = False
        self.error: UpstreamError | None = None
        self.decisions: list[Decision] = []
        self.released = 0
        self._judging = judging
        self._expected = choices
        self._wants_usage = wants_usage
        self._usage: Any = None
        self._reader = EventReader()
        self._choices: dict[int, _Choice] = {}
        self._dropped: dict[str, int] = {}
        self._head: dict[str, Any] = {}
        self._lead: list[dict[str, Any]] = []
        self._tail: list[dict[str, Any]] = []
        self._resumed = False

    @property
    def retry(self) -> Retry | None:
        """From where the upstream is to go on, instead of what it says now; None while it need not."""
        for choice in self._choices.values():
            for channel in choice.channels.values():
                if channel.retry is not None:
                    return channel.retry
        return None

    @property
    def due_s(self) -> float | None:
        """In how many seconds `late` is to be called if nothing comes before, at least 0; None for never."""
        open_ = (choice for choice in self._choices.values() if not choice.ended)
        return due_of(channel for choice in open_ for channel in choice.channels.values())

    async def late(self) -> bytes:
        """Nothing came, and what is held may be held no longer. Raises StoreError."""
        for choice in self._choices.values():
            if not choice.ended:
                for channel in choice.channels.values():
                    choice.blocked = channel.late() or choice.blocked
        return await self._advance()

    def resume(self) -> None:
        """What is fed next is what the upstream says after it was asked to go on."""
        self._resumed = True
        self._reader = EventReader()
        self.complete = False
        self._tail.clear()
        for choice in self._choices.values():
            if any(channel.retry is not None for channel in choice.channels.values()):
                choice.go_on()

    async def give_up(self) -> bytes:
        """The upstream cannot go on: the choice ends as the policy says then. Raises StoreError."""
        for choice in self._choices.values():
            choice.give_up()
        return await self._advance()

    @property
    def held(self) -> int:
        """How many characters are held now."""
        return sum(
            channel.held
            for choice in self._choices.values()
            if not choice.ended
            for channel in choice.channels.values()
        )

    async def feed(self, data: bytes) -> bytes:
        """Take what the upstream sent; returns what may go to the client now, b"" when that is nothing.

        Raises:
            StoreError: when a decision could not be kept.
        """
        error: UpstreamError | None = None
        try:
            for content in self._reader.feed(data):
                self.complete = content.strip() == b"[DONE]"
                if self.complete:
                    break
                self._take(content)
        except UpstreamError as failed:
            error = failed
        except RecursionError:
            error = UpstreamError("the upstream sent an event that is nested too deep")
        sent = await self._advance()
        if self.retry is not None:
            return sent
        if (self.complete or error is not None) and not self.done:
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
        if error is None and not (self._choices and all(self._ends(choice) for choice in self._choices.values())):
            error = UpstreamError("the upstream broke off before its answer was complete")
        return sent + await self._end(error)

    async def close(self) -> None:
        """Nobody listens any more: give everything back, and keep the decisions on what was judged so far."""
        self.done = True
        try:
            for choice in self._choices.values():
                if not choice.ended:
                    await self._conclude(choice)
        finally:
            for choice in self._choices.values():
                for channel in choice.channels.values():
                    channel.moderator.close()

    @staticmethod
    def _ends(choice: _Choice) -> bool:
        return choice.ended or choice.finish_reason is not None

    # in

    def _take(self, content: bytes) -> None:
        try:
            chunk = json_of(content.decode())
        except ValueError:
            raise UpstreamError("the upstream sent an event that is not JSON") from None
        if not isinstance(chunk, dict):
            raise UpstreamError("the upstream sent an event that is not a JSON object")
        if chunk.get("error"):
            raise UpstreamError("the upstream reported an error in the middle of its answer")
        choices = chunk.pop("choices", None)
        if not isinstance(choices, list):
            raise UpstreamError("the upstream sent a chunk without choices")
        head = self._take_head(chunk)
        if not choices:
            (self._tail if self._choices else self._lead).append({**head, "choices": []})
        for choice in choices:
            self._take_choice(head, choice)

    def _take_head(self, chunk: dict[str, Any]) -> dict[str, Any]:
        parts = Parts(dropped=self._dropped, passing=self._passing)
        head = without_text(chunk, TOP_FIELDS, self._judging.trusted, parts)
        self._usage = head.get("usage") or self._usage
        if self._resumed:
            head = {**head, **self._head}
        elif not self._head:
            self._head = {name: value for name, value in head.items() if name != "usage"}
        return head

    def _take_choice(self, head: dict[str, Any], content: Any) -> None:
        index = content.get("index", 0) if isinstance(content, dict) else None
        delta, rest = self._form.split(content, whole=False) if isinstance(content, dict) else (None, {})
        if not is_place(index) or delta is None:
            raise UpstreamError("the upstream sent a choice without a proper index or delta")
        _expect_asked_for(index, self._expected)
        choice = self._choices.get(index)
        if choice is None:
            tokens = self._form.tokens(passing=self._passing)
            choice = self._choices[index] = _Choice(index, self._judging.of_choice(index), tokens)
        if self._ends(choice):
            return
        if self._resumed:
            delta = {name: value for name, value in delta.items() if name != "role"}
        parts = Parts(dropped=choice.dropped, names=choice.names, passing=self._passing)
        take_apart(delta, self._known, parts)
        kept = without_text(rest, {}, self._judging.trusted, parts)
        choice.finish_reason = finish_reason_of(content, parts)
        texts = self._take_texts(choice, parts.texts)
        if choice.finish_reason is not None:
            texts += [(channel, left) for channel in choice.channels.values() if (left := channel.rest())]
        frame = choice.tokens.take(content.get("logprobs"), {channel.slot: text for channel, text in texts}, parts)
        if choice.dropped or self._dropped:
            choice.refuse()
        if delta and not parts.plain and not texts and choice.finish_reason is None:
            return
        piece = _Piece(head, kept, parts.plain, texts, choice.finish_reason, frame, has_tokens="logprobs" in content)
        choice.waiting.append(piece)
        if choice.finish_reason is not None:
            choice.end_all()

    def _take_texts(self, choice: _Choice, texts: Sequence[Text]) -> list[tuple[TextChannel, str]]:
        """Give each text to its channel; the channels that got none are taken to be complete."""
        if not texts:
            return []
        if len(choice.channels) > 1 or (texts[0].slot,) != tuple(choice.channels):
            choice.end_all()
        taken = []
        for slot, kind, text in texts:
            channel = choice.channels.get(slot)
            if channel is None:
                channel = choice.open(slot, kind)
            taken.append((channel, channel.add(text)))
        return taken

    # judged

    async def _advance(self) -> bytes:
        """Judge all that is new; returns what may go out."""
        work = [
            (choice, channel)
            for choice in self._choices.values()
            if not choice.ended
            for channel in choice.channels.values()
            if channel.has_work
        ]
        if len(work) == 1:
            calls = [await work[0][1].judge()]
        else:
            calls = await asyncio.gather(*(channel.judge() for _, channel in work))
        for (choice, _), blocked in zip(work, calls, strict=True):
            choice.blocked = choice.blocked or blocked
        sent = list(map(event, self._lead))
        self._lead.clear()
        for choice in self._choices.values():
            if not choice.ended:
                await self._advance_choice(choice, sent)
        if self._stopped():
            sent.append(self._finish())
        return b"".join(sent)

    def _stopped(self) -> bool:
        """Whether all choices have ended and one was blocked: then there is nothing left to wait for."""
        choices = self._choices.values()
        return (
            not self.done
            and len(choices) >= self._expected
            and all(choice.ended for choice in choices)
            and any(choice.blocked for choice in choices)
        )

    async def _advance_choice(self, choice: _Choice, sent: list[bytes]) -> None:
        if any(channel.retry is not None for channel in choice.channels.values()):
            self._send_waiting(choice, sent)
            if choice.may_go_on and not choice.blocked:
                return
            choice.give_up()
        if not choice.blocked and choice.finish_reason is not None:
            choice.close_tokens()
            if not choice.blocked:
                await self._conclude(choice)
        self._send_waiting(choice, sent)
        if choice.blocked:
            decision = await self._conclude(choice)
            if decision is not None and ending_of(decision) is InterventionKind.REPLACE:
                sent.append(self._message(choice, decision))
            sent.append(self._last_chunk(choice, "content_filter"))

    def _message(self, choice: _Choice, decision: Decision) -> bytes:
        """The policy's message, behind what has left of the text."""
        judging = choice.judging
        message = judging.policy.message_for(decision.rule, judging.scope.language)
        if any(channel.moderator.released for channel in choice.channels.values()):
            message = f"\n\n{message}"
        said = {name: value for name, value in self._form.saying(message).items() if name != "role"}
        return event(self._chunk(self._head, choice.index, said, None))

    def _send_waiting(self, choice: _Choice, sent: list[bytes]) -> None:
        while choice.waiting:
            piece = choice.waiting[0]
            delta = piece.next_delta()
            if delta is None:
                return
            complete = not piece.texts
            choice.called = choice.called or bool(delta.get("tool_calls") or delta.get("function_call"))
            if choice.blocked:
                piece.finish_reason = None
                if complete and not delta:
                    choice.waiting.popleft()
                    continue
            rest = {**piece.choice, **self._tokens_of(piece, choice)}
            chunk = self._chunk(piece.head, choice.index, delta, piece.finish_reason if complete else None, rest)
            if complete:
                choice.waiting.popleft()
                if piece.finish_reason is not None:
                    chunk["tidegate"] = choice.field
            sent.append(event(chunk))
            if not complete:
                return

    @staticmethod
    def _tokens_of(piece: _Piece, choice: _Choice) -> dict[str, Any]:
        """The log probabilities that go out with what goes out of a piece."""
        if piece.masked:
            choice.tokens.silence()
        for slot, text in piece.taken:
            choice.tokens.release(slot, text)
        told = choice.tokens.out(piece.frame)
        had, piece.frame, piece.has_tokens = piece.has_tokens, None, False
        return {"logprobs": told} if had or told is not None else {}

    def _chunk(
        self,
        head: dict[str, Any],
        index: int,
        delta: dict[str, Any],
        finish_reason: str | None,
        rest: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        return {**head, "choices": [self._form.chunk(index, delta, rest or {}, finish_reason)]}

    def _last_chunk(self, choice: _Choice, finish_reason: str | None) -> bytes:
        return event({**self._chunk(self._head, choice.index, {}, finish_reason), "tidegate": choice.field})

    # out

    async def _conclude(self, choice: _Choice) -> Decision | None:
        """Decide on a choice, and keep the decision; None when there was nothing to decide."""
        choice.ended = True
        judging = choice.judging
        choice.close_tokens()
        if self._dropped:
            choice.refuse()
        decided: list[tuple[Decision, str | None]] = [
            (decision, channel.path)
            for channel in choice.channels.values()
            if (decision := channel.moderator.close() or channel.moderator.decision) is not None
        ]
        self.released += sum(channel.moderator.released for channel in choice.channels.values())
        if judging.delayed is not None and choice.channels:
            judging.delayed(max(channel.moderator.delay_s for channel in choice.channels.values()))
        coverage = [part for channel in choice.channels.values() for part in channel.moderator.coverage]
        coverage += (*_dropped(choice.dropped, f"choices[{choice.index}]."), *_dropped(self._dropped))
        unjudged = choice.unjudged
        if unjudged is not None and unjudged.action >= BLOCKS and not _any_blocks(one for one, _ in decided):
            decided.append((unjudged, None))
        if not decided:
            choice.field = undecided_field(judging.policy, coverage)
            return None
        listed = [one for one, _ in decided]
        number = judging.worst(listed)
        path = decided[number][1]
        decision = of_stream(listed, number, coverage)
        if unjudged is not None and decision.observed is None:
            decision = replace(decision, observed=unjudged.observed)
        self.decisions.append(decision)
        identity = await judging.keep(decision, judging.prompt.then(turn_of(choice.texts())))
        choice.field = decision_field(decision, judging.policy, path=path, identity=identity)
        return decision

    async def _end(self, error: UpstreamError | None) -> bytes:
        """Judge and let out what is left, then say how it ended."""
        if error is not None and any(choice.rolled_back for choice in self._choices.values()):
            self.error = error
            return await self.give_up()
        for choice in self._choices.values():
            choice.end_all()
        sent = [await self._advance()]
        if self.done or self.retry is not None:
            return sent[0]
        for choice in self._choices.values():
            if not choice.ended:
                await self._conclude(choice)
                if error is None and choice.field is not None:
                    sent.append(self._last_chunk(choice, "content_filter" if choice.blocked else None))
        if error is None:
            sent.append(self._finish())
        else:
            self.done = True
            self.error = error
            sent.append(event(Problem(502, str(error), "upstream_error", None, "upstream_error").body))
        return b"".join(sent)

    def _finish(self) -> bytes:
        self.done = True
        told = any(chunk.get("usage") for chunk in self._tail)
        if self._wants_usage and not told and any(choice.blocked for choice in self._choices.values()):
            self._tail.append({**self._head, "choices": [], "usage": self._usage or NO_USAGE})
        return b"".join(map(event, self._tail)) + DONE


# --- a whole answer -----------------------------------------------------------------------------------------------


async def judge_answer(
    answer: Any, judging: Judging, *, form: Form = CHAT, choices: int = 1
) -> tuple[dict[str, Any], list[Decision]]:
    """Judge a whole answer; returns what may go to the client, and the decision on each choice with text.

    A blocked choice says the policy's message instead, with the finish_reason ``content_filter``. ``choices`` is how
    many were asked for.

    Raises:
        UpstreamError: when it is not such an answer.
        StoreError: when a decision could not be kept.
    """
    listed = answer.pop("choices", None) if isinstance(answer, dict) else None
    if not isinstance(listed, list) or not all(isinstance(choice, dict) for choice in listed):
        raise UpstreamError(f"the upstream's answer is not {form.called}")
    parts = Parts(passing=judging.passing)
    head = without_text(answer, TOP_FIELDS, judging.trusted, parts)
    for place, choice in enumerate(listed):
        index = choice.setdefault("index", place)
        if not is_place(index):
            raise UpstreamError("the upstream's answer has a choice without a proper index")
        _expect_asked_for(index, choices)
    taken = [_Whole(choice, judging, form, parts.dropped) for choice in listed]
    judged = await asyncio.gather(*(choice.judge() for choice in taken))
    decisions = [decision for _, decision in judged if decision is not None]
    worst = judged[0][0]["tidegate"] if judged else None
    if decisions:
        chosen = decisions[worst_decision(decisions)]
        worst = next(choice["tidegate"] for choice, decision in judged if decision is chosen)
    return {**head, "choices": [choice for choice, _ in judged], "tidegate": worst}, decisions


def _any_blocks(decisions: Iterable[Decision]) -> bool:
    """Whether a verdict stops it already: that says more than that there was text which nobody could judge."""
    return any(decision.action >= BLOCKS for decision in decisions)


def _expect_asked_for(index: int, choices: int) -> None:
    if index >= choices:
        raise UpstreamError("the upstream sent a choice that nobody asked for")


class _Whole:
    """One choice of a whole answer: the fields of it that pass, and its texts.

    Args:
        choice: as the upstream says it.
        judging: what the answer is judged with.
        form: how it is written.
        above: what is not judged of the answer beside its choices, in characters, by field.

    Raises:
        UpstreamError: when it has no texts, or texts in a shape that nobody knows.
    """

    def __init__(self, choice: dict[str, Any], judging: Judging, form: Form, above: Mapping[str, int]) -> None:
        self._form = form
        self._index: int = choice["index"]
        self._judging = judging.of_choice(self._index)
        self._parts = parts = Parts(passing=judging.passing)
        message, rest = form.split(choice, whole=True)
        if message is None:
            raise UpstreamError(f"the upstream's answer is not {form.called}")
        take_apart(message, judging.known(form.texts), parts)
        self._texts = [
            text._replace(text=wholly_unescaped(text.text) if is_json(text.slot) else mended(text.text))
            for text in parts.texts
        ]
        kept = without_text({"index": self._index, **rest}, CHOICE_FIELDS, judging.trusted, parts)
        self._kept = {**kept, "finish_reason": finish_reason_of(choice, parts)}
        if "logprobs" in choice:
            self._kept["logprobs"] = self._tokens(choice["logprobs"])
        self._unseen = (*_dropped(parts.dropped, f"choices[{self._index}]."), *_dropped(above))

    def _tokens(self, told: Any) -> Any:
        tokens = self._form.tokens(passing=self._parts.passing)
        said = {text.slot: text.text for text in self._texts}
        frame = tokens.take(told, said, self._parts)
        for slot, text in said.items():
            tokens.release(slot, text)
        tokens.close(self._parts)
        return tokens.out(frame)

    async def judge(self) -> tuple[dict[str, Any], Decision | None]:
        """What may go to the client, and the decision; None when there was nothing to decide.

        Raises:
            StoreError: when the decision could not be kept.
        """
        judging, texts = self._judging, self._texts
        unjudged = judging.refused() if self._unseen else None
        refused = [unjudged] if unjudged is not None and unjudged.action >= BLOCKS else []
        if not texts and not refused:
            return self._sent(undecided_field(judging.policy, self._unseen)), None
        said = {text.slot: text.text for text in texts}
        names = [called(text.slot, self._parts.names, said) for text in texts]
        thought = reasoning_of(said)
        work = (
            judge_text(judging, kind, path_of(self._index, slot), text, reasoning=thought, name=name)
            for (slot, kind, text), name in zip(texts, names, strict=True)
        )
        decided = [as_found(one, text.text) for one, text in zip(await asyncio.gather(*work), texts, strict=True)]
        if not _any_blocks(decided):
            decided += refused
        number = judging.worst(decided)
        coverage = (*(part for one in decided for part in one.coverage), *self._unseen)
        decision = of_whole(judging.policy, decided, number, coverage, sum(len(text.text) for text in texts))
        if unjudged is not None and decision.observed is None:
            decision = replace(decision, observed=unjudged.observed)
        identity = await judging.keep(decision, judging.prompt.then(turn_of(said)))
        path = path_of(self._index, texts[number].slot) if number < len(texts) else None
        field = decision_field(decision, judging.policy, path=path, identity=identity)
        if decision.action >= BLOCKS:
            message = judging.policy.message_for(decision.rule, judging.scope.language)
            return self._stopped("" if ending_of(decision) is InterventionKind.CUT else message, field), decision
        self._mask([one.action is Action.REDACT for one in decided])
        return self._sent(field), decision

    def _mask(self, redacted: Sequence[bool]) -> None:
        """Take personal data out of the texts of which the policy says so, and all that could spell it."""
        if not any(redacted):
            return
        self._texts = [
            text._replace(text=mask(text.text)[0]) if taken_out else text
            for text, taken_out in zip(self._texts, redacted, strict=False)
        ]
        if self._kept.get("logprobs") is not None:
            self._kept["logprobs"] = None

    def _sent(self, field: dict[str, Any]) -> dict[str, Any]:
        for text in self._texts:
            put(self._parts.plain, text.slot, text.text)
        return self._form.whole({**self._kept, "tidegate": field}, self._parts.plain)

    def _stopped(self, message: str, field: dict[str, Any]) -> dict[str, Any]:
        """The policy's message in the place of a text, and nothing that the model said."""
        told = {name: value for name, value in self._kept.items() if name != "logprobs"}
        kept = without_text(told, CHOICE_FIELDS, self._judging.trusted, Parts())
        tokens = {"logprobs": None} if "logprobs" in self._kept else {}
        ending = {"finish_reason": "content_filter", "tidegate": field}
        return self._form.whole({**kept, **tokens, **ending}, self._form.saying(message))
