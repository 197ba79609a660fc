"""Make an exported guard honest: calibrate its probabilities and choose its thresholds, on the dev split only.

Temperature, a bias per class and the weight of the table of n-grams, where there is one, are fitted for prompts and for
responses, every lane (target and language group) weighing the same. The thresholds for whole texts are those with the
best F1 on the same weights: for *flagged* against Controversial + Unsafe, for *unsafe* against Unsafe. The threshold
for tokens of a stream is the lowest one that cuts at most a stated share of safe dev streams; a flagged token is Unsafe
when that is the more likely half of what it says.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tidegate.data.mix import lane_of
from tidegate.evals.metrics import Calibration, best_threshold, calibrated, expected_calibration_error, fit_calibration
from tidegate.evals.run import Judged, judge_all
from tidegate.evals.streaming import choose_threshold, compose, measure, trace_all
from tidegate.guards.edge import EdgeGuard
from tidegate.model.tokens import TextTokenizer
from tidegate.train.args import load_recipe
from tidegate.train.edge import dev_texts, load_examples
from tidegate.train.export import agreement, export_onnx
from tidegate.types import Example, Probabilities, Severity, Target

__all__ = ["calibrate", "finish_guard"]

_ORDER = (Severity.SAFE, Severity.UNSAFE, Severity.CONTROVERSIAL)
NEUTRAL: dict[str, Any] = {
    "temperature": {"prompt": 1.0, "response": 1.0},
    "bias": {"prompt": [0.0, 0.0, 0.0], "response": [0.0, 0.0, 0.0]},
    "thresholds": {name: {"flagged": 0.5, "unsafe": 0.5} for name in ("prompt", "response", "token")},
    "category_threshold": 0.3,
}
"""The settings of a guard that was never calibrated."""
_ALL, _NOTHING = {"prompt": 1.0, "response": 1.0}, {"prompt": 0.0, "response": 0.0}

Progress = Callable[[int, int], None]


def finish_guard(
    run: Path, out: Path, data: Path, *, agreement_rows: int = 2000, progress: Progress | None = None
) -> dict[str, Any]:
    """Export a run, compare the file with torch on dev examples, and calibrate it: a guard that is ready to use.

    Args:
        run: the folder of a finished run.
        out: the folder to write.
        data: the folder of examples that the run was trained on; its dev split and the recipe's synthetic one count.
        agreement_rows: how many dev examples are computed by both.
        progress: told while dev rows and streams are judged.

    Returns:
        ``export``, ``agreement`` and ``calibration`` figures, also written to ``figures.json`` in the run.

    Raises:
        InputError: when the run is not finished or the data cannot be used.
    """
    recipe = load_recipe(run / "recipe.yaml")
    dev = [example for example in load_examples(data, recipe) if example.split == "dev"]
    figures: dict[str, Any] = {"export": export_onnx(run, out)}
    tokenizer = TextTokenizer.load(out / "tokenizer.json")
    _, texts = dev_texts(dev, tokenizer, recipe, agreement_rows)
    figures["agreement"] = agreement(run / "checkpoint", out, [text.ids for text in texts])
    figures["calibration"] = asyncio.run(calibrate(out, dev, progress=progress))
    (run / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return figures


async def calibrate(
    folder: Path,
    dev: Sequence[Example],
    *,
    false_cuts: float = 0.02,
    streams: int = 1200,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Calibrate the guard in ``folder`` and write the result into its ``config.json``.

    Args:
        folder: an exported edge guard.
        dev: labelled dev examples of both targets.
        false_cuts: share of safe dev streams that may be cut, in [0, 1].
        streams: how many dev streams are composed, of examples that are not synthetic where there are any.
        seed: of the composition.
        progress: told after every row.

    Returns:
        The figures: calibration error before and after, thresholds, stream scores on dev.
    """
    wide = _wide(folder)
    alone = {"wide": {**wide, "weight": _NOTHING}} if wide else {}
    judged = await _judged(folder, NEUTRAL | alone, dev, progress)
    second = None
    if wide:  # a temperature without end leaves what the n-grams say
        ngrams = {**NEUTRAL, "temperature": {"prompt": 1e9, "response": 1e9}, "wide": {**wide, "weight": _ALL}}
        second = await _judged(folder, ngrams, dev, progress)
    settings: dict[str, Any] = {key: dict(value) for key, value in NEUTRAL.items() if isinstance(value, dict)}
    weights = {}
    figures: dict[str, Any] = {}
    for target in Target:
        chosen = [n for n, row in enumerate(judged) if row.example.target is target and row.verdict is not None]
        fitted, thresholds, figures[target.value] = _fit(
            [judged[n] for n in chosen], [second[n] for n in chosen] if second else None
        )
        settings["temperature"][target.value] = fitted.temperature
        settings["bias"][target.value] = [round(b, 5) for b in fitted.bias]
        settings["thresholds"] = {**settings["thresholds"], target.value: thresholds}
        weights[target.value] = round(fitted.weight, 4)
    if wide:
        settings["wide"] = {**wide, "weight": weights}
    _update(folder, settings)
    guard = EdgeGuard(folder)
    try:
        real = [example for example in dev if lane_of(example) != "synthetic"]
        traces = await trace_all(guard, compose(real or dev, count=streams, seed=seed), progress)
    finally:
        await guard.close()
    at = choose_threshold(traces, false_cuts=false_cuts)
    settings["thresholds"]["token"] = {"flagged": round(at, 4), "unsafe": 0.5}
    _update(folder, settings)
    figures["streams"] = [measure(traces, threshold).as_dict() for threshold in sorted({0.3, 0.5, 0.7, 0.9, at})]
    figures["settings"] = settings
    return figures


