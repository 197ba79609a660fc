"""Responses on their way through, without a network: nothing unjudged leaves, however the upstream cuts its bytes."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.test_answers import POLICY, PROMPT, allowed, cut
from serving import Record, make_policy
from tidegate.errors import StoreError, UpstreamError
from tidegate.gateway.channels import Judging
from tidegate.gateway.responses_answers import NO_USAGE, ResponseStream, judge_response
from tidegate.testing import FakeStreamGuard, message_item, response, response_events
from tidegate.types import Action, Channel, Conversation, Role, Scope, ToolCall, Turn

HARM = "bomb bomb"

WORDS = st.sampled_from(["a", "bomb", "bomb,", "fine", "knife", "é", "日本", "👩‍👩‍👧", "e\u0301", "\n", "  "])
TEXTS = st.lists(WORDS, max_size=14).map(" ".join)
CUTS = st.lists(st.floats(0, 1), max_size=12)

REASONING: dict[str, Any] = {
    "id": "rs_1",
    "type": "reasoning",
    "summary": [{"type": "summary_text", "text": "They want pie."}],
    "content": [{"type": "reasoning_text", "text": "Let me think of pie."}],
}
CALL: dict[str, Any] = {
    "id": "fc_1",
    "type": "function_call",
    "call_id": "call_1",
    "name": "search",
    "arguments": '{"query": "apple pie"}',
    "status": "completed",
}
CUSTOM: dict[str, Any] = {
    "id": "ct_1",
    "type": "custom_tool_call",
    "call_id": "call_2",
    "name": "search",
    "input": "pie",
}
CODE: dict[str, Any] = {
    "id": "ci_1",
    "type": "code_interpreter_call",
    "container_id": "cntr_1",
    "code": "print(1 + 1)",
    "outputs": [{"type": "logs", "logs": "two is two"}],
    "status": "completed",
}
MCP: dict[str, Any] = {
    "id": "mcp_1",
    "type": "mcp_call",
    "name": "search",
    "server_label": "books",
    "arguments": '{"title": "pie"}',
    "output": "a book of pies",
    "status": "completed",
}
SEARCH: dict[str, Any] = {
    "id": "ws_1",
    "type": "web_search_call",
    "status": "completed",
    "action": {"type": "search", "query": "apple pie", "sources": [{"type": "url", "url": "https://a.example/pie"}]},
}
REFUSAL = message_item(content=[{"type": "refusal", "refusal": "That I cannot say."}])
EVERYTHING: list[Any] = [REASONING, SEARCH, "Here is a pie for you.", REFUSAL, CALL, CUSTOM, CODE, MCP]


class Client:
    """What a client made of the bytes that it got."""

    def __init__(self, data: bytes) -> None:
        self.events: list[dict[str, Any]] = []
        for block in data.split(b"\n\n")[:-1]:
            named, _, content = block.partition(b"\ndata: ")
            self.events.append(json.loads(content))
            assert named == f"event: {self.events[-1]['type']}".encode()
        numbers = [event["sequence_number"] for event in self.events]
        assert numbers == list(range(len(numbers)))

    @property
    def types(self) -> list[str]:
        return [event["type"].removeprefix("response.") for event in self.events]

    @property
    def last(self) -> dict[str, Any]:
        return self.events[-1]

    @property
    def field(self) -> dict[str, Any]:
        field: dict[str, Any] = self.last["response"]["tidegate"]
        return field

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["type"] == f"response.{kind}"]

    def text(self, kind: str = "output_text", place: int = 0) -> str:
        """The deltas of an item put together."""
        return "".join(event["delta"] for event in self.of(f"{kind}.delta") if event["output_index"] == place)

    @property
    def merged(self) -> list[dict[str, Any]]:
        """The events, with neighbouring deltas of one text put together, and without their numbers."""
        merged: list[dict[str, Any]] = []
        for event in self.events:
            one = {name: value for name, value in event.items() if name != "sequence_number"}
            if merged and "delta" in one and {**merged[-1], "delta": ""} == {**one, "delta": ""}:
                merged[-1]["delta"] += one["delta"]
            else:
                merged.append(one)
        return merged


def judging(guard: FakeStreamGuard | None = None, record: Record | None = None, **options: Any) -> Judging:
    record = record or Record()

    async def keep(decision: Any, conversation: Conversation) -> str | None:
        return await record(decision, conversation, retention="full")

    options = {"tools": frozenset({"search", "books"}), **options}
    return Judging(guard or FakeStreamGuard(), options.pop("policy", POLICY), Scope(), PROMPT, keep, **options)


def stream(guard: FakeStreamGuard | None = None, record: Record | None = None, **options: Any) -> ResponseStream:
    asked = options.pop("asked", {})
    return ResponseStream(judging(guard, record, **options), asked, "fake-model")


def wire(events: list[dict[str, Any]]) -> bytes:
    return b"".join(b"event: x\ndata: " + json.dumps(event).encode() + b"\n\n" for event in events)


def words(text: str) -> list[str]:
    """A text in pieces of three characters."""
    return [text[start : start + 3] for start in range(0, len(text), 3)]


async def through(one: ResponseStream, reads: list[bytes]) -> bytes:
    sent = b"".join([await one.feed(read) for read in reads if not one.done])
    return sent if one.done else sent + await one.end()


async def client_of(events: list[dict[str, Any]], **options: Any) -> Client:
    return Client(await through(stream(**options), [wire(events)]))


def strings(value: Any) -> Iterator[str]:
    """All strings in a JSON value, names too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for one in value:
            yield from strings(one)
    elif isinstance(value, dict):
        yield from value
        for one in value.values():
            yield from strings(one)


def counted(field: dict[str, Any], path: str) -> int:
    """How many characters of a field the coverage says were not judged."""
    return sum(
        part["characters"] for part in field["coverage"] if part["state"] == "not_judged" and part["path"] == path
    )


# --- how it was cut -----------------------------------------------------------------------------------------------


