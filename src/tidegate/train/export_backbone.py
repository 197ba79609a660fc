"""Official checkpoints, and others of their shape, as ONNX: Stream and Gen, of any size, one layer after the other.

What `tidegate.model.onnx_backbone` reads: ``export.json``, the config and the tokenizer; the token embeddings as an
array; ``attention.onnx``; and ``part.NNN.onnx`` for what lies between two attentions, so that no file is larger than
one layer. All files together are one model; nothing is written twice.

A part has these inputs and outputs (N new positions, float32 unless said):
    in, but for the first: ``mixed`` [N, heads * D], ``residual`` [N, hidden]; the first has ``residual`` alone;
    in, but for the last: ``cos`` and ``sin`` [N, D / 2] of each position, ``at`` int64 [1, N] which is 0 to N - 1;
    out, but for the last: ``q`` [N, heads * D], ``k`` and ``v`` [N, key heads * D], rotated, and ``sum`` [N, hidden];
    out of the last, Stream: the four heads; Gen: ``best`` int64 [N], the most probable token, and with the input
    ``wanted`` int64 [W, 2] of row and token ``log_probability`` [W].

Precisions:
    ``fp32``: as it is.
    ``int8``: weights in 8 bits with a scale for each output channel. What they are multiplied with is written as two
    digits of 7 bits with a scale for each row, so that all products and sums are of whole numbers: exact, on every
    processor, and the same whatever shares the run.
    ``int8-fast``: with one digit of 8 bits, which is half the work and a coarser number.
    ``int4``: weights in 4 bits, in blocks of 32 with a scale each (``MatMulNBits`` of ONNX Runtime).
Embeddings are in 8 bits with all but ``fp32``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from tidegate.errors import InputError
from tidegate.model.onnx_backbone import ATTENTION, EXPORT, FORMAT, PRODUCTS, PRODUCTS_SIZE, Shape, part_name
from tidegate.train.graph import CONTRIB, Graph, Quantized, quantize

__all__ = ["PRECISIONS", "export_backbone"]

PRECISIONS: Final = ("fp32", "int8", "int8-fast", "int4")

Float = NDArray[np.float32]
_OPSET: Final = 21
_BLOCK: Final = 32
"""Weights of 4 bits that share a scale."""
_TILE: Final = 4096
"""Rows of a matrix that are brought to 4 bits at once."""
_COPIED: Final = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
_NUMPY: Final[Mapping[str, type[np.generic]]] = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
_ARCHITECTURES: Final = {"Qwen3ForGuardModel": "stream", "Qwen3ForCausalLM": "gen"}
_BRANCHES: Final = (("risk_level_category", "", ""), ("query_risk_level_category", "query_", "query_"))


class _Tensors:
    """The tensors of a checkpoint, one file or sharded, read from disk where they are needed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._arrays: dict[str, NDArray[Any]] = {}
        index = folder / "model.safetensors.index.json"
        names = {"model.safetensors"}
        if not (folder / "model.safetensors").is_file() and index.is_file():
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        for name in sorted(names):
            if Path(name).name != name or not (folder / name).is_file():
                raise InputError(f"there is no {name}: expected a checkpoint folder", where=str(folder))
            self._arrays |= _safetensors(folder / name)
        self.used: set[str] = set()

    @property
    def unused(self) -> set[str]:
        """Names of tensors that nobody has asked for."""
        return set(self._arrays) - self.used

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def raw(self, name: str) -> NDArray[Any]:
        """A tensor as it is stored; bfloat16 as uint16.

        Raises:
            InputError: when it is missing.
        """
        if name not in self._arrays:
            raise InputError(f"the tensor {name!r} is missing", where=str(self._folder))
        self.used.add(name)
        return self._arrays[name]

    def float32(self, name: str) -> Float:
        """A tensor in float32.

        Raises:
            InputError: when it is missing, or holds what is not a finite number.
        """
        raw = self.raw(name)
        wide = (raw.astype(np.uint32) << 16).view(np.float32) if raw.dtype == np.uint16 else raw
        tensor = np.asarray(wide, np.float32)
        if not np.isfinite(tensor).all():
            raise InputError(f"the tensor {name!r} holds what is not a finite number", where=str(self._folder))
        return tensor


