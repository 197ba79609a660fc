"""LiteLLM's real proxy with Tidegate as its guardrail, and its client before a gateway. Run by ``.ci/servers``.

The proxy is a process in an environment of its own; the real `openai` and `anthropic` clients talk to it. Behind it is
a scripted upstream; the Tidegate judges by words.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
import yaml

from gateway import messages_wire as wire
from servers.running import ServerProcess, python_of, running, servers_folder
from serving import Record, make_policy, serving, wait_until
from tidegate.gateway.app import create_app
from tidegate.testing import FakeStreamGuard, FakeUpstream, Hang, Reply, chunk, completion, text_chunks

FOLDER = servers_folder("litellm")
GUARDRAIL = "tidegate.integrations.litellm.TidegateGuardrail"
HELLO: list[Any] = [{"role": "user", "content": "Say hello"}]
BOMB: list[Any] = [{"role": "user", "content": "a bomb"}]
KEY = "sk-test-0123456789abcdef"


class Place:
    """A Tidegate, an upstream, and the proxy between."""

    def __init__(self, upstream: FakeUpstream, guard: FakeStreamGuard, record: Record, proxy: ServerProcess) -> None:
        self.upstream, self.guard, self.record, self.proxy = upstream, guard, record, proxy

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.proxy.url}/v1", api_key=KEY, max_retries=0)

    def ask(self, *guardrails: str, messages: list[Any] = HELLO, **options: Any) -> Any:
        """A chat; without names of guardrails it is the one before and after the call."""
        extra = {"guardrails": list(guardrails or ("tidegate",))}
        with self.client() as client:
            answer = client.chat.completions.create(model="fake", messages=messages, extra_body=extra, **options)
            return list(answer) if options.get("stream") else answer


def config(upstream_url: str, tidegate_url: str) -> dict[str, Any]:
    def guardrail(name: str, mode: list[str], url: str, **options: Any) -> dict[str, Any]:
        parameters = {"guardrail": GUARDRAIL, "mode": mode, "api_base": url, **options}
        return {"guardrail_name": name, "litellm_params": parameters}

    nobody = "http://127.0.0.1:9"
    return {
        "model_list": [
            {
                "model_name": name,
                "litellm_params": {"model": model, "api_base": f"{upstream_url}/v1", "api_key": "none"},
            }
            for name, model in (("fake", "openai/fake-model"), ("chat", "hosted_vllm/fake-model"))
        ],
        "guardrails": [
            guardrail("tidegate", ["pre_call", "post_call"], tidegate_url, region="DE", route="litellm"),
            guardrail("beside", ["during_call", "post_call"], tidegate_url),
            guardrail("closed", ["pre_call", "post_call"], nobody, patience=0.1),
            guardrail("closed-after", ["post_call"], nobody, patience=0.1),
            guardrail("open", ["pre_call", "post_call"], nobody, patience=0.1, on_unreachable="allow"),
            guardrail("lenient", ["pre_call", "post_call"], tidegate_url, on_unreadable="allow"),
        ],
        "general_settings": {"master_key": KEY},
        "litellm_settings": {"telemetry": False, "num_retries": 0},
    }


@pytest.fixture(scope="module")
def _place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("litellm")
    upstream, guard, record = FakeUpstream(), FakeStreamGuard(sticky=True), Record()
    with (
        serving(upstream) as upstream_url,
        serving(create_app(guard=guard, policy=make_policy(), keep=record)) as tidegate_url,
    ):
        file = folder / "config.yaml"
        file.write_text(yaml.safe_dump(config(upstream_url, tidegate_url)))
        program = str(Path(python_of("litellm")).with_name("litellm"))
        command = [program, "--config", str(file), "--host", "127.0.0.1", "--port", "{port}"]
        quiet = {"LITELLM_LOG": "ERROR", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "NO_PROXY": "*"}
        with running(command, folder / "log.txt", **quiet) as proxy:
            yield Place(upstream, guard, record, proxy)


@pytest.fixture
def place(_place: Place) -> Place:
    _place.upstream.reply = Reply.json(completion("Hello there."))
    _place.upstream.received.clear()
    _place.record.kept.clear()
    return _place


def said(chunks: list[Any], name: str = "content") -> list[str]:
    texts = [getattr(one.choices[0].delta, name, None) for one in chunks if one.choices]
    return [text for text in texts if text]


def reasons(chunks: list[Any]) -> list[str]:
    return [one.choices[0].finish_reason for one in chunks if one.choices and one.choices[0].finish_reason]


# --- what is allowed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tidegate", "beside"])
def test_an_allowed_answer_arrives_as_it_was_written(place: Place, name: str) -> None:
    """Prompt and answer have a decision each, in the scope of the configuration."""
    answer = place.ask(name, user="somebody")

    assert answer.choices[0].message.content == "Hello there."
    assert answer.choices[0].finish_reason == "stop"
    assert place.record.actions == ["allow", "allow"]
    scopes = {(decision.scope.region, decision.scope.route) for decision, _, _ in place.record.kept}
    assert scopes == ({("DE", "litellm")} if name == "tidegate" else {(None, "/v1/guard")})


@pytest.mark.parametrize("name", ["tidegate", "beside"])
def test_an_allowed_stream_arrives_as_it_was_written(place: Place, name: str) -> None:
    """The same texts in the same chunks."""
    pieces = ["Mix", " flo", "ur and", " water, ", "wait", "."]
    place.upstream.reply = Reply.stream(*text_chunks(pieces))

    chunks = place.ask(name, stream=True)

    assert said(chunks) == pieces
    assert reasons(chunks) == ["stop"]
    assert place.record.actions == ["allow", "allow"]


def test_text_leaves_before_the_answer_is_complete(place: Place) -> None:
    """A stream stays a stream."""
    place.upstream.reply = Reply.stream(
        *text_chunks(["one ", "two ", "three "], finish_reason=None), Hang(), done=False
    )
    with place.client() as client:
        stream = client.chat.completions.create(
            model="fake", messages=HELLO, stream=True, extra_body={"guardrails": ["tidegate"]}
        )
        seen = []
        for one in stream:
            seen += said([one])
            if "".join(seen).startswith("one two"):
                break
        stream.close()

    assert "".join(seen) == "one two "
    wait_until(lambda: not place.guard.open_sessions, "the session to be given back")


# --- what is blocked ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_blocked_prompt_never_reaches_the_model(place: Place, stream: bool) -> None:
    """The client gets the policy's message, and which rule it was."""
    with pytest.raises(openai.BadRequestError) as caught:
        place.ask(messages=BOMB, stream=stream)

    assert "Not here." in str(caught.value)
    assert "bomb" not in str(caught.value)
    assert place.upstream.received == []
    assert place.record.actions == ["block"]


