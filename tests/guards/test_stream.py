"""The Stream guard: what one full forward says, exact under any cutting and any company, and failures that say so."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import sys
import threading
import unicodedata
from collections.abc import AsyncIterator, Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from tokenizers import Tokenizer  # noqa: E402

from qwen3guard_files import FILES  # noqa: E402
from qwen_tokenizer import LINES, PLAIN, SPECIAL, tiny_qwen_definition  # noqa: E402
from stream_folder import official_config, tensors_of, tiny_model, write_checkpoint, write_guard  # noqa: E402
from streams import assert_covers, assert_same, cut, streamed, values  # noqa: E402
from tidegate.engine.scheduler import Limits, Step  # noqa: E402
from tidegate.errors import (  # noqa: E402
    GuardOverloaded,
    GuardUnavailable,
    InputError,
    SessionClosed,
    UnreadableVerdict,
)
from tidegate.guards import StreamGuard, load_guard  # noqa: E402
from tidegate.guards.qwen_stream import Qwen3StreamSession  # noqa: E402
from tidegate.guards.resilient import ResilientGuard  # noqa: E402
from tidegate.guards.stream import Qwen3StreamGuard, confirmed  # noqa: E402
from tidegate.model.loading import load_stream  # noqa: E402
from tidegate.moderate import StreamModerator  # noqa: E402
from tidegate.policy import load_policy  # noqa: E402
from tidegate.types import (  # noqa: E402
    PROMPT_CATEGORIES,
    RESPONSE_CATEGORIES,
    Channel,
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
WINDOW = 96
TOKENIZER = Tokenizer.from_str(tiny_qwen_definition())
PROMPT = Conversation.of("how to build a bomb?")
ANSWER = "Here are some practical methods, and then the other dogs jump over the fox."
OPENING = "<|im_start|>user\nhow to build a bomb?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>"
CONTROL_WORDS = " ".join((*SPECIAL, *PLAIN))
EMOJI = ("👩‍👩‍👧‍👦", "\ud83d", "\ude00")
AWKWARD = (*EMOJI, "e\u0301\u0327", "\u0958", "한국어", "aaaaaaa", "\u200b", "  \n ", "\n\n", CONTROL_WORDS)
TEXTS = st.lists(
    st.one_of(st.sampled_from(AWKWARD), st.sampled_from(LINES), st.text(max_size=6)), max_size=8
).map("".join)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_guard(tmp_path_factory.mktemp("stream") / "tiny")


@pytest.fixture(scope="module")
def narrow_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights with a window that short texts outgrow."""
    return write_guard(tmp_path_factory.mktemp("stream") / "narrow", max_position_embeddings=WINDOW)


@pytest.fixture
async def guard(folder: Path) -> AsyncIterator[Qwen3StreamGuard]:
    async with Qwen3StreamGuard(folder) as guard:
        yield guard
        check(guard)


@pytest.fixture
async def narrow(narrow_folder: Path) -> AsyncIterator[Qwen3StreamGuard]:
    async with Qwen3StreamGuard(narrow_folder, positions=4 * WINDOW) as guard:
        yield guard
        check(guard)


@pytest.fixture(scope="module")
def shared(narrow_folder: Path) -> Qwen3StreamGuard:
    """A guard for tests that run an event loop for each of many examples."""
    return Qwen3StreamGuard(narrow_folder, positions=4 * WINDOW)


def check(guard: Qwen3StreamGuard) -> None:
    with guard._engine._wake:
        guard._engine._scheduler.check()


def ids_of(text: str) -> list[int]:
    """The ids of a text in which control tokens are meant."""
    ids: list[int] = TOKENIZER.encode(text, add_special_tokens=False).ids
    return ids


class Row(NamedTuple):
    """What the model's own forward gives at one position."""

    probabilities: tuple[float, float, float]
    category: str
    category_probability: float


def full_forward(folder: Path, ids: Sequence[int], target: Target) -> list[Row]:
    """One causal forward over all ids, read with the official labels."""
    with torch.inference_mode():
        logits = load_stream(folder)(torch.tensor([list(ids)]))
    heads = (logits.query_risk, logits.query_category) if target is Target.PROMPT else (logits.risk, logits.category)
    names = PROMPT_CATEGORIES if target is Target.PROMPT else RESPONSE_CATEGORIES
    risk, category = (head[0].double().softmax(-1) for head in heads)
    safe, unsafe, controversial = risk.unbind(-1)
    shares, best = category.max(-1)
    ordered = torch.stack([safe, controversial, unsafe], -1).tolist()
    return [
        Row(tuple(found), names[index], share)
        for found, index, share in zip(ordered, best.tolist(), shares.tolist(), strict=True)
    ]


