"""The gateway as a whole: bad input, health, metrics, models, and its end."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from openai import OpenAI
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from serving import Gateway, make_policy, serving
from tidegate.errors import InputError
from tidegate.gateway.app import HealthTexts, create_app
from tidegate.testing import FakeStreamGuard, FakeUpstream, Reply

OK: list[Any] = [{"role": "user", "content": "hi"}]


def test_a_bug_is_counted_as_an_error_of_ours() -> None:
    """And not as a client that went away."""

    async def buggy(request: Any) -> PlainTextResponse:
        raise RuntimeError

    with serving(create_app(guard=FakeStreamGuard(), policy=make_policy(), routes=[Route("/buggy", buggy)])) as url:
        assert httpx.get(f"{url}/buggy").status_code == 500
        metrics = httpx.get(f"{url}/metrics").text

    assert 'tidegate_requests_total{route="/buggy",status="500"} 1.0' in metrics
    assert '"gone"' not in metrics


HEALTH = HealthTexts("apple pie", "a bomb")


@pytest.mark.parametrize(
    ("content", "status", "param"),
    [
        (b"", 400, None),
        (b"{", 400, None),
        (b"[]", 400, None),
        (b'"x"', 400, None),
        (b'{"a": NaN}', 400, None),
        (b'{"a": "\xff"}', 400, None),
        (b"[" * 100_000, 400, None),
        *(
            (
                b'{"messages": [{"role": "user", "content": "x"}], "model": "m", "x": %b1%b}' % (b"[" * n, b"]" * n),
                400,
                None,
            )
            for n in (900, 980)
        ),
        (b"{}", 400, "messages"),
        (b'{"messages": 5}', 400, "messages"),
        (b'{"messages": []}', 400, "messages"),
        (b'{"messages": [5], "model": "m"}', 400, "messages[0]"),
        (b'{"messages": [{"content": "x"}], "model": "m"}', 400, "messages[0].role"),
        (b'{"messages": [{"role": ["user"], "content": "x"}], "model": "m"}', 400, "messages[0].role"),
        (b'{"messages": [{"role": "robot", "content": "x"}], "model": "m"}', 400, "messages[0].role"),
        (b'{"messages": [{"role": "user"}], "model": "m"}', 400, "messages[0].content"),
        (b'{"messages": [{"role": "user", "content": 5}], "model": "m"}', 400, "messages[0].content"),
        (b'{"messages": [{"role": "user", "content": [5]}], "model": "m"}', 400, "messages[0].content[0]"),
        (
            b'{"messages": [{"role": "user", "content": [{"type": "text"}]}], "model": "m"}',
            400,
            "messages[0].content[0].text",
        ),
        (
            b'{"messages": [{"role": "assistant", "tool_calls": ["x"]}], "model": "m"}',
            400,
            "messages[0].tool_calls[0]",
        ),
        (json.dumps({"messages": OK}).encode(), 400, "model"),
        (json.dumps({"messages": OK, "model": 5}).encode(), 400, "model"),
        (json.dumps({"messages": OK, "model": "m", "n": 0}).encode(), 400, "n"),
        (json.dumps({"messages": OK, "model": "m", "n": True}).encode(), 400, "n"),
        (json.dumps({"messages": OK, "model": "m", "stream": "yes"}).encode(), 400, "stream"),
        (json.dumps({"messages": OK, "model": "m", "stream_options": 1}).encode(), 400, "stream_options"),
        (json.dumps({"messages": OK * 3000, "model": "m"}).encode(), 400, "messages"),
        (b'{"a": "' + b"x" * 10_000_000 + b'"}', 413, None),
    ],
)
def test_bad_input_is_told_in_openais_shape(gateway: Gateway, content: bytes, status: int, param: str | None) -> None:
    """What was wrong, what was expected, and where."""
    response = httpx.post(f"{gateway.base_url}/chat/completions", content=content)

    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param)
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert gateway.kept() == []


def test_a_body_without_a_length_is_cut_off_at_the_limit(gateway: Gateway) -> None:
    """The limit holds while the body is read, not after."""
    sent = 0

    def endless() -> Any:
        nonlocal sent
        while sent < 64_000_000:
            sent += 65_536
            yield b"x" * 65_536

    try:
        status = httpx.post(f"{gateway.base_url}/moderations", content=endless()).status_code
    except httpx.TransportError:
        status = 413

    assert status == 413


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nothing", 404), ("GET", "/v1/moderations", 405)])
def test_wrong_paths_and_methods(gateway: Gateway, method: str, path: str, status: int) -> None:
    """Also in OpenAI's shape."""
    response = httpx.request(method, gateway.url + path)

    assert response.status_code == status
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_a_client_that_leaves_v1_out_of_its_address_is_told_so(gateway: Gateway) -> None:
    told = [httpx.post(f"{gateway.url}{path}", json={}).json() for path in ("/chat/completions", "/v1/embeddings")]

    messages = [body["error"]["message"] for body in told]
    assert messages == [
        "there is no such path here: those for programs begin with /v1/",
        "there is no such path here",
    ]


