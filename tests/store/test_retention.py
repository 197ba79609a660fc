from __future__ import annotations

import stat
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.store.retention import (
    KEY_BYTES,
    conversation_from_json,
    conversation_to_json,
    fingerprint,
    load_key,
    redact,
    redact_conversation,
)
from tidegate.types import Conversation, Role, ToolCall, Turn

KEY = bytes(range(KEY_BYTES))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("write to ann.lee+news@mail.example.org, please", "write to [email], please"),
        ("Ann <ann@example.org>.", "Ann <[email]>."),
        ("почта: анна@пример.рф!", "почта: [email]!"),
        ("call +49 (30) 1234-5678 now", "call [phone] now"),
        ("call 030/12345678.", "call [phone]."),
        ("电话13812345678。", "电话[number]。"),
        ("هاتف ٠٥٠١٢٣٤٥٦٧", "هاتف [number]"),
        ("card 4111 1111 1111 1111, thanks", "card [card], thanks"),
        ("card 4111-1111-1111-1111", "card [card]"),
        ("order 4111111111111112", "order [number]"),
        ("IBAN DE89 3704 0044 0532 0130 00 and then", "IBAN [iban] and then"),
        ("iban be68539007547034 paid", "iban [iban] paid"),
        ("from 192.168.10.254.", "from [ip]."),
        ("from 2001:db8::8a2e:370:7334, yes", "from [ip], yes"),
        ("mac 00:1B:44:11:3A:B7", "mac [mac]"),
        ("id 123456789", "id [number]"),
        ("key sk-abcDEF0123456789abcDEF01", "key [key]"),
        ("see https://ann:secret@example.org/x now", "see [url] now"),
        ("see https://example.org/x?a=1&access_token=abc now", "see [url] now"),
        ("see https://example.org/x?X-Amz-Signature=abc", "see [url]"),
    ],
)
def test_what_looks_personal_is_replaced_and_the_rest_stays(text: str, expected: str) -> None:
    assert redact(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "On 2026-11-20, or 20.11.2026, at 12:30:45, in 1999.",
        "version 10.4.2 costs 1,250.99 and weighs 12345 g",
        "see https://example.org/path?page=2#top and mailto, a@b",
        "Donaudampfschifffahrtsgesellschaftskapitaen",
        "std::vector<int> and x::y",
        "ab12 is a name, not a bank account",
        "",
    ],
)
def test_what_does_not_look_personal_stays(text: str) -> None:
    assert redact(text) == text


@given(st.text())
def test_redacting_twice_changes_nothing_more(text: str) -> None:
    once = redact(text)

    assert redact(once) == once


@given(
    st.text(st.characters(categories=["L", "P"], exclude_characters="@._%+'-[]/"), max_size=10),
    st.from_regex(r"[a-z]{1,8}\.[a-z0-9]{1,8}@[a-z]{2,9}\.(org|net|co\.uk)", fullmatch=True),
)
def test_an_address_never_stays_wherever_it_stands(around: str, address: str) -> None:
    assert address not in redact(f"{around} {address} {around}")


@pytest.mark.parametrize(
    "text",
    [
        "a" * 500_000,
        "a." * 250_000,
        "a@" * 250_000,
        "1 " * 250_000,
        "http://" * 70_000,
        ":" * 500_000,
        "1.2." * 120_000,
    ],
    ids=["word", "dots", "ats", "digits", "urls", "colons", "addresses"],
)
def test_a_long_hostile_text_is_redacted_without_a_detour(text: str) -> None:
    assert isinstance(redact(text), str)


@pytest.mark.parametrize("end", [" ", "\n", ". "])
def test_a_long_text_is_redacted_like_its_parts(end: str) -> None:
    part = f"call +49 (30) 1234-5678 or ann@example.org or DE89 3704 0044 0532 0130 00 now{end}"

    assert redact(part * 2000) == redact(part) * 2000


def test_every_text_of_a_conversation_is_redacted() -> None:
    secret = "ann@example.org"
    turn = Turn(Role.ASSISTANT, secret, secret, (ToolCall(secret, f'{{"to": "{secret}"}}'),))

    redacted = redact_conversation(Conversation((Turn(Role.USER, secret), turn)))

    assert secret not in conversation_to_json(redacted)
    assert redacted.turns[1].tool_calls[0].arguments == '{"to": "[email]"}'


@pytest.mark.parametrize("other", ["one   two", " ONE\ntwo ", "ｏｎｅ two"])
def test_case_width_and_white_space_do_not_change_a_fingerprint(other: str) -> None:
    assert fingerprint(Conversation.of(other), KEY) == fingerprint(Conversation.of("one two"), KEY)


def test_another_text_role_place_or_key_changes_a_fingerprint() -> None:
    marks = [
        fingerprint(Conversation.of("one"), KEY),
        fingerprint(Conversation.of("two"), KEY),
        fingerprint(Conversation.of("one", "one"), KEY),
        fingerprint(Conversation((Turn(Role.ASSISTANT, "", "one"),)), KEY),
        fingerprint(Conversation.of("one"), KEY[::-1]),
    ]

    assert len(set(marks)) == len(marks)
    assert marks[0].split(":")[:2] != marks[-1].split(":")[:2]  # it is visible that the keys differ


def test_text_that_is_not_valid_unicode_has_a_fingerprint_and_survives_as_json() -> None:
    broken = Conversation.of("\ud800 \x00")

    assert fingerprint(broken, KEY)
    assert conversation_from_json(conversation_to_json(broken)) == broken


def test_a_key_is_made_once_and_readable_by_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "key"

    first = load_key(path)

    assert len(first) == KEY_BYTES
    assert load_key(path) == first
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [found.name for found in tmp_path.iterdir()] == ["key"]


def test_many_who_make_the_key_at_once_get_the_same(tmp_path: Path) -> None:
    keys: list[bytes] = []
    start = threading.Barrier(8)

    def load() -> None:
        start.wait()
        keys.append(load_key(tmp_path / "key"))

    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(keys) == 8
    assert len(set(keys)) == 1


def test_a_file_that_holds_no_key_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("abcd", encoding="ascii")

    with pytest.raises(ValueError, match="32 bytes"):
        load_key(tmp_path / "key")
