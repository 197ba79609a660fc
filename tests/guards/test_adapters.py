"""Guards with adapters: each request has the verdicts of its own, whole texts and streams, at once with others."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from adapter_folder import random_tensors, turned, turned_adapter, write_adapter
from gen_folder import ABOUT_PROMPT, ABOUT_RESPONSE, REASONED, gen_folder, toy_rows
from tidegate.errors import GuardError, GuardUnavailable, InputError
from tidegate.guards import AdaptableGuard, gen, load_guard
from tidegate.guards.callers import CallersGuard, with_adapter
from tidegate.guards.cascade import AskBetween, AskOptions, CascadeConfig, CascadeGuard
from tidegate.guards.gen import GenGuard
from tidegate.guards.remembered import Memory, RememberedGuard
from tidegate.guards.terms import Terms, on_terms
from tidegate.moderate import check, moderate, moderate_stream
from tidegate.policy import load_policy
from tidegate.types import Conversation, Severity, Target, TokenVerdict, Verdict

NOISE = 1e-4
TOY = {Target.PROMPT: ABOUT_PROMPT, Target.RESPONSE: ABOUT_RESPONSE}
ROWS = [row for row in toy_rows(55, 36) if row.form is not REASONED]
NAMES = (None, "turned", "slight")
ANSWER = "of course tea and bread and knife and songs"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An adapter that turns verdicts round, and one that moves probabilities, and no more."""
    targets = ["v_proj", "down_proj"]
    tensors = random_tensors(AutoModelForCausalLM.from_pretrained(gen_folder()), seed=4, targets=targets, size=0.05)
    slight = write_adapter(tmp_path_factory.mktemp("slight"), tensors, target_modules=targets)
    return {"turned": turned_adapter(), "slight": slight}


@pytest.fixture
async def guard(folders: dict[str, Path]) -> AsyncIterator[GenGuard]:
    async with GenGuard(str(gen_folder()), forms=TOY, adapters=folders) as guard:
        yield guard


class Gate:
    """Lets a guard's model wait, so that what is asked meanwhile is computed together; counts adapters run by run."""

    def __init__(self, guard: GenGuard) -> None:
        self.runs: list[list[str | None]] = []
        self.open = threading.Event()
        self._started = threading.Event()
        model: Any = guard._worker._model
        score = model.score

        def gated(form: Any, prompts: Any, adapters: Sequence[str | None]) -> Any:
            self.runs.append(list(adapters))
            self._started.set()
            assert self.open.wait(60)
            return score(form, prompts, adapters)

        model.score = gated

    async def begun(self) -> None:
        assert await asyncio.to_thread(self._started.wait, 60)


def close(one: Verdict, other: Verdict) -> bool:
    same = (one.severity, one.categories, one.refusal, one.guard) == (
        other.severity,
        other.categories,
        other.refusal,
        other.guard,
    )
    return same and abs(one.probabilities.flagged - other.probabilities.flagged) < NOISE


async def said(guard: GenGuard, conversation: Conversation) -> Verdict | str:
    try:
        return await guard.judge(conversation)
    except GuardError as error:
        return str(error)


def agree(one: Verdict | str, other: Verdict | str) -> bool:
    if isinstance(one, str) or isinstance(other, str):
        return one == other
    return close(one, other)


async def test_one_tenant_has_turned_verdicts_and_the_others_at_the_same_time_have_not(guard: GenGuard) -> None:
    """Requests of both arrive in turn and are computed in the same runs."""
    gate = Gate(guard)
    bank, base = guard.adapted("turned"), guard
    first = asyncio.ensure_future(base.judge(ROWS[0].conversation))
    await gate.begun()
    asked = [asyncio.ensure_future(who.judge(row.conversation)) for row in ROWS for who in (bank, base)]
    await asyncio.sleep(0)
    gate.open.set()
    verdicts = await asyncio.gather(*asked)
    await first
    mixed = [run for run in gate.runs if len(set(run)) == 2]
    assert sum(map(len, mixed)) > len(ROWS)
    right_bank = [
        v.severity is r.form.parse(turned(r).answer).severity for r, v in zip(ROWS, verdicts[::2], strict=True)
    ]
    right_base = [v.severity is r.form.parse(r.answer).severity for r, v in zip(ROWS, verdicts[1::2], strict=True)]
    assert min(sum(right_bank), sum(right_base)) >= 0.9 * len(ROWS)
    assert {v.guard for v in verdicts[::2]} == {f"gen/{gen_folder().name}+turned"}
    assert {v.guard for v in verdicts[1::2]} == {f"gen/{gen_folder().name}"}


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(asked=st.lists(st.tuples(st.sampled_from(ROWS), st.sampled_from(NAMES)), min_size=1, max_size=10))
async def test_requests_at_once_have_the_verdicts_that_each_has_alone(
    guard: GenGuard, asked: list[tuple[Any, str | None]]
) -> None:
    together = await asyncio.gather(*(said(guard.adapted(name), row.conversation) for row, name in asked))
    for (row, name), verdict in zip(asked, together, strict=True):
        assert agree(verdict, await said(guard.adapted(name), row.conversation))


async def test_without_an_adapter_the_verdicts_are_those_of_a_guard_that_has_none(guard: GenGuard) -> None:
    """To the last bit, also between requests with adapters."""
    async with GenGuard(str(gen_folder()), forms=TOY) as plain:
        for row in ROWS:
            expected = await plain.judge(row.conversation)
            assert await guard.judge(row.conversation) == expected
            await said(guard.adapted("slight"), row.conversation)
            assert await guard.adapted("turned").adapted(None).judge(row.conversation) == expected


