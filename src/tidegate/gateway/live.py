"""``/v1/live``: a WebSocket for gateways and engines that hold the stream themselves.

They send the text as it is written, and are told of each character when it may leave; they keep the promise, we judge.
Every stream is a `tidegate.moderate.StreamModerator`, so that what holds for the streams that pass through the gateway
holds here too. Many streams share one connection, each by a number; the frames are in `tidegate.gateway.live_frames`,
and for people in ``docs/doors/live.md``.

What is in memory is bounded. A client may have so many characters under way that were not taken yet, for each stream
and for all of a connection; more than that ends the stream. No piece of a stream is taken before what was said of the
one before has gone out, and a client that does not read what is said is given up after a while.

A stream that ends in whatever way is decided, and the decision is kept: by its last frame, when the client closes it or
says nothing for too long, when the connection breaks, and when the server stops. Told to stop, the server lets streams
go on for a while (`tidegate.gateway.draining`), opens no new ones, and says goodbye when the last one has ended.

uvicorn needs the package `websockets` to speak the protocol: that is why it is a dependency.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final
from urllib.parse import urlsplit

from starlette.responses import JSONResponse, Response
from starlette.websockets import WebSocket, WebSocketDisconnect

from tidegate.errors import InputError, SessionClosed, StoreError
from tidegate.gateway.channels import BLOCKS
from tidegate.gateway.draining import told_to_stop
from tidegate.gateway.guard import Keeping, failure_field, mask_field, reported, span_field, token_field
from tidegate.gateway.history import covered_with, judge_turns, worst_of
from tidegate.gateway.live_frames import PROTOCOL, Close, Finish, Frame, Ids, Open, Text, Unreadable, read_frame
from tidegate.gateway.scopes import Admit, scope_of
from tidegate.gateway.statuses import Problem
from tidegate.gateway.telemetry import Telemetry
from tidegate.gateway.unescaped import Undoing
from tidegate.guards.base import IdGuard, StreamGuard
from tidegate.guards.session import assistant_turn
from tidegate.moderate import Keep, Masked, Step, StreamModerator, coverage_of
from tidegate.policy import PolicySource
from tidegate.types import Channel, Conversation, CoverageState, Decision, Scope, TokenVerdict

__all__ = ["Live", "LiveLimits"]

_log = logging.getLogger("tidegate.gateway")
_SLICE: Final = 8_192
"""Most characters, or ids, of one step: so long a frame may be, and so long others wait."""


@dataclass(frozen=True, slots=True)
class LiveLimits:
    """What a client is held to; the first seven are told in the ``hello`` frame.

    Attributes:
        frame_bytes: the longest frame.
        streams: how many streams one connection may have open.
        stream_characters: how many characters of a stream (or ids) may be under way that were not taken yet.
        connection_characters: the same for all streams of a connection together.
        text_characters: the longest text of a stream, in characters.
        open_characters: how many characters all open streams of a connection may have together, turns included.
        idle_s: seconds that a stream may go without a frame before it is ended.
        all_streams: how many streams all connections together may have open.
        connections: how many connections there may be.
        drain_s: seconds that streams may go on when the server was told to stop.
    """

    frame_bytes: int = 2 * 1024 * 1024
    streams: int = 256
    stream_characters: int = 65_536
    connection_characters: int = 1_048_576
    text_characters: int = 1_048_576
    open_characters: int = 16_777_216
    idle_s: float = 300.0
    all_streams: int = 4_096
    connections: int = 1_024
    drain_s: float = 25.0

    def told(self) -> dict[str, float]:
        """As the ``hello`` frame says them."""
        return {
            "frame_bytes": self.frame_bytes,
            "streams": self.streams,
            "stream_characters": self.stream_characters,
            "connection_characters": self.connection_characters,
            "text_characters": self.text_characters,
            "open_characters": self.open_characters,
            "idle_seconds": self.idle_s,
        }


class Live:
    """The endpoint.

    Args:
        guard: watches the streams.
        policy: where the policy in force is; each stream is decided by one, from its beginning to its end.
        keep: where decisions go; None for nowhere.
        telemetry: counts.
        limits: what a client is held to.
        guard_timeout_s: seconds that the guard may take for each step; None for as long as it wants.
        client_timeout_s: seconds that a client may take nothing of what is sent; None for as long as it wants.
        admit: as in `tidegate.gateway.exchange.Behind`.

    Attributes:
        streams: how many streams are open, over all connections.
        connections: how many connections there are.
    """

    def __init__(
        self,
        *,
        guard: StreamGuard,
        policy: PolicySource,
        keep: Keep | None,
        telemetry: Telemetry,
        limits: LiveLimits,
        guard_timeout_s: float | None,
        client_timeout_s: float | None,
        admit: Admit | None = None,
    ) -> None:
        self.guard = guard
        self.policy = policy
        self.keep = Keeping(keep, telemetry)
        self.admit = admit
        self.telemetry = telemetry
        self.limits = limits
        self.guard_timeout_s = guard_timeout_s
        self.client_timeout_s = client_timeout_s
        self.streams = 0
        self.connections = 0

    @property
    def takes_ids(self) -> bool:
        """Whether the guard takes the ids of a model that shares its tokenizer."""
        return isinstance(self.guard, IdGuard) and self.guard.takes_ids

    async def connect(self, websocket: WebSocket) -> None:
        """Serve one connection to its end."""
        refusal = self._refusal(websocket)
        if refusal is not None:
            await _deny(websocket, refusal)
            return
        self.connections += 1
        try:
            with contextlib.suppress(WebSocketDisconnect):
                await websocket.accept(PROTOCOL)
                await _Connection(self, websocket).run()
        finally:
            self.connections -= 1

    def _refusal(self, websocket: WebSocket) -> Problem | None:
        if _is_foreign(websocket.headers.get("origin"), websocket.headers.get("host")):
            return Problem(403, "a page of another site may not connect", code="foreign_origin")
        if PROTOCOL not in websocket.scope.get("subprotocols", ()):
            return Problem(400, f"expected the subprotocol {PROTOCOL}", param="sec-websocket-protocol")
        if told_to_stop(websocket.scope).is_set():
            return Problem(503, "the server is going away", "server_error", code="going_away")
        if self.connections >= self.limits.connections:
            return Problem(503, "there are too many connections", "server_error", code="too_many_connections")
        try:
            scope_of(websocket)
        except Problem as problem:
            return problem
        return None


def _is_foreign(origin: str | None, host: str | None) -> bool:
    """Whether it is a page of another site that asks; a program says no origin."""
    if origin is None:
        return False
    try:
        return urlsplit(origin).netloc != host
    except ValueError:
        return True


async def _deny(websocket: WebSocket, problem: Problem) -> None:
    if "websocket.http.response" in websocket.scope.get("extensions", {}):
        response: Response = JSONResponse(problem.body, problem.status)
        await websocket.send_denial_response(response)
    else:
        await websocket.close(1008, problem.message)


# --- one connection -----------------------------------------------------------------------------------------------


class _Gone(Exception):
    """The client is away, or takes nothing any more: nothing can be told to it."""


@dataclass(frozen=True, slots=True)
class _Goodbye:
    """How a connection ends; a ``code`` of None says that nobody is there to be told."""

    code: int | None = None
    reason: str = ""


class _Connection:
    """One client and its streams.

    Attributes:
        underway: characters of all streams that were sent and not taken yet.
        characters: of all streams that are open, the turns before them included.
    """

    def __init__(self, door: Live, websocket: WebSocket) -> None:
        self.door = door
        self.scope: Scope = scope_of(websocket)
        self.underway = 0
        self.characters = 0
        self._websocket = websocket
        self._streams: dict[int, _Stream] = {}
        self._highest = 0
        self._draining = False
        self._sending = asyncio.Lock()
        self._over: asyncio.Future[_Goodbye] = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        """Until the client goes, breaks the rules, or the server stops."""
        work = [asyncio.ensure_future(self._read()), asyncio.ensure_future(self._drain())]
        for task in work:
            task.add_done_callback(self._note)
        goodbye = _Goodbye()
        try:
            goodbye = await self._over
        finally:
            streams = [stream.abandon() for stream in self._streams.values()]
            for task in work:
                task.cancel()
            await asyncio.wait([*work, *streams])
        if goodbye.code is not None:
            with contextlib.suppress(_Gone):
                await self._patiently(self._websocket.close(goodbye.code, goodbye.reason))

    def end(self, code: int | None = None, reason: str = "") -> None:
        """Let the connection end; the first word counts."""
        if not self._over.done():
            self._over.set_result(_Goodbye(code, reason))

    async def send(self, kind: str, stream: int | None, **fields: Any) -> None:
        """Send a frame.

        Raises:
            _Gone: when it cannot be sent; the connection then ends.
        """
        whose = {} if stream is None and kind != "error" else {"stream": stream}
        text = json.dumps({"type": kind, **whose, **fields}, separators=(",", ":"))
        await self._patiently(self._send(text))

    async def _send(self, text: str) -> None:
        async with self._sending:
            await self._websocket.send_text(text)

    async def _patiently(self, sending: Any) -> None:
        try:
            async with asyncio.timeout(self.door.client_timeout_s):
                await sending
        except TimeoutError:
            if not self._over.done():
                self.door.telemetry.stalled_clients.inc()
                _log.warning("a client stopped reading its verdicts, and was given up")
            self.end()
            raise _Gone from None
        except (WebSocketDisconnect, RuntimeError, OSError):
            self.end()
            raise _Gone from None

    def _note(self, task: asyncio.Task[None]) -> None:
        """A task of the connection ended: of itself, or because it broke."""
        if not task.cancelled() and task.exception() is not None:
            if not isinstance(task.exception(), _Gone):
                _log.error("a live connection broke down: %s", type(task.exception()).__name__)
            self.end(None if isinstance(task.exception(), _Gone) else 1011, "something went wrong in the gateway")

    # what comes in

    async def _read(self) -> None:
        door = self.door
        await self.send(
            "hello", None, protocol=PROTOCOL, guard=door.guard.name, takes_ids=door.takes_ids, limits=door.limits.told()
        )
        while not self._over.done():
            message = await self._websocket.receive()
            if message["type"] == "websocket.disconnect":
                self.end()
                return
            try:
                frame = read_frame(message, self.scope, longest=door.limits.frame_bytes)
            except Unreadable as error:
                await self.send("error", None, code=error.code, message=error.message, param=error.where, decision=None)
                self.end(error.closes, error.message)
                return
            await self._take(frame)

    async def _take(self, frame: Frame) -> None:
        stream = self._streams.get(frame.stream)
        if isinstance(frame, Open):
            await self._open(frame)
        elif stream is not None:
            stream.take(frame)
        elif frame.stream > self._highest:
            await self._refuse(frame.stream, "unknown_stream", "there is no such stream: open it first", "stream")
        # a frame for a stream that has ended may have crossed its end: it means nothing any more

    async def _open(self, frame: Open) -> None:
        limits = self.door.limits
        if frame.stream <= self._highest:
            ended = self._streams.get(frame.stream)
            if ended is not None:
                ended.fail("stream_used", "there is such a stream already", "stream")
            else:
                await self._refuse(
                    frame.stream, "stream_used", "expected a number above those of all streams before", "stream"
                )
            return
        self._highest = frame.stream
        if self._draining:
            await self._refuse(frame.stream, "going_away", "the server is going away: it opens no more streams")
        elif isinstance(frame.problem, InputError):
            await self._refuse(frame.stream, "invalid_frame", frame.problem.message, frame.problem.where)
        elif len(self._streams) >= limits.streams:
            said = f"this connection has {limits.streams:,} streams open already"
            await self._refuse(frame.stream, "too_many_streams", said)
        elif self.characters + frame.characters > limits.open_characters:
            said = f"the open streams may have {limits.open_characters:,} characters together, turns included"
            await self._refuse(frame.stream, "too_much_text", said)
        elif self.door.streams >= limits.all_streams:
            await self._refuse(frame.stream, "too_many_streams", "the server has too many streams open already")
        else:
            try:
                if self.door.admit is not None:
                    await self.door.admit(frame.scope.tenant, frame.scope.subject)
            except Problem as problem:
                await self._refuse(frame.stream, problem.code or "", problem.message)
                return
            self._streams[frame.stream] = stream = _Stream(self, frame)
            stream.start()

    async def _refuse(self, stream: int, code: str, message: str, param: str | None = None) -> None:
        await self.send("error", stream, code=code, message=message, param=param, decision=None)

    def forget(self, stream: int) -> None:
        """This stream has ended."""
        self._streams.pop(stream, None)
        if self._draining and not self._streams:
            self.end(1001, "the server is going away")

    # the end of the server

    async def _drain(self) -> None:
        """Once the server is told to stop: no new streams, and those that there are get some time."""
        await told_to_stop(self._websocket.scope).wait()
        self._draining = True
        limits = self.door.limits
        await self.send("going_away", None, seconds=limits.drain_s)
        if not self._streams:
            self.end(1001, "the server is going away")
            return
        await asyncio.sleep(limits.drain_s)
        for stream in list(self._streams.values()):
            stream.stop("going_away")


# --- one stream ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Ending:
    """Why a stream ends before its text does: with an ``error`` frame when there is a code, else with ``end``."""

    reason: str
    code: str | None = None
    message: str = ""
    param: str | None = None


class _Stream:
    """One text: takes what comes in, in order, and tells what becomes of it."""

    def __init__(self, connection: _Connection, frame: Open) -> None:
        door = connection.door
        self._connection = connection
        self._door = door
        self._frame = frame
        self._policy = door.policy.current.at(frame.scope)
        self._moderator = StreamModerator(
            door.guard,
            self._policy.only_observed() if frame.observe else self._policy,
            frame.scope,
            frame.context,
            channel=frame.channel,
            path=frame.path,
            reasoning=frame.reasoning,
            name=frame.name,
            timeout_s=door.guard_timeout_s,
            masks=frame.masks,
        )
        self._places = Undoing()
        self._earlier: dict[int, Decision] = {}
        self._heard = asyncio.get_running_loop().time()
        self._masks: list[Masked] = []
        self._pieces: list[str | tuple[int, ...]] = []
        self._new = asyncio.Event()
        self._sent = 0
        self._taken = 0
        self._kind: type[Text] | type[Ids] | None = None
        self._complete = False
        self._untold: list[TokenVerdict] = []
        self._held = 0
        self._begun = False
        self._abandoned = False
        self._ending: _Ending | None = None
        self._keeping: asyncio.Task[str | None] | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to take what comes in."""
        self._door.streams += 1
        self._connection.characters += self._frame.characters
        self._task = asyncio.ensure_future(self._run())

    def abandon(self) -> asyncio.Task[None]:
        """Nobody is there any more to be told: end it; gives what is to be waited for."""
        assert self._task is not None, "it was started"
        self._ending, self._abandoned = None, True
        if self._begun:
            self._task.cancel()
        return self._task

    def stop(self, reason: str) -> None:
        """End it here, and say what was decided of what was judged."""
        self._end(_Ending(reason))

    def fail(self, code: str, message: str, param: str | None = None) -> None:
        """End it here because of what the client did."""
        self._end(_Ending("error", code, message, param))

    def _end(self, ending: _Ending) -> None:
        if self._ending is None and not self._abandoned and self._task is not None:
            self._ending = ending
            if self._begun:  # before that, a cancelled task would not even clean up
                self._task.cancel()

    # what comes in: never waits

    def take(self, frame: Frame) -> None:
        """Note a frame of this stream."""
        self._heard = asyncio.get_running_loop().time()
        match frame:
            case Text() | Ids() if frame.problem is not None:
                self.fail("invalid_frame", frame.problem.message, frame.problem.where)
            case Text() | Ids() | Finish() if self._complete:
                self.fail("finished", "the text was said to be complete: nothing may follow")
            case Text(text=piece) | Ids(ids=piece):
                self._add(type(frame), piece)
            case Finish():
                self._complete = True
                self._new.set()
            case Close():
                self.stop("closed")

    def _add(self, kind: type[Text] | type[Ids], piece: str | tuple[int, ...]) -> None:
        limits, connection = self._door.limits, self._connection
        if self._kind not in (None, kind):
            self.fail("mixed", "a stream is given either text or ids, and not both")
        elif kind is Ids and not self._door.takes_ids:
            self.fail("no_ids", f"the guard {self._door.guard.name} takes no ids: send text")
        elif self._sent - self._taken + len(piece) > limits.stream_characters:
            self.fail("window_exceeded", f"more than {limits.stream_characters:,} characters of it were not taken yet")
        elif connection.underway + len(piece) > limits.connection_characters:
            said = f"more than {limits.connection_characters:,} characters of this connection were not taken yet"
            self.fail("window_exceeded", said)
        elif self._sent + len(piece) > limits.text_characters:
            self.fail("text_too_long", f"a text may have {limits.text_characters:,} characters")
        elif connection.characters + len(piece) > limits.open_characters:
            self.fail("too_much_text", f"the open streams may have {limits.open_characters:,} characters together")
        else:
            self._kind = kind
            self._sent += len(piece)
            connection.underway += len(piece)
            connection.characters += len(piece)
            if piece:
                self._pieces.append(piece)
            self._new.set()

    # what is told

    async def _run(self) -> None:
        self._begun = True
        try:
            with self._door.telemetry.stream():
                await self._watch()
        except _Gone:
            pass
        except Exception as error:
            _log.error("a live stream broke down: %s", type(error).__name__)
            with contextlib.suppress(_Gone):
                await self._tell_error(
                    _Ending("error", "internal_error", "something went wrong in the gateway"), decision=None
                )
        finally:
            try:
                with contextlib.suppress(StoreError):
                    await self._kept()
            finally:
                self._give_back()

    def _give_back(self) -> None:
        door, connection = self._door, self._connection
        door.telemetry.held.dec(self._held)
        door.telemetry.released.inc(self._moderator.released)
        connection.underway -= self._sent - self._taken
        connection.characters -= self._frame.characters + self._sent
        door.streams -= 1
        connection.forget(self._frame.stream)

    async def _watch(self) -> None:
        if self._abandoned:
            return
        try:
            if await self._stopped_by_earlier():
                await self._send("end", reason="blocked", decision=await self._decision())
                return
            await self._connection.send("opened", self._frame.stream)
            while self._ending is None:
                if await self._step():
                    return
            await self._concluded(self._ending)
        except asyncio.CancelledError:
            if self._ending is None:
                raise
            await self._concluded(self._ending)
        except TimeoutError:
            idle = self._door.limits.idle_s
            await self._concluded(_Ending("idle", "idle", f"nothing came for {idle:g} seconds"))
        except (InputError, SessionClosed) as error:
            where = error.where if isinstance(error, InputError) else None
            await self._concluded(_Ending("error", "invalid_frame", str(error), where))
        except StoreError:
            lost = _Ending("error", "store_error", "the decision could not be kept")
            await self._tell_error(lost, decision=None)

    async def _stopped_by_earlier(self) -> bool:
        """Judge the turns that the stream is opened with, where the policy says so; whether one of them stops it."""
        frame = self._frame
        if frame.context is None or frame.observe or not self._policy.history.judge:
            return False
        self._earlier = await judge_turns(
            frame.context.turns,
            guard=self._door.guard,
            policy=self._policy,
            scope=frame.scope,
            timeout_s=self._door.guard_timeout_s,
        )
        self._heard = asyncio.get_running_loop().time()
        return any(decision.action >= BLOCKS for decision in self._earlier.values())

    async def _step(self) -> bool:
        """Take what has come, or wait for it; whether the stream has ended."""
        if not self._pieces and not self._complete:
            self._new.clear()
            if not await self._waited():
                return await self._told(self._moderator.late(), 0)
        for piece in self._gathered():
            if await self._told(await self._judged(piece), len(piece)):
                return True
        if self._complete and not self._pieces:
            rest = self._places.finish()
            if rest and await self._told(await self._moderator.feed(rest), 0):
                return True
            return await self._told(await self._moderator.finish(), 0)
        return False

    async def _waited(self) -> bool:
        """Wait for what comes next; False when what is held may be held no longer.

        Raises:
            TimeoutError: when nothing came for too long.
        """
        idle_until = self._heard + self._door.limits.idle_s
        due_s = self._moderator.due_s
        loop = asyncio.get_running_loop()
        due = idle_until if due_s is None else min(idle_until, loop.time() + due_s)
        try:
            async with asyncio.timeout_at(due):
                await self._new.wait()
        except TimeoutError:
            if due >= idle_until:
                raise
            return False
        return True

    def _gathered(self) -> Iterator[str | tuple[int, ...]]:
        """All that waits, in few pieces: what is said of it does not depend on how it was cut."""
        pieces, self._pieces = self._pieces, []
        whole: str | tuple[int, ...]
        if self._kind is Text:
            whole = "".join(piece for piece in pieces if isinstance(piece, str))
        else:
            whole = tuple(number for piece in pieces if not isinstance(piece, str) for number in piece)
        for start in range(0, len(whole), _SLICE):
            yield whole[start : start + _SLICE]

    async def _judged(self, piece: str | tuple[int, ...]) -> Step:
        if isinstance(piece, str):
            if self._frame.channel is Channel.TOOL_CALL:
                piece = self._places.feed(piece)
                if not piece:  # it is the beginning of an escape
                    return Step("")
            return await self._moderator.feed(piece)
        return await self._moderator.feed_ids(piece)

    async def _told(self, step: Step, taken: int) -> bool:
        self._taken += taken
        self._connection.underway -= taken
        if taken:  # only now does the client know that it may send more
            self._heard = asyncio.get_running_loop().time()
        if self._frame.tokens:
            self._untold += step.tokens
        self._masks += step.masks
        self._door.telemetry.held.inc(self._moderator.held - self._held)
        self._held = self._moderator.held
        if step.decision is None:
            await self._send("step")
            return False
        reason = "blocked" if step.decision.action >= BLOCKS else "finished"
        await self._send("end", reason=reason, decision=await self._decision())
        return True

    async def _send(self, kind: str, **more: Any) -> None:
        moderator = self._moderator
        tokens = self._untold
        if self._frame.masks:
            more["masks"] = [mask_field(mask, self._places) for mask in self._masks]
        await self._connection.send(
            kind,
            self._frame.stream,
            taken=self._taken,
            judged=self._places.given(moderator.judged),
            released=self._places.given(moderator.released),
            tokens=[token_field(token, self._places) for token in tokens],
            failure=failure_field(moderator.failure),
            **more,
        )
        self._untold, self._masks = [], []

    async def _concluded(self, ending: _Ending) -> None:
        """The stream ends before its text does: tell it with the decision on what was judged."""
        self._moderator.close()
        try:
            decision = await self._decision()
        except StoreError:
            lost = _Ending("error", "store_error", "the decision could not be kept")
            await self._tell_error(lost, decision=None)
            return
        if ending.code is not None:
            await self._tell_error(ending, decision)
        else:
            await self._send("end", reason=ending.reason, decision=decision)

    async def _tell_error(self, ending: _Ending, decision: dict[str, Any] | None) -> None:
        await self._connection.send(
            "error",
            self._frame.stream,
            code=ending.code,
            message=ending.message,
            param=ending.param,
            decision=decision,
        )

    async def _decision(self) -> dict[str, Any] | None:
        """The decision as it is told, kept; None when nothing was judged."""
        identity = await self._kept()
        turn, decision = self._decided()
        if decision is None:
            return None
        told = reported(decision, self._policy, identity) | {"turn": turn}
        if turn == (len(self._frame.context.turns) if self._frame.context else 0):
            told["span"] = span_field(decision, self._places)
        return told

    def _decided(self) -> tuple[int, Decision | None]:
        """The decision, and the place of the turn that it is about; that of the text comes after all others."""
        context, earlier, decision = self._frame.context, self._earlier, self._moderator.decision
        last = len(context.turns) if context else 0
        if context is None or not earlier:
            return last, decision
        if decision is None:
            last = max(earlier, key=lambda place: earlier[place].action)
        place, chosen = worst_of(last, decision or earlier[last], earlier)
        unjudged = (replace(part, state=CoverageState.NOT_JUDGED) for part in coverage_of(context))
        of_text = decision.coverage if decision else ()
        return place, replace(chosen, coverage=(*covered_with(unjudged, earlier), *of_text))

    async def _kept(self) -> str | None:
        """Close everything and keep what was decided, once; its id, if any.

        Raises:
            StoreError: when it could not be kept.
        """
        moderator, frame = self._moderator, self._frame
        moderator.close()
        _, decision = self._decided()
        if decision is None:
            return None
        if self._keeping is None:
            if moderator.decision is None and frame.context is not None:
                whole = frame.context
            else:
                turn = assistant_turn(moderator.text, frame.channel, reasoning=frame.reasoning, name=frame.name)
                whole = frame.context.then(turn) if frame.context else Conversation((turn,))
            self._keeping = asyncio.ensure_future(
                self._door.keep(decision, whole, whole.target.value, self._policy.retention)
            )
        try:
            return await asyncio.shield(self._keeping)
        except asyncio.CancelledError:
            await asyncio.wait({self._keeping})
            raise
