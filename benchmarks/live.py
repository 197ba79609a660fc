"""What a verdict on each word of a stream costs over ``/v1/live``, and by asking ``/v1/guard`` again at each word.

    python benchmarks/live.py
    python benchmarks/live.py --streams 64 --words 120 --guard edge:FOLDER

The same answers, of ``--words`` words each, are judged with the same guard and policy by one gateway, which is a
process of its own on this machine. Over ``/v1/live`` all streams go through one connection. By ``/v1/guard`` the answer
so far is sent again at each word, one connection for each stream. Each stream says its next word when it knows what
became of the one before, as one that must not show anything unjudged has to. One stream alone says how long a word
waits for its verdict, many at once how many words a second there are.

Both must come to the same: an answer that stays safe is allowed to its end by both.

Writes a table to the terminal, ``benchmarks/results/live-DATE.json``, and a plot beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import uvloop
from websockets.asyncio.client import ClientConnection, connect

from gateway import RESULTS, machine
from gateway_client import percentiles
from gateway_servers import Server, running
from gateway_upstream import answer, prompt, turns_abusive

LIVE, GUARD = "/v1/live", "/v1/guard"
SAFE = tuple(number for number in range(64) if not turns_abusive(number))


class Live:
    """Many streams on one connection; the answer to each word is awaited."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._next = 0
        self._waiting: dict[int, tuple[int, asyncio.Future[dict[str, Any]]]] = {}

    async def read(self) -> None:
        """Give frames to the streams that they are about, until the connection ends."""
        async for line in self._socket:
            frame = json.loads(line)
            taken, answered = self._waiting.get(frame.get("stream", 0), (0, None))
            if answered is None or answered.done():
                continue
            if frame["type"] == "error":
                answered.set_exception(RuntimeError(f"the server says: {frame['message']}"))
            elif frame["type"] in ("opened", "end") or frame["taken"] >= taken:
                answered.set_result(frame)

    async def _say(self, stream: int, taken: int, kind: str, **fields: Any) -> dict[str, Any]:
        """Send a frame; returns the one that answers it."""
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[stream] = taken, future
        await self._socket.send(json.dumps({"type": kind, "stream": stream, **fields}))
        return await future

    async def judge(self, number: int, words: int) -> list[float]:
        """One answer; seconds of each of its words."""
        self._next += 1
        stream, taken, waited = self._next, 0, []
        await self._say(stream, 0, "open", turns=[{"role": "user", "content": prompt(number)}], tokens=False)
        for word in answer(number, words):
            taken += len(word)
            begun = time.perf_counter()
            frame = await self._say(stream, taken, "text", text=word)
            waited.append(time.perf_counter() - begun)
            if frame["type"] == "end":
                raise SystemExit(f"answer {number} was stopped, and is safe")
        frame = await self._say(stream, taken, "finish")
        if frame["decision"]["action"] != "allow" or frame["released"] != taken:
            raise SystemExit(f"answer {number} did not leave whole, and is safe")
        del self._waiting[stream]
        return waited


async def judged_again(client: aiohttp.ClientSession, url: str, number: int, words: int) -> list[float]:
    """One answer by ``/v1/guard``, sent again at each word; seconds of each of its words."""
    said, waited, action = "", [], ""
    for word in answer(number, words):
        said += word
        turns = [{"role": "user", "content": prompt(number)}, {"role": "assistant", "content": said}]
        begun = time.perf_counter()
        async with client.post(f"{url}{GUARD}", json={"turns": turns}) as response:
            action = (await response.json())["action"]
        waited.append(time.perf_counter() - begun)
    if action != "allow":
        raise SystemExit(f"answer {number} was not allowed, and is safe")
    return waited