@given(text=TEXTS, chunks=CUTS, reads=CUTS)
@example(text="so bomb bomb x", chunks=[0.4], reads=[])
@example(text="a bomb shelter", chunks=[0.4, 0.5], reads=[0.3])
async def test_what_leaves_does_not_depend_on_how_it_was_cut(
    text: str, chunks: list[float], reads: list[float]
) -> None:
    """For every way to cut text into deltas and bytes into reads: exactly the longest prefix that is allowed."""
    guard = FakeStreamGuard()
    expected, action = await allowed(text)

    data = wire(response_events(text, cut=lambda whole: cut(whole, chunks)))
    client = Client(await through(stream(guard), cut(data, reads)))

    assert client.text() == expected
    assert client.types[-1] == ("incomplete" if action is Action.BLOCK else "completed")
    assert client.field["action"] == action.word
    said = [part["text"] for item in client.last["response"]["output"] for part in item["content"]]
    assert "".join(said) == expected
    assert guard.open_sessions == 0


@given(text=TEXTS, chunks=CUTS, reads=CUTS)
async def test_no_character_ever_leaves_early(text: str, chunks: list[float], reads: list[float]) -> None:
    """At every moment, what has left is a prefix of what a guard that judges alone allows."""
    one = stream()
    expected, _ = await allowed(text)
    sent = b""
    for read in cut(wire(response_events(text, cut=lambda whole: cut(whole, chunks))), reads):
        if not one.done:
            sent += await one.feed(read)
        client = Client(sent)
        assert expected.startswith(client.text())
        assert all(event["text"] == client.text() for event in client.of("output_text.done"))


ITEMS = st.lists(st.tuples(st.integers(0, len(EVERYTHING) - 1), TEXTS, st.booleans()), max_size=5).map(
    lambda drawn: [rewritten(EVERYTHING[number], text if changed else None) for number, text, changed in drawn]
)


def rewritten(item: Any, text: str | None) -> Any:
    """The same item with this as each of its long texts."""
    if text is None:
        return item
    if isinstance(item, str):
        return text
    return {
        name: [rewritten(one, text) for one in value]
        if isinstance(value, list)
        else rewritten(value, text)
        if isinstance(value, dict)
        else text
        if isinstance(value, str)
        and name in ("text", "refusal", "arguments", "input", "code", "logs", "output", "query")
        else value
        for name, value in item.items()
    }


@given(items=ITEMS, chunks=CUTS, reads=CUTS)
@example(items=[HARM], chunks=[], reads=[])
@example(items=["fine", SEARCH, HARM, CALL], chunks=[0.5], reads=[0.2, 0.8])
async def test_the_whole_stream_does_not_depend_on_how_its_bytes_were_cut(
    items: list[Any], chunks: list[float], reads: list[float]
) -> None:
    """All kinds of output: the same events leave, and the same decision is made, whether they come at once or not."""
    data = wire(response_events(*items, cut=lambda whole: cut(whole, chunks)))
    guard = FakeStreamGuard()

    once = Client(await through(stream(), [data]))
    pieces = Client(await through(stream(guard), cut(data, reads)))
    singly = Client(await through(stream(), [part + b"\n\n" for part in data.split(b"\n\n")[:-1]]))

    for client in (once, pieces, singly):
        client.field.pop("coverage")
        client.field.pop("interventions")  # how much had come of a text when it was stopped
        client.field.pop("id")
    assert once.merged == pieces.merged == singly.merged
    assert guard.open_sessions == 0


@given(items=ITEMS, data=st.data())
async def test_no_order_of_events_lets_harm_out(items: list[Any], data: st.DataObject) -> None:
    """Events doubled, lost and out of order: no field that leaves, and no text put together, has what is blocked; and
    it makes no difference whether they come at once."""
    events = response_events(*items, cut=words)
    places = [0, *data.draw(st.lists(st.integers(0, len(events) - 1), max_size=len(events)))]
    guard = FakeStreamGuard()

    client = Client(await through(stream(guard), [wire([events[place]]) for place in places]))
    once = Client(await through(stream(), [wire([events[place] for place in places])]))

    for one in (client, once):
        for name in ("coverage", "id"):
            one.last.get("response", {}).get("tidegate", {}).pop(name, None)
    assert client.merged == once.merged
    for text in strings(client.events):
        released, _ = await allowed(text)
        assert released.startswith(text.rstrip()) or released == text
    joined: dict[tuple[Any, ...], str] = {}
    for event in client.events:
        if "delta" in event:
            key = (event["type"], event["output_index"], event.get("content_index"), event.get("summary_index"))
            joined[key] = joined.get(key, "") + event["delta"]
    for text in joined.values():
        assert (await allowed(text))[0].startswith(text.rstrip())
    assert guard.open_sessions == 0


@given(text=TEXTS, chunks=CUTS, reads=CUTS)
async def test_a_failing_guard_lets_nothing_out(text: str, chunks: list[float], reads: list[float]) -> None:
    """Whatever comes with or after the word at which the guard fails stays in."""
    full = f"{text} guardfail {text} end"
    events = response_events(full, cut=lambda whole: cut(whole, chunks))

    client = Client(await through(stream(), cut(wire(events), reads)))

    assert (await allowed(text))[0].startswith(client.text().rstrip(" "))
    assert client.types[-1] == "incomplete"
    assert "guardfail" not in json.dumps(client.events)


@given(data=st.binary(max_size=200), start=st.booleans())
async def test_any_bytes_end_well(data: bytes, start: bool) -> None:
    """Whatever the upstream sends: events that can be read, an ending, and no open session."""
    guard = FakeStreamGuard()
    one = stream(guard)
    begin = wire(response_events("hello ")[:5]) if start else b""

    client = Client(await through(one, [begin, data]))

    assert one.done
    assert client.types[-1] == "error"
    assert guard.open_sessions == 0


# --- what passes --------------------------------------------------------------------------------------------------


async def test_a_safe_stream_passes_as_it_is() -> None:
    """All kinds of output, event by event; ours are the numbers, and the decision in the last one."""
    events = response_events(*EVERYTHING, cut=words)
    client = await client_of(events)

    field = client.last["response"].pop("tidegate")
    expected = Client(b"".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode() for event in events))
    assert client.merged == expected.merged
    assert field["action"] == "allow"
    assert {part["path"] for part in field["coverage"]} == {
        "output[0].summary[0].text",
        "output[0].content[0].text",
        "output[1].action.query",
        "output[1].action.sources[0].url",
        "output[2].content[0].text",
        "output[3].content[0].refusal",
        "output[4].arguments",
        "output[5].input",
        "output[6].code",
        "output[6].outputs[0].logs",
        "output[7].arguments",
        "output[7].output",
    }
    assert {part["state"] for part in field["coverage"]} == {"judged"}


