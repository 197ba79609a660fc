"""How fast the edge guard is, beside the classifiers that people use instead, and what its exactness costs.

    python benchmarks/edge.py                          # the shipped guard; baselines trained on synthetic words
    python benchmarks/edge.py --train FOLDER           # texts and baselines from Example files (*.jsonl.gz)
    python benchmarks/edge.py --guard edge:FOLDER --quick

Everything runs in one process on one core, in turns: streaming with 1, 4, 16 and 64 streams side by side (token by
token and in pieces of four words), whole texts, and single checks of 100 tokens. TF-IDF with logistic regression and
alt-profanity-check judge the same texts; on a stream they read the whole prefix again at each token, because they have
nothing else. At last the same weights are run with dynamic int8 activations, to show what computing in fp32 costs in
speed and what it saves: verdicts that do not depend on how a text was cut; and without the table of n-grams, to show
what that costs.

Two clocks: the wall clock, and the processor time of this process: what one core could do on a quiet machine.
Results go to ``benchmarks/results/edge-DATE.json``. Speeds of baselines trained on synthetic words are theirs; their
verdicts mean nothing and are not reported.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import os
import platform
import random
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline, make_union

from tidegate.data.examples import read_examples
from tidegate.guards.edge import EDGE_FILES, SHIPPED, WIDE_FILE, EdgeGuard
from tidegate.types import Conversation, Severity, TokenVerdict

STREAMS = (1, 4, 16, 64)
CHECK_TOKENS = 100
VARIANTS = {"edge_dynamic_int8": "dynamic int8", "edge_without_ngrams": "without n-grams"}
RESULTS = Path(__file__).parent / "results"
SPOKEN = (
    "the of and to in is that for it with as was on be by this are from at or an have not they which you we can has "
    "how do I bake bread when there is no yeast warm water sugar flour salt please tell me about history of science "
    "music travel train station ticket morning evening river mountain city people work school doctor medicine health "
    "ist das ein und der nicht wie kann ich el la los una por para como que est une pour avec dans 今天 天气 很好 我们 "
    "公园 明天 可能 下雨 東京 パン 일본 날씨 хлеб дома без дрожжей مرحبا كيف حالك घर पर रोटी"
)
WORDS = SPOKEN.split()


@dataclass(frozen=True, slots=True)
class Spent:
    """What some work took: seconds on the wall and of the processor."""

    wall: float
    cpu: float

    def rate(self, amount: float) -> dict[str, float]:
        """Amount per second, by both clocks."""
        return {"per_second": round(amount / self.wall, 1), "per_cpu_second": round(amount / self.cpu, 1)}


class Clock:
    """Measures the block that it is around."""

    def __enter__(self) -> Clock:
        self._start = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        wall, cpu = self._start
        self.spent = Spent(time.perf_counter() - wall, max(time.process_time() - cpu, 1e-9))


def written(tokens: int, guard: EdgeGuard, seed: int) -> str:
    """A text of exactly so many tokens of this guard."""
    rng = random.Random(seed)
    text = " ".join(rng.choices(WORDS, k=tokens))
    found = guard.tokenizer.encode(text)
    return text[: found[min(tokens, len(found)) - 1].end]


def pieces(text: str, guard: EdgeGuard, words: int | None) -> list[str]:
    """A text cut at every token (None) or at every so many words."""
    if words is None:
        ends = [0, *(token.end for token in guard.tokenizer.encode(text))]
    else:
        blanks = [place for place, character in enumerate(text) if character == " "]
        ends = [0, *blanks[words - 1 :: words], len(text)]
    return [text[a:b] for a, b in pairwise(ends) if b > a]


async def streamed(guard: EdgeGuard, context: Conversation | None, cuts: Sequence[str]) -> list[TokenVerdict]:
    session = guard.open(context)
    verdicts: list[TokenVerdict] = []
    for cut in cuts:
        verdicts += await session.feed(cut)
    return verdicts + list(await session.finish())


async def streaming(guard: EdgeGuard, tokens: int, rounds: int) -> list[dict[str, Any]]:
    """Tokens per second of streams side by side, each after a prompt of 30 tokens."""
    rows = []
    context = Conversation.of(written(30, guard, 999))
    for words in (None, 4):
        for streams in STREAMS:
            cuts = [pieces(written(tokens, guard, seed), guard, words) for seed in range(streams)]
            await asyncio.gather(*(streamed(guard, context, cut) for cut in cuts))
            judged, spent = 0, []
            for _ in range(rounds):
                with Clock() as clock:
                    found = await asyncio.gather(*(streamed(guard, context, cut) for cut in cuts))
                judged = sum(len(verdicts) for verdicts in found)
                spent.append(clock.spent)
            best = Spent(min(s.wall for s in spent), min(s.cpu for s in spent))
            feeding = "token by token" if words is None else f"pieces of {words} words"
            rows.append({"streams": streams, "feeding": feeding, "tokens": judged, **best.rate(judged)})
            print(f"  {streams:3d} streams, {feeding:16s} {rows[-1]['per_second']:9.0f} tokens/s", flush=True)
    return rows


async def whole_texts(guard: EdgeGuard, texts: Sequence[str]) -> dict[str, float]:
    """Tokens per second when texts are judged whole, 16 at a time."""
    tokens = sum(len(guard.tokenizer.encode(text)) for text in texts)
    with Clock() as clock:
        for start in range(0, len(texts), 16):
            await asyncio.gather(*(guard.judge(Conversation.of(text)) for text in texts[start : start + 16]))
    return {**clock.spent.rate(tokens), "texts": len(texts), "tokens": tokens}


async def latency(check: Callable[[str], Awaitable[object]], texts: Sequence[str]) -> dict[str, float]:
    """Milliseconds of one check after another: median, 99th percentile, and processor time in the mean."""
    for text in texts[:5]:
        await check(text)
    walls, cpu = [], 0.0
    for text in texts:
        with Clock() as clock:
            await check(text)
        walls.append(clock.spent.wall)
        cpu += clock.spent.cpu
    p50, p99 = np.percentile(walls, [50, 99]) * 1000
    return {"p50_ms": round(p50, 3), "p99_ms": round(p99, 3), "cpu_ms": round(1000 * cpu / len(texts), 3)}


# --- baselines


def training_texts(train: Path | None, guard: EdgeGuard, count: int) -> tuple[list[str], list[int]]:
    """Texts and whether they are flagged: of Example files, or synthetic words with a label drawn by lot."""
    if train is None:
        rng = random.Random(5)
        return [written(rng.randint(5, 80), guard, seed) for seed in range(count)], [
            rng.randint(0, 1) for _ in range(count)
        ]
    examples = [
        example
        for path in sorted(train.glob("*.jsonl*"))
        for number, example in enumerate(read_examples(path))
        if number % 10 == 0 and example.severity is not None and example.split == "train"
    ]
    chosen = random.Random(5).sample(examples, min(count, len(examples)))
    return [e.conversation.turns[-1].content for e in chosen], [int(e.severity != Severity.SAFE) for e in chosen]


def trained_regression(texts: Sequence[str], labels: Sequence[int]) -> Pipeline:
    """TF-IDF of words (1-2) and of characters within words (2-5), with logistic regression."""
    features = make_union(
        TfidfVectorizer(ngram_range=(1, 2), max_features=200_000, sublinear_tf=True),
        TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), max_features=400_000, sublinear_tf=True),
    )
    return make_pipeline(features, LogisticRegression(C=4.0, max_iter=200)).fit(texts, labels)


def profanity_check() -> Callable[[Sequence[str]], Any]:
    from profanity_check import predict_prob

    return predict_prob  # type: ignore[no-any-return]


async def of_baseline(score: Callable[[Sequence[str]], Any], texts: Sequence[str], guard: EdgeGuard) -> dict[str, Any]:
    """The same three measurements for a classifier of whole texts."""

    async def check(text: str) -> object:
        return score([text])

    prefixes = [token.end for token in guard.tokenizer.encode(texts[0])]
    with Clock() as stream:
        for end in prefixes:
            score([texts[0][:end]])
    tokens = sum(len(guard.tokenizer.encode(text)) for text in texts)
    with Clock() as whole:
        for start in range(0, len(texts), 16):
            score(texts[start : start + 16])
    return {
        "check_100_tokens": await latency(check, texts),
        "whole_texts": {**whole.spent.rate(tokens), "texts": len(texts), "tokens": tokens},
        "stream_of_100_tokens": stream.spent.rate(len(prefixes)),
    }


# --- what exactness costs


def dynamic_int8(folder: Path, out: Path) -> Path:
    """The same guard with activations quantized at run time: weights unfolded to fp32, then quantize_dynamic."""
    from onnxruntime.quantization import QuantType, quantize_dynamic  # after tidegate, which has it tell nobody

    model = onnx.load(folder / "model.onnx")
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    casts = {n.output[0]: n for n in model.graph.node if n.op_type == "Cast" and n.input[0] in stored}
    scaled = [n for n in model.graph.node if n.op_type == "Mul" and n.input[0] in casts]
    for node in scaled:
        weight = stored[casts[node.input[0]].input[0]].astype(np.float32) * stored[node.input[1]]
        model.graph.initializer.append(numpy_helper.from_array(weight, node.output[0]))
    gone = {casts[n.input[0]].input[0] for n in scaled} | {n.input[1] for n in scaled}
    nodes = [n for n in model.graph.node if n not in scaled and n.output[0] not in {s.input[0] for s in scaled}]
    tensors = [t for t in model.graph.initializer if t.name not in gone]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(tensors)
    out.mkdir()
    onnx.save(model, out / "fp32.onnx")
    quantize_dynamic(
        out / "fp32.onnx",
        out / "model.onnx",
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        weight_type=QuantType.QInt8,
        extra_options={"MatMulConstBOnly": True, "DefaultTensorType": onnx.TensorProto.FLOAT},
    )
    for name in (*EDGE_FILES[1:], WIDE_FILE):
        if (folder / name).exists():
            shutil.copyfile(folder / name, out / name)
    return out


def without_ngrams(folder: Path, out: Path) -> Path:
    """The same guard without its table of n-grams."""
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    config["tidegate"]["wide"] = None
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return out


async def dependence(guard: EdgeGuard, texts: Sequence[str]) -> dict[str, float]:
    """The largest difference of a probability between ways to give the same text, and labels that changed."""
    context = Conversation.of(written(30, guard, 999))
    whole = [await streamed(guard, context, [text]) for text in texts]
    single = [await streamed(guard, context, pieces(text, guard, None)) for text in texts]
    company = await asyncio.gather(*(streamed(guard, context, pieces(text, guard, None)) for text in texts))
    return {
        "cut_into_tokens": largest(whole, single),
        "in_company": largest(single, company),
        "percent_of_token_severities_changed": changed(whole, single),
    }


def largest(some: Sequence[list[TokenVerdict]], others: Sequence[list[TokenVerdict]]) -> float:
    pairs = [(a, b) for x, y in zip(some, others, strict=True) for a, b in zip(x, y, strict=True)]
    unsafe = max(abs(a.probabilities.unsafe - b.probabilities.unsafe) for a, b in pairs)
    return max(unsafe, *(abs(a.probabilities.safe - b.probabilities.safe) for a, b in pairs))


def changed(some: Sequence[list[TokenVerdict]], others: Sequence[list[TokenVerdict]]) -> float:
    pairs = [(a, b) for x, y in zip(some, others, strict=True) for a, b in zip(x, y, strict=True)]
    return round(100 * sum(a.severity is not b.severity for a, b in pairs) / len(pairs), 3)


# --- the run


def machine() -> dict[str, Any]:
    """Hardware and versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    packages = ("tidegate", "onnxruntime", "numpy", "tokenizers", "scikit-learn", "alt-profanity-check")
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "system": platform.platform(),
        "versions": {name: version(name) for name in packages},
    }


