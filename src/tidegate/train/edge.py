"""Train an edge guard from scratch: tokenizer, embeddings, model, all from one recipe and a folder of examples.

A run is a folder: ``recipe.yaml``, ``log.jsonl`` (loss and dev figures as they come), ``curves.png``, ``state.pt`` (to
go on after a kill) and ``checkpoint/`` in the official layout (config.json, model.safetensors, tokenizer.json). A run
that was killed goes on from its last state with the same batches that it would have had.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional

from tidegate.data.distill import cross_fitted
from tidegate.data.examples import read_examples
from tidegate.data.mix import Drawn, Mix, lane_of
from tidegate.data.synthesize import synthesize
from tidegate.errors import InputError
from tidegate.evals.metrics import auroc
from tidegate.model.stream import Qwen3ForGuardModel, parameter_counts, stream_config
from tidegate.model.tokens import CONTROL_TOKENS, SPLIT_PATTERN, Folder, TextTokenizer
from tidegate.train.args import EdgeRecipe, TemplatePart, load_recipe
from tidegate.train.bag import bag_embeddings
from tidegate.train.batches import Batch, Packed, encode, pack, packed_batches, to_batch
from tidegate.train.curves import plot_curves
from tidegate.train.embeddings import spectral_embeddings
from tidegate.train.wide import train_wide
from tidegate.types import Example, Role, Severity, Target

__all__ = ["train"]

_WIDE_SCALE = "ngrams.scale.json"

Progress = Callable[[int, int, str], None]
"""Called with trained tokens, tokens in all, and a line of figures."""


def train(
    recipe_path: Path,
    run: Path,
    *,
    data: Path,
    progress: Progress | None = None,
    resume: bool = True,
    threads: int | None = None,
    compiled: bool = False,
    save_seconds: float = 180.0,
    device: str = "auto",
) -> dict[str, Any]:
    """Train by a recipe.

    Args:
        recipe_path: the recipe (YAML).
        run: folder of the run, made when it does not exist.
        data: folder of ``*.jsonl.gz`` files of examples, with ``split`` train and dev.
        progress: told after every step; None for silence.
        resume: go on from the state in ``run`` if there is one; False starts anew.
        threads: of torch; None leaves torch's choice.
        compiled: whether to compile the model first (a minute, then about a third faster on CPU).
        save_seconds: how often the state is written.
        device: ``cpu``, ``cuda`` or ``auto``.

    Returns:
        The last line of the log.

    Raises:
        RecipeError: the recipe cannot be used.
        InputError: the data cannot be used, or ``run`` holds a run of another recipe.
    """
    recipe = load_recipe(recipe_path)
    if threads:
        torch.set_num_threads(threads)
    _prepare_folder(recipe_path, run, resume)
    examples = load_examples(data, recipe)
    tokenizer = train_tokenizer(recipe, examples, run / "checkpoint" / "tokenizer.json")
    if recipe.wide:
        wide_table(recipe, tokenizer, examples, run / "checkpoint")
    model = build_model(recipe, tokenizer, examples, run / "embeddings.npy")
    where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    trainer = _Trainer(recipe, model.to(where), tokenizer, examples, run, compiled=compiled)
    if resume:
        trainer.restore()
    return trainer.run_to_end(progress or (lambda done, total, line: None), save_seconds)


def load_examples(data: Path, recipe: EdgeRecipe) -> list[Example]:
    """All labelled examples of a folder, and the synthetic ones of the recipe.

    Raises:
        InputError: when the folder has no example file, or the examples lack a split.
    """
    files = sorted([*data.glob("*.jsonl.gz"), *data.glob("*.jsonl")])
    if not files:
        raise InputError("expected files *.jsonl or *.jsonl.gz with examples", where=str(data))
    examples = [example for path in files for example in read_examples(path) if example.severity is not None]
    if recipe.data.synthetic_per_family:
        examples += synthesize(recipe.seed, recipe.data.synthetic_per_family)
    for split in ("train", "dev"):
        if not any(example.split == split for example in examples):
            raise InputError(f"no labelled example has the split {split!r}", where=str(data))
    return examples


def train_tokenizer(recipe: EdgeRecipe, examples: Sequence[Example], path: Path) -> TextTokenizer:
    """A byte-level BPE on training text, an equal share of each lane first; read back when it is already there."""
    if not path.exists():
        tokenizer = Tokenizer(models.BPE())
        split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated")
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=recipe.tokenizer.vocab_size,
            special_tokens=list(CONTROL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            max_token_length=24,
            show_progress=False,
        )
        texts = _balanced_texts(examples, recipe.tokenizer.texts, recipe.seed)
        tokenizer.train_from_iterator((Folder().fold(text)[0] for text in texts), trainer)
        definition = json.loads(tokenizer.to_str())
        definition["added_tokens"] = []
        _whole(path, json.dumps(definition, ensure_ascii=False).encode())
    return TextTokenizer.load(path)


def build_model(
    recipe: EdgeRecipe, tokenizer: TextTokenizer, examples: Sequence[Example], cache: Path
) -> Qwen3ForGuardModel:
    """The model of the recipe, its token embeddings as the recipe says."""
    torch.manual_seed(recipe.seed)
    shape = recipe.model
    config = stream_config(
        vocab_size=tokenizer.vocab_size,
        max_position_embeddings=recipe.template.window,
        **shape.model_dump(),
    )
    config._attn_implementation = "sdpa"
    model = Qwen3ForGuardModel(config)
    if not cache.exists():
        _save_array(cache, _first_embeddings(recipe, tokenizer, examples, cache.with_name("spectral.npy")))
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.from_numpy(np.load(cache)))
    return model


def wide_table(recipe: EdgeRecipe, tokenizer: TextTokenizer, examples: Sequence[Example], checkpoint: Path) -> None:
    """The table of n-grams of the recipe, in the checkpoint's folder; left as it is when it is already there."""
    if recipe.wide is None or (checkpoint / _WIDE_SCALE).exists():
        return
    plan = recipe.data.plan()
    if recipe.wide.balance is not None:
        plan = replace(plan, balance=recipe.wide.balance)
    mix = Mix((e for e in examples if e.split == "train"), plan, recipe.seed + 1)
    values, scale = train_wide(mix, tokenizer, recipe.wide, recipe.template, recipe.loss, seed=recipe.seed)
    _save_array(checkpoint / "ngrams.npy", values)
    _whole(checkpoint / _WIDE_SCALE, json.dumps(scale).encode())


