"""What holds at every door alike: subjects that are throttled, the language, the shape of errors, what logs may say."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import websockets
from websockets import Subprotocol

from gateway.messages_wire import message
from serving import POLICY, Record, make_policy, serving
from tidegate.gateway.app import create_app
from tidegate.gateway.live_frames import PROTOCOL
from tidegate.testing import FakeStreamGuard, FakeUpstream, Reply, completion, text_completion
from tidegate.types import Action, Channel

RESPONSE = {"id": "resp_1", "object": "response", "created_at": 1, "model": "m", "status": "completed", "output": []}
USER = {"role": "user", "content": "so"}
DOORS: dict[str, tuple[dict[str, Any], Any]] = {
    "/v1/chat/completions": ({"model": "m", "user": "bob", "messages": [USER]}, completion("Fine.")),
    "/v1/completions": ({"model": "m", "user": "bob", "prompt": "so"}, text_completion("Fine.")),
    "/v1/responses": ({"model": "m", "user": "bob", "input": "so"}, RESPONSE),
    "/v1/messages": (
        {"model": "m", "max_tokens": 9, "metadata": {"user_id": "bob"}, "messages": [USER]},
        message("Fine."),
    ),
    "/v1/messages/count_tokens": (
        {"model": "m", "metadata": {"user_id": "bob"}, "messages": [USER]},
        {"input_tokens": 3},
    ),
    "/v1/guard": ({"scope": {"subject": "bob"}, "turns": [USER]}, {}),
    "/v1/moderations": ({"input": "so"}, {}),
}
"""A request that each door takes, about somebody where it can say so, and what an upstream answers."""

every_door = pytest.mark.parametrize("path", sorted(DOORS))
THROTTLING = POLICY.replace("action: block", "action: block, advice: throttle")


@contextlib.contextmanager
def a_gateway(
    upstream: FakeUpstream, url: str, path: str = "", **changes: Any
) -> Iterator[tuple[httpx.Client, Record]]:
    upstream.reply = Reply.json(DOORS[path][1] if path else {})
    record = Record()
    policy = make_policy(**changes)
    app = create_app(guard=FakeStreamGuard(), policy=policy, keep=record, upstream_url=f"{url}/v1")
    with serving(app) as gateway, httpx.Client(base_url=gateway) as client:
        yield client, record


def saying(body: dict[str, Any], text: str, subject: str = "bob") -> dict[str, Any]:
    return dict(json.loads(json.dumps(body).replace('"so"', json.dumps(text)).replace('"bob"', json.dumps(subject))))


# --- subjects -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(set(DOORS) - {"/v1/moderations"}))
def test_who_is_told_to_slow_down_waits_at_every_door_that_knows_who_it_is(
    path: str, upstream: FakeUpstream, upstream_url: str
) -> None:
    """A decision with the advice ``throttle`` is carried out, and the 429 has the door's shape."""
    body, _ = DOORS[path]
    with a_gateway(upstream, upstream_url, path, text=THROTTLING) as (client, record):
        before = [client.post(path, json=body).status_code for _ in range(3)]
        client.post(path, json=saying(body, "a bomb"))
        assert record.kept[-1][0].advice
        after = [client.post(path, json=body) for _ in range(2)]
        other = client.post(path, json=saying(body, "so", "eve")).status_code

    assert before == [200] * 3
    assert [one.status_code for one in after] == [200, 429]
    assert int(after[1].headers["retry-after"]) >= 1
    error = after[1].json()["error"]
    assert error["type" if "messages" in path else "code"] == (
        "rate_limit_error" if "messages" in path else "rate_limit_exceeded"
    )
    assert other == 200


async def test_who_is_told_to_slow_down_opens_no_streams(upstream: FakeUpstream, upstream_url: str) -> None:
    with a_gateway(upstream, upstream_url, text=THROTTLING) as (client, _):
        client.post("/v1/guard", json=saying(DOORS["/v1/guard"][0], "a bomb"))
        client.post("/v1/guard", json=DOORS["/v1/guard"][0])
        address = str(client.base_url).replace("http", "ws") + "/v1/live"
        async with websockets.connect(address, subprotocols=[Subprotocol(PROTOCOL)]) as line:
            await line.recv()
            await line.send(json.dumps({"type": "open", "stream": 1, "scope": {"subject": "bob"}}))
            refused = json.loads(await line.recv())

    assert (refused["type"], refused["stream"], refused["code"]) == ("error", 1, "rate_limit_exceeded")


# --- languages ----------------------------------------------------------------------------------------------------

GERMAN = POLICY + "  - {name: german, severity: safe, action: review, scope: {language: de}}\n"


