"""The cascade: who is asked when, whose verdict counts, and that streams do not depend on how they are cut."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving import until
from tidegate.errors import (
    GuardOverloaded,
    GuardTimeout,
    GuardUnavailable,
    InputError,
    SessionClosed,
    UnreadableVerdict,
)
from tidegate.guards import load_guard
from tidegate.guards.base import StreamGuard, judges_together
from tidegate.guards.cascade import (
    AskBetween,
    AskOptions,
    CascadeConfig,
    CascadeGuard,
    ConfirmOptions,
    load_cascade,
    read_cascade,
)
from tidegate.moderate import StreamModerator, moderate
from tidegate.policy import parse_policy
from tidegate.testing import FakeGuard, FakeStreamGuard
from tidegate.types import (
    Action,
    Category,
    Conversation,
    Probabilities,
    Role,
    Severity,
    Target,
    TokenVerdict,
    Turn,
    Verdict,
)

CONTEXT = Conversation.of("What may I bring?")
UNSURE = "knife"
"""The first guard finds this word controversial, with 0.9 for not safe."""
SURE = "bomb"
"""The first guard finds this word unsafe, with 0.99 for not safe."""


class Second(FakeGuard):
    """Finds unsafe what names poison, and everything else safe."""

    def __init__(self, **options: Any) -> None:
        super().__init__(unsafe={"poison": Category.VIOLENT.value}, controversial={}, name="second/2", **options)

    @property
    def texts(self) -> list[str]:
        return [conversation.turns[-1].content for conversation in self.judged]


class Saying(FakeStreamGuard):
    """Says of every whole text what it is told to."""

    def __init__(self, flagged: float, **more: Any) -> None:
        super().__init__(name="first/1")
        self.verdict = Verdict(
            Target.PROMPT,
            Severity.UNSAFE if flagged >= 0.5 else Severity.SAFE,
            Probabilities(1 - flagged, 0.0, flagged),
            guard="first/1",
            **more,
        )

    async def judge(self, conversation: Conversation) -> Verdict:
        return self.verdict


def cascade(
    first: StreamGuard | None = None, second: FakeGuard | None = None, **config: Any
) -> tuple[CascadeGuard, FakeGuard]:
    second = second or Second()
    first = first or FakeStreamGuard(name="first/1")
    return CascadeGuard(first, second, CascadeConfig(first="edge", second="edge", **config)), second


def asking(low: float, high: float, **more: Any) -> AskOptions:
    between = AskBetween(low=low, high=high)
    return AskOptions(prompt=between, response=between, **more)


# --- whole texts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flagged", "asked"), [(0.19, False), (0.2, True), (0.5, True), (0.8, True), (0.81, False), (0.0, False)]
)
async def test_the_second_guard_is_asked_between_the_thresholds_and_nowhere_else(flagged: float, asked: bool) -> None:
    guard, second = cascade(Saying(flagged), ask=asking(0.2, 0.8))

    verdict = await guard.judge(Conversation.of("some text"))

    assert len(second.judged) == asked
    assert verdict.guard == ("cascade[second/2]" if asked else "cascade[first/1]")
    assert verdict.severity is (Severity.SAFE if asked or flagged < 0.5 else Severity.UNSAFE)
    assert (guard.counts.judged, guard.counts.asked) == (1, asked)


async def test_prompts_and_responses_have_thresholds_of_their_own() -> None:
    ask = AskOptions(prompt=AskBetween(low=0.5, high=1.0), response=AskBetween(low=0.995, high=1.0))
    guard, second = cascade(ask=ask)

    await guard.judge(Conversation.of(SURE))
    await guard.judge(Conversation.of("Hm?", SURE))

    assert [conversation.target for conversation in second.judged] == [Target.PROMPT]


@pytest.mark.parametrize(
    ("flagged", "given", "asked"), [(0.9, 0.5, True), (0.9, 0.3, False), (0.1, 0.9, False), (0.5, 0.8, True)]
)
async def test_a_likely_category_is_asked_about_whatever_the_thresholds_say(
    flagged: float, given: float, asked: bool
) -> None:
    """Likely is the probability of not being safe and of the category together: 0.4 here."""
    first = Saying(flagged, category_probabilities={"Jailbreak": given})
    guard, second = cascade(first, ask=asking(0.0, 0.0, categories={"Jailbreak": 0.4}))

    await guard.judge(Conversation.of("some text"))

    assert len(second.judged) == asked


async def test_a_category_that_is_named_without_a_probability_counts_as_long_as_the_text_is_not_safe() -> None:
    guard, second = cascade(Saying(0.9, categories=("Jailbreak",)), ask=asking(0.0, 0.0, categories={"Jailbreak": 0.9}))

    await guard.judge(Conversation.of("some text"))

    assert len(second.judged) == 1


async def test_the_second_guard_is_asked_with_the_whole_conversation() -> None:
    guard, second = cascade(ask=asking(0.5, 0.95))
    conversation = CONTEXT.then(Turn(Role.ASSISTANT, "A knife.")).then(Turn(Role.USER, f"And a {UNSURE}?"))

    await guard.judge(conversation)

    assert second.judged == [conversation]


async def test_a_second_guard_that_fails_is_the_third_outcome() -> None:
    guard, _ = cascade(second=Second(failing=UNSURE, error=UnreadableVerdict("told to")), ask=asking(0.5, 0.95))
    policy = parse_policy(POLICY)

    with pytest.raises(UnreadableVerdict, match="told to"):
        await guard.judge(Conversation.of(UNSURE))
    decision = await moderate(Conversation.of(UNSURE), guard=guard, policy=policy)

    assert decision.verdict is None
    assert decision.failure is not None
    assert (decision.failure.kind, decision.failure.guard) == ("UnreadableVerdict", "cascade[first/1, second/2]")
    assert guard.counts.failed == 2


async def test_the_first_verdict_stands_when_that_was_asked_for_and_says_so() -> None:
    guard, _ = cascade(second=Second(failing=UNSURE), ask=asking(0.5, 0.95), on_second_error="first")

    verdict = await guard.judge(Conversation.of(UNSURE))

    assert verdict.severity is Severity.CONTROVERSIAL
    assert verdict.guard == "cascade[first/1; second/2 failed]"


async def test_a_first_guard_that_fails_passes_its_error_even_then() -> None:
    first = FakeStreamGuard(failing="hello", name="first/1")
    guard, second = cascade(first, ask=asking(0.0, 1.0), on_second_error="first")

    with pytest.raises(GuardUnavailable):
        await guard.judge(Conversation.of("hello"))

    assert second.judged == []


async def test_a_second_guard_that_hangs_is_a_timeout() -> None:
    guard, _ = cascade(second=Second(hanging=UNSURE), ask=asking(0.5, 0.95), second_timeout_s=0.05)

    with pytest.raises(GuardTimeout, match=r"within 0\.05 seconds"):
        await guard.judge(Conversation.of(UNSURE))


async def test_more_open_questions_than_allowed_are_refused_and_the_place_is_free_again_afterwards() -> None:
    guard, second = cascade(second=Second(hanging=UNSURE), ask=asking(0.5, 0.95), most_asked=1)
    hanging = asyncio.create_task(guard.judge(Conversation.of(UNSURE)))
    await until(lambda: second.judged)

    with pytest.raises(GuardOverloaded):
        await guard.judge(Conversation.of(UNSURE))
    hanging.cancel()
    with pytest.raises(asyncio.CancelledError):
        await hanging
    second.hanging = ""

    assert (await guard.judge(Conversation.of(UNSURE))).guard == "cascade[second/2]"


@pytest.mark.parametrize(("first", "second"), [(True, True), (True, False), (False, True), (False, False)])
def test_a_cascade_is_told_the_reasoning_with_a_text_when_both_its_guards_want_it(first: bool, second: bool) -> None:
    guards = [FakeStreamGuard(), FakeStreamGuard()]
    for guard, together in zip(guards, (first, second), strict=True):
        guard.together = together  # type: ignore[attr-defined]
    cascade = CascadeGuard(*guards, CascadeConfig(first="edge", second="edge"))
    assert judges_together(cascade) is (first and second)
    assert not judges_together(FakeStreamGuard())


async def test_closing_closes_both_guards() -> None:
    first = FakeStreamGuard()
    guard, second = cascade(first)

    await guard.close()
    await guard.close()

    assert (first.closed, second.closed) == (True, True)


# --- streams ------------------------------------------------------------------------------------------------------

POLICY = """
name: test
on_guard_error: block
otherwise: allow
rules:
  - {name: unsafe, severity: unsafe, action: block}
