"""Exports compute what the checkpoint computes, and a token's logits are its own however its text is cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")
pytest.importorskip("transformers")

from stream_folder import TINY, official_config, tensors_of, tiny_model, write_checkpoint  # noqa: E402
from tidegate.errors import GuardUnavailable, InputError  # noqa: E402
from tidegate.model.onnx_backbone import (  # noqa: E402
    ATTENTION,
    EXPORT,
    Block,
    OnnxBackbone,
    causal_blocks,
    is_export,
    masked_block,
    part_name,
)
from tidegate.train.export_backbone import PRECISIONS, export_backbone  # noqa: E402

HEADS = ("risk", "category", "query_risk", "query_category")
ROUNDING = 1e-5
"""Probabilities are equal when they differ by no more. On the processors that were seen they do not differ at all."""
SHAPES: dict[str, dict[str, Any]] = {
    "grouped": {},
    "one key head": {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 8},
    "one layer": {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": 64},
}
LONG = 300

Array = NDArray[np.float32]


def export(folder: Path, precision: str, shape: str = "grouped", dtype: torch.dtype = torch.float32) -> OnnxBackbone:
    checkpoint = folder / shape
    if not checkpoint.is_dir():
        config = official_config(**SHAPES[shape])
        write_checkpoint(checkpoint, tensors_of(tiny_model(3, **SHAPES[shape]), dtype), config=config)
    export_backbone(checkpoint, folder / f"{shape}-{precision}", precision=precision)
    return OnnxBackbone(folder / f"{shape}-{precision}", threads=2)


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, OnnxBackbone]:
    folder = tmp_path_factory.mktemp("exports")
    return {precision: export(folder, precision) for precision in PRECISIONS}


def tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, TINY["vocab_size"], count).tolist()


def cut(model: OnnxBackbone, ids: list[int], chunks: list[int], start: int = 0) -> list[Array]:
    """The probabilities of the four heads, computed in chunks."""
    cache, parts, done = model.cache(start + len(ids)), [], 0
    for new in [*chunks, len(ids)]:
        new = min(new, len(ids) - done)
        if new:
            blocks = list(causal_blocks(model.shape, 0, new, start, done))
            at, slots = range(done, done + new), slice(start + done, start + done + new)
            parts.append(model.finish(model.forward(cache, ids[done : done + new], at, slots, blocks)))
            done += new
    return [probabilities(np.concatenate([part[head] for part in parts])) for head in HEADS]


def probabilities(logits: Array) -> Array:
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def of_torch(shape: str, ids: list[int]) -> list[Array]:
    with torch.inference_mode():
        return [probabilities(head[0].numpy()) for head in tiny_model(3, **SHAPES[shape])(torch.tensor([ids]))]


def gap(one: list[Array], other: list[Array]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("shape", SHAPES)
def test_fp32_is_what_torch_computes(shape: str, tmp_path: Path) -> None:
    ids = tokens(LONG)
    model = export(tmp_path, "fp32", shape)
    assert gap(cut(model, ids, []), of_torch(shape, ids)) < ROUNDING
    assert gap(cut(model, ids, [1] * 20 + [7, 130]), of_torch(shape, ids)) < ROUNDING


@pytest.mark.parametrize(("precision", "most"), [("int8", 0.02), ("int8-fast", 0.025), ("int4", 0.15)])
def test_what_rounding_costs_is_bounded(exports: dict[str, OnnxBackbone], precision: str, most: float) -> None:
    ids = tokens(LONG)
    pairs = zip(cut(exports[precision], ids, []), of_torch("grouped", ids), strict=True)
    mean = max(float(np.abs(a - b).max(axis=-1).mean()) for a, b in pairs)
    assert 1e-4 < mean < most


@given(
    precision=st.sampled_from(PRECISIONS),
    length=st.integers(1, LONG),
    chunks=st.lists(st.integers(1, 150), max_size=12),
    start=st.integers(0, 200),
)
def test_no_cut_changes_a_token(
    exports: dict[str, OnnxBackbone], precision: str, length: int, chunks: list[int], start: int
) -> None:
    ids = tokens(length, seed=1)
    assert gap(cut(exports[precision], ids, chunks, start), cut(exports[precision], ids, [])) < ROUNDING


@given(
    precision=st.sampled_from(PRECISIONS),
    lengths=st.lists(st.tuples(st.integers(0, 90), st.integers(1, 40)), min_size=1, max_size=5),
)
def test_texts_in_one_run_do_not_touch_each_other(
    exports: dict[str, OnnxBackbone], precision: str, lengths: list[tuple[int, int]]
) -> None:
    model = exports[precision]
    texts = [tokens(cached + new, seed=place) for place, (cached, new) in enumerate(lengths)]
    starts = np.cumsum([0, *map(len, texts)]).tolist()
    cache = model.cache(starts[-1])
    for text, start, (cached, _) in zip(texts, starts, lengths, strict=False):
        if cached:
            blocks = list(causal_blocks(model.shape, 0, cached, start, 0))
            model.forward(cache, text[:cached], range(cached), slice(start, start + cached), blocks)
    blocks, ids, positions, slots = [], [], [], []
    for text, start, (cached, new) in zip(texts, starts, lengths, strict=False):
        blocks += causal_blocks(model.shape, len(ids), new, start, cached)
        positions += range(cached, cached + new)
        slots += range(start + cached, start + cached + new)
        ids += text[cached:]
    together = model.finish(model.forward(cache, ids, positions, np.array(slots), blocks))
    row = 0
    for text, (cached, new) in zip(texts, lengths, strict=True):
        alone = [head[cached:] for head in cut(model, text, [])]
        assert gap([probabilities(together[head][row : row + new]) for head in HEADS], alone) < ROUNDING
        row += new


def test_a_text_can_go_back_and_go_on_differently(exports: dict[str, OnnxBackbone]) -> None:
    model, ids, other = exports["int8"], tokens(80), tokens(80, seed=9)
    cache = model.cache(80)

    def forward(given: list[int], done: int) -> dict[str, Array]:
        new = len(given)
        blocks = list(causal_blocks(model.shape, 0, new, 0, done))
        return model.finish(model.forward(cache, given, range(done, done + new), slice(done, done + new), blocks))

    forward(ids, 0)
    again = forward(other[:30], 50)
    whole = cut(model, ids[:50] + other[:30], [])
    assert gap([probabilities(again[head]) for head in HEADS], [head[50:] for head in whole]) < ROUNDING


def test_a_mask_may_hide_siblings(exports: dict[str, OnnxBackbone]) -> None:
    """Two ways to go on, computed in one run behind the same text."""
    model, ids, ways = exports["int8"], tokens(40), [tokens(3, seed=7), tokens(3, seed=8)]
    cache = model.cache(46)
    model.forward(cache, ids, range(40), slice(0, 40), list(causal_blocks(model.shape, 0, 40, 0, 0)))
    seen = np.zeros((6, 46), np.bool_)
    seen[:, :40] = True
    seen[:3, 40:43] = seen[3:, 43:] = np.tri(3, dtype=np.bool_)
    block = masked_block(model.shape, slice(0, 6), 0, seen)
    both = model.finish(model.forward(cache, ways[0] + ways[1], [40, 41, 42] * 2, slice(40, 46), [block]))
    for rows, way in zip((slice(0, 3), slice(3, 6)), ways, strict=True):
        alone = [head[40:] for head in cut(model, ids + way, [])]
        assert gap([probabilities(both[head][rows]) for head in HEADS], alone) < 1e-3


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_not_a_number_is_said_and_stays_where_it_is(precision: str, tmp_path: Path) -> None:
    export(tmp_path, precision)
    table = tmp_path / f"grouped-{precision}" / ("embedding.npy" if precision == "fp32" else "embedding_scale.npy")
    numbers = np.load(table)
    numbers[7] = np.nan
    np.save(table, numbers)
    model = OnnxBackbone(table.parent)
    ids = [token if token != 7 else 8 for token in tokens(40)]
    sick = [7 if place == 5 else token for place, token in enumerate(ids)]
    cache = model.cache(80)
    blocks: list[Block] = []
    for row in (0, 40):
        blocks += causal_blocks(model.shape, row, 40, row, 0)
    hidden = model.forward(cache, ids + sick, [*range(40)] * 2, slice(0, 80), blocks)
    assert hidden.sound[:45].all()
    assert not hidden.sound[45]
    assert np.isfinite(cache.keys).all()
    assert np.isfinite(cache.values).all()
    well = model.finish(hidden.at(range(40)))
    assert gap([probabilities(well[head]) for head in HEADS], cut(model, ids, [])) < ROUNDING


def test_bfloat16_and_shards_are_read_as_they_are(tmp_path: Path) -> None:
    tensors = tensors_of(tiny_model(3), torch.bfloat16)
    write_checkpoint(tmp_path / "one", tensors)
    write_checkpoint(tmp_path / "many", tensors, shards=3)
    rounded = tiny_model(3)
    rounded.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    ids = tokens(50)
    with torch.inference_mode():
        expected = [probabilities(head[0].numpy()) for head in rounded(torch.tensor([ids]))]
    for name in ("one", "many"):
        export_backbone(tmp_path / name, tmp_path / "out", precision="fp32")
        assert gap(cut(OnnxBackbone(tmp_path / "out"), ids, []), expected) < ROUNDING


def test_an_export_says_what_it_is(exports: dict[str, OnnxBackbone], tmp_path: Path) -> None:
    assert exports["int8"].kind == "stream"
    assert exports["int8"].precision == "int8"
    assert not is_export(tmp_path)
    figures = export_backbone(write_checkpoint(tmp_path / "c", tensors_of(tiny_model(3))), tmp_path / "out")
    assert is_export(tmp_path / "out")
    assert figures["precision"] == "int8"
    assert figures["bytes"] == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"model_type": "llama"}, "qwen3"),
        ({"rope_scaling": {"type": "yarn"}}, "rotary"),
        ({"attention_bias": True}, "biases"),
        ({"use_sliding_window": True}, "sliding"),
        ({"num_key_value_heads": None}, "num_key_value_heads"),
        ({"architectures": ["BertModel"]}, "architectures"),
    ],
)
def test_other_models_are_refused(changes: dict[str, Any], why: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c", tensors_of(tiny_model(3)), config=official_config(**changes))
    with pytest.raises(InputError, match=why):
        export_backbone(tmp_path / "c", tmp_path / "out")
    assert not is_export(tmp_path / "out")


def test_tensors_that_are_missing_or_too_many_are_named(tmp_path: Path) -> None:
    tensors = tensors_of(tiny_model(3))
    extra = tensors | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(3)}
    with pytest.raises(InputError, match=r"q_proj\.bias"):
        export_backbone(write_checkpoint(tmp_path / "more", extra), tmp_path / "out")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj"):
        export_backbone(write_checkpoint(tmp_path / "less", tensors), tmp_path / "out")
    tensors["model.norm.weight"][3] = float("inf")
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(64, 48)
    with pytest.raises(InputError, match=r"model\.norm.*finite"):
        export_backbone(write_checkpoint(tmp_path / "odd", tensors), tmp_path / "out")
    with pytest.raises(InputError, match="precision"):
        export_backbone(tmp_path / "less", tmp_path / "out", precision="int2")
    with pytest.raises(InputError, match=r"config\.json"):
        export_backbone(tmp_path, tmp_path / "out")
    assert not is_export(tmp_path / "out")


def test_broken_folders_say_what_is_wrong(tmp_path: Path) -> None:
    export_backbone(write_checkpoint(tmp_path / "c", tensors_of(tiny_model(3))), tmp_path / "out")
    (tmp_path / "out" / part_name(1)).write_bytes(b"no graph")
    with pytest.raises(GuardUnavailable, match=part_name(1)):
        OnnxBackbone(tmp_path / "out")
    (tmp_path / "out" / ATTENTION).unlink()
    with pytest.raises(GuardUnavailable, match=ATTENTION):
        OnnxBackbone(tmp_path / "out")
    (tmp_path / "out" / EXPORT).write_text(json.dumps({"format": 0}))
    with pytest.raises(GuardUnavailable, match="another version"):
        OnnxBackbone(tmp_path / "out")
