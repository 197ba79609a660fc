"""Decisions, that can be neither changed nor deleted: the schema of Tidegate 0.1."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_NUMBER = sa.BigInteger().with_variant(sa.Integer, "sqlite")

_APPEND_ONLY_SQLITE = (
    """CREATE TRIGGER decisions_refuse_update BEFORE UPDATE ON decisions
    BEGIN SELECT RAISE(ABORT, 'decisions are append-only: they cannot be changed'); END""",
    """CREATE TRIGGER decisions_refuse_delete BEFORE DELETE ON decisions
    BEGIN SELECT RAISE(ABORT, 'decisions are append-only: they cannot be deleted'); END""",
    """CREATE TRIGGER decisions_refuse_replace BEFORE INSERT ON decisions
    WHEN EXISTS (SELECT 1 FROM decisions WHERE id = NEW.id OR number = NEW.number)
    BEGIN SELECT RAISE(ABORT, 'decisions are append-only: they cannot be replaced'); END""",
)


def upgrade() -> None:
    """Make the first table."""
    op.create_table(
        "decisions",
        sa.Column("number", _NUMBER, primary_key=True, autoincrement=True),
        sa.Column("id", sa.String(40), nullable=False, unique=True),
        sa.Column("time", sa.DateTime, nullable=False, index=True),
        sa.Column("action", sa.String(10), nullable=False, index=True),
        sa.Column("rule", sa.String(100), nullable=False),
        sa.Column("policy", sa.String(100), nullable=False),
        sa.Column("policy_version", sa.String(12), nullable=False),
        sa.Column("advice", sa.Text, nullable=False),
        sa.Column("guard", sa.Text, nullable=False),
        sa.Column("target", sa.String(10)),
        sa.Column("severity", sa.String(15)),
        sa.Column("p_safe", sa.Float),
        sa.Column("p_controversial", sa.Float),
        sa.Column("p_unsafe", sa.Float),
        sa.Column("categories", sa.Text),
        sa.Column("category_probabilities", sa.Text),
        sa.Column("refusal", sa.Boolean),
        sa.Column("reason", sa.Text),
        sa.Column("span_start", sa.Integer),
        sa.Column("span_end", sa.Integer),
        sa.Column("failure_kind", sa.Text),
        sa.Column("failure_message", sa.Text),
        sa.Column("scope", sa.Text, nullable=False),
        sa.Column("coverage", sa.Text, nullable=False),
        sa.Column("retention", sa.String(10), nullable=False),
        sa.Column("conversation", sa.Text),
        sa.Column("fingerprint", sa.String(100), index=True),
        sa.CheckConstraint("(severity IS NULL) <> (failure_kind IS NULL)", name="verdict_or_failure"),
        sa.CheckConstraint("retention <> 'hash' OR conversation IS NULL", name="hash_keeps_no_text"),
        sqlite_autoincrement=True,
    )
    if op.get_context().dialect.name == "sqlite":
        for statement in _APPEND_ONLY_SQLITE:
            op.execute(statement)
