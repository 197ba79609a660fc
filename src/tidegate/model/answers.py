"""How the answer of a Gen guard is read off along its most probable tokens, whatever computes them. Knows no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from tidegate.errors import UnreadableVerdict
from tidegate.model.draft_tree import ROOT, DraftTree
from tidegate.model.prompt_tokens import PromptTokenizer
from tidegate.prompts import Form, LineKind

__all__ = ["FLOOR", "Row", "Scores", "common_beginning", "end_ids", "follow"]

FLOOR: Final = 0.1
"""The least probability that the three severities must have together: with less, a model guesses and does not answer
in the form, even if its likeliest token happens to be of it."""

_MOST_ANSWER: Final = 512
"""Tokens after which an answer that has not come to an end is given up."""
_ENDS: Final = ("<|im_end|>", "<|endoftext|>")


@dataclass(frozen=True, slots=True)
class Scores:
    """What a model answers to one prompt.

    Attributes:
        answer: the text, as far as it is needed: see `Form.complete` and `Form.read`.
        words: for each kind of line with words to choose from, the probability of each of them where the line was first
            reached. They add up to less than 1 where other tokens have a share.
    """

    answer: str
    words: Mapping[LineKind, Mapping[str, float]]


@dataclass(slots=True, eq=False)
class Row:
    """One prompt and its answer so far.

    Attributes:
        form: with which the prompt was made.
        adapter: the adapter that answers; None for the model as it is.
        pending: the ids that are to be computed next.
        length: how many are computed.
        answer: the ids of the answer.
        text: what they stand for.
        words: as in `Scores`.
        outcome: None as long as it is not known.
    """

    form: Form
    adapter: str | None
    pending: list[int]
    length: int = 0
    answer: list[int] = field(default_factory=list)
    text: str = ""
    words: dict[LineKind, Mapping[str, float]] = field(default_factory=dict)
    outcome: Scores | UnreadableVerdict | None = None


def follow(
    row: Row, tree: DraftTree, best: Mapping[int, int], tokenizer: PromptTokenizer, ends: frozenset[int]
) -> list[int]:
    """Follow the most probable tokens behind a row as far as they are known.

    Args:
        row: is brought up to date; with no outcome, its ``pending`` is what must be computed next.
        tree: what was computed behind it.
        best: the most probable token behind the root and each computed node.
        tokenizer: of the model.
        ends: the ids that end an answer.

    Returns:
        Which of the computed nodes lie on the way, by their place among these.
    """
    places = {node: place for place, node in enumerate(tree.computed)}
    accepted: list[int] = []
    node = ROOT
    while True:
        token = best[node]
        if token in ends:
            _finish(row, row.text + "\n", ended=True)
            return accepted
        child = tree.children[node].get(token)
        row.answer.append(token)
        text = tokenizer.text(row.answer)
        if child is None and not (tokenizer.is_text(token) and row.form.can_become(text)):
            row.outcome = UnreadableVerdict(f"the model does not answer in the lines {row.form.heads}")
            return accepted
        row.text = text
        if row.form.complete(text):
            _finish(row, text, ended=False)
            return accepted
        if len(row.answer) >= _MOST_ANSWER:
            row.outcome = UnreadableVerdict(f"the model's answer does not end within {_MOST_ANSWER} tokens")
            return accepted
        if child is None or child not in places:
            row.pending = [token]
            return accepted
        accepted.append(places[child])
        node = child


def _finish(row: Row, text: str, *, ended: bool) -> None:
    """Take an answer that is complete, or that the model has ended."""
    if ended and not (row.form.can_become(text) and row.form.complete(text)):
        row.outcome = UnreadableVerdict(f"the model ended its answer before it had the lines {row.form.heads}")
    elif sum(row.words[LineKind.SEVERITY].values()) < FLOOR:
        row.outcome = UnreadableVerdict(f"the three severities have a probability below {FLOOR} together")
    else:
        row.outcome = Scores(text, MappingProxyType(row.words))


def common_beginning(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids two sequences begin with together; at least one of the second is left."""
    most = min(len(one), len(other) - 1)
    return next((place for place in range(most) if one[place] != other[place]), most)


def end_ids(configured: int | list[int] | None, tokenizer: PromptTokenizer) -> frozenset[int]:
    """The ids that end an answer: those of the tokenizer, and ``eos_token_id`` of a config for generation."""
    listed = configured if isinstance(configured, list) else [configured]
    named = [tokenizer.control.get(name) for name in _ENDS]
    return frozenset(token for token in (*listed, *named) if token is not None)
