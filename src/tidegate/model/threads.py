"""Which threads compute on a CPU, and how many at a time.

PyTorch computes with OpenMP, which gives every thread that begins to compute a team of threads of its own, for as long
as the thread lives. Members of a team wait for the next piece of work awake, but only while there are no more of them,
in all teams together, than there are CPUs; else they sleep, and waking them takes about as long as a small piece takes
to compute. A model that was loaded by one thread and is run by another is slower for that (a forward of 0.6B on two
cores by a quarter). So what is computed only once is computed by a thread that ends.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

__all__ = ["computed_apart", "use_threads"]

T = TypeVar("T")


def computed_apart(call: Callable[[], T]) -> T:
    """What a call gives, or raises, that is made by a thread of its own: nothing of its team remains."""
    with ThreadPoolExecutor(1, thread_name_prefix="tidegate-once") as once:
        return once.submit(call).result()


def use_threads(count: int) -> None:
    """Let every thread that begins to compute from now on use so many threads for it, at least 1."""
    torch.set_num_threads(count)
