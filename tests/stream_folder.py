"""Folders in the layout of the released Stream checkpoints, with small random weights.

Random weights of the usual size make every position alike; these are larger, so that positions differ and a mistake
shows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from qwen_tokenizer import tiny_qwen_definition
from tidegate.model.stream import Qwen3ForGuardModel, label_maps, stream_config

TINY: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "guard_inner_size": 24,
    "head_dim": 16,
}
"""Grouped queries, and heads that together are wider than the hidden state, as in the smallest released model."""


def tiny_model(seed: int = 0, attention: str = "sdpa", **shape: Any) -> Qwen3ForGuardModel:
    """A model with random weights; arguments of `stream_config` that are not given are those of `TINY`."""
    config = stream_config(**(TINY | shape))
    config._attn_implementation = attention
    model = Qwen3ForGuardModel(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.normal_(std=1.5 / parameter.shape[1] ** 0.5, generator=generator)
        else:
            parameter.uniform_(0.5, 1.5, generator=generator)
    return model


def official_config(**changes: Any) -> dict[str, Any]:
    """The fields of a released ``config.json`` for the shape of `TINY`; a change to None leaves a field out."""
    config = {
        "architectures": ["Qwen3ForGuardModel"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": {"AutoModel": "code_that_must_not_run.Qwen3ForGuardModel"},
        "bos_token_id": 298,
        "eos_token_id": 299,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 8192,
        "max_window_layers": 3,
        "model_type": "qwen3",
        "num_category": 8,
        "num_query_category": 9,
        "num_query_risk_level": 3,
        "num_risk_level": 3,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.55.0",
        "use_cache": False,
        "use_sliding_window": False,
        **TINY,
        **label_maps(),
    }
    return {name: value for name, value in (config | changes).items() if value is not None}


def write_checkpoint(
    folder: Path, tensors: dict[str, torch.Tensor], *, shards: int = 1, config: dict[str, Any] | None = None
) -> Path:
    """Write a checkpoint of the released layout, in one file or in several with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or official_config()), encoding="utf-8")
    (folder / "code_that_must_not_run.py").write_text("raise SystemExit('remote code ran')", encoding="utf-8")
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = sorted(tensors)
    placed = {}
    for number in range(shards):
        part = names[number::shards]
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        placed |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def write_guard(folder: Path, definition: str = "", **changes: Any) -> Path:
    """A checkpoint of the released layout with random weights and a tokenizer of Qwen's kind, by default a small one.

    Args:
        definition: the tokenizer.json; "" for the small one.
        changes: fields of the config.
    """
    definition = definition or tiny_qwen_definition()
    size = Tokenizer.from_str(definition).get_vocab_size()
    config = official_config(vocab_size=size, torch_dtype="float32", **changes)
    write_checkpoint(folder, tensors_of(tiny_model(vocab_size=size)), config=config)
    (folder / "tokenizer.json").write_text(definition, encoding="utf-8")
    return folder


def tensors_of(model: Qwen3ForGuardModel, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The weights of a model by name, as a file would store them."""
    return {name: tensor.to(dtype).contiguous().clone() for name, tensor in model.state_dict().items()}
