"""A guard that is another Tidegate: what is its own, beside what test_contract.py asks of all guards."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from serving import PATIENCE_S, Record, make_policy, serving, until, wait_until
from streams import assert_covers, assert_same, streamed
from tidegate.errors import (
    GuardError,
    GuardOverloaded,
    GuardTimeout,
    GuardUnavailable,
    InputError,
    UnreadableVerdict,
)
from tidegate.gateway.app import create_app
from tidegate.gateway.draining import DrainingWebSockets
from tidegate.gateway.live import LiveLimits
from tidegate.guards import load_guard
from tidegate.guards.edge import EdgeGuard
from tidegate.guards.tidegate_live import TidegateConfig, TidegateGuard, read_config
from tidegate.testing import FakeStreamGuard
from tidegate.types import Conversation, Role, Severity, Target, ToolCall, Turn

TEXT = "how do i bake a bread with a bomb bomb and then some more of it"


@contextlib.contextmanager
def a_server(**options: Any) -> Iterator[str]:
    with serving(create_app(**{"guard": FakeStreamGuard(), "policy": make_policy(), **options})) as url:
        yield url


class Restarted:
    """A server that can be killed and started again at the same address."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._port = 0
        self._server: uvicorn.Server | None = None

    def start(self) -> None:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self._port))
        self._port = listener.getsockname()[1]
        options: Any = {"ws": DrainingWebSockets, "timeout_graceful_shutdown": 1, "lifespan": "off"}
        server = self._server = uvicorn.Server(uvicorn.Config(self._app, log_level="critical", **options))
        self._thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        self._thread.start()
        wait_until(lambda: server.started, "the server to start")

    def stop(self) -> None:
        assert self._server is not None
        self._server.should_exit = True
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[str, Record]]:
    record = Record()
    with a_server(keep=record) as url:
        yield url, record


async def test_a_conversation_gets_the_verdict_of_the_servers_guard_signed_for_both(shared: tuple[str, Record]) -> None:
    turns = (
        Turn(Role.USER, "look it up \ud83d"),
        Turn(Role.ASSISTANT, "", "hm", (ToolCall("shop", "{}"),)),
        Turn(Role.TOOL, "nothing"),
        Turn(Role.ASSISTANT, "a bomb", "hm"),
    )
    async with load_guard(f"tidegate:{shared[0]}") as guard:  # type: ignore[attr-defined]
        assert guard.name == "tidegate"
        verdict = await guard.judge(Conversation(turns))
        named = guard.name

    direct = await FakeStreamGuard().judge(Conversation(turns))
    assert named == verdict.guard == "tidegate[fake/1]"
    assert verdict.target is Target.RESPONSE
    assert (verdict.severity, verdict.categories) == (direct.severity, direct.categories)
    assert verdict.probabilities == direct.probabilities
    assert verdict.category_probabilities == direct.category_probabilities
    assert shared[1].kept[-1][1].turns[1:] == turns[1:]


async def test_the_edge_guard_behind_a_server_says_what_it_says_here() -> None:
    text = "Use the command kill with the number of the process, and it will be gone. 🍞 Why?"
    async with EdgeGuard() as edge:
        here = await streamed(edge.open(Conversation.of("How do I kill a process?")), [text])
        judged = await edge.judge(Conversation.of("How?", text))
    with a_server(guard=EdgeGuard()) as url:
        async with TidegateGuard(TidegateConfig(url=url)) as guard:
            there = await streamed(guard.open(Conversation.of("How do I kill a process?")), [text[:30], text[30:]])
            again = await guard.judge(Conversation.of("How?", text))

    assert_same(there, here)
    assert again.probabilities.unsafe == pytest.approx(judged.probabilities.unsafe, abs=1e-5)
    assert (again.severity, again.span) == (judged.severity, judged.span)


async def test_a_text_that_the_servers_policy_would_stop_is_judged_to_its_end_and_its_decision_kept(
    shared: tuple[str, Record],
) -> None:
    url, record = shared
    record.kept.clear()
    async with TidegateGuard(TidegateConfig(url=url)) as guard:
        tokens = await streamed(guard.open(None), [TEXT])

    assert_covers(tokens, TEXT)
    assert max(token.severity for token in tokens) is Severity.UNSAFE
    decision = record.kept[0][0]
    assert decision.action.word == "allow"
    assert decision.observed is not None
    assert decision.observed.action.word == "block"


async def test_many_sessions_share_a_connection_and_more_than_it_takes_get_another() -> None:
    with a_server(live=LiveLimits(streams=8)) as url:
        async with TidegateGuard(TidegateConfig(url=url)) as guard:
            sessions = [guard.open(None) for _ in range(20)]
            for session in sessions:
                await session.feed("some bread ")
            connections = len(guard._connections)
            rest = await asyncio.gather(*(session.finish() for session in sessions))

    assert connections == 3
    assert len(rest) == 20


