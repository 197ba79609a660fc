"""A guard that remembers: what it judged a while ago is not judged again, and what many ask at once is judged once.

A verdict is remembered under a keyed hash of everything that it depends on: all turns of the conversation, the name
(and so the version, and the adapter) of the guard, and the instructions of the policy. Nothing of the text is in that
name, and without the key nobody can find out whether a guessed text was judged.

Verdicts are kept in this process, those that were used last, and in a Redis that gateways share where there is one.
There a verdict is compact JSON without its reason, in which a guard may quote what it read; and with a signature made
with the same key, so that whoever can write to that Redis cannot put a verdict into it.

What is remembered asks nobody: it says nothing of how the guard is, and is there while the guard is down. No verdict
waits until the Redis has it.

Only verdicts are remembered. A failure is not, nor is the verdict of a cascade whose second guard failed: the next one
who asks has a new chance. Whoever goes away while it waits ends the judging when nobody else waits for it.

What a guard is called is what it is taken for. When a checkpoint is replaced by another of the same name, what the old
one said is remembered until its time is over.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from tidegate.guards.around import GuardAround
from tidegate.guards.base import StreamGuard
from tidegate.guards.terms import NO_TERMS, Terms, on_terms
from tidegate.store.shared import Shared, SharedDown
from tidegate.types import Conversation, Probabilities, Severity, Span, Target, Verdict

__all__ = ["Memory", "RememberedGuard", "verdict_from_json", "verdict_to_json"]

Outcome = Literal["local", "shared", "joined", "judged"]
"""Where a verdict came from: this process's memory, Redis, somebody else who was asking it, or the guard."""

DEFAULT_MOST: Final = 4096
DEFAULT_TTL_S: Final = 600.0
_MAC_BYTES: Final = 16
_UNTIL_BYTES: Final = 8
"""In Redis, before a verdict: until when it holds, in milliseconds since 1970."""
_HALF: Final = " failed]"
"""How the verdict of a cascade is signed that has the word of its first guard only."""


@dataclass(slots=True)
class _Flight:
    task: asyncio.Task[Verdict]
    waiting: int = 0


