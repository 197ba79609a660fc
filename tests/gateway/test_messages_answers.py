"""Answers of the Messages API on their way through, without a network: nothing unjudged leaves, in whatever field."""

from __future__ import annotations

import json
from typing import Any

import pytest
from anthropic.lib.streaming._messages import accumulate_event
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway import messages_wire as fake
from gateway.test_answers import CUTS, POLICY, PROMPT, TEXTS, allowed, cut
from serving import Record, make_policy
from tidegate.errors import UpstreamError
from tidegate.gateway.channels import Judging
from tidegate.gateway.messages_answers import MessageStream, error_body, judge_message
from tidegate.gateway.statuses import Problem
from tidegate.testing import FakeStreamGuard
from tidegate.types import Action, Channel, Conversation, Role, Scope, ToolCall, Turn


class Client:
    """What a client made of the bytes that it got; the official client's own code puts the message together."""

    def __init__(self, data: bytes) -> None:
        parts = [part.split(b"\n") for part in data.split(b"\n\n")[:-1]]
        self.events = [json.loads(line.removeprefix(b"data: ")) for _, line in parts]
        assert [name.removeprefix(b"event: ").decode() for name, _ in parts] == [one["type"] for one in self.events]
        self.errors = [one["error"] for one in self.events if one["type"] == "error"]
        self.message: Any = None
        buffers: dict[int, bytes] = {}
        for one in self.events:
            if one["type"] not in ("ping", "error"):
                read: Any = json.loads(json.dumps(one))
                self.message = accumulate_event(event=read, current_snapshot=self.message, json_bufs=buffers)
        self.inputs = {number: buffer.decode() for number, buffer in buffers.items()}
        ends = [one for one in self.events if one["type"] == "message_delta" and "tidegate" in one]
        self.field = ends[-1]["tidegate"] if ends else None
        self.done = bool(self.events) and self.events[-1]["type"] == "message_stop"

    @property
    def content(self) -> list[Any]:
        return [] if self.message is None else self.message.content

    @property
    def reason(self) -> str | None:
        return None if self.message is None else self.message.stop_reason

    def text(self, kind: str = "text") -> str:
        return "".join(getattr(block, kind) for block in self.content if block.type == kind)

    def balanced(self) -> bool:
        """Whether every block that was opened was closed, and said something only while it was open."""
        open_blocks: set[int] = set()
        for one in self.events:
            match one["type"]:
                case "content_block_start":
                    open_blocks.add(one["index"])
                case "content_block_delta":
                    if one["index"] not in open_blocks:
                        return False
                case "content_block_stop":
                    open_blocks.remove(one["index"])
        return not open_blocks


def judging(guard: FakeStreamGuard | None = None, record: Record | None = None, **options: Any) -> Judging:
    record = record or Record()

    async def keep(decision: Any, conversation: Conversation) -> str | None:
        return await record(decision, conversation, retention="full")

    return Judging(guard or FakeStreamGuard(), options.pop("policy", POLICY), Scope(), PROMPT, keep, **options)


async def through(stream: MessageStream, reads: list[bytes]) -> Client:
    sent = b"".join([await stream.feed(read) for read in reads if not stream.done])
    return Client(sent if stream.done else sent + await stream.end())


async def streamed(*events: Any, **options: Any) -> Client:
    """What arrives of these events, sent one by one."""
    stops = options.pop("stops", frozenset())
    return await through(
        MessageStream(judging(**options), stops=stops), [fake.wire([one]) for one in (fake.start(), *events)]
    )


# --- whatever the cuts --------------------------------------------------------------------------------------------


@given(text=TEXTS, chunks=CUTS, reads=CUTS)
@example(text="so bomb bomb x", chunks=[0.4], reads=[])
@example(text="a bomb shelter", chunks=[0.4, 0.5], reads=[0.3])
async def test_what_leaves_does_not_depend_on_how_it_was_cut(
    text: str, chunks: list[float], reads: list[float]
) -> None:
    """For every way to cut text into deltas and bytes into reads: exactly the longest prefix that is allowed."""
    guard = FakeStreamGuard()
    expected, action = await allowed(text)
    events = [fake.start(), *fake.text(0, *cut(text, chunks)), *fake.end()]

    client = await through(MessageStream(judging(guard)), cut(fake.wire(events), reads))

    assert client.text() == expected
    assert client.reason == ("refusal" if action is Action.BLOCK else "end_turn")
    assert client.done
    assert client.balanced()
    assert guard.open_sessions == 0


@given(text=TEXTS, blocks=CUTS, chunks=CUTS, reads=CUTS)
async def test_blocks_that_follow_each_other_are_judged_as_one_text(
    text: str, blocks: list[float], chunks: list[float], reads: list[float]
) -> None:
    """However a text is spread over blocks, as it is around citations: the same leaves."""
    expected, action = await allowed(text)
    events = [fake.start()]
    for number, part in enumerate(cut(text, blocks)):
        events += fake.text(number, *cut(part, chunks))

    client = await through(MessageStream(judging()), cut(fake.wire([*events, *fake.end()]), reads))

    assert client.text() == expected
    assert client.reason == ("refusal" if action is Action.BLOCK else "end_turn")
    assert client.balanced()


