"""Brings a database to the newest schema, whichever it has; refuses one that belongs to somebody else.

The steps are Alembic's, in ``migrations/versions``. They run when a store is opened, in one transaction, and processes
that open a database at once wait for each other.
"""

from __future__ import annotations

import math
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from tidegate.errors import StoreError
from tidegate.store.patience import let_it_take
from tidegate.store.tables import keys_table

__all__ = ["NEWEST", "VERSION_TABLE", "ensure_schema"]

NEWEST: Final = "0005"
"""The last step. Steps are numbered, so that a newer database can be told from a damaged one."""
VERSION_TABLE: Final = "tidegate_version"

_FIRST_TABLE: Final = "tidegate_schema"
"""Where Tidegate 0.1 wrote its version, before there were steps."""
_ONE_AT_A_TIME: Final = threading.Lock()  # Alembic keeps what it is doing in a global

_metadata = sa.MetaData()
_version = sa.Table(VERSION_TABLE, _metadata, sa.Column("version_num", sa.String(32), primary_key=True))
_first = sa.Table(_FIRST_TABLE, _metadata, sa.Column("version", sa.Integer, primary_key=True))


def ensure_schema(connection: sa.Connection, key_name: str) -> None:
    """Have the tables of the newest schema, in the transaction that is open on this connection.

    Args:
        connection: holds a lock against others that do the same.
        key_name: which key fingerprints are made with.

    Raises:
        StoreError: when the database is another program's or a newer Tidegate's, or its fingerprints have another key.
    """
    found = _found(connection)
    if found != NEWEST:
        _migrate(connection)
    _check_key(connection, key_name)


def _found(connection: sa.Connection) -> str | None:
    """The version of the schema; None when there is nothing yet."""
    names = set(sa.inspect(connection).get_table_names())
    if VERSION_TABLE in names:
        version: str | None = connection.execute(sa.select(_version.c.version_num)).scalar()
        if version is None or version > NEWEST:
            raise _unknown_version(version)
        return version
    if _FIRST_TABLE in names:
        return _adopt(connection)
    if names:
        raise StoreError("this database belongs to another program: it has tables, and none of them is Tidegate's")
    return None


def _adopt(connection: sa.Connection) -> str:
    """Take over a database of Tidegate 0.1. Its own mark is raised, so that 0.1 refuses it with a clear message."""
    number = connection.execute(sa.select(sa.func.max(_first.c.version))).scalar()
    if number != 1:
        raise _unknown_version(number)
    connection.execute(_first.insert().values(version=2))
    _version.create(connection)
    connection.execute(_version.insert().values(version_num="0001"))
    return "0001"


def _unknown_version(version: object) -> StoreError:
    return StoreError(
        f"this database has schema version {version}, and this Tidegate knows version {NEWEST}: "
        + ("it is damaged" if version is None else "update Tidegate to open it")
    )


def _migrate(connection: sa.Connection) -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")).replace("%", "%%"))
    config.attributes["connection"] = connection
    let_it_take(connection, math.inf)
    with _ONE_AT_A_TIME:
        command.upgrade(config, NEWEST)
    let_it_take(connection, None)


def _check_key(connection: sa.Connection, name: str) -> None:
    """Two keys in one database would make two fingerprints of one text, and a deletion would miss half of a subject."""
    names = set(connection.execute(sa.select(keys_table.c.name)).scalars())
    if not names:
        connection.execute(keys_table.insert().values(name=name, time=datetime.now(UTC)))
    elif name not in names:
        raise StoreError(
            f"the fingerprints in this database were made with another key (it has {', '.join(sorted(names))}, this is "
            f"{name}): give every process the same key, see docs/store.md"
        )
