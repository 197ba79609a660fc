"""LiteLLM's guardrail before a real Tidegate: decisions, and chunks that leave when their text is judged.

No LiteLLM is needed: the chunks are plain objects of its shape.
"""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving import Record, make_policy, serving, wait_until
from tidegate.errors import InputError
from tidegate.gateway.app import create_app
from tidegate.guards.live_wire import BrokenOff
from tidegate.integrations.litellm_requests import Turn, one_turn
from tidegate.integrations.litellm_server import TidegateServer, Unanswered, blocks
from tidegate.integrations.litellm_streams import HeldChunks
from tidegate.testing import FakeStreamGuard

TURNS = [one_turn("user", "hello")]


class Server:
    """A Tidegate with a guard that judges by words."""

    def __init__(self, guard: FakeStreamGuard, record: Record, url: str) -> None:
        self.guard, self.record, self.url = guard, record, url


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    guard, record = FakeStreamGuard(sticky=True), Record()
    with serving(create_app(guard=guard, policy=make_policy(), keep=record)) as url:
        yield Server(guard, record, url)


@contextlib.asynccontextmanager
async def asking(url: str, **options: Any) -> AsyncIterator[TidegateServer]:
    made = TidegateServer(url, patience_s=0.2, **options)
    try:
        yield made
    finally:
        await made.close()


def delta(**fields: Any) -> SimpleNamespace:
    return SimpleNamespace(**fields)


def chunk(*choices: tuple[int, SimpleNamespace, str | None], **more: Any) -> SimpleNamespace:
    made = [SimpleNamespace(index=index, delta=said, finish_reason=reason) for index, said, reason in choices]
    return SimpleNamespace(choices=made, **more)


def texts(pieces: list[str], *, index: int = 0, of: str = "content") -> list[SimpleNamespace]:
    """The chunks of one choice, from its role to its end."""
    said = [chunk((index, delta(**{of: piece}), None)) for piece in pieces]
    return [chunk((index, delta(role="assistant", content=""), None)), *said, chunk((index, delta(), "stop"))]


def call(arguments: str, *, number: int = 0, name: str | None = None) -> SimpleNamespace:
    function = SimpleNamespace(name=name, arguments=arguments)
    return delta(tool_calls=[SimpleNamespace(index=number, function=function)])


def stop(at: Any, index: int, decision: Any) -> SimpleNamespace:
    return chunk((index, delta(), "content_filter"), rule=decision["rule"])


async def passed(
    server: TidegateServer, chunks: list[SimpleNamespace], *, choices: int = 1, turns: list[Turn] = TURNS
) -> list[list[SimpleNamespace]]:
    """What left at each chunk, and at the end."""
    held = HeldChunks(server, turns, stop, choices=choices)
    left = []
    try:
        for one in chunks:
            left.append(await held.feed(one))
            if held.done:
                break
        else:
            left.append(await held.end())
    finally:
        held.close()
    return left


def said(left: list[list[SimpleNamespace]], *, index: int = 0, of: str = "content") -> str:
    found = [one for chunks in left for each in chunks for one in each.choices if one.index == index]
    return "".join(getattr(one.delta, of, None) or "" for one in found)


def reasons(left: list[list[SimpleNamespace]], *, index: int = 0) -> list[str]:
    found = [one for chunks in left for each in chunks for one in each.choices if one.index == index]
    return [one.finish_reason for one in found if one.finish_reason is not None]


# --- conversations ------------------------------------------------------------------------------------------------


async def test_conversations_are_decided_by_the_servers_policy(server: Server) -> None:
    """In their order, for the scope and the subject that are said."""
    server.record.kept.clear()
    async with asking(server.url, scope={"region": "DE", "route": "litellm"}) as made:
        fine, bad = await made.judge([TURNS, [one_turn("user", "a bomb")]], subject="me")

    assert (fine["action"], bad["action"], bad["rule"]) == ("allow", "block", "unsafe")
    assert (blocks(fine), blocks(bad)) == (False, True)
    scopes = [decision.scope for decision, _, _ in server.record.kept]
    assert {(scope.region, scope.route, scope.subject) for scope in scopes} == {("DE", "litellm", "me")}


async def test_nothing_to_judge_asks_nothing() -> None:
    """No server is needed for it."""
    async with asking("http://127.0.0.1:9") as made:
        assert await made.judge([]) == []


async def test_a_server_that_is_not_there_gives_no_decision() -> None:
    """Neither on a conversation nor on a stream."""
    async with asking("http://127.0.0.1:9") as made:
        with pytest.raises(Unanswered):
            await made.judge([TURNS])
        with pytest.raises(Unanswered):
            await made.watch(TURNS, "answer").feed("text")


