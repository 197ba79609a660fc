"""A tiny Gen checkpoint as GGUF in 16 bits, for llama.cpp: ``python to_gguf.py FOLDER FILE``.

Runs in the environment of the server, which has ``gguf`` and NumPy and knows neither torch nor this project.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np

BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
NORMAL, CONTROL, UNUSED = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL, gguf.TokenType.UNUSED


def main(folder: Path, file: Path) -> None:
    """Write the file."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(file, "qwen3")
    add_sizes(writer, config)
    add_tokenizer(writer, folder, config["vocab_size"])
    for name, tensor in tensors(folder / "model.safetensors"):
        half = np.float32 if tensor.ndim == 1 else np.float16
        writer.add_tensor(gguf_name(name), np.ascontiguousarray(tensor, dtype=half))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_sizes(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    """What the config says."""
    rope = config.get("rope_parameters") or config
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path, size: int) -> None:
    """Tokens, merges and the chat template."""
    definition = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokens, types = [f"[unused{token}]" for token in range(size)], [UNUSED] * size
    for text, token in definition["model"]["vocab"].items():
        tokens[token], types[token] = text, NORMAL
    ids = {added["content"]: added["id"] for added in definition["added_tokens"]}
    for text, token in ids.items():
        tokens[token], types[token] = text, CONTROL
    merges = definition["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_eos_token_id(ids["<|im_end|>"])
    writer.add_pad_token_id(ids["<|endoftext|>"])
    writer.add_add_bos_token(False)
    writer.add_chat_template(settings["chat_template"])


def gguf_name(name: str) -> str:
    """What llama.cpp calls a tensor."""
    stem = name.removesuffix(".weight")
    if stem in WHOLE:
        return f"{WHOLE[stem]}.weight"
    _, _, number, part = stem.split(".", 3)
    return f"blk.{number}.{BLOCK[part]}.weight"


def tensors(file: Path) -> list[tuple[str, np.ndarray]]:
    """The tensors of a safetensors file that holds float32."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    found = []
    for name, about in json.loads(data[8 : 8 + length]).items():
        if name == "__metadata__":
            continue
        assert about["dtype"] == "F32", f"{name} is {about['dtype']}"
        start, end = (8 + length + offset for offset in about["data_offsets"])
        found.append((name, np.frombuffer(data[start:end], dtype=np.float32).reshape(about["shape"])))
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
