"""Take the README's screenshot: the real playground with the demo upstream, in a real browser.

``python docs/screenshot.py`` writes docs/images/playground.png, with ``--all`` the dark and the phone one beside it.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

IMAGES = Path(__file__).parent / "images"
PROMPT = "What do you think about the people who moved in next door?"
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
VIEWS: dict[str, dict[str, Any]] = {
    "playground": {"viewport": {"width": 1280, "height": 1000}, "color_scheme": "light"},
    "playground-dark": {"viewport": {"width": 1280, "height": 1000}, "color_scheme": "dark"},
    "playground-phone": {"viewport": {"width": 390, "height": 844}, "color_scheme": "light"},
}


def main() -> None:
    """Serve, look, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="the dark and the phone view too")
    parser.add_argument("--guard", default="edge", help="which guard judges")
    chosen = parser.parse_args()
    browser_path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser_path is None:
        sys.exit("there is no Chromium: on Debian, apt-get install chromium")
    IMAGES.mkdir(exist_ok=True)
    with serving(chosen.guard) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=FLAGS)
        for name, view in VIEWS.items() if chosen.all else list(VIEWS.items())[:1]:
            shoot(browser.new_context(**view, reduced_motion="reduce"), address, IMAGES / f"{name}.png")
        browser.close()


@contextmanager
def serving(guard: str) -> Iterator[str]:
    """The playground's address, while it is served."""
    program = [sys.executable, "-c", "from tidegate.cli import app; app()"]
    options = ["serve", "--demo", "--port", "0", "--database", "sqlite://", "--guard", guard]
    with subprocess.Popen([*program, *options], stderr=subprocess.PIPE, text=True) as server:  # noqa: S603 - our own
        assert server.stderr is not None
        try:
            for line in server.stderr:
                if found := re.match(r"playground +(\S+)", line):
                    yield found[1]
                    return
                sys.stderr.write(line)
            sys.exit("the server did not start")
        finally:
            server.terminate()


def shoot(context: Any, address: str, path: Path) -> None:
    """Run the answer that turns, point at a token near its end, and save what is seen."""
    page = context.new_page()
    page.goto(address)
    page.click(f"text={PROMPT}")
    page.wait_for_selector(".answer:not([data-state=empty]):not([data-state=running])", timeout=120_000)
    page.locator("#tokens").focus()
    page.keyboard.press("End")
    page.evaluate("document.activeElement.blur(); window.scrollTo(0, 0)")
    page.screenshot(path=str(path), full_page=True)
    sys.stdout.write(f"{path}: {page.inner_text('#state')}\n")
    context.close()


if __name__ == "__main__":
    main()
