"""Many streams held open for minutes: no error, flat memory, nothing unjudged out, and nothing left behind.

    python benchmarks/soak.py                                   # 1,000 streams for 10 minutes, a word a second each
    python benchmarks/soak.py --streams 100 --minutes 1
    python benchmarks/soak.py --minutes 0.5 --paces 1 1.5 2 3   # which pace is too much

A gateway with the guard under test, an upstream and this client are processes of their own on one machine. Nine in ten
streams are held: one answer lasts as long as the run, or has ``--words`` words and is followed by another at once. The
tenth come and go: answers of 60 words, every fourth of which turns abusive half-way. All is stored as it arrives and
compared afterwards, character by character, with what the same guard and policy release when the same answer is judged
alone.

Memory is read every second; `slope` is its growth over the last four fifths of the time, and `after` what remains when
all is over. The edge guard keeps a cache for each token of its window. So memory rises until the windows are full,
which takes minutes, and falls when they move on; streams that began together show it as teeth of a saw, which must not
grow.

Writes a table to the terminal, ``benchmarks/results/soak-DATE.json``, and a plot beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import itertools
import json
import resource
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from gateway import RESULTS, machine
from gateway_client import Connection, Exchange, percentiles, read
from gateway_expected import Expected, all_judged_alone, compare
from gateway_servers import Server, running
from gateway_streams import settled
from gateway_upstream import WORDS, Order, request, turns_abusive

TEXTS = tuple(number for number in range(16) if not turns_abusive(number))
SHORT_TEXTS = tuple(range(8))
RAMP_S = 10.0
LATE_S = 1.0
"""A pace is too much when a text in a hundred comes later than this."""


@dataclass
class Run:
    """One pace: what is carried out, and what came of it.

    Attributes:
        words: of the answers of held streams; None for as many as the time takes.
        memory: the gateway's, in bytes, by seconds since the beginning.
        open_streams: how many it had open, the same way.
    """

    streams: int
    pace: float
    seconds: float
    words: int | None = None
    done: list[tuple[int, int, str, Exchange]] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)
    open_streams: list[tuple[float, float]] = field(default_factory=list)

    @property
    def held_words(self) -> int:
        return self.words or max(WORDS, round(self.pace * self.seconds))

    async def carry_out(self, gateway: Server) -> float:
        """Returns how many seconds it took."""
        begun = time.monotonic()
        streams = asyncio.gather(*(self._stream(gateway, place, begun) for place in range(self.streams)))
        while not streams.done():
            await asyncio.wait([streams], timeout=1.0)
            now = time.monotonic() - begun
            self.memory.append((now, gateway.rss))
            if len(self.memory) % 5 == 0:
                self.open_streams.append((now, (await asyncio.to_thread(gateway.vitals))["open_streams"]))
        await streams
        return time.monotonic() - begun

    async def _stream(self, gateway: Server, place: int, begun: float) -> None:
        await asyncio.sleep(RAMP_S * place / self.streams)
        comes_and_goes = place % 10 == 9
        for turn in itertools.count():
            number = (
                SHORT_TEXTS[(place // 10 + turn) % len(SHORT_TEXTS)] if comes_and_goes else TEXTS[place % len(TEXTS)]
            )
            words = WORDS if comes_and_goes else self.held_words
            tag = f"k{place}-{turn}"
            connection = await Connection.to(gateway.url)
            exchange = await connection.ask(request(number, Order(tag, self.pace, words), stream=True))
            connection.close()
            self.done.append((number, words, tag, exchange))
            if time.monotonic() - begun + words / self.pace > self.seconds:
                return

    def judged(
        self, due: dict[tuple[int, int], Expected], stamps: dict[str, list[int]]
    ) -> tuple[list[str], list[float]]:
        """What was not as it must be, and the delay (ms) of each piece of text that was."""
        errors: list[str] = []
        delays: list[float] = []
        for number, words, tag, exchange in self.done:
            name, expected = f"answer {number} of {words} words", due[number, words]
            try:
                found = read(exchange)
            except (ValueError, LookupError) as error:
                errors.append(f"{name}: {type(error).__name__}: {error}")
                continue
            wrong = compare(name, found, expected)
            errors += wrong
            if not wrong:
                triggers = np.searchsorted(expected.bounds, [end for _, end in found.pieces])
                delays += [
                    (when - stamps[tag][trigger]) / 1e6
                    for (when, _), trigger in zip(found.pieces, triggers, strict=True)
                    if trigger < len(stamps[tag])
                ]
        return errors, delays


async def soaked(
    streams: int, minutes: float, paces: Sequence[float], guard: str, words: int | None
) -> list[dict[str, Any]]:
    """All paces, one after the other, through one gateway."""
    runs = [Run(streams, pace, minutes * 60, words) for pace in paces]
    wanted = {(number, WORDS) for number in SHORT_TEXTS}
    wanted |= {(number, run.held_words) for run in runs for number in TEXTS}
    print(f"{len(wanted)} answers are judged alone first", flush=True)
    name, due = await all_judged_alone(guard, sorted(wanted))
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch)
        with running("upstream", base / "upstream") as source:
            connections = str(streams + streams // 5 + 100)
            with running("gateway", base / "gateway", guard, source.url, connections) as gateway:
                await Run(4, 5.0, 5.0).carry_out(gateway)  # warms up
                source.get("/stamps")
                for run in runs:
                    rows.append(await _soaked(run, name, gateway, source, due))
    return rows


async def _soaked(
    run: Run, name: str, gateway: Server, source: Server, due: dict[tuple[int, int], Expected]
) -> dict[str, Any]:
    before = await settled(gateway)
    wall = await run.carry_out(gateway)
    after = await settled(gateway)
    stamps = json.loads(await asyncio.to_thread(source.get, "/stamps"))
    errors, delays = run.judged(due, stamps)
    seconds = np.array([when for when, _ in run.memory])
    mib = np.array([rss for _, rss in run.memory]) / 2**20
    steady = (seconds > 0.2 * wall) & (seconds < run.seconds)
    slope = float(np.polyfit(seconds[steady] / 60, mib[steady], 1)[0]) if steady.sum() > 2 else 0.0
    words = sum(len(due[number, words].bounds) for number, words, _, _ in run.done)
    row = {
        "guard": name,
        "streams": run.streams,
        "words_per_second": run.pace,
        "words_per_answer": run.held_words,
        "minutes": run.seconds / 60,
        "wall_s": round(wall, 1),
        "exchanges": len(run.done),
        "words": words,
        "errors": len(errors),
        "delay_ms": percentiles(delays),
        "cpu_share": round((after["cpu_s"] - before["cpu_s"]) / wall, 2),
        "most_open": max((count for _, count in run.open_streams), default=0),
        "rss_mib": {
            "before": round(before["rss"] / 2**20, 1),
            "peak": round(float(mib.max()), 1),
            "after": round(after["rss"] / 2**20, 1),
            "slope_per_minute": round(slope, 2),
        },
        "left": {name: after[name] - (before[name] if name == "tasks" else 0) for name in LEFT},
        "memory": [(round(when, 1), round(rss / 2**20, 1)) for when, rss in run.memory],
    }
    show(row)
    for error in errors[:5]:
        print(f"    {error}", flush=True)
    return row


LEFT = ("tasks", "sessions", "open_streams", "held_characters")
"""What must not be there any more when all is over; of tasks, those beside the ones at rest."""


def show(row: dict[str, Any]) -> None:
    rss, delay = row["rss_mib"], row["delay_ms"] or {"p50": 0.0, "p99": 0.0}
    print(
        f"{row['streams']} streams at {row['words_per_second']:g} words/s for {row['minutes']:g} min: "
        f"{row['exchanges']} answers, {row['words']:,} words, errors {row['errors']} | open at most "
        f"{row['most_open']:.0f} | on the way P50 {delay['p50']:.1f} P99 {delay['p99']:.1f} ms | gateway "
        f"{row['cpu_share']:.2f} cores | RSS {rss['before']} / {rss['peak']} / {rss['after']} MiB, "
        f"{rss['slope_per_minute']:+.2f} a minute | left {row['left']}",
        flush=True,
    )


def fitting(row: dict[str, Any]) -> bool:
    """Whether the gateway kept up."""
    return not row["errors"] and bool(row["delay_ms"]) and row["delay_ms"]["p99"] < LATE_S * 1000


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Memory over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for row in rows:
        when, mib = zip(*row["memory"], strict=True)
        axes.plot(
            [each / 60 for each in when], mib, label=f"{row['streams']} streams, {row['words_per_second']:g} words/s"
        )
    axes.set(xlabel="minutes", ylabel="MiB", title="memory of the gateway", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)


def allow_connections(streams: int) -> None:
    """Have this process and those that it starts open as many files as it takes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 3 * streams + 512
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise SystemExit(f"{streams} streams need {needed} open files, and the system allows {hard}: see ulimit -n")
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=1000, help="streams at once (default 1,000)")
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (default 10)")
    parser.add_argument("--paces", type=float, nargs="+", default=(1.0,), help="words per second of each (default 1)")
    parser.add_argument("--words", type=int, help="words of each held answer; default as many as the time takes")
    parser.add_argument("--guard", default="edge", help="edge, or edge:FOLDER")
    parser.add_argument("--out", type=Path, help="JSON file; default benchmarks/results/soak-DATE.json")
    arguments = parser.parse_args()
    allow_connections(arguments.streams)
    hardware = machine()
    rows = uvloop.run(soaked(arguments.streams, arguments.minutes, arguments.paces, arguments.guard, arguments.words))
    now = datetime.datetime.now(datetime.UTC)
    out = arguments.out or RESULTS / f"soak-{now:%Y-%m-%d}.json"
    report = {"date": now.isoformat(timespec="seconds"), "machine": hardware, "rows": rows}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, ensure_ascii=False) + "\n", encoding="utf-8")
    plot(rows, out.with_suffix(".png"))
    if len(rows) > 1:
        kept_up = [row["words_per_second"] for row in rows if fitting(row)]
        print(f"kept up with up to {max(kept_up, default=0):g} words/s on each of {arguments.streams} streams")
    print(f"written: {out} and {out.with_suffix('.png')}")
    if any(row["errors"] for row in rows) or any(any(row["left"].values()) for row in rows):
        raise SystemExit("there were errors, or something was left")


if __name__ == "__main__":
    main()
