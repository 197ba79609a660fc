"""Sessions for guards that judge whole texts only: the text so far is judged again whenever it has grown enough.

The places depend on the length of the text alone, so the verdicts are a function of the text. Each judgement covers all
the text so far and is given out as one token: the characters since the last one. What was said last is said again of
the complete text, as a token without width. Costs one judgement for each such piece, each as long as the text so far:
for short answers, or behind a cascade, not for long ones at scale.

Method: a Gen guard that is run again every 32 tokens is what the Qwen3Guard Technical Report (2025), section 4,
compares the Stream models with.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import replace
from functools import partial
from typing import Any

from tidegate.guards.session import OpenSessions, TextSession, assistant_turn
from tidegate.types import Channel, Conversation, Span, TokenVerdict, Verdict

__all__ = ["RejudgedSession", "token_verdict"]


class RejudgedSession(TextSession):
    """One text that arrives in pieces, judged as a whole again and again.

    A text without characters is judged once, at its end.

    Args:
        judge: judges the text so far, after these turns.
        context: the turns before the text; None when nothing came before.
        channel: what the text is; it is judged as the text of this channel in its turn.
        reasoning: the reasoning of that turn; "" when there is none, or it is not to be judged with the text.
        name: the name of the called tool.
        every: after how many characters the text is judged again, at least 1.
        share: a text that is longer than ``share * every`` is judged again when it has grown by one part in so many;
            None for always after ``every`` characters.
        sessions: where it is counted until it is closed; None for nowhere.

    Raises:
        InputError: for a channel in which no assistant writes.
        GuardOverloaded: when no more sessions may be open.
    """

    def __init__(
        self,
        judge: Callable[[Conversation], Coroutine[Any, Any, Verdict]],
        context: Conversation | None,
        channel: Channel = Channel.ANSWER,
        *,
        reasoning: str = "",
        name: str = "",
        every: int,
        share: int | None = None,
        sessions: OpenSessions | None = None,
    ) -> None:
        self._turn = partial(assistant_turn, channel=channel, reasoning=reasoning, name=name)
        self._turn("")
        super().__init__(sessions)
        self._judge_whole = judge
        self._before = context.turns if context else ()
        self._every = every
        self._share = share
        self._text = ""
        self._new: list[str] = []
        self._fed = 0
        self._covered = 0
        self._said: TokenVerdict | None = None

    async def _judge(self, text: str, *, last: bool) -> list[TokenVerdict]:
        self._new.append(text)
        self._fed += len(text)
        verdicts = []
        while (end := self._covered + self._step) <= self._fed:
            verdicts.append(await self._judge_to(end))
        if last and (self._covered < self._fed or self._said is None):
            verdicts.append(await self._judge_to(self._fed))
        if last and self._fed and self._said is not None:
            verdicts.append(replace(self._said, span=Span(self._fed, self._fed)))
        return verdicts

    @property
    def _step(self) -> int:
        """How many characters the next piece has."""
        return self._every if self._share is None else max(self._every, self._covered // self._share)

    async def _judge_to(self, end: int) -> TokenVerdict:
        """Judge the text up to a place, and go on behind it."""
        self._check_open()
        self._text, self._new = "".join((self._text, *self._new)), []
        conversation = Conversation((*self._before, self._turn(self._text[:end])))
        verdict = await self._asked(self._judge_whole(conversation))
        self._said = token_verdict(Span(self._covered, end), verdict)
        self._covered = end
        return self._said


def token_verdict(span: Span, verdict: Verdict) -> TokenVerdict:
    """What a guard said of a whole text, as a token's. A category that it names without a probability has 1."""
    known = verdict.category_probabilities
    category = verdict.categories[0] if verdict.categories else max(known, key=lambda name: known[name], default=None)
    probability = 0.0 if category is None else known.get(category, 1.0)
    return TokenVerdict(span, verdict.severity, verdict.probabilities, category, probability)
