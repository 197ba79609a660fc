"""The fakes keep the promises of what they stand for."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from serving import serving, wait_until
from tidegate.errors import GuardOverloaded, GuardTimeout, GuardUnavailable, SessionClosed
from tidegate.guards.base import Guard, StreamGuard
from tidegate.testing import (
    Die,
    FakeGuard,
    FakeStreamGuard,
    FakeUpstream,
    Hang,
    NoGuard,
    Reply,
    chunk,
    completion,
    text_chunks,
)
from tidegate.types import Conversation, Severity


def test_they_are_guards() -> None:
    """The protocols say so."""
    assert isinstance(FakeGuard(), Guard)
    assert isinstance(FakeStreamGuard(), StreamGuard)


async def test_no_guard_finds_everything_safe_at_once() -> None:
    """Each piece is one token that is complete; a whole text is safe."""
    guard = NoGuard()
    session = guard.open(None)

    tokens = [token for piece in ("a bo", "mb", "", " bomb") for token in await session.feed(piece)]

    assert isinstance(guard, StreamGuard)
    assert [(token.span.start, token.span.end) for token in tokens] == [(0, 4), (4, 6), (6, 11)]
    assert {token.severity for token in tokens} == {Severity.SAFE}
    assert await session.finish() == ()
    assert (await guard.judge(Conversation.of("bomb"))).severity is Severity.SAFE


async def test_words_decide() -> None:
    """The worst word, in any case and between any punctuation."""
    guard = FakeGuard(unsafe={"boo": "Violent"}, controversial={"hm": "PII"})

    said = {text: (await guard.judge(Conversation.of(text))).severity for text in ("hi", "hm.", "hm (BOO!)", "boot")}

    assert said == {
        "hi": Severity.SAFE,
        "hm.": Severity.CONTROVERSIAL,
        "hm (BOO!)": Severity.UNSAFE,
        "boot": Severity.SAFE,
    }
    assert (await guard.judge(Conversation.of("hm boo"))).categories == ("Violent",)


async def test_trouble_comes_when_told() -> None:
    """Failing, hanging, overloaded, and closed."""
    guard = FakeStreamGuard(most_sessions=1, error=GuardTimeout("late"))
    session = guard.open(None)
    with pytest.raises(GuardOverloaded):
        guard.open(None)
    with pytest.raises(GuardTimeout):
        await session.feed("x guardfail ")
    assert guard.open_sessions == 0
    with pytest.raises(SessionClosed):
        await session.feed("x")
    with pytest.raises(GuardUnavailable):
        await FakeGuard().judge(Conversation.of("guardfail"))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(FakeGuard(delay_s=0.001).judge(Conversation.of("guardhang")), 0.02)


async def test_a_sticky_guard_does_not_calm_down() -> None:
    """Nothing after an unsafe word is safe."""
    session = FakeStreamGuard(sticky=True).open(None)

    said = [token.severity.word for token in await session.feed("a bomb is here ")]

    assert said == ["safe", "unsafe", "unsafe", "unsafe"]


def test_the_upstream_follows_its_script() -> None:
    """Whole, streaming, errors, dying; and it remembers what it received."""
    upstream = FakeUpstream()
    with serving(upstream) as url, httpx.Client() as client:
        assert client.post(url, json={"a": 1}).json() == completion("Hello there.")
        assert upstream.received[0].body == {"a": 1}
        wait_until(lambda: upstream.received[0].finished)

        upstream.reply = Reply.stream(*text_chunks(["x"]))
        assert client.post(url).text.count("data: ") == 4

        upstream.reply = lambda body: Reply.error(418, str(body["tea"]))
        assert client.post(url, json={"tea": "no"}).json()["error"]["message"] == "no"

        upstream.reply = Reply.stream(chunk({"content": "x"}), Die())
        with pytest.raises(httpx.RemoteProtocolError):
            client.post(url)


def test_the_upstream_notices_a_hang_up() -> None:
    """A request whose client went away is cancelled, not finished."""
    upstream = FakeUpstream(Reply.stream(chunk({"content": "x"}), Hang()))

    def read(url: str) -> Any:
        with httpx.Client() as client, client.stream("POST", url) as response:
            return next(response.iter_text())

    with serving(upstream) as url:
        assert "chat.completion.chunk" in read(url)
        wait_until(lambda: upstream.received[0].cancelled, "the upstream to notice")
        assert upstream.open_requests == 0
        assert not upstream.received[0].finished
