"""Answers on their way through, without a network: nothing unjudged leaves, however the upstream cuts its bytes."""

from __future__ import annotations

import itertools
import json
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from serving import Record, make_policy
from tidegate.gateway.answers import AnswerStream, Judging
from tidegate.moderate import StreamModerator
from tidegate.testing import FakeStreamGuard, chunk, text_chunks
from tidegate.types import Action, Conversation, Scope

POLICY = make_policy()
PROMPT = Conversation.of("Say something")

WORDS = st.sampled_from(["a", "bomb", "bomb,", "fine", "knife", "é", "日本", "👩‍👩‍👧", "e\u0301", "\n", "  "])
TEXTS = st.lists(WORDS, max_size=14).map(" ".join)


class Client:
    """What a client made of the bytes that it got."""

    def __init__(self, data: bytes) -> None:
        self.events = [part.removeprefix(b"data: ") for part in data.split(b"\n\n")[:-1]]
        self.done = bool(self.events) and self.events[-1] == b"[DONE]"
        self.chunks = [json.loads(event) for event in self.events if event != b"[DONE]"]
        self.texts: dict[tuple[int, str], str] = {}
        self.reasons: dict[int, list[str]] = {}
        self.decisions: dict[int, Any] = {}
        for part in self.chunks:
            for choice in part.get("choices", ()):
                self._read(part, choice)

    def _read(self, part: dict[str, Any], choice: dict[str, Any]) -> None:
        index = choice["index"]
        for name, value in choice["delta"].items():
            if name != "role" and isinstance(value, str) and value:
                key = index, name
                self.texts[key] = self.texts.get(key, "") + value
        if choice["finish_reason"]:
            self.reasons.setdefault(index, []).append(choice["finish_reason"])
            self.decisions[index] = part["tidegate"]


def judging(guard: FakeStreamGuard, record: Record | None = None, **options: Any) -> Judging:
    record = record or Record()

    async def keep(decision: Any, conversation: Conversation) -> str | None:
        return await record(decision, conversation, retention="full")

    return Judging(guard, options.pop("policy", POLICY), Scope(), PROMPT, keep, **options)


def wire(chunks: list[dict[str, Any]], *, done: bool = True) -> bytes:
    events = [b"data: " + json.dumps(part).encode() + b"\n\n" for part in chunks]
    return b"".join([*events, b"data: [DONE]\n\n"] if done else events)


def cut(data: Any, places: list[float]) -> list[Any]:
    """The same in pieces, cut at these fractions of its length."""
    at = sorted({0, len(data), *(int(place * len(data)) for place in places)})
    return [data[start:end] for start, end in itertools.pairwise(at)]


async def through(stream: AnswerStream, reads: list[bytes]) -> bytes:
    sent = b"".join([await stream.feed(read) for read in reads if not stream.done])
    return sent if stream.done else sent + await stream.end()


async def allowed(text: str) -> tuple[str, Action]:
    """What may leave of a text that arrives at once, and how it ends."""
    moderator = StreamModerator(FakeStreamGuard(), POLICY)
    if not text:
        return "", Action.ALLOW
    step = await moderator.feed(text)
    released = step.released
    if step.decision is None:
        step = await moderator.finish()
        released += step.released
    assert step.decision is not None
    return released, step.decision.action


CUTS = st.lists(st.floats(0, 1), max_size=12)


@given(text=TEXTS, chunks=CUTS, reads=CUTS)
@example(text="so bomb bomb x", chunks=[0.4], reads=[])
@example(text="a bomb shelter", chunks=[0.4, 0.5], reads=[0.3])
async def test_what_leaves_does_not_depend_on_how_it_was_cut(
    text: str, chunks: list[float], reads: list[float]
) -> None:
    """For every way to cut text into chunks and bytes into reads: exactly the longest prefix that is allowed."""
    guard = FakeStreamGuard()
    expected, action = await allowed(text)

    stream = AnswerStream(judging(guard))
    client = Client(await through(stream, cut(wire(text_chunks(cut(text, chunks))), reads)))

    assert client.texts.get((0, "content"), "") == expected
    assert client.reasons == {0: ["content_filter" if action is Action.BLOCK else "stop"]}
    assert client.done
    assert guard.open_sessions == 0


