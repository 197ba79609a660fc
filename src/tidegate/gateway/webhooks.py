"""Webhooks: what the policy advises to notify or to take down is told to addresses that the operator named.

A file says which webhooks there are and what each is told of. What is due lies in the store's outbox, written together
with the decision; `Courier` takes it from there and posts it, so that no request ever waits for a webhook. Each post
is signed as Standard Webhooks says: receivers check it with a library they have, or in a few lines.

A post goes to the address in the file and nowhere else: redirects are failures. What is posted is the decision, and
never a text.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hashlib
import hmac
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self
from urllib.parse import urlsplit

import aiohttp
import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator

from tidegate import __version__
from tidegate.errors import SettingsError, StoreError
from tidegate.store import Delivery, Outbox, Standing
from tidegate.types import Action, Advice

__all__ = ["Courier", "Outcome", "Webhook", "addressed", "read_webhooks", "signed"]

Outcome = Literal["delivered", "failed", "dead"]

_log = logging.getLogger("tidegate.webhooks")

_PREFIX: Final = "whsec_"
_LEAST_SECRET: Final = 24
_LONGEST_WAIT_S: Final = 600.0
_SPARE_S: Final = 30.0
"""How much longer a lease is than the time of one post."""
_MOST_AT_ONCE: Final = 8
"""Most posts to one webhook at once."""
_LAST_POSTS_S: Final = 5.0
_COUNT_S: Final = 10.0
_GONE: Final = 410

Words = Annotated[tuple[str, ...], Field(min_length=1)]


class Webhook(BaseModel):
    """One webhook: where it is, and which decisions it is told of. What is None does not matter.

    Attributes:
        name: for people, metrics and the outbox: changing it makes another webhook of it.
        url: ``https://`` or ``http://``.
        secret: signs; ``whsec_`` and base64, or any text of 24 characters or more.
        secret_file: a file with it.
        advice: told where the decision has any of these.
        actions: told where the decision's action is one of these.
        categories: told where the verdict names any of these.
        tenants, regions, routes: told where the scope is one of these.
        timeout: seconds for one post.
        give_up_hours: how long a delivery is tried.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
    url: str = Field(repr=False)
    secret: SecretStr | None = None
    secret_file: Path | None = None
    advice: tuple[Advice, ...] | None = (Advice.NOTIFY, Advice.TAKE_DOWN)
    actions: Words | None = None
    categories: Words | None = None
    tenants: Words | None = None
    regions: Words | None = None
    routes: Words | None = None
    timeout: Annotated[float, Field(gt=0, le=120)] = 10.0
    give_up_hours: Annotated[float, Field(gt=0, le=24 * 30)] = 24.0

    @field_validator("url")
    @classmethod
    def _web_address(cls, value: str) -> str:
        try:
            parts = urlsplit(value)
            _ = parts.port
        except ValueError:
            raise ValueError("this is not a URL: expected something like https://hooks.example.com/tidegate") from None
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.fragment:
            raise ValueError("expected a URL that starts with https:// or http://, and has no #fragment")
        if parts.username is not None or parts.password is not None:
            raise ValueError("a URL must not hold a name or a password")
        return value

    @field_validator("actions")
    @classmethod
    def _known_actions(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return None if value is None else tuple(Action.parse(word).word for word in value)

    @model_validator(mode="after")
    def _one_secret(self) -> Self:
        if (self.secret is None) == (self.secret_file is None):
            raise ValueError("expected secret or secret_file, one of them")
        return self

    @property
    def key(self) -> bytes:
        """What signs. Raises SettingsError when the secret cannot be used."""
        if self.secret is not None:
            given = self.secret.get_secret_value()
        else:
            assert self.secret_file is not None
            try:
                given = self.secret_file.read_text(encoding="utf-8").strip()
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
                raise SettingsError(
                    f"cannot read the file {str(self.secret_file)!r}: {reason}", where=self.name
                ) from None
        try:
            key = base64.b64decode(given.removeprefix(_PREFIX), validate=True) if given.startswith(_PREFIX) else None
        except binascii.Error:
            raise SettingsError(f"the secret is no base64 after {_PREFIX}", where=self.name) from None
        key = given.encode() if key is None else key
        if len(key) < _LEAST_SECRET:
            raise SettingsError(f"the secret is too short: expected {_LEAST_SECRET} bytes or more", where=self.name)
        return key

    def wants(self, row: dict[str, Any]) -> bool:
        """Whether it is told of a decision, given as a row of the store."""
        scope = row["scope"]
        asked: tuple[tuple[Sequence[str] | None, Sequence[str | None]], ...] = (
            (self.advice, row["advice"]),
            (self.actions, [row["action"]]),
            (self.categories, row["categories"] or ()),
            (self.tenants, [scope.get("tenant")]),
            (self.regions, [scope.get("region")]),
            (self.routes, [scope.get("route")]),
        )
        return all(wanted is None or not set(wanted).isdisjoint(found) for wanted, found in asked)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    webhooks: Annotated[tuple[Webhook, ...], Field(max_length=100)]


def read_webhooks(path: Path) -> tuple[Webhook, ...]:
    """The webhooks of a file, each with a secret that can be used.

    Raises:
        SettingsError: when the file cannot be read or used; says what is wrong, and where in it.
    """
    try:
        said = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"cannot read the file: {error.strerror}", where=str(path)) from None
    except ValueError:
        raise SettingsError("this is not UTF-8 text", where=str(path)) from None
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        raise SettingsError("this is not YAML", where=f"{path}{'' if line is None else f' line {line + 1}'}") from None
    try:
        webhooks = _File.model_validate(said).webhooks
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise SettingsError(first["msg"].removeprefix("Value error, "), where=f"{path}: {place}") from None
    twice = [name for name, count in Counter(one.name for one in webhooks).items() if count > 1]
    if twice:
        raise SettingsError(f"two webhooks have the name {twice[0]}", where=str(path))
    for one in webhooks:
        _ = one.key
    return webhooks


