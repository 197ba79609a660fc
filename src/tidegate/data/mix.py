"""Which example comes next in training: a balanced draw from very uneven sources, and the streams composed of them.

The pack is uneven in every way: half of it is English, hate dominates the categories, some sources have ten thousand
rows and others a hundred. A draw therefore goes in steps: a *lane* (target and language group, with a share given by
the recipe), a severity within the lane, a source within those (a source of n rows weighs n^balance times what its
trust is worth), and then the next row of that source in an order that is shuffled anew each time round.

Three things are made of drawn rows, because the pack lacks them:

- *transfer*: a post that was labelled as a prompt is shown as something an assistant wrote: hate is hate, whoever
  writes it, and unsafe answers outside English are almost missing;
- *composition*: a safe beginning followed by an unsafe answer, with the place where it turns (``onset``) known, and the
  same of two safe texts, so that the seam itself says nothing;
- *disguise*: see ``augment``.

Everything is a function of the seed and of how often it was called, so that a run that was killed can go on as if it
had not been.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from tidegate.data.augment import disguise
from tidegate.types import Example, Role, Severity, Target

__all__ = ["Drawn", "Mix", "MixPlan", "lane_of", "language_group", "teacher_key"]


@dataclass(frozen=True, slots=True)
class MixPlan:
    """How to draw.

    Attributes:
        lanes: share of each lane, ``prompt-en`` … ``response-other`` and ``synthetic``; need not add up to 1.
        severities: share of Safe, Controversial, Unsafe within a lane (those that the lane lacks are left out).
        balance: exponent of a source's size, 0 (all sources alike) to 1 (all rows alike).
        trust: what a row of this trust is worth, in the draw and in the loss.
        transfer_sources: sources whose prompts are posts, that may be shown as answers.
        transfer: share of the rows of those sources that are.
        compose: share of response rows that get another text before them.
        disguise: share of rows that are disguised.
        drop_context: share of response rows shown without the prompt.
    """

    lanes: Mapping[str, float]
    severities: tuple[float, float, float] = (0.52, 0.14, 0.34)
    balance: float = 0.6
    trust: Mapping[str, float] = field(default_factory=lambda: {"high": 1.0, "medium": 0.8, "low": 0.4})
    transfer_sources: tuple[str, ...] = ()
    transfer: float = 0.3
    compose: float = 0.25
    disguise: float = 0.12
    drop_context: float = 0.15


@dataclass(frozen=True, slots=True)
class Drawn:
    """One training text.

    Attributes:
        target: which branch judges it.
        role: who says the judged text.
        context: the user's text before it, "" when there is none (always "" for prompts).
        text: the judged text.
        severity: its label.
        categories: official names; () means unknown when the severity is not SAFE.
        onset: index of the character of ``text`` where the harm begins; 0 when not known to be later.
        known_onset: whether all before ``onset`` is known to be safe; when not, the harm is somewhere in the text.
        sharp: whether the harm is known to begin right at ``onset``; when not, it begins there or later.
        weight: weight in the loss, in (0, 1].
        teacher: what a teacher said of the text as a whole: P(Safe), P(Controversial), P(Unsafe); None when nobody did.
    """

    target: Target
    role: Role
    context: str
    text: str
    severity: Severity
    categories: tuple[str, ...]
    onset: int
    known_onset: bool
    weight: float
    teacher: tuple[float, float, float] | None = None
    sharp: bool = False


def language_group(language: str) -> str:
    """``en``, ``zh`` or ``other``."""
    head = language.split("-")[0]
    return head if head in ("en", "zh") else "other"


class _Source:
    """Rows in an order that is shuffled anew each time round."""

    def __init__(self, rows: list[Example]) -> None:
        self.rows = rows
        self._order: list[int] = []

    def next(self, rng: np.random.Generator) -> Example:
        if not self._order:
            self._order = rng.permutation(len(self.rows)).tolist()
        return self.rows[self._order.pop()]


class Mix:
    """An endless balanced draw from labelled examples.

    Args:
        examples: labelled training examples; unlabelled ones are left out.
        plan: how to draw.
        seed: the same seed gives the same draws.
        teacher: what a teacher said of examples, by `teacher_key` (see data/distill.py); None for no teacher.

    Raises:
        ValueError: when a lane of the plan has no example.
    """

    def __init__(
        self,
        examples: Iterable[Example],
        plan: MixPlan,
        seed: int,
        teacher: Mapping[str, tuple[float, float, float]] | None = None,
    ) -> None:
        self.plan = plan
        self._teacher = teacher or {}
        self._rng = np.random.default_rng(seed)
        cells: dict[tuple[str, Severity], dict[str, list[Example]]] = defaultdict(lambda: defaultdict(list))
        for example in examples:
            if example.severity is not None:
                cells[lane_of(example), example.severity][_source_key(example)].append(example)
        self._lanes = [lane for lane, share in plan.lanes.items() if share > 0]
        self._lane_shares = _normalised([plan.lanes[lane] for lane in self._lanes])
        self._cells = {key: self._sources(sources) for key, sources in cells.items()}
        self._severities = {lane: self._severity_shares(lane) for lane in self._lanes}

    def _sources(self, sources: dict[str, list[Example]]) -> tuple[list[_Source], np.ndarray]:
        rows = list(sources.values())
        weights = [len(group) ** self.plan.balance * self._trust(group[0]) for group in rows]
        return [_Source(group) for group in rows], _normalised(weights)

    def _severity_shares(self, lane: str) -> tuple[list[Severity], np.ndarray]:
        present = [severity for severity in Severity if (lane, severity) in self._cells]
        if not present:
            raise ValueError(f"no labelled example for the lane {lane!r}")
        return present, _normalised([self.plan.severities[severity] for severity in present])

    def _trust(self, example: Example) -> float:
        return self.plan.trust.get(str(example.extra.get("trust", "high")), 0.8)

    def draw(self) -> Drawn:
        """The next training text."""
        rng = self._rng
        lane = self._lanes[int(rng.choice(len(self._lanes), p=self._lane_shares))]
        present, shares = self._severities[lane]
        severity = present[int(rng.choice(len(present), p=shares))]
        row = self._row(lane, severity)
        drawn = self._as_drawn(row)
        if drawn.target is Target.RESPONSE and rng.random() < self.plan.compose:
            drawn = self._composed(drawn, f"response-{language_group(row.language)}")
        if rng.random() < self.plan.disguise:
            drawn = _disguised(drawn, rng)
        return drawn

    def _row(self, lane: str, severity: Severity) -> Example:
        sources, weights = self._cells[lane, severity]
        return sources[int(self._rng.choice(len(sources), p=weights))].next(self._rng)

    def _as_drawn(self, example: Example) -> Drawn:
        turns = example.conversation.turns
        target, context = example.target, ""
        if target is Target.RESPONSE:
            users = [turn.content for turn in turns[:-1] if turn.role is Role.USER]
            if users and self._rng.random() >= self.plan.drop_context:
                context = users[-1]
        elif example.source in self.plan.transfer_sources and self._rng.random() < self.plan.transfer:
            target = Target.RESPONSE
        assert example.severity is not None
        onset = example.extra.get("onset")
        return Drawn(
            target=target,
            role=Role.ASSISTANT if target is Target.RESPONSE else turns[-1].role,
            context=context,
            text=turns[-1].content,
            severity=example.severity,
            categories=example.categories,
            onset=int(onset) if isinstance(onset, int) else 0,
            known_onset=isinstance(onset, int),
            weight=self._trust(example),
            teacher=self._teacher.get(teacher_key(example)) if target is example.target else None,
            sharp=isinstance(onset, int),
        )

    def _composed(self, drawn: Drawn, lane: str) -> Drawn:
        """The same text after the beginning of a safe answer of this lane; as it is when the lane has none."""
        rng = self._rng
        if (lane, Severity.SAFE) not in self._cells:
            return drawn
        before = self._row(lane, Severity.SAFE).conversation.turns[-1].content
        before = _beginning(before, int(rng.integers(20, 300)))
        joint = ("\n\n", " ", "\n", " ")[int(rng.integers(4))]
        shift = len(before) + len(joint)
        return replace(
            drawn,
            context=drawn.context if rng.random() < 0.5 else "",
            text=before + joint + drawn.text,
            onset=drawn.onset + shift,
            known_onset=True,
            teacher=None,
        )


def teacher_key(example: Example) -> str:
    """By what a teacher's word on an example is found again."""
    return f"{example.target.value}:{example.id}"


