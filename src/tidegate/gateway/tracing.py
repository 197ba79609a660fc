"""OpenTelemetry traces: one span for each request, below it the call of the upstream and what the guard did.

Names follow OpenTelemetry's conventions where there are any (HTTP, and for the call of the model ``gen_ai.*``); what is
ours begins with ``tidegate.``. No span carries user text: a model's name or a path is said only where it is known to be
one. Needs the extra ``otel``; where spans go is OpenTelemetry's own matter, as its ``OTEL_`` variables say.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from opentelemetry import propagate, trace
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer, TracerProvider
from starlette.types import ASGIApp, Message, Receive, Send
from starlette.types import Scope as AsgiScope

from tidegate import __version__
from tidegate.gateway.logs import METHODS, route_of, trace_id
from tidegate.types import Channel, Decision

__all__ = ["TracedApp", "Tracing", "UpstreamSpan", "otlp_provider"]

_IDENTITY: Final = re.compile(r"[\w.:/@+-]{1,128}", re.ASCII)
_PROBES: Final = frozenset(("/livez", "/healthz", "/metrics"))
"""What monitoring asks every few seconds: spans of these would hide the others."""
_OPERATIONS: Final = {
    "/chat/completions": "chat",
    "/responses": "chat",
    "/messages": "chat",
    "/completions": "text_completion",
}


def otlp_provider(service: str = "tidegate") -> TracerProvider:
    """Spans over OTLP/HTTP, in batches; ``OTEL_EXPORTER_OTLP_ENDPOINT`` and its siblings say where to.

    ``service`` is the service's name where ``OTEL_SERVICE_NAME`` gives no other.
    """
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider as SdkProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    own = Resource({"service.name": service, "service.version": __version__})
    provider = SdkProvider(resource=Resource.create().merge(own).merge(OTELResourceDetector().detect()))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


class Tracing:
    """Makes the spans of one gateway.

    Args:
        provider: where spans go; closed (and what waits in it sent) by `close`.
    """

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self.tracer: Tracer = provider.get_tracer("tidegate", __version__)

    def call(self, method: str, path: str, model: str | None, headers: MutableMapping[str, str]) -> UpstreamSpan:
        """Begin the span of a call of the upstream, and tell the upstream of it in these headers."""
        operation = _OPERATIONS.get(path)
        template = "/models/{name}" if path.startswith("/models/") else path
        attributes = {"http.request.method": method, "url.template": template}
        name = f"{method} {template}"
        if operation is not None:
            attributes["gen_ai.operation.name"] = operation
            name = operation
            if model is not None and _IDENTITY.fullmatch(model):
                attributes["gen_ai.request.model"] = model
                name = f"{operation} {model}"
        span = self.tracer.start_span(name, kind=SpanKind.CLIENT, attributes=attributes)
        propagate.inject(headers, trace.set_span_in_context(span))
        return UpstreamSpan(span)

    def decision(self, decision: Decision, target: str) -> None:
        """Note a decision in the span of the request that it is about."""
        trace.get_current_span().add_event("tidegate.decision", decided(decision, target))

    @contextmanager
    def judging(self, guard: str) -> Iterator[Span]:
        """Around a call of the guard; what it raises is an error of the span, by its kind alone."""
        with self.tracer.start_as_current_span(
            "guard judge", attributes={"tidegate.guard": guard}, record_exception=False, set_status_on_exception=False
        ) as span:
            try:
                yield span
            except BaseException as error:
                failed(span, type(error).__name__)
                raise

    def watching(self, guard: str, channel: Channel) -> StreamSpan:
        """Begin the span of a session: from its opening to its end."""
        attributes = {"tidegate.guard": guard, "tidegate.channel": channel.value}
        return StreamSpan(self.tracer.start_span("guard stream", attributes=attributes))

    def around(self, app: ASGIApp) -> TracedApp:
        """The app, with a span for each request."""
        return TracedApp(app, self)

    def close(self) -> None:
        """Send what waits, and close the provider: that may take as long as the place where spans go."""
        shutdown = getattr(self._provider, "shutdown", None)
        if shutdown is not None:
            shutdown()


def failed(span: Span, kind: str) -> None:
    """Mark a span as failed, by a kind of error; a message could quote what somebody wrote."""
    span.set_attribute("error.type", kind)
    span.set_status(StatusCode.ERROR)


def decided(decision: Decision, target: str) -> dict[str, str | float | bool]:
    """What a span says of a decision."""
    said: dict[str, str | float | bool] = {
        "tidegate.target": target,
        "tidegate.action": decision.action.word,
        "tidegate.rule": decision.rule,
        "tidegate.policy": decision.policy,
        "tidegate.policy.version": decision.policy_version,
    }
    if decision.scope.tenant is not None:
        said["tidegate.tenant"] = decision.scope.tenant
    if decision.verdict is not None:
        said["tidegate.guard"] = decision.verdict.guard
        said["tidegate.severity"] = decision.verdict.severity.word
        said["tidegate.probability.unsafe"] = decision.verdict.probabilities.unsafe
    if decision.failure is not None:
        said["error.type"] = decision.failure.kind
    return said


@dataclass(slots=True)
class UpstreamSpan:
    """The span of one call of the upstream, until its answer is closed."""

    span: Span

    def answered(self, status: int) -> None:
        """The upstream said its status."""
        self.span.set_attribute("http.response.status_code", status)
        if status >= 400:
            failed(self.span, str(status))

    def fail(self, error: BaseException) -> None:
        """It cannot be reached, or broke off."""
        failed(self.span, type(error).__name__)

    def end(self) -> None:
        """Nothing more is read of it; a second call does nothing."""
        if self.span.is_recording():
            self.span.end()


@dataclass(slots=True)
class StreamSpan:
    """The span of one session of a guard: how many pieces of text it was given, and how many tokens it judged."""

    span: Span
    pieces: int = 0
    tokens: int = 0

    def stepped(self, tokens: int) -> None:
        """The guard took a piece, or the end, and judged so many tokens."""
        self.pieces += 1
        self.tokens += tokens

    def fail(self, error: BaseException) -> None:
        """The guard could not judge."""
        failed(self.span, type(error).__name__)

    def end(self) -> None:
        """The session is over; a second call does nothing."""
        if self.span.is_recording():
            self.span.set_attribute("tidegate.pieces", self.pieces)
            self.span.set_attribute("tidegate.tokens", self.tokens)
            self.span.end()


# --- the request --------------------------------------------------------------------------------------------------


class TracedApp:
    """The outermost ASGI app: a span for each HTTP request and each WebSocket, in the trace that the client names."""

    def __init__(self, app: ASGIApp, tracing: Tracing) -> None:
        self._app = app
        self._tracing = tracing

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or scope["path"] in _PROBES:
            await self._app(scope, receive, send)
            return
        asked = scope.get("method", "GET")
        method = asked if asked in METHODS else "_OTHER"
        attributes: dict[str, Any] = {"http.request.method": method, "url.scheme": scope.get("scheme", "http")}
        carried = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        with self._tracing.tracer.start_as_current_span(
            method,
            context=propagate.extract(_traced(carried)),
            kind=SpanKind.SERVER,
            attributes=attributes,
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            trace_id.set(format(span.get_span_context().trace_id, "032x"))

            async def watched(message: Message) -> None:
                if message["type"] == "http.response.start":
                    span.set_attribute("http.response.status_code", message["status"])
                    if message["status"] >= 500:
                        failed(span, str(message["status"]))
                await send(message)

            try:
                await self._app(scope, receive, watched)
            except BaseException as error:
                if not isinstance(error, asyncio.CancelledError):
                    span.set_attribute("http.response.status_code", 500)
                failed(span, type(error).__name__)
                raise
            finally:
                route = route_of(scope)
                if route is not None:
                    span.set_attribute("http.route", route)
                    span.update_name(f"{method} {route}")


def _traced(headers: Mapping[str, str]) -> dict[str, str]:
    """The headers that name a trace, and no others: no propagator needs to see a key."""
    return {name: headers[name] for name in propagate.get_global_textmap().fields if name in headers}
