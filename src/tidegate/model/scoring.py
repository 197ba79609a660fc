"""Gen checkpoints: the answer of greedy decoding, and the probabilities at its choices, in one or two forward passes.

A Gen guard answers in few fixed lines (`tidegate.prompts`). Behind a prompt, one pass computes every likely beginning
of the answer as a tree of tokens; the answer is read off along the most probable tokens. What is read is what greedy
decoding would say, token by token; where it leaves the tree it is followed one token at a time, and where it leaves the
form there is no verdict. The probability of a severity is that of its whole sequence of tokens.

The fixed beginning of a prompt is computed once for each adapter. Prompts that are computed together, whatever their
length and adapters, are rows of one matrix without padding (`tidegate.model.backbone`). Nothing of one reaches
another, but a model may round differently in company (far below 1e-4 in float32, visibly in bfloat16). Of the last
layer, only the positions are computed from which the answer is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tidegate.errors import GuardUnavailable, InputError, UnreadableVerdict
from tidegate.model.adapters import Adapters
from tidegate.model.answers import FLOOR, Row, Scores, common_beginning, end_ids, follow
from tidegate.model.attention import Attention, Span
from tidegate.model.backbone import Backbone
from tidegate.model.cached import KeysAndValues
from tidegate.model.draft_tree import ROOT, DraftTree
from tidegate.model.folders import checkpoint_folder
from tidegate.model.loading import DTYPES
from tidegate.model.prompt_tokens import PromptTokenizer
from tidegate.model.stream import GROUPED_ATTENTION
from tidegate.prompts import Form, Prompt

__all__ = ["FLOOR", "GenModel", "Scores"]

_CHUNK: Final = 1024
"""Most positions of one prompt in one pass: a mask of more would be large."""
_ROOM: Final = 128
"""Positions behind a prompt for which there is room at first: for a tree, and the steps of a reason."""
_LOGIT_ROWS: Final = 64
"""Positions whose logits are computed at once: each has as many as there are tokens."""
_MOST_PREFIXES: Final = 64
"""Most fixed beginnings that are kept: each has the keys and values of a few hundred tokens."""


class GenModel:
    """A causal language model of Qwen3 shape and its tokenizer. One call at a time.

    Args:
        model: as ``AutoModelForCausalLM`` loads it, in evaluation mode; its weights are laid out anew for inference
            (`tidegate.model.layout`).
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
        embeddings = model.get_input_embeddings().weight
        self._device, self._dtype = embeddings.device, embeddings.dtype
        self._backbone = Backbone(model)
        self._adapters.attach(model)
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
            texts = self._begin(form, sorted(rows, key=lambda row: row.adapter or ""))
            while texts:
                self._advance(texts)
                texts = [text for text in texts if text.row.outcome is None]
        return [row.outcome or UnreadableVerdict("no answer") for row in rows]

    def _begin(self, form: Form, rows: list[Row]) -> list[_Text]:
        """Each row behind its part of the fixed beginning; what is too long for one pass is computed, but for its end.

        Rows with one adapter stand beside each other.
        """
        texts = []
        for row in rows:
            prefix = self._prefix(form, row.adapter)
            shared = common_beginning(prefix.ids, row.pending)
            cache = prefix.cache.beginning(shared, len(row.pending) + _ROOM)
            row.pending, row.length = row.pending[shared:], shared
            texts.append(_Text(row, cache))
        while long := [text for text in texts if len(text.row.pending) > _CHUNK]:
            self._run([_New.plain(text.row.adapter, text.cache, text.row.pending[:_CHUNK]) for text in long], [])
            for text in long:
                text.row.pending = text.row.pending[_CHUNK:]
                text.row.length = text.cache.length = text.cache.length + _CHUNK
        return texts

    def _prefix(self, form: Form, adapter: str | None) -> _Prefix:
        """What all prompts of a form begin with, computed once with each adapter: the keys and values differ."""
        key = form.opening, adapter
        known = self._prefixes.pop(key, None)
        if known is None:
            ids = self._tokenizer.ids(form.fixed_beginning)
            cache = KeysAndValues(self._model.config.num_hidden_layers, len(ids))
            self._run([_New.plain(adapter, cache, ids)], [])
            cache.length = len(ids)
            known = _Prefix(tuple(ids), cache)
            if len(self._prefixes) >= _MOST_PREFIXES:
                del self._prefixes[next(iter(self._prefixes))]
        self._prefixes[key] = known
        return known

    def _advance(self, texts: Sequence[_Text]) -> None:
        """One pass over what is pending and the trees behind it, and as much of each answer as can be read from it."""
        trees = [DraftTree(text.row.form.drafts(text.row.text), self._tokenizer.part) for text in texts]
        new = [_New.with_tree(text, tree) for text, tree in zip(texts, trees, strict=True)]
        ends = accumulate(len(each.ids) for each in new)
        asked = [
            row
            for end, tree in zip(ends, trees, strict=True)
            for row in range(end - len(tree.computed) - 1, end)  # the last pending token and the tree
        ]
        best, log_probabilities = self._read(self._run(new, asked), trees)
        for index, (text, tree) in enumerate(zip(texts, trees, strict=True)):
            row, cache = text.row, text.cache
            cache.length = row.length = row.length + len(row.pending)
            if tree.kind is not None and tree.kind not in row.words:
                row.words[tree.kind] = tree.word_probabilities(log_probabilities[index])
            accepted = follow(row, tree, best[index], self._tokenizer, self._ends)
            cache.keep([cache.length + place for place in accepted])
            row.length = cache.length

    def _run(self, new: Sequence[_New], wanted: Sequence[int]) -> Tensor:
        """One pass: hidden states ``[wanted, hidden_size]`` of some of the new positions, counted through all texts.

        Keys and values are behind those of each text; its length stays.
        """
        config = self._model.config
        attentions, slices, start = [], [], 0
        for each in new:
            attentions.append(
                Attention(
                    [Span(0, each.cache.length, len(each.ids))],
                    heads=config.num_attention_heads,
                    kv_heads=config.num_key_value_heads,
                    dtype=self._dtype,
                    device=self._device,
                    trees=[each.seen],
                )
            )
            slices.append(slice(start, start + len(each.ids)))
            start += len(each.ids)

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            key, value = key.transpose(0, 1), value.transpose(0, 1)
            mixed = []
            for each, attention, rows in zip(new, attentions, slices, strict=True):
                keys, values = each.cache.update(layer, key[:, rows], value[:, rows])
                mixed.append(attention(query[rows], keys, values))
            return mixed[0] if len(mixed) == 1 else torch.cat(mixed)

        ids = torch.tensor([token for each in new for token in each.ids])
        positions = torch.tensor([each.cache.length + depth for each in new for depth in each.depths])
        rows = torch.tensor(wanted, dtype=torch.int64).to(self._device)
        alone = len({each.adapter for each in new}) == 1  # else an adapter must find its rows in the last layer too
        with self._adapters.on([each.adapter for each in new for _ in each.ids]):
            hidden = self._backbone.forward(
                ids.to(self._device), positions.to(self._device), attend, rows if alone else None
            )
        if not alone:
            hidden = hidden[rows]
        normed: Tensor = self._model.base_model.norm(hidden)
        return normed

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
            top, at_top = logits.max(dim=-1, keepdim=True)
            best += at_top[:, 0].tolist()
            here = (wanted_ids >= start) & (wanted_ids < start + _LOGIT_ROWS)
            rows, columns = (wanted_ids[here] - start).to(logits.device), token_ids[here].to(logits.device)
            logits -= top
            wanted_logits = logits[rows, columns]
            found += (wanted_logits - logits.exp_().sum(dim=-1).log()[rows]).tolist()
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
    """Tokens, and their keys and values."""

    ids: tuple[int, ...]
    cache: KeysAndValues


