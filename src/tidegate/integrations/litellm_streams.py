"""A streaming chat in LiteLLM, chunk by chunk: each leaves when all of its text may.

Nothing of LiteLLM is needed here: a chunk is anything with ``choices``, each with ``index``, ``delta`` and
``finish_reason``. Every text of every choice (reasoning, answer, refusal, arguments of calls) is a stream of its own
for the server. Chunks keep their order within a choice, and go out as they came. A text that another text of its choice
follows is taken to be complete; should it go on, it is judged again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from tidegate.integrations.litellm_requests import Turn
from tidegate.integrations.litellm_server import LiveText, TidegateServer

__all__ = ["HeldChunks", "Slot", "set_text", "texts_of"]


class Slot(NamedTuple):
    """Which text of a choice: its channel, and for calls the number of the call."""

    channel: str
    number: int = 0


_NAMES: Final[Mapping[str, str]] = {"reasoning": "reasoning_content", "answer": "content", "refusal": "refusal"}
_OLD_CALL: Final = -1
"""The number of the one call that ``function_call`` is."""


def texts_of(delta: Any) -> Iterator[tuple[Slot, str]]:
    """The texts of a delta that guards judge, in the order in which they are meant."""
    for channel, name in _NAMES.items():
        text = getattr(delta, name, None)
        if isinstance(text, str) and text:
            yield Slot(channel), text
    for place, call in enumerate(getattr(delta, "tool_calls", None) or ()):
        yield from _argument(Slot("tool_call", _number(place, call)), _called(call))
    yield from _argument(Slot("tool_call", _OLD_CALL), getattr(delta, "function_call", None))


def _argument(slot: Slot, called: Any) -> Iterator[tuple[Slot, str]]:
    text = getattr(called, "arguments", None) or getattr(called, "input", None)
    if isinstance(text, str) and text:
        yield slot, text


def _number(place: int, call: Any) -> int:
    number = getattr(call, "index", None)
    return place if number is None else int(number)


def _called(call: Any) -> Any:
    return getattr(call, "function", None) or getattr(call, "custom", None)


def set_text(delta: Any, slot: Slot, text: str) -> None:
    """Put another text in the place of one that `texts_of` gave."""
    if slot.channel in _NAMES:
        setattr(delta, _NAMES[slot.channel], text)
        return
    called = getattr(delta, "function_call", None)
    if slot.number != _OLD_CALL:
        calls = enumerate(delta.tool_calls)
        called = next(_called(call) for place, call in calls if _number(place, call) == slot.number)
    setattr(called, "arguments" if getattr(called, "arguments", None) else "input", text)


@dataclass(slots=True)
class _Choice:
    """One choice, as far as it has come."""

    texts: dict[Slot, LiveText] = field(default_factory=dict)
    names: dict[Slot, str] = field(default_factory=dict)
    stopped: bool = False

    @property
    def blocked(self) -> LiveText | None:
        """The text that was blocked; None when there is none."""
        return next((text for text in self.texts.values() if text.blocked), None)

    async def finish(self, *, but: Sequence[Slot] = ()) -> None:
        """Its texts are complete."""
        for slot, text in self.texts.items():
            if slot not in but and not self.stopped:
                await text.finish()


@dataclass(slots=True)
class _Held:
    """A chunk that waits: of which choice (None for none), where each text of it begins and ends, and whether all of
    them were given to be judged."""

    chunk: Any
    index: int | None
    texts: list[tuple[Slot, int, int]] = field(default_factory=list)
    given: bool = False


class HeldChunks:
    """The chunks of one answer.

    Args:
        server: judges.
        turns: the request's: the context.
        stop: makes the chunk that ends a blocked choice, of the chunk that it stopped at, its index and the decision.
        choices: how many were asked for.
        subject: whose content it is; None when nobody says.
    """

    def __init__(
        self,
        server: TidegateServer,
        turns: Sequence[Turn],
        stop: Callable[[Any, int, Mapping[str, Any]], Any],
        *,
        choices: int = 1,
        subject: str | None = None,
    ) -> None:
        self._server = server
        self._turns = turns
        self._stop = stop
        self._expected = choices
        self._subject = subject
        self._choices: dict[int, _Choice] = {}
        self._waiting: list[_Held] = []
        self._passing = False

    @property
    def done(self) -> bool:
        """Whether every choice was stopped: nothing that comes is of any use."""
        stopped = sum(choice.stopped for choice in self._choices.values())
        return stopped >= self._expected and stopped == len(self._choices)

    async def feed(self, chunk: Any) -> list[Any]:
        """Take a chunk; returns those that may leave now.

        Raises:
            Unanswered: when its text cannot be judged now.
        """
        new = [held for held in _apart(chunk) if held.index is None or not self._choice(held.index).stopped]
        self._waiting += new
        for held in new if not self._passing else ():
            if held.index is not None:
                await self._judge(held, held.index, self._choice(held.index))
        return list(self._ready())

    async def end(self) -> list[Any]:
        """No more chunks come; returns the rest.

        Raises:
            Unanswered: as `feed`.
        """
        for choice in self._choices.values() if not self._passing else ():
            await choice.finish()
        return list(self._ready())

    def let_pass(self) -> list[Any]:
        """Nobody judges from now on: returns what waits, and lets pass what comes; what was blocked stays blocked."""
        self._passing = True
        return list(self._ready())

    def close(self) -> None:
        """Give everything back; safe to call twice."""
        for choice in self._choices.values():
            for text in choice.texts.values():
                text.close()

    def _choice(self, index: int) -> _Choice:
        return self._choices.setdefault(index, _Choice())

    # judged

    async def _judge(self, held: _Held, index: int, choice: _Choice) -> None:
        content = held.chunk.choices[0]
        for place, call in enumerate(getattr(content.delta, "tool_calls", None) or ()):
            name = getattr(_called(call), "name", None)
            if isinstance(name, str) and name:
                choice.names.setdefault(Slot("tool_call", _number(place, call)), name[:256])
        texts = list(texts_of(content.delta))
        if texts:
            await choice.finish(but=[slot for slot, _ in texts])
        for place, (slot, text) in enumerate(texts):
            live = choice.texts.get(slot) or self._open(index, choice, slot)
            held.texts.append((slot, len(live.text), len(live.text) + len(text)))
            await live.feed(text)
            if place < len(texts) - 1:
                await live.finish()
        if content.finish_reason is not None:
            await choice.finish()
        held.given = True

    def _open(self, index: int, choice: _Choice, slot: Slot) -> LiveText:
        fields = {"path": f"choices[{index}].{slot.channel}"}
        thought = choice.texts.get(Slot("reasoning"))
        if thought is not None and slot.channel != "reasoning":
            fields["reasoning"] = thought.text
        if name := choice.names.get(slot):
            fields["name"] = name
        live = choice.texts[slot] = self._server.watch(self._turns, slot.channel, subject=self._subject, **fields)
        return live

    # out

    def _ready(self) -> Iterator[Any]:
        """What may leave: chunks whose texts are all released, and behind nothing of their choice that waits.

        A chunk of no choice (the usage) leaves when nothing at all waits before it.
        """
        waiting, self._waiting = self._waiting, []
        behind: set[int] = set()
        for held in waiting:
            if held.index is None:
                if self._waiting:
                    self._waiting.append(held)
                else:
                    yield held.chunk
                continue
            choice = self._choices[held.index]
            if choice.stopped:
                continue
            released = held.given and all(choice.texts[slot].released >= end for slot, _, end in held.texts)
            if held.index in behind:
                self._waiting.append(held)
            elif (text := choice.blocked) and not (released and held.chunk.choices[0].finish_reason is None):
                yield from self._stopped(held, held.index, choice, text)
            elif released or self._passing:
                yield held.chunk
            else:
                self._waiting.append(held)
                behind.add(held.index)

    def _stopped(self, held: _Held, index: int, choice: _Choice, text: LiveText) -> Iterator[Any]:
        """What is released of the chunk in which a choice is blocked, and the end of that choice."""
        assert text.decision is not None, "it is blocked"
        choice.stopped = True
        for one in choice.texts.values():
            one.close()
        ending = self._stop(held.chunk, index, text.decision)
        content = held.chunk.choices[0]
        parts = dict(texts_of(content.delta))
        left = dict.fromkeys(parts, "")
        left |= {slot: parts[slot][: max(0, choice.texts[slot].released - start)] for slot, start, _ in held.texts}
        if any(left.values()):
            for slot, part in left.items():
                set_text(content.delta, slot, part)
            content.finish_reason = None
            yield held.chunk
        yield ending


def _apart(chunk: Any) -> list[_Held]:
    """A chunk for each choice that it has; itself when that is one or none."""
    choices = list(chunk.choices or ())
    if len(choices) < 2:
        return [_Held(chunk, choices[0].index if choices else None)]
    held = []
    for one in choices:
        single = copy.copy(chunk)
        single.choices = [one]
        held.append(_Held(single, one.index))
    return held
