"""How stops are carried out on a stream: held by risk, let out first, masked, rolled back, confirmed."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving import Record
from tidegate.guards.second import SecondGuard
from tidegate.moderate import Retry, Step, StreamModerator, moderate, moderate_stream
from tidegate.policy import Policy, parse_policy
from tidegate.testing import FakeGuard, FakeStreamGuard
from tidegate.types import (
    Action,
    Conversation,
    Decision,
    InterventionKind,
    Severity,
    Span,
)

HEAD = "name: test\non_guard_error: block\notherwise: allow\ncontroversial: safe\ndebounce: 2\n"
RULES = """rules:
  - {name: personal, severity: unsafe, categories: [PII], action: redact}
  - {name: stop, severity: unsafe, action: block}
"""


def policy(extra: str = "", rules: str = RULES, **changes: str) -> Policy:
    lines = [line for line in HEAD.splitlines() if line.partition(":")[0] not in changes]
    return parse_policy("\n".join((*lines, *(f"{key}: {value}" for key, value in changes.items()), extra, rules)))


class Personal(FakeStreamGuard):
    """Calls words with a digit or an @ personal; the word ``personal`` too."""

    def call(self, word: str) -> tuple[Severity, str | None]:
        if any(sign.isdigit() or sign == "@" for sign in word) or word == "personal":
            return Severity.UNSAFE, "PII"
        return super().call(word)


async def pieces(*texts: str) -> AsyncIterator[str]:
    for text in texts:
        yield text


async def run(*texts: str, guard: FakeStreamGuard | None = None, **options: Any) -> tuple[str, Decision]:
    """What left, and the decision."""
    guard = guard or Personal()
    steps = [step async for step in moderate_stream(pieces(*texts), guard=guard, **options)]
    assert guard.open_sessions == 0
    decision = steps[-1].decision
    assert decision is not None
    return "".join(step.released for step in steps), decision


def check_cutting(text: str, once: tuple[str, Decision], in_parts: tuple[str, Decision]) -> None:
    """The same left and the same was done; only how much had come, and went with the end, is a matter of the parts."""
    ends = (InterventionKind.CUT, InterventionKind.REPLACE)
    (all_done, all_thrown), (done, thrown) = (
        (
            [replace(one, characters=0) if one.kind in ends else one for one in decision.interventions],
            sum(one.characters for one in decision.interventions if one.kind in ends),
        )
        for _, decision in (once, in_parts)
    )
    assert (once[0], all_done) == (in_parts[0], done)
    assert all_thrown in (0, len(text) - len(once[0]))
    assert thrown <= all_thrown


def kinds(decision: Decision) -> list[tuple[str, str, int]]:
    return [(one.kind.value, one.outcome, one.count) for one in decision.interventions]


# --- redact -------------------------------------------------------------------------------------------------------


async def test_personal_data_is_masked_and_the_stream_goes_on() -> None:
    released, decision = await run("call +49 30 123", "4567 or ann@example.org", " and so on", policy=policy())

    assert released == "call +99 99 9999999 or xxx@xxxxxxx.xxx and so on"
    assert (decision.action, decision.rule) == (Action.REDACT, "personal")
    assert kinds(decision) == [("redact", "done", 2)]
    assert decision.interventions[0].characters == len("+49 30 1234567" + "ann@example.org")
    assert decision.leaked == 0


async def test_a_guard_that_fails_behind_a_mask_lets_no_half_of_a_number_out() -> None:
    """The policy lets text go on unjudged; what was begun to be taken out still is, however it comes."""

    class Failing(Personal):
        def call(self, word: str) -> tuple[Severity, str | None]:
            if word == "then":
                raise RuntimeError
            return super().call(word)

    lenient = policy(on_guard_error="allow", debounce="1")
    texts = ("to ann@example.org and ", "then ", "call 030 12", "34567 or 040 ", "7654321.")
    released, _ = await run(*texts, guard=Failing(), policy=lenient)

    assert released == "to xxx@xxxxxxx.xxx and then call 999 9999999 or 999 9999999."


async def test_what_left_is_what_was_released_and_its_masks_say_where_it_differs() -> None:
    moderator = StreamModerator(Personal(), policy())
    steps = [await moderator.feed(text) for text in ("call +49 30 123", "4567 or ann@exa", "mple.org", " and so on")]
    steps.append(await moderator.finish())

    assert "".join(step.released for step in steps) == moderator.left
    text = moderator.text
    for start, mask in (one for step in steps for one in step.masks):
        text = text[:start] + mask + text[start + len(mask) :]
    assert text == moderator.left == "call +99 99 9999999 or xxx@xxxxxxx.xxx and so on"


async def test_where_nobody_masks_the_text_is_stopped_instead() -> None:
    moderator = StreamModerator(Personal(), policy(), masks=False)
    step = await moderator.feed("call me at ann@example.org 030 1234567 ")

    assert step.decision is not None
    assert (step.released, step.decision.action) == ("call me at", Action.BLOCK)


async def test_a_number_at_the_very_end_is_masked() -> None:
    released, decision = await run("call me: 030 123", " 4567", policy=policy())

    assert released == "call me: 999 999 9999"
    assert decision.action is Action.REDACT


async def test_a_number_before_the_alarm_is_masked_when_no_calm_word_stands_between() -> None:
    """The guard says it with the words behind the number: the number was held for that."""
    quiet = FakeStreamGuard(unsafe={"personal": "PII"})

    released, _ = await run("call 030123456 personal personal now", guard=quiet, policy=policy())
    later, decision = await run("call 030123456 then personal personal now", guard=quiet, policy=policy())

    assert released == "call 999999999 personal personal now"
    assert later == "call 030123456 then"  # what a calm word followed has left, and nothing is there to be taken out
    assert (decision.action, decision.rule, kinds(decision)) == (Action.BLOCK, "personal", [("cut", "done", 1)])


async def test_a_number_that_follows_the_alarm_is_waited_for() -> None:
    quiet = FakeStreamGuard(unsafe={"personal": "PII"})

    released, decision = await run("personal personal number is ", "030 1234567", " ok", guard=quiet, policy=policy())

    assert released == "personal personal number is 999 9999999 ok"
    assert decision.action is Action.REDACT


async def test_personal_text_without_a_form_is_stopped() -> None:
    """The fallback: a name is nothing that the recognizer sees."""
    words = " word" * 400

    released, decision = await run("his personal personal", words, policy=policy())

    assert (released, decision.action) == ("his", Action.BLOCK)
    at_end, decision = await run("his personal personal", policy=policy())
    assert (at_end, decision.action) == ("his", Action.BLOCK)


async def test_other_harm_behind_masked_data_stops_the_stream() -> None:
    released, decision = await run("call 0301 234567 or bomb bomb now", policy=policy())

    assert released == "call 9999 999999 or"
    assert (decision.action, decision.rule) == (Action.BLOCK, "stop")
    assert [kind for kind, *_ in kinds(decision)] == ["redact", "cut"]


async def test_redact_of_another_category_is_block() -> None:
    rules = "rules: [{name: hide, severity: unsafe, action: redact}]"

    assert (await run("a bomb bomb 030123456", policy=policy(rules=rules)))[1].action is Action.BLOCK


async def test_a_block_with_the_intervention_redact_masks() -> None:
    rules = "rules: [{name: stop, severity: unsafe, categories: [PII], action: block, intervention: redact}]"

    released, decision = await run("call 0301 234567 ok", policy=policy(rules=rules))

    assert (released, decision.action) == ("call 9999 999999 ok", Action.REDACT)


async def test_without_a_redacting_rule_nothing_is_held_for_the_end_of_a_number() -> None:
    moderator = StreamModerator(Personal(), policy(rules="rules: []"))

    assert (await moderator.feed("call 030 123 ")).released == "call 030 123"


async def test_text_without_candidates_is_not_held() -> None:
    moderator = StreamModerator(FakeStreamGuard(), policy())

    assert (await moderator.feed("one two three ")).released == "one two three"


WORDS = st.sampled_from(
    ["one", "two", "bomb", "personal", "030", "1234567", "+49", "ann@example.org", "电话", "\n", "x"]
)


@st.composite
def cuts(draw: st.DrawFn) -> tuple[str, list[str]]:
    text = " ".join(draw(st.lists(WORDS, max_size=14)))
    places = sorted(draw(st.lists(st.integers(0, len(text)), max_size=8)))
    return text, [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


@given(cuts(), st.sampled_from(["", "hold: {risk: 0.5}", "intervention: redact"]))
async def test_what_leaves_does_not_depend_on_the_cutting(cut: tuple[str, list[str]], extra: str) -> None:
    text, parts = cut

    once, in_parts = [await run(*texts, policy=policy(extra)) for texts in ([text], parts)]

    check_cutting(text, once, in_parts)
    assert (once[1].action, once[1].rule, once[1].leaked) == (
        in_parts[1].action,
        in_parts[1].rule,
        in_parts[1].leaked,
    )
    if once[1].action is not Action.BLOCK:
        assert len(once[0]) == len(text)


async def test_a_guard_that_fails_while_a_number_is_held_is_decided_by_the_policy() -> None:
    stopped, decision = await run("call 030 guardfail", " now", policy=policy())
    passed, _ = await run("call 030 guardfail", " now", policy=policy(on_guard_error="allow"))

    assert (stopped, decision.rule) == ("call", "on_guard_error")
    assert passed == "call 030 guardfail now"


# --- redact, a whole text -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "action", "done"),
    [
        ("personal 030 1234567", Action.REDACT, [("redact", "done", 1)]),
        ("personal Ann Lee", Action.BLOCK, []),
        ("personal 030 1234567 bomb", Action.BLOCK, []),
        ("all is well 030 1234567".replace("030 1234567", ""), Action.ALLOW, []),
    ],
)
async def test_a_whole_text_is_redacted_where_that_is_enough(text: str, action: Action, done: list[Any]) -> None:
    decision = await moderate(Conversation.of(text), guard=Personal(), policy=policy())

    assert (decision.action, kinds(decision)) == (action, done)


# --- holding by risk ----------------------------------------------------------------------------------------------


async def released_by(moderator: StreamModerator, *texts: str) -> list[str]:
    return [(await moderator.feed(text)).released for text in texts]


async def test_risk_that_rises_holds_text_until_it_has_fallen_for_as_many_tokens_as_the_debounce() -> None:
    """``knife`` is controversial, which this policy lets pass: it is the risk that holds."""
    moderator = StreamModerator(FakeStreamGuard(), policy("hold: {risk: 0.5}"))

    assert await released_by(moderator, "a knife ", "here ", "there ", "on ") == ["a", "", " knife here there", " on"]
    assert (await moderator.finish()).released == " "


async def test_what_was_held_by_risk_is_let_go_at_the_end() -> None:
    moderator = StreamModerator(FakeStreamGuard(), policy("hold: {risk: 0.5}"))

    assert await released_by(moderator, "a knife ") == ["a"]
    step = await moderator.finish()
    assert (step.released, step.decision and step.decision.action) == (" knife ", Action.ALLOW)


async def test_what_was_held_by_risk_does_not_leave_when_the_stream_is_stopped() -> None:
    released, decision = await run("a knife on bomb bomb x", policy=policy("hold: {risk: 0.5}"))

    assert (released, decision.action) == ("a", Action.BLOCK)


# --- releasing first ----------------------------------------------------------------------------------------------


class Slow(FakeStreamGuard):
    """Judges when it is let."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.go = asyncio.Event()

    async def trouble(self) -> None:
        await self.go.wait()


