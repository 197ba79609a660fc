"""Chat completions, seen by the real OpenAI client through a gateway in a process of its own."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from starlette.requests import Request

from serving import Gateway, Record, make_policy, serving, until, wait_until
from tidegate.gateway.app import create_app
from tidegate.gateway.chat import ChatDoor
from tidegate.gateway.exchange import Behind, Endpoint
from tidegate.gateway.telemetry import Telemetry
from tidegate.gateway.upstream import Upstream
from tidegate.testing import (
    Die,
    FakeStreamGuard,
    FakeUpstream,
    Hang,
    Pause,
    Reply,
    chunk,
    completion,
    text_chunks,
)
from tidegate.types import Channel, Conversation, Role, ToolCall, Turn

HELLO: list[Any] = [{"role": "user", "content": "Say hello"}]


@pytest.fixture
def client(gateway: Gateway) -> Any:
    with OpenAI(base_url=gateway.base_url, api_key="sk-client", max_retries=0) as made:
        yield made


def ask(client: OpenAI, **options: Any) -> Any:
    return client.chat.completions.create(**{"model": "fake-model", "messages": HELLO, **options})


def streamed(client: OpenAI, **options: Any) -> tuple[dict[int, str], dict[int, str | None], list[Any]]:
    """The text and the finish reason of each choice, and all chunks."""
    chunks = list(ask(client, stream=True, **options))
    texts: dict[int, str] = {}
    reasons: dict[int, str | None] = {}
    for part in chunks:
        for choice in part.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
    return texts, reasons, chunks


def interrupted(client: OpenAI) -> tuple[str, openai.APIError]:
    """The text that arrived of a stream that ends with an error, and the error."""
    said: list[str] = []

    def read() -> None:
        said.extend(part.choices[0].delta.content or "" for part in ask(client, stream=True))

    with pytest.raises(openai.APIError) as caught:
        read()
    return "".join(said), caught.value


# --- safe exchanges -----------------------------------------------------------------------------------------------


def test_a_safe_answer_passes_whole(client: OpenAI, gateway: Gateway, upstream: FakeUpstream) -> None:
    """What the upstream says arrives as it is, and both decisions are kept before the client has the answer."""
    answer = ask(client)

    assert answer.choices[0].message.content == "Hello there."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == 8
    assert answer.tidegate["action"] == "allow"
    assert [row["action"] for row in gateway.kept()] == ["allow", "allow"]
    assert upstream.received[0].headers["authorization"] == "Bearer sk-client"


def test_a_safe_answer_passes_streaming(client: OpenAI, gateway: Gateway, upstream: FakeUpstream) -> None:
    """Every word arrives, the role comes first, the usage last, and the end has the decision."""
    usage = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": []}
    upstream.reply = Reply.stream(
        *text_chunks(["Hel", "lo the", "re, ", "friend."]), {**usage, "usage": {"total_tokens": 7, "odd": 0.125}}
    )

    texts, reasons, chunks = streamed(client, stream_options={"include_usage": True})

    assert texts == {0: "Hello there, friend."}
    assert reasons == {0: "stop"}
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage.total_tokens == 7
    assert chunks[-1].usage.odd == 0.125
    ended = next(part for part in chunks if part.choices and part.choices[0].finish_reason)
    assert ended.tidegate["action"] == "allow"
    assert ended.tidegate["coverage"] == [
        {"path": "choices[0].content", "channel": "answer", "state": "judged", "characters": 20}
    ]
    assert [row["action"] for row in gateway.kept()] == ["allow", "allow"]
    assert gateway.kept()[1]["content"] == "Hello there, friend."


async def test_the_async_client_streams(gateway: Gateway, upstream: FakeUpstream) -> None:
    """The async client of OpenAI gets the same."""
    upstream.reply = Reply.stream(*text_chunks(["one ", "two ", "three"]))

    async with AsyncOpenAI(base_url=gateway.base_url, api_key="sk", max_retries=0) as client:
        stream = await client.chat.completions.create(model="m", messages=HELLO, stream=True)
        text = "".join([part.choices[0].delta.content or "" async for part in stream])

    assert text == "one two three"


# --- blocked answers ----------------------------------------------------------------------------------------------


class Doors:
    """An upstream that remembers from which ports it was called."""

    def __init__(self, upstream: FakeUpstream) -> None:
        self.upstream = upstream
        self.callers: list[int] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            self.callers.append(scope["client"][1])
        await self.upstream(scope, receive, send)


def test_answers_that_end_by_themselves_leave_their_connection_to_the_next() -> None:
    doors = Doors(FakeUpstream(Reply.stream(*text_chunks(["Hello", " there."]))))
    with serving(doors) as upstream_url:
        app = create_app(guard=FakeStreamGuard(), policy=make_policy(), upstream_url=upstream_url)
        with serving(app) as url, OpenAI(base_url=f"{url}/v1", api_key="sk", max_retries=0) as client:
            for _ in range(3):
                assert streamed(client)[0] == {0: "Hello there."}
                wait_until(lambda: doors.upstream.open_requests == 0, "the upstream to finish")
                time.sleep(0.05)
    assert len(doors.callers) == 3
    assert len(set(doors.callers)) == 1


def test_an_answer_that_goes_on_after_its_end_is_given_up() -> None:
    endless = Reply.stream(*text_chunks(["Hello."]), b"data: [DONE]\n\n", *([b": more\n\n" * 500] * 20), Hang())
    upstream = FakeUpstream(endless)
    with serving(upstream) as upstream_url:
        app = create_app(guard=FakeStreamGuard(), policy=make_policy(), upstream_url=upstream_url)
        with serving(app) as url, OpenAI(base_url=f"{url}/v1", api_key="sk", max_retries=0) as client:
            assert streamed(client)[0] == {0: "Hello."}
            wait_until(lambda: upstream.received[0].cancelled, "the upstream to see that nobody reads")


def test_an_unsafe_stream_is_cut_before_its_harm(client: OpenAI, gateway: Gateway, upstream: FakeUpstream) -> None:
    """The safe beginning arrives, nothing of the rest; the ending is well-formed, and the upstream is cancelled."""
    upstream.reply = Reply.stream(*text_chunks(["Take a ", "bomb bo", "mb and ", "run"], finish_reason=None), Hang())

    texts, reasons, chunks = streamed(client)

    assert texts == {0: "Take a"}
    assert reasons == {0: "content_filter"}
    why = chunks[-1].tidegate
    assert (why["action"], why["rule"], why["policy"], why["severity"]) == ("block", "unsafe", "test", "unsafe")
    assert why["categories"] == ["Violent"]
    assert why["where"] == {"path": "choices[0].content", "start": 6, "end": 16}
    assert why["id"].startswith("d")
    wait_until(lambda: upstream.received[0].cancelled, "the upstream to be cancelled")
    assert [row["action"] for row in gateway.kept()] == ["allow", "block"]


def test_a_blocked_stream_ends_with_done(gateway: Gateway, upstream: FakeUpstream) -> None:
    """On the wire: an event for the end of the choice, then [DONE], then the end of the body."""
    upstream.reply = Reply.stream(*text_chunks(["bomb bomb "], finish_reason=None), Hang())

    body = {"model": "m", "messages": HELLO, "stream": True}
    response = httpx.post(f"{gateway.base_url}/chat/completions", json=body)

    events = response.text.split("\n\n")
    assert response.headers["content-type"].startswith("text/event-stream")
    assert events[-2:] == ["data: [DONE]", ""]
    assert json.loads(events[-3].removeprefix("data: "))["choices"][0]["finish_reason"] == "content_filter"
    assert "bomb" not in response.text


def test_an_unsafe_whole_answer_is_replaced(client: OpenAI, gateway: Gateway, upstream: FakeUpstream) -> None:
    """The policy's message stands in for the answer, and nothing else of its message is left."""
    upstream.reply = Reply.json(completion({"content": "a bomb", "reasoning_content": "sly", "annotations": ["x"]}))

    answer = ask(client)

    assert answer.choices[0].message.content == "Not here."
    assert answer.choices[0].finish_reason == "content_filter"
    assert answer.tidegate["action"] == "block"
    assert "sly" not in answer.to_json()
    assert gateway.kept()[1]["content"] == "a bomb"


