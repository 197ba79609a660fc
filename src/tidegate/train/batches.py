"""From training texts to packed rows with a target at every position.

The token-level target. A prompt is judged at the token that ends the user's turn, as the official models do. Answers
carry one label for the whole, but the guard must speak at every token:

- a Safe answer is safe at each of its tokens;
- in an answer that is not safe, nobody says where the harm begins, and its beginning is often harmless ("Sure, ...").
  So the weight of its label *grows* over the answer, as (position / length)^ramp. Beginnings that safe and unsafe
  answers share are then pulled towards Safe by the safe ones with full weight, and only evidence lifts the probability;
- in a stream composed of a safe beginning and an answer, tokens before the seam are Safe with full weight, and the
  growth begins there; where the onset itself is known, the full weight is reached within a few tokens;
- the token that ends the answer is judged as a whole, with full weight.

This is a multiple-instance target with a soft, monotone assignment of the bag's label to its instances; compared with a
maximum over positions it gives a gradient to all late tokens instead of one.

Several texts share a row; a text sees only itself (block-diagonal causal mask, positions from 0).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tidegate.data.mix import Drawn, Mix
from tidegate.model.tokens import TextTokenizer, Token
from tidegate.train.args import LossPart, TemplatePart
from tidegate.types import PROMPT_CATEGORIES, RESPONSE_CATEGORIES, Role, Severity, Target

__all__ = ["Batch", "Packed", "encode", "pack", "packed_batches", "token_weights"]

RISK_ID = {Severity.SAFE: 0, Severity.UNSAFE: 1, Severity.CONTROVERSIAL: 2}
_ROLE_TOKEN = {Role.SYSTEM: "<|system|>", Role.USER: "<|user|>", Role.TOOL: "<|tool|>", Role.ASSISTANT: "<|assistant|>"}
_ONSET_TOKENS = 6

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Packed:
    """One text with its targets: ``ids`` [T], ``risk_weight`` and ``query_weight`` [T], ``label`` [T] (risk ids),
    ``categories`` [9], which is all zero when they are not known, and ``teacher`` [3] (by risk id), which is the
    target of the text as a whole that a teacher gave, None when none did."""

    ids: list[int]
    label: Ints
    risk_weight: Floats
    query_weight: Floats
    categories: Floats
    teacher: Floats | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of packed texts.

    ``ids``, ``positions``, ``segments``, ``labels`` are int64 [rows, window] (segment -1 is padding), the weights
    float32 of the same shape, ``categories`` float32 [rows, window, 9], ``teacher`` float32 [rows, window, 3], all zero
    but at the ends of texts that have one; ``texts`` is how many texts are in it.
    """

    ids: Ints
    positions: Ints
    segments: Ints
    labels: Ints
    risk_weight: Floats
    query_weight: Floats
    categories: Floats
    teacher: Floats
    texts: int


def encode(
    drawn: Drawn, tokenizer: TextTokenizer, template: TemplatePart, loss: LossPart, start: float = 0.0
) -> Packed:
    """Ids and targets of one text, cut to one window.

    Args:
        drawn: the text.
        tokenizer: the guard's.
        template: window and context sizes.
        loss: exponents and weights.
        start: where the cut begins when the text is longer than the window, as a share of what does not fit, in [0, 1].
    """
    control = tokenizer.control
    header = _header(drawn.context, tokenizer, template.context) if drawn.context else []
    tokens = tokenizer.encode(drawn.text)
    room = template.window - len(header) - 2
    skip = int(start * max(0, len(tokens) - room)) if not drawn.known_onset else 0
    cut = skip > 0
    tokens = tokens[skip : skip + room - cut]
    opening = [control[_ROLE_TOKEN[drawn.role]], *([control["<|more|>"]] if cut else [])]
    ids = [*header, *opening, *(token.id for token in tokens), control["<|end|>"]]
    first = len(header) + len(opening)
    label = np.full(len(ids), RISK_ID[drawn.severity], dtype=np.int64)
    risk, query = np.zeros(len(ids), np.float32), np.zeros(len(ids), np.float32)
    if drawn.target is Target.PROMPT:
        growth = np.arange(1, len(tokens) + 1, dtype=np.float32) / max(1, len(tokens))
        query[first:-1] = loss.prefix * growth**loss.ramp / max(1, len(tokens))
        query[-1] = 1.0
    else:
        weights, safe = token_weights(drawn, tokens, loss.ramp)
        risk[first:-1] = weights / max(1, len(tokens))
        label[first:-1][safe] = RISK_ID[Severity.SAFE]
        risk[-1] = 1.0
        if drawn.known_onset and (not tokens or tokens[-1].end <= drawn.onset):
            label[:] = RISK_ID[Severity.SAFE]
    teacher = None if drawn.teacher is None or cut else _by_risk_id(drawn.teacher)
    return Packed(ids, label, risk * drawn.weight, query * drawn.weight, _category_target(drawn), teacher)


