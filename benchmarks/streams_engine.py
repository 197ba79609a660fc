"""How many live streams one model carries: tokens a second and the time of an answer, with 1 to many streams at once.

    python benchmarks/streams_engine.py [--model FOLDER | --shape 0.6b] [--dtype bfloat16] [--device cpu]

Every stream has a context already, of a half to the whole of ``--contexts`` tokens, and then says ``--new`` tokens at a
time, as soon as the last ones are judged. In the same run are measured: one stream alone, and the released algorithm,
which computes the whole text again for every token. The limit is the time in which the memory could deliver the weights
and the caches that a forward reads, at the rate of a measured sum over a large tensor. Without ``--model`` the weights
are random, which changes no time. Written are ``streams_engine.json`` and ``streams_engine.md``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import transformers

from tidegate.engine.engine import Engine, Handle
from tidegate.engine.scheduler import Limits
from tidegate.model.loading import load_stream
from tidegate.model.stream import Qwen3ForGuardModel, stream_config

SHAPES: dict[str, dict[str, int]] = {
    "0.6b": {
        "vocab_size": 151936,
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "intermediate_size": 3072,
        "guard_inner_size": 512,
        "head_dim": 128,
    },
    "tiny": {
        "vocab_size": 4096,
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "intermediate_size": 768,
        "guard_inner_size": 128,
        "head_dim": 32,
    },
}


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement. ``context`` is the longest of the streams; their mean is three quarters of it."""

    context: int
    streams: int
    new: int
    """Tokens of one feed."""
    tokens_per_second: float
    of_one_stream: float
    """The same, over that of one stream with as many new tokens."""
    forward_ms: float
    streams_per_forward: float
    answer_p50_ms: float
    answer_p99_ms: float
    of_limit: float
    """The time in which the memory could deliver what a forward reads, over the time that the forward took."""


def main() -> None:
    """Measure and write."""
    options = _options()
    torch.set_num_threads(options.threads)
    model = _model(options)
    bandwidth = _bytes_per_second(model.device)
    again = {context: _again_seconds(model, context) for context in options.contexts}
    rows: list[Row] = []
    for context in options.contexts:
        for new in options.new:
            one: float | None = None
            for streams in options.streams:
                row = asyncio.run(_measure(model, context, streams, new, options.feeds, bandwidth, one))
                one = one or row.tokens_per_second
                rows.append(row)
    figures = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "device": str(model.device),
            "dtype": str(model.dtype),
            "threads": options.threads,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "bytes_per_second": bandwidth,
        },
        "computed_again_seconds": again,
        "rows": [asdict(row) for row in rows],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "streams_engine.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    (options.out / "streams_engine.md").write_text(_markdown(rows, again), encoding="utf-8")
    sys.stdout.write(_markdown(rows, again))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub name of a Stream checkpoint; else random weights")
    parser.add_argument("--shape", choices=SHAPES, default="0.6b", help="of the random weights")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 1024], help="tokens of the longest stream")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16, 64], help="the first is compared with")
    parser.add_argument("--new", type=int, nargs="+", default=[1, 8], help="tokens of one feed")
    parser.add_argument("--feeds", type=int, default=16, help="timed feeds of each stream")
    parser.add_argument("--out", type=Path, default=Path("runs/streams_engine"))
    return parser.parse_args()


def _model(options: argparse.Namespace) -> Qwen3ForGuardModel:
    if options.model:
        return load_stream(options.model, dtype=options.dtype, device=options.device)
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, options.dtype))
    try:
        return Qwen3ForGuardModel(stream_config(**SHAPES[options.shape])).to(options.device).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def _bytes_per_second(device: torch.device) -> float:
    """How fast memory is read: the best of ten sums over 512 MB."""
    numbers = torch.ones(128 * 2**20, dtype=torch.float32, device=device)
    seconds = []
    for _ in range(10):
        began = time.perf_counter()
        float(numbers.sum())
        seconds.append(time.perf_counter() - began)
    return numbers.nbytes / min(seconds)


