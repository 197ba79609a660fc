"""``/v1/live``: streams that somebody else holds, through a real server and a real client of WebSockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import httpx
import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.typing import Subprotocol

from id_guard import IdGuard
from serving import PATIENCE_S, Record, make_policy, serving, until, wait_until
from streams import cut
from tidegate.errors import GuardUnavailable
from tidegate.gateway.app import create_app
from tidegate.gateway.draining import DrainingWebSockets
from tidegate.gateway.live import LiveLimits
from tidegate.gateway.live_frames import PROTOCOL
from tidegate.moderate import StreamModerator
from tidegate.testing import FakeStreamGuard
from tidegate.types import Channel, Conversation, Scope

BREAD = [{"role": "user", "content": "how do i bake bread"}]
SAFE = "Bring the water to the boil, and add some salt. 🍞 Then wait."
NASTY = "Bring some bread and then a bomb bomb for the others to see"


class Line:
    """One connection, as a client of the protocol sees it."""

    def __init__(self, socket: ClientConnection, hello: dict[str, Any]) -> None:
        self.socket = socket
        self.hello = hello

    async def send(self, kind: str, stream: int = 1, **fields: Any) -> None:
        await self.socket.send(json.dumps({"type": kind, "stream": stream, **fields}))

    async def next(self) -> dict[str, Any]:
        async with asyncio.timeout(PATIENCE_S):
            frame: dict[str, Any] = json.loads(await self.socket.recv())
        return frame

    async def open(self, stream: int = 1, **fields: Any) -> None:
        await self.send("open", stream, **fields)
        assert await self.next() == {"type": "opened", "stream": stream}

    async def rest(self, stream: int = 1) -> list[dict[str, Any]]:
        """All frames of this stream until its last."""
        frames: list[dict[str, Any]] = []
        while not frames or frames[-1]["type"] not in ("end", "error"):
            frame = await self.next()
            if frame.get("stream") == stream:
                frames.append(frame)
        return frames

    async def say(self, pieces: Sequence[str], stream: int = 1) -> dict[str, Any]:
        """Send a text to its end, a piece at a time; gives the last frame, with the tokens of all."""
        for piece in pieces:
            await self.send("text", stream, text=piece)
        await self.send("finish", stream)
        frames = await self.rest(stream)
        return {**frames[-1], "tokens": [token for frame in frames for token in frame.get("tokens", ())]}

    async def closed(self) -> tuple[int | None, list[dict[str, Any]]]:
        """The code that the server closes with, and what it says before."""
        frames: list[dict[str, Any]] = []
        with contextlib.suppress(ConnectionClosed):
            while True:
                frames.append(await self.next())
        return self.socket.close_code, frames


@contextlib.asynccontextmanager
async def connected(url: str, **options: Any) -> AsyncIterator[Line]:
    address = url.replace("http", "ws", 1) + "/v1/live"
    async with connect(address, subprotocols=[Subprotocol(PROTOCOL)], **options) as socket:
        line = Line(socket, {})
        line.hello = await line.next()
        yield line


@contextlib.contextmanager
def a_server(record: Record | None = None, **options: Any) -> Iterator[str]:
    given = {"guard": FakeStreamGuard(), "policy": make_policy(), "keep": record, **options}
    with serving(create_app(**given)) as url:
        yield url


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[str, Record, FakeStreamGuard]]:
    record, guard = Record(), FakeStreamGuard(failing="crash")
    limits = LiveLimits(frame_bytes=64_000, streams=128, stream_characters=5_000, connection_characters=8_000)
    with a_server(record, guard=guard, live=limits) as url:
        yield url, record, guard


@pytest.fixture
def record(shared: tuple[str, Record, FakeStreamGuard]) -> Record:
    shared[1].kept.clear()
    return shared[1]


@pytest.fixture
def guard(shared: tuple[str, Record, FakeStreamGuard]) -> FakeStreamGuard:
    shared[2].opened.clear()
    return shared[2]


@pytest.fixture
async def line(shared: tuple[str, Record, FakeStreamGuard], record: Record) -> AsyncIterator[Line]:
    """A connection to a server that all of these tests share; it must be left with no session open."""
    async with connected(shared[0]) as one:
        yield one
    await until(lambda: shared[2].open_sessions == 0, "the sessions to be closed")


# --- what is said -------------------------------------------------------------------------------------------------


async def test_the_server_says_first_what_it_is_and_what_it_holds_a_client_to(line: Line) -> None:
    assert line.socket.subprotocol == PROTOCOL
    assert line.hello == {
        "type": "hello",
        "protocol": "tidegate.live.v1",
        "guard": "fake/1",
        "takes_ids": False,
        "limits": {
            "frame_bytes": 64_000,
            "streams": 128,
            "stream_characters": 5_000,
            "connection_characters": 8_000,
            "text_characters": 1_048_576,
            "open_characters": 16_777_216,
            "idle_seconds": 300.0,
        },
    }


async def test_a_safe_stream_leaves_whole_and_its_decision_is_kept(line: Line, record: Record) -> None:
    await line.open(turns=BREAD)
    await line.send("text", text="Bring the wa")
    first = await line.next()
    last = await line.say(["ter to the boil."])

    assert (first["type"], first["taken"], first["judged"], first["released"]) == ("step", 12, 9, 9)
    assert [(token["start"], token["end"]) for token in first["tokens"]] == [(0, 5), (5, 9)]
    assert set(first["tokens"][0]) == {
        *("start", "end", "severity", "probabilities", "category", "category_probability"),
    }
    assert (last["type"], last["reason"]) == ("end", "finished")
    assert last["taken"] == last["judged"] == last["released"] == 28
    assert last["decision"]["action"] == "allow"
    assert last["decision"]["id"] == "d1"
    decision, talk, _ = record.kept[0]
    assert decision.scope == Scope(route="/v1/live")
    assert talk == Conversation.of("how do i bake bread", "Bring the water to the boil.")


async def test_a_blocked_stream_ends_where_it_is_blocked_and_says_why(line: Line, record: Record) -> None:
    await line.open(turns=BREAD)
    last = await line.say([NASTY])

    assert (last["type"], last["reason"], last["released"]) == ("end", "blocked", NASTY.index(" bomb"))
    decision = last["decision"]
    assert (decision["action"], decision["rule"], decision["message"]) == ("block", "unsafe", "Not here.")
    assert decision["categories"] == ["Violent"]
    assert decision["span"] == {"start": NASTY.index(" bomb"), "end": NASTY.index(" for")}
    assert decision["coverage"][-1]["state"] == "not_judged"
    assert record.actions == ["block"]


async def test_what_a_stream_is_reaches_the_guard(line: Line, record: Record, guard: FakeStreamGuard) -> None:
    scope = {"region": "DE", "route": "/chat", "language": "de", "subject": "bob-7"}
    await line.open(
        turns=BREAD, channel="tool_call", reasoning="a shop", name="buy", path="choices[1].call", scope=scope
    )
    last = await line.say(['{"what": "bread"}'])

    opened = guard.opened[-1]
    assert (opened.channel, opened.reasoning, opened.name) == (Channel.TOOL_CALL, "a shop", "buy")
    assert opened.context == Conversation.of("how do i bake bread")
    assert last["decision"]["coverage"][0]["path"] == "choices[1].call"
    assert last["decision"]["scope"]["region"] == "DE"
    decision, talk, _ = record.kept[0]
    assert decision.scope.subject == "bob-7"
    assert talk.turns[-1].tool_calls[0].name == "buy"


async def test_without_tokens_only_the_counts_are_told(line: Line) -> None:
    await line.open(tokens=False)
    last = await line.say(["some bread"])

    assert last["tokens"] == []
    assert last["released"] == 10


async def test_an_observed_stream_is_never_stopped_and_its_decision_says_what_would_have_been(
    line: Line, record: Record
) -> None:
    await line.open(observe=True)
    last = await line.say([NASTY])

    assert (last["reason"], last["released"]) == ("finished", len(NASTY))
    assert last["tokens"][-1]["end"] == len(NASTY)
    assert last["decision"]["action"] == "allow"
    assert last["decision"]["observed"]["action"] == "block"
    assert last["decision"]["version"] == make_policy().version
    assert record.actions == ["allow"]


async def test_a_stream_without_text_is_decided_as_the_moderator_does(line: Line) -> None:
    await line.open()
    last = await line.say([])

    assert (last["reason"], last["released"], last["decision"]["severity"]) == ("finished", 0, "safe")


@given(st.data())
@settings(max_examples=20)
async def test_what_is_said_does_not_depend_on_how_the_text_is_cut(
    shared: tuple[str, Record, FakeStreamGuard], data: st.DataObject
) -> None:
    words = ["bomb", "knife", "bread", "🍞", "\n", "  ", "and", "e\u0301"]
    text = " ".join(data.draw(st.lists(st.sampled_from(words), max_size=12)))
    pieces = cut(text, data.draw(st.lists(st.integers(0, 60), max_size=6)))
    moderator = StreamModerator(FakeStreamGuard(), make_policy(), Scope(route="/v1/live"))
    alone = await moderator.feed(text)
    released = alone.released
    if alone.decision is None:
        alone = await moderator.finish()
        released += alone.released
    assert alone.decision is not None

    async with connected(shared[0]) as line:
        await line.open()
        last = await line.say(pieces)

    assert last["released"] == len(released)
    assert (last["decision"]["action"], last["decision"]["rule"]) == (alone.decision.action.word, alone.decision.rule)
    ends = [0, *(token["end"] for token in last["tokens"])]
    assert [token["start"] for token in last["tokens"]] == ends[:-1]


async def test_a_hundred_streams_on_one_connection_are_each_as_if_alone(line: Line, record: Record) -> None:
    texts = {number: SAFE if number % 2 else NASTY for number in range(1, 101)}
    for number in texts:
        await line.send("open", number, turns=[{"role": "user", "content": f"number {number}"}])
    for place in range(0, 70, 7):
        for number, text in texts.items():
            await line.send("text", number, text=text[place : place + 7])
    for number in texts:
        await line.send("finish", number)
    last: dict[int, dict[str, Any]] = {}
    while len(last) < 100:
        frame = await line.next()
        assert frame["type"] != "error"
        if frame["type"] == "end":
            last[frame["stream"]] = frame

    for number, text in texts.items():
        blocked = text == NASTY
        assert last[number]["reason"] == ("blocked" if blocked else "finished")
        assert last[number]["released"] == (NASTY.index(" bomb") if blocked else len(SAFE))
    kept = {talk.turns[0].content: decision.action.word for decision, talk, _ in record.kept}
    assert kept == {f"number {number}": "allow" if number % 2 else "block" for number in texts}


async def test_a_guard_that_fails_is_decided_by_the_policy_in_the_frame(line: Line, record: Record) -> None:
    await line.open()
    last = await line.say(["fine then crash there and more"])

    assert (last["type"], last["reason"]) == ("end", "blocked")
    assert last["decision"]["failure"]["kind"] == last["failure"]["kind"] == "GuardUnavailable"
    assert last["decision"]["rule"] == "on_guard_error"
    assert record.actions == ["block"]


async def test_a_failure_that_the_policy_allows_lets_the_rest_leave_and_says_so() -> None:
    with a_server(guard=FakeStreamGuard(failing="crash"), policy=make_policy(on_guard_error="allow")) as url:
        async with connected(url) as line:
            await line.open()
            await line.send("text", text="fine then crash there ")
            step = await line.next()
            last = await line.say(["and more"])

    assert step["failure"]["kind"] == "GuardUnavailable"
    assert (step["released"], last["released"]) == (22, 30)
    assert last["decision"]["coverage"][-1]["state"] == "not_judged"


# --- what a client does wrong -------------------------------------------------------------------------------------


async def test_a_text_half_a_character_wide_ends_its_stream_only(line: Line, record: Record) -> None:
    await line.open(1)
    await line.open(2)
    await line.send("text", 1, text="some bread and ")
    await line.next()
    await line.send("text", 1, text="\ud83c")
    error = (await line.rest(1))[-1]
    last = await line.say(["bread"], 2)

    assert (error["type"], error["code"], error["param"]) == ("error", "invalid_frame", "text")
    assert error["decision"]["action"] == "allow"
    assert last["reason"] == "finished"
    assert len(record.kept) == 2


@pytest.mark.parametrize(
    ("frames", "code", "param"),
    [
        ([{"type": "text", "text": 3}], "invalid_frame", "text"),
        ([{"type": "text", "text": "a", "more": 1}], "invalid_frame", "more"),
        ([{"type": "ids", "ids": [1, 2]}], "no_ids", None),
        ([{"type": "ids", "ids": [1, "x"]}], "invalid_frame", "ids[1]"),
        ([{"type": "text", "text": "a"}, {"type": "ids", "ids": [1]}], "mixed", None),
        ([{"type": "open"}], "stream_used", "stream"),
        ([{"type": "text", "text": "a" * 5_001}], "window_exceeded", None),
    ],
)  # fmt: skip
async def test_a_wrong_frame_ends_its_stream(
    line: Line, frames: list[dict[str, Any]], code: str, param: str | None
) -> None:
    await line.open(1)
    for frame in frames:
        await line.send(stream=1, **{"kind": frame["type"], **{k: v for k, v in frame.items() if k != "type"}})
    error = (await line.rest(1))[-1]
    await line.open(2)

    assert (error["type"], error["code"], error["param"]) == ("error", code, param)
    assert (await line.say(["bread"], 2))["reason"] == "finished"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"turns": [{"role": "wizard"}]}, "turns[0].role"),
        ({"turns": "x"}, "turns"),
        ({"channel": "user"}, "channel"),
        ({"scope": {"tenant": "x"}}, "scope.tenant"),
        ({"tokens": 1}, "tokens"),
        ({"path": ""}, "path"),
        ({"policy": "loose"}, "policy"),
    ],
)  # fmt: skip
async def test_a_stream_that_cannot_be_opened_is_told_where(
    line: Line, fields: dict[str, Any], param: str, record: Record
) -> None:
    await line.send("open", 1, **fields)
    error = await line.next()
    await line.send("text", 1, text="this crossed the error on its way")
    await line.open(2)

    assert (error["type"], error["stream"], error["code"], error["param"]) == ("error", 1, "invalid_frame", param)
    assert error["decision"] is None
    assert record.kept == []


async def test_a_stream_that_was_never_opened_is_not_there(line: Line) -> None:
    await line.open(3)
    await line.send("text", 4, text="x")
    await line.send("open", 2)

    assert [((frame := await line.next())["stream"], frame["code"]) for _ in "ab"] == [
        (4, "unknown_stream"),
        (2, "stream_used"),
    ]
    assert (await line.say(["bread"], 3))["reason"] == "finished"


@pytest.mark.parametrize(
    ("raw", "closes", "code"),
    [
        ("{", 1007, "invalid_json"),
        ("[]", 1007, "invalid_json"),
        ("NaN", 1007, "invalid_json"),
        ("[" * 30_000, 1007, "nested_too_deep"),
        ('{"x": ' + "[" * 100 + "]" * 100 + "}", 1007, "nested_too_deep"),
        (b"\x00\x01", 1003, "binary_frame"),
        ("x" * 64_001, 1009, "frame_too_long"),
        ('{"type": "dance", "stream": 1}', 1008, "invalid_frame"),
        ('{"type": "text", "text": "x"}', 1008, "invalid_frame"),
        ('{"type": "text", "text": "x", "stream": true}', 1008, "invalid_frame"),
        ('{"type": "text", "text": "x", "stream": 0}', 1008, "invalid_frame"),
        ('{"type": "finish", "stream": 1, "text": "x"}', 1008, "invalid_frame"),
    ],
    ids=[
        "open",
        "array",
        "nan",
        "endless",
        "deep",
        "binary",
        "long",
        "kind",
        "no stream",
        "bool",
        "zero",
        "finish with text",
    ],
)
async def test_a_frame_of_no_stream_ends_the_connection_and_every_stream_is_decided(
    line: Line, record: Record, raw: str | bytes, closes: int, code: str
) -> None:
    await line.open(1)
    await line.send("text", 1, text="some bread and ")
    await line.next()
    await line.socket.send(raw)

    told, frames = await line.closed()
    assert told == closes
    assert [(frame["code"], frame["stream"]) for frame in frames] == [(code, None)]
    await until(lambda: record.actions == ["allow"], "the decision to be kept")


async def test_a_frame_that_the_server_will_not_hold_ends_the_connection(line: Line) -> None:
    """uvicorn's own limit is larger here than ours; where it is not, the code is the same."""
    with contextlib.suppress(ConnectionClosed):
        await line.socket.send("x" * (17 * 1024 * 1024))

    assert (await line.closed())[0] == 1009