def test_one_flagged_word_alone_is_held_and_then_released(client: OpenAI, upstream: FakeUpstream) -> None:
    """A run that ends unconfirmed is a false alarm: its text arrives, complete."""
    upstream.reply = Reply.stream(*text_chunks(["a bomb", " shelter ", "is safe"]))

    texts, reasons, _ = streamed(client)

    assert texts == {0: "a bomb shelter is safe"}
    assert reasons == {0: "stop"}


def test_choices_are_judged_apart(client: OpenAI, gateway: Gateway, upstream: FakeUpstream) -> None:
    """One choice ends at its block; the other goes on to its own end."""
    first = text_chunks(["good ", "news ", "today"], index=0)
    second = text_chunks(["bomb ", "bomb ", "bomb"], index=1)
    upstream.reply = Reply.stream(*(part for pair in zip(first, second, strict=True) for part in pair))

    texts, reasons, _ = streamed(client, n=2)

    assert texts == {0: "good news today", 1: ""}
    assert reasons == {0: "stop", 1: "content_filter"}
    assert sorted(row["action"] for row in gateway.kept()) == ["allow", "allow", "block"]


def test_whole_choices_are_judged_apart(client: OpenAI, upstream: FakeUpstream) -> None:
    """Without streaming too."""
    upstream.reply = Reply.json(completion("fine", "a bomb"))

    answer = ask(client, n=2)

    assert [choice.message.content for choice in answer.choices] == ["fine", "Not here."]
    assert [choice.finish_reason for choice in answer.choices] == ["stop", "content_filter"]
    assert [choice.tidegate["action"] for choice in answer.choices] == ["allow", "block"]


@pytest.mark.parametrize("of", ["reasoning_content", "reasoning", "refusal"])
def test_every_text_of_a_stream_is_judged(client: OpenAI, upstream: FakeUpstream, of: str) -> None:
    """Reasoning and refusals are cut as answers are, and the end says where."""
    upstream.reply = Reply.stream(*text_chunks(["so ", "bomb ", "bomb ", "x"], of=of))

    _, reasons, chunks = streamed(client)

    said = "".join(getattr(part.choices[0].delta, of, None) or "" for part in chunks)
    assert said == "so"
    assert reasons == {0: "content_filter"}
    assert chunks[-1].tidegate["where"]["path"] == f"choices[0].{of}"


def tool_call(arguments: str, *, name: str | None = None, identity: str | None = None) -> dict[str, Any]:
    function = {"arguments": arguments} if name is None else {"name": name, "arguments": arguments}
    call = {"index": 0, "function": function}
    return {"tool_calls": [call if identity is None else {**call, "id": identity, "type": "function"}]}


