"""The edge guard: exact under any cutting and any company, windows that skip nothing, and failures that say so."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edge_folder import LINES, tiny_edge_folder
from streams import assert_same, cut, streamed, values
from tidegate.errors import GuardError, GuardOverloaded, GuardUnavailable, InputError, SessionClosed, UnreadableVerdict
from tidegate.guards import StreamGuard, edge, list_guards, load_guard
from tidegate.guards.edge import EdgeGuard
from tidegate.guards.edge_config import Row, Thresholds
from tidegate.guards.edge_engine import Engine, Logits, _empty
from tidegate.guards.edge_engine import Sequence as CachedSequence
from tidegate.model.tokens import CONTROL_TOKENS, IncrementalTokens
from tidegate.types import (
    PROMPT_CATEGORIES,
    RESPONSE_CATEGORIES,
    Conversation,
    Probabilities,
    Role,
    Severity,
    Span,
    Target,
    TokenVerdict,
    ToolCall,
    Turn,
    Verdict,
)

NOISE = 1e-5
"""Largest difference of a probability that fp32 may make when it adds in another order."""
PROMPT = Conversation.of("how do i bake bread at home")
CONTROL_WORDS = " ".join(CONTROL_TOKENS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_edge_folder(tmp_path_factory.mktemp("edge"))


@pytest.fixture
async def guard(folder: Path) -> AsyncIterator[EdgeGuard]:
    async with EdgeGuard(folder) as guard:
        yield guard


@pytest.fixture(scope="module")
def shared(folder: Path) -> EdgeGuard:
    """A guard for tests that run an event loop for each of many examples."""
    return EdgeGuard(folder)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition, for half a minute at most."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def long_text(tokens: int, guard: EdgeGuard, seed: int = 1) -> str:
    """Words of many languages, of at least so many tokens."""
    rng = random.Random(seed)
    words = [word for line in LINES for word in line.split()]
    text = ""
    while len(guard.tokenizer.encode(text)) < tokens:
        text += " " + " ".join(rng.choices(words, k=20))
    return text


class SlowEngine:
    """Lets the engine's runs begin only when told to, so that a test decides what waits."""

    def __init__(self, guard: EdgeGuard, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go = threading.Event()
        self.entered = threading.Event()
        self.sizes: list[int] = []
        run = guard._engine._run

        def held(batch: list[object]) -> object:
            self.sizes.append(len(batch))
            self.entered.set()
            assert self.go.wait(30)
            return run(batch)  # type: ignore[arg-type]

        monkeypatch.setattr(guard._engine, "_run", held)


# --- exactness


async def test_character_by_character_equals_at_once_over_several_windows(guard: EdgeGuard) -> None:
    text = long_text(200, guard)
    assert_same(await streamed(guard.open(PROMPT), [text]), await streamed(guard.open(PROMPT), list(text)))


async def test_what_was_said_early_is_a_function_of_the_text_before_it(guard: EdgeGuard) -> None:
    start, one, other = long_text(60, guard), " and then it rains", " 明天可能会下雨 !!!"
    first = await streamed(guard.open(PROMPT), [start + one])
    second = await streamed(guard.open(PROMPT), [start + other])
    shared_tokens = sum(1 for v in first if v.span.end <= len(start) - 20)
    assert shared_tokens > 40
    assert_same(first[:shared_tokens], second[:shared_tokens])


async def test_sessions_side_by_side_equal_sessions_one_by_one(guard: EdgeGuard) -> None:
    rng = random.Random(4)
    texts = [long_text(rng.randint(1, 120), guard, seed) for seed in range(24)]
    prompts = [Conversation.of(long_text(rng.randint(1, 30), guard, seed + 99)) for seed in range(24)]
    cuts = [cut(text, [rng.randint(0, len(text)) for _ in range(12)]) for text in texts]
    alone = [await streamed(guard.open(p), c) for p, c in zip(prompts, cuts, strict=True)]
    together = await asyncio.gather(*(streamed(guard.open(p), c) for p, c in zip(prompts, cuts, strict=True)))
    for one, many in zip(alone, together, strict=True):
        assert_same(one, many)


async def test_prompts_side_by_side_equal_prompts_one_by_one(guard: EdgeGuard) -> None:
    conversations = [Conversation.of(long_text(n, guard, n)) for n in (1, 3, 20, 40, 90, 200)]
    alone = [await guard.judge(c) for c in conversations]
    together = await asyncio.gather(*(guard.judge(c) for c in conversations))
    for one, many in zip(alone, together, strict=True):
        assert values(one.probabilities) == pytest.approx(values(many.probabilities), abs=NOISE)


async def test_waiting_sessions_share_a_run(guard: EdgeGuard, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = SlowEngine(guard, monkeypatch)
    first = asyncio.create_task(guard.judge(Conversation.of("one")))
    await asyncio.to_thread(slow.entered.wait, 30)
    rest = [asyncio.create_task(guard.judge(Conversation.of("one more"))) for _ in range(8)]
    await until(lambda: guard._engine.waiting == 8)
    slow.go.set()
    await asyncio.gather(first, *rest)
    assert slow.sizes == [1, 8]


def test_what_is_kept_of_a_stream_goes_back_to_the_system_when_it_ends() -> None:
    """Also when it lies between what other streams keep."""
    rooms = [_empty((8, 4, 256, 64)) for _ in range(40)]
    for room in rooms:
        room.fill(1.0)
    process = psutil.Process()
    taken, size = process.memory_info().rss, sum(room.nbytes for room in rooms)
    del room, rooms[1::2]
    assert taken - process.memory_info().rss > 0.4 * size


# --- what is judged


async def test_a_verdict_names_guard_target_and_all_categories(guard: EdgeGuard) -> None:
    prompt, answer = await guard.judge(Conversation.of("hello")), await guard.judge(Conversation.of("hello", "world"))
    assert (prompt.target, answer.target) == (Target.PROMPT, Target.RESPONSE)
    assert prompt.guard == answer.guard == guard.name == "tiny/0"
    assert set(prompt.category_probabilities) == set(PROMPT_CATEGORIES)
    assert set(answer.category_probabilities) == set(RESPONSE_CATEGORIES)
    assert sum(prompt.category_probabilities.values()) == pytest.approx(1)
    assert prompt.span is None
    assert prompt.refusal is None


async def test_a_whole_answer_is_judged_as_its_stream_ends(guard: EdgeGuard) -> None:
    whole = await guard.judge(PROMPT.then(Turn(Role.ASSISTANT, "it is warm in the sun")))
    stream = await streamed(guard.open(PROMPT), ["it is warm in the sun"])
    assert values(whole.probabilities) == pytest.approx(values(stream[-1].probabilities), abs=NOISE)
    assert whole.severity is stream[-1].severity


async def test_the_last_verdict_of_a_stream_covers_no_character_of_its_own(guard: EdgeGuard) -> None:
    *tokens, whole = await streamed(guard.open(PROMPT), ["a warm day"])
    assert whole.span == Span(10, 10)
    assert tokens[-1].span.end == 10
    assert whole.category in RESPONSE_CATEGORIES


@pytest.mark.parametrize("text", ["", "\u200b\u200b", "   "])
async def test_empty_text_is_judged_like_any_other(guard: EdgeGuard, text: str) -> None:
    verdicts = await streamed(guard.open(PROMPT), [text])
    assert verdicts[-1].span.end == len(text)
    assert (await guard.judge(Conversation.of(text))).probabilities.flagged > 0
    assert (await guard.judge(Conversation.of("hello", text))).probabilities.flagged > 0


async def test_what_a_system_or_a_tool_says_is_judged_as_if_a_user_had_written_it(guard: EdgeGuard) -> None:
    found = {
        values((await guard.judge(Conversation((Turn(role, "hello there"),)))).probabilities)
        for role in (Role.USER, Role.SYSTEM, Role.TOOL)
    }
    assert len(found) == 1


async def test_earlier_turns_are_not_part_of_a_prompt(guard: EdgeGuard) -> None:
    alone = await guard.judge(Conversation.of("hello"))
    later = await guard.judge(Conversation.of("before", "answer").then(Turn(Role.USER, "hello")))
    assert values(alone.probabilities) == pytest.approx(values(later.probabilities), abs=NOISE)


async def test_the_last_user_turn_is_the_context_of_an_answer(guard: EdgeGuard) -> None:
    answer = Turn(Role.ASSISTANT, "of course")
    tool = Turn(Role.TOOL, "sunny")
    first = await guard.judge(Conversation((Turn(Role.USER, "one"), Turn(Role.USER, "two"), tool, answer)))
    same = await guard.judge(Conversation((Turn(Role.USER, "two"), answer)))
    other = await guard.judge(Conversation((Turn(Role.USER, "one"), answer)))
    none = await guard.judge(Conversation((answer,)))
    assert values(first.probabilities) == pytest.approx(values(same.probabilities), abs=NOISE)
    assert len({values(v.probabilities) for v in (same, other, none)}) == 3


async def test_of_a_long_context_head_and_tail_are_kept(guard: EdgeGuard) -> None:
    control, limit = guard.tokenizer.control, guard.config.context
    text = long_text(5 * limit, guard)
    ids = [token.id for token in guard.tokenizer.encode(text)]
    header = await guard._template.header([Turn(Role.USER, text)])
    half = limit // 2
    assert list(header) == [control["<|user|>"], *ids[:half], control["<|more|>"], *ids[-half:], control["<|end|>"]]


LONG_PARTS = (
    "word ",
    "wörter ",
    "aaaaaaaa",
    "  \n\n",
    "日本語のテキスト",
    "x",
    "12345678",
    "!!!!! ",
    "\u200b",
    "\ud83d",
    "\ude00",
    "ab" * 40,
)


@settings(deadline=None, max_examples=60)
@given(parts=st.lists(st.tuples(st.sampled_from(LONG_PARTS), st.integers(1, 900)), max_size=12))
@example(parts=[("\u200b", 20_000), ("word ", 3)])
@example(parts=[("word ", 2000), ("日本語のテキスト", 900)])
@example(parts=[("word ", 2000), ("ab" * 40, 200), ("\ud83d", 1)])
@example(parts=[("日本語のテキスト", 2000), ("aaaaaaaa", 900), ("word ", 900)])
def test_the_header_of_any_long_context_equals_that_of_all_its_tokens(
    shared: EdgeGuard, parts: list[tuple[str, int]]
) -> None:
    """Though only its ends are tokenized where that is possible."""
    text = "".join(part * count for part, count in parts)
    control, limit = shared.tokenizer.control, shared.config.context
    ids = [token.id for token in shared.tokenizer.encode(text)]
    half = limit // 2
    if len(ids) > limit:
        ids = [*ids[:half], control["<|more|>"], *ids[len(ids) - (limit - half) :]]

    header = asyncio.run(shared._template.header([Turn(Role.USER, text)]))

    assert list(header) == ([control["<|user|>"], *ids, control["<|end|>"]] if text else [])


async def test_the_middle_of_a_long_context_is_not_tokenized(guard: EdgeGuard, monkeypatch: pytest.MonkeyPatch) -> None:
    fed: list[str] = []
    feed = IncrementalTokens.feed
    monkeypatch.setattr(IncrementalTokens, "feed", lambda self, text: fed.append(text) or feed(self, text))
    await guard._template.header([Turn(Role.USER, "all the words of a very long text " * 20_000)])
    assert sum(map(len, fed)) <= 2 * edge._SLICE


async def test_reasoning_and_tool_calls_of_the_last_turn_are_judged_and_the_worst_wins(guard: EdgeGuard) -> None:
    calls = ('{"x": 12345}', "дрожжей", "빵을")
    tools = tuple(ToolCall("f", arguments) for arguments in calls)
    turn = Turn(Role.ASSISTANT, "of course", reasoning="明天可能会下雨", tool_calls=tools)
    together = await guard.judge(PROMPT.then(turn))
    ends = [(await streamed(guard.open(PROMPT), [turn.reasoning]))[-1]]
    ends += [(await streamed(guard.open(PROMPT), [text]))[-1] for text in (turn.content, *calls)]
    worst_end = max(ends, key=lambda v: (v.severity, v.probabilities.unsafe))
    assert values(together.probabilities) == pytest.approx(values(worst_end.probabilities), abs=NOISE)
    assert together.severity is worst_end.severity


def key(verdict: Verdict) -> tuple[Severity, float]:
    return verdict.severity, verdict.probabilities.unsafe


async def test_control_tokens_written_in_text_reach_the_model_as_ordinary_text(
    guard: EdgeGuard, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []
    submit = guard._engine.submit

    def watched(sequence: CachedSequence, ids: list[int], **options: bool) -> asyncio.Future[Logits]:
        seen.append(list(ids))
        return submit(sequence, ids, **options)

    monkeypatch.setattr(guard._engine, "submit", watched)
    await guard.judge(Conversation.of("a"))
    await guard.judge(Conversation.of(CONTROL_WORDS[:40]))
    await streamed(guard.open(Conversation.of("<|end|>")), ["<|e", "nd|>", "<|assistant|> sure"])
    names = {token_id: name for name, token_id in guard.tokenizer.control.items()}
    found = [[names[i] for i in ids if i in names] for ids in seen]
    assert found[:2] == [["<|user|>", "<|end|>"]] * 2
    assert [name for ids in found[2:] for name in ids] == ["<|user|>", "<|end|>", "<|assistant|>", "<|end|>"]


# --- windows


async def test_windows_of_a_prompt_overlap_and_skip_nothing(guard: EdgeGuard) -> None:
    for count in (0, 1, 44, 45, 46, 82, 83, 500):
        windows = guard._template.prompt_windows(count)
        assert windows[0].seen == windows[0].first == 0
        assert windows[-1].stop == count
        for before, after in pairwise(windows):
            assert after.first == before.stop
            assert after.seen == before.stop - guard.config.overlap
        assert all(w.stop - w.seen <= guard.config.window - 3 for w in windows)


async def test_no_window_of_an_answer_is_longer_than_the_model_takes(guard: EdgeGuard) -> None:
    for header in ((), tuple(range(guard.config.context + 3))):
        windows = guard._template.answer_windows(700, header)
        assert [w.first for w in windows] == [0, *(w.stop for w in windows[:-1])]
        for window in windows:
            ids = guard._template.opening(header, later=window.seen > 0)
            assert len(ids) + window.stop - window.seen + 1 <= guard.config.window


async def test_a_very_long_text_is_tokenized_in_slices_with_the_same_tokens(guard: EdgeGuard) -> None:
    text = ("The café 👩‍👩‍👧‍👦 of the cafe\u0301 \ud83d\ude00 aaaaaaaa. " * 300)[: 2 * edge._SLICE + 7]
    stream = guard.tokenizer.incremental()
    tokens = await edge._feed(stream, text)
    assert [*tokens, *stream.finish()] == guard.tokenizer.encode(text)


async def test_of_a_long_prompt_the_worst_window_wins_with_its_span(guard: EdgeGuard) -> None:
    text = long_text(5 * guard.config.window, guard)
    tokens = guard.tokenizer.encode(text)
    verdict = await guard.judge(Conversation.of(text))
    evidence = guard._evidence(Target.PROMPT, [token.id for token in tokens])
    alone = []
    for window in guard._template.prompt_windows(len(tokens)):
        ids = guard._template.prompt(tokens[window.seen : window.stop], later=window.seen > 0)
        logits = await guard._engine.submit(CachedSequence(), ids)
        total = evidence[window.seen : window.stop].sum(axis=0).tolist()
        row = Row(logits.query_risk[-1], logits.query_category[-1], tuple(total))
        start = tokens[window.seen - 1].end if window.seen else 0
        alone.append(guard._verdict(Target.PROMPT, row, Span(start, tokens[window.stop - 1].end)))
    expected = max(alone, key=key)
    assert len(alone) > 5
    assert verdict.severity is expected.severity
    assert verdict.probabilities.unsafe == pytest.approx(expected.probabilities.unsafe, abs=NOISE)
    assert verdict.span == expected.span


async def test_of_a_long_answer_the_worst_window_wins_as_a_stream_would_say(guard: EdgeGuard) -> None:
    text = long_text(5 * guard.config.window, guard)
    stream = await streamed(guard.open(PROMPT), [text])
    header = await guard._template.header(PROMPT.turns)
    windows = guard._template.answer_windows(len(stream) - 1, header)
    at_ends = [stream[w.stop - 1] for w in windows[:-1]] + [stream[-1]]
    verdict = await guard.judge(PROMPT.then(Turn(Role.ASSISTANT, text)))
    assert len(windows) > 5
    assert verdict.severity is max(v.severity for v in at_ends)
    assert any(verdict.probabilities.unsafe == pytest.approx(v.probabilities.unsafe, abs=NOISE) for v in at_ends)
    assert verdict.span is not None


async def test_many_more_windows_than_may_wait_are_judged_in_turn(folder: Path) -> None:
    async with EdgeGuard(folder, most_waiting=16) as guard:
        text = long_text(40 * guard.config.window, guard)
        verdict = await guard.judge(Conversation.of(text))
        stream = await streamed(guard.open(PROMPT), [text])
    assert verdict.span is not None
    assert stream[-1].span.end == len(text)


# --- reading logits


@pytest.mark.parametrize(
    ("probabilities", "severity"),
    [
        (Probabilities(0.7, 0.2, 0.1), Severity.SAFE),
        (Probabilities(0.3, 0.4, 0.3), Severity.CONTROVERSIAL),
        (Probabilities(0.2, 0.2, 0.6), Severity.UNSAFE),
    ],
)
def test_thresholds_turn_probabilities_into_a_severity(probabilities: Probabilities, severity: Severity) -> None:
    assert Thresholds(flagged=0.6, unsafe=0.5).severity(probabilities) is severity


def test_nothing_is_unsafe_that_is_not_flagged() -> None:
    assert Thresholds(flagged=0.9, unsafe=0.1).severity(Probabilities(0.5, 0.1, 0.4)) is Severity.SAFE


async def test_calibration_of_the_config_is_applied_in_the_order_of_its_ids(folder: Path, tmp_path: Path) -> None:
    folder = rewritten(folder, tmp_path / "plain", wide=None)
    calibrated = rewritten(
        folder,
        tmp_path / "calibrated",
        temperature={"prompt": 2.0, "response": 0.5},
        bias={"prompt": [0.0, 3.0, -3.0], "response": [0, 0, 0]},
        thresholds={"prompt": {"flagged": 0.0, "unsafe": 0.0}},
    )
    async with EdgeGuard(folder) as plain, EdgeGuard(calibrated) as tuned:
        before = (await plain.judge(PROMPT)).probabilities
        after = await tuned.judge(PROMPT)
    odds = np.array([before.safe, before.unsafe, before.controversial]) ** 0.5 * np.exp([0.0, 3.0, -3.0])
    expected = odds / odds.sum()
    assert values(after.probabilities) == pytest.approx((expected[0], expected[2], expected[1]), abs=1e-6)
    assert after.severity is Severity.UNSAFE


async def test_ngrams_add_their_weighted_evidence_to_unsafe_and_controversial(folder: Path, tmp_path: Path) -> None:
    def weighing(weight: float, name: str) -> EdgeGuard:
        wide = {"scale": {"prompt": 0.02, "response": 0.02}, "weight": {"prompt": weight, "response": 0.0}}
        return EdgeGuard(rewritten(folder, tmp_path / name, wide=wide))

    async with weighing(0.0, "without") as without, weighing(1.5, "with") as guard:
        before, after = [np.log(values((await each.judge(PROMPT)).probabilities)) for each in (without, guard)]
        ids = [token.id for token in guard.tokenizer.encode(PROMPT.turns[-1].content)]
        unsafe, controversial, count = guard._evidence(Target.PROMPT, ids).sum(axis=0).tolist()
        change = (after - after[0]) - (before - before[0])
        expected = np.array([0, controversial, unsafe]) * 1.5 * 0.02 / count**0.5
        np.testing.assert_allclose(change, expected, atol=1e-5)
        assert abs(expected).max() > 0.01


def test_a_config_that_speaks_of_ngrams_needs_their_table(folder: Path, tmp_path: Path) -> None:
    torn = rewritten(folder, tmp_path)
    (torn / "ngrams.npy").unlink()
    with pytest.raises(GuardUnavailable, match=r"ngrams\.npy"):
        EdgeGuard(torn)


async def test_the_categories_named_are_those_above_the_threshold_most_probable_first(
    folder: Path, tmp_path: Path
) -> None:
    everything = {"flagged": 0.0, "unsafe": 0.0}
    low = rewritten(folder, tmp_path / "low", category_threshold=0.05, thresholds={"prompt": everything})
    high = rewritten(folder, tmp_path / "high", category_threshold=1.0, thresholds={"prompt": everything})
    async with EdgeGuard(low) as some, EdgeGuard(high) as none:
        verdict = await some.judge(PROMPT)
        assert (await none.judge(PROMPT)).categories == ()
    probabilities = [verdict.category_probabilities[name] for name in verdict.categories]
    assert probabilities == sorted(probabilities, reverse=True)
    assert probabilities
    assert min(probabilities) >= 0.05


async def test_logits_that_are_not_numbers_are_an_error_and_not_a_verdict(
    guard: EdgeGuard, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = guard._engine._session.run  # type: ignore[union-attr]

    class Broken:
        def run(self, names: list[str], inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
            return [np.full_like(output, np.nan) for output in run(names, inputs)]

    monkeypatch.setattr(guard._engine, "_session", Broken())
    with pytest.raises(UnreadableVerdict):
        await guard.judge(PROMPT)


# --- failure, overload, cancellation, closing


async def test_a_runtime_error_reaches_those_who_wait_and_only_them(
    guard: EdgeGuard, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(guard._engine, "_run", lambda batch: 1 / 0)
        session = guard.open(PROMPT)
        with pytest.raises(GuardError, match="ZeroDivisionError"):
            await session.feed("hello there my friend")
        with pytest.raises(SessionClosed):
            await session.feed("more")
    assert (await guard.judge(PROMPT)).probabilities.flagged > 0
    assert guard.sessions == 0


async def test_too_much_waiting_work_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with EdgeGuard(folder, most_waiting=2) as guard:
        slow = SlowEngine(guard, monkeypatch)
        first = asyncio.create_task(guard.judge(PROMPT))
        await asyncio.to_thread(slow.entered.wait, 30)
        waiting = [asyncio.create_task(guard.judge(PROMPT)) for _ in range(2)]
        await until(lambda: guard._engine.waiting == 2)
        with pytest.raises(GuardOverloaded):
            await guard.judge(PROMPT)
        slow.go.set()
        assert len(await asyncio.gather(first, *waiting)) == 3


async def test_cancelled_work_is_never_computed(guard: EdgeGuard, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = SlowEngine(guard, monkeypatch)
    first = asyncio.create_task(guard.judge(PROMPT))
    await asyncio.to_thread(slow.entered.wait, 30)
    session = guard.open(PROMPT)
    doomed = [asyncio.create_task(guard.judge(PROMPT)), asyncio.create_task(session.feed("hello there friend"))]
    await until(lambda: guard._engine.waiting == 2)
    for task in doomed:
        task.cancel()
    await asyncio.gather(*doomed, return_exceptions=True)
    slow.go.set()
    await first
    await guard.judge(PROMPT)
    assert slow.sizes == [1, 1]
    assert guard.sessions == 0
    with pytest.raises(SessionClosed):
        await session.feed("x")


async def test_closing_a_session_ends_the_feed_that_is_running(
    guard: EdgeGuard, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = SlowEngine(guard, monkeypatch)
    running, waiting = guard.open(PROMPT), guard.open(PROMPT)
    first = asyncio.create_task(running.feed("hello there friend"))
    await asyncio.to_thread(slow.entered.wait, 30)
    second = asyncio.create_task(waiting.feed("hello there friend"))
    await until(lambda: guard._engine.waiting == 1)
    running.close()
    waiting.close()
    slow.go.set()
    for task in (first, second):
        with pytest.raises(SessionClosed):
            await task
    assert slow.sizes == [1]
    assert running._sequence.cache is None


async def test_closing_the_guard_refuses_what_waits_and_ends_its_thread(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = EdgeGuard(folder)
    slow = SlowEngine(guard, monkeypatch)
    running = asyncio.create_task(guard.judge(PROMPT))
    await asyncio.to_thread(slow.entered.wait, 30)
    waiting = asyncio.create_task(guard.judge(PROMPT))
    session = guard.open(None)
    await until(lambda: guard._engine.waiting == 1)
    closing = asyncio.create_task(guard.close())
    with pytest.raises(SessionClosed):
        await waiting
    slow.go.set()
    await closing
    await running
    await guard.close()
    assert not any(
        thread.name == "tidegate-edge" and thread is guard._engine._thread for thread in threading.enumerate()
    )
    with pytest.raises(GuardUnavailable):
        guard.open(None)
    with pytest.raises(SessionClosed):
        await session.feed("hello there friend")
    with pytest.raises(SessionClosed):
        await guard.judge(PROMPT)


def test_one_guard_serves_several_event_loops(folder: Path) -> None:
    guard = EdgeGuard(folder)
    found: list[list[TokenVerdict]] = []

    def serve() -> None:
        async def many() -> list[list[TokenVerdict]]:
            return await asyncio.gather(*(streamed(guard.open(PROMPT), list("it is a warm day")) for _ in range(5)))

        found.extend(asyncio.run(many()))

    threads = [threading.Thread(target=serve) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    asyncio.run(guard.close())
    assert len(found) == 20
    for other in found[1:]:
        assert_same(found[0], other)


async def test_work_longer_than_one_run_is_computed_in_parts(tmp_path: Path) -> None:
    folder = tiny_edge_folder(tmp_path, window=512)
    engine = Engine(folder / "model.onnx")
    ids = np.random.default_rng(2).integers(8, 600, 500).tolist()
    whole = await engine.submit(CachedSequence(), ids)
    sequence, parts = CachedSequence(), []
    for start in range(0, 500, 50):
        parts.append(await engine.submit(sequence, ids[start : start + 50]))
    last = await engine.submit(CachedSequence(), ids, last_only=True)
    engine.close()
    for head, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        np.testing.assert_allclose(np.concatenate(pieces), head, atol=1e-4)
    np.testing.assert_allclose(last.risk[-1], whole.risk[-1], atol=1e-4)
    assert sequence.length == 500


# --- loading


def rewritten(folder: Path, to: Path, **tidegate: object) -> Path:
    """A copy of a guard's folder with other settings in its config."""
    shutil.copytree(folder, to, dirs_exist_ok=True)
    config = json.loads((to / "config.json").read_text(encoding="utf-8"))
    config["tidegate"] |= tidegate
    (to / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return to


async def test_a_guard_of_ones_own_is_loaded_by_its_folder(folder: Path) -> None:
    guard = load_guard(f"edge:{folder}")
    assert isinstance(guard, StreamGuard)
    assert guard.name == "tiny/0"
    await guard.close()


@pytest.mark.parametrize("spec", ["", "edgy", "edge:", "EDGE", "vllm:x"])
def test_an_unknown_guard_is_an_error_that_lists_those_that_exist(spec: str) -> None:
    with pytest.raises(InputError, match="expected edge, or edge:FOLDER"):
        load_guard(spec)


@pytest.mark.parametrize("missing", edge.EDGE_FILES)
def test_a_missing_file_is_named(folder: Path, tmp_path: Path, missing: str) -> None:
    copy = rewritten(folder, tmp_path)
    (copy / missing).unlink()
    with pytest.raises(GuardUnavailable, match=missing):
        load_guard(f"edge:{copy}")


@pytest.mark.parametrize("torn", edge.EDGE_FILES)
def test_a_torn_file_is_named(folder: Path, tmp_path: Path, torn: str) -> None:
    copy = rewritten(folder, tmp_path)
    content = (copy / torn).read_bytes()
    (copy / torn).write_bytes(content[: len(content) // 2])
    with pytest.raises(GuardUnavailable, match=torn):
        load_guard(f"edge:{copy}")


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"format": 2}, "tidegate.format"),
        ({"window": "wide"}, "tidegate.window"),
        ({"window": 4096}, "max_position_embeddings"),
        ({"overlap": 40}, "window is too small"),
        ({"temperature": {"prompt": 0, "response": 1}}, "tidegate.temperature.prompt"),
        ({"temperature": {"prmpt": 1}}, "tidegate.temperature.prmpt"),
        ({"bias": {"prompt": [0, 0]}}, "tidegate.bias.prompt"),
        ({"thresholds": {"token": {"flagged": 1.5}}}, "tidegate.thresholds.token.flagged"),
    ],
)
def test_a_config_that_cannot_be_used_is_refused_with_the_place(
    folder: Path, tmp_path: Path, change: dict[str, object], place: str
) -> None:
    with pytest.raises(GuardUnavailable, match=place):
        EdgeGuard(rewritten(folder, tmp_path, **change))


def test_risk_labels_that_are_not_the_three_severities_are_refused(folder: Path, tmp_path: Path) -> None:
    copy = rewritten(folder, tmp_path)
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    config["query_risk_level_map"]["2"] = "Safe"
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(GuardUnavailable, match="query_risk_level_map"):
        EdgeGuard(copy)


def test_guards_are_listed_without_loading_one(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge, "SHIPPED", rewritten(folder, tmp_path, languages=["en", "zh"]))
    row, *_ = list_guards()
    assert row.available
    assert row.languages == ("en", "zh")
    assert row.bytes > 1000
    (tmp_path / "model.onnx").unlink()
    row, *_ = list_guards()
    assert not row.available
    assert "model.onnx" in row.why_not


def test_the_guard_needs_no_torch(folder: Path) -> None:
    code = (
        "import asyncio, sys, tidegate\n"
        f"guard = tidegate.load_guard({f'edge:{folder}'!r})\n"
        "asyncio.run(guard.judge(tidegate.Conversation.of('hello')))\n"
        "assert not {'torch', 'transformers', 'onnx'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_shipped_files_are_whole_and_at_most_25_megabytes_together() -> None:
    sizes = {path.name: path.stat().st_size for path in edge.SHIPPED.iterdir() if path.name != "__init__.py"}
    assert {*edge.EDGE_FILES, edge.WIDE_FILE} <= set(sizes)
    assert sum(sizes.values()) <= 25_000_000
