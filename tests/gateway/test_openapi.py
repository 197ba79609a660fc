"""What the gateway says that it speaks is what it speaks: requests made from its description, by schemathesis.

``make test`` draws the same few requests each time; ``make fuzz`` draws many new ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import Phase, given, settings
from schemathesis import GenerationMode, openapi
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    positive_data_acceptance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.routing import Route, WebSocketRoute

from gateway import messages_wire
from serving import Gateway, make_policy
from tidegate import __version__
from tidegate.gateway.app import create_app
from tidegate.gateway.openapi import description
from tidegate.gateway.scopes import _LONGEST_TAG, _TAG
from tidegate.testing import (
    Die,
    FakeStreamGuard,
    FakeUpstream,
    Reply,
    completion,
    response,
    response_events,
    text_chunks,
    text_completion,
)

DESCRIPTION = description()
SCHEMA = openapi.from_dict(DESCRIPTION)
OPERATIONS = {f"{one.method.upper()} {one.path}": one for one in (found.ok() for found in SCHEMA.get_all_operations())}
OURS = {
    "POST /v1/moderations": {"input": "hi"},
    "POST /v1/guard": {"turns": [{"role": "user", "content": "hi"}]},
}
_ASKED: list[Any] = [{"role": "user", "content": "hi"}]
TO_UPSTREAM: dict[str, Any] = {
    "POST /v1/chat/completions": {"model": "m", "messages": _ASKED},
    "POST /v1/completions": {"model": "m", "prompt": "hi"},
    "POST /v1/responses": {"model": "m", "input": "hi"},
    "POST /v1/messages": {"model": "m", "max_tokens": 9, "messages": _ASKED},
    "POST /v1/messages/count_tokens": {"model": "m", "messages": _ASKED},
    "GET /v1/models": None,
    "GET /v1/models/{name}": None,
}
pytestmark = pytest.mark.hypothesis  # so that `make fuzz` runs them: schemathesis does not say so itself

CONFORMING = [
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
MEANT = {"GET /v1/responses/{rest}": 501, "POST /v1/responses/{rest}": 501, "DELETE /v1/responses/{rest}": 501}


def examples(few: int = 5) -> settings:
    """A few requests in ``make test``, without a search for the shortest one; many in ``make fuzz``."""
    if settings.get_current_profile_name() == "tidegate":
        return settings(max_examples=few, phases=[Phase.generate])
    return settings(max_examples=40 * few)


def answers(upstream: FakeUpstream) -> None:
    """Have the upstream answer each door in its own protocol, streaming where it is asked to."""

    def reply(body: Any) -> Reply:
        path = upstream.received[-1].path
        streams = isinstance(body, dict) and body.get("stream") is True
        match path.removeprefix("/v1"):
            case "/chat/completions" if streams:
                return Reply.stream(*text_chunks(["Hello ", "there."]))
            case "/chat/completions":
                return Reply.json(completion(*["Hello there."] * int(body.get("n") or 1)))
            case "/completions" if streams:
                return Reply.stream(text_completion("Hello there."))
            case "/completions":
                return Reply.json(text_completion("Hello there."))
            case "/responses" if streams:
                return Reply.stream(*response_events("Hello there."), done=False)
            case "/responses":
                return Reply.json(response("Hello there."))
            case "/messages" if streams:
                events = [messages_wire.start(), *messages_wire.text(0, "Hello ", "there."), *messages_wire.end()]
                return messages_wire.reply(*events)
            case "/messages":
                return Reply.json(messages_wire.message("Hello there."))
            case "/messages/count_tokens":
                return Reply.json({"input_tokens": 3})
            case "/models":
                return Reply.json({"object": "list", "data": [{"id": "fake-model", "object": "model", "created": 1}]})
            case _:
                return Reply.json({"id": "fake-model", "object": "model", "created": 1})

    upstream.reply = reply


@pytest.fixture
def client() -> Iterator[Any]:
    import requests

    with requests.Session() as session:
        yield session


# --- the description ----------------------------------------------------------------------------------------------


def test_every_route_is_described_and_every_described_one_is_there() -> None:
    app = create_app(guard=FakeStreamGuard(), policy=make_policy())
    routes, sockets = set(), set()
    for route in app.routes:
        path = re.sub(r"\{(\w+):\w+\}", r"{\1}", getattr(route, "path", ""))
        if isinstance(route, WebSocketRoute):
            sockets.add(path)
        else:
            assert isinstance(route, Route)
            routes |= {f"{method} {path}" for method in (route.methods or ()) if method != "HEAD"}

    assert routes == set(OPERATIONS)
    assert sockets == set(DESCRIPTION["x-websockets"])


def test_it_is_served_as_it_is_written_with_the_version(gateway: Gateway) -> None:
    answer = httpx.get(f"{gateway.url}/openapi.json")

    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == DESCRIPTION
    assert answer.json()["info"]["version"] == __version__


def test_every_operation_has_a_name_of_its_own_and_says_what_it_does() -> None:
    described = [one for path in DESCRIPTION["paths"].values() for name, one in path.items() if name != "parameters"]

    assert len({one["operationId"] for one in described}) == len(described)
    assert all(one["summary"] and one["tags"] for one in described)


def test_every_door_that_decides_for_a_language_says_how_it_is_told() -> None:
    told = {path for path, one in DESCRIPTION["paths"].items() if "language" in str(one.get("parameters"))}

    assert told == {name.split()[1] for name, body in {**OURS, **TO_UPSTREAM}.items() if body is not None}
    (schema,) = [one["schema"] for one in DESCRIPTION["components"]["parameters"].values() if one["in"] == "header"]
    assert (schema["pattern"], schema["maxLength"]) == (f"^{_TAG.pattern}$", _LONGEST_TAG)


# --- the gateway against it ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mode"),
    [(name, mode) for name, one in OPERATIONS.items() for mode in GenerationMode if one.body or mode.is_positive],
    ids=str,
)
def test_whatever_is_asked_is_answered_as_described_and_never_with_a_bug(
    gateway: Gateway, upstream: FakeUpstream, client: Any, name: str, mode: GenerationMode
) -> None:
    """What is described as good is taken, and with an upstream that works no status is above 499, but the one that says
    what is not served."""
    operation = OPERATIONS[name]
    answers(upstream)

    @given(case=operation.as_strategy(generation_mode=mode))
    @examples()
    def ask(case: Any) -> None:
        upstream.received.clear()
        answer = case.call(base_url=gateway.url, session=client)
        assert answer.status_code < 500 or answer.status_code == MEANT.get(name), answer.text
        taken = [positive_data_acceptance] if operation.body and mode.is_positive else []
        case.validate_response(answer, checks=[*CONFORMING, *taken])

    ask()


@pytest.mark.parametrize("name", OURS)
def test_what_is_not_described_is_refused_where_all_of_it_is_ours(gateway: Gateway, client: Any, name: str) -> None:
    """So that no text passes for judged which nobody has read."""

    @given(case=OPERATIONS[name].as_strategy(generation_mode=GenerationMode.NEGATIVE))
    @examples(12)
    def ask(case: Any) -> None:
        answer = case.call(base_url=gateway.url, session=client)
        case.validate_response(answer, checks=[negative_data_rejection])

    ask()
    assert gateway.kept() == []


@pytest.mark.parametrize(
    "reply",
    [
        Reply.error(400, "no"),
        Reply.error(429, "slow down", headers={"retry-after": "7"}),
        Reply.error(500, "broken"),
        Reply.error(503, "away"),
        Reply.json(b"not JSON"),
        Reply.json(b"[1]"),
        Reply.json(b""),
        Reply((Die(),)),
        Reply.json(b"<html>", status=502, headers={"content-type": "text/html"}),
    ],
    ids=["400", "429", "500", "503", "no JSON", "a list", "nothing", "dies", "html"],
)
@pytest.mark.parametrize("name", TO_UPSTREAM)
def test_an_upstream_that_fails_is_told_as_described(
    gateway: Gateway, upstream: FakeUpstream, client: Any, name: str, reply: Reply
) -> None:
    """Its own status, or 502: never one of ours that would say that the gateway has a bug."""
    upstream.reply = reply
    operation = OPERATIONS[name]
    parameters = {"name": "m"} if "{" in name else {}
    case = operation.Case(body=TO_UPSTREAM[name], media_type="application/json", path_parameters=parameters)
    if TO_UPSTREAM[name] is None:
        case = operation.Case(path_parameters=parameters)

    answer = case.call(base_url=gateway.url, session=client)

    assert answer.status_code == (reply.status if reply.status != 200 else 502)
    assert answer.json()["error"]["type"] not in ("server_error", "internal_error")
    case.validate_response(answer, checks=CONFORMING)


@pytest.mark.parametrize("path", DESCRIPTION["paths"])
def test_a_method_that_a_path_does_not_take_is_told_which_it_takes(gateway: Gateway, path: str) -> None:
    """In the shape of the protocol that is spoken there."""
    answer = httpx.request("TRACE", gateway.url + re.sub(r"\{\w+\}", "/x", path).replace("//", "/"))

    taken = {name.split()[0] for name in OPERATIONS if name.split()[1] == path}
    assert answer.status_code == 405
    assert taken <= set(answer.headers["allow"].split(", "))
    assert (answer.json().get("type") == "error") is path.startswith("/v1/messages")
