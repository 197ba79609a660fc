"""``GET /openapi.json``: what the gateway speaks, for programs.

The description is ``openapi.yaml`` beside this file, written by hand: the gateway reads requests itself and leaves the
rest to the upstream, so there are no models that it could be made from. A test holds the two together: every route is
described, and what is described is answered as it says.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, Final

import yaml
from starlette.requests import Request
from starlette.responses import Response

from tidegate import __version__

__all__ = ["describe", "description"]

_FILE: Final = Path(__file__).with_name("openapi.yaml")


def description() -> dict[str, Any]:
    """The description, with the version of this Tidegate."""
    told: dict[str, Any] = yaml.safe_load(_FILE.read_text(encoding="utf-8"))
    told["info"]["version"] = __version__
    return told


@functools.cache
def _written() -> bytes:
    return json.dumps(description(), ensure_ascii=False).encode()


async def describe(request: Request) -> Response:
    """The description as JSON."""
    return Response(_written(), media_type="application/json")
