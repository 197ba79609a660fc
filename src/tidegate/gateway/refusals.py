"""What is said before a door is reached: in the shape of the door's protocol, also to who wanted a WebSocket."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from tidegate.gateway.statuses import Problem

__all__ = ["error_body", "is_anthropics", "refuse", "with_headers"]

_POLICY_VIOLATION: Final = 1008


async def refuse(problem: Problem, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request, or the wish for a WebSocket, with an error."""
    body = error_body(problem, scope["path"])
    if scope["type"] == "http":
        await JSONResponse(body, problem.status, dict(problem.headers))(scope, receive, send)
        return
    await receive()  # websocket.connect
    if "websocket.http.response" not in scope.get("extensions", {}):
        await send({"type": "websocket.close", "code": _POLICY_VIOLATION, "reason": problem.code or ""})
        return
    data = json.dumps(body).encode()
    headers = {**problem.headers, "content-type": "application/json", "content-length": str(len(data))}
    pairs = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "websocket.http.response.start", "status": problem.status, "headers": pairs})
    await send({"type": "websocket.http.response.body", "body": data})


def error_body(problem: Problem, path: str) -> dict[str, Any]:
    """An error in the shape of the protocol that is spoken at a path: Anthropic's or OpenAI's."""
    return problem.anthropic_body if is_anthropics(path) else problem.body


def is_anthropics(path: str) -> bool:
    """Whether Anthropic's protocol is spoken at a path."""
    return path == "/v1/messages" or path.startswith("/v1/messages/")


def with_headers(send: Send, headers: Mapping[str, str]) -> Send:
    """The same ``send``, which adds headers to a response that does not have them itself."""
    if not headers:
        return send
    pairs = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]

    async def adding(message: Message) -> None:
        if message["type"] in ("http.response.start", "websocket.http.response.start", "websocket.accept"):
            own = list(message.get("headers", ()))
            there = {name.lower() for name, _ in own}
            message = {**message, "headers": [*own, *(pair for pair in pairs if pair[0] not in there)]}
        await send(message)

    return adding
