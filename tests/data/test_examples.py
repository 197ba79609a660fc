"""Examples on disk: what is written is read back the same, and what cannot be read is named with its place."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.data.examples import (
    example_from_row,
    example_to_row,
    parse_conversation,
    read_examples,
    write_examples,
)
from tidegate.errors import InputError
from tidegate.types import Conversation, Example, Role, Severity, Target, ToolCall, Turn

WORDS = st.text(max_size=12)
CALLS = st.lists(st.builds(ToolCall, WORDS, WORDS), max_size=2).map(tuple)
TURNS = st.builds(Turn, st.sampled_from(list(Role)), WORDS, WORDS, CALLS)
EXAMPLES = st.builds(
    Example,
    id=WORDS,
    conversation=st.lists(TURNS, min_size=1, max_size=3).map(lambda turns: Conversation(tuple(turns))),
    target=st.sampled_from(list(Target)),
    severity=st.none() | st.sampled_from(list(Severity)),
    categories=st.lists(WORDS, max_size=2).map(tuple),
    refusal=st.none() | st.booleans(),
    language=WORDS,
    source=WORDS,
    licence=WORDS,
    split=WORDS,
    extra=st.dictionaries(WORDS, st.integers() | WORDS, max_size=2),
)
USER = {"role": "user", "content": "hello"}


@given(EXAMPLES)
def test_an_example_survives_being_made_a_row(example: Example) -> None:
    assert example_from_row(json.loads(json.dumps(example_to_row(example)))) == example


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
@given(examples=st.lists(EXAMPLES, max_size=4))
def test_examples_survive_the_disk(
    examples: list[Example], name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("rows") / name
    assert write_examples(path, examples) == len(examples)
    assert list(read_examples(path)) == examples


def test_text_with_half_a_character_survives_the_disk(tmp_path: Path) -> None:
    example = Example("1", Conversation.of("cut \ud83d here"), Target.PROMPT, Severity.SAFE)
    write_examples(tmp_path / "rows.jsonl", [example])
    assert list(read_examples(tmp_path / "rows.jsonl")) == [example]


def test_the_same_examples_give_the_same_gzipped_bytes(tmp_path: Path) -> None:
    example = Example("1", Conversation.of("hello"), Target.PROMPT, Severity.SAFE)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_examples(tmp_path / folder / "rows.jsonl.gz", [example])
    assert (tmp_path / "a" / "rows.jsonl.gz").read_bytes() == (tmp_path / "b" / "rows.jsonl.gz").read_bytes()


def test_only_messages_are_required_and_the_last_one_decides_the_target() -> None:
    prompt = example_from_row({"messages": [USER]})
    assert (prompt.target, prompt.severity, prompt.id, prompt.extra) == (Target.PROMPT, None, "", {})
    answer = example_from_row({"messages": [USER, {"role": "assistant", "content": "hi"}]})
    assert answer.target is Target.RESPONSE


def test_null_fields_are_the_same_as_absent_ones() -> None:
    names = ("id", "target", "label", "categories", "refusal", "language", "source", "licence", "split", "extra")
    assert example_from_row({"messages": [USER], **dict.fromkeys(names)}) == example_from_row({"messages": [USER]})


def test_numbers_as_ids_are_kept_as_text() -> None:
    assert example_from_row({"messages": [USER], "id": 0}).id == "0"


@pytest.mark.parametrize("word", ["Unsafe", "unsafe", " UNSAFE "])
def test_labels_are_read_in_any_case(word: str) -> None:
    assert example_from_row({"messages": [USER], "label": word}).severity is Severity.UNSAFE


@pytest.mark.parametrize(
    ("change", "place", "expected"),
    [
        ({"messages": None}, "row.messages", "non-empty list"),
        ({"messages": []}, "row.messages", "non-empty list"),
        ({"messages": ["hello"]}, "row.messages[0]", "object with role and content"),
        ({"messages": [USER, {"role": "bot", "content": ""}]}, "row.messages[1].role", "assistant"),
        ({"messages": [{"role": "user"}]}, "row.messages[0].content", "string"),
        ({"messages": [{"role": "user", "content": 5}]}, "row.messages[0].content", "string"),
        ({"messages": [{**USER, "reasoning_content": 5}]}, "row.messages[0].reasoning_content", "string"),
        ({"messages": [{**USER, "tool_calls": {}}]}, "row.messages[0].tool_calls", "list"),
        ({"messages": [{**USER, "tool_calls": [{"function": 1}]}]}, "row.messages[0].tool_calls[0]", "arguments"),
        ({"label": "harmful"}, "row.label", "safe, controversial or unsafe"),
        ({"categories": "Violent"}, "row.categories", "list of category names"),
        ({"categories": [1]}, "row.categories", "list of category names"),
        ({"refusal": "no"}, "row.refusal", "true, false or null"),
        ({"target": "answer"}, "row.target", "prompt or response"),
        ({"extra": [1]}, "row.extra", "object"),
    ],
)
def test_a_wrong_field_is_named_with_what_was_expected(change: dict[str, Any], place: str, expected: str) -> None:
    with pytest.raises(InputError, match=expected) as caught:
        example_from_row({"messages": [USER], **change})
    assert caught.value.where == place


def test_content_may_be_null_beside_a_tool_call_or_reasoning() -> None:
    call = {"type": "function", "function": {"name": "search", "arguments": "{}"}}
    turns = parse_conversation(
        [
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "assistant", "content": None, "reasoning_content": "hm"},
        ]
    ).turns
    assert turns[0] == Turn(Role.ASSISTANT, "", "", (ToolCall("search", "{}"),))
    assert turns[1] == Turn(Role.ASSISTANT, "", "hm")


def test_old_role_words_are_understood() -> None:
    roles = [turn.role for turn in parse_conversation([{**USER, "role": w} for w in ("developer", "function")]).turns]
    assert roles == [Role.SYSTEM, Role.TOOL]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{not json}", "not JSON"),
        ('"text"', "JSON object"),
        ("[1]", "JSON object"),
        ('{"messages": 1}', "non-empty list"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number_after_the_good_ones(tmp_path: Path, line: str, expected: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [USER]}) + "\n\n" + line + "\n", encoding="utf-8")
    rows = read_examples(path)
    assert next(rows).conversation == Conversation.of("hello")
    with pytest.raises(InputError, match=expected) as caught:
        next(rows)
    assert str(caught.value.where).startswith(f"{path}:3")


def gzipped() -> bytes:
    return gzip.compress(json.dumps({"messages": [USER]}).encode() * 50)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("plain.jsonl", b"\xff\xfe{}"),
        ("not.jsonl.gz", b"{}"),
        ("cut.jsonl.gz", gzipped()[:-20]),
        ("damaged.jsonl.gz", gzipped()[:20] + bytes(12) + gzipped()[32:]),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_an_input_error(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=name):
        list(read_examples(tmp_path / name))


def test_a_file_that_is_not_there_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.jsonl"):
        list(read_examples(tmp_path / "nowhere.jsonl"))
