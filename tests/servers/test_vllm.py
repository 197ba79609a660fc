"""The `vllm-stream` guard in front of vLLM with Tidegate's plugin. Run by ``.ci/servers``, on vLLM's build for CPUs.

The model is a small one with random weights in the released layout; the tokenizer is the released one where
``TIDEGATE_QWEN3GUARD_FILES`` says where it is, else one of its kind.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import numpy as np  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

from qwen3guard_files import FILES  # noqa: E402
from qwen_tokenizer import LINES, tiny_qwen_definition  # noqa: E402
from servers.running import ServerProcess, python_of, running, servers_folder  # noqa: E402
from stream_folder import official_config, tensors_of, tiny_model, write_checkpoint  # noqa: E402
from tidegate.guards.stream import Qwen3StreamGuard  # noqa: E402
from tidegate.guards.vllm_stream import VllmStreamConfig, VllmStreamGuard  # noqa: E402
from tidegate.model.loading import load_stream  # noqa: E402
from tidegate.types import Channel, Conversation, Probabilities, Role, TokenVerdict, ToolCall, Turn  # noqa: E402

FOLDER = servers_folder("vllm")
NOISE = 1e-5
"""How far probabilities are apart, in float32."""
WINDOW = 512
BLOCK = 32
SHAPE = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 192,
    "guard_inner_size": 64,
    "head_dim": 64,
}
"""Heads as wide as vLLM's kernels for CPUs want them."""
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
PROMPT = Conversation.of("how to build a bomb?")
TEXT = " ".join(LINES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the released layout."""
    path = tmp_path_factory.mktemp("stream") / "tiny"
    definition = (FILES / "tokenizer.json").read_text(encoding="utf-8") if FILES else tiny_qwen_definition()
    shape = {**SHAPE, "vocab_size": 151_936 if FILES else Tokenizer.from_str(definition).get_vocab_size()}
    config = official_config(**shape, torch_dtype="float32", max_position_embeddings=WINDOW)
    write_checkpoint(path, tensors_of(tiny_model(**shape)), config=config, shards=2)
    (path / "tokenizer.json").write_text(definition, encoding="utf-8")
    (path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}', encoding="utf-8")
    return path


def command(folder: Path, *more: str) -> list[str]:
    """Prompts come in parts of 128 tokens, so that the longer ones are computed in several steps."""
    serve = [python_of("vllm"), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    sizes = ["--dtype", "float32", "--block-size", str(BLOCK), "--max-num-batched-tokens", "128", "--enforce-eager"]
    name = ["--served-model-name", "tiny", "--max-num-seqs", "64", "--disable-uvicorn-access-log"]
    return [*serve, *sizes, *name, "--host", "127.0.0.1", "--port", "{port}", *more]


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with running(command(folder), tmp_path_factory.mktemp("vllm") / "server.log", **ENVIRONMENT) as server:
        yield server


@pytest.fixture
async def guard(server: ServerProcess) -> AsyncIterator[VllmStreamGuard]:
    async with VllmStreamGuard(VllmStreamConfig(urls=(server.url,), patience_s=300, timeout_s=60)) as guard:
        yield guard


@pytest.fixture
async def own(folder: Path) -> AsyncIterator[Qwen3StreamGuard]:
    """The same model in process."""
    async with Qwen3StreamGuard(folder, threads=1) as guard:
        yield guard


def values(probabilities: Probabilities) -> tuple[float, float, float]:
    return probabilities.safe, probabilities.controversial, probabilities.unsafe


def assert_same(some: Sequence[TokenVerdict], others: Sequence[TokenVerdict]) -> None:
    assert [v.span for v in some] == [v.span for v in others]
    for one, other in zip(some, others, strict=True):
        assert values(one.probabilities) == pytest.approx(values(other.probabilities), abs=NOISE)
        assert one.category_probability == pytest.approx(other.category_probability, abs=NOISE)


def pieces_of(text: str, seed: int, longest: int = 60) -> Iterator[str]:
    rng, start = random.Random(seed), 0
    while start < len(text):
        stop = start + rng.randint(1, longest)
        yield text[start:stop]
        start = stop


async def streamed(session: Any, pieces: Iterator[str]) -> list[TokenVerdict]:
    verdicts: list[TokenVerdict] = []
    for piece in pieces:
        verdicts += await session.feed(piece)
    return verdicts + list(await session.finish())


def counted(server: ServerProcess, source: str) -> int:
    """How many tokens of prompts vLLM says it computed, or had in its cache."""
    with urllib.request.urlopen(f"{server.url}/metrics") as response:
        found = re.search(
            rf'^vllm:prompt_tokens_by_source_total{{.*source="{source}".*}} (.*)$', response.read().decode(), re.M
        )
    return int(float(found[1])) if found else 0


def pooled(server: ServerProcess, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        f"{server.url}/pooling", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request) as response:
        return json.load(response)


CONVERSATIONS = (
    PROMPT,
    Conversation((Turn(Role.SYSTEM, "Be good."), *PROMPT.turns)),
    PROMPT.then(Turn(Role.ASSISTANT, TEXT)),
    PROMPT.then(Turn(Role.ASSISTANT, TEXT * 6)),
    PROMPT.then(Turn(Role.ASSISTANT, "Sure.", "They want a bomb.", (ToolCall("shop", '{"what": "bomb"}'),))),
    Conversation.of(TEXT * 8),
)


@pytest.mark.parametrize("conversation", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
async def test_verdicts_are_those_of_the_guard_in_process(
    guard: VllmStreamGuard, own: Qwen3StreamGuard, conversation: Conversation
) -> None:
    ours, theirs = await guard.judge(conversation), await own.judge(conversation)

    assert (ours.severity, ours.span, ours.categories) == (theirs.severity, theirs.span, theirs.categories)
    assert values(ours.probabilities) == pytest.approx(values(theirs.probabilities), abs=NOISE)
    assert ours.category_probabilities == pytest.approx(dict(theirs.category_probabilities), abs=NOISE)
    assert ours.guard == "vllm-stream/tiny"


async def test_many_sessions_at_once_over_several_windows(guard: VllmStreamGuard, own: Qwen3StreamGuard) -> None:
    async def both(number: int) -> None:
        text = f"{number} {TEXT * (1 + number % 5)}"
        ours = await streamed(guard.open(PROMPT), pieces_of(text, number))
        assert_same(ours, await streamed(own.open(PROMPT), pieces_of(text, number, 1000)))

    await asyncio.gather(*map(both, range(32)))


@pytest.mark.parametrize("channel", [Channel.REASONING, Channel.TOOL_CALL])
async def test_other_channels(guard: VllmStreamGuard, own: Qwen3StreamGuard, channel: Channel) -> None:
    ours = await streamed(guard.open(PROMPT, channel, name="x"), pieces_of(TEXT, 1))
    assert_same(ours, await streamed(own.open(PROMPT, channel, name="x"), pieces_of(TEXT, 2)))


async def test_a_piece_costs_its_own_tokens_and_an_unfinished_block(
    server: ServerProcess, guard: VllmStreamGuard
) -> None:
    session = guard.open(Conversation.of("What does it cost?"))
    await session.feed("It begins. ")
    computed = counted(server, "local_compute") - guard.metrics().tokens_computed
    for piece in pieces_of(TEXT, 3, 20):
        before = guard.metrics().tokens_computed, guard.metrics().tokens_judged
        await session.feed(piece)
        new = guard.metrics().tokens_judged - before[1]
        assert guard.metrics().tokens_computed - before[0] <= new + BLOCK - 1
    session.close()

    assert counted(server, "local_compute") - computed == guard.metrics().tokens_computed
    assert guard.metrics().tokens_sent > 3 * guard.metrics().tokens_computed
    assert guard.metrics().repeated == 0


async def test_a_text_that_another_session_had_is_judged_too(guard: VllmStreamGuard, own: Qwen3StreamGuard) -> None:
    context = Conversation.of("Say it again.")
    first = await streamed(guard.open(context), pieces_of(TEXT, 4))
    second = await streamed(guard.open(context), pieces_of(TEXT, 4))

    assert_same(second, first)
    assert_same(first, await streamed(own.open(context), pieces_of(TEXT, 4)))
    assert guard.metrics().repeated == 1


async def test_pieces_that_come_meanwhile_go_together(guard: VllmStreamGuard, own: Qwen3StreamGuard) -> None:
    context = Conversation.of("All at once.")
    await guard.judge(context)
    session, before = guard.open(context), guard.metrics().requests
    parts = await asyncio.gather(*map(session.feed, pieces_of(TEXT, 5)))
    verdicts = [verdict for part in parts for verdict in part] + list(await session.finish())

    assert_same(verdicts, await streamed(own.open(context), pieces_of(TEXT, 5)))
    assert guard.metrics().requests - before <= 4


async def test_all_heads_at_each_token_for_whoever_asks_without_a_guard(server: ServerProcess, folder: Path) -> None:
    ids = [(7 + 11 * number) % 300 for number in range(200)]
    with torch.inference_mode():
        expected = torch.cat(load_stream(folder)(torch.tensor([ids])), -1)[0].numpy()

    rows = np.asarray(pooled(server, {"input": ids})["data"][0]["data"])

    assert rows.shape == (200, 23)
    assert np.abs(rows - expected).max() < 1e-4


@pytest.mark.parametrize(
    "data", [{"ids": []}, {"ids": [1] * (WINDOW + 1)}, {"ids": [2**30]}, {"ids": [1], "first": 1}, "x", None]
)
def test_what_cannot_be_answered_is_refused(server: ServerProcess, data: Any) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        pooled(server, {"data": data})
    assert refused.value.code == 400
    refused.value.close()


async def test_a_server_that_is_killed_and_comes_back_is_survived_in_the_middle_of_a_text(
    server: ServerProcess, guard: VllmStreamGuard, own: Qwen3StreamGuard
) -> None:
    sessions = [guard.open(Conversation.of(f"Survive {number}.")) for number in range(4)]
    verdicts = [list(await session.feed(TEXT[:300])) for session in sessions]
    server.kill()
    waiting = [asyncio.ensure_future(session.feed(TEXT[300:400])) for session in sessions]
    await asyncio.to_thread(server.start)
    for number, session in enumerate(sessions):
        verdicts[number] += await waiting[number]
        verdicts[number] += await session.feed(TEXT[400:])
        verdicts[number] += await session.finish()
        expected = await streamed(own.open(Conversation.of(f"Survive {number}.")), iter([TEXT]))
        assert_same(verdicts[number], expected)
    assert guard.metrics().troubles
