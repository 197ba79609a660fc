"""The tables of the store, as they are after the last migration, and the kinds of column that they are made of.

Queries are written against these. What a database really gets is made by the migrations, step by step; a test compares
the two, so that neither can drift away.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any, Final

import sqlalchemy as sa

__all__ = [
    "BigNumber",
    "Json",
    "Row",
    "UtcTime",
    "client_keys_table",
    "decisions_table",
    "deletions_table",
    "deliveries_table",
    "keys_table",
    "metadata",
]

Row = dict[str, Any]

BigNumber: Final = sa.BigInteger().with_variant(sa.Integer, "sqlite")
"""A row's number: 64 bits in both databases (SQLite counts rows in what it calls INTEGER, and in nothing else)."""


class UtcTime(sa.TypeDecorator[datetime]):
    """A time with a zone outside, UTC without one inside."""

    impl = sa.DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        return None if value is None else value.replace(tzinfo=UTC)


class Json(sa.TypeDecorator[Any]):
    """JSON in ASCII text, so that any string can be stored, also one that is not valid Unicode."""

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: sa.Dialect) -> str | None:
        return None if value is None else json.dumps(value, separators=(",", ":"))

    def process_result_value(self, value: str | None, dialect: sa.Dialect) -> Any:
        return None if value is None else json.loads(value)


metadata = sa.MetaData()

decisions_table = sa.Table(
    "decisions",
    metadata,
    sa.Column("number", BigNumber, primary_key=True, autoincrement=True),
    sa.Column("id", sa.String(40), nullable=False, unique=True),
    sa.Column("time", UtcTime, nullable=False, index=True),
    sa.Column("action", sa.String(10), nullable=False, index=True),
    sa.Column("rule", sa.String(100), nullable=False),
    sa.Column("policy", sa.String(100), nullable=False),
    sa.Column("policy_version", sa.String(12), nullable=False),
    sa.Column("advice", Json, nullable=False),
    sa.Column("guard", sa.Text, nullable=False),
    sa.Column("target", sa.String(10)),
    sa.Column("severity", sa.String(15)),
    sa.Column("p_safe", sa.Float),
    sa.Column("p_controversial", sa.Float),
    sa.Column("p_unsafe", sa.Float),
    sa.Column("categories", Json),
    sa.Column("category_probabilities", Json),
    sa.Column("refusal", sa.Boolean),
    sa.Column("reason", Json),
    sa.Column("span_start", sa.Integer),
    sa.Column("span_end", sa.Integer),
    sa.Column("failure_kind", sa.Text),
    sa.Column("failure_message", sa.Text),
    sa.Column("scope", Json, nullable=False),
    sa.Column("coverage", Json, nullable=False),
    sa.Column("retention", sa.String(10), nullable=False),
    sa.Column("conversation", sa.Text),
    sa.Column("fingerprint", sa.String(100), index=True),
    sa.Column("subject", sa.String(100), index=True),
    sa.Column("observed", Json),
    sa.Column("interventions", Json),
    sa.CheckConstraint("(severity IS NULL) <> (failure_kind IS NULL)", name="verdict_or_failure"),
    sa.CheckConstraint("retention <> 'hash' OR conversation IS NULL", name="hash_keeps_no_text"),
    sqlite_autoincrement=True,
)
"""What happened. Rows are added, and deleted as `deletions_table` says; the database refuses everything else."""

deletions_table = sa.Table(
    "deletions",
    metadata,
    sa.Column("number", BigNumber, primary_key=True, autoincrement=True),
    sa.Column("time", UtcTime, nullable=False),
    sa.Column("subject", sa.String(100), index=True),
    sa.Column("before", UtcTime),
    sa.Column("retention", sa.String(10)),
    sa.Column("num_deleted", BigNumber, nullable=False),
    sa.Column("ended", UtcTime, index=True),
    sa.CheckConstraint("(subject IS NULL) <> (before IS NULL)", name="subject_or_before"),
    sqlite_autoincrement=True,
)
"""What was deleted: all decisions about a subject, or all from before a time (of one retention, or of any).

The row comes first; while its ``ended`` is NULL, the database lets go of the decisions that it describes.
"""

keys_table = sa.Table(
    "fingerprint_keys",
    metadata,
    sa.Column("name", sa.String(8), primary_key=True),
    sa.Column("time", UtcTime, nullable=False),
)
"""The names of the keys that fingerprints here were made with; never the keys."""

deliveries_table = sa.Table(
    "deliveries",
    metadata,
    sa.Column("number", BigNumber, primary_key=True, autoincrement=True),
    sa.Column("webhook", sa.String(64), nullable=False),
    sa.Column("decision", sa.String(40), nullable=False),
    sa.Column("subject", sa.String(100), index=True),
    sa.Column("time", UtcTime, nullable=False),
    sa.Column("due", UtcTime, index=True),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("error", sa.String(100)),
    sa.Column("body", sa.Text, nullable=False),
    sa.UniqueConstraint("webhook", "decision", name="told_once"),
    sqlite_autoincrement=True,
)
"""What webhooks are still to be told; see `tidegate.store.outbox`. ``due`` is NULL for what was given up."""

client_keys_table = sa.Table(
    "client_keys",
    metadata,
    sa.Column("id", sa.String(16), primary_key=True),
    sa.Column("version", sa.BigInteger, nullable=False, index=True),
    sa.Column("name", sa.String(200), nullable=False),
    sa.Column("tenant", sa.String(200), nullable=False, index=True),
    sa.Column("region", sa.String(200)),
    sa.Column("adapter", sa.String(200)),
    sa.Column("doors", Json, nullable=False),
    sa.Column("per_minute", sa.Integer),
    sa.Column("burst", sa.Integer),
    sa.Column("concurrent", sa.Integer),
    sa.Column("created", UtcTime, nullable=False),
    sa.Column("expires", UtcTime),
    sa.Column("rotated", UtcTime),
    sa.Column("revoked", UtcTime),
    sa.Column("secret_hash", sa.String(64), nullable=False),
    sa.Column("old_hash", sa.String(64)),
    sa.Column("old_until", UtcTime),
    sa.CheckConstraint("(old_hash IS NULL) = (old_until IS NULL)", name="old_secret_ends"),
)
"""What clients show to be let in; see `tidegate.store.keys`. Rows are never deleted.

Each change of a row gives it the next ``version``, under a lock, so that what changed since a version can be asked for.
"""
