"""Who is let in: by a key, at the doors that it opens, and by nothing else; over real HTTP and WebSockets."""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import logging
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest
import websockets
from openai import AuthenticationError, OpenAI, PermissionDeniedError, RateLimitError
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import BaseRoute, Route

from kept import url_of
from redis_server import RedisServer
from serving import HealthTexts, Record, make_policy, serving, wait_until
from tidegate.console.app import create_console
from tidegate.errors import InputError, StoreError
from tidegate.gateway.app import create_app
from tidegate.gateway.auth import OPEN_PATHS, KeyRing, door_of
from tidegate.gateway.entrance import EntranceOptions
from tidegate.gateway.limits import LimitOptions
from tidegate.gateway.live_frames import PROTOCOL
from tidegate.store import Allowance, Keys, Store, open_store
from tidegate.store.keys import DOORS, KnownKey
from tidegate.testing import FakeStreamGuard, FakeUpstream, Reply

HELLO: list[Any] = [{"role": "user", "content": "hi"}]
UPSTREAM_KEY = "sk-upstream-secret"
HEALTH = HealthTexts("apple pie", "a bomb")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(url_of(tmp_path / "kept.db"), spool=tmp_path / "spool") as opened:
        yield opened


@pytest.fixture
def keys(store: Store) -> Keys:
    return store.keys


async def seen(request: Request) -> JSONResponse:
    state = request.state
    names = ("authorization", "x-api-key", "x-upstream-authorization", "x-upstream-api-key")
    headers = {name: request.headers[name] for name in names if name in request.headers}
    return JSONResponse({"state": [state.tenant, state.region, state.adapter, state.guest], "headers": headers})


def make(keys: Any, *, routes: Sequence[BaseRoute] = (), upstream_url: str | None = None, **options: Any) -> Any:
    return create_app(
        guard=options.pop("guard", FakeStreamGuard()),
        policy=make_policy(),
        upstream_url=upstream_url,
        upstream_key=options.pop("upstream_key", UPSTREAM_KEY),
        keep=options.pop("keep", None),
        health=HEALTH,
        routes=[Route("/v1/guard", seen), *routes],
        entrance=EntranceOptions(keys=keys, **options),
    )


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def test_a_key_lets_in_as_bearer_token_and_as_api_key_and_says_for_whom(keys: Keys) -> None:
    _, token = keys.create("shop", region="EU", adapter="shop")
    with serving(make(keys)) as url:
        for headers in (bearer(token), {"authorization": f"bearer  {token}"}, {"x-api-key": token}):
            response = httpx.get(f"{url}/v1/guard", headers=headers)
            assert response.json()["state"] == ["shop", "EU", "shop", False]


def test_whatever_is_wrong_the_answer_is_the_same(keys: Keys) -> None:
    """No key, somebody else's, a wrong secret, a revoked one, an expired one, an id that is not there."""
    good, token = keys.create("shop")
    revoked, taken_back = keys.create("shop")
    keys.revoke(revoked.id)
    _, old = keys.create("shop", expires=datetime.now(UTC) + timedelta(milliseconds=1))
    wrong = token[:-1] + ("0" if token[-1] != "0" else "1")
    absent = token.replace(good.id, "0" * 12)
    shown = [
        "nothing",
        token.upper(),
        "sk-123",
        wrong,
        taken_back,
        old,
        absent,
        token + "0",
        "tdg_",
        f"{token},{token}",
    ]
    with serving(make(keys)) as url:
        answers = [httpx.post(f"{url}/v1/moderations", headers=bearer(each)) for each in shown]
        answers.append(httpx.post(f"{url}/v1/moderations"))
        answers.append(httpx.get(f"{url}/no/such/path"))

    assert {answer.status_code for answer in answers} == {401}
    assert len({answer.text for answer in answers}) == 1
    assert answers[0].json()["error"]["code"] == "invalid_api_key"
    assert answers[0].headers["www-authenticate"].startswith("Bearer")


