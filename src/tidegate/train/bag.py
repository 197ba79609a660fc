"""Token embeddings that know what they are a sign of: a bag of tokens trained to tell severities and categories.

A mean of token embeddings under linear heads (Joulin et al. 2016) sees far more text a second than the model itself.
Its embeddings become a part of the model's, which then starts from what single words tell, and has to learn only what
their order and company change.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from tidegate.train.batches import Packed

__all__ = ["bag_embeddings"]


def bag_embeddings(
    texts: Sequence[Packed],
    *,
    vocab_size: int,
    dim: int,
    epochs: int = 4,
    batch: int = 512,
    token_dropout: float = 0.3,
    scale: float = 0.05,
    seed: int = 0,
) -> npt.NDArray[np.float32]:
    """Embeddings ``[vocab_size, dim]`` float32 from labelled texts.

    Args:
        texts: encoded texts with their targets; each is read as a whole, by the label at its end.
        vocab_size: number of rows.
        dim: number of columns.
        epochs: how often every text is seen.
        batch: texts in a step.
        token_dropout: share of tokens left out at random, so that no rare token decides alone.
        scale: root mean square of the entries of frequent tokens; rare tokens are shrunk towards nothing.
        seed: of everything random.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    table = nn.EmbeddingBag(vocab_size, dim, mode="mean")
    nn.init.normal_(table.weight, std=0.02)
    heads = nn.ModuleDict({"risk": nn.Linear(dim, 3), "query": nn.Linear(dim, 3), "category": nn.Linear(dim, 9)})
    optimizer = torch.optim.Adam([*table.parameters(), *heads.parameters()], lr=4e-3, fused=True)
    ids = [np.asarray(text.ids, dtype=np.int64) for text in texts]
    labels = torch.from_numpy(np.asarray([text.label[-1] for text in texts]))
    weights = torch.from_numpy(np.asarray([text.risk_weight[-1] + text.query_weight[-1] for text in texts]))
    prompts = torch.from_numpy(np.asarray([text.query_weight[-1] > 0 for text in texts]))
    categories = torch.from_numpy(np.stack([text.categories for text in texts]))
    steps, total = 0, epochs * (len(texts) // batch)
    for _ in range(epochs):
        order = rng.permutation(len(texts))
        for at in range(0, len(texts) - batch + 1, batch):
            chosen = order[at : at + batch]
            rows = [_thinned(ids[i], token_dropout, rng) for i in chosen]
            offsets = torch.from_numpy(np.cumsum([0, *(len(row) for row in rows[:-1])]))
            mean = table(torch.from_numpy(np.concatenate(rows)), offsets)
            picked = torch.from_numpy(chosen)
            logits = torch.where(prompts[picked][:, None], heads["query"](mean), heads["risk"](mean))
            risk = functional.cross_entropy(logits, labels[picked], reduction="none", label_smoothing=0.05)
            named = -(categories[picked] * functional.log_softmax(heads["category"](mean), -1)).sum(-1)
            loss = ((risk + 0.3 * named * (labels[picked] != 0)) * weights[picked]).mean()
            for group in optimizer.param_groups:
                group["lr"] = 4e-3 * (1 - steps / max(1, total))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            steps += 1
    return _scaled(table.weight.detach().numpy(), np.bincount(np.concatenate(ids), minlength=vocab_size), scale)


def _thinned(ids: npt.NDArray[np.int64], dropout: float, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    kept = ids[rng.random(len(ids)) >= dropout]
    return kept if len(kept) else ids


def _scaled(weight: npt.NDArray[np.float32], counts: npt.NDArray[np.int64], scale: float) -> npt.NDArray[np.float32]:
    centred = weight - (weight * counts[:, None]).sum(axis=0) / max(1, counts.sum())
    shrunk = centred * (counts / (counts + 10.0))[:, None]
    frequent = counts >= 10
    root = np.sqrt((shrunk[frequent] ** 2).mean()) if frequent.any() else 1.0
    return np.asarray(np.clip(shrunk * (scale / root), -6 * scale, 6 * scale), dtype=np.float32)
