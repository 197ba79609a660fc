"""Databases and processes are killed under load: what was acknowledged is kept, and kept once."""

from __future__ import annotations

import itertools
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from kept import TALK, Place, decision, url_of
from postgres import PATIENCE_S, Cluster, cluster
from tidegate.errors import InputError, StoreError
from tidegate.store import Store, open_store, patience
from tidegate.store.database import DatabaseDown
from tidegate.types import Action, Conversation, Scope


def wait_until(condition: Callable[[], object], what: str) -> None:
    limit = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < limit, f"waited in vain for {what}"
        time.sleep(0.02)


class Keepers:
    """Processes that keep, one after the other, and what they were told is kept."""

    def __init__(self, place: Place, folder: Path) -> None:
        self._place = place
        self._acknowledged = folder / "acknowledged"
        self._acknowledged.touch()
        self._names = itertools.count()
        self._process: subprocess.Popen[bytes] | None = None

    def acknowledged(self) -> list[tuple[str, str]]:
        """Id and name of each; a last line that is torn is not told yet."""
        lines = self._acknowledged.read_text().split("\n")[:-1]
        return [(identity, name) for identity, _, name in (line.partition(" ") for line in lines)]

    def start(self) -> None:
        command = [sys.executable, str(Path(__file__).with_name("keeper.py")), self._place.url, str(self._place.spool)]
        self._process = subprocess.Popen([*command, str(self._acknowledged), f"keeper{next(self._names)}"])

    def wait_for_more(self, number: int = 50) -> None:
        """Wait until some more are acknowledged than now, so that all are of what follows."""
        enough = len(self.acknowledged()) + number

        def come() -> bool:
            assert self._process is not None
            assert self._process.poll() is None, "the keeper ended"
            return len(self.acknowledged()) >= enough

        wait_until(come, "more decisions")

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait(PATIENCE_S)
        self._process = None


def spooled(place: Place) -> int:
    return sum(path.stat().st_size for path in place.spool.glob("*.spool"))


@pytest.fixture
def keepers_of() -> Iterator[Callable[[Place, Path], Keepers]]:
    made: list[Keepers] = []

    def make(place: Place, folder: Path) -> Keepers:
        made.append(Keepers(place, folder))
        return made[-1]

    yield make
    for each in made:
        if each._process is not None:
            each.kill()


def check(place: Place, told: list[tuple[str, str]]) -> None:
    """Replay what is left, and count."""
    with place.open() as store:
        store.replay()
        assert store.state().spool_bytes == 0
        kept = list(store.history())
    names = Counter(one.decision.scope.route for one in kept)

    assert {identity for identity, _ in told} - {one.id for one in kept} == set()  # nothing lost
    assert {name: count for name, count in names.items() if count > 1} == {}  # nothing doubled
    assert {name for _, name in told} <= set(names)
    assert not list(place.spool.glob("*.damaged"))


def test_when_postgresql_and_the_process_are_killed_under_load_nothing_is_lost_and_nothing_doubled(
    tmp_path: Path, keepers_of: Callable[[Place, Path], Keepers]
) -> None:
    with cluster() as server:
        if server is None:
            pytest.skip("PostgreSQL is not installed")
        place = Place(server.url, tmp_path)
        keepers = keepers_of(place, tmp_path)
        keepers.start()
        keepers.wait_for_more()  # to the database
        server.kill()
        keepers.wait_for_more()  # to the spool
        assert spooled(place) > 0
        keepers.kill()
        keepers.start()  # while the database is down
        keepers.wait_for_more()
        server.start()
        wait_until(lambda: not spooled(place), "the replay")  # also of what the first keeper left
        keepers.wait_for_more()  # to the database again
        server.kill()
        keepers.wait_for_more()
        server.start()
        keepers.wait_for_more()
        keepers.kill()  # maybe within the replay

        check(place, keepers.acknowledged())


def test_when_sqlite_is_locked_and_the_process_is_killed_under_load_nothing_is_lost_and_nothing_doubled(
    tmp_path: Path, keepers_of: Callable[[Place, Path], Keepers]
) -> None:
    place = Place(url_of(tmp_path / "kept.db"), tmp_path)
    keepers = keepers_of(place, tmp_path)
    keepers.start()
    keepers.wait_for_more()
    other = sqlite3.connect(tmp_path / "kept.db", isolation_level=None, timeout=PATIENCE_S)
    other.execute("BEGIN IMMEDIATE")
    wait_until(lambda: spooled(place), "the spool")
    keepers.wait_for_more()
    keepers.kill()
    other.rollback()
    keepers.start()
    wait_until(lambda: not spooled(place), "the replay")
    keepers.wait_for_more()
    other.execute("BEGIN IMMEDIATE")
    wait_until(lambda: spooled(place), "the spool")
    keepers.wait_for_more()
    other.rollback()
    other.close()
    keepers.wait_for_more()
    keepers.kill()

    check(place, keepers.acknowledged())


