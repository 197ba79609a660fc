"""A guard that is another Tidegate: conversations by ``POST /v1/guard``, streams over ``/v1/live``.

Many sessions share a connection. The server judges and keeps what it decides, but stops nothing here: its policy is
only observed, so that a verdict depends on the text alone and the policy in this process decides.

*Restarts.* A session has its whole text. When the connection breaks off, or the server goes away or ends the stream,
the text is sent again over a new connection, and what was said of it already is left out; that is exact, because the
verdicts are a function of the text. It is tried for ``patience_s``; then it is a failure.

Halves of surrogate pairs, which no wire can carry, are judged as U+FFFD, each by itself.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from tidegate.errors import (
    GuardError,
    GuardOverloaded,
    GuardTimeout,
    GuardUnavailable,
    InputError,
    UnreadableVerdict,
)
from tidegate.guards.live_wire import BrokenOff, Connection, Stream
from tidegate.guards.remote_servers import ServerPool, base_address, read_key
from tidegate.guards.session import OpenSessions, TextSession, check_written
from tidegate.guards.spec_file import read_spec_file
from tidegate.types import (
    Channel,
    Conversation,
    Probabilities,
    Severity,
    Span,
    Target,
    TokenVerdict,
    Turn,
    Verdict,
)

__all__ = ["TidegateConfig", "TidegateGuard", "TidegateSession", "load_tidegate", "read_config"]

_SPEC: Final = "expected tidegate:URL, as tidegate:ws://127.0.0.1:8080, or tidegate:FILE with a YAML or JSON file"
_HALVES: Final = re.compile("[\ud800-\udfff]")
_SLICE: Final = 16_384
"""Most characters that are sent at once."""
_FIRST_PAUSE_S: Final = 0.05
_LONGEST_PAUSE_S: Final = 1.0
_KINDS: Final[Mapping[str, type[GuardError]]] = {
    kind.__name__: kind for kind in (GuardUnavailable, GuardOverloaded, GuardTimeout, UnreadableVerdict)
}
_PASSING: Final = ("going_away", "idle", "too_many_streams")
"""Errors of a stream after which it may be opened again."""
Seconds = Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)]
Word = Annotated[str, Field(min_length=1, max_length=200)]


class TidegateConfig(BaseModel):
    """A ``tidegate`` guard as a file: the only key that must be there is ``url``.

    Attributes:
        url: address of the server, as ``ws://host:8080`` or ``https://host``.
        key_file: a file with the key that is sent as bearer token; None for none.
        most_sessions: how many sessions may be open at once.
        patience_s: for how many seconds a connection that broke off is sought again.
        timeout_s: seconds that a judgement, or one piece of a text, may take.
        connect_timeout_s: seconds until a connection stands.
        most_open: how many conversations may be under way at once.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: Word
    key_file: Word | None = None
    most_sessions: Annotated[int, Field(ge=1, le=1_000_000)] = 4096
    patience_s: Seconds = 30.0
    timeout_s: Seconds = 30.0
    connect_timeout_s: Seconds = 5.0
    most_open: Annotated[int, Field(ge=1, le=100_000)] = 1024

    @field_validator("url")
    @classmethod
    def _address(cls, url: str) -> str:
        for wire, plain in (("ws://", "http://"), ("wss://", "https://")):
            if url.startswith(wire):
                url = plain + url.removeprefix(wire)
        try:
            return base_address(url, "").removesuffix("/v1")
        except InputError as error:
            raise ValueError(error.message.replace("http://127.0.0.1:8000/v1", "ws://127.0.0.1:8080")) from None

    @property
    def live_url(self) -> str:
        """Where the streams are."""
        parts = urlsplit(self.url)
        return f"{'wss' if parts.scheme == 'https' else 'ws'}://{parts.netloc}{parts.path}/v1/live"


