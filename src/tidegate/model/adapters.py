"""LoRA adapters: small differences from one model, many of them in memory at once, chosen for each row of a batch.

An adapter adds to linear layers ``y = Wx`` the product of two narrow matrices, ``y + scale * B(Ax)`` (Hu et al. 2021,
"LoRA: Low-Rank Adaptation of Large Language Models"). The weights of the model stay as they are, so that rows of
several adapters and rows of none are computed together, with two small products for each layer and each adapter that
has rows in the batch. Those products see the rows of their adapter alone: nothing is masked or multiplied by zero, so
that one adapter cannot reach the rows of another, whatever its weights are.

Folders are those that the library peft writes: ``adapter_config.json`` and ``adapter_model.safetensors``. What asks for
more than plain LoRA on the seven projections of a Qwen3 layer is refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tidegate.errors import GuardUnavailable, InputError
from tidegate.model.layout import placed

__all__ = ["Adapters", "LowRank", "read_adapter"]

N = TypeVar("N", int, float)

_CONFIG: Final = "adapter_config.json"
_WEIGHTS: Final = "adapter_model.safetensors"
_PROJECTION: Final = re.compile(
    r"(?:.*\.)?layers\.(\d+)\.(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)", re.DOTALL
)
"""The layers that may be adapted, by their names in a model; the group is the number of the layer."""
_TENSOR: Final = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight", re.DOTALL)
_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_NO_MATTER: Final = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "eva_config",
        "inference_mode",
        "lora_dropout",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "task_type",
    }
)
"""Fields of a config that change nothing about what an adapter computes; every other unknown one must be empty."""
_SHOWN: Final = 3
"""How many tensors an error names at most."""


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """What an adapter adds to one linear layer, in the type and on the device of the layer's weight.

    Attributes:
        down: ``[rank, in_features]``, A in the paper.
        up: ``[out_features, rank]``, B in the paper.
        scale: what the product is multiplied by.
    """

    down: Tensor
    up: Tensor
    scale: float

    def add_to(self, output: Tensor, rows: Tensor) -> None:
        """Add the product to what a layer made of some rows.

        Args:
            output: ``[..., out_features]``, rows one after the other; is changed.
            rows: ``[..., in_features]``, what the layer was given.
        """
        narrow = rows.reshape(-1, rows.shape[-1]) @ self.down.T
        output.view(-1, output.shape[-1]).addmm_(narrow, self.up.T, alpha=self.scale)


class Adapters:
    """The adapters of one model. A model that is run outside of `on` computes what it would without any.

    Not for several threads at once: a model is run by one.

    Args:
        model: of Qwen3 shape; its layers get a hook, its weights and their names stay.
        folders: where each adapter lies, by the name that requests call it.

    Raises:
        InputError: when a name has anything but letters, digits, dots, underscores and hyphens, or is too long.
        GuardUnavailable: when a folder cannot be read, is not plain LoRA, or does not fit the model; says why.
    """

    def __init__(self, model: nn.Module, folders: Mapping[str, Path]) -> None:
        for name in folders:
            if not _NAME.fullmatch(name):
                raise InputError(f"expected {_NAME.pattern} as the name of an adapter", where="adapters")
        self._parts = {name: _read_named(name, folder, model) for name, folder in folders.items()}
        self._active: tuple[tuple[slice, Mapping[str, LowRank]], ...] = ()
        self.attach(model)

    def attach(self, model: nn.Module) -> None:
        """Take part in the layers that a model has now; to be called again when they have been laid out anew."""
        for layer in sorted({layer for parts in self._parts.values() for layer in parts}):
            self._attach(layer, *placed(model.get_submodule(layer)))

    @property
    def names(self) -> tuple[str, ...]:
        """What the adapters are called, in the order given."""
        return tuple(self._parts)

    @contextmanager
    def on(self, rows: Sequence[str | None]) -> Iterator[None]:
        """Run the model with the adapter of each row.

        Args:
            rows: for each row of the batch the name of its adapter, None for none. Rows of one adapter are best beside
                each other: each run of them costs two products for each layer.

        Raises:
            KeyError: when there is no such adapter.
        """
        active = []
        start = 0
        for name, run in groupby(rows):
            end = start + sum(1 for _ in run)
            if name is not None:
                active.append((slice(start, end), self._parts[name]))
            start = end
        self._active = tuple(active)
        try:
            yield
        finally:
            self._active = ()

    def _attach(self, name: str, layer: nn.Module, outputs: slice) -> None:
        def add(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            for rows, parts in self._active:
                if (part := parts.get(name)) is not None:
                    part.add_to(output[rows][..., outputs], given[0][rows])

        layer.register_forward_hook(add)


def read_adapter(folder: Path, model: nn.Module) -> dict[str, LowRank]:
    """What an adapter adds to the layers of a model, by their names.

    Args:
        folder: as ``peft`` writes it, with ranks and scales per layer where its config has patterns.
        model: for which it was made.

    Raises:
        GuardUnavailable: when the folder cannot be read, is not plain LoRA, or does not fit the model; says why.
    """
    config = _read_config(folder / _CONFIG)
    layers = _layers(model)
    try:
        targets = [name for name in layers if config.is_target(name)]
        ranks = {name: config.rank(name) for name in targets}
        scales = {name: config.scale(name) for name in targets}
    except re.error as error:
        raise GuardUnavailable(f"{_CONFIG}: a pattern is wrong: {error}") from error
    if not targets:
        raise GuardUnavailable(f"{_CONFIG}: target_modules names none of the projections of the model")
    tensors = _read_tensors(folder / _WEIGHTS)
    _check_names(tensors, targets)
    return {name: _low_rank(name, layers[name], tensors[name], ranks[name], scales[name]) for name in targets}


class _Config(BaseModel):
    """``adapter_config.json``: what matters here of it."""

    model_config = ConfigDict(extra="allow", frozen=True)

    peft_type: Literal["LORA"]
    r: Annotated[int, Field(ge=1)]
    lora_alpha: Annotated[float, Field(allow_inf_nan=False)]
    target_modules: str | list[str]
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = {}
    alpha_pattern: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = {}
    use_rslora: bool = False
    bias: Literal["none"] = "none"
    init_lora_weights: Literal[True, False, "gaussian", "orthogonal", "eva"] = True
    """The ways to begin a training that leave the weights of the base as they are."""
    layers_pattern: Literal["layers"] | list[Literal["layers"]] | None = None

    def is_target(self, name: str) -> bool:
        """Whether a layer is adapted."""
        if self.exclude_modules and _named(self.exclude_modules, name):
            return False
        return _named(self.target_modules, name) and (isinstance(self.target_modules, str) or self._has_layer(name))

    def rank(self, name: str) -> int:
        """The rank of a layer."""
        return _by_pattern(self.rank_pattern, name, self.r)

    def scale(self, name: str) -> float:
        """What the product of a layer is multiplied by."""
        rank = self.rank(name)
        return _by_pattern(self.alpha_pattern, name, self.lora_alpha) / (math.sqrt(rank) if self.use_rslora else rank)

    def _has_layer(self, name: str) -> bool:
        chosen = self.layers_to_transform
        if chosen is None or chosen == []:
            return True
        found = _PROJECTION.fullmatch(name)
        return found is not None and int(found[1]) in ([chosen] if isinstance(chosen, int) else chosen)


def _named(patterns: str | Sequence[str], name: str) -> bool:
    """Whether a layer is meant: by one regular expression, or by a list of the last parts of names."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == ending or name.endswith(f".{ending}") for ending in patterns)


