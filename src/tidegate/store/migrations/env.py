"""Run by Alembic: brings the connection that it is given to the newest schema, in the transaction open on it."""

from __future__ import annotations

from alembic import context

from tidegate.store.schema import VERSION_TABLE

context.configure(connection=context.config.attributes["connection"], version_table=VERSION_TABLE)
with context.begin_transaction():
    context.run_migrations()
