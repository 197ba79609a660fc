"""Personal data that has a form: where it stands in a text, also in one that is still being written, and masks for it.

What is found goes by form: e-mail addresses, phone and card numbers, IBANs, network addresses, national ids with
letters, long runs of digits, keys, and URLs that carry a password or a token. It prefers to take too much. It cannot
see names, postal addresses, or numbers that are spelled out.

How a text is looked at. It falls into *runs*, and nothing personal goes across two of them: a run is one word, or
several with at most three blanks between them that could be parts of one number (they have digits, or are up to four
capital letters, or only signs). A line break, and every sign of a script that sets no blanks between words, ends a run,
and so does its length: `LONGEST_RUN` characters. Where the runs are follows from the text alone, so that a text in
pieces has the same runs as the whole, and is held no longer than to the end of its last run.

There are two masks. ``[email]`` is for what is kept. For text that goes on to a reader or a model, the mask keeps the
form: digits become 9, letters x, and everything else stays, so that the text is as long as before, and JSON stays JSON
(no digit becomes 0: a number in JSON must not begin with it).

Check numbers are those of python-stdnum. Every expression here takes time linear in the text, whatever the text is,
because no run is long. Pure: no clock, no network, no disk.
"""

from __future__ import annotations

import datetime
import ipaddress
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Final

from stdnum import iban, luhn
from stdnum.es import dni, nie
from stdnum.fi import hetu
from stdnum.ie import pps
from stdnum.it import codicefiscale
from stdnum.mx import curp
from stdnum.us import ssn

__all__ = ["LONGEST_RUN", "Finder", "Found", "find", "mask", "words"]

LONGEST_RUN: Final = 512
"""Characters of a run: what is longer is looked at in parts of so many."""


@dataclass(frozen=True, slots=True)
class Found:
    """Something personal.

    Attributes:
        start: its first character.
        end: the character behind it.
        kind: ``url``, ``email``, ``iban``, ``mac``, ``ip``, ``id``, ``key``, ``card``, ``phone`` or ``number``.
        mask: what can stand in its place: as long, and of the same form.
    """

    start: int
    end: int
    kind: str
    mask: str


def find(text: str) -> tuple[Found, ...]:
    """Everything personal in a text, in its order; nothing overlaps."""
    runs, _ = _runs(text, complete=True)
    return tuple(found for start, end in runs for found in _find(text[start:end], start))


def words(text: str) -> str:
    """The text with everything personal replaced by its kind in square brackets, as ``[email]``."""
    return _replaced(text, lambda found: f"[{found.kind}]")


def mask(text: str) -> tuple[str, int]:
    """The text with everything personal masked, as long as before, and how many places that were."""
    found = find(text)
    return _replaced(text, lambda one: one.mask, found), len(found)


class Finder:
    """Finds the same in a text that arrives in pieces.

    Attributes:
        settled: so many characters belong to runs that are complete: nothing more will be found in them.
    """

    def __init__(self) -> None:
        self.settled = 0
        self._open = ""

    def feed(self, text: str) -> tuple[Found, ...]:
        """Take more text; what was found in the runs that it completes, counted from the beginning of the text."""
        return self._take(text, complete=False)

    def finish(self) -> tuple[Found, ...]:
        """The text is complete; what was found in its last run."""
        return self._take("", complete=True)

    def _take(self, text: str, *, complete: bool) -> tuple[Found, ...]:
        text = self._open + text
        runs, settled = _runs(text, complete=complete)
        found = tuple(one for start, end in runs for one in _find(text[start:end], self.settled + start))
        self._open = text[settled:]
        self.settled += settled
        return found


def _replaced(text: str, by: Callable[[Found], str], found: tuple[Found, ...] | None = None) -> str:
    parts: list[str] = []
    end = 0
    for one in find(text) if found is None else found:
        parts += (text[end : one.start], by(one))
        end = one.end
    return "".join((*parts, text[end:]))


# --- runs ---------------------------------------------------------------------------------------------------------

