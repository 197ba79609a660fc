"""Gen guards in process: the released Qwen3Guard-Gen checkpoints, and fine-tuned ones of the same shape.

One worker thread runs the model. What waits together and is of similar length is computed together; a prompt whose
caller is gone is not computed at all. A verdict is what greedy decoding would answer, with the probability of each
severity and category (`tidegate.model.scoring`); an answer that is not of the form is an `UnreadableVerdict`.

One checkpoint may have many LoRA adapters (`tidegate.model.adapters`). `GenGuard.adapted` chooses one, for as little as
one request; what waits for several of them is computed together, and none has a part in what another one says.

A config may have a section ``tidegate`` that says how a fine-tuned guard answers: ``{"form": "reason", "categories":
{"prompt": [...], "response": [...]}}``, and its ``name`` and ``version``.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from tidegate.engine.worker import Padding, Work, Worker, answers_of
from tidegate.errors import GuardError, GuardUnavailable, InputError, SessionClosed, UnreadableVerdict
from tidegate.guards.rejudged import RejudgedSession
from tidegate.guards.session import OpenSessions
from tidegate.guards.terms import Terms
from tidegate.model.answers import Scores
from tidegate.model.onnx_backbone import is_export
from tidegate.model.onnx_scoring import OnnxGenModel
from tidegate.prompts import NONE, OFFICIAL, Form, LineKind, reason_form, texts_to_judge
from tidegate.types import Channel, Conversation, Probabilities, Severity, Target, Verdict, worst

if TYPE_CHECKING:
    from tidegate.model.scoring import GenModel

__all__ = ["GenGuard"]

_LONG_TEXT: Final = 2_048
"""From this many characters on, a prompt is tokenized beside the event loop and not in it."""
_MOST_TOKENS: Final = 8_192
"""Most tokens in one run, padding included."""
_SLACK: Final = 64
"""Padded tokens that are always worth a shared run."""
_BLOCK: Final = 240
"""Characters of a stream after which it is judged again (`tidegate.guards.rejudged`), as long as it is short."""
_SHARE: Final = 8
"""A long stream is judged again when it has grown by one part in so many."""


class GenGuard:
    """Judges prompts and answers with a Gen checkpoint. Usable from several event loops at once.

    An answer that is still being written is judged again and again, whole: a Stream guard is made for that.

    Args:
        name: a folder, also one of ``tidegate export``, or the name of a repository on the hub, which is then fetched.
        thinking: whether an assistant's reasoning and tool calls are judged ``apart`` from the answer, where the worst
            verdict counts, or ``together`` with it as one text.
        forms: what the model is asked about each target; None for what its config says.
        threads: how many threads torch may use for one run; None for its own choice.
        dtype: ``float32``, ``bfloat16`` or ``float16``; None for that of the checkpoint.
        device: where to compute, as torch names it.
        most_sessions: how many sessions may be open at once.
        most_waiting: how many texts may wait to be computed.
        adapters: folders with LoRA adapters for this checkpoint, as peft writes them, by name. The guard itself uses
            none: see `adapted`.

    Raises:
        InputError: when the name of an adapter has other characters than letters, digits and ``._-``, or is too long.
        GuardUnavailable: when the checkpoint or an adapter cannot be loaded, or the config is wrong; says why.
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
        adapters: Mapping[str, str | Path] = MappingProxyType({}),
    ) -> None:
        folders = {adapter: Path(folder) for adapter, folder in adapters.items()}
        model = _load(name, dtype, device, folders, threads)
        settings = _settings(name, model.settings)
        self._name = f"{settings.name or 'gen'}/{settings.version or Path(name).name}"
        self._adapter: str | None = None
        self.adapters: Final = model.adapters
        """The names of the adapters, in the order given."""
        self._forms = settings.forms() if forms is None else dict(forms)
        self._together = thinking == "together"
        self._longest = model.longest
        self._ids = model.tokenizer.ids
        self._open = OpenSessions(most_sessions)
        self._worker = _Worker(model, most_waiting=most_waiting, threads=threads)

    @property
    def name(self) -> str:
        """Name and version: those of the config, or ``gen/`` and the name of the folder; then ``+`` and the adapter."""
        return f"{self._name}+{self._adapter}" if self._adapter else self._name

    @property
    def together(self) -> bool:
        """Whether ``thinking`` is ``together``."""
        return self._together

    def adapted(self, adapter: str | None) -> GenGuard:
        """The same guard with one of its adapters, or None for none. Costs nothing: model, thread and limits are the
        same ones, and closing one closes all.

        Raises:
            InputError: when there is no such adapter; lists those that exist.
        """
        if adapter is not None and adapter not in self.adapters:
            known = f"known: {', '.join(self.adapters)}" if self.adapters else "the guard has none"
            raise InputError(f"unknown adapter {adapter!r}; {known}", where="adapter")
        guard = copy.copy(self)
        guard._adapter = adapter
        return guard

    def on_terms(self, terms: Terms) -> GenGuard:
        """The same guard, told the instructions of the terms; it heeds nothing else of them."""
        guard = copy.copy(self)
        if terms.instructions:
            guard._forms = {target: form.instructed(terms.instructions) for target, form in self._forms.items()}
        return guard

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

    def open(
        self, context: Conversation | None, channel: Channel = Channel.ANSWER, *, reasoning: str = "", name: str = ""
    ) -> RejudgedSession:
        """Open a session for one text that an assistant writes.

        Args:
            context: the turns before; None when nothing came before.
            channel: what the text is: ANSWER (also for REFUSAL), REASONING, or TOOL_CALL for the arguments of a call.
            reasoning: what the assistant thought before the text; judged with it when ``thinking`` is ``together``.
            name: the name of the called tool.

        Raises:
            InputError: for a channel in which no assistant writes.
            GuardOverloaded: when ``most_sessions`` are open.
            GuardUnavailable: when the guard is closed.
        """
        if self._worker.closed:
            raise GuardUnavailable("the guard is closed")
        return RejudgedSession(
            self.judge,
            context,
            channel,
            reasoning=reasoning if self._together else "",
            name=name,
            every=_BLOCK,
            share=_SHARE,
            sessions=self._open,
        )

    async def close(self) -> None:
        """Stop the thread and free the model; what waits fails. Safe to call twice."""
        await asyncio.to_thread(self._worker.close)

    async def __aenter__(self) -> GenGuard:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _judge_all(self, texts: Sequence[Conversation]) -> list[Verdict]:
        forms = [self._forms[text.target] for text in texts]
        prompts = [await self._tokens(form, text) for form, text in zip(forms, texts, strict=True)]
        adapters = [self._adapter] * len(texts)
        scores = await answers_of(map(self._worker.submit, forms, prompts, adapters))
        return [self._verdict(form, score) for form, score in zip(forms, scores, strict=True)]

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


