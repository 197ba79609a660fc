"""JSON that arrives in pieces, with every letter as itself: what a guard reads is what a program will read.

A model can write ``b`` as ``\\u0062`` in the arguments of a call. Such escapes are undone in what is judged and in what
leaves alike, so that both are the same text; it stays the same JSON. Quotes, backslashes and control characters keep
theirs.

`Undoing` does so for doors that say where something stands in the text as it was given.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from typing import Final

from tidegate.gateway.schemas import mended

__all__ = ["Undoing", "unescaped", "wholly_unescaped"]

_COMPLETE: Final = re.compile(r"(?:[^\\]+|\\u[0-9a-fA-F]{4}|\\[^u])*", re.DOTALL)
_BEGUN: Final = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?")
_WRITTEN: Final = re.compile(
    r"\\u[dD][89abAB][0-9a-fA-F]{2}(?:\\u[dD][c-fC-F][0-9a-fA-F]{2}|(?P<open>\Z))?|\\u[0-9a-fA-F]{4}|\\.", re.DOTALL
)
"""An escape that is complete, a pair of halves as one; ``open`` where the other half may still come."""
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


class Undoing:
    """One text that comes in pieces, its escapes undone as by `wholly_unescaped`, with the places that it had.

    Places are borders between characters: 0 is before the first one.

    Args:
        text: what is there already.
        whole: whether nothing comes after it.
    """

    def __init__(self, text: str = "", *, whole: bool = False) -> None:
        self._rest = ""
        self._here: list[int] = []
        self._there: list[int] = []
        self._length = self._read = 0
        self.text = self.feed(text)
        if whole:
            self.text += self.finish()

    def feed(self, text: str) -> str:
        """Take a piece that has no halves of surrogate pairs; returns what is now known of the text without escapes."""
        if not self._rest and "\\" not in text:
            self._length += len(text)
            self._read += len(text)
            return text
        return self._undo(self._rest + text, last=False)

    def finish(self) -> str:
        """No more comes; returns what waited for more."""
        return self._undo(self._rest, last=True)

    def given(self, place: int) -> int:
        """Where this place of the text without escapes was in the text that was given."""
        before = bisect_right(self._here, place) - 1
        return place if before < 0 else self._there[before] + place - self._here[before]

    def written(self, start: int, text: str) -> str:
        """What stands in the place of so many characters from there on, as long as they were in the text given."""
        return "".join(
            _written(letter, self.given(place + 1) - self.given(place)) for place, letter in enumerate(text, start)
        )

    def _undo(self, text: str, *, last: bool) -> str:
        end = len(text) - (0 if last else len(unescaped(text)[1]))
        done: list[str] = []
        at = 0
        for match in _WRITTEN.finditer(text, 0, end):
            if match.group("open") is not None and not last:
                end = match.start()
                break
            letter = _letters(match.group())
            if letter == match.group():
                continue
            before = text[at : match.start()]
            at = match.end()
            done += (before, letter)
            self._length += len(before) + len(letter)
            self._here.append(self._length)
            self._there.append(self._read + at)
        done.append(text[at:end])
        self._length += end - at
        self._read += end
        self._rest = text[end:]
        return "".join(done)


def _letters(escape: str) -> str:
    return mended(_ESCAPE.sub(_letter, escape))


def _written(letter: str, width: int) -> str:
    """A letter in so many characters of JSON text: 1, or 6 for each escape."""
    if width == 1:
        return letter
    units = letter.encode("utf-16-be")
    escapes = "".join(f"\\u{units[at : at + 2].hex()}" for at in range(0, len(units), 2))
    return escapes * (width // len(escapes))


def _letter(escape: re.Match[str]) -> str:
    code = escape.group(1)
    if len(code) == 1:
        return escape.group()
    letter = chr(int(code[1:], 16))
    return escape.group() if letter in '"\\' or letter < " " or letter == "\x7f" else letter
