"""A gateway as the command line starts it: a process of its own, with its workers, seen from outside."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil

from kept import Place, url_of
from serving import POLICY, wait_until

PROGRAM = (sys.executable, "-c", "from tidegate.cli import app; app()")


class Served:
    """A gateway that the command line started."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, place: Place) -> None:
        self.process = process
        self.url = url
        self.place = place

    @property
    def workers(self) -> set[int]:
        children = psutil.Process(self.process.pid).children()
        return {child.pid for child in children if "spawn_main" in " ".join(_command(child))}

    def streams_of(self, pid: int) -> int:
        port = int(self.url.rpartition(":")[2])
        found = psutil.Process(pid).net_connections("tcp")
        return sum(one.status == psutil.CONN_ESTABLISHED and one.laddr.port == port for one in found)

    def metric(self, name: str) -> float | None:
        page = httpx.get(f"{self.url}/metrics", timeout=30).text
        found = re.search(rf"^{re.escape(name)} (\S+)$", page, re.MULTILINE)
        return float(found[1]) if found else None

    @property
    def num_kept(self) -> int:
        ((number,),) = self.place.run("SELECT count(*) FROM decisions")
        return int(number)


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@contextlib.contextmanager
def served(
    folder: Path,
    *arguments: str,
    place: Place | None = None,
    policy: str = POLICY,
    variables: dict[str, str] | None = None,
    **settings: str,
) -> Iterator[Served]:
    """Run ``tidegate serve`` on a free port with these arguments and settings; ended with all its workers.

    Args:
        folder: where its policy (``policy.yaml``), its database and its log (``log.txt``) are.
        place: the database where decisions are kept; None for a SQLite file in the folder.
        policy: what the policy's file says at first.
        variables: of the environment, beside the settings.
    """
    (folder / "policy.yaml").write_text(policy)
    place = place or Place(url_of(folder / "kept.db"), folder)
    settings = {"database_url": place.url, "spool": str(place.spool), **settings}
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("TIDEGATE_", "OTEL_"))}
    environment |= {f"TIDEGATE_{name.upper()}": value for name, value in settings.items()} | (variables or {})
    command = [*PROGRAM, "serve", "--port", "0", "--policy", str(folder / "policy.yaml"), *arguments]
    log = folder / "log.txt"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment)
    try:
        found: list[str] = []

        def said() -> bool:
            assert process.poll() is None, log.read_text()
            found.extend(re.findall(r"health +(http://\S+)/healthz", log.read_text()))
            return bool(found)

        wait_until(said, "the gateway", patience_s=120)
        yield Served(process, found[0], place)
    finally:
        for child in psutil.Process(process.pid).children() if process.poll() is None else ():
            with contextlib.suppress(psutil.Error):
                child.kill()
        process.kill()
        process.wait()
