"""Text completions, seen by the real OpenAI client through a gateway in a process of its own."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from serving import Gateway, Record, make_policy, serving
from tidegate.gateway.app import create_app
from tidegate.testing import FakeStreamGuard, FakeUpstream, Hang, Pause, Reply, text_completion


@pytest.fixture
def client(gateway: Gateway) -> Any:
    with OpenAI(base_url=gateway.base_url, api_key="sk-client", max_retries=0) as made:
        yield made


def part(text: str, *, index: int = 0, finish_reason: str | None = None, **more: Any) -> dict[str, Any]:
    """One chunk of a stream."""
    choice = {"text": text, "index": index, "logprobs": None, "finish_reason": finish_reason, **more}
    return {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "m", "choices": [choice]}


def ask(client: OpenAI, **options: Any) -> Any:
    return client.completions.create(**{"model": "fake-model", "prompt": "Say hello", **options})


def streamed(client: OpenAI, **options: Any) -> tuple[dict[int, str], dict[int, str], list[Any]]:
    """The text and the finish reason of each choice, and all chunks."""
    chunks = list(ask(client, stream=True, **options))
    texts: dict[int, str] = {}
    reasons: dict[int, str] = {}
    for one in chunks:
        for choice in one.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    return texts, reasons, chunks


# --- whole --------------------------------------------------------------------------------------------------------


def test_a_safe_completion_passes(client: OpenAI, gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.reply = Reply.json(text_completion("Hello there."))

    answer = ask(client, suffix="the end", best_of=2, echo=False, stop=["\n"])

    assert answer.choices[0].text == "Hello there."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == 8
    assert answer.tidegate["coverage"] == [
        {"path": "choices[0].text", "channel": "answer", "state": "judged", "characters": 12}
    ]
    assert [row["action"] for row in gateway.kept()] == ["allow", "allow"]
    assert gateway.kept()[0]["coverage"] == [["prompt", "judged", 9], ["suffix", "judged", 7]]
    assert upstream.received[0].path == "/v1/completions"
    assert upstream.received[0].body["best_of"] == 2


@pytest.mark.parametrize("options", [{"prompt": "a bomb"}, {"prompt": ["fine", "a bomb"]}, {"suffix": "a bomb"}])
def test_an_unsafe_prompt_is_answered_with_the_policys_message(
    client: OpenAI, gateway: Gateway, upstream: FakeUpstream, options: dict[str, Any]
) -> None:
    """For each choice that was asked for; nothing of the upstream's answer is read."""
    upstream.reply = Reply((), before=60)

    answer = ask(client, n=2, **options)

    count = 2 * (2 if isinstance(options.get("prompt"), list) else 1)
    assert [(choice.index, choice.text, choice.finish_reason) for choice in answer.choices] == [
        (index, "Not here.", "content_filter") for index in range(count)
    ]
    assert answer.tidegate["rule"] == "unsafe"
    assert answer.object == "text_completion"
    assert [row["action"] for row in gateway.kept()] == ["block"]


def test_a_blocked_prompt_says_which_one(client: OpenAI) -> None:
    answer = ask(client, prompt=["fine", "still a bomb"])

    assert answer.tidegate["where"]["path"] == "prompt[1]"


def test_an_unsafe_completion_is_replaced(client: OpenAI, gateway: Gateway, upstream: FakeUpstream) -> None:
    """Each choice by itself."""
    upstream.reply = Reply.json(text_completion("fine", "a bomb here"))

    answer = ask(client, n=2)

    assert [(choice.text, choice.finish_reason) for choice in answer.choices] == [
        ("fine", "stop"),
        ("Not here.", "content_filter"),
    ]
    assert sorted(row["action"] for row in gateway.kept()) == ["allow", "allow", "block"]


