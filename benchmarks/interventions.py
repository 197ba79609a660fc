"""What holding, releasing first and confirming cost and save, on streams that turn harmful and on streams that do not.

    python benchmarks/interventions.py --eval FOLDER [--streams 240] [--words 40]

Streams are composed from the responses of a folder of Example files (see `tidegate.evals.streaming`), and arrive word
by word at a steady pace, many at a time, in real time. Each mode judges the same streams with the same guard and the
same rule: two tokens in a row that the guard does not call safe stop a stream.

- ``hold``: nothing leaves unjudged. ``adaptive``: the same, and text is held while P(not safe) is at least 0.2.
- ``release_first``: text leaves at once; ``release_first, K``: at most K characters ahead of what is judged.
- ``confirm``: as ``hold``, and a second guard is asked before anything is cut. There is no stronger guard here: it is
  a stand-in, the same edge guard reading the whole text up to the alarm, which confirms at P(not safe) of 0.9 or more.
  What it shows is the mechanism and its price (what it does not confirm is missed), not what a strong guard is worth.

Reported for each mode: flagged characters that had left (``leaked``), characters behind the turn that left, the longest
time that a text was held, false cuts of streams that stay safe, and turning streams that are stopped. Results go to
``benchmarks/results/interventions-DATE.json`` and ``.png``.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import platform
import re
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tidegate.data.examples import read_examples
from tidegate.evals.streaming import StreamCase, compose
from tidegate.guards import load_guard
from tidegate.guards.base import Guard, StreamGuard
from tidegate.guards.second import SecondGuard
from tidegate.moderate import StreamModerator
from tidegate.policy import Policy, parse_policy
from tidegate.types import Action, Conversation, Decision, Severity, Verdict

RESULTS = Path(__file__).parent / "results"
CONFIRMS_FROM = 0.9
RULE = "{name: b, on_guard_error: block, otherwise: allow, rules: [{name: s, severity: controversial, action: block}]"
MODES = {
    "hold": "",
    "adaptive": ", hold: {risk: 0.2}",
    "release_first": ", hold: release_first",
    "release_first, 40": ", hold: {mode: release_first, leak: 40}",
    "confirm": ", confirm: true",
}


class WholeText:
    """The stand-in for a stronger guard; see the module's text."""

    name = "edge, the whole text, 0.9"

    def __init__(self, guard: Guard) -> None:
        self._guard = guard

    async def judge(self, conversation: Conversation) -> Verdict:
        verdict = await self._guard.judge(conversation)
        flagged = verdict.probabilities.flagged >= CONFIRMS_FROM
        return replace(verdict, severity=max(verdict.severity, Severity.CONTROVERSIAL) if flagged else Severity.SAFE)

    async def close(self) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one stream."""

    case: StreamCase
    decision: Decision
    released: int
    delay_s: float


def main() -> None:
    """Compose, judge in every mode, write."""
    options = _options()
    files = sorted(options.eval.glob("*.jsonl.gz"))
    examples = [one for path in files for one in read_examples(path) if one.severity is not None]
    cases = compose(examples, count=options.streams, seed=options.seed)
    figures = asyncio.run(_run(options, cases))
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"interventions-{datetime.date.today().isoformat()}.json"
    path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    _plot(figures, path.with_suffix(".png"))
    sys.stdout.write(json.dumps(figures["modes"], indent=1) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--eval", type=Path, required=True, help="folder of examples; all are used")
    parser.add_argument("--guard", default="edge")
    parser.add_argument("--streams", type=int, default=240)
    parser.add_argument("--at-once", type=int, default=48)
    parser.add_argument("--words", type=float, default=40.0, help="words a second of each stream")
    parser.add_argument("--longest", type=int, default=600, help="characters of a stream; the rest is left out")
    parser.add_argument("--seed", type=int, default=11)
    return parser.parse_args()


async def _run(options: argparse.Namespace, cases: Sequence[StreamCase]) -> dict[str, Any]:
    guard = load_guard(options.guard)
    assert isinstance(guard, StreamGuard)
    second = SecondGuard(WholeText(guard))
    short = [
        replace(case, text=case.text[: options.longest])
        for case in cases
        if case.onset is None or case.onset < options.longest - 100
    ]
    modes = {}
    for name, extra in MODES.items():
        policy = parse_policy(f"{RULE}{extra}}}")
        outcomes = await _all(short, guard, policy, second, options)
        modes[name] = _figures(outcomes)
        sys.stderr.write(f"{name}: {len(outcomes)} streams\n")
    await guard.close()
    return {
        "guard": guard.name,
        "confirmed_by": WholeText.name,
        "streams": len(short),
        "at_once": options.at_once,
        "words_per_second": options.words,
        "seed": options.seed,
        "machine": {"processor": platform.processor() or platform.machine(), "python": platform.python_version()},
        "modes": modes,
    }


async def _all(
    cases: Sequence[StreamCase],
    guard: StreamGuard,
    policy: Policy,
    second: SecondGuard,
    options: argparse.Namespace,
) -> list[Outcome]:
    queue = iter(range(len(cases)))
    outcomes: list[Outcome | None] = [None] * len(cases)

    async def work(number: int) -> None:
        await asyncio.sleep(number / options.at_once / options.words)
        for index in queue:
            outcomes[index] = await _one(cases[index], guard, policy, second, 1 / options.words)

    await asyncio.gather(*(work(number) for number in range(options.at_once)))
    return [one for one in outcomes if one is not None]


async def _pieces(text: str, pause_s: float) -> AsyncIterator[str]:
    due = asyncio.get_running_loop().time()
    for piece in re.findall(r"\s*\S+\s*?|\s+", text):
        for part in (piece[at : at + 12] for at in range(0, len(piece), 12)):
            due += pause_s
            await asyncio.sleep(max(0.0, due - asyncio.get_running_loop().time()))
            yield part


async def _one(case: StreamCase, guard: StreamGuard, policy: Policy, second: SecondGuard, pause_s: float) -> Outcome:
    moderator = StreamModerator(guard, policy, context=case.context, second=second)
    decision: Decision | None = None
    async for piece in _pieces(case.text, pause_s):
        decision = (await moderator.feed(piece)).decision
        if decision is not None:
            break
    if decision is None:
        decision = (await moderator.finish()).decision
    assert decision is not None
    return Outcome(case, decision, moderator.released, moderator.delay_s)


def _figures(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    safe = [one for one in outcomes if one.case.onset is None]
    turning = [one for one in outcomes if one.case.onset is not None]
    stopped = [one for one in turning if one.decision.action is Action.BLOCK]
    behind = [max(0, one.released - (one.case.onset or 0)) for one in turning]
    delays = [1000 * one.delay_s for one in outcomes]
    leaked = [one.decision.leaked for one in outcomes]
    questions = [each.outcome for one in outcomes for each in one.decision.interventions if each.kind == "confirm"]
    return {
        "safe_streams": len(safe),
        "false_cuts": sum(one.decision.action is Action.BLOCK for one in safe),
        "turning_streams": len(turning),
        "stopped": len(stopped),
        "leaked_characters_total": sum(leaked),
        "leaked_characters_most": max(leaked),
        "streams_that_leaked": sum(1 for one in leaked if one),
        "characters_behind_the_turn_p50": float(np.percentile(behind, 50)),
        "longest_delay_ms_p50": round(float(np.percentile(delays, 50)), 2),
        "longest_delay_ms_p95": round(float(np.percentile(delays, 95)), 2),
        "longest_delay_ms_most": round(max(delays), 2),
        "overruled": questions.count("overruled"),
    }


def _plot(figures: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    names = list(figures["modes"])
    rows = [figures["modes"][name] for name in names]
    figure = Figure(figsize=(11, 3.6), dpi=120, layout="constrained")
    panels = (
        ("flagged characters that left", lambda row: row["leaked_characters_total"]),
        ("longest time held, P95, ms", lambda row: row["longest_delay_ms_p95"]),
        ("false cuts, % of safe streams", lambda row: 100 * row["false_cuts"] / max(1, row["safe_streams"])),
        ("stopped, % of turning streams", lambda row: 100 * row["stopped"] / max(1, row["turning_streams"])),
    )
    for axes, (title, value) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        values = [value(row) for row in rows]
        bars = axes.barh(names, values, color="#3b6ea8")
        axes.bar_label(bars, fmt="{:.0f}", padding=3)
        axes.invert_yaxis()
        axes.set_title(title, fontsize=9)
        axes.margins(x=0.2)
        if axes is not figure.axes[0]:
            axes.set_yticklabels([])
    figure.savefig(path)


if __name__ == "__main__":
    main()