"""


async def stream(guard: StreamGuard, *pieces: str, context: Conversation | None = CONTEXT) -> list[TokenVerdict]:
    session = guard.open(context)
    tokens = [token for piece in pieces for token in await session.feed(piece)]
    return [*tokens, *await session.finish()]


def flags(tokens: list[TokenVerdict]) -> str:
    return "".join("scu"[token.severity] for token in tokens)


async def test_a_confirmed_alarm_goes_out_flagged() -> None:
    guard, second = cascade()
    assert isinstance(second, Second)

    tokens = await stream(guard, "some poison for the bomb bomb and bomb ends")

    assert flags(tokens) == "ssss" + "uu" + "sus"
    assert second.texts == ["some poison for the bomb bomb"]
    assert second.judged[0].turns[:-1] == CONTEXT.turns
    assert (guard.counts.alarms, guard.counts.confirmed) == (1, 1)


async def test_an_alarm_that_is_not_confirmed_goes_out_as_the_second_guard_says() -> None:
    guard, second = cascade()

    tokens = await stream(guard, "a bath bomb bomb for you")

    assert flags(tokens) == "ssssss"
    assert tokens[2].probabilities == tokens[3].probabilities == Probabilities(0.98, 0.015, 0.005)
    assert tokens[2].category is None
    assert len(second.judged) == 1
    assert guard.counts.confirmed == 0


async def test_a_single_flagged_token_is_no_alarm_and_goes_out_as_the_first_guard_says() -> None:
    guard, second = cascade()

    assert flags(await stream(guard, "a bomb is a bomb is a")) == "sussuss"
    assert second.judged == []


async def test_flagged_tokens_are_held_until_they_are_an_alarm_or_not() -> None:
    guard, _ = cascade()
    session = guard.open(None)

    given = [await session.feed(piece) for piece in ("one bomb ", "two bomb ", "bomb ")]
    given.append(await session.finish())

    assert [[token.span.end for token in tokens] for tokens in given] == [[3], [8, 12], [17, 22], [23]]


async def test_a_confirmed_run_stays_flagged_without_another_question() -> None:
    guard, second = cascade(confirm=ConfirmOptions(again_after=2))

    tokens = await stream(guard, "poison" + " bomb" * 20)

    assert flags(tokens) == "s" + "u" * 20
    assert len(second.judged) == 1


async def test_a_run_that_was_found_safe_is_asked_about_again_after_so_many_tokens() -> None:
    guard, second = cascade(confirm=ConfirmOptions(again_after=3))
    assert isinstance(second, Second)

    tokens = await stream(guard, "bomb" + " bomb" * 8)

    assert flags(tokens) == "s" * 9
    assert [len(text.split()) for text in second.texts] == [2, 5, 8]


async def test_a_later_question_can_confirm() -> None:
    first = FakeStreamGuard(unsafe={"bomb": "Violent", "poison": "Violent"}, name="first/1")
    guard, _ = cascade(first, confirm=ConfirmOptions(again_after=3))

    assert flags(await stream(guard, "bomb bomb bomb poison bomb bomb bomb end")) == "ssss" + "uuu" + "s"


async def test_a_new_alarm_is_a_new_question() -> None:
    guard, second = cascade()
    assert isinstance(second, Second)

    await stream(guard, "bomb bomb and bomb bomb")

    assert second.texts == ["bomb bomb", "bomb bomb and bomb bomb"]


async def test_a_run_at_the_end_is_an_alarm_however_short_it_is() -> None:
    """The verdict on the complete text could make it count."""
    guard, second = cascade(FakeStreamGuard(end_token=True, name="first/1"), confirm=ConfirmOptions(debounce=5))

    tokens = await stream(guard, "a bath bomb")

    assert flags(tokens) == "ssss"
    assert len(second.judged) == 1


async def test_tokens_can_be_flagged_by_their_probability() -> None:
    guard, second = cascade(confirm=ConfirmOptions(debounce=1, flagged_from=0.95))

    await stream(guard, "knife knife knife")
    assert second.judged == []

    await stream(guard, "knife bomb knife")
    assert len(second.judged) == 1


async def test_a_category_that_the_second_guard_only_names_goes_out_with_certainty() -> None:
    class Naming(Second):
        async def judge(self, conversation: Conversation) -> Verdict:
            chances = Probabilities(0.1, 0.2, 0.7)
            return Verdict(conversation.target, Severity.UNSAFE, chances, ("Weapons", "Violent"), guard="second/2")

    guard, _ = cascade(second=Naming())

    tokens = await stream(guard, "bomb bomb")

    assert [(t.category, t.category_probability, t.probabilities.unsafe) for t in tokens] == [("Weapons", 1.0, 0.7)] * 2


async def test_a_second_guard_that_fails_ends_the_stream() -> None:
    first = FakeStreamGuard(name="first/1")
    guard, _ = cascade(first, second=Second(failing="bomb"))
    session = guard.open(CONTEXT)

    with pytest.raises(GuardUnavailable):
        await session.feed("bomb bomb is ")
    with pytest.raises(SessionClosed):
        await session.feed("more")

    assert first.open_sessions == 0


async def test_the_first_guards_flags_go_out_when_the_second_fails_and_that_was_asked_for() -> None:
    guard, _ = cascade(second=Second(failing="bomb"), on_second_error="first", confirm=ConfirmOptions(again_after=3))

    tokens = await stream(guard, "a bomb bomb bomb bomb bomb end")

    assert flags(tokens) == "suuuuus"
    assert (guard.counts.failed, guard.counts.alarms) == (2, 2)


@pytest.mark.parametrize(("text", "action"), [("bomb bomb it", Action.ALLOW), ("poison bomb bomb", Action.BLOCK)])
async def test_a_moderated_stream_stops_only_when_the_second_guard_confirms(text: str, action: Action) -> None:
    guard, _ = cascade()
    moderator = StreamModerator(guard, parse_policy(POLICY), context=CONTEXT)

    steps = [await moderator.feed(text + " ")]
    if moderator.decision is None:
        steps.append(await moderator.finish())

    assert moderator.decision is not None
    assert moderator.decision.action is action
    assert "".join(step.released for step in steps) == (text + " " if action is Action.ALLOW else "poison")


WORDS = st.lists(st.sampled_from(["bomb", "knife", "poison", "bath", "é", "ok"]), max_size=12).map(" ".join)


@given(WORDS, st.lists(st.integers(0, 60), max_size=8), st.integers(1, 3), st.integers(1, 4), st.booleans())
def test_verdicts_and_questions_are_the_same_however_the_text_is_cut(
    text: str, cuts: list[int], debounce: int, again_after: int, end_token: bool
) -> None:
    """The reference is one piece; the questions to the second guard are the same as well."""

    def judged(pieces: list[str]) -> tuple[list[TokenVerdict], list[str]]:
        second = Second()
        first = FakeStreamGuard(end_token=end_token, name="first/1")
        guard, _ = cascade(first, second, confirm=ConfirmOptions(debounce=debounce, again_after=again_after))
        return asyncio.run(stream(guard, *pieces)), second.texts

    edges = sorted({0, *(cut for cut in cuts if cut < len(text)), len(text)})
    pieces = [text[start:stop] for start, stop in itertools.pairwise(edges)]

    tokens, questions = judged(pieces)

    assert (tokens, questions) == judged([text])
    assert [token.span.start for token in tokens[1:]] == [token.span.end for token in tokens[:-1]]
    assert (tokens[-1].span.end if tokens else 0) == len(text)


@given(WORDS)
def test_no_run_as_long_as_the_debounce_goes_out_flagged_without_the_second_guard(text: str) -> None:
    guard, second = cascade(second=FakeGuard(unsafe={}, controversial={}))

    given_out = flags(asyncio.run(stream(guard, text)))

    assert "uu" not in given_out.replace("c", "u")
    assert bool(second.judged) or "uu" not in flags(asyncio.run(stream(guard.first, text))).replace("c", "u")


async def hanging_question() -> tuple[CascadeGuard, Any, asyncio.Task[Any]]:
    guard, second = cascade(second=Second(hanging="bomb"))
    session = guard.open(None)
    feeding = asyncio.create_task(session.feed("bomb bomb is "))
    await until(lambda: second.judged)
    return guard, session, feeding


async def test_closing_ends_a_question() -> None:
    guard, session, feeding = await hanging_question()

    session.close()
    session.close()

    with pytest.raises(SessionClosed):
        await feeding
    assert guard._second.open_questions == 0
    assert isinstance(guard.first, FakeStreamGuard)
    assert guard.first.open_sessions == 0


async def test_cancelling_a_feed_ends_its_question_and_the_session() -> None:
    guard, session, feeding = await hanging_question()

    feeding.cancel()

    with pytest.raises(asyncio.CancelledError):
        await feeding
    assert guard._second.open_questions == 0
    with pytest.raises(SessionClosed):
        await session.finish()


async def test_a_first_guard_without_room_is_overload() -> None:
    guard, _ = cascade(FakeStreamGuard(most_sessions=0))

    with pytest.raises(GuardOverloaded):
        guard.open(None)


# --- as data ------------------------------------------------------------------------------------------------------

FILE = """
first: edge
second: remote:http://127.0.0.1:8000,http://127.0.0.1:8001#guard
ask:
  prompt: {low: 0.1, high: 0.9}
  categories:
    Jailbreak: 0.3
