"""Exports of a Stream checkpoint against torch: what rounding costs, what company changes, and how long runs take.

    tidegate export CHECKPOINT --precision int8 --out EXPORT
    python benchmarks/exports.py CHECKPOINT EXPORT [EXPORT ...] [--texts IDS.json] [--no-times]

Agreement is with torch in float32, over the tokens of the texts (lists of ids; random ones when none are given): the
difference of the most different probability at each token, and how often the most probable severity is another.
Independence is between one run and one token at a time, alone and beside other texts. Times are those of one forward
with its heads, the fastest of several, with torch in bfloat16 for comparison: everything in one run, all on the CPU.

Writes a table to the terminal and ``benchmarks/results/exports-DATE.json``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import time
from collections.abc import Sequence as Ids
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tidegate.engine.logits import Logits
from tidegate.engine.onnx_runner import OnnxRunner
from tidegate.engine.runner import Runner
from tidegate.engine.scheduler import Piece, Step
from tidegate.engine.sequence import Sequence, Windows
from tidegate.model.loading import load_stream
from tidegate.model.onnx_backbone import OnnxBackbone
from tidegate.types import Target

RESULTS = Path(__file__).parent / "results"
CONTEXTS = (128, 1024, 4096)
NEW = (1, 8, 16)
STREAMS = 8
POSITIONS = 8192
NOBODY = Sequence(Windows(POSITIONS, 1))


def piece(ids: Ids[int], start: int = 0, cached: int = 0, wanted: int | None = None) -> Piece:
    return Piece(NOBODY, start, cached, list(ids), len(ids) if wanted is None else wanted, Target.RESPONSE)


def run(runner: Runner | OnnxRunner, *pieces: Piece) -> list[Logits]:
    results = runner.run(Step(pieces, ()))
    assert all(result is not None for result in results)
    return [result for result in results if result is not None]


def probabilities(logits: Logits) -> list[np.ndarray]:
    powers = [np.exp(part - part.max(-1, keepdims=True)) for part in logits]
    return [part / part.sum(-1, keepdims=True) for part in powers]


def agreement(mine: list[Logits], theirs: list[Logits]) -> dict[str, float]:
    pairs = [(probabilities(a), probabilities(b)) for a, b in zip(mine, theirs, strict=True)]
    gaps = np.concatenate([np.abs(a[0] - b[0]).max(-1) for a, b in pairs])
    flips = np.concatenate([a[0].argmax(-1) != b[0].argmax(-1) for a, b in pairs])
    category = np.concatenate([np.abs(a[1] - b[1]).max(-1) for a, b in pairs])
    return {
        "tokens": gaps.size,
        "severity_mean": float(gaps.mean()),
        "severity_p99": float(np.quantile(gaps, 0.99)),
        "severity_max": float(gaps.max()),
        "category_mean": float(category.mean()),
        "flips": float(flips.mean()),
    }


def independence(runner: Runner | OnnxRunner, text: Ids[int]) -> dict[str, float]:
    """Largest differences of a probability between one run of a text and other ways to compute it."""
    (whole,) = run(runner, piece(text))
    steps = [run(runner, piece([token], 0, done))[0] for done, token in enumerate(text)]
    far = 2 * len(text)
    beside = [run(runner, piece([token], far, done), piece(text[:7], 0))[0] for done, token in enumerate(text)]
    found = {}
    for name, parts in {"steps": steps, "neighbours": beside}.items():
        joined = Logits(*(np.concatenate(each) for each in zip(*parts, strict=True)))
        pairs = zip(probabilities(whole), probabilities(joined), strict=True)
        found[name] = max(float(np.abs(a - b).max()) for a, b in pairs)
    return found


def milliseconds(runner: Runner | OnnxRunner, repeats: int, *pieces: Piece) -> float:
    taken = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        run(runner, *pieces)
        taken.append(time.perf_counter() - began)
    return 1e3 * min(taken[1:])


def times(runner: Runner | OnnxRunner, vocabulary: int) -> dict[str, float]:
    rng = np.random.default_rng(1)

    def some(count: int) -> list[int]:
        return rng.integers(0, vocabulary, count).tolist()

    run(runner, piece(some(16)))
    found = {
        "prefill 350": milliseconds(runner, 2, piece(some(350), wanted=1)),
        "130 behind 220": milliseconds(runner, 2, piece(some(130), 0, 220, 1)),
    }
    for context in CONTEXTS:
        for new in NEW:
            found[f"{new} at {context}"] = milliseconds(runner, 4, piece(some(new), 0, context))
    pieces = [piece(some(1), 256 * place, 128) for place in range(STREAMS)]
    found[f"{STREAMS} streams, 1 at 128"] = milliseconds(runner, 4, *pieces)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("exports", type=Path, nargs="+")
    parser.add_argument("--texts", type=Path)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--no-times", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    vocabulary = json.loads((options.checkpoint / "config.json").read_text())["vocab_size"]
    random = [np.random.default_rng(0).integers(0, vocabulary, 256).tolist()]
    texts = json.loads(options.texts.read_text()) if options.texts else random
    rows: dict[str, dict[str, Any]] = {}
    runner: Runner | OnnxRunner = Runner(load_stream(options.checkpoint, dtype="float32"), POSITIONS)
    expected = [run(runner, piece(text))[0] for text in texts]
    runner = Runner(load_stream(options.checkpoint, dtype="bfloat16"), POSITIONS)
    rows["torch bfloat16"] = measured(runner, texts, expected, vocabulary, options.no_times)
    for export in options.exports:
        backbone = OnnxBackbone(export, threads=options.threads)
        runner = OnnxRunner(backbone, POSITIONS)
        rows[backbone.precision] = measured(runner, texts, expected, vocabulary, options.no_times)
    report(rows, options)


def measured(
    runner: Runner | OnnxRunner, texts: list[list[int]], expected: list[Logits], vocabulary: int, no_times: bool
) -> dict[str, Any]:
    mine = [run(runner, piece(text))[0] for text in texts]
    found: dict[str, Any] = {
        "agreement": agreement(mine, expected),
        "independence": independence(runner, texts[0][:64]),
    }
    if not no_times:
        found["milliseconds"] = times(runner, vocabulary)
    return found


def report(rows: dict[str, dict[str, Any]], options: argparse.Namespace) -> None:
    for name, row in rows.items():
        print(name)
        for kind, figures in row.items():
            print(f"  {kind}: " + ", ".join(f"{label} {figure:.4g}" for label, figure in figures.items()))
    versions = {package: version(package) for package in ("torch", "onnxruntime", "numpy")}
    about = {"date": str(datetime.date.today()), "machine": platform.processor() or platform.machine()}
    about |= {"threads": options.threads, "checkpoint": options.checkpoint.name, "versions": versions}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"exports-{options.checkpoint.name}-{about['date']}.json"
    path.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
