"""The tables (Markdown) and plots (PNG) of the figures of quality.py, ready for the model card."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["write_markdown", "write_plots"]

RULES = {"own": "own", "best_f1": "best F1 on dev", "fpr5": "5 % of dev Safe"}
MODES = ("strict", "loose")
TARGETS = ("prompt", "response")
_COLOURS = ("#0b5fa5", "#d1661c", "#e0a526", "#5b8c5a", "#8a6d9b", "#777777")
_MARKS = ("o", "s", "D", "^", "v", "x")


# --- tables -------------------------------------------------------------------------------------------------------


def write_markdown(figures: Mapping[str, Any], path: Path) -> Path:
    """Write all tables; returns the path."""
    parts = [
        _dev(figures),
        _macro(figures),
        _differences(figures),
        *(_sets(figures, target) for target in TARGETS),
        _languages(figures),
        _one_class(figures),
        _look_alikes(figures),
        *(_points(figures, target) for target in TARGETS),
        _sources(figures),
        _thresholds(figures),
        _variants(figures),
    ]
    path.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    return path


def _table(title: str, about: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    if not lines:
        return ""
    rule = "|" + "|".join("---" if i == 0 else "---:" for i in range(len(head))) + "|"
    return "\n".join([f"### {title}", "", *([about, ""] if about else []), f"| {' | '.join(head)} |", rule, *lines])


def _n(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _best(values: Sequence[float | None], text: Callable[[float | None], str] = _n) -> list[str]:
    """The values as text, the highest in bold."""
    known = [value for value in values if value is not None]
    return [
        f"**{text(v)}**" if v is not None and len(known) > 1 and text(v) == text(max(known)) else text(v)
        for v in values
    ]


def _rules_of(cell: Mapping[str, Any]) -> list[str]:
    return [rule for rule in RULES if rule in cell]


def _guards(figures: Mapping[str, Any], target: str | None = None) -> dict[str, Any]:
    """The guards that judge a target in a way of their own; without a target, those that do for all."""
    return {name: g for name, g in figures["guards"].items() if g["about"].get("only") in (None, target)}


def _dev(figures: Mapping[str, Any]) -> str:
    rows = []
    for target in TARGETS:
        for name, guard in _guards(figures, target).items():
            cell = guard["dev"]["target"][target]
            strict, loose = cell["strict"], cell["loose"]
            s, u = strict["best_f1"], loose["best_f1"]
            numbers = (strict["auroc"], s["f1"], s["precision"], s["recall"], s["false_positive_rate"])
            others = (loose["auroc"], u["f1"], u["precision"], u["recall"], u["false_positive_rate"])
            rows.append([target, name, f"{cell['rows']:,}", *map(_n, numbers), *map(_n, others)])
    return _table(
        "Dev split",
        "The split on which thresholds are chosen, and from the same sources as the training data: an upper bound. "
        "Threshold: best F1 on these rows, by target and mode.",
        (
            "target", "guard", "rows", "AUROC strict", "F1", "precision", "recall", "FPR",
            "AUROC loose", "F1", "precision", "recall", "FPR",
        ),
        rows,
    )  # fmt: skip


def _macro(figures: Mapping[str, Any]) -> str:
    rows = []
    for target in TARGETS:
        for mode in MODES:
            for name, guard in _guards(figures, target).items():
                macro = guard["macro"][target].get(mode)
                if not macro:
                    continue
                between = figures["intervals"][f"{target}/{mode}"]["auroc"][name]
                area = f"{_n(macro['auroc'])} ({_n(between['low'])}–{_n(between['high'])})"
                points = [
                    f"{_n(macro[rule]['f1'])} / {_n(macro[rule]['false_positive_rate'])}" if rule in macro else "–"
                    for rule in RULES
                ]
                everything = _n(macro["f1_of_flagging_all"])
                rows.append([target, mode, str(macro["sets"]), everything, name, area, *points])
    return _table(
        "Evaluation sets, macro averages",
        f"Plain means over the sets with at least {figures['fewest']} rows of each class; in brackets the 95 % "
        "bootstrap interval. Thresholds were chosen on the dev split. F1 is to be read beside that of flagging "
        "everything, which a weak guard with a low threshold comes near to.",
        (
            "target",
            "mode",
            "sets",
            "F1 of flagging all",
            "guard",
            "AUROC",
            *(f"F1 / FPR, {words}" for words in RULES.values()),
        ),
        rows,
    )


def _differences(figures: Mapping[str, Any]) -> str:
    guard = figures["guard"]
    rows = []
    for place, found in figures["intervals"].items():
        for name, between in found["difference"].items():
            if guard and name.startswith(f"{guard} - "):
                interval = f"{between['low']:+.3f} to {between['high']:+.3f}"
                target, mode = place.split("/")
                if name.removeprefix(f"{guard} - ") not in _guards(figures, target):
                    continue
                rows.append([target, mode, name.removeprefix(f"{guard} - "), f"{between['mean']:+.3f}", interval])
    return _table(
        f"Macro AUROC, {guard} minus each baseline",
        "Paired bootstrap: the same drawn rows for both.",
        ("target", "mode", "baseline", "difference", "95 % interval"),
        rows,
    )


def _sets(figures: Mapping[str, Any], target: str) -> str:
    guards = _guards(figures, target)
    first = next(iter(guards.values()))["eval"]["set"]
    rows = []
    for place, cell in first.items():
        if not place.startswith(f"{target}/") or cell["safe"] in (0, cell["rows"]):
            continue
        cells = [guard["eval"]["set"][place] for guard in guards.values()]
        strict, loose = (_best([c[mode]["auroc"] for c in cells]) for mode in MODES)
        both = [f"{s} / {u}" for s, u in zip(strict, loose, strict=True)]
        rows.append([place.split("/", 1)[1], f"{cell['rows']:,}", *both])
    return _table(f"AUROC by set, {target}s (strict / loose)", "", ("set", "rows", *guards), rows)


def _languages(figures: Mapping[str, Any]) -> str:
    guards = _guards(figures)
    first = next(iter(guards.values()))
    rows = []
    for part in ("dev", "eval"):
        for place, cell in first[part]["target_language"].items():
            cells = [guard[part]["target_language"][place]["strict"] for guard in guards.values()]
            areas = _best([c["auroc"] for c in cells])
            points = [
                f"{area}; {_n(c['best_f1']['f1'])} / {_n(c['best_f1']['false_positive_rate'])}"
                for area, c in zip(areas, cells, strict=True)
            ]
            rows.append([part, place.replace("/", ", "), f"{cell['rows']:,}", *points])
    return _table(
        "Language groups (strict)",
        "AUROC; F1 / FPR at the threshold with the best F1 on dev. The rows of all sets of a group together.",
        ("part", "group", "rows", *guards),
        rows,
    )


def _one_class(figures: Mapping[str, Any]) -> str:
    guards = _guards(figures)
    first = next(iter(guards.values()))["eval"]["set"]
    rows = []
    for place, cell in first.items():
        if cell["safe"] not in (0, cell["rows"]):
            continue
        measure = "FPR" if cell["safe"] else "recall"
        key = "false_positive_rate" if cell["safe"] else "recall"
        shown = [
            " / ".join(_n(c[rule][key], 2) if rule in c else "–" for rule in RULES)
            for c in (guard["eval"]["set"][place]["strict"] for guard in guards.values())
        ]
        rows.append([place.replace("/", ", "), measure, f"{cell['rows']:,}", *shown])
    return _table(
        "Sets of one class (strict)",
        f"Recall of sets that are all unsafe, false-positive rate of sets that are all safe. Thresholds: "
        f"{' / '.join(RULES.values())}.",
        ("set", "measure", "rows", *guards),
        rows,
    )


def _look_alikes(figures: Mapping[str, Any]) -> str:
    guards = _guards(figures)
    first = next(iter(guards.values()))["look_alikes"]
    rows = []
    for name, cell in first.items():
        shown = [
            " / ".join(_n(g["look_alikes"][name]["strict"].get(rule), 2) for rule in RULES) for g in guards.values()
        ]
        rows.append([name, f"{cell['rows']:,}", *shown])
    return _table(
        "False positives on benign look-alikes (strict)",
        f"Share of Safe prompts flagged in sets whose safe rows are written to look harmful. Thresholds: "
        f"{' / '.join(RULES.values())}.",
        ("set", "Safe rows", *guards),
        rows,
    )


def _points(figures: Mapping[str, Any], target: str) -> str:
    rows = []
    for name, guard in _guards(figures, target).items():
        for place, cell in guard["eval"]["set"].items():
            if not place.startswith(f"{target}/") or cell["safe"] in (0, cell["rows"]):
                continue
            rule = "own" if name == figures["guard"] else "best_f1"
            if name != figures["guard"] and not name.startswith("TF-IDF"):
                continue
            numbers = [cell[mode][rule] for mode in MODES]
            shown = [
                " / ".join(_n(c[key], 2) for key in ("f1", "precision", "recall", "false_positive_rate"))
                if cell[mode]["positives"]
                else "–"
                for mode, c in zip(MODES, numbers, strict=True)
            ]
            rows.append([place.split("/", 1)[1], name, f"{cell['rows']:,}", *shown])
    rows.sort(key=lambda row: row[0])
    return _table(
        f"Calls by set, {target}s",
        "F1 / precision / recall / FPR: the guard by its own calls, the regressions at their best F1 on dev.",
        ("set", "guard", "rows", *MODES),
        rows,
    )


def _sources(figures: Mapping[str, Any]) -> str:
    guards = {name: guard for name, guard in _guards(figures).items() if name != "better-profanity"}
    first = next(iter(guards.values()))
    rows = []
    for place, cell in first["dev"]["source"].items():
        if cell["safe"] in (0, cell["rows"]) or cell["rows"] < 40:
            continue
        areas = _best([guard["dev"]["source"][place]["strict"]["auroc"] for guard in guards.values()])
        target, source = place.split("/", 1)
        rows.append([target, source, f"{cell['rows']:,}", *areas])
    return _table(
        "AUROC by source on dev (strict)",
        "Sources with both classes and at least 40 dev rows: style does not tell the label here.",
        ("target", "source", "rows", *guards),
        rows,
    )


def _thresholds(figures: Mapping[str, Any]) -> str:
    rows = [
        [name, target, mode, *(_n(guard["thresholds"][target][mode][rule], 4) for rule in ("best_f1", "fpr5"))]
        for target in TARGETS
        for name, guard in _guards(figures, target).items()
        for mode in MODES
    ]
    head = ("guard", "target", "mode", RULES["best_f1"], RULES["fpr5"])
    return _table("Thresholds chosen on dev", "", head, rows)


def _variants(figures: Mapping[str, Any]) -> str:
    rows = [
        [name, "yes" if "only" not in guard["about"] else "", guard["about"]["reads"], target, _n(value, 4)]
        for name, guard in figures["guards"].items()
        if "reads" in guard["about"]
        for target, value in ((key.split("/")[1], value) for key, value in guard["about"]["dev_auroc"].items())
    ]
    about = (
        "What the regressions read of an answer's row: the answer alone, or the prompt before it. Strict AUROC on dev "
        "decides which is taken; the other is shown in the tables of responses."
    )
    return _table("Variants of the regressions", about, ("guard", "taken", "reads", "target", "dev AUROC"), rows)


# --- plots --------------------------------------------------------------------------------------------------------


def write_plots(figures: Mapping[str, Any], out: Path) -> list[Path]:
    """Draw the plots beside ``out``; returns their paths."""
    import matplotlib as mpl

    mpl.use("Agg")
    drawn = []
    for name, draw in (("auroc", _plot_auroc), ("reliability", _plot_reliability), ("points", _plot_points)):
        path = out.with_name(f"{out.stem}-{name}.png")
        draw(figures).savefig(path)
        drawn.append(path)
    return drawn


def _plot_auroc(figures: Mapping[str, Any]) -> Any:
    from matplotlib.figure import Figure

    guards = _guards(figures)
    first = next(iter(guards.values()))["eval"]["set"]
    places = {
        target: [p for p, c in first.items() if p.startswith(f"{target}/") and 0 < c["safe"] < c["rows"]]
        for target in TARGETS
    }
    figure = Figure(figsize=(10, 0.42 * max(map(len, places.values())) + 1.8), dpi=120, layout="constrained")
    for axes, target in zip(figure.subplots(1, 2, sharex=True), TARGETS, strict=True):
        chosen = sorted(places[target], key=lambda p: first[p]["strict"]["auroc"])
        for i, (name, guard) in enumerate(guards.items()):
            values = [guard["eval"]["set"][place]["strict"]["auroc"] for place in chosen]
            axes.scatter(values, range(len(chosen)), label=name, **_look(i, name == figures["guard"]))
        axes.set_yticks(range(len(chosen)), [place.split("/", 1)[1] for place in chosen], fontsize=8)
        axes.axvline(0.5, color="#999999", linewidth=0.8, linestyle=":")
        axes.set(title=f"{target.capitalize()}s", xlabel="AUROC, strict")
        axes.grid(axis="both", alpha=0.25)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def _look(place: int, large: bool) -> dict[str, Any]:
    return {
        "color": _COLOURS[place % len(_COLOURS)],
        "marker": _MARKS[place % len(_MARKS)],
        "s": 60 if large else 28,
        "zorder": 3 if large else 2,
    }


def _plot_reliability(figures: Mapping[str, Any]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.6), dpi=120, layout="constrained")
    for axes, target in zip(figure.subplots(1, 2, sharey=True), TARGETS, strict=True):
        axes.plot([0, 1], [0, 1], color="#999999", linewidth=0.8, linestyle=":")
        for i, (name, found) in enumerate((n, f) for n, f in figures["reliability"].items() if n in _guards(figures)):
            for part, style in (("dev", "--"), ("eval", "-")):
                bins = [b for b in found[f"{part}/{target}"] if b["rows"] >= 20]
                stated, observed = [b["stated"] for b in bins], [b["observed"] for b in bins]
                colour = _COLOURS[i % len(_COLOURS)]
                axes.plot(stated, observed, style, color=colour, marker="o", markersize=3, label=f"{name}, {part}")
        title = f"{target.capitalize()}s"
        axes.set(title=title, xlabel="stated probability of not being safe", xlim=(0, 1), ylim=(0, 1))
        axes.grid(alpha=0.25)
        axes.set_aspect("equal")
    figure.axes[0].set_ylabel("observed share that is not safe")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def _plot_points(figures: Mapping[str, Any]) -> Any:
    """F1 against the false-positive rate at each threshold, and false positives on rows that are all safe."""
    from matplotlib.figure import Figure

    guards = _guards(figures)
    figure = Figure(figsize=(12, 4.6), dpi=120, layout="constrained")
    *panels, bars = figure.subplots(1, 3)
    for axes, target in zip(panels, TARGETS, strict=True):
        for i, (name, guard) in enumerate(guards.items()):
            macro = guard["macro"][target].get("strict", {})
            points = [macro[rule] for rule in RULES if rule in macro]
            places = [(point["false_positive_rate"], point["f1"]) for point in points]
            if places:
                axes.scatter(*zip(*places, strict=True), label=name, **_look(i, name == figures["guard"]))
        axes.set(title=f"{target.capitalize()}s, strict, macro", xlabel="false-positive rate", ylabel="F1")
        axes.set(xlim=(0, 1.02), ylim=(0, 1))
        axes.grid(alpha=0.25)
    width = 0.8 / len(guards)
    for i, guard in enumerate(guards.values()):
        shift = (i - (len(guards) - 1) / 2) * width
        rates = _false_positives(guard)
        bars.bar(np.arange(len(rates)) + shift, list(rates.values()), width, color=_COLOURS[i % len(_COLOURS)])
        bars.set_xticks(range(len(rates)), list(rates), fontsize=8)
    bars.set(title="False positives, best F1 on dev, strict", ylim=(0, 1))
    bars.grid(axis="y", alpha=0.25)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    return figure


def _false_positives(guard: Mapping[str, Any]) -> dict[str, float]:
    found = {
        f"{place.split('/')[1]}\n{place.split('/')[0]}s": cell["strict"]["best_f1"]["false_positive_rate"]
        for place, cell in guard["eval"]["set"].items()
        if cell["safe"] == cell["rows"]
    }
    if "all" in guard["look_alikes"]:
        found["benign\nlook-alikes"] = guard["look_alikes"]["all"]["strict"]["best_f1"]
    return found