@given(text=TEXTS, chunks=CUTS, reads=CUTS)
async def test_no_character_ever_leaves_early(text: str, chunks: list[float], reads: list[float]) -> None:
    """At every moment, what has left is a prefix of what is allowed."""
    stream = MessageStream(judging())
    expected, _ = await allowed(text)
    sent = b""
    for read in cut(fake.wire([fake.start(), *fake.text(0, *cut(text, chunks)), *fake.end()]), reads):
        if not stream.done:
            sent += await stream.feed(read)
        assert expected.startswith(Client(sent).text())


PIECES = st.lists(
    st.tuples(st.sampled_from(["text", "thinking", "tool_use"]), TEXTS.filter(lambda text: bool(text.strip()))),
    max_size=6,
)


@settings(max_examples=50)
@example(pieces=[("thinking", "a bomb"), ("text", "a"), ("thinking", "bomb")], reads=[], more=[])
@given(pieces=PIECES, reads=CUTS, more=CUTS)
async def test_mixed_blocks_end_in_the_same_way_however_they_are_cut(
    pieces: list[tuple[str, str]], reads: list[float], more: list[float]
) -> None:
    """Texts, thinking and calls: the decision is that of any other cut, and so is an answer that is let out to its end.

    Of one that is stopped, a client may have had more by then where the events came one by one: thinking that was over,
    and whose verdict changed when it went on behind a text, had let that text out.
    """
    guard = FakeStreamGuard()
    make = {"text": fake.text, "thinking": fake.thinking, "tool_use": fake.tool_use}
    events = [fake.start()]
    for number, (kind, text) in enumerate(pieces):
        said = json.dumps({"q": text}, ensure_ascii=False) if kind == "tool_use" else text
        events += make[kind](number, *cut(said, more))
    data = fake.wire([*events, *fake.end()])
    each = [fake.wire([one]) for one in (*events, *fake.end())]

    clients = [
        await through(MessageStream(judging(guard, tools=frozenset({"search"}))), reading)
        for reading in (cut(data, reads), [data], each)
    ]

    assert len({client.reason for client in clients}) == 1
    if clients[0].reason == "end_turn":
        assert len({str((client.content, client.inputs)) for client in clients}) == 1
    assert len({str(client.field["action"]) for client in clients}) == 1
    assert all(client.balanced() and client.done for client in clients)
    assert guard.open_sessions == 0
    for kind in ("text", "thinking"):
        whole = "".join(text for of, text in pieces if of == kind)
        assert all(whole.startswith(client.text(kind)) for client in clients)
    if clients[0].reason == "end_turn":
        assert clients[0].text() == "".join(text for of, text in pieces if of == "text")


@given(data=st.binary(max_size=200), start=st.booleans())
async def test_any_bytes_end_well(data: bytes, start: bool) -> None:
    """Whatever the upstream sends: events that can be read, an ending, and no open session."""
    guard = FakeStreamGuard()
    stream = MessageStream(judging(guard))
    begin = fake.wire([fake.start(), *fake.text(0, "hello ")[:-1]]) if start else b""

    client = await through(stream, [begin, data])

    assert stream.done
    assert client.done or client.errors
    assert guard.open_sessions == 0


@given(text=TEXTS, chunks=CUTS)
async def test_a_failing_guard_lets_nothing_out(text: str, chunks: list[float]) -> None:
    """Whatever comes with or after the word at which the guard fails stays in."""
    full = f"{text} guardfail {text} end"

    client = await streamed(*fake.text(0, *cut(full, chunks)), *fake.end())

    assert (await allowed(text))[0].startswith(client.text().rstrip(" "))
    assert client.reason == "refusal"


# --- one by one ---------------------------------------------------------------------------------------------------


async def test_a_safe_message_arrives_as_it_was_sent() -> None:
    """Every event in its order, with every field, the signature unchanged."""
    events = [
        fake.start(),
        *fake.thinking(0, "let me", " see", signature="RXJy/+Zz=="),
        *fake.text(1, "one ", "two"),
        *fake.tool_use(2, '{"query": ', '"pie"}'),
        *fake.end("tool_use"),
    ]
    stream = MessageStream(judging(tools=frozenset({"search"})))

    client = await through(stream, [fake.wire(events)])

    assert client.message.content[0].signature == "RXJy/+Zz=="
    assert client.text("thinking") == "let me see"
    assert client.text() == "one two"
    assert client.message.content[2].input == {"query": "pie"}
    assert client.message.content[2].id == "toolu_1"
    assert client.message.usage.input_tokens == 3
    assert client.message.usage.output_tokens == 9
    assert client.reason == "tool_use"
    field = client.events[-2].pop("tidegate")
    assert client.events == [{**one, "message": {**one["message"], "content": []}} if "message" in one else one
                             for one in events]  # fmt: skip
    assert stream.complete
    assert field["action"] == "allow"
    assert [(part["path"], part["channel"], part["characters"]) for part in field["coverage"]] == [
        ("content[0].thinking", "reasoning", 10),
        ("content[1].text", "answer", 7),
        ("content[2].input", "tool_call", 16),
    ]


