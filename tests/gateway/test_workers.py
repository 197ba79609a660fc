"""Several workers behind one socket, and how gateways end: real processes, real signals, streams that are under way."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import httpx
import psutil
import pytest
from prometheus_client import Gauge
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

from kept import Place, url_of
from postgres import cluster
from redis_server import RedisServer
from served import PROGRAM, Served, served
from serving import POLICY, serving, until, wait_until
from tidegate.gateway.entrance import Entrance, EntranceOptions
from tidegate.gateway.telemetry import Telemetry
from tidegate.store import open_store
from tidegate.testing import text_chunks

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

        _change_policy(gateway, tmp_path)


def test_a_restart_loses_no_stream(tmp_path: Path, place: Place, gate: tuple[Gate, str]) -> None:
    """New workers take over one by one, old ones end what they have begun."""
    closed, upstream = gate
    with served(tmp_path, "--upstream", upstream, "--workers", "2", place=place) as gateway:
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


# --- under load ---------------------------------------------------------------------------------------------------


class Load:
    """Clients that stream one answer after the other, each to a question of its own, and what they were told.

    Attributes:
        acknowledged: for each question whose answer came to its end, the id of its decision.
        broken: how many answers began and broke off.
    """

    AT_ONCE: Final = 8

    def __init__(self, url: str) -> None:
        self.acknowledged: dict[str, str] = {}
        self.broken = 0
        self._url = url
        self._numbers = itertools.count()
        self._over = threading.Event()
        self._clients = [threading.Thread(target=self._ask_on, daemon=True) for _ in range(self.AT_ONCE)]
        for client in self._clients:
            client.start()

    def _ask_on(self) -> None:
        with httpx.Client(limits=httpx.Limits(max_keepalive_connections=0), timeout=60) as client:
            while not self._over.is_set():
                self._ask(client, f"About fruit number {next(self._numbers)}?")

    def _ask(self, client: httpx.Client, question: str) -> None:
        body = {"model": "m", "messages": [{"role": "user", "content": question}], "stream": True}
        text = ""
        try:
            with client.stream("POST", f"{self._url}/v1/chat/completions", json=body) as response:
                for piece in response.iter_text():
                    text += piece
        except httpx.HTTPError:
            self.broken += bool(text)
            return
        events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        (told,) = [event["tidegate"] for event in events if "tidegate" in event]
        assert text.endswith("data: [DONE]\n\n"), text
        self.acknowledged[question] = told["id"]

    def wait_for_more(self, number: int = 30) -> None:
        """Wait until some more have come to their end than now, so that all of them are of what follows."""
        enough = len(self.acknowledged) + self.AT_ONCE + number
        wait_until(lambda: len(self.acknowledged) >= enough, "more answers", patience_s=120)

    def last(self, stop: Callable[[], None]) -> None:
        """Stop the gateway under these clients, and let them end; no answer that had begun may break off by that."""
        broken = self.broken
        stop()
        wait_until(lambda: _refused(self._url), "the end of the listening", patience_s=60)
        self._over.set()
        for client in self._clients:
            client.join(60)
            assert not client.is_alive(), "a client did not end"
        assert self.broken == broken

    def check(self, place: Place) -> None:
        """Count what was kept: nothing acknowledged is lost, and nothing is there twice."""
        with place.open() as store:
            store.replay()
            kept = list(store.history())
        found = Counter((one.conversation.turns[0].content, len(one.conversation.turns)) for one in kept)

        assert set(self.acknowledged.values()) - {one.id for one in kept} == set()
        assert {(question, turns) for question in self.acknowledged for turns in (1, 2)} - set(found) == set()
        assert {which: number for which, number in found.items() if number > 1} == {}
        assert not list(place.spool.glob("*.damaged"))


def _lose_a_worker(gateway: Served, load: Load) -> None:
    """It is replaced, and at most what was under way breaks off."""
    before, broken = gateway.workers, load.broken
    os.kill(min(before), signal.SIGKILL)
    load.wait_for_more()
    wait_until(lambda: len(gateway.workers - {min(before)}) == 2, "another worker", patience_s=60)
    assert load.broken - broken <= Load.AT_ONCE


def _change_policy(gateway: Served, folder: Path) -> None:
    version = httpx.get(f"{gateway.url}/healthz", timeout=60).json()["policy"]["version"]
    old = f'tidegate_policy_info{{name="test",version="{version}"}}'
    wait_until(lambda: gateway.metric(old) == 1, "the policy's number")
    (folder / "policy.yaml").write_text(POLICY.replace("Not here.", "Not now."))
    wait_until(lambda: gateway.metric(old) == 0, "the new policy in all workers", patience_s=60)


async def _paced(request: Request) -> StreamingResponse:
    """An answer that takes a while, so that there are always some under way."""

    async def events() -> Any:
        for one in text_chunks([FIRST, "Pears are not. ", "Nor are plums."]):
            yield f"data: {json.dumps(one)}\n\n"
            await asyncio.sleep(0.02)
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


@pytest.fixture
def paced() -> Iterator[str]:
    with serving(Starlette(routes=[Route("/v1/chat/completions", _paced, methods=["POST"])])) as url:
        yield f"{url}/v1"


def test_under_load_no_decision_is_lost_or_doubled_by_a_worker_that_dies_or_by_the_end(
    tmp_path: Path, place: Place, paced: str
) -> None:
    """And a changed policy reaches all workers meanwhile."""
    with served(tmp_path, "--upstream", paced, "--workers", "2", place=place) as gateway:
        load = Load(gateway.url)
        load.wait_for_more()
        _lose_a_worker(gateway, load)
        _change_policy(gateway, tmp_path)
        load.wait_for_more()
        load.last(gateway.process.terminate)
        gateway.process.wait(60)

        load.check(place)


def test_under_load_workers_lose_and_double_nothing_when_postgresql_and_redis_die_with_one_of_them(
    tmp_path: Path, paced: str, redis: RedisServer
) -> None:
    """What waits in the spool of the dead worker is brought to the database by the others."""
    with cluster() as server:
        if server is None:
            pytest.skip("PostgreSQL is not installed")
        place = Place(server.url, tmp_path)
        arguments = ("--upstream", paced, "--workers", "2")
        with served(tmp_path, *arguments, place=place, redis_url=redis.url, verdict_memory="1000") as gateway:
            load = Load(gateway.url)
            load.wait_for_more()
            assert gateway.metric("tidegate_redis_up") == 1
            server.kill()
            redis.kill()
            load.wait_for_more()
            assert any(path.stat().st_size for path in place.spool.glob("*.spool"))
            _lose_a_worker(gateway, load)
            server.start()
            redis.start()
            wait_until(lambda: gateway.metric("tidegate_redis_up") == 1, "Redis", patience_s=60)
            wait_until(lambda: not any(place.spool.glob("*.spool")), "the replay", patience_s=60)
            load.wait_for_more()
            load.last(gateway.process.terminate)
            gateway.process.wait(60)

            load.check(place)


def test_workers_count_together_with_a_redis(tmp_path: Path, redis: RedisServer) -> None:
    """Ten at once is ten of both, not of each."""
    place = Place(url_of(tmp_path / "kept.db"), tmp_path)
    with place.open() as store:
        _, key = store.keys.create("shop")
    limits = {"tenant_per_minute": "1", "tenant_burst": "10", "auth": "keys"}
    with served(tmp_path, "--workers", "2", place=place, redis_url=redis.url, **limits) as gateway:
        first, second = gateway.workers
        statuses: list[int] = []
        clients: list[httpx.Client] = []
        try:
            while len(statuses) < 30 or not (gateway.streams_of(first) and gateway.streams_of(second)):
                assert len(clients) < 100, "one worker does all the work"
                clients.append(httpx.Client(base_url=gateway.url, timeout=60))
                asked = clients[-1].post(
                    "/v1/moderations", json={"input": "apple pie"}, headers={"authorization": f"Bearer {key}"}
                )
                statuses.append(asked.status_code)
        finally:
            for client in clients:
                client.close()

    assert Counter(statuses) == {200: 10, 429: len(statuses) - 10}


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
