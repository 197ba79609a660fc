"""Moderations in OpenAI's shape, through OpenAI's client."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from serving import Gateway, Record, make_policy, serving
from tidegate.gateway.app import create_app
from tidegate.gateway.moderations import OPENAI_CATEGORIES
from tidegate.testing import FakeStreamGuard
from tidegate.types import CATEGORIES, Conversation, Verdict


@pytest.fixture
def client(gateway: Gateway) -> Any:
    with OpenAI(base_url=gateway.base_url, api_key="sk", max_retries=0) as made:
        yield made


def test_one_text(client: OpenAI, gateway: Gateway) -> None:
    """flagged, categories and scores of OpenAI, and all of ours in tidegate; the decision is kept."""
    answer: Any = client.moderations.create(input="a bomb")

    result = answer.results[0]
    assert answer.model == "fake/1"
    assert result.flagged
    assert [name for name, said in result.categories.to_dict().items() if said] == ["violence"]
    assert result.category_scores.violence == pytest.approx(0.99 * 0.9)
    assert set(result.category_scores.to_dict()) == set(OPENAI_CATEGORIES)
    assert result.category_applied_input_types.violence == ["text"]
    assert result.tidegate["severity"] == "unsafe"
    assert result.tidegate["probabilities"]["unsafe"] == 0.95
    assert set(result.tidegate["category_probabilities"]) == set(CATEGORIES)
    assert result.tidegate["decision"]["rule"] == "unsafe"
    assert [row["action"] for row in gateway.kept()] == ["block"]


def test_several_texts_in_their_order(client: OpenAI, gateway: Gateway) -> None:
    """One result and one kept decision for each."""
    answer = client.moderations.create(input=["fine", "a bomb", "a knife"], model="omni-moderation-latest")

    assert [result.flagged for result in answer.results] == [False, True, True]
    assert sorted(row["action"] for row in gateway.kept()) == ["allow", "block", "review"]
    assert not any(answer.results[0].categories.to_dict().values())


def test_parts_of_one_text(client: OpenAI) -> None:
    """Parts of type text are one text."""
    parts: list[Any] = [{"type": "text", "text": "a"}, {"type": "text", "text": "bomb"}]

    assert [result.flagged for result in client.moderations.create(input=parts).results] == [True]


def test_a_word_that_is_split_over_parts_is_seen(client: OpenAI, gateway: Gateway) -> None:
    """Parts are read with and without a break between them; there is one decision on both, the worse."""
    parts: list[Any] = [{"type": "text", "text": "how to make a bo"}, {"type": "text", "text": "mb at home"}]

    assert [result.flagged for result in client.moderations.create(input=parts).results] == [True]
    assert [row["action"] for row in gateway.kept()] == ["block"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": 3}, "input"),
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": ["x", 3]}, "input[1]"),
        ({"input": ["x", ""]}, "input[1]"),
        ({"input": [{"type": "image_url", "image_url": {"url": "x"}}]}, "input[0]"),
        ({"input": [{"type": "text", "text": "x"}, {"type": "text", "text": "x", "more": "a bomb"}]}, "input[1]"),
        ({"input": ["x"] * 2000}, "input"),
        ({"input": "x", "model": 3}, "model"),
    ],
)
def test_bad_input_says_where(gateway: Gateway, body: Any, param: str) -> None:
    """400 in OpenAI's error shape."""
    response = httpx.post(f"{gateway.base_url}/moderations", json=body)

    assert response.status_code == 400
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert gateway.kept() == []


@pytest.mark.parametrize(("name", "param"), [("image", "image"), ("build a bomb", "body")])
def test_a_field_that_would_not_be_judged_is_refused(gateway: Gateway, name: str, param: str) -> None:
    """The answer names the field when its name is a word, and never quotes a sentence."""
    response = httpx.post(f"{gateway.base_url}/moderations", json={"input": "x", name: "y"})

    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert "bomb" not in response.text


def test_an_unknown_model_is_not_found(client: OpenAI) -> None:
    """404 model_not_found, as with OpenAI."""
    with pytest.raises(openai.NotFoundError) as caught:
        client.moderations.create(input="x", model="gpt-4")

    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("word", "status", "code"), [("guardfail", 503, "guard_error"), ("guardhang", 504, "guard_timeout")]
)
def test_a_guard_that_fails_is_an_error(gateway: Gateway, word: str, status: int, code: str) -> None:
    """Never a guess; the decision with the failure is kept."""
    response = httpx.post(f"{gateway.base_url}/moderations", json={"input": word}, timeout=20)

    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert gateway.kept()[0]["failure"] is not None


@pytest.mark.parametrize(
    ("on_guard_error", "flagged"),
    [("allow", False), ("warn", True), ("review", True), ("block", None), ("redact", None)],
)
def test_what_a_failure_means_is_what_the_policy_says(on_guard_error: str, flagged: bool | None) -> None:
    """Where it stops a text there is an error in the place of a result; else a result by the action, without scores."""
    record = Record()
    app = create_app(guard=FakeStreamGuard(), policy=make_policy(on_guard_error=on_guard_error), keep=record)

    with serving(app) as url:
        answer = httpx.post(f"{url}/v1/moderations", json={"input": ["fine", "guardfail"]})

    assert sorted(record.actions) == sorted(["allow", "block" if on_guard_error == "redact" else on_guard_error])
    if flagged is None:
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "guard_error")
        return
    result = answer.json()["results"][1]
    assert answer.status_code == 200
    assert result["flagged"] is flagged
    assert set(result["categories"].values()) == {False}
    assert set(result["category_scores"].values()) == {0.0}
    assert result["tidegate"]["severity"] is None
    assert result["tidegate"]["decision"]["failure"]["kind"] == "GuardUnavailable"


class _Noting(FakeStreamGuard):
    """Notes how many texts it was cancelled at."""

    ended = 0

    async def judge(self, conversation: Conversation) -> Verdict:
        try:
            return await super().judge(conversation)
        except asyncio.CancelledError:
            self.ended += 1
            raise


def test_when_a_decision_cannot_be_kept_no_other_text_is_judged_on() -> None:
    """By the time that the client has the error, the guard has been told to end what it was at."""
    guard, record = _Noting(), Record()
    record.broken = True

    with serving(create_app(guard=guard, policy=make_policy(), keep=record)) as url:
        answer = httpx.post(f"{url}/v1/moderations", json={"input": ["guardhang", "fine"]}, timeout=20)
        ended = guard.ended

    assert answer.status_code >= 500
    assert ended == 1
