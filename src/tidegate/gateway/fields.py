"""What requests of OpenAI's doors have in common: their options, and what becomes of every field that has text.

A field is one of these: read as a text; *plain*, with nothing but numbers; an *identity*, words for programs, of which
only what could be a sentence counts; or unknown, and then all of its text counts. What counts is in the coverage as not
judged, so that no field that a client can send is left out.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Final

from tidegate.gateway.schemas import is_name, kind_of, refuse, weight_of
from tidegate.types import Channel, Coverage, CoverageState

__all__ = [
    "OPENAI_HEADERS",
    "count_of",
    "flag_of",
    "messages_of",
    "model_of",
    "options_of",
    "sentences_in",
    "strings_in",
    "subject_of",
    "unseen_in",
]

OPENAI_HEADERS: Final = ("authorization", "openai-organization", "openai-project")
"""A client's headers that an upstream with OpenAI's API understands."""

MOST_MESSAGES: Final = 2048
_IDENTITY: Final = re.compile(r"[\w.:/@+-]{1,128}", re.ASCII)
_NO_NAME: Final = "?"
"""Stands for a field whose name could be a sentence."""


# --- options ------------------------------------------------------------------------------------------------------


def model_of(body: Mapping[str, Any]) -> str:
    """The model that is asked for. Raises Problem."""
    model = body.get("model")
    if not isinstance(model, str) or not model:
        refuse("expected the name of a model, as a string", "missing_required_parameter", param="model")
    return model


def messages_of(body: Mapping[str, Any]) -> list[Any]:
    """The messages of a conversation, at least one, whatever each of them is. Raises Problem."""
    messages = body.get("messages")
    if "messages" not in body:
        refuse("'messages' is missing: expected an array of messages", "missing_required_parameter", param="messages")
    if not isinstance(messages, list):
        refuse(f"expected an array of messages, got {kind_of(messages)}", "invalid_type", param="messages")
    if not messages:
        refuse("expected at least one message, got an empty array", "empty_array", param="messages")
    if len(messages) > MOST_MESSAGES:
        refuse(f"expected at most {MOST_MESSAGES:,} messages, got {len(messages):,}", "too_many", param="messages")
    return messages


def count_of(body: Mapping[str, Any], name: str) -> int:
    """How many are asked for, from 1 to 128; 1 when it is not said. Raises Problem."""
    count = body.get(name)
    if count is None:
        return 1
    if isinstance(count, float) and count.is_integer():
        return count_of({name: int(count)}, name)  # JSON has one kind of numbers
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= 128:
        refuse("expected a whole number from 1 to 128", "invalid_value", param=name)
    return count


def flag_of(body: Mapping[str, Any], name: str) -> bool:
    """Whether an option is set; false when it is not said. Raises Problem."""
    flag = body.get(name)
    if flag is not None and not isinstance(flag, bool):
        refuse(f"expected true or false, got {kind_of(flag)}", "invalid_type", param=name)
    return bool(flag)


def options_of(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """The options of a stream; none when they are not said. Raises Problem."""
    options = body.get("stream_options")
    if options is not None and not isinstance(options, dict):
        refuse(f"expected an object, got {kind_of(options)}", "invalid_type", param="stream_options")
    return options or {}


def subject_of(body: Mapping[str, Any]) -> str | None:
    """Whose content it is, as the client says it."""
    given = (body.get(name) for name in ("safety_identifier", "user"))
    return next((value for value in given if isinstance(value, str) and value), None)


# --- what nobody reads --------------------------------------------------------------------------------------------


def unseen_in(
    fields: Mapping[str, Any],
    *,
    read: Collection[str],
    plain: Collection[str] = (),
    identities: Collection[str] = (),
    path: str = "",
    channel: Channel = Channel.USER,
    reserved: Collection[str] = (),
) -> Iterator[Coverage]:
    """The text in an object's fields that no guard sees.

    Args:
        fields: of the object.
        read: those that are somebody else's business.
        plain: those of numbers, in arrays too.
        identities: those of words for programs.
        path: of the object; "" for the body itself.
        channel: whose text it is.
        reserved: more names that only the fields of these names may have.

    Raises:
        Problem: 400 for a name that differs from a known one in its case only: some upstreams take it for that one.
    """
    known = {*read, *plain, *identities, *reserved}
    for name, value in fields.items():
        if name not in known and name.casefold() in known:
            place = f"{path}.{name.casefold()}" if path else name.casefold()
            refuse("expected the name of this field in lower case", "unknown_parameter", param=place)
        if name in read or (name in plain and not sentences_in(value)):
            continue
        count = sentences_in(value) if name in identities else weight_of(value)
        if not is_name(name):
            name, count = _NO_NAME, count + len(name)
        if count:
            yield Coverage(f"{path}.{name}" if path else name, channel, CoverageState.NOT_JUDGED, count)


def sentences_in(value: Any) -> int:
    """How many characters of a value could be sentences: strings that are neither one word nor without any letter."""
    match value:
        case str():
            return 0 if _is_word(value) else len(value)
        case dict():
            names = sum(0 if is_name(name) else len(name) for name in value)
            return names + sum(map(sentences_in, value.values()))
        case list():
            return sum(map(sentences_in, value))
    return 0


def _is_word(text: str) -> bool:
    return _IDENTITY.fullmatch(text.strip()) is not None or not any(map(str.isalnum, text))


def strings_in(value: Any) -> Iterator[str]:
    """The texts in a value, and the names that could be sentences; kinds (``type``) of one word are left out."""
    match value:
        case str():
            yield value
        case dict():
            for name, inner in value.items():
                if not is_name(name):
                    yield name
                if name != "type" or sentences_in(inner):
                    yield from strings_in(inner)
        case list():
            for inner in value:
                yield from strings_in(inner)
