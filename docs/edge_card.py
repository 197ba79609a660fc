"""Put the figures of a run and of its benchmarks into the edge guard's model card.

    python docs/edge_card.py --run RUN --quality FOLDER --streams FOLDER

``RUN`` is the folder of the training run, with the ``figures.json`` that ``tidegate export RUN --onnx --data FOLDER``
leaves; the other two are what benchmarks/quality.py and benchmarks/streams.py wrote. In docs/edge-guard.md each part
between ``<!-- figures: NAME -->`` and ``<!-- end of figures -->`` is written anew and the plots are replaced; the words
around them are for people to write.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tidegate.guards.edge import SHIPPED

HERE = Path(__file__).parent
CARD = HERE / "edge-guard.md"
_PART = r"(<!-- figures: {} -->\n).*?(<!-- end of figures -->)"
_HEADS = {
    "query_risk": "prompt severity",
    "risk": "answer severity",
    "query_category": "prompt category",
    "category": "answer category",
}


def main() -> None:
    """Read, replace, write."""
    options = _options()
    figures = json.loads((options.run / "figures.json").read_text(encoding="utf-8"))
    parts = {
        "run": _run(options.run),
        "agreement": _agreement(figures["agreement"]),
        "calibration": _calibration(figures["calibration"]),
        "streams": (options.streams / "streams.md").read_text(encoding="utf-8"),
        "quality": (options.quality / "quality.md").read_text(encoding="utf-8"),
    }
    card = CARD.read_text(encoding="utf-8")
    for name, text in parts.items():
        card, found = re.subn(
            _PART.format(name), lambda m, text=text: f"{m[1]}\n{text.strip()}\n\n{m[2]}", card, flags=re.DOTALL
        )
        if found != 1:
            raise SystemExit(f"{CARD}: expected the part {name!r} once, found it {found} times")
    CARD.write_text(card, encoding="utf-8")
    plots = {f"edge-{name}.png": options.quality / f"quality-{name}.png" for name in ("auroc", "points", "reliability")}
    plots |= {"edge-streams.png": options.streams / "streams.png", "edge-curves.png": options.run / "curves.png"}
    for name, source in plots.items():
        shutil.copyfile(source, HERE / "images" / name)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("run", "quality", "streams"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    return parser.parse_args()


def _run(run: Path) -> str:
    """What was shipped, and what its training took."""
    last = json.loads((run / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    config = json.loads((SHIPPED / "config.json").read_text(encoding="utf-8"))
    sizes = {path.name: path.stat().st_size for path in SHIPPED.iterdir() if path.name != "__init__.py"}
    table = config["vocab_size"] * config["hidden_size"]
    parameters = config["tidegate"]["parameters"]
    sizes_of = {
        "hidden": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "key-value heads": "num_key_value_heads",
        "feed-forward": "intermediate_size",
        "heads' inner size": "guard_inner_size",
    }
    shape = ", ".join(f"{name} {config[key]}" for name, key in sizes_of.items())
    files = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in sorted(sizes.items(), key=lambda s: -s[1]))
    rows = {
        "parameters": f"{parameters:,} in the model: {table:,} in the token table, {parameters - table:,} that compute",
        "shape": shape,
        "files": f"{files}; {sum(sizes.values()) / 1e6:.1f} MB together",
        "training": f"{last['tokens'] / 1e6:.1f} M tokens, {last['texts']:,} texts, {last['seconds'] / 60:.0f} minutes",
    }
    return _table(("", ""), [list(row) for row in rows.items()])


def _agreement(figures: Mapping[str, Any]) -> str:
    rows = []
    for kind, words in (("trained", "weights as trained"), ("rounded", "the same 8-bit weights")):
        for head, name in _HEADS.items():
            found = figures[kind][head]["all"]
            rows.append(
                [
                    words,
                    name,
                    f"{found['positions']:,}",
                    f"{found['max_probability_difference']:.2g}",
                    f"{found['mean_probability_difference']:.2g}",
                    f"{found['percent_equal_labels']:.3f} %",
                ]
            )
    head = ("torch with", "head", "positions", "largest difference of probability", "mean", "equal labels")
    return _table(head, rows)


def _calibration(figures: Mapping[str, Any]) -> str:
    settings = figures["settings"]
    weights = settings.get("wide", {}).get("weight", {})
    rows = []
    for target, name in (("prompt", "prompt"), ("response", "answer")):
        limits = settings["thresholds"][target]
        rows.append(
            [
                name,
                f"{figures[target]['rows']:,}",
                f"{settings['temperature'][target]:.2f}",
                f"{weights.get(target, 0):.2f}",
                f"{limits['flagged']:.2f}",
                f"{limits['unsafe']:.2f}",
                f"{figures[target]['calibration_error_before']:.3f}",
                f"{figures[target]['calibration_error_after']:.3f}",
            ]
        )
    token = settings["thresholds"]["token"]
    rows.append(
        ["token of a stream", "", "as answer", "as answer", f"{token['flagged']:.2f}", f"{token['unsafe']:.2f}"]
    )
    rows[-1] += ["", ""]
    head = (
        "target",
        "dev rows",
        "temperature",
        "weight of n-grams",
        "flagged from",
        "unsafe from",
        "calibration error before",
        "after",
    )
    return _table(head, rows)


def _table(head: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
