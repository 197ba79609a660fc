"""What all guards with a Stream model do, wherever the model runs: conversations to ids, logits to verdicts.

A conversation is laid out as the released template does it (`tidegate.model.qwen_template`), with all its turns. A
prompt is judged by the heads for prompts at the ``<|im_end|>`` of the last turn; an answer by the heads for responses
at each of its tokens, and so are the reasoning and the tool calls of an assistant's turn, where the template places
them.

*The severity of a whole answer.* A token is what its most probable severity says. The *confirmed* severity at a token
is the mildest of the last two (of ``debounce``), and the answer has the worst that was confirmed; each text of a turn
counts apart. So two unsafe tokens in a row make an answer unsafe and two controversial ones controversial, as the rule
``consecutive_unsafe`` of the released evaluation has it; an unsafe token beside a controversial one confirms the
milder, as in Tidegate's streams, where that rule sees nothing. The probabilities are those of the token that stands for
the place where the text comes nearest to harm, also when it is safe: of the tokens that confirm it, the mildest.

*Long texts.* Nothing is skipped and nothing fails. An answer that outgrows the window is judged in windows that overlap
(`tidegate.engine.sequence`). Of a context that would leave it less than a quarter of the first, the middle is left out.
A prompt that is longer than the window is judged in overlapping parts, each closed with ``<|im_end|>``, behind the two
ends of its context; the worst verdict counts.
"""

from __future__ import annotations

import asyncio
import codecs
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from tidegate.errors import InputError
from tidegate.guards.edge_config import Reading as HeadReading
from tidegate.guards.session import OpenSessions, TextSession
from tidegate.model.checkpoints import head_labels
from tidegate.model.qwen_template import Opening, QwenTemplate, Reading, Rendered
from tidegate.model.qwen_tokens import IncrementalQwenTokens, QwenTokenizer
from tidegate.model.tokens import Token
from tidegate.types import Channel, Conversation, Role, Severity, Span, Target, TokenVerdict, Turn, Verdict, worst

__all__ = ["Logits", "Qwen3StreamSession", "QwenIdText", "QwenStreamGuard", "Stream", "confirmed", "head_readings"]

_LONG_TEXT: Final = 2_048
"""From this many characters on, text is tokenized beside the event loop and not in it."""
_SLICE: Final = 4_096
"""Characters of a long text that are tokenized at once: while that runs, no other thread does."""
_GROUP: Final = 2_048
"""Most tokens that are judged at once."""


class Logits(Protocol):
    """One branch at some positions of one stream, float32; the order of classes is that of the model's config."""

    @property
    def risk(self) -> NDArray[np.float32]:
        """``[positions, 3]``."""
        ...

    @property
    def category(self) -> NDArray[np.float32]:
        """``[positions, 8]`` of a response, ``[positions, 9]`` of a prompt."""
        ...


class Stream(Protocol):
    """Tokens that follow each other, wherever they are computed. Calls must not overlap, except ``close``."""

    async def feed(self, ids: Sequence[int], target: Target = ..., *, last_only: bool = ...) -> Logits:
        """Append tokens; the logits of each of them, or of the last one.

        Raises:
            GuardError: when there are none.
        """
        ...

    def close(self) -> None:
        """Give everything back at once; safe to call any number of times, also while a feed waits."""
        ...


