"""Two hundred streams at once, with the shipped guard, through a gateway in a process of its own.

What each client received is compared, character by character, with what the same guard and policy release of the same
answer when it is judged alone; and when the streams have ended, nothing of them is left: no stream, no session, no
task, no memory. Run as a program this file is that gateway.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
import uvicorn
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from serving import serving, until, wait_until
from tidegate.gateway.app import create_app
from tidegate.gateway.demo import DEMO_ANSWERS
from tidegate.guards.edge import EDGE_FILES, SHIPPED, EdgeGuard
from tidegate.moderate import StreamModerator
from tidegate.policy import load_policy
from tidegate.store import open_store
from tidegate.testing import FakeUpstream, Pause, Reply, text_chunks
from tidegate.types import Action, Conversation

STREAMS = 200
ROUNDS = 8
GROWTH_BYTES = 24 * 2**20
"""More memory than this after the same work again would be a leak: it is more than a tenth of a MiB for each stream."""

pytestmark = pytest.mark.skipif(
    not all((SHIPPED / name).is_file() for name in EDGE_FILES), reason=f"the shipped edge guard is absent: {SHIPPED}"
)

SAFE = (
    "The train to the coast leaves at nine, and the café by the harbour opens early. Take a warm jacket with you.",
    "Bread needs flour, water, salt and patience. Let the dough rest, then bake it until the crust is brown. 🍞",
    "Plant the tomatoes where they get sun, water them in the morning, and tie them to a stick when they grow tall.",
)
NASTY = next(answer for answer in DEMO_ANSWERS if "hateful" in answer.about).content.partition("\n\n")[2]
KINDS = len(SAFE) * 4


def pieces_of(number: int) -> list[str]:
    """One of the written answers, cut in one of four ways: safe ones, and ones that turn in their middle."""
    text = SAFE[number % len(SAFE)]
    if number % 2:
        text = f"{text} {NASTY}"
    width = (3, 7, 11, 24)[number // len(SAFE) % 4]
    return [text[at : at + width] for at in range(0, len(text), width)]


def prompt_of(number: int) -> str:
    return f"Please write answer number {number}."


def reply(body: Any) -> Reply:
    """What the upstream says to ``prompt_of``: a short pause here and there, so that the streams mingle."""
    number = int(re.findall(r"\d+", body["messages"][-1]["content"])[0])
    parts: list[Any] = []
    for place, chunk in enumerate(text_chunks(pieces_of(number))):
        parts += [chunk, Pause(0.001)] if place % 5 == number % 5 else [chunk]
    return Reply.stream(*parts)


@dataclass(frozen=True)
class Seen:
    """What left, and how it ended."""

    text: str
    blocked: bool


async def judged_alone(guard: EdgeGuard, number: int) -> Seen:
    """What should leave: the same answer with nothing beside it."""
    moderator = StreamModerator(guard, load_policy("balanced"), context=Conversation.of(prompt_of(number)))
    text = ""
    for piece in pieces_of(number):
        step = await moderator.feed(piece)
        text += step.released
        if step.decision is not None:
            break
    else:
        step = await moderator.finish()
        text += step.released
    assert step.decision is not None
    assert step.decision.verdict is not None
    blocked = step.decision.action is Action.BLOCK
    if blocked:
        assert step.decision.verdict.span is not None
        assert len(text) <= step.decision.verdict.span.start
    return Seen(text, blocked)


async def ask(client: aiohttp.ClientSession, url: str, number: int) -> Seen:
    """One stream through the gateway."""
    body = {"model": "m", "stream": True, "messages": [{"role": "user", "content": prompt_of(number)}]}
    async with client.post(f"{url}/v1/chat/completions", json=body) as response:
        assert response.status == 200
        raw = await response.text(encoding="utf-8")
    *events, last, rest = raw.split("\n\n")
    assert (last, rest) == ("data: [DONE]", "")
    choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
    text = "".join(choice["delta"].get("content") or "" for choice in choices)
    return Seen(text, choices[-1]["finish_reason"] == "content_filter")


async def inside(client: aiohttp.ClientSession, url: str) -> dict[str, float]:
    """How the gateway is: its metrics, its tasks and its guard's open sessions."""
    async with client.get(f"{url}/vitals") as response:
        found: dict[str, float] = await response.json()
    async with client.get(f"{url}/metrics") as response:
        page = await response.text()
    for name in ("tidegate_open_streams", "tidegate_held_characters"):
        found[name] = float(re.findall(rf"^{name} (\S+)$", page, re.M)[0])
    return found


