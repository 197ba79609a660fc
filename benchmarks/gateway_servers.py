"""The servers of the gateway's benchmarks, each a process of its own on loopback: upstream, Tidegate, and its peers.

`WAYS` are the ways from the client to the upstream. Peers run as their makers publish them, in environments of their
own that `prepare` makes: LiteLLM's proxy from PyPI, Portkey's gateway from npm. Every gateway has one worker, logs no
more than errors, and asks nothing of the network. Their own guards are those that work without another server:
LiteLLM's content filter (regular expressions and words), Portkey's word check (of the prompt and of whole answers; it
does not look at streams).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import uvicorn
import yaml
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from gateway_upstream import Upstream
from tidegate.gateway.app import create_app
from tidegate.gateway.connections import BoundedConfig, Bounds
from tidegate.gateway.entrance import EntranceOptions
from tidegate.guards import load_guard
from tidegate.guards.base import StreamGuard
from tidegate.policy import load_policy
from tidegate.store import open_store
from tidegate.testing import NoGuard

LITELLM = "litellm[proxy]==1.108.7"
PORTKEY = "@portkey-ai/gateway@1.15.2"
DIRECT, NO_GUARD, GUARD = "direct", "no guard", "guard"
LITELLM_PLAIN, LITELLM_FILTER = "LiteLLM", "LiteLLM + filter"
PORTKEY_PLAIN, PORTKEY_WORDS = "Portkey", "Portkey + words"
WAYS = (DIRECT, NO_GUARD, GUARD, LITELLM_PLAIN, LITELLM_FILTER, PORTKEY_PLAIN, PORTKEY_WORDS)
PATIENCE_S = 120.0
BLOCKED_WORDS = ("zyklon", "thermite", "fentanyl", "pipebomb", "nerve agent")
"""What the peers' guards look for; no answer has any of it."""


@dataclass
class Server:
    """A server process, seen from outside.

    Attributes:
        headers: what a client must send beside.
        fewest_tasks: the fewest tasks that it was ever seen with: what it has at rest.
    """

    process: subprocess.Popen[bytes]
    port: int
    headers: Mapping[str, str] = field(default_factory=dict)
    fewest_tasks: float = float("inf")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _family(self) -> list[psutil.Process]:
        first = psutil.Process(self.process.pid)
        return [first, *first.children(recursive=True)]

    @property
    def rss(self) -> int:
        """Bytes of memory, with all processes that it started."""
        return sum(int(each.memory_info().rss) for each in self._family())

    @property
    def cpu_s(self) -> float:
        """Seconds of processor time, the same way."""
        return sum(each.cpu_times().user + each.cpu_times().system for each in self._family())

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=PATIENCE_S) as response:
            return bytes(response.read())

    def vitals(self) -> dict[str, float]:
        """How a Tidegate is inside."""
        found: dict[str, float] = json.loads(self.get("/vitals"))
        page = self.get("/metrics").decode()
        for name in ("open_streams", "held_characters"):
            found[name] = float(re.search(rf"^tidegate_{name} (\S+)$", page, re.M)[1])  # type: ignore[index]
        return found


# --- ours ---------------------------------------------------------------------------------------------------------


def gateway_app(guard_spec: str, upstream_url: str, folder: str) -> Any:
    """The gateway as `tidegate serve` makes it, with no memory for verdicts, and a page that tells how it is inside."""
    guard: StreamGuard = NoGuard() if guard_spec == "none" else load_guard(guard_spec)
    store = open_store(f"sqlite:///{folder}/decisions.db")

    async def vitals(request: Request) -> JSONResponse:
        return JSONResponse(
            {
                "cpu_s": time.process_time(),
                "rss": psutil.Process().memory_info().rss,
                "tasks": len(asyncio.all_tasks()),
                "sessions": getattr(guard, "sessions", 0),
            }
        )

    return create_app(
        guard=guard,
        policy=load_policy("balanced"),
        keep=store.keep,
        upstream_url=f"{upstream_url}/v1",
        guard_timeout_s=PATIENCE_S,
        entrance=EntranceOptions(read_timeout_s=60.0),
        routes=[Route("/vitals", vitals)],
        on_close=[store.aclose],
    )


def serve(role: Sequence[str]) -> None:
    """What a server process does: ``upstream FOLDER`` or ``gateway FOLDER GUARD UPSTREAM CONNECTIONS``."""
    kind, folder, *rest = role
    most = int(rest[2]) if kind == "gateway" else 4096
    app = Upstream() if kind == "upstream" else gateway_app(rest[0], rest[1], folder)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(4096)
    place = Path(folder) / "port"
    unfinished = place.with_suffix(".new")
    unfinished.write_text(str(listener.getsockname()[1]))
    unfinished.rename(place)
    options: dict[str, Any] = {"log_level": "warning", "access_log": False, "timeout_graceful_shutdown": 2}
    options["backlog"] = 4096
    if kind == "upstream":
        config = uvicorn.Config(app, ws="none", **options)
    else:
        config = BoundedConfig(app, bounds=Bounds(connections=most), server_header=False, **options)
    uvicorn.Server(config).run([listener])


