"""What of a request of the Messages API is judged: every text of it, or the coverage says that it is not."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.gateway.messages_asked import MessagesRequest, read_messages
from tidegate.gateway.schemas import MOST_LEVELS
from tidegate.gateway.statuses import Problem
from tidegate.types import CoverageState, Role, ToolCall, Turn

HARM = "how to build a bomb"


def read(*messages: Any, judge_system: bool = False, **options: Any) -> MessagesRequest:
    return read_messages({"model": "m", "messages": list(messages), **options}, judge_system=judge_system)


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


def assistant(*content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": list(content)}


def words(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def judged_texts(asked: MessagesRequest) -> list[str]:
    turns = [text.conversation.turns[-1] for text in asked.new]
    return ["\n".join((turn.content, turn.reasoning, *(call.arguments for call in turn.tool_calls))) for turn in turns]


def result(content: Any, **more: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": "toolu_1", "content": content, **more}


def document(source: Any, **more: Any) -> dict[str, Any]:
    return {"type": "document", "source": source, **more}


PLAIN = {"type": "text", "media_type": "text/plain", "data": "pie"}
CITATION = {"type": "char_location", "cited_text": "x", "document_index": 0, "document_title": "t"}
SEARCH = {"type": "search_result", "source": "https://a.b", "title": "t", "content": [words("x")]}

JUDGED: dict[str, Any] = {
    "text": words(HARM),
    "text in a field that we do not know": {**words("x"), "note": HARM},
    "text in a field's name": {**words("x"), HARM: 1},
    "citations of a text": {**words("x"), "citations": [{**CITATION, "cited_text": HARM}]},
    "title in citations": {**words("x"), "citations": [{**CITATION, "document_title": HARM}]},
    "tool_result as a string": result(HARM),
    "tool_result in blocks": result([words("x"), words(HARM)]),
    "tool_result with a search result": result([{**SEARCH, "content": [words(HARM)]}]),
    "tool_result with a document": result([document({**PLAIN, "data": HARM})]),
    "tool_result in a tool_result": result([result([words(HARM)])]),
    "a field beside a tool_result": result("x", note=HARM),
    "thinking": {"type": "thinking", "thinking": HARM, "signature": "c2ln"},
    "signature that is a sentence": {"type": "thinking", "thinking": "x", "signature": HARM},
    "redacted_thinking that is a sentence": {"type": "redacted_thinking", "data": HARM},
    "input of a tool_use": {"type": "tool_use", "id": "t", "name": "search", "input": {"query": HARM}},
    "name in the input of a tool_use": {"type": "tool_use", "id": "t", "name": "search", "input": {HARM: [1]}},
    "name of a tool_use": {"type": "tool_use", "id": "t", "name": HARM, "input": {}},
    "id of a tool_use": {"type": "tool_use", "id": HARM, "name": "search", "input": {}},
    "caller of a tool_use": {"type": "tool_use", "id": "t", "name": "s", "input": {}, "caller": {"type": HARM}},
    "input of a server_tool_use": {"type": "server_tool_use", "id": "t", "name": "web_search", "input": {"q": HARM}},
    "input of an mcp_tool_use": {"type": "mcp_tool_use", "id": "t", "name": "s", "input": {"q": HARM}},
    "document as text": document({**PLAIN, "data": HARM}),
    "document as a string": document({"type": "content", "content": HARM}),
    "document as blocks": document({"type": "content", "content": [words(HARM)]}),
    "title of a document": document(PLAIN, title=HARM),
    "context of a document": document(PLAIN, context=HARM),
    "title of a document that is a file": document({"type": "base64", "data": "JVBERi0="}, title=HARM),
    "media type of a document": document({**PLAIN, "media_type": HARM}),
    "text of a search_result": {**SEARCH, "content": [words(HARM)]},
    "title of a search_result": {**SEARCH, "title": HARM},
    "source of a search_result": {**SEARCH, "source": HARM},
    "web_search_tool_result": {
        "type": "web_search_tool_result",
        "tool_use_id": "t",
        "content": [{"type": "web_search_result", "title": HARM, "url": "u", "encrypted_content": "RW5j"}],
    },
    "code_execution_tool_result": {
        "type": "code_execution_tool_result",
        "tool_use_id": "t",
        "content": {"type": "code_execution_result", "stdout": HARM, "stderr": "", "return_code": 0, "content": []},
    },
    "web_fetch_tool_result": {
        "type": "web_fetch_tool_result",
        "tool_use_id": "t",
        "content": {"type": "web_fetch_result", "url": "u", "content": document({**PLAIN, "data": HARM})},
    },
    "a block that we do not know": {"type": "new_thing", "deep": [{"er": {"text": HARM}}]},
    "a type that is a sentence": {"type": HARM},
    "cache_control": {**words("x"), "cache_control": {"type": HARM}},
}


@pytest.mark.parametrize("block", JUDGED.values(), ids=JUDGED)
@pytest.mark.parametrize("role", ["user", "assistant"])
def test_every_text_of_a_block_is_judged(block: Any, role: str) -> None:
    """Whoever says it, in whichever field it stands: the guard sees it."""
    asked = read(*([user(words("hello"))] if role == "assistant" else []), {"role": role, "content": [block]})

    assert any(HARM in text for text in judged_texts(asked))


COUNTED: dict[str, tuple[Any, str]] = {
    "image": ({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGFybQ=="}}, "source"),
    "image by address": ({"type": "image", "source": {"type": "url", "url": "https://a.b/c.png"}}, "source"),
    "image in a tool_result": (result([{"type": "image", "source": {"type": "file", "file_id": "f"}}]), "source"),
    "PDF": (document({"type": "base64", "media_type": "application/pdf", "data": "JVBERi0="}), "source"),
    "document by address": (document({"type": "url", "url": "https://a.b"}), "source"),
    "a source that we do not know": (document({"type": "new", "words": HARM}), "source"),
    "redacted_thinking": ({"type": "redacted_thinking", "data": "RW5jcnlwdGVk"}, "data"),
    "container_upload": ({"type": "container_upload", "file_id": "file_1"}, "content[0]"),
    "numbers that may be tokens": ({"type": "text", "text": "so", "tokens": [3, 14, 15]}, "tokens"),
    "encrypted content": (
        {
            "type": "web_search_tool_result",
            "tool_use_id": "t",
            "content": [{"type": "web_search_result", "title": "t", "url": "u", "encrypted_content": "RW5j"}],
        },
        "encrypted_content",
    ),
}


@pytest.mark.parametrize(("block", "end"), COUNTED.values(), ids=COUNTED)
def test_what_no_guard_can_read_is_counted(block: Any, end: str) -> None:
    """Images, files and encrypted data stand in the coverage as not judged, by their place."""
    asked = read(user(words("hello"), block))

    (part,) = asked.unseen
    assert part.path.startswith("messages[0].content[1]")
    assert part.path.endswith(end.replace("content[0]", "content[1]"))
    assert part.state is CoverageState.NOT_JUDGED
    assert part.characters > 0
    assert part in asked.coverage


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("mcp_servers", [{"type": "url", "name": "n", "url": "https://a.b"}]),
        ("container", {"skills": [{"skill_id": "s"}]}),
        ("context_management", {"edits": [{"type": HARM}]}),
        ("metadata", {"note": HARM}),
        ("metadata", HARM),
        ("stop_sequences", [HARM]),
        ("tool_choice", {"type": "tool", "name": HARM}),
        ("thinking", HARM),
        ("never_heard_of", HARM),
        (HARM, HARM),
    ],
)
def test_options_that_nobody_knows_or_that_hold_sentences_are_counted(option: str, value: Any) -> None:
    """Their text is not a turn: nobody judges it, and the coverage says so."""
    asked = read(user(words("hello")), **{option: value})

    (part,) = asked.unseen
    assert part.path in (option, f"{option}.note", f"{option}.?", "?")
    assert part.state is CoverageState.NOT_JUDGED
    assert part.characters > 0


@pytest.mark.parametrize(
    "options",
    [
        {"metadata": {"user_id": "u"}},
        {"stop_sequences": ["END"]},
        {"metadata": {"user_id": "a person, by name"}},
        {"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}},
        {"thinking": {"type": "enabled", "budget_tokens": 1024}},
        {"tool_choice": {"type": "tool", "name": "search"}},
        {"service_tier": "auto", "max_tokens": 10, "temperature": 0.5, "top_k": 3, "stream": True},
        {"cache_control": {"type": "ephemeral"}},
    ],
)
def test_options_that_the_model_never_reads_are_not_counted(options: Any) -> None:
    """They say how to answer, and nothing to the model."""
    assert read(user(words("hello")), **options).unseen == ()


OPERATOR: list[tuple[str, Any]] = [
    ("tools", [{"name": "search", "description": HARM, "input_schema": {"type": "object"}}]),
    ("tools", [{"name": HARM, "input_schema": {"type": "object"}}]),
    ("tools", [{"name": "search", "input_schema": {"properties": {HARM: {"type": "string"}}}}]),
    ("output_config", {"format": {"type": "json_schema", "schema": {"description": HARM}}}),
]


@pytest.mark.parametrize(("option", "value"), OPERATOR)
def test_tools_are_judged_with_the_system_turns(option: str, value: Any) -> None:
    """They are the operator's words: judged where those are, else counted as not judged; nobody refuses them."""
    with_, without = (read(user(words("hello")), judge_system=judge, **{option: value}) for judge in (True, False))

    assert any(HARM in text for text in judged_texts(with_))
    assert not any(HARM in text for text in judged_texts(without))
    assert {part.path: part.state.value for part in without.coverage}[option] == "not_judged"
    assert {part.path: part.state.value for part in with_.coverage}[option] == "judged"
    assert without.unseen == ()


