"""What things are called: the values that travel through Tidegate, in the order in which they travel.

A Conversation of Turns goes to a Guard, which gives a Verdict; a Policy makes a Decision with an Action of it. All are
frozen; ordered things are ordered types, so that "the worst of these" is ``max(...)``. Standard library only.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Self

__all__ = [
    "CATEGORIES",
    "PROMPT_CATEGORIES",
    "RESPONSE_CATEGORIES",
    "Action",
    "Advice",
    "Category",
    "Channel",
    "Conversation",
    "Coverage",
    "CoverageState",
    "Decision",
    "Example",
    "GuardFailure",
    "Intervention",
    "InterventionKind",
    "Observed",
    "Probabilities",
    "Role",
    "Scope",
    "Severity",
    "Span",
    "Target",
    "TokenVerdict",
    "ToolCall",
    "Turn",
    "Verdict",
    "worst",
]


class Role(enum.StrEnum):
    """Who speaks in a turn."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


class Target(enum.StrEnum):
    """What a verdict is about: what a person asked, or what a model answered."""

    PROMPT = "prompt"
    RESPONSE = "response"


class Channel(enum.StrEnum):
    """Which text of an exchange: each is judged, and accounted for in the coverage, apart."""

    SYSTEM = "system"
    USER = "user"
    TOOL_RESULT = "tool_result"
    REASONING = "reasoning"
    ANSWER = "answer"
    REFUSAL = "refusal"
    TOOL_CALL = "tool_call"


class Severity(enum.IntEnum):
    """How harmful, in order: SAFE < CONTROVERSIAL < UNSAFE (Qwen3Guard's three risk levels)."""

    SAFE = 0
    CONTROVERSIAL = 1
    UNSAFE = 2

    @property
    def word(self) -> str:
        """The lower-case word used on the wire: ``safe``, ``controversial`` or ``unsafe``."""
        return self.name.lower()

    @property
    def label(self) -> str:
        """The capitalised word of data sets and official models: ``Safe``, ``Controversial``, ``Unsafe``."""
        return self.name.capitalize()

    @classmethod
    def parse(cls, word: str) -> Self:
        """Read a severity from its word in any case. Raises ValueError that lists the three words."""
        try:
            return cls[word.strip().upper()]
        except KeyError:
            raise ValueError(f"unknown severity {word!r}: expected safe, controversial or unsafe") from None


class Category(enum.StrEnum):
    """The nine categories of Qwen3Guard's policy, by their official names; fine-tuned guards may name others."""

    VIOLENT = "Violent"
    NON_VIOLENT_ILLEGAL_ACTS = "Non-violent Illegal Acts"
    SEXUAL = "Sexual Content or Sexual Acts"
    PII = "PII"
    SELF_HARM = "Suicide & Self-Harm"
    UNETHICAL_ACTS = "Unethical Acts"
    POLITICAL = "Politically Sensitive Topics"
    COPYRIGHT = "Copyright Violation"
    JAILBREAK = "Jailbreak"


CATEGORIES: tuple[str, ...] = tuple(category.value for category in Category)
"""The nine official names, in the order of Qwen3Guard-Gen's prompt."""

RESPONSE_CATEGORIES: tuple[str, ...] = (
    Category.VIOLENT.value,
    Category.SEXUAL.value,
    Category.SELF_HARM.value,
    Category.POLITICAL.value,
    Category.PII.value,
    Category.COPYRIGHT.value,
    Category.NON_VIOLENT_ILLEGAL_ACTS.value,
    Category.UNETHICAL_ACTS.value,
)
"""The eight of responses, in the id order of the official Stream head (``response_category_map``)."""

PROMPT_CATEGORIES: tuple[str, ...] = (*RESPONSE_CATEGORIES, Category.JAILBREAK.value)
"""The nine of prompts, in the id order of the official Stream head (``query_category_map``)."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call of a tool by an assistant: its name and its arguments as the model wrote them (usually JSON text)."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Turn:
    """Who said what. ``reasoning`` is the thinking text of an assistant turn, "" when there is none."""

    role: Role
    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns in order; the last one is judged, the ones before are its context. Never empty.

    Raises:
        ValueError: when there is no turn.
    """

    turns: tuple[Turn, ...]

    def __post_init__(self) -> None:
        if not self.turns:
            raise ValueError("a conversation needs at least one turn")

    @property
    def target(self) -> Target:
        """RESPONSE when the last turn is the assistant's, else PROMPT."""
        return Target.RESPONSE if self.turns[-1].role is Role.ASSISTANT else Target.PROMPT

    @classmethod
    def of(cls, prompt: str, response: str | None = None) -> Self:
        """A conversation of one user turn, and of one assistant turn when ``response`` is given."""
        turns = [Turn(Role.USER, prompt)]
        if response is not None:
            turns.append(Turn(Role.ASSISTANT, response))
        return cls(tuple(turns))

    def then(self, turn: Turn) -> Self:
        """The same conversation with one more turn at its end."""
        return type(self)((*self.turns, turn))


