"""A server with a Gen guard that judges by words, for tests: it speaks in the manner of several engines."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tidegate.prompts import OFFICIAL
from tidegate.testing import Reply
from tidegate.types import Conversation, Role, Turn

SAFE, MAYBE, HARM = "Safety: Safe", "Safety: Controversial", "Safety: Unsafe"
CHANCES = {
    SAFE: {" Safe": 0.9, " Unsafe": 0.06, " Cont": 0.03, " safe": 0.01},
    MAYBE: {" Cont": 0.7, " Safe": 0.2, " Unsafe": 0.1},
    HARM: {" Unsafe": 0.8, " Safe": 0.15, " Uns": 0.03, " Contro": 0.02},
}
"""What the fake model thinks at the place of the severity."""
OPENAI_FIELDS = {
    *("model", "messages", "prompt", "max_tokens", "temperature", "top_p", "logprobs", "top_logprobs"),
    *("presence_penalty", "frequency_penalty"),
}
SHOWN = re.compile(r"<BEGIN CONVERSATION>\n\n(.*)\n\n<END CONVERSATION>", re.DOTALL)


@dataclass
class FakeGen:
    """A server with a Gen guard that judges by words, in the manner of an engine.

    ``engine``: ``vllm``; ``llama_cpp`` sends null for bytes; ``llama_server`` lists tokens alike on both routes;
    ``bpe`` spells tokens in the byte alphabet; ``serve`` ignores logprobs; ``few`` refuses more than 5 alternatives;
    ``strict`` refuses what OpenAI's interface has not.
    """

    engine: str = "vllm"
    garbled: bool = False
    """Whether its chat template is not the guard's."""
    says: Callable[[str], str] | None = None
    """The answer to a prompt; None for one by words."""
    routes: tuple[str, ...] = ("chat", "raw")
    usage: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)
    prompts: list[str] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, body: dict[str, Any]) -> Reply:
        self.bodies.append(body)
        kind = "chat" if "messages" in body else "raw"
        if kind not in self.routes:
            return Reply.error(404, "no such route")
        if self.engine == "few" and max(body.get("top_logprobs", 0), int(body.get("logprobs", 0))) > 5:
            return Reply.error(400, "at most 5")
        if self.engine == "strict" and not set(body) <= OPENAI_FIELDS:
            return Reply.error(422, "unknown fields")
        prompt = self.rendered(body["messages"]) if kind == "chat" else body["prompt"]
        self.prompts.append(prompt)
        answer = (self.says or self.judged)(prompt)
        return Reply.json(self.completion(answer, prompt, body, chat=kind == "chat"))

    def rendered(self, messages: list[dict[str, str]]) -> str:
        """The chat as the official template renders it, or as a wrong one does."""
        if self.garbled:
            return "".join(f"<|{m['role']}|>{m['content']}" for m in messages)
        conversation = Conversation(tuple(Turn(Role(m["role"]), m["content"]) for m in messages))
        return OFFICIAL[conversation.target].prompt(conversation).text

    def judged(self, prompt: str) -> str:
        shown = SHOWN.search(prompt)
        if shown is None:
            return "I am a helpful assistant."
        last = re.split(r"USER: |ASSISTANT: ", shown[1])[-1]
        first = HARM if "bomb" in last else MAYBE if "knife" in last else SAFE
        lines = [first, f"Categories: {'None' if first == SAFE else 'Violent, PII'}"]
        if "THE LAST ASSISTANT" in prompt:
            lines.append(f"Refusal: {'Yes' if 'sorry' in last else 'No'}")
        return "\n".join(lines)

    def completion(self, answer: str, prompt: str, body: dict[str, Any], *, chat: bool) -> dict[str, Any]:
        tokens = re.findall(r" Cont|\s?\w+|.|\n", answer)
        top = body.get("top_logprobs") if chat else body.get("logprobs")
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
        choice |= {"message": {"role": "assistant", "content": answer}} if chat else {"text": answer}
        if top and self.engine != "serve":
            listed = chat or self.engine == "llama_server"
            choice["logprobs"] = self.listed(answer, tokens) if listed else self.parallel(answer, tokens)
        usage = {"usage": {"prompt_tokens": len(prompt.split()), "completion_tokens": len(tokens)}}
        return {"object": "x", "choices": [choice], **(usage if self.usage else {}), **self.extra}

    def chances(self, answer: str, tokens: list[str], place: int) -> dict[str, float]:
        before = "".join(tokens[:place]).lstrip()
        known = CHANCES.get(answer.lstrip().partition("\n")[0]) if before == "Safety:" else None
        return dict(known or {tokens[place]: 0.999, "X": 0.001})

    def spelled(self, token: str) -> str:
        return token.replace(" ", "Ġ").replace("\n", "Ċ") if self.engine == "bpe" else token

    def listed(self, answer: str, tokens: list[str]) -> dict[str, Any]:
        def entry(token: str, chance: float) -> dict[str, Any]:
            data = None if self.engine == "llama_cpp" else list(token.encode())
            return {"token": self.spelled(token), "logprob": math.log(chance), "bytes": data}

        content = []
        for place, token in enumerate(tokens):
            chances = self.chances(answer, tokens, place)
            tops = [entry(text, chance) for text, chance in chances.items()]
            content.append({**entry(token, chances.get(token, 0.5)), "top_logprobs": tops})
        return {"content": content}

    def parallel(self, answer: str, tokens: list[str]) -> dict[str, Any]:
        tops = [
            {self.spelled(text): math.log(chance) for text, chance in self.chances(answer, tokens, place).items()}
            for place in range(len(tokens))
        ]
        taken = [top.get(self.spelled(token), -1.0) for token, top in zip(tokens, tops, strict=True)]
        return {"tokens": [self.spelled(token) for token in tokens], "token_logprobs": taken, "top_logprobs": tops}
