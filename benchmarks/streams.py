"""How soon a guard reacts when a stream turns harmful, and how often it cries wolf before.

    python benchmarks/streams.py --dev FOLDER --eval FOLDER [--guard edge] [--out runs/streams]

Streams are composed (see tidegate.evals.streaming) from the responses of the dev split of the first folder, and of all
of the second. Written are ``streams.json``, ``streams.md`` (tables) and ``streams.png``: false cuts against what is
caught for every threshold, and how many tokens after the turn the alarm stands.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tidegate.data.examples import read_examples
from tidegate.evals.streaming import StreamScores, Trace, compose, measure, trace_all
from tidegate.guards import load_guard
from tidegate.types import Example

THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


def main() -> None:
    """Compose, trace, measure, write."""
    options = _options()
    options.out.mkdir(parents=True, exist_ok=True)
    sets = {
        "dev": [e for e in _examples(options.dev) if e.split == "dev"],
        "eval": list(_examples(options.eval)),
    }
    figures, traces = asyncio.run(_run(options, sets))
    (options.out / "streams.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    (options.out / "streams.md").write_text(_markdown(figures), encoding="utf-8")
    _plot(figures, traces, options.out / "streams.png")
    sys.stdout.write(_markdown(figures))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dev", type=Path, required=True, help="folder of examples; its dev split is used")
    parser.add_argument("--eval", type=Path, required=True, help="folder of examples; all are used")
    parser.add_argument("--guard", default="edge")
    parser.add_argument("--streams", type=int, default=1600, help="composed of each of the two")
    parser.add_argument("--seed", type=int, default=7, help="another one than calibration uses (0)")
    parser.add_argument("--out", type=Path, default=Path("runs/streams"))
    return parser.parse_args()


def _examples(folder: Path) -> list[Example]:
    files = sorted([*folder.glob("*.jsonl.gz"), *folder.glob("*.jsonl")])
    return [e for path in files for e in read_examples(path) if e.severity is not None]


async def _run(
    options: argparse.Namespace, sets: dict[str, list[Example]]
) -> tuple[dict[str, Any], dict[str, list[Trace]]]:
    guard = load_guard(options.guard)
    config = getattr(guard, "config", None)
    shipped = config.thresholds.token.flagged if config is not None else 0.5
    figures: dict[str, Any] = {"guard": guard.name, "threshold": shipped, "seed": options.seed, "sets": {}}
    traces: dict[str, list[Trace]] = {}
    for name, examples in sets.items():
        cases = compose(examples, count=options.streams, seed=options.seed)
        traces[name] = await trace_all(guard, cases, lambda done, total, name=name: _tell(name, done, total))
        figures["sets"][name] = _figures(traces[name], shipped)
    await guard.close()
    return figures, traces


def _figures(traces: Sequence[Trace], shipped: float) -> dict[str, Any]:
    languages = sorted({trace.case.language for trace in traces})
    return {
        "shipped": measure(traces, shipped).as_dict(),
        "without_debounce": measure(traces, shipped, 1).as_dict(),
        "by_language": {
            language: measure([t for t in traces if t.case.language == language], shipped).as_dict()
            for language in languages
        },
        "thresholds": [measure(traces, threshold).as_dict() for threshold in THRESHOLDS],
    }


def _markdown(figures: dict[str, Any]) -> str:
    head = (
        "| streams | threshold | debounce | stay safe | false cuts | turn | too early | caught | missed "
        "| delay in tokens, P50 / P90 | delay in characters, P50 |\n"
        f"|---|{'---:|' * 10}\n"
    )
    lines = []
    for name, group in figures["sets"].items():
        lines.append(_row(name, group["shipped"]))
        lines.append(_row(f"{name}, no debounce", group["without_debounce"]))
        lines += [_row(f"{name}, {language}", scores) for language, scores in group["by_language"].items()]
    return head + "\n".join(lines) + "\n"


def _row(name: str, scores: dict[str, Any]) -> str:
    def share(value: float) -> str:
        return f"{100 * value:.1f} %"

    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.0f}"

    delay = f"{number(scores['delay_tokens_p50'])} / {number(scores['delay_tokens_p90'])}"
    return (
        f"| {name} | {scores['threshold']:.2f} | {scores['debounce']} | {scores['safe_streams']} "
        f"| {share(scores['false_cuts'])} | {scores['turning_streams']} | {share(scores['early'])} "
        f"| {share(scores['caught'])} | {share(scores['missed'])} | {delay} "
        f"| {number(scores['delay_characters_p50'])} |"
    )


def _plot(figures: dict[str, Any], traces: dict[str, list[Trace]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, rows in traces.items():
        curve: list[StreamScores] = [measure(rows, float(t)) for t in np.linspace(0.02, 0.98, 49)]
        left.plot([100 * s.false_cuts for s in curve], [100 * s.caught for s in curve], label=name, linewidth=2)
        at = measure(rows, figures["threshold"])
        left.plot([100 * at.false_cuts], [100 * at.caught], "o", color=left.lines[-1].get_color())
        delays = np.sort(_delays(rows, figures["threshold"]))
        turning = sum(trace.case.onset is not None for trace in rows)
        right.step(delays, 100 * np.arange(1, len(delays) + 1) / max(1, turning), label=name, linewidth=2, where="post")
    left.set(
        xlabel="safe streams cut, %", ylabel="turning streams caught after the turn, %", xlim=(0, 40), ylim=(0, 100)
    )
    left.set_title("Every threshold; the dot is the shipped one")
    right.set(xlabel="tokens after the turn", ylabel="turning streams stopped by then, %", xlim=(0, 128), ylim=(0, 100))
    right.set_title("How soon")
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    figure.savefig(path)


def _delays(traces: Sequence[Trace], threshold: float) -> list[int]:
    delays = []
    for trace in traces:
        scores = measure([trace], threshold)
        if trace.case.onset is not None and scores.delay_tokens_p50 is not None:
            delays.append(int(scores.delay_tokens_p50))
    return delays


def _tell(name: str, done: int, total: int) -> None:
    if done % 100 == 0 or done == total:
        sys.stderr.write(f"\r{name}: {done}/{total} streams")
        sys.stderr.write("\n" if done == total else "")


if __name__ == "__main__":
    main()
