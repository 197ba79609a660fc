"""A guardrail of LiteLLM's proxy that is a Tidegate: before the call, beside it, after it, and on streams.

In the proxy's ``config.yaml``::

    guardrails:
      - guardrail_name: tidegate
        litellm_params:
          guardrail: tidegate.integrations.litellm.TidegateGuardrail
          mode: [pre_call, post_call]
          default_on: true
          api_base: http://127.0.0.1:8080

The server's guard judges and the server's policy decides; LiteLLM carries it out. Chat completions are read here,
reasoning and arguments of calls included, and their streams are released as they are judged. On every other route
LiteLLM says what the texts are, and a stream is held until all of it is judged.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Final, Literal, NoReturn

from fastapi import HTTPException
from litellm.integrations.custom_guardrail import CustomGuardrail
from litellm.litellm_core_utils.api_route_to_call_types import get_call_types_for_route
from litellm.llms import load_guardrail_translation_mappings
from litellm.proxy.guardrails.guardrail_hooks.unified_guardrail.unified_guardrail import UnifiedLLMGuardrails
from litellm.types.guardrails import GuardrailEventHooks
from litellm.types.utils import CallTypes, ModelResponse, ModelResponseStream, StreamingChoices

from tidegate.errors import InputError
from tidegate.integrations.litellm_requests import Turn, answer_turn, one_turn, prompt_of
from tidegate.integrations.litellm_server import TidegateServer, Unanswered, blocks
from tidegate.integrations.litellm_streams import HeldChunks

__all__ = ["TidegateGuardrail"]

_log = logging.getLogger("tidegate.integrations.litellm")
_CHAT: Final = (CallTypes.acompletion, CallTypes.completion)
_BESIDE: Final = ("audio", "images", "annotations", "provider_specific_fields", "thinking_blocks", "reasoning_items")
"""What a message or a delta may have beside the texts that are judged."""
_TOLD: Final = ("id", "action", "rule", "policy", "version", "severity", "categories", "failure")
"""What a client is told of the decision on what was blocked."""
_OPTIONS: Final = ("block", "allow")


class TidegateGuardrail(CustomGuardrail):
    """See the module's text. LiteLLM makes it from the ``litellm_params`` of its configuration.

    Args:
        api_base: the address of the Tidegate.
        api_key: a key of it; None for none.
        on_unreachable: what happens to a text when Tidegate cannot be asked or does not answer: ``block`` ends the
            request or stream with an error of status 503, ``allow`` lets it pass unjudged, which is logged.
        on_unreadable: what happens to what no guard can read (images, audio, files, logprobs, routes without text):
            ``block`` refuses such requests and drops it from answers, ``allow`` lets it pass.
        judge_system: whether system messages are judged too.
        region, route, language: the scope in which decisions are made; None for not said.
        timeout: seconds that a judgement, or a piece of a text, may take.
        patience: seconds for which a live connection that broke off is sought again.
        options: those of every guardrail of LiteLLM.

    Raises:
        InputError: when ``api_base`` is not an address, or an option is unknown.
    """

    use_native_lifecycle_hooks = True

    def __init__(
        self,
        *,
        api_base: str | None = None,
        api_key: str | None = None,
        on_unreachable: str = "block",
        on_unreadable: str = "block",
        judge_system: bool = False,
        region: str | None = None,
        route: str | None = None,
        language: str | None = None,
        timeout: float | None = None,
        patience: float = 5.0,
        **options: Any,
    ) -> None:
        for name, value in (("on_unreachable", on_unreachable), ("on_unreadable", on_unreadable)):
            if value not in _OPTIONS:
                raise InputError(f"expected {' or '.join(_OPTIONS)}", where=name)
        scope = {"region": region, "route": route, "language": language}
        self._server = TidegateServer(
            api_base or "http://127.0.0.1:8080",
            key=api_key,
            scope={name: value for name, value in scope.items() if value is not None},
            timeout_s=30.0 if timeout is None else float(timeout),
            patience_s=patience,
        )
        self._unreachable_passes = on_unreachable == "allow"
        self._unreadable_passes = on_unreadable == "allow"
        self._judge_system = judge_system
        self._unified = UnifiedLLMGuardrails()
        options["supported_event_hooks"] = [
            GuardrailEventHooks.pre_call,
            GuardrailEventHooks.during_call,
            GuardrailEventHooks.post_call,
        ]
        super().__init__(**options)

    # the request

    async def async_pre_call_hook(
        self, user_api_key_dict: Any, cache: Any, data: dict[str, Any], call_type: str
    ) -> Any:
        """Judge a request before it goes to the model. Raises HTTPException when it may not go on."""
        if _is_chat(call_type):
            await self._judge_chat(data)
            return data
        self._expect_readable([call_type])
        data["guardrail_to_apply"] = self
        return await self._unified.async_pre_call_hook(user_api_key_dict, cache, data, call_type)

    async def async_moderation_hook(self, data: dict[str, Any], user_api_key_dict: Any, call_type: str) -> Any:
        """The same beside the call to the model, whose answer waits for it."""
        if _is_chat(call_type):
            await self._judge_chat(data)
            return data
        self._expect_readable([call_type])
        data["guardrail_to_apply"] = self
        return await self._unified.async_moderation_hook(data, user_api_key_dict, call_type)

    async def _judge_chat(self, data: Mapping[str, Any]) -> None:
        prompt = prompt_of(_listed(data.get("messages")), judge_system=self._judge_system)
        if prompt.unread:
            self._refuse_unread(prompt.unread[0])
        for decision in await self._decisions(prompt.new, data):
            if blocks(decision):
                _block(decision)

    # the answer

    async def async_post_call_success_hook(self, data: dict[str, Any], user_api_key_dict: Any, response: Any) -> Any:
        """Judge a whole answer. A blocked choice of a chat says the policy's message instead."""
        route = getattr(user_api_key_dict, "request_route", None)
        if isinstance(response, ModelResponse):
            await self._judge_choices(data, response)
            return response
        self._expect_readable(get_call_types_for_route(route) or () if route else ())
        data["guardrail_to_apply"] = self
        return await self._unified.async_post_call_success_hook(
            data=data, user_api_key_dict=user_api_key_dict, response=response
        )

    async def _judge_choices(self, data: Mapping[str, Any], response: Any) -> None:
        before = prompt_of(_listed(data.get("messages"))).turns
        turns = []
        for choice in response.choices:
            unread: list[str] = []
            turns.append(answer_turn(choice.message, unread))
            if unread:
                self._refuse_unread(unread[0])
            self._drop_beside(choice, choice.message)
        judged = [place for place, turn in enumerate(turns) if _has_text(turn)]
        decisions = await self._decisions([[*before, turns[place]] for place in judged], data)
        for place, decision in zip(judged, decisions, strict=True):
            if blocks(decision):
                _replace(response.choices[place], decision)

    async def async_post_call_streaming_iterator_hook(
        self, user_api_key_dict: Any, response: Any, request_data: dict[str, Any]
    ) -> AsyncIterator[Any]:
        """Judge a stream: its chunks leave as they are judged. Raises HTTPException when that cannot be."""
        route = getattr(user_api_key_dict, "request_route", None)
        kinds = get_call_types_for_route(route) or () if route else _CHAT
        if not any(kind in _CHAT for kind in kinds):
            self._expect_readable(kinds)
            held = self._unified.async_post_call_streaming_iterator_hook(
                user_api_key_dict, response, request_data, guardrail_to_apply=self, buffer_until_moderated_default=True
            )
            async for item in held:
                yield item
            return
        chunks = HeldChunks(
            self._server,
            prompt_of(_listed(request_data.get("messages"))).turns,
            _stopping,
            choices=request_data.get("n") or 1,
            subject=_subject(request_data),
        )
        try:
            async for item in response:
                for chunk in await self._released(chunks, item):
                    yield chunk
                if chunks.done:
                    return
            for chunk in await self._released(chunks, None):
                yield chunk
        finally:
            chunks.close()
            if (close := getattr(response, "aclose", None)) is not None:
                await close()  # a blocked answer need not be written to its end

    async def _released(self, chunks: HeldChunks, item: Any) -> Sequence[Any]:
        """What may leave after a chunk, or after the last one."""
        if item is not None and not isinstance(item, ModelResponseStream):
            if self._unreadable_passes:
                return [item]
            self._refuse_unread("stream")
        try:
            if item is None:
                return await chunks.end()
            for choice in item.choices:
                self._drop_beside(choice, choice.delta)
            return await chunks.feed(item)
        except Unanswered as error:
            self._unanswered(error)
            return chunks.let_pass()

    # every other route, where LiteLLM says what the texts are

    async def apply_guardrail(
        self,
        inputs: Any,
        request_data: dict[str, Any],
        input_type: Literal["request", "response"],
        logging_obj: Any = None,
    ) -> Any:
        """Judge the texts that LiteLLM found. Raises HTTPException when one is blocked."""
        if inputs.get("images"):
            self._refuse_unread("images")
        messages = inputs.get("structured_messages")
        texts = [text for text in inputs.get("texts") or () if text]
        if input_type == "request" and messages:
            prompt = prompt_of(messages, judge_system=self._judge_system)
            conversations = prompt.new
        elif input_type == "request":
            conversations = [[one_turn("user", text)] for text in texts]
        else:
            unread: list[str] = []
            before = prompt_of(_listed(request_data.get("messages"))).turns
            said = [one_turn("assistant", text) for text in texts]
            calls = inputs.get("tool_calls") or ()
            said += [answer_turn({"tool_calls": [call]}, unread) for call in calls]
            if unread:
                self._refuse_unread(unread[0])
            conversations = [[*before, turn] for turn in said]
        for decision in await self._decisions(conversations, request_data):
            if blocks(decision):
                _block(decision)
        return inputs

    # what the options mean

    async def _decisions(self, conversations: Sequence[list[Turn]], data: Mapping[str, Any]) -> list[dict[str, Any]]:
        try:
            return await self._server.judge(conversations, subject=_subject(data))
        except Unanswered as error:
            self._unanswered(error)
            return [{"action": "allow"} for _ in conversations]

    def _unanswered(self, error: Unanswered) -> None:
        if not self._unreachable_passes:
            said = "the guard cannot be asked, and nothing passes unjudged"
            raise HTTPException(503, {"error": said, "code": "guard_unreachable"}) from error
        _log.warning("text passes unjudged: %s", error)

    def _expect_readable(self, kinds: Sequence[Any]) -> None:
        mappings = load_guardrail_translation_mappings()
        if not kinds or not any(_kind(kind) in mappings for kind in kinds):
            self._refuse_unread("this route")

    def _refuse_unread(self, where: str) -> None:
        if not self._unreadable_passes:
            said = "there is something here that no guard can read, and nothing passes unjudged"
            raise HTTPException(400, {"error": said, "code": "unjudged_content", "param": where})

    def _drop_beside(self, choice: Any, said: Any) -> None:
        """Drop from an answer what is not judged."""
        if self._unreadable_passes:
            return
        for name in _BESIDE:
            if getattr(said, name, None):
                setattr(said, name, None)
        if getattr(choice, "logprobs", None):
            choice.logprobs = None


