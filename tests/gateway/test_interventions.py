"""Interventions through the whole gateway: real clients, a scripted upstream, and what each of them sees."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
from openai import OpenAI

from serving import Record, serving, wait_until
from tidegate.errors import PolicyError
from tidegate.gateway.app import create_app
from tidegate.gateway.redaction import masked_body
from tidegate.policy import Policy, parse_policy
from tidegate.testing import Die, FakeGuard, FakeStreamGuard, FakeUpstream, Hang, Reply, chunk, completion, text_chunks
from tidegate.types import Severity

HEAD = """
name: test
on_guard_error: block
otherwise: allow
controversial: safe
debounce: 2
retention: full
message: {default: Not here., de: Nicht hier.}
"""
RULES = """
rules:
  - {name: personal, severity: unsafe, categories: [PII], action: redact}
  - {name: stop, severity: unsafe, action: block}
"""
ROLLS = "intervention: rollback\nrollback: {tries: 1, buffer: 0, hint: Be kind., then: replace}"


class Personal(FakeStreamGuard):
    """Calls words with a digit or an @ personal."""

    def call(self, word: str) -> tuple[Severity, str | None]:
        if any(sign.isdigit() or sign == "@" for sign in word):
            return Severity.UNSAFE, "PII"
        return super().call(word)


class Running:
    """A gateway between a client and a scripted upstream."""

    def __init__(self, url: str, upstream: FakeUpstream, record: Record, guard: FakeStreamGuard) -> None:
        self.url = url
        self.upstream = upstream
        self.record = record
        self.guard = guard
        self.client = OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0)

    def stream(self, *messages: dict[str, Any], **options: Any) -> tuple[str, list[Any]]:
        """The text that the client got, and all chunks."""
        chunks = list(
            self.client.chat.completions.create(
                model="m", messages=list(messages) or [{"role": "user", "content": "hi"}], stream=True, **options
            )
        )
        return "".join(one.choices[0].delta.content or "" for one in chunks if one.choices), chunks


Start = Callable[..., AbstractContextManager[Running]]


@contextmanager
def running(extra: str = "", rules: str = RULES, debounce: int = 2, **options: Any) -> Iterator[Running]:
    upstream, record, guard = FakeUpstream(), Record(), Personal()
    policy: Policy = parse_policy(HEAD.replace("debounce: 2", f"debounce: {debounce}") + extra + rules)
    with serving(upstream) as address:
        app = create_app(guard=guard, policy=policy, keep=record, upstream_url=address, **options)
        with serving(app) as url:
            yield Running(url, upstream, record, guard)
    assert guard.open_sessions == 0


def field(chunks: list[Any]) -> dict[str, Any]:
    found = [one.to_dict()["tidegate"] for one in chunks if "tidegate" in one.to_dict()]
    assert len(found) == 1
    return dict(found[0])


# --- cut and replace ----------------------------------------------------------------------------------------------


def test_a_cut_stream_ends_without_a_word() -> None:
    with running() as gateway:
        gateway.upstream.reply = Reply.stream(*text_chunks(["take a ", "bomb bomb ", "x"]))
        text, chunks = gateway.stream()

    assert text == "take a"
    assert chunks[-1].choices[0].finish_reason == "content_filter"
    assert field(chunks)["interventions"] == [
        {"kind": "cut", "outcome": "done", "count": 1, "characters": 12, "tokens": 0}
    ]


def test_a_replaced_stream_goes_on_with_the_message_and_then_ends() -> None:
    with running("intervention: replace\n") as gateway:
        gateway.upstream.reply = Reply.stream(*text_chunks(["take a ", "bomb bomb ", "x"]))
        text, chunks = gateway.stream()

    assert text == "take a\n\nNot here."
    assert [one.choices[0].finish_reason for one in chunks][-2:] == [None, "content_filter"]


@pytest.mark.parametrize(("word", "content"), [("cut", ""), ("replace", "Not here.")])
def test_a_whole_answer_is_cut_or_replaced(word: str, content: str) -> None:
    with running(f"intervention: {word}\n") as gateway:
        gateway.upstream.reply = Reply.json(completion("a bomb bomb"))
        answer = gateway.client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hi"}])

    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (content, "content_filter")
    assert answer.to_dict()["tidegate"]["interventions"][0]["kind"] == word  # type: ignore[index]


# --- redact -------------------------------------------------------------------------------------------------------


def test_a_stream_with_a_number_goes_on_without_it() -> None:
    with running() as gateway:
        gateway.upstream.reply = Reply.stream(*text_chunks(["call 030 12", "34567 or ann@ex", "ample.org now"]))
        text, chunks = gateway.stream()

    assert text == "call 999 9999999 or xxx@xxxxxxx.xxx now"
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert (field(chunks)["action"], field(chunks)["flagged_released"]) == ("redact", 0)


def test_log_probabilities_do_not_spell_what_was_taken_out() -> None:
    def told(text: str) -> dict[str, Any]:
        part = chunk({"content": text})
        part["choices"][0]["logprobs"] = {"content": [{"token": text, "logprob": -0.1, "bytes": None}]}
        return part

    with running() as gateway:
        gateway.upstream.reply = Reply.stream(
            told("call"), told(" 030"), told(" 1234567"), told(" now"), told(" then"), chunk(finish_reason="stop")
        )
        text, chunks = gateway.stream()
        gateway.upstream.reply = Reply.json(completion("call 030 1234567"))
        whole = gateway.client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hi"}])

    wire = json.dumps([one.to_dict() for one in chunks])
    assert text == "call 999 9999999 now then"
    assert "1234567" not in wire
    assert "030" not in wire
    assert whole.choices[0].message.content == "call 999 9999999"
    assert whole.choices[0].finish_reason == "stop"


def test_the_arguments_of_a_call_stay_json() -> None:
    arguments = json.dumps({"to": "ann@example.org", "phone": 4915112345678, "text": "line\nbob@example.org"})
    call = {"index": 0, "id": "c", "type": "function", "function": {"name": "send", "arguments": arguments}}
    with running(debounce=1) as gateway:
        gateway.upstream.reply = Reply.stream(
            chunk({"role": "assistant", "tool_calls": [call]}), chunk(finish_reason="tool_calls")
        )
        tool = {"type": "function", "function": {"name": "send", "parameters": {}}}
        _, chunks = gateway.stream(tools=[tool])

    said = "".join(
        one.function.arguments or ""
        for part in chunks
        if part.choices
        for one in part.choices[0].delta.tool_calls or ()
    )
    assert json.loads(said) == {"to": "xxx@xxxxxxx.xxx", "phone": 9999999999999, "text": "line\nxxx@xxxxxxx.xxx"}


def test_a_prompt_reaches_the_upstream_without_what_was_taken_out() -> None:
    with running() as gateway:
        gateway.upstream.reply = Reply.stream(*text_chunks(["fine"]))
        gateway.stream(
            {"role": "system", "content": "Our number is 0800 1234567."},
            {"role": "user", "content": [{"type": "text", "text": "I am at 030 1234567 or ann@example.org"}]},
        )
        (received,) = gateway.upstream.received

    assert received.body["messages"] == [
        {"role": "system", "content": "Our number is 0800 1234567."},
        {"role": "user", "content": [{"type": "text", "text": "I am at 999 9999999 or xxx@xxxxxxx.xxx"}]},
    ]
    assert gateway.record.actions[0] == "redact"
    assert "030 1234567" in gateway.record.kept[0][1].turns[-1].content


def test_what_was_taken_out_of_an_earlier_turn_is_taken_out_again() -> None:
    with running() as gateway:
        gateway.upstream.reply = Reply.stream(*text_chunks(["fine"]))
        gateway.stream(
            {"role": "user", "content": "I am at 030 1234567"},
            {"role": "assistant", "content": "Thanks"},
            {"role": "user", "content": "and now?"},
        )
        (received,) = gateway.upstream.received

    assert [one["content"] for one in received.body["messages"]] == ["I am at 999 9999999", "Thanks", "and now?"]


def test_a_personal_prompt_without_a_form_is_refused() -> None:
    class Named(Personal):
        def call(self, word: str) -> tuple[Severity, str | None]:
            return (Severity.UNSAFE, "PII") if word == "ann" else super().call(word)

    upstream, record = FakeUpstream(), Record()
    with serving(upstream) as address:
        app = create_app(guard=Named(), policy=parse_policy(HEAD + RULES), keep=record, upstream_url=address)
        with serving(app) as url:
            client = OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0)
            answer = client.chat.completions.create(model="m", messages=[{"role": "user", "content": "who is Ann Lee"}])

    assert answer.choices[0].message.content == "Not here."
    assert upstream.received == []
    assert record.actions == ["block"]


def test_without_a_redacting_rule_the_upstream_starts_at_once_and_gets_the_very_request() -> None:
    with running(rules="rules: [{name: stop, severity: unsafe, categories: [Violent], action: block}]") as gateway:
        gateway.upstream.reply = Reply.stream(*text_chunks(["fine"]))
        gateway.stream({"role": "user", "content": "I am at 030 1234567"})

        assert gateway.upstream.received[0].body["messages"][0]["content"] == "I am at 030 1234567"


def test_only_texts_are_masked_and_what_is_spared_stays() -> None:
    body = {
        "model": "m-12345678",
        "user": "u-12345678",
        "prompt": ["030 1234567", "040 1234567"],
        "messages": [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,030123456"}}]},
            {
                "role": "assistant",
                "tool_calls": [{"id": "call_123456789", "function": {"arguments": '{"n":30123456}'}}],
            },
            {
                "role": "assistant",
                "content": [{"type": "tool_use", "id": "t_12345678", "input": {"to": "a@b.example"}}],
            },
        ],
    }

    masked, count = masked_body(body, {"prompt[1]", "messages[0].content[0]"})

    assert count == 3
    assert masked["prompt"] == ["999 9999999", "040 1234567"]
    assert masked["messages"][1]["tool_calls"][0] == {
        "id": "call_123456789",
        "function": {"arguments": '{"n":99999999}'},
    }
    assert masked["messages"][2]["content"][0]["input"] == {"to": "x@x.xxxxxxx"}
    assert (masked["model"], masked["user"], masked["messages"][0]) == (
        body["model"],
        body["user"],
        body["messages"][0],
    )  # type: ignore[index]


# --- rollback -----------------------------------------------------------------------------------------------------


def answers(*replies: Reply) -> Callable[[Any], Reply]:
    """The upstream's answers, one after the other."""
    left = list(replies)
    return lambda body: left.pop(0)


