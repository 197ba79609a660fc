"""What webhooks are still to be told of decisions: written with the decision itself, so that neither is alone.

A delivery is claimed by pushing the time when it is due into the future: that is its lease. Who claimed it tells what
became of it; when nobody does, because the process has died, it is due again. So each is carried out at least once, and
by one process at a time. One that was made is deleted. One that was given up stays, due never, until somebody has it
tried again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

import sqlalchemy as sa

from tidegate.store.database import Database
from tidegate.store.tables import Row, deliveries_table

__all__ = ["Address", "Delivery", "Outbox", "Standing", "post"]

Address = Callable[[Row], Sequence[str]]
"""Which webhooks, by name, are told of a decision, given as a row of ``decisions``."""

_LONGEST_ERROR: Final = 100
_delivery = deliveries_table.c


@dataclass(frozen=True, slots=True)
class Delivery:
    """One webhook that is to be told of one decision.

    Attributes:
        number: of the row.
        webhook: the webhook's name.
        decision: the decision's id.
        time: when it was made, or made to be tried again, in UTC.
        attempts: how often it was tried, this time included.
        body: what is told, as JSON.
    """

    number: int
    webhook: str
    decision: str
    time: datetime
    attempts: int
    body: str


@dataclass(frozen=True, slots=True)
class Standing:
    """How it stands with one webhook.

    Attributes:
        waiting: deliveries that are still to be made.
        dead: deliveries that were given up.
        oldest: when the oldest of both was made, in UTC.
        error: what went wrong with the last that failed; None when none did.
    """

    waiting: int
    dead: int
    oldest: datetime
    error: str | None


def post(connection: sa.Connection, rows: Sequence[Row], address: Address | None) -> None:
    """Have webhooks told of these decisions, in the transaction that keeps them."""
    if address is None:
        return
    deliveries = [
        {
            "webhook": name,
            "decision": row["id"],
            "subject": row["subject"],
            "time": row["time"],
            "due": row["time"],
            "attempts": 0,
            "body": _body(row),
        }
        for row in rows
        for name in address(row)
    ]
    if deliveries:
        connection.execute(deliveries_table.insert(), deliveries)


def _body(row: Row) -> str:
    """A decision as it is told: without any text, and of the subject only the keyed fingerprint."""
    told = {
        "type": "tidegate.decision",
        "id": row["id"],
        "time": row["time"].isoformat(),
        "action": row["action"],
        "advice": row["advice"],
        "rule": row["rule"],
        "policy": row["policy"],
        "policy_version": row["policy_version"],
        "target": row["target"],
        "severity": row["severity"],
        "categories": row["categories"],
        "failure": row["failure_kind"],
        "guard": row["guard"],
        "scope": row["scope"],
        "subject": row["subject"],
    }
    return json.dumps(told, separators=(",", ":"))


class Outbox:
    """The deliveries of a database. Each call is short, and waits for the database; safe to use from any thread.

    All calls raise StoreError when the database is down.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def claim(self, webhooks: Collection[str], *, most: int, lease_s: float) -> list[Delivery]:
        """Take deliveries that are due, and nobody else has.

        Args:
            webhooks: the names of those that can be told now.
            most: how many are taken, at least 1.
            lease_s: seconds after which they are due again, unless it was told what became of them.
        """
        now = datetime.now(UTC)
        due = sa.and_(_delivery.due <= now, _delivery.webhook.in_(webhooks))
        with self._database.reading() as connection:  # so that looking alone takes no lock
            if connection.execute(sa.select(sa.literal(1)).where(due).limit(1)).first() is None:
                return []
        query = sa.select(deliveries_table).where(due).order_by(_delivery.due, _delivery.number).limit(most)
        with self._database.writing() as connection:
            rows = connection.execute(query.with_for_update(skip_locked=True)).mappings().all()
            change = deliveries_table.update().where(_delivery.number.in_([row["number"] for row in rows]))
            connection.execute(change.values(due=now + timedelta(seconds=lease_s), attempts=_delivery.attempts + 1))
        return [
            Delivery(row["number"], row["webhook"], row["decision"], row["time"], row["attempts"] + 1, row["body"])
            for row in rows
        ]

    def delivered(self, delivery: Delivery) -> None:
        """It was made."""
        with self._database.writing() as connection:
            connection.execute(deliveries_table.delete().where(_delivery.number == delivery.number))

    def failed(self, delivery: Delivery, error: str, again: datetime | None) -> None:
        """It was not made; it is due again then, None for never. Who has it by now is left alone."""
        mine = sa.and_(_delivery.number == delivery.number, _delivery.attempts == delivery.attempts)
        change = deliveries_table.update().where(mine).values(due=again, error=error[:_LONGEST_ERROR])
        with self._database.writing() as connection:
            connection.execute(change)

    def standings(self) -> dict[str, Standing]:
        """How it stands with each webhook that has deliveries."""
        last = deliveries_table.alias()
        error = (
            sa.select(last.c.error)
            .where(last.c.webhook == _delivery.webhook, last.c.error.is_not(None))
            .order_by(last.c.number.desc())
            .limit(1)
            .scalar_subquery()
        )
        columns = (
            _delivery.webhook,
            sa.func.count(_delivery.due),
            sa.func.count(),
            sa.func.min(_delivery.time, type_=_delivery.time.type),
            error,
        )
        query = sa.select(*columns).group_by(_delivery.webhook).order_by(_delivery.webhook)
        with self._database.reading() as connection:
            rows = connection.execute(query).all()
        return {name: Standing(waiting, both - waiting, oldest, said) for name, waiting, both, oldest, said in rows}

    def retry(self, webhook: str | None = None) -> int:
        """Have what was given up tried again, as if it were new: of one webhook, or of all; returns how many."""
        now = datetime.now(UTC)
        which: sa.ColumnElement[bool] = _delivery.due.is_(None)
        if webhook is not None:
            which = sa.and_(which, _delivery.webhook == webhook)
        with self._database.writing() as connection:
            change = deliveries_table.update().where(which).values(due=now, time=now, attempts=0)
            return connection.execute(change).rowcount
