"""Streams that are rolled back: real clients, a scripted upstream, and what each of them sees."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from anthropic import Anthropic
from openai import OpenAI

from gateway import messages_wire as fake
from gateway.test_interventions import HEAD
from gateway.test_logprobs import lists_in, responded, token
from serving import Record, serving, wait_until
from tidegate.gateway.app import create_app
from tidegate.policy import parse_policy
from tidegate.testing import (
    Die,
    FakeStreamGuard,
    FakeUpstream,
    Hang,
    Reply,
    message_item,
    response,
    response_events,
    text_chunks,
    text_completion,
)

POLICY = f"""{HEAD}
intervention: rollback
rollback: {{tries: TRIES, buffer: BUFFER, hint: Be kind., then: replace}}
rules:
  - {{name: stop, severity: unsafe, action: block}}
"""
HELLO: list[Any] = [{"role": "user", "content": "hi"}]
TOOLS: list[Any] = [{"name": "search", "input_schema": {"type": "object"}}]
FLAGGED = ("build a ", "bomb bomb ", "x")


class Running:
    """A gateway between clients and a scripted upstream."""

    def __init__(self, url: str, upstream: FakeUpstream, record: Record) -> None:
        self.url = url
        self.upstream = upstream
        self.record = record

    def answer(self, *replies: Reply) -> None:
        """What the upstream answers, one after the other."""
        left = list(replies)
        self.upstream.reply = lambda body: left.pop(0)

    @property
    def metrics(self) -> str:
        return httpx.get(f"{self.url}/metrics").text

    def message(self, **options: Any) -> tuple[Any, list[dict[str, Any]]]:
        """The message that the client put together, and the events in which it came, which are well-formed."""
        asked = {"model": "m", "max_tokens": 64, "messages": HELLO, **options}
        with Anthropic(base_url=self.url, api_key="k", max_retries=0) as client, client.messages.stream(**asked) as got:
            events = [event.to_dict() for event in got if event.type.startswith(("message_", "content_block_"))]
            made = got.get_final_message()
        assert_well_formed(events)
        assert "bomb" not in json.dumps(events)
        return made, events

    def response(self, **options: Any) -> tuple[Any, list[dict[str, Any]]]:
        """The response that the client ended with, and the events in which it came, which are well-formed."""
        asked = {"model": "m", "input": "hi", "store": False, **options}
        with OpenAI(base_url=f"{self.url}/v1", api_key="k", max_retries=0) as client:
            made = list(client.responses.create(**asked, stream=True))
        events = [event.to_dict() for event in made]
        assert_response_well_formed(events)
        assert "bomb" not in json.dumps(events)
        return made[-1].response, events

    def decided(self) -> tuple[str, list[tuple[str, str, int]]]:
        """The action of the last decision, and what was done."""
        decision = self.record.kept[-1][0]
        return decision.action.word, [(one.kind.value, one.outcome, one.count) for one in decision.interventions]


def assert_well_formed(events: list[dict[str, Any]]) -> None:
    """One message from its start to its stop; blocks one after the other, each opened once and closed once."""
    kinds = [event["type"] for event in events]
    assert (kinds[0], kinds[-2:]) == ("message_start", ["message_delta", "message_stop"])
    assert (kinds.count("message_start"), kinds.count("message_stop")) == (1, 1)
    open_, begun = None, 0
    for event in events[1:-2]:
        if event["type"] == "content_block_start":
            assert (open_, event["index"]) == (None, begun)
            open_, begun = begun, begun + 1
        else:
            assert event["index"] == open_
            open_ = None if event["type"] == "content_block_stop" else open_
    assert open_ is None


def assert_response_well_formed(events: list[dict[str, Any]]) -> None:
    """One response from its beginning to its end; items and parts are opened once and closed once, and what repeats a
    text says what its deltas said."""
    kinds = [event["type"] for event in events]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert (kinds[0], kinds.count("response.created"), kinds.count("response.in_progress")) == (
        "response.created",
        1,
        1,
    )
    assert [kind for kind in kinds if kind in ENDS] == kinds[-1:]
    assert len({event["response"]["id"] for event in events if "response" in event}) == 1
    texts: dict[tuple[int, int], str] = {}
    items: dict[int, dict[str, Any]] = {}
    closed: list[Any] = []
    for event in events:
        place = event.get("output_index")
        part = (place, event.get("content_index"))
        match event["type"]:
            case "response.output_item.added":
                assert place == len(items)
                items[place] = event["item"]
            case "response.content_part.added":
                assert part not in texts
                texts[part] = event["part"]["text"]
            case "response.output_text.delta":
                assert part not in closed
                texts[part] += event["delta"]
            case "response.output_text.done":
                assert event["text"] == texts[part]
            case "response.content_part.done":
                assert event["part"]["text"] == texts[part]
                closed.append(part)
            case "response.output_item.done":
                assert place not in closed
                assert event["item"]["id"] == items[place]["id"]
                items[place] = event["item"]
                closed.append(place)
        if "item_id" in event:
            assert event["item_id"] == items[place]["id"]
    assert {*closed} == {*items, *texts}
    assert events[-1]["response"]["output"] == list(items.values())
    for (place, number), text in texts.items():
        assert items[place]["content"][number]["text"] == text


ENDS = ("response.completed", "response.failed", "response.incomplete")


def field_of(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The only field ``tidegate`` of the stream."""
    (found,) = [event["tidegate"] for event in events if "tidegate" in event]
    return dict(found)


