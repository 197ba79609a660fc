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
from tidegate.moderate import StreamModerator, moderate
from tidegate.policy import UNJUDGED_ANSWER, Policy, decide
from tidegate.types import Action, Channel, Conversation, Coverage, CoverageState, Decision, Scope

__all__ = ["BLOCKS", "Judging", "KeepAnswer", "TextChannel", "judge_text"]

KeepAnswer = Callable[[Decision, Conversation], Awaitable[str | None]]
"""Keeps the decision on one choice, with the conversation that ends with it; returns its id when it has one."""

BLOCKS: Final = Action.REDACT
"""This action or a worse one keeps text from leaving: there is nobody here who could redact it."""


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

    def known(self, texts: Mapping[str, Channel]) -> Known:
        """What may pass, and which fields are texts."""
        return Known(self.tools, self.trusted, texts)

    def of_choice(self, index: int) -> Judging:
        """The same for one choice: with the prompt that it answers."""
        place = index // self.each
        return replace(self, prompt=self.prompts[place], prompts=()) if place < len(self.prompts) else self

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
        ending: whether another text has followed, or the choice has finished: this one is taken to be complete.
        moderator: watches it.
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
        "ending",
        "kind",
        "moderator",
        "path",
        "ready",
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
        self.ending = False
        self._judging = judging
        self._before = {"reasoning": reasoning, "name": name}
        self._new: list[str] = []
        self._half = ""
        self._escape = ""
        self._json = json
        self._skip = 0
        self._complete = False
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
            **self._before,
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
            if step.decision is not None:
                return True
        if self.ending and not self._complete:
            self._complete = True
            step = await self.moderator.finish()
            self._take(step.released)
            return step.decision is not None and step.decision.action >= BLOCKS
        return False

    def _take(self, released: str) -> None:
        skipped = min(self._skip, len(released))
        self._skip -= skipped
        self.ready += released[skipped:]

    def _resume(self) -> str:
        """The text goes on after it was taken to be complete; returns its beginning, to be judged again."""
        self._complete = False
        self._skip = self.moderator.released
        beginning = self.moderator.text
        self.moderator = self._open()
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
