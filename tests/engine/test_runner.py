"""One forward for many streams: at every position what one full forward gives, however tokens are cut and mixed."""

from __future__ import annotations

import os

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tidegate.engine.logits import Logits  # noqa: E402
from tidegate.engine.runner import Runner  # noqa: E402
from tidegate.engine.scheduler import Limits, Piece, Scheduler, Step  # noqa: E402
from tidegate.engine.sequence import Sequence, Windows  # noqa: E402
from tidegate.engine.slots import Move, Slots  # noqa: E402
from tidegate.errors import GuardUnavailable  # noqa: E402
from tidegate.model.stream import Qwen3ForGuardModel, stream_config  # noqa: E402
from tidegate.types import Target  # noqa: E402

VOCABULARY = 96
WINDOW = 48
SHAPES = {
    "one key head for two query heads": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    "one key head for all": {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 16},
    "as many key heads": {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 10},
}


def build(name: str, dtype: torch.dtype = torch.float32) -> Qwen3ForGuardModel:
    torch.manual_seed(5)
    config = stream_config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=3,
        intermediate_size=40,
        guard_inner_size=24,
        max_position_embeddings=WINDOW,
        **SHAPES[name],
    )
    model = Qwen3ForGuardModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3) if parameter.dim() > 1 else parameter.uniform_(0.5, 1.5)
    return model.to(dtype)


MODELS = {name: build(name) for name in SHAPES}


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    powers = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return np.asarray(powers / powers.sum(-1, keepdims=True))


def full(model: Qwen3ForGuardModel, ids: list[int], target: Target) -> Logits:
    with torch.no_grad():
        risk, category, query_risk, query_category = model(torch.tensor([ids]))
    heads = (query_risk, query_category) if target is Target.PROMPT else (risk, category)
    return Logits(*(head[0].float().numpy() for head in heads))


def compute(runner: Runner, scheduler: Scheduler) -> dict[int, list[Logits]]:
    """Run until nothing waits; the answers by stream."""
    answers: dict[int, list[Logits]] = {}
    while scheduler.waiting:
        step = scheduler.next()
        for piece, logits in zip(step.pieces, runner.run(step), strict=True):
            assert logits is not None
            answers.setdefault(id(piece.sequence), []).append(logits)
        scheduler.finish(step)
        scheduler.check()
    return answers


def assert_same(given: list[Logits], expected: Logits, tolerance: float = 1e-5) -> None:
    for head, parts in zip(expected, zip(*given, strict=True), strict=True):
        got = np.concatenate(parts)
        assert got.shape == head.shape
        assert np.abs(softmax(got) - softmax(head)).max() <= tolerance


streams = st.lists(
    st.tuples(
        st.lists(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=20), min_size=1, max_size=3),
        st.sampled_from(Target),
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from(sorted(SHAPES)),
    texts=streams,
    tokens=st.integers(1, 40),
    chunk=st.integers(1, 24),
    positions=st.integers(WINDOW, 3 * WINDOW),
)
def test_every_batching_and_chunking_equals_one_full_forward(
    shape: str, texts: list[tuple[list[list[int]], Target]], tokens: int, chunk: int, positions: int
) -> None:
    """Also with a cache so small that streams are moved, evicted and computed again."""
    model = MODELS[shape]
    runner = Runner(model, positions)
    scheduler = Scheduler(Slots(positions, WINDOW), Limits(tokens=tokens, chunk=chunk, short=4, patience=2))
    sequences = [Sequence(Windows(WINDOW, 8)) for _ in texts]
    got: dict[int, list[Logits]] = {}
    for turn in range(3):
        for sequence, (feeds, target) in zip(sequences, texts, strict=True):
            feed = feeds[turn] if turn < len(feeds) else []
            if feed and len(sequence.tokens) + len(feed) <= WINDOW:
                scheduler.submit(sequence, feed, target)
        for key, logits in compute(runner, scheduler).items():
            got.setdefault(key, []).extend(logits)
    for sequence, (_, target) in zip(sequences, texts, strict=True):
        assert_same(got[id(sequence)], full(model, sequence.tokens.tolist(), target))


def test_a_cache_that_is_given_back_takes_no_memory() -> None:
    runner, process = Runner(MODELS["one key head for all"], 500_000), psutil.Process()
    empty = process.memory_info().rss
    runner._keys.fill_(1.0)
    runner._values.fill_(1.0)
    assert process.memory_info().rss - empty > 0.9 * runner.cache_bytes
    runner.give_back()
    assert process.memory_info().rss - empty < 0.1 * runner.cache_bytes


@pytest.mark.parametrize("shape", SHAPES)
def test_a_stream_that_outgrows_its_window_equals_a_full_forward_of_each_window(shape: str) -> None:
    model = MODELS[shape]
    ids = [(5 * n * n + 3 * n) % VOCABULARY for n in range(130)]
    windows = Windows(WINDOW, 8, keep=6)
    sequence = Sequence(windows)
    runner = Runner(model, WINDOW)
    scheduler = Scheduler(Slots(WINDOW, WINDOW), Limits(tokens=16, chunk=7))
    scheduler.submit(sequence, ids, Target.RESPONSE)
    (got,) = compute(runner, scheduler).values()
    risk = np.concatenate([part.risk for part in got])
    assert len(risk) == 130
    for index in range(130):
        number = windows.number(index)
        seen = ids[: index + 1] if not number else ids[:6] + ids[windows.seen(number) : index + 1]
        assert len(seen) <= WINDOW
        expected = full(model, seen, Target.RESPONSE).risk[-1]
        assert np.abs(softmax(risk[index]) - softmax(expected)).max() <= 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_a_neighbour_changes_a_stream_by_rounding_at_most(shape: str) -> None:
    model = MODELS[shape]
    ids = list(range(30))

    def run(neighbours: int) -> Logits:
        runner = Runner(model, 400)
        scheduler = Scheduler(Slots(400, WINDOW), Limits(chunk=16))
        sequences = [Sequence(Windows(WINDOW, 8)) for _ in range(1 + neighbours)]
        for number, sequence in enumerate(sequences):
            fed = ids if not number else [(n * 7 + number) % VOCABULARY for n in range(10 * number)]
            scheduler.submit(sequence, fed, Target.RESPONSE)
        parts = compute(runner, scheduler)[id(sequences[0])]
        return Logits(np.concatenate([part.risk for part in parts]), np.concatenate([part.category for part in parts]))

    alone = run(0)
    assert_same([run(4)], alone, 2e-6)
    assert np.array_equal(run(0).risk, alone.risk)