def said(*pieces: str, number: int = 0, used: int = 9) -> Reply:
    """A message with one text."""
    head = fake.start(usage={"input_tokens": used, "output_tokens": 1})
    return fake.reply(head, *fake.text(number, *pieces), *fake.end())


@contextmanager
def running(tries: int = 1, buffer: int = 0, **options: Any) -> Iterator[Running]:
    upstream, record, guard = FakeUpstream(), Record(), FakeStreamGuard()
    policy = parse_policy(POLICY.replace("TRIES", str(tries)).replace("BUFFER", str(buffer)))
    with serving(upstream) as address:
        app = create_app(guard=guard, policy=policy, keep=record, upstream_url=address, **options)
        with serving(app) as url:
            yield Running(url, upstream, record)
    assert guard.open_sessions == 0


# --- chat and completions -----------------------------------------------------------------------------------------


def chatted(*pieces: str) -> list[dict[str, Any]]:
    """A chat completion in pieces, without its end."""
    return text_chunks(pieces)[:-1]


def completed(*pieces: str) -> list[dict[str, Any]]:
    """A text completion in pieces, without its end."""
    return [text_completion(piece, finish_reason="") for piece in pieces]


@pytest.mark.parametrize(
    ("acts", "left"),
    [
        ((" and", " then ", Die()), " and"),
        ((" and", " then "), " and"),
        ((" and ", {"error": {"message": "bomb", "type": "overloaded"}}), " and"),
        (({"error": {"message": "bomb", "type": "overloaded"}},), ""),
        ((b"data: {\n\n",), ""),
        ((), ""),
    ],
    ids=["dies", "ends early", "error", "error at once", "garbage", "nothing"],
)
@pytest.mark.parametrize("door", ["chat", "completions"])
def test_a_try_of_a_choice_that_breaks_off_ends_as_the_policy_says(door: str, acts: tuple[Any, ...], left: str) -> None:
    pieces = chatted if door == "chat" else completed
    again = [part for one in acts for part in (pieces(one) if isinstance(one, str) else [one])]
    asked: dict[str, Any] = {"model": "m", "stream": True}
    with (
        running(continues="vllm") as gateway,
        OpenAI(base_url=f"{gateway.url}/v1", api_key="k", max_retries=0) as client,
    ):
        gateway.answer(Reply.stream(*pieces(*FLAGGED)), Reply.stream(*again, done=False))
        if door == "chat":
            made: Any = list(client.chat.completions.create(messages=HELLO, **asked))
            text = "".join(one.choices[0].delta.content or "" for one in made)
        else:
            made = list(client.completions.create(prompt="hi", **asked))
            text = "".join(one.choices[0].text for one in made)

        assert text.startswith(f"build a{left}")
        assert text.endswith("\n\nNot here.")
        assert "bomb" not in text
        assert [one.choices[0].finish_reason for one in made if one.choices[0].finish_reason] == ["content_filter"]
        assert gateway.decided() == ("block", [("rollback", "failed", 1), ("replace", "done", 1)])
        assert "tidegate_upstream_errors_total{" in gateway.metrics
        wait_until(lambda: gateway.upstream.open_requests == 0, "the upstream to be left alone")


