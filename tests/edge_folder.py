"""A tiny edge guard with random weights and a tokenizer of its own, written in under a second: for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from tidegate.model.checkpoints import SHORT_NAMES
from tidegate.model.tokens import CONTROL_TOKENS, SPLIT_PATTERN
from tidegate.train.export import export_onnx
from tidegate.types import PROMPT_CATEGORIES, RESPONSE_CATEGORIES

LINES = (
    "the quick brown fox jumps over the lazy dog and then it sleeps in the warm sun for a while",
    "how do i bake bread at home when there is no yeast in the house",
    "wie backe ich zu hause ein brot ohne hefe und ohne zucker",
    "cómo puedo hacer pan en casa sin levadura",
    "今天天气很好我们去公园散步吧 明天可能会下雨",
    "東京の天気はどうですか パンを焼きたいです",
    "오늘 날씨가 정말 좋네요 빵을 굽고 싶어요",
    "как испечь хлеб дома без дрожжей",
    "كيف أصنع الخبز في المنزل بدون خميرة",
    "घर पर रोटी कैसे बनाते हैं",
    "วิธีทำขนมปังที่บ้าน",
    "def f(x): return x + 1  # 12345 !!! ??? ... ---",
)
TEMPLATE: dict[str, Any] = {"format": 1, "name": "tiny", "version": "0", "window": 48, "overlap": 8, "context": 12}


def tiny_tokenizer(vocab_size: int = 640) -> Tokenizer:
    """A byte-level BPE trained on a few lines of many languages, with the control tokens as ids 0 to 7."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([f" {line}" for line in LINES], trainer)
    definition = json.loads(tokenizer.to_str())
    definition["added_tokens"] = []
    return Tokenizer.from_str(json.dumps(definition))


def tiny_config(vocab_size: int, **tidegate: Any) -> dict[str, Any]:
    """The config of a checkpoint of two layers whose heads are wider than hidden_size / heads."""
    risk = {"0": "Safe", "1": "Unsafe", "2": "Controversial"}
    return {
        "architectures": ["Qwen3ForGuardModel"],
        "model_type": "qwen3",
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 48,
        "max_position_embeddings": 512,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "use_cache": False,
        "guard_inner_size": 24,
        "num_risk_level": 3,
        "num_category": 8,
        "num_query_risk_level": 3,
        "num_query_category": 9,
        "response_risk_level_map": risk,
        "query_risk_level_map": risk,
        "response_category_map": {str(i): SHORT_NAMES.get(n, n) for i, n in enumerate(RESPONSE_CATEGORIES)},
        "query_category_map": {str(i): SHORT_NAMES.get(n, n) for i, n in enumerate(PROMPT_CATEGORIES)},
        "tidegate": {**TEMPLATE, **tidegate},
    }


def tiny_tensors(config: dict[str, Any], seed: int = 7) -> dict[str, np.ndarray]:
    """Random weights under the official names, large enough that verdicts differ from token to token."""
    rng = np.random.default_rng(seed)
    hidden, inner, size = config["hidden_size"], config["guard_inner_size"], config["head_dim"]
    wide, narrow = config["num_attention_heads"] * size, config["num_key_value_heads"] * size

    def matrix(*shape: int) -> np.ndarray:
        return rng.normal(0, 1.5 / np.sqrt(shape[1]), shape).astype(np.float32)

    def norm(length: int) -> np.ndarray:
        return (1 + 0.1 * rng.normal(size=length)).astype(np.float32)

    tensors = {"model.embed_tokens.weight": matrix(config["vocab_size"], hidden), "model.norm.weight": norm(hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        tensors |= {
            f"{prefix}.input_layernorm.weight": norm(hidden),
            f"{prefix}.post_attention_layernorm.weight": norm(hidden),
            f"{prefix}.self_attn.q_proj.weight": matrix(wide, hidden),
            f"{prefix}.self_attn.k_proj.weight": matrix(narrow, hidden),
            f"{prefix}.self_attn.v_proj.weight": matrix(narrow, hidden),
            f"{prefix}.self_attn.o_proj.weight": matrix(hidden, wide),
            f"{prefix}.self_attn.q_norm.weight": norm(size),
            f"{prefix}.self_attn.k_norm.weight": norm(size),
            f"{prefix}.mlp.gate_proj.weight": matrix(config["intermediate_size"], hidden),
            f"{prefix}.mlp.up_proj.weight": matrix(config["intermediate_size"], hidden),
            f"{prefix}.mlp.down_proj.weight": matrix(hidden, config["intermediate_size"]),
        }
    for prefix, categories in (("", "num_category"), ("query_", "num_query_category")):
        tensors |= {
            f"{prefix}risk_level_category_pre.weight": matrix(inner, hidden),
            f"{prefix}risk_level_category_layernorm.weight": norm(inner),
            f"{prefix}risk_level_head.weight": matrix(3, inner),
            f"{prefix}category_head.weight": matrix(config[categories], inner),
        }
    return tensors


def tiny_checkpoint(folder: Path, **tidegate: Any) -> Path:
    """Write a checkpoint in the official layout: what training would leave behind."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_tokenizer()
    config = tiny_config(tokenizer.get_vocab_size(), **tidegate)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    save_file(tiny_tensors(config), folder / "model.safetensors")
    return folder


def tiny_edge_folder(folder: Path, **tidegate: Any) -> Path:
    """Write the files of a tiny guard, its table of n-grams among them; keywords go into its config."""
    rows = np.random.default_rng(11).normal(0, 20, (2, 256, 2)).clip(-127, 127).astype(np.int8)
    tidegate.setdefault("wide", {"scale": {"prompt": 0.02, "response": 0.02}})
    checkpoint = tiny_checkpoint(folder / "checkpoint", **tidegate)
    np.save(checkpoint / "ngrams.npy", rows)
    export_onnx(checkpoint, folder)
    return folder