async def test_a_server_that_is_no_tidegate_gives_no_decision() -> None:
    """Whatever it answers."""

    async def strange(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            for event in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{event}.complete"})
            return
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b'{"results": [{"action": 5}]}'})

    with serving(strange) as url:
        async with asking(url) as made:
            with pytest.raises(Unanswered):
                await made.judge([TURNS])


def test_an_address_that_is_none_is_an_error() -> None:
    """It says what is expected, and quotes nothing."""
    with pytest.raises(InputError, match="expected the address") as caught:
        TidegateServer("http://me:secret@host")
    assert "secret" not in str(caught.value)


async def test_a_failed_guard_is_decided_by_the_policy(server: Server) -> None:
    """It is a decision like others: the server was reached."""
    async with asking(server.url) as made:
        (decision,) = await made.judge([[one_turn("user", "guardfail")]])

    assert decision["action"] == "block"
    assert decision["failure"]["kind"] == "GuardUnavailable"


# --- streams ------------------------------------------------------------------------------------------------------


async def test_safe_chunks_leave_as_they_came(server: Server) -> None:
    """The same objects in the same order, each as soon as its last word is known to be whole."""
    chunks = texts(["Bread ", "needs", " flour", " and water."])
    before = copy.deepcopy(chunks)
    async with asking(server.url) as made:
        left = await passed(made, chunks)

    flat = [one for some in left for one in some]
    assert flat == before
    assert all(one is sent for one, sent in zip(flat, chunks, strict=True))
    assert [len(some) for some in left] == [1, 0, 0, 2, 1, 2, 0], "a word waits for the beginning of the next"


async def test_a_blocked_answer_ends_where_it_turned(server: Server) -> None:
    """The chunk in which that happens leaves up to there; then comes the end, and nothing more is wanted."""
    async with asking(server.url) as made:
        left = await passed(made, texts(["Mix this ", "and a bomb", " bomb", " more"]))

    assert said(left) == "Mix this and a"
    assert reasons(left) == ["content_filter"]
    assert left[-1][-1].rule == "unsafe"
    wait_until(lambda: not server.guard.open_sessions, "the session to be given back")


async def test_other_choices_go_on(server: Server) -> None:
    """A block ends its own choice only, also when chunks hold several choices."""
    both = [
        chunk((0, delta(content=one), None), (1, delta(content=other), None))
        for one, other in (("a ", "the "), ("bomb ", "pie "), ("bomb ", "is "), ("x ", "good"))
    ]
    ends = [chunk((0, delta(), "stop"), (1, delta(), "stop"))]
    async with asking(server.url) as made:
        left = await passed(made, [*both, *ends], choices=2)

    assert (said(left), reasons(left)) == ("a", ["content_filter"])
    assert (said(left, index=1), reasons(left, index=1)) == ("the pie is good", ["stop"])


async def test_reasoning_is_judged_and_is_complete_when_the_answer_begins(server: Server) -> None:
    """It does not wait for the end of the answer, and the guard is told of it."""
    server.guard.opened.clear()
    chunks = [*texts(["They want", " bread"], of="reasoning_content")[:-1], *texts(["Mix", " flour"])]
    async with asking(server.url) as made:
        left = await passed(made, chunks)

    assert said(left, of="reasoning_content") == "They want bread"
    assert said(left) == "Mix flour"
    opened = {one.channel.value: one for one in server.guard.opened}
    assert opened["answer"].reasoning == "They want bread"


async def test_a_text_that_goes_on_is_judged_again(server: Server) -> None:
    """Reasoning between two parts of an answer takes nothing from it, and sends nothing twice."""
    chunks = [chunk((0, delta(content="a "), None)), chunk((0, delta(reasoning_content="hm"), None))]
    chunks += [chunk((0, delta(content="bomb "), None)), chunk((0, delta(content="bomb "), None))]
    async with asking(server.url) as made:
        safe = await passed(made, copy.deepcopy([*chunks[:2], chunk((0, delta(content="pie"), None))]))
        blocked = await passed(made, chunks)

    assert (said(safe), said(safe, of="reasoning_content")) == ("a pie", "hm")
    assert said(blocked) == "a "
    assert reasons(blocked) == ["content_filter"]


async def test_arguments_of_calls_are_judged(server: Server) -> None:
    """Each call by itself, and with its name."""
    server.guard.opened.clear()
    chunks = [
        chunk((0, call("", name="search"), None)),
        chunk((0, call('{"q": "pie"} '), None)),
        chunk((0, call("a bomb ", number=1, name="make"), None)),
        chunk((0, call("bomb "), None)),
        chunk((0, call("bomb ", number=1), None)),
        chunk((0, delta(), "tool_calls")),
    ]
    async with asking(server.url) as made:
        left = await passed(made, chunks)

    assert reasons(left) == ["content_filter"]
    found = [one for some in left for each in some for one in each.choices if hasattr(one.delta, "tool_calls")]
    assert "".join(one.delta.tool_calls[0].function.arguments for one in found) in ('{"q": "pie"} ', '{"q": "pie"} a')
    assert {one.name for one in server.guard.opened} == {"search", "make"}