async def test_what_a_guard_is_told() -> None:
    """Of each text what it is, what was thought before it, and which tool is called."""
    guard, record = FakeStreamGuard(), Record()

    await streamed(
        *fake.thinking(0, "hm hm"),
        *fake.text(1, "I look."),
        *fake.tool_use(2, "{}"),
        *fake.end(),
        guard=guard,
        record=record,
        tools=frozenset({"search"}),
    )

    assert [(one.channel, one.reasoning, one.name) for one in guard.opened] == [
        (Channel.REASONING, "", ""),
        (Channel.ANSWER, "hm hm", ""),
        (Channel.TOOL_CALL, "hm hm", "search"),
    ]
    ((_, conversation, _),) = record.kept
    assert conversation.turns[-1] == Turn(Role.ASSISTANT, "I look.", "hm hm", (ToolCall("search", "{}"),))


async def test_a_block_of_a_message_ends_it_well() -> None:
    """The open block is closed, the stop_reason is Anthropic's own word, and nothing of the harm is there."""
    record = Record()
    stream = MessageStream(judging(record=record))
    events = [fake.start(), *fake.text(0, "take a bomb", " bomb and")[:-1]]

    client = Client(await stream.feed(fake.wire(events)))

    assert stream.done
    assert not stream.complete
    assert [one["type"] for one in client.events[-3:]] == ["content_block_stop", "message_delta", "message_stop"]
    end = client.events[-2]
    assert end["delta"]["stop_reason"] == "refusal"
    assert end["delta"]["stop_details"] == {"type": "refusal", "category": None, "explanation": "Not here."}
    assert end["usage"] == {"output_tokens": 1}
    assert end["tidegate"]["where"] == {"path": "content[0].text", "start": 6, "end": 16}
    assert client.text() == "take a"
    assert record.actions == ["block"]


async def test_a_blocked_message_says_in_which_block_its_harm_stands() -> None:
    """In its own characters; harm that is spread over blocks names the first and the last."""
    one = await streamed(*fake.text(0, "fine "), *fake.text(1, "a bomb bomb "), *fake.end())
    two = await streamed(*fake.text(0, "fine bomb"), *fake.text(1, " bomb "), *fake.end())

    assert one.field["where"] == {"path": "content[1].text", "start": 1, "end": 11}
    assert two.field["where"] == {"path": "content[0]-content[1].text", "start": 4, "end": 14}
    assert two.text() == "fine"


async def test_harm_around_another_block_is_seen() -> None:
    """A text that goes on after a call is judged from its beginning, and nothing is sent twice."""
    client = await streamed(
        *fake.text(0, "see bomb"),
        *fake.tool_use(1, "{}"),
        *fake.text(2, "bomb", " x"),
        *fake.end(),
        tools=frozenset({"search"}),
    )

    assert client.text() == "see bomb"
    assert client.reason == "refusal"
    assert client.balanced()


async def test_words_on_both_sides_of_another_block_are_not_run_together() -> None:
    """A line break that only the guard sees stands between them."""
    record = Record()
    client = await streamed(
        *fake.text(0, "one"),
        *fake.tool_use(1, "{}"),
        *fake.text(2, "two"),
        *fake.end(),
        tools=frozenset({"search"}),
        record=record,
    )

    assert [block.text for block in client.content if block.type == "text"] == ["one", "two"]
    assert record.kept[0][1].turns[-1].content == "one\ntwo"
    assert [(part["path"], part["characters"]) for part in client.field["coverage"] if "text" in part["path"]] == [
        ("content[0].text", 3),
        ("content[2].text", 3),
    ]


async def test_the_end_of_the_thinking_is_not_held_until_the_end_of_the_answer() -> None:
    """When the text begins, the thinking is taken to be complete, and its signature and stop follow it."""
    stream = MessageStream(judging())

    events = [fake.start(), *fake.thinking(0, "let me see"), *fake.text(1, "well then")[:-1]]
    client = Client(await stream.feed(fake.wire(events)))

    assert client.text("thinking") == "let me see"
    assert client.content[0].signature == "c2lnbmVk"
    assert client.text() == "well"
    assert stream.held == len(" then")


async def test_pings_pass_while_text_is_held() -> None:
    """They say that the answer is alive."""
    stream = MessageStream(judging())
    await stream.feed(fake.wire([fake.start(), *fake.text(0, "bomb")[:-1]]))

    sent = await stream.feed(fake.wire([{"type": "ping", "note": "first mix"}]))

    assert sent == b'event: ping\ndata: {"type":"ping"}\n\n'


