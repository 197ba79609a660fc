"""Server-sent events in every cut and with every kind of line end."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.errors import UpstreamError
from tidegate.gateway.sse import EventReader, event

STREAM = b': hello\nid: 1\ndata: {"a": 1}\n\ndata:two\ndata: lines\n\nevent: x\n\ndata: [DONE]\n\n'


@given(
    places=st.lists(st.integers(0, len(STREAM) * 2)),
    end=st.sampled_from([b"\n", b"\r\n", b"\r"]),
    mark=st.sampled_from([b"", b"\xef\xbb\xbf"]),
)
def test_the_cut_does_not_matter(places: list[int], end: bytes, mark: bytes) -> None:
    """Comments and other fields are left out, lines of one event are joined, a byte order mark is skipped."""
    stream = mark + STREAM.replace(b"\n", end)
    at = sorted({0, len(stream), *(place for place in places if place < len(stream))})
    reader = EventReader()

    events = [found for a, b in itertools.pairwise(at) for found in reader.feed(stream[a:b])] + reader.finish()

    assert events == [b'{"a": 1}', b"two\nlines", b"[DONE]"]


def test_an_event_that_never_ends_is_refused() -> None:
    """So that nobody can fill the memory."""
    reader = EventReader(longest=100)
    for _ in range(14):
        reader.feed(b"data: 123456\n")

    with pytest.raises(UpstreamError):
        reader.feed(b"data: 123456\n")
    with pytest.raises(UpstreamError):
        EventReader(longest=100).feed(b"data: " + b"x" * 100)
    reader = EventReader(longest=100)
    reader.feed(b"data: ")
    for _ in range(94):
        reader.feed(b"x")
    with pytest.raises(UpstreamError):
        reader.feed(b"x")
    with pytest.raises(UpstreamError):
        EventReader(longest=100).feed(b"data:\n" * 101)


def test_an_event_is_one_line_of_json() -> None:
    """Also when the text has line ends or broken characters in it."""
    assert event({"a": "é\n"}) == b'data: {"a":"\xc3\xa9\\n"}\n\n'
    assert event("\ud800") == b'data: "?"\n\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        event(float("nan"))
