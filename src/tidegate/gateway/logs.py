"""Log lines, as text or as one JSON object each; what people and models write is in none of them.

Our own lines hold words of ours, names of errors, and numbers. Those of others pass the same formatters: of an error
they show its kind and where it was raised, never its message, which may quote a text. The server's own access log is
off, because it shows paths and query strings as clients wrote them; ours names the route instead.
"""

from __future__ import annotations

import json
import logging
import time
import traceback
import uuid
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Final

from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Send
from starlette.types import Scope as AsgiScope
from uvicorn.logging import DefaultFormatter

from tidegate.settings import LogFormat

__all__ = [
    "METHODS",
    "AccessLog",
    "JsonFormatter",
    "LogFormat",
    "TextFormatter",
    "log_config",
    "log_line",
    "request_id",
    "route_of",
    "trace_id",
]

METHODS: Final = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
"""Those that are named; any other is a word of the client's."""

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
trace_id: ContextVar[str | None] = ContextVar("trace_id", default=None)

_access = logging.getLogger("tidegate.access")
_LONGEST_CHAIN: Final = 8


def log_config(level: str, form: LogFormat = "text", *, access: bool = False) -> dict[str, Any]:
    """What `logging.config.dictConfig` takes, for all loggers of the process. Lines go to standard error.

    Args:
        level: the least severity of Tidegate's own lines: ``debug``, ``info``, ``warning`` or ``error``. Others say
            warnings and errors only, at ``debug`` what uvicorn says of its life too, and never what is in a connection.
        form: text, or one JSON object a line.
        access: whether each request is a line.
    """
    others = {"debug": "INFO", "info": "WARNING"}.get(level, level.upper())
    formatters = {
        "text": {"()": TextFormatter, "fmt": "%(levelprefix)s %(message)s", "use_colors": None},
        "json": {"()": JsonFormatter},
    }
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"default": formatters[form]},
        "handlers": {
            "default": {"formatter": "default", "class": "logging.StreamHandler", "stream": "ext://sys.stderr"}
        },
        "root": {"handlers": ["default"], "level": "ERROR" if level == "error" else "WARNING"},
        "loggers": {
            "uvicorn": {"handlers": ["default"], "level": others, "propagate": False},
            "uvicorn.error": {"level": others},
            "uvicorn.access": {"handlers": [], "level": "CRITICAL", "propagate": False},
            "tidegate": {"handlers": ["default"], "level": level.upper(), "propagate": False},
            "tidegate.access": {"level": "INFO" if access else "CRITICAL"},
        },
    }


class TextFormatter(DefaultFormatter):
    """uvicorn's, without the messages of errors."""

    def format(self, record: logging.LogRecord) -> str:
        return super().format(_plain(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's name
        """The kinds of the errors, and where they were raised."""
        return "\n".join(f"{one['error']}\n  " + "\n  ".join(one["where"]) for one in _told(ei[1]))


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ``time``, ``level``, ``logger``, ``message``, and what else there is.

    ``request`` is the id of the request, that of its response, ``trace`` that of its trace. ``errors`` are the kinds of
    the errors behind the line and where they were raised. Lines of `AccessLog` have its fields.
    """

    def format(self, record: logging.LogRecord) -> str:
        plain = _plain(record)
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": plain.getMessage(),
        }
        for name, value in (("request", request_id.get()), ("trace", trace_id.get())):
            if value is not None:
                line[name] = value
        line |= getattr(record, "access", {})
        if record.exc_info and record.exc_info[1] is not None:
            line["errors"] = _told(record.exc_info[1])
        return json.dumps(line)


def log_line(words: str, level: int = logging.INFO) -> str:
    """What the server says of itself before or beside its loggers, as a line of JSON like theirs."""
    record = logging.LogRecord("tidegate.serve", level, __file__, 0, words, None, None)
    return JsonFormatter().format(record)


def _plain(record: logging.LogRecord) -> logging.LogRecord:
    """The record, without what a library adds to it of the values that it deals with."""
    if record.name != "asyncio":
        return record
    plain = logging.makeLogRecord(record.__dict__)
    plain.msg, plain.args = record.getMessage().partition("\n")[0], None
    return plain


def _told(error: BaseException | None) -> list[dict[str, Any]]:
    """An error and those behind it, the first cause last."""
    told: list[dict[str, Any]] = []
    while error is not None and len(told) < _LONGEST_CHAIN:
        frames = traceback.extract_tb(error.__traceback__)
        where = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]
        told.append({"error": type(error).__name__, "where": where})
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return told


def route_of(scope: AsgiScope) -> str | None:
    """The route of a request, also of one that was turned away before it came there; None where there is none."""
    route = scope.get("route")
    if not scope.get("endpoint") and "app" in scope:
        route = next((one for one in scope["app"].routes if one.matches(scope)[0] is not Match.NONE), None)
    return getattr(route, "path", None)


class AccessLog:
    """Says at the end of each request what was asked for and what became of it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        request_id.set(uuid.uuid4().hex)  # until `Front` knows the one that the response has
        if not _access.isEnabledFor(logging.INFO):
            await self._app(scope, receive, send)
            return
        begun = time.perf_counter()
        status: int | None = None

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception:
            status = 500 if status is None else status
            raise
        finally:
            self._say(scope, status, time.perf_counter() - begun)

    def _say(self, scope: AsgiScope, status: int | None, seconds: float) -> None:
        asked = scope.get("method", "WEBSOCKET")
        said = {
            "method": asked if asked in METHODS or scope["type"] == "websocket" else "other",
            "route": route_of(scope) or "other",
            "status": status,
            "seconds": round(seconds, 6),
        }
        shown = "gone" if status is None and scope["type"] == "http" else "" if status is None else status
        message = f"{said['method']} {said['route']} {shown} {seconds * 1000:.1f} ms"
        _access.info(message, extra={"access": said})
