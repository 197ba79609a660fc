"""Qwen3 ids of text in pieces: at the end exactly those of the whole text, and what was final stayed."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from qwen3guard_files import FILES
from qwen_tokenizer import LINES, PLAIN, SPECIAL, plain_reference, tiny_qwen_definition
from tidegate.errors import GuardUnavailable
from tidegate.model.qwen_tokens import _WHITE, Frame, IncrementalQwenTokens, QwenTokenizer
from tidegate.model.tokens import Token

DEFINITIONS = {"tiny": tiny_qwen_definition()}
if FILES is not None:
    DEFINITIONS["released"] = (FILES / "tokenizer.json").read_text(encoding="utf-8")
TOKENIZERS = {name: QwenTokenizer(definition) for name, definition in DEFINITIONS.items()}
NAMES = list(TOKENIZERS)
TINY = TOKENIZERS["tiny"]

RUNS = st.tuples(
    st.sampled_from(
        [
            *" \n\t\r.!'-a1é今",
            *("\r\n", " \n", "  \n ", "ab", "'s", "'re", "\u3000", "\x85", "\x1c", "\u0301", "e\u0301", "\u0345\u0301"),
            *(
                "\u1100",
                "\u1161",
                "\u11a8",
                "각",
                "\u09c7\u09be",
                "\ud83d",
                "\ude00",
                "👩‍👩‍👧",
                "\U00016d67",
                "\U00016d63",
            ),
            *("internationalization", "----", "<|im_end|>", "<think>", "ſ", "\u212a", "ﬃ", "\u0340", "\u2126", "क्षि"),
        ]
    ),
    st.integers(1, 12),
).map(lambda run: run[0] * run[1])
LONG_RUNS = st.tuples(
    st.sampled_from(
        ["a", "ab", " ", "\n", " \n", "-", "!", "今天", "é", "\u0301", "international", "\t", "!\n", "xyzq"]
    ),
    st.integers(100, 1500),
).map(lambda run: run[0] * run[1])
TEXTS = st.lists(st.one_of(RUNS, st.sampled_from(LINES), st.text(max_size=8)), max_size=10).map("".join)
LONG_TEXTS = st.lists(st.one_of(RUNS, LONG_RUNS, st.sampled_from(LINES)), min_size=1, max_size=5).map("".join)
FRAMES = st.builds(
    Frame,
    st.sampled_from(["", "user\n", "\n\n", "\n"]),
    st.sampled_from(["", "\n", "}\n"]),
    st.booleans(),
    st.booleans(),
)
CUTS = st.lists(st.integers(0, 6000), max_size=12)


def cut(text: str, places: list[int]) -> list[str]:
    """The text in pieces, cut at these places (some may be empty)."""
    ends = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[start:end] for start, end in pairwise(ends)]


def sound(text: str) -> str:
    """Pairs of surrogates as the character they stand for, halves as one that is unknown."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


NO_FRAME = Frame()


def reference(name: str, text: str, frame: Frame = NO_FRAME) -> list[int]:
    """The ids of the whole text at once, from the library alone."""
    text = sound(text)
    text = text.lstrip("\n") if frame.strips_start else text
    text = text.rstrip("\n") if frame.strips_end else text
    ids: list[int] = plain_reference(DEFINITIONS[name]).encode(frame.before + text + frame.after).ids
    return ids


class Reader:
    """Follows updates as a session does, and holds them to what they promise."""

    def __init__(self, stream: IncrementalQwenTokens) -> None:
        self.stream = stream
        self.told: list[Token] = []
        self.final: list[Token] = []

    def take(self, update: Any) -> None:
        kept = len(self.told) - update.back
        assert kept >= len(self.final), "a final token was taken back"
        self.told = self.told[:kept] + update.tokens
        assert self.told[: len(self.final)] == self.final
        assert len(self.final) <= update.final <= len(self.told)
        self.final = self.told[: update.final]

    def read(self, pieces: list[str]) -> list[Token]:
        for piece in pieces:
            self.take(self.stream.feed(piece))
        self.take(self.stream.finish())
        assert self.final == self.told
        return self.told


