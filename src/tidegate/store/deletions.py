"""The one way in which decisions go away: a deletion is written down, and then carried out.

The database lets go of a decision only while there is an open entry in ``deletions`` that describes it, and entries
stay for ever: who may delete can do so, and cannot do it unseen. A deletion goes in small steps, so that others can
write meanwhile; one that was interrupted is finished by whoever comes next.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final

import sqlalchemy as sa

from tidegate.policy import Retention
from tidegate.store.database import Database
from tidegate.store.tables import Row, decisions_table, deletions_table, deliveries_table

__all__ = ["STEP", "delete_subject", "finish_deletions", "purge", "without_deleted"]

STEP: Final = 1000
"""Most decisions that are deleted in one transaction."""

_decision = decisions_table.c
_deletion = deletions_table.c


def delete_subject(database: Database, subject: str) -> int:
    """Delete all decisions with this fingerprint of a subject; returns how many. Raises StoreError.

    What webhooks were still to be told of them goes too.
    """
    return _delete(database, {"subject": subject})


def purge(database: Database, before: datetime, retention: Retention | None) -> int:
    """Delete all decisions from before a time, of one retention or of any; returns how many. Raises StoreError.

    When there is nothing to delete, nothing is written down. What webhooks were not told of until then goes too, unless
    it is only one retention.
    """
    untold = _untold({"subject": None, "before": before, "retention": retention})
    with database.reading() as connection:
        found = _any(connection, _from_before(before, retention))
        if not found and not _any(connection, untold):
            return 0
    if found:
        return _delete(database, {"before": before, "retention": retention})
    with database.writing() as connection:
        connection.execute(deliveries_table.delete().where(untold))
    return 0


def finish_deletions(database: Database) -> int:
    """Carry out what was written down and not finished; returns how many decisions went. Raises StoreError."""
    with database.reading() as connection:
        numbers = connection.execute(sa.select(_deletion.number).where(_deletion.ended.is_(None))).scalars().all()
    return sum(_carry_out(database, number) for number in numbers)


def without_deleted(connection: sa.Connection, rows: list[Row]) -> list[Row]:
    """The rows that no deletion was about: those that come late must not bring a deleted subject back."""
    subjects = {row["subject"] for row in rows if row["subject"] is not None}
    query = sa.select(_deletion.subject, sa.func.max(_deletion.time, type_=_deletion.time.type))
    query = query.where(_deletion.subject.in_(subjects)).group_by(_deletion.subject)
    deleted: dict[str, datetime] = {row[0]: row[1] for row in connection.execute(query)}
    return [row for row in rows if row["subject"] not in deleted or row["time"] > deleted[row["subject"]]]


def _delete(database: Database, what: Row) -> int:
    with database.writing() as connection:
        entry = deletions_table.insert().values(time=datetime.now(UTC), num_deleted=0, **what)
        number = connection.execute(entry.returning(_deletion.number)).scalar_one()
    return _carry_out(database, number)


def _carry_out(database: Database, number: int) -> int:
    total = 0
    while (deleted := _step(database, number)) is not None:
        total += deleted
    database.forget_deleted()
    return total


def _step(database: Database, number: int) -> int | None:
    """Delete some; returns how many. None when the deletion has ended."""
    with database.writing() as connection:
        query = sa.select(deletions_table).where(_deletion.number == number).with_for_update()
        entry = connection.execute(query).mappings().one()
        if entry["ended"] is not None:
            return None
        which = sa.select(_decision.number).where(_described(entry)).limit(STEP).scalar_subquery()
        deleted = connection.execute(decisions_table.delete().where(_decision.number.in_(which))).rowcount
        counted: Row = {"num_deleted": entry["num_deleted"] + deleted}
        if deleted < STEP:
            if _any(connection, untold := _untold(entry)):  # who may delete nothing of them need not, where none is
                connection.execute(deliveries_table.delete().where(untold))
            counted["ended"] = datetime.now(UTC)
        connection.execute(deletions_table.update().where(_deletion.number == number).values(counted))
    return deleted


def _described(entry: Any) -> sa.ColumnElement[bool]:
    if (subject := entry["subject"]) is not None:
        return sa.and_(_decision.subject == subject)
    return _from_before(entry["before"], entry["retention"])


def _untold(entry: Any) -> sa.ColumnElement[bool]:
    """What webhooks were still to be told of all that a deletion is about; of one retention alone nobody can say."""
    if (subject := entry["subject"]) is not None:
        return sa.and_(deliveries_table.c.subject == subject)
    return sa.false() if entry["retention"] is not None else sa.and_(deliveries_table.c.time < entry["before"])


def _any(connection: sa.Connection, which: sa.ColumnElement[bool]) -> bool:
    return connection.execute(sa.select(sa.literal(1)).where(which).limit(1)).first() is not None


def _from_before(before: datetime, retention: str | None) -> sa.ColumnElement[bool]:
    kind = sa.true() if retention is None else _decision.retention == retention
    return sa.and_(_decision.time < before, kind)