TOOLS: list[Any] = [{"type": "function", "function": {"name": "search", "parameters": {"type": "object"}}}]


def test_a_safe_tool_call_arrives_whole(client: OpenAI, upstream: FakeUpstream) -> None:
    """Its name and id are there, and its arguments are complete."""
    upstream.reply = Reply.stream(
        chunk({"role": "assistant", "content": None}),
        chunk(tool_call("", name="search", identity="call_1")),
        chunk(tool_call('{"query": "apple')),
        chunk(tool_call(' pie"}')),
        chunk(finish_reason="tool_calls"),
    )

    _, reasons, chunks = streamed(client, tools=TOOLS)

    calls = [call for part in chunks for call in part.choices[0].delta.tool_calls or []]
    assert "".join(call.function.arguments or "" for call in calls) == '{"query": "apple pie"}'
    assert [(call.id, call.function.name) for call in calls if call.id] == [("call_1", "search")]
    assert reasons == {0: "tool_calls"}


QUERY = '{"query": "pie"}'
SAID = {
    "reasoning_content": "They want pie.",
    "content": "Let me look.",
    "tool_calls": [
        {"index": 0, "id": "call_1", "type": "function", "function": {"name": "search", "arguments": QUERY}}
    ],
}


async def test_reasoning_answer_and_calls_of_a_stream_are_judged_as_what_they_are(
    upstream: FakeUpstream, upstream_url: str
) -> None:
    """The guard is told of each text what it is, what was thought before it, and which tool is called."""
    guard = FakeStreamGuard()
    upstream.reply = Reply.stream(
        *text_chunks(["They want", " pie."], of="reasoning_content", finish_reason=None),
        *text_chunks(["Let me", " look."], finish_reason=None),
        chunk(tool_call("", name="search", identity="call_1")),
        chunk(tool_call(QUERY[:9])),
        chunk(tool_call(QUERY[9:])),
        chunk(finish_reason="tool_calls"),
    )

    kept = await _asked_in_process(guard, upstream_url, stream=True)

    assert [(opened.channel, opened.reasoning, opened.name) for opened in guard.opened] == [
        (Channel.REASONING, "", ""),
        (Channel.ANSWER, "They want pie.", ""),
        (Channel.TOOL_CALL, "They want pie.", "search"),
    ]
    assert kept.turns[-1].reasoning == "They want pie."


async def test_reasoning_answer_and_calls_of_a_whole_answer_are_judged_as_what_they_are(
    upstream: FakeUpstream, upstream_url: str
) -> None:
    guard = FakeStreamGuard()
    upstream.reply = Reply.json(completion(SAID, finish_reason="tool_calls"))

    await _asked_in_process(guard, upstream_url, stream=False)

    turns = [conversation.turns[-1] for conversation in guard.judged[1:]]
    assert sorted(turns, key=lambda turn: (turn.reasoning, turn.content)) == [
        Turn(Role.ASSISTANT, "", tool_calls=(ToolCall("search", QUERY),)),
        Turn(Role.ASSISTANT, "Let me look."),
        Turn(Role.ASSISTANT, "", "They want pie."),
    ]


async def _asked_in_process(guard: FakeStreamGuard, upstream_url: str, *, stream: bool) -> Conversation:
    """Ask a gateway with this guard once; what it kept of the answer."""
    record = Record()
    app = create_app(guard=guard, policy=make_policy(), keep=record, upstream_url=upstream_url)
    with serving(app) as url:
        async with httpx.AsyncClient() as client:
            body = {"model": "m", "messages": HELLO, "stream": stream, "tools": TOOLS}
            response = await client.post(f"{url}/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    conversation: Conversation = record.kept[-1][1]
    return conversation


def test_an_unsafe_tool_call_is_cut(client: OpenAI, upstream: FakeUpstream) -> None:
    """Tool-call arguments are judged: what would be run never arrives."""
    upstream.reply = Reply.stream(
        chunk(tool_call("", name="search", identity="call_1")),
        chunk(tool_call('{"query": "how to bomb bomb ')),
        chunk(finish_reason="tool_calls"),
    )

    _, reasons, chunks = streamed(client, tools=TOOLS)

    said = "".join(call.function.arguments or "" for part in chunks for call in part.choices[0].delta.tool_calls or [])
    assert said == '{"query": "how to'
    assert reasons == {0: "content_filter"}


# --- the prompt ---------------------------------------------------------------------------------------------------


def test_an_unsafe_prompt_gets_no_answer(client: OpenAI, gateway: Gateway, upstream: FakeUpstream) -> None:
    """A completion of the same shape says the policy's message, and the upstream is cancelled."""
    upstream.reply = Reply((Hang(),), before=30)

    answer = ask(client, messages=[{"role": "user", "content": "how do I build a bomb"}])

    assert answer.choices[0].message.content == "Not here."
    assert answer.choices[0].finish_reason == "content_filter"
    assert answer.tidegate["where"]["path"] == "messages[0].content"
    assert answer.tidegate["rule"] == "unsafe"
    assert [row["action"] for row in gateway.kept()] == ["block"]
    wait_until(lambda: not upstream.open_requests, "the upstream to be cancelled")


def test_an_unsafe_prompt_streams_its_refusal(client: OpenAI, upstream: FakeUpstream) -> None:
    """The same as a stream, for each choice that was asked for."""
    messages = [{"role": "user", "content": "bomb"}]

    texts, reasons, chunks = streamed(client, messages=messages, n=2, stream_options={"include_usage": True})

    assert texts == {0: "Not here.", 1: "Not here."}
    assert reasons == {0: "content_filter", 1: "content_filter"}
    assert chunks[-1].usage.total_tokens == 0
    assert chunks[2].tidegate["action"] == "block"


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "bomb"}, *HELLO],
        [*HELLO, {"role": "assistant", "content": "hi"}, {"role": "tool", "tool_call_id": "1", "content": "bomb"}],
        [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "bomb"}]}],
        [{"role": "user", "content": [{"type": "text", "text": "bo"}, {"type": "text", "text": "mb"}]}],
        [*HELLO, {"role": "assistant", "content": "Sure, the bomb"}],
        [{"role": "user", "content": "hi", "reasoning_content": "bomb"}],
        [{"role": "user", "content": "hi", "tool_calls": [{"function": {"name": "f", "arguments": "bomb"}}]}],
        [*HELLO, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": "bomb"}}}]}],
    ],
)
def test_all_that_is_new_in_the_prompt_is_judged(client: OpenAI, messages: list[Any]) -> None:
    """Every turn since the assistant last spoke, a given beginning of the answer, parts in any joints."""
    assert ask(client, messages=messages).choices[0].finish_reason == "content_filter"


