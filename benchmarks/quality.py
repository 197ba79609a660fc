"""How good the edge guard is, beside baselines that read the same rows in the same run.

    python benchmarks/quality.py --train FOLDER --eval FOLDER [--guard edge] [--out runs/quality/quality.json]

FOLDER holds ``*.jsonl.gz`` files of examples. The baselines are trained on the split ``train`` of the first; every
threshold of every guard is chosen on its split ``dev`` and on nothing else; the second is only scored. Written are the
figures (JSON), the tables of the model card (Markdown) and plots (PNG) beside it.

What is compared:

- TF-IDF with logistic regression (see tidegate.data.ngrams), trained on the pack, and a second time on the pack and the
  synthetic examples that the edge guard is trained on, so that it lacks nothing that the guard had. For answers it is
  trained with and without the prompt before the answer; the better of the two on dev is taken, the other shown beside;
- alt-profanity-check and better-profanity;
- the guard, by its probabilities and by its own calls.

Each is read in two modes: *strict*, where Controversial counts as unsafe and the score is the probability of not being
safe, and *loose*, where it counts as safe and the score is the probability of being unsafe. Each is held to three
thresholds: its own (what it says without being asked to score: the guard and the filters have one), the one with the
best F1 on dev, and the one that flags 5 % of the Safe rows of dev.

Scores are kept under ``--cache`` by the content of everything that decides them.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import inspect
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import baselines
from quality_report import write_markdown, write_plots
from tidegate.data import ngrams
from tidegate.data.examples import read_examples
from tidegate.data.ngrams import ClassifierSettings, Counts, TfIdfClassifier, count_ngrams, judged_text, stacked
from tidegate.data.synthesize import synthesize
from tidegate.errors import InputError, TidegateError
from tidegate.evals.metrics import auroc, best_threshold, expected_calibration_error, score
from tidegate.evals.run import judge_all, language_group
from tidegate.guards import load_guard
from tidegate.guards.edge import SHIPPED
from tidegate.train.args import load_recipe
from tidegate.types import Example, Severity, Target

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

MODES = {"strict": Severity.CONTROVERSIAL, "loose": Severity.UNSAFE}
"""The least severity that counts as unsafe."""
LOOK_ALIKES = ("coconot", "jailbreakbench_behaviors", "phtest_prompts", "hatecheck_en", "hatecheck_hin")
"""Sets whose Safe rows are written to look harmful; ``multilingual_hatecheck`` is another."""
FEWEST = 20
"""Sets with fewer rows of a class are left out of macro averages: their AUROC is noise."""
DRAWS = 1000
"""Of the bootstrap."""


# --- rows --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """Examples to score, with what they are grouped by as arrays of the same length.

    ``benchmark`` is the name of the file for evaluation rows and ``dev`` for the dev split.
    """

    examples: Sequence[Example]
    benchmark: npt.NDArray[np.str_]
    truth: npt.NDArray[np.int64] = field(init=False)
    target: npt.NDArray[np.str_] = field(init=False)
    language: npt.NDArray[np.str_] = field(init=False)
    source: npt.NDArray[np.str_] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "truth", baselines.severities_of(self.examples))
        object.__setattr__(self, "target", np.asarray([e.target.value for e in self.examples]))
        object.__setattr__(self, "language", np.asarray([language_group(e.language) for e in self.examples]))
        object.__setattr__(self, "source", np.asarray([e.source for e in self.examples]))

    @property
    def dev(self) -> Flags:
        """Which rows are of the dev split."""
        return np.asarray(self.benchmark == "dev")


def read_rows(train: Path, evaluation: Path, limit: int | None) -> tuple[list[Example], Rows]:
    """The training examples, and the rows to score: the dev split and all evaluation files.

    Raises:
        InputError: a folder has no example file, a file cannot be read, or a part is empty.
    """
    pack = [example for path in example_files(train) for example in _labelled(path, limit)]
    learn = [example for example in pack if example.split == "train"]
    examples = [example for example in pack if example.split == "dev"]
    names = ["dev"] * len(examples)
    for path in example_files(evaluation):
        found = list(_labelled(path, limit))
        examples += found
        names += [path.name.split(".")[0]] * len(found)
    if not learn or not names or names[0] != "dev" or names[-1] == "dev":
        raise InputError("expected labelled examples with split train and dev, and evaluation rows", where=str(train))
    return learn, Rows(examples, np.asarray(names))


def example_files(folder: Path) -> list[Path]:
    """The example files of a folder. Raises InputError when there is none."""
    files = sorted([*folder.glob("*.jsonl"), *folder.glob("*.jsonl.gz")])
    if not files:
        raise InputError("expected files *.jsonl or *.jsonl.gz with examples", where=str(folder))
    return files


def _labelled(path: Path, limit: int | None) -> Iterator[Example]:
    given = 0
    for example in read_examples(path):
        if example.severity is not None and (limit is None or given < limit):
            given += 1
            yield example


# --- scores ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scored:
    """What one guard said of every row.

    Attributes:
        name: how it is called in the tables.
        flagged: its score of a row's not being safe, higher is worse.
        unsafe: its score of a row's being unsafe.
        called: its own severity calls; None when it has no threshold of its own.
        about: what else is to be known of it (seconds, dev figures of its variants).
    """

    name: str
    flagged: Floats
    unsafe: Floats
    called: npt.NDArray[np.int64] | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    def scores(self, mode: str) -> Floats:
        """The score of a mode."""
        return self.flagged if mode == "strict" else self.unsafe


class Cache:
    """Arrays on disk by the digest of what decides them; without a folder nothing is kept."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str, key: Sequence[str], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The arrays of a name and key, made when they are not there."""
        if self.folder is None:
            return make()
        path = self.folder / f"{name}-{digest(key)[:16]}.npz"
        if not path.exists():
            made = make()
            part = path.with_suffix(".part.npz")
            np.savez(part, **made)
            part.replace(path)
        with np.load(path) as kept:
            return dict(kept)