async def test_text_that_leaves_first_is_counted_and_what_was_flagged_of_it_too() -> None:
    guard = Slow()
    moderator = StreamModerator(guard, policy("hold: release_first"))

    first = await released_by(moderator, "a bomb ", "bomb ", "on ")
    guard.go.set()
    step = await moderator.finish()

    assert first == ["a bomb ", "bomb ", "on "]
    assert step.decision is not None
    assert (step.decision.action, step.decision.leaked) == (Action.BLOCK, len(" bomb bomb on "))
    assert [(one.state.value, one.characters) for one in step.decision.coverage] == [("released_first", 15)]


@given(
    st.integers(0, 12), st.lists(st.sampled_from(["ok ", "bomb ", "b", "om", "b bomb ", "x "]), max_size=12), st.data()
)
async def test_no_more_flagged_text_leaves_than_the_policy_allows(
    leak: int, texts: list[str], data: st.DataObject
) -> None:
    """The first guarantee, with a guard that is slow at any time."""
    guard = Slow()
    moderator = StreamModerator(guard, policy(f"hold: {{mode: release_first, leak: {leak}}}"))
    out, decision = "", None
    for text in texts:
        if data.draw(st.booleans()):
            guard.go.set()
        else:
            guard.go.clear()
        step = await moderator.feed(text)
        out += step.released
        if (decision := step.decision) is not None:
            break
    guard.go.set()
    if decision is None:
        step = await moderator.finish()
        out, decision = out + step.released, step.decision

    assert decision is not None
    assert decision.leaked <= leak
    assert sum(one.characters for one in decision.coverage) == moderator.fed
    if decision.action is Action.BLOCK:
        start = decision.verdict.span.start if decision.verdict and decision.verdict.span else 0
        assert max(0, len(out) - start) == decision.leaked
    else:
        assert out == "".join(texts)


