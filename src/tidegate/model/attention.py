"""Attention of many texts over one cache, each over its own part of it, which is read where it lies.

New positions of all texts are rows of one matrix, without padding. Query heads that share a key head are rows of one
product (grouped-query attention, Ainslie et al. 2023), so that keys and values are read once. Texts with few new rows
need all of their cache for little arithmetic: on a CPU, when Numba is there, one kernel of our own computes all of them
(`tidegate.model.attention_cpu`), as fast as memory is read. All others go one by one through
``scaled_dot_product_attention`` of PyTorch, on every device.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

__all__ = ["Attention", "Span", "kernel"]

_MOST_ROWS = 8
"""Up to so many rows for a key head our kernel is the faster one."""


_ALONE = 512
"""Fewer keys than this, over all texts and key heads, are not worth a second thread."""


class Span(NamedTuple):
    """One text in a forward."""

    start: int
    """Where its part of the cache begins."""
    cached: int
    """How many positions are there from before."""
    new: int
    """How many follow; they are in the cache when attention is computed."""

    @property
    def stop(self) -> int:
        """Where its positions end, the new ones included."""
        return self.start + self.cached + self.new


class _Part(NamedTuple):
    rows: slice
    region: slice
    mask: Tensor | None
    """What is added to its scores, ``[group * new, positions]``; None when nothing is hidden, or plainly causal."""
    causal: bool
    """All its positions are new."""


class Attention:
    """What is the same for all layers of one forward.

    Args:
        spans: the texts, in the order of their rows; each has at least one new position.
        heads: query heads; a multiple of ``kv_heads``.
        kv_heads: key heads.
        dtype, device: of queries and cache.
        fast: whether the kernel of our own is used where there is one; else PyTorch alone.
        trees: for each text, boolean ``[new, new]``, which of the new positions each one sees; None, or None for a
            text, for itself and those before it.
    """

    def __init__(
        self,
        spans: Sequence[Span],
        *,
        heads: int,
        kv_heads: int,
        dtype: torch.dtype,
        device: torch.device,
        fast: bool = True,
        trees: Sequence[Tensor | None] | None = None,
    ) -> None:
        self._heads, self._kv_heads, self._group = heads, kv_heads, heads // kv_heads
        self._dtype, self._device = dtype, device
        few = self._group * max(1, _MOST_ROWS // self._group)
        self._kernel = kernel() if fast and device.type == "cpu" and dtype in (torch.bfloat16, torch.float32) else None
        batch, self._parts, row = [], [], 0
        for span, tree in zip(spans, trees or [None] * len(spans), strict=True):
            if self._kernel is not None and tree is None and self._group * span.new <= few:
                batch.append((row, span.new, span.start, span.cached))
            else:
                self._parts.append(self._part(span, row, tree))
            row += span.new
        self._batch = self._kernel.batch(batch, self._threads(spans)) if self._kernel is not None and batch else None

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Scaled by ``head_dim ** -0.5``, causal within each text.

        Args:
            query: ``[rows, heads, head_dim]``.
            keys, values: the cache, ``[kv heads, positions, head_dim]``, contiguous.

        Returns:
            ``[rows, heads, head_dim]``.
        """
        mixed = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        if self._batch is not None and self._kernel is not None:
            self._kernel.attend(self._batch, query, keys, values, mixed)
        for part in self._parts:
            mixed[part.rows] = self._attend(
                query[part.rows], keys[None, :, part.region], values[None, :, part.region], part
            )
        return mixed

    def _threads(self, spans: Sequence[Span]) -> int:
        few = self._kv_heads * sum(span.cached + span.new for span in spans) < _ALONE
        return 1 if few else torch.get_num_threads()

    def _part(self, span: Span, row: int, tree: Tensor | None) -> _Part:
        """A new position sees all cached ones, and of the new ones those that the tree says, or those before it."""
        region = slice(span.start, span.stop)
        causal = span.new > 1 and not span.cached and tree is None
        mask = None
        if tree is not None or (span.new > 1 and span.cached):
            mask = torch.zeros((span.new, span.cached + span.new), dtype=self._dtype, device=self._device)
            seen = mask.new_ones((span.new, span.new), dtype=torch.bool).tril_() if tree is None else tree
            mask[:, span.cached :].masked_fill_(~seen.to(self._device), -torch.inf)
            mask = mask.repeat(self._group, 1)
        return _Part(slice(row, row + span.new), region, mask, causal)

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, part: _Part) -> Tensor:
        if part.causal:
            query = query.transpose(0, 1)[None]
            mixed = F.scaled_dot_product_attention(query, keys, values, is_causal=True, enable_gqa=True)
            return mixed[0].transpose(0, 1)
        new = len(query)
        query = query.reshape(new, self._kv_heads, self._group, -1).permute(1, 2, 0, 3)
        rows = query.reshape(1, self._kv_heads, self._group * new, -1)
        mixed = F.scaled_dot_product_attention(rows, keys, values, attn_mask=part.mask)
        return mixed.view(self._kv_heads, self._group, new, -1).permute(2, 0, 1, 3).reshape(new, self._heads, -1)


@cache
def kernel() -> ModuleType | None:
    """The module of our own kernel; None where it cannot be used."""
    try:
        from tidegate.model import attention_cpu
    except ImportError:
        return None
    return attention_cpu if attention_cpu.usable() else None
