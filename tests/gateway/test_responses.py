"""The Responses API, seen by the real OpenAI client through a gateway in a process of its own."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from gateway.test_logprobs import responded, token
from serving import Gateway, Record, make_policy, serving, until, wait_until
from tidegate.gateway.app import create_app
from tidegate.testing import (
    Die,
    FakeStreamGuard,
    FakeUpstream,
    Hang,
    Pause,
    Reply,
    message_item,
    response,
    response_events,
)

REASONING: dict[str, Any] = {
    "id": "rs_1",
    "type": "reasoning",
    "summary": [{"type": "summary_text", "text": "They want pie."}],
}
CALL: dict[str, Any] = {
    "id": "fc_1",
    "type": "function_call",
    "call_id": "call_1",
    "name": "search",
    "arguments": '{"query": "apple pie"}',
    "status": "completed",
}
TOOLS: list[Any] = [{"type": "function", "name": "search", "parameters": {"type": "object"}, "strict": False}]


@pytest.fixture
def client(gateway: Gateway, upstream: FakeUpstream) -> Any:
    upstream.reply = Reply.json(response("Hello there."))
    with OpenAI(base_url=gateway.base_url, api_key="sk-client", max_retries=0) as made:
        yield made


def ask(client: OpenAI, **options: Any) -> Any:
    return client.responses.create(**{"model": "fake-model", "input": "Say hello", **options})


def streaming(*events: Any) -> Reply:
    return Reply.stream(*events, done=False)


def words(text: str) -> list[str]:
    return [text[start : start + 4] for start in range(0, len(text), 4)]


def with_tokens(text: str) -> Reply:
    """A response with its tokens: as many as it has words."""
    return streaming(*responded([token(f" {word}".encode()) for word in text.split(" ")]))


def text_of(events: list[Any]) -> str:
    return "".join(event.delta for event in events if event.type == "response.output_text.delta")


# --- safe exchanges -----------------------------------------------------------------------------------------------


def test_a_safe_response_passes_whole(client: OpenAI, gateway: Gateway, upstream: FakeUpstream) -> None:
    """What the upstream says arrives as it is, and both decisions are kept before the client has the answer."""
    upstream.reply = Reply.json(response(REASONING, "Hello there.", CALL))

    answer = ask(client, tools=TOOLS)

    assert answer.output_text == "Hello there."
    assert [item.type for item in answer.output] == ["reasoning", "message", "function_call"]
    assert answer.output[2].arguments == CALL["arguments"]
    assert answer.status == "completed"
    assert answer.usage.total_tokens == 8
    assert answer.tidegate["action"] == "allow"
    assert [row["action"] for row in gateway.kept()] == ["allow", "allow"]
    assert gateway.kept()[1]["content"] == "Hello there."
    assert upstream.received[0].path == "/v1/responses"
    assert upstream.received[0].headers["authorization"] == "Bearer sk-client"


def test_a_safe_response_passes_streaming(client: OpenAI, gateway: Gateway, upstream: FakeUpstream) -> None:
    """Every event arrives, in its order and numbered, and the last one has the decision."""
    sent = response_events(REASONING, "Hello there, friend.", CALL, cut=words)
    upstream.reply = streaming(*sent)

    events = list(ask(client, stream=True, tools=TOOLS))

    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert list(dict.fromkeys(event.type for event in events)) == list(dict.fromkeys(event["type"] for event in sent))
    assert text_of(events) == "Hello there, friend."
    assert events[-1].response.output_text == "Hello there, friend."
    assert events[-1].response.tidegate["action"] == "allow"
    assert [row["action"] for row in gateway.kept()] == ["allow", "allow"]


def test_the_clients_own_accumulator_takes_the_stream(client: OpenAI, upstream: FakeUpstream) -> None:
    """``responses.stream`` checks every event against those before, and puts the response together."""
    upstream.reply = streaming(*response_events(REASONING, "Hello there, friend.", CALL, cut=words))

    with client.responses.stream(model="m", input="Say hello", tools=TOOLS) as stream:
        snapshots = [event.snapshot for event in stream if event.type == "response.output_text.delta"]
        answer: Any = stream.get_final_response()

    assert snapshots[-1] == "Hello there, friend."
    assert answer.output_text == "Hello there, friend."
    assert answer.output[2].parsed_arguments is None


def test_tokens_come_with_the_text_that_they_spell(client: OpenAI, upstream: FakeUpstream) -> None:
    upstream.reply = with_tokens("one two three")

    events = list(ask(client, stream=True, include=["message.output_text.logprobs"]))

    told = [one.token for event in events if event.type == "response.output_text.delta" for one in event.logprobs]
    done = next(event for event in events if event.type == "response.output_text.done")
    part = next(event.part for event in events if event.type == "response.content_part.done")
    item = next(event.item for event in events if event.type == "response.output_item.done")
    assert upstream.received[0].body["include"] == ["message.output_text.logprobs"]
    assert told == [" one", " two", " three"]
    for repeated in (done, part, item.content[0], events[-1].response.output[0].content[0]):
        assert [one.token for one in repeated.logprobs] == told


@pytest.mark.parametrize("intervention", ["cut", "replace"])
def test_a_stopped_stream_has_the_tokens_of_what_has_left(
    upstream: FakeUpstream, upstream_url: str, intervention: str
) -> None:
    """In deltas and in the events that close it; the policy's message has none."""
    upstream.reply = with_tokens("take a bomb bomb and run")
    policy = make_policy(intervention=intervention)
    app = create_app(guard=FakeStreamGuard(), policy=policy, keep=Record(), upstream_url=upstream_url)

    with serving(app) as url, OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0) as client:
        events = list(ask(client, stream=True))

    told = [one.token for event in events if event.type == "response.output_text.delta" for one in event.logprobs]
    done = next(event for event in events if event.type == "response.output_text.done")
    first, *message = events[-1].response.output
    assert told == [" take", " a"]
    assert [one.token for one in done.logprobs] == [one.token for one in first.content[0].logprobs] == told
    assert [item.content[0].logprobs for item in message] == ([None] if intervention == "replace" else [])
    assert "bomb" not in json.dumps([event.to_dict() for event in events])


