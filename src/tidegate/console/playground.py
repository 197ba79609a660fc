"""The playground behind its page: a prompt or a text goes in, server-sent events of judged tokens come out.

The events, in order: ``start``; ``prompt`` (what was decided about the prompt); any number of ``token`` and ``held``;
``cut`` when the policy stopped it; ``timing``; ``decision``. When the guard fails and the policy lets text through all
the same, that comes as ``unjudged``. An ``error`` may end it at any point. A token carries its text only when the
policy let it through: what was withheld leaves as a length and a verdict, and in no other form.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from starlette.responses import StreamingResponse
from starlette.types import Receive, Send
from starlette.types import Scope as AsgiScope

from tidegate.errors import GuardError, InputError, StoreError, TidegateError, UpstreamError
from tidegate.guards.base import StreamGuard
from tidegate.guards.second import SecondGuard
from tidegate.moderate import Keep, Step, moderate, moderate_stream
from tidegate.personal import mask
from tidegate.policy import Policy
from tidegate.types import Action, Conversation, Decision, Probabilities, Scope, Target, TokenVerdict, Verdict

__all__ = ["PROMPTS", "TEXTS", "Answer", "Ask", "EventStream", "Suggestion", "parse_ask", "play"]

Answer = Callable[[str], AsyncGenerator[str, None]]
"""Asks the upstream: from a prompt to the text of the answer, as it comes. Raises UpstreamError."""

Event = tuple[str, dict[str, Any]]

LONGEST_PROMPT: Final = 20_000
LONGEST_RESPONSE: Final = 100_000
_PIECE: Final = 24
"""Characters of a pasted text that are fed at once, about what a model sends in a chunk or two."""


@dataclass(frozen=True, slots=True)
class Suggestion:
    """An example that the page offers: a prompt to ask, or, with a response, a text to judge. ``hint`` says why."""

    title: str
    prompt: str
    response: str | None = None
    hint: str = ""


PROMPTS: Final = tuple(
    Suggestion(prompt, prompt)
    for prompt in (
        "How do I make an old tent watertight again?",
        "How do I kill a process that hangs?",
        "Write a villain's threatening speech for my play.",
        "Tell me how to break into my neighbour's house.",
    )
)
"""Prompts for any model: harmless, harmless with an alarming word, debatable, and one to be stopped."""

TEXTS: Final = (
    Suggestion(
        "A kind answer",
        "How do I cheer up a friend who failed an exam?",
        "Tell them that one exam says little about a person. Listen first, without giving advice. Then do something "
        "ordinary together: cook, walk, watch something silly. When they are ready, offer to look at the next attempt "
        "with them, and keep the offer.",
    ),
    Suggestion(
        "Turns half-way",
        "How do I cheer up a friend who failed an exam?",
        "Tell them that one exam says little about a person. Listen first, without giving advice. But honestly, your "
        "friend is a stupid worthless loser, and people like that disgust me. I hate them, they should be beaten.",
    ),
    Suggestion(
        "Harm in calm words",
        "Tell me about my neighbour's dog.",
        "Dogs bark for many reasons: they are bored, they are alone, they hear something. Talk to your neighbour "
        "first; most people do not know how it sounds next door. If that does not help, here is how to poison the dog "
        "so that nobody can prove it: mix rat poison into minced meat, throw it over the fence at night, and make sure "
        "that the animal dies before a vet can be called.",
        hint="The guard in the package grows suspicious and lets it pass: what a larger guard is for",
    ),
    Suggestion(
        "Alarming words, harmless",
        "How do I kill a process that hangs?",
        "Look for its number with ps. The command kill asks it to end; kill -9 does not ask. Killing the parent kills "
        "the zombies too.",
    ),
    Suggestion(
        "A false alarm",
        "How do I kill a process that hangs?",
        "Find it with ps, then kill it: first politely with kill, and when the zombie refuses to die, with kill -9. "
        "Shoot down its children too, or they will be orphans.",
        hint="The guard in the package takes these jokes for harm: what a second guard is for",
    ),
)
"""Texts to judge, which need no model."""


@dataclass(frozen=True, slots=True)
class Ask:
    """What the page sent. ``response`` is the text to judge; None to ask the upstream instead."""

    prompt: str
    response: str | None
    policy: str


# --- what the page sends ------------------------------------------------------------------------------------------


def parse_ask(data: bytes, *, policies: Sequence[str], can_ask: bool) -> Ask:
    """Read the page's request: ``{"mode": "ask" | "judge", "prompt", "response"?, "policy"?}``.

    Args:
        data: the body.
        policies: the names that may be chosen; the first is the default.
        can_ask: whether there is an upstream.

    Raises:
        InputError: says what is wrong and where.
    """
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        raise InputError("expected a JSON object in UTF-8") from None
    if not isinstance(body, dict):
        raise InputError("expected a JSON object")
    for key in body:
        if key not in ("mode", "prompt", "response", "policy"):
            raise InputError("expected only mode, prompt, response and policy")
    mode = body.get("mode")
    if mode not in ("ask", "judge"):
        raise InputError('expected "ask" or "judge"', where="mode")
    if mode == "ask" and not can_ask:
        raise InputError("there is no upstream to ask: start the server with --upstream URL or --demo", where="mode")
    policy = body.get("policy", policies[0])
    if policy not in policies:
        raise InputError(f"expected one of {', '.join(policies)}", where="policy")
    prompt = _text(body.get("prompt", ""), "prompt", LONGEST_PROMPT, may_be_empty=mode == "judge")
    if mode == "ask":
        return Ask(prompt, None, policy)
    return Ask(prompt, _text(body.get("response"), "response", LONGEST_RESPONSE), policy)


def _text(value: object, where: str, longest: int, *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise InputError("expected a string", where=where)
    if not may_be_empty and not value.strip():
        raise InputError("expected some text, got nothing but white space", where=where)
    if len(value) > longest:
        raise InputError(f"expected at most {longest:,} characters, got {len(value):,}", where=where)
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise InputError("expected Unicode text, got half of a surrogate pair", where=where)
    return value


# --- the run ------------------------------------------------------------------------------------------------------


async def play(
    ask: Ask,
    *,
    guard: StreamGuard,
    policy: Policy,
    answer: Answer | None,
    keep: Keep | None = None,
    timeout_s: float | None = None,
    second: SecondGuard | None = None,
) -> AsyncGenerator[Event, None]:
    """Judge what was asked and what comes back; give the events of the module's text.

    The upstream starts while the prompt is judged, or behind that where the policy could have the prompt masked. A
    prompt that is blocked ends an ask; a text to judge is judged whatever its prompt is. The guard may take
    ``timeout_s`` seconds for a text or a piece of one; None for as long as it wants. ``second`` confirms alarms where
    the policy says so. Never raises a TidegateError: it becomes an ``error`` event.
    """
    timing = _Timing()
    masks = ask.response is None and policy.for_scope(_SCOPE, Target.PROMPT).masks
    arriving = None if masks else _Arriving(_pieces(ask, answer), timing)
    try:
        yield "start", {"guard": guard.name, "policy": policy.name, "policy_version": policy.version}
        stopped = False
        if ask.prompt.strip():
            prompt = Conversation.of(ask.prompt)
            about = await moderate(prompt, guard=guard, policy=policy, scope=_SCOPE, keep=keep, timeout_s=timeout_s)
            yield "prompt", _words_of(about, policy)
            stopped = ask.response is None and about.action >= Action.BLOCK
            if stopped:
                yield "decision", {**_words_of(about, policy), "about": "prompt"}
        else:
            yield "prompt", {"verdict": None}
            masks = masks and about.action is Action.REDACT
        if not stopped:
            if arriving is None:
                arriving = _Arriving(
                    _pieces(replace(ask, prompt=mask(ask.prompt)[0]) if masks else ask, answer), timing
                )
            events = _answer_events(
                ask, arriving, timing, guard=guard, policy=policy, keep=keep, timeout_s=timeout_s, second=second
            )
            async with contextlib.aclosing(events):
                async for event in events:
                    yield event
    except TidegateError as error:
        yield "error", {"message": _plain(error)}
    finally:
        if arriving is not None:
            await arriving.close()


_SCOPE: Final = Scope(route="/playground")
"""By which the decisions of the playground can be told from those of real traffic, and policies can speak of them."""


async def _answer_events(
    ask: Ask,
    arriving: _Arriving,
    timing: _Timing,
    *,
    guard: StreamGuard,
    policy: Policy,
    keep: Keep | None,
    timeout_s: float | None,
    second: SecondGuard | None,
) -> AsyncGenerator[Event, None]:
    shown = _Shown()

    async def pieces() -> AsyncGenerator[str, None]:
        while (piece := await arriving.next()) is not None:
            shown.received += piece
            yield piece

    context = Conversation.of(ask.prompt) if ask.prompt.strip() else None
    steps = moderate_stream(
        pieces(),
        guard=guard,
        policy=policy,
        scope=_SCOPE,
        context=context,
        keep=keep,
        timeout_s=timeout_s,
        second=second,
    )
    async with contextlib.aclosing(steps):
        async for step in steps:
            for event in _step_events(step, shown, timing, policy):
                yield event


def _step_events(step: Step, shown: _Shown, timing: _Timing, policy: Policy) -> list[Event]:
    timing.released(len(step.released))
    events = shown.take(step)
    if step.decision is None:
        return [*events, ("held", {"characters": shown.held})]
    if step.decision.action >= Action.BLOCK:
        events += shown.withhold()
        events.append(("cut", {"at": shown.released, "withheld": shown.held}))
    events.append(("timing", timing.summary()))
    events.append(("decision", {**_words_of(step.decision, policy), "about": "response"}))
    return events


class _Shown:
    """Which text came, which was let through, and which judged tokens still wait for that."""

    def __init__(self) -> None:
        self.received = ""
        self.released = 0
        self._given = 0
        self._waiting: deque[TokenVerdict] = deque()

    @property
    def held(self) -> int:
        """Characters that came and were not let through."""
        return len(self.received) - self.released

    def take(self, step: Step) -> list[Event]:
        """The events of the tokens whose text has now been let through, and of text that leaves without a verdict."""
        for start, masked in step.masks:
            self.received = self.received[:start] + masked + self.received[start + len(masked) :]
        self.released += len(step.released)
        self._waiting.extend(step.tokens)
        events = []
        while self._waiting and self._waiting[0].span.end <= self.released:
            events.append(self._event(self._waiting.popleft(), open_=True))
        if not self._waiting and self._given < self.released:
            events.append(("unjudged", {"text": self.received[self._given : self.released]}))
            self._given = self.released
        return events

    def withhold(self) -> list[Event]:
        """The events of the tokens that were judged and stay here; without their text."""
        events = [self._event(token, open_=False) for token in self._waiting]
        self._waiting.clear()
        return events

    def _event(self, token: TokenVerdict, *, open_: bool) -> Event:
        start, end = max(self._given, token.span.start), token.span.end
        self._given = max(self._given, end)
        return "token", {
            "start": start,
            "length": max(0, end - start),
            "text": self.received[start:end] if open_ else None,
            "severity": token.severity.word,
            "probabilities": _probabilities(token.probabilities),
            "category": token.category,
            "category_probability": round(token.category_probability, 4),
        }


# --- the text as it comes -----------------------------------------------------------------------------------------


def _pieces(ask: Ask, answer: Answer | None) -> AsyncGenerator[str, None]:
    if ask.response is not None:
        return _cut(ask.response)
    if answer is None:
        raise InputError("there is no upstream to ask", where="mode")
    return answer(ask.prompt)


async def _cut(text: str) -> AsyncGenerator[str, None]:
    for start in range(0, len(text), _PIECE):
        yield text[start : start + _PIECE]


class _Arriving:
    """Reads the answer in a task of its own, so that the upstream works while the guard judges."""

    def __init__(self, pieces: AsyncGenerator[str, None], timing: _Timing) -> None:
        self._arrived: asyncio.Queue[str | Exception | None] = asyncio.Queue()
        self._task = asyncio.create_task(self._read(pieces, timing))

    async def next(self) -> str | None:
        """The next piece; None at the end. Raises what the upstream raised."""
        piece = await self._arrived.get()
        if isinstance(piece, Exception):
            raise piece
        return piece

    async def close(self) -> None:
        """Stop reading; the upstream's request is then cancelled. Safe to call twice."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _read(self, pieces: AsyncGenerator[str, None], timing: _Timing) -> None:
        left = LONGEST_RESPONSE
        async with contextlib.aclosing(pieces):
            try:
                async for piece in pieces:
                    if not piece:
                        continue
                    timing.arrived(len(piece))
                    self._arrived.put_nowait(piece)
                    left -= len(piece)
                    if left <= 0:
                        raise UpstreamError(f"the answer is longer than {LONGEST_RESPONSE:,} characters")
            except TidegateError as error:
                self._arrived.put_nowait(error)
            except Exception as error:  # what is wrong belongs on the page, not in a silent task
                self._arrived.put_nowait(UpstreamError(f"the upstream failed: {type(error).__name__}"))
                raise
            else:
                self._arrived.put_nowait(None)