def dev_texts(train: Path | None, guard: EdgeGuard, count: int) -> list[str]:
    """Texts of 100 tokens: answers and prompts of the dev split, or synthetic words."""
    if train is None:
        return [written(CHECK_TOKENS, guard, 10_000 + seed) for seed in range(count)]
    texts = []
    for path in sorted(train.glob("*.jsonl*")):
        for example in read_examples(path):
            content = example.conversation.turns[-1].content
            if example.split != "dev" or len(content) < CHECK_TOKENS:
                continue
            tokens = guard.tokenizer.encode(content)
            if len(tokens) >= CHECK_TOKENS:
                texts.append(content[: tokens[CHECK_TOKENS - 1].end])
    return random.Random(6).sample(texts, min(count, len(texts)))


async def of_guard(guard: EdgeGuard, texts: Sequence[str], *, rounds: int) -> dict[str, Any]:
    return {
        "streaming": await streaming(guard, CHECK_TOKENS, rounds),
        "whole_texts": await whole_texts(guard, texts),
        "check_100_tokens": await latency(lambda text: guard.judge(Conversation.of(text)), texts),
        "dependence": await dependence(guard, texts[:12]),
    }


def ratios(results: dict[str, Any]) -> dict[str, float]:
    """How many times as fast as each other thing the edge guard is, by processor time; below 1 it is slower."""
    ours = results["edge"]
    found = {}
    for name in ("tfidf_logistic_regression", "alt_profanity_check"):
        theirs = results[name]
        one = ours["streaming"][0]["per_cpu_second"]
        found[f"{name}: check of 100 tokens"] = (
            theirs["check_100_tokens"]["cpu_ms"] / ours["check_100_tokens"]["cpu_ms"]
        )
        found[f"{name}: whole texts"] = ours["whole_texts"]["per_cpu_second"] / theirs["whole_texts"]["per_cpu_second"]
        found[f"{name}: one stream, a verdict at each token"] = one / theirs["stream_of_100_tokens"]["per_cpu_second"]
    for name, words in VARIANTS.items():
        other = results[name]
        for a, b in zip(ours["streaming"][: len(STREAMS)], other["streaming"], strict=False):
            found[f"{words}: {a['streams']} streams token by token"] = a["per_cpu_second"] / b["per_cpu_second"]
        whole = ours["whole_texts"]["per_cpu_second"] / other["whole_texts"]["per_cpu_second"]
        found[f"{words}: whole texts"] = whole
    return {name: round(value, 3) for name, value in found.items()}


