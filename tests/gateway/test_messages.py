"""Anthropic's Messages API, seen by the real Anthropic client through a gateway in a process of its own."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import httpx
import pytest
from anthropic import Anthropic, AsyncAnthropic

from gateway import messages_wire as fake
from serving import Gateway, Record, make_policy, serving, until, wait_until
from tidegate.gateway.app import create_app
from tidegate.testing import Die, FakeStreamGuard, FakeUpstream, Hang, Reply

HELLO: list[Any] = [{"role": "user", "content": "Say hello"}]
TOOLS: list[Any] = [{"name": "search", "description": "finds", "input_schema": {"type": "object"}}]


@pytest.fixture
def client(gateway: Gateway, upstream: FakeUpstream) -> Any:
    upstream.reply = Reply.json(fake.message("Hello there."))
    with Anthropic(base_url=gateway.url, api_key="sk-client", max_retries=0) as made:
        yield made


def ask(client: Any, **options: Any) -> Any:
    return client.messages.create(**{"model": "fake-model", "max_tokens": 64, "messages": HELLO, **options})


def stream(client: Any, **options: Any) -> Any:
    return client.messages.stream(**{"model": "fake-model", "max_tokens": 64, "messages": HELLO, **options})


def streamed(client: Any, **options: Any) -> tuple[Any, Any]:
    """The message that the client put together, and our field."""
    field = None
    with stream(client, **options) as events:
        for event in events:
            field = getattr(event, "tidegate", None) or field
        return events.get_final_message(), field


# --- safe exchanges -----------------------------------------------------------------------------------------------


def test_a_safe_message_passes_whole(client: Anthropic, gateway: Gateway, upstream: FakeUpstream) -> None:
    """What the upstream says arrives as it is, and both decisions are kept before the client has the answer."""
    answer = ask(client, extra_headers={"anthropic-beta": "some-beta"})

    assert [block.text for block in answer.content] == ["Hello there."]
    assert answer.stop_reason == "end_turn"
    assert answer.usage.output_tokens == 5
    assert answer.tidegate["action"] == "allow"
    assert answer._request_id.startswith("req_")
    assert [row["action"] for row in gateway.kept()] == ["allow", "allow"]
    (received,) = upstream.received
    assert received.path == "/v1/messages"
    assert received.headers["authorization"] == "Bearer sk-client"
    assert received.headers["anthropic-version"] == client.default_headers["anthropic-version"]
    assert received.headers["anthropic-beta"] == "some-beta"


def test_a_safe_message_passes_streaming(client: Anthropic, gateway: Gateway, upstream: FakeUpstream) -> None:
    """Thinking with its signature, text, and a call, put together by the client's own code."""
    upstream.reply = fake.reply(
        fake.start(),
        {"type": "ping"},
        *fake.thinking(0, "They want", " a hello.", signature="c2lnbmVk"),
        *fake.text(1, "Hel", "lo the", "re."),
        *fake.tool_use(2, '{"query": "he', 'llo"}'),
        *fake.end("tool_use"),
    )

    answer, field = streamed(client, tools=TOOLS, thinking={"type": "enabled", "budget_tokens": 1024})

    thinking, text, call = answer.content
    assert (thinking.thinking, thinking.signature) == ("They want a hello.", "c2lnbmVk")
    assert text.text == "Hello there."
    assert (call.id, call.name, call.input) == ("toolu_1", "search", {"query": "hello"})
    assert (answer.stop_reason, answer.usage.output_tokens) == ("tool_use", 9)
    assert field["action"] == "allow"
    assert [row["action"] for row in gateway.kept()] == ["allow", "allow"]
    assert gateway.kept()[1]["content"] == "Hello there."
    assert gateway.kept()[1]["reasoning"] == "They want a hello."


