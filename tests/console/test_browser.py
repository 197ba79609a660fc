"""The playground in a real browser: what a person sees, clicks and types."""

from __future__ import annotations

import asyncio
import re
import shutil
import socket
import threading
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette

from tidegate.console.app import create_console
from tidegate.console.playground import Suggestion
from tidegate.errors import UpstreamError
from tidegate.policy import load_policy
from tidegate.testing import FakeStreamGuard

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

PATIENCE = 30_000


async def answer(prompt: str) -> AsyncGenerator[str, None]:
    if "down" in prompt:
        raise UpstreamError("the upstream cannot be reached")
    for word in ("Here is ", "a story ", "of peace. "):
        yield word
    if "turns" in prompt:
        yield "bomb bomb "
        yield "unseen words"
    if "waits" in prompt:
        await asyncio.Event().wait()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    suggestions = [
        Suggestion("An example that turns", "one that turns"),
        Suggestion("Pasted words", "", "fine bomb bomb no"),
    ]
    console = create_console(
        guard=FakeStreamGuard(), policy=load_policy("balanced"), answer=answer, upstream="test", suggestions=suggestions
    )
    config = uvicorn.Config(Starlette(routes=console), log_level="critical", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme="light")
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    troubles: list[str] = []
    page.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("request", lambda request: request.url.startswith(address) or troubles.append(request.url))
    page.goto(f"{address}/playground")
    page.wait_for_selector("#playground[data-ready=yes]")
    yield page
    context.close()
    assert troubles == []


def ended(page: Any, state: str) -> str:
    page.wait_for_selector(f".answer[data-state={state}]")
    return str(page.inner_text("#state"))


def test_a_safe_answer_is_shown_whole_with_its_decision(page: Any) -> None:
    page.fill("#prompt", "tell me a story")
    page.click("#run")
    assert ended(page, "passed") == "Passed whole: 26 characters"
    assert page.inner_text("#tokens").strip() == "Here is a story of peace."
    assert page.inner_text("#action") == "Allow"
    assert page.inner_text("#prompt-verdict") == "Safe, allow"
    assert not page.is_visible("#cut")


def facts(page: Any) -> dict[str, Any]:
    """All that the page says of a run."""
    ids = ["state", "tokens", "action", "why", "prompt-verdict", "prompt-why", "decision-title", "plot-count"]
    hidden = ["cut", "rest", "problem", "held", "decision-facts", "inspect-facts", "empty"]
    return {id_: page.inner_text(f"#{id_}") for id_ in ids} | {id_: page.is_visible(f"#{id_}") for id_ in hidden}


def test_another_mode_begins_anew(page: Any) -> None:
    """What was said of an answer is not left beside a text of the reader's own; and the other way round."""
    untouched = facts(page)
    page.click("text=An example that turns")
    ended(page, "stopped")
    page.check("input[value=judge]")
    assert facts(page) == untouched
    page.click("text=Pasted words")
    ended(page, "stopped")
    page.check("input[value=ask]")
    assert facts(page) == untouched


def test_another_mode_ends_what_still_runs(page: Any) -> None:
    untouched = facts(page)
    page.fill("#prompt", "one that waits")
    page.click("#run")
    page.wait_for_selector(".token")
    page.check("input[value=judge]")
    assert facts(page) == untouched
    assert page.is_enabled("#run")
    assert page.is_disabled("#stop")


def test_an_example_that_turns_is_cut_before_its_harm_is_in_the_page(page: Any) -> None:
    page.click("text=An example that turns")
    assert ended(page, "stopped") == "Stopped after 25 characters"
    assert re.fullmatch(r"Stopped here: \d+ characters never left", page.inner_text("#cut"))
    assert "bomb" not in page.inner_text("#tokens")
    assert "unseen" not in page.content()
    assert page.locator(".token.withheld").count() == 2
    assert page.inner_text("#action") == "Block"
    assert page.inner_text("#rule")
    assert page.get_attribute("#plot-cut", "d")


def test_the_tint_follows_the_probability(page: Any) -> None:
    page.check("input[value=judge]")
    page.fill("#response", "calm words then a knife and calm")
    page.keyboard.press("Control+Enter")
    ended(page, "passed")

    def tint(word: str) -> float:
        token = page.locator(".token", has_text=re.compile(f"^{word}$"))
        return float(token.evaluate("element => element.style.getPropertyValue('--p')"))

    assert tint(["calm", "words", "then", "a", "knife", "and", "calm"][4]) > 0.8
    assert tint("then") < 0.1


def test_a_text_of_ones_own_shows_what_would_not_have_left(page: Any) -> None:
    page.check("input[value=judge]")
    page.click("text=Pasted words")
    ended(page, "stopped")
    assert page.inner_text("#tokens").startswith("fine")
    assert page.inner_text("#rest").strip() == "bomb bomb no"


def test_the_keyboard_is_enough(page: Any) -> None:
    page.focus("#prompt")
    page.keyboard.type("a story that waits")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".token")
    page.keyboard.press("Escape")
    assert ended(page, "noticed").startswith("You stopped it after")
    assert page.is_disabled("#stop")
    page.focus("#tokens")
    page.keyboard.press("End")
    assert page.locator(".token.here").count() == 1
    assert page.inner_text("#number-safe").endswith("%")


def test_errors_are_said_in_words(page: Any) -> None:
    page.click("#run")
    assert page.inner_text("#state") == "Type a prompt first"
    page.fill("#prompt", "please be down")
    page.click("#run")
    ended(page, "failed")
    assert page.inner_text("#problem") == "The model could not answer: the upstream cannot be reached"


def test_a_guard_that_fails_is_said_with_what_the_policy_did(page: Any) -> None:
    page.check("input[value=judge]")
    page.fill("#response", "some guardfail text")
    page.click("#run")
    ended(page, "stopped")
    assert "The guard failed: the fake guard was told to fail" in page.inner_text("#why")


def test_a_second_run_starts_clean(page: Any) -> None:
    page.click("text=An example that turns")
    ended(page, "stopped")
    page.fill("#prompt", "tell me a story")
    page.click("#run")
    ended(page, "passed")
    assert page.locator(".token.withheld").count() == 0
    assert not page.is_visible("#cut")


def test_light_and_dark_can_be_chosen_and_are_remembered(page: Any) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(background)
    page.click("#theme")
    dark = page.evaluate(background)
    assert dark != light
    page.reload()
    assert page.evaluate(background) == dark


def test_nothing_overflows_on_a_small_phone(browser: Any, address: str) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 740})
    page = context.new_page()
    page.goto(f"{address}/playground")
    page.click("text=An example that turns")
    page.wait_for_selector(".answer[data-state=stopped]")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    context.close()