def _again_seconds(model: Qwen3ForGuardModel, context: int) -> float:
    """The released algorithm: the seconds of one token, for which a text of three quarters of ``context`` is computed
    again."""
    ids = _ids(model, context * 3 // 4, 0)
    seconds = []
    with torch.inference_mode():
        for _ in range(4):
            began = time.perf_counter()
            float(model(torch.tensor([ids], device=model.device)).risk[0, -1, 0])
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


async def _measure(
    model: Qwen3ForGuardModel, context: int, streams: int, new: int, feeds: int, bandwidth: float, one: float | None
) -> Row:
    shares = np.linspace(0.5, 1.0, streams) if streams > 1 else np.array([0.75])
    lengths = [int(share * context) for share in shares]
    positions = sum(lengths) + streams * (feeds + 1) * new + streams * context
    limits = Limits(tokens=max(512, streams * new), short=max(32, new), waiting=max(65_536, 2 * positions))
    async with Engine(model, positions=positions, limits=limits, most_streams=streams) as engine:
        handles = [engine.open() for _ in lengths]
        await asyncio.gather(
            *(h.feed(_ids(model, n, i), last_only=True) for i, (h, n) in enumerate(zip(handles, lengths, strict=True)))
        )
        await asyncio.gather(*(_speak(model, handle, new, 1) for handle in handles))
        before, began = engine.metrics(), time.perf_counter()
        answers = await asyncio.gather(*(_speak(model, handle, new, feeds) for handle in handles))
        seconds = time.perf_counter() - began
        after = engine.metrics()
    forwards = after.forwards - before.forwards
    batch = (after.streams_computed - before.streams_computed) / forwards
    forward_seconds = (after.forward_seconds - before.forward_seconds) / forwards
    cached = (before.cache_used + after.cache_used) / 2 / streams * batch
    read = _weight_bytes(model) + cached * after.cache_bytes / after.cache_positions
    rate = streams * new * feeds / seconds
    times = np.concatenate(answers) * 1e3
    return Row(
        context=context,
        streams=streams,
        new=new,
        tokens_per_second=rate,
        of_one_stream=rate / (one or rate),
        forward_ms=forward_seconds * 1e3,
        streams_per_forward=batch,
        answer_p50_ms=float(np.percentile(times, 50)),
        answer_p99_ms=float(np.percentile(times, 99)),
        of_limit=read / bandwidth / forward_seconds,
    )


async def _speak(model: Qwen3ForGuardModel, handle: Handle, new: int, feeds: int) -> list[float]:
    """Feed token after token; the seconds of each answer."""
    seconds = []
    for feed in range(feeds):
        ids = _ids(model, new, handle.length + feed)
        began = time.perf_counter()
        await handle.feed(ids)
        seconds.append(time.perf_counter() - began)
    return seconds


def _ids(model: Qwen3ForGuardModel, count: int, seed: int) -> list[int]:
    return [int(n) for n in np.random.default_rng(seed).integers(0, model.config.vocab_size, count)]


def _weight_bytes(model: Qwen3ForGuardModel) -> int:
    """What one forward reads of the weights: all but the embedding table, of which it reads a few rows."""
    return sum(p.nbytes for name, p in model.named_parameters() if "embed_tokens" not in name)


def _markdown(rows: list[Row], again: dict[int, float]) -> str:
    head = "context|streams|new tokens|tokens/s|of one stream|computed again|forward|streams in it|P50|P99|of the limit"
    names = head.split("|")
    lines = [f"| {' | '.join(names)} |", "|--:" * len(names) + "|"]
    lines += [
        f"| {row.context} | {row.streams} | {row.new} | {row.tokens_per_second:.1f} | {row.of_one_stream:.1f} x "
        f"| {row.tokens_per_second * again[row.context]:.1f} x | {row.forward_ms:.1f} ms "
        f"| {row.streams_per_forward:.1f} | {row.answer_p50_ms:.1f} ms | {row.answer_p99_ms:.1f} ms "
        f"| {row.of_limit:.0%} |"
        for row in rows
    ]
    lines += ["", "*computed again*: how many times the tokens/s of the released algorithm. P50 and P99: of an answer."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