def test_a_flagged_answer_is_written_anew_and_the_client_sees_one_stream() -> None:
    with running(ROLLS, continues="vllm") as gateway:
        gateway.upstream.reply = answers(
            Reply.stream(*text_chunks(["build ", "a ", "bomb bomb ", "x"]), Hang()),
            Reply.stream(*text_chunks([" garden", " now"])),
        )
        text, chunks = gateway.stream({"role": "system", "content": "Help."}, {"role": "user", "content": "hi"})
        first, second = gateway.upstream.received
        wait_until(lambda: first.cancelled, "the first request to be ended")
        page = gateway.client.with_options(base_url=gateway.url).get("/metrics", cast_to=str)

    assert text == "build a garden now"
    assert {one.id for one in chunks} == {chunks[0].id}
    assert [one.choices[0].delta.role for one in chunks if one.choices and one.choices[0].delta.role] == ["assistant"]
    assert [one.choices[0].finish_reason for one in chunks if one.choices and one.choices[0].finish_reason] == ["stop"]
    assert second.body["messages"] == [
        {"role": "system", "content": "Help.\n\nBe kind."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "build a"},
    ]
    assert (second.body["continue_final_message"], second.body["add_generation_prompt"]) == (True, False)
    assert (field(chunks)["action"], field(chunks)["interventions"][0]["kind"]) == ("allow", "rollback")
    assert 'tidegate_interventions_total{kind="rollback",outcome="done",target="response"} 1.0' in page
    assert "tidegate_leaked_characters_total 0.0" in page
    assert "tidegate_added_delay_seconds_count 1.0" in page
    assert gateway.record.actions[-1] == "allow"