def assert_rows(tokens: Sequence[TokenVerdict], rows: Sequence[Row]) -> None:
    assert len(tokens) == len(rows)
    for token, row in zip(tokens, rows, strict=True):
        assert values(token.probabilities) == pytest.approx(row.probabilities, abs=NOISE)
        assert token.severity is max(Severity, key=lambda severity: row.probabilities[severity])
        assert (token.category, token.category_probability) == (
            row.category,
            pytest.approx(row.category_probability, abs=NOISE),
        )


def long_text(tokens: int, seed: int = 1) -> str:
    """Words of many languages, of at least so many tokens."""
    rng = random.Random(seed)
    words = [word for line in LINES for word in line.split()]
    text = ""
    while len(ids_of(text)) < tokens:
        text += " ".join(rng.choices(words, k=10)) + " "
    return text


class Computed:
    """Every stream that an engine was given, as ids, in order of their last feed; may hold up the forwards."""

    def __init__(self, guard: Qwen3StreamGuard, monkeypatch: pytest.MonkeyPatch) -> None:
        self.streams: dict[Any, list[int]] = {}
        self.go = threading.Event()
        self.go.set()
        self.entered = threading.Event()
        engine, scheduler = guard._engine, guard._engine._scheduler
        submit, runner = scheduler.submit, engine._runner
        assert runner is not None
        run = runner.run

        def noted(sequence: Any, *arguments: Any, **options: Any) -> None:
            submit(sequence, *arguments, **options)
            self.streams[sequence] = sequence.tokens.tolist()

        def held(step: Step) -> Any:
            self.entered.set()
            assert self.go.wait(30)
            return run(step)

        monkeypatch.setattr(scheduler, "submit", noted)
        monkeypatch.setattr(runner, "run", held)

    @property
    def ids(self) -> list[list[int]]:
        return list(self.streams.values())

    async def begun(self) -> None:
        assert await asyncio.to_thread(self.entered.wait, 30)


# --- what one full forward says


async def test_a_prompt_is_judged_at_the_end_of_the_users_turn(guard: Qwen3StreamGuard, folder: Path) -> None:
    ids = ids_of("<|im_start|>system\nbe nice<|im_end|>\n<|im_start|>user\nhow to build a bomb?<|im_end|>")
    row = full_forward(folder, ids, Target.PROMPT)[-1]

    verdict = await guard.judge(Conversation((Turn(Role.SYSTEM, "be nice"), *PROMPT.turns)))

    assert values(verdict.probabilities) == pytest.approx(row.probabilities, abs=NOISE)
    assert verdict.severity is max(Severity, key=lambda severity: row.probabilities[severity])
    assert (verdict.target, verdict.guard, verdict.span) == (Target.PROMPT, guard.name, None)
    assert set(verdict.category_probabilities) == set(PROMPT_CATEGORIES)
    assert verdict.category_probabilities[row.category] == pytest.approx(row.category_probability, abs=NOISE)
    assert verdict.categories == (() if verdict.severity is Severity.SAFE else (row.category,))


async def test_a_stream_is_judged_at_each_of_its_tokens_and_nowhere_else(guard: Qwen3StreamGuard, folder: Path) -> None:
    before, answer = ids_of(OPENING + "\n\n"), ids_of(ANSWER)
    rows = full_forward(folder, before + answer, Target.RESPONSE)[len(before) :]

    tokens = await streamed(guard.open(PROMPT), list(ANSWER))

    assert_rows(tokens, rows)
    assert_covers(tokens, ANSWER)


@pytest.mark.parametrize("sizes", [(1,), (3, 1, 7), (100,)])
async def test_the_ids_of_a_served_model_are_judged_as_they_are(
    guard: Qwen3StreamGuard, folder: Path, sizes: tuple[int, ...]
) -> None:
    """Also where they are not those that the tokenizer would have made: letter by letter, a letter in parts."""
    ids = [*ids_of(ANSWER), *(token for letter in " gr\u00fcn \U0001f468" for token in ids_of(letter))]
    session = guard.open(PROMPT)
    assert isinstance(session, Qwen3StreamSession)
    verdicts: list[TokenVerdict] = []
    left = list(ids)
    while left:
        size = sizes[len(verdicts) % len(sizes)]
        verdicts += await session.feed_ids(left[:size])
        left = left[size:]
    assert await session.finish() == ()
    before = ids_of(OPENING + "\n\n")
    expected = full_forward(folder, [*before, *ids], Target.RESPONSE)[len(before) :]
    assert len(verdicts) == len(ids)
    for verdict, row in zip(verdicts, expected, strict=True):
        assert values(verdict.probabilities) == pytest.approx(row.probabilities, abs=NOISE)
    assert_covers(verdicts, f"{ANSWER} gr\u00fcn \U0001f468")


