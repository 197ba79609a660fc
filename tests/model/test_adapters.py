"""LoRA adapters: a row has the output of its adapter merged into the model, whoever its neighbours are."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import Qwen3ForCausalLM  # noqa: E402

from adapter_folder import PROJECTIONS, layers, random_tensors, write_adapter  # noqa: E402
from gen_folder import tiny_config  # noqa: E402
from tidegate.errors import GuardUnavailable, InputError  # noqa: E402
from tidegate.model.adapters import Adapters, read_adapter  # noqa: E402

EXACT = 1e-5
IDS = torch.tensor([[5, 9, 2, 44, 17, 3], [1, 2, 3, 4, 5, 6], [60, 50, 40, 30, 20, 10], [7, 7, 7, 7, 8, 8]])


def base_model() -> Any:
    torch.manual_seed(12)
    return Qwen3ForCausalLM(tiny_config(vocab_size=64, eos_token_id=0)).eval().requires_grad_(False)


BASE = base_model()


def answers(model: Any, ids: Any = IDS) -> Any:
    with torch.inference_mode():
        return model(ids, use_cache=False).logits


PLAIN = answers(BASE)


def merged(tensors: dict[str, Any], scales: dict[str, float]) -> Any:
    """The same model with ``W + scale * BA`` in place of each W."""
    model = copy.deepcopy(BASE)
    for name, layer in layers(model).items():
        if f"{name}.lora_A" in tensors:
            layer.weight += scales[name] * tensors[f"{name}.lora_B"] @ tensors[f"{name}.lora_A"]
    return model


def adapted(folder: Path, ids: Any = IDS) -> Any:
    """What a model says with an adapter in all rows."""
    model = copy.deepcopy(BASE)
    adapters = Adapters(model, {"one": folder})
    with adapters.on(["one"] * len(ids)):
        return answers(model, ids)


def far(one: Any, other: Any) -> float:
    return float((one - other).abs().max())


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("targets", [PROJECTIONS, ("q_proj", "v_proj"), ("down_proj",)])
def test_an_adapter_is_what_it_is_merged(tmp_path: Path, rank: int, targets: tuple[str, ...]) -> None:
    tensors = random_tensors(BASE, seed=rank, rank=rank, targets=targets)
    folder = write_adapter(tmp_path, tensors, r=rank, lora_alpha=6, target_modules=list(targets))
    expected = answers(merged(tensors, dict.fromkeys(layers(BASE), 6 / rank)))
    assert far(adapted(folder), expected) < EXACT
    assert far(expected, PLAIN) > 0.01


def test_ranks_and_scales_may_differ_by_layer(tmp_path: Path) -> None:
    tensors = random_tensors(BASE, seed=1, rank=4)
    wider = random_tensors(BASE, seed=2, rank=6)
    tensors |= {name: wider[name] for name in wider if ".0.self_attn.q_proj" in name or "down_proj" in name}
    folder = write_adapter(
        tmp_path,
        tensors,
        use_rslora=True,
        rank_pattern={"layers.0.self_attn.q_proj": 6, "^model.*down_proj": 6, "k_prox": 9},
        alpha_pattern={"layers.1.*": 3, "up_proj": 5},
    )
    scales = {}
    for name in layers(BASE):
        alpha = 3 if ".1." in name else 5 if "up_proj" in name else 8
        scales[name] = alpha / math.sqrt(len(tensors[f"{name}.lora_A"]))
    assert far(adapted(folder), answers(merged(tensors, scales))) < EXACT


def test_some_layers_may_be_left_out(tmp_path: Path) -> None:
    tensors = {name: t for name, t in random_tensors(BASE, seed=4).items() if ".1." in name and "mlp.gate" not in name}
    folder = write_adapter(tmp_path, tensors, layers_to_transform=[1], exclude_modules=["gate_proj"])
    assert far(adapted(folder), answers(merged(tensors, dict.fromkeys(layers(BASE), 2.0)))) < EXACT


def test_layers_may_be_named_by_one_expression(tmp_path: Path) -> None:
    tensors = random_tensors(BASE, seed=4, targets=("q_proj", "o_proj"))
    folder = write_adapter(tmp_path, tensors, target_modules=r".*\.self_attn\.(q|o)_proj", exclude_modules="nothing")
    assert far(adapted(folder), answers(merged(tensors, dict.fromkeys(layers(BASE), 2.0)))) < EXACT


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Adapters, dict[str | None, Any]]:
    """A model with three adapters of different rank and layers, and what it says with each alone."""
    parent = tmp_path_factory.mktemp("three")
    made = {"one": (2, PROJECTIONS), "two": (5, PROJECTIONS), "three": (4, ("v_proj", "gate_proj"))}
    folders = {}
    for seed, (name, (rank, targets)) in enumerate(made.items()):
        tensors = random_tensors(BASE, seed=seed, rank=rank, targets=targets)
        folders[name] = write_adapter(parent / name, tensors, r=rank, target_modules=list(targets))
    model = copy.deepcopy(BASE)
    adapters = Adapters(model, folders)
    alone: dict[str | None, Any] = {name: adapted(folder) for name, folder in folders.items()}
    return model, adapters, alone | {None: PLAIN}


@given(st.lists(st.tuples(st.integers(0, len(IDS) - 1), st.sampled_from([None, "one", "two", "three"])), min_size=1))
def test_rows_of_a_mixed_batch_are_as_each_alone(
    three: tuple[Any, Adapters, dict[str | None, Any]], rows: list[tuple[int, str | None]]
) -> None:
    model, adapters, alone = three
    assert set(adapters.names) == {"one", "two", "three"}
    ids = IDS[[text for text, _ in rows]]
    with adapters.on([name for _, name in rows]):
        found = answers(model, ids)
    for row, (text, name) in enumerate(rows):
        assert far(found[row], alone[name][text]) < EXACT


def test_rows_without_an_adapter_are_those_of_the_model_without_any(
    three: tuple[Any, Adapters, dict[str | None, Any]],
) -> None:
    """To the last bit: as many rows, whatever the adapters of the others."""
    model, adapters, _ = three
    assert torch.equal(answers(model), PLAIN)
    for names in ([None] * 4, [None, "one", "two", "three"], ["two", None, None, "two"]):
        with adapters.on(names):
            found = answers(model)
        for row, name in enumerate(names):
            assert torch.equal(found[row], PLAIN[row]) == (name is None)


def test_after_a_failure_no_adapter_is_left_on(three: tuple[Any, Adapters, dict[str | None, Any]]) -> None:
    model, adapters, _ = three
    with pytest.raises(IndexError), adapters.on(["one"] * 4):
        answers(model, IDS + 64)
    with pytest.raises(KeyError), adapters.on(["one", "four"]):
        pass
    assert torch.equal(answers(model), PLAIN)


def test_what_an_adapter_makes_infinite_stays_in_its_rows(tmp_path: Path) -> None:
    tensors = {name: t * 1e30 for name, t in random_tensors(BASE, seed=1).items()}
    model = copy.deepcopy(BASE)
    adapters = Adapters(model, {"wild": write_adapter(tmp_path, tensors)})
    with adapters.on([None, "wild", None, "wild"]):
        found = answers(model)
    assert not found[1].isfinite().any()
    assert torch.equal(found[[0, 2]], PLAIN[[0, 2]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_have_the_type_of_the_model(tmp_path: Path, dtype: Any) -> None:
    tensors = random_tensors(BASE, seed=1)
    write_adapter(tmp_path, tensors)
    model = copy.deepcopy(BASE).to(dtype)
    parts = read_adapter(tmp_path, model)
    assert {part.down.dtype for part in parts.values()} == {part.up.dtype for part in parts.values()} == {dtype}
    adapters = Adapters(model, {"one": tmp_path})
    with adapters.on(["one"] * 4):
        found = answers(model).float().softmax(dim=-1)
    expected = answers(merged(tensors, dict.fromkeys(layers(BASE), 2.0)).to(dtype)).float().softmax(dim=-1)
    assert far(found, expected) < 0.02


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def save(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def text(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content, encoding="utf-8")


Q0 = "model.layers.0.self_attn.q_proj"
EXTRA = torch.ones(2, 2)
SPOILT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json cannot be read"),
    "no JSON": (lambda f: text(f, "adapter_config.json", "{"), "adapter_config.json is not JSON"),
    "no object": (lambda f: text(f, "adapter_config.json", "[]"), "adapter_config.json: it: "),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
    "no safetensors": (lambda f: text(f, "adapter_model.safetensors", "x" * 99), "is not a safetensors file"),
    "another method": (lambda f: edit(f, peft_type="IA3"), "peft_type: "),
    "DoRA": (lambda f: edit(f, use_dora=True), "use_dora: only plain LoRA is supported"),
    "a bias": (lambda f: edit(f, bias="lora_only"), "bias: "),
    "a bias of B": (lambda f: edit(f, lora_bias=True), "lora_bias: only plain LoRA"),
    "whole modules": (lambda f: edit(f, modules_to_save=["lm_head"]), "modules_to_save: only plain LoRA"),
    "tokens": (lambda f: edit(f, trainable_token_indices=[1]), "trainable_token_indices: only plain LoRA"),
    "parameters": (lambda f: edit(f, target_parameters=["x"]), "target_parameters: only plain LoRA"),
    "layers twice": (lambda f: edit(f, layer_replication=[[0, 1], [0, 2]]), "layer_replication: only plain LoRA"),
    "what is not known yet": (lambda f: edit(f, use_newora=True), "use_newora: only plain LoRA"),
    "a changed base": (lambda f: edit(f, init_lora_weights="pissa"), "init_lora_weights"),
    "rank 0": (lambda f: edit(f, r=0), "r: "),
    "a scale that is no number": (lambda f: edit(f, lora_alpha=float("nan")), "lora_alpha: "),
    "no targets": (lambda f: edit(f, target_modules=["lm_head"]), "names none of the projections"),
    "a bad pattern": (lambda f: edit(f, rank_pattern={"(": 4}), "a pattern is wrong"),
    "a bad expression": (lambda f: edit(f, target_modules="("), "a pattern is wrong"),
    "another rank": (lambda f: edit(f, r=5), r"lora_A of model.layers.0.* is \[4, 64\], expected \[5, 64\]"),
    "fewer targets": (lambda f: edit(f, target_modules=["q_proj"]), "not in target_modules: .* and 9 more"),
    "another depth": (lambda f: save(f, deeper), r"not a projection of the model .*: model.layers.2"),
    "a layer less": (lambda f: save(f, shallower), "lacks tensors for model.layers.1.self_attn.q_proj"),
    "another width": (lambda f: save(f, wider), r"lora_B of .* is \[65, 4\], expected \[64, 4\]: .* another shape"),
    "half a layer": (lambda f: save(f, lambda t: without(t, f"{Q0}.lora_B")), f"lacks tensors for {Q0}"),
    "embeddings": (lambda f: save(f, lambda t: t | {"base_model.model.model.embed_tokens.lora_embedding_A": EXTRA}),
                   "tensors that plain LoRA does not have: base_model.model.model.embed_tokens.lora_embedding_A"),
    "magnitudes": (lambda f: save(f, lambda t: t | {f"base_model.model.{Q0}.lora_magnitude_vector": EXTRA}),
                   "plain LoRA does not have: .*lora_magnitude_vector"),
    "a head": (lambda f: save(f, lambda t: t | {"base_model.model.lm_head.lora_A.weight": EXTRA}),
               "not a projection of the model"),
    "whole numbers": (lambda f: save(f, lambda t: {k: v.to(torch.int8) for k, v in t.items()}), "of the type .*int8"),
    "no number": (lambda f: save(f, lambda t: {k: v / 0 for k, v in t.items()}), "values that are not finite"),
}  # fmt: skip


def without(tensors: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: tensor for key, tensor in tensors.items() if name not in key}


def deeper(tensors: dict[str, Any]) -> dict[str, Any]:
    return tensors | {k.replace("layers.1", "layers.2"): t.clone() for k, t in tensors.items()}


def shallower(tensors: dict[str, Any]) -> dict[str, Any]:
    return without(tensors, "layers.1.")


def wider(tensors: dict[str, Any]) -> dict[str, Any]:
    return {k: torch.ones(len(t) + 1, 4) if f"{Q0}.lora_B" in k else t for k, t in tensors.items()}


@pytest.mark.parametrize("spoilt", SPOILT)
def test_what_is_not_plain_lora_for_this_model_is_refused(tmp_path: Path, spoilt: str) -> None:
    write_adapter(tmp_path, random_tensors(BASE, seed=1))
    assert len(read_adapter(tmp_path, BASE)) == 14
    spoil, message = SPOILT[spoilt]
    spoil(tmp_path)
    with pytest.raises(GuardUnavailable, match=f"the adapter bank of {tmp_path} cannot be used: .*{message}"):
        Adapters(copy.deepcopy(BASE), {"bank": tmp_path})


@pytest.mark.parametrize("name", ["", "a b", "../x", "-x", "a" * 65, "bänk", "x\n"])
def test_names_are_plain(tmp_path: Path, name: str) -> None:
    write_adapter(tmp_path, random_tensors(BASE, seed=1))
    with pytest.raises(InputError, match=r"adapters: expected .* as the name of an adapter"):
        Adapters(copy.deepcopy(BASE), {name: tmp_path})


PEFT: dict[str, dict[str, Any]] = {
    "all": {"r": 8, "lora_alpha": 16, "target_modules": list(PROJECTIONS), "lora_dropout": 0.1},
    "one of rank 1": {"r": 1, "lora_alpha": 5, "target_modules": ["v_proj"]},
    "all-linear": {"r": 3, "target_modules": "all-linear"},
    "an expression": {"r": 4, "target_modules": r"model\.layers\.\d+\.mlp\.(gate|up)_proj"},
    "one layer": {"r": 4, "target_modules": list(PROJECTIONS), "layers_to_transform": 1, "layers_pattern": "layers"},
    "excluded": {"r": 4, "target_modules": list(PROJECTIONS), "exclude_modules": ["layers.0.mlp.up_proj", "k_proj"]},
    "patterns": {"r": 4, "lora_alpha": 7, "target_modules": list(PROJECTIONS), "use_rslora": True,
                 "rank_pattern": {"q_proj": 16, r"layers\.1\.mlp.*": 2}, "alpha_pattern": {"^model.*v_proj": 32}},
}  # fmt: skip


@pytest.mark.parametrize("asked", PEFT)
@pytest.mark.filterwarnings("ignore")
def test_folders_of_peft_give_what_peft_gives(tmp_path: Path, asked: str) -> None:
    """Written by the library itself, with random numbers in both matrices."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(31)
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **PEFT[asked])
    theirs = peft.get_peft_model(copy.deepcopy(BASE), config).eval()
    theirs.save_pretrained(tmp_path)
    expected = answers(theirs)
    assert far(expected, PLAIN) > 0.01
    assert far(adapted(tmp_path), expected) < EXACT
    assert far(adapted(tmp_path), answers(theirs.merge_and_unload())) < EXACT


@pytest.mark.parametrize(
    "asked",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [1, 2]},
        {"init_lora_weights": "pissa"},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_folders_of_peft_that_ask_for_more_are_refused(tmp_path: Path, asked: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    fields: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "r": 2} | asked
    peft.get_peft_model(copy.deepcopy(BASE), peft.LoraConfig(**fields)).save_pretrained(tmp_path)
    with pytest.raises(GuardUnavailable):
        read_adapter(tmp_path, BASE)
