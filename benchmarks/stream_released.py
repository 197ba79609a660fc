"""What a token of one stream costs: the released algorithm, which computes the whole text again, against ours.

    python benchmarks/stream_released.py [--model FOLDER | --shape 0.6b] [--dtype bfloat16] [--device cpu]

Both are the same weights and the same streaming call (`tidegate.model.official_api`), measured in turns in one run: the
released algorithm token by token, as it can do no other, and ours with 1, 8 and 16 tokens at a time behind contexts of
several lengths. Times are medians per token. The labels of both are compared at 64 positions behind each context.
Without ``--model`` the weights are random, which changes no time, and large enough that the context counts. Written are
``stream_released.json`` and ``stream_released.md``.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers

from tidegate.model.cached import CachedText
from tidegate.model.loading import load_stream
from tidegate.model.stream import GROUPED_ATTENTION, Qwen3ForGuardModel, StreamLogits, stream_config

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


_COMPARED = 64
"""At so many positions behind a context the labels are compared."""


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement; times are milliseconds per token."""

    context: int
    new: int
    """Tokens of one call of ours; the released algorithm takes one."""
    released_ms: float
    ours_ms: float
    ratio: float
    same_labels: float
    """Share of the labels, of the four heads at the compared positions, that are the same."""
    most_apart: float
    """Largest difference of a probability at these positions."""


def main() -> None:
    """Measure and write."""
    options = _options()
    torch.set_num_threads(options.threads)
    model = _model(options)
    rows = []
    for context in options.contexts:
        rows += _rows(model, context, options)
        for row in rows[-len(options.new) :]:
            print(json.dumps(asdict(row)), file=sys.stderr)
    about = {
        "model": options.model or f"{options.shape}, random weights",
        "dtype": options.dtype,
        "device": options.device,
        "threads": options.threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.processor() or platform.machine(),
        "date": time.strftime("%Y-%m-%d"),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    found = {"about": about, "rows": [asdict(row) for row in rows]}
    (options.out / "stream_released.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (options.out / "stream_released.md").write_text(_table(rows, about), encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=None, help="folder or hub name of a Stream checkpoint")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="0.6b", help="of random weights")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 1024, 4096])
    parser.add_argument("--new", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    return parser.parse_args()


def _model(options: argparse.Namespace) -> Qwen3ForGuardModel:
    if options.model:
        return load_stream(options.model, dtype=options.dtype, device=options.device)
    torch.manual_seed(0)
    config = stream_config(**SHAPES[options.shape])
    config._attn_implementation = GROUPED_ATTENTION
    model = Qwen3ForGuardModel(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.normal_(std=parameter.shape[1] ** -0.5)
    return model.to(dtype=getattr(torch, options.dtype), device=options.device)


def _rows(model: Qwen3ForGuardModel, context: int, options: argparse.Namespace) -> list[Row]:
    """One round of everything first, which is not counted; then rounds in turns, so that both meet the same machine."""
    most = max(_COMPARED, *options.new)
    ids = torch.randint(0, model.config.vocab_size, (context + most,), device=model.device)
    text = CachedText(model, room=context + most)
    text.append(ids[:context])
    released: list[float] = []
    ours: dict[int, list[float]] = {new: [] for new in options.new}
    whole = StreamLogits(*(head[0, context:] for head in _whole(model, ids)))
    agreement = {new: _agreement(whole, _in_pieces(text, ids[context:], new)) for new in options.new}
    for turn in range(options.repeats + 1):
        seconds = _timed(model, lambda: _whole(model, ids[: context + 1]))
        if turn:
            released.append(seconds)
        for new in options.new:
            seconds = _timed(model, lambda new=new: text.append(ids[context : context + new]))
            text.crop(context)
            if turn:
                ours[new].append(seconds / new)
    base = statistics.median(released)
    rows = []
    for new in options.new:
        per_token = statistics.median(ours[new])
        same, apart = agreement[new]
        ratio = round(base / per_token, 1)
        rows.append(Row(context, new, round(base * 1e3, 2), round(per_token * 1e3, 3), ratio, same, apart))
    return rows


def _whole(model: Qwen3ForGuardModel, ids: torch.Tensor) -> StreamLogits:
    """One step of the released algorithm: everything so far, all four heads at every position."""
    with torch.inference_mode():
        return model(ids[None])


def _in_pieces(text: CachedText, ids: torch.Tensor, new: int) -> StreamLogits:
    """What ours says of these ids behind the text, so many at a time; the text is then as before."""
    before = text.length
    parts = [text.append(piece) for piece in ids.split(new)]
    text.crop(before)
    return StreamLogits(*(torch.cat(head) for head in zip(*parts, strict=True)))


def _timed(model: Qwen3ForGuardModel, call: Callable[[], StreamLogits]) -> float:
    start = time.perf_counter()
    call()
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter() - start


def _agreement(one: StreamLogits, other: StreamLogits) -> tuple[float, float]:
    same = torch.stack([a.argmax(-1) == b.argmax(-1) for a, b in zip(one, other, strict=True)])
    apart = max(
        float((a.float().softmax(-1) - b.float().softmax(-1)).abs().max()) for a, b in zip(one, other, strict=True)
    )
    return round(float(same.float().mean()), 4), round(apart, 6)


def _table(rows: list[Row], about: dict[str, object]) -> str:
    lines = [
        "# One stream: the released algorithm against ours",
        "",
        ", ".join(f"{name} {value}" for name, value in about.items()),
        "",
        "| context | tokens a call | released, ms/token | ours, ms/token | ratio | same labels | most apart |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.context} | {row.new} | {row.released_ms} | {row.ours_ms} | {row.ratio} | {row.same_labels:.1%} "
        f"| {row.most_apart} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
