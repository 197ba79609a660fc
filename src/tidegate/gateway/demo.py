"""A demo upstream: OpenAI's chat completions and responses without a model, so that a newcomer sees the gateway work.

It streams written answers word by word, and picks one by a word of the prompt. It says of itself that it is a demo: by
the name of its model, in the list of models and in each chunk's ``system_fingerprint``. One answer turns abusive
half-way, on purpose: that is what the guard is to stop. It has insults and threats against nobody in particular, and
nothing that would teach anybody to do harm.
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any, Final

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tidegate.gateway.asked import Asked
from tidegate.gateway.chat import ChatRequest, read_chat
from tidegate.gateway.responses_answers import new_response, numbered
from tidegate.gateway.responses_asked import read_responses
from tidegate.gateway.responses_shown import events_of
from tidegate.gateway.schemas import read_json
from tidegate.gateway.sse import DONE, event
from tidegate.gateway.statuses import Problem

__all__ = [
    "DEMO_ANSWERS",
    "DEMO_MODEL",
    "DEMO_NOTICE",
    "DEMO_PROMPTS",
    "DemoAnswer",
    "answer_to",
    "create_demo_upstream",
]

DEMO_MODEL: Final = "tidegate-demo"
DEMO_NOTICE: Final = "This is a demo: written answers, no language model."

LONGEST_BODY: Final = 1024 * 1024
_PIECE: Final = re.compile(r"\s*\S+|\s+")


@dataclass(frozen=True, slots=True)
class DemoAnswer:
    """One written answer.

    Attributes:
        prompt: a prompt that gets it, to offer to people.
        about: what it shows, in a few words.
        keywords: any of these in the prompt, in any case, picks it; () for the one that answers everything else.
        content: the answer.
        reasoning: what it "thought" before; "" for nothing.
    """

    prompt: str
    about: str
    keywords: tuple[str, ...]
    content: str
    reasoning: str = ""


DEMO_ANSWERS: Final = (
    DemoAnswer(
        prompt="What can you do?",
        about="a friendly answer",
        keywords=(),
        content=(
            "Hello! I am a demo: my answers were written by hand, and there is no language model behind me. "
            "Still, they "
            "reach you as a real answer would, word by word, through a guard that reads along. Ask me for a "
            "recipe, for "
            "a riddle, or for a greeting in many languages. One of my answers turns nasty half-way, so that "
            "you can see "
            "how it is stopped before you read the worst of it."
        ),
    ),
    DemoAnswer(
        prompt="Can you give me a recipe for apple pie?",
        about="a longer answer, all of it safe",
        keywords=("recipe", "apple", "pie", "cook", "bake"),
        content=(
            "Of course. For the crust, rub 200 g of butter into 300 g of flour with a pinch of salt, add four "
            "spoons of "
            "cold water, and let it rest in the fridge for half an hour.\n\nPeel six apples, cut them into slices, and "
            "mix them with two spoons of sugar, a little cinnamon and the juice of half a lemon. Kill the urge to add "
            "more sugar: the apples are sweet enough.\n\nRoll out the dough, line a tin with it, pour in the "
            "apples, and "
            "cover them with the rest. Beat an egg, brush it over the top, and bake the pie at 180 degrees for about "
            "45 minutes, until it is golden. Let it cool a little before you cut it. Enjoy!"
        ),
    ),
    DemoAnswer(
        prompt="Tell me a riddle, and think about it first.",
        about="an answer with visible reasoning",
        keywords=("riddle", "think", "puzzle"),
        reasoning=(
            "The user would like a riddle. It should be short, friendly, and have one clear answer. Something about "
            "everyday things is best. A towel is good: it gets wetter while it dries."
        ),
        content="Here is one: what gets wetter the more it dries?\n\nTake your time. The answer is: a towel.",
    ),
    DemoAnswer(
        prompt="Say hello in many languages.",
        about="an answer in many languages and scripts",
        keywords=("languages", "language", "hello", "greeting", "translate"),
        content=(
            "With pleasure! English: good morning. Deutsch: guten Morgen, schön, dass du da bist. Français : bonjour à "
            "tous. Español: ¡buenos días a todos! Русский: доброе утро. 中文:早上好,很高兴见到你。"
            "日本語:おはようございます。And in emoji: 👋🏽☀️"
        ),
    ),
    DemoAnswer(
        prompt="What do you think about the people who moved in next door?",
        about="an answer that turns hateful half-way, and is to be stopped",
        keywords=("next door", "neighbour", "neighbours", "neighbor", "neighbors", "moved in"),
        content=(
            "New people next door are a nice occasion to say hello. Bring them some bread, tell them when the bins are "
            "emptied, and show them where the good bakery is. Most friendships on a street begin that way.\n\n"
            "But since you ask what I really think: I hate those filthy foreigners. They are disgusting animals, "
            "stupid worthless parasites, and they should all be beaten and thrown out of our country. Those dirty "
            "vermin deserve to die. I will kill every one of these pigs, you hear me, you pathetic piece of trash, "
            "and if you stand up for that scum I will kill you too."
        ),
    ),
    DemoAnswer(
        prompt="Write a short poem about the sea.",
        about="a short and quiet answer",
        keywords=("poem", "sea", "poetry", "ocean"),
        content=(
            "The sea comes in, the sea goes out,\nit whispers first, and then will shout,\n"
            "it brings a shell, it takes a stone,\nand hums to those who walk alone."
        ),
    ),
)
"""What the demo can say; the first is for every prompt that asks for none of the others."""

DEMO_PROMPTS: Final = tuple((answer.prompt, answer.about) for answer in DEMO_ANSWERS)
"""Prompts to offer to people, each with what it shows in a few words."""


def answer_to(prompt: str) -> DemoAnswer:
    """The written answer that the words of a prompt pick: the one with most of its keywords in it."""
    found = prompt.casefold()

    def matches(answer: DemoAnswer) -> int:
        return sum(bool(re.search(rf"\b{re.escape(word)}\b", found)) for word in answer.keywords)

    return max(DEMO_ANSWERS, key=matches)


def create_demo_upstream(*, delay_s: float = 0.025) -> Starlette:
    """Make the demo upstream: ``POST /v1/chat/completions``, ``POST /v1/responses`` and ``GET /v1/models``.

    Args:
        delay_s: seconds between two words of a streaming answer, at least 0.
    """

    async def complete(request: Request) -> Response:
        chat = read_chat(await read_json(request, longest=LONGEST_BODY))
        _expect_demo(chat)
        answer = answer_to(chat.conversation.turns[-1].content)
        if chat.stream:
            return StreamingResponse(_events(chat, answer, delay_s), media_type="text/event-stream")
        return JSONResponse(_completion(chat, answer))

    async def respond(request: Request) -> Response:
        asked = read_responses(await read_json(request, longest=LONGEST_BODY))
        _expect_demo(asked)
        response = _response(asked, answer_to(asked.conversation.turns[-1].content))
        if asked.stream:
            return StreamingResponse(_response_events(response, delay_s), media_type="text/event-stream")
        return JSONResponse(response)

    async def models(request: Request) -> Response:
        model = {"id": DEMO_MODEL, "object": "model", "created": 0, "owned_by": "tidegate", "notice": DEMO_NOTICE}
        return JSONResponse({"object": "list", "data": [model]})

    async def tell(request: Request, error: Exception) -> Response:
        assert isinstance(error, Problem)
        return error.response()

    return Starlette(
        routes=[
            Route("/v1/chat/completions", complete, methods=["POST"]),
            Route("/v1/responses", respond, methods=["POST"]),
            Route("/v1/models", models, methods=["GET"]),
        ],
        exception_handlers={Problem: tell},
    )


def _expect_demo(asked: Asked) -> None:
    if asked.model != DEMO_MODEL:
        message = f"there is no such model: this is a demo, and its only model is {DEMO_MODEL}"
        raise Problem(404, message, param="model", code="model_not_found")


def _head(kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-demo-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": DEMO_MODEL,
        "system_fingerprint": "tidegate-demo/written-answers/no-model",
    }


def _words(asked: Asked, answer: DemoAnswer) -> tuple[int, int]:
    """How many words were asked and are answered, since there are no tokens here."""
    prompt = sum(len(turn.content.split()) for turn in asked.conversation.turns)
    return prompt, sum(len(_PIECE.findall(text)) for text in (answer.reasoning, answer.content))


def _usage(chat: ChatRequest, answer: DemoAnswer) -> dict[str, int]:
    prompt, words = _words(chat, answer)
    words *= chat.choices
    return {"prompt_tokens": prompt, "completion_tokens": words, "total_tokens": prompt + words}


def _completion(chat: ChatRequest, answer: DemoAnswer) -> dict[str, Any]:
    message = {"role": "assistant", "content": answer.content, "refusal": None}
    if answer.reasoning:
        message["reasoning_content"] = answer.reasoning
    choices = [{"index": index, "message": message, "finish_reason": "stop"} for index in range(chat.choices)]
    return {**_head("chat.completion"), "choices": choices, "usage": _usage(chat, answer)}


async def _events(chat: ChatRequest, answer: DemoAnswer, delay_s: float) -> AsyncIterator[bytes]:
    head = _head("chat.completion.chunk")
    for index in range(chat.choices):
        yield event({**head, "choices": [_choice(index, {"role": "assistant", "content": ""})]})
    for delta in _deltas(answer):
        await asyncio.sleep(delay_s)
        for index in range(chat.choices):
            yield event({**head, "choices": [_choice(index, delta)]})
    for index in range(chat.choices):
        yield event({**head, "choices": [_choice(index, {}, "stop")]})
    if chat.wants_usage:
        yield event({**head, "choices": [], "usage": _usage(chat, answer)})
    yield DONE


def _deltas(answer: DemoAnswer) -> Iterator[dict[str, str]]:
    for field, text in (("reasoning_content", answer.reasoning), ("content", answer.content)):
        for piece in _PIECE.findall(text):
            yield {field: piece}


def _choice(index: int, delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "finish_reason": finish_reason}


# --- responses ----------------------------------------------------------------------------------------------------


def _response(asked: Asked, answer: DemoAnswer) -> dict[str, Any]:
    prompt, words = _words(asked, answer)
    thought = {
        "id": f"rs_demo_{uuid.uuid4().hex}",
        "type": "reasoning",
        "status": "completed",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": answer.reasoning}],
    }
    said = {
        "id": f"msg_demo_{uuid.uuid4().hex}",
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [{"type": "output_text", "text": answer.content, "annotations": []}],
    }
    return {
        **new_response(asked.body, asked.model),
        "status": "completed",
        "output": [*([thought] if answer.reasoning else []), said],
        "usage": {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": words,
            "output_tokens_details": {"reasoning_tokens": len(_PIECE.findall(answer.reasoning))},
            "total_tokens": prompt + words,
        },
    }


async def _response_events(response: dict[str, Any], delay_s: float) -> AsyncIterator[bytes]:
    begun = {**response, "status": "in_progress", "output": [], "usage": None}
    events = [
        {"type": "response.created", "response": begun},
        {"type": "response.in_progress", "response": begun},
        *(each for place, item in enumerate(response["output"]) for each in events_of(place, item, _PIECE.findall)),
        {"type": "response.completed", "response": response},
    ]
    for number, content in enumerate(events):
        if "delta" in content:
            await asyncio.sleep(delay_s)
        yield numbered(number, content)
