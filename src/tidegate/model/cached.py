"""One text through a Stream model, each of its tokens computed once.

The keys and values of every position are kept, so that what arrives later costs only its own positions; the result at
every position equals that of one causal forward over the whole text, however it was cut (within rounding). Positions
can be taken back from the end, for tokens that turned out otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from tidegate.errors import InputError, SessionClosed
from tidegate.model.attention import Attention, Span
from tidegate.model.backbone import Backbone
from tidegate.model.stream import Qwen3ForGuardModel, StreamLogits

__all__ = ["CachedText", "KeysAndValues", "probabilities"]

_BLOCK: Final = 128
"""Room for keys and values is taken in multiples of so many positions."""
_CHUNK: Final = 512
"""So many positions are computed at once: bounds the memory of one forward."""


class CachedText:
    """The keys and values of one text, and what is needed to go on with it. One call at a time.

    Memory: 2 * layers * key_heads * head_dim values per position, for at most a quarter more positions than were ever
    held at once (and at least 128).

    Args:
        model: in ``eval`` mode; its weights are laid out anew for inference (`tidegate.model.layout`).
        room: how many positions to make room for at the beginning; it grows when more come.
    """

    def __init__(self, model: Qwen3ForGuardModel, *, room: int = 0) -> None:
        self._model = model
        self._backbone = Backbone(model)
        self._cache: KeysAndValues | None = KeysAndValues(model.config.num_hidden_layers, room)

    @property
    def length(self) -> int:
        """How many positions are held."""
        return self._open().length

    def append(self, ids: Sequence[int] | Tensor) -> StreamLogits:
        """Compute the next tokens.

        Args:
            ids: at least one token id, a list or an int64 tensor ``[positions]``.

        Returns:
            The logits of the new positions, each ``[positions, classes]``, in the dtype and on the device of the model.

        Raises:
            InputError: when there is no id, or one that the model does not have; nothing is taken then.
            SessionClosed: after ``close``.
        """
        cache, before = self._open(), self.length
        tokens = self._checked(ids)
        try:
            with torch.inference_mode():
                parts = [self._step(cache, part) for part in tokens.to(self._model.device).split(_CHUNK)]
        except BaseException:
            cache.length = before
            raise
        return StreamLogits(*(torch.cat(head) for head in zip(*parts, strict=True)))

    def crop(self, length: int) -> None:
        """Forget every position from ``length`` on.

        Raises:
            InputError: when ``length`` is negative or more than is held.
            SessionClosed: after ``close``.
        """
        cache = self._open()
        if not 0 <= length <= cache.length:
            raise InputError(f"expected 0 to {cache.length}", where="length")
        cache.length = length

    def close(self) -> None:
        """Free the memory; safe to call any number of times."""
        self._cache = None

    def _open(self) -> KeysAndValues:
        if self._cache is None:
            raise SessionClosed("the text is closed")
        return self._cache

    def _checked(self, ids: Sequence[int] | Tensor) -> Tensor:
        tokens = torch.as_tensor(ids)
        if tokens.ndim != 1 or not len(tokens) or tokens.dtype not in (torch.int64, torch.int32):
            raise InputError("expected one or more token ids in a row", where="ids")
        if int(tokens.min()) < 0 or int(tokens.max()) >= self._model.config.vocab_size:
            raise InputError(f"expected token ids from 0 to {self._model.config.vocab_size - 1}", where="ids")
        return tokens.long()

    def _step(self, cache: KeysAndValues, ids: Tensor) -> StreamLogits:
        config, span = self._model.config, Span(0, cache.length, len(ids))
        positions = torch.arange(span.cached, span.stop, device=ids.device)
        attention = Attention(
            [span],
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            dtype=self._model.dtype,
            device=ids.device,
        )

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return attention(query, *cache.update(layer, key.transpose(0, 1), value.transpose(0, 1)))

        hidden = self._backbone.forward(ids, positions, attend)
        cache.length = span.stop
        return self._model.heads(self._model.model.norm(hidden))


class KeysAndValues:
    """Keys and values of all layers of one text.

    Args:
        layers: how many the model has.
        room: how many positions to make room for at the beginning; it grows when more come.

    Attributes:
        layers: of each layer keys and values, ``[2, key_heads, room, head_dim]``; None before the first position.
        length: how many positions are held; what is behind them does not count.
    """

    def __init__(self, layers: int, room: int) -> None:
        self._room = room
        self.layers: list[Tensor | None] = [None] * layers
        self.length = 0

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put those of new positions, ``[key_heads, positions, head_dim]``, behind those of before; gives all.

        The length is the caller's to change, when every layer has them.
        """
        end = self.length + keys.shape[1]
        held = self._with_room(layer, end, keys)
        held[0, :, self.length : end] = keys
        held[1, :, self.length : end] = values
        return held[0], held[1]

    def beginning(self, length: int, room: int) -> KeysAndValues:
        """A copy of the first positions, with room for more."""
        copied = KeysAndValues(len(self.layers), room)
        for layer, held in enumerate(self.layers):
            if held is not None and length:
                copied.update(layer, held[0, :, :length], held[1, :, :length])
        copied.length = length
        return copied

    def keep(self, positions: Sequence[int]) -> None:
        """Of the positions behind those that are held, hold these too, in their order; others are forgotten."""
        if not positions:
            return
        end = self.length + len(positions)
        if list(positions) != list(range(self.length, end)):
            for held in self.layers:
                if held is not None:
                    held[:, :, self.length : end] = held[:, :, list(positions)]
        self.length = end

    def _with_room(self, layer: int, end: int, like: Tensor) -> Tensor:
        held = self.layers[layer]
        if held is not None and held.shape[2] >= end:
            return held
        room = max(end + end // 4, self._room) if held is not None else max(end, self._room)
        room = -(-room // _BLOCK) * _BLOCK
        larger = torch.zeros((2, len(like), room, like.shape[2]), dtype=like.dtype, device=like.device)
        if held is not None:
            larger[:, :, : self.length] = held[:, :, : self.length]
        self.layers[layer] = larger
        return larger


def probabilities(logits: Tensor) -> Tensor:
    """Softmax over the last dimension, in float32."""
    return torch.softmax(logits.float(), dim=-1)
