"""Reads Qwen3Guard-Stream checkpoints in their released layout: ``config.json`` and safetensors, one file or sharded.

No code of the checkpoint is ever run: the architecture is ours (`tidegate.model.stream`), and of the config only the
fields of that architecture are read (``auto_map`` and whatever names an attention kernel are not among them). All
names, shapes and types are checked from the headers of the files before a weight is read; then each weight is read,
brought to its type and device, and put in its place, so that no more than one of them exists twice.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from tidegate.errors import GuardUnavailable, InputError
from tidegate.model.checkpoints import head_labels
from tidegate.model.folders import INDEX, WEIGHTS, checkpoint_folder, read_config, read_json
from tidegate.model.stream import GROUPED_ATTENTION, Qwen3ForGuardModel

__all__ = ["DTYPES", "load_stream"]

DTYPES: Final[Mapping[str, torch.dtype]] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""The types a model can be loaded in, by name."""

_STORED_DTYPES: Final[Mapping[str, str]] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

_SIZES: Final = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
)
_LABEL_MAPS: Final = ("response_risk_level_map", "response_category_map", "query_risk_level_map", "query_category_map")
_OPTIONAL: Final = (
    "head_dim",
    "attention_bias",
    "hidden_act",
    "initializer_range",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
)
_HEAD_SIZES: Final = {
    "guard_inner_size": ("risk_level_category_pre.weight", 0),
    "num_risk_level": ("risk_level_head.weight", 0),
    "num_category": ("category_head.weight", 0),
    "num_query_risk_level": ("query_risk_level_head.weight", 0),
    "num_query_category": ("query_category_head.weight", 0),
}
"""Fields that may be left out of a config, and the dimension of the tensor that tells them."""
_CLASSES: Final = {
    "num_risk_level": "response_risk_level_map",
    "num_category": "response_category_map",
    "num_query_risk_level": "query_risk_level_map",
    "num_query_category": "query_category_map",
}
_LEFT_OUT: Final = frozenset({"lm_head.weight"})
"""Tensors that a checkpoint may have and a guard does not need."""
_ATTENTIONS: Final = (GROUPED_ATTENTION, "sdpa", "eager")
_SHOWN: Final = 5
"""How many tensors an error names at most."""


def load_stream(
    source: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    revision: str | None = None,
    custom: Collection[str] = (),
    attention: str = GROUPED_ATTENTION,
) -> Qwen3ForGuardModel:
    """Load a Stream checkpoint for inference (``eval``, no gradients).

    Args:
        source: a folder, or the name of a repository on the Hugging Face hub; files that are in its local cache are
            not fetched again, and ``HF_HUB_OFFLINE=1`` forbids fetching.
        dtype: ``float32``, ``bfloat16`` or ``float16``; ``auto`` for what the config says, or else for the type in
            which the weights are stored.
        device: where the weights go, as ``cpu``, ``cuda`` or ``cuda:1``.
        revision: commit, branch or tag on the hub; None for its main branch. Not for folders.
        custom: names of categories that the label maps may have beside the nine official ones.
        attention: ``sdpa`` or ``eager`` of transformers, or ours, which is as exact and copies no keys.

    Raises:
        InputError: the config, a label map or an argument is wrong: says where.
        GuardUnavailable: files or tensors are missing, unreadable, unexpected or of another shape: names them.
    """
    if attention not in _ATTENTIONS:
        raise InputError(f"expected one of {', '.join(_ATTENTIONS)}", where="attention")
    folder = checkpoint_folder(source, revision=revision)
    raw = read_config(folder)
    head_labels(raw, custom=custom)
    stored = _stored_tensors(folder)
    target = _target_dtype(raw, stored, dtype)
    config = _qwen3_config(raw, stored)
    config._attn_implementation = attention
    with torch.device("meta"):
        model = Qwen3ForGuardModel(config)
    _check_tensors(folder, model, stored)
    device = torch.device(device)
    for name, tensor in _tensors(stored, target, device):
        _put(model, name, tensor)
    model.model.rotary_emb = Qwen3RotaryEmbedding(config).to(device)
    model.config.dtype = target
    model.eval()
    return model


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor in a file: what its header says."""

    path: Path
    shape: tuple[int, ...]
    dtype: str


def _qwen3_config(raw: Mapping[str, Any], stored: Mapping[str, _Stored]) -> Qwen3Config:
    fields = {name: _positive(raw, name) for name in _SIZES}
    for name, (tensor, dimension) in _HEAD_SIZES.items():
        if name not in raw and tensor in stored and stored[tensor].shape:
            fields[name] = stored[tensor].shape[dimension]
        else:
            fields[name] = _positive(raw, name)
    for name, field in _CLASSES.items():
        if len(raw[field]) != fields[name]:
            raise InputError(f"names {len(raw[field])} labels for a head of {fields[name]}", where=f"config.{field}")
    if fields["num_attention_heads"] % fields["num_key_value_heads"]:
        raise InputError("expected a divisor of num_attention_heads", where="config.num_key_value_heads")
    fields |= {name: raw[name] for name in (*_OPTIONAL, *_LABEL_MAPS) if raw.get(name) is not None}
    fields.setdefault("head_dim", fields["hidden_size"] // fields["num_attention_heads"])
    theta, scaling = _rope(raw)
    return Qwen3Config(
        **fields,
        architectures=["Qwen3ForGuardModel"],
        rope_theta=theta,
        rope_scaling=scaling,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def _rope(raw: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Base and scaling of the rotary embedding, which transformers 5 writes into one field and 4 into two."""
    together = dict(raw.get("rope_parameters") or {})
    theta = together.pop("rope_theta", None) or raw.get("rope_theta")
    if not isinstance(theta, int | float) or isinstance(theta, bool) or theta <= 0:
        raise InputError("expected a positive number", where="config.rope_theta")
    scaling = together or dict(raw.get("rope_scaling") or {})
    if scaling.get("rope_type", scaling.get("type", "default")) == "default":
        return float(theta), None
    return float(theta), scaling