async def measured(server: Server, streams: int, words: int, rounds: int) -> list[dict[str, Any]]:
    """Both ways, one stream and many, turn by turn."""
    rows = {(way, count): Row(way, count) for count in (1, streams) for way in (LIVE, GUARD)}
    connector = aiohttp.TCPConnector(limit=streams)
    address = server.url.replace("http", "ws", 1) + LIVE
    async with (
        connect(address, subprotocols=["tidegate.live.v1"], max_size=2**24) as socket,  # type: ignore[list-item]
        aiohttp.ClientSession(connector=connector) as client,
    ):
        await socket.recv()
        live = Live(socket)
        reading = asyncio.ensure_future(live.read())
        ways: dict[str, Callable[[int, int], Awaitable[list[float]]]] = {
            LIVE: live.judge,
            GUARD: lambda number, words: judged_again(client, server.url, number, words),
        }
        for judged in ways.values():
            await judged(SAFE[0], words)  # warms up
        for turn in range(rounds):
            for (way, count), row in rows.items():
                numbers = [SAFE[(turn * count + place) % len(SAFE)] for place in range(count)]
                cpu, begun = server.cpu_s, time.perf_counter()
                waited = await asyncio.gather(*(ways[way](number, words) for number in numbers))
                row.add(waited, time.perf_counter() - begun, server.cpu_s - cpu)
        reading.cancel()
    return [row.told() for row in rows.values()]


class Row:
    """One way with so many streams at once."""

    def __init__(self, way: str, streams: int) -> None:
        self.way = way
        self.streams = streams
        self.waited: list[float] = []
        self.by_word: dict[int, list[float]] = {}
        self.wall_s = self.cpu_s = 0.0

    def add(self, waited: Sequence[Sequence[float]], wall_s: float, cpu_s: float) -> None:
        for stream in waited:
            self.waited += stream
            for place, seconds in enumerate(stream):
                self.by_word.setdefault(place, []).append(seconds)
        self.wall_s += wall_s
        self.cpu_s += cpu_s

    def told(self) -> dict[str, Any]:
        medians = [sorted(each)[len(each) // 2] for _, each in sorted(self.by_word.items())]
        return {
            "way": self.way,
            "streams": self.streams,
            "words": len(self.waited),
            "words_per_second": round(len(self.waited) / self.wall_s, 1),
            "cpu_us_per_word": round(1e6 * self.cpu_s / len(self.waited)),
            "ms": percentiles([1000 * each for each in self.waited]),
            "ms_by_word": [round(1000 * each, 3) for each in medians],
        }


def show(rows: Sequence[dict[str, Any]]) -> None:
    print(f"{'':12}{'streams':>8}{'P50 ms':>9}{'P99 ms':>9}{'words/s':>9}{'us of CPU a word':>18}")
    for row in rows:
        print(
            f"{row['way']:12}{row['streams']:8}{row['ms']['p50']:9.2f}{row['ms']['p99']:9.2f}"
            f"{row['words_per_second']:9.0f}{row['cpu_us_per_word']:18}"
        )
    for live, again in zip(rows[::2], rows[1::2], strict=True):
        print(
            f"{live['streams']} at once: {live['words_per_second'] / again['words_per_second']:.1f} times the words a "
            f"second, {again['ms']['p50'] / live['ms']['p50']:.1f} times as soon (P50)"
        )


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """How long each word of one answer waits."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=130, layout="constrained")
    axes = figure.subplots()
    for row in rows:
        if row["streams"] == 1:
            axes.plot(range(1, 1 + len(row["ms_by_word"])), row["ms_by_word"], label=row["way"])
    axes.set(xlabel="word of the answer", ylabel="ms until its verdict (median)", ylim=(0, None))
    axes.set_title("one stream, a verdict on each word")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=32, help="streams at once (default 32)")
    parser.add_argument("--words", type=int, default=120, help="words of each answer (default 120)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, each with both ways (default 3)")
    parser.add_argument("--guard", default="edge", help="edge, or edge:FOLDER")
    parser.add_argument("--out", type=Path, help="JSON file; default benchmarks/results/live-DATE.json")
    options = parser.parse_args()
    hardware = machine()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "gateway"
        with running("gateway", folder, options.guard, "http://127.0.0.1:9", str(options.streams + 100)) as server:
            rows = uvloop.run(measured(server, options.streams, options.words, options.rounds))
    show(rows)
    now = datetime.datetime.now(datetime.UTC)
    out = options.out or RESULTS / f"live-{now:%Y-%m-%d}.json"
    report = {"date": now.isoformat(timespec="seconds"), "machine": hardware, "words": options.words, "rows": rows}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report) + "\n", encoding="utf-8")
    plot(rows, out.with_suffix(".png"))
    print(f"written: {out} and {out.with_suffix('.png')}")


if __name__ == "__main__":
    main()
