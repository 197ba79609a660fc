"""``POST /v1/chat/completions``: a judge between a client and any OpenAI-compatible upstream.

The prompt is judged while the upstream already starts; nothing of its answer is read before the prompt's decision is
there. Then the answer goes through `tidegate.gateway.answers`. Every decision is kept before the client sees the end of
the exchange, also when the client hangs up in the middle: that ends the upstream's request and closes every session.
A client that stays but stops reading is given up after a while, as if it had hung up.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, Final, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Send
from starlette.types import Scope as AsgiScope

from tidegate.errors import StoreError, TidegateError, UpstreamError
from tidegate.gateway import sse
from tidegate.gateway.answers import NO_USAGE, AnswerStream, judge_answer
from tidegate.gateway.channels import BLOCKS, Judging
from tidegate.gateway.schemas import (
    ChatRequest,
    PromptText,
    decision_field,
    read_chat,
    read_json,
    worst_decision,
)
from tidegate.gateway.statuses import Problem, problem_of
from tidegate.gateway.telemetry import Telemetry
from tidegate.gateway.upstream import Upstream, UpstreamAnswer
from tidegate.guards.base import StreamGuard
from tidegate.moderate import Keep, moderate, surely
from tidegate.policy import Policy, PolicySource, Retention
from tidegate.types import Conversation, Coverage, CoverageState, Decision, Scope

__all__ = ["Chat"]

T = TypeVar("T")

_log = logging.getLogger("tidegate.gateway")
_EVENT_STREAM: Final = "text/event-stream"


class _Stalled(Exception):
    """The client is still there, but does not take what is sent."""


class Chat:
    """The endpoint.

    Args:
        guard: judges prompts and answers.
        policy: where the policy in force is; each exchange is decided by one, from its beginning to its end.
        keep: where decisions go; None for nowhere.
        upstream: the LLM; None when there is none, which is an error for every request.
        telemetry: counts.
        longest_body: the most bytes of a request.
        guard_timeout_s: seconds that the guard may take for each step; None for as long as it wants.
        client_timeout_s: seconds that the client may take nothing of what is sent; None for as long as it wants.
        trusted: names of upstream fields that the operator says carry no text of the model.
        judge_system: whether system and developer turns are judged too.
    """

    def __init__(
        self,
        *,
        guard: StreamGuard,
        policy: PolicySource,
        keep: Keep | None,
        upstream: Upstream | None,
        telemetry: Telemetry,
        longest_body: int,
        guard_timeout_s: float | None,
        client_timeout_s: float | None,
        trusted: frozenset[str],
        judge_system: bool = False,
    ) -> None:
        self.guard = guard
        self.policy = policy
        self.upstream = upstream
        self.telemetry = telemetry
        self.guard_timeout_s = guard_timeout_s
        self.client_timeout_s = client_timeout_s
        self.trusted = trusted
        self._keep = keep
        self._longest_body = longest_body
        self._judge_system = judge_system

    async def complete(self, request: Request) -> ASGIApp:
        """Read the request; what is returned carries the exchange out.

        Raises:
            Problem: when the request cannot be used, or there is no upstream.
        """
        if self.upstream is None:
            raise Problem(503, "this gateway has no upstream: start it with one", "server_error", None, "no_upstream")
        body = await read_json(request, longest=self._longest_body)
        chat = read_chat(body, judge_system=self._judge_system)
        return _Exchange(self, self.upstream, chat, request.headers.get("authorization"), request.url.path)

    async def keep(
        self, decision: Decision, conversation: Conversation, target: str, retention: Retention
    ) -> str | None:
        """Count a decision and keep it, to the end even when the client goes away meanwhile; returns its id, if any.

        Raises:
            StoreError: when it could not be kept.
        """
        self.telemetry.count(decision, target)
        if self._keep is None:
            return None
        try:
            return await surely(self._keep(decision, conversation, retention=retention))
        except Exception as error:  # whatever keeps a decision from being kept must not pass for success
            _log.error("a decision could not be kept: %s", type(error).__name__)
            raise StoreError("a decision could not be kept") from error


class _Exchange:
    """One request and its answer: an ASGI app, so that it sees the client hang up."""

    def __init__(
        self, door: Chat, upstream: Upstream, chat: ChatRequest, authorization: str | None, route: str
    ) -> None:
        self._door = door
        self._chat = chat
        self._scope = Scope(route=route, subject=chat.subject)
        self._policy: Policy = door.policy.current.at(self._scope)
        self._upstream = upstream
        self._authorization = authorization
        self._prompt_kept: asyncio.Task[str | None] | None = None

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        work = asyncio.ensure_future(self._run(scope, receive, send))
        gone = asyncio.ensure_future(_hang_up(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        except _Stalled:
            self._door.telemetry.stalled_clients.inc()
            _log.warning("a client stopped reading its answer, and was given up")
        finally:
            for task in (gone, work):
                task.cancel()
            await asyncio.wait({work, gone})
            if not work.cancelled() and work.exception() is not None and not isinstance(work.exception(), _Stalled):
                _log.debug("exchange ended early: %s", type(work.exception()).__name__)

    async def _run(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        body = json.dumps(self._chat.body, ensure_ascii=False, separators=(",", ":")).encode()
        call = asyncio.ensure_future(
            self._upstream.send("POST", "/chat/completions", authorization=self._authorization, body=body)
        )
        try:
            refusal = await self._judge_prompt(call)
            if refusal is not None:
                response: ASGIApp = refusal
            else:
                answer = await call
                if self._chat.stream and answer.status == 200 and answer.media_type == _EVENT_STREAM:
                    await self._stream(answer, send)
                    return
                response = await self._whole(answer)
            await self._settle()
        except TidegateError as error:
            self._count_error(error)
            response = problem_of(error).response()
        except Problem as problem:
            response = problem.response()
        finally:
            await _drop(call)
            with contextlib.suppress(StoreError):
                await self._settle()
        await response(scope, receive, send)

    # the prompt

    async def _judge_prompt(self, call: asyncio.Future[UpstreamAnswer]) -> ASGIApp | None:
        """Judge what is new; returns what the client gets when that is blocked, else None."""
        chat, door = self._chat, self._door
        if not chat.new:
            return None
        decisions = await asyncio.gather(
            *(
                moderate(
                    text.conversation,
                    guard=door.guard,
                    policy=self._policy,
                    scope=self._scope,
                    timeout_s=door.guard_timeout_s,
                    coverage=(),
                )
                for text in chat.new
            )
        )
        number = worst_decision(decisions)
        unjudged = frozenset[str]().union(
            *(text.paths for text, one in zip(chat.new, decisions, strict=True) if one.failure is not None)
        )
        door.telemetry.count_failures(one for place, one in enumerate(decisions) if place != number)
        decision = replace(decisions[number], coverage=tuple(_without(chat.coverage, unjudged)))
        self._prompt_kept = asyncio.ensure_future(self._keep(decision, chat.conversation, "prompt"))
        if decision.action < BLOCKS:
            return None
        await _drop(call)
        return self._refusal(decision, chat.new[number], await surely(_result(self._prompt_kept)))

    def _refusal(self, decision: Decision, text: PromptText, identity: str | None) -> ASGIApp:
        field = decision_field(decision, self._policy, text=text, identity=identity)
        message = self._policy.message_for(decision.rule)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self._chat.model}
        if self._chat.stream:
            return _Events(b"".join(_refusal_events(head, self._chat, message, field)))
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": message},
                "finish_reason": "content_filter",
                "tidegate": field,
            }
            for index in range(self._chat.choices)
        ]
        return JSONResponse(
            {**head, "object": "chat.completion", "choices": choices, "usage": NO_USAGE, "tidegate": field}
        )

    async def _settle(self) -> None:
        """Wait until the prompt's decision is kept."""
        if self._prompt_kept is not None:
            await surely(_result(self._prompt_kept))

    # the answer

    def _judging(self) -> Judging:
        door = self._door
        return Judging(
            guard=door.guard,
            policy=self._policy,
            scope=self._scope,
            prompt=self._chat.conversation,
            keep=self._keep_answer,
            tools=self._chat.tools,
            timeout_s=door.guard_timeout_s,
            trusted=door.trusted,
            note=door.telemetry.count_failures,
        )

    async def _keep_answer(self, decision: Decision, conversation: Conversation) -> str | None:
        return await self._keep(decision, conversation, "response")

    async def _keep(self, decision: Decision, conversation: Conversation, target: str) -> str | None:
        return await self._door.keep(decision, conversation, target, self._policy.retention)

    async def _whole(self, answer: UpstreamAnswer) -> JSONResponse:
        if answer.status != 200:
            self._door.telemetry.upstream_errors.labels("status").inc()
            raise await answer.problem()
        if self._chat.stream:
            raise UpstreamError("the upstream did not stream, although it was asked to")
        try:
            judged, _ = await judge_answer(await answer.json(), self._judging(), choices=self._chat.choices)
        except RecursionError:
            raise UpstreamError("the upstream's answer is nested too deep") from None
        return JSONResponse(judged)

    async def _stream(self, answer: UpstreamAnswer, to_client: Send) -> None:
        telemetry = self._door.telemetry
        send = _patient(to_client, self._door.client_timeout_s)
        stream = AnswerStream(self._judging(), choices=self._chat.choices, wants_usage=self._chat.wants_usage)
        await send({"type": "http.response.start", "status": 200, "headers": list(sse.HEADERS)})
        held = 0
        with telemetry.stream():
            try:
                async for data in _advance(stream, answer):
                    telemetry.held.inc(stream.held - held)
                    held = stream.held
                    if stream.done:
                        if not stream.complete:
                            answer.close()
                        await self._settle()
                    if data:
                        await send({"type": "http.response.body", "body": data, "more_body": True})
            except StoreError as error:
                answer.close()
                await send({"type": "http.response.body", "body": sse.event(problem_of(error).body), "more_body": True})
            finally:
                telemetry.held.dec(held)
                await surely(_closed(stream))
                telemetry.released.inc(stream.released)
        if stream.error is not None:
            self._count_error(stream.error)
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        if stream.complete:
            await answer.leave()

    def _count_error(self, error: TidegateError) -> None:
        if isinstance(error, UpstreamError):
            kind = {None: "malformed", 502: "broken", 504: "timeout"}.get(error.status, "broken")
            self._door.telemetry.upstream_errors.labels(kind).inc()
        _log.warning("exchange failed: %s", type(error).__name__)