async def test_thinking_is_cut_before_its_signature() -> None:
    """A signature never signs less than what the upstream signed."""
    client = await streamed(*fake.thinking(0, "so ", "bomb ", "bomb "), *fake.text(1, "hi"), *fake.end())

    assert client.text("thinking") == "so"
    assert not client.content[0].signature
    assert client.reason == "refusal"
    assert client.field["where"]["path"] == "content[0].thinking"


async def test_a_call_that_is_cut_is_no_json() -> None:
    """So that nobody can run it."""
    client = await streamed(*fake.tool_use(0, '{"q": "', "bomb bomb", '"}'), *fake.end(), tools=frozenset({"search"}))

    assert client.inputs[0] == '{"q": "'[: len(client.inputs[0])]
    assert client.reason == "refusal"


async def test_letters_of_a_call_are_judged_as_the_program_will_read_them() -> None:
    """An escape hides nothing; what leaves is the same JSON."""
    tools = frozenset({"search"})

    safe = await streamed(*fake.tool_use(0, r'{"q": "caf\u0', r'0e9 \ud83d\ude00"}'), *fake.end(), tools=tools)
    bad = await streamed(*fake.tool_use(0, r'{"q": "\u0062omb b\u006', r'fmb x"}'), *fake.end(), tools=tools)
    broken = await streamed(*fake.tool_use(0, '{"q": "x', "\\u00"), *fake.end(), tools=tools)

    assert safe.inputs[0] == '{"q": "café 😀"}'
    assert bad.reason == "refusal"
    assert broken.inputs[0] == '{"q": "x\\u00'


async def test_a_tool_that_was_not_offered_is_judged_by_its_name() -> None:
    """Before the block of its call begins; names of a server's own tools need no offer."""
    policy = make_policy(debounce=1)

    client = await streamed(*fake.tool_use(0, "{}", name="bomb"), *fake.end(), policy=policy)
    other = await streamed(*fake.tool_use(0, "{}", name="bake"), *fake.end(), policy=policy)
    own = await streamed(*fake.tool_use(0, "{}", name="web_search", kind="server_tool_use"), *fake.end())

    assert client.content == []
    assert client.reason == "refusal"
    assert client.field["where"]["path"] == "content[0].name"
    assert [block.name for block in other.content] == ["bake"]
    assert [part["path"] for part in own.field["coverage"]] == ["content[0].input"]


async def test_citations_are_judged_whole() -> None:
    """One that is blocked does not leave, nor what comes behind it; one that is not keeps its place."""

    def citing(cited: str) -> list[Any]:
        citation = {"type": "char_location", "cited_text": cited, "document_index": 0, "document_title": "t"}
        return fake.block(
            0,
            {"type": "text", "text": "", "citations": []},
            {"type": "text_delta", "text": "as they say"},
            {"type": "citations_delta", "citation": citation},
            {"type": "text_delta", "text": " there"},
        )

    good, bad = [await streamed(*citing(text), *fake.end()) for text in ("so it is", "bomb bomb")]

    assert good.content[0].citations[0].cited_text == "so it is"
    assert good.text() == "as they say there"
    assert bad.text() in ("as they", "as they say")
    assert not bad.content[0].citations
    assert bad.field["where"]["path"] == "content[0].citations[0]"


def found(text: str, **more: Any) -> dict[str, Any]:
    page = {"type": "web_search_result", "title": text, "url": "https://a.b", "encrypted_content": "RW5jcnlwdGVk"}
    return {"type": "web_search_tool_result", "tool_use_id": "srvtoolu_1", "content": [page], **more}


async def test_what_a_tool_of_the_server_found_is_judged_before_it_leaves() -> None:
    """Its strings as one text; its encrypted content passes, and is counted as not judged."""
    good = await streamed(*fake.block(0, found("apple pie")), *fake.end())
    bad = await streamed(*fake.block(0, found("bomb bomb")), *fake.text(1, "x"), *fake.end())

    assert good.content[0].content[0].title == "apple pie"
    assert good.content[0].content[0].encrypted_content == "RW5jcnlwdGVk"
    assert [(part["path"], part["state"], part["characters"]) for part in good.field["coverage"]] == [
        ("content[0].content", "judged", len("apple pie\nhttps://a.b")),
        ("content[0].content[0].encrypted_content", "not_judged", 12),
    ]
    assert bad.content == []
    assert bad.reason == "refusal"


async def test_redacted_thinking_passes_and_is_counted() -> None:
    """Only the upstream can read it."""
    client = await streamed(*fake.block(0, {"type": "redacted_thinking", "data": "RW5j"}), *fake.text(1, "x"),
                            *fake.end())  # fmt: skip

    assert client.content[0].data == "RW5j"
    assert ("content[0].data", "not_judged", 4) in [
        (part["path"], part["state"], part["characters"]) for part in client.field["coverage"]
    ]


