"""Webhooks on the command line: what waits, what was given up, and that it is tried again."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kept import decision, url_of
from tidegate.cli import app
from tidegate.store import open_store


@pytest.fixture
def database(tmp_path: Path) -> str:
    """One delivery that waits, and one that was given up."""
    url = url_of(tmp_path / "kept.db")
    with open_store(url, address=lambda row: ["good", "gone"]) as store:
        asyncio.run(store.keep(decision(), None, retention="hash"))
        (given_up,) = store.outbox.claim(["gone"], most=1, lease_s=60)
        store.outbox.failed(given_up, "status 500", None)
    return url


def test_status_tells_of_each_webhook_and_retry_has_it_tried_again(database: str) -> None:
    run = CliRunner().invoke
    before = run(app, ["webhooks", "status", "--database", database])
    again = run(app, ["webhooks", "retry", "--database", database])
    after = run(app, ["webhooks", "status", "--database", database])

    rows = [json.loads(line) for line in before.stdout.splitlines()]
    assert [(row["webhook"], row["waiting"], row["dead"], row["error"]) for row in rows] == [
        ("gone", 0, 1, "status 500"),
        ("good", 1, 0, None),
    ]
    assert before.exit_code == 1
    assert "1 deliveries are tried again" in again.stderr
    assert [json.loads(line)["waiting"] for line in after.stdout.splitlines()] == [1, 1]
    assert after.exit_code == 0


def test_a_file_of_webhooks_that_cannot_be_used_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "webhooks.yaml"
    path.write_text("webhooks: [{name: team, url: 'ftp://x/', secret: abc}]")
    monkeypatch.setenv("TIDEGATE_WEBHOOKS", str(path))
    result = CliRunner().invoke(app, ["serve", "--port", "0", "--database", url_of(tmp_path / "kept.db")])

    assert result.exit_code == 2
    assert "webhooks.0.url" in result.stderr
    assert "Traceback" not in result.stderr