# --- the steps, one by one ----------------------------------------------------------------------------------------


@pytest.fixture
def away(place: Place) -> Callable[[bool], None]:
    """Makes the database fail, and mends it: its table gets another name."""
    names = {True: ("decisions", "elsewhere"), False: ("elsewhere", "decisions")}

    def switch(down: bool) -> None:
        place.run("ALTER TABLE {} RENAME TO {}".format(*names[down]))

    return switch


async def test_while_the_database_is_down_decisions_go_to_the_spool_and_then_to_it(
    place: Place, away: Callable[[bool], None]
) -> None:
    with place.open() as store:
        first = await store.keep(decision(), TALK, retention="full")
        away(True)
        second = await store.keep(decision(scope=Scope(subject="ann")), TALK, retention="redacted")
        state = store.state()
        assert not state.up
        assert state.reason
        assert (state.num_spooled, state.num_replayed) == (1, 0)
        assert state.spool_bytes > 0
        away(False)
        store.replay()
        third = await store.keep(decision(), TALK, retention="full")
        kept = await store.decision(second)
        state = store.state()

        assert state.up
        assert state.reason is None
        assert (state.num_spooled, state.num_replayed, state.spool_bytes) == (1, 1, 0)
        assert [one.id for one in await store.decisions()] == [third, second, first]
    assert kept is not None
    assert kept.retention == "redacted"
    assert kept.subject is not None
    assert kept.decision == decision()


async def test_what_comes_from_the_spool_is_what_was_kept(place: Place, away: Callable[[bool], None]) -> None:
    with place.open() as store:
        straight = await store.decision(await store.keep(decision(Action.BLOCK), TALK, retention="full"))
        away(True)
        identity = await store.keep(decision(Action.BLOCK), TALK, retention="full")
        away(False)
        store.replay()
        round_about = await store.decision(identity)

    assert straight is not None
    assert round_about is not None
    assert (round_about.decision, round_about.conversation) == (straight.decision, straight.conversation)
    assert round_about.time > straight.time


async def test_the_spool_holds_no_more_of_the_text_than_the_retention_allows(
    place: Place, away: Callable[[bool], None]
) -> None:
    with place.open() as store:
        away(True)
        for retention in ("redacted", "hash"):
            await store.keep(decision(scope=Scope(subject="ann-4711")), TALK, retention=retention)  # type: ignore[arg-type]
        disk = b"".join(path.read_bytes() for path in place.spool.glob("*.spool"))
        away(False)

    assert disk.count(b"\n") == 2
    assert b"ann@" not in disk
    assert b"ann-4711" not in disk


