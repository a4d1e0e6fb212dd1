"""`dsv3 bench halves`: a training step with its rows in two halves at one time, and in one piece (train/halves.py).

Both take the same steps on the same rows with the same threads; only what the threads share differs:

    halves   each thread has rows of its own, from the first layer to the gradients
    whole    all threads share each operation
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass

import torch

from dsv3_mini.bench.machine import describe
from dsv3_mini.bench.race import BenchError, Lap, Side, Step, race, speed_ratio
from dsv3_mini.bench.step import trainer_for
from dsv3_mini.config import ModelConfig

CASES = (("tiny", 8, 208), ("tiny", 16, 208), ("tiny", 16, 256))
"""Preset, rows of a batch, tokens of a row: the run that ships, first and last, and the step of `dsv3 bench train`."""

AGREEMENT = 1e-5


@dataclass(frozen=True)
class Case:
    preset: str
    batch: int
    context: int
    halves: Lap
    whole: Lap


@dataclass(frozen=True)
class Result:
    machine: str
    cases: list[Case]


def run(cases: tuple[tuple[str, int, int], ...] = CASES, rounds: int = 7, threads: int | None = None) -> Result:
    """Measure every (preset, batch, context).

    Raises:
        BenchError: there is one thread only, a side fails, or the two losses differ by more than 1e-5.
    """
    threads = threads or torch.get_num_threads()
    if threads < 2:
        raise BenchError(f"threads = {threads}: halves need two threads or more, give --threads 2")
    measured = []
    for preset, batch, context in cases:
        with tempfile.TemporaryDirectory() as folder:
            shape = dict(folder=folder, preset=preset, batch=batch, context=context)
            sides = [Side(name, f"{__name__}:{name}_step", shape) for name in ("halves", "whole")]
            halves, whole = race(sides, rounds, threads)
        if abs(halves.values[0] - whole.values[0]) > AGREEMENT * abs(whole.values[0]):
            raise BenchError(f"the loss is {halves.values[0]:.7f} in halves and {whole.values[0]:.7f} whole")
        measured.append(Case(preset, batch, context, halves, whole))
    return Result(describe(threads), measured)


def render(result: Result) -> str:
    lines = [
        "A training step, FP32, in milliseconds: rows in two halves at one time, and in one piece",
        result.machine,
        "",
        f"{'model':8}{'rows':>6}{'tokens':>8}{'halves':>11}{'whole':>11}{'speed':>8}{'memory':>9}",
    ]
    for case in result.cases:
        lines.append(
            f"{case.preset:8}{case.batch:6}{case.context:8}{case.halves.median * 1e3:8,.0f} ms"
            f"{case.whole.median * 1e3:8,.0f} ms{speed_ratio(case.halves, case.whole):7.2f}x"
            f"{case.halves.above / max(case.whole.above, 1):8.2f}x"
        )
    return "\n".join(lines)


# ---- the sides; each runs in a process of its own ----------------------------------------------------------------------


def halves_step(folder: str, preset: str, batch: int, context: int) -> Step:
    trainer = trainer_for(f"{folder}/halves", ModelConfig.preset(preset), batch, context)
    return lambda: trainer.train_step().loss


def whole_step(folder: str, preset: str, batch: int, context: int) -> Step:
    from dsv3_mini.train.halves import Halves

    trainer = trainer_for(f"{folder}/whole", ModelConfig.preset(preset), batch, context)
    trainer.halves = Halves(1, 1)
    return lambda: trainer.train_step().loss
