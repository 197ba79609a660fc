"""Log lines: their two forms, and that nothing of what people and models write is in them."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import logging.config
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from starlette.responses import PlainTextResponse
from starlette.routing import Route

import canary
from serving import make_policy, serving, wait_until
from tidegate.gateway.app import create_app
from tidegate.gateway.logs import LogFormat, log_config
from tidegate.testing import Die, FakeStreamGuard, FakeUpstream, Hang, Reply, Send

NAMES = ("", "uvicorn", "uvicorn.error", "uvicorn.access", "tidegate", "tidegate.access")


class Lines:
    """Sets logging up as a gateway does, but into memory."""

    def __init__(self) -> None:
        self.out = io.StringIO()
        self.config: dict[str, Any] = {}

    def use(self, level: str, form: LogFormat = "text", *, access: bool = False) -> None:
        self.config = log_config(level, form, access=access)
        self.config["handlers"]["default"]["stream"] = self.out
        logging.config.dictConfig(self.config)

    @property
    def text(self) -> str:
        return self.out.getvalue()

    @property
    def objects(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text.splitlines()]


@pytest.fixture
def lines() -> Iterator[Lines]:
    loggers = [logging.getLogger(name) for name in NAMES]
    before = [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    yield Lines()
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


def _raise() -> None:
    try:
        raise ValueError(canary.ASKED)
    except ValueError as error:
        raise RuntimeError(canary.ANSWERED) from error


async def _buggy(request: Any) -> PlainTextResponse:
    _raise()
    return PlainTextResponse("")


@pytest.mark.parametrize("form", ["text", "json"])
def test_no_line_has_user_text(lines: Lines, form: LogFormat) -> None:
    """Whatever is sent, to whichever door, at the level that says most; also where we have a bug."""
    lines.use("debug", form)
    with serving(canary.upstream(), log_config=None) as upstream_url:
        app = create_app(
            guard=FakeStreamGuard(),
            policy=make_policy(),
            upstream_url=upstream_url,
            guard_timeout_s=5,
            routes=[Route("/buggy", _buggy)],
        )
        lines.use("debug", form, access=True)
        with serving(app, log_config=lines.config, log_level=None) as url:
            canary.send_everywhere(url, canary.posts(app))
            httpx.get(f"{url}/buggy")

    assert "exchange failed: UpstreamError" in lines.text
    assert "POST /v1/chat/completions 200" in lines.text
    assert "Exception in ASGI application" in lines.text
    assert not [word for word in canary.CANARIES if word in lines.text.lower()]


SECRET = "sk-canary-key"
ENDINGS: dict[str, tuple[Reply | None, str]] = {
    "nobody there": (None, "the upstream cannot be reached (connection refused)"),
    "hangs": (Reply((Hang(),)), "the upstream did not answer in time (silent for too long)"),
    "dies": (
        Reply((Send(b"{"), Die())),
        "the upstream broke off (its answer ended before it was whole)",
    ),
    "garbage": (Reply.json(b"said-by-a-model"), "the upstream's answer is not JSON"),
    "another shape": (
        Reply.json(["said-by-a-model"]),
        "the upstream's answer is not a chat completion",
    ),
    "status": (Reply.error(502, "said-by-a-model"), "the upstream answered with status 502"),
    "the client's fault": (Reply.error(404, "said-by-a-model"), "the upstream answered with status 404"),
}


@pytest.mark.parametrize("name", ENDINGS)
def test_an_exchange_that_failed_says_why_without_anybodys_words(lines: Lines, name: str) -> None:
    reply, words = ENDINGS[name]
    lines.use("info", "json")
    with serving(FakeUpstream(reply or Reply.json({}))) as there:
        app = create_app(
            guard=FakeStreamGuard(),
            policy=make_policy(),
            upstream_url="http://127.0.0.1:9/v1" if reply is None else f"{there}/v1",
            upstream_key=SECRET,
            silence_timeout_s=0.2,
        )
        with serving(app, log_config=lines.config, log_level=None) as url:
            body = {"model": "m", "messages": [{"role": "user", "content": "said-by-a-person"}]}
            assert httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30).status_code >= 400

    (line,) = [one for one in lines.objects if one["logger"] == "tidegate.gateway"]
    assert line["message"].removeprefix("exchange failed: ").removeprefix("UpstreamError: ") == words
    assert line["level"] == ("info" if "404" in words else "warning")
    assert "said-by" not in lines.text
    assert SECRET not in lines.text


def test_each_request_is_one_object(lines: Lines) -> None:
    """With the route, not with the path and the query that a client wrote."""
    lines.use("info", "json", access=True)
    app = create_app(guard=FakeStreamGuard(), policy=make_policy())
    with serving(app, log_config=lines.config, log_level=None) as url:
        httpx.get(f"{url}/v1/models/x?q=1")
        httpx.get(f"{url}/nothing/here")

    one, other = lines.objects
    assert (one["method"], one["route"], one["status"]) == ("GET", "/v1/models/{name:path}", 404)
    assert (other["method"], other["route"], other["status"]) == ("GET", "other", 404)
    assert one["logger"] == "tidegate.access"
    assert 0 <= one["seconds"] < 60
    assert one["request"] != other["request"]


def test_a_line_has_the_request_id_that_the_response_has(lines: Lines) -> None:
    """Whether the gateway made it or the client did; a client's that could be a sentence is neither told nor logged."""
    lines.use("info", "json", access=True)
    app = create_app(guard=FakeStreamGuard(), policy=make_policy())
    with serving(app, log_config=lines.config, log_level=None) as url:
        answers = [
            httpx.get(f"{url}/livez", headers=headers)
            for headers in ({}, {"x-request-id": "edge-4711"}, {"x-request-id": f"a {canary.ASKED}"})
        ]

    told = [answer.headers["x-request-id"] for answer in answers]
    assert [line["request"] for line in lines.objects] == told
    assert told[1] == "edge-4711"
    assert canary.ASKED not in lines.text


