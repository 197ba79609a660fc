"""Which of the actions that single tokens call for are confirmed by their neighbours."""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

from tidegate.policy import ScopedPolicy
from tidegate.types import Action, TokenVerdict

__all__ = ["STOPS", "Debounce", "Finding", "Outcome"]

STOPS: Final = Action.REDACT
"""This action or a worse one ends a stream, unless it is enough to take personal data out."""


class Outcome(enum.Enum):
    """What a token leads to."""

    GO_ON = enum.auto()
    MASK = enum.auto()
    STOP = enum.auto()


@dataclass(frozen=True, slots=True)
class Finding:
    """A debounced action, the token that stands for it, and where the run of tokens began that confirmed it."""

    action: Action
    token: TokenVerdict
    start: int
    masks: bool = False

    @property
    def rank(self) -> tuple[Action, bool, float]:
        return self.action, not self.masks, self.token.probabilities.flagged


class _Call(NamedTuple):
    action: Action
    token: TokenVerdict
    redacts: bool


class Debounce:
    """Takes the tokens of a text one by one.

    Args:
        rules: say what each token calls for.
        masks: whether personal data can be taken out; else what calls for that is a stop.

    Attributes:
        worst: the worst confirmed so far; None when nothing is.
        mild: the worst of those that stop nothing; None when there is none.
        pending_from: where the run of tokens begins that call for a stop and may still be confirmed; None when none is.
        masked_from: where the run began for which that began; None before.
        masking: whether personal data is being taken out, so that more of it stops nothing.
    """

    def __init__(self, rules: ScopedPolicy, *, masks: bool = True) -> None:
        self.worst: Finding | None = None
        self.mild: Finding | None = None
        self.pending_from: int | None = None
        self.masking = False
        self.masked_from: int | None = None
        self._rules = rules
        self._masks = masks
        self._length = rules.policy.debounce
        self._run: deque[_Call] = deque(maxlen=self._length)

    def call(self, token: TokenVerdict) -> tuple[Action, bool]:
        """What this token alone calls for, and whether it is enough to take personal data out."""
        action, redacts = self._rules.call(token)
        return action, redacts and self._masks

    def note(self, token: TokenVerdict, *, most: Action = Action.BLOCK) -> Outcome:
        """Take the next token; it calls for nothing worse than ``most``."""
        action, redacts = self.call(token)
        action = min(action, most)
        if action is Action.ALLOW:
            self._calm(token)
            return Outcome.GO_ON
        if self.masking and redacts:
            return Outcome.GO_ON
        self._run.append(_Call(action, token, redacts))
        if action < STOPS:
            self.pending_from = None
        elif self.pending_from is None:
            self.pending_from = token.span.start
        return self._confirm() if len(self._run) == self._length else Outcome.GO_ON

    def note_end(self, token: TokenVerdict) -> Outcome:
        """Take the verdict on the complete text: it confirms or clears the token before it."""
        action, redacts = self.call(token)
        if self._length == 1 or action is Action.ALLOW or (self.worst is None and not self._run):
            outcome = self.note(token)
            return self.complete() if outcome is Outcome.GO_ON else outcome
        if not self._run:
            return Outcome.GO_ON
        before = self._run[-1]
        self._run.clear()
        self._run.extend((before, _Call(action, token, redacts)))
        return self._confirm()

    def complete(self) -> Outcome:
        """The text ends here: when it has fewer tokens than the debounce asks for, those that it has decide."""
        return self._confirm() if self.worst is None and self._run else Outcome.GO_ON

    def forget(self) -> None:
        """The run was no alarm after all."""
        self.worst = self.mild
        self._run.clear()
        self.pending_from = None

    def overrule(self, second: TokenVerdict) -> None:
        """The run is what another guard says of it, and no alarm."""
        run = [call.token.span for call in self._run]
        self.forget()
        for span in run:
            self.note(replace(second, span=span), most=Action.REVIEW)

    def _calm(self, token: TokenVerdict) -> None:
        self._run.clear()
        self.pending_from = None
        if self.worst is None or self.worst.action is Action.ALLOW:
            self.worst = self.mild = Finding(Action.ALLOW, token, 0)

    def _confirm(self) -> Outcome:
        """The mildest token of the run stands for all of it; the last one, when there are several."""
        action = min(call.action for call in self._run)
        token = next(call.token for call in reversed(self._run) if call.action is action)
        masks = action >= STOPS and all(call.redacts for call in self._run)
        found = Finding(Action.REDACT if masks else action, token, self._run[0].token.span.start, masks)
        if self.worst is None or found.rank > self.worst.rank:
            self.worst = found
            self.mild = found if action < STOPS else self.mild
        if masks:
            if not self.masking:
                self.masked_from = found.start if self.pending_from is None else self.pending_from
            self.masking = True
            self.pending_from = None
        return Outcome.MASK if masks else Outcome.STOP if action >= STOPS else Outcome.GO_ON
