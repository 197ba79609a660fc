"""Log probabilities of an answer's tokens: those of chosen tokens leave together with the text that they spell.

A chosen token says nothing that the judged text does not say, so it is held as long as the text, and leaves when all of
its bytes have left. That it spells the text is checked, byte by byte; from the first token that does not, the rest is
dropped. Other tokens (``top_logprobs``) are words that nobody judged: the policy says what becomes of them.

`ChatTokens` and `CompletionTokens` know the two forms that OpenAI's API has for choices. `TextTokens` are those of one
text, listed as chat completions list them: the form of responses. No sockets.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Final, NamedTuple, Protocol

from tidegate.gateway.deltas import Parts, Slot
from tidegate.gateway.schemas import is_name, mended

__all__ = ["ChatTokens", "CompletionTokens", "TextTokens", "Tokens", "spelled"]

_NAME: Final = "logprobs"
_TOP: Final = "logprobs.top_logprobs"
_KNOWN: Final = ("token", "logprob", "bytes")
_HEX: Final = re.compile(r"bytes:((?:\\x[0-9a-fA-F]{2})+)")
_STANDS_FOR_BYTES: Final = re.compile(r"(bytes:)?(\\x[0-9a-fA-F]{2})+|token_id:\d{1,9}|�+")
"""What stands in the place of a token that is no text by itself."""


class _Token(NamedTuple):
    """One chosen token: what it can spell, how it is told, and how many characters it has."""

    spells: tuple[bytes, ...]
    told: Any
    characters: int


class _Spelled:
    """The tokens of one text."""

    __slots__ = ("_end", "_ready", "_released", "_text", "_waiting", "broken", "silent")

    def __init__(self) -> None:
        self.broken = False
        self.silent = False
        self._text = bytearray()
        self._waiting: deque[_Token] = deque()
        self._ready: deque[tuple[int, Any]] = deque()
        self._end = 0
        self._released = 0

    def add(self, text: str, tokens: Iterable[_Token]) -> None:
        """Take what came in one piece."""
        if self.silent:
            return
        self._text += text.encode("utf-8", "replace")
        self._waiting.extend(tokens)
        while self._waiting and not self.broken:
            token = self._waiting[0]
            spelled = next((one for one in token.spells if self._text.startswith(one)), None)
            if spelled is None:
                self.broken = not any(one.startswith(self._text) for one in token.spells)
                return
            del self._text[: len(spelled)]
            self._end += len(spelled)
            self._ready.append((self._end, token.told))
            self._waiting.popleft()

    def skip(self, text: str) -> None:
        """Text that comes without tokens, before the first of them."""
        self._end += _size_of(text)

    def silence(self) -> None:
        """Nothing more is said."""
        self.silent = True
        self._waiting.clear()
        self._ready.clear()

    def release(self, text: str) -> None:
        """So much of the text leaves now."""
        self._released += _size_of(text)

    def take(self) -> Iterator[Any]:
        """The tokens whose text has left."""
        while self._ready and self._ready[0][0] <= self._released:
            yield self._ready.popleft()[1]

    def go_on(self) -> None:
        """What has not left was thrown away: other text follows what has."""
        self._text.clear()
        self._waiting.clear()
        self._ready.clear()
        self._end = self._released
        self.broken = False

    def dropped(self) -> int:
        """Give up what does not spell the text; returns how many characters that is."""
        count = sum(token.characters for token in self._waiting)
        self._waiting.clear()
        return count


def _size_of(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "replace"))


class Tokens(Protocol):
    """The tokens of one choice. ``told`` is what the upstream says in ``logprobs``."""

    def take(self, told: Any, texts: Mapping[Slot, str], parts: Parts) -> Any:
        """Take what came in one piece, with the piece's texts; returns the frame in which tokens go out with it."""
        ...

    def release(self, slot: Slot, text: str) -> None:
        """So much of a text leaves now."""
        ...

    def out(self, frame: Any) -> Any:
        """What goes out now in a frame; None when that is nothing."""
        ...

    def silence(self) -> None:
        """The text that leaves is not what these tokens spell: no more of them go out."""
        ...

    def go_on(self) -> None:
        """What has not left was thrown away: other text follows what has."""
        ...

    def close(self, parts: Parts) -> None:
        """No more comes: what never spelled anything is dropped."""
        ...


