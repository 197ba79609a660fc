"""The Gen guard: verdicts as the model answers, many callers at once, streams in blocks, and failures that say so."""

from __future__ import annotations

import asyncio
import gc
import json
import shutil
import sys
import threading
import weakref
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest

pytest.importorskip("torch")

from gen_folder import (
    ABOUT_PROMPT,
    ABOUT_RESPONSE,
    FORMS,
    REASONED,
    gen_folder,
    toy_rows,
    write_gen_folder,
)
from streams import streamed
from tidegate.errors import (
    GuardError,
    GuardOverloaded,
    GuardUnavailable,
    InputError,
    SessionClosed,
    UnreadableVerdict,
)
from tidegate.guards import StreamGuard, load_guard
from tidegate.guards.base import judges_together
from tidegate.guards.gen import GenGuard
from tidegate.guards.terms import Terms
from tidegate.model.scoring import Scores
from tidegate.prompts import OFFICIAL, Form, reason_form
from tidegate.types import (
    Channel,
    Conversation,
    Role,
    Severity,
    Target,
    TokenVerdict,
    ToolCall,
    Turn,
    Verdict,
)

NOISE = 1e-4
TOY = {Target.PROMPT: ABOUT_PROMPT, Target.RESPONSE: ABOUT_RESPONSE}
ROWS = [row for row in toy_rows(7, 60) if row.form is not REASONED]
ASKED = Turn(Role.USER, "tell me more")
SAFE, UNSAFE = "of course tea and bread", "of course tea and knife and bread"


@pytest.fixture
async def guard() -> AsyncIterator[GenGuard]:
    async with GenGuard(str(gen_folder()), forms=TOY) as guard:
        yield guard


class Runs:
    """What a guard's model is asked, in order; may wait before it answers, or fail."""

    def __init__(self, guard: GenGuard) -> None:
        self.sizes: list[int] = []
        self.started, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()
        self.error: Exception | None = None
        model: Any = guard._worker._model
        score = model.score

        def counted(form: Form, prompts: Sequence[Sequence[int]], adapters: Sequence[str | None]) -> Any:
            self.sizes.append(len(prompts))
            self.started.set()
            assert self.go_on.wait(60)
            if self.error is not None:
                raise self.error
            return score(form, prompts, adapters)

        model.score = counted

    async def begun(self) -> None:
        assert await asyncio.to_thread(self.started.wait, 60)


def close(one: Verdict, other: Verdict) -> bool:
    same = (one.severity, one.categories, one.refusal) == (other.severity, other.categories, other.refusal)
    return same and abs(one.probabilities.flagged - other.probabilities.flagged) < NOISE


async def test_verdicts_say_what_the_rows_say(guard: GenGuard) -> None:
    right = 0
    for row in ROWS:
        verdict = await guard.judge(row.conversation)
        answer = row.form.parse(row.answer)
        assert verdict.target is row.conversation.target
        assert verdict.guard == guard.name == f"gen/{gen_folder().name}"
        said = (verdict.severity, set(verdict.categories), verdict.refusal)
        right += said == (answer.severity, set(answer.categories), answer.refusal)
    assert right >= 0.9 * len(ROWS)


async def test_a_verdict_has_probabilities(guard: GenGuard) -> None:
    for row in ROWS[:10]:
        verdict = await guard.judge(row.conversation)
        by_severity = {severity: verdict.probabilities.at_least(severity) for severity in Severity}
        assert by_severity[Severity.SAFE] == 1.0
        assert (by_severity[Severity.CONTROVERSIAL] > 0.5) == (verdict.severity is not Severity.SAFE)
        if verdict.severity is Severity.SAFE:
            assert (verdict.categories, dict(verdict.category_probabilities)) == ((), {})
        else:
            assert set(verdict.category_probabilities) == set(row.form.categories)
            assert sum(verdict.category_probabilities.values()) == pytest.approx(1, abs=0.05)
            assert max(verdict.category_probabilities, key=lambda n: verdict.category_probabilities[n]) in (
                verdict.categories
            )


