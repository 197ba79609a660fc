"""Ask the upstream one thing and read its answer as text: what the playground needs of a chat completion."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from tidegate.errors import UpstreamError
from tidegate.gateway.deltas import Known, Parts, take_apart
from tidegate.gateway.sse import EventReader
from tidegate.gateway.upstream import Upstream, UpstreamAnswer

__all__ = ["Asking"]


class Asking:
    """Asks one upstream; the model is the first that it lists.

    Args:
        upstream: its own, not open yet; it is opened by the first question, and closed by `close`.
    """

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self._open = False
        self._model: str | None = None

    async def close(self) -> None:
        """Close the connections to the upstream."""
        await self._upstream.close()

    async def ask(self, prompt: str) -> AsyncGenerator[str, None]:
        """The text of the answer as it comes. Closing the generator cancels the request.

        Raises:
            UpstreamError: when the upstream cannot be reached, refuses, or answers something malformed.
        """
        if not self._open:
            self._open = True
            await self._upstream.open()
        if self._model is None:
            self._model = await self._first_model()
        body = {"model": self._model, "stream": True, "messages": [{"role": "user", "content": prompt}]}
        request = self._upstream.request("POST", "/chat/completions", body=json.dumps(body).encode())
        async with request as answer:
            await _expect_success(answer)
            events = _events(answer)
            async with aclosing(events):
                async for event in events:
                    if text := _text(event):
                        yield text

    async def _first_model(self) -> str:
        async with self._upstream.request("GET", "/models") as answer:
            await _expect_success(answer)
            match await answer.json():
                case {"data": [{"id": str(name)}, *_]}:
                    return name
        raise UpstreamError("the upstream lists no model")


async def _expect_success(answer: UpstreamAnswer) -> None:
    if answer.status != 200:
        raise UpstreamError((await answer.problem()).message, status=answer.status)


async def _events(answer: UpstreamAnswer) -> AsyncGenerator[Any, None]:
    reader = EventReader()
    async for piece in answer.pieces():
        for data in reader.feed(piece):
            if data == b"[DONE]":
                return
            yield _parsed(data)
    for data in reader.finish():
        if data != b"[DONE]":
            yield _parsed(data)
    raise UpstreamError("the upstream broke off before the end of its answer")


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise UpstreamError("the upstream sent an event that is not JSON") from None


def _text(event: Any) -> str:
    match event:
        case {"choices": [{"delta": {"content": content}}, *_]}:
            parts = Parts()
            take_apart({"content": content}, Known(frozenset(), frozenset()), parts)
            text = "".join(part.text for part in parts.texts if part.slot == ("content",))
            return text.encode("utf-8", "replace").decode()
        case {"error": error} if error:
            raise UpstreamError("the upstream reported an error in the middle of its answer")
    return ""