async def test_an_unknown_block_leaves_no_gap() -> None:
    """It does not pass, the coverage counts its text, and the blocks behind it move up."""
    strange = [
        {"type": "content_block_start", "index": 0, "content_block": {"type": "novel", "text": "first mix"}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "novel_delta", "more": "the powder"}},
        {"type": "content_block_stop", "index": 0},
    ]

    client = await streamed(*strange, *fake.text(1, "hello"), {"type": "gossip", "said": "then light"}, *fake.end())

    assert [block.text for block in client.content] == ["hello"]
    assert {part["path"]: part["characters"] for part in client.field["coverage"]} == {
        "content[0].text": 5,
        "content[0].novel": len("novel" + "first mix"),
        "delta": len("novel_delta" + "the powder"),
        "gossip": len("then light"),
    }


async def test_text_in_a_block_s_beginning_is_judged_too() -> None:
    """Some servers put it there, and the input of a call as well."""
    tools = frozenset({"search"})
    begun = fake.block(0, {"type": "text", "text": "bomb bomb x"})
    call = fake.block(0, {"type": "tool_use", "id": "t", "name": "search", "input": {"q": "bomb bomb x"}})
    safe = fake.block(0, {"type": "tool_use", "id": "t", "name": "search", "input": {"q": "pie"}})

    assert (await streamed(*begun, *fake.end())).text() == ""
    assert (await streamed(*call, *fake.end(), tools=tools)).content == []
    assert (await streamed(*safe, *fake.end(), tools=tools)).content[0].input == {"q": "pie"}


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("overloaded_error", "overloaded_error"),
        ("rate_limit_error", "rate_limit_error"),
        ("api_error", "api_error"),
        ("first mix the powder", "api_error"),
    ],
)
async def test_an_error_of_the_upstream_is_told_in_its_shape(kind: str, told: str) -> None:
    """What was judged before arrives, and nothing of what the upstream says."""
    error = {"type": "error", "error": {"type": kind, "message": "first mix the powder"}}

    client = await streamed(*fake.text(0, "hello there")[:-1], error)

    assert client.text() == "hello there"
    assert [one["type"] for one in client.errors] == [told]
    assert "powder" not in str(client.events)


@pytest.mark.parametrize(
    "events",
    [
        fake.text(0, "x"),
        [fake.start(), fake.start()],
        [fake.start(), fake.text(0, "x")[1]],
        [fake.start(), *fake.text(0, "x"), fake.text(0, "x")[1]],
        [fake.start(), *fake.text(0, "x"), *fake.text(0, "x")],
        [fake.start(), fake.text(0)[0], {"type": "content_block_delta", "index": 0, "delta": "x"}],
        [fake.start(), *fake.block(0, {"type": "text", "text": ["x"]})],
        [fake.start(), *fake.block(0, {"type": "text", "text": ""}, {"type": "text_delta", "text": {"a": "x"}})],
        [fake.start(), {"type": "content_block_start", "index": -1, "content_block": {"type": "text", "text": ""}}],
        [fake.start(), *fake.block(0, {"type": "text", "text": "", "citations": "x"})],
        [fake.start(), *fake.text(0, "x")],
    ],
)
async def test_an_upstream_that_does_not_keep_to_the_protocol_is_an_error(events: Any) -> None:
    """Told at the end of what was judged."""
    stream = MessageStream(judging())

    client = await through(stream, [fake.wire([one]) for one in events])

    assert stream.error is not None
    assert [one["type"] for one in client.errors] == ["api_error"]


async def test_a_message_that_ends_without_a_stop_event_is_complete() -> None:
    """It said why it stopped; and one that does not say why is decided too."""
    early = await streamed(*fake.text(0, "hello"), fake.end()[0])
    late = await streamed(*fake.text(0, "hello"), fake.end()[1])

    assert early.done
    assert early.reason == "end_turn"
    assert late.done
    assert late.reason is None
    assert late.field["action"] == "allow"


async def test_a_closed_stream_keeps_what_was_judged() -> None:
    """A client that hangs up: one decision, sessions closed, once."""
    guard, record = FakeStreamGuard(), Record()
    stream = MessageStream(judging(guard, record))
    await stream.feed(fake.wire([fake.start(), *fake.text(0, "one two")[:-1]]))

    await stream.close()
    await stream.close()

    assert record.actions == ["allow"]
    assert [part.state.value for part in record.kept[0][0].coverage] == ["judged", "not_judged"]
    assert guard.open_sessions == 0


async def test_trusted_fields_pass() -> None:
    """What the operator vouches for is not dropped."""
    client = await streamed(*fake.text(0, "x"), *fake.end(provider="P"), trusted=frozenset({"provider"}))

    assert client.events[-2]["provider"] == "P"


# --- what the policy says of text that nobody can judge -----------------------------------------------------------

STRANGE: list[Any] = [
    *fake.block(0, {"type": "novel", "text": "so it is"}, {"type": "novel_delta", "more": "and so"}),
    {"type": "gossip", "said": "then light"},
    *fake.text(1, "hello"),
    *fake.end(),
]
REDACTED: dict[str, Any] = {"type": "redacted_thinking", "data": "RW5j"}


