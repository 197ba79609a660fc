"""Exported Gen checkpoints: what `tidegate.model.scoring` does, on ONNX Runtime and without torch.

Prompts are computed one after the other: on a processor a hundred new tokens of one prompt keep it as busy as those of
eight, and nothing has to be padded. The fixed beginning of a form is computed once, and stays where it is; what is new
in a prompt is written behind it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tidegate.errors import GuardUnavailable, InputError, UnreadableVerdict
from tidegate.model.answers import Row, Scores, common_beginning, end_ids, follow
from tidegate.model.draft_tree import ROOT, DraftTree
from tidegate.model.onnx_backbone import Block, Cache, Hidden, OnnxBackbone, causal_blocks, masked_block
from tidegate.model.prompt_tokens import PromptTokenizer
from tidegate.prompts import Form, Prompt

__all__ = ["OnnxGenModel"]

_CHUNK: Final = 256
"""Most positions of a prompt in one pass."""
_ROOM: Final = 128
"""Positions behind a prompt: for a tree."""
_ANSWER: Final = 512
_KEPT: Final = 2048
"""Positions of the cache that is kept for a form; a longer prompt gets one of its own."""
_MOST_FORMS: Final = 4
"""Fixed beginnings that are kept."""
_LOGIT_ROWS: Final = 32
"""Positions whose logits are computed at once: each has as many as there are tokens."""


@dataclass(frozen=True, slots=True, eq=False)
class _Beginning:
    ids: tuple[int, ...]
    cache: Cache


class OnnxGenModel:
    """An exported Gen model and its tokenizer. One call at a time.

    Args:
        backbone: of kind ``gen``.
        tokenizer: of the same checkpoint.
        ends: the ids that end an answer.

    Raises:
        GuardUnavailable: when the export is of another kind.
    """

    adapters: tuple[str, ...] = ()
    """None: an adapter must be merged before it is exported."""

    def __init__(self, backbone: OnnxBackbone, tokenizer: PromptTokenizer, ends: frozenset[int]) -> None:
        if backbone.kind != "gen":
            raise GuardUnavailable(f"the export is of a {backbone.kind} model: expected a Gen model")
        self._backbone = backbone
        self._tokenizer = tokenizer
        self._ends = ends
        self._beginnings: dict[str, _Beginning] = {}
        self.longest: int = backbone.shape.positions
        """Most tokens of a prompt."""
        self.settings: Mapping[str, Any] = backbone.config.get("tidegate") or MappingProxyType({})
        """The section ``tidegate`` of the config; empty when there is none."""

    @classmethod
    def load(cls, folder: Path, *, threads: int | None = None) -> OnnxGenModel:
        """Load an export.

        Args:
            folder: as ``tidegate export`` writes it.
            threads: see `OnnxBackbone`.

        Raises:
            GuardUnavailable: when a file is missing or cannot be used; says which.
        """
        try:
            tokenizer = PromptTokenizer.load(folder / "tokenizer.json")
        except (OSError, ValueError) as error:
            raise GuardUnavailable(f"the tokenizer of {folder} cannot be used: {error}") from error
        generation = folder / "generation_config.json"
        configured = json.loads(generation.read_text(encoding="utf-8")) if generation.is_file() else {}
        return cls(OnnxBackbone(folder, threads=threads), tokenizer, end_ids(configured.get("eos_token_id"), tokenizer))

    @property
    def tokenizer(self) -> PromptTokenizer:
        """What makes the ids of a prompt. Holds nothing of the model, so that whoever keeps it keeps no weights."""
        return self._tokenizer

    def ids(self, prompt: Prompt) -> list[int]:
        """The token ids of a prompt. Safe to call from any thread, also while `score` runs."""
        return self._tokenizer.ids(prompt)

    def use_threads(self, count: int) -> None:
        """Does nothing: the number of threads is chosen when a model is loaded."""

    def score(
        self, form: Form, prompts: Sequence[Sequence[int]], adapters: Sequence[str | None] | None = None
    ) -> list[Scores | UnreadableVerdict]:
        """The answers to prompts of one form; a failure is given in place of an answer.

        Args:
            form: with which the prompts were made.
            prompts: ids of each, at most `longest`.
            adapters: None for each, or nothing.

        Raises:
            InputError: when an adapter is named.
        """
        if any(adapters or ()):
            raise InputError("an export has no adapters", where="adapters")
        return [self._answer(form, list(ids)) for ids in prompts]

    def _answer(self, form: Form, ids: list[int]) -> Scores | UnreadableVerdict:
        beginning = self._beginning(form)
        shared = common_beginning(beginning.ids, ids)
        cache = self._room(beginning, shared, len(ids) + _ANSWER + _ROOM)
        row = Row(form, None, ids[shared:], shared)
        while row.outcome is None:
            self._advance(row, cache)
        return row.outcome

    def _beginning(self, form: Form) -> _Beginning:
        known = self._beginnings.pop(form.opening, None)
        if known is None:
            ids = self._tokenizer.ids(form.fixed_beginning)
            known = _Beginning(tuple(ids), self._backbone.cache(max(_KEPT, len(ids))))
            self._compute(known.cache, ids, 0)
            if len(self._beginnings) >= _MOST_FORMS:
                del self._beginnings[next(iter(self._beginnings))]
        self._beginnings[form.opening] = known
        return known

    def _room(self, beginning: _Beginning, shared: int, positions: int) -> Cache:
        """A cache that begins with what is shared: the one that is kept, when there is room behind it."""
        if positions <= _KEPT:
            return beginning.cache
        cache = self._backbone.cache(positions)
        cache.keys[:, :shared] = beginning.cache.keys[:, :shared]
        cache.values[:, :shared] = beginning.cache.values[:, :shared]
        return cache

    def _compute(self, cache: Cache, ids: Sequence[int], done: int) -> None:
        """Compute ids behind those that are done, for their keys and values alone."""
        for start in range(0, len(ids), _CHUNK):
            chunk, at = ids[start : start + _CHUNK], done + start
            blocks = list(causal_blocks(self._backbone.shape, 0, len(chunk), 0, at))
            where = slice(at, at + len(chunk))
            self._backbone.forward(cache, chunk, range(at, at + len(chunk)), where, blocks)

    def _advance(self, row: Row, cache: Cache) -> None:
        """One pass over what is pending and the tree behind it, and as much of the answer as can be read from it."""
        if (early := (len(row.pending) - 1) // _CHUNK * _CHUNK) > 0:
            self._compute(cache, row.pending[:early], row.length)
            row.pending, row.length = row.pending[early:], row.length + early
        tree = DraftTree(row.form.drafts(row.text), self._tokenizer.part)
        pending, start = len(row.pending), row.length
        hidden = self._with_tree(row, tree, cache)
        if not hidden.sound.all():
            row.outcome = UnreadableVerdict("the model computed something that is not a finite number")
            return
        best, log_probabilities = self._read(hidden, tree, pending)
        row.length += pending
        if tree.kind is not None and tree.kind not in row.words:
            row.words[tree.kind] = tree.word_probabilities(log_probabilities)
        for accepted in follow(row, tree, best, self._tokenizer, self._ends):
            cache.move(start + pending + accepted, row.length, 1)
            row.length += 1

    def _with_tree(self, row: Row, tree: DraftTree, cache: Cache) -> Hidden:
        """Hidden states of what is pending and, behind it, of the computed nodes."""
        pending, done = len(row.pending), row.length
        new = pending + len(tree.computed)
        ids = [*row.pending, *(tree.tokens[node] for node in tree.computed)]
        depths = [*range(pending), *(pending - 1 + tree.depths[node] for node in tree.computed)]
        blocks = [*causal_blocks(self._backbone.shape, 0, pending, 0, done), *self._tree_block(tree, pending, done)]
        return self._backbone.forward(cache, ids, done + np.array(depths), slice(done, done + new), blocks)

    def _tree_block(self, tree: DraftTree, pending: int, done: int) -> Iterator[Block]:
        """A node sees the prompt, its ancestors and itself."""
        count = len(tree.computed)
        if not count:
            return
        behind = done + pending
        seen = np.zeros((count, behind + count), np.bool_)
        seen[:, :behind] = True
        rows = {node: row for row, node in enumerate(tree.computed)}
        for row, node in enumerate(tree.computed):
            while node != ROOT:
                seen[row, behind + rows[node]] = True
                node = tree.parents[node]
        yield masked_block(self._backbone.shape, slice(pending, pending + count), 0, seen)

    def _read(self, hidden: Hidden, tree: DraftTree, pending: int) -> tuple[dict[int, int], list[float]]:
        """The most probable token behind the root and each computed node, and each node's log-probability."""
        nodes = (ROOT, *tree.computed)
        best: list[int] = []
        log_probabilities = [0.0] * len(tree.tokens)
        for first in range(0, len(nodes), _LOGIT_ROWS):
            part = nodes[first : first + _LOGIT_ROWS]
            children = [
                (row, token, child) for row, node in enumerate(part) for token, child in tree.children[node].items()
            ]
            wanted = np.array([(row, token) for row, token, _ in children] or [(0, 0)], np.int64)
            at = np.arange(len(part), dtype=np.int64) + pending - 1 + first
            found: Mapping[str, NDArray[Any]] = self._backbone.finish(hidden.at(at), {"wanted": wanted})
            best += found["best"].tolist()
            for (_, _, child), value in zip(children, found["log_probability"].tolist(), strict=False):
                log_probabilities[child] = value
        return dict(zip(nodes, best, strict=True)), log_probabilities
