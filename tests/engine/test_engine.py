"""The engine from outside: many streams at once, answers to whom they belong, and nothing kept of who has left."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Callable

import numpy as np
import pytest
from numpy.typing import NDArray

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tidegate.engine.engine import Engine, Handle  # noqa: E402
from tidegate.engine.logits import Logits  # noqa: E402
from tidegate.engine.scheduler import Limits, Step  # noqa: E402
from tidegate.errors import (  # noqa: E402
    GuardError,
    GuardOverloaded,
    GuardTimeout,
    GuardUnavailable,
    InputError,
    SessionClosed,
    UnreadableVerdict,
)
from tidegate.model.stream import Qwen3ForGuardModel, stream_config  # noqa: E402
from tidegate.types import Target  # noqa: E402

VOCABULARY = 96
WINDOW = 48
LIMITS = Limits(tokens=32, chunk=16, waiting=400)


@pytest.fixture(scope="module")
def model() -> Qwen3ForGuardModel:
    torch.manual_seed(5)
    config = stream_config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=40,
        guard_inner_size=24,
        head_dim=8,
        max_position_embeddings=WINDOW,
    )
    model = Qwen3ForGuardModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3) if parameter.dim() > 1 else parameter.uniform_(0.5, 1.5)
    return model


@pytest.fixture
async def engine(model: Qwen3ForGuardModel) -> AsyncIterator[Engine]:
    """The books are checked after every forward: when they are wrong, the engine breaks, and the test with it."""
    async with Engine(model, positions=200, overlap=8, limits=LIMITS) as engine:
        compute = engine._compute

        def checked(step: Step) -> None:
            compute(step)
            check(engine)

        engine._compute = checked  # type: ignore[method-assign]
        yield engine
        check(engine)
        assert not engine.closed


def check(engine: Engine) -> None:
    with engine._wake:
        engine._scheduler.check()


class Gate:
    """Holds the worker before each forward until it is opened; may make the forward fail."""

    def __init__(self, engine: Engine) -> None:
        assert engine._runner is not None
        self.opened = threading.Semaphore(0)
        self.entered = threading.Semaphore(0)
        self.failure: Exception | None = None
        self._run = engine._runner.run
        engine._runner.run = self.run  # type: ignore[method-assign]

    def run(self, step: Step) -> list[Logits | None]:
        self.entered.release()
        assert self.opened.acquire(timeout=30)
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure
        return self._run(step)

    async def wait(self) -> None:
        assert await asyncio.to_thread(self.entered.acquire, timeout=30)

    def open(self, times: int = 1_000_000) -> None:
        self.opened.release(times)


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    powers = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return np.asarray(powers / powers.sum(-1, keepdims=True))


def full(model: Qwen3ForGuardModel, ids: list[int], target: Target = Target.RESPONSE) -> Logits:
    with torch.no_grad():
        risk, category, query_risk, query_category = model(torch.tensor([ids]))
    heads = (query_risk, query_category) if target is Target.PROMPT else (risk, category)
    return Logits(*(head[0].numpy() for head in heads))


def assert_same(got: Logits, expected: Logits, first: int = 0) -> None:
    for given, wanted in zip(got, expected, strict=True):
        assert given.dtype == np.float32
        assert given.shape == wanted[first:].shape
        assert np.abs(softmax(given) - softmax(wanted[first:])).max() <= 1e-5


def text(seed: int, count: int) -> list[int]:
    return [(seed * 13 + n * n * 7 + n) % VOCABULARY for n in range(count)]


async def test_many_streams_at_once_equal_each_alone(engine: Engine, model: Qwen3ForGuardModel) -> None:
    """Twelve streams in a cache that holds four: they are evicted, computed again, and nobody notices."""

    async def speak(seed: int) -> None:
        prompt, answer = text(seed, 5 + seed), text(seed + 100, 12 + seed)
        handle = engine.open(keep=len(prompt))
        judged = await handle.feed(prompt, Target.PROMPT, last_only=True)
        assert_same(judged, full(model, prompt, Target.PROMPT), first=len(prompt) - 1)
        got = []
        for start in range(0, len(answer), 1 + seed % 4):
            got.append(await handle.feed(answer[start : start + 1 + seed % 4]))
        whole = Logits(*(np.concatenate(parts) for parts in zip(*got, strict=True)))
        assert_same(whole, full(model, prompt + answer), first=len(prompt))
        assert handle.length == len(prompt + answer)
        handle.close()

    await asyncio.gather(*(speak(seed) for seed in range(12)))
    metrics = engine.metrics()
    assert metrics.evictions > 0
    assert metrics.tokens_recomputed > 0
    assert metrics.streams_computed > metrics.forwards, "no forward had two streams"
    assert metrics.last_batch_tokens <= LIMITS.tokens
    assert (metrics.streams, metrics.waiting_streams, metrics.waiting_tokens, metrics.cache_used) == (0, 0, 0, 0)


async def test_a_prefix_is_computed_but_not_judged(engine: Engine, model: Qwen3ForGuardModel) -> None:
    ids = text(1, 30)
    handle = engine.open(ids[:20])
    assert_same(await handle.feed(ids[20:]), full(model, ids), first=20)
    assert handle.length == 30


async def test_a_stream_rolls_back_and_goes_on(engine: Engine, model: Qwen3ForGuardModel) -> None:
    handle = engine.open()
    await handle.feed(text(1, 20))
    handle.crop(12)
    ids = text(1, 12) + text(9, 10)
    assert_same(await handle.feed(ids[12:]), full(model, ids), first=12)
    handle.crop(0)
    assert_same(await handle.feed(ids[:3]), full(model, ids[:3]))


async def test_a_stream_goes_on_beyond_the_window(engine: Engine, model: Qwen3ForGuardModel) -> None:
    """The first window is exact; a later one repeats the header and the last tokens; cutting changes nothing."""
    ids = text(3, 150)
    whole = await engine.open(ids[:5]).feed(ids[5:])
    pieces = engine.open(ids[:5])
    got = [await pieces.feed(ids[start : start + 11]) for start in range(5, 150, 11)]
    cut = Logits(*(np.concatenate(parts) for parts in zip(*got, strict=True)))
    assert_same(cut, whole)
    assert_same(Logits(*(head[: WINDOW - 5] for head in whole)), full(model, ids[:WINDOW]), first=5)
    second = full(model, ids[:5] + ids[WINDOW - 8 : WINDOW + 3])
    assert_same(Logits(*(head[WINDOW - 5 : WINDOW - 2] for head in whole)), second, first=13)


async def test_a_stream_rolls_back_over_the_edge_of_a_window(engine: Engine) -> None:
    ids = text(3, 80)
    expected = await engine.open().feed(ids)
    handle = engine.open()
    await handle.feed(ids[:40])
    assert handle.room == 8
    await handle.feed(text(7, 20))
    handle.crop(40)
    assert handle.room == 8
    assert_same(await handle.feed(ids[40:]), expected, first=40)


async def test_a_piece_may_be_longer_than_all_that_may_wait(engine: Engine) -> None:
    ids = text(2, LIMITS.waiting + 100)
    whole = await engine.open().feed(ids)
    pieces = engine.open()
    got = [await pieces.feed(ids[start : start + 35]) for start in range(0, len(ids), 35)]
    assert_same(Logits(*(np.concatenate(parts) for parts in zip(*got, strict=True))), whole)
    last = await engine.open().feed(ids, last_only=True)
    assert_same(last, whole, first=len(ids) - 1)


async def test_a_piece_that_is_refused_in_its_middle_leaves_nothing(engine: Engine, model: Qwen3ForGuardModel) -> None:
    handle = engine.open()
    await handle.feed(text(1, 10))
    submit, pieces = engine._scheduler.submit, 0

    def refuse_second(*args: object, **options: object) -> None:
        nonlocal pieces
        pieces += 1
        if pieces == 2:
            raise GuardOverloaded("too much")
        submit(*args, **options)  # type: ignore[arg-type]

    engine._scheduler.submit = refuse_second  # type: ignore[method-assign]
    with pytest.raises(GuardOverloaded):
        await handle.feed(text(5, 100))
    assert handle.length == 10
    assert_same(await handle.feed(text(1, 20)[10:]), full(model, text(1, 20)), first=10)


async def test_a_prefix_that_can_never_wait_is_refused(engine: Engine) -> None:
    with pytest.raises(InputError, match="feed it"):
        engine.open(text(1, 300))


async def test_streams_come_speak_take_back_and_go_in_any_order(engine: Engine, model: Qwen3ForGuardModel) -> None:
    """Some are cancelled in the middle of a feed; all others are right to the last token, also when too much waited."""

    async def patiently(handle: Handle, new: list[int]) -> Logits:
        while True:
            try:
                return await handle.feed(new)
            except GuardOverloaded:
                await asyncio.sleep(0.001)

    async def live(seed: int) -> None:
        random = np.random.default_rng(seed)
        handle = engine.open()
        ids: list[int] = []
        while len(ids) < WINDOW - 12:
            new = [int(n) for n in random.integers(0, VOCABULARY, random.integers(1, 12))]
            if random.random() < 0.07:
                task = asyncio.create_task(handle.feed(new))
                await asyncio.sleep(random.random() * 0.01)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                handle.close()
                return
            logits = await patiently(handle, new)
            ids += new
            assert_same(logits, full(model, ids), first=len(ids) - len(new))
            if random.random() < 0.3:
                ids = ids[: int(random.integers(0, len(ids) + 1))]
                handle.crop(len(ids))
        handle.close()

    await asyncio.gather(*(live(seed) for seed in range(40)))
    metrics = engine.metrics()
    assert (metrics.streams, metrics.waiting_tokens, metrics.cache_used, metrics.failed) == (0, 0, 0, 0)


async def test_nothing_to_judge_gives_no_rows(engine: Engine) -> None:
    logits = await engine.open().feed([], Target.PROMPT)
    assert (logits.risk.shape, logits.category.shape) == ((0, 3), (0, 9))


async def test_several_event_loops_share_an_engine(engine: Engine, model: Qwen3ForGuardModel) -> None:
    def other(seed: int) -> None:
        async def speak() -> None:
            handle = engine.open()
            ids = text(seed, 25)
            await handle.feed(ids[:11])
            assert_same(await handle.feed(ids[11:]), full(model, ids), first=11)
            handle.close()

        asyncio.run(speak())

    await asyncio.gather(*(asyncio.to_thread(other, seed) for seed in range(4)))


async def test_who_is_cancelled_gives_everything_back_at_once(engine: Engine) -> None:
    gate = Gate(engine)
    handle = engine.open()
    task = asyncio.create_task(handle.feed(text(1, 30)))
    await gate.wait()
    assert engine.metrics().cache_used == 16
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    metrics = engine.metrics()
    assert (metrics.streams, metrics.waiting_tokens, metrics.cache_used, metrics.cache_reserved) == (0, 0, 0, 0)
    gate.open()
    assert handle.closed
    with pytest.raises(SessionClosed):
        await handle.feed([1])


async def test_a_stream_may_be_closed_while_it_is_judged(engine: Engine, model: Qwen3ForGuardModel) -> None:
    gate = Gate(engine)
    handle, neighbour = engine.open(), engine.open()
    first = asyncio.create_task(handle.feed(text(1, 5)))
    await gate.wait()
    second = asyncio.create_task(neighbour.feed(text(2, 5)))
    handle.close()
    with pytest.raises(SessionClosed, match="while it was judged"):
        await first
    gate.open()
    assert_same(await second, full(model, text(2, 5)))


async def test_a_stream_takes_one_piece_at_a_time(engine: Engine, model: Qwen3ForGuardModel) -> None:
    gate = Gate(engine)
    handle = engine.open()
    task = asyncio.create_task(handle.feed(text(1, 5)))
    await gate.wait()
    with pytest.raises(GuardError, match="one piece at a time"):
        await handle.feed([1])
    with pytest.raises(GuardError, match="one piece at a time"):
        handle.crop(0)
    gate.open()
    assert_same(await task, full(model, text(1, 5)))


async def test_too_much_waiting_is_refused_and_the_stream_goes_on(engine: Engine, model: Qwen3ForGuardModel) -> None:
    gate = Gate(engine)
    tasks = [asyncio.create_task(engine.open().feed(text(n, 40))) for n in range(10)]
    late = engine.open()
    await gate.wait()
    with pytest.raises(GuardOverloaded, match="tokens wait already"):
        await late.feed([1, 2])
    assert engine.metrics().refused == 1
    assert engine.metrics().waiting_streams == 10
    assert engine.metrics().longest_wait_seconds > 0
    gate.open()
    await asyncio.gather(*tasks)
    assert_same(await late.feed([1, 2]), full(model, [1, 2]))


async def test_a_forward_that_fails_fails_its_streams_alone(engine: Engine, model: Qwen3ForGuardModel) -> None:
    idle = engine.open()
    await idle.feed(text(4, 10))
    gate = Gate(engine)
    gate.failure = RuntimeError("some text that must not be seen")
    handle = engine.open()
    task = asyncio.create_task(handle.feed(text(1, 5)))
    await gate.wait()
    gate.open()
    with pytest.raises(GuardError, match=r"^the model could not compute: RuntimeError$"):
        await task
    assert handle.closed
    assert engine.metrics().failed == 1
    assert_same(await idle.feed(text(4, 20)[10:]), full(model, text(4, 20)), first=10)


async def test_a_failure_while_the_cache_is_moved_loses_no_stream(engine: Engine, model: Qwen3ForGuardModel) -> None:
    """Whose cache was in the way is computed again, because nobody knows how far the copying came."""
    handles = [engine.open() for _ in range(5)]
    for seed, handle in enumerate(handles):
        await handle.feed(text(seed, 25))
    assert engine._runner is not None
    run = engine._runner.run

    def move_halfway(step: Step) -> list[Logits | None]:
        if not step.moves:
            return run(step)
        assert engine._runner is not None
        engine._runner._keys.fill_(1e9)
        raise RuntimeError("out of memory")

    engine._runner.run = move_halfway  # type: ignore[method-assign]
    results = []
    for seed, handle in enumerate(handles):
        results.append(await asyncio.gather(handle.feed(text(seed, 48)[25:]), return_exceptions=True))
    failures = [result for (result,) in results if isinstance(result, BaseException)]
    assert [str(failure) for failure in failures] == ["the model could not compute: RuntimeError"]
    for seed, (result,) in enumerate(results):
        if not isinstance(result, BaseException):
            assert_same(result, full(model, text(seed, 48)), first=25)


async def test_a_forward_waits_a_moment_for_streams_that_are_about_to_speak(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = engine.open(), engine.open()
    await asyncio.gather(first.feed([1]), second.feed([1]))
    monkeypatch.setattr("tidegate.engine.engine._LINGER_SECONDS", 30.0)
    monkeypatch.setattr("tidegate.engine.engine._LINGER_SHARE", 1e9)
    task = asyncio.create_task(first.feed([2]))
    await asyncio.sleep(0.05)
    assert engine.metrics().waiting_streams == 1
    await asyncio.gather(task, second.feed([3]))
    assert engine.metrics().last_batch_streams == 2
    second.close()
    await asyncio.wait_for(first.feed([4]), 10)


async def test_the_memory_of_a_cache_that_nobody_uses_is_given_back(
    engine: Engine, model: Qwen3ForGuardModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tidegate.engine.engine._GIVE_BACK_SECONDS", 0.01)
    runner = engine._runner
    assert runner is not None
    give_back, given = runner.give_back, threading.Event()

    def noticed() -> None:
        assert engine.metrics().cache_reserved == 0
        give_back()
        given.set()

    monkeypatch.setattr(runner, "give_back", noticed)
    ids = text(3, 30)
    first, second = engine.open(), engine.open()
    for handle in (first, second):
        await handle.feed(ids[:20])
    first.close()
    assert not await asyncio.to_thread(given.wait, 0.1)
    assert_same(await second.feed(ids[20:]), full(model, ids), first=20)
    second.close()
    assert await asyncio.to_thread(given.wait, 10)
    assert_same(await engine.open().feed(ids), full(model, ids))


async def test_an_engine_that_cannot_give_memory_back_goes_on(
    engine: Engine, model: Qwen3ForGuardModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tidegate.engine.engine._GIVE_BACK_SECONDS", 0.01)
    tried = threading.Event()

    def refused() -> None:
        tried.set()
        raise RuntimeError("no address space")

    monkeypatch.setattr(engine._runner, "give_back", refused)
    handle = engine.open()
    await handle.feed([1, 2])
    handle.close()
    assert await asyncio.to_thread(tried.wait, 10)
    assert_same(await engine.open().feed(text(4, 12)), full(model, text(4, 12)))


async def test_what_is_not_a_number_is_unreadable(model: Qwen3ForGuardModel) -> None:
    broken = Qwen3ForGuardModel(model.config).eval()
    broken.load_state_dict(model.state_dict())
    with torch.no_grad():
        broken.model.embed_tokens.weight[95] = float("inf")
    async with Engine(broken, positions=200, limits=LIMITS) as engine:
        good, bad = engine.open(), engine.open()
        results = await asyncio.gather(good.feed([1, 2]), bad.feed([1, 95]), return_exceptions=True)
        assert isinstance(results[1], UnreadableVerdict)
        assert not isinstance(results[0], BaseException)
        assert_same(results[0], full(model, [1, 2]))
        assert bad.closed
        assert not good.closed


async def test_a_defect_of_the_engine_leaves_nobody_waiting(model: Qwen3ForGuardModel) -> None:
    async with Engine(model, positions=200, limits=LIMITS) as engine:
        engine._scheduler.next = lambda: 1 / 0  # type: ignore[assignment, method-assign, return-value]
        with pytest.raises(GuardUnavailable, match="ZeroDivisionError"):
            await engine.open().feed([1])
        assert engine.closed
        with pytest.raises(GuardUnavailable):
            engine.open()


async def test_a_handle_that_is_forgotten_leaves_nothing_behind(engine: Engine) -> None:
    handle: Handle | None = engine.open()
    assert handle is not None
    await handle.feed(text(1, 20))
    assert engine.metrics().cache_used == 20
    handle = None
    gc.collect()
    assert engine.metrics().cache_used == 0
    assert engine.metrics().streams == 0


async def test_an_engine_has_a_bounded_number_of_streams(model: Qwen3ForGuardModel) -> None:
    async with Engine(model, positions=200, limits=LIMITS, most_streams=2) as engine:
        handles = [engine.open(), engine.open()]
        with pytest.raises(GuardOverloaded, match="2 streams"):
            engine.open()
        handles[0].close()
        engine.open()


async def test_health_goes_through_the_whole_engine(engine: Engine) -> None:
    assert 0 < await engine.health() < 30
    assert engine.metrics().streams == 0
    assert engine.metrics().cache_used == 0
    gate = Gate(engine)
    with pytest.raises(GuardTimeout):
        await engine.health(timeout_seconds=0.01)
    gate.open()


async def test_health_is_answered_although_too_much_waits(engine: Engine) -> None:
    gate = Gate(engine)
    tasks = [asyncio.create_task(engine.open().feed(text(n, 40))) for n in range(10)]
    await gate.wait()
    healthy = asyncio.create_task(engine.health())
    await asyncio.sleep(0)
    assert engine.metrics().waiting_tokens > LIMITS.waiting
    gate.open()
    await asyncio.gather(healthy, *tasks)


async def test_wrong_answers_are_not_healthy(model: Qwen3ForGuardModel) -> None:
    changed = Qwen3ForGuardModel(model.config).eval()
    changed.load_state_dict(model.state_dict())
    async with Engine(changed, positions=200, limits=LIMITS) as engine:
        with torch.no_grad():
            changed.model.layers[1].post_attention_layernorm.weight.mul_(3)
        with pytest.raises(GuardUnavailable, match="wrong"):
            await engine.health()


async def test_a_closed_engine_fails_what_waits_and_frees_its_cache(model: Qwen3ForGuardModel) -> None:
    engine = Engine(model, positions=200, limits=LIMITS)
    handle = engine.open()
    gate = Gate(engine)
    task = asyncio.create_task(handle.feed(text(1, 5)))
    await gate.wait()
    closing = asyncio.create_task(engine.aclose())
    with pytest.raises(SessionClosed, match="the engine is closed"):
        await task
    gate.open()
    await closing
    await engine.aclose()
    assert engine._runner is None
    assert engine.metrics().cache_used == 0
    for call in (lambda: engine.open(), lambda: handle.crop(0)):
        with pytest.raises(SessionClosed):
            call()


@pytest.mark.parametrize("ids", [[-1], [VOCABULARY], [1, 2, 1000]])
async def test_ids_outside_the_vocabulary_are_refused_before_anything_happens(engine: Engine, ids: list[int]) -> None:
    handle = engine.open()
    with pytest.raises(InputError, match="vocabulary"):
        await handle.feed(ids)
    with pytest.raises(InputError, match="vocabulary"):
        engine.open(ids)
    assert handle.length == 0
    assert not handle.closed


@pytest.mark.parametrize("wrong", [-1, 6])
async def test_nobody_rolls_back_to_where_it_never_was(engine: Engine, wrong: int) -> None:
    handle = engine.open()
    await handle.feed(text(1, 5))
    with pytest.raises(InputError, match="has 5"):
        handle.crop(wrong)


@pytest.mark.parametrize(
    "settings",
    [
        {"window": WINDOW + 1},
        {"positions": 20, "window": 30},
        {"overlap": WINDOW},
        {"limits": Limits(waiting=190)},
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    model: Qwen3ForGuardModel, settings: dict[str, object]
) -> None:
    make: Callable[..., Engine] = Engine
    with pytest.raises(InputError):
        make(model, **{"positions": 200, **settings})


def test_a_cache_for_which_there_is_no_memory_is_refused(model: Qwen3ForGuardModel) -> None:
    with pytest.raises(GuardUnavailable, match="no memory"):
        Engine(model, positions=10**14)
