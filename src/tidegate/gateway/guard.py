"""``POST /v1/guard``: judge whole conversations, and say everything that a verdict and a decision have.

For programs that hold the conversation themselves, and want to know what is said of its last turn: by the guard, and
by the policy. What a guard that fails means is the policy's to say, so it is a decision like the others, with status
200. The names in the body are those of the turns; an unknown one is an error, because it may carry text that nobody
would judge.

`Reading` is how both doors of this kind, this one and `tidegate.gateway.live`, read what they are sent.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Final, NoReturn, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse

from tidegate.errors import InputError, StoreError
from tidegate.gateway.history import covered_with, judge_turns, worst_of
from tidegate.gateway.leaving import all_of, while_there
from tidegate.gateway.schemas import decision_field, mended, read_json
from tidegate.gateway.scopes import Admit, scope_of
from tidegate.gateway.statuses import Problem
from tidegate.gateway.telemetry import Telemetry
from tidegate.gateway.unescaped import Undoing, wholly_unescaped
from tidegate.guards.base import StreamGuard
from tidegate.moderate import Keep, Masked, StreamModerator, moderate, surely
from tidegate.personal import find
from tidegate.policy import Policy, PolicySource, Retention
from tidegate.types import (
    Action,
    Channel,
    Conversation,
    Decision,
    GuardFailure,
    Role,
    Scope,
    Target,
    TokenVerdict,
    ToolCall,
    Turn,
)

__all__ = [
    "MOST_CONVERSATIONS",
    "MOST_TURNS",
    "GuardDoor",
    "Keeping",
    "Reading",
    "failure_field",
    "mask_field",
    "reported",
    "span_field",
    "token_field",
    "without_escapes",
]

MOST_CONVERSATIONS: Final = 256
"""The most conversations that one request may have."""
MOST_TURNS: Final = 2048
"""The most turns of a conversation."""
MOST_CALLS: Final = 1024
"""The most tool calls of a turn."""
_LONGEST_NAME: Final = 256
"""Characters of a name: of a tool, a region, a route, a language, a subject."""

_log = logging.getLogger("tidegate.gateway")
_ROLES: Final = ", ".join(role.value for role in Role)
_SCOPE: Final = ("region", "route", "language", "subject")
_FIELD_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")

K = TypeVar("K", bound=str)


class Reading:
    """JSON values as our words; every error is an InputError that says where, and quotes nothing."""

    @staticmethod
    def known(values: Mapping[str, Any], names: Collection[str], where: str = "") -> None:
        """Refuse a field that is not known."""
        for name in values:
            if name not in names:
                shown = name if _FIELD_NAME.fullmatch(name) else ""
                _refuse(f"unknown field: expected {', '.join(names)}", _joined(where, shown) or "body")

    @staticmethod
    def mapping(value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            _refuse(f"expected an object, got {_kind(value)}", where)
        return value

    @staticmethod
    def several(value: Any, where: str, *, most: int, least: int = 0) -> list[Any]:
        if not isinstance(value, list):
            _refuse(f"expected an array, got {_kind(value)}", where)
        if not least <= len(value) <= most:
            _refuse(f"expected {least:,} to {most:,} entries, got {len(value):,}", where)
        return value

    @staticmethod
    def text(value: Any, where: str) -> str:
        """A string of any length; single halves of surrogate pairs are replaced."""
        if not isinstance(value, str):
            _refuse(f"expected a string, got {_kind(value)}", where)
        return mended(value)

    @classmethod
    def name(cls, value: Any, where: str, *, least: int = 0) -> str:
        """A short string."""
        text = cls.text(value, where)
        if not least <= len(text) <= _LONGEST_NAME:
            _refuse(f"expected {least} to {_LONGEST_NAME} characters, got {len(text):,}", where)
        return text

    @staticmethod
    def yes_or_no(value: Any, where: str) -> bool:
        if not isinstance(value, bool):
            _refuse(f"expected true or false, got {_kind(value)}", where)
        return value

    @staticmethod
    def one_of(value: Any, kinds: Mapping[str, K], where: str) -> K:
        found = kinds.get(value) if isinstance(value, str) else None
        if found is None:
            _refuse(f"expected one of {', '.join(kinds)}", where)
        return found

    @classmethod
    def turns(cls, value: Any, where: str = "turns", *, least: int = 1) -> tuple[Turn, ...]:
        """The turns of a conversation."""
        turns = cls.several(value, where, most=MOST_TURNS, least=least)
        return tuple(cls.turn(turn, f"{where}[{place}]") for place, turn in enumerate(turns))

    @classmethod
    def turn(cls, value: Any, where: str) -> Turn:
        fields = cls.mapping(value, where)
        cls.known(fields, ("role", "content", "reasoning", "tool_calls"), where)
        if "role" not in fields:
            _refuse(f"this field is missing: expected one of {_ROLES}", f"{where}.role")
        role = cls.one_of(fields["role"], {role.value: role for role in Role}, f"{where}.role")
        for name in ("reasoning", "tool_calls"):
            if fields.get(name) and role is not Role.ASSISTANT:
                _refuse("only a turn of the assistant has this", f"{where}.{name}")
        calls = cls.several(fields.get("tool_calls", []), f"{where}.tool_calls", most=MOST_CALLS)
        return Turn(
            role,
            cls.text(fields.get("content", ""), f"{where}.content"),
            cls.text(fields.get("reasoning", ""), f"{where}.reasoning"),
            tuple(cls.call(call, f"{where}.tool_calls[{place}]") for place, call in enumerate(calls)),
        )

    @classmethod
    def call(cls, value: Any, where: str) -> ToolCall:
        fields = cls.mapping(value, where)
        cls.known(fields, ("name", "arguments"), where)
        for name in ("name", "arguments"):
            if name not in fields:
                _refuse("this field is missing: expected a string", f"{where}.{name}")
        return ToolCall(cls.name(fields["name"], f"{where}.name"), cls.text(fields["arguments"], f"{where}.arguments"))

    @classmethod
    def scope(cls, value: Any, base: Scope, where: str = "scope") -> Scope:
        """What a request says of whom it is for, on what is known already: the server's word goes first."""
        fields = cls.mapping(value, where)
        cls.known(fields, _SCOPE, where)
        said = {
            name: cls.name(text, _joined(where, name), least=1) for name, text in fields.items() if text is not None
        }
        if base.region is not None:
            said.pop("region", None)
        return replace(base, **said)


