"""How the choices of an answer are written: as deltas and messages (chat), or as texts (completions)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Final, Protocol

from tidegate.gateway.deltas import CHAT_TEXTS, COMPLETION_TEXTS
from tidegate.gateway.logprobs import ChatTokens, CompletionTokens, Tokens
from tidegate.types import Channel

__all__ = ["CHAT", "COMPLETION", "Form"]


class Form(Protocol):
    """One way to write choices.

    Attributes:
        called: what a whole answer is called in errors.
        texts: the fields of a choice that are texts, and what each is.
    """

    called: ClassVar[str]
    texts: ClassVar[Mapping[str, Channel]]

    def tokens(self, *, passing: bool) -> Tokens:
        """What holds the log probabilities of a choice."""
        ...

    def split(self, choice: Mapping[str, Any], *, whole: bool) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        """The part of a choice that has its texts, None when there is none, and the other fields.

        The index, the finish_reason and the log probabilities are in neither.
        """
        ...

    def chunk(self, index: int, texts: dict[str, Any], rest: dict[str, Any], finish_reason: str | None) -> Any:
        """A choice of a stream."""
        ...

    def whole(self, kept: dict[str, Any], texts: dict[str, Any]) -> dict[str, Any]:
        """A choice of a whole answer."""
        ...

    def saying(self, message: str) -> dict[str, Any]:
        """The part with the texts, when all that is said is this."""
        ...


_APART: Final = frozenset(("index", "finish_reason", "logprobs"))


class _Chat:
    called: ClassVar[str] = "a chat completion"
    texts: ClassVar[Mapping[str, Channel]] = CHAT_TEXTS

    def tokens(self, *, passing: bool) -> Tokens:
        return ChatTokens(passing=passing)

    def split(self, choice: Mapping[str, Any], *, whole: bool) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        inner = "message" if whole else "delta"
        texts = choice.get(inner) or (None if whole else {})
        rest = {name: value for name, value in choice.items() if name != inner and name not in _APART}
        return (texts if isinstance(texts, dict) else None), rest

    def chunk(self, index: int, texts: dict[str, Any], rest: dict[str, Any], finish_reason: str | None) -> Any:
        return {"index": index, "delta": texts, **rest, "finish_reason": finish_reason}

    def whole(self, kept: dict[str, Any], texts: dict[str, Any]) -> dict[str, Any]:
        return {**kept, "message": texts}

    def saying(self, message: str) -> dict[str, Any]:
        return {"role": "assistant", "content": message}


class _Completion:
    called: ClassVar[str] = "a completion"
    texts: ClassVar[Mapping[str, Channel]] = COMPLETION_TEXTS

    def tokens(self, *, passing: bool) -> Tokens:
        return CompletionTokens(passing=passing)

    def split(self, choice: Mapping[str, Any], *, whole: bool) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        texts = {name: value for name, value in choice.items() if name in self.texts}
        rest = {name: value for name, value in choice.items() if name not in texts and name not in _APART}
        return (texts if "text" in texts or not whole else None), rest

    def chunk(self, index: int, texts: dict[str, Any], rest: dict[str, Any], finish_reason: str | None) -> Any:
        return {"index": index, "text": "", **texts, **rest, "finish_reason": finish_reason}

    def whole(self, kept: dict[str, Any], texts: dict[str, Any]) -> dict[str, Any]:
        return {**kept, "text": "", **texts}

    def saying(self, message: str) -> dict[str, Any]:
        return {"text": message}


CHAT: Final[Form] = _Chat()
COMPLETION: Final[Form] = _Completion()