async def test_nothing_may_follow_the_end_of_a_text(shared: tuple[str, Record, FakeStreamGuard]) -> None:
    release = threading.Event()

    class Slow(FakeStreamGuard):
        async def trouble(self) -> None:
            await asyncio.to_thread(release.wait, PATIENCE_S)

    with a_server(guard=Slow()) as url:
        async with connected(url) as line:
            await line.open()
            await line.send("text", text="some bread ")
            await line.send("finish")
            await line.send("text", text="bomb")
            await line.send("open", 2)
            frames = [await line.next(), await line.next()]
            release.set()

    assert sorted((frame["type"], frame.get("code")) for frame in frames) == [("error", "finished"), ("opened", None)]


async def test_more_streams_than_allowed_are_refused_until_one_ends() -> None:
    limits = LiveLimits(streams=2, all_streams=3)
    with a_server(live=limits) as url:
        async with connected(url) as line, connected(url) as other:
            await line.open(1)
            await line.open(2)
            await line.send("open", 3)
            assert (await line.next())["code"] == "too_many_streams"
            await other.open(1)
            await other.send("open", 2)
            assert (await other.next())["code"] == "too_many_streams"
            await line.say(["bread"], 1)
            await other.open(3)


async def test_the_characters_of_all_streams_together_are_limited() -> None:
    release = threading.Event()

    class Slow(FakeStreamGuard):
        async def trouble(self) -> None:
            await asyncio.to_thread(release.wait, PATIENCE_S)

    limits = LiveLimits(stream_characters=100, connection_characters=150, text_characters=220)
    with a_server(guard=Slow(), live=limits) as url:
        async with connected(url) as line:
            for stream in (1, 2):
                await line.open(stream)
            await line.send("text", 1, text="a " * 50)
            await line.send("text", 2, text="a " * 26)
            error = await line.next()
            release.set()
            step = await line.next()
            await line.send("text", 1, text="a " * 50)
            again = await line.next()
            await line.send("text", 1, text="a " * 50)
            long = await line.next()

    assert (error["stream"], error["code"]) == (2, "window_exceeded")
    assert (step["taken"], again["taken"]) == (100, 200)
    assert long["code"] == "text_too_long"


