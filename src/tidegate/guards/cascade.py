"""Two guards as one: a cheap one judges everything, a stronger one is asked where the first is not sure.

Whole texts. The first guard judges. The second is asked when the first one's probability that the text is not safe
lies between two thresholds, both included, or when a listed category is likely; then the second guard's verdict
counts. The name of the guard in the verdict says whose it is: ``cascade[edge/1]``. When the first guard fails, its
error passes. When the second fails, its error passes too: the cascade never falls back on the first verdict by itself.
``on_second_error: first`` makes it do so, and the verdict says it: ``cascade[edge/1; remote/1 failed]``. (The verdicts
of tokens name no guard: in a stream only `CascadeGuard.counts` tells.)

Streams: stop and confirm. The first guard's session judges every token. A run of flagged tokens is held back until it
is as long as the debounce asks for, or until the text ends: that is an alarm. The second guard then judges the whole
answer up to the last token of the run, with all the turns before, and the run goes out as the second guard says. When
it says that the answer is not safe, that stands for as long as the run goes on; when it says safe, or fails where it
may, it is asked again after ``again_after`` more tokens of the run. A token that is not flagged ends the run; the next
run is a new alarm. Shorter runs go out as the first guard says, so a policy's debounce must not be smaller than the
cascade's. What the first guard does not flag in a stream is not asked about: there, the cascade finds what the first
guard finds.

What is guaranteed about pieces: the second guard is asked about the text up to a token that the first guard gave out
for good, never about what happened to arrive with it. So if the verdicts of both guards are functions of the text, the
verdicts of a stream are too, however it is cut. A second guard that fails, or that answers the same question in two
ways, breaks that from the token on at which it was asked.

Method: cost-aware cascades of classifiers as in Viola and Jones (2001), with thresholds as in Chow (1970), "On optimum
recognition error and reject tradeoff".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tidegate.errors import GuardError, GuardUnavailable, InputError
from tidegate.guards.base import Guard, Session, StreamGuard, judges_together
from tidegate.guards.rejudged import token_verdict
from tidegate.guards.second import SecondGuard
from tidegate.guards.session import TextSession, assistant_turn
from tidegate.guards.spec_file import read_spec_file
from tidegate.types import Channel, Conversation, Severity, Target, TokenVerdict, Turn, Verdict

__all__ = [
    "AskBetween",
    "AskOptions",
    "CascadeConfig",
    "CascadeCounts",
    "CascadeGuard",
    "CascadeSession",
    "ConfirmOptions",
    "load_cascade",
    "read_cascade",
]

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
_SPEC: Final = "expected cascade:FIRST,SECOND with the specs of two guards, or cascade:FILE with a YAML or JSON file"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class AskBetween(_Frozen):
    """The second guard is asked when the probability of not being safe is in ``[low, high]``.

    The default asks nearly always when the first guard is not nearly certain. Good values depend on both guards:
    `tidegate.evals.thresholds.find_thresholds` finds them on data.
    """

    low: Share = 0.05
    high: Share = 0.95

    @model_validator(mode="after")
    def _ordered(self) -> AskBetween:
        if self.low > self.high:
            raise ValueError(f"low must not be greater than high, got {self.low} and {self.high}")
        return self


class AskOptions(_Frozen):
    """When the second guard is asked about a whole text.

    Attributes:
        prompt: the thresholds of prompts.
        response: the thresholds of responses.
        categories: for a category, the least probability that the text is not safe and of this category. From there on
            the second guard is asked, whatever the thresholds say.
    """

    prompt: AskBetween = AskBetween()
    response: AskBetween = AskBetween()
    categories: Mapping[str, Share] = Field(default_factory=dict)

    def wanted(self, verdict: Verdict) -> bool:
        """Whether the second guard is to be asked after this verdict of the first."""
        between = self.prompt if verdict.target is Target.PROMPT else self.response
        if between.low <= verdict.probabilities.flagged <= between.high:
            return True
        return any(_likelihood(verdict, name) >= least for name, least in self.categories.items())


class ConfirmOptions(_Frozen):
    """How alarms of a stream are confirmed.

    Attributes:
        debounce: how many flagged tokens in a row are an alarm.
        flagged_from: a token is flagged when its probability of not being safe is at least this; None for the first
            guard's own call.
        again_after: after how many more tokens of a run that the second guard found safe it is asked again.
    """

    debounce: Annotated[int, Field(ge=1, le=1000)] = 2
    flagged_from: Share | None = None
    again_after: Annotated[int, Field(ge=1, le=1_000_000)] = 64

    def flagged(self, token: TokenVerdict) -> bool:
        """Whether a token of the first guard belongs to a run."""
        if self.flagged_from is None:
            return token.severity is not Severity.SAFE
        return token.probabilities.flagged >= self.flagged_from


class CascadeConfig(_Frozen):
    """A cascade as a file: the only keys that must be there are ``first`` and ``second``.

    Attributes:
        first: spec of the guard that judges everything; it must be able to watch streams.
        second: spec of the guard that is asked.
        ask: when it is asked about whole texts.
        confirm: how it is asked in streams.
        on_second_error: ``raise`` passes the second guard's error on; ``first`` lets the first guard's verdict stand.
        second_timeout_s: seconds that the second guard may take for one answer.
        most_asked: how many questions to the second guard may be open at once, over all texts and streams; one more is
            refused as overload.
    """

    first: Annotated[str, Field(min_length=1)]
    second: Annotated[str, Field(min_length=1)]
    ask: AskOptions = AskOptions()
    confirm: ConfirmOptions = ConfirmOptions()
    on_second_error: Literal["raise", "first"] = "raise"
    second_timeout_s: Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)] = 20.0
    most_asked: Annotated[int, Field(ge=1, le=1_000_000)] = 256


@dataclass(slots=True)
class CascadeCounts:
    """What a cascade did so far.

    Attributes:
        judged: whole texts that the first guard judged.
        asked: how many of them the second guard was asked about.
        alarms: questions from streams that ended, those after ``again_after`` tokens included.
        confirmed: how many of these it found not safe.
        failed: questions, of both kinds, that the second guard did not answer.
    """

    judged: int = 0
    asked: int = 0
    alarms: int = 0
    confirmed: int = 0
    failed: int = 0


class CascadeGuard:
    """Judges with the first guard, and asks the second where the config says; see the module's text.

    Args:
        first: judges everything; closed with the cascade.
        second: is asked; closed with the cascade.
        config: when it is asked. Its specs are not used here: the guards are given.
    """

    def __init__(self, first: StreamGuard, second: Guard, config: CascadeConfig) -> None:
        self.first = first
        self.second = second
        self.config = config
        self.counts = CascadeCounts()
        self._second = SecondGuard(second, timeout_s=config.second_timeout_s, most_asked=config.most_asked)

    @property
    def name(self) -> str:
        """Both names, as ``cascade[edge/1, remote/1]``: that of the verdicts of streams, which both may have made."""
        return f"cascade[{self.first.name}, {self.second.name}]"

    @property
    def together(self) -> bool:
        """Whether both guards judge reasoning together with what follows it."""
        return judges_together(self.first) and judges_together(self.second)

    def open(
        self, context: Conversation | None, channel: Channel = Channel.ANSWER, *, reasoning: str = "", name: str = ""
    ) -> CascadeSession:
        """Open a session for one text that an assistant writes.

        Args:
            context: the turns before; None when nothing came before.
            channel: what the text is; the second guard is asked about it as such.
            reasoning: what the assistant thought before the text, for the first guard. The second is asked about the
                text by itself, so that an alarm in an answer is not confirmed by what stood in its reasoning.
            name: the name of the called tool.

        Raises:
            InputError: for a channel in which no assistant writes.
            GuardOverloaded: when the first guard can open no more.
        """
        first = self.first.open(context, channel, reasoning=reasoning, name=name)
        return CascadeSession(self, first, context.turns if context else (), channel, name)

    async def judge(self, conversation: Conversation) -> Verdict:
        """Judge the last turn in the light of the ones before. The verdict's ``guard`` says which guard decided.

        Raises:
            GuardTimeout: when the second guard takes longer than ``second_timeout_s``.
            GuardError: when the first guard fails, or the second does and ``on_second_error`` is ``raise``.
        """
        verdict = await self.first.judge(conversation)
        self.counts.judged += 1
        if not self.config.ask.wanted(verdict):
            return replace(verdict, guard=f"cascade[{self.first.name}]")
        self.counts.asked += 1
        try:
            answer = await self._ask(conversation)
        except GuardError:
            if self.config.on_second_error == "raise":
                raise
            return replace(verdict, guard=f"cascade[{self.first.name}; {self.second.name} failed]")
        return replace(answer, guard=f"cascade[{self.second.name}]")

    async def close(self) -> None:
        """Close both guards; safe to call twice."""
        try:
            await self.first.close()
        finally:
            await self.second.close()

    async def _ask(self, conversation: Conversation) -> Verdict:
        try:
            return await self._second.ask(conversation)
        except GuardError:
            self.counts.failed += 1
            raise


class CascadeSession(TextSession):
    """One text that arrives in pieces; see the module's text for what it does.

    Up to ``debounce - 1`` flagged tokens are held until it is known whether they are an alarm. A run that is still held
    at the end is an alarm. ``close`` also ends a question to the second guard.
    """

    def __init__(
        self, guard: CascadeGuard, session: Session, before: tuple[Turn, ...], channel: Channel, name: str
    ) -> None:
        super().__init__()
        self._guard = guard
        self._session = session
        self._before = before
        self._turn = partial(assistant_turn, channel=channel, name=name)
        self._texts: list[str] = []
        self._held: list[TokenVerdict] = []
        self._answered = False
        self._answer: Verdict | None = None
        self._since = 0

    def close(self) -> None:
        """Give everything back at once; safe to call any number of times, also while a feed is running."""
        super().close()
        self._held = []
        self._session.close()

    async def _judge(self, text: str, *, last: bool) -> list[TokenVerdict]:
        self._texts.append(text)
        tokens = await (self._session.finish() if last else self._session.feed(text))
        given = [verdict for token in tokens for verdict in await self._next(token)]
        if last and self._held:
            given += await self._alarm()
        return given

    async def _next(self, token: TokenVerdict) -> list[TokenVerdict]:
        """What may go out with the next token of the first guard."""
        confirm = self._guard.config.confirm
        if not confirm.flagged(token):
            held, self._held, self._answered = self._held, [], False
            return [*held, token]
        self._held.append(token)
        if not self._answered:
            return await self._alarm() if len(self._held) >= confirm.debounce else []
        self._since += 1
        settled = self._answer is not None and self._answer.severity is not Severity.SAFE
        return self._as_answered() if settled or self._since < confirm.again_after else await self._alarm()

    async def _alarm(self) -> list[TokenVerdict]:
        """Ask the second guard about the text up to the last token that is held; all that is held then goes out."""
        self._texts = ["".join(self._texts)]
        answer = self._turn(self._texts[0][: self._held[-1].span.end])
        self._answer = await self._second(Conversation((*self._before, answer)))
        self._answered = True
        self._since = 0
        self._guard.counts.alarms += 1
        self._guard.counts.confirmed += self._answer is not None and self._answer.severity is not Severity.SAFE
        return self._as_answered()

    async def _second(self, conversation: Conversation) -> Verdict | None:
        """What the second guard says; None when it fails and the first guard's verdicts may stand."""
        try:
            return await self._asked(self._guard._ask(conversation))
        except GuardError:
            if self._closed or self._guard.config.on_second_error == "raise":
                raise
            return None

    def _as_answered(self) -> list[TokenVerdict]:
        held, self._held = self._held, []
        return held if self._answer is None else [token_verdict(token.span, self._answer) for token in held]


