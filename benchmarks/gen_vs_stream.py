"""An answer of 2,048 tokens, watched while it is written: Gen run again every 32 tokens, against Stream.

    python benchmarks/gen_vs_stream.py --files FOLDER [--shape 0.6b] [--dtype bfloat16] [--device cpu]
    python benchmarks/gen_vs_stream.py --gen FOLDER --stream FOLDER --device cuda

The comparison of Figure 9 of the Qwen3Guard Technical Report (2025): the time that each guard has taken in all when so
many tokens of the answer are judged. Everything is measured in one run, on one shape:

* Stream, ours, with 32 tokens a call: every call is timed.
* Stream, ours, token by token; and as released, which computes everything again for each token: timed at several
  lengths of the answer, the cost between them interpolated.
* Gen, ours (``gen:FOLDER``), and ``generate()`` as the model card has it (``gen_released.py``): one judgement timed at
  the same lengths, the cost of the others interpolated.

What is interpolated is drawn with the points that were timed, and named so in the JSON. Weights are random without
``--gen`` and ``--stream``; those of Gen then answer in the official form. Written are
``benchmarks/results/gen-vs-stream-DATE.json`` and a plot beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gen import machine
from gen_released import FILES, SHAPES, ModelCard, write_checkpoint
from tidegate.guards.gen import GenGuard
from tidegate.model.cached import CachedText
from tidegate.model.loading import load_stream
from tidegate.model.prompt_tokens import PromptTokenizer
from tidegate.model.stream import GROUPED_ATTENTION, Qwen3ForGuardModel, stream_config
from tidegate.types import Conversation

RESULTS = Path(__file__).parent / "results"
EVERY = 32
ANSWER = "Safety: Safe\nCategories: None\nRefusal: No"
PROMPT = "Please tell me at length how people baked bread in the old days."
WORDS = (
    "the water flour bread oven morning village stone fire hand salt grain mill river people work day night time way "
    "and of with from about under before after when because could would make take find give keep carry open close "
    "small large early quiet round simple common local good long warm"
)
INNER = 512
"""The width of Stream's heads."""
TOKENS_A_SECOND = 20
"""For the plot: how fast a person reads, or more."""


@dataclass(slots=True)
class Curve:
    """Seconds in all after each 32 tokens.

    Attributes:
        name: what it is.
        seconds: one for each 32 tokens of the answer.
        timed: at which lengths it was timed; () where every call was.
    """

    name: str
    seconds: np.ndarray
    timed: tuple[int, ...] = ()


def cumulative(name: str, length: int, each: Sequence[tuple[int, float]], *, calls: int) -> Curve:
    """The curve of a cost that is known at some lengths.

    Args:
        each: lengths of the answer, and the seconds of one call there.
        calls: how many calls there are for every 32 tokens.
    """
    ends = np.arange(EVERY, length + 1, EVERY)
    at, cost = zip(*sorted(each), strict=True)
    return Curve(name, np.cumsum(np.interp(ends, at, cost)) * calls, tuple(at))


# --- the guards ---------------------------------------------------------------------------------------------------


def stream_model(options: argparse.Namespace) -> Qwen3ForGuardModel:
    if options.stream:
        return load_stream(options.stream, dtype=options.dtype, device=options.device)
    torch.manual_seed(0)
    config = stream_config(**SHAPES[options.shape], guard_inner_size=INNER)
    config._attn_implementation = GROUPED_ATTENTION
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, options.dtype))
    try:
        return Qwen3ForGuardModel(config).eval().requires_grad_(False).to(options.device)
    finally:
        torch.set_default_dtype(before)


