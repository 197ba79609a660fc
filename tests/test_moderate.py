"""Judge, decide, keep: whole texts, streams in every cut, and the sync door."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from serving import Record, make_policy
from tidegate.errors import InputError, SessionClosed
from tidegate.moderate import Step, StreamModerator, check, moderate, moderate_stream, surely
from tidegate.testing import FakeGuard, FakeStreamGuard, Opened
from tidegate.types import (
    Action,
    Channel,
    Conversation,
    CoverageState,
    Decision,
    Probabilities,
    Role,
    Severity,
    Span,
    TokenVerdict,
    ToolCall,
    Turn,
)

POLICY = make_policy()


def policy(**changes: Any) -> Any:
    return make_policy(**changes)


async def pieces(*texts: str) -> AsyncIterator[str]:
    for text in texts:
        yield text


async def run(
    *texts: str, guard: FakeStreamGuard | None = None, **options: Any
) -> tuple[list[str], Decision, list[Step]]:
    """The released pieces, the decision and all steps of a stream."""
    guard = guard or FakeStreamGuard()
    options.setdefault("policy", POLICY)
    steps = [step async for step in moderate_stream(pieces(*texts), guard=guard, **options)]
    assert [step.decision is not None for step in steps] == [False] * (len(steps) - 1) + [True]
    assert guard.open_sessions == 0
    decision = steps[-1].decision
    assert decision is not None
    return [step.released for step in steps], decision, steps


# --- a whole text -------------------------------------------------------------------------------------------------


async def test_a_safe_text_is_allowed_and_kept() -> None:
    """The decision names rule and policy, and is kept with the conversation as the policy's retention says."""
    record = Record()
    conversation = Conversation.of("hello", "hi")

    decision = await moderate(conversation, guard=FakeGuard(), policy=POLICY, keep=record)

    assert (decision.action, decision.rule, decision.policy_version) == (Action.ALLOW, "otherwise", POLICY.version)
    assert record.kept == [(decision, conversation, "full")]
    assert [(part.path, part.state.value, part.characters) for part in decision.coverage] == [
        ("turns[0].content", "not_judged", 5),
        ("turns[1].content", "judged", 2),
    ]


async def test_every_text_of_a_turn_is_in_the_coverage() -> None:
    """Reasoning and tool calls too."""
    turn = Turn(Role.ASSISTANT, "x", "hm", (ToolCall("search", "{}"),))

    decision = await moderate(Conversation((turn,)), guard=FakeGuard(), policy=POLICY)

    paths = {part.path: (part.channel.value, part.characters) for part in decision.coverage}
    assert paths == {
        "turns[0].content": ("answer", 1),
        "turns[0].reasoning": ("reasoning", 2),
        "turns[0].tool_calls[0].arguments": ("tool_call", 2),
    }


@pytest.mark.parametrize(("word", "kind"), [("guardfail", "GuardUnavailable"), ("guardhang", "GuardTimeout")])
async def test_a_guard_that_fails_is_decided_by_the_policy(word: str, kind: str) -> None:
    """The third outcome: a decision with a failure, kept, with nothing covered as judged."""
    record = Record()

    decision = await moderate(
        Conversation.of(word), guard=FakeGuard(), policy=policy(on_guard_error="review"), keep=record, timeout_s=0.05
    )

    assert (decision.action, decision.rule) == (Action.REVIEW, "on_guard_error")
    assert decision.failure is not None
    assert decision.failure.kind == kind
    assert {part.state for part in decision.coverage} == {CoverageState.NOT_JUDGED}
    assert record.actions == ["review"]


async def test_a_bug_in_a_guard_is_a_failure_without_its_words() -> None:
    """A foreign exception may quote the text: only its kind is recorded."""

    class Broken(FakeGuard):
        async def judge(self, conversation: Conversation) -> Any:
            raise ValueError(conversation.turns[-1].content)

    decision = await moderate(Conversation.of("my secret"), guard=Broken(), policy=POLICY)

    assert decision.failure is not None
    assert decision.failure.kind == "ValueError"
    assert "secret" not in decision.failure.message


async def test_what_is_done_surely_is_done_when_the_caller_is_cancelled() -> None:
    """Keeping a decision survives the client."""
    begun, may_end, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def work() -> None:
        begun.set()
        await may_end.wait()
        ended.set()

    caller = asyncio.create_task(surely(work()))
    await begun.wait()
    caller.cancel()
    await asyncio.sleep(0)
    may_end.set()
    await asyncio.wait({caller})

    assert caller.cancelled()
    assert ended.is_set()


