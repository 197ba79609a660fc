"""``POST /v1/moderations``: OpenAI's shape, with what the guard and the policy said in our field ``tidegate``.

How our categories are told in OpenAI's words: each of theirs has the score of the worst of ours that it stands for,
which is the probability that the text is not safe and of that category. PII, Politically Sensitive Topics, Copyright
Violation and Jailbreak have no word there: a text of one of those is ``flagged`` with no category true, and our field
says why. ``flagged`` is true when the policy does anything but allow.

A guard that fails has said nothing. Where the policy's ``on_guard_error`` lets such text pass (allow, warn, review),
``flagged`` is by the action as ever, and nothing has a score. Where it stops it, there is an error in the place of a
result: that stops the text too, and says nothing against it.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, NoReturn, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse

from tidegate.errors import StoreError
from tidegate.gateway.channels import BLOCKS
from tidegate.gateway.leaving import all_of, while_there
from tidegate.gateway.schemas import decision_field, mended, read_json, worst_decision
from tidegate.gateway.scopes import scope_of
from tidegate.gateway.statuses import Problem, problem_of_failure
from tidegate.gateway.telemetry import Telemetry
from tidegate.guards.base import StreamGuard
from tidegate.moderate import Keep, moderate, surely
from tidegate.policy import Policy, PolicySource
from tidegate.types import Action, Category, Channel, Conversation, Coverage, CoverageState, Decision, Scope, Verdict

__all__ = ["MOST_INPUTS", "OPENAI_CATEGORIES", "Moderations"]

MOST_INPUTS: Final = 1024
"""The most texts that one request may have."""

OPENAI_CATEGORIES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "harassment": (Category.UNETHICAL_ACTS.value,),
        "harassment/threatening": (),
        "hate": (Category.UNETHICAL_ACTS.value,),
        "hate/threatening": (),
        "illicit": (Category.NON_VIOLENT_ILLEGAL_ACTS.value,),
        "illicit/violent": (),
        "self-harm": (Category.SELF_HARM.value,),
        "self-harm/instructions": (),
        "self-harm/intent": (),
        "sexual": (Category.SEXUAL.value,),
        "sexual/minors": (),
        "violence": (Category.VIOLENT.value,),
        "violence/graphic": (),
    }
)
"""OpenAI's categories, and which of ours each stands for; () for those finer than ours, which are never said."""

_FIELDS: Final = frozenset(("input", "model"))
_PART_FIELDS: Final = frozenset(("text", "type"))
_FIELD_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_T = TypeVar("_T")
_MODELS: Final = ("omni-moderation-", "text-moderation-")


class Moderations:
    """The endpoint. The arguments are those of `tidegate.gateway.exchange.Behind`."""

    def __init__(
        self,
        *,
        guard: StreamGuard,
        policy: PolicySource,
        keep: Keep | None,
        telemetry: Telemetry,
        longest_body: int,
        guard_timeout_s: float | None,
    ) -> None:
        self._guard = guard
        self._policy = policy
        self._keep = keep
        self._telemetry = telemetry
        self._longest_body = longest_body
        self._guard_timeout_s = guard_timeout_s

    async def create(self, request: Request) -> JSONResponse:
        """Judge one text or several.

        Raises:
            Problem: when the request cannot be used, or the guard could not judge.
            StoreError: when a decision could not be kept.
            ClientDisconnect: when the client is gone; what was judged by then is kept.
        """
        body = await read_json(request, longest=self._longest_body)
        self._check_model(body.get("model"))
        _check_fields(body)
        texts = _texts(body)
        scope = scope_of(request)
        policy = self._policy.current.at(scope)
        work = (self._judge(forms, f"input[{place}]", policy, scope) for place, forms in enumerate(texts))
        decisions = await while_there(request, all_of(work))
        for decision, _ in decisions:
            if decision.failure is not None and decision.action >= BLOCKS:
                raise problem_of_failure(decision.failure)
        results = [_result(decision, policy, identity) for decision, identity in decisions]
        return JSONResponse({"id": f"modr-{uuid.uuid4().hex}", "model": self._guard.name, "results": results})

    def _check_model(self, model: Any) -> None:
        """The model is always our guard; OpenAI's names are taken too, so that clients need not be changed."""
        if model is None:
            return
        if not isinstance(model, str):
            _refuse("expected the name of a model, as a string", param="model")
        name = self._guard.name
        if model not in (name, name.partition("/")[0], "tidegate") and not model.startswith(_MODELS):
            message = f"there is no such model here: this gateway moderates with {name}"
            raise Problem(404, message, param="model", code="model_not_found")

    async def _judge(
        self, forms: Sequence[str], path: str, policy: Policy, scope: Scope
    ) -> tuple[Decision, str | None]:
        """One text, in each form in which it may be read; what counts is the worst."""
        decisions = await all_of(
            moderate(
                Conversation.of(text),
                guard=self._guard,
                policy=policy,
                scope=scope,
                timeout_s=self._guard_timeout_s,
                coverage=(Coverage(path, Channel.USER, CoverageState.JUDGED, len(forms[0])),),
            )
            for text in forms
        )
        number = worst_decision(decisions)
        self._telemetry.count_failures(one for place, one in enumerate(decisions) if place != number)
        decision, conversation = decisions[number], Conversation.of(forms[number])
        self._telemetry.count(decision, "moderation")
        if self._keep is None:
            return decision, None
        try:
            return decision, await surely(self._keep(decision, conversation, retention=policy.retention))
        except Exception as error:  # whatever keeps a decision from being kept must not pass for success
            raise StoreError("a decision could not be kept") from error


