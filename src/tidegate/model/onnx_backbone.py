"""Runs a Qwen3 backbone that ``tidegate export`` wrote: layer by layer, on ONNX Runtime, without torch.

The folder holds one ONNX file for what lies between two attentions, and one for attention itself. The new positions of
all texts are rows of one matrix, without padding, so that weights are read once for all of them. Attention runs text by
text on the cache, where it lies; the keys of a text are one block of memory, and nothing is copied or padded to the
longest. Who sees whom is a mask, so that a tree of tokens can be computed as well as a text.

*A row depends on its own text alone.* Weights in 8 bits are multiplied with whole numbers, whose sums are exact in any
order; every other step works on one row. Attention pads the keys that it is given to whole blocks of `_ALIGNED`
positions with weight zero, so that a row adds up its keys in the same order wherever its text was cut. What is left is
how a build of ONNX Runtime orders the sums of a product in float32: by column, for all builds that were looked at.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tidegate.errors import GuardUnavailable, InputError
from tidegate.model.onnx_runtime import onnxruntime

__all__ = [
    "ATTENTION",
    "EXPORT",
    "Block",
    "Cache",
    "OnnxBackbone",
    "Shape",
    "causal_blocks",
    "is_export",
    "masked_block",
    "part_name",
]

Float = NDArray[np.float32]

EXPORT: Final = "export.json"
"""The file that says what an export is: ``kind`` (stream or gen), ``precision``, and ``format``."""
ATTENTION: Final = "attention.onnx"
PRODUCTS: Final = "products.onnx"
PRODUCTS_SIZE: Final = 64
FORMAT: Final = 1
_HIDDEN: Final = np.float32(-1e9)
_ALIGNED: Final = 64
"""Positions in a block of keys: a multiple of what vectors of any processor hold, several at a time."""
_BEYOND: Final = 1024
"""Positions beyond those of a model that can be computed: an answer may stand behind the longest prompt."""
_ROWS: Final = 128
"""Most rows of one text in one product with its keys: the keys behind the last of them are left out."""
_LOAD = threading.Lock()
_memory_is_shared = False


def part_name(number: int) -> str:
    """The file of a part: part 0 ends with the first layer's queries, the last one begins behind the last attention."""
    return f"part.{number:03}.onnx"


def is_export(folder: Path) -> bool:
    """Whether a folder is one that ``tidegate export`` wrote for this module."""
    return (folder / EXPORT).is_file()


