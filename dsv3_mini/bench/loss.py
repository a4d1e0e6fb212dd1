"""`dsv3 bench loss`: cross-entropy in chunks of tokens beside the plain way, which holds all logits at once.

Both give loss and gradients of hidden states and head, from the same numbers, FP32:

    chunked   train/losses.cross_entropy: logits live for one chunk, their gradient is formed while they do
    plain     F.cross_entropy(hidden @ head.T, targets).backward()
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dsv3_mini.bench.machine import describe
from dsv3_mini.bench.race import BenchError, Lap, Side, Step, race, speed_ratio

SHAPES = ((4096, 192, 4096), (4096, 192, 32768), (1024, 1024, 32768))
"""Tokens, model width, vocabulary: the tiny preset's batch, the same with a larger vocabulary, a wider model."""

AGREEMENT = 1e-5


@dataclass(frozen=True)
class Case:
    tokens: int
    width: int
    vocabulary: int
    chunked: Lap
    plain: Lap

    @property
    def logits_bytes(self) -> int:
        return 4 * self.tokens * self.vocabulary


@dataclass(frozen=True)
class Result:
    machine: str
    cases: list[Case]


def run(shapes: tuple[tuple[int, int, int], ...] = SHAPES, rounds: int = 7, threads: int | None = None) -> Result:
    """Measure every (tokens, width, vocabulary).

    Raises:
        BenchError: a side fails, or the two losses differ by more than 1e-5.
    """
    threads = threads or torch.get_num_threads()
    cases = []
    for tokens, width, vocabulary in shapes:
        shape = dict(tokens=tokens, width=width, vocabulary=vocabulary)
        sides = [Side(name, f"{__name__}:{name}_step", shape) for name in ("chunked", "plain")]
        chunked, plain = race(sides, rounds, threads)
        if abs(chunked.values[0] - plain.values[0]) > AGREEMENT * abs(plain.values[0]):
            raise BenchError(f"the loss is {chunked.values[0]:.7f} in chunks and {plain.values[0]:.7f} plainly")
        cases.append(Case(tokens, width, vocabulary, chunked, plain))
    return Result(describe(threads), cases)


def render(result: Result) -> str:
    lines = [
        "Cross-entropy of all tokens, with its gradients, FP32: in chunks, and plainly",
        result.machine,
        "",
        f"{'tokens':>8}{'width':>7}{'vocabulary':>12}{'all logits':>12}"
        f"{'chunked':>11}{'plain':>11}{'speed':>8}{'chunked':>12}{'plain':>11}{'memory':>9}",
    ]
    for case in result.cases:
        chunked, plain = case.chunked, case.plain
        lines.append(
            f"{case.tokens:8,}{case.width:7,}{case.vocabulary:12,}{case.logits_bytes / 1e6:9,.0f} MB"
            f"{chunked.median * 1e3:8,.0f} ms{plain.median * 1e3:8,.0f} ms{speed_ratio(chunked, plain):7.2f}x"
            f"{chunked.above / 1e6:9,.0f} MB{plain.above / 1e6:8,.0f} MB{chunked.above / max(plain.above, 1):8.2f}x"
        )
    return "\n".join(lines)


# ---- the sides; each runs in a process of its own ----------------------------------------------------------------------


def chunked_step(tokens: int, width: int, vocabulary: int) -> Step:
    from dsv3_mini.train.losses import cross_entropy

    hidden, head, targets = _inputs(tokens, width, vocabulary)

    def step() -> float:
        hidden.grad = head.grad = None
        loss = cross_entropy(hidden[None], head, targets[None])
        loss.backward()
        return float(loss)

    return step


def plain_step(tokens: int, width: int, vocabulary: int) -> Step:
    hidden, head, targets = _inputs(tokens, width, vocabulary)

    def step() -> float:
        hidden.grad = head.grad = None
        loss = F.cross_entropy(hidden @ head.T, targets)
        loss.backward()
        return float(loss)

    return step


def _inputs(tokens: int, width: int, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width).requires_grad_()
    head = torch.randn(vocabulary, width).mul_(width**-0.5).requires_grad_()
    return hidden, head, torch.randint(0, vocabulary, (tokens,))
