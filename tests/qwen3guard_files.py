"""Where the released files of Qwen3Guard are, for tests that compare with them: they are not part of this repository.

The folder that ``TIDEGATE_QWEN3GUARD_FILES`` names holds ``tokenizer.json``, in ``stream-0.6b`` the config and the
tokenizer config of Qwen3Guard-Stream-0.6B, and in ``gen-0.6b`` the chat template of Qwen3Guard-Gen-0.6B.
"""

from __future__ import annotations

import os
from pathlib import Path

_named = os.environ.get("TIDEGATE_QWEN3GUARD_FILES")
FILES = Path(_named) if _named else None
"""The folder; None when it is not named, and such tests are skipped."""
