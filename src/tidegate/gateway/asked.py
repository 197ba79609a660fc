"""What a client asks for, whatever the door: its turns, which texts of them are new, and what becomes of each text.

A door reads its own wire into `Said` turns; `prompt_of` says which of them are judged, and together with what.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Final, NamedTuple

from tidegate.types import Channel, Conversation, Coverage, CoverageState, Role, Span, Turn

__all__ = ["Asked", "Beside", "Prompt", "PromptText", "Said", "earlier_texts", "prompt_of"]

_CHANNELS: Final = {Role.SYSTEM: Channel.SYSTEM, Role.USER: Channel.USER, Role.TOOL: Channel.TOOL_RESULT}


@dataclass(frozen=True, slots=True)
class PromptText:
    """One new text of the prompt: the conversation that ends with it, and where it stands in the request.

    Attributes:
        conversation: its last turn is the text; turns of one role that follow each other are one.
        places: each turn's part in it: the path, and how many characters.
        paths: every path of the coverage that is judged with it.
    """

    conversation: Conversation
    places: tuple[tuple[str, int], ...]
    paths: frozenset[str]

    def where(self, span: Span | None) -> tuple[str, Span | None]:
        """The path that a span of the text lies in, and the same span there.

        One that lies in several turns stays as it is, and its path names the first and the last of them, as
        ``messages[0]-messages[2].content``.
        """
        begun = 0
        for path, length in self.places:
            if span is not None and begun <= span.start and span.end <= begun + length + 1:
                return path, Span(span.start - begun, min(span.end - begun, length))
            begun += length + 1
        first, last = self.places[0][0], self.places[-1][0]
        return (first if first == last else f"{first.removesuffix('.content')}-{last}"), span


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, as far as the gateway needs to understand it. A door may add what its answers need.

    Attributes:
        body: the whole of it, as it is sent on: the very object that was read, unless the door changes something.
        conversation: all turns.
        new: the texts to judge: all turns since the assistant last spoke, and system turns where that is asked for.
        coverage: every text path of the request, given that the new ones are judged.
        unseen: those parts of the coverage that no guard ever sees: images, unknown fields with text, and the like.
            Earlier turns, which were judged when they were new, are not among them.
        model: the model that is asked for.
        stream: whether the answer is to stream.
        tools: the names of the tools that the model may call.
        subject: whose content it is, as the client says it; None when it does not.
        said: the turns with the places of their texts; () where none was before another.
    """

    body: dict[str, Any]
    conversation: Conversation
    new: tuple[PromptText, ...]
    coverage: tuple[Coverage, ...]
    unseen: tuple[Coverage, ...]
    model: str
    stream: bool
    tools: frozenset[str] = frozenset()
    subject: str | None = None
    said: tuple[Said, ...] = ()


class Beside(NamedTuple):
    """A text of a request that is no turn: where it stands, whose it is, and how many characters the coverage says.

    What is of the system channel is the operator's: it is judged when system turns are. All other is judged as if a
    user had written it.
    """

    path: str
    channel: Channel
    text: str
    characters: int


@dataclass(frozen=True, slots=True)
class Said:
    """One turn of a request, and where its texts stand there.

    Attributes:
        turn: who said what.
        path: the place of its content, as ``messages[0].content``.
        reasoning_path: the place of its reasoning.
        call_paths: the place of each of its tool calls, in order; as many as the turn has.
        glued: the parts of the content without anything between them, when there are several; else None.
        unseen: what in it no guard sees.
        words: short texts around it, by their paths: the name of who speaks, of a called tool. They are judged with
            the turn, but by themselves.
    """

    turn: Turn
    path: str
    reasoning_path: str = ""
    call_paths: tuple[str, ...] = ()
    glued: str | None = None
    unseen: tuple[Coverage, ...] = ()
    words: tuple[tuple[str, str], ...] = ()

    @property
    def has_text(self) -> bool:
        return bool(self.turn.content or self.turn.reasoning or self.turn.tool_calls)

    @property
    def others(self) -> list[tuple[str, str]]:
        """The texts beside the content, by their paths."""
        calls = zip(self.call_paths, (call.arguments for call in self.turn.tool_calls), strict=True)
        return [*([(self.reasoning_path, self.turn.reasoning)] if self.turn.reasoning else ()), *calls]


class Prompt(NamedTuple):
    """The turns of a request put together: see `Asked` for what each is."""

    conversation: Conversation
    new: tuple[PromptText, ...]
    coverage: tuple[Coverage, ...]
    unseen: tuple[Coverage, ...]
    said: tuple[Said, ...]


def prompt_of(
    said: Sequence[Said], *, judge_system: bool, beside: Iterable[Beside] = (), unseen: Iterable[Coverage] = ()
) -> Prompt:
    """Say which texts of a request are judged, and what becomes of each.

    Args:
        said: its turns, at least one.
        judge_system: whether system turns are judged too, as if a user had written them.
        beside: the texts that are no turns.
        unseen: what no guard sees, beside that in the turns.
    """
    new = _new_turns(said, judge_system=judge_system)
    unseen, beside = tuple(unseen), tuple(beside)
    words = [
        Beside(path, _CHANNELS.get(said[index].turn.role, Channel.USER), text, len(text))
        for index in sorted(new)
        for path, text in said[index].words
    ]
    users = [*words, *(one for one in beside if one.channel is not Channel.SYSTEM)]
    operators = [one for one in beside if one.channel is Channel.SYSTEM]
    apart = (*_together(users, Role.USER), *(_together(operators, Role.SYSTEM) if judge_system else ()))
    judged = {one for text in apart for one in text.paths}
    return Prompt(
        Conversation(tuple(one.turn for one in said)),
        (*_new_texts(said, new), *apart),
        (*_coverage(said, new), *(_of_beside(one, judged) for one in beside), *unseen),
        (*(part for one in said for part in one.unseen), *unseen),
        tuple(said),
    )


