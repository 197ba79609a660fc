"""``POST /v1/responses``: OpenAI's Responses API as a door.

How a request reads is in `tidegate.gateway.responses_asked`, how answers are judged in
`tidegate.gateway.responses_answers`. The other endpoints of the API give out what nobody judged, and are refused.
"""

from __future__ import annotations

import uuid
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
        return ResponseStream(judging, asked.body, asked.model)

    async def judge(self, asked: Asked, answer: Any, judging: Judging) -> dict[str, Any]:
        judged, _ = await judge_response(answer, judging, asked.body)
        return judged

    def again(self, asked: Asked, retry: Retry, continues: Continues) -> dict[str, Any] | None:
        """The input with the answer's beginning behind it, and the hint where this upstream reads it.

        A response that the upstream keeps has none: under the identity that the client has seen, it would keep another.
        """
        body, given = asked.body, asked.body.get("input")
        said = [{"role": "user", "content": given}] if isinstance(given, str) else [*(given or ())]
        if body.get("store") is not False or body.get("conversation"):
            return None
        if said and isinstance(said[-1], dict) and said[-1].get("role") == "assistant":
            return None
        begun = [_begun(retry.prefix, continues)] if retry.prefix else []
        instructions = body.get("instructions") or ""
        if continues == "no" or not begun or not isinstance(instructions, str):
            return {**body, "input": [*said, *begun, {"role": "developer", "content": retry.hint}]}
        hinted = f"{instructions}\n\n{retry.hint}" if instructions else retry.hint
        return {**body, "instructions": hinted, "input": [*said, *begun]}

    def error(self, problem: Problem) -> dict[str, Any]:
        return problem.body

    def error_event(self, problem: Problem) -> bytes:
        return error_event(None, problem)


def _begun(text: str, continues: Continues) -> dict[str, Any]:
    """The beginning of an answer as an item of the input; some upstreams go on with one that is incomplete."""
    if continues != "vllm":
        return {"role": "assistant", "content": text}
    content = [{"type": "output_text", "text": text, "annotations": []}]
    head = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "status": "incomplete"}
    return {**head, "content": content}


async def refuse_stored(request: Request) -> Any:
    """What is stored at the upstream would leave without having been judged.

    Raises:
        Problem: always.
    """
    message = "only POST /v1/responses is guarded: what is stored would leave unjudged, so keep what you were answered"
    raise Problem(501, message, "invalid_request_error", None, "not_guarded")
