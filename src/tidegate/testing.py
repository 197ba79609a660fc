"""Fakes for tests, of ours and of anybody who builds on Tidegate: guards that judge by words or not, and an upstream.

They need no model, no network and no luck. What a fake guard says follows from the words of the text alone, its
trouble included: a word can make it fail or hang, so that a test can steer it from the far end of a real server.
`FakeUpstream` is an ASGI app that speaks OpenAI's chat completions and responses from a script, misbehaves as told, and
remembers what it received.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from tidegate.errors import GuardError, GuardUnavailable
from tidegate.guards.session import OpenSessions, TextSession, check_written
from tidegate.types import (
    CATEGORIES,
    Category,
    Channel,
    Conversation,
    Probabilities,
    Severity,
    Span,
    TokenVerdict,
    Turn,
    Verdict,
)

__all__ = [
    "Die",
    "FakeGuard",
    "FakeSession",
    "FakeStreamGuard",
    "FakeUpstream",
    "Hang",
    "NoGuard",
    "Opened",
    "Pause",
    "Received",
    "Reply",
    "Send",
    "chunk",
    "completion",
    "message_item",
    "response",
    "response_events",
    "text_chunks",
    "text_completion",
]

# --- guards -------------------------------------------------------------------------------------------------------

UNSAFE_WORDS: Final[Mapping[str, str]] = {
    "bomb": Category.VIOLENT.value,
    "fraud": Category.NON_VIOLENT_ILLEGAL_ACTS.value,
}
CONTROVERSIAL_WORDS: Final[Mapping[str, str]] = {"knife": Category.VIOLENT.value}

_TOKEN: Final = re.compile(r"\s*\S+|\s+$")
_COMPLETE_TOKEN: Final = re.compile(r"\s*\S+(?=\s)")
_PROBABILITIES: Final = {
    Severity.SAFE: Probabilities(0.98, 0.015, 0.005),
    Severity.CONTROVERSIAL: Probabilities(0.1, 0.8, 0.1),
    Severity.UNSAFE: Probabilities(0.01, 0.04, 0.95),
}


class FakeGuard:
    """A guard that judges whole texts by their words, in any case and without the punctuation around them.

    Args:
        unsafe: words that make a text unsafe, each with its category.
        controversial: the same for controversial.
        failing: a word that makes it raise ``error``.
        hanging: a word that makes it wait until it is cancelled.
        error: what it raises at the failing word; None for GuardUnavailable.
        delay_s: seconds that every call takes beside, at least 0.
        name: of the guard.

    Attributes:
        judged: every conversation that it was asked about, in order.
        closed: whether ``close`` was called.
    """

    def __init__(
        self,
        *,
        unsafe: Mapping[str, str] = UNSAFE_WORDS,
        controversial: Mapping[str, str] = CONTROVERSIAL_WORDS,
        failing: str = "guardfail",
        hanging: str = "guardhang",
        error: GuardError | None = None,
        delay_s: float = 0.0,
        name: str = "fake/1",
    ) -> None:
        self.unsafe = dict(unsafe)
        self.controversial = dict(controversial)
        self.failing = failing
        self.hanging = hanging
        self.error = error
        self.delay_s = delay_s
        self.judged: list[Conversation] = []
        self.closed = False
        self._name = name

    @property
    def name(self) -> str:
        return self._name

    async def judge(self, conversation: Conversation) -> Verdict:
        """The worst word of the last turn decides; all the categories of that severity are named."""
        self.judged.append(conversation)
        await self.trouble()
        calls: list[tuple[Severity, str | None]] = [(Severity.SAFE, None)]
        for word in _words(_text_of(conversation.turns[-1])):
            await self.trouble_at(word)
            calls.append(self.call(word))
        severity = max(severity for severity, _ in calls)
        found = dict.fromkeys(name for call, name in calls if name is not None and call is severity)
        shares = {name: (0.9 if name in found else 0.0) for name in CATEGORIES}
        return Verdict(
            conversation.target,
            severity,
            _PROBABILITIES[severity],
            tuple(found),
            shares if found else {},
            guard=self.name,
        )

    async def close(self) -> None:
        self.closed = True

    def call(self, word: str) -> tuple[Severity, str | None]:
        """What one word, as `str.casefold` leaves it, is taken for: its severity and category."""
        if word in self.unsafe:
            return Severity.UNSAFE, self.unsafe[word]
        if word in self.controversial:
            return Severity.CONTROVERSIAL, self.controversial[word]
        return Severity.SAFE, None

    async def trouble(self) -> None:
        """Take the time that every call takes."""
        if self.delay_s:
            await asyncio.sleep(self.delay_s)

    async def trouble_at(self, word: str) -> None:
        """Fail or hang when this is the word for it."""
        if word == self.failing:
            raise self.error or GuardUnavailable("the fake guard was told to fail")
        if word == self.hanging:
            await asyncio.Event().wait()


class Opened(NamedTuple):
    """What a session was opened with; see `tidegate.guards.base.StreamGuard.open`."""

    context: Conversation | None
    channel: Channel
    reasoning: str
    name: str


class FakeStreamGuard(FakeGuard):
    """A `FakeGuard` that can also watch a text while it is written.

    A token is a word with the white space before it; white space at the very end is a token by itself, and safe. Each
    token is judged by its own word, so ``bomb bomb`` is two unsafe tokens in a row and ``bomb is`` only one.

    Args:
        sticky: when true, nothing after an unsafe word is safe any more, as with guards that judge all the text so far.
        end_token: when true, ``finish`` adds a token without width that says what the worst word said.
        most_sessions: more open sessions than this raise GuardOverloaded; None for no limit.
        options: those of `FakeGuard`.

    Attributes:
        opened: what each session was opened with, in order.
        open_sessions: how many are open now.
    """

    def __init__(
        self, *, sticky: bool = False, end_token: bool = False, most_sessions: int | None = None, **options: Any
    ) -> None:
        super().__init__(**options)
        self.sticky = sticky
        self.end_token = end_token
        self.opened: list[Opened] = []
        self._sessions = OpenSessions(most_sessions)

    @property
    def open_sessions(self) -> int:
        return len(self._sessions)

    def open(
        self, context: Conversation | None, channel: Channel = Channel.ANSWER, *, reasoning: str = "", name: str = ""
    ) -> FakeSession:
        """Open a session; its words are judged in the same way in every channel.

        Raises:
            InputError: for a channel in which no assistant writes.
            GuardOverloaded: when ``most_sessions`` are open.
        """
        check_written(channel)
        session = FakeSession(self)
        self.opened.append(Opened(context, channel, reasoning, name))
        return session


class FakeSession(TextSession):
    """A session of a `FakeStreamGuard`."""

    def __init__(self, guard: FakeStreamGuard) -> None:
        super().__init__(guard._sessions)
        self._guard = guard
        self._rest = ""
        self._judged = 0
        self._worst: tuple[Severity, str | None] = (Severity.SAFE, None)

    async def _judge(self, text: str, *, last: bool) -> list[TokenVerdict]:
        await self._guard.trouble()
        self._rest += text
        pattern = _TOKEN if last else _COMPLETE_TOKEN
        tokens = [await self._token(match.group()) for match in pattern.finditer(self._rest)]
        self._rest = self._rest[sum(token.span.end - token.span.start for token in tokens) :]
        if last and self._guard.end_token:
            tokens.append(_token(self._judged, self._judged, *self._worst))
        return tokens

    async def _token(self, text: str) -> TokenVerdict:
        word = _bare(text)
        await self._guard.trouble_at(word)
        severity, category = self._guard.call(word)
        if self._guard.sticky and self._worst[0] is Severity.UNSAFE:
            severity, category = self._worst
        if severity > self._worst[0]:
            self._worst = severity, category
        start, self._judged = self._judged, self._judged + len(text)
        return _token(start, self._judged, severity, category)


class NoGuard:
    """A guard that finds everything safe at once, each piece as one token: what is left of a path without its guard."""

    name = "none"

    async def judge(self, conversation: Conversation) -> Verdict:
        return Verdict(conversation.target, Severity.SAFE, _PROBABILITIES[Severity.SAFE], guard=self.name)

    def open(
        self, context: Conversation | None, channel: Channel = Channel.ANSWER, *, reasoning: str = "", name: str = ""
    ) -> _NoSession:
        return _NoSession()

    async def close(self) -> None:
        pass


class _NoSession:
    def __init__(self) -> None:
        self._judged = 0

    async def feed(self, text: str) -> tuple[TokenVerdict, ...]:
        start, self._judged = self._judged, self._judged + len(text)
        return (_token(start, self._judged, Severity.SAFE, None),) if text else ()

    async def finish(self) -> tuple[TokenVerdict, ...]:
        return ()

    def close(self) -> None:
        pass


def _token(start: int, end: int, severity: Severity, category: str | None) -> TokenVerdict:
    return TokenVerdict(Span(start, end), severity, _PROBABILITIES[severity], category, 0.9 if category else 0.0)


def _bare(text: str) -> str:
    return re.sub(r"^\W+|\W+$", "", text).casefold()


def _words(text: str) -> Iterator[str]:
    return (_bare(match.group()) for match in _TOKEN.finditer(text))


def _text_of(turn: Turn) -> str:
    return "\n".join((turn.reasoning, turn.content, *(call.arguments for call in turn.tool_calls)))


# --- the upstream -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Send:
    """Send these bytes of the body."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Pause:
    """Wait this many seconds, or until the other side hangs up."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Hang:
    """Say nothing more until the other side hangs up."""


@dataclass(frozen=True, slots=True)
class Die:
    """Break the connection off, with the body unfinished."""


Act = Send | Pause | Hang | Die


@dataclass(frozen=True, slots=True)
class Reply:
    """What the upstream answers, act by act."""

    acts: tuple[Act, ...]
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=lambda: {"content-type": "application/json"})
    before: float = 0.0
    """Seconds until the status line is sent."""

    @classmethod
    def stream(cls, *parts: Mapping[str, Any] | bytes | Act, done: bool = True) -> Reply:
        """An event stream: objects become events, bytes go out as they are, acts are acted; ``[DONE]`` ends it."""
        acts = [part if isinstance(part, Send | Pause | Hang | Die) else Send(_event(part)) for part in parts]
        end = (Send(b"data: [DONE]\n\n"),) if done else ()
        return cls((*acts, *end), headers={"content-type": "text/event-stream"})

    @classmethod
    def json(cls, body: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
        """A JSON body; bytes go out as they are."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return cls((Send(data),), status, {"content-type": "application/json", **(headers or {})})

    @classmethod
    def error(cls, status: int, message: str, *, headers: Mapping[str, str] | None = None) -> Reply:
        """An error in OpenAI's shape."""
        error = {"message": message, "type": "fake_error", "param": None, "code": f"fake_{status}"}
        return cls.json({"error": error}, status=status, headers=headers)