async def test_a_safe_response_passes_as_it_is() -> None:
    record = Record()
    whole = response(*EVERYTHING)

    judged, decision = await judge_response(copy.deepcopy(whole), judging(record=record), {})

    field = judged.pop("tidegate")
    assert judged == whole
    assert field["action"] == "allow"
    assert decision is not None
    assert record.kept[0][1].turns[-1] == Turn(
        Role.ASSISTANT,
        "Here is a pie for you.\nThat I cannot say.\ntwo is two\na book of pies",
        "They want pie.\nLet me think of pie.",
        (
            ToolCall("", "apple pie"),
            ToolCall("", "https://a.example/pie"),
            ToolCall("", CALL["arguments"]),
            ToolCall("", "pie"),
            ToolCall("", "print(1 + 1)"),
            ToolCall("", MCP["arguments"]),
        ),
    )


async def test_each_text_is_judged_as_what_it_is() -> None:
    """The guard is told of each text what it is, what was thought before it, and which tool is called."""
    guard = FakeStreamGuard()

    await client_of(response_events(REASONING, "So pie.", CALL), guard=guard)

    thought = "They want pie.\nLet me think of pie."
    assert [(opened.channel, opened.reasoning, opened.name) for opened in guard.opened] == [
        (Channel.REASONING, "", ""),
        (Channel.REASONING, "", ""),
        (Channel.ANSWER, thought, ""),
        (Channel.TOOL_CALL, thought, "search"),
    ]


async def test_a_text_that_is_repeated_is_judged_once() -> None:
    """Deltas, done events, the item and the response say it four times."""
    guard = FakeStreamGuard()

    await client_of(response_events("one two three", SEARCH, cut=words), guard=guard)

    assert len(guard.opened) == 1 + 2


async def test_a_part_of_a_delta_can_go_out() -> None:
    """A long delta is not held as a whole for its last word, and the done event waits for all of it."""
    one = stream()
    events = response_events("one two three four", cut=lambda text: [text[:13], text[13:]])

    first = Client(await one.feed(wire(events[:5])))
    assert [event["delta"] for event in first.of("output_text.delta")] == ["one two"]
    rest = await through(one, [wire(events[5:])])

    assert b'"delta":" three"' in rest
    assert b'"text":"one two three four"' in rest


async def test_what_was_thought_does_not_wait_for_the_answer() -> None:
    """A done event ends its text, so that its last word is judged at once."""
    one = stream()
    events = response_events(REASONING, "well then")
    begun = next(place for place, event in enumerate(events) if event.get("delta") == "well then")

    client = Client(await one.feed(wire(events[: begun + 1])))

    assert client.text("reasoning_text") == "Let me think of pie."
    assert client.text(place=1) == "well"


async def test_obfuscation_does_not_pass() -> None:
    """Padding of the upstream's is no text, and is not counted."""
    events = [{**event, "obfuscation": "xyzzy"} for event in response_events("fine")]

    client = await client_of(events)

    assert "xyzzy" not in json.dumps(client.events)
    assert all(part["state"] == "judged" for part in client.field["coverage"])


async def test_halves_of_a_character_are_joined() -> None:
    """A surrogate pair cut between two deltas arrives as one character."""
    events = response_events("😀 ok")
    data = wire(events[:4])
    for half in (b"\\ud83d", b"\\ude00 ok"):
        data += (
            b'data: {"type":"response.output_text.delta","output_index":0,"content_index":0,"delta":"%b"}\n\n' % half
        )
    client = Client(await through(stream(), [data + wire(events[5:])]))

    assert client.text() == "😀 ok"
    assert client.of("output_text.done")[0]["text"] == "😀 ok"
    assert client.types[-1] == "completed"


async def test_text_in_the_beginning_of_a_thing_comes_as_its_first_delta() -> None:
    """An upstream that puts words into ``added`` events: a client puts the same text together."""
    events = response_events("two three")
    events[3]["part"]["text"] = "one "
    for event in events[5:]:
        event.update({"text": "one two three"} if "text" in event else {})
    events[6]["part"]["text"] = "one two three"
    events[7]["item"] = events[8]["response"]["output"][0] = message_item("one two three", identity="msg_0")

    client = await client_of(events)

    assert client.of("content_part.added")[0]["part"]["text"] == ""
    assert client.text() == "one two three"
    assert client.of("output_text.delta")[0]["item_id"] == "msg_0"
    assert len(client.field["coverage"]) == 1


async def test_a_stream_without_deltas_is_judged_by_what_ends_it() -> None:
    """Only a done item: it leaves when its text is judged."""
    events = response_events("fine")
    client = await client_of([events[0], events[7], events[8]])
    harm = response_events(HARM)
    blocked = await client_of([harm[0], harm[7], harm[8]])

    assert client.types == ["created", "output_item.done", "completed"]
    assert blocked.types == ["created", "incomplete"]


# --- done events that say something else --------------------------------------------------------------------------


@pytest.mark.parametrize("said", ["one two three", "other words", "one"])
@pytest.mark.parametrize("place", [5, 6, 7, 8])
async def test_what_an_event_says_beside_the_deltas_is_judged(place: int, said: str) -> None:
    """Longer, other or shorter: it passes as it is when it is allowed."""
    events = response_events("one two")
    events[place] = repeating(events[place], said)

    client = await client_of(events)

    assert said in list(strings(client.events[place]))
    assert client.field["action"] == "allow"


@pytest.mark.parametrize("said", ["one two bomb bomb", HARM])
@pytest.mark.parametrize("place", [5, 6, 7, 8])
async def test_harm_that_an_event_says_beside_the_deltas_stays_in(place: int, said: str) -> None:
    """Neither what is added to the text nor what stands for it passes unjudged."""
    events = response_events("one two")
    events[place] = repeating(events[place], said)

    client = await client_of(events)

    assert HARM not in json.dumps(client.events)
    assert client.types[-1] == "incomplete"
    assert client.field["rule"] == "unsafe"


def repeating(event: dict[str, Any], said: str) -> dict[str, Any]:
    """The same event, which repeats this as the text."""
    whole: dict[str, Any] = json.loads(json.dumps(event).replace('"text": "one two"', f'"text": "{said}"'))
    return whole