def stream_curves(options: argparse.Namespace, points: Sequence[int]) -> list[Curve]:
    """The three ways to run Stream."""
    model = stream_model(options)
    before, length = 20, options.tokens
    ids = torch.randint(0, model.config.vocab_size, (before + length + EVERY,), device=model.device)
    text = CachedText(model, room=len(ids))
    in_pieces = []
    for timed in (False, True):
        text.crop(0)
        text.append(ids[:before])
        for start in range(before, before + (length if timed else EVERY), EVERY):
            seconds = clocked(model.device, lambda start=start: text.append(ids[start : start + EVERY]))
            if timed:
                in_pieces.append(seconds)
    tell("Stream, ours, 32 tokens a call", sum(in_pieces))
    single, whole = [], []
    for point in reversed(points):
        text.crop(before + point - EVERY)
        tokens = ids[text.length : text.length + 12]
        each = [clocked(model.device, lambda token=token: text.append(token)) for token in tokens.split(1)]
        single.append((point, statistics.median(each)))
        with torch.inference_mode():
            whole.append((point, clocked(model.device, lambda point=point: model(ids[None, : before + point]))))
    return [
        Curve("Stream, ours, 32 tokens a call", np.cumsum(in_pieces)),
        cumulative("Stream, ours, token by token", length, single, calls=EVERY),
        cumulative("Stream as released", length, whole, calls=EVERY),
    ]


async def gen_curves(options: argparse.Namespace, points: Sequence[int]) -> list[Curve]:
    """Gen, ours and the model card's, once at each point."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.gen or Path(scratch)
        tokenizer = PromptTokenizer.load((options.gen or options.files) / "tokenizer.json")
        asked = [Conversation.of(PROMPT, text) for text in beginnings(tokenizer, points)]
        if not options.gen:
            write_checkpoint(folder, [(each, ANSWER) for each in asked], files=options.files, shape=options.shape)
        card = ModelCard(folder, dtype=getattr(torch, options.dtype), device=options.device)
        ours, theirs = [], []
        async with GenGuard(str(folder), dtype=options.dtype, device=options.device) as guard:
            await guard.judge(asked[0])
            card.judge(asked[:1])
            for point, conversation in zip(points, asked, strict=True):
                start = time.perf_counter()
                verdict = await guard.judge(conversation)
                ours.append((point, time.perf_counter() - start))
                start = time.perf_counter()
                (said,) = card.judge([conversation])
                theirs.append((point, time.perf_counter() - start))
                assert said.severity == verdict.severity.label
                tell(f"Gen at {point} tokens: ours, generate", ours[-1][1], theirs[-1][1])
    return [
        cumulative(f"Gen, ours, every {EVERY} tokens", options.tokens, ours, calls=1),
        cumulative(f"Gen, generate(), every {EVERY} tokens", options.tokens, theirs, calls=1),
    ]


def beginnings(tokenizer: PromptTokenizer, points: Sequence[int]) -> list[str]:
    """Beginnings of one text with so many tokens."""
    rng = np.random.default_rng(3)
    known = WORDS.split()
    words = [known[place] for place in rng.integers(0, len(known), max(points))]
    ids = tokenizer.part(" ".join(words))
    return [tokenizer.text(ids[:point]) for point in points]


def clocked(device: torch.device, call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


# --- telling ------------------------------------------------------------------------------------------------------


def tell(what: str, *seconds: float) -> None:
    print(f"{what}: {', '.join(f'{each:.2f} s' for each in seconds)}", file=sys.stderr, flush=True)


def span(seconds: float) -> str:
    """A time as a person says it."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def plot(curves: Sequence[Curve], title: str, path: Path) -> None:
    """Seconds in all against tokens, on a logarithmic scale, each line named at its end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), dpi=130, layout="constrained")
    axes = figure.subplots()
    length = EVERY * len(curves[0].seconds)
    ends = np.arange(EVERY, length + 1, EVERY)
    axes.plot(ends, ends / TOKENS_A_SECOND, ":", color="0.55", linewidth=1.2)
    named = [(ends[-1] / TOKENS_A_SECOND, f"the answer itself, {TOKENS_A_SECOND} tokens/s", "0.45")]
    colors = {"Gen": ("#c2410c", "#f59e0b"), "Stream": ("#1d4ed8", "#0d9488", "#7c3aed")}
    used = {"Gen": 0, "Stream": 0}
    for curve in curves:
        kind = "Gen" if curve.name.startswith("Gen") else "Stream"
        color = colors[kind][used[kind]]
        used[kind] += 1
        axes.plot(ends, curve.seconds, color=color, linewidth=2)
        marks = [EVERY * round(at / EVERY) for at in curve.timed]
        axes.plot(marks, [curve.seconds[at // EVERY - 1] for at in marks], "o", color=color, markersize=4)
        named.append((float(curve.seconds[-1]), f"{curve.name}: {span(curve.seconds[-1])}", color))
    axes.set(yscale="log", xlim=(0, length), xlabel="tokens of the answer", ylabel="seconds of the guard in all")
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xticks(range(0, length + 1, length // 8))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    low, high = (np.log10(limit) for limit in axes.get_ylim())
    for height, text, color in spread(named, low, high):
        axes.annotate(
            text, (1.01, height), xycoords="axes fraction", color=color, fontsize=9, va="center", annotation_clip=False
        )
    figure.savefig(path)


def spread(named: Sequence[tuple[float, str, str]], low: float, high: float) -> list[tuple[float, str, str]]:
    """Names at the height of their line's end, in shares of the axis, and apart enough to be read."""
    placed: list[tuple[float, str, str]] = []
    for value, text, color in sorted(named):
        height = float((np.log10(value) - low) / (high - low))
        placed.append((max(height, placed[-1][0] + 0.055 if placed else 0.0), text, color))
    return placed


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gen", type=Path, help="folder of a Gen checkpoint; else random weights")
    parser.add_argument("--stream", help="folder or hub name of a Stream checkpoint; else random weights")
    parser.add_argument("--files", type=Path, default=Path(FILES), help="the released tokenizer and chat template")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="0.6b", help="of random weights")
    parser.add_argument("--dtype", choices=("bfloat16", "float32", "float16"), default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=2048, help="of the answer, a multiple of 256")
    parser.add_argument("--points", type=int, default=5, help="how many lengths are timed")
    parser.add_argument("--out", type=Path, help="JSON file; default benchmarks/results/gen-vs-stream-DATE.json")
    return parser.parse_args()


