"""A model that was laid out for inference says what it said before."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import Qwen3Config  # noqa: E402

from stream_folder import tiny_model  # noqa: E402
from tidegate.model.layout import Projection, lay_out  # noqa: E402
from tidegate.model.stream import Qwen3ForGuardModel  # noqa: E402

IDS = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(3))
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 0.05}


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_the_model_says_what_it_said(dtype: torch.dtype) -> None:
    model = tiny_model().to(dtype)
    with torch.inference_mode():
        before = model(IDS)
        lay_out(model)
        after = model(IDS)
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(other.float().softmax(-1), one.float().softmax(-1), atol=TOLERANCES[dtype], rtol=0)


def test_the_second_time_changes_nothing() -> None:
    model = tiny_model()
    lay_out(model)
    first = dict(model.named_modules())
    lay_out(model)
    assert all(module is first[name] for name, module in model.named_modules())


@pytest.mark.parametrize("dtype", [*TOLERANCES, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_model_that_was_laid_out_is_saved_as_it_was(dtype: torch.dtype, bias: bool) -> None:
    model = Qwen3ForGuardModel(Qwen3Config(**tiny_model().config.to_dict() | {"attention_bias": bias})).to(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lay_out(model)
    after = model.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_no_weight_is_there_twice() -> None:
    model = tiny_model().to(torch.float16)
    before = sum(parameter.nbytes for parameter in model.parameters())
    lay_out(model)
    assert sum(parameter.nbytes for parameter in model.parameters()) == before


@pytest.mark.parametrize("dtype", [*TOLERANCES, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 33])
@pytest.mark.parametrize("bias", [True, False])
def test_a_projection_is_its_layers_side_by_side(dtype: torch.dtype, rows: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(rows)
    layers = [torch.nn.Linear(40, outputs, bias=bias) for outputs in (24, 7, 1)]
    for layer in layers:
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
        layer.to(dtype)
    given = torch.randn((rows, 40), generator=generator).to(dtype)
    with torch.inference_mode():
        expected = [layer(given).float() for layer in layers]
        projection = Projection(layers)
        got = projection(given)
        deeper = projection(given[None])[0]
    assert got.shape == (rows, 32)
    for part, answer in zip(projection.slices, expected, strict=True):
        torch.testing.assert_close(got[:, part].float(), answer, atol=1e-5 if dtype == torch.float32 else 0.03, rtol=0)
    torch.testing.assert_close(deeper.float(), got.float(), atol=0.03, rtol=0)
