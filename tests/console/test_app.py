"""The console's page: where it is, what it may load, and that what people wrote cannot become markup."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

import tidegate.console.app
from tidegate.console.app import create_console
from tidegate.console.playground import TEXTS, Suggestion
from tidegate.policy import load_policy
from tidegate.testing import FakeStreamGuard

STATIC = Path(tidegate.console.app.__file__).parent / "static"


async def answer(prompt: str) -> AsyncGenerator[str, None]:
    yield prompt


def client(**options: object) -> TestClient:
    options = {"guard": FakeStreamGuard(), "policy": load_policy("loose"), **options}
    return TestClient(Starlette(routes=create_console(**options)))  # type: ignore[arg-type]


def test_the_root_leads_to_the_playground() -> None:
    reply = client().get("/", follow_redirects=False)
    assert (reply.status_code, reply.headers["location"]) == (307, "/playground")


def test_the_page_may_load_only_what_is_ours() -> None:
    reply = client(answer=answer, upstream="http://10.0.0.1/v1").get("/playground")
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    assert reply.headers["x-content-type-options"] == "nosniff"
    loaded = re.findall(r'(?:src|href)="([^"]+)"', reply.text)
    assert loaded
    assert all(each.startswith(("/playground", "#")) for each in loaded)
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\bstyle=|\bon\w+=", reply.text)


def test_every_static_file_is_served_with_its_type_and_fetches_nothing_from_elsewhere() -> None:
    types = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
    for file in STATIC.iterdir():
        reply = client().get(f"/playground/static/{file.name}")
        assert reply.headers["content-type"].startswith(types[file.suffix])
        assert reply.headers["x-content-type-options"] == "nosniff"
        text = reply.text.replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|@import|url\(", text)


def test_suggestions_and_names_cannot_become_markup() -> None:
    evil = '"><script>alert(1)</script>'
    reply = client(answer=answer, upstream=evil, suggestions=[Suggestion(evil, evil, evil, evil)]).get("/playground")
    assert "<script>alert" not in reply.text
    assert reply.text.count("&lt;script&gt;alert(1)") == 5


def test_the_policy_in_force_comes_first_and_the_presets_can_be_tried() -> None:
    names = re.findall(r'<option value="(\w+)"( selected)?', client().get("/playground").text)
    assert names == [("loose", " selected"), ("strict", ""), ("balanced", "")]


def test_without_an_upstream_only_texts_can_be_judged() -> None:
    page = client().get("/playground").text
    assert re.search(r'value="ask" disabled', page)
    assert re.search(r'value="judge" checked', page)
    assert page.count('class="example"') == len(TEXTS)


@pytest.mark.parametrize("path", ["/playground/static/../app.py", "/playground/static/%2e%2e/app.py"])
def test_nothing_but_static_files_is_served(path: str) -> None:
    assert client().get(path).status_code == 404