def lane_of(example: Example) -> str:
    """The lane that an example is drawn from."""
    if example.source.startswith("tidegate/"):
        return "synthetic"
    return f"{example.target.value}-{language_group(example.language)}"


def _source_key(example: Example) -> str:
    family = example.extra.get("family", "")
    language = example.language if example.source.startswith("tidegate/") else ""
    return f"{example.source}|{family}|{language}|{example.extra.get('trust', '')}"


def _beginning(text: str, characters: int) -> str:
    """The first sentences or words of a text, about this many characters."""
    if len(text) <= characters:
        return text
    head = text[:characters]
    for stop in (". ", "。", "! ", "? ", "\n", " "):
        at = head.rfind(stop)
        if at > characters // 3:
            return head[: at + len(stop.rstrip()) or at]
    return head


def _disguised(drawn: Drawn, rng: np.random.Generator) -> Drawn:
    head, tail = drawn.text[: drawn.onset], drawn.text[drawn.onset :]
    if head:
        head = disguise(head, rng) if rng.random() < 0.5 else head
    text = head + disguise(tail, rng)
    return replace(drawn, text=text, onset=len(head))


def _normalised(weights: list[float]) -> np.ndarray:
    array: np.ndarray = np.asarray(weights, dtype=np.float64)
    return np.asarray(array / array.sum())
