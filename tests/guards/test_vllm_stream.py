"""The guard behind vLLM, against a server with a real model that caches in blocks, breaks down and comes back."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from tokenizers import Tokenizer  # noqa: E402

from qwen_tokenizer import LINES, tiny_qwen_definition  # noqa: E402
from serving import serving, until  # noqa: E402
from stream_folder import official_config, tensors_of, tiny_model, write_checkpoint  # noqa: E402
from tidegate.errors import (  # noqa: E402
    GuardError,
    GuardOverloaded,
    GuardTimeout,
    GuardUnavailable,
    InputError,
    SessionClosed,
    UnreadableVerdict,
)
from tidegate.guards import StreamGuard, load_guard  # noqa: E402
from tidegate.guards.remote_servers import ServerPool  # noqa: E402
from tidegate.guards.stream import Qwen3StreamGuard  # noqa: E402
from tidegate.guards.vllm_stream import VllmStreamConfig, VllmStreamGuard, load_vllm_stream, read_config  # noqa: E402
from tidegate.guards.vllm_wire import DESCRIBE, Answer, Ask, Description, read  # noqa: E402
from tidegate.testing import Die, FakeUpstream, Hang, Reply  # noqa: E402
from tidegate.types import (  # noqa: E402
    Channel,
    Conversation,
    Probabilities,
    Role,
    Severity,
    Target,
    TokenVerdict,
    ToolCall,
    Turn,
)

NOISE = 1e-5
WINDOW = 96
BLOCK = 16
PROMPT = Conversation.of("how to build a bomb?")
ANSWER = "Here are some practical methods, and then the other dogs jump over the fox. 今天天气很好"
LONG = " ".join(LINES)
AWKWARD = ("👩‍👩‍👧‍👦", "\ud83d", "\ude00", "e\u0301", "<|im_end|>", "  \n ", "\n\n", "한국어")
TEXTS = st.lists(st.one_of(st.sampled_from(AWKWARD), st.sampled_from(LINES), st.text(max_size=6)), max_size=6).map(
    "".join
)


@cache
def vocabulary() -> int:
    size: int = Tokenizer.from_str(tiny_qwen_definition()).get_vocab_size()
    return size


@cache
def model() -> Any:
    return tiny_model(vocab_size=vocabulary())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint that the fake server serves, for a guard in process."""
    path = tmp_path_factory.mktemp("stream") / "narrow"
    config = official_config(vocab_size=vocabulary(), torch_dtype="float32", max_position_embeddings=WINDOW)
    write_checkpoint(path, tensors_of(model()), config=config)
    (path / "tokenizer.json").write_text(tiny_qwen_definition(), encoding="utf-8")
    return path


@dataclass
class FakeVllm:
    """A server with the plugin: a prefix cache in full blocks, and logits for what is computed alone."""

    window: int = WINDOW
    definition: str | None = None
    labels: dict[str, Any] = field(default_factory=dict)
    caching: bool = True
    asked: list[Ask] = field(default_factory=list)
    described: int = 0
    computed: list[int] = field(default_factory=list)
    cached: set[tuple[str, tuple[int, ...]]] = field(default_factory=set)
    forgets: int = 0
    """From how many of the next answers the first row is missing."""
    before: list[Reply] = field(default_factory=list)
    """What is answered to the next requests, in place of what is right."""

    def __call__(self, body: dict[str, Any]) -> Reply:
        if self.before:
            return self.before.pop(0)
        if body["data"] == DESCRIBE:
            self.described += 1
            return Reply.json({"data": self.description().model_dump()})
        ask = Ask.model_validate(body["data"])
        self.asked.append(ask)
        return Reply.json({"request_id": "x", "data": self.answer(ask).model_dump()})

    def description(self) -> Description:
        definition = tiny_qwen_definition() if self.definition is None else self.definition
        config = {**official_config(), **self.labels}
        return Description.of(
            config, self.window, definition or None, model="tiny", block=BLOCK, caching=True, versions={"vllm": "0"}
        )

    def answer(self, ask: Ask) -> Answer:
        assert len(ask.ids) <= self.window
        keys = [(ask.salt, tuple(ask.ids[:stop])) for stop in range(BLOCK, len(ask.ids) + 1, BLOCK)]
        hits = 0
        while self.caching and hits < (len(ask.ids) - 1) // BLOCK and keys[hits] in self.cached:
            hits += 1
        self.cached.update(keys)
        computed = len(ask.ids) - hits * BLOCK
        self.computed.append(computed)
        with torch.inference_mode():
            logits = model()(torch.tensor([ask.ids]))
        heads = logits[2:] if ask.target is Target.PROMPT else logits[:2]
        rows = torch.cat([head[0] for head in heads], -1).numpy()[max(ask.first, hits * BLOCK) :]
        if self.forgets:
            self.forgets -= 1
            rows = rows[1:]
        classes = (3, rows.shape[1] - 3)
        return Answer.of(rows, classes, computed=computed, served=self.description().served)


