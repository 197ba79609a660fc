"""The dashboard and the alerts, asked of a real Prometheus that reads a gateway in use: every query has an answer."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from serving import POLICY, serving, wait_until
from tidegate.gateway.app import create_app
from tidegate.guards.breaker import BreakerOptions
from tidegate.policy import WatchedPolicy
from tidegate.testing import FakeStreamGuard, FakeUpstream, Reply, completion, text_chunks

DEPLOY = Path(__file__).parents[2] / "deploy"
WATCHED = POLICY.replace("action: block", "action: block, observe: true")
DEGRADED = "degraded: edge\n" + WATCHED


def _replies(body: Any) -> Reply:
    text = json.dumps(body)
    if "nothing" in text:
        return Reply.error(503, "no")
    if body.get("stream"):
        return Reply.stream(*text_chunks(["Hello", " there."]))
    return Reply.json(completion("Hello there."))


def _use(url: str) -> None:
    """One request of each kind that something counts."""
    with httpx.Client(base_url=url, timeout=60) as client:
        for text in ("hello", "a bomb", "guardfail", "nothing"):
            for stream in (False, True):
                body = {"model": "m", "messages": [{"role": "user", "content": text}], "stream": stream}
                client.post("/v1/chat/completions", json=body)
            client.post("/v1/moderations", json={"input": text})


class Prometheus:
    """A Prometheus in a process of its own."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=60)

    def ready(self) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return self._client.get("/-/ready").status_code == 200
        return False

    def _data(self, path: str, **parameters: str) -> Any:
        answer = self._client.get(f"/api/v1/{path}", params=parameters).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def answers(self, query: str) -> bool:
        """Whether a query has a number for an answer."""
        result = self._data("query", query=query)["result"]
        return any(math.isfinite(float(one["value"][1])) for one in result)

    def has(self, selector: str) -> bool:
        return bool(self._data("series", **{"match[]": selector}))

    def rules(self) -> list[dict[str, Any]]:
        return [rule for group in self._data("rules")["groups"] for rule in group["rules"]]

    def close(self) -> None:
        self._client.close()


@contextlib.contextmanager
def prometheus(folder: Path, target: str) -> Iterator[Prometheus]:
    """Reads a gateway at ``target`` twice a second, with the alerts that are delivered."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is not here")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"}
    config["rule_files"] = [str(DEPLOY / "prometheus" / "tidegate.rules.yml")]
    config["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    command = [program, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/tsdb"]
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address={address}"], stdout=log, stderr=log)
    asked = Prometheus(f"http://{address}")
    try:
        wait_until(asked.ready, "Prometheus", patience_s=60)
        yield asked
    finally:
        asked.close()
        process.terminate()
        process.wait(60)


def panels() -> list[tuple[str, str]]:
    """Title and query of each; Grafana's variables stand for every instance, and for a minute."""
    board = json.loads((DEPLOY / "grafana" / "tidegate.json").read_text())
    found = [(panel["title"], target["expr"]) for panel in board["panels"] for target in panel.get("targets", ())]
    return [(title, query.replace("$instance", ".*").replace("$__rate_interval", "1m")) for title, query in found]


@pytest.fixture
def in_use(tmp_path: Path) -> Iterator[tuple[Prometheus, Callable[[], None]]]:
    """A Prometheus that watches a gateway, and what uses that gateway once in every way."""
    policy = tmp_path / "policy.yaml"
    policy.write_text(WATCHED)
    texts = itertools.cycle([DEGRADED, WATCHED])
    with (
        serving(FakeUpstream(_replies)) as upstream,
        serving(
            create_app(
                guard=FakeStreamGuard(),
                fallback=FakeStreamGuard(failing="", name="small/1"),
                breaker=BreakerOptions(),
                policy=WatchedPolicy(policy),
                upstream_url=f"{upstream}/v1",
            )
        ) as url,
        prometheus(tmp_path, url.removeprefix("http://")) as watching,
    ):

        def use() -> None:
            _use(url)
            policy.write_text(next(texts))

        yield watching, use


def test_every_panel_has_numbers_and_every_alert_finds_what_it_is_about(
    in_use: tuple[Prometheus, Callable[[], None]],
) -> None:
    """With the labels that they name; a query that nothing answers would look like a calm day."""
    watching, use = in_use
    rules = yaml.safe_load((DEPLOY / "prometheus" / "tidegate.rules.yml").read_text())
    alerts = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    selectors = {one for alert in alerts for one in re.findall(r"\b(?:tidegate_\w+|up)(?:\{[^}]*\})?", alert)}
    asked = {query: title for title, query in panels()}
    unanswered, unseen = set(asked), set(selectors)
    assert (len(asked), len(selectors)) >= (20, 9)

    def complete() -> bool:
        use()
        unanswered.difference_update([query for query in unanswered if watching.answers(query)])
        unseen.difference_update([selector for selector in unseen if watching.has(selector)])
        return not unanswered and not unseen

    try:
        wait_until(complete, patience_s=60)
    except AssertionError:
        pytest.fail(f"no answer: {[(asked[query], query) for query in sorted(unanswered)]}, {sorted(unseen)}")
    wait_until(lambda: all(rule["health"] == "ok" for rule in watching.rules()), "the alerts", patience_s=60)
    assert len(watching.rules()) == len(alerts)
