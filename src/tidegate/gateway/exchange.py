"""The life of one exchange, whatever the door: a judge between a client and any upstream.

The prompt is judged while the upstream already starts; nothing of its answer is read before the prompt's decision is
there. Then the answer goes through the door's own judge. Every decision is kept before the client sees the end of the
exchange, also when the client hangs up in the middle: that ends the upstream's request and closes every session.
A client that stays but stops reading is given up after a while, as if it had hung up.

A `Door` knows one protocol: how a request reads, how an answer is judged, how a refusal and an error look. It has no
sockets. An `Endpoint` is a door that stands open: what Starlette routes to.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Generic, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Send
from starlette.types import Scope as AsgiScope

from tidegate.deadlines import within
from tidegate.errors import StoreError, TidegateError, UpstreamError
from tidegate.gateway import sse
from tidegate.gateway.asked import Asked, PromptText, earlier_texts
from tidegate.gateway.channels import BLOCKS, Judging
from tidegate.gateway.history import judge_earlier
from tidegate.gateway.leaving import hang_up
from tidegate.gateway.redaction import is_out, masked_body, spared_of
from tidegate.gateway.schemas import decision_field, read_body, worst_decision
from tidegate.gateway.scopes import Admit, scope_of
from tidegate.gateway.statuses import Problem, problem_of
from tidegate.gateway.telemetry import Telemetry
from tidegate.gateway.upstream import KeyHeader, Upstream, UpstreamAnswer
from tidegate.guards.base import StreamGuard
from tidegate.moderate import Keep, Retry, moderate, surely
from tidegate.policy import UNJUDGED_REQUEST, Policy, PolicySource, Retention, decide
from tidegate.settings import Continues
from tidegate.types import Action, Conversation, Coverage, CoverageState, Decision, Scope, Target

__all__ = ["Behind", "Door", "Endpoint", "Watch"]

A = TypeVar("A", bound=Asked)
T = TypeVar("T")

_log = logging.getLogger("tidegate.gateway")
_EVENT_STREAM: Final = "text/event-stream"
_UNJUDGED: Final = "there is text here that no guard can judge, and the policy takes no such request"
_TELL_S: Final = 1.0
"""Seconds that a client may take to be told that the server stops."""
_SOON: Final = {"retry-after": "1"}
_NO_UPSTREAM: Final = "this gateway has no upstream: start it with one"


# --- what a door is -----------------------------------------------------------------------------------------------


class Watch(Protocol):
    """A streaming answer on its way through: the upstream's bytes in, the client's bytes out.

    `tidegate.gateway.answers.AnswerStream` is one.

    Attributes:
        done: whether all is said: what comes from the upstream after that is of no use.
        complete: whether the upstream itself said that it has no more to say.
        error: what went wrong with the upstream; None when nothing did.
        released: how many characters of text went out.
        retry: from where the upstream is to go on, instead of what it says now; None while it need not.
        due_s: in how many seconds `late` is to be called if nothing comes before, at least 0; None for never.
    """

    done: bool
    complete: bool
    error: UpstreamError | None
    released: int

    @property
    def held(self) -> int:
        """How many characters are held now."""
        ...

    @property
    def retry(self) -> Retry | None: ...

    @property
    def due_s(self) -> float | None: ...

    async def late(self) -> bytes:
        """Nothing came, and what is held may be held no longer; returns what may go out. Raises StoreError."""
        ...

    def resume(self) -> None:
        """What is fed next is what the upstream says after it was asked to go on."""
        ...

    async def give_up(self) -> bytes:
        """The upstream cannot go on; returns the end for the client. Raises StoreError."""
        ...

    async def feed(self, data: bytes) -> bytes:
        """Take what the upstream sent; returns what may go to the client now. Raises StoreError."""
        ...

    async def end(self, error: UpstreamError | None = None) -> bytes:
        """The upstream has no more to say, or broke off; returns the end for the client. Raises StoreError."""
        ...

    async def close(self) -> None:
        """Nobody listens any more: give everything back, and keep the decisions so far. Raises StoreError."""
        ...


class Door(Protocol[A]):
    """One protocol that clients speak.

    Attributes:
        route: where clients find it, as ``/v1/chat/completions``.
        path: the same below the upstream's base URL, as ``/chat/completions``.
        key_header: how the upstream is shown the gateway's own key, where it has one.
        headers: the names of the client's headers that go on, in lower case. Those that carry a key
            (``authorization``, ``x-api-key``) go on only where the gateway has no key of its own.
    """

    @property
    def route(self) -> str: ...

    @property
    def path(self) -> str: ...

    @property
    def key_header(self) -> KeyHeader: ...

    @property
    def headers(self) -> tuple[str, ...]: ...

    def read(self, body: dict[str, Any], *, judge_system: bool) -> A:
        """Understand a request. Raises Problem: 400, with the place of what is wrong."""
        ...

    def refusal(self, asked: A, message: str, field: dict[str, Any]) -> dict[str, Any]:
        """A whole answer to a blocked prompt: the policy's message, and the field ``tidegate``."""
        ...

    def refusal_events(self, asked: A, message: str, field: dict[str, Any]) -> bytes:
        """The same as an event stream, from its first event to its last."""
        ...

    def watch(self, asked: A, judging: Judging) -> Watch:
        """What judges an answer that streams."""
        ...

    async def judge(self, asked: A, answer: Any, judging: Judging) -> dict[str, Any]:
        """Judge a whole answer; returns what may go to the client.

        Raises:
            UpstreamError: when it is not an answer of this protocol.
            StoreError: when a decision could not be kept.
        """
        ...

    def again(self, asked: A, retry: Retry, continues: Continues) -> dict[str, Any] | None:
        """The request that asks the upstream to go on from a text; None where this protocol or request has none."""
        ...

    def error(self, problem: Problem) -> dict[str, Any]:
        """The body of an error."""
        ...

    def error_event(self, problem: Problem) -> bytes:
        """An error in the middle of an event stream."""
        ...