def _by_risk_id(probabilities: tuple[float, float, float]) -> Floats:
    result = np.zeros(3, np.float32)
    for severity in Severity:
        result[RISK_ID[severity]] = probabilities[severity]
    return result


def _header(context: str, tokenizer: TextTokenizer, limit: int) -> list[int]:
    control = tokenizer.control
    ids = [token.id for token in tokenizer.encode(context)]
    if len(ids) > limit:
        head = limit // 2
        ids = [*ids[:head], control["<|more|>"], *ids[len(ids) - (limit - head) :]]
    return [control["<|user|>"], *ids, control["<|end|>"]]


def token_weights(drawn: Drawn, tokens: Sequence[Token], ramp: float) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """The weight of each token of an answer, and which of them are Safe for being before the onset."""
    count = len(tokens)
    weights = np.ones(count, np.float32)
    safe = np.zeros(count, bool)
    if drawn.severity is Severity.SAFE:
        return weights, safe
    ends = np.asarray([token.end for token in tokens])
    if drawn.known_onset:
        safe = ends <= drawn.onset
        after = np.cumsum(~safe)
        growth = np.minimum(1.0, after / _ONSET_TOKENS) if drawn.sharp else (after / max(1, after[-1:].sum())) ** ramp
        return np.where(safe, 1.0, growth).astype(np.float32), safe
    growth = np.arange(1, count + 1, dtype=np.float32) / max(1, count)
    return (growth**ramp).astype(np.float32), safe


def _category_target(drawn: Drawn) -> Floats:
    target = np.zeros(len(PROMPT_CATEGORIES), np.float32)
    if drawn.severity is Severity.SAFE:
        return target
    known = PROMPT_CATEGORIES if drawn.target is Target.PROMPT else RESPONSE_CATEGORIES
    for name in drawn.categories:
        if name in known:
            target[known.index(name)] = 1.0
    total = target.sum()
    return target / total if total else target


def pack(texts: Sequence[Packed], window: int) -> list[list[Packed]]:
    """Put texts into rows of at most ``window`` positions, longest first, each into the fullest row that has room."""
    rows: list[list[Packed]] = []
    room: list[int] = []
    for text in sorted(texts, key=lambda t: -len(t.ids)):
        size = len(text.ids)
        best = -1
        for index in range(max(0, len(rows) - 200), len(rows)):
            if room[index] >= size and (best < 0 or room[index] < room[best]):
                best = index
        if best < 0:
            rows.append([])
            room.append(window)
            best = len(rows) - 1
        rows[best].append(text)
        room[best] -= size
    return rows


def to_batch(rows: Sequence[Sequence[Packed]], window: int) -> Batch:
    """Arrays of packed rows."""
    shape = (len(rows), window)
    ids, positions, labels = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    segments = np.full(shape, -1, np.int64)
    risk, query = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    categories = np.zeros((*shape, len(PROMPT_CATEGORIES)), np.float32)
    teacher = np.zeros((*shape, 3), np.float32)
    for r, row in enumerate(rows):
        at = 0
        for segment, text in enumerate(row):
            span = slice(at, at + len(text.ids))
            ids[r, span], positions[r, span], segments[r, span] = text.ids, np.arange(len(text.ids)), segment
            labels[r, span], risk[r, span], query[r, span] = text.label, text.risk_weight, text.query_weight
            categories[r, span] = text.categories
            at += len(text.ids)
            if text.teacher is not None:
                teacher[r, at - 1] = text.teacher
    count = sum(len(row) for row in rows)
    return Batch(ids, positions, segments, labels, risk, query, categories, teacher, count)


def packed_batches(
    mix: Mix,
    tokenizer: TextTokenizer,
    template: TemplatePart,
    loss: LossPart,
    *,
    rows: int,
    seed: int,
    drop_tokens: float = 0.0,
    pool: int = 3072,
) -> Iterator[Batch]:
    """Endless batches of ``rows`` packed rows; texts of one pool are packed together and their rows shuffled.

    Of the tokens of text a share of ``drop_tokens``, drawn at random, is hidden behind ``<|pad|>``.
    """
    hidden, first_text = tokenizer.control["<|pad|>"], max(tokenizer.control.values()) + 1
    rng = np.random.default_rng(seed)
    left: list[list[Packed]] = []
    while True:
        texts = [encode(mix.draw(), tokenizer, template, loss, float(rng.random())) for _ in range(pool)]
        packed = pack(texts, template.window)
        ready = [packed[i] for i in rng.permutation(len(packed))] + left
        while len(ready) >= rows:
            batch = to_batch(ready[:rows], template.window)
            if drop_tokens:
                batch.ids[(rng.random(batch.ids.shape) < drop_tokens) & (batch.ids >= first_text)] = hidden
            yield batch
            ready = ready[rows:]
        left = ready
