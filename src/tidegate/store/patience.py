"""Connections to PostgreSQL that do not wait for ever.

A server that was stopped, or a network that swallows packets behind a proxy, answers nothing and closes nothing; the
server's own timeouts do not help then. psycopg waits by a generator that is resumed a few times each second, ready or
not; so this one looks at the clock each time.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import Any, Final

__all__ = ["PATIENCE_S", "impatient", "let_it_take"]

PATIENCE_S: Final = 20.0
"""Seconds that the server may take for an answer, or for the next part of one."""


def impatient(psycopg: Any) -> Any:
    """psycopg's ``Connection``, which is closed and raises ``OperationalError`` when its server takes too long."""

    def wait(self: Any, gen: Generator[Any, Any, Any], *rest: Any, **options: Any) -> Any:
        return psycopg.Connection.wait(self, _watched(self, gen, psycopg.OperationalError), *rest, **options)

    return type("ImpatientConnection", (psycopg.Connection,), {"wait": wait, "patience_s": None})


def let_it_take(connection: Any, seconds: float | None) -> None:
    """How long this connection may take for an answer, in seconds; None for `PATIENCE_S` again.

    Args:
        connection: SQLAlchemy's; one to SQLite is left as it is.
        seconds: may be infinite.
    """
    driver = connection.connection.dbapi_connection
    if hasattr(driver, "patience_s"):
        driver.patience_s = seconds


def _watched(connection: Any, gen: Generator[Any, Any, Any], error: type[Exception]) -> Generator[Any, Any, Any]:
    patience_s = PATIENCE_S if connection.patience_s is None else connection.patience_s
    until = time.monotonic() + patience_s
    ready = None
    while True:
        try:
            wanted = gen.send(ready)
        except StopIteration as end:
            return end.value
        ready = yield wanted
        if not ready and time.monotonic() > until:
            gen.close()
            connection.close()
            raise error(f"the server has not answered for {patience_s:g} seconds")
