"""What an upstream of Anthropic's Messages API sends, for tests."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from tidegate.testing import Act, Die, Hang, Pause, Reply, Send

USAGE = {"input_tokens": 3, "output_tokens": 5}


def message(*content: str | Mapping[str, Any], stop_reason: str | None = "end_turn", **more: Any) -> dict[str, Any]:
    """A whole message; a string is a text block."""
    blocks = [{"type": "text", "text": one} if isinstance(one, str) else dict(one) for one in content]
    head = {"id": "msg_fake", "type": "message", "role": "assistant", "model": "fake-model"}
    return {**head, "content": blocks, "stop_reason": stop_reason, "stop_sequence": None, "usage": USAGE, **more}


def start(**more: Any) -> dict[str, Any]:
    used = {"input_tokens": 3, "output_tokens": 1}
    return {"type": "message_start", "message": {**message(stop_reason=None, usage=used), **more}}


def block(number: int, content: Mapping[str, Any], *deltas: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A content block from its start to its stop."""
    return [
        {"type": "content_block_start", "index": number, "content_block": dict(content)},
        *({"type": "content_block_delta", "index": number, "delta": dict(delta)} for delta in deltas),
        {"type": "content_block_stop", "index": number},
    ]


def text(number: int, *pieces: str) -> list[dict[str, Any]]:
    return block(number, {"type": "text", "text": ""}, *({"type": "text_delta", "text": piece} for piece in pieces))


def thinking(number: int, *pieces: str, signature: str = "c2lnbmVk") -> list[dict[str, Any]]:
    deltas: list[dict[str, Any]] = [{"type": "thinking_delta", "thinking": piece} for piece in pieces]
    deltas.append({"type": "signature_delta", "signature": signature})
    return block(number, {"type": "thinking", "thinking": "", "signature": ""}, *deltas)


def tool_use(number: int, *pieces: str, name: str = "search", kind: str = "tool_use") -> list[dict[str, Any]]:
    content = {"type": kind, "id": "toolu_1", "name": name, "input": {}}
    return block(number, content, *({"type": "input_json_delta", "partial_json": piece} for piece in pieces))


def end(stop_reason: str | None = "end_turn", **more: Any) -> list[dict[str, Any]]:
    delta = {"stop_reason": stop_reason, "stop_sequence": None}
    return [{"type": "message_delta", "delta": delta, "usage": {"output_tokens": 9}, **more}, {"type": "message_stop"}]


def wire(events: Iterable[Mapping[str, Any]]) -> bytes:
    return b"".join(f"event: {one['type'].split()[0]}\ndata: {json.dumps(one)}\n\n".encode() for one in events)


def reply(*parts: Mapping[str, Any] | bytes | Act) -> Reply:
    """An event stream of these."""
    acts = (
        part if isinstance(part, Send | Pause | Hang | Die) else Send(part if isinstance(part, bytes) else wire([part]))
        for part in parts
    )
    return Reply(tuple(acts), headers={"content-type": "text/event-stream"})
