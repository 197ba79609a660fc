"""The curves of a run as a picture: loss and dev AUROC over trained tokens."""

from __future__ import annotations

import json
from pathlib import Path

__all__ = ["plot_curves"]


def plot_curves(run: Path) -> Path | None:
    """Draw ``curves.png`` from ``log.jsonl`` of a run; None when the log has no line yet."""
    log = run / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    if not lines:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    millions = [line["tokens"] / 1e6 for line in lines]
    for name, label in (("loss", "all"), ("risk_loss", "risk")):
        left.plot(millions, [line[name] for line in lines], marker="o", markersize=3, label=label)
    left.set(xlabel="trained tokens, millions", ylabel="loss per text", title="Training loss")
    for name in sorted(key for key in lines[-1] if key.startswith("dev/")):
        bold = name in ("dev/prompt", "dev/response")
        values = [line.get(name) for line in lines]
        right.plot(millions, values, label=name[4:], linewidth=2.2 if bold else 1.0, alpha=1.0 if bold else 0.6)
    right.set(xlabel="trained tokens, millions", ylabel="AUROC", title="Dev split, flagged against safe")
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    path = run / "curves.png"
    figure.savefig(path)
    return path
