"""What is kept of a text: all of it, the text without what looks personal, or only a keyed fingerprint.

Redaction goes by form: e-mail addresses, phone and card numbers, IBANs, network addresses, long runs of digits, keys,
and URLs that carry a password or a token. It prefers to take too much. It cannot see names, postal addresses, or
numbers that are spelled out: a policy that must not keep those says ``retention: hash``.

The fingerprint is an HMAC with a key that never leaves the installation, and not a plain hash: texts are short and
often guessable (a phone number has few possible values), so whoever gets hold of plain hashes can try candidates until
one fits. Without the key that is not possible, while the installation itself still sees that a text came twice.

Every expression here takes time linear in the text, whatever the text is.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import ipaddress
import json
import os
import re
import secrets
import tempfile
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from tidegate.types import Conversation, Role, ToolCall, Turn

__all__ = [
    "KEY_BYTES",
    "conversation_from_json",
    "conversation_to_json",
    "fingerprint",
    "key_name",
    "load_key",
    "parse_key",
    "redact",
    "redact_conversation",
    "subject_fingerprint",
]

KEY_BYTES: Final = 32
PIECE: Final = 16 * 1024
"""About how many characters are redacted in one go."""


# --- redaction ----------------------------------------------------------------------------------------------------

_URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,20}://\S+")
_URL_LOGIN: Final = re.compile(r"://[^/?#@]*@")
_URL_TOKEN: Final = re.compile(
    r"[?&;#](?:[\w.-]{0,40}[_.-])?(?:token|key|apikey|secret|password|passwd|pwd|sig|signature|auth|code|session)=[^&]",
    re.IGNORECASE,
)
_EMAIL: Final = re.compile(r"(?<![\w.+%'-])[\w.+%'-]+@(?:[\w-]+\.)+[\w-]{2,}")
_IBAN_START: Final = re.compile(r"(?<![^\W_])[A-Za-z]{2}[0-9]{2}(?:[ -]?[A-Za-z0-9]){11,30}")
_MAC: Final = re.compile(r"(?<![\w:-])(?:[0-9A-Fa-f]{2}[:-]){5}[0-9A-Fa-f]{2}(?![\w:-])")
_IPV4: Final = re.compile(r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?!\d)")
_IPV6: Final = re.compile(r"(?<![\w:.])[0-9A-Fa-f:.]{3,45}(?![\w:])")
_KEY: Final = re.compile(r"(?<![\w-])[A-Za-z0-9_-]{24,}(?![\w-])")
_DIGITS: Final = re.compile(r"(?<!\d)\+?\(?\d(?:[ \t\u00a0\u2009\u202f().\-/]{0,3}\d){6,}")
_CUT: Final = re.compile(r"\n|(?<=[^\W\d])\s(?=[^\W\d])")
_DATE: Final = re.compile(r"(\d{4})([-./])(\d{1,2})\2(\d{1,2})|(\d{1,2})([-./])(\d{1,2})\6(\d{4})")


def redact(text: str) -> str:
    """The text with everything that looks personal replaced by a word in square brackets, as ``[email]``."""
    return "".join(_redact_piece(piece) for piece in _pieces(text))


def _redact_piece(text: str) -> str:
    for pattern, replace in _STEPS:
        text = pattern.sub(replace, text)
    return text


def _pieces(text: str) -> Iterator[str]:
    """Cut a long text where nothing personal goes across: while one expression runs, no other thread does."""
    start = 0
    while len(text) - start > PIECE and (cut := _CUT.search(text, start + PIECE)):
        yield text[start : cut.end()]
        start = cut.end()
    yield text[start:]


def redact_conversation(conversation: Conversation) -> Conversation:
    """The conversation with every text of it redacted: contents, reasoning, and the tool calls' names and arguments."""
    return Conversation(
        tuple(
            Turn(
                turn.role,
                redact(turn.content),
                redact(turn.reasoning),
                tuple(ToolCall(redact(call.name), redact(call.arguments)) for call in turn.tool_calls),
            )
            for turn in conversation.turns
        )
    )


def _url(match: re.Match[str]) -> str:
    url = match.group()
    return "[url]" if _URL_LOGIN.search(url) or _URL_TOKEN.search(url) else url


def _iban(match: re.Match[str]) -> str:
    """Replace the longest part from the start that has a valid check number; what follows it stays."""
    text = match.group()
    for end in range(len(text), 14, -1):
        candidate = text[:end].replace(" ", "").replace("-", "")
        if text[end - 1].isalnum() and len(candidate) >= 15 and _mod_97(candidate) == 1:
            return "[iban]" + text[end:]
    return text


def _mod_97(iban: str) -> int:
    turned = (iban[4:] + iban[:4]).upper()
    return int("".join(str(int(character, 36)) for character in turned)) % 97


def _address(match: re.Match[str]) -> str:
    text = match.group()
    bare = text.rstrip(".:" if not text.endswith("::") else ".")
    if bare.count(":") < 2 and bare.count(".") != 3:
        return text
    try:
        ipaddress.ip_address(bare)
    except ValueError:
        return text
    return "[ip]" + text[len(bare) :]