def test_a_prompt_that_is_judged_beside_the_call_is_blocked_too(place: Place) -> None:
    """The answer waits for the decision."""
    with pytest.raises(openai.BadRequestError):
        place.ask("beside", messages=BOMB)


def test_a_blocked_answer_says_the_policys_message(place: Place) -> None:
    """And nothing of what was written; other choices stay."""
    place.upstream.reply = Reply.json(completion("a bomb bomb", "a pie"))

    answer = place.ask(n=2)

    assert [choice.message.content for choice in answer.choices] == ["Not here.", "a pie"]
    assert [choice.finish_reason for choice in answer.choices] == ["content_filter", "stop"]
    assert answer.choices[0].model_extra["tidegate"]["rule"] == "unsafe"
    assert "bomb" not in answer.model_dump_json()


def test_a_stream_that_turns_bad_ends_there(place: Place) -> None:
    """What was fine has left, nothing after it does, and the model is told to stop."""
    pieces = ["Mix ", "this ", "and a ", "bomb ", "bomb ", "and "]
    place.upstream.reply = Reply.stream(*text_chunks(pieces, finish_reason=None), Hang(), done=False)

    chunks = place.ask(stream=True)

    assert "".join(said(chunks)) == "Mix this and a"
    assert reasons(chunks) == ["content_filter"]
    assert chunks[-1].model_extra["tidegate"]["rule"] == "unsafe"
    assert place.record.actions == ["allow", "block"]
    wait_until(lambda: not place.upstream.open_requests, "the upstream's request to be cancelled")


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_and_calls_are_judged(place: Place, stream: bool) -> None:
    """They are text of the model as well."""
    call = {"id": "1", "index": 0, "type": "function", "function": {"name": "f", "arguments": '{"a": "bomb bomb '}}
    for message in ({"reasoning_content": "a bomb bomb ", "content": "ok"}, {"content": None, "tool_calls": [call]}):
        whole = Reply.json(completion(message))
        place.upstream.reply = Reply.stream(chunk(message), chunk(finish_reason="stop")) if stream else whole

        answer = place.ask(stream=stream)

        text = json.dumps([one.model_dump() for one in answer]) if stream else answer.model_dump_json()
        assert "bomb" not in text
        assert "content_filter" in text


# --- when Tidegate is not there -----------------------------------------------------------------------------------


def test_without_tidegate_nothing_passes(place: Place) -> None:
    """That is the default: an error that says so, and the model is not asked."""
    with pytest.raises(openai.InternalServerError) as caught:
        place.ask("closed")

    assert caught.value.status_code == 503
    assert place.upstream.received == []


@pytest.mark.parametrize("stream", [False, True])
def test_without_tidegate_no_answer_passes(place: Place, stream: bool) -> None:
    """Also when it went away after the prompt."""
    place.upstream.reply = Reply.stream(*text_chunks(["secret"])) if stream else Reply.json(completion("secret"))

    with pytest.raises(openai.APIError) as caught:
        place.ask("closed-after", stream=stream)

    assert "secret" not in str(caught.value)