def _check_fields(body: Mapping[str, Any]) -> None:
    for name in body:
        if name not in _FIELDS:
            shown = name if _FIELD_NAME.fullmatch(name) else None
            _refuse("unknown field: expected input and model only", param=shown or "body", code="unknown_parameter")


def _texts(body: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The texts, each as it may be read: parts of one text with and without a break between them."""
    given = body.get("input")
    if "input" not in body:
        _refuse("'input' is missing: expected a string or an array of strings", code="missing_required_parameter")
    if isinstance(given, list) and given and all(isinstance(part, dict) for part in given):
        parts = [_part(part, place) for place, part in enumerate(given)]
        if not any(parts):
            _refuse("expected a text, got an empty string", param="input[0]")
        forms = ("\n".join(parts), "".join(parts))
        return [tuple(map(mended, forms if len(parts) > 1 else forms[:1]))]
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list):
        _refuse("expected a string or an array of strings")
    if not texts:
        _refuse("expected at least one text, got an empty array")
    if len(texts) > MOST_INPUTS:
        _refuse(f"expected at most {MOST_INPUTS:,} texts, got {len(texts):,}")
    for place, text in enumerate(texts):
        if not isinstance(text, str):
            _refuse("expected a string", param=f"input[{place}]")
        if not text:
            _refuse("expected a text, got an empty string", param="input" if text is given else f"input[{place}]")
    return [(mended(text),) for text in texts]


def _part(part: Mapping[str, Any], place: int) -> str:
    text = part.get("text")
    if not part.keys() <= _PART_FIELDS:
        _refuse("unknown field: expected type and text only", param=f"input[{place}]", code="unknown_parameter")
    if part.get("type") != "text" or not isinstance(text, str):
        _refuse("expected a part of type text: this guard judges text only", param=f"input[{place}]")
    return text


def _refuse(message: str, *, param: str = "input", code: str = "invalid_type") -> NoReturn:
    raise Problem(400, message, param=param, code=code)


def _result(decision: Decision, policy: Policy, identity: str | None) -> dict[str, Any]:
    verdict, failure = decision.verdict, decision.failure
    flagged = decision.action is not Action.ALLOW
    found = frozenset(verdict.categories if verdict else ())
    odds = verdict.probabilities if verdict else None
    return {
        "flagged": flagged,
        "categories": {name: flagged and not found.isdisjoint(ours) for name, ours in OPENAI_CATEGORIES.items()},
        "category_scores": {
            name: _score(verdict, ours) if verdict else 0.0 for name, ours in OPENAI_CATEGORIES.items()
        },
        "category_applied_input_types": {name: ["text"] for name in OPENAI_CATEGORIES},
        "tidegate": {
            "severity": verdict.severity.word if verdict else None,
            "probabilities": odds and {"safe": odds.safe, "controversial": odds.controversial, "unsafe": odds.unsafe},
            "categories": list(verdict.categories) if verdict else [],
            "category_probabilities": dict(verdict.category_probabilities) if verdict else {},
            "refusal": verdict.refusal if verdict else None,
            "guard": verdict.guard if verdict else failure.guard if failure else "",
            "decision": decision_field(decision, policy, path="input", identity=identity),
        },
    }


def _score(verdict: Verdict, ours: Sequence[str]) -> float:
    known = verdict.category_probabilities
    shares = [known.get(name, float(name in verdict.categories)) for name in ours]
    return verdict.probabilities.flagged * max(shares, default=0.0)
