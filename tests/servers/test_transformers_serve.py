"""The remote guard in front of ``transformers serve``, which sends no log probabilities. Run by ``.ci/servers``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest

pytest.importorskip("torch")

from servers.official_gen import official_gen
from servers.running import (
    ROWS,
    ServerProcess,
    check_restart,
    python_of,
    remote,
    route_of,
    running,
    servers_folder,
    verdicts_in_process,
)
from tidegate.errors import UnreadableVerdict
from tidegate.guards.remote import RemoteGuard
from tidegate.types import Target, Verdict

FOLDER = servers_folder("transformers")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    made = tmp_path_factory.mktemp("serve")
    (made / "hub").mkdir()
    serve = [python_of("transformers"), "-m", "transformers.cli.transformers", "serve", str(official_gen(FOLDER))]
    place = ["--host", "127.0.0.1", "--port", "{port}", "--device", "cpu"]
    offline = {"HF_HOME": str(made), "HF_HUB_OFFLINE": "1"}
    with running([*serve, *place], made / "server.log", **offline) as server:
        yield server


@pytest.fixture
async def guard(server: ServerProcess) -> AsyncIterator[RemoteGuard]:
    async with remote(server, model=str(official_gen(FOLDER)), probabilities="sampled", samples=2) as guard:
        yield guard


@pytest.fixture(scope="module")
def expected() -> list[Verdict]:
    return asyncio.run(verdicts_in_process(official_gen(FOLDER)))


async def test_it_is_refused_because_it_sends_no_log_probabilities(server: ServerProcess) -> None:
    async with remote(server, model=str(official_gen(FOLDER))) as guard:
        with pytest.raises(UnreadableVerdict, match="sends no log probabilities"):
            await guard.judge(ROWS[0].conversation)


async def test_sampled_verdicts_are_those_of_the_guard_in_process(guard: RemoteGuard, expected: list[Verdict]) -> None:
    for row, verdict in zip(ROWS[:4], expected, strict=False):
        said = await guard.judge(row.conversation)
        assert (said.severity, said.categories, said.refusal) == (
            verdict.severity,
            verdict.categories,
            verdict.refusal,
        )
    assert {route_of(guard.servers[0], target) for target in Target} == {"/chat/completions"}


async def test_raw_completions_say_the_same(server: ServerProcess, expected: list[Verdict]) -> None:
    changes = {"probabilities": "sampled", "samples": 1, "route": "completions"}
    async with remote(server, model=str(official_gen(FOLDER)), **changes) as guard:
        verdict = await guard.judge(ROWS[0].conversation)
        assert (verdict.severity, verdict.categories) == (expected[0].severity, expected[0].categories)


async def test_a_server_that_was_killed_is_used_again_when_it_is_back(
    server: ServerProcess, guard: RemoteGuard
) -> None:
    await check_restart(server, guard)