@dataclass(frozen=True, slots=True)
class Span:
    """A half-open range of characters ``[start, end)`` in the judged text."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Probabilities:
    """The probability of each severity; the three add up to 1.

    Raises:
        ValueError: when one is not a number in [0, 1] or the sum is not 1 within 1e-3.
    """

    safe: float
    controversial: float
    unsafe: float

    def __post_init__(self) -> None:
        values = (self.safe, self.controversial, self.unsafe)
        if not all(math.isfinite(p) and -1e-6 <= p <= 1 + 1e-6 for p in values) or abs(sum(values) - 1) > 1e-3:
            raise ValueError(f"severity probabilities must lie in [0, 1] and add up to 1, got {values}")

    @property
    def flagged(self) -> float:
        """The probability that it is not safe: controversial + unsafe, in [0, 1]."""
        return min(1.0, self.controversial + self.unsafe)

    def at_least(self, severity: Severity) -> float:
        """The probability of this severity or a worse one, in [0, 1]."""
        return (1.0, self.flagged, self.unsafe)[severity]


def _no_probabilities() -> Mapping[str, float]:
    return MappingProxyType({})


@dataclass(frozen=True, slots=True)
class TokenVerdict:
    """What a guard says at one token of a stream: about all the text up to and including it.

    Attributes:
        span: the characters that the token covers, in the text of its channel. The spans of a stream follow each other
            without gaps, starting at 0; several tokens of one character share it.
        severity: the guard's call at this token, before any debounce.
        probabilities: calibrated probability of each severity.
        category: the most probable category, meaningful only when the severity is not SAFE; None for none.
        category_probability: its probability given that the text is not safe, in [0, 1].
    """

    span: Span
    severity: Severity
    probabilities: Probabilities
    category: str | None = None
    category_probability: float = 0.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a guard said of the last turn of a conversation.

    Attributes:
        target: whether a prompt or a response was judged.
        severity: the guard's call.
        probabilities: the probability of each severity (calibrated where the guard is).
        categories: the categories named, most probable first; () when the severity is SAFE or the guard cannot tell.
        category_probabilities: for each category that the guard knows, its probability given that the text is not safe,
            in [0, 1]; empty when the guard gives none.
        refusal: whether the judged response refuses; None when the guard does not say.
        reason: the guard's explanation; None when it gives none.
        span: where in the judged text the verdict stands: from the beginning to the end of the token (or of the window)
            at which it was reached; None for the whole text.
        guard: name and version of the guard, as ``edge/1``.
    """

    target: Target
    severity: Severity
    probabilities: Probabilities
    categories: tuple[str, ...] = ()
    category_probabilities: Mapping[str, float] = field(default_factory=_no_probabilities)
    refusal: bool | None = None
    reason: str | None = None
    span: Span | None = None
    guard: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "category_probabilities", MappingProxyType(dict(self.category_probabilities)))


class Action(enum.IntEnum):
    """What is done, in order: ALLOW < WARN < REVIEW < REDACT < BLOCK."""

    ALLOW = 0
    WARN = 1
    REVIEW = 2
    REDACT = 3
    BLOCK = 4

    @property
    def word(self) -> str:
        """The lower-case word used in policies and on the wire."""
        return self.name.lower()

    @classmethod
    def parse(cls, word: str) -> Self:
        """Read an action from its word in any case. Raises ValueError that lists the words."""
        try:
            return cls[word.strip().upper()]
        except KeyError:
            raise ValueError(f"unknown action {word!r}: expected one of {', '.join(a.word for a in cls)}") from None


class Advice(enum.StrEnum):
    """What a policy suggests beside the action; the caller carries it out."""

    THROTTLE = "throttle"
    NOTIFY = "notify"
    TAKE_DOWN = "take_down"


@dataclass(frozen=True, slots=True)
class Scope:
    """For whom a decision is made; None means not known.

    ``subject`` is whose content it is, by the id that the client gives that person (OpenAI's ``safety_identifier`` or
    ``user``). No rule reads it, so that scopes which differ in it only are equal; no repr shows it, and the store keeps
    a keyed fingerprint of it only.
    """

    tenant: str | None = None
    region: str | None = None
    route: str | None = None
    language: str | None = None
    subject: str | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class GuardFailure:
    """A guard did not judge: the kind (class name of the GuardError) and what happened, without any user text."""

    kind: str
    message: str
    guard: str = ""