@contextlib.contextmanager
def running(role: str, folder: Path, *arguments: str, core: int | None = None) -> Iterator[Server]:
    """Run one of ours.

    Args:
        role: ``upstream`` or ``gateway``.
        folder: made for it.
        arguments: see `serve`.
        core: the only core that it may use; None for any.
    """
    folder.mkdir()
    place = folder / "port"
    script = Path(__file__).with_name("gateway.py")
    process = subprocess.Popen([sys.executable, str(script), "--role", role, str(folder), *arguments])
    try:
        keep_to(process.pid, core)
        limit = time.monotonic() + PATIENCE_S
        while not place.exists():
            if process.poll() is not None or time.monotonic() > limit:
                raise SystemExit(f"the {role} did not start")
            time.sleep(0.02)
        yield Server(process, int(place.read_text()))
    finally:
        process.terminate()
        process.wait(30)


def keep_to(pid: int, core: int | None) -> None:
    """Have a process use this core only, where the system can do that."""
    if core is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(pid, {core})


# --- peers --------------------------------------------------------------------------------------------------------


def prepare(folder: Path, names: Sequence[str]) -> None:
    """Make the environments of peers, each once."""
    for name in names:
        made = folder / name / ".made"
        if made.exists():
            continue
        made.parent.mkdir(parents=True, exist_ok=True)
        print(f"environment for {name} in {made.parent}", flush=True)
        if name == "litellm":
            subprocess.run([sys.executable, "-m", "venv", str(made.parent)], check=True)
            pip = [str(made.parent / "bin" / "python"), "-m", "pip", "install", "--quiet", LITELLM]
            subprocess.run(pip, check=True)
        else:
            (made.parent / "package.json").write_text(json.dumps(_PORTKEY_PACKAGE))
            subprocess.run(["npm", "install", "--no-audit", "--no-fund"], cwd=made.parent, check=True)
        made.touch()


@contextlib.contextmanager
def peer(way: str, folder: Path, environments: Path, upstream_url: str, *, core: int | None = None) -> Iterator[Server]:
    """Run a peer's gateway."""
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    headers: dict[str, str] = {"authorization": "Bearer none"}
    if way in (LITELLM_PLAIN, LITELLM_FILTER):
        command = _litellm(way, folder, environments / "litellm", upstream_url, port)
        ready, variables = "/health/liveliness", _LITELLM_ENVIRONMENT
    else:
        script = environments / "portkey" / "node_modules" / "@portkey-ai" / "gateway" / "build" / "start-server.js"
        command = ["node", str(script), "--headless", f"--port={port}"]
        ready, variables = "/", {"NODE_ENV": "production", "TRUSTED_CUSTOM_HOSTS": "127.0.0.1,localhost"}
        headers |= _portkey(way, upstream_url)
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env={**_environment(), **variables}, cwd=folder
        )
    try:
        keep_to(process.pid, core)
        server = Server(process, port, headers)
        _wait(server, ready, way, folder / "log.txt")
        yield server
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


_PORTKEY_PACKAGE = {
    "dependencies": {"@portkey-ai/gateway": PORTKEY.rpartition("@")[2]},
    "overrides": {"@hono/node-server": "1.13.8"},  # with 1.19 every stream of 1.15.2 is an error
}
_LITELLM_ENVIRONMENT = {
    "LITELLM_LOG": "ERROR",
    "LITELLM_MODE": "PRODUCTION",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "NO_PROXY": "*",
}


def _litellm(way: str, folder: Path, environment: Path, upstream_url: str, port: int) -> list[str]:
    parameters: dict[str, Any] = {"model": "openai/bench", "api_base": f"{upstream_url}/v1", "api_key": "none"}
    parameters["allowed_openai_params"] = ["user"]
    config: dict[str, Any] = {"model_list": [{"model_name": "bench", "litellm_params": parameters}]}
    config["litellm_settings"] = {"telemetry": False, "num_retries": 0}
    config["general_settings"] = {"dangerously_permit_weak_or_unset_master_key": True}  # keys would cost it time
    if way == LITELLM_FILTER:
        guard = {
            "guardrail": "litellm_content_filter",
            "mode": ["pre_call", "post_call"],
            "default_on": True,
            "patterns": [
                {"pattern_type": "prebuilt", "pattern_name": name, "action": "BLOCK"}
                for name in ("us_ssn", "email", "visa")
            ],
            "blocked_words": [{"keyword": word, "action": "BLOCK"} for word in BLOCKED_WORDS],
        }
        config["guardrails"] = [{"guardrail_name": "filter", "litellm_params": guard}]
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    place = ["--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"]
    return [str(environment / "bin" / "litellm"), "--config", str(file), *place]


def _portkey(way: str, upstream_url: str) -> dict[str, str]:
    config: dict[str, Any] = {"provider": "openai", "api_key": "none", "custom_host": f"{upstream_url}/v1"}
    if way == PORTKEY_WORDS:
        check = {"default.contains": {"operator": "none", "words": list(BLOCKED_WORDS)}, "deny": True}
        config |= {"input_guardrails": [check], "output_guardrails": [check]}
    return {"x-portkey-config": json.dumps(config)}


def _wait(server: Server, path: str, way: str, log: Path) -> None:
    limit = time.monotonic() + PATIENCE_S
    while True:
        if server.process.poll() is not None or time.monotonic() > limit:
            raise SystemExit(f"{way} did not start: {log.read_text(errors='replace')[-2000:]}")
        with contextlib.suppress(OSError, urllib.error.HTTPError):
            server.get(path)
            return
        time.sleep(0.1)