class TidegateGuard:
    """Judges by asking a Tidegate server; see the module's text. Used from one event loop at a time.

    Args:
        config: which server, and how.
        key: sent as bearer token; None for none.
    """

    def __init__(self, config: TidegateConfig, *, key: str | None = None) -> None:
        self.config = config
        self._key = key
        self._open = OpenSessions(config.most_sessions)
        self._pool = ServerPool(
            (config.url,),
            path="",
            key=key,
            timeout_s=config.timeout_s,
            connect_timeout_s=config.connect_timeout_s,
            attempts=1,
            most_open=config.most_open,
            failures=1_000_000,
        )
        self._connections: list[Connection] = []
        self._connecting = asyncio.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._signed = ""

    @property
    def name(self) -> str:
        """As ``tidegate[edge/2]``, once the server was asked."""
        return f"tidegate[{self._signed}]" if self._signed else "tidegate"

    @property
    def sessions(self) -> int:
        """How many sessions are open now."""
        return len(self._open)

    @property
    def streams(self) -> int:
        """How many streams the server has open for them, as far as is known here."""
        return sum(connection.streams for connection in self._connections)

    async def judge(self, conversation: Conversation) -> Verdict:
        """Judge the last turn of a conversation.

        Raises:
            GuardOverloaded: when ``most_open`` are under way, or the server refuses more.
            GuardError: when the server cannot judge, or cannot be asked.
        """
        body = {"turns": [_turn_field(turn) for turn in conversation.turns]}
        said = await self._pool.run(lambda server: self._pool.post(server, "/v1/guard", body))
        return self._read(said, conversation.target)

    def open(
        self, context: Conversation | None, channel: Channel = Channel.ANSWER, *, reasoning: str = "", name: str = ""
    ) -> TidegateSession:
        """Open a session: see `StreamGuard.open`. The server is asked with the first piece of text.

        Raises:
            InputError: for a channel in which no assistant writes.
            GuardOverloaded: when ``most_sessions`` are open.
            GuardUnavailable: when the guard is closed.
        """
        check_written(channel)
        if self._pool.closed:
            raise GuardUnavailable("the guard is closed")
        fields: dict[str, Any] = {"channel": channel.value, "observe": True}
        if context is not None:
            fields["turns"] = [_turn_field(turn) for turn in context.turns]
        if reasoning:
            fields["reasoning"] = reasoning
        if name:
            fields["name"] = name[:256]
        return TidegateSession(self, fields)

    async def close(self) -> None:
        """Close the connections; sessions that are open fail from now on. Safe to call twice."""
        await self._pool.close()
        connections, self._connections = self._connections, []
        for connection in connections:
            connection.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # what the sessions share

    async def stream(self, fields: Mapping[str, Any]) -> Stream:
        """A new stream on a connection that has room, or on a new one.

        Raises:
            BrokenOff: when no connection can be made now.
            GuardUnavailable: when none can be made ever.
        """
        if self._loop is not asyncio.get_running_loop():
            self._loop, self._connecting, self._connections = asyncio.get_running_loop(), asyncio.Lock(), []
        async with self._connecting:
            if self._pool.closed:
                raise GuardUnavailable("the guard is closed")
            self._connections = [one for one in self._connections if not one.gone]
            connection = next((one for one in self._connections if one.has_room), None)
            if connection is None:
                connection = await Connection.to(self.config.live_url, self._key, self.config.connect_timeout_s)
                self._connections.append(connection)
                self._signed = str(connection.hello["guard"])
        return connection.open(fields)

    def _read(self, said: Any, target: Target) -> Verdict:
        try:
            if said["failure"] is not None:
                raise failed(said["failure"])
            self._signed = str(said["guard"])
            span = said["span"]
            return Verdict(
                target,
                Severity.parse(said["severity"]),
                Probabilities(**said["probabilities"]),
                tuple(map(str, said["categories"])),
                {str(name): float(share) for name, share in said["category_probabilities"].items()},
                said["refusal"],
                said["reason"],
                None if span is None else Span(int(span["start"]), int(span["end"])),
                self.name,
            )
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UnreadableVerdict("the server's answer is not that of a Tidegate") from None


