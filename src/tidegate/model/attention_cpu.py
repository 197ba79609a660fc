"""Attention of few rows over long caches on a CPU, as fast as memory is read; compiled by Numba when first used.

Keys and values are read once and in order, in bfloat16 or float32; everything is computed in float32. The threads share
out the key heads of all texts. Scores are taken in blocks, with a running maximum and sum (online softmax, Milakov and
Gimelshein 2018; blocks as in FlashAttention, Dao et al. 2022).

PyTorch's own kernel for bfloat16 reads a cache at a third of this speed when a key head has two rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Batch", "attend", "batch", "usable"]

_BLOCK = 64
"""Positions whose scores are taken at once."""
_LOOSE = {"reassoc", "contract", "arcp", "nsz"}
"""Sums may be taken in any order; infinities and what is not a number stay what they are."""
_f32 = np.float32
_THREAD_SAFE = ("omp", "tbb")
"""Threading layers of Numba that may be entered from several threads at once."""


class Batch(NamedTuple):
    """Texts that are computed together, by the numbers of `tidegate.model.attention.Span`; int64 ``[texts]`` each."""

    row: NDArray[np.int64]
    """The first of its rows."""
    new: NDArray[np.int64]
    start: NDArray[np.int64]
    cached: NDArray[np.int64]
    threads: int


def batch(spans: Sequence[tuple[int, int, int, int]], threads: int) -> Batch:
    """Texts as (first row, new positions, start in the cache, positions from before)."""
    row, new, start, cached = np.ascontiguousarray(np.array(spans, np.int64).reshape(-1, 4).T)
    return Batch(row, new, start, cached, max(1, min(threads, int(numba.config.NUMBA_NUM_THREADS))))


def attend(texts: Batch, query: Tensor, keys: Tensor, values: Tensor, mixed: Tensor) -> None:
    """Fill the rows of these texts.

    Args:
        texts: what to compute.
        query, mixed: ``[rows, heads, head_dim]``; ``mixed`` contiguous.
        keys, values: ``[kv heads, positions, head_dim]``, contiguous.
    """
    numba.set_num_threads(texts.threads)
    arrays = (_array(tensor) for tensor in (query.contiguous(), keys, values, mixed))
    scale = _f32(query.shape[-1] ** -0.5)
    _attend(*arrays, texts.row, texts.new, texts.start, texts.cached, scale)


def usable() -> bool:
    """Whether the kernel compiles here and its threads may be used from several threads at once."""
    try:
        one = torch.ones((1, 1, 1))
        attend(batch([(0, 1, 0, 0)], 1), one, one, one, torch.empty((1, 1, 1)))
    except Exception:
        return False
    return numba.threading_layer() in _THREAD_SAFE


def _array(tensor: Tensor) -> NDArray[Any]:
    """The same memory; bfloat16 as uint16."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