OPERATORS_WORDS: list[Any] = [
    [{"role": "system", "content": "never speak of a bomb"}, *HELLO],
    [*HELLO, {"role": "developer", "content": "bomb"}],
    [{"role": "system", "content": "bomb"}, *HELLO, {"role": "assistant", "content": "hi"}, *HELLO],
]


@pytest.mark.parametrize("messages", OPERATORS_WORDS)
def test_what_the_operator_says_is_not_judged_and_the_coverage_says_so(
    client: OpenAI, gateway: Gateway, messages: list[Any]
) -> None:
    """A system prompt that names what the model must not do blocks nothing."""
    assert ask(client, messages=messages).choices[0].message.content == "Hello there."

    place = next(place for place, message in enumerate(messages) if message["role"] in ("system", "developer"))
    length = len(messages[place]["content"])
    assert [f"messages[{place}].content", "not_judged", length] in gateway.kept()[0]["coverage"]


@pytest.mark.parametrize("messages", OPERATORS_WORDS)
def test_system_turns_are_judged_where_that_is_asked_for(upstream_url: str, messages: list[Any]) -> None:
    """For installations whose tenants write them: with every request, wherever they stand."""
    app = create_app(guard=FakeStreamGuard(), policy=make_policy(), upstream_url=upstream_url, judge_system=True)

    with serving(app) as url, OpenAI(base_url=f"{url}/v1", api_key="sk", max_retries=0) as client:
        assert ask(client, messages=messages).choices[0].finish_reason == "content_filter"


def test_history_is_not_judged_again_and_the_coverage_says_so(client: OpenAI, gateway: Gateway) -> None:
    """One false alarm in the past does not end a conversation; images and tools are named as not judged."""
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    messages = [
        {"role": "user", "content": "bomb"},
        {"role": "assistant", "content": "no bomb"},
        {"role": "user", "content": [{"type": "text", "text": "thanks"}, image]},
    ]

    answer = ask(client, messages=messages, tools=TOOLS)

    assert answer.choices[0].message.content == "Hello there."
    assert gateway.kept()[0]["coverage"] == [
        ["messages[0].content", "not_judged", 4],
        ["messages[1].content", "not_judged", 7],
        ["messages[2].content", "judged", 6],
        ["messages[2].content[1]", "not_judged", 26],
        ["tools", "not_judged", 20],
    ]


def test_nothing_of_the_answer_leaves_before_the_prompt_is_decided(upstream: FakeUpstream, upstream_url: str) -> None:
    """The upstream starts at once, and its bytes wait."""
    guard = FakeStreamGuard(delay_s=0.3)
    upstream.reply = Reply.stream(*text_chunks(["early ", "bird"]))
    app = create_app(guard=guard, policy=make_policy(), upstream_url=upstream_url)

    with serving(app) as url, httpx.Client() as client:
        body = {"model": "m", "messages": [{"role": "user", "content": "bomb"}], "stream": True}
        response = client.post(f"{url}/v1/chat/completions", json=body)

    assert upstream.received
    assert "early" not in response.text
    assert "Not here." in response.text


# --- fields -------------------------------------------------------------------------------------------------------


def test_fields_that_could_carry_unjudged_text_do_not_pass(client: OpenAI, upstream: FakeUpstream) -> None:
    """Log probabilities and unknown strings are dropped and counted; plain values pass as they are."""
    odd = chunk({"content": "fine ", "secret": "leak", "score": 0.5}, system_fingerprint="fp", extra="leak", big=2**70)
    odd["choices"][0].update(logprobs={"content": [{"token": "leak"}]}, token_ids=[1, 2], stop_reason=None)
    upstream.reply = Reply.stream(odd, chunk(finish_reason="stop"))

    _, _, chunks = streamed(client)

    wire = json.dumps([part.to_dict() for part in chunks])
    assert "leak" not in wire
    assert "[1, 2]" not in wire
    assert chunks[0].system_fingerprint == "fp"
    assert chunks[0].big == 2**70
    assert chunks[0].choices[0].delta.score == 0.5
    dropped = {part["path"]: part["characters"] for part in chunks[-1].tidegate["coverage"] if part["characters"] == 4}
    assert dropped == {"choices[0].secret": 4, "choices[0].logprobs": 4, "extra": 4}


