"""What a policy does to text is done at every door: personal data is masked, and stops look as each protocol wants."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from websockets.asyncio.client import connect
from websockets.typing import Subprotocol

from gateway import messages_wire as wire
from gateway.test_interventions import HEAD as TWO_TOKENS
from gateway.test_interventions import RULES, Personal
from serving import PATIENCE_S, Record, serving
from streams import cut
from tidegate.gateway.app import create_app
from tidegate.gateway.channels import Judging
from tidegate.gateway.live_frames import PROTOCOL
from tidegate.gateway.messages_answers import MessageStream, judge_message
from tidegate.gateway.redaction import is_out, masked_body
from tidegate.gateway.responses_answers import ResponseStream, judge_response
from tidegate.policy import parse_policy
from tidegate.testing import (
    FakeGuard,
    FakeStreamGuard,
    FakeUpstream,
    Hang,
    Reply,
    Send,
    completion,
    response,
    response_events,
    text_chunks,
    text_completion,
)
from tidegate.types import Conversation, Decision, Role, Scope, ToolCall, Turn

PLANTED = ("ann@example.org", "030 1234567", "4111 1111 1111 1111")
TEXT = "Write to ann@example.org, call 030 1234567 or pay with 4111 1111 1111 1111 before the evening."
MASKED = "Write to xxx@xxxxxxx.xxx, call 999 9999999 or pay with 9999 9999 9999 9999 before the evening."
GIVEN = {"to": "ann@example.org", "calls": ["030 1234567"], "card": "4111 1111 1111 1111", "why": "tea\nat five"}
TAKEN = {"to": "xxx@xxxxxxx.xxx", "calls": ["999 9999999"], "card": "9999 9999 9999 9999", "why": "tea\nat five"}
BOMB = "Take a bomb bomb today."

HEAD = TWO_TOKENS.replace("debounce: 2", "debounce: 1")


def events_of(body: str) -> list[dict[str, Any]]:
    lines = (line.removeprefix("data: ") for line in body.splitlines() if line.startswith("data: "))
    return [json.loads(line) for line in lines if line != "[DONE]"]


def no_planted(told: str) -> bool:
    return not any(one in told for one in PLANTED)


# --- the doors ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Door:
    """How one protocol says the same: a prompt, an answer whole and in pieces, and what a client reads of it."""

    path: str
    asks: Callable[[str], dict[str, Any]]
    asked: Callable[[dict[str, Any]], Any]
    whole: Callable[[str], Reply]
    stream: Callable[[list[str]], Reply]
    reads_whole: Callable[[dict[str, Any]], str]
    reads_stream: Callable[[list[dict[str, Any]]], str]
    ended: Callable[[list[dict[str, Any]]], str | None]
    field: Callable[[list[dict[str, Any]]], dict[str, Any]]


def _last_field(events: list[dict[str, Any]]) -> dict[str, Any]:
    return dict(next(one["tidegate"] for one in reversed(events) if "tidegate" in one))


def _finish(events: list[dict[str, Any]]) -> str | None:
    found = [one["choices"][0]["finish_reason"] for one in events if one.get("choices")]
    return next((one for one in reversed(found) if one), None)


CHAT = Door(
    "/v1/chat/completions",
    lambda text: {"messages": [{"role": "system", "content": TEXT}, {"role": "user", "content": text}]},
    lambda body: (body["messages"][0]["content"], body["messages"][1]["content"]),
    lambda text: Reply.json(completion(text)),
    lambda pieces: Reply.stream(*text_chunks(pieces)),
    lambda answer: answer["choices"][0]["message"]["content"],
    lambda events: "".join(one["choices"][0]["delta"].get("content") or "" for one in events if one.get("choices")),
    _finish,
    _last_field,
)


def _completion_chunks(pieces: list[str]) -> Reply:
    head = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "m"}
    told = [{**head, "choices": [{"index": 0, "text": piece, "finish_reason": None}]} for piece in pieces]
    return Reply.stream(*told, {**head, "choices": [{"index": 0, "text": "", "finish_reason": "stop"}]})


COMPLETIONS = Door(
    "/v1/completions",
    lambda text: {"prompt": [text, "and then?"]},
    lambda body: (TEXT, body["prompt"][0]),
    lambda text: Reply.json(text_completion(text, "fine")),
    _completion_chunks,
    lambda answer: answer["choices"][0]["text"],
    lambda events: "".join(one["choices"][0]["text"] for one in events if one.get("choices")),
    _finish,
    _last_field,
)


def _message_text(events: list[dict[str, Any]]) -> str:
    deltas = (one["delta"] for one in events if one["type"] == "content_block_delta")
    return "".join(one.get("text", "") for one in deltas)


MESSAGES = Door(
    "/v1/messages",
    lambda text: {"system": TEXT, "max_tokens": 9, "messages": [{"role": "user", "content": text}]},
    lambda body: (body["system"], body["messages"][0]["content"]),
    lambda text: Reply.json(wire.message(text)),
    lambda pieces: wire.reply(wire.start(), *wire.text(0, *pieces), *wire.end()),
    lambda answer: "".join(one["text"] for one in answer["content"]),
    _message_text,
    lambda events: next((one["delta"]["stop_reason"] for one in events if one["type"] == "message_delta"), None),
    _last_field,
)


def _pieces_of(pieces: list[str]) -> Callable[[str], list[str]]:
    return lambda text: pieces if text == "".join(pieces) else [text]


RESPONSES = Door(
    "/v1/responses",
    lambda text: {"instructions": TEXT, "input": text},
    lambda body: (body["instructions"], body["input"]),
    lambda text: Reply.json(response(text)),
    lambda pieces: Reply.stream(*response_events("".join(pieces), cut=_pieces_of(pieces)), done=False),
    lambda answer: "".join(part["text"] for item in answer["output"] for part in item["content"]),
    lambda events: "".join(one["delta"] for one in events if one["type"] == "response.output_text.delta"),
    lambda events: events[-1]["type"],
    lambda events: dict(events[-1]["response"]["tidegate"]),
)

DOORS = {"chat": CHAT, "completions": COMPLETIONS, "messages": MESSAGES, "responses": RESPONSES}
FILTERED = {
    "chat": "content_filter",
    "completions": "content_filter",
    "messages": "refusal",
    "responses": "response.incomplete",
}
GOOD = {"chat": "stop", "completions": "stop", "messages": "end_turn", "responses": "response.completed"}
each_door = pytest.mark.parametrize("name", DOORS)


class Running:
    def __init__(self, url: str, upstream: FakeUpstream, record: Record, guard: FakeStreamGuard) -> None:
        self.url = url
        self.upstream = upstream
        self.record = record
        self.guard = guard

    def ask(self, path: str, body: Mapping[str, Any]) -> httpx.Response:
        answer = httpx.post(f"{self.url}{path}", json={"model": "m", **body}, timeout=PATIENCE_S)
        assert answer.status_code == 200, answer.text
        return answer

    def whole(self, door: Door, text: str) -> dict[str, Any]:
        self.upstream.reply = door.whole(text)
        return dict(self.ask(door.path, door.asks("hi")).json())

    def stream(self, door: Door, pieces: list[str]) -> list[dict[str, Any]]:
        self.upstream.reply = door.stream(pieces)
        body = {**door.asks("hi"), "stream": True}
        if door is COMPLETIONS:
            body["prompt"] = "hi"
        return events_of(self.ask(door.path, body).text)


@contextmanager
def running(extra: str = "", rules: str = RULES, debounce: int = 1, **options: Any) -> Iterator[Running]:
    upstream, record, guard = FakeUpstream(), Record(), Personal()
    with serving(upstream) as address:
        policy = parse_policy(HEAD.replace("debounce: 1", f"debounce: {debounce}") + extra + rules)
        app = create_app(guard=guard, policy=policy, keep=record, upstream_url=address, **options)
        with serving(app) as url:
            yield Running(url, upstream, record, guard)
    assert guard.open_sessions == 0


@pytest.fixture(scope="module")
def gateway() -> Iterator[Running]:
    with running() as made:
        yield made


# --- answers ------------------------------------------------------------------------------------------------------


@each_door
def test_no_personal_data_leaves_in_a_whole_answer_and_all_else_does(gateway: Running, name: str) -> None:
    door = DOORS[name]

    answer = gateway.whole(door, TEXT)

    assert door.reads_whole(answer) == MASKED
    assert answer["tidegate"]["action"] == "redact"
    assert answer["tidegate"]["interventions"][0]["count"] == len(PLANTED)
    assert no_planted(json.dumps(answer))


@each_door
@pytest.mark.parametrize("size", [1, 4, 17, 1000])
def test_no_personal_data_leaves_in_a_stream_however_it_is_cut(gateway: Running, name: str, size: int) -> None:
    door = DOORS[name]

    events = gateway.stream(door, cut(TEXT, range(size, len(TEXT), size)))

    assert door.reads_stream(events) == MASKED
    assert door.ended(events) == GOOD[name]
    assert door.field(events)["action"] == "redact"
    assert door.field(events)["flagged_released"] == 0
    assert no_planted(json.dumps(events))


def test_what_repeats_a_text_of_a_response_repeats_it_masked(gateway: Running) -> None:
    events = gateway.stream(RESPONSES, cut(TEXT, [12, 40]))

    told = {one["type"]: one for one in events}
    assert told["response.output_text.done"]["text"] == MASKED
    assert told["response.content_part.done"]["part"]["text"] == MASKED
    assert told["response.output_item.done"]["item"]["content"][0]["text"] == MASKED
    assert told["response.completed"]["response"]["output"][0]["content"][0]["text"] == MASKED


CALL = {"id": "fc_1", "type": "function_call", "call_id": "call_1", "name": "send", "status": "completed"}
TOOLS = [{"type": "function", "name": "send", "parameters": {}}]


def test_the_arguments_of_calls_in_a_response_stay_json(gateway: Running) -> None:
    call = {**CALL, "arguments": json.dumps(GIVEN)}
    gateway.upstream.reply = Reply.json(response(call))
    whole = gateway.ask("/v1/responses", {"input": "hi", "tools": TOOLS}).json()
    events = response_events(call, cut=lambda text: cut(text, range(7, len(text), 7)))
    gateway.upstream.reply = Reply.stream(*events, done=False)
    told = events_of(gateway.ask("/v1/responses", {"input": "hi", "tools": TOOLS, "stream": True}).text)

    assert json.loads(whole["output"][0]["arguments"]) == TAKEN
    deltas = "".join(one["delta"] for one in told if one["type"] == "response.function_call_arguments.delta")
    assert json.loads(deltas) == TAKEN
    done = next(one for one in told if one["type"] == "response.function_call_arguments.done")
    assert json.loads(done["arguments"]) == TAKEN
    assert json.loads(told[-1]["response"]["output"][0]["arguments"]) == TAKEN
    assert no_planted(json.dumps([whole, told]))


def test_the_input_of_calls_in_a_message_stays_json(gateway: Running) -> None:
    block = {"type": "tool_use", "id": "toolu_1", "name": "send", "input": GIVEN}
    asked = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9, "tools": [{"name": "send"}]}
    gateway.upstream.reply = Reply.json(wire.message(block, stop_reason="tool_use"))
    whole = gateway.ask("/v1/messages", asked).json()
    text = json.dumps(GIVEN)
    pieces = cut(text, range(7, len(text), 7))
    gateway.upstream.reply = wire.reply(wire.start(), *wire.tool_use(0, *pieces, name="send"), *wire.end("tool_use"))
    told = events_of(gateway.ask("/v1/messages", {**asked, "stream": True}).text)
    gateway.upstream.reply = wire.reply(wire.start(), *wire.block(0, block), *wire.end("tool_use"))
    at_once = events_of(gateway.ask("/v1/messages", {**asked, "stream": True}).text)

    assert whole["content"][0]["input"] == TAKEN
    deltas = (one["delta"] for one in told if one["type"] == "content_block_delta")
    assert json.loads("".join(one["partial_json"] for one in deltas)) == TAKEN
    assert at_once[1]["content_block"]["input"] == TAKEN
    assert no_planted(json.dumps([whole, told, at_once]))


CITED: dict[str, Any] = {"type": "char_location", "cited_text": TEXT, "document_index": 0, "document_title": "A list"}
FOUND = {
    "type": "web_fetch_tool_result",
    "tool_use_id": "srvtoolu_1",
    "content": {"type": "web_fetch_result", "title": "Call 030 1234567", "pages": [{"text": TEXT}, {"text": "tea"}]},
}


def test_thinking_citations_and_results_in_a_message_are_masked_in_their_place(gateway: Running) -> None:
    blocks = ({"type": "thinking", "thinking": TEXT, "signature": "c2ln"}, FOUND)
    cited = {"type": "text", "text": "See the list.", "citations": [CITED]}
    asked = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9}
    gateway.upstream.reply = Reply.json(wire.message(*blocks, cited))
    whole = gateway.ask("/v1/messages", asked).json()
    citation = {"type": "citations_delta", "citation": CITED}
    gateway.upstream.reply = wire.reply(
        wire.start(),
        *wire.thinking(0, *cut(TEXT, [20, 50])),
        *wire.block(1, FOUND),
        *wire.block(2, {"type": "text", "text": "", "citations": []}, {"type": "text_delta", "text": "See."}, citation),
        *wire.end(),
    )
    told = events_of(gateway.ask("/v1/messages", {**asked, "stream": True}).text)

    thinking, found, text = whole["content"]
    assert thinking["thinking"] == MASKED
    assert found["content"]["title"] == "Call 999 9999999"
    assert found["content"]["pages"] == [{"text": MASKED}, {"text": "tea"}]
    assert (text["text"], text["citations"]) == ("See the list.", [{**CITED, "cited_text": MASKED}])
    deltas = [one["delta"] for one in told if one["type"] == "content_block_delta"]
    assert "".join(one.get("thinking", "") for one in deltas) == MASKED
    assert next(one["citation"] for one in deltas if "citation" in one) == {**CITED, "cited_text": MASKED}
    starts = [one["content_block"] for one in told if one["type"] == "content_block_start"]
    assert starts[1] == found
    assert no_planted(json.dumps([whole, told]))


def test_an_address_over_two_blocks_of_a_message_is_masked_in_both(gateway: Running) -> None:
    gateway.upstream.reply = Reply.json(wire.message("Write to ann@exam", "ple.org soon."))

    answer = gateway.ask("/v1/messages", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9}).json()

    assert [one["text"] for one in answer["content"]] == ["Write to xxx@xxxx", "xxx.xxx soon."]


@pytest.mark.parametrize("name", ["chat", "responses"])
def test_reasoning_is_masked_as_what_it_is(gateway: Running, name: str) -> None:
    if name == "chat":
        told: dict[str, Any] = {"role": "assistant", "content": "Fine.", "reasoning_content": TEXT}
        gateway.upstream.reply = Reply.json(completion(told))
        answer = gateway.ask(CHAT.path, CHAT.asks("hi")).json()
        said = answer["choices"][0]["message"]["reasoning_content"]
    else:
        thought = {"id": "rs_1", "type": "reasoning", "summary": [{"type": "summary_text", "text": TEXT}]}
        gateway.upstream.reply = Reply.json(response(thought, "Fine."))
        answer = gateway.ask(RESPONSES.path, RESPONSES.asks("hi")).json()
        said = answer["output"][0]["summary"][0]["text"]

    assert said == MASKED
    assert no_planted(json.dumps(answer))


def test_no_log_probabilities_spell_what_a_response_masks() -> None:
    spelled = [{"token": "030 1234567", "logprob": -0.1, "bytes": None, "top_logprobs": []}]
    part = {"type": "output_text", "text": "Call 030 1234567.", "annotations": [], "logprobs": spelled}
    item = {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed", "content": [part]}
    with running("unjudged_answer: pass\n", trusted_fields=["logprobs"]) as gateway:
        gateway.upstream.reply = Reply.json(response(item))
        answer = gateway.ask(RESPONSES.path, RESPONSES.asks("hi"))
        sent = [
            {**one, "logprobs": spelled} if one["type"].startswith("response.output_text.") else one
            for one in response_events("Call 030 1234567.")
        ]
        gateway.upstream.reply = Reply.stream(*sent, done=False)
        told = gateway.ask(RESPONSES.path, {**RESPONSES.asks("hi"), "stream": True})

    assert answer.json()["output"][0]["content"][0]["text"] == "Call 999 9999999."
    assert no_planted(answer.text + told.text)


# --- prompts ------------------------------------------------------------------------------------------------------


@each_door
def test_the_upstream_gets_the_prompt_masked_and_the_operators_words_as_they_are(gateway: Running, name: str) -> None:
    door = DOORS[name]
    gateway.upstream.reply = door.whole("Fine.")
    gateway.upstream.received.clear()
    gateway.record.kept.clear()

    gateway.ask(door.path, door.asks(TEXT))

    (received,) = gateway.upstream.received
    assert door.asked(received.body) == (TEXT, MASKED)
    assert gateway.record.actions[:2] == ["redact", "allow"]


BLOCKS: list[Any] = [
    {"type": "text", "text": "Call 030 1234567", "cache_control": {"type": "ephemeral"}},
    {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "4111111111111111"}},
    {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": TEXT}, "title": "030 1234567"},
    {"type": "search_result", "source": "a list", "title": "Ann", "content": [{"type": "text", "text": TEXT}]},
    {"type": "note", "id": "note_12345678901234567890", "about": {"whom": "ann@example.org", "age": 41}},
]


def test_blocks_of_a_message_are_masked_where_their_text_stands(gateway: Running) -> None:
    gateway.upstream.reply = Reply.json(wire.message("Fine."))
    gateway.upstream.received.clear()
    used = {"type": "tool_use", "id": "toolu_01A09q90qw90lq917835lq9", "name": "send", "input": GIVEN}
    result = {"type": "tool_result", "tool_use_id": used["id"], "content": [{"type": "text", "text": TEXT}]}

    gateway.ask(
        "/v1/messages",
        {
            "max_tokens": 9,
            "metadata": {"user_id": "u-12345678"},
            "messages": [
                {"role": "user", "content": "My card is 4111 1111 1111 1111"},
                {"role": "assistant", "content": [used]},
                {"role": "user", "content": [result, *BLOCKS]},
            ],
        },
    )

    (received,) = gateway.upstream.received
    first, second, third = received.body["messages"]
    assert first["content"] == "My card is 9999 9999 9999 9999"
    assert second["content"] == [{**used, "input": TAKEN}]
    assert third["content"][0] == {**result, "content": [{"type": "text", "text": MASKED}]}
    text, image, document, search, note = third["content"][1:]
    assert text == {**BLOCKS[0], "text": "Call 999 9999999"}
    assert image == BLOCKS[1]
    assert document["source"] == {"type": "text", "media_type": "text/plain", "data": MASKED}
    assert document["title"] == "999 9999999"
    assert search["content"] == [{"type": "text", "text": MASKED}]
    assert note == {**BLOCKS[4], "about": {"whom": "xxx@xxxxxxx.xxx", "age": 41}}
    assert received.body["metadata"] == {"user_id": "u-12345678"}


def test_items_of_a_response_request_are_masked_where_their_text_stands(gateway: Running) -> None:
    gateway.upstream.reply = Reply.json(response("Fine."))
    gateway.upstream.received.clear()
    call = {**CALL, "call_id": "call_12345678901234567890123456", "arguments": json.dumps(GIVEN)}
    picture = {"type": "input_image", "image_url": "data:image/png;base64,4111111111111111"}

    gateway.ask(
        "/v1/responses",
        {
            "tools": TOOLS,
            "prompt": {"id": "pmpt_12345678901234567890123456", "variables": {"who": "ann@example.org"}},
            "input": [
                {"role": "developer", "content": "Ours is 0800 1234567."},
                {"role": "user", "content": "My card is 4111 1111 1111 1111"},
                call,
                {"type": "function_call_output", "call_id": call["call_id"], "output": [picture, {"text": TEXT}]},
                {"role": "user", "content": [{"type": "input_text", "text": TEXT}, picture]},
            ],
        },
    )

    (received,) = gateway.upstream.received
    system, first, called, output, last = received.body["input"]
    assert received.body["prompt"] == {
        "id": "pmpt_12345678901234567890123456",
        "variables": {"who": "xxx@xxxxxxx.xxx"},
    }
    assert system["content"] == "Ours is 0800 1234567."
    assert first["content"] == "My card is 9999 9999 9999 9999"
    assert (called["call_id"], json.loads(called["arguments"])) == (call["call_id"], TAKEN)
    assert output["output"] == [picture, {"text": MASKED}]
    assert last["content"] == [{"type": "input_text", "text": MASKED}, picture]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (
            "/v1/chat/completions",
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": one} for one in ("ann@exam", "ple.org")]}
                ]
            },
        ),
        (
            "/v1/messages",
            {
                "max_tokens": 9,
                "messages": [{"role": "user", "content": [{"type": "note", "ann@example.org or 030 1234567": "x"}]}],
            },
        ),
        ("/v1/responses", {"input": [{"type": "odd", "call 030 1234567 or 040 1234567": "x"}]}),
    ],
    ids=["an address over two parts", "a name of a field", "a name of a field of an item"],
)
def test_a_prompt_of_which_something_personal_would_be_left_is_refused(
    gateway: Running, path: str, body: dict[str, Any]
) -> None:
    gateway.upstream.received.clear()

    answer = gateway.ask(path, body)

    assert answer.json()["tidegate"]["action"] == "block"
    assert gateway.upstream.received == []


def test_escapes_hide_nothing_in_what_a_tool_was_asked_and_said(gateway: Running) -> None:
    hidden = '{"to": "\\u0061nn\\u0040example.org", "why": "tea\\nat five"}'
    call = {"id": "call_1", "type": "function", "function": {"name": "send", "arguments": hidden}}
    gateway.upstream.reply = Reply.json(completion("Fine."))
    gateway.upstream.received.clear()

    gateway.ask(
        CHAT.path,
        {
            "messages": [
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "call_1", "content": hidden},
            ]
        },
    )

    (received,) = gateway.upstream.received
    _, called, told = received.body["messages"]
    for text in (called["tool_calls"][0]["function"]["arguments"], told["content"]):
        assert json.loads(text) == {"to": "xxx@xxxxxxx.xxx", "why": "tea\nat five"}


def test_only_a_word_for_programs_that_was_to_be_taken_out_is_masked() -> None:
    body = {"messages": [{"role": "user", "name": "ann@example.org", "content": "hi"}]}

    assert masked_body(body, ())[0] == body
    assert masked_body(body, (), {"messages[0].name"})[0]["messages"][0]["name"] == "xxx@xxxxxxx.xxx"


def test_what_is_left_of_a_text_is_seen() -> None:
    before = Turn(Role.ASSISTANT, TEXT, "", (ToolCall("send", json.dumps(GIVEN)),))

    assert is_out(before, Turn(Role.ASSISTANT, MASKED, "", (ToolCall("send", json.dumps(TAKEN)),)))
    assert not is_out(before, Turn(Role.ASSISTANT, MASKED, "", (ToolCall("send", json.dumps(GIVEN)),)))
    assert not is_out(before, Turn(Role.ASSISTANT, MASKED))
    assert is_out(Turn(Role.USER, "call 999 9999999"), Turn(Role.USER, "call 999 9999999"))


# --- cut, replace, confirm, hold ----------------------------------------------------------------------------------


@each_door
@pytest.mark.parametrize(("word", "behind"), [("cut", ""), ("replace", "\n\nNot here.")])
def test_a_stopped_stream_ends_as_the_policy_says(name: str, word: str, behind: str) -> None:
    door = DOORS[name]
    with running(f"intervention: {word}\n") as gateway:
        events = gateway.stream(door, cut(BOMB, [6, 12]))

    # in a response the message is an item of its own, with no text before it
    assert door.reads_stream(events) == "Take a" + (behind.lstrip() if name == "responses" else behind)
    assert door.ended(events) == FILTERED[name]
    assert door.field(events)["interventions"][-1]["kind"] == word


@each_door
@pytest.mark.parametrize(("word", "said"), [("cut", ""), ("replace", "Not here."), ("rollback", "Not here.")])
def test_a_stopped_answer_is_empty_or_the_message(name: str, word: str, said: str) -> None:
    door = DOORS[name]
    with running(f"intervention: {word}\n") as gateway:
        answer = gateway.whole(door, BOMB)

    assert door.reads_whole(answer) == said
    assert answer["tidegate"]["action"] == "block"
    assert answer["tidegate"]["interventions"][0]["kind"] == ("cut" if word == "cut" else "replace")
    if name in ("messages", "responses"):
        assert {"messages": answer.get("stop_reason"), "responses": answer.get("status")}[name] in (
            "refusal",
            "incomplete",
        )


async def test_the_message_is_in_the_language_of_the_scope_at_every_door() -> None:
    async def keep(decision: Decision, conversation: Conversation) -> None:
        return None

    policy = parse_policy(HEAD + "intervention: replace\n" + RULES)
    scope = Scope(language="de-AT")
    judging = Judging(Personal(), policy, scope, Conversation.of("hi"), keep)
    whole, _ = await judge_message(wire.message(BOMB), judging)
    answered, _ = await judge_response(response(BOMB), judging, {})
    told: dict[str, str] = {}
    for name, stream in (("messages", MessageStream(judging)), ("responses", ResponseStream(judging, {}))):
        sent = b""
        for act in DOORS[name].stream([BOMB]).acts:
            if not stream.done and isinstance(act, Send):
                sent += await stream.feed(act.data)
        told[name] = DOORS[name].reads_stream(events_of(sent.decode()))

    assert whole["content"][0]["text"] == whole["stop_details"]["explanation"] == "Nicht hier."
    assert RESPONSES.reads_whole(answered) == "Nicht hier."
    assert told == {"messages": "Take a\n\nNicht hier.", "responses": "Take aNicht hier."}


@each_door
@pytest.mark.parametrize("strong", [True, False])
def test_an_alarm_is_confirmed_before_it_stops_a_stream(name: str, strong: bool) -> None:
    door = DOORS[name]
    confirmer = FakeGuard(name="strong/1") if strong else FakeGuard(unsafe={}, name="weak/1")
    with running("confirm: true\n", confirmer=confirmer) as gateway:
        events = gateway.stream(door, cut(BOMB, [6, 12]))

    assert door.reads_stream(events) == ("Take a" if strong else BOMB)
    assert door.ended(events) == (FILTERED if strong else GOOD)[name]
    assert door.field(events)["interventions"][0]["outcome"] == ("confirmed" if strong else "overruled")


@each_door
def test_text_that_leaves_first_is_counted(name: str) -> None:
    door = DOORS[name]
    with running("hold: release_first\n") as gateway:
        gateway.guard.delay_s = 0.05
        field = door.field(gateway.stream(door, ["Take a ", "bomb bomb ", "today."]))

    assert field["action"] == "block"
    assert field["flagged_released"] > 0
    assert any(part["state"] == "released_first" for part in field["coverage"])


@each_door
def test_text_is_not_held_for_longer_than_the_policy_allows(name: str) -> None:
    door = DOORS[name]
    with running("hold: {delay_ms: 50}\n", debounce=2) as gateway:
        acts = door.stream(["one bomb ", "x"]).acts
        at = next(place for place, act in enumerate(acts) if b"one bomb" in getattr(act, "data", b""))
        gateway.upstream.reply = Reply((*acts[: at + 1], Hang()), headers={"content-type": "text/event-stream"})
        body = {**door.asks("hi"), "stream": True} | ({"prompt": "hi"} if door is COMPLETIONS else {})
        events = events_of(gateway.ask(door.path, body).text)

    assert door.reads_stream(events) == "one"
    assert door.ended(events) == FILTERED[name]
    assert door.field(events)["failure"]["kind"] == "GuardTimeout"


# --- the doors of those who hold the text themselves --------------------------------------------------------------


def put(text: str, masks: list[dict[str, Any]]) -> str:
    for one in masks:
        assert len(one["text"]) == one["end"] - one["start"]
        text = text[: one["start"]] + one["text"] + text[one["end"] :]
    return text


@pytest.mark.parametrize("before", [[], [{"role": "user", "content": "hi"}]], ids=["a prompt", "an answer"])
def test_guard_says_what_is_to_be_masked(gateway: Running, before: list[dict[str, Any]]) -> None:
    role = "assistant" if before else "user"
    turn: dict[str, Any] = {"role": role, "content": TEXT}
    if before:
        turn |= {"reasoning": "030 1234567?", "tool_calls": [{"name": "send", "arguments": json.dumps(GIVEN)}]}
    said = httpx.post(f"{gateway.url}/v1/guard", json={"turns": [*before, turn]}).json()

    path = f"turns[{len(before)}]"
    masks: dict[str, list[dict[str, Any]]] = {}
    for one in said["masks"]:
        masks.setdefault(one["path"], []).append(one)
    assert said["action"] == "redact"
    assert put(TEXT, masks[f"{path}.content"]) == MASKED
    if before:
        assert put("030 1234567?", masks[f"{path}.reasoning"]) == "999 9999999?"
        assert json.loads(put(json.dumps(GIVEN), masks[f"{path}.tool_calls[0].arguments"])) == TAKEN


async def lived(url: str, pieces: list[str], **options: Any) -> tuple[str, str, dict[str, Any]]:
    """What a client of ``/v1/live`` lets out, what it lets out as it goes, and the last frame."""
    address = url.replace("http", "ws", 1) + "/v1/live"
    async with connect(address, subprotocols=[Subprotocol(PROTOCOL)]) as socket, asyncio.timeout(PATIENCE_S):
        await socket.send(json.dumps({"type": "open", "stream": 1, "tokens": False, **options}))
        for piece in pieces:
            await socket.send(json.dumps({"type": "text", "stream": 1, "text": piece}))
        await socket.send(json.dumps({"type": "finish", "stream": 1}))
        text, out, known = "".join(pieces), "", 0
        while True:
            frame = json.loads(await socket.recv())
            if frame["type"] not in ("step", "end"):
                continue
            assert ("masks" in frame) == bool(options.get("masks"))
            for one in frame.get("masks", ()):
                assert known <= one["start"] < one["end"] <= frame["released"]
            text = put(text, frame.get("masks", []))
            out += text[known : frame["released"]]
            known = frame["released"]
            if frame["type"] == "end":
                return text[:known], out, frame


@pytest.mark.parametrize("size", [1, 5, 1000])
async def test_live_says_what_stands_in_the_place_of_what_leaves(gateway: Running, size: int) -> None:
    whole, out, last = await lived(gateway.url, cut(TEXT, range(size, len(TEXT), size)), masks=True)

    assert whole == out == MASKED
    assert (last["reason"], last["decision"]["action"]) == ("finished", "redact")


async def test_live_stops_the_stream_of_a_client_that_does_not_mask(gateway: Running) -> None:
    _, out, last = await lived(gateway.url, cut(TEXT, [10, 30]))

    assert out == "Write to"
    assert (last["reason"], last["decision"]["action"]) == ("blocked", "block")


async def test_live_has_alarms_confirmed_and_lets_text_leave_first() -> None:
    with running("confirm: true\n", confirmer=FakeGuard(unsafe={}, name="weak/1")) as gateway:
        _, out, last = await lived(gateway.url, cut(BOMB, [6, 12]))
    with running("hold: release_first\n") as gateway:
        gateway.guard.delay_s = 0.05
        _, first, stopped = await lived(gateway.url, cut(BOMB, [6, 12]))

    assert out == BOMB
    assert last["decision"]["interventions"][0]["outcome"] == "overruled"
    assert stopped["decision"]["action"] == "block"
    assert first.startswith("Take a bomb")


async def test_live_holds_text_for_no_longer_than_the_policy_allows() -> None:
    with running("hold: {delay_ms: 50}\n", debounce=2) as gateway:
        address = gateway.url.replace("http", "ws", 1) + "/v1/live"
        async with connect(address, subprotocols=[Subprotocol(PROTOCOL)]) as socket, asyncio.timeout(PATIENCE_S):
            await socket.send(json.dumps({"type": "open", "stream": 1}))
            await socket.send(json.dumps({"type": "text", "stream": 1, "text": "one bomb "}))
            frame: dict[str, Any] = {"type": "hello"}
            while frame["type"] != "end":
                frame = json.loads(await socket.recv())

    assert (frame["reason"], frame["released"]) == ("blocked", 3)
    assert frame["failure"]["kind"] == "GuardTimeout"
