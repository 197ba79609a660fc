"""ONNX graphs, node by node, and matrices in 8 bits: what both exports are written with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

__all__ = ["CONTRIB", "Graph", "Quantized", "quantize"]

Float = NDArray[np.float32]
CONTRIB = "com.microsoft"
"""The operators that ONNX Runtime adds to those of ONNX."""

_CLIPS = np.linspace(1.0, 0.6, 21, dtype=np.float32)
_BLOCK = 4096


class Quantized(NamedTuple):
    """A matrix in 8 bits: ``values * scale[:, None]`` is what it stands for; rows are output channels."""

    values: NDArray[np.int8]
    scale: Float

    def float32(self) -> Float:
        """The matrix that is computed with."""
        return np.multiply(self.values, self.scale[:, None], dtype=np.float32)


def quantize(matrix: Float) -> Quantized:
    """Store a matrix in int8, one symmetric scale per row, each row clipped where its mean squared error is least."""
    scale = np.empty(len(matrix), np.float32)
    values = np.empty(matrix.shape, np.int8)
    for start in range(0, len(matrix), _BLOCK):
        part = slice(start, start + _BLOCK)
        scale[part] = _best_scale(matrix[part])
        values[part] = np.clip(np.rint(matrix[part] / scale[part, None]), -127, 127).astype(np.int8)
    return Quantized(values, scale)


def _best_scale(rows: Float) -> Float:
    peak = np.maximum(np.abs(rows).max(axis=1), np.float32(1e-12)) / np.float32(127)
    best, least = peak.copy(), np.full(len(rows), np.inf, np.float32)
    for clip in _CLIPS:
        scale = peak * clip
        rounded = np.clip(np.rint(rows / scale[:, None]), -127, 127) * scale[:, None]
        error = np.square(rounded - rows).sum(axis=1)
        better = error < least
        best[better], least[better] = scale[better], error[better]
    return np.asarray(best, np.float32)


@dataclass(slots=True)
class Graph:
    """A graph under construction: every method adds a node and gives the name of what comes out."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, onnx.TensorProto] = field(default_factory=dict)

    def add(
        self, kind: str, *inputs: str, outputs: int = 1, name: str = "", domain: str = "", **attributes: Any
    ) -> Any:
        number = len(self.nodes)
        names = [name] if name else [f"{kind}.{number}.{index}" for index in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, f"{kind}.{number}", domain=domain, **attributes))
        return names[0] if outputs == 1 else names

    def constant(self, name: str, values: NDArray[Any]) -> str:
        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(np.ascontiguousarray(values), name)
        return name

    def reshape(self, value: str, *shape: int) -> str:
        name = "shape." + ".".join(map(str, shape))
        return str(self.add("Reshape", value, self.constant(name, np.array(shape, np.int64))))

    def split(self, value: str, *sizes: int) -> list[str]:
        name = "sizes." + ".".join(map(str, sizes))
        parts: list[str] = self.add(
            "Split", value, self.constant(name, np.array(sizes, np.int64)), outputs=len(sizes), axis=-1
        )
        return parts

    def linear(self, value: str, name: str, weight: Quantized) -> str:
        """``value @ weight.T``, the weight stored in int8 and folded to fp32 at load."""
        values = self.add("Cast", self.constant(f"{name}.int8", weight.values.T), to=TensorProto.FLOAT)
        matrix = self.add("Mul", values, self.constant(f"{name}.scale", weight.scale))
        return str(self.add("MatMul", value, matrix))

    def norm(self, value: str, name: str, weight: Float, eps: float) -> str:
        """RMSNorm over the last axis."""
        gamma = self.constant(name, weight)
        return str(self.add("SimplifiedLayerNormalization", value, gamma, axis=-1, epsilon=eps, stash_type=1))

    def add_norm(self, value: str, residual: str, name: str, weight: Float, eps: float) -> tuple[str, str]:
        """The sum of two values after RMSNorm, and the sum itself."""
        node = f"AddNorm.{len(self.nodes)}"
        outputs = [f"{node}.normed", "", "", f"{node}.sum"]
        inputs = [value, residual, self.constant(name, weight)]
        kind = "SkipSimplifiedLayerNormalization"
        self.nodes.append(helper.make_node(kind, inputs, outputs, node, domain=CONTRIB, epsilon=eps))
        return outputs[0], outputs[3]
