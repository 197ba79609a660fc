"""What is kept of a text: all of it, the text without what looks personal, or only a keyed fingerprint.

Redaction goes by form, as `tidegate.personal` says: the same finds what is masked in an answer on its way. It cannot
see names, postal addresses, or numbers that are spelled out: a policy that must not keep those says
``retention: hash``.

The fingerprint is an HMAC with a key that never leaves the installation, and not a plain hash: texts are short and
often guessable (a phone number has few possible values), so whoever gets hold of plain hashes can try candidates until
one fits. Without the key that is not possible, while the installation itself still sees that a text came twice.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import tempfile
import unicodedata
from pathlib import Path
from typing import Any, Final

from tidegate.personal import words
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


# --- redaction ----------------------------------------------------------------------------------------------------


def redact(text: str) -> str:
    """The text with everything that looks personal replaced by a word in square brackets, as ``[email]``."""
    return words(text)


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
