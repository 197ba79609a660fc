"""What a layer does to each row between its products, on a CPU and for few rows; compiled by Numba when first used.

Norms, rotation and gate are a few microseconds of arithmetic for a row, but a dozen calls of PyTorch, each with a new
tensor. Here they are three calls. One thread computes them: for so few rows a second one is not worth waking.
Everything is computed in float32 and rounded once, to the type of the model.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from tidegate.model.attention_cpu import _LOOSE, _array, _exp, _f32, _narrow, _wide

__all__ = ["add_norm", "gate", "rotate", "usable"]


def add_norm(hidden: Tensor, more: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``hidden + more``, rounded, and the RMSNorm of that; all ``[rows, hidden]``. None adds nothing."""
    total, normed = torch.empty_like(hidden), torch.empty_like(hidden)
    added = hidden if more is None else more.contiguous()
    _add_norm(*map(_array, (hidden.contiguous(), added, weight, total, normed)), more is not None, _f32(eps))
    return total, normed


def rotate(heads: Tensor, count: int, weights: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """RMSNorm of each of the first heads, then their rotary embedding (Su et al. 2021), halves paired as in Qwen3.

    Args:
        heads: ``[rows, heads, head_dim]``, contiguous.
        count: how many of the heads, the first ones, are computed.
        weights: of the norms, ``[count, head_dim]``.
        cos, sin: float32, ``[rows, head_dim]``; the first half of ``sin`` is negated.
        eps: of the norms.

    Returns:
        ``[rows, count, head_dim]``.
    """
    rotated = heads.new_empty((len(heads), count, heads.shape[-1]))
    _rotate(*map(_array, (heads, weights, cos, sin, rotated)), _f32(eps))
    return rotated


def gate(both: Tensor) -> Tensor:
    """``silu(first half) * second half`` of ``[rows, 2 * width]``, contiguous."""
    gated = both.new_empty((len(both), both.shape[-1] // 2))
    _gate(_array(both), _array(gated))
    return gated


def usable() -> bool:
    """Whether the kernels compile here."""
    try:
        one = torch.ones((1, 2))
        add_norm(one, one, one[0], 1e-6)
        rotate(one[None], 1, one, one, one, 1e-6)
        gate(one)
    except Exception:
        return False
    return True


@numba.njit(fastmath=_LOOSE, nogil=True, error_model="numpy")
def _add_norm(hidden: Any, more: Any, weight: Any, total: Any, normed: Any, added: Any, eps: Any) -> None:
    rows, size = hidden.shape
    row = np.empty(size, np.float32)
    for r in range(rows):
        squares = _f32(0)
        for i in range(size):
            value = _wide(hidden[r, i])
            if added:
                value += _wide(more[r, i])
            total[r, i] = _narrow(value, total[0, 0])
            row[i] = _wide(total[r, i])
        for i in range(size):
            squares += row[i] * row[i]
        factor = _f32(1.0) / np.sqrt(squares / _f32(size) + eps)
        for i in range(size):
            normed[r, i] = _narrow(row[i] * factor * _wide(weight[i]), normed[0, 0])


@numba.njit(fastmath=_LOOSE, nogil=True, error_model="numpy")
def _rotate(heads: Any, weights: Any, cos: Any, sin: Any, rotated: Any, eps: Any) -> None:
    rows, count, size = rotated.shape
    half = size // 2
    head = np.empty(size, np.float32)
    for r in range(rows):
        for h in range(count):
            squares = _f32(0)
            for i in range(size):
                head[i] = _wide(heads[r, h, i])
            for i in range(size):
                squares += head[i] * head[i]
            factor = _f32(1.0) / np.sqrt(squares / _f32(size) + eps)
            for i in range(size):
                head[i] *= factor * _wide(weights[h, i])
            first, second, out = head[:half], head[half:], rotated[r, h]
            for i in range(half):
                out[i] = _narrow(first[i] * cos[r, i] + second[i] * sin[r, i], rotated[0, 0, 0])
            behind, cos_behind, sin_behind = out[half:], cos[r, half:], sin[r, half:]
            for i in range(half):
                behind[i] = _narrow(second[i] * cos_behind[i] + first[i] * sin_behind[i], rotated[0, 0, 0])


@numba.njit(fastmath=_LOOSE, nogil=True, error_model="numpy")
def _gate(both: Any, gated: Any) -> None:
    rows, width = gated.shape
    for r in range(rows):
        opening, content, out = both[r, :width], both[r, width:], gated[r]
        for i in range(width):
            number = _wide(opening[i])
            power = _exp(-abs(number))
            share = (_f32(1.0) if number >= _f32(0) else power) / (_f32(1.0) + power)
            out[i] = _narrow(number * share * _wide(content[i]), gated[0, 0])
