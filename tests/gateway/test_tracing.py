"""Traces: what each exchange says of itself, and that it says nothing of what people wrote."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from openai import OpenAI
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

import canary
from serving import make_policy, serving, wait_until
from tidegate.gateway.app import create_app
from tidegate.gateway.tracing import Tracing
from tidegate.testing import Die, FakeStreamGuard, FakeUpstream, Hang, Reply, chunk, text_chunks

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
ASKED: list[Any] = [{"role": "user", "content": "hello"}]


class Traced:
    """A gateway whose spans end up in memory."""

    def __init__(self, upstream_url: str | None, **options: Any) -> None:
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.app: Starlette = create_app(
            guard=FakeStreamGuard(),
            policy=make_policy(),
            upstream_url=upstream_url,
            guard_timeout_s=5,
            tracing=Tracing(self.provider),
            **options,
        )

    @property
    def spans(self) -> list[ReadableSpan]:
        return list(self._exporter.get_finished_spans())

    def named(self, name: str) -> ReadableSpan:
        wait_until(lambda: any(span.name == name for span in self.spans), f"a span {name}")
        return next(span for span in self.spans if span.name == name)


@pytest.fixture
def upstream_at() -> Iterator[tuple[FakeUpstream, str]]:
    fake = FakeUpstream()
    with serving(fake) as url:
        yield fake, url


def _attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def _parent(span: ReadableSpan) -> int | None:
    return span.parent.span_id if span.parent else None


def test_an_exchange_is_one_trace(upstream_at: tuple[FakeUpstream, str]) -> None:
    """From the client's own trace to the upstream's, with the guard and the decisions in between."""
    upstream, upstream_url = upstream_at
    upstream.reply = Reply.stream(*text_chunks(["Hello", " there."]))
    traced = Traced(upstream_url)
    with serving(traced.app) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0)
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        list(client.chat.completions.create(model="m-1", messages=ASKED, stream=True, extra_headers=headers))
        request = traced.named("POST /v1/chat/completions")

    call, judged, watched = (traced.named(name) for name in ("chat m-1", "guard judge", "guard stream"))
    assert {format(span.context.trace_id, "032x") for span in traced.spans if span.context} == {TRACE}
    assert request.context is not None
    assert _parent(request) == int(PARENT, 16)
    assert {_parent(span) for span in (call, judged, watched)} == {request.context.span_id}
    assert request.kind is SpanKind.SERVER
    assert _attributes(request) == {
        "http.request.method": "POST",
        "url.scheme": "http",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
    }
    decided = [dict(event.attributes or {}) for event in request.events]
    assert [(one["tidegate.target"], one["tidegate.action"]) for one in decided] == [
        ("prompt", "allow"),
        ("response", "allow"),
    ]
    assert call.kind is SpanKind.CLIENT
    assert _attributes(call) == {
        "http.request.method": "POST",
        "url.template": "/chat/completions",
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "m-1",
        "http.response.status_code": 200,
    }
    assert call.context is not None
    told = upstream.received[-1].headers["traceparent"]
    assert told == f"00-{TRACE}-{call.context.span_id:016x}-01"
    assert _attributes(watched)["tidegate.channel"] == "answer"
    assert _attributes(watched)["tidegate.tokens"] == 2


def test_the_call_lasts_until_its_answer_is_closed(upstream_at: tuple[FakeUpstream, str]) -> None:
    """Not only until the status is there."""
    upstream, upstream_url = upstream_at
    upstream.reply = Reply.stream(chunk({"content": "Hello there"}), Hang())
    traced = Traced(upstream_url)
    body = {"model": "m", "messages": ASKED, "stream": True}
    with serving(traced.app) as url:
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
            pieces = response.iter_bytes()
            assert b"Hello" in next(pieces)
            assert not any(span.name == "chat m" for span in traced.spans)
        assert traced.named("chat m").end_time


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (Reply.error(503, "no"), "503"),
        (Reply.stream(chunk({"content": "Hello"}), Die()), "ClientPayloadError"),
    ],
    ids=["status", "breaks-off"],
)
def test_a_failed_call_is_an_error_by_its_kind(upstream_at: tuple[FakeUpstream, str], reply: Reply, kind: str) -> None:
    """A message could quote what somebody wrote."""
    upstream, upstream_url = upstream_at
    upstream.reply = reply
    traced = Traced(upstream_url)
    with serving(traced.app) as url:
        httpx.post(f"{url}/v1/chat/completions", json={"model": "m", "messages": ASKED, "stream": True})
        call = traced.named("chat m")

    assert (call.status.status_code, call.status.description) == (StatusCode.ERROR, None)
    assert _attributes(call)["error.type"] == kind
    assert not call.events


def test_an_upstream_that_is_not_there() -> None:
    """The span of the call ends, and says so."""
    traced = Traced("http://127.0.0.1:9")
    with serving(traced.app) as url:
        assert httpx.post(f"{url}/v1/chat/completions", json={"model": "m", "messages": ASKED}).status_code == 502

    assert _attributes(traced.named("chat m"))["error.type"] == "ClientConnectorError"


def test_a_guard_that_fails_is_an_error_of_its_span() -> None:
    """And of the decision that came of it, not of the request."""
    traced = Traced(None)
    with serving(traced.app) as url:
        httpx.post(f"{url}/v1/moderations", json={"input": "guardfail"})
        request = traced.named("POST /v1/moderations")

    assert _attributes(traced.named("guard judge"))["error.type"] == "GuardUnavailable"
    assert (request.events[0].attributes or {})["error.type"] == "GuardUnavailable"


def test_a_bug_is_an_error_of_the_request() -> None:
    """By its kind alone."""

    async def buggy(request: Any) -> PlainTextResponse:
        raise RuntimeError(canary.ASKED)

    traced = Traced(None, routes=[Route("/buggy", buggy)])
    with serving(traced.app) as url:
        assert httpx.get(f"{url}/buggy").status_code == 500

    span = traced.named("GET /buggy")
    assert _attributes(span)["error.type"] == "RuntimeError"
    assert _attributes(span)["http.response.status_code"] == 500
    assert canary.ASKED not in span.to_json()


def test_no_span_has_user_text(upstream_at: tuple[FakeUpstream, str]) -> None:
    """Whatever is sent, to whichever door."""
    upstream, upstream_url = upstream_at
    upstream.reply = canary.replies
    traced = Traced(upstream_url)
    with serving(traced.app) as url:
        statuses = canary.send_everywhere(url, canary.posts(traced.app))

    assert {200, 400, 404} <= set(statuses)
    assert len({span.name for span in traced.spans}) >= 6
    told = "\n".join(span.to_json() for span in traced.spans).lower()
    # a name without white space in the place of a model's is one, as in every log of an upstream
    told = told.replace(f'"gen_ai.request.model": "{canary.ASKED}"', "").replace(f"chat {canary.ASKED}", "")
    assert not [word for word in canary.CANARIES if word in told]


def test_probes_make_no_spans() -> None:
    """They come every few seconds, and would hide the others."""
    traced = Traced(None)
    with serving(traced.app) as url:
        for path in ("/livez", "/healthz", "/metrics"):
            httpx.get(url + path)

    assert traced.spans == []


def test_without_traces_nothing_of_opentelemetry_is_loaded() -> None:
    """It costs nothing, and need not be installed."""
    code = "import sys, tidegate.gateway.app, tidegate.cli; print([n for n in sys.modules if 'opentelemetry' in n])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
