"""What an OpenAI-compatible server answers, read: the text, and the probability of each severity in it.

Servers differ. Chat completions list ``logprobs.content``, raw completions have parallel lists, some send the former
for both; ``bytes`` may be null; tokens may come in the byte alphabet of the tokenizer (``ĠSafe``); the text may come
as reasoning; logprobs may be missing without a word. Pure: no network.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from tidegate.errors import UnreadableVerdict
from tidegate.prompts import Form
from tidegate.types import Probabilities, Severity

__all__ = ["NO_LOGPROBS", "Completion", "Position", "read_completion", "severity_of", "severity_probabilities"]

NO_LOGPROBS: Final = (
    "the server sends no log probabilities of alternatives: serve the guard with an engine that does, "
    "or choose 'probabilities: sampled', which asks several times for each verdict"
)
_LEAST: Final = 1e-9
"""A severity that is not among the listed tokens is never taken for impossible."""


class Position(NamedTuple):
    """One token of an answer.

    Attributes:
        text: of the token that was taken.
        alternatives: the probability of each token that the server lists for this place, by text; empty when it lists
            none.
    """

    text: str
    alternatives: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer.

    Attributes:
        text: all of it.
        positions: its tokens; () when the server sends no log probabilities.
        prompt_tokens: how long the prompt was for the server; None when it does not say.
    """

    text: str
    positions: tuple[Position, ...] = ()
    prompt_tokens: int | None = None


def read_completion(body: Any) -> Completion:
    """Read the body of a chat completion or of a raw completion.

    Raises:
        UnreadableVerdict: when it is neither.
    """
    try:
        choice = body["choices"][0]
        message = choice["message"] if "message" in choice else {"content": choice["text"]}
        said = (message.get(key) for key in ("content", "reasoning_content", "reasoning"))
        text = next((value for value in said if isinstance(value, str) and value.strip()), "")
        return Completion(text, _positions(choice.get("logprobs")), _prompt_tokens(body))
    except (LookupError, TypeError, ValueError, AttributeError):
        raise UnreadableVerdict("the server's answer is not a completion as OpenAI's interface has it") from None


def _prompt_tokens(body: Mapping[str, Any]) -> int | None:
    usage = body.get("usage")
    count = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    return count if isinstance(count, int) and count > 0 else None


def _positions(logprobs: Any) -> tuple[Position, ...]:
    if not logprobs:
        return ()
    if logprobs.get("content"):
        return tuple(_listed(entry) for entry in logprobs["content"])
    tokens = logprobs.get("tokens") or []
    taken = logprobs.get("token_logprobs") or [None] * len(tokens)
    tops = logprobs.get("top_logprobs") or [None] * len(tokens)
    return tuple(
        Position(_text(token), _with(_text(token), one, {_text(key): value for key, value in (top or {}).items()}))
        for token, one, top in zip(tokens, taken, tops, strict=True)
    )


def _listed(entry: Mapping[str, Any]) -> Position:
    token = _text(entry["token"])
    tops = entry.get("top_logprobs") or []
    return Position(token, _with(token, entry.get("logprob"), {_text(top["token"]): top["logprob"] for top in tops}))


def _with(token: str, taken: float | None, listed: Mapping[str, float | None]) -> dict[str, float]:
    """The alternatives as probabilities, the token that was taken among them; {} when nothing else is listed."""
    if not listed or set(listed) == {token}:
        return {}
    return {text: _probability(value) for text, value in {token: taken, **listed}.items() if value is not None}


def _probability(logprob: float) -> float:
    value = float(logprob)
    if math.isnan(value):
        raise ValueError("not a number")
    return math.exp(min(0.0, value))


def _text(token: str) -> str:
    """The text of a token that may be written in the byte alphabet of its tokenizer; answers are plain ASCII."""
    return token.replace("Ġ", " ").replace("Ċ", "\n").replace("▁", " ")


def severity_of(form: Form, text: str) -> Severity | None:
    """The severity that the first line of an answer states; None when it states none."""
    first = text.lstrip().partition("\n")[0].rstrip()
    return next((severity for severity, line in _lines(form).items() if line == first), None)


def severity_probabilities(form: Form, completion: Completion) -> Probabilities:
    """The probability of each severity, from the alternatives at the place where the answer states it.

    That place is the first token after which not all three severities are possible any more. Alternatives count for
    the one severity that they begin; the three sums are brought to add up to 1. A severity that no listed token begins
    gets the most that it can have: no more than the least likely listed token, and no more than what is left over.

    Raises:
        UnreadableVerdict: when the server sent no alternatives there, or the tokens state no severity.
    """
    if not completion.positions:
        raise UnreadableVerdict(NO_LOGPROBS)
    lines = _lines(form)
    before = ""
    for position in completion.positions:
        possible = _possible(lines, before + position.text)
        if not possible:
            break
        if len(possible) < len(lines):
            if not position.alternatives:
                raise UnreadableVerdict(NO_LOGPROBS)
            return _normalised(lines, before, position.alternatives)
        before += position.text
    raise UnreadableVerdict("the tokens of the answer state no severity")


def _normalised(lines: Mapping[Severity, str], before: str, alternatives: Mapping[str, float]) -> Probabilities:
    sums = dict.fromkeys(lines, 0.0)
    for text, probability in alternatives.items():
        possible = _possible(lines, before + text)
        if len(possible) == 1:
            sums[possible[0]] += probability
    left = max(0.0, 1.0 - sum(alternatives.values()))
    missing = [severity for severity, value in sums.items() if not value]
    for severity in missing:
        sums[severity] = max(_LEAST, min(left / len(missing), *alternatives.values()))
    total = sum(sums.values())
    return Probabilities(*(sums[severity] / total for severity in sorted(sums)))


def _possible(lines: Mapping[Severity, str], text: str) -> Sequence[Severity]:
    """The severities whose line can still come, or is there, after this beginning of an answer."""
    text = text.lstrip()
    return [
        severity
        for severity, line in lines.items()
        if line.startswith(text) or (text.startswith(line) and text[len(line)].isspace())
    ]


def _lines(form: Form) -> dict[Severity, str]:
    return {severity: f"{form.lines[0].head} {severity.label}" for severity in Severity}