def test_an_answer_behind_reasoning_is_written_anew_and_the_client_sees_one_answer() -> None:
    with (
        running(continues="vllm") as gateway,
        OpenAI(base_url=f"{gateway.url}/v1", api_key="k", max_retries=0) as client,
    ):
        gateway.answer(
            Reply.stream(*text_chunks(["hm ", "so "], of="reasoning_content")[:-1], *text_chunks(FLAGGED)[1:]),
            Reply.stream(*text_chunks([" garden"])),
        )
        made: Any = list(client.chat.completions.create(model="m", messages=HELLO, stream=True))

        deltas = [one.choices[0].delta.to_dict() for one in made]
        assert "".join(one.get("reasoning_content") or "" for one in deltas) == "hm so "
        assert "".join(one.get("content") or "" for one in deltas) == "build a garden"
        assert made[-1].choices[0].finish_reason == "stop"
        assert gateway.decided() == ("allow", [("rollback", "done", 1)])


# --- messages -----------------------------------------------------------------------------------------------------


def test_a_flagged_message_is_written_anew_and_the_client_sees_one_message() -> None:
    with running(continues="prefill") as gateway:
        gateway.answer(fake.reply(fake.start(), *fake.text(0, *FLAGGED)[:-1], Hang()), said(" garden", " now", used=7))
        made, events = gateway.message(system="Help.")
        first, second = gateway.upstream.received
        wait_until(lambda: first.cancelled, "the first request to be ended")

        assert [(block.type, block.text) for block in made.content] == [("text", "build a garden now")]
        assert (made.stop_reason, made.usage.input_tokens, made.usage.output_tokens) == ("end_turn", 7, 9)
        assert second.body["system"] == "Help.\n\nBe kind."
        assert second.body["messages"] == [*HELLO, {"role": "assistant", "content": "build a"}]
        assert gateway.decided() == ("allow", [("rollback", "done", 1)])
        assert field_of(events)["interventions"][0]["characters"] > 0
        assert gateway.record.kept[-1][1].turns[-1].content == "build a garden now"
        assert 'tidegate_interventions_total{kind="rollback",outcome="done",target="response"} 1.0' in gateway.metrics
        assert "tidegate_leaked_characters_total 0.0" in gateway.metrics


@pytest.mark.parametrize("blocks", [["Help."], None])
def test_the_hint_stands_behind_the_operators_words(blocks: list[str] | None) -> None:
    with running(continues="vllm") as gateway:
        gateway.answer(said(*FLAGGED), said(" garden"))
        listed = [{"type": "text", "text": text} for text in blocks or ()]
        gateway.message(**{"system": listed} if listed else {})

        hint = {"type": "text", "text": "Be kind."}
        assert gateway.upstream.received[1].body["system"] == ([*listed, hint] if listed else "Be kind.")


def test_an_upstream_that_cannot_go_on_is_asked_to_in_a_turn() -> None:
    with running() as gateway:
        gateway.answer(said(*FLAGGED), said(" garden"))
        made, _ = gateway.message()

        assert made.content[0].text == "build a garden"
        assert gateway.upstream.received[1].body["messages"] == [
            *HELLO,
            {"role": "assistant", "content": "build a"},
            {"role": "user", "content": "Be kind."},
        ]
        assert "system" not in gateway.upstream.received[1].body


def test_where_nothing_has_left_the_message_begins_anew() -> None:
    with running(continues="prefill") as gateway:
        gateway.answer(said("bomb bomb x"), said("A garden"))
        made, _ = gateway.message()

        assert made.content[0].text == "A garden"
        assert gateway.upstream.received[1].body["messages"] == HELLO


@pytest.mark.parametrize("more", [" \n now", "now"])
def test_white_space_that_has_left_is_not_sent_twice_nor_asked_for(more: str) -> None:
    with running(continues="prefill") as gateway:
        gateway.answer(said("here. \n ", "ok \n ", "bomb bomb x"), said(more[:2], more[2:]))
        made, events = gateway.message()

        prefix = gateway.upstream.received[1].body["messages"][-1]["content"]
        left = "".join(event["delta"]["text"] for event in events if event["type"] == "content_block_delta")
        assert prefix == "here. \n ok"
        assert made.content[0].text == left == ("here. \n ok \n now" if more[0] == " " else "here. \n oknow")


