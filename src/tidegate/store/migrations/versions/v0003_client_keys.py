"""Keys of clients: for which tenant, for which doors, until when; of each secret only a keyed hash."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add the table of client keys."""
    op.create_table(
        "client_keys",
        sa.Column("id", sa.String(16), primary_key=True),
        sa.Column("version", sa.BigInteger, nullable=False, index=True),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("tenant", sa.String(200), nullable=False, index=True),
        sa.Column("region", sa.String(200)),
        sa.Column("adapter", sa.String(200)),
        sa.Column("doors", sa.Text, nullable=False),
        sa.Column("per_minute", sa.Integer),
        sa.Column("burst", sa.Integer),
        sa.Column("concurrent", sa.Integer),
        sa.Column("created", sa.DateTime, nullable=False),
        sa.Column("expires", sa.DateTime),
        sa.Column("rotated", sa.DateTime),
        sa.Column("revoked", sa.DateTime),
        sa.Column("secret_hash", sa.String(64), nullable=False),
        sa.Column("old_hash", sa.String(64)),
        sa.Column("old_until", sa.DateTime),
        sa.CheckConstraint("(old_hash IS NULL) = (old_until IS NULL)", name="old_secret_ends"),
    )
