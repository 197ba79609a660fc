"""What is so in SQLite only: one file, its rights, its log, and who else opens it."""

from __future__ import annotations

import asyncio
import sqlite3
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kept import TALK, decision, url_of
from tidegate.errors import InputError, StoreError
from tidegate.policy import Retention
from tidegate.store import Store, open_store
from tidegate.store.schema import NEWEST
from tidegate.types import Action, Conversation, Probabilities, Severity, Target, Verdict


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "kept.db"


# --- retention ----------------------------------------------------------------------------------------------------


def everything_in(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.iterdir()))


async def keep_and_read_disk(folder: Path, retention: Retention) -> bytes:
    verdict = Verdict(
        Target.RESPONSE, Severity.UNSAFE, Probabilities(0, 0, 1), reason="it names ann@example.org and plumtree"
    )
    talk = Conversation.of("my address is ann@example.org, plumtree", "noted: ann@example.org, plumtree")
    with open_store(url_of(folder / "kept.db")) as store:
        await store.keep(decision(verdict=verdict), talk, retention=retention)
    return everything_in(folder)


async def test_full_keeps_the_text(tmp_path: Path) -> None:
    assert b"ann@example.org" in await keep_and_read_disk(tmp_path, "full")


async def test_redacted_keeps_the_text_without_what_looks_personal(tmp_path: Path) -> None:
    disk = await keep_and_read_disk(tmp_path, "redacted")

    assert b"ann@" not in disk
    assert b"plumtree" in disk


async def test_hash_keeps_no_word_of_the_text_nor_of_the_guards_explanation(tmp_path: Path) -> None:
    disk = await keep_and_read_disk(tmp_path, "hash")

    assert b"ann@" not in disk
    assert b"plumtree" not in disk
    assert b"hmac-sha256:" in disk


async def test_the_same_text_has_the_same_fingerprint_and_another_text_or_installation_another(tmp_path: Path) -> None:
    async def fingerprint(store: Store, text: str) -> str | None:
        kept = await store.decision(await store.keep(decision(), Conversation.of(text), retention="hash"))
        assert kept is not None
        return kept.fingerprint

    with open_store(url_of(tmp_path / "a.db")) as store:
        first = await fingerprint(store, "Ein  STRASSE")
        other = await fingerprint(store, "two")
    with open_store(url_of(tmp_path / "a.db")) as store:
        again = await fingerprint(store, "ein straße ")
    with open_store(url_of(tmp_path / "b.db")) as store:
        elsewhere = await fingerprint(store, "Ein  STRASSE")

    assert first == again
    assert len({first, other, elsewhere}) == 3


def test_new_files_are_readable_by_their_owner_only(file: Path) -> None:
    with open_store(url_of(file)):
        for path in file.parent.iterdir():
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path.name


# --- append-only --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE decisions SET action = 'allow'",
        "DELETE FROM decisions",
        "INSERT OR REPLACE INTO decisions SELECT * FROM decisions",
        """REPLACE INTO decisions (id, time, action, rule, policy, policy_version, advice, guard, severity, scope,
        coverage, retention) SELECT id, time, 'allow', rule, policy, policy_version, advice, guard, severity, scope,
        coverage, retention FROM decisions""",
    ],
)
async def test_a_kept_decision_can_be_neither_changed_nor_deleted_nor_replaced(file: Path, statement: str) -> None:
    with open_store(url_of(file)) as store:
        await store.keep(decision(Action.BLOCK), TALK, retention="full")

    connection = sqlite3.connect(file)
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        connection.execute(statement)
    connection.close()

    with open_store(url_of(file)) as store:
        assert (await store.counts())[Action.BLOCK] == 1


# --- many at once -------------------------------------------------------------------------------------------------


async def test_many_keeps_at_once_share_commits_and_all_are_kept(file: Path) -> None:
    with open_store(url_of(file)) as store:
        with store._database.writing():  # hold the write lock, so that the keeps pile up behind it
            keeps = [asyncio.create_task(store.keep(decision(), TALK, retention="full")) for _ in range(200)]
            await asyncio.sleep(0)
        identities = await asyncio.gather(*keeps)

        kept = await store.decisions(limit=1000)

    assert {one.id for one in kept} == set(identities)
    assert len(identities) == len(set(identities)) == 200
    assert store._writer.num_commits <= 3