async def run(folder: Path, train: Path | None, *, quick: bool) -> dict[str, Any]:
    rounds, count = (1, 60) if quick else (3, 400)
    results: dict[str, Any] = {}
    async with EdgeGuard(folder) as guard:
        texts = dev_texts(train, guard, count)
        print(f"{guard.name}: weights in int8, computed in fp32", flush=True)
        results["edge"] = await of_guard(guard, texts, rounds=rounds)
        print("baselines", flush=True)
        corpus = training_texts(train, guard, 2_000 if quick else 20_000)
        regression = trained_regression(*corpus)
        results["tfidf_logistic_regression"] = await of_baseline(regression.predict_proba, texts, guard)
        results["alt_profanity_check"] = await of_baseline(profanity_check(), texts, guard)
    with tempfile.TemporaryDirectory() as scratch:
        print("the same weights with dynamic int8 activations", flush=True)
        async with EdgeGuard(dynamic_int8(folder, Path(scratch) / "int8")) as dynamic:
            results["edge_dynamic_int8"] = await of_guard(dynamic, texts, rounds=rounds)
        print("the same guard without its table of n-grams", flush=True)
        async with EdgeGuard(without_ngrams(folder, Path(scratch) / "plain")) as plain:
            results["edge_without_ngrams"] = await of_guard(plain, texts, rounds=rounds)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guard", default="edge", help="edge, or edge:FOLDER")
    parser.add_argument("--train", type=Path, help="folder of Example files for texts and baselines")
    parser.add_argument("--out", type=Path, help="JSON file; default benchmarks/results/edge-DATE.json")
    parser.add_argument("--quick", action="store_true", help="fewer texts and rounds")
    arguments = parser.parse_args()
    _, _, folder = arguments.guard.partition(":")
    results = asyncio.run(run(Path(folder) if folder else SHIPPED, arguments.train, quick=arguments.quick))
    compared = ratios(results)
    now = datetime.datetime.now(datetime.UTC)
    report = {
        "date": now.isoformat(timespec="seconds"),
        "machine": machine(),
        "trained_on": "Example files" if arguments.train else "synthetic words: speed only",
        "results": results,
        "times_as_fast_by_processor_time": compared,
    }
    out = arguments.out or RESULTS / f"edge-{now:%Y-%m-%d}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for name in ("edge", *VARIANTS, "tfidf_logistic_regression", "alt_profanity_check"):
        check, whole = results[name]["check_100_tokens"], results[name]["whole_texts"]
        print(f"{name}: a check of 100 tokens P50 {check['p50_ms']} ms, P99 {check['p99_ms']} ms, "
              f"{check['cpu_ms']} ms of processor; whole texts {whole['per_second']:.0f} tokens/s")  # fmt: skip
        if "dependence" in results[name]:
            print(f"  largest difference by cutting or company: {results[name]['dependence']}")
    for name, value in compared.items():
        print(f"  {value:8.2f} x {name}")
    print(f"written: {out}")


if __name__ == "__main__":
    main()
