"""Decisions on disk: kept once, never changed, read back as the same values."""

from __future__ import annotations

import asyncio
import hmac
import logging
import uuid
import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast, get_args

import sqlalchemy as sa

from tidegate.errors import StoreError
from tidegate.policy import Retention
from tidegate.store import deletions
from tidegate.store.database import Database, DatabaseDown
from tidegate.store.keys import Keys
from tidegate.store.outbox import Address, Outbox
from tidegate.store.retention import (
    conversation_from_json,
    conversation_to_json,
    fingerprint,
    key_name,
    load_key,
    redact,
    redact_conversation,
    subject_fingerprint,
)
from tidegate.store.spool import DEFAULT_BYTES, Spool
from tidegate.store.tables import Row, decisions_table
from tidegate.store.writer import StoreState, Upkeep, Writer
from tidegate.types import (
    Action,
    Advice,
    Channel,
    Conversation,
    Coverage,
    CoverageState,
    Decision,
    GuardFailure,
    Intervention,
    InterventionKind,
    Observed,
    Probabilities,
    Scope,
    Severity,
    Span,
    Target,
    Verdict,
)

__all__ = ["KeptDecision", "Store", "open_store"]

MOST_READ = 1000

_log = logging.getLogger("tidegate.store")


@dataclass(frozen=True, slots=True)
class KeptDecision:
    """A decision as it was kept.

    Attributes:
        id: given by `Store.keep`.
        time: when it was handed to the store, in UTC.
        decision: equal to the one that was kept; of its verdict's ``reason`` only what the retention allows, and
            without the subject of its scope.
        retention: how the text was kept.
        conversation: as it was for ``full``, without what looks personal for ``redacted``; None for ``hash``, or when
            there was none.
        fingerprint: keyed fingerprint of the judged turn for ``hash``, else None; see `tidegate.store.retention`.
        subject: keyed fingerprint of the subject, None when there was none.
    """

    id: str
    time: datetime
    decision: Decision
    retention: Retention
    conversation: Conversation | None
    fingerprint: str | None
    subject: str | None = None