async def test_the_text_that_is_held_for_all_open_streams_is_limited() -> None:
    with a_server(live=LiveLimits(open_characters=100)) as url:
        async with connected(url) as line:
            await line.open(1, turns=[{"role": "user", "content": "x" * 60}])
            await line.send("open", 2, turns=[{"role": "user", "content": "x" * 60}])
            refused = await line.next()
            await line.open(3, reasoning="x" * 20)
            await line.send("text", 3, text="bread and " * 3)
            error = await line.next()
            await line.send("close", 1)
            await line.next()
            await line.open(4, turns=[{"role": "user", "content": "x" * 60}])

    assert (refused["stream"], refused["code"]) == (2, "too_much_text")
    assert (error["stream"], error["code"]) == (3, "too_much_text")


async def test_what_a_key_stands_for_is_in_the_scope_of_every_stream(record: Record) -> None:
    app = create_app(guard=FakeStreamGuard(), policy=make_policy(), keep=record)

    async def keyed(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            scope["state"].update(tenant="acme", region="DE")
        await app(scope, receive, send)

    with serving(keyed) as url:
        async with connected(url) as line:
            await line.open(scope={"region": "US", "language": "en"})
            last = await line.say(["bread"])

    assert last["decision"]["scope"] == {"tenant": "acme", "region": "DE", "route": "/v1/live", "language": "en"}


async def test_a_stream_of_which_nothing_is_heard_is_ended(record: Record) -> None:
    with a_server(record, live=LiveLimits(idle_s=0.05)) as url:
        async with connected(url) as line:
            await line.open()
            await line.send("text", text="some bread and ")
            frames = await line.rest()

    assert (frames[-1]["type"], frames[-1]["code"]) == ("error", "idle")
    assert frames[-1]["decision"]["action"] == "allow"
    assert record.actions == ["allow"]


async def test_a_decision_that_cannot_be_kept_is_an_error_and_no_end() -> None:
    record = Record()
    record.broken = True
    with a_server(record) as url:
        async with connected(url) as line:
            await line.open()
            last = await line.say(["bread"])

    assert (last["type"], last["code"], last["decision"]) == ("error", "store_error", None)


STREAMS = st.integers(1, 3)
FRAMES_OF_ANY_KIND = st.lists(
    st.one_of(
        st.fixed_dictionaries({"type": st.just("open"), "stream": STREAMS, "observe": st.booleans()}),
        st.fixed_dictionaries(
            {"type": st.just("text"), "stream": STREAMS, "text": st.sampled_from(["bread and ", "bomb ", "", "crash "])}
        ),
        st.fixed_dictionaries({"type": st.sampled_from(["finish", "close"]), "stream": STREAMS}),
        st.fixed_dictionaries({"type": st.just("text"), "stream": STREAMS, "text": st.integers()}),
        st.fixed_dictionaries({"type": st.just("ids"), "stream": STREAMS, "ids": st.lists(st.integers(), max_size=2)}),
    ),
    max_size=14,
)


@given(FRAMES_OF_ANY_KIND, st.booleans())
@settings(max_examples=40)
async def test_whatever_a_client_sends_each_stream_ends_once_and_every_decision_is_kept(
    shared: tuple[str, Record, FakeStreamGuard], frames: list[dict[str, Any]], waits: bool
) -> None:
    url, record, guard = shared
    await until(lambda: guard.open_sessions == 0, "what was before")
    record.kept.clear()
    async with connected(url) as line:
        for frame in frames:
            await line.socket.send(json.dumps(frame))
        told: list[dict[str, Any]] = []
        if waits:
            await line.send("text", 99, text="a last word")
            while not told or told[-1]["stream"] != 99:
                told.append(await line.next())
    await until(lambda: guard.open_sessions == 0, "the sessions to be closed")

    assert not [frame for frame in told if frame.get("code") == "internal_error"]
    for stream in (1, 2, 3):
        own = [frame for frame in told if frame["stream"] == stream]
        kinds = [frame["type"] for frame in own]
        assert kinds.count("opened") <= 1
        assert kinds.count("end") <= 1
        if "end" in kinds:
            assert set(kinds[kinds.index("end") + 1 :]) <= {"error"}
        counts = [(frame["taken"], frame["judged"], frame["released"]) for frame in own if "taken" in frame]
        assert counts == sorted(counts)
        assert all(released <= judged <= taken or frame_failed(own) for taken, judged, released in counts)
    decided = [frame for frame in told if frame.get("decision") is not None]
    await until(lambda: len(record.kept) >= len(decided), "the decisions to be kept")
    assert len({frame["decision"]["id"] for frame in decided}) == len(decided)


def frame_failed(frames: list[dict[str, Any]]) -> bool:
    return any(frame.get("failure") for frame in frames)


# --- who may connect ----------------------------------------------------------------------------------------------


async def test_a_client_without_the_subprotocol_is_refused(shared: tuple[str, Record, FakeStreamGuard]) -> None:
    address = shared[0].replace("http", "ws", 1) + "/v1/live"
    with pytest.raises(InvalidStatus) as raised:
        await connect(address, subprotocols=[Subprotocol("tidegate.live.v9")])

    assert raised.value.response.status_code == 400
    assert PROTOCOL in raised.value.response.body.decode()


async def test_a_refused_connection_is_no_fault_of_the_server(caplog: pytest.LogCaptureFixture) -> None:
    """A stranger cannot fill the log with errors."""
    log = logging.getLogger("uvicorn.error")
    with serving(create_app(guard=FakeStreamGuard(), policy=make_policy()), log_level="warning") as url:
        log.addHandler(caplog.handler)  # the server's own configuration takes away what was there before
        for options in ({"subprotocols": [Subprotocol("none.v1")]}, {"origin": "https://evil.example"}):
            with pytest.raises(InvalidStatus):
                await connect(url.replace("http", "ws", 1) + "/v1/live", **options)
    log.removeHandler(caplog.handler)

    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []


async def test_a_page_of_another_site_is_refused(shared: tuple[str, Record, FakeStreamGuard]) -> None:
    for origin in ("https://evil.example", "null", "http://[", "http://[::1]]"):
        with pytest.raises(InvalidStatus) as raised:
            async with connected(shared[0], origin=origin):
                pass
        assert raised.value.response.status_code == 403

    async with connected(shared[0], origin=shared[0]) as line:
        assert line.hello["type"] == "hello"


async def test_more_connections_than_allowed_are_refused_until_one_ends() -> None:
    with a_server(live=LiveLimits(connections=1)) as url:
        async with connected(url):
            with pytest.raises(InvalidStatus) as raised:
                async with connected(url):
                    pass
            assert raised.value.response.status_code == 503

        async def free() -> bool:
            try:
                async with connected(url):
                    return True
            except InvalidStatus:
                return False

        while not await free():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


# --- the end ------------------------------------------------------------------------------------------------------


async def test_a_stream_that_is_closed_is_decided_by_what_was_judged(line: Line, record: Record) -> None:
    await line.open()
    await line.send("text", text="some bread and")
    await line.next()
    await line.send("close")
    last = await line.next()

    assert (last["type"], last["reason"], last["judged"]) == ("end", "closed", 10)
    assert last["decision"]["coverage"][-1] == {
        "path": "answer", "channel": "answer", "state": "not_judged", "characters": 4
    }  # fmt: skip
    assert record.actions == ["allow"]


async def test_a_stream_of_which_nothing_was_judged_has_no_decision_when_it_is_closed(
    line: Line, record: Record
) -> None:
    await line.open()
    await line.send("close")

    assert (await line.next())["decision"] is None
    assert record.kept == []


FRAMES: list[Callable[[Line], Any]] = [
    lambda line: line.open(turns=BREAD),
    lambda line: line.send("text", text="some bread and "),
    lambda line: line.next(),
    lambda line: line.send("text", text="more of it "),
    lambda line: line.send("finish"),
    lambda line: line.next(),
    lambda line: line.next(),
]


@pytest.mark.parametrize("steps", range(len(FRAMES) + 1))
@pytest.mark.parametrize("politely", [True, False], ids=["politely", "abruptly"])
async def test_a_client_that_hangs_up_leaves_nothing_behind_but_the_decision(steps: int, politely: bool) -> None:
    record, guard = Record(), FakeStreamGuard()
    with a_server(record, guard=guard) as url:
        async with connected(url) as line:
            for step in FRAMES[:steps]:
                await step(line)
            if not politely:
                line.socket.transport.abort()
        await until(lambda: guard.open_sessions == 0, "the session to be closed")
        if steps >= 3:
            await until(lambda: record.actions == ["allow"], "the decision to be kept")
    assert len(record.kept) <= 1
    assert guard.open_sessions == 0


async def test_a_client_that_hangs_up_while_the_guard_judges_frees_it_at_once(record: Record) -> None:
    begun, ended = threading.Event(), threading.Event()

    class Slow(FakeStreamGuard):
        async def trouble(self) -> None:
            begun.set()
            try:
                await asyncio.sleep(PATIENCE_S * 10)
            finally:
                ended.set()

    with a_server(guard=Slow(), guard_timeout_s=None) as url:
        async with connected(url) as line:
            await line.open()
            await line.send("text", text="some bread ")
            await asyncio.to_thread(begun.wait, PATIENCE_S)
        assert await asyncio.to_thread(ended.wait, PATIENCE_S)


async def test_a_client_that_does_not_read_its_verdicts_is_given_up() -> None:
    """What it is told fills the buffers between, and then its time is over."""
    record, guard = Record(), FakeStreamGuard()
    pieces = 12
    limits = LiveLimits(stream_characters=10**7, connection_characters=10**7)
    with a_server(record, guard=guard, client_timeout_s=0.2, live=limits) as url, socket.socket() as narrow:
        narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        narrow.connect(("127.0.0.1", int(url.rpartition(":")[2])))
        narrow.setblocking(False)
        async with connected(url, sock=narrow, max_queue=1, compression=None) as line:
            await line.open()
            for _ in range(pieces):
                await line.send("text", text="a b c d " * 1000)
            await until(lambda: record.kept, "the client to be given up")
            async with httpx.AsyncClient() as client:
                metrics = (await client.get(f"{url}/metrics")).text
            line.socket.transport.abort()
        assert guard.open_sessions == 0

    assert "tidegate_stalled_clients_total 1.0" in metrics
    assert record.kept[0][0].coverage[0].characters < pieces * 8000


class Stopping:
    """A server that is told to stop in the middle of a test."""

    def __init__(self, app: Any) -> None:
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=20, ws=DrainingWebSockets)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, args=([self.listener],), daemon=True)

    def __enter__(self) -> Stopping:
        self.thread.start()
        wait_until(lambda: self.server.started, "the server to start")
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self.thread.join(PATIENCE_S)
        self.listener.close()
        assert not self.thread.is_alive()

    def stop(self) -> None:
        self.server.should_exit = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.listener.getsockname()[1]}"


