"""A real Redis for tests: a process of its own on a Unix socket, which can be killed, paused and started again."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import redis

PATIENCE_S = 30.0


class RedisServer:
    """A Redis; what it held is lost when it is killed."""

    def __init__(self, program: str, folder: Path) -> None:
        self._program = program
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"unix://{self._folder}/redis.sock"

    @property
    def runs(self) -> bool:
        return self._process is not None

    def start(self, *options: str) -> None:
        """Start it and wait until it answers."""
        command = [self._program, "--port", "0", "--unixsocket", f"{self._folder}/redis.sock", "--save", ""]
        self._process = subprocess.Popen(
            [*command, "--appendonly", "no", "--dir", str(self._folder), *options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        limit = time.monotonic() + PATIENCE_S
        while True:
            with contextlib.suppress(redis.RedisError), redis.Redis.from_url(self.url) as client:
                client.ping()
                return
            assert time.monotonic() < limit, "Redis does not start"
            time.sleep(0.02)

    def kill(self) -> None:
        """End it at once, as a crash does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(PATIENCE_S)
            self._process = None

    def pause(self) -> None:
        """It keeps its connections and answers nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def all(self) -> bytes:
        """Everything that is in it: names and values."""
        seen = bytearray()
        with redis.Redis.from_url(self.url) as client:
            for name in client.scan_iter():
                seen += name + b" " + client.dump(name) + b"\n"
        return bytes(seen)

    def flush(self) -> None:
        with redis.Redis.from_url(self.url) as client:
            client.flushall()


@contextlib.contextmanager
def redis_server() -> Iterator[RedisServer | None]:
    """A running Redis; None when it is not installed."""
    program = shutil.which("redis-server")
    if program is None:
        yield None
        return
    folder = Path(tempfile.mkdtemp(prefix="tidegate-", dir="/tmp"))  # short: the path of a socket has 107 bytes
    server = RedisServer(program, folder)
    try:
        server.start()
        yield server
    finally:
        server.kill()
        shutil.rmtree(folder, ignore_errors=True)
