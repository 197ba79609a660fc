"""Tidegate beside other gateways: the same client, the same upstream, the same answers, in one run.

Each gateway has one core for itself; client and upstream have another. Four things are measured:

*Latency.* One client, and several. *First*: from the request to the first piece of text, less what the upstream made it
wait. *Later*: from the chunk that made a piece releasable, to its arrival. What a gateway adds is that less the same
for a direct connection. With a guard that judges token by token a word is releasable when the next one has begun.

*Saturation.* As many requests as are answered in a few seconds, by clients that ask again at once.

*Memory.* What the processes of a gateway hold with 500 streams open.

*Length.* Processor time of answers of 60 words, and of 4, 16 and 64 times as many: it must grow like the answer.

Every answer is compared with what is due; those of Tidegate with the guard, with the same guard and policy alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gateway_client import Connection, Exchange, percentiles, read
from gateway_expected import Expected, all_judged_alone, compare, passed
from gateway_servers import (
    DIRECT,
    GUARD,
    LITELLM_PLAIN,
    NO_GUARD,
    WAYS,
    Server,
    keep_to,
    peer,
    prepare,
    running,
)
from gateway_upstream import WORDS, Order, answer, request, turns_abusive

PARTS = ("latency", "saturation", "memory", "length")
NUMBERS = tuple(number for number in range(16) if not turns_abusive(number))
SHORT, MIDDLE, OPEN = 3, 24, 15
"""Words of the answers for first pieces, for later pieces, and of streams that stay open."""
LENGTHS = (1, 4, 16, 64)
ROUNDS = 3
SEVERAL = 8
ASKING = 32
"""Clients that ask at once for saturation."""
SECONDS = 4.0
OPEN_STREAMS = 500


@dataclass
class Field:
    """All that is running.

    Attributes:
        source: the upstream.
        ways: the server of each way.
        due: what each answer must be, by way, number and words.
        errors: all that was not as it must be.
    """

    source: Server
    ways: dict[str, Server]
    due: Callable[[str, int, int], Expected]
    errors: list[str] = field(default_factory=list)
    tags: Iterator[int] = field(default_factory=itertools.count)

    def check(self, way: str, number: int, words: int, exchange: Exchange) -> Any:
        """What an exchange brought; None when it was not as it must be."""
        name = f"{way}, answer {number} of {words} words"
        try:
            found = read(exchange)
        except (ValueError, LookupError) as error:
            self.errors.append(f"{name}: {type(error).__name__}: {error}")
            return None
        wrong = compare(name, found, self.due(way, number, words))
        self.errors += wrong
        return None if wrong else found


def cores() -> tuple[int | None, int | None]:
    """The core for gateways, and that for client and upstream; None twice where there is only one to have."""
    mine = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return (mine[0], mine[1]) if len(mine) > 1 else (None, None)


@contextlib.contextmanager
def opened(guard: str, environments: Path | None, due: Callable[[str, int, int], Expected]) -> Iterator[Field]:
    """Start everything; without environments there are no peers."""
    theirs, ours = cores()
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        base = Path(scratch)
        source = stack.enter_context(running("upstream", base / "upstream", core=ours))
        ways = {DIRECT: source}
        for way, spec in ((NO_GUARD, "none"), (GUARD, guard)):
            gateway = running("gateway", base / way.replace(" ", "-"), spec, source.url, "4096", core=theirs)
            ways[way] = stack.enter_context(gateway)
        if environments is not None:
            prepare(environments, ("litellm", "portkey"))
            for number, way in enumerate(way for way in WAYS if way not in ways):
                ways[way] = stack.enter_context(
                    peer(way, base / f"peer{number}", environments, source.url, core=theirs)
                )
        keep_to(os.getpid(), ours)
        yield Field(source, ways, due)


# --- latency ------------------------------------------------------------------------------------------------------


@dataclass
class Latencies:
    """Milliseconds, as the module's text says."""

    first: list[float] = field(default_factory=list)
    later: list[float] = field(default_factory=list)
    since_written: list[float] = field(default_factory=list)