_UNSPACED: Final = (
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u2e80-\ua4cf\uac00-\ud7af\uf900-\ufaff\ufe30-\ufe4f\uff00-\uffef"
    "\U0001f000-\U0001faff\U00020000-\U0003ffff]"
)
"""Scripts without blanks between words, their punctuation, and pictures; their digits are digits all the same."""
_SIGN: Final = rf"(?![\d\uff21-\uff3a\uff41-\uff5a]){_UNSPACED}"
_ATOM: Final = re.compile(rf"(?P<blank>\s+)|(?P<sign>{_SIGN})|(?P<word>(?:(?!{_SIGN})\S){{1,{LONGEST_RUN}}})")
_PART: Final = re.compile(r".*\d.*|[A-Z]{1,4}|[^\w\s]{1,3}", re.DOTALL)


def _runs(text: str, *, complete: bool) -> tuple[list[tuple[int, int]], int]:
    """The runs of a text that starts with one, and how many characters they and what lies between them have.

    When more text may follow, the last run is left out as long as that text could become part of it.
    """
    runs: list[tuple[int, int]] = []
    start = end = -1
    joins = False
    for atom in _ATOM.finditer(text):
        kind, (at, to) = atom.lastgroup, atom.span()
        grows = not complete and to == len(text)
        if kind == "word":
            part = _PART.fullmatch(text, at, to) is not None
            if grows and to - at < LONGEST_RUN:
                if start >= 0 and (not joins or to - start > LONGEST_RUN):
                    runs.append((start, end))
                    start = at
                return runs, at if start < 0 else start
            if start >= 0 and joins and part and at > end and to - start <= LONGEST_RUN:
                end = to
                continue
            if start >= 0:
                runs.append((start, end))
            start, end, joins = at, to, part
        elif start >= 0:
            if kind == "blank" and joins and to - at <= _WIDEST and "\n" not in atom.group():
                if grows:
                    return runs, start
                continue
            runs.append((start, end))
            start = -1
    if start >= 0:
        runs.append((start, end))
    return runs, len(text)


_WIDEST: Final = 3


# --- what is found in a run ---------------------------------------------------------------------------------------

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
_ID: Final = re.compile(r"(?<![\w-])[0-9A-Za-z](?:[+-]?[0-9A-Za-z]){7,19}(?![\w-])")
_KEY: Final = re.compile(r"(?<![\w-])[A-Za-z0-9_-]{24,}(?![\w-])")
_DIGITS: Final = re.compile(r"(?<!\d)\+?\(?\d(?:[ \t\u00a0\u2009\u202f().\-/]{0,3}\d){6,}")
_DATE: Final = re.compile(r"(\d{4})([-./])(\d{1,2})\2(\d{1,2})|(\d{1,2})([-./])(\d{1,2})\6(\d{4})")
_IDS: Final[Mapping[int, tuple[ModuleType, ...]]] = {
    8: (pps,),
    9: (dni, nie, pps),
    10: (hetu,),
    11: (hetu,),
    16: (codicefiscale,),
    18: (curp,),
}
"""National ids with letters in them, by how many letters and digits: those without letters are long runs of digits."""
_TAKEN: Final = "\ufffc"
"""Stands where something was found already: part of no expression."""


def _find(run: str, offset: int) -> Iterator[Found]:
    """What is found in one run. Earlier expressions come before later ones, and what they take is taken."""
    if len(run) < _SHORTEST or not _CANDIDATE.search(run):
        return
    found: list[tuple[int, int, str]] = []
    left = run
    for pattern, take in _STEPS:
        for match in pattern.finditer(left):
            taken = take(match.group())
            if taken is not None:
                kind, length = taken
                found.append((match.start(), match.start() + length, kind))
                left = left[: match.start()] + _TAKEN * length + left[match.start() + length :]
    for start, end, kind in sorted(found):
        yield Found(offset + start, offset + end, kind, _masked(run, start, end))


_SHORTEST: Final = 3
_CANDIDATE: Final = re.compile(r"\d|@|::|://|[0-9A-Fa-f]:")


