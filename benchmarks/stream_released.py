"""What a token of one stream costs: the released algorithm, which computes the whole text again, against ours.

    python benchmarks/stream_released.py [--model FOLDER | --shape 0.6b] [--dtype bfloat16] [--device cpu]

Both have the same weights, and are measured in turns in one run: the released algorithm token by token, as it can do no
other (one forward of transformers over the whole text, with all heads at all positions), and ours with 1, 8 and 16
tokens at a time behind contexts of several lengths. Times are medians per token; of the released algorithm behind long
contexts as many as fit in ``--seconds``. The labels of both are compared at 64 positions behind each context. Without
``--model`` the weights are random, which changes no time.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import asdict, dataclass

import torch

from stream_setup import arguments, built, keep, median, progress, seconds, table
from tidegate.model.cached import CachedText
from tidegate.model.stream import Qwen3ForGuardModel, StreamLogits

_COMPARED = 64
"""At so many positions behind a context the labels are compared."""
_CLEAR = 0.1
"""Two best classes that are nearer to each other than this, in probability, may change places by rounding."""


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement; times are milliseconds per token."""

    context: int
    new: int
    """Tokens of one call of ours; the released algorithm takes one."""
    released_ms: float
    released_repeats: int
    ours_ms: float
    ratio: float
    same_labels: float
    """Share of the labels, of the four heads at the compared positions, that are the same."""
    same_clear_labels: float
    """The same of those where the two best classes are further apart than rounding could turn round."""
    most_apart: float
    """Largest difference of a probability at these positions."""


def main() -> None:
    """Measure and write."""
    options = _options()
    released = built(options, attention="sdpa")
    ours = copy.deepcopy(released)
    rows: list[Row] = []
    for context in options.contexts:
        progress(f"context {context}")
        rows += _rows(released, ours, context, options)
        for row in rows[-len(options.new) :]:
            progress(f"{row.new} at a time: {row.released_ms} / {row.ours_ms} ms = {row.ratio} x")
    head = "context|tokens a call|released, ms/token|ours, ms/token|ratio|same labels|of the clear ones|most apart"
    keep("stream_released", options, {"rows": [asdict(row) for row in rows]}, table(head, map(_cells, rows)))


def _cells(row: Row) -> list[object]:
    ratio, same, clear = f"{row.ratio} x", f"{row.same_labels:.1%}", f"{row.same_clear_labels:.1%}"
    return [row.context, row.new, row.released_ms, row.ours_ms, ratio, same, clear, row.most_apart]


def _options() -> argparse.Namespace:
    parser = arguments(__doc__ or "")
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 1024, 4096])
    parser.add_argument("--new", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=60, help="for the released algorithm behind one context")
    return parser.parse_args()


def _rows(
    released: Qwen3ForGuardModel, ours: Qwen3ForGuardModel, context: int, options: argparse.Namespace
) -> list[Row]:
    """First both say what they think of the same positions, which also warms them up; then they are timed in turns."""
    device, most = released.device, max(_COMPARED, *options.new)
    ids = torch.randint(
        0, released.config.vocab_size, (context + most,), generator=torch.Generator().manual_seed(context)
    )
    ids = ids.to(device)
    text = CachedText(ours, room=context + most)
    text.append(ids[:context])
    whole = StreamLogits(*(head[0, context:] for head in _whole(released, ids)))
    agreement = {new: _agreement(whole, _in_pieces(text, ids[context:], new)) for new in options.new}
    theirs: list[float] = []
    times: dict[int, list[float]] = {new: [] for new in options.new}
    for turn in range(options.repeats):
        if turn < 2 or sum(theirs) * (turn + 1) / turn <= options.seconds:
            theirs.append(seconds(lambda: _whole(released, ids[: context + 1]), device))
        for new in options.new:
            text.append(ids[context : context + new])
            text.crop(context)
            times[new].append(seconds(lambda new=new: text.append(ids[context : context + new]), device) / new)
            text.crop(context)
    base = median(theirs)
    return [
        Row(
            context=context,
            new=new,
            released_ms=round(base * 1e3, 2),
            released_repeats=len(theirs),
            ours_ms=round(median(times[new]) * 1e3, 3),
            ratio=round(base / median(times[new]), 1),
            same_labels=agreement[new][0],
            same_clear_labels=agreement[new][1],
            most_apart=agreement[new][2],
        )
        for new in options.new
    ]


def _whole(model: Qwen3ForGuardModel, ids: torch.Tensor) -> StreamLogits:
    """One step of the released algorithm: everything so far, all four heads at every position."""
    with torch.inference_mode():
        return model(ids[None])


def _in_pieces(text: CachedText, ids: torch.Tensor, new: int) -> StreamLogits:
    """What ours says of these ids behind the text, so many at a time; the text is then as before."""
    before = text.length
    parts = [text.append(piece) for piece in ids.split(new)]
    text.crop(before)
    return StreamLogits(*(torch.cat(head) for head in zip(*parts, strict=True)))


def _agreement(one: StreamLogits, other: StreamLogits) -> tuple[float, float, float]:
    """Shares of equal labels, of all and of the clear ones, and the largest difference of a probability."""
    same, clear, apart = [], [], 0.0
    for a, b in zip(one, other, strict=True):
        theirs, ours = a.float().softmax(-1), b.float().softmax(-1)
        best = theirs.topk(2).values
        same.append(theirs.argmax(-1) == ours.argmax(-1))
        clear.append(best[:, 0] - best[:, 1] > _CLEAR)
        apart = max(apart, float((theirs - ours).abs().max()))
    all_same, all_clear = torch.cat(same), torch.cat(clear)
    shares = float(all_same.float().mean()), float(all_same[all_clear].float().mean())
    return round(shares[0], 4), round(shares[1], 4), round(apart, 4)


if __name__ == "__main__":
    main()