async def test_the_async_client_streams(gateway: Gateway, upstream: FakeUpstream) -> None:
    """The async client of OpenAI gets the same."""
    upstream.reply = streaming(*response_events("one two three", cut=words))

    async with AsyncOpenAI(base_url=gateway.base_url, api_key="sk", max_retries=0) as client:
        events = [event async for event in await client.responses.create(model="m", input="count", stream=True)]

    assert text_of(events) == "one two three"


def test_the_request_goes_on_as_it_came(client: OpenAI, upstream: FakeUpstream) -> None:
    """With every field, those that we do not know too."""
    ask(client, instructions="Be kind.", tools=TOOLS, metadata={"a": "b"}, extra_body={"odd": [1, {"deep": "x"}]})

    assert upstream.received[0].body == {
        "model": "fake-model",
        "input": "Say hello",
        "instructions": "Be kind.",
        "tools": TOOLS,
        "metadata": {"a": "b"},
        "odd": [1, {"deep": "x"}],
    }


# --- blocked answers ----------------------------------------------------------------------------------------------


def test_an_unsafe_stream_is_cut_before_its_harm(client: OpenAI, gateway: Gateway, upstream: FakeUpstream) -> None:
    """The safe beginning arrives, nothing of the rest; the ending is well-formed, and the upstream is cancelled."""
    events = response_events(REASONING, "Take a bomb bomb and run", cut=words)
    upstream.reply = streaming(*events[:-4], Hang())

    got = list(ask(client, stream=True))

    assert text_of(got) == "Take a"
    assert [event.type for event in got[-4:]] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    last = got[-1].response
    assert last.status == "incomplete"
    assert last.incomplete_details.reason == "content_filter"
    assert last.output_text == "Take a"
    assert last.tidegate["rule"] == "unsafe"
    assert last.tidegate["where"] == {"path": "output[1].content[0].text", "start": 6, "end": 16}
    wait_until(lambda: upstream.received[0].cancelled, "the upstream to be cancelled")
    assert [row["action"] for row in gateway.kept()] == ["allow", "block"]


def test_the_clients_own_accumulator_takes_a_cut_stream(client: OpenAI, upstream: FakeUpstream) -> None:
    upstream.reply = streaming(*response_events("Take a bomb bomb and run", CALL, cut=words))

    with client.responses.stream(model="m", input="Say hello") as stream:
        events = list(stream)

    assert events[-1].type == "response.incomplete"
    assert events[-1].response.output_text == "Take a"


