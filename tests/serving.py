"""Real servers for tests: an ASGI app on uvicorn in a thread, and a gateway in a process of its own.

Run as a program it is that gateway: a fake guard that judges by words, and a file as its record of decisions.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import uvicorn

from tidegate.gateway.app import HealthTexts, create_app
from tidegate.gateway.draining import DrainingWebSockets
from tidegate.policy import Policy, parse_policy
from tidegate.testing import FakeStreamGuard
from tidegate.types import Conversation, Decision

PATIENCE_S = 20.0
"""How long anything may take before a test gives up; nothing is expected to take that long."""

POLICY = """
name: test
on_guard_error: block
otherwise: allow
controversial: review
debounce: 2
retention: full
message: Not here.
rules:
  - {name: unsafe, severity: unsafe, action: block}
"""


def make_policy(text: str = POLICY, **changes: Any) -> Policy:
    """The policy of the gateway process, with changes to its top level."""
    lines = [line for line in text.splitlines() if line.partition(":")[0] not in changes]
    return parse_policy("\n".join((*(f"{name}: {value}" for name, value in changes.items()), *lines)))


def wait_until(condition: Callable[[], Any], what: str = "the condition", *, patience_s: float = PATIENCE_S) -> None:
    """Wait until something is so; fails after a generous time."""
    limit = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < limit, f"waited in vain for {what}"
        time.sleep(0.005)


async def until(condition: Callable[[], Any], what: str = "the condition", *, patience_s: float = PATIENCE_S) -> None:
    """The same, for async tests."""
    limit = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < limit, f"waited in vain for {what}"
        await asyncio.sleep(0.005)


@contextlib.contextmanager
def serving(app: Any, **options: Any) -> Iterator[str]:
    """Serve an ASGI app on a free port in a thread; gives its address. Options are uvicorn's."""
    listener = socket.socket(proto=socket.IPPROTO_TCP)  # else asyncio leaves Nagle on, and each answer waits 40 ms
    listener.bind(("127.0.0.1", 0))
    usual: Any = {"log_level": "critical", "ws": DrainingWebSockets, "timeout_graceful_shutdown": 2, "lifespan": "on"}
    config = uvicorn.Config(app, **{**usual, **options})
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])), daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started, "the server to start")
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(PATIENCE_S)
        listener.close()
        assert not thread.is_alive(), "the server did not stop"


class Record:
    """A ``keep`` that remembers: every decision with the texts of its last turn."""

    def __init__(self) -> None:
        self.kept: list[tuple[Decision, Conversation, str]] = []
        self.broken = False

    async def __call__(self, decision: Decision, conversation: Conversation, *, retention: str) -> str:
        if self.broken:
            raise OSError("the disk is full")
        self.kept.append((decision, conversation, retention))
        return f"d{len(self.kept)}"

    @property
    def actions(self) -> list[str]:
        return [decision.action.word for decision, _, _ in self.kept]


@dataclass
class Gateway:
    """A gateway process, seen from outside."""

    POLICY: ClassVar[str] = POLICY
    url: str
    record: Path
    log: Path

    @property
    def base_url(self) -> str:
        return f"{self.url}/v1"

    def forget(self) -> None:
        self.record.write_text("")

    def kept(self) -> list[dict[str, Any]]:
        """The decisions that were kept since the test began."""
        return [json.loads(line) for line in self.record.read_text().splitlines()]


@contextlib.contextmanager
def gateway_process(upstream_url: str, folder: Path) -> Iterator[Gateway]:
    """Run this file as a gateway."""
    record, log, place = folder / "record.jsonl", folder / "log.txt", folder / "port"
    record.touch()
    command = [sys.executable, __file__, upstream_url, str(record), str(place)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            wait_until(lambda: place.exists() or process.poll() is not None, "the gateway process")
            assert process.poll() is None, log.read_text()
            yield Gateway(f"http://127.0.0.1:{place.read_text()}", record, log)
        finally:
            process.terminate()
            process.wait(PATIENCE_S)


class _FileRecord:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._count = 0

    async def __call__(self, decision: Decision, conversation: Conversation, *, retention: str) -> str:
        self._count += 1
        turn = conversation.turns[-1]
        row = {
            "action": decision.action.word,
            "rule": decision.rule,
            "severity": decision.verdict.severity.word if decision.verdict else None,
            "failure": decision.failure.kind if decision.failure else None,
            "coverage": [(part.path, part.state.value, part.characters) for part in decision.coverage],
            "content": turn.content,
            "reasoning": turn.reasoning,
            "retention": retention,
        }
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        return f"d{self._count}"


def main(upstream_url: str, record: str, place: str) -> None:
    """Serve a gateway with a fake guard until terminated; writes its port to a file once it listens."""
    app = create_app(
        guard=FakeStreamGuard(),
        policy=parse_policy(POLICY),
        keep=_FileRecord(Path(record)),
        upstream_url=upstream_url,
        guard_timeout_s=1.0,
        silence_timeout_s=5.0,
        longest_body=1024 * 1024,
        health=HealthTexts("apple pie", "a bomb"),
    )
    listener = socket.socket(proto=socket.IPPROTO_TCP)  # else asyncio leaves Nagle on, and each answer waits 40 ms
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    unfinished = Path(f"{place}.new")
    unfinished.write_text(str(listener.getsockname()[1]))
    unfinished.rename(place)
    uvicorn.Server(uvicorn.Config(app, log_level="info", timeout_graceful_shutdown=2)).run([listener])


if __name__ == "__main__":
    main(*sys.argv[1:])
