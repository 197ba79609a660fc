"""What the gateway adds to many streams at once: time, processor and memory, and that nothing unjudged gets out.

    python benchmarks/gateway.py                       # 1, 50, 100 and 200 streams; then the pace that is too much
    python benchmarks/gateway.py --streams 400 --pace 2 --guard edge:FOLDER --out FILE.json

In one run the same upstream is reached in three ways: directly, through a gateway with `NoGuard` (the same code with a
guard that finds everything safe at once), and through a gateway with the guard under test; both gateways have the
balanced policy and keep every decision in SQLite. Upstream and gateways are uvicorn processes of their own on loopback,
and share the processor with the client, which only stores what arrives and when: it is read after the streams ended.

The upstream writes one word per chunk at a fixed pace and stamps each chunk with the clock of the machine. Two delays
of a text are told apart. *On the way*: from the chunk that made it releasable, to its arrival; that is what the gateway
costs. *Since written*: from the chunk that it was written in, to its arrival; that has the wait for the next word too,
because the end of a word is not judged before it is known to be its end.

Every fourth answer turns abusive half-way. What each client received is compared with what the same guard and policy
release when the same answer is judged alone, in this process: a single character more or less is an error.

Writes a table to the terminal, ``benchmarks/results/gateway-DATE.json``, and a plot of the delays beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import itertools
import json
import os
import platform
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import uvicorn
import uvloop
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from tidegate.gateway.app import create_app
from tidegate.gateway.demo import DEMO_ANSWERS
from tidegate.guards import load_guard
from tidegate.guards.base import StreamGuard
from tidegate.moderate import StreamModerator
from tidegate.policy import load_policy
from tidegate.store import open_store
from tidegate.testing import NoGuard
from tidegate.types import Action, Conversation

RESULTS = Path(__file__).parent / "results"
WORDS = 60
CURVE = (1, 50, 100)
ROUNDS = 3
PACES = (2.5, 5.0, 7.5, 10.0, 15.0, 20.0)
WAYS = ("direct", "no guard", "guard")
RAMP_S = 1.0
"""The streams of a round begin within so many seconds, evenly."""
PATIENCE_S = 120.0

SENTENCES = (
    "Bread needs flour, water, salt and a little patience.",
    "The train to the coast leaves at nine in the morning.",
    "Plant the tomatoes where they get sun for half of the day.",
    "A good map shows the paths that people really use.",
    "The museum opens late on Thursdays, and the garden is free.",
    "Write down three things that went well this week.",
    "Boil the pasta in plenty of water and keep a cup of it.",
    "The old bridge was built of stone from the hills nearby.",
    "Most birds in this forest are easier to hear than to see.",
    "Take a warm jacket, because the evenings by the lake are cool.",
    "A bicycle chain lasts longer when it is clean and oiled.",
    "The library lends out tools as well as books.",
    "Start with the corners of the puzzle, then sort the pieces by colour.",
    "Our neighbours grow beans along the fence every summer.",
    "Let the paint dry for a day before you hang the picture.",
    "The recipe asks for two eggs and a spoon of honey.",
)
TURN = next(answer for answer in DEMO_ANSWERS if "hateful" in answer.about).content.partition("\n\n")[2]
_WORD = re.compile(r"\s*\S+")
_NUMBER = re.compile(r"number (\d+)")


# --- what is said -------------------------------------------------------------------------------------------------


def answer(number: int) -> list[str]:
    """The words of one written answer; every fourth turns abusive in its middle."""
    rng = random.Random(number)
    sentences = rng.sample(SENTENCES, len(SENTENCES))
    words = _WORD.findall(" ".join(sentences))
    if number % 4 == 3:
        return [*words[: WORDS // 2], *_WORD.findall(" " + TURN)[: WORDS - WORDS // 2]]
    return words[:WORDS]


def prompt(number: int) -> str:
    return f"Please write answer number {number}."


async def upstream(scope: Any, receive: Any, send: Any) -> None:
    """An ASGI app that streams answers at the pace that the request's ``model`` names, in words per second."""
    if scope["type"] == "lifespan":
        while True:
            event = (await receive())["type"]
            await send({"type": f"{event}.complete"})
            if event == "lifespan.shutdown":
                return
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    request = json.loads(body)
    found = _NUMBER.search(request["messages"][-1]["content"])
    assert found is not None
    headers = [(b"content-type", b"text/event-stream")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    words = answer(int(found[1]))
    if await _paced(words, float(request["model"]), receive, send):
        end = _chunk(len(words), "", '"stop"') + b"data: [DONE]\n\n"
        await send({"type": "http.response.body", "body": end, "more_body": False})


async def _paced(words: Sequence[str], pace: float, receive: Any, send: Any) -> bool:
    """Send the words as they become due; returns whether the other side is still there at the end."""
    gone = asyncio.ensure_future(receive())
    start = time.monotonic()
    try:
        for place, word in enumerate(words):
            wait = start + place / pace - time.monotonic()
            if wait > 0:
                await asyncio.sleep(wait)
            if gone.done():
                return False
            await send({"type": "http.response.body", "body": _chunk(place, word, "null"), "more_body": True})
    finally:
        gone.cancel()
    return True


def _chunk(place: int, word: str, finish_reason: str) -> bytes:
    delta = json.dumps({"content": word} if word else {}, ensure_ascii=False)
    return (
        'data: {"id":"chatcmpl-bench","object":"chat.completion.chunk","created":1700000000,"model":"bench",'
        f'"place":{place},"stamp":{time.monotonic_ns()},'
        f'"choices":[{{"index":0,"delta":{delta},"finish_reason":{finish_reason}}}]}}\n\n'
    ).encode()


# --- servers ------------------------------------------------------------------------------------------------------


def gateway_app(guard_spec: str, upstream_url: str, folder: str) -> Any:
    """The gateway as `tidegate serve` makes it, and a page that tells how it is inside."""
    guard: StreamGuard = NoGuard() if guard_spec == "none" else load_guard(guard_spec)
    store = open_store(f"sqlite:///{folder}/decisions.db")

    async def vitals(request: Request) -> JSONResponse:
        return JSONResponse(
            {
                "cpu_s": time.process_time(),
                "rss": psutil.Process().memory_info().rss,
                "tasks": len(asyncio.all_tasks()),
                "sessions": getattr(guard, "sessions", 0),
            }
        )

    return create_app(
        guard=guard,
        policy=load_policy("balanced"),
        keep=store.keep,
        upstream_url=upstream_url,
        guard_timeout_s=PATIENCE_S,
        routes=[Route("/vitals", vitals)],
        on_close=[store.aclose],
    )


def serve(app: Any, place: Path) -> None:
    """Serve until terminated; write the port to a file once it listens."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(1024)
    unfinished = place.with_suffix(".new")
    unfinished.write_text(str(listener.getsockname()[1]))
    unfinished.rename(place)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2, backlog=1024)
    uvicorn.Server(config).run([listener])


@dataclass
class Server:
    """A server process, seen from outside."""

    process: subprocess.Popen[bytes]
    port: int
    fewest_tasks: float = float("inf")
    """The fewest tasks that it was ever seen with: what it has at rest."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def rss(self) -> int:
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=PATIENCE_S) as response:
            return bytes(response.read())

    def vitals(self) -> dict[str, float]:
        found: dict[str, float] = json.loads(self.get("/vitals"))
        page = self.get("/metrics").decode()
        for name in ("open_streams", "held_characters"):
            found[name] = float(re.search(rf"^tidegate_{name} (\S+)$", page, re.M)[1])  # type: ignore[index]
        return found


