"""Decisions on disk: kept once, never changed, read back as the same values."""

from __future__ import annotations

import asyncio
import uuid
import weakref
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast, get_args

import sqlalchemy as sa

from tidegate.errors import StoreError
from tidegate.policy import Retention
from tidegate.store.database import Database, Row, Writer, decisions_table
from tidegate.store.retention import (
    conversation_from_json,
    conversation_to_json,
    fingerprint,
    load_key,
    redact,
    redact_conversation,
)
from tidegate.types import (
    Action,
    Advice,
    Channel,
    Conversation,
    Coverage,
    CoverageState,
    Decision,
    GuardFailure,
    Probabilities,
    Scope,
    Severity,
    Span,
    Target,
    Verdict,
)

__all__ = ["KeptDecision", "Store", "open_store"]

MOST_READ = 1000


@dataclass(frozen=True, slots=True)
class KeptDecision:
    """A decision as it was kept.

    Attributes:
        id: given by `Store.keep`.
        time: when it was handed to the store, in UTC.
        decision: equal to the one that was kept; of its verdict's ``reason`` only what the retention allows.
        retention: how the text was kept.
        conversation: as it was for ``full``, without what looks personal for ``redacted``; None for ``hash``, or when
            there was none.
        fingerprint: keyed fingerprint of the judged turn for ``hash``, else None; see `tidegate.store.retention`.
    """

    id: str
    time: datetime
    decision: Decision
    retention: Retention
    conversation: Conversation | None
    fingerprint: str | None