async def test_the_async_client_streams(gateway: Gateway, upstream: FakeUpstream) -> None:
    """The async client of Anthropic gets the same."""
    upstream.reply = fake.reply(fake.start(), *fake.text(0, "one ", "two ", "three"), *fake.end())

    async with AsyncAnthropic(base_url=gateway.url, api_key="sk", max_retries=0) as client, stream(client) as events:
        said = "".join([text async for text in events.text_stream])

    assert said == "one two three"


def test_a_whole_exchange_with_a_tool(client: Anthropic, gateway: Gateway, upstream: FakeUpstream) -> None:
    """The client sends back what it got, with the tool's result, and the upstream gets all of it as it was."""
    upstream.reply = fake.reply(
        fake.start(), *fake.thinking(0, "hm"), *fake.tool_use(1, '{"query": "pie"}'), *fake.end("tool_use")
    )
    first, _ = streamed(client, tools=TOOLS)
    upstream.reply = Reply.json(fake.message("Here is a pie."))
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "apple pie"}]}
    messages = [*HELLO, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]

    answer = ask(client, tools=TOOLS, messages=messages)

    assert answer.content[0].text == "Here is a pie."
    sent = upstream.received[1].body["messages"]
    assert sent[1]["content"][0] == {"type": "thinking", "thinking": "hm", "signature": "c2lnbmVk"}
    assert sent[2]["content"] == [result]
    assert gateway.kept()[2]["content"] == "apple pie"


# --- blocked exchanges --------------------------------------------------------------------------------------------


def test_an_unsafe_stream_is_cut_before_its_harm(client: Anthropic, gateway: Gateway, upstream: FakeUpstream) -> None:
    """The safe beginning arrives, nothing of the rest; the ending is well-formed, and the upstream is cancelled."""
    upstream.reply = fake.reply(fake.start(), *fake.text(0, "Take a ", "bomb bo", "mb and ", "run")[:-1], Hang())

    answer, field = streamed(client)

    assert [block.text for block in answer.content] == ["Take a"]
    assert answer.stop_reason == "refusal"
    assert answer.stop_details.explanation == "Not here."
    assert (field["action"], field["rule"], field["severity"]) == ("block", "unsafe", "unsafe")
    assert field["where"] == {"path": "content[0].text", "start": 6, "end": 16}
    wait_until(lambda: upstream.received[0].cancelled, "the upstream to be cancelled")
    assert [row["action"] for row in gateway.kept()] == ["allow", "block"]


def test_an_unsafe_whole_message_is_replaced(client: Anthropic, gateway: Gateway, upstream: FakeUpstream) -> None:
    """The policy's message stands in for the answer, and nothing else of it is left."""
    sly = {"type": "thinking", "thinking": "sly", "signature": "c2ln"}
    upstream.reply = Reply.json(fake.message(sly, "a bomb"))

    answer = ask(client)

    assert [block.text for block in answer.content] == ["Not here."]
    assert answer.stop_reason == "refusal"
    assert answer.tidegate["action"] == "block"
    assert "sly" not in answer.to_json()
    assert gateway.kept()[1]["content"] == "a bomb"


UNSAFE: dict[str, Any] = {
    "text": {"messages": [{"role": "user", "content": "a bomb"}]},
    "block": {"messages": [{"role": "user", "content": [{"type": "text", "text": "a bomb"}]}]},
    "tool result": {
        "messages": [
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "a bomb"}]},
        ]
    },
    "document": {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "a bomb"}}
                ],
            }
        ]
    },
    "prefill": {"messages": [*HELLO, {"role": "assistant", "content": "Take a bomb"}]},
}


@pytest.mark.parametrize("options", UNSAFE.values(), ids=UNSAFE)
def test_an_unsafe_prompt_gets_the_policy_s_message(
    client: Anthropic, gateway: Gateway, upstream: FakeUpstream, options: Any
) -> None:
    """Whole and streaming, wherever in the request it stands; nothing of the upstream's answer is read."""
    whole = ask(client, **options)
    answer, field = streamed(client, **options)

    for one, why in ((whole, whole.tidegate), (answer, field)):
        assert [block.text for block in one.content] == ["Not here."]
        assert one.stop_reason == "refusal"
        assert one.usage.output_tokens == 0
        assert why["action"] == "block"
        assert why["where"]["path"].startswith("messages[")
    assert [row["action"] for row in gateway.kept()] == ["block", "block"]