def main() -> None:
    chosen = options()
    before = machine(chosen.device)
    points = [EVERY * round(at / EVERY) for at in np.linspace(EVERY, chosen.tokens, chosen.points)]
    curves = [*stream_curves(chosen, points), *asyncio.run(gen_curves(chosen, points))]
    curves.sort(key=lambda curve: float(curve.seconds[-1]))
    now = datetime.datetime.now(datetime.UTC)
    report = {
        "date": now.isoformat(timespec="seconds"),
        "machine": before,
        "weights": f"{chosen.gen or 'random'} and {chosen.stream or 'random'}, shape {chosen.shape}",
        "dtype": chosen.dtype,
        "tokens": chosen.tokens,
        "every": EVERY,
        "curves": [
            {
                "name": curve.name,
                "timed_at": list(curve.timed) or "every call",
                "seconds_in_all": [round(float(seconds), 3) for seconds in curve.seconds],
            }
            for curve in curves
        ],
    }
    out = chosen.out or RESULTS / f"gen-vs-stream-{now:%Y-%m-%d}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    title = (
        f"Watching an answer of {chosen.tokens:,} tokens: {chosen.shape.upper()} shape, {chosen.dtype}, "
        f"{before['cores']} cores ({before['processor']})\nDots: timed; the cost of calls between them is interpolated"
    )
    plot(curves, title, out.with_suffix(".png"))
    for curve in curves:
        print(f"{curve.name:40s} {span(float(curve.seconds[-1])):>8s}")
    print(f"written: {out}")


if __name__ == "__main__":
    main()