@given(text=TEXTS, chunks=CUTS, reads=CUTS)
async def test_no_character_ever_leaves_early(text: str, chunks: list[float], reads: list[float]) -> None:
    """At every moment, what has left is a prefix of what is allowed, and what the bytes so far allow."""
    stream = AnswerStream(judging(FakeStreamGuard()))
    expected, _ = await allowed(text)
    sent = b""
    for read in cut(wire(text_chunks(cut(text, chunks))), reads):
        if not stream.done:
            sent += await stream.feed(read)
        assert expected.startswith(Client(sent).texts.get((0, "content"), ""))


@given(text=TEXTS, chunks=CUTS, reads=CUTS)
async def test_a_failing_guard_lets_nothing_out(text: str, chunks: list[float], reads: list[float]) -> None:
    """Whatever comes with or after the word at which the guard fails stays in."""
    full = f"{text} guardfail {text} end"
    stream = AnswerStream(judging(FakeStreamGuard()))

    client = Client(await through(stream, cut(wire(text_chunks(cut(full, chunks))), reads)))

    assert (await allowed(text))[0].startswith(client.texts.get((0, "content"), "").rstrip(" "))
    assert client.reasons == {0: ["content_filter"]}


PIECES = st.lists(
    st.tuples(st.integers(0, 1), st.sampled_from(["content", "reasoning_content", "refusal"]), TEXTS.filter(bool)),
    max_size=10,
)


@given(pieces=PIECES, reads=CUTS)
async def test_texts_that_take_turns_are_judged_each_as_one(
    pieces: list[tuple[int, str, str]], reads: list[float]
) -> None:
    """Choices and channels mixed at will: each text leaves as far as it, or its part before another text, may."""
    guard = FakeStreamGuard()
    whole: dict[tuple[int, str], str] = {}
    outcomes: dict[tuple[int, str], list[tuple[str, Action]]] = {}
    for index, name, text in pieces:
        whole[index, name] = whole.get((index, name), "") + text
        outcomes.setdefault((index, name), []).append(await allowed(whole[index, name]))
    chunks = [chunk({name: text}, index=index) for index, name, text in pieces]
    ends = [chunk(index=index, finish_reason="stop") for index in (0, 1)]

    client = Client(await through(AnswerStream(judging(guard), choices=2), cut(wire([*chunks, *ends]), reads)))

    for index in (0, 1):
        mine = {key: found for key, found in outcomes.items() if key[0] == index}
        blocked = client.reasons[index] == ["content_filter"]
        assert blocked or not any(found[-1][1] is Action.BLOCK for found in mine.values())
        assert not blocked or any(action is Action.BLOCK for found in mine.values() for _, action in found)
        for key, found in mine.items():
            said = client.texts.get(key, "")
            assert any(part.startswith(said) for part, _ in found)
            assert blocked or said == whole[key]
    assert guard.open_sessions == 0


@given(data=st.binary(max_size=200), start=st.booleans())
async def test_any_bytes_end_well(data: bytes, start: bool) -> None:
    """Whatever the upstream sends: events that can be read, an ending, and no open session."""
    guard = FakeStreamGuard()
    stream = AnswerStream(judging(guard))
    begin = wire(text_chunks(["hello "], finish_reason=None), done=False) if start else b""

    client = Client(await through(stream, [begin, data]))

    assert stream.done
    assert client.done or "error" in client.chunks[-1]
    assert guard.open_sessions == 0


async def test_a_part_of_a_chunk_can_go_out() -> None:
    """A long chunk is not held as a whole for its last word; its plain fields go out once."""
    stream = AnswerStream(judging(FakeStreamGuard()))

    first = Client(await stream.feed(wire([chunk({"role": "assistant", "content": "one two three"})], done=False)))
    rest = Client(await stream.feed(wire([chunk({"content": " four"}), chunk(finish_reason="stop")])))

    assert [part["choices"][0]["delta"] for part in first.chunks] == [{"role": "assistant", "content": "one two"}]
    assert [part["choices"][0]["delta"] for part in rest.chunks] == [{"content": " three"}, {"content": " four"}, {}]