def test_only_what_is_asked_for_is_given() -> None:
    model = MODELS["one key head for all"]
    runner = Runner(model, 64)
    sequence = Sequence(Windows(WINDOW, 8))
    piece = Piece(sequence, 10, 0, [3, 1, 4, 1, 5], 2, Target.PROMPT)
    other = Piece(sequence, 20, 0, [9, 2], 0, Target.RESPONSE)
    first, second = runner.run(Step((piece, other), ()))
    assert first is not None
    assert second is not None
    expected = full(model, [3, 1, 4, 1, 5], Target.PROMPT)
    assert_same([first], Logits(expected.risk[-2:], expected.category[-2:]))
    assert (second.risk.shape, second.category.shape) == ((0, 3), (0, 8))


@pytest.mark.parametrize("target", [0, 3, 10, 25])
def test_a_moved_cache_is_the_same_cache(target: int) -> None:
    model = MODELS["one key head for two query heads"]
    runner = Runner(model, 40)
    sequence = Sequence(Windows(WINDOW, 8))
    runner.run(Step((Piece(sequence, 5, 0, list(range(12)), 0, Target.RESPONSE),), ()))
    (got,) = runner.run(Step((Piece(sequence, target, 12, [50, 51], 2, Target.RESPONSE),), (Move(5, target, 12),)))
    assert got is not None
    expected = full(model, [*range(12), 50, 51], Target.RESPONSE)
    assert_same([got], Logits(expected.risk[-2:], expected.category[-2:]))


def test_what_is_not_a_number_is_no_answer_and_spares_the_neighbour() -> None:
    model = build("one key head for all")
    with torch.no_grad():
        model.model.embed_tokens.weight[13] = float("nan")
    runner = Runner(model, 64)
    sequence = Sequence(Windows(WINDOW, 8))
    bad = Piece(sequence, 0, 0, [1, 13, 2], 1, Target.RESPONSE)
    unseen = Piece(sequence, 10, 0, [1, 2, 13], 0, Target.RESPONSE)
    good = Piece(sequence, 20, 0, [1, 2], 2, Target.RESPONSE)
    results = runner.run(Step((bad, unseen, good), ()))
    assert results[0] is None
    assert results[1] is None
    assert results[2] is not None
    assert_same([results[2]], full(model, [1, 2], Target.RESPONSE))


@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_stays_near_the_full_forward(shape: str) -> None:
    """Probabilities within 0.05: bfloat16 keeps eight bits, and orders of summation differ."""
    model = build(shape, torch.bfloat16)
    ids = [(n * n + 1) % VOCABULARY for n in range(40)]
    runner = Runner(model, 100)
    scheduler = Scheduler(Slots(100, WINDOW), Limits(chunk=7))
    sequences = [Sequence(Windows(WINDOW, 8)) for _ in range(2)]
    for sequence in sequences:
        scheduler.submit(sequence, ids, Target.RESPONSE)
    for got in compute(runner, scheduler).values():
        assert_same(got, full(model, ids, Target.RESPONSE), 0.05)


@pytest.mark.skipif(
    "TIDEGATE_FULL_SIZE" not in os.environ, reason="only on demand: TIDEGATE_FULL_SIZE=1; 4 GB of memory"
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_the_smallest_released_shape_equals_one_full_forward(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    config = stream_config(
        vocab_size=151936,
        hidden_size=1024,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        intermediate_size=3072,
        guard_inner_size=512,
        head_dim=128,
    )
    torch.set_default_dtype(dtype)
    try:
        model = Qwen3ForGuardModel(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_head.weight"):
                parameter.mul_(5)
    runner = Runner(model, 700)
    scheduler = Scheduler(Slots(700, 600), Limits(tokens=96, chunk=50))
    generator = np.random.default_rng(0)
    texts = [[int(n) for n in generator.integers(0, 151936, count)] for count in (150, 33, 1, 90)]
    sequences = [Sequence(Windows(600, 64)) for _ in texts]
    for sequence, ids in zip(sequences, texts, strict=True):
        scheduler.submit(sequence, ids, Target.RESPONSE)
    got = compute(runner, scheduler)
    for sequence, ids in zip(sequences, texts, strict=True):
        assert_same(got[id(sequence)], full(model, ids, Target.RESPONSE), tolerance)


def test_a_model_with_sliding_windows_is_refused() -> None:
    config = MODELS["one key head for all"].config.to_dict()
    config |= {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "layer_types": None}
    model = Qwen3ForGuardModel(Qwen3ForGuardModel.config_class(**config))
    with pytest.raises(GuardUnavailable, match="sliding"):
        Runner(model, 64)
