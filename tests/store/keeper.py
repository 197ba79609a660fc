"""A process that keeps decisions, many at once, until it is killed, for `test_loss`.

Run as ``python keeper.py URL SPOOL ACKNOWLEDGED NAME``: each decision has a name of its own, and is written to the file
ACKNOWLEDGED, one line each, once `Store.keep` has returned its id. What a process handed to the system with `os.write`
survives that process.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
from pathlib import Path

from tidegate.store import database, open_store
from tidegate.types import Action, Conversation, Decision, Probabilities, Scope, Severity, Target, Verdict

AT_ONCE = 20
PAUSE_S = 0.005


async def run(url: str, spool: str, acknowledged: str, name: str) -> None:
    """Keep until killed."""
    verdict = Verdict(Target.PROMPT, Severity.UNSAFE, Probabilities(0, 0, 1))
    out = os.open(acknowledged, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    numbers = itertools.count()
    store = open_store(url, spool=Path(spool))

    async def keep() -> None:
        for number in numbers:
            scope = Scope(route=f"{name}-{number}")
            decision = Decision(Action.BLOCK, "unsafe", "balanced", "0123456789ab", verdict=verdict, scope=scope)
            identity = await store.keep(decision, Conversation.of("a text"), retention="full")
            os.write(out, f"{identity} {scope.route}\n".encode())
            await asyncio.sleep(PAUSE_S)

    await asyncio.gather(*(keep() for _ in range(AT_ONCE)))


if __name__ == "__main__":
    database.BUSY_TIMEOUT_MS = 200  # type: ignore[misc] # a SQLite database that somebody locks is soon taken for down
    asyncio.run(run(*sys.argv[1:5]))
