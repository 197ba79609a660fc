"""Databases of every age become the same one, and those of others are left alone."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

import tidegate.store
from kept import Place, decision, url_of
from tidegate.errors import StoreError
from tidegate.store import open_store
from tidegate.store.schema import NEWEST, VERSION_TABLE
from tidegate.store.tables import metadata
from tidegate.types import Action, Conversation, Probabilities, Severity, Target, Verdict

FIRST = """
CREATE TABLE decisions (
    number INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, id VARCHAR(40) NOT NULL, time DATETIME NOT NULL,
    action VARCHAR(10) NOT NULL, rule VARCHAR(100) NOT NULL, policy VARCHAR(100) NOT NULL,
    policy_version VARCHAR(12) NOT NULL, advice TEXT NOT NULL, guard TEXT NOT NULL, target VARCHAR(10),
    severity VARCHAR(15), p_safe FLOAT, p_controversial FLOAT, p_unsafe FLOAT, categories TEXT,
    category_probabilities TEXT, refusal BOOLEAN, reason TEXT, span_start INTEGER, span_end INTEGER,
    failure_kind TEXT, failure_message TEXT, scope TEXT NOT NULL, coverage TEXT NOT NULL,
    retention VARCHAR(10) NOT NULL, conversation TEXT, fingerprint VARCHAR(100),
    CONSTRAINT verdict_or_failure CHECK ((severity IS NULL) <> (failure_kind IS NULL)),
    CONSTRAINT hash_keeps_no_text CHECK (retention <> 'hash' OR conversation IS NULL), UNIQUE (id));
INSERT INTO decisions VALUES (7, 'dec_old', '2026-11-21 06:39:00.698505', 'block', 'unsafe', 'balanced',
    '0123456789ab', '[]', 'edge/1', 'prompt', 'unsafe', 0.0, 0.0, 1.0, '["Violent"]', '{}', NULL, NULL, NULL, NULL,
    NULL, NULL, '{"tenant":null,"region":null,"route":null,"language":null}', '[]', 'full',
    '[{"role":"user","content":"hello"}]', NULL);
CREATE TABLE tidegate_schema (version INTEGER NOT NULL, PRIMARY KEY (version));
INSERT INTO tidegate_schema VALUES (1);
CREATE INDEX ix_decisions_action ON decisions (action);
CREATE INDEX ix_decisions_time ON decisions (time);
CREATE INDEX ix_decisions_fingerprint ON decisions (fingerprint);
CREATE TRIGGER decisions_refuse_update BEFORE UPDATE ON decisions
    BEGIN SELECT RAISE(ABORT, 'decisions are append-only: they cannot be changed'); END;
CREATE TRIGGER decisions_refuse_delete BEFORE DELETE ON decisions
    BEGIN SELECT RAISE(ABORT, 'decisions are append-only: they cannot be deleted'); END;
CREATE TRIGGER decisions_refuse_replace BEFORE INSERT ON decisions
    WHEN EXISTS (SELECT 1 FROM decisions WHERE id = NEW.id OR number = NEW.number)
    BEGIN SELECT RAISE(ABORT, 'decisions are append-only: they cannot be replaced'); END;
