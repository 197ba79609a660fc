"""What is personal in a text, in one piece and in any others; what is put in its place."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.personal import LONGEST_RUN, Finder, Found, find, mask, words


def in_pieces(pieces: list[str]) -> tuple[Found, ...]:
    finder = Finder()
    found = [one for piece in pieces for one in finder.feed(piece)]
    found += finder.finish()
    assert finder.settled == sum(map(len, pieces))
    return tuple(found)


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("Ann.Lee+1@mail.example.org!", "Xxx.Xxx+9@xxxx.xxxxxxx.xxx!"),
        ("call +49 (30) 1234-5678 now", "call +99 (99) 9999-9999 now"),
        ("card 4111 1111 1111 1111", "card 9999 9999 9999 9999"),
        ("IBAN DE89 3704 0044 0532 0130 00 and", "IBAN XX99 9999 9999 9999 9999 99 and"),
        ("IBAN MT84 MALT 0110 0001 2345 MTLC AST0 01S", "IBAN XX99 XXXX 9999 9999 9999 XXXX XXX9 99X"),
        ("dni 54362315K, nie X-5253868-R", "dni 99999999X, nie X-9999999-X"),
        ("codice RCCMNL83S18D969H", "codice XXXXXX99X99X999X"),
        ("hetu 131052-308T", "hetu 999999-999X"),
        ("from 192.168.10.254 and 2001:db8::8a2e", "from 999.999.99.999 and 9999:xx9::9x9x"),
        ("key sk-abcDEF0123456789abcDEF01", "key xx-xxxXXX9999999999xxxXXX99"),
        ("邮箱ann@example.org，电话13812345678。", "邮箱xxx@xxxxxxx.xxx，电话99999999999。"),
        ("почта: анна@пример.рф", "почта: xxxx@xxxxxx.xx"),
        ("هاتف ٠٥٠١٢٣٤٥٦٧", "هاتف 9999999999"),
    ],
)
def test_a_mask_keeps_the_form(text: str, masked: str) -> None:
    assert mask(text)[0] == masked
    assert len(masked) == len(text)


@pytest.mark.parametrize(("text", "kind"), [("dni 54362315A", "number"), ("hetu 131052-308U", "phone")])
def test_an_id_with_a_wrong_check_letter_is_only_a_number(text: str, kind: str) -> None:
    assert [one.kind for one in find(text)] == [kind]


@pytest.mark.parametrize(("text", "kind"), [("078-05-1121", "id"), ("000-05-1121", "phone")])
def test_a_social_security_number_is_one_that_can_exist(text: str, kind: str) -> None:
    assert [one.kind for one in find(text)] == [kind]


@given(st.recursive(st.text() | st.integers() | st.floats(allow_nan=False, allow_infinity=False), st.lists))
def test_masked_json_is_json_of_the_same_form(value: object) -> None:
    def form(value: object) -> object:
        if isinstance(value, list):
            return [form(each) for each in value]
        return len(value) if isinstance(value, str) else type(value) is str

    for ascii_only in (True, False):
        text = json.dumps(value, ensure_ascii=ascii_only)
        masked, _ = mask(text)
        assert len(masked) == len(text)
        assert form(json.loads(masked)) == form(value)


@pytest.mark.parametrize("number", ["4915112345678", "-12345678.5", "0.12345678", "1234567890123456789012345e10"])
def test_a_number_in_json_stays_one(number: str) -> None:
    masked = mask(f'{{"phone": {number}, "to": "x\\nann@example.org \\u00e9va@example.org"}}')[0]

    assert json.loads(masked)["to"] == "x\nxxx@xxxxxxx.xxx xxx@xxxxxxx.xxx"
    assert number[1:4] not in masked


PARTS = st.sampled_from(
    [
        "ann@example.org",
        "+49 30 1234567",
        "4111 1111 1111 1111",
        "DE89 3704 0044 0532 0130 00",
        "192.168.0.1",
        "54362315K",
        "sk-abcDEF0123456789abcDEF01",
        "https://a:b@c.example/x",
        "word",
        "and then",
        "电话",
        " ",
        "  ",
        "\n",
        ", ",
        "1 2 3",
        "\\n",
        "\u2009",
        "A",
    ]
) | st.text(max_size=8)


@st.composite
def cut_texts(draw: st.DrawFn) -> list[str]:
    text = "".join(draw(st.lists(PARTS, max_size=12)))
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=12)))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@given(cut_texts())
def test_the_same_is_found_however_a_text_is_cut(pieces: list[str]) -> None:
    assert in_pieces(pieces) == find("".join(pieces))


@given(cut_texts())
def test_what_is_masked_or_named_is_not_found_again_in_another_form(pieces: list[str]) -> None:
    text = "".join(pieces)
    once = words(text)

    assert words(once) == once
    assert len(mask(text)[0]) == len(text)


@pytest.mark.parametrize("length", [1, 7, 300])
def test_a_long_run_is_cut_at_the_same_places_in_pieces(length: int) -> None:
    text = "".join(str(n % 10) + ("" if n % 7 else " ") for n in range(3 * LONGEST_RUN)) + "x" * 2000 + " 12345678"

    assert in_pieces([text[at : at + length] for at in range(0, len(text), length)]) == find(text)


def test_text_without_a_candidate_is_held_to_the_end_of_its_word_only() -> None:
    finder = Finder()

    finder.feed("This is plain tex")
    assert finder.settled == len("This is plain ")
    finder.feed("t and it goes on. Call 030")
    assert finder.settled == len("This is plain text and it goes on. Call ")
    finder.feed(" 1234567 or ")
    assert finder.settled == len("This is plain text and it goes on. Call 030 1234567 or ")


def test_nothing_is_held_for_longer_than_a_run() -> None:
    finder = Finder()
    for place in range(5000):
        finder.feed("1 "[place % 2])
        assert place + 1 - finder.settled <= LONGEST_RUN + 4


@pytest.mark.parametrize("part", ["a", "a.", "a@", "1 ", "http://", ":", "1.2.", "A1 ", "\\", "DE89-", "1234567T "])
def test_a_long_hostile_text_takes_no_detour(part: str) -> None:
    assert isinstance(find(part * 100_000), tuple)