@every_door
def test_a_language_that_the_client_says_is_in_the_scope_and_rules_can_ask_for_it(
    path: str, upstream: FakeUpstream, upstream_url: str
) -> None:
    with a_gateway(upstream, upstream_url, path, text=GERMAN) as (client, record):
        for said in (None, "de-AT", "fr"):
            headers = {} if said is None else {"X-Tidegate-Language": said}
            assert client.post(path, json=DOORS[path][0], headers=headers).status_code == 200
        found = [(one.scope.language, one.rule) for one, _, _ in record.kept]

    assert {("de-AT", "german"), (None, "otherwise"), ("fr", "otherwise")} == set(found)
    assert all("x-tidegate-language" not in one.headers for one in upstream.received)


@every_door
def test_what_is_no_language_is_refused_in_the_shape_of_the_door(
    path: str, upstream: FakeUpstream, upstream_url: str
) -> None:
    with a_gateway(upstream, upstream_url, path) as (client, _):
        for said in ("German, please", "d", "de_AT", "x" * 40, "", "de\t-AT"):
            answer = client.post(path, json=DOORS[path][0], headers={"X-Tidegate-Language": said})

            assert answer.status_code == 400
            assert "x-tidegate-language" in answer.text
            assert len(said) < 3 or said not in answer.text
            assert (answer.json().get("type") == "error") == ("messages" in path)
    assert not upstream.received


# --- errors outside of a door -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "status", "anthropic"),
    [
        ("GET", "/v1/messages", 405, True),
        ("POST", "/v1/messages/other", 404, True),
        ("PUT", "/v1/messages/count_tokens", 405, True),
        ("GET", "/v1/chat/completions", 405, False),
        ("POST", "/v1/other", 404, False),
        ("POST", "/v1/messagesx", 404, False),
    ],
)
def test_what_no_door_takes_is_told_in_the_shape_of_its_path(
    method: str, path: str, status: int, anthropic: bool, upstream: FakeUpstream, upstream_url: str
) -> None:
    with a_gateway(upstream, upstream_url) as (client, _):
        answer = client.request(method, path)

    assert answer.status_code == status
    assert (answer.json().get("type") == "error") == anthropic
    assert answer.json()["error"]["type"] == ("not_found_error" if anthropic and status == 404 else "invalid_request_error")  # fmt: skip  # noqa: E501


# --- a guard that is set to judge reasoning together with what follows it -----------------------------------------


class Together(FakeStreamGuard):
    """A guard that is to be told the reasoning with each text of a whole answer."""

    together = True


THOUGHTFUL: dict[str, Any] = {
    "/v1/chat/completions": completion({"content": "then this", "reasoning_content": "first that"}),
    "/v1/messages": message({"type": "thinking", "thinking": "first that", "signature": ""}, "then this"),
    "/v1/responses": {
        **RESPONSE,
        "output": [
            {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "first that"}]},
            {
                "type": "message",
                "id": "m",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "then this"}],
            },
        ],
    },
}


@pytest.mark.parametrize("path", sorted(THOUGHTFUL))
@pytest.mark.parametrize("together", [True, False])
def test_a_whole_answer_is_judged_with_the_reasoning_where_the_guard_wants_it(
    path: str, together: bool, upstream: FakeUpstream, upstream_url: str
) -> None:
    upstream.reply = Reply.json(THOUGHTFUL[path])
    guard = Together() if together else FakeStreamGuard()
    record = Record()
    app = create_app(guard=guard, policy=make_policy(), keep=record, upstream_url=f"{upstream_url}/v1")
    with serving(app) as url:
        assert httpx.post(f"{url}{path}", json=DOORS[path][0]).status_code == 200

    turns = {(one.turns[-1].reasoning, one.turns[-1].content) for one in guard.judged if len(one.turns) == 2}
    assert turns == {("first that", ""), ("first that" if together else "", "then this")}
    assert {part.channel for part in record.kept[-1][0].coverage} == {Channel.REASONING, Channel.ANSWER}
    assert record.kept[-1][0].action is Action.ALLOW


# --- what logs and errors never say -------------------------------------------------------------------------------