def ids_of(tokens: list[Token]) -> list[int]:
    return [token.id for token in tokens]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("speculate", [True, False])
@settings(max_examples=300)
@given(text=TEXTS, places=CUTS, frame=FRAMES)
@example(text="\ud83d\ude00 x", places=[1], frame=Frame())
@example(text="x\n  \n", places=[1, 2, 3, 4], frame=Frame())
@example(text="e\u0301", places=[1], frame=Frame("\n\n", "", True, False))
@example(text="\n\nx\n\ny\n\n", places=[1, 3, 4, 5, 7], frame=Frame("\n", "\n", True, True))
@example(text="\n", places=[], frame=Frame("", "", True, True))
def test_tokens_do_not_depend_on_where_the_text_was_cut(
    name: str, speculate: bool, text: str, places: list[int], frame: Frame
) -> None:
    stream = TOKENIZERS[name].incremental(frame, speculate=speculate)
    tokens = Reader(stream).read(cut(text, places))
    assert ids_of(tokens) == reference(name, text, frame)
    assert tokens == TOKENIZERS[name].encode(text, frame)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=100)
@given(text=TEXTS)
@example(text="  00")
@example(text="a  1\n  \n 2 \t今")
def test_tokens_do_not_depend_on_feeding_character_by_character(name: str, text: str) -> None:
    tokens = Reader(TOKENIZERS[name].incremental()).read(list(text))
    assert ids_of(tokens) == reference(name, text)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60)
@given(text=LONG_TEXTS, places=st.lists(st.integers(0, 20_000), max_size=60))
@example(text="a" * 3000 + "b", places=list(range(0, 3000, 7)))
@example(text="!" * 2000 + "\n" * 700 + " " * 700 + "\n" + "  x", places=list(range(0, 3400, 13)))
@example(text="x" + "\n " * 900 + " " * 900 + "x", places=list(range(0, 2600, 11)))
@example(text="x" + "   \n" * 500 + "\u3000" * 1200 + "y", places=list(range(0, 3200, 100)))
@example(text="'" * 1500 + "s" * 1500 + "!" * 1500 + "s", places=list(range(0, 4500, 31)))
@example(text="\x1c \x1c\x1c  " * 500, places=[2017])
@example(text="x" + "\n\t" * 900 + "\t" * 900 + "y", places=list(range(0, 2600, 70)))
@example(text="!" + "\n" * 2501 + "\t\nx", places=list(range(0, 2500, 90)))
@example(text="今天天气很好" * 700, places=list(range(0, 4200, 17)))
@example(text="e" + "\u0301\u0316" * 2000, places=list(range(0, 4000, 50)))
def test_long_runs_are_exact_too(name: str, text: str, places: list[int]) -> None:
    tokens = Reader(TOKENIZERS[name].incremental()).read(cut(text, places))
    assert ids_of(tokens) == reference(name, text)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=100)
@given(text=TEXTS, more=TEXTS)
def test_after_each_feed_the_tokens_told_are_those_of_the_text_so_far(name: str, text: str, more: str) -> None:
    reader = Reader(TOKENIZERS[name].incremental())
    for piece in (text, more):
        reader.take(reader.stream.feed(piece))
    so_far = (text + more).encode("utf-16", "surrogatepass")
    if "\ud800" <= (text + more)[-1:] <= "\udbff":
        so_far = so_far[:-2]
    assert ids_of(reader.told) == reference(name, so_far.decode("utf-16", "surrogatepass"))


def test_white_space_is_what_the_pattern_takes_for_it() -> None:
    every = "".join(chr(code) for code in range(0x20000) if not 0xD800 <= code <= 0xDFFF)
    split = pre_tokenizers.Split(Regex(r"\s"), "isolated")
    found = {piece for piece, _ in split.pre_tokenize_str("x".join(every)) if len(piece) == 1} - {"x"}
    assert found == {character for character in every if _WHITE.fullmatch(character)}


