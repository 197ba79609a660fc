"""How many live streams one model carries, and how near that is to what the memory allows.

    python benchmarks/streams_engine.py [--model FOLDER | --shape 0.6b] [--dtype bfloat16] [--device cpu]

Every stream has a context already, of a half to the whole of ``--contexts`` tokens, and then says ``--new`` tokens at a
time, as soon as the last ones are judged. In the same run is measured the released algorithm, which computes the whole
text again for every token. The limit is the time in which the memory could deliver the weights and the caches that a
forward reads, at the rate of a measured read or copy of 512 MB, whichever is the faster. A second, shorter pass says
where the time of a forward goes: linear layers, attention, the rest of the layers, and what happens between forwards.
Without ``--model`` the weights are random, which changes no time.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from stream_setup import arguments, built, keep, median, memory_rates, progress, seconds, settle, table, weight_bytes
from tidegate.engine.engine import Engine, Handle
from tidegate.engine.scheduler import Limits
from tidegate.model.attention import Attention
from tidegate.model.layout import Projection
from tidegate.model.stream import Qwen3ForGuardModel
from tidegate.model.threads import computed_apart


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
    of_released: float
    """The same, over that of the released algorithm behind a context of the mean length."""
    forward_ms: float
    between_ms: float
    """From one forward to the next."""
    streams_per_forward: float
    answer_p50_ms: float
    answer_p99_ms: float
    weights_per_second: float
    """Bytes of weights that a second of forwards reads."""
    of_limit: float
    """The time in which the memory could deliver what a forward reads, over the time that the forward took."""
    linear_ms: float
    """Of a forward, in the second pass."""
    attention_ms: float


@dataclass(frozen=True, slots=True)
class _Case:
    context: int
    streams: int
    new: int
    feeds: int


def main() -> None:
    """Measure and write."""
    options = _options()
    model = computed_apart(lambda: built(options))
    weights, rates = weight_bytes(model), computed_apart(lambda: memory_rates(torch.device(options.device)))
    progress(f"memory: {', '.join(f'{name} {rate / 1e9:.1f} GB/s' for name, rate in rates.items())}")
    released = computed_apart(lambda: {context: _released_seconds(model, context) for context in options.contexts})
    rows: list[Row] = []
    for case in _cases(options):
        one = next((r for r in rows if (r.context, r.new) == (case.context, case.new)), None)
        row = asyncio.run(_measure(model, case, weights, max(rates.values())))
        base = one.tokens_per_second if one else row.tokens_per_second
        of_released = row.tokens_per_second * released[case.context]
        rows.append(replace(row, of_one_stream=row.tokens_per_second / base, of_released=of_released))
        progress(f"{case}: {row.tokens_per_second:.1f} tokens/s, {row.of_limit:.0%} of the limit")
    figures = {
        "memory_bytes_per_second": rates,
        "weight_bytes": weights,
        "released_seconds_per_token": released,
        "rows": [asdict(row) for row in rows],
    }
    keep("streams_engine", options, figures, _text(rows, rates))


def _options() -> argparse.Namespace:
    parser = arguments(__doc__ or "")
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 1024], help="tokens of the longest stream")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16, 64], help="the first is compared with")
    parser.add_argument("--new", type=int, nargs="+", default=[1, 8], help="tokens of one feed")
    parser.add_argument("--feeds", type=int, default=16, help="timed feeds of each stream")
    return parser.parse_args()


def _cases(options: argparse.Namespace) -> list[_Case]:
    return [
        _Case(context, streams, new, options.feeds)
        for context in options.contexts
        for new in options.new
        for streams in options.streams
    ]


def _released_seconds(model: Qwen3ForGuardModel, context: int) -> float:
    """The released algorithm: the seconds of one token, for which a text of three quarters of ``context`` is computed
    again. To be called before the weights are laid out for inference."""
    ids = torch.tensor([_ids(model, context * 3 // 4, 0)], device=model.device)
    with torch.inference_mode():
        return median([seconds(lambda: model(ids), model.device) for _ in range(4)][1:])


async def _measure(model: Qwen3ForGuardModel, case: _Case, weights: int, bandwidth: float) -> Row:
    shares = np.linspace(0.5, 1.0, case.streams) if case.streams > 1 else np.array([0.75])
    lengths = [int(share * case.context) for share in shares]
    positions = sum(lengths) + case.streams * (2 * case.feeds * case.new + case.context // 2)
    limits = Limits(
        tokens=max(512, case.streams * case.new),
        chunk=max(256, case.new),
        short=max(32, case.new),
        waiting=max(65_536, 4 * positions),
    )
    async with Engine(model, positions=positions, limits=limits, most_streams=case.streams) as engine:
        handles = [engine.open() for _ in lengths]
        contexts = [_ids(model, length, seed) for seed, length in enumerate(lengths)]
        await asyncio.gather(*(h.feed(ids, last_only=True) for h, ids in zip(handles, contexts, strict=True)))
        await asyncio.gather(*(_speak(model, handle, case.new, 1) for handle in handles))
        before, began = engine.metrics(), time.perf_counter()
        answers = await asyncio.gather(*(_speak(model, handle, case.new, case.feeds) for handle in handles))
        taken, after = time.perf_counter() - began, engine.metrics()
        shares_of_forward = await _where(model, engine, handles, case)
    forwards = after.forwards - before.forwards
    forward = (after.forward_seconds - before.forward_seconds) / forwards
    batch = (after.streams_computed - before.streams_computed) / forwards
    cached = (before.cache_used + after.cache_used) / 2 / case.streams * batch
    read = weights + cached * after.cache_bytes / after.cache_positions
    times = np.concatenate(answers) * 1e3
    return Row(
        context=case.context,
        streams=case.streams,
        new=case.new,
        tokens_per_second=case.streams * case.new * case.feeds / taken,
        of_one_stream=1.0,
        of_released=0.0,
        forward_ms=forward * 1e3,
        between_ms=(taken / forwards - forward) * 1e3,
        streams_per_forward=batch,
        answer_p50_ms=float(np.percentile(times, 50)),
        answer_p99_ms=float(np.percentile(times, 99)),
        weights_per_second=weights / forward,
        of_limit=read / bandwidth / forward,
        **shares_of_forward,
    )


async def _where(model: Qwen3ForGuardModel, engine: Engine, handles: list[Handle], case: _Case) -> dict[str, float]:
    """Milliseconds of a forward in linear layers and in attention; waiting for the device at each makes it slower."""
    before = engine.metrics().forwards
    with (
        _clocked(Projection, "forward", model.device) as linear,
        _clocked(Attention, "__call__", model.device) as attention,
    ):
        await asyncio.gather(*(_speak(model, handle, case.new, 4) for handle in handles))
    forwards = engine.metrics().forwards - before
    return {"linear_ms": sum(linear) / forwards * 1e3, "attention_ms": sum(attention) / forwards * 1e3}


@contextmanager
def _clocked(owner: type, name: str, device: torch.device) -> Iterator[list[float]]:
    """The seconds of each call of a method while this is open."""
    plain: Callable[..., Any] = getattr(owner, name)
    spent: list[float] = []

    def timed(*args: Any) -> Any:
        settle(device)
        began = time.perf_counter()
        result = plain(*args)
        settle(device)
        spent.append(time.perf_counter() - began)
        return result

    setattr(owner, name, timed)
    try:
        yield spent
    finally:
        setattr(owner, name, plain)


async def _speak(model: Qwen3ForGuardModel, handle: Handle, new: int, feeds: int) -> list[float]:
    """Feed token after token; the seconds of each answer."""
    taken = []
    for feed in range(feeds):
        ids = _ids(model, new, handle.length + feed)
        began = time.perf_counter()
        await handle.feed(ids)
        taken.append(time.perf_counter() - began)
    return taken


def _ids(model: Qwen3ForGuardModel, count: int, seed: int) -> list[int]:
    return [int(n) for n in np.random.default_rng(seed).integers(0, model.config.vocab_size, count)]


def _text(rows: list[Row], rates: dict[str, float]) -> str:
    head = "context|streams|new tokens|tokens/s|of one stream|of released|forward|linear|attention|rest|between"
    head += "|P50|P99|weights/s|of the limit"
    speeds = ", ".join(f"{name} {rate / 1e9:.1f} GB/s" for name, rate in rates.items())
    return f"memory: {speeds}\n\n{table(head, map(_cells, rows))}"


def _cells(row: Row) -> list[object]:
    rest = row.forward_ms - row.linear_ms - row.attention_ms
    times = (
        row.forward_ms,
        row.linear_ms,
        row.attention_ms,
        rest,
        row.between_ms,
        row.answer_p50_ms,
        row.answer_p99_ms,
    )
    return [
        *(row.context, row.streams, row.new, f"{row.tokens_per_second:.1f}"),
        *(f"{row.of_one_stream:.1f} x", f"{row.of_released:.0f} x"),
        *(f"{time:.1f} ms" for time in times),
        *(f"{row.weights_per_second / 1e9:.1f} GB/s", f"{row.of_limit:.0%}"),
    ]


if __name__ == "__main__":
    main()
