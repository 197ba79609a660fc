"""Prompts to token ids and answers back to text, with the tokenizer of a Gen checkpoint. Knows no torch.

Template text between control tokens and the content in it are tokenized as one text, so that the ids are those of the
official way wherever the content spells no control token. What does spell one becomes ordinary tokens: content is data.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer

from tidegate.prompts import CONTROL, Prompt

__all__ = ["PromptTokenizer"]

_AT_CONTROL = re.compile("(" + "|".join(map(re.escape, CONTROL)) + ")")


class PromptTokenizer:
    """The tokenizer of a Gen checkpoint.

    Args:
        definition: the text of a ``tokenizer.json`` that has the control tokens among its added tokens.

    Raises:
        ValueError: when it is not one, or lacks a control token; says which.
    """

    def __init__(self, definition: str) -> None:
        parsed = json.loads(definition)
        added = parsed.get("added_tokens") or []
        self.control: dict[str, int] = {token["content"]: token["id"] for token in added}
        if lacking := [name for name in CONTROL if name not in self.control]:
            raise ValueError(f"the tokenizer lacks the control tokens {', '.join(lacking)}")
        parsed["added_tokens"] = []
        parsed["post_processor"] = None
        self._plain = Tokenizer.from_str(json.dumps(parsed))
        self._text_ids = frozenset(self._plain.get_vocab().values()) - frozenset(self.control.values())
        self.part = lru_cache(maxsize=4096)(self._part)

    @classmethod
    def load(cls, path: Path) -> PromptTokenizer:
        """Read a ``tokenizer.json``. Raises OSError when it cannot be read, ValueError when it is not one of these."""
        return cls(path.read_text(encoding="utf-8"))

    def ids(self, prompt: Prompt) -> list[int]:
        """The ids of a prompt."""
        ids: list[int] = []
        for text, is_control in _runs(prompt):
            ids += [self.control[text]] if is_control else self._encode(text)
        return ids

    def text(self, ids: Sequence[int]) -> str:
        """What ids of an answer stand for; a character that is not complete is U+FFFD."""
        decoded: str = self._plain.decode(list(ids), skip_special_tokens=False)
        return decoded

    def is_text(self, token: int) -> bool:
        """Whether an id stands for text, and not for a control token or nothing."""
        return token in self._text_ids

    def _part(self, text: str) -> tuple[int, ...]:
        """The ids of a part of an answer."""
        return tuple(self._encode(text))

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._plain.encode(_without_lone_surrogates(text), add_special_tokens=False).ids
        return ids


def _runs(prompt: Prompt) -> Iterator[tuple[str, bool]]:
    """Texts to tokenize as one, and control tokens between them."""
    run: list[str] = []
    for text, is_control in _pieces(prompt):
        if not is_control:
            run.append(text)
            continue
        if run:
            yield "".join(run), False
            run = []
        yield text, True
    if run:
        yield "".join(run), False


def _pieces(prompt: Prompt) -> Iterable[tuple[str, bool]]:
    for segment in prompt.segments:
        if segment.is_content:
            yield segment.text, False
        else:
            yield from ((text, text in CONTROL) for text in _AT_CONTROL.split(segment.text) if text)


def _without_lone_surrogates(text: str) -> str:
    """Surrogate pairs as the characters they stand for, lone ones as U+FFFD: a tokenizer takes neither."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
