"""Thresholds of a cascade: the cheapest for an agreement, the best for a cost, against trying all of them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.errors import InputError
from tidegate.evals.run import Judged, judge_all
from tidegate.evals.thresholds import find_options, find_thresholds, measure_cascade
from tidegate.guards.cascade import AskBetween, AskOptions, CascadeConfig, CascadeGuard
from tidegate.testing import FakeGuard, FakeStreamGuard
from tidegate.types import Conversation, Example, Probabilities, Severity, Target, Verdict

CALLS = {"s": Severity.SAFE, "c": Severity.CONTROVERSIAL, "u": Severity.UNSAFE}


def said(flagged: float, call: str | None = None, target: Target = Target.PROMPT) -> Verdict:
    severity = CALLS[call] if call else (Severity.UNSAFE if flagged >= 0.5 else Severity.SAFE)
    return Verdict(target, severity, Probabilities(1 - flagged, 0.0, flagged))


def pairs_of(*rows: tuple[float, str]) -> list[tuple[Verdict, Verdict]]:
    """The first guard's probability, and the second guard's call."""
    return [(said(flagged), said(0.5, call)) for flagged, call in rows]


def cost_and_agreement(pairs: Sequence[tuple[Verdict, Verdict]], between: AskBetween) -> tuple[int, int]:
    """How many rows are asked about, and on how many the cascade says what the second guard says."""
    asked = [between.low <= one.probabilities.flagged <= between.high for one, _ in pairs]
    same = [
        ask or (one.severity > Severity.SAFE) == (two.severity > Severity.SAFE)
        for ask, (one, two) in zip(asked, pairs, strict=True)
    ]
    return sum(asked), sum(same)


CLEAR = pairs_of((0.01, "s"), (0.1, "s"), (0.3, "u"), (0.4, "s"), (0.6, "s"), (0.7, "u"), (0.9, "u"), (0.99, "u"))
"""The guards disagree at 0.3 and at 0.6."""


def test_the_cheapest_thresholds_for_full_agreement_enclose_every_disagreement() -> None:
    between = find_thresholds(CLEAR, agreement=1.0)

    assert cost_and_agreement(CLEAR, between) == (3, 8)
    assert (between.low, between.high) == (pytest.approx(0.2), pytest.approx(0.65))


def test_less_agreement_costs_less() -> None:
    assert cost_and_agreement(CLEAR, find_thresholds(CLEAR, agreement=7 / 8)) == (1, 7)
    assert cost_and_agreement(CLEAR, find_thresholds(CLEAR, agreement=6 / 8)) == (0, 6)


def test_the_best_agreement_for_a_cost() -> None:
    assert cost_and_agreement(CLEAR, find_thresholds(CLEAR, most_asked=1.0)) == (3, 8)
    assert cost_and_agreement(CLEAR, find_thresholds(CLEAR, most_asked=0.25)) == (1, 7)
    assert cost_and_agreement(CLEAR, find_thresholds(CLEAR, most_asked=0.0)) == (0, 6)


def test_an_agreement_that_costs_too_much_is_refused_with_what_can_be_had() -> None:
    with pytest.raises(InputError, match=r"asks about 37\.5% of the rows; with at most 25\.0% it is 0\.8750"):
        find_thresholds(CLEAR, agreement=1.0, most_asked=0.25)

    assert find_thresholds(CLEAR, agreement=1.0, most_asked=0.5) == find_thresholds(CLEAR, agreement=1.0)


def test_only_unsafe_counts_when_the_bar_is_there() -> None:
    pairs = pairs_of((0.1, "c"), (0.4, "s"), (0.9, "u"))

    assert cost_and_agreement(pairs, find_thresholds(pairs, agreement=1.0)) == (1, 3)
    assert cost_and_agreement(pairs, find_thresholds(pairs, agreement=1.0, bar=Severity.UNSAFE))[0] == 0


def test_disagreements_at_both_ends_are_enclosed_up_to_the_ends() -> None:
    pairs = pairs_of((0.0, "u"), (0.5, "u"), (1.0, "s"))

    assert find_thresholds(pairs, agreement=1.0) == AskBetween(low=0.0, high=1.0)


ROWS = st.lists(
    st.tuples(st.sampled_from([0.0, 0.1, 0.25, 0.26, 0.5, 0.75, 0.9, 1.0]), st.sampled_from("scu")),
    min_size=1,
    max_size=14,
)


@given(ROWS, st.sampled_from([0.5, 0.7, 0.8, 0.9, 1.0]), st.sampled_from([0.0, 0.2, 0.4, 1.0]))
def test_no_other_thresholds_are_cheaper_or_agree_more(
    rows: list[tuple[float, str]], agreement: float, most_asked: float
) -> None:
    """All pairs of probabilities that occur, and asking nobody, are tried as well."""
    pairs = pairs_of(*rows)
    values = sorted({row[0] for row in rows})
    tried = [AskBetween(low=a, high=b) for a, b in itertools.combinations_with_replacement(values, 2)]
    results = [cost_and_agreement(pairs, between) for between in tried]
    nobody = sum((one.severity > Severity.SAFE) == (two.severity > Severity.SAFE) for one, two in pairs)
    results.append((0, nobody))

    cheapest = cost_and_agreement(pairs, find_thresholds(pairs, agreement=agreement))
    best = cost_and_agreement(pairs, find_thresholds(pairs, most_asked=most_asked))

    need = agreement * len(pairs) - 1e-6
    assert cheapest[1] >= need
    assert cheapest[0] == min(asked for asked, same in results if same >= need)
    within = [(same, -asked) for asked, same in results if asked <= most_asked * len(pairs) + 1e-6]
    assert (best[1], -best[0]) == max(within)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "expected an agreement, a cost, or both"),
        ({"agreement": 0.0}, "greater than 0"),
        ({"agreement": 1.1}, "at most 1"),
        ({"most_asked": -0.1}, "from 0 to 1"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(options: dict[str, float], said: str) -> None:
    with pytest.raises(InputError, match=said):
        find_thresholds(CLEAR, **options)


def test_no_rows_are_refused() -> None:
    with pytest.raises(InputError, match="no rows"):
        find_thresholds([], agreement=0.9)


# --- rows as `judge_all` gives them -------------------------------------------------------------------------------


def judged(number: int, verdict: Verdict | None, target: Target = Target.PROMPT) -> Judged:
    conversation = Conversation.of("a", None if target is Target.PROMPT else "b")
    return Judged(Example(str(number), conversation, target, Severity.SAFE), verdict)


def made_rows(seed: int, count: int = 400) -> tuple[list[Judged], list[Judged]]:
    """Two guards that see the same hidden harm, the first through more noise."""
    luck = random.Random(seed)
    first, second = [], []
    for number in range(count):
        harm = luck.random()
        target = luck.choice(list(Target))
        noise = 0.1 if target is Target.PROMPT else 0.25
        first.append(judged(number, said(min(1.0, max(0.0, harm + luck.gauss(0, noise))), None, target), target))
        second.append(judged(number, said(harm, None, target), target))
    return first, second


def test_options_for_both_targets_hold_on_other_rows_about_as_well() -> None:
    options = find_options(*made_rows(1), agreement=0.97)

    found = measure_cascade(*made_rows(1), options)
    other = measure_cascade(*made_rows(2), options)

    assert found.agreement >= 0.97
    assert other.agreement >= 0.94 > other.first_agreement
    assert 0 < found.asked < 0.6
    assert options.prompt.high - options.prompt.low < options.response.high - options.response.low
    assert found.agreement == pytest.approx(1 - found.missed - found.false_alarms)


def test_rows_that_a_guard_did_not_judge_are_counted_and_left_out() -> None:
    first, second = made_rows(3, 20)
    first[0] = judged(0, None, first[0].example.target)
    second[1] = judged(1, None, second[1].example.target)

    figures = measure_cascade(first, second, AskOptions(prompt=AskBetween(low=0, high=1)))

    assert (figures.rows, figures.not_judged) == (18, 2)


def test_a_target_without_rows_is_named() -> None:
    rows = [judged(n, said(0.5)) for n in range(3)]

    with pytest.raises(InputError, match="response rows: there are no rows"):
        find_options(rows, rows, agreement=0.9)


def test_rows_of_different_examples_are_refused() -> None:
    first, second = made_rows(1, 5)

    with pytest.raises(InputError, match="same examples"):
        measure_cascade(first, second[::-1], AskOptions())
    with pytest.raises(InputError, match="no row"):
        measure_cascade([], [], AskOptions())


async def test_the_figures_are_those_of_the_cascade_itself() -> None:
    """What `measure_cascade` says in advance is what a cascade of the two guards does with the same texts."""
    texts = ["a knife", "a bomb", "bread", "knife and bomb", "poison"]
    examples = [Example(text, Conversation.of(text), Target.PROMPT, Severity.SAFE) for text in texts]
    first = FakeStreamGuard()
    second = FakeGuard(unsafe={"poison": "Violent", "bomb": "Violent"}, controversial={})
    options = AskOptions(prompt=AskBetween(low=0.5, high=0.95))
    cascade = CascadeGuard(first, second, CascadeConfig(first="edge", second="edge", ask=options))

    alone = [await judge_all(guard, examples) for guard in (first, second)]
    figures = measure_cascade(*alone, options)
    together = await judge_all(cascade, examples)

    calls = [row.verdict.severity > Severity.SAFE for row in together if row.verdict]
    strong = [row.verdict.severity > Severity.SAFE for row in alone[1] if row.verdict]
    assert figures.asked == cascade.counts.asked / 5 == 0.2
    assert figures.agreement == sum(a == b for a, b in zip(calls, strong, strict=True)) / 5 == 0.8
    assert figures.missed == 0.2
