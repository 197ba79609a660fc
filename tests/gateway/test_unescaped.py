"""JSON in pieces, with every letter as itself."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.test_answers import CUTS, cut
from tidegate.gateway.schemas import mended
from tidegate.gateway.unescaped import unescaped

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
