"""What the page of ``/v1/live`` says, against a real server with the guard in the package."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import connect
from websockets.typing import Subprotocol

from serving import PATIENCE_S, serving
from tidegate.gateway import live, live_frames
from tidegate.gateway.app import create_app
from tidegate.gateway.live import LiveLimits
from tidegate.gateway.live_frames import PROTOCOL
from tidegate.guards.edge import EDGE_FILES, SHIPPED, EdgeGuard
from tidegate.policy import load_policy

PAGE = (Path(__file__).parents[2] / "docs" / "doors" / "live.md").read_text(encoding="utf-8")
PYTHON, TEXT = (re.search(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL) for kind in ("python", "text"))
needs_edge = pytest.mark.skipif(
    not all((SHIPPED / name).is_file() for name in EDGE_FILES), reason=f"the shipped edge guard is absent: {SHIPPED}"
)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(create_app(guard=EdgeGuard(), policy=load_policy("balanced"))) as address:
        yield address.replace("http", "ws", 1)


@needs_edge
async def test_the_lines_of_the_page_are_what_is_said(url: str) -> None:
    assert TEXT is not None
    async with connect(f"{url}/v1/live", subprotocols=[Subprotocol(PROTOCOL)]) as socket:
        for line in TEXT[1].splitlines()[1:]:
            direction, _, frame = line.partition(" ")
            if direction == ">":
                await socket.send(frame)
                continue
            expected = json.loads(frame.replace("[...]", '"..."').replace("{...}", '"..."'))
            said: dict[str, Any] = json.loads(await socket.recv())
            assert list(said) == list(expected)
            assert {key: said[key] for key, value in expected.items() if value != "..."} == {
                key: value for key, value in expected.items() if value != "..."
            }


@needs_edge
def test_the_program_of_the_page_shows_a_text_as_it_leaves_and_its_decision(url: str, tmp_path: Path) -> None:
    assert PYTHON is not None
    program = tmp_path / "watched.py"
    program.write_text(PYTHON[1], encoding="utf-8")

    run = subprocess.run(
        [sys.executable, str(program), url], capture_output=True, text=True, timeout=PATIENCE_S, check=True
    )

    *lines, decision = run.stdout.splitlines()
    assert "".join(lines) == "Mix flour and water, let it rest, and bake it. "
    assert decision == "allow"


def test_every_frame_code_and_limit_is_on_the_page() -> None:
    sources = "".join(Path(str(module.__file__)).read_text(encoding="utf-8") for module in (live, live_frames))
    calls = r'(?:fail\(|_refuse\(|_Ending\("error", |Unreadable\()[^"]*(?:f?"[^"]*",\s*)?"([a-z_]+)"'
    codes = set(re.findall(calls, sources)) | {"idle", "invalid_json", "binary_frame", "frame_too_long"}
    assert {"window_exceeded", "store_error", "unknown_stream", "too_much_text"} <= codes
    kinds = set(re.findall(r'send\(\s*"([a-z_]+)"', sources))
    assert {"hello", "opened", "step", "end", "error", "going_away"} <= kinds
    named = {*codes, *kinds, *live_frames._FIELDS, *LiveLimits().told()}
    named |= {field for fields in live_frames._FIELDS.values() for field in fields}

    assert [name for name in sorted(named) if f"`{name}`" not in PAGE] == []