class QwenStreamGuard(ABC):
    """Judges prompts and answers, whole and as they are written, with a Stream model that a subclass knows to run.

    Args:
        debounce: how many tokens in a row confirm a severity of a whole answer; at least 1.
        most_sessions: how many sessions may be open at once.

    Raises:
        InputError: when one of these arguments cannot be.
    """

    _template: QwenTemplate
    """Of the model's tokenizer. This and the next two are there when `_ready` is done."""
    _readings: Mapping[Target, HeadReading]
    """What the logits of each branch mean."""
    _window: int
    """Most positions of one stream before its window begins anew."""

    @property
    def _session(self) -> type[Qwen3StreamSession]:
        """What `open` makes."""
        return Qwen3StreamSession

    def __init__(self, *, debounce: int, most_sessions: int) -> None:
        if debounce < 1:
            raise InputError(f"expected 1 or more, got {debounce}", where="debounce")
        self._debounce = debounce
        self._open = OpenSessions(most_sessions)

    @property
    @abstractmethod
    def name(self) -> str:
        """What its verdicts are signed with."""

    @abstractmethod
    async def close(self) -> None:
        """Give everything back; sessions that are open fail from now on. Safe to call twice."""

    @abstractmethod
    def _check_open(self) -> None:
        """Raises GuardUnavailable when the guard is closed."""

    @abstractmethod
    def _stream(self, before: Sequence[int]) -> Stream:
        """A stream behind these ids."""

    @abstractmethod
    async def _ready(self) -> None:
        """Called before anything is laid out or judged; raises GuardError when that cannot be."""

    takes_ids = True
    """Sessions take the ids of models of the Qwen3 family: see `Qwen3StreamSession.feed_ids`."""

    async def id_text(self) -> QwenIdText:
        """Begin to read the ids of one stream. Raises GuardError when the tokenizer is not to be had."""
        await self._ready()
        return QwenIdText(self._template.tokenizer)

    @property
    def sessions(self) -> int:
        """How many sessions are open now."""
        return len(self._open)

    def open(
        self, context: Conversation | None, channel: Channel = Channel.ANSWER, *, reasoning: str = "", name: str = ""
    ) -> Qwen3StreamSession:
        """Open a session for text that an assistant writes after these turns; None when nothing came before.

        Args:
            context: the turns before, which all count.
            channel: what the text is: ANSWER (also for REFUSAL), REASONING, or TOOL_CALL for the arguments of a call.
            reasoning: what the assistant thought before the text; "" when nothing, or when it is not to count.
            name: the name of the called tool.

        Raises:
            InputError: for a channel in which no assistant writes.
            GuardOverloaded: when ``most_sessions`` are open.
            GuardUnavailable: when the guard is closed.
        """
        self._check_open()
        if channel not in (Channel.ANSWER, Channel.REFUSAL, Channel.REASONING, Channel.TOOL_CALL):
            raise InputError("expected a channel in which an assistant writes", where="channel")
        return self._session(self, context.turns if context else (), channel, reasoning, name)

    async def judge(self, conversation: Conversation) -> Verdict:
        """Judge the last turn in the light of those before. Of an assistant's turn, its reasoning and the arguments of
        its tool calls are judged too, and the worst verdict counts.

        The span of a verdict that is not safe ends at the token at which its severity was first confirmed, when that
        was in the content of an answer. The most probable category is named.

        Raises:
            GuardOverloaded: when too much waits.
            GuardError: when it cannot judge.
        """
        self._check_open()
        await self._ready()
        if sum(map(_characters, conversation.turns)) < _LONG_TEXT:
            rendered = self._template.conversation(conversation)
        else:
            rendered = await asyncio.to_thread(self._template.conversation, conversation)
        if conversation.target is Target.PROMPT:
            return await self._judge_prompt(rendered, conversation.turns[-1].role)
        return await self._judge_answer(rendered, conversation.turns[-1])

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _judge_prompt(self, rendered: Rendered, role: Role) -> Verdict:
        verdicts = []
        for ids in self._prompt_windows(rendered, role):
            stream = self._stream(())
            try:
                logits = await stream.feed(ids, Target.PROMPT, last_only=True)
            finally:
                stream.close()
            token = self._token_verdict(Target.PROMPT, logits, -1, Span(0, 0))
            verdicts.append(self._verdict(Target.PROMPT, token, logits, -1))
        return worst(verdicts)

    def _prompt_windows(self, rendered: Rendered, role: Role) -> Iterator[list[int]]:
        """The prompt with its context, or, when that is too long, its parts; each ends with ``<|im_end|>``."""
        assert rendered.query is not None, "the last turn is not the assistant's"
        ids = list(rendered.ids[: rendered.query + 1])
        if len(ids) <= self._window:
            yield ids
            return
        start_id, end = self._template.tokenizer.control["<|im_start|>"], ids[-1]
        start = max(index for index, token_id in enumerate(ids) if token_id == start_id)
        header, body = _ends(ids[:start], self._window // 4), ids[start:-1]
        opener = [start_id, *_role_line(self._template.tokenizer, role)]
        stop = self._window - len(header) - 1
        yield [*header, *body[:stop], end]
        room = self._window - len(header) - len(opener) - 1
        while stop < len(body):
            seen = stop - self._window // 8
            stop = seen + room
            yield [*header, *opener, *body[seen:stop], end]

    async def _judge_answer(self, rendered: Rendered, turn: Turn) -> Verdict:
        texts = [readings for readings in (rendered.answer, rendered.reasoning, *rendered.tool_calls) if readings]
        if not texts:
            texts = [(self._closing(rendered, turn),)]
        keep = self._start(rendered.ids, min(readings[0].position for readings in texts))
        stop = max(readings[-1].position for readings in texts) + 1
        logits = await self._logits(rendered.ids[:keep], rendered.ids[keep:stop])
        verdicts = []
        for readings in texts:
            verdict = self._confirmed([Reading(position - keep, end) for position, end in readings], logits)
            verdicts.append(verdict if readings is rendered.answer else replace(verdict, span=None))
        return worst(verdicts)

    def _closing(self, rendered: Rendered, turn: Turn) -> Reading:
        """Where a turn that says nothing is judged: at the ``<|im_end|>`` that closes it."""
        end = self._template.tokenizer.control["<|im_end|>"]
        return Reading(max(index for index, token_id in enumerate(rendered.ids) if token_id == end), len(turn.content))

    def _start(self, ids: Sequence[int], position: int) -> int:
        """The place behind the last control token before a position: where a session of this text begins too."""
        control = set(self._template.tokenizer.control.values())
        return next(index for index in range(position, 0, -1) if ids[index - 1] in control)

    async def _logits(self, before: Sequence[int], ids: Sequence[int]) -> list[Logits]:
        """The logits of the heads for responses at these ids, in groups of `_GROUP`."""
        stream = self._begin(before)
        try:
            return [await stream.feed(group) for group in _groups(ids)]
        finally:
            stream.close()

    def _begin(self, before: Sequence[int]) -> Stream:
        """A stream behind these ids, or behind their two ends when they are too many."""
        return self._stream(_ends(before, self._window - self._window // 4))

    def _confirmed(self, readings: Sequence[Reading], groups: Sequence[Logits]) -> Verdict:
        """The verdict of a text by the rule that the module describes."""
        tokens, covered = [], 0
        for position, end in readings:
            group, index = divmod(position, _GROUP)
            tokens.append(self._token_verdict(Target.RESPONSE, groups[group], index, Span(covered, end)))
            covered = end
        decisive, first = confirmed(tokens, self._debounce)
        group, index = divmod(readings[decisive].position, _GROUP)
        verdict = self._verdict(Target.RESPONSE, tokens[decisive], groups[group], index)
        if verdict.severity is Severity.SAFE:
            return verdict
        return replace(verdict, span=Span(0, tokens[first].span.end))

    def _verdict(self, target: Target, token: TokenVerdict, logits: Logits, index: int) -> Verdict:
        named = token.severity is not Severity.SAFE and token.category is not None
        return Verdict(
            target=target,
            severity=token.severity,
            probabilities=token.probabilities,
            categories=(token.category,) if named and token.category else (),
            category_probabilities=self._readings[target].category_probabilities(logits.category[index]),
            guard=self.name,
        )

    def _token_verdict(self, target: Target, logits: Logits, index: int, span: Span) -> TokenVerdict:
        reading = self._readings[target]
        probabilities = reading.probabilities(logits.risk[index])
        shares = {
            Severity.SAFE: probabilities.safe,
            Severity.CONTROVERSIAL: probabilities.controversial,
            Severity.UNSAFE: probabilities.unsafe,
        }
        severity = max(Severity, key=lambda severity: (shares[severity], severity))
        category, probability = reading.top_category(logits.category[index])
        return TokenVerdict(span, severity, probabilities, category, probability)


class QwenIdText:
    """The text that the ids of one stream are, with a replacement character for bytes that are none."""

    def __init__(self, tokenizer: QwenTokenizer) -> None:
        self._tokenizer = tokenizer
        self._letters = codecs.getincrementaldecoder("utf-8")("replace")

    def check(self, ids: Sequence[int]) -> list[bytes]:
        """The bytes that each of them stands for. Raises InputError when one stands for no text."""
        pieces = []
        for place, token_id in enumerate(ids):
            piece = self._tokenizer.content(token_id)
            if piece is None:
                raise InputError(f"id {token_id} stands for no text", where=f"ids[{place}]")
            pieces.append(piece)
        return pieces

    def decode(self, ids: Sequence[int]) -> str:
        """The characters that these ids complete. Raises InputError when one stands for no text."""
        return self._letters.decode(b"".join(self.check(ids)))


class Qwen3StreamSession(TextSession):
    """One answer, one reasoning text, or the arguments of one call, in pieces.

    A text without a token of its own is judged at the control token that closes it.

    Of a model that shares the guard's tokenizer, as Qwen3 does, the ids can be given as they come, with `feed_ids` in
    place of ``feed``: then nothing is held back.
    """

    def __init__(
        self, guard: QwenStreamGuard, before: tuple[Turn, ...], channel: Channel, reasoning: str, name: str
    ) -> None:
        super().__init__(guard._open)
        self._guard = guard
        self._before = before
        self._channel = channel
        self._reasoning = reasoning
        self._tool = name
        self._text: IncrementalQwenTokens | None = None
        self._opening: Opening | None = None
        self._ids: Stream | None = None
        self._lead = 0
        self._covered = 0
        self._letters: QwenIdText | None = None

    async def feed_ids(self, ids: Sequence[int]) -> tuple[TokenVerdict, ...]:
        """Take the next tokens of the model that writes the text; return the verdict of each.

        Spans count the characters that the ids are when decoded, with a replacement character for bytes that are none;
        a character belongs to the token that completes it. The tokens are judged as they are, also where the tokenizer
        would have cut the text in another way.

        Raises:
            InputError: when an id stands for no text, as those of control tokens do, or text was fed before; the
                session is then closed.
            SessionClosed: after ``finish`` or ``close``.
            GuardError: when the guard cannot judge; the session is then closed.
        """
        return await self._alone(lambda: self._judge_ids(ids))

    async def _judge_ids(self, ids: Sequence[int]) -> list[TokenVerdict]:
        if self._text is not None and self._letters is None:
            raise InputError("the session was given text: it takes no ids", where="ids")
        if not ids:
            return []
        lead = [] if self._text is not None else await self._lead_ids()
        self._letters = self._letters or QwenIdText(self._guard._template.tokenizer)
        self._letters.check(ids)
        verdicts: list[TokenVerdict] = []
        known = [*lead, *ids]
        for start, group in zip(range(-len(lead), len(known), _GROUP), _groups(known), strict=False):
            self._check_open()
            logits = await self._stream().feed(group)
            for index in range(max(0, -start), len(group)):
                end = self._covered + len(self._letters.decode([ids[start + index]]))
                verdicts.append(self._verdict(logits, index, end))
        return verdicts

    async def _lead_ids(self) -> list[int]:
        """The ids of what the template puts before the text, when the text does not come with it."""
        await self._begin()
        assert self._opening is not None, "nothing was read yet"
        tokenizer = self._guard._template.tokenizer
        return [token.id for token in tokenizer.encode(self._opening.frame.before)]

    async def _judge(self, text: str, *, last: bool) -> list[TokenVerdict]:
        if self._letters is not None:
            if text:
                raise InputError("the session was given ids: it takes no text", where="text")
            return []
        stream = self._text or await self._begin()
        tokens = stream.finish().tokens if last else await _feed(stream, text)
        return await self._judged(tokens, stream, last=last)

    def close(self) -> None:
        """Give everything back at once; safe to call any number of times, also while a feed is running."""
        super().close()
        if self._ids is not None:
            self._ids.close()

    async def _begin(self) -> IncrementalQwenTokens:
        """Lay out what came before, and begin to read the text behind it."""
        await self._guard._ready()
        if sum(map(_characters, self._before)) + len(self._reasoning) < _LONG_TEXT:
            opening = self._lay_out()
        else:
            opening = await asyncio.to_thread(self._lay_out)
        self._opening = opening
        tokenizer = self._guard._template.tokenizer
        self._lead = tokenizer.lead(opening.frame)
        self._text = tokenizer.incremental(opening.frame, speculate=False)
        return self._text

    def _lay_out(self) -> Opening:
        return self._guard._template.opening(self._before, self._channel, reasoning=self._reasoning, name=self._tool)

    async def _judged(
        self, tokens: Sequence[Token], stream: IncrementalQwenTokens, *, last: bool
    ) -> list[TokenVerdict]:
        ids, lead = [token.id for token in tokens], self._leading(tokens)
        ends = [token.end for token in tokens[lead:]]
        if last and not ends:
            ids.append(self._guard._template.closing(self._channel)[0])
            ends.append(stream.characters)
        verdicts: list[TokenVerdict] = []
        for start, group in zip(range(-lead, len(ids), _GROUP), _groups(ids), strict=False):
            self._check_open()
            logits = await self._stream().feed(group)
            for index in range(max(0, -start), len(group)):
                verdicts.append(self._verdict(logits, index, ends[start + index]))
        return verdicts

    def _stream(self) -> Stream:
        if self._ids is None:
            assert self._opening is not None, "the text is read already"
            self._ids = self._guard._begin(self._opening.ids)
            self._opening, self._before, self._reasoning = None, (), ""
        return self._ids

    def _leading(self, tokens: Sequence[Token]) -> int:
        """How many of these tokens hold nothing of the text, but only of what the template puts before it."""
        for count, token in enumerate(tokens):
            self._lead -= self._guard._template.tokenizer.width(token.id)
            if self._lead < 0:
                return count
        return len(tokens)

    def _verdict(self, logits: Logits, index: int, end: int) -> TokenVerdict:
        span = Span(self._covered, end)
        self._covered = end
        return self._guard._token_verdict(Target.RESPONSE, logits, index, span)


def confirmed(tokens: Sequence[TokenVerdict], debounce: int) -> tuple[int, int]:
    """What the tokens of a text say together.

    Args:
        tokens: at least one.
        debounce: how many in a row confirm a severity; of fewer tokens, all.

    Returns:
        The index of the token that stands for the text, and that of the first at which its severity was confirmed.
    """
    length = min(debounce, len(tokens))
    mildest = [
        min(range(stop, stop - length, -1), key=lambda index: _gravity(tokens[index]))
        for stop in range(length - 1, len(tokens))
    ]
    decisive = max(mildest, key=lambda index: _gravity(tokens[index]))
    severity = tokens[decisive].severity
    first = next(place for place, index in enumerate(mildest) if tokens[index].severity is severity)
    return decisive, first + length - 1


def _gravity(token: TokenVerdict) -> tuple[Severity, float, float]:
    return token.severity, token.probabilities.unsafe, token.probabilities.flagged


def head_readings(config: Mapping[str, Any], custom: Collection[str] = ()) -> dict[Target, HeadReading]:
    """What the logits of each branch mean.

    Args:
        config: the config of a checkpoint.
        custom: names of categories that it may have beside the official ones.

    Raises:
        InputError: when a label map cannot be used; says which.
    """
    labels = head_labels(config, custom=custom)
    plain = (0.0, 0.0, 0.0)
    return {
        Target.PROMPT: HeadReading(1.0, plain, labels.query_risk, labels.query_category),
        Target.RESPONSE: HeadReading(1.0, plain, labels.risk, labels.category),
    }


def _role_line(tokenizer: QwenTokenizer, role: Role) -> list[int]:
    """The ids of the line that begins a turn; tools speak in a user's turn."""
    shown = Role.USER if role is Role.TOOL else role
    return [token.id for token in tokenizer.encode(f"{shown.value}\n")]


def _characters(turn: Turn) -> int:
    return len(turn.content) + len(turn.reasoning) + sum(len(call.arguments) for call in turn.tool_calls)


def _ends(ids: Sequence[int], most: int) -> list[int]:
    """These ids, or when they are more than that, the first and the last of them."""
    if len(ids) <= most:
        return list(ids)
    return [*ids[: most // 2], *ids[len(ids) - (most - most // 2) :]]


def _groups(ids: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(ids), _GROUP):
        yield ids[start : start + _GROUP]


async def _feed(stream: IncrementalQwenTokens, text: str) -> list[Token]:
    """The tokens that become final with this text. A long one is taken in slices, which changes no token, but lets
    others have their turn."""
    if len(text) < _LONG_TEXT:
        return stream.feed(text).tokens
    tokens: list[Token] = []
    for start in range(0, len(text), _SLICE):
        tokens += (await asyncio.to_thread(stream.feed, text[start : start + _SLICE])).tokens
    return tokens