def _event(part: Mapping[str, Any] | bytes) -> bytes:
    if isinstance(part, bytes):
        return part
    named = f"event: {part['type']}\n".encode() if isinstance(part.get("type"), str) else b""
    return named + b"data: " + json.dumps(part).encode() + b"\n\n"


@dataclass(slots=True)
class Received:
    """One request as the upstream saw it, and what became of it."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: Any = None
    """The parsed JSON; None when there was none."""
    data: bytes = b""
    """The bytes of it."""
    acted: int = 0
    """How many acts of the reply were carried out."""
    cancelled: bool = False
    """Whether the other side hung up before the reply was complete."""
    finished: bool = False
    """Whether the reply was sent to its end, or broken off as the script says."""


class FakeUpstream:
    """An OpenAI-compatible upstream that follows a script: an ASGI app for uvicorn or for a test client.

    Args:
        reply: what it answers: a Reply, or a function from the parsed request body to a Reply.

    Attributes:
        reply: the same; assign it to change what comes next.
        received: every request, in order.
    """

    def __init__(self, reply: Reply | Callable[[Any], Reply] | None = None) -> None:
        self.reply: Reply | Callable[[Any], Reply] = reply or Reply.json(completion("Hello there."))
        self.received: list[Received] = []

    @property
    def open_requests(self) -> int:
        """How many requests are being answered now."""
        return sum(not (request.finished or request.cancelled) for request in self.received)

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await _live(receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        request = Received(scope["method"], scope["path"], headers)
        self.received.append(request)
        body = await _body(receive)
        request.body, request.data = json.loads(body) if body else None, body
        reply = self.reply if isinstance(self.reply, Reply) else self.reply(request.body)
        hung_up = asyncio.ensure_future(_hang_up(receive))
        try:
            await self._act(reply, request, send, hung_up)
        except _HungUp:
            request.cancelled = True
        finally:
            hung_up.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await hung_up

    async def _act(self, reply: Reply, request: Received, send: Any, hung_up: asyncio.Future[None]) -> None:
        await _wait(reply.before, hung_up)
        headers = [(name.lower().encode(), value.encode()) for name, value in reply.headers.items()]
        await send({"type": "http.response.start", "status": reply.status, "headers": headers})
        for act in reply.acts:
            match act:
                case Send(data):
                    await _wait(0, hung_up)
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                case Pause(seconds):
                    await _wait(seconds, hung_up)
                case Hang():
                    await _wait(None, hung_up)
                case Die():
                    request.finished = True
                    raise ConnectionResetError("the fake upstream was told to die")
            request.acted += 1
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        request.finished = True


class _HungUp(Exception):
    """The other side closed the connection."""


async def _wait(seconds: float | None, hung_up: asyncio.Future[None]) -> None:
    """Wait for so many seconds, None for ever; raises _HungUp as soon as the other side is gone."""
    done, _ = await asyncio.wait({hung_up}, timeout=seconds)
    if done:
        raise _HungUp


async def _hang_up(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _body(receive: Any) -> bytes:
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return b""
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


async def _live(receive: Any, send: Any) -> None:
    while True:
        event = (await receive())["type"]
        await send({"type": f"{event}.complete"})
        if event == "lifespan.shutdown":
            return


# --- what it sends ------------------------------------------------------------------------------------------------


def chunk(
    delta: Mapping[str, Any] | None = None, *, index: int = 0, finish_reason: str | None = None, **more: Any
) -> dict[str, Any]:
    """One ``chat.completion.chunk`` with one choice; ``more`` are further fields at its top."""
    choice = {"index": index, "delta": dict(delta or {}), "finish_reason": finish_reason}
    return {**_head("chat.completion.chunk"), "choices": [choice], **more}


def text_chunks(
    pieces: Iterable[str], *, index: int = 0, of: str = "content", finish_reason: str | None = "stop"
) -> list[dict[str, Any]]:
    """The chunks of one choice: the role, then the pieces of its text, then the finish reason unless that is None."""
    chunks = [chunk({"role": "assistant", "content": ""}, index=index)]
    chunks += [chunk({of: piece}, index=index) for piece in pieces]
    return chunks if finish_reason is None else [*chunks, chunk(index=index, finish_reason=finish_reason)]


def completion(*contents: str | Mapping[str, Any], finish_reason: str = "stop") -> dict[str, Any]:
    """A whole ``chat.completion``: one choice for each content; a mapping is a whole message."""
    messages = [{"content": content} if isinstance(content, str) else content for content in contents]
    choices = [
        {"index": index, "message": {"role": "assistant", **message}, "finish_reason": finish_reason}
        for index, message in enumerate(messages)
    ]
    usage = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
    return {**_head("chat.completion"), "choices": choices, "usage": usage}


def text_completion(*texts: str, finish_reason: str = "stop") -> dict[str, Any]:
    """A whole ``text_completion``: one choice for each text."""
    choices = [
        {"text": text, "index": index, "logprobs": None, "finish_reason": finish_reason}
        for index, text in enumerate(texts)
    ]
    usage = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
    return {**_head("text_completion"), "choices": choices, "usage": usage}


def _head(kind: str) -> dict[str, Any]:
    return {"id": "chatcmpl-fake", "object": kind, "created": 1700000000, "model": "fake-model"}


def message_item(*texts: str, identity: str = "msg_fake", **more: Any) -> dict[str, Any]:
    """An item of a response's output: an assistant's message with these texts; ``more`` are further fields."""
    content = [{"type": "output_text", "text": text, "annotations": []} for text in texts]
    return {
        "id": identity,
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": content,
        **more,
    }


def response(*output: str | Mapping[str, Any], status: str = "completed", **more: Any) -> dict[str, Any]:
    """A whole response of the Responses API with these items; a string is a message. ``more`` are further fields."""
    items = [
        message_item(item, identity=f"msg_{place}") if isinstance(item, str) else dict(item)
        for place, item in enumerate(output)
    ]
    usage = {"input_tokens": 3, "output_tokens": 5, "total_tokens": 8}
    return {
        "id": "resp_fake",
        "object": "response",
        "created_at": 1700000000,
        "status": status,
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "metadata": {},
        "model": "fake-model",
        "output": items,
        "parallel_tool_calls": True,
        "temperature": 1.0,
        "tool_choice": "auto",
        "tools": [],
        "usage": usage if status == "completed" else None,
        **more,
    }


_ITEM_TEXTS: Final[Mapping[str, tuple[str, str]]] = {
    "function_call": ("arguments", "response.function_call_arguments"),
    "mcp_call": ("arguments", "response.mcp_call_arguments"),
    "custom_tool_call": ("input", "response.custom_tool_call_input"),
    "code_interpreter_call": ("code", "response.code_interpreter_call_code"),
}
_PART_TEXTS: Final[Mapping[str, tuple[str, str]]] = {
    "output_text": ("text", "response.output_text"),
    "refusal": ("refusal", "response.refusal"),
    "reasoning_text": ("text", "response.reasoning_text"),
    "summary_text": ("text", "response.reasoning_summary_text"),
}


def response_events(
    *output: str | Mapping[str, Any], cut: Callable[[str], Iterable[str]] = lambda text: [text], **more: Any
) -> list[dict[str, Any]]:
    """The events of a streaming response with these items, from the first to the last.

    Args:
        output: the items, as for `response`.
        cut: which pieces a text comes in.
        more: further fields of the response objects.
    """
    whole = response(*output, **more)
    begun = {**whole, "status": "in_progress", "output": [], "usage": None}
    events: list[dict[str, Any]] = [
        {"type": "response.created", "response": begun},
        {"type": "response.in_progress", "response": begun},
    ]
    for place, item in enumerate(whole["output"]):
        events += _item_events(place, item, cut)
    events.append({"type": "response.completed", "response": whole})
    return [{**event, "sequence_number": number} for number, event in enumerate(events)]


def _item_events(place: int, item: dict[str, Any], cut: Callable[[str], Iterable[str]]) -> Iterator[dict[str, Any]]:
    at = {"output_index": place, "item_id": item.get("id")}
    name, kind = _ITEM_TEXTS.get(item["type"], ("", ""))
    emptied: dict[str, Any] = {
        key: [] if key in ("content", "summary") else "" if key == name else value for key, value in item.items()
    }
    yield {"type": "response.output_item.added", "output_index": place, "item": {**emptied, "status": "in_progress"}}
    for key, index, added in (
        ("summary", "summary_index", "response.reasoning_summary_part"),
        ("content", "content_index", "response.content_part"),
    ):
        for number, part in enumerate(item.get(key) or ()):
            field_, events = _PART_TEXTS[part["type"]]
            where = {**at, index: number}
            yield {"type": f"{added}.added", **where, "part": {**part, field_: ""}}
            yield from _text_events(events, field_, part[field_], where, cut)
            yield {"type": f"{added}.done", **where, "part": part}
    if name:
        yield from _text_events(kind, name, item[name], at, cut)
    yield {"type": "response.output_item.done", "output_index": place, "item": item}


def _text_events(
    kind: str, name: str, text: str, where: dict[str, Any], cut: Callable[[str], Iterable[str]]
) -> Iterator[dict[str, Any]]:
    more: dict[str, Any] = {"logprobs": []} if kind == "response.output_text" else {}
    for piece in cut(text):
        yield {"type": f"{kind}.delta", **where, "delta": piece, **more}
    yield {"type": f"{kind}.done", **where, name: text, **more}