@dataclass(frozen=True, slots=True)
class Shape:
    """The numbers of a Qwen3 backbone."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    positions: int
    eps: float
    rope_theta: float

    @classmethod
    def read(cls, config: Mapping[str, Any], where: str) -> Shape:
        """Read a config.

        Raises:
            InputError: when it is not of a Qwen3 model, or of one with scaled rotation, biases or sliding windows.
        """
        if config.get("model_type") != "qwen3" or config.get("hidden_act", "silu") != "silu":
            raise InputError("expected a model of type qwen3", where=where)
        rope = config.get("rope_parameters") or {}
        if rope.get("rope_type", "default") != "default" or config.get("rope_scaling"):
            raise InputError("only the default rotary embedding is supported, without scaling", where=where)
        sliding = config.get("use_sliding_window") or "sliding_attention" in (config.get("layer_types") or ())
        if config.get("attention_bias") or sliding:
            raise InputError("attention biases and sliding windows are not supported", where=where)
        try:
            heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
            return cls(
                layers=int(config["num_hidden_layers"]),
                hidden=hidden,
                heads=heads,
                kv_heads=int(config["num_key_value_heads"]),
                head_dim=int(config.get("head_dim") or hidden // heads),
                intermediate=int(config["intermediate_size"]),
                vocabulary=int(config["vocab_size"]),
                positions=int(config["max_position_embeddings"]),
                eps=float(config["rms_norm_eps"]),
                rope_theta=float(rope.get("rope_theta") or config["rope_theta"]),
            )
        except KeyError as error:
            raise InputError(f"the field {error} is missing", where=where) from None


class Cache:
    """Keys and values of many texts, each ``[layers, positions, key heads, head_dim]`` float32, zero at first.

    Memory is taken when a position is first written.

    Raises:
        GuardUnavailable: when there is no memory.
    """

    def __init__(self, shape: Shape, positions: int) -> None:
        size = (shape.layers, positions + _ALIGNED, shape.kv_heads, shape.head_dim)
        try:
            self.keys, self.values = np.zeros(size, np.float32), np.zeros(size, np.float32)
        except MemoryError as error:
            raise GuardUnavailable(f"no memory for a cache of {positions} positions") from error

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.keys.nbytes + self.values.nbytes

    def move(self, source: int, target: int, length: int) -> None:
        """Copy positions; source and target may overlap."""
        for each in (self.keys, self.values):
            each[:, target : target + length] = each[:, source : source + length].copy()


class Block(NamedTuple):
    """Rows that look at the same keys."""

    rows: slice
    """Among the new positions."""
    keys: slice
    """Where these keys are in the cache; a multiple of `_ALIGNED` positions."""
    mask: Float
    """Added to their scores, ``[query heads of a key head * rows, keys]``: 0 to see, a large negative number not to."""


def causal_blocks(shape: Shape, row: int, new: int, start: int, cached: int) -> Iterator[Block]:
    """A text whose every position sees those before it and itself.

    Args:
        shape: of the model.
        row: where its new positions begin among all new ones.
        new: how many there are.
        start: where the text begins in the cache.
        cached: how many of its positions are there already.
    """
    for first in range(0, new, _ROWS):
        stop = min(new, first + _ROWS)
        seen = np.arange(_padded(cached + stop))[None] <= np.arange(cached + first, cached + stop)[:, None]
        yield _block(shape, slice(row + first, row + stop), start, seen)


def masked_block(shape: Shape, rows: slice, start: int, seen: NDArray[np.bool_]) -> Block:
    """Rows with a mask of their own: ``seen`` is ``[rows, positions]``, true where one is seen."""
    return _block(shape, rows, start, np.pad(seen, ((0, 0), (0, _padded(seen.shape[1]) - seen.shape[1]))))


def _block(shape: Shape, rows: slice, start: int, seen: NDArray[np.bool_]) -> Block:
    mask = np.where(seen, np.float32(0), _HIDDEN)
    return Block(rows, slice(start, start + seen.shape[1]), np.tile(mask, (shape.heads // shape.kv_heads, 1)))


def _padded(positions: int) -> int:
    return -(-positions // _ALIGNED) * _ALIGNED


class Hidden(NamedTuple):
    """What the last part begins with: one row for each new position."""

    mixed: Float
    """What the last attention gave, ``[new, heads * head_dim]``."""
    residual: Float
    """What it is added to after its projection, ``[new, hidden]``."""
    sound: NDArray[np.bool_]
    """Which rows were computed from finite numbers alone, ``[new]``."""

    def at(self, rows: Sequence[int] | NDArray[np.int64]) -> Hidden:
        """Some of these rows."""
        return Hidden(self.mixed[rows], self.residual[rows], self.sound[rows])


class OnnxBackbone:
    """A model in memory. One call at a time.

    Args:
        folder: as ``tidegate export`` writes it.
        threads: how many threads one run may use; None for as many as there are cores.

    Attributes:
        shape: the numbers of the model.
        kind: ``stream`` or ``gen``.
        precision: of its weights.

    Raises:
        GuardUnavailable: when a file is missing or cannot be used; says which.
    """

    def __init__(self, folder: Path, *, threads: int | None = None) -> None:
        about = _read_json(folder / EXPORT)
        if about.get("format") != FORMAT:
            raise GuardUnavailable(f"{folder} is of another version: write it again with tidegate export")
        self.kind = str(about.get("kind"))
        self.precision = str(about.get("precision"))
        self.config: Mapping[str, Any] = _read_json(folder / "config.json")
        """``config.json``."""
        try:
            self.shape = Shape.read(self.config, str(folder / "config.json"))
        except InputError as error:
            raise GuardUnavailable(str(error)) from error
        self._embedding = _Embedding(folder)
        options = _session_options(threads)
        self._attention = _Part(folder / ATTENTION, options)
        self._parts = [_Part(folder / part_name(number), options) for number in range(self.shape.layers + 1)]
        self._cos, self._sin = _rotary_tables(self.shape)
        if self.precision == "int8-fast":
            self._check_products(folder, options)

    def cache(self, positions: int) -> Cache:
        """Room for the keys and values of so many positions."""
        return Cache(self.shape, positions)

    def forward(
        self,
        cache: Cache,
        ids: Sequence[int],
        positions: Sequence[int] | NDArray[np.int64],
        slots: NDArray[np.int64] | slice,
        blocks: Sequence[Block],
    ) -> Hidden:
        """Compute new positions and keep their keys and values.

        Args:
            cache: what the blocks look at.
            ids: the token of each.
            positions: how many tokens of its own text are before each.
            slots: where in the cache each goes.
            blocks: who sees whom; together they have each row once.
        """
        shape, new = self.shape, len(ids)
        at = np.asarray(positions, np.int64)
        rotation: dict[str, NDArray[Any]] = {
            "cos": self._cos[at],
            "sin": self._sin[at],
            "at": np.arange(new, dtype=np.int64)[None],
        }
        width, key_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        out: dict[str, NDArray[Any]] = {
            "q": np.empty((new, width), np.float32),
            "k": np.empty((new, key_width), np.float32),
            "v": np.empty((new, key_width), np.float32),
        }
        mixed, residual = np.empty((new, width), np.float32), self._embedding.rows(ids)
        self._parts[0].run({"residual": residual, **rotation}, out)
        last, sound = shape.layers - 1, np.ones(new, np.bool_)
        for layer in range(shape.layers):
            sound &= self._keep(cache, layer, slots, out)
            self._attend(cache, layer, blocks, out["q"], mixed)
            if layer < last:
                grown = np.empty_like(residual)
                inputs = {"mixed": mixed, "residual": residual, **rotation}
                self._parts[layer + 1].run(inputs, out | {"sum": grown})
                residual = grown
        sound &= np.isfinite(residual).all(axis=1) & np.isfinite(mixed).all(axis=1)
        return Hidden(mixed, residual, sound)

    def finish(self, hidden: Hidden, inputs: Mapping[str, NDArray[Any]] | None = None) -> dict[str, NDArray[Any]]:
        """The last part on rows of hidden states; what it gives depends on the kind of model."""
        return self._parts[-1].call({"mixed": hidden.mixed, "residual": hidden.residual, **(inputs or {})})

    def _keep(
        self, cache: Cache, layer: int, slots: NDArray[np.int64] | slice, new: Mapping[str, Float]
    ) -> NDArray[np.bool_] | np.bool_:
        """Write keys and values of a layer; returns which rows are finite. What others read as padding must be."""
        heads = (-1, self.shape.kv_heads, self.shape.head_dim)
        sound: NDArray[np.bool_] | np.bool_ = np.bool_(True)
        for each, part in ((cache.keys, new["k"]), (cache.values, new["v"])):
            if not np.isfinite(part.sum()):
                sound = sound & np.isfinite(part).all(axis=1)
                np.nan_to_num(part, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
            each[layer, slots] = part.reshape(heads)
        return sound

    def _attend(self, cache: Cache, layer: int, blocks: Sequence[Block], query: Float, mixed: Float) -> None:
        for rows, keys, mask in blocks:
            inputs = {
                "q": query[rows],
                "keys": cache.keys[layer, keys],
                "values": cache.values[layer, keys],
                "mask": mask,
            }
            self._attention.run(inputs, {"mixed": mixed[rows]})

    def _check_products(self, folder: Path, options: onnxruntime.SessionOptions) -> None:
        """Some processors add products of 8 bits in 16, which is too few for the largest of them."""
        largest = np.full((1, PRODUCTS_SIZE), 255, np.uint8)
        (given,) = _Part(folder / PRODUCTS, options).call({"digits": largest}).values()
        if not (given == PRODUCTS_SIZE * 127 * 127).all():
            raise GuardUnavailable(f"{folder} is int8-fast, which this processor cannot compute: export it as int8")


class _Embedding:
    """The table of token embeddings, read from disk where it is needed: int8 with a scale for each row, or floats."""

    def __init__(self, folder: Path) -> None:
        self._table = _open_array(folder / "embedding.npy")
        scale = folder / "embedding_scale.npy"
        self._scale = _open_array(scale) if scale.is_file() else None

    def rows(self, ids: Sequence[int]) -> Float:
        """``[tokens, hidden]``."""
        at = np.asarray(ids, np.int64)
        rows = np.asarray(self._table[at])
        if self._scale is not None:
            rows = np.multiply(rows, self._scale[at, None], dtype=np.float32)
        if rows.dtype == np.uint16:  # bfloat16 is the upper half of a float32
            rows = (rows.astype(np.uint32) << 16).view(np.float32)
        return np.asarray(rows, np.float32)


class _Part:
    """One ONNX file."""

    def __init__(self, path: Path, options: onnxruntime.SessionOptions) -> None:
        if not path.is_file():
            raise GuardUnavailable(f"{path} is missing")
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise GuardUnavailable(f"{path} cannot be loaded by ONNX Runtime: {type(error).__name__}") from error

    def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Mapping[str, NDArray[Any]]) -> None:
        """Compute into arrays that are there. All must be contiguous."""
        binding = self._session.io_binding()
        for name, array in inputs.items():
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, _address(array))
        for name, array in outputs.items():
            binding.bind_output(name, "cpu", 0, array.dtype, array.shape, _address(array))
        self._session.run_with_iobinding(binding)

    def call(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Compute into new arrays."""
        names = [output.name for output in self._session.get_outputs()]
        return dict(zip(names, self._session.run(names, dict(inputs)), strict=True))