@contextlib.contextmanager
def running(role: str, folder: Path, *arguments: str) -> Iterator[Server]:
    """Run this file as a server."""
    folder.mkdir()
    place = folder / "port"
    process = subprocess.Popen([sys.executable, __file__, "--role", role, str(folder), *arguments])
    try:
        limit = time.monotonic() + PATIENCE_S
        while not place.exists():
            if process.poll() is not None or time.monotonic() > limit:
                raise SystemExit(f"the {role} did not start")
            time.sleep(0.02)
        yield Server(process, int(place.read_text()))
    finally:
        process.terminate()
        process.wait(30)


# --- the client ---------------------------------------------------------------------------------------------------


class Client(asyncio.Protocol):
    """One exchange: sends the request, stores what arrives and when."""

    def __init__(self, number: int, pace: float) -> None:
        body = json.dumps(
            {"model": str(pace), "stream": True, "messages": [{"role": "user", "content": prompt(number)}]}
        )
        self.number = number
        self.arrived: list[tuple[int, bytes]] = []
        self.begun = time.monotonic_ns()
        self.ended = asyncio.get_running_loop().create_future()
        self._request = (
            "POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\nconnection: close\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n{body}"
        ).encode()

    def connection_made(self, transport: Any) -> None:
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.arrived.append((time.monotonic_ns(), data))

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


