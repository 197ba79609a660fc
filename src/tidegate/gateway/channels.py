"""The texts of an answer on their way through, whatever the door: what judges each, and what of it may leave."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from tidegate.gateway.deltas import Known, Slot
from tidegate.gateway.schemas import mended, worst_decision
from tidegate.gateway.unescaped import unescaped
from tidegate.guards.base import StreamGuard, judges_together
from tidegate.guards.session import assistant_turn
from tidegate.moderate import Retry, StreamModerator, moderate
from tidegate.personal import mask
from tidegate.policy import UNJUDGED_ANSWER, Policy, decide
from tidegate.types import (
    Action,
    Channel,
    Conversation,
    Coverage,
    CoverageState,
    Decision,
    Intervention,
    InterventionKind,
    Scope,
    Target,
)

__all__ = [
    "BLOCKS",
    "Judging",
    "KeepAnswer",
    "TextChannel",
    "as_found",
    "due_of",
    "judge_text",
    "of_stream",
    "of_whole",
]

KeepAnswer = Callable[[Decision, Conversation], Awaitable[str | None]]
"""Keeps the decision on one choice, with the conversation that ends with it; returns its id when it has one."""

BLOCKS: Final = Action.BLOCK
"""This action keeps text from leaving. What is redacted leaves without what was taken out."""


@dataclass(frozen=True, slots=True)
class Judging:
    """What all choices of an answer are judged with.

    Attributes:
        prompt: the turns before the answer.
        prompts: one for each prompt, where a request has several; () when it has one. Then ``prompt`` is all of them.
        each: how many choices each of the prompts has, at least 1.
        tools: the names that a tool call may have without being judged.
        timeout_s: seconds that the guard may take for each step; None for as long as it wants.
        trusted: names of fields that we do not know, but that the operator says carry no text of the model.
        retries: whether the upstream can be asked to go on from a text that was rolled back.
        delayed: told how many seconds the text of a choice was held, the longest of it; None when nobody wants to know.
        note: told of the decisions that a worse one on the same choice stands for; None when nobody wants to know.
    """

    guard: StreamGuard
    policy: Policy
    scope: Scope
    prompt: Conversation
    keep: KeepAnswer
    tools: frozenset[str] = frozenset()
    timeout_s: float | None = None
    trusted: frozenset[str] = frozenset()
    note: Callable[[Iterable[Decision]], None] | None = None
    prompts: tuple[Conversation, ...] = ()
    each: int = 1
    retries: bool = False
    delayed: Callable[[float], None] | None = None

    def known(self, texts: Mapping[str, Channel]) -> Known:
        """What may pass, and which fields are texts."""
        return Known(self.tools, self.trusted, texts)

    def of_choice(self, index: int) -> Judging:
        """The same for one choice: with the prompt that it answers."""
        place = index // self.each
        return replace(self, prompt=self.prompts[place], prompts=()) if place < len(self.prompts) else self

    @property
    def masks(self) -> bool:
        """Whether personal data may be taken out of the answer."""
        rules = self.policy.for_scope(self.scope, Target.RESPONSE)
        return rules.masks and not rules.quiet

    @property
    def passing(self) -> bool:
        """Whether text that nobody can judge may leave."""
        return self.policy.at(self.scope).unjudged_answer == "pass"

    def refused(self) -> Decision:
        """What the policy does about an answer with text that nobody can judge."""
        return decide(self.policy, UNJUDGED_ANSWER, self.scope)

    def worst(self, decisions: Sequence[Decision]) -> int:
        """Which decision counts for a choice."""
        number = worst_decision(decisions)
        if self.note is not None and len(decisions) > 1:
            self.note(decision for place, decision in enumerate(decisions) if place != number)
        return number


class TextChannel:
    """One text of one choice while it streams.

    Args:
        judging: what it is judged with.
        slot: where it stands in what the upstream sends.
        kind: what it is.
        path: its place in the exchange, as coverage says it.
        reasoning: what was thought before it; "" when nothing.
        name: the name of the called tool, for the arguments of a call; else "".
        json: whether it is JSON, in which every letter is judged, and leaves, as itself (`tidegate.gateway.unescaped`).

    Attributes:
        ready: what was released and has not gone out yet.
        begun: whether some of it has gone out, where somebody says so.
        ending: whether another text has followed, or the choice has finished: this one is taken to be complete.
        moderator: watches it.
        retry: from where the upstream is to go on; None while nobody has to ask it.
    """

    __slots__ = (
        "_before",
        "_complete",
        "_escape",
        "_half",
        "_json",
        "_judging",
        "_new",
        "_skip",
        "begun",
        "ending",
        "kind",
        "moderator",
        "path",
        "ready",
        "retry",
        "slot",
    )

    def __init__(
        self,
        judging: Judging,
        slot: Slot,
        kind: Channel,
        path: str,
        *,
        reasoning: str = "",
        name: str = "",
        json: bool = False,
    ) -> None:
        self.slot = slot
        self.kind = kind
        self.path = path
        self.ready = ""
        self.begun = False
        self.ending = False
        self._judging = judging
        self._before = {"reasoning": reasoning, "name": name}
        self._new: list[str] = []
        self._half = ""
        self._escape = ""
        self._json = json
        self._skip = 0
        self._complete = False
        self.retry: Retry | None = None
        self.moderator = self._open()

    def _open(self) -> StreamModerator:
        with_ = self._judging
        return StreamModerator(
            with_.guard,
            with_.policy,
            with_.scope,
            with_.prompt,
            channel=self.kind,
            path=self.path,
            timeout_s=with_.timeout_s,
            retries=with_.retries and self.kind is Channel.ANSWER,
            reasoning=self._before["reasoning"],
            name=self._before["name"],
        )

    @property
    def text(self) -> str:
        """All that came in, released or not."""
        return self.moderator.text + "".join(self._new)

    @property
    def has_work(self) -> bool:
        return bool(self._new) or (self.ending and not self._complete)

    @property
    def held(self) -> int:
        """How many characters are held now, be it for the guard or for a chunk before them."""
        return self.moderator.held + len(self.ready)

    @property
    def up_to_date(self) -> bool:
        """Whether what has gone out is what was released, no less and no more."""
        return not self.ready and not self._skip

    def add(self, text: str) -> str:
        """Take text in; returns it as it will go out: halves of a surrogate pair joined, and single ones replaced.

        A half that may still find its other half waits for the next piece, and so does an escape that is not complete.
        """
        if self._json:
            text, self._escape = unescaped(self._escape + text)
        if self._half or not text.isascii():
            text, self._half = self._half + text, ""
            if "\ud800" <= text[-1] <= "\udbff":
                text, self._half = text[:-1], text[-1]
            text = mended(text)
        if text:
            self._new.append(text)
        self.ending = False
        return text

    def rest(self) -> str:
        """Take in what waits for more, because no more comes; returns it as it will go out."""
        text, self._escape = self._escape, ""
        if text:
            self._new.append(text)
        return text

    async def judge(self) -> bool:
        """Judge what is new; returns whether the choice is blocked."""
        if self._new:
            text = "".join(self._new)
            self._new.clear()
            if self._complete:
                text = self._resume() + text
            step = await self.moderator.feed(text)
            self._take(step.released)
            self.retry = step.retry
            if step.decision is not None:
                return True
        if self.retry is not None:
            return False
        if self.ending and not self._complete:
            self._complete = True
            step = await self.moderator.finish()
            self._take(step.released)
            self.retry = step.retry
            return step.decision is not None and step.decision.action >= BLOCKS
        return False

    def go_on(self) -> None:
        """What comes next follows the text that was rolled back."""
        self.retry = None
        self.ending = self._complete = False
        self._half = self._escape = ""
        self._new.clear()

    def give_up(self) -> None:
        """The upstream cannot go on."""
        self.retry = None
        self.ending, self._complete = False, True
        self._new.clear()
        self.moderator.give_up()

    def late(self) -> bool:
        """Let out what may be held no longer, where the policy says so; returns whether the choice is blocked."""
        if self.moderator.due_s != 0:
            return False
        step = self.moderator.late()
        self._take(step.released)
        return step.decision is not None

    def _take(self, released: str) -> None:
        skipped = min(self._skip, len(released))
        self._skip -= skipped
        self.ready += released[skipped:]

    def _resume(self) -> str:
        """The text goes on after it was taken to be complete; returns its beginning, to be judged again."""
        self._complete = False
        self._skip = self.moderator.released
        beginning, before = self.moderator.text, self.moderator
        self.moderator = self._open()
        self.moderator.count_on(before)
        return beginning


async def judge_text(
    judging: Judging, kind: Channel, path: str, text: str, *, reasoning: str = "", name: str = ""
) -> Decision:
    """Judge one text of an answer that came whole; the arguments are those of `TextChannel`.

    The reasoning, which is a text of the answer too and judged by itself, is judged again with this one where the guard
    judges them together.
    """
    thought = reasoning if kind is not Channel.REASONING and judges_together(judging.guard) else ""
    return await moderate(
        judging.prompt.then(assistant_turn(text, kind, reasoning=thought, name=name)),
        guard=judging.guard,
        policy=judging.policy,
        scope=judging.scope,
        timeout_s=judging.timeout_s,
        coverage=(Coverage(path, kind, CoverageState.JUDGED, len(text)),),
    )


# --- the decision on an answer whose texts were decided one by one ------------------------------------------------


def due_of(channels: Iterable[TextChannel]) -> float | None:
    """In how many seconds some of these are late if nothing comes before, at least 0; None for never."""
    return min((due for channel in channels if (due := channel.moderator.due_s) is not None), default=None)


def of_stream(decided: Sequence[Decision], number: int, coverage: Iterable[Coverage]) -> Decision:
    """The decision on a stream: the one of this number, with what was done about every text."""
    others = (one for place, one in enumerate(decided) if place != number)
    done = (*(one for other in others for one in other.interventions), *decided[number].interventions)
    leaked = sum(one.leaked for one in decided)
    return replace(decided[number], coverage=tuple(coverage), interventions=done, leaked=leaked)


def as_found(decision: Decision, text: str) -> Decision:
    """REDACT is BLOCK where what was found stands in another text of the turn, such as its reasoning."""
    if decision.action is Action.REDACT and not mask(text)[1]:
        return replace(decision, action=Action.BLOCK, interventions=())
    return decision


def of_whole(
    policy: Policy, decided: Sequence[Decision], number: int, coverage: Iterable[Coverage], characters: int
) -> Decision:
    """The decision on a whole answer: the one of this number, with what was done about every text.

    A blocked one is replaced by the message, unless the policy says to cut; ``characters`` is how many it had.
    """
    decision = replace(decided[number], coverage=tuple(coverage))
    if decision.action < BLOCKS:
        return replace(decision, interventions=tuple(one for each in decided for one in each.interventions))
    word = policy.intervention_for(decision.rule)
    word = policy.rollback.then if word == "rollback" else word
    kind = InterventionKind.CUT if word == "cut" else InterventionKind.REPLACE
    return replace(decision, interventions=(Intervention(kind, "done", 1, characters),))
