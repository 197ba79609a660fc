"""Log probabilities leave with the text that they spell; of what nobody judged, the policy says what becomes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import example, given

from gateway import test_responses_answers as responses
from gateway.test_answers import CUTS, TEXTS, Client, allowed, cut, judging, through, wire
from gateway.test_interventions import RULES, Personal
from gateway.test_redaction import HEAD
from serving import Record, make_policy
from tidegate.gateway.answers import AnswerStream, judge_answer
from tidegate.gateway.forms import CHAT, COMPLETION, Form
from tidegate.gateway.responses_answers import judge_response
from tidegate.policy import parse_policy
from tidegate.testing import FakeStreamGuard, chunk, completion, message_item, response, response_events
from tidegate.types import Action

SECRET = "first mix the powder"


def token(data: bytes, **more: Any) -> dict[str, Any]:
    """A token as OpenAI tells it: with bytes, and something in the place of text that is none."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        text = "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
    return {"token": text, "logprob": -0.25, "bytes": list(data), "top_logprobs": [], **more}


def tokens_of(text: str, places: list[float]) -> list[dict[str, Any]]:
    """The text as tokens, cut at these places between bytes, so that characters are cut too."""
    data = text.encode()
    at = sorted({0, len(data), *(int(place * len(data)) for place in places)})
    return [token(data[start:end]) for start, end in itertools.pairwise(at)]


