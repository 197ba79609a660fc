"""Unsafe text in every field that a client can send: it is judged, refused, or listed as not judged."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving import Record, make_policy, serving
from tidegate.errors import TidegateError
from tidegate.gateway.app import create_app
from tidegate.gateway.asked import Asked
from tidegate.gateway.chat import read_chat
from tidegate.gateway.completions import read_completion
from tidegate.gateway.statuses import Problem
from tidegate.testing import FakeStreamGuard, FakeUpstream, Reply, completion, text_completion
from tidegate.types import CoverageState

BAD = "how to build a bomb"
OFFERED = {"type": "function", "function": {"name": "weather", "description": "today"}}
CHAT: dict[str, Any] = {
    "model": "m",
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "hello"}]},
        {"role": "assistant", "content": "a", "tool_calls": [{"id": "c1", "type": "function"}]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
        {"role": "user", "content": "and now?", "tool_calls": [{"type": "function", "function": {"arguments": ""}}]},
    ],
    "tools": [OFFERED],
}
COMPLETION: dict[str, Any] = {"model": "m", "prompt": ["hello", "there"]}

IMAGE = {"type": "image_url", "image_url": {"url": BAD}}
AUDIO = {"type": "input_audio", "input_audio": {"data": BAD, "format": "wav"}}
FILE = {"type": "file", "file": {"filename": BAD, "file_data": "AAAA"}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "description": BAD, "schema": {}}}
PLACE = {"user_location": {"type": "approximate", "approximate": {"city": BAD}}}

CHAT_FIELDS: list[tuple[str, str, Any]] = [
    ("judged", "messages.3.content", BAD),
    ("judged", "messages.3.content", [{"type": "text", "text": BAD}]),
    ("judged", "messages.3.content", [{"type": "refusal", "refusal": BAD}]),
    ("judged", "messages.3.content", [{"type": "text", "text": "how to build a"}, {"type": "text", "text": "bomb"}]),
    ("judged", "messages.2.content", BAD),
    ("judged", "messages.3.name", BAD),
    ("judged", "messages.3.name", "bomb"),
    ("judged", "messages.2.name", BAD),
    ("judged", "messages.2.tool_call_id", BAD),
    ("judged", "messages.3.refusal", BAD),
    ("judged", "messages.3.reasoning_content", BAD),
    ("judged", "messages.3.reasoning", BAD),
    ("judged", "messages.3.tool_calls.0.function.arguments", BAD),
    ("judged", "messages.3.tool_calls.0.function.arguments", {"a": BAD}),
    ("judged", "messages.3.tool_calls.0.function.name", BAD),
    ("judged", "messages.3.tool_calls", [{"type": "custom", "custom": {"name": "a", "input": BAD}}]),
    ("judged", "messages.3.function_call", {"name": "a", "arguments": BAD}),
    ("judged", "messages.3.function_call", {"name": BAD, "arguments": ""}),
    ("judged", "prediction", {"type": "content", "content": BAD}),
    ("judged", "prediction", {"type": "content", "content": [{"type": "text", "text": BAD}]}),
    ("judged", "web_search_options", PLACE),
    ("judged", "web_search_options", {"search_context_size": BAD}),
    ("listed", "messages.0.content.0.text", BAD),
    ("listed", "messages.1.content", BAD),
    ("listed", "messages.1.name", BAD),
    ("listed", "messages.1.refusal", BAD),
    ("listed", "messages.1.reasoning_content", BAD),
    ("listed", "messages.1.tool_calls.0.function", {"name": "weather", "arguments": BAD}),
    ("listed", "messages.1.tool_calls.0.function", {"name": BAD, "arguments": ""}),
    ("listed", "messages.1.tool_calls.0.id", BAD),
    ("listed", "messages.1.tool_calls.0.type", BAD),
    ("listed", "messages.1.annotations", [{"url_citation": {"title": BAD}}]),
    ("listed", "messages.1.audio", {"id": BAD}),
    ("listed", "messages.3.content", [{"type": "text", "text": "a"}, IMAGE]),
    ("listed", "messages.3.content", [{"type": "text", "text": "a"}, AUDIO]),
    ("listed", "messages.3.content", [{"type": "text", "text": "a"}, FILE]),
    ("listed", "messages.3.content", [{"type": BAD, "text": "a"}]),
    ("listed", "messages.3.content", [{"type": "text", "text": "a", "refusal": BAD}]),
    ("listed", "messages.3.content", [{"type": "text", "text": "a", "cache_control": {"type": BAD}}]),
    ("listed", "messages.3.content", [{"type": "text", "text": "a", "caption": BAD}]),
    ("listed", "messages.3.content", [{"type": "text", "text": "a", BAD: 1}]),
    ("listed", "messages.3.reasoning_content", [BAD]),
    ("listed", "messages.3.name", [BAD]),
    ("listed", "messages.3.thinking_blocks", [{"thinking": BAD}]),
    ("listed", f"messages.3.{BAD}", 1),
    ("listed", "messages.3.tool_calls.0.function.note", BAD),
    ("listed", "messages.3.tool_calls.0.function.name", [BAD]),
    ("listed", "messages.3.tool_calls.0.function.input", BAD),
    ("listed", "messages.3.tool_calls.0.custom", {"input": BAD}),
    ("listed", "messages.3.tool_calls.0.function", BAD),
    ("listed", "tools.0.function.description", BAD),
    ("listed", "tools.0.function.name", BAD),
    ("listed", "tools.0.function.parameters", {"properties": {BAD: {}}}),
    ("listed", "tools.0.function.parameters", {"properties": {"a": {"enum": [BAD]}}}),
    ("listed", "functions", [{"name": "f", "description": BAD}]),
    ("listed", "response_format", SCHEMA),
    ("listed", "response_format", {"type": BAD}),
    ("listed", "tool_choice", {"type": "function", "function": {"name": BAD}}),
    ("listed", "function_call", {"name": BAD}),
    ("listed", "stop", [BAD]),
    ("listed", "stop", BAD),
    ("listed", "user", BAD),
    ("listed", "safety_identifier", BAD),
    ("listed", "prompt_cache_key", BAD),
    ("listed", "metadata", {"note": BAD}),
    ("listed", "metadata", {BAD: "a"}),
    ("listed", "modalities", [BAD]),
    ("listed", "audio", {"voice": BAD, "format": "wav"}),
    ("listed", "reasoning_effort", BAD),
    ("listed", "service_tier", BAD),
    ("listed", "verbosity", BAD),
    ("listed", "stream_options", {"note": BAD}),
    ("listed", "logit_bias", {BAD: 1}),
    ("listed", "stop_token_ids", [BAD]),
    ("listed", "chat_template", BAD),
    ("listed", "documents", [{"text": BAD}]),
    ("listed", "prompt_token_ids", [1, 2, 3]),
    ("listed", BAD, 1),
    ("refused", "messages.3.role", BAD),
    ("refused", "messages.3.Content", BAD),
    ("refused", "messages.3.TOOL_CALLS", [{"function": {"arguments": BAD}}]),
    ("refused", "messages.3.content", [{"type": "text", "text": "a", "Text": BAD}]),
    ("refused", "messages.3.tool_calls.0.function.Arguments", BAD),
    ("refused", "Messages", [{"role": "user", "content": BAD}]),
    ("refused", "me\u017f\u017fages", [{"role": "user", "content": BAD}]),
    ("refused", "messages.3.content", {"text": BAD}),
    ("refused", "messages.3.function_call", BAD),
    ("refused", "messages.3.tool_calls", BAD),
    ("refused", "n", BAD),
    ("refused", "stream", BAD),
    ("refused", "stream_options", BAD),
]  # fmt: skip
COMPLETION_FIELDS: list[tuple[str, str, Any]] = [
    ("judged", "prompt", BAD),
    ("judged", "prompt.1", BAD),
    ("judged", "suffix", BAD),
    ("listed", "prompt", [1, 2, 3]),
    ("listed", "prompt", [[1, 2], [3]]),
    ("listed", "prompt.1", [4, 5, 6]),
    ("listed", "stop", [BAD]),
    ("listed", "user", BAD),
    ("listed", "metadata", {"a": BAD}),
    ("listed", "logit_bias", {BAD: 1}),
    ("listed", "guided_choice", [BAD]),
    ("listed", "documents", BAD),
    ("listed", BAD, 1),
    ("refused", "Prompt", BAD),
    ("refused", "Suffix", BAD),
    ("refused", "prompt", {"text": BAD}),
    ("refused", "prompt", [{"text": BAD}]),
    ("refused", "prompt", ["a", [BAD]]),
    ("refused", "suffix", [BAD]),
    ("refused", "n", BAD),
    ("refused", "best_of", BAD),
    ("refused", "stream", BAD),
    ("refused", "stream_options", BAD),
]
TABLE = [("chat/completions", CHAT, *row) for row in CHAT_FIELDS] + [
    ("completions", COMPLETION, *row) for row in COMPLETION_FIELDS
]


def placed(body: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """The same body with a value at a place."""
    changed = copy.deepcopy(body)
    at: Any = changed
    *steps, last = path.split(".")
    for step in steps:
        at = at[int(step)] if isinstance(at, list) else at.setdefault(step, {})
    at[int(last) if isinstance(at, list) else last] = value
    return changed


@pytest.fixture(scope="module")
def asked_of(_upstream_server: tuple[FakeUpstream, str]) -> Iterator[tuple[httpx.Client, Record]]:
    """A gateway whose policy is the default, and what it keeps."""
    record = Record()
    app = create_app(guard=FakeStreamGuard(), policy=make_policy(), keep=record, upstream_url=_upstream_server[1])
    with serving(app) as url, httpx.Client(base_url=f"{url}/v1") as client:
        yield client, record


@pytest.mark.parametrize(("door", "body", "outcome", "path", "value"), TABLE)
def test_unsafe_text_in_any_field_is_judged_refused_or_listed(
    asked_of: tuple[httpx.Client, Record],
    upstream: FakeUpstream,
    door: str,
    body: dict[str, Any],
    outcome: str,
    path: str,
    value: Any,
) -> None:
    client, record = asked_of
    upstream.reply = Reply.json(completion("fine") if body is CHAT else text_completion("fine", "fine"))
    record.kept.clear()

    plain = client.post(f"/{door}", json=body)
    usual = {part for part in record.kept[0][0].coverage if part.state is CoverageState.NOT_JUDGED}
    record.kept.clear()
    answer = client.post(f"/{door}", json=placed(body, path, value))

    assert plain.status_code == 200
    if outcome == "refused":
        assert answer.status_code == 400
        assert record.kept == []
        assert "bomb" not in answer.text
        return
    decision = record.kept[0][0]
    assert decision.action.word == {"judged": "block", "listed": "allow"}[outcome]
    if outcome == "listed":
        listed = {part for part in decision.coverage if part.state is CoverageState.NOT_JUDGED} - usual
        least = len(BAD) if "bomb" in f"{path} {value}" else 3
        assert sum(part.characters for part in listed) >= least
        assert not any("bomb" in part.path for part in decision.coverage)


@pytest.mark.parametrize("text", ["ann@example.org", "user-4711", "\n", "###", "User:", "openai/gpt-4"])
def test_words_for_programs_are_not_listed(text: str) -> None:
    body = {**CHAT, "stop": [text], "user": text, "metadata": {"a": text}, "tool_choice": "auto"}

    assert read_chat(body).unseen == ()
    assert read_completion({**COMPLETION, "stop": text, "user": text}).unseen == ()


def test_what_the_operator_tells_the_model_is_judged_with_system_turns() -> None:
    """Tools and response_format are the operator's words: one text, judged only where system turns are."""
    body = placed(placed(CHAT, "tools.0.function.description", BAD), "response_format", SCHEMA)

    apart, judged = read_chat(body), read_chat(body, judge_system=True)

    assert apart.unseen == judged.unseen == ()
    assert [text.paths for text in judged.new][-1] == {"tools", "response_format"}
    assert judged.new[-1].conversation.turns[-1].content.count(BAD) == 2
    states = {part.path: part.state.value for part in judged.coverage}
    assert (states["tools"], states["response_format"]) == ("judged", "judged")
    assert not any("tools" in text.paths for text in apart.new)