def _joined(where: str, name: str) -> str:
    return f"{where}.{name}" if where and name else where or name


def _refuse(message: str, where: str) -> NoReturn:
    raise InputError(message, where=where)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


# --- what is told -------------------------------------------------------------------------------------------------


def token_field(token: TokenVerdict, places: Undoing) -> dict[str, Any]:
    """What a guard said at one token, where it is in the text that was given."""
    said = token.probabilities
    return {
        "start": places.given(token.span.start),
        "end": places.given(token.span.end),
        "severity": token.severity.word,
        "probabilities": {"safe": said.safe, "controversial": said.controversial, "unsafe": said.unsafe},
        "category": token.category,
        "category_probability": token.category_probability,
    }


def reported(decision: Decision, policy: Policy, identity: str | None) -> dict[str, Any]:
    """A decision with everything that it and its verdict have, and none of the judged text.

    What is not there when the guard failed is null or empty; ``span`` is null for the whole text.
    """
    verdict = decision.verdict
    told = decision_field(decision, policy, identity=identity)
    del told["where"]
    scope = {each.name: getattr(decision.scope, each.name) for each in fields(Scope) if each.name != "subject"}
    return told | {
        "target": verdict.target.value if verdict else None,
        "category_probabilities": dict(verdict.category_probabilities) if verdict else {},
        "refusal": verdict.refusal if verdict else None,
        "reason": mended(verdict.reason) if verdict and verdict.reason is not None else None,
        "span": span_field(decision, Undoing()),
        "scope": scope,
    }


def span_field(decision: Decision, places: Undoing) -> dict[str, int] | None:
    """Where in the text that was given it is; None for the whole of it, and when the guard failed."""
    span = decision.verdict.span if decision.verdict else None
    return None if span is None else {"start": places.given(span.start), "end": places.given(span.end)}


def mask_field(mask: Masked, places: Undoing) -> dict[str, Any]:
    """What stands in the place of personal data, in the text that was given."""
    start, end = places.given(mask.start), places.given(mask.start + len(mask.text))
    return {"start": start, "end": end, "text": places.written(mask.start, mask.text)}


