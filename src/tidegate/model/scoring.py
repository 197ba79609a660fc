"""Gen checkpoints: the answer of greedy decoding, and the probabilities at its choices, in one or two forward passes.

A Gen guard answers in few fixed lines (`tidegate.prompts`). Behind a prompt, one pass computes every likely beginning
of the answer as a tree of tokens; the answer is read off along the most probable tokens. What is read is what greedy
decoding would say, token by token; where it leaves the tree it is followed one token at a time, and where it leaves the
form there is no verdict. The probability of a severity is that of its whole sequence of tokens.

The fixed beginning of a prompt is computed once for each adapter. Prompts of similar length are computed together,
whatever their adapters; nothing of one reaches another, though a model may round differently in company (far below 1e-4
in float32, visibly in bfloat16).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Qwen3Model

from tidegate.errors import GuardUnavailable, InputError, UnreadableVerdict
from tidegate.model.adapters import Adapters
from tidegate.model.answers import FLOOR, Row, Scores, common_beginning, end_ids, follow
from tidegate.model.draft_tree import ROOT, DraftTree
from tidegate.model.folders import checkpoint_folder
from tidegate.model.loading import DTYPES
from tidegate.model.prompt_tokens import PromptTokenizer
from tidegate.model.stream import GROUPED_ATTENTION
from tidegate.prompts import Form, Prompt

__all__ = ["FLOOR", "GenModel", "Scores"]

_CACHE: Final = "cache" if "cache" in signature(Qwen3Model.forward).parameters else "past_key_values"
"""What transformers calls a cache: the first from 5.24 on."""
_CHUNK: Final = 1024
"""Most positions of one prompt in one pass: a mask of more would be large."""
_ROOM: Final = 128
"""Columns of the cache beside those of the prompts: for two trees, or for one and the steps of a reason."""
_LOGIT_ROWS: Final = 64
"""Positions whose logits are computed at once: each has as many as there are tokens."""
_MOST_PREFIXES: Final = 64
"""Most fixed beginnings that are kept: each has the keys and values of a few hundred tokens."""


class GenModel:
    """A causal language model of Qwen3 shape and its tokenizer. One call at a time.

    Args:
        model: as ``AutoModelForCausalLM`` loads it, in evaluation mode.
        tokenizer: of the same checkpoint.
        adapters: where LoRA adapters for this model lie, by name: see `tidegate.model.adapters`.

    Raises:
        InputError: when the name of an adapter cannot be one.
        GuardUnavailable: when an adapter cannot be used; says why.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PromptTokenizer,
        adapters: Mapping[str, Path] = MappingProxyType({}),
    ) -> None:
        self._model = model
        self._adapters = Adapters(model, adapters)
        self._tokenizer = tokenizer
        self._device = model.get_input_embeddings().weight.device
        self._ends = end_ids(getattr(model.generation_config, "eos_token_id", None), tokenizer)
        self._prefixes: dict[tuple[str, str | None], _Prefix] = {}
        self.longest: int = model.config.max_position_embeddings
        """Most tokens of a prompt."""
        self.settings: Mapping[str, Any] = getattr(model.config, "tidegate", None) or {}
        """The section ``tidegate`` of the config; empty when there is none."""

    @classmethod
    def load(
        cls,
        name: str,
        *,
        dtype: str | None = None,
        device: str = "cpu",
        adapters: Mapping[str, Path] = MappingProxyType({}),
    ) -> GenModel:
        """Load a checkpoint: no code of its own is run.

        Args:
            name: a folder, or the name of a repository on the hub, which is then fetched.
            dtype: ``float32``, ``bfloat16`` or ``float16``; None for that of the checkpoint.
            device: where to compute, as torch names it.
            adapters: where LoRA adapters for this checkpoint lie, by name.

        Raises:
            InputError: when there is no such type, or the name of an adapter cannot be one.
            GuardUnavailable: when the checkpoint or an adapter cannot be loaded or is not of Qwen3 shape; says what is
                wrong.
        """
        if dtype is not None and dtype not in DTYPES:
            raise InputError(f"expected one of {', '.join(DTYPES)}", where="dtype")
        folder = checkpoint_folder(name)
        try:
            tokenizer = PromptTokenizer.load(folder / "tokenizer.json")
            return cls(_load_model(folder, DTYPES.get(dtype or "", "auto"), device), tokenizer, adapters)
        except (GuardUnavailable, InputError):
            raise
        except Exception as error:  # the libraries raise dozens of kinds
            why = (str(error) or type(error).__name__).splitlines()[0]
            raise GuardUnavailable(f"{name} cannot be loaded as a Gen guard: {why}") from error

    @property
    def tokenizer(self) -> PromptTokenizer:
        """What makes the ids of a prompt. Holds nothing of the model, so that whoever keeps it keeps no weights."""
        return self._tokenizer

    def ids(self, prompt: Prompt) -> list[int]:
        """The token ids of a prompt. Safe to call from any thread, also while `score` runs."""
        return self._tokenizer.ids(prompt)

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters."""
        return self._adapters.names

    def use_threads(self, count: int) -> None:
        """Let the runs that this thread starts use so many threads."""
        torch.set_num_threads(count)

    def score(
        self, form: Form, prompts: Sequence[Sequence[int]], adapters: Sequence[str | None] | None = None
    ) -> list[Scores | UnreadableVerdict]:
        """The answers to prompts of one form, computed together; a failure is given in place of an answer.

        Args:
            form: with which the prompts were made.
            prompts: ids of each, at most `longest`.
            adapters: the adapter that each is answered with, or None for the model as it is; None for that everywhere.

        Raises:
            KeyError: when there is no such adapter.
        """
        if not prompts:
            return []
        chosen = [None] * len(prompts) if adapters is None else list(adapters)
        rows = [Row(form, adapter, list(ids)) for ids, adapter in zip(prompts, chosen, strict=True)]
        with torch.inference_mode():
            batch = self._begin(form, sorted(rows, key=lambda row: row.adapter or ""))
            while batch.rows:
                self._advance(batch)
                batch.drop_finished()
        return [row.outcome or UnreadableVerdict("no answer") for row in rows]

    def _begin(self, form: Form, rows: list[Row]) -> _Batch:
        """Rows with one adapter stand beside each other."""
        prefixes = {adapter: self._prefix(form, adapter) for adapter in dict.fromkeys(row.adapter for row in rows)}
        fixed = prefixes[rows[0].adapter].ids
        shared = min(common_beginning(fixed, row.pending) for row in rows)
        width = max(len(row.pending) for row in rows) + _ROOM
        batch = _Batch(rows, _Columns(self._model, [row.adapter for row in rows], width))
        batch.columns.put([prefixes[row.adapter] for row in rows], shared)
        for row in rows:
            row.pending = row.pending[shared:]
            row.length = shared
        while (longest := max(len(row.pending) for row in batch.rows)) > _CHUNK:
            taken = [min(_CHUNK, len(row.pending) - 1) for row in batch.rows]
            self._forward(batch, [row.pending[:count] for row, count in zip(batch.rows, taken, strict=True)], None)
            for row, count in zip(batch.rows, taken, strict=True):
                row.pending = row.pending[count:]
                row.length += count
            assert max(len(row.pending) for row in batch.rows) < longest
        return batch

    def _prefix(self, form: Form, adapter: str | None) -> _Prefix:
        """What all prompts of a form begin with, computed once with each adapter: the keys and values differ."""
        key = form.opening, adapter
        known = self._prefixes.pop(key, None)
        if known is None:
            ids = self._tokenizer.ids(form.fixed_beginning)
            columns = _Columns(self._model, [adapter], len(ids))
            self._run(columns, [ids], torch.arange(len(ids))[None], torch.ones(len(ids), len(ids)).bool().tril()[None])
            known = _Prefix(tuple(ids), columns.layers)
            if len(self._prefixes) >= _MOST_PREFIXES:
                del self._prefixes[next(iter(self._prefixes))]
        self._prefixes[key] = known
        return known

    def _advance(self, batch: _Batch) -> None:
        """One pass over what is pending and the tree behind it, and as much of the answer as can be read from it."""
        rows = batch.rows
        trees = [DraftTree(row.form.drafts(row.text), self._tokenizer.part) for row in rows]
        first = batch.columns.used
        hidden = self._forward(batch, [row.pending for row in rows], trees)
        places = [
            (index, [len(row.pending) - 1, *range(len(row.pending), len(row.pending) + len(tree.computed))])
            for index, (row, tree) in enumerate(zip(rows, trees, strict=True))
        ]
        asked = torch.cat([hidden[index, place] for index, place in places])
        best, log_probabilities = self._read(asked, trees)
        for index, (row, tree) in enumerate(zip(rows, trees, strict=True)):
            behind = first + len(row.pending)
            row.length += len(row.pending)
            if tree.kind is not None and tree.kind not in row.words:
                row.words[tree.kind] = tree.word_probabilities(log_probabilities[index])
            for accepted in follow(row, tree, best[index], self._tokenizer, self._ends):
                batch.columns.seen[index, behind + accepted] = True
                row.length += 1

    def _forward(self, batch: _Batch, pending: Sequence[list[int]], trees: Sequence[DraftTree] | None) -> Tensor:
        """Hidden states ``[rows, positions, hidden_size]`` of pending tokens and, behind them, of trees."""
        trees = trees or [DraftTree((), self._tokenizer.part) for _ in pending]
        ids = [[*left, *(t.tokens[n] for n in t.computed)] for left, t in zip(pending, trees, strict=True)]
        width = max(map(len, ids))
        positions = torch.zeros(len(ids), width, dtype=torch.int64)
        masks = torch.zeros(len(ids), width, width, dtype=torch.bool)
        for index, (row, left, tree) in enumerate(zip(batch.rows, pending, trees, strict=True)):
            depths = [*range(len(left)), *(len(left) - 1 + tree.depths[node] for node in tree.computed)]
            positions[index, : len(depths)] = torch.tensor(depths, dtype=torch.int64) + row.length
            masks[index] = _mask(len(left), tree, width)
        columns = batch.columns
        first = columns.used
        seen = columns.seen[:, None, :first].expand(-1, width, -1)
        hidden = self._run(columns, ids, positions, torch.cat([seen, masks], dim=2))
        for index, left in enumerate(pending):
            columns.seen[index, first : first + len(left)] = True
        return hidden

    def _run(self, columns: _Columns, ids: Sequence[Sequence[int]], positions: Tensor, mask: Tensor) -> Tensor:
        """One pass: ids are padded at their end; ``mask`` is ``[rows, positions, columns]``, true where one is seen."""
        width = positions.shape[1]
        padded = torch.tensor([[*row, *[0] * (width - len(row))] for row in ids])
        columns.make_room(width)
        with self._adapters.on(columns.adapters):
            output = self._model.base_model(
                input_ids=padded.to(self._device),
                attention_mask=mask[:, None].to(self._device),
                position_ids=positions.to(self._device),
                use_cache=True,
                **{_CACHE: columns},
            )
        columns.used += width
        return output.last_hidden_state

    def _read(self, hidden: Tensor, trees: Sequence[DraftTree]) -> tuple[list[dict[int, int]], list[list[float]]]:
        """For each tree, the most probable token behind each computed node, and each node's log-probability."""
        best: list[int] = []
        wanted, tokens = [], []
        nodes = [(tree, node) for tree in trees for node in (ROOT, *tree.computed)]
        for place, (tree, node) in enumerate(nodes):
            wanted += [place] * len(tree.children[node])
            tokens += list(tree.children[node])
        found: list[float] = []
        at, wanted_ids, token_ids = 0, torch.tensor(wanted, dtype=torch.int64), torch.tensor(tokens, dtype=torch.int64)
        for start in range(0, len(nodes), _LOGIT_ROWS):
            logits = self._model.get_output_embeddings()(hidden[start : start + _LOGIT_ROWS]).float()
            best += logits.argmax(dim=-1).tolist()
            here = (wanted_ids >= start) & (wanted_ids < start + _LOGIT_ROWS)
            rows, columns = (wanted_ids[here] - start).to(logits.device), token_ids[here].to(logits.device)
            found += (logits[rows, columns] - logits.logsumexp(dim=-1)[rows]).tolist()
        log_probabilities = []
        each = iter(best)
        choices = [{node: next(each) for node in (ROOT, *tree.computed)} for tree in trees]
        for tree in trees:
            of_tree = [0.0] * len(tree.tokens)
            for node in (ROOT, *tree.computed):
                for child in tree.children[node].values():
                    of_tree[child] = found[at]
                    at += 1
            log_probabilities.append(of_tree)
        return choices, log_probabilities