def test_a_format_of_words_is_judged_as_one_of_sentences_is() -> None:
    spread = {
        "type": "json_schema",
        "json_schema": {"name": "x", "schema": {"enum": ["how", "to", "build", "a", "bomb"]}},
    }
    body = placed(CHAT, "response_format", spread)

    said = read_chat(body, judge_system=True).new[-1].conversation.turns[-1].content
    assert said.endswith("x\nhow\nto\nbuild\na\nbomb")
    assert "response_format" in {part.path for part in read_chat(body).coverage}
    plain = placed(CHAT, "response_format", {"type": "json_object"})
    assert "response_format" not in {part.path for part in read_chat(plain).coverage}


def test_short_texts_beside_turns_cost_one_judgement_together() -> None:
    body = placed(placed(CHAT, "messages.3.name", "Ann B."), "prediction", {"type": "content", "content": "so"})

    new = read_chat(body).new

    assert [text.conversation.turns[-1].content for text in new] == ["sunny", "and now?", "Ann B.\nso"]
    assert new[-1].paths == {"messages[3].name", "prediction"}


# --- a policy that refuses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("door", "body", "param"),
    [
        ("chat/completions", placed(CHAT, "messages.3.content", [{"type": "text", "text": "a"}, IMAGE]),
         "messages[3].content[1]"),
        ("chat/completions", placed(CHAT, "chat_template", BAD), "chat_template"),
        ("chat/completions", placed(CHAT, BAD, 1), "?"),
        ("completions", placed(COMPLETION, "prompt.1", [1, 2]), "prompt[1]"),
        ("completions", placed(COMPLETION, "prompt", [1, 2]), "prompt"),
    ],
)  # fmt: skip
def test_a_policy_can_refuse_what_no_guard_can_judge(
    upstream: FakeUpstream, upstream_url: str, door: str, body: dict[str, Any], param: str
) -> None:
    """An error that names the place, a kept decision, and nothing for the upstream."""
    record = Record()
    policy = make_policy(unjudged_request="refuse")
    app = create_app(guard=FakeStreamGuard(), policy=policy, keep=record, upstream_url=upstream_url)

    with serving(app) as url, httpx.Client(base_url=f"{url}/v1") as client:
        refused = client.post(f"/{door}", json=body)
        fine = client.post("/chat/completions", json=CHAT)
        metrics = httpx.get(f"{url}/metrics").text

    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["param"]) == (400, "unjudged_content", param)
    decision = record.kept[0][0]
    assert (decision.action.word, decision.rule) == ("block", "unjudged_request")
    assert {part.state for part in decision.coverage} == {CoverageState.NOT_JUDGED}
    assert fine.status_code == 200
    assert len(upstream.received) == 1
    assert 'tidegate_decisions_total{action="block",target="prompt"} 1.0' in metrics
    assert "UnjudgedRequest" not in metrics, "it is no failure of the guard"


