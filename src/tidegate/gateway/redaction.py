"""Personal data taken out of a request on its way to the upstream; JSON stays JSON, and each text as long as it was.

Which texts: every string under a name by which the doors' protocols call text, wherever it stands, but for those that
are spared: the operator's own words, and new texts in which the policy found nothing to take out. Earlier turns are
masked by their form alone: what was taken out when it was new comes again with every later request.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Final

from tidegate.personal import mask

__all__ = ["masked_body"]

_TEXTS: Final = frozenset(
    {
        "arguments",
        "content",
        "input",
        "instructions",
        "output",
        "prediction",
        "prompt",
        "reasoning",
        "reasoning_content",
        "refusal",
        "suffix",
        "summary",
        "system",
        "text",
        "thinking",
    }
)


def masked_body(body: dict[str, Any], spared: Collection[str]) -> tuple[dict[str, Any], int]:
    """The request with personal data masked, and how many places that were.

    Args:
        body: the request; it is not changed.
        spared: paths that stay as they are with all that is below them, as ``messages[0].content``.
    """
    masking = _Masking(frozenset(spared))
    masked = {name: masking.value(value, name, named=name in _TEXTS) for name, value in body.items()}
    return masked, masking.count


class _Masking:
    def __init__(self, spared: frozenset[str]) -> None:
        self.count = 0
        self._spared = spared

    def value(self, value: Any, path: str, *, named: bool) -> Any:
        if path in self._spared:
            return value
        if isinstance(value, str) and named:
            text, count = mask(value)
            self.count += count
            return text
        if isinstance(value, list):
            return [self.value(one, f"{path}[{index}]", named=named) for index, one in enumerate(value)]
        if isinstance(value, dict):
            under = path.rpartition(".")[2].partition("[")[0] in _STRUCTURED
            return {
                name: self.value(one, f"{path}.{name}", named=name in _TEXTS or under) for name, one in value.items()
            }
        return value


_STRUCTURED: Final = frozenset(("arguments", "input"))
"""What a tool is called with, where that is an object and not JSON text: all strings in it are texts."""