def test_a_new_file_that_another_program_is_writing_is_waited_for(file: Path) -> None:
    other = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    release = threading.Timer(0.3, other.rollback)
    release.start()
    with open_store(url_of(file)) as store:
        assert asyncio.run(store.counts())[Action.ALLOW] == 0
    release.join()
    other.close()


# --- opening and closing ------------------------------------------------------------------------------------------


def test_a_store_that_nobody_closes_is_flushed_when_the_interpreter_ends(file: Path) -> None:
    program = f"""
import asyncio
from tidegate.store import open_store
from tidegate.types import *

store = open_store({url_of(file)!r})
verdict = Verdict(Target.PROMPT, Severity.SAFE, Probabilities(1, 0, 0))

async def main():
    asyncio.create_task(store.keep(Decision(Action.ALLOW, "r", "p", "v", verdict=verdict), None, retention="hash"))
    await asyncio.sleep(0)

asyncio.run(main())
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)

    with open_store(url_of(file)) as store:
        assert asyncio.run(store.counts())[Action.ALLOW] == 1


def test_a_newer_schema_is_refused_and_left_as_it_is(file: Path) -> None:
    open_store(url_of(file)).close()
    connection = sqlite3.connect(file)
    connection.execute("UPDATE tidegate_version SET version_num = '9999'")
    connection.commit()
    connection.close()

    with pytest.raises(StoreError, match=r"schema version 9999.*update Tidegate"):
        open_store(url_of(file))


def test_the_schema_version_is_recorded(file: Path) -> None:
    open_store(url_of(file)).close()
    connection = sqlite3.connect(file)

    assert connection.execute("SELECT version_num FROM tidegate_version").fetchall() == [(NEWEST,)]
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()


def test_another_programs_database_is_refused_and_left_as_it_is(file: Path) -> None:
    connection = sqlite3.connect(file)
    connection.execute("CREATE TABLE theirs (x)")
    connection.close()

    with pytest.raises(StoreError, match="another program"):
        open_store(url_of(file))

    connection = sqlite3.connect(file)
    assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("theirs",)]
    connection.close()


def test_a_file_that_is_no_database_is_refused(file: Path) -> None:
    file.write_text("a shopping list, and quite a long one\n" * 100, encoding="utf-8")

    with pytest.raises(StoreError, match="not a database"):
        open_store(url_of(file))


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("mysql://u:hunter2@db/x", "not supported"),
        ("sqlite+aiosqlite:///x.db", "not supported"),
        ("kept.db", "cannot be read"),
        ("", "cannot be read"),
        ("sqlite:///x.db?mode=ro", "no \\?options"),
    ],
)
def test_a_url_that_is_not_one_of_ours_is_refused_without_its_password(url: str, expected: str) -> None:
    with pytest.raises(InputError, match=expected) as caught:
        open_store(url)

    assert caught.value.where == "database_url"
    assert "hunter2" not in str(caught.value)


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="nowhere does not exist"):
        open_store(url_of(tmp_path / "nowhere" / "kept.db"))


def test_a_key_file_that_holds_no_key_is_refused(file: Path) -> None:
    file.with_name("kept.db.key").write_text("nonsense", encoding="ascii")

    with pytest.raises(StoreError, match=r"kept\.db\.key"):
        open_store(url_of(file))


async def test_a_write_that_fails_is_a_store_error_without_any_of_the_text(file: Path) -> None:
    with open_store(url_of(file), spool_bytes=0) as store:
        connection = sqlite3.connect(file)
        connection.execute("ALTER TABLE decisions RENAME TO gone")
        connection.close()

        with pytest.raises(StoreError, match="no such table") as caught:
            await store.keep(decision(), TALK, retention="full")

    assert "ann@" not in str(caught.value)
    assert caught.value.__cause__ is None


async def test_without_a_file_decisions_live_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with open_store("sqlite://") as store:
        await asyncio.gather(*(store.keep(decision(), TALK, retention="hash") for _ in range(10)))
        counts = await store.counts()

    assert counts[Action.ALLOW] == 10
    assert not any(tmp_path.iterdir())  # noqa: ASYNC240
