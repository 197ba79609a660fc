"""Webhooks against a real receiver that takes, fails, hangs, redirects, and comes back; and the advice to throttle."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import canary
from kept import TALK, decision
from serving import make_policy, serving, until, wait_until
from tidegate.errors import SettingsError
from tidegate.gateway.app import create_app
from tidegate.gateway.webhooks import Courier, Webhook, addressed, read_webhooks
from tidegate.store import Store, open_store
from tidegate.testing import FakeStreamGuard, FakeUpstream
from tidegate.types import Action, Advice, Scope

SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()
DOCS = Path(__file__).parents[2] / "docs" / "webhooks.md"


class Receiver:
    """What it answers is a status, or None for nothing at all."""

    def __init__(self) -> None:
        self.status: int | None = 200
        self.taken: list[tuple[dict[str, str], bytes]] = []
        routes = [Route("/hook", self._take, methods=["POST"]), Route("/other", self._take, methods=["GET", "POST"])]
        self.app = Starlette(routes=routes)

    async def _take(self, request: Request) -> Response:
        body = await request.body()
        self.taken.append((dict(request.headers), body))
        if self.status is None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
        return Response(status_code=self.status or 200, headers={"location": "/other"})


@pytest.fixture
def receiver() -> Iterator[tuple[Receiver, str]]:
    made = Receiver()
    with serving(made.app) as url:
        yield made, f"{url}/hook"


def webhook(url: str, **changes: Any) -> Webhook:
    return Webhook.model_validate({"name": "team", "url": url, "secret": SECRET, **changes})


@contextlib.asynccontextmanager
async def posting(*webhooks: Webhook) -> AsyncIterator[tuple[Store, list[tuple[str, str]]]]:
    """A store with a courier that does not wait long; gives what it tells, too."""
    told: list[tuple[str, str]] = []
    with open_store("sqlite://", address=addressed(webhooks)) as store:
        courier = Courier(store.outbox, webhooks, look_s=0.01, again_s=0.02)
        courier.open(lambda name, outcome: told.append((name, outcome)))
        try:
            yield store, told
        finally:
            await courier.close()


def verification() -> Callable[[str, dict[str, str], bytes], bool]:
    """The snippet that receivers are given."""
    found = re.search(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert found
    names: dict[str, Any] = {}
    exec(found[1], names)
    verified: Callable[[str, dict[str, str], bytes], bool] = names["verified"]
    return verified


NOTIFY = decision(Action.BLOCK, advice=(Advice.NOTIFY,), scope=Scope(tenant="shop"))


async def test_a_decision_is_posted_once_and_signed(receiver: tuple[Receiver, str]) -> None:
    """What the page gives to receivers takes it, and takes nothing that was changed, old, or signed by another."""
    made, url = receiver
    async with posting(webhook(url)) as (store, told):
        identity = await store.keep(NOTIFY, TALK, retention="full")
        await until(lambda: told, "the post")
        await until(lambda: not store.outbox.standings(), "the end of the delivery")

    ((headers, body),) = made.taken
    assert json.loads(body)["id"] == identity
    assert headers["webhook-id"] == f"{identity}-team"
    assert "ann@example.org" not in body.decode()
    verified = verification()
    assert verified(SECRET, headers, body)
    assert not verified(SECRET, headers, body + b" ")
    assert not verified(SECRET, {**headers, "webhook-id": "dec_other"}, body)
    assert not verified(SECRET, {**headers, "webhook-timestamp": str(int(time.time()) - 3600)}, body)
    assert not verified("whsec_" + base64.b64encode(bytes(32)).decode(), headers, body)
    assert told == [("team", "delivered")]


@pytest.mark.parametrize(("status", "problem"), [(500, "status 500"), (302, "status 302"), (None, "timeout")])
async def test_one_that_fails_is_tried_again_until_it_is_taken(
    receiver: tuple[Receiver, str], status: int | None, problem: str
) -> None:
    """Also one that hangs; a redirect is a failure and leads nowhere. The id is the same each time."""
    made, url = receiver
    made.status = status
    async with posting(webhook(url, timeout=0.2)) as (store, told):
        await store.keep(NOTIFY, None, retention="hash")
        await until(lambda: len(made.taken) >= 3, "three attempts")
        await until(lambda: store.outbox.standings()["team"].error == problem, "the error")
        made.status = 200
        await until(lambda: ("team", "delivered") in told, "the post that is taken")

    assert len({headers["webhook-id"] for headers, _ in made.taken}) == 1
    assert {headers["host"] for headers, _ in made.taken} == {url.split("/")[2]}
    assert ("team", "failed") in told


async def test_a_receiver_that_is_not_there_is_given_up_and_tried_again_when_asked(tmp_path: Path) -> None:
    """After the time that the file says."""
    async with posting(webhook("http://127.0.0.1:9/hook", give_up_hours=1e-9)) as (store, told):
        await store.keep(NOTIFY, None, retention="hash")
        await until(lambda: told == [("team", "dead")], "the end")
        standing = store.outbox.standings()["team"]
        assert (standing.dead, standing.error) == (1, "ClientConnectorError")
        assert store.outbox.retry() == 1
        await until(lambda: len(told) == 2, "another attempt")


async def test_a_receiver_that_is_gone_for_good_is_not_asked_again(receiver: tuple[Receiver, str]) -> None:
    """It says so itself: 410."""
    made, url = receiver
    made.status = 410
    async with posting(webhook(url)) as (store, told):
        await store.keep(NOTIFY, None, retention="hash")
        await until(lambda: told, "the post")

    assert (len(made.taken), told) == (1, [("team", "dead")])


async def test_one_that_hangs_keeps_no_other_waiting(receiver: tuple[Receiver, str]) -> None:
    """Even where it has more to be told than is posted at once."""
    _, url = receiver
    stuck = Receiver()
    stuck.status = None
    with serving(stuck.app) as stuck_url:
        async with posting(webhook(f"{stuck_url}/hook", name="stuck", timeout=30), webhook(url)) as (store, told):
            for _ in range(20):
                await store.keep(NOTIFY, None, retention="hash")
            await until(lambda: told.count(("team", "delivered")) == 20, "the posts to the other")
            assert len(stuck.taken) == 8


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        ({}, True),
        ({"advice": ["take_down"]}, False),
        ({"advice": None, "actions": ["block"]}, True),
        ({"actions": ["warn"]}, False),
        ({"tenants": ["shop"]}, True),
        ({"tenants": ["bank"]}, False),
        ({"categories": ["Violent"]}, False),
        ({"regions": ["IN"]}, False),
    ],
)
def test_who_is_told_of_what(wanted: dict[str, Any], told: bool) -> None:
    """Each filter has to fit; one that is not there fits."""
    row = {
        "advice": ["notify"],
        "action": "block",
        "categories": None,
        "scope": {"tenant": "shop", "region": None, "route": "/v1/x", "language": None},
    }
    assert webhook("https://example.org/", **wanted).wants(row) is told


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("webhooks: [", "line"),
        ("{}", "webhooks"),
        ("webhooks: [{name: a, url: 'https://x/', secret: short}]", "24"),
        ("webhooks: [{name: a, url: 'https://x/'}]", "secret"),
        ("webhooks: [{name: a, url: 'ftp://x/', secret: $}]", "webhooks.0.url"),
        ("webhooks: [{name: a, url: 'https://u:p@x/', secret: $}]", "password"),
        ("webhooks: [{name: a b, url: 'https://x/', secret: $}]", "webhooks.0.name"),
        ("webhooks: [{name: a, url: 'https://x/', secret: $, actoins: [block]}]", "actoins"),
        ("webhooks: [{name: a, url: 'https://x/', secret: $, actions: [explode]}]", "explode"),
        ("webhooks: [{name: a, url: 'https://x/', secret: 'whsec_?'}]", "base64"),
        ("webhooks: [{name: a, url: 'https://x/', secret_file: /nothing}]", "/nothing"),
        ("webhooks: [&one {name: a, url: 'https://x/', secret: $}, *one]", "two webhooks"),
    ],
)
def test_a_file_that_cannot_be_used_says_where(tmp_path: Path, text: str, said: str) -> None:
    """And shows no secret."""
    path = tmp_path / "webhooks.yaml"
    path.write_text(text.replace("$", SECRET))
    with pytest.raises(SettingsError) as caught:
        read_webhooks(path)

    assert said in str(caught.value)
    assert SECRET not in str(caught.value)


def test_a_secret_may_be_in_a_file(tmp_path: Path) -> None:
    """As secrets of containers are."""
    (tmp_path / "secret").write_text(f"{SECRET}\n")
    path = tmp_path / "webhooks.yaml"
    path.write_text(f"webhooks:\n  - {{name: a, url: 'https://x/', secret_file: {tmp_path}/secret}}\n")

    assert read_webhooks(path)[0].key == bytes(range(32))


ADVISING = """
name: advising
on_guard_error: block
otherwise: allow
controversial: review
rules:
  - {name: unsafe, severity: unsafe, action: block, advice: [throttle, notify]}
