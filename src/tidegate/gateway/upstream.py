"""The LLM behind the gateway: one aiohttp client towards any OpenAI-compatible server.

Says in our own errors what went wrong. Of the upstream's headers it shows only the identity of a request, and what is
left of a client's own quota.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal

import aiohttp

from tidegate import __version__
from tidegate.errors import InputError, UpstreamError
from tidegate.gateway.schemas import json_of, mended
from tidegate.gateway.statuses import Problem

if TYPE_CHECKING:
    from tidegate.gateway.tracing import Tracing, UpstreamSpan

__all__ = ["KeyHeader", "Upstream", "UpstreamAnswer", "base_of"]

KeyHeader = Literal["authorization", "x-api-key"]
"""The header that shows an upstream its key: OpenAI's, or Anthropic's, beside which OpenAI's is sent too: servers that
speak both ways, as vLLM, look for it there."""

_KEY_HEADERS: Final[tuple[KeyHeader, ...]] = ("authorization", "x-api-key")
_NO_HEADERS: Final[Mapping[str, str]] = MappingProxyType({})

LONGEST_ERROR: Final = 64 * 1024
_LEAVE_S: Final = 0.25
_LONGEST_REST: Final = 16 * 1024
_KEEP_ALIVE_S: Final = 1.5
"""Shorter than servers keep idle connections: a request on one that the server just closed would fail."""

_MESSAGES: Final = {
    400: "the upstream cannot use this request",
    401: "the upstream does not take this key",
    402: "the upstream asks for a payment",
    403: "the upstream does not allow this",
    404: "the upstream does not know this model or path",
    408: "the upstream waited too long for the request",
    409: "the upstream reports a conflict",
    413: "the upstream finds the request too long",
    422: "the upstream cannot use this request",
    429: "the upstream has too many requests, or a quota is used up",
    500: "something went wrong in the upstream",
    502: "something went wrong behind the upstream",
    503: "the upstream is overloaded or not ready",
    504: "the upstream did not get an answer in time",
}
_WORD: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_PLACE: Final = re.compile(r"[A-Za-z0-9_.\[\]-]{1,64}")
_IDENTITY: Final = re.compile(r"[A-Za-z0-9_.:/@+-]{1,128}")
_IDENTITIES: Final = ("x-request-id", "request-id")
UPSTREAM_ID: Final = "x-upstream-request-id"
_QUOTAS: Final = ("x-ratelimit-", "anthropic-ratelimit-")
_RETRY_AFTER: Final = re.compile(r"\d{1,10}|[A-Z][a-z]{2}, \d{2} [A-Z][a-z]{2} \d{4} \d{2}:\d{2}:\d{2} GMT")


def base_of(url: str) -> str:
    """The address that paths are appended to: ``http://host`` means ``http://host/v1``; a path is taken as it is.

    Raises:
        InputError: when it is not an http or https address.
    """
    scheme, found, rest = url.strip().rstrip("/").partition("://")
    if not found or scheme.lower() not in ("http", "https") or not rest or rest.startswith("/"):
        raise InputError("expected an address such as http://127.0.0.1:8000/v1", where="upstream_url")
    return f"{scheme}://{rest}" if "/" in rest else f"{scheme}://{rest}/v1"


class UpstreamAnswer:
    """A response of the upstream whose status and headers are here, and whose body is still to be read."""

    def __init__(
        self, response: aiohttp.ClientResponse, longest: int, *, quota: bool = False, span: UpstreamSpan | None = None
    ) -> None:
        self._response = response
        self._longest = longest
        self._quota = quota
        self._span = span

    @property
    def status(self) -> int:
        return self._response.status

    @property
    def media_type(self) -> str:
        return self._response.content_type

    @property
    def headers(self) -> dict[str, str]:
        """What a client may see: the upstream's id of the request, and the quota where that is the client's own.

        The id has a name of its own, because the request has one here too.
        """
        said = {name.lower(): value for name, value in self._response.headers.items() if _IDENTITY.fullmatch(value)}
        told = {name: value for name, value in said.items() if self._quota and name.startswith(_QUOTAS)}
        identity = next((said[name] for name in _IDENTITIES if name in said), None)
        return told if identity is None else {UPSTREAM_ID: identity, **told}

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it arrives: each time all that is there.

        Raises:
            UpstreamError: when it breaks off or falls silent.
        """
        with _translated(self._span):
            async for piece in self._response.content.iter_any():
                yield piece

    async def json(self) -> Any:
        """The whole body as JSON.

        Raises:
            UpstreamError: when it breaks off, is too long or nested too deep, or is not JSON.
        """
        data = await self._read(self._longest)
        try:
            return _parsed(data)
        except ValueError:
            raise UpstreamError("the upstream's answer is not JSON") from None
        except RecursionError:
            raise UpstreamError("the upstream's answer is nested too deep") from None

    async def problem(self) -> Problem:
        """What the client is told of the upstream's error: the status, words for programs, and when to come again.

        Its message is left out, because it may quote what the model wrote, and nobody has judged that.
        """
        try:
            said = _parsed(await self._read(LONGEST_ERROR))
        except (UpstreamError, ValueError, RecursionError):
            said = None
        error = said.get("error") if isinstance(said, dict) else None
        fields = error if isinstance(error, dict) else {}
        retry = self._response.headers.get("retry-after", "").strip()
        return Problem(
            self.status if 400 <= self.status <= 599 else 502,
            _MESSAGES.get(self.status, f"the upstream answered with status {self.status}"),
            _word(fields.get("type"), _WORD) or "upstream_error",
            _word(fields.get("param"), _PLACE),
            _word(fields.get("code"), _WORD),
            self.headers | ({"retry-after": retry} if _RETRY_AFTER.fullmatch(retry) else {}),
        )

    def close(self) -> None:
        """Break off at once; the upstream sees that nobody listens any more."""
        self._response.close()
        if self._span is not None:
            self._span.end()

    async def leave(self) -> None:
        """All that matters was read: read the little that may follow, so that the connection can serve others.

        It is given up when more follows, or when the end does not come soon.
        """
        rest = 0
        with contextlib.suppress(TimeoutError, aiohttp.ClientError, OSError):
            async with asyncio.timeout(_LEAVE_S):
                async for piece in self._response.content.iter_any():
                    rest += len(piece)
                    if rest > _LONGEST_REST:
                        break
        self.close()

    async def _read(self, longest: int) -> bytes:
        parts: list[bytes] = []
        size = 0
        async for piece in self.pieces():
            size += len(piece)
            if size > longest:
                raise UpstreamError(f"the upstream's answer is longer than {longest:,} bytes")
            parts.append(piece)
        return b"".join(parts)


