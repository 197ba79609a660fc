"""What all guards that watch streams promise: see `tidegate.guards.base.Session`. Guards are made in contract.py."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streams import assert_covers, assert_same, cut, streamed
from tidegate.errors import GuardError, GuardOverloaded, InputError, SessionClosed
from tidegate.guards import StreamGuard
from tidegate.testing import FakeUpstream
from tidegate.types import Channel, Conversation, Span

from .contract import AWKWARD, GUARDS, PROMPT, TEXT, TEXTS, Gate, Place, Watched

SLOW = ("stream", "remote", "vllm-stream", "tidegate")
"""Guards that are asked about fewer examples."""
WRITTEN = (Channel.ANSWER, Channel.REFUSAL, Channel.REASONING, Channel.TOOL_CALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("guards")


@pytest.fixture(params=GUARDS, ids=lambda name: name.replace(" ", "-"))
async def watched(
    request: pytest.FixtureRequest,
    folder: Path,
    upstream: FakeUpstream,
    upstream_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[Watched]:
    gate = Gate()
    async with GUARDS[request.param](Place(folder, upstream, upstream_url, monkeypatch), gate) as guard:
        try:
            yield guard
        finally:
            gate.open_it()


def open_sessions(watched: Watched) -> int:
    return 0 if watched.opened is None else len(watched.opened)


async def waiting(watched: Watched) -> tuple[Any, asyncio.Task[Any]]:
    """A session whose feed stands before the gate."""
    watched.gate.shut_it()
    session = watched.guard.open(PROMPT)
    feed = asyncio.create_task(session.feed(TEXT))
    await watched.gate.reached()
    return session, feed


async def assert_used_up(session: Any) -> None:
    for call in (session.feed("x"), session.feed(""), session.finish()):
        with pytest.raises(SessionClosed):
            await call
    session.close()


def test_it_has_a_name_and_the_methods_of_a_stream_guard(watched: Watched) -> None:
    assert isinstance(watched.guard, StreamGuard)
    assert watched.guard.name


async def check_any_cut(watched: Watched, data: st.DataObject) -> None:
    text = data.draw(TEXTS)
    pieces = cut(text, data.draw(st.lists(st.integers(0, 200), max_size=8)))

    whole = await streamed(watched.guard.open(PROMPT), [text])

    assert_same(await streamed(watched.guard.open(PROMPT), pieces), whole, watched.noise)
    assert_covers(whole, text)


def share_of_examples(divisor: int) -> settings:
    """One in so many of the examples that a test draws in this run."""
    calm = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=max(1, settings().max_examples // divisor), suppress_health_check=calm)


@pytest.mark.parametrize("watched", [name for name in GUARDS if name not in SLOW], indirect=True)
@given(st.data())
@share_of_examples(2)
async def test_verdicts_depend_on_the_text_alone(watched: Watched, data: st.DataObject) -> None:
    await check_any_cut(watched, data)


@pytest.mark.parametrize("watched", SLOW, indirect=True)
@given(st.data())
@share_of_examples(8)
async def test_verdicts_depend_on_the_text_alone_where_each_takes_long(watched: Watched, data: st.DataObject) -> None:
    await check_any_cut(watched, data)


@pytest.mark.parametrize("text", [TEXT, "".join(AWKWARD), "\n\n\n"], ids=["plain", "awkward", "empty lines"])
async def test_character_by_character_equals_at_once(watched: Watched, text: str) -> None:
    whole = await streamed(watched.guard.open(None), [text])

    assert_same(await streamed(watched.guard.open(None), list(text)), whole, watched.noise)
    assert_covers(whole, text)


async def test_what_is_said_is_said_for_good(watched: Watched) -> None:
    """What follows changes nothing that was said, and what was said is of the text that was there."""
    start = TEXT[:100]
    session = watched.guard.open(PROMPT)
    early = await session.feed(start)
    session.close()

    assert all(token.span.end <= len(start) for token in early)
    for rest in ("", "bomb bomb bomb", "\u0301 and then it rains", "今天天气 !!! " * 9):
        whole = await streamed(watched.guard.open(PROMPT), [start + rest])
        assert_same(early, whole[: len(early)], watched.noise)


async def test_sessions_side_by_side_equal_sessions_one_by_one(watched: Watched) -> None:
    texts = [TEXT[place : 9 * place + 20] for place in range(8)]
    contexts = [None, *(Conversation.of(TEXT[: 7 * place]) for place in range(1, 8))]
    open_one = watched.guard.open

    alone = [await streamed(open_one(c), [t]) for c, t in zip(contexts, texts, strict=True)]
    together = await asyncio.gather(
        *(streamed(open_one(c), cut(t, range(5, 90, 17))) for c, t in zip(contexts, texts, strict=True))
    )

    for one, many in zip(alone, together, strict=True):
        assert_same(many, one, watched.noise)


async def test_a_text_without_characters_has_at_most_verdicts_without_width(watched: Watched) -> None:
    session = watched.guard.open(PROMPT)

    assert await session.feed("") == ()
    assert {token.span for token in await session.finish()} <= {Span(0, 0)}

    assert_same(
        await streamed(watched.guard.open(PROMPT), []),
        await streamed(watched.guard.open(PROMPT), ["", "", ""]),
        watched.noise,
    )


@pytest.mark.parametrize("channel", WRITTEN)
async def test_whatever_an_assistant_writes_can_be_watched(watched: Watched, channel: Channel) -> None:
    def open_one() -> Any:
        return watched.guard.open(PROMPT, channel, reasoning="They want bread, or a bomb.", name="shop")

    whole = await streamed(open_one(), [TEXT])

    assert_covers(whole, TEXT)
    assert_same(await streamed(open_one(), cut(TEXT, range(3, 90, 11))), whole, watched.noise)


@pytest.mark.parametrize("channel", [channel for channel in Channel if channel not in WRITTEN])
def test_nothing_else_can(watched: Watched, channel: Channel) -> None:
    with pytest.raises(InputError, match="channel"):
        watched.guard.open(PROMPT, channel)
    assert open_sessions(watched) == 0


async def test_a_session_is_used_up_by_finish(watched: Watched) -> None:
    session = watched.guard.open(PROMPT)
    await session.feed("hello there ")
    assert open_sessions(watched) == (watched.opened is not None)
    await session.finish()
    assert open_sessions(watched) == 0
    await assert_used_up(session)


async def test_a_session_is_used_up_by_close_which_can_be_repeated(watched: Watched) -> None:
    for begun in (False, True):
        session = watched.guard.open(PROMPT)
        if begun:
            await session.feed(TEXT)
        session.close()
        session.close()
        assert open_sessions(watched) == 0
        await assert_used_up(session)


async def test_a_session_takes_one_call_at_a_time_or_says_that_calls_may_overlap(watched: Watched) -> None:
    session, first = await waiting(watched)
    if watched.overlaps:
        others = [asyncio.create_task(call) for call in (session.feed(TEXT), session.finish())]
        watched.gate.open_it()
        parts = await asyncio.gather(first, *others)
    else:
        for call in (session.feed("more"), session.finish()):
            with pytest.raises(GuardError, match="one piece of text at a time"):
                await call
        watched.gate.open_it()
        parts = [await first, await session.feed(TEXT), await session.finish()]

    tokens = [token for part in parts for token in part]
    assert_same(tokens, await streamed(watched.guard.open(PROMPT), [TEXT, TEXT]), watched.noise)


async def test_closing_a_session_ends_the_feed_that_is_running(watched: Watched) -> None:
    session, feed = await waiting(watched)

    session.close()
    assert open_sessions(watched) == 0
    await assert_used_up(session)
    if not watched.ends_at_once:
        watched.gate.open_it()
    with pytest.raises(SessionClosed):
        await feed

    watched.gate.open_it()
    assert_covers(await streamed(watched.guard.open(PROMPT), [TEXT]), TEXT)


async def test_a_feed_that_is_cancelled_closes_its_session_and_no_other(watched: Watched) -> None:
    other = watched.guard.open(PROMPT)
    given_out = list(await other.feed(TEXT))
    session, feed = await waiting(watched)

    feed.cancel()
    with pytest.raises(asyncio.CancelledError):
        await feed

    assert open_sessions(watched) == (watched.opened is not None)
    await assert_used_up(session)
    watched.gate.open_it()
    given_out += await streamed(other, ["and more"])
    assert_covers(given_out, TEXT + "and more")


async def test_a_failure_closes_the_session(watched: Watched) -> None:
    session, feed = await waiting(watched)
    watched.gate.fails = True

    watched.gate.open_it()
    with pytest.raises(GuardError) as raised:
        await feed

    assert not isinstance(raised.value, SessionClosed)
    assert TEXT[:20] not in str(raised.value)
    assert open_sessions(watched) == 0
    await assert_used_up(session)


async def test_more_sessions_than_may_be_open_are_refused_until_one_ends(watched: Watched) -> None:
    if watched.opened is None:
        pytest.skip("the servers that it asks have limits of their own")
    watched.opened.most = 3
    finished, closed, forgotten = sessions = [watched.guard.open(PROMPT) for _ in range(3)]
    for session in sessions:
        await session.feed("hello there ")

    async def refused() -> None:
        if watched.opens_late:
            call: Any = watched.guard.open(None).feed("hello there ")
            with pytest.raises(GuardOverloaded, match="3 sessions are open already"):
                await call
        else:
            with pytest.raises(GuardOverloaded, match="3 sessions are open already"):
                watched.guard.open(None)

    await refused()
    assert len(watched.opened) == 3
    await finished.finish()
    closed.close()
    del sessions, session, forgotten
    gc.collect()
    sessions = [watched.guard.open(PROMPT) for _ in range(3)]
    for session in sessions:
        await session.feed("hello there ")
    await refused()
    for session in sessions:
        session.close()


async def test_nothing_is_left_after_many_sessions(watched: Watched) -> None:
    left: list[weakref.ref[Any]] = []

    async def one(number: int) -> None:
        session = watched.guard.open(PROMPT)
        left.append(weakref.ref(session))
        await session.feed("hello there my friend " * (number % 7))
        if number % 4 == 0:
            await session.finish()
        elif number % 4 == 1:
            session.close()
        elif number % 4 == 2:
            feed = asyncio.create_task(session.feed(TEXT))
            await asyncio.sleep(0)
            feed.cancel()
            await asyncio.gather(feed, return_exceptions=True)
        # the others are forgotten

    for start in range(0, 48, 16):
        await asyncio.gather(*(one(number) for number in range(start, start + 16)))
    gc.collect()
    assert not [session for session in left if session() is not None]
    assert open_sessions(watched) == 0
    await watched.guard.judge(PROMPT)
    await asyncio.sleep(0)
    assert watched.at_rest()
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_closing_a_guard_can_be_repeated(watched: Watched) -> None:
    assert_covers(await streamed(watched.guard.open(None), [TEXT]), TEXT)
    await watched.guard.close()
    await watched.guard.close()
