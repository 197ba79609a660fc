"""One forward for many streams on an exported Stream model: what `tidegate.engine.runner` does, on ONNX Runtime.

The logits of a stream are the same whatever shares its forwards and however its tokens are cut into them: see
`tidegate.model.onnx_backbone`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tidegate.engine.logits import Logits
from tidegate.engine.scheduler import Piece, Step
from tidegate.errors import GuardUnavailable, UnreadableVerdict
from tidegate.model.onnx_backbone import Block, OnnxBackbone, causal_blocks
from tidegate.types import Target

__all__ = ["OnnxRunner", "OnnxStream"]

_HEADS: Mapping[Target, tuple[str, str]] = {
    Target.PROMPT: ("query_risk", "query_category"),
    Target.RESPONSE: ("risk", "category"),
}


class _Text(NamedTuple):
    """A text that is no stream of an engine: the fields of a `Piece` that are needed."""

    start: int
    cached: int
    ids: list[int]
    wanted: int
    target: Target


class OnnxStream:
    """An exported Stream model, for `Engine` in the place of a model of torch.

    Args:
        backbone: of kind ``stream``.

    Raises:
        GuardUnavailable: when it is of another kind.
    """

    def __init__(self, backbone: OnnxBackbone) -> None:
        if backbone.kind != "stream":
            raise GuardUnavailable(f"the export is of a {backbone.kind} model: expected a Stream model")
        self.backbone = backbone
        self.config = SimpleNamespace(**backbone.config)
        """The fields of ``config.json``."""

    def logits(self, ids: Sequence[int], target: Target) -> Logits:
        """The logits of every position of a text, computed alone and at once.

        Raises:
            UnreadableVerdict: when one is not a finite number.
        """
        runner = OnnxRunner(self.backbone, len(ids))
        (logits,) = runner.compute([_Text(0, 0, list(ids), len(ids), target)])
        if logits is None:
            raise UnreadableVerdict("the model computed something that is not a finite number")
        return logits


class OnnxRunner:
    """An exported model and its cache. One call at a time.

    Args:
        backbone: of kind ``stream``.
        positions: how many positions the cache has.

    Raises:
        GuardUnavailable: when there is no memory for the cache.
    """

    def __init__(self, backbone: OnnxBackbone, positions: int) -> None:
        self._backbone = backbone
        self._positions = positions
        self._cache = backbone.cache(positions)

    @property
    def cache_bytes(self) -> int:
        """Size of the cache in bytes, when all of it is in use."""
        return self._cache.nbytes

    def give_back(self) -> None:
        """Give the memory of a cache that nobody uses back to the system; what is not written takes none."""
        self._cache = self._backbone.cache(self._positions)

    def run(self, step: Step) -> list[Logits | None]:
        """Carry out the moves, compute all pieces at once, and keep their keys and values.

        Returns:
            For each piece its logits where they are asked for; None when one of its positions is not a finite number.
        """
        for source, target, length in step.moves:
            self._cache.move(source, target, length)
        return self.compute(step.pieces) if step.pieces else []

    def compute(self, pieces: Sequence[Piece | _Text]) -> list[Logits | None]:
        """The same for pieces whose caches are in place."""
        news = [len(piece.ids) for piece in pieces]
        stops = np.cumsum(news).tolist()
        blocks: list[Block] = []
        for piece, new, stop in zip(pieces, news, stops, strict=True):
            blocks += causal_blocks(self._backbone.shape, stop - new, new, piece.start, piece.cached)
        positions = [np.arange(p.cached, p.cached + new) for p, new in zip(pieces, news, strict=True)]
        slots = np.concatenate([p.start + at for p, at in zip(pieces, positions, strict=True)])
        ids = list(chain.from_iterable(piece.ids for piece in pieces))
        hidden = self._backbone.forward(self._cache, ids, np.concatenate(positions), slots, blocks)
        asked = [np.arange(stop - piece.wanted, stop) for piece, stop in zip(pieces, stops, strict=True)]
        rows = np.concatenate(asked)
        heads = self._backbone.finish(hidden.at(rows)) if len(rows) else {}
        results: list[Logits | None] = []
        first = 0
        for piece, new, stop in zip(pieces, news, stops, strict=True):
            part = self._logits(heads, piece.target, slice(first, first + piece.wanted))
            sound = hidden.sound[stop - new : stop].all() and all(np.isfinite(each).all() for each in part)
            results.append(part if sound else None)
            first += piece.wanted
        return results

    def _logits(self, heads: Mapping[str, NDArray[Any]], target: Target, rows: slice) -> Logits:
        if rows.start == rows.stop:
            config = self._backbone.config
            classes = config["num_query_category" if target is Target.PROMPT else "num_category"]
            return Logits(np.zeros((0, 3), np.float32), np.zeros((0, classes), np.float32))
        return Logits(*(heads[name][rows].copy() for name in _HEADS[target]))
