"""What the gateway's benchmarks let a model say, and the dummy upstream that says it.

Every answer follows from its number, so that the client knows each byte that is due. How a request is to be answered
stands in its ``user``, which every gateway passes on: ``TAG/PACE/WORDS``. The tag names the exchange, so that the
clock's time at which each chunk was written can be asked for afterwards (``GET /stamps``), whatever a gateway does to
the chunks themselves; the pace is in words per second, 0 for as fast as can be.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tidegate.gateway.demo import DEMO_ANSWERS

WORDS = 60
"""Words of an answer, where nothing else is said."""
SENTENCES = (
    "Bread needs flour, water, salt and a little patience.",
    "The train to the coast leaves at nine in the morning.",
    "Plant the tomatoes where they get sun for half of the day.",
    "A good map shows the paths that people really use.",
    "The museum opens late on Thursdays, and the garden is free.",
    "Write down three things that went well this week.",
    "Boil the pasta in plenty of water and keep a cup of it.",
    "The old bridge was built of stone from the hills nearby.",
    "Most birds in this forest are easier to hear than to see.",
    "Take a warm jacket, because the evenings by the lake are cool.",
    "A bicycle chain lasts longer when it is clean and oiled.",
    "The library lends out tools as well as books.",
    "Start with the corners of the puzzle, then sort the pieces by colour.",
    "Our neighbours grow beans along the fence every summer.",
    "Let the paint dry for a day before you hang the picture.",
    "The recipe asks for two eggs and a spoon of honey.",
)
TURN = next(answer for answer in DEMO_ANSWERS if "hateful" in answer.about).content.partition("\n\n")[2]
_WORD = re.compile(r"\s*\S+")
_NUMBER = re.compile(r"number (\d+)")


@dataclass(frozen=True, slots=True)
class Order:
    """How a request is to be answered; see the module's text."""

    tag: str
    pace: float = 0.0
    words: int = WORDS

    def __str__(self) -> str:
        return f"{self.tag}/{self.pace:g}/{self.words}"

    @classmethod
    def read(cls, text: str) -> Order:
        tag, pace, words = text.split("/")
        return cls(tag, float(pace), int(words))


def turns_abusive(number: int) -> bool:
    """Whether this answer turns abusive in its middle, as every fourth of ordinary length does."""
    return number % 4 == 3


def answer(number: int, words: int = WORDS) -> list[str]:
    """The words of one written answer."""
    rng = random.Random(number)
    found: list[str] = []
    while len(found) < words:
        text = " ".join(rng.sample(SENTENCES, len(SENTENCES)))
        found += _WORD.findall(f" {text}" if found else text)
    if turns_abusive(number) and words == WORDS:
        return [*found[: WORDS // 2], *_WORD.findall(" " + TURN)[: WORDS - WORDS // 2]]
    return found[:words]


def prompt(number: int) -> str:
    return f"Please write answer number {number}."


def request(number: int, order: Order, *, stream: bool, model: str = "bench") -> bytes:
    """The body of a request for an answer."""
    turns = [{"role": "user", "content": prompt(number)}]
    return json.dumps({"model": model, "stream": stream, "messages": turns, "user": str(order)}).encode()


class Upstream:
    """An ASGI app that answers as it is ordered to."""

    def __init__(self) -> None:
        self._stamps: dict[str, list[int]] = {}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await _live(receive, send)
        elif scope["path"] == "/stamps":
            stamps, self._stamps = self._stamps, {}
            await _say(send, stamps)
        elif scope["method"] == "POST":
            await self._answer(receive, send)
        else:
            await _say(send, {"object": "list", "data": [{"id": "bench", "object": "model"}]})

    async def _answer(self, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        asked = json.loads(body)
        content = asked["messages"][-1]["content"]
        found = _NUMBER.search(content if isinstance(content, str) else content[0]["text"])
        assert found is not None
        order = Order.read(asked["user"])
        words = answer(int(found[1]), order.words)
        if not asked.get("stream"):
            await _say(send, completion("".join(words)))
            return
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        stamps = self._stamps[order.tag] = []
        if await _paced(words, order.pace, stamps, receive, send):
            stamps.append(time.monotonic_ns())
            end = _chunk("", '"stop"') + b"data: [DONE]\n\n"
            await send({"type": "http.response.body", "body": end, "more_body": False})


async def _live(receive: Any, send: Any) -> None:
    while True:
        event = (await receive())["type"]
        await send({"type": f"{event}.complete"})
        if event == "lifespan.shutdown":
            return


async def _say(send: Any, value: Any) -> None:
    body = json.dumps(value).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _paced(words: Sequence[str], pace: float, stamps: list[int], receive: Any, send: Any) -> bool:
    """Send the words as they become due; returns whether the other side is still there at the end."""
    gone = asyncio.ensure_future(receive())
    start = time.monotonic()
    try:
        for place, word in enumerate(words):
            wait = start + place / pace - time.monotonic() if pace else 0.0
            if wait > 0 or not pace:
                await asyncio.sleep(wait)
            if gone.done():
                return False
            stamps.append(time.monotonic_ns())
            await send({"type": "http.response.body", "body": _chunk(word, "null"), "more_body": True})
    finally:
        gone.cancel()
    return True


def completion(text: str) -> dict[str, Any]:
    """A whole answer."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 8, "completion_tokens": 60, "total_tokens": 68}
    head = {"id": "chatcmpl-bench", "object": "chat.completion", "created": 1_700_000_000, "model": "bench"}
    return {**head, "choices": [choice], "usage": usage}


def _chunk(word: str, finish_reason: str) -> bytes:
    delta = json.dumps({"content": word} if word else {}, ensure_ascii=False)
    return (
        'data: {"id":"chatcmpl-bench","object":"chat.completion.chunk","created":1700000000,"model":"bench",'
        f'"choices":[{{"index":0,"delta":{delta},"finish_reason":{finish_reason}}}]}}\n\n'
    ).encode()
