"""What the benchmarks of Stream share: models of released shapes, clock, speed of memory, and how results are kept.

Results go to ``benchmarks/results/NAME-DATE.json``, with the hardware and the versions; tables go to the terminal.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from tidegate.model.attention import kernel
from tidegate.model.loading import load_stream
from tidegate.model.stream import GROUPED_ATTENTION, Qwen3ForGuardModel, stream_config

RESULTS = Path(__file__).parent / "results"
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


def arguments(about: str) -> argparse.ArgumentParser:
    """A parser with the options that all of them have."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub name of a Stream checkpoint; else random weights")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="0.6b", help="of the random weights")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="JSON file; default benchmarks/results/NAME-DATE.json")
    return parser


def built(options: argparse.Namespace, attention: str = GROUPED_ATTENTION) -> Qwen3ForGuardModel:
    """The model that the options name; random weights are always the same, and large enough that the context counts."""
    torch.set_num_threads(options.threads)
    if options.model:
        return load_stream(options.model, dtype=options.dtype, device=options.device, attention=attention)
    config = stream_config(**SHAPES[options.shape])
    config._attn_implementation = attention
    generator = torch.Generator().manual_seed(0)
    torch.set_default_dtype(getattr(torch, options.dtype))
    try:
        model = Qwen3ForGuardModel(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
    return model.to(options.device)


def weight_bytes(model: Qwen3ForGuardModel) -> int:
    """What one forward reads of the weights: all but the embedding table, of which it reads a few rows.

    To be asked before the weights are laid out for inference.
    """
    return sum(p.nbytes for name, p in model.named_parameters() if "embed_tokens" not in name)


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """How long a call takes on the device."""
    began = time.perf_counter()
    call()
    settle(device)
    return time.perf_counter() - began


def settle(device: torch.device) -> None:
    """Wait until the device has computed everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_rates(device: torch.device) -> dict[str, float]:
    """Bytes per second of 512 MB, best of ten: read (a sum), and copied (bytes read and bytes written)."""
    numbers = torch.ones(128 * 2**20, dtype=torch.float32, device=device)
    target = torch.empty_like(numbers)
    read = min(seconds(numbers.sum, device) for _ in range(10))
    copied = min(seconds(lambda: target.copy_(numbers), device) for _ in range(10))
    return {"read": numbers.nbytes / read, "copied": 2 * numbers.nbytes / copied}


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """Hardware, versions and what was asked for."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text(encoding="utf-8").splitlines() if cpu.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "date": datetime.date.today().isoformat(),
        "model": str(options.model or f"{options.shape}, random weights"),
        "dtype": options.dtype,
        "device": torch.cuda.get_device_name() if options.device.startswith("cuda") else "cpu",
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": options.threads,
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "own_kernel": kernel() is not None,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("tidegate", "torch", "transformers", "numba")},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def progress(text: str) -> None:
    """A line for whoever waits."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stderr.flush()


def table(head: str, rows: Iterable[Sequence[object]]) -> str:
    """Markdown; the names of the columns are separated by ``|``."""
    names = head.split("|")
    lines = [f"| {' | '.join(names)} |", "|--:" * len(names) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)]) + "\n"


def keep(name: str, options: argparse.Namespace, figures: dict[str, Any], text: str) -> None:
    """Write the figures, and show the table."""
    path = options.out or RESULTS / f"{name}-{datetime.date.today().isoformat()}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    about = machine(options)
    path.write_text(json.dumps({"machine": about, **figures}, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"{', '.join(f'{key} {value}' for key, value in about.items())}\n\n{text}")


def median(values: Sequence[float]) -> float:
    """The middle one."""
    return statistics.median(values)