async def test_callers_at_once_share_runs_and_get_what_they_get_alone(guard: GenGuard) -> None:
    alone = [await guard.judge(row.conversation) for row in ROWS]
    runs = Runs(guard)
    runs.go_on.clear()
    first = asyncio.ensure_future(guard.judge(ROWS[0].conversation))
    await runs.begun()
    waiting = [asyncio.ensure_future(guard.judge(row.conversation)) for row in ROWS[1:]]
    await asyncio.sleep(0)
    assert guard.waiting == len(ROWS) - 1
    runs.go_on.set()
    together = [await first, *await asyncio.gather(*waiting)]
    assert all(close(one, other) for one, other in zip(together, alone, strict=True))
    assert sum(runs.sizes) == len(ROWS)
    assert len(runs.sizes) <= 6


async def test_callers_with_the_instructions_of_one_policy_share_runs_too(guard: GenGuard) -> None:
    runs = Runs(guard)
    runs.go_on.clear()
    first = asyncio.ensure_future(guard.judge(Conversation.of("tell me of tea")))
    await runs.begun()
    told = [guard.on_terms(Terms(instructions=words)) for words in ["for users in IN"] * 4 + ["for users in DE"]]
    waiting = [asyncio.ensure_future(one.judge(Conversation.of("tell me of tea"))) for one in told]
    await asyncio.sleep(0)
    runs.go_on.set()
    await asyncio.gather(first, *waiting, return_exceptions=True)  # what this model says of such texts does not matter

    assert sorted(runs.sizes) == [1, 1, 4]


async def test_short_prompts_do_not_share_a_run_with_long_ones(guard: GenGuard) -> None:
    runs = Runs(guard)
    runs.go_on.clear()
    first = asyncio.ensure_future(guard.judge(Conversation.of("tell me of tea")))
    await runs.begun()
    texts = ["tell me of tea", "tell me of tea and maps " * 60, "tell me of bread"]
    waiting = [asyncio.ensure_future(guard.judge(Conversation.of(text))) for text in texts]
    await asyncio.sleep(0)
    runs.go_on.set()
    await asyncio.gather(first, *waiting, return_exceptions=True)
    assert runs.sizes == [1, 2, 1]


async def test_what_nobody_waits_for_is_not_computed(guard: GenGuard) -> None:
    runs = Runs(guard)
    runs.go_on.clear()
    first = asyncio.ensure_future(guard.judge(ROWS[0].conversation))
    await runs.begun()
    others = [asyncio.ensure_future(guard.judge(row.conversation)) for row in ROWS[1:9]]
    await asyncio.sleep(0)
    for other in others:
        other.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    runs.go_on.set()
    await first
    await guard.judge(ROWS[1].conversation)
    assert runs.sizes == [1, 1]


async def test_more_than_may_wait_is_refused(guard: GenGuard) -> None:
    runs = Runs(guard)
    runs.go_on.clear()
    guard._worker._most_waiting = 2
    first = asyncio.ensure_future(guard.judge(ROWS[0].conversation))
    await runs.begun()
    waiting = [asyncio.ensure_future(guard.judge(row.conversation)) for row in ROWS[1:3]]
    await asyncio.sleep(0)
    with pytest.raises(GuardOverloaded, match="2 texts wait already"):
        await guard.judge(ROWS[3].conversation)
    runs.go_on.set()
    assert len(await asyncio.gather(first, *waiting)) == 3


async def test_closing_refuses_what_waits_and_what_comes() -> None:
    guard = GenGuard(str(gen_folder()), forms=TOY)
    runs = Runs(guard)
    runs.go_on.clear()
    session = guard.open(None)
    running = asyncio.ensure_future(guard.judge(ROWS[0].conversation))
    await runs.begun()
    waiting = asyncio.ensure_future(guard.judge(ROWS[1].conversation))
    await asyncio.sleep(0)
    closing = asyncio.ensure_future(guard.close())
    with pytest.raises(SessionClosed, match="the guard is closed"):
        await waiting
    runs.go_on.set()
    assert isinstance(await running, Verdict)
    await closing
    await guard.close()
    assert guard._worker._model is None
    with pytest.raises(SessionClosed, match="the guard is closed"):
        await guard.judge(ROWS[0].conversation)
    with pytest.raises(SessionClosed, match="the guard is closed"):
        await session.finish()
    with pytest.raises(GuardUnavailable, match="the guard is closed"):
        guard.open(None)


