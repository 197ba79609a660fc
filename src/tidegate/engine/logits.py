"""What a Stream model says of tokens, whatever computed it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Logits"]


class Logits(NamedTuple):
    """One branch at some positions of one stream, float32; the order of classes is that of the model's config."""

    risk: NDArray[np.float32]
    """``[positions, 3]``."""
    category: NDArray[np.float32]
    """``[positions, 8]`` of a response, ``[positions, 9]`` of a prompt."""