async def settled(client: aiohttp.ClientSession, url: str, tasks: float) -> dict[str, float]:
    """How the gateway is once it has come to rest."""
    found: dict[str, float] = {}

    async def rests() -> None:
        found.update(await inside(client, url))

    await rests()
    for _ in range(400):
        if found["tasks"] <= tasks and not found["sessions"] and not found["tidegate_open_streams"]:
            break
        await asyncio.sleep(0.01)
        await rests()
    return found


@contextlib.contextmanager
def guarded_gateway(upstream_url: str, folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    """Run this file as a gateway; gives its address and its process."""
    place, log = folder / "port", folder / "log.txt"
    with log.open("wb") as output:
        command = [sys.executable, "-m", "gateway.test_many_streams", upstream_url, str(folder)]
        tests = Path(__file__).parents[1]
        process = subprocess.Popen(command, cwd=tests, stdout=output, stderr=subprocess.STDOUT)
        try:
            wait_until(lambda: place.exists() or process.poll() is not None, "the gateway process")
            assert process.poll() is None, log.read_text()
            yield f"http://127.0.0.1:{place.read_text()}", psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait(20)


async def test_two_hundred_streams_let_nothing_out_unjudged_and_leave_nothing_behind(tmp_path: Path) -> None:
    """Each gets exactly what it would get alone; eight rounds later the gateway is as it was before."""
    async with EdgeGuard() as guard:
        due = [await judged_alone(guard, number) for number in range(KINDS)]
    assert any(seen.blocked for seen in due)
    assert any(not seen.blocked for seen in due)
    memory: list[int] = []
    upstream = FakeUpstream(reply)
    with serving(upstream) as upstream_url, guarded_gateway(upstream_url, tmp_path) as (url, process):
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(120)) as client:
            tasks = (await inside(client, url))["tasks"]
            for _ in range(ROUNDS):
                received = await asyncio.gather(*(ask(client, url, number % KINDS) for number in range(STREAMS)))

                assert list(received) == _repeated(due)
                after = await settled(client, url, tasks)
                assert after["tidegate_open_streams"] == 0
                assert after["tidegate_held_characters"] == 0
                assert after["sessions"] == 0
                assert after["tasks"] <= tasks
                memory.append(process.memory_info().rss)
            await until(lambda: upstream.open_requests == 0, "the upstream to be left alone")

    assert memory[-1] - memory[5] < GROWTH_BYTES  # until then the allocator takes its share, in steps of up to 20 MiB
    with open_store(f"sqlite:///{tmp_path}/decisions.db") as store:
        counts = await store.counts()
    blocked = ROUNDS * sum(seen.blocked for seen in _repeated(due))
    assert counts[Action.BLOCK] == blocked
    assert sum(counts.values()) == 2 * ROUNDS * STREAMS


def _repeated(due: Sequence[Seen]) -> list[Seen]:
    return [due[number % KINDS] for number in range(STREAMS)]


def main(upstream_url: str, folder: str) -> None:
    """Serve a gateway with the shipped guard until terminated; writes its port to a file once it listens."""
    guard = EdgeGuard()
    store = open_store(f"sqlite:///{folder}/decisions.db")

    async def vitals(request: Request) -> JSONResponse:
        return JSONResponse({"tasks": len(asyncio.all_tasks()), "sessions": guard.sessions})

    app = create_app(
        guard=guard,
        policy=load_policy("balanced"),
        keep=store.keep,
        upstream_url=upstream_url,
        guard_timeout_s=120.0,
        routes=[Route("/vitals", vitals)],
        on_close=[store.aclose],
    )
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(1024)
    unfinished = Path(folder) / "port.new"
    unfinished.write_text(str(listener.getsockname()[1]))
    unfinished.rename(Path(folder) / "port")
    uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2)).run([listener])


if __name__ == "__main__":
    main(*sys.argv[1:])
