"""Gen: the ``generate()`` of the model card against ours, for one request and for eight at once, in one run.

    python benchmarks/gen.py --files FOLDER                          # random weights of the 0.6B shape
    python benchmarks/gen.py --model FOLDER [--int8 EXPORT] [--device cuda]
    python benchmarks/gen.py --files FOLDER --write CHECKPOINT       # only write the random checkpoint, to export it

Both sides are given the same conversations and the same weights; the released algorithm is in ``gen_released.py``,
which also says how random weights come to answer in the official form. Ours is the guard ``gen:FOLDER`` as anybody
would use it: text in, verdict out. Both read prompts and answers (with the line on refusal), short ones and ones of
about a thousand tokens, and each says Safe or Unsafe. One request: the median of several, both sides in turns. Eight
requests: ours gets eight calls at once; ``generate`` gets them as one batch padded at the left, and one after the
other, and the faster counts. ``--int8`` is an export of the same checkpoint, measured in the same turns.

All verdicts are compared with what the regular expressions of the model card find: equal ones are counted. Without a
clock, forwards in torch and the positions that they compute are counted too; those of an export are not.

Writes a table to the terminal and ``benchmarks/results/gen-DATE.json``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Qwen3Model

from gen_released import FILES, SHAPES, ModelCard, Said, agrees, write_checkpoint
from tidegate.guards import Guard, load_guard
from tidegate.guards.gen import GenGuard
from tidegate.model.backbone import Backbone
from tidegate.types import Conversation, Target, Verdict

RESULTS = Path(__file__).parent / "results"
AT_ONCE = 8
LENGTHS = {"short": 100, "long": 5_300}
"""Characters of the content: about 20 and about 1,000 tokens."""
REPEATS = {"short": 3, "long": 1}
LONG = ((Target.PROMPT, "safe"), (Target.RESPONSE, "unsafe"))
"""Of long texts these are enough: their cost is that of reading."""
ANSWERS = {
    (Target.PROMPT, "safe"): "Safety: Safe\nCategories: None",
    (Target.PROMPT, "unsafe"): "Safety: Unsafe\nCategories: Non-violent Illegal Acts",
    (Target.RESPONSE, "safe"): "Safety: Safe\nCategories: None\nRefusal: No",
    (Target.RESPONSE, "unsafe"): "Safety: Unsafe\nCategories: Non-violent Illegal Acts\nRefusal: No",
}
WORDS = (
    "the water bread garden letter bridge morning window music paper village doctor summer answer number market "
    "children teacher picture mountain station kitchen language history question company river story and of with "
    "from about under before after without between where when because could should would make take find give keep "
    "write read build carry open close small large early quiet green round simple common public local general"
)
EXTENSIONS = ("avx2", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8")


@dataclass(frozen=True, slots=True)
class Case:
    """What is asked: eight conversations of one kind."""

    target: Target
    severity: str
    length: str

    @property
    def name(self) -> str:
        return f"{self.target}, {self.severity}, {self.length}"

    def conversations(self) -> list[Conversation]:
        rng = random.Random(self.name)
        return [self._conversation(rng) for _ in range(AT_ONCE)]

    def _conversation(self, rng: random.Random) -> Conversation:
        text = written(rng, LENGTHS[self.length])
        if self.target is Target.PROMPT:
            return Conversation.of(text)
        return Conversation.of(written(rng, LENGTHS["short"]), text)


@dataclass(slots=True)
class Times:
    """Seconds of one side. ``batch``: eight at once; ``forwards`` and ``positions``: those of one request."""

    one: list[float] = field(default_factory=list)
    batch: float = 0.0
    forwards: int = 0
    positions: int = 0

    @property
    def median(self) -> float:
        return statistics.median(self.one)


Ask = Callable[[Sequence[Conversation]], Awaitable[list[Any]]]


def written(rng: random.Random, characters: int) -> str:
    """So many characters of ordinary words."""
    words: list[str] = []
    known = WORDS.split()
    while sum(map(len, words)) + len(words) < characters:
        words.append(rng.choice(known))
    return " ".join(words).capitalize()


def cases(lengths: Sequence[str], targets: Sequence[str]) -> list[Case]:
    return [
        Case(target, severity, length)
        for length in lengths
        for target, severity in (LONG if length == "long" else ANSWERS)
        if target in targets
    ]


# --- measuring ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def counted() -> Iterator[list[int]]:
    """The positions of each forward in here, padding included: of transformers' backbone, and of ours."""
    positions: list[int] = []
    plain = Backbone.forward

    def hook(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(module, Qwen3Model):
            positions.append(output.last_hidden_state[..., 0].numel())

    def noted(backbone: Backbone, ids: torch.Tensor, *more: Any) -> torch.Tensor:
        positions.append(len(ids))
        return plain(backbone, ids, *more)

    handle = nn.modules.module.register_module_forward_hook(hook)
    Backbone.forward = noted  # type: ignore[method-assign]
    try:
        yield positions
    finally:
        handle.remove()
        Backbone.forward = plain  # type: ignore[method-assign]


async def timed(ask: Ask, conversations: Sequence[Conversation]) -> tuple[float, list[Any]]:
    start = time.perf_counter()
    answers = await ask(conversations)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, answers


async def measure(case: Case, sides: dict[str, Ask]) -> dict[str, Any]:
    """One case on all sides, in turns."""
    conversations = case.conversations()
    times = {side: Times() for side in sides}
    answers: dict[str, list[Any]] = {}
    for side, ask in sides.items():
        with counted() as positions:
            await ask(conversations[:1])
        times[side].forwards, times[side].positions = len(positions), sum(positions)
    for turn in range(REPEATS[case.length]):
        for side, ask in sides.items():
            seconds, _ = await timed(ask, conversations[turn : turn + 1])
            times[side].one.append(seconds)
    for side, ask in sides.items():
        times[side].batch, answers[side] = await timed(ask, conversations)
    return row(case, times, answers)


def row(case: Case, times: dict[str, Times], answers: dict[str, list[Any]]) -> dict[str, Any]:
    """The figures of one case."""
    said: list[Said] = answers["generate"]
    base = times["generate"]
    base_batch = min(base.batch, AT_ONCE * base.median)
    sides: dict[str, Any] = {}
    for side, of in times.items():
        found = {
            "one_ms": round(of.median * 1e3, 1),
            "one_ms_all": [round(seconds * 1e3, 1) for seconds in of.one],
            "per_second_at_8": round(AT_ONCE / of.batch, 3),
            "forwards": of.forwards,
            "positions": of.positions,
        }
        if side == "generate":
            found["per_second_one_by_one"] = round(1 / of.median, 3)
        else:
            found["times_as_fast_one"] = round(base.median / of.median, 2)
            found["times_as_fast_at_8"] = round(base_batch / of.batch, 2)
            found["same_verdicts"] = sum(agrees(a, b) for a, b in zip(said, answers[side], strict=True))
        sides[side] = found
    severities = sorted({str(each.severity) for each in said})
    return {**asdict(case), "answer_tokens": said[0].tokens, "severities": severities, "sides": sides}


def asking(guard: Guard) -> Ask:
    async def ask(conversations: Sequence[Conversation]) -> list[Verdict | BaseException]:
        return await asyncio.gather(*(guard.judge(each) for each in conversations), return_exceptions=True)

    return ask


def generating(card: ModelCard) -> Ask:
    async def ask(conversations: Sequence[Conversation]) -> list[Said]:
        return card.judge(conversations)

    return ask


async def run(
    folder: Path, options: argparse.Namespace, save: Callable[[Sequence[dict[str, Any]]], None]
) -> list[dict[str, Any]]:
    card = ModelCard(folder, dtype=getattr(torch, options.dtype), device=options.device)
    guards: dict[str, Guard] = {"ours": GenGuard(str(folder), dtype=options.dtype, device=options.device)}
    if options.int8:
        guards["int8"] = load_guard(f"gen:{options.int8}")
    sides = {"generate": generating(card), **{name: asking(guard) for name, guard in guards.items()}}
    for target in options.targets:
        warm = Case(Target(target), "safe", "short").conversations()[:1]
        for ask in sides.values():
            await ask(warm)
    rows = []
    chosen = cases(options.lengths, options.targets)
    for number, case in enumerate(chosen, start=1):
        rows.append(await measure(case, sides))
        save(rows)
        print(f"[{number}/{len(chosen)}] {line(rows[-1])}", flush=True)
    for guard in guards.values():
        await guard.close()
    return rows


# --- telling ------------------------------------------------------------------------------------------------------


def line(found: dict[str, Any]) -> str:
    """One case in words."""
    generate = found["sides"]["generate"]
    best = max(generate["per_second_at_8"], generate["per_second_one_by_one"])
    of_generate = f"generate {generate['one_ms']:.0f} ms ({generate['forwards']} forwards), {best:.2f}/s at {AT_ONCE}"
    parts = [f"{found['target']}, {found['severity']}, {found['length']}: {of_generate}"]
    for name, side in found["sides"].items():
        if name != "generate":
            parts.append(
                f"{name} {side['one_ms']:.0f} ms ({side['forwards'] or 'uncounted'} forwards), "
                f"{side['per_second_at_8']:.2f}/s: "
                f"{side['times_as_fast_one']:.2f} x, {side['times_as_fast_at_8']:.2f} x at {AT_ONCE}, "
                f"{side['same_verdicts']}/{AT_ONCE} verdicts the same"
            )
    return " | ".join(parts)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """All cases, in Markdown."""
    names = [name for name in rows[0]["sides"] if name != "generate"]
    head = ["case", "answer", "generate", *(part for name in names for part in (name, "ratio"))]
    head += [f"generate at {AT_ONCE}", *(part for name in names for part in (f"{name} at {AT_ONCE}", "ratio"))]
    head += ["same verdicts"]
    lines = [f"| {' | '.join(head)} |", f"|---{'|---:' * (len(head) - 1)}|"]
    for found in rows:
        sides = found["sides"]
        generate = sides["generate"]
        cells = [f"{found['target']}, {found['severity']}, {found['length']}", f"{found['answer_tokens']} tokens"]
        cells.append(f"{generate['one_ms']:.0f} ms")
        for name in names:
            cells += [f"{sides[name]['one_ms']:.0f} ms", f"{sides[name]['times_as_fast_one']:.1f} x"]
        cells.append(f"{max(generate['per_second_at_8'], generate['per_second_one_by_one']):.2f}/s")
        for name in names:
            cells += [f"{sides[name]['per_second_at_8']:.2f}/s", f"{sides[name]['times_as_fast_at_8']:.1f} x"]
        cells.append(", ".join(f"{sides[name]['same_verdicts']}/{AT_ONCE}" for name in names))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def machine(device: str) -> dict[str, Any]:
    """Hardware and versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [text.split(":", 1)[1].strip() for text in lines if text.startswith("model name")]
    flags = next((text for text in lines if text.startswith("flags")), "")
    packages = ("tidegate", "torch", "transformers", "tokenizers", "onnxruntime")
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "extensions": [
            name for name in ("avx2", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8") if name in flags
        ],
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "threads": torch.get_num_threads(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a Gen checkpoint; else random weights")
    parser.add_argument("--int8", type=Path, help="folder of an export of the same checkpoint")
    parser.add_argument("--files", type=Path, default=Path(FILES), help="the released tokenizer and chat template")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="0.6b", help="of random weights")
    parser.add_argument("--write", type=Path, help="write the random checkpoint here, and measure nothing")
    parser.add_argument("--dtype", choices=("bfloat16", "float32", "float16"), default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--lengths", nargs="+", choices=sorted(LENGTHS), default=list(LENGTHS))
    parser.add_argument("--targets", nargs="+", choices=[str(target) for target in Target], default=list(Target))
    parser.add_argument("--append", action="store_true", help="add the cases to those of an earlier run in the file")
    parser.add_argument("--out", type=Path, help="JSON file; default benchmarks/results/gen-DATE.json")
    return parser.parse_args()


def write(folder: Path, chosen: argparse.Namespace) -> None:
    """The random checkpoint, which answers the chosen cases as they are named."""
    print(f"random weights of the shape {chosen.shape}", file=sys.stderr, flush=True)
    wanted = [
        (c, ANSWERS[case.target, case.severity])
        for case in cases(chosen.lengths, chosen.targets)
        for c in case.conversations()
    ]
    write_checkpoint(folder, wanted, files=chosen.files, shape=chosen.shape)


def main() -> None:
    chosen = options()
    if chosen.write:
        write(chosen.write, chosen)
        return
    now = datetime.datetime.now(datetime.UTC)
    report = {
        "date": now.isoformat(timespec="seconds"),
        "machine": machine(chosen.device),
        "weights": str(chosen.model.name) if chosen.model else f"random, shape {chosen.shape}",
        "dtype": chosen.dtype,
    }
    out = chosen.out or RESULTS / f"gen-{now:%Y-%m-%d}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    earlier = json.loads(out.read_text(encoding="utf-8"))["rows"] if chosen.append and out.exists() else []

    def save(rows: Sequence[dict[str, Any]]) -> None:
        out.write_text(json.dumps({**report, "rows": [*earlier, *rows]}, indent=1) + "\n", encoding="utf-8")

    with tempfile.TemporaryDirectory() as scratch:
        folder = chosen.model or Path(scratch)
        if not chosen.model:
            write(folder, chosen)
        rows = asyncio.run(run(folder, chosen, save))
    print(f"\n{table([*earlier, *rows])}\n\nwritten: {out}")


if __name__ == "__main__":
    main()
