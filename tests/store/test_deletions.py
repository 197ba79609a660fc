"""Decisions go away in one way: it is written down, and then done."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from kept import TALK, Place, decision, url_of
from tidegate.errors import StoreError
from tidegate.store import Store, deletions, open_store
from tidegate.types import Action, Conversation, Scope

LATER = timedelta(hours=1)


@pytest.fixture
def store(place: Place) -> Iterator[Store]:
    with place.open() as opened:
        yield opened


async def keep(store: Store, subject: str | None = None, tenant: str | None = None, retention: str = "full") -> str:
    about = decision(scope=Scope(tenant=tenant, subject=subject))
    return await store.keep(about, TALK, retention=retention)  # type: ignore[arg-type]


async def left(store: Store) -> set[str]:
    return {kept.id for kept in await store.decisions(limit=1000)}


async def test_a_subject_is_deleted_with_all_that_was_kept_about_it_and_nothing_else(store: Store) -> None:
    about_ann = [await keep(store, "ann", "shop"), await keep(store, "ann", "shop", "hash")]
    others = {
        await keep(store, "ann", "bank"),
        await keep(store, "ann"),
        await keep(store, "Ann", "shop"),
        await keep(store),
    }

    assert store.delete_subject("ann", "shop") == 2
    assert await left(store) == others
    assert await store.decision(about_ann[0]) is None
    assert store.delete_subject("ann", "shop") == 0


async def test_only_a_fingerprint_of_the_subject_is_kept(place: Place, store: Store) -> None:
    one, two = [await store.decision(await keep(store, "ann-4711", "shop")) for _ in range(2)]

    assert one is not None
    assert two is not None
    assert one.subject is not None
    assert one.subject == two.subject
    assert one.subject.startswith("hmac-sha256:")
    assert one.decision.scope == Scope(tenant="shop")
    assert one.decision.scope.subject is None
    assert "ann-4711" not in repr(place.run("SELECT * FROM decisions"))


async def test_what_is_too_old_is_purged_of_all_retentions_or_of_one(store: Store) -> None:
    full, hashed = await keep(store, retention="full"), await keep(store, retention="hash")
    future = datetime.now(UTC) + LATER

    assert store.purge(datetime.now(UTC) - LATER) == 0
    assert await left(store) == {full, hashed}
    assert store.purge(future, retention="full") == 1
    assert await left(store) == {hashed}
    assert store.purge(future) == 1
    assert await left(store) == set()


async def test_every_deletion_stays_written_down_and_one_of_nothing_is_not_made(place: Place, store: Store) -> None:
    kept = await store.decision(await keep(store, "ann"))
    assert kept is not None
    store.purge(datetime.now(UTC) - LATER)
    store.delete_subject("ann")

    rows = place.run("SELECT subject, num_deleted, ended IS NULL FROM deletions")

    assert [tuple(row) for row in rows] == [(kept.subject, 1, False)]


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM deletions",
        "UPDATE deletions SET num_deleted = 0",
        "UPDATE deletions SET ended = NULL",
        "UPDATE deletions SET subject = 'somebody else'",
    ],
)
async def test_what_was_written_down_can_be_neither_changed_nor_deleted(
    place: Place, store: Store, statement: str
) -> None:
    await keep(store, "ann")
    store.delete_subject("ann")
    before = place.run("SELECT * FROM deletions")

    with pytest.raises(sa.exc.IntegrityError, match="append-only"):
        place.run(statement)

    assert place.run("SELECT * FROM deletions") == before


async def test_after_a_deletion_others_are_as_safe_as_before(place: Place, store: Store) -> None:
    await keep(store, "ann")
    await keep(store, "bob")
    store.delete_subject("ann")

    with pytest.raises(sa.exc.IntegrityError, match="written down first"):
        place.run("DELETE FROM decisions")


async def test_a_long_deletion_goes_in_steps_and_counts_them(
    place: Place, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deletions, "STEP", 3)
    for _ in range(7):
        await keep(store, "ann")

    assert store.delete_subject("ann") == 7
    assert place.run("SELECT num_deleted FROM deletions") == [(7,)]


async def test_a_deletion_that_was_interrupted_is_finished_by_who_opens_the_store_next(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    with place.open() as store:
        for _ in range(5):
            await keep(store, "ann")
        bob = await keep(store, "bob")
        monkeypatch.setattr(deletions, "STEP", 2)
        steps = iter([deletions._step])
        with monkeypatch.context() as patch:
            patch.setattr(deletions, "_step", lambda database, number: next(steps)(database, number))
            with pytest.raises(StopIteration):  # the second step never begins
                store.delete_subject("ann")
        assert len(await left(store)) == 4

    with place.open() as store:
        deletions.finish_deletions(store._database)
        assert await left(store) == {bob}
    assert place.run("SELECT num_deleted, ended IS NULL FROM deletions") == [(5, False)]


async def test_old_decisions_go_by_themselves_when_the_store_is_told_how_old_they_may_be(place: Place) -> None:
    with place.open() as store:
        await keep(store)
    store = place.open(keep_days=1e-9)
    store._upkeep.close()  # which ends after the step that it begins with

    assert await left(store) == set()
    store.close()


async def test_sqlite_overwrites_what_is_deleted(tmp_path: Path) -> None:
    with open_store(url_of(tmp_path / "kept.db")) as store:
        for word in ("plumtree", "oaktree"):
            about = decision(Action.BLOCK, scope=Scope(subject=word))
            await store.keep(about, Conversation.of(f"I am {word}"), retention="full")
        store.delete_subject("plumtree")
        disk = b"".join(path.read_bytes() for path in tmp_path.glob("kept.db*") if path.is_file())  # noqa: ASYNC240

    assert b"plumtree" not in disk
    assert b"oaktree" in disk


def test_a_closed_store_deletes_nothing(place: Place) -> None:
    store = place.open()
    store.close()

    with pytest.raises(StoreError, match="closed"):
        store.delete_subject("ann")
    with pytest.raises(StoreError, match="closed"):
        store.purge(datetime.now(UTC))
