"""A Stream guard behind vLLM servers that have Tidegate's plugin: many live streams at once, on other machines' GPUs.

A session sends all its ids with each piece, and is answered for the new ones. What vLLM has of them in its prefix cache
is not computed again (`tidegate.integrations.vllm_requests`); nothing is held for a session there, so that a server may
be restarted, or another one asked, in the middle of a text: the ids are all there is, and they are here. A session
stays with the server that has its cache. Texts that begin alike share it, as the turns of a conversation that goes on.

*Coalescing.* One request of a session is under way at a time. Pieces that come meanwhile, with ``feed`` called again
before the last call has returned, go together with the next one; its call returns the verdicts of all of them, and the
calls behind it return none.

*Failures.* A server that cannot be reached, breaks off, is overloaded or does not answer in time is asked again, or
another one is, for ``patience_s`` in all; then the failure is the session's.

*What is served.* The server says what its logits mean, how long a text may be, and what its tokenizer is: nothing else
needs to be here. Each answer says which model gave it, so that one is noticed that changes under a session.

The form of requests and answers is `tidegate.guards.vllm_wire`, and what is judged where `tidegate.guards.qwen_stream`.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from array import array
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from tidegate.engine.sequence import Sequence as Tokens
from tidegate.engine.sequence import Windows
from tidegate.errors import (
    GuardError,
    GuardOverloaded,
    GuardTimeout,
    GuardUnavailable,
    InputError,
    SessionClosed,
    UnreadableVerdict,
)
from tidegate.guards.qwen_stream import Qwen3StreamSession, QwenStreamGuard, head_readings
from tidegate.guards.remote_servers import Server, ServerPool, ServerTrouble, base_address, read_key
from tidegate.guards.spec_file import read_spec_file
from tidegate.guards.vllm_wire import DESCRIBE, PATH, Answer, Ask, Description, read
from tidegate.model.qwen_template import QwenTemplate
from tidegate.model.qwen_tokens import QwenTokenizer
from tidegate.types import Target, TokenVerdict

__all__ = ["VllmMetrics", "VllmStreamConfig", "VllmStreamGuard", "VllmStreamSession", "load_vllm_stream", "read_config"]

_SPEC: Final = "expected vllm-stream:URL[,URL...][#MODEL], or vllm-stream:FILE with a YAML or JSON file"
_PERMANENT: Final = (400, 401, 403, 404, 405, 413, 422)
"""Statuses that the same request would get again."""
_NO_PLUGIN: Final = "it must be a vLLM server that serves a Stream checkpoint, with Tidegate installed beside it"
_MOST_SALTS: Final = 3
"""How many times logits that the server did not give are asked for again."""
_FIRST_PAUSE_S: Final = 0.05
_LONGEST_PAUSE_S: Final = 1.0
Seconds = Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)]
Word = Annotated[str, Field(min_length=1, max_length=200)]


class VllmStreamConfig(BaseModel):
    """A `vllm-stream` guard as a file: the only key that must be there is ``urls``.

    Attributes:
        urls: addresses of servers that serve the same checkpoint in the same way, as ``http://host:8000``.
        model: its name there; None for the only one.
        key_file: a file with the key that is sent as bearer token; None for none.
        tokenizer: a ``tokenizer.json``, or a folder with one; None for the one that the server sends.
        custom: names of categories that the checkpoint may have beside the official ones.
        debounce: how many tokens in a row confirm a severity of a whole answer.
        most_sessions: how many sessions may be open at once.
        patience_s: for how many seconds a piece of text is tried, over all requests.
        timeout_s: seconds that one request may take.
        connect_timeout_s: seconds until a connection stands.
        most_open: how many requests one server may have at once.
        failures: after how many failures in a row a server rests.
        rest_s: for how many seconds, the first time.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    urls: Annotated[tuple[Word, ...], Field(min_length=1)]
    model: Word | None = None
    key_file: Word | None = None
    tokenizer: Word | None = None
    custom: tuple[Word, ...] = ()
    debounce: Annotated[int, Field(ge=1, le=1000)] = 2
    most_sessions: Annotated[int, Field(ge=1, le=1_000_000)] = 4096
    patience_s: Seconds = 30.0
    timeout_s: Seconds = 20.0
    connect_timeout_s: Seconds = 5.0
    most_open: Annotated[int, Field(ge=1, le=100_000)] = 1024
    failures: Annotated[int, Field(ge=1, le=1000)] = 3
    rest_s: Seconds = 1.0

    @field_validator("urls")
    @classmethod
    def _addresses(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        try:
            bases = tuple(base_address(url, "").removesuffix("/v1") for url in urls)
        except InputError as error:
            raise ValueError(error.message) from None
        if len(set(bases)) < len(bases):
            raise ValueError("an address is given twice")
        return bases


@dataclass(slots=True)
class VllmMetrics:
    """What a guard did so far. Counts begin at zero with the guard and only grow.

    Attributes:
        requests: how many were answered.
        tokens_judged: positions whose logits were asked for and given.
        tokens_sent: ids that were sent for that, repetitions included.
        tokens_computed: positions that the servers computed for that, those of unfinished blocks included.
        repeated: requests that were asked again under a salt, because some of their positions were in the cache.
        troubles: requests that failed and were tried again.
    """

    requests: int = 0
    tokens_judged: int = 0
    tokens_sent: int = 0
    tokens_computed: int = 0
    repeated: int = 0
    troubles: int = 0


class RemoteLogits(NamedTuple):
    """One branch at some positions: see `tidegate.guards.qwen_stream.Logits`."""

    risk: NDArray[np.float32]
    category: NDArray[np.float32]


class VllmStreamGuard(QwenStreamGuard):
    """Judges by asking vLLM servers; see the module's text. Used from one event loop at a time.

    Args:
        config: which servers, and how.
        key: sent as bearer token; None for none.
    """

    def __init__(self, config: VllmStreamConfig, *, key: str | None = None) -> None:
        super().__init__(debounce=config.debounce, most_sessions=config.most_sessions)
        self.config = config
        self._client = _Client(config, key)
        self._known: Description | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._asking = asyncio.Lock()

    @property
    def name(self) -> str:
        """As ``vllm-stream/MODEL``, once a server was asked or when the config names the model."""
        model = self.config.model or (self._known and self._known.model)
        return f"vllm-stream/{model}" if model else "vllm-stream"

    @property
    def servers(self) -> tuple[Server, ...]:
        """The servers, and how each of them does."""
        return self._client.pool.servers

    def metrics(self) -> VllmMetrics:
        """What it did so far."""
        return self._client.metrics

    async def close(self) -> None:
        """Close the connections; sessions that are open fail from now on. Safe to call twice."""
        await self._client.pool.close()

    @property
    def _session(self) -> type[Qwen3StreamSession]:
        return VllmStreamSession

    def _check_open(self) -> None:
        if self._client.pool.closed:
            raise GuardUnavailable("the guard is closed")

    def _stream(self, before: Sequence[int]) -> RemoteStream:
        return RemoteStream(self._client, Windows(self._window, self._window // 8, len(before)), before)

    async def _ready(self) -> None:
        """Ask a server what it serves, the first time."""
        if self._known is not None:
            return
        if self._loop is not asyncio.get_running_loop():
            self._loop, self._asking = asyncio.get_running_loop(), asyncio.Lock()
        async with self._asking:
            if self._known is None:
                known = await self._client.describe()
                self._readings = _readings(known, self.config.custom)
                self._template = await asyncio.to_thread(_template, known, self.config.tokenizer)
                self._window = known.window
                self._known = known


class VllmStreamSession(Qwen3StreamSession):
    """One text in pieces: see `tidegate.guards.qwen_stream.Qwen3StreamSession`.

    Calls may overlap, and are then served in their order: see the module's text.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._turn = asyncio.Lock()
        self._pieces: list[str] = []

    async def feed(self, text: str) -> tuple[TokenVerdict, ...]:
        """Take more text; return the verdicts that no further text can change, of all the text that waits. May be ().

        Raises:
            SessionClosed: after ``finish`` or ``close``.
            GuardError: when the guard cannot judge; the session is then closed.
        """
        self._pieces.append(text)
        async with self._its_turn():
            if self._pieces or self._closed:
                return await self._take(self._waiting(), last=False)
            return ()

    async def feed_ids(self, ids: Sequence[int]) -> tuple[TokenVerdict, ...]:
        """Take the next tokens: see `tidegate.guards.qwen_stream.Qwen3StreamSession.feed_ids`."""
        async with self._its_turn():
            return await super().feed_ids(ids)

    async def finish(self) -> tuple[TokenVerdict, ...]:
        """The text is complete: return the verdicts that remain, and close.

        Raises:
            SessionClosed: after ``finish`` or ``close``.
            GuardError: when the guard cannot judge.
        """
        async with self._its_turn():
            rest = await self._take(self._waiting(), last=False) if self._pieces else ()
            return rest + await super().finish()

    @asynccontextmanager
    async def _its_turn(self) -> AsyncIterator[None]:
        """Wait for the calls before; one that is given up, or fails, closes the session."""
        try:
            async with self._turn:
                yield
        except BaseException:
            self.close()
            raise

    def _waiting(self) -> str:
        text = "".join(self._pieces)
        self._pieces.clear()
        return text


class RemoteStream:
    """Tokens that follow each other, judged by servers: see `tidegate.guards.qwen_stream.Stream`."""

    def __init__(self, client: _Client, windows: Windows, before: Sequence[int]) -> None:
        self._client = client
        self._tokens = Tokens(windows, array("i", before))
        self._server: Server | None = None
        self._salt = ""
        self._asked: asyncio.Task[RemoteLogits] | None = None
        self._closed = False

    async def feed(
        self, ids: Sequence[int], target: Target = Target.RESPONSE, *, last_only: bool = False
    ) -> RemoteLogits:
        """Append tokens; the logits of each of them, or of the last one.

        Raises:
            SessionClosed: when the stream is closed, also while this waits.
            GuardError: when there are none; the stream is then of no more use.
        """
        self._tokens.accept(ids, target, last_only=last_only)
        parts = []
        while self._tokens.waiting:
            self._tokens.begin()
            count = self._tokens.ready
            wanted = self._tokens.answers(count)
            if wanted:
                parts.append(await self._answer(self._tokens.cached + count, wanted, target))
            self._tokens.advance(count)
        return RemoteLogits(*(np.concatenate(part) for part in zip(*parts, strict=True)))

    def close(self) -> None:
        """End what is under way; safe to call any number of times."""
        self._closed = True
        if self._asked is not None:
            self._asked.cancel()

    async def _answer(self, stop: int, wanted: int, target: Target) -> RemoteLogits:
        if self._closed:
            raise SessionClosed("the stream is closed")
        asked = self._asked = asyncio.ensure_future(self._ask(stop, wanted, target))
        try:
            await asyncio.wait({asked})
            if asked.cancelled():
                raise SessionClosed("the stream was closed while it was judged")
            return asked.result()
        finally:
            self._asked = None
            if not asked.cancel() and not asked.cancelled():
                asked.exception()

    async def _ask(self, stop: int, wanted: int, target: Target) -> RemoteLogits:
        """The last logits of the first positions of this window.

        When the server gives fewer than are wanted, its cache had some of them: another session has the same text. From
        then on this one has a cache of its own. A server that runs out of memory while it computes may lose some too.
        """
        ids = self._tokens.windows.ids(self._tokens.tokens, self._tokens.window, 0, stop)
        for _ in range(_MOST_SALTS + 1):
            ask = Ask(ids=ids, first=stop - wanted, target=target, salt=self._salt)
            logits, self._server = await self._client.ask(ask, self._server)
            if len(logits.risk) >= wanted:
                break
            self._salt = uuid.uuid4().hex
            self._client.metrics.repeated += 1
        if len(logits.risk) != wanted:
            raise UnreadableVerdict(f"the server answered for {len(logits.risk)} of {wanted} tokens")
        self._client.metrics.tokens_judged += wanted
        return logits


class _Client:
    """Asks servers, with patience."""

    def __init__(self, config: VllmStreamConfig, key: str | None) -> None:
        self._config = config
        self._served: str | None = None
        self.metrics = VllmMetrics()
        self.pool = ServerPool(
            config.urls,
            path="",
            key=key,
            timeout_s=config.timeout_s,
            connect_timeout_s=config.connect_timeout_s,
            attempts=len(config.urls),
            most_open=config.most_open,
            failures=config.failures,
            rest_s=config.rest_s,
        )

    async def describe(self) -> Description:
        """What is served."""
        try:
            answer, _ = await self._patiently(dict(DESCRIBE), None)
        except _Refused as refused:
            raise GuardUnavailable(f"{refused}: {_NO_PLUGIN}") from None
        description = read(Description, answer)
        self._served = description.served
        return description

    async def ask(self, ask: Ask, first: Server | None) -> tuple[RemoteLogits, Server]:
        """The logits that a server gives, this one if it can be, and which one it was."""
        try:
            data, server = await self._patiently(ask.model_dump(mode="json"), first)
        except _Refused as refused:
            raise refused.error from None
        answer = read(Answer, data)
        if answer.served != self._served:
            raise GuardUnavailable("the server serves another model now, or in another way")
        self.metrics.requests += 1
        self.metrics.tokens_sent += len(ask.ids)
        self.metrics.tokens_computed += answer.computed
        return RemoteLogits(*answer.logits()), server

    async def _patiently(self, data: dict[str, Any], first: Server | None) -> tuple[Any, Server]:
        limit = time.monotonic() + self._config.patience_s
        pause = _FIRST_PAUSE_S
        while True:
            try:
                return await self.pool.run(lambda server: self._post(server, data), first=first)
            except (GuardUnavailable, GuardOverloaded, GuardTimeout):
                if self.pool.closed or time.monotonic() + pause > limit:
                    raise
            self.metrics.troubles += 1
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    async def _post(self, server: Server, data: dict[str, Any]) -> tuple[Any, Server]:
        body: dict[str, Any] = {"data": data}
        if self._config.model is not None:
            body["model"] = self._config.model
        try:
            return await self.pool.post(server, PATH, body), server
        except ServerTrouble as trouble:
            if trouble.status in _PERMANENT:
                raise _Refused(trouble.error) from None
            raise


class _Refused(GuardError):
    """A server would refuse the same request again."""

    def __init__(self, error: GuardError) -> None:
        super().__init__(str(error))
        self.error = error


def read_config(rest: str) -> VllmStreamConfig:
    """What stands behind ``vllm-stream:`` as a config: addresses, with or without a model, or a file.

    Raises:
        InputError: when it is neither, or the file is not of the form; says where.
    """
    if "://" not in rest:
        if not rest:
            raise InputError(_SPEC, where="guard")
        return read_spec_file(Path(rest), VllmStreamConfig)
    urls, marked, model = rest.partition("#")
    if bool(marked) != bool(model) or not all(urls.split(",")):
        raise InputError(_SPEC, where="guard")
    try:
        return VllmStreamConfig(urls=tuple(urls.split(",")), model=model or None)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise InputError(first["msg"].removeprefix("Value error, "), where="guard") from None


def load_vllm_stream(rest: str) -> VllmStreamGuard:
    """Make a guard of what stands behind ``vllm-stream:``. No server is asked before the first judgement.

    Raises:
        InputError: when the spec or the file is wrong.
        GuardUnavailable: when the key cannot be read.
    """
    config = read_config(rest)
    return VllmStreamGuard(config, key=None if config.key_file is None else read_key(Path(config.key_file)))


def _readings(known: Description, custom: Collection[str]) -> dict[Target, Any]:
    try:
        return head_readings(known.config, custom)
    except InputError as error:
        raise GuardUnavailable(f"the labels of what is served cannot be used: {error}") from error


def _template(known: Description, path: str | None) -> QwenTemplate:
    if path is not None:
        file = Path(path)
        return QwenTemplate(QwenTokenizer.load(file / "tokenizer.json" if file.is_dir() else file))
    definition = known.definition()
    if definition is None:
        raise GuardUnavailable("the server has no tokenizer to send: name one in the file, as tokenizer: FOLDER")
    return QwenTemplate(QwenTokenizer(definition))
