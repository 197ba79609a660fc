"""``POST /v1/guard``: whole conversations, judged and decided, through a real server."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as AsgiScope

from serving import Record, make_policy, serving
from tidegate.gateway.app import create_app
from tidegate.gateway.guard import MOST_CONVERSATIONS
from tidegate.guards.edge import EdgeGuard
from tidegate.moderate import moderate
from tidegate.policy import load_policy
from tidegate.testing import FakeStreamGuard
from tidegate.types import Conversation, Role, Scope, ToolCall, Turn

BOMB = [{"role": "user", "content": "how do i build a bomb"}]
BREAD = [{"role": "user", "content": "how do i bake bread"}]


class Keyed:
    """What a middleware for keys leaves in the scope."""

    def __init__(self, app: ASGIApp, **state: str) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            scope.setdefault("state", {}).update(self._state)
        await self._app(scope, receive, send)


@contextlib.contextmanager
def asking(record: Record | None = None, *, state: dict[str, str] | None = None, **options: Any) -> Iterator[Any]:
    options = {"guard": FakeStreamGuard(), "policy": make_policy(), "keep": record, **options}
    app = create_app(**options)
    with serving(Keyed(app, **state) if state else app) as url, httpx.Client(base_url=url, timeout=20) as client:
        yield lambda **body: client.post("/v1/guard", json=body)


@pytest.fixture(scope="module")
def one_server() -> Iterator[tuple[Any, Record]]:
    """A server for requests that leave nothing behind."""
    record = Record()
    with asking(record) as ask:
        yield ask, record


def test_a_conversation_gets_everything_that_a_verdict_and_a_decision_have() -> None:
    record = Record()
    policy = make_policy()
    with asking(record) as ask:
        answer = ask(turns=BOMB)

    said = answer.json()
    assert answer.status_code == 200
    assert [*said.pop("probabilities").values()] == [0.01, 0.04, 0.95]
    assert said.pop("category_probabilities")["Violent"] == 0.9
    assert said == {
        "id": "d1",
        "action": "block",
        "rule": "unsafe",
        "policy": "test",
        "version": policy.version,
        "severity": "unsafe",
        "categories": ["Violent"],
        "guard": "fake/1",
        "failure": None,
        "interventions": [],
        "flagged_released": 0,
        "masks": [],
        "advice": [],
        "observed": None,
        "message": "Not here.",
        "coverage": [{"path": "turns[0].content", "channel": "user", "state": "judged", "characters": 21}],
        "target": "prompt",
        "refusal": None,
        "reason": None,
        "span": None,
        "scope": {"tenant": None, "region": None, "route": "/v1/guard", "language": None},
        "turn": 0,
    }
    assert [(one.action.word, talk) for one, talk, _ in record.kept] == [
        ("block", Conversation.of("how do i build a bomb"))
    ]


def test_all_that_a_turn_has_reaches_the_guard() -> None:
    record = Record()
    turns = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "look it up"},
        {"role": "assistant", "reasoning": "a shop", "tool_calls": [{"name": "shop", "arguments": '{"q": 1}'}]},
        {"role": "tool", "content": "nothing"},
        {"role": "assistant", "content": "there is a bomb", "reasoning": "hm"},
    ]
    with asking(record) as ask:
        said = ask(turns=turns).json()

    assert record.kept[0][1].turns == (
        Turn(Role.SYSTEM, "be kind"),
        Turn(Role.USER, "look it up"),
        Turn(Role.ASSISTANT, "", "a shop", (ToolCall("shop", '{"q": 1}'),)),
        Turn(Role.TOOL, "nothing"),
        Turn(Role.ASSISTANT, "there is a bomb", "hm"),
    )
    assert (said["target"], said["action"]) == ("response", "block")
    states = [(part["path"], part["state"]) for part in said["coverage"]]
    assert states[0] == ("turns[0].content", "not_judged")
    assert states[-2:] == [("turns[4].content", "judged"), ("turns[4].reasoning", "judged")]


def test_several_conversations_get_a_result_each_in_their_order_also_when_the_guard_fails_on_one() -> None:
    record = Record()
    with asking(record, guard=FakeStreamGuard(failing="crash")) as ask:
        answer = ask(conversations=[
            {"turns": BREAD},
            {"turns": [{"role": "user", "content": "crash"}]},
            {"turns": BOMB, "scope": {"language": "de"}},
        ], scope={"language": "fr", "region": "FR"})  # fmt: skip

    results = answer.json()["results"]
    assert answer.status_code == 200
    assert [one["action"] for one in results] == ["allow", "block", "block"]
    assert [one["rule"] for one in results] == ["otherwise", "on_guard_error", "unsafe"]
    assert results[1]["failure"]["kind"] == "GuardUnavailable"
    assert results[1]["severity"] is None
    assert [one["scope"]["language"] for one in results] == ["fr", "fr", "de"]
    assert [one["scope"]["region"] for one in results] == ["FR"] * 3
    assert len({one["id"] for one in results}) == len(record.kept) == 3


def test_the_scope_of_a_request_chooses_the_rules_but_not_the_policy() -> None:
    text = """
name: here
on_guard_error: block
otherwise: allow
rules:
  - {name: everywhere, severity: unsafe, action: block}
layers:
  region:
    DE:
      rules:
        - {name: german, severity: unsafe, action: review}