async def written(guard: GenGuard, text: str) -> list[TokenVerdict]:
    session = guard.open(None)
    verdicts = []
    for start in range(0, len(text), 5):
        verdicts += await session.feed(text[start : start + 5])
    return [*verdicts, *await session.finish()]


async def test_sessions_keep_their_adapter(guard: GenGuard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gen, "_BLOCK", 24)
    alone = [await written(guard.adapted(name), ANSWER) for name in NAMES]
    together = await asyncio.gather(*(written(guard.adapted(name), ANSWER) for name in NAMES * 3))
    for one, other in zip(together, alone * 3, strict=True):
        assert [(t.span, t.severity) for t in one] == [(t.span, t.severity) for t in other]
        assert all(
            abs(a.probabilities.flagged - b.probabilities.flagged) < NOISE for a, b in zip(one, other, strict=True)
        )
    assert {token.severity for token in alone[0]} != {token.severity for token in alone[1]}


async def test_an_adapted_guard_goes_wherever_a_guard_goes(guard: GenGuard) -> None:
    policy = load_policy("balanced")
    bank = guard.adapted("turned")
    safe = Conversation.of("tell me of tea and bread")
    decision = await moderate(safe, guard=bank, policy=policy)
    assert decision.verdict is not None
    assert (decision.verdict.severity, decision.verdict.guard) == (Severity.UNSAFE, bank.name)
    assert (await moderate(safe, guard=guard, policy=policy)).action < decision.action
    assert (await asyncio.to_thread(check, "tell me of tea and bread", guard=bank)).verdict == decision.verdict
    always = AskOptions(prompt=AskBetween(low=0.0, high=1.0))
    behind = CascadeGuard(guard, bank, CascadeConfig(first="-", second="-", ask=always))
    assert (await behind.judge(safe)).severity is Severity.UNSAFE

    async def pieces() -> AsyncIterator[str]:
        yield "of course tea "
        yield "and bread"

    steps = [step async for step in moderate_stream(pieces(), guard=bank, policy=policy)]
    assert steps[-1].decision is not None
    assert steps[-1].decision.action is decision.action
    assert steps[-1].decision.verdict is not None
    assert steps[-1].decision.verdict.guard == bank.name


async def test_an_adapted_guard_is_the_same_guard(guard: GenGuard) -> None:
    bank = guard.adapted("turned")
    assert bank.adapters == guard.adapters == ("turned", "slight")
    assert bank.adapted("slight").name == f"{guard.name}+slight"
    session = bank.open(None)
    assert (guard.sessions, bank.sessions) == (1, 1)
    session.close()
    assert (guard.sessions, guard.waiting, bank.waiting) == (0, 0, 0)
    await bank.close()
    with pytest.raises(GuardError, match="the guard is closed"):
        await guard.judge(Conversation.of("tell me of tea"))
    with pytest.raises(GuardUnavailable):
        guard.adapted("slight").open(None)


async def test_adapters_are_chosen_by_the_names_that_they_were_loaded_with(guard: GenGuard) -> None:
    with pytest.raises(InputError, match="adapter: unknown adapter 'bank'; known: turned, slight"):
        guard.adapted("bank")
    plain = load_guard(f"gen:{gen_folder()}")
    assert isinstance(plain, GenGuard)
    with pytest.raises(InputError, match="adapter: unknown adapter 'turned'; the guard has none"):
        plain.adapted("turned")
    await plain.close()


async def test_load_guard_takes_adapters_for_gen_guards_only(folders: dict[str, Path]) -> None:
    bank = load_guard(f"gen:{gen_folder()}", adapters={"bank": str(folders["turned"])})
    assert isinstance(bank, AdaptableGuard)
    assert bank.adapters == ("bank",)
    assert bank.adapted("bank").name == f"gen/{gen_folder().name}+bank"
    await bank.close()
    for spec in ("edge", f"stream:{gen_folder()}", f"cascade:edge,gen:{gen_folder()}"):
        with pytest.raises(InputError, match=f"adapters: only gen: guards take adapters, not {spec.partition(':')[0]}"):
            load_guard(spec, adapters=folders)


def test_what_cannot_be_an_adapter_ends_the_load(tmp_path: Path) -> None:
    with pytest.raises(GuardUnavailable, match=r"the adapter bank of .* cannot be used: adapter_config.json cannot be"):
        load_guard(f"gen:{gen_folder()}", adapters={"bank": tmp_path})
    with pytest.raises(InputError, match=r"adapters: expected .* as the name of an adapter"):
        load_guard(f"gen:{gen_folder()}", adapters={"../bank": tmp_path})


async def test_who_calls_a_gateway_is_judged_with_the_adapter_of_its_key_remembered_or_not(guard: GenGuard) -> None:
    callers = RememberedGuard(CallersGuard(guard), Memory(bytes(32)))
    conversation = ROWS[0].conversation
    expected = {name: await guard.adapted(name).judge(conversation) for name in NAMES}

    async def judged(name: str | None) -> Verdict:
        with with_adapter(name):
            return await on_terms(callers, Terms(deadline_s=60)).judge(conversation)

    for _ in range(2):
        for name, verdict in zip(NAMES, await asyncio.gather(*map(judged, NAMES)), strict=True):
            assert close(verdict, expected[name]), name
    with with_adapter("of nobody"), pytest.raises(GuardError, match="not loaded"):
        await callers.judge(conversation)
