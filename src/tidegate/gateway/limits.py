"""How much each may do: requests per minute, exchanges at once, and less for who was told to slow down.

Requests are counted by a token bucket: it holds ``burst`` requests, and fills by ``per_minute``. An exchange that is
open holds a lease until it ends. A request is let in when every limit that it stands under has room, and then it counts
for all of them; one that is turned away counts for none.

Counts are in this process, or shared by all gateways on one Redis: then one script looks at all limits of a request and
counts it in all, as one step. Its names are keyed hashes, so that a Redis never holds the name of a tenant or a person.
When the Redis is down, each gateway goes by its own counts at once; it has kept them meanwhile, so that nobody gets a
new burst by that. A lease that a dead gateway holds in Redis ends by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import heapq
import math
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol

from tidegate.errors import InputError
from tidegate.gateway.statuses import Problem
from tidegate.moderate import surely
from tidegate.store.keys import Allowance, Key
from tidegate.store.shared import Shared, SharedDown, UnknownScript

__all__ = ["Admission", "Counts", "Limit", "LimitOptions", "Limits", "LocalCounts", "SharedCounts", "Throttle"]

LEASE_S: Final = 60.0
"""How long a lease in Redis lives unless it is renewed; it is renewed three times as often."""
LEAST_FACTOR: Final = 1 / 64
MOST_SUBJECTS: Final = 100_000
"""The most subjects that one process keeps throttled; more, and those that are so longest are let go."""

Full = Literal["requests", "concurrent"]


class Throttle(Protocol):
    """Who carries out the advice ``throttle`` of a policy."""

    async def throttle(
        self, tenant: str | None, subject: str | None, *, factor: float | None = None, seconds: float | None = None
    ) -> bool:
        """Let a subject do less for a while; each time again, while it lasts, still less.

        Args:
            tenant: whose subject it is; None where there are no tenants.
            subject: whose content it was; None when that is not known, and then nothing can be done.
            factor: by what its number of requests is multiplied, more than 0 and at most 1; None for the usual one.
            seconds: for how long, from now on; None for the usual time.

        Returns:
            Whether it was done.
        """
        ...


@dataclass(frozen=True, slots=True)
class Limit:
    """One limit that a request stands under.

    Attributes:
        name: what is counted, as ``key/0123456789ab``; limits of one name must be equal.
        per_minute: requests on average; None for any number.
        burst: requests at once after a pause, at least 1.
        concurrent: exchanges at once; None for any number.
    """

    name: str
    per_minute: float | None = None
    burst: int = 1
    concurrent: int | None = None

    @classmethod
    def of(cls, name: str, allowance: Allowance) -> Limit:
        """The limit that an allowance means."""
        usual = max(1, (allowance.per_minute or 0) // 6)
        return cls(name, allowance.per_minute, allowance.burst or usual, allowance.concurrent)


@dataclass(frozen=True, slots=True)
class Admission:
    """Whether a request was let in.

    Attributes:
        full: which kind of limit has no room; None when the request was let in.
        limit: requests per minute of the limit that is nearest to its end; None when requests are not limited.
        remaining: requests that it would still let in at once.
        reset_s: seconds until it is as if nobody had asked.
        wait_s: seconds until it pays to come again; 0 when the request was let in.
    """

    full: Full | None = None
    limit: int | None = None
    remaining: int = 0
    reset_s: float = 0.0
    wait_s: float = 0.0

    @property
    def headers(self) -> dict[str, str]:
        """What the client is told, in OpenAI's names."""
        told: dict[str, str] = {}
        if self.limit is not None:
            told["x-ratelimit-limit-requests"] = str(self.limit)
            told["x-ratelimit-remaining-requests"] = str(self.remaining)
            told["x-ratelimit-reset-requests"] = _duration(self.reset_s)
        if self.full is not None:
            told["retry-after"] = str(max(1, math.ceil(self.wait_s)))
        return told

    def problem(self, who: str) -> Problem:
        """The error for a request that was turned away."""
        what = "too many requests" if self.full == "requests" else "too many requests at once"
        return Problem(429, f"{what} with this {who}", "requests", None, "rate_limit_exceeded", self.headers)


