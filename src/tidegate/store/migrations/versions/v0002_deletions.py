"""Subjects, what was only observed, deletions that are written down first; append-only in PostgreSQL too."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_NUMBER = sa.BigInteger().with_variant(sa.Integer, "sqlite")

_MATCHES = """SELECT 1 FROM deletions d WHERE d.ended IS NULL AND (
        d.subject = OLD.subject
        OR (OLD.time < d.before AND (d.retention IS NULL OR d.retention = OLD.retention)))"""

_UNTRUE = """OLD.ended IS NOT NULL OR NEW.number <> OLD.number OR NEW.time <> OLD.time
        OR NEW.subject IS DISTINCT FROM OLD.subject OR NEW.before IS DISTINCT FROM OLD.before
        OR NEW.retention IS DISTINCT FROM OLD.retention OR NEW.num_deleted < OLD.num_deleted"""

_SQLITE = (
    "DROP TRIGGER decisions_refuse_delete",
    f"""CREATE TRIGGER decisions_refuse_delete BEFORE DELETE ON decisions WHEN NOT EXISTS ({_MATCHES})
    BEGIN SELECT RAISE(ABORT, 'decisions are append-only: a deletion must be written down first'); END""",
    f"""CREATE TRIGGER deletions_refuse_update BEFORE UPDATE ON deletions
    WHEN {_UNTRUE.replace("IS DISTINCT FROM", "IS NOT")}
    BEGIN SELECT RAISE(ABORT, 'deletions are append-only: they can only be counted and ended'); END""",
    """CREATE TRIGGER deletions_refuse_delete BEFORE DELETE ON deletions
    BEGIN SELECT RAISE(ABORT, 'deletions are append-only: they cannot be deleted'); END""",
    """CREATE TRIGGER deletions_refuse_replace BEFORE INSERT ON deletions
    WHEN EXISTS (SELECT 1 FROM deletions WHERE number = NEW.number)
    BEGIN SELECT RAISE(ABORT, 'deletions are append-only: they cannot be replaced'); END""",
)

_POSTGRESQL = (
    """CREATE FUNCTION tidegate_refuse() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
    BEGIN
        RAISE EXCEPTION '% are append-only: %', TG_TABLE_NAME, TG_ARGV[0]
            USING ERRCODE = 'integrity_constraint_violation';
    END $$""",
    f"""CREATE FUNCTION tidegate_guard_deletion() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
    BEGIN
        IF NOT EXISTS ({_MATCHES}) THEN
            RAISE EXCEPTION 'decisions are append-only: a deletion must be written down first'
                USING ERRCODE = 'integrity_constraint_violation';
        END IF;
        RETURN OLD;
    END $$""",
    """CREATE TRIGGER decisions_refuse_update BEFORE UPDATE ON decisions
    FOR EACH ROW EXECUTE FUNCTION tidegate_refuse('they cannot be changed')""",
    """CREATE TRIGGER decisions_refuse_delete BEFORE DELETE ON decisions
    FOR EACH ROW EXECUTE FUNCTION tidegate_guard_deletion()""",
    """CREATE TRIGGER decisions_refuse_truncate BEFORE TRUNCATE ON decisions
    FOR EACH STATEMENT EXECUTE FUNCTION tidegate_refuse('they cannot be emptied')""",
    f"""CREATE TRIGGER deletions_refuse_update BEFORE UPDATE ON deletions
    FOR EACH ROW WHEN ({_UNTRUE})
    EXECUTE FUNCTION tidegate_refuse('they can only be counted and ended')""",
    """CREATE TRIGGER deletions_refuse_delete BEFORE DELETE ON deletions
    FOR EACH ROW EXECUTE FUNCTION tidegate_refuse('they cannot be deleted')""",
    """CREATE TRIGGER deletions_refuse_truncate BEFORE TRUNCATE ON deletions
    FOR EACH STATEMENT EXECUTE FUNCTION tidegate_refuse('they cannot be emptied')""",
)


def upgrade() -> None:
    """Add two columns to decisions, the log of deletions, and the names of keys."""
    op.add_column("decisions", sa.Column("subject", sa.String(100)))
    op.add_column("decisions", sa.Column("observed", sa.Text))
    op.create_index("ix_decisions_subject", "decisions", ["subject"])
    op.create_table(
        "deletions",
        sa.Column("number", _NUMBER, primary_key=True, autoincrement=True),
        sa.Column("time", sa.DateTime, nullable=False),
        sa.Column("subject", sa.String(100), index=True),
        sa.Column("before", sa.DateTime),
        sa.Column("retention", sa.String(10)),
        sa.Column("num_deleted", _NUMBER, nullable=False),
        sa.Column("ended", sa.DateTime, index=True),
        sa.CheckConstraint("(subject IS NULL) <> (before IS NULL)", name="subject_or_before"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "fingerprint_keys",
        sa.Column("name", sa.String(8), primary_key=True),
        sa.Column("time", sa.DateTime, nullable=False),
    )
    sqlite = op.get_context().dialect.name == "sqlite"
    for statement in _SQLITE if sqlite else _POSTGRESQL:
        op.execute(statement)
