"""The life of an exchange, for any door: a protocol made up for the test speaks through all of it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from serving import Record, make_policy, serving
from tidegate.errors import UpstreamError
from tidegate.gateway.app import create_app
from tidegate.gateway.asked import Asked, Said, prompt_of
from tidegate.gateway.channels import Judging
from tidegate.gateway.exchange import Behind, Endpoint
from tidegate.gateway.schemas import refuse
from tidegate.gateway.statuses import Problem
from tidegate.gateway.telemetry import Telemetry
from tidegate.gateway.upstream import KeyHeader, Upstream
from tidegate.moderate import Retry
from tidegate.settings import Continues
from tidegate.testing import FakeStreamGuard, FakeUpstream, Reply, completion
from tidegate.types import Role, Turn


class Echo:
    """A stream of plain lines, each of which leaves as it came; only to see what an exchange does with it."""

    def __init__(self) -> None:
        self.done = self.complete = False
        self.error: UpstreamError | None = None
        self.released = 0
        self.closed = 0
        self.retry = None
        self.due_s: float | None = None

    @property
    def held(self) -> int:
        return 0

    async def feed(self, data: bytes) -> bytes:
        self.done = self.complete = b"end" in data
        self.released += len(data)
        return data

    async def end(self, error: UpstreamError | None = None) -> bytes:
        self.done, self.error = True, error
        return b"broke off\n" if error else b""

    async def late(self) -> bytes:
        return b""

    def resume(self) -> None:
        pass

    async def give_up(self) -> bytes:
        return b""

    async def close(self) -> None:
        self.closed += 1


class LineDoor:
    """A protocol of its own: one line in, one line out."""

    route = "/v1/line"
    path = "/line"
    key_header: KeyHeader = "x-api-key"
    headers = ("x-api-key", "line-version")

    def __init__(self) -> None:
        self.watched: list[Echo] = []

    def read(self, body: dict[str, Any], *, judge_system: bool) -> Asked:
        if not isinstance(body.get("line"), str):
            refuse("expected a line", param="line")
        prompt = prompt_of([Said(Turn(Role.USER, body["line"]), "line")], judge_system=judge_system)
        return Asked({**body, "read": True}, **prompt._asdict(), model="m", stream=bool(body.get("stream")))

    def refusal(self, asked: Asked, message: str, field: dict[str, Any]) -> dict[str, Any]:
        return {"said": message, "rule": field["rule"]}

    def refusal_events(self, asked: Asked, message: str, field: dict[str, Any]) -> bytes:
        return f"said: {message}\n".encode()

    def watch(self, asked: Asked, judging: Judging) -> Echo:
        self.watched.append(Echo())
        return self.watched[-1]

    async def judge(self, asked: Asked, answer: Any, judging: Judging) -> dict[str, Any]:
        if "said" not in answer:
            raise UpstreamError("the upstream said nothing")
        return {"said": answer["said"], "of": judging.prompt.turns[0].content}

    def again(self, asked: Asked, retry: Retry, continues: Continues) -> dict[str, Any] | None:
        return None

    def error(self, problem: Problem) -> dict[str, Any]:
        return {"wrong": problem.message, "at": problem.param}

    def error_event(self, problem: Problem) -> bytes:
        return f"wrong: {problem.code}\n".encode()


def app_with(door: LineDoor, upstream: Upstream | None, record: Record) -> Starlette:
    behind = Behind(
        guard=FakeStreamGuard(),
        policy=make_policy(),
        keep=record,
        upstream=upstream,
        telemetry=Telemetry(),
        longest_body=1000,
        longest_stream=10_000,
        guard_timeout_s=None,
        client_timeout_s=None,
    )

    @asynccontextmanager
    async def life(app: Starlette) -> AsyncIterator[None]:
        if upstream is not None:
            await upstream.open()
        yield
        if upstream is not None:
            await upstream.close()

    return Starlette(routes=[Route(door.route, Endpoint(door, behind).answer, methods=["POST"])], lifespan=life)


@pytest.mark.parametrize(
    ("line", "stream", "reply", "status", "told"),
    [
        ("hello", False, Reply.json({"said": "hi"}), 200, {"said": "hi", "of": "hello"}),
        ("a bomb", False, Reply.json({"said": "hi"}), 200, {"said": "Not here.", "rule": "unsafe"}),
        ("a bomb", True, Reply.stream(b"x"), 200, "said: Not here.\n"),
        ("hello", True, Reply.stream(b"one\n", b"end\n", done=False), 200, "one\nend\n"),
        ("hello", False, Reply.json({}), 502, {"wrong": "the upstream said nothing", "at": None}),
        ("hello", False, Reply.error(429, "a bomb"), 429, None),
        (3, False, Reply.json({}), 400, {"wrong": "expected a line", "at": "line"}),
    ],
)
def test_a_door_says_how_everything_looks(
    upstream: FakeUpstream, upstream_url: str, line: Any, stream: bool, reply: Reply, status: int, told: Any
) -> None:
    door, record = LineDoor(), Record()
    upstream.reply = reply

    with serving(app_with(door, Upstream(f"{upstream_url}/v1"), record)) as url:
        answer = httpx.post(f"{url}/v1/line", json={"line": line, "stream": stream})

    assert answer.status_code == status
    assert "bomb" not in answer.text
    if isinstance(told, str):
        assert answer.text == told
    elif told is not None:
        assert answer.json() == told
    else:
        assert set(answer.json()) == {"wrong", "at"}
    assert record.actions == ([] if status == 400 else ["block" if line == "a bomb" else "allow"])
    assert [one.closed for one in door.watched] == ([1] if stream and line == "hello" else [])


def test_without_an_upstream_the_error_has_the_doors_shape_too() -> None:
    with serving(app_with(LineDoor(), None, Record())) as url:
        answer = httpx.post(f"{url}/v1/line", json={"line": "hello"})

    assert (answer.status_code, set(answer.json())) == (503, {"wrong", "at"})


@pytest.mark.parametrize("key", [None, "sk-own"])
def test_a_door_says_which_headers_go_on_and_where_the_key_stands(
    upstream: FakeUpstream, upstream_url: str, key: str | None
) -> None:
    """The gateway's own key takes the place of the client's, in the header that the protocol has for it; as a bearer
    token too, because servers that speak several protocols look for it there."""
    upstream.reply = Reply.json({"said": "hi"})
    headers = {"x-api-key": "sk-client", "line-version": "7", "authorization": "Bearer other", "x-more": "m"}

    with serving(app_with(LineDoor(), Upstream(f"{upstream_url}/v1", key=key), Record())) as url:
        httpx.post(f"{url}/v1/line", json={"line": "hello"}, headers=headers)

    received = upstream.received[0]
    assert received.path == "/v1/line"
    assert received.headers["x-api-key"] == (key or "sk-client")
    assert received.headers["line-version"] == "7"
    assert received.headers.get("authorization") == (None if key is None else f"Bearer {key}")
    assert "x-more" not in received.headers


def test_what_a_door_changes_in_the_body_is_what_goes_on(upstream: FakeUpstream, upstream_url: str) -> None:
    upstream.reply = Reply.json({"said": "hi"})

    with serving(app_with(LineDoor(), Upstream(f"{upstream_url}/v1"), Record())) as url:
        httpx.post(f"{url}/v1/line", content=b'{ "line": "hello" }')

    assert upstream.received[0].data == json.dumps({"line": "hello", "read": True}, separators=(",", ":")).encode()


def test_decisions_are_for_the_tenant_and_region_of_the_request(upstream: FakeUpstream, upstream_url: str) -> None:
    """As a middleware left them in the request's state; the policy's layers count."""
    record = Record()
    policy = make_policy(layers="{tenant: {acme: {otherwise: warn}}}")
    app = create_app(guard=FakeStreamGuard(), policy=policy, keep=record, upstream_url=upstream_url)

    async def with_state(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            scope["state"] = {"tenant": "acme", "region": "IN", "other": 3}
        await app(scope, receive, send)

    body = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
    upstream.reply = Reply.json(completion("hi"))
    with serving(with_state) as url:
        httpx.post(f"{url}/v1/chat/completions", json=body)
        httpx.post(f"{url}/v1/moderations", json={"input": "hello"})

    scopes = [decision.scope for decision, _, _ in record.kept]
    assert [(scope.tenant, scope.region, scope.language) for scope in scopes] == [("acme", "IN", None)] * 3
    assert record.actions == ["warn"] * 3
