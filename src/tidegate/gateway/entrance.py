"""The entrance of a gateway: who is let in, how much each may do, what is remembered, and what they share.

`Entrance` puts the parts together for one app: keys (`auth`), limits (`limits`), the front (`front`), a memory for
verdicts, and the Redis behind the last two. Its parts know nothing of each other.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Final, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge
from starlette.applications import Starlette

from tidegate.errors import InputError
from tidegate.gateway.auth import Auth, KeyRing, KeySource
from tidegate.gateway.front import Front
from tidegate.gateway.limits import LimitOptions, Limits, LocalCounts, SharedCounts
from tidegate.gateway.telemetry import several_workers
from tidegate.guards.base import StreamGuard
from tidegate.guards.remembered import DEFAULT_TTL_S, Memory, RememberedGuard
from tidegate.store.shared import Shared

__all__ = ["Entrance", "EntranceOptions"]

_TELL_S: Final = 1.0
OPENABLE: tuple[str, ...] = ("metrics", "console")
"""Doors that may be opened to those who have no key."""


@dataclass(frozen=True, slots=True)
class EntranceOptions:
    """How a gateway's entrance is.

    Attributes:
        keys: where keys are; None lets everybody in.
        keys_age_s: seconds that known keys stay good while they cannot be read.
        open_doors: doors that need no key: ``metrics``, ``console``.
        limits: what holds beside the keys' own allowances.
        redis_url: the Redis that gateways share; None for none.
        secret: of the hashes in Redis, 16 to 64 bytes, the same for all who share it; None for one of this process.
        remembered: verdicts that this process remembers; 0 for none.
        remembered_s: seconds that a verdict is remembered.
        read_timeout_s: seconds in which the body of a request must be here; None for any time.
        hosts: names that the gateway answers to; () for any.
    """

    keys: KeySource | None = None
    keys_age_s: float = 3600.0
    open_doors: Collection[str] = ()
    limits: LimitOptions = field(default_factory=LimitOptions)
    redis_url: str | None = field(default=None, repr=False)
    secret: bytes | None = field(default=None, repr=False)
    remembered: int = 0
    remembered_s: float = DEFAULT_TTL_S
    read_timeout_s: float | None = None
    hosts: Collection[str] = ()

    def __post_init__(self) -> None:
        unknown = sorted(set(self.open_doors) - set(OPENABLE))
        if unknown:
            raise InputError(
                f"{unknown[0]!r} cannot be open to everybody; only {' and '.join(OPENABLE)} can", where="open_doors"
            )


class Entrance:
    """The entrance of one app.

    Args:
        options: how it is.
        registry: where it counts.

    Raises:
        InputError: when the address of the Redis is none.
    """

    def __init__(self, options: EntranceOptions, registry: CollectorRegistry) -> None:
        self._options = options
        self._refused = Counter(
            "tidegate_refused", "Requests that were turned away at the entrance, by why.", ("kind",), registry=registry
        )
        self._remembered = Counter(
            "tidegate_verdicts", "Verdicts by where they came from.", ("source",), registry=registry
        )
        secret = options.secret or secrets.token_bytes(32)
        self.shared = self._share(options, registry)
        counts = LocalCounts() if self.shared is None else SharedCounts(self.shared, secret)
        self._counts = counts
        self.limits = Limits(counts, options.limits)
        self.ring = None if options.keys is None else KeyRing(options.keys, most_age_s=options.keys_age_s)
        if self.ring is not None:
            self._key_gauges = _key_gauges(self.ring, registry)
        self._memory = None
        if options.remembered:
            self._memory = Memory(
                secret,
                most=options.remembered,
                ttl_s=options.remembered_s,
                shared=self.shared,
                tell=lambda source: self._remembered.labels(source).inc(),
            )
        self._tasks: list[asyncio.Task[None]] = []

    @staticmethod
    def _share(options: EntranceOptions, registry: CollectorRegistry) -> Shared | None:
        if options.redis_url is None:
            return None
        up = Gauge("tidegate_redis_up", "1 while the Redis answers.", registry=registry, multiprocess_mode="livemin")
        losses = Counter("tidegate_redis_losses", "How often the Redis was lost.", registry=registry)

        def tell(is_up: bool) -> None:
            up.set(is_up)
            if not is_up:
                losses.inc()

        return Shared(options.redis_url, tell=tell)

    def remembering(self, guard: StreamGuard) -> StreamGuard:
        """The guard with a memory, where there is one."""
        return guard if self._memory is None else RememberedGuard(guard, self._memory)

    def put_before(self, app: Starlette) -> None:
        """Have every request of the app come through here."""
        options = self._options
        app.add_middleware(
            Auth,
            ring=self.ring,
            limits=self.limits,
            open_doors=frozenset(options.open_doors),
            tell=lambda kind: self._refused.labels(kind).inc(),
        )
        app.add_middleware(Front, read_timeout_s=options.read_timeout_s, hosts=options.hosts)

    async def open(self) -> None:
        """Read the keys, find the Redis, and go on doing so. Neither has to be there."""
        if self.shared is not None:
            await self.shared.open()
        if isinstance(self._counts, SharedCounts):
            self._tasks.append(asyncio.ensure_future(self._counts.keep_leases()))
        if self.ring is not None:
            await self.ring.refresh()
            self._tasks.append(asyncio.ensure_future(self.ring.watch()))
            if several_workers():
                self._tasks.append(asyncio.ensure_future(self._tell_keys()))

    async def _tell_keys(self) -> None:
        """Write down what the gauges of keys are, for ever: another worker may be the one that tells them."""
        while True:
            for gauge, value in self._key_gauges:
                gauge.set(value())
            await asyncio.sleep(_TELL_S)

    async def close(self) -> None:
        """End all of it; safe to call twice."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        if self.shared is not None:
            await self.shared.close()


def _key_gauges(ring: KeyRing, registry: CollectorRegistry) -> list[tuple[Gauge, Callable[[], float]]]:
    """What is told of keys; of several workers the one that knows least."""
    told: tuple[tuple[str, str, Literal["livemin", "livemax"], Callable[[], float]], ...] = (
        ("keys", "Keys that are known, also those that are no longer good.", "livemin", lambda: float(len(ring))),
        ("keys_up", "1 while keys can be read.", "livemin", lambda: float(ring.up)),
        ("keys_age_seconds", "How old what is known of keys is.", "livemax", lambda: ring.age_s),
        ("keys_most_age_seconds", "How old it may become; then nobody is let in.", "livemax", lambda: ring.most_age_s),
    )
    gauges = []
    for name, about, mode, value in told:
        gauge = Gauge(f"tidegate_{name}", about, registry=registry, multiprocess_mode=mode)
        if not several_workers():
            gauge.set_function(value)
        gauges.append((gauge, value))
    return gauges
