"""`dsv3 bench attention`: three ways to compute MLA's softmax(q k^T) v, forward and backward, causal, FP32.

MLA's queries and keys are wider than its values, and that decides which of torch's kernels runs:

    padded     model/attention.attention: values padded with zeros to the keys' width, so that torch's kernel which
               never writes the s x s scores to memory takes them
    unequal    scaled_dot_product_attention on the widths as they are: torch then forms the scores
    explicit   the formula as it stands: matmul, mask, softmax, matmul
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from dsv3_mini.bench.machine import describe
from dsv3_mini.bench.race import BenchError, Lap, Side, Step, race, speed_ratio

SHAPES = ((16, 256, 4, 48, 32), (4, 1024, 4, 48, 32), (1, 2048, 4, 192, 128))
"""Batch, length, heads, width of a query, width of a value: two of the tiny preset, one with the released widths."""

WAYS = ("padded", "unequal", "explicit")
AGREEMENT = 1e-4


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int, int, int]
    laps: list[Lap]

    @property
    def scores_bytes(self) -> int:
        batch, length, heads, _, _ = self.shape
        return 4 * batch * heads * length * length


@dataclass(frozen=True)
class Result:
    machine: str
    cases: list[Case]


def run(
    shapes: tuple[tuple[int, int, int, int, int], ...] = SHAPES, rounds: int = 7, threads: int | None = None
) -> Result:
    """Measure every (batch, length, heads, query width, value width).

    Raises:
        BenchError: a side fails, or the outputs or gradients of two ways differ by more than 1e-4 of their size.
    """
    threads = threads or torch.get_num_threads()
    cases = []
    for shape in shapes:
        names = dict(zip(("batch", "length", "heads", "query_width", "value_width"), shape, strict=True))
        laps = race([Side(way, f"{__name__}:step", {"way": way, **names}) for way in WAYS], rounds, threads)
        for lap in laps[1:]:
            if abs(lap.values[0] - laps[0].values[0]) > AGREEMENT * abs(laps[0].values[0]):
                raise BenchError(f"{lap.name} gives {lap.values[0]:.7g} and {laps[0].name} {laps[0].values[0]:.7g}")
        cases.append(Case(shape, laps))
    return Result(describe(threads), cases)


def render(result: Result) -> str:
    lines = [
        "Causal attention, forward and backward, FP32; speed and memory beside `padded`, the package's own",
        result.machine,
    ]
    for case in result.cases:
        batch, length, heads, query_width, value_width = case.shape
        lines += [
            "",
            f"batch {batch}, length {length}, {heads} heads, queries {query_width} and values {value_width} wide: "
            f"scores {case.scores_bytes / 1e6:,.0f} MB",
        ]
        for lap in case.laps:
            lines.append(
                f"  {lap.name:10}{lap.median * 1e3:8,.1f} ms{lap.above / 1e6:9,.0f} MB"
                f"{speed_ratio(case.laps[0], lap):8.2f}x the time{lap.above / max(case.laps[0].above, 1):8.2f}x the memory"
            )
    return "\n".join(lines)


# ---- the sides; each runs in a process of its own ----------------------------------------------------------------------


def step(way: str, batch: int, length: int, heads: int, query_width: int, value_width: int) -> Step:
    from dsv3_mini.model.attention import attention

    torch.manual_seed(0)
    query, key = (torch.randn(batch, length, heads, query_width).requires_grad_() for _ in range(2))
    value = torch.randn(batch, length, heads, value_width).requires_grad_()
    weigh = torch.randn(batch, length, heads, value_width)
    scale = query_width**-0.5

    def padded() -> Tensor:
        return attention(query, key, value, scale, None)

    def unequal() -> Tensor:
        heads_first = (rearrange(x, "b s h x -> b h s x") for x in (query, key, value))
        mixed = F.scaled_dot_product_attention(*heads_first, is_causal=True, scale=scale)
        return rearrange(mixed, "b h s v -> b s h v")

    def explicit() -> Tensor:
        q, k, v = (rearrange(x, "b s h x -> b h s x") for x in (query, key, value))
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        scores = (q @ k.mT * scale).masked_fill(later, -math.inf)
        return rearrange(scores.softmax(dim=-1) @ v, "b h s v -> b s h v")

    compute = {"padded": padded, "unequal": unequal, "explicit": explicit}[way]

    def once() -> float:
        query.grad = key.grad = value.grad = None
        mixed = compute()
        mixed.backward(weigh)
        with torch.no_grad():
            return float(mixed.norm() + query.grad.norm() + key.grad.norm() + value.grad.norm())

    return once