confirm: {debounce: 3, again_after: 32}
on_second_error: first
"""


def test_a_cascade_is_written_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "cascade.yaml"
    path.write_text(FILE)

    config = read_cascade(str(path))

    assert config.second.endswith("#guard")
    assert config.ask.prompt == AskBetween(low=0.1, high=0.9)
    assert config.ask.response == AskBetween()
    assert dict(config.ask.categories) == {"Jailbreak": 0.3}
    assert config.confirm == ConfirmOptions(debounce=3, again_after=32)
    assert config.on_second_error == "first"


def test_a_cascade_is_written_as_json(tmp_path: Path) -> None:
    path = tmp_path / "cascade.json"
    path.write_text('{\n\t"first": "edge",\n\t"second": "edge:other"\n}')

    assert read_cascade(str(path)) == CascadeConfig(first="edge", second="edge:other")


def test_two_specs_with_a_comma_between_them_are_a_cascade() -> None:
    config = read_cascade("edge,remote:http://a,http://b#m")

    assert (config.first, config.second) == ("edge", "remote:http://a,http://b#m")


@pytest.mark.parametrize(
    ("change", "place", "said"),
    [
        (lambda text: text.replace("low: 0.1", "low: -1"), "5:12", "ask.prompt.low"),
        (lambda text: text.replace("low: 0.1", "low: 0.95"), "5:3", "low must not be greater than high"),
        (lambda text: text.replace("low: 0.1", "lov: 0.1"), "5:12", "ask.prompt.lov: unknown key"),
        (lambda text: text.replace("Jailbreak: 0.3", "Jailbreak: .nan"), "7:5", "ask.categories.Jailbreak"),
        (lambda text: text.replace("debounce: 3", "debounce: 0"), "8:11", "confirm.debounce"),
        (lambda text: text.replace("_error: first", "_error: never"), "9:1", "on_second_error"),
        (lambda text: text.replace("second:", "third:"), "3:1", "third: unknown key"),
        (lambda text: text.replace("second:", "# "), "2:1", "second: this key is missing"),
        (lambda text: text + "first: edge", "10:1", "given twice"),
        (lambda text: text.replace("first: edge", "first: &a edge\nthird: *a"), "3:8", "aliases"),
        (lambda text: text.replace("first: edge", "first: [edge"), "3:7", "not YAML"),
        (lambda text: "- a\n- b", "", "expected a mapping"),
        (lambda text: "", "", "expected a mapping"),
        (lambda text: text.replace("first: edge", "first: cascade:edge,edge"), "guard", "cannot be cascades"),
    ],
)
def test_a_mistake_in_a_file_is_named_with_its_place(
    tmp_path: Path, change: Callable[[str], str], place: str, said: str
) -> None:
    path = tmp_path / "cascade.yaml"
    path.write_text(change(FILE))

    with pytest.raises(InputError, match=said) as caught:
        read_cascade(str(path))

    assert caught.value.where is not None
    assert caught.value.where.endswith(place)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("c.json", b'{"first": "edge",}', "not JSON"),
        ("c.json", b"first: edge", "not JSON"),
        ("c.yaml", b"first: \xff", "not UTF-8"),
        ("c.yaml", b"first: \x00", "does not allow"),
        ("c.yaml", b"#" * 70_000, "longer than"),
        ("c.yaml", b"? [a]\n: b", "word as key"),
        ("c.yaml", b"a: b\n---\nc: d", "not YAML"),
        ("c.yaml", b"a: !!python/name:os.system x", "not YAML"),
        ("c.yaml", None, "cannot read the file"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(tmp_path: Path, name: str, content: bytes | None, said: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(InputError, match=said) as caught:
        read_cascade(str(path))

    assert str(path) in str(caught.value)


@pytest.mark.parametrize("rest", ["", "edge,", ",edge", ","])
def test_a_spec_that_names_no_two_guards_is_refused(rest: str) -> None:
    with pytest.raises(InputError, match="expected cascade:FIRST,SECOND"):
        read_cascade(rest)


def test_both_guards_are_loaded_by_their_specs() -> None:
    loaded: dict[str, FakeGuard] = {"a": FakeStreamGuard(), "b": FakeGuard()}

    guard = load_cascade("a,b", loaded.__getitem__)

    assert (guard.first, guard.second) == (loaded["a"], loaded["b"])


def test_a_first_guard_that_cannot_watch_streams_is_refused() -> None:
    with pytest.raises(InputError, match="watch streams"):
        load_cascade("a,b", lambda spec: FakeGuard())


def test_a_guard_that_cannot_be_loaded_is_named_by_its_place(tmp_path: Path) -> None:
    with pytest.raises(GuardUnavailable, match="the second guard of the cascade"):
        load_guard(f"cascade:edge,edge:{tmp_path}")


async def test_load_guard_loads_a_cascade_of_the_shipped_guard() -> None:
    guard = load_guard("cascade:edge,edge")

    verdict = await guard.judge(Conversation.of("How do I bake bread?"))
    tokens = await stream(guard, "Mix flour and water, then wait.")
    await guard.close()

    assert verdict.guard.startswith("cascade[edge/")
    assert tokens[-1].span.end == 31