def test_several_tries_follow_each_other() -> None:
    with running(tries=3, continues="prefill") as gateway:
        gateway.answer(
            said(*FLAGGED), said(" house", " bomb bomb x"), said(" bomb", " bomb"), said(" with a", " garden")
        )
        made, _ = gateway.message()
        asked = [one.body["messages"][-1]["content"] for one in gateway.upstream.received]

        assert made.content[0].text == "build a house with a garden"
        assert asked == ["hi", "build a", "build a house", "build a house"]
        assert gateway.decided() == ("allow", [("rollback", "done", 3)])


def test_what_is_buffered_is_thrown_away_too() -> None:
    with running(buffer=2, continues="prefill") as gateway:
        gateway.answer(said("we all ", "build a ", "bomb bomb ", "x"), said(" sing and", " dance"))
        made, _ = gateway.message()

        prefix = gateway.upstream.received[1].body["messages"][-1]["content"]
        assert prefix in "we all build"
        assert made.content[0].text == f"{prefix} sing and dance"


@pytest.mark.parametrize(
    ("reply", "outcome", "left"),
    [
        (Reply.error(500, "no"), "failed", ""),
        (Reply.json(fake.message("whole")), "failed", ""),
        (fake.reply(Die()), "failed", ""),
        (fake.reply(fake.start(), *fake.text(0, " and", " then ")[:-1], Die()), "failed", " and"),
        (fake.reply(fake.start(), *fake.text(0, " and", " then ")[:-1]), "failed", " and"),
        (fake.reply(fake.start(), {"type": "error", "error": {"type": "overloaded_error"}}), "failed", ""),
        (fake.reply(b"data: {\n\n"), "failed", ""),
        (said(" bomb bomb"), "flagged", ""),
    ],
    ids=["status", "whole", "dies", "dies later", "ends early", "error", "garbage", "flagged"],
)
def test_a_try_that_does_not_help_ends_as_the_policy_says(reply: Reply, outcome: str, left: str) -> None:
    with running(continues="prefill") as gateway:
        gateway.answer(said(*FLAGGED), reply)
        made, _ = gateway.message()

        assert made.content[0].text.startswith(f"build a{left}")
        assert [block.text for block in made.content[1:]] == ["\n\nNot here."]
        assert made.stop_reason == "refusal"
        assert gateway.decided() == ("block", [("rollback", outcome, 1), ("replace", "done", 1)])
        wait_until(lambda: gateway.upstream.open_requests == 0, "the upstream to be left alone")


def test_a_text_that_comes_after_a_block_that_has_left_is_not_rolled_back() -> None:
    """A tool's block cannot be taken back, and no prefill can have it."""
    with running(continues="prefill") as gateway:
        gateway.answer(
            fake.reply(
                fake.start(),
                *fake.text(0, "I look. "),
                *fake.tool_use(1, '{"query": "x"}'),
                *fake.text(2, *FLAGGED),
                *fake.end(),
            )
        )
        made, _ = gateway.message(tools=TOOLS)

        assert len(gateway.upstream.received) == 1
        assert [block.type for block in made.content] == ["text", "tool_use", "text", "text"]
        assert made.content[-1].text == "\n\nNot here."
        assert gateway.decided() == ("block", [("rollback", "failed", 1), ("replace", "done", 1)])
        assert 'tidegate_interventions_total{kind="rollback",outcome="failed",target="response"} 1.0' in gateway.metrics


@pytest.mark.parametrize(
    "options",
    [
        {"thinking": {"type": "enabled", "budget_tokens": 1024}},
        {"messages": [*HELLO, {"role": "assistant", "content": "I say:"}]},
    ],
    ids=["thinking", "prefilled"],
)
def test_a_request_that_cannot_go_on_ends_as_the_policy_says(options: dict[str, Any]) -> None:
    with running(continues="prefill") as gateway:
        gateway.answer(said(*FLAGGED))
        made, _ = gateway.message(**options)

        assert len(gateway.upstream.received) == 1
        assert [block.text for block in made.content] == ["build a", "\n\nNot here."]
        assert gateway.decided() == ("block", [("rollback", "failed", 1), ("replace", "done", 1)])