def _first_embeddings(
    recipe: EdgeRecipe, tokenizer: TextTokenizer, examples: Sequence[Example], spectral_cache: Path
) -> np.ndarray:
    size, bag_size = recipe.model.hidden_size, recipe.embeddings.bag_size
    if not spectral_cache.exists():
        collected = (e for e in examples if e.split == "train" and lane_of(e) != "synthetic")
        ids = tokenizer.encode_ids([turn.content for e in collected for turn in e.conversation.turns])
        vectors = spectral_embeddings(ids, vocab_size=tokenizer.vocab_size, dim=size - bag_size, seed=recipe.seed)
        _save_array(spectral_cache, vectors)
    spectral = np.load(spectral_cache)
    if not bag_size:
        return spectral
    mix = Mix((e for e in examples if e.split == "train"), recipe.data.plan(), recipe.seed + 1)
    drawn = [encode(mix.draw(), tokenizer, recipe.template, recipe.loss) for _ in range(recipe.embeddings.bag_texts)]
    bag = bag_embeddings(
        drawn,
        vocab_size=tokenizer.vocab_size,
        dim=bag_size,
        epochs=recipe.embeddings.bag_epochs,
        seed=recipe.seed,
    )
    return np.concatenate([spectral, bag], axis=1)


def dev_texts(
    examples: Sequence[Example], tokenizer: TextTokenizer, recipe: EdgeRecipe, limit: int
) -> tuple[list[Example], list[Packed]]:
    """Up to ``limit`` dev examples, evenly over lanes, and their first windows as the guard would see them."""
    dev = [example for example in examples if example.split == "dev"]
    order = np.random.default_rng(recipe.seed).permutation(len(dev))
    lanes = sorted({lane_of(example) for example in dev})
    quota = {lane: limit // len(lanes) for lane in lanes}
    chosen = []
    for index in order:
        lane = lane_of(dev[index])
        if quota[lane] > 0:
            quota[lane] -= 1
            chosen.append(dev[index])
    return chosen, [encode(as_drawn(example), tokenizer, recipe.template, recipe.loss) for example in chosen]


def as_drawn(example: Example) -> Drawn:
    """An example as it is, nothing changed."""
    turns = example.conversation.turns
    response = example.target is Target.RESPONSE
    users = [turn.content for turn in turns[:-1] if turn.role is Role.USER] if response else []
    onset = example.extra.get("onset")
    return Drawn(
        target=example.target,
        role=Role.ASSISTANT if response else turns[-1].role,
        context=users[-1] if users else "",
        text=turns[-1].content,
        severity=example.severity or Severity.SAFE,
        categories=example.categories,
        onset=int(onset) if isinstance(onset, int) else 0,
        known_onset=isinstance(onset, int),
        weight=1.0,
    )


@dataclass(slots=True)
class _Clock:
    """How far the run is; ``stage_tokens`` and ``stage_steps`` count within the stage."""

    tokens: int = 0
    texts: int = 0
    steps: int = 0
    seconds: float = 0.0
    stage: int = 0
    stage_tokens: int = 0
    stage_steps: int = 0


class _Trainer:
    """The loop: batches in, a better model out, a state on disk at any time."""

    def __init__(
        self,
        recipe: EdgeRecipe,
        model: Qwen3ForGuardModel,
        tokenizer: TextTokenizer,
        examples: Sequence[Example],
        run: Path,
        *,
        compiled: bool,
    ) -> None:
        self.recipe, self.model, self.run = recipe, model, run
        self.device = next(model.parameters()).device
        self.forward = torch.compile(model, dynamic=False) if compiled else model
        self.optimizer = _optimizer(model, recipe)
        self.average = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.clock = _Clock()
        self.tokenizer = tokenizer
        self.examples = [example for example in examples if example.split == "train"]
        self.dev = dev_texts(examples, tokenizer, recipe, 1500)
        self.recent: list[tuple[float, float]] = []

    def restore(self) -> None:
        """Go on from the state on disk, if there is one: the batches that were seen are drawn again and dropped."""
        path = self.run / "state.pt"
        if not path.exists():
            return
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average = state["average"]
        self.clock = _Clock(**state["clock"])
        self._forget_lines_after(self.clock.tokens)

    def _forget_lines_after(self, tokens: int) -> None:
        """Figures that were logged after the state was saved will be measured again."""
        log = self.run / "log.jsonl"
        if log.exists():
            lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["tokens"] <= tokens]
            _whole(log, "".join(kept).encode())

    def batches(self, stage: int) -> Iterator[Batch]:
        """The batches of a stage, each stage with draws of its own."""
        recipe, seed = self.recipe, self.recipe.seed + 2 * stage
        teacher = self._teacher() if recipe.optimizer.stages[stage].teacher else None
        mix = Mix(self.examples, recipe.data.plan(), seed, teacher)
        return packed_batches(
            mix,
            self.tokenizer,
            recipe.template,
            recipe.loss,
            rows=recipe.optimizer.rows,
            seed=seed,
            drop_tokens=recipe.data.drop_tokens,
        )

    def _teacher(self) -> dict[str, tuple[float, float, float]]:
        """What a teacher says of the training examples; made once, then read from the run's folder."""
        path = self.run / "teacher.npz"
        if not path.exists():
            found = cross_fitted(self.examples, epochs=self.recipe.data.teacher_epochs)
            part = self.run / "teacher.part.npz"
            np.savez(part, ids=np.asarray(list(found)), p=np.asarray(list(found.values()), np.float32))
            part.replace(path)
        kept = np.load(path)
        return {name: tuple(p) for name, p in zip(kept["ids"].tolist(), kept["p"].tolist(), strict=True)}

    def save(self) -> None:
        """Write the state, so that a kill at any moment leaves a whole one."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "clock": {name: getattr(self.clock, name) for name in _Clock.__slots__},
        }
        part = self.run / "state.part"
        torch.save(state, part)
        part.replace(self.run / "state.pt")
        self._write_checkpoint()

    def run_to_end(self, progress: Progress, save_seconds: float) -> dict[str, Any]:
        """Train until the recipe's number of tokens; returns the last dev figures."""
        total = self.recipe.optimizer.tokens
        self._saved = time.monotonic()
        self._next_dev = (self.clock.tokens // _dev_every(total) + 1) * _dev_every(total)
        self._figures: dict[str, Any] = {}
        while self.clock.stage < len(self.recipe.optimizer.stages):
            self._run_stage(progress, save_seconds)
            self.clock.stage += 1
            self.clock.stage_tokens = self.clock.stage_steps = 0
        figures = self.measure()
        self.save()
        plot_curves(self.run)
        return figures

    def _run_stage(self, progress: Progress, save_seconds: float) -> None:
        total, length = self.recipe.optimizer.tokens, self.recipe.optimizer.stages[self.clock.stage].length
        for batch in islice(self.batches(self.clock.stage), self.clock.stage_steps, None):
            if self.clock.stage_tokens >= length:
                return
            self.step(batch)
            progress(self.clock.tokens, total, self._line(self._figures))
            if self.clock.tokens >= self._next_dev:
                self._figures = self.measure()
                self._next_dev += _dev_every(total)
            if time.monotonic() - self._saved > save_seconds:
                self.save()
                self._saved = time.monotonic()

    def step(self, batch: Batch) -> None:
        """One step of the optimizer on one batch."""
        started = time.monotonic()
        stage = self.recipe.optimizer.stages[self.clock.stage]
        share = _schedule(self.clock.stage_tokens / stage.tokens, stage.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = share * (stage.embedding_lr if group["embeddings"] else stage.lr)
        self.model.train()
        loss, parts = self.loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.optimizer.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        tokens = int((batch.segments >= 0).sum())
        self.clock.steps += 1
        self.clock.stage_steps += 1
        self.clock.texts += batch.texts
        self.clock.tokens += tokens
        self.clock.stage_tokens += tokens
        if self.clock.steps % 4 == 0:
            self._average()
        self.clock.seconds += time.monotonic() - started
        self.recent = [*self.recent[-199:], (float(loss.detach()), parts)]

    def loss(self, batch: Batch) -> tuple[Tensor, float]:
        """Risk loss of both branches plus category loss, per text; and the risk part alone for the log."""
        ids, positions, mask = _inputs(batch, self.device)
        lower = self.recipe.optimizer.precision == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=lower):
            logits = self.forward(ids, mask, positions)
        labels = torch.from_numpy(batch.labels).to(self.device)
        risk_weight = torch.from_numpy(batch.risk_weight).to(self.device)
        query_weight = torch.from_numpy(batch.query_weight).to(self.device)
        categories = torch.from_numpy(batch.categories).to(self.device)
        harmful = (labels != 0).float() * categories.sum(-1)
        truth = self._truth(labels, torch.from_numpy(batch.teacher).to(self.device))
        risk = _weighted(logits.risk, truth, risk_weight) + _weighted(logits.query_risk, truth, query_weight)
        named = _weighted(logits.category, categories[..., :-1], risk_weight * harmful)
        named = named + _weighted(logits.query_category, categories, query_weight * harmful)
        total = (risk + self.recipe.loss.category * named) / batch.texts
        return total, float(risk.detach()) / batch.texts

    def _truth(self, labels: Tensor, teacher: Tensor) -> Tensor:
        """The target ``[rows, window, 3]``: the label, smoothed, and the teacher's word where there is one."""
        smoothing = self.recipe.loss.smoothing
        hard = functional.one_hot(labels, 3).float() * (1 - smoothing) + smoothing / 3
        share = self.recipe.optimizer.stages[self.clock.stage].teacher * (teacher.sum(-1, keepdim=True) > 0)
        return hard * (1 - share) + teacher * share

    @torch.no_grad()
    def measure(self) -> dict[str, Any]:
        """Dev figures of the averaged weights, appended to the log."""
        kept = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self._load(self.average)
        examples, packed = self.dev
        logits = end_logits(self.model, packed, self.recipe.template)
        self._load(kept)
        flagged = 1 - torch.from_numpy(logits).softmax(-1).numpy()[:, 0]
        positive = np.asarray([example.severity is not Severity.SAFE for example in examples])
        figures: dict[str, Any] = {
            "tokens": self.clock.tokens,
            "texts": self.clock.texts,
            "seconds": round(self.clock.seconds, 1),
            "loss": round(float(np.mean([a for a, _ in self.recent])), 4) if self.recent else None,
            "risk_loss": round(float(np.mean([b for _, b in self.recent])), 4) if self.recent else None,
        }
        lanes = np.asarray([lane_of(example) for example in examples])
        targets = np.asarray([example.target.value for example in examples])
        for name, rows in [
            *((f"dev/{t}", targets == t) for t in ("prompt", "response")),
            *((f"dev/{lane}", lanes == lane) for lane in sorted(set(lanes))),
        ]:
            value = auroc(positive[rows], flagged[rows].astype(np.float64))
            figures[name] = None if value is None else round(value, 4)
        with (self.run / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(figures) + "\n")
        plot_curves(self.run)
        return figures

    def _average(self) -> None:
        keep = self.recipe.optimizer.ema**4 if self.recipe.optimizer.ema else 0.0
        keep = min(keep, self.clock.steps / (self.clock.steps + 40))
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                self.average[name].lerp_(parameter, 1 - keep)

    @torch.no_grad()
    def _load(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.copy_(weights[name])

    def _line(self, figures: dict[str, Any]) -> str:
        speed = self.clock.tokens / max(self.clock.seconds, 1e-9)
        recent = np.mean([a for a, _ in self.recent[-50:]])
        dev = "".join(f", {name[4:]} {figures[name]}" for name in ("dev/prompt", "dev/response") if figures.get(name))
        return f"loss {recent:.3f}, {speed:,.0f} tokens/s{dev}"

    def _write_checkpoint(self) -> None:
        folder = self.run / "checkpoint"
        save_file(
            {name: weight.contiguous().cpu() for name, weight in self.average.items()}, folder / "model.safetensors"
        )
        config = json.loads(self.model.config.to_json_string(use_diff=False))
        template = self.recipe.template.model_dump()
        config["rope_theta"] = self.recipe.model.rope_theta  # transformers 5 writes it elsewhere
        config["tidegate"] = {"format": 1, "name": self.recipe.name, "version": self.recipe.version, **template}
        config["tidegate"]["languages"] = list(self.recipe.languages)
        config["tidegate"]["parameters"] = parameter_counts(self.model)[0]
        config["tidegate"]["trained_tokens"] = self.clock.tokens
        if self.recipe.wide:
            config["tidegate"]["wide"] = {"scale": json.loads((folder / _WIDE_SCALE).read_text(encoding="utf-8"))}
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@torch.no_grad()
def end_logits(model: Qwen3ForGuardModel, texts: Sequence[Packed], template: TemplatePart) -> np.ndarray:
    """Risk logits ``[texts, 3]`` (ids of the official maps) of each text at its last token, by its own branch."""
    model.eval()
    result = np.zeros((len(texts), 3), np.float32)
    place = {id(text): index for index, text in enumerate(texts)}
    rows = pack(texts, template.window)
    for at in range(0, len(rows), 16):
        part = rows[at : at + 16]
        batch = to_batch(part, template.window)
        logits = model(*_reordered(_inputs(batch, next(model.parameters()).device)))
        risk, query = logits.risk.cpu().numpy(), logits.query_risk.cpu().numpy()
        for r, row in enumerate(part):
            end = -1
            for text in row:
                end += len(text.ids)
                result[place[id(text)]] = query[r, end] if text.query_weight[-1] > 0 else risk[r, end]
    return result


def _reordered(inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    ids, positions, mask = inputs
    return ids, mask, positions


def _inputs(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, positions and the boolean mask (a text sees its own past)."""
    segments = torch.from_numpy(batch.segments).to(device)
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    mask = (segments[:, :, None] == segments[:, None, :]) & causal
    return torch.from_numpy(batch.ids).to(device), torch.from_numpy(batch.positions).to(device), mask[:, None]


def _weighted(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Cross-entropy with a target distribution, summed over positions by weight."""
    chosen = weight > 0
    each = -(target[chosen] * functional.log_softmax(logits[chosen].float(), dim=-1)).sum(-1)
    return (each * weight[chosen]).sum()


def _optimizer(model: Qwen3ForGuardModel, recipe: EdgeRecipe) -> torch.optim.Optimizer:
    matrices: list[Tensor] = []
    embeddings: list[Tensor] = []
    vectors: list[Tensor] = []
    for name, parameter in model.named_parameters():
        kind = embeddings if "embed_tokens" in name else matrices if parameter.ndim > 1 else vectors
        kind.append(parameter)
    settings = recipe.optimizer
    groups = [
        {"params": matrices, "embeddings": False, "weight_decay": settings.weight_decay},
        {"params": embeddings, "embeddings": True, "weight_decay": 0.0},
        {"params": vectors, "embeddings": False, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.stages[0].lr, betas=(0.9, 0.98), fused=True)


def _schedule(done: float, warmup: float) -> float:
    """Share of the peak learning rate after a share ``done`` of the tokens: up, then half a cosine down to 3 %."""
    if done < warmup:
        return max(0.01, done / warmup)
    rest = min(1.0, (done - warmup) / (1 - warmup))
    return 0.03 + 0.97 * (1 + math.cos(math.pi * rest)) / 2


def _dev_every(total: int) -> int:
    return max(1, total // 10)


def _balanced_texts(examples: Sequence[Example], count: int, seed: int) -> Iterator[str]:
    """Texts of training examples, the lanes taking turns until all are used or ``count`` is reached."""
    rng = np.random.default_rng(seed)
    lanes: dict[str, list[Example]] = {}
    for example in examples:
        if example.split == "train" and lane_of(example) != "synthetic":
            lanes.setdefault(f"{lane_of(example)}/{example.language}", []).append(example)
    queues = [[rows[i] for i in rng.permutation(len(rows))] for _, rows in sorted(lanes.items())]
    given = 0
    while queues and given < count:
        for queue in queues:
            example = queue.pop()
            for turn in example.conversation.turns:
                yield turn.content[:2000]
            given += 1
        queues = [queue for queue in queues if queue]


def _whole(path: Path, content: bytes) -> None:
    """Write a file so that a kill at any moment leaves the old one or the new one."""
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(content)
    part.replace(path)


def _save_array(path: Path, array: np.ndarray) -> None:
    part = path.with_name(f"{path.stem}.part.npy")
    np.save(part, array)
    part.replace(path)


def _prepare_folder(recipe_path: Path, run: Path, resume: bool) -> None:
    if not resume and run.exists():
        shutil.rmtree(run)
    (run / "checkpoint").mkdir(parents=True, exist_ok=True)
    kept = run / "recipe.yaml"
    recipe_text = recipe_path.read_text(encoding="utf-8")
    if kept.exists() and kept.read_text(encoding="utf-8") != recipe_text:
        raise InputError("holds a run of another recipe: take another folder, or start anew", where=str(run))
    kept.write_text(recipe_text, encoding="utf-8")
