"""What fails around the gateway, at every door: what the client sees, and what is kept. The table is docs/faults.md."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from fake_gen import FakeGen
from gateway.doors import DOORS, Spoken, both_ways, events_in, every_door
from serving import PATIENCE_S, POLICY, Record, make_policy, serving, wait_until
from tidegate.gateway.app import create_app
from tidegate.gateway.limits import Limit, LocalCounts
from tidegate.guards import load_guard
from tidegate.guards.breaker import Breaker, BreakerOptions
from tidegate.policy import WatchedPolicy
from tidegate.store import open_store
from tidegate.store.keys import split_token
from tidegate.testing import Die, FakeStreamGuard, FakeUpstream, Hang, Pause, Reply
from tidegate.types import CoverageState

TESTS = Path(__file__).parents[1]
FINE = ["All ", "is ", "well ", "here, ", "and more ", "comes."]
CUT_S = 0.3
"""A silence that is long enough to be given up, and short enough for a test."""


class Stage:
    """A gateway, what is behind it, and what it kept."""

    def __init__(self, url: str, upstream: FakeUpstream, guard: Any, record: Record) -> None:
        self.url, self.upstream, self.guard, self.record = url, upstream, guard, record

    def post(self, door: Spoken, text: str, *, stream: bool = False) -> httpx.Response:
        return httpx.post(
            f"{self.url}/v1{door.path}", json=door.body(text, stream=stream), timeout=httpx.Timeout(PATIENCE_S)
        )


@contextlib.contextmanager
def staged(upstream: FakeUpstream | str | None = None, guard: Any = None, **options: Any) -> Iterator[Stage]:
    guard, record = guard or FakeStreamGuard(), Record()
    fake = upstream if isinstance(upstream, FakeUpstream) else FakeUpstream()
    options = {"policy": make_policy(), "keep": record, **options}
    with serving(fake) as url:
        behind = upstream if isinstance(upstream, str) else f"{url}/v1"
        with serving(create_app(guard=guard, upstream_url=behind, **options)) as gate:
            yield Stage(gate, fake, guard, record)


def failed(body: bytes) -> list[dict[str, Any]]:
    """The errors in a stream."""
    return [one for one in events_in(body) if one.get("error") or one.get("type") in ("error", "response.failed")]


# --- the upstream -------------------------------------------------------------------------------------------------


@every_door
@both_ways
def test_an_upstream_that_refuses_connections_is_a_502(door: Spoken, stream: bool) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        with staged(f"http://127.0.0.1:{nobody.getsockname()[1]}/v1") as stage:
            answer = stage.post(door, "hi", stream=stream)

    assert answer.status_code == 502
    assert stage.record.actions == ["allow"], "what was asked is decided all the same"


@every_door
@both_ways
def test_an_upstream_that_never_begins_is_a_504(door: Spoken, stream: bool) -> None:
    with staged(FakeUpstream(Reply((), before=60)), silence_timeout_s=CUT_S) as stage:
        answer = stage.post(door, "hi", stream=stream)
        wait_until(lambda: stage.upstream.open_requests == 0, "the upstream's request to end")

    assert answer.status_code == 504
    assert stage.record.actions == ["allow"]


@every_door
def test_a_streaming_answer_that_is_longer_than_it_may_be_ends_with_an_error(door: Spoken) -> None:
    """Its text is held in memory for the decision, which says how far it was judged."""
    upstream = FakeUpstream(door.reply(["word and "] * 300, Hang(), stream=True, end=False))
    with staged(upstream, longest_stream=6000) as stage:
        body = stage.post(door, "hi", stream=True).content
        wait_until(lambda: stage.upstream.open_requests == 0, "the upstream's request to end")

    assert failed(body)
    assert len(stage.record.kept) == 2
    assert 0 < sum(part.characters for part in stage.record.kept[1][0].coverage) <= 2700


@every_door
@pytest.mark.parametrize("act", [Hang(), Die(), b"data: {broken\n\n", b"data: \xff\xfe\n\n"], ids=str)
@pytest.mark.parametrize("tail", [[], [" bomb bomb"]], ids=["safe", "unsafe"])
def test_a_stream_that_hangs_dies_or_is_garbage_ends_with_an_error_and_nothing_unjudged(
    door: Spoken, act: Any, tail: list[str]
) -> None:
    """What was judged has left; harm that was still held is blocked, and stays."""
    fake = FakeUpstream(door.reply([*FINE, *tail], act, stream=True, end=False))
    with staged(fake, silence_timeout_s=CUT_S) as stage:
        answer = stage.post(door, "hi", stream=True)
        wait_until(lambda: not stage.guard.open_sessions and not stage.upstream.open_requests, "all to be free")

    assert answer.status_code == 200
    assert failed(answer.content) or (tail and '"action":"block"' in answer.text), answer.text
    assert door.read(answer.content, stream=True).startswith("".join(FINE)[:-1])
    assert "bomb" not in answer.text
    assert "broken" not in answer.text
    assert stage.record.actions == ["allow", "block" if tail else "allow"]


# --- the guard ----------------------------------------------------------------------------------------------------


class Starving(FakeStreamGuard):
    """A guard that has no memory for one word."""

    def __init__(self) -> None:
        super().__init__(failing="")

    async def trouble_at(self, word: str) -> None:
        if word == "starve":
            raise MemoryError("cannot allocate 1.21 GiB for starve")
        await super().trouble_at(word)


TROUBLES = {
    "fails": ("guardfail", FakeStreamGuard, "GuardUnavailable"),
    "hangs": ("guardhang", FakeStreamGuard, "GuardTimeout"),
    "out of memory": ("starve", Starving, "MemoryError"),
}


@every_door
@both_ways
@pytest.mark.parametrize("trouble", TROUBLES)
@pytest.mark.parametrize("side", ["prompt", "answer"])
def test_a_guard_that_fails_hangs_or_has_no_memory_lets_nothing_out_and_is_asked_again(
    door: Spoken, stream: bool, trouble: str, side: str
) -> None:
    """As the policy says (``on_guard_error: block``), for this text; the next one is judged as ever."""
    word, made, kind = TROUBLES[trouble]
    pieces = [*FINE, f" {word} ", "hidden"] if side == "answer" else FINE
    with staged(FakeUpstream(door.reply(pieces, stream=stream)), made(), guard_timeout_s=CUT_S) as stage:
        answer = stage.post(door, word if side == "prompt" else "hi", stream=stream)
        decisions = [decision for decision, _, _ in stage.record.kept]
        stage.upstream.reply = door.reply(FINE, stream=stream)
        again = stage.post(door, "hi", stream=stream)
        wait_until(lambda: not stage.guard.open_sessions and not stage.upstream.open_requests, "all to be free")

    assert answer.status_code == 200
    assert "hidden" not in answer.text
    assert "1.21" not in answer.text
    assert [one.failure.kind for one in decisions if one.failure] == [kind]
    assert [one.action.word for one in decisions] == (["block"] if side == "prompt" else ["allow", "block"])
    assert door.read(again.content, stream=stream) == "".join(FINE)


def serve_gen(place: str, port: str) -> None:
    """A Gen guard's server, in a process of its own."""
    import uvicorn

    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", int(port)))
    listener.listen()
    Path(place).write_text(str(listener.getsockname()[1]))
    uvicorn.Server(uvicorn.Config(FakeUpstream(FakeGen()), log_level="critical", lifespan="on")).run([listener])