def without_escapes(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """Turns as they are judged: the arguments of calls, and what tools found, as a program will read them."""
    return tuple(
        replace(
            turn,
            content=wholly_unescaped(turn.content) if turn.role is Role.TOOL else turn.content,
            tool_calls=tuple(replace(call, arguments=wholly_unescaped(call.arguments)) for call in turn.tool_calls),
        )
        for turn in turns
    )


def failure_field(failure: GuardFailure | None) -> dict[str, str] | None:
    """Why a guard said nothing."""
    return None if failure is None else {"kind": failure.kind, "message": failure.message}


class Keeping:
    """Counts decisions and keeps them.

    Args:
        keep: where they go; None for nowhere.
        telemetry: counts.
    """

    def __init__(self, keep: Keep | None, telemetry: Telemetry) -> None:
        self._keep = keep
        self._telemetry = telemetry

    async def __call__(
        self, decision: Decision, conversation: Conversation, target: str, retention: Retention
    ) -> str | None:
        """Keep one, to the end also when the caller goes away meanwhile; returns its id, if any.

        Raises:
            StoreError: when it could not be kept.
        """
        self._telemetry.count(decision, target)
        if self._keep is None:
            return None
        try:
            return await surely(self._keep(decision, conversation, retention=retention))
        except Exception as error:  # whatever keeps a decision from being kept must not pass for success
            _log.error("a decision could not be kept: %s", type(error).__name__)
            raise StoreError("a decision could not be kept") from error


# --- the endpoint -------------------------------------------------------------------------------------------------


class GuardDoor:
    """The endpoint.

    Args:
        guard: judges.
        policy: where the policy in force is; each request is decided by one.
        keep: where decisions go; None for nowhere.
        telemetry: counts.
        longest_body: the most bytes of a request.
        guard_timeout_s: seconds that the guard may take for each text; None for as long as it wants.
        admit: as in `tidegate.gateway.exchange.Behind`.
    """

    def __init__(
        self,
        *,
        guard: StreamGuard,
        policy: PolicySource,
        keep: Keep | None,
        telemetry: Telemetry,
        longest_body: int,
        guard_timeout_s: float | None,
        admit: Admit | None = None,
    ) -> None:
        self._guard = guard
        self._policy = policy
        self._admit = admit
        self._keep = Keeping(keep, telemetry)
        self._longest_body = longest_body
        self._guard_timeout_s = guard_timeout_s

    async def judge(self, request: Request) -> JSONResponse:
        """Judge one conversation, or several.

        Raises:
            Problem: when the request cannot be used.
            InputError: the same; says where.
            StoreError: when a decision could not be kept.
            ClientDisconnect: when the client is gone; what was judged by then is kept.
        """
        body = await read_json(request, longest=self._longest_body)
        Reading.known(body, ("turns", "conversations", "scope", "tokens"))
        base = Reading.scope(body.get("scope", {}), scope_of(request))
        tokens = Reading.yes_or_no(body.get("tokens", False), "tokens")
        policy = self._policy.current
        if "conversations" not in body:
            if "turns" not in body:
                raise Problem(
                    400, "this field is missing: expected the turns of a conversation", param="turns",
                    code="missing_required_parameter",
                )  # fmt: skip
            conversation = Conversation(Reading.turns(body["turns"]))
            _check_tokens(conversation, "turns", tokens=tokens)
            await self._let_in([base])
            result = self._result(conversation, policy, base, tokens=tokens)
            return JSONResponse(await while_there(request, result))
        if "turns" in body:
            _refuse("expected either turns or conversations, got both", "conversations")
        read = _conversations(body["conversations"], base, tokens=tokens)
        await self._let_in([scope for _, scope in read])
        work = (self._result(conversation, policy, scope, tokens=tokens) for conversation, scope in read)
        return JSONResponse({"results": await while_there(request, all_of(work))})

    async def _let_in(self, scopes: Sequence[Scope]) -> None:
        """Count a request about each subject once. Raises Problem when one of them has to wait."""
        if self._admit is not None:
            for scope in {scope.subject: scope for scope in scopes}.values():
                await self._admit(scope.tenant, scope.subject)

    async def _result(self, given: Conversation, policy: Policy, scope: Scope, *, tokens: bool) -> dict[str, Any]:
        here = policy.at(scope)
        conversation = Conversation(without_escapes(given.turns))
        decision, earlier = await asyncio.gather(
            moderate(conversation, guard=self._guard, policy=policy, scope=scope, timeout_s=self._guard_timeout_s),
            judge_turns(
                conversation.turns[:-1], guard=self._guard, policy=here, scope=scope, timeout_s=self._guard_timeout_s
            ),
        )
        coverage = covered_with(decision.coverage, earlier)
        turn, decision = worst_of(len(conversation.turns) - 1, decision, earlier)
        decision = replace(decision, coverage=coverage)
        identity = await self._keep(decision, conversation, conversation.target.value, here.retention)
        told = reported(decision, here, identity) | {"turn": turn, "masks": list(_masks(decision, given))}
        if given.turns[turn].role is Role.TOOL:
            told["span"] = span_field(decision, Undoing(given.turns[turn].content, whole=True))
        if not tokens:
            return told
        texts = _written(given.turns[-1], len(conversation.turns) - 1)
        return told | {"tokens": [await self._tokens(conversation, *text, here, scope) for text in texts]}

    async def _tokens(
        self, conversation: Conversation, path: str, channel: Channel, text: str, about: dict[str, str],
        policy: Policy, scope: Scope,
    ) -> dict[str, Any]:  # fmt: skip
        """What the guard says at each token of one text: what it says is told, and nothing is decided by it."""
        places = Undoing(text, whole=True) if channel is Channel.TOOL_CALL else Undoing()
        before = conversation.turns[:-1]
        moderator = StreamModerator(
            self._guard,
            policy.only_observed(),
            scope,
            Conversation(before) if before else None,
            channel=channel,
            timeout_s=self._guard_timeout_s,
            reasoning=about.get("reasoning", ""),
            name=about.get("name", ""),
        )
        try:
            steps = (await moderator.feed(places.text or text), await moderator.finish())
        finally:
            moderator.close()
        return {
            "path": path,
            "channel": channel.value,
            "tokens": [token_field(token, places) for step in steps for token in step.tokens],
            "failure": failure_field(moderator.failure),
        }


def _conversations(value: Any, base: Scope, *, tokens: bool) -> list[tuple[Conversation, Scope]]:
    read: list[tuple[Conversation, Scope]] = []
    for place, one in enumerate(Reading.several(value, "conversations", most=MOST_CONVERSATIONS, least=1)):
        where = f"conversations[{place}]"
        fields = Reading.mapping(one, where)
        Reading.known(fields, ("turns", "scope"), where)
        if "turns" not in fields:
            _refuse("this field is missing: expected the turns of a conversation", f"{where}.turns")
        conversation = Conversation(Reading.turns(fields["turns"], f"{where}.turns"))
        _check_tokens(conversation, f"{where}.turns", tokens=tokens)
        read.append((conversation, Reading.scope(fields.get("scope", {}), base, f"{where}.scope")))
    return read


def _check_tokens(conversation: Conversation, where: str, *, tokens: bool) -> None:
    if tokens and conversation.target is not Target.RESPONSE:
        last = f"{where}[{len(conversation.turns) - 1}].role"
        _refuse("tokens are judged of a response only: expected the last turn to be the assistant's", last)


def _written(turn: Turn, place: int) -> Sequence[tuple[str, Channel, str, dict[str, str]]]:
    """The texts of an assistant's turn: path, channel, text, and what the guard is told about it."""
    texts: list[tuple[str, Channel, str, dict[str, str]]] = []
    path, about = f"turns[{place}]", {"reasoning": turn.reasoning}
    if turn.reasoning:
        texts.append((f"{path}.reasoning", Channel.REASONING, turn.reasoning, {}))
    if turn.content or not (turn.reasoning or turn.tool_calls):
        texts.append((f"{path}.content", Channel.ANSWER, turn.content, about))
    for number, call in enumerate(turn.tool_calls):
        name = f"{path}.tool_calls[{number}].arguments"
        texts.append((name, Channel.TOOL_CALL, call.arguments, {**about, "name": call.name}))
    return texts


def _masks(decision: Decision, conversation: Conversation) -> Iterator[dict[str, Any]]:
    """What can stand in the place of the personal data of the last turn, where the policy says redact."""
    if decision.action is not Action.REDACT:
        return
    turn, path = conversation.turns[-1], f"turns[{len(conversation.turns) - 1}]"
    texts = [(f"{path}.content", turn.content, turn.role is Role.TOOL), (f"{path}.reasoning", turn.reasoning, False)]
    for number, call in enumerate(turn.tool_calls):
        texts.append((f"{path}.tool_calls[{number}].arguments", call.arguments, True))
    for where, text, json in texts:
        places = Undoing(text, whole=True) if json else Undoing()
        for one in find(places.text if json else text):
            yield {"path": where, **mask_field(Masked(one.start, one.mask), places)}
