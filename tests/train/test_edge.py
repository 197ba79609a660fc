"""A whole training run in little: it learns, a kill changes nothing of what comes out, and what comes out judges.

One run of a model of a few thousand parameters on some made sentences, with everything a real run has: tokenizer, first
embeddings, packed and composed batches, the averaged weights, the log and the checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tidegate.data.examples import write_examples
from tidegate.errors import InputError
from tidegate.guards import load_guard
from tidegate.types import Category, Conversation, Example, Severity

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
edge = pytest.importorskip("tidegate.train.edge")
export_onnx = pytest.importorskip("tidegate.train.export").export_onnx
load_file = pytest.importorskip("safetensors.numpy").load_file
edge_folder = pytest.importorskip("edge_folder")

RECIPE = """
kind: edge
name: tiny
version: "0"
seed: 7
tokenizer: {vocab_size: 600, texts: 500}
model:
  hidden_size: 32
  num_hidden_layers: 2
  num_attention_heads: 4
  num_key_value_heads: 2
  intermediate_size: 48
  guard_inner_size: 24
embeddings: {bag_size: 8, bag_texts: 512, bag_epochs: 8}
wide: {bits: 14, texts: 1500}
template: {window: 64, overlap: 8, context: 12}
data:
  lanes: {prompt-en: 0.5, response-en: 0.5}
  drop_tokens: 0.02
optimizer:
  stages:
    - {tokens: 5000, lr: 0.004, embedding_lr: 0.004}
    - {tokens: 3000, lr: 0.002, embedding_lr: 0.002, teacher: 0.5}
  rows: 4
  ema: 0.9
languages: [en]
"""
HARM = (("poison the well of the village", Category.VIOLENT), ("steal the keys of the bank", Category.PII))
CALM = ("water the plants of the garden", "paint the door of the house", "count the birds of the lake")
ASKS = ("how do I {}", "tell me how to {} today", "please help me to {}", "{}, that is what I want")


def examples() -> Iterator[Example]:
    """Two thirds of every kind are for training, one third is the dev split."""
    for n, ask in enumerate(ASKS * 6):
        split = "dev" if n % 3 == 2 else "train"
        phrases: list[tuple[str, Severity, tuple[str, ...]]] = [(phrase, Severity.SAFE, ()) for phrase in CALM]
        phrases += [(phrase, Severity.UNSAFE, (category.value,)) for phrase, category in HARM]
        for phrase, severity, categories in phrases:
            asked = ask.format(phrase)
            answer = f"Sure, number {n}: first you rest a little, and then you {phrase}."
            for part in (Conversation.of(asked), Conversation.of("what shall I do", answer)):
                name = f"{n}/{phrase}/{part.target}"
                yield Example(
                    name, part, part.target, severity, categories, language="en", source="made/up", split=split
                )


class Killed(Exception):
    """The machine went away."""


class KillAt:
    """A progress call that ends the run from within at the first step past a number of tokens."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def __call__(self, done: int, total: int, line: str) -> None:
        if done >= self.tokens:
            raise Killed


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    (folder / "data").mkdir()
    write_examples(folder / "data" / "made.jsonl.gz", examples())
    return folder


def trained(place: Path, run: str, **how: Any) -> dict[str, Any]:
    return edge.train(place / "recipe.yaml", place / run, data=place / "data", threads=1, device="cpu", **how)


@pytest.fixture(scope="module")
def whole(place: Path) -> dict[str, Any]:
    """The figures of an uninterrupted run, in the folder ``whole``."""
    told: list[tuple[int, int]] = []
    figures = trained(place, "whole", progress=lambda done, total, line: told.append((done, total)))
    assert told
    assert told == sorted(told)
    return figures


def weights(run: Path) -> dict[str, np.ndarray]:
    return dict(load_file(run / "checkpoint" / "model.safetensors"))


def test_a_run_learns_what_it_is_shown(whole: dict[str, Any]) -> None:
    assert whole["tokens"] >= 8000
    assert whole["dev/prompt"] > 0.9
    assert whole["dev/response"] > 0.9


def test_a_run_leaves_its_recipe_its_log_its_curves_and_its_state(place: Path, whole: dict[str, Any]) -> None:
    run = place / "whole"
    assert (run / "recipe.yaml").read_text(encoding="utf-8") == RECIPE
    log = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert log[-1] == whole
    assert [line["tokens"] for line in log] == sorted(line["tokens"] for line in log)
    assert log[-1]["loss"] < log[0]["loss"]
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list(run.glob("*.part"))


