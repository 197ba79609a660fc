"""Text to Qwen3 ids, also for text that arrives in pieces, exactly as if it had come at once.

Three steps, as the tokenizer of the checkpoint says: canonical composition (NFC), Qwen's split pattern, byte-level BPE.
None of them is bounded: a mark may still join the letter before it, a word may still grow. What no further text can
change is final; what remains is told as it is if the text ends here, and taken back when it turns out otherwise.

*What is final.* The last letter and its marks are not (Unicode Standard Annex 15: text may be composed apart at a
character that never joins the one before). Of the pieces that the pattern cuts, the last one is not, nor are those of
white space before it, when it is white space too; the pattern looks at nothing else behind a piece. In a long piece,
tokens are final before it ends. No merge ever crosses a boundary that remains, so the two sides of each are encoded
apart; and ids whose neighbours are all encoded so when alone are the encoding of their text. A boundary lies among the
last n bytes, n being the length of the longest token: so the first ids that the encodings up to each of the last n
bytes have in common are common to all that can follow, and it is enough to compare the ends of these encodings.

*The bound.* At most one letter with its marks, and less than two thousand bytes of a piece, are held. Marks without
end, white space without end behind a line break, and characters whose tokens never end with them are held longer; they
are then looked at again each time they have grown by an eighth, so that the work stays in proportion to the text. The
final ids are exact in every case.

Content is data: control tokens have ids that no text can produce, however it spells them.
"""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from tokenizers import Tokenizer

from tidegate.errors import GuardUnavailable
from tidegate.model.tokens import Token, _byte_letters, _characters, _is_high_surrogate

__all__ = ["Frame", "IncrementalQwenTokens", "QwenTokenizer", "Update", "well_formed"]

