"""Conversations to Qwen3 ids, as the stock template of Qwen3 lays them out, and where in them the heads are read.

Only the template makes control tokens; what people and models wrote is tokenized as content (`qwen_tokens`). In it a
turn is ``<|im_start|>``, its role and a line break, its content, ``<|im_end|>`` and a line break. Results of tools
stand in a user turn, calls of tools at the end of an assistant turn, each between its own pair of control tokens. An
assistant turn behind the last user turn has a think block with its reasoning, when it is the last of all (an empty one
if need be) or has reasoning; earlier ones, and those of a conversation in which no user speaks, have none.

Two things differ from the template on purpose, so that nothing escapes the guard. It looks for ``</think>`` in the
content of an assistant turn and drops what is before it in earlier turns; here content is data and is kept, and
reasoning is what the turn says it is. And it drops the reasoning of a last turn when no user speaks; here it is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from tidegate.errors import GuardUnavailable, InputError
from tidegate.model.qwen_tokens import Frame, IncrementalQwenTokens, QwenTokenizer, well_formed
from tidegate.types import Channel, Conversation, Role, Turn

__all__ = ["Opening", "QwenTemplate", "Reading", "Rendered"]

_CONTROL: Final = (
    "<|im_start|>",
    "<|im_end|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
)
_REASONING: Final = Frame("\n", "\n", strips_start=True, strips_end=True)
_ANSWER: Final = Frame("\n\n", strips_start=True)
_PLAIN_ANSWER: Final = Frame("assistant\n")
_TOOL_RESULT: Final = Frame("\n", "\n")
_NO_FRAME: Final = Frame()


class Reading(NamedTuple):
    """A place at which to read the heads: index among the ids, and the characters of its text that are judged there."""

    position: int
    end: int


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as ids.

    Attributes:
        ids: all of them.
        query: index of the ``<|im_end|>`` of the last turn that is not the assistant's: where the heads for prompts
            are read; None when there is none.
        answer: where the heads for responses are read for the content of the last turn; () when it is not the
            assistant's, or empty.
        reasoning: the same for its reasoning.
        tool_calls: the same for the arguments of each of its calls.
    """

    ids: tuple[int, ...]
    query: int | None
    answer: tuple[Reading, ...] = ()
    reasoning: tuple[Reading, ...] = ()
    tool_calls: tuple[tuple[Reading, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Opening:
    """What stands before a text that an assistant is about to write.

    Attributes:
        ids: the ids before it.
        query: as in `Rendered`.
        frame: how the text is set; its tokens, ``frame.before`` among them, follow ``ids``.
        text: takes the text as it arrives.
    """

    ids: tuple[int, ...]
    query: int | None
    frame: Frame
    text: IncrementalQwenTokens


class QwenTemplate:
    """Lays out conversations for one tokenizer.

    Raises:
        GuardUnavailable: when the tokenizer lacks a control token of the template.
    """

    def __init__(self, tokenizer: QwenTokenizer) -> None:
        if lacking := [name for name in _CONTROL if name not in tokenizer.control]:
            raise GuardUnavailable(f"the tokenizer lacks {', '.join(lacking)}")
        self.tokenizer = tokenizer

    def conversation(self, conversation: Conversation) -> Rendered:
        """A whole conversation, closed."""
        page = _Page(self.tokenizer)
        self._turns(page, conversation.turns, whole=True)
        return Rendered(tuple(page.ids), page.query, page.answer, page.reasoning, page.calls)

    def opening(
        self, before: Sequence[Turn], channel: Channel = Channel.ANSWER, *, reasoning: str = "", name: str = ""
    ) -> Opening:
        """Begin a text that an assistant writes after these turns.

        Args:
            before: may be empty.
            channel: ANSWER (also for REFUSAL), REASONING, or TOOL_CALL for the arguments of a call.
            reasoning: the reasoning that came before an answer.
            name: the name of the called tool.

        Raises:
            InputError: for a channel that no assistant writes.
        """
        page = _Page(self.tokenizer)
        self._turns(page, before, whole=False)
        page.control("<|im_start|>")
        thinks = any(turn.role is Role.USER for turn in before)
        match channel:
            case Channel.REASONING:
                page.text("assistant\n")
                page.control("<think>")
                frame = _REASONING
            case Channel.ANSWER | Channel.REFUSAL | Channel.TOOL_CALL if thinks or reasoning:
                page.text("assistant\n")
                page.think(reasoning)
                frame = _ANSWER
            case Channel.ANSWER | Channel.REFUSAL | Channel.TOOL_CALL:
                frame = _PLAIN_ANSWER
            case _:
                raise InputError("expected a channel in which an assistant writes", where="channel")
        if channel is Channel.TOOL_CALL:
            page.text("", frame)
            page.control("<tool_call>")
            frame = _call_frame(name)
        return Opening(tuple(page.ids), page.query, frame, self.tokenizer.incremental(frame))

    def closing(self, channel: Channel = Channel.ANSWER) -> tuple[int, ...]:
        """The ids behind a text of this channel: those that end it, and for an answer the turn as well."""
        page = _Page(self.tokenizer)
        if channel is Channel.REASONING:
            page.control("</think>")
        elif channel is Channel.TOOL_CALL:
            page.control("</tool_call>")
        else:
            page.end()
        return tuple(page.ids)

    def _turns(self, page: _Page, turns: Sequence[Turn], *, whole: bool) -> None:
        users = [index for index, turn in enumerate(turns) if turn.role is Role.USER]
        last_user = users[-1] if users else len(turns)
        following: list[Turn | None] = [*turns, None][1:]
        previous: Role | None = None
        for index, (turn, after) in enumerate(zip(turns, following, strict=True)):
            if turn.role is Role.ASSISTANT:
                last = whole and after is None
                thinks = (index > last_user and last) or (bool(turn.reasoning) and (index > last_user or last))
                page.assistant(turn, thinks=thinks, judged=last)
            elif turn.role is Role.TOOL:
                page.tool(turn, first=previous is not Role.TOOL, last=after is None or after.role is not Role.TOOL)
            else:
                page.turn(turn)
            previous = turn.role


class _Page:
    """Ids being laid out."""

    def __init__(self, tokenizer: QwenTokenizer) -> None:
        self._tokenizer = tokenizer
        self.ids: list[int] = []
        self.query: int | None = None
        self.answer: tuple[Reading, ...] = ()
        self.reasoning: tuple[Reading, ...] = ()
        self.calls: tuple[tuple[Reading, ...], ...] = ()

    def control(self, name: str) -> None:
        self.ids.append(self._tokenizer.control[name])

    def text(self, text: str, frame: Frame = _NO_FRAME) -> tuple[Reading, ...]:
        """Lay out content; gives where the tokens are that hold some of it."""
        tokens = self._tokenizer.encode(text, frame)
        start, lead = len(self.ids), self._tokenizer.leading(tokens, frame)
        self.ids += [token.id for token in tokens]
        return tuple(Reading(start + index, token.end) for index, token in enumerate(tokens) if index >= lead)

    def end(self) -> None:
        self.control("<|im_end|>")
        self.text("\n")

    def turn(self, turn: Turn) -> None:
        self.control("<|im_start|>")
        self.text(turn.content, Frame(f"{turn.role.value}\n"))
        self.query = len(self.ids)
        self.end()

    def tool(self, turn: Turn, *, first: bool, last: bool) -> None:
        if first:
            self.control("<|im_start|>")
        self.text("user\n" if first else "\n")
        self.control("<tool_response>")
        self.text(turn.content, _TOOL_RESULT)
        self.control("</tool_response>")
        if last:
            self.query = len(self.ids)
            self.end()

    def think(self, reasoning: str) -> tuple[Reading, ...]:
        self.control("<think>")
        readings = self.text(reasoning, _REASONING)
        self.control("</think>")
        return readings if reasoning.strip("\n") else ()

    def assistant(self, turn: Turn, *, thinks: bool, judged: bool) -> None:
        self.control("<|im_start|>")
        frame = _PLAIN_ANSWER
        reasoning: tuple[Reading, ...] = ()
        if thinks:
            self.text("assistant\n")
            reasoning = self.think(turn.reasoning)
            frame = _ANSWER
        content = turn.content.lstrip("\n") if thinks else turn.content
        after = "\n" if turn.tool_calls and turn.content else ""
        answer = self.text(turn.content, Frame(frame.before, after, strips_start=frame.strips_start))
        calls = []
        for index, call in enumerate(turn.tool_calls):
            if index:
                self.text("\n")
            self.control("<tool_call>")
            calls.append(self.text(call.arguments, _call_frame(call.name)))
            self.control("</tool_call>")
        self.end()
        if judged:
            self.answer, self.reasoning, self.calls = answer if content else (), reasoning, tuple(calls)


def _call_frame(name: str) -> Frame:
    return Frame(f'\n{{"name": "{well_formed(name)}", "arguments": ', "}\n")
