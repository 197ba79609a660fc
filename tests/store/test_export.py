"""Decisions leave the store as JSONL and as Parquet, and as the command line gives them."""

from __future__ import annotations

import asyncio
import json
import stat
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kept import TALK, Place, decision
from tidegate.cli import app
from tidegate.policy import Retention
from tidegate.store import decisions as module
from tidegate.types import (
    Action,
    Advice,
    Channel,
    Conversation,
    Coverage,
    CoverageState,
    GuardFailure,
    Intervention,
    InterventionKind,
    Observed,
    Probabilities,
    Scope,
    Severity,
    Span,
    Target,
    Verdict,
)

UNSAFE = Verdict(
    Target.RESPONSE,
    Severity.UNSAFE,
    Probabilities(0.0, 0.25, 0.75),
    ("Violent",),
    {"Violent": 0.5},
    refusal=False,
    reason="because \ud800",
    span=Span(0, 5),
    guard="edge/2",
)
SEEN = Coverage("choices[0].message.content", Channel.ANSWER, CoverageState.JUDGED, 5)
RICH = decision(
    Action.BLOCK,
    verdict=UNSAFE,
    scope=Scope("shop", "eu", "/v1/chat/completions", "de", "ann"),
    coverage=(SEEN,),
    advice=(Advice.NOTIFY,),
    observed=Observed(Action.BLOCK, "new"),
    interventions=(Intervention(InterventionKind.ROLLBACK, "flagged", 2, 9, 3),),
    leaked=4,
)
FAILED = decision(Action.REVIEW, verdict=None, failure=GuardFailure("GuardTimeout", "too slow", "edge/2"))


def fill(place: Place) -> None:
    async def keep() -> None:
        with place.open() as store:
            kinds: list[tuple[Any, Conversation | None, Retention]] = [
                (RICH, Conversation.of("who", "\ud800 ö"), "full"),
                (decision(), TALK, "hash"),
                (FAILED, None, "hash"),
            ]
            for what, conversation, retention in kinds:
                await store.keep(what, conversation, retention=retention)

    asyncio.run(keep())


def tidegate(place: Place, *arguments: str) -> tuple[int, str, str]:
    environment = {"TIDEGATE_DATABASE_URL": place.url, "TIDEGATE_SPOOL": str(place.spool)}
    result = CliRunner().invoke(app, ["decisions", *arguments], env=environment)
    return result.exit_code, result.stdout, result.stderr


def test_jsonl_has_one_object_a_line_with_everything_in_it(place: Place) -> None:
    fill(place)
    code, out, _ = tidegate(place, "export")
    rows = [json.loads(line) for line in out.splitlines()]

    assert code == 0
    assert out.isascii()
    assert [row["action"] for row in rows] == ["block", "allow", "review"]
    rich = rows[0]
    assert datetime.fromisoformat(rich["time"]).utcoffset() == timedelta(0)
    assert rich["subject"].startswith("hmac-sha256:")
    assert {name: rich[name] for name in rich if name not in ("id", "time", "subject")} == {
        "action": "block",
        "rule": "otherwise",
        "policy": "balanced",
        "policy_version": "0123456789ab",
        "advice": ["notify"],
        "observed": {"action": "block", "rule": "new"},
        "interventions": [{"kind": "rollback", "outcome": "flagged", "count": 2, "characters": 9, "tokens": 3}],
        "leaked": 4,
        "guard": "edge/2",
        "target": "response",
        "severity": "unsafe",
        "probabilities": {"safe": 0.0, "controversial": 0.25, "unsafe": 0.75},
        "categories": ["Violent"],
        "category_probabilities": {"Violent": 0.5},
        "refusal": False,
        "reason": "because \ud800",
        "span": [0, 5],
        "failure": None,
        "tenant": "shop",
        "region": "eu",
        "route": "/v1/chat/completions",
        "language": "de",
        "coverage": [{"path": "choices[0].message.content", "channel": "answer", "state": "judged", "characters": 5}],
        "retention": "full",
        "conversation": [{"role": "user", "content": "who"}, {"role": "assistant", "content": "\ud800 ö"}],
        "fingerprint": None,
    }
    assert rows[1]["conversation"] is None
    assert rows[1]["fingerprint"].startswith("hmac-sha256:")
    assert (rows[2]["failure"], rows[2]["severity"]) == ({"kind": "GuardTimeout", "message": "too slow"}, None)
    assert all(row.keys() == rich.keys() for row in rows)