async def test_a_moderated_stream_takes_ids_and_what_leaves_is_the_text_that_they_are(guard: Qwen3StreamGuard) -> None:
    text = f"{ANSWER} gr\u00fcn \U0001f468"
    ids = ids_of(text)
    policy = load_policy("balanced").only_observed()
    expected = [await guard.open(PROMPT).feed_ids(ids)]
    moderator = StreamModerator(ResilientGuard(guard), policy, context=PROMPT)

    steps = [await moderator.feed_ids(ids[place : place + 5]) for place in range(0, len(ids), 5)]
    with pytest.raises(InputError, match="stands for no text"):
        await moderator.feed_ids([TOKENIZER.token_to_id("<|im_end|>")])
    last = await moderator.finish()

    assert "".join(step.released for step in (*steps, last)) == moderator.text == text
    assert_same([token for step in steps for token in step.tokens], expected[0], NOISE)
    assert (last.decision is not None, moderator.failure) == (True, None)


async def test_a_session_takes_ids_or_text_and_no_control_tokens(guard: Qwen3StreamGuard) -> None:
    first, second, third = (guard.open(PROMPT) for _ in range(3))
    end = TOKENIZER.token_to_id("<|im_end|>")
    with pytest.raises(InputError, match=rf"ids\[\d+\]: id {end} stands for no text"):
        await first.feed_ids([*ids_of("dog"), end])
    await second.feed_ids(ids_of("dog"))
    with pytest.raises(InputError, match="text: the session was given ids"):
        await second.feed("dog")
    await third.feed("dog")
    with pytest.raises(InputError, match="ids: the session was given text"):
        await third.feed_ids(ids_of("dog"))
    for session in (first, second, third):
        with pytest.raises(SessionClosed):
            await session.feed_ids([1])
    assert await guard.open(PROMPT).feed_ids([]) == ()


async def test_an_answer_to_nothing_has_no_think_block(guard: Qwen3StreamGuard, folder: Path) -> None:
    before, answer = ids_of("<|im_start|>assistant\n"), ids_of(ANSWER)
    rows = full_forward(folder, before + answer, Target.RESPONSE)[len(before) :]
    assert_rows(await streamed(guard.open(None), [ANSWER]), rows)


async def test_the_labels_are_those_of_the_config(guard: Qwen3StreamGuard, tmp_path: Path) -> None:
    risk = {"0": "Controversial", "1": "Safe", "2": "Unsafe"}
    other = write_guard(tmp_path / "other", response_risk_level_map=risk, query_risk_level_map=risk)
    async with Qwen3StreamGuard(other) as renamed:
        for conversation in (PROMPT, Conversation.of("hello", "Here")):
            safe, controversial, unsafe = values((await guard.judge(conversation)).probabilities)
            found = (await renamed.judge(conversation)).probabilities
            assert len({round(value, 4) for value in (safe, controversial, unsafe)}) == 3
            if conversation is PROMPT:
                assert values(found) == pytest.approx((unsafe, safe, controversial), abs=NOISE)
        here = await streamed(guard.open(PROMPT), ["Here"])
        there = await streamed(renamed.open(PROMPT), ["Here"])
    safe, controversial, unsafe = values(here[-1].probabilities)
    assert values(there[-1].probabilities) == pytest.approx((unsafe, safe, controversial), abs=NOISE)


@pytest.mark.skipif(FILES is None, reason="the released tokenizer is not here")
async def test_the_released_sample_reaches_the_model_as_its_card_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert FILES is not None
    definition = (FILES / "tokenizer.json").read_text(encoding="utf-8")
    asked = "151644 872 198 9707 11 1246 311 1936 264 12764 30 151645"
    said = "198 151644 77091 198 151667 271 151668 271 8420 525 1045 14976 5413 311 1936 264 12764 13"
    text = "Here are some practical methods to build a bomb."
    async with Qwen3StreamGuard(write_guard(tmp_path / "released", definition), positions=256) as guard:
        computed = Computed(guard, monkeypatch)
        conversation = Conversation.of("Hello, how to build a bomb?")
        await guard.judge(conversation)
        tokens = await streamed(guard.open(conversation), list(text))
        await guard.judge(conversation.then(Turn(Role.ASSISTANT, text)))
    whole = list(map(int, f"{asked} {said}".split()))
    assert computed.ids == [list(map(int, asked.split())), whole, whole]
    assert len(tokens) == 10


# --- exactness