def _ipv4(match: re.Match[str]) -> str:
    return "[ip]" if all(int(part) <= 255 for part in match.group().split(".")) else match.group()


def _key(match: re.Match[str]) -> str:
    text = match.group()
    digits = sum(character.isdigit() for character in text)
    return "[key]" if digits >= 3 and digits < len(text) else text


def _number(match: re.Match[str]) -> str:
    text = match.group()
    if _is_date(text):
        return text
    digits = [int(character) for character in text if character.isdigit()]
    if 13 <= len(digits) <= 19 and _luhn(digits):
        return "[card]"
    if len(digits) <= 15 and (text[0] in "+(0" or len(digits) < len(text)):
        return "[phone]"
    return "[number]"


def _is_date(text: str) -> bool:
    match = _DATE.fullmatch(text)
    if match is None:
        return False
    if match[1]:
        year, month, day = int(match[1]), int(match[3]), int(match[4])
    else:
        year, month, day = int(match[8]), int(match[7]), int(match[5])
        if month > 12:
            month, day = day, month
    try:
        datetime.date(year, month, day)
    except ValueError:
        return False
    return 1000 <= year <= 2999


def _luhn(digits: list[int]) -> bool:
    doubled = (digit * 2 - 9 * (digit > 4) for digit in digits[-2::-2])
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


_STEPS: Final[tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], str]], ...]] = (
    (_URL, _url),
    (_EMAIL, lambda _: "[email]"),
    (_IBAN_START, _iban),
    (_MAC, lambda _: "[mac]"),
    (_IPV4, _ipv4),
    (_IPV6, _address),
    (_KEY, _key),
    (_DIGITS, _number),
)


# --- fingerprints -------------------------------------------------------------------------------------------------


def fingerprint(conversation: Conversation, key: bytes) -> str:
    """The keyed fingerprint of the judged turn, as ``hmac-sha256:<which key>:<64 hexadecimal digits>``.

    Texts that differ only in case, in the width or composition of characters, or in white space have the same one.
    """
    turn = conversation.turns[-1]
    parts = [turn.role.value, turn.reasoning, turn.content]
    for call in turn.tool_calls:
        parts += (call.name, call.arguments)
    normal = "\x00".join(_normalise(part) for part in parts)
    digest = hmac.new(key, normal.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()
    return f"hmac-sha256:{key_name(key)}:{digest}"


def subject_fingerprint(subject: str, tenant: str | None, key: bytes) -> str:
    """The keyed fingerprint of whose content it is, in the same form; the same id of two tenants has two of them."""
    parts = json.dumps(["subject", tenant, subject]).encode("ascii")
    return f"hmac-sha256:{key_name(key)}:{hmac.new(key, parts, hashlib.sha256).hexdigest()}"


def _normalise(text: str) -> str:
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(folded.split())


def key_name(key: bytes) -> str:
    """Which key it was, so that fingerprints of different keys are never compared. Tells nothing about the key."""
    return hmac.new(key, b"the name of this key", hashlib.sha256).hexdigest()[:8]


def load_key(path: Path) -> bytes:
    """The key in this file, generated (readable by its owner only) when there is none; safe between processes.

    Raises:
        OSError: when the file can be neither read nor written.
        ValueError: when it does not hold a key.
    """
    try:
        return _read_key(path)
    except FileNotFoundError:
        pass
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(KEY_BYTES) + "\n")
            file.flush()
            os.fsync(file.fileno())
        Path(path).hardlink_to(name)
    except FileExistsError:
        pass
    finally:
        Path(name).unlink()
    return _read_key(path)


def _read_key(path: Path) -> bytes:
    return parse_key(path.read_text(encoding="ascii"))


def parse_key(text: str) -> bytes:
    """A key from hexadecimal digits. Raises ValueError when it is none."""
    key = bytes.fromhex(text.strip())
    if len(key) != KEY_BYTES:
        raise ValueError(f"expected {KEY_BYTES} bytes in hexadecimal digits")
    return key


# --- conversations as JSON ----------------------------------------------------------------------------------------


def conversation_to_json(conversation: Conversation) -> str:
    """The conversation as JSON in ASCII, so that any string survives, also one that is not valid Unicode."""
    return json.dumps([_turn_to_json(turn) for turn in conversation.turns], separators=(",", ":"))


def _turn_to_json(turn: Turn) -> dict[str, Any]:
    content: dict[str, Any] = {"role": turn.role.value, "content": turn.content}
    if turn.reasoning:
        content["reasoning"] = turn.reasoning
    if turn.tool_calls:
        content["tool_calls"] = [{"name": call.name, "arguments": call.arguments} for call in turn.tool_calls]
    return content


def conversation_from_json(text: str) -> Conversation:
    """The reverse of `conversation_to_json`."""
    return Conversation(
        tuple(
            Turn(
                Role(turn["role"]),
                turn["content"],
                turn.get("reasoning", ""),
                tuple(ToolCall(call["name"], call["arguments"]) for call in turn.get("tool_calls", ())),
            )
            for turn in json.loads(text)
        )
    )