# --- a stream -----------------------------------------------------------------------------------------------------


async def test_a_safe_stream_passes() -> None:
    """All of it, the last word with the end; the verdict is that of the whole text."""
    released, decision, steps = await run("one two", " three")

    assert released == ["one", " two", " three"]
    assert decision.action is Action.ALLOW
    assert decision.verdict is not None
    assert decision.verdict.span == Span(0, 13)
    assert [(part.path, part.characters) for part in decision.coverage] == [("answer", 13)]
    assert [token.span.end for step in steps for token in step.tokens] == [3, 7, 13]


async def test_nothing_unsafe_leaves() -> None:
    """Two flagged tokens in a row stop the stream; the text before the first of them may leave."""
    record = Record()

    released, decision, _ = await run("take a bo", "mb bom", "b home", " now", keep=record)

    assert "".join(released) == "take a"
    assert (decision.action, decision.rule) == (Action.BLOCK, "unsafe")
    assert decision.verdict is not None
    assert decision.verdict.span == Span(6, 16)
    assert decision.verdict.categories == ("Violent",)
    assert [(part.state.value, part.characters) for part in decision.coverage] == [("judged", 16), ("not_judged", 5)]
    assert record.kept[0][1].turns[-1].content == "take a bomb bomb home"


async def test_a_pending_token_is_held_until_it_is_cleared() -> None:
    """One flagged token alone is released when the next one is not flagged."""
    released, decision, _ = await run("a bomb ", "shelter", " is here")

    assert released == ["a", "", " bomb shelter is", " here"]
    assert decision.action is Action.ALLOW


async def test_a_flagged_token_at_the_very_end_is_released_unconfirmed() -> None:
    """Nothing follows that could confirm it."""
    assert "".join((await run("not a bomb"))[0]) == "not a bomb"


async def test_a_text_shorter_than_the_debounce_is_decided_by_what_it_has() -> None:
    """One word can be blocked."""
    released, decision, _ = await run("bomb")

    assert released == ["", ""]
    assert decision.action is Action.BLOCK


@pytest.mark.parametrize(
    ("text", "action", "said"),
    [
        ("not a bomb", Action.BLOCK, "not a"),
        ("bomb is fine", Action.ALLOW, "bomb is fine"),
        ("fine", Action.ALLOW, "fine"),
    ],
)
async def test_a_verdict_at_the_end_confirms_or_clears(text: str, action: Action, said: str) -> None:
    """A token without width speaks of the whole text: with the token before it, it is decided."""
    released, decision, _ = await run(text, guard=FakeStreamGuard(end_token=True))

    assert ("".join(released), decision.action) == (said, action)


async def test_a_verdict_at_the_end_can_clear() -> None:
    """A safe end releases what was pending, also when that is the only word."""

    class Calm(FakeStreamGuard):
        def open(self, *arguments: Any, **options: Any) -> Any:
            session = super().open(*arguments, **options)
            finish = session.finish

            async def calm() -> tuple[TokenVerdict, ...]:
                tokens = await finish()
                end = tokens[-1].span.end
                return (*tokens, TokenVerdict(Span(end, end), Severity.SAFE, Probabilities(1, 0, 0)))

            session.finish = calm  # type: ignore[method-assign]
            return session

    assert [step.released for step in (await run("bomb", guard=Calm()))[2]] == ["", "bomb"]


@pytest.mark.parametrize(("debounce", "said"), [(1, "a"), (2, "a"), (3, "a bomb bomb x bomb bomb"), (4, None)])
async def test_the_debounce_is_the_policys(debounce: int, said: str | None) -> None:
    """So many flagged tokens in a row are needed."""
    text = "a bomb bomb x bomb bomb"

    released, _, _ = await run(text, policy=policy(debounce=debounce))

    assert "".join(released) == (said or text)


async def test_milder_actions_are_noted_and_the_text_goes_on() -> None:
    """REVIEW needs its run too; the worst one is the decision, with the verdict at its token."""
    released, decision, _ = await run("a knife knife here and knife alone")

    assert "".join(released) == "a knife knife here and knife alone"
    assert (decision.action, decision.rule) == (Action.REVIEW, "controversial")
    assert decision.verdict is not None
    assert decision.verdict.span == Span(1, 13)
    assert (await run("a knife here and knife alone"))[1].action is Action.ALLOW


async def test_a_run_is_as_bad_as_its_mildest_token() -> None:
    """One token to stop and one to review in a row are a review, not a stop."""
    released, decision, _ = await run("a knife bomb today")

    assert "".join(released) == "a knife bomb today"
    assert decision.action is Action.REVIEW
    assert decision.verdict is not None
    assert decision.verdict.severity is Severity.CONTROVERSIAL