async def test_the_usage_comes_last(server: Server) -> None:
    """A chunk of no choice leaves when nothing waits before it."""
    usage = SimpleNamespace(choices=[], usage={"total_tokens": 9})
    async with asking(server.url) as made:
        left = await passed(made, [*texts(["one", " two"])[:-1], usage])

    assert [len(one.choices) for some in left for one in some][-1] == 0
    assert said(left) == "one two"


async def test_without_a_server_nothing_leaves_and_what_waits_is_let_go_on_demand() -> None:
    """What that means is for the caller to say."""
    async with asking("http://127.0.0.1:9") as made:
        held = HeldChunks(made, TURNS, stop)
        chunks = texts(["one", " two"])
        assert await held.feed(chunks[0]) == [chunks[0]]
        with pytest.raises(Unanswered):
            await held.feed(chunks[1])

        assert held.let_pass() == [chunks[1]]
        assert await held.feed(chunks[2]) == [chunks[2]]


async def test_a_choice_that_was_blocked_stays_so_when_the_server_is_gone_and_texts_are_let_pass(
    server: Server,
) -> None:
    async with asking(server.url) as made:
        held = HeldChunks(made, TURNS, stop, choices=2)
        left = [await held.feed(chunk((0, delta(content=text), None))) for text in ("a ", "bomb bomb ", "x ")]
        await lose(made)
        with pytest.raises(Unanswered):
            await held.feed(chunk((0, delta(content="kill "), None), (1, delta(content="the "), None)))
        left.append(held.let_pass())
        for one in (
            chunk((0, delta(content="kill"), None), (1, delta(content="pie"), None)),
            chunk((0, delta(), "stop")),
        ):
            left.append(await held.feed(one))

    assert (said(left), reasons(left)) == ("a", ["content_filter"])
    assert said(left, index=1) == "the pie"


async def test_what_was_blocked_is_not_let_pass_when_the_next_text_of_its_chunk_cannot_be_judged(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with asking(server.url) as made:
        held = HeldChunks(made, TURNS, stop)
        watch = made.watch

        def first_only(turns: list[Turn], channel: str, **fields: Any) -> Any:
            if channel == "answer":
                raise Unanswered("gone")
            return watch(turns, channel, **fields)

        monkeypatch.setattr(made, "watch", first_only)
        with pytest.raises(Unanswered):
            await held.feed(chunk((0, delta(reasoning_content="a bomb bomb bomb", content="so"), None)))
        left = [held.let_pass(), await held.feed(chunk((0, delta(content="more"), None)))]

    assert "bomb" not in said(left, of="reasoning_content")
    assert (said(left), reasons(left)) == ("", ["content_filter"])


async def lose(made: TidegateServer) -> None:
    """From now on the server is not to be had."""

    async def gone(fields: Any) -> Any:
        raise BrokenOff

    for connection in made._connections:
        connection.close()
    made.stream = gone  # type: ignore[method-assign]


async def test_a_server_that_comes_back_judges_the_whole_text_again(server: Server) -> None:
    """A connection that broke off loses nothing, and doubles nothing."""
    async with asking(server.url) as made:
        text = made.watch(TURNS, "answer")
        await text.feed("Mix this and ")
        for connection in made._connections:
            connection.close()
        await text.feed("a bomb bomb ")

    assert text.blocked
    assert text.text[: text.released] == "Mix this and a"


@settings(max_examples=25, deadline=None)
@given(
    words=st.lists(st.sampled_from(["pie", "bread", "bomb", "knife"]), min_size=1, max_size=8), seed=st.integers(0, 99)
)
async def test_what_leaves_does_not_depend_on_the_cutting(server: Server, words: list[str], seed: int) -> None:
    """However a text comes in chunks, the same characters leave, for the same reason."""
    whole = " ".join(words)
    rng = random.Random(seed)
    places = sorted(rng.sample(range(1, len(whole)), k=rng.randint(0, min(6, len(whole) - 1))))
    pieces = [whole[start:end] for start, end in zip([0, *places], [*places, len(whole)], strict=True)]
    async with asking(server.url) as made:
        cut, uncut = await passed(made, texts(pieces)), await passed(made, texts([whole]))

    assert (said(cut), reasons(cut)) == (said(uncut), reasons(uncut))
