"""What a processor can compute at best, and the least that a Gen verdict and a step of live streams take with that.

    python benchmarks/limits.py [--threads 2] [--rows 16 112 900]

Bare products of matrices in the shapes of the 0.6B model, each with the weights of several layers in turns, so that
they are as far from the caches as in a model: bfloat16 by oneDNN, with ordinary weights and with blocked ones
(`tidegate.model.layout`), and unsigned by signed 8 bits by oneDNN, and by ONNX Runtime where it is installed. A rate is
that of the fastest of many repeats. Nothing but these products is computed: no attention, no norm, no Python around it.

Writes ``benchmarks/results/limits-DATE.json``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from stream_setup import arguments, keep, memory_rates, progress, table

SHAPES = {"qkv": (4096, 1024), "output": (1024, 2048), "gate, up": (6144, 1024), "down": (1024, 3072)}
"""Outputs and inputs of the products of one layer."""
LAYERS = 28
COPIES = 6
"""Weights that take turns: more than the caches hold."""
REPEATS = 30

Product = Callable[[int], Any]


def main() -> None:
    """Measure and write."""
    options = _options()
    torch.set_num_threads(options.threads)
    rates = memory_rates(torch.device("cpu"))
    found = []
    with torch.inference_mode():
        for rows in options.rows:
            found += [_floor(name, rows, options.threads) for name in KINDS if _usable(name)]
            progress(f"{rows} rows")
    head = "rows|products|operations/s|28 layers|weights/s"
    figures = {"memory_bytes_per_second": rates, "rows": found}
    text = table(head, map(_cells, found))
    keep("limits", options, figures, f"memory: read {rates['read'] / 1e9:.1f} GB/s\n\n{text}")


def _cells(found: dict[str, Any]) -> list[object]:
    return [
        found["rows"],
        found["products"],
        f"{found['operations_per_second'] / 1e9:.0f} G",
        f"{found['milliseconds']:.1f} ms",
        f"{found['weight_bytes_per_second'] / 1e9:.1f} GB/s",
    ]


def _options() -> argparse.Namespace:
    parser = arguments(__doc__ or "")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 112, 900], help="new positions of a forward")
    return parser.parse_args()


def _floor(name: str, rows: int, threads: int) -> dict[str, Any]:
    """The least time that all linear layers of a forward take."""
    seconds, operations, size = 0.0, 0, 0
    for outputs, inputs in SHAPES.values():
        seconds += LAYERS * _fastest(KINDS[name](rows, outputs, inputs, threads))
        operations += LAYERS * 2 * rows * outputs * inputs
        size += LAYERS * outputs * inputs * (1 if "8 bits" in name else 2)
    return {
        "rows": rows,
        "products": name,
        "milliseconds": seconds * 1e3,
        "operations_per_second": operations / seconds,
        "weight_bytes_per_second": size / seconds,
    }


def _fastest(product: Product) -> float:
    for turn in range(COPIES):
        product(turn)
    taken = []
    for turn in range(REPEATS):
        began = time.perf_counter()
        product(turn % COPIES)
        taken.append(time.perf_counter() - began)
    return min(taken)


def _weights(outputs: int, inputs: int) -> Iterator[torch.Tensor]:
    for seed in range(COPIES):
        yield torch.randn((outputs, inputs), generator=torch.Generator().manual_seed(seed))


def _ordinary(rows: int, outputs: int, inputs: int, threads: int) -> Product:
    given = torch.randn(rows, inputs).bfloat16()
    weights = [weight.bfloat16() for weight in _weights(outputs, inputs)]
    return lambda turn: torch.nn.functional.linear(given, weights[turn])


def _blocked(rows: int, outputs: int, inputs: int, threads: int) -> Product:
    given = torch.randn(max(rows, 4), inputs).bfloat16()  # as `Projection` does
    ops = torch.ops.mkldnn
    weights = [ops._reorder_linear_weight(weight.bfloat16(), 16) for weight in _weights(outputs, inputs)]
    return lambda turn: ops._linear_pointwise(given, weights[turn], None, "none", [], "")


def _whole_numbers(rows: int, outputs: int, inputs: int) -> tuple[np.ndarray, list[np.ndarray]]:
    rng = np.random.default_rng(0)
    weights = [rng.integers(-127, 128, (outputs, inputs)).astype(np.int8) for _ in range(COPIES)]
    return rng.integers(1, 256, (rows, inputs)).astype(np.uint8), weights


def _onednn(rows: int, outputs: int, inputs: int, threads: int) -> Product:
    digits, weights = _whole_numbers(rows, outputs, inputs)
    ops, given = torch.ops.onednn, torch.from_numpy(digits)
    packed = [ops.qlinear_prepack(torch.from_numpy(weight), None) for weight in weights]
    scales, zeros = torch.ones(outputs), torch.zeros(outputs, dtype=torch.int64)
    return lambda turn: ops.qlinear_pointwise(
        given, 1.0, 128, packed[turn], scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )


def _onnxruntime(rows: int, outputs: int, inputs: int, threads: int) -> Product:
    from onnx import TensorProto, helper

    from tidegate.model.onnx_runtime import onnxruntime
    from tidegate.train.graph import CONTRIB, Graph

    digits, weights = _whole_numbers(rows, outputs, inputs)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    made = np.empty((rows, outputs), np.float32)
    bindings = []
    for weight in weights:
        graph = Graph()
        constants = {
            "weight": weight.T,
            "unit": np.array(1, np.float32),
            "scale": np.ones(outputs, np.float32),
            "zero": np.array(128, np.uint8),
        }
        inputs_of = ["digits", *(graph.constant(name, values) for name, values in constants.items())]
        graph.add("MatMulIntegerToFloat", *inputs_of, domain=CONTRIB, name="made")
        body = helper.make_graph(
            graph.nodes,
            "limits",
            [helper.make_tensor_value_info("digits", TensorProto.UINT8, digits.shape)],
            [helper.make_tensor_value_info("made", TensorProto.FLOAT, made.shape)],
            list(graph.constants.values()),
        )
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid(CONTRIB, 1)]
        model = helper.make_model(body, opset_imports=opsets, ir_version=10)
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        binding = session.io_binding()
        binding.bind_input("digits", "cpu", 0, digits.dtype, digits.shape, digits.ctypes.data)
        binding.bind_output("made", "cpu", 0, made.dtype, made.shape, made.ctypes.data)
        bindings.append((session, binding))

    def product(turn: int) -> Any:
        session, binding = bindings[turn]
        session.run_with_iobinding(binding)
        return digits, made  # bound by their addresses: they must live as long as this

    return product


KINDS: dict[str, Callable[[int, int, int, int], Product]] = {
    "bfloat16, ordinary": _ordinary,
    "bfloat16, blocked": _blocked,
    "8 bits, oneDNN": _onednn,
    "8 bits, ONNX Runtime": _onnxruntime,
}


def _usable(name: str) -> bool:
    """Whether this kind can be computed here; says so where it cannot."""
    try:
        KINDS[name](4, 64, 64, 1)(0)
    except (ImportError, RuntimeError, AttributeError) as error:
        progress(f"{name}: not here: {type(error).__name__}")
        return False
    return True


if __name__ == "__main__":
    main()