@dataclass(frozen=True, slots=True)
class Behind:
    """What stands behind every door.

    Attributes:
        guard: judges prompts and answers.
        policy: where the policy in force is; each exchange is decided by one, from its beginning to its end.
        keep: where decisions go; None for nowhere.
        upstream: the LLM; None when there is none, which is an error for every request.
        telemetry: counts.
        longest_body: the most bytes of a request.
        longest_stream: the most bytes of a streaming answer, as the upstream sends it.
        guard_timeout_s: seconds that the guard may take for each step; None for as long as it wants.
        client_timeout_s: seconds that the client may take nothing of what is sent; None for as long as it wants.
        trusted: names of upstream fields that the operator says carry no text of the model.
        judge_system: whether system and developer turns are judged too.
        continues: how the upstream goes on from the beginning of an answer; see `tidegate.settings.Settings`.
        admit: counts a request about a subject, given its tenant and its name, and raises Problem where it has to wait;
            None lets all in.
    """

    guard: StreamGuard
    policy: PolicySource
    keep: Keep | None
    upstream: Upstream | None
    telemetry: Telemetry
    longest_body: int
    longest_stream: int
    guard_timeout_s: float | None
    client_timeout_s: float | None
    trusted: frozenset[str] = frozenset()
    judge_system: bool = False
    continues: Continues = "no"
    admit: Admit | None = None


class Endpoint(Generic[A]):
    """A door that stands open.

    Args:
        door: which protocol is spoken.
        behind: what stands behind it.
    """

    def __init__(self, door: Door[A], behind: Behind) -> None:
        self.door = door
        self.behind = behind

    async def answer(self, request: Request) -> ASGIApp:
        """Read the request; what is returned carries the exchange out, or tells what is wrong with it."""
        behind = self.behind
        try:
            if behind.upstream is None:
                raise Problem(503, _NO_UPSTREAM, "server_error", None, "no_upstream")
            body = await read_body(request, longest=behind.longest_body)
            asked = self.door.read(body.value, judge_system=behind.judge_system)
            scope = scope_of(request, asked.subject)
            if behind.admit is not None:
                await behind.admit(scope.tenant, scope.subject)
        except Problem as problem:
            return self.tell(problem)
        headers = {name: request.headers[name] for name in self.door.headers if name in request.headers}
        return _Exchange(self, behind.upstream, asked, scope, headers, body.sent(asked.body))

    def tell(self, problem: Problem) -> JSONResponse:
        """An error in the shape of this door."""
        return JSONResponse(self.door.error(problem), problem.status, dict(problem.headers))

    async def keep(
        self, decision: Decision, conversation: Conversation, target: str, retention: Retention
    ) -> str | None:
        """Count a decision and keep it, to the end even when the client goes away meanwhile; returns its id, if any.

        Raises:
            StoreError: when it could not be kept.
        """
        self.behind.telemetry.count(decision, target)
        if self.behind.keep is None:
            return None
        try:
            return await surely(self.behind.keep(decision, conversation, retention=retention))
        except Exception as error:  # whatever keeps a decision from being kept must not pass for success
            _log.error("a decision could not be kept: %s", type(error).__name__)
            raise StoreError("a decision could not be kept") from error


