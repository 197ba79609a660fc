"""Traces over OTLP/HTTP: what a collector receives from a gateway that runs, byte for byte."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import canary
from served import Served, served
from serving import serving, wait_until
from tidegate import __version__

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
DOORS = {
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens",
    "/v1/guard", "/v1/moderations",
}  # fmt: skip


class Collector:
    """Takes spans as OpenTelemetry's collector does: protobuf over HTTP, gzip where the header says so."""

    def __init__(self) -> None:
        self.status = 200
        self.bodies: list[bytes] = []
        self.headers: list[dict[str, str]] = []
        self._gate = threading.Lock()
        self._received: list[ExportTraceServiceRequest] = []
        self.app = Starlette(routes=[Route("/v1/traces", self._take, methods=["POST"])])

    async def _take(self, request: Request) -> Response:
        body = await request.body()
        if request.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        with self._gate:
            self.bodies.append(body)
            self.headers.append(dict(request.headers))
            if self.status == 200:
                self._received.append(ExportTraceServiceRequest.FromString(body))
        answer = ExportTraceServiceResponse().SerializeToString()
        return Response(answer, self.status, media_type="application/x-protobuf")

    @property
    def spans(self) -> list[Span]:
        with self._gate:
            return [
                span
                for one in self._received
                for part in one.resource_spans
                for scope in part.scope_spans
                for span in scope.spans
            ]

    @property
    def resources(self) -> list[dict[str, Any]]:
        with self._gate:
            return [plain(part.resource.attributes) for one in self._received for part in one.resource_spans]

    def named(self, name: str) -> Span:
        wait_until(lambda: any(span.name == name for span in self.spans), f"a span {name}", patience_s=60)
        return next(span for span in self.spans if span.name == name)


def plain(attributes: Any) -> dict[str, Any]:
    return {one.key: _value(one.value) for one in attributes}


def _value(value: AnyValue) -> Any:
    return getattr(value, value.WhichOneof("value") or "string_value")


@pytest.fixture
def collector() -> Iterator[tuple[Collector, dict[str, str]]]:
    """A collector, and the variables that lead to it."""
    taking = Collector()
    with serving(taking.app) as url:
        yield taking, {"OTEL_EXPORTER_OTLP_ENDPOINT": url, "OTEL_BSP_SCHEDULE_DELAY": "100"}


@pytest.fixture
def answering() -> Iterator[str]:
    with serving(canary.upstream()) as url:
        yield f"{url}/v1"


def ask(gateway: Served, **more: Any) -> httpx.Response:
    body = {"model": "m-1", "messages": [{"role": "user", "content": f"{canary.ASKED} hello"}], **more}
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    return httpx.post(f"{gateway.url}/v1/chat/completions", json=body, headers=headers, timeout=60)


def test_a_collector_gets_each_exchange_as_one_trace(
    tmp_path: Path, collector: tuple[Collector, dict[str, str]], answering: str
) -> None:
    """The client's trace goes on in it; who sends it is said once, by version and name."""
    taking, variables = collector
    variables |= {"OTEL_SERVICE_NAME": "guard-eu", "OTEL_EXPORTER_OTLP_HEADERS": "x-team=shop"}
    variables |= {"OTEL_EXPORTER_OTLP_COMPRESSION": "gzip"}
    with served(tmp_path, "--upstream", answering, traces="otlp", variables=variables) as gateway:
        ask(gateway, stream=True)
        request = taking.named("POST /v1/chat/completions")
        call, judged, watched = (taking.named(name) for name in ("chat m-1", "guard judge", "guard stream"))

    assert {span.trace_id.hex() for span in (request, call, judged, watched)} == {TRACE}
    assert request.parent_span_id.hex() == PARENT
    assert {span.parent_span_id for span in (call, judged, watched)} == {request.span_id}
    assert (request.kind, call.kind) == (Span.SPAN_KIND_SERVER, Span.SPAN_KIND_CLIENT)
    assert plain(request.attributes) == {
        "http.request.method": "POST",
        "url.scheme": "http",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
    }
    assert plain(call.attributes) == {
        "http.request.method": "POST",
        "url.template": "/chat/completions",
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "m-1",
        "http.response.status_code": 200,
    }
    assert plain(judged.attributes)["tidegate.guard"].startswith("edge/")
    assert plain(watched.attributes)["tidegate.channel"] == "answer"
    assert plain(watched.attributes)["tidegate.tokens"] > 0
    decided = [plain(event.attributes) for event in request.events]
    assert [(event.name, one["tidegate.target"]) for event, one in zip(request.events, decided, strict=True)] == [
        ("tidegate.decision", "prompt"),
        ("tidegate.decision", "response"),
    ]
    assert {one["tidegate.policy"] for one in decided} == {"test"}
    assert all(span.start_time_unix_nano <= span.end_time_unix_nano for span in taking.spans)
    assert {(one["service.name"], one["service.version"]) for one in taking.resources} == {("guard-eu", __version__)}
    assert {(one["x-team"], one["content-type"]) for one in taking.headers} == {("shop", "application/x-protobuf")}


