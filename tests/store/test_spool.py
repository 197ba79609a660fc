"""The spool by itself: what was appended comes back, whatever happens to the files and the processes."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.errors import StoreError
from tidegate.store import spool as module
from tidegate.store.spool import Entry, Spool

entries = st.lists(
    st.dictionaries(st.text(max_size=5), st.none() | st.integers() | st.text(st.characters(), max_size=20), max_size=3),
    min_size=1,
    max_size=5,
)


def entry(number: int) -> Entry:
    return {"id": f"dec_{number}", "text": "ö\n\ud800"}


def drain(spool: Spool) -> list[Entry]:
    """Everything that can be claimed, oldest first; it is gone then."""
    spool.release()
    found: list[Entry] = []
    while (segment := spool.claim()) is not None:
        found += segment.entries()
        segment.remove()
    return found


def segments(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.spool"))


def test_nothing_is_made_until_something_is_appended(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")

    assert (spool.num_bytes(), spool.claim()) == (0, None)
    assert not spool.folder.exists()


@settings(max_examples=50)
@given(groups=st.lists(entries, max_size=4))
def test_what_was_appended_comes_back_in_its_order(groups: list[list[Entry]], tmp_path_factory: Any) -> None:
    spool = Spool(tmp_path_factory.mktemp("spool"))
    for group in groups:
        spool.append(group)

    assert drain(spool) == [each for group in groups for each in group]
    assert spool.num_bytes() == 0


@settings(max_examples=100)
@given(groups=st.lists(entries, min_size=1, max_size=3), data=st.data())
def test_wherever_the_last_append_is_torn_all_before_it_comes_back(
    groups: list[list[Entry]], data: st.DataObject, tmp_path_factory: Any
) -> None:
    spool = Spool(tmp_path_factory.mktemp("spool"))
    for group in groups[:-1]:
        spool.append(group)
    acknowledged = spool.num_bytes()
    spool.append(groups[-1])
    spool.release()
    length = data.draw(st.integers(acknowledged, spool.num_bytes()))
    (path,) = segments(spool.folder)
    os.truncate(path, length)

    found = drain(spool)

    whole = [each for group in groups for each in group]
    assert found == whole[: len(found)]
    assert len(found) >= sum(map(len, groups[:-1]))
    assert not list(spool.folder.glob("*.damaged"))


@pytest.mark.parametrize("position", [0, 12, 40])
def test_a_broken_line_is_set_apart_and_the_others_come_back(tmp_path: Path, position: int) -> None:
    spool = Spool(tmp_path)
    spool.append([entry(1)])
    start = spool.num_bytes()
    spool.append([entry(2), entry(3)])
    spool.release()
    (path,) = segments(tmp_path)
    content = bytearray(path.read_bytes())
    content[start + position] ^= 1
    path.write_bytes(content)

    for _ in range(2):  # a segment may be read again before it is removed
        segment = spool.claim()
        assert segment is not None
        assert segment.entries() == [entry(1), entry(3)]
        segment.close()
    drain(spool)

    (damaged,) = tmp_path.glob("*.damaged")
    assert len(damaged.read_bytes().splitlines()) == 1


def test_refused_entries_are_set_apart_and_can_be_read_again(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.append([entry(1), entry(2)])
    spool.release()
    segment = spool.claim()
    assert segment is not None
    segment.refuse([entry(2)])
    segment.remove()

    (apart,) = tmp_path.glob("*.damaged")
    apart.rename(tmp_path / "again.spool")
    assert drain(spool) == [entry(2)]


def test_what_is_being_written_cannot_be_claimed_and_what_is_claimed_not_twice(tmp_path: Path) -> None:
    writing, other = Spool(tmp_path), Spool(tmp_path)
    writing.append([entry(1)])
    assert other.claim() is None

    writing.release()
    segment = other.claim()
    assert segment is not None
    assert writing.claim() is None

    segment.close()
    again = writing.claim()
    assert again is not None
    again.remove()
    assert other.claim() is None


def test_a_full_spool_refuses_and_keeps_what_it_has(tmp_path: Path) -> None:
    spool = Spool(tmp_path, limit=100)
    spool.append([entry(1)])

    with pytest.raises(StoreError, match="full"):
        spool.append([entry(2), entry(3)])

    assert drain(spool) == [entry(1)]
    spool.append([entry(4)])  # there is room again
    assert drain(spool) == [entry(4)]


def test_the_limit_is_that_of_all_processes_together(tmp_path: Path) -> None:
    one, two = Spool(tmp_path, limit=100), Spool(tmp_path, limit=100)
    one.append([entry(1)])

    with pytest.raises(StoreError, match="full"):
        two.append([entry(2), entry(3)])


def test_a_long_segment_is_followed_by_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SEGMENT_BYTES", 100)
    spool = Spool(tmp_path)
    for number in range(9):
        spool.append([entry(number)])

    assert len(segments(tmp_path)) > 2
    assert drain(spool) == [entry(number) for number in range(9)]


def test_a_disk_that_fails_costs_only_what_was_not_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = Spool(tmp_path)
    spool.append([entry(1)])
    real = os.write

    def half(handle: int, data: memoryview) -> int:
        if len(data) < 20:
            raise OSError(28, "No space left on device")
        return real(handle, data[: len(data) // 2])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", half)
        with pytest.raises(StoreError, match="No space left"):
            spool.append([entry(2)])
    spool.append([entry(3)])

    assert drain(spool) == [entry(1), entry(3)]


def test_only_the_owner_can_read_it(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "deep" / "spool")
    spool.append([entry(1)])

    assert stat.S_IMODE(spool.folder.stat().st_mode) == 0o700
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in spool.folder.iterdir())


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    spool = Spool(tmp_path / "file")

    with pytest.raises(StoreError, match="file"):
        spool.make_folder()
    with pytest.raises(StoreError, match="file"):
        spool.append([entry(1)])


_APPENDS = """
import sys
from pathlib import Path
from tidegate.store.spool import Spool

spool = Spool(Path(sys.argv[1]))
for number in range(50):
    spool.append([{"id": f"{sys.argv[2]}-{number}"}])
    if sys.argv[3] == "yes":
        spool.release()
"""


@pytest.mark.parametrize("releases", ["yes", "no"])
def test_processes_that_append_and_claim_at_once_lose_nothing(tmp_path: Path, releases: str) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", _APPENDS, str(tmp_path), name, releases]) for name in ("a", "b", "c")
    ]
    spool, found = Spool(tmp_path), []
    while any(process.poll() is None for process in processes):
        found += drain(spool)
    found += drain(spool)

    assert [process.returncode for process in processes] == [0, 0, 0]
    assert sorted(each["id"] for each in found) == sorted(f"{name}-{i}" for name in "abc" for i in range(50))