async def test_in_mode_hold_nothing_flagged_ever_leaves() -> None:
    for count in range(1, 5):
        for words in itertools.product(["ok", "bomb", "knife"], repeat=count):
            _, decision = await run(*(f"{word} " for word in words), policy=policy("hold: {risk: 0.5}"))
            assert decision.leaked == 0


async def test_the_stop_of_a_slow_guard_is_seen_with_the_next_piece() -> None:
    guard = Slow()
    moderator = StreamModerator(guard, policy("hold: release_first"))
    await moderator.feed("bomb bomb ")
    guard.go.set()
    for _ in range(10):
        await asyncio.sleep(0)

    step = await moderator.feed("more")

    assert step.released == ""
    assert step.decision is not None
    assert step.decision.leaked == len("bomb bomb ")


async def test_a_client_that_goes_away_ends_the_judging_in_the_background() -> None:
    guard = Slow()
    moderator = StreamModerator(guard, policy("hold: release_first"))
    await moderator.feed("bomb bomb ")

    assert moderator.close() is None
    await asyncio.sleep(0)
    assert guard.open_sessions == 0


# --- not for longer than ------------------------------------------------------------------------------------------


class Clock:
    """Goes when it is told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Ticking(FakeStreamGuard):
    """Takes a time of the clock for each piece."""

    def __init__(self, clock: Clock, takes_s: float) -> None:
        super().__init__()
        self.clock = clock
        self.takes_s = takes_s

    async def trouble(self) -> None:
        self.clock.now += self.takes_s


async def test_the_delay_is_the_guards_time_and_not_that_of_the_upstream() -> None:
    clock = Clock()
    moderator = StreamModerator(Ticking(clock, 0.25), policy(), clock=clock)

    await moderator.feed("one tw")
    clock.now += 60  # the upstream is slow in the middle of a word
    assert (await moderator.feed("o three ")).released == " two three"
    assert moderator.delay_s == 0.25


async def test_what_the_policy_holds_counts_in_full() -> None:
    clock = Clock()
    moderator = StreamModerator(Ticking(clock, 0.25), policy(), clock=clock)

    await moderator.feed("one bomb ")
    clock.now += 3
    await moderator.feed("here ")

    assert moderator.delay_s == 3.5


async def test_a_guard_that_is_late_has_failed() -> None:
    """The second guarantee: nothing leaves later, unless the policy says that a failed guard lets it."""
    clock = Clock()
    moderator = StreamModerator(Ticking(clock, 0.3), policy("hold: {delay_ms: 250}"), clock=clock)

    step = await moderator.feed("one two ")

    assert step.released == ""
    assert step.decision is not None
    assert (step.decision.action, step.decision.rule) == (Action.BLOCK, "on_guard_error")
    assert step.decision.failure is not None
    assert step.decision.failure.kind == "GuardTimeout"
    assert "250 ms" in step.decision.failure.message


async def test_the_policy_says_what_a_late_guard_means() -> None:
    clock = Clock()
    lenient = policy("hold: {delay_ms: 250}", on_guard_error="{default: block, timeout: warn}")
    moderator = StreamModerator(Ticking(clock, 0.3), lenient, clock=clock)

    assert (await moderator.feed("one two ")).released == "one two "
    step = await moderator.finish()
    assert step.decision is not None
    assert step.decision.action is Action.WARN
    assert moderator.delay_s == pytest.approx(0.3)


async def test_a_guard_that_hangs_is_not_waited_for_longer() -> None:
    moderator = StreamModerator(FakeStreamGuard(), policy("hold: {delay_ms: 20}"))

    step = await moderator.feed("one guardhang ")

    assert step.decision is not None
    assert step.decision.failure is not None
    assert step.decision.failure.kind == "GuardTimeout"


async def test_what_is_late_leaves_as_far_as_the_policy_allows_and_then_the_guard_has_failed() -> None:
    guard = Slow()
    moderator = StreamModerator(guard, policy("hold: {leak: 6, delay_ms: 10, when_late: release}"))

    assert (await moderator.feed("one two three")).released == "one tw"
    step = await moderator.feed(" four")

    assert step.released == ""
    assert step.decision is not None
    assert step.decision.failure is not None
    assert [(one.state.value, one.characters) for one in step.decision.coverage] == [
        ("released_first", 6),
        ("not_judged", 12),
    ]


async def test_text_that_left_late_and_is_flagged_afterwards_has_leaked() -> None:
    guard = Slow()
    moderator = StreamModerator(guard, policy("hold: {leak: 5, delay_ms: 10, when_late: release}"))

    assert (await moderator.feed("bomb bomb ")).released == "bomb "
    guard.go.set()
    for _ in range(10):
        await asyncio.sleep(0)
    step = await moderator.feed("x")

    assert step.decision is not None
    assert (step.decision.action, step.decision.leaked) == (Action.BLOCK, 5)


async def test_held_text_falls_due_while_the_upstream_says_nothing() -> None:
    clock = Clock()
    moderator = StreamModerator(FakeStreamGuard(), policy("hold: {delay_ms: 2000}"), clock=clock)
    await moderator.feed("one bomb ")
    assert moderator.due_s == 2.0
    clock.now += 3
    assert moderator.due_s == 0.0

    step = moderator.late()

    assert step.decision is not None
    assert step.decision.failure is not None


async def test_an_upstream_that_stops_in_the_middle_of_a_word_makes_nobody_late() -> None:
    moderator = StreamModerator(FakeStreamGuard(), policy("hold: {delay_ms: 2000}"))
    await moderator.feed("one tw")

    assert moderator.due_s is None


async def test_a_stream_gives_a_step_when_held_text_falls_due() -> None:
    async def silent() -> AsyncIterator[str]:
        yield "one bomb "
        await asyncio.Event().wait()

    steps = [
        step async for step in moderate_stream(silent(), guard=FakeStreamGuard(), policy=policy("hold: {delay_ms: 20}"))
    ]

    assert [step.released for step in steps] == ["one", ""]
    assert steps[-1].decision is not None
    assert steps[-1].decision.failure is not None


# --- confirming ---------------------------------------------------------------------------------------------------

CONFIRMS = "confirm: true"


async def test_an_alarm_that_the_second_guard_confirms_stops_the_stream_with_its_verdict() -> None:
    second = FakeGuard(name="strong/1")

    released, decision = await run(
        "a bomb bomb now", policy=policy(CONFIRMS), second=SecondGuard(second), context=Conversation.of("why?")
    )

    assert (released, decision.action) == ("a", Action.BLOCK)
    assert decision.verdict is not None
    assert (decision.verdict.guard, decision.verdict.span) == ("strong/1", Span(1, 11))
    assert kinds(decision) == [("confirm", "confirmed", 1), ("cut", "done", 1)]
    assert [turn.content for turn in second.judged[0].turns] == ["why?", "a bomb bomb"]


async def test_an_alarm_that_is_overruled_lets_the_stream_go_on_and_is_in_the_decision() -> None:
    second = FakeGuard(unsafe={}, name="strong/1")

    released, decision = await run("a bomb bomb bomb shelter", policy=policy(CONFIRMS), second=SecondGuard(second))

    assert released == "a bomb bomb bomb shelter"
    assert decision.action is Action.ALLOW
    assert kinds(decision) == [("confirm", "overruled", 1)]
    assert decision.interventions[0].characters == len(" bomb bomb bomb")
    assert len(second.judged) == 1


async def test_a_new_run_is_a_new_alarm_and_a_long_run_is_asked_about_again() -> None:
    second = FakeGuard(unsafe={})
    again = policy("confirm: {again_after: 3}")

    await run("bomb bomb x bomb bomb y", policy=policy(CONFIRMS), second=SecondGuard(second))
    assert [len(one.turns[-1].content) for one in second.judged] == [9, 21]
    second.judged.clear()
    await run(" ".join(["bomb"] * 10), policy=again, second=SecondGuard(second))
    assert len(second.judged) == 3


@pytest.mark.parametrize(("on_error", "said"), [("stop", "a"), ("pass", "a bomb bomb now")])
@pytest.mark.parametrize("word", ["guardfail", "guardhang", "none"])
async def test_the_policy_says_what_a_failing_second_guard_means(on_error: str, said: str, word: str) -> None:
    second = FakeGuard(**{"failing": "bomb"} if word == "guardfail" else {"hanging": "bomb"})
    confirms = policy(f"confirm: {{on_error: {on_error}, deadline_ms: 10}}")

    released, decision = await run(
        "a bomb bomb now", policy=confirms, second=None if word == "none" else SecondGuard(second)
    )

    assert released == said
    assert kinds(decision)[0] == ("confirm", "failed", 1)
    assert decision.action is (Action.BLOCK if on_error == "stop" else Action.ALLOW)


async def test_what_the_second_guard_finds_only_controversial_is_decided_by_the_policy_too() -> None:
    second = FakeGuard(unsafe={}, controversial={"bomb": "Violent"})
    reviews = policy(CONFIRMS, controversial="review")

    released, decision = await run("a bomb bomb now", policy=reviews, second=SecondGuard(second))

    assert released == "a bomb bomb now"
    assert (decision.action, decision.rule) == (Action.REVIEW, "controversial")


async def test_nothing_leaves_while_the_second_guard_is_asked() -> None:
    may = asyncio.Event()

    class Waiting(FakeGuard):
        async def trouble(self) -> None:
            await may.wait()

    moderator = StreamModerator(FakeStreamGuard(), policy(CONFIRMS), second=SecondGuard(Waiting(unsafe={})))
    asking = asyncio.ensure_future(moderator.feed("a bomb bomb on "))
    await asyncio.sleep(0.01)
    assert not asking.done()
    assert moderator.released == 0
    may.set()
    assert (await asking).released == "a bomb bomb on"


@given(cuts())
async def test_what_is_confirmed_does_not_depend_on_the_cutting(cut: tuple[str, list[str]]) -> None:
    text, parts = cut
    confirms = policy("confirm: {again_after: 2}")

    def second() -> SecondGuard:
        return SecondGuard(FakeGuard(unsafe={"two": "Violent"}))

    once, in_parts = [await run(*texts, policy=confirms, second=second()) for texts in ([text], parts)]

    check_cutting(text, once, in_parts)


# --- rolling back -------------------------------------------------------------------------------------------------

ROLLS = "intervention: rollback\nrollback: {tries: 2, buffer: 0, hint: Be kind., then: replace}"


def upstream(*answers: str | Exception) -> tuple[list[Retry], Callable[[Retry], AsyncIterator[str]]]:
    asked: list[Retry] = []

    def again(retry: Retry) -> AsyncIterator[str]:
        asked.append(retry)
        return say(answers[len(asked) - 1])

    async def say(answer: str | Exception) -> AsyncIterator[str]:
        if isinstance(answer, Exception):
            raise answer
        for part in answer.partition(" "):
            yield part

    return asked, again


async def test_a_flagged_text_is_rolled_back_and_written_anew_and_the_reader_sees_one_stream() -> None:
    asked, again = upstream(" garden and more")

    released, decision = await run("build a bomb bomb now", policy=policy(ROLLS), again=again)

    assert released == "build a garden and more"
    assert asked == [Retry("build a", 1, "Be kind.")]
    assert (decision.action, kinds(decision)) == (Action.ALLOW, [("rollback", "done", 1)])
    assert (decision.interventions[0].characters, decision.interventions[0].tokens) == (14, 2)
    assert [(one.state.value, one.characters) for one in decision.coverage] == [("judged", len(released))]


async def test_a_retry_that_is_flagged_again_is_tried_as_often_as_the_policy_says_and_then_ends() -> None:
    asked, again = upstream(" shed bomb bomb", " fraud fraud", "never asked")
    record = Record()

    released, decision = await run("build a bomb bomb", policy=policy(ROLLS), again=again, keep=record)

    assert released == "build a shed"
    assert [(one.prefix, one.number) for one in asked] == [("build a", 1), ("build a shed", 2)]
    assert (decision.action, decision.rule) == (Action.BLOCK, "stop")
    assert kinds(decision) == [("rollback", "flagged", 2), ("replace", "done", 1)]
    assert record.actions == ["block"]


async def test_an_upstream_that_cannot_go_on_ends_the_stream_as_the_policy_says() -> None:
    _, again = upstream(OSError("away"))

    released, decision = await run("build a bomb bomb", policy=policy(ROLLS), again=again)

    assert (released, decision.action, decision.rule) == ("build a", Action.BLOCK, "stop")
    assert kinds(decision) == [("rollback", "failed", 1), ("replace", "done", 1)]


async def test_an_upstream_that_breaks_off_before_any_rollback_is_an_error() -> None:
    async def broken() -> AsyncIterator[str]:
        yield "one "
        raise OSError("away")

    with pytest.raises(OSError, match="away"):
        async for _ in moderate_stream(broken(), guard=FakeStreamGuard(), policy=policy(ROLLS), again=upstream()[1]):
            pass


async def test_without_anybody_to_ask_there_is_no_rollback() -> None:
    released, decision = await run("build a bomb bomb", policy=policy(ROLLS))

    assert (released, kinds(decision)) == ("build a", [("replace", "done", 1)])


async def test_a_client_that_goes_away_during_a_retry_leaves_a_decision() -> None:
    guard = FakeStreamGuard()
    moderator = StreamModerator(guard, policy(ROLLS), retries=True)
    step = await moderator.feed("build a bomb bomb now")
    assert step.retry is not None
    assert (step.released, step.decision) == ("build a", None)

    decision = moderator.close()

    assert decision is not None
    assert (decision.action, kinds(decision)[0]) == (Action.BLOCK, ("rollback", "failed", 1))
    assert guard.open_sessions == 0


async def test_tries_of_a_text_that_is_judged_again_from_its_beginning_count_on() -> None:
    """It gets no more of them, what was thrown away stays counted, and it ends as the policy says."""
    rolls = policy(ROLLS.replace("tries: 2", "tries: 1"))
    before, after = (StreamModerator(FakeStreamGuard(), rolls, retries=True) for _ in range(2))
    assert (await before.feed("build a bomb bomb now")).retry is not None
    before.close()

    after.count_on(before)

    assert after.rolled_back
    assert await released_by(after, "build a ", "shed ") == ["build a", " shed"]
    step = await after.feed("bomb bomb now")
    assert (step.released, step.retry) == ("", None)
    assert step.decision is not None
    assert kinds(step.decision) == [("rollback", "flagged", 1), ("replace", "done", 1)]
    assert step.decision.interventions[0].characters == len(" bomb bomb now")


async def test_the_buffer_is_held_so_that_there_is_something_to_roll_back() -> None:
    buffered = ROLLS.replace("buffer: 0", "buffer: 2")
    moderator = StreamModerator(FakeStreamGuard(), policy(buffered), retries=True)

    assert await released_by(moderator, "one two three ", "four ") == ["one", " two"]
    step = await moderator.feed("bomb bomb ")
    assert step.retry is not None
    assert (step.released, step.retry.prefix) == (" three", "one two three")
    assert (await moderator.feed(" fine.")).released == ""
    assert (await moderator.finish()).released == " fine."


async def test_a_guard_that_fails_during_a_retry_is_decided_by_the_policy() -> None:
    _, again = upstream(" shed guardfail x")

    released, decision = await run("build a bomb bomb", policy=policy(ROLLS), again=again)

    assert (released, decision.rule) == ("build a", "on_guard_error")
    assert kinds(decision) == [("rollback", "failed", 1), ("replace", "done", 1)]


async def test_a_retry_that_says_nothing_ends_the_text_where_it_was() -> None:
    _, again = upstream("")

    assert (await run("build a bomb bomb", policy=policy(ROLLS), again=again))[0] == "build a"


@given(cuts(), st.integers(0, 3))
async def test_what_is_rolled_back_does_not_depend_on_the_cutting(cut: tuple[str, list[str]], buffer: int) -> None:
    text, parts = cut
    rolls = policy(ROLLS.replace("buffer: 0", f"buffer: {buffer}"))
    said = [
        await run(*texts, policy=rolls, again=upstream(" fine then", " ok 030 1234567")[1]) for texts in ([text], parts)
    ]

    assert said[0][0] == said[1][0]
    assert said[0][1].action is said[1][1].action


# --- what is only observed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [ROLLS, CONFIRMS, "hold: {risk: 0.1}"])
async def test_a_policy_that_is_only_observed_holds_masks_and_asks_nothing(extra: str) -> None:
    second = FakeGuard()

    released, decision = await run(
        "call 030 1234567 bomb bomb on",
        policy=policy(f"observe: true\n{extra}"),
        second=SecondGuard(second),
        again=upstream()[1],
    )

    assert released == "call 030 1234567 bomb bomb on"
    assert (decision.action, decision.interventions, second.judged) == (Action.ALLOW, (), [])
    assert decision.observed is not None
    assert decision.observed.action is Action.BLOCK


def test_the_kinds_of_interventions_are_words() -> None:
    assert [kind.value for kind in InterventionKind] == ["cut", "replace", "redact", "rollback", "confirm"]
    assert Step("x").retry is None