def test_what_a_collector_gets_has_no_user_text(
    tmp_path: Path, collector: tuple[Collector, dict[str, str]], answering: str
) -> None:
    """In no byte, whatever is sent to whichever door; what failed is told by its kind."""
    taking, variables = collector
    with served(tmp_path, "--upstream", answering, traces="otlp", variables=variables) as gateway:
        statuses = canary.send_everywhere(gateway.url, DOORS)
        gateway.process.terminate()
        gateway.process.wait(60)

    assert {200, 400, 404} <= set(statuses)
    assert {f"POST {door}" for door in DOORS} <= {span.name for span in taking.spans}
    failures = [span for span in taking.spans if span.status.code == Status.STATUS_CODE_ERROR]
    assert failures
    assert {span.status.message for span in failures} == {""}
    told = b"\n".join(taking.bodies).lower()
    # a name without white space in the place of a model's is one, as in every log of an upstream
    model = next(one for span in taking.spans for one in span.attributes if one.key == "gen_ai.request.model")
    model.value.string_value = canary.ASKED
    told = told.replace(model.SerializeToString().lower(), b"").replace(f"chat {canary.ASKED}".encode(), b"")
    assert not [word for word in canary.CANARIES if word.encode() in told]


def test_every_worker_sends_its_spans_before_it_ends(
    tmp_path: Path, collector: tuple[Collector, dict[str, str]], answering: str
) -> None:
    """None is lost in a batch that nobody sends."""
    taking, variables = collector
    variables["OTEL_BSP_SCHEDULE_DELAY"] = "3600000"
    arguments = ("--upstream", answering, "--workers", "2")
    with served(tmp_path, *arguments, traces="otlp", variables=variables) as gateway:
        first, second = gateway.workers
        clients: list[httpx.Client] = []
        try:
            while not (gateway.streams_of(first) and gateway.streams_of(second)):
                assert len(clients) < 100, "one worker does all the work"
                clients.append(httpx.Client(base_url=gateway.url, timeout=60))
                clients[-1].post("/v1/moderations", json={"input": "apple pie"})
        finally:
            for client in clients:
                client.close()
        assert taking.spans == []
        gateway.process.terminate()
        gateway.process.wait(60)

    sent = [span for span in taking.spans if span.name == "POST /v1/moderations"]
    assert len(sent) == len(clients)
    assert len(taking.bodies) == 2


@pytest.mark.parametrize("gone", [True, False], ids=["gone", "refuses"])
def test_without_a_collector_the_gateway_works_and_ends(
    tmp_path: Path, collector: tuple[Collector, dict[str, str]], answering: str, gone: bool
) -> None:
    """What cannot be sent is dropped; its log says so, and nothing that people wrote."""
    taking, variables = collector
    taking.status = 400
    if gone:
        variables |= {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_EXPORTER_OTLP_TIMEOUT": "1"}
    with served(tmp_path, "--upstream", answering, traces="otlp", variables=variables) as gateway:
        statuses = [ask(gateway, stream=stream).status_code for stream in (True, False)]
        gateway.process.terminate()
        gateway.process.wait(60)

    assert statuses == [200, 200]
    assert gateway.num_kept == 4
    log = (tmp_path / "log.txt").read_text().lower()
    assert "traceback" not in log
    assert not [word for word in canary.CANARIES if word in log]