@dataclass(slots=True, eq=False)
class _Work(Work[Scores]):
    """A prompt that waits."""

    form: Form
    ids: list[int]
    adapter: str | None


class _Worker(Worker[_Work]):
    """The model and the thread that runs it."""

    def __init__(self, model: GenModel | OnnxGenModel, *, most_waiting: int, threads: int | None) -> None:
        runtime = "ONNX Runtime" if isinstance(model, OnnxGenModel) else "torch"
        super().__init__(thread="tidegate-gen", runtime=runtime, most_waiting=most_waiting)
        self._model: GenModel | OnnxGenModel | None = model
        self._threads = threads

    def submit(self, form: Form, ids: list[int], adapter: str | None) -> asyncio.Future[Scores]:
        """Ask for the scores of a prompt with an adapter, from a running event loop.

        Raises:
            GuardOverloaded: when too much waits.
            SessionClosed: when the guard is closed.
        """
        work = _Work(form, ids, adapter)
        self._put(work)
        return work.future

    def _begin(self) -> None:
        if self._threads is not None and self._model is not None:
            self._model.use_threads(self._threads)

    def _free(self) -> None:
        self._model = None

    def _run(self, batch: list[_Work]) -> list[tuple[_Work, Scores | UnreadableVerdict]]:
        if self._model is None:
            raise SessionClosed("the guard is closed")
        adapters = [work.adapter for work in batch]
        scores = self._model.score(batch[0].form, [work.ids for work in batch], adapters)
        return list(zip(batch, scores, strict=True))

    def _sharing(self) -> Callable[[_Work], bool]:
        """A run is of one form and of prompts of similar length, whatever their adapters."""
        padding = Padding(_MOST_TOKENS, _SLACK)
        form: Form | None = None

        def joins(work: _Work) -> bool:
            nonlocal form
            if not padding.fits(len(work.ids)) or (form is not None and work.form != form):
                return False
            padding.add(len(work.ids))
            form = work.form
            return True

        return joins


def _load(
    name: str, dtype: str | None, device: str, adapters: Mapping[str, Path], threads: int | None
) -> GenModel | OnnxGenModel:
    if not is_export(Path(name)):
        return _load_checkpoint(name, dtype, device, adapters)
    if adapters:
        raise InputError("an export takes none: merge them into the checkpoint before", where="adapters")
    if dtype not in (None, "float32"):
        raise InputError("an export computes in float32", where="dtype")
    if device != "cpu":
        raise InputError("an export runs on the CPU", where="device")
    return OnnxGenModel.load(Path(name), threads=threads)


def _load_checkpoint(name: str, dtype: str | None, device: str, adapters: Mapping[str, Path]) -> GenModel:
    from tidegate.model.scoring import GenModel  # torch, which exports do without
    from tidegate.model.threads import computed_apart

    return computed_apart(lambda: GenModel.load(name, dtype=dtype, device=device, adapters=adapters))


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
