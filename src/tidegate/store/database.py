"""The database under the store: opening it, its schema, and its one writer.

SQLite in WAL mode: readers never wait for the writer. All writing of a process goes through one thread, which takes
everything that is waiting and commits it together (group commit): a decision is on disk when its future is done, the
event loop never waits for a disk, and two hundred streams that end at once cost a handful of fsyncs.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, SQLAlchemyError
from sqlalchemy.pool import StaticPool

from tidegate.errors import StoreError

__all__ = ["SCHEMA_VERSION", "Database", "Json", "Row", "UtcTime", "Writer", "decisions_table"]

SCHEMA_VERSION: Final = 1
BUSY_TIMEOUT_MS: Final = 15_000
"""How long a writer waits for the writer of another process, in milliseconds."""
LARGEST_GROUP: Final = 500
"""Most decisions in one commit."""
MOST_WAITING: Final = 20_000
"""Most decisions that wait to be written; more are refused, so that a stuck disk does not fill the memory."""

Row = dict[str, Any]


# --- columns ------------------------------------------------------------------------------------------------------


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


_metadata = sa.MetaData()

_schema_table = sa.Table("tidegate_schema", _metadata, sa.Column("version", sa.Integer, primary_key=True))

decisions_table = sa.Table(
    "decisions",
    _metadata,
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
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
    sa.CheckConstraint("(severity IS NULL) <> (failure_kind IS NULL)", name="verdict_or_failure"),
    sa.CheckConstraint("retention <> 'hash' OR conversation IS NULL", name="hash_keeps_no_text"),
    sqlite_autoincrement=True,
)

_APPEND_ONLY: Final = (
    """CREATE TRIGGER decisions_refuse_update BEFORE UPDATE ON decisions
    BEGIN SELECT RAISE(ABORT, 'decisions are append-only: they cannot be changed'); END""",
    """CREATE TRIGGER decisions_refuse_delete BEFORE DELETE ON decisions
    BEGIN SELECT RAISE(ABORT, 'decisions are append-only: they cannot be deleted'); END""",
    """CREATE TRIGGER decisions_refuse_replace BEFORE INSERT ON decisions
    WHEN EXISTS (SELECT 1 FROM decisions WHERE id = NEW.id OR number = NEW.number)
    BEGIN SELECT RAISE(ABORT, 'decisions are append-only: they cannot be replaced'); END""",
)


# --- the database -------------------------------------------------------------------------------------------------


class Database:
    """One open database with its schema in place. Safe to use from any thread.

    Raises:
        StoreError: when the URL is not one for SQLite, or the file cannot be opened or is not ours.
    """

    def __init__(self, url: str) -> None:
        parsed = _parse(url)
        self.path = _path(parsed)
        _prepare_file(self.path)
        self._one_at_a_time: contextlib.AbstractContextManager[Any] = (
            threading.Lock() if self.path is None else contextlib.nullcontext()
        )
        self._engine = _engine(parsed, in_memory=self.path is None)
        try:
            with self.writing() as connection:
                _ensure_schema(connection)
        except BaseException:
            self._engine.dispose()
            raise

    @contextlib.contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A connection that sees one consistent state. Raises StoreError instead of the database's errors."""
        with _explained("cannot read decisions"), self._one_at_a_time, self._engine.connect() as connection:
            yield connection

    @contextlib.contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """A connection that holds the write lock; committed at the end. Raises StoreError."""
        with _explained("cannot keep decisions"), self._one_at_a_time, self._engine.connect() as plain:
            connection = plain.execution_options(tidegate_writes=True)
            with connection.begin():
                yield connection

    def close(self) -> None:
        """Close all connections; SQLite then folds the write-ahead log into the file."""
        self._engine.dispose()


def _parse(url: str) -> URL:
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise StoreError("the database URL cannot be read; expected something like sqlite:///tidegate.db") from None
    if parsed.get_backend_name() != "sqlite" or parsed.get_driver_name() not in ("", "pysqlite"):
        raise StoreError(
            f"the database {parsed.drivername!r} is not supported; expected SQLite, as sqlite:///tidegate.db"
        )
    if parsed.query:
        raise StoreError("a database URL takes no ?options here; expected something like sqlite:///tidegate.db")
    return parsed


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


def _engine(url: URL, *, in_memory: bool) -> sa.Engine:
    options: dict[str, Any] = {"hide_parameters": True}
    if in_memory:
        options |= {"poolclass": StaticPool, "connect_args": {"check_same_thread": False}}
    engine = sa.create_engine(url.set(drivername="sqlite+pysqlite"), **options)
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


