"""The likely ways in which an answer goes on, as a tree of tokens that one forward pass can compute. Knows no torch.

Each token sees its ancestors alone, so that a model gives for every token of the tree what would follow it if the
answer went that way. Method: Miao et al. 2024, "SpecInfer: Accelerating Large Language Model Serving with Tree-based
Speculative Inference and Verification" (token tree verification), with the drafts of a `Form` in place of a small
model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

from tidegate.prompts import Draft, LineKind

__all__ = ["ROOT", "DraftTree"]

ROOT: Final = 0
"""The node of what has been said so far: the last token before the tree."""


class DraftTree:
    """A tree of drafts. Nodes are numbers; a parent's is smaller than its children's.

    Args:
        drafts: from one call of `Form.drafts`.
        encode: text to token ids.

    Attributes:
        tokens: the token of each node; that of the root does not count.
        parents: the parent of each node; the root is its own.
        depths: how far each node is from the root.
        children: for each node, its children by their token.
        words: for each word to choose from, the node before it and its own; empty when there is nothing to choose from.
        kind: what the words say; None when there are none.
    """

    def __init__(self, drafts: Iterable[Draft], encode: Callable[[str], Sequence[int]]) -> None:
        self.tokens = [-1]
        self.parents = [ROOT]
        self.depths = [0]
        self.children: list[dict[int, int]] = [{}]
        self.words: dict[str, tuple[int, int]] = {}
        self.kind: LineKind | None = None
        leaves = set()
        for draft in drafts:
            before = self._grow(ROOT, encode(draft.before))
            node = self._grow(before, encode(draft.word))
            if draft.word:
                self.kind = draft.kind
                self.words[draft.word.strip()] = (before, node)
            for part in draft.after:
                node = self._grow(node, encode(part))
            if not draft.ends:
                leaves.add(node)
        self.computed = tuple(n for n in range(1, len(self.tokens)) if self.children[n] or n in leaves)
        """The nodes that a model must compute: those of which it is asked what follows."""

    def _grow(self, node: int, tokens: Sequence[int]) -> int:
        """Go on from a node along tokens; returns where that ends."""
        for token in tokens:
            child = self.children[node].get(token)
            if child is None:
                child = len(self.tokens)
                self.tokens.append(token)
                self.parents.append(node)
                self.depths.append(self.depths[node] + 1)
                self.children.append({})
                self.children[node][token] = child
            node = child
        return node

    def word_probabilities(self, log_probabilities: Sequence[float]) -> Mapping[str, float]:
        """The probability of each word, given what stands before it.

        A word with which another one begins has the probability that is left when the other is taken off.

        Args:
            log_probabilities: for each node the natural logarithm of its probability given its parent.
        """
        along = {word: math.exp(self._log_path(*ends, log_probabilities)) for word, ends in self.words.items()}
        nodes = {end: word for word, (_, end) in self.words.items()}
        alone = dict(along)
        for word, (before, end) in self.words.items():
            node = self.parents[end]
            while node > before and node not in nodes:
                node = self.parents[node]
            if node > before:
                alone[nodes[node]] -= along[word]
        return {word: max(0.0, probability) for word, probability in alone.items()}

    def _log_path(self, before: int, end: int, log_probabilities: Sequence[float]) -> float:
        total, node = 0.0, end
        while node != before:
            total += log_probabilities[node]
            node = self.parents[node]
        return total
