"""Where decisions wait while the database is down: files on this machine's disk, appended to and synced.

A folder of segments. Each is written by one process, which holds a lock on it while it lives; the lock ends with the
process, however it ends, and then whoever finds the segment may claim it. An entry is a line: the CRC-32 of a JSON
text, and the text. What `Spool.append` returned from is on disk. A last line that is torn was never acknowledged, and
is left out; a broken line before it was, so it is set apart in a ``.damaged`` file and never thrown away.

Nothing here knows what an entry is: who puts it in gives it an id, and takes it out as often as it comes.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sys
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from tidegate.errors import StoreError

if sys.platform != "win32":
    import fcntl

__all__ = ["DEFAULT_BYTES", "Entry", "Segment", "Spool"]

Entry = dict[str, Any]

DEFAULT_BYTES: Final = 256 * 1024 * 1024
SEGMENT_BYTES: Final = 8 * 1024 * 1024
"""From this length on, a segment is followed by another, so that none is too long for the memory."""

_FOLDER_LOCK: Final = ".lock"


class Segment:
    """Entries that no living process writes, claimed by this one until `close` or `remove`."""

    def __init__(self, path: Path, handle: int) -> None:
        self.path = path
        self._handle = handle

    def entries(self) -> list[Entry]:
        """Everything in it that can be read; broken lines are set apart. Raises StoreError when the disk fails."""
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise StoreError(f"cannot read the spool {self.path}: {error.strerror}") from None
        lines = data.split(b"\n")
        lines.pop()  # what follows the last line break is torn, or nothing
        found = [_decode(line) for line in lines]
        if found and found[-1] is None:
            del found[-1], lines[-1]
        broken = [line for line, entry in zip(lines, found, strict=True) if entry is None]
        if broken:
            self._set_apart(b"\n".join(broken) + b"\n")
        return [entry for entry in found if entry is not None]

    def refuse(self, entries: Sequence[Entry]) -> None:
        """Set entries apart that nobody takes."""
        if entries:
            self._set_apart(b"".join(map(_encode, entries)))

    def remove(self) -> None:
        """Forget the segment: everything in it is safe elsewhere."""
        self.path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Give it back as it is. Safe to call twice."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def _set_apart(self, data: bytes) -> None:
        """Written anew each time, so that a segment that is read twice is set apart once."""
        try:
            handle = os.open(f"{self.path}.damaged", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
            with os.fdopen(handle, "ab") as file:
                if data not in Path(f"{self.path}.damaged").read_bytes():
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
        except OSError as error:
            raise StoreError(f"cannot write beside the spool {self.path}: {error.strerror}") from None


class Spool:
    """A folder of segments. Safe to use from any thread, and from any number of processes at once.

    Args:
        folder: made when it is first needed; readable by its owner only.
        limit: the most bytes of all segments together; more is refused.

    Raises:
        StoreError: on Windows, which has not the locks that this needs.
    """

    def __init__(self, folder: Path, limit: int = DEFAULT_BYTES) -> None:
        if sys.platform == "win32":
            raise StoreError("the spool needs file locks that Windows has not: set TIDEGATE_SPOOL_BYTES=0")
        self.folder = folder
        self.limit = limit
        self._gate = threading.Lock()
        self._handle = -1
        self._length = 0

    def make_folder(self) -> None:
        """Make the folder now, so that a mistake in its place shows at once. Raises StoreError."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(self.folder / _FOLDER_LOCK, os.O_CREAT | os.O_RDWR, 0o600))
        except OSError as error:
            raise StoreError(f"cannot use the spool {self.folder}: {error.strerror}") from None

    def append(self, entries: Sequence[Entry]) -> None:
        """Write entries; they are on disk when this returns.

        Raises:
            StoreError: when the spool is full or the disk fails; then none of them is acknowledged.
        """
        data = b"".join(map(_encode, entries))
        with self._gate:
            if self.num_bytes() + len(data) > self.limit:
                raise StoreError(f"cannot keep decisions: the database is down and the spool {self.folder} is full")
            try:
                self._write(data)
            except OSError as error:
                self._abandon()
                raise StoreError(f"cannot keep decisions: the spool {self.folder}: {error.strerror}") from None

    def num_bytes(self) -> int:
        """The length of all segments together, those of other processes too, in bytes."""
        return sum(length for _, length in self._segments())

    def release(self) -> None:
        """End the segment that is being written, so that it can be claimed. The next append begins another."""
        with self._gate:
            self._close()

    def claim(self) -> Segment | None:
        """The oldest segment that no living process writes or reads; None when there is none. Raises StoreError."""
        try:
            for path, _ in self._segments():
                with self._folder_locked():
                    handle = _lock(path)
                if handle >= 0:
                    return Segment(path, handle)
        except OSError as error:
            raise StoreError(f"cannot read the spool {self.folder}: {error.strerror}") from None
        return None

    def _segments(self) -> list[tuple[Path, int]]:
        """Path and length of each, oldest first."""
        found: list[tuple[Path, int]] = []
        with contextlib.suppress(OSError), os.scandir(self.folder) as entries:  # no folder: no segment
            for entry in entries:
                if entry.name.endswith(".spool"):
                    with contextlib.suppress(FileNotFoundError):  # somebody has just replayed it
                        found.append((Path(entry.path), entry.stat().st_size))
        return sorted(found)

    def _write(self, data: bytes) -> None:
        if self._length >= SEGMENT_BYTES:
            self._close()
        if self._handle < 0:
            self._open()
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._handle, rest) :]
        os.fsync(self._handle)
        self._length += len(data)

    def _open(self) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        name = f"{time.time_ns():020d}-{secrets.token_hex(4)}.spool"
        with self._folder_locked():  # nobody claims it between its birth and its lock
            self._handle = os.open(self.folder / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND, 0o600)
            self._length = 0
            fcntl.flock(self._handle, fcntl.LOCK_EX)
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _abandon(self) -> None:
        """After a write that failed: what was acknowledged before it stays, and the next one begins a new segment."""
        if self._handle >= 0:
            with contextlib.suppress(OSError):
                os.ftruncate(self._handle, self._length)
        self._close()

    def _close(self) -> None:
        if self._handle >= 0:
            with contextlib.suppress(OSError):
                os.close(self._handle)
            self._handle = -1

    @contextlib.contextmanager
    def _folder_locked(self) -> Iterator[None]:
        handle = os.open(self.folder / _FOLDER_LOCK, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


def _lock(path: Path) -> int:
    """A handle that holds the lock of a segment; -1 when somebody else has it, or it is gone."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return -1
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(handle).st_nlink:
            return handle
    except BlockingIOError:
        pass
    os.close(handle)
    return -1


def _encode(entry: Entry) -> bytes:
    text = json.dumps(entry, separators=(",", ":")).encode("ascii")
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _decode(line: bytes) -> Entry | None:
    """The entry of a line; None when the line is broken."""
    mark, _, text = line.partition(b" ")
    try:
        if int(mark, 16) != zlib.crc32(text):
            return None
        entry = json.loads(text)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None
