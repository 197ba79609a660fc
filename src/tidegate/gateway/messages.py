"""``POST /v1/messages``: the door for clients of Anthropic's Messages API, and the paths beside it.

The life of an exchange is in `tidegate.gateway.exchange`, reading a request in `tidegate.gateway.messages_asked`, the
judging of answers in `tidegate.gateway.messages_answers`.
"""

from __future__ import annotations

import uuid
from dataclasses import replace
from typing import Any, ClassVar, Final

from starlette.requests import Request
from starlette.responses import JSONResponse

from tidegate.errors import UpstreamError
from tidegate.gateway.channels import Judging
from tidegate.gateway.deltas import is_place
from tidegate.gateway.messages_answers import (
    MessageStream,
    error_body,
    judge_message,
    named_event,
    refused,
    stopped_by,
    text_block,
)
from tidegate.gateway.messages_asked import MessagesRequest, read_messages
from tidegate.gateway.statuses import Problem
from tidegate.gateway.upstream import KeyHeader
from tidegate.moderate import Retry
from tidegate.settings import Continues

__all__ = ["BATCHES", "CountTokensDoor", "MessagesDoor", "tell_batches"]

BATCHES: Final = "/v1/messages/batches{rest:path}"
"""Where clients look for batches."""

NO_USAGE: Final = {"input_tokens": 0, "output_tokens": 0}
"""The usage of an answer that no upstream began."""

_NO_THINKING: Final = {"type": "disabled"}


class MessagesDoor:
    """Anthropic's messages."""

    route: ClassVar[str] = "/v1/messages"
    path: ClassVar[str] = "/messages"
    key_header: ClassVar[KeyHeader] = "x-api-key"
    headers: ClassVar[tuple[str, ...]] = ("x-api-key", "authorization", "anthropic-version", "anthropic-beta")

    def read(self, body: dict[str, Any], *, judge_system: bool) -> MessagesRequest:
        return read_messages(body, judge_system=judge_system)

    def refusal(self, asked: MessagesRequest, message: str, field: dict[str, Any]) -> dict[str, Any]:
        return refused(_head(asked), message, NO_USAGE, field)

    def refusal_events(self, asked: MessagesRequest, message: str, field: dict[str, Any]) -> bytes:
        start = {**_head(asked), "content": [], "stop_reason": None, "stop_sequence": None, "usage": NO_USAGE}
        events: tuple[dict[str, Any], ...] = (
            {"type": "message_start", "message": start},
            *text_block(0, message),
            {"type": "message_delta", "delta": stopped_by(message), "usage": {"output_tokens": 0}, "tidegate": field},
            {"type": "message_stop"},
        )
        return b"".join(map(named_event, events))

    def watch(self, asked: MessagesRequest, judging: Judging) -> MessageStream:
        return MessageStream(judging, stops=asked.stops)

    async def judge(self, asked: MessagesRequest, answer: Any, judging: Judging) -> dict[str, Any]:
        judged, _ = await judge_message(answer, judging, stops=asked.stops)
        return judged

    def again(self, asked: MessagesRequest, retry: Retry, continues: Continues) -> dict[str, Any] | None:
        """The turns with the answer's beginning behind them, without white space at its end, and the hint where this
        upstream reads it. An answer that thinks, or that goes on where a turn of the client ends, has none."""
        messages = asked.body["messages"]
        if messages[-1].get("role") == "assistant" or asked.body.get("thinking", _NO_THINKING) != _NO_THINKING:
            return None
        text = retry.prefix.rstrip()
        begun = [{"role": "assistant", "content": text}] if text else []
        if continues == "no" and begun:
            return {**asked.body, "messages": [*messages, *begun, {"role": "user", "content": retry.hint}]}
        hinted = _hinted(asked.body.get("system"), retry.hint)
        return {**asked.body, "system": hinted, "messages": [*messages, *begun]}

    def error(self, problem: Problem) -> dict[str, Any]:
        return error_body(problem)

    def error_event(self, problem: Problem) -> bytes:
        return named_event(error_body(problem))


def _hinted(system: Any, hint: str) -> Any:
    """The operator's words with a hint behind them."""
    if isinstance(system, list):
        return [*system, {"type": "text", "text": hint}]
    return f"{system}\n\n{hint}" if system else hint


def _head(asked: MessagesRequest) -> dict[str, Any]:
    return {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "model": asked.model}


class CountTokensDoor(MessagesDoor):
    """How many tokens a request has: it is judged as one that is answered, and all that comes back is the number."""

    route: ClassVar[str] = "/v1/messages/count_tokens"
    path: ClassVar[str] = "/messages/count_tokens"

    def read(self, body: dict[str, Any], *, judge_system: bool) -> MessagesRequest:
        return replace(read_messages(body, judge_system=judge_system), stream=False)

    def refusal(self, asked: MessagesRequest, message: str, field: dict[str, Any]) -> dict[str, Any]:
        raise Problem(403, message, "permission_error", None, "blocked")

    async def judge(self, asked: MessagesRequest, answer: Any, judging: Judging) -> dict[str, Any]:
        count = answer.get("input_tokens") if isinstance(answer, dict) else None
        if not is_place(count):
            raise UpstreamError("the upstream's answer is not a number of tokens")
        return {"input_tokens": count}


async def tell_batches(request: Request) -> JSONResponse:
    """Batches are not served: their answers would come from a file that nobody has judged."""
    said = "batches are not guarded here, and so not served: send each request to /v1/messages"
    return JSONResponse(error_body(Problem(404, said)), 404)
