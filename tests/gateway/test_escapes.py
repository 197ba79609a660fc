"""Letters that are written as JSON escapes hide nothing, in calls and in results; what leaves means the same."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import pytest
from websockets.asyncio.client import connect
from websockets.typing import Subprotocol

from gateway.messages_wire import message
from serving import PATIENCE_S, Record, make_policy, serving
from tidegate.gateway.app import create_app
from tidegate.gateway.live_frames import PROTOCOL
from tidegate.testing import FakeStreamGuard, FakeUpstream, Reply, chunk, completion
from tidegate.types import Channel

HIDDEN = r'{"q": "a \u0062omb \u0062omb now"}'
PLAIN = r'{"q": "\u0070lain \ud83d\ude00 \u005c \u000a \u0022 \/ é \\u0062 \u00e9\u0000 end"}'
HIDES = "the escapes hid the word"


@contextlib.contextmanager
def a_gateway(url: str, **changes: Any) -> Iterator[tuple[httpx.Client, Record, FakeStreamGuard]]:
    record, guard = Record(), FakeStreamGuard()
    app = create_app(guard=guard, policy=make_policy(**changes), keep=record, upstream_url=f"{url}/v1")
    with serving(app) as gateway, httpx.Client(base_url=gateway) as client:
        yield client, record, guard


def cut(text: str, size: int) -> list[str]:
    return [text[place : place + size] for place in range(0, len(text), size)]


# --- answers ------------------------------------------------------------------------------------------------------


def chat_call(*pieces: str) -> list[dict[str, Any]]:
    call = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "find", "arguments": ""}}
    chunks = [chunk({"role": "assistant", "tool_calls": [call]})]
    chunks += [chunk({"tool_calls": [{"index": 0, "function": {"arguments": piece}}]}) for piece in pieces]
    return [*chunks, chunk(finish_reason="tool_calls")]


def responses_call(*pieces: str) -> list[dict[str, Any]]:
    whole = "".join(pieces)
    item = {"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": "find", "arguments": "", "status": "in_progress"}  # fmt: skip  # noqa: E501
    done = {**item, "arguments": whole, "status": "completed"}
    at = {"item_id": "fc_1", "output_index": 0}
    response = {"id": "resp_1", "object": "response", "created_at": 1, "model": "m", "status": "completed"}
    kind = "response.function_call_arguments"
    return [
        {"type": "response.created", "response": {**response, "status": "in_progress", "output": []}},
        {"type": "response.output_item.added", "output_index": 0, "item": item},
        *({"type": f"{kind}.delta", **at, "delta": piece} for piece in pieces),
        {"type": f"{kind}.done", **at, "arguments": whole},
        {"type": "response.output_item.done", "output_index": 0, "item": done},
        {"type": "response.completed", "response": {**response, "output": [done]}},
    ]


TOOLS = [{"type": "function", "name": "find", "function": {"name": "find"}}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "find it"}]},
    "/v1/responses": {"input": "find it"},
}
CALLS = {"/v1/chat/completions": chat_call, "/v1/responses": responses_call}


def events_in(answer: httpx.Response) -> list[dict[str, Any]]:
    lines = (line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {"))
    return [json.loads(line) for line in lines]


def arguments_in(path: str, events: Sequence[dict[str, Any]]) -> list[str]:
    """The arguments as the deltas say them, then as every event repeats them."""
    if path == "/v1/responses":
        deltas = "".join(one["delta"] for one in events if one["type"].endswith("arguments.delta"))
        repeated = [one["arguments"] for one in events if one["type"].endswith("arguments.done")]
        repeated += [one["item"]["arguments"] for one in events if one["type"] == "response.output_item.done"]
        ends = [one["response"] for one in events if one["type"] == "response.completed"]
        return [deltas, *repeated, *(item["arguments"] for end in ends for item in end["output"])]
    calls = [call for one in events for choice in one["choices"] for call in choice["delta"].get("tool_calls", ())]
    return ["".join(call["function"].get("arguments", "") for call in calls if "function" in call)]


@pytest.mark.parametrize("path", sorted(BODIES))
def test_a_streaming_call_hides_nothing_and_means_the_same_however_it_is_cut(
    path: str, upstream: FakeUpstream, upstream_url: str
) -> None:
    body = {"model": "m", "stream": True, "tools": TOOLS, **BODIES[path]}
    with a_gateway(upstream_url) as (client, record, _):
        for size in (1, 2, 3, 5, 7, 100):
            upstream.reply = Reply.stream(*CALLS[path](*cut(HIDDEN, size)), done=path != "/v1/responses")
            blocked = client.post(path, json=body)
            assert record.actions[-1] == "block", HIDES
            assert "omb" not in blocked.text

            upstream.reply = Reply.stream(*CALLS[path](*cut(PLAIN, size)), done=path != "/v1/responses")
            passed = arguments_in(path, events_in(client.post(path, json=body)))
            assert record.actions[-1] == "allow"
            assert [json.loads(one) for one in passed] == [json.loads(PLAIN)] * len(passed)
            assert set(passed) == {passed[0]}
            assert len(passed) == (4 if path == "/v1/responses" else 1)


def test_an_escape_that_is_never_completed_leaves_as_it_came(upstream: FakeUpstream, upstream_url: str) -> None:
    path = "/v1/chat/completions"
    upstream.reply = Reply.stream(*chat_call('{"q": "b', "\\u00"))
    with a_gateway(upstream_url) as (client, _, _):
        answer = client.post(path, json={"model": "m", "stream": True, "tools": TOOLS, **BODIES[path]})

    assert arguments_in(path, events_in(answer)) == ['{"q": "b\\u00']


WHOLE: dict[str, Any] = {
    "/v1/chat/completions": lambda text: completion(
        {
            "content": None,
            "tool_calls": [{"id": "c", "type": "function", "function": {"name": "find", "arguments": text}}],
        }
    ),
    "/v1/responses": lambda text: responses_call(text)[-1]["response"],
}


@pytest.mark.parametrize("path", sorted(WHOLE))
def test_a_whole_call_hides_nothing_and_means_the_same(path: str, upstream: FakeUpstream, upstream_url: str) -> None:
    body = {"model": "m", "tools": TOOLS, **BODIES[path]}
    with a_gateway(upstream_url) as (client, record, _):
        upstream.reply = Reply.json(WHOLE[path](HIDDEN))
        blocked = client.post(path, json=body)
        assert record.actions[-1] == "block", HIDES
        assert "omb" not in blocked.text

        upstream.reply = Reply.json(WHOLE[path](PLAIN))
        answer = client.post(path, json=body).json()
        assert record.actions[-1] == "allow"
    call = (
        answer["output"][0] if path == "/v1/responses" else answer["choices"][0]["message"]["tool_calls"][0]["function"]
    )
    assert json.loads(call["arguments"]) == json.loads(PLAIN)


def test_free_text_of_a_custom_tool_stays_as_it_is(upstream: FakeUpstream, upstream_url: str) -> None:
    """It is no JSON: there an escape is six characters, and means them."""
    call = {"id": "c", "type": "custom", "custom": {"name": "run", "input": r"print('\u0062read')"}}
    upstream.reply = Reply.json(completion({"content": None, "tool_calls": [call]}))
    with a_gateway(upstream_url) as (client, _, _):
        answer = client.post("/v1/chat/completions", json={"model": "m", **BODIES["/v1/chat/completions"]}).json()

    assert answer["choices"][0]["message"]["tool_calls"][0]["custom"]["input"] == r"print('\u0062read')"


# --- requests -----------------------------------------------------------------------------------------------------


CALL = {"id": "c1", "type": "function", "function": {"name": "find", "arguments": HIDDEN}}
USER = {"role": "user", "content": "find it"}
FOUND = {"role": "tool", "tool_call_id": "c1", "content": HIDDEN}
ITEM = {"type": "function_call", "call_id": "c1", "name": "find", "arguments": HIDDEN}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": HIDDEN}
USED = {"type": "tool_use", "id": "t1", "name": "find", "input": {"q": "bread"}}
RESULT = {"type": "tool_result", "tool_use_id": "t1", "content": HIDDEN}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}]}),
        ("/v1/chat/completions", {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}, FOUND]}),
        ("/v1/chat/completions", {"messages": [USER, {"role": "user", "content": "hi", "tool_calls": [CALL]}]}),
        ("/v1/responses", {"input": [USER, ITEM]}),
        ("/v1/responses", {"input": [USER, ITEM, OUTPUT]}),
        ("/v1/responses", {"input": [USER, {**OUTPUT, "output": [{"type": "input_text", "text": HIDDEN}]}]}),
        (
            "/v1/messages",
            {"messages": [USER, {"role": "assistant", "content": [USED]}, {"role": "user", "content": [RESULT]}]},
        ),
    ],
)
def test_a_call_or_a_result_in_a_request_hides_nothing(
    path: str, body: dict[str, Any], upstream: FakeUpstream, upstream_url: str
) -> None:
    upstream.reply = Reply.json(message("Fine.") if path == "/v1/messages" else completion("Fine."))
    with a_gateway(upstream_url) as (client, record, guard):
        answer = client.post(path, json={"model": "m", "max_tokens": 9, "tools": TOOLS[:0], **body})

    assert answer.status_code == 200, answer.text
    assert record.actions[0] == "block", HIDES
    judged = [part for part in record.kept[0][0].coverage if part.channel in (Channel.TOOL_CALL, Channel.TOOL_RESULT)]
    assert any(part.state.value == "judged" for part in judged)
    assert not any("\\u0062" in str(one.turns[-1]) for one in guard.judged)


def test_what_goes_on_to_the_upstream_is_what_the_client_sent(upstream: FakeUpstream, upstream_url: str) -> None:
    plain = HIDDEN.replace("omb", "read")
    data = json.dumps({"model": "m", "messages": [USER, {**FOUND, "content": plain}]}).encode()
    with a_gateway(upstream_url) as (client, _, _):
        client.post("/v1/chat/completions", content=data)

    assert upstream.received[0].data == data


# --- the doors of those who hold the text themselves --------------------------------------------------------------

WRITTEN = r'{"what": "\u0061 \u0062omb bom\u0062 \ud83c\udf5e and more"}'
MASKING = """
name: masks
on_guard_error: block
otherwise: allow
debounce: 1
rules:
  - {name: personal, severity: unsafe, categories: [PII], action: redact}