def digest(texts: Iterable[str]) -> str:
    """SHA-256 of texts, in hexadecimal."""
    total = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        total.update(len(data).to_bytes(8, "little") + data)
    return total.hexdigest()


def digest_examples(examples: Iterable[Example]) -> str:
    """SHA-256 of the conversations, targets and labels of examples."""
    return digest(f"{e.target} {e.severity} {e.conversation}" for e in examples)


def score_filters(rows: Rows, cache: Cache) -> list[Scored]:
    """The two profanity filters."""
    texts = [judged_text(example) for example in rows.examples]
    versions = baselines.versions()
    found = []
    for name, filter_type in (
        ("alt-profanity-check", baselines.CommentFilter),
        ("better-profanity", baselines.WordListFilter),
    ):

        def make(filter_type: Callable[[], Any] = filter_type, name: str = name) -> dict[str, Any]:
            started, asked, scores = time.monotonic(), filter_type(), []
            for at in range(0, len(texts), 5000):
                scores.append(asked.scores(texts[at : at + 5000]))
                talk(f"{name}: {min(at + 5000, len(texts)):,} of {len(texts):,} texts")
            return {"scores": np.concatenate(scores), "seconds": time.monotonic() - started}

        kept = cache.get(name, (name, versions[name], digest(texts)), make)
        scores = kept["scores"]
        called = np.where(scores >= 0.5, int(Severity.UNSAFE), int(Severity.SAFE))
        found.append(Scored(name, scores, scores, called, {"seconds": round(float(kept["seconds"]), 1)}))
    return found


def score_classifiers(learn: Sequence[Example], extra: Sequence[Example], rows: Rows, cache: Cache) -> list[Scored]:
    """TF-IDF with logistic regression, trained on the pack, and on the pack and the synthetic examples."""
    source = (judged_text, count_ngrams, ngrams._count_chars, ngrams._Weighting, TfIdfClassifier)
    kept: dict[str, Any] = {}
    for target, with_prompt in ((Target.PROMPT, False), (Target.RESPONSE, False), (Target.RESPONSE, True)):
        parts = [[e for e in part if e.target is target] for part in (learn, extra, rows.examples)]
        key = (
            *(inspect.getsource(part) for part in source),
            f"{ClassifierSettings()} {with_prompt} {baselines.versions()['scikit-learn']}",
            *map(digest_examples, parts),
        )
        reads = "prompt+text" if with_prompt else "text"
        made = cache.get(
            f"tfidf-lr-{target.value}-{reads}",
            key,
            lambda parts=parts, with_prompt=with_prompt: _train_classifiers(parts, with_prompt),  # type: ignore[misc]
        )
        for name, probabilities in made.items():
            kept[f"{name}/{target.value}/{reads}"] = probabilities
    return [*_by_variant("plain", "", kept, rows), *_by_variant("synthetic", " + synthetic", kept, rows)]