@contextlib.contextmanager
def gen_process(folder: Path, port: str = "0") -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    place = folder / "port"
    place.unlink(missing_ok=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(TESTS), *sys.path))}
    with subprocess.Popen([sys.executable, __file__, str(place), port], env=environment) as process:
        try:
            wait_until(lambda: place.exists() and place.read_text(), "the guard's server")
            yield process, place.read_text()
        finally:
            process.kill()


@pytest.mark.parametrize("stream", [False, True])
def test_when_the_process_of_a_remote_guard_is_killed_nothing_leaves_and_when_it_is_back_it_judges(
    tmp_path: Path, stream: bool
) -> None:
    chat = DOORS[0]
    with contextlib.ExitStack() as stack:
        process, port = stack.enter_context(gen_process(tmp_path))
        guard = load_guard(f"remote:http://127.0.0.1:{port}#guard-4b")
        stage = stack.enter_context(staged(FakeUpstream(chat.reply(FINE, stream=stream)), guard, guard_timeout_s=5.0))
        assert chat.read(stage.post(chat, "hello", stream=stream).content, stream=stream) == "".join(FINE)

        process.send_signal(signal.SIGKILL)
        process.wait(PATIENCE_S)
        refused = stage.post(chat, "are you there?", stream=stream)
        with gen_process(tmp_path, port):
            wait_until(
                lambda: chat.read(stage.post(chat, "and now?", stream=stream).content, stream=stream) == "".join(FINE),
                "the guard to be asked again",
            )

    assert refused.status_code == 200
    assert "well" not in refused.text
    failures = [decision.failure.kind for decision, _, _ in stage.record.kept if decision.failure]
    assert failures[0] == "GuardUnavailable"


