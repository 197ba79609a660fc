"""How decisions get to disk: one thread that writes, and one that looks after what could not be written.

All writing of a process goes through one thread, which takes everything that is waiting and commits it together (group
commit): a decision is on disk when its future is done, the event loop never waits for a disk, and two hundred streams
that end at once cost a handful of fsyncs.

While the database is down, the same thread appends to the spool instead, and a decision is on disk there when its
future is done. The other thread tries the database every second, and replays the spool once it answers: also what
processes left behind that are no more. Whether a commit arrived that broke off is not known, so a replay writes only
decisions whose id is not there yet.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

import sqlalchemy as sa

from tidegate.errors import StoreError
from tidegate.store.database import Database, DatabaseDown, RowRefused
from tidegate.store.deletions import finish_deletions, purge, without_deleted
from tidegate.store.outbox import Address, post
from tidegate.store.spool import Entry, Segment, Spool
from tidegate.store.tables import Row, decisions_table

__all__ = ["StoreState", "Upkeep", "Writer"]

LARGEST_GROUP: Final = 500
"""Most decisions in one commit."""
MOST_WAITING: Final = 20_000
"""Most decisions that wait to be written; more are refused, so that a stuck disk does not fill the memory."""
RETRY_S: Final = 1.0
"""Seconds between two attempts to reach a database that is down."""
LOOK_S: Final = 5.0
"""Seconds between two looks into the spool while the database is up, for what other processes left behind."""
PURGE_S: Final = 3600.0
"""Seconds between two purges."""

_log = logging.getLogger("tidegate.store")


@dataclass(frozen=True, slots=True)
class StoreState:
    """How the store is.

    Attributes:
        up: whether the last attempt to write to the database worked.
        reason: why it did not, without any user text; None while it is up.
        num_waiting: decisions that wait to be written, here in memory.
        num_spooled: decisions that this process has written to the spool.
        num_replayed: decisions that it has brought from the spool to the database.
        spool_bytes: what waits in the spool, of all processes of this machine, in bytes; 0 without a spool.
    """

    up: bool
    reason: str | None
    num_waiting: int
    num_spooled: int
    num_replayed: int
    spool_bytes: int


class _Waiting:
    """A row that waits to be written. It is made in the writer's thread, where time is not the event loop's."""

    __slots__ = ("done", "make")

    def __init__(self, make: Callable[[], Row]) -> None:
        self.make = make
        self.done: Future[None] = Future()
        self.done.set_running_or_notify_cancel()  # from here on nobody can cancel it


class Writer:
    """The one thread of a process that writes to a database.

    Args:
        database: where decisions go.
        spool: where they go while it is down; None refuses them then.
        reason: why it is down already; None when it is up.
        address: which webhooks are told of a decision; None for none.
    """

    def __init__(
        self, database: Database, spool: Spool | None, reason: str | None = None, address: Address | None = None
    ) -> None:
        self._database = database
        self._address = address
        self._spool = spool
        self._queue: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._gate = threading.Lock()
        self._closed = False
        self.reason = reason
        self.num_commits = 0
        self.num_spooled = 0
        self._thread = threading.Thread(target=self._run, name="tidegate-store", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """How many decisions wait to be written."""
        return self._queue.qsize()

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

    def down(self, reason: str) -> None:
        """From now on, write to the spool."""
        if self.reason is None:
            _log.warning("the database is down, decisions go to the spool: %s", reason)
        self.reason = reason

    def up(self) -> None:
        """From now on, write to the database."""
        if self.reason is not None:
            _log.warning("the database is up again")
        self.reason = None

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
            self._keep(rows)
        except RowRefused as error:
            self._settle_apart(ready, rows, error)
        except Exception as error:
            reason = str(error) if isinstance(error, StoreError) else f"cannot keep decisions: {type(error).__name__}"
            for waiting in ready:
                waiting.done.set_exception(StoreError(reason))
        else:
            for waiting in ready:
                waiting.done.set_result(None)

    def _keep(self, rows: Sequence[Row]) -> None:
        if not rows:
            return
        if self._spool is None or self.reason is None:
            try:
                with self._database.writing() as connection:
                    connection.execute(decisions_table.insert(), rows)
                    post(connection, rows, self._address)
                self.num_commits += 1
                return
            except DatabaseDown as error:
                if self._spool is None:
                    raise
                self.down(str(error))
        self._spool.append([_entry(row) for row in rows])
        self.num_spooled += len(rows)

    def _settle_apart(self, ready: Sequence[_Waiting], rows: Sequence[Row], error: RowRefused) -> None:
        """One bad row must not cost its neighbours."""
        if len(ready) == 1:
            ready[0].done.set_exception(StoreError(str(error)))
            return
        for waiting, row in zip(ready, rows, strict=True):
            try:
                self._keep([row])
            except StoreError as own:
                waiting.done.set_exception(StoreError(str(own)))
            else:
                waiting.done.set_result(None)


class Upkeep:
    """What is done beside the writing: replay the spool when the database is up, and purge what is too old.

    Args:
        writer: is told when the database is up again.
        database: where the spool is replayed to.
        spool: what is replayed; None for nothing.
        key_name: with which `Database.prepare` is done again after the database was down.
        keep_days: how old decisions may become, in days; None for any age.
        address: which webhooks are told of a decision that is replayed; None for none.
    """

    def __init__(
        self,
        writer: Writer,
        database: Database,
        spool: Spool | None,
        key_name: str,
        keep_days: float | None,
        address: Address | None = None,
    ) -> None:
        self._address = address
        self._writer = writer
        self._database = database
        self._spool = spool
        self._key_name = key_name
        self._keep_days = keep_days
        self._next_purge = time.monotonic()
        self._stopped = threading.Event()
        self._one_at_a_time = threading.Lock()
        self.num_replayed = 0
        self._thread = threading.Thread(target=self._run, name="tidegate-upkeep", daemon=True)
        self._thread.start()

    def replay(self) -> None:
        """Bring everything that waits in the spool to the database, except what living processes are writing.

        Raises:
            StoreError: when the database is down; what is left stays in the spool.
        """
        if self._spool is None:
            return
        with self._one_at_a_time:
            try:
                if self._writer.reason is not None:
                    self._database.prepare(self._key_name)
                while (segment := self._claim()) is not None:
                    with _given_back(segment):
                        self._replay(segment)
                        segment.remove()
                    self._writer.up()  # a real write has worked
            except DatabaseDown as error:
                self._writer.down(str(error))
                raise
            self._writer.up()

    def close(self) -> None:
        """End the thread, after the step that it is at. Safe to call twice."""
        self._stopped.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                if self._writer.reason is not None or self._spooled():
                    self.replay()
                self._purge()
            except DatabaseDown:
                pass  # the writer has said so
            except Exception as error:  # an upkeep that ends is noticed by nobody
                _log.error("upkeep of the store: %s", error if isinstance(error, StoreError) else type(error).__name__)
            self._stopped.wait(LOOK_S if self._writer.reason is None and not self._spooled() else RETRY_S)

    def _spooled(self) -> bool:
        return self._spool is not None and self._spool.num_bytes() > 0

    def _claim(self) -> Segment | None:
        """A segment that others left, else our own."""
        if self._spool is None:
            return None
        segment = self._spool.claim()
        if segment is None:
            self._spool.release()
            segment = self._spool.claim()
        return segment

    def _replay(self, segment: Segment) -> None:
        entries = segment.entries()
        refused: list[Entry] = []
        for start in range(0, len(entries), LARGEST_GROUP):
            part = entries[start : start + LARGEST_GROUP]
            try:
                self._write(part)
            except RowRefused:
                refused += self._write_apart(part)
        segment.refuse(refused)
        if refused:
            _log.error("%d decisions of the spool were refused by the database, and set apart", len(refused))

    def _write_apart(self, entries: Sequence[Entry]) -> list[Entry]:
        refused = []
        for entry in entries:
            try:
                self._write([entry])
            except RowRefused:
                refused.append(entry)
        return refused

    def _write(self, entries: Sequence[Entry]) -> None:
        rows = {entry["id"]: _row(entry) for entry in entries}
        with self._database.writing() as connection:
            ids = decisions_table.c.id
            there = set(connection.execute(sa.select(ids).where(ids.in_(rows))).scalars())
            missing = without_deleted(connection, [row for identity, row in rows.items() if identity not in there])
            if missing:
                connection.execute(decisions_table.insert(), missing)
                post(connection, missing, self._address)
        self.num_replayed += len(missing)

    def _purge(self) -> None:
        """Finish what others began; then delete what is too old."""
        if time.monotonic() < self._next_purge or self._writer.reason is not None:
            return
        self._next_purge = time.monotonic() + PURGE_S
        try:
            finish_deletions(self._database)
            if self._keep_days is not None:
                purge(self._database, datetime.now(UTC) - timedelta(days=self._keep_days), None)
        except DatabaseDown as error:
            _log.error("what is too old could not be deleted: %s", error)


@contextmanager
def _given_back(segment: Segment) -> Iterator[None]:
    try:
        yield
    finally:
        segment.close()


def _entry(row: Row) -> Entry:
    return {**row, "time": row["time"].isoformat()}


def _row(entry: Entry) -> Row:
    """The row of an entry; a column that an older Tidegate did not know is empty."""
    row: Row = dict.fromkeys(column.name for column in decisions_table.columns if column.name != "number")
    return {**row, **entry, "time": datetime.fromisoformat(entry["time"])}