@intrinsic
def _wide(typing: Any, number: Any) -> Any:
    """A bfloat16 (its bits, as uint16) or a float32 as float32."""
    if number == numba.types.float32:
        return numba.types.float32(number), lambda context, builder, signature, args: args[0]

    def bits(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        whole = ir.IntType(32)
        return builder.bitcast(builder.shl(builder.zext(args[0], whole), ir.Constant(whole, 16)), ir.FloatType())

    return numba.types.float32(number), bits


@intrinsic
def _narrow(typing: Any, number: Any, like: Any) -> Any:
    """A float32 as float32, or as the bits of the nearest bfloat16, ties to even."""
    if like == numba.types.float32:
        return like(number, like), lambda context, builder, signature, args: args[0]

    def bits(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        whole = ir.IntType(32)
        value = builder.bitcast(args[0], whole)
        odd = builder.and_(builder.lshr(value, ir.Constant(whole, 16)), ir.Constant(whole, 1))
        rounded = builder.add(value, builder.add(odd, ir.Constant(whole, 0x7FFF)))
        nan = builder.fcmp_unordered("uno", args[0], args[0])
        return builder.trunc(
            builder.lshr(builder.select(nan, ir.Constant(whole, 0x7FC00000), rounded), ir.Constant(whole, 16)),
            ir.IntType(16),
        )

    return like(number, like), bits


@intrinsic
def _power_of_two(typing: Any, number: Any) -> Any:
    """2 ** number of an int32 from -126 to 127, as float32."""

    def bits(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        whole = ir.IntType(32)
        exponent = builder.add(args[0], ir.Constant(whole, 127))
        return builder.bitcast(builder.shl(exponent, ir.Constant(whole, 23)), ir.FloatType())

    return numba.types.float32(numba.types.int32), bits


@numba.njit(inline="always", fastmath=_LOOSE)
def _exp(number: Any) -> Any:
    """exp of a float32 of at most 0, to 2e-7 of itself; what is below -87 counts as -87.

    2 ** n times a Taylor polynomial of degree 7 on the rest, which is at most half of ln 2 from 0.
    """
    number = _f32(-87.0) if number < _f32(-87.0) else number
    whole = np.floor(number * _f32(1.4426950408889634) + _f32(0.5))
    rest = number - whole * _f32(0.693359375)
    rest = rest + whole * _f32(2.12194440e-4)
    series = _f32(1 / 5040)
    series = series * rest + _f32(1 / 720)
    series = series * rest + _f32(1 / 120)
    series = series * rest + _f32(1 / 24)
    series = series * rest + _f32(1 / 6)
    series = series * rest + _f32(0.5)
    series = series * rest + _f32(1.0)
    series = series * rest + _f32(1.0)
    return series * _power_of_two(np.int32(whole))


@numba.njit(parallel=True, fastmath=_LOOSE, nogil=True)
def _attend(
    query: Any, keys: Any, values: Any, mixed: Any, row: Any, new: Any, start: Any, cached: Any, scale: Any
) -> None:
    texts, kv_heads, size = len(row), keys.shape[0], keys.shape[2]
    group = query.shape[1] // kv_heads
    for unit in numba.prange(texts * kv_heads):
        head = unit // texts
        text = unit - head * texts
        first, rows = row[text], group * new[text]
        total = np.zeros((rows, size), np.float32)
        scaled = np.empty((rows, size), np.float32)
        scores = np.empty((rows, _BLOCK), np.float32)
        most = np.full(rows, -np.inf, np.float32)
        weight = np.zeros(rows, np.float32)
        for r in range(rows):
            for i in range(size):
                scaled[r, i] = _wide(query[first + r // group, head * group + r % group, i]) * scale
        begin, end = start[text], start[text] + cached[text] + new[text]
        for block in range(begin, end, _BLOCK):
            here = min(_BLOCK, end - block)
            for t in range(here):
                for r in range(0, rows - 1, 2):
                    dot, other = _f32(0), _f32(0)
                    for i in range(size):
                        number = _wide(keys[head, block + t, i])
                        dot += scaled[r, i] * number
                        other += scaled[r + 1, i] * number
                    scores[r, t] = dot
                    scores[r + 1, t] = other
                if rows % 2:
                    dot = _f32(0)
                    for i in range(size):
                        dot += scaled[rows - 1, i] * _wide(keys[head, block + t, i])
                    scores[rows - 1, t] = dot
            for r in range(rows):
                seen = min(here, begin + cached[text] + r // group + 1 - block)
                if seen <= 0:
                    for t in range(here):
                        scores[r, t] = _f32(0)
                    continue
                top = most[r]
                for t in range(seen):
                    top = scores[r, t] if scores[r, t] > top else top
                kept = _exp(most[r] - top)
                most[r] = top
                add = _f32(0)
                for t in range(seen):
                    part = _exp(scores[r, t] - top)
                    scores[r, t] = part
                    add += part
                for t in range(seen, here):
                    scores[r, t] = _f32(0)
                weight[r] = weight[r] * kept + add
                for i in range(size):
                    total[r, i] *= kept
            for t in range(0, here - 3, 4):
                for r in range(rows):
                    a, b, c, d = scores[r, t], scores[r, t + 1], scores[r, t + 2], scores[r, t + 3]
                    for i in range(size):
                        total[r, i] += (
                            a * _wide(values[head, block + t, i])
                            + b * _wide(values[head, block + t + 1, i])
                            + c * _wide(values[head, block + t + 2, i])
                            + d * _wide(values[head, block + t + 3, i])
                        )
            for t in range(here - here % 4, here):
                for r in range(rows):
                    part = scores[r, t]
                    for i in range(size):
                        total[r, i] += part * _wide(values[head, block + t, i])
        for r in range(rows):
            for i in range(size):
                mixed[first + r // group, head * group + r % group, i] = _narrow(
                    total[r, i] / weight[r], mixed[0, 0, 0]
                )