@dataclass(frozen=True, slots=True, eq=False)
class _Prefix:
    """Tokens, and for each layer their keys and values, each ``[1, heads, tokens, head_dim]``."""

    ids: tuple[int, ...]
    layers: list[tuple[Tensor, Tensor]]


@dataclass(slots=True)
class _Batch:
    """Prompts that are computed together."""

    rows: list[Row]
    columns: _Columns

    def drop_finished(self) -> None:
        """Go on with those that have no outcome yet."""
        going = [index for index, row in enumerate(self.rows) if row.outcome is None]
        if len(going) < len(self.rows):
            self.rows = [self.rows[index] for index in going]
            self.columns.keep(going)


class _Columns:
    """Keys and values of several rows, in columns of one allocation; rows of different length leave columns unused.

    It has what transformers asks of a cache. Rotation is part of a key, so that a column may hold any position.

    Attributes:
        adapters: for each row the adapter that its keys and values are made with; None for none.
        layers: for each layer keys and values, each ``[rows, heads, columns, head_dim]``.
        seen: ``[rows, columns]`` bool on CPU: what later tokens of the row see.
        used: how many columns are taken.
    """

    is_compileable = False

    def __init__(self, model: PreTrainedModel, adapters: Sequence[str | None], columns: int) -> None:
        config = model.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (len(adapters), config.num_key_value_heads, columns, head_dim)
        of = model.get_input_embeddings().weight
        self.layers = [(of.new_zeros(shape), of.new_zeros(shape)) for _ in range(config.num_hidden_layers)]
        self.adapters = list(adapters)
        self.seen = torch.zeros(len(adapters), columns, dtype=torch.bool)
        self.used = 0

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Put new keys and values behind those of a layer; returns all of them."""
        end = self.used + keys.shape[2]
        all_keys, all_values = self.layers[layer]
        all_keys[:, :, self.used : end] = keys
        all_values[:, :, self.used : end] = values
        return all_keys[:, :, :end], all_values[:, :, :end]

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        """How many columns are taken."""
        return self.used

    def put(self, prefixes: Sequence[_Prefix], count: int) -> None:
        """Begin each row with the first tokens of its prefix; rows beside each other that have the same are best."""
        start = 0
        for prefix, run in groupby(prefixes):
            end = start + sum(1 for _ in run)
            for (keys, values), (prefix_keys, prefix_values) in zip(self.layers, prefix.layers, strict=True):
                keys[start:end, :, :count] = prefix_keys[:, :, :count]
                values[start:end, :, :count] = prefix_values[:, :, :count]
            start = end
        self.seen[:, :count] = True
        self.used = count

    def make_room(self, columns: int) -> None:
        """Make sure that so many more columns fit."""
        lacking = self.used + columns - self.seen.shape[1]
        if lacking <= 0:
            return
        more = max(lacking, self.seen.shape[1] // 4)
        self.seen = torch.nn.functional.pad(self.seen, (0, more))
        self.layers = [
            (torch.nn.functional.pad(keys, (0, 0, 0, more)), torch.nn.functional.pad(values, (0, 0, 0, more)))
            for keys, values in self.layers
        ]

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows."""
        chosen = torch.tensor(rows, dtype=torch.int64)
        self.adapters = [self.adapters[row] for row in rows]
        self.seen = self.seen[chosen]
        chosen = chosen.to(self.layers[0][0].device)
        if rows:
            self.layers = [(keys[chosen], values[chosen]) for keys, values in self.layers]
        else:
            self.layers = []


def _mask(pending: int, tree: DraftTree, width: int) -> Tensor:
    """Who sees whom among new positions, ``[width, width]``: pending tokens those before them, a node of the tree all
    pending tokens and its ancestors. Every position sees itself, also one that is padding."""
    mask = torch.eye(width, dtype=torch.bool)
    mask[:pending, :pending] = torch.ones(pending, pending, dtype=torch.bool).tril()
    rows = {ROOT: pending - 1}
    for row, node in enumerate(tree.computed, start=pending):
        rows[node] = row
        if pending:
            mask[row] |= mask[rows[tree.parents[node]]]
    return mask


def _load_model(folder: Path, dtype: torch.dtype | str, device: str) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(folder)
    if config.model_type != "qwen3":
        raise GuardUnavailable(f"{folder} is a model of type {config.model_type}: expected qwen3")
    if getattr(config, "use_sliding_window", False):
        raise GuardUnavailable(f"{folder} has a sliding window, which is not supported")
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=dtype, attn_implementation=GROUPED_ATTENTION, output_loading_info=True
    )
    if missing := sorted(report["missing_keys"]):
        raise GuardUnavailable(f"{folder} lacks {len(missing)} tensors, such as {missing[0]}")
    return model.to(device).eval()
