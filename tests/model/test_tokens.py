"""Text to ids: the tokens of a text do not depend on how it was cut, and no text spells a control token."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from edge_folder import LINES, tiny_tokenizer
from tidegate.model.tokens import _FOLD, CONTROL_TOKENS, Folder, TextTokenizer, Token, _characters

TOKENIZER = TextTokenizer(tiny_tokenizer())
AWKWARD = (
    "👩‍👩‍👧‍👦",
    "🏳️‍🌈",
    "👍🏽",
    "e\u0301\u0327",
    "क्षि",
    "ﷺ",
    "㎏",
    "…",
    "ﬃ",
    "İ",
    "ẞ",
    "مرحبا \u202eabc\u202c",
    "שלום",
    "\ud83d",
    "\ude00",
    "\ud83d\ude00",
    "\x00",
    "\u200b",
    "\ufeff",
    "   \t\n\r\n  ",
    "\u3000",
    "aaaaaaaaaa",
    "!!!!!!!!!!!!",
    "1234567890",
    "한국어",
    "각",
    "ｈｅｌｌｏ",
    "<|end|>",
    "<|assistant|>",
    "𝓱𝓮𝓵𝓵𝓸",
    "½",
    "ǆ",
    "\U000e0001",
    "ー",
    "สวัสดี",
)
PIECES = st.one_of(
    st.sampled_from(AWKWARD),
    st.sampled_from(LINES),
    st.text(max_size=6),
    st.text(st.characters(categories=["Cs", "Mn", "Cf", "Zs", "So", "Lo"]), max_size=4),
    st.text(" ab1.\n", max_size=6),
)
TEXTS = st.lists(PIECES, max_size=8).map("".join)


def cut(text: str, places: list[int]) -> list[str]:
    """The text in pieces, cut at these places (some may be empty)."""
    ends = [0, *sorted(min(place, len(text)) for place in places), len(text)]
    return [text[start:end] for start, end in pairwise(ends)]


def fed(pieces: list[str]) -> list[Token]:
    stream = TOKENIZER.incremental()
    tokens = [token for piece in pieces for token in stream.feed(piece)]
    return tokens + stream.finish()


@given(TEXTS, st.lists(st.integers(0, 200), max_size=12))
@example("\ud83d\ude00 x", [1])
@example("㎏㎏", [1])
@example("a" * 60, [5, 25, 59])
@example("  a  ", [1, 2, 3, 4])
def test_tokens_do_not_depend_on_where_the_text_was_cut(text: str, places: list[int]) -> None:
    assert fed(cut(text, places)) == TOKENIZER.encode(text)


@given(TEXTS)
def test_tokens_do_not_depend_on_feeding_character_by_character(text: str) -> None:
    assert fed(list(text)) == TOKENIZER.encode(text)


@given(TEXTS, TEXTS)
def test_tokens_given_out_stay_whatever_follows(text: str, more: str) -> None:
    stream = TOKENIZER.incremental()
    early = stream.feed(text)
    assert TOKENIZER.encode(text + more)[: len(early)] == early


@given(TEXTS)
def test_ends_never_go_back_and_the_last_is_the_end_of_the_text(text: str) -> None:
    tokens = TOKENIZER.encode(text)
    ends = [token.end for token in tokens]
    assert ends == sorted(ends)
    assert not tokens or ends[-1] == len(text)


@given(TEXTS)
def test_no_text_gives_a_control_id(text: str) -> None:
    assert all(token.id >= len(CONTROL_TOKENS) for token in TOKENIZER.encode(text))


@pytest.mark.parametrize("name", CONTROL_TOKENS)
def test_a_control_token_written_out_is_ordinary_text(name: str) -> None:
    ids = [token.id for token in TOKENIZER.encode(f"before {name} after {name}")]
    assert ids
    assert not set(ids) & set(TOKENIZER.control.values())
    assert len(TOKENIZER.encode(name)) > 1


@given(st.lists(TEXTS, max_size=4))
def test_many_texts_at_once_give_the_same_ids(texts: list[str]) -> None:
    assert TOKENIZER.encode_ids(texts) == [[token.id for token in TOKENIZER.encode(text)] for text in texts]


@given(TEXTS)
def test_peek_shows_what_finish_would_give_and_changes_nothing(text: str) -> None:
    stream = TOKENIZER.incremental()
    stream.feed(text)
    seen = [token.id for token in stream.peek()]
    given_out = [token.id for token in stream.finish()]
    assert given_out[: len(seen)] == seen


@given(TEXTS)
def test_what_is_held_back_is_bounded(text: str) -> None:
    stream = TOKENIZER.incremental()
    stream.feed(text)
    assert len(stream._folded) <= 21


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("Hello", " hello"),
        ("  HELLO\t\tWorld", " hello world"),
        ("h\u200be\u200dl\ufefflo", " hello"),
        ("ｆｕｌｌ", " full"),
        ("héllo e\u0301", " hello e"),
        ("sooooooo", " sooo"),
        ("10000000", " 10000000"),
        ("a\n \n b", " a\nb"),
        ("ﬃ㎏…", " ffikg..."),
        ("", ""),
        ("\u200b", ""),
    ],
)
def test_folding_brings_text_to_a_plain_form(text: str, plain: str) -> None:
    assert Folder().fold(text)[0] == plain


def test_each_character_of_an_expansion_is_covered_only_when_all_of_it_is() -> None:
    folded, ends = Folder().fold("ﬃx")
    assert folded == " ffix"
    assert ends == [0, 0, 0, 1, 2]


def test_a_tokenizer_whose_added_tokens_text_could_spell_is_refused(tmp_path: Path) -> None:
    definition = json.loads(tiny_tokenizer().to_str())
    spelled = {"id": 1, "content": "<|end|>", "special": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    definition["added_tokens"] = [spelled | flags]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(definition), encoding="utf-8")
    with pytest.raises(ValueError, match="added tokens"):
        TextTokenizer.load(path)


def test_a_tokenizer_file_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(tiny_tokenizer().to_str(), encoding="utf-8")
    assert TextTokenizer.load(path).encode("hello 今天") == TOKENIZER.encode("hello 今天")
    assert isinstance(tiny_tokenizer(), Tokenizer)


class PlainFolder:
    """Folding as it is meant, one character after the other: what the faster ways must equal."""

    def __init__(self) -> None:
        self.last, self.repeats, self.consumed = "", 0, 0

    def fold(self, text: str) -> tuple[str, list[int]]:
        folded: list[str] = []
        ends: list[int] = []
        for character, end in _characters(text, self.consumed):
            expansion = _FOLD[character]
            for position, plain in enumerate(expansion, start=1):
                if not self.last:
                    if plain in " \n":
                        continue
                    folded.append(" ")
                    ends.append(end - 1)
                elif self.drops(plain):
                    continue
                self.repeats = self.repeats + 1 if plain == self.last else 1
                self.last = plain
                folded.append(plain)
                ends.append(end if position == len(expansion) else end - 1)
        self.consumed += len(text)
        return "".join(folded), ends

    def drops(self, plain: str) -> bool:
        if plain in " \n":
            return self.last in " \n"
        return plain == self.last and self.repeats >= 3 and not plain.isdigit()


RUNS = st.tuples(
    st.sampled_from([*(chr(code) for code in range(128)), "ab ", "Aa", "1", " \n", "é", "ﬃ", "①", "\u200b", "\u2003"]),
    st.integers(1, 40),
)


@settings(deadline=None, max_examples=400)
@given(
    texts=st.lists(
        st.one_of(
            st.text(max_size=80),
            st.text(alphabet=st.characters(max_codepoint=127), max_size=120),
            st.text(alphabet="aAb1 \n\t\r.", max_size=120),
            st.lists(RUNS, max_size=8).map(lambda runs: "".join(text * count for text, count in runs)),
            st.text(alphabet=["\ud83d", "\ude00", "a", " "], max_size=60),
        ),
        max_size=5,
    )
)
@example(texts=["a" * 30, "a" * 30, "A" * 30 + " " * 30, "\n" * 30 + "1" * 30, "1" * 30])
@example(texts=[" " * 40, "\n" * 40, "x" * 40])
@example(texts=["aa", "a" * 24 + "b" * 24, "b" * 24])
def test_the_fast_way_of_folding_equals_the_plain_one(texts: list[str]) -> None:
    """For any text in any pieces: the same characters, the same ends, and the same memory of what came."""
    folder, plain = Folder(), PlainFolder()

    for text in texts:
        assert folder.fold(text) == plain.fold(text)

    assert folder.consumed == plain.consumed
    assert folder.fold("a" * 5 + " z") == plain.fold("a" * 5 + " z")


@settings(deadline=None)
@given(st.text(st.characters(max_codepoint=127), max_size=60))
@example("")
@example(" \n")
@example("a" * 45)
@example("it's 12345 o'clock !!!!! (really)\x00\x1c\x7f\t ok")
def test_ascii_text_is_cut_as_the_tokenizer_cuts_it(text: str) -> None:
    pieces = TOKENIZER._pieces.pre_tokenize_str(text)
    assert TOKENIZER.boundary(text) == (pieces[-1][1][0] if pieces else 0)