def earlier_texts(said: Sequence[Said], most: int) -> tuple[PromptText, ...]:
    """The texts of the newest turns before what is new, oldest first, system turns left out.

    Turns that were joined when they were new are joined again: whoever remembers what was said of them finds it.

    Args:
        said: all turns of a request.
        most: of how many turns with text, at least 1.
    """
    new = _new_turns(said, judge_system=True)
    earlier = [index for index in range(len(said)) if index not in new]
    named = [index for index in earlier if said[index].has_text or said[index].words][-most:]
    words = (
        Beside(path, _CHANNELS.get(said[index].turn.role, Channel.USER), text, len(text))
        for index in named
        for path, text in said[index].words
    )
    apart = (text for word in words for text in _together([word], Role.USER))
    return (*_new_texts(said, set(named)), *apart)


def _together(texts: Sequence[Beside], role: Role) -> Iterator[PromptText]:
    """Texts that are no turns are judged as one, so that they cost one judgement however many they are."""
    texts = [one for one in texts if one.text]
    if texts:
        turn = Turn(role, "\n".join(one.text for one in texts))
        places = tuple((one.path, len(one.text)) for one in texts)
        yield PromptText(Conversation((turn,)), places, frozenset(one.path for one in texts))


def _of_beside(one: Beside, judged: Collection[str]) -> Coverage:
    state = CoverageState.JUDGED if one.path in judged else CoverageState.NOT_JUDGED
    return Coverage(one.path, one.channel, state, one.characters)


def _new_turns(said: Sequence[Said], *, judge_system: bool) -> set[int]:
    """All turns since the assistant last spoke, and the given beginning of an answer; system turns all or none."""
    new: set[int] = set()
    index = len(said) - 1
    while index >= 0 and said[index].turn.role is Role.ASSISTANT:
        new.add(index)
        index -= 1
    while index >= 0 and said[index].turn.role is not Role.ASSISTANT:
        new.add(index)
        index -= 1
    system = {index for index, one in enumerate(said) if one.turn.role is Role.SYSTEM}
    return new | system if judge_system else new - system


def _new_texts(said: Sequence[Said], new: set[int]) -> Iterator[PromptText]:
    turns = tuple(one.turn for one in said)
    texts = [index for index in sorted(new) if said[index].has_text]
    for role, indices in groupby(texts, key=lambda index: said[index].turn.role):
        numbers = list(indices)
        group, before = [said[index] for index in numbers], turns[: numbers[0]]
        turn = _joined([one.turn for one in group])
        places = tuple((one.path, len(one.turn.content)) for one in group)
        paths = {path for path, _ in places}
        if role is Role.ASSISTANT:
            paths |= {path for one in group for path, _ in one.others}
        yield PromptText(Conversation((*before, turn)), places, frozenset(paths))
        if any(one.glued is not None for one in group):
            glued = [one.turn.content if one.glued is None else one.glued for one in group]
            places = tuple((path, len(text)) for (path, _), text in zip(places, glued, strict=True))
            yield PromptText(Conversation((*before, replace(turn, content="\n".join(glued)))), places, frozenset(paths))
        if role is not Role.ASSISTANT:
            for one in group:
                yield from _other_texts(one, before)


def _joined(turns: Sequence[Turn]) -> Turn:
    """Turns of one role as one: what is asked for in two messages is asked for."""
    if len(turns) == 1:
        return turns[0]
    return Turn(
        turns[0].role,
        "\n".join(turn.content for turn in turns),
        "\n".join(turn.reasoning for turn in turns if turn.reasoning),
        tuple(call for turn in turns for call in turn.tool_calls),
    )


def _other_texts(one: Said, before: tuple[Turn, ...]) -> Iterator[PromptText]:
    """What stands beside the content. Guards look there in an assistant's turns only; a client can send it in any."""
    for path, text in one.others:
        if text:
            said = Conversation((*before, Turn(one.turn.role, text)))
            yield PromptText(said, ((path, len(text)),), frozenset((path,)))


def _coverage(said: Sequence[Said], new: set[int]) -> Iterator[Coverage]:
    for index, one in enumerate(said):
        turn = one.turn
        state = CoverageState.JUDGED if index in new else CoverageState.NOT_JUDGED
        yield Coverage(one.path, _CHANNELS.get(turn.role, Channel.ANSWER), state, len(turn.content))
        if turn.reasoning:
            yield Coverage(one.reasoning_path, Channel.REASONING, state, len(turn.reasoning))
        for path, call in zip(one.call_paths, turn.tool_calls, strict=True):
            yield Coverage(path, Channel.TOOL_CALL, state, len(call.arguments))
        for path, text in one.words:
            yield Coverage(path, _CHANNELS.get(turn.role, Channel.USER), state, len(text))
        yield from one.unseen