def test_an_unsafe_call_of_a_tool_never_looks_complete(client: OpenAI, upstream: FakeUpstream) -> None:
    """Its arguments are cut, no event says that they are done, and the item is incomplete."""
    harm = {**CALL, "arguments": '{"query": "how to bomb bomb "}'}
    upstream.reply = streaming(*response_events(harm, cut=words))

    events = list(ask(client, stream=True, tools=TOOLS))

    said = "".join(event.delta for event in events if event.type == "response.function_call_arguments.delta")
    assert said == '{"query": "how to'
    assert not [event for event in events if event.type == "response.function_call_arguments.done"]
    assert events[-2].item.status == "incomplete"
    assert events[-1].response.output[0].arguments == said


def test_an_unsafe_whole_response_is_replaced(client: OpenAI, gateway: Gateway, upstream: FakeUpstream) -> None:
    """The policy's message stands in for the output, and nothing of it is left."""
    upstream.reply = Reply.json(response(REASONING, "a bomb bomb"))

    answer = ask(client)

    assert answer.output_text == "Not here."
    assert answer.status == "incomplete"
    assert answer.incomplete_details.reason == "content_filter"
    assert "pie" not in answer.to_json()
    assert answer.tidegate["action"] == "block"
    assert gateway.kept()[1]["content"] == "a bomb bomb"


# --- the prompt ---------------------------------------------------------------------------------------------------


GIVEN = {"type": "function_call_output", "call_id": "call_1", "output": "bomb"}
UNSAFE_PROMPTS: list[dict[str, Any]] = [
    {"input": "how do I build a bomb"},
    {"input": [{"role": "user", "content": [{"type": "input_text", "text": "bomb"}]}]},
    {"input": [{"role": "user", "content": "hi"}, CALL, GIVEN]},
    {"prompt": {"id": "pmpt_1", "variables": {"what": "bomb"}}, "input": "hello"},
]


@pytest.mark.parametrize("options", UNSAFE_PROMPTS)
def test_an_unsafe_prompt_gets_no_answer(
    client: OpenAI, gateway: Gateway, upstream: FakeUpstream, options: dict[str, Any]
) -> None:
    """A response of the same shape says the policy's message, and the upstream is cancelled."""
    upstream.reply = Reply((Hang(),), before=30)

    answer = ask(client, **options)

    assert answer.output_text == "Not here."
    assert answer.status == "incomplete"
    assert answer.incomplete_details.reason == "content_filter"
    assert answer.model == "fake-model"
    assert answer.usage.total_tokens == 0
    assert answer.tidegate["rule"] == "unsafe"
    assert [row["action"] for row in gateway.kept()] == ["block"]
    wait_until(lambda: not upstream.open_requests, "the upstream to be cancelled")


def test_an_unsafe_prompt_streams_its_refusal(client: OpenAI, upstream: FakeUpstream) -> None:
    """The same as a stream, which the client's own accumulator takes."""
    events = list(ask(client, input="bomb", stream=True))
    with client.responses.stream(model="m", input="bomb") as stream:
        taken = list(stream)

    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events] == [event.type for event in taken]
    assert text_of(events) == "Not here."
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.output_text == "Not here."
    assert events[-1].response.tidegate["where"]["path"] == "input"


def test_nothing_of_the_answer_leaves_before_the_prompt_is_decided(upstream: FakeUpstream, upstream_url: str) -> None:
    """The upstream starts at once, and its bytes wait."""
    upstream.reply = streaming(*response_events("early bird"))
    app = create_app(guard=FakeStreamGuard(delay_s=0.3), policy=make_policy(), upstream_url=upstream_url)

    with serving(app) as url:
        answer = httpx.post(f"{url}/v1/responses", json={"model": "m", "input": "bomb", "stream": True})

    assert upstream.received
    assert "early" not in answer.text
    assert "Not here." in answer.text


@pytest.mark.parametrize(
    ("option", "path"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].id"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "https://a.example"}]}]},
            "input[0].content[0]",
        ),
    ],
)
def test_a_policy_can_refuse_what_the_gateway_cannot_see(
    client: OpenAI, gateway: Gateway, upstream: FakeUpstream, upstream_url: str, option: dict[str, Any], path: str
) -> None:
    """Else the coverage of the prompt's decision says that it was not judged."""
    ask(client, **option)
    assert path in {where for where, state, _ in gateway.kept()[0]["coverage"] if state == "not_judged"}
    upstream.received.clear()

    app = create_app(guard=FakeStreamGuard(), policy=make_policy(unjudged_request="refuse"), upstream_url=upstream_url)
    with serving(app) as url, OpenAI(base_url=f"{url}/v1", api_key="sk", max_retries=0) as strict:
        with pytest.raises(openai.BadRequestError) as caught:
            ask(strict, **option)
        ask(strict, instructions="Be kind.", tools=TOOLS)

    assert caught.value.param == path
    assert [received.body.get("instructions") for received in upstream.received] == ["Be kind."]