def _train_classifiers(parts: Sequence[Sequence[Example]], with_prompt: bool) -> dict[str, Any]:
    """Probabilities ``[rows, 3]`` of the last part, trained on the first, and on the first two."""
    started = time.monotonic()
    counts = [count_ngrams([judged_text(e, with_prompt=with_prompt) for e in part]) for part in parts]
    labels = [baselines.severities_of(part) for part in parts[:2]]
    talk(f"n-grams of {sum(map(len, parts)):,} {parts[0][0].target.value}s counted, {time.monotonic() - started:.0f} s")
    return {
        name: _train_one(f"{name}/{parts[0][0].target.value}", counts[:used], labels[:used], counts[2])
        for name, used in (("plain", 1), ("synthetic", 2))
    }


def _train_one(name: str, counts: Sequence[Counts], labels: Sequence[npt.NDArray[np.int64]], judged: Counts) -> Floats:
    started = time.monotonic()
    classifier = TfIdfClassifier(stacked(counts), np.concatenate(labels))
    probabilities = classifier.of_counts(judged)
    talk(f"{name}: {time.monotonic() - started:.0f} s")
    return probabilities


def _by_variant(name: str, label: str, kept: Mapping[str, Any], rows: Rows) -> list[Scored]:
    """One guard of the variants that are best on dev, and one of each other variant for responses."""
    truth = rows.truth >= Severity.CONTROVERSIAL
    dev: dict[str, float] = {}
    for key in kept:
        target = key.split("/")[1]
        if key.startswith(f"{name}/"):
            here = rows.target == target
            dev[key] = auroc(truth[here & rows.dev], 1 - kept[key][rows.dev[here], 0]) or 0.0
    ranked = sorted(dev, key=lambda key: -dev[key])
    prompts, *responses = [*_of(ranked, Target.PROMPT), *_of(ranked, Target.RESPONSE)]
    found = []
    for place, answers in enumerate(responses):
        probabilities = np.zeros((len(rows.truth), 3))
        for key in (prompts, answers):
            probabilities[rows.target == key.split("/")[1]] = kept[key]
        reads = answers.split("/")[2]
        about = {
            "reads": reads,
            "dev_auroc": {key: round(dev[key], 4) for key in ((answers,) if place else (prompts, answers))},
        }
        about |= {"only": Target.RESPONSE.value} if place else {}
        title = f"TF-IDF + LR{label}" + (f" ({reads})" if place else "")
        found.append(Scored(title, 1 - probabilities[:, 0], probabilities[:, 2], None, about))
    return found


def _of(keys: Sequence[str], target: Target) -> list[str]:
    return [key for key in keys if key.split("/")[1] == target.value]


def score_guard(spec: str, rows: Rows, cache: Cache) -> Scored:
    """The guard of a spec, by its probabilities and its own calls; a row that it fails on counts as not flagged."""
    folder = Path(spec.partition(":")[2]) if ":" in spec else SHIPPED
    files = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.*")) if path.is_file()]
    key = (spec.partition(":")[0], *files, digest_examples(rows.examples))
    kept = cache.get("guard", key, lambda: asyncio.run(_judge(spec, rows)))
    about = {"seconds": round(float(kept["seconds"]), 1), "not_judged": int((kept["called"] < 0).sum())}
    called = np.maximum(kept["called"], int(Severity.SAFE))
    return Scored(str(kept["name"]), kept["flagged"], kept["unsafe"], called, about)


async def _judge(spec: str, rows: Rows) -> dict[str, Any]:
    guard = load_guard(spec)
    started = time.monotonic()
    judged = await judge_all(guard, rows.examples, _progress(guard.name), concurrency=64)
    seconds = time.monotonic() - started
    await guard.close()
    verdicts = [row.verdict for row in judged]
    return {
        "name": np.asarray(guard.name),
        "seconds": seconds,
        "flagged": np.asarray([v.probabilities.flagged if v else 0.0 for v in verdicts]),
        "unsafe": np.asarray([v.probabilities.unsafe if v else 0.0 for v in verdicts]),
        "called": np.asarray([int(v.severity) if v else -1 for v in verdicts]),
    }


def _progress(name: str) -> Callable[[int, int], None]:
    def told(done: int, total: int) -> None:
        if done % 2000 == 0 or done == total:
            talk(f"{name}: {done:,} of {total:,} rows")

    return told


