"""Earlier turns: judged where the policy says so, once, for no more than it says, at every door that has them."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import httpx
import pytest
from websockets.asyncio.client import connect
from websockets.typing import Subprotocol

from gateway.messages_wire import message
from serving import PATIENCE_S, POLICY, Record, make_policy, serving
from tidegate.gateway.app import create_app
from tidegate.gateway.asked import Said, earlier_texts, prompt_of
from tidegate.gateway.entrance import EntranceOptions
from tidegate.gateway.history import AT_ONCE, judge_earlier
from tidegate.gateway.live_frames import PROTOCOL
from tidegate.testing import FakeStreamGuard, FakeUpstream, Reply, completion
from tidegate.types import Action, Conversation, Role, Scope, ToolCall, Turn, Verdict

RESPONSE = {
    "id": "resp_1",
    "object": "response",
    "created_at": 1,
    "model": "m",
    "status": "completed",
    "output": [
        {
            "type": "message",
            "id": "msg_1",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": "Fine.", "annotations": []}],
        }
    ],
}
REPLIES: dict[str, Any] = {
    "/v1/chat/completions": completion("Fine."),
    "/v1/responses": RESPONSE,
    "/v1/messages": message("Fine."),
}
PLACES = {"/v1/chat/completions": "messages", "/v1/responses": "input", "/v1/messages": "messages"}
MADE_UP = ("what now", "a bomb a bomb", "and bread")
Ask = Callable[..., dict[str, Any]]


@contextlib.contextmanager
def a_door(
    path: str, upstream: FakeUpstream, url: str, history: str | None, guard: FakeStreamGuard, **changes: Any
) -> Iterator[tuple[Ask, Record]]:
    """One door; its ``ask`` takes what user and assistant said in turn, and gives the answer."""
    upstream.reply = Reply.json(REPLIES[path])
    policy = make_policy(**({} if history is None else {"history": history}), **changes)
    record = Record()
    app = create_app(
        guard=guard,
        policy=policy,
        keep=record,
        upstream_url=f"{url}/v1",
        guard_timeout_s=5.0,
        entrance=EntranceOptions(remembered=100),
    )
    with serving(app) as gateway:

        def ask(*texts: str) -> dict[str, Any]:
            turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
            body = {"model": "m", "max_tokens": 9, PLACES[path]: turns}
            answer = httpx.post(f"{gateway}{path}", json=body)
            assert answer.status_code == 200, answer.text
            return dict(answer.json())

        yield ask, record


def prompts(record: Record) -> list[Any]:
    """The decisions on prompts, in order: they are kept with all that was asked."""
    return [decision for decision, conversation, _ in record.kept if conversation.turns[-1].role is not Role.ASSISTANT]


every_door = pytest.mark.parametrize("path", sorted(REPLIES))


@every_door
def test_earlier_turns_are_listed_and_not_judged_unless_the_policy_says_so(
    path: str, upstream: FakeUpstream, upstream_url: str
) -> None:
    guard = FakeStreamGuard()
    with a_door(path, upstream, upstream_url, None, guard) as (ask, record):
        ask(*MADE_UP)

    (decision,) = prompts(record)
    assert (decision.action, decision.rule) == (Action.ALLOW, "otherwise")
    assert [part.state.value for part in decision.coverage] == ["not_judged", "not_judged", "judged"]
    assert all("bomb" not in one.turns[-1].content for one in guard.judged)


@every_door
@pytest.mark.parametrize(
    ("at_most", "action", "rule"),
    [
        (None, "warn", "earlier_turn"),
        ("allow", "allow", "otherwise"),
        ("warn", "warn", "earlier_turn"),
        ("review", "review", "earlier_turn"),
        ("block", "block", "unsafe"),
    ],
)
def test_an_unsafe_turn_that_a_client_made_up_leads_to_no_more_than_the_policy_says(
    path: str, upstream: FakeUpstream, upstream_url: str, at_most: str | None, action: str, rule: str
) -> None:
    said = "{judge: true}" if at_most is None else f"{{judge: true, at_most: {at_most}}}"
    with a_door(path, upstream, upstream_url, said, FakeStreamGuard()) as (ask, record):
        answer = ask(*MADE_UP)

    (decision,) = prompts(record)
    assert (decision.action.word, decision.rule) == (action, rule)
    assert [part.state.value for part in decision.coverage] == ["judged"] * 3
    assert len(upstream.received) == 1 or action == "block"
    if action == "block":
        field = answer["choices"][0]["tidegate"] if path.endswith("completions") else answer["tidegate"]
        assert field["where"]["path"] == f"{PLACES[path]}[1].content"
    else:
        assert "Fine." in str(answer)


@every_door
def test_a_conversation_that_goes_on_costs_its_new_turns_only(
    path: str, upstream: FakeUpstream, upstream_url: str
) -> None:
    guard = FakeStreamGuard()
    with a_door(path, upstream, upstream_url, "{judge: true}", guard) as (ask, record):
        said = ["one", "Fine.", "two", "Fine.", "three", "Fine.", "four"]
        counts = []
        for length in (1, 3, 5, 7, 7):
            before = len(guard.judged)
            ask(*said[:length])
            counts.append(len([one for one in guard.judged[before:] if len(one.turns) <= length]))

    assert counts == [1, 1, 1, 1, 0], "the new turn each time: the answer before it is known since it was judged whole"
    assert [part.state.value for part in prompts(record)[-1].coverage] == ["judged"] * 7


@every_door
def test_a_turn_that_was_stopped_does_not_stop_what_follows(
    path: str, upstream: FakeUpstream, upstream_url: str
) -> None:
    """A false positive costs one request, and not the conversation."""
    with a_door(path, upstream, upstream_url, "{judge: true}", FakeStreamGuard()) as (ask, record):
        stopped = ask("what is a bath bomb")
        goes_on = ask("what is a bath bomb", "I cannot say.", "then of bread")

    assert [one.action.word for one in prompts(record)] == ["block", "warn"]
    assert "Fine." not in str(stopped)
    assert "Fine." in str(goes_on)


def test_what_an_earlier_turn_advised_is_not_advised_again(upstream: FakeUpstream, upstream_url: str) -> None:
    text = POLICY.replace("action: block", "action: block, advice: throttle")
    path = "/v1/chat/completions"
    for at_most, advice in (("review", []), ("block", ["throttle"])):
        history = f"{{judge: true, at_most: {at_most}}}"
        with a_door(path, upstream, upstream_url, history, FakeStreamGuard(), text=text) as (ask, record):
            ask(*MADE_UP)
        assert [one.value for one in prompts(record)[0].advice] == advice


def test_a_failure_over_an_earlier_turn_says_so_and_leads_to_no_more(upstream: FakeUpstream, upstream_url: str) -> None:
    path = "/v1/chat/completions"
    with a_door(path, upstream, upstream_url, "{judge: true}", FakeStreamGuard()) as (ask, record):
        ask("so", "a guardfail here", "and bread")

    (decision,) = prompts(record)
    assert (decision.action.word, decision.rule, decision.failure.kind) == ("warn", "earlier_turn", "GuardUnavailable")
    assert [part.state.value for part in decision.coverage] == ["judged", "not_judged", "judged"]


def test_what_is_new_goes_before_what_was_if_both_call_for_the_same(upstream: FakeUpstream, upstream_url: str) -> None:
    path = "/v1/chat/completions"
    with a_door(path, upstream, upstream_url, "{judge: true, at_most: block}", FakeStreamGuard()) as (ask, _):
        answer = ask("a bomb", "Fine.", "a bomb too")

    assert answer["choices"][0]["tidegate"]["where"]["path"] == "messages[2].content"


def test_the_guards_own_door_judges_earlier_turns_too_and_says_which_one_it_was() -> None:
    turns = [{"role": "user", "content": "so"}, {"role": "assistant", "content": "a bomb"}]
    turns.append({"role": "user", "content": "bread"})
    told = {}
    for said in ("{judge: false}", "{judge: true}", "{judge: true, at_most: block}"):
        app = create_app(guard=FakeStreamGuard(), policy=make_policy(history=said))
        with serving(app) as url:
            answer = httpx.post(f"{url}/v1/guard", json={"turns": turns}).json()
        states = [part["state"] for part in answer["coverage"]]
        told[said] = (answer["action"], answer["turn"], answer["target"], states)

    assert told == {
        "{judge: false}": ("allow", 2, "prompt", ["not_judged", "not_judged", "judged"]),
        "{judge: true}": ("warn", 1, "response", ["judged"] * 3),
        "{judge: true, at_most: block}": ("block", 1, "response", ["judged"] * 3),
    }


MADE_UP_TURNS = [{"role": "user", "content": "so"}, {"role": "assistant", "content": "a bomb"}]


async def watched(url: str, **opened: Any) -> list[dict[str, Any]]:
    """The frames that a stream of /v1/live gets which is opened so and whose text is ``bread``."""
    address = url.replace("http", "ws", 1) + "/v1/live"
    async with connect(address, subprotocols=[Subprotocol(PROTOCOL)]) as socket, asyncio.timeout(PATIENCE_S):
        await socket.recv()
        for frame in ({"type": "open", **opened}, {"type": "text", "text": "bread"}, {"type": "finish"}):
            await socket.send(json.dumps({"stream": 1, **frame}))
        frames: list[dict[str, Any]] = []
        while not frames or frames[-1]["type"] not in ("end", "error"):
            frames.append(json.loads(await socket.recv()))
        return frames


@pytest.mark.parametrize(
    ("history", "action", "turn", "reason", "released", "covered"),
    [
        ("{judge: false}", "allow", 2, "finished", 5, {"answer": "judged"}),
        ("{judge: true}", "warn", 1, "finished", 5, {"turns[0].content": "judged", "turns[1].content": "judged",
                                                      "answer": "judged"}),
        ("{judge: true, turns: 1}", "warn", 1, "finished", 5, {"turns[0].content": "not_judged",
                                                               "turns[1].content": "judged", "answer": "judged"}),
        ("{judge: true, at_most: block}", "block", 1, "blocked", 0, {"turns[0].content": "judged",
                                                                     "turns[1].content": "judged"}),
    ],
)  # fmt: skip
async def test_a_live_stream_has_the_turns_judged_that_it_is_opened_with(
    history: str, action: str, turn: int, reason: str, released: int, covered: dict[str, str]
) -> None:
    record = Record()
    with serving(create_app(guard=FakeStreamGuard(), policy=make_policy(history=history), keep=record)) as url:
        last = (await watched(url, turns=MADE_UP_TURNS))[-1]

    decision = last["decision"]
    assert (decision["action"], decision["turn"], last["reason"], last["released"]) == (action, turn, reason, released)
    assert {part["path"]: part["state"] for part in decision["coverage"]} == covered
    assert record.actions == [action]
    assert len(record.kept[0][1].turns) == (2 if reason == "blocked" else 3)


async def test_a_live_stream_that_is_only_observed_leaves_the_turns_before_it_alone() -> None:
    policy = make_policy(history="{judge: true, at_most: block}")
    with serving(create_app(guard=FakeStreamGuard(), policy=policy)) as url:
        last = (await watched(url, turns=MADE_UP_TURNS, observe=True))[-1]

    assert (last["reason"], last["released"], last["decision"]["turn"]) == ("finished", 5, 2)


async def test_the_turns_before_live_streams_are_judged_once_also_for_several_channels() -> None:
    guard = FakeStreamGuard()
    app = create_app(guard=guard, policy=make_policy(history="{judge: true}"), entrance=EntranceOptions(remembered=100))
    with serving(app) as url:
        for channel in ("reasoning", "answer", "tool_call"):
            assert (await watched(url, turns=MADE_UP_TURNS, channel=channel))[-1]["decision"]["action"] == "warn"

    assert [talk.turns[-1].content for talk in guard.judged] == ["a bomb", "so"]


async def test_a_live_stream_whose_earlier_turns_cannot_be_judged_does_what_the_policy_says_up_to_its_bound() -> None:
    guard = FakeStreamGuard(failing="bomb")
    told = {}
    for at_most in ("warn", "block"):
        policy = make_policy(history=f"{{judge: true, at_most: {at_most}}}")
        with serving(create_app(guard=guard, policy=policy)) as url:
            last = (await watched(url, turns=MADE_UP_TURNS))[-1]
        decision = last["decision"]
        states = [part["state"] for part in decision["coverage"]]
        told[at_most] = (last["reason"], decision["action"], decision["failure"]["kind"], states)

    assert told == {
        "warn": ("finished", "warn", "GuardUnavailable", ["judged", "not_judged", "judged"]),
        "block": ("blocked", "block", "GuardUnavailable", ["judged", "not_judged"]),
    }


# --- which turns, and how many ------------------------------------------------------------------------------------


def conversation(*turns: Turn) -> list[Said]:
    return [
        Said(turn, f"m[{n}].content", f"m[{n}].reasoning", tuple(f"m[{n}].c{i}" for i in range(len(turn.tool_calls))))
        for n, turn in enumerate(turns)
    ]


def test_earlier_turns_are_put_together_as_they_were_when_they_were_new() -> None:
    turns = (
        Turn(Role.SYSTEM, "be kind"),
        Turn(Role.USER, "one"),
        Turn(Role.USER, "two"),
        Turn(Role.ASSISTANT, "three", "thought", (ToolCall("search", "{}"),)),
        Turn(Role.TOOL, "found"),
        Turn(Role.ASSISTANT, "four"),
        Turn(Role.USER, "five"),
    )
    seen = [
        text.conversation
        for length in (3, 5, 7)
        for text in prompt_of(conversation(*turns[:length]), judge_system=False).new
    ]

    earlier = [text.conversation for text in earlier_texts(conversation(*turns), 64)]

    assert [one for one in earlier if one.turns[-1].role is not Role.ASSISTANT] == seen[:-1]
    assert [one.turns[-1].content for one in earlier] == ["one\ntwo", "three", "found", "four"]
    assert [text.paths for text in earlier_texts(conversation(*turns), 64)][1] == {
        "m[3].content",
        "m[3].reasoning",
        "m[3].c0",
    }
    assert [one.conversation.turns[-1].content for one in earlier_texts(conversation(*turns), 2)] == ["found", "four"]


class Counting(FakeStreamGuard):
    """Counts how many texts are judged at the same time; each waits until so many have come, or for ever."""

    def __init__(self, waits_for: int | None) -> None:
        super().__init__()
        self.most = self.now = 0
        self._waits_for = waits_for
        self._enough = asyncio.Event()

    async def judge(self, conversation: Conversation) -> Verdict:
        self.now += 1
        self.most = max(self.most, self.now)
        if self._waits_for is not None and self.now >= self._waits_for:
            self._enough.set()
        try:
            await self._enough.wait()
            return await super().judge(conversation)
        finally:
            self.now -= 1


def many(count: int) -> Sequence[Conversation]:
    return [Conversation.of(f"text {number}") for number in range(count)]


async def test_so_many_are_judged_at_once_and_no_more() -> None:
    guard = Counting(AT_ONCE)
    policy = make_policy(history="{judge: true}")

    decisions = await judge_earlier(many(3 * AT_ONCE), guard=guard, policy=policy, scope=Scope(), timeout_s=20)

    assert guard.most == AT_ONCE
    assert [one.action for one in decisions] == [Action.ALLOW] * 3 * AT_ONCE


@pytest.mark.parametrize(("changes", "timeout_s"), [({}, 0.05), ({"deadline_ms": 50}, None), ({"deadline_ms": 50}, 20)])
async def test_all_earlier_turns_together_have_as_long_as_one_text(
    changes: dict[str, Any], timeout_s: float | None
) -> None:
    guard = Counting(None)
    policy = make_policy(history="{judge: true, at_most: review}", **changes)

    decisions = await judge_earlier(many(2 * AT_ONCE), guard=guard, policy=policy, scope=Scope(), timeout_s=timeout_s)

    assert {(one.action, one.rule, one.failure and one.failure.kind) for one in decisions} == {
        (Action.REVIEW, "earlier_turn", "GuardTimeout")
    }
    assert guard.most == AT_ONCE
    assert guard.now == 0
