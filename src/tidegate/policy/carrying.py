"""How a stop is carried out: interventions, holding back, rolling back, confirming; and words in many languages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

__all__ = [
    "DEFAULT_HINT",
    "HOLDING",
    "NO_CONFIRM",
    "ROLLBACK",
    "Confirm",
    "Hold",
    "HoldMode",
    "InterventionWord",
    "Messages",
    "OnConfirmError",
    "Rollback",
    "RollbackThen",
    "WhenLate",
    "in_language",
]

InterventionWord = Literal["cut", "replace", "redact", "rollback"]
HoldMode = Literal["hold", "release_first"]
WhenLate = Literal["fail", "release"]
OnConfirmError = Literal["stop", "pass"]
RollbackThen = Literal["cut", "replace"]
Messages = tuple[tuple[str, str], ...]
"""A text for each of some BCP-47 tags, sorted by tag."""

DEFAULT_HINT: Final = (
    "The answer was about to become harmful. Go on from where it ends in another direction: safe, honest, and without "
    "what would harm anybody."
)


@dataclass(frozen=True, slots=True)
class Hold:
    """When text of a stream leaves.

    Attributes:
        mode: ``hold`` lets nothing leave unjudged; ``release_first`` lets text leave at once and counts what was
            flagged afterwards.
        risk: from this P(not safe) of a token on, in [0, 1], text is held until as many tokens in a row as the debounce
            says lie below it; None for a hold of flagged tokens only.
        leak: the most characters that may be out beyond those that are judged and not pending; None for none in mode
            ``hold``, and for any number in mode ``release_first``.
        delay_ms: the most milliseconds that text is held, at least 1; None for as long as it takes.
        when_late: after ``delay_ms`` the guard has failed (``fail``), or text is let out as far as ``leak`` allows
            it (``release``), and only then the guard has failed.
    """

    mode: HoldMode = "hold"
    risk: float | None = None
    leak: int | None = None
    delay_ms: int | None = None
    when_late: WhenLate = "fail"

    def __str__(self) -> str:
        return _said(self, ("mode", "risk", "leak", "delay_ms", "when_late"))

    def canonical(self) -> dict[str, object]:
        """As JSON values, without what it does not say."""
        risk = None if self.risk is None else float(self.risk)
        said = {"mode": self.mode, "risk": risk, "leak": self.leak, "delay_ms": self.delay_ms}
        return {name: value for name, value in said.items() if value is not None} | {"when_late": self.when_late}


@dataclass(frozen=True, slots=True)
class Rollback:
    """How an answer is rolled back and tried again.

    Attributes:
        tries: how many times the upstream is asked to go on, at least 1.
        buffer: how many tokens are always held, so that there is something to roll back; at least 0.
        hint: what the upstream is told.
        then: what is done when no try helps.
    """

    tries: int = 2
    buffer: int = 40
    hint: str = DEFAULT_HINT
    then: RollbackThen = "replace"

    def __str__(self) -> str:
        return _said(self, ("tries", "buffer", "then"))

    def canonical(self) -> dict[str, object]:
        """As JSON values."""
        return {"tries": self.tries, "buffer": self.buffer, "hint": self.hint, "then": self.then}


@dataclass(frozen=True, slots=True)
class Confirm:
    """Whether a second guard is asked before an alarm of a stream stops anything.

    Attributes:
        enabled: whether it is.
        deadline_ms: milliseconds that it may take, at least 1; None for what the gateway allows it.
        on_error: what is done when it cannot judge: ``stop`` lets the alarm stand, ``pass`` lets the text go on.
        again_after: after how many more alarming tokens of a run that it found harmless it is asked again, at least 1.
    """

    enabled: bool = True
    deadline_ms: int | None = None
    on_error: OnConfirmError = "stop"
    again_after: int = 64

    def __str__(self) -> str:
        return _said(self, ("deadline_ms", "on_error", "again_after")) if self.enabled else "no"

    def canonical(self) -> object:
        """As a JSON value."""
        if not self.enabled:
            return False
        return {"deadline_ms": self.deadline_ms, "on_error": self.on_error, "again_after": self.again_after}


HOLDING: Final = Hold()
ROLLBACK: Final = Rollback()
NO_CONFIRM: Final = Confirm(enabled=False)


def in_language(messages: Messages, language: str | None) -> str | None:
    """The text for a language: that of the longest tag that is the language or a wider one; None when there is none."""
    if language is None:
        return None
    asked = language.casefold().replace("_", "-")
    fitting = [(tag, text) for tag, text in messages if asked == tag or asked.startswith(f"{tag}-")]
    return max(fitting, key=lambda one: len(one[0]))[1] if fitting else None


def _said(one: object, names: tuple[str, ...]) -> str:
    return ", ".join(f"{name} {value}" for name in names if (value := getattr(one, name)) is not None)
