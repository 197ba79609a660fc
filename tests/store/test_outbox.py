"""The outbox: written with the decision, claimed by one at a time, kept until it was made or given up."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from kept import TALK, Place, decision
from serving import wait_until
from tidegate.store import Delivery, Store, deletions
from tidegate.types import Action, Advice, Scope

NOTIFIED = {"advice": (Advice.NOTIFY,), "scope": Scope(tenant="shop", route="/v1/x", subject="ann")}
LEASE_S = 60.0


def both(row: dict[str, Any]) -> list[str]:
    return ["first", "second"] if "notify" in row["advice"] else []


def claimed(store: Store, **options: Any) -> list[Delivery]:
    return store.outbox.claim(["first", "second"], **{"most": 100, "lease_s": LEASE_S, **options})


async def test_a_decision_is_told_to_those_that_want_it_and_without_any_text(place: Place) -> None:
    with place.open(address=both) as store:
        await store.keep(decision(Action.ALLOW), TALK, retention="full")
        identity = await store.keep(decision(Action.BLOCK, **NOTIFIED), TALK, retention="full")
        kept = await store.decision(identity)
        found = claimed(store)

    assert kept is not None
    assert sorted((one.webhook, one.decision, one.attempts) for one in found) == [
        ("first", identity, 1),
        ("second", identity, 1),
    ]
    told = json.loads(found[0].body)
    assert (told["id"], told["action"], told["advice"]) == (identity, "block", ["notify"])
    assert told["scope"] == {"tenant": "shop", "region": None, "route": "/v1/x", "language": None}
    assert told["subject"] == kept.subject
    assert "ann" not in found[0].body.replace(kept.subject or "", "")


async def test_what_was_claimed_is_due_again_when_nobody_says_what_became_of_it(place: Place) -> None:
    with place.open(address=both) as store:
        await store.keep(decision(**NOTIFIED), TALK, retention="hash")
        first = claimed(store, lease_s=0.05)
        assert len(first) == 2
        wait_until(lambda: len(claimed(store)) == 2, "the end of the lease")
        assert claimed(store) == []

        store.outbox.failed(first[0], "too late", None)  # another has it by now
        assert [one.dead for one in store.outbox.standings().values()] == [0, 0]
        store.outbox.delivered(first[1])
        assert sum(one.waiting for one in store.outbox.standings().values()) == 1


async def test_what_failed_waits_and_what_was_given_up_is_seen_and_tried_again(place: Place) -> None:
    with place.open(address=both) as store:
        await store.keep(decision(**NOTIFIED), TALK, retention="hash")
        first, second = sorted(claimed(store), key=lambda one: one.webhook)
        store.outbox.failed(first, "status 500", datetime.now(UTC) + timedelta(hours=1))
        store.outbox.failed(second, "timeout", None)

        assert claimed(store) == []
        standings = store.outbox.standings()
        assert {name: (one.waiting, one.dead, one.error) for name, one in standings.items()} == {
            "first": (1, 0, "status 500"),
            "second": (0, 1, "timeout"),
        }
        assert store.outbox.retry("first") == 0
        assert store.outbox.retry() == 1
        assert [(one.webhook, one.attempts) for one in claimed(store)] == [("second", 1)]


async def test_several_processes_never_have_the_same_one(place: Place) -> None:
    stores = [place.open(address=both, spool_bytes=0, key=bytes(32)) for _ in range(4)]
    for _ in range(40):
        await stores[0].keep(decision(**NOTIFIED), TALK, retention="hash")
    found: list[int] = []
    begin = threading.Barrier(4)

    def take(store: Store) -> None:
        begin.wait()
        while some := claimed(store, most=3):
            found.extend(one.number for one in some)

    threads = [threading.Thread(target=take, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rest = claimed(stores[0], most=100)  # PostgreSQL leaves out what another is about to take
    for store in stores:
        store.close()

    assert len(found) == len(set(found))
    assert len(found) + len(rest) == 80


async def test_a_subject_that_is_deleted_is_in_no_delivery_either(place: Place) -> None:
    with place.open(address=both) as store:
        await store.keep(decision(**NOTIFIED), TALK, retention="hash")
        other = await store.keep(decision(**{**NOTIFIED, "scope": Scope(subject="bob")}), TALK, retention="hash")
        store.delete_subject("ann", "shop")

        assert {one.decision for one in claimed(store)} == {other}


async def test_a_deletion_that_was_interrupted_deletes_deliveries_too_when_it_is_finished(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    with place.open(address=both) as store:
        await store.keep(decision(**NOTIFIED), TALK, retention="hash")
        other = await store.keep(decision(**{**NOTIFIED, "scope": Scope(subject="bob")}), TALK, retention="hash")
        with monkeypatch.context() as patch:
            patch.setattr(deletions, "_step", lambda database, number: iter(()).__next__())
            with pytest.raises(StopIteration):  # it is written down, and no step begins
                store.delete_subject("ann", "shop")
        assert deletions.finish_deletions(store._database) == 1

        assert {one.decision for one in claimed(store)} == {other}


async def test_what_is_purged_is_told_to_nobody_unless_it_is_only_one_retention(place: Place) -> None:
    with place.open(address=both) as store:
        await store.keep(decision(**NOTIFIED), TALK, retention="hash")
        later = datetime.now(UTC) + timedelta(hours=1)
        assert store.purge(later, retention="full") == 0
        assert sum(one.waiting for one in store.outbox.standings().values()) == 2
        assert store.purge(later) == 1

        assert store.outbox.standings() == {}


async def test_decisions_that_come_from_the_spool_are_told_too(place: Place) -> None:
    with place.open(address=both) as store:
        place.run("ALTER TABLE decisions RENAME TO gone")
        identity = await store.keep(decision(**NOTIFIED), TALK, retention="hash")
        place.run("ALTER TABLE gone RENAME TO decisions")
        store.replay()

        assert {one.decision for one in claimed(store)} == {identity}


KILLED = """
import asyncio, os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from kept import TALK, decision
from tidegate.store import open_store
from tidegate.types import Advice

store = open_store(sys.argv[1], spool=Path(sys.argv[2]), address=lambda row: ["first"])
print(asyncio.run(store.keep(decision(advice=(Advice.NOTIFY,)), TALK, retention="hash")), flush=True)
assert store.outbox.claim(["first"], most=1, lease_s=0.05)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_process_that_dies_between_decision_and_delivery_loses_neither(place: Place) -> None:
    tests = str(Path(__file__).parents[1])
    command = [sys.executable, "-c", KILLED, place.url, str(place.spool), tests]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, timeout=60)

    assert ended.returncode == -signal.SIGKILL
    with place.open() as store:
        found: list[Delivery] = []
        wait_until(lambda: found.extend(claimed(store)) or found, "the end of the dead one's lease")
    assert [(one.decision, one.attempts) for one in found] == [(ended.stdout.strip(), 2)]
