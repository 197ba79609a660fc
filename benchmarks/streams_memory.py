"""What live streams take of the memory, and whether they give it back.

    python benchmarks/streams_memory.py [--model FOLDER | --shape 0.6b] [--dtype bfloat16] [--device cpu]

Streams of ``--tokens`` tokens are opened until there are as many as ``--streams`` says, each time with the memory of
the process (on a GPU: of its tensors), and the engine's own account. The cache is bounded by ``--positions``: streams
beyond it are dropped to their token ids, and computed again when they go on. Then all streams are closed, memory is
read again when the engine has had time to give the cache's back, and at last the engine is closed.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
from dataclasses import asdict, dataclass

import numpy as np
import psutil
import torch

from stream_setup import arguments, built, keep, progress, table
from tidegate.engine.engine import Engine

GIVEN_BACK_S = 10.0


@dataclass(frozen=True, slots=True)
class Row:
    """The memory at one moment."""

    moment: str
    streams: int
    gigabytes: float
    more_than_before_gigabytes: float
    """Than with the model alone."""
    cache_used_gigabytes: float
    """What the cache holds, by the engine's account."""
    evictions: int


def main() -> None:
    """Measure and write."""
    options = _options()
    model = built(options)
    device = torch.device(options.device)
    with torch.inference_mode():
        model(torch.tensor([[1, 2, 3]], device=device))
    rows = asyncio.run(_measure(model, device, options))
    head = "moment|streams|memory|more than the model|the cache holds|evictions"
    keep("streams_memory", options, {"rows": [asdict(row) for row in rows]}, table(head, map(_cells, rows)))


def _cells(row: Row) -> list[object]:
    sizes = (row.gigabytes, row.more_than_before_gigabytes, row.cache_used_gigabytes)
    return [row.moment, row.streams, *(f"{size:.2f} GB" for size in sizes), row.evictions]


def _options() -> argparse.Namespace:
    parser = arguments(__doc__ or "")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--tokens", type=int, default=2048, help="of each stream")
    parser.add_argument("--positions", type=int, default=32_768, help="of the cache")
    return parser.parse_args()


async def _measure(model: torch.nn.Module, device: torch.device, options: argparse.Namespace) -> list[Row]:
    start = _bytes(device)
    rows = [_row("the model alone", device, start, None)]
    window = min(options.positions, int(model.config.max_position_embeddings))
    async with Engine(model, positions=options.positions, window=window, most_streams=max(options.streams)) as engine:
        rows.append(_row("the engine", device, start, engine))
        handles = []
        for count in sorted(options.streams):
            while len(handles) < count:
                handles.append(engine.open())
                await handles[-1].feed(_ids(model, options.tokens, len(handles)), last_only=True)
                progress(f"stream {len(handles)}")
            rows.append(_row("streams open", device, start, engine))
        for handle in handles:
            handle.close()
        rows.append(_row("streams closed", device, start, engine))
        await asyncio.sleep(GIVEN_BACK_S)
        rows.append(_row("a while after", device, start, engine))
    rows.append(_row("engine closed", device, start, None))
    return rows


def _row(moment: str, device: torch.device, start: int, engine: Engine | None) -> Row:
    gc.collect()
    now, metrics = _bytes(device), engine.metrics() if engine else None
    used = metrics.cache_used * metrics.cache_bytes / metrics.cache_positions if metrics else 0.0
    return Row(
        moment=moment,
        streams=metrics.streams if metrics else 0,
        gigabytes=round(now / 1e9, 3),
        more_than_before_gigabytes=round((now - start) / 1e9, 3),
        cache_used_gigabytes=round(used / 1e9, 3),
        evictions=metrics.evictions if metrics else 0,
    )


def _bytes(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def _ids(model: torch.nn.Module, count: int, seed: int) -> list[int]:
    return [int(n) for n in np.random.default_rng(seed).integers(0, model.config.vocab_size, count)]


if __name__ == "__main__":
    main()
