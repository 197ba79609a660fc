"""The one door for scripts and notebooks that are not async."""

from __future__ import annotations

import asyncio
import functools
import os
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from tidegate.errors import InputError
from tidegate.guards import load_guard
from tidegate.guards.base import Guard
from tidegate.moderate.whole import moderate
from tidegate.policy import Policy, load_policy
from tidegate.types import Conversation, Decision

__all__ = ["check"]

T = TypeVar("T")


def check(
    text: str, response: str | None = None, *, guard: str | Guard = "edge", policy: str | Path | Policy = "balanced"
) -> Decision:
    """Judge one text from a script or a notebook, also where an event loop is running already.

    Args:
        text: what a person wrote.
        response: what a model answered; when it is given, it is what is judged, and ``text`` is its context.
        guard: a guard, or what `tidegate.load_guard` takes; loaded once for each process.
        policy: a policy, or what `tidegate.load_policy` takes; read once for each process.

    Raises:
        InputError: when a text is not a str.
        GuardUnavailable: when the guard cannot be loaded. One that fails later gives a decision with a failure.
        PolicyError: when the policy cannot be used.
    """
    for where, value in (("text", text), ("response", response)):
        if not isinstance(value, str) and (where == "text" or value is not None):
            raise InputError(f"expected a str, got {type(value).__name__}", where=where)
    return _background_of(os.getpid()).run(_check(Conversation.of(text, response), guard, policy))


async def _check(conversation: Conversation, guard: str | Guard, policy: str | Path | Policy) -> Decision:
    return await moderate(
        conversation,
        guard=_guard_of(os.getpid(), guard) if isinstance(guard, str) else guard,
        policy=policy if isinstance(policy, Policy) else _policy_of(policy),
    )


class _Background:
    """A thread with an event loop of its own, for as long as the process lives."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="tidegate-check", daemon=True).start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise


@functools.cache
def _background_of(process: int) -> _Background:
    """One for each process: a fork copies the memory, but not the thread."""
    return _Background()


@functools.cache
def _guard_of(process: int, spec: str) -> Guard:
    """Called only in the background thread, so that a guard is never loaded twice."""
    return load_guard(spec)


@functools.lru_cache(maxsize=64)
def _policy_of(policy: str | Path) -> Policy:
    return load_policy(policy)
