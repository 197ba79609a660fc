"""What every request meets first and every response last, and connections that cannot be held for nothing."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme
import uvicorn

from serving import PATIENCE_S, make_policy, serving, wait_until
from tidegate.console.app import create_console
from tidegate.gateway.app import create_app
from tidegate.gateway.connections import BoundedConfig, Bounds
from tidegate.gateway.entrance import EntranceOptions
from tidegate.gateway.front import PAGE_POLICY
from tidegate.testing import FakeStreamGuard


def make(**options: Any) -> Any:
    guard, policy = FakeStreamGuard(), make_policy()
    console = create_console(guard=guard, policy=policy)
    return create_app(guard=guard, policy=policy, routes=console, entrance=EntranceOptions(**options))


@contextlib.contextmanager
def bounded(app: Any, bounds: Bounds, **options: Any) -> Iterator[int]:
    """Serve with bounds; gives the port."""
    with stoppable(app, bounds, **options) as (port, _):
        yield port


@contextlib.contextmanager
def stoppable(app: Any, bounds: Bounds, **options: Any) -> Iterator[tuple[int, uvicorn.Server]]:
    """The same, with the server."""
    listener = socket.socket(proto=socket.IPPROTO_TCP)  # else asyncio leaves Nagle on, and each answer waits 40 ms
    listener.bind(("127.0.0.1", 0))
    config = BoundedConfig(app, bounds=bounds, log_level="critical", timeout_graceful_shutdown=1, **options)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])), daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started, "the server to start")
        yield listener.getsockname()[1], server
    finally:
        server.should_exit = True
        thread.join(PATIENCE_S)
        listener.close()
        assert not thread.is_alive()


@contextlib.contextmanager
def connected(port: int) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as raw:
        yield raw


def rest(raw: socket.socket) -> bytes:
    """All that comes until the other end closes."""
    parts = []
    with contextlib.suppress(ConnectionError):
        while part := raw.recv(65536):
            parts.append(part)
    return b"".join(parts)


# --- headers ------------------------------------------------------------------------------------------------------


def test_no_response_is_sniffed_framed_or_kept_by_a_cache() -> None:
    with serving(make()) as url:
        answers = [
            httpx.get(f"{url}/healthz"),
            httpx.get(f"{url}/metrics"),
            httpx.get(f"{url}/nothing"),
            httpx.post(f"{url}/v1/moderations", json={"input": "hi"}),
            httpx.post(f"{url}/v1/moderations", content=b"{"),
        ]

    for answer in answers:
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-store"
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert len(answer.headers.get_list("content-security-policy")) == 1


def test_a_page_keeps_what_it_says_for_itself_and_loads_what_is_ours() -> None:
    with serving(make()) as url:
        page = httpx.get(f"{url}/playground")

    assert page.headers.get_list("content-security-policy") == [PAGE_POLICY]
    assert page.headers.get_list("cache-control") == ["no-cache"]
    assert page.headers.get_list("x-content-type-options") == ["nosniff"]


@pytest.mark.parametrize("given", ["trace-1", "a.b:c_D-9", "x" * 128])
def test_a_request_keeps_the_id_that_it_came_with(given: str) -> None:
    with serving(make()) as url:
        assert httpx.get(f"{url}/nothing", headers={"x-request-id": given}).headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "two words", "x" * 129, '"><script>', "-a", "é".encode("latin-1")])
def test_an_id_that_is_no_plain_word_is_replaced(given: str | bytes) -> None:
    with serving(make()) as url:
        first, second = [httpx.get(url, headers={"x-request-id": given}).headers["x-request-id"] for _ in range(2)]

    assert first.startswith("req_")
    assert first != second


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("gate.example.com", 404),
        ("GATE.example.com:8080", 404),
        ("a.tenants.example.com", 404),
        ("[::1]:8080", 404),
        ("tenants.example.com", 421),
        ("a.b.tenants.example.com", 421),
        ("gate.example.com.evil.test", 421),
        ("", 421),
    ],
)
def test_a_gateway_with_names_answers_to_no_other(host: str, status: int) -> None:
    with serving(make(hosts=["gate.example.com", "*.tenants.example.com", "[::1]"])) as url:
        assert httpx.get(f"{url}/nothing", headers={"host": host}).status_code == status
        assert httpx.get(f"{url}/healthz", headers={"host": "10.0.0.7"}).status_code in (200, 503), (
            "probes ask by address"
        )


# --- time and room ------------------------------------------------------------------------------------------------


def test_a_body_that_does_not_come_is_told_so_and_the_connection_closed() -> None:
    with bounded(make(read_timeout_s=0.05), Bounds()) as port, connected(port) as raw:
        raw.sendall(b"POST /v1/moderations HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        answer = rest(raw)

    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"request_timeout"' in answer


def test_headers_that_do_not_come_are_told_so_and_the_connection_closed() -> None:
    with bounded(make(), Bounds(head_s=0.05)) as port, connected(port) as raw:
        raw.sendall(b"GET /healthz HTTP/1.1\r\nhost: ")
        answer = rest(raw)

    assert answer.startswith(b"HTTP/1.1 408 ")


def test_a_client_that_drips_gets_no_more_time() -> None:
    """Each byte comes in time, and the whole does not."""
    with bounded(make(), Bounds(head_s=0.2)) as port, connected(port) as raw:
        raw.sendall(b"GET /healthz HTTP/1.1\r\nx: ")
        with pytest.raises(OSError):  # noqa: PT012 - whichever byte finds it closed
            while True:
                raw.sendall(b"a")
                threading.Event().wait(0.01)


def test_a_connection_that_never_asks_is_closed() -> None:
    with bounded(make(), Bounds(head_s=0.05)) as port, connected(port) as raw:
        assert rest(raw) == b""


def test_a_body_that_drips_after_its_answer_does_not_hold_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tidegate.gateway.connections._SPARE_S", 0.0)
    with bounded(make(), Bounds(request_s=0.3)) as port, connected(port) as raw:
        raw.sendall(b"POST /nothing HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n")
        with pytest.raises(OSError):  # noqa: PT012 - whichever byte finds it closed
            while True:
                raw.sendall(b"a")
                threading.Event().wait(0.01)


@pytest.mark.parametrize(
    "head",
    [
        b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nx: " + b"a" * 5000 + b"\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nx: " + b"a" * 5000,
        b"GET /healthz HTTP/1.1\r\n" + b"a: b\r\n" * 800 + b"\r\n",
        b"GET /healthz HTTP/1.1\r\n" + b"a: b\r\n" * 30 + b"\r\n",
    ],
)
def test_long_heads_and_many_headers_are_refused_before_they_are_kept(head: bytes) -> None:
    with bounded(make(), Bounds(head_bytes=4096, head_lines=20)) as port, connected(port) as raw:
        raw.sendall(head)
        answer = rest(raw)

    assert answer.startswith(b"HTTP/1.1 431 ")


def test_a_long_body_is_no_long_head() -> None:
    body = b'{"input": "' + b"a" * 50_000 + b'"}'
    with bounded(make(), Bounds(head_bytes=1024)) as port, httpx.Client() as client:
        for _ in range(3):
            address = f"http://127.0.0.1:{port}/v1/moderations"
            assert client.post(address, content=body).status_code == 200


def test_garbage_is_told_so_and_logged_without_itself(caplog: pytest.LogCaptureFixture) -> None:
    with bounded(make(), Bounds()) as port, connected(port) as raw:
        raw.sendall(b"plumtree\r\n\r\n")
        answer = rest(raw)

    assert answer.startswith(b"HTTP/1.1 400 ")
    assert "plumtree" not in caplog.text + answer.decode()


def test_more_connections_than_there_may_be_are_told_so_and_places_become_free() -> None:
    with bounded(make(), Bounds(connections=2)) as port:
        address = f"http://127.0.0.1:{port}/nothing"
        with contextlib.ExitStack() as held:
            for _ in range(2):
                held.enter_context(connected(port))
            wait_until(lambda: httpx.get(address).status_code == 503, "the places to be taken")
        wait_until(lambda: httpx.get(address).status_code == 404, "a place to be free")


def test_requests_on_one_connection_each_have_their_own_time_and_length() -> None:
    with bounded(make(), Bounds(head_bytes=400, head_s=20.0)) as port, connected(port) as raw:
        for _ in range(20):
            raw.sendall(b"GET /nothing HTTP/1.1\r\nhost: x\r\n\r\n")
            seen = b""
            while not seen.endswith(b"}"):
                seen += raw.recv(65536)
            assert seen.startswith(b"HTTP/1.1 404 ")
        raw.sendall(b"GET /nothing HTTP/1.1\r\nhost: x\r\n\r\n" * 20)
        raw.sendall(b"GET /nothing HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert rest(raw).count(b"HTTP/1.1 404 ") == 21


@pytest.mark.parametrize("apart", [False, True], ids=["at once", "in pieces"])
@pytest.mark.parametrize("form", ["length", "chunks"])
def test_a_request_that_offers_http2_is_answered_as_it_is(form: str, apart: bool) -> None:
    """As Java's own client and ``curl --http2`` do; and so are those behind it on the connection."""
    body = b'{"input": "a bomb"}'
    length, data = b"content-length: %d\r\n" % len(body), body
    if form == "chunks":
        length, data = b"transfer-encoding: chunked\r\n", b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    offer = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAEAAEAA\r\n"
    last = b"POST /v1/moderations HTTP/1.1\r\nhost: x\r\nconnection: close\r\n" + length + b"\r\n" + data
    sent = [b"POST /v1/moderations HTTP/1.1\r\nhost: x\r\n" + offer + length + b"\r\n", data, last]
    with bounded(make(), Bounds()) as port, connected(port) as raw:
        for piece in sent if apart else [b"".join(sent)]:
            raw.sendall(piece)
        answer = rest(raw)

    assert answer.count(b"HTTP/1.1 200 ") == 2, answer
    assert answer.count(b'"flagged":true') == 2