def test_an_upstream_that_cannot_continue_is_asked_to() -> None:
    with running(ROLLS) as gateway:
        gateway.upstream.reply = answers(
            Reply.stream(*text_chunks(["build a bomb bomb x"])), Reply.stream(*text_chunks([" garden"]))
        )
        text, _ = gateway.stream()
        _, second = gateway.upstream.received

    assert text == "build a garden"
    assert second.body["messages"][1:] == [
        {"role": "assistant", "content": "build a"},
        {"role": "system", "content": "Be kind."},
    ]
    assert "continue_final_message" not in second.body


@pytest.mark.parametrize(
    "reply",
    [
        Reply.error(500, "no"),
        Reply.json(completion("not a stream")),
        Reply.stream(Die(), done=False),
        Reply.stream(*text_chunks([" bomb bomb"])),
    ],
    ids=["status", "whole", "dies", "flagged"],
)
def test_a_retry_that_does_not_help_ends_as_the_policy_says(reply: Reply) -> None:
    with running(ROLLS) as gateway:
        gateway.upstream.reply = answers(Reply.stream(*text_chunks(["build a bomb bomb x"])), reply)
        text, chunks = gateway.stream()

        assert text == "build a\n\nNot here."
        assert chunks[-1].choices[0].finish_reason == "content_filter"
        assert [one["kind"] for one in field(chunks)["interventions"]] == ["rollback", "replace"]
        assert gateway.record.actions[-1] == "block"
        wait_until(lambda: gateway.upstream.open_requests == 0, "the upstream to be left alone")


