"""Keys on the command line, and a gateway that asks for them."""

from __future__ import annotations

import json
import signal
import ssl
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme

from serving import wait_until
from test_cli import run, started


@pytest.fixture
def database(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/kept.db"


def made(*arguments: str) -> dict[str, Any]:
    result = run("keys", *arguments)
    assert result.exit_code == 0, result.stderr
    row: dict[str, Any] = json.loads(result.stdout)
    return row


@pytest.mark.parametrize(
    "arguments",
    [
        ("keys", "create", "--tenant", "shop", "--expires", "999999w"),
        ("decisions", "export", "--since", "999999w"),
        ("decisions", "purge", "--older-than", "999999w"),
        ("policy", "replay", "balanced", "--since", "999999w"),
    ],
    ids=" ".join,
)
def test_a_time_that_no_calendar_has_is_an_error_in_one_line(arguments: tuple[str, ...], database: str) -> None:
    made("create", "--tenant", "shop", "--database", database)
    result = run(*arguments, "--database", database)

    assert result.exit_code == 2  # and not 1, which says that a text was flagged
    assert "expected" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_key_is_made_listed_rotated_and_revoked_and_its_secret_shown_only_when_new(database: str) -> None:
    where = ("--database", database)
    options = ("--tenant", "shop", "--region", "EU", "--per-minute", "60", "--concurrent", "4", "--door", "chat")
    key = made("create", *options, "--expires", "90d", *where)
    rotated = made("rotate", key["id"], "--grace", "2h", *where)
    listed = run("keys", "list", *where).stdout
    revoked = made("revoke", key["id"], *where)

    assert key["key"].startswith(f"tdg_{key['id']}_")
    assert (key["tenant"], key["region"], key["doors"], key["good"]) == ("shop", "EU", ["chat"], True)
    assert (key["per_minute"], key["concurrent"], key["burst"]) == (60, 4, None)
    assert rotated["key"] != key["key"]
    assert rotated["old_until"] is not None
    assert json.loads(listed)["id"] == key["id"]
    assert "key" not in json.loads(listed)
    assert key["key"].rpartition("_")[2] not in listed
    assert (revoked["good"], "key" in revoked) == (False, False)
    assert run("keys", "list", "--tenant", "bank", *where).stdout == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("create", "--tenant", "shop", "--door", "cellar"), "unknown door 'cellar'"),
        (("create", "--tenant", "a b"), "tenant: expected"),
        (("create", "--tenant", "shop", "--expires", "soon"), "expires: expected"),
        (("create", "--tenant", "shop", "--burst", "5"), "burst: a burst needs"),
        (("revoke", "0123456789ab"), "there is no such database"),
        (("rotate", "0123456789ab", "--grace", "long"), "grace: expected"),
    ],
)
def test_what_cannot_be_used_is_one_line(database: str, arguments: tuple[str, ...], said: str) -> None:
    if arguments[0] == "rotate":
        made("create", "--tenant", "shop", "--database", database)
    result = run("keys", *arguments, "--database", database)

    assert result.exit_code == 2
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_keys_in_memory_only_are_refused() -> None:
    assert "in memory only" in run("keys", "create", "--tenant", "shop", "--database", "sqlite://").stderr


def test_a_server_that_others_can_reach_asks_who_is_let_in(database: str) -> None:
    result = run("serve", "--host", "0.0.0.0", "--port", "0", "--database", database)

    assert result.exit_code == 2
    assert "TIDEGATE_AUTH: others can reach 0.0.0.0" in result.stderr


def test_a_gateway_takes_the_keys_of_the_command_line_over_tls_and_tells_no_secret(
    database: str, tmp_path: Path
) -> None:
    authority = trustme.CA()
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(tmp_path / "server.pem")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    settings = {
        "TIDEGATE_TLS_CERT": str(tmp_path / "server.pem"),
        "TIDEGATE_UPSTREAM_KEY": "sk-plumtree",
        "TIDEGATE_LOG_LEVEL": "debug",
    }
    arguments = (
        "serve",
        "--auth",
        "keys",
        "--port",
        "0",
        "--database",
        database,
        "--upstream",
        "http://127.0.0.1:9/v1",
    )
    process_said = ""
    with started(*arguments, stdin=subprocess.DEVNULL, settings=settings) as process:
        assert process.stderr is not None
        for line in process.stderr:
            process_said += line.decode()
            if b"OpenAI API" in line:
                break
        url = process_said.split("OpenAI API")[1].strip()
        assert url.startswith("https://127.0.0.1:")
        assert "there is no key yet" in process_said
        with httpx.Client(verify=ssl.create_default_context(cafile=tmp_path / "ca.pem"), base_url=url) as client:
            assert client.post("/moderations", json={"input": "hi"}).status_code == 401
            token = made("create", "--tenant", "shop", "--database", database)["key"]
            headers = {"authorization": f"Bearer {token}"}
            wait_until(
                lambda: client.post("/moderations", json={"input": "hi"}, headers=headers).status_code == 200,
                "the key to be known",
            )
            body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
            assert client.post("/chat/completions", json=body, headers=headers).status_code == 502
        process.send_signal(signal.SIGINT)
        process_said += process.stderr.read().decode()
        assert process.wait(timeout=60) == 130

    assert "sk-plumtree" not in process_said
    assert token.rpartition("_")[2] not in process_said


def test_a_certificate_that_cannot_be_used_is_one_line(database: str, tmp_path: Path, monkeypatch: Any) -> None:
    file = tmp_path / "server.pem"
    file.write_text("nothing", encoding="ascii")
    monkeypatch.setenv("TIDEGATE_TLS_CERT", str(file))
    result = run("serve", "--port", "0", "--database", database)

    assert result.exit_code == 2
    assert "TIDEGATE_TLS_CERT: the certificate or its key cannot be used" in result.stderr.splitlines()[-1]
