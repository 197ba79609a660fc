"""The guard in the wheel: a small model of the Stream architecture on ONNX Runtime, without torch, and beside it a
table of n-grams (model/wide.py) whose word is added to the model's.

A turn becomes ``<|user|> tokens <|end|>`` or ``<|assistant|> tokens <|end|>``. The model was trained on these two: what
a system or a tool says is judged as if a user had written it, and reasoning as if it were an answer. A prompt is judged
at its ``<|end|>``; an answer, after the last user turn as context, at each of its tokens and at its ``<|end|>``. Text
longer than the window is judged in overlapping windows; no token is skipped and the worst verdict wins. Windows begin
at fixed token numbers and tokens are final only when no further text can change them, so every verdict is a function of
the text before it and of nothing else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from tidegate.engine.worker import answers_of
from tidegate.errors import GuardUnavailable
from tidegate.guards.edge_config import EdgeConfig, Row, Totals, read_config
from tidegate.guards.edge_engine import Engine, Logits
from tidegate.guards.edge_engine import Sequence as CachedSequence
from tidegate.guards.session import OpenSessions, TextSession, check_written
from tidegate.model.tokens import CONTROL_TOKENS, IncrementalTokens, TextTokenizer, Token
from tidegate.model.wide import COLUMNS, LEFT, NgramHasher, WideTable
from tidegate.types import Channel, Conversation, Role, Severity, Span, Target, TokenVerdict, Turn, Verdict, worst

__all__ = ["EDGE_FILES", "SHIPPED", "WIDE_FILE", "EdgeGuard", "EdgeSession"]

SHIPPED: Final = Path(__file__).parent / "edge_model"
"""The model in the wheel."""
EDGE_FILES: Final = ("model.onnx", "tokenizer.json", "config.json")
"""What the folder of an edge guard holds."""
WIDE_FILE: Final = "ngrams.npy"
"""What it holds besides when its config has a ``wide`` section: the table of n-grams (model/wide.py)."""

_IN_FLIGHT: Final = 16
"""How many windows of one text are computed at once: more would make other texts wait."""
_LONG_TEXT: Final = 2_048
"""From this many characters on, text is tokenized beside the event loop and not in it."""
_SLICE: Final = 4_096
"""Characters of a long text that are tokenized at once: while that runs, no other thread does."""


T = TypeVar("T")


class _Window(NamedTuple):
    """Tokens ``[seen, stop)`` of a text, of which those from ``first`` on are new in this window."""

    seen: int
    first: int
    stop: int


class _Job(NamedTuple):
    """Ids to append to a sequence, the tokens of a session's text that are among them, and the totals of n-grams at
    each of these."""

    sequence: CachedSequence
    ids: list[int]
    tokens: Sequence[Token] = ()
    totals: Sequence[Totals] = ()


class _Template:
    """From turns to ids: the one place that knows where control tokens go."""

    def __init__(self, tokenizer: TextTokenizer, config: EdgeConfig) -> None:
        self._tokenizer = tokenizer
        self._control = tokenizer.control
        self._config = config

    @property
    def end(self) -> int:
        return self._control["<|end|>"]

    def prompt(self, tokens: Sequence[Token], *, later: bool) -> list[int]:
        more = [self._control["<|more|>"]] if later else []
        return [self._control["<|user|>"], *more, *(token.id for token in tokens), self.end]

    async def header(self, before: Sequence[Turn]) -> tuple[int, ...]:
        """The last user turn as context, its middle left out when it is long; () when there is none."""
        content = next((turn.content for turn in reversed(before) if turn.role is Role.USER), "")
        if not content:
            return ()
        limit = self._config.context
        head = limit // 2
        ids = await self._ends(content, head, limit - head)
        if len(ids) > limit:
            ids = [*ids[:head], self._control["<|more|>"], *ids[len(ids) - (limit - head) :]]
        return (self._control["<|user|>"], *ids, self.end)

    async def _ends(self, text: str, first: int, last: int) -> list[int]:
        """The ids of a text; of a long one its middle may be left out, with more than ``first + last`` remaining."""
        stream = self._tokenizer.incremental()
        tokens: list[Token] = []
        done = 0
        while done < len(text):
            tokens += await _feed(stream, text[done : done + _SLICE])
            done += _SLICE
            if done < len(text) and len(tokens) >= first:
                ids = await self._last_ids(text, done, last)
                if ids is not None:
                    return [*(token.id for token in tokens), *ids]
                return [token.id for token in [*tokens, *await _feed(stream, text[done:]), *stream.finish()]]
        return [token.id for token in [*tokens, *stream.finish()]]

    async def _last_ids(self, text: str, done: int, count: int) -> list[int] | None:
        """The ids of the end of a text, found without the middle; None when that cannot be."""
        width = _SLICE
        while len(text) - width > done:
            ids = await asyncio.to_thread(self._tokenizer.last_ids, text, len(text) - width, count + 1)
            if ids is not None:
                return ids
            width *= 4
        return None

    def opening(self, header: tuple[int, ...], *, later: bool) -> list[int]:
        more = [self._control["<|more|>"]] if later else []
        return [*header, self._control["<|assistant|>"], *more]

    async def tokens(self, text: str) -> list[Token]:
        stream = self._tokenizer.incremental()
        tokens = await _feed(stream, text)
        return [*tokens, *stream.finish()]

    def prompt_windows(self, count: int) -> list[_Window]:
        """Windows of a prompt of ``count`` tokens."""
        room, overlap = self._config.window - 3, self._config.overlap
        windows = [_Window(0, 0, min(count, room))]
        while windows[-1].stop < count:
            stop = windows[-1].stop
            windows.append(_Window(stop - overlap, stop, min(count, stop - overlap + room)))
        return windows

    def answer_windows(self, count: int, header: tuple[int, ...]) -> list[_Window]:
        """Windows of an answer of ``count`` tokens: the same that a session makes as the answer grows."""
        windows = [_Window(0, 0, min(count, self.first_room(header)))]
        while windows[-1].stop < count:
            stop = windows[-1].stop
            seen = stop - self._config.overlap
            windows.append(_Window(seen, stop, min(count, stop + self.later_room(header))))
        return windows

    def first_room(self, header: tuple[int, ...]) -> int:
        """How many tokens of an answer the first window takes; one position is kept for ``<|end|>``."""
        return self._config.window - len(header) - 2

    def later_room(self, header: tuple[int, ...]) -> int:
        """How many new tokens of an answer each later window takes."""
        return self._config.window - len(header) - 3 - self._config.overlap


class EdgeGuard:
    """Judges prompts and answers, whole and as they are written. One model and one thread for all sessions.

    Usable from several event loops at once.

    Args:
        folder: holds ``model.onnx``, ``tokenizer.json`` and ``config.json``; None for the one that is shipped.
        threads: how many threads one run of the model may use.
        most_sessions: how many sessions may be open at once.
        most_waiting: how many pieces of text may wait to be computed.

    Raises:
        GuardUnavailable: when the folder is incomplete or one of its files cannot be used; says which.
    """

    def __init__(
        self, folder: Path | None = None, *, threads: int = 1, most_sessions: int = 1024, most_waiting: int = 4096
    ) -> None:
        folder = SHIPPED if folder is None else folder
        missing = [name for name in EDGE_FILES if not (folder / name).is_file()]
        if missing:
            raise GuardUnavailable(f"{folder} lacks {', '.join(missing)}: expected {', '.join(EDGE_FILES)}")
        self.config, self._readings = read_config(folder / "config.json")
        self.tokenizer = _read_tokenizer(folder / "tokenizer.json")
        self._wide = _read_wide(folder / WIDE_FILE, self.tokenizer) if self.config.wide else None
        self._template = _Template(self.tokenizer, self.config)
        self._engine = Engine(folder / "model.onnx", threads=threads, most_waiting=most_waiting)
        self._open = OpenSessions(most_sessions)

    @property
    def name(self) -> str:
        """Name and version, as ``edge/1``."""
        return f"{self.config.name}/{self.config.version}"

    @property
    def sessions(self) -> int:
        """How many sessions are open now."""
        return len(self._open)

    def open(
        self, context: Conversation | None, channel: Channel = Channel.ANSWER, *, reasoning: str = "", name: str = ""
    ) -> EdgeSession:
        """Open a session for one text that an assistant writes; whatever the channel, it is judged as an answer.

        Args:
            context: the turns before, of which the last user turn counts; None when nothing came before.
            channel: what the text is.
            reasoning: not used.
            name: not used.

        Raises:
            InputError: for a channel in which no assistant writes.
            GuardOverloaded: when ``most_sessions`` are open.
            GuardUnavailable: when the guard is closed.
        """
        if self._engine.closed:
            raise GuardUnavailable("the guard is closed")
        check_written(channel)
        return EdgeSession(self, context.turns if context else ())

    async def judge(self, conversation: Conversation) -> Verdict:
        """Judge the last turn. Of an assistant turn, its reasoning and tool-call arguments are judged too.

        The verdict is the worst of all windows and texts; its span is the window that it came from, when it came from
        content that needed more than one.

        Raises:
            GuardOverloaded: when too much waits.
            GuardError: when it cannot judge.
        """
        if conversation.target is Target.PROMPT:
            return await self._judge_prompt(conversation.turns[-1])
        *before, turn = conversation.turns
        header = await self._template.header(before)
        beside = [text for text in (turn.reasoning, *(call.arguments for call in turn.tool_calls)) if text]
        verdicts = [await self._judge_answer(header, turn.content)] if turn.content or not beside else []
        for text in beside:
            verdicts.append(_without_span(await self._judge_answer(header, text)))
        return worst(verdicts)

    async def close(self) -> None:
        """Stop the thread and free the model; sessions that are open fail from now on. Safe to call twice."""
        await asyncio.to_thread(self._engine.close)

    async def __aenter__(self) -> EdgeGuard:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _judge_prompt(self, turn: Turn) -> Verdict:
        tokens = await self._template.tokens(turn.content)
        windows = self._template.prompt_windows(len(tokens))
        evidence = self._evidence(Target.PROMPT, [token.id for token in tokens])
        verdicts: list[Verdict] = []
        for part in _groups(windows):
            jobs = [
                _Job(CachedSequence(), self._template.prompt(tokens[w.seen : w.stop], later=w.seen > 0)) for w in part
            ]
            for window, logits in zip(part, await self._compute(jobs, last_only=True), strict=True):
                span = _span(tokens, window) if len(windows) > 1 else None
                row = Row(logits.query_risk[-1], logits.query_category[-1], _total(evidence[window.seen : window.stop]))
                verdicts.append(self._verdict(Target.PROMPT, row, span))
        return worst(verdicts)

    async def _judge_answer(self, header: tuple[int, ...], text: str) -> Verdict:
        tokens = await self._template.tokens(text)
        windows = self._template.answer_windows(len(tokens), header)
        evidence = self._evidence(Target.RESPONSE, [token.id for token in tokens])
        verdicts: list[Verdict] = []
        for part in _groups(windows):
            jobs = []
            for window in part:
                ids = self._template.opening(header, later=window.seen > 0)
                ids += [token.id for token in tokens[window.seen : window.stop]]
                ids += [self._template.end] if window.stop == len(tokens) else []
                jobs.append(_Job(CachedSequence(), ids))
            for window, logits in zip(part, await self._compute(jobs, last_only=True), strict=True):
                span = _span(tokens, window) if len(windows) > 1 else None
                row = Row(logits.risk[-1], logits.category[-1], _total(evidence[window.seen : window.stop]))
                verdicts.append(self._verdict(Target.RESPONSE, row, span))
        return worst(verdicts)

    def _evidence(self, target: Target, ids: Sequence[int], before: Sequence[int] = ()) -> NDArray[np.int64]:
        """What the n-grams of tokens say, by token; see `WideTable.evidence`."""
        if self._wide is None:
            return np.zeros((len(ids), COLUMNS + 1), np.int64)
        return self._wide.evidence(target, ids, before)

    async def _compute(self, jobs: Sequence[_Job], *, last_only: bool = False) -> list[Logits]:
        """The logits of each job, computed together where they fit; sequences used once are given back."""
        return await answers_of(self._engine.submit(job.sequence, job.ids, last_only=last_only) for job in jobs)

    def _verdict(self, target: Target, row: Row, span: Span | None) -> Verdict:
        reading = self._readings[target]
        probabilities = reading.probabilities(row.risk, row.evidence)
        thresholds = self.config.thresholds
        limits = thresholds.prompt if target is Target.PROMPT else thresholds.response
        severity = limits.severity(probabilities)
        categories = reading.category_probabilities(row.category)
        likely = [name for name, p in categories.items() if p >= self.config.category_threshold]
        return Verdict(
            target=target,
            severity=severity,
            probabilities=probabilities,
            categories=() if severity is Severity.SAFE else tuple(sorted(likely, key=lambda n: -categories[n])),
            category_probabilities=categories,
            span=span,
            guard=self.name,
        )

    def _token_verdict(self, row: Row, span: Span, *, whole: bool = False) -> TokenVerdict:
        reading = self._readings[Target.RESPONSE]
        probabilities = reading.probabilities(row.risk, row.evidence)
        limits = self.config.thresholds.response if whole else self.config.thresholds.token
        category, probability = reading.top_category(row.category)
        return TokenVerdict(span, limits.severity(probabilities), probabilities, category, probability)


class EdgeSession(TextSession):
    """One answer, or one reasoning text, that arrives in pieces.

    The last verdict of ``finish`` is that of the whole text, at its end, and covers no character of its own.
    """

    def __init__(self, guard: EdgeGuard, before: tuple[Turn, ...]) -> None:
        super().__init__(guard._open)
        self._guard = guard
        self._before = before
        self._text = guard.tokenizer.incremental()
        self._header: tuple[int, ...] | None = None
        self._sequence = CachedSequence()
        self._opening: list[int] = []
        self._room = 0
        self._recent: list[int] = []
        self._left: list[int] = []
        self._evidence = guard._evidence(Target.RESPONSE, ())
        self._total: Totals = (0, 0, 0)
        self._covered = 0

    def close(self) -> None:
        """Give everything back at once; safe to call any number of times, also while a feed is running."""
        super().close()
        self._sequence.close()

    async def _judge(self, text: str, *, last: bool) -> list[TokenVerdict]:
        tokens = self._text.finish() if last else await _feed(self._text, text)
        if not tokens and not last:
            return []
        if self._header is None:
            self._header = await self._guard._template.header(self._before)
            self._begin(self._header)
        jobs = self._plan(tokens, self._header)
        if last:
            jobs = jobs or [_Job(self._sequence, self._opening)]
            jobs[-1].ids.append(self._guard._template.end)
        verdicts: list[TokenVerdict] = []
        for group in _groups(jobs):
            self._check_open()
            for job, logits in zip(group, await self._guard._compute(group), strict=True):
                ended = last and job is jobs[-1]
                verdicts += self._read(job, logits, len(job.ids) - len(job.tokens) - ended)
        if last:
            span = Span(self._covered, self._text.characters)
            row = Row(logits.risk[-1], logits.category[-1], self._total)
            verdicts.append(self._guard._token_verdict(row, span, whole=True))
        return verdicts

    def _begin(self, header: tuple[int, ...]) -> None:
        """Begin a window: the first one, or one that repeats the end of the answer so far."""
        later = bool(self._recent)
        self._sequence = CachedSequence()
        self._opening = self._guard._template.opening(header, later=later) + self._recent
        template = self._guard._template
        self._room = template.later_room(header) if later else template.first_room(header)
        self._total = _total(self._evidence)

    def _plan(self, tokens: list[Token], header: tuple[int, ...]) -> list[_Job]:
        """What to compute for these tokens: a job for each window that they fall into."""
        jobs: list[_Job] = []
        at, overlap = 0, self._guard.config.overlap
        every = [token.id for token in tokens]
        evidence = self._guard._evidence(Target.RESPONSE, every, self._left)
        self._left = (self._left + every)[-LEFT:]
        while at < len(tokens):
            if not self._room:
                self._begin(header)
            part, ids = tokens[at : at + self._room], every[at : at + self._room]
            said = evidence[at : at + self._room]
            totals = [_three(row) for row in (np.cumsum(said, axis=0) + self._total).tolist()]
            jobs.append(_Job(self._sequence, self._opening + ids, part, totals))
            self._opening = []
            self._recent = (self._recent + ids)[-overlap:]
            self._evidence = np.concatenate([self._evidence, said])[-overlap:]
            self._total = totals[-1]
            self._room -= len(part)
            at += len(part)
        return jobs

    def _read(self, job: _Job, logits: Logits, first: int) -> list[TokenVerdict]:
        verdicts = []
        for at, (token, total) in enumerate(zip(job.tokens, job.totals, strict=True), start=first):
            span = Span(self._covered, token.end)
            self._covered = token.end
            verdicts.append(self._guard._token_verdict(Row(logits.risk[at], logits.category[at], total), span))
        return verdicts


async def _feed(stream: IncrementalTokens, text: str) -> list[Token]:
    """The tokens that become final with this text. A long one is taken in slices, which changes no token, but lets
    others have their turn, and ends soon when nobody waits any more."""
    if len(text) < _LONG_TEXT:
        return stream.feed(text)
    tokens: list[Token] = []
    for start in range(0, len(text), _SLICE):
        tokens += await asyncio.to_thread(stream.feed, text[start : start + _SLICE])
    return tokens


def _groups(values: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(values), _IN_FLIGHT):
        yield values[start : start + _IN_FLIGHT]


def _span(tokens: Sequence[Token], window: _Window) -> Span:
    """The characters that a window of several covers."""
    return Span(tokens[window.seen - 1].end if window.seen else 0, tokens[window.stop - 1].end)


def _total(evidence: NDArray[np.int64]) -> Totals:
    """The totals over some tokens."""
    return _three(evidence.sum(axis=0).tolist())


def _three(values: list[int]) -> Totals:
    unsafe, controversial, count = values
    return unsafe, controversial, count


def _without_span(verdict: Verdict) -> Verdict:
    """The verdict of a text beside the content: a span in it would be read as one in the content."""
    return replace(verdict, span=None)


def _read_wide(path: Path, tokenizer: TextTokenizer) -> WideTable:
    try:
        return WideTable.load(path, NgramHasher(tokenizer.token_bytes()))
    except (OSError, ValueError) as error:
        raise GuardUnavailable(f"{path} is not the table of n-grams that the config speaks of: {error}") from error


def _read_tokenizer(path: Path) -> TextTokenizer:
    try:
        tokenizer = TextTokenizer.load(path)
    except Exception as error:  # the tokenizers library raises plain Exceptions
        raise GuardUnavailable(f"{path} is not a tokenizer of an edge guard: {error}") from error
    if lacking := [name for name in CONTROL_TOKENS if name not in tokenizer.control]:
        raise GuardUnavailable(f"{path} lacks the control tokens {', '.join(lacking)}")
    return tokenizer