async def _advance(stream: AnswerStream, answer: UpstreamAnswer) -> Any:
    """Everything for the client, piece by piece, until all is said."""
    try:
        async for data in answer.pieces():
            yield await stream.feed(data)
            if stream.done:
                return
    except UpstreamError as error:
        yield await stream.end(error)
        return
    yield await stream.end()


def _without(coverage: Iterable[Coverage], unjudged: frozenset[str]) -> Iterator[Coverage]:
    """The coverage, given that the guard failed on these paths."""
    for part in coverage:
        yield replace(part, state=CoverageState.NOT_JUDGED) if part.path in unjudged else part


def _patient(send: Send, timeout_s: float | None) -> Send:
    """The same, which raises _Stalled when the client takes nothing for so long."""

    async def patiently(message: Message) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await send(message)
        except TimeoutError:
            raise _Stalled from None

    return patiently


async def _closed(stream: AnswerStream) -> None:
    with contextlib.suppress(StoreError):
        await stream.close()


async def _result(task: asyncio.Task[T]) -> T:
    return await task


async def _drop(call: asyncio.Future[UpstreamAnswer]) -> None:
    """End the upstream's request at once, however far it is."""
    call.cancel()
    await asyncio.wait({call})
    if not call.cancelled() and call.exception() is None:
        call.result().close()


async def _hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _Events:
    """A whole event stream as one response."""

    def __init__(self, body: bytes) -> None:
        self._body = body

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": list(sse.HEADERS)})
        await send({"type": "http.response.body", "body": self._body})


def _refusal_events(head: dict[str, Any], chat: ChatRequest, message: str, field: dict[str, Any]) -> Iterator[bytes]:
    def chunk(index: int, delta: dict[str, Any], finish_reason: str | None, **more: Any) -> bytes:
        choice = {"index": index, "delta": delta, "finish_reason": finish_reason}
        return sse.event({**head, "object": "chat.completion.chunk", "choices": [choice], **more})

    for index in range(chat.choices):
        yield chunk(index, {"role": "assistant", "content": ""}, None)
        yield chunk(index, {"content": message}, None)
        yield chunk(index, {}, "content_filter", tidegate=field)
    if chat.wants_usage:
        yield sse.event({**head, "object": "chat.completion.chunk", "choices": [], "usage": NO_USAGE})
    yield sse.DONE