def _ensure_schema(connection: sa.Connection) -> None:
    names = sa.inspect(connection).get_table_names()
    if not names:
        _metadata.create_all(connection)
        for statement in _APPEND_ONLY:
            connection.exec_driver_sql(statement)
        connection.execute(_schema_table.insert().values(version=SCHEMA_VERSION))
        return
    if _schema_table.name not in names:
        raise StoreError("this database belongs to another program: it has tables, and none of them is Tidegate's")
    version = connection.execute(sa.select(sa.func.max(_schema_table.c.version))).scalar()
    if version != SCHEMA_VERSION:
        raise StoreError(
            f"this database has schema version {version}, and this Tidegate knows version {SCHEMA_VERSION}: "
            + ("update Tidegate to open it" if (version or 0) > SCHEMA_VERSION else "it is damaged or too old")
        )


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn the database's errors into StoreErrors that hold no SQL and no values."""
    try:
        yield
    except SQLAlchemyError as error:
        reason = str(error.orig) if isinstance(error, DBAPIError) else type(error).__name__
        raise StoreError(f"{what}: {reason}") from (error if isinstance(error, IntegrityError) else None)
    except sqlite3.Error as error:  # on the way to a first connection
        raise StoreError(f"{what}: {error}") from None


# --- the writer ---------------------------------------------------------------------------------------------------


class _Waiting:
    """A row that waits to be written. It is made in the writer's thread, where time is not the event loop's."""

    __slots__ = ("done", "make")

    def __init__(self, make: Callable[[], Row]) -> None:
        self.make = make
        self.done: Future[None] = Future()
        self.done.set_running_or_notify_cancel()  # from here on nobody can cancel it


class Writer:
    """The one thread of a process that writes to a database."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._queue: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._gate = threading.Lock()
        self._closed = False
        self.num_commits = 0
        self._thread = threading.Thread(target=self._run, name="tidegate-store", daemon=True)
        self._thread.start()

    def write(self, make: Callable[[], Row]) -> Future[None]:
        """Have the row that ``make`` gives written; the future is done when it is on disk, or carries a StoreError.

        Returns at once. Raises StoreError when the writer is closed or too much is waiting.
        """
        waiting = _Waiting(make)
        with self._gate:
            if self._closed:
                raise StoreError("cannot keep decisions: the store is closed")
            if self._queue.qsize() >= MOST_WAITING:
                raise StoreError(f"cannot keep decisions: {MOST_WAITING:,} are already waiting to be written")
            self._queue.put(waiting)
        return waiting.done

    def close(self) -> None:
        """Write what is waiting, then end the thread. Safe to call twice."""
        with self._gate:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        while (first := self._queue.get()) is not None:
            group, ended = self._gather(first)
            self._write_group(group)
            del first, group  # what was written is not held while waiting for more
            if ended:
                return

    def _gather(self, first: _Waiting) -> tuple[list[_Waiting], bool]:
        group = [first]
        while len(group) < LARGEST_GROUP:
            try:
                waiting = self._queue.get_nowait()
            except queue.Empty:
                break
            if waiting is None:
                return group, True
            group.append(waiting)
        return group, False

    def _write_group(self, group: Sequence[_Waiting]) -> None:
        rows: list[Row] = []
        ready: list[_Waiting] = []
        for waiting in group:
            try:
                rows.append(waiting.make())
                ready.append(waiting)
            except Exception as error:
                waiting.done.set_exception(StoreError(f"cannot keep a decision: {type(error).__name__}"))
        try:
            self._insert(rows)
        except StoreError as error:
            self._settle_apart(ready, rows, error)
        except BaseException as error:
            for waiting in ready:
                waiting.done.set_exception(StoreError(f"cannot keep decisions: {type(error).__name__}"))
        else:
            for waiting in ready:
                waiting.done.set_result(None)

    def _insert(self, rows: Sequence[Row]) -> None:
        if rows:
            with self._database.writing() as connection:
                connection.execute(decisions_table.insert(), rows)
            self.num_commits += 1

    def _settle_apart(self, ready: Sequence[_Waiting], rows: Sequence[Row], error: StoreError) -> None:
        """One bad row must not cost its neighbours; a database that refuses everything fails all of them at once."""
        if len(ready) == 1 or not isinstance(error.__cause__, IntegrityError):
            for waiting in ready:
                waiting.done.set_exception(StoreError(str(error)))
            return
        for waiting, row in zip(ready, rows, strict=True):
            try:
                self._insert([row])
            except StoreError as own:
                waiting.done.set_exception(StoreError(str(own)))
            else:
                waiting.done.set_result(None)
