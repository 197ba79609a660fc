"""JSON that arrives in pieces, with every letter as itself: what a guard reads is what a program will read.

A model can write ``b`` as ``\\u0062`` in the arguments of a call. Such escapes are undone in what is judged and in what
leaves alike, so that both are the same text; it stays the same JSON. Quotes, backslashes and control characters keep
theirs.
"""

from __future__ import annotations

import re
from typing import Final

from tidegate.gateway.schemas import mended

__all__ = ["unescaped", "wholly_unescaped"]

_COMPLETE: Final = re.compile(r"(?:[^\\]+|\\u[0-9a-fA-F]{4}|\\[^u])*", re.DOTALL)
_BEGUN: Final = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?")
_ESCAPE: Final = re.compile(r"\\(u[0-9a-fA-F]{4}|.)", re.DOTALL)


def unescaped(text: str) -> tuple[str, str]:
    """The text with its escapes undone, and the beginning of an escape at its end, which belongs before the next piece.

    What is no JSON stays as it is. Halves of surrogate pairs come out as such.
    """
    if "\\" not in text:
        return text, ""
    done = []
    at = 0
    while at < len(text):
        match = _COMPLETE.match(text, at)
        assert match is not None
        done.append(_ESCAPE.sub(_letter, match.group()))
        at = match.end()
        if _BEGUN.fullmatch(text, at):
            return "".join(done), text[at:]
        done.append(text[at : at + 2])  # an escape that there is not
        at += 2
    return "".join(done), ""


def wholly_unescaped(text: str) -> str:
    """The same of a text to which nothing comes any more: an escape that is not complete at its end stays as it is, and
    halves of surrogate pairs are joined, or replaced."""
    done, rest = unescaped(text)
    return mended(done + rest)


def _letter(escape: re.Match[str]) -> str:
    code = escape.group(1)
    if len(code) == 1:
        return escape.group()
    letter = chr(int(code[1:], 16))
    return escape.group() if letter in '"\\' or letter < " " or letter == "\x7f" else letter
