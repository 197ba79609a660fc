"""Pages for people: the routes of the console, their templates, static files and security headers.

The console meets the gateway nowhere: whoever serves both gives it a guard, a policy, and a function that asks the
upstream. Everything that a page needs comes from this server; nothing is fetched from elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import jinja2
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Message, Receive, Scope, Send

import tidegate
from tidegate.console.playground import (
    LONGEST_PROMPT,
    LONGEST_RESPONSE,
    PROMPTS,
    TEXTS,
    Answer,
    EventStream,
    Suggestion,
    parse_ask,
    play,
)
from tidegate.errors import InputError
from tidegate.guards.base import StreamGuard
from tidegate.guards.second import SecondGuard
from tidegate.moderate import Keep
from tidegate.policy import PRESETS, PolicySource, load_policy

__all__ = ["create_console"]

_HERE: Final = Path(__file__).parent
_STATIC: Final = "/playground/static"
_LONGEST_BODY: Final = 2 * 1024 * 1024

HEADERS: Final[Mapping[str, str]] = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
}
"""Sent with every page: scripts and styles are ours, in files; no page of another site may frame this one."""


def create_console(
    *,
    guard: StreamGuard,
    policy: PolicySource,
    answer: Answer | None = None,
    upstream: str = "",
    keep: Keep | None = None,
    suggestions: Sequence[Suggestion] = (*PROMPTS, *TEXTS),
    guard_timeout_s: float | None = None,
    second: SecondGuard | None = None,
) -> list[BaseRoute]:
    """The console's routes, to stand beside others in one Starlette app; ``/`` leads to the playground.

    Args:
        guard: judges what is typed and what comes back; its owner closes it.
        policy: where the one in force is; the shipped presets can be tried beside it.
        answer: asks the upstream, and gives the text of its answer as it comes; None when there is no upstream.
        upstream: what the page calls the upstream, as its address; shown as text.
        keep: keeps the decisions; None keeps none.
        suggestions: examples that the page offers, in order.
        guard_timeout_s: seconds that the guard may take for a text or a piece of one; None for as long as it wants.
        second: confirms the alarms of streams where the policy says so; its owner closes it. None when there is none.
    """
    own = policy.current.name
    policies: dict[str, PolicySource] = {own: policy} | {name: load_policy(name) for name in PRESETS if name != own}
    page = _page(guard.name, tuple(policies), upstream if answer else "", suggestions, answer is not None)

    async def playground(request: Request) -> Response:
        return HTMLResponse(page, headers={**HEADERS, "cache-control": "no-cache"})

    async def stream(request: Request) -> Response:
        try:
            ask = parse_ask(await _body(request), policies=tuple(policies), can_ask=answer is not None)
        except InputError as error:
            return _error(400, str(error))
        events = play(
            ask,
            guard=guard,
            policy=policies[ask.policy].current,
            answer=answer,
            keep=keep,
            timeout_s=guard_timeout_s,
            second=second,
        )
        return EventStream(events, headers=HEADERS)

    async def home(request: Request) -> Response:
        return RedirectResponse("/playground", status_code=307)

    return [
        Route("/", home, methods=["GET"]),
        Route("/playground", playground, methods=["GET"]),
        Route("/playground/stream", stream, methods=["POST"]),
        Mount(_STATIC, _OwnFiles(directory=_HERE / "static"), name="console-static"),
    ]


class _OwnFiles(StaticFiles):
    """The static files, with the security headers."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                extra = {**HEADERS, "cache-control": "no-cache"}
                message["headers"] = [*message["headers"], *((k.encode(), v.encode()) for k, v in extra.items())]
            await send(message)

        await super().__call__(scope, receive, send_with_headers)


def _page(guard: str, policies: Sequence[str], upstream: str, suggestions: Sequence[Suggestion], asks: bool) -> str:
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return templates.get_template("playground.html").render(
        static=_STATIC,
        version=tidegate.__version__,
        guard=guard,
        policies=policies,
        upstream=upstream or ("the upstream" if asks else ""),
        suggestions=[each for each in suggestions if asks or each.response is not None],
        longest_prompt=LONGEST_PROMPT,
        longest_response=LONGEST_RESPONSE,
    )


async def _body(request: Request) -> bytes:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # so that a form of another site cannot send it
        raise InputError("expected the content type application/json", where="content-type")
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > _LONGEST_BODY:
            raise InputError(f"the request is longer than {_LONGEST_BODY:,} bytes")
    return bytes(data)


def _error(status: int, message: str) -> JSONResponse:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return JSONResponse({"error": error}, status_code=status, headers=HEADERS)
