"""What is counted and timed, for Prometheus. A registry of its own for each app; no label ever carries user text.

With several workers, each writes its numbers to files, and any of them tells the sum: prometheus_client's multiprocess
mode, which is on where ``PROMETHEUS_MULTIPROC_DIR`` is set when it is first imported. There a gauge is the sum or the
highest value of the workers that live.
"""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, cast, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from tidegate.guards.around import GuardAround
from tidegate.guards.base import IdSession, Session, StreamGuard
from tidegate.guards.breaker import State
from tidegate.guards.terms import Terms, on_terms
from tidegate.policy import UNJUDGED_ANSWER, UNJUDGED_REQUEST, Policy
from tidegate.types import Channel, Conversation, Decision, InterventionKind, TokenVerdict, Verdict

if TYPE_CHECKING:
    from tidegate.gateway.tracing import StreamSpan, Tracing

__all__ = ["CONTENT_TYPE", "Telemetry", "TimedGuard", "several_workers"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


def several_workers() -> bool:
    """Whether numbers are told of several workers together; then gauges that are functions are not told."""
    return bool(os.environ.get("PROMETHEUS_MULTIPROC_DIR"))


class Telemetry:
    """The metrics of one gateway.

    Args:
        tracing: is told of decisions and of what the guard does; None for no traces.
    """

    def __init__(self, tracing: Tracing | None = None) -> None:
        self.tracing = tracing
        self._shared = os.environ["PROMETHEUS_MULTIPROC_DIR"] if several_workers() else None
        self._policy: tuple[str, str] | None = None
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "tidegate_requests", "Requests that were answered.", ("route", "status"), registry=self.registry
        )
        self.decisions = Counter(
            "tidegate_decisions", "Decisions by what was judged.", ("target", "action"), registry=self.registry
        )
        self.failures = Counter(
            "tidegate_guard_failures", "Guards that did not judge, by kind.", ("kind",), registry=self.registry
        )
        self.observed = Counter(
            "tidegate_observed_decisions",
            "Decisions that would have been others if all that the policy only observes were in force.",
            ("target", "action", "would_be"),
            registry=self.registry,
        )
        self.degraded = Counter(
            "tidegate_degraded",
            "Texts and streams that the edge guard judged in the guard's place, by why that could not.",
            ("kind",),
            registry=self.registry,
        )
        self.advice = Counter(
            "tidegate_advice", "What policies advised beside their actions.", ("advice",), registry=self.registry
        )
        self.throttled = Counter(
            "tidegate_throttled", "How often a subject was told to slow down.", registry=self.registry
        )
        self.webhook_posts = Counter(
            "tidegate_webhook_posts",
            "Posts to webhooks, by what became of them.",
            ("webhook", "outcome"),
            registry=self.registry,
        )
        self.webhook_deliveries = Gauge(
            "tidegate_webhook_deliveries",
            "Deliveries in the outbox: those that wait, and those that were given up.",
            ("webhook", "state"),
            registry=self.registry,
            multiprocess_mode="livemax",
        )
        self.circuit = Gauge(
            "tidegate_guard_circuit",
            "1 for the state that the guard's circuit breaker is in.",
            ("state",),
            registry=self.registry,
            multiprocess_mode="livesum",
        )
        self.policy_info = Gauge(
            "tidegate_policy_info",
            "1 for the policy in force.",
            ("name", "version"),
            registry=self.registry,
            multiprocess_mode="livemax",
        )
        self.policy_stale = Gauge(
            "tidegate_policy_stale",
            "1 while the policy file cannot be used as it is.",
            registry=self.registry,
            multiprocess_mode="livemax",
        )
        self.policy_changes = Counter(
            "tidegate_policy_changes", "What became of changed policy files.", ("outcome",), registry=self.registry
        )
        self.upstream_errors = Counter(
            "tidegate_upstream_errors", "Upstreams that failed, by kind.", ("kind",), registry=self.registry
        )
        self.stalled_clients = Counter(
            "tidegate_stalled_clients", "Clients that stopped reading and were given up.", registry=self.registry
        )
        guard_seconds = Histogram(
            "tidegate_guard_seconds",
            "Time in the guard: judge for a whole text, step for a piece of a stream.",
            ("call",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.judge_seconds = guard_seconds.labels("judge")
        self.step_seconds = guard_seconds.labels("step")
        self.open_streams = Gauge(
            "tidegate_open_streams", "Answers that stream now.", registry=self.registry, multiprocess_mode="livesum"
        )
        self.held = Gauge(
            "tidegate_held_characters",
            "Characters of streaming answers that are held now.",
            registry=self.registry,
            multiprocess_mode="livesum",
        )
        self.released = Counter(
            "tidegate_released_characters", "Characters of streamed answers that were let out.", registry=self.registry
        )

        self.interventions = Counter(
            "tidegate_interventions",
            "What was done to texts to carry decisions out, by how it ended.",
            ("target", "kind", "outcome"),
            registry=self.registry,
        )
        self.thrown = Counter(
            "tidegate_rolled_back_characters", "Characters that were rolled back.", registry=self.registry
        )
        self.leaked = Counter(
            "tidegate_leaked_characters",
            "Characters that had left a stream when they were found to be flagged.",
            registry=self.registry,
        )
        self.added_delay = Histogram(
            "tidegate_added_delay_seconds",
            "For each choice of a stream, how long its text was held before it left, the longest of it.",
            buckets=_SECONDS,
            registry=self.registry,
        )

    def count(self, decision: Decision, target: str) -> None:
        """Count one decision about a ``prompt``, a ``response`` or a ``moderation``."""
        if self.tracing is not None:
            self.tracing.decision(decision, target)
        self.decisions.labels(target, decision.action.word).inc()
        for advice in decision.advice:
            self.advice.labels(advice.value).inc()
        if decision.observed is not None:
            self.observed.labels(target, decision.action.word, decision.observed.action.word).inc()
        if decision.failure is not None and decision.failure not in (UNJUDGED_REQUEST, UNJUDGED_ANSWER):
            self.failures.labels(decision.failure.kind).inc()
        for one in decision.interventions:
            self.interventions.labels(target, one.kind.value, one.outcome).inc(one.count)
            if one.kind is InterventionKind.ROLLBACK:
                self.thrown.inc(one.characters)
        self.leaked.inc(decision.leaked)

    def count_failures(self, decisions: Iterable[Decision]) -> None:
        """Count the guard's failures behind decisions that a worse one stands for."""
        for decision in decisions:
            if decision.failure is not None:
                self.failures.labels(decision.failure.kind).inc()

    def tell_webhook(self, name: str, outcome: str) -> None:
        """A webhook was posted to."""
        self.webhook_posts.labels(name, outcome).inc()

    def tell_outbox(self, name: str, waiting: int, dead: int) -> None:
        """So many deliveries to a webhook lie in the outbox now."""
        self.webhook_deliveries.labels(name, "waiting").set(waiting)
        self.webhook_deliveries.labels(name, "dead").set(dead)

    def tell_circuit(self, state: State) -> None:
        """The circuit breaker is in this state now."""
        for other in get_args(State):
            self.circuit.labels(other).set(other == state)

    def tell_policy(self, policy: Policy, *, stale: bool) -> None:
        """This policy is in force now; stale when its file says something else, that cannot be used."""
        if self._policy is not None and self._shared is None:
            self.policy_info.remove(*self._policy)
        elif self._policy is not None:
            self.policy_info.labels(*self._policy).set(0)
        self._policy = (policy.name, policy.version)
        self.policy_info.labels(policy.name, policy.version).set(1)
        self.policy_stale.set(stale)

    @contextmanager
    def stream(self) -> Iterator[None]:
        """While an answer streams."""
        self.open_streams.inc()
        try:
            yield
        finally:
            self.open_streams.dec()

    def page(self) -> bytes:
        """All of it in Prometheus' text format; of all workers together."""
        if self._shared is None:
            return generate_latest(self.registry)
        registry = CollectorRegistry()
        MultiProcessCollector(registry, self._shared)  # type: ignore[no-untyped-call]
        return generate_latest(registry)


class TimedGuard(GuardAround):
    """The same guard, with its time taken, and with spans where there are traces."""

    def __init__(self, guard: StreamGuard, telemetry: Telemetry) -> None:
        super().__init__(guard)
        self._telemetry = telemetry

    async def judge(self, conversation: Conversation) -> Verdict:
        tracing = self._telemetry.tracing
        begun = time.perf_counter()
        try:
            with nullcontext() if tracing is None else tracing.judging(self.name):
                return await self.guard.judge(conversation)
        finally:
            self._telemetry.judge_seconds.observe(time.perf_counter() - begun)

    def open(
        self, context: Conversation | None, channel: Channel = Channel.ANSWER, *, reasoning: str = "", name: str = ""
    ) -> Session:
        return _TimedSession(
            self.guard.open(context, channel, reasoning=reasoning, name=name),
            self._telemetry,
            None if self._telemetry.tracing is None else self._telemetry.tracing.watching(self.name, channel),
        )

    def on_terms(self, terms: Terms) -> TimedGuard:
        return TimedGuard(on_terms(self.guard, terms), self._telemetry)


class _TimedSession:
    __slots__ = ("_session", "_span", "_telemetry")

    def __init__(self, session: Session, telemetry: Telemetry, span: StreamSpan | None = None) -> None:
        self._session = session
        self._telemetry = telemetry
        self._span = span

    async def feed(self, text: str) -> tuple[TokenVerdict, ...]:
        return await self._timed(self._session.feed(text))

    async def feed_ids(self, ids: Sequence[int]) -> tuple[TokenVerdict, ...]:
        return await self._timed(cast(IdSession, self._session).feed_ids(ids))

    async def finish(self) -> tuple[TokenVerdict, ...]:
        return await self._timed(self._session.finish())

    async def _timed(self, step: Awaitable[tuple[TokenVerdict, ...]]) -> tuple[TokenVerdict, ...]:
        begun = time.perf_counter()
        try:
            tokens = await step
            if self._span is not None:
                self._span.stepped(len(tokens))
            return tokens
        except BaseException as error:
            if self._span is not None:
                self._span.fail(error)
            raise
        finally:
            self._telemetry.step_seconds.observe(time.perf_counter() - begun)

    def close(self) -> None:
        if self._span is not None:
            self._span.end()
        self._session.close()