def test_a_key_given_twice_reaches_the_upstream_as_it_was_judged(gateway: Gateway, upstream: FakeUpstream) -> None:
    """What is sent on is what was parsed, not the bytes that came."""
    twice = '"messages": [{"role": "user", "content": "%s"}]'
    body = "{" + f'"model": "m", {twice % "bomb"}, {twice % "hello"}' + "}"

    httpx.post(f"{gateway.base_url}/chat/completions", content=body)

    assert upstream.received[0].body["messages"] == [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    ("data", "same"),
    [
        (
            b'{ "model" :"m","messages":[{"role":"user","content":"caf\\u00e9 \xc3\xa9"}],"top_p":0.10,"seed":1e2 }',
            True,
        ),
        (b'{"model":"m","messages":[{"role":"user","content":"\\ud83d\\ude00"}]}', True),
        (b'{"model":"m","messages":[{"role":"user","content":"\\ud83d"}]}', False),
        (b'{"model":"m","messages":[{"role":"user","content":"a"}],"x":{"a":1,"\\u0061":2}}', False),
        (b'{"model":"m","messages":[{"role":"user","content":"a"}],"x":[{"a":1,"a":1}]}', False),
    ],
)
def test_a_body_goes_on_byte_by_byte_when_it_means_one_thing(
    gateway: Gateway, upstream: FakeUpstream, data: bytes, same: bool
) -> None:
    """Else what was parsed goes on: broken characters replaced, of a key that is given twice the last."""
    assert httpx.post(f"{gateway.base_url}/chat/completions", content=data).status_code == 200

    assert (upstream.received[0].data == data) is same
    if not same:
        assert b"d83d" not in upstream.received[0].data
        assert upstream.received[0].data.count(b'"a":') <= 1


def test_headers_of_openais_client_go_on_and_others_do_not(gateway: Gateway, upstream: FakeUpstream) -> None:
    with OpenAI(
        base_url=gateway.base_url, api_key="sk", organization="org-1", project="proj-1", max_retries=0
    ) as client:
        client.chat.completions.create(model="m", messages=HELLO, extra_headers={"x-api-key": "k", "x-other": "o"})

    sent = upstream.received[0].headers
    assert (sent["openai-organization"], sent["openai-project"]) == ("org-1", "proj-1")
    assert not {"x-api-key", "x-other"} & set(sent)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("key", [None, "sk-own"])
def test_the_identity_of_a_request_is_told_and_the_clients_own_quota(
    upstream: FakeUpstream, upstream_url: str, stream: bool, key: str | None
) -> None:
    """Other headers of the upstream are not, nor what could be a sentence."""
    plain = Reply.stream(*text_chunks(["hi"])) if stream else Reply.json(completion("hi"))
    headers = {"x-request-id": "req_1", "x-ratelimit-remaining-tokens": "99", "x-secret": "s", "request-id": "a bomb"}
    upstream.reply = Reply(plain.acts, headers={**plain.headers, **headers})
    app = create_app(guard=FakeStreamGuard(), policy=make_policy(), upstream_url=upstream_url, upstream_key=key)

    with serving(app) as url:
        answer = httpx.post(f"{url}/v1/chat/completions", json={"model": "m", "messages": HELLO, "stream": stream})

    assert answer.headers["x-upstream-request-id"] == "req_1"
    assert answer.headers["x-request-id"] not in ("", "req_1")
    assert answer.headers.get("x-ratelimit-remaining-tokens") == (None if key else "99")
    assert not {"x-secret", "request-id"} & set(answer.headers)


def test_fields_of_an_answer_that_are_empty_or_numbers_pass_as_they_are(client: OpenAI, upstream: FakeUpstream) -> None:
    answer = completion({"content": "fine", "annotations": [], "audio": None, "refusal": None})
    answer["choices"][0].update(logprobs=None, stop_reason=None, matched={})
    answer["usage"]["prompt_tokens_details"] = {"cached_tokens": 2, "audio_tokens": 0}
    upstream.reply = Reply.json(answer)

    said = ask(client).to_dict()

    choice = {name: value for name, value in said["choices"][0].items() if name != "tidegate"}
    assert choice == answer["choices"][0]
    assert {name: said[name] for name in answer if name != "choices"} == {
        name: value for name, value in answer.items() if name != "choices"
    }


def test_halves_of_a_character_are_joined(client: OpenAI, upstream: FakeUpstream) -> None:
    """A surrogate pair cut between two chunks arrives as one character."""
    first, second = (
        b'data: {"choices":[{"index":0,"delta":{"content":"\\u%s"}}]}\n\n' % half for half in (b"d83d", b"ude00"[1:])
    )
    upstream.reply = Reply.stream(first, second, chunk(finish_reason="stop"))

    assert streamed(client)[0] == {0: "😀"}


