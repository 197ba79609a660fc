"""Text to token ids, also for text that arrives in pieces.

Three steps, each a function of what came before and never of what follows, so that a stream can be tokenized as it
arrives and its tokens equal those of the whole text:

1. *folding*: characters are brought to a plain form (compatibility forms, case, accents, invisible characters, runs of
   spaces and of one repeated letter), each remembering the character it came from;
2. *pieces*: the tokenizer's split pattern cuts the folded text into words, digits and runs of signs, of bounded length;
3. *byte-level BPE* inside each piece.

A piece is final once text has arrived behind it; only then are its tokens given out. The pieces of our own pattern have
at most 20 characters, which bounds what is held. Control tokens (who speaks, end of turn) have ids that no text can
produce: content is data.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

__all__ = ["CONTROL_TOKENS", "MAX_PIECE", "SPLIT_PATTERN", "Folder", "IncrementalTokens", "TextTokenizer", "Token"]

CONTROL_TOKENS = (
    "<|pad|>",
    "<|end|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|tool|>",
    "<|think|>",
    "<|more|>",
)
"""Ids 0 to 7. ``<|end|>`` closes a turn, ``<|more|>`` stands where earlier text was left out."""

MAX_PIECE = 20
SPLIT_PATTERN = (
    r"\p{Han}{1,8}"
    r"|[\p{Hiragana}\p{Katakana}ー]{1,8}"
    r"| ?[\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]{1,12}"
    r"| ?[\p{L}\p{M}&&[^\p{Han}\p{Hiragana}\p{Katakana}ー\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]]{1,20}"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{M}\p{N}]{1,4}"
    r"|\s"
    r"|."
)
"""How folded text is cut (Oniguruma syntax). Every alternative is a bounded run of one class of characters."""

_ASCII_PIECES = re.compile(r" ?[A-Za-z]{1,20}|[0-9]{1,3}| ?[^\sA-Za-z0-9]{1,4}|\s", re.ASCII)
"""The same for text that is all ASCII. A word of a stream comes when the caches hold something else, and then the
large tables of the other way take several times as long as this."""
_MAX_REPEATS = 3
_SPACE = " "


class Token(NamedTuple):
    """A token id and the number of characters of the original text that are covered up to its end."""

    id: int
    end: int


def _fold_character(character: str) -> str:
    """The plain form of one character: "" when it is invisible, " " or newline for any kind of space."""
    if character in "\n\r\u2028\u2029\u0085":
        return "\n"
    kind = unicodedata.category(character)
    if character.isspace() or kind == "Zs":
        return _SPACE
    if kind in ("Cf", "Cc") or 0xFE00 <= ord(character) <= 0xFE0F or 0xE0100 <= ord(character) <= 0xE01EF:
        return ""
    if kind == "Cs":
        return "\ufffd"
    plain = unicodedata.normalize("NFKD", character)
    plain = "".join(c for c in plain if not 0x0300 <= ord(c) <= 0x036F)
    return unicodedata.normalize("NFC", plain).lower()


class _FoldTable(dict[str, str]):
    def __missing__(self, character: str) -> str:
        plain = _fold_character(character)
        if len(self) < 200_000:
            self[character] = plain
        return plain


_FOLD = _FoldTable()
_PLAIN_RUN = re.compile(r"[\t-\r\x1c-\x1f -~]{24,}")
"""ASCII without the characters that folding leaves out, long enough to be worth a way of its own."""
_ASCII = {code: _fold_character(chr(code)) for code in range(128)}
_LONG_RUN = re.compile(r"[ \n]{2,}|([^ \n0-9])\1{3,}")
"""What folding shortens: to one character of white space, or to three of anything else but digits."""
_TWO_LETTERS = re.compile(r"([a-z])(?!\1)([a-z])", re.ASCII | re.IGNORECASE)
"""Behind them it is known what folding remembers, whatever stood before."""
_WHITE_SPACE = re.compile(r"\s")


class Folder:
    """Folds text that arrives in pieces; what it gives depends only on the text so far.

    A space is put before the first character, so that a first word is tokenized like any other; runs of white space
    become one, and more than three of the same letter or sign become three.
    """

    def __init__(self) -> None:
        self._last = ""
        self._repeats = 0
        self.consumed = 0

    def fold(self, text: str) -> tuple[str, list[int]]:
        """Fold the next piece of text.

        Returns:
            The folded characters, and for each the number of characters of the whole text that are complete with it.
        """
        folded: list[str] = []
        ends: list[int] = []
        done = 0
        for plain in _PLAIN_RUN.finditer(text):
            self._fold_any(text[done : plain.start()], folded, ends)
            self._fold_ascii(plain.group(), folded, ends)
            done = plain.end()
        self._fold_any(text[done:] if done else text, folded, ends)
        return "".join(folded), ends

    def _fold_any(self, text: str, folded: list[str], ends: list[int]) -> None:
        """Fold any text, character by character."""
        for character, end in _characters(text, self.consumed):
            expansion = _FOLD[character]
            for position, plain in enumerate(expansion, start=1):
                covered = end if position == len(expansion) else end - 1
                if not self._last:
                    if plain in " \n":
                        continue
                    folded.append(_SPACE)
                    ends.append(end - 1)
                elif self._dropped(plain):
                    continue
                self._repeats = self._repeats + 1 if plain == self._last else 1
                self._last = plain
                folded.append(plain)
                ends.append(covered)
        self.consumed += len(text)

    def _fold_ascii(self, text: str, folded: list[str], ends: list[int]) -> None:
        """The same, in runs, for text of `_PLAIN_RUN`: each of its characters becomes one, none is invisible."""
        base, plain = self.consumed, text.translate(_ASCII)
        self.consumed += len(text)
        at = len(plain) - len(plain.lstrip(" \n")) if self._last in " \n" else 0
        if at == len(plain):
            return
        if not self._last:
            folded.append(_SPACE)
            ends.append(base + at)
        elif plain[at] == self._last:
            at = len(plain) - len(plain.lstrip(self._last))
            kept = at if self._last.isdigit() else min(at, max(0, _MAX_REPEATS - self._repeats))
            folded.append(plain[:kept])
            ends.extend(range(base + 1, base + kept + 1))
            self._repeats += kept
            if at == len(plain):
                return
        parts: list[str] = []
        for run in _LONG_RUN.finditer(plain, at):
            stop = run.start() + (1 if run[0][0] in " \n" else _MAX_REPEATS)
            parts.append(plain[at:stop])
            ends.extend(range(base + at + 1, base + stop + 1))
            at = run.end()
        parts.append(plain[at:])
        ends.extend(range(base + at + 1, base + len(plain) + 1))
        rest = "".join(parts)
        self._last = rest[-1]
        self._repeats = len(rest) - len(rest.rstrip(self._last))
        folded.append(rest)

    def resume_after(self, character: str, consumed: int) -> None:
        """Begin in the middle of a text, behind one letter that stands there once.

        Args:
            character: the letter as it was folded.
            consumed: how many characters of the text are behind.
        """
        self._last, self._repeats, self.consumed = character, 1, consumed

    def _dropped(self, plain: str) -> bool:
        if plain in " \n":
            return self._last in " \n"
        return plain == self._last and self._repeats >= _MAX_REPEATS and not plain.isdigit()


class TextTokenizer:
    """A byte-level BPE over folded text, whose ids 0 to 7 are control tokens that text cannot produce.

    Args:
        tokenizer: a ``tokenizers.Tokenizer`` without normalizer and without added tokens.

    Raises:
        ValueError: when the tokenizer has added tokens, which text could then spell.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        definition = json.loads(tokenizer.to_str())
        if definition.get("added_tokens"):
            raise ValueError("the tokenizer has added tokens: text could spell control tokens")
        self._tokenizer = tokenizer
        self._pieces = tokenizer.pre_tokenizer
        self._cuts_at_spaces = _is_ours(definition)
        self.vocab_size: int = tokenizer.get_vocab_size()
        ids = {name: tokenizer.token_to_id(name) for name in CONTROL_TOKENS}
        self.control: dict[str, int] = {name: token_id for name, token_id in ids.items() if token_id is not None}

    @classmethod
    def load(cls, path: Path) -> TextTokenizer:
        """Read a ``tokenizer.json``. Raises OSError when it cannot be read, ValueError when it is not one of ours."""
        return cls(Tokenizer.from_str(path.read_text(encoding="utf-8")))

    def token_bytes(self) -> list[bytes]:
        """For each id the bytes of folded text that it stands for; b"" for control tokens."""
        letters = _byte_letters()
        result = [b""] * self.vocab_size
        for token, token_id in self._tokenizer.get_vocab().items():
            if token not in self.control:
                result[token_id] = bytes(letters[letter] for letter in token)
        return result

    def encode(self, text: str) -> list[Token]:
        """The tokens of a whole text."""
        stream = self.incremental()
        return [*stream.feed(text), *stream.finish()]

    def encode_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of many whole texts at once; the same as ``encode`` gives."""
        folded = [Folder().fold(text)[0] for text in texts]
        return [encoding.ids for encoding in self._tokenizer.encode_batch(folded, add_special_tokens=False)]

    def incremental(self) -> IncrementalTokens:
        """A tokenizer of one text that arrives in pieces."""
        return IncrementalTokens(self)

    def last_ids(self, text: str, start: int, count: int) -> list[int] | None:
        """The last ``count`` ids of the whole text, found from about ``start`` characters on.

        None when they cannot be told from there, or when there is not one token more than that behind ``start``.
        """
        if not self._cuts_at_spaces:
            return None
        letters = _TWO_LETTERS.search(text, start)
        if letters is None:
            return None
        begin = letters.end()
        folder = Folder()
        folder.resume_after(letters[2].lower(), begin)
        folded = folder.fold(text[begin:])[0]
        space = _WHITE_SPACE.search(folded)
        if space is None:
            return None
        ids: list[int] = self._tokenizer.encode(folded[space.start() :], add_special_tokens=False).ids
        return ids[-count:] if len(ids) > count else None

    def boundary(self, folded: str) -> int:
        """Up to which index the pieces of this folded text are final, when more text may follow."""
        if self._cuts_at_spaces and folded.isascii():
            piece = None
            for piece in _ASCII_PIECES.finditer(folded):  # noqa: B007 - the last one counts
                pass
            return piece.start() if piece is not None else 0
        pieces = self._pieces.pre_tokenize_str(folded)
        return int(pieces[-1][1][0]) if pieces else 0

    def tokens(self, folded: str, ends: Sequence[int], covered: int) -> list[Token]:
        """Tokens of folded text that begins at a piece.

        Args:
            folded: the text.
            ends: as ``Folder.fold`` gives them.
            covered: how many characters of the original text are covered by the tokens before.
        """
        encoding = self._tokenizer.encode(folded, add_special_tokens=False)
        offsets = encoding.offsets
        tokens = []
        for index, (token_id, (_, stop)) in enumerate(zip(encoding.ids, offsets, strict=True)):
            shared = index + 1 < len(offsets) and offsets[index + 1][0] < stop
            if not shared:
                covered = ends[stop - 1]
            elif stop > 1:
                covered = max(covered, ends[stop - 2])
            tokens.append(Token(token_id, covered))
        return tokens


class IncrementalTokens:
    """The tokens of one text that arrives in pieces, given out as soon as no further text can change them.

    A surrogate half at the end of a piece is held until its other half arrives; a half that stays alone counts as one
    unknown character.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._folder = Folder()
        self._folded = ""
        self._ends: list[int] = []
        self._surrogate = ""
        self._covered = 0

    @property
    def characters(self) -> int:
        """How many characters have been fed."""
        return self._folder.consumed + len(self._surrogate)

    def feed(self, text: str) -> list[Token]:
        """Take more text; return the tokens that became final."""
        text = self._surrogate + text
        self._surrogate = ""
        if text and _is_high_surrogate(text[-1]):
            text, self._surrogate = text[:-1], text[-1]
        self._fold(text)
        return self._take(self._tokenizer.boundary(self._folded))

    def finish(self) -> list[Token]:
        """The text is complete: return the tokens that remain; the last one covers the text to its end."""
        self._fold(self._surrogate)
        self._surrogate = ""
        tokens = self._take(len(self._folded))
        if tokens:
            tokens[-1] = Token(tokens[-1].id, self._folder.consumed)
        return tokens

    def peek(self) -> list[Token]:
        """The tokens of what is held, as they are if no more text comes; changes nothing."""
        return self._tokenizer.tokens(self._folded, self._ends, self._covered) if self._folded else []

    def _fold(self, text: str) -> None:
        if text:
            folded, ends = self._folder.fold(text)
            self._folded += folded
            self._ends += ends

    def _take(self, cut: int) -> list[Token]:
        if not cut:
            return []
        tokens = self._tokenizer.tokens(self._folded[:cut], self._ends[:cut], self._covered)
        self._folded, self._ends = self._folded[cut:], self._ends[cut:]
        self._covered = tokens[-1].end
        return tokens


def _is_ours(definition: Mapping[str, Any]) -> bool:
    """Whether text is cut by our own pattern, in which white space always begins a piece."""
    match definition.get("pre_tokenizer"):
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            return bool(pattern == SPLIT_PATTERN)
    return False


def _byte_letters() -> dict[str, int]:
    """The byte of each letter of byte-level BPE: printable Latin-1 stands for itself, the others follow from U+0100."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


def _is_high_surrogate(character: str) -> bool:
    return "\ud800" <= character <= "\udbff"


def _characters(text: str, consumed: int) -> Iterator[tuple[str, int]]:
    """Each character and the number of characters up to its end; a surrogate pair counts as the one it stands for."""
    index = 0
    while index < len(text):
        character = text[index]
        index += 1
        if _is_high_surrogate(character) and index < len(text) and "\udc00" <= text[index] <= "\udfff":
            character = (character + text[index]).encode("utf-16", "surrogatepass").decode("utf-16")
            index += 1
        yield character, consumed + index
