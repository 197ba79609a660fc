"""Gen guards in process: the released Qwen3Guard-Gen checkpoints, and fine-tuned ones of the same shape.

One worker thread runs the model. What waits together and is of similar length is computed together; a prompt whose
caller is gone is not computed at all. A verdict is what greedy decoding would answer, with the probability of each
severity and category (`tidegate.model.scoring`); an answer that is not of the form is an `UnreadableVerdict`.

A config may have a section ``tidegate`` that says how a fine-tuned guard answers: ``{"form": "reason", "categories":
{"prompt": [...], "response": [...]}}``, and its ``name`` and ``version``.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Literal
from weakref import WeakSet

from pydantic import BaseModel, ConfigDict, ValidationError

from tidegate.errors import GuardError, GuardOverloaded, GuardUnavailable, InputError, SessionClosed
from tidegate.model.scoring import GenModel, Scores
from tidegate.prompts import NONE, OFFICIAL, Form, LineKind, reason_form, texts_to_judge
from tidegate.types import Conversation, Probabilities, Role, Severity, Span, Target, TokenVerdict, Turn, Verdict, worst

__all__ = ["GenGuard", "GenSession"]

_LONG_TEXT: Final = 2_048
"""From this many characters on, a prompt is tokenized beside the event loop and not in it."""
_MOST_TOKENS: Final = 8_192
"""Most tokens in one run, padding included."""
_SLACK: Final = 64
"""Padded tokens that are always worth a shared run."""
_BLOCK: Final = 240
"""Characters of a stream after which it is judged again, as long as it is short."""
_SHARE: Final = 8
"""A long stream is judged again when it has grown by one part in so many."""


class GenGuard:
    """Judges prompts and answers with a Gen checkpoint. Usable from several event loops at once.

    An answer that is still being written is judged again and again, whole: a Stream guard is made for that.

    Args:
        name: a folder, or the name of a repository on the hub, which is then fetched.
        thinking: whether an assistant's reasoning and tool calls are judged ``apart`` from the answer, where the worst
            verdict counts, or ``together`` with it as one text.
        forms: what the model is asked about each target; None for what its config says.
        threads: how many threads torch may use for one run; None for its own choice.
        dtype: ``float32``, ``bfloat16`` or ``float16``; None for that of the checkpoint.
        device: where to compute, as torch names it.
        most_sessions: how many sessions may be open at once.
        most_waiting: how many texts may wait to be computed.

    Raises:
        GuardUnavailable: when the checkpoint cannot be loaded, or its config is wrong; says why.
    """

    def __init__(
        self,
        name: str,
        *,
        thinking: Literal["apart", "together"] = "apart",
        forms: Mapping[Target, Form] | None = None,
        threads: int | None = None,
        dtype: str | None = None,
        device: str = "cpu",
        most_sessions: int = 256,
        most_waiting: int = 1024,
    ) -> None:
        model = GenModel.load(name, dtype=dtype, device=device)
        settings = _settings(name, model.settings)
        self.name: Final = f"{settings.name or 'gen'}/{settings.version or Path(name).name}"
        """Name and version: those of the config, or ``gen/`` and the name of the folder."""
        self._forms = settings.forms() if forms is None else dict(forms)
        self._together = thinking == "together"
        self._longest = model.longest
        self._ids = model.ids
        self._most_sessions = most_sessions
        self._open: WeakSet[GenSession] = WeakSet()
        self._worker = _Worker(model, most_waiting=most_waiting, threads=threads)

    @property
    def sessions(self) -> int:
        """How many sessions are open now."""
        return len(self._open)

    @property
    def waiting(self) -> int:
        """How many texts wait to be computed."""
        return self._worker.waiting

    async def judge(self, conversation: Conversation) -> Verdict:
        """Judge the last turn in the light of the ones before; see ``thinking`` for a turn that says several things.

        The refusal is that of the answer.

        Raises:
            UnreadableVerdict: when the model does not answer in its form.
            GuardOverloaded: when too much waits.
            GuardError: when the text is longer than the model can read, or the guard is closed.
        """
        verdicts = await self._judge_all(texts_to_judge(conversation, together=self._together))
        return replace(worst(verdicts), refusal=verdicts[0].refusal)

    def open(self, context: Conversation | None) -> GenSession:
        """Open a session for text that an assistant writes after these turns; None when nothing came before.

        Raises:
            GuardOverloaded: when ``most_sessions`` are open.
            GuardUnavailable: when the guard is closed.
        """
        if self._worker.closed:
            raise GuardUnavailable("the guard is closed")
        if len(self._open) >= self._most_sessions:
            raise GuardOverloaded(f"{self._most_sessions} sessions are open already")
        session = GenSession(self, context.turns if context else ())
        self._open.add(session)
        return session

    async def close(self) -> None:
        """Stop the thread and free the model; what waits fails. Safe to call twice."""
        await asyncio.to_thread(self._worker.close)

    async def __aenter__(self) -> GenGuard:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _judge_all(self, texts: Sequence[Conversation]) -> list[Verdict]:
        futures: list[Future[Scores]] = []
        try:
            for text in texts:
                form = self._forms[text.target]
                futures.append(self._worker.submit(form, await self._tokens(form, text)))
            forms = [self._forms[text.target] for text in texts]
            scores = [await asyncio.wrap_future(future) for future in futures]
            return [self._verdict(form, score) for form, score in zip(forms, scores, strict=True)]
        finally:
            for future in futures:
                future.cancel()

    async def _tokens(self, form: Form, text: Conversation) -> list[int]:
        prompt = form.prompt(text)
        if sum(len(segment.text) for segment in prompt.segments if segment.is_content) < _LONG_TEXT:
            ids = self._ids(prompt)
        else:
            ids = await asyncio.to_thread(self._ids, prompt)
        if len(ids) > self._longest:
            raise GuardError(f"the prompt has {len(ids)} tokens: the model reads at most {self._longest}")
        return ids

    def _verdict(self, form: Form, score: Scores) -> Verdict:
        answer = form.read(score.answer)
        named = _shares(score.words.get(LineKind.CATEGORIES, {})) if answer.severity is not Severity.SAFE else {}
        severities = _shares(score.words[LineKind.SEVERITY])
        return Verdict(
            target=form.target,
            severity=answer.severity,
            probabilities=Probabilities(**{severity.word: severities[severity.label] for severity in Severity}),
            categories=answer.categories,
            category_probabilities={name: share for name, share in named.items() if name != NONE},
            refusal=answer.refusal,
            reason=answer.reason,
            guard=self.name,
        )


class GenSession:
    """One answer, or one reasoning text, that arrives in pieces: see `tidegate.guards.base.Session`.

    The text so far is judged whole when it has grown by a fixed number of characters, later by a fixed share of it, and
    at its end; the places depend on nothing but its length. Each verdict covers the characters since the one before;
    the last one of ``finish`` is that of the whole text, and covers none. Calls must not overlap, except ``close``.
    """

    def __init__(self, guard: GenGuard, before: tuple[Turn, ...]) -> None:
        self._guard = guard
        self._before = before
        self._text = ""
        self._covered = 0
        self._last: TokenVerdict | None = None
        self._busy = False
        self._closed = False

    async def feed(self, text: str) -> tuple[TokenVerdict, ...]:
        """Take more text; return the verdicts of what became long enough. May be ().

        Raises:
            SessionClosed: after ``finish`` or ``close``.
            GuardError: when the guard cannot judge; the session is then closed.
        """
        return await self._take(text, last=False)

    async def finish(self) -> tuple[TokenVerdict, ...]:
        """The text is complete: return the verdict of what remains and that of the whole text, and close.

        Raises:
            SessionClosed: after ``finish`` or ``close``.
            GuardError: when the guard cannot judge.
        """
        verdicts = await self._take("", last=True)
        self.close()
        return verdicts

    def close(self) -> None:
        """Give everything back at once; safe to call any number of times, also while a feed is running."""
        self._closed = True
        self._guard._open.discard(self)

    async def _take(self, text: str, *, last: bool) -> tuple[TokenVerdict, ...]:
        if self._closed:
            raise SessionClosed("the session is closed")
        if self._busy:
            raise GuardError("a session takes one piece of text at a time")
        self._busy = True
        try:
            self._text += text
            verdicts: list[TokenVerdict] = []
            while (end := self._covered + max(_BLOCK, self._covered // _SHARE)) <= len(self._text):
                verdicts.append(await self._judge(end))
            if last and (self._covered < len(self._text) or self._last is None):
                verdicts.append(await self._judge(len(self._text)))
            if last and self._last is not None and self._covered:
                verdicts.append(replace(self._last, span=Span(self._covered, self._covered)))
            if self._closed:
                raise SessionClosed("the session was closed while it judged")
            return tuple(verdicts)
        except BaseException:
            self.close()
            raise
        finally:
            self._busy = False

    async def _judge(self, end: int) -> TokenVerdict:
        """Judge the text up to a place, and go on behind it."""
        if self._closed:
            raise SessionClosed("the session was closed while it judged")
        turn = Turn(Role.ASSISTANT, self._text[:end])
        (verdict,) = await self._guard._judge_all([Conversation((*self._before, turn))])
        category = verdict.categories[0] if verdict.categories else None
        self._last = TokenVerdict(
            span=Span(self._covered, end),
            severity=verdict.severity,
            probabilities=verdict.probabilities,
            category=category,
            category_probability=verdict.category_probabilities.get(category, 0.0) if category else 0.0,
        )
        self._covered = end
        return self._last


@dataclass(slots=True, eq=False)
class _Work:
    """A prompt that waits."""

    form: Form
    ids: list[int]
    future: Future[Scores] = field(default_factory=Future)


class _Worker:
    """The model and the thread that runs it."""

    def __init__(self, model: GenModel, *, most_waiting: int, threads: int | None) -> None:
        self._model: GenModel | None = model
        self._most_waiting = most_waiting
        self._threads = threads
        self._waiting: deque[_Work] = deque()
        self._wake = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def closed(self) -> bool:
        return self._closed

    def submit(self, form: Form, ids: list[int]) -> Future[Scores]:
        """Ask for the scores of a prompt.

        Raises:
            GuardOverloaded: when too much waits.
            SessionClosed: when the guard is closed.
        """
        work = _Work(form, ids)
        with self._wake:
            if self._closed:
                raise SessionClosed("the guard is closed")
            if len(self._waiting) >= self._most_waiting:
                raise GuardOverloaded(f"{self._most_waiting} texts wait already")
            self._waiting.append(work)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="tidegate-gen", daemon=True)
                self._thread.start()
            self._wake.notify()
        return work.future

    def close(self) -> None:
        """Stop the thread after the run that it is in, refuse what waits, and free the model. Safe to call twice."""
        with self._wake:
            self._closed = True
            waiting = list(self._waiting)
            self._waiting.clear()
            self._wake.notify()
            thread = self._thread
            if thread is None:
                self._model = None
        for work in waiting:
            if work.future.set_running_or_notify_cancel():
                work.future.set_exception(SessionClosed("the guard is closed"))
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _work(self) -> None:
        if self._threads is not None and self._model is not None:
            self._model.use_threads(self._threads)
        while batch := self._next_batch():
            self._answer(batch)
            del batch
        self._model = None

    def _next_batch(self) -> list[_Work]:
        """The oldest prompt and what can share its run; [] when the guard is closed."""
        with self._wake:
            while True:
                self._wake.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return []
                if batch := [work for work in _choose(self._waiting) if work.future.set_running_or_notify_cancel()]:
                    return batch

    def _answer(self, batch: list[_Work]) -> None:
        scores: Sequence[Scores | GuardError]
        try:
            if self._model is None:
                raise SessionClosed("the guard is closed")
            scores = self._model.score(batch[0].form, [work.ids for work in batch])
        except GuardError as error:
            scores = [error] * len(batch)
        except Exception as error:
            scores = [GuardError(f"torch could not compute: {type(error).__name__}")] * len(batch)
        for work, score in zip(batch, scores, strict=True):
            if isinstance(score, Scores):
                work.future.set_result(score)
            else:
                work.future.set_exception(score)


def _choose(waiting: deque[_Work]) -> list[_Work]:
    """Take the oldest prompt and those of its form that can share its run without much padding."""
    batch: list[_Work] = []
    kept: list[_Work] = []
    widest = useful = 0
    while waiting:
        work = waiting.popleft()
        length = len(work.ids)
        most, total = max(widest, length), useful + length
        padded = most * (len(batch) + 1)
        fits = padded <= _MOST_TOKENS and padded <= 1.35 * total + _SLACK
        if not batch or (work.form is batch[0].form and fits):
            batch.append(work)
            widest, useful = most, total
        else:
            kept.append(work)
    waiting.extend(kept)
    return batch


class _Settings(BaseModel):
    """The section ``tidegate`` of a config."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = ""
    version: str = ""
    form: Literal["official", "reason"] = "official"
    categories: dict[Target, tuple[str, ...]] = {}

    def forms(self) -> dict[Target, Form]:
        if self.form == "official":
            return dict(OFFICIAL)
        return {target: reason_form(target, self.categories.get(target, ())) for target in Target}


def _settings(name: str, section: Mapping[str, object]) -> _Settings:
    try:
        settings = _Settings.model_validate(section)
        if settings.categories and settings.form == "official":
            raise InputError("the official form has its own", where="categories")
        settings.forms()
    except (ValidationError, InputError) as error:
        raise GuardUnavailable(f"the section tidegate of the config of {name} is wrong: {_first(error)}") from error
    return settings


def _first(error: ValidationError | InputError) -> str:
    if isinstance(error, InputError):
        return str(error)
    wrong = error.errors(include_input=False, include_url=False)[0]
    return f"{'.'.join(map(str, wrong['loc']))}: {wrong['msg']}"


def _shares(probabilities: Mapping[str, float]) -> dict[str, float]:
    """The same probabilities, so that they add up to 1."""
    total = sum(probabilities.values())
    return {word: probability / total for word, probability in probabilities.items()} if total else {}