async def test_a_server_that_stops_lets_streams_end_opens_none_and_says_goodbye(record: Record) -> None:
    app = create_app(guard=FakeStreamGuard(), policy=make_policy(), keep=record)
    with Stopping(app) as server:
        async with connected(server.url) as line, connected(server.url) as idle:
            await line.open(1)
            await line.send("text", 1, text="some bread and ")
            await line.next()
            server.stop()
            assert await line.next() == {"type": "going_away", "seconds": 25.0}
            assert await idle.closed() == (1001, [{"type": "going_away", "seconds": 25.0}])
            await line.send("open", 2)
            refused = await line.next()
            last = await line.say(["more of it"], 1)
            assert (await line.closed()) == (1001, [])

    assert refused["code"] == "going_away"
    assert last["reason"] == "finished"
    assert record.actions == ["allow"]


async def test_a_server_that_stops_ends_streams_that_take_too_long_and_keeps_their_decisions(record: Record) -> None:
    app = create_app(guard=FakeStreamGuard(), policy=make_policy(), keep=record, live=LiveLimits(drain_s=0.05))
    with Stopping(app) as server:
        async with connected(server.url) as line:
            await line.open()
            await line.send("text", text="some bread and ")
            await line.next()
            server.stop()
            code, frames = await line.closed()

    assert code == 1001
    assert [frame["type"] for frame in frames] == ["going_away", "end"]
    assert (frames[-1]["reason"], frames[-1]["decision"]["action"]) == ("going_away", "allow")
    assert record.actions == ["allow"]