@pytest.fixture
def server(upstream: FakeUpstream) -> FakeVllm:
    fake = FakeVllm()
    upstream.reply = fake
    return fake


Make = Callable[..., VllmStreamGuard]


@pytest.fixture
async def make(upstream_url: str) -> AsyncIterator[Make]:
    """Makes guards that ask the fake server, and closes them."""
    guards: list[VllmStreamGuard] = []

    def make(**config: Any) -> VllmStreamGuard:
        guards.append(VllmStreamGuard(VllmStreamConfig(**{"urls": (upstream_url,), **config})))
        return guards[-1]

    yield make
    for guard in guards:
        await guard.close()


@pytest.fixture
async def own(folder: Path) -> AsyncIterator[Qwen3StreamGuard]:
    """The same model in process."""
    async with Qwen3StreamGuard(folder, positions=4 * WINDOW) as guard:
        yield guard


def values(probabilities: Probabilities) -> tuple[float, float, float]:
    return probabilities.safe, probabilities.controversial, probabilities.unsafe


def assert_same(some: list[TokenVerdict], others: list[TokenVerdict]) -> None:
    assert [v.span for v in some] == [v.span for v in others]
    for one, other in zip(some, others, strict=True):
        assert values(one.probabilities) == pytest.approx(values(other.probabilities), abs=NOISE)
        assert one.category_probability == pytest.approx(other.category_probability, abs=NOISE)


def cut(text: str, places: list[int]) -> list[str]:
    ends = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[start:end] for start, end in pairwise(ends)]


async def streamed(session: Any, pieces: list[str]) -> list[TokenVerdict]:
    verdicts: list[TokenVerdict] = []
    for piece in pieces:
        verdicts += await session.feed(piece)
    return verdicts + list(await session.finish())


# --- verdicts -----------------------------------------------------------------------------------------------------


async def test_it_is_a_stream_guard_that_is_named_after_what_is_served(make: Make, server: FakeVllm) -> None:
    guard = make()
    assert isinstance(guard, StreamGuard)
    assert guard.name == "vllm-stream"

    verdict = await guard.judge(PROMPT)

    assert verdict.guard == guard.name == "vllm-stream/tiny"
    assert server.described == 1


CONVERSATIONS = (
    PROMPT,
    Conversation((Turn(Role.SYSTEM, "Be good."), *PROMPT.turns)),
    PROMPT.then(Turn(Role.ASSISTANT, ANSWER)),
    PROMPT.then(Turn(Role.ASSISTANT, "")),
    PROMPT.then(Turn(Role.ASSISTANT, "Sure.", "They want a bomb.", (ToolCall("shop", '{"what": "bomb"}'),))),
    PROMPT.then(Turn(Role.ASSISTANT, LONG)),
    Conversation.of(LONG),
    Conversation.of("Hello", "Hi").then(Turn(Role.USER, LONG)),
    Conversation((Turn(Role.ASSISTANT, ANSWER),)),
)


