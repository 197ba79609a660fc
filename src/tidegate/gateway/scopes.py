"""For whom a request is: what its key stands for, the route, and the language that the client says.

Nobody guesses a language here. A client that knows it says it, in ``X-Tidegate-Language``, as a BCP-47 tag.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Final

from starlette.requests import HTTPConnection

from tidegate.gateway.statuses import Problem
from tidegate.types import Scope

__all__ = ["LANGUAGE_HEADER", "Admit", "language_of", "scope_of"]

Admit = Callable[[str | None, str | None], Awaitable[None]]
"""Counts a request about a subject, given its tenant and its name; raises Problem where it has to wait."""

LANGUAGE_HEADER: Final = "x-tidegate-language"
_TAG: Final = re.compile(r"[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8})*")
_LONGEST_TAG: Final = 35


def scope_of(connection: HTTPConnection, subject: str | None = None) -> Scope:
    """For whom a request is decided, ``subject`` by the id that the client gives that person.

    ``tenant`` and ``region`` are what a middleware left in the request's state under these names.

    Raises:
        Problem: 400, when the language is none.
    """
    return Scope(
        tenant=_word_of(connection, "tenant"),
        region=_word_of(connection, "region"),
        route=connection.scope["path"],
        language=language_of(connection),
        subject=subject,
    )


def language_of(connection: HTTPConnection) -> str | None:
    """The language of a request's texts, as the client says it; None when it does not.

    Raises:
        Problem: 400, when what it says is no BCP-47 tag, or it says two.
    """
    said = connection.headers.getlist(LANGUAGE_HEADER)
    if not said:
        return None
    tag = said[0].strip()
    if len(said) > 1 or len(tag) > _LONGEST_TAG or not _TAG.fullmatch(tag):
        raise Problem(
            400, "expected one BCP-47 tag, such as de or pt-BR", param=LANGUAGE_HEADER, code="invalid_language"
        )
    return tag


def _word_of(connection: HTTPConnection, name: str) -> str | None:
    value = (connection.scope.get("state") or {}).get(name)
    return value if isinstance(value, str) and value else None