"""
"""A database as Tidegate 0.1 left it, with one decision in it."""


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "old.db"
    connection = sqlite3.connect(path)
    connection.executescript(FIRST)
    connection.close()
    return path


def differences(url: str) -> list[object]:
    engine = sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:"), poolclass=sa.NullPool)
    with engine.connect() as connection:
        options = {"version_table": VERSION_TABLE, "include_object": lambda _, name, *rest: name != "tidegate_schema"}
        return list(compare_metadata(MigrationContext.configure(connection, opts=options), metadata))


def triggers(path: Path) -> list[tuple[str, str]]:
    connection = sqlite3.connect(path)
    found = connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger' ORDER BY name").fetchall()
    connection.close()
    return found


def test_the_steps_lead_to_the_tables_that_queries_are_written_against(place: Place) -> None:
    place.open().close()

    assert differences(place.url) == []


def test_the_newest_step_is_the_one_that_is_known_as_such() -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(tidegate.store.__file__).parent / "migrations"))

    assert ScriptDirectory.from_config(config).get_current_head() == NEWEST


async def test_a_database_of_the_first_tidegate_is_brought_to_the_newest_schema_with_all_that_is_in_it(
    old: Path, tmp_path: Path
) -> None:
    with open_store(url_of(old)) as store:
        kept = await store.decision("dec_old")
        await store.keep(decision(), None, retention="hash")
        counts = await store.counts()
    open_store(url_of(tmp_path / "new.db")).close()

    assert kept is not None
    expected = Verdict(Target.PROMPT, Severity.UNSAFE, Probabilities(0, 0, 1), ("Violent",), guard="edge/1")
    assert (kept.decision.action, kept.decision.verdict) == (Action.BLOCK, expected)
    assert (kept.conversation, kept.subject, kept.decision.observed) == (Conversation.of("hello"), None, None)
    assert (counts[Action.BLOCK], counts[Action.ALLOW]) == (1, 1)
    assert differences(url_of(old)) == []
    assert triggers(old) == triggers(tmp_path / "new.db")


def test_the_first_tidegate_refuses_what_was_brought_further(old: Path) -> None:
    open_store(url_of(old)).close()
    connection = sqlite3.connect(old)

    assert connection.execute("SELECT max(version) FROM tidegate_schema").fetchone() == (2,)
    connection.close()


def test_a_step_that_fails_leaves_the_database_as_it_was(old: Path) -> None:
    connection = sqlite3.connect(old)
    connection.execute("CREATE TABLE fingerprint_keys (x)")  # in the way of the second step
    before = list(connection.iterdump())

    with pytest.raises(StoreError, match="already exists"):
        open_store(url_of(old))

    assert list(connection.iterdump()) == before
    connection.close()


def at_once(number: int, work: Callable[[], None]) -> None:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_many_who_open_a_new_database_at_once_wait_for_each_other(place: Place) -> None:
    at_once(6, lambda: place.open().close())

    assert place.run(f"SELECT version_num FROM {VERSION_TABLE}") == [(NEWEST,)]


def test_a_newer_or_damaged_schema_is_refused_and_left_as_it_is(place: Place) -> None:
    place.open().close()
    for version, message in (("9999", "update Tidegate"), (None, "damaged")):
        place.run(f"DELETE FROM {VERSION_TABLE}")
        if version:
            place.run(f"INSERT INTO {VERSION_TABLE} VALUES ('{version}')")
        with pytest.raises(StoreError, match=message):
            place.open()


def test_another_programs_database_is_refused_and_left_as_it_is(place: Place) -> None:
    place.run("CREATE TABLE theirs (x INTEGER)")

    with pytest.raises(StoreError, match="another program"):
        place.open()

    with pytest.raises(sa.exc.DBAPIError, match="decisions"):
        place.run("SELECT * FROM decisions")


async def test_a_database_has_fingerprints_of_one_key_only(place: Place) -> None:
    place.open(key=bytes(32)).close()

    with pytest.raises(StoreError, match="another key"):
        place.open(key=bytes(31) + b"x")
    with pytest.raises(StoreError, match="another key"):
        place.open()  # with the one beside it
    place.open(key=bytes(32)).close()


def test_a_role_that_may_only_add_and_read_is_enough_for_serving(place: Place) -> None:
    if not place.in_postgresql:
        pytest.skip("SQLite has no roles")
    place.open().close()
    schema = place.run("SELECT current_schema()")[0][0]
    role = f"serving_{schema}"
    place.run(f"CREATE ROLE {role} LOGIN")
    place.run(f"GRANT USAGE ON SCHEMA {schema} TO {role}")
    place.run(f"GRANT SELECT ON ALL TABLES IN SCHEMA {schema} TO {role}")
    place.run(f"GRANT INSERT ON decisions TO {role}")
    place.run(f"GRANT USAGE ON ALL SEQUENCES IN SCHEMA {schema} TO {role}")

    with open_store(place.url.replace("tidegate@", f"{role}@"), spool=place.spool, spool_bytes=1 << 20) as store:
        asyncio.run(store.keep(decision(), None, retention="hash"))
        assert asyncio.run(store.counts())[Action.ALLOW] == 1
        assert store.state().num_spooled == 0
        with pytest.raises(StoreError, match="permission denied"):
            store.delete_subject("ann")

    place.run(f"GRANT INSERT, UPDATE, DELETE ON deliveries TO {role}")  # with webhooks
    url = place.url.replace("tidegate@", f"{role}@")
    with open_store(url, spool=place.spool, spool_bytes=1 << 20, address=lambda row: ["hook"]) as store:
        asyncio.run(store.keep(decision(), None, retention="hash"))
        assert store.state().num_spooled == 0
        [delivery] = store.outbox.claim(["hook"], most=1, lease_s=60)
        store.outbox.failed(delivery, "status 500", None)
        store.outbox.delivered(delivery)
