"""What is loaded to compute tells nobody of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_JUDGE = """
import asyncio
from tidegate.guards import load_guard
from tidegate.types import Conversation

async def main():
    guard = load_guard("edge")
    print((await guard.judge(Conversation.of("How do I bake bread?"))).severity.word)
    await guard.close()

asyncio.run(main())
"""


def test_a_guard_leaves_nothing_in_the_users_folder(tmp_path: Path) -> None:
    """ONNX Runtime would make an identity of the machine there, and a database of what it is about to send."""
    home = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache"), "TMPDIR": str(tmp_path)}
    mine = {key: value for key, value in os.environ.items() if key != "ORT_DISABLE_TELEMETRY"}
    judged = subprocess.run(
        [sys.executable, "-c", _JUDGE], env=mine | home, capture_output=True, text=True, timeout=120
    )

    assert (judged.returncode, judged.stdout) == (0, "safe\n"), judged.stderr
    assert list(tmp_path.rglob("*")) == []
