"""The database under the store: SQLite by default, PostgreSQL for several machines.

SQLite is in WAL mode: readers never wait for the writer. In both databases a commit is on disk when it returns.

What goes wrong is told apart by what can be done about it. `RowRefused` is the fault of what was to be written. All
else that a database says is `DatabaseDown`: no connection, no room, a lock that does not go away, a table that
somebody renamed. The same may work later, and whether what was being committed arrived is not known.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, IntegrityError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import StaticPool

from tidegate.errors import InputError, StoreError
from tidegate.store.patience import impatient
from tidegate.store.schema import ensure_schema

__all__ = ["Database", "DatabaseDown", "RowRefused"]

BUSY_TIMEOUT_MS: Final = 15_000
"""How long a statement waits for another process's lock, in milliseconds."""
CONNECT_TIMEOUT_S: Final = 5
STATEMENT_TIMEOUT_MS: Final = 30_000
"""The longest time of one statement in PostgreSQL, in milliseconds."""
SCHEMA_LOCK: Final = 0x7469646567617465
"""The advisory lock of those who migrate a PostgreSQL database."""


class DatabaseDown(StoreError):
    """The database cannot be reached, or cannot take anything now. What was being committed may have arrived."""


class RowRefused(StoreError):
    """The database is there, and does not take one of these rows; nothing was committed."""


class Database:
    """One open database. Safe to use from any thread.

    Args:
        url: ``sqlite:///relative.db``, ``sqlite:////absolute.db``, ``sqlite://`` for one in memory only, or
            ``postgresql://name:password@host/database``.

    Raises:
        StoreError: when the URL is none of these, the file cannot be opened, or the driver is not installed.
    """

    def __init__(self, url: str) -> None:
        parsed = _parse(url)
        self.in_postgresql = parsed.get_backend_name() == "postgresql"
        self.path = None if self.in_postgresql else _path(parsed)
        self.in_memory = not self.in_postgresql and self.path is None
        _prepare_file(self.path)
        self._one_at_a_time: contextlib.AbstractContextManager[Any] = (
            threading.Lock() if self.in_memory else contextlib.nullcontext()
        )
        if self.in_postgresql:
            self._engine = _postgresql_engine(parsed)
        else:
            self._engine = _sqlite_engine(parsed, in_memory=self.in_memory)

    def prepare(self, key_name: str) -> None:
        """Have the newest schema in place, and fingerprints of this key only.

        Raises:
            StoreError: when the database is another program's, a newer Tidegate's, or has another key.
            DatabaseDown: when it cannot be reached.
        """
        with self.writing() as connection:
            if self.in_postgresql:
                connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(SCHEMA_LOCK)))
            ensure_schema(connection, key_name)

    @contextlib.contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A connection that sees one consistent state. Raises StoreError instead of the database's errors."""
        with _explained("cannot read decisions"), self._one_at_a_time, self._engine.connect() as connection:
            yield connection

    @contextlib.contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """A connection whose work is committed at the end; in SQLite it holds the write lock.

        Raises:
            RowRefused: when the fault is with what was written.
            DatabaseDown: when it is with the database.
        """
        try:
            with _explained("cannot keep decisions"), self._one_at_a_time, self._engine.connect() as plain:
                connection = plain.execution_options(tidegate_writes=True)
                with connection.begin():
                    yield connection
        except DatabaseDown:
            if self.in_postgresql:  # after a failover, a connection may be sound and lead to the wrong server
                self._engine.dispose()
            raise

    def forget_deleted(self) -> None:
        """Have nothing of what was deleted on disk, as far as the database can: SQLite clears its write-ahead log.

        In PostgreSQL, vacuum does that later. When readers are in the way, the next checkpoint does it.
        """
        if self.path is not None:
            with self.reading() as connection:
                connection.rollback()
                connection.connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def close(self) -> None:
        """Close all connections; SQLite then folds the write-ahead log into the file."""
        self._engine.dispose()