@pytest.mark.parametrize("conversation", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
async def test_verdicts_are_those_of_the_guard_in_process(
    make: Make, own: Qwen3StreamGuard, server: FakeVllm, conversation: Conversation
) -> None:
    ours, theirs = await make().judge(conversation), await own.judge(conversation)

    assert (ours.target, ours.severity, ours.span) == (theirs.target, theirs.severity, theirs.span)
    assert ours.categories == theirs.categories
    assert values(ours.probabilities) == pytest.approx(values(theirs.probabilities), abs=NOISE)
    assert ours.category_probabilities == pytest.approx(dict(theirs.category_probabilities), abs=NOISE)


@pytest.mark.parametrize(
    ("channel", "reasoning", "name"),
    [(Channel.ANSWER, "", ""), (Channel.ANSWER, "Hm.", ""), (Channel.REASONING, "", ""), (Channel.TOOL_CALL, "", "x")],
)
async def test_sessions_are_those_of_the_guard_in_process(
    make: Make, own: Qwen3StreamGuard, server: FakeVllm, channel: Channel, reasoning: str, name: str
) -> None:
    pieces = cut(LONG[:600], list(range(0, 600, 31)))

    ours = await streamed(make().open(PROMPT, channel, reasoning=reasoning, name=name), pieces)

    assert_same(ours, await streamed(own.open(PROMPT, channel, reasoning=reasoning, name=name), pieces))


@pytest.fixture(scope="module")
def alone() -> Iterator[tuple[FakeVllm, str]]:
    """A server for tests that run an event loop for each of many examples."""
    fake = FakeVllm()
    with serving(FakeUpstream(fake)) as url:
        yield fake, url


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(text=TEXTS, places=st.lists(st.integers(0, 10**6), max_size=8), overlap=st.booleans())
def test_verdicts_depend_on_the_text_alone(
    alone: tuple[FakeVllm, str], text: str, places: list[int], overlap: bool
) -> None:
    async def both() -> tuple[list[TokenVerdict], list[TokenVerdict]]:
        async with VllmStreamGuard(VllmStreamConfig(urls=(alone[1],), debounce=1)) as guard:
            whole = await streamed(guard.open(PROMPT), [text])
            session, pieces = guard.open(PROMPT), cut(text, places)
            if not overlap:
                return whole, await streamed(session, pieces)
            parts = await asyncio.gather(*map(session.feed, pieces), session.finish())
            return whole, [verdict for part in parts for verdict in part]

    whole, pieced = asyncio.run(both())

    assert_same(pieced, whole)
    assert whole[-1].span.end == len(text)


# --- what it costs ------------------------------------------------------------------------------------------------


async def test_a_piece_costs_its_own_tokens_and_an_unfinished_block(make: Make, server: FakeVllm) -> None:
    server.window = 4096
    guard = make()
    session = guard.open(PROMPT)
    await session.feed(LONG[:200])
    for start in range(200, 500, 7):
        judged, computed = guard.metrics().tokens_judged, guard.metrics().tokens_computed
        await session.feed(LONG[start : start + 7])
        new = guard.metrics().tokens_judged - judged
        assert guard.metrics().tokens_computed - computed <= new + BLOCK - 1

    metrics = guard.metrics()
    assert metrics.tokens_computed == sum(server.computed)
    assert metrics.tokens_sent == sum(len(ask.ids) for ask in server.asked) > 5 * metrics.tokens_computed
    assert metrics.repeated == 0


async def test_a_session_begins_with_what_the_judged_prompt_left_in_the_cache(make: Make, server: FakeVllm) -> None:
    guard = make()
    context = Conversation.of("the quick brown fox jumps over the lazy dog, and then the other dogs jump over")
    await guard.judge(context)
    prompt = server.computed.pop()

    await guard.open(context).feed("Sure, they jump.")

    assert server.computed[0] < prompt


async def test_logits_that_the_cache_swallows_are_asked_for_again_and_then_the_session_has_its_own(
    make: Make, own: Qwen3StreamGuard, server: FakeVllm
) -> None:
    guard = make()
    pieces = cut(LONG[:150], list(range(0, 150, 20)))
    first = await streamed(guard.open(PROMPT), pieces)
    before = guard.metrics().tokens_computed
    second = await streamed(guard.open(PROMPT), pieces)

    assert_same(second, first)
    assert guard.metrics().repeated == 1
    assert len({ask.salt for ask in server.asked}) == 2
    longest = max(len(ask.ids) for ask in server.asked)
    assert guard.metrics().tokens_computed - before <= before + longest


async def test_pieces_that_come_meanwhile_go_together(make: Make, server: FakeVllm) -> None:
    guard = make()
    await guard.judge(PROMPT)
    server.asked.clear()
    session = guard.open(PROMPT)

    parts = await asyncio.gather(*(session.feed(f"{word} ") for word in ANSWER.split()))
    rest = await session.finish()

    assert len(server.asked) <= 3
    assert [bool(part) for part in parts[2:]] == [False] * (len(parts) - 2)
    spans = [verdict.span for part in (*parts, rest) for verdict in part]
    assert (spans[0].start, spans[-1].end) == (0, len(ANSWER) + 1)
    assert all(before.end == after.start for before, after in pairwise(spans))


async def test_sessions_of_many_texts_do_not_mix(make: Make, own: Qwen3StreamGuard, server: FakeVllm) -> None:
    guard = make()
    texts = [f"{number}: {LINES[number]}" for number in range(8)]

    ours = await asyncio.gather(*(streamed(guard.open(PROMPT), cut(text, [5, 9, 30])) for text in texts))

    for text, verdicts in zip(texts, ours, strict=True):
        assert_same(verdicts, await streamed(own.open(PROMPT), [text]))
    assert server.described == 1


async def test_without_a_prefix_cache_all_is_the_same_but_the_cost(
    make: Make, own: Qwen3StreamGuard, server: FakeVllm
) -> None:
    server.caching = False
    guard = make()

    assert_same(await streamed(guard.open(PROMPT), ["a", "b c"]), await streamed(own.open(PROMPT), ["ab c"]))
    assert guard.metrics().tokens_computed == guard.metrics().tokens_sent


# --- failures -----------------------------------------------------------------------------------------------------

BUSY = Reply.error(503, "starting", headers={"retry-after": "0"})


@pytest.mark.parametrize(
    "trouble",
    [
        BUSY,
        Reply.error(500, "engine dead"),
        Reply((Die(),)),
        Reply.error(429, "too many", headers={"retry-after": "0"}),
    ],
    ids=["starting", "broken", "gone", "busy"],
)
async def test_a_server_that_fails_in_the_middle_of_a_text_is_asked_again(
    make: Make, own: Qwen3StreamGuard, server: FakeVllm, trouble: Reply
) -> None:
    guard = make(rest_s=0.01, failures=2)
    session = guard.open(PROMPT)
    verdicts = list(await session.feed(ANSWER[:30]))
    server.before = [trouble, trouble]
    server.cached.clear()

    verdicts += await streamed(session, [ANSWER[30:]])

    assert_same(verdicts, await streamed(own.open(PROMPT), [ANSWER]))
    assert guard.metrics().troubles >= 2


async def test_a_server_that_does_not_come_back_is_the_third_outcome(make: Make, server: FakeVllm) -> None:
    guard = make(rest_s=0.01, patience_s=0.2)
    session = guard.open(PROMPT)
    await session.feed(ANSWER)
    server.before = [Reply((Die(),))] * 10_000

    with pytest.raises(GuardUnavailable):
        await session.feed(" and on")
    with pytest.raises(SessionClosed):
        await session.feed(" and on")
    assert guard.sessions == 0


async def test_a_server_that_is_silent_is_the_third_outcome(make: Make, server: FakeVllm) -> None:
    server.before = [Reply((Hang(),))] * 10_000
    guard = make(timeout_s=0.05, patience_s=0.2, failures=1000)

    with pytest.raises(GuardTimeout):
        await guard.judge(PROMPT)


async def test_nobody_there(tmp_path: Path) -> None:
    async with VllmStreamGuard(VllmStreamConfig(urls=("http://127.0.0.1:9",), patience_s=0.1)) as guard:
        with pytest.raises(GuardUnavailable):
            await guard.judge(PROMPT)


@pytest.mark.parametrize("status", [400, 401, 404])
async def test_what_would_be_refused_again_is_not_asked_again(make: Make, server: FakeVllm, status: int) -> None:
    server.before = [Reply.error(status, "no")]
    guard = make()

    with pytest.raises(GuardUnavailable, match=f"status {status}.*Tidegate installed"):
        await guard.judge(PROMPT)
    await guard.judge(PROMPT)
    server.before = [Reply.error(status, "no")]
    with pytest.raises(GuardUnavailable, match=f"status {status}"):
        await guard.judge(PROMPT)
    assert guard.metrics().troubles == 0


@pytest.mark.parametrize("data", [{}, [], {"data": None}, {"data": {"window": 3}}, {"data": [[0.5]]}])
async def test_an_answer_of_another_form_is_unreadable(make: Make, server: FakeVllm, data: Any) -> None:
    guard = make()
    server.before = [Reply.json(data)]
    with pytest.raises(UnreadableVerdict, match="plugin"):
        await guard.judge(PROMPT)

    await guard.judge(PROMPT)
    server.before = [Reply.json(data)]
    with pytest.raises(UnreadableVerdict, match="plugin"):
        await guard.judge(PROMPT)


async def test_logits_that_a_server_lost_are_asked_for_again_and_not_for_ever(make: Make, server: FakeVllm) -> None:
    guard = make()
    server.forgets = 2
    verdict = await guard.judge(PROMPT)
    assert guard.metrics().repeated == 2
    assert verdict == await guard.judge(PROMPT)

    server.forgets = 100
    with pytest.raises(UnreadableVerdict, match="0 of 1 tokens"):
        await guard.judge(PROMPT)
    assert server.forgets > 90


async def test_more_logits_than_were_wanted_are_unreadable(make: Make, server: FakeVllm) -> None:
    guard = make()
    await guard.judge(PROMPT)
    many = Answer.of(np.zeros((2, 12), np.float32), (3, 9), computed=2, served=server.description().served)
    server.before = [Reply.json({"data": many.model_dump()})]

    with pytest.raises(UnreadableVerdict, match="2 of 1 tokens"):
        await guard.judge(PROMPT)


async def test_a_model_that_changes_in_the_middle_is_noticed(make: Make, server: FakeVllm) -> None:
    session = make().open(PROMPT)
    await session.feed(ANSWER)
    risks = official_config()["response_risk_level_map"]
    server.labels = {"response_risk_level_map": {"0": risks["1"], "1": risks["0"], "2": risks["2"]}}

    with pytest.raises(GuardUnavailable, match="another model"):
        await session.feed(" and on")


async def test_labels_that_are_unknown_are_refused_unless_they_are_named(make: Make, server: FakeVllm) -> None:
    server.labels = {"response_category_map": {**official_config()["response_category_map"], "7": "Rudeness"}}

    with pytest.raises(GuardUnavailable, match="Rudeness"):
        await make().judge(PROMPT)
    verdicts = await streamed(make(custom=["Rudeness"]).open(PROMPT), [ANSWER])
    assert all(verdict.category for verdict in verdicts)


async def test_a_tokenizer_of_another_kind_is_refused(make: Make, server: FakeVllm) -> None:
    server.definition = "{}"
    with pytest.raises(GuardUnavailable, match="not a tokenizer"):
        await make().judge(PROMPT)


@pytest.mark.parametrize("name", ["", "tokenizer.json"])
async def test_a_tokenizer_that_the_server_lacks_is_named(
    make: Make, server: FakeVllm, folder: Path, name: str
) -> None:
    server.definition = ""
    with pytest.raises(GuardUnavailable, match="tokenizer: FOLDER"):
        await make().judge(PROMPT)

    assert (await make(tokenizer=str(folder / name)).judge(PROMPT)).guard == "vllm-stream/tiny"


async def test_a_session_that_is_closed_ends_its_request(make: Make, server: FakeVllm, upstream: FakeUpstream) -> None:
    guard = make()
    await guard.judge(PROMPT)
    server.before = [Reply((Hang(),))]
    session = guard.open(PROMPT)
    feeds = [asyncio.ensure_future(session.feed(ANSWER)), asyncio.ensure_future(session.feed(ANSWER))]
    await until(lambda: not server.before, "the request")

    session.close()

    for feed in feeds:
        with pytest.raises(SessionClosed):
            await feed
    await until(lambda: upstream.received[-1].cancelled, "the request to end")
    assert guard.sessions == 0


async def test_a_feed_that_is_cancelled_closes_the_session(make: Make, server: FakeVllm) -> None:
    guard = make()
    await guard.judge(PROMPT)
    server.before = [Reply((Hang(),))]
    session = guard.open(PROMPT)
    first, second = (asyncio.ensure_future(session.feed(text)) for text in (ANSWER, "b"))
    await until(lambda: not server.before, "the request")

    second.cancel()

    with pytest.raises(asyncio.CancelledError):
        await second
    with pytest.raises(SessionClosed):
        await first


async def test_no_more_sessions_than_may_be_open(make: Make, server: FakeVllm) -> None:
    guard = make(most_sessions=1)
    session = guard.open(None)
    with pytest.raises(GuardOverloaded):
        guard.open(None)

    session.close()

    guard.open(None).close()


async def test_a_guard_that_is_closed_judges_no_more(make: Make, server: FakeVllm) -> None:
    guard = make()
    session = guard.open(PROMPT)
    await session.feed("a")
    await guard.close()

    with pytest.raises(GuardError):
        await session.feed("b c d")
    with pytest.raises(GuardUnavailable):
        await guard.judge(PROMPT)
    with pytest.raises(GuardUnavailable):
        guard.open(PROMPT)


# --- several servers ----------------------------------------------------------------------------------------------


async def test_a_session_stays_with_its_server_and_leaves_it_when_it_fails() -> None:
    fakes = [FakeVllm(), FakeVllm()]
    upstreams = [FakeUpstream(fake) for fake in fakes]
    with serving(upstreams[0]) as one, serving(upstreams[1]) as other:
        async with VllmStreamGuard(VllmStreamConfig(urls=(one, other))) as guard:
            session = guard.open(PROMPT)
            whole = [verdict for number in range(6) for verdict in await session.feed(f"{number} dogs jump ")]
            (mine,) = [number for number, fake in enumerate(fakes) if fake.asked]
            fakes[mine].before = [Reply.error(500, "dead")]
            whole += await session.feed("over the fox")
            whole += await session.finish()

            assert fakes[1 - mine].asked
            assert guard.metrics().troubles == 0
            assert whole[-1].span.end == len("".join(f"{number} dogs jump " for number in range(6)) + "over the fox")


async def test_servers_that_serve_different_things_are_refused() -> None:
    fakes = [FakeVllm(), FakeVllm(window=WINDOW // 2)]
    with serving(FakeUpstream(fakes[0])) as one, serving(FakeUpstream(fakes[1])) as other:
        async with VllmStreamGuard(VllmStreamConfig(urls=(one, other))) as guard:
            judged = await asyncio.gather(*(guard.judge(PROMPT) for _ in range(3)), return_exceptions=True)
            refused = [error for error in judged if isinstance(error, GuardUnavailable)]
            assert 0 < len(refused) < 3
            assert all("another model" in str(error) for error in refused)


async def test_the_pool_asks_the_one_that_is_named_first(upstream_url: str) -> None:
    pool = ServerPool((upstream_url, upstream_url + "/x"), path="")

    async def which(server: Any) -> str:
        return str(server.url)

    assert [await pool.run(which, first=pool.servers[1]) for _ in range(3)] == [upstream_url + "/x"] * 3


# --- specs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "urls", "model"),
    [
        ("http://gpu:8000", ("http://gpu:8000",), None),
        ("http://gpu:8000/v1/", ("http://gpu:8000",), None),
        ("https://a/guard,http://b#stream", ("https://a/guard", "http://b"), "stream"),
    ],
)
def test_a_spec_is_addresses_and_perhaps_a_model(spec: str, urls: tuple[str, ...], model: str | None) -> None:
    config = read_config(spec)

    assert (config.urls, config.model) == (urls, model)


@pytest.mark.parametrize(
    "spec", ["", "http://", "http://a,", "http://a#", "ftp://a", "http://a,http://a/v1", "no.yaml"]
)
def test_a_spec_that_is_wrong_says_so(spec: str) -> None:
    with pytest.raises(InputError):
        load_guard(f"vllm-stream:{spec}")


async def test_a_file_says_the_rest_and_the_key_is_sent(
    tmp_path: Path, server: FakeVllm, upstream: FakeUpstream, upstream_url: str
) -> None:
    (tmp_path / "key").write_text("sesame\n")
    file = tmp_path / "guard.yaml"
    file.write_text(f"urls: [{upstream_url}]\nmodel: tiny\nkey_file: {tmp_path / 'key'}\npatience_s: 5\n")
    guard = load_vllm_stream(str(file))

    verdict = await guard.judge(PROMPT)
    await guard.close()

    assert verdict.guard == "vllm-stream/tiny"
    assert upstream.received[-1].headers["authorization"] == "Bearer sesame"
    assert upstream.received[-1].body["model"] == "tiny"
    assert upstream.received[-1].path == "/pooling"


@pytest.mark.parametrize("line", ["colour: red", "patience_s: 0", "urls: []", "debounce: 0"])
def test_a_file_that_is_wrong_says_where(tmp_path: Path, line: str) -> None:
    file = tmp_path / "guard.yaml"
    key = line.partition(":")[0]
    file.write_text(f"{line}\n" if key == "urls" else f"urls: ['http://a']\n{line}\n")

    with pytest.raises(InputError, match=key):
        load_vllm_stream(str(file))


# --- on the wire --------------------------------------------------------------------------------------------------


@given(rows=st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=11, max_size=11), max_size=5))
def test_rows_come_back_as_they_were_sent(rows: list[list[float]]) -> None:
    array = np.asarray(rows, np.float32).reshape(-1, 11)
    sent = Answer.of(array, (3, 8), computed=7, served="x").model_dump()

    risk, category = read(Answer, {"data": json.loads(json.dumps(sent))}).logits()

    assert np.array_equal(np.concatenate([risk, category], -1), array)


