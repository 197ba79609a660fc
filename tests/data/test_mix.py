"""The draw is balanced as the plan says, repeatable, and what it composes is labelled as what it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from tidegate.data.mix import Drawn, Mix, MixPlan, lane_of, language_group
from tidegate.types import Conversation, Example, Role, Severity, Target

SAFE, CONTROVERSIAL, UNSAFE = Severity.SAFE, Severity.CONTROVERSIAL, Severity.UNSAFE
PLAIN: Mapping[str, Any] = {"compose": 0.0, "disguise": 0.0, "transfer": 0.0, "drop_context": 0.0}


def example(
    text: str,
    severity: Severity | None,
    *,
    response: bool = False,
    language: str = "en",
    source: str = "org/set",
    **extra: Any,
) -> Example:
    conversation = Conversation.of("the question", text) if response else Conversation.of(text)
    return Example(text, conversation, conversation.target, severity, language=language, source=source, extra=extra)


def group(name: str, count: int, severity: Severity, **about: Any) -> list[Example]:
    return [example(f"{name} {n} says this here", severity, **about) for n in range(count)]


def texts(mix: Mix, count: int) -> list[str]:
    return [mix.draw().text for _ in range(count)]


def test_the_same_seed_gives_the_same_draws_and_another_gives_others() -> None:
    rows = [*group("s", 20, SAFE), *group("u", 20, UNSAFE), *group("r", 20, SAFE, response=True)]
    plan = MixPlan({"prompt-en": 1, "response-en": 1}, compose=0.5, disguise=0.5)
    first, again, other = (Mix(rows, plan, seed) for seed in (1, 1, 2))
    drawn = [first.draw() for _ in range(200)]
    assert drawn == [again.draw() for _ in range(200)]
    assert drawn != [other.draw() for _ in range(200)]


def test_lanes_and_severities_are_drawn_by_their_shares() -> None:
    rows = [*group("s", 9, SAFE), *group("u", 900, UNSAFE), *group("zh", 5, SAFE, language="zh-Hant")]
    mix = Mix(
        rows, MixPlan({"prompt-en": 3, "prompt-zh": 1, "prompt-other": 0}, severities=(0.6, 0.1, 0.3), **PLAIN), 0
    )
    counted = Counter(text.split()[0] for text in texts(mix, 6000))
    assert counted["zh"] / 6000 == pytest.approx(0.25, abs=0.03)
    assert counted["s"] / 6000 == pytest.approx(0.75 * 2 / 3, abs=0.03)
    assert counted["u"] / 6000 == pytest.approx(0.75 / 3, abs=0.03)


def test_sources_weigh_by_a_power_of_their_size_times_their_trust() -> None:
    rows = [
        *group("big", 160, SAFE, source="a/big", trust="high"),
        *group("small", 10, SAFE, source="b/small", trust="high"),
        *group("doubtful", 160, SAFE, source="c/doubtful", trust="low"),
    ]
    plan = MixPlan({"prompt-en": 1}, balance=0.5, trust={"high": 1.0, "low": 0.25}, **PLAIN)
    mix = Mix(rows, plan, 0)
    counted = Counter(text.split()[0] for text in texts(mix, 6000))
    whole = 160**0.5 + 10**0.5 + 0.25 * 160**0.5
    assert counted["big"] / 6000 == pytest.approx(160**0.5 / whole, abs=0.03)
    assert counted["small"] / 6000 == pytest.approx(10**0.5 / whole, abs=0.03)
    assert mix.draw().weight in (1.0, 0.25)


def test_every_row_of_a_source_comes_once_before_any_comes_again() -> None:
    mix = Mix(group("s", 30, SAFE), MixPlan({"prompt-en": 1}, **PLAIN), 0)
    for _ in range(3):
        assert len(set(texts(mix, 30))) == 30


def test_rows_without_label_are_left_out() -> None:
    rows = [*group("s", 3, SAFE), example("bare", None)]
    assert "bare" not in texts(Mix(rows, MixPlan({"prompt-en": 1}, **PLAIN), 0), 50)


def test_a_lane_without_examples_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'response-zh'"):
        Mix(group("s", 3, SAFE), MixPlan({"prompt-en": 1, "response-zh": 0.1}), 0)


def test_an_answer_comes_with_the_prompt_before_it_unless_it_is_dropped() -> None:
    rows = group("answer", 5, SAFE, response=True)
    kept = Mix(rows, MixPlan({"response-en": 1}, **PLAIN), 0).draw()
    assert (kept.target, kept.role, kept.context) == (Target.RESPONSE, Role.ASSISTANT, "the question")
    dropped = Mix(rows, MixPlan({"response-en": 1}, **{**PLAIN, "drop_context": 1.0}), 0).draw()
    assert dropped.context == ""


def test_posts_of_the_named_sources_are_also_shown_as_answers() -> None:
    rows = [*group("post", 5, UNSAFE, source="a/posts"), *group("ask", 5, UNSAFE, source="b/questions")]
    plan = MixPlan({"prompt-en": 1}, transfer_sources=("a/posts",), **{**PLAIN, "transfer": 1.0})
    mix = Mix(rows, plan, 0)
    for drawn in (mix.draw() for _ in range(60)):
        expected = Target.RESPONSE if drawn.text.startswith("post") else Target.PROMPT
        assert drawn.target is expected
        assert drawn.role is (Role.ASSISTANT if expected is Target.RESPONSE else Role.USER)


def composed(rows: list[Example], lane: str = "response-en", **plan: Any) -> list[Drawn]:
    mix = Mix(rows, MixPlan({lane: 1}, **{**PLAIN, "compose": 1.0, **plan}), 0)
    return [mix.draw() for _ in range(200)]


@pytest.mark.parametrize("disguise", [0.0, 1.0])
def test_a_composed_answer_turns_where_its_onset_says(disguise: float) -> None:
    rows = [*group("calm", 20, SAFE, response=True), *group("HARM", 20, UNSAFE, response=True)]
    for drawn in composed(rows, disguise=disguise):
        assert drawn.known_onset
        assert 0 < drawn.onset < len(drawn.text)
        if disguise:
            continue
        head, tail = drawn.text[: drawn.onset], drawn.text[drawn.onset :]
        assert head.startswith("calm")
        assert head.endswith((" ", "\n"))
        assert tail.startswith("HARM" if drawn.severity is UNSAFE else "calm")


def test_an_onset_that_the_example_names_moves_with_what_is_put_before_it() -> None:
    text = "quiet start. then HARM"
    rows = [example(text, UNSAFE, response=True, onset=text.index("HARM")), *group("calm", 9, SAFE, response=True)]
    harmful = [drawn for drawn in composed(rows) if drawn.severity is UNSAFE]
    assert harmful
    assert all(drawn.text[drawn.onset :] == "HARM" for drawn in harmful)


def test_without_composition_an_onset_is_known_only_when_the_example_names_it() -> None:
    rows = [example("bare", UNSAFE, response=True), example("so HARM", UNSAFE, response=True, onset=3)]
    mix = Mix(rows, MixPlan({"response-en": 1}, **PLAIN), 0)
    assert {(d.text, d.known_onset, d.onset) for d in (mix.draw() for _ in range(20))} == {
        ("bare", False, 0),
        ("so HARM", True, 3),
    }


def test_prompts_are_never_composed() -> None:
    rows = [*group("s", 5, SAFE), *group("u", 5, UNSAFE)]
    assert all(not drawn.known_onset for drawn in composed(rows, "prompt-en"))


def test_the_beginning_of_a_long_text_is_short_and_ends_at_a_word() -> None:
    sentence = "one two three four five six seven. "
    rows = [example(sentence * 40, SAFE, response=True), *group("HARM", 5, UNSAFE, response=True)]
    for drawn in composed(rows):
        head = drawn.text[: drawn.onset].rstrip()
        assert len(head) <= 300
        assert (sentence * 40).startswith(head)
        assert (sentence * 40)[len(head)] in " "


def test_synthetic_examples_have_a_lane_of_their_own() -> None:
    assert lane_of(example("x", SAFE, source="tidegate/synthesize", language="de")) == "synthetic"
    assert lane_of(example("x", SAFE, language="de")) == "prompt-other"
    assert lane_of(example("x", SAFE, response=True, language="zh")) == "response-zh"


@pytest.mark.parametrize(("tag", "name"), [("en-GB", "en"), ("zh-Hant", "zh"), ("ur-Latn", "other"), ("", "other")])
def test_languages_fall_into_three_groups(tag: str, name: str) -> None:
    assert language_group(tag) == name


def test_shares_need_not_add_up_to_one() -> None:
    rows = [*group("s", 5, SAFE), *group("zh", 5, SAFE, language="zh")]
    twice = MixPlan({"prompt-en": 2, "prompt-zh": 6}, **PLAIN)
    once = MixPlan({"prompt-en": 0.25, "prompt-zh": 0.75}, **PLAIN)
    assert texts(Mix(rows, twice, 3), 50) == texts(Mix(rows, once, 3), 50)
    assert np.isclose(sum(Counter(texts(Mix(rows, once, 3), 50)).values()), 50)