def _parsed(data: bytes) -> Any:
    """JSON that can be written again: numbers that JSON does not know are null, single surrogates are replaced."""
    text = data.decode()
    value = json_of(text)
    if "\\ud" in text or "\\uD" in text:
        return json.loads(mended(json.dumps(value, ensure_ascii=False)))
    return value


def _word(value: Any, known: re.Pattern[str]) -> str | None:
    """A word for programs; None for what could be a sentence."""
    word = str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""
    return word if known.fullmatch(word) else None


class Upstream:
    """A client for one upstream; open it in the event loop that uses it.

    Args:
        url: see `base_of`.
        key: shown to the upstream; None sends the key of each client on.
        connect_timeout_s: seconds until a connection stands, greater than 0.
        silence_timeout_s: seconds that the upstream may say nothing, before its answer and in it, greater than 0.
        longest_answer: the most bytes of an answer that does not stream.
        tracing: makes a span of each call, and names it to the upstream; None for no traces.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        connect_timeout_s: float = 10.0,
        silence_timeout_s: float = 300.0,
        longest_answer: int = 32 * 1024 * 1024,
        tracing: Tracing | None = None,
    ) -> None:
        self._base = base_of(url)
        self._key = key
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout_s, sock_read=silence_timeout_s)
        self._longest = longest_answer
        self._tracing = tracing
        self._client: aiohttp.ClientSession | None = None

    async def open(self) -> None:
        """Make the client; needs a running event loop."""
        self._client = aiohttp.ClientSession(
            timeout=self._timeout,
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S),
            headers={"user-agent": f"tidegate/{__version__}", "accept-encoding": "identity"},
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
        )

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()
            self._client = None

    @asynccontextmanager
    async def request(
        self, method: str, path: str, *, headers: Mapping[str, str] = _NO_HEADERS, body: bytes | None = None
    ) -> AsyncIterator[UpstreamAnswer]:
        """Send a request; the answer is closed with the block, whether it was read to its end or not.

        Raises:
            UpstreamError: when the upstream cannot be reached, or breaks off.
        """
        answer = await self.send(method, path, headers=headers, body=body)
        try:
            yield answer
        finally:
            answer.close()

    async def send(
        self,
        method: str,
        path: str,
        *,
        headers: Mapping[str, str] = _NO_HEADERS,
        key_header: KeyHeader = "authorization",
        body: bytes | None = None,
        model: str | None = None,
    ) -> UpstreamAnswer:
        """Send a request, and wait for the status. Whoever gets the answer closes it.

        Args:
            method: of HTTP.
            path: below the base URL.
            headers: of the client that go on, in lower case. Keys among them do not, where the gateway has its own.
            key_header: where that own key stands.
            body: as it is sent.
            model: the model that is asked for, for traces; None when there is none.

        Raises:
            UpstreamError: when the upstream cannot be reached, or breaks off.
        """
        if self._client is None:
            raise UpstreamError("the client towards the upstream is closed", status=503)
        sent = dict(headers)
        if body is not None:
            sent["content-type"] = "application/json"
        if self._key:
            for name in _KEY_HEADERS:
                sent.pop(name, None)
            sent["authorization"] = f"Bearer {self._key}"
            if key_header == "x-api-key":
                sent[key_header] = self._key
        span = None if self._tracing is None else self._tracing.call(method, path, model, sent)
        try:
            with _translated(span):
                response = await self._client.request(
                    method, f"{self._base}{path}", data=body, headers=sent, allow_redirects=False
                )
        except BaseException:
            if span is not None:
                span.end()
            raise
        if span is not None:
            span.answered(response.status)
        return UpstreamAnswer(response, self._longest, quota=not self._key, span=span)


class _translated:  # noqa: N801 - reads as a word
    """Turn what the client library raises into an UpstreamError; the span of the call, where there is one, is told."""

    def __init__(self, span: UpstreamSpan | None = None) -> None:
        self._span = span

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self._span is not None and isinstance(error, aiohttp.ClientError | OSError):
            self._span.fail(error)
        match error:
            case aiohttp.SocketTimeoutError() | asyncio.TimeoutError():
                raise UpstreamError("the upstream did not answer in time", status=504, reason=_reason(error)) from error
            case aiohttp.ClientConnectorError():
                raise UpstreamError("the upstream cannot be reached", status=502, reason=_reason(error)) from error
            case aiohttp.ClientError() | OSError():
                raise UpstreamError("the upstream broke off", status=502, reason=_reason(error)) from error


def _reason(error: Exception | None) -> str:
    """Why, in words of ours or of the system: what the library says may quote the upstream."""
    match error:
        case aiohttp.ConnectionTimeoutError():
            return "no connection in time"
        case asyncio.TimeoutError():
            return "silent for too long"
        case aiohttp.ClientConnectorDNSError():
            return "its name cannot be resolved"
        case aiohttp.ClientConnectorCertificateError():
            return "its certificate is not valid"
        case aiohttp.ClientSSLError():
            return "it does not speak TLS as expected"
        case aiohttp.ServerDisconnectedError():
            return "it closed the connection"
        case aiohttp.ClientPayloadError():
            return "its answer ended before it was whole"
        case aiohttp.ClientResponseError():
            return "what it sent is not HTTP"
        case OSError(errno=int(number)):
            return os.strerror(number).lower()
    return type(error).__name__
