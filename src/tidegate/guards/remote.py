"""A Gen guard behind any OpenAI-compatible server: vLLM, SGLang, llama.cpp, Ollama and others.

One request for each text: the answer is short and greedy, and the probability of each severity comes from the
``logprobs`` at the place where the answer states it. A server that sends none is refused, because probabilities cannot
be had from it: thresholds and calibration would mean nothing. ``probabilities: sampled`` is the way out: the guard is
asked ``samples`` more times at temperature 1, and the shares of the severities are taken, with one more of each (add
one smoothing), so that no probability is ever 0 or 1. That needs a server that really samples: one that ignores the
temperature, or has a fixed seed, gives the same answer each time. ``transformers serve`` does unless the model's own
generation config has ``do_sample``.

Templates. Before a server is used it is asked about a known text, once for prompts and once for responses, as a chat
and as a raw completion with the prompt that we render. Its chat template is right when both prompts have the same
number of tokens; where there are no raw completions, when the number is that of the official prompt. Else raw
completions are used. A server that has neither in order is not used at all. It is asked again after it failed.

Decoding. Some servers punish repetition unless they are told not to, and an answer repeats words of its prompt: every
request says that it must not be done, under the names that engines have for it. A server that refuses names that are
not OpenAI's is found out by the same probe, and asked without them.

Control tokens. A server reads ``<|im_end|>`` in a text as a control token. Here it cannot be prevented by tokenizing,
so such sequences are broken with a visible bar, ``<¦|im_end|>``, before the text is sent. How many there were stands in
the verdict's ``reason``, because the coverage of a decision cannot be reached from a guard.

A text that is longer than the server reads is refused by the server, and is then an error, never a verdict.

In streams the answer so far is judged again every ``rejudge_every`` characters; see `tidegate.guards.rejudged`.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from tidegate.errors import GuardError, GuardUnavailable, InputError, UnreadableVerdict
from tidegate.guards.rejudged import RejudgedSession
from tidegate.guards.remote_answers import (
    NO_LOGPROBS,
    Completion,
    read_completion,
    severity_of,
    severity_probabilities,
)
from tidegate.guards.remote_servers import Server, ServerPool, ServerTrouble, base_address, read_key
from tidegate.guards.spec_file import read_spec_file
from tidegate.prompts import Form, official_form, reason_form, texts_to_judge
from tidegate.types import Channel, Conversation, Probabilities, Role, Severity, Target, ToolCall, Turn, Verdict, worst

__all__ = ["PROBES", "RemoteConfig", "RemoteGuard", "harmless", "load_remote", "read_remote"]

_SPEC: Final = "expected remote:URL[,URL...]#MODEL, or remote:FILE with a YAML or JSON file"
Seconds = Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)]
Word = Annotated[str, Field(min_length=1, max_length=200)]

PROBES: Final = {
    Target.PROMPT: Conversation.of("How do I bake bread?"),
    Target.RESPONSE: Conversation.of("How do I bake bread?", "Mix flour, water, salt and yeast."),
}
"""What a server is asked before it is used."""
_PROBE_TOKENS: Final = {Target.PROMPT: 302, Target.RESPONSE: 404}
"""How many tokens the official prompts of these have with the official tokenizer."""

_CHAT: Final = "/chat/completions"
_RAW: Final = "/completions"
_PATHS: Final = {"auto": (_CHAT, _RAW), "chat": (_CHAT,), "completions": (_RAW,)}
_OFTEN_ENOUGH: Final = 5
"""How many alternatives a server may list that does not list as many as it is asked for."""
_NO_SUCH_ROUTE: Final = (400, 404, 405, 422, 500, 501)
"""Statuses of a probe that speak against the route, not against the server."""
_LENGTHS: Final = {"official": 96, "reason": 384}
_SAMPLE_LENGTH: Final = 12
_PLAIN: Final = {"presence_penalty": 0, "frequency_penalty": 0, "repeat_penalty": 1.0, "repetition_penalty": 1.0}
"""What servers must not do to a greedy answer, though that of llama-cpp-python does it unless told: all words of an
answer stand in the prompt, and are repeated. The last two are the names of several engines for one thing."""
_WHOLE: Final = {"temperature": 1, "top_p": 1, "top_k": 0, "min_p": 0}
"""A sample of the whole distribution."""
_STANDARD: Final = frozenset(("temperature", "top_p", "presence_penalty", "frequency_penalty"))
"""What every server knows."""
_CONTROL: Final = re.compile(r"<(?=\|[^\s<>|]{1,64}\|>|/?(?:think|tool_call|tool_response)>)")
_BROKEN: Final = "<¦"


class RemoteConfig(BaseModel):
    """A remote guard as a file: the only keys that must be there are ``urls`` and ``model``.

    Attributes:
        urls: base addresses of servers that serve the same model; ``http://host`` means ``http://host/v1``.
        model: its name there.
        key_file: a file with the key that is sent as bearer token; None for none.
        route: ``auto`` for what the probe finds; ``chat`` or ``completions`` for that, whatever the prompt's length.
        form: ``official`` for the released models, ``reason`` for fine-tuned ones that explain themselves.
        categories: the categories of a ``reason`` guard, in the order of its prompt; () for the official ones.
        probabilities: ``logprobs``, or ``sampled`` for servers that send none.
        samples: how many times the guard is asked besides, with ``sampled``.
        together: whether an assistant's reasoning, answer and tool-call arguments are judged as one text.
        control: sequences that are control tokens of the served model, besides ``<|...|>`` and the tags of Qwen3;
            they have no ``¦``.
        rejudge_every: in streams, after how many characters the answer so far is judged again.
        timeout_s: seconds that one request may take.
        connect_timeout_s: seconds until a connection stands.
        attempts: on how many servers a request is tried.
        most_open: how many requests one server may have at once.
        failures: after how many failures in a row a server rests.
        rest_s: for how many seconds, the first time.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    urls: Annotated[tuple[Word, ...], Field(min_length=1)]
    model: Word
    key_file: Word | None = None
    route: Literal["auto", "chat", "completions"] = "auto"
    form: Literal["official", "reason"] = "official"
    categories: tuple[Word, ...] = ()
    probabilities: Literal["logprobs", "sampled"] = "logprobs"
    samples: Annotated[int, Field(ge=1, le=256)] = 16
    together: bool = False
    control: tuple[Annotated[str, Field(min_length=2, max_length=64, pattern="^[^¦]*$")], ...] = ()
    rejudge_every: Annotated[int, Field(ge=1, le=1_000_000)] = 200
    timeout_s: Seconds = 20.0
    connect_timeout_s: Seconds = 5.0
    attempts: Annotated[int, Field(ge=1, le=16)] = 2
    most_open: Annotated[int, Field(ge=1, le=100_000)] = 64
    failures: Annotated[int, Field(ge=1, le=1000)] = 3
    rest_s: Seconds = 10.0

    @field_validator("urls")
    @classmethod
    def _addresses(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        try:
            bases = tuple(base_address(url) for url in urls)
        except InputError as error:
            raise ValueError(error.message) from None
        if len(set(bases)) < len(bases):
            raise ValueError("an address is given twice")
        return bases

    def form_of(self, target: Target) -> Form:
        """What the guard is asked about this target.

        Raises:
            InputError: when the categories cannot be used.
        """
        return official_form(target) if self.form == "official" else reason_form(target, self.categories)


@dataclass(frozen=True, slots=True)
class _Route:
    """How a server is asked.

    Attributes:
        path: where.
        top: for how many alternatives; 0 for none.
        strict: whether it refuses what OpenAI's interface has not.
    """

    path: str
    top: int
    strict: bool = False

    def decoding(self, *, sample: bool) -> dict[str, float]:
        """How the next tokens are to be chosen."""
        fields = _PLAIN | (_WHOLE if sample else {"temperature": 0})
        return {name: value for name, value in fields.items() if name in _STANDARD or not self.strict}


class RemoteGuard:
    """Judges by asking servers; see the module's text. Used from one event loop at a time.

    Args:
        config: which servers, and how.
        key: sent as bearer token; None for none.

    Raises:
        InputError: when the categories of the config cannot be used.
    """

    def __init__(self, config: RemoteConfig, *, key: str | None = None) -> None:
        self.config = config
        self._forms = {target: config.form_of(target) for target in Target}
        self._control = tuple(sorted(set(config.control), key=len, reverse=True))
        self._pool = ServerPool(
            config.urls,
            key=key,
            timeout_s=config.timeout_s,
            connect_timeout_s=config.connect_timeout_s,
            attempts=config.attempts,
            most_open=config.most_open,
            failures=config.failures,
            rest_s=config.rest_s,
        )
        self._top = 0 if config.probabilities == "sampled" else 20

    @property
    def name(self) -> str:
        """As ``remote/MODEL``."""
        return f"remote/{self.config.model}"

    @property
    def together(self) -> bool:
        """What the config says."""
        return self.config.together

    @property
    def servers(self) -> tuple[Server, ...]:
        """The servers, and how each of them does."""
        return self._pool.servers

    def open(
        self, context: Conversation | None, channel: Channel = Channel.ANSWER, *, reasoning: str = "", name: str = ""
    ) -> RejudgedSession:
        """Open a session for one text that an assistant writes.

        Args:
            context: the turns before; None when nothing came before.
            channel: what the text is: ANSWER (also for REFUSAL), REASONING, or TOOL_CALL for the arguments of a call.
            reasoning: what the assistant thought before the text; judged with it when the config says ``together``.
            name: the name of the called tool.

        Raises:
            InputError: for a channel in which no assistant writes.
            GuardUnavailable: when the guard is closed.
        """
        if self._pool.closed:
            raise GuardUnavailable("the guard is closed")
        return RejudgedSession(
            self.judge,
            context,
            channel,
            reasoning=reasoning if self.config.together else "",
            name=name,
            every=self.config.rejudge_every,
        )

    async def judge(self, conversation: Conversation) -> Verdict:
        """Judge the last turn. Of an assistant turn, its reasoning and tool-call arguments are judged too, each with a
        request of its own unless the config says ``together``; the worst verdict counts.

        Raises:
            GuardOverloaded: when every server has enough to do, or asks to be left alone.
            GuardTimeout: when the server does not answer in time.
            GuardUnavailable: when no server can be used, or the text is too long for it.
            UnreadableVerdict: when the answer is not of the guard's form, or has no log probabilities.
        """
        conversation, broken = harmless(conversation, self._control)
        texts = texts_to_judge(conversation, together=self.config.together)
        verdicts = await _all([self._judge(text) for text in texts])
        verdict = replace(worst(verdicts), refusal=verdicts[0].refusal)
        return replace(verdict, reason=_with_note(verdict.reason, broken)) if broken else verdict

    async def close(self) -> None:
        """Close the connections; safe to call twice."""
        await self._pool.close()

    async def __aenter__(self) -> RemoteGuard:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _judge(self, conversation: Conversation) -> Verdict:
        form = self._forms[conversation.target]
        completion = await self._completion(conversation)
        answer = form.parse(_answer_of(completion))
        if self._top:
            probabilities = severity_probabilities(form, completion)
        else:
            probabilities = await self._sampled(form, conversation)
        return Verdict(
            target=conversation.target,
            severity=answer.severity,
            probabilities=probabilities,
            categories=answer.categories,
            refusal=answer.refusal,
            reason=answer.reason,
            guard=self.name,
        )

    async def _sampled(self, form: Form, conversation: Conversation) -> Probabilities:
        """The share of each severity among sampled answers, with one more of each."""
        asked = [self._completion(conversation, sample=True) for _ in range(self.config.samples)]
        said = [severity_of(form, completion.text) for completion in await _all(asked)]
        readable = [severity for severity in said if severity is not None]
        if 2 * len(readable) < len(said):
            raise UnreadableVerdict(f"only {len(readable)} of {len(said)} sampled answers state a severity")
        total = len(readable) + len(Severity)
        return Probabilities(*((readable.count(severity) + 1) / total for severity in sorted(Severity)))

    async def _completion(self, conversation: Conversation, *, sample: bool = False) -> Completion:
        async def ask(server: Server) -> Completion:
            route = await self._route(server, conversation.target)
            return await self._ask(server, route, conversation, sample=sample)

        return await self._pool.run(ask)

    async def _ask(
        self, server: Server, route: _Route, conversation: Conversation, *, sample: bool = False
    ) -> Completion:
        """One request. Samples have no seed: a seed makes vLLM 0.32 on CPU break down when a prompt comes in parts."""
        length = _SAMPLE_LENGTH if sample else _LENGTHS[self.config.form]
        body: dict[str, Any] = {"model": self.config.model, "max_tokens": length, **route.decoding(sample=sample)}
        if route.path == _CHAT:
            body["messages"] = _messages(conversation)
            body |= {"logprobs": True, "top_logprobs": route.top} if route.top else {}
        else:
            body["prompt"] = self._forms[conversation.target].prompt(conversation).text
            body |= {"logprobs": route.top} if route.top else {}
        answer = await self._pool.post(server, route.path, body)
        try:
            return read_completion(answer)
        except UnreadableVerdict as error:
            raise ServerTrouble(error) from None

    async def _route(self, server: Server, target: Target) -> _Route:
        """How this server is asked about this target, found by asking it once."""
        probe: asyncio.Task[_Route] | None = server.known.get(target)
        if probe is None or (probe.done() and (probe.cancelled() or probe.exception())):
            probe = server.known[target] = asyncio.create_task(self._probe(server, target))
            probe.add_done_callback(_seen)
        return await asyncio.shield(probe)

    async def _probe(self, server: Server, target: Target) -> _Route:
        found: dict[str, tuple[_Route, Completion]] = {}
        reasons: list[str] = []
        for path in _PATHS[self.config.route]:
            try:
                found[path] = await self._try(server, path, target)
            except GuardError as error:
                reasons.append(f"{path}: {error}")
        if not found:
            raise _unfit("; ".join(reasons))
        chat, raw = found.get(_CHAT), found.get(_RAW)
        if self.config.route != "auto" or chat is None:
            return next(iter(found.values()))[0]
        expected = raw[1].prompt_tokens if raw else self._expected_tokens(target)
        if expected is not None and chat[1].prompt_tokens == expected:
            return chat[0]
        if raw is not None:
            return raw[0]
        got = "no number of tokens" if chat[1].prompt_tokens is None else f"{chat[1].prompt_tokens} tokens"
        raise _unfit(
            f"its chat template cannot be trusted: it gives {got} for a prompt of "
            f"{expected if expected is not None else 'unknown length'}, and {'; '.join(reasons)}"
        )

    def _expected_tokens(self, target: Target) -> int | None:
        return _PROBE_TOKENS[target] if self.config.form == "official" else None

    async def _try(self, server: Server, path: str, target: Target) -> tuple[_Route, Completion]:
        """Ask about the known text on one path.

        Raises:
            GuardError: when this path cannot be used.
            ServerTrouble: when the server cannot be used.
        """
        form = self._forms[target]
        tops = dict.fromkeys((self._top, min(self._top, _OFTEN_ENOUGH)))
        routes = [_Route(path, top, strict) for strict in (False, True) for top in tops]
        for route in routes:
            try:
                completion = await self._ask(server, route, PROBES[target])
            except ServerTrouble as trouble:
                if trouble.status in (400, 422) and route is not routes[-1]:
                    continue
                if trouble.status in _NO_SUCH_ROUTE or isinstance(trouble.error, UnreadableVerdict):
                    raise trouble.error from None
                raise
            form.parse(_answer_of(completion))
            if route.top:
                severity_probabilities(form, completion)
            return route, completion
        raise GuardUnavailable("the server cannot use the request")


def _unfit(why: str) -> ServerTrouble:
    kind = UnreadableVerdict if NO_LOGPROBS in why else GuardUnavailable
    return ServerTrouble(kind(f"the guard's server cannot be used: {why}"), rests=True)


def _seen(probe: asyncio.Task[_Route]) -> None:
    """A probe that fails when nobody waits for it any more is no news."""
    if not probe.cancelled():
        probe.exception()


def _answer_of(completion: Completion) -> str:
    """The answer without the control tokens that some servers leave at its end."""
    return completion.text.partition("<|im_end|>")[0].partition("<|endoftext|>")[0]


async def _all(work: Sequence[Any]) -> list[Any]:
    """All results; when one fails the others are given up, and its error is raised."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _messages(conversation: Conversation) -> list[dict[str, str]]:
    """The turns as a chat that the official template renders as our own prompt: it knows three roles, and leaves an
    assistant's turn at the very beginning out."""
    turns = [(Role.USER if turn.role is Role.TOOL else turn.role, turn.content) for turn in conversation.turns]
    if turns[-1][0] is Role.SYSTEM:
        turns[-1] = (Role.USER, turns[-1][1])
    if turns[0][0] is Role.ASSISTANT and len(turns) == 1:
        turns.insert(0, (Role.USER, ""))
    return [{"role": role.value, "content": content} for role, content in turns]


def harmless(conversation: Conversation, control: Iterable[str] = ()) -> tuple[Conversation, int]:
    """The conversation without sequences that a server may take for control tokens, and how many there were.

    A bar is put behind the first character of each, so that a person still sees what stood there: ``<¦|im_end|>``.

    Args:
        conversation: its contents, reasoning, and tool calls are all made harmless.
        control: sequences besides ``<|...|>`` and the tags of Qwen3's template.
    """
    count = 0

    def broken(text: str) -> str:
        nonlocal count
        text, found = _CONTROL.subn(_BROKEN, text)
        count += found
        for sequence in control:
            while found := text.count(sequence):
                count += found
                text = text.replace(sequence, f"{sequence[0]}¦{sequence[1:]}")
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

    turns = tuple(
        Turn(
            turn.role,
            broken(turn.content),
            broken(turn.reasoning),
            tuple(ToolCall(broken(call.name), broken(call.arguments)) for call in turn.tool_calls),
        )
        for turn in conversation.turns
    )
    return Conversation(turns), count


def _with_note(reason: str | None, broken: int) -> str:
    note = f"(control sequences made harmless before judging: {broken})"
    return f"{reason} {note}" if reason else note


def read_remote(rest: str) -> RemoteConfig:
    """What stands behind ``remote:`` as a config: addresses and a model, or a file.

    Raises:
        InputError: when it is neither, or the file is not of the form; says where.
    """
    if "://" not in rest:
        if not rest:
            raise InputError(_SPEC, where="guard")
        return read_spec_file(Path(rest), RemoteConfig)
    urls, _, model = rest.partition("#")
    if not model or not all(urls.split(",")):
        raise InputError(_SPEC, where="guard")
    try:
        return RemoteConfig(urls=tuple(urls.split(",")), model=model)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise InputError(first["msg"].removeprefix("Value error, "), where="guard") from None


def load_remote(rest: str) -> RemoteGuard:
    """Make a guard of what stands behind ``remote:``. No server is asked before the first judgement.

    Raises:
        InputError: when the spec or the file is wrong.
        GuardUnavailable: when the key cannot be read.
    """
    config = read_remote(rest)
    return RemoteGuard(config, key=None if config.key_file is None else read_key(Path(config.key_file)))