@pytest.mark.parametrize("system", [HARM, [words("be kind"), words(HARM)]])
def test_system_is_judged_when_that_is_asked_for(system: Any) -> None:
    """Else the coverage says that it is not; a system turn in the middle is the same."""
    for options, messages in (({"system": system}, []), ({}, [{"role": "system", "content": system}])):
        with_, without = (
            read(*messages, user(words("hello")), judge_system=judge, **options) for judge in (True, False)
        )

        assert any(HARM in text for text in judged_texts(with_))
        assert not any(HARM in text for text in judged_texts(without))
        states = {part.path: part.state for part in without.coverage}
        assert states["system" if options else "messages[0].content"] is CoverageState.NOT_JUDGED


def test_tool_results_are_turns_of_their_own() -> None:
    """Beside the words of the user, after the call that they answer; each has its place."""
    call = {"type": "tool_use", "id": "t", "name": "search", "input": {"query": "é"}}
    asked = read(
        user(words("find it")),
        assistant(words("I look."), call),
        user(result("one"), result([words("two")]), words("and?"), words("well?")),
        tools=[{"name": "search"}],
    )

    assert asked.conversation.turns == (
        Turn(Role.USER, "find it"),
        Turn(Role.ASSISTANT, "I look.", "", (ToolCall("search", '{"query": "é"}'),)),
        Turn(Role.TOOL, "one\ntwo"),
        Turn(Role.USER, "and?\nwell?"),
    )
    assert judged_texts(asked) == ["one\ntwo\n", "onetwo\n", "and?\nwell?\n", "and?well?\n"]
    assert [(part.path, part.state.value, part.characters) for part in asked.coverage] == [
        ("messages[0].content", "not_judged", 7),
        ("messages[1].content", "not_judged", 7),
        ("messages[1].content[1].input", "not_judged", 14),
        ("messages[2].content[0-1]", "judged", 7),
        ("messages[2].content[2-3]", "judged", 10),
        ("tools", "not_judged", 6),
    ]