async def test_a_closed_guard_keeps_no_weights() -> None:
    guard = GenGuard(str(gen_folder()), forms=TOY)
    await guard.judge(ROWS[0].conversation)
    model = guard._worker._model
    assert model is not None
    weights = weakref.ref(model)
    await guard.close()
    del model
    gc.collect()
    assert weights() is None


async def test_a_guard_that_was_never_asked_closes() -> None:
    guard = GenGuard(str(gen_folder()), forms=TOY)
    await guard.close()
    assert guard._worker._model is None


async def test_a_failure_of_torch_is_a_guard_error_and_not_the_end(guard: GenGuard) -> None:
    runs = Runs(guard)
    runs.error = RuntimeError("canary")
    with pytest.raises(GuardError, match=r"^torch could not compute: RuntimeError$"):
        await guard.judge(ROWS[0].conversation)
    runs.error = None
    assert isinstance(await guard.judge(ROWS[0].conversation), Verdict)


async def test_a_model_that_does_not_follow_the_form_gives_no_verdict(tmp_path: Path) -> None:
    write_gen_folder(tmp_path, trained=False)
    async with load_guard(f"gen:{tmp_path}") as guard:  # type: ignore[attr-defined]
        for row in ROWS[:4]:
            with pytest.raises(UnreadableVerdict, match="does not answer in the lines 'Safety:'"):
                await guard.judge(row.conversation)


async def test_a_prompt_that_is_too_long_is_a_guard_error_that_says_so(guard: GenGuard) -> None:
    with pytest.raises(GuardError, match=r"^the prompt has \d+ tokens: the model reads at most 4096$"):
        await guard.judge(Conversation.of("canary " * 5000))


async def test_a_long_prompt_is_read_whole(guard: GenGuard) -> None:
    lengths = []

    def noted(form: Form, prompts: Sequence[Sequence[int]], _: Sequence[str | None]) -> list[Scores]:
        lengths.extend(map(len, prompts))
        return always_safe(form, prompts)

    guard._worker._model.score = noted  # type: ignore[union-attr,method-assign]
    conversation = Conversation.of("tell me of tea and bread " * 400)
    verdict = await guard.judge(conversation)
    assert verdict.severity is Severity.SAFE
    assert lengths == [len(guard._ids(ABOUT_PROMPT.prompt(conversation)))]
    assert lengths[0] > 2000


def several(guard: GenGuard) -> list[str]:
    """The texts that a guard asks its model about."""
    asked: list[str] = []
    ids = guard._ids

    def kept(prompt: Any) -> list[int]:
        asked.append(prompt.segments[-2].text)
        return ids(prompt)

    guard._ids = kept
    return asked


TURN = Turn(Role.ASSISTANT, f"no thanks {SAFE}", reasoning=UNSAFE, tool_calls=(ToolCall("find", SAFE),))


async def test_reasoning_and_calls_are_judged_apart_and_the_worst_counts(guard: GenGuard) -> None:
    asked = several(guard)
    verdict = await guard.judge(Conversation((ASKED, TURN)))
    assert asked == [TURN.content, TURN.reasoning, SAFE]
    assert (verdict.severity, verdict.categories) == (Severity.UNSAFE, ("Violent",))
    assert verdict.refusal is True, "the refusal is that of the answer"


async def test_reasoning_and_answer_are_judged_together_when_asked() -> None:
    async with GenGuard(str(gen_folder()), forms=TOY, thinking="together") as guard:
        assert judges_together(guard)
        asked = several(guard)
        await asyncio.gather(guard.judge(Conversation((ASKED, TURN))), return_exceptions=True)
    assert asked == [f"{UNSAFE}\n\nno thanks {SAFE}\n\n{SAFE}"]


