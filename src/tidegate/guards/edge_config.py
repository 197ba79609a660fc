"""What the config of an edge guard says: how text becomes windows of ids, and how logits become verdicts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tidegate.errors import GuardUnavailable, InputError, UnreadableVerdict
from tidegate.model.checkpoints import category_order, risk_order
from tidegate.types import Probabilities, Severity, Target

__all__ = ["EdgeConfig", "Reading", "Row", "Thresholds", "Totals", "WideConfig", "read_config"]

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Bias = Annotated[tuple[Finite, ...], Field(min_length=3, max_length=3)]
_NO_BIAS: Final = (0.0, 0.0, 0.0)
Totals = tuple[int, int, int]
"""What n-grams said for Unsafe and for Controversial, and how many there were: sums of `WideTable.evidence`."""


class Thresholds(BaseModel):
    """From probabilities to a severity: flagged from ``flagged`` on, and UNSAFE if unsafe from ``unsafe`` on too."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    flagged: Share = 0.5
    unsafe: Share = 0.5

    def severity(self, probabilities: Probabilities) -> Severity:
        """The call: SAFE below ``flagged``, else UNSAFE or CONTROVERSIAL."""
        if probabilities.flagged < self.flagged:
            return Severity.SAFE
        return Severity.UNSAFE if probabilities.unsafe >= self.unsafe else Severity.CONTROVERSIAL


class _Temperatures(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: Positive = 1.0
    response: Positive = 1.0


class _Biases(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: Bias = _NO_BIAS
    response: Bias = _NO_BIAS


class _Shares(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    response: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0


class WideConfig(BaseModel):
    """How the table of n-grams is read: what 1 in it is worth in logits, and how much of that is added (0: nothing)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    scale: _Temperatures
    weight: _Shares = _Shares()


class _ThresholdsByPlace(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: Thresholds = Thresholds()
    response: Thresholds = Thresholds()
    token: Thresholds = Thresholds()


class EdgeConfig(BaseModel):
    """The ``tidegate`` section of the config: how the guard reads text, and how its logits are read.

    Sizes are in tokens. Without calibration the temperatures are 1, the biases (added to the tempered risk logits, in
    the order of the ids) 0 and the thresholds 0.5. Fields that training adds for the record are passed over.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    format: Literal[1]
    name: Annotated[str, Field(min_length=1)]
    version: Annotated[str, Field(min_length=1)]
    window: Annotated[int, Field(ge=16)]
    overlap: Annotated[int, Field(ge=1)]
    context: Annotated[int, Field(ge=2)]
    temperature: _Temperatures = _Temperatures()
    bias: _Biases = _Biases()
    thresholds: _ThresholdsByPlace = _ThresholdsByPlace()
    category_threshold: Share = 0.3
    languages: tuple[str, ...] = ()
    wide: WideConfig | None = None

    @model_validator(mode="after")
    def _windows_move(self) -> EdgeConfig:
        # header: role, context, <|more|>, end; then role, <|more|>, overlap, one new token, end
        if self.context + 3 + 2 + self.overlap + 1 + 1 > self.window or self.overlap >= self.window - 3:
            raise ValueError("window is too small for context + overlap: expected at least context + overlap + 7")
        return self


@dataclass(frozen=True, slots=True)
class Reading:
    """How the logits of one branch become probabilities; both lists are in the order of the ids."""

    temperature: float
    bias: tuple[float, ...]
    order: tuple[Severity, ...]
    categories: tuple[str, ...]
    wide_scale: float = 1.0
    wide_weight: float = 0.0

    def probabilities(self, logits: NDArray[np.float32], evidence: Totals = (0, 0, 0)) -> Probabilities:
        """The calibrated probability of each severity, from the three risk logits and the totals of n-grams."""
        tempered = [x / self.temperature + b for x, b in zip(logits.tolist(), self.bias, strict=True)]
        if self.wide_weight:
            unsafe, controversial, count = evidence
            worth = self.wide_weight * self.wide_scale / math.sqrt(max(1, count))
            tempered[self.order.index(Severity.UNSAFE)] += worth * unsafe
            tempered[self.order.index(Severity.CONTROVERSIAL)] += worth * controversial
        found = dict(zip(self.order, _softmax(tempered), strict=True))
        return Probabilities(found[Severity.SAFE], found[Severity.CONTROVERSIAL], found[Severity.UNSAFE])

    def category_probabilities(self, logits: NDArray[np.float32]) -> dict[str, float]:
        """The probability of each category, given that the text is not safe."""
        return dict(zip(self.categories, _softmax(logits.tolist()), strict=True))

    def top_category(self, logits: NDArray[np.float32]) -> tuple[str, float]:
        """The most probable category and its probability."""
        probabilities = _softmax(logits.tolist())
        probability = max(probabilities)
        return self.categories[probabilities.index(probability)], probability


class Row(NamedTuple):
    """Risk and category logits of one branch at one position, and the totals of the n-grams up to there."""

    risk: NDArray[np.float32]
    category: NDArray[np.float32]
    evidence: Totals = (0, 0, 0)


def _softmax(logits: list[float]) -> list[float]:
    """Probabilities of a few logits; plain Python, which for a few is ten times as fast as numpy."""
    largest = max(logits)
    exponents = [math.exp(x - largest) for x in logits]
    total = sum(exponents)
    if not math.isfinite(total):
        raise UnreadableVerdict("the model gave a logit that is not a finite number")
    return [x / total for x in exponents]


def read_config(path: Path) -> tuple[EdgeConfig, dict[Target, Reading]]:
    """Read the ``config.json`` of an edge guard.

    Raises:
        GuardUnavailable: when it cannot be used; says what was expected where in it.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise InputError("expected a JSON object")
        config = EdgeConfig.model_validate(raw.get("tidegate"))
        if config.window > int(raw.get("max_position_embeddings", config.window)):
            raise InputError("window is larger than max_position_embeddings", where="config.tidegate.window")
        return config, _readings(raw, config)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, ("tidegate", *first["loc"])))
        raise GuardUnavailable(f"{path}: {place}: {first['msg']}") from None
    except (OSError, ValueError, InputError) as error:
        raise GuardUnavailable(f"{path}: {error}") from error


def _readings(raw: Mapping[str, Any], config: EdgeConfig) -> dict[Target, Reading]:
    return {
        target: Reading(
            temperature=getattr(config.temperature, target.value),
            bias=getattr(config.bias, target.value),
            order=risk_order(raw, f"{field}_risk_level_map"),
            categories=category_order(raw, f"{field}_category_map"),
            wide_scale=getattr(config.wide.scale, target.value) if config.wide else 1.0,
            wide_weight=getattr(config.wide.weight, target.value) if config.wide else 0.0,
        )
        for target, field in ((Target.PROMPT, "query"), (Target.RESPONSE, "response"))
    }
