"""A file of conversations judged into a file of decisions: in order, resumable, and nothing lost."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from tidegate.data.check import bad_lines_path, check_file
from tidegate.errors import GuardTimeout, GuardUnavailable, InputError
from tidegate.policy import load_policy
from tidegate.testing import FakeGuard
from tidegate.types import Conversation, Verdict

POLICY = load_policy("balanced")


def row(identity: Any, text: str) -> bytes:
    return json.dumps({"id": identity, "messages": [{"role": "user", "content": text}]}).encode()


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n".join(row(n, "bomb" if n % 3 == 0 else "bread") for n in range(20)) + b"\n")
    return path


class Unruly(FakeGuard):
    """Answers in another order than it is asked, and counts how many wait."""

    waiting = most = 0

    async def judge(self, conversation: Conversation) -> Verdict:
        self.waiting += 1
        self.most = max(self.most, self.waiting)
        for _ in range(7 * len(self.judged) % 11):
            await asyncio.sleep(0)
        self.waiting -= 1
        return await super().judge(conversation)


async def test_output_order_is_input_order_and_rows_wait_together_up_to_the_limit(source: Path, tmp_path: Path) -> None:
    guard = Unruly()
    tally = await check_file(source, tmp_path / "out.jsonl", guard=guard, policy=POLICY, concurrency=5)
    rows = rows_of(tmp_path / "out.jsonl")
    assert [each["id"] for each in rows] == list(range(20))
    assert [each["decision"]["action"] for each in rows] == ["block" if n % 3 == 0 else "allow" for n in range(20)]
    assert guard.most == 5
    assert (tally.checked, tally.flagged, tally.resumed, tally.bad) == (20, 7, 0, [])
    assert not bad_lines_path(tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("kept_bytes", [0, 1, 400, 401, 1500])
async def test_an_interrupted_run_goes_on_where_it_stopped_also_within_a_torn_line(
    source: Path, tmp_path: Path, kept_bytes: int
) -> None:
    whole, torn = tmp_path / "whole.jsonl", tmp_path / "torn.jsonl"
    await check_file(source, whole, guard=FakeGuard(), policy=POLICY)
    torn.write_bytes(whole.read_bytes()[:kept_bytes])
    guard = FakeGuard()
    tally = await check_file(source, torn, guard=guard, policy=POLICY)
    assert torn.read_bytes() == whole.read_bytes()
    assert tally.resumed == 20 - len(guard.judged) == whole.read_bytes()[:kept_bytes].count(b"\n")
    assert (tally.checked, tally.flagged) == (20, 7)


BAD = [
    (b"{broken", "not JSON"),
    (b"[1]", "expected an object"),
    (b'{"id": "x"}', "messages"),
    (b'{"id": {}, "messages": [{"role": "user", "content": "x"}]}', "id"),
    (b'{"messages": [{"role": "pirate", "content": "x"}]}', "role"),
    (b'{"messages": [{"role": "user", "content": 5}]}', "content"),
    (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "surrogate"),
    (b"\xff\xfe", "not UTF-8"),
    (b"[" * 100_000, "not JSON"),
]


async def test_bad_lines_are_set_apart_with_number_reason_and_themselves(tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [row("first", "bread"), *(line for line, _ in BAD), b"", row("last", "bread")]
    source.write_bytes(b"\n".join(lines))
    for _ in range(2):  # a second run adds nothing
        tally = await check_file(source, out, guard=FakeGuard(), policy=POLICY)
        assert [bad.number for bad in tally.bad] == list(range(2, 2 + len(BAD)))
        assert [each["id"] for each in rows_of(out)] == ["first", "last"]
        apart = rows_of(bad_lines_path(out))
        assert [each["line"] for each in apart] == list(range(2, 2 + len(BAD)))
        for each, (line, words) in zip(apart, BAD, strict=True):
            assert words in each["reason"]
            kept = each["text"].encode() if "text" in each else base64.b64decode(each["bytes_base64"])
            assert kept == line


async def test_a_row_without_an_id_gets_its_line_number_and_gzip_is_read(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl.gz"
    source.write_bytes(gzip.compress(b'\n{"messages": [{"role": "user", "content": "x"}], "label": "Safe"}\n'))
    await check_file(source, tmp_path / "out.jsonl", guard=FakeGuard(), policy=POLICY)
    assert [each["id"] for each in rows_of(tmp_path / "out.jsonl")] == [2]


async def test_a_failing_guard_is_a_row_with_the_failure_and_the_run_goes_on(tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(row("a", "guardfail") + b"\n" + row("b", "bread"))
    tally = await check_file(source, out, guard=FakeGuard(error=GuardTimeout("slow")), policy=POLICY)
    first, second = rows_of(out)
    assert (first["verdict"], first["failure"]["kind"]) == (None, "GuardTimeout")
    assert first["decision"]["rule"] == "on_guard_error"
    assert second["decision"]["action"] == "allow"
    assert tally.failures == 1


async def test_a_guard_that_takes_too_long_is_a_row_with_the_failure(tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(row("a", "guardhang"))
    tally = await check_file(source, out, guard=FakeGuard(), policy=POLICY, timeout_s=0.05)
    assert tally.failures == 1
    assert json.loads(out.read_text())["failure"]["kind"] == "GuardTimeout"


async def test_a_guard_that_is_gone_stops_the_run_and_the_next_run_goes_on_there(tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b"\n".join([row("a", "bread"), row("b", "guardfail"), row("c", "bread")]))
    with pytest.raises(GuardUnavailable, match="line 2"):
        await check_file(source, out, guard=FakeGuard(), policy=POLICY)
    assert [each["id"] for each in rows_of(out)] == ["a"]
    tally = await check_file(source, out, guard=FakeGuard(failing="nothing"), policy=POLICY)
    assert (tally.checked, tally.resumed) == (3, 1)


async def test_the_output_of_another_input_or_policy_is_not_continued(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    await check_file(source, out, guard=FakeGuard(), policy=POLICY)
    with pytest.raises(InputError, match=r"out\.jsonl:1: it was decided by policy balanced"):
        await check_file(source, out, guard=FakeGuard(), policy=load_policy("strict"))
    with pytest.raises(InputError, match=r"judged by guard fake.*, and this run has other/2"):
        await check_file(source, out, guard=FakeGuard(name="other/2"), policy=POLICY)
    other = tmp_path / "other.jsonl"
    other.write_bytes(row("else", "bread"))
    with pytest.raises(InputError, match="not that of line 1"):
        await check_file(other, out, guard=FakeGuard(), policy=POLICY)
    other.write_bytes(row(0, "bomb"))
    with pytest.raises(InputError, match="more rows than the input"):
        await check_file(other, out, guard=FakeGuard(), policy=POLICY)
    out.write_bytes(b'{"mine": 1}\n')
    with pytest.raises(InputError, match=r"out\.jsonl:1: not a row that tidegate check wrote"):
        await check_file(source, out, guard=FakeGuard(), policy=POLICY)
    assert out.read_bytes() == b'{"mine": 1}\n'


async def test_input_and_output_are_two_files(source: Path) -> None:
    with pytest.raises(InputError, match="another than the input"):
        await check_file(source, source, guard=FakeGuard(), policy=POLICY)


async def test_a_cut_gzip_file_is_an_input_error(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl.gz"
    source.write_bytes(gzip.compress(row("a", "bread") * 1000)[:-20])
    with pytest.raises(InputError, match=r"in\.jsonl\.gz"):
        await check_file(source, tmp_path / "out.jsonl", guard=FakeGuard(), policy=POLICY)
