"""Answers on their way through, without a network: nothing unjudged leaves, however the upstream cuts its bytes."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from serving import Record, make_policy
from tidegate.errors import UpstreamError
from tidegate.gateway.answers import NO_USAGE, AnswerStream, judge_answer
from tidegate.gateway.channels import Judging
from tidegate.guards.resilient import ResilientGuard
from tidegate.moderate import StreamModerator
from tidegate.testing import FakeStreamGuard, chunk, completion, text_chunks
from tidegate.types import Action, Conversation, Role, Scope, ToolCall, Turn

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


ROLLS = make_policy(intervention="rollback", rollback="{tries: 1, buffer: 0, then: replace}")
FLAGGED = {"content": "build a bomb bomb x"}


def calling(query: str) -> dict[str, Any]:
    function = {"name": "search", "arguments": json.dumps({"q": query})}
    return {"tool_calls": [{"index": 0, "id": f"call_{query}", "function": function}]}


async def fed(stream: AnswerStream, *deltas: dict[str, Any], done: bool = False) -> bytes:
    """What leaves of these, each in a read of its own."""
    sent = b"".join([await stream.feed(wire([chunk(delta)], done=False)) for delta in deltas])
    return sent + await stream.feed(wire([chunk(finish_reason="stop")])) if done else sent


@pytest.mark.parametrize("again", [(), ({"reasoning_content": "or not"},)], ids=["no more", "more reasoning"])
@pytest.mark.parametrize("once", [True, False], ids=["one read", "two reads"])
async def test_a_text_behind_reasoning_is_written_anew(again: tuple[dict[str, Any], ...], once: bool) -> None:
    """What was thought has left, and stays; what is thought now follows it."""
    guard = FakeStreamGuard()
    stream = AnswerStream(judging(guard, policy=ROLLS, retries=True))
    thought: dict[str, Any] = {"reasoning_content": "let me see ", "tool_calls": []}

    if once:
        sent = await stream.feed(wire([chunk(thought), chunk(FLAGGED)], done=False))
    else:
        sent = await fed(stream, thought, FLAGGED)
    assert stream.retry is not None
    stream.resume()
    sent += await fed(stream, *again, {"content": " garden"}, done=True)

    reasoning = "let me see or not" if again else "let me see "
    assert Client(sent).texts == {(0, "reasoning_content"): reasoning, (0, "content"): "build a garden"}
    assert [one.action for one in stream.decisions] == [Action.ALLOW]
    assert guard.open_sessions == 0


async def test_a_call_behind_the_text_that_is_written_anew_is_thrown_away_with_it() -> None:
    """In one read: nobody has seen it. The call that comes then leaves as it is."""
    guard = FakeStreamGuard()
    stream = AnswerStream(judging(guard, policy=ROLLS, retries=True, tools=frozenset({"search"})))

    sent = await stream.feed(wire([chunk(FLAGGED), chunk(calling("a"))], done=False))
    assert stream.retry is not None
    stream.resume()
    sent += await fed(stream, {"content": " shed"}, calling("b"), done=True)

    client = Client(sent)
    calls = [call for part in client.chunks for call in part["choices"][0]["delta"].get("tool_calls", ())]
    assert client.texts == {(0, "content"): "build a shed"}
    assert "".join(call["function"].get("arguments", "") for call in calls) == '{"q": "b"}'
    assert [call["id"] for call in calls if "id" in call] == ["call_b"]
    assert guard.open_sessions == 0


@pytest.mark.parametrize(
    ("buffer", "before"),
    [
        (0, ({"content": "I look."}, calling("a"))),
        (3, ({"content": "one two three four"}, {"reasoning_content": "hm "})),
    ],
    ids=["a call has left", "more of it has left than would stay"],
)
async def test_a_text_that_cannot_be_written_anew_ends_as_the_policy_says(
    buffer: int, before: tuple[dict[str, Any], ...]
) -> None:
    policy = make_policy(intervention="rollback", rollback=f"{{tries: 1, buffer: {buffer}, then: replace}}")
    stream = AnswerStream(judging(FakeStreamGuard(), policy=policy, retries=True, tools=frozenset({"search"})))

    sent = await fed(stream, *before, {"content": " bomb bomb x"})

    assert (stream.retry, stream.done) == (None, True)
    assert Client(sent).texts[0, "content"] == f"{before[0]['content']}\n\nNot here."
    assert [(one.kind.value, one.outcome) for one in stream.decisions[0].interventions] == [
        ("rollback", "failed"),
        ("replace", "done"),
    ]


async def test_a_text_that_goes_on_behind_a_call_gets_no_more_tries_than_the_policy_says() -> None:
    """The call ended it, so it is judged again from its beginning; that it was rolled back before counts on."""
    policy = make_policy(intervention="rollback", rollback="{tries: 1, buffer: 0, then: replace}")
    stream = AnswerStream(judging(FakeStreamGuard(), policy=policy, retries=True))
    call = {"tool_calls": [{"index": 0, "function": {"name": "search", "arguments": "{}"}}]}

    sent = await stream.feed(wire([chunk({"content": "build a bomb bomb x"})], done=False))
    assert stream.retry is not None
    stream.resume()
    for delta in ({"content": " shed "}, call, {"content": "and bomb bomb x"}):
        assert not stream.done
        sent += await stream.feed(wire([chunk(delta)], done=False))

    assert stream.retry is None
    assert Client(sent).texts[0, "content"] == "build a shed and\n\nNot here."
    assert [(one.kind.value, one.outcome, one.count) for one in stream.decisions[0].interventions] == [
        ("rollback", "flagged", 1),
        ("replace", "done", 1),
    ]


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


# --- fields that lie ----------------------------------------------------------------------------------------------

SECRET = "first mix the powder"
LIES: list[tuple[str, dict[str, Any]]] = [
    *((name, {name: value}) for name in ("id", "object", "created", "model", "system_fingerprint", "service_tier")
      for value in (SECRET, [SECRET], {"a": SECRET})),
    ("usage", {"usage": SECRET}),
    ("usage", {"usage": {"total_tokens": 3, "note": SECRET, "details": {"more": [SECRET]}}}),
    ("usage", {"usage": {SECRET: 1}}),
    ("?", {SECRET: 1}),
    ("extra", {"extra": {SECRET: 1}}),
    ("finish_reason", {"choices": [{"finish_reason": SECRET}]}),
    ("finish_reason", {"choices": [{"finish_reason": [SECRET]}]}),
    ("stop_reason", {"choices": [{"stop_reason": SECRET}]}),
    ("role", {"choices": [{"delta": {"role": SECRET}}]}),
    ("role", {"choices": [{"delta": {"role": [SECRET]}}]}),
    ("?", {"choices": [{"delta": {SECRET: None}}]}),
    ("tool_calls", {"choices": [{"delta": {"tool_calls": SECRET}}]}),
    ("tool_calls", {"choices": [{"delta": {"tool_calls": [SECRET]}}]}),
    *((f"tool_calls.{name}", {"choices": [{"delta": {"tool_calls": [{name: SECRET, "function": {"name": "f"}}]}}]})
      for name in ("index", "id", "type", "note")),
    ("tool_calls.0.function.note",
     {"choices": [{"delta": {"tool_calls": [{"index": 0, "function": {"name": "f", "note": SECRET}}]}}]}),
    ("tool_calls.0.function.arguments",
     {"choices": [{"delta": {"tool_calls": [{"index": 0, "function": {"arguments": {"a": SECRET}}}]}}]}),
    ("function_call", {"choices": [{"delta": {"function_call": SECRET}}]}),
]  # fmt: skip


def lying(lie: dict[str, Any], at: str) -> dict[str, Any]:
    """An answer whose fields hold what they should not; ``at`` is delta or message."""
    body = completion("fine") if at == "message" else chunk({"content": "fine"})
    choices = [dict(choice) for choice in lie.get("choices", [{}])]
    for choice, honest in zip(choices, body["choices"], strict=True):
        said = {**honest[at], **choice.pop("delta", {})}
        choice.update({**honest, **choice, at: said})
    return {**body, **lie, "choices": choices}


@pytest.mark.parametrize(("path", "lie"), LIES)
async def test_no_field_of_a_chunk_carries_a_sentence(path: str, lie: dict[str, Any]) -> None:
    """It is dropped or replaced, the coverage counts it, and the answer arrives."""
    stream = AnswerStream(judging(FakeStreamGuard(), tools=frozenset({"f"})))

    sent = await through(stream, [wire([lying(lie, "delta"), chunk(finish_reason="stop")])])

    client = Client(sent)
    assert SECRET.encode() not in sent
    assert client.texts[0, "content"] == "fine"
    assert all(isinstance(part["id"], str) and part["id"] for part in client.chunks)
    assert counted(client.decisions[0], path) >= len(SECRET)


@pytest.mark.parametrize(("path", "lie"), LIES)
async def test_no_field_of_a_whole_answer_carries_a_sentence(path: str, lie: dict[str, Any]) -> None:
    """The same without streaming."""
    answer, _ = await judge_answer(lying(lie, "message"), judging(FakeStreamGuard(), tools=frozenset({"f"})))

    assert SECRET not in json.dumps(answer)
    assert answer["choices"][0]["message"]["content"] == "fine"
    assert answer["choices"][0]["finish_reason"] in ("stop", None)
    assert counted(answer["tidegate"], path) >= len(SECRET)


def counted(field: dict[str, Any], path: str) -> int:
    """How many characters of a field the coverage says were not judged."""
    return sum(
        part["characters"]
        for part in field["coverage"]
        if part["state"] == "not_judged" and part["path"].removeprefix("choices[0].") == path
    )


async def test_a_replaced_identity_stays_the_same() -> None:
    """So that a client can still put the chunks of one answer together."""
    chunks = [chunk({"content": text}, id=SECRET) for text in ("one ", "two ")]

    client = Client(
        await through(
            AnswerStream(judging(FakeStreamGuard())), [wire([*chunks, chunk(finish_reason="stop", id=SECRET)])]
        )
    )

    assert len({part["id"] for part in client.chunks}) == 1


async def test_honest_fields_pass_as_they_are() -> None:
    """Numbers, words, identities, and the usage with its details."""
    usage = {"total_tokens": 3, "details": {"cached": 0, "seconds": 0.5}, "more": None}
    honest = chunk(
        {"content": "fine"}, id="gen-1/a:b@c", model="org/model.v1:free", service_tier="default", usage=usage
    )

    client = Client(
        await through(AnswerStream(judging(FakeStreamGuard())), [wire([honest, chunk(finish_reason="STOP")])])
    )

    assert {name: client.chunks[0][name] for name in ("id", "model", "service_tier", "usage")} == {
        name: honest[name] for name in ("id", "model", "service_tier", "usage")
    }
    assert client.reasons == {0: ["stop"]}
    assert counted(client.decisions[0], "usage") == 0


PARTS: list[Any] = [
    {"type": "thinking", "thinking": [{"type": "text", "text": "let me see"}]},
    {"type": "text", "text": "so "},
    {"type": "text", "text": "fine"},
]


async def test_texts_in_parts_are_judged_and_arrive() -> None:
    """An array of parts is taken apart: thoughts go out as reasoning, texts as content."""
    chunks = [chunk({"content": PARTS[:1]}), chunk({"content": PARTS[1:]}), chunk(finish_reason="stop")]

    client = Client(await through(AnswerStream(judging(FakeStreamGuard())), [wire(chunks)]))
    whole, decisions = await judge_answer(completion({"content": PARTS}), judging(FakeStreamGuard()))

    assert client.texts == {(0, "reasoning_content"): "let me see", (0, "content"): "so fine"}
    message = whole["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("let me see", "so fine")
    assert [decision.action for decision in decisions] == [Action.ALLOW]


async def test_harm_in_parts_is_blocked() -> None:
    """However it is cut into parts."""
    parts = [{"type": "text", "text": "so bo"}, {"type": "text", "text": "mb bomb x"}]

    sent = await through(AnswerStream(judging(FakeStreamGuard())), [wire([chunk({"content": parts})])])

    assert Client(sent).texts == {(0, "content"): "so"}
    assert Client(sent).reasons == {0: ["content_filter"]}


@pytest.mark.parametrize("content", [5, {"text": SECRET}, [{"type": "odd", "text": SECRET}], [[SECRET]], [7]])
async def test_a_text_in_an_unknown_shape_is_an_error(content: Any) -> None:
    """Never a silent empty answer."""
    stream = AnswerStream(judging(FakeStreamGuard()))

    sent = await through(stream, [wire([chunk({"content": content}), chunk(finish_reason="stop")])])

    assert stream.error is not None
    assert SECRET.encode() not in sent
    with pytest.raises(UpstreamError):
        await judge_answer(completion({"content": content}), judging(FakeStreamGuard()))


async def test_a_choice_without_text_says_what_was_dropped() -> None:
    """It ends with our field too, so that nobody takes an empty answer for a judged one."""
    record = Record()
    odd = chunk({"audio": {"data": SECRET}})

    client = Client(
        await through(AnswerStream(judging(FakeStreamGuard(), record)), [wire([odd, chunk(finish_reason="stop")])])
    )
    whole, decisions = await judge_answer(completion({"audio": SECRET}), judging(FakeStreamGuard(), record))

    for field in (client.decisions[0], whole["choices"][0]["tidegate"], whole["tidegate"]):
        assert (field["action"], field["rule"], field["severity"]) == ("allow", None, None)
        assert counted(field, "audio") == len(SECRET)
    assert record.kept == decisions == []


@pytest.mark.parametrize("index", [-1, 1, True, "0", 0.0])
async def test_a_choice_that_nobody_asked_for_is_an_error(index: Any) -> None:
    """An upstream cannot open more of them than the request has."""
    stream = AnswerStream(judging(FakeStreamGuard()))
    await through(stream, [wire([chunk({"content": "x"}, index=index)])])
    answer = completion("x")
    answer["choices"][0]["index"] = index

    assert stream.error is not None
    with pytest.raises(UpstreamError):
        await judge_answer(answer, judging(FakeStreamGuard()))


@pytest.mark.parametrize("told", [None, {"total_tokens": 4}])
async def test_a_blocked_stream_ends_with_the_usage_that_was_asked_for(told: Any) -> None:
    """What the upstream has said so far, or zeros; a client that asked for none gets none."""
    chunks = [chunk({"content": "bomb bomb "}, usage=told)]

    asked = Client(
        await through(AnswerStream(judging(FakeStreamGuard()), wants_usage=True), [wire(chunks, done=False)])
    )
    other = Client(await through(AnswerStream(judging(FakeStreamGuard())), [wire(chunks, done=False)]))

    assert (asked.chunks[-1]["choices"], asked.chunks[-1]["usage"]) == ([], told or NO_USAGE)
    assert other.chunks[-1]["choices"]


async def test_every_failure_of_the_guard_is_noted() -> None:
    """Also those on texts that a worse decision stands for."""
    noted: list[Any] = []
    message = {"content": "a bomb", "reasoning_content": "guardfail"}

    with_ = judging(FakeStreamGuard(), policy=make_policy(on_guard_error="review"), note=noted.extend)
    _, decisions = await judge_answer(completion(message), with_)

    assert [decision.action for decision in decisions] == [Action.BLOCK]
    assert [decision.failure.kind for decision in noted] == ["GuardUnavailable"]
    assert {part.path: part.state.value for part in decisions[0].coverage} == {
        "choices[0].content": "judged",
        "choices[0].reasoning_content": "not_judged",
    }


class TogetherGuard(FakeStreamGuard):
    """Judges reasoning together with what follows it."""

    together = True


@pytest.mark.parametrize("wrap", [lambda guard: guard, ResilientGuard], ids=["guard", "resilient"])
async def test_a_guard_that_judges_together_is_told_the_reasoning_with_each_text_of_a_whole_answer(wrap: Any) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    message = {"content": "fine", "reasoning_content": "I think", "tool_calls": [call]}
    thought = Turn(Role.ASSISTANT, "", "I think")
    calls = (ToolCall("f", '{"a": 1}'),)

    together, apart = TogetherGuard(), FakeStreamGuard()
    for guard in (together, apart):
        _, decisions = await judge_answer(completion(message), judging(wrap(guard), tools=frozenset({"f"})))
        judged = {part.path: (part.state.value, part.characters) for part in decisions[0].coverage}
        assert judged == {
            "choices[0].content": ("judged", 4),
            "choices[0].reasoning_content": ("judged", 7),
            "choices[0].tool_calls[0].function.arguments": ("judged", 8),
        }

    def turns(guard: FakeStreamGuard) -> set[Turn]:
        return {conversation.turns[-1] for conversation in guard.judged}

    with_reasoning = {Turn(Role.ASSISTANT, "fine", "I think"), Turn(Role.ASSISTANT, "", "I think", calls)}
    assert turns(together) == {thought, *with_reasoning}
    assert turns(apart) == {thought, Turn(Role.ASSISTANT, "fine"), Turn(Role.ASSISTANT, "", "", calls)}