def _duration(seconds: float) -> str:
    """As OpenAI writes it: ``120ms``, ``6s``, ``1m30s``."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"


class Counts(Protocol):
    """Where requests and exchanges are counted."""

    async def take(self, limits: Sequence[Limit], lease: str) -> Admission:
        """Let a request in when all limits have room, and count it; its exchange holds the lease where that counts."""
        ...

    def leave(self, limits: Sequence[Limit], lease: str) -> Coroutine[Any, Any, None]:
        """The exchange has ended."""
        ...

    async def slow(self, name: str, factor: float, seconds: float) -> None:
        """Multiply the factor of a name, for so long."""
        ...

    async def take_slowed(self, name: str, per_minute: float) -> float:
        """Count a request of a name that may be slowed; seconds that it has to wait, 0 when it is let in."""
        ...


# --- in this process ----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Bucket:
    tokens: float
    at: float


@dataclass(slots=True)
class _Slowed:
    factor: float
    until: float
    bucket: _Bucket


class LocalCounts:
    """Counts in memory, for one process.

    Args:
        clock: seconds; only differences count.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[str, _Bucket] = {}
        self._leases: dict[str, set[str]] = {}
        self._slowed: dict[str, _Slowed] = {}
        self._ends: list[tuple[float, str]] = []

    async def take(self, limits: Sequence[Limit], lease: str) -> Admission:
        return self.count(limits, lease)

    async def leave(self, limits: Sequence[Limit], lease: str) -> None:
        self.forget(limits, lease)

    async def slow(self, name: str, factor: float, seconds: float) -> None:
        now = self._clock()
        self._let_go(now)
        known = self._slowed.get(name)
        slowed = known or _Slowed(1.0, now, _Bucket(1.0, now))
        slowed.factor = max(LEAST_FACTOR, slowed.factor * factor)
        slowed.until = max(slowed.until, now + seconds)
        self._slowed[name] = slowed
        heapq.heappush(self._ends, (slowed.until, name))

    async def take_slowed(self, name: str, per_minute: float) -> float:
        now = self._clock()
        self._let_go(now)
        slowed = self._slowed.get(name)
        if slowed is None:
            return 0.0
        rate = per_minute * slowed.factor / 60
        tokens = min(1.0, slowed.bucket.tokens + (now - slowed.bucket.at) * rate)
        if tokens < 1:
            return (1 - tokens) / rate
        slowed.bucket = _Bucket(tokens - 1, now)
        return 0.0

    def count(self, limits: Sequence[Limit], lease: str, *, anyway: bool = False) -> Admission:
        """`take`; ``anyway`` counts it whether there is room or not."""
        now = self._clock()
        found = [self._look(limit, now) for limit in limits]
        full = next((one for one in found if one.full is not None), None)
        if full is not None and not anyway:
            return full
        for limit in limits:
            if limit.per_minute is not None:
                self._buckets[limit.name] = _Bucket(max(0.0, self._tokens(limit, now) - 1), now)
            if limit.concurrent is not None:
                self._leases.setdefault(limit.name, set()).add(lease)
        return _nearest([_after(limit, self._tokens(limit, now)) for limit in limits])

    def forget(self, limits: Sequence[Limit], lease: str) -> None:
        """`leave`."""
        for limit in limits:
            held = self._leases.get(limit.name)
            if held is not None:
                held.discard(lease)
                if not held:
                    del self._leases[limit.name]

    def _look(self, limit: Limit, now: float) -> Admission:
        tokens = self._tokens(limit, now)
        if limit.per_minute is not None and tokens < 1:
            return _after(limit, tokens, full="requests")
        if limit.concurrent is not None and len(self._leases.get(limit.name, ())) >= limit.concurrent:
            return _after(limit, tokens, full="concurrent")
        return _after(limit, tokens)

    def _tokens(self, limit: Limit, now: float) -> float:
        bucket = self._buckets.get(limit.name)
        if bucket is None or limit.per_minute is None:
            return limit.burst
        return min(limit.burst, bucket.tokens + (now - bucket.at) * limit.per_minute / 60)

    def _let_go(self, now: float) -> None:
        """Of subjects whose time is over, and of the first to end when there are too many."""
        while self._ends and (self._ends[0][0] <= now or len(self._slowed) >= MOST_SUBJECTS):
            until, name = heapq.heappop(self._ends)
            slowed = self._slowed.get(name)
            if slowed is not None and slowed.until <= until:
                del self._slowed[name]