# --- trouble ------------------------------------------------------------------------------------------------------


def test_a_response_in_the_background_is_refused(client: OpenAI, upstream: FakeUpstream) -> None:
    """Nobody would judge what is fetched later."""
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, background=True)

    assert caught.value.param == "background"
    assert caught.value.code == "not_guarded"
    assert upstream.received == []


def test_no_other_endpoint_lets_anything_out(client: OpenAI, gateway: Gateway, upstream: FakeUpstream) -> None:
    """What is stored at the upstream is not given out, and an error says why."""
    for call in (
        lambda: client.responses.retrieve("resp_1"),
        lambda: list(client.responses.retrieve("resp_1", stream=True)),
        lambda: client.responses.delete("resp_1"),
        lambda: client.responses.cancel("resp_1"),
        lambda: client.responses.input_items.list("resp_1"),
        lambda: client.responses.input_tokens.count(model="m", input="x"),
        lambda: client.responses.compact(model="m", input="x"),
    ):
        with pytest.raises(openai.APIStatusError) as caught:
            call()
        assert caught.value.status_code == 501
        assert caught.value.code == "not_guarded"
    assert httpx.get(f"{gateway.base_url}/responses").status_code == 405
    assert upstream.received == []


@pytest.mark.parametrize("stream", [False, True])
def test_an_upstream_that_is_down_is_a_502(stream: bool) -> None:
    record = Record()
    app = create_app(guard=FakeStreamGuard(), policy=make_policy(), keep=record, upstream_url="http://127.0.0.1:9/v1")
    with (
        serving(app) as url,
        OpenAI(base_url=f"{url}/v1", api_key="sk", max_retries=0) as client,
        pytest.raises(openai.InternalServerError) as caught,
    ):
        ask(client, stream=stream)

    assert caught.value.status_code == 502
    assert record.actions == ["allow"]


def test_an_upstream_that_does_not_know_responses_is_an_error(client: OpenAI, upstream: FakeUpstream) -> None:
    """Its status is passed on, and its message, which nobody judged, is not."""
    upstream.reply = Reply.error(404, "you said: bomb")

    with pytest.raises(openai.NotFoundError) as caught:
        ask(client)

    assert "bomb" not in str(caught.value)


def interrupted(client: OpenAI) -> tuple[str, openai.APIError]:
    """The text that arrived of a stream that ends with an error, and the error."""
    events: list[Any] = []
    with pytest.raises(openai.APIError) as caught:
        events.extend(ask(client, stream=True))
    with client.responses.with_streaming_response.create(model="m", input="x", stream=True) as raw:
        text = raw.read().decode()
    deltas = [json.loads(line[6:]) for line in text.split("\n") if line.startswith("data: ")]
    said = "".join(event["delta"] for event in deltas if event["type"] == "response.output_text.delta")
    assert deltas[-1]["type"] == "error"
    assert [event["sequence_number"] for event in deltas] == list(range(len(deltas)))
    return said, caught.value


@pytest.mark.parametrize(
    "end",
    [
        (Pause(0.05), Die()),
        (),
        ({"type": "error", "code": "odd", "message": "secret"}, Hang()),
        (b"data: {not json}\n\n", Hang()),
        (b"data: [DONE]\n\n",),
    ],
)
def test_an_upstream_that_breaks_off(
    client: OpenAI, gateway: Gateway, upstream: FakeUpstream, end: tuple[Any, ...]
) -> None:
    """What was held is judged and let out, then an error ends the stream; the decision is kept."""
    upstream.reply = streaming(*response_events("half an answer")[:5], *end)

    said, error = interrupted(client)

    assert said == "half an answer"
    assert error.code == "upstream_error"
    assert "secret" not in str(error.body)
    assert gateway.kept()[1]["content"] == "half an answer"


@pytest.mark.parametrize("reply", [Reply.json(b"<html>"), Reply.json({"object": "list"}), Reply.json([1])])
def test_a_whole_answer_that_is_none_is_a_502(client: OpenAI, upstream: FakeUpstream, reply: Reply) -> None:
    upstream.reply = reply

    with pytest.raises(openai.InternalServerError) as caught:
        ask(client)

    assert caught.value.status_code == 502


