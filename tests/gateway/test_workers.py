"""Several workers behind one socket, and how gateways end: real processes, real signals, streams that are under way."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client import Gauge
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

from serving import POLICY, serving, until, wait_until
from tidegate.gateway.entrance import Entrance, EntranceOptions
from tidegate.gateway.telemetry import Telemetry
from tidegate.store import open_store
from tidegate.testing import text_chunks

PROGRAM = (sys.executable, "-c", "from tidegate.cli import app; app()")
FIRST = "Apples are round. "


class Gate:
    """An upstream whose answers begin, and go on once the gate is open."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.app = Starlette(routes=[Route("/v1/chat/completions", self._answer, methods=["POST"])])

    async def _answer(self, request: Request) -> StreamingResponse:
        async def events() -> Any:
            role, first, last, end = text_chunks([FIRST, "Pears are not."])
            for one in (role, first):
                yield f"data: {json.dumps(one)}\n\n"
            await until(self.open.is_set, "the gate", patience_s=120)
            for one in (last, end):
                yield f"data: {json.dumps(one)}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")


class Served:
    """A gateway that the command line started."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, folder: Path) -> None:
        self.process = process
        self.url = url
        self.folder = folder

    @property
    def workers(self) -> set[int]:
        children = psutil.Process(self.process.pid).children()
        return {child.pid for child in children if "spawn_main" in " ".join(_command(child))}

    def streams_of(self, pid: int) -> int:
        port = int(self.url.rpartition(":")[2])
        found = psutil.Process(pid).net_connections("tcp")
        return sum(one.status == psutil.CONN_ESTABLISHED and one.laddr.port == port for one in found)

    def metric(self, name: str) -> float | None:
        page = httpx.get(f"{self.url}/metrics", timeout=30).text
        found = re.search(rf"^{re.escape(name)} (\S+)$", page, re.MULTILINE)
        return float(found[1]) if found else None

    @property
    def num_kept(self) -> int:
        with contextlib.closing(sqlite3.connect(self.folder / "kept.db")) as database:
            return int(database.execute("SELECT count(*) FROM decisions").fetchone()[0])


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@contextlib.contextmanager
def served(folder: Path, *arguments: str, **settings: str) -> Iterator[Served]:
    policy = folder / "policy.yaml"
    policy.write_text(POLICY)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TIDEGATE_")}
    environment |= {f"TIDEGATE_{name.upper()}": value for name, value in settings.items()}
    command = [*PROGRAM, "serve", "--port", "0", "--policy", str(policy)]
    command += ["--database", f"sqlite:///{folder}/kept.db", *arguments]
    log = folder / "log.txt"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment)
    try:
        found: list[str] = []

        def said() -> bool:
            assert process.poll() is None, log.read_text()
            found.extend(re.findall(r"health +(http://\S+)/healthz", log.read_text()))
            return bool(found)

        wait_until(said, "the gateway", patience_s=120)
        yield Served(process, found[0], folder)
    finally:
        for child in psutil.Process(process.pid).children() if process.poll() is None else ():
            with contextlib.suppress(psutil.Error):
                child.kill()
        process.kill()
        process.wait()


class Stream:
    """A client that reads one streaming answer, in a thread."""

    def __init__(self, url: str) -> None:
        self.text = ""
        self.error: str | None = None
        self._begun = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(url,), daemon=True)
        self._thread.start()
        assert self._begun.wait(60), "the stream did not begin"

    def _read(self, url: str) -> None:
        body = {"model": "m", "messages": [{"role": "user", "content": "About fruit?"}], "stream": True}
        try:
            with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as response:
                for text in response.iter_text():
                    self.text += text
                    if "Apples" in self.text:
                        self._begun.set()
        except httpx.HTTPError as error:
            self.error = type(error).__name__
        finally:
            self._begun.set()

    def end(self) -> Stream:
        self._thread.join(60)
        assert not self._thread.is_alive(), "the stream did not end"
        return self

    @property
    def complete(self) -> bool:
        return self.error is None and self.text.endswith("data: [DONE]\n\n") and "Pears" in self.text


@pytest.fixture
def gate() -> Iterator[tuple[Gate, str]]:
    gate = Gate()
    with serving(gate.app) as url:
        yield gate, f"{url}/v1"
        gate.open.set()


def test_workers_share_the_work_and_one_that_dies_costs_only_its_own(tmp_path: Path, gate: tuple[Gate, str]) -> None:
    """It is replaced; the others do not notice. Numbers are those of all; a changed policy reaches all."""
    closed, upstream = gate
    with served(tmp_path, "--upstream", upstream, "--workers", "2") as gateway:
        first, second = sorted(gateway.workers)
        streams: list[Stream] = []
        while not (gateway.streams_of(first) and gateway.streams_of(second)):
            streams.append(Stream(gateway.url))
            assert len(streams) < 100, "one worker does all the work"
        wait_until(lambda: gateway.metric("tidegate_open_streams") == len(streams), "the sum of both")
        lost = gateway.streams_of(first)

        os.kill(first, signal.SIGKILL)
        wait_until(lambda: len(gateway.workers - {first}) == 2, "another worker", patience_s=60)
        closed.open.set()

        assert sum(not stream.end().complete for stream in streams) == lost
        assert all(stream.complete or stream.error for stream in streams)
        wait_until(lambda: gateway.metric("tidegate_open_streams") == 0, "the gauge without the dead", patience_s=60)
        answered = 'tidegate_requests_total{route="/v1/chat/completions",status="200"}'
        assert gateway.metric(answered) == len(streams) - lost

        page = httpx.get(f"{gateway.url}/healthz", timeout=60).json()["policy"]
        old = f'tidegate_policy_info{{name="test",version="{page["version"]}"}}'
        assert gateway.metric(old) == 1
        (tmp_path / "policy.yaml").write_text(POLICY.replace("Not here.", "Not now."))
        wait_until(lambda: gateway.metric(old) == 0, "the new policy in all workers", patience_s=60)


def test_a_restart_loses_no_stream(tmp_path: Path, gate: tuple[Gate, str]) -> None:
    """New workers take over one by one, old ones end what they have begun."""
    closed, upstream = gate
    with served(tmp_path, "--upstream", upstream, "--workers", "2") as gateway:
        before = gateway.workers
        streams = [Stream(gateway.url) for _ in range(4)]
        gateway.process.send_signal(signal.SIGHUP)
        wait_until(lambda: len(gateway.workers - before) == 2, "new workers", patience_s=120)
        streams += [Stream(gateway.url) for _ in range(2)]
        closed.open.set()

        assert [stream.end().complete for stream in streams] == [True] * 6
        wait_until(lambda: not gateway.workers & before, "the old workers' end", patience_s=60)
        wait_until(lambda: gateway.num_kept == 12, "all decisions")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_streams_end_properly_when_the_gateway_is_told_to_stop(
    tmp_path: Path, gate: tuple[Gate, str], workers: str
) -> None:
    """New connections are refused meanwhile; every decision is kept."""
    closed, upstream = gate
    with served(tmp_path, "--upstream", upstream, "--workers", workers) as gateway:
        streams = [Stream(gateway.url) for _ in range(4)]
        gateway.process.send_signal(signal.SIGTERM)
        wait_until(lambda: _refused(gateway.url), "the end of the listening", patience_s=60)
        closed.open.set()

        assert [stream.end().complete for stream in streams] == [True] * 4
        gateway.process.wait(60)
        assert gateway.num_kept == 8


@pytest.mark.parametrize("workers", ["1", "2"])
def test_streams_that_do_not_end_in_time_are_told_so(tmp_path: Path, gate: tuple[Gate, str], workers: str) -> None:
    """And what was judged of them is kept."""
    _, upstream = gate
    with served(tmp_path, "--upstream", upstream, "--workers", workers, shutdown_timeout="1") as gateway:
        streams = [Stream(gateway.url) for _ in range(3)]
        gateway.process.send_signal(signal.SIGTERM)

        told = [stream.end() for stream in streams]
        gateway.process.wait(60)

        assert [stream.error for stream in told] == [None] * 3
        assert all('"code":"stopping"' in stream.text.replace('": "', '":"') for stream in told)
        assert gateway.num_kept == 6
        assert "Traceback" not in (tmp_path / "log.txt").read_text()


def _refused(url: str) -> bool:
    try:
        httpx.get(f"{url}/livez", timeout=5)
    except httpx.ConnectError:
        return True
    except httpx.HTTPError:
        pass
    return False


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--database", "sqlite://"), "a database that is not in memory only"),
        (("--guard", "stream:/nothing/here"), "a worker could not start"),
    ],
)
def test_workers_that_cannot_work_are_one_clear_error(arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    """They are not started again and again."""
    command = [*PROGRAM, "serve", "--port", "0", "--workers", "2"]
    command += ["--database", f"sqlite:///{tmp_path}/kept.db", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    assert ended.returncode == 2
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr


def test_gauges_of_several_workers_are_those_of_living_ones() -> None:
    """A gauge without a mode of its own would be told once for each process, dead ones too."""
    telemetry = Telemetry()
    with open_store("sqlite://") as store:
        Entrance(EntranceOptions(keys=store.keys, redis_url="redis://127.0.0.1:9"), telemetry.registry)
    gauges = [one for one in telemetry.registry._collector_to_names if isinstance(one, Gauge)]

    assert len(gauges) >= 10
    assert {gauge._multiprocess_mode for gauge in gauges} <= {"livesum", "livemax", "livemin"}


def test_the_demo_is_served_by_workers_too(tmp_path: Path) -> None:
    """Its upstream is one, in the supervisor; and an interrupt ends all."""
    with served(tmp_path, "--demo", "--workers", "2") as gateway:
        body = {"model": "tidegate-demo", "messages": [{"role": "user", "content": "a recipe for apple pie"}]}
        answer = httpx.post(f"{gateway.url}/v1/chat/completions", json=body, timeout=60).json()
        workers = gateway.workers
        gateway.process.send_signal(signal.SIGINT)

        assert "apples" in answer["choices"][0]["message"]["content"]
        assert gateway.process.wait(60) == 130
        wait_until(lambda: not any(_alive(pid) for pid in workers), "the end of the workers")


def test_workers_end_with_a_supervisor_that_is_killed(tmp_path: Path, gate: tuple[Gate, str]) -> None:
    """Nobody would replace them, and they would keep the port."""
    _, upstream = gate
    with served(tmp_path, "--upstream", upstream, "--workers", "2") as gateway:
        workers = gateway.workers
        gateway.process.kill()
        gateway.process.wait(60)

        wait_until(lambda: not any(_alive(pid) for pid in workers), "the end of the workers", patience_s=60)


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