async def test_a_policy_can_let_out_what_nobody_knows() -> None:
    """It passes as it is, and the coverage counts it; an upstream's ``tidegate`` never does."""
    policy = make_policy(unjudged_answer="pass")
    whole, _ = await judge_message(
        fake.message({"type": "novel", "text": "so"}, "hello", note="x", tidegate="y"), judging(policy=policy)
    )
    strange = [*STRANGE[:-2], {**STRANGE[-2], "tidegate": "y"}, {"type": "a\n\ndata: b"}, STRANGE[-1]]

    client = await streamed(*strange, policy=policy)

    assert whole["content"][0] == {"type": "novel", "text": "so"}
    assert whole["note"] == "x"
    assert whole["tidegate"]["action"] == "allow"
    del client.events[-2]["tidegate"]
    assert client.events == [fake.start(), *STRANGE]


async def test_an_answer_that_is_refused_for_its_last_event_ends_once() -> None:
    """However much of it comes at once."""
    policy = make_policy(unjudged_answer="refuse")
    events = [fake.start(), *fake.text(0, "hello"), *fake.end(note="so it is")]

    for reads in ([fake.wire(events)], [fake.wire([one]) for one in events]):
        client = await through(MessageStream(judging(policy=policy)), reads)
        assert [one["type"] for one in client.events].count("message_delta") == 1
        assert client.reason == "refusal"
        assert client.field["rule"] == "unjudged_answer"
        assert client.text() == "hello"


async def test_a_verdict_says_more_than_that_something_could_not_be_judged() -> None:
    """Where both stop an answer, the verdict is told."""
    policy = make_policy(unjudged_answer="refuse")
    events = [fake.start(), *fake.text(0, "a bomb bomb "), *fake.block(1, REDACTED), *fake.end()]

    client = await through(MessageStream(judging(policy=policy)), [fake.wire(events)])
    whole, _ = await judge_message(fake.message("a bomb", REDACTED), judging(policy=policy))

    assert client.field["rule"] == whole["tidegate"]["rule"] == "unsafe"


async def test_a_policy_can_take_no_answer_with_what_nobody_can_judge() -> None:
    """It ends as a block does, also for encrypted data; else that passes."""
    policy, record = make_policy(unjudged_answer="refuse"), Record()

    for strange in (STRANGE, [*fake.text(0, "hi"), *fake.block(1, REDACTED), *fake.end()]):
        client = await streamed(*strange, policy=policy, record=record)
        assert client.reason == "refusal"
        assert client.field["rule"] == "unjudged_answer"
        assert client.field["where"] is None
        assert client.balanced()
        assert "RW5j" not in str(client.events)
    for strange in ({"type": "novel", "text": "so"}, REDACTED):
        whole, _ = await judge_message(fake.message("hi", strange), judging(policy=policy, record=record))
        assert whole["stop_reason"] == "refusal"
        assert [block["text"] for block in whole["content"]] == ["Not here."]
    assert record.actions == ["block"] * 4


# --- fields that lie ----------------------------------------------------------------------------------------------

SECRET = "first mix the powder"
TEXT = {"type": "text", "text": "fine"}
CALL = {"type": "tool_use", "id": "toolu_1", "name": "search", "input": {}}
MESSAGE_LIES: list[dict[str, Any]] = [
    *({name: SECRET} for name in ("id", "model", "type", "role", "stop_reason", "stop_sequence", "note", "usage")),
    *({name: [SECRET]} for name in ("id", "model", "stop_reason", "stop_details", "container", "usage")),
    {"usage": {"output_tokens": 1, "service_tier": SECRET, "deep": [{"note": SECRET}], SECRET: 2}},
    {"container": {"id": SECRET, "skills": [{"skill_id": SECRET}]}},
    {"context_management": {"applied_edits": [{"type": SECRET}]}},
    {"stop_details": {"type": SECRET, "category": SECRET}},
    {SECRET: 1},
    {"tokens": [1, 2, 3]},
]
BLOCK_LIES: list[dict[str, Any]] = [
    {**TEXT, "note": SECRET},
    {**TEXT, SECRET: 1},
    {**TEXT, "tokens": [1, 2, 3]},
    {**CALL, "id": SECRET},
    {**CALL, "id": [SECRET]},
    {**CALL, "caller": {"type": SECRET}},
    {**CALL, "toolset_name": SECRET},
    {"type": "thinking", "thinking": "", "signature": SECRET},
    {"type": "thinking", "thinking": "", "signature": [SECRET]},
    {"type": "redacted_thinking", "data": SECRET},
    {"type": "redacted_thinking", "data": [SECRET]},
    {"type": "container_upload", "file_id": SECRET},
    {"type": "bash_code_execution_tool_result", "tool_use_id": SECRET, "content": None},
    {"type": "bash_code_execution_tool_result", "tool_use_id": "t", "content": {SECRET: 1}},
    {"type": SECRET},
    {"type": f"{SECRET}_tool_result", "content": None},
    {"type": "compaction", "content": SECRET},
]


