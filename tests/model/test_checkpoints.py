"""What the config of a checkpoint says about its heads."""

from __future__ import annotations

import pytest

from tidegate.errors import InputError
from tidegate.model.checkpoints import category_order, long_name, risk_order
from tidegate.types import CATEGORIES, PROMPT_CATEGORIES, Severity


def test_risk_ids_are_read_from_the_config_and_not_assumed() -> None:
    config = {"query_risk_level_map": {"2": "Safe", "0": "Unsafe", "1": "Controversial"}}
    assert risk_order(config, "query_risk_level_map") == (Severity.UNSAFE, Severity.CONTROVERSIAL, Severity.SAFE)


@pytest.mark.parametrize(
    "labels",
    [
        None,
        {},
        ["Safe", "Unsafe", "Controversial"],
        {"0": "Safe", "1": "Unsafe"},
        {"0": "Safe", "1": "Unsafe", "2": "Unsafe"},
        {"0": "Safe", "1": "Unsafe", "2": "Nasty"},
        {"0": "Safe", "1": "Unsafe", "3": "Controversial"},
        {"0": "Safe", "1": "Unsafe", "2": 3},
    ],
)
def test_a_risk_map_that_is_not_a_permutation_is_refused_with_its_place(labels: object) -> None:
    with pytest.raises(InputError, match=r"config\.response_risk_level_map"):
        risk_order({"response_risk_level_map": labels}, "response_risk_level_map")


def test_short_names_become_the_official_ones() -> None:
    short = ["Violent", "Sexual Content", "Self-Harm", "Political", "PII", "Copyright", "Illegal Acts", "Unethical"]
    config = {"query_category_map": {str(i): name for i, name in enumerate([*short, "Jailbreak"])}}
    assert category_order(config, "query_category_map") == PROMPT_CATEGORIES
    assert {long_name(name) for name in CATEGORIES} == set(CATEGORIES)


def test_a_category_named_twice_is_refused() -> None:
    labels = {"0": "Self-Harm", "1": "Suicide & Self-Harm"}
    with pytest.raises(InputError, match="twice"):
        category_order({"query_category_map": labels}, "query_category_map")
