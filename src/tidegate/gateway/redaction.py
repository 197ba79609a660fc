"""Personal data taken out of a request on its way to the upstream; JSON stays JSON, and each text as long as it was.

Which texts: every string of the conversation, whatever the door, but for words for programs, encoded data, and places
that are spared: the operator's own words, what no guard sees, and new texts in which the policy found nothing to take
out. Earlier turns are masked by their form alone: what was taken out when it was new comes again with every later
request.

A text can stand in shapes that this walk does not know, and personal data can be spread over several strings that only
the guard reads as one. So whoever masks a request reads it again, and asks `is_out` about every text that was to be
masked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from typing import Any, Final

from tidegate.personal import find, mask
from tidegate.types import Channel, Coverage, Turn

__all__ = ["is_out", "masked_body", "spared_of"]

_ROOTS: Final = frozenset(
    {"input", "instructions", "messages", "prediction", "prompt", "suffix", "system", "web_search_options"}
)
"""The fields of a request in which the conversation stands."""
_STRUCTURED: Final = frozenset(("arguments", "input"))
"""What a tool is called with; where that is an object and not JSON text, it is masked as the text that it is."""
_FOR_PROGRAMS: Final = frozenset(
    {
        "approval_request_id",
        "call_id",
        "caller_id",
        "container_id",
        "detail",
        "error_code",
        "expires_at",
        "file_id",
        "fingerprint",
        "format",
        "id",
        "item_id",
        "media_type",
        "name",
        "namespace",
        "object",
        "phase",
        "retrieved_at",
        "role",
        "server_label",
        "server_name",
        "skill_id",
        "status",
        "tool_call_id",
        "tool_id",
        "tool_name",
        "tool_use_id",
        "toolset_name",
        "ttl",
        "type",
        "version",
    }
)
"""Names of fields that are no texts where they look like one word."""
_WORD: Final = re.compile(r"[\w.:/@+-]{1,128}", re.ASCII)
_ENCODED_FIELDS: Final = frozenset(
    {
        "data",
        "encrypted_content",
        "encrypted_index",
        "encrypted_stdout",
        "redacted_thinking",
        "signature",
    }
)
_FILES: Final = frozenset({"file_data", "image_url", "input_audio"})
_DATA: Final = re.compile(r"data:[\w.+-]+/[\w.+-]+[;,]\S*", re.ASCII | re.IGNORECASE)
_ENCODED: Final = re.compile(r"[\w.:/+=-]*", re.ASCII)
_LONG: Final = 64
_STEP: Final = re.compile(r"[.\[]|$")
_RANGE: Final = re.compile(r"(.*)\[(\d+)-(\d+)\]")


def spared_of(unseen: Collection[Coverage], coverage: Collection[Coverage]) -> Iterator[str]:
    """The places of the operator's words, and those that no guard sees, unless a text stands in them too."""
    hidden = set(map(id, unseen))
    above = {
        path[: step.start()]
        for part in coverage
        if id(part) not in hidden
        for path in _single(part.path)
        for step in _STEP.finditer(path)
    }
    for part in coverage:
        if part.path not in above if id(part) in hidden else part.channel is Channel.SYSTEM:
            yield part.path


def masked_body(
    body: dict[str, Any], spared: Collection[str], taken_out: Collection[str] = ()
) -> tuple[dict[str, Any], int]:
    """The request with personal data masked, and how many places that were.

    Args:
        body: the request; it is not changed.
        spared: paths that stay as they are with all that is below them, as ``messages[0].content``, or
            ``messages[0].content[1-3]`` for several.
        taken_out: paths of strings that are masked even where they look like words for programs.
    """
    masking = _Masking(_all(spared), _all(taken_out))
    masked = {name: masking.value(value, name, name) if name in _ROOTS else value for name, value in body.items()}
    return masked, masking.count


def is_out(before: Turn, after: Turn) -> bool:
    """Whether nothing personal of a turn is still there after it was masked; both were read in the same way."""
    said, left = list(_texts(before)), list(_texts(after))
    return len(said) == len(left) and all(map(_is_out, said, left))


def _is_out(before: str, after: str) -> bool:
    return len(before) == len(after) and not any(
        before[one.start : one.end] == after[one.start : one.end] != one.mask for one in find(before)
    )


def _texts(turn: Turn) -> Iterator[str]:
    yield turn.content
    yield turn.reasoning
    for call in turn.tool_calls:
        yield call.arguments


def _all(paths: Collection[str]) -> frozenset[str]:
    return frozenset(path for one in paths for path in _single(one))


def _single(path: str) -> Iterator[str]:
    """The paths that a path is which names several."""
    several = _RANGE.fullmatch(path)
    if several is None:
        yield path
        return
    yield from (f"{several[1]}[{number}]" for number in range(int(several[2]), int(several[3]) + 1))


class _Masking:
    def __init__(self, spared: frozenset[str], taken_out: frozenset[str]) -> None:
        self.count = 0
        self._spared = spared
        self._taken_out = taken_out

    def value(self, value: Any, path: str, name: str, *, text: bool = False) -> Any:
        """A value with its texts masked; ``text``: a string here is a text, whatever it looks like."""
        if path in self._spared:
            return value
        if isinstance(value, str):
            plain = not text and path not in self._taken_out and _is_no_text(name, value)
            return value if plain else self._mask(value)
        if isinstance(value, list):
            return [self.value(one, f"{path}[{index}]", name) for index, one in enumerate(value)]
        if isinstance(value, dict):
            if name in _STRUCTURED and path.endswith(f".{name}"):
                return json.loads(self._mask(json.dumps(value, ensure_ascii=False)))
            plain_text = value.get("type") == "text"
            return {
                key: self.value(one, f"{path}.{key}", key, text=plain_text and key == "data")
                for key, one in value.items()
            }
        return value

    def _mask(self, text: str) -> str:
        masked, count = mask(text)
        self.count += count
        return masked


def _is_no_text(name: str, value: str) -> bool:
    """Whether a string is a word for programs, encoded data, or a file."""
    if name in _FOR_PROGRAMS:
        return _WORD.fullmatch(value) is not None
    if name in _ENCODED_FIELDS or (name == "result" and len(value) >= _LONG):
        return _ENCODED.fullmatch(value) is not None
    return name in _FILES or _DATA.fullmatch(value) is not None