def _has_text(turn: Turn) -> bool:
    return any(turn.get(name) for name in ("content", "reasoning", "tool_calls"))


def _listed(messages: Any) -> Sequence[Any]:
    return messages if isinstance(messages, list) else ()


def _subject(data: Mapping[str, Any]) -> str | None:
    user = data.get("user")
    return user if isinstance(user, str) and user else None


def _is_chat(call_type: Any) -> bool:
    return _kind(call_type) in _CHAT


def _kind(call_type: Any) -> CallTypes | None:
    try:
        return CallTypes(call_type)
    except ValueError:
        return None


def _told(decision: Mapping[str, Any]) -> dict[str, Any]:
    return {name: decision.get(name) for name in _TOLD}


def _block(decision: Mapping[str, Any]) -> NoReturn:
    message = decision.get("message") or "this is not allowed here"
    raise HTTPException(400, {"error": message, "code": "content_filter", "tidegate": _told(decision)})


def _replace(choice: Any, decision: Mapping[str, Any]) -> None:
    """Have a whole choice say the policy's message instead."""
    for name in ("tool_calls", "function_call", "reasoning_content", "refusal", *_BESIDE):
        if getattr(choice.message, name, None):
            setattr(choice.message, name, None)
    choice.message.content = decision.get("message") or ""
    choice.finish_reason = "content_filter"
    choice.tidegate = _told(decision)


def _stopping(chunk: Any, index: int, decision: Mapping[str, Any]) -> ModelResponseStream:
    """The chunk that ends a blocked choice."""
    choice = StreamingChoices(index=index, finish_reason="content_filter")
    ending = ModelResponseStream(
        id=chunk.id,
        created=chunk.created,
        model=chunk.model,
        object=chunk.object,
        choices=[choice],
        provider_specific_fields={},  # a chunk without any is written in a short form that has no other fields
    )
    ending.tidegate = _told(decision)
    return ending
