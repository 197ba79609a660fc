"""The synthetic examples: paired twins, held-out fillers, labels that fit, the same for the same seed."""

from __future__ import annotations

import re
from collections import Counter, defaultdict

import pytest

from tidegate.data import synthesize as module
from tidegate.data.synthesize import FAMILIES, LANGUAGES, families, synthesize
from tidegate.types import CATEGORIES, PROMPT_CATEGORIES, RESPONSE_CATEGORIES, Example, Severity, Target

PER_FAMILY = 60


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return list(synthesize(7, PER_FAMILY))


def _text(example: Example) -> str:
    return "\n".join(turn.content for turn in example.conversation.turns)


def test_same_arguments_give_the_same_examples(examples: list[Example]) -> None:
    again = synthesize(7, PER_FAMILY)
    assert all(a == b for a, b in zip(examples, again, strict=True))


def test_another_seed_gives_other_sentences(examples: list[Example]) -> None:
    others = {_text(e) for e in synthesize(8, PER_FAMILY)}
    assert len(others & {_text(e) for e in examples}) < 0.1 * len(examples)


def test_nothing_is_asked_and_nothing_is_given() -> None:
    assert list(synthesize(1, 0)) == []


def test_a_negative_count_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least 0"):
        list(synthesize(1, -1))


def test_every_family_of_every_language_gives_its_share(examples: list[Example]) -> None:
    counts = Counter((e.extra["family"], e.language) for e in examples)
    assert {(f.name, f.language) for f in families()} == set(counts)
    assert set(counts.values()) == {PER_FAMILY}


def test_prompt_families_exist_in_every_language() -> None:
    covered = {(f.name, f.language) for f in families()}
    for language in LANGUAGES:
        for name in ("hate", "violent", "illegal"):
            assert (name, language) in covered


def test_twins_are_balanced_in_every_family(examples: list[Example]) -> None:
    twins: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for e in examples:
        twins[e.extra["family"], e.language][e.extra["twin"]] += 1
    assert all(c["harmful"] == c["benign"] for c in twins.values())


def test_ids_and_texts_are_distinct(examples: list[Example]) -> None:
    assert len({e.id for e in examples}) == len(examples)
    assert len({_text(e) for e in examples}) > 0.99 * len(examples)


def test_labels_fit_the_twin_and_the_target(examples: list[Example]) -> None:
    for e in examples:
        assert e.target is e.conversation.target is FAMILIES[e.extra["family"]][0]
        allowed = PROMPT_CATEGORIES if e.target is Target.PROMPT else RESPONSE_CATEGORIES
        assert set(e.categories) <= set(allowed)
        assert (e.severity is Severity.SAFE) == (not e.categories)
        if e.extra["twin"] == "harmful":
            assert e.severity is not Severity.SAFE
        assert (e.refusal is None) == (e.target is Target.PROMPT)
        if e.refusal:
            assert e.severity is Severity.SAFE
        assert e.licence == "Apache-2.0"
        assert e.source == "tidegate/synthesize"


def test_every_category_is_covered_in_english(examples: list[Example]) -> None:
    assert {c for e in examples if e.language == "en" for c in e.categories} == set(CATEGORIES)


def test_no_slot_or_alternative_is_left_open(examples: list[Example]) -> None:
    open_slot = re.compile(r"\{[a-z_.]+\}|\[[^\[\]]*\|[^\[\]]*\]|  |\.\.\.\.")
    assert [_text(e) for e in examples if open_slot.search(_text(e))] == []


def test_onset_is_where_the_answer_turns(examples: list[Example]) -> None:
    turning = [e for e in examples if "onset" in e.extra]
    assert turning
    for e in turning:
        answer = e.conversation.turns[-1].content
        assert e.severity is Severity.UNSAFE
        assert 0 < e.extra["onset"] < len(answer)
        assert not answer[e.extra["onset"]].isspace()


def test_about_one_in_twentyfive_is_dev(examples: list[Example]) -> None:
    share = sum(e.split == "dev" for e in examples) / len(examples)
    assert 0.02 < share < 0.06
    assert {e.split for e in examples} == {"train", "dev"}


def test_train_sentences_never_use_held_out_fillers() -> None:
    held = module._held_out("work", module._grammar("en")["work"])
    assert held
    copyright_only = [e for e in synthesize(3, 300) if e.extra["family"] == "copyright" and e.language == "en"]
    for e in copyright_only:
        used = any(filler in _text(e).lower() for filler in held)
        assert not (used and e.split == "train")


@pytest.mark.parametrize("language", LANGUAGES)
def test_grammars_name_only_sections_that_exist(language: str) -> None:
    grammar = module._grammar(language)
    given = {"x", "s", "vp", "task"}
    named = {slot for entries in grammar.values() for e in entries for slot in re.findall(r"\{([^{}]*)\}", e)}
    assert named - given <= set(grammar)
    for name, entries in grammar.items():
        assert entries, f"@{name} is empty"
        for entry in entries:
            assert entry.count("[") == entry.count("]")
            if name in {"ask", "about", "resp.yes"}:
                assert "{vp}" in entry


@pytest.mark.parametrize("language", LANGUAGES)
def test_twins_share_words(language: str) -> None:
    """Hate sentences are put over groups and over things alike, so most of their words say nothing."""
    grammar = module._grammar(language)
    assert all("{x}" in entry for name in ("hate.s", "hate.threat") for entry in grammar[name])
    assert not set(grammar["grp"]) & set(grammar["thing"])


@pytest.mark.parametrize("language", LANGUAGES)
def test_pairs_name_a_topic_and_hold_both_answers(language: str) -> None:
    grammar = module._grammar(language)
    assert grammar["talk"]
    assert all("{x}" in e for kind in "hb" for e in grammar[f"group.{kind}"])
    for entry in (*grammar["talk"], *grammar.get("info", ())):
        topic, _, rest = entry.partition(": ")
        parts = rest.split(" >> ")
        assert topic in module._PAIR_TOPICS
        assert len(parts) == 3
        assert not parts[2].startswith("! ")


def test_pairs_answer_the_same_prompts_both_ways() -> None:
    rows = [e for e in synthesize(5, 60) if e.extra["family"] in {"response.info", "response.talk"}]
    assert {e.severity for e in rows} == {Severity.SAFE, Severity.UNSAFE}
    assert any("\n" in e.conversation.turns[-1].content for e in rows)
    assert not any(">>" in _text(e) or e.conversation.turns[-1].content.startswith("!") for e in rows)
