"""Work for a client ends when the client is gone, or when a part of it fails."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from typing import Any
from urllib.parse import urlsplit

import pytest

from serving import PATIENCE_S, Record, make_policy, serving, wait_until
from tidegate.gateway.app import create_app
from tidegate.gateway.leaving import all_of
from tidegate.testing import FakeStreamGuard
from tidegate.types import Conversation, Verdict

TURNS = [{"role": "user", "content": "hi"}]
SLOW = [{"role": "user", "content": "wait for it"}]


class Waiting(FakeStreamGuard):
    """Takes its time over texts that say so."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = self.ended = 0

    async def judge(self, conversation: Conversation) -> Verdict:
        if "wait" not in conversation.turns[-1].content:
            return await super().judge(conversation)
        self.begun += 1
        try:
            await asyncio.Event().wait()
        finally:
            self.ended += 1
        raise AssertionError


@pytest.mark.parametrize(
    ("path", "body", "slow", "kept"),
    [
        ("/v1/moderations", {"input": ["hi", "wait for it", "wait for it too"]}, 2, 1),
        ("/v1/guard", {"turns": SLOW}, 1, 0),
        ("/v1/guard", {"conversations": [{"turns": TURNS}, {"turns": SLOW}]}, 1, 1),
    ],
    ids=["moderations", "guard", "conversations"],
)
def test_who_hangs_up_is_judged_for_no_longer_and_what_was_judged_is_kept(
    path: str, body: dict[str, Any], slow: int, kept: int
) -> None:
    guard, record = Waiting(), Record()
    with serving(create_app(guard=guard, policy=make_policy(), keep=record)) as url:
        address = urlsplit(url)
        data = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
        )
        with socket.create_connection((address.hostname, address.port), timeout=PATIENCE_S) as raw:
            raw.sendall(head.encode() + data)
            wait_until(lambda: guard.begun == slow and len(record.kept) == kept, "the judging")
        wait_until(lambda: guard.ended == slow, "its end")

    assert record.actions == ["allow"] * kept


async def test_when_one_of_several_fails_the_others_have_ended() -> None:
    ended = threading.Event()

    async def endless() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async def fails() -> None:
        await asyncio.sleep(0)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await all_of([endless(), fails()])
    assert ended.is_set()


async def test_results_are_in_the_order_of_the_work() -> None:
    async def after(turns: int) -> int:
        for _ in range(turns):
            await asyncio.sleep(0)
        return turns

    assert await all_of(map(after, [3, 1, 2])) == [3, 1, 2]
