"""Real servers as processes, and what a remote guard in front of any of them must do."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from servers.official_gen import SERVERS, rows
from tidegate.errors import GuardError, GuardUnavailable
from tidegate.guards.gen import GenGuard
from tidegate.guards.remote import RemoteConfig, RemoteGuard
from tidegate.guards.remote_servers import Server
from tidegate.types import Severity, Target, Verdict

PATIENCE_S = 300.0
"""How long a server may take to be ready."""
ROWS = rows(12)


class ServerProcess:
    """A server of an engine, on a port that it keeps when it is started again.

    Args:
        command: with ``{port}`` in place of the port.
        log: where what it writes goes.
        environment: variables besides those of this process.
    """

    def __init__(self, command: Sequence[str], log: Path, **environment: str) -> None:
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = [part.replace("{port}", str(self.port)) for part in command]
        self._log = log
        self._environment = {**os.environ, **environment}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it answers."""
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(
                self._command, stdout=output, stderr=subprocess.STDOUT, env=self._environment, start_new_session=True
            )
        limit = time.monotonic() + PATIENCE_S
        while not self._answers():
            assert self._process.poll() is None, f"the server ended:\n{self._log.read_text()[-4000:]}"
            assert time.monotonic() < limit, f"the server does not answer:\n{self._log.read_text()[-4000:]}"
            time.sleep(0.2)

    def kill(self) -> None:
        """End it and the processes that it started, without notice."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, 9)
            self._process.wait(30)
            self._process = None

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/openapi.json", timeout=2) as response:
                return response.status == 200
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False


@contextlib.contextmanager
def running(command: Sequence[str], log: Path, **environment: str) -> Iterator[ServerProcess]:
    """Start a server; end it afterwards."""
    server = ServerProcess(command, log, **environment)
    try:
        server.start()
        yield server
    finally:
        server.kill()


def servers_folder(name: str) -> Path:
    """The folder of servers, when it has the environment of this engine; else the tests are skipped."""
    if SERVERS is None or not (SERVERS / name / "bin" / "python").exists():
        pytest.skip(
            f"TIDEGATE_SERVERS names no folder with an environment {name}: see .ci/servers", allow_module_level=True
        )
    return SERVERS


def python_of(name: str) -> str:
    """The Python of an engine's environment."""
    return str(servers_folder(name) / name / "bin" / "python")


def remote(*servers: ServerProcess, model: str, **changes: object) -> RemoteGuard:
    """A guard in front of these servers that is quick to try again."""
    urls = tuple(server.url for server in servers)
    config = RemoteConfig.model_validate(
        {"urls": urls, "model": model, "timeout_s": 120, "failures": 1, "rest_s": 0.2, **changes}
    )
    return RemoteGuard(config)


def route_of(server: Server, target: Target) -> str:
    """How the probe found that this server is to be asked."""
    path: str = server.known[target].result().path
    return path


async def verdicts_in_process(folder: Path) -> list[Verdict]:
    """What the guard says of `ROWS` in this process."""
    async with GenGuard(str(folder)) as guard:
        return [await guard.judge(row.conversation) for row in ROWS]


async def check_verdicts(guard: RemoteGuard, expected: Sequence[Verdict], *, apart: float) -> None:
    """Verdicts are those of the same model in process, and so are probabilities, but for this much.

    Rows on whose severity the model hardly decides are left out: half the precision may turn them.
    """
    compared = 0
    for row, verdict in zip(ROWS, expected, strict=True):
        said = await guard.judge(row.conversation)
        by_severity = [said.probabilities.at_least(severity) for severity in Severity]
        assert by_severity == pytest.approx([verdict.probabilities.at_least(s) for s in Severity], abs=apart)
        if decided(verdict, apart):
            compared += 1
            assert (said.severity, said.categories, said.refusal) == (
                verdict.severity,
                verdict.categories,
                verdict.refusal,
            )
    assert compared >= len(ROWS) / 2
    assert {verdict.severity for verdict in expected} >= {Severity.SAFE, Severity.UNSAFE}


def decided(verdict: Verdict, apart: float) -> bool:
    """Whether the most probable severity and category are ahead by more than engines differ."""
    p = verdict.probabilities
    for shares in ([p.safe, p.controversial, p.unsafe], list(verdict.category_probabilities.values())):
        first, second, *_ = [*sorted(shares, reverse=True), 0.0, 0.0]
        if shares and first - second <= 2 * apart:
            return False
    return True


async def check_restart(server: ServerProcess, guard: RemoteGuard) -> None:
    """While a server is down there is a clear error, and verdicts when it is back."""
    before = await guard.judge(ROWS[0].conversation)
    server.kill()
    with pytest.raises(GuardUnavailable, match=r"cannot be reached|broke off|rests"):
        await guard.judge(ROWS[0].conversation)
    server.start()
    again = await _sooner_or_later(guard)
    assert (again.severity, again.categories) == (before.severity, before.categories)


async def _sooner_or_later(guard: RemoteGuard) -> Verdict:
    limit = time.monotonic() + PATIENCE_S
    while True:
        try:
            return await guard.judge(ROWS[0].conversation)
        except GuardError:
            assert time.monotonic() < limit, "no verdict after the restart"
            await asyncio.sleep(0.2)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