def test_what_came_behind_the_flagged_text_is_thrown_away_with_it() -> None:
    """In one piece: a second block, and a call that nobody has seen yet."""
    with running(continues="prefill") as gateway:
        events = [
            fake.start(),
            *fake.text(0, "build a "),
            *fake.text(1, "bomb bomb x"),
            *fake.tool_use(2, '{"query": "bomb"}'),
            *fake.end("tool_use"),
        ]
        gateway.answer(fake.reply(fake.wire(events)), said(" garden"))
        made, told = gateway.message(tools=TOOLS)

        assert "".join(block.text for block in made.content) == "build a garden"
        assert made.stop_reason == "end_turn"
        paths = [part["path"] for part in field_of(told)["coverage"]]
        assert not any("input" in path for path in paths)
        assert gateway.decided() == ("allow", [("rollback", "done", 1)])


def test_a_try_may_go_on_with_other_blocks() -> None:
    with running(continues="prefill") as gateway:
        again = [fake.start(), *fake.tool_use(0, '{"query": "x"}'), *fake.text(1, "done"), *fake.end("tool_use")]
        gateway.answer(said(*FLAGGED), fake.reply(*again))
        made, _ = gateway.message(tools=TOOLS)

        assert [block.type for block in made.content] == ["text", "tool_use", "text"]
        assert (made.content[0].text, made.content[1].input) == ("build a", {"query": "x"})
        assert (made.content[2].text, made.stop_reason) == ("done", "tool_use")
        assert gateway.decided() == ("allow", [("rollback", "done", 1)])


def test_a_try_that_says_nothing_ends_the_message() -> None:
    with running(continues="prefill") as gateway:
        gateway.answer(said(*FLAGGED), fake.reply(fake.start(), *fake.end()))
        made, _ = gateway.message()

        assert [block.text for block in made.content] == ["build a"]
        assert made.stop_reason == "end_turn"
        assert gateway.decided() == ("allow", [("rollback", "done", 1)])


def test_a_client_that_goes_away_during_a_try_ends_it_and_leaves_a_decision() -> None:
    with running(continues="prefill") as gateway:
        gateway.answer(said(*FLAGGED), fake.reply(fake.start(), *fake.text(0, " garden ")[:-1], Hang()))
        with Anthropic(base_url=gateway.url, api_key="k", max_retries=0) as client:
            stream = client.messages.create(model="m", max_tokens=64, messages=HELLO, stream=True)
            wait_until(lambda: len(gateway.upstream.received) == 2, "the try")
            stream.close()

        wait_until(lambda: gateway.upstream.open_requests == 0, "the try to be ended")
        wait_until(lambda: len(gateway.record.kept) == 2, "the decision")


# --- responses ----------------------------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    """The text in the pieces in which an upstream sends it."""
    return [f"{word} " for word in text.split(" ")][:-1] + text.split(" ")[-1:]


def told(*output: Any, before: int | None = None, more: tuple[Any, ...] = (), **fields: Any) -> Reply:
    """A response in pieces; only its first events where that is said, and then what else happens."""
    events = response_events(*output, cut=words, **{"id": "resp_other", **fields})
    return Reply.stream(*events[:before], *more, done=False)


BAD = "build a bomb bomb x"


def other(text: str) -> dict[str, Any]:
    return {**message_item(text), "id": "msg_other"}


def test_a_flagged_response_is_written_anew_and_the_client_sees_one_response() -> None:
    with running(continues="prefill") as gateway:
        gateway.answer(told(BAD, before=-4, more=(Hang(),), id="resp_first"), told(other(" garden now")))
        made, events = gateway.response(instructions="Help.")
        first, second = gateway.upstream.received
        wait_until(lambda: first.cancelled, "the first request to be ended")

        assert (made.output_text, made.status, made.id) == ("build a garden now", "completed", "resp_first")
        assert made.usage.total_tokens == response("x")["usage"]["total_tokens"]
        assert second.body["instructions"] == "Help.\n\nBe kind."
        assert second.body["input"] == [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "build a"},
        ]
        assert gateway.decided() == ("allow", [("rollback", "done", 1)])
        assert made.to_dict()["tidegate"]["interventions"][0]["kind"] == "rollback"
        assert gateway.record.kept[-1][1].turns[-1].content == "build a garden now"
        assert 'tidegate_interventions_total{kind="rollback",outcome="done",target="response"} 1.0' in gateway.metrics
        assert "tidegate_leaked_characters_total 0.0" in gateway.metrics
        assert "Be kind" not in json.dumps(events)


