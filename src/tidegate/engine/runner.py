"""One forward for many streams: all their new positions in one matrix, each stream's attention on its own cache.

The new positions of all streams are concatenated, without padding, so that every linear layer runs once over
``[new positions, hidden]``: with one new token of each of 64 streams the weights are read once and not 64 times.
Attention runs stream by stream on views of the cache, where the scheduler has put it; no cache is copied or padded.
Query heads that share a key head become rows of one matrix (grouped-query attention, Ainslie et al. 2023), so that keys
and values are read once. The weights are those of the model, used where they are; the heads are computed only at the
positions that are asked for, and only the branch that is.

In exact arithmetic a stream's logits depend on its own tokens alone. In floating point, a matrix product may sum in
another order when it has other rows beside it: how tokens are cut into forwards, and what shares them, changes logits
by rounding and by no more (fp32: probabilities within 1e-5 of one full forward, under test).

Knows no scheduling and no text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tidegate.engine.scheduler import Piece, Step
from tidegate.engine.slots import Move
from tidegate.errors import GuardUnavailable
from tidegate.model.stream import Qwen3ForGuardModel
from tidegate.types import Target

__all__ = ["Logits", "Runner"]


class Logits(NamedTuple):
    """One branch at some positions of one stream, float32; the order of classes is that of the model's config."""

    risk: NDArray[np.float32]
    """``[positions, 3]``."""
    category: NDArray[np.float32]
    """``[positions, 8]`` of a response, ``[positions, 9]`` of a prompt."""


class _Batch(NamedTuple):
    """What all layers share."""

    slots: Tensor
    """Where in the cache each new position goes: int64 ``[new]``."""
    cos: Tensor
    """Rotary factors ``[new, 1, head_dim]``."""
    sin: Tensor
    parts: tuple[_Part, ...]


class _Part(NamedTuple):
    rows: slice
    """Its new positions among those of the batch."""
    region: slice
    """Its positions in the cache, the new ones included."""
    mask: Tensor | None
    """What is added to its scores, ``[group * new, positions]``; None when nothing is hidden, or plainly causal."""
    causal: bool
    """All its positions are new."""


