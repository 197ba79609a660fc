"""A text computed in pieces says what it says when computed at once."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from stream_folder import tiny_model  # noqa: E402
from tidegate.errors import InputError, SessionClosed  # noqa: E402
from tidegate.model.cached import CachedText, probabilities  # noqa: E402
from tidegate.model.stream import GROUPED_ATTENTION, StreamLogits  # noqa: E402

LENGTH = 160
SHAPES: dict[str, dict[str, Any]] = {
    "grouped queries": {},
    "one key head": {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 8},
    "no groups": {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": None},
    "wide heads": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
}
ATTENTIONS = ("sdpa", "eager", GROUPED_ATTENTION)
IDS = torch.randint(0, 300, (LENGTH,), generator=torch.Generator().manual_seed(5))
TOLERANCE = 1e-5
"""Largest difference of a probability in float32."""
BF16_TOLERANCE = 0.08
"""The same in bfloat16, on these models, whose weights are far larger than trained ones: transformers' own forward in
bfloat16 is up to 0.06 to 0.1 from float32 there. Labels are equal wherever the two best are further apart than twice
this."""
BF16_MEAN = 0.01
"""The mean of these differences."""

MODELS = {
    (shape, attention): tiny_model(attention=attention, **SHAPES[shape]) for shape in SHAPES for attention in ATTENTIONS
}


def whole(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    with torch.inference_mode():
        return [probabilities(head[0]) for head in model(ids[None])]


def joined(parts: list[StreamLogits]) -> list[torch.Tensor]:
    return [probabilities(torch.cat(head)) for head in zip(*parts, strict=True)]


EXPECTED = {shape: whole(MODELS[shape, "sdpa"], IDS) for shape in SHAPES}


def pieces(places: list[int]) -> list[torch.Tensor]:
    ends = sorted({0, *(place % LENGTH for place in places), LENGTH})
    return [IDS[start:end] for start, end in pairwise(ends)]


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=15)
@given(places=st.lists(st.integers(0, LENGTH - 1), max_size=12))
@example(places=[])
@example(places=list(range(LENGTH)))
@example(places=[1])
@example(places=[LENGTH - 1])
def test_every_chunking_gives_the_probabilities_of_one_forward(shape: str, attention: str, places: list[int]) -> None:
    text = CachedText(MODELS[shape, attention])
    got = joined([text.append(piece) for piece in pieces(places)])
    for head, expected in zip(got, EXPECTED[shape], strict=True):
        torch.testing.assert_close(head, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("attention", ATTENTIONS)
@settings(max_examples=25)
@given(steps=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 40)), min_size=1, max_size=8))
def test_what_was_taken_back_leaves_no_trace(attention: str, steps: list[tuple[int, int]]) -> None:
    """Each step takes some positions back and appends others; the end equals one forward over what remains."""
    model = MODELS["grouped queries", attention]
    text, ids, parts = CachedText(model), torch.empty(0, dtype=torch.int64), []
    for number, (back, new) in enumerate(steps):
        keep = max(0, len(ids) - back)
        text.crop(keep)
        more = IDS.roll(number * 7)[:new]
        ids = torch.cat([ids[:keep], more])
        parts = [StreamLogits(*(torch.cat(head)[:keep] for head in zip(*parts, strict=True)))] if parts else []
        parts.append(text.append(more))
    assert text.length == len(ids)
    for head, expected in zip(joined(parts), whole(model, ids), strict=True):
        torch.testing.assert_close(head, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("attention", ATTENTIONS)
@settings(max_examples=10)
@given(places=st.lists(st.integers(0, LENGTH - 1), max_size=12))
def test_in_bfloat16_the_labels_are_the_same_and_probabilities_nearly(attention: str, places: list[int]) -> None:
    model = HALVES[attention]
    text = CachedText(model)
    got = joined([text.append(piece) for piece in pieces(places)])
    for head, expected in zip(got, whole(model, IDS), strict=True):
        torch.testing.assert_close(head, expected, atol=BF16_TOLERANCE, rtol=0)
        assert (head - expected).abs().mean() < BF16_MEAN
        best = expected.topk(2).values
        clear = best[:, 0] - best[:, 1] > 2 * BF16_TOLERANCE
        assert clear.float().mean() > 0.25
        assert torch.equal(head.argmax(-1)[clear], expected.argmax(-1)[clear])


HALVES = {attention: tiny_model(attention=attention).to(torch.bfloat16) for attention in ATTENTIONS}


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_long_texts_are_computed_in_parts(attention: str) -> None:
    model = MODELS["wide heads", attention]
    ids = torch.randint(0, 300, (1300,), generator=torch.Generator().manual_seed(6))
    got = joined([CachedText(model, room=64).append(ids)])
    for head, expected in zip(got, whole(MODELS["wide heads", "sdpa"], ids), strict=True):
        torch.testing.assert_close(head, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_no_token_sees_a_later_one_in_one_forward(attention: str) -> None:
    """Also with eager attention and a boolean mask, which transformers would add to the scores."""
    model = MODELS["grouped queries", attention]
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()[None, None]
    changed = torch.cat([IDS[:50], IDS[50:].flip(0)])
    with torch.inference_mode():
        for given_mask in (None, mask):
            one = [head[0, :50] for head in model(IDS[None], attention_mask=given_mask)]
            other = [head[0, :50] for head in model(changed[None], attention_mask=given_mask)]
            for left, right, expected in zip(one, other, EXPECTED["grouped queries"], strict=True):
                torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(probabilities(left), expected[:50], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("ids", [[], [[1, 2]], [300], [-1], [1.5], [True]])
def test_wrong_ids_are_refused_and_nothing_is_taken(ids: Any) -> None:
    text = CachedText(MODELS["grouped queries", "sdpa"])
    text.append([1, 2, 3])
    with pytest.raises(InputError, match="ids"):
        text.append(ids)
    assert text.length == 3


@pytest.mark.parametrize("length", [-1, 4])
def test_only_what_is_held_can_be_kept(length: int) -> None:
    text = CachedText(MODELS["grouped queries", "sdpa"])
    text.append([1, 2, 3])
    with pytest.raises(InputError, match="expected 0 to 3"):
        text.crop(length)


def test_a_failed_forward_leaves_the_text_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    text = CachedText(model)
    parts = [text.append(IDS[:10])]
    with monkeypatch.context() as patch:
        patch.setattr(model, "heads", lambda hidden: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            text.append(IDS[10:20])
    assert text.length == 10
    parts.append(text.append(IDS[10:]))
    for head, expected in zip(joined(parts), EXPECTED["grouped queries"], strict=True):
        torch.testing.assert_close(head, expected, atol=TOLERANCE, rtol=0)


def test_after_close_every_call_says_so() -> None:
    text = CachedText(MODELS["grouped queries", "sdpa"])
    text.append([1])
    text.close()
    text.close()
    with pytest.raises(SessionClosed):
        text.append([1])
    with pytest.raises(SessionClosed):
        text.crop(0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_on_a_gpu_every_chunking_says_the_same(attention: str) -> None:
    model = tiny_model(attention=attention).cuda()
    for places in ([], [1], [7, 20, 21, 90], list(range(LENGTH))):
        text = CachedText(model)
        got = joined([text.append(piece) for piece in pieces(places)])
        for head, expected in zip(got, EXPECTED["grouped queries"], strict=True):
            torch.testing.assert_close(head.cpu(), expected, atol=1e-4, rtol=0)
