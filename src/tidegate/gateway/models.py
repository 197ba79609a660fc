"""``GET /v1/models``: what the upstream offers, as far as it is names and numbers.

A description of a model is text that no guard has judged: the policy's ``unjudged_answer`` says whether it may pass;
here, where no choice could end, to refuse it means to drop it.
"""

from __future__ import annotations

import re
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tidegate.errors import UpstreamError
from tidegate.gateway.deltas import MODEL_FIELDS, Parts, without_text
from tidegate.gateway.fields import OPENAI_HEADERS
from tidegate.gateway.scopes import scope_of
from tidegate.gateway.statuses import Problem
from tidegate.gateway.telemetry import Telemetry
from tidegate.gateway.upstream import Upstream
from tidegate.policy import PolicySource

__all__ = ["Models"]

_HEADERS: Final = (*OPENAI_HEADERS, "x-api-key", "anthropic-version")
_NAME: Final = re.compile(r"[\w:@+-][\w.:@+-]*(/[\w:@+-][\w.:@+-]*)*", re.ASCII)
_LONGEST_NAME: Final = 200


class Models:
    """The endpoints ``/v1/models`` and ``/v1/models/NAME``.

    Args:
        upstream: whose models they are; None when there is none: then the guard is the only model.
        guard: the guard's name.
        policy: says whether what else the upstream tells may pass.
        trusted: names of upstream fields that the operator says carry no text of the model.
        telemetry: counts.
    """

    def __init__(
        self,
        upstream: Upstream | None,
        guard: str,
        policy: PolicySource,
        trusted: frozenset[str],
        telemetry: Telemetry,
    ) -> None:
        self._upstream = upstream
        self._guard = guard
        self._policy = policy
        self._trusted = trusted
        self._telemetry = telemetry

    async def list(self, request: Request) -> Response:
        """All models.

        Raises:
            Problem: when the upstream answers with an error.
            UpstreamError: when it cannot be reached, or says something else than a list of models.
        """
        if self._upstream is None:
            return JSONResponse({"object": "list", "data": [self._own()]})
        told = await self._ask(self._upstream, request, "/models")
        listed = told.pop("data", None)
        if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
            raise UpstreamError("the upstream's answer is not a list of models")
        return JSONResponse({**self._plain(told, request), "data": [self._plain(one, request) for one in listed]})

    async def one(self, request: Request) -> Response:
        """One model by its name. Raises as `list`."""
        name: str = request.path_params["name"]
        if self._upstream is None or len(name) > _LONGEST_NAME or not _NAME.fullmatch(name):
            if self._upstream is None and name == self._guard:
                return JSONResponse(self._own())
            raise Problem(404, "there is no such model here", param="model", code="model_not_found")
        return JSONResponse(self._plain(await self._ask(self._upstream, request, f"/models/{name}"), request))

    def _own(self) -> dict[str, Any]:
        return {"id": self._guard, "object": "model", "created": 0, "owned_by": "tidegate"}

    async def _ask(self, upstream: Upstream, request: Request, path: str) -> dict[str, Any]:
        headers = {name: request.headers[name] for name in _HEADERS if name in request.headers}
        async with upstream.request("GET", path, headers=headers) as answer:
            if answer.status != 200:
                self._telemetry.upstream_errors.labels("status").inc()
                raise await answer.problem()
            told = await answer.json()
        if not isinstance(told, dict):
            raise UpstreamError("the upstream's answer is not a list of models")
        return told

    def _plain(self, told: dict[str, Any], request: Request) -> dict[str, Any]:
        policy = self._policy.current.at(scope_of(request))
        return without_text(told, MODEL_FIELDS, self._trusted, Parts(passing=policy.unjudged_answer == "pass"))