async def test_redact_stops_a_stream() -> None:
    """There is nobody who could redact it: REDACT is BLOCK, by the same rule."""
    redacting = make_policy(
        "name: test\non_guard_error: block\notherwise: allow\ndebounce: 2\n"
        "rules:\n  - {name: hide, severity: unsafe, action: redact}"
    )

    released, decision, _ = await run("a bomb bomb", policy=redacting)

    assert ("".join(released), decision.action, decision.rule) == ("a", Action.BLOCK, "hide")


async def test_an_empty_stream_is_safe() -> None:
    """There is nothing to judge, and the guard is not asked."""
    guard = FakeStreamGuard()

    released, decision, _ = await run(guard=guard)

    assert (released, decision.action, guard.opened) == ([""], Action.ALLOW, [])


@pytest.mark.parametrize("word", ["guardfail", "guardhang"])
async def test_a_guard_that_fails_in_a_stream_stops_it(word: str) -> None:
    """What was judged has left, nothing after it does; the session is closed."""
    record = Record()

    released, decision, _ = await run("one two ", word, " three", keep=record, timeout_s=0.05)

    assert "".join(released) == "one two"
    assert decision.rule == "on_guard_error"
    assert record.actions == ["block"]


async def test_an_open_policy_goes_on_without_the_guard() -> None:
    """All leaves, and the coverage says how much was not judged."""
    released, decision, _ = await run("one two ", "guardfail ", "three", policy=policy(on_guard_error="warn"))

    assert released == ["one two", " guardfail ", "three", ""]
    assert decision.action is Action.WARN
    assert [(part.state.value, part.characters) for part in decision.coverage] == [("judged", 7), ("not_judged", 16)]


async def test_a_guard_that_has_no_room_is_a_failure() -> None:
    """GuardOverloaded when the session is opened is decided like any other failure."""
    _, decision, _ = await run("hello", guard=FakeStreamGuard(most_sessions=0))

    assert decision.failure is not None
    assert decision.failure.kind == "GuardOverloaded"


async def test_a_guard_that_skips_text_is_a_failure() -> None:
    """A guard that says nothing of the last characters has not judged them."""

    class Lazy(FakeStreamGuard):
        def open(self, *arguments: Any, **options: Any) -> Any:
            session = super().open(*arguments, **options)

            async def nothing() -> tuple[TokenVerdict, ...]:
                session.close()
                return ()

            session.finish = nothing  # type: ignore[method-assign]
            return session

    released, decision, _ = await run("one two", guard=Lazy())

    assert "".join(released) == "one"
    assert decision.failure is not None
    assert decision.failure.kind == "UnreadableVerdict"


async def test_a_character_of_several_tokens_is_held_for_all_of_them() -> None:
    """Tokens can share a character: it leaves when the last of them is judged, and not if that is pending."""

    class Shared(FakeStreamGuard):
        def open(self, *arguments: Any, **options: Any) -> Any:
            session = super().open(*arguments, **options)

            async def feed(text: str) -> tuple[TokenVerdict, ...]:
                safe, unsafe = Probabilities(1, 0, 0), Probabilities(0, 0, 1)
                return (
                    TokenVerdict(Span(0, 1), Severity.SAFE, safe),
                    TokenVerdict(Span(1, 2), Severity.SAFE, safe),
                    TokenVerdict(Span(1, 2), Severity.UNSAFE, unsafe),
                )

            session.feed = feed  # type: ignore[method-assign]
            return session

    moderator = StreamModerator(Shared(), POLICY)

    assert (await moderator.feed("a😀")).released == "a"
    moderator.close()


async def test_a_consumer_that_goes_away_leaves_a_decision() -> None:
    """What was judged so far is kept, and the session is closed."""
    guard, record = FakeStreamGuard(), Record()
    steps = moderate_stream(pieces("one two ", "three"), guard=guard, policy=POLICY, keep=record)

    assert (await anext(steps)).released == "one two"
    await steps.aclose()

    assert record.actions == ["allow"]
    assert guard.open_sessions == 0


async def test_a_cancelled_stream_leaves_a_decision() -> None:
    """Also when it waits for text that never comes."""
    guard, record = FakeStreamGuard(), Record()
    waiting = asyncio.Event()

    async def endless() -> AsyncIterator[str]:
        yield "one two "
        waiting.set()
        await asyncio.Event().wait()

    async def consume() -> None:
        async for _ in moderate_stream(endless(), guard=guard, policy=POLICY, keep=record):
            pass

    task = asyncio.create_task(consume())
    await waiting.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert record.actions == ["allow"]
    assert guard.open_sessions == 0


