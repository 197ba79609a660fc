"""How soon a guard reacts when a stream turns harmful, and how often it cries wolf before.

Response labels are given for a whole answer, so streams whose turning point is known are composed: the beginning of a
safe answer, then an unsafe one. An unsafe answer itself may begin harmlessly, so a delay counted from the seam is an
upper bound. Beside them run streams that are safe to their end, of one safe answer or of two joined (a guard that
alarms at the seam itself is found out by these).

An alarm is what a gateway acts on: ``debounce`` consecutive tokens whose probability of not being safe reaches a
threshold. It stands at the last of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tidegate.errors import GuardError
from tidegate.guards.base import StreamGuard
from tidegate.types import Conversation, Example, Role, Severity, Target

__all__ = ["StreamCase", "StreamScores", "Trace", "choose_threshold", "compose", "measure", "trace_all"]

_JOINTS = (" ", "\n\n", "\n")


@dataclass(frozen=True, slots=True)
class StreamCase:
    """One stream: what came before it, its text, and the character at which it turns harmful (None: it stays safe)."""

    context: Conversation | None
    text: str
    onset: int | None
    language: str


@dataclass(frozen=True, slots=True)
class Trace:
    """What a guard said along a stream: the characters covered up to each token, and P(not safe) there."""

    case: StreamCase
    ends: npt.NDArray[np.int64]
    flagged: npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class StreamScores:
    """Figures of one threshold; rates are shares of streams, delays are of the streams that were caught.

    Attributes:
        threshold: of P(not safe) at a token.
        safe_streams, false_cuts: streams that stay safe, and the share of them with an alarm.
        turning_streams, early: streams that turn, and the share with an alarm before they do.
        caught: share with an alarm after the turn (and none before).
        missed: share with no alarm at all.
        delay_tokens_p50, delay_tokens_p90, delay_characters_p50: from the turn to the alarm; None when none was caught.
    """

    threshold: float
    debounce: int
    safe_streams: int
    false_cuts: float
    turning_streams: int
    early: float
    caught: float
    missed: float
    delay_tokens_p50: float | None
    delay_tokens_p90: float | None
    delay_characters_p50: float | None

    def as_dict(self) -> dict[str, Any]:
        """The same as a plain dict."""
        return asdict(self)


def compose(examples: Sequence[Example], *, count: int, seed: int) -> list[StreamCase]:
    """Streams of response examples: half of them turn harmful, a quarter are one safe answer, a quarter two joined.

    The two parts of a stream are in one language; the user's turn before is that of the second part or none.

    Raises:
        ValueError: when no language has both safe and unsafe responses.
    """
    rng = np.random.default_rng(seed)
    safe, unsafe = _by_language(examples, Severity.SAFE), _by_language(examples, Severity.UNSAFE)
    languages = sorted(set(safe) & set(unsafe))
    if not languages:
        raise ValueError("streams need safe and unsafe responses in one language")
    weights = np.sqrt([len(unsafe[language]) for language in languages])
    weights /= weights.sum()
    cases = []
    for index in range(count):
        language = languages[int(rng.choice(len(languages), p=weights))]
        first = _pick(safe[language], rng)
        if index % 4 == 0:
            cases.append(StreamCase(_context(first), first.conversation.turns[-1].content, None, language))
            continue
        second = _pick(unsafe[language] if index % 2 else safe[language], rng)
        context = _context(second) if rng.random() < 0.5 else _context(first)
        beginning = _cut(first.conversation.turns[-1].content, int(rng.integers(30, 400)))
        head = beginning + _JOINTS[int(rng.integers(len(_JOINTS)))]
        onset = len(head) + int(second.extra.get("onset") or 0) if index % 2 else None
        cases.append(StreamCase(context, head + second.conversation.turns[-1].content, onset, language))
    return cases


async def trace_all(
    guard: StreamGuard,
    cases: Sequence[StreamCase],
    progress: Callable[[int, int], None] | None = None,
    *,
    concurrency: int = 32,
) -> list[Trace]:
    """What the guard says along each stream, in order.

    Raises:
        GuardError: when the guard cannot judge a stream.
    """
    traces: list[Trace | None] = [None] * len(cases)
    queue = iter(range(len(cases)))
    done = 0

    async def work() -> None:
        nonlocal done
        for index in queue:
            traces[index] = await _trace(guard, cases[index])
            done += 1
            if progress:
                progress(done, len(cases))

    await asyncio.gather(*(work() for _ in range(concurrency)))
    return [trace for trace in traces if trace is not None]


async def _trace(guard: StreamGuard, case: StreamCase) -> Trace:
    session = guard.open(case.context)
    try:
        verdicts = [*await session.feed(case.text), *await session.finish()]
    except GuardError:
        session.close()
        raise
    ends = np.asarray([verdict.span.end for verdict in verdicts], dtype=np.int64)
    return Trace(case, ends, np.asarray([verdict.probabilities.flagged for verdict in verdicts]))


def measure(traces: Sequence[Trace], threshold: float, debounce: int = 2) -> StreamScores:
    """The figures of one threshold."""
    safe = [trace for trace in traces if trace.case.onset is None]
    turning = [trace for trace in traces if trace.case.onset is not None]
    cuts = [_alarm(trace, threshold, debounce) is not None for trace in safe]
    early, caught, token_delays, character_delays = 0, 0, [], []
    for trace in turning:
        at = _alarm(trace, threshold, debounce)
        if at is None:
            continue
        onset = trace.case.onset or 0
        first = int(np.searchsorted(trace.ends, onset, side="right"))
        if at < first:
            early += 1
            continue
        caught += 1
        token_delays.append(at - first + 1)
        character_delays.append(int(trace.ends[at]) - onset)
    count = max(1, len(turning))
    return StreamScores(
        threshold=threshold,
        debounce=debounce,
        safe_streams=len(safe),
        false_cuts=float(np.mean(cuts)) if cuts else 0.0,
        turning_streams=len(turning),
        early=early / count,
        caught=caught / count,
        missed=1 - (early + caught) / count if turning else 0.0,
        delay_tokens_p50=_percentile(token_delays, 50),
        delay_tokens_p90=_percentile(token_delays, 90),
        delay_characters_p50=_percentile(character_delays, 50),
    )


def choose_threshold(traces: Sequence[Trace], *, false_cuts: float, debounce: int = 2) -> float:
    """The lowest threshold at which at most this share of the safe streams is cut."""
    peaks = []
    for trace in traces:
        if trace.case.onset is None:
            runs = np.lib.stride_tricks.sliding_window_view(trace.flagged, min(debounce, len(trace.flagged)))
            peaks.append(float(runs.min(axis=1).max()))
    allowed = int(false_cuts * len(peaks))
    worst = sorted(peaks, reverse=True)
    return min(0.99, worst[allowed] + 1e-6) if worst else 0.5


def _alarm(trace: Trace, threshold: float, debounce: int) -> int | None:
    run = 0
    for index, high in enumerate(trace.flagged >= threshold):
        run = run + 1 if high else 0
        if run == debounce:
            return index
    return None


def _by_language(examples: Sequence[Example], severity: Severity) -> dict[str, list[Example]]:
    groups: dict[str, list[Example]] = {}
    for example in examples:
        long_enough = len(example.conversation.turns[-1].content) >= 12
        if example.target is Target.RESPONSE and example.severity is severity and long_enough:
            groups.setdefault(example.language, []).append(example)
    return groups


def _context(example: Example) -> Conversation | None:
    users = [turn for turn in example.conversation.turns[:-1] if turn.role is Role.USER]
    return Conversation((users[-1],)) if users else None


def _cut(text: str, characters: int) -> str:
    """The first sentences of a text, about this many characters."""
    if len(text) <= characters:
        return text
    head = text[:characters]
    at = max(head.rfind(stop) for stop in (". ", "。", "! ", "? ", "\n", " ", "，"))
    return head[: at + 1].rstrip() if at > 0 else head


def _pick(examples: Sequence[Example], rng: np.random.Generator) -> Example:
    return examples[int(rng.integers(len(examples)))]


def _percentile(values: Sequence[int], q: float) -> float | None:
    return float(np.percentile(values, q)) if values else None
