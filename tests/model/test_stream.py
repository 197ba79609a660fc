"""The Stream architecture in torch: official names and shapes, and causal at every position."""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch")

from tidegate.model.checkpoints import category_order, risk_order  # noqa: E402
from tidegate.model.stream import (  # noqa: E402
    Qwen3ForGuardModel,
    as_float32,
    label_maps,
    parameter_counts,
    stream_config,
)
from tidegate.types import PROMPT_CATEGORIES, RESPONSE_CATEGORIES, Severity  # noqa: E402

HEADS = {
    "risk_level_category_pre.weight": (24, 32),
    "risk_level_category_layernorm.weight": (24,),
    "risk_level_head.weight": (3, 24),
    "category_head.weight": (8, 24),
    "query_risk_level_category_pre.weight": (24, 32),
    "query_risk_level_category_layernorm.weight": (24,),
    "query_risk_level_head.weight": (3, 24),
    "query_category_head.weight": (9, 24),
}


@pytest.fixture(scope="module")
def model() -> Qwen3ForGuardModel:
    torch.manual_seed(3)
    config = stream_config(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        guard_inner_size=24,
        head_dim=16,
    )
    return Qwen3ForGuardModel(config).eval()


def test_head_tensors_have_the_official_names_and_shapes(model: Qwen3ForGuardModel) -> None:
    found = {name: tuple(t.shape) for name, t in model.state_dict().items() if not name.startswith("model.")}
    assert found == HEADS


def test_backbone_tensors_have_the_names_of_qwen3(model: Qwen3ForGuardModel) -> None:
    names = set(model.state_dict())
    assert {"model.embed_tokens.weight", "model.norm.weight", "model.layers.1.self_attn.q_norm.weight"} <= names
    assert tuple(model.state_dict()["model.layers.0.self_attn.q_proj.weight"].shape) == (64, 32)
    assert not any("lm_head" in name or name.endswith("bias") for name in names)


def test_all_four_heads_speak_at_every_position(model: Qwen3ForGuardModel) -> None:
    logits = as_float32(model(torch.arange(14).reshape(2, 7)))
    assert [tuple(part.shape) for part in logits] == [(2, 7, 3), (2, 7, 8), (2, 7, 3), (2, 7, 9)]


def test_what_follows_a_token_does_not_change_its_logits(model: Qwen3ForGuardModel) -> None:
    ids = torch.randint(0, 100, (1, 12))
    with torch.inference_mode():
        whole, half = model(ids), model(ids[:, :5])
    for long, short in zip(whole, half, strict=True):
        torch.testing.assert_close(long[:, :5], short, atol=1e-5, rtol=1e-5)


def test_two_texts_in_one_row_do_not_see_each_other(model: Qwen3ForGuardModel) -> None:
    one, other = torch.randint(0, 100, (1, 4)), torch.randint(0, 100, (1, 6))
    both = torch.cat([one, other], dim=1)
    mask = torch.block_diag(torch.ones(4, 4), torch.ones(6, 6)).bool().tril()[None, None]
    positions = torch.cat([torch.arange(4), torch.arange(6)])[None]
    with torch.inference_mode():
        packed, alone = model(both, attention_mask=mask, position_ids=positions), model(other)
    for row, single in zip(packed, alone, strict=True):
        torch.testing.assert_close(row[:, 4:], single, atol=1e-5, rtol=1e-5)


def test_label_maps_are_those_of_the_official_config() -> None:
    maps = json.loads(json.dumps(label_maps()))
    for field in ("query_risk_level_map", "response_risk_level_map"):
        assert risk_order(maps, field) == (Severity.SAFE, Severity.UNSAFE, Severity.CONTROVERSIAL)
    assert category_order(maps, "query_category_map") == PROMPT_CATEGORIES
    assert category_order(maps, "response_category_map") == RESPONSE_CATEGORIES


def test_parameters_are_counted_with_the_table_apart(model: Qwen3ForGuardModel) -> None:
    total, table = parameter_counts(model)
    assert table == 100 * 32
    assert total == sum(t.numel() for t in model.state_dict().values())