@given(text=TEXTS, frame=FRAMES)
def test_ends_never_go_back_and_the_last_is_the_end_of_the_text(text: str, frame: Frame) -> None:
    ends = [token.end for token in TINY.encode(text, frame)]
    assert ends == sorted(ends)
    assert all(0 <= end <= len(text) for end in ends)
    assert not ends or ends[-1] == len(text)


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
@example(text="q\u0301\u0316")
def test_a_character_is_covered_only_by_tokens_that_hold_all_of_it(text: str) -> None:
    """The tokens up to the one that covers so many characters hold the canonical form of at least these."""
    widths = [TINY._bytes[token.id] for token in TINY.encode(text)]
    held = 0
    for token, width in zip(TINY.encode(text), widths, strict=True):
        held += width
        assert len(TINY.normalized(text[: token.end]).encode()) <= held


@pytest.mark.parametrize("name", [*SPECIAL, *PLAIN])
@pytest.mark.parametrize("tokenizer", NAMES)
def test_a_control_token_written_out_is_ordinary_text(tokenizer: str, name: str) -> None:
    chosen = TOKENIZERS[tokenizer]
    ids = ids_of(Reader(chosen.incremental()).read([f"before {name[:3]}", f"{name[3:]} after {name}"]))
    assert not set(ids) & set(chosen.control.values())
    assert ids == reference(tokenizer, f"before {name} after {name}")


@given(text=TEXTS)
def test_no_text_gives_a_control_id(text: str) -> None:
    assert not set(ids_of(TINY.encode(text))) & set(TINY.control.values())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("unit", ["a", "word", "今天天气", " ", "\n", " \n", "-", "!?", "é", "\t"])
def test_what_is_held_of_a_run_is_bounded(name: str, unit: str) -> None:
    reader = Reader(TOKENIZERS[name].incremental())
    stream, most = reader.stream, 0
    for _ in range(600):
        reader.take(stream.feed(unit * 10))
        most = max(most, len(stream._text.encode()) + len(stream._raw.encode()))
    assert most <= 2000
    reader.take(stream.finish())
    assert ids_of(reader.told) == reference(name, unit * 6000)


def test_an_endless_run_of_marks_costs_in_proportion_to_its_length(monkeypatch: pytest.MonkeyPatch) -> None:
    composed = 0
    original = QwenTokenizer.normalized

    def counted(self: QwenTokenizer, text: str) -> str:
        nonlocal composed
        composed += len(text)
        return original(self, text)

    monkeypatch.setattr(QwenTokenizer, "normalized", counted)
    reader = Reader(TINY.incremental())
    tokens = reader.read(["e", *["\u0301"] * 5_000])
    assert ids_of(tokens) == reference("tiny", "e" + "\u0301" * 5_000)
    assert composed < 400 * 5_000


@given(text=TEXTS.filter(lambda text: text.strip("\n") != ""), frame=FRAMES)
def test_the_tokens_of_a_frame_alone_are_told_apart(text: str, frame: Frame) -> None:
    tokens = TINY.encode(text, frame)
    count = TINY.leading(tokens, frame)
    width = len(frame.before.encode())
    assert sum(TINY._bytes[token.id] for token in tokens[:count]) <= width
    assert sum(TINY._bytes[token.id] for token in tokens[: count + 1]) > width


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"normalizer": None}, "NFC"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}}, "split pattern"),
        ({"model": {"ignore_merges": True}}, "plain BPE"),
    ],
)
def test_a_tokenizer_of_another_kind_is_refused(change: dict[str, Any], complaint: str) -> None:
    raw = json.loads(DEFINITIONS["tiny"])
    for field, value in change.items():
        raw[field] = {**raw[field], **value} if field == "model" else value
    with pytest.raises(GuardUnavailable, match=complaint):
        QwenTokenizer(json.dumps(raw))


def test_what_is_no_tokenizer_is_refused(tmp_path: Any) -> None:
    with pytest.raises(GuardUnavailable, match="not a tokenizer"):
        QwenTokenizer("{}")
    with pytest.raises(GuardUnavailable, match="cannot be read"):
        QwenTokenizer.load(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text(DEFINITIONS["tiny"], encoding="utf-8")
    assert QwenTokenizer.load(tmp_path / "tokenizer.json").control == TINY.control