def test_a_key_opens_the_doors_that_it_names_and_no_other(keys: Keys) -> None:
    _, token = keys.create("shop", doors=["moderations"])
    with serving(make(keys)) as url:
        opened = httpx.post(f"{url}/v1/moderations", headers=bearer(token), json={"input": "hi"})
        closed = [httpx.get(f"{url}{path}", headers=bearer(token)) for path in ("/v1/guard", "/metrics", "/playground")]
        nowhere = httpx.get(f"{url}/v1/embeddings", headers=bearer(token))

    assert opened.status_code == 200
    assert [answer.status_code for answer in closed] == [403, 403, 403]
    assert closed[0].json()["error"]["code"] == "door_closed"
    assert nowhere.status_code == 404


def test_every_path_of_the_gateway_and_the_console_belongs_to_a_door() -> None:
    """A path that somebody adds and forgets is closed; this test says it before somebody wonders why."""
    console = create_console(guard=FakeStreamGuard(), policy=make_policy())
    app = make(None, routes=console)
    paths = {route.path for route in app.routes if route.path not in OPEN_PATHS}

    assert paths
    assert {path for path in paths if door_of(path) is None} == set()
    assert {door_of(path) for path in paths} <= set(DOORS)
    assert door_of("/v1/messages/count_tokens") == "messages"
    assert door_of("/v1/messagesx") is None


def test_openais_and_anthropics_clients_understand_what_they_are_told(keys: Keys) -> None:
    _, narrow = keys.create("shop", doors=["moderations"])
    _, slow = keys.create("shop", allowance=Allowance(per_minute=1, burst=1))
    with serving(make(keys)) as url:

        def client(token: str) -> OpenAI:
            return OpenAI(base_url=f"{url}/v1", api_key=token, max_retries=0)

        with client("tdg_wrong") as openai, pytest.raises(AuthenticationError) as caught:
            openai.moderations.create(input="hi")
        assert caught.value.code == "invalid_api_key"
        with client(narrow) as openai, pytest.raises(PermissionDeniedError):
            openai.chat.completions.create(model="m", messages=HELLO)
        with client(slow) as openai:
            raw = openai.moderations.with_raw_response.create(input="hi")
            assert raw.headers["x-ratelimit-limit-requests"] == "1"
            assert raw.headers["x-ratelimit-remaining-requests"] == "0"
            with pytest.raises(RateLimitError) as limited:
                openai.moderations.create(input="hi")
        assert (limited.value.code, limited.value.response.headers["retry-after"]) == ("rate_limit_exceeded", "60")

        for token, error in (("tdg_wrong", anthropic.AuthenticationError), (narrow, anthropic.PermissionDeniedError)):
            with (
                anthropic.Anthropic(base_url=url, api_key=token, max_retries=0) as claude,
                pytest.raises(error) as told,
            ):
                claude.messages.create(model="m", max_tokens=5, messages=[{"role": "user", "content": "hi"}])
            assert told.value.body["type"] == "error"  # type: ignore[index]