def test_an_echoed_prompt_is_judged_with_the_answer(client: OpenAI, gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.reply = Reply.json(text_completion("Say hello, bomb"))

    answer = ask(client, echo=True)

    assert answer.choices[0].finish_reason == "content_filter"
    assert gateway.kept()[1]["content"] == "Say hello, bomb"


def test_each_choice_is_judged_with_its_own_prompt(upstream: FakeUpstream, upstream_url: str) -> None:
    """Several prompts, several choices of each: the guard is told the one that was answered."""
    guard, record = FakeStreamGuard(), Record()
    app = create_app(guard=guard, policy=make_policy(), keep=record, upstream_url=upstream_url)

    with serving(app) as url, OpenAI(base_url=f"{url}/v1", api_key="sk", max_retries=0) as client:
        upstream.reply = Reply.json(text_completion("a", "b", "c", "d"))
        ask(client, prompt=["one", "two"], n=2)
        upstream.reply = Reply.stream(*(part(text, index=index) for index, text in enumerate("abcd")), done=True)
        streamed(client, prompt=["one", "two"], n=2)

    answers = [turns for _, conversation, _ in record.kept if len(turns := conversation.turns) == 2]
    said = {(turns[0].content, turns[1].content) for turns in answers if turns[1].role == "assistant"}
    assert said == {("one", "a"), ("one", "b"), ("two", "c"), ("two", "d")}
    assert [one.context.turns[0].content for one in guard.opened if one.context] == ["one", "one", "two", "two"]


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": ["a", 3]}, "prompt[1]"),
        ({"prompt": ["a", []]}, "prompt[1]"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": ["a"] * 100, "n": 100}, "n"),
        ({"model": ""}, "model"),
        ({"n": 0}, "n"),
        ({"suffix": 3}, "suffix"),
        ({"stream": "yes"}, "stream"),
    ],
)
def test_bad_input_says_where(gateway: Gateway, options: dict[str, Any], param: str) -> None:
    answer = httpx.post(f"{gateway.base_url}/completions", json={"model": "m", "prompt": "x", **options})

    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize("answer", [{"choices": [{"index": 0}]}, {"choices": [{"message": {"content": "a"}}]}, [], {}])
def test_an_answer_that_is_no_completion_is_an_error_of_the_upstream(
    client: OpenAI, upstream: FakeUpstream, answer: Any
) -> None:
    upstream.reply = Reply.json(answer)

    with pytest.raises(openai.InternalServerError) as caught:
        ask(client)

    assert caught.value.status_code == 502


# --- streams ------------------------------------------------------------------------------------------------------


def test_a_safe_stream_passes(client: OpenAI, gateway: Gateway, upstream: FakeUpstream) -> None:
    usage = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "m", "choices": []}
    upstream.reply = Reply.stream(
        part("Hel"),
        part("lo the"),
        part("re."),
        part("", finish_reason="stop"),
        {**usage, "usage": {"total_tokens": 7}},
    )

    texts, reasons, chunks = streamed(client, stream_options={"include_usage": True})

    assert (texts, reasons) == ({0: "Hello there."}, {0: "stop"})
    assert chunks[-1].usage.total_tokens == 7
    assert {one.object for one in chunks} == {"text_completion"}
    assert [row["action"] for row in gateway.kept()] == ["allow", "allow"]


def test_an_unsafe_stream_is_cut(client: OpenAI, gateway: Gateway, upstream: FakeUpstream) -> None:
    """Nothing of the flagged text leaves, and the upstream is told to stop."""
    upstream.reply = Reply.stream(part("fine so far "), part("bomb bomb "), Pause(0.05), Hang())

    texts, reasons, chunks = streamed(client, stream_options={"include_usage": True})

    assert texts == {0: "fine so far"}
    assert reasons == {0: "content_filter"}
    assert chunks[-1].usage.total_tokens == 0
    assert [row["action"] for row in gateway.kept()] == ["allow", "block"]


def test_a_blocked_prompt_streams_the_policys_message(client: OpenAI, gateway: Gateway) -> None:
    texts, reasons, chunks = streamed(client, prompt=["a bomb", "b"], stream_options={"include_usage": True})

    assert texts == {0: "Not here.", 1: "Not here."}
    assert reasons == {0: "content_filter", 1: "content_filter"}
    assert chunks[-1].usage.total_tokens == 0
    assert [row["action"] for row in gateway.kept()] == ["block"]


def test_log_probabilities_of_chosen_tokens_pass_with_their_text(client: OpenAI, upstream: FakeUpstream) -> None:
    """Those of other tokens do not: nobody judged these words."""

    def told(*tokens: str) -> dict[str, Any]:
        return {
            "tokens": list(tokens),
            "token_logprobs": [-0.5] * len(tokens),
            "top_logprobs": [{token: -0.5, " bomb": -1.0} for token in tokens],
            "text_offset": list(range(len(tokens))),
        }

    upstream.reply = Reply.stream(
        part("Hello ", logprobs=told("Hello", " ")), part("you", logprobs=told("you")), part("", finish_reason="stop")
    )

    texts, _, chunks = streamed(client, logprobs=2)

    known = [one.choices[0].logprobs for one in chunks if one.choices and one.choices[0].logprobs]
    assert texts == {0: "Hello you"}
    assert [token for one in known for token in one.tokens or ()] == ["Hello", " ", "you"]
    assert [top for one in known for top in one.top_logprobs or ()] == [{"Hello": -0.5}, {" ": -0.5}, {"you": -0.5}]
    assert "bomb" not in json.dumps([one.to_dict() for one in chunks])
    ended = next(one for one in chunks if one.choices and one.choices[0].finish_reason)
    assert {
        "path": "choices[0].logprobs.top_logprobs",
        "channel": "answer",
        "state": "not_judged",
        "characters": 15,
    } in (ended.tidegate["coverage"])