class TidegateSession(TextSession):
    """One text in pieces: see the module's text."""

    def __init__(self, guard: TidegateGuard, fields: Mapping[str, Any]) -> None:
        super().__init__(guard._open)
        self._guard = guard
        self._fields = fields
        self._text = ""
        self._given = 0
        self._stream: Stream | None = None

    def close(self) -> None:
        """Give everything back at once; safe to call any number of times, also while a feed is running."""
        super().close()
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()

    async def _judge(self, text: str, *, last: bool) -> Sequence[TokenVerdict]:
        if not text and not last:
            return ()
        self._text += _HALVES.sub("\ufffd", text)
        return await self._asked(self._tried(last=last))

    async def _tried(self, *, last: bool) -> list[TokenVerdict]:
        """Say the text until the server has judged all of it, over as many connections as that takes."""
        tokens: list[TokenVerdict] = []
        loop = asyncio.get_running_loop()
        until, pause_s = loop.time() + self._guard.config.patience_s, _FIRST_PAUSE_S
        while True:
            try:
                if self._stream is None:
                    self._stream = await self._guard.stream(self._fields)
                await self._said(self._stream, tokens, last=last)
                return tokens
            except BrokenOff as error:
                self._stream = None
                if loop.time() + pause_s > until or self._guard._pool.closed:
                    raise GuardUnavailable("the guard's server cannot be reached") from error
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _said(self, stream: Stream, tokens: list[TokenVerdict], *, last: bool) -> None:
        most = max(1, min(_SLICE, stream.connection.limits["stream_characters"]))
        while stream.sent < len(self._text):
            piece = self._text[stream.sent : stream.sent + most]
            stream.send("text", text=piece)
            stream.sent += len(piece)
            while (await self._heard(stream, tokens))["taken"] < stream.sent:
                pass
        if last:
            stream.send("finish")
            while (frame := await self._heard(stream, tokens))["type"] != "end":
                pass
            if frame["reason"] != "finished":
                raise BrokenOff

    async def _heard(self, stream: Stream, tokens: list[TokenVerdict]) -> dict[str, Any]:
        """The next step or end; what it says is added to the tokens, unless it was said before."""
        while True:
            try:
                async with asyncio.timeout(self._guard.config.timeout_s):
                    frame = await stream.next()
            except TimeoutError:
                raise GuardTimeout("the guard's server did not answer in time") from None
            match frame.get("type"):
                case "error":
                    raise _trouble(frame)
                case "end" if frame.get("reason") in ("going_away", "closed"):
                    raise BrokenOff
                case "step" | "end":
                    break
        try:
            if frame["failure"] is not None:
                raise failed(frame["failure"])
            for token in frame["tokens"]:
                stream.told += 1
                if stream.told > self._given:
                    tokens.append(_token(token))
                    self._given += 1
            frame["taken"] = int(frame["taken"])
        except (KeyError, TypeError, ValueError):
            raise UnreadableVerdict("the server's frames cannot be read") from None
        return frame


def _trouble(frame: Mapping[str, Any]) -> Exception:
    code = frame.get("code")
    if code in _PASSING:
        return BrokenOff(code)
    return GuardError(f"the guard's server refused the text: {code}" if isinstance(code, str) else "refused")


def failed(failure: Any) -> GuardError:
    """The failure of the server's guard, as ours. Raises TypeError or KeyError when it is none."""
    kind = _KINDS.get(failure["kind"], GuardError)
    return kind(f"the guard of the server failed: {kind.__name__}")


def _token(said: Mapping[str, Any]) -> TokenVerdict:
    return TokenVerdict(
        Span(int(said["start"]), int(said["end"])),
        Severity.parse(said["severity"]),
        Probabilities(**said["probabilities"]),
        None if said["category"] is None else str(said["category"]),
        float(said["category_probability"]),
    )


def _turn_field(turn: Turn) -> dict[str, Any]:
    said: dict[str, Any] = {"role": turn.role.value, "content": turn.content}
    if turn.reasoning:
        said["reasoning"] = turn.reasoning
    if turn.tool_calls:
        said["tool_calls"] = [{"name": call.name[:256], "arguments": call.arguments} for call in turn.tool_calls]
    return said


def read_config(rest: str) -> TidegateConfig:
    """What stands behind ``tidegate:``: an address or a file.

    Raises:
        InputError: when it is neither, or the file is not of the form; says where.
    """
    if not rest:
        raise InputError(_SPEC, where="guard")
    if "://" not in rest:
        return read_spec_file(Path(rest), TidegateConfig)
    try:
        return TidegateConfig(url=rest)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise InputError(first["msg"].removeprefix("Value error, "), where="guard") from None


def load_tidegate(rest: str) -> TidegateGuard:
    """Make a guard of what stands behind ``tidegate:``. The server is not asked before the first judgement.

    Raises:
        InputError: when the spec or the file is wrong.
        GuardUnavailable: when the key cannot be read.
    """
    config = read_config(rest)
    return TidegateGuard(config, key=None if config.key_file is None else read_key(Path(config.key_file)))
