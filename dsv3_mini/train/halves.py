"""Halves: the rows of a micro-batch as two, side by side, each with half of the threads. For a CPU.

The threads that share one operation wait for each other at its end, and a step of a small model is thousands of short
operations. Two halves of the rows, each with threads of its own, wait for each other once, when both have their gradients.
`dsv3 bench halves` times a step both ways.

A half's gradients are added to the weights' as they come. So there are two of them and never more: a + b is b + a to the
bit, but the sum of three depends on who comes first, and a run is to end with the same weights each time.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch
from jaxtyping import Shaped
from torch import Tensor

Result = TypeVar("Result")
LEAST = 2**16
"""Numbers in a half's hidden states, at least: with fewer, Python's calls are what a step takes, and they do not run at one time."""


class Halves:
    """`map(work, rows)`: work(rows) as a list of one or, where it pays, work of each half of the rows.

    Args:
        threads: of this process; with one there is nothing to share. width: of the model (hidden_size).
    """

    def __init__(self, threads: int, width: int) -> None:
        self._width = width
        self._pool: ThreadPoolExecutor | None = None
        if threads > 1:
            # A thread's share is its own setting: what is set here holds for the halves alone.
            self._pool = ThreadPoolExecutor(2, "half", torch.set_num_threads, (threads // 2,))

    def map(self, work: Callable[[Tensor], Result], rows: Shaped[Tensor, "b s"]) -> list[Result]:
        """What `work` returns, in the order of the rows. What it raises is raised here, once both halves have ended."""
        if self._pool is None or len(rows) < 2 or rows.numel() // 2 * self._width < LEAST:
            return [work(rows)]
        pending = [self._pool.submit(work, half) for half in rows.tensor_split(2)]
        wait(pending)
        return [half.result() for half in pending]
