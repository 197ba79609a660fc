"""Lays the weights of a backbone out for inference, in place.

Projections of the same input become one product: queries, keys and values; the gate and what it lets through. On a CPU
the weights are then brought into the blocked form in which oneDNN computes. Rows of an ordinary matrix are read at a
third of the speed of memory when few tokens are computed; blocked weights are read at all of it, and twice as many
tokens of a prompt are computed in the same time. There is one copy of the weights before and after. Products differ by
rounding from those of before.

A model that was laid out can be called and saved as before: its ``state_dict`` has the names and shapes of old. It can
no longer be trained, or moved to another device or dtype.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

__all__ = ["Projection", "lay_out", "placed"]

_FORM_OF_ROWS = 16
"""The blocked form is asked for with a number of rows in mind; all numbers of rows get the same form."""
_LEAST_ROWS = 4
"""oneDNN takes longer for one row than for four."""


class Projection(nn.Module):
    """One or several linear layers over the same input as one product.

    Args:
        layers: whose weights are taken over; at least one.
    """

    def __init__(self, layers: Iterable[nn.Linear]) -> None:
        super().__init__()
        layers = list(layers)
        weight = torch.cat([layer.weight.detach() for layer in layers]) if len(layers) > 1 else layers[0].weight
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        self.bias = nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None
        self._blocked = _blocked(weight.detach())
        self.weight = nn.Parameter(weight.detach(), requires_grad=False) if self._blocked is None else None
        ends = accumulate((len(layer.weight) for layer in layers), initial=0)
        self.slices = [slice(start, stop) for start, stop in pairwise(ends)]
        """Where each of the layers is in the output."""

    def forward(self, rows: Tensor) -> Tensor:
        """``[..., inputs]`` to ``[..., outputs of all layers]``."""
        if self._blocked is None:
            return F.linear(rows, self.weight, self.bias)
        if rows.ndim > 2 or len(rows) >= _LEAST_ROWS:
            return _product(rows, self._blocked, self.bias)
        return _product(F.pad(rows, (0, 0, 0, _LEAST_ROWS - len(rows))), self._blocked, self.bias)[: len(rows)]

    def dense(self) -> Tensor:
        """The weights as ``[outputs, inputs]``; on a CPU a copy."""
        if self._blocked is not None:
            return self._blocked.to_dense()
        assert self.weight is not None
        return self.weight.detach()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if len(self.slices) == 1:  # several layers save themselves, each its part
            _save(self, self.slices[0], destination, prefix)


class _Part(nn.Module):
    """One of the layers of a projection, where a model calls it alone; costs as much as all of them."""

    def __init__(self, whole: Projection, number: int) -> None:
        super().__init__()
        self.__dict__["whole"] = whole  # whose weights are not also those of this module
        self.slice = whole.slices[number]

    def forward(self, rows: Tensor) -> Tensor:
        return self.whole(rows)[..., self.slice]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        _save(self.whole, self.slice, destination, prefix)


def lay_out(model: nn.Module) -> None:
    """Lay out the layers of a Qwen3 backbone; nothing is left to change the second time.

    Args:
        model: with the backbone in ``model``, as `Qwen3ForGuardModel` has it; on its device and in its dtype.
    """
    with torch.no_grad():
        for layer in model.model.layers:
            _join(layer.self_attn, "qkv_proj", ("q_proj", "k_proj", "v_proj"))
            _join(layer.self_attn, "o_proj", ("o_proj",))
            _join(layer.mlp, "gate_up_proj", ("gate_proj", "up_proj"))
            _join(layer.mlp, "down_proj", ("down_proj",))


def placed(layer: nn.Module) -> tuple[nn.Module, slice]:
    """The module that computes a linear layer, and where in its output that layer is: itself, if not laid out."""
    if isinstance(layer, _Part):
        return layer.whole, layer.slice
    return layer, slice(None)


def _save(whole: Projection, part: slice, destination: dict[str, Any], prefix: str) -> None:
    destination[prefix + "weight"] = whole.dense()[part]
    if whole.bias is not None:
        destination[prefix + "bias"] = whole.bias.detach()[part]


def _join(module: nn.Module, name: str, parts: tuple[str, ...]) -> None:
    if isinstance(getattr(module, name, None), Projection):
        return
    whole = Projection(getattr(module, part) for part in parts)
    for number, part in enumerate(parts):
        setattr(module, part, _Part(whole, number))
    setattr(module, name, whole)


def _product(rows: Tensor, blocked: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(rows, blocked, bias, "none", [], "")


def _blocked(weight: Tensor) -> Tensor | None:
    """The blocked form; None where there is none: on other devices, and for types that this processor cannot use."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return None
    ops = torch.ops.mkldnn
    if not all(hasattr(ops, name) for name in ("_reorder_linear_weight", "_linear_pointwise")):
        return None
    if weight.dtype == torch.bfloat16:
        usable = hasattr(ops, "_is_mkldnn_bf16_supported") and ops._is_mkldnn_bf16_supported()
        return ops._reorder_linear_weight(weight, _FORM_OF_ROWS) if usable else None
    return ops._reorder_linear_weight(weight, _FORM_OF_ROWS) if weight.dtype == torch.float32 else None
