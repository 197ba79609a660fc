"""Who is let in: the key that a client shows, and what it opens.

A key comes as ``Authorization: Bearer tdg_...`` or as ``x-api-key: tdg_...``; to the console, where a browser asks its
user, also as the password of HTTP Basic. It is ours: with keys on, no Authorization of a client goes to the upstream.
A client that has a key of its own for the upstream sends it as ``X-Upstream-Authorization`` (or
``X-Upstream-Api-Key``), which goes on under its plain name.

Whatever is wrong with a key, the answer is the same 401, and takes as long. A good key at a door that it does not open
gets 403. Paths that no door is known for are closed.

What is in force is what the database said last; it is asked every second. While it cannot be reached, keys that are
known stay good, for a stated time. After that nobody is let in, and the answer is 503: whether a key is good is then
not known.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Protocol

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as AsgiScope

from tidegate.errors import StoreError
from tidegate.gateway.limits import Limits
from tidegate.gateway.refusals import refuse, with_headers
from tidegate.gateway.statuses import Problem, no_such_path
from tidegate.guards.callers import with_adapter
from tidegate.store.keys import Key, KnownKey, split_token

__all__ = ["DOOR_OF", "OPEN_PATHS", "Auth", "KeyRing", "KeySource", "door_of"]

_log = logging.getLogger("tidegate.gateway")

OPEN_PATHS: Final = ("/healthz", "/livez", "/openapi.json")
"""Paths that need no key; who shows one may be told more there."""

DOOR_OF: Final[tuple[tuple[str, str], ...]] = (
    ("/v1/chat/completions", "chat"),
    ("/v1/completions", "completions"),
    ("/v1/responses", "responses"),
    ("/v1/messages", "messages"),
    ("/v1/moderations", "moderations"),
    ("/v1/guard", "guard"),
    ("/v1/live", "live"),
    ("/v1/models", "models"),
    ("/metrics", "metrics"),
    ("/playground", "console"),
    ("/console", "console"),
    ("/admin", "admin"),
)
"""Which door a path belongs to, with all that is below it."""

_OF_KEYS: Final = ("tenant", "region", "adapter", "key")
_NOT_LIMITED: Final = ("metrics", "models", "admin")
_OURS: Final = frozenset((b"authorization", b"x-api-key", b"x-upstream-authorization", b"x-upstream-api-key"))
_FOR_UPSTREAM: Final = {b"x-upstream-authorization": b"authorization", b"x-upstream-api-key": b"x-api-key"}


def door_of(path: str) -> str | None:
    """The door that a path belongs to; None when there is none."""
    if path == "/":
        return "console"
    return next((door for start, door in DOOR_OF if path == start or path.startswith(f"{start}/")), None)


class KeySource(Protocol):
    """Where keys are; a `tidegate.store.Keys`."""

    def changed_since(self, version: int) -> tuple[int, Sequence[KnownKey]]:
        """The newest version, and what changed after this one. Raises StoreError."""
        ...

    def admits(self, known: KnownKey | None, identity: str, secret: str, now: datetime) -> bool:
        """Whether the secret is that of a good key, in constant time."""
        ...


class KeyRing:
    """The keys that are known here.

    Args:
        source: where they are; asked in a thread.
        most_age_s: seconds that they stay good when the source cannot be asked.
        poll_s: seconds between two questions.
        all_every_s: seconds after which all are read again, and not only what changed.
        clock: seconds; only differences count.
    """

    def __init__(
        self,
        source: KeySource,
        *,
        most_age_s: float = 3600.0,
        poll_s: float = 1.0,
        all_every_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._source = source
        self.most_age_s = most_age_s
        self._poll_s = poll_s
        self._all_every_s = all_every_s
        self._clock = clock
        self._known: dict[str, KnownKey] = {}
        self._version = 0
        self._asked: float | None = None
        self._all_at = -1.0
        self.up = False

    def __len__(self) -> int:
        return len(self._known)

    @property
    def age_s(self) -> float:
        """How long ago the source said what is known, in seconds; infinite when it never did."""
        return float("inf") if self._asked is None else self._clock() - self._asked

    @property
    def usable(self) -> bool:
        """Whether what is known is new enough to go by."""
        return self.age_s <= self.most_age_s

    def find(self, token: str) -> Key | None:
        """The good key that this token is for; None for none, whatever is wrong with it."""
        parts = split_token(token)
        identity, secret = parts or ("0" * 12, "0" * 64)
        known = self._known.get(identity) if parts else None
        admitted = self._source.admits(known, identity, secret, datetime.now(UTC))
        return known.key if known is not None and admitted else None

    async def refresh(self) -> bool:
        """Ask the source once; whether it answered."""
        begun = self._clock()
        every = begun >= self._all_at
        try:
            version, changed = await asyncio.to_thread(self._source.changed_since, 0 if every else self._version)
            if version < self._version and not every:  # a backup was put back
                every = True
                version, changed = await asyncio.to_thread(self._source.changed_since, 0)
        except StoreError as error:
            if self.up or self._asked is None:
                _log.warning("keys cannot be read, those that are known stay good for a while: %s", error)
            self.up = False
            return False
        if every:
            self._all_at = begun + self._all_every_s
            self._known = {}
        self._known.update({known.key.id: known for known in changed})
        self._version, self._asked = version, begun
        if not self.up:
            _log.info("keys are read: %d", len(self._known))
        self.up = True
        return True

    async def watch(self) -> None:
        """Ask again and again, for ever."""
        while True:
            await asyncio.sleep(self._poll_s)
            try:
                await self.refresh()
            except Exception:  # whatever it is, what is known stays known, and grows old
                _log.exception("keys could not be read")
                self.up = False


@dataclass(frozen=True, slots=True)
class _Shown:
    token: str
    key: Key | None


class Auth:
    """The middleware that lets in; sets ``request.state`` for whatever is behind it.

    ``state`` has ``tenant``, ``region``, ``adapter``, ``key`` (a `Key`), ``limits``, and ``guest``: whether somebody
    is let in without a key although there are keys. Without keys on, everybody is let in, and the first four are None
    where nobody before has said them: whoever lets clients in there may say their tenant and region.

    Args:
        app: what is behind it.
        ring: the keys; None for a gateway without keys.
        limits: how much each may do.
        open_doors: doors that need no key, as ``metrics``.
        tell: told of each refusal, by its kind: ``unauthorized``, ``forbidden``, ``unknown``, ``requests`` or
            ``concurrent``.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        ring: KeyRing | None,
        limits: Limits,
        open_doors: Collection[str] = (),
        tell: Callable[[str], None] = lambda kind: None,
    ) -> None:
        self._app = app
        self._ring = ring
        self._limits = limits
        self._open_doors = frozenset(open_doors)
        self._tell = tell

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        if self._ring is None:
            said = scope.setdefault("state", {})
            said.update({**dict.fromkeys(_OF_KEYS), **said}, guest=False, limits=self._limits)
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        door = door_of(path)
        shown = self._shown(scope, door)
        try:
            key = self._admitted(self._ring, path, door, shown)
        except Problem as problem:
            await refuse(problem, scope, receive, send)
            return
        self._set_state(scope, key, guest=key is None)
        scope["headers"] = list(_for_upstream(scope["headers"]))
        if key is None or door in _NOT_LIMITED or path in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        await self._within_limits(key, scope, receive, send)

    async def _within_limits(self, key: Key, scope: AsgiScope, receive: Receive, send: Send) -> None:
        async with self._limits.exchange(key) as admission:
            if admission.full is not None:
                self._tell(admission.full)
                await refuse(admission.problem("key"), scope, receive, send)
                return
            with with_adapter(key.adapter):
                await self._app(scope, receive, with_headers(send, admission.headers))

    def _admitted(self, ring: KeyRing, path: str, door: str | None, shown: _Shown | None) -> Key | None:
        """The key that lets in; None where none is needed. Raises Problem."""
        key = shown.key if shown is not None and ring.usable else None
        if path in OPEN_PATHS or door in self._open_doors:
            return key
        if not ring.usable:
            self._tell("unknown")
            message = "whether a key is good cannot be told now: the database of keys is down"
            raise Problem(503, message, "server_error", None, "keys_unavailable", {"retry-after": "5"})
        if key is None:
            self._tell("unauthorized")
            asked = 'Basic realm="tidegate", charset="UTF-8"' if door == "console" else 'Bearer realm="tidegate"'
            message = "expected a key of this gateway, as Authorization: Bearer tdg_..."
            raise Problem(401, message, "invalid_request_error", None, "invalid_api_key", {"www-authenticate": asked})
        if door is None:
            raise no_such_path(path)
        if door not in key.doors:
            self._tell("forbidden")
            raise Problem(403, f"this key does not open this door: {door}", "permission_error", None, "door_closed")
        return key

    def _shown(self, scope: AsgiScope, door: str | None) -> _Shown | None:
        assert self._ring is not None, "only asked where there are keys"
        token = _token(Headers(scope=scope), basic=door == "console")
        return None if token is None else _Shown(token, self._ring.find(token))

    def _set_state(self, scope: AsgiScope, key: Key | None, *, guest: bool) -> None:
        """In the scope itself, as Starlette's router does: who counts routes outside looks there."""
        state: dict[str, Any] = {
            "tenant": key.tenant if key else None,
            "region": key.region if key else None,
            "adapter": key.adapter if key else None,
            "key": key,
            "guest": guest,
            "limits": self._limits,
        }
        scope.setdefault("state", {}).update(state)


def _token(headers: Headers, *, basic: bool) -> str | None:
    """What looks like a key of ours; None when nothing does."""
    kind, _, rest = headers.get("authorization", "").partition(" ")
    candidates = [rest.strip()] if kind.lower() == "bearer" else []
    if basic and kind.lower() == "basic":
        candidates.append(_password(rest.strip()))
    candidates.append(headers.get("x-api-key", "").strip())
    given = [each for each in candidates if each]
    return next((each for each in given if split_token(each)), given[0] if given else None)


def _password(encoded: str) -> str:
    try:
        return base64.b64decode(encoded, validate=True).decode().partition(":")[2]
    except (binascii.Error, ValueError):
        return ""


def _for_upstream(headers: Sequence[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, bytes]]:
    """The headers without what is ours; what a client has for the upstream, under its plain name."""
    for name, value in headers:
        if name in _FOR_UPSTREAM:
            yield _FOR_UPSTREAM[name], value
        elif name not in _OURS:
            yield name, value