"""


def test_the_gateway_tells_webhooks_and_waits_for_none(receiver: tuple[Receiver, str], tmp_path: Path) -> None:
    """The receiver hangs; the client has its answer all the same. Nothing that people wrote is posted."""
    made, url = receiver
    made.status = None
    webhooks = [webhook(url, timeout=60)]
    with serving(canary.upstream()) as upstream_url:
        store = open_store(f"sqlite:///{tmp_path}/kept.db", address=addressed(webhooks))
        app = create_app(
            guard=FakeStreamGuard(),
            policy=make_policy(ADVISING),
            keep=store.keep,
            upstream_url=upstream_url,
            courier=Courier(store.outbox, webhooks, look_s=0.01),
            on_close=[store.aclose],
        )
        with serving(app) as gateway:
            statuses = canary.send_everywhere(gateway, canary.posts(app))
            wait_until(lambda: made.taken, "the post")
            page = httpx.get(f"{gateway}/metrics").text

    assert 200 in statuses
    assert not [word for word in canary.CANARIES if any(word in body.decode() for _, body in made.taken)]
    assert re.search(r'tidegate_advice_total\{advice="notify"\} [1-9]', page)


def test_who_is_throttled_has_to_wait(upstream_url: str, upstream: FakeUpstream) -> None:
    """Only the one whose content it was, and only where the request names somebody."""
    app = create_app(guard=FakeStreamGuard(), policy=make_policy(ADVISING), keep=_nowhere, upstream_url=upstream_url)

    def ask(url: str, text: str, user: str | None) -> int:
        body: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": text}]}
        return httpx.post(f"{url}/v1/chat/completions", json=body | ({"user": user} if user else {})).status_code

    with serving(app) as url:
        assert [ask(url, "hello", "ann") for _ in range(5)] == [200] * 5
        assert ask(url, "a bomb", "ann") == 200  # refused in the shape of an answer
        after = [ask(url, "hello", "ann") for _ in range(4)]
        others = [ask(url, "hello", user) for user in ("bob", None)]
        page = httpx.get(f"{url}/metrics").text

    assert after[-1] == 429
    assert others == [200, 200]
    assert "tidegate_throttled_total 1.0" in page


async def _nowhere(*_: Any, **__: Any) -> None:
    return None
