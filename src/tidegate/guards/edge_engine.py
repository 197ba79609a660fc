"""Runs the edge guard's ONNX file for many sequences at once: what waits together is computed together.

One worker thread runs ONNX Runtime. It takes the oldest waiting work, adds waiting work of similar length, and gives
the logits back to the event loop that asked. Each Sequence keeps its own keys and values; nothing of one sequence
reaches another, and the mathematics of a row does not depend on the other rows.
"""

from __future__ import annotations

import asyncio
import math
import mmap
import sys
from collections.abc import Callable
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tidegate.engine.worker import Padding, Work, Worker
from tidegate.errors import GuardUnavailable, SessionClosed, UnreadableVerdict
from tidegate.model.onnx_runtime import onnxruntime

__all__ = ["Engine", "Logits", "Sequence"]

Float = NDArray[np.float32]

_HIDDEN = np.float32(-1e9)
_CHUNK = 256
"""Most new positions of one sequence in one run."""
_MOST_TOKENS = 512
"""Most new positions in one run, padding included: more would not be faster, and would make short work wait."""
_MOST_CACHED = 16 * 1024
"""Most cached positions in one run, padding included."""
_SLACK = 16
"""Padded positions that are always worth a shared run."""
_SMALLEST_CACHE = 32
_PRIVATE = {} if sys.platform == "win32" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
"""Memory that no child process shares."""
_CAUSAL: Float = np.triu(np.full((_CHUNK, _CHUNK), _HIDDEN, np.float32), 1)
"""What a position of a run must not see of the run: those behind it."""


class Logits(NamedTuple):
    """The four heads at some positions of one sequence, each ``[positions, classes]``."""

    risk: Float
    category: Float
    query_risk: Float
    query_category: Float


class Sequence:
    """The cache of one text: keys and values of the positions computed so far, ``[2 * layers, heads, length, D]``."""

    __slots__ = ("cache", "closed", "length")

    def __init__(self) -> None:
        self.cache: Float | None = None
        self.length = 0
        self.closed = False

    def close(self) -> None:
        """Give the cache back; work that waits for this sequence is dropped before it is computed."""
        self.closed = True
        self.cache = None