def _positive(raw: Mapping[str, Any], name: str) -> int:
    value = raw.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError("expected a positive whole number", where=f"config.{name}")
    return value


def _target_dtype(raw: Mapping[str, Any], stored: Mapping[str, _Stored], dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        if dtype not in DTYPES.values():
            raise InputError(f"expected one of {', '.join(DTYPES)}", where="dtype")
        return dtype
    if dtype == "auto":
        named = raw.get("dtype") or raw.get("torch_dtype")
        dtype = named if isinstance(named, str) and named in DTYPES else _stored_dtype(stored)
    if dtype not in DTYPES:
        raise InputError(f"expected auto or one of {', '.join(DTYPES)}", where="dtype")
    return DTYPES[dtype]


def _stored_dtype(stored: Mapping[str, _Stored]) -> str:
    return next((_STORED_DTYPES[t.dtype] for t in stored.values() if t.dtype in _STORED_DTYPES), "float32")


def _stored_tensors(folder: Path) -> dict[str, _Stored]:
    """Every tensor of the files by name, from their headers."""
    files = [folder / WEIGHTS]
    index = folder / INDEX
    placed: Mapping[str, str] = {}
    if not files[0].is_file():
        if not index.is_file():
            raise GuardUnavailable(f"{folder} has neither {WEIGHTS} nor {INDEX}")
        placed = _weight_map(index)
        files = [folder / name for name in sorted(set(placed.values()))]
    stored: dict[str, _Stored] = {}
    for path in files:
        for name, tensor in _header(path):
            if name in stored:
                raise GuardUnavailable(f"{name} is in {stored[name].path.name} and in {path.name}")
            stored[name] = tensor
    if lacking := [name for name in placed if name not in stored]:
        raise GuardUnavailable(f"{index} names tensors that its files lack: {_some(lacking)}")
    return stored


def _weight_map(index: Path) -> dict[str, str]:
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise GuardUnavailable(f"{index} has no weight_map")
    for name in placed.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise GuardUnavailable(f"{index} names a file that is not a safetensors file beside it")
    return placed


def _header(path: Path) -> Iterator[tuple[str, _Stored]]:
    if not path.is_file():
        raise GuardUnavailable(f"{path} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dictionary)
                part = file.get_slice(name)
                yield name, _Stored(path, tuple(part.get_shape()), part.get_dtype())
    except (OSError, SafetensorError) as error:
        raise GuardUnavailable(f"{path} is not a safetensors file: {error}") from error


def _check_tensors(folder: Path, model: nn.Module, stored: Mapping[str, _Stored]) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    faults = []
    if missing := [name for name in expected if name not in stored]:
        faults.append(f"missing tensors: {_some(missing)}")
    if unexpected := [name for name in stored if name not in expected and name not in _LEFT_OUT]:
        faults.append(f"unexpected tensors: {_some(unexpected)}")
    shared = [name for name in expected if name in stored]
    if misshaped := [name for name in shared if stored[name].shape != expected[name]]:
        told = [f"{name} is {list(stored[name].shape)}, expected {list(expected[name])}" for name in misshaped]
        faults.append(f"tensors of another shape: {_some(told)}")
    if typed := [f"{name} ({stored[name].dtype})" for name in shared if stored[name].dtype not in _STORED_DTYPES]:
        faults.append(f"tensors that are not {', '.join(_STORED_DTYPES)}: {_some(typed)}")
    if faults:
        raise GuardUnavailable(f"{folder} does not fit its config: {'; '.join(faults)}")


def _tensors(
    stored: Mapping[str, _Stored], dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights, each a copy of its own; a file is opened for each, so that pages read are let go."""
    for name, tensor in stored.items():
        if name in _LEFT_OUT:
            continue
        with safe_open(tensor.path, framework="pt") as file:
            yield name, file.get_tensor(name).to(device=device, dtype=dtype, copy=True)


def _put(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    path, _, last = name.rpartition(".")
    setattr(model.get_submodule(path), last, nn.Parameter(tensor, requires_grad=False))


def _some(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
