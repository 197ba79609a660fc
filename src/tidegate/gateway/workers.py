"""Several processes behind one socket: uvicorn's supervisor, with what a gateway needs beside it.

A worker that ends is replaced. When all are told to stop, the socket is closed first, so that new connections are
refused while streams end. A restart brings each new worker into service before it retires an old one, which then ends
its streams in its own time, while the supervisor goes on.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from socket import socket

from prometheus_client.multiprocess import mark_process_dead
from uvicorn import Config
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors.multiprocess import Multiprocess, Process

__all__ = ["Workers", "end_with_parent"]

_log = logging.getLogger("tidegate.gateway")


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
        started = [self._look_after(place) for place in range(len(self.processes))]
        for process in [each for each in self._retired if each.exitcode is not None]:
            self._retired.remove(process)
            self._forget(process)
        if self._ready is not None and all(started) and not self.should_exit.is_set():
            self._ready()
            self._ready = None

    def _look_after(self, place: int) -> bool:
        """Whether the worker at this place serves; one that is gone, or does not answer, is replaced."""
        process = self.processes[place]
        started = self._ask(process)
        if started is not None:
            return started
        process.kill()
        process.join()
        self._forget(process)
        if process.exitcode == STARTUP_FAILURE:  # it would fail in the same way again
            self.failed = True
            self.should_exit.set()
        if not self.should_exit.is_set():
            _log.warning("worker %s is gone, and is replaced", process.pid)
            self.processes[place] = Process(self.config, self.sockets)
            self.processes[place].start()
        return False

    def _ask(self, process: Process) -> bool | None:
        """Whether it serves already; None when it does not answer in time, or at once when it has ended."""
        connection = process.parent_conn
        try:
            connection.send(b"ping")
            if connection in wait([connection, process.process.sentinel], self.config.timeout_worker_healthcheck):
                started: bool = connection.recv()
                return started
        except (OSError, EOFError, pickle.UnpicklingError):
            pass
        return None

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

    def _forget(self, process: Process) -> None:
        """Gauges of a process that is no more count no longer; what it counted stays."""
        mark_process_dead(process.pid, str(self._metrics))  # type: ignore[no-untyped-call]


def end_with_parent() -> None:
    """Have this worker stop when its supervisor is gone, however that ended."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def outlive() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=outlive, name="tidegate-parent", daemon=True).start()