async def _asked(field: Field, way: str, clients: int, times: int, words: int, pace: float, into: Latencies) -> None:
    """Some clients, each with so many exchanges after the other; all are measured."""
    server = field.ways[way]

    async def one(client: int) -> list[tuple[int, str, Exchange]]:
        connection = await Connection.to(server.url, server.headers)
        done = []
        for turn in range(times):
            number, tag = NUMBERS[(client + turn) % len(NUMBERS)], f"p{next(field.tags)}"
            body = request(number, Order(tag, pace, words), stream=True)
            done.append((number, tag, await connection.ask(body)))
        connection.close()
        return done

    done = list(itertools.chain(*await asyncio.gather(*(one(client) for client in range(clients)))))
    stamps = json.loads(await asyncio.to_thread(field.source.get, "/stamps"))
    for number, tag, exchange in done:
        found = field.check(way, number, words, exchange)
        if found is not None:
            _measure(exchange, found, field.due(way, number, words), stamps[tag], number, words, into)


def _measure(
    exchange: Exchange, found: Any, expected: Expected, stamps: Sequence[int], number: int, words: int, into: Latencies
) -> None:
    ends = list(itertools.accumulate(map(len, answer(number, words))))
    for place, (when, end) in enumerate(found.pieces):
        trigger = expected.trigger(end)
        if place == 0:
            into.first.append((when - exchange.begun - (stamps[trigger] - stamps[0])) / 1e6)
        else:
            into.later.append((when - stamps[trigger]) / 1e6)
            written = stamps[next(number for number, stop in enumerate(ends) if stop >= end)]
            into.since_written.append((when - written) / 1e6)


async def latency(field: Field) -> dict[str, Any]:
    """First and later pieces, with one client and with several."""
    found = {(way, clients): Latencies() for way in field.ways for clients in (1, SEVERAL)}
    for way in field.ways:
        await _asked(field, way, 2, 8, MIDDLE, 200, Latencies())  # warms up
    for _ in range(ROUNDS):
        for way in field.ways:
            await _asked(field, way, 1, 80, SHORT, 100, found[way, 1])
            await _asked(field, way, 1, 10, MIDDLE, 100, found[way, 1])
            await _asked(field, way, SEVERAL, 6, MIDDLE, 50, found[way, SEVERAL])
    rows = []
    for clients in (1, SEVERAL):
        base = {name: percentiles(values) for name, values in vars(found[DIRECT, clients]).items()}
        for way in field.ways:
            said = {name: percentiles(values) for name, values in vars(found[way, clients]).items()}
            added = {
                name: {q: round(value - base[name][q], 3) for q, value in said[name].items()}
                for name in ("first", "later")
            }
            counts = {name: len(values) for name, values in vars(found[way, clients]).items()}
            rows.append({"way": way, "clients": clients, "pieces": counts, "ms": said, "added_ms": added})
    return {"pace": {"1": 100, str(SEVERAL): 50}, "rows": rows}


# --- saturation ---------------------------------------------------------------------------------------------------


async def saturation(field: Field) -> dict[str, Any]:
    """Answered requests per second, whole and streaming."""
    rows = []
    for stream in (False, True):
        for way in field.ways:
            await _flood(field, way, stream=stream, seconds=0.7)
            cpu = field.ways[way].cpu_s
            begun = time.monotonic()
            done = await _flood(field, way, stream=stream, seconds=SECONDS)
            wall = time.monotonic() - begun
            cpu = field.ways[way].cpu_s - cpu
            good = [exchange for number, exchange in done if field.check(way, number, WORDS, exchange) is not None]
            took = percentiles([(exchange.ended - exchange.begun) / 1e6 for exchange in good])
            rows.append(
                {
                    "way": way,
                    "stream": stream,
                    "per_second": round(len(good) / wall, 1),
                    "ms": took,
                    "cpu_share": round(cpu / wall, 2),
                    "wrong": len(done) - len(good),
                }
            )
            field.source.get("/stamps")
    return {"clients": ASKING, "words": WORDS, "rows": rows}


