"""A policy file that changes while it is in use."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

import pytest

from tidegate.errors import PolicyError
from tidegate.policy import WatchedPolicy, load_policy, unconfirmed

ONE = "name: one\non_guard_error: block\notherwise: allow\nrules: []\n"
TWO = ONE.replace("one", "two")
BAD = ONE.replace("rules", "rulse")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "policy.yaml"
    path.write_text(ONE)
    return path


def looks(of: WatchedPolicy, times: int = 2) -> list[bool]:
    return [of.look() for _ in range(times)]


def test_a_change_is_in_force_after_two_looks_that_find_it(path: Path) -> None:
    watched = WatchedPolicy(path)
    before = watched.current
    assert looks(watched) == [False, False]
    assert watched.current is before

    path.write_text(TWO)

    assert looks(watched) == [False, True]
    assert watched.current.name == "two"
    assert before.name == "one"
    assert looks(watched, 5) == [False] * 5


def test_a_file_that_is_still_being_written_is_not_taken(path: Path) -> None:
    """The beginning of a policy can be a policy too, with fewer rules."""
    rule = "- {name: a, severity: unsafe, action: block}\n"
    whole = (
        TWO.replace("rules: []", "rules:") + rule + rule.replace("a, severity: unsafe", "b, severity: controversial")
    )
    watched = WatchedPolicy(path)
    for end in range(len(whole)):
        path.write_text(whole[:end])
        assert watched.look() is False
    assert watched.current.name == "one"

    path.write_text(whole)
    assert looks(watched) == [False, True]
    assert len(watched.current.rules) == 2


@pytest.mark.parametrize("content", [BAD, "", "name: [", "\xff\xfe".encode("latin-1"), "#" * 300_000])
def test_the_last_good_one_stays_in_force_on_an_error(path: Path, content: str | bytes) -> None:
    told: list[str] = []
    watched = WatchedPolicy(path, tell=told.append)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())

    assert looks(watched, 5) == [False] * 5
    assert watched.current.name == "one"
    assert watched.problem is not None
    assert watched.problem.startswith(str(path))
    assert told == ["refused"]  # once, and not at every look

    path.write_text(TWO)
    assert looks(watched) == [False, True]
    assert (watched.problem, told) == (None, ["refused", "mended", "taken"])


def test_a_policy_that_cannot_be_carried_out_here_is_refused_like_a_broken_file(path: Path) -> None:
    told: list[str] = []
    watched = WatchedPolicy(path, tell=told.append)
    watched.require(unconfirmed)
    path.write_text(TWO + "layers: {region: {EU: {confirm: true}}}\n")

    assert looks(watched, 5) == [False] * 5
    assert watched.current.name == "one"
    assert watched.problem is not None
    assert watched.problem.startswith(f"{path}: confirm: ")
    assert told == ["refused"]

    path.write_text(TWO + "confirm: false\n")
    assert looks(watched) == [False, True]
    assert (watched.problem, told) == (None, ["refused", "mended", "taken"])


def test_requiring_what_the_policy_in_force_does_not_have_is_an_error(path: Path) -> None:
    path.write_text(ONE + "confirm: {on_error: pass}\n")
    with pytest.raises(PolicyError, match=r"policy.yaml: confirm: .*TIDEGATE_CONFIRM_GUARD"):
        WatchedPolicy(path).require(unconfirmed)


def test_a_file_that_is_away_for_a_moment_does_no_harm(path: Path) -> None:
    told: list[str] = []
    watched = WatchedPolicy(path, tell=told.append)
    looks(watched)
    away = path.rename(path.with_suffix(".away"))

    assert watched.look() is False
    away.rename(path)
    assert looks(watched) == [False, False]
    assert (watched.problem, told) == (None, [])


def test_a_file_that_stays_away_is_told_and_comes_back(path: Path) -> None:
    told: list[str] = []
    watched = WatchedPolicy(path, tell=told.append)
    looks(watched)
    path.unlink()

    assert looks(watched, 4) == [False] * 4
    assert watched.problem == f"{path}: No such file or directory"
    assert watched.current.name == "one"
    path.write_text(ONE)
    looks(watched)
    assert (watched.problem, told) == (None, ["unreadable", "mended"])


def test_a_file_that_is_put_back_as_it_was_ends_the_problem(path: Path) -> None:
    watched = WatchedPolicy(path)
    looks(watched)
    path.write_text(BAD)
    looks(watched)
    assert watched.problem is not None

    path.write_text(ONE)
    assert looks(watched) == [False, False]
    assert watched.problem is None


def test_a_change_that_means_the_same_keeps_what_was_compiled(path: Path) -> None:
    watched = WatchedPolicy(path)
    before = watched.current

    path.write_text("# a comment\n" + ONE)

    assert looks(watched) == [False, False]
    assert watched.current is before


def test_a_change_that_keeps_size_and_time_of_the_file_counts(path: Path) -> None:
    watched = WatchedPolicy(path)
    looks(watched)
    times = path.stat()
    path.write_text(TWO)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    assert looks(watched) == [False, True]


def test_a_link_that_leads_elsewhere_counts(tmp_path: Path) -> None:
    """As Kubernetes changes what it mounts."""
    for name, text in (("1", ONE), ("2", TWO)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "policy.yaml").write_text(text)
    data = tmp_path / "data"
    data.symlink_to("1")
    watched = WatchedPolicy(data / "policy.yaml")
    new = tmp_path / "new"
    new.symlink_to("2")
    new.replace(data)

    assert looks(watched) == [False, True]
    assert watched.current.name == "two"


def test_a_policy_that_is_wrong_at_the_beginning_is_an_error(path: Path) -> None:
    path.write_text(BAD)

    with pytest.raises(PolicyError, match="did you mean 'rules'"):
        WatchedPolicy(path)


def test_a_preset_can_stand_where_a_file_can() -> None:
    watched = WatchedPolicy("strict")

    assert looks(watched, 3) == [False] * 3
    assert watched.current == load_policy("strict") == load_policy("strict").current


async def test_watching_takes_changes_by_itself_and_outlives_what_goes_wrong(path: Path) -> None:
    taken = asyncio.Event()
    loop = asyncio.get_running_loop()
    watched = WatchedPolicy(path, tell=lambda outcome: loop.call_soon_threadsafe(taken.set))
    look, trouble = watched.look, [True]

    def troubled() -> bool:
        if trouble.pop():
            trouble.append(False)
            raise RuntimeError
        trouble.append(False)
        return look()

    watched.look = troubled  # type: ignore[method-assign]
    task = asyncio.create_task(watched.watch(0.001))
    path.write_text(TWO)  # noqa: ASYNC240 - a test
    await taken.wait()
    task.cancel()

    assert watched.current.name == "two"


def test_a_file_that_is_replaced_all_the_time_is_always_a_whole_policy(path: Path) -> None:
    """Files that are replaced in one step, as one should."""
    watched = WatchedPolicy(path)
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            beside = path.with_suffix(".new")
            beside.write_text(TWO if number % 2 else ONE)
            beside.replace(path)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        names = set()
        for _ in range(300):
            watched.look()
            names.add(watched.current.name)
    finally:
        stop.set()
        writer.join()
    assert names <= {"one", "two"}
    assert watched.problem is None