async def test_harm_between_deltas_and_done_is_seen() -> None:
    """The last delta and what the done event adds are one text."""
    events = response_events("so bomb")
    events[5]["text"] = "so bomb bomb"

    client = await client_of(events)

    assert client.text() == "so"
    assert client.types[-1] == "incomplete"


async def test_a_text_does_not_go_on_after_its_end() -> None:
    """That is an error: what comes after would be judged without what came before."""
    events = response_events("one bomb")

    client = await client_of([*events[:6], events[4]])

    assert client.last["type"] == "error"
    assert client.text() == "one bomb"


# --- blocks -------------------------------------------------------------------------------------------------------


async def test_a_blocked_stream_is_closed_as_its_protocol_says() -> None:
    """Open parts and items are closed with what was released; the last event says why."""
    record = Record()
    one = stream(record=record)
    events = response_events(REASONING, f"Take a {HARM} now", cut=words)

    client = Client(await through(one, [wire(events)]))

    assert client.types[-5:] == [
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "incomplete",
    ]
    assert (
        client.of("output_text.done")[0] | {"text": "Take a", "output_index": 1, "content_index": 0}
        == (client.of("output_text.done")[0])
    )
    assert client.of("content_part.done")[-1]["part"] == {"type": "output_text", "text": "Take a", "annotations": []}
    last = client.last["response"]
    assert last["status"] == "incomplete"
    assert last["incomplete_details"] == {"reason": "content_filter"}
    assert last["id"] == "resp_fake"
    assert last["usage"] == NO_USAGE
    assert last["output"] == [
        REASONING,
        message_item("Take a", identity="msg_1", status="incomplete"),
    ]
    assert last["tidegate"]["where"] == {"path": "output[1].content[0].text", "start": 6, "end": 16}
    assert one.done
    assert not one.complete
    assert record.actions == ["block"]


@pytest.mark.parametrize(
    ("item", "kind"),
    [
        (REASONING, "reasoning_summary_text"),
        (REASONING, "reasoning_text"),
        (REFUSAL, "refusal"),
        (CALL, "function_call_arguments"),
        (CUSTOM, "custom_tool_call_input"),
        (CODE, "code_interpreter_call_code"),
        (MCP, "mcp_call_arguments"),
    ],
)
async def test_every_text_that_streams_is_cut(item: dict[str, Any], kind: str) -> None:
    """The safe beginning arrives, and nothing of the rest."""
    events = response_events(item, cut=words)
    own = [place for place, event in enumerate(events) if event["type"] == f"response.{kind}.delta"]
    said = [{**events[own[0]], "delta": piece} for piece in words(f"so {HARM} x")]
    events[own[0] : own[-1] + 1] = said

    client = await client_of(events)

    assert client.text(kind) == "so"
    assert client.types[-2:] == ["output_item.done", "incomplete"]
    assert client.events[-2]["item"]["status"] == "incomplete"
    assert "so" in list(strings(client.last["response"]["output"]))
    assert ("arguments.done" in "".join(client.types)) is False
    assert "bomb" not in json.dumps({**client.last["response"], "tidegate": None})


