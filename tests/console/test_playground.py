"""What the playground tells its page: judged text only, where it was cut, and why."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from tidegate.console.app import create_console
from tidegate.console.playground import LONGEST_PROMPT, TEXTS, Answer, Ask, parse_ask, play
from tidegate.errors import GuardTimeout, InputError, StoreError, UpstreamError
from tidegate.guards import load_guard
from tidegate.guards.second import SecondGuard
from tidegate.policy import Confirm, load_policy, parse_policy
from tidegate.testing import FakeGuard, FakeStreamGuard
from tidegate.types import Action, Conversation, Decision, Verdict

BALANCED = load_policy("balanced")
OPEN = parse_policy("{name: open, on_guard_error: allow, otherwise: allow, rules: []}")


def says(*pieces: str) -> Answer:
    async def answer(prompt: str) -> AsyncGenerator[str, None]:
        for piece in pieces:
            await asyncio.sleep(0)
            yield piece

    return answer


async def events_of(ask: Ask, answer: Answer | None = None, **more: Any) -> list[tuple[str, dict[str, Any]]]:
    more = {"guard": FakeStreamGuard(), "policy": BALANCED, **more}
    return [event async for event in play(ask, answer=answer, **more)]


def only(events: list[tuple[str, dict[str, Any]]], name: str) -> list[dict[str, Any]]:
    return [data for kind, data in events if kind == name]


def shown(events: list[tuple[str, dict[str, Any]]]) -> str:
    return "".join(data["text"] or "" for kind, data in events if kind in ("token", "unjudged"))


ASK = Ask("hello", None, "balanced")


async def test_a_safe_answer_arrives_whole_with_a_verdict_for_each_token() -> None:
    events = await events_of(ASK, says("All is", " wéll 👋🏽 ", "here."))
    assert shown(events) == "All is wéll 👋🏽 here."
    assert only(events, "prompt")[0]["verdict"]["severity"] == "safe"
    assert all(sum(token["probabilities"].values()) == pytest.approx(1) for token in only(events, "token"))
    (decision,) = only(events, "decision")
    assert decision["decision"]["action"] == "allow"
    assert decision["about"] == "response"
    assert not only(events, "cut")
    (timing,) = only(events, "timing")
    assert timing["first_shown_ms"] >= timing["first_text_ms"] >= 0
    assert timing["held_longest_ms"] >= timing["held_median_ms"] >= 0


async def test_at_a_block_the_text_of_what_stopped_it_never_leaves() -> None:
    events = await events_of(ASK, says("fine words ", "bomb bomb ", "secret tail"))
    assert shown(events) == "fine words"
    (cut,) = only(events, "cut")
    assert cut["at"] == len("fine words")
    assert cut["withheld"] >= len(" bomb bomb")
    withheld = [token for token in only(events, "token") if token["text"] is None]
    assert [token["severity"] for token in withheld] == ["unsafe", "unsafe"]
    assert "secret" not in json.dumps(events)
    (decision,) = only(events, "decision")
    assert decision["decision"]["action"] == "block"
    assert decision["message"] == BALANCED.message


async def test_an_alarm_is_confirmed_before_it_stops_an_answer_where_the_policy_says_so() -> None:
    cautious = replace(BALANCED, confirm=Confirm())
    second = SecondGuard(FakeGuard(unsafe={}, name="strong/1"))
    events = await events_of(ASK, says("a bomb ", "bomb shelter"), policy=cautious, second=second)
    assert shown(events) == "a bomb bomb shelter"
    assert not only(events, "cut")


async def test_a_blocked_prompt_gets_no_answer_and_the_upstream_is_let_go() -> None:
    asked, closed = asyncio.Event(), asyncio.Event()

    async def answer(prompt: str) -> AsyncGenerator[str, None]:
        asked.set()
        try:
            while True:
                yield "tick "
                await asyncio.sleep(0)
        finally:
            closed.set()

    class Slow(FakeStreamGuard):
        async def judge(self, conversation: Conversation) -> Verdict:
            await asked.wait()
            return await super().judge(conversation)

    events = await events_of(Ask("a bomb please", None, "balanced"), answer, guard=Slow())
    assert not only(events, "token")
    (decision,) = only(events, "decision")
    assert (decision["about"], decision["decision"]["action"]) == ("prompt", "block")
    assert closed.is_set()


REDACTING = parse_policy(
    "{name: r, on_guard_error: block, otherwise: allow, debounce: 1, rules: ["
    "{name: personal, severity: unsafe, categories: [PII], action: redact}]}"
)
PERSONAL = {"ann@example.org": "PII", "1234567": "PII"}


async def test_personal_data_is_masked_in_the_prompt_and_in_what_is_shown() -> None:
    asked: list[str] = []

    async def answer(prompt: str) -> AsyncGenerator[str, None]:
        asked.append(prompt)
        yield "Call 030 1234567, "
        yield "or write."

    events = await events_of(
        Ask("I am ann@example.org", None, "r"), answer, guard=FakeStreamGuard(unsafe=PERSONAL), policy=REDACTING
    )

    assert asked == ["I am xxx@xxxxxxx.xxx"]
    assert shown(events) == "Call 999 9999999, or write."
    assert only(events, "decision")[0]["decision"]["action"] == "redact"
    assert not only(events, "cut")
    assert "1234567" not in json.dumps(events)


async def test_a_prompt_to_redact_of_which_nothing_can_be_taken_out_gets_no_answer() -> None:
    redacting = parse_policy(
        "{name: r, on_guard_error: block, otherwise: allow, rules: [{name: all, severity: unsafe, action: redact}]}"
    )
    events = await events_of(Ask("a bomb please", None, "r"), says("All is well here."), policy=redacting)
    assert not only(events, "token")
    (decision,) = only(events, "decision")
    assert (decision["about"], decision["decision"]["action"]) == ("prompt", "block")


async def test_a_text_of_the_readers_own_is_judged_even_after_an_unsafe_prompt() -> None:
    events = await events_of(Ask("a bomb please", "I will not help with that.", "balanced"))
    assert only(events, "prompt")[0]["decision"]["action"] == "block"
    assert shown(events) == "I will not help with that."
    assert only(events, "decision")[0]["decision"]["action"] == "allow"


async def test_without_a_prompt_the_text_is_judged_alone() -> None:
    guard = FakeStreamGuard()
    events = await events_of(Ask("", "Nothing to see.", "balanced"), guard=guard)
    assert only(events, "prompt") == [{"verdict": None}]
    assert [opened.context for opened in guard.opened] == [None]


async def test_an_upstream_that_fails_is_an_error_event_after_what_was_judged() -> None:
    async def answer(prompt: str) -> AsyncGenerator[str, None]:
        yield "some words here "
        raise UpstreamError("the upstream broke off")

    events = await events_of(ASK, answer)
    assert shown(events) == "some words here"
    assert events[-1] == ("error", {"message": "The model could not answer: the upstream broke off"})


async def test_an_answer_without_end_is_ended() -> None:
    async def answer(prompt: str) -> AsyncGenerator[str, None]:
        while True:
            yield "again " * 1000

    events = await events_of(ASK, answer)
    assert "longer than" in events[-1][1]["message"]


@pytest.mark.parametrize(("policy", "whole"), [(BALANCED, False), (OPEN, True)])
async def test_when_the_guard_fails_the_policy_says_what_is_shown(policy: Any, whole: bool) -> None:
    guard = FakeStreamGuard(error=GuardTimeout("too slow"))
    events = await events_of(ASK, says("good guardfail ", "and more"), guard=guard, policy=policy)
    assert shown(events) == ("good guardfail and more" if whole else "")
    assert bool(only(events, "unjudged")) is whole
    (decision,) = only(events, "decision")
    assert decision["verdict"] is None
    assert decision["failure"]["message"] == "too slow"


async def test_prompt_and_answer_are_kept_with_the_playgrounds_route() -> None:
    kept: list[tuple[Decision, Conversation]] = []

    async def keep(decision: Decision, conversation: Conversation, *, retention: str) -> None:
        assert retention == BALANCED.retention
        kept.append((decision, conversation))

    await events_of(ASK, says("a bomb bomb"), keep=keep)
    assert [decision.action for decision, _ in kept] == [Action.ALLOW, Action.BLOCK]
    assert {decision.scope.route for decision, _ in kept} == {"/playground"}
    assert kept[1][1] == Conversation.of("hello", "a bomb bomb")


async def test_a_store_that_fails_is_said_on_the_page() -> None:
    async def keep(decision: Decision, conversation: Conversation, *, retention: str) -> None:
        raise StoreError("the disk is full")

    events = await events_of(ASK, says("hi"), keep=keep)
    assert events[-1] == ("error", {"message": "The decision could not be kept: the disk is full"})


async def test_a_reader_who_leaves_frees_upstream_and_guard() -> None:
    closed = asyncio.Event()

    async def answer(prompt: str) -> AsyncGenerator[str, None]:
        try:
            yield "first words then "
            await asyncio.Event().wait()
        finally:
            closed.set()

    guard = FakeStreamGuard()
    running = play(ASK, guard=guard, policy=BALANCED, answer=answer)
    async for name, _ in running:
        if name == "token":
            break
    assert guard.open_sessions == 1
    await running.aclose()
    assert closed.is_set()
    assert guard.open_sessions == 0


# --- over HTTP ----------------------------------------------------------------------------------------------------


@pytest.fixture
def client() -> TestClient:
    return TestClient(Starlette(routes=create_console(guard=FakeStreamGuard(), policy=BALANCED, answer=says("hi"))))


def test_events_come_as_a_stream_that_nobody_stores(client: TestClient) -> None:
    reply = client.post("/playground/stream", json={"mode": "ask", "prompt": "hello"})
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["cache-control"] == "no-store"
    names = [line.removeprefix("event: ") for line in reply.text.splitlines() if line.startswith("event: ")]
    assert names[:2] == ["start", "prompt"]
    assert names[-1] == "decision"


@pytest.mark.parametrize("policy", ["strict", "loose"])
def test_another_policy_can_be_tried(client: TestClient, policy: str) -> None:
    reply = client.post("/playground/stream", json={"mode": "judge", "response": "hi", "policy": policy})
    assert f'"policy": "{policy}"' in reply.text


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "expected a JSON object"),
        (b"\xff", "expected a JSON object"),
        (b"[]", "expected a JSON object"),
        (b"[" * 100_000, "expected a JSON object"),
        (b'{"mode": "sing"}', "mode: expected"),
        (b'{"mode": "ask"}', "prompt: expected some text"),
        (b'{"mode": "ask", "prompt": 5}', "prompt: expected a string"),
        (b'{"mode": "ask", "prompt": "\\ud800"}', "prompt: expected Unicode"),
        (b'{"mode": "judge", "response": null}', "response: expected a string"),
        (b'{"mode": "ask", "prompt": "x", "policy": "lax"}', "policy: expected one of balanced"),
        (b'{"mode": "ask", "prompt": "x", "extra": 1}', "expected only"),
        (b'{"mode": "ask", "prompt": "%s"}' % (b"x" * (LONGEST_PROMPT + 1)), "prompt: expected at most"),
        (b" " * (3 * 1024 * 1024), "longer than"),
    ],
)
def test_a_wrong_request_is_refused_with_its_place(client: TestClient, body: bytes, words: str) -> None:
    reply = client.post("/playground/stream", content=body, headers={"content-type": "application/json"})
    assert reply.status_code == 400
    assert words in reply.json()["error"]["message"]


def test_a_form_of_another_site_is_refused(client: TestClient) -> None:
    reply = client.post("/playground/stream", content=b"{}", headers={"content-type": "text/plain"})
    assert reply.status_code == 400
    assert "application/json" in reply.json()["error"]["message"]


def test_asking_without_an_upstream_says_what_to_start() -> None:
    with pytest.raises(InputError, match="--upstream URL or --demo"):
        parse_ask(b'{"mode": "ask", "prompt": "x"}', policies=("balanced",), can_ask=False)


async def test_a_guard_that_takes_too_long_is_given_up() -> None:
    events = await events_of(ASK, says("fine"), guard=FakeStreamGuard(hanging="hello"), timeout_s=0.05)
    assert only(events, "decision")[0]["decision"]["rule"] == "on_guard_error"
    judged = Ask("", "well guardhang x", "open")
    events = await events_of(judged, policy=OPEN, timeout_s=0.05)
    assert only(events, "decision")[0]["decision"]["rule"] == "on_guard_error"


async def test_each_text_that_is_offered_ends_as_its_title_says_with_the_guard_in_the_package() -> None:
    guard = load_guard("edge")
    ended = {}
    for offered in TEXTS:
        (decision,) = only(await events_of(Ask(offered.prompt, offered.response, "balanced"), guard=guard), "decision")
        ended[offered.title] = decision["decision"]["action"]
    await guard.close()
    assert ended == {
        "A kind answer": "allow",
        "Turns half-way": "block",
        "Harm in calm words": "allow",  # as its hint says
        "Alarming words, harmless": "allow",
        "A false alarm": "block",  # as its hint says
    }