@pytest.mark.parametrize("lie", MESSAGE_LIES)
async def test_no_field_of_a_message_carries_a_sentence(lie: dict[str, Any]) -> None:
    """Whole or streaming: it is dropped or replaced, the coverage counts it, and the answer arrives."""
    whole, _ = await judge_message(fake.message("fine", **lie), judging())
    begun = await streamed_start(lie)
    ended = await streamed(*fake.text(0, "fine"), *lying_end(lie))

    assert SECRET not in json.dumps(whole)
    assert "tokens" not in whole
    assert whole["content"][0]["text"] == "fine"
    for client in (begun, ended):
        assert SECRET not in json.dumps(client.events)
        assert client.text() == "fine"
        assert client.done
    if SECRET in str(lie) and "type" not in lie and "role" not in lie:
        assert sum(part["characters"] for part in whole["tidegate"]["coverage"] if part["state"] == "not_judged") > 0


async def streamed_start(lie: dict[str, Any]) -> Client:
    events = [fake.start(**lie), *fake.text(0, "fine"), *fake.end()]
    return await through(MessageStream(judging()), [fake.wire(events)])


def lying_end(lie: dict[str, Any]) -> list[dict[str, Any]]:
    end, stop = fake.end()
    delta = {name: value for name, value in lie.items() if name not in ("usage", "type")}
    usage = lie.get("usage", end["usage"])
    return [{**end, "delta": {**end["delta"], **delta}, "usage": usage, "note": SECRET}, {**stop, "note": SECRET}]


@pytest.mark.parametrize("lie", BLOCK_LIES)
async def test_no_field_of_a_block_carries_a_sentence(lie: dict[str, Any]) -> None:
    """Whole or streaming: it is dropped or replaced, and the text around it arrives."""
    tools = frozenset({"search"})
    whole, _ = await judge_message(fake.message("so ", lie, "it is"), judging(tools=tools))
    client = await streamed(*fake.text(0, "so "), *fake.block(1, lie), *fake.text(2, "it is"), *fake.end(), tools=tools)

    for answer in (whole, client.events):
        assert SECRET not in json.dumps(answer)
        assert '"tokens": [' not in json.dumps(answer)
    texts = [block["text"] for block in whole["content"] if block["type"] == "text"]
    assert "".join(texts).replace("fine", "") == "so it is"
    assert client.text().replace("fine", "") == "so it is"


DELTA_LIES = [
    {"type": "text_delta", "text": "fine", "note": SECRET},
    {"type": "text_delta", "text": "fine", SECRET: 1},
    {"type": "signature_delta", "signature": SECRET},
    {"type": "thinking_delta", "thinking": SECRET},
    {"type": "input_json_delta", "partial_json": SECRET},
    {"type": "novel_delta", "text": SECRET},
    {"type": SECRET},
]


@pytest.mark.parametrize("lie", DELTA_LIES)
async def test_no_field_of_a_delta_carries_a_sentence(lie: dict[str, Any]) -> None:
    """What does not belong into a text block is dropped, and counted."""
    client = await streamed(*fake.block(0, {"type": "text", "text": ""}, lie), *fake.text(1, "x"), *fake.end())

    assert SECRET not in json.dumps(client.events)
    assert client.text().endswith("x")
    assert sum(part["characters"] for part in client.field["coverage"] if part["state"] == "not_judged") > 0


async def test_a_stop_sequence_of_the_request_is_told() -> None:
    """Only one that the client itself gave can be."""
    end = fake.end("stop_sequence")
    end[0]["delta"]["stop_sequence"] = "THE END"

    client = await streamed(*fake.text(0, "x"), *end, stops=frozenset({"THE END"}))
    whole, _ = await judge_message(
        fake.message("x", stop_reason="stop_sequence", stop_sequence="THE END"), judging(), stops=frozenset({"THE END"})
    )

    assert client.message.stop_sequence == whole["stop_sequence"] == "THE END"


@pytest.mark.parametrize(("said", "passes"), [("it was rude", True), ("bomb bomb", False)])
async def test_the_upstream_s_own_explanation_of_a_refusal_is_judged(said: str, passes: bool) -> None:
    """It may say what it refuses."""
    details = {"type": "refusal", "category": "cyber", "explanation": said}
    end = fake.end("refusal")
    end[0]["delta"]["stop_details"] = details

    client = await streamed(*fake.text(0, "no"), *end)
    whole, _ = await judge_message(fake.message("no", stop_reason="refusal", stop_details=details), judging())

    for told in (client.events[-2]["delta"]["stop_details"], whole["stop_details"]):
        assert (told == details) == passes
    assert client.field["action"] == ("allow" if passes else "block")


# --- whole messages -----------------------------------------------------------------------------------------------