def test_many_offers_on_one_connection_are_each_answered() -> None:
    offer = b"connection: Upgrade\r\nupgrade: h2c\r\n\r\n"
    with bounded(make(), Bounds()) as port, connected(port) as raw:
        raw.sendall((b"GET /nothing HTTP/1.1\r\nhost: x\r\n" + offer) * 2_000)
        raw.sendall(b"GET /nothing HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert rest(raw).count(b"HTTP/1.1 404 ") == 2_001


def test_an_offer_in_a_request_for_a_tunnel_is_no_way_in() -> None:
    with bounded(make(), Bounds()) as port, connected(port) as raw:
        raw.sendall(b"CONNECT x:80 HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n")
        raw.shutdown(socket.SHUT_WR)
        answer = rest(raw)

    assert answer.startswith((b"HTTP/1.1 404 ", b"HTTP/1.1 400 ", b"HTTP/1.1 405 ")), answer


async def slow_hello(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"hello", "more_body": True})
    await send({"type": "http.response.body", "body": b" again"})


@pytest.mark.parametrize("before", [b"", b"GET / HTTP/1.1\r\nhost: a\r\n", b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"])
def test_a_request_that_was_on_its_way_when_the_server_was_told_to_stop_is_answered(
    before: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a new connection, in the middle of its head, and on a connection that had an answer already."""
    monkeypatch.setattr("tidegate.gateway.connections._ON_ITS_WAY_S", PATIENCE_S)
    whole = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"
    with stoppable(slow_hello, Bounds(), lifespan="off") as (port, server), connected(port) as raw:
        raw.sendall(before)
        if before == whole:
            answer = b""
            while not answer.endswith(b"0\r\n\r\n"):
                answer += raw.recv(65536)
        wait_until(lambda: len(server.server_state.connections) == 1, "the connection")
        server.should_exit = True
        wait_until(lambda: not server.servers[0].is_serving(), "the server to stop")
        raw.sendall(whole.removeprefix(before) or whole)
        assert rest(raw).endswith(b"6\r\n again\r\n0\r\n\r\n")


def test_a_connection_that_asks_for_nothing_does_not_keep_a_server_from_stopping() -> None:
    with stoppable(slow_hello, Bounds(), lifespan="off") as (port, server), connected(port) as raw:
        wait_until(lambda: len(server.server_state.connections) == 1, "the connection")
        server.should_exit = True
        assert rest(raw) == b""


# --- TLS ----------------------------------------------------------------------------------------------------------


def test_with_tls_and_a_client_ca_only_clients_with_a_certificate_are_answered(tmp_path: Path) -> None:
    authority = trustme.CA()
    server, client, stranger = (
        authority.issue_cert("127.0.0.1"),
        authority.issue_cert("client@example.com"),
        trustme.CA().issue_cert("stranger@example.com"),
    )
    server.private_key_and_cert_chain_pem.write_to_path(tmp_path / "server.pem")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    tls = {
        "ssl_certfile": str(tmp_path / "server.pem"),
        "ssl_keyfile": str(tmp_path / "server.pem"),
        "ssl_ca_certs": str(tmp_path / "ca.pem"),
        "ssl_cert_reqs": ssl.CERT_REQUIRED,
    }

    def context(cert: trustme.LeafCert | None) -> ssl.SSLContext:
        made = ssl.create_default_context()
        authority.configure_trust(made)
        if cert is not None:
            cert.configure_cert(made)
        return made

    with bounded(make(), Bounds(), **tls) as port:
        address = f"https://127.0.0.1:{port}/nothing"
        assert httpx.get(address, verify=context(client)).status_code == 404
        for wrong in (None, stranger):
            with pytest.raises(httpx.TransportError):
                httpx.get(address, verify=context(wrong))