class Store:
    """Decisions in a database. Safe to use from any number of threads and event loops; `open_store` makes one.

    A store that is forgotten, or open when the interpreter ends, is flushed and closed like one that is closed.
    """

    def __init__(self, database: Database, key: bytes) -> None:
        self._database = database
        self._writer = Writer(database)
        self._key = key
        self._finalizer = weakref.finalize(self, _close, self._writer, database)

    async def keep(self, decision: Decision, conversation: Conversation | None, *, retention: Retention) -> str:
        """Keep a decision, and of the conversation what the retention allows; return its id once it is on disk.

        A keep that is cancelled while it waits is still carried out.

        Raises:
            StoreError: when it could not be kept: the disk is full, the database is locked, the store is closed.
            ValueError: when the retention is not ``full``, ``redacted`` or ``hash``.
        """
        if retention not in get_args(Retention):
            raise ValueError(f"unknown retention {retention!r}: expected one of {', '.join(get_args(Retention))}")
        identity = f"dec_{uuid.uuid4().hex}"
        time = datetime.now(UTC)
        key = self._key
        done = self._writer.write(lambda: _row(identity, time, decision, conversation, retention, key))
        await asyncio.shield(asyncio.wrap_future(done))
        return identity

    async def decision(self, identity: str) -> KeptDecision | None:
        """The decision with this id; None when there is none. Raises StoreError when it cannot be read."""
        query = sa.select(decisions_table).where(decisions_table.c.id == _storable(identity))
        found = await asyncio.to_thread(self._fetch, query)
        return found[0] if found else None

    async def decisions(
        self, *, limit: int = 50, before: str | None = None, action: Action | None = None
    ) -> list[KeptDecision]:
        """Recent decisions, newest first.

        Args:
            limit: most that are returned, from 1 to 1000.
            before: only those kept before the one with this id (the last of the page before); None for the newest.
            action: only those with this action; None for all.

        Raises:
            ValueError: when the limit is out of range.
            StoreError: when they cannot be read.
        """
        if not 1 <= limit <= MOST_READ:
            raise ValueError(f"the limit must be from 1 to {MOST_READ}, got {limit}")
        column = decisions_table.c
        query = sa.select(decisions_table).order_by(column.number.desc()).limit(limit)
        if action is not None:
            query = query.where(column.action == action.word)
        if before is not None:
            other = decisions_table.alias()
            query = query.where(
                column.number < sa.select(other.c.number).where(other.c.id == _storable(before)).scalar_subquery()
            )
        return await asyncio.to_thread(self._fetch, query)

    async def counts(self, *, since: datetime | None = None) -> dict[Action, int]:
        """How many decisions had each action, every action named; all, or only those kept from a time on.

        Raises StoreError when they cannot be read.
        """
        query = sa.select(decisions_table.c.action, sa.func.count()).group_by(decisions_table.c.action)
        if since is not None:
            query = query.where(decisions_table.c.time >= since)
        return await asyncio.to_thread(self._count, query)

    def close(self) -> None:
        """Write what is waiting and close the database. Waits for the disk; safe to call twice."""
        self._finalizer()

    async def aclose(self) -> None:
        """`close`, without making the event loop wait."""
        await asyncio.to_thread(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _fetch(self, query: sa.Select[Any]) -> list[KeptDecision]:
        self._check_open()
        with self._database.reading() as connection:
            rows = connection.execute(query).mappings().all()
        return [_kept(row) for row in rows]

    def _count(self, query: sa.Select[Any]) -> dict[Action, int]:
        self._check_open()
        with self._database.reading() as connection:
            found: dict[str, int] = {row[0]: row[1] for row in connection.execute(query)}
        return {action: found.get(action.word, 0) for action in Action}

    def _check_open(self) -> None:
        if not self._finalizer.alive:
            raise StoreError("cannot read decisions: the store is closed")


def open_store(url: str = "sqlite:///tidegate.db") -> Store:
    """Open a database of decisions, and make it when there is none.

    The key of the fingerprints lies beside it in ``<file>.key``, so that a copy of the database alone gives none away.

    Args:
        url: ``sqlite:///relative.db``, ``sqlite:////absolute.db``, or ``sqlite://`` for one in memory only.

    Raises:
        StoreError: when it cannot be opened: wrong URL, no such folder, no permission, another program's database, or
            one of a newer Tidegate.
    """
    database = Database(url)
    try:
        return Store(database, _key_of(database.path))
    except BaseException:
        database.close()
        raise


def _key_of(path: Path | None) -> bytes:
    if path is None:
        return uuid.uuid4().bytes + uuid.uuid4().bytes
    beside = path.with_name(f"{path.name}.key")
    try:
        return load_key(beside)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StoreError(f"cannot use the key of the fingerprints, {beside}: {reason}") from None


def _close(writer: Writer, database: Database) -> None:
    writer.close()
    database.close()


# --- values to rows and back --------------------------------------------------------------------------------------


def _storable(text: str) -> str:
    """Text that a database takes: what is not valid Unicode is replaced."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _row(
    identity: str,
    time: datetime,
    decision: Decision,
    conversation: Conversation | None,
    retention: Retention,
    key: bytes,
) -> Row:
    text = None
    mark = None
    if conversation is not None:
        if retention == "hash":
            mark = fingerprint(conversation, key)
        else:
            text = conversation_to_json(redact_conversation(conversation) if retention == "redacted" else conversation)
    return {
        "id": identity,
        "time": time,
        "action": decision.action.word,
        "rule": _storable(decision.rule),
        "policy": _storable(decision.policy),
        "policy_version": decision.policy_version,
        "advice": [advice.value for advice in decision.advice],
        "scope": asdict(decision.scope),
        "coverage": [
            {"path": c.path, "channel": c.channel.value, "state": c.state.value, "characters": c.characters}
            for c in decision.coverage
        ],
        "retention": retention,
        "conversation": text,
        "fingerprint": mark,
        **_verdict_columns(decision.verdict, retention),
        **_failure_columns(decision),
    }


def _verdict_columns(verdict: Verdict | None, retention: Retention) -> Row:
    if verdict is None:
        names = "target severity p_safe p_controversial p_unsafe categories category_probabilities refusal reason"
        return dict.fromkeys([*names.split(), "span_start", "span_end"])
    return {
        "target": verdict.target.value,
        "severity": verdict.severity.word,
        "p_safe": float(verdict.probabilities.safe),
        "p_controversial": float(verdict.probabilities.controversial),
        "p_unsafe": float(verdict.probabilities.unsafe),
        "categories": list(verdict.categories),
        "category_probabilities": {name: float(value) for name, value in verdict.category_probabilities.items()},
        "refusal": verdict.refusal,
        "reason": _kept_reason(verdict.reason, retention),
        "span_start": verdict.span.start if verdict.span else None,
        "span_end": verdict.span.end if verdict.span else None,
    }


def _kept_reason(reason: str | None, retention: Retention) -> str | None:
    """A guard's explanation may quote the text, so it is kept like the text."""
    if reason is None or retention == "hash":
        return None
    return redact(reason) if retention == "redacted" else reason


def _failure_columns(decision: Decision) -> Row:
    failure, verdict = decision.failure, decision.verdict
    guard = failure.guard if failure else verdict.guard if verdict else ""
    return {
        "guard": _storable(guard),
        "failure_kind": _storable(failure.kind) if failure else None,
        "failure_message": _storable(failure.message) if failure else None,
    }


def _kept(row: Mapping[Any, Any]) -> KeptDecision:
    text = row["conversation"]
    decision = Decision(
        action=Action.parse(row["action"]),
        rule=row["rule"],
        policy=row["policy"],
        policy_version=row["policy_version"],
        verdict=_verdict(row) if row["severity"] is not None else None,
        failure=(
            GuardFailure(row["failure_kind"], row["failure_message"], row["guard"])
            if row["failure_kind"] is not None
            else None
        ),
        scope=Scope(**row["scope"]),
        coverage=tuple(
            Coverage(c["path"], Channel(c["channel"]), CoverageState(c["state"]), c["characters"])
            for c in row["coverage"]
        ),
        advice=tuple(Advice(advice) for advice in row["advice"]),
    )
    return KeptDecision(
        id=row["id"],
        time=row["time"],
        decision=decision,
        retention=cast(Retention, row["retention"]),
        conversation=None if text is None else conversation_from_json(text),
        fingerprint=row["fingerprint"],
    )


def _verdict(row: Mapping[Any, Any]) -> Verdict:
    return Verdict(
        target=Target(row["target"]),
        severity=Severity.parse(row["severity"]),
        probabilities=Probabilities(row["p_safe"], row["p_controversial"], row["p_unsafe"]),
        categories=tuple(row["categories"]),
        category_probabilities=row["category_probabilities"],
        refusal=row["refusal"],
        reason=row["reason"],
        span=None if row["span_start"] is None else Span(row["span_start"], row["span_end"]),
        guard=row["guard"],
    )
