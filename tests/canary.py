"""Texts that must turn up nowhere but where they belong, sent through every door of the gateway in every way.

A test that holds something free of user text runs `send_everywhere` and then looks for `CANARIES`.
"""

from __future__ import annotations

import contextlib
import json
from typing import Any, Final

import httpx
from starlette.applications import Starlette
from starlette.routing import Route
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect
from websockets.typing import Subprotocol

from tidegate.gateway.live_frames import PROTOCOL
from tidegate.testing import FakeUpstream, Reply, completion, text_chunks, text_completion

ASKED: Final = "canaryquestion"
ANSWERED: Final = "canaryanswer"
CANARIES: Final = (ASKED, ANSWERED)

_WORDS: Final = ("hello", "a bomb bomb", "guardfail")
"""Let through, blocked, and not judged, by the fake guard."""


def _bodies(text: str) -> dict[str, list[dict[str, Any]]]:
    turn = [{"role": "user", "content": text, ASKED: text}]
    return {
        "/v1/chat/completions": [
            {"model": "m", "messages": turn, "user": ASKED},
            {"model": "m", "messages": turn, "stream": True, "tools": [{"type": ASKED}]},
            {"model": f"m {ASKED}", "messages": turn},
            {"model": "m", "messages": [{"role": ASKED, "content": text}]},
        ],
        "/v1/completions": [
            {"model": "m", "prompt": text},
            {"model": "m", "prompt": text, "stream": True},
            {"model": "m", "prompt": {ASKED: text}},
        ],
        "/v1/responses": [{"model": "m", "input": text}, {"model": "m", "input": text, "stream": True}],
        "/v1/messages": [
            {"model": "m", "messages": turn, "max_tokens": 9},
            {"model": "m", "messages": turn, "max_tokens": 9, "stream": True},
        ],
        "/v1/responses/{rest:path}": [{"input": text}],
        "/v1/messages/batches{rest:path}": [{"requests": [{"params": {"messages": turn}}]}],
        "/v1/messages/count_tokens": [{"model": "m", "messages": turn}],
        "/v1/guard": [{"turns": turn}, {"messages": turn}],
        "/v1/moderations": [{"input": text}, {"input": [text, text]}, {"input": text, ASKED: text}],
        "/playground/ask": [{"text": text, "prompt": text}],
    }


def replies(body: Any) -> Reply:
    """What the upstream says to each of them: the answer's canary, in all its fields that are text."""
    said = f"{ANSWERED} {'bomb bomb' if 'hello' in str(body) else 'pie'} {ANSWERED}"
    if body is None:
        return Reply.json({"object": "list", "data": [{"id": "m", "owned_by": ANSWERED}]})
    if "prompt" in body:
        return Reply.json(text_completion(said))
    if body.get("stream"):
        return Reply.stream(*text_chunks(said.split(" ")))
    if body.get("user"):
        return Reply.error(500, ANSWERED, headers={"x-request-id": ANSWERED})
    return Reply.json(completion(said))


def upstream() -> FakeUpstream:
    """An upstream that answers with canaries."""
    return FakeUpstream(replies)


def posts(app: Starlette) -> set[str]:
    """The paths that take text."""
    return {route.path for route in app.routes if isinstance(route, Route) and "POST" in (route.methods or ())}


def send_everywhere(url: str, paths: set[str]) -> list[int]:
    """Send canaries to all of these paths, and to some where nothing is; returns each status.

    Fails for a path that nobody has said what to send to: a new door belongs into the table above.
    """
    unknown = paths - set(_bodies(""))
    assert not unknown, f"say in tests/canary.py what is sent to {unknown}"
    statuses = []
    with httpx.Client(base_url=url, timeout=20) as client:
        for words in _WORDS:
            for path, bodies in _bodies(f"{ASKED} {words} {ASKED}").items():
                for body in bodies if path in paths else ():
                    statuses.append(client.post(_filled(path), json=body, params={"q": ASKED}).status_code)
        for path in sorted(paths):
            statuses.append(client.post(_filled(path), content=f'{{"{ASKED}": '.encode()).status_code)
            statuses.append(client.post(_filled(path), json={"model": ASKED, ASKED: ASKED}).status_code)
        for path in ("/v1/models", f"/v1/models/{ASKED}", f"/v1/models/a%20{ASKED}", f"/{ASKED}"):
            statuses.append(client.get(path, params={"q": ASKED}).status_code)
        if "/v1/guard" in paths:
            _send_live(url)
        with contextlib.suppress(httpx.TransportError):
            statuses.append(client.request(ASKED.upper(), "/v1/moderations").status_code)
    return statuses


def _send_live(url: str) -> None:
    """The same to the WebSocket: a stream of canaries, and frames that are none."""
    address = f"{url.replace('http', 'ws', 1)}/v1/live"
    for words in _WORDS:
        with connect(address, subprotocols=[Subprotocol(PROTOCOL)]) as socket, contextlib.suppress(ConnectionClosed):
            turns = [{"role": "user", "content": f"{ASKED} hello"}]
            for frame in (
                {"type": "open", "stream": 1, "turns": turns},
                {"type": "text", "stream": 1, "text": f"{ASKED} {words} {ASKED}"},
                {"type": "finish", "stream": 1},
                {"type": ASKED, "stream": ASKED},
            ):
                socket.send(json.dumps(frame))
            while True:
                socket.recv(timeout=20)


def _filled(path: str) -> str:
    """A path that has room for a word has a canary in it."""
    return path.replace("batches{rest:path}", f"batches/{ASKED}").replace("{rest:path}", ASKED)