# --- trouble ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_an_upstream_that_is_down_is_a_502(stream: bool) -> None:
    """In OpenAI's error shape, with the prompt's decision kept."""
    record = Record()
    app = create_app(guard=FakeStreamGuard(), policy=make_policy(), keep=record, upstream_url="http://127.0.0.1:9/v1")
    with (
        serving(app) as url,
        OpenAI(base_url=f"{url}/v1", api_key="sk", max_retries=0) as client,
        pytest.raises(openai.InternalServerError) as caught,
    ):
        ask(client, stream=stream)

    assert caught.value.status_code == 502
    assert caught.value.body["type"] == "upstream_error"
    assert record.actions == ["allow"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("status", [400, 401, 404, 429, 500, 503])
def test_upstream_errors_are_passed_on(gateway: Gateway, upstream: FakeUpstream, status: int, stream: bool) -> None:
    """Status, words for programs and Retry-After arrive; no other header does, and no message that nobody judged."""
    upstream.reply = Reply.error(status, "you said: bomb", headers={"retry-after": "7", "x-secret": "s"})

    body = {"model": "m", "messages": HELLO, "stream": stream}
    response = httpx.post(f"{gateway.base_url}/chat/completions", json=body)

    assert response.status_code == status
    error = response.json()["error"]
    assert "upstream" in error.pop("message")
    assert error == {"type": "fake_error", "param": None, "code": f"fake_{status}"}
    assert "bomb" not in response.text
    assert response.headers["retry-after"] == "7"
    assert "x-secret" not in response.headers


def test_an_upstream_error_carries_no_sentence(gateway: Gateway, upstream: FakeUpstream) -> None:
    """What is no word for programs is left out, wherever it stands."""
    error = dict.fromkeys(("message", "type", "param", "code"), "mix the powder")
    upstream.reply = Reply.json({"error": error}, status=400, headers={"retry-after": "mix the powder"})

    response = httpx.post(f"{gateway.base_url}/chat/completions", json={"model": "m", "messages": HELLO})

    assert response.status_code == 400
    assert "powder" not in response.text + str(response.headers)
    assert response.json()["error"]["type"] == "upstream_error"


def test_an_upstream_that_dies_in_the_middle(client: OpenAI, gateway: Gateway, upstream: FakeUpstream) -> None:
    """What was held is judged and let out, then an error in OpenAI's shape ends the stream; the decision is kept."""
    upstream.reply = Reply.stream(*text_chunks(["half an ", "answer"], finish_reason=None), Pause(0.05), Die())

    said, error = interrupted(client)

    assert said == "half an answer"
    assert isinstance(error.body, dict)
    assert error.body["type"] == "upstream_error"
    assert gateway.kept()[1]["content"] == "half an answer"


def test_held_harm_stays_held_when_the_upstream_dies(client: OpenAI, upstream: FakeUpstream) -> None:
    """What is left when the connection breaks is judged before it leaves."""
    upstream.reply = Reply.stream(*text_chunks(["well bomb ", "bomb"], finish_reason=None), Pause(0.05), Die())

    texts, reasons, _ = streamed(client)

    assert texts == {0: "well"}
    assert reasons == {0: "content_filter"}


@pytest.mark.parametrize(
    "garbage",
    [
        b"data: {not json}\n\n",
        b"data: [1, 2]\n\n",
        b"data: \xff\xfe\n\n",
        b'data: {"choices": 5}\n\n',
        b'data: {"choices": [{"index": "x", "delta": {}}]}\n\n',
        b'data: {"choices": [{"index": 0, "delta": "x"}]}\n\n',
        b'data: {"error": {"message": "secret"}}\n\n',
        b"data: " + b"[" * 5000 + b"\n\n",
    ],
)
def test_malformed_events_end_the_stream(client: OpenAI, upstream: FakeUpstream, garbage: bytes) -> None:
    """What came before is judged and let out; then comes an error."""
    upstream.reply = Reply.stream(*text_chunks(["fine so far"], finish_reason=None), garbage, Hang())

    said, error = interrupted(client)

    assert said == "fine so far"
    assert "secret" not in str(error.body)


def test_a_stream_that_ends_too_early_is_an_error(client: OpenAI, upstream: FakeUpstream) -> None:
    """No finish reason and no [DONE]: the client must not take it for complete."""
    upstream.reply = Reply.stream(*text_chunks(["half"], finish_reason=None), done=False)

    with pytest.raises(openai.APIError):
        streamed(client)


def test_an_upstream_that_falls_silent_is_a_timeout(upstream: FakeUpstream, upstream_url: str) -> None:
    """504 before the answer began."""
    upstream.reply = Reply((), before=60)
    app = create_app(guard=FakeStreamGuard(), policy=make_policy(), upstream_url=upstream_url, silence_timeout_s=0.2)

    with serving(app) as url:
        response = httpx.post(f"{url}/v1/chat/completions", json={"model": "m", "messages": HELLO})

    assert response.status_code == 504


@pytest.mark.parametrize("reply", [Reply.json(b"<html>"), Reply.json({"object": "list"}), Reply.json([1])])
def test_a_whole_answer_that_is_none_is_a_502(client: OpenAI, upstream: FakeUpstream, reply: Reply) -> None:
    """Whatever is not a chat completion cannot be judged, and does not pass."""
    upstream.reply = reply

    with pytest.raises(openai.InternalServerError) as caught:
        ask(client)

    assert caught.value.status_code == 502


@pytest.mark.parametrize(
    ("said", "written"), [(b"NaN", None), (b"-Infinity", None), (b"1e999", None), (b'"\\ud800"', "\ufffd")]
)
def test_what_json_cannot_carry_does_not_cost_the_answer(
    gateway: Gateway, upstream: FakeUpstream, said: bytes, written: str | None
) -> None:
    """Numbers that JSON does not know and single halves of a character, beside a proper answer or in an error."""
    body = {"model": "m", "messages": HELLO}
    message = {"content": "X"} if written else {"content": "hello", "score": "X"}
    upstream.reply = Reply.json(json.dumps(completion(message)).encode().replace(b'"X"', said))
    answer = httpx.post(f"{gateway.base_url}/chat/completions", json=body)
    upstream.reply = Reply.json(b'{"error": {"message": "no", "code": %b}}' % said, status=400)
    refused = httpx.post(f"{gateway.base_url}/chat/completions", json=body)

    arrived = answer.json()["choices"][0]["message"]["content" if written else "score"]
    assert (answer.status_code, arrived) == (200, written)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, None)