CANARY = "zyxcanary7 bomb guardfail"
NAME = "other_field"
RICH: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": "m",
        "n": 1,
        "user": "bob",
        "stop": ["x"],
        "stream": False,
        "metadata": {"a": "b"},
        "stream_options": {"include_usage": True},
        "tools": [{"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "x"}},
        "messages": [
            {"role": "system", "content": "kind"},
            {
                "role": "user",
                "name": "bob",
                "content": [{"type": "text", "text": "so"}, {"type": "image_url", "image_url": {"url": "data:,"}}],
            },
            {
                "role": "assistant",
                "content": "so",
                "tool_calls": [{"id": "c", "type": "function", "function": {"name": "find", "arguments": "{}"}}],
            },
            {"role": "tool", "tool_call_id": "c", "content": "so"},
        ],
    },
    "/v1/completions": {"model": "m", "prompt": ["so"], "suffix": "so", "n": 1, "stop": "x", "user": "bob"},
    "/v1/responses": {
        "model": "m",
        "instructions": "kind",
        "previous_response_id": "resp_0",
        "prompt": {"id": "p", "variables": {"a": "b"}},
        "tools": [{"type": "function", "name": "find", "parameters": {}}],
        "text": {"format": {"type": "text"}},
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "so"}]},
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "so"}]},
            {"type": "function_call", "call_id": "c", "name": "find", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "so"},
        ],
    },
    "/v1/messages": {
        "model": "m",
        "max_tokens": 9,
        "system": [{"type": "text", "text": "kind"}],
        "metadata": {"user_id": "bob"},
        "stop_sequences": ["x"],
        "tools": [{"name": "find", "input_schema": {"type": "object"}}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "so"}]},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "find", "input": {"q": "so"}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "so"}]},
        ],
    },
    "/v1/guard": {
        "scope": {"subject": "bob", "region": "IN", "language": "de"},
        "tokens": False,
        "turns": [
            {"role": "user", "content": "so"},
            {"role": "assistant", "content": "so", "tool_calls": [{"name": "f", "arguments": "{}"}]},
        ],
    },
    "/v1/moderations": {"input": ["so", "so"], "model": "tidegate"},
}
RICH["/v1/messages/count_tokens"] = {name: RICH["/v1/messages"][name] for name in ("model", "system", "messages")}


def spoilt(value: Any) -> Iterator[Callable[[Any], Any]]:
    """Every way to put the canary into a body: in the place of a value, and as another field, at each level of it."""
    yield lambda _: CANARY
    if isinstance(value, dict):
        yield lambda one: {**one, NAME: CANARY}
        yield lambda one: {**one, CANARY: 1}
        for name in value:
            yield (
                lambda one, name=name: (
                    {other: inner for other, inner in one.items() if other != name} | {name.upper(): CANARY}
                )
            )
            for spoil in spoilt(value[name]):
                yield lambda one, name=name, spoil=spoil: {**one, name: spoil(one[name])}
    if isinstance(value, list):
        yield lambda one: [*one, CANARY]
        for place in range(len(value)):
            for spoil in spoilt(value[place]):
                yield lambda one, place=place, spoil=spoil: [
                    spoil(inner) if number == place else inner for number, inner in enumerate(one)
                ]


@every_door
def test_what_a_client_sends_in_any_field_is_in_no_log_and_in_no_error(
    path: str, upstream: FakeUpstream, upstream_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    seen = set()
    with caplog.at_level(logging.DEBUG), a_gateway(upstream, upstream_url, path) as (client, record):
        logging.getLogger("httpx").setLevel(logging.CRITICAL)
        for spoil in spoilt(RICH[path]):
            answer = client.post(path, json=spoil(copy.deepcopy(RICH[path])))
            seen.add(answer.status_code)
            if answer.status_code != 200:
                assert "zyxcanary" not in answer.text
        for data in (
            f'{{"{CANARY}'.encode(),
            f'["{CANARY}"]'.encode(),
            f'"{CANARY}" 1'.encode(),
            CANARY.encode() + b"\xff",
        ):
            answer = client.post(path, content=data)
            seen.add(answer.status_code)
            assert "zyxcanary" not in answer.text
        record.broken = True
        answer = client.post(path, json=saying(DOORS[path][0], CANARY))
        seen.add(answer.status_code)
        assert "zyxcanary" not in answer.text

    ours = [one.getMessage() for one in caplog.records if not one.name.startswith(("httpx", "httpcore"))]
    assert ours, "something was logged"
    assert not [one for one in ours if "zyxcanary" in one]
    assert 400 in seen
    assert 500 in seen or path == "/v1/messages/count_tokens"


@pytest.mark.parametrize("path", sorted(set(DOORS) - {"/v1/guard", "/v1/moderations"}))
def test_what_an_upstream_says_is_in_no_log_and_in_no_error(
    path: str, upstream: FakeUpstream, upstream_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG), a_gateway(upstream, upstream_url, path) as (client, _):
        logging.getLogger("httpx").setLevel(logging.CRITICAL)
        for said in (
            CANARY,
            [CANARY],
            {CANARY: CANARY},
            {"error": {"message": CANARY, "type": CANARY, "code": CANARY}},
        ):
            for status in (200, 400, 418, 500):
                upstream.reply = Reply.json(said, status=status)
                answer = client.post(path, json=DOORS[path][0])
                assert answer.status_code >= 400
                assert "zyxcanary" not in answer.text

    ours = [one.getMessage() for one in caplog.records if not one.name.startswith(("httpx", "httpcore"))]
    assert not [one for one in ours if "zyxcanary" in one]
