"""Which error has which HTTP status, and how it looks: in OpenAI's shape and in Anthropic's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from starlette.responses import JSONResponse

from tidegate.errors import (
    GuardError,
    GuardOverloaded,
    GuardTimeout,
    InputError,
    StoreError,
    TidegateError,
    UpstreamError,
)
from tidegate.types import GuardFailure

__all__ = ["ANTHROPIC_KINDS", "Problem", "no_such_path", "problem_of", "problem_of_failure"]

ANTHROPIC_KINDS: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}
"""Anthropic's kind of error for a status; every other one is an invalid request, or from 500 on an ``api_error``."""


@dataclass(eq=False)
class Problem(Exception):
    """An error on its way to the client; raise it, or put it at the end of a stream.

    Attributes:
        status: the HTTP status.
        message: what was wrong and what was expected; never quotes what a person or a model wrote.
        type: OpenAI's kind of error, as ``invalid_request_error``.
        param: the place in the request; None when it is the whole.
        code: a word for programs; None when there is none.
        headers: what else the client should know, as ``retry-after``.
    """

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        """The error in OpenAI's shape."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    @property
    def anthropic_body(self) -> dict[str, Any]:
        """The error in Anthropic's shape; the place stands before the message."""
        kind = ANTHROPIC_KINDS.get(self.status) or ("invalid_request_error" if self.status < 500 else "api_error")
        message = f"{self.param}: {self.message}" if self.param else self.message
        return {"type": "error", "error": {"type": kind, "message": message}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, dict(self.headers))


def no_such_path(path: str) -> Problem:
    """What a client is told that asks for what is not here; most often it left ``/v1`` out of its base URL."""
    hint = "" if path.startswith("/v1/") else ": those for programs begin with /v1/"
    return Problem(404, f"there is no such path here{hint}")


_GUARD: Final = {
    GuardTimeout.__name__: (504, "guard_timeout"),
    GuardOverloaded.__name__: (503, "guard_overloaded"),
}


def problem_of_failure(failure: GuardFailure) -> Problem:
    """What a client is told when a guard could not judge what it asked about."""
    status, code = _GUARD.get(failure.kind, (503, "guard_error"))
    headers = {"retry-after": "1"} if code == "guard_overloaded" else {}
    return Problem(status, f"the guard could not judge: {failure.kind}", "server_error", None, code, headers)


def problem_of(error: TidegateError) -> Problem:
    """What a client is told about one of our errors."""
    match error:
        case InputError():
            return Problem(400, error.message, param=error.where)
        case GuardError():
            return problem_of_failure(GuardFailure(type(error).__name__, ""))
        case UpstreamError():
            return Problem(error.status or 502, str(error), "upstream_error", None, "upstream_error")
        case StoreError():
            return Problem(500, "the decision could not be kept", "server_error", None, "store_error")
    return Problem(500, "something went wrong in the gateway", "server_error", None, "internal_error")
