"""Official Stream folders load as they are, without their code; what does not fit is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from qwen3guard_files import FILES  # noqa: E402
from stream_folder import TINY, official_config, tensors_of, tiny_model, write_checkpoint  # noqa: E402
from tidegate.errors import GuardUnavailable, InputError  # noqa: E402
from tidegate.model import loading  # noqa: E402
from tidegate.model.folders import read_config  # noqa: E402
from tidegate.model.loading import load_stream  # noqa: E402
from tidegate.model.stream import GROUPED_ATTENTION  # noqa: E402

IDS = torch.randint(0, TINY["vocab_size"], (1, 40), generator=torch.Generator().manual_seed(1))


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return torch.cat(model(IDS), dim=-1).float()


@pytest.fixture(scope="module")
def original() -> Any:
    return tiny_model()


@pytest.fixture
def folder(tmp_path: Path, original: Any) -> Path:
    return write_checkpoint(tmp_path / "checkpoint", tensors_of(original))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("attention", ["sdpa", "eager", GROUPED_ATTENTION])
def test_a_checkpoint_loads_and_says_what_the_model_said(
    tmp_path: Path, original: Any, shards: int, attention: str
) -> None:
    folder = write_checkpoint(tmp_path, tensors_of(original), shards=shards)
    model = load_stream(folder, dtype="float32", attention=attention)
    torch.testing.assert_close(logits(model), logits(original), atol=2e-5, rtol=1e-5)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize(
    ("asked", "got"),
    [
        ("auto", torch.bfloat16),
        ("bfloat16", torch.bfloat16),
        ("float16", torch.float16),
        ("float32", torch.float32),
        (torch.float16, torch.float16),
    ],
)
def test_weights_come_in_the_type_that_is_asked_for(folder: Path, original: Any, asked: Any, got: torch.dtype) -> None:
    model = load_stream(folder, dtype=asked)
    assert {parameter.dtype for parameter in model.parameters()} == {got}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    tolerance = {torch.float32: 2e-5, torch.float16: 0.1, torch.bfloat16: 0.6}[got]
    torch.testing.assert_close(logits(model), logits(original), atol=tolerance, rtol=0)


def test_auto_without_a_word_in_the_config_is_the_type_of_the_file(tmp_path: Path, original: Any) -> None:
    folder = write_checkpoint(tmp_path, tensors_of(original, torch.float16), config=official_config(torch_dtype=None))
    assert load_stream(folder).dtype == torch.float16


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("attention", ["sdpa", "eager", GROUPED_ATTENTION])
def test_a_checkpoint_loads_onto_a_gpu(folder: Path, original: Any, attention: str) -> None:
    model = load_stream(folder, dtype="float32", device="cuda", attention=attention)
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"cuda"}
    with torch.inference_mode():
        got = torch.cat(model(IDS.cuda()), dim=-1).cpu()
    torch.testing.assert_close(got, logits(original), atol=1e-3, rtol=1e-3)


def test_a_config_written_by_transformers_5_loads_with_any(tmp_path: Path, original: Any) -> None:
    rope = {"rope_theta": 1000000, "rope_type": "default"}
    config = official_config(rope_theta=None, rope_parameters=rope, torch_dtype=None, dtype="float32")
    model = load_stream(write_checkpoint(tmp_path, tensors_of(original), config=config))
    torch.testing.assert_close(logits(model), logits(original), atol=2e-5, rtol=1e-5)


def test_another_base_of_the_rotary_embedding_is_not_lost(tmp_path: Path, original: Any) -> None:
    folder = write_checkpoint(tmp_path, tensors_of(original), config=official_config(rope_theta=10000))
    assert (logits(load_stream(folder, dtype="float32")) - logits(original)).abs().max() > 0.01
    expected = 10000 ** -(torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(load_stream(folder).model.rotary_emb.inv_freq, expected)


def test_sizes_of_heads_that_the_config_leaves_out_are_those_of_the_tensors(tmp_path: Path, original: Any) -> None:
    config = official_config(guard_inner_size=None, num_category=None, num_query_risk_level=None)
    model = load_stream(write_checkpoint(tmp_path, tensors_of(original), config=config), dtype="float32")
    assert (model.config.guard_inner_size, model.config.num_category) == (24, 8)
    torch.testing.assert_close(logits(model), logits(original), atol=2e-5, rtol=1e-5)


def test_a_head_for_words_is_left_out(tmp_path: Path, original: Any) -> None:
    tensors = tensors_of(original) | {"lm_head.weight": torch.zeros(300, 48)}
    model = load_stream(write_checkpoint(tmp_path, tensors), dtype="float32")
    torch.testing.assert_close(logits(model), logits(original), atol=2e-5, rtol=1e-5)


def test_a_config_cannot_choose_attention_code(tmp_path: Path, original: Any) -> None:
    config = official_config(_attn_implementation="someone/kernel", attn_implementation="someone/kernel")
    model = load_stream(write_checkpoint(tmp_path, tensors_of(original), config=config))
    assert model.config._attn_implementation == GROUPED_ATTENTION
    with pytest.raises(InputError, match="attention"):
        load_stream(tmp_path, attention="someone/kernel")


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"response_risk_level_map": {"0": "Safe", "1": "Unsafe", "2": "Unsafe"}}, "config.response_risk_level_map"),
        ({"query_risk_level_map": None}, "config.query_risk_level_map"),
        ({"query_risk_level_map": {"0": "Low", "1": "Unsafe", "2": "Safe"}}, "config.query_risk_level_map"),
        ({"response_category_map": {str(n): f"Kind {n}" for n in range(8)}}, "config.response_category_map.0"),
        ({"response_category_map": {"0": "Violent"}}, "config.response_category_map"),
        ({"num_risk_level": 4}, "config.response_risk_level_map"),
        ({"hidden_size": "48"}, "config.hidden_size"),
        ({"num_hidden_layers": 0}, "config.num_hidden_layers"),
        ({"num_key_value_heads": 4}, "config.num_key_value_heads"),
        ({"rope_theta": None}, "config.rope_theta"),
        ({"quantization_config": {"bits": 4}}, "config.quantization_config"),
        ({"use_sliding_window": True}, "config.use_sliding_window"),
        ({"architectures": ["Qwen3ForCausalLM"]}, "config.json"),
        ({"model_type": "llama"}, "config.json"),
    ],
)
def test_a_wrong_config_is_refused_with_the_place(
    tmp_path: Path, original: Any, change: dict[str, Any], place: str
) -> None:
    folder = write_checkpoint(tmp_path, tensors_of(original), config=official_config(**change))
    with pytest.raises(InputError) as caught:
        load_stream(folder)
    assert caught.value.where is not None
    assert caught.value.where.endswith(place)


def test_custom_categories_are_known_when_they_are_named(tmp_path: Path, original: Any) -> None:
    names = {**official_config()["response_category_map"], "7": "Insider Trading"}
    folder = write_checkpoint(tmp_path, tensors_of(original), config=official_config(response_category_map=names))
    with pytest.raises(InputError, match="Insider Trading"):
        load_stream(folder)
    assert load_stream(folder, custom=["Insider Trading"]).config.response_category_map["7"] == "Insider Trading"


def without(tensors: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def test_tensors_that_do_not_fit_are_named(tmp_path: Path, original: Any) -> None:
    tensors = without(tensors_of(original), "model.norm.weight") | {
        "score.weight": torch.zeros(2),
        "category_head.weight": torch.zeros(8, 25),
        "risk_level_head.weight": torch.zeros(3, 24, dtype=torch.int8),
    }
    with pytest.raises(GuardUnavailable) as caught:
        load_stream(write_checkpoint(tmp_path, tensors))
    message = str(caught.value)
    assert "missing tensors: model.norm.weight" in message
    assert "unexpected tensors: score.weight" in message
    assert "category_head.weight is [8, 25], expected [8, 24]" in message
    assert "risk_level_head.weight (I8)" in message


def test_many_missing_tensors_are_counted(tmp_path: Path, original: Any) -> None:
    tensors = {name: tensor for name, tensor in tensors_of(original).items() if ".layers.2." not in name}
    with pytest.raises(GuardUnavailable, match=r"missing tensors: .*layers\.2.* and 6 more"):
        load_stream(write_checkpoint(tmp_path, tensors))


def test_files_that_are_missing_or_broken_are_named(tmp_path: Path, original: Any) -> None:
    folder = write_checkpoint(tmp_path, tensors_of(original), shards=2)
    second = folder / "model-00002-of-00002.safetensors"
    second.write_bytes(second.read_bytes()[:100])
    with pytest.raises(GuardUnavailable, match=second.name):
        load_stream(folder)
    second.unlink()
    with pytest.raises(GuardUnavailable, match=f"{second.name} is missing"):
        load_stream(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(GuardUnavailable, match=r"neither model\.safetensors nor"):
        load_stream(folder)
    (folder / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(GuardUnavailable, match=r"config\.json is not JSON"):
        load_stream(folder)


def test_an_index_cannot_lead_out_of_its_folder(tmp_path: Path, original: Any) -> None:
    folder = write_checkpoint(tmp_path, tensors_of(original), shards=2)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "../other.safetensors"}}), encoding="utf-8")
    with pytest.raises(GuardUnavailable, match="not a safetensors file beside it"):
        load_stream(folder)


def test_an_index_that_promises_too_much_is_refused(tmp_path: Path, original: Any) -> None:
    folder = write_checkpoint(tmp_path, tensors_of(original), shards=2)
    index = folder / "model.safetensors.index.json"
    value = json.loads(index.read_text(encoding="utf-8"))
    value["weight_map"]["model.more.weight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(value), encoding="utf-8")
    with pytest.raises(GuardUnavailable, match=r"lack: model\.more\.weight"):
        load_stream(folder)


def test_a_name_on_the_hub_is_fetched_without_code(
    folder: Path, original: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def fake_download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.update(name=name, revision=revision, patterns=allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fake_download)
    model = load_stream("Qwen/Qwen3Guard-Stream-0.6B", revision="419364a", dtype="float32")
    torch.testing.assert_close(logits(model), logits(original), atol=2e-5, rtol=1e-5)
    assert (asked["name"], asked["revision"]) == ("Qwen/Qwen3Guard-Stream-0.6B", "419364a")
    assert all(pattern.endswith((".json", ".safetensors")) for pattern in asked["patterns"])


def test_a_name_that_is_not_in_the_cache_is_unavailable_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(GuardUnavailable, match="nobody/nothing is neither a folder nor a repository"):
        load_stream("nobody/nothing")
    with pytest.raises(GuardUnavailable, match="not a folder"):
        load_stream(tmp_path / "absent")


def test_a_folder_has_no_revision(folder: Path) -> None:
    with pytest.raises(InputError, match="revision"):
        load_stream(folder, revision="main")


@pytest.mark.parametrize("dtype", ["int8", "half", torch.int8, torch.float64])
def test_other_types_are_refused(folder: Path, dtype: Any) -> None:
    with pytest.raises(InputError, match="dtype"):
        load_stream(folder, dtype=dtype)


@pytest.mark.skipif(FILES is None, reason="needs the released files: TIDEGATE_QWEN3GUARD_FILES")
def test_the_released_config_describes_our_model() -> None:
    raw = read_config(FILES / "stream-0.6b")
    config = loading._qwen3_config(raw, {})
    with torch.device("meta"):
        model = loading.Qwen3ForGuardModel(config)
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == 597_111_296
    assert loading._target_dtype(raw, {}, "auto") == torch.bfloat16