class Store:
    """Decisions in a database. Safe to use from any number of threads and event loops; `open_store` makes one.

    A store that is forgotten, or open when the interpreter ends, is flushed and closed like one that is closed.
    """

    def __init__(
        self,
        database: Database,
        key: bytes,
        spool: Spool | None = None,
        *,
        keep_days: float | None = None,
        reason: str | None = None,
        address: Address | None = None,
    ) -> None:
        self._database = database
        self._spool = spool
        self._writer = Writer(database, spool, reason, address)
        self._upkeep = Upkeep(self._writer, database, spool, key_name(key), keep_days, address)
        self._key = key
        self._finalizer = weakref.finalize(self, _close, self._writer, self._upkeep, database, spool)

    async def keep(
        self, decision: Decision, conversation: Conversation | None, *, retention: Retention, wait: bool = True
    ) -> str:
        """Keep a decision, and of the conversation what the retention allows; return its id once it is on disk.

        On disk is in the database, or in the spool while the database is down. A keep that is cancelled while it waits
        is still carried out.

        Args:
            decision: kept whole; of the subject of its scope only a keyed fingerprint.
            conversation: None when there is none.
            retention: what is kept of it.
            wait: False returns before it is on disk: what waits then is lost with the process, and a failure is only
                logged.

        Raises:
            StoreError: when it could not be kept: the disk is full, the spool is full, the store is closed.
            ValueError: when the retention is not ``full``, ``redacted`` or ``hash``.
        """
        if retention not in get_args(Retention):
            raise ValueError(f"unknown retention {retention!r}: expected one of {', '.join(get_args(Retention))}")
        identity = f"dec_{uuid.uuid4().hex}"
        time = datetime.now(UTC)
        key = self._key
        done = self._writer.write(lambda: _row(identity, time, decision, conversation, retention, key))
        if wait:
            await asyncio.shield(asyncio.wrap_future(done))
        else:
            done.add_done_callback(_log_failure)
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

    def history(
        self,
        *,
        since: datetime | None = None,
        until: datetime | None = None,
        action: Action | None = None,
        subject: str | None = None,
        tenant: str | None = None,
    ) -> Iterator[KeptDecision]:
        """Decisions in the order in which they were written, read in pages; those that are kept meanwhile are not.

        Args:
            since: only those from this time on; None for all.
            until: only those from before this time; None for all.
            action: only those with this action; None for all.
            subject: only those about this subject; None for all.
            tenant: whose subject it is; read with ``subject`` only.

        Raises:
            StoreError: when they cannot be read.
        """
        column = decisions_table.c
        which = [column.time >= since] if since is not None else []
        which += [column.time < until] if until is not None else []
        which += [column.action == action.word] if action is not None else []
        which += [column.subject == subject_fingerprint(subject, tenant, self._key)] if subject is not None else []
        self._check_open()
        with self._database.reading() as connection:
            last = connection.execute(sa.select(sa.func.max(column.number))).scalar() or 0
        query = sa.select(decisions_table).where(column.number <= last, *which).order_by(column.number).limit(MOST_READ)
        number = 0
        while rows := self._rows(query.where(column.number > number)):
            number = rows[-1]["number"]
            yield from map(_kept, rows)

    def delete_subject(self, subject: str, tenant: str | None = None) -> int:
        """Delete every decision about a subject, for good; returns how many. That it was done stays written down.

        Decisions about the subject that wait in the spool of any machine are left out when they are replayed.

        Args:
            subject: as it was in the scope of the decisions.
            tenant: as it was beside it; the same subject of another tenant is somebody else.

        Raises:
            StoreError: when the database is down; what was begun is then finished later.
        """
        self._check_open()
        return deletions.delete_subject(self._database, subject_fingerprint(subject, tenant, self._key))

    def purge(self, before: datetime, *, retention: Retention | None = None) -> int:
        """Delete every decision from before a time, for good; returns how many. That it was done stays written down.

        Args:
            before: those that were kept earlier than this go.
            retention: only those that were kept so; None for all.

        Raises:
            StoreError: when the database is down; what was begun is then finished later.
        """
        self._check_open()
        return deletions.purge(self._database, before, retention)

    def replay(self) -> None:
        """Bring what waits in the spool to the database now, and not when its turn comes.

        Raises StoreError when the database is down.
        """
        self._check_open()
        self._upkeep.replay()

    @property
    def outbox(self) -> Outbox:
        """What webhooks are still to be told of decisions."""
        return Outbox(self._database)

    @property
    def keys(self) -> Keys:
        """The keys of clients, in the same database."""
        return Keys(self._database, self._key)

    def derived_key(self, purpose: str) -> bytes:
        """A key of 32 bytes for this purpose, made of the store's: the same for all processes that have that."""
        return hmac.digest(self._key, f"tidegate {purpose}".encode(), "sha256")

    def state(self) -> StoreState:
        """How the store is; see `StoreState`."""
        return StoreState(
            up=self._writer.reason is None,
            reason=self._writer.reason,
            num_waiting=self._writer.num_waiting,
            num_spooled=self._writer.num_spooled,
            num_replayed=self._upkeep.num_replayed,
            spool_bytes=0 if self._spool is None else self._spool.num_bytes(),
        )

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
        return [_kept(row) for row in self._rows(query)]

    def _rows(self, query: sa.Select[Any]) -> Sequence[Mapping[Any, Any]]:
        self._check_open()
        with self._database.reading() as connection:
            return connection.execute(query).mappings().all()

    def _count(self, query: sa.Select[Any]) -> dict[Action, int]:
        self._check_open()
        with self._database.reading() as connection:
            found: dict[str, int] = {row[0]: row[1] for row in connection.execute(query)}
        return {action: found.get(action.word, 0) for action in Action}

    def _check_open(self) -> None:
        if not self._finalizer.alive:
            raise StoreError("cannot read decisions: the store is closed")


def open_store(
    url: str = "sqlite:///tidegate.db",
    *,
    spool: Path | None = None,
    spool_bytes: int = DEFAULT_BYTES,
    key: bytes | None = None,
    keep_days: float | None = None,
    address: Address | None = None,
) -> Store:
    """Open a database of decisions, make it when there is none, and bring an older one to the newest schema.

    A PostgreSQL database that is down is no error when this spool has known it up: then decisions go to the spool.

    Args:
        url: ``sqlite:///relative.db``, ``sqlite:////absolute.db``, ``sqlite://`` for one in memory only, or
            ``postgresql://name:password@host/database``.
        spool: folder for decisions while the database is down; None for ``<file>.spool`` beside a SQLite database,
            and ``tidegate.spool`` for PostgreSQL.
        spool_bytes: the most that the spool may hold; 0 for no spool. A database in memory has none.
        key: of the fingerprints, 32 bytes, the same for all processes; None for the one in ``<file>.key`` beside a
            SQLite database, or in the spool's folder for PostgreSQL. It is made when there is none.
        keep_days: how old decisions may become, in days; None for any age.
        address: which webhooks are told of a decision; they are in its outbox then. None for none.

    Raises:
        InputError: when the URL is not one of these, or its driver is not installed.
        StoreError: when it cannot be opened: no such folder, no permission, another program's database, one
            of a newer Tidegate, or one with another key.
    """
    database = Database(url)
    try:
        buffer = _spool_of(database, spool, spool_bytes)
        key = _key_of(database, buffer) if key is None else key
        reason = _prepared(database, buffer, key_name(key))
        return Store(database, key, buffer, keep_days=keep_days, reason=reason, address=address)
    except BaseException:
        database.close()
        raise