def _likelihood(verdict: Verdict, category: str) -> float:
    """The probability that the text is not safe and of this category; of guards that only name it, the first part."""
    named = 1.0 if category in verdict.categories else 0.0
    return verdict.probabilities.flagged * verdict.category_probabilities.get(category, named)


def read_cascade(rest: str) -> CascadeConfig:
    """What stands behind ``cascade:`` as a config: two specs with a comma between them, or a file.

    The first spec ends at the first comma; the second one may have commas.

    Raises:
        InputError: when it is neither, or the file is not of the form; says where.
    """
    first, comma, second = rest.partition(",")
    if not rest or (comma and not (first and second)):
        raise InputError(_SPEC, where="guard")
    config = CascadeConfig(first=first, second=second) if comma else read_spec_file(Path(rest), CascadeConfig)
    for spec in (config.first, config.second):
        if spec.partition(":")[0] == "cascade":
            raise InputError("the guards of a cascade cannot be cascades", where="guard")
    return config


def load_cascade(rest: str, load: Callable[[str], Guard]) -> CascadeGuard:
    """Load both guards of a cascade.

    Args:
        rest: what stands behind ``cascade:``; see `read_cascade`.
        load: loads a guard from its spec.

    Raises:
        InputError: when the spec, the file or a spec in it is wrong, or the first guard cannot watch streams.
        GuardUnavailable: when one of the guards cannot be loaded; says which.
    """
    config = read_cascade(rest)
    guards: list[Guard] = []
    for place, spec in (("first", config.first), ("second", config.second)):
        try:
            guards.append(load(spec))
        except GuardUnavailable as error:
            raise GuardUnavailable(f"the {place} guard of the cascade: {error}") from error
    first, second = guards
    if not isinstance(first, StreamGuard):
        raise InputError(f"the first guard of a cascade must be able to watch streams, {config.first!r} is not")
    return CascadeGuard(first, second, config)
