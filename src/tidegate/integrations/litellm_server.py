"""A Tidegate server as LiteLLM's guardrail asks it: the server's guard judges, and the server's policy decides.

Conversations go to ``POST /v1/guard``, streams to ``/v1/live``, many on one connection. Whatever keeps a decision from
being had is one error, `Unanswered`; what that means is for who asks to say.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from tidegate.errors import GuardError, InputError
from tidegate.guards.live_wire import BrokenOff, Connection, Stream
from tidegate.guards.remote_servers import ServerPool
from tidegate.guards.tidegate_live import TidegateConfig
from tidegate.integrations.litellm_requests import Turn

__all__ = ["LiveText", "TidegateServer", "Unanswered", "blocks"]

_BLOCKING: Final = ("redact", "block")
"""Actions after which a text may not leave as it is."""
_PASSING: Final = ("going_away", "idle", "too_many_streams")
"""Errors of a stream after which it may be opened again."""
_MOST_TURNS: Final = 2048
_MOST_CONVERSATIONS: Final = 256
_SLICE: Final = 16_384
_HALVES: Final = re.compile("[\ud800-\udfff]")
_FIRST_PAUSE_S: Final = 0.05


class Unanswered(Exception):
    """No decision was had: the server cannot be reached, or did not answer as a Tidegate does."""


def blocks(decision: Mapping[str, Any]) -> bool:
    """Whether what was judged may not go on."""
    return decision["action"] in _BLOCKING


class TidegateServer:
    """One server. Used from one event loop at a time.

    Args:
        url: its address, as ``http://127.0.0.1:8080``.
        key: sent as bearer token; None for none.
        scope: for whom decisions are made, as ``/v1/guard`` takes it: ``region``, ``route``, ``language``.
        timeout_s: seconds that a judgement, or a piece of a text, may take.
        connect_timeout_s: seconds until a connection stands.
        patience_s: for how many seconds a live connection that broke off is sought again.

    Raises:
        InputError: when that is not an address.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        scope: Mapping[str, str] | None = None,
        timeout_s: float = 30.0,
        connect_timeout_s: float = 5.0,
        patience_s: float = 5.0,
    ) -> None:
        try:
            self._config = TidegateConfig(url=url)
        except ValueError:
            raise InputError("expected the address of a Tidegate, as http://127.0.0.1:8080", where="api_base") from None
        self._key = key
        self._scope = dict(scope or {})
        self.timeout_s = timeout_s
        self.patience_s = patience_s
        self._connect_timeout_s = connect_timeout_s
        self._pool = ServerPool(
            (self._config.url,),
            path="",
            key=key,
            timeout_s=timeout_s,
            connect_timeout_s=connect_timeout_s,
            attempts=1,
            most_open=100_000,
            failures=1_000_000,
        )
        self._connections: list[Connection] = []
        self._connecting: asyncio.Lock | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def judge(
        self, conversations: Sequence[Sequence[Turn]], *, subject: str | None = None
    ) -> list[dict[str, Any]]:
        """The decision on the last turn of each conversation, in their order.

        Raises:
            Unanswered: when there is none.
        """
        if not conversations:
            return []
        if len(conversations) > _MOST_CONVERSATIONS or any(len(turns) > _MOST_TURNS for turns in conversations):
            raise Unanswered("there are more turns than a server takes")
        body: dict[str, Any] = {"conversations": [{"turns": list(turns)} for turns in conversations]}
        body["scope"] = self._scope_of(subject)
        try:
            said = await self._pool.run(lambda server: self._pool.post(server, "/v1/guard", body))
            results: list[dict[str, Any]] = said["results"]
            if len(results) != len(conversations) or not all(isinstance(one["action"], str) for one in results):
                raise Unanswered("the answer is not that of a Tidegate")
        except GuardError as error:
            raise Unanswered(str(error)) from error
        except (KeyError, TypeError):
            raise Unanswered("the answer is not that of a Tidegate") from None
        return results

    def watch(self, turns: Sequence[Turn], channel: str, *, subject: str | None = None, **fields: str) -> LiveText:
        """A text that is going to be written behind these turns; ``fields`` are further ones of the ``open`` frame."""
        scope = self._scope_of(subject)
        return LiveText(self, {"turns": list(turns), "channel": channel, "scope": scope, "tokens": False, **fields})

    async def close(self) -> None:
        """Close all connections; safe to call twice."""
        await self._pool.close()
        connections, self._connections = self._connections, []
        for connection in connections:
            connection.close()

    async def stream(self, fields: Mapping[str, Any]) -> Stream:
        """Open a stream on a connection that has room, or on a new one.

        Raises:
            BrokenOff: when no connection can be made now.
            GuardUnavailable: when none can be made ever.
        """
        if self._loop is not asyncio.get_running_loop() or self._connecting is None:
            self._loop, self._connecting, self._connections = asyncio.get_running_loop(), asyncio.Lock(), []
        async with self._connecting:
            self._connections = [one for one in self._connections if not one.gone]
            connection = next((one for one in self._connections if one.has_room), None)
            if connection is None:
                connection = await Connection.to(self._config.live_url, self._key, self._connect_timeout_s)
                self._connections.append(connection)
        return connection.open(fields)

    def _scope_of(self, subject: str | None) -> dict[str, str]:
        return self._scope | ({"subject": subject[:256]} if subject else {})