# --- one exchange -------------------------------------------------------------------------------------------------


class _Stalled(Exception):
    """The client is still there, but does not take what is sent."""


class _Exchange(Generic[A]):
    """One request and its answer: an ASGI app, so that it sees the client hang up."""

    def __init__(
        self,
        endpoint: Endpoint[A],
        upstream: Upstream,
        asked: A,
        scope: Scope,
        headers: Mapping[str, str],
        body: bytes,
    ) -> None:
        self._endpoint = endpoint
        self._door = endpoint.door
        self._behind = endpoint.behind
        self._asked = asked
        self._scope = scope
        self._policy: Policy = endpoint.behind.policy.current.at(scope)
        self._upstream = upstream
        self._headers = headers
        self._body = body
        self._keeping: list[asyncio.Task[str | None]] = []
        self._answers: list[UpstreamAnswer] = []
        self._masks = self._policy.for_scope(scope, Target.PROMPT).masks and not self._policy.observe
        self._changed = asked.body
        self._begun = False
        self._stopping = False

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        async def noted(message: Message) -> None:
            self._begun = True
            await send(message)

        work = asyncio.ensure_future(self._run(scope, receive, noted))
        gone = asyncio.ensure_future(hang_up(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        except _Stalled:
            self._behind.telemetry.stalled_clients.inc()
            _log.warning("a client stopped reading its answer, and was given up")
        except asyncio.CancelledError:
            self._stopping = True
            _log.warning("an exchange was ended, because the server stops")
        finally:
            for task in (gone, work):
                task.cancel()
            await asyncio.wait({work, gone})
            if not work.cancelled() and work.exception() is not None and not isinstance(work.exception(), _Stalled):
                _log.debug("exchange ended early: %s", type(work.exception()).__name__)
        if self._stopping and not self._begun:
            await self._endpoint.tell(_stopped())(scope, receive, _patient(send, _TELL_S))

    async def _run(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        try:
            await self._take_unjudged()
        except Problem as problem:
            await self._endpoint.tell(problem)(scope, receive, send)
            return
        except TidegateError as error:
            await self._endpoint.tell(problem_of(error))(scope, receive, send)
            return
        call = None if self._masks else asyncio.ensure_future(self._call(self._body))
        try:
            refusal = await self._judge_prompt(call)
            if refusal is not None:
                response: ASGIApp = refusal
            else:
                call = call or asyncio.ensure_future(self._call(self._body))
                answer = await call
                if self._asked.stream and answer.status == 200 and answer.media_type == _EVENT_STREAM:
                    await self._stream(answer, send)
                    return
                response = await self._whole(answer)
            await self._settle()
        except TidegateError as error:
            self._count_error(error)
            response = self._endpoint.tell(problem_of(error))
        except Problem as problem:
            response = self._endpoint.tell(problem)
        finally:
            await _drop(call)
            for again in self._answers:
                again.close()
            with contextlib.suppress(StoreError):
                await self._settle()
        await response(scope, receive, send)

    async def _call(self, body: bytes) -> UpstreamAnswer:
        door = self._door
        return await self._upstream.send(
            "POST",
            door.path,
            headers=self._headers,
            key_header=door.key_header,
            body=body,
            model=self._asked.model,
        )

    # the prompt

    async def _take_unjudged(self) -> None:
        """Decide about text that no guard can judge; the prompt's own decision lists it where it may go on.

        Raises:
            Problem: when the policy refuses it.
            StoreError: when the decision about that could not be kept.
        """
        asked = self._asked
        if not asked.unseen:
            return
        unjudged = tuple(replace(part, state=CoverageState.NOT_JUDGED) for part in asked.coverage)
        decision = decide(self._policy, UNJUDGED_REQUEST, self._scope, unjudged)
        refused = decision.action >= BLOCKS
        if refused or not asked.new or decision.observed is not None:
            self._keep_prompt(decision)
        if refused:
            await self._settle()
            raise Problem(400, _UNJUDGED, param=asked.unseen[0].path, code="unjudged_content")

    def _keep_prompt(self, decision: Decision) -> asyncio.Task[str | None]:
        task = asyncio.ensure_future(self._keep(decision, self._asked.conversation, "prompt"))
        self._keeping.append(task)
        return task

    async def _judge_prompt(self, call: asyncio.Future[UpstreamAnswer] | None) -> ASGIApp | None:
        """Judge what is new; returns what the client gets when that is blocked, else None."""
        asked, behind = self._asked, self._behind
        history = self._policy.history
        earlier = earlier_texts(asked.said, history.turns) if history.judge else ()
        if not asked.new and not earlier:
            self._mask_prompt((), ())
            return None
        work = asyncio.gather(
            *(
                moderate(
                    text.conversation,
                    guard=behind.guard,
                    policy=self._policy,
                    scope=self._scope,
                    timeout_s=behind.guard_timeout_s,
                    coverage=(),
                )
                for text in asked.new
            )
        )
        decisions, before = await asyncio.gather(work, self._judge_earlier(earlier)) if earlier else (await work, [])
        decisions += before
        texts = (*asked.new, *earlier)
        masked = self._mask_prompt(texts, decisions)
        number = _worst(decisions, len(asked.new))
        behind.telemetry.count_failures(one for place, one in enumerate(decisions) if place != number)
        decision = replace(decisions[number], coverage=tuple(_covered(asked, earlier, texts, decisions)))
        if decision.action is Action.REDACT and not masked:
            decision = replace(decision, action=Action.BLOCK, interventions=())
        kept = self._keep_prompt(decision)
        if decision.action < BLOCKS:
            return None
        await _drop(call)
        return self._refusal(decision, texts[number], await surely(_result(kept)))

    async def _judge_earlier(self, texts: Sequence[PromptText]) -> list[Decision]:
        return await judge_earlier(
            [text.conversation for text in texts],
            guard=self._behind.guard,
            policy=self._policy,
            scope=self._scope,
            timeout_s=self._behind.guard_timeout_s,
        )

    def _mask_prompt(self, texts: Sequence[PromptText], decisions: Sequence[Decision]) -> bool:
        """Take personal data out of what goes to the upstream, where the policy says so; False when some is left."""
        if not self._masks:
            return False
        asked = self._asked
        redacted = [text for text, one in zip(texts, decisions, strict=True) if one.action is Action.REDACT]
        taken_out = frozenset[str]().union(*(text.paths for text in redacted))
        spared = {*spared_of(asked.unseen, asked.coverage)}.union(*(text.paths for text in asked.new)) - taken_out
        self._changed, count = masked_body(asked.body, spared, taken_out)
        if count:
            self._body = _bytes_of(self._changed)
        return not redacted or self._is_out(texts, redacted)

    def _is_out(self, texts: Sequence[PromptText], redacted: Sequence[PromptText]) -> bool:
        """Whether nothing personal is left in these texts of the request, as the door reads it now."""
        try:
            masked = self._door.read(self._changed, judge_system=self._behind.judge_system)
        except Problem:
            return False
        history = self._policy.history
        left = (*masked.new, *(earlier_texts(masked.said, history.turns) if history.judge else ()))
        if len(left) != len(texts):
            return False
        pairs = zip(texts, left, strict=True)
        return all(
            is_out(before.conversation.turns[-1], after.conversation.turns[-1])
            for before, after in pairs
            if any(before is one for one in redacted)
        )

    def _refusal(self, decision: Decision, text: PromptText, identity: str | None) -> ASGIApp:
        field = decision_field(decision, self._policy, text=text, identity=identity)
        message = self._policy.message_for(decision.rule, self._scope.language)
        if self._asked.stream:
            return _Events(self._door.refusal_events(self._asked, message, field))
        return JSONResponse(self._door.refusal(self._asked, message, field))

    async def _settle(self) -> None:
        """Wait until the decisions on the prompt are kept."""
        for kept in self._keeping:
            await surely(_result(kept))

    # the answer

    def _judging(self) -> Judging:
        behind = self._behind
        return Judging(
            guard=behind.guard,
            policy=self._policy,
            scope=self._scope,
            prompt=self._asked.conversation,
            keep=self._keep_answer,
            tools=self._asked.tools,
            timeout_s=behind.guard_timeout_s,
            trusted=behind.trusted,
            note=behind.telemetry.count_failures,
            retries=self._asked.stream and self._policy.may_roll_back,
            delayed=behind.telemetry.added_delay.observe,
        )

    async def _keep_answer(self, decision: Decision, conversation: Conversation) -> str | None:
        return await self._keep(decision, conversation, "response")

    async def _keep(self, decision: Decision, conversation: Conversation, target: str) -> str | None:
        return await self._endpoint.keep(decision, conversation, target, self._policy.retention)

    async def _whole(self, answer: UpstreamAnswer) -> JSONResponse:
        if answer.status != 200:
            self._count_status(answer)
            raise await answer.problem()
        if self._asked.stream:
            raise UpstreamError("the upstream did not stream, although it was asked to")
        judged = await self._door.judge(self._asked, await answer.json(), self._judging())
        return JSONResponse(judged, headers=dict(answer.headers))

    async def _stream(self, answer: UpstreamAnswer, to_client: Send) -> None:
        telemetry = self._behind.telemetry
        send = _patient(to_client, self._behind.client_timeout_s)
        stream = self._door.watch(self._asked, self._judging())
        told = [(name.encode(), value.encode()) for name, value in answer.headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": [*sse.HEADERS, *told]})
        held = 0
        with telemetry.stream():
            try:
                async for data in self._advance(stream, answer):
                    if (now := stream.held) != held:
                        telemetry.held.inc(now - held)
                        held = now
                    if stream.done:
                        if not stream.complete:
                            answer.close()
                        await self._settle()
                    if data:
                        await send({"type": "http.response.body", "body": data, "more_body": True})
            except StoreError as error:
                answer.close()
                event = self._door.error_event(problem_of(error))
                await send({"type": "http.response.body", "body": event, "more_body": True})
            except asyncio.CancelledError:  # the client is gone, or the server stops
                answer.close()
                if not self._stopping:
                    raise
            finally:
                telemetry.held.dec(held)
                await surely(_closed(stream))
                telemetry.released.inc(stream.released)
        if stream.error is not None:
            self._count_error(stream.error)
        if self._stopping:
            event = self._door.error_event(_stopped())
            with contextlib.suppress(_Stalled):
                await _patient(to_client, _TELL_S)({"type": "http.response.body", "body": event, "more_body": False})
            return
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        if stream.complete:
            await answer.leave()

    async def _advance(self, stream: Watch, answer: UpstreamAnswer) -> AsyncIterator[bytes]:
        """Everything for the client, piece by piece, until all is said; the upstream is asked again where needed."""
        tried = False
        while True:
            try:
                async for data in _watched(stream, answer, self._behind.longest_stream):
                    yield data
            except UpstreamError as error:
                if not tried or stream.done:
                    yield await stream.end(error)
                    return
                self._count_error(error)
                yield await stream.give_up()
                return
            retry = stream.retry
            if retry is None or stream.done:
                return
            answer.close()
            tried = True
            again = await self._again(retry)
            if again is None:
                yield await stream.give_up()
                return
            answer = again
            stream.resume()

    async def _again(self, retry: Retry) -> UpstreamAnswer | None:
        """Ask the upstream to go on; None when it cannot."""
        asked = replace(self._asked, body=self._changed)
        body = self._door.again(asked, retry, self._behind.continues)
        if body is None:
            return None
        try:
            answer = await self._call(_bytes_of(body))
        except UpstreamError as error:
            self._count_error(error)
            return None
        self._answers.append(answer)
        if answer.status != 200 or answer.media_type != _EVENT_STREAM:
            self._count_status(answer)
            return None
        return answer

    def _count_status(self, answer: UpstreamAnswer) -> None:
        """An answer that cannot be used as it is; one that says that the request is wrong is no failure of ours."""
        self._behind.telemetry.upstream_errors.labels("status").inc()
        level = logging.INFO if 400 <= answer.status <= 499 else logging.WARNING
        _log.log(level, "exchange failed: the upstream answered with status %d", answer.status)

    def _count_error(self, error: TidegateError) -> None:
        if isinstance(error, UpstreamError):
            kind = {None: "malformed", 502: "broken", 504: "timeout"}.get(error.status, "broken")
            self._behind.telemetry.upstream_errors.labels(kind).inc()
        _log.warning("exchange failed: %s", _said(error))


def _said(error: TidegateError) -> str:
    """An error for the log. Ours on an upstream quote nothing that it said; of others, the kind is enough."""
    kind = type(error).__name__
    if not isinstance(error, UpstreamError):
        return kind
    return f"{kind}: {error}" if error.reason is None else f"{kind}: {error} ({error.reason})"


def _stopped() -> Problem:
    return Problem(503, "this gateway is being stopped: ask again", "server_error", None, "stopping", _SOON)


async def _watched(stream: Watch, answer: UpstreamAnswer, longest: int) -> AsyncIterator[bytes]:
    """What goes to the client of one answer of the upstream, up to its end or to where another is needed.

    Raises:
        UpstreamError: when it breaks off, or sends more bytes than ``longest``.
    """
    pieces = answer.pieces()
    size = 0
    coming: asyncio.Future[bytes] | None = None
    try:
        while not stream.done and stream.retry is None:
            due_s = stream.due_s
            if due_s is None and coming is None:
                data = await anext(pieces, None)
            else:
                coming = coming or asyncio.ensure_future(_next(pieces))
                await asyncio.wait({coming}, timeout=due_s)
                if not coming.done():
                    yield await stream.late()
                    continue
                data, coming = coming.result() or None, None
            if data is None:
                yield await stream.end()
                return
            yield await stream.feed(data)
            size += len(data)
            if size > longest and not stream.done:
                raise UpstreamError(f"the upstream's answer is longer than {longest:,} bytes")
    finally:
        if coming is not None:
            coming.cancel()
            await asyncio.wait({coming})


def _bytes_of(body: dict[str, Any]) -> bytes:
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()


async def _next(pieces: AsyncIterator[bytes]) -> bytes:
    return await anext(pieces, b"")


def _worst(decisions: Sequence[Decision], new: int) -> int:
    """Which decision counts: of the new texts, which are the first ones, unless an earlier turn calls for more."""
    worst = worst_decision(decisions)
    if worst < new or not new:
        return worst
    of_new = worst_decision(decisions[:new])
    return worst if decisions[worst].action > decisions[of_new].action else of_new


def _covered(
    asked: Asked, earlier: Sequence[PromptText], texts: Sequence[PromptText], decisions: Sequence[Decision]
) -> Iterator[Coverage]:
    """The coverage of a request, given what was decided of its texts, the earlier ones included."""
    failed = frozenset[str]().union(
        *(text.paths for text, one in zip(texts, decisions, strict=True) if one.failure is not None)
    )
    judged = frozenset[str]().union(*(text.paths for text in earlier))
    unseen = frozenset(asked.unseen)
    for part in asked.coverage:
        if part.path in failed:
            yield replace(part, state=CoverageState.NOT_JUDGED)
        elif part.path in judged and part not in unseen:
            yield replace(part, state=CoverageState.JUDGED)
        else:
            yield part


def _patient(send: Send, timeout_s: float | None) -> Send:
    """The same, which raises _Stalled when the client takes nothing for so long."""

    async def patiently(message: Message) -> None:
        try:
            await within(send(message), timeout_s)
        except TimeoutError:
            raise _Stalled from None

    return patiently


async def _closed(stream: Watch) -> None:
    with contextlib.suppress(StoreError):
        await stream.close()


async def _result(task: asyncio.Task[T]) -> T:
    return await task


async def _drop(call: asyncio.Future[UpstreamAnswer] | None) -> None:
    """End the upstream's request at once, however far it is; nothing where there is none."""
    if call is None:
        return
    call.cancel()
    await asyncio.wait({call})
    if not call.cancelled() and call.exception() is None:
        call.result().close()


class _Events:
    """A whole event stream as one response."""

    def __init__(self, body: bytes) -> None:
        self._body = body

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": list(sse.HEADERS)})
        await send({"type": "http.response.body", "body": self._body})