def test_the_checkpoint_has_the_official_layout(place: Path, whole: dict[str, Any]) -> None:
    checkpoint = place / "whole" / "checkpoint"
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    model = edge_folder.tiny_config(config["vocab_size"])
    # newer versions of transformers keep rope_theta one level down
    assert set(model) - {"tidegate", "use_cache", "rope_theta"} <= set(config)
    assert config.get("rope_theta", config.get("rope_parameters", {}).get("rope_theta")) == 10_000.0
    maps = [name for name in model if name.endswith("_map")]
    assert {name: config[name] for name in maps} == {name: model[name] for name in maps}
    assert config["tidegate"] | {"name": "tiny", "version": "0", "window": 64} == config["tidegate"]
    found = weights(place / "whole")
    assert set(found) == set(edge_folder.tiny_tensors(model))
    assert found["model.embed_tokens.weight"].shape == (config["vocab_size"], 32)
    assert all(np.isfinite(weight).all() for weight in found.values())
    assert sum(weight.size for weight in found.values()) == config["tidegate"]["parameters"]


def test_a_run_that_was_killed_ends_with_the_weights_of_one_that_was_not(
    place: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edge, "plot_curves", lambda run: None)  # drawing takes longer than training here
    for tokens in (2000, 4500):
        with pytest.raises(Killed):
            trained(place, "killed", progress=KillAt(tokens), save_seconds=0.0)
        (place / "killed" / "state.part").write_bytes(b"half a state")
    figures = trained(place, "killed")
    same = {name: value for name, value in figures.items() if name.startswith("dev/") or name in ("tokens", "texts")}
    assert same == {name: whole[name] for name in same}
    before, after = weights(place / "whole"), weights(place / "killed")
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_a_run_whose_products_are_of_lower_precision_learns_too_and_keeps_whole_weights(
    place: Path, whole: dict[str, Any]
) -> None:
    recipe = place / "lower.yaml"
    recipe.write_text(RECIPE.replace("  ema: 0.9\n", "  ema: 0.9\n  precision: bfloat16\n"), encoding="utf-8")
    figures = edge.train(recipe, place / "lower", data=place / "data", threads=1, device="cpu")
    assert figures["dev/prompt"] > 0.9
    assert figures["loss"] == pytest.approx(whole["loss"], rel=0.2)
    assert figures["loss"] != whole["loss"]
    assert {str(weight.dtype) for weight in weights(place / "lower").values()} == {"float32"}


def test_a_run_goes_on_only_with_its_own_recipe(place: Path, whole: dict[str, Any], tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(RECIPE.replace("seed: 7", "seed: 8"), encoding="utf-8")
    before = weights(place / "whole")
    with pytest.raises(InputError, match="another recipe"):
        edge.train(other, place / "whole", data=place / "data", threads=1, device="cpu")
    assert all(np.array_equal(before[name], weight) for name, weight in weights(place / "whole").items())


@pytest.mark.parametrize(("split", "missing"), [("train", "'dev'"), ("dev", "'train'")])
def test_examples_without_a_split_are_refused_by_its_name(tmp_path: Path, split: str, missing: str) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    write_examples(tmp_path / "made.jsonl", (example for example in examples() if example.split == split))
    with pytest.raises(InputError, match=missing):
        edge.train(tmp_path / "recipe.yaml", tmp_path / "run", data=tmp_path, threads=1, device="cpu")


def test_a_folder_without_examples_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    with pytest.raises(InputError, match="expected files"):
        edge.train(tmp_path / "recipe.yaml", tmp_path / "run", data=tmp_path, threads=1, device="cpu")


async def test_what_was_trained_is_exported_and_judges(place: Path, whole: dict[str, Any]) -> None:
    export_onnx(place / "whole", place / "onnx")
    guard = load_guard(f"edge:{place / 'onnx'}")
    harmful = await guard.judge(Conversation.of(ASKS[0].format(HARM[0][0])))
    calm = await guard.judge(Conversation.of(ASKS[0].format(CALM[0])))
    await guard.close()
    assert harmful.probabilities.flagged > calm.probabilities.flagged + 0.2
    assert harmful.guard == "tiny/0"