@pytest.mark.parametrize("says", ["banana", "Safety: Safe\nSafety: Unsafe", "", "Safety: Perhaps\nCategories: None"])
def test_a_remote_guard_that_answers_something_else_has_said_nothing(says: str) -> None:
    """Neither safe nor unsafe: the policy's word on failures counts."""
    chat = DOORS[0]
    with serving(FakeUpstream(FakeGen(says=lambda prompt: says))) as gen:
        guard = load_guard(f"remote:{gen}#guard-4b")
        with staged(FakeUpstream(chat.reply(FINE, stream=False)), guard) as stage:
            answer = stage.post(chat, "hello")

    assert "well" not in answer.text
    (decision, _, _) = stage.record.kept[0]
    assert decision.verdict is None
    assert decision.rule == "on_guard_error"


STARVED = """
import asyncio, resource, sys
from tidegate.guards import load_guard
from tidegate.moderate import moderate
from tidegate.policy import load_policy
from tidegate.types import Conversation

async def main():
    guard = load_guard("edge")
    policy = load_policy("balanced")
    ask = lambda text: moderate(Conversation.of(text), guard=guard, policy=policy)
    await ask("hello")
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    text = "a word and another " * 400_000
    resource.setrlimit(resource.RLIMIT_AS, (used + 24 * 2**20, resource.RLIM_INFINITY))
    starved = await ask(text)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    again = await ask("hello")
    print(starved.verdict is None, starved.rule, again.action.word)

asyncio.run(main())
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux to limit the memory of a process")
def test_a_process_that_gets_no_more_memory_fails_on_that_text_or_ends_and_never_calls_it_safe() -> None:
    """What runs in native code ends the process when it gets no memory; then whoever supervises it starts it again."""
    ended = subprocess.run(
        [sys.executable, "-c", STARVED], capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip

    if ended.returncode != -signal.SIGABRT:
        assert ended.stdout.split() == ["True", "on_guard_error", "allow"], ended.stderr[-2000:]
    else:
        assert ended.stdout == ""


# --- the database -------------------------------------------------------------------------------------------------

FULL_DISK = """
import asyncio, resource, signal, sys
from pathlib import Path
from tidegate.errors import StoreError
from tidegate.store import open_store
from tidegate.types import Action, Conversation, Decision, Probabilities, Scope, Severity, Target, Verdict

async def main(url, spool):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    told, refused = [], 0
    with open_store(url, spool=Path(spool)) as store:
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, resource.RLIM_INFINITY))
        verdict = Verdict(Target.PROMPT, Severity.UNSAFE, Probabilities(0, 0, 1))
        for number in range(200):
            scope = Scope(route=str(number))
            decision = Decision(Action.BLOCK, "unsafe", "p", "0123456789ab", verdict=verdict, scope=scope)
            try:
                told.append(await store.keep(decision, Conversation.of("x" * 10_000), retention="full"))
            except StoreError:
                refused += 1
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(refused)
    print(*told)