def _masked(run: str, start: int, end: int) -> str:
    """The mask of a part of a run. What a backslash makes of the letter behind it stays: it may be JSON."""
    out: list[str] = []
    place = start
    while place < end:
        sign = run[place]
        if sign in "bfnrtu" and (len(run[:place]) - len(run[:place].rstrip("\\"))) % 2:
            escape = _ESCAPE.match(run, place, end)
            out.append("u0078" if escape else sign if sign != "u" else "x")
            place += 5 if escape else 1
            continue
        out.append(_mask_of(sign))
        place += 1
    return "".join(out)


_ESCAPE: Final = re.compile("u[0-9A-Fa-f]{4}")


def _mask_of(sign: str) -> str:
    if sign.isdecimal():
        return "9"
    if sign.isalpha():
        return "X" if sign.isupper() else "x"
    return sign if sign.isascii() or sign.isspace() else "x"


Taken = tuple[str, int] | None
"""Of which kind it is, and how many characters of it; None when it is nothing after all."""


def _url(text: str) -> Taken:
    return ("url", len(text)) if _URL_LOGIN.search(text) or _URL_TOKEN.search(text) else None


def _iban(text: str) -> Taken:
    """The longest part from the start that is an IBAN: only where the check number fits is it looked at closely."""
    head, rest, ends = 0, 0, []
    for place, sign in enumerate(text):
        if sign.isalnum():
            value = int(sign, 36)
            if place < _IBAN_HEAD:
                head = head * (100 if value > 9 else 10) + value
                continue
            rest = (rest * (100 if value > 9 else 10) + value) % 97
            if place >= _SHORTEST_IBAN - 1 and (rest * 1_000_000 + head) % 97 == 1:
                ends.append(place + 1)
    return next((("iban", end) for end in reversed(ends) if iban.is_valid(text[:end], check_country=False)), None)


_IBAN_HEAD: Final = 4
_SHORTEST_IBAN: Final = 15


def _address(text: str) -> Taken:
    bare = text.rstrip(".:" if not text.endswith("::") else ".")
    if bare.count(":") < 2 and bare.count(".") != 3:
        return None
    try:
        ipaddress.ip_address(bare)
    except ValueError:
        return None
    return "ip", len(bare)


def _ipv4(text: str) -> Taken:
    return ("ip", len(text)) if all(int(part) <= 255 for part in text.split(".")) else None


def _id(text: str) -> Taken:
    if text.isalpha() or not any(sign.isalpha() for sign in text):
        return None
    known = _IDS.get(sum(map(str.isalnum, text)), ())
    return ("id", len(text)) if any(module.is_valid(text) for module in known) else None


def _key(text: str) -> Taken:
    if _EXPONENT.fullmatch(text):  # in JSON, it must stay one
        return None
    digits = sum(sign.isdigit() for sign in text)
    return ("key", len(text)) if 3 <= digits < len(text) else None


_EXPONENT: Final = re.compile(r"\d+[eE]-?\d+")


def _number(text: str) -> Taken:
    if _is_date(text):
        return None
    digits = "".join(sign for sign in text if sign.isdecimal())
    if 13 <= len(digits) <= 19 and luhn.is_valid("".join(str(int(digit)) for digit in digits)):
        return "card", len(text)
    if _SSN.fullmatch(text) and ssn.is_valid(text):
        return "id", len(text)
    if len(digits) <= 15 and (text[0] in "+(0" or len(digits) < len(text)):
        return "phone", len(text)
    return "number", len(text)


_SSN: Final = re.compile(r"[0-9]{3}-[0-9]{2}-[0-9]{4}")


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


_STEPS: Final[tuple[tuple[re.Pattern[str], Callable[[str], Taken]], ...]] = (
    (_URL, _url),
    (_EMAIL, lambda text: ("email", len(text))),
    (_IBAN_START, _iban),
    (_MAC, lambda text: ("mac", len(text))),
    (_IPV4, _ipv4),
    (_IPV6, _address),
    (_ID, _id),
    (_KEY, _key),
    (_DIGITS, _number),
)