def _safetensors(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(length))
    except (OSError, ValueError) as error:
        raise InputError("not a safetensors file", where=str(path)) from error
    header.pop("__metadata__", None)
    if odd := [name for name, tensor in header.items() if tensor["dtype"] not in _NUMPY]:
        raise InputError(f"{odd[0]} is not one of {', '.join(_NUMPY)}", where=str(path))
    return {
        name: np.memmap(path, _NUMPY[t["dtype"]], "r", 8 + length + t["data_offsets"][0], tuple(t["shape"]))
        for name, t in header.items()
    }


@dataclass(frozen=True, slots=True)
class _Writer:
    """Writes the parts of one model."""

    tensors: _Tensors
    shape: Shape
    precision: str

    def linear(self, graph: Graph, value: str, *names: str) -> str:
        """``value @ weight.T`` with several weights side by side."""
        weight = np.concatenate([self.tensors.float32(name) for name in names])
        if self.precision == "fp32":
            return str(graph.add("MatMul", value, graph.constant(names[0], weight.T)))
        if self.precision == "int4" and weight.shape[1] % _BLOCK == 0:
            return _linear4(graph, value, names[0], weight)
        quantized = quantize(weight)
        if self.precision == "int8-fast":
            return _linear8(graph, value, names[0], quantized)
        return _linear16(graph, value, names[0], quantized)

    def norm(self, graph: Graph, value: str, name: str) -> str:
        return graph.norm(value, name, self.tensors.float32(name), self.shape.eps)

    def part(self, number: int) -> Graph:
        """Part of this number, but the last."""
        graph = Graph()
        prefix = f"model.layers.{number}"
        if number:
            normed = self._behind_attention(graph, number - 1, f"{prefix}.input_layernorm.weight", "sum")
        else:
            normed = self.norm(graph, "residual", f"{prefix}.input_layernorm.weight")
        shape, attention = self.shape, f"{prefix}.self_attn"
        widths = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.kv_heads * shape.head_dim)
        projected = self.linear(graph, normed, *(f"{attention}.{part}_proj.weight" for part in "qkv"))
        q, k, v = graph.split(projected, *widths)
        self._rotate(graph, q, f"{attention}.q_norm.weight", shape.heads, "q")
        self._rotate(graph, k, f"{attention}.k_norm.weight", shape.kv_heads, "k")
        graph.add("Identity", v, name="v")
        return graph

    def _rotate(self, graph: Graph, value: str, norm: str, heads: int, name: str) -> None:
        """RMSNorm of each head and the rotary embedding."""
        size = self.shape.head_dim
        normed = self.norm(graph, graph.reshape(value, -1, heads, size), norm)
        flat = graph.reshape(normed, 1, -1, heads * size)
        rotated = graph.add("RotaryEmbedding", flat, "at", "cos", "sin", domain=CONTRIB, interleaved=0)
        graph.add("Reshape", rotated, graph.constant(f"{name}.shape", np.array([-1, heads * size])), name=name)

    def _behind_attention(self, graph: Graph, layer: int, norm: str, total: str = "") -> str:
        """The rest of a layer and the norm of the next; ``total`` names the sum that goes on."""
        prefix, eps = f"model.layers.{layer}", self.shape.eps
        mixed = self.linear(graph, "mixed", f"{prefix}.self_attn.o_proj.weight")
        name = f"{prefix}.post_attention_layernorm.weight"
        normed, residual = graph.add_norm(mixed, "residual", name, self.tensors.float32(name), eps)
        both = self.linear(graph, normed, f"{prefix}.mlp.gate_proj.weight", f"{prefix}.mlp.up_proj.weight")
        gate, up = graph.split(both, self.shape.intermediate, self.shape.intermediate)
        gated = graph.add("Mul", graph.add("QuickGelu", gate, domain=CONTRIB, alpha=1.0), up)
        grown = self.linear(graph, gated, f"{prefix}.mlp.down_proj.weight")
        normed, residual = graph.add_norm(grown, residual, norm, self.tensors.float32(norm), eps)
        if total:
            graph.add("Identity", residual, name=total)
        return normed

    def stream_end(self) -> Graph:
        """The last part of a Stream model."""
        graph = Graph()
        hidden = self._behind_attention(graph, self.shape.layers - 1, "model.norm.weight")
        for branch, prefix, output in _BRANCHES:
            inner = self.norm(graph, self.linear(graph, hidden, f"{branch}_pre.weight"), f"{branch}_layernorm.weight")
            for head in ("risk_level", "category"):
                name = f"{prefix}{head}_head.weight"
                weight = graph.constant(name, self.tensors.float32(name).T)
                graph.add("MatMul", inner, weight, name=f"{output}{head.removesuffix('_level')}")
        return graph

    def gen_end(self) -> Graph:
        """The last part of a Gen model."""
        graph = Graph()
        hidden = self._behind_attention(graph, self.shape.layers - 1, "model.norm.weight")
        tied = "lm_head.weight" not in self.tensors
        logits = self.linear(graph, hidden, "model.embed_tokens.weight" if tied else "lm_head.weight")
        graph.add("ArgMax", logits, axis=-1, keepdims=0, name="best")
        axis = graph.constant("axis", np.array([-1], np.int64))
        peak = graph.add("ReduceMax", logits, axis, keepdims=1)
        powers = graph.add("Exp", graph.add("Sub", logits, peak))
        total = graph.add("Add", graph.add("Log", graph.add("ReduceSum", powers, axis, keepdims=1)), peak)
        zero = graph.constant("zero", np.array([0], np.int64))
        one = graph.constant("one", np.array([1], np.int64))
        row = graph.add("Slice", "wanted", zero, one, one)
        whole = graph.add("GatherND", graph.add("Squeeze", total, axis), row)
        graph.add("Sub", graph.add("GatherND", logits, "wanted"), whole, name="log_probability")
        return graph

    def write(self, out: Path, kind: str) -> Iterator[Path]:
        """Write all graphs; gives each file."""
        for number in range(self.shape.layers):
            path = out / part_name(number)
            path.write_bytes(_part(self.part(number), self.shape, first=number == 0))
            yield path
        path = out / part_name(self.shape.layers)
        end = self.stream_end() if kind == "stream" else self.gen_end()
        path.write_bytes(_end(end, self.shape, kind))
        yield path
        path = out / ATTENTION
        path.write_bytes(_attention(self.shape))
        yield path
        if self.precision == "int8-fast":
            path = out / PRODUCTS
            path.write_bytes(_products())
            yield path