asyncio.run(main(*sys.argv[1:]))
"""


def test_when_no_file_can_grow_what_was_acknowledged_is_kept_once_and_the_rest_is_refused(tmp_path: Path) -> None:
    """Neither the database nor the spool can be written: then no decision is acknowledged, and no answer ends well."""
    url = f"sqlite:///{tmp_path}/kept.db"
    ended = subprocess.run(
        [sys.executable, "-c", FULL_DISK, url, str(tmp_path / "spool")],
        capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]
    refused, told = ended.stdout.splitlines()

    with open_store(url, spool=tmp_path / "spool") as store:
        store.replay()
        kept = [one.id for one in store.history()]

    assert int(refused) > 0
    assert set(told.split()) <= set(kept)
    assert len(kept) == len(set(kept))


@every_door
@both_ways
def test_without_a_place_for_decisions_no_answer_ends_well(door: Spoken, stream: bool) -> None:
    """A whole one is an error; a stream breaks off with one before its end."""
    with staged(FakeUpstream(door.reply(FINE, stream=stream))) as stage:
        stage.record.broken = True
        answer = stage.post(door, "hi", stream=stream)
        wait_until(lambda: not stage.guard.open_sessions and not stage.upstream.open_requests, "all to be free")

    if stream:
        assert failed(answer.content)
        assert b"[DONE]" not in answer.content
        assert not {"message_stop", "response.completed"} & {one.get("type") for one in events_in(answer.content)}
    else:
        assert answer.status_code == 500
        assert "well" not in answer.text


# --- the client ---------------------------------------------------------------------------------------------------


def bytes_of(stage: Stage, door: Spoken, *, stream: bool) -> bytes:
    body = json.dumps(door.body("hi", stream=stream)).encode()
    head = f"POST /v1{door.path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


def hang_up(stage: Stage, sent: bytes, read: int) -> bytes:
    """Send this, read so many bytes of the answer, and break the connection off; the bytes that there were."""
    port = int(stage.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raw.sendall(sent)
        got = b""
        while len(got) < read and (part := raw.recv(read - len(got))):
            got += part
        return got


@every_door
@both_ways
def test_a_client_may_be_gone_at_any_byte_of_a_request_and_of_its_answer(door: Spoken, stream: bool) -> None:
    """Nothing is left behind: no session, no request to the upstream, no decision without its text judged."""
    with staged(FakeUpstream(door.reply(FINE, stream=stream))) as stage:
        request = bytes_of(stage, door, stream=stream)
        whole = len(hang_up(stage, request, 1 << 30))
        for place in range(0, len(request), 5):
            hang_up(stage, request[:place], 0)
        for place in range(1, whole, max(1, whole // 60)):
            read = hang_up(stage, request, place)
            ended = read.endswith(b"0\r\n\r\n" if stream else b"}")  # sooner, where words came in fewer events
            assert len(read) == place or ended
        wait_until(lambda: not stage.guard.open_sessions and not stage.upstream.open_requests, "all to be free")
        answer = stage.post(door, "hi", stream=stream)
        metrics = httpx.get(f"{stage.url}/metrics").text

    assert door.read(answer.content, stream=stream) == "".join(FINE)
    assert set(stage.record.actions) == {"allow"}
    assert "tidegate_open_streams 0.0" in metrics
    assert "tidegate_held_characters 0.0" in metrics
    for decision, talk, _ in stage.record.kept:
        judged = sum(one.characters for one in decision.coverage if one.state is CoverageState.JUDGED)
        assert judged <= sum(len(turn.content) for turn in talk.turns)


# --- changes and ends under load ----------------------------------------------------------------------------------


def test_while_the_policy_changes_under_load_each_answer_is_decided_by_one_of_them_whole(tmp_path: Path) -> None:
    chat, path = DOORS[0], tmp_path / "policy.yaml"
    texts = {"block": POLICY, "warn": POLICY.replace("action: block", "action: warn")}
    path.write_text(texts["block"])
    seen: set[tuple[str, str]] = set()
    ended = threading.Event()
    with staged(FakeUpstream(chat.reply(FINE, stream=False)), policy=WatchedPolicy(path)) as stage:

        def ask() -> None:
            while not ended.is_set():
                told = stage.post(chat, "a bomb").json()["choices"][0]
                said = "warn" if told["message"]["content"] == "".join(FINE) else "block"
                seen.add((said, "warn" if told["finish_reason"] == "stop" else "block"))

        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(ask) for _ in range(4)]
            try:
                for action in ("block", "warn", "block"):
                    beside = path.with_suffix(".new")
                    beside.write_text(texts[action])
                    beside.replace(path)
                    seen.clear()
                    wait_until(lambda action=action: (action, action) in seen, action)  # type: ignore[misc]
            finally:
                ended.set()
            for one in asked:
                one.result()

    assert {said == done for said, done in seen} == {True}
    decided = {
        (decision.policy_version, decision.action.word)
        for decision, talk, _ in stage.record.kept
        if talk.turns[-1].content == "a bomb"
    }
    assert {action for _, action in decided} == {"block", "warn"}
    assert len({version for version, _ in decided}) == len(decided) == 2


@contextlib.contextmanager
def served(upstream_url: str, folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """``tidegate serve`` with a fake guard, in a process of its own."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TIDEGATE_")}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "TIDEGATE_SHUTDOWN_TIMEOUT": "15"}
    command = [sys.executable, str(TESTS / "fake_tidegate.py"), "serve", "--port", "0", "--upstream", upstream_url]
    log = folder / "log"
    with (
        log.open("wb") as out,
        subprocess.Popen(
            [*command, "--database", f"sqlite:///{folder}/kept.db"], stdout=out, stderr=out, env=environment
        ) as process,
    ):
        try:
            wait_until(lambda: b"OpenAI API" in log.read_bytes() or process.poll() is not None, "the gateway")
            assert process.poll() is None, log.read_text()
            line = next(line for line in log.read_text().splitlines() if line.startswith("OpenAI API"))
            url = line.split()[-1]
            wait_until(lambda: _answers(url), "the gateway to answer")
            yield process, url
        finally:
            process.kill()


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/models").status_code < 600
    except httpx.TransportError:
        return False