def test_no_key_of_ours_goes_to_the_upstream_and_its_own_is_never_shown(
    keys: Keys, upstream: FakeUpstream, upstream_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    _, token = keys.create("shop", doors=DOORS)
    upstream.reply = Reply.error(401, f"Incorrect API key provided: {UPSTREAM_KEY}")
    with serving(make(keys, upstream_url=upstream_url, redis_url="redis://127.0.0.1:1/0")) as url:
        told = []
        for path, body in (
            ("/v1/chat/completions", {"model": "m", "messages": HELLO}),
            ("/v1/moderations", {"input": "hi"}),
            ("/v1/moderations", {"input": 5}),
        ):
            for headers in (bearer(token), {"x-api-key": token}, {}):
                told.append(httpx.post(f"{url}{path}", headers=headers, json=body))
        told += [
            httpx.get(f"{url}{path}", headers=bearer(token)) for path in ("/v1/models", "/metrics", "/healthz", "/x")
        ]

    assert upstream.received
    for request in upstream.received:
        assert request.headers["authorization"] == f"Bearer {UPSTREAM_KEY}"
        assert token.rpartition("_")[2] not in str(dict(request.headers))
    shown = "".join(f"{dict(each.headers)}{each.text}" for each in told) + caplog.text
    assert UPSTREAM_KEY not in shown
    assert token.rpartition("_")[2] not in shown


def test_a_client_may_have_its_own_key_for_the_upstream(keys: Keys, upstream: FakeUpstream, upstream_url: str) -> None:
    _, token = keys.create("shop")
    upstream.reply = Reply.json({"object": "list", "data": []})
    with serving(make(keys, upstream_url=upstream_url, upstream_key=None)) as url:
        own = {**bearer(token), "x-upstream-authorization": "Bearer sk-mine", "x-upstream-api-key": "k"}
        httpx.get(f"{url}/v1/models", headers=own)
        httpx.get(f"{url}/v1/models", headers=bearer(token))
        behind = httpx.get(f"{url}/v1/guard", headers=own).json()["headers"]

    assert [request.headers.get("authorization") for request in upstream.received] == ["Bearer sk-mine", None]
    assert behind == {"authorization": "Bearer sk-mine", "x-api-key": "k"}


def test_health_is_open_and_says_little_to_strangers(keys: Keys) -> None:
    _, token = keys.create("shop")
    with serving(make(keys)) as url:
        stranger = httpx.get(f"{url}/healthz")
        known = httpx.get(f"{url}/healthz", headers=bearer(token))

    assert (stranger.status_code, stranger.json()) == (200, {"status": "ok"})
    assert known.json()["guard"] == "fake/1"


def test_metrics_need_a_key_that_opens_them_unless_they_are_open(keys: Keys) -> None:
    _, token = keys.create("prometheus", doors=["metrics"])
    with serving(make(keys)) as url:
        assert httpx.get(f"{url}/metrics").status_code == 401
        page = httpx.get(f"{url}/metrics", headers=bearer(token)).text
    with serving(make(keys, open_doors=["metrics"])) as url:
        assert httpx.get(f"{url}/metrics").status_code == 200
        assert httpx.get(f"{url}/v1/guard").status_code == 401

    assert "tidegate_keys 1.0" in page
    assert "tidegate_keys_up 1.0" in page
    assert "tidegate_keys_most_age_seconds 3600.0" in page
    assert 'tidegate_refused_total{kind="unauthorized"} 1.0' in page
    with pytest.raises(InputError, match="chat"):
        EntranceOptions(open_doors=["chat"])


def test_who_is_turned_away_is_counted_under_the_route_of_the_door(keys: Keys) -> None:
    _, token = keys.create("shop", doors=("chat",))
    with serving(make(keys, open_doors=("metrics",))) as url:
        httpx.post(f"{url}/v1/chat/completions")
        httpx.get(f"{url}/v1/models/some-model")
        httpx.post(f"{url}/v1/moderations", headers=bearer(token))
        httpx.get(f"{url}/no/such/path")
        told = httpx.get(f"{url}/metrics").text

    for route, status in (
        ("/v1/chat/completions", 401),
        ("/v1/models/{name:path}", 401),
        ("/v1/moderations", 403),
        ("other", 401),
    ):
        assert f'tidegate_requests_total{{route="{route}",status="{status}"}} 1.0' in told


def test_a_browser_opens_the_console_with_a_key_as_password(keys: Keys) -> None:
    _, token = keys.create("people", doors=["console"])
    console = create_console(guard=FakeStreamGuard(), policy=make_policy())

    def basic(password: str) -> dict[str, str]:
        return {"authorization": "Basic " + base64.b64encode(f"anybody:{password}".encode()).decode()}

    with serving(make(keys, routes=console)) as url:
        asked = httpx.get(f"{url}/playground")
        page = httpx.get(f"{url}/playground", headers=basic(token))
        wrong = [httpx.get(f"{url}/playground", headers=each) for each in (basic("x"), {"authorization": "Basic %%"})]
        elsewhere = httpx.post(f"{url}/v1/moderations", headers=basic(token), json={"input": "hi"})

    assert asked.headers["www-authenticate"].startswith("Basic")
    assert (page.status_code, "html" in page.headers["content-type"]) == (200, True)
    assert [each.status_code for each in wrong] == [401, 401]
    assert elsewhere.status_code == 401, "a page of another site must not speak for who is logged in here"


async def test_a_websocket_needs_a_key_too_and_counts_as_one_exchange(keys: Keys) -> None:
    _, token = keys.create("shop", allowance=Allowance(concurrent=1))
    _, narrow = keys.create("shop", doors=["chat"])
    with serving(make(keys)) as url:
        connect = functools.partial(
            websockets.connect, f"{url.replace('http', 'ws')}/v1/live", subprotocols=[websockets.Subprotocol(PROTOCOL)]
        )
        for shown, status in (({}, 401), (bearer(narrow), 403)):
            with pytest.raises(websockets.InvalidStatus) as caught:
                await connect(additional_headers=shown)
            assert caught.value.response.status_code == status
            assert json.loads(caught.value.response.body)["error"]["code"] in ("invalid_api_key", "door_closed")
        async with connect(additional_headers=bearer(token)) as socket:
            assert json.loads(await socket.recv())["type"] == "hello"
            with pytest.raises(websockets.InvalidStatus) as caught:
                await connect(additional_headers=bearer(token))
            assert caught.value.response.status_code == 429
        for _ in range(200):
            with contextlib.suppress(websockets.InvalidStatus):
                async with connect(additional_headers=bearer(token)) as again:
                    assert json.loads(await again.recv())["type"] == "hello"
                break
        else:
            pytest.fail("the place was not given back")


def test_a_decision_is_made_for_the_tenant_of_the_key(keys: Keys) -> None:
    _, token = keys.create("shop", region="EU")
    record = Record()
    with serving(make(keys, keep=record)) as url:
        httpx.post(f"{url}/v1/moderations", headers=bearer(token), json={"input": "hi"})

    scope = record.kept[0][0].scope
    assert (scope.tenant, scope.region) == ("shop", "EU")


def test_an_adapter_that_the_guard_has_not_is_a_failure_of_the_guard(keys: Keys) -> None:
    _, token = keys.create("bank", adapter="bank")
    with serving(make(keys)) as url:
        response = httpx.post(f"{url}/v1/moderations", headers=bearer(token), json={"input": "hi"})

    assert (response.status_code, response.json()["error"]["code"]) == (503, "guard_error")


def test_without_keys_everybody_is_let_in_for_no_tenant() -> None:
    with serving(make(None)) as url:
        answer = httpx.get(f"{url}/v1/guard", headers={"authorization": "Bearer sk-client"}).json()

    assert answer == {"state": [None, None, None, False], "headers": {"authorization": "Bearer sk-client"}}


def test_a_tenant_has_limits_with_all_of_its_keys_together(keys: Keys) -> None:
    tokens = [keys.create("shop")[1], keys.create("shop")[1], keys.create("bank")[1]]
    limits = LimitOptions(tenant=Allowance(per_minute=1, burst=1))
    with serving(make(keys, limits=limits)) as url:
        told = [httpx.get(f"{url}/v1/guard", headers=bearer(token)).status_code for token in tokens]

    assert told == [200, 429, 200]


def test_two_gateways_limit_a_key_together_over_redis_and_each_alone_when_it_dies(
    keys: Keys, redis: RedisServer
) -> None:
    _, token = keys.create("shop", allowance=Allowance(per_minute=1, burst=2), doors=["guard", "metrics"])
    options = {"redis_url": redis.url, "secret": bytes(32)}
    with serving(make(keys, **options)) as one, serving(make(keys, **options)) as two:

        def ask(url: str) -> int:
            return httpx.get(f"{url}/v1/guard", headers=bearer(token)).status_code

        def metrics(url: str) -> str:
            return httpx.get(f"{url}/metrics", headers=bearer(token)).text

        assert [ask(one), ask(two), ask(one), ask(two)] == [200, 200, 429, 429]
        assert "tidegate_redis_up 1.0" in metrics(one)
        redis.kill()
        assert [ask(one), ask(one), ask(two), ask(two)] == [200, 429, 200, 429]
        assert "tidegate_redis_up 0.0" in metrics(one)
        redis.start()
        wait_until(lambda: "tidegate_redis_up 1.0" in metrics(one), "Redis to be found again")


def test_verdicts_are_remembered_where_that_is_asked_for(keys: Keys) -> None:
    guard = FakeStreamGuard()
    _, token = keys.create("shop", doors=DOORS)
    record = Record()
    with serving(make(keys, guard=guard, keep=record, remembered=10)) as url:
        for _ in range(3):
            httpx.post(f"{url}/v1/moderations", headers=bearer(token), json={"input": "how do I bake"})
        metrics = httpx.get(f"{url}/metrics", headers=bearer(token)).text

    assert len(guard.judged) == 1
    assert len(record.kept) == 3, "every decision is kept all the same"
    assert 'tidegate_verdicts_total{source="local"} 2.0' in metrics


def test_keys_that_are_made_rotated_and_revoked_reach_a_gateway_that_runs(keys: Keys) -> None:
    with serving(make(keys)) as url:

        def status(token: str) -> int:
            return httpx.get(f"{url}/v1/guard", headers=bearer(token)).status_code

        made, token = keys.create("shop")
        wait_until(lambda: status(token) == 200, "the key to be known")
        _, newer = keys.rotate(made.id, grace=timedelta(0))
        wait_until(lambda: (status(token), status(newer)) == (401, 200), "the new secret to be known")
        keys.revoke(made.id)
        wait_until(lambda: status(newer) == 401, "the key to be taken back")


# --- the ring -----------------------------------------------------------------------------------------------------


class Source:
    """Keys of a real store, which can be down."""

    def __init__(self, keys: Keys) -> None:
        self.keys = keys
        self.down = False
        self.asked: list[int] = []

    def changed_since(self, version: int) -> tuple[int, Sequence[KnownKey]]:
        if self.down:
            raise StoreError("the database is down")
        self.asked.append(version)
        return self.keys.changed_since(version)

    def admits(self, known: KnownKey | None, identity: str, secret: str, now: datetime) -> bool:
        return self.keys.admits(known, identity, secret, now)


@pytest.fixture
def ring(keys: Keys) -> tuple[KeyRing, Source, list[float]]:
    now = [0.0]
    source = Source(keys)
    return KeyRing(source, most_age_s=100, all_every_s=60, clock=lambda: now[0]), source, now


async def test_while_the_database_is_down_known_keys_stay_good_for_a_stated_time(
    keys: Keys, ring: tuple[KeyRing, Source, list[float]]
) -> None:
    known, source, now = ring
    _, token = keys.create("shop")
    assert not known.usable
    assert await known.refresh()
    source.down = True
    now[0] = 100
    assert not await known.refresh()
    assert (known.usable, known.up, known.age_s) == (True, False, 100)
    assert known.find(token) is not None
    now[0] = 100.1

    assert not known.usable


async def test_only_what_changed_is_read_and_now_and_then_all(
    keys: Keys, ring: tuple[KeyRing, Source, list[float]]
) -> None:
    known, source, now = ring
    keys.create("shop")
    await known.refresh()
    _, token = keys.create("bank")
    await known.refresh()
    assert known.find(token) is not None
    now[0] = 60
    await known.refresh()

    assert source.asked == [0, 1, 0]


async def test_a_database_that_went_back_in_time_is_read_whole(
    keys: Keys, ring: tuple[KeyRing, Source, list[float]], tmp_path: Path
) -> None:
    known, source, _ = ring
    _, token = keys.create("shop")
    keys.create("shop")
    await known.refresh()
    with open_store(url_of(tmp_path / "backup.db"), spool=tmp_path / "other") as backup:
        source.keys = backup.keys
        _, other = backup.keys.create("shop")
        await known.refresh()

        assert known.find(token) is None
        assert known.find(other) is not None


def test_when_nothing_is_known_of_keys_the_answer_is_not_that_the_key_is_wrong(keys: Keys) -> None:
    source = Source(keys)
    source.down = True
    _, token = keys.create("shop")
    with serving(make(source)) as url:
        down = httpx.get(f"{url}/v1/guard", headers=bearer(token))
        health = httpx.get(f"{url}/healthz", headers=bearer(token))
        source.down = False
        wait_until(lambda: httpx.get(f"{url}/v1/guard", headers=bearer(token)).status_code == 200, "the keys")

    assert (down.status_code, down.json()["error"]["code"]) == (503, "keys_unavailable")
    assert health.json() == {"status": "ok"}