def test_requests_are_logged_only_where_that_is_asked_for(lines: Lines) -> None:
    """By default a gateway says what is out of the ordinary."""
    lines.use("info", "json")
    app = create_app(guard=FakeStreamGuard(), policy=make_policy())
    with serving(app, log_config=lines.config, log_level=None) as url:
        httpx.get(f"{url}/livez")

    assert lines.text == ""


def test_errors_are_told_by_kind_and_place(lines: Lines) -> None:
    """Each with those behind it."""
    lines.use("info", "json")
    try:
        _raise()
    except RuntimeError:
        logging.getLogger("tidegate.gateway").exception("a bug")

    (line,) = lines.objects
    assert [one["error"] for one in line["errors"]] == ["RuntimeError", "ValueError"]
    assert line["errors"][1]["where"][0].endswith("_raise")
    assert (line["level"], line["message"]) == ("error", "a bug")


def test_lost_tasks_say_nothing_of_their_errors(lines: Lines) -> None:
    """The event loop shows the message of an error that nobody asked for."""
    lines.use("info")

    async def lose() -> None:
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        future.set_exception(RuntimeError(canary.ASKED))
        del future
        await asyncio.sleep(0)

    asyncio.run(lose())
    wait_until(lambda: lines.text, "the line of the event loop")

    assert "never retrieved" in lines.text
    assert canary.ASKED not in lines.text


def test_alive_is_said_without_the_guard() -> None:
    """A guard that is stuck gets no gateway restarted, and its streams lost."""
    guard = FakeStreamGuard()
    with serving(create_app(guard=guard, policy=make_policy())) as url:
        response = httpx.get(f"{url}/livez")

    assert (response.status_code, response.json()["status"]) == (200, "ok")
    assert guard.judged == []