def items_with(said: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every kind of item with this in each place where a model or a tool puts text."""
    part = {"type": "output_text", "text": "fine", "annotations": []}
    cited = {"start_index": 0, "end_index": 1}
    yield "message.text", message_item(said)
    yield "message.refusal", message_item(content=[{"type": "refusal", "refusal": said}])
    for name in ("title", "url"):
        citation = {"type": "url_citation", "title": "t", "url": "u", **cited, name: said}
        yield f"annotation.{name}", message_item(content=[{**part, "annotations": [citation]}])
    file = {"type": "file_citation", "file_id": "file-1", "index": 0, "filename": said}
    yield "annotation.filename", message_item(content=[{**part, "annotations": [file]}])
    yield "reasoning.summary", {**REASONING, "summary": [{"type": "summary_text", "text": said}]}
    yield "reasoning.content", {**REASONING, "content": [{"type": "reasoning_text", "text": said}]}
    yield "function_call.arguments", {**CALL, "arguments": said}
    yield "function_call.name", {**CALL, "name": said}
    yield "custom_tool_call.input", {**CUSTOM, "input": said}
    yield "custom_tool_call.name", {**CUSTOM, "name": said}
    for name in ("arguments", "name", "server_label", "output", "error"):
        yield f"mcp_call.{name}", {**MCP, name: said}
    yield "mcp_call.error.message", {**MCP, "error": {"type": "http_error", "code": 500, "message": said}}
    listed = {"id": "mcpl_1", "type": "mcp_list_tools", "server_label": "books", "tools": [{"name": "search"}]}
    yield "mcp_list_tools.name", {**listed, "tools": [{"name": said, "input_schema": {}}]}
    yield "mcp_list_tools.description", {**listed, "tools": [{"name": "search", "description": said}]}
    schema = {"properties": {"q": {"description": said}}}
    yield "mcp_list_tools.input_schema", {**listed, "tools": [{"name": "search", "input_schema": schema}]}
    asks = {"id": "mcpr_1", "type": "mcp_approval_request", "name": "search", "server_label": "books"}
    yield "mcp_approval_request.arguments", {**asks, "arguments": said}
    yield "code.code", {**CODE, "code": said}
    yield "code.logs", {**CODE, "outputs": [{"type": "logs", "logs": said}]}
    yield "web_search.query", {**SEARCH, "action": {"type": "search", "query": said}}
    yield "web_search.queries", {**SEARCH, "action": {"type": "search", "queries": ["fine", said]}}
    yield "web_search.url", {**SEARCH, "action": {"type": "open_page", "url": said}}
    yield "web_search.pattern", {**SEARCH, "action": {"type": "find_in_page", "url": "u", "pattern": said}}
    found = {"id": "fs_1", "type": "file_search_call", "status": "completed", "queries": ["fine"], "results": []}
    yield "file_search.queries", {**found, "queries": [said]}
    yield "file_search.text", {**found, "results": [{"file_id": "file-1", "score": 0.5, "text": said}]}
    yield "file_search.attributes", {**found, "results": [{"attributes": {"note": said}}]}
    acted = {"id": "cu_1", "type": "computer_call", "call_id": "call_1", "status": "completed"}
    yield "computer.text", {**acted, "action": {"type": "type", "text": said}}
    yield "computer.keys", {**acted, "actions": [{"type": "keypress", "keys": [said]}]}
    yield "computer.check", {**acted, "pending_safety_checks": [{"id": "c", "code": "fine", "message": said}]}
    local = {"id": "sh_1", "type": "local_shell_call", "call_id": "call_1", "status": "completed"}
    yield "local_shell.command", {**local, "action": {"type": "exec", "command": ["echo", said], "env": {}}}
    yield "local_shell.env", {**local, "action": {"type": "exec", "command": ["echo"], "env": {"A": said}}}
    shell = {"id": "sh_1", "type": "shell_call", "call_id": "call_1", "status": "completed"}
    yield "shell.commands", {**shell, "action": {"commands": [said]}}
    put_out = {"id": "so_1", "type": "shell_call_output", "call_id": "call_1"}
    yield "shell.stdout", {**put_out, "output": [{"stdout": said, "stderr": "", "outcome": {"type": "exit"}}]}
    patch = {"id": "ap_1", "type": "apply_patch_call", "call_id": "call_1", "status": "completed"}
    yield "patch.diff", {**patch, "operation": {"type": "create_file", "path": "a.txt", "diff": said}}
    yield "patch.path", {**patch, "operation": {"type": "delete_file", "path": said}}
    drawn = {"id": "ig_1", "type": "image_generation_call", "status": "completed"}
    yield "image.revised_prompt", {**drawn, "revised_prompt": said}
    yield "program.code", {"id": "pr_1", "type": "program", "call_id": "call_1", "code": said, "fingerprint": "f"}
    yield "tool_search.arguments", {"id": "ts_1", "type": "tool_search_call", "arguments": {"query": said}}
    yield "function_call_output", {"id": "fo_1", "type": "function_call_output", "call_id": "call_1", "output": said}


@pytest.mark.parametrize(("where", "item"), list(items_with(HARM)), ids=[where for where, _ in items_with("")])
async def test_every_text_of_every_item_is_judged(where: str, item: dict[str, Any]) -> None:
    """Whole and streaming: the policy stops the response, and nothing of it leaves."""
    whole, decision = await judge_response(response(item), judging(), {})
    client = await client_of(response_events(item))

    assert decision is not None
    assert decision.action is Action.BLOCK
    assert HARM not in json.dumps(whole)
    assert client.types[-1] == "incomplete"
    assert client.field["action"] == "block"
    assert HARM not in json.dumps(client.events)


@pytest.mark.parametrize(("where", "item"), list(items_with("a fine pie")), ids=[where for where, _ in items_with("")])
async def test_every_safe_text_of_every_item_arrives(where: str, item: dict[str, Any]) -> None:
    whole, _ = await judge_response(response(copy.deepcopy(item)), judging(), {})
    client = await client_of(response_events(item))

    assert whole["output"] == [item]
    assert client.last["response"]["output"] == [item]
    assert client.of("output_item.done")[0]["item"] == item
    assert whole["tidegate"]["action"] == client.field["action"] == "allow"


async def test_a_blocked_response_says_the_policys_message() -> None:
    """And nothing else of its output is left; its usage is."""
    record = Record()

    whole, _ = await judge_response(response(REASONING, HARM), judging(record=record), {})

    assert whole["status"] == "incomplete"
    assert whole["incomplete_details"] == {"reason": "content_filter"}
    (item,) = whole["output"]
    assert item["content"] == [{"type": "output_text", "text": "Not here.", "annotations": []}]
    assert whole["usage"]["total_tokens"] == 8
    assert "pie" not in json.dumps(whole)
    assert record.actions == ["block"]


# --- fields that lie ----------------------------------------------------------------------------------------------

SECRET = "first mix the powder"
EVENTS = response_events(*EVERYTHING)
HEAD = [name for name in response() if name not in ("output", "error", "incomplete_details")]
SHAPES: list[Any] = [SECRET, [SECRET], {"a": SECRET}, {SECRET: 1}]


@pytest.mark.parametrize("value", SHAPES)
@pytest.mark.parametrize("kind", list(dict.fromkeys(event["type"] for event in EVENTS)))
async def test_no_field_of_an_event_carries_a_sentence(kind: str, value: Any) -> None:
    """In each kind of event, each field in its turn, and one that nobody knows: judged, dropped, replaced, an error."""
    place = next(place for place, event in enumerate(EVENTS) if event["type"] == kind)
    for path in [*paths_in(EVENTS[place]), ("extra",)]:
        events = [EVENTS[0], copy.deepcopy(EVENTS[place])]
        put(events[1], path, value)

        sent = await through(stream(), [wire(events)])

        Client(sent)
        assert SECRET.encode() not in sent or await is_judged(events), path


async def is_judged(events: list[dict[str, Any]]) -> bool:
    """Whether the same place is blocked when it says what the policy stops."""
    harmful = json.loads(json.dumps(events).replace(SECRET, f"{HARM} x"))
    return HARM.encode() not in await through(stream(), [wire(harmful)])


def paths_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of all fields in a JSON value."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if path or key not in ("type", "sequence_number"):
                yield (*path, key)
            yield from paths_in(inner, (*path, key))


def put(value: Any, path: tuple[Any, ...], new: Any) -> None:
    for step in path[:-1]:
        value = value[step]
    value[path[-1]] = new


@pytest.mark.parametrize("value", SHAPES)
async def test_no_field_of_a_whole_response_carries_a_sentence(value: Any) -> None:
    """The same without streaming."""
    whole = response(*EVERYTHING)
    for path in [*paths_in(whole), ("extra",), ("output", 0, "extra"), ("output", 2, "content", 0, "extra")]:
        lying = copy.deepcopy(whole)
        put(lying, path, value)
        harmful = json.loads(json.dumps(lying).replace(SECRET, HARM))
        try:
            judged, _ = await judge_response(lying, judging(), {})
            stopped, _ = await judge_response(harmful, judging(), {})
        except UpstreamError:
            continue
        assert SECRET not in json.dumps(judged) or HARM not in json.dumps(stopped), path


@pytest.mark.parametrize("name", [name for name in HEAD if isinstance(response()[name], str | int | float | dict)])
async def test_what_is_dropped_of_a_response_is_counted(name: str) -> None:
    judged, _ = await judge_response({**response("fine"), name: [SECRET]}, judging(), {})
    events = response_events("fine")
    events[0]["response"][name] = [SECRET]
    client = await client_of(events)

    for field in (judged["tidegate"], client.field):
        assert counted(field, name) >= len(SECRET)


ASKED: dict[str, Any] = {
    "instructions": "Speak of pies only.",
    "metadata": {"note": "for the pie shop"},
    "tools": [{"type": "function", "name": "search", "parameters": {"type": "object"}}],
    "tool_choice": "auto",
    "text": {"format": {"type": "text"}},
    "user": "somebody",
    "prompt_cache_key": "pies",
    "safety_identifier": "user-1",
    "reasoning": {"effort": "low"},
}


@pytest.mark.parametrize("name", ASKED)
async def test_a_response_says_of_its_request_what_the_client_said(name: str) -> None:
    """An echo passes as it is; where the upstream says something else, the client's own words stand there."""
    for said in (ASKED[name], SECRET, [SECRET], {"a": SECRET}, [{**ASKED["tools"][0], "strict": True}]):
        judged, _ = await judge_response(response("fine", **{name: said}), judging(), ASKED)
        client = await client_of(response_events("fine", **{name: said}), asked=ASKED)

        assert judged[name] == ASKED[name]
        assert client.events[0]["response"][name] == client.last["response"][name] == ASKED[name]
        assert SECRET not in json.dumps([judged, client.events])


@pytest.mark.parametrize("name", ASKED)
async def test_an_echo_of_what_nobody_said_does_not_pass(name: str) -> None:
    """But the words for programs with which upstreams complete a request do."""
    defaults = {"tool_choice": "auto", "text": {"format": {"type": "text"}}, "reasoning": {"effort": None}}
    lied, _ = await judge_response(response("fine", **{name: SECRET}), judging(), {})
    honest, _ = await judge_response(response("fine", **defaults), judging(), {})

    assert not lied[name]
    assert counted(lied["tidegate"], name) == len(SECRET)
    assert {key: honest[key] for key in defaults} == defaults


def token(text: str, *others: str) -> dict[str, Any]:
    listed = [{"token": one, "logprob": -1.0, "bytes": list(one.encode())} for one in (text, *others)]
    return {**listed[0], "top_logprobs": listed}


@pytest.mark.parametrize(
    ("tokens", "kept", "dropped"),
    [
        (["Hel", "lo ", "é."], 3, 0),
        (["Hel", "lo ", "é.", "bomb"], 3, 4),
        (["Hel", "bomb", "é."], 1, 6),
        (["bomb"], 0, 4),
        ([], 0, 0),
    ],
)
async def test_log_probabilities_of_a_whole_answer_pass_as_far_as_they_spell_its_text(
    tokens: list[str], kept: int, dropped: int
) -> None:
    part = {"type": "output_text", "text": "Hello é.", "logprobs": [token(one) for one in tokens]}

    whole, _ = await judge_response(response(message_item(content=[part])), judging(), {})

    assert whole["output"][0]["content"][0]["logprobs"] == [token(one) for one in tokens[:kept]]
    assert counted(whole["tidegate"], "output.content.logprobs") == dropped


async def test_of_other_tokens_nothing_passes_and_a_blocked_answer_has_no_tokens() -> None:
    part = {"type": "output_text", "text": "Hello", "logprobs": [token("Hello", "bomb")]}
    harm = {"type": "output_text", "text": "bomb bomb", "logprobs": [token("bomb"), token(" bomb")]}

    whole, _ = await judge_response(response(message_item(content=[part])), judging(), {})
    stopped, decision = await judge_response(response(message_item(content=[harm])), judging(), {})
    bare, _ = await judge_response(response(message_item(content=[{**harm, "text": 7}])), judging(), {})

    assert whole["output"][0]["content"][0]["logprobs"] == [token("Hello")]
    assert counted(whole["tidegate"], "output.content.logprobs.top_logprobs") == 4
    assert decision is not None
    assert "bomb" not in json.dumps([stopped, bare])


UNSEEN: list[Any] = [
    ("output.encrypted_content", {**REASONING, "encrypted_content": SECRET}),
    ("output.odd", {**CALL, "odd": SECRET}),
    ("output.outputs.url", {**CODE, "outputs": [{"type": "image", "url": f"data:{SECRET}"}]}),
    ("output.content.logprobs", message_item(content=[{"type": "output_text", "text": "x", "logprobs": [SECRET]}])),
]


@pytest.mark.parametrize(("path", "item"), UNSEEN)
async def test_a_policy_can_let_out_what_no_guard_can_judge(path: str, item: dict[str, Any]) -> None:
    """As it is, and counted."""
    with_ = judging(policy=make_policy(unjudged_answer="pass"))

    whole, _ = await judge_response(response(copy.deepcopy(item)), with_, {})
    client = await client_of(response_events(item), policy=make_policy(unjudged_answer="pass"))

    assert whole["output"] == client.last["response"]["output"] == [item]
    assert counted(whole["tidegate"], path) >= len(SECRET)
    assert counted(client.field, path) >= len(SECRET)
    assert client.field["action"] == "allow"


@pytest.mark.parametrize(("path", "item"), UNSEEN)
async def test_a_policy_can_refuse_what_no_guard_can_judge(path: str, item: dict[str, Any]) -> None:
    """The response is blocked at the event that has it; what came before has left."""
    policy = make_policy(unjudged_answer="refuse")
    data = wire(response_events("Some words", item))
    record = Record()

    whole, _ = await judge_response(response("Some words", copy.deepcopy(item)), judging(policy=policy), {})
    once = Client(await through(stream(record=record, policy=policy), [data]))
    pieces = Client(await through(stream(policy=policy), cut(data, [place / 50 for place in range(50)])))

    assert whole["status"] == "incomplete"
    assert whole["tidegate"]["rule"] == once.field["rule"] == "unjudged_answer"
    assert whole["tidegate"]["failure"]["kind"] == "UnjudgedAnswer"
    assert once.text() == "Some words"
    assert once.types[-1] == "incomplete"
    assert SECRET not in json.dumps([whole, once.events])
    assert record.actions == ["block"]
    for client in (once, pieces):
        client.field.pop("coverage")
    assert once.merged == pieces.merged


async def test_a_verdict_says_more_than_that_something_was_not_judged() -> None:
    """Where both stop a response, the verdict is the reason that is told and kept."""
    policy = make_policy(unjudged_answer="refuse")
    item = {**CALL, "arguments": HARM, "odd": SECRET}

    whole, _ = await judge_response(response(item), judging(policy=policy), {})
    client = await client_of([*response_events(HARM)[:5], {"type": "response.odd", "text": SECRET}], policy=policy)

    assert whole["tidegate"]["rule"] == client.field["rule"] == "unsafe"


async def test_an_unknown_event_is_what_the_policy_says_too() -> None:
    events = response_events("fine")
    odd = {"type": "response.odd", "text": SECRET}

    passed = await client_of([*events[:2], odd, *events[2:]], policy=make_policy(unjudged_answer="pass"))
    refused = await client_of([*events[:2], odd, *events[2:]], policy=make_policy(unjudged_answer="refuse"))

    assert passed.events[2]["text"] == SECRET
    assert passed.types[-1] == "completed"
    assert refused.types == ["created", "in_progress", "incomplete"]


@pytest.mark.parametrize(
    ("item", "path"),
    [
        ({**REASONING, "encrypted_content": "Z2lyYWZmZQ=="}, "encrypted_content"),
        ({"id": "ig_1", "type": "image_generation_call", "status": "completed", "result": "Z2lyYWZmZQ=="}, "result"),
        ({**CODE, "outputs": [{"type": "image", "url": "data:image/png;base64,Z2lyYWZmZQ=="}]}, "outputs.url"),
    ],
)
async def test_what_the_guard_cannot_see_does_not_pass(item: dict[str, Any], path: str) -> None:
    """Encrypted reasoning and images are dropped and counted."""
    whole, _ = await judge_response(response(item), judging(), {})
    client = await client_of(response_events(item))

    assert "Z2lyYWZmZQ" not in json.dumps([whole, client.events])
    assert counted(whole["tidegate"], f"output.{path}") >= 12
    assert counted(client.field, f"output.{path}") >= 12


async def test_fields_that_the_operator_vouches_for_pass() -> None:
    """Those that we do not know; what we know is judged all the same."""
    trusted = frozenset({"encrypted_content", "billing", "text"})
    item = {**REASONING, "encrypted_content": "Z2lyYWZmZQ=="}

    whole, _ = await judge_response(response(item, billing={"payer": "us"}), judging(trusted=trusted), {})
    blocked, _ = await judge_response(response(HARM), judging(trusted=trusted), {})

    assert whole["output"] == [item]
    assert whole["billing"] == {"payer": "us"}
    assert blocked["status"] == "incomplete"


async def test_a_stray_image_does_not_pass() -> None:
    partial = {
        "type": "response.image_generation_call.partial_image",
        "output_index": 0,
        "item_id": "ig_1",
        "partial_image_index": 0,
        "partial_image_b64": "Z2lyYWZmZQ==",
    }
    events = response_events("fine")

    client = await client_of([*events[:2], partial, *events[2:]])

    assert len(client.events) == len(events)
    assert counted(client.field, "response.image_generation_call.partial_image") >= 12


@pytest.mark.parametrize("text", [SECRET, [SECRET], {"a": SECRET}, {SECRET: None}, [1, 2]])
async def test_an_unknown_event_with_text_is_dropped_and_counted(text: Any) -> None:
    """One without text passes in its place."""
    events = response_events("fine")
    unknown = {"type": "response.odd.delta", "output_index": 0, "delta": text}
    plain = {"type": "keepalive", "beat": 3}

    client = await client_of([*events[:2], unknown, plain, *events[2:]])

    assert client.types[2] == "keepalive"
    assert len(client.events) == len(events) + 1
    assert SECRET not in json.dumps(client.events)
    assert any(part["path"] == "response.odd.delta" for part in client.field["coverage"])


async def test_an_event_whose_type_is_a_sentence_is_dropped() -> None:
    events = response_events("fine")

    client = await client_of([*events[:2], {"type": SECRET}, *events[2:]])

    assert SECRET not in json.dumps(client.events)
    assert counted(client.field, "?") == len(SECRET)


async def test_no_content_ends_an_event_early() -> None:
    """Line breaks in texts, names and types stay inside of the JSON."""
    said = "fine\n\nevent: response.completed\ndata: {}\n\n"

    client = await client_of(response_events(said, {**CALL, "name": said, "arguments": said}))

    assert client.text() == said
    assert client.types.count("completed") == 1


async def test_steps_of_tools_pass_in_their_order() -> None:
    steps = [
        {"type": f"response.{step}", "output_index": 0, "item_id": "x_1"}
        for step in (
            "web_search_call.in_progress",
            "web_search_call.searching",
            "web_search_call.completed",
            "file_search_call.in_progress",
            "mcp_call.in_progress",
            "mcp_call.failed",
            "mcp_list_tools.completed",
            "code_interpreter_call.interpreting",
            "image_generation_call.generating",
        )
    ]
    events = response_events("fine")

    client = await client_of([*events[:-1], *steps, events[-1]])

    assert [event["type"] for event in client.events] == [event["type"] for event in [*events[:-1], *steps, events[-1]]]


async def test_an_annotation_leaves_when_it_is_judged() -> None:
    """In its place among the deltas; what it cites is text."""
    citation = {
        "type": "url_citation",
        "title": "On pies",
        "url": "https://a.example",
        "start_index": 0,
        "end_index": 3,
    }
    added = {
        "type": "response.output_text.annotation.added",
        "output_index": 0,
        "content_index": 0,
        "annotation_index": 0,
        "item_id": "msg_0",
        "annotation": citation,
    }
    events = response_events("fine words")

    client = await client_of([*events[:5], added, *events[5:]])
    blocked = await client_of([*events[:5], {**added, "annotation": {**citation, "title": HARM}}, *events[5:]])

    assert client.of("output_text.annotation.added")[0]["annotation"] == citation
    assert {part["path"] for part in client.field["coverage"]} == {
        "output[0].content[0].text",
        "output[0].content[0].annotations[0].title",
        "output[0].content[0].annotations[0].url",
    }
    assert blocked.types[-1] == "incomplete"
    assert HARM not in json.dumps(blocked.events)


# --- ends ---------------------------------------------------------------------------------------------------------


async def test_an_incomplete_response_keeps_its_reason() -> None:
    events = response_events("half of", status="incomplete", incomplete_details={"reason": "max_output_tokens"})
    events[-1]["type"] = "response.incomplete"

    client = await client_of(events)

    assert client.last["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    assert client.field["action"] == "allow"


async def test_a_failed_response_says_so_in_our_words() -> None:
    """The upstream's message may quote what nobody judged; what was said before is decided."""
    record = Record()
    error = {"code": "rate_limit_exceeded", "message": SECRET}
    events = response_events("half of", status="failed", error=error)
    events[-1]["type"] = "response.failed"

    client = await client_of(events, record=record)
    lying, _ = await judge_response(response(status="failed", error={**error, "code": SECRET}), judging(), {})

    assert client.last["response"]["error"]["code"] == "rate_limit_exceeded"
    assert lying["error"]["code"] == "server_error"
    assert SECRET not in json.dumps([client.events, lying])
    assert client.field["action"] == "allow"
    assert counted(client.field, "error.message") >= len(SECRET)
    assert record.actions == ["allow"]


@pytest.mark.parametrize(
    "garbage",
    [
        b"data: {not json}\n\n",
        b"data: [1, 2]\n\n",
        b"data: \xff\xfe\n\n",
        b"data: {}\n\n",
        b'data: {"type": 5}\n\n',
        b'data: {"type": "error", "code": "x", "message": "secret"}\n\n',
        b'data: {"error": {"message": "secret"}}\n\n',
        b'data: {"type": "response.output_text.delta", "output_index": 0, "content_index": 0}\n\n',
        b'data: {"type": "response.output_text.delta", "output_index": -1, "content_index": 0, "delta": "x"}\n\n',
        b'data: {"type": "response.output_text.delta", "output_index": 0, "content_index": "0", "delta": "x"}\n\n',
        b'data: {"type": "response.output_text.done", "output_index": 0, "content_index": 0, "text": ["secret"]}\n\n',
        b'data: {"type": "response.output_item.added", "output_index": 0, "item": "secret"}\n\n',
        b'data: {"type": "response.content_part.done", "output_index": 0, "content_index": 0}\n\n',
        b'data: {"type": "response.completed", "response": "secret"}\n\n',
        b'data: {"type": "response.completed", "response": {"output": "secret"}}\n\n',
        b"data: " + b"[" * 5000 + b"\n\n",
        b'data: {"type": "response.output_item.done", "output_index": 0, "item": {"content": '
        + b'[{"content": ' * 400 + b"1" + b"}]" * 400 + b"}}\n\n",
        b"data: [DONE]\n\n",
    ],
)  # fmt: skip
async def test_malformed_events_end_the_stream(garbage: bytes) -> None:
    """What came before is judged and let out; then comes an error in the form of the Responses API."""
    one = stream()

    client = Client(await through(one, [wire(response_events("fine so far")[:5]), garbage]))

    assert client.text() == "fine so far"
    assert one.done
    assert not one.complete
    assert one.error is not None
    assert client.last["type"] == "error"
    assert client.last["code"] == client.last["error"]["code"] == "upstream_error"
    assert "upstream" in client.last["message"]
    assert "secret" not in json.dumps(client.events)


async def test_a_stream_that_ends_too_early_is_an_error() -> None:
    """Without its last event nobody may take it for complete."""
    record = Record()

    client = await client_of(response_events("half of")[:-1], record=record)

    assert client.last["type"] == "error"
    assert record.actions == ["allow"]


async def test_held_harm_stays_held_when_the_upstream_breaks_off() -> None:
    one = stream()
    events = response_events("well bomb bomb", cut=lambda text: [text])

    sent = await one.feed(wire(events[:5]))
    client = Client(sent + (b"" if one.done else await one.end(UpstreamError("it broke off"))))

    assert client.text() == "well"
    assert client.types[-1] == "incomplete"


async def test_a_closed_stream_keeps_what_was_judged() -> None:
    """A client that hangs up: one decision, sessions closed, once."""
    guard, record = FakeStreamGuard(), Record()
    one = stream(guard, record)
    await one.feed(wire(response_events("one two")[:5]))
    assert one.held == 4

    await one.close()
    await one.close()

    assert record.actions == ["allow"]
    assert [part.state.value for part in record.kept[0][0].coverage] == ["judged", "not_judged"]
    assert record.kept[0][1].turns[-1].content == "one two"
    assert guard.open_sessions == 0


async def test_an_answer_is_not_complete_before_its_decision_is_kept() -> None:
    """A store that fails: the last event does not leave."""

    async def keep(decision: Any, conversation: Conversation) -> str | None:
        raise StoreError("the disk is full")

    with_ = Judging(FakeStreamGuard(), POLICY, Scope(), PROMPT, keep)
    one = ResponseStream(with_, {})

    with pytest.raises(StoreError):
        await one.feed(wire(response_events("fine")))
    with pytest.raises(StoreError):
        await judge_response(response("fine"), with_, {})


async def test_a_response_without_text_says_what_was_dropped() -> None:
    """It ends with our field too, so that nobody takes an empty answer for a judged one."""
    record = Record()
    item = {"id": "ig_1", "type": "image_generation_call", "status": "completed", "result": SECRET}

    client = await client_of(response_events(item), record=record)
    whole, decision = await judge_response(response(item), judging(record=record), {})

    for field in (client.field, whole["tidegate"]):
        assert (field["action"], field["rule"], field["severity"]) == ("allow", None, None)
        assert counted(field, "output.result") >= len(SECRET)
    assert decision is None
    assert record.kept == []


@pytest.mark.parametrize("answer", [None, 5, [], {}, {"object": "chat.completion"}, {"output": "x"}, {"output": ["x"]}])
async def test_what_is_no_response_is_an_error(answer: Any) -> None:
    with pytest.raises(UpstreamError):
        await judge_response(answer, judging(), {})


async def test_an_open_policy_lets_text_through_a_failing_guard() -> None:
    """on_guard_error: review passes everything, and the coverage counts what was not judged."""
    policy = make_policy(on_guard_error="review")
    noted: list[Any] = []

    client = await client_of(response_events("fine guardfail and more", CALL), policy=policy, note=noted.extend)

    assert client.text() == "fine guardfail and more"
    assert client.types[-1] == "completed"
    assert client.field["action"] == "review"
    assert counted(client.field, "output[0].content[0].text") == 23
    assert [decision.action for decision in noted] == [Action.ALLOW]


async def test_the_release_is_told() -> None:
    """How many characters of text went out."""
    one = stream()

    await through(one, [wire(response_events("one two", CALL))])

    assert one.released == len("one two") + len(CALL["arguments"])
    assert one.held == 0