class _ByText:
    """What both forms share: a `_Spelled` for each text that has tokens."""

    slots: ClassVar[tuple[Slot, ...]] = ()

    def __init__(self, *, passing: bool = False) -> None:
        self._passing = passing
        self._begun = False
        self._spelled = {slot: _Spelled() for slot in self.slots}

    def _add(self, tokens: Mapping[Slot, list[_Token]], texts: Mapping[Slot, str]) -> None:
        self._begun = self._begun or any(tokens.values())
        for slot, spelled in self._spelled.items():
            if self._begun:
                spelled.add(texts.get(slot, ""), tokens.get(slot, ()))
            elif slot in texts:
                spelled.skip(texts[slot])

    def release(self, slot: Slot, text: str) -> None:
        if slot in self._spelled:
            self._spelled[slot].release(text)

    def silence(self) -> None:
        for spelled in self._spelled.values():
            spelled.silence()

    def go_on(self) -> None:
        for spelled in self._spelled.values():
            spelled.go_on()

    def close(self, parts: Parts) -> None:
        count = sum(spelled.dropped() for spelled in self._spelled.values())
        if count:
            parts.count(_NAME, count)


class ChatTokens(_ByText):
    """``{"content": [{"token", "logprob", "bytes", "top_logprobs"}], "refusal": ...}``."""

    slots: ClassVar[tuple[Slot, ...]] = (("content",), ("refusal",))

    def take(self, told: Any, texts: Mapping[Slot, str], parts: Parts) -> Any:
        tokens: dict[Slot, list[_Token]] = {}
        frame: dict[str, Any] | None = None
        if isinstance(told, dict):
            frame = {}
            for name, value in told.items():
                slot: Slot = (name,)
                if slot not in self._spelled or not isinstance(value, list | None):
                    parts.drop(name, value, f"{_NAME}.")
                    continue
                frame[name] = None if value is None else []
                tokens[slot] = self._tokens(value or [], parts)
        elif told is not None:
            parts.drop(_NAME, told)
        self._add(tokens, texts)
        return frame

    def out(self, frame: Any) -> Any:
        if frame is None and not self._begun:
            return None
        told = dict(frame or {})
        for (name,), spelled in self._spelled.items():
            taken = list(spelled.take())
            if taken:
                told[name] = taken
        return told if told or frame is not None else None

    def _tokens(self, listed: list[Any], parts: Parts) -> list[_Token]:
        return [self._token(one, parts) for one in listed]

    def _token(self, told: Any, parts: Parts) -> _Token:
        if not isinstance(told, dict) or not isinstance(told.get("token"), str):
            return _Token((), None, parts.weigh(told))
        token, spelled = mended(told["token"]), told.get("bytes")
        kept: dict[str, Any] = {}
        for name, value in told.items():
            if name == "token":
                kept[name] = token
            elif name == "bytes":
                kept[name] = spelled
            elif name == "top_logprobs" and isinstance(value, list):
                kept[name] = list(self._alternatives(value, told, parts))
            elif is_name(name) and (value is None or isinstance(value, int | float)):
                kept[name] = value
            else:
                parts.drop(name, value, f"{_NAME}.")
        return _Token(_spellings(token, spelled), kept, len(token))

    def _alternatives(self, listed: list[Any], chosen: Mapping[str, Any], parts: Parts) -> Iterator[Any]:
        for other in listed:
            is_chosen = isinstance(other, dict) and _same(other, chosen)
            kept = {name: other[name] for name in _KNOWN if name in other} if is_chosen else {}
            rest = other
            if isinstance(other, dict):  # the bytes say the same as the token
                rest = {name: value for name, value in other.items() if name not in kept and name != "bytes"}
            if weight := parts.weigh(rest):
                parts.count(_TOP, weight)
            if is_chosen or self._passing:
                yield other if self._passing else kept


class TextTokens(ChatTokens):
    """``[{"token", "logprob", "bytes", "top_logprobs"}]`` of one text.

    Attributes:
        left: those that have left.
    """

    slots: ClassVar[tuple[Slot, ...]] = (("text",),)

    def __init__(self, *, passing: bool = False) -> None:
        super().__init__(passing=passing)
        self.left: list[Any] = []

    @property
    def _of_text(self) -> _Spelled:
        return self._spelled["text",]

    def read(self, listed: list[Any], parts: Parts) -> list[_Token]:
        """What passes of tokens once their text has left; the rest is counted."""
        return self._tokens(listed, parts)

    def add(self, tokens: list[_Token], text: str) -> None:
        """Take what came in one piece."""
        self._add({("text",): tokens}, {("text",): text})

    def leave(self, text: str) -> list[Any]:
        """So much of the text leaves now; returns the tokens that leave with it."""
        self._of_text.release(text)
        taken = list(self._of_text.take())
        self.left += taken
        return taken


