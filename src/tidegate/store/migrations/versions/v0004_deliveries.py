"""The outbox: what webhooks are still to be told of decisions, and what could not be delivered."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

_NUMBER = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    """Add the table of deliveries."""
    op.create_table(
        "deliveries",
        sa.Column("number", _NUMBER, primary_key=True, autoincrement=True),
        sa.Column("webhook", sa.String(64), nullable=False),
        sa.Column("decision", sa.String(40), nullable=False),
        sa.Column("subject", sa.String(100), index=True),
        sa.Column("time", sa.DateTime, nullable=False),
        sa.Column("due", sa.DateTime, index=True),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("error", sa.String(100)),
        sa.Column("body", sa.Text, nullable=False),
        sa.UniqueConstraint("webhook", "decision", name="told_once"),
        sqlite_autoincrement=True,
    )