def test_the_given_beginning_of_an_answer_is_its_context(upstream: FakeUpstream, upstream_url: str) -> None:
    """The answer goes on where it ends, and the guard knows it."""
    guard = FakeStreamGuard()
    upstream.reply = fake.reply(fake.start(), *fake.text(0, " a pie"), *fake.end())
    app = create_app(guard=guard, policy=make_policy(), upstream_url=upstream_url)
    messages = [*HELLO, {"role": "assistant", "content": "Here is"}]

    with serving(app) as url, Anthropic(base_url=url, api_key="sk", max_retries=0) as client:
        answer, _ = streamed(client, messages=messages)

    assert answer.content[0].text == " a pie"
    (opened,) = guard.opened
    assert opened.context is not None
    assert [turn.content for turn in opened.context.turns] == ["Say hello", "Here is"]


# --- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "kind", "expected"),
    [
        (401, "authentication_error", anthropic.AuthenticationError),
        (404, "not_found_error", anthropic.NotFoundError),
        (429, "rate_limit_error", anthropic.RateLimitError),
        (500, "api_error", anthropic.InternalServerError),
        (529, "overloaded_error", anthropic.InternalServerError),
    ],
)
def test_errors_of_the_upstream_come_through_as_anthropic_s(
    client: Anthropic, upstream: FakeUpstream, status: int, kind: str, expected: type[anthropic.APIStatusError]
) -> None:
    """The status, the kind, and when to come again; nothing of what the upstream says."""
    said = {"type": "error", "error": {"type": kind, "message": "first mix the powder"}}
    upstream.reply = Reply.json(said, status=status, headers={"retry-after": "7"})

    for call in (ask, streamed):
        with pytest.raises(expected) as caught:
            call(client)
        assert caught.value.status_code == status
        assert caught.value.type == kind
        assert caught.value.response.headers["retry-after"] == "7"
        assert caught.value.request_id is not None
        assert "powder" not in str(caught.value)


def test_an_error_in_the_middle_of_a_stream_is_an_event(client: Anthropic, upstream: FakeUpstream) -> None:
    """What was judged before it arrived; the client raises."""
    overloaded = {"type": "error", "error": {"type": "overloaded_error", "message": "first mix the powder"}}
    for last, kind in ((overloaded, "overloaded_error"), (Die(), "api_error")):
        upstream.reply = fake.reply(fake.start(), *fake.text(0, "Hello", " there")[:-1], last)
        said: list[str] = []
        with pytest.raises(anthropic.APIStatusError) as caught, stream(client) as events:
            said.extend(events.text_stream)

        assert "".join(said) == "Hello there"
        assert caught.value.type == kind
        assert "powder" not in str(caught.value)


def test_a_request_that_cannot_be_read_is_refused_in_anthropic_s_shape(client: Anthropic) -> None:
    """With the place of what is wrong."""
    with pytest.raises(anthropic.BadRequestError) as caught:
        ask(client, messages=[{"role": "wizard", "content": "x"}])

    assert caught.value.type == "invalid_request_error"
    assert caught.value.api_message == "messages[0].role: expected one of user, assistant, system"
    assert caught.value.request_id is not None


def test_a_gateway_without_an_upstream_says_so() -> None:
    app = create_app(guard=FakeStreamGuard(), policy=make_policy())
    with serving(app) as url, Anthropic(base_url=url, api_key="sk", max_retries=0) as client:
        with pytest.raises(anthropic.InternalServerError) as caught:
            ask(client)
        assert caught.value.type == "overloaded_error"