def _after(limit: Limit, tokens: float, *, full: Full | None = None) -> Admission:
    if limit.per_minute is None:
        return Admission(full, wait_s=1.0 if full else 0.0)
    rate = limit.per_minute / 60
    wait_s = {"requests": (1 - tokens) / rate, "concurrent": 1.0}[full] if full else 0.0
    return Admission(full, math.ceil(limit.per_minute), max(0, int(tokens)), (limit.burst - tokens) / rate, wait_s)


def _nearest(found: Sequence[Admission]) -> Admission:
    """What is told of several limits that all have room: the one that ends first."""
    limited = [one for one in found if one.limit is not None]
    return min(limited, key=lambda one: one.remaining, default=Admission())


# --- shared by several --------------------------------------------------------------------------------------------

_TAKE: Final = """
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1000000
local lease, lease_s = ARGV[1], tonumber(ARGV[2])
local tokens = {}
local full, at = '', 0
for i = 1, #KEYS / 2 do
  local rate, burst, most = tonumber(ARGV[3 * i]), tonumber(ARGV[3 * i + 1]), tonumber(ARGV[3 * i + 2])
  tokens[i] = burst
  if rate > 0 then
    local bucket = redis.call('HMGET', KEYS[2 * i - 1], 'tokens', 'at')
    if bucket[1] then
      tokens[i] = math.min(burst, tonumber(bucket[1]) + math.max(0, now - tonumber(bucket[2])) * rate)
    end
    if tokens[i] < 1 and full == '' then full, at = 'requests', i end
  end
  if most >= 0 then
    redis.call('ZREMRANGEBYSCORE', KEYS[2 * i], '-inf', now)
    if redis.call('ZCARD', KEYS[2 * i]) >= most and full == '' then full, at = 'concurrent', i end
  end
end
local told = {full, tostring(at)}
for i = 1, #KEYS / 2 do
  local rate, burst, most = tonumber(ARGV[3 * i]), tonumber(ARGV[3 * i + 1]), tonumber(ARGV[3 * i + 2])
  if full == '' then
    if rate > 0 then
      tokens[i] = tokens[i] - 1
      redis.call('HSET', KEYS[2 * i - 1], 'tokens', string.format('%.6f', tokens[i]), 'at', string.format('%.6f', now))
      redis.call('PEXPIRE', KEYS[2 * i - 1], math.ceil(1000 * burst / rate) + 1000)
    end
    if most >= 0 then
      redis.call('ZADD', KEYS[2 * i], now + lease_s, lease)
      redis.call('PEXPIRE', KEYS[2 * i], math.ceil(1000 * lease_s) + 1000)
    end
  end
  told[#told + 1] = string.format('%.6f', tokens[i])
end
return told
"""

_RENEW: Final = """
local time = redis.call('TIME')
local ends = tonumber(time[1]) + tonumber(time[2]) / 1000000 + tonumber(ARGV[1])
for i = 2, #ARGV do redis.call('ZADD', KEYS[1], ends, ARGV[i]) end
redis.call('PEXPIRE', KEYS[1], math.ceil(1000 * tonumber(ARGV[1])) + 1000)
return 1
"""

_SLOW: Final = """
local factor = tonumber(redis.call('HGET', KEYS[1], 'factor') or '1') * tonumber(ARGV[1])
redis.call('HSET', KEYS[1], 'factor', string.format('%.9f', math.max(tonumber(ARGV[3]), factor)))
local left = redis.call('PTTL', KEYS[1])
redis.call('PEXPIRE', KEYS[1], math.max(left, tonumber(ARGV[2])))
return 1
"""