@dataclass(frozen=True, slots=True, eq=False)
class _Text:
    """A prompt and its answer so far; the cache holds as many positions as the row is long."""

    row: Row
    cache: KeysAndValues


@dataclass(frozen=True, slots=True, eq=False)
class _New:
    """New positions of a text in one pass.

    Attributes:
        adapter: with which they are computed; None for none.
        cache: what is known of the text.
        ids: their tokens.
        depths: how many positions behind the cache each of them is.
        seen: as `Attention` takes it.
    """

    adapter: str | None
    cache: KeysAndValues
    ids: Sequence[int]
    depths: Sequence[int]
    seen: Tensor | None = None

    @classmethod
    def plain(cls, adapter: str | None, cache: KeysAndValues, ids: Sequence[int]) -> _New:
        """Tokens one after the other."""
        return cls(adapter, cache, ids, range(len(ids)))

    @classmethod
    def with_tree(cls, text: _Text, tree: DraftTree) -> _New:
        """What is pending of a text, and a tree behind it."""
        pending = len(text.row.pending)
        ids = [*text.row.pending, *(tree.tokens[node] for node in tree.computed)]
        depths = [*range(pending), *(pending - 1 + tree.depths[node] for node in tree.computed)]
        return cls(text.row.adapter, text.cache, ids, depths, _seen(pending, tree) if tree.computed else None)


def _seen(pending: int, tree: DraftTree) -> Tensor:
    """Who sees whom among new positions, ``[new, new]``: pending tokens those before them and themselves, a node of the
    tree all pending tokens, its ancestors and itself."""
    mask = torch.eye(pending + len(tree.computed), dtype=torch.bool)
    mask[:pending, :pending] = torch.ones(pending, pending, dtype=torch.bool).tril()
    rows = {ROOT: pending - 1}
    for row, node in enumerate(tree.computed, start=pending):
        rows[node] = row
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
