"""``POST /v1/responses``: OpenAI's Responses API as a door.

How a request reads is in `tidegate.gateway.responses_asked`, how answers are judged in
`tidegate.gateway.responses_answers`. The other endpoints of the API give out what nobody judged, and are refused.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from starlette.requests import Request

from tidegate.gateway.asked import Asked
from tidegate.gateway.channels import Judging
from tidegate.gateway.fields import OPENAI_HEADERS
from tidegate.gateway.responses_answers import (
    FILTERED,
    NO_USAGE,
    ResponseStream,
    error_event,
    judge_response,
    new_response,
    numbered,
    said_by_policy,
)
from tidegate.gateway.responses_asked import read_responses
from tidegate.gateway.responses_shown import events_of
from tidegate.gateway.statuses import Problem
from tidegate.gateway.upstream import KeyHeader
from tidegate.moderate import Retry
from tidegate.settings import Continues

__all__ = ["ResponsesDoor", "refuse_stored"]


class ResponsesDoor:
    """OpenAI's Responses API."""

    route: ClassVar[str] = "/v1/responses"
    path: ClassVar[str] = "/responses"
    key_header: ClassVar[KeyHeader] = "authorization"
    headers: ClassVar[tuple[str, ...]] = OPENAI_HEADERS

    def read(self, body: dict[str, Any], *, judge_system: bool) -> Asked:
        return read_responses(body, judge_system=judge_system)

    def refusal(self, asked: Asked, message: str, field: dict[str, Any]) -> dict[str, Any]:
        response = new_response(asked.body, asked.model)
        return {**response, **FILTERED, "output": [said_by_policy(message)], "usage": NO_USAGE, "tidegate": field}

    def refusal_events(self, asked: Asked, message: str, field: dict[str, Any]) -> bytes:
        begun = {**new_response(asked.body, asked.model), "output": []}
        item = said_by_policy(message)
        ended = {**begun, **FILTERED, "output": [item], "usage": NO_USAGE, "tidegate": field}
        events: list[dict[str, Any]] = [
            {"type": "response.created", "response": begun},
            {"type": "response.in_progress", "response": begun},
            *events_of(0, item, lambda text: [text]),
            {"type": "response.incomplete", "response": ended},
        ]
        return b"".join(numbered(number, content) for number, content in enumerate(events))

    def watch(self, asked: Asked, judging: Judging) -> ResponseStream:
        return ResponseStream(replace(judging, retries=False), asked.body, asked.model)

    async def judge(self, asked: Asked, answer: Any, judging: Judging) -> dict[str, Any]:
        judged, _ = await judge_response(answer, judging, asked.body)
        return judged

    def again(self, asked: Asked, retry: Retry, continues: Continues) -> dict[str, Any] | None:
        return None

    def error(self, problem: Problem) -> dict[str, Any]:
        return problem.body

    def error_event(self, problem: Problem) -> bytes:
        return error_event(None, problem)


async def refuse_stored(request: Request) -> Any:
    """What is stored at the upstream would leave without having been judged.

    Raises:
        Problem: always.
    """
    message = "only POST /v1/responses is guarded: what is stored would leave unjudged, so keep what you were answered"
    raise Problem(501, message, "invalid_request_error", None, "not_guarded")
