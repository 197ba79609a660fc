"""What the config of a Stream checkpoint says about its heads, read without torch.

The released configs name labels in short ("Self-Harm"); Tidegate uses the official long names ("Suicide & Self-Harm").
Risk ids are not in order of severity: they are read from the config, never assumed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from tidegate.errors import InputError
from tidegate.types import CATEGORIES, Category, Severity

__all__ = ["SHORT_NAMES", "HeadLabels", "category_order", "head_labels", "long_name", "risk_order"]

SHORT_NAMES: Mapping[str, str] = {
    Category.SEXUAL.value: "Sexual Content",
    Category.SELF_HARM.value: "Self-Harm",
    Category.POLITICAL.value: "Political",
    Category.COPYRIGHT.value: "Copyright",
    Category.NON_VIOLENT_ILLEGAL_ACTS.value: "Illegal Acts",
    Category.UNETHICAL_ACTS.value: "Unethical",
}
"""Official long name to the short one of the configs; names that are not here are the same in both."""

_LONG_NAMES = {short: long for long, short in SHORT_NAMES.items()}


def long_name(name: str) -> str:
    """The official long name of a category that a config may name in short; others are given back as they are."""
    return _LONG_NAMES.get(name, name)


def risk_order(config: Mapping[str, Any], field: str) -> tuple[Severity, ...]:
    """The severity of each id of a risk head.

    Args:
        config: the config of a checkpoint.
        field: ``query_risk_level_map`` or ``response_risk_level_map``.

    Raises:
        InputError: when the map is missing or is not a permutation of the three severities.
    """
    labels = _labels(config, field)
    try:
        order = tuple(Severity.parse(label) for label in labels)
    except ValueError as error:
        raise InputError(str(error), where=f"config.{field}") from None
    if sorted(order) != sorted(Severity):
        raise InputError("expected each of Safe, Controversial and Unsafe exactly once", where=f"config.{field}")
    return order


def category_order(config: Mapping[str, Any], field: str) -> tuple[str, ...]:
    """The long name of each id of a category head.

    Args:
        config: the config of a checkpoint.
        field: ``query_category_map`` or ``response_category_map``.

    Raises:
        InputError: when the map is missing, or names one category twice.
    """
    names = tuple(long_name(label) for label in _labels(config, field))
    if len(set(names)) != len(names):
        raise InputError("a category is named twice", where=f"config.{field}")
    return names


@dataclass(frozen=True, slots=True)
class HeadLabels:
    """What each id of the four heads means.

    Attributes:
        risk: severity of each id of the response's risk head; a permutation of the three.
        category: long name of each id of the response's category head.
        query_risk: as ``risk``, for prompts.
        query_category: as ``category``, for prompts.
    """

    risk: tuple[Severity, ...]
    category: tuple[str, ...]
    query_risk: tuple[Severity, ...]
    query_category: tuple[str, ...]


def head_labels(config: Mapping[str, Any], *, custom: Collection[str] = ()) -> HeadLabels:
    """Read and check the four label maps.

    Args:
        config: the config of a checkpoint.
        custom: names of categories that are allowed beside the nine official ones.

    Raises:
        InputError: names the map and what is wrong with it: missing, ids that are not 0 to n - 1, a severity that is
            missing, twice or unknown, a category that is twice or unknown.
    """
    return HeadLabels(
        risk=risk_order(config, "response_risk_level_map"),
        category=_known_categories(config, "response_category_map", custom),
        query_risk=risk_order(config, "query_risk_level_map"),
        query_category=_known_categories(config, "query_category_map", custom),
    )


def _known_categories(config: Mapping[str, Any], field: str, custom: Collection[str]) -> tuple[str, ...]:
    names = category_order(config, field)
    for index, name in enumerate(names):
        if name not in CATEGORIES and name not in custom:
            raise InputError(
                f"unknown category {name!r}: expected an official one or one that is named as custom",
                where=f"config.{field}.{index}",
            )
    return names


def _labels(config: Mapping[str, Any], field: str) -> list[str]:
    labels = config.get(field)
    if not isinstance(labels, Mapping) or not labels:
        raise InputError("expected a map from id to label", where=f"config.{field}")
    by_id = {str(key): label for key, label in labels.items()}
    ids = [str(index) for index in range(len(by_id))]
    if set(by_id) != set(ids) or not all(isinstance(label, str) for label in by_id.values()):
        raise InputError(f"expected ids 0 to {len(by_id) - 1}, each with a name", where=f"config.{field}")
    return [by_id[index] for index in ids]