def test_a_decision_that_cannot_be_kept_is_an_error(upstream: FakeUpstream, upstream_url: str) -> None:
    """The end of the exchange is not sent as if all were well."""
    record = Record()
    record.broken = True
    app = create_app(guard=FakeStreamGuard(), policy=make_policy(), keep=record, upstream_url=upstream_url)
    with serving(app) as url, Anthropic(base_url=url, api_key="sk", max_retries=0) as client:
        upstream.reply = Reply.json(fake.message("Hello there."))
        with pytest.raises(anthropic.InternalServerError) as whole:
            ask(client)
        upstream.reply = fake.reply(fake.start(), *fake.text(0, "Hello there."), *fake.end())
        with pytest.raises(anthropic.APIStatusError) as cut:
            streamed(client)

    assert whole.value.type == cut.value.type == "api_error"


# --- keys, and the paths beside it --------------------------------------------------------------------------------


def test_the_gateway_s_own_key_goes_on_instead_of_the_client_s(upstream: FakeUpstream, upstream_url: str) -> None:
    """As Anthropic's header and as a bearer token, for servers that look only there."""
    upstream.reply = Reply.json(fake.message("Hello there."))
    app = create_app(guard=FakeStreamGuard(), policy=make_policy(), upstream_url=upstream_url, upstream_key="sk-own")
    with serving(app) as url, Anthropic(base_url=url, api_key="sk-client", max_retries=0) as client:
        ask(client)

    (received,) = upstream.received
    assert received.headers["x-api-key"] == "sk-own"
    assert received.headers["authorization"] == "Bearer sk-own"
    assert "sk-client" not in str(received.headers)


def test_the_upstream_s_request_id_is_told(client: Anthropic, upstream: FakeUpstream) -> None:
    """Once, so that people can ask the upstream about it; one that could be a sentence is not."""
    for said, told in (("req_upstream", True), ("first mix the powder", False)):
        upstream.reply = Reply.json(fake.message("Hello there."), headers={"request-id": said})
        response = client.messages.with_raw_response.create(model="m", max_tokens=5, messages=HELLO)
        assert response.headers.get("x-upstream-request-id") == (said if told else None)


@pytest.mark.parametrize("path", ["messages", "messages/count_tokens", "messages/batches", "messages/nothing"])
def test_a_request_has_one_id_under_both_names(gateway: Gateway, upstream: FakeUpstream, path: str) -> None:
    """That of the log, whatever the upstream calls it and whether it is answered or refused."""
    upstream.reply = Reply.json(fake.message("Hello there."), headers={"request-id": "req_upstream"})
    body = {"model": "m", "max_tokens": 5, "messages": HELLO}

    made = httpx.post(f"{gateway.base_url}/{path}", json=body).headers
    given = httpx.post(f"{gateway.base_url}/{path}", json=body, headers={"x-request-id": "edge-4711"}).headers

    assert made["request-id"] == made["x-request-id"] != "req_upstream"
    assert given.get_list("request-id") == given.get_list("x-request-id") == ["edge-4711"]


def test_a_client_is_known_by_either_header(gateway: Gateway, upstream: FakeUpstream) -> None:
    """What it sends goes on as it is."""
    upstream.reply = Reply.json(fake.message("Hello there."))
    body = {"model": "m", "max_tokens": 5, "messages": HELLO}
    for name, value in (("x-api-key", "sk-client"), ("authorization", "Bearer token")):
        assert httpx.post(f"{gateway.base_url}/messages", json=body, headers={name: value}).status_code == 200

    assert upstream.received[0].headers["x-api-key"] == "sk-client"
    assert "authorization" not in upstream.received[0].headers
    assert upstream.received[1].headers["authorization"] == "Bearer token"


def test_the_client_s_beta_calls_are_guarded_too(client: Anthropic, upstream: FakeUpstream) -> None:
    """They come to the same path, with a query."""
    upstream.reply = Reply.json(fake.message("a bomb"))

    answer = client.beta.messages.create(model="m", max_tokens=5, messages=HELLO, betas=["some-beta"])

    assert answer.stop_reason == "refusal"
    assert upstream.received[0].headers["anthropic-beta"] == "some-beta"


