"""The remote guard in front of vLLM, with a Gen guard. Run by ``.ci/servers``, on vLLM's build for CPUs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch")

from servers.official_gen import garbled_template, official_gen
from servers.running import (
    ROWS,
    ServerProcess,
    check_restart,
    check_verdicts,
    python_of,
    remote,
    route_of,
    running,
    servers_folder,
    verdicts_in_process,
)
from tidegate.errors import GuardUnavailable
from tidegate.guards.remote import RemoteGuard
from tidegate.types import Conversation, Target, Verdict

FOLDER = servers_folder("vllm")
APART = 1e-3
"""How far probabilities are apart, in float32."""


def command(*more: str) -> list[str]:
    serve = [python_of("vllm"), "-m", "vllm.entrypoints.openai.api_server", "--model", str(official_gen(FOLDER))]
    model = ["--served-model-name", "gen", "--dtype", "float32", "--max-model-len", "2048", "--enforce-eager"]
    return [*serve, *model, "--host", "127.0.0.1", "--port", "{port}", *more]


ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_PLUGINS": ""}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("vllm") / "server.log"
    with running(command(), log, **ENVIRONMENT) as server:
        yield server


@pytest.fixture
async def guard(server: ServerProcess) -> AsyncIterator[RemoteGuard]:
    async with remote(server, model="gen") as guard:
        yield guard


@pytest.fixture(scope="module")
def expected() -> list[Verdict]:
    return asyncio.run(verdicts_in_process(official_gen(FOLDER)))


async def test_verdicts_are_those_of_the_guard_in_process(guard: RemoteGuard, expected: list[Verdict]) -> None:
    await check_verdicts(guard, expected, apart=APART)
    assert {route_of(guard.servers[0], target) for target in Target} == {"/chat/completions"}


async def test_raw_completions_say_the_same(server: ServerProcess, expected: list[Verdict]) -> None:
    async with remote(server, model="gen", route="completions") as guard:
        await check_verdicts(guard, expected, apart=APART)


async def test_many_at_once_say_what_they_say_alone(guard: RemoteGuard, expected: list[Verdict]) -> None:
    said = await asyncio.gather(*(guard.judge(row.conversation) for row in ROWS * 3))
    for verdict, alone in zip(said, expected * 3, strict=True):
        assert verdict.probabilities.flagged == pytest.approx(alone.probabilities.flagged, abs=APART)


async def test_sampled_answers_need_no_log_probabilities(server: ServerProcess, expected: list[Verdict]) -> None:
    async with remote(server, model="gen", probabilities="sampled", samples=32) as guard:
        verdict = await guard.judge(ROWS[0].conversation)
        assert verdict.severity is expected[0].severity
        assert verdict.probabilities.flagged == pytest.approx(expected[0].probabilities.flagged, abs=0.3)


async def test_a_text_that_is_too_long_is_an_error(guard: RemoteGuard) -> None:
    with pytest.raises(GuardUnavailable, match="too long"):
        await guard.judge(Conversation.of("tell me of tea " * 1500))


async def test_a_server_that_was_killed_comes_back_with_another_template(
    server: ServerProcess, expected: list[Verdict], tmp_path: Path
) -> None:
    async with remote(server, model="gen") as guard:
        await check_restart(server, guard)
        server.kill()
        template = tmp_path / "garbled.jinja"
        template.write_text(garbled_template(), encoding="utf-8")
        with running(command("--chat-template", str(template)), tmp_path / "log", **ENVIRONMENT) as other:
            async with remote(other, model="gen") as second:
                await check_verdicts(second, expected, apart=APART)
                assert {route_of(second.servers[0], target) for target in Target} == {"/completions"}
