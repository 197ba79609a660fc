"""Tidegate: a safety guard in the token stream of any LLM.

``check`` judges one text from a script or a notebook; everything else is async: ``load_guard`` gives a guard,
``await guard.judge(conversation)`` its verdict.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["Conversation", "Turn", "__version__", "check", "load_guard", "load_policy"]
__version__ = "0.1.0"

if TYPE_CHECKING:
    from tidegate.guards import load_guard
    from tidegate.moderate import check
    from tidegate.policy import load_policy
    from tidegate.types import Conversation, Turn

_HOMES = {
    "Conversation": "tidegate.types",
    "Turn": "tidegate.types",
    "check": "tidegate.moderate",
    "load_guard": "tidegate.guards",
    "load_policy": "tidegate.policy",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that ``import tidegate`` stays fast."""
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'tidegate' has no attribute {name!r}")
