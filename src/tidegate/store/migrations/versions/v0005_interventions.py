"""How a decision was carried out, and what had left by then."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Add one column to decisions."""
    op.add_column("decisions", sa.Column("interventions", sa.Text))
