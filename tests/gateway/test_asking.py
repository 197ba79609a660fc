"""Asking the upstream one thing: text as it comes, and every trouble as an UpstreamError."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

import pytest
import uvicorn

from tidegate.errors import UpstreamError
from tidegate.gateway.asking import Asking
from tidegate.gateway.upstream import Upstream
from tidegate.testing import Die, FakeUpstream, Hang, Reply, chunk, text_chunks

MODELS = Reply.json({"object": "list", "data": [{"id": "first"}, {"id": "second"}]})


@pytest.fixture
def serve() -> Iterator[Callable[[FakeUpstream], str]]:
    running: list[tuple[uvicorn.Server, threading.Thread, socket.socket]] = []

    def start(upstream: FakeUpstream) -> str:
        listening = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(upstream, log_level="critical", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        running.append((server, thread, listening))
        return f"http://127.0.0.1:{listening.getsockname()[1]}/v1"

    yield start
    for server, thread, listening in running:
        server.should_exit = True
        thread.join()
        listening.close()


def replies(reply: Reply) -> Callable[[Any], Reply]:
    return lambda body: MODELS if body is None else reply


async def asked(url: str) -> AsyncGenerator[str, None]:
    asking = Asking(Upstream(url, connect_timeout_s=10, silence_timeout_s=30))
    try:
        async for text in asking.ask("hello"):
            yield text
    finally:
        await asking.close()


async def test_the_answer_comes_as_text_from_the_first_model_listed(serve: Callable[[FakeUpstream], str]) -> None:
    upstream = FakeUpstream(replies(Reply.stream(*text_chunks(["Grüße", " an", " alle 👋🏽"]))))
    assert "".join([text async for text in asked(serve(upstream))]) == "Grüße an alle 👋🏽"
    assert upstream.received[-1].body == {
        "model": "first",
        "stream": True,
        "messages": [{"role": "user", "content": "hello"}],
    }


async def test_an_answer_in_parts_comes_as_its_text(serve: Callable[[FakeUpstream], str]) -> None:
    parts = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "so "}, {"type": "text", "text": "fine"}]
    upstream = FakeUpstream(replies(Reply.stream(chunk({"content": parts}), chunk(finish_reason="stop"))))
    assert "".join([text async for text in asked(serve(upstream))]) == "so fine"


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (Reply.error(429, "you said: bomb"), "too many requests"),
        (Reply.stream(chunk({"content": "a"}), b"data: {broken\n\n"), "not JSON"),
        (Reply.stream(b'data: {"error": {"message": "bomb"}}\n\n'), "reported an error"),
        (Reply.stream(chunk({"content": "a"}), done=False), "before the end"),
        (Reply.stream(chunk({"content": "a"}), Die(), done=False), "broke off"),
    ],
)
async def test_what_goes_wrong_is_an_upstream_error(
    serve: Callable[[FakeUpstream], str], reply: Reply, words: str
) -> None:
    url = serve(FakeUpstream(replies(reply)))
    with pytest.raises(UpstreamError, match=words):
        _ = [text async for text in asked(url)]


@pytest.mark.parametrize("listed", [{"data": []}, {}, []])
async def test_an_upstream_without_a_model_says_so(serve: Callable[[FakeUpstream], str], listed: Any) -> None:
    url = serve(FakeUpstream(Reply.json(listed)))
    with pytest.raises(UpstreamError, match="lists no model"):
        _ = [text async for text in asked(url)]


async def test_an_upstream_that_is_not_there_says_so() -> None:
    with pytest.raises(UpstreamError, match="cannot be reached"):
        _ = [text async for text in asked("http://127.0.0.1:9/v1")]


async def test_who_stops_listening_lets_the_upstream_go(serve: Callable[[FakeUpstream], str]) -> None:
    upstream = FakeUpstream(replies(Reply.stream(chunk({"content": "first"}), Hang(), done=False)))
    asking = Asking(Upstream(serve(upstream)))
    answer = asking.ask("hello")
    assert await anext(answer) == "first"
    await answer.aclose()
    await asking.close()
    for _ in range(2000):
        if not upstream.open_requests:
            break
        await asyncio.sleep(0.005)
    assert upstream.received[-1].cancelled