async def test_a_reason_is_given_where_the_form_asks_for_it() -> None:
    async with GenGuard(str(gen_folder()), forms={Target.PROMPT: REASONED}) as guard:
        reasons = set()
        for row in (row for row in toy_rows(8, 40) if row.form is REASONED):
            verdict = await guard.judge(row.conversation)
            reasons.add((verdict.severity is Severity.SAFE, (verdict.reason or "").split(" of ")[0]))
    assert reasons == {(True, ""), (False, "it speaks")}


def test_a_guard_serves_several_event_loops() -> None:
    guard = GenGuard(str(gen_folder()), forms=TOY)
    first = asyncio.run(guard.judge(ROWS[0].conversation))
    second = asyncio.run(guard.judge(ROWS[0].conversation))
    assert close(first, second)
    asyncio.run(guard.close())


# --- sessions -----------------------------------------------------------------------------------------------------


async def said(guard: GenGuard, pieces: Sequence[str]) -> list[TokenVerdict]:
    return await streamed(guard.open(Conversation((ASKED,))), pieces)


LONG = (f"{SAFE} and maps and birds and songs and rivers ") * 20


async def test_a_long_stream_is_judged_in_blocks_that_grow_with_it(guard: GenGuard) -> None:
    guard._worker._model.score = always_safe  # type: ignore[union-attr,method-assign]
    text = 3 * LONG

    tokens = await said(guard, [text])

    widths = [token.span.end - token.span.start for token in tokens]
    *blocks, last, _ = widths
    assert blocks == [max(240, sum(blocks[:place]) // 8) for place in range(len(blocks))]
    assert blocks[0] < blocks[-1] >= last
    assert (sum(widths), widths[-1]) == (len(text), 0)


def always_safe(form: Form, prompts: Sequence[Sequence[int]], *_: object) -> list[Scores]:
    kind = form.lines[0].kind
    words = {"Safe": 0.9, "Controversial": 0.1, "Unsafe": 0.0}
    return [Scores("Safety: Safe\nCategories: None\nRefusal: No", {kind: words}) for _ in prompts]


async def test_a_short_stream_is_judged_at_its_end_as_a_whole_text_is(guard: GenGuard) -> None:
    for text in (SAFE, UNSAFE):
        verdict = await guard.judge(Conversation((ASKED, Turn(Role.ASSISTANT, text))))
        tokens = await said(guard, list(text))
        assert [(token.span.start, token.span.end) for token in tokens] == [(0, len(text)), (len(text), len(text))]
        assert {token.severity for token in tokens} == {verdict.severity}
        assert {token.category for token in tokens} == {verdict.categories[0] if verdict.categories else None}
        assert tokens[0].probabilities.flagged == pytest.approx(verdict.probabilities.flagged, abs=NOISE)


async def test_a_stream_without_text_has_one_verdict(guard: GenGuard) -> None:
    guard._worker._model.score = always_safe  # type: ignore[union-attr,method-assign]
    (token,) = await said(guard, ["", ""])
    assert (token.span.start, token.span.end, token.severity) == (0, 0, Severity.SAFE)


async def test_a_flagged_stream_names_its_category(guard: GenGuard) -> None:
    token = (await said(guard, [UNSAFE]))[0]
    assert (token.severity, token.category) == (Severity.UNSAFE, "Violent")
    assert token.category_probability > 0.5


async def test_a_session_may_be_closed_while_it_judges(guard: GenGuard) -> None:
    guard._worker._model.score = always_safe  # type: ignore[union-attr,method-assign]
    runs = Runs(guard)
    runs.go_on.clear()
    session = guard.open(Conversation((ASKED,)))
    feeding = asyncio.ensure_future(session.feed(LONG))
    await runs.begun()
    session.close()
    runs.go_on.set()
    with pytest.raises(SessionClosed, match="closed while it judged"):
        await feeding
    assert (guard.sessions, len(runs.sizes)) == (0, 1)


@pytest.mark.parametrize("thinking", ["apart", "together"])
@pytest.mark.parametrize("channel", [Channel.ANSWER, Channel.TOOL_CALL])
async def test_a_stream_is_judged_with_its_reasoning_where_the_guard_judges_them_together(
    thinking: Literal["apart", "together"], channel: Channel
) -> None:
    async with GenGuard(str(gen_folder()), forms=TOY, thinking=thinking) as guard:
        guard._worker._model.score = always_safe  # type: ignore[union-attr,method-assign]
        asked = several(guard)
        await streamed(guard.open(Conversation((ASKED,)), channel, reasoning=UNSAFE, name="find"), list(SAFE))
    assert asked == [f"{UNSAFE}\n\n{SAFE}" if thinking == "together" else SAFE]


@pytest.mark.parametrize("thinking", ["apart", "together"])
async def test_a_stream_of_reasoning_is_judged_by_itself(thinking: Literal["apart", "together"]) -> None:
    async with GenGuard(str(gen_folder()), forms=TOY, thinking=thinking) as guard:
        asked = several(guard)
        session = guard.open(Conversation((ASKED,)), Channel.REASONING, reasoning=SAFE)
        tokens = await streamed(session, [UNSAFE])
    assert asked == [UNSAFE]
    assert {token.severity for token in tokens} == {Severity.UNSAFE}


# --- loading ------------------------------------------------------------------------------------------------------


async def test_a_gen_guard_is_loaded_by_its_folder() -> None:
    guard = load_guard(f"gen:{gen_folder()}", threads=1)
    assert isinstance(guard, GenGuard)
    assert isinstance(guard, StreamGuard)
    assert guard._forms == dict(OFFICIAL)
    await guard.close()


async def test_a_gen_guard_may_stand_in_a_cascade() -> None:
    guard = load_guard(f"cascade:edge,gen:{gen_folder()}")
    assert "gen/" in guard.name
    await guard.close()


def test_a_gen_guard_needs_a_name() -> None:
    for spec in ("gen", "gen:"):
        with pytest.raises(InputError, match="expected edge, or edge:FOLDER"):
            load_guard(spec)


def test_a_folder_that_is_not_there_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(GuardUnavailable, match="neither a folder nor a repository"):
        load_guard(f"gen:{tmp_path / 'none'}")


def test_without_torch_a_gen_guard_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tidegate.guards.gen", None)
    with pytest.raises(GuardUnavailable, match=r"pip install 'tidegate\[torch\]'"):
        load_guard(f"gen:{gen_folder()}")


def with_section(to: Path, section: Any) -> str:
    folder = to / "guard"
    shutil.copytree(gen_folder(), folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | {"tidegate": section}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(folder)


async def test_a_config_says_how_a_guard_answers_and_what_it_is_called(tmp_path: Path) -> None:
    names = ["Refunds", "Legal advice"]
    section = {"name": "bank", "version": "3", "form": "reason", "categories": {"prompt": names}}
    async with GenGuard(with_section(tmp_path, section)) as guard:
        assert guard.name == "bank/3"
        assert guard._forms == {
            Target.PROMPT: reason_form(Target.PROMPT, names),
            Target.RESPONSE: reason_form(Target.RESPONSE),
        }


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"from": "reason"}, "from: Extra inputs"),
        ({"form": "free"}, "form: Input should be"),
        ({"form": "reason", "categories": {"prompt": ["a, b"]}}, "categories: expected different names"),
        ({"categories": {"prompt": ["a"]}}, "categories: the official form has its own"),
    ],
)
def test_a_wrong_section_is_unavailable_and_says_what_is_wrong(tmp_path: Path, section: Any, message: str) -> None:
    with pytest.raises(GuardUnavailable, match=f"the section tidegate .* is wrong: {message}"):
        GenGuard(with_section(tmp_path, section))


def test_the_toy_forms_answer_as_the_official_ones_do() -> None:
    assert [form.lines for form in FORMS[:2]] == [form.lines for form in OFFICIAL.values()]
