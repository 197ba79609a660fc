"""Train the wide part of an edge guard: one table of hashed n-grams for prompts and one for responses.

Multinomial logistic regression on the n-grams of `tidegate.model.wide`, by AdaGrad (Duchi et al. 2011), on the same
balanced draws as the model beside it. A response is learned twice: whole, and up to a token drawn at random with the
token-level target of train/batches.py, because the table must speak at every token. N-grams are left out at random, so
that none decides alone. It takes minutes on one core.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from tidegate.data.mix import Drawn, Mix
from tidegate.model.tokens import TextTokenizer
from tidegate.model.wide import COLUMNS, NgramHasher, table_shift
from tidegate.train.args import LossPart, TemplatePart, WidePart
from tidegate.train.batches import token_weights
from tidegate.types import Severity, Target

__all__ = ["train_wide"]

_TEXTS_IN_A_STEP = 512
_PREFIX_WEIGHT = 0.7
_CLIPPED = 5e-4
"""Share of the weights that are clipped, so that the others are stored more finely."""
_CLASS = {Severity.SAFE: 0, Severity.UNSAFE: 1, Severity.CONTROVERSIAL: 2}
"""Safe, then the columns of the table."""

Progress = Callable[[int, int], None]


class _Row(NamedTuple):
    """The table's rows of a text's n-grams, its class and its weight in the loss."""

    rows: NDArray[np.int64]
    label: int
    weight: float


@dataclass(slots=True)
class _Branch:
    """The table of one target while it is trained."""

    table: nn.EmbeddingBag
    bias: nn.Parameter
    optimizer: torch.optim.Optimizer
    waiting: list[_Row] = field(default_factory=list)


def train_wide(
    mix: Mix,
    tokenizer: TextTokenizer,
    settings: WidePart,
    template: TemplatePart,
    loss: LossPart,
    *,
    seed: int,
    progress: Progress | None = None,
) -> tuple[NDArray[np.int8], Mapping[str, float]]:
    """Train both tables.

    Args:
        mix: what is drawn.
        tokenizer: the guard's.
        settings: size and length of training.
        template: the window, to which texts are cut.
        loss: smoothing, and how the weight of a label grows over an answer.
        seed: of cuts and of what is left out.
        progress: told the texts that were drawn, and those in all.

    Returns:
        The tables as `tidegate.model.wide.WideTable` takes them, int8 ``[2, rows, COLUMNS]``, and what 1 in them is
        worth in logits, by target.
    """
    rng = np.random.default_rng(seed)
    hasher, shift = NgramHasher(tokenizer.token_bytes()), table_shift(1 << settings.bits)
    branches = {target: _branch(1 << settings.bits, settings.lr) for target in Target}
    for drawn_texts in range(settings.texts):
        drawn = mix.draw()
        branch = branches[drawn.target]
        branch.waiting += _rows_of(drawn, tokenizer, hasher, shift, template, loss, rng)
        if len(branch.waiting) >= _TEXTS_IN_A_STEP:
            _step(branch, settings, loss.smoothing, 1 - drawn_texts / settings.texts, rng)
        if progress and drawn_texts % 1000 == 0:
            progress(drawn_texts, settings.texts)
    stored = {target: _stored(branch.table.weight.detach().numpy()) for target, branch in branches.items()}
    values = np.stack([stored[target][0] for target in (Target.PROMPT, Target.RESPONSE)])
    return values, {target.value: scale for target, (_, scale) in stored.items()}


def _branch(rows: int, lr: float) -> _Branch:
    table = nn.EmbeddingBag(rows, COLUMNS, mode="sum", sparse=True)
    nn.init.zeros_(table.weight)
    bias = nn.Parameter(torch.zeros(COLUMNS))
    groups: list[dict[str, Any]] = [{"params": [table.weight], "lr": lr}, {"params": [bias], "lr": lr / 50}]
    return _Branch(table, bias, torch.optim.Adagrad(groups, eps=1e-8))


def _rows_of(
    drawn: Drawn,
    tokenizer: TextTokenizer,
    hasher: NgramHasher,
    shift: np.uint64,
    template: TemplatePart,
    loss: LossPart,
    rng: np.random.Generator,
) -> list[_Row]:
    """A text as rows to learn from: whole, and an answer also up to one of its tokens."""
    tokens = tokenizer.encode(drawn.text)
    if len(tokens) > template.window and not drawn.known_onset:
        start = int(rng.integers(len(tokens) - template.window + 1))
        tokens = tokens[start : start + template.window]
    tokens = tokens[: template.window]
    if not tokens:
        return []
    hashes, owner = hasher.hashes([token.id for token in tokens])
    rows, label = (hashes >> shift).astype(np.int64), _CLASS[drawn.severity]
    weights, safe = token_weights(drawn, tokens, loss.ramp)
    result = [_Row(rows, 0 if safe[-1] else label, drawn.weight)]
    if drawn.target is Target.RESPONSE:
        at = int(rng.integers(len(tokens)))
        part = _Row(rows[owner <= at], 0 if safe[at] else label, _PREFIX_WEIGHT * drawn.weight * float(weights[at]))
        result.append(part)
    return result


def _step(branch: _Branch, settings: WidePart, smoothing: float, share: float, rng: np.random.Generator) -> None:
    batch, branch.waiting = branch.waiting, []
    kept = [row.rows[rng.random(len(row.rows)) >= settings.drop] for row in batch]
    counts = np.asarray([len(rows) for rows in kept])
    offsets = torch.from_numpy(np.cumsum(counts) - counts)
    sums = branch.table(torch.from_numpy(np.concatenate(kept)), offsets)
    against_safe = sums / torch.from_numpy(np.sqrt(np.maximum(counts, 1))).float()[:, None] + branch.bias
    logits = functional.pad(against_safe, (1, 0))
    labels = torch.tensor([row.label for row in batch])
    each = functional.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    loss = (each * torch.tensor([row.weight for row in batch])).mean()
    branch.optimizer.param_groups[0]["lr"] = settings.lr * max(0.001, share)
    branch.optimizer.zero_grad(set_to_none=True)
    # what torch would check is what an EmbeddingBag makes
    with torch.sparse.check_sparse_tensor_invariants(enable=False):
        loss.backward()
        branch.optimizer.step()


def _stored(weight: NDArray[np.float32]) -> tuple[NDArray[np.int8], float]:
    """A table in 8 bits and what 1 in it is worth."""
    sizes = np.abs(weight[weight != 0])
    scale = float(np.quantile(sizes, 1 - _CLIPPED)) / 127 if len(sizes) else 1.0
    return np.clip(np.rint(weight / scale), -127, 127).astype(np.int8), scale