async def test_a_whole_message_arrives_as_it_was_sent() -> None:
    """With every block and number in it."""
    blocks = [
        {"type": "thinking", "thinking": "hm", "signature": "c2ln"},
        {"type": "text", "text": "one", "citations": None},
        {"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {"query": "pie"}},
        found("apple pie"),
        {"type": "text", "text": "two"},
        {"type": "tool_use", "id": "toolu_1", "name": "search", "input": {"é": [1, None, "x"]}},
    ]
    usage = {"input_tokens": 3, "output_tokens": 5, "service_tier": "standard", "server_tool_use": {"n": 1}}
    sent = fake.message(*blocks, stop_reason="tool_use", usage=usage, container={"id": "c", "expires_at": "2026-01-01"})
    record = Record()

    passed, decision = await judge_message(
        json.loads(json.dumps(sent)), judging(record=record, tools=frozenset({"search"}))
    )

    assert passed.pop("tidegate")["action"] == "allow"
    assert passed == sent
    assert decision is not None
    turn = record.kept[0][1].turns[-1]
    assert turn.content == "one\ntwo\napple pie\nhttps://a.b"
    assert turn.reasoning == "hm"
    assert [call.arguments for call in turn.tool_calls] == ['{"query": "pie"}', '{"é": [1, null, "x"]}']


HARM = "a bomb bomb"
HARMFUL: dict[str, dict[str, Any]] = {
    "text": {"type": "text", "text": HARM},
    "citation": {**TEXT, "citations": [{"type": "char_location", "cited_text": HARM}]},
    "thinking": {"type": "thinking", "thinking": HARM, "signature": "c2ln"},
    "name": {**CALL, "name": HARM},
    "input": {**CALL, "input": {"q": [HARM]}},
    "key of an input": {**CALL, "input": {HARM: 1}},
    "mcp input": {"type": "mcp_tool_use", "id": "t", "name": "search", "server_name": "s", "input": {"q": HARM}},
    "search": found(HARM),
    "mcp result": {"type": "mcp_tool_result", "tool_use_id": "t", "is_error": False, "content": [
        {"type": "text", "text": HARM}]},
    "code": {"type": "code_execution_tool_result", "tool_use_id": "t", "content": {
        "type": "code_execution_result", "stdout": HARM, "stderr": "", "return_code": 0, "content": []}},
    "editor": {"type": "text_editor_code_execution_tool_result", "tool_use_id": "t", "content": {
        "type": "text_editor_code_execution_str_replace_result", "lines": ["x", HARM]}},
    "fetch": {"type": "web_fetch_tool_result", "tool_use_id": "t", "content": {
        "type": "web_fetch_result", "url": "u", "content": {
            "type": "document", "source": {"type": "text", "media_type": "text/plain", "data": HARM}}}},
    "a type in a result": {"type": "mcp_tool_result", "tool_use_id": "t", "content": [{"type": HARM}]},
}  # fmt: skip


@pytest.mark.parametrize("block", HARMFUL.values(), ids=HARMFUL)
async def test_every_text_of_a_message_is_judged(block: dict[str, Any]) -> None:
    """In whichever block and field it stands: the policy's message stands in for the whole answer, or ends it."""
    tools = frozenset({"search"})
    record = Record()

    whole, decision = await judge_message(fake.message(CALL, block), judging(record=record, tools=tools))
    client = await streamed(*fake.block(0, CALL), *fake.block(1, block), *fake.end(), tools=tools)

    assert decision is not None
    assert record.actions == ["block"]
    assert whole["content"] == [{"type": "text", "text": "Not here.", "citations": None}]
    assert whole["stop_reason"] == client.reason == "refusal"
    assert whole["usage"] == fake.USAGE
    assert whole["tidegate"]["where"]["path"].startswith("content[1].")
    assert client.field["where"]["path"] == whole["tidegate"]["where"]["path"]
    assert "bomb bomb" not in json.dumps([whole, client.events])
    assert client.balanced()


async def test_harm_spread_over_the_blocks_of_a_whole_message_is_seen() -> None:
    """Those that follow each other are one text."""
    whole, _ = await judge_message(fake.message("so bo", "mb it is"), judging())

    assert whole["stop_reason"] == "refusal"


async def test_a_message_without_text_needs_no_decision() -> None:
    """Nothing was judged, and nothing is kept."""
    record = Record()

    whole, decision = await judge_message(fake.message(), judging(record=record))
    client = await streamed(*fake.text(0, ""), *fake.end(), record=record)

    assert decision is None
    assert whole["tidegate"]["rule"] is None
    assert client.field["rule"] is None
    assert record.kept == []


@pytest.mark.parametrize("answer", [None, [], {}, {"content": "x"}, {"content": ["x"]}, {"content": [{"text": "x"}]}])
async def test_what_is_no_message_is_an_error_of_the_upstream(answer: Any) -> None:
    """Nothing of it passes."""
    with pytest.raises(UpstreamError):
        await judge_message(answer, judging())


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "not_found_error"),
        (413, "request_too_large"),
        (422, "invalid_request_error"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (502, "api_error"),
        (503, "overloaded_error"),
        (504, "timeout_error"),
        (529, "overloaded_error"),
    ],
)
def test_errors_have_anthropic_s_kinds(status: int, kind: str) -> None:
    """By the status; the place stands before the message."""
    body = error_body(Problem(status, "expected a string", param="messages[0].content"))

    assert body == {"type": "error", "error": {"type": kind, "message": "messages[0].content: expected a string"}}