def _spool_of(database: Database, folder: Path | None, limit: int) -> Spool | None:
    if not limit or database.in_memory:
        return None
    beside = Path("tidegate.spool") if database.path is None else database.path.with_name(f"{database.path.name}.spool")
    spool = Spool(folder or beside, limit)
    if database.in_postgresql:
        spool.make_folder()
    return spool


def _key_of(database: Database, spool: Spool | None) -> bytes:
    if database.in_memory:
        return uuid.uuid4().bytes + uuid.uuid4().bytes
    if database.path is not None:
        place = database.path.with_name(f"{database.path.name}.key")
    elif spool is not None:
        place = spool.folder / "fingerprint.key"
    else:
        raise StoreError("without a spool there is no place for the key of the fingerprints: give the key")
    try:
        return load_key(place)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise StoreError(f"cannot use the key of the fingerprints, {place}: {why}") from None


def _prepared(database: Database, spool: Spool | None, name: str) -> str | None:
    """Have the schema in place; gives why the database is down, None when it is up.

    A wrong password looks like a database that is down. So that it shows at once, the first start needs a database.
    """
    known = spool.folder / "known" if spool is not None and database.in_postgresql else None
    try:
        database.prepare(name)
    except DatabaseDown as error:
        if known is None or not known.exists():
            raise
        _log.warning("the database is down, decisions go to the spool: %s", error)
        return str(error)
    if known is not None:
        known.touch(mode=0o600)
    return None


def _log_failure(done: Future[None]) -> None:
    if (error := done.exception()) is not None:
        _log.error("a decision that nobody waited for is lost: %s", error)


def _close(writer: Writer, upkeep: Upkeep, database: Database, spool: Spool | None) -> None:
    writer.close()
    upkeep.close()
    if spool is not None:
        spool.release()
    database.close()


# --- values to rows and back --------------------------------------------------------------------------------------


def _storable(text: str) -> str:
    """Text that every database takes: what is not valid Unicode is replaced, and so is U+0000."""
    return text.encode("utf-8", "replace").decode("utf-8").replace("\x00", "\ufffd")


def _row(
    identity: str,
    time: datetime,
    decision: Decision,
    conversation: Conversation | None,
    retention: Retention,
    key: bytes,
) -> Row:
    subject = decision.scope.subject
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
        "scope": _scope(decision.scope),
        "coverage": [
            {"path": c.path, "channel": c.channel.value, "state": c.state.value, "characters": c.characters}
            for c in decision.coverage
        ],
        "observed": _observed(decision.observed),
        "interventions": _interventions(decision),
        "retention": retention,
        "conversation": text,
        "fingerprint": mark,
        "subject": None if subject is None else subject_fingerprint(subject, decision.scope.tenant, key),
        **_verdict_columns(decision.verdict, retention),
        **_failure_columns(decision),
    }


def _interventions(decision: Decision) -> Row | None:
    if not decision.interventions and not decision.leaked:
        return None
    return {"leaked": decision.leaked, "done": [asdict(one) for one in decision.interventions]}


def _observed(observed: Observed | None) -> Row | None:
    if observed is None:
        return None
    return {
        "action": observed.action.word,
        "rule": observed.rule,
        "advice": [advice.value for advice in observed.advice],
    }


def _scope(scope: Scope) -> dict[str, str | None]:
    """All of it but the subject, of which only a fingerprint is kept."""
    return {name: value for name, value in asdict(scope).items() if name != "subject"}


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
        observed=_kept_observed(row["observed"]),
        interventions=_kept_interventions(row["interventions"]),
        leaked=(row["interventions"] or {}).get("leaked", 0),
    )
    return KeptDecision(
        id=row["id"],
        time=row["time"],
        decision=decision,
        retention=cast(Retention, row["retention"]),
        conversation=None if text is None else conversation_from_json(text),
        fingerprint=row["fingerprint"],
        subject=row["subject"],
    )


def _kept_interventions(found: Mapping[str, Any] | None) -> tuple[Intervention, ...]:
    done = (found or {}).get("done", ())
    return tuple(Intervention(**{**one, "kind": InterventionKind(one["kind"])}) for one in done)


def _kept_observed(found: Mapping[str, Any] | None) -> Observed | None:
    if found is None:
        return None
    return Observed(Action.parse(found["action"]), found["rule"], tuple(map(Advice, found["advice"])))


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
