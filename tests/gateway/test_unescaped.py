"""JSON in pieces, with every letter as itself."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.test_answers import CUTS, cut
from tidegate.gateway.schemas import mended
from tidegate.gateway.unescaped import Undoing, unescaped, wholly_unescaped

VALUES: Any = st.recursive(
    st.text() | st.integers() | st.booleans(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def in_pieces(pieces: list[str]) -> str:
    said, rest = "", ""
    for piece in pieces:
        text, rest = unescaped(rest + piece)
        said += text
    return mended(said + rest)


@given(value=VALUES, cuts=CUTS)
def test_it_stays_the_same_json(value: Any, cuts: list[float]) -> None:
    """However it is cut, and every letter that can stands as itself."""
    written = json.dumps(value)

    said = in_pieces(cut(written, cuts))

    assert json.loads(said) == value
    assert said == in_pieces([written])
    assert said.replace("\x7f", "\\u007f") == json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


@given(text=st.text(alphabet='\\u0062d8"nq', max_size=40), cuts=CUTS)
def test_what_is_no_json_does_not_depend_on_its_cuts(text: str, cuts: list[float]) -> None:
    assert in_pieces(cut(text, cuts)) == in_pieces([text])


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (r'{"q": "\u0062omb"}', '{"q": "bomb"}'),
        (r"\\u0062omb", r"\\u0062omb"),
        (r"\\\u0062omb", r"\\bomb"),
        (r"\u00e9\n\/\u0022\u005c\u000a", r"é\n\/\u0022\u005c\u000a"),
        (r"\ud83d\ude00", "😀"),
        (r"\uzzzz \u00", r"\uzzzz \u00"),
    ],
)
def test_escapes_of_letters_are_undone(written: str, said: str) -> None:
    assert in_pieces([written]) == said
    assert in_pieces(list(written)) == said


@pytest.mark.parametrize("part", ["\\uZ", "\\", "\\u00", "\\u0062", "\\n"])
def test_a_long_hostile_text_takes_no_detour(part: str) -> None:
    """Each part costs as much as the one before it: else this would not end."""
    said, rest = unescaped(part * 200_000)

    assert said + rest == {"\\u0062": "b"}.get(part, part) * 200_000


# --- where it was in the text given -------------------------------------------------------------------------------


def undone(pieces: list[str]) -> tuple[str, Undoing]:
    undoing = Undoing()
    return "".join([*map(undoing.feed, pieces), undoing.finish()]), undoing


@given(text=st.text(alphabet='\\u0062dD8cCe"nq', max_size=60), cuts=CUTS)
def test_pieces_of_any_text_come_out_as_the_whole(text: str, cuts: list[float]) -> None:
    said, undoing = undone(cut(text, cuts))

    assert said == wholly_unescaped(text) == Undoing(text, whole=True).text
    assert undoing.given(len(said)) == len(text)


@given(value=VALUES, cuts=CUTS)
def test_each_character_is_where_it_was_written(value: Any, cuts: list[float]) -> None:
    text = mended(json.dumps(value))
    said, undoing = undone(cut(text, cuts))

    for place, letter in enumerate(said):
        written = text[undoing.given(place) : undoing.given(place + 1)]
        assert letter == written or letter == mended(json.loads(f'"{written}"'))


@given(value=st.text(st.characters(exclude_categories=["Cc"], exclude_characters='"\\')), cuts=CUTS)
def test_a_mask_is_as_long_as_what_it_covers_and_it_stays_json(value: str, cuts: list[float]) -> None:
    text = json.dumps(value)
    said, undoing = undone(cut(text, cuts))
    start, end = 1, len(said) - 1
    mask = "".join("x" if letter.isalnum() else letter for letter in said[start:end])

    masked = text[0] + undoing.written(start, mask) + text[-1]

    assert len(masked) == len(text)
    assert set(json.loads(masked)) <= {"x", *mended(value)}