async def test_an_ended_stream_takes_no_more() -> None:
    """feed and finish raise SessionClosed; close may be called again and again."""
    moderator = StreamModerator(FakeStreamGuard(), POLICY)
    await moderator.feed("one")
    await moderator.finish()

    with pytest.raises(SessionClosed):
        await moderator.feed("two")
    with pytest.raises(SessionClosed):
        await moderator.finish()
    assert moderator.close() is None
    assert StreamModerator(FakeStreamGuard(), POLICY).close() is None


async def test_the_context_reaches_the_guard() -> None:
    """The session is opened with the turns before."""
    guard = FakeStreamGuard()
    context = Conversation.of("question")

    await run("answer", guard=guard, context=context)

    assert [opened.context for opened in guard.opened] == [context]


@pytest.mark.parametrize(
    ("channel", "turn"),
    [
        (Channel.ANSWER, Turn(Role.ASSISTANT, "hello there", "I think")),
        (Channel.REASONING, Turn(Role.ASSISTANT, "", "hello there")),
        (Channel.TOOL_CALL, Turn(Role.ASSISTANT, "", "I think", (ToolCall("search", "hello there"),))),
    ],
)
async def test_the_guard_is_told_what_the_text_is_and_it_is_kept_as_that(channel: Channel, turn: Turn) -> None:
    guard, kept = FakeStreamGuard(), []

    async def keep(decision: Any, conversation: Conversation, **_: Any) -> None:
        kept.append(conversation)

    steps = moderate_stream(
        pieces("hello ", "there"),
        guard=guard,
        policy=POLICY,
        channel=channel,
        reasoning="I think",
        name="search",
        keep=keep,
    )
    assert "".join([step.released async for step in steps]) == "hello there"

    assert guard.opened == [Opened(None, channel, "I think", "search")]
    assert kept == [Conversation((turn,))]


def test_only_what_an_assistant_writes_can_be_a_stream() -> None:
    with pytest.raises(InputError, match="channel"):
        StreamModerator(FakeStreamGuard(), POLICY, channel=Channel.USER)


WORDS = st.sampled_from(["a", "bomb", "knife", "é", "日本", "👩‍👧", "e\u0301", "\n", "  "])


@given(
    text=st.lists(WORDS, max_size=12).map(" ".join),
    places=st.lists(st.floats(0, 1), max_size=8),
    debounce=st.integers(1, 4),
)
@example(text="bomb", places=[], debounce=2)
async def test_the_outcome_does_not_depend_on_the_cut(text: str, places: list[float], debounce: int) -> None:
    """For every cut: the same text leaves, in order, and the decision is the same."""
    at = sorted({0, len(text), *(int(place * len(text)) for place in places)})
    cut = [text[start:end] for start, end in itertools.pairwise(at)]
    by = policy(debounce=debounce)

    whole, expected, _ = await run(text, policy=by)
    parts, decision, steps = await run(*cut, policy=by)

    assert "".join(parts) == "".join(whole)
    assert text.startswith("".join(parts))
    assert (decision.action, decision.verdict) == (expected.action, expected.verdict)
    assert sum(len(step.released) for step in steps) <= len(text)


# --- the sync door ------------------------------------------------------------------------------------------------


def test_check_works_in_a_script() -> None:
    """One call, one decision."""
    guard = FakeGuard()

    assert check("a bomb", guard=guard, policy=POLICY).action is Action.BLOCK
    assert check("hello", "hi", guard=guard, policy=POLICY).action is Action.ALLOW
    assert guard.judged[1] == Conversation.of("hello", "hi")


async def test_check_works_inside_a_running_loop() -> None:
    """As in a notebook; it has a thread of its own, and only one."""
    decisions = [check("a bomb", guard=FakeGuard(), policy="balanced") for _ in range(3)]

    assert {decision.action for decision in decisions} == {Action.BLOCK}
    assert [thread.name for thread in threading.enumerate()].count("tidegate-check") == 1


@pytest.mark.parametrize(("text", "response", "where"), [(3, None, "text"), (None, None, "text"), ("x", 3, "response")])
def test_check_says_what_it_expects(text: Any, response: Any, where: str) -> None:
    """Anything but str is an input error that says where."""
    with pytest.raises(InputError, match=f"{where}: expected a str"):
        check(text, response, guard=FakeGuard())
