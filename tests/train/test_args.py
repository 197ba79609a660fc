"""A recipe is read strictly: the shipped one loads, and a wrong key is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from tidegate.data.mix import MixPlan
from tidegate.errors import InputError, RecipeError
from tidegate.train.args import load_recipe

SHIPPED = Path(__file__).resolve().parents[2] / "recipes" / "edge.yaml"


def changed(tmp_path: Path, before: str, after: str) -> Path:
    text = SHIPPED.read_text(encoding="utf-8")
    assert before in text
    path = tmp_path / "recipe.yaml"
    path.write_text(text.replace(before, after, 1), encoding="utf-8")
    return path


def test_the_shipped_recipe_loads_and_is_of_a_model_that_can_be_built() -> None:
    recipe = load_recipe(SHIPPED)
    assert (recipe.kind, recipe.name) == ("edge", "edge")
    assert recipe.model.hidden_size % recipe.model.num_attention_heads == 0
    assert recipe.model.num_attention_heads % recipe.model.num_key_value_heads == 0
    assert recipe.embeddings.bag_size < recipe.model.hidden_size
    assert 16_000 <= recipe.tokenizer.vocab_size <= 32_768
    assert recipe.template.context + recipe.template.overlap + 7 <= recipe.template.window
    assert "en" in recipe.languages


def test_the_draw_of_a_recipe_is_the_plan_of_the_mix() -> None:
    recipe = load_recipe(SHIPPED)
    plan = recipe.data.plan()
    assert isinstance(plan, MixPlan)
    assert dict(plan.lanes) == recipe.data.lanes
    assert (plan.compose, plan.disguise, plan.severities) == (
        recipe.data.compose,
        recipe.data.disguise,
        recipe.data.severities,
    )


@pytest.mark.parametrize(
    ("before", "after", "place"),
    [
        ("seed: ", "seeds: ", "seed"),
        ("  hidden_size:", "  hidden_sizes:", "model.hidden_size"),
        ("  compose: 0.25", "  compose: 1.5", "data.compose"),
        ("  compose: 0.25", "  compose: often", "data.compose"),
        ("  ramp: 1.5", "  ramp: -1", "loss.ramp"),
        ("  vocab_size: 32000", "  vocab_size: 100", "tokenizer.vocab_size"),
        ("  severities: [0.52, 0.14, 0.34]", "  severities: [0.5, 0.5]", "data.severities"),
        ("kind: edge", "kind: gen", "kind"),
        ("optimizer:", "optimiser:", "optimizer"),
    ],
)
def test_a_wrong_key_is_named_with_its_file(tmp_path: Path, before: str, after: str, place: str) -> None:
    path = changed(tmp_path, before, after)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value.where).startswith(f"{path}: {place}")


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2\n", "", "\x00"])
def test_a_file_that_is_no_recipe_is_a_recipe_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=r"recipe\.yaml"):
        load_recipe(path)


def test_what_is_no_yaml_is_told_by_its_place_and_not_quoted(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("kind: edge\n{canary: [7\n", encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path}:3:1: this is not YAML")
    assert "canary" not in str(caught.value)


def test_a_file_that_is_not_there_or_not_text_is_a_recipe_error(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.yaml: cannot read the recipe: No such file"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError):
        load_recipe(tmp_path / "bytes.yaml")
