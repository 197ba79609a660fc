"""One forward for many streams: all their new positions in one matrix, each stream's attention on its own cache.

The new positions of all streams are concatenated, without padding, so that every linear layer runs once over
``[new positions, hidden]``: with one new token of each of 64 streams the weights are read once and not 64 times.
Attention reads each stream's part of the cache where the scheduler has put it (`tidegate.model.attention`); no cache is
copied or padded. The heads are computed only at the positions that are asked for, and only the branch that is.

In exact arithmetic a stream's logits depend on its own tokens alone. In floating point, a matrix product may sum in
another order when it has other rows beside it: how tokens are cut into forwards, and what shares them, changes logits
by rounding and by no more (fp32: probabilities within 1e-5 of one full forward, under test).

Knows no scheduling and no text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Final

import numpy as np
import torch
from torch import Tensor

from tidegate.engine.logits import Logits
from tidegate.engine.scheduler import Piece, Step
from tidegate.engine.slots import Move
from tidegate.errors import GuardUnavailable
from tidegate.model.attention import Attention, Span
from tidegate.model.backbone import Backbone
from tidegate.model.stream import Qwen3ForGuardModel
from tidegate.model.threads import computed_apart
from tidegate.types import Target

__all__ = ["TOLERANCES", "Runner", "prepared"]


TOLERANCES: Final = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.05}
"""By how much a probability of a runner may differ from that of the model's own forward: rounding, with room."""


class Runner:
    """A model and its cache, on the device and in the dtype of the model.

    Args:
        model: the weights; they are laid out anew for inference, without a second copy (`tidegate.model.layout`), and
            must not change while streams are open.
        positions: how many positions the cache has.

    Raises:
        GuardUnavailable: when the model has layers with sliding windows, or there is no memory for the cache.
    """

    def __init__(self, model: Qwen3ForGuardModel, positions: int) -> None:
        config = model.config
        if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
            raise GuardUnavailable("the model has layers with sliding windows, which the engine does not compute")
        self._model = model
        self._backbone = Backbone(model)
        self._heads: int = config.num_attention_heads
        self._kv_heads: int = config.num_key_value_heads
        weight = model.model.embed_tokens.weight
        self._device, self._dtype = weight.device, weight.dtype
        self._shape = (config.num_hidden_layers, self._kv_heads, positions, config.head_dim)
        try:
            self._keys, self._values = self._empty(), self._empty()
        except (RuntimeError, MemoryError) as error:
            raise GuardUnavailable(f"no memory for a cache of {positions} positions on {self._device}") from error

    def _empty(self) -> Tensor:
        return torch.empty(self._shape, dtype=self._dtype, device=self._device)

    @property
    def cache_bytes(self) -> int:
        """Size of the cache in bytes."""
        return int(self._keys.nbytes + self._values.nbytes)

    def give_back(self) -> None:
        """Give the memory of a cache that nobody uses back to the system.

        On a CPU it takes memory only as far as it is written, so an empty one takes none. On other devices the whole of
        it is taken from the beginning, for others could take it meanwhile: there this does nothing.
        """
        if self._device.type == "cpu":
            self._keys, self._values = self._empty(), self._empty()

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
        spans = [Span(piece.start, piece.cached, len(piece.ids)) for piece in pieces]
        ids = list(chain.from_iterable(piece.ids for piece in pieces))
        positions = list(chain.from_iterable(range(span.cached, span.cached + span.new) for span in spans))
        slots = list(chain.from_iterable(range(span.start + span.cached, span.stop) for span in spans))
        rows = torch.tensor([ids, positions, slots]).to(self._device)
        attention = Attention(spans, heads=self._heads, kv_heads=self._kv_heads, dtype=self._dtype, device=self._device)

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys, values = self._keys[layer], self._values[layer]
            keys.index_copy_(1, rows[2], key.transpose(0, 1))
            values.index_copy_(1, rows[2], value.transpose(0, 1))
            return attention(query, keys, values)

        return self._backbone.forward(rows[0], rows[1], attend)

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


def prepared(model: Qwen3ForGuardModel, positions: int, ids: Sequence[int]) -> tuple[Runner, Logits, float]:
    """A runner; what the model's own forward says of a response of these ids; and how far the runner may be from it.

    Raises:
        GuardUnavailable: as `Runner`.
    """
    model.eval()
    runner, alone = computed_apart(lambda: (Runner(model, positions), _alone(model, ids)))
    return runner, alone, TOLERANCES.get(model.dtype, max(TOLERANCES.values()))


def _alone(model: Qwen3ForGuardModel, ids: Sequence[int]) -> Logits:
    with torch.inference_mode():
        logits = model(torch.tensor([ids], device=model.device))
    return Logits(logits.risk[0].float().cpu().numpy(), logits.category[0].float().cpu().numpy())