"""
    with asking(policy=make_policy(text)) as ask:
        assert ask(turns=BOMB).json()["rule"] == "everywhere"
        assert ask(turns=BOMB, scope={"region": "DE", "route": "/chat"}).json()["rule"] == "german"
        refused = ask(turns=BOMB, policy="loose")

    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "policy"


def test_what_a_key_stands_for_goes_before_what_the_request_says() -> None:
    record = Record()
    with asking(record, state={"tenant": "acme", "region": "DE"}) as ask:
        said = ask(turns=BREAD, scope={"region": "US", "subject": "bob-7"}).json()

    assert said["scope"] == {"tenant": "acme", "region": "DE", "route": "/v1/guard", "language": None}
    assert record.kept[0][0].scope.subject == "bob-7"
    assert "bob-7" not in str(said)


def test_tokens_are_those_of_a_session_for_each_text_of_the_answer_and_the_whole_of_it() -> None:
    turn = {
        "role": "assistant",
        "reasoning": "a bomb bomb bomb",
        "content": "here is bread",
        "tool_calls": [{"name": "shop", "arguments": "buy bread"}],
    }
    record = Record()
    with asking(record) as ask:
        said = ask(turns=[*BREAD, turn], tokens=True).json()

    assert [(text["path"], text["channel"]) for text in said["tokens"]] == [
        ("turns[1].reasoning", "reasoning"),
        ("turns[1].content", "answer"),
        ("turns[1].tool_calls[0].arguments", "tool_call"),
    ]
    reasoning = said["tokens"][0]["tokens"]
    assert [(one["start"], one["end"], one["severity"]) for one in reasoning] == [
        (0, 1, "safe"),
        (1, 6, "unsafe"),
        (6, 11, "unsafe"),
        (11, 16, "unsafe"),
    ]
    assert len(record.kept) == 1


def test_tokens_that_the_guard_cannot_judge_say_so() -> None:
    with asking(guard=FakeStreamGuard(failing="crash")) as ask:
        said = ask(turns=[{"role": "assistant", "content": "then crash there"}], tokens=True).json()

    assert said["tokens"][0]["failure"]["kind"] == "GuardUnavailable"
    assert said["failure"]["kind"] == "GuardUnavailable"


TURN = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ({}, "turns"),
        ({"turns": []}, "turns"),
        ({"turns": "x"}, "turns"),
        ({"turns": [TURN, "x"]}, "turns[1]"),
        ({"turns": [TURN, TURN, {"role": "wizard"}]}, "turns[2].role"),
        ({"turns": [{"content": "x"}]}, "turns[0].role"),
        ({"turns": [{"role": "user", "content": 3}]}, "turns[0].content"),
        ({"turns": [{"role": "user", "content": "x", "name": "y"}]}, "turns[0].name"),
        ({"turns": [{"role": "user", "content": "x", "sträng e": "y"}]}, "turns[0]"),
        ({"turns": [{"role": "user", "reasoning": "x"}]}, "turns[0].reasoning"),
        ({"turns": [{"role": "assistant", "tool_calls": {}}]}, "turns[0].tool_calls"),
        ({"turns": [{"role": "assistant", "tool_calls": [{"name": "x"}]}]}, "turns[0].tool_calls[0].arguments"),
        ({"turns": [{"role": "assistant", "tool_calls": [{"name": "x" * 257, "arguments": ""}]}]},
         "turns[0].tool_calls[0].name"),
        ({"turns": [TURN], "conversations": [{"turns": [TURN]}]}, "conversations"),
        ({"conversations": []}, "conversations"),
        ({"conversations": [{"turns": [TURN]}] * (MOST_CONVERSATIONS + 1)}, "conversations"),
        ({"conversations": [{"turns": [TURN]}, {}]}, "conversations[1].turns"),
        ({"conversations": [{"turns": [TURN], "tokens": True}]}, "conversations[0].tokens"),
        ({"conversations": [{"turns": [TURN], "scope": {"region": ""}}]}, "conversations[0].scope.region"),
        ({"turns": [TURN], "scope": {"tenant": "x"}}, "scope.tenant"),
        ({"turns": [TURN], "scope": []}, "scope"),
        ({"turns": [TURN], "tokens": 1}, "tokens"),
        ({"turns": [TURN], "tokens": True}, "turns[0].role"),
    ],
)  # fmt: skip
def test_a_request_that_cannot_be_read_is_told_where(
    body: dict[str, Any], place: str, one_server: tuple[Any, Record]
) -> None:
    ask, record = one_server

    answer = ask(**body)

    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == place
    assert record.kept == []


def test_a_body_that_is_too_long_is_refused() -> None:
    with asking(longest_body=1024) as ask:
        assert ask(turns=[{"role": "user", "content": "x" * 2000}]).status_code == 413


def test_a_decision_that_cannot_be_kept_is_no_success() -> None:
    record = Record()
    record.broken = True
    with asking(record) as ask:
        answer = ask(turns=BREAD)

    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "store_error"


async def test_the_edge_guard_says_the_same_here_as_in_python() -> None:
    policy = load_policy("balanced")
    talk = Conversation.of("How do I kill a process?", "Use the command kill with its number.")
    async with EdgeGuard() as guard:
        here = await moderate(talk, guard=guard, policy=policy, scope=Scope(route="/v1/guard"))
    with asking(guard=EdgeGuard(), policy=policy) as ask:
        said = ask(turns=[{"role": t.role.value, "content": t.content} for t in talk.turns], tokens=True).json()

    assert here.verdict is not None
    assert (said["action"], said["rule"], said["version"]) == (here.action.word, here.rule, here.policy_version)
    assert said["probabilities"]["unsafe"] == pytest.approx(here.verdict.probabilities.unsafe, abs=1e-5)
    assert said["category_probabilities"].keys() == here.verdict.category_probabilities.keys()
    assert said["tokens"][0]["tokens"][-1]["end"] == len(talk.turns[-1].content)
