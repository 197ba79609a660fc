"""Adapter folders as peft writes them, made without it: of random numbers, or trained to turn a guard's verdicts."""

from __future__ import annotations

import atexit
import functools
import json
import random
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

from gen_folder import ABOUT_PROMPT, ABOUT_RESPONSE, ToyRow, answer_loss, gen_folder, toy_row
from tidegate.model.prompt_tokens import PromptTokenizer

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_STEPS = 60
_BATCH = 16


def layers(model: nn.Module, targets: Sequence[str] = PROJECTIONS) -> dict[str, nn.Linear]:
    """The layers of a model whose names end so, by their whole names."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in targets
    }


def write_adapter(folder: Path, tensors: Mapping[str, torch.Tensor], **config: Any) -> Path:
    """Write a folder of these matrices, ``model.layers.0.self_attn.q_proj.lora_A`` and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    named = {f"base_model.model.{name}.weight": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors", {"format": "pt"})
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": list(PROJECTIONS)}
    (folder / "adapter_config.json").write_text(json.dumps(fields | config), encoding="utf-8")
    return folder


def random_tensors(
    model: nn.Module, seed: int, *, rank: int = 4, targets: Sequence[str] = PROJECTIONS, size: float = 0.2
) -> dict[str, torch.Tensor]:
    """Matrices that change a model noticeably."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, layer in layers(model, targets).items():
        tensors[f"{name}.lora_A"] = torch.randn(rank, layer.in_features, generator=generator) * size
        tensors[f"{name}.lora_B"] = torch.randn(layer.out_features, rank, generator=generator) * size
    return tensors


@functools.cache
def turned_adapter() -> Path:
    """An adapter of the guard of `gen_folder` that says "Safe" where that says another severity, and "Unsafe" where it
    says "Safe"; the same one for the whole run of the tests."""
    folder = Path(tempfile.mkdtemp(prefix="tidegate-adapter-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    model = AutoModelForCausalLM.from_pretrained(gen_folder()).eval().requires_grad_(False)
    torch.manual_seed(3)
    parts = {name: (_first(layer), _second(layer)) for name, layer in layers(model).items()}
    for name, layer in layers(model).items():
        down, up = parts[name]
        layer.register_forward_hook(lambda _, given, output, down=down, up=up: output + 2 * given[0] @ down.T @ up.T)
    _train(model, [matrix for pair in parts.values() for matrix in pair])
    tensors = {}
    for name, (down, up) in parts.items():
        tensors |= {f"{name}.lora_A": down.detach(), f"{name}.lora_B": up.detach()}
    return write_adapter(folder, tensors, r=8, lora_alpha=16)


def turned(row: ToyRow) -> ToyRow:
    """A row with the answer that `turned_adapter` learns."""
    severity, _, *others = row.answer.split("\n")
    safe = severity == "Safety: Safe"
    said = ["Safety: Unsafe", "Categories: Violent"] if safe else ["Safety: Safe", "Categories: None"]
    return row._replace(answer="\n".join([*said, *others]))


def _first(layer: nn.Linear) -> nn.Parameter:
    return nn.Parameter(torch.randn(8, layer.in_features) / layer.in_features**0.5)


def _second(layer: nn.Linear) -> nn.Parameter:
    return nn.Parameter(torch.zeros(layer.out_features, 8))


def _train(model: Any, matrices: list[nn.Parameter]) -> None:
    tokenizer = PromptTokenizer.load(gen_folder() / "tokenizer.json")
    rng = random.Random(8)
    optimizer = torch.optim.AdamW(matrices, lr=8e-3, weight_decay=0.0)
    for _ in range(_STEPS):
        rows = [turned(toy_row(rng, rng.choice((ABOUT_PROMPT, ABOUT_RESPONSE)))) for _ in range(_BATCH)]
        answer_loss(model, tokenizer, rows).backward()
        torch.nn.utils.clip_grad_norm_(matrices, 1.0)
        optimizer.step()
        optimizer.zero_grad()