def test_models_are_the_upstreams(gateway: Gateway, upstream: FakeUpstream) -> None:
    """Proxied, with the client's key; errors are passed on."""
    upstream.reply = Reply.json({"object": "list", "data": [{"id": "m", "object": "model"}]})
    with OpenAI(base_url=gateway.base_url, api_key="sk-client", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["m"]
    assert upstream.received[0].headers["authorization"] == "Bearer sk-client"

    upstream.reply = Reply.error(401, "who are you")
    assert httpx.get(f"{gateway.base_url}/models").status_code == 401


SENTENCE = "how to build a bomb"


def test_of_models_only_names_and_numbers_pass(gateway: Gateway, upstream: FakeUpstream) -> None:
    """Descriptions do not, nor names that could be sentences."""
    model = {
        "id": "meta-llama/Llama-3.1-8B:free",
        "object": "model",
        "created": 1,
        "owned_by": "vllm",
        "max_model_len": 4096,
        "parent": None,
    }
    odd = {"description": SENTENCE, "permission": [{"id": SENTENCE}], SENTENCE: 1, "owned_by": SENTENCE, "pricing": {}}
    upstream.reply = Reply.json({"object": "list", "data": [model, {**model, **odd, "id": SENTENCE}], "note": SENTENCE})

    listed = httpx.get(f"{gateway.base_url}/models")

    assert SENTENCE not in listed.text
    assert listed.json()["object"] == "list"
    assert listed.json()["data"][0] == model
    assert listed.json()["data"][1]["pricing"] == {}
    assert listed.json()["data"][1]["id"].startswith("model-")


def test_one_model_is_asked_for_by_its_name(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.reply = Reply.json({"id": "org/m:1", "object": "model", "created": 1, "owned_by": "o", "note": SENTENCE})

    with OpenAI(base_url=gateway.base_url, api_key="sk", max_retries=0) as client:
        model = client.models.retrieve("org/m:1")

    assert (model.id, model.owned_by) == ("org/m:1", "o")
    assert SENTENCE not in model.to_json()
    assert upstream.received[0].path == "/v1/models/org/m:1"


@pytest.mark.parametrize("name", ["a%20bomb", "%2e%2e/metrics", "..%2Fmetrics", "a//b", "a/", "x" * 201, "a%3Fb"])
def test_a_name_that_no_model_has_never_reaches_the_upstream(
    gateway: Gateway, upstream: FakeUpstream, name: str
) -> None:
    answer = httpx.get(f"{gateway.base_url}/models/{name}")

    assert answer.status_code == 404
    assert upstream.received == []


@pytest.mark.parametrize("answer", [[], {}, {"data": "a bomb"}, {"data": ["a bomb"]}])
def test_models_that_are_no_list_are_an_error_of_the_upstream(
    gateway: Gateway, upstream: FakeUpstream, answer: Any
) -> None:
    upstream.reply = Reply.json(answer)

    told = httpx.get(f"{gateway.base_url}/models")

    assert told.status_code == 502
    assert "bomb" not in told.text


def test_metrics_count(gateway: Gateway, upstream: FakeUpstream) -> None:
    """Requests, decisions, guard time, streams and upstream errors are there, in Prometheus' format."""
    httpx.post(f"{gateway.base_url}/moderations", json={"input": "a bomb"})
    upstream.reply = Reply.error(500, "x")
    httpx.post(f"{gateway.base_url}/chat/completions", json={"model": "m", "messages": OK})

    text = httpx.get(f"{gateway.url}/metrics").text

    assert 'tidegate_requests_total{route="/v1/moderations",status="200"}' in text
    assert 'tidegate_decisions_total{action="block",target="moderation"}' in text
    assert 'tidegate_guard_seconds_bucket{call="judge"' in text
    assert 'tidegate_upstream_errors_total{kind="status"}' in text
    assert "tidegate_open_streams 0.0" in text
    assert "tidegate_held_characters 0.0" in text


def test_health_is_deep(gateway: Gateway) -> None:
    """The guard has judged a text of each kind."""
    response = httpx.get(f"{gateway.url}/healthz")

    assert response.status_code == 200
    assert response.json()["status"] == "ok"
    assert response.json()["guard"] == "fake/1"


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        (HealthTexts("apple pie", "apple pie"), "the guard calls an unsafe text safe"),
        (HealthTexts("a bomb", "a bomb"), "the guard calls a safe text unsafe"),
        (HealthTexts("guardfail", "a bomb"), "GuardUnavailable"),
        (HealthTexts("guardhang", "a bomb"), "GuardTimeout"),
    ],
)
def test_a_guard_that_is_wrong_slow_or_failing_is_not_healthy(texts: HealthTexts, reason: str) -> None:
    """503, with the reason."""
    app = create_app(guard=FakeStreamGuard(), policy=make_policy(), health=texts, health_timeout_s=0.05)

    with serving(app) as url:
        response = httpx.get(f"{url}/healthz")

    assert (response.status_code, response.json()["reason"]) == (503, reason)