# --- ids ----------------------------------------------------------------------------------------------------------


async def test_ids_are_judged_as_the_text_that_they_are() -> None:
    record = Record()
    with a_server(record, guard=IdGuard()) as url:
        async with connected(url) as line:
            assert line.hello["takes_ids"] is True
            await line.open(1, turns=BREAD)
            for piece in cut(NASTY, [3, 9, 30]):
                await line.send("ids", 1, ids=[ord(letter) for letter in piece])
            last = (await line.rest(1))[-1]
            await line.open(2)
            await line.send("ids", 2, ids=[32, 1000])
            wrong = await line.next()
            await line.open(3)
            await line.send("ids", 3, ids=[32])
            await line.send("text", 3, text="bread")
            mixed = (await line.rest(3))[-1]

    assert (last["reason"], last["released"]) == ("blocked", NASTY.index(" bomb"))
    assert record.kept[0][1].turns[-1].content.startswith("Bring some bread and then a bomb bomb")
    assert (wrong["code"], wrong["param"]) == ("invalid_frame", "ids[1]")
    assert mixed["code"] == "mixed"


async def test_a_guard_that_cannot_read_ids_now_is_a_failure_and_lets_nothing_leave() -> None:
    class Down(IdGuard):
        async def id_text(self) -> IdGuard:
            raise GuardUnavailable("it is not there")

    with a_server(guard=Down()) as url:
        async with connected(url) as line:
            await line.open()
            await line.send("ids", ids=[32, 33])
            last = (await line.rest())[-1]

    assert (last["reason"], last["released"], last["failure"]["kind"]) == ("blocked", 0, "GuardUnavailable")