def _parse(url: str) -> URL:
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise InputError(
            "the database URL cannot be read; expected something like sqlite:///tidegate.db", where="database_url"
        ) from None
    if parsed.drivername in ("postgres", "postgresql", "postgresql+psycopg"):
        return parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername not in ("sqlite", "sqlite+pysqlite"):
        raise InputError(
            f"the database {parsed.drivername!r} is not supported; expected SQLite, as sqlite:///tidegate.db, or "
            "PostgreSQL, as postgresql://name:password@host/database",
            where="database_url",
        )
    if parsed.query:
        raise InputError(
            "the URL of a SQLite database takes no ?options; expected something like sqlite:///tidegate.db",
            where="database_url",
        )
    return parsed.set(drivername="sqlite+pysqlite")


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn the database's errors into StoreErrors that hold no SQL and no values."""
    try:
        yield
    except (IntegrityError, DataError) as error:
        raise RowRefused(f"{what}: {_reason(error)}") from None
    except SQLAlchemyError as error:
        kind = DatabaseDown if isinstance(error, DBAPIError | PoolTimeout) else StoreError
        raise kind(f"{what}: {_reason(error)}") from None
    except sqlite3.Error as error:  # on the way to a first connection
        raise DatabaseDown(f"{what}: {error}") from None


def _reason(error: SQLAlchemyError) -> str:
    if not isinstance(error, DBAPIError):
        return type(error).__name__
    return str(error.orig).partition("\n")[0]  # PostgreSQL shows the row in the lines after the first


# --- SQLite -------------------------------------------------------------------------------------------------------


def _path(url: URL) -> Path | None:
    """The file of the database; None for one that lives in memory only."""
    return None if url.database in (None, "", ":memory:") else Path(str(url.database))


def _prepare_file(path: Path | None) -> None:
    """Decisions may hold what people wrote, so a new file is readable by its owner only."""
    if path is None:
        return
    try:
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    except FileNotFoundError:
        raise StoreError(f"cannot open the database {path}: the folder {path.parent} does not exist") from None
    except OSError as error:
        raise StoreError(f"cannot open the database {path}: {error.strerror}") from None


def _sqlite_engine(url: URL, *, in_memory: bool) -> sa.Engine:
    options: dict[str, Any] = {"hide_parameters": True}
    if in_memory:
        options |= {"poolclass": StaticPool, "connect_args": {"check_same_thread": False}}
    engine = sa.create_engine(url, **options)
    sa.event.listen(engine, "connect", _on_connect)
    sa.event.listen(engine, "begin", _on_begin)
    return engine


def _on_connect(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # transactions are begun below, not by the driver
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
    _use_wal(cursor)
    cursor.execute("PRAGMA synchronous = FULL")  # in WAL mode, less would lose the last commits with the power
    cursor.execute("PRAGMA recursive_triggers = ON")
    cursor.execute("PRAGMA secure_delete = ON")  # what is deleted is overwritten
    cursor.close()


def _use_wal(cursor: Any) -> None:
    """Switch a new file to the write-ahead log.

    SQLite does not wait for others here, whatever its busy timeout: of two processes that switch at once, one is told
    that the file is locked. So the waiting is ours.
    """
    until = time.monotonic() + BUSY_TIMEOUT_MS / 1000
    while True:
        try:
            cursor.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
        time.sleep(0.01)


def _on_begin(connection: sa.Connection) -> None:
    writes = connection.get_execution_options().get("tidegate_writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


# --- PostgreSQL ---------------------------------------------------------------------------------------------------

_CONNECTION: Final = {
    "application_name": "tidegate",
    "connect_timeout": CONNECT_TIMEOUT_S,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,
    "prepare_threshold": None,
}
"""A connection whose other end has gone is noticed within seconds; nothing is left in it that a connection pooler
between us and the server would mix up. What the URL says goes before this."""


def _postgresql_engine(url: URL) -> sa.Engine:
    options = {name: value for name, value in _CONNECTION.items() if name not in url.query}
    try:
        engine = sa.create_engine(url, hide_parameters=True, pool_pre_ping=True, connect_args=options)
    except (ModuleNotFoundError, NoSuchModuleError):
        raise InputError("PostgreSQL needs a driver: pip install 'tidegate[postgres]'", where="database_url") from None
    connection_class = impatient(engine.dialect.dbapi)
    sa.event.listen(
        engine, "do_connect", lambda _dialect, _record, args, options: connection_class.connect(*args, **options)
    )
    sa.event.listen(engine, "connect", _on_postgresql_connect)
    return engine


def _on_postgresql_connect(connection: Any, _record: Any) -> None:
    """A commit that returns is on disk, whatever the server's default; a statement ends some day."""
    with connection.cursor() as cursor:
        cursor.execute(f"SET statement_timeout = {STATEMENT_TIMEOUT_MS}")
        cursor.execute("SELECT current_setting('synchronous_commit')")
        if cursor.fetchone() == ("off",):
            cursor.execute("SET synchronous_commit = on")
    connection.commit()