@dataclass
class Received:
    """What one client received, read after the end.

    Attributes:
        pieces: each piece of text: when it arrived (ns), and its end in characters.
        stamps: when the upstream wrote each chunk (ns), by its place.
    """

    text: str = ""
    finish_reason: str | None = None
    done: bool = False
    blocked_from: int | None = None
    first_byte: int = 0
    last_byte: int = 0
    pieces: list[tuple[int, int]] = field(default_factory=list)
    stamps: dict[int, int] = field(default_factory=dict)


def read(client: Client) -> Received:
    """Take an exchange apart; what is malformed raises."""
    raw = b"".join(data for _, data in client.arrived)
    ends = list(itertools.accumulate(len(data) for _, data in client.arrived))
    head, _, rest = raw.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200") or b"chunked" not in head.lower():
        raise ValueError(f"unexpected answer: {raw[:300]!r}")
    found = Received(first_byte=client.arrived[0][0], last_byte=client.arrived[-1][0])
    at, part = len(head) + 4, 0
    body = b""
    while True:
        size_text, _, rest = rest.partition(b"\r\n")
        size = int(size_text, 16)
        at += len(size_text) + 2 + size + 2
        if not size:
            break
        body, rest = body + rest[:size], rest[size + 2 :]
        while ends[part] < at:
            part += 1
        *events, body = body.split(b"\n\n")
        for event in events:
            _read_event(event.removeprefix(b"data: "), client.arrived[part][0], found)
    if body or at != len(raw):
        raise ValueError("the body does not end with an event")
    return found


def _read_event(data: bytes, when: int, found: Received) -> None:
    if data == b"[DONE]":
        found.done = True
        return
    chunk = json.loads(data)
    if "error" in chunk:
        raise ValueError(f"the stream ended with an error: {chunk['error']['message']}")
    if "stamp" in chunk:
        found.stamps[chunk["place"]] = chunk["stamp"]
    choice = chunk["choices"][0]
    if text := choice["delta"].get("content", ""):
        found.text += text
        found.pieces.append((when, len(found.text)))
    found.finish_reason = choice["finish_reason"] or found.finish_reason
    if chunk.get("tidegate", {}).get("action") == "block":
        found.blocked_from = chunk["tidegate"]["where"]["start"]


async def clients(url: str, numbers: Sequence[int], pace: float, watch: Sequence[Server]) -> tuple[list[Client], int]:
    """Carry out exchanges side by side; returns them, and the most memory (bytes) that the watched server had."""
    host, port = url.removeprefix("http://").split(":")
    loop = asyncio.get_running_loop()
    peak = 0

    async def one(number: int, after: float) -> Client:
        await asyncio.sleep(after)
        _, client = await loop.create_connection(lambda: Client(number, pace), host, int(port))
        await client.ended
        return client

    work = [one(number, RAMP_S * place / len(numbers)) for place, number in enumerate(numbers)]
    together = asyncio.gather(*work)
    limit = time.monotonic() + PATIENCE_S + RAMP_S + WORDS / pace
    while not together.done() and time.monotonic() < limit:
        await asyncio.wait([together], timeout=0.25)
        peak = max([peak, *(server.rss for server in watch)])
    if not together.done():
        together.cancel()
        raise SystemExit(f"{len(numbers)} streams at {pace} words/s did not end")
    return together.result(), peak


# --- what should have been received -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expected:
    """What one answer leads to when it is judged alone.

    Attributes:
        text: what may leave.
        bounds: how many characters may have left after each chunk; the last is for the end of the stream.
        blocked_from: where the flagged run of tokens begins; None when the answer was not blocked.
    """

    text: str
    bounds: tuple[int, ...]
    blocked_from: int | None = None

    def trigger(self, end: int) -> int:
        """Which chunk made the text up to here releasable."""
        return next(place for place, bound in enumerate(self.bounds) if bound >= end)


def passed(number: int) -> Expected:
    """Without a guard everything leaves at once."""
    words = answer(number)
    return Expected("".join(words), tuple(itertools.accumulate(map(len, words))))


async def judged_alone(number: int, guard: StreamGuard) -> Expected:
    """One answer through the policy, with nothing beside it."""
    moderator = StreamModerator(guard, load_policy("balanced"), context=Conversation.of(prompt(number)))
    text, bounds = "", []
    for word in answer(number):
        step = await moderator.feed(word)
        text += step.released
        bounds.append(len(text))
        if step.decision is not None:
            break
    else:
        step = await moderator.finish()
        text += step.released
        bounds.append(len(text))
    assert step.decision is not None
    blocked = step.decision.action is Action.BLOCK
    span = step.decision.verdict.span if step.decision.verdict else None
    return Expected(text, tuple(bounds), span.start if blocked and span else None)