@pytest.mark.parametrize("rows", ["?", "AAAA", "AACAfw=="])
def test_rows_that_are_no_numbers_are_unreadable(rows: str) -> None:
    with pytest.raises(UnreadableVerdict):
        Answer(served="x", computed=1, classes=(1, 0), rows=rows).logits()


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_unreadable(number: float) -> None:
    rows = np.full((1, 11), number, np.float32)
    with pytest.raises(UnreadableVerdict, match="finite"):
        Answer.of(rows, (3, 8), computed=1, served="x").logits()


def test_a_tokenizer_comes_back_as_it_was_sent_and_a_broken_one_is_unreadable() -> None:
    description = FakeVllm().description()
    assert description.definition() == tiny_qwen_definition()
    assert description.tokenizer is not None

    for broken in ("?", "AAAA", description.tokenizer[:-8]):
        with pytest.raises(UnreadableVerdict):
            description.model_copy(update={"tokenizer": broken}).definition()


def test_what_is_served_changes_with_what_answers_mean() -> None:
    changed = [FakeVllm(), FakeVllm(window=48), FakeVllm(definition="{}"), FakeVllm(definition="")]

    assert len({fake.description().served for fake in changed}) == len(changed)
    assert FakeVllm().description().served == FakeVllm().description().served


@pytest.mark.parametrize(
    "ask",
    [{"ids": []}, {"ids": [1], "first": 1}, {"ids": [-1]}, {"ids": [1], "target": "x"}, {"ids": [2**31]}, {"id": [1]}],
)
def test_what_cannot_be_asked_is_refused(ask: dict[str, Any]) -> None:
    with suppress(ValueError):
        Ask.model_validate(ask)
        raise AssertionError("it was taken")


def test_severities_are_read_by_the_labels_of_the_server() -> None:
    """The official order of ids is not that of severities."""
    config = FakeVllm().description().config
    assert [Severity.parse(config["response_risk_level_map"][str(number)]) for number in range(3)] == [
        Severity.SAFE,
        Severity.UNSAFE,
        Severity.CONTROVERSIAL,
    ]