async def _flood(field: Field, way: str, *, stream: bool, seconds: float) -> list[tuple[int, Exchange]]:
    server = field.ways[way]
    until = time.monotonic() + seconds
    done: list[tuple[int, Exchange]] = []

    async def one(client: int) -> None:
        connection = await Connection.to(server.url, server.headers)
        for turn in itertools.count(client):
            number = NUMBERS[turn % len(NUMBERS)]
            done.append((number, await connection.ask(request(number, Order("flood"), stream=stream))))
            if time.monotonic() > until or not done[-1][1].whole:
                break
        connection.close()

    await asyncio.gather(*(one(client) for client in range(ASKING)))
    return done


# --- memory -------------------------------------------------------------------------------------------------------


async def memory(field: Field) -> dict[str, Any]:
    """What the streams that are open cost in memory."""
    rows = []
    for way, server in field.ways.items():
        await _held(field, way, 20, 20.0)
        before = server.rss
        done, open_rss = await _held(field, way, OPEN_STREAMS, 1.0)
        await asyncio.sleep(1)
        wrong = sum(field.check(way, number, OPEN, exchange) is None for number, exchange in done)
        mib = {name: round(value / 2**20, 1) for name, value in (("before", before), ("open", open_rss))}
        mib["after"] = round(server.rss / 2**20, 1)
        each = round((open_rss - before) / OPEN_STREAMS / 1024, 1)
        rows.append({"way": way, "rss_mib": mib, "kib_per_stream": each, "wrong": wrong})
        field.source.get("/stamps")
    return {"streams": OPEN_STREAMS, "words_per_second": 1.0, "rows": rows}


async def _held(field: Field, way: str, streams: int, pace: float) -> tuple[list[tuple[int, Exchange]], int]:
    server = field.ways[way]

    async def one(place: int) -> tuple[int, Exchange]:
        await asyncio.sleep(4 * place / streams)
        number = NUMBERS[place % len(NUMBERS)]
        connection = await Connection.to(server.url, server.headers)
        exchange = await connection.ask(request(number, Order(f"m{place}", pace, OPEN), stream=True))
        connection.close()
        return number, exchange

    together = asyncio.gather(*(one(place) for place in range(streams)))
    most = server.rss
    while not together.done():
        await asyncio.wait([together], timeout=0.25)
        most = max(most, server.rss)
    return together.result(), most


# --- length -------------------------------------------------------------------------------------------------------


async def length(field: Field) -> dict[str, Any]:
    """Processor time for each word, by the length of the answer."""
    rows = []
    for way, server in field.ways.items():
        for stream in (True, False):
            for times in LENGTHS:
                words, repeats = WORDS * times, max(LENGTHS) // times * (1 if stream else 2)
                connection = await Connection.to(server.url, server.headers)
                cpu, begun, wrong = server.cpu_s, time.monotonic(), 0
                for turn in range(repeats):
                    number = NUMBERS[0]
                    body = request(number, Order(f"l{turn}", 0, words), stream=stream)
                    wrong += field.check(way, number, words, await connection.ask(body)) is None
                wall, cpu = time.monotonic() - begun, server.cpu_s - cpu
                connection.close()
                count = words * repeats
                rows.append(
                    {
                        "way": way,
                        "stream": stream,
                        "words": words,
                        "cpu_us_per_word": round(cpu / count * 1e6, 2),
                        "wall_us_per_word": round(wall / count * 1e6, 2),
                        "wrong": wrong,
                    }
                )
                field.source.get("/stamps")
    return {"rows": rows, "growth": _growth(rows)}