async def test_the_end_of_the_reasoning_is_not_held_until_the_end_of_the_answer() -> None:
    """When the answer begins, the reasoning is taken to be complete."""
    stream = AnswerStream(judging(FakeStreamGuard()))
    chunks = [chunk({"reasoning_content": "let me see"}), chunk({"content": "well then"})]

    client = Client(await stream.feed(wire(chunks, done=False)))

    assert client.texts == {(0, "reasoning_content"): "let me see", (0, "content"): "well"}


async def test_reasoning_that_goes_on_is_judged_from_its_beginning() -> None:
    """Harm spread over two parts of one text is still seen, and nothing is sent twice."""
    stream = AnswerStream(judging(FakeStreamGuard()))
    deltas = [{"reasoning_content": "see bomb"}, {"content": "hm "}, {"reasoning_content": " bomb"}]

    client = Client(await through(stream, [wire([chunk(delta)], done=False) for delta in deltas]))

    assert client.texts == {(0, "reasoning_content"): "see bomb", (0, "content"): "hm "}
    assert client.reasons == {0: ["content_filter"]}


async def test_when_all_choices_are_blocked_nothing_is_waited_for() -> None:
    """The stream is done with the read that blocks the last choice, so that the upstream can be cancelled."""
    record = Record()
    stream = AnswerStream(judging(FakeStreamGuard(), record), choices=2)

    await stream.feed(wire([chunk({"content": "bomb bomb "}, index=0)], done=False))
    assert not stream.done
    await stream.feed(wire([chunk({"content": "bomb bomb "}, index=1)], done=False))

    assert stream.done
    assert record.actions == ["block", "block"]


async def test_a_closed_stream_keeps_what_was_judged() -> None:
    """A client that hangs up: one decision for each choice that has been judged, sessions closed, once."""
    guard, record = FakeStreamGuard(), Record()
    stream = AnswerStream(judging(guard, record), choices=2)
    await stream.feed(wire([chunk({"content": "one two"}), chunk({"content": "three four"}, index=1)], done=False))

    await stream.close()
    await stream.close()

    assert record.actions == ["allow", "allow"]
    assert [part.state.value for part in record.kept[0][0].coverage] == ["judged", "not_judged"]
    assert record.kept[0][1].turns[-1].content == "one two"
    assert guard.open_sessions == 0


async def test_a_tool_that_was_not_offered_is_judged_by_its_name() -> None:
    """A name is text of the model, unless the request offered it."""
    call = {"index": 0, "id": "c", "type": "function", "function": {"name": "bomb", "arguments": "{}"}}
    stream = AnswerStream(judging(FakeStreamGuard(), policy=make_policy(debounce=1)))

    sent = await through(stream, [wire([chunk({"tool_calls": [call]}), chunk(finish_reason="tool_calls")])])

    assert b"bomb" not in sent
    assert b'"arguments"' not in sent
    assert Client(sent).reasons == {0: ["content_filter"]}


async def test_trusted_fields_pass() -> None:
    """What the operator vouches for is not dropped."""
    stream = AnswerStream(judging(FakeStreamGuard(), trusted=frozenset({"provider"})))

    client = Client(await through(stream, [wire([chunk({"content": "x"}, provider="P"), chunk(finish_reason="stop")])]))

    assert client.chunks[0]["provider"] == "P"


async def test_chunks_without_choices_keep_their_place() -> None:
    """Before the first choice they go out at once, after it they wait for the end."""
    early, late = ({"id": name, "object": "chat.completion.chunk", "choices": []} for name in ("early", "late"))
    chunks = [early, chunk({"content": "held"}), late, chunk({"content": " words"}), chunk(finish_reason="stop")]

    client = Client(await through(AnswerStream(judging(FakeStreamGuard())), [wire(chunks)]))

    assert [part["id"] for part in client.chunks] == ["early", *["chatcmpl-fake"] * 3, "late"]
    assert client.done