@pytest.mark.parametrize("word", ["guardfail", "guardhang"])
def test_a_guard_that_fails_on_the_prompt(client: OpenAI, gateway: Gateway, word: str) -> None:
    """The policy says block: the client gets no answer, and the failure is kept."""
    answer = ask(client, input=word)

    assert answer.incomplete_details.reason == "content_filter"
    assert answer.tidegate["rule"] == "on_guard_error"
    assert gateway.kept()[0]["failure"] in ("GuardUnavailable", "GuardTimeout")


@pytest.mark.parametrize("word", ["guardfail", "guardhang"])
def test_a_guard_that_fails_in_a_stream(client: OpenAI, gateway: Gateway, upstream: FakeUpstream, word: str) -> None:
    """What was judged has left; nothing after it does."""
    events = response_events(f"good words {word} x", cut=lambda text: [text[:11], text[11:]])
    upstream.reply = streaming(*events[:5], Pause(0.2), *events[5:6], Hang())

    got = list(ask(client, stream=True))

    assert text_of(got) == "good words"
    assert got[-1].type == "response.incomplete"
    assert got[-1].response.tidegate["failure"]["kind"] in ("GuardUnavailable", "GuardTimeout")
    assert gateway.kept()[1]["rule"] == "on_guard_error"


@pytest.mark.parametrize("stream", [False, True])
def test_a_decision_that_cannot_be_kept_is_an_error(upstream: FakeUpstream, upstream_url: str, stream: bool) -> None:
    """An exchange without its record does not pass for a complete one."""
    record = Record()
    record.broken = True
    upstream.reply = streaming(*response_events("hello there")) if stream else Reply.json(response("hello"))
    app = create_app(guard=FakeStreamGuard(), policy=make_policy(), keep=record, upstream_url=upstream_url)

    with (
        serving(app) as url,
        OpenAI(base_url=f"{url}/v1", api_key="sk", max_retries=0) as client,
        pytest.raises(openai.APIError) as caught,
    ):
        list(ask(client, stream=stream))

    assert caught.value.code == "store_error"


async def test_a_client_that_hangs_up_frees_everything(upstream: FakeUpstream, upstream_url: str) -> None:
    """The upstream is cancelled, the session closed, and the decision on what was judged is kept."""
    guard, record = FakeStreamGuard(), Record()
    upstream.reply = streaming(*response_events("one two three ")[:5], Hang())
    app = create_app(guard=guard, policy=make_policy(), keep=record, upstream_url=upstream_url)

    with serving(app) as url:
        async with httpx.AsyncClient() as client:
            body = {"model": "m", "input": "count", "stream": True}
            async with client.stream("POST", f"{url}/v1/responses", json=body) as answer:
                async for text in answer.aiter_text():
                    if "three" in text:
                        break
                assert guard.open_sessions == 1
        await until(lambda: upstream.received[0].cancelled, "the upstream to be cancelled")
        await until(lambda: guard.open_sessions == 0, "the session to be closed")
        await until(lambda: len(record.kept) == 2, "the decision to be kept")

    assert record.actions == ["allow", "allow"]
    assert record.kept[1][0].coverage[0].characters == len("one two three")


def test_answers_leave_their_connection_to_the_next() -> None:
    """The last event is the end: nothing more is waited for, and the upstream's connection is used again."""
    callers: list[int] = []
    fake = FakeUpstream(streaming(*response_events("Hello there.")))

    async def upstream(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            callers.append(scope["client"][1])
        await fake(scope, receive, send)

    with serving(upstream) as upstream_url:
        app = create_app(guard=FakeStreamGuard(), policy=make_policy(), upstream_url=upstream_url)
        with serving(app) as url, OpenAI(base_url=f"{url}/v1", api_key="sk", max_retries=0) as client:
            for _ in range(3):
                assert text_of(list(ask(client, stream=True))) == "Hello there."
                wait_until(lambda: fake.open_requests == 0, "the upstream to finish")

    assert len(callers) == 3
    assert len(set(callers)) < 3


def test_no_user_text_is_logged(client: OpenAI, gateway: Gateway, upstream: FakeUpstream) -> None:
    """A marked word goes through the door, and is in no log and no metric."""
    upstream.reply = streaming(*response_events("canary7 bomb bomb", {**message_item("canary7"), "canary7": "canary7"}))
    list(ask(client, input="canary7", stream=True))
    upstream.reply = Reply.json(response("canary7 bomb bomb"))
    ask(client, input="canary7")
    with pytest.raises(openai.BadRequestError):
        ask(client, input=[{"role": "canary7", "content": "canary7"}])

    assert "canary7" not in gateway.log.read_text()
    assert "canary7" not in httpx.get(f"{gateway.url}/metrics").text