class Memory:
    """What guards have said: the newest in this process, and more of it in a Redis. One event loop uses it.

    Args:
        key: of the hashes and signatures, 16 to 64 bytes; the same for all who share a Redis.
        most: verdicts that this process keeps, at least 1.
        ttl_s: seconds that a verdict is remembered, greater than 0.
        shared: the Redis; None for none.
        tell: told of each verdict where it came from; None for nobody.
        clock: seconds; only differences count.
        wall: seconds since 1970, which those who share a Redis agree on, more or less.
    """

    def __init__(
        self,
        key: bytes,
        *,
        most: int = DEFAULT_MOST,
        ttl_s: float = DEFAULT_TTL_S,
        shared: Shared | None = None,
        tell: Callable[[Outcome], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._key = key
        self._most = most
        self._ttl_s = ttl_s
        self._shared = shared
        self._tell = tell
        self._clock = clock
        self._wall = wall
        self._known: OrderedDict[bytes, tuple[float, Verdict]] = OrderedDict()
        self._flights: dict[tuple[bytes, Terms], _Flight] = {}
        self._sharing: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._known)

    def name_of(self, conversation: Conversation, guard: str, instructions: str = "") -> bytes:
        """What a verdict is remembered under: 32 bytes that tell nothing without the key."""
        hashed = hashlib.blake2b(key=self._key, digest_size=32, person=b"tidegate verdict")
        for part in _parts(conversation, guard, instructions):
            data = part.encode("utf-8", "surrogatepass")
            hashed.update(len(data).to_bytes(8, "big"))
            hashed.update(data)
        return hashed.digest()

    def tell(self, outcome: Outcome) -> None:
        """A verdict came from there."""
        if self._tell is not None:
            self._tell(outcome)

    def recall_here(self, name: bytes) -> Verdict | None:
        """The verdict of this name that this process knows; None for none."""
        found = self._known.get(name)
        if found is None:
            return None
        until, verdict = found
        if self._clock() >= until:
            del self._known[name]
            return None
        self._known.move_to_end(name)
        return verdict

    async def recall(self, name: bytes) -> Verdict | None:
        """The verdict of this name in the Redis; None for none, or when it is down, or was not written by us."""
        if self._shared is None or not self._shared.up:
            return None
        place = _place(name)
        try:
            value = await self._shared.execute("GET", place)
        except SharedDown:
            return None
        if not isinstance(value, bytes):
            return None
        mac, text = value[:_MAC_BYTES], value[_MAC_BYTES:]
        if not hmac.compare_digest(mac, self._mac(name, text)):
            return None
        left_s = int.from_bytes(text[:_UNTIL_BYTES], "big") / 1000 - self._wall()
        if left_s <= 0:
            return None
        try:
            verdict = verdict_from_json(text[_UNTIL_BYTES:].decode("ascii"))
        except (ValueError, KeyError, TypeError):  # ours, and of another Tidegate
            return None
        self._remember_here(name, verdict, min(left_s, self._ttl_s))
        return verdict

    def remember(self, name: bytes, verdict: Verdict) -> None:
        """Keep a verdict here, and soon in the Redis when it is up."""
        if verdict.guard.endswith(_HALF):
            return
        self._remember_here(name, verdict, self._ttl_s)
        if self._shared is not None and self._shared.up:
            task = asyncio.ensure_future(self._share(self._shared, name, verdict))
            self._sharing.add(task)
            task.add_done_callback(self._sharing.discard)

    async def shared(self) -> None:
        """Wait until what was remembered so far is in the Redis, or is known not to get there."""
        while self._sharing:
            await asyncio.wait(set(self._sharing))

    async def _share(self, shared: Shared, name: bytes, verdict: Verdict) -> None:
        until = round((self._wall() + self._ttl_s) * 1000).to_bytes(_UNTIL_BYTES, "big")
        text = until + verdict_to_json(replace(verdict, reason=None)).encode("ascii")
        value, place, milliseconds = self._mac(name, text) + text, _place(name), math.ceil(self._ttl_s * 1000)
        with contextlib.suppress(SharedDown):
            await shared.execute("SET", place, value, "PX", milliseconds)

    async def once(self, name: bytes, terms: Terms, judge: Callable[[], Awaitable[Verdict]]) -> Verdict:
        """The verdict that ``judge`` gives; whoever asks for the same at the same time waits for the same call."""
        if (known := self.recall_here(name)) is not None:  # somebody was faster
            self.tell("local")
            return known
        which = (name, terms)
        flight = self._flights.get(which)
        if flight is None:
            flight = _Flight(asyncio.ensure_future(self._judged(name, judge)))
            self._flights[which] = flight
            flight.task.add_done_callback(lambda _: self._landed(which, flight))
        else:
            self.tell("joined")
        flight.waiting += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.waiting -= 1
            if not flight.waiting and not flight.task.done():
                self._landed(which, flight)
                flight.task.cancel()

    async def _judged(self, name: bytes, judge: Callable[[], Awaitable[Verdict]]) -> Verdict:
        verdict = await judge()
        self.tell("judged")
        self.remember(name, verdict)
        return verdict

    def _landed(self, which: tuple[bytes, Terms], flight: _Flight) -> None:
        if self._flights.get(which) is flight:
            del self._flights[which]
        if flight.task.done() and not flight.task.cancelled():
            flight.task.exception()  # whoever still waits has it; when nobody does, it is nobody's

    def _remember_here(self, name: bytes, verdict: Verdict, seconds: float) -> None:
        self._known[name] = (self._clock() + seconds, verdict)
        self._known.move_to_end(name)
        while len(self._known) > self._most:
            self._known.popitem(last=False)

    def _mac(self, name: bytes, text: bytes) -> bytes:
        return hashlib.blake2b(name + text, key=self._key, digest_size=_MAC_BYTES, person=b"tidegate signed").digest()


class RememberedGuard(GuardAround):
    """The same guard, with a memory for what it judges whole; what it watches in a stream is not remembered.

    Args:
        guard: judges what is not remembered; closed with this one.
        memory: what is remembered; may be shared by several guards.
    """

    def __init__(self, guard: StreamGuard, memory: Memory, terms: Terms = NO_TERMS) -> None:
        super().__init__(guard)
        self._memory = memory
        self._terms = terms

    async def judge(self, conversation: Conversation) -> Verdict:
        """Judge, or remember. Raises what the guard raises."""
        known = await self.recalled(conversation)
        return await self.judged(conversation) if known is None else known

    async def recalled(self, conversation: Conversation) -> Verdict | None:
        """What is remembered, here or in the Redis; None when nothing is. The guard is not asked."""
        name = self._name_of(conversation)
        if (known := self._memory.recall_here(name)) is not None:
            self._memory.tell("local")
        elif (known := await self._memory.recall(name)) is not None:
            self._memory.tell("shared")
        return known

    async def judged(self, conversation: Conversation) -> Verdict:
        """Judge what is not remembered, once for all who ask at the same time. Raises what the guard raises."""
        name = self._name_of(conversation)
        return await self._memory.once(name, self._terms, lambda: self.guard.judge(conversation))

    def _name_of(self, conversation: Conversation) -> bytes:
        return self._memory.name_of(conversation, self.guard.name, self._terms.instructions)

    def on_terms(self, terms: Terms) -> RememberedGuard:
        """The same guard on these terms; what it says on others is remembered apart."""
        return RememberedGuard(on_terms(self.guard, terms), self._memory, terms)


def _parts(conversation: Conversation, guard: str, instructions: str) -> Iterator[str]:
    """All that a verdict depends on, each of it once and in order; with lengths before them nothing runs together."""
    yield "2"  # of what stands in Redis
    yield guard
    yield instructions
    for turn in conversation.turns:
        yield turn.role.value
        yield turn.content
        yield turn.reasoning
        yield str(len(turn.tool_calls))
        for call in turn.tool_calls:
            yield call.name
            yield call.arguments


def _place(name: bytes) -> str:
    return f"tidegate:v:{name.hex()}"


def verdict_to_json(verdict: Verdict) -> str:
    """A verdict as compact JSON in ASCII."""
    p = verdict.probabilities
    value = {
        "t": verdict.target.value,
        "s": int(verdict.severity),
        "p": [p.safe, p.controversial, p.unsafe],
        "c": list(verdict.categories),
        "q": dict(verdict.category_probabilities),
        "r": verdict.refusal,
        "w": verdict.reason,
        "at": None if verdict.span is None else [verdict.span.start, verdict.span.end],
        "g": verdict.guard,
    }
    return json.dumps(value, separators=(",", ":"))


def verdict_from_json(text: str) -> Verdict:
    """The verdict that `verdict_to_json` wrote."""
    value: dict[str, Any] = json.loads(text)
    return Verdict(
        Target(value["t"]),
        Severity(value["s"]),
        Probabilities(*value["p"]),
        tuple(value["c"]),
        value["q"],
        value["r"],
        value["w"],
        None if value["at"] is None else Span(*value["at"]),
        value["g"],
    )