"""
READ = json.dumps({"what": "a bomb bomb 🍞 and more"}, ensure_ascii=False)


async def live_frames(url: str, pieces: Sequence[str], **opened: Any) -> list[dict[str, Any]]:
    """All frames of a stream for the arguments of a call."""
    address = url.replace("http", "ws", 1) + "/v1/live"
    async with connect(address, subprotocols=[Subprotocol(PROTOCOL)]) as socket, asyncio.timeout(PATIENCE_S):
        await socket.recv()
        frames = [{"type": "text", "text": piece} for piece in pieces]
        for frame in ({"type": "open", "channel": "tool_call", **opened}, *frames, {"type": "finish"}):
            await socket.send(json.dumps({"stream": 1, **frame}))
        told: list[dict[str, Any]] = []
        while not told or told[-1]["type"] not in ("end", "error"):
            told.append(json.loads(await socket.recv()))
        return told


@pytest.mark.parametrize("size", [1, 2, 5, 1_000])
async def test_a_live_call_hides_nothing_however_it_is_cut_and_places_are_those_of_the_text_given(size: int) -> None:
    record = Record()
    with serving(create_app(guard=FakeStreamGuard(), policy=make_policy(), keep=record)) as url:
        stopped = (await live_frames(url, cut(WRITTEN, size)))[-1]
        watched = await live_frames(url, cut(WRITTEN, size), observe=True)

    bomb = WRITTEN.index(r" \u0062omb")
    assert (stopped["reason"], stopped["released"]) == ("blocked", bomb)
    assert stopped["decision"]["span"] == {"start": bomb, "end": WRITTEN.index(r" \ud83c")}
    last = watched[-1]
    assert last["taken"] == last["judged"] == last["released"] == len(WRITTEN)
    tokens = [token for frame in watched for token in frame.get("tokens", ())]
    unsafe = [WRITTEN[token["start"] : token["end"]] for token in tokens if token["severity"] == "unsafe"]
    assert unsafe[:2] == [r" \u0062omb", r" bom\u0062"]
    assert record.kept[1][1].turns[-1].tool_calls[0].arguments == READ


async def test_an_escape_that_is_never_completed_is_released_at_the_end_of_a_live_call() -> None:
    with serving(create_app(guard=FakeStreamGuard(), policy=make_policy())) as url:
        frames = await live_frames(url, ["bread \\ud83c", "\\u00"])

    assert [frame["released"] for frame in frames[1:-1]][-1] <= len("bread ")
    assert frames[-1]["released"] == frames[-1]["judged"] == len("bread \\ud83c\\u00")


@pytest.mark.parametrize("size", [1, 7, 1_000])
async def test_masks_of_a_live_call_are_as_long_as_the_escapes_that_they_cover(size: int) -> None:
    text = r'{"to": "\u0062ob\u0040example.org", "n": 1}'
    policy = make_policy(MASKING)
    guard = FakeStreamGuard(unsafe={"bob@example.org": "PII"})
    with serving(create_app(guard=guard, policy=policy)) as url:
        frames = await live_frames(url, cut(text, size), masks=True)

    masked = text
    for mask in [mask for frame in frames for mask in frame.get("masks", ())]:
        assert len(mask["text"]) == mask["end"] - mask["start"]
        masked = masked[: mask["start"]] + mask["text"] + masked[mask["end"] :]
    assert frames[-1]["released"] == len(text)
    assert json.loads(masked) == {"to": "xxx@xxxxxxx.xxx", "n": 1}


def test_the_guards_own_door_reads_calls_and_results_as_a_program_will() -> None:
    call = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": WRITTEN}]}
    found = {"role": "tool", "content": WRITTEN}
    guard = FakeStreamGuard()
    with serving(create_app(guard=guard, policy=make_policy())) as url:
        answers = [
            httpx.post(f"{url}/v1/guard", json={"turns": turns, "tokens": turns[-1] is call}).json()
            for turns in ([call], [found], [call, {"role": "user", "content": "so"}])
        ]

    assert [answer["action"] for answer in answers] == ["block", "block", "allow"]
    tokens = answers[0]["tokens"][0]["tokens"]
    unsafe = [WRITTEN[token["start"] : token["end"]] for token in tokens if token["severity"] == "unsafe"]
    assert unsafe[:2] == [r" \u0062omb", r" bom\u0062"]
    assert guard.judged[-1].turns[0].tool_calls[0].arguments == READ
