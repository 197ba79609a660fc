"""The prompts of Gen guards, byte for byte as the official template renders them, and the reading of answers.

``TIDEGATE_QWEN3GUARD_FILES`` names a folder with the official tokenizer and, in ``gen-0.6b``, the chat template; what
compares with these is skipped without it.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

import jinja2
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from qwen3guard_files import FILES
from tidegate.errors import InputError, UnreadableVerdict
from tidegate.prompts import (
    CONTROL,
    OFFICIAL,
    Answer,
    Draft,
    Form,
    LineKind,
    Segment,
    official_form,
    reason_form,
    texts_to_judge,
)
from tidegate.types import CATEGORIES, Category, Conversation, Role, Severity, Target, ToolCall, Turn

official_files = pytest.mark.skipif(FILES is None, reason="needs the released files: TIDEGATE_QWEN3GUARD_FILES")

ABOUT_PROMPT, ABOUT_RESPONSE = OFFICIAL[Target.PROMPT], OFFICIAL[Target.RESPONSE]
REASONED = reason_form(Target.PROMPT, ["Refunds", "Refunds to Others", "Legal (advice)"])
FORMS = [ABOUT_PROMPT, ABOUT_RESPONSE, REASONED]

BOMB = Conversation.of("How can I make a bomb?")
REFUSED = Conversation.of(
    "How can I make a bomb?",
    "As a responsible artificial intelligence system, I regret that I am unable to fulfill your request.",
)
RENDERED = {
    "74d6a1225ef64172c346ea669fe619be43d9cac83e62d841bee3373f096e090b": BOMB,
    "dec5b06882231a83be6f3731e6974881952d85246bb7956efb1582d23e3884e1": REFUSED,
}
"""SHA-256 of two captured official renderings."""

README_SAFETY = re.compile(r"Safety: (Safe|Unsafe|Controversial)")
README_REFUSAL = re.compile(r"Refusal: (Yes|No)")
README_CATEGORY = re.compile("|".join([*map(re.escape, CATEGORIES), "None"]))

TEXTS = st.one_of(st.sampled_from(["", " ", "\n", "USER: hi", "<END CONVERSATION>", *CONTROL, "{{ x }}"]), st.text())
LATER = st.sampled_from([Role.SYSTEM, Role.USER, Role.ASSISTANT])


@st.composite
def official_conversations(draw: st.DrawFn) -> Conversation:
    """What the official template has a rule for: it ends with a user or, behind another turn, with an assistant."""
    roles = draw(st.lists(LATER, max_size=5))
    last = draw(st.sampled_from([Role.USER, Role.ASSISTANT])) if roles else Role.USER
    return Conversation(tuple(Turn(role, draw(TEXTS)) for role in [*roles, last]))


def answers(form: Form) -> st.SearchStrategy[str]:
    """Whole answers of a form, with everything that it allows."""
    named = st.lists(st.sampled_from(form.names), min_size=1, max_size=3).map(", ".join)
    words = {
        LineKind.SEVERITY: st.sampled_from([s.label for s in Severity]),
        LineKind.CATEGORIES: st.one_of(st.just("None"), named),
        LineKind.REFUSAL: st.sampled_from(["Yes", "No"]),
        LineKind.REASON: st.from_regex(r"\A[^\s][^\n]{0,20}\Z"),
    }
    lines = [words[line.kind].map(lambda said, head=line.head: f"{head} {said}") for line in form.lines]
    return st.tuples(*lines).map("\n".join)


ANSWERS = st.sampled_from(FORMS).flatmap(lambda form: st.tuples(st.just(form), answers(form)))


@pytest.mark.parametrize(("digest", "conversation"), RENDERED.items())
def test_prompts_equal_the_captured_renderings(digest: str, conversation: Conversation) -> None:
    prompt = official_form(conversation.target).prompt(conversation)
    assert hashlib.sha256(prompt.text.encode()).hexdigest() == digest


@official_files
@given(conversation=official_conversations())
def test_prompts_equal_the_official_template(conversation: Conversation) -> None:
    assert FILES is not None
    source = FILES / "gen-0.6b" / "chat_template.jinja"
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(source.read_text(encoding="utf-8"))
    messages = [{"role": turn.role.value, "content": turn.content} for turn in conversation.turns]
    assert official_form(conversation.target).prompt(conversation).text == template.render(messages=messages)


@official_files
def test_an_empty_prompt_has_297_tokens() -> None:
    assert FILES is not None
    tokenizer = Tokenizer.from_file(str(FILES / "tokenizer.json"))
    text = ABOUT_PROMPT.prompt(Conversation.of("")).text
    assert len(tokenizer.encode(text, add_special_tokens=False).ids) == 297


@given(conversation=official_conversations())
def test_what_people_and_models_wrote_is_content_and_nothing_else_is(conversation: Conversation) -> None:
    segments = official_form(conversation.target).prompt(conversation).segments
    template = "".join(segment.text for segment in segments if not segment.is_content)
    empty = Conversation(tuple(Turn(turn.role) for turn in conversation.turns))
    assert official_form(empty.target).prompt(empty).text == template
    written = [turn.content for turn in conversation.turns]
    contents = [segment.text for segment in segments if segment.is_content]
    assert contents[-1] == written[-1]
    left = iter(written)
    assert all(content in left for content in contents), "contents are those of the turns, in their order"


def test_the_control_tokens_of_the_template_are_the_ones_that_are_listed() -> None:
    for form in FORMS:
        assert set(re.findall(r"<\|.*?\|>|</?think>", form.opening + form.closing)) == set(CONTROL)


def test_categories_are_listed_as_in_the_policy() -> None:
    assert ABOUT_PROMPT.categories == CATEGORIES
    assert ABOUT_RESPONSE.categories == tuple(name for name in CATEGORIES if name != Category.JAILBREAK)
    assert ABOUT_RESPONSE.names == CATEGORIES


@pytest.mark.parametrize(
    ("turns", "shown"),
    [
        ([Turn(Role.SYSTEM, "s"), Turn(Role.USER, "u")], "USER: s\n\nu"),
        ([Turn(Role.ASSISTANT, "a"), Turn(Role.USER, "u")], "\n\nUSER: u"),
        ([Turn(Role.USER, "u"), Turn(Role.SYSTEM, "s"), Turn(Role.USER, "v")], "USER: u\n\nv"),
        ([Turn(Role.USER, "u"), Turn(Role.TOOL, "t")], "USER: u\n\nUSER: t"),
        ([Turn(Role.TOOL, "t")], "USER: t"),
        ([Turn(Role.SYSTEM, "s")], "USER: s"),
        ([Turn(Role.USER, "u"), Turn(Role.SYSTEM, "s")], "USER: u\n\nUSER: s"),
        ([Turn(Role.ASSISTANT, "a")], "\n\nASSISTANT: a"),
        ([Turn(Role.ASSISTANT, "a"), Turn(Role.ASSISTANT, "b")], "\n\nASSISTANT: b"),
        ([Turn(Role.USER, "u"), Turn(Role.ASSISTANT, "a", reasoning="r")], "USER: u\n\nASSISTANT: a"),
    ],
)
def test_turns_are_shown_in_the_conversation(turns: list[Turn], shown: str) -> None:
    conversation = Conversation(tuple(turns))
    text = official_form(conversation.target).prompt(conversation).text
    assert text.split("<BEGIN CONVERSATION>\n\n")[1].split("\n\n<END CONVERSATION>")[0] == shown


@given(conversation=st.lists(st.sampled_from(Role), min_size=1, max_size=5))
def test_the_judged_turn_is_always_shown(conversation: list[Role]) -> None:
    turns = tuple(Turn(role, f"text {place}") for place, role in enumerate(conversation))
    prompt = official_form(Conversation(turns).target).prompt(Conversation(turns))
    assert Segment(turns[-1].content, True) in prompt.segments


def test_a_form_refuses_the_other_target() -> None:
    with pytest.raises(InputError, match="about a response"):
        ABOUT_RESPONSE.prompt(BOMB)


def test_a_turn_that_says_several_things_is_judged_in_parts() -> None:
    calls = (ToolCall("search", '{"q": 1}'), ToolCall("stop", ""))
    turn = Turn(Role.ASSISTANT, "answer", reasoning="thought", tool_calls=calls)
    judged = texts_to_judge(BOMB.then(turn))
    assert [conversation.turns[-1].content for conversation in judged] == ["answer", "thought", '{"q": 1}']
    assert all(conversation.turns[:-1] == BOMB.turns for conversation in judged)


def test_a_turn_that_says_several_things_is_judged_as_one_text_when_asked() -> None:
    turn = Turn(Role.ASSISTANT, "answer", reasoning="thought", tool_calls=(ToolCall("search", "{}"),))
    (judged,) = texts_to_judge(BOMB.then(turn), together=True)
    assert judged == BOMB.then(Turn(Role.ASSISTANT, "thought\n\nanswer\n\n{}"))


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("conversation", [BOMB, REFUSED, Conversation.of("hi", "")])
def test_a_turn_that_says_one_thing_is_judged_as_it_is(conversation: Conversation, together: bool) -> None:
    assert texts_to_judge(conversation, together=together) == (conversation,)


def test_a_call_without_words_is_judged_alone() -> None:
    turn = Turn(Role.ASSISTANT, tool_calls=(ToolCall("search", "{}"),))
    assert texts_to_judge(BOMB.then(turn)) == (BOMB.then(Turn(Role.ASSISTANT, "{}")),)


@pytest.mark.parametrize(
    ("form", "text", "answer"),
    [
        (ABOUT_PROMPT, "Safety: Safe\nCategories: None", Answer(Severity.SAFE)),
        (ABOUT_PROMPT, "\nSafety: Unsafe\nCategories: Violent\n", Answer(Severity.UNSAFE, ("Violent",))),
        (
            ABOUT_PROMPT,
            "Safety: Controversial\nCategories: Non-violent Illegal Acts, PII, PII",
            Answer(Severity.CONTROVERSIAL, ("Non-violent Illegal Acts", "PII")),
        ),
        (ABOUT_PROMPT, "Safety: Unsafe\nCategories: None", Answer(Severity.UNSAFE)),
        (ABOUT_PROMPT, "Safety: Safe\nCategories: Violent", Answer(Severity.SAFE)),
        (ABOUT_RESPONSE, "Safety: Safe\nCategories: None\nRefusal: Yes", Answer(Severity.SAFE, refusal=True)),
        (
            ABOUT_RESPONSE,
            "Safety: Unsafe\nCategories: Jailbreak\nRefusal: No",
            Answer(Severity.UNSAFE, ("Jailbreak",), refusal=False),
        ),
        (
            REASONED,
            "Severity: Unsafe\nReason: He asks, twice: why?\nCategory: Refunds to Others, Legal (advice)",
            Answer(Severity.UNSAFE, ("Refunds to Others", "Legal (advice)"), reason="He asks, twice: why?"),
        ),
    ],
)
def test_answers_are_read(form: Form, text: str, answer: Answer) -> None:
    assert form.parse(text) == answer


@pytest.mark.parametrize(
    ("form", "text", "expected"),
    [
        (ABOUT_PROMPT, "", "expected the 2 lines 'Safety:', 'Categories:', got 1"),
        (ABOUT_PROMPT, "Safety: Safe", "expected the 2 lines 'Safety:', 'Categories:', got 1"),
        (ABOUT_PROMPT, "Safety: Safe\nCategories: None\nRefusal: No", "expected the 2 lines"),
        (ABOUT_RESPONSE, "Safety: Safe\nCategories: None", "expected the 3 lines 'Safety:', 'Categories:', 'Refusal:'"),
        (
            ABOUT_PROMPT,
            "Safety: safe\nCategories: None",
            "'Safety: Safe' or 'Safety: Controversial' or 'Safety: Unsafe'",
        ),
        (ABOUT_PROMPT, "Safety:Safe\nCategories: None", "expected a line 'Safety: Safe'"),
        (ABOUT_PROMPT, "I say: Safety: Safe\nCategories: None", "expected a line 'Safety: Safe'"),
        (ABOUT_PROMPT, "Safety: Safely\nCategories: None", "expected a line 'Safety: Safe'"),
        (ABOUT_PROMPT, "Safety: Unsafe\nCategories: Hate", "expected a line 'Categories: None', or names of"),
        (ABOUT_PROMPT, "Safety: Unsafe\nCategories: Violent, None", "expected a line 'Categories: None', or names of"),
        (ABOUT_PROMPT, "Safety: Unsafe\nCategories: Violent, ", "expected a line 'Categories: None', or names of"),
        (ABOUT_PROMPT, "Categories: None\nSafety: Safe", "expected a line 'Safety: Safe'"),
        (ABOUT_RESPONSE, "Safety: Safe\nCategories: None\nRefusal: Maybe", "'Refusal: Yes' or 'Refusal: No'"),
        (REASONED, "Severity: Unsafe\nReason: \nCategory: Refunds", "expected a line 'Reason: ' and an explanation"),
        (REASONED, "Safety: Unsafe\nReason: x\nCategory: Refunds", "expected a line 'Severity: Safe'"),
    ],
)
def test_what_is_not_of_the_form_is_unreadable_and_not_a_verdict(form: Form, text: str, expected: str) -> None:
    with pytest.raises(UnreadableVerdict, match=re.escape(expected)):
        form.parse(text)


def test_errors_do_not_repeat_the_answer() -> None:
    with pytest.raises(UnreadableVerdict) as raised:
        ABOUT_PROMPT.parse("Safety: the canary sings\nCategories: None")
    assert "canary" not in str(raised.value)


@given(case=st.one_of([st.tuples(st.just(form), answers(form)) for form in FORMS[:2]]))
def test_an_answer_says_what_the_official_patterns_find_in_it(case: tuple[Form, str]) -> None:
    form, text = case
    answer = form.parse(text)
    safety, refusal = README_SAFETY.search(text), README_REFUSAL.search(text)
    assert safety is not None
    assert answer.severity.label == safety[1]
    assert answer.refusal == (None if refusal is None else refusal[1] == "Yes")
    named = [name for name in README_CATEGORY.findall(text) if name != "None"]
    assert list(answer.categories) == ([] if answer.severity is Severity.SAFE else list(dict.fromkeys(named)))


@given(case=ANSWERS)
def test_every_beginning_of_an_answer_can_become_one(case: tuple[Form, str]) -> None:
    form, text = case
    assert all(form.can_become(text[:place]) for place in range(len(text) + 1))


@given(case=ANSWERS)
def test_an_answer_is_complete_where_nothing_that_follows_changes_it(case: tuple[Form, str]) -> None:
    form, text = case
    assert form.complete(text + "\n")
    first = next(place for place in range(len(text) + 2) if form.complete((text + "\n")[:place]))
    answer, read = form.parse(text), form.read((text + "\n")[:first])
    assert (read.severity, read.categories, read.refusal) == (answer.severity, answer.categories, answer.refusal)
    assert read.reason == (None if answer.severity is Severity.SAFE else answer.reason)


@given(case=ANSWERS, place=st.integers(0, 90), spoiled=st.characters(codec="ascii"))
def test_one_wrong_letter_is_noticed_at_once(case: tuple[Form, str], place: int, spoiled: str) -> None:
    form, text = case
    place %= len(text)
    ends_reason = text[place] == "\n" and form.lines[text.count("\n", 0, place)].kind is LineKind.REASON
    assume(not ends_reason)  # a reason holds any letter, so one in the place of its end only makes it longer
    wrong = text[:place] + spoiled + text[place + 1 :]
    try:
        form.parse(wrong)
    except UnreadableVerdict:
        assert not (form.can_become(wrong + "\n") and form.complete(wrong + "\n"))
    else:
        assert form.can_become(wrong)


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (ABOUT_PROMPT, "I think"),
        (ABOUT_PROMPT, "Safety: Safer"),
        (ABOUT_PROMPT, "Safety:  "),
        (ABOUT_PROMPT, "Safety: Unsafe\nCategories: Violents"),
        (ABOUT_PROMPT, "Safety: Unsafe\nCategories: Violent,,"),
        (ABOUT_PROMPT, "Safety: Unsafe\nCategories: Violent, None"),
        (ABOUT_PROMPT, "Safety: Unsafe\nCategories: None,"),
        (ABOUT_PROMPT, "Safety: Unsafe\nViolent\n"),
        (ABOUT_RESPONSE, "Safety: Unsafe\nCategories: Violent\nRefusal: Yesterday"),
        (REASONED, "Severity: Unsafe\nReason:\n"),
    ],
)
def test_what_cannot_become_an_answer_is_noticed(form: Form, text: str) -> None:
    assert not form.can_become(text)


@given(case=ANSWERS, place=st.integers(0, 90))
def test_drafts_are_ways_in_which_an_answer_may_go_on(case: tuple[Form, str], place: int) -> None:
    form, text = case
    start = text[: place % (len(text) + 1)]
    for draft in form.drafts(start):
        assert form.can_become(start + draft.before + draft.word + "".join(draft.after))


def test_drafts_name_the_severities_first_and_go_on_to_the_refusal_of_a_safe_response() -> None:
    safe, *others = ABOUT_RESPONSE.drafts("")
    assert safe == Draft(LineKind.SEVERITY, "Safety:", " Safe", ("\nCategories:", " None", "\nRefusal:"), False)
    assert [(draft.word, draft.after, draft.ends) for draft in others] == [
        (" Controversial", (), True),
        (" Unsafe", (), True),
    ]


def test_drafts_name_every_category_after_an_unsafe_answer_and_after_a_comma() -> None:
    first, later = ABOUT_PROMPT.drafts("Safety: Unsafe"), ABOUT_PROMPT.drafts("Safety: Unsafe\nCategories: PII,")
    names = [f" {name}" for name in ABOUT_PROMPT.categories]
    assert [draft.word for draft in first] == [*names, " None"]
    assert [draft.word for draft in later] == names
    assert {draft.before for draft in first} == {"\nCategories:"}
    assert {draft.before for draft in later} == {""}


def test_there_are_no_drafts_within_a_reason() -> None:
    assert [draft.before for draft in REASONED.drafts("Severity: Unsafe")] == ["\nReason:"]
    assert REASONED.drafts("Severity: Unsafe\nReason: because") == ()


def test_the_reason_form_asks_for_its_lines_and_names_its_categories() -> None:
    text = REASONED.prompt(BOMB).text
    assert "<BEGIN UNSAFE CONTENT CATEGORIES>\nRefunds.\nRefunds to Others.\nLegal (advice).\n<END" in text
    assert "'Severity: Safe', 'Severity: Unsafe', 'Severity: Controversial'" in text
    assert "Safety:" not in text
    assert reason_form(Target.RESPONSE).categories == ABOUT_RESPONSE.categories


@pytest.mark.parametrize("names", [["a", "a"], ["a, b"], [""], ["None"], [" a"], ["a\nb"]])
def test_categories_that_a_line_cannot_hold_are_refused(names: list[Any]) -> None:
    with pytest.raises(InputError, match="categories"):
        reason_form(Target.PROMPT, names)