async def _judged(
    folder: Path, settings: dict[str, Any], dev: Sequence[Example], progress: Progress | None
) -> list[Judged]:
    """What the guard says of the dev rows under these settings, which stay in its config."""
    _update(folder, settings)
    guard = EdgeGuard(folder)
    try:
        return await judge_all(guard, dev, progress)
    finally:
        await guard.close()


def _wide(folder: Path) -> dict[str, Any] | None:
    section = json.loads((folder / "config.json").read_text(encoding="utf-8"))["tidegate"].get("wide")
    return None if section is None else {"scale": section["scale"]}


def _fit(
    rows: Sequence[Judged], second: Sequence[Judged] | None
) -> tuple[Calibration, dict[str, float], dict[str, Any]]:
    logits, more = _log_probabilities(rows), None if second is None else _log_probabilities(second)
    labels = np.asarray([_ORDER.index(row.example.severity or Severity.SAFE) for row in rows])
    weights = _lane_weights(rows)
    calibration = fit_calibration(logits, labels, weights, more=more)
    before, after = 1 - np.exp(logits[:, 0]), calibrated(logits, calibration, more)
    strict = labels != 0
    loose = labels == _ORDER.index(Severity.UNSAFE)
    flagged = best_threshold(strict, 1 - after[:, 0], weights)
    unsafe = best_threshold(loose, after[:, 1], weights)
    thresholds = {"flagged": round(flagged, 4), "unsafe": round(unsafe, 4)}
    figures = {
        "rows": len(rows),
        "calibration_error_before": expected_calibration_error(strict, before),
        "calibration_error_after": expected_calibration_error(strict, 1 - after[:, 0]),
    }
    return calibration, thresholds, figures


def _log_probabilities(rows: Sequence[Judged]) -> npt.NDArray[np.float64]:
    return np.asarray(np.log(np.maximum(np.asarray([_by_id(row) for row in rows]), 1e-9)))


def _by_id(row: Judged) -> tuple[float, float, float]:
    assert row.verdict is not None
    p: Probabilities = row.verdict.probabilities
    return p.safe, p.unsafe, p.controversial


def _lane_weights(rows: Sequence[Judged]) -> npt.NDArray[np.float64]:
    lanes = np.asarray([lane_of(row.example) for row in rows])
    names, counts = np.unique(lanes, return_counts=True)
    size = dict(zip(names.tolist(), counts.tolist(), strict=True))
    return np.asarray([1.0 / size[lane] for lane in lanes.tolist()])


def _update(folder: Path, settings: dict[str, Any]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tidegate"].update(settings)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