# --- thresholds ---------------------------------------------------------------------------------------------------


def dev_thresholds(scored: Scored, rows: Rows) -> dict[str, dict[str, dict[str, float]]]:
    """``[target][mode][rule]``: the threshold of each rule, from dev rows alone; a row is flagged at or above it."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for target in Target:
        on_dev = rows.dev & (rows.target == target.value)
        safe = on_dev & (rows.truth == Severity.SAFE)
        found[target.value] = {
            mode: {
                "best_f1": best_threshold(rows.truth[on_dev] >= bar, scored.scores(mode)[on_dev]),
                "fpr5": threshold_at(scored.scores(mode)[safe], 0.05),
            }
            for mode, bar in MODES.items()
        }
    return found


def threshold_at(safe_scores: Floats, share: float) -> float:
    """The lowest threshold that flags at most this share of the scores."""
    ranked = np.sort(safe_scores)[::-1]
    allowed = math.floor(share * len(ranked))
    return float(np.nextafter(ranked[min(allowed, len(ranked) - 1)], np.inf))


def calls(scored: Scored, rows: Rows, mode: str, rule: str, thresholds: Mapping[str, Any]) -> Flags | None:
    """Which rows are flagged; None when the guard has no call of its own."""
    if rule == "own":
        return None if scored.called is None else np.asarray(scored.called >= MODES[mode])
    by_row = np.where(
        rows.target == Target.PROMPT.value,
        thresholds[Target.PROMPT.value][mode][rule],
        thresholds[Target.RESPONSE.value][mode][rule],
    )
    return np.asarray(scored.scores(mode) >= by_row)


RULES = ("own", "best_f1", "fpr5")


# --- figures ------------------------------------------------------------------------------------------------------


def groupings(rows: Rows) -> dict[str, npt.NDArray[np.str_]]:
    """Name of a grouping -> the group of every row; each is within a target."""

    def joined(*parts: npt.NDArray[np.str_]) -> npt.NDArray[np.str_]:
        return np.asarray(["/".join(names) for names in zip(*parts, strict=True)])

    return {
        "target": rows.target,
        "target_language": joined(rows.target, rows.language),
        "source": joined(rows.target, rows.source),
        "set": joined(rows.target, rows.benchmark),
    }


def guard_figures(scored: Scored, rows: Rows) -> dict[str, Any]:
    """Every figure of one guard: ``{"about", "thresholds", "dev", "eval"}``."""
    thresholds = dev_thresholds(scored, rows)
    called = {(mode, rule): calls(scored, rows, mode, rule, thresholds) for mode in MODES for rule in RULES}
    figures: dict[str, Any] = {"about": dict(scored.about), "thresholds": thresholds}
    for part, inside in (("dev", rows.dev), ("eval", ~rows.dev)):
        figures[part] = {
            name: {
                str(group): _cell(scored, rows, called, inside & (groups == group))
                for group in np.unique(groups[inside])
            }
            for name, groups in groupings(rows).items()
        }
    figures["look_alikes"] = _look_alikes(rows, called)
    figures["macro"] = {target.value: _macro(figures["eval"]["set"], target) for target in Target}
    return figures


def _cell(scored: Scored, rows: Rows, called: Mapping[Any, Flags | None], where: Flags) -> dict[str, Any]:
    """Figures of some rows in both modes."""
    cell: dict[str, Any] = {"rows": int(where.sum()), "safe": int((rows.truth[where] == Severity.SAFE).sum())}
    for mode, bar in MODES.items():
        truth = rows.truth[where] >= bar
        scores = scored.scores(mode)[where]
        points: dict[str, Any] = {}
        for rule in RULES:
            chosen = called[mode, rule]
            if chosen is not None:
                found = score(truth, chosen[where])
                names = ("f1", "precision", "recall", "false_positive_rate")
                points[rule] = {name: getattr(found, name) for name in names}
        cell[mode] = {
            "positives": int(truth.sum()),
            "auroc": auroc(truth, scores),
            "calibration_error": expected_calibration_error(truth, np.clip(scores, 0, 1)),
            **points,
        }
    return cell


def _look_alikes(rows: Rows, called: Mapping[Any, Flags | None]) -> dict[str, Any]:
    """The share of Safe look-alikes that is flagged, together and by set, by rule; strict and loose."""
    sets = (*LOOK_ALIKES, "multilingual_hatecheck")
    safe = (rows.truth == Severity.SAFE) & ~rows.dev & (rows.target == Target.PROMPT.value)
    chosen = {name: safe & (rows.benchmark == name) for name in sets}
    chosen = {name: where for name, where in chosen.items() if where.any()}
    if chosen:
        chosen["all"] = np.logical_or.reduce(list(chosen.values()))
    return {
        name: {
            "rows": int(where.sum()),
            **{
                mode: {rule: float(c[where].mean()) for rule in RULES if (c := called[mode, rule]) is not None}
                for mode in MODES
            },
        }
        for name, where in chosen.items()
    }


def _macro(sets: Mapping[str, Any], target: Target) -> dict[str, Any]:
    """Plain means over the sets of a target that have both classes."""
    found: dict[str, Any] = {}
    for mode in MODES:
        cells = [sets[name][mode] for name in both_classes(sets, target, mode)]
        if not cells:
            continue
        rows = [sets[name]["rows"] for name in both_classes(sets, target, mode)]
        found[mode] = {
            "sets": len(cells),
            "auroc": float(np.mean([cell["auroc"] for cell in cells])),
            "f1_of_flagging_all": float(
                np.mean([2 * cell["positives"] / (n + cell["positives"]) for n, cell in zip(rows, cells, strict=True)])
            ),
        }
        for rule in RULES:
            if rule in cells[0]:
                found[mode][rule] = {
                    name: float(np.mean([cell[rule][name] or 0.0 for cell in cells]))
                    for name in ("f1", "precision", "recall", "false_positive_rate")
                }
    return found


def both_classes(sets: Mapping[str, Any], target: Target, mode: str) -> list[str]:
    """The sets of a target with at least `FEWEST` positive and negative rows in a mode."""
    return [
        name
        for name, cell in sets.items()
        if name.startswith(target.value)
        and min(cell[mode]["positives"], cell["rows"] - cell[mode]["positives"]) >= FEWEST
    ]


# --- intervals ----------------------------------------------------------------------------------------------------


def intervals(scored: Sequence[Scored], rows: Rows, sets: Mapping[str, Any], draws: int) -> dict[str, Any]:
    """Bootstrap intervals (95 %) of the macro AUROC of each guard, and of the differences between every two.

    Rows are drawn anew within each set, the same rows for all guards.
    """
    found: dict[str, Any] = {}
    groups = groupings(rows)["set"]
    for target in Target:
        for mode in MODES:
            names = both_classes(sets, target, mode)
            if names:
                talk(f"bootstrap of {target.value}s, {mode}")
                macro = np.mean([_drawn_auroc(scored, rows, groups == name, mode, draws) for name in names], axis=0)
                found[f"{target.value}/{mode}"] = _intervals_of(scored, macro)
    return found


def _intervals_of(scored: Sequence[Scored], macro: Floats) -> dict[str, Any]:
    def between(values: Floats) -> dict[str, float]:
        low, high = np.percentile(values, (2.5, 97.5))
        return {"low": float(low), "high": float(high), "mean": float(values.mean())}

    return {
        "auroc": {one.name: between(macro[i]) for i, one in enumerate(scored)},
        "difference": {
            f"{one.name} - {other.name}": between(macro[i] - macro[j])
            for i, one in enumerate(scored)
            for j, other in enumerate(scored)
            if i != j
        },
    }


def _drawn_auroc(scored: Sequence[Scored], rows: Rows, where: Flags, mode: str, draws: int) -> Floats:
    """AUROC ``[guards, draws]`` of rows drawn with replacement, each class apart."""
    truth = rows.truth[where] >= MODES[mode]
    rng = np.random.default_rng(0)
    found = np.zeros((len(scored), draws))
    step = max(1, 2_000_000 // len(truth))
    for at in range(0, draws, step):
        size = min(step, draws - at)
        weights = np.zeros((size, len(truth)), np.float32)
        for rows_of_class in (np.flatnonzero(truth), np.flatnonzero(~truth)):
            weights[:, rows_of_class] = _times_drawn(len(rows_of_class), size, rng)
        for i, one in enumerate(scored):
            found[i, at : at + size] = weighted_auroc(truth, one.scores(mode)[where], weights)
    return found


def _times_drawn(count: int, draws: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """How often each of ``count`` rows is among ``count`` drawn ones, ``[draws, count]``."""
    places = rng.integers(count, size=(draws, count)) + np.arange(draws)[:, None] * count
    return np.bincount(places.ravel(), minlength=draws * count).reshape(draws, count)


def weighted_auroc(positive: Flags, scores: Floats, weights: npt.NDArray[np.float32]) -> Floats:
    """AUROC for each row of weights ``[draws, rows]``, ties counted half."""
    order = np.argsort(scores, kind="stable")
    ranked = scores[order]
    starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])
    weighted = weights[:, order].astype(np.float64)
    up = np.add.reduceat(weighted * positive[order], starts, axis=1)
    down = np.add.reduceat(weighted * ~positive[order], starts, axis=1)
    below = np.cumsum(down, axis=1) - down / 2
    return np.asarray((up * below).sum(axis=1) / (up.sum(axis=1) * down.sum(axis=1)))


def reliability(scored: Scored, rows: Rows, bins: int = 12) -> dict[str, Any]:
    """By part and target: stated probability of not being safe against the observed share, in bins of equal width."""
    found: dict[str, Any] = {}
    for part, inside in (("dev", rows.dev), ("eval", ~rows.dev)):
        for target in Target:
            where = inside & (rows.target == target.value)
            stated = np.clip(scored.flagged[where], 0, 1)
            positive = rows.truth[where] >= Severity.CONTROVERSIAL
            place = np.minimum((stated * bins).astype(int), bins - 1)
            found[f"{part}/{target.value}"] = [
                {
                    "stated": float(stated[place == b].mean()),
                    "observed": float(positive[place == b].mean()),
                    "rows": int((place == b).sum()),
                }
                for b in np.unique(place)
            ]
    return found


# --- the run ------------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Score everything and return all figures."""
    learn, rows = read_rows(args.train, args.eval, args.limit)
    talk(f"{len(learn):,} training rows, {int(rows.dev.sum()):,} dev rows, {int((~rows.dev).sum()):,} evaluation rows")
    recipe = load_recipe(args.recipe)
    extra = [e for e in synthesize(recipe.seed, recipe.data.synthetic_per_family) if e.split == "train"]
    extra = extra[:: max(1, len(extra) // args.limit)] if args.limit else extra
    talk(f"{len(extra):,} synthetic rows")
    cache = Cache(args.cache)
    filters = score_filters(rows, cache)
    scored = [*score_classifiers(learn, extra, rows, cache), *filters]
    if args.guard != "none":
        scored.insert(0, score_guard(args.guard, rows, cache))
    guards = {one.name: guard_figures(one, rows) for one in scored}
    sets = guards[scored[0].name]["eval"]["set"]
    return {
        "format": 1,
        "guard": scored[0].name if args.guard != "none" else None,
        "rows": {
            "train": len(learn),
            "synthetic": len(extra),
            "dev": int(rows.dev.sum()),
            "eval": int((~rows.dev).sum()),
        },
        "versions": dict(baselines.versions()),
        "fewest": FEWEST,
        "guards": guards,
        "intervals": intervals(scored, rows, sets, args.draws),
        "reliability": {one.name: reliability(one, rows) for one in scored if one.name != "better-profanity"},
    }


def talk(line: str) -> None:
    """Progress, on stderr."""
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    root = Path(__file__).resolve().parents[1]
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--train", type=Path, required=True, help="folder of examples with split train and dev")
    parser.add_argument("--eval", type=Path, required=True, help="folder of examples that are only scored")
    parser.add_argument("--guard", default="edge", help="edge, edge:FOLDER, or none for the baselines alone")
    parser.add_argument("--recipe", type=Path, default=root / "recipes" / "edge.yaml", help="names the synthetic rows")
    parser.add_argument("--out", type=Path, default=Path("runs/quality/quality.json"), help="JSON; .md and .png beside")
    parser.add_argument("--cache", type=Path, help="folder where scores are kept")
    parser.add_argument("--draws", type=int, default=DRAWS, help="of the bootstrap")
    parser.add_argument("--limit", type=int, help="read so many rows of each file at most, for a trial")
    return parser.parse_args(argv)


def main() -> int:
    """Run it; 2 for bad input."""
    args = arguments()
    try:
        figures = measure(args)
    except TidegateError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    written = [args.out, write_markdown(figures, args.out.with_suffix(".md")), *write_plots(figures, args.out)]
    talk("wrote " + ", ".join(str(path) for path in written))
    return 0


if __name__ == "__main__":
    sys.exit(main())
