"""A recipe: everything that decides a training run, in one YAML file that is read strictly."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tidegate.data.mix import MixPlan
from tidegate.errors import RecipeError

__all__ = ["EdgeRecipe", "load_recipe"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TokenizerPart(_Strict):
    """The byte-level BPE that is trained first."""

    vocab_size: int = Field(ge=512, le=65_536)
    texts: int = Field(default=200_000, ge=1, description="how many texts it is trained on, balanced by lane")


class ModelPart(_Strict):
    """The shape of the model, in the official config's names."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    guard_inner_size: int
    rope_theta: float = 10_000.0


class EmbeddingPart(_Strict):
    """What the token embeddings start from: the company that tokens keep, and what they are a sign of."""

    bag_size: int = Field(default=0, ge=0, description="columns from the bag of tokens; the others are spectral")
    bag_texts: int = Field(default=300_000, ge=1)
    bag_epochs: int = Field(default=4, ge=1)


class WidePart(_Strict):
    """The table of n-grams beside the model; see model/wide.py and train/wide.py."""

    bits: int = Field(ge=8, le=24, description="2 to this many rows, for prompts and for responses each")
    texts: int = Field(default=700_000, ge=1, description="how many texts are drawn")
    lr: float = Field(default=0.5, gt=0)
    drop: float = Field(default=0.3, ge=0, lt=1, description="share of n-grams left out in a step")
    balance: float | None = Field(default=None, ge=0, le=1, description="as in data; None for the same as there")


class TemplatePart(_Strict):
    """How much a guard looks at, in tokens."""

    window: int = Field(default=256, ge=32, description="positions of one window; the model is trained up to here")
    overlap: int = Field(default=64, ge=1)
    context: int = Field(default=64, ge=8, description="tokens of the user's turn that are shown before an answer")


class DataPart(_Strict):
    """What is drawn, and how."""

    synthetic_per_family: int = Field(default=0, ge=0)
    lanes: dict[str, float]
    severities: tuple[float, float, float] = (0.52, 0.14, 0.34)
    balance: float = Field(default=0.6, ge=0, le=1)
    trust: dict[str, float] = {"high": 1.0, "medium": 0.8, "low": 0.4}
    transfer_sources: tuple[str, ...] = ()
    transfer: float = Field(default=0.3, ge=0, le=1)
    compose: float = Field(default=0.25, ge=0, le=1)
    disguise: float = Field(default=0.12, ge=0, le=1)
    drop_context: float = Field(default=0.15, ge=0, le=1)
    drop_tokens: float = Field(default=0.0, ge=0, lt=1, description="share of tokens hidden: none shall decide alone")
    teacher_epochs: int = Field(default=5, ge=1, description="of the cross-fitted teacher; see data/distill.py")

    def plan(self) -> MixPlan:
        """The same as the mix takes it."""
        return MixPlan(**self.model_dump(exclude={"synthetic_per_family", "teacher_epochs", "drop_tokens"}))


class LossPart(_Strict):
    """What the model is asked for; see train/batches.py for the token-level target."""

    ramp: float = Field(default=1.5, ge=0, description="exponent of the weight that grows over an unsafe answer")
    prefix: float = Field(default=0.3, ge=0, description="weight of the tokens of a prompt before its end")
    category: float = Field(default=0.3, ge=0)
    smoothing: float = Field(default=0.02, ge=0, lt=0.5)


class StagePart(_Strict):
    """One pass with a learning rate that warms up and falls by a cosine to almost nothing."""

    tokens: int = Field(gt=0, description="length of the schedule in trained tokens")
    end: float = Field(default=1.0, gt=0, le=1, description="share of the schedule after which the next stage begins")
    lr: float = Field(default=1.5e-3, gt=0)
    embedding_lr: float = Field(default=1e-3, gt=0)
    warmup: float = Field(default=0.04, ge=0, lt=1)
    teacher: float = Field(default=0.0, ge=0, le=1, description="share of the teacher in the target of a whole text")

    @property
    def length(self) -> int:
        """Trained tokens of the stage."""
        return int(self.tokens * self.end)


class OptimizerPart(_Strict):
    """AdamW, in one stage after the other."""

    stages: tuple[StagePart, ...] = Field(min_length=1)
    rows: int = Field(default=16, ge=1, description="packed rows of one window in a step")
    weight_decay: float = 0.1
    clip: float = 1.0
    ema: float = Field(default=0.995, ge=0, lt=1, description="of the weights, by step; 0 for none")
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="of matrix products; weights, norms, loss and optimizer are always float32"
    )

    @property
    def tokens(self) -> int:
        """Length of the run in trained tokens."""
        return sum(stage.length for stage in self.stages)


class EdgeRecipe(_Strict):
    """The recipe of an edge guard."""

    kind: Literal["edge"]
    name: str
    version: str
    seed: int
    tokenizer: TokenizerPart
    model: ModelPart
    embeddings: EmbeddingPart = EmbeddingPart()
    wide: WidePart | None = None
    template: TemplatePart = TemplatePart()
    data: DataPart
    loss: LossPart = LossPart()
    optimizer: OptimizerPart
    languages: tuple[str, ...] = ()


def load_recipe(path: Path) -> EdgeRecipe:
    """Read a recipe.

    Raises:
        RecipeError: when the file cannot be read, is not YAML, or has a wrong or unknown key; names the key.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"cannot read the recipe: {error.strerror}", where=str(path)) from error
    except yaml.MarkedYAMLError as error:  # its own words quote the file
        mark = error.problem_mark or error.context_mark
        place = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        raise RecipeError(f"this is not YAML: {error.problem or error.context}", where=place) from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError("this is not YAML in UTF-8", where=str(path)) from error
    try:
        return EdgeRecipe.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise RecipeError(f"{first['msg']} ({error.error_count()} problems)", where=f"{path}: {place}") from error
