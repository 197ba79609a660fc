"""The policy of a running gateway: it changes, it is one for each exchange, and what it says of failures is done."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving import POLICY, Record, make_policy, serving, wait_until
from tidegate.gateway.app import create_app
from tidegate.guards.breaker import BreakerOptions
from tidegate.policy import Policy, WatchedPolicy
from tidegate.testing import FakeStreamGuard, FakeUpstream, Reply, completion, text_chunks
from tidegate.types import Role

OPEN = POLICY.replace("action: block", "action: warn").replace("name: test", "name: open")


def metrics(url: str) -> str:
    return httpx.get(f"{url}/metrics").text


def moderated(url: str, text: str) -> dict[str, Any]:
    answer: dict[str, Any] = httpx.post(f"{url}/v1/moderations", json={"input": text}).json()["results"][0]["tidegate"]
    return answer["decision"]  # type: ignore[no-any-return]


def chat(url: str, text: str, **more: Any) -> httpx.Response:
    body = {"model": "m", "messages": [{"role": "user", "content": text}], **more}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "policy.yaml"
    path.write_text(POLICY)
    return path


# --- changes ------------------------------------------------------------------------------------------------------


def test_a_changed_file_comes_into_force_and_a_broken_one_does_not(path: Path) -> None:
    with serving(create_app(guard=FakeStreamGuard(), policy=WatchedPolicy(path))) as url:
        before = httpx.get(f"{url}/healthz").json()["policy"]
        assert (before["name"], before["stale"]) == ("test", False)
        assert moderated(url, "a bomb")["action"] == "block"
        assert f'tidegate_policy_info{{name="test",version="{before["version"]}"}} 1.0' in metrics(url)

        path.write_text(OPEN)
        wait_until(lambda: moderated(url, "a bomb")["action"] == "warn", "the new policy")
        decision = moderated(url, "a bomb")
        assert decision["policy"] == "open"
        assert decision["version"] != before["version"]
        wait_until(lambda: 'tidegate_policy_changes_total{outcome="taken"} 1.0' in metrics(url), "its metric")
        assert 'name="test"' not in metrics(url)

        path.write_text(OPEN.replace("rules", "rulse"))
        wait_until(lambda: "tidegate_policy_stale 1.0" in metrics(url), "the error to be seen")
        told = httpx.get(f"{url}/healthz")
        assert (told.status_code, told.json()["policy"]) == (
            200,
            {"name": "open", "version": decision["version"], "stale": True},
        )
        assert moderated(url, "a bomb")["version"] == decision["version"]

        path.write_text(POLICY)
        wait_until(lambda: moderated(url, "a bomb")["version"] == before["version"], "the first policy again")
        wait_until(lambda: "tidegate_policy_stale 0.0" in metrics(url), "its metric")


def test_several_gateways_on_one_file_all_take_a_change(path: Path) -> None:
    apps = [create_app(guard=FakeStreamGuard(), policy=WatchedPolicy(path)) for _ in range(3)]
    with serving(apps[0]) as one, serving(apps[1]) as two, serving(apps[2]) as three:
        beside = path.with_suffix(".new")
        beside.write_text(OPEN)
        beside.replace(path)
        for url in (one, two, three):
            wait_until(lambda url=url: moderated(url, "a bomb")["policy"] == "open", "the new policy")  # type: ignore[misc]


class Switched:
    """A source whose policy the test changes."""

    def __init__(self, current: Policy) -> None:
        self.current = current


@pytest.mark.parametrize("stream", [False, True])
def test_an_exchange_that_is_under_way_is_decided_by_the_policy_that_it_began_with(stream: bool) -> None:
    source, record = Switched(make_policy(retention="full")), Record()
    before, after = source.current, make_policy(OPEN, retention="hash")

    def answer(_: Any) -> Reply:
        source.current = after
        return Reply.stream(*text_chunks("a bomb bomb bomb")) if stream else Reply.json(completion("a bomb"))

    with serving(FakeUpstream(answer)) as upstream_url:
        app = create_app(guard=FakeStreamGuard(), policy=source, keep=record, upstream_url=f"{upstream_url}/v1")
        with serving(app) as url:
            assert "content_filter" in chat(url, "hi", stream=stream).text
            assert moderated(url, "a bomb")["version"] == after.version

    assert [(decision.policy_version, kept) for decision, _, kept in record.kept] == [
        (before.version, "full"),
        (before.version, "full"),
        (after.version, "hash"),
    ]


# --- what is only observed ----------------------------------------------------------------------------------------


def test_what_is_only_observed_passes_and_is_told_and_counted() -> None:
    record = Record()
    upstream = FakeUpstream(Reply.json(completion("a bomb")))
    with serving(upstream) as upstream_url:
        app = create_app(
            guard=FakeStreamGuard(), policy=make_policy(observe="true"), keep=record, upstream_url=f"{upstream_url}/v1"
        )
        with serving(app) as url:
            answer = chat(url, "hi").json()
            text = metrics(url)

    assert answer["choices"][0]["message"]["content"] == "a bomb"
    assert answer["tidegate"]["action"] == "allow"
    assert answer["tidegate"]["observed"] == {"action": "block", "rule": "unsafe", "advice": []}
    assert record.actions == ["allow", "allow"]
    assert 'tidegate_observed_decisions_total{action="allow",target="response",would_be="block"} 1.0' in text


# --- failures -----------------------------------------------------------------------------------------------------

FAILURES = ["guardfail", "guardhang"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("word", FAILURES)
@pytest.mark.parametrize("where", ["prompt", "answer"])
@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ({"on_guard_error": "block"}, "block"),
        ({"on_guard_error": "warn"}, "warn"),
        ({"on_guard_error": "{default: block, timeout: warn}"}, {"guardfail": "block", "guardhang": "warn"}),
        ({"on_guard_error": "block", "degraded": "edge"}, "allow"),
    ],
    ids=["shut", "open", "by kind", "degraded"],
)
def test_a_guard_that_fails_or_hangs_gets_what_the_policy_says(
    policy: dict[str, str], expected: str | dict[str, str], where: str, word: str, stream: bool
) -> None:
    text = f"tea {word} cake"
    asked, told = (text, "fine") if where == "prompt" else ("hi", text)
    reply = Reply.stream(*text_chunks(told)) if stream else Reply.json(completion(told))
    record = Record()
    with serving(FakeUpstream(reply)) as upstream_url:
        app = create_app(
            guard=FakeStreamGuard(),
            fallback=FakeStreamGuard(failing="", hanging="", name="small/1"),
            policy=make_policy(**policy),
            keep=record,
            upstream_url=f"{upstream_url}/v1",
            guard_timeout_s=0.05,
        )
        with serving(app) as url:
            answer = chat(url, asked, stream=stream).text
            text_of_metrics = metrics(url)

    role = Role.USER if where == "prompt" else Role.ASSISTANT
    decision = next(decision for decision, conversation, _ in record.kept if conversation.turns[-1].role is role)
    action = expected if isinstance(expected, str) else expected[word]
    assert decision.action.word == action
    kind = "GuardUnavailable" if word == "guardfail" else "GuardTimeout"
    if "degraded" in policy:
        assert decision.verdict is not None
        assert decision.verdict.guard == f"degraded[small/1; fake/1 {kind}]"
        assert f'tidegate_degraded_total{{kind="{kind}"}} 1.0' in text_of_metrics
    else:
        assert decision.failure is not None
        assert decision.failure.kind == kind
    said = "".join(re.findall('"content":"([^"]*)"', answer))
    assert (told in said) is (action != "block")


def test_a_guard_that_is_down_is_left_alone_and_the_gateway_says_so() -> None:
    guard = FakeStreamGuard()
    app = create_app(
        guard=guard,
        fallback=FakeStreamGuard(name="small/1"),
        policy=make_policy(on_guard_error="warn", degraded="edge"),
        breaker=BreakerOptions(failures=2, rest_s=3600, most_rest_s=3600),
    )
    with serving(app) as url:
        assert 'tidegate_guard_circuit{state="closed"} 1.0' in metrics(url)
        for _ in range(2):
            httpx.post(f"{url}/v1/moderations", json={"input": "guardfail"})
        asked = len(guard.judged)
        decision = moderated(url, "a bomb")
        text = metrics(url)

    assert (decision["action"], decision["guard"]) == ("block", "degraded[small/1; fake/1 GuardUnavailable]")
    assert len(guard.judged) == asked
    assert 'tidegate_guard_circuit{state="open"} 1.0' in text
    assert 'tidegate_guard_circuit{state="closed"} 0.0' in text


def test_layers_are_those_of_the_route() -> None:
    text = POLICY + "layers: {route: {/v1/moderations: {rules: [{name: m, severity: unsafe, action: warn}]}}}\n"
    with serving(create_app(guard=FakeStreamGuard(), policy=make_policy(text))) as url:
        assert moderated(url, "a bomb")["rule"] == "m"


def test_closing_the_app_closes_the_fallback_too() -> None:
    guard, fallback = FakeStreamGuard(), FakeStreamGuard()
    with serving(create_app(guard=guard, fallback=fallback, policy=make_policy())):
        pass
    assert (guard.closed, fallback.closed) == (True, True)
