"""The exported file computes what torch computes, at any size, and shares nothing between rows or chunks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from edge_folder import tiny_checkpoint, tiny_config, tiny_tensors, tiny_tokenizer
from tidegate.errors import InputError
from tidegate.model.onnx_runtime import onnxruntime
from tidegate.train.export import HEADS, agreement, dequantized, export_onnx, quantize

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")
HIDDEN = np.float32(-1e9)


class Exported:
    """An exported file, called the plain way."""

    def __init__(self, folder: Path) -> None:
        self.session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
        self.pasts = [given for given in self.session.get_inputs() if given.name.startswith("past.")]
        _, self.kv_heads, _, self.size = self.pasts[0].shape

    def empty(self, rows: int) -> np.ndarray:
        return np.zeros((len(self.pasts), rows, self.kv_heads, 0, self.size), np.float32)

    def __call__(self, ids: np.ndarray, past: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        rows, new = ids.shape
        cached = past.shape[3]
        mask = np.zeros((rows, 1, new, cached + new), np.float32)
        mask[..., cached:] = np.triu(np.full((new, new), HIDDEN), 1)
        positions = np.tile(np.arange(cached, cached + new), (rows, 1))
        inputs = {"input_ids": ids, "position_ids": positions, "mask": mask}
        inputs |= {given.name: past[index] for index, given in enumerate(self.pasts)}
        present, *heads = self.session.run(["present", *HEADS], inputs)
        return present, heads


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("export")
    run = tiny_checkpoint(folder / "run" / "checkpoint").parent
    export_onnx(run, folder / "out")
    return run / "checkpoint", folder / "out"


@pytest.fixture(scope="module")
def exported(folders: tuple[Path, Path]) -> Exported:
    return Exported(folders[1])


def sequences(count: int, most: int = 40) -> list[list[int]]:
    rng = np.random.default_rng(5)
    return [rng.integers(8, 600, rng.integers(1, most)).tolist() for _ in range(count)]


def test_probabilities_equal_those_of_torch_on_the_rounded_weights(folders: tuple[Path, Path]) -> None:
    report = agreement(*folders, sequences(12))
    for head in HEADS:
        figures = report["rounded"][head]["all"]
        assert figures["max_probability_difference"] < 2e-5
        assert figures["positions"] > 100
    assert report["rounded"]["query_risk"]["last"]["positions"] == 12


def test_rounding_to_8_bits_changes_probabilities_little(folders: tuple[Path, Path]) -> None:
    report = agreement(*folders, sequences(12))
    for head in HEADS:
        assert report["trained"][head]["all"]["mean_probability_difference"] < 0.03
        assert report["trained"][head]["all"]["percent_equal_labels"] > 85


@pytest.mark.parametrize(
    "shape",
    [
        {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8},
        {"num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 12},
        {"hidden_size": 40, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 10},
        {"rope_theta": 1e6, "guard_inner_size": 16},
        {"rope_theta": None, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
    ],
    ids=str,
)
def test_any_shape_can_be_exported(tmp_path: Path, shape: dict[str, Any]) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint")
    config = {k: v for k, v in (tiny_config(640) | shape).items() if v is not None}
    config["vocab_size"] = tiny_tokenizer().get_vocab_size()
    (checkpoint / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tiny_tensors(config), checkpoint / "model.safetensors")
    export_onnx(tmp_path, tmp_path / "out")
    report = agreement(checkpoint, tmp_path / "out", sequences(3))
    assert max(report["rounded"][head]["all"]["max_probability_difference"] for head in HEADS) < 2e-5


@given(st.lists(st.integers(1, 8), min_size=1, max_size=6), st.integers(0, 2**32 - 1))
def test_logits_do_not_depend_on_chunks(exported: Exported, chunks: list[int], seed: int) -> None:
    ids = np.random.default_rng(seed).integers(8, 600, (1, sum(chunks)))
    _, whole = exported(ids, exported.empty(1))
    past, at, parts = exported.empty(1), 0, []
    for chunk in chunks:
        present, heads = exported(ids[:, at : at + chunk], past)
        past = np.concatenate([past, present], axis=3)
        parts.append(heads)
        at += chunk
    for head, expected in zip(zip(*parts, strict=True), whole, strict=True):
        np.testing.assert_allclose(np.concatenate(head, axis=1), expected, atol=1e-4)


def test_logits_do_not_depend_on_the_other_rows(exported: Exported) -> None:
    ids = np.random.default_rng(1).integers(8, 600, (6, 20))
    _, together = exported(ids, exported.empty(6))
    for row in range(6):
        _, alone = exported(ids[row : row + 1], exported.empty(1))
        for one, many in zip(alone, together, strict=True):
            np.testing.assert_allclose(many[row : row + 1], one, atol=1e-4)


def test_weights_are_stored_in_8_bits(folders: tuple[Path, Path]) -> None:
    checkpoint, out = folders
    model = onnx.load(out / "model.onnx")
    large = [t for t in model.graph.initializer if len(t.dims) == 2 and t.dims[0] * t.dims[1] > 640 * 2]
    assert {t.data_type for t in large if t.name not in ("cos", "sin")} == {onnx.TensorProto.INT8}
    assert (out / "model.onnx").stat().st_size < 0.6 * (checkpoint / "model.safetensors").stat().st_size


def test_the_report_gives_sizes_and_what_rounding_changed(folders: tuple[Path, Path], tmp_path: Path) -> None:
    report = export_onnx(folders[0].parent, tmp_path)
    assert report["bytes"]["total"] == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert 0.001 < report["relative_error"] < 0.02
    assert (tmp_path / "model.onnx").read_bytes() == (folders[1] / "model.onnx").read_bytes()


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 1e-6, 1.0, 1e4]))
def test_rounding_is_at_least_as_good_as_scaling_by_the_largest_value(seed: int, size: float) -> None:
    rows = (size * np.random.default_rng(seed).standard_t(4, (5, 64))).astype(np.float32)
    plain = np.maximum(np.abs(rows).max(axis=1, keepdims=True), 1e-12) / 127
    naive = np.clip(np.rint(rows / plain), -127, 127) * plain
    ours = quantize(rows).float32()
    assert np.square(ours - rows).sum() <= np.square(naive - rows).sum() * (1 + 1e-4)


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_checkpoints_in_half_precision_can_be_exported(folders: tuple[Path, Path], tmp_path: Path, kind: str) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(folders[0], checkpoint)
    tensors = safetensors_torch.load_file(checkpoint / "model.safetensors")
    halves = {name: tensor.to(getattr(torch, kind)) for name, tensor in tensors.items()}
    safetensors_torch.save_file(halves, checkpoint / "model.safetensors")
    export_onnx(checkpoint, tmp_path / "out")
    report = agreement(checkpoint, tmp_path / "out", sequences(3))
    assert max(report["rounded"][head]["all"]["max_probability_difference"] for head in HEADS) < 2e-5


def test_small_tensors_stay_as_they_are() -> None:
    tensors = tiny_tensors(tiny_config(100))
    rounded = dequantized(tensors)
    for name in ("model.norm.weight", "risk_level_head.weight", "query_category_head.weight"):
        np.testing.assert_array_equal(rounded[name], tensors[name])


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_an_incomplete_checkpoint_is_refused_by_name(tmp_path: Path, missing: str) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint")
    (checkpoint / missing).unlink()
    with pytest.raises(InputError, match=missing):
        export_onnx(tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"attention_bias": True}, "biases"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rotary"),
        ({"guard_inner_size": None}, "guard_inner_size"),
        ({"num_hidden_layers": 3}, r"model\.layers\.2"),
        ({"num_hidden_layers": 1}, "no place"),
    ],
)
def test_what_cannot_be_exported_is_refused(tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint")
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8")) | change
    config = {k: v for k, v in config.items() if v is not None}
    (checkpoint / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(InputError, match=complaint):
        export_onnx(tmp_path, tmp_path / "out")