def _linear16(graph: Graph, value: str, name: str, weight: Quantized) -> str:
    """Weights in 8 bits; ``x = row_scale * (high + low / 126)`` with digits from -63 to 63.

    The two digits of all rows are one matrix, so that the weights are read once. With 7 bits the sum of two products
    fits in 16, which is what some processors have.
    """
    scale, inverse = _row_scale(graph, value, 63)
    scaled = graph.add("Mul", value, inverse)
    high = graph.add("Round", scaled)
    rest = graph.add("Sub", scaled, high)
    low = graph.add("Mul", rest, graph.constant("low.unit", np.array(126, np.float32)))
    digits = _digits(graph, graph.add("Concat", high, low, axis=0), 64)
    product = _whole_product(graph, digits, name, weight, 64)
    high, low = graph.add("Split", product, outputs=2, axis=0, num_outputs=2)
    low = graph.add("Mul", low, graph.constant("low.step", np.array(1 / 126, np.float32)))
    return str(graph.add("Mul", graph.add("Add", high, low), scale))


def _linear8(graph: Graph, value: str, name: str, weight: Quantized) -> str:
    """Weights in 8 bits; ``x = row_scale * digit`` with digits from -127 to 127."""
    scale, inverse = _row_scale(graph, value, 127)
    product = _whole_product(graph, _digits(graph, graph.add("Mul", value, inverse), 128), name, weight, 128)
    return str(graph.add("Mul", product, scale))


def _row_scale(graph: Graph, value: str, most: int) -> tuple[str, str]:
    """By what each row is divided so that its largest value is ``most``, and the inverse of that."""
    axis = graph.constant("axis", np.array([-1], np.int64))
    peak = graph.add("ReduceMax", graph.add("Abs", value), axis, keepdims=1)
    peak = graph.add("Max", peak, graph.constant("least", np.array(1e-20, np.float32)))
    most_name = graph.constant("most", np.array(most, np.float32))
    return graph.add("Div", peak, most_name), graph.add("Div", most_name, peak)


def _digits(graph: Graph, value: str, zero: int) -> str:
    unit = graph.constant("unit", np.array(1, np.float32))
    return str(graph.add("QuantizeLinear", value, unit, graph.constant("digit.zero", np.array(zero, np.uint8))))