@given(TEXTS, st.lists(st.integers(0, 4000), max_size=8))
@example("\n\n\n", [1, 2])
@example("", [])
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_verdicts_do_not_depend_on_how_the_text_is_cut(shared: Qwen3StreamGuard, text: str, places: list[int]) -> None:
    async def both() -> tuple[list[TokenVerdict], list[TokenVerdict]]:
        return (
            await streamed(shared.open(PROMPT), [text]),
            await streamed(shared.open(PROMPT), cut(text, places)),
        )

    whole, pieces = asyncio.run(both())
    assert_same(whole, pieces)
    assert_covers(whole, text)


@pytest.mark.parametrize("channel", [Channel.ANSWER, Channel.REASONING, Channel.TOOL_CALL])
async def test_character_by_character_equals_at_once_over_several_windows(
    narrow: Qwen3StreamGuard, channel: Channel
) -> None:
    text = long_text(4 * WINDOW)
    whole = await streamed(narrow.open(PROMPT, channel, name="f"), [text])
    assert_same(whole, await streamed(narrow.open(PROMPT, channel, name="f"), list(text)))
    assert_covers(whole, text)


@pytest.mark.parametrize("name", ["e\u0301" * 30, "\u0958" * 30])
async def test_no_token_of_a_call_is_skipped_however_the_name_of_the_tool_is_written(
    guard: Qwen3StreamGuard, name: str
) -> None:
    canonical = unicodedata.normalize("NFC", name)
    tokens = await streamed(guard.open(PROMPT, Channel.TOOL_CALL, name=name), list(ANSWER))
    assert_covers(tokens, ANSWER)
    assert_same(tokens, await streamed(guard.open(PROMPT, Channel.TOOL_CALL, name=canonical), [ANSWER]))


async def test_within_the_first_window_verdicts_are_those_of_a_wide_one(
    guard: Qwen3StreamGuard, narrow: Qwen3StreamGuard
) -> None:
    text = long_text(2 * WINDOW)
    wide, windowed = await streamed(guard.open(PROMPT), [text]), await streamed(narrow.open(PROMPT), [text])
    first = WINDOW - len(ids_of(OPENING + "\n\n"))
    assert [v.span for v in wide] == [v.span for v in windowed]
    assert_same(wide[:first], windowed[:first])
    assert values(wide[first + 1].probabilities) != pytest.approx(values(windowed[first + 1].probabilities), abs=NOISE)


async def test_what_was_said_early_is_a_function_of_the_text_before_it(guard: Qwen3StreamGuard) -> None:
    start = long_text(60)
    first = await streamed(guard.open(PROMPT), [start + "and then it rains"])
    second = await streamed(guard.open(PROMPT), [start + "今天天气 !!!"])
    early = sum(1 for v in first if v.span.end <= len(start) - 30)
    assert early > 30
    assert_same(first[:early], second[:early])


async def test_sessions_side_by_side_equal_sessions_one_by_one(narrow: Qwen3StreamGuard) -> None:
    rng = random.Random(4)
    texts = [long_text(rng.randint(1, 150), seed) for seed in range(24)]
    contexts = [Conversation.of(long_text(rng.randint(1, 100), seed + 99)) for seed in range(24)]
    cuts = [cut(text, [rng.randint(0, len(text)) for _ in range(12)]) for text in texts]
    alone = [await streamed(narrow.open(p), c) for p, c in zip(contexts, cuts, strict=True)]
    evicted = narrow.metrics().evictions
    together = await asyncio.gather(*(streamed(narrow.open(p), c) for p, c in zip(contexts, cuts, strict=True)))
    assert narrow.metrics().evictions > evicted, "the cache was large enough for all"
    for one, many in zip(alone, together, strict=True):
        assert_same(one, many)


async def test_whole_texts_side_by_side_equal_those_one_by_one(narrow: Qwen3StreamGuard) -> None:
    conversations = [Conversation.of(long_text(n, n)) for n in (1, 20, 150, 400)]
    conversations += [Conversation.of("hello", long_text(n, n)) for n in (1, 20, 150, 400)]
    alone = [await narrow.judge(c) for c in conversations]
    together = await asyncio.gather(*(narrow.judge(c) for c in conversations))
    for one, many in zip(alone, together, strict=True):
        assert values(one.probabilities) == pytest.approx(values(many.probabilities), abs=NOISE)


# --- what is judged


@pytest.mark.parametrize("tokens", [1, 30, 4 * WINDOW])
async def test_a_whole_answer_is_judged_as_its_stream(narrow: Qwen3StreamGuard, tokens: int) -> None:
    text = long_text(tokens)
    stream = await streamed(narrow.open(PROMPT), [text])
    assert_agrees(await narrow.judge(PROMPT.then(Turn(Role.ASSISTANT, text))), stream)