# --- one round ----------------------------------------------------------------------------------------------------


@dataclass
class Delays:
    """All delays of a round, in milliseconds."""

    first_byte: list[float] = field(default_factory=list)
    first_text: list[float] = field(default_factory=list)
    on_the_way: list[float] = field(default_factory=list)
    since_written: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, dict[str, float]]:
        return {
            name: {f"p{q}": round(float(np.percentile(values, q)), 3) for q in (50, 90, 99)} if values else {}
            for name, values in vars(self).items()
        }


def compare(client: Client, found: Received, expected: Expected) -> list[str]:
    """What is not as it must be; nothing of an error quotes what was said."""
    errors = []
    if found.text != expected.text:
        errors.append(f"answer {client.number}: {len(found.text)} characters arrived, not the {len(expected.text)} due")
    reason = "stop" if expected.blocked_from is None else "content_filter"
    if found.finish_reason != reason or not found.done:
        errors.append(f"answer {client.number}: ended with {found.finish_reason}, done {found.done}; expected {reason}")
    if expected.blocked_from is not None and len(found.text) > expected.blocked_from:
        errors.append(f"answer {client.number}: text from {expected.blocked_from} on left")
    return errors


def measure(client: Client, found: Received, expected: Expected, delays: Delays) -> None:
    """Add the delays of one exchange."""
    ends = list(itertools.accumulate(map(len, answer(client.number))))
    delays.first_byte.append((found.first_byte - client.begun) / 1e6)
    if found.pieces:
        delays.first_text.append((found.pieces[0][0] - client.begun) / 1e6)
    for when, end in found.pieces:
        trigger = found.stamps.get(expected.trigger(end))
        if trigger is not None:
            delays.on_the_way.append((when - trigger) / 1e6)
        written = found.stamps[next(place for place, stop in enumerate(ends) if stop >= end)]
        delays.since_written.append((when - written) / 1e6)


@dataclass
class Round:
    """One way, one number of streams, one pace."""

    row: dict[str, Any]
    delays: Delays
    errors: list[str]


async def measure_round(
    way: str, streams: int, pace: float, url: str, gateway: Server | None, due: dict[int, Expected]
) -> Round:
    numbers = [place % len(due) for place in range(streams)]
    before = await settled(gateway) if gateway else {}
    begun = time.monotonic()
    done, peak = await clients(url, numbers, pace, [gateway] if gateway else [])
    wall = time.monotonic() - begun
    after = await settled(gateway) if gateway else {}
    delays, errors, chunks = Delays(), [], 0
    for client in done:
        try:
            found = read(client)
        except (ValueError, LookupError) as error:
            errors.append(f"answer {client.number}: {type(error).__name__}: {error}")
            continue
        expected = due[client.number]
        errors += compare(client, found, expected)
        if not errors:
            measure(client, found, expected, delays)
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


async def expectations(setting: Setting) -> tuple[str, dict[str, dict[int, Expected]]]:
    """The guard's name, and what every answer leads to on each way."""
    guard = load_guard(setting.guard)
    try:
        judged = {number: await judged_alone(number, guard) for number in range(setting.texts)}
    finally:
        await guard.close()
    free = {number: passed(number) for number in range(setting.texts)}
    return guard.name, {"direct": free, "no guard": free, "guard": judged}


async def measured(setting: Setting) -> dict[str, Any]:
    name, due = await expectations(setting)
    rounds: list[Round] = []
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as opened:
        base = Path(scratch)
        source = opened.enter_context(running("upstream", base / "upstream"))
        plain = opened.enter_context(running("gateway", base / "plain", "none", source.url))
        guarded = opened.enter_context(running("gateway", base / "guarded", setting.guard, source.url))
        servers = {"direct": (source, None), "no guard": (plain, plain), "guard": (guarded, guarded)}

        async def one(way: str, streams: int, pace: float) -> Round:
            server, gateway = servers[way]
            done = await measure_round(way, streams, pace, server.url, gateway, due[way])
            show(done.row)
            for error in done.errors[:3]:
                print(f"    {error}", flush=True)
            rounds.append(done)
            return done

        for way in WAYS:
            await one(way, 4, setting.pace * 2)  # warms up connections, caches and the table of folded characters
        rounds.clear()
        print()
        for streams in (*(count for count in CURVE if count < setting.streams), *[setting.streams] * setting.rounds):
            for way in WAYS:
                await one(way, streams, setting.pace)
        main = list(rounds)
        print("\nat which pace it is too much (a queue grows: the streams end late)", flush=True)
        for pace in setting.paces:
            done = await one("guard", setting.streams, pace)
            if done.row["wall_s"] > done.row["ideal_s"] * 1.25 + 1:
                break
    return {
        "guard": name,
        "blocked_answers": sum(each.blocked_from is not None for each in due["guard"].values()),
        "rounds": [done.row for done in main],
        "paces": [done.row for done in rounds[len(main) :]],
        "added_ms": [added(main, streams) for streams in dict.fromkeys(done.row["streams"] for done in main)],
        "errors": [error for done in rounds for error in done.errors],
        "_delays": {way: pooled(main, way, setting.streams) for way in WAYS},
    }