def _whole_product(graph: Graph, digits: str, name: str, weight: Quantized, zero: int) -> str:
    """The product of digits and weights in whole numbers, times the scales of the output channels."""
    values = graph.constant(f"{name}.int8", weight.values.T)
    scale = graph.constant(f"{name}.scale", weight.scale)
    unit, zeros = (
        graph.constant("unit", np.array(1, np.float32)),
        graph.constant("digit.zero", np.array(zero, np.uint8)),
    )
    return str(graph.add("MatMulIntegerToFloat", digits, values, unit, scale, zeros, domain=CONTRIB))


def _linear4(graph: Graph, value: str, name: str, weight: Float) -> str:
    outputs, inputs = weight.shape
    parts = [_four_bits(weight[start : start + _TILE]) for start in range(0, outputs, _TILE)]
    values = graph.constant(f"{name}.int4", np.concatenate([part[0] for part in parts]))
    scale = graph.constant(f"{name}.scale", np.concatenate([part[1] for part in parts]))
    sizes = {"K": inputs, "N": outputs, "bits": 4, "block_size": _BLOCK, "accuracy_level": 4}
    return str(graph.add("MatMulNBits", value, values, scale, domain=CONTRIB, **sizes))


def _four_bits(weight: Float) -> tuple[NDArray[np.uint8], Float]:
    """Blocks of 4 bits, two values in a byte, each block scaled where its mean squared error is least."""
    blocks = weight.reshape(len(weight), -1, _BLOCK)
    signed = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=-1, keepdims=True), axis=-1)
    peak = np.where(np.abs(signed) < 1e-12, np.float32(1e-12), signed) / np.float32(-8)  # the largest becomes -8
    best, least = peak, np.full(peak.shape, np.inf, np.float32)
    for clip in np.linspace(1.0, 0.7, 13, dtype=np.float32):
        scale = peak * clip
        error = np.square(np.clip(np.rint(blocks / scale), -8, 7) * scale - blocks).sum(axis=-1, keepdims=True)
        best, least = np.where(error < least, scale, best), np.minimum(error, least)
    values = (np.clip(np.rint(blocks / best), -8, 7) + 8).astype(np.uint8)
    pairs = np.asarray(values[..., 0::2] | (values[..., 1::2] << 4), np.uint8)
    return pairs, np.ascontiguousarray(best[..., 0], np.float32)


def _attention(shape: Shape) -> bytes:
    """Grouped attention of some rows of one text on its keys (Ainslie et al. 2023): no key is copied or repeated."""
    graph = Graph()
    size, group = shape.head_dim, shape.heads // shape.kv_heads
    split = graph.reshape("q", 0, shape.kv_heads, group, size)
    rows = graph.reshape(graph.add("Transpose", split, perm=[1, 2, 0, 3]), shape.kv_heads, -1, size)
    scores = graph.add("FusedMatMul", rows, "keys", domain=CONTRIB, transBatchB=1, transB=1, alpha=size**-0.5)
    shares = graph.add("Softmax", graph.add("Add", scores, "mask"), axis=-1)
    mixed = graph.add("FusedMatMul", shares, "values", domain=CONTRIB, transBatchB=1)
    mixed = graph.reshape(mixed, shape.kv_heads, group, -1, size)
    joined = graph.constant("joined", np.array([-1, shape.heads * size], np.int64))
    graph.add("Reshape", graph.add("Transpose", mixed, perm=[2, 0, 1, 3]), joined, name="mixed")
    number = TensorProto.FLOAT
    inputs = [
        _value("q", number, "N", shape.heads * size),
        *(_value(name, number, "T", shape.kv_heads, size) for name in ("keys", "values")),
        _value("mask", number, "R", "T"),
    ]
    return _model(graph, inputs, [_value("mixed", number, "N", shape.heads * size)])


def _products() -> bytes:
    """The largest product of whole numbers that there can be, to see whether it is added up right."""
    graph = Graph()
    weight = Quantized(np.full((16, PRODUCTS_SIZE), 127, np.int8), np.ones(16, np.float32))
    graph.add("Identity", _whole_product(graph, "digits", "weight", weight, 128), name="product")
    given = [_value("digits", TensorProto.UINT8, "N", PRODUCTS_SIZE)]
    return _model(graph, given, [_value("product", TensorProto.FLOAT, "N", 16)])