async def test_a_decision_that_arrived_although_its_commit_broke_off_is_not_doubled(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    with place.open() as store:
        writing = store._database.writing

        def breaks_off() -> object:
            return _BreaksOff(writing())

        with monkeypatch.context() as patch:
            patch.setattr(store._database, "writing", breaks_off)
            identity = await store.keep(decision(), TALK, retention="full")
        assert (await store.counts())[Action.ALLOW] == 1
        assert store.state().num_spooled == 1

        store.replay()
        assert [one.id for one in await store.decisions()] == [identity]
        assert store.state().num_replayed == 0


class _BreaksOff:
    """Commits, and then says that it could not be known."""

    def __init__(self, inner: object) -> None:
        self._inner = inner

    def __enter__(self) -> object:
        return self._inner.__enter__()  # type: ignore[attr-defined]

    def __exit__(self, *error: object) -> None:
        self._inner.__exit__(*error)  # type: ignore[attr-defined]
        raise DatabaseDown("the connection was lost")


async def test_a_deleted_subject_does_not_come_back_from_the_spool(place: Place, away: Callable[[bool], None]) -> None:
    with place.open(key=bytes(32)) as left_behind:
        away(True)
        await left_behind.keep(decision(scope=Scope(subject="ann")), TALK, retention="full")
        bob = await left_behind.keep(decision(scope=Scope(subject="bob")), TALK, retention="full")
        away(False)
        with place.open(key=bytes(32), spool=place.spool.with_name("other")) as store:
            store.delete_subject("ann")
        left_behind.replay()
        later = await left_behind.keep(decision(scope=Scope(subject="ann")), TALK, retention="full")

        assert {one.id for one in await left_behind.decisions()} == {bob, later}


async def test_what_the_database_refuses_in_a_replay_is_set_apart(place: Place, away: Callable[[bool], None]) -> None:
    impossible = decision()
    object.__setattr__(impossible, "verdict", None)
    with place.open() as store:
        away(True)
        await store.keep(decision(), TALK, retention="full")
        await store.keep(impossible, TALK, retention="full")
        away(False)
        store.replay()

        assert (await store.counts())[Action.ALLOW] == 1
        assert store.state().spool_bytes == 0
    (apart,) = place.spool.glob("*.damaged")
    assert len(apart.read_bytes().splitlines()) == 1


async def test_a_full_spool_refuses_with_a_store_error(place: Place, away: Callable[[bool], None]) -> None:
    with place.open(spool_bytes=100) as store:
        away(True)
        with pytest.raises(StoreError, match="full"):
            await store.keep(decision(), TALK, retention="full")
        away(False)
        store.replay()
        await store.keep(decision(), TALK, retention="full")


async def test_when_postgresql_takes_connections_and_answers_nothing_decisions_go_to_the_spool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with cluster() as server:
        if server is None:
            pytest.skip("PostgreSQL is not installed")
        place = Place(server.url, tmp_path)
        with place.open() as store:
            identities = [await store.keep(decision(), TALK, retention="full")]
            monkeypatch.setattr(patience, "PATIENCE_S", 0.5)
            server.pause()
            identities += [await store.keep(decision(), TALK, retention="full") for _ in range(3)]
            state = store.state()
            monkeypatch.undo()
            server.resume()
            wait_until(lambda: not store.state().spool_bytes, "the replay")

            assert not state.up
            assert state.num_spooled == 3
            assert {kept.id for kept in store.history()} == set(identities)


async def test_when_the_disk_of_sqlite_is_full_decisions_go_to_the_spool_and_then_to_it(tmp_path: Path) -> None:
    place = Place(url_of(tmp_path / "kept.db"), tmp_path)
    with place.open() as store:
        small = [1]

        def limit(connection: sqlite3.Connection, _record: object) -> None:
            for pages in small:
                connection.execute(f"PRAGMA max_page_count = {pages}")

        sa.event.listen(store._database._engine, "connect", limit)
        store._database._engine.dispose()
        long = Conversation.of("x" * 100_000)
        identity = await store.keep(decision(), long, retention="full")
        assert "full" in (store.state().reason or "")
        small.clear()
        store._database._engine.dispose()
        store.replay()
        kept = await store.decision(identity)

    assert kept is not None
    assert kept.conversation == long


async def test_a_connection_that_leads_to_a_server_that_only_reads_is_given_up(place: Place) -> None:
    if not place.in_postgresql:
        pytest.skip("SQLite has no other server")
    with place.open() as store:
        await store.keep(decision(), TALK, retention="full")
        store._database._engine.dispose()
        with store._database.reading() as connection:  # the one that is taken next
            connection.exec_driver_sql("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY")
            connection.commit()
        identity = await store.keep(decision(), TALK, retention="full")
        assert "read-only" in (store.state().reason or "")
        store.replay()

        assert await store.decision(identity) is not None
        assert store.state().up


async def test_without_a_spool_a_database_that_is_down_is_a_store_error(
    place: Place, away: Callable[[bool], None]
) -> None:
    with place.open(spool_bytes=0, key=bytes(32)) as store:
        away(True)
        with pytest.raises(StoreError, match="cannot keep decisions") as caught:
            await store.keep(decision(), TALK, retention="full")
        away(False)
        await store.keep(decision(), TALK, retention="full")

    assert "ann@" not in str(caught.value)


async def test_a_store_closed_while_the_database_is_down_leaves_all_to_the_next(
    place: Place, away: Callable[[bool], None]
) -> None:
    store: Store = place.open()
    away(True)
    identities = [await store.keep(decision(), TALK, retention="hash") for _ in range(3)]
    await store.aclose()
    away(False)

    with place.open() as store:
        store.replay()
        assert [one.id for one in store.history()] == identities


async def test_the_first_start_needs_postgresql_and_later_ones_do_not(tmp_path: Path, postgres: Cluster) -> None:
    place = Place(postgres.url, tmp_path)
    nowhere = Place(f"postgresql://tidegate@/postgres?host={tmp_path}", tmp_path)
    with pytest.raises(StoreError, match="connection"):
        nowhere.open()
    place.run("CREATE SCHEMA later")
    place = Place(f"{place.url}&options=-csearch_path%3Dlater", tmp_path)
    place.open().close()

    with nowhere.open() as store:
        identity = await store.keep(decision(), TALK, retention="full")
        assert not store.state().up
        with pytest.raises(StoreError, match="connection"):
            store.replay()
        with pytest.raises(StoreError, match="connection"):
            await store.counts()
    with place.open() as store:
        store.replay()
        assert await store.decision(identity) is not None


def test_a_password_is_in_no_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError) as caught:
        open_store(f"postgresql://ann:hunter2@/x?host={tmp_path}", spool=tmp_path / "spool")

    assert "hunter2" not in str(caught.value)


def test_without_its_driver_postgresql_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(InputError, match=r"database_url: .*pip install 'tidegate\[postgres\]'"):
        open_store(f"postgresql://ann@/x?host={tmp_path}", spool=tmp_path / "spool")


def test_postgresql_without_a_spool_needs_a_key(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="give the key"):
        open_store(f"postgresql://ann@/x?host={tmp_path}", spool_bytes=0)