def test_the_clients_own_accumulator_takes_a_response_that_was_rolled_back() -> None:
    with running(continues="prefill") as gateway:
        gateway.answer(told(BAD), told(other(" garden now")))
        with (
            OpenAI(base_url=f"{gateway.url}/v1", api_key="k", max_retries=0) as client,
            client.responses.stream(model="m", input="hi", store=False) as stream,
        ):
            snapshots = [event.snapshot for event in stream if event.type == "response.output_text.delta"]
            made: Any = stream.get_final_response()

        assert snapshots[-1] == made.output_text == "build a garden now"


def test_the_tokens_of_what_is_written_anew_follow_those_that_have_left() -> None:
    """In deltas, and in all events that repeat the text."""
    with running(continues="prefill") as gateway:
        replies = [[b"build", b" a", b" bomb", b" bomb", b" x"], [b" garden", b" now"]]
        gateway.answer(*(Reply.stream(*responded([token(one) for one in spelled]), done=False) for spelled in replies))
        made, events = gateway.response(include=["message.output_text.logprobs"])

        expected = ["build", " a", " garden", " now"]
        deltas = [event["logprobs"] for event in events if event["type"] == "response.output_text.delta"]
        assert [one["token"] for listed in deltas for one in listed] == expected
        assert [[one["token"] for one in listed] for listed in lists_in(events) if listed][len(expected) :] == [
            expected
        ] * 4
        assert [part["state"] for part in made.to_dict()["tidegate"]["coverage"]] == ["judged"]


def test_an_incomplete_item_is_what_some_upstreams_go_on_with() -> None:
    with running(continues="vllm") as gateway:
        gateway.answer(told(BAD), told(other(" garden")))
        gateway.response(input=[{"role": "user", "content": "hi"}])
        body = gateway.upstream.received[1].body

        assert body["instructions"] == "Be kind."
        assert body["input"][0] == {"role": "user", "content": "hi"}
        assert (body["input"][1]["role"], body["input"][1]["status"]) == ("assistant", "incomplete")
        assert body["input"][1]["content"] == [{"type": "output_text", "text": "build a", "annotations": []}]


def test_an_upstream_that_cannot_go_on_with_a_response_is_asked_to() -> None:
    with running() as gateway:
        gateway.answer(told(BAD), told(other(" garden")))
        made, _ = gateway.response()

        assert made.output_text == "build a garden"
        assert gateway.upstream.received[1].body["input"][1:] == [
            {"role": "assistant", "content": "build a"},
            {"role": "developer", "content": "Be kind."},
        ]
        assert "instructions" not in gateway.upstream.received[1].body


@pytest.mark.parametrize("begun", [2, 3, 4], ids=["nothing", "an item", "a part"])
def test_a_response_of_which_no_text_has_left_begins_anew(begun: int) -> None:
    """Whether its item and its part had begun or not."""
    bad = response_events("bomb bomb x", cut=words)
    with running(continues="prefill") as gateway:
        gateway.answer(Reply.stream(*bad[:begun], bad[-1], done=False), told(other("A garden")))
        made, _ = gateway.response()

        assert made.output_text == "A garden"
        assert [one["content"] for one in gateway.upstream.received[1].body["input"]] == ["hi", "Be kind."]


def test_several_tries_of_a_response_follow_each_other() -> None:
    with running(tries=3, continues="prefill") as gateway:
        gateway.answer(
            told(BAD), told(other(" house bomb bomb x")), told(other(" bomb bomb")), told(other(" with a garden"))
        )
        made, _ = gateway.response()
        asked = [one.body["input"][-1]["content"] for one in gateway.upstream.received[1:]]

        assert made.output_text == "build a house with a garden"
        assert asked == ["build a", "build a house", "build a house"]
        assert gateway.decided() == ("allow", [("rollback", "done", 3)])