def addressed(webhooks: Sequence[Webhook]) -> Callable[[dict[str, Any]], list[str]]:
    """Which of these are told of a decision: the ``address`` of `tidegate.store.open_store`."""
    return lambda row: [webhook.name for webhook in webhooks if webhook.wants(row)]


def signed(key: bytes, identity: str, at: int, body: bytes) -> dict[str, str]:
    """The three headers of Standard Webhooks.

    Args:
        key: the secret.
        identity: of the delivery; the same each time that it is tried.
        at: seconds since 1970: receivers refuse what is old, so that nobody can send it again.
        body: as it is posted.
    """
    mac = hmac.digest(key, f"{identity}.{at}.".encode() + body, hashlib.sha256)
    return {
        "webhook-id": identity,
        "webhook-timestamp": str(at),
        "webhook-signature": f"v1,{base64.b64encode(mac).decode()}",
    }


class Courier:
    """Posts what is due, as long as it is open.

    Args:
        outbox: where it lies.
        webhooks: whom it goes to.
        look_s: seconds between two looks when nothing is due.
        again_s: seconds until the first repetition; each later one takes twice as long, ten minutes at most.
    """

    def __init__(
        self, outbox: Outbox, webhooks: Sequence[Webhook], *, look_s: float = 1.0, again_s: float = 2.0
    ) -> None:
        self._outbox = outbox
        self._webhooks = {webhook.name: webhook for webhook in webhooks}
        self._keys = {webhook.name: webhook.key for webhook in webhooks}
        self._look_s = look_s
        self._again_s = again_s
        self._lease_s = max((webhook.timeout for webhook in webhooks), default=0.0) + _SPARE_S
        self._flying: dict[asyncio.Task[None], str] = {}
        self._stopping = asyncio.Event()
        self._running: asyncio.Task[None] | None = None
        self._count_at = 0.0
        self._up = True

    def open(
        self,
        tell: Callable[[str, Outcome], None] = lambda name, outcome: None,
        tell_standing: Callable[[str, int, int], None] = lambda name, waiting, dead: None,
    ) -> None:
        """Begin, in the event loop that runs.

        Args:
            tell: is told what became of each post, by the webhook's name.
            tell_standing: is told now and then how many deliveries of a webhook wait, and how many were given up.
        """
        self._stopping = asyncio.Event()
        self._running = asyncio.ensure_future(self._run(tell, tell_standing))

    async def close(self) -> None:
        """Take nothing more, and give what is under way a little time; the rest is due again when its lease ends."""
        self._stopping.set()
        running, self._running = self._running, None
        if running is not None:
            await running

    async def _run(self, tell: Callable[[str, Outcome], None], tell_standing: Callable[[str, int, int], None]) -> None:
        headers = {"user-agent": f"tidegate/{__version__}", "content-type": "application/json"}
        async with aiohttp.ClientSession(headers=headers, cookie_jar=aiohttp.DummyCookieJar()) as client:
            while not self._stopping.is_set():
                taken = 0
                try:
                    taken = await self._take(client, tell)
                    await self._count(tell_standing)
                    self._up = True
                except StoreError as error:
                    if self._up:
                        _log.warning("the outbox cannot be read: %s", error)
                    self._up = False
                if not taken:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._stopping.wait(), self._look_s)
            if self._flying:
                await asyncio.wait(self._flying, timeout=_LAST_POSTS_S)
            for task in self._flying:
                task.cancel()
            if self._flying:
                await asyncio.wait(self._flying)

    async def _take(self, client: aiohttp.ClientSession, tell: Callable[[str, Outcome], None]) -> int:
        busy = Counter(self._flying.values())
        free = [name for name in self._webhooks if busy[name] < _MOST_AT_ONCE]
        if not free:
            return 0
        room = min(_MOST_AT_ONCE - busy[name] for name in free)
        taken = await asyncio.to_thread(self._outbox.claim, free, most=room, lease_s=self._lease_s)
        for delivery in taken:
            task = asyncio.ensure_future(self._deliver(client, delivery, tell))
            self._flying[task] = delivery.webhook
            task.add_done_callback(lambda done: self._flying.pop(done, None))
        return len(taken)

    async def _deliver(
        self, client: aiohttp.ClientSession, delivery: Delivery, tell: Callable[[str, Outcome], None]
    ) -> None:
        webhook = self._webhooks[delivery.webhook]
        problem = await self._post(client, webhook, delivery)
        outcome: Outcome = "delivered"
        try:
            if problem is None:
                await asyncio.to_thread(self._outbox.delivered, delivery)
            else:
                again = self._again(webhook, delivery, problem)
                outcome = "dead" if again is None else "failed"
                await asyncio.to_thread(self._outbox.failed, delivery, problem, again)
        except StoreError as error:  # then it is due again when its lease ends
            _log.warning("what became of a delivery could not be written down: %s", error)
        tell(webhook.name, outcome)
        if outcome == "dead":
            _log.error("webhook %s: a delivery was given up: %s", webhook.name, problem)

    async def _post(self, client: aiohttp.ClientSession, webhook: Webhook, delivery: Delivery) -> str | None:
        """Post it; None when it was taken, else what went wrong."""
        body = delivery.body.encode()
        headers = signed(self._keys[webhook.name], f"{delivery.decision}-{webhook.name}", int(time.time()), body)
        try:
            async with (
                asyncio.timeout(webhook.timeout),
                client.post(webhook.url, data=body, headers=headers, allow_redirects=False) as answer,
            ):
                return None if 200 <= answer.status < 300 else f"status {answer.status}"
        except TimeoutError:
            return "timeout"
        except (aiohttp.ClientError, OSError, ValueError) as error:
            return type(error).__name__

    def _again(self, webhook: Webhook, delivery: Delivery, problem: str) -> datetime | None:
        """When it is tried again; None for never."""
        if problem == f"status {_GONE}":
            return None
        wait_s = min(_LONGEST_WAIT_S, self._again_s * 2.0 ** min(delivery.attempts - 1, 30)) * random.uniform(0.5, 1)
        again = datetime.now(UTC) + timedelta(seconds=wait_s)
        return again if again - delivery.time < timedelta(hours=webhook.give_up_hours) else None

    async def _count(self, tell_standing: Callable[[str, int, int], None]) -> None:
        if time.monotonic() < self._count_at:
            return
        self._count_at = time.monotonic() + _COUNT_S
        standings = await asyncio.to_thread(self._outbox.standings)
        for name in self._webhooks:
            standing = standings.get(name, Standing(0, 0, datetime.now(UTC), None))
            tell_standing(name, standing.waiting, standing.dead)
