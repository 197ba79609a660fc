"""Keys of clients: shown once, kept as a hash, found by a public id, taken back for good; on both databases."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from kept import Place
from postgres import Cluster
from tidegate.errors import InputError, StoreError
from tidegate.gateway.auth import KeyRing
from tidegate.store import Allowance, Keys, Store
from tidegate.store.keys import DOORS, USUAL_DOORS, KnownKey, split_token

NOW = datetime.now(UTC)
DAY = timedelta(days=1)


@pytest.fixture
def store(place: Place) -> Iterator[Store]:
    with place.open() as opened:
        yield opened


@pytest.fixture
def keys(store: Store) -> Keys:
    return store.keys


def admits(keys: Keys, token: str, now: datetime | None = None) -> bool:
    """As a gateway asks: by what it knows of the keys."""
    parts = split_token(token)
    assert parts is not None
    known = {one.key.id: one for one in keys.changed_since(0)[1]}
    return keys.admits(known.get(parts[0]), *parts, now or datetime.now(UTC))


def other(token: str) -> str:
    """A secret that is wrong in one digit."""
    return token[:-1] + ("0" if token[-1] != "0" else "1")


def test_a_key_is_read_back_as_it_was_made_and_lets_in_who_shows_it(keys: Keys) -> None:
    allowance = Allowance(per_minute=60, burst=5, concurrent=3)
    made, token = keys.create(
        "shop",
        name="the shop's chat",
        region="EU",
        doors=["moderations", "chat"],
        allowance=allowance,
        adapter="shop",
        expires=NOW + DAY,
    )

    assert token.startswith(f"tdg_{made.id}_")
    assert keys.list() == [made]
    assert (made.tenant, made.region, made.adapter, made.name) == ("shop", "EU", "shop", "the shop's chat")
    assert (made.doors, made.allowance, made.expires) == ({"chat", "moderations"}, allowance, NOW + DAY)
    assert admits(keys, token)
    assert not admits(keys, other(token))


def test_nothing_that_lets_in_is_in_the_database_nor_in_a_repr(place: Place, keys: Keys) -> None:
    made, token = keys.create("shop")
    _, rotated = keys.rotate(made.id)
    known = keys.changed_since(0)[1][0]
    seen = f"{place.run('SELECT * FROM client_keys')} {made!r} {known!r}"

    for each in (token, rotated):
        assert each.rpartition("_")[2] not in seen
    assert known.secret_hash not in repr(known)


def test_a_hash_is_worth_nothing_in_another_row_and_none_can_be_made_without_the_installations_key(
    place: Place, keys: Keys, store: Store
) -> None:
    mine, token = keys.create("mine")
    theirs, _ = keys.create("theirs")
    place.run(
        f"UPDATE client_keys SET secret_hash = (SELECT secret_hash FROM client_keys WHERE id = '{mine.id}') "
        f"WHERE id = '{theirs.id}'"
    )

    assert admits(keys, token)
    assert not admits(keys, token.replace(mine.id, theirs.id))
    assert not admits(Keys(store._database, bytes(32)), token)


def test_a_rotated_key_has_a_new_secret_and_the_old_one_is_taken_until_the_grace_ends(keys: Keys) -> None:
    made, first = keys.create("shop")
    rotated, second = keys.rotate(made.id, grace=DAY)

    assert rotated.rotated is not None
    assert rotated.old_until == rotated.rotated + DAY
    assert admits(keys, first)
    assert admits(keys, second)
    assert not admits(keys, first, rotated.old_until)
    assert admits(keys, second, rotated.old_until)

    _, third = keys.rotate(made.id, grace=DAY)
    assert [admits(keys, each) for each in (first, second, third)] == [False, True, True]
    _, fourth = keys.rotate(made.id, grace=timedelta(0))
    assert [admits(keys, each) for each in (first, second, third, fourth)] == [False, False, False, True]


def test_a_revoked_key_and_an_expired_one_let_nobody_in_and_stay_in_the_list(keys: Keys) -> None:
    made, token = keys.create("shop")
    old, expiring = keys.create("shop", expires=NOW + DAY)
    revoked = keys.revoke(made.id)

    assert not admits(keys, token)
    assert admits(keys, expiring)
    assert not admits(keys, expiring, NOW + DAY)
    assert keys.revoke(made.id) == revoked
    assert {key.id for key in keys.list("shop")} == {made.id, old.id}
    with pytest.raises(InputError, match="revoked"):
        keys.rotate(made.id)


def test_what_changed_since_a_version_can_be_asked_for(keys: Keys) -> None:
    one, _ = keys.create("shop")
    two, _ = keys.create("bank")
    version, known = keys.changed_since(0)
    assert [each.key.id for each in known] == [one.id, two.id]
    assert keys.changed_since(version) == (version, ())

    keys.revoke(one.id)
    newer, changed = keys.changed_since(version)

    assert [each.key.id for each in changed] == [one.id]
    assert newer > version
    assert keys.changed_since(newer + 5) == (newer, ())


def test_changes_of_several_processes_at_once_have_versions_of_their_own(place: Place, keys: Keys) -> None:
    def make() -> None:
        with place.open() as store:
            for _ in range(5):
                store.keys.create("shop")

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(known.version for known in keys.changed_since(0)[1]) == list(range(1, 21))


def test_a_key_that_is_not_there_lets_nobody_in(keys: Keys) -> None:
    assert not keys.admits(None, "0" * 12, "0" * 64, NOW)
    known = KnownKey(keys.create("shop")[0], 1, "f" * 64)
    assert not keys.admits(known, known.key.id, "0" * 64, NOW)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "tdg_",
        "tdg_0123456789ab_",
        "sk-0123456789ab",
        "tdg_0123456789ab_" + "0" * 63,
        "tdg_0123456789AB_" + "0" * 64,
    ],
)
def test_what_is_no_key_of_ours_is_told_by_its_form(text: str) -> None:
    assert split_token(text) is None


@pytest.mark.parametrize(
    ("given", "where"),
    [
        ({"tenant": ""}, "tenant"),
        ({"tenant": "a b"}, "tenant"),
        ({"region": "x\n"}, "region"),
        ({"name": "two\nlines"}, "name"),
        ({"doors": []}, "door"),
        ({"doors": ["chat", "cellar"]}, "door"),
        ({"expires": NOW - DAY}, "expires"),
    ],
)
def test_what_cannot_be_used_is_said(keys: Keys, given: dict[str, object], where: str) -> None:
    with pytest.raises(InputError) as caught:
        keys.create(**{"tenant": "shop", **given})  # type: ignore[arg-type]

    assert caught.value.where == where
    assert keys.list() == []


@pytest.mark.parametrize("given", [{"per_minute": 0}, {"burst": 5}, {"concurrent": -1}])
def test_allowances_are_of_positive_numbers(given: dict[str, int]) -> None:
    with pytest.raises(InputError):
        Allowance(**given)


def test_a_key_that_is_not_there_can_be_neither_rotated_nor_revoked(keys: Keys) -> None:
    for change in (keys.rotate, keys.revoke):
        with pytest.raises(InputError, match="no key with this id"):
            change("0123456789ab")


def test_what_shows_what_others_do_is_not_opened_unless_that_is_said() -> None:
    assert set(DOORS) - set(USUAL_DOORS) == {"metrics", "console", "admin"}


async def test_keys_stay_known_while_postgresql_is_killed_and_are_read_again(postgres: Cluster, tmp_path: Path) -> None:
    """As a gateway does: what it knows stays, what changed meanwhile comes when the database is back."""
    Place(postgres.url, tmp_path).run("CREATE SCHEMA killed")
    place = Place(f"{postgres.url}&options=-csearch_path%3Dkilled", tmp_path)
    with place.open() as store:
        made, token = store.keys.create("shop")
        ring = KeyRing(store.keys)
        assert await ring.refresh()
        postgres.kill()
        try:
            assert not await ring.refresh()
            assert ring.usable
            assert ring.find(token) is not None
            with pytest.raises(StoreError):
                store.keys.revoke(made.id)
        finally:
            postgres.start()
        store.keys.revoke(made.id)
        while not await ring.refresh():
            pass
        assert ring.find(token) is None
