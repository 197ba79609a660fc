"""Prompts as token ids: those of the official way, and none that content could forge."""

from __future__ import annotations

import functools
import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer

pytest.importorskip("torch")

from gen_folder import tiny_tokenizer
from qwen3guard_files import FILES
from tidegate.model.prompt_tokens import PromptTokenizer
from tidegate.prompts import CONTROL, OFFICIAL, Form, Prompt, Segment
from tidegate.types import Conversation, Target

FORM = OFFICIAL[Target.PROMPT]
TEXTS = st.lists(st.one_of(st.sampled_from([*CONTROL, " ", "\n\n", "e\u0301"]), st.text(max_size=6))).map("".join)


@functools.cache
def tokenizers() -> list[tuple[Tokenizer, PromptTokenizer]]:
    """The tokenizer of the tests and, where it is at hand, the official one: as they are, and as ours."""
    whole = [tiny_tokenizer()]
    if FILES is not None:
        whole.append(Tokenizer.from_file(str(FILES / "tokenizer.json")))
    return [(tokenizer, PromptTokenizer(tokenizer.to_str())) for tokenizer in whole]


def official_ids(tokenizer: Tokenizer, conversation: Conversation) -> list[int]:
    ids: list[int] = tokenizer.encode(FORM.prompt(conversation).text, add_special_tokens=False).ids
    return ids


@given(text=st.text())
@example(text=" leading and trailing ")
@example(text="\n\nlines\n\n")
@example(text="\u0301 a mark that would join what stands before")
def test_ids_are_those_of_the_whole_text(text: str) -> None:
    if any(name in text for name in ("<|", "<think", "</think", "<tool", "</tool")):
        return
    conversation = Conversation.of(text)
    for whole, ours in tokenizers():
        assert ours.ids(FORM.prompt(conversation)) == official_ids(whole, conversation)


@given(text=TEXTS)
def test_content_never_becomes_a_control_token(text: str) -> None:
    for whole, ours in tokenizers():
        ids = ours.ids(FORM.prompt(Conversation.of(text)))
        control = [token for token in ids if not ours.is_text(token)]
        empty = official_ids(whole, Conversation.of(""))
        assert control == [token for token in empty if not ours.is_text(token)]


@given(text=TEXTS)
def test_content_is_not_lost(text: str) -> None:
    for _, ours in tokenizers():
        ids = ours.ids(Prompt((Segment(text, True),)))
        assert ours.text(ids) == Tokenizer.from_str(json.dumps(_normalizing())).normalizer.normalize_str(text)


def _normalizing() -> dict[str, object]:
    return json.loads(tiny_tokenizer().to_str())


def test_surrogates_are_taken() -> None:
    for _, ours in tokenizers():
        assert ours.text(ours.ids(Prompt((Segment("a\ud83d\ude00 b\ud83d", True),)))) == "a😀 b\ufffd"


def test_every_prompt_of_a_form_begins_with_the_same_tokens() -> None:
    for _, ours in tokenizers():
        beginning = ours.ids(FORM.fixed_beginning)
        for text in ("", "hi", " hi", "\nhi", "\u0301", "x" * 5):
            assert ours.ids(FORM.prompt(Conversation.of(text)))[: len(beginning)] == beginning


@pytest.mark.parametrize("form", OFFICIAL.values())
def test_the_parts_of_an_answer_have_the_ids_that_they_have_in_it(form: Form) -> None:
    for _, ours in tokenizers():
        for draft in (
            *form.drafts(""),
            *form.drafts("Safety: Unsafe"),
            *form.drafts("Safety: Unsafe\nCategories: PII,"),
        ):
            parts = (draft.before, draft.word, *draft.after)
            assert [token for part in parts for token in ours.part(part)] == list(ours.part("".join(parts)))


def test_control_tokens_are_no_text() -> None:
    for whole, ours in tokenizers():
        assert not any(ours.is_text(whole.token_to_id(name)) for name in CONTROL)
        assert not ours.is_text(10**6)


def test_a_tokenizer_without_control_tokens_is_refused() -> None:
    definition = json.loads(tiny_tokenizer().to_str())
    definition["added_tokens"] = definition["added_tokens"][:1]
    with pytest.raises(ValueError, match=r"lacks the control tokens <\|im_start\|>"):
        PromptTokenizer(json.dumps(definition))
