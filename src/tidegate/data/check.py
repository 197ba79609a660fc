"""Judge a file of conversations into a file of decisions, and go on where an interrupted run stopped.

The output has one row for each good line of the input, in the input's order. Lines that cannot be judged go to a second
file beside it, with their number and the reason, whole; a later run finds both, repairs a last line that was torn when
the power went, and skips what is there.
"""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from tidegate.data.examples import parse_conversation
from tidegate.errors import GuardUnavailable, InputError
from tidegate.guards.base import Guard
from tidegate.moderate import moderate
from tidegate.policy import Policy
from tidegate.types import Action, Conversation, Decision

__all__ = ["BadLine", "Tally", "bad_lines_path", "check_file", "checked_row", "count_lines"]


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that could not be judged: its number, counted from 1, and why."""

    number: int
    reason: str


@dataclass(slots=True)
class Tally:
    """What a run did.

    Attributes:
        checked: rows of the output, those of earlier runs included.
        resumed: how many of them were there before.
        flagged: how many have an action above ALLOW.
        bad: lines that could not be judged, those of earlier runs included.
        failures: rows that the guard failed on; their action is the policy's ``on_guard_error``.
    """

    checked: int = 0
    resumed: int = 0
    flagged: int = 0
    failures: int = 0
    bad: list[BadLine] = field(default_factory=list)


def bad_lines_path(out: Path) -> Path:
    """Where the lines go that cannot be judged: ``out.bad.jsonl`` beside ``out.jsonl``."""
    return out.with_name(out.name.removesuffix(".jsonl") + ".bad.jsonl")


def checked_row(identity: str | int | None, decision: Decision) -> dict[str, Any]:
    """A decision as a row: ``{"id", "verdict", "decision"}``; ``verdict`` is null, and ``failure`` says why, when the
    guard failed."""
    row: dict[str, Any] = {"id": identity, "verdict": None}
    if (verdict := decision.verdict) is not None:
        row["verdict"] = {
            "severity": verdict.severity.word,
            "probabilities": {
                "safe": verdict.probabilities.safe,
                "controversial": verdict.probabilities.controversial,
                "unsafe": verdict.probabilities.unsafe,
            },
            "categories": list(verdict.categories),
            "category_probabilities": dict(verdict.category_probabilities),
            "refusal": verdict.refusal,
            "reason": verdict.reason,
            "target": verdict.target.value,
            "guard": verdict.guard,
        }
    if (failure := decision.failure) is not None:
        row["failure"] = {"kind": failure.kind, "message": failure.message, "guard": failure.guard}
    row["decision"] = {
        "action": decision.action.word,
        "rule": decision.rule,
        "policy": decision.policy,
        "version": decision.policy_version,
        "advice": [advice.value for advice in decision.advice],
    }
    return row


def count_lines(source: Path) -> int:
    """How many lines a plain or gzipped file has.

    Raises:
        InputError: when it cannot be read.
    """
    try:
        with _open(source) as file:
            return sum(1 for _ in file)
    except (OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise InputError(f"cannot be read: {reason}", where=str(source)) from None


async def check_file(
    source: Path,
    out: Path,
    *,
    guard: Guard,
    policy: Policy,
    concurrency: int = 32,
    progress: Callable[[int], None] | None = None,
    timeout_s: float | None = None,
) -> Tally:
    """Judge the last turn of every row of ``source`` and append a row for each to ``out``.

    Args:
        source: ``{"id", "messages": [{"role", "content"}, ...]}`` a line, plain or ``.gz``; other keys are ignored. A
            row without ``id`` gets its line number. Empty lines are skipped.
        out: plain ``.jsonl``; may hold the beginning of an earlier run.
        guard: judges; several rows wait for it at once, so that it can batch.
        policy: decides.
        concurrency: how many rows wait at once, at least 1.
        progress: called with the number of lines done with so far, those of earlier runs included.
        timeout_s: seconds that the guard may take for one row, greater than 0; None for as long as it wants.

    Raises:
        InputError: when a file cannot be read or written, or ``out`` holds something else than the beginning of this.
        GuardUnavailable: when the guard is gone; what was judged before is in ``out``.
    """
    if out.suffix == ".gz" or _same(source, out):
        raise InputError("expected a plain .jsonl file, and another than the input", where=str(out))
    try:
        with ExitStack() as files:
            run = _Run(source, out, files, guard, policy, concurrency, progress or (lambda _: None), timeout_s)
            return await run.go()
    except (OSError, EOFError, gzip.BadGzipFile) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise InputError(reason, where=str(getattr(error, "filename", None) or source)) from error


class _Run:
    def __init__(
        self,
        source: Path,
        out: Path,
        files: ExitStack,
        guard: Guard,
        policy: Policy,
        concurrency: int,
        progress: Callable[[int], None],
        timeout_s: float | None,
    ) -> None:
        self._guard = guard
        self._policy = policy
        self._concurrency = max(1, concurrency)
        self._progress = progress
        self._timeout_s = timeout_s
        self._tally = Tally()
        self._waiting: deque[tuple[int, str | int, asyncio.Task[Decision]]] = deque()
        self._lines = files.enter_context(_open(source))
        bad = bad_lines_path(out)
        self._known_bad = {number for number, _ in self._read_bad(bad)}
        self._kept = _rows(out, _repair(out))
        self._out = files.enter_context(out.open("ab"))
        self._bad_path, self._bad_file, self._files = bad, cast("IO[bytes] | None", None), files

    async def go(self) -> Tally:
        try:
            for number, line in enumerate(self._lines, start=1):
                if line.strip():
                    await self._take(number, line)
            while self._waiting:
                await self._write_oldest()
        finally:
            for _, _, task in self._waiting:
                task.cancel()
            await asyncio.gather(*(task for _, _, task in self._waiting), return_exceptions=True)
        if next(self._kept, None) is not None:
            raise InputError(
                "it has more rows than the input: expected the output of this input", where=str(self._out.name)
            )
        self._tally.bad.sort(key=lambda bad: bad.number)
        return self._tally

    async def _take(self, number: int, line: bytes) -> None:
        try:
            identity, conversation = _parse(line, number)
        except InputError as error:
            self._set_apart(number, str(error), line)
            return
        if (kept := next(self._kept, None)) is not None:
            self._skip(number, identity, *kept)
            return
        if len(self._waiting) >= self._concurrency:
            await self._write_oldest()
        judging = moderate(conversation, guard=self._guard, policy=self._policy, timeout_s=self._timeout_s)
        self._waiting.append((number, identity, asyncio.create_task(judging)))

    def _skip(self, number: int, identity: str | int, place: str, row: dict[str, Any]) -> None:
        decision = row["decision"]
        if row["id"] != identity:
            raise InputError(
                f"its id is not that of line {number} of the input: expected the output of this input", where=place
            )
        if decision["version"] != self._policy.version:
            raise InputError(
                f"it was decided by policy {decision['policy']} {decision['version']}, and this run has "
                f"{self._policy.name} {self._policy.version}: give another output",
                where=place,
            )
        guard = (row["verdict"] or row.get("failure") or {}).get("guard")
        if guard and guard != self._guard.name:
            raise InputError(
                f"it was judged by guard {guard}, and this run has {self._guard.name}: give another output",
                where=place,
            )
        self._tally.resumed += 1
        self._count(number, Action.parse(decision["action"]), failed=row["verdict"] is None)

    async def _write_oldest(self) -> None:
        number, identity, task = self._waiting[0]
        decision = await task
        if decision.failure is not None and decision.failure.kind == GuardUnavailable.__name__:
            raise GuardUnavailable(f"{decision.failure.message} (at line {number}; run again to go on there)")
        self._waiting.popleft()
        self._out.write(_line(checked_row(identity, decision)))
        self._out.flush()
        self._count(number, decision.action, failed=decision.failure is not None)

    def _count(self, number: int, action: Action, *, failed: bool) -> None:
        self._tally.checked += 1
        self._tally.flagged += action > Action.ALLOW
        self._tally.failures += failed
        self._progress(number)

    def _set_apart(self, number: int, reason: str, line: bytes) -> None:
        self._tally.bad.append(BadLine(number, reason))
        self._progress(number)
        if number in self._known_bad:
            return
        if self._bad_file is None:
            self._bad_file = self._files.enter_context(self._bad_path.open("ab"))
        row: dict[str, Any] = {"line": number, "reason": reason}
        try:
            row["text"] = line.decode().rstrip("\r\n")
        except UnicodeDecodeError:
            row["bytes_base64"] = base64.b64encode(line.rstrip(b"\r\n")).decode()
        self._bad_file.write(_line(row))
        self._bad_file.flush()

    @staticmethod
    def _read_bad(path: Path) -> Iterator[tuple[int, str]]:
        size = _repair(path)
        if not size:
            return
        with path.open("rb") as file:
            for position, line in enumerate(file, start=1):
                try:
                    row = json.loads(line)
                    yield int(row["line"]), str(row["reason"])
                except (ValueError, TypeError, KeyError):
                    raise InputError(
                        "not a row of lines set apart: move the file away", where=f"{path}:{position}"
                    ) from None


def _same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def _open(path: Path) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def _repair(path: Path) -> int:
    """Cut a torn last line off; return the size in bytes of what is whole, 0 when there is no file."""
    if not path.exists():
        return 0
    with path.open("r+b") as file:
        position = size = file.seek(0, 2)
        while position > 0:
            start = max(0, position - 65536)
            file.seek(start)
            end = file.read(position - start).rfind(b"\n")
            if end >= 0:
                position = start + end + 1
                break
            position = start
        if position < size:
            file.truncate(position)
        return position


def _rows(path: Path, size: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of the first ``size`` bytes of an output, each with its place."""
    if not size:
        return
    with path.open("rb") as file:
        read = number = 0
        while read < size:
            line = file.readline()
            read += len(line)
            number += 1
            place = f"{path}:{number}"
            try:
                row = json.loads(line)
                _ = row["id"], row["verdict"], row["decision"]["version"], Action.parse(row["decision"]["action"])
                _ = (row["verdict"] or {}).get("guard"), (row.get("failure") or {}).get("guard")
            except (ValueError, TypeError, KeyError, AttributeError):
                raise InputError("not a row that tidegate check wrote: give another output", where=place) from None
            yield place, row


def _parse(line: bytes, number: int) -> tuple[str | int, Conversation]:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8: byte {error.start + 1} of the line cannot be read") from None
    except json.JSONDecodeError as error:
        raise InputError(f"not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError):
        raise InputError("not JSON: nested too deep, or a number is too long") from None
    if not isinstance(row, dict):
        raise InputError('expected an object as {"id", "messages"}')
    identity = row.get("id")
    if identity is None:
        identity = number
    if not isinstance(identity, str | int) or isinstance(identity, bool):
        raise InputError("expected a string or a whole number", where="id")
    conversation = parse_conversation(row.get("messages"))
    try:
        json.dumps([identity, row.get("messages")], ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InputError("half of a surrogate pair is not text", where="messages") from None
    return identity, conversation