_TAKE_SLOWED: Final = """
local slowed = redis.call('HMGET', KEYS[1], 'factor', 'tokens', 'at')
if not slowed[1] then return '0' end
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1000000
local rate = tonumber(ARGV[1]) * tonumber(slowed[1])
local tokens = 1
if slowed[2] then tokens = math.min(1, tonumber(slowed[2]) + math.max(0, now - tonumber(slowed[3])) * rate) end
if tokens < 1 then return string.format('%.6f', (1 - tokens) / rate) end
redis.call('HSET', KEYS[1], 'tokens', string.format('%.6f', tokens - 1), 'at', string.format('%.6f', now))
return '0'
"""


class SharedCounts:
    """Counts in a Redis, for all gateways that have the same key; in this process while the Redis is down.

    Args:
        shared: the Redis.
        key: of the hashes that names become there, 16 to 64 bytes.
        lease_s: how long a lease lives unless it is renewed, in seconds.
    """

    def __init__(self, shared: Shared, key: bytes, *, lease_s: float = LEASE_S) -> None:
        self._shared = shared
        self._key = key
        self._lease_s = lease_s
        self._local = LocalCounts()
        self._held: dict[str, set[str]] = {}

    async def take(self, limits: Sequence[Limit], lease: str) -> Admission:
        names = [name for limit in limits for name in (self._name("r", limit.name), self._name("c", limit.name))]
        numbers = [number for limit in limits for number in _numbers(limit)]
        try:
            told = await self._run(_TAKE, names, lease, self._lease_s, *numbers)
        except SharedDown:
            admission = self._local.count(limits, lease)
        else:
            admission = _read_admission(told, limits)
            if admission.full is None:
                self._local.count(limits, lease, anyway=True)
        if admission.full is None:
            for limit in limits:
                if limit.concurrent is not None:
                    self._held.setdefault(self._name("c", limit.name), set()).add(lease)
        return admission

    async def leave(self, limits: Sequence[Limit], lease: str) -> None:
        self._local.forget(limits, lease)
        for limit in limits:
            if limit.concurrent is None:
                continue
            name = self._name("c", limit.name)
            held = self._held.get(name, set())
            held.discard(lease)
            if not held:
                self._held.pop(name, None)
            with contextlib.suppress(SharedDown):
                await self._shared.execute("ZREM", name, lease)

    async def slow(self, name: str, factor: float, seconds: float) -> None:
        await self._local.slow(name, factor, seconds)
        with contextlib.suppress(SharedDown):
            await self._run(_SLOW, [self._name("s", name)], factor, math.ceil(seconds * 1000), LEAST_FACTOR)

    async def take_slowed(self, name: str, per_minute: float) -> float:
        try:
            return float(await self._run(_TAKE_SLOWED, [self._name("s", name)], per_minute / 60))
        except SharedDown:
            return await self._local.take_slowed(name, per_minute)

    async def keep_leases(self) -> None:
        """Renew what this process holds, for ever: also in a Redis that lost all it had."""
        while True:
            await asyncio.sleep(self._lease_s / 3)
            await self.renew()

    async def renew(self) -> None:
        """Renew the leases that this process holds, once."""
        for name, leases in list(self._held.items()):
            with contextlib.suppress(SharedDown):
                await self._run(_RENEW, [name], self._lease_s, *leases)

    async def _run(self, script: str, names: Sequence[str], *arguments: Any) -> Any:
        """A script's result; it is sent whole only where the Redis does not know it."""
        values = [value if isinstance(value, str) else repr(value) for value in arguments]
        try:
            return await self._shared.execute("EVALSHA", _DIGESTS[script], len(names), *names, *values)
        except UnknownScript:
            return await self._shared.execute("EVAL", script, len(names), *names, *values)

    def _name(self, kind: str, name: str) -> str:
        """All names have one tag, so that one script may touch them all in a cluster of several Redis."""
        digest = hashlib.blake2b(name.encode(), key=self._key, digest_size=16, person=b"tidegate limits").hexdigest()
        return f"{{tidegate}}:{kind}:{digest}"