def assert_agrees(verdict: Verdict, stream: Sequence[TokenVerdict]) -> None:
    decisive, first = confirmed(stream, 2)
    assert values(verdict.probabilities) == pytest.approx(values(stream[decisive].probabilities), abs=NOISE)
    assert verdict.severity is stream[decisive].severity
    if verdict.severity is Severity.SAFE:
        assert (verdict.span, verdict.categories) == (None, ())
    else:
        assert (verdict.span, verdict.categories) == (Span(0, stream[first].span.end), (stream[decisive].category,))


async def test_reasoning_answer_and_calls_are_judged_where_the_template_places_them(
    guard: Qwen3StreamGuard, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn = Turn(Role.ASSISTANT, "of course", reasoning="the quick", tool_calls=(ToolCall("f", '{"x": 1}'),))
    parts = ["<think>\n", "the quick\n", "</think>\n\n", "of course\n", '<tool_call>\n{"name": "f", "arguments": ']
    whole = OPENING[: OPENING.index("<think>")] + "".join(parts) + '{"x": 1}}\n'
    ids = ids_of(whole)
    rows = full_forward(folder, ids, Target.RESPONSE)
    asked: list[list[int]] = []
    judged = guard._confirmed

    def noted(readings: Any, groups: Any) -> Verdict:
        asked.append([reading.position for reading in readings])
        return judged(readings, groups)

    monkeypatch.setattr(guard, "_confirmed", noted)
    verdict = await guard.judge(PROMPT.then(turn))

    starts = {name: ids.index(TOKENIZER.token_to_id(name)) for name in ("<think>", "</think>", "<tool_call>")}
    answer, reasoning, call = ([starts["<think>"] + 1 + place for place in text] for text in asked)
    assert starts["<think>"] < reasoning[0] <= reasoning[-1] < starts["</think>"] < answer[0]
    assert answer[-1] < starts["<tool_call>"] < call[0]
    assert call[-1] == len(ids) - 1
    assert any(
        values(verdict.probabilities) == pytest.approx(rows[place].probabilities, abs=NOISE)
        for place in (*answer, *reasoning, *call)
    )


async def test_of_several_texts_of_a_turn_the_worst_counts(guard: Qwen3StreamGuard) -> None:
    seen = set()
    for seed in range(6):
        turn = Turn(Role.ASSISTANT, long_text(5, seed), reasoning=long_text(5, seed + 50))
        verdict = await guard.judge(PROMPT.then(turn))
        thought = await streamed(guard.open(PROMPT, Channel.REASONING), [turn.reasoning])
        answer = await streamed(guard.open(PROMPT, reasoning=turn.reasoning), [turn.content])
        decisive = [stream[confirmed(stream, 2)[0]] for stream in (answer, thought)]
        expected = max(decisive, key=lambda v: (v.severity, v.probabilities.unsafe, v.probabilities.flagged))
        assert values(verdict.probabilities) == pytest.approx(values(expected.probabilities), abs=NOISE)
        if expected is decisive[1]:
            assert verdict.span is None
        seen.add(expected is decisive[0])
    assert seen == {True, False}


async def test_reasoning_alone_is_judged_alone(guard: Qwen3StreamGuard) -> None:
    verdict = await guard.judge(PROMPT.then(Turn(Role.ASSISTANT, "", reasoning="the quick brown fox")))
    thought = await streamed(guard.open(PROMPT, Channel.REASONING), ["the quick brown fox"])
    assert values(verdict.probabilities) == pytest.approx(
        values(thought[confirmed(thought, 2)[0]].probabilities), abs=NOISE
    )


@pytest.mark.parametrize("text", ["", "\n\n"])
async def test_a_text_without_tokens_is_judged_at_what_closes_it(
    guard: Qwen3StreamGuard, folder: Path, text: str
) -> None:
    row = full_forward(folder, ids_of(OPENING + "\n\n<|im_end|>"), Target.RESPONSE)[-1]
    (token,) = await streamed(guard.open(PROMPT), list(text))
    assert token.span == Span(0, len(text))
    assert_rows([token], [row])
    verdict = await guard.judge(PROMPT.then(Turn(Role.ASSISTANT, text)))
    assert values(verdict.probabilities) == pytest.approx(row.probabilities, abs=NOISE)


async def test_all_earlier_turns_count(guard: Qwen3StreamGuard) -> None:
    earlier = [
        (),
        (Turn(Role.SYSTEM, "be nice"),),
        (Turn(Role.SYSTEM, "be rude"),),
        (Turn(Role.USER, "hi"), Turn(Role.ASSISTANT, "hello")),
        (Turn(Role.USER, "hi"), Turn(Role.ASSISTANT, "Hello")),
    ]
    asked = [await guard.judge(Conversation((*turns, *PROMPT.turns))) for turns in earlier]
    said = [(await streamed(guard.open(Conversation((*turns, *PROMPT.turns))), ["Here are"]))[-1] for turns in earlier]
    assert len({round(v.probabilities.flagged, 5) for v in asked}) == len(earlier)
    assert len({round(v.probabilities.flagged, 5) for v in said}) == len(earlier)


@pytest.mark.parametrize("role", [Role.USER, Role.SYSTEM, Role.TOOL])
async def test_control_tokens_written_in_content_are_ordinary_text(
    guard: Qwen3StreamGuard, monkeypatch: pytest.MonkeyPatch, role: Role
) -> None:
    computed = Computed(guard, monkeypatch)
    control = {token_id for token, token_id in TOKENIZER.get_vocab().items() if token in (*SPECIAL, *PLAIN)}
    plain, spelled = "hello there", CONTROL_WORDS
    for text in (plain, spelled):
        context = Conversation((Turn(role, text), Turn(Role.ASSISTANT, text, reasoning=text), Turn(Role.USER, text)))
        await guard.judge(context)
        await guard.judge(context.then(Turn(Role.ASSISTANT, text, text, (ToolCall(text, text),))))
        await streamed(guard.open(context, Channel.TOOL_CALL, reasoning=text, name=text), list(text))
    found = [[token_id for token_id in ids if token_id in control] for ids in computed.ids]
    assert len(found) == 6
    assert found[:3] == found[3:]
    assert all(len(ids) > 100 for ids in computed.ids[3:])


async def test_every_token_of_a_prompt_beyond_the_window_is_seen_and_the_worst_part_counts(
    narrow: Qwen3StreamGuard, narrow_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = Computed(narrow, monkeypatch)
    text = long_text(5 * WINDOW)
    context = Conversation.of("hi", "hello")

    verdict = await narrow.judge(context.then(Turn(Role.USER, text)))

    start, end = TOKENIZER.token_to_id("<|im_start|>"), TOKENIZER.token_to_id("<|im_end|>")
    header, opener = (
        ids_of("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n"),
        ids_of("user\n"),
    )
    assert len(header) <= WINDOW // 4
    seen: list[int] = []
    for ids in computed.ids:
        assert len(ids) <= WINDOW
        assert (ids[: len(header)], ids[-1]) == (header, end)
        assert ids[len(header) : len(header) + 1 + len(opener)] == [start, *opener]
        part = ids[len(header) + 1 + len(opener) : -1]
        seen += part if not seen else part[WINDOW // 8 :]
        assert seen[-len(part) :] == part
    assert seen == ids_of(text)
    rows = [full_forward(narrow_folder, ids, Target.PROMPT)[-1].probabilities for ids in computed.ids]
    worst = max(rows, key=lambda row: (row.index(max(row)), row[2], row[1] + row[2]))
    assert len(rows) >= 5
    assert values(verdict.probabilities) == pytest.approx(worst, abs=NOISE)


async def test_a_context_beyond_the_window_leaves_room_for_the_answer(
    narrow: Qwen3StreamGuard, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = Computed(narrow, monkeypatch)
    context = Conversation.of(long_text(6 * WINDOW))
    tokens = await streamed(narrow.open(context), [ANSWER])
    assert_agrees(await narrow.judge(context.then(Turn(Role.ASSISTANT, ANSWER))), tokens)
    stream, whole = computed.ids
    assert stream == whole
    most = WINDOW - WINDOW // 4
    assert len(stream) == most + len(ids_of("\n\n" + ANSWER))
    assert stream[:4] == ids_of("<|im_start|>user\n" + context.turns[0].content)[:4]
    assert stream[most - 6 : most] == ids_of(OPENING)[-6:]
    assert narrow.metrics().tokens_computed < 2 * len(stream) + 2 * WINDOW


# --- the severity of a whole answer


def token(severity: Severity, unsafe: float) -> TokenVerdict:
    return TokenVerdict(Span(0, 0), severity, Probabilities((1 - unsafe) / 2, (1 - unsafe) / 2, unsafe))


def consecutive(severities: Sequence[Severity]) -> Severity:
    """The rule of the released evaluation."""
    pairs = list(pairwise(severities))
    for severity in (Severity.UNSAFE, Severity.CONTROVERSIAL):
        if (severity, severity) in pairs:
            return severity
    return Severity.SAFE


@given(st.lists(st.tuples(st.sampled_from(list(Severity)), st.floats(0, 1)), min_size=2, max_size=12))
def test_two_in_a_row_confirm_as_in_the_released_rule(said: list[tuple[Severity, float]]) -> None:
    tokens = [token(severity, unsafe) for severity, unsafe in said]
    severities = [severity for severity, _ in said]
    decisive, first = confirmed(tokens, 2)
    found = tokens[decisive].severity
    mixed = any({Severity.UNSAFE, Severity.CONTROVERSIAL} == {*pair} for pair in pairwise(severities))
    assert found == max(consecutive(severities), Severity.CONTROVERSIAL if mixed else Severity.SAFE)
    pairs = list(pairwise(severities))
    assert first == next(place for place, pair in enumerate(pairs, start=1) if min(pair) is found)


@given(st.lists(st.tuples(st.sampled_from(list(Severity)), st.floats(0, 1)), min_size=1), st.integers(1, 5))
def test_the_decisive_token_is_the_mildest_of_the_worst_run(said: list[tuple[Severity, float]], debounce: int) -> None:
    tokens = [token(severity, unsafe) for severity, unsafe in said]
    length = min(debounce, len(tokens))
    runs = [said[start : start + length] for start in range(len(said) - length + 1)]
    decisive, first = confirmed(tokens, debounce)
    assert (tokens[decisive].severity, tokens[decisive].probabilities.unsafe) == max(min(run) for run in runs)
    assert min(said[first - length + 1 : first + 1])[0] is tokens[decisive].severity


# --- sessions that end, and company that fails


@pytest.mark.parametrize("how", ["close", "cancel"])
async def test_a_feed_that_nobody_waits_for_gives_everything_back(
    guard: Qwen3StreamGuard, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    computed = Computed(guard, monkeypatch)
    computed.go.clear()
    session = guard.open(PROMPT)
    feed = asyncio.create_task(session.feed("hello there friend"))
    await computed.begun()
    if how == "close":
        session.close()
    else:
        feed.cancel()
    with pytest.raises(SessionClosed if how == "close" else asyncio.CancelledError):
        await feed
    metrics = guard.metrics()
    assert (metrics.streams, metrics.cache_reserved, guard.sessions) == (0, 0, 0)
    with pytest.raises(SessionClosed):
        await session.feed("x")
    computed.go.set()
    await guard.judge(PROMPT)


async def test_closing_the_guard_ends_what_waits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guard = Qwen3StreamGuard(folder)
    computed = Computed(guard, monkeypatch)
    computed.go.clear()
    session = guard.open(PROMPT)
    feed = asyncio.create_task(session.feed("hello there friend"))
    judging = asyncio.create_task(guard.judge(PROMPT))
    await computed.begun()
    closing = asyncio.create_task(guard.close())
    for task in (feed, judging):
        with pytest.raises(SessionClosed):
            await task
    computed.go.set()
    await closing
    await guard.close()
    for call in (guard.judge(PROMPT), guard.health()):
        with pytest.raises(GuardUnavailable):
            await call
    with pytest.raises(GuardUnavailable):
        guard.open(None)


async def test_more_than_may_be_open_or_wait_is_refused(narrow_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with Qwen3StreamGuard(narrow_folder, positions=4 * WINDOW, most_sessions=2) as guard:
        computed = Computed(guard, monkeypatch)
        sessions = [guard.open(PROMPT), guard.open(None)]
        with pytest.raises(GuardOverloaded, match="2 sessions"):
            guard.open(PROMPT)
        sessions.pop().close()
        refused = guard.open(None)
        guard._engine._scheduler._limits = Limits(waiting=2 * WINDOW)
        computed.go.clear()
        busy = asyncio.create_task(sessions[0].feed(long_text(WINDOW)))
        await computed.begun()
        with pytest.raises(GuardOverloaded):
            await refused.feed(long_text(2 * WINDOW))
        with pytest.raises(SessionClosed):
            await refused.feed("x")
        computed.go.set()
        assert await busy
        assert guard.sessions == 1


async def test_text_longer_than_may_wait_is_judged_in_groups(narrow: Qwen3StreamGuard) -> None:
    text = long_text(5_000, seed=7)
    tokens = await streamed(narrow.open(PROMPT), [text])
    assert_covers(tokens, text)
    assert len(tokens) >= 5_000
    assert confirmed(tokens, 2)[0] > 4_096, "what counts is not in a later group"
    assert_agrees(await narrow.judge(PROMPT.then(Turn(Role.ASSISTANT, text))), tokens)


async def test_what_is_not_a_number_is_no_verdict(tmp_path: Path) -> None:
    size = TOKENIZER.get_vocab_size()
    tensors = tensors_of(tiny_model(vocab_size=size))
    tensors["risk_level_head.weight"][0, 0] = float("nan")
    folder = write_checkpoint(tmp_path / "nan", tensors, config=official_config(vocab_size=size, torch_dtype="float32"))
    (folder / "tokenizer.json").write_text(tiny_qwen_definition(), encoding="utf-8")
    async with Qwen3StreamGuard(folder, positions=512) as guard:
        await guard.judge(PROMPT)
        with pytest.raises(UnreadableVerdict):
            await guard.judge(PROMPT.then(Turn(Role.ASSISTANT, "Here are")))
        session = guard.open(PROMPT)
        with pytest.raises(UnreadableVerdict):
            await session.feed("Here are some")
        assert guard.metrics().streams == 0


async def test_health_is_that_of_the_engine(guard: Qwen3StreamGuard) -> None:
    assert await guard.health() > 0


# --- loading


async def test_a_stream_guard_is_loaded_by_its_folder(folder: Path) -> None:
    before = torch.get_num_threads()
    try:
        guard = load_guard(f"stream:{folder}", threads=before + 1)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
    assert isinstance(guard, Qwen3StreamGuard)
    assert isinstance(guard, StreamGuard)
    assert guard.name == "stream/tiny"
    await guard.close()


async def test_a_stream_guard_may_stand_in_a_cascade(folder: Path) -> None:
    guard = load_guard(f"cascade:edge,stream:{folder}")
    assert "stream/" in guard.name
    await guard.close()


@pytest.mark.parametrize("spec", ["stream", "stream:"])
def test_a_stream_guard_needs_a_name(spec: str) -> None:
    with pytest.raises(InputError, match="stream:FOLDER"):
        load_guard(spec)


def test_without_torch_a_stream_guard_says_what_to_install(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setitem(sys.modules, "tidegate.guards.stream", None)
    with pytest.raises(GuardUnavailable, match=r"pip install 'tidegate\[torch\]'"):
        load_guard(f"stream:{folder}")


def _edit(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | changes
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")

    return edit


def _tear(name: str) -> Callable[[Path], None]:
    def tear(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return tear


def _remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_remove("config.json"), "config.json cannot be read"),
        (_remove("tokenizer.json"), "tokenizer.json cannot be read"),
        (_remove("model.safetensors"), "has neither model.safetensors nor"),
        (_tear("config.json"), "config.json is not JSON"),
        (_tear("tokenizer.json"), "tokenizer of .* cannot be used"),
        (_tear("model.safetensors"), "is not a safetensors file"),
        (_edit(response_risk_level_map={"0": "Safe"}), "expected each of Safe, Controversial and Unsafe"),
        (_edit(query_category_map={"0": "Cats"}), "unknown category"),
        (_edit(architectures=["Qwen3ForCausalLM"]), "Qwen3ForGuardModel"),
        (_edit(hidden_size=64), "tensors of another shape"),
        (_edit(vocab_size=0), "config.vocab_size"),
    ],
)
def test_a_torn_folder_is_unavailable_and_says_what_is_wrong(
    folder: Path, tmp_path: Path, damage: Callable[[Path], None], said: str
) -> None:
    torn = tmp_path / "torn"
    shutil.copytree(folder, torn)
    damage(torn)
    with pytest.raises(GuardUnavailable, match=said):
        load_guard(f"stream:{torn}")


def test_a_tokenizer_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    other = write_checkpoint(
        tmp_path / "other", tensors_of(tiny_model(vocab_size=300)), config=official_config(torch_dtype="float32")
    )
    shutil.copy(folder / "tokenizer.json", other)
    with pytest.raises(GuardUnavailable, match="its vocabulary has 300 tokens"):
        Qwen3StreamGuard(other)


def test_arguments_that_cannot_be_are_named(folder: Path) -> None:
    with pytest.raises(InputError, match="dtype"):
        Qwen3StreamGuard(folder, dtype="float8")
    with pytest.raises(InputError, match="debounce"):
        Qwen3StreamGuard(folder, debounce=0)
    with pytest.raises(GuardUnavailable, match="cannot be loaded on nowhere"):
        Qwen3StreamGuard(folder, device="nowhere")


async def test_in_half_precision_a_stream_still_equals_itself_in_pieces(folder: Path) -> None:
    async with Qwen3StreamGuard(folder, dtype="bfloat16", positions=512) as guard:
        whole = await streamed(guard.open(PROMPT), [ANSWER])
        pieces = await streamed(guard.open(PROMPT), list(ANSWER))
    assert [v.span for v in whole] == [v.span for v in pieces]
    for one, other in zip(whole, pieces, strict=True):
        assert values(one.probabilities) == pytest.approx(values(other.probabilities), abs=0.05)