def pooled(rounds: Sequence[Round], way: str, streams: int) -> Delays:
    """The delays of all rounds of this kind together."""
    mine = [done.delays for done in rounds if (done.row["way"], done.row["streams"]) == (way, streams)]
    return Delays(*(list(itertools.chain(*(getattr(each, name) for each in mine))) for name in vars(Delays())))


def added(rounds: Sequence[Round], streams: int) -> dict[str, Any]:
    """What the guard adds to the gateway without one, and the gateway with it to a direct connection."""
    found = {way: pooled(rounds, way, streams).summary() for way in WAYS}
    return {
        "streams": streams,
        **{
            f"guard - {other}": {
                name: {q: round(value - found[other][name][q], 3) for q, value in found["guard"][name].items()}
                for name in found["guard"]
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


def plot(delays: dict[str, Delays], title: str, path: Path) -> None:
    """Which share of the texts arrived within which time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    lines = [(f"{way}: on the way", delays[way].on_the_way, "-") for way in WAYS]
    lines.append(("guard: since written", delays["guard"].since_written, ":"))
    for label, values, style in lines:
        ordered = np.sort(np.maximum(values, 1e-3))
        axes.plot(ordered, np.linspace(0, 1, len(ordered)), style, label=label)
    axes.set(xscale="log", xlabel="delay of a piece of text (ms)", ylabel="share of the pieces", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)


def machine() -> dict[str, Any]:
    """What it ran on."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    packages = ("tidegate", "onnxruntime", "uvicorn", "uvloop", "httptools", "aiohttp", "starlette", "tokenizers")
    return {
        "cpu": model,
        "cores": cores,
        "shared_by": "client, upstream and both gateways",
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=200, help="the most streams at once (default 200)")
    parser.add_argument("--pace", type=float, default=5.0, help="words per second of each stream (default 5)")
    parser.add_argument("--paces", type=float, nargs="*", default=PACES, help="paces to look for the one too much")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="rounds with the most streams (default 3)")
    parser.add_argument("--texts", type=int, default=48, help="how many different answers (default 48)")
    parser.add_argument("--guard", default="edge", help="edge, or edge:FOLDER")
    parser.add_argument("--out", type=Path, help="JSON file; default benchmarks/results/gateway-DATE.json")
    parser.add_argument("--role", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role:
        kind, folder, *rest = arguments.role
        serve(upstream if kind == "upstream" else gateway_app(*rest, folder), Path(folder) / "port")
        return
    setting = Setting(
        arguments.streams, arguments.pace, arguments.paces, arguments.rounds, arguments.texts, arguments.guard
    )
    hardware = machine()
    results = uvloop.run(measured(setting))
    delays = results.pop("_delays")
    now = datetime.datetime.now(datetime.UTC)
    report = {"date": now.isoformat(timespec="seconds"), "machine": hardware, "words": WORDS, **results}
    out = arguments.out or RESULTS / f"gateway-{now:%Y-%m-%d}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    title = f"{setting.streams} streams at {setting.pace:g} words/s, {hardware['cores']} cores for everything"
    plot(delays, title, out.with_suffix(".png"))
    print("\nadded by the guard (ms)")
    for row in results["added_ms"]:
        for pair in ("guard - no guard", "guard - direct"):
            cells = (
                f"{name} P50 {found['p50']:+.1f} P99 {found['p99']:+.1f}" for name, found in row[pair].items() if found
            )
            print(f"  {row['streams']:4d} streams, {pair:16s} " + " | ".join(cells))
    print(f"written: {out} and {out.with_suffix('.png')}")
    if results["errors"]:
        raise SystemExit(f"{len(results['errors'])} errors")


if __name__ == "__main__":
    main()