@pytest.mark.parametrize("said", [b"NaN", b"-Infinity", b"1e999"])
def test_no_number_that_json_does_not_know_is_written(gateway: Gateway, upstream: FakeUpstream, said: bytes) -> None:
    """In a streamed chunk it becomes null; in a request it is refused, and never reaches the upstream."""
    odd = json.dumps(chunk({"content": "fine"}, score="X")).encode().replace(b'"X"', said)
    upstream.reply = Reply.stream(b"data: %b\n\n" % odd, chunk(finish_reason="stop"))
    body = {"model": "m", "messages": HELLO, "stream": True}
    answer = httpx.post(f"{gateway.base_url}/chat/completions", json=body).text
    request = json.dumps({**body, "temperature": "X"}).encode().replace(b'"X"', said)
    refused = httpx.post(f"{gateway.base_url}/chat/completions", content=request)

    assert '"score":null' in answer
    assert "NaN" not in answer
    assert "Infinity" not in answer
    assert refused.status_code == 400
    assert len(upstream.received) == 1


def test_an_upstream_that_does_not_stream_is_a_502(client: OpenAI, upstream: FakeUpstream) -> None:
    """JSON where events were asked for."""
    with pytest.raises(openai.InternalServerError):
        ask(client, stream=True)


# --- guards that fail ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["guardfail", "guardhang"])
def test_a_guard_that_fails_on_the_prompt(client: OpenAI, gateway: Gateway, word: str) -> None:
    """The policy says block: the client gets no answer, and the failure is kept."""
    answer = ask(client, messages=[{"role": "user", "content": word}])

    assert answer.choices[0].finish_reason == "content_filter"
    assert answer.tidegate["rule"] == "on_guard_error"
    assert gateway.kept()[0]["failure"] in ("GuardUnavailable", "GuardTimeout")


@pytest.mark.parametrize("word", ["guardfail", "guardhang"])
def test_a_guard_that_fails_in_a_stream(client: OpenAI, gateway: Gateway, upstream: FakeUpstream, word: str) -> None:
    """What was judged has left; nothing after it does."""
    upstream.reply = Reply.stream(
        *text_chunks(["good words "], finish_reason=None), Pause(0.2), chunk({"content": f"{word} x"}), Hang()
    )

    texts, reasons, chunks = streamed(client)

    assert texts == {0: "good words"}
    assert reasons == {0: "content_filter"}
    assert chunks[-1].tidegate["failure"]["kind"] in ("GuardUnavailable", "GuardTimeout")
    assert gateway.kept()[1]["rule"] == "on_guard_error"


def test_an_open_policy_lets_text_through_a_failing_guard(upstream: FakeUpstream, upstream_url: str) -> None:
    """on_guard_error: review passes everything, and the coverage counts what was not judged."""
    record = Record()
    upstream.reply = Reply.stream(*text_chunks(["fine guardfail and ", "more"]))
    app = create_app(
        guard=FakeStreamGuard(), policy=make_policy(on_guard_error="review"), keep=record, upstream_url=upstream_url
    )

    with serving(app) as url, OpenAI(base_url=f"{url}/v1", api_key="sk", max_retries=0) as client:
        texts, _, _ = streamed(client)

    assert texts == {0: "fine guardfail and more"}
    assert record.actions == ["allow", "review"]
    assert [(part.state.value, part.characters) for part in record.kept[1][0].coverage] == [("not_judged", 23)]


@pytest.mark.parametrize("stream", [False, True])
def test_a_decision_that_cannot_be_kept_is_an_error(upstream: FakeUpstream, upstream_url: str, stream: bool) -> None:
    """An exchange without its record does not pass for a complete one."""
    record = Record()
    record.broken = True
    upstream.reply = Reply.stream(*text_chunks(["hello there"])) if stream else Reply.json(completion("hello"))
    app = create_app(guard=FakeStreamGuard(), policy=make_policy(), keep=record, upstream_url=upstream_url)

    with (
        serving(app) as url,
        OpenAI(base_url=f"{url}/v1", api_key="sk", max_retries=0) as client,
        pytest.raises(openai.APIError) as caught,
    ):
        list(ask(client, stream=stream))

    assert caught.value.code == "store_error"


# --- hang-ups -----------------------------------------------------------------------------------------------------


