"""Requests of the Responses API: each field that can carry text is judged, refused, or counted as not judged."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tidegate.gateway.asked import Asked
from tidegate.gateway.responses_asked import MOST_ITEMS, read_responses
from tidegate.gateway.statuses import Problem
from tidegate.types import Channel, CoverageState, Role, ToolCall, Turn

TEXT = "first mix the powder"
DATA = "data:image/png;base64,AAAABBBBCCCCDDDDEEEE"
USER: dict[str, Any] = {"role": "user", "content": "hello"}


def asked(judge_system: bool = False, **body: Any) -> Asked:
    return read_responses({"model": "m", **body}, judge_system=judge_system)


def judged(one: Asked) -> str:
    """All texts that a guard is shown as new."""
    turns = [text.conversation.turns[-1] for text in one.new]
    return "\n".join(
        "\n".join((turn.content, turn.reasoning, *(call.arguments for call in turn.tool_calls))) for turn in turns
    )


def states(one: Asked) -> dict[str, tuple[str, int]]:
    return {part.path: (part.state.value, part.characters) for part in one.coverage if part.characters}


def items(text: str) -> Iterator[tuple[str, Any]]:
    """Every place of an input item that is judged when it is new, by the path that the coverage says."""
    for kind in ("input_text", "output_text", "text"):
        yield f"{kind}:content", {**USER, "content": [{"type": kind, "text": text}]}
    yield "message:content", {"type": "message", "role": "user", "content": text}
    yield "assistant:content", {"role": "assistant", "content": [{"type": "output_text", "text": text}]}
    yield "refusal:content", {"role": "assistant", "content": [{"type": "refusal", "refusal": text}]}
    yield "reasoning:summary", {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": text}]}
    said = [{"type": "reasoning_text", "text": text}]
    yield "reasoning content:summary", {"type": "reasoning", "id": "r", "summary": [], "content": said}
    call = {"type": "function_call", "call_id": "c", "name": "search"}
    yield "call:arguments", {**call, "arguments": text}
    yield "call:name", {**call, "arguments": "{}", "name": text}
    yield "call:call_id", {**call, "arguments": "{}", "call_id": text}
    yield "call:status", {**call, "arguments": "{}", "status": text}
    yield "call:odd", {**call, "arguments": "{}", "odd": [{"deep": text}]}
    yield "output:output", {"type": "function_call_output", "call_id": "c", "output": text}
    parts = [{"type": "input_text", "text": text}, {"type": "input_image", "image_url": DATA}]
    yield "output parts:output", {"type": "function_call_output", "call_id": "c", "output": parts}
    yield "output object:output", {"type": "function_call_output", "call_id": "c", "output": {"a": {"b": text}}}
    yield "output names:output", {"type": "function_call_output", "call_id": "c", "output": {text: 1}}
    custom = {"type": "custom_tool_call", "call_id": "c", "name": "search"}
    yield "custom:input", {**custom, "input": text}
    yield "custom output:output", {"type": "custom_tool_call_output", "call_id": "c", "output": text}
    search = {"type": "web_search_call", "id": "w", "status": "completed"}
    yield "web:action", {**search, "action": {"type": "search", "query": text}}
    yield "files:queries", {"type": "file_search_call", "id": "f", "queries": [text]}
    yield "files:results", {"type": "file_search_call", "id": "f", "queries": [], "results": [{"text": text}]}
    yield "computer:action", {"type": "computer_call", "id": "c", "action": {"type": "type", "text": text}}
    yield "code:code", {"type": "code_interpreter_call", "id": "c", "container_id": "k", "code": text}
    logs = [{"type": "logs", "logs": text}]
    yield "code:outputs", {"type": "code_interpreter_call", "id": "c", "container_id": "k", "outputs": logs}
    yield "local shell:action", {"type": "local_shell_call", "id": "l", "action": {"command": ["echo", text]}}
    yield "local shell:output", {"type": "local_shell_call_output", "id": "l", "output": text}
    yield "shell:action", {"type": "shell_call", "call_id": "c", "action": {"commands": [text]}}
    yield "shell:output", {"type": "shell_call_output", "call_id": "c", "output": [{"stdout": text, "stderr": ""}]}
    yield "patch:operation", {"type": "apply_patch_call", "call_id": "c", "operation": {"path": "a", "diff": text}}
    yield "patch:output", {"type": "apply_patch_call_output", "call_id": "c", "output": text}
    mcp = {"type": "mcp_call", "id": "m", "name": "search", "server_label": "books"}
    yield "mcp:arguments", {**mcp, "arguments": text}
    yield "mcp:output", {**mcp, "arguments": "", "output": text}
    yield "mcp:error", {**mcp, "arguments": "", "error": {"message": text}}
    yield "mcp:tools", {"type": "mcp_list_tools", "id": "m", "tools": [{"name": "a", "description": text}]}
    yield "mcp:arguments", {"type": "mcp_approval_request", "id": "m", "name": "a", "arguments": text}
    yield "mcp:reason", {"type": "mcp_approval_response", "approval_request_id": "m", "approve": False, "reason": text}
    yield "image:revised_prompt", {"type": "image_generation_call", "id": "i", "revised_prompt": text}
    yield "program:code", {"type": "program", "id": "p", "call_id": "c", "code": text}
    yield "program:result", {"type": "program_output", "id": "p", "call_id": "c", "odd": text, "result": ""}
    yield "unknown:text", {"type": "odd_thing", "text": text}
    yield "unknown name:?", {"type": "odd_thing", text: 1}


@pytest.mark.parametrize(("where", "item"), list(items(TEXT)), ids=[where for where, _ in items("")])
def test_text_in_every_item_is_judged(where: str, item: dict[str, Any]) -> None:
    """When it is new; and the coverage names the place."""
    one = asked(input=[USER, item])

    assert TEXT in judged(one)
    assert sum(part.characters for part in one.coverage if part.state is CoverageState.JUDGED) >= 20


def unseen_items() -> Iterator[tuple[str, Any, int]]:
    """What no guard can judge: the path, the item, and at least how many characters."""
    for kind, field in (("input_image", "image_url"), ("input_file", "file_data"), ("input_file", "filename")):
        yield "input[1].content[0]", {**USER, "content": [{"type": kind, field: TEXT}]}, 20
    yield "input[1].content[0]", {**USER, "content": [{"type": "input_image", "file_id": "file-1"}]}, 1
    cited = {"type": "output_text", "text": "x", "annotations": [{"type": "url_citation", "title": TEXT}]}
    yield "input[1].content[0].annotations", {"role": "assistant", "content": [cited]}, 20
    yield "input[1].content[0].type", {**USER, "content": [{"type": TEXT, "text": "x"}]}, 20
    yield "input[1].odd", {**USER, "odd": TEXT}, 20
    yield "input[1].status", {**USER, "status": TEXT}, 20
    yield "input[1].id", {**USER, "id": TEXT}, 20
    yield "input[1].encrypted_content", {"type": "reasoning", "summary": [], "encrypted_content": TEXT}, 20
    yield "input[1].encrypted_content", {"type": "compaction", "encrypted_content": TEXT}, 20
    yield "input[1].id", {"type": "item_reference", "id": "msg_1"}, 5
    yield "input[1].id", {"id": TEXT}, 20
    yield "input[1].result", {"type": "image_generation_call", "id": "i", "result": TEXT}, 20
    shot = {"type": "computer_screenshot", "image_url": DATA}
    yield "input[1].output", {"type": "computer_call_output", "call_id": "c", "output": shot}, len(DATA)
    image = [{"type": "image", "url": DATA}]
    yield "input[1].outputs", {"type": "code_interpreter_call", "id": "c", "outputs": image}, len(DATA)
    parts = [{"type": "input_file", "file_data": TEXT}]
    yield "input[1].output", {"type": "function_call_output", "call_id": "c", "output": parts}, 20
    yield "input[1].output", {"type": "function_call_output", "call_id": "c", "output": [1, 2, 3]}, 3


@pytest.mark.parametrize(("path", "item", "least"), list(unseen_items()))
def test_what_no_guard_can_judge_in_an_item_is_counted(path: str, item: dict[str, Any], least: int) -> None:
    """Under its place, and as something that a policy can refuse."""
    one = asked(input=[USER, item])

    (part,) = [part for part in one.unseen if part.path == path]
    assert part.state is CoverageState.NOT_JUDGED
    assert part.characters >= least
    assert part in one.coverage


@pytest.mark.parametrize(
    ("option", "path"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"conversation": {"id": "conv_1"}}, "conversation"),
        ({"prompt": {"id": "pmpt_1", "version": "2"}}, "prompt"),
        ({"metadata": {"note": TEXT}}, "metadata"),
        ({"metadata": {TEXT: "x"}}, "metadata"),
        ({"user": TEXT}, "user"),
        ({"safety_identifier": TEXT}, "safety_identifier"),
        ({"prompt_cache_key": TEXT}, "prompt_cache_key"),
        ({"tool_choice": {"type": "function", "name": TEXT}}, "tool_choice"),
        ({"reasoning": {"effort": TEXT}}, "reasoning"),
        ({"include": [TEXT]}, "include"),
        ({"truncation": TEXT}, "truncation"),
        ({"stream_options": {TEXT: True}}, "stream_options"),
        ({"odd": TEXT}, "odd"),
        ({"odd": {"deep": [TEXT]}}, "odd"),
        ({TEXT: "x"}, "?"),
    ],
)
def test_text_in_options_is_counted(option: dict[str, Any], path: str) -> None:
    """History and prompts that only the upstream knows, and what becomes no turn."""
    one = asked(input="hello", **option)

    assert [part.path for part in one.unseen] == [path]
    assert one.unseen[0].characters >= (len(TEXT) if TEXT in str(option) else 1)
    assert one.unseen[0] in one.coverage


OPERATORS: list[tuple[str, dict[str, Any]]] = [
    ("tools", {"tools": [{"type": "function", "name": "search", "description": TEXT}]}),
    ("tools", {"tools": [{"type": "mcp", "server_label": TEXT}]}),
    ("text", {"text": {"format": {"type": "json_schema", "name": "a", "schema": {"description": TEXT}}}}),
    ("text", {"text": {"format": {"type": "json_schema", "name": "a", "schema": {"enum": TEXT.split()}}}}),
    ("instructions", {"instructions": TEXT}),
    ("input[0].content", {"input": [{"role": "developer", "content": TEXT}]}),
    ("input[0].tools", {"input": [{"type": "additional_tools", "role": "developer", "tools": [{"name": TEXT}]}]}),
]


@pytest.mark.parametrize(("path", "option"), OPERATORS)
def test_the_operators_words_are_judged_where_that_is_asked_for(path: str, option: dict[str, Any]) -> None:
    """Else they are counted as not judged, and are no reason to refuse a request."""
    plain = asked(**{"input": "hello", **option})
    strict = asked(True, **{"input": "hello", **option})

    assert states(plain)[path][0] == "not_judged"
    assert states(plain)[path][1] >= len(TEXT.replace(" ", ""))
    assert plain.unseen == ()
    assert TEXT not in judged(plain)
    assert states(strict)[path][0] == "judged"
    assert TEXT in judged(strict).replace("\n", " ")


def test_words_for_programs_are_no_text() -> None:
    """A request as clients send it has nothing that is not judged."""
    one = asked(
        input=[{"type": "message", "id": "msg_1", "status": "completed", "phase": "final_answer", **USER}],
        metadata={"kind": "test"},
        user="user-1",
        tool_choice="auto",
        text={"format": {"type": "text"}, "verbosity": "low"},
        reasoning={"effort": "low", "summary": "auto"},
        include=["reasoning.encrypted_content"],
        truncation="disabled",
        service_tier="auto",
        stream_options={"include_obfuscation": False},
        store=False,
        temperature=0.5,
        max_output_tokens=5,
    )

    assert [(part.path, part.state.value) for part in one.coverage] == [("input[0].content", "judged")]
    assert one.unseen == ()


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (TEXT, TEXT),
        ({"type": "input_text", "text": TEXT}, TEXT),
        ([TEXT], TEXT),
    ],
)
def test_what_is_filled_into_a_stored_prompt_is_judged(value: Any, said: str) -> None:
    """As if a user had said it; the prompt itself is not seen."""
    one = asked(prompt={"id": "pmpt_1", "variables": {"name": value}}, input="hello")

    assert said in judged(one)
    assert states(one)["prompt.variables.name"] == ("judged", len(TEXT))
    assert [part.path for part in one.unseen] == ["prompt"]


def test_variables_are_judged_whatever_stands_in_the_input() -> None:
    """Also after earlier turns, and together with the beginning of an answer; a name can be a sentence too."""
    history = [USER, {"role": "assistant", "content": "hi"}, {**USER, "content": "more"}]
    begun = [USER, {"role": "assistant", "content": TEXT}]
    pictured = {"a": "apple", TEXT: "x", "b": {"type": "input_image", "image_url": DATA}}

    after = asked(prompt={"id": "p", "variables": {"a": "apple"}}, input=history)
    beside = asked(prompt={"id": "p", "variables": {"a": "apple"}}, input=begun)
    named = asked(prompt={"id": "p", "variables": pictured})

    assert "more\napple" in judged(after)
    assert "apple" in judged(beside)
    assert TEXT in judged(beside)
    assert TEXT in judged(named)
    assert [part.path for part in named.unseen] == ["prompt.variables.b", "prompt"]


def test_a_request_becomes_turns() -> None:
    """Roles, reasoning, calls and what they gave, in their order."""
    one = asked(
        instructions="Be kind.",
        input=[
            {"role": "user", "content": [{"type": "input_text", "text": "bo"}, {"type": "input_text", "text": "mb"}]},
            {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "Hm."}]},
            {"type": "function_call", "call_id": "c", "name": "search", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "nothing"},
            {"type": "mcp_call", "id": "m", "name": "find", "server_label": "s", "arguments": "[]", "output": "a book"},
        ],
        tools=[{"type": "function", "name": "search"}, {"type": "mcp", "server_label": "s"}],
        safety_identifier="user-1",
        stream=True,
    )

    assert one.conversation.turns == (
        Turn(Role.SYSTEM, "Be kind."),
        Turn(Role.USER, "bo\nmb"),
        Turn(Role.ASSISTANT, "", "Hm."),
        Turn(Role.ASSISTANT, tool_calls=(ToolCall("search", "{}"),)),
        Turn(Role.TOOL, "nothing"),
        Turn(Role.ASSISTANT, tool_calls=(ToolCall("find", "[]"),)),
        Turn(Role.TOOL, "a book"),
    )
    assert judged(one) == "a book\n"
    assert (one.tools, one.subject, one.stream, one.model) == ({"search", "s"}, "user-1", True, "m")
    assert {part.channel for part in one.coverage} == {
        Channel.SYSTEM,
        Channel.USER,
        Channel.ANSWER,
        Channel.REASONING,
        Channel.TOOL_CALL,
        Channel.TOOL_RESULT,
    }


def test_parts_are_judged_in_any_joints() -> None:
    """A word cut in two parts is seen."""
    parts = [{"type": "input_text", "text": "bo"}, {"type": "input_text", "text": "mb"}]

    message = asked(input=[{"role": "user", "content": parts}])
    output = asked(input=[{"type": "function_call_output", "call_id": "c", "output": parts}])

    assert "bomb" in judged(message)
    assert "bomb" in judged(output)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"model": None}, "model"),
        ({"model": 5}, "model"),
        ({"model": ""}, "model"),
        ({"background": True}, "background"),
        ({"background": "yes"}, "background"),
        ({"stream": "yes"}, "stream"),
        ({"instructions": ["x"]}, "instructions"),
        ({"input": 5}, "input"),
        ({"input": {"role": "user"}}, "input"),
        ({"input": ["x"]}, "input[0]"),
        ({"input": [USER] * (MOST_ITEMS + 1)}, "input"),
        ({"input": [{"type": 5}]}, "input[0].type"),
        ({"input": [{"role": "odd", "content": "x"}]}, "input[0].role"),
        ({"input": [{"type": "message", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": {"text": "x"}}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": ["x"]}]}, "input[0].content[0]"),
        ({"input": [{"role": "user", "content": [{"text": "x"}]}]}, "input[0].content[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_text", "text": 5}]}]}, "input[0].content[0].text"),
        ({"input": [{"type": "reasoning", "summary": "x"}]}, "input[0].summary"),
        ({"Input": "x"}, "input"),
        ({"input": [{**USER, "Content": "x"}]}, "input[0].content"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_text", "text": "x", "Text": "y"}]}]},
            "input[0].content[0].text",
        ),
        ({"prompt": "x"}, "prompt"),
        ({"prompt": {"id": "p", "variables": ["x"]}}, "prompt.variables"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_place(body: dict[str, Any], param: str) -> None:
    with pytest.raises(Problem) as caught:
        asked(**{"input": "hello", **body})

    assert caught.value.status == 400
    assert caught.value.param == param


def test_a_request_without_input_has_an_empty_turn() -> None:
    """A stored prompt alone, or items that the upstream keeps: nothing to judge, and that is said."""
    one = read_responses({"prompt": {"id": "pmpt_1"}})

    assert one.conversation.turns == (Turn(Role.USER, ""),)
    assert one.new == ()
    assert [part.path for part in one.unseen] == ["prompt"]
