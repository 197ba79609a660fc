"""From a trained checkpoint to the one ONNX file of the edge guard: weights stored in 8 bits, computed in fp32.

The graph is written by hand from the config and the tensors, so that every operation in it is known. Every weight
matrix is stored as int8 with one scale per output channel (per row for the embedding) and turned back into fp32 when
the file is loaded: ONNX Runtime folds ``Cast`` and ``Mul`` of constants away. Nothing is quantized at run time, so a
token's verdict depends on the tokens before it and on nothing else: not on how its text was cut, nor on what shares
its batch.

Inputs (B sequences, S new positions, P cached ones, L layers, KV heads of D values):
    ``input_ids`` int64 [B, S], ``position_ids`` int64 [B, S],
    ``mask`` float32 [B, 1, S, P + S], added to the attention scores: 0 to see, a large negative number not to,
    ``past.0`` to ``past.{2L-1}`` float32 [B, KV, P, D]: keys then values of each layer. One input a layer, so that a
    caller can pass parts of one array without a copy.
Outputs:
    ``present`` float32 [2L, B, KV, S, D]: keys and values of the new positions only,
    ``risk`` [B, S, 3], ``category`` [B, S, 8], ``query_risk`` [B, S, 3], ``query_category`` [B, S, 9]: logits.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper
from safetensors import deserialize

from tidegate.errors import InputError
from tidegate.train.graph import CONTRIB, Graph, Quantized, quantize

__all__ = ["HEADS", "Quantized", "agreement", "dequantized", "export_onnx", "quantize"]

HEADS = ("risk", "category", "query_risk", "query_category")
"""The four outputs of logits, in the order of ``StreamLogits``."""

Float = NDArray[np.float32]
_OPSET = 17
_DTYPES = {"F32": np.float32, "F16": np.float16}
_SHIPPED = ("config.json", "tokenizer.json")
_WIDE = "ngrams.npy"


@dataclass(frozen=True, slots=True)
class _Shape:
    """The numbers of the architecture that the graph needs."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    inner: int
    eps: float
    rope_theta: float
    positions: int
    classes: tuple[int, int, int, int]

    @classmethod
    def read(cls, config: Mapping[str, Any], where: str) -> _Shape:
        rope = config.get("rope_parameters") or {}
        if rope.get("rope_type", "default") != "default" or config.get("rope_scaling"):
            raise InputError("only the default rotary embedding can be exported, without scaling", where=where)
        if config.get("attention_bias") or config.get("use_sliding_window"):
            raise InputError("attention biases and sliding windows cannot be exported", where=where)
        try:
            heads = int(config["num_attention_heads"])
            hidden = int(config["hidden_size"])
            return cls(
                layers=int(config["num_hidden_layers"]),
                hidden=hidden,
                heads=heads,
                kv_heads=int(config["num_key_value_heads"]),
                head_dim=int(config.get("head_dim") or hidden // heads),
                intermediate=int(config["intermediate_size"]),
                inner=int(config["guard_inner_size"]),
                eps=float(config["rms_norm_eps"]),
                rope_theta=float(rope.get("rope_theta") or config["rope_theta"]),
                positions=int(config.get("tidegate", {}).get("window") or config["max_position_embeddings"]),
                classes=(
                    int(config["num_risk_level"]),
                    int(config["num_category"]),
                    int(config["num_query_risk_level"]),
                    int(config["num_query_category"]),
                ),
            )
        except KeyError as error:
            raise InputError(f"the field {error} is missing", where=where) from None


class _Weights:
    """The tensors of a checkpoint: matrices in 8 bits, everything small in fp32; counts what was used."""

    def __init__(self, tensors: Mapping[str, Float], where: str) -> None:
        self._tensors = tensors
        self._where = where
        self.used: set[str] = set()

    def vector(self, name: str) -> Float:
        return self._take(name)

    def matrix(self, *names: str) -> Quantized:
        """Several matrices of the same input, stacked; each row is quantized on its own."""
        parts = [quantize(self._take(name)) for name in names]
        return Quantized(np.concatenate([p.values for p in parts]), np.concatenate([p.scale for p in parts]))

    def _take(self, name: str) -> Float:
        if name not in self._tensors:
            raise InputError(f"the tensor {name!r} is missing", where=self._where)
        self.used.add(name)
        return np.asarray(self._tensors[name], np.float32)


def _rotary_tables(shape: _Shape) -> tuple[Float, Float]:
    frequencies = 1.0 / shape.rope_theta ** (np.arange(0, shape.head_dim, 2, dtype=np.float32) / shape.head_dim)
    angles = np.arange(shape.positions, dtype=np.float32)[:, None] * frequencies.astype(np.float32)[None, :]
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _embed(graph: Graph, weight: Quantized) -> str:
    rows = graph.add("Gather", graph.constant("embedding.int8", weight.values), "input_ids", axis=0)
    scales = graph.add("Gather", graph.constant("embedding.scale", weight.scale[:, None]), "input_ids", axis=0)
    return str(graph.add("Mul", graph.add("Cast", rows, to=TensorProto.FLOAT), scales))


def _rotated(graph: Graph, value: str, heads: int, name: str, weight: Float, shape: _Shape) -> str:
    """Query or key heads: RMSNorm of each head, then the rotary embedding; [B, S, heads * D] in and out."""
    split = graph.reshape(value, 0, 0, heads, shape.head_dim)
    normed = graph.reshape(graph.norm(split, name, weight, shape.eps), 0, 0, heads * shape.head_dim)
    return str(graph.add("RotaryEmbedding", normed, "position_ids", "cos", "sin", domain=CONTRIB, interleaved=0))


def _attention(graph: Graph, normed: str, layer: int, weights: _Weights, shape: _Shape) -> tuple[str, list[str]]:
    """Grouped attention over cached and new positions, without joining them or repeating the shared heads."""
    prefix, size = f"model.layers.{layer}.self_attn", shape.head_dim
    projected = graph.linear(
        normed, f"{prefix}.qkv", weights.matrix(*(f"{prefix}.{part}_proj.weight" for part in "qkv"))
    )
    q, k, v = graph.split(projected, shape.heads * size, shape.kv_heads * size, shape.kv_heads * size)
    q = _rotated(graph, q, shape.heads, f"{prefix}.q_norm.weight", weights.vector(f"{prefix}.q_norm.weight"), shape)
    k = _rotated(graph, k, shape.kv_heads, f"{prefix}.k_norm.weight", weights.vector(f"{prefix}.k_norm.weight"), shape)
    q = graph.add("Transpose", graph.reshape(q, 0, 0, shape.heads, size), perm=[0, 2, 1, 3])
    q = graph.reshape(q, 0, shape.kv_heads, -1, size)
    k, v = (
        graph.add("Transpose", graph.reshape(part, 0, 0, shape.kv_heads, size), perm=[0, 2, 1, 3]) for part in (k, v)
    )
    scores = [
        graph.add("FusedMatMul", q, keys, domain=CONTRIB, transB=1, alpha=size**-0.5)
        for keys in (f"past.{2 * layer}", k)
    ]
    together = graph.add("Concat", *scores, axis=-1)
    # [B, KV, G * S, P + S] and [B, KV * G, S, P + S] are the same memory: the mask is added to the second form
    by_head = graph.reshape(together, 0, shape.heads, -1, 0)
    weighed = graph.reshape(graph.add("Softmax", graph.add("Add", by_head, "mask"), axis=-1), 0, shape.kv_heads, -1, 0)
    past, new = graph.add("Split", weighed, "past_and_new", outputs=2, axis=-1)
    mixed = graph.add("Add", graph.add("MatMul", past, f"past.{2 * layer + 1}"), graph.add("MatMul", new, v))
    mixed = graph.add("Transpose", graph.reshape(mixed, 0, shape.heads, -1, size), perm=[0, 2, 1, 3])
    mixed = graph.reshape(mixed, 0, 0, shape.heads * size)
    return graph.linear(mixed, f"{prefix}.o_proj", weights.matrix(f"{prefix}.o_proj.weight")), [k, v]


def _feed_forward(graph: Graph, normed: str, layer: int, weights: _Weights, shape: _Shape) -> str:
    prefix = f"model.layers.{layer}.mlp"
    both = weights.matrix(f"{prefix}.gate_proj.weight", f"{prefix}.up_proj.weight")
    gate, up = graph.split(graph.linear(normed, f"{prefix}.gate_up", both), shape.intermediate, shape.intermediate)
    gated = graph.add("Mul", graph.add("QuickGelu", gate, domain=CONTRIB, alpha=1.0), up)
    return graph.linear(gated, f"{prefix}.down_proj", weights.matrix(f"{prefix}.down_proj.weight"))


def _heads(graph: Graph, hidden: str, weights: _Weights, shape: _Shape) -> None:
    branches = ("risk_level_category", "query_risk_level_category")
    pre = weights.matrix(*(f"{branch}_pre.weight" for branch in branches))
    parts = graph.split(graph.linear(hidden, "heads.pre", pre), shape.inner, shape.inner)
    for branch, part, query, outputs in zip(branches, parts, ("", "query_"), (HEADS[:2], HEADS[2:]), strict=True):
        normed = graph.norm(part, f"{branch}_layernorm", weights.vector(f"{branch}_layernorm.weight"), shape.eps)
        for head, output in zip(("risk_level_head", "category_head"), outputs, strict=True):
            name = f"{query}{head}.weight"
            graph.add("MatMul", normed, graph.constant(name, weights.vector(name).T), name=output)


def _build(shape: _Shape, weights: _Weights) -> Graph:
    graph = Graph()
    cos, sin = _rotary_tables(shape)
    graph.constant("cos", cos)
    graph.constant("sin", sin)
    cached, new = (
        graph.add("Gather", graph.add("Shape", of), graph.constant(f"axis.{axis}", np.array([axis], np.int64)))
        for of, axis in (("past.0", 2), ("input_ids", 1))
    )
    graph.add("Concat", cached, new, axis=0, name="past_and_new")
    residual = _embed(graph, weights.matrix("model.embed_tokens.weight"))
    name = "model.layers.0.input_layernorm.weight"
    normed = graph.norm(residual, name, weights.vector(name), shape.eps)
    present: list[str] = []
    for layer in range(shape.layers):
        attended, kept = _attention(graph, normed, layer, weights, shape)
        present += kept
        name = f"model.layers.{layer}.post_attention_layernorm.weight"
        normed, residual = graph.add_norm(attended, residual, name, weights.vector(name), shape.eps)
        grown = _feed_forward(graph, normed, layer, weights, shape)
        last = layer + 1 == shape.layers
        name = "model.norm.weight" if last else f"model.layers.{layer + 1}.input_layernorm.weight"
        normed, residual = graph.add_norm(grown, residual, name, weights.vector(name), shape.eps)
    first = graph.constant("axis.first", np.array([0], np.int64))
    graph.add("Concat", *(graph.add("Unsqueeze", part, first) for part in present), axis=0, name="present")
    _heads(graph, normed, weights, shape)
    return graph


def _model(graph: Graph, shape: _Shape) -> onnx.ModelProto:
    def tensor(name: str, kind: int, *dimensions: int | str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, dimensions)

    number, integer = TensorProto.FLOAT, TensorProto.INT64
    cache = ("B", shape.kv_heads, "P", shape.head_dim)
    inputs = [
        tensor("input_ids", integer, "B", "S"),
        tensor("position_ids", integer, "B", "S"),
        tensor("mask", number, "B", 1, "S", "T"),
        *(tensor(f"past.{index}", number, *cache) for index in range(2 * shape.layers)),
    ]
    outputs = [
        tensor("present", number, 2 * shape.layers, "B", shape.kv_heads, "S", shape.head_dim),
        *(tensor(name, number, "B", "S", count) for name, count in zip(HEADS, shape.classes, strict=True)),
    ]
    body = helper.make_graph(graph.nodes, "edge", inputs, outputs, list(graph.constants.values()))
    domains = [helper.make_opsetid("", _OPSET), helper.make_opsetid(CONTRIB, 1)]
    return helper.make_model(body, opset_imports=domains, ir_version=9, producer_name="tidegate")


def _read_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, Float]]:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (folder / name).is_file():
            raise InputError(f"there is no {name}: expected a checkpoint folder of tidegate train", where=str(folder))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tensors: list[tuple[str, dict[str, Any]]] = deserialize((folder / "model.safetensors").read_bytes())  # type: ignore[no-untyped-call,unused-ignore]
    return config, {name: _float32(tensor, name) for name, tensor in tensors}