@every_door
def test_on_sigterm_under_load_streams_end_properly_and_every_decision_is_kept(door: Spoken, tmp_path: Path) -> None:
    streams = 12
    fake = FakeUpstream(door.reply(FINE, Pause(0.4), stream=True))
    begun = threading.Barrier(streams + 1)
    with (
        serving(fake) as upstream_url,
        served(f"{upstream_url}/v1", tmp_path) as (process, url),
        ThreadPoolExecutor(streams) as pool,
    ):

        def ask(_: int) -> bytes:
            body = door.body("hi", stream=True)
            with httpx.stream("POST", f"{url}{door.path}", json=body, timeout=30) as answer:
                parts = answer.iter_bytes()
                first = next(parts)
                begun.wait(PATIENCE_S)
                return first + b"".join(parts)

        asked = [pool.submit(ask, number) for number in range(streams)]
        begun.wait(PATIENCE_S)
        process.send_signal(signal.SIGTERM)
        bodies = [one.result() for one in asked]
        process.wait(PATIENCE_S)

    assert {door.read(body, stream=True) for body in bodies} == {"".join(FINE)}
    assert not any(failed(body) for body in bodies)
    with open_store(f"sqlite:///{tmp_path}/kept.db") as store:
        assert len(list(store.history())) == 2 * streams


def test_on_sigkill_under_load_no_decision_that_a_client_was_told_is_lost_or_doubled(tmp_path: Path) -> None:
    told: list[str] = []
    enough, stop = threading.Event(), threading.Event()
    with served("http://127.0.0.1:9/v1", tmp_path) as (process, url):

        def ask(_: int) -> None:
            with contextlib.suppress(httpx.TransportError), httpx.Client() as client:
                while not stop.is_set():
                    body = {"turns": [{"role": "user", "content": "hi"}]}
                    told.append(client.post(f"{url}/guard", json=body).json()["id"])
                    if len(told) > 200:
                        enough.set()

        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(ask, number) for number in range(8)]
            assert enough.wait(PATIENCE_S)
            process.send_signal(signal.SIGKILL)
            process.wait(PATIENCE_S)
            stop.set()
            for one in asked:
                one.result()

    with open_store(f"sqlite:///{tmp_path}/kept.db") as store:
        store.replay()
        kept = [one.id for one in store.history()]
    assert set(told) <= set(kept)
    assert len(kept) == len(set(kept))


# --- clocks -------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_after_a_suspended_night_a_bucket_has_its_burst_and_no_more() -> None:
    clock = Clock()
    counts, limit = LocalCounts(clock), Limit("key/x", per_minute=6, burst=3)
    for _ in range(3):
        assert counts.count([limit], "a").full is None
    assert counts.count([limit], "a").full == "requests"

    clock.now += 10_000_000
    let_in = sum(counts.count([limit], "a").full is None for _ in range(100))

    assert let_in == 3


def test_after_a_suspended_night_a_guard_that_was_left_alone_gets_one_probe() -> None:
    clock = Clock()
    breaker = Breaker(BreakerOptions(failures=1), clock=clock)
    breaker.call().failed()
    assert breaker.state == "open"

    clock.now += 10_000_000
    breaker.call()

    assert breaker.state == "half_open"


@pytest.mark.parametrize("jump", [timedelta(days=-400), timedelta(0), timedelta(days=89), timedelta(days=400)], ids=str)
def test_a_wall_clock_that_jumps_ends_keys_by_what_it_says_and_brings_none_back_for_good(
    tmp_path: Path, jump: timedelta
) -> None:
    """The end of a key is a date: a clock that is put forward ends it early, one that is put back late. A revoked key
    stays revoked, whatever the clock says."""
    with open_store(f"sqlite:///{tmp_path}/kept.db") as store:
        keys = store.keys
        ends = datetime.now(UTC) + timedelta(days=90)
        made, token = keys.create("shop", expires=ends)
        identity, secret = split_token(token) or ("", "")
        (known,) = keys.changed_since(0)[1]
        now = datetime.now(UTC) + jump
        assert keys.admits(known, identity, secret, now) is (now < ends)
        keys.revoke(made.id)
        (known,) = keys.changed_since(0)[1]
        assert not keys.admits(known, identity, secret, now)


if __name__ == "__main__":
    serve_gen(*sys.argv[1:])
