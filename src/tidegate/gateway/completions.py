"""``POST /v1/completions``: OpenAI's text completions, with one prompt or several.

Each prompt is judged by itself, and each choice with the prompt that it answers. A prompt as token ids is text that no
guard can judge: the policy's ``unjudged_request`` says what becomes of it. With ``echo`` an answer begins with its
prompt, and is judged with it. ``suffix`` is judged as a text of the user.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final

from tidegate.gateway import sse
from tidegate.gateway.answers import NO_USAGE, AnswerStream, judge_answer
from tidegate.gateway.asked import Asked, PromptText
from tidegate.gateway.channels import Judging
from tidegate.gateway.fields import OPENAI_HEADERS, count_of, flag_of, model_of, options_of, subject_of, unseen_in
from tidegate.gateway.forms import COMPLETION
from tidegate.gateway.schemas import kind_of, refuse
from tidegate.gateway.statuses import Problem
from tidegate.gateway.upstream import KeyHeader
from tidegate.moderate import Retry
from tidegate.settings import Continues
from tidegate.types import Channel, Conversation, Coverage, CoverageState, Role, Turn

__all__ = ["CompletionRequest", "CompletionsDoor", "read_completion"]

MOST_PROMPTS: Final = 128
_MOST_CHOICES: Final = 1024
_NO_WORDS: Final = frozenset(("logit_bias", "stop_token_ids", "allowed_token_ids"))
_IDENTITIES: Final = frozenset(("model", "stop", "user", "safety_identifier", "service_tier", "metadata"))
_READ: Final = frozenset(("prompt", "suffix"))


@dataclass(frozen=True, slots=True)
class CompletionRequest(Asked):
    """A completion request.

    Attributes:
        prompts: the conversation of each prompt, in order; at least one.
        each: how many choices are asked for of each prompt, at least 1.
        wants_usage: whether a stream is to end with a usage chunk.
    """

    prompts: tuple[Conversation, ...] = ()
    each: int = 1
    wants_usage: bool = False

    @property
    def choices(self) -> int:
        """How many choices the answer has."""
        return len(self.prompts) * self.each


def read_completion(body: dict[str, Any]) -> CompletionRequest:
    """Understand a completion request; options that are not ours to know are the upstream's business.

    Raises:
        Problem: 400, with the place of what is wrong.
    """
    model = model_of(body)
    each = count_of(body, "n")
    count_of(body, "best_of")
    stream = flag_of(body, "stream")
    options = options_of(body)
    prompts = list(_prompts(body))
    if len(prompts) * each > _MOST_CHOICES:
        refuse(f"expected at most {_MOST_CHOICES:,} choices of all prompts together", "invalid_value", param="n")
    suffix = body.get("suffix")
    if suffix is not None and not isinstance(suffix, str):
        refuse(f"expected a string, got {kind_of(suffix)}", "invalid_type", param="suffix")
    texts = [(path, text) for path, text in prompts if isinstance(text, str)]
    texts += [("suffix", suffix)] if suffix else []
    unseen = (
        *(
            Coverage(path, Channel.USER, CoverageState.NOT_JUDGED, ids)
            for path, ids in prompts
            if not isinstance(ids, str)
        ),
        *unseen_in(body, read=_READ, plain=_NO_WORDS, identities=_IDENTITIES),
    )
    return CompletionRequest(
        body=body,
        conversation=Conversation(tuple(Turn(Role.USER, text if isinstance(text, str) else "") for _, text in prompts)),
        new=tuple(
            PromptText(Conversation.of(text), ((path, len(text)),), frozenset((path,))) for path, text in texts if text
        ),
        coverage=(*(Coverage(path, Channel.USER, CoverageState.JUDGED, len(text)) for path, text in texts), *unseen),
        unseen=unseen,
        model=model,
        stream=stream,
        subject=subject_of(body),
        prompts=tuple(Conversation.of(text if isinstance(text, str) else "") for _, text in prompts),
        each=each,
        wants_usage=bool(options.get("include_usage")),
    )


def _prompts(body: Mapping[str, Any]) -> Iterator[tuple[str, str | int]]:
    """Each prompt by its path: its text, or how many token ids it has."""
    given = body.get("prompt")
    if given is None:
        refuse("'prompt' is missing: expected a string or an array", "missing_required_parameter", param="prompt")
    if isinstance(given, str):
        yield "prompt", given
        return
    if not isinstance(given, list):
        refuse(f"expected a string or an array, got {kind_of(given)}", "invalid_type", param="prompt")
    if not given:
        refuse("expected at least one prompt, got an empty array", "empty_array", param="prompt")
    if _are_ids(given):
        yield "prompt", len(given)
        return
    if len(given) > MOST_PROMPTS:
        refuse(f"expected at most {MOST_PROMPTS:,} prompts, got {len(given):,}", "too_many", param="prompt")
    for place, one in enumerate(given):
        path = f"prompt[{place}]"
        if isinstance(one, str):
            yield path, one
        elif isinstance(one, list) and one and _are_ids(one):
            yield path, len(one)
        else:
            refuse(f"expected a string or an array of token ids, got {kind_of(one)}", "invalid_type", param=path)


def _are_ids(values: list[Any]) -> bool:
    return all(type(value) is int for value in values)


class CompletionsDoor:
    """OpenAI's completions."""

    route: ClassVar[str] = "/v1/completions"
    path: ClassVar[str] = "/completions"
    key_header: ClassVar[KeyHeader] = "authorization"
    headers: ClassVar[tuple[str, ...]] = OPENAI_HEADERS

    def read(self, body: dict[str, Any], *, judge_system: bool) -> CompletionRequest:
        return read_completion(body)

    def refusal(self, asked: CompletionRequest, message: str, field: dict[str, Any]) -> dict[str, Any]:
        choices = [{**_choice(index, message, "content_filter"), "tidegate": field} for index in range(asked.choices)]
        return {**_head(asked), "choices": choices, "usage": NO_USAGE, "tidegate": field}

    def refusal_events(self, asked: CompletionRequest, message: str, field: dict[str, Any]) -> bytes:
        head = _head(asked)
        events = []
        for index in range(asked.choices):
            events.append({**head, "choices": [_choice(index, message, None)]})
            events.append({**head, "choices": [_choice(index, "", "content_filter")], "tidegate": field})
        if asked.wants_usage:
            events.append({**head, "choices": [], "usage": NO_USAGE})
        return b"".join(map(sse.event, events)) + sse.DONE

    def watch(self, asked: CompletionRequest, judging: Judging) -> AnswerStream:
        return AnswerStream(
            _of_prompts(asked, judging), form=COMPLETION, choices=asked.choices, wants_usage=asked.wants_usage
        )

    async def judge(self, asked: CompletionRequest, answer: Any, judging: Judging) -> dict[str, Any]:
        judged, _ = await judge_answer(answer, _of_prompts(asked, judging), form=COMPLETION, choices=asked.choices)
        return judged

    def again(self, asked: CompletionRequest, retry: Retry, continues: Continues) -> dict[str, Any] | None:
        """A prompt that the answer's beginning was added to; the hint has no place in it."""
        prompt = asked.body.get("prompt")
        if asked.choices != 1 or not isinstance(prompt, str) or asked.body.get("echo") or asked.body.get("suffix"):
            return None
        return {**asked.body, "prompt": prompt + retry.prefix}

    def error(self, problem: Problem) -> dict[str, Any]:
        return problem.body

    def error_event(self, problem: Problem) -> bytes:
        return sse.event(problem.body)


def _of_prompts(asked: CompletionRequest, judging: Judging) -> Judging:
    return replace(judging, prompts=asked.prompts, each=asked.each)


def _head(asked: Asked) -> dict[str, Any]:
    return {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": asked.model,
    }


def _choice(index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}