class LiveText:
    """One text while it is written.

    Attributes:
        text: all of it so far.
        released: how many characters of it may leave.
        decision: what was decided at its end, or at the block; None before.
    """

    def __init__(self, server: TidegateServer, fields: Mapping[str, Any]) -> None:
        self.text = ""
        self.released = 0
        self.decision: dict[str, Any] | None = None
        self._server = server
        self._fields = fields
        self._stream: Stream | None = None
        self._ended = False

    @property
    def blocked(self) -> bool:
        """Whether it was stopped: nothing after ``released`` may leave."""
        return self.decision is not None and blocks(self.decision)

    async def feed(self, piece: str) -> None:
        """More text; returns when it has been judged as far as it can be.

        Text that comes after `finish` makes all of it be judged again, with what is new.

        Raises:
            Unanswered: when the server says nothing of it.
        """
        self.text += _HALVES.sub("\ufffd", piece)
        if not self.blocked:
            if self._ended:
                self._stream, self._ended, self.decision = None, False, None
            await self._tried(last=False)

    async def finish(self) -> None:
        """The text is complete, as far as anybody knows.

        Raises:
            Unanswered: when the server says nothing of it.
        """
        if not self._ended and self.text:
            await self._tried(last=True)

    def close(self) -> None:
        """Nothing more is wanted of it; safe to call any number of times."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()

    async def _tried(self, *, last: bool) -> None:
        loop = asyncio.get_running_loop()
        until, pause_s = loop.time() + self._server.patience_s, _FIRST_PAUSE_S
        while True:
            try:
                if self._stream is None:
                    self._stream = await self._server.stream(self._fields)
                await self._said(self._stream, last=last)
                return
            except BrokenOff:
                self._stream = None
                if loop.time() + pause_s > until:
                    raise Unanswered("the connection to the server broke off") from None
            except GuardError as error:
                raise Unanswered(str(error)) from error
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, 1.0)

    async def _said(self, stream: Stream, *, last: bool) -> None:
        most = max(1, min(_SLICE, stream.connection.limits["stream_characters"]))
        while stream.sent < len(self.text) and not self._ended:
            piece = self.text[stream.sent : stream.sent + most]
            stream.send("text", text=piece)
            stream.sent += len(piece)
            while not self._ended and (await self._heard(stream)) < stream.sent:
                pass
        if last and not self._ended:
            stream.send("finish")
            while not self._ended:
                await self._heard(stream)

    async def _heard(self, stream: Stream) -> int:
        """The next step or end is taken in; how many characters the server has taken."""
        while True:
            try:
                async with asyncio.timeout(self._server.timeout_s):
                    frame = await stream.next()
            except TimeoutError:
                raise Unanswered("the server did not answer in time") from None
            try:
                match frame["type"]:
                    case "error" if frame.get("code") in _PASSING:
                        raise BrokenOff
                    case "error":
                        raise Unanswered("the server refused the text")
                    case "end" if frame["reason"] in ("going_away", "closed"):
                        raise BrokenOff
                    case "step" | "end":
                        self._take(frame)
                        return int(frame["taken"])
            except (KeyError, TypeError, ValueError):
                raise Unanswered("the frames of the server cannot be read") from None

    def _take(self, frame: Mapping[str, Any]) -> None:
        self.released = max(self.released, min(int(frame["released"]), len(self.text)))
        if frame["type"] == "end":
            self._ended = True
            decision = frame["decision"] or {"action": "allow"}  # null when nothing was there to be judged
            self.decision = {**decision, "action": str(decision["action"])}