def streamed(tokens: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One chunk for each token, with as much of the text as is complete by then."""
    chunks, done, text = [], b"", ""
    for one in tokens:
        done += bytes(one["bytes"])
        whole = done.decode(errors="ignore")
        part = chunk({"content": whole[len(text) :]})
        part["choices"][0]["logprobs"] = {"content": [one], "refusal": None}
        text = whole
        chunks.append(part)
    return [*chunks, chunk(finish_reason="stop")]


def told(client: Client) -> list[dict[str, Any]]:
    """The tokens that the client got."""
    known = [choice.get("logprobs") for part in client.chunks for choice in part["choices"]]
    return [one for each in known if each for one in each.get("content") or ()]


@given(text=TEXTS, tokens=CUTS, reads=CUTS)
async def test_tokens_leave_with_their_text_and_never_before(
    text: str, tokens: list[float], reads: list[float]
) -> None:
    """However text is cut into tokens and bytes: what they spell is a beginning of what has left, and all of it when
    the answer is allowed."""
    sent = tokens_of(text, tokens)
    stream = AnswerStream(judging(FakeStreamGuard()))
    seen = b""
    for read in cut(wire(streamed(sent)), reads):
        if stream.done:
            break
        seen += await stream.feed(read)
        client = Client(seen)
        spelled = b"".join(bytes(one["bytes"]) for one in told(client))
        assert client.texts.get((0, "content"), "").encode().startswith(spelled)

    client = Client(seen if stream.done else seen + await stream.end())
    if client.reasons == {0: ["stop"]}:
        assert told(client) == sent
        assert [part["path"] for part in client.decisions[0]["coverage"] if part["state"] != "judged"] == []


@given(text=TEXTS, tokens=CUTS)
async def test_a_whole_answer_keeps_its_tokens(text: str, tokens: list[float]) -> None:
    answer = completion(text)
    sent = tokens_of(text, tokens)
    answer["choices"][0]["logprobs"] = {"content": sent, "refusal": None}

    judged, decisions = await judge_answer(answer, judging(FakeStreamGuard()))

    blocked = bool(decisions) and decisions[0].action is Action.BLOCK
    assert judged["choices"][0]["logprobs"] == (None if blocked else {"content": sent, "refusal": None})


LIES: list[dict[str, Any]] = [
    {"token": SECRET, "logprob": -1, "bytes": list(b"fine")},
    {"token": "fine", "logprob": -1, "bytes": list(SECRET.encode())},
    {"token": SECRET, "logprob": -1},
    {"token": "fine", "logprob": -1, "bytes": SECRET},
    {"token": "fine", "logprob": -1, "bytes": [SECRET]},
    {"token": [SECRET], "logprob": -1},
    {"token": "fine", "logprob": SECRET, "bytes": None},
    {"token": "fine", "logprob": -1, "note": SECRET},
    {"token": "fine", SECRET: 1},
    {"token": "fine", "top_logprobs": [{"token": "fine", "logprob": SECRET}]},
    {"token": "fine", "top_logprobs": [{"token": "fine", "logprob": 1, "bytes": None, "note": SECRET}]},
    {"token": "fine", "top_logprobs": [{"token": SECRET, "logprob": 1}]},
    {"token": "fine", "top_logprobs": [SECRET]},
    {"token": "fine", "top_logprobs": {"a": SECRET}},
]


@pytest.mark.parametrize("lie", [*({"content": [lie]} for lie in LIES), {"content": SECRET}, {"note": SECRET}, SECRET])
@pytest.mark.parametrize("whole", [True, False])
async def test_tokens_that_do_not_spell_the_text_do_not_leave(lie: Any, whole: bool) -> None:
    """The text does, and the coverage counts what was dropped."""
    if whole:
        answer = completion("fine")
        answer["choices"][0]["logprobs"] = lie
        judged, _ = await judge_answer(answer, judging(FakeStreamGuard()))
        sent, field = json.dumps(judged), judged["tidegate"]
    else:
        part = chunk({"content": "fine"})
        part["choices"][0]["logprobs"] = lie
        data = await through(AnswerStream(judging(FakeStreamGuard())), [wire([part, chunk(finish_reason="stop")])])
        sent, field = data.decode(), Client(data).decisions[0]

    assert "powder" not in sent
    assert '"fine"' in sent
    dropped = [part for part in field["coverage"] if part["state"] == "not_judged"]
    assert dropped
    assert all(part["path"].startswith("choices[0].logprobs") for part in dropped)


async def test_from_the_first_token_that_lies_on_all_are_dropped() -> None:
    answer = completion("one two three")
    listed = [token(b"one"), token(b" 2"), token(b" three")]
    answer["choices"][0]["logprobs"] = {"content": listed, "refusal": None}

    judged, decisions = await judge_answer(answer, judging(FakeStreamGuard()))

    assert judged["choices"][0]["logprobs"]["content"] == listed[:1]
    assert [(part.path, part.characters) for part in decisions[0].coverage][1:] == [("choices[0].logprobs", 8)]


# --- what nobody judged -------------------------------------------------------------------------------------------

OTHERS = [{"token": word, "logprob": -1, "bytes": None} for word in ("fine", SECRET)]
ODD = {"token": "fine", "logprob": -1, "bytes": None, "top_logprobs": OTHERS}


def odd_answer(where: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The same answer whole and as chunks, with text that no guard sees at some place."""
    whole, part = completion("fine"), chunk({"content": "fine"})
    for answer, inner in ((whole, "message"), (part, "delta")):
        choice = answer["choices"][0]
        if where == "top_logprobs":
            choice["logprobs"] = {"content": [ODD], "refusal": None}
        else:
            {"top": answer, "choice": choice, "inner": choice[inner]}[where]["extra"] = {"note": [SECRET]}
    return whole, [part, chunk(finish_reason="stop")]


@pytest.mark.parametrize("where", ["top_logprobs", "top", "choice", "inner"])
@pytest.mark.parametrize("setting", ["drop", "pass", "refuse"])
async def test_the_policy_says_what_becomes_of_text_that_no_guard_sees(where: str, setting: str) -> None:
    """Whole or streaming alike; the coverage counts it in each case."""
    record = Record()
    asked = judging(FakeStreamGuard(), record, policy=make_policy(unjudged_answer=setting))
    whole, chunks = odd_answer(where)

    judged, _ = await judge_answer(whole, asked)
    client = Client(data := await through(AnswerStream(asked), [wire(chunks)]))

    for sent in (json.dumps(judged), data.decode()):
        assert ("powder" in sent) == (setting == "pass")
        assert ("Not here." in sent or "content_filter" in sent) == (setting == "refuse")
    assert judged["choices"][0]["finish_reason"] == client.reasons[0][0]
    for decision, _, _ in record.kept:
        assert decision.rule == ("unjudged_answer" if setting == "refuse" else "otherwise")
        unjudged = [part for part in decision.coverage if part.state.value == "not_judged"]
        assert sum(part.characters for part in unjudged if "extra" in part.path or "top" in part.path) == len(SECRET)


async def test_a_refusal_that_is_only_observed_is_not_done() -> None:
    record = Record()
    asked = judging(FakeStreamGuard(), record, policy=make_policy(unjudged_answer="refuse", observe="true"))
    whole, chunks = odd_answer("choice")

    judged, _ = await judge_answer(whole, asked)
    client = Client(await through(AnswerStream(asked), [wire(chunks)]))

    assert judged["choices"][0]["message"]["content"] == client.texts[0, "content"] == "fine"
    for decision, _, _ in record.kept:
        assert decision.observed is not None
        assert (decision.observed.action, decision.observed.rule) == (Action.BLOCK, "unjudged_answer")


async def test_nothing_that_passes_unjudged_leaves_with_a_blocked_choice() -> None:
    answer = completion("bomb bomb")
    answer["choices"][0]["extra"] = SECRET

    judged, _ = await judge_answer(answer, judging(FakeStreamGuard(), policy=make_policy(unjudged_answer="pass")))

    assert SECRET not in json.dumps(judged)


async def test_a_verdict_says_more_than_that_there_was_text_which_nobody_could_judge() -> None:
    """A choice that is stopped anyway is stopped by the rule that found it unsafe."""
    record = Record()
    asked = judging(FakeStreamGuard(), record, policy=make_policy(unjudged_answer="refuse"))
    answer = completion("bomb bomb")
    answer["choices"][0]["extra"] = SECRET
    part = chunk({"content": "bomb bomb "}, extra=SECRET)

    await judge_answer(answer, asked)
    await through(AnswerStream(asked), [wire([part, chunk(finish_reason="stop")])])

    assert [decision.rule for decision, _, _ in record.kept] == ["unsafe", "unsafe"]


async def test_a_field_of_ours_is_never_the_upstreams() -> None:
    """An upstream cannot say what we decided, even where unknown fields may pass."""
    answer = completion("fine")
    answer["choices"][0]["tidegate"] = answer["tidegate"] = {"action": "review", "note": SECRET}
    part = chunk({"content": "fine"}, tidegate={"note": SECRET})
    asked = judging(FakeStreamGuard(), policy=make_policy(unjudged_answer="pass"))

    judged, _ = await judge_answer(answer, asked)
    data = await through(AnswerStream(asked), [wire([part, chunk(finish_reason="stop")])])

    assert judged["tidegate"]["action"] == judged["choices"][0]["tidegate"]["action"] == "allow"
    assert b"powder" not in data


# --- what is written anew -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [CHAT, COMPLETION], ids=["chat", "completions"])
async def test_tokens_of_what_is_written_anew_follow_those_that_have_left(form: Form) -> None:
    """Those of completions have places that would count from another beginning: they end with what was rolled back."""
    policy = make_policy(intervention="rollback", rollback="{tries: 1, buffer: 0, then: replace}")
    stream = AnswerStream(judging(FakeStreamGuard(), policy=policy, retries=True), form=form)

    def saying(*words: str) -> bytes:
        parts = []
        for word in words:
            listed = {"content": [token(word.encode())]}
            row = {"tokens": [word], "token_logprobs": [-0.25], "top_logprobs": None, "text_offset": [0]}
            said = {"delta": {"content": word}, "logprobs": listed} if form is CHAT else {"text": word, "logprobs": row}
            parts.append({"choices": [{"index": 0, "finish_reason": None, **said}]})
        return wire(parts, done=False)

    sent = await stream.feed(saying("build", " a", " bomb", " bomb", " x"))
    assert stream.retry is not None
    stream.resume()
    sent += await stream.feed(saying(" garden", " now"))
    sent += await stream.feed(wire([{"choices": [{"index": 0, "finish_reason": "stop"}]}]))

    events = [json.loads(part.removeprefix("data: ")) for part in sent.decode().split("\n\n") if part[6:7] == "{"]
    known = [choice["logprobs"] for event in events for choice in event.get("choices", ()) if choice.get("logprobs")]
    told = [one["token"] for each in known for one in each.get("content", ())]
    told += [one for each in known for one in each.get("tokens", ())]
    assert told == ["build", " a", *([" garden", " now"] if form is CHAT else [])]
    assert [part.state.value for part in stream.decisions[0].coverage] == ["judged"]


# --- responses ----------------------------------------------------------------------------------------------------


def pieces_of(tokens: list[dict[str, Any]]) -> list[str]:
    """As much of the text as is complete with each token."""
    ends = [b"".join(bytes(one["bytes"]) for one in tokens[:number]) for number in range(len(tokens) + 1)]
    texts = [end.decode(errors="ignore") for end in ends]
    return [after[len(before) :] for before, after in itertools.pairwise(texts)]


def responded(tokens: list[dict[str, Any]], **fields: Any) -> list[dict[str, Any]]:
    """A response in one delta for each token; the tokens stand in all events that repeat the text."""
    pieces = pieces_of(tokens)
    part = {"type": "output_text", "text": "".join(pieces), "annotations": [], "logprobs": tokens}
    events = response_events(message_item(content=[part]), cut=lambda _: pieces, **fields)
    left = iter(tokens)
    for event in events:
        if event["type"] == "response.output_text.delta":
            event["logprobs"] = [next(left)]
        elif event["type"] == "response.output_text.done":
            event["logprobs"] = tokens
        elif event["type"] == "response.content_part.added":
            event["part"] = {**event["part"], "logprobs": []}
    return events


def lists_in(value: Any) -> Iterator[list[dict[str, Any]]]:
    """All lists of tokens in an event."""
    if isinstance(value, list):
        for one in value:
            yield from lists_in(one)
    elif isinstance(value, dict):
        for name, inner in value.items():
            if name == "logprobs":
                yield inner
            else:
                yield from lists_in(inner)


def spelled_by(listed: list[dict[str, Any]]) -> bytes:
    return b"".join(bytes(one["bytes"]) for one in listed)


def repeating(client: responses.Client) -> list[dict[str, Any]]:
    """The events that repeat a whole text."""
    return [one for one in client.events if one["type"].endswith((".done", ".completed", ".incomplete"))]


def in_deltas(client: responses.Client) -> list[dict[str, Any]]:
    return [one for event in client.of("output_text.delta") for one in event["logprobs"]]


@given(text=TEXTS, tokens=CUTS, reads=CUTS)
@example(text="so bomb bomb x", tokens=[0.3, 0.5], reads=[0.2, 0.4])
async def test_no_event_of_a_response_spells_what_has_not_left(
    text: str, tokens: list[float], reads: list[float]
) -> None:
    """At every moment, each list of tokens in each event spells a beginning of the text that has left by then; and the
    events of an answer that is allowed have all of them."""
    expected, action = await allowed(text)
    sent = tokens_of(text, tokens)
    stream = responses.stream()
    seen = b""
    for read in cut(wire(responded(sent)), reads):
        if stream.done:
            break
        seen += await stream.feed(read)
        client = responses.Client(seen)
        assert expected.startswith(client.text())
        for listed in (in_deltas(client), *lists_in(repeating(client))):
            assert client.text().encode().startswith(spelled_by(listed))
        if "bomb" not in client.text():
            assert b"bomb" not in seen

    client = responses.Client(seen if stream.done else seen + await stream.end())
    told = in_deltas(client)
    assert all(listed == told for listed in lists_in(repeating(client)))
    if action is Action.ALLOW:
        assert told == (sent if text else [])
        assert [part["path"] for part in client.field["coverage"] if part["state"] != "judged"] == []


MASKING = parse_policy(HEAD.replace("on_guard_error", "unjudged_answer: pass\non_guard_error", 1) + RULES)


@given(tokens=CUTS, reads=CUTS)
async def test_from_the_first_mask_on_a_response_has_no_tokens(tokens: list[float], reads: list[float]) -> None:
    """Whatever else the policy lets pass, and in all events."""
    text, left = "Please call 030 1234567 now.", "Please call 999 9999999 now."
    stream = responses.stream(Personal(), policy=MASKING)

    seen = await responses.through(stream, cut(wire(responded(tokens_of(text, tokens))), reads))

    client = responses.Client(seen)
    assert client.text() == left
    assert client.last["response"]["output"][0]["content"][0]["text"] == left
    for listed in (in_deltas(client), *lists_in(repeating(client))):
        assert b"Please call ".startswith(spelled_by(listed))
    assert not set("0123456789") & {*"".join(map(str, responses.strings([*lists_in(client.events)])))}


async def test_a_whole_response_has_the_tokens_of_what_is_not_masked() -> None:
    texts = ("Please call 030 1234567 now.", "It is free.")
    parts = [{"type": "output_text", "text": text, "logprobs": tokens_of(text, [0.3])} for text in texts]

    told, _ = await judge_response(response(message_item(content=parts)), judging(Personal(), policy=MASKING), {})

    masked, plain = told["output"][0]["content"]
    assert (masked["text"], masked["logprobs"]) == ("Please call 999 9999999 now.", [])
    assert plain["logprobs"] == tokens_of(texts[1], [0.3])


async def test_tokens_of_a_text_that_begins_whole_leave_with_its_first_delta() -> None:
    sent = [token(b"so "), token(b"it is")]
    events = responded(sent)
    begun = next(event for event in events if event["type"] == "response.content_part.added")
    begun["part"] = {**begun["part"], "text": "so ", "logprobs": sent[:1]}
    del events[events.index(begun) + 1]

    client = await responses.client_of(events)

    assert client.of("content_part.added")[0]["part"]["logprobs"] == []
    assert client.text() == "so it is"
    assert in_deltas(client) == client.last["response"]["output"][0]["content"][0]["logprobs"] == sent


async def test_tokens_that_only_repeating_events_have_leave_with_them() -> None:
    sent = tokens_of("one two", [0.5])
    events = [{**event, "logprobs": []} if "delta" in event else event for event in responded(sent)]

    client = await responses.client_of(events)

    assert in_deltas(client) == []
    assert [listed for listed in lists_in(client.events) if listed] == [sent] * 4


@pytest.mark.parametrize("lie", LIES)
async def test_tokens_that_do_not_spell_a_response_do_not_leave_with_it(lie: dict[str, Any]) -> None:
    """In no event; and the coverage counts them."""
    events = responded([token(b"fine")])
    for event in events:
        for listed in lists_in(event):
            listed[:] = [lie] if listed else []

    client = await responses.client_of(events)

    assert "powder" not in json.dumps(client.events)
    assert client.text() == "fine"
    places = ("response.output_text.delta", "response.output_text.done", "part", "item.content", "output.content")
    dropped = {part["path"].partition(".logprobs")[0] for part in client.field["coverage"][1:]}
    assert dropped == set(places)


@pytest.mark.parametrize("setting", ["drop", "pass", "refuse"])
async def test_the_policy_says_what_becomes_of_other_tokens_of_a_response(setting: str) -> None:
    record = Record()
    events = responded([{**token(b"so "), "top_logprobs": OTHERS}, token(b"fine")])

    client = await responses.client_of(events, record=record, policy=make_policy(unjudged_answer=setting))

    assert ("powder" in json.dumps(client.events)) == (setting == "pass")
    assert client.types[-1] == ("incomplete" if setting == "refuse" else "completed")
    assert record.kept[0][0].rule == ("unjudged_answer" if setting == "refuse" else "otherwise")
    unjudged = [part for part in record.kept[0][0].coverage if part.path.endswith("top_logprobs")]
    assert {part.characters for part in unjudged} == {len(SECRET) + len("fine")}
    if setting == "pass":
        assert in_deltas(client)[0]["top_logprobs"] == OTHERS
