"""Attention of many texts over one cache: each row what a plain computation in float64 gives, on every path."""

from __future__ import annotations

import threading

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tidegate.model.attention import Attention, Span, kernel  # noqa: E402

PATHS = [
    False,
    pytest.param(True, marks=pytest.mark.skipif(kernel() is None, reason="the kernel for CPUs needs Numba")),
]
TOLERANCES = {torch.float32: 5e-5, torch.bfloat16: 0.06}
shapes = st.sampled_from([(4, 2, 8), (3, 1, 16), (2, 2, 10), (8, 1, 4), (8, 4, 64)])
texts = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 140), st.integers(1, 9)), min_size=1, max_size=6)


def placed(gaps: list[tuple[int, int, int]]) -> tuple[list[Span], int]:
    """Spans one behind the other, with gaps between; and how long a cache they need."""
    spans, stop = [], 0
    for gap, cached, new in gaps:
        spans.append(Span(stop + gap, cached, new))
        stop = spans[-1].stop
    return spans, stop


def plainly(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, spans: list[Span]) -> torch.Tensor:
    """The definition, row by row and head by head, in float64."""
    rows, group = [], query.shape[1] // keys.shape[0]
    row = 0
    for span in spans:
        for new in range(span.new):
            seen = slice(span.start, span.start + span.cached + new + 1)
            keys_of = keys[:, seen].double().repeat_interleave(group, 0)
            scores = torch.einsum("hd,hpd->hp", query[row].double(), keys_of) * query.shape[2] ** -0.5
            values_of = values[:, seen].double().repeat_interleave(group, 0)
            rows.append(torch.einsum("hp,hpd->hd", scores.softmax(-1), values_of))
            row += 1
    return torch.stack(rows)


def computed(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, spans: list[Span], *, fast: bool
) -> torch.Tensor:
    attention = Attention(
        spans, heads=query.shape[1], kv_heads=len(keys), dtype=query.dtype, device=query.device, fast=fast
    )
    with torch.inference_mode():
        return attention(query, keys, values)


@pytest.mark.parametrize("fast", PATHS)
@settings(max_examples=20)
@given(shape=shapes, gaps=texts, dtype=st.sampled_from(sorted(TOLERANCES, key=str)), seed=st.integers(0, 99))
@example(shape=(16, 8, 128), gaps=[(0, 127, 1), (3, 64, 1), (0, 0, 1)], dtype=torch.bfloat16, seed=0)
@example(shape=(4, 2, 8), gaps=[(0, 0, 9), (0, 63, 4)], dtype=torch.float32, seed=0)
@example(shape=(16, 8, 128), gaps=[(2, 127, 40)], dtype=torch.bfloat16, seed=0)
def test_every_row_is_what_the_definition_gives(
    fast: bool, shape: tuple[int, int, int], gaps: list[tuple[int, int, int]], dtype: torch.dtype, seed: int
) -> None:
    """What lies in the gaps, and behind what is seen, is not a number: it must not matter."""
    heads, kv_heads, size = shape
    spans, length = placed(gaps)
    generator = torch.Generator().manual_seed(seed)
    keys = torch.full((kv_heads, length + 3, size), torch.nan, dtype=dtype)
    values = keys.clone()
    for span in spans:
        for cache in (keys, values):
            part = torch.randn((kv_heads, span.stop - span.start, size), generator=generator)
            cache[:, span.start : span.stop] = 2 * part
    query = 2 * torch.randn((sum(span.new for span in spans), heads, size), generator=generator).to(dtype)
    got = computed(query, keys, values, spans, fast=fast)
    assert got.dtype == dtype
    expected = plainly(query, keys, values, spans)
    torch.testing.assert_close(got.double(), expected, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])


@pytest.mark.parametrize("fast", PATHS)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 300.0, 3e4])
def test_scores_of_any_size_overflow_nothing(fast: bool, scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    query, keys, values = (torch.randn((2, 150, 16), generator=generator) for _ in range(3))
    rows = query[:, :1].transpose(0, 1).contiguous() * scale
    spans = [Span(0, 149, 1)]
    got = computed(rows, keys, values, spans, fast=fast)
    torch.testing.assert_close(got.double(), plainly(rows, keys, values, spans), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("fast", PATHS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_what_is_not_a_number_stays_visible_and_spares_the_neighbour(
    fast: bool, bad: float, dtype: torch.dtype
) -> None:
    keys, values = torch.ones((1, 20, 4), dtype=dtype), torch.ones((1, 20, 4), dtype=dtype)
    keys[0, 3, 2] = bad
    got = computed(torch.ones((2, 1, 4), dtype=dtype), keys, values, [Span(0, 9, 1), Span(10, 9, 1)], fast=fast)
    assert not torch.isfinite(got[0]).any()
    assert torch.equal(got[1], torch.ones((1, 4), dtype=dtype))


@pytest.mark.skipif(kernel() is None, reason="the kernel for CPUs needs Numba")
def test_several_threads_may_compute_at_once() -> None:
    generator = torch.Generator().manual_seed(1)
    query = torch.randn((5, 4, 8), generator=generator)
    keys, values = torch.randn((2, 2, 300, 8), generator=generator)
    spans = [Span(60 * n, 59, 1) for n in range(5)]
    expected = plainly(query, keys, values, spans)
    wrong: list[float] = []

    def compute() -> None:
        for _ in range(30):
            apart = float((computed(query, keys, values, spans, fast=True).double() - expected).abs().max())
            wrong.extend([apart] if not apart < 5e-5 else [])

    threads = [threading.Thread(target=compute) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("cached", "new"), [(0, 3), (5, 6), (150, 48)])
def test_a_new_position_sees_those_of_its_tree_alone(dtype: torch.dtype, cached: int, new: int) -> None:
    generator = torch.Generator().manual_seed(new)
    parents = [max(0, number - 1 - number % 3) for number in range(new)]
    tree = torch.eye(new, dtype=torch.bool)
    for number in range(1, new):
        tree[number] |= tree[parents[number]]
    query, keys, values = (
        torch.randn(size, generator=generator).to(dtype)
        for size in ((new, 8, 16), (4, cached + new, 16), (4, cached + new, 16))
    )
    attention = Attention([Span(0, cached, new)], heads=8, kv_heads=4, dtype=dtype, device=query.device, trees=[tree])
    with torch.inference_mode():
        got = attention(query, keys, values)
    for number in range(new):
        seen = [*range(cached), *(cached + other for other in tree[number].nonzero()[:, 0].tolist())]
        one, start = [Span(0, len(seen) - 1, 1)], slice(number, number + 1)
        expected = plainly(query[start], keys[:, seen], values[:, seen], one)
        torch.testing.assert_close(got[start].double(), expected, atol=TOLERANCES[dtype], rtol=0)