def test_parquet_holds_the_same(place: Place, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    fill(place)
    out = tmp_path / "kept.parquet"

    assert tidegate(place, "export", "--out", str(out))[0] == 0
    rows = parquet.read_table(out).to_pylist()
    lines = [json.loads(line) for line in tidegate(place, "export")[1].splitlines()]

    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert [row["id"] for row in rows] == [line["id"] for line in lines]
    assert rows[0]["time"] == datetime.fromisoformat(lines[0]["time"]).astimezone(UTC)
    assert rows[0]["reason"] == "because ?"
    assert json.loads(rows[0]["conversation"]) == lines[0]["conversation"]
    assert rows[0]["category_probabilities"] == [("Violent", 0.5)]
    same = {"action", "rule", "advice", "observed", "probabilities", "categories", "span", "failure", "coverage"}
    same |= {"interventions", "leaked"}
    for row, line in zip(rows, lines, strict=True):
        assert {name: row[name] for name in same} == {name: line[name] for name in same}


def test_parquet_without_its_driver_says_what_to_install(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(place)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "tidegate.store.parquet", raising=False)
    code, _, said = tidegate(place, "export", "--out", str(tmp_path / "x.parquet"))

    assert code == 2
    assert "pip install 'tidegate[parquet]'" in said


def test_an_export_can_be_to_a_file_and_of_a_time_an_action_or_a_subject(place: Place, tmp_path: Path) -> None:
    fill(place)

    def actions(*arguments: str) -> list[str]:
        code, out, said = tidegate(place, "export", *arguments)
        assert code == 0, said
        return [json.loads(line)["action"] for line in out.splitlines()]

    out = tmp_path / "out.jsonl"
    assert actions("--out", str(out)) == []
    assert len(out.read_text(encoding="ascii").splitlines()) == 3
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert actions("--action", "review") == ["review"]
    assert actions("--subject", "ann", "--tenant", "shop") == ["block"]
    assert actions("--subject", "ann") == []
    assert actions("--since", "1h") == ["block", "allow", "review"]
    assert actions("--since", "2100-01-01") == []
    assert actions("--until", "1h") == []


def test_one_decision_is_shown_as_it_is_exported(place: Place) -> None:
    fill(place)
    line = tidegate(place, "export", "--action", "block")[1]

    assert tidegate(place, "show", json.loads(line)["id"]) == (0, line, "")
    code, out, said = tidegate(place, "show", "dec_nobody")
    assert (code, out) == (2, "")
    assert "there is no such decision" in said


def test_an_export_goes_on_over_pages_and_leaves_out_what_is_kept_meanwhile(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_READ", 2)
    with place.open() as store, asyncio.Runner() as runner:
        identities = [runner.run(store.keep(decision(), TALK, retention="hash")) for _ in range(5)]
        found = []
        for kept in store.history():
            found.append(kept.id)
            runner.run(store.keep(decision(), TALK, retention="hash"))

    assert found == identities


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "--since", "yesterday"], "since: expected how long ago"),
        (["export", "--since", "0001-01-01"], "since: expected how long ago"),
        (["export", "--action", "explode"], "action: unknown action"),
        (["export", "--out", "x.csv"], "ends with .jsonl or .parquet"),
        (["purge", "--older-than", "1d", "--retention", "some"], "expected one of full, redacted, hash"),
    ],
)
def test_what_cannot_be_meant_is_one_line_and_exit_code_2(place: Place, arguments: list[str], message: str) -> None:
    place.open().close()
    code, out, said = tidegate(place, *arguments)

    assert (code, out) == (2, "")
    assert message in said


def test_a_database_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    place = Place(f"sqlite:///{tmp_path / 'typo.db'}", tmp_path)
    code, _, said = tidegate(place, "status")

    assert code == 2
    assert "no such database" in said
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_deletes_and_purges_and_says_how_many(place: Place) -> None:
    fill(place)

    assert tidegate(place, "delete", "--subject", "ann", "--tenant", "shop")[:2] == (0, '{"deleted": 1}\n')
    assert tidegate(place, "purge", "--older-than", "1h")[:2] == (0, '{"deleted": 0}\n')
    assert tidegate(place, "purge", "--older-than", "0s", "--retention", "hash")[:2] == (0, '{"deleted": 2}\n')


def test_status_replays_and_says_what_there_is_or_why_there_is_nothing(place: Place) -> None:
    fill(place)
    code, out, _ = tidegate(place, "status")
    counted = {"allow": 1, "warn": 0, "review": 1, "redact": 0, "block": 1}

    assert code == 0
    assert json.loads(out) == {"up": True, "reason": None, "spool_bytes": 0, "decisions": counted}

    store = place.open()
    place.run("ALTER TABLE decisions RENAME TO elsewhere")
    asyncio.run(store.keep(decision(), TALK, retention="hash"))
    store.close()
    code, out, _ = tidegate(place, "status")
    assert code == 2
    assert json.loads(out)["spool_bytes"] > 0

    place.run("ALTER TABLE elsewhere RENAME TO decisions")
    code, out, _ = tidegate(place, "status")
    assert code == 0
    assert json.loads(out)["decisions"]["allow"] == 2