def _float32(tensor: Mapping[str, Any], name: str) -> Float:
    """A tensor of a safetensors file as fp32. BF16, which numpy does not know, is the upper half of an fp32."""
    kind, raw = tensor["dtype"], tensor["data"]
    if kind == "BF16":
        values = (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
    elif kind in _DTYPES:
        values = np.frombuffer(raw, _DTYPES[kind]).astype(np.float32)
    else:
        raise InputError(f"the tensor {name!r} is {kind}: expected F32, F16 or BF16", where="model.safetensors")
    return values.reshape(tensor["shape"])


def export_onnx(run: Path, out: Path) -> dict[str, Any]:
    """Write ``model.onnx``, ``config.json``, ``tokenizer.json`` and ``ngrams.npy``, if there is one, into a folder.

    Args:
        run: the folder of a run, with its ``checkpoint/``; or a checkpoint folder itself.
        out: the folder to write, made when it is missing; files of the same names are replaced.

    Returns:
        ``bytes`` of each file and of all together, ``parameters``, and ``relative_error``: the root mean square of
        what rounding changed over that of the weights.

    Raises:
        InputError: when the checkpoint is incomplete, or of a shape that cannot be exported.
    """
    checkpoint = run / "checkpoint" if (run / "checkpoint").is_dir() else run
    config, tensors = _read_checkpoint(checkpoint)
    shape = _Shape.read(config, str(checkpoint / "config.json"))
    weights = _Weights(tensors, str(checkpoint / "model.safetensors"))
    graph = _build(shape, weights)
    if unknown := set(tensors) - weights.used:
        raise InputError(f"tensors that have no place in the graph: {sorted(unknown)}", where=str(checkpoint))
    out.mkdir(parents=True, exist_ok=True)
    (out / "model.onnx").write_bytes(_model(graph, shape).SerializeToString(deterministic=True))
    shipped = [*_SHIPPED, *([_WIDE] if config.get("tidegate", {}).get("wide") else [])]
    for name in shipped:
        if not (checkpoint / name).is_file():
            raise InputError(f"there is no {name}, of which the config speaks", where=str(checkpoint))
        shutil.copyfile(checkpoint / name, out / name)
    sizes = {name: (out / name).stat().st_size for name in ("model.onnx", *shipped)}
    return {
        "bytes": {**sizes, "total": sum(sizes.values())},
        "parameters": int(sum(tensor.size for tensor in tensors.values())),
        "relative_error": _relative_error(tensors),
    }


def _is_quantized(name: str, tensor: Float) -> bool:
    return tensor.ndim == 2 and not name.endswith("_head.weight")


def dequantized(tensors: Mapping[str, Float]) -> dict[str, Float]:
    """A checkpoint as the exported graph computes with it: matrices rounded to 8 bits, all else the same."""
    return {n: quantize(t).float32() if _is_quantized(n, t) else t for n, t in tensors.items()}


def _relative_error(tensors: Mapping[str, Float]) -> float:
    rounded = dequantized(tensors)
    changed = sum(float(np.square(rounded[n] - t).sum()) for n, t in tensors.items() if _is_quantized(n, t))
    whole = sum(float(np.square(t).sum()) for n, t in tensors.items() if _is_quantized(n, t))
    return float(np.sqrt(changed / max(whole, 1e-30)))


def _softmax(logits: Float) -> Float:
    exponent = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(exponent / exponent.sum(axis=-1, keepdims=True), np.float32)


@dataclass(slots=True)
class _Difference:
    """How far two sources of logits are apart over many positions."""

    largest: float = 0.0
    total: float = 0.0
    positions: int = 0
    equal: int = 0

    def count(self, one: Float, other: Float) -> None:
        gap = np.abs(_softmax(one) - _softmax(other)).max(axis=-1)
        self.largest = max(self.largest, float(gap.max()))
        self.total += float(gap.sum())
        self.positions += gap.size
        self.equal += int((one.argmax(axis=-1) == other.argmax(axis=-1)).sum())

    def report(self) -> dict[str, float]:
        return {
            "max_probability_difference": self.largest,
            "mean_probability_difference": self.total / max(1, self.positions),
            "percent_equal_labels": 100.0 * self.equal / max(1, self.positions),
            "positions": self.positions,
        }


def agreement(checkpoint: Path, onnx_folder: Path, sequences: Iterable[Sequence[int]]) -> dict[str, Any]:
    """How well the exported file agrees with torch, at every position of the given sequences and at their last ones.

    Args:
        checkpoint: the checkpoint folder that was exported.
        onnx_folder: what `export_onnx` wrote.
        sequences: token ids with control tokens, as the guard would feed them; none longer than the window.

    Returns:
        ``trained``: against torch in fp32 on the weights as trained; ``rounded``: against torch on the weights rounded
        to 8 bits, which must be equal but for fp32 noise. In each, for every head and for ``all`` and ``last``
        positions: largest and mean difference of probability, percent of equal labels, number of positions.
    """
    config, tensors = _read_checkpoint(checkpoint)
    session = _onnx_logits(onnx_folder, config)
    kinds = {"trained": _torch_logits(config, tensors), "rounded": _torch_logits(config, dequantized(tensors))}
    found = {(k, head, where): _Difference() for k in kinds for head in HEADS for where in ("all", "last")}
    for ids in sequences:
        if not ids:
            continue
        exported = session(ids)
        for kind, torch_logits in kinds.items():
            for head, ours, theirs in zip(HEADS, exported, torch_logits(ids), strict=True):
                found[kind, head, "all"].count(ours, theirs)
                found[kind, head, "last"].count(ours[-1:], theirs[-1:])
    return {
        kind: {head: {where: found[kind, head, where].report() for where in ("all", "last")} for head in HEADS}
        for kind in kinds
    }


Logits = Callable[[Sequence[int]], list[Float]]


def _torch_logits(config: Mapping[str, Any], tensors: Mapping[str, Float]) -> Logits:
    import torch
    from transformers import Qwen3Config

    from tidegate.model.stream import Qwen3ForGuardModel

    model = Qwen3ForGuardModel(Qwen3Config(**{k: v for k, v in config.items() if k != "tidegate"})).float().eval()
    model.load_state_dict({name: torch.from_numpy(np.array(tensor)) for name, tensor in tensors.items()})

    def logits(ids: Sequence[int]) -> list[Float]:
        with torch.inference_mode():
            return [part[0].numpy() for part in model(torch.tensor([list(ids)]))]

    return logits


def _onnx_logits(folder: Path, config: Mapping[str, Any]) -> Logits:
    from tidegate.model.onnx_runtime import onnxruntime

    shape = _Shape.read(config, str(folder))
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    nothing = np.zeros((1, shape.kv_heads, 0, shape.head_dim), np.float32)
    caches = {f"past.{index}": nothing for index in range(2 * shape.layers)}

    def logits(ids: Sequence[int]) -> list[Float]:
        count = len(ids)
        inputs = {
            "input_ids": np.array([ids], np.int64),
            "position_ids": np.arange(count, dtype=np.int64)[None],
            "mask": np.triu(np.full((count, count), -1e9, np.float32), 1)[None, None],
        }
        return [part[0] for part in session.run(list(HEADS), inputs | caches)]

    return logits