def _growth(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The time for a word of the longest answers over that of the second shortest: 1 or less is linear."""
    found = []
    for way, stream in dict.fromkeys((row["way"], row["stream"]) for row in rows):
        mine = {row["words"]: row["wall_us_per_word"] for row in rows if (row["way"], row["stream"]) == (way, stream)}
        longest, base = mine[WORDS * LENGTHS[-1]], mine[WORDS * LENGTHS[1]]
        found.append({"way": way, "stream": stream, "growth": round(longest / base, 2) if base else math.nan})
    return found


# --- the whole ----------------------------------------------------------------------------------------------------

MEASURES = {"latency": latency, "saturation": saturation, "memory": memory, "length": length}


async def measured_peers(parts: Sequence[str], guard: str, environments: Path | None) -> dict[str, Any]:
    """The parts that were asked for, each with its errors."""
    sizes = {"latency": (SHORT, MIDDLE), "saturation": (WORDS,), "memory": (OPEN,)}
    sizes["length"] = tuple(WORDS * times for times in LENGTHS)
    wanted = {
        (number, words)
        for part in parts
        for words in sizes[part]
        for number in (NUMBERS[:1] if part == "length" else NUMBERS)
    }
    name, judged = await all_judged_alone(guard, sorted(wanted))
    free = {place: passed(*place) for place in wanted}

    def due(way: str, number: int, words: int) -> Expected:
        return (judged if way == GUARD else free)[number, words]

    found: dict[str, Any] = {}
    with opened(guard, environments, due) as field:
        for part in parts:
            field.errors.clear()
            found[part] = {"guard": name, **await MEASURES[part](field), "errors": list(field.errors)}
            SHOW[part](found[part])
            for error in field.errors[:5]:
                print(f"    {error}", flush=True)
    return found


def _show_latency(found: dict[str, Any]) -> None:
    print("\nadded latency (ms)         clients   first P50      P99   later P50      P99")
    for row in found["rows"]:
        cells = "".join(
            f"{row['added_ms'][name].get(q, math.nan):10.2f}" for name in ("first", "later") for q in ("p50", "p99")
        )
        print(f"{row['way']:28s}{row['clients']:6d} {cells}", flush=True)


def _show_saturation(found: dict[str, Any]) -> None:
    print("\nsaturation                 requests/s     P50 ms    P99 ms  cores used")
    for row in found["rows"]:
        kind = "streams" if row["stream"] else "whole"
        took = row["ms"] or {"p50": math.nan, "p99": math.nan}
        print(
            f"{row['way']:18s}{kind:9s}{row['per_second']:10.1f}{took['p50']:11.1f}{took['p99']:10.1f}"
            f"{row['cpu_share']:10.2f}  wrong {row['wrong']}",
            flush=True,
        )


def _show_memory(found: dict[str, Any]) -> None:
    print(f"\nmemory (MiB)        before  {found['streams']} open   after   KiB a stream")
    for row in found["rows"]:
        mib = row["rss_mib"]
        print(
            f"{row['way']:18s}{mib['before']:8.1f}{mib['open']:10.1f}{mib['after']:8.1f}{row['kib_per_stream']:12.1f}"
            f"  wrong {row['wrong']}",
            flush=True,
        )


def _show_length(found: dict[str, Any]) -> None:
    print("\ncost of a word (us)         " + "".join(f"{WORDS * times:>16,d}" for times in LENGTHS) + "   growth")
    for grown in found["growth"]:
        mine = [row for row in found["rows"] if (row["way"], row["stream"]) == (grown["way"], grown["stream"])]
        cells = "".join(f"{row['cpu_us_per_word']:8.1f}/{row['wall_us_per_word']:7.1f}" for row in mine)
        kind = "streams" if grown["stream"] else "whole"
        print(f"{grown['way']:18s}{kind:9s} {cells}{grown['growth']:9.2f}", flush=True)


SHOW = {"latency": _show_latency, "saturation": _show_saturation, "memory": _show_memory, "length": _show_length}


def goals(found: dict[str, Any]) -> list[str]:
    """Which of the aims about latency are reached: without a guard a quarter of LiteLLM's, with it below LiteLLM's."""
    rows = {(row["way"], row["clients"]): row["added_ms"] for row in found["rows"]}
    lines = []
    for clients in (1, SEVERAL):
        if (LITELLM_PLAIN, clients) not in rows:
            continue
        for way, share in ((NO_GUARD, 0.25), (GUARD, 1.0)):
            for name, q in itertools.product(("first", "later"), ("p50", "p99")):
                ours, theirs = rows[way, clients][name][q], rows[LITELLM_PLAIN, clients][name][q]
                verdict = "reached" if ours <= theirs * share else "missed"
                part = ours / theirs if theirs > 0 else math.nan
                lines.append(
                    f"{way}, {clients} clients, {name} {q}: {part:.2f} of LiteLLM's ({share:g} allowed), {verdict}"
                )
    return lines


def plot_peers(found: dict[str, Any], title: str, path: Path) -> None:
    """Added latency, requests per second, memory and cost by length, as far as they were measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(12, 8.4), layout="constrained")
    colours = dict(
        zip(WAYS, ("0.5", "tab:cyan", "tab:blue", "tab:orange", "tab:red", "tab:olive", "tab:green"), strict=True)
    )
    if "latency" in found:
        _bars(
            axes[0, 0],
            [row for row in found["latency"]["rows"] if row["way"] != DIRECT and row["clients"] == 1],
            colours,
            {
                f"{name} {q.upper()}": (lambda row, n=name, q=q: max(row["added_ms"][n].get(q, 0), 0.01))
                for name in ("first", "later")
                for q in ("p50", "p99")
            },
        )
        axes[0, 0].set(yscale="log", ylabel="added (ms)", title="added to a piece of text, one client")
    if "saturation" in found:
        by_way: dict[str, dict[str, Any]] = {}
        for row in found["saturation"]["rows"]:
            by_way.setdefault(row["way"], {"way": row["way"]})["stream" if row["stream"] else "whole"] = row[
                "per_second"
            ]
        _bars(
            axes[0, 1],
            [row for row in by_way.values() if row["way"] != DIRECT],
            colours,
            {"whole answers": lambda row: row["whole"], "streams": lambda row: row["stream"]},
        )
        axes[0, 1].set(ylabel="requests/s", title="at saturation, one core")
    if "memory" in found:
        rows = [row for row in found["memory"]["rows"] if row["way"] != DIRECT]
        _bars(
            axes[1, 0],
            rows,
            colours,
            {"at rest": lambda row: row["rss_mib"]["before"], "500 streams": lambda row: row["rss_mib"]["open"]},
        )
        axes[1, 0].set(ylabel="MiB", title="memory")
    if "length" in found:
        for way in dict.fromkeys(row["way"] for row in found["length"]["rows"]):
            mine = [row for row in found["length"]["rows"] if row["way"] == way and row["stream"]]
            seconds = [row["wall_us_per_word"] * row["words"] / 1e6 for row in mine]
            axes[1, 1].plot([row["words"] for row in mine], seconds, "o-", color=colours[way], label=way)
        axes[1, 1].set(xscale="log", yscale="log", xlabel="words", ylabel="s", title="time of one streaming answer")
    names: dict[str, Any] = {}
    for each in axes.flat:
        each.grid(alpha=0.3)
        names |= dict(zip(*reversed(each.get_legend_handles_labels()), strict=True))
    figure.legend(names.values(), names.keys(), loc="outside lower center", ncols=len(names), fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=130)


def _bars(axes: Any, rows: Sequence[dict[str, Any]], colours: dict[str, str], groups: dict[str, Any]) -> None:
    width = 0.8 / max(len(rows), 1)
    for place, row in enumerate(rows):
        at = [group + (place - len(rows) / 2) * width for group in range(len(groups))]
        axes.bar(at, [value(row) for value in groups.values()], width, color=colours[row["way"]], label=row["way"])
    axes.set_xticks(range(len(groups)), list(groups))
