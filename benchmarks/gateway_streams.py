"""Many streams at once through the gateway: what it costs, and that nothing unjudged gets out.

The upstream writes one word per chunk at a fixed pace and notes when. Two delays of a text are told apart. *On the
way*: from the chunk that made it releasable, to its arrival; that is what the gateway costs. *Since written*: from the
chunk that it was written in, to its arrival; that has the wait for the next word too, because the end of a word is not
judged before it is known to be its end.

Every fourth answer turns abusive half-way. What each client received is compared with what the same guard and policy
release when the same answer is judged alone, in this process: a single character more or less is an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gateway_client import Connection, Exchange, Received, percentiles, read
from gateway_expected import Expected, all_judged_alone, compare, passed
from gateway_servers import DIRECT, GUARD, NO_GUARD, PATIENCE_S, Server, running
from gateway_upstream import WORDS, Order, answer, request

CURVE = (1, 50, 100)
PACES = (2.5, 5.0, 7.5, 10.0, 15.0, 20.0)
STREAM_WAYS = (DIRECT, NO_GUARD, GUARD)
RAMP_S = 1.0
"""The streams of a round begin within so many seconds, evenly."""


@dataclass
class Done:
    """One exchange that ended: its answer's number, its tag, and what came back."""

    number: int
    tag: str
    exchange: Exchange


async def exchanges(
    server: Server, numbers: Sequence[int], pace: float, watch: Sequence[Server], *, words: int = WORDS
) -> tuple[list[Done], int]:
    """Carry out streaming exchanges side by side, each on a connection of its own.

    Returns:
        They, and the most memory (bytes) that the watched servers had.
    """
    peak = 0

    async def one(place: int, number: int) -> Done:
        await asyncio.sleep(RAMP_S * place / len(numbers))
        connection = await Connection.to(server.url, server.headers)
        tag = f"s{place}"
        found = await connection.ask(request(number, Order(tag, pace, words), stream=True))
        connection.close()
        return Done(number, tag, found)

    together = asyncio.gather(*(one(place, number) for place, number in enumerate(numbers)))
    limit = time.monotonic() + PATIENCE_S + RAMP_S + words / pace
    while not together.done() and time.monotonic() < limit:
        await asyncio.wait([together], timeout=0.25)
        peak = max([peak, *(each.rss for each in watch)])
    if not together.done():
        together.cancel()
        raise SystemExit(f"{len(numbers)} streams at {pace} words/s did not end")
    return together.result(), peak


@dataclass
class Delays:
    """All delays of a round, in milliseconds."""

    first_byte: list[float] = field(default_factory=list)
    first_text: list[float] = field(default_factory=list)
    on_the_way: list[float] = field(default_factory=list)
    since_written: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, dict[str, float]]:
        return {name: percentiles(values) for name, values in vars(self).items()}


def measure(done: Done, found: Received, expected: Expected, stamps: Sequence[int], delays: Delays) -> None:
    """Add the delays of one exchange."""
    ends = list(itertools.accumulate(map(len, answer(done.number))))
    delays.first_byte.append((found.first_byte - done.exchange.begun) / 1e6)
    if found.pieces:
        delays.first_text.append((found.pieces[0][0] - done.exchange.begun) / 1e6)
    for when, end in found.pieces:
        trigger = expected.trigger(end)
        if trigger < len(stamps):
            delays.on_the_way.append((when - stamps[trigger]) / 1e6)
        written = stamps[next(place for place, stop in enumerate(ends) if stop >= end)]
        delays.since_written.append((when - written) / 1e6)


@dataclass
class Round:
    """One way, one number of streams, one pace."""

    row: dict[str, Any]
    delays: Delays
    errors: list[str]


async def measure_round(
    way: str,
    streams: int,
    pace: float,
    server: Server,
    gateway: Server | None,
    source: Server,
    due: dict[int, Expected],
) -> Round:
    numbers = [place % len(due) for place in range(streams)]
    before = await settled(gateway) if gateway else {}
    begun = time.monotonic()
    done, peak = await exchanges(server, numbers, pace, [gateway] if gateway else [])
    wall = time.monotonic() - begun
    after = await settled(gateway) if gateway else {}
    stamps = json.loads(await asyncio.to_thread(source.get, "/stamps"))
    delays, errors, chunks = Delays(), [], 0
    for one in done:
        name = f"answer {one.number}"
        try:
            found = read(one.exchange)
        except (ValueError, LookupError) as error:
            errors.append(f"{name}: {type(error).__name__}: {error}")
            continue
        expected = due[one.number]
        errors += compare(name, found, expected)
        if not errors:
            measure(one, found, expected, stamps[one.tag], delays)
        chunks += len(expected.bounds)
    row: dict[str, Any] = {"way": way, "streams": streams, "words_per_second": pace, "wall_s": round(wall, 3)}
    row |= {"ideal_s": round((WORDS - 1) / pace + (RAMP_S if streams > 1 else 0), 3), "errors": len(errors)}
    row |= {"delays_ms": delays.summary(), "chunks": chunks}
    if gateway:
        cpu = after["cpu_s"] - before["cpu_s"]
        row |= {"cpu_s": round(cpu, 3), "cpu_us_per_chunk": round(cpu / chunks * 1e6, 1)}
        row["rss_mib"] = {
            name: round(value / 2**20, 1)
            for name, value in (("before", before["rss"]), ("peak", max(peak, after["rss"])), ("after", after["rss"]))
        }
        row |= {f"after_{name}": after[name] for name in ("tasks", "sessions", "open_streams", "held_characters")}
    return Round(row, delays, errors)


