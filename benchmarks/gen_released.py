"""Gen as its model card uses it, and a checkpoint of random weights that answers in the official form.

The model card's way: the chat template, ``generate`` with ``max_new_tokens=128`` until the model ends its answer, and
regular expressions over the text; greedy, as the official evaluation has it. Written from the card, not copied.

A random model says nothing of the form, and then ``generate`` would go on to its limit. So `write_checkpoint` makes
Qwen3 weights at random and then fits the rows of the output layer that belong to the tokens of the wanted answers, by
least squares on the hidden states at the places where each answer is to be given. Nothing else is fitted, every shape
is the released one, and a forward costs what it costs with the released weights. The one difference: the output layer
is a matrix of its own, as in the 8B model, where the 0.6B model uses its embedding table.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from tidegate.model.prompt_tokens import PromptTokenizer
from tidegate.prompts import OFFICIAL
from tidegate.types import Conversation, Target, Verdict

SHAPES: Final[Mapping[str, dict[str, int]]] = {
    "0.6b": {
        "vocab_size": 151936,
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "intermediate_size": 3072,
        "head_dim": 128,
    },
    "tiny": {
        "vocab_size": 151936,
        "hidden_size": 1024,
        "num_hidden_layers": 2,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "intermediate_size": 3072,
        "head_dim": 64,
    },
}
FILES: Final = os.environ.get("TIDEGATE_QWEN3GUARD_FILES", "")
"""The folder with the released ``tokenizer.json`` and, in ``gen-0.6b``, the chat template."""

_MOST_NEW: Final = 128
_LOGIT: Final = 40.0
"""What the fitted rows give for the wanted token; every other token has about 0."""
_RIDGE: Final = 1e-3
"""Relative to the mean square of a hidden state: the fit must hold when the states are rounded in another way."""
_SEVERITY: Final = re.compile(r"Safety: (Safe|Unsafe|Controversial)")
_REFUSAL: Final = re.compile(r"Refusal: (Yes|No)")
_CATEGORY: Final = re.compile("|".join(map(re.escape, OFFICIAL[Target.PROMPT].categories)))


@dataclass(frozen=True, slots=True)
class Said:
    """What the regular expressions found in an answer; ``tokens`` of it, with the one that ends it."""

    severity: str | None
    categories: tuple[str, ...]
    refusal: bool | None
    tokens: int


class ModelCard:
    """A Gen checkpoint, used as the model card says.

    Args:
        folder: with config, weights, tokenizer and chat template.
        dtype: of the weights.
        device: where to compute, as torch names it.
    """

    def __init__(self, folder: Path, *, dtype: torch.dtype, device: str) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
        self._model.generation_config.pad_token_id = self._tokenizer.pad_token_id

    def judge(self, conversations: Sequence[Conversation]) -> list[Said]:
        """Generate the answers to these in one padded batch, and read them."""
        texts = [self.text(conversation) for conversation in conversations]
        inputs = self._tokenizer(texts, return_tensors="pt", padding=True).to(self._model.device)
        with torch.inference_mode():
            output = self._model.generate(**inputs, max_new_tokens=_MOST_NEW, do_sample=False)
        answers = output[:, inputs["input_ids"].shape[1] :]
        return [self._read(answer) for answer in answers]

    def text(self, conversation: Conversation) -> str:
        """The prompt, by the chat template."""
        messages = [{"role": turn.role.value, "content": turn.content} for turn in conversation.turns]
        rendered: str = self._tokenizer.apply_chat_template(messages, tokenize=False)
        return rendered

    def _read(self, answer: Tensor) -> Said:
        text = self._tokenizer.decode(answer, skip_special_tokens=True)
        severity, refusal = _SEVERITY.search(text), _REFUSAL.search(text)
        return Said(
            severity=severity[1] if severity else None,
            categories=tuple(dict.fromkeys(_CATEGORY.findall(text))),
            refusal=refusal[1] == "Yes" if refusal else None,
            tokens=int((answer != self._tokenizer.pad_token_id).sum()),
        )


def write_checkpoint(
    folder: Path, answers: Sequence[tuple[Conversation, str]], *, files: Path, shape: str, seed: int = 0
) -> None:
    """Write a checkpoint of random weights in the released layout that gives these answers to these conversations.

    Args:
        folder: is made.
        answers: conversations, each with the whole answer.
        files: holds ``tokenizer.json`` and ``gen-0.6b/chat_template.jinja``.
        shape: a name of `SHAPES`.
        seed: of the weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = PromptTokenizer.load(files / "tokenizer.json")
    end = tokenizer.control["<|im_end|>"]
    model = _random_model(shape, end=end, pad=tokenizer.control["<|endoftext|>"], seed=seed)
    states, tokens = _states(model, tokenizer, answers, end)
    _fit(model.lm_head.weight, states, tokens)
    model.save_pretrained(folder)
    shutil.copyfile(files / "tokenizer.json", folder / "tokenizer.json")
    template = (files / "gen-0.6b" / "chat_template.jinja").read_text(encoding="utf-8")
    config = {
        "tokenizer_class": "Qwen2Tokenizer" if transformers.__version__ < "5" else "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def _random_model(shape: str, *, end: int, pad: int, seed: int) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        **SHAPES[shape],
        max_position_embeddings=32768,
        rope_theta=1e6,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=pad,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = Qwen3ForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    model.generation_config.eos_token_id = [end, pad]
    return model


def _states(
    model: Qwen3ForCausalLM, tokenizer: PromptTokenizer, answers: Sequence[tuple[Conversation, str]], end: int
) -> tuple[Tensor, list[int]]:
    """The hidden states ``[places, hidden_size]`` at which an answer's tokens are to be said, and these tokens."""
    states, tokens = [], []
    for conversation, answer in answers:
        prompt = tokenizer.ids(OFFICIAL[conversation.target].prompt(conversation))
        said = [*tokenizer.part(answer), end]
        with torch.inference_mode():
            hidden = model.model(input_ids=torch.tensor([prompt + said[:-1]]), use_cache=False).last_hidden_state
        states.append(hidden[0, len(prompt) - 1 :].float().clone())
        tokens += said
    return torch.cat(states), tokens


def _fit(weight: Tensor, states: Tensor, tokens: Sequence[int]) -> None:
    """Give the rows of these tokens the values that say each at its place; the others stay random and are small."""
    named = sorted(set(tokens))
    wanted = torch.zeros(len(tokens), len(named))
    wanted[torch.arange(len(tokens)), torch.tensor([named.index(token) for token in tokens])] = _LOGIT
    gram = states @ states.T
    gram += _RIDGE * gram.diagonal().mean() * torch.eye(len(tokens))
    weight.mul_(0.02)
    weight[torch.tensor(named)] = (torch.linalg.solve(gram, wanted).T @ states).to(weight.dtype)


def agrees(said: Said, verdict: Verdict | BaseException) -> bool:
    """Whether a verdict is what the model card's way found; a safe verdict of ours names no category."""
    if isinstance(verdict, BaseException):
        return False
    named = () if said.severity == "Safe" else said.categories
    return (said.severity, set(named), said.refusal) == (
        verdict.severity.label,
        set(verdict.categories),
        verdict.refusal,
    )