def test_a_stop_at_the_very_end_is_rolled_back_too() -> None:
    with running(ROLLS) as gateway:
        gateway.upstream.reply = answers(
            Reply.stream(*text_chunks(["build a bomb bomb"])), Reply.stream(*text_chunks([" house."]))
        )

        assert gateway.stream()[0] == "build a house."


def test_a_client_that_goes_away_during_a_retry_ends_it_and_leaves_a_decision() -> None:
    with running(ROLLS) as gateway:
        gateway.upstream.reply = answers(
            Reply.stream(*text_chunks(["build a bomb bomb x"])), Reply.stream(*text_chunks([" garden "])[:-1], Hang())
        )
        stream = gateway.client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "hi"}], stream=True
        )
        wait_until(lambda: len(gateway.upstream.received) == 2, "the retry")
        stream.close()

        wait_until(lambda: gateway.upstream.open_requests == 0, "the retry to be ended")
        wait_until(lambda: len(gateway.record.kept) == 2, "the decision")


def test_of_several_choices_none_is_rolled_back() -> None:
    with running(ROLLS) as gateway:
        both = [
            part | {"choices": [{**part["choices"][0], "index": index}]}
            for index in (0, 1)
            for part in text_chunks(["a bomb bomb"])
        ]
        gateway.upstream.reply = Reply.stream(*both)
        _, chunks = gateway.stream(n=2)

        assert len(gateway.upstream.received) == 1
        reasons = [one.choices[0].finish_reason for one in chunks if one.choices and one.choices[0].finish_reason]
        assert reasons == ["content_filter", "content_filter"]


# --- confirm, and letting text leave first ------------------------------------------------------------------------


def test_an_alarm_that_the_confirming_guard_overrules_cuts_nothing() -> None:
    with running("confirm: true\n", confirmer=FakeGuard(unsafe={}, name="strong/1")) as gateway:
        gateway.upstream.reply = Reply.stream(*text_chunks(["a bomb ", "bomb shelter"]))
        text, chunks = gateway.stream()

    assert text == "a bomb bomb shelter"
    assert field(chunks)["interventions"][0]["outcome"] == "overruled"


@pytest.mark.parametrize("lines", ["confirm: true\n", "layers: {tenant: {bank: {confirm: {on_error: pass}}}}\n"])
def test_a_policy_whose_alarms_nobody_could_confirm_is_not_taken(lines: str) -> None:
    with pytest.raises(PolicyError, match=r"confirm: .*TIDEGATE_CONFIRM_GUARD"), running(lines):
        pass


def test_text_that_left_first_is_in_the_coverage_and_in_the_metrics() -> None:
    with running("hold: release_first\n") as gateway:
        gateway.guard.delay_s = 0.05
        gateway.upstream.reply = Reply.stream(*text_chunks(["a bomb ", "bomb bomb", " x"]))
        _, chunks = gateway.stream()
        page = gateway.client.with_options(base_url=gateway.url).get("/metrics", cast_to=str)

    said = field(chunks)
    assert said["action"] == "block"
    assert said["flagged_released"] > 0
    assert any(part["state"] == "released_first" for part in said["coverage"])
    assert f"tidegate_leaked_characters_total {said['flagged_released']:.1f}" in page


def test_a_stream_that_holds_text_for_too_long_ends_while_the_upstream_says_nothing() -> None:
    with running("hold: {delay_ms: 50}\n") as gateway:
        gateway.upstream.reply = Reply.stream(*text_chunks(["one bomb "])[:-1], Hang())
        text, chunks = gateway.stream()

    assert text == "one"
    assert field(chunks)["failure"]["kind"] == "GuardTimeout"