def spelled(listed: list[Any], text: str, parts: Parts) -> list[Any]:
    """What of a list of tokens, in the form of chat completions, spells a text that leaves with it in one piece."""
    tokens = TextTokens(passing=parts.passing)
    tokens.add(tokens.read(listed, parts), text)
    tokens.close(parts)
    return tokens.leave(text)


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    number = one.get("logprob")
    return (
        one.get("token") == other["token"]
        and one.get("bytes") == other.get("bytes")
        and (number is None or isinstance(number, int | float))
    )


def _spellings(token: str, spelled: Any) -> tuple[bytes, ...]:
    """The bytes that a token can stand for; () when what is told of them does not hold together."""
    itself = token.encode()
    if spelled is None:
        known = _HEX.fullmatch(token)
        return (itself, bytes.fromhex(known[1].replace("\\x", ""))) if known else (itself,)
    if not isinstance(spelled, list) or not all(type(one) is int and 0 <= one <= 255 for one in spelled):
        return ()
    data = bytes(spelled)
    return (data,) if data == itself or _STANDS_FOR_BYTES.fullmatch(token) else ()


class CompletionTokens(_ByText):
    """``{"tokens": [...], "token_logprobs": [...], "top_logprobs": [{token: logprob}], "text_offset": [...]}``."""

    slots: ClassVar[tuple[Slot, ...]] = (("text",),)
    _COLUMNS: ClassVar = ("tokens", "token_logprobs", "top_logprobs", "text_offset")

    def take(self, told: Any, texts: Mapping[Slot, str], parts: Parts) -> Any:
        tokens: list[_Token] = []
        frame: dict[str, Any] | None = None
        if isinstance(told, dict):
            frame = {}
            for name, value in told.items():
                if name in self._COLUMNS and isinstance(value, list | None):
                    frame[name] = None if value is None else []
                else:
                    parts.drop(name, value, f"{_NAME}.")
            tokens = list(self._rows({name: told[name] or [] for name in frame}, parts))
        elif told is not None:
            parts.drop(_NAME, told)
        self._add({("text",): tokens}, texts)
        return frame

    def go_on(self) -> None:
        """No more of them go out: ``text_offset`` of what follows would count from another beginning."""
        self.silence()

    def _rows(self, columns: Mapping[str, list[Any]], parts: Parts) -> Iterator[_Token]:
        others = {name: values for name, values in columns.items() if name != "tokens" and values}
        for place, token in enumerate(columns.get("tokens", ())):
            row = {name: values[place] for name, values in others.items() if place < len(values)}
            if not isinstance(token, str):
                yield _Token((), None, parts.weigh(token))
                continue
            kept: dict[str, Any] = {"tokens": mended(token)}
            for name, value in row.items():
                if name == "top_logprobs" and isinstance(value, dict):
                    kept[name] = dict(self._alternatives(value, token, parts))
                elif value is None or isinstance(value, int | float):
                    kept[name] = value
                else:
                    parts.drop(name, value, f"{_NAME}.")
                    kept[name] = None
            yield _Token(_spellings(kept["tokens"], None), kept, len(token))

    def _alternatives(self, told: Mapping[str, Any], chosen: str, parts: Parts) -> Iterator[tuple[str, Any]]:
        for token, number in told.items():
            plain = number is None or isinstance(number, int | float)
            if token != chosen or not plain:
                parts.count(_TOP, len(token) + parts.weigh(number))
            if (token == chosen and plain) or self._passing:
                yield token, number

    def out(self, frame: Any) -> Any:
        rows = list(self._spelled["text",].take())
        if not rows:
            return frame
        names = list(dict.fromkeys((*(frame or ()), *(name for row in rows for name in row))))
        told = {name: [row.get(name) for row in rows] for name in names}
        return {name: None if all(value is None for value in values) else values for name, values in told.items()}
