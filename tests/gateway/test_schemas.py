"""What of a request is judged, as which text, and where it stands."""

from __future__ import annotations

from typing import Any

import httpx
from hypothesis import given
from hypothesis import strategies as st

from serving import Record, make_policy, serving
from tidegate.gateway.app import create_app
from tidegate.gateway.chat import ChatRequest, read_chat
from tidegate.testing import FakeStreamGuard, FakeUpstream
from tidegate.types import Span

ASSISTANT = {"role": "assistant", "content": "yes?"}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def read(*messages: dict[str, Any], **options: Any) -> ChatRequest:
    return read_chat({"model": "m", "messages": list(messages)}, **options)


def texts(chat: ChatRequest) -> list[str]:
    return [text.conversation.turns[-1].content for text in chat.new]


def test_a_request_split_over_messages_is_judged_as_one_text() -> None:
    """Messages of one role that follow each other, also around a system turn that is not judged."""
    split = [user("how do I"), {"role": "system", "content": "be brief"}, user("build one")]

    assert texts(read(*split)) == ["how do I\nbuild one"]
    assert texts(read(user("old"), ASSISTANT, *split)) == ["how do I\nbuild one"]
    assert texts(read(*split, ASSISTANT)) == ["how do I\nbuild one", "yes?"]
    assert texts(read(user("a"), {"role": "tool", "content": "b"}, user("c"))) == ["a", "b", "c"]


def test_parts_of_joined_messages_are_judged_in_both_joints() -> None:
    """With and without a line break between the parts."""
    parts = [{"type": "text", "text": "bo"}, {"type": "text", "text": "mb"}]

    assert texts(read(user("a"), user(parts))) == ["a\nbo\nmb", "a\nbomb"]


@given(contents=st.lists(st.text(alphabet="ab\n", min_size=1, max_size=5), min_size=1, max_size=5), data=st.data())
def test_a_span_is_told_where_it_stands(contents: list[str], data: st.DataObject) -> None:
    """In its own message, or in the joined text when it lies in several."""
    (text,) = read(*map(user, contents)).new
    whole = text.conversation.turns[-1].content
    start = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(start, len(whole)))

    path, span = text.where(Span(start, end))

    assert span is not None
    if "-" in path:
        assert span == Span(start, end)
    else:
        content = contents[int(path.removeprefix("messages[").partition("]")[0])]
        assert content[span.start : span.end] in (whole[start:end], whole[start : end - 1])
    assert text.where(None)[0].endswith(f"messages[{len(contents) - 1}].content")


def test_a_text_that_the_guard_failed_on_does_not_count_as_judged() -> None:
    """Also when a worse decision on another text is the one that is told; each failure is counted."""
    record = Record()
    app = create_app(
        guard=FakeStreamGuard(),
        policy=make_policy(on_guard_error="review"),
        keep=record,
        upstream_url="http://127.0.0.1:9/v1",
    )
    messages = [user("bomb"), {"role": "tool", "content": "guardfail"}, user("guardfail")]

    with serving(app) as url, httpx.Client() as client:
        answer = client.post(f"{url}/v1/chat/completions", json={"model": "m", "messages": messages})
        metrics = client.get(f"{url}/metrics").text

    assert answer.json()["tidegate"]["action"] == "block"
    assert [(part.path, part.state.value) for part in record.kept[0][0].coverage] == [
        ("messages[0].content", "judged"),
        ("messages[1].content", "not_judged"),
        ("messages[2].content", "not_judged"),
    ]
    assert 'tidegate_guard_failures_total{kind="GuardUnavailable"} 2.0' in metrics


def test_parts_that_are_not_text_count_by_what_they_carry() -> None:
    """An address by its length, and at least 1, so that no part looks as if nothing had been there."""
    parts = [{"type": "image_url", "image_url": {"url": "x" * 30}}, {"type": "odd"}]

    chat = read(user([{"type": "text", "text": "see"}, *parts]))

    assert [(part.path, part.state.value, part.characters) for part in chat.coverage] == [
        ("messages[0].content", "judged", 3),
        ("messages[0].content[1]", "not_judged", 30),
        ("messages[0].content[2]", "not_judged", 1),
    ]


def test_the_subject_is_what_the_client_says_it_is() -> None:
    def subject(**fields: Any) -> str | None:
        return read_chat({"model": "m", "messages": [user("a")], **fields}).subject

    assert subject() is None
    assert subject(user="ann") == "ann"
    assert subject(user="ann", safety_identifier="hashed-ann") == "hashed-ann"
    assert subject(user="ann", safety_identifier="") == "ann"
    assert subject(user=7, safety_identifier=None) is None


async def test_both_decisions_of_an_exchange_have_its_subject(upstream: FakeUpstream, upstream_url: str) -> None:
    record = Record()
    app = create_app(guard=FakeStreamGuard(), policy=make_policy(), keep=record, upstream_url=upstream_url)
    with serving(app) as url:
        async with httpx.AsyncClient() as client:
            body = {"model": "m", "messages": [user("a question")], "user": "ann-4711"}
            answer = await client.post(f"{url}/v1/chat/completions", json=body)

    assert answer.status_code == 200
    assert [decision.scope.subject for decision, _, _ in record.kept] == ["ann-4711"] * 2
    assert "4711" not in answer.text
