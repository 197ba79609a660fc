"""Instructions of a policy reach the prompt of a generative guard, and change nothing for others."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from gen_folder import ABOUT_PROMPT, ABOUT_RESPONSE, gen_folder
from tidegate.gateway.telemetry import Telemetry, TimedGuard
from tidegate.guards.gen import GenGuard, _Work, _Worker
from tidegate.guards.resilient import ResilientGuard
from tidegate.guards.terms import Terms, on_terms
from tidegate.prompts import OFFICIAL
from tidegate.types import Conversation, Target

INSTRUCTIONS = "Judge for users in India.\nCaste slurs are unsafe."
TERMS = Terms(instructions=INSTRUCTIONS)


@pytest.mark.parametrize("target", Target)
def test_instructions_stand_behind_the_conversation_and_before_what_is_asked(target: Target) -> None:
    form = OFFICIAL[target]
    conversation = Conversation.of("tea", "bread" if target is Target.RESPONSE else None)

    plain, told = form.prompt(conversation).text, form.instructed(INSTRUCTIONS).prompt(conversation).text

    before, block, after = told.partition(
        f"<BEGIN ADDITIONAL INSTRUCTIONS>\n{INSTRUCTIONS}\n<END ADDITIONAL INSTRUCTIONS>\n\n"
    )
    assert block
    assert before + after == plain
    assert before.endswith("<END CONVERSATION>\n\n")
    assert after.startswith("Provide your safety assessment")
    assert form.instructed(INSTRUCTIONS).fixed_beginning == form.fixed_beginning


async def test_a_gen_guard_is_told_and_the_guard_itself_stays_as_it_was() -> None:
    forms = {Target.PROMPT: ABOUT_PROMPT, Target.RESPONSE: ABOUT_RESPONSE}
    question = Conversation.of("tell me of tea and knife and bread")
    async with GenGuard(str(gen_folder()), forms=forms) as guard:
        before = await guard.judge(question)
        wrapped = ResilientGuard(TimedGuard(guard, Telemetry()))
        inside = on_terms(wrapped, TERMS).guard
        assert isinstance(inside, TimedGuard)
        told = inside.guard
        assert isinstance(told, GenGuard)

        assert INSTRUCTIONS in told._forms[Target.PROMPT].prompt(question).text
        assert len(await told._tokens(told._forms[Target.PROMPT], question)) > len(
            await guard._tokens(guard._forms[Target.PROMPT], question)
        )
        assert (told.name, on_terms(guard, Terms(deadline_s=1)).name) == (guard.name, guard.name)
        assert (await guard.judge(question)) == before


async def test_texts_with_the_instructions_of_one_policy_are_computed_together_and_others_apart() -> None:
    form = OFFICIAL[Target.PROMPT]
    joins = _Worker._sharing(_Worker.__new__(_Worker))  # which needs no model
    india = [_Work(form.instructed("for users in IN"), [1, 2, 3], None) for _ in range(2)]

    assert [joins(work) for work in india] == [True, True]
    assert not joins(_Work(form.instructed("for users in DE"), [1, 2, 3], None))
    assert not joins(_Work(form, [1, 2, 3], None))
