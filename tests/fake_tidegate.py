"""The command line with a guard that judges by words: ``python tests/fake_tidegate.py watch`` is ``tidegate watch``."""

from __future__ import annotations

import tidegate.guards
from tidegate.cli import app
from tidegate.testing import FakeStreamGuard

tidegate.guards.load_guard = lambda spec="edge", *, threads=1: FakeStreamGuard()  # type: ignore[assignment]

if __name__ == "__main__":
    app(prog_name="tidegate")