SPLIT_PATTERN: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen2 and Qwen3 cut text: what is final is known for this pattern."""

_HELD: Final = 1_024
"""From so many bytes on, final tokens are looked for inside a piece."""
_NEAR: Final = 3
"""They are looked for in so many times the length of the longest token, from the end."""
_AGAIN: Final = 8
"""What is held long is looked at again when it has grown by this part of itself."""
_LONG: Final = 1_024
"""So many characters may be held before they are told of only now and then."""
_WHITE: Final = re.compile(r"[^\S\x1c-\x1f]+")
"""White space as the split pattern has it."""
_LETTERS: Final = "a"
_SIGNS: Final = "!!"
"""What a piece is continued behind, when its beginning is gone: the pattern goes on in the same way."""


@dataclass(frozen=True, slots=True)
class Frame:
    """How a template sets a text between two control tokens.

    Attributes:
        before: stands before the text and is tokenized with it, as ``user`` and a line break.
        after: stands behind it.
        strips_start: line breaks at the start of the text are left out.
        strips_end: line breaks at its end are left out.
    """

    before: str = ""
    after: str = ""
    strips_start: bool = False
    strips_end: bool = False


class Update(NamedTuple):
    """What a piece of text changed in the tokens told so far.

    Attributes:
        back: how many tokens, from the last, are taken back; they were never final.
        tokens: those that follow the ones that stay. The end of each counts characters of the text.
        final: how many of all tokens, from the first, no further text can change.
    """

    back: int
    tokens: list[Token]
    final: int


class QwenTokenizer:
    """The tokenizer of a Qwen3 checkpoint, for content: no text gives a control token.

    Args:
        definition: the text of its ``tokenizer.json``.

    Raises:
        GuardUnavailable: when it is not a tokenizer of this kind; says in what.
    """

    def __init__(self, definition: str) -> None:
        try:
            whole = Tokenizer.from_str(definition)
        except Exception as error:  # the tokenizers library raises plain Exceptions
            raise GuardUnavailable(f"not a tokenizer: {error}") from error
        raw = json.loads(definition)
        _check(raw)
        self.control: Mapping[str, int] = {token["content"]: token["id"] for token in raw["added_tokens"]}
        self._content = Tokenizer(whole.model)
        self._content.pre_tokenizer = whole.pre_tokenizer
        self._normalizer = whole.normalizer
        self._bytes: dict[int, int] = {}
        self._longest = self._longest_word = 2
        letters = self._letters = _byte_letters()
        for token, token_id in whole.get_vocab(with_added_tokens=False).items():
            self._bytes[token_id] = len(token)
            self._longest = max(self._longest, len(token))
            if _is_wordy(chr(letters[token[-1]])):
                self._longest_word = max(self._longest_word, len(token))
        if spelled := [name for name, token_id in self.control.items() if token_id in self._bytes]:
            raise GuardUnavailable(f"text could spell the control tokens {', '.join(spelled)}")

    @classmethod
    def load(cls, path: Path) -> QwenTokenizer:
        """Read a ``tokenizer.json``. Raises GuardUnavailable when it cannot be read or is of another kind."""
        try:
            return cls(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise GuardUnavailable(f"{path} cannot be read") from error

    def encode(self, text: str, frame: Frame = Frame()) -> list[Token]:
        """The tokens of a whole text and of what the frame puts around it."""
        stream = self.incremental(frame, speculate=False)
        return [*stream.feed(text).tokens, *stream.finish().tokens]

    def incremental(self, frame: Frame = Frame(), *, speculate: bool = True) -> IncrementalQwenTokens:
        """A tokenizer of one text that arrives in pieces; without ``speculate`` it tells final tokens only."""
        return IncrementalQwenTokens(self, frame, speculate=speculate)

    def lead(self, frame: Frame) -> int:
        """How many bytes tokens hold of what the frame puts before a text: those of its canonical form."""
        return len(self.normalized(frame.before).encode())

    def leading(self, tokens: list[Token], frame: Frame) -> int:
        """How many of the first tokens hold nothing of the text, but only of what the frame puts before it."""
        left = self.lead(frame)
        for count, token in enumerate(tokens):
            left -= self._bytes[token.id]
            if left < 0:
                return count
        return len(tokens)

    def width(self, token_id: int) -> int:
        """How many bytes a token holds."""
        return self._bytes[token_id]

    def content(self, token_id: int) -> bytes | None:
        """The bytes of a token, which may be a part of a character; None for what no text can give."""
        token = self._content.id_to_token(token_id) if token_id in self._bytes else None
        return None if token is None else bytes(self._letters[letter] for letter in token)

    def longest(self, text: str | None = None) -> int:
        """How many bytes the longest token has, of those that can end in this text; None for any."""
        return self._longest_word if text is not None and all(map(_is_wordy, text)) else self._longest

    def normalized(self, text: str) -> str:
        """Text in canonical form."""
        return str(self._normalizer.normalize_str(text))

    def pieces(self, text: str) -> list[tuple[str, tuple[int, int]]]:
        """The pieces of text: each in the letters that stand for bytes, and where it is, in characters."""
        pieces: list[tuple[str, tuple[int, int]]] = self._content.pre_tokenizer.pre_tokenize_str(text)
        return pieces

    def ids(self, text: str) -> list[int]:
        """The ids of text that begins at a piece."""
        ids: list[int] = self._content.encode(text, add_special_tokens=False).ids
        return ids

    def piece_ids(self, letters: str) -> list[int]:
        """The ids of one piece, or of a part of one that begins at a token, given in letters that stand for bytes."""
        return [token.id for token in self._content.model.tokenize(letters)] if letters else []

    def first(self, ids: list[int], text: str) -> list[int]:
        """Those of the first ids that hold this text, which ends where one of them ends."""
        left = len(text.encode())
        for count, token_id in enumerate(ids):
            if left <= 0:
                return ids[:count]
            left -= self._bytes[token_id]
        return ids

    def tokens(self, ids: list[int], text: str, ends: list[int], covered: int) -> list[Token]:
        """Ids with the characters they cover: ``ends`` says so for each character, ``covered`` before them all."""
        tokens, at, reached, done = [], 0, 0, 0
        for token_id in ids:
            done += self._bytes[token_id]
            while at < len(text) and reached + _width(text[at]) <= done:
                reached += _width(text[at])
                covered = ends[at]
                at += 1
            tokens.append(Token(token_id, covered))
        return tokens


class IncrementalQwenTokens:
    """The tokens of one text that arrives in pieces; made by `QwenTokenizer.incremental`.

    After any ``feed`` the tokens told so far are those of the text so far, except while very much is held (see the
    module), and after ``finish`` they are exactly those of the whole text. A surrogate half is held until its other
    half arrives; one that stays alone counts as one unknown character.
    """

    def __init__(self, tokenizer: QwenTokenizer, frame: Frame, *, speculate: bool) -> None:
        self._tokenizer = tokenizer
        self._frame = frame
        self._speculate = speculate
        self._started = not frame.strips_start
        self._breaks = ""
        self._surrogate = ""
        self.characters = 0
        """How many characters have been fed."""
        self._raw, self._raw_ends = frame.before, [0] * len(frame.before)
        self._text, self._ends = "", list[int]()
        self._context = ""
        self._covered = 0
        self._final = 0
        self._guess: list[Token] = []
        self._inside_from = _HELD
        self._tell_from = 0

    def feed(self, text: str) -> Update:
        """Take more text."""
        text = self._surrogate + text
        self._surrogate = ""
        if text and _is_high_surrogate(text[-1]):
            text, self._surrogate = text[:-1], text[-1]
        before = len(self._raw)
        self._take(text)
        self._compose(_joint(self._raw, before))
        final = self._commit()
        return self._tell(final, self._tail())

    def finish(self) -> Update:
        """The text is complete: all tokens are final; the last one covers the text to its end."""
        self._take(self._surrogate)
        self._raw += self._frame.after
        self._raw_ends += [self.characters] * len(self._frame.after)
        self._compose(len(self._raw))
        tokens = self._as_it_ends(self._text, self._ends)
        if tokens:
            tokens[-1] = Token(tokens[-1].id, self.characters)
        self._text, self._ends, self._context = "", [], ""
        return self._tell(tokens, [])

    def _take(self, text: str) -> None:
        """Add text behind what is not composed yet."""
        joined, ends = _joined(text, self.characters)
        self.characters += len(text)
        if not self._started:
            kept = joined.lstrip("\n")
            ends = ends[len(joined) - len(kept) :]
            joined, self._started = kept, bool(kept)
        if self._frame.strips_end:
            joined, ends = self._without_breaks(joined, ends)
        self._raw += joined
        self._raw_ends += ends

    def _without_breaks(self, text: str, ends: list[int]) -> tuple[str, list[int]]:
        """Hold the line breaks at the end until something else follows them."""
        ends = [*range(self.characters - len(text) - len(self._breaks) + 1, self.characters - len(text) + 1), *ends]
        text = self._breaks + text
        kept = text.rstrip("\n")
        self._breaks = text[len(kept) :]
        return kept, ends[: len(kept)]

    def _compose(self, cut: int) -> None:
        """Bring the first characters that are not composed yet into canonical form."""
        if cut:
            text, ends = self._normalized(self._raw[:cut], self._raw_ends[:cut])
            self._text += text
            self._ends += ends
            self._raw, self._raw_ends = self._raw[cut:], self._raw_ends[cut:]

    def _normalized(self, text: str, ends: list[int]) -> tuple[str, list[int]]:
        whole = self._tokenizer.normalized(text)
        if whole == text:
            return text, ends
        before = self._ends[-1] if self._ends else self._covered
        parts: list[str] = []
        covered: list[int] = []
        for start, stop in _clusters(text):
            part = self._tokenizer.normalized(text[start:stop])
            same = part == text[start:stop]
            covered += ends[start:stop] if same else [before] * (len(part) - 1) + [ends[stop - 1]]
            before = ends[stop - 1]
            parts.append(part)
        return "".join(parts), covered

    def _commit(self) -> list[Token]:
        """The tokens that became final."""
        pieces = self._pieces(self._text)
        if not pieces:
            return []
        first = _unsettled(self._context + self._text, pieces)
        tokens: list[Token] = []
        if first:
            settled = pieces[first][1][0] - len(self._context)
            tokens = self._settle(self._encoded(self._text), settled, "")
            self._inside_from = _HELD
            letters = "".join(piece for piece, _ in pieces[first:])
        else:
            letters = "".join(piece for piece, _ in pieces)[len(self._context) :]
        sure = self._sure()
        length = len(sure.encode())
        if length < self._inside_from:
            return tokens
        tokens += self._inside(letters[:length], sure)
        left = len(self._sure().encode())
        self._inside_from = max(_HELD, left + max(_HELD // 2, left // _AGAIN))
        return tokens

    def _inside(self, letters: str, text: str) -> list[Token]:
        """The tokens of a piece that has not ended, given as far as it is sure to go, that are final already."""
        ids = self._tokenizer.piece_ids(letters)
        longest = self._tokenizer.longest(text[-self._tokenizer.longest() :])
        near = len(letters) - _NEAR * longest
        done = count = 0
        while count < len(ids) and done + self._tokenizer.width(ids[count]) <= near:
            done += self._tokenizer.width(ids[count])
            count += 1
        end = letters[done:]
        common = ids[count:]
        for stop in range(max(0, len(end) - longest + 1), len(end)):
            common = common[: _agreement(common, self._tokenizer.piece_ids(end[:stop]))]
        characters = self._whole_characters(ids[:count] + common) if common else 0
        if not characters:
            return []
        context = "" if self._is_space() else self._continuation(self._text[characters:])
        return self._settle(ids, characters, context)

    def _is_space(self) -> bool:
        """Whether what is held is white space of its own, and not line breaks behind signs."""
        return not self._context and bool(_WHITE.fullmatch(self._text))

    def _sure(self) -> str:
        """As much of what is held as lies in one piece, whatever follows."""
        text = self._text
        if self._is_space():
            return text[: max(text.rfind("\n"), text.rfind("\r")) + 1] or text[:-1]
        return text

    def _whole_characters(self, ids: list[int]) -> int:
        """How many characters the longest run of first ids covers that does not end inside one."""
        boundaries, reached = {0: 0}, 0
        for count, character in enumerate(self._text, start=1):
            reached += _width(character)
            boundaries[reached] = count
        done, best = 0, 0
        for token_id in ids:
            done += self._tokenizer.width(token_id)
            best = boundaries.get(done, best)
        return best

    def _continuation(self, rest: str) -> str:
        """What stands for the beginning of the piece that this is the rest of."""
        alone = self._tokenizer.pieces(_LETTERS + rest)
        return _LETTERS if len(alone) == 1 else _SIGNS

    def _settle(self, ids: list[int], characters: int, context: str) -> list[Token]:
        """The first characters are final, and of these ids those that hold them; what follows continues a piece behind
        ``context``."""
        text, ends = self._text[:characters], self._ends[:characters]
        tokens = self._tokenizer.tokens(self._tokenizer.first(ids, text), text, ends, self._covered)
        self._text, self._ends, self._context = self._text[characters:], self._ends[characters:], context
        self._covered = ends[-1] if ends else self._covered
        return tokens

    def _as_it_ends(self, text: str, ends: list[int]) -> list[Token]:
        """The tokens of text behind the context, if it ends there."""
        return self._tokenizer.tokens(self._encoded(text), text, ends, self._covered)

    def _encoded(self, text: str) -> list[int]:
        """The ids of text behind the context, if it ends there."""
        if not self._context:
            return self._tokenizer.ids(text)
        letters, (_, stop) = self._tokenizer.pieces(self._context + text)[0]
        skipped = len(self._context)
        return self._tokenizer.piece_ids(letters[skipped:]) + self._tokenizer.ids(text[stop - skipped :])

    def _pieces(self, text: str) -> list[tuple[str, tuple[int, int]]]:
        return self._tokenizer.pieces(self._context + text) if text else []

    def _tail(self) -> list[Token] | None:
        """The tokens of what is held, if the text ends here; None when they are not looked at this time."""
        if not self._speculate:
            return []
        held = len(self._text) + len(self._raw)
        if held > _LONG:
            if held < self._tell_from:
                return None
            self._tell_from = held + held // _AGAIN
        else:
            self._tell_from = 0
        text, ends = self._normalized(self._raw, self._raw_ends) if self._raw else ("", [])
        return self._as_it_ends(self._text + text, self._ends + ends)

    def _tell(self, final: list[Token], tail: list[Token] | None) -> Update:
        if tail is None and not final:
            return Update(0, [], self._final)
        tail = tail or []
        now = final + tail
        kept = _agreement(self._guess, now)
        update = Update(len(self._guess) - kept, now[kept:], self._final + len(final))
        self._final += len(final)
        self._guess = tail
        return update


def _is_wordy(character: str) -> bool:
    return character >= "\x80" or character.isalpha()


def _unsettled(text: str, pieces: list[tuple[str, tuple[int, int]]]) -> int:
    """The first piece that further text can change."""
    first = len(pieces) - 1
    start, stop = pieces[first][1]
    if _WHITE.fullmatch(text, start, stop):
        while first and _WHITE.fullmatch(text, *pieces[first - 1][1]):
            first -= 1
    return first


def _agreement(one: list[Any], other: list[Any]) -> int:
    """How many first values two lists share."""
    for index, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return index
    return min(len(one), len(other))


def well_formed(text: str) -> str:
    """Text in which halves of surrogate pairs are joined, and single ones replaced."""
    return _joined(text, 0)[0]


def _width(character: str) -> int:
    """Bytes of a character in UTF-8."""
    code = ord(character)
    return 1 if code < 0x80 else 2 if code < 0x800 else 3 if code < 0x10000 else 4


def _joined(text: str, consumed: int) -> tuple[str, list[int]]:
    """Text without surrogate halves, and for each of its characters how many of the fed ones are complete with it."""
    if not any("\ud800" <= character <= "\udfff" for character in text):
        return text, list(range(consumed + 1, consumed + len(text) + 1))
    characters, ends = zip(*_characters(text, consumed), strict=True)
    whole = "".join("\ufffd" if "\ud800" <= character <= "\udfff" else character for character in characters)
    return whole, list(ends)


def _joint(text: str, start: int) -> int:
    """The last place before which text is composed whatever follows; 0 when there is none from ``start`` on."""
    for place in range(len(text) - 1, max(start, 1) - 1, -1):
        if _begins(text[place]) and _known(text[place - 1]):
            return place
    return 0


def _clusters(text: str) -> Iterator[tuple[int, int]]:
    """Runs of characters that are composed apart from each other."""
    start = 0
    for place in range(1, len(text)):
        if _begins(text[place]) and _known(text[place - 1]):
            yield start, place
            start = place
    yield start, len(text)


def _known(character: str) -> bool:
    """Whether this Python knows the character: a newer one may compose in ways unknown here."""
    return character < "\u0300" or unicodedata.category(character) != "Cn"


@functools.lru_cache(maxsize=4096)
def _begins(character: str) -> bool:
    """Whether a character never composes with, nor moves before, one that stands before it."""
    if character < "\u0300":
        return True
    if unicodedata.category(character) == "Cn":
        return False
    head = unicodedata.normalize("NFD", character)[0]
    return not unicodedata.combining(head) and head not in _joining() and character not in _joining()


@functools.cache
def _joining() -> frozenset[str]:
    """The characters that compose with one before them: second parts of compositions, and Hangul vowels and finals."""
    seconds = {chr(code) for code in (*range(0x1161, 0x1176), *range(0x11A8, 0x11C3))}
    for code in range(0x20000):
        parts = unicodedata.decomposition(chr(code)).split()
        if len(parts) == 2 and not parts[0].startswith("<"):
            seconds.add(chr(int(parts[1], 16)))
    return frozenset(seconds)


def _check(raw: Mapping[str, Any]) -> None:
    model, split = raw.get("model") or {}, raw.get("pre_tokenizer") or {}
    if model.get("type") != "BPE" or any(
        model.get(field)
        for field in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
    ):
        raise GuardUnavailable("expected a tokenizer with plain BPE")
    if (raw.get("normalizer") or {}).get("type") != "NFC":
        raise GuardUnavailable("expected a tokenizer that composes text (NFC)")
    match split:
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        } if pattern == SPLIT_PATTERN:
            return
    raise GuardUnavailable("expected a tokenizer with Qwen's split pattern")