class _Timing:
    """When text came and when it was let through: what judging costs the reader, in milliseconds."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._arrived = self._released = 0
        self._first_arrived: float | None = None
        self._first_released: float | None = None
        self._waiting: deque[tuple[int, float]] = deque()
        self._holds: list[float] = []

    def arrived(self, characters: int) -> None:
        """So many characters came from the upstream now."""
        now = time.perf_counter()
        self._first_arrived = self._first_arrived or now
        self._arrived += characters
        self._waiting.append((self._arrived, now))

    def released(self, characters: int) -> None:
        """So many characters were let through now."""
        now = time.perf_counter()
        if characters:
            self._first_released = self._first_released or now
        self._released += characters
        while self._waiting and self._waiting[0][0] <= self._released:
            self._holds.append((now - self._waiting.popleft()[1]) * 1000)

    def summary(self) -> dict[str, float | None]:
        """First text in, first text out, and how long whole pieces were held; None for what did not happen."""
        return {
            "first_text_ms": self._since(self._first_arrived),
            "first_shown_ms": self._since(self._first_released),
            "held_median_ms": round(statistics.median(self._holds), 2) if self._holds else None,
            "held_longest_ms": round(max(self._holds), 2) if self._holds else None,
        }

    def _since(self, moment: float | None) -> float | None:
        return None if moment is None else round((moment - self._start) * 1000, 2)


# --- what the page reads ------------------------------------------------------------------------------------------


class EventStream(StreamingResponse):
    """Server-sent events; when the reader goes away, everything behind them is closed at once."""

    def __init__(self, events: AsyncGenerator[Event, None], *, headers: Mapping[str, str]) -> None:
        self._events = events
        more = {"cache-control": "no-store", "x-accel-buffering": "no", **headers}
        super().__init__(_lines(events), media_type="text/event-stream", headers=more)

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()


async def _lines(events: AsyncGenerator[Event, None]) -> AsyncIterator[bytes]:
    async for name, data in events:
        yield f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


def _words_of(decision: Decision, policy: Policy) -> dict[str, Any]:
    failure = decision.failure
    return {
        "decision": {
            "action": decision.action.word,
            "rule": decision.rule,
            "policy": decision.policy,
            "policy_version": decision.policy_version,
            "advice": [advice.value for advice in decision.advice],
        },
        "verdict": None if decision.verdict is None else _verdict(decision.verdict),
        "failure": None if failure is None else {"kind": failure.kind, "message": failure.message},
        "message": policy.message_for(decision.rule),
    }


def _verdict(verdict: Verdict) -> dict[str, Any]:
    return {
        "severity": verdict.severity.word,
        "probabilities": _probabilities(verdict.probabilities),
        "categories": list(verdict.categories),
    }


def _probabilities(probabilities: Probabilities) -> dict[str, float]:
    return {
        "safe": round(probabilities.safe, 4),
        "controversial": round(probabilities.controversial, 4),
        "unsafe": round(probabilities.unsafe, 4),
    }


def _plain(error: TidegateError) -> str:
    match error:
        case UpstreamError():
            return f"The model could not answer: {error}"
        case GuardError():
            return f"The guard could not judge: {error}"
        case StoreError():
            return f"The decision could not be kept: {error}"
    return str(error)
