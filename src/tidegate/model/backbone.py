"""A Qwen3 backbone over the rows of one or many texts: every linear layer once over all of them.

What the layers of transformers compute, in the same order of operations, with fewer of them: queries and keys of all
heads are normed and rotated together, and the products are those of `tidegate.model.layout`. What lies between the
products of few rows on a CPU is computed by `tidegate.model.rows_cpu`, where Numba is there. Where keys and values are
kept, and which of them a row sees, is up to the caller.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Final, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import PreTrainedModel

from tidegate.model.layout import Projection, lay_out

__all__ = ["Attend", "Backbone"]

_FEW: Final = 64
"""Up to so many rows one thread of our own kernels is faster than the threads of PyTorch."""


class Attend(Protocol):
    """Keeps the keys and values of new rows, and computes what the rows see."""

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """``query [rows, heads, head_dim]``, ``key`` and ``value [rows, key heads, head_dim]``; gives as ``query``."""
        ...


class _Layer(NamedTuple):
    input_norm: Tensor
    qkv: Projection
    head_norms: Tensor
    """Weights of the norms of all query heads and all key heads, ``[heads + key heads, head_dim]``."""
    output: Projection
    post_norm: Tensor
    gate_up: Projection
    activation: nn.Module
    down: Projection


class Backbone:
    """The layers of a model, which are laid out anew for it (`tidegate.model.layout.lay_out`).

    Args:
        model: with a Qwen3 backbone in ``model``, on its device and in its dtype; must not be changed while this is
            used.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        lay_out(model)
        config = model.config
        self._embeddings, self._rotary = model.model.embed_tokens, model.model.rotary_emb
        self._eps: float = config.rms_norm_eps
        self._heads: int = config.num_attention_heads
        self._kv_heads: int = config.num_key_value_heads
        self._head_dim: int = config.head_dim
        self._layers = [self._layer(layer) for layer in model.model.layers]
        weight = self._embeddings.weight
        fits = weight.device.type == "cpu" and weight.dtype in (torch.bfloat16, torch.float32)
        self._kernels = _kernels() if fits and config.hidden_act == "silu" and self._head_dim % 2 == 0 else None

    def forward(self, ids: Tensor, positions: Tensor, attend: Attend, wanted: Tensor | None = None) -> Tensor:
        """Hidden states before the final norm.

        Args:
            ids: int64 ``[rows]``.
            positions: of each row in its text, int64 ``[rows]``.
            attend: called once for each layer, in order.
            wanted: int64, the rows whose hidden states are asked for; None for all. Of others the last layer computes
                keys and values alone.

        Returns:
            ``[rows, hidden]``, those that are wanted.
        """
        if self._kernels is not None and len(ids) <= _FEW:
            return self._few(self._kernels, ids, positions, attend, wanted)
        hidden = self._embeddings(ids)
        cos, sin = self._rotary(hidden[None], positions[None])
        cos, sin = cos[0].unsqueeze(1), _half_negated(sin[0]).unsqueeze(1)
        rows, both, last = len(ids), self._heads + self._kv_heads, len(self._layers) - 1
        for number, layer in enumerate(self._layers):
            normed = F.rms_norm(hidden, hidden.shape[-1:], layer.input_norm, self._eps)
            heads = layer.qkv(normed).view(rows, -1, self._head_dim)
            query, key = self._rotated(heads[:, :both], layer.head_norms, cos, sin).split(
                (self._heads, self._kv_heads), 1
            )
            mixed = attend(number, query, key, heads[:, both:]).reshape(rows, -1)
            if wanted is not None and number == last:
                mixed, hidden = mixed[wanted], hidden[wanted]
            hidden = hidden + layer.output(mixed)
            normed = F.rms_norm(hidden, hidden.shape[-1:], layer.post_norm, self._eps)
            gate, up = layer.gate_up(normed).chunk(2, dim=-1)
            hidden = hidden + layer.down(layer.activation(gate) * up)
        return hidden

    def _few(
        self, kernels: ModuleType, ids: Tensor, positions: Tensor, attend: Attend, wanted: Tensor | None
    ) -> Tensor:
        """As `forward`, with our own kernels between the products."""
        hidden = self._embeddings(ids)
        cos, sin = self._rotary(hidden[None].float(), positions[None])
        cos, sin = cos[0].contiguous(), _half_negated(sin[0])
        rows, both, last = len(ids), self._heads + self._kv_heads, len(self._layers) - 1
        grown: Tensor | None = None
        for number, layer in enumerate(self._layers):
            hidden, normed = kernels.add_norm(hidden, grown, layer.input_norm, self._eps)
            heads = layer.qkv(normed).view(rows, -1, self._head_dim)
            query, key = kernels.rotate(heads, both, layer.head_norms, cos, sin, self._eps).split(
                (self._heads, self._kv_heads), 1
            )
            mixed = attend(number, query, key, heads[:, both:]).reshape(rows, -1)
            if wanted is not None and number == last:
                mixed, hidden = mixed[wanted], hidden[wanted]
            hidden, normed = kernels.add_norm(hidden, layer.output(mixed), layer.post_norm, self._eps)
            grown = layer.down(kernels.gate(layer.gate_up(normed)))
        return hidden if grown is None else hidden + grown

    def _rotated(self, heads: Tensor, weights: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Norm of each head, then rotary position embedding (Su et al. 2021), halves paired as in Qwen3."""
        heads = F.rms_norm(heads, heads.shape[-1:], None, self._eps) * weights
        first, second = heads.chunk(2, dim=-1)
        return heads * cos + torch.cat((second, first), dim=-1) * sin

    def _layer(self, layer: nn.Module) -> _Layer:
        attention = layer.self_attn
        norms = [attention.q_norm.weight] * self._heads + [attention.k_norm.weight] * self._kv_heads
        return _Layer(
            layer.input_layernorm.weight.detach(),
            attention.qkv_proj,
            torch.stack(norms).detach(),
            attention.o_proj,
            layer.post_attention_layernorm.weight.detach(),
            layer.mlp.gate_up_proj,
            layer.mlp.act_fn,
            layer.mlp.down_proj,
        )


@cache
def _kernels() -> ModuleType | None:
    """The module of our own kernels; None where they cannot be used."""
    try:
        from tidegate.model import rows_cpu
    except ImportError:
        return None
    return rows_cpu if rows_cpu.usable() else None


def _half_negated(sin: Tensor) -> Tensor:
    """The factors of the swapped halves: the first half is what was the second one, negated."""
    first, second = sin.chunk(2, dim=-1)
    return torch.cat((-first, second), dim=-1)