class Runner:
    """A model and its cache, on the device and in the dtype of the model.

    Args:
        model: the weights; used as they are, and must not change while streams are open.
        positions: how many positions the cache has.

    Raises:
        GuardUnavailable: when the model has layers with sliding windows, or there is no memory for the cache.
    """

    def __init__(self, model: Qwen3ForGuardModel, positions: int) -> None:
        config = model.config
        if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
            raise GuardUnavailable("the model has layers with sliding windows, which the engine does not compute")
        self._model = model
        self._heads: int = config.num_attention_heads
        self._kv_heads: int = config.num_key_value_heads
        self._head_dim: int = config.head_dim
        weight = model.model.embed_tokens.weight
        self._device, self._dtype = weight.device, weight.dtype
        shape = (config.num_hidden_layers, self._kv_heads, positions, self._head_dim)
        try:
            self._keys = torch.empty(shape, dtype=self._dtype, device=self._device)
            self._values = torch.empty(shape, dtype=self._dtype, device=self._device)
        except (RuntimeError, MemoryError) as error:
            raise GuardUnavailable(f"no memory for a cache of {positions} positions on {self._device}") from error

    @property
    def cache_bytes(self) -> int:
        """Size of the cache in bytes."""
        return int(self._keys.nbytes + self._values.nbytes)

    def run(self, step: Step) -> list[Logits | None]:
        """Carry out the moves, compute all pieces at once, and keep their keys and values.

        Returns:
            For each piece its logits where they are asked for; None when one of its positions is not a finite number.
        """
        with torch.inference_mode():
            self._move(step.moves)
            return self._read(step.pieces, self._forward(step.pieces)) if step.pieces else []

    def _move(self, moves: Iterable[Move]) -> None:
        for source, target, length in moves:
            for cache in chain(self._keys, self._values):
                cache[:, target : target + length] = cache[:, source : source + length].clone()

    def _forward(self, pieces: Sequence[Piece]) -> Tensor:
        """Hidden states before the final norm, ``[new, hidden]``."""
        news = [len(piece.ids) for piece in pieces]
        ids = list(chain.from_iterable(piece.ids for piece in pieces))
        positions = list(chain.from_iterable(range(p.cached, p.cached + n) for p, n in zip(pieces, news, strict=True)))
        offsets = [piece.start for piece, new in zip(pieces, news, strict=True) for _ in range(new)]
        numbers = torch.tensor([ids, positions, offsets]).to(self._device)
        hidden = self._model.model.embed_tokens(numbers[0])
        cos, sin = self._model.model.rotary_emb(hidden[None], numbers[1][None])
        parts = tuple(self._parts(pieces))
        batch = _Batch(numbers[1] + numbers[2], cos[0].unsqueeze(1), sin[0].unsqueeze(1), parts)
        for layer, keys, values in zip(self._model.model.layers, self._keys, self._values, strict=True):
            hidden = hidden + self._attention(layer, layer.input_layernorm(hidden), keys, values, batch)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return hidden

    def _parts(self, pieces: Sequence[Piece]) -> Iterator[_Part]:
        row = 0
        for piece in pieces:
            new = len(piece.ids)
            mask = self._mask(new, piece.cached) if new > 1 and piece.cached else None
            region = slice(piece.start, piece.start + piece.cached + new)
            yield _Part(slice(row, row + new), region, mask, causal=new > 1 and not piece.cached)
            row += new

    def _mask(self, new: int, cached: int) -> Tensor:
        """Each new position sees all cached ones, the new ones before it and itself; ``[group * new, positions]``."""
        mask = torch.full((new, cached + new), -torch.inf, dtype=self._dtype, device=self._device)
        return mask.triu_(cached + 1).repeat(self._heads // self._kv_heads, 1)

    def _attention(self, layer: nn.Module, hidden: Tensor, keys: Tensor, values: Tensor, batch: _Batch) -> Tensor:
        """What attention adds to ``[new, hidden]``; writes the new keys and values ``[kv heads, positions, D]``."""
        attention = layer.self_attn
        shape = (len(hidden), -1, self._head_dim)
        query = _rotated(attention.q_norm(attention.q_proj(hidden).view(shape)), batch)
        key = _rotated(attention.k_norm(attention.k_proj(hidden).view(shape)), batch)
        keys.index_copy_(1, batch.slots, key.transpose(0, 1))
        values.index_copy_(1, batch.slots, attention.v_proj(hidden).view(shape).transpose(0, 1))
        mixed = torch.empty_like(query)
        for part in batch.parts:
            seen = keys[:, part.region], values[:, part.region]
            mixed[part.rows] = self._attend(query[part.rows], *seen, part, attention.scaling)
        return attention.o_proj(mixed.view(len(hidden), -1))

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, part: _Part, scale: float) -> Tensor:
        """Attention of one stream: query ``[new, heads, D]``, keys and values ``[kv heads, positions, D]``."""
        attend = nn.functional.scaled_dot_product_attention
        keys, values = keys[None], values[None]
        if part.causal:
            query = query.transpose(0, 1)[None]
            mixed = attend(query, keys, values, is_causal=True, scale=scale, enable_gqa=True)
            return mixed[0].transpose(0, 1)
        new, group = len(query), self._heads // self._kv_heads
        query = query.view(new, self._kv_heads, group, -1).permute(1, 2, 0, 3)
        rows = query.reshape(1, self._kv_heads, group * new, -1)
        mixed = attend(rows, keys, values, attn_mask=part.mask, scale=scale)
        return mixed.view(self._kv_heads, group, new, -1).permute(2, 0, 1, 3).reshape(new, self._heads, -1)

    def _read(self, pieces: Sequence[Piece], hidden: Tensor) -> list[Logits | None]:
        finite = torch.isfinite(hidden.abs().amax(-1)).tolist()
        stops = np.cumsum([len(piece.ids) for piece in pieces]).tolist()
        rows = [list(range(stop - piece.wanted, stop)) for piece, stop in zip(pieces, stops, strict=True)]
        results: list[Logits | None] = [None] * len(pieces)
        for target in Target:
            mine = [index for index, piece in enumerate(pieces) if piece.target is target]
            if not mine:
                continue
            at = list(chain.from_iterable(rows[index] for index in mine))
            logits = self._branch(target, hidden[torch.tensor(at, dtype=torch.long, device=self._device)])
            start = 0
            for index in mine:
                stop = start + pieces[index].wanted
                part = Logits(logits.risk[start:stop].copy(), logits.category[start:stop].copy())
                sound = all(finite[stops[index] - len(pieces[index].ids) : stops[index]])
                results[index] = part if sound and all(np.isfinite(array).all() for array in part) else None
                start = stop
        return results

    def _branch(self, target: Target, hidden: Tensor) -> Logits:
        """One branch on hidden states before the final norm, ``[positions, hidden]``."""
        model = self._model
        hidden = model.model.norm(hidden)
        if target is Target.PROMPT:
            inner = model.query_risk_level_category_layernorm(model.query_risk_level_category_pre(hidden))
            heads = model.query_risk_level_head(inner), model.query_category_head(inner)
        else:
            inner = model.risk_level_category_layernorm(model.risk_level_category_pre(hidden))
            heads = model.risk_level_head(inner), model.category_head(inner)
        return Logits(*(head.float().cpu().numpy() for head in heads))


def _rotated(heads: Tensor, batch: _Batch) -> Tensor:
    """Rotary position embedding (Su et al. 2021) of ``[new, heads, head_dim]``, halves paired as in Qwen3."""
    first, second = heads.chunk(2, dim=-1)
    return heads * batch.cos + torch.cat((-second, first), dim=-1) * batch.sin
