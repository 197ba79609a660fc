"""Targets say at every token what the label allows to say, and packing loses and mixes nothing."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_folder import tiny_tokenizer
from tidegate.data.mix import Drawn, Mix, MixPlan
from tidegate.model.tokens import CONTROL_TOKENS, TextTokenizer
from tidegate.train.args import LossPart, TemplatePart
from tidegate.train.batches import RISK_ID, Packed, encode, pack, packed_batches, to_batch
from tidegate.types import PROMPT_CATEGORIES, RESPONSE_CATEGORIES, Conversation, Example, Role, Severity, Target

TOKENS = TextTokenizer(tiny_tokenizer())
END, MORE, USER, ASSISTANT, SYSTEM = (
    TOKENS.control[name] for name in ("<|end|>", "<|more|>", "<|user|>", "<|assistant|>", "<|system|>")
)
TEMPLATE = TemplatePart(window=64, overlap=8, context=12)
LOSS = LossPart(ramp=1.5, prefix=0.3)
SAFE, CONTROVERSIAL, UNSAFE = Severity.SAFE, Severity.CONTROVERSIAL, Severity.UNSAFE


def drawn(text: str, severity: Severity = SAFE, *, prompt: bool = False, **about: Any) -> Drawn:
    fields: dict[str, Any] = {
        "target": Target.PROMPT if prompt else Target.RESPONSE,
        "role": Role.USER if prompt else Role.ASSISTANT,
        "context": "",
        "categories": (),
        "onset": 0,
        "known_onset": False,
        "weight": 1.0,
    }
    return Drawn(text=text, severity=severity, **{**fields, **about})


def coded(one: Drawn, start: float = 0.0, template: TemplatePart = TEMPLATE) -> Packed:
    return encode(one, TOKENS, template, LOSS, start)


def ids_of(text: str) -> list[int]:
    return [token.id for token in TOKENS.encode(text)]


# --- what the model sees


def test_a_prompt_is_role_text_end() -> None:
    assert coded(drawn("bake bread", prompt=True)).ids == [USER, *ids_of("bake bread"), END]
    assert coded(drawn("be kind", prompt=True, role=Role.SYSTEM)).ids[0] == SYSTEM


def test_an_answer_stands_behind_the_prompt_it_answers() -> None:
    found = coded(drawn("with flour", context="bake bread"))
    assert found.ids == [USER, *ids_of("bake bread"), END, ASSISTANT, *ids_of("with flour"), END]


def test_of_a_long_context_the_beginning_and_the_end_are_kept() -> None:
    context = " ".join(f"word{n}" for n in range(40))
    ids = ids_of(context)
    found = coded(drawn("yes", context=context)).ids
    half = TEMPLATE.context // 2
    assert found[: TEMPLATE.context + 3] == [USER, *ids[:half], MORE, *ids[-half:], END]


@given(st.integers(0, 300), st.booleans(), st.floats(0, 1))
def test_no_text_is_longer_than_the_window_and_every_text_ends_closed(length: int, context: bool, start: float) -> None:
    text = " ".join("abcdefg"[n % 7] * (1 + n % 4) for n in range(length))
    found = coded(drawn(text, UNSAFE, context="some question here " * 9 if context else ""), start)
    assert len(found.ids) <= TEMPLATE.window
    assert found.ids[-1] == END
    assert len(found.ids) == len(found.label) == len(found.risk_weight) == len(found.query_weight)


def test_a_cut_text_says_that_something_is_missing_and_covers_all_of_it_over_the_starts() -> None:
    text = " ".join(f"word{n}" for n in range(60))
    ids = ids_of(text)
    seen: set[int] = set()
    for start in np.linspace(0, 1, 30):
        found = coded(drawn(text), float(start)).ids
        body = found[2:-1] if found[1] == MORE else found[1:-1]
        place = next(n for n in range(len(ids)) if ids[n : n + len(body)] == body)
        seen |= set(range(place, place + len(body)))
        assert (found[1] == MORE) == (place > 0)
    assert seen >= set(range(len(ids) - 1))


# --- what is asked of it


def test_a_safe_answer_is_safe_at_each_token_and_judged_whole_at_its_end() -> None:
    found = coded(drawn("with flour and water"))
    count = len(found.ids) - 2
    assert set(found.label) == {RISK_ID[SAFE]}
    assert found.risk_weight[1:-1] == pytest.approx(np.full(count, 1 / count))
    assert (found.risk_weight[0], found.risk_weight[-1]) == (0.0, 1.0)
    assert not found.query_weight.any()


@pytest.mark.parametrize("severity", [CONTROVERSIAL, UNSAFE])
def test_the_weight_of_a_label_without_onset_grows_over_the_answer(severity: Severity) -> None:
    found = coded(drawn("first some words and then the others", severity))
    inner = found.risk_weight[1:-1]
    assert set(found.label) == {RISK_ID[severity]}
    assert (np.diff(inner) > 0).all()
    assert inner[-1] == pytest.approx(1 / len(inner))
    assert inner[0] == pytest.approx((1 / len(inner)) ** LOSS.ramp / len(inner))


def test_before_a_known_onset_tokens_are_safe_with_full_weight_and_after_it_the_label_sets_in() -> None:
    text = "first some calm words and then the harm of it all and more of it"
    onset = text.index(" the harm")
    found = coded(drawn(text, UNSAFE, onset=onset, known_onset=True))
    tokens = TOKENS.encode(text)
    before = np.asarray([token.end <= onset for token in tokens])
    inner, label = found.risk_weight[1:-1] * len(tokens), found.label[1:-1]
    assert before.any()
    assert not before.all()
    assert (label[before] == RISK_ID[SAFE]).all()
    assert (label[~before] == RISK_ID[UNSAFE]).all()
    assert inner[before] == pytest.approx(np.ones(before.sum()))
    assert (np.diff(inner[~before]) >= 0).all()
    assert inner[-1] == pytest.approx(1.0)
    assert found.label[-1] == RISK_ID[UNSAFE]


def test_an_answer_cut_before_its_onset_is_safe_as_far_as_it_is_seen() -> None:
    calm = " ".join(f"word{n}" for n in range(60))
    found = coded(drawn(calm + " harm", UNSAFE, onset=len(calm), known_onset=True), start=1.0)
    assert set(found.label) == {RISK_ID[SAFE]}


def test_a_safe_answer_stays_safe_over_its_seam() -> None:
    found = coded(drawn("one text. another text", SAFE, onset=10, known_onset=True))
    assert set(found.label) == {RISK_ID[SAFE]}
    assert len(set(found.risk_weight[1:-1].tolist())) == 1


def test_a_prompt_is_judged_at_its_end_and_a_little_before() -> None:
    found = coded(drawn("how do people bake bread", UNSAFE, prompt=True))
    assert found.query_weight[-1] == 1.0
    assert 0 < found.query_weight[1:-1].sum() < LOSS.prefix
    assert (np.diff(found.query_weight[1:-1]) > 0).all()
    assert not found.risk_weight.any()


@given(st.sampled_from(list(Severity)), st.booleans(), st.floats(0.1, 1.0))
def test_the_weight_of_an_example_scales_all_of_its_targets(severity: Severity, prompt: bool, weight: float) -> None:
    whole = coded(drawn("some words here", severity, prompt=prompt))
    part = coded(drawn("some words here", severity, prompt=prompt, weight=weight))
    assert part.risk_weight == pytest.approx(whole.risk_weight * weight)
    assert part.query_weight == pytest.approx(whole.query_weight * weight)


def test_an_empty_text_is_judged_at_its_end_alone() -> None:
    found = coded(drawn("", UNSAFE))
    assert found.ids == [ASSISTANT, END]
    assert found.risk_weight.tolist() == [0.0, 1.0]


def test_categories_share_the_target_and_unknown_ones_ask_for_nothing() -> None:
    two = coded(drawn("x", UNSAFE, categories=("Violent", "PII")))
    assert two.categories[RESPONSE_CATEGORIES.index("Violent")] == 0.5
    assert two.categories[RESPONSE_CATEGORIES.index("PII")] == 0.5
    assert two.categories.sum() == 1.0
    jailbreak = coded(drawn("x", UNSAFE, prompt=True, categories=("Jailbreak",)))
    assert jailbreak.categories[PROMPT_CATEGORIES.index("Jailbreak")] == 1.0
    for nothing in (
        drawn("x", UNSAFE),
        drawn("x", SAFE, categories=("Violent",)),
        drawn("x", UNSAFE, categories=("Jailbreak",)),
        drawn("x", UNSAFE, categories=("House rules",)),
    ):
        assert not coded(nothing).categories.any()


# --- packing


def packed_text(length: int, mark: int = 5) -> Packed:
    ones = np.ones(length, np.float32)
    return Packed([mark] * length, np.ones(length, np.int64), ones, 0 * ones, np.zeros(9, np.float32))


@given(st.lists(st.integers(1, 64), max_size=60))
def test_packing_keeps_every_text_whole_and_no_row_longer_than_the_window(lengths: list[int]) -> None:
    given_texts = [packed_text(length, n) for n, length in enumerate(lengths)]
    rows = pack(given_texts, 64)
    assert all(sum(len(text.ids) for text in row) <= 64 for row in rows)
    assert sorted(text.ids[0] for row in rows for text in row) == list(range(len(lengths)))
    assert len(rows) <= 2 * sum(lengths) / 64 + 1


def test_a_batch_lays_texts_one_after_the_other_each_from_position_nothing() -> None:
    found = to_batch([[packed_text(3, 7), packed_text(2, 8)], [packed_text(4, 9)]], 6)
    assert found.ids.tolist() == [[7, 7, 7, 8, 8, 0], [9, 9, 9, 9, 0, 0]]
    assert found.positions.tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 0]]
    assert found.segments.tolist() == [[0, 0, 0, 1, 1, -1], [0, 0, 0, 0, -1, -1]]
    assert found.risk_weight.tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0]]
    assert found.texts == 3


def mix() -> Mix:
    rows = [
        Example(
            str(n), Conversation.of(f"question {n}", f"answer {n} " * (1 + n % 9)), Target.RESPONSE, Severity(n % 3)
        )
        for n in range(30)
    ]
    return Mix(rows, MixPlan({"response-other": 1}), 1)


def test_batches_are_the_same_for_the_same_seed() -> None:
    def some() -> list[bytes]:
        batches = packed_batches(mix(), TOKENS, TEMPLATE, LOSS, rows=4, seed=2, pool=40)
        return [batch.ids.tobytes() + batch.risk_weight.tobytes() for batch in itertools.islice(batches, 12)]

    assert some() == some()


def test_no_drawn_text_is_lost_between_pools() -> None:
    batches = packed_batches(mix(), TOKENS, TEMPLATE, LOSS, rows=7, seed=2, pool=25)
    taken = list(itertools.islice(batches, 20))
    assert all(batch.ids.shape == (7, TEMPLATE.window) for batch in taken)
    texts = sum(batch.texts for batch in taken)
    again = mix()
    rows = sum(len(pack([coded(again.draw()) for _ in range(25)], TEMPLATE.window)) for _ in range(texts // 25))
    assert abs(rows - 7 * 20) <= 14


def test_a_share_of_the_tokens_of_text_is_hidden_and_no_control_token() -> None:
    def ids(share: float) -> np.ndarray:
        batches = packed_batches(mix(), TOKENS, TEMPLATE, LOSS, rows=4, seed=2, drop_tokens=share, pool=40)
        return next(batches).ids

    seen, thinned = ids(0.0), ids(0.25)
    text = seen >= len(CONTROL_TOKENS)
    assert (thinned[~text] == seen[~text]).all()
    hidden = thinned[text] != seen[text]
    assert set(thinned[text][hidden].tolist()) == {TOKENS.control["<|pad|>"]}
    assert 0.15 < hidden.mean() < 0.35
