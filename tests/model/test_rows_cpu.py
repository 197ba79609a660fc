"""Our kernels between the products of a layer compute what PyTorch computes, no further from float32."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("numba")

from torch.nn import functional as F  # noqa: E402, N812

from stream_folder import tiny_model  # noqa: E402
from tidegate.model import backbone, rows_cpu  # noqa: E402
from tidegate.model.cached import CachedText  # noqa: E402

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-7}
EPS = 1e-6


def numbers(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul_(4).to(dtype)


def close(one: torch.Tensor, exact: torch.Tensor) -> None:
    torch.testing.assert_close(one.float(), exact, atol=TOLERANCES[one.dtype], rtol=TOLERANCES[one.dtype])


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("rows", [1, 5])
def test_sums_are_rounded_and_then_normed(dtype: torch.dtype, rows: int) -> None:
    hidden, more, weight = (numbers(*shape, dtype=dtype, seed=len(shape)) for shape in ((rows, 96), (rows, 96), (96,)))
    for added in (more, None):
        total, normed = rows_cpu.add_norm(hidden, added, weight, EPS)
        assert torch.equal(total, hidden if added is None else hidden + added)
        close(normed, F.rms_norm(total.float(), (96,), weight.float(), EPS))


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_heads_are_normed_and_rotated(dtype: torch.dtype) -> None:
    heads, weights = numbers(3, 7, 16, dtype=dtype), numbers(5, 16, dtype=dtype, seed=1)
    angles = numbers(3, 8, dtype=torch.float32, seed=2)
    cos, sin = torch.cat((angles, angles), -1).cos(), torch.cat((-angles, angles), -1).sin()
    normed = F.rms_norm(heads[:, :5].float(), (16,), None, EPS) * weights.float()
    first, second = normed.chunk(2, dim=-1)
    exact = normed * cos[:, None] + torch.cat((second, first), -1) * sin[:, None]
    close(rows_cpu.rotate(heads, 5, weights, cos, sin, EPS), exact)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_gates_open_as_silu_does(dtype: torch.dtype) -> None:
    both = numbers(4, 66, dtype=dtype)
    both[0, :6] = torch.tensor([0.0, -0.0, 200.0, -200.0, 88.0, -88.0])
    opening, content = both.float().chunk(2, dim=-1)
    close(rows_cpu.gate(both), F.silu(opening) * content)


def test_what_is_not_a_number_stays_so() -> None:
    broken = torch.tensor([[float("nan"), 1.0], [1.0, float("inf")]])
    assert not rows_cpu.gate(broken).isfinite().any()
    assert not rows_cpu.add_norm(broken, None, torch.ones(2), EPS)[1].isfinite().all(-1).any()


@pytest.mark.parametrize("few", [0, 64])
def test_few_rows_and_many_give_the_same_model(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model(), torch.arange(1, 61)
    with torch.inference_mode():
        expected = model(ids[None]).risk[0].softmax(-1)
    monkeypatch.setattr(backbone, "_FEW", few)
    text = CachedText(model)
    parts = [text.append(part).risk for part in ids.split([1, 3, 40, 16])]
    torch.testing.assert_close(torch.cat(parts).softmax(-1), expected, atol=1e-5, rtol=0)
