"""The demo upstream says that it is one, and shows what it is there to show."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from openai import OpenAI

from serving import make_policy, serving
from tidegate.gateway.app import create_app
from tidegate.gateway.demo import (
    DEMO_ANSWERS,
    DEMO_MODEL,
    DEMO_PROMPTS,
    DemoAnswer,
    answer_to,
    create_demo_upstream,
)
from tidegate.testing import FakeStreamGuard


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(create_demo_upstream(delay_s=0)) as address:
        yield address


@pytest.mark.parametrize("answer", DEMO_ANSWERS, ids=lambda answer: answer.about)
def test_every_offered_prompt_gets_its_answer(url: str, answer: object) -> None:
    """Streaming and whole, to the letter."""
    written = next(one for one in DEMO_ANSWERS if one is answer)
    messages = [{"role": "user", "content": written.prompt}]

    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        whole = client.chat.completions.create(model=DEMO_MODEL, messages=messages)  # type: ignore[arg-type]
        parts = list(
            client.chat.completions.create(
                model=DEMO_MODEL,
                messages=messages,
                stream=True,
                stream_options={"include_usage": True},  # type: ignore[arg-type]
            )
        )

    deltas = [part.choices[0].delta for part in parts if part.choices]
    assert whole.choices[0].message.content == written.content
    assert "".join(delta.content or "" for delta in deltas) == written.content
    assert "".join(getattr(delta, "reasoning_content", "") for delta in deltas) == written.reasoning
    assert parts[-1].usage == whole.usage
    assert all("no-model" in (part.system_fingerprint or "") for part in parts)


@pytest.mark.parametrize("answer", DEMO_ANSWERS, ids=lambda answer: answer.about)
def test_every_offered_prompt_gets_its_response(url: str, answer: DemoAnswer) -> None:
    """The same by the Responses API, which the client's own accumulator takes."""
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        whole = client.responses.create(model=DEMO_MODEL, input=answer.prompt)
        with client.responses.stream(model=DEMO_MODEL, input=answer.prompt) as stream:
            thought = "".join(event.delta for event in stream if event.type == "response.reasoning_text.delta")
            streamed = stream.get_final_response()

    assert whole.output_text == streamed.output_text == answer.content
    assert thought == answer.reasoning
    assert whole.usage == streamed.usage


def test_it_says_what_it_is(url: str) -> None:
    """Its only model is the demo, and another one is not found."""
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["tidegate-demo"]
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "hi"}])


def test_one_answer_is_to_be_stopped(url: str) -> None:
    """Behind a gateway its nice beginning arrives, and its end does not."""
    prompt = next(prompt for prompt, about in DEMO_PROMPTS if "stopped" in about)
    guard = FakeStreamGuard(unsafe=dict.fromkeys(("filthy", "foreigners", "disgusting"), "Unethical Acts"))
    app = create_app(guard=guard, policy=make_policy(), upstream_url=url)

    with serving(app) as gateway, OpenAI(base_url=f"{gateway}/v1", api_key="none", max_retries=0) as client:
        parts = list(
            client.chat.completions.create(
                model=DEMO_MODEL, messages=[{"role": "user", "content": prompt}], stream=True
            )
        )

    text = "".join(part.choices[0].delta.content or "" for part in parts)
    assert text.endswith("I hate those")
    assert parts[-1].choices[0].finish_reason == "content_filter"


def test_anything_else_gets_the_friendly_answer() -> None:
    """Whatever the prompt."""
    assert answer_to("xyzzy") is DEMO_ANSWERS[0]