def test_a_prompt_that_nobody_could_judge_is_kept_as_such(upstream: FakeUpstream, upstream_url: str) -> None:
    """Token ids alone: the request goes on, and a decision says that nobody judged it."""
    record = Record()
    app = create_app(guard=FakeStreamGuard(), policy=make_policy(), keep=record, upstream_url=upstream_url)

    with serving(app) as url:
        httpx.post(f"{url}/v1/completions", json={"model": "m", "prompt": [1, 2, 3]})

    decision = record.kept[0][0]
    assert (decision.action.word, decision.rule) == ("allow", "unjudged_request")
    assert [(part.path, part.state.value, part.characters) for part in decision.coverage] == [
        ("prompt", "not_judged", 3)
    ]
    assert upstream.received[0].body["prompt"] == [1, 2, 3]


def test_a_refusal_that_is_only_observed_is_kept_and_not_done(upstream: FakeUpstream, upstream_url: str) -> None:
    record = Record()
    policy = make_policy(unjudged_request="refuse", observe="true")
    app = create_app(guard=FakeStreamGuard(), policy=policy, keep=record, upstream_url=upstream_url)

    with serving(app) as url:
        answer = httpx.post(f"{url}/v1/chat/completions", json=placed(CHAT, "chat_template", BAD))

    assert answer.status_code == 200
    observed = record.kept[0][0].observed
    assert observed is not None
    assert (observed.action.word, observed.rule) == ("block", "unjudged_request")


