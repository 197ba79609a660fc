"""What every request meets first and every response last: an identity, a time to be read in, and safe headers.

A request has an id: the client's own ``x-request-id`` where that is a plain word, else a new one; the response and the
log say it, the response to Anthropic's clients under their name for it too.
A request whose body does not come in time gets 408. A host that was not asked for gets 421, where hosts are named.
No response is sniffed, framed, kept by a cache, or tells others where it was asked; a page that says it differently for
itself is left as it is.
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Collection, Mapping
from typing import Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tidegate.gateway.auth import OPEN_PATHS
from tidegate.gateway.logs import request_id
from tidegate.gateway.refusals import is_anthropics, refuse, with_headers
from tidegate.gateway.statuses import Problem

__all__ = ["API_HEADERS", "PAGE_POLICY", "Front"]

PAGE_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
"""For pages that say nothing themselves: all that they need is ours."""

API_HEADERS: Final[Mapping[str, str]] = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
    "x-frame-options": "DENY",
    "cross-origin-resource-policy": "same-origin",
}
_NOTHING: Final = "default-src 'none'; frame-ancestors 'none'"
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")


class Front:
    """The outermost middleware but one.

    Args:
        app: what is behind it.
        read_timeout_s: seconds in which the whole body of a request must be here; None for any time.
        hosts: names that the gateway answers to, as ``gate.example.com`` or ``*.example.com``; () for any.
    """

    def __init__(self, app: ASGIApp, *, read_timeout_s: float | None = None, hosts: Collection[str] = ()) -> None:
        self._app = app
        self._read_timeout_s = read_timeout_s
        self._hosts = frozenset(host.lower() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        identity = _identity(headers.get("x-request-id", ""))
        scope.setdefault("state", {})["request_id"] = identity
        request_id.set(identity)  # log lines say the same as the response
        send = _safe(with_headers(send, {**_identified(identity, scope["path"]), **API_HEADERS}))
        if self._hosts and scope["path"] not in OPEN_PATHS and not self._is_ours(headers.get("host", "")):
            problem = Problem(421, "this gateway does not answer to the name that it was asked by")
            await refuse(problem, scope, receive, send)
            return
        if scope["type"] == "http" and self._read_timeout_s is not None:
            receive = _in_time(receive, self._read_timeout_s)
        await self._app(scope, receive, send)

    def _is_ours(self, host: str) -> bool:
        name = host.lower()
        name = name.partition("]")[0] + "]" if name.startswith("[") else name.partition(":")[0]
        if name in self._hosts:
            return True
        _, dot, parent = name.partition(".")
        return bool(dot) and f"*.{parent}" in self._hosts


def _identified(identity: str, path: str) -> dict[str, str]:
    """The headers that say the id of a request: ours, which is OpenAI's too, and Anthropic's where that is spoken."""
    told = {"x-request-id": identity}
    return {**told, "request-id": identity} if is_anthropics(path) else told


def _identity(given: str) -> str:
    return given if _REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"


def _safe(send: Send) -> Send:
    """Adds the policy of content that fits: a page may load what is ours, everything else nothing at all."""

    async def adding(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = Headers(raw=list(message.get("headers", ())))
            if "content-security-policy" not in headers:
                page = headers.get("content-type", "").startswith("text/html")
                policy = (b"content-security-policy", (PAGE_POLICY if page else _NOTHING).encode())
                message = {**message, "headers": [*message.get("headers", ()), policy]}
        await send(message)

    return adding


def _in_time(receive: Receive, timeout_s: float) -> Receive:
    """The same ``receive``, which raises a Problem when the body is not all here in time."""
    until = time.monotonic() + timeout_s
    whole = False

    async def timed() -> Message:
        nonlocal whole
        if whole:
            return await receive()
        try:
            async with asyncio.timeout(max(0.0, until - time.monotonic())):
                message = await receive()
        except TimeoutError:
            whole = True
            said = f"the request did not come in time: its body must be here within {timeout_s:g} seconds"
            raise Problem(408, said, code="request_timeout", headers={"connection": "close"}) from None
        whole = message["type"] != "http.request" or not message.get("more_body", False)
        return message

    return timed