async def test_a_text_longer_than_the_servers_window_is_sent_in_parts() -> None:
    text = "some bread and more " * 40
    with a_server(live=LiveLimits(stream_characters=64)) as url:
        async with TidegateGuard(TidegateConfig(url=url)) as guard:
            assert_covers(await streamed(guard.open(None), [text]), text)


async def test_a_session_lives_through_a_restart_of_the_server() -> None:
    """What was said is not said again, and what follows is as if nothing had happened."""
    server = Restarted(create_app(guard=FakeStreamGuard(), policy=make_policy()))
    alone = await streamed(FakeStreamGuard().open(None), [TEXT])
    server.start()
    async with TidegateGuard(TidegateConfig(url=server.url)) as guard:
        sessions = [guard.open(None) for _ in range(5)]
        said = [list(await session.feed(TEXT[:30])) for session in sessions]
        await asyncio.to_thread(server.stop)
        feeds = [asyncio.create_task(session.feed(TEXT[30:])) for session in sessions]
        await asyncio.sleep(0)
        await asyncio.to_thread(server.start)
        for place, session in enumerate(sessions):
            said[place] += [*await feeds[place], *await session.finish()]
    await asyncio.to_thread(server.stop)

    assert said == [alone] * 5


async def test_a_session_whose_stream_the_server_ended_goes_on_in_another() -> None:
    record = Record()
    alone = await streamed(FakeStreamGuard().open(None), [TEXT])
    with a_server(keep=record, live=LiveLimits(idle_s=0.05)) as url:
        async with TidegateGuard(TidegateConfig(url=url)) as guard:
            session = guard.open(None)
            said = list(await session.feed(TEXT[:30]))
            await until(lambda: record.kept, "the stream to be ended")
            said += [*await session.feed(TEXT[30:]), *await session.finish()]

    assert said == alone


async def test_a_server_that_stays_away_is_a_failure_after_some_patience(unused_tcp_port: int) -> None:
    config = TidegateConfig(url=f"ws://127.0.0.1:{unused_tcp_port}", patience_s=0.1, connect_timeout_s=1)
    async with TidegateGuard(config) as guard:
        session = guard.open(None)
        with pytest.raises(GuardUnavailable, match="cannot be reached"):
            await session.feed("some bread ")
        with pytest.raises(GuardUnavailable, match="cannot be reached"):
            await guard.judge(Conversation.of("x"))
    assert guard.sessions == 0


@pytest.mark.parametrize("kind", [GuardUnavailable, GuardOverloaded, GuardTimeout, UnreadableVerdict])
async def test_a_failure_of_the_servers_guard_is_the_same_failure_here(kind: type[GuardError]) -> None:
    fake = FakeStreamGuard(failing="crash", error=kind("the secret"))
    with a_server(guard=fake, policy=make_policy(on_guard_error="allow")) as url:
        async with TidegateGuard(TidegateConfig(url=url)) as guard:
            for call in (guard.open(None).feed("then crash there "), guard.judge(Conversation.of("crash"))):
                with pytest.raises(kind) as raised:
                    await call
                assert type(raised.value) is kind
                assert "secret" not in str(raised.value)


async def test_a_server_that_does_not_answer_in_time_is_a_timeout() -> None:
    release = threading.Event()

    class Slow(FakeStreamGuard):
        async def trouble(self) -> None:
            await asyncio.to_thread(release.wait, PATIENCE_S)

    with a_server(guard=Slow()) as url:
        async with TidegateGuard(TidegateConfig(url=url, timeout_s=0.1)) as guard:
            with pytest.raises(GuardTimeout):
                await guard.open(None).feed("some bread ")
            with pytest.raises(GuardTimeout):
                await guard.judge(Conversation.of("x"))
        release.set()


async def test_a_session_that_is_closed_or_forgotten_is_closed_on_the_server_too() -> None:
    fake, record = FakeStreamGuard(), Record()
    with a_server(guard=fake, keep=record) as url:
        async with TidegateGuard(TidegateConfig(url=url)) as guard:
            closed, forgotten = guard.open(None), guard.open(None)
            for session in (closed, forgotten):
                await session.feed("some bread and ")
            assert fake.open_sessions == 2
            closed.close()
            await until(lambda: fake.open_sessions == 1, "the session to be closed")
            del session, forgotten
            gc.collect()
            await until(lambda: fake.open_sessions == 0, "the forgotten session to be closed")
            assert guard.streams == 0
    assert len(record.kept) == 2


async def test_closing_the_guard_ends_what_waits() -> None:
    release = threading.Event()

    class Slow(FakeStreamGuard):
        async def trouble(self) -> None:
            await asyncio.to_thread(release.wait, PATIENCE_S)

    with a_server(guard=Slow()) as url:
        guard = TidegateGuard(TidegateConfig(url=url))
        feed = asyncio.create_task(guard.open(None).feed("some bread "))
        await until(lambda: guard.streams == 1, "the stream to be opened")
        await guard.close()
        with pytest.raises(GuardUnavailable):
            await feed
        with pytest.raises(GuardUnavailable, match="closed"):
            guard.open(None)
        release.set()