def test_health_is_asked_once_a_second_at_most() -> None:
    """Many who ask at once wear nothing out."""
    guard = FakeStreamGuard()
    app = create_app(guard=guard, policy=make_policy(), health=HEALTH)

    with serving(app) as url, httpx.Client() as client:
        for _ in range(5):
            client.get(f"{url}/healthz")

    assert len(guard.judged) < 10


def test_without_an_upstream() -> None:
    """Moderations work, chat says what is missing, and the guard is the only model."""
    with serving(create_app(guard=FakeStreamGuard(), policy=make_policy())) as url:
        chat = httpx.post(f"{url}/v1/chat/completions", json={"model": "m", "messages": OK})
        models = httpx.get(f"{url}/v1/models").json()

    assert (chat.status_code, chat.json()["error"]["code"]) == (503, "no_upstream")
    assert [model["id"] for model in models["data"]] == ["fake/1"]


def test_an_upstream_that_is_no_address_is_an_error() -> None:
    """Said at once, not with the first request."""
    with pytest.raises(InputError, match="upstream_url"):
        create_app(guard=FakeStreamGuard(), policy=make_policy(), upstream_url="localhost:8000")


def test_all_is_closed_at_the_end() -> None:
    """The guard, and whatever else was given to close, awaited or not; other routes stand beside ours."""
    closed: list[str] = []

    async def later() -> None:
        closed.append("later")

    async def page(request: Any) -> PlainTextResponse:
        return PlainTextResponse("a page")

    guard = FakeStreamGuard()
    app = create_app(
        guard=guard,
        policy=make_policy(),
        routes=[Route("/page", page)],
        on_close=(lambda: closed.append("now"), later),
    )

    with serving(app) as url:
        assert httpx.get(f"{url}/page").text == "a page"
        assert not guard.closed

    assert guard.closed
    assert closed == ["now", "later"]