def _address(array: NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])


def _session_options(threads: int | None) -> onnxruntime.SessionOptions:
    """Options of all sessions of a model: they never run at the same time, and share what memory they need."""
    global _memory_is_shared
    with _LOAD:
        if not _memory_is_shared:
            kind, use = onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, onnxruntime.OrtMemType.DEFAULT
            memory = onnxruntime.OrtMemoryInfo("Cpu", kind, 0, use)
            arena = onnxruntime.OrtArenaCfg({"arena_extend_strategy": 1})
            onnxruntime.create_and_register_allocator(memory, arena)
            _memory_is_shared = True
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = False
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.use_env_allocators", "1")
    return options


def _rotary_tables(shape: Shape) -> tuple[Float, Float]:
    """Cosines and sines, each ``[positions, head_dim / 2]`` (Su et al. 2021), and of some positions more."""
    frequencies = 1.0 / shape.rope_theta ** (np.arange(0, shape.head_dim, 2, dtype=np.float32) / shape.head_dim)
    angles = np.arange(shape.positions + _BEYOND, dtype=np.float32)[:, None] * frequencies.astype(np.float32)[None, :]
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _open_array(path: Path) -> NDArray[Any]:
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise GuardUnavailable(f"{path} is missing or not an array") from error
    return array


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GuardUnavailable(f"{path} is missing or not JSON") from error
    if not isinstance(value, dict):
        raise GuardUnavailable(f"{path} does not hold a JSON object")
    return value