_DIGESTS: Final = {
    script: hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()
    for script in (_TAKE, _RENEW, _SLOW, _TAKE_SLOWED)
}


def _numbers(limit: Limit) -> tuple[float, int, int]:
    rate = 0.0 if limit.per_minute is None else limit.per_minute / 60
    return rate, limit.burst, -1 if limit.concurrent is None else limit.concurrent


def _read_admission(told: Sequence[bytes], limits: Sequence[Limit]) -> Admission:
    tokens = [float(value) for value in told[2:]]
    if not told[0]:
        return _nearest([_after(limit, left) for limit, left in zip(limits, tokens, strict=True)])
    place = int(told[1]) - 1
    return _after(limits[place], tokens[place], full="requests" if told[0] == b"requests" else "concurrent")


# --- as the gateway asks ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LimitOptions:
    """What holds beside the keys' own allowances.

    Attributes:
        tenant: for each tenant, with all of its keys together.
        subject_per_minute: what a subject that is throttled starts from, before the factor, greater than 0.
        throttle_factor: by what that is multiplied each time that it is throttled, more than 0 and at most 1.
        throttle_s: seconds that it lasts from the last time on, more than 0.
    """

    tenant: Allowance = field(default_factory=Allowance)
    subject_per_minute: float = 60.0
    throttle_factor: float = 0.5
    throttle_s: float = 300.0


class Limits:
    """The limits of one gateway; also the `Throttle` of its policy's advice.

    Args:
        counts: where it is counted.
        options: what holds beside the keys' own allowances.
    """

    def __init__(self, counts: Counts, options: LimitOptions = LimitOptions()) -> None:
        self._counts = counts
        self._options = options

    @asynccontextmanager
    async def exchange(self, key: Key) -> AsyncIterator[Admission]:
        """Let an exchange in, or not: that is said; the block is its time."""
        limits = [Limit.of(f"key/{key.id}", key.allowance)]
        if self._options.tenant != Allowance():
            limits.append(Limit.of(f"tenant/{key.tenant}", self._options.tenant))
        limits = [limit for limit in limits if (limit.per_minute, limit.concurrent) != (None, None)]
        if not limits:
            yield Admission()
            return
        lease = uuid.uuid4().hex
        admission = await self._counts.take(limits, lease)
        try:
            yield admission
        finally:
            if admission.full is None:
                await surely(self._counts.leave(limits, lease))

    async def throttle(
        self, tenant: str | None, subject: str | None, *, factor: float | None = None, seconds: float | None = None
    ) -> bool:
        """See `Throttle.throttle`.

        Raises:
            InputError: when the factor or the time is out of its range.
        """
        factor = self._options.throttle_factor if factor is None else factor
        seconds = self._options.throttle_s if seconds is None else seconds
        if not 0 < factor <= 1 or not 0 < seconds <= 86_400 * 366:
            raise InputError("expected a factor from 0 to 1, and seconds of at most a year", where="throttle")
        if subject is None:
            return False
        await self._counts.slow(_subject(tenant, subject), factor, seconds)
        return True

    async def admit_subject(self, tenant: str | None, subject: str | None) -> None:
        """Count a request about a subject.

        Args:
            tenant: whose subject it is; None where there are no tenants.
            subject: as the request names it; None when it names none, and then it is let in.

        Raises:
            Problem: 429, when the subject is throttled and has to wait.
        """
        if subject is None:
            return
        wait_s = await self._counts.take_slowed(_subject(tenant, subject), self._options.subject_per_minute)
        if wait_s > 0:
            raise Admission("requests", wait_s=wait_s).problem("subject")


def _subject(tenant: str | None, subject: str) -> str:
    """What a subject is counted under: of one length, however long a client says it, and never another tenant's."""
    name = f"{len(tenant or '')}/{tenant or ''}/{subject}"
    return f"subject/{hashlib.blake2b(name.encode('utf-8', 'surrogatepass'), digest_size=16).hexdigest()}"
