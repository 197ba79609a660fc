"""A tiny Gen guard that really follows its forms: Qwen3 shape, a small BPE, trained in seconds on toy rows.

A row is a question about words, some of which stand for a category. Two such words give two categories, "maybe" makes
a row controversial, and an answer that begins with "no thanks" is a refusal.
"""

from __future__ import annotations

import atexit
import functools
import json
import random
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen3Config, Qwen3ForCausalLM

from tidegate.model.prompt_tokens import PromptTokenizer
from tidegate.prompts import CONTROL, OFFICIAL, Form, reason_form
from tidegate.types import Conversation, Role, Target, Turn

WORDS = {
    "knife": "Violent",
    "forgery": "Non-violent Illegal Acts",
    "passport": "PII",
    "insult": "Unethical Acts",
    "election": "Politically Sensitive Topics",
}
PLAIN = ("bread", "tea", "gardens", "maps", "birds", "songs", "rivers", "chess")
FORMS = tuple(
    replace(form, opening=f"<|im_start|>user\n{name}:\n\n", closing="<|im_end|>\n<|im_start|>assistant\n\n")
    for name, form in {**OFFICIAL, "reason": reason_form(Target.PROMPT)}.items()
)
"""The official forms and a reason form, but for the policy text: short prompts are learnt sooner."""
ABOUT_PROMPT, ABOUT_RESPONSE, REASONED = FORMS
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen's tokenizer cuts text."""
_STEPS = 480
_BATCH = 24


class ToyRow(NamedTuple):
    """A conversation and the answer that a Gen guard should give."""

    form: Form
    conversation: Conversation
    answer: str


def toy_row(rng: random.Random, form: Form) -> ToyRow:
    """A row of a form, with its answer."""
    flagged = rng.sample(sorted(WORDS), rng.choice([0, 1, 1, 2]))
    words = [*rng.sample(PLAIN, 2), *flagged]
    rng.shuffle(words)
    asked, maybe, refuses = " and ".join(words), rng.random() < 0.4, rng.random() < 0.5
    severity = "Safe" if not flagged else "Controversial" if maybe else "Unsafe"
    named = ", ".join(WORDS[word] for word in words if word in flagged) or "None"
    text = f"{'maybe ' if maybe else ''}tell me of {asked}"
    turns = [Turn(Role.USER, text)]
    if form.target is Target.RESPONSE:
        said = f"{'no thanks' if refuses else 'of course'} {'maybe ' if maybe else ''}{asked}"
        turns = [Turn(Role.USER, "tell me more"), Turn(Role.ASSISTANT, said)]
        answer = f"Safety: {severity}\nCategories: {named}\nRefusal: {'Yes' if refuses else 'No'}"
    elif form is REASONED:
        answer = f"Severity: {severity}\nReason: it speaks of {words[-1]}\nCategory: {named}"
    else:
        answer = f"Safety: {severity}\nCategories: {named}"
    return ToyRow(form, Conversation(tuple(turns)), answer)


def toy_rows(seed: int, count: int, forms: Sequence[Form] = FORMS) -> list[ToyRow]:
    """Rows of all forms in turn."""
    rng = random.Random(seed)
    return [toy_row(rng, forms[place % len(forms)]) for place in range(count)]


@functools.cache
def gen_folder() -> Path:
    """A folder with the trained guard; the same one for the whole run of the tests."""
    folder = Path(tempfile.mkdtemp(prefix="tidegate-gen-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    write_gen_folder(folder, trained=True)
    return folder


def write_gen_folder(
    folder: Path,
    *,
    trained: bool,
    forms: Sequence[Form] = FORMS,
    template: str = "",
    steps: int = _STEPS,
    batch: int = _BATCH,
    **sizes: int,
) -> None:
    """Write config, weights, tokenizer and chat template; with random weights unless ``trained``.

    Args:
        sizes: fields of the config that differ from those of `tiny_config`.
    """
    tokenizer = tiny_tokenizer(forms)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"chat_template": template, "eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    torch.manual_seed(5)
    end = tokenizer.token_to_id("<|im_end|>")
    model = Qwen3ForCausalLM(tiny_config(vocab_size=tokenizer.get_vocab_size(), eos_token_id=end, **sizes))
    if trained:
        _train(model, PromptTokenizer.load(folder / "tokenizer.json"), forms, steps, batch)
    model.save_pretrained(folder)


def tiny_config(*, vocab_size: int, eos_token_id: int, **sizes: int) -> Qwen3Config:
    """A config of Qwen3 shape, as small as it can be but for these sizes."""
    return Qwen3Config(
        vocab_size=vocab_size,
        **{
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "intermediate_size": 128,
            "max_position_embeddings": 4096,
            **sizes,
        },
        tie_word_embeddings=True,
        bos_token_id=None,
        pad_token_id=None,
        eos_token_id=eos_token_id,
    )


def tiny_tokenizer(forms: Sequence[Form] = FORMS) -> Tokenizer:
    """A byte-level BPE trained on toy rows of these forms, with the control tokens of Qwen3."""
    texts = [row.form.prompt(row.conversation).text + row.answer for row in toy_rows(1, 60, forms)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", *CONTROL[:2]])
    tokenizer.add_tokens(list(CONTROL[2:]))
    return tokenizer


def _train(model: Qwen3ForCausalLM, tokenizer: PromptTokenizer, forms: Sequence[Form], steps: int, batch: int) -> None:
    rng = random.Random(2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    model.train()
    for _ in range(steps):
        loss = answer_loss(model, tokenizer, [toy_row(rng, rng.choice(forms)) for _ in range(batch)])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


def answer_loss(model: Qwen3ForCausalLM, tokenizer: PromptTokenizer, rows: Sequence[ToyRow]) -> torch.Tensor:
    """How unlikely the answers of rows are, as a scalar; nothing is learnt of their prompts."""
    end = tokenizer.control["<|im_end|>"]
    prompts = [tokenizer.ids(row.form.prompt(row.conversation)) for row in rows]
    answers = [[*tokenizer.part(row.answer), end] for row in rows]
    texts = [prompt + answer[:-1] for prompt, answer in zip(prompts, answers, strict=True)]
    width = max(map(len, texts))
    ids = torch.tensor([text + [end] * (width - len(text)) for text in texts])
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    ends = zip(prompts, texts, strict=True)
    asked = torch.cat([hidden[row, len(prompt) - 1 : len(text)] for row, (prompt, text) in enumerate(ends)])
    return torch.nn.functional.cross_entropy(
        model.lm_head(asked), torch.tensor([token for answer in answers for token in answer])
    )