def _part(graph: Graph, shape: Shape, *, first: bool) -> bytes:
    number, size = TensorProto.FLOAT, shape.head_dim
    inputs = [
        *([] if first else [_value("mixed", number, "N", shape.heads * size)]),
        _value("residual", number, "N", shape.hidden),
        *(_value(name, number, "N", size // 2) for name in ("cos", "sin")),
        _value("at", TensorProto.INT64, 1, "N"),
    ]
    outputs = [
        _value("q", number, "N", shape.heads * size),
        *(_value(name, number, "N", shape.kv_heads * size) for name in ("k", "v")),
        *([] if first else [_value("sum", number, "N", shape.hidden)]),
    ]
    return _model(graph, inputs, outputs)


def _end(graph: Graph, shape: Shape, kind: str) -> bytes:
    number, integer = TensorProto.FLOAT, TensorProto.INT64
    inputs = [_value("mixed", number, "N", shape.heads * shape.head_dim), _value("residual", number, "N", shape.hidden)]
    if kind == "gen":
        inputs.append(_value("wanted", integer, "W", 2))
        return _model(graph, inputs, [_value("best", integer, "N"), _value("log_probability", number, "W")])
    heads = [f"{prefix}{head}" for prefix in ("", "query_") for head in ("risk", "category")]
    return _model(graph, inputs, [_value(name, number, "N", f"{name}.classes") for name in heads])


def _value(name: str, kind: int, *dimensions: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, dimensions)


def _model(graph: Graph, inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto]) -> bytes:
    body = helper.make_graph(graph.nodes, "tidegate", inputs, outputs, list(graph.constants.values()))
    domains = [helper.make_opsetid("", _OPSET), helper.make_opsetid(CONTRIB, 1)]
    model = helper.make_model(body, opset_imports=domains, ir_version=10, producer_name="tidegate")
    return bytes(model.SerializeToString(deterministic=True))


def _write_embedding(tensors: _Tensors, precision: str, out: Path) -> Iterator[Path]:
    table = out / "embedding.npy"
    if precision == "fp32":
        np.save(table, tensors.raw("model.embed_tokens.weight"))
    else:
        quantized = quantize(tensors.float32("model.embed_tokens.weight"))
        np.save(table, quantized.values)
        np.save(out / "embedding_scale.npy", quantized.scale)
        yield out / "embedding_scale.npy"
    yield table


def export_backbone(checkpoint: Path, out: Path, *, precision: str = "int8") -> dict[str, Any]:
    """Write a Stream or Gen checkpoint as ONNX, for ``stream:OUT`` or ``gen:OUT``.

    Args:
        checkpoint: a folder in the released layout, its weights in float32, bfloat16 or float16.
        out: the folder to write, made when it is missing; a former export in it is replaced.
        precision: one of `PRECISIONS`.

    Returns:
        ``kind``, ``precision``, ``files``, and their ``bytes`` together.

    Raises:
        InputError: when the checkpoint is incomplete, or of a shape that cannot be exported.
    """
    if precision not in PRECISIONS:
        raise InputError(f"expected one of {', '.join(PRECISIONS)}", where="precision")
    config = _read_config(checkpoint)
    kind = _ARCHITECTURES[config["architectures"][0]]
    writer = _Writer(_Tensors(checkpoint), Shape.read(config, str(checkpoint / "config.json")), precision)
    out.mkdir(parents=True, exist_ok=True)
    for old in [out / EXPORT, out / "embedding_scale.npy", *out.glob("part.*.onnx")]:
        old.unlink(missing_ok=True)
    paths = [*writer.write(out, kind), *_write_embedding(writer.tensors, precision, out)]
    if unknown := writer.tensors.unused - {"lm_head.weight"}:
        raise InputError(f"tensors that have no place in the graph: {sorted(unknown)[:5]}", where=str(checkpoint))
    for name in ("config.json", *_COPIED):
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, out / name)
            paths.append(out / name)
    about = {"format": FORMAT, "kind": kind, "precision": precision}
    (out / EXPORT).write_text(json.dumps(about) + "\n", encoding="utf-8")
    size = sum(path.stat().st_size for path in [*paths, out / EXPORT])
    return {"kind": kind, "precision": precision, "files": len(paths) + 1, "bytes": size}


def _read_config(checkpoint: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError("there is no config.json: expected a checkpoint folder", where=str(checkpoint)) from error
    if (config.get("architectures") or [None])[0] not in _ARCHITECTURES:
        raise InputError(f"expected one of the architectures {', '.join(_ARCHITECTURES)}", where=str(checkpoint))
    return config