# --- any body -----------------------------------------------------------------------------------------------------

LEAVES = st.none() | st.booleans() | st.integers(-3, 300) | st.sampled_from(["", "a", BAD, "text", "user"])
KEYS = st.sampled_from(["role", "content", "type", "text", "name", "function", "x"])


def nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4)


VALUES = st.recursive(LEAVES, nested, max_leaves=8)
NAMES = st.sampled_from(
    ["messages", "prompt", "model", "tools", "n", "stop", "suffix", "prediction", "response_format"]
)


@given(fields=st.dictionaries(NAMES, VALUES), message=st.dictionaries(st.sampled_from(
    ["role", "content", "name", "tool_calls", "function_call", "refusal", "x"]), VALUES))  # fmt: skip
def test_any_body_is_read_or_refused(fields: dict[str, Any], message: dict[str, Any]) -> None:
    """No body is a bug of the gateway; and how much is left unlisted is nothing."""
    for read in (read_chat, read_completion):
        body = {"model": "m", "messages": [{"role": "user", "content": "x", **message}], "prompt": "x", **fields}
        try:
            asked: Asked = read(body)
        except (Problem, TidegateError):
            continue
        told = sum(part.characters for part in asked.coverage)
        assert told >= str(body["messages"] if read is read_chat else body["prompt"]).count(BAD) * len(BAD)