async def test_a_client_that_hangs_up_frees_everything(upstream: FakeUpstream, upstream_url: str) -> None:
    """The upstream is cancelled, the session closed, and the decision on what was judged is kept."""
    guard, record = FakeStreamGuard(), Record()
    upstream.reply = Reply.stream(*text_chunks(["one two three "], finish_reason=None), Hang())
    app = create_app(guard=guard, policy=make_policy(), keep=record, upstream_url=upstream_url)

    with serving(app) as url:
        async with httpx.AsyncClient() as client:
            body = {"model": "m", "messages": HELLO, "stream": True}
            async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
                async for text in response.aiter_text():
                    if "three" in text:
                        break
                assert guard.open_sessions == 1
        await until(lambda: upstream.received[0].cancelled, "the upstream to be cancelled")
        await until(lambda: guard.open_sessions == 0, "the session to be closed")
        await until(lambda: len(record.kept) == 2, "the decision to be kept")

    assert record.actions == ["allow", "allow"]
    assert record.kept[1][0].coverage[0].characters == len("one two three")
    assert guard.closed


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_does_not_wait_for_the_answer(
    upstream: FakeUpstream, upstream_url: str, stream: bool
) -> None:
    """Hanging up before the upstream says anything cancels it too."""
    record = Record()
    upstream.reply = Reply((), before=60)
    app = create_app(guard=FakeStreamGuard(), policy=make_policy(), keep=record, upstream_url=upstream_url)

    with serving(app) as url:
        async with httpx.AsyncClient() as client:
            body = {"model": "m", "messages": HELLO, "stream": stream}
            with pytest.raises(httpx.ReadTimeout):
                await client.post(f"{url}/v1/chat/completions", json=body, timeout=0.5)
        await until(lambda: upstream.received[0].cancelled, "the upstream to be cancelled")

    assert record.actions == ["allow"]


async def test_a_blocked_prompt_is_kept_when_the_client_hangs_up_at_that_moment() -> None:
    """Also while the upstream's request is still being cancelled."""
    record, cancelling, gone = Record(), asyncio.Event(), asyncio.Event()

    class Stubborn(Upstream):
        async def send(self, *_: Any, **__: Any) -> Any:
            try:
                await asyncio.Event().wait()
            finally:
                cancelling.set()
                await gone.wait()

    behind = Behind(
        guard=FakeStreamGuard(),
        policy=make_policy(),
        keep=record,
        upstream=Stubborn("http://127.0.0.1:9"),
        telemetry=Telemetry(),
        longest_body=1000,
        longest_stream=10_000,
        guard_timeout_s=None,
        client_timeout_s=None,
    )
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "a bomb"}]}).encode()

    async def receive() -> dict[str, Any]:
        await cancelling.wait()
        asyncio.get_running_loop().call_later(0.01, gone.set)
        return {"type": "http.disconnect"}

    async def receive_body() -> dict[str, Any]:
        return {"type": "http.request", "body": body}

    async def send(message: Any) -> None:
        raise AssertionError("nobody listens")

    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": [], "query_string": b""}
    exchange = await Endpoint(ChatDoor(), behind).answer(Request(scope, receive_body))
    await exchange(scope, receive, send)

    assert record.actions == ["block"]


async def test_a_client_that_stops_reading_is_given_up(upstream: FakeUpstream, upstream_url: str) -> None:
    """It stays connected, and holds nothing: the upstream is cancelled, the session closed, the decision kept."""
    guard, record = FakeStreamGuard(), Record()
    more_than_any_socket_buffers = [f"{'a' * 65_536} "] * 400
    upstream.reply = Reply.stream(*text_chunks(more_than_any_socket_buffers, finish_reason=None), Hang())
    app = create_app(
        guard=guard,
        policy=make_policy(),
        keep=record,
        upstream_url=upstream_url,
        client_timeout_s=0.5,
    )
    body = json.dumps({"model": "m", "messages": HELLO, "stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()

    with serving(app) as url, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", int(url.rpartition(":")[2])))
        client.sendall(head + body)
        await until(lambda: guard.opened, "the session to be opened")
        await until(lambda: upstream.received and upstream.received[0].cancelled, "the upstream to be cancelled")
        await until(lambda: guard.open_sessions == 0, "the session to be closed")
        await until(lambda: len(record.kept) == 2, "the decision to be kept")
        async with httpx.AsyncClient() as observer:
            metrics = (await observer.get(f"{url}/metrics")).text

    assert record.actions == ["allow", "allow"]
    assert 65_536 < record.kept[1][0].coverage[0].characters < 400 * 65_537
    assert "tidegate_open_streams 0.0" in metrics
    assert "tidegate_held_characters 0.0" in metrics
    assert "tidegate_stalled_clients_total 1.0" in metrics


# --- keys ---------------------------------------------------------------------------------------------------------


def test_a_configured_key_replaces_the_clients(upstream: FakeUpstream, upstream_url: str) -> None:
    """The client's own key never reaches the upstream then."""
    app = create_app(
        guard=FakeStreamGuard(), policy=make_policy(), upstream_url=upstream_url, upstream_key="sk-upstream"
    )

    with serving(app) as url, OpenAI(base_url=f"{url}/v1", api_key="sk-client", max_retries=0) as client:
        ask(client)

    assert upstream.received[0].headers["authorization"] == "Bearer sk-upstream"


def test_no_user_text_is_logged(client: OpenAI, gateway: Gateway, upstream: FakeUpstream) -> None:
    """A marked word goes through every door, and is in no log and no metric."""
    upstream.reply = Reply.stream(*text_chunks(["canary7 bomb bomb"]))
    streamed(client, messages=[{"role": "user", "content": "canary7"}])
    upstream.reply = Reply.stream(b"data: canary7\n\n")
    with pytest.raises(openai.APIError):
        streamed(client)
    client.moderations.create(input="canary7 bomb")
    with pytest.raises(openai.BadRequestError):
        ask(client, messages=[{"role": "canary7", "content": "canary7"}])

    assert "canary7" not in gateway.log.read_text()
    assert "canary7" not in httpx.get(f"{gateway.url}/metrics").text