def test_the_given_beginning_of_an_answer_is_judged() -> None:
    """It is the last turn, as the assistant's: with its thinking and its calls."""
    beginning = assistant({"type": "thinking", "thinking": "hm", "signature": "c2ln"}, words("Sure, first"))
    asked = read(user(words("hello")), beginning)

    assert [text.conversation.turns[-1] for text in asked.new] == [
        Turn(Role.USER, "hello"),
        Turn(Role.ASSISTANT, "Sure, first", "hm"),
    ]
    assert asked.conversation.turns[-1].content == "Sure, first"
    assert asked.unseen == ()


def test_what_an_exchange_needs_is_read() -> None:
    """The subject, the tools, the stop sequences, whether it streams."""
    asked = read(
        user(words("hello")),
        metadata={"user_id": "u-1"},
        tools=[{"name": "search"}, {"type": "web_search_20250305", "name": "web_search"}, "odd"],
        stop_sequences=["END", 3],
        stream=True,
    )

    assert (asked.subject, asked.stream, asked.stops) == ("u-1", True, frozenset({"END"}))
    assert asked.tools == {"search", "web_search"}


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ({}, "messages"),
        ({"messages": "x"}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": ["x"]}, "messages[0]"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
        ({"messages": [user("x")]}, "messages[0].content[0]"),
        ({"messages": [user({"type": "text"})]}, "messages[0].content[0].text"),
        ({"messages": [user({"type": "text", "text": [HARM]})]}, "messages[0].content[0].text"),
        ({"messages": [user({"type": "thinking", "thinking": {"a": HARM}})]}, "messages[0].content[0].thinking"),
        ({"messages": [user(result({"a": HARM}))]}, "messages[0].content[0].content"),
        ({"messages": [user({"type": "tool_use", "name": [HARM]})]}, "messages[0].content[0].name"),
        ({"messages": [user(words("x"))], "system": 3}, "system"),
        ({"messages": [user(words("x"))], "stream": "yes"}, "stream"),
        ({"messages": [user(words("x"))], "model": None}, "model"),
        ({"messages": [user(words("x"))] * 2049}, "messages"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_place(body: Any, place: str) -> None:
    """Nothing that is in a shape that nobody knows goes on, and the error quotes nothing of it."""
    with pytest.raises(Problem) as caught:
        read_messages({"model": "m", **body})

    assert caught.value.param == place
    assert HARM not in caught.value.message


def test_results_that_lie_in_each_other_are_read_as_deep_as_json_may_be() -> None:
    inner = words(HARM)
    for _ in range(MOST_LEVELS // 2):
        inner = result([inner])

    asked = read(user(inner))

    assert HARM in str(asked.new) or sum(part.characters for part in asked.unseen) >= len(HARM)


KEYS = st.sampled_from(["text", "data", "title", "type", "id", "note", "source", "content", "input", "signature"])
STRINGS = st.sampled_from([HARM, "x", "text", "url", "document", "base64"])
VALUES: Any = st.recursive(
    STRINGS | st.integers() | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@given(
    kind=st.sampled_from([*{block["type"] for block in JUDGED.values()}, "image"]),
    fields=st.dictionaries(KEYS, VALUES, max_size=5),
)
def test_no_string_is_lost(kind: str, fields: dict[str, Any]) -> None:
    """Whatever a block is made of: a sentence in it is judged, counted, or the request is refused."""
    block = {**fields, "type": kind}
    try:
        asked = read(user(block))
    except Problem:
        return

    said: dict[str, str] = {}
    for text in asked.new:
        said.setdefault(text.places[0][0], text.conversation.turns[-1].content)
    seen = sum(text.count(HARM) for text in said.values())
    hidden = sum(part.characters for part in asked.unseen)
    assert seen * len(HARM) + hidden >= str(block).count(HARM) * len(HARM)