def _by_pattern(patterns: Mapping[str, N], name: str, otherwise: N) -> N:
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), otherwise)


def _read_named(name: str, folder: Path, model: nn.Module) -> dict[str, LowRank]:
    try:
        return read_adapter(folder, model)
    except GuardUnavailable as error:
        raise GuardUnavailable(f"the adapter {name} of {folder} cannot be used: {error}") from error


def _read_config(path: Path) -> _Config:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise GuardUnavailable(f"{path.name} cannot be read") from error
    except ValueError as error:
        raise GuardUnavailable(f"{path.name} is not JSON") from error
    try:
        config = _Config.model_validate(fields)
    except ValidationError as error:
        wrong = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(map(str, wrong["loc"])) or "it"
        raise GuardUnavailable(f"{path.name}: {place}: {wrong['msg']}") from error
    extra: Mapping[str, Any] = config.model_extra or {}
    if unknown := sorted(name for name, value in extra.items() if value and name not in _NO_MATTER):
        raise GuardUnavailable(f"{path.name}: {', '.join(unknown)}: only plain LoRA is supported")
    return config


def _layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers of a model that may be adapted, by their names."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and _PROJECTION.fullmatch(name)
    }


def _read_tensors(path: Path) -> dict[str, dict[str, Tensor]]:
    """The matrices A and B of each layer; each a copy of its own."""
    if not path.is_file():
        raise GuardUnavailable(f"{path.name} is missing")
    tensors: dict[str, dict[str, Tensor]] = {}
    others: list[str] = []
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a dictionary)
                if (found := _TENSOR.fullmatch(key)) is None:
                    others.append(key)
                else:
                    tensors.setdefault(found[1], {})[found[2]] = file.get_tensor(key)
    except (OSError, SafetensorError) as error:
        raise GuardUnavailable(f"{path.name} is not a safetensors file: {error}") from error
    if others:
        raise GuardUnavailable(f"{path.name} has tensors that plain LoRA does not have: {_some(others)}")
    return tensors


def _check_names(tensors: Mapping[str, Mapping[str, Tensor]], targets: Sequence[str]) -> None:
    if unexpected := [name for name in tensors if name not in targets]:
        raise GuardUnavailable(
            f"{_WEIGHTS} has tensors for what is not a projection of the model or not in target_modules: "
            f"{_some(unexpected)}"
        )
    if missing := [name for name in targets if set(tensors.get(name, ())) != {"A", "B"}]:
        raise GuardUnavailable(f"{_WEIGHTS} lacks tensors for {_some(missing)}")


def _low_rank(name: str, layer: nn.Linear, tensors: Mapping[str, Tensor], rank: int, scale: float) -> LowRank:
    expected = {"A": [rank, layer.in_features], "B": [layer.out_features, rank]}
    for letter, tensor in tensors.items():
        if list(tensor.shape) != expected[letter]:
            raise GuardUnavailable(
                f"lora_{letter} of {name} is {list(tensor.shape)}, expected {expected[letter]}: "
                "it was made for a model of another shape, or with another rank than its config says"
            )
        if tensor.dtype not in _DTYPES:
            raise GuardUnavailable(f"lora_{letter} of {name} is of the type {tensor.dtype}")
    down, up = (tensors[letter].to(device=layer.weight.device, dtype=layer.weight.dtype) for letter in "AB")
    if not (down.isfinite().all() and up.isfinite().all()):
        raise GuardUnavailable(f"{name} has values that are not finite in {layer.weight.dtype}")
    return LowRank(down, up, scale)


def _some(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