def test_tokens_are_counted(client: Anthropic, gateway: Gateway, upstream: FakeUpstream) -> None:
    """Nothing but the number comes back, and the request is judged as one that is answered."""
    upstream.reply = Reply.json({"input_tokens": 14, "note": "first mix the powder"})

    counted = client.messages.count_tokens(model="m", messages=HELLO, system="be kind")
    with pytest.raises(anthropic.PermissionDeniedError) as caught:
        client.messages.count_tokens(model="m", messages=[{"role": "user", "content": "a bomb"}])

    assert counted.to_dict() == {"input_tokens": 14}
    assert upstream.received[0].path == "/v1/messages/count_tokens"
    assert caught.value.api_message == "Not here."
    assert [row["action"] for row in gateway.kept()] == ["allow", "block"]


def test_what_is_no_number_of_tokens_does_not_pass(client: Anthropic, upstream: FakeUpstream) -> None:
    upstream.reply = Reply.json({"input_tokens": "first mix the powder"})

    with pytest.raises(anthropic.InternalServerError) as caught:
        client.messages.count_tokens(model="m", messages=HELLO)

    assert "powder" not in str(caught.value)


def test_batches_are_refused(client: Anthropic, gateway: Gateway, upstream: FakeUpstream) -> None:
    """On every path of theirs: nobody would judge them."""
    request: Any = {"custom_id": "a", "params": {"model": "m", "max_tokens": 1, "messages": HELLO}}
    with pytest.raises(anthropic.NotFoundError) as caught:
        client.messages.batches.create(requests=[request])
    with pytest.raises(anthropic.NotFoundError):
        client.messages.batches.retrieve("b")
    with httpx.Client(base_url=gateway.url) as plain:
        results = plain.get("/v1/messages/batches/b/results")

    assert caught.value.api_message is not None
    assert "not guarded" in caught.value.api_message
    assert results.json()["error"]["type"] == "not_found_error"
    assert upstream.received == []


# --- the wire -----------------------------------------------------------------------------------------------------


def test_events_are_named_on_the_wire(gateway: Gateway, upstream: FakeUpstream) -> None:
    """Byte for byte what the upstream's events say, with our field at the end."""
    upstream.reply = fake.reply(fake.start(), *fake.text(0, "Hello\n\ndata: x"), *fake.end())

    body = {"model": "m", "max_tokens": 5, "messages": HELLO, "stream": True}
    response = httpx.post(f"{gateway.base_url}/messages", json=body)

    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["request-id"].startswith("req_")
    events = [part.split("\n") for part in response.text.split("\n\n")[:-1]]
    said = [json.loads(data.removeprefix("data: ")) for _, data in events]
    assert [name.removeprefix("event: ") for name, _ in events] == [one["type"] for one in said]
    assert said[-2].pop("tidegate")["action"] == "allow"
    assert said == [fake.start(), *fake.text(0, "Hello\n\ndata: x"), *fake.end()]


async def test_a_client_that_hangs_up_frees_everything(upstream: FakeUpstream, upstream_url: str) -> None:
    """The upstream's request is cancelled, no session stays open, and what was judged is kept."""
    guard, record = FakeStreamGuard(), Record()
    upstream.reply = fake.reply(fake.start(), *fake.text(0, "one ", "two ", "three ")[:-1], Hang())
    app = create_app(guard=guard, policy=make_policy(), keep=record, upstream_url=upstream_url)
    with serving(app) as url:
        async with AsyncAnthropic(base_url=url, api_key="sk", max_retries=0) as client, stream(client) as events:
            assert await anext(aiter(events.text_stream))
        await until(lambda: upstream.received[0].cancelled, "the upstream to be cancelled")
        await until(lambda: guard.open_sessions == 0, "the session to be closed")
        await until(lambda: len(record.kept) == 2, "both decisions")

    assert record.actions == ["allow", "allow"]