@pytest.mark.parametrize(
    ("reply", "outcome", "left"),
    [
        (Reply.error(500, "no"), "failed", ""),
        (Reply.json(response("whole")), "failed", ""),
        (Reply.stream(Die(), done=False), "failed", ""),
        (told(other(" and then more"), before=6, more=(Die(),)), "failed", " and"),
        (told(other(" and then more"), before=6), "failed", " and"),
        (Reply.stream({"type": "error", "message": "bomb"}, done=False), "failed", ""),
        (told({"id": "rs_1", "type": "reasoning", "summary": [], "content": []}, other(" more")), "failed", ""),
        (told(), "failed", ""),
        (told(other(" bomb bomb")), "flagged", ""),
    ],
    ids=["status", "whole", "dies", "dies later", "ends early", "error", "reasoning", "nothing", "flagged"],
)
def test_a_try_of_a_response_that_does_not_help_ends_as_the_policy_says(reply: Reply, outcome: str, left: str) -> None:
    with running(continues="prefill") as gateway:
        gateway.answer(told(BAD), reply)
        made, _ = gateway.response()

        first, message = made.output
        assert first.content[0].text.startswith(f"build a{left}")
        assert (message.content[0].text, made.status) == ("Not here.", "incomplete")
        assert made.incomplete_details.reason == "content_filter"
        assert gateway.decided() == ("block", [("rollback", outcome, 1), ("replace", "done", 1)])
        wait_until(lambda: gateway.upstream.open_requests == 0, "the upstream to be left alone")


@pytest.mark.parametrize(
    "options",
    [
        {"store": True},
        {"extra_body": {"store": None}},
        {"conversation": "conv_1"},
        {"input": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "I say:"}]},
    ],
    ids=["stored", "stored by default", "conversation", "prefilled"],
)
def test_a_response_that_cannot_go_on_ends_as_the_policy_says(options: dict[str, Any]) -> None:
    with running(continues="prefill") as gateway:
        gateway.answer(told(BAD))
        made, _ = gateway.response(**options)

        assert len(gateway.upstream.received) == 1
        assert [item.content[0].text for item in made.output] == ["build a", "Not here."]
        assert gateway.decided() == ("block", [("rollback", "failed", 1), ("replace", "done", 1)])


def test_a_text_behind_another_item_is_not_rolled_back() -> None:
    call = {"id": "fc_1", "type": "function_call", "call_id": "c", "name": "search", "arguments": "{}"}
    with running(continues="prefill") as gateway:
        gateway.answer(told({**call, "status": "completed"}, BAD))
        made, _ = gateway.response(tools=[{"type": "function", "name": "search", "parameters": {}, "strict": False}])

        assert len(gateway.upstream.received) == 1
        assert [item.type for item in made.output] == ["function_call", "message", "message"]
        assert gateway.decided() == ("block", [("rollback", "failed", 1), ("replace", "done", 1)])


def test_a_try_of_a_response_may_go_on_with_other_items() -> None:
    call = {"id": "fc_1", "type": "function_call", "call_id": "c", "name": "search", "arguments": '{"q": "x"}'}
    with running(continues="prefill") as gateway:
        gateway.answer(told(BAD), told(other(" garden"), {**call, "status": "completed"}))
        made, _ = gateway.response(tools=[{"type": "function", "name": "search", "parameters": {}, "strict": False}])

        assert [item.type for item in made.output] == ["message", "function_call"]
        assert (made.output_text, made.output[1].arguments) == ("build a garden", '{"q": "x"}')


def test_annotations_of_what_follows_count_from_the_beginning_of_the_text() -> None:
    noted = {"type": "url_citation", "url": "https://a.example", "title": "A", "start_index": 1, "end_index": 7}
    again = {**other(" garden"), "content": [{"type": "output_text", "text": " garden", "annotations": [noted]}]}
    with running(continues="prefill") as gateway:
        gateway.answer(told(BAD), told(again))
        made, _ = gateway.response()
        found = made.output[0].content[0].annotations[0]

        assert made.output_text[found.start_index : found.end_index] == "garden"


def test_a_client_that_goes_away_during_a_try_of_a_response_ends_it() -> None:
    with running(continues="prefill") as gateway:
        gateway.answer(told(BAD), told(other(" garden now"), before=5, more=(Hang(),)))
        with OpenAI(base_url=f"{gateway.url}/v1", api_key="k", max_retries=0) as client:
            stream = client.responses.create(model="m", input="hi", store=False, stream=True)
            wait_until(lambda: len(gateway.upstream.received) == 2, "the try")
            stream.close()

        wait_until(lambda: gateway.upstream.open_requests == 0, "the try to be ended")
        wait_until(lambda: len(gateway.record.kept) == 2, "the decision")