@dataclass(slots=True, eq=False)
class _Work(Work[Logits]):
    sequence: Sequence
    ids: Ids[int]
    last_only: bool
    done: int = 0
    parts: list[Logits] = field(default_factory=list)

    @property
    def new(self) -> int:
        """How many positions the next run computes."""
        return min(_CHUNK, len(self.ids) - self.done)

    @property
    def dropped(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.sequence.closed or self.future.cancelled()


class Engine(Worker[_Work]):
    """A model in memory and the thread that runs it.

    Args:
        model: the ONNX file, as ``tidegate export`` writes it.
        threads: how many threads one run may use.
        most_waiting: how many pieces of work may wait before more is refused.

    Raises:
        GuardUnavailable: when the file cannot be loaded.
    """

    def __init__(self, model: Path, *, threads: int = 1, most_waiting: int = 4096) -> None:
        super().__init__(thread="tidegate-edge", runtime="ONNX Runtime", most_waiting=most_waiting)
        session = _load(model, threads)
        self._session: onnxruntime.InferenceSession | None = session
        past = [given for given in session.get_inputs() if given.name.startswith("past.")]
        if not past:
            raise GuardUnavailable(f"{model.name} has no past.0 input: expected a file of tidegate export")
        self._pasts = [given.name for given in past]
        _, self._kv_heads, _, self._head_dim = past[0].shape
        self._gathered = np.zeros(0, np.float32)

    def submit(self, sequence: Sequence, ids: Ids[int], *, last_only: bool = False) -> asyncio.Future[Logits]:
        """Append ids to a sequence; the future gives the logits of each of them, or of the last one only.

        Call from a running event loop.

        Work of one sequence must not be submitted before its earlier work is done.

        Raises:
            GuardOverloaded: when too much work waits.
            SessionClosed: when the sequence or the engine is closed.
        """
        if sequence.closed:
            raise SessionClosed("the sequence is closed")
        work = _Work(sequence, ids, last_only)
        self._put(work)
        return work.future

    def _free(self) -> None:
        self._session = None

    def _sharing(self) -> Callable[[_Work], bool]:
        padding, longest = Padding(_MOST_TOKENS, _SLACK), 0

        def joins(work: _Work) -> bool:
            nonlocal longest
            new, cached = work.new, max(longest, work.sequence.length)
            if not padding.fits(new) or (padding.rows and cached * (padding.rows + 1) > _MOST_CACHED):
                return False
            padding.add(new)
            longest = cached
            return True

        return joins

    def _run(self, batch: list[_Work]) -> list[tuple[_Work, Logits]]:
        """One forward pass."""
        caches = [work.sequence.cache for work in batch]
        lengths = [work.sequence.length for work in batch]
        news = [work.new for work in batch]
        inputs = self._inputs(batch, caches, lengths, news)
        if self._session is None:
            raise SessionClosed("the guard is closed")
        present, *heads = self._session.run(["present", *Logits._fields], inputs)
        if not np.isfinite(present).all():
            raise UnreadableVerdict("the model computed something that is not a finite number")
        done: list[_Work] = []
        more: list[_Work] = []
        for row, (work, length, new) in enumerate(zip(batch, lengths, news, strict=True)):
            first = new - 1 if work.last_only else 0
            work.parts.append(Logits(*(head[row, first:new].copy() for head in heads)))
            work.done += new
            _append(work.sequence, caches[row], present[:, row, :, :new], length)
            (done if work.done == len(work.ids) else more).append(work)
        self._again(more)
        return [(work, _joined(work.parts)) for work in done]

    def _inputs(
        self, batch: list[_Work], caches: list[Float | None], lengths: list[int], news: list[int]
    ) -> dict[str, NDArray[np.generic]]:
        # one cached position at least, hidden when there is none: no runtime has to agree about empty matrices
        rows, most, cached = len(batch), max(news), max(1, *lengths)
        ids = np.zeros((rows, most), np.int64)
        positions = np.zeros((rows, most), np.int64)
        mask = np.full((rows, 1, most, cached + most), _HIDDEN, np.float32)
        past = self._room((len(self._pasts), rows, self._kv_heads, cached, self._head_dim))
        causal = _CAUSAL[:most, :most]
        for row, (work, cache, length, new) in enumerate(zip(batch, caches, lengths, news, strict=True)):
            ids[row, :new] = work.ids[work.done : work.done + new]
            positions[row, :new] = np.arange(length, length + new)
            mask[row, 0, :, :length] = 0
            mask[row, 0, :, cached:] = causal
            if cache is not None and length:
                past[:, row, :, :length] = cache[:, :, :length]
        inputs: dict[str, NDArray[np.generic]] = {"input_ids": ids, "position_ids": positions, "mask": mask}
        inputs.update(zip(self._pasts, past, strict=True))
        return inputs

    def _room(self, shape: tuple[int, ...]) -> Float:
        """Memory to gather caches in, used again by every run. What is left in it from earlier runs is finite, and
        hidden positions have the weight zero."""
        size = math.prod(shape)
        if self._gathered.size < size:
            self._gathered = np.zeros(size, np.float32)
        return self._gathered[:size].reshape(shape)


def _load(model: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = False
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    provider = ("CPUExecutionProvider", {"arena_extend_strategy": "kSameAsRequested"})
    try:
        return onnxruntime.InferenceSession(str(model), options, providers=[provider])
    except Exception as error:
        raise GuardUnavailable(f"{model} cannot be loaded by ONNX Runtime: {type(error).__name__}") from error


def _append(sequence: Sequence, cache: Float | None, new: Float, length: int) -> None:
    """Put the keys and values of new positions behind those of a sequence, in place where there is room."""
    needed = length + new.shape[2]
    if cache is None or cache.shape[2] < needed:
        room = max(_SMALLEST_CACHE, 1 << (needed - 1).bit_length())
        grown = _empty((*new.shape[:2], room, new.shape[3]))
        if cache is not None:
            grown[:, :, :length] = cache[:, :, :length]
        cache = grown
    cache[:, :, length:needed] = new
    sequence.length = needed
    sequence.cache = None if sequence.closed else cache


def _empty(shape: tuple[int, ...]) -> Float:
    """Room for a cache, in memory of its own: it goes back to the system when its stream ends, and not to a heap, which
    would keep it, in pieces between what other streams still have.
    """
    return np.frombuffer(mmap.mmap(-1, 4 * math.prod(shape), **_PRIVATE), np.float32).reshape(shape)


def _joined(parts: list[Logits]) -> Logits:
    if len(parts) == 1:
        return parts[0]
    return Logits(*(np.concatenate(head) for head in zip(*parts, strict=True)))
