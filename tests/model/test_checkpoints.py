"""What the config of a checkpoint says about its heads."""

from __future__ import annotations

import pytest

from tidegate.errors import InputError
from tidegate.model.checkpoints import category_order, head_labels, long_name, risk_order
from tidegate.types import CATEGORIES, PROMPT_CATEGORIES, RESPONSE_CATEGORIES, Severity


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


def official_maps() -> dict[str, dict[str, str]]:
    risk = {"0": "Safe", "1": "Unsafe", "2": "Controversial"}
    short = ["Violent", "Sexual Content", "Self-Harm", "Political", "PII", "Copyright", "Illegal Acts", "Unethical"]
    return {
        "response_risk_level_map": risk,
        "query_risk_level_map": risk,
        "response_category_map": {str(i): name for i, name in enumerate(short)},
        "query_category_map": {str(i): name for i, name in enumerate([*short, "Jailbreak"])},
    }


def test_the_official_maps_say_what_each_id_means() -> None:
    labels = head_labels(official_maps())
    assert labels.risk == labels.query_risk == (Severity.SAFE, Severity.UNSAFE, Severity.CONTROVERSIAL)
    assert labels.category == RESPONSE_CATEGORIES
    assert labels.query_category == PROMPT_CATEGORIES


@pytest.mark.parametrize("field", ["response_category_map", "query_category_map"])
def test_an_unknown_category_is_refused_with_its_place_unless_it_is_custom(field: str) -> None:
    maps = official_maps()
    maps[field]["3"] = "Low Risk"
    with pytest.raises(InputError, match=rf"config\.{field}\.3: unknown category 'Low Risk'"):
        head_labels(maps)
    labels = head_labels(maps, custom={"Low Risk"})
    assert "Low Risk" in labels.category + labels.query_category
