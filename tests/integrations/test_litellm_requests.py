"""Which turns of a chat that LiteLLM holds are judged, and how they read."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tidegate.integrations.litellm_requests import answer_turn, one_turn, prompt_of, values_of

USER, ANSWER = {"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}


def test_what_was_said_since_the_assistant_last_spoke_is_judged() -> None:
    """Earlier turns are the context of it."""
    last = {"role": "user", "content": "three"}

    prompt = prompt_of([USER, ANSWER, last])

    assert prompt.turns == [one_turn("user", "one"), one_turn("assistant", "two"), one_turn("user", "three")]
    assert prompt.new == [prompt.turns]
    assert prompt.unread == []


def test_turns_of_one_role_are_judged_as_one_text() -> None:
    """A request spread over two messages is still seen."""
    assert prompt_of([USER, {"role": "user", "content": "more"}]).new == [[one_turn("user", "one\nmore")]]


def test_a_given_beginning_of_the_answer_is_judged_and_so_is_the_prompt_before_it() -> None:
    """Otherwise a client could hide a prompt behind two words of its own."""
    prompt = prompt_of([USER, ANSWER])

    assert prompt.new == [[one_turn("user", "one")], [one_turn("user", "one"), one_turn("assistant", "two")]]


@pytest.mark.parametrize("role", ["system", "developer"])
def test_system_turns_are_judged_when_that_is_wished(role: str) -> None:
    """They are the operator's own words in most installations."""
    messages = [{"role": role, "content": "rule"}, USER]

    assert prompt_of(messages).new == [[one_turn("system", "rule"), one_turn("user", "one")]]
    assert prompt_of(messages, judge_system=True).new[0] == [one_turn("system", "rule")]


def test_results_of_tools_are_judged_by_themselves() -> None:
    """A result is not the user's text."""
    call = {"id": "1", "function": {"name": "search", "arguments": '{"q": "pie"}'}}
    messages = [USER, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "apple"}]

    prompt = prompt_of(messages)

    said = {"role": "assistant", "content": "", "tool_calls": [{"name": "search", "arguments": '{"q": "pie"}'}]}
    assert prompt.new == [[one_turn("user", "one"), said, one_turn("tool", "apple")]]


def test_text_beside_the_content_is_judged_whoever_says_it() -> None:
    """A client can send reasoning and calls in any turn."""
    call = {"function": {"name": "f", "arguments": "hidden"}}

    prompt = prompt_of([{**USER, "reasoning_content": "thought", "tool_calls": [call]}])

    assert prompt.new == [[one_turn("user", "one\nthought\nhidden")]]


def test_parts_with_text_are_read_and_others_are_named() -> None:
    """Nothing is taken to be judged that is not."""
    parts: list[Any] = [
        {"type": "text", "text": "see"},
        {"type": "image_url", "image_url": {"url": "data:"}},
        {"type": "text", "text": 5},
        "this",
    ]

    prompt = prompt_of([{"role": "user", "content": parts}, {"role": "user", "content": 7}])

    assert prompt.turns[0]["content"] == "see\nthis"
    assert prompt.unread == ["messages[0].content[1]", "messages[0].content[2]", "messages[1].content"]


def test_an_unknown_role_is_taken_to_be_a_user() -> None:
    """So that its text is judged."""
    assert prompt_of([{"role": "narrator", "content": "one"}]).new == [[one_turn("user", "one")]]


@pytest.mark.parametrize("call", [{"function": {"name": "f", "arguments": {"a": 1}}}, {"type": "strange"}, None])
def test_a_call_without_arguments_as_text_is_named(call: Any) -> None:
    """It cannot be judged."""
    unread: list[str] = []

    answer_turn({"tool_calls": [call]}, unread)

    assert unread == ["message.tool_calls[0]"]


def test_an_answer_reads_with_all_of_its_texts() -> None:
    """Content, refusal, reasoning, calls of both kinds, and the old form of a call."""
    calls = [
        {"function": {"name": "f", "arguments": "{}"}},
        {"type": "custom", "custom": {"name": "g", "input": "free"}},
    ]
    old = {"name": "h", "arguments": "[]"}
    unread: list[str] = []
    message = {"content": "said", "refusal": "no", "reasoning_content": "hm", "tool_calls": calls, "function_call": old}

    turn = answer_turn(SimpleNamespace(model_dump=lambda: message), unread)

    assert turn == {
        "role": "assistant",
        "content": "said\nno",
        "reasoning": "hm",
        "tool_calls": [
            {"name": "f", "arguments": "{}"},
            {"name": "g", "arguments": "free"},
            {"name": "h", "arguments": "[]"},
        ],
    }
    assert unread == []


def test_sound_and_pictures_of_an_answer_are_named() -> None:
    """They are no text."""
    unread: list[str] = []

    answer_turn({"content": "", "audio": {"data": "..."}, "images": [{}]}, unread)

    assert unread == ["message.audio", "message.images"]


def test_anything_else_holds_nothing() -> None:
    """Reading never fails."""
    assert values_of(5) == {}
