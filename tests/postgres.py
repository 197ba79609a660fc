"""A real PostgreSQL for tests: a cluster of its own in a new folder, reached by a Unix socket only, no port.

PostgreSQL does not run as root; where the tests do, it runs as the user ``postgres``, or as ``nobody``.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import sqlalchemy as sa

PATIENCE_S = 120.0
"""How long anything may take, on a machine that is busy with other things too."""


def find_binaries() -> Path | None:
    """The folder of ``initdb`` and ``postgres``, the newest; None when there is no PostgreSQL here."""
    candidates = sorted(
        Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name), reverse=True
    )
    if (found := shutil.which("initdb")) is not None:
        candidates.append(Path(found).resolve().parent)
    return next((path for path in candidates if (path / "initdb").exists() and (path / "postgres").exists()), None)


class Cluster:
    """A PostgreSQL server that can be killed and started again. ``url`` leads to its database ``postgres``."""

    def __init__(self, binaries: Path, folder: Path) -> None:
        self._binaries = binaries
        self._folder = folder
        self._data = folder / "data"
        self._owner: dict[str, Any] = {}
        if os.geteuid() == 0:
            account = _account()
            os.chown(folder, account.pw_uid, account.pw_gid)
            self._owner = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
        self._server: subprocess.Popen[bytes] | None = None
        self._run("initdb", "-D", self._data, "-U", "tidegate", "-A", "trust", "-E", "UTF8", "--locale=C", "-N")

    @property
    def url(self) -> str:
        return f"postgresql://tidegate@/postgres?host={self._folder}"

    def start(self) -> None:
        """Start the server and wait until it answers."""
        with (self._folder / "log").open("ab") as log:
            self._server = subprocess.Popen(
                [self._binaries / "postgres", "-D", self._data, "-k", self._folder, "-c", "listen_addresses="],
                stdout=log,
                stderr=log,
                cwd=self._folder,
                **self._owner,
            )
        engine = sa.create_engine(self.url.replace("postgresql:", "postgresql+psycopg:"), poolclass=sa.NullPool)
        until = time.monotonic() + PATIENCE_S
        while not _answers(engine):
            assert time.monotonic() < until, "PostgreSQL does not start"
            assert self._server.poll() is None, (self._folder / "log").read_text()
            time.sleep(0.05)

    def _family(self) -> list[psutil.Process]:
        assert self._server is not None
        server = psutil.Process(self._server.pid)
        return [server, *server.children(recursive=True)]

    def pause(self) -> None:
        """Stop all of it: it takes connections and answers nothing."""
        for process in self._family():
            process.suspend()

    def resume(self) -> None:
        """Go on after `pause`."""
        for process in self._family():
            process.resume()

    def kill(self) -> None:
        """End all of it at once with SIGKILL, as a crash does."""
        assert self._server is not None
        family = self._family()
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family[1:], PATIENCE_S)
        self._server.wait(PATIENCE_S)
        self._server = None
        (self._data / "postmaster.pid").unlink(missing_ok=True)

    def stop(self) -> None:
        if self._server is not None:
            self._server.send_signal(signal.SIGINT)
            self._server.wait(PATIENCE_S)
            self._server = None

    def _run(self, program: str, *arguments: object) -> None:
        command = [str(self._binaries / program), *map(str, arguments)]
        subprocess.run(command, check=True, capture_output=True, cwd=self._folder, timeout=PATIENCE_S, **self._owner)


@contextlib.contextmanager
def cluster() -> Iterator[Cluster | None]:
    """A running cluster; None when PostgreSQL is not installed."""
    binaries = find_binaries()
    if binaries is None:
        yield None
        return
    folder = Path(tempfile.mkdtemp(prefix="tidegate-", dir="/tmp"))  # short: the path of a socket has 107 bytes
    try:
        made = Cluster(binaries, folder)
        made.start()
        try:
            yield made
        finally:
            made.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _account() -> pwd.struct_passwd:
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise AssertionError("there is neither a user postgres nor a user nobody")


def _answers(engine: sa.Engine) -> bool:
    try:
        with engine.connect() as connection:
            connection.execute(sa.text("SELECT 1"))
    except sa.exc.OperationalError:
        return False
    return True
