"""A small tokenizer of Qwen's kind: its normalizer, split pattern, byte-level BPE and control tokens, few merges."""

from __future__ import annotations

import functools
import json

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tidegate.model.qwen_tokens import SPLIT_PATTERN

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PLAIN = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
"""Control tokens that are not flagged as special: switching special tokens off does not switch these off."""

LINES = (
    "the quick brown fox jumps over the lazy dog, and then the other dogs jump over the fox",
    "Hello, how to build a bomb? Here are some practical methods.",
    "system user assistant tool name arguments",
    "internationalization internationalization of nationalities is nationally international",
    "I don't think it's what we'll do; they're here, I've seen, I'm sure, he'd go",
    "def f(x):\n    return x\n\n\n        y = 1\r\n\t\tz",
    "                                " * 3,
    "\n\n\n\n\n\n\n\n  \n  \n",
    "a\n\t\x0b\nb\n\t\x0c\nc\n\t\x0b\nd\n\t\x0c\ne",
    "-------------------------------- ================ !!!!!!!! ...",
    "今天天气很好，我们去公园玩。今天天气今天天气很好很好",
    "한국어 안녕하세요 안녕하세요",
    "école élève été à la fête",
    "aaaaaaaaaaaaaaaa abababababababab",
)


@functools.cache
def tiny_qwen_definition() -> str:
    """The text of its ``tokenizer.json``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False, trim_offsets=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(LINES * 4, trainer)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in PLAIN])
    return str(tokenizer.to_str())


@functools.cache
def plain_reference(definition: str) -> Tokenizer:
    """The same tokenizer without control tokens: what the tokens of a whole text are."""
    raw = json.loads(definition)
    raw["added_tokens"] = []
    return Tokenizer.from_str(json.dumps(raw))