class CoverageState(enum.StrEnum):
    """What became of a text: judged before release, not judged at all, or released before it was judged."""

    JUDGED = "judged"
    NOT_JUDGED = "not_judged"
    RELEASED_FIRST = "released_first"


@dataclass(frozen=True, slots=True)
class Coverage:
    """What became of one text path of an exchange, in characters.

    ``path`` is a place in the exchange, such as ``messages[0].content`` or ``choices[1].reasoning_content``.
    """

    path: str
    channel: Channel
    state: CoverageState
    characters: int


@dataclass(frozen=True, slots=True)
class Observed:
    """What a decision would have been if all that a policy only observes were in force."""

    action: Action
    rule: str
    advice: tuple[Advice, ...] = ()


class InterventionKind(enum.StrEnum):
    """What was done to a text, or was not done after a second look."""

    CUT = "cut"
    REPLACE = "replace"
    REDACT = "redact"
    ROLLBACK = "rollback"
    CONFIRM = "confirm"


@dataclass(frozen=True, slots=True)
class Intervention:
    """One thing that was done to a text while a decision was carried out.

    Attributes:
        kind: what.
        outcome: how it ended: ``done``; of a rollback also ``failed`` or ``flagged`` (the last try was flagged too); of
            a question to the confirming guard ``confirmed``, ``overruled`` or ``failed``.
        count: how often: spans that were masked, tries, questions; at least 1.
        characters: masked, thrown away, or (of an alarm that was overruled) let go on; at least 0. What a cut or a
            replacement throws away is all that had come by then and not left.
        tokens: of the guard, that were thrown away; 0 where that is not counted.
    """

    kind: InterventionKind
    outcome: str = "done"
    count: int = 1
    characters: int = 0
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Decision:
    """Action + the rule and policy that chose it + the verdict or the failure + the coverage: the unit of audit.

    Attributes:
        action: what is done.
        rule: the name of the rule that chose it (``otherwise`` and ``on_guard_error`` are rules too).
        policy: name of the policy.
        policy_version: the first 12 hexadecimal digits of the SHA-256 of the policy's canonical form.
        verdict: what the guard said; None exactly when ``failure`` is given.
        failure: why the guard said nothing; None exactly when ``verdict`` is given.
        scope: for whom.
        coverage: what became of every text path.
        advice: what the policy suggests beside the action.
        observed: what it would have been if all that the policy only observes were in force; None when that is the
            same.
        interventions: how it was carried out, in the order in which that was done; () where nothing was done to a text,
            or the one who was told of the decision did it.
        leaked: characters of flagged text that had left when it was stopped; 0 unless the policy lets text leave first.

    Raises:
        ValueError: when both or neither of verdict and failure are given.
    """

    action: Action
    rule: str
    policy: str
    policy_version: str
    verdict: Verdict | None = None
    failure: GuardFailure | None = None
    scope: Scope = Scope()
    coverage: tuple[Coverage, ...] = ()
    advice: tuple[Advice, ...] = ()
    observed: Observed | None = None
    interventions: tuple[Intervention, ...] = ()
    leaked: int = 0

    def __post_init__(self) -> None:
        if (self.verdict is None) == (self.failure is None):
            raise ValueError("a decision has either a verdict or a guard failure, and never both")


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation with a trusted label and where it came from.

    Attributes:
        id: unique within its data set.
        conversation: ends with the judged turn.
        target: which kind of turn is judged.
        severity: the label; None when the source has none.
        categories: official or custom names; () on a non-SAFE example means unknown, not none.
        refusal: None when unknown.
        language: BCP-47 tag, "" when unknown.
        source: origin of the text.
        licence: licence of the data.
        split: ``train``, ``dev`` or ``test``.
        extra: what else the source says (basis, trust, original labels).
    """

    id: str
    conversation: Conversation
    target: Target
    severity: Severity | None
    categories: tuple[str, ...] = ()
    refusal: bool | None = None
    language: str = ""
    source: str = ""
    licence: str = ""
    split: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)


def worst(verdicts: Sequence[Verdict]) -> Verdict:
    """The worst of several verdicts: by severity, then by the probability of being unsafe, then of being flagged.

    Raises:
        ValueError: when there is none.
    """
    return max(verdicts, key=lambda v: (v.severity, v.probabilities.unsafe, v.probabilities.flagged))