# --- servers that are not what they should be ---------------------------------------------------------------------


def answering(status: int, hello: Any = None) -> Starlette:
    """A server that refuses, or says something else than hello."""
    seen: list[str | None] = []

    async def judge(request: Request) -> JSONResponse:
        seen.append(request.headers.get("authorization"))
        return JSONResponse({"some": "thing"}, status)

    async def live(websocket: WebSocket) -> None:
        seen.append(websocket.headers.get("authorization"))
        if hello is None:
            await websocket.send_denial_response(JSONResponse({}, status))
            return
        await websocket.accept("tidegate.live.v1")
        await websocket.send_text(hello)
        await websocket.receive()

    app = Starlette(routes=[Route("/v1/guard", judge, methods=["POST"]), WebSocketRoute("/v1/live", live)])
    app.state.seen = seen
    return app


@pytest.mark.parametrize(("status", "said"), [(401, "key"), (403, "key"), (404, "no /v1/live"), (400, "live.v1")])
async def test_a_server_that_refuses_for_good_is_not_asked_again(status: int, said: str, tmp_path: Path) -> None:
    app = answering(status)
    (tmp_path / "key").write_text("sk-9\n")
    with serving(app) as url:
        (tmp_path / "guard.yaml").write_text(f"url: {url}\nkey_file: {tmp_path / 'key'}\n")
        guard = load_guard(f"tidegate:{tmp_path / 'guard.yaml'}")
        with pytest.raises(GuardUnavailable, match=said):
            await guard.open(None).feed("some bread ")
        with pytest.raises(GuardError):
            await guard.judge(Conversation.of("x"))
        await guard.close()

    assert app.state.seen == ["Bearer sk-9"] * 2


@pytest.mark.parametrize("hello", ["{", "[]", '{"type": "hello"}', '{"type": "hello", "guard": "x", "limits": {}}'])
async def test_a_server_that_says_something_else_is_unreadable(hello: str) -> None:
    with serving(answering(200, hello)) as url:
        async with TidegateGuard(TidegateConfig(url=url)) as guard:
            with pytest.raises(UnreadableVerdict):
                await guard.open(None).feed("some bread ")
            with pytest.raises(UnreadableVerdict):
                await guard.judge(Conversation.of("x"))


@pytest.mark.parametrize(
    "frame",
    [
        {"type": "step", "stream": 1},
        {"type": "step", "stream": 1, "taken": 5, "failure": None, "tokens": [{"start": 0}]},
        {"type": "step", "stream": 1, "taken": 5, "failure": {}, "tokens": []},
        {"type": "step", "stream": 1, "taken": None, "failure": None, "tokens": []},
    ],
)
async def test_frames_that_are_none_are_unreadable(frame: dict[str, Any]) -> None:
    async def live(websocket: WebSocket) -> None:
        await websocket.accept("tidegate.live.v1")
        limits = {"streams": 9, "stream_characters": 99}
        await websocket.send_json({"type": "hello", "guard": "x", "limits": limits})
        await websocket.receive()
        await websocket.send_text(json.dumps(frame))
        while (await websocket.receive())["type"] != "websocket.disconnect":
            pass

    with serving(Starlette(routes=[WebSocketRoute("/v1/live", live)])) as url:
        async with TidegateGuard(TidegateConfig(url=url)) as guard:
            with pytest.raises(UnreadableVerdict):
                await guard.open(None).feed("some bread ")


# --- specs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rest", "url", "live"),
    [
        ("ws://host:8080", "http://host:8080", "ws://host:8080/v1/live"),
        ("wss://host", "https://host", "wss://host/v1/live"),
        ("http://host:8080/v1", "http://host:8080", "ws://host:8080/v1/live"),
        ("https://host/behind/", "https://host/behind", "wss://host/behind/v1/live"),
    ],
)
def test_an_address_says_where_both_doors_are(rest: str, url: str, live: str) -> None:
    config = read_config(rest)

    assert (config.url, config.live_url) == (url, live)


@pytest.mark.parametrize(
    ("rest", "said"),
    [
        ("", "or tidegate:URL"),
        ("ftp://host", "expected an address such as ws://"),
        ("ws://user:secret@host", "key_file"),
        ("ws://host?x=1", "no \\?query"),
        ("nowhere.yaml", "cannot read the file"),
    ],
)
def test_a_spec_that_cannot_be_used_is_told(rest: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as raised:
        load_guard(f"tidegate:{rest}")
    assert "secret" not in str(raised.value)


def test_a_file_with_an_unknown_key_is_told_where(tmp_path: Path) -> None:
    path = tmp_path / "guard.yaml"
    path.write_text("url: ws://host\nkeyfile: x\n")
    with pytest.raises(InputError, match="keyfile: unknown key"):
        load_guard(f"tidegate:{path}")