def test_without_tidegate_everything_passes_where_that_is_wished(place: Place) -> None:
    """``on_unreachable: allow``."""
    assert place.ask("open", messages=BOMB).choices[0].message.content == "Hello there."
    place.upstream.reply = Reply.stream(*text_chunks(["one", " bomb"]))
    assert said(place.ask("open", stream=True)) == ["one", " bomb"]


# --- what no guard can read, and other routes ---------------------------------------------------------------------


def test_what_no_guard_can_read_is_refused_or_passes_as_is_wished(place: Place) -> None:
    """``on_unreadable``."""
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    messages: list[Any] = [{"role": "user", "content": [{"type": "text", "text": "see"}, image]}]

    with pytest.raises(openai.BadRequestError, match="no guard can read"):
        place.ask(messages=messages)
    assert place.ask("lenient", messages=messages).choices[0].message.content == "Hello there."


def test_messages_of_anthropic_are_judged(place: Place) -> None:
    """Prompts and answers; a stream is held until all of it is judged."""
    extra = {"guardrails": ["tidegate"]}
    with anthropic.Anthropic(base_url=place.proxy.url, api_key=KEY, max_retries=0) as client:

        def ask(messages: list[Any], *, stream: bool = False) -> Any:
            return client.messages.create(
                model="chat", max_tokens=64, messages=messages, stream=stream, extra_body=extra
            )

        assert ask(HELLO).content[0].text == "Hello there."
        with pytest.raises(anthropic.APIStatusError):
            ask(BOMB)
        place.upstream.reply = Reply.json(completion("a bomb bomb"))
        with pytest.raises(anthropic.APIStatusError):
            ask(HELLO)
        place.upstream.reply = Reply.stream(*text_chunks(["fine ", "bomb ", "bomb "]))
        events = []
        with pytest.raises(anthropic.APIError):
            events += [event.to_json() for event in ask(HELLO, stream=True)]
        assert "bomb" not in "".join(events)


# --- LiteLLM as a client of the gateway ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gate() -> Iterator[tuple[FakeUpstream, str]]:
    upstream = FakeUpstream()
    with (
        serving(upstream) as upstream_url,
        serving(
            create_app(guard=FakeStreamGuard(sticky=True), policy=make_policy(), upstream_url=f"{upstream_url}/v1")
        ) as url,
    ):
        yield upstream, url


def completions(*requests: dict[str, Any]) -> list[dict[str, Any]]:
    """What LiteLLM's client makes of these requests."""
    script = Path(__file__).with_name("litellm_client.py")
    done = subprocess.run(
        [python_of("litellm"), str(script)],
        input="\n".join(json.dumps({"messages": HELLO, "api_key": "sk", "num_retries": 0, **one}) for one in requests),
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR", "NO_PROXY": "*"},
    )
    found: list[dict[str, Any]] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def test_the_client_of_litellm_speaks_openai_to_a_gateway(gate: tuple[FakeUpstream, str]) -> None:
    """Whole and streaming, allowed and blocked."""
    upstream, url = gate

    def reply(body: Any) -> Reply:
        bad = "turn" in body["messages"][-1]["content"]
        if not body.get("stream"):
            return Reply.json(completion("a bomb bomb" if bad else "Hello there."))
        return Reply.stream(*text_chunks(["one ", "two", " bomb bomb end" if bad else " end"]))

    upstream.reply = reply
    bad, base = [{"role": "user", "content": "turn"}], {"model": "openai/fake", "api_base": f"{url}/v1"}

    whole, stream, blocked, cut, prompt = completions(
        base,
        {**base, "stream": True},
        {**base, "messages": bad},
        {**base, "messages": bad, "stream": True},
        {**base, "messages": BOMB},
    )

    assert whole == {"texts": ["Hello there."], "finish_reason": "stop"}
    assert ("".join(stream["texts"]), stream["finish_reason"]) == ("one two end", "stop")
    assert blocked == {"texts": ["Not here."], "finish_reason": "content_filter"}
    assert ("".join(cut["texts"]), cut["finish_reason"]) == ("one two", "content_filter")
    assert prompt == {"texts": ["Not here."], "finish_reason": "content_filter"}


def test_the_client_of_litellm_speaks_anthropic_to_a_gateway(gate: tuple[FakeUpstream, str]) -> None:
    """The same through ``/v1/messages``."""
    upstream, url = gate

    def reply(body: Any) -> Reply:
        if not body.get("stream"):
            return Reply.json(wire.message("Hello there."))
        return wire.reply(wire.start(), *wire.text(0, "one ", "two ", "bomb ", "bomb ", "end"), *wire.end())

    upstream.reply = reply
    base = {"model": "anthropic/fake", "api_base": url, "max_tokens": 64}

    whole, cut, prompt = completions(base, {**base, "stream": True}, {**base, "messages": BOMB})

    assert whole == {"texts": ["Hello there."], "finish_reason": "stop"}
    assert "".join(cut["texts"]) == "one two"
    assert "bomb" not in json.dumps([cut, prompt])
    assert prompt["texts"] != ["Hello there."]