async def settled(gateway: Server) -> dict[str, float]:
    """How the gateway is once it has come to rest, or after 10 seconds when it does not."""
    limit = time.monotonic() + 10
    while True:
        found = await asyncio.to_thread(gateway.vitals)
        gateway.fewest_tasks = min(gateway.fewest_tasks, found["tasks"])
        busy = found["open_streams"] or found["sessions"] or found["tasks"] > gateway.fewest_tasks
        if not busy or time.monotonic() > limit:
            return found
        await asyncio.sleep(0.05)


# --- the whole ----------------------------------------------------------------------------------------------------


@dataclass
class Setting:
    """What a run is made of."""

    streams: int
    pace: float
    paces: Sequence[float]
    rounds: int
    texts: int
    guard: str


async def measured_streams(setting: Setting) -> dict[str, Any]:
    """Everything of this part; ``_delays`` is for the plot."""
    wanted = [(number, WORDS) for number in range(setting.texts)]
    name, judged = await all_judged_alone(setting.guard, wanted)
    free = {number: passed(number) for number in range(setting.texts)}
    due = {DIRECT: free, NO_GUARD: free, GUARD: {number: one for (number, _), one in judged.items()}}
    rounds: list[Round] = []
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as opened:
        base = Path(scratch)
        source = opened.enter_context(running("upstream", base / "upstream"))
        plain = opened.enter_context(running("gateway", base / "plain", "none", source.url, "4096"))
        guarded = opened.enter_context(running("gateway", base / "guarded", setting.guard, source.url, "4096"))
        servers = {DIRECT: (source, None), NO_GUARD: (plain, plain), GUARD: (guarded, guarded)}

        async def one(way: str, streams: int, pace: float) -> Round:
            server, gateway = servers[way]
            done = await measure_round(way, streams, pace, server, gateway, source, due[way])
            show(done.row)
            for error in done.errors[:3]:
                print(f"    {error}", flush=True)
            rounds.append(done)
            return done

        for way in STREAM_WAYS:
            await one(way, 4, setting.pace * 2)  # warms up connections, caches and the table of folded characters
        rounds.clear()
        print()
        for streams in (*(count for count in CURVE if count < setting.streams), *[setting.streams] * setting.rounds):
            for way in STREAM_WAYS:
                await one(way, streams, setting.pace)
        main = list(rounds)
        print("\nat which pace it is too much (a queue grows: the streams end late)", flush=True)
        for pace in setting.paces:
            done = await one(GUARD, setting.streams, pace)
            if done.row["wall_s"] > done.row["ideal_s"] * 1.25 + 1:
                break
    return {
        "guard": name,
        "blocked_answers": sum(each.blocked_from is not None for each in due[GUARD].values()),
        "rounds": [done.row for done in main],
        "paces": [done.row for done in rounds[len(main) :]],
        "added_ms": [added(main, streams) for streams in dict.fromkeys(done.row["streams"] for done in main)],
        "errors": [error for done in rounds for error in done.errors],
        "_delays": {way: pooled(main, way, setting.streams) for way in STREAM_WAYS},
    }


def pooled(rounds: Sequence[Round], way: str, streams: int) -> Delays:
    """The delays of all rounds of this kind together."""
    mine = [done.delays for done in rounds if (done.row["way"], done.row["streams"]) == (way, streams)]
    return Delays(*(list(itertools.chain(*(getattr(each, name) for each in mine))) for name in vars(Delays())))


def added(rounds: Sequence[Round], streams: int) -> dict[str, Any]:
    """What the guard adds to the gateway without one, and the gateway with it to a direct connection."""
    found = {way: pooled(rounds, way, streams).summary() for way in STREAM_WAYS}
    return {
        "streams": streams,
        **{
            f"guard - {other}": {
                name: {q: round(value - found[other][name][q], 3) for q, value in found[GUARD][name].items()}
                for name in found[GUARD]
            }
            for other in ("no guard", "direct")
        },
    }


def show(row: dict[str, Any]) -> None:
    """One line of the table."""
    delays = row["delays_ms"]
    cells = [
        f"{row['streams']:4d} streams at {row['words_per_second']:5.2f} words/s",
        f"{row['way']:9s} wall {row['wall_s']:6.2f} s (ideal {row['ideal_s']:6.2f})",
    ]
    for label, name in (("first byte", "first_byte"), ("on the way", "on_the_way"), ("written", "since_written")):
        if delays[name]:
            cells.append(f"{label} P50 {delays[name]['p50']:7.1f} P99 {delays[name]['p99']:7.1f} ms")
    if "cpu_s" in row:
        rss = row["rss_mib"]
        cells.append(
            f"cpu {row['cpu_us_per_chunk']:6.0f} us/chunk  RSS {rss['before']}/{rss['peak']}/{rss['after']} MiB"
        )
        cells.append(f"left: {row['after_tasks']} tasks, {row['after_sessions']} sessions")
    print(" | ".join([*cells, f"errors {row['errors']}"]), flush=True)


def plot_streams(delays: dict[str, Delays], title: str, path: Path) -> None:
    """Which share of the texts arrived within which time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    lines = [(f"{way}: on the way", delays[way].on_the_way, "-") for way in STREAM_WAYS]
    lines.append(("guard: since written", delays[GUARD].since_written, ":"))
    for label, values, style in lines:
        ordered = np.sort(np.maximum(values, 1e-3))
        axes.plot(ordered, np.linspace(0, 1, len(ordered)), style, label=label)
    axes.set(xscale="log", xlabel="delay of a piece of text (ms)", ylabel="share of the pieces", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)
