"""Several processes behind one socket: uvicorn's supervisor, with what a gateway needs beside it.

A worker that ends is replaced. When all are told to stop, the socket is closed first, so that new connections are
refused while streams end. A restart brings each new worker into service before it retires an old one, which then ends
its streams in its own time, while the supervisor goes on.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from socket import socket

from prometheus_client.multiprocess import mark_process_dead
from uvicorn import Config
from uvicorn.supervisors.multiprocess import Multiprocess, Process

__all__ = ["Workers", "end_with_parent"]


class Workers(Multiprocess):
    """Runs until a signal says stop.

    Args:
        config: of the server; its ``app`` is a factory that each worker calls.
        sockets: listening, or soon; closed when all are told to stop.
        metrics: the folder of prometheus_client's multiprocess mode.
        ready: called once, when all workers answer.

    Attributes:
        failed: whether a worker could not start; its messages say why.
        interrupted: whether it ended by an interrupt from the keyboard.
    """

    def __init__(self, config: Config, sockets: list[socket], metrics: Path, ready: Callable[[], None]) -> None:
        super().__init__(config, sockets)
        self.failed = False
        self.interrupted = False
        self._metrics = metrics
        self._ready: Callable[[], None] | None = ready
        self._retired: list[Process] = []

    def keep_subprocess_alive(self) -> None:
        """Look after all workers: replace those that are gone, forget those that were retired and have ended."""
        if self.should_exit.is_set():
            return
        before = {process.pid for process in self.processes}
        super().keep_subprocess_alive()
        self.failed = self.should_exit.is_set()
        self._forget(before - {process.pid for process in self.processes})
        for process in [each for each in self._retired if each.exitcode is not None]:
            self._retired.remove(process)
            self._forget({process.pid})
        if self._ready is not None and all(process.is_ready(timeout=1) for process in self.processes):
            self._ready()
            self._ready = None

    def restart_all(self) -> None:
        """Replace each worker; the old ones end in their own time."""
        for place, old in enumerate(self.processes):
            new = Process(self.config, self.sockets)
            new.start()
            if not new.wait_until_ready(self.config.timeout_worker_healthcheck, self.should_exit):
                new.kill()
                new.join()
                return
            self.processes[place] = new
            self._retired.append(old)
            old.terminate()

    def terminate_all(self) -> None:
        """Refuse what is new, and let what is under way end."""
        for each in self.sockets:
            each.close()
        super().terminate_all()

    def join_all(self) -> None:
        """Wait until all have ended."""
        super().join_all()
        for process in self._retired:
            process.join()

    def handle_int(self) -> None:
        self.interrupted = True
        super().handle_int()

    def _forget(self, pids: set[int | None]) -> None:
        """Gauges of processes that are no more count no longer; what they counted stays."""
        for pid in pids - {None}:
            mark_process_dead(pid, str(self._metrics))  # type: ignore[no-untyped-call]


def end_with_parent() -> None:
    """Have this worker stop when its supervisor is gone, however that ended."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="tidegate-parent", daemon=True).start()
