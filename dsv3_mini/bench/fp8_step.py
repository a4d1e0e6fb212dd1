"""A training step in FP8 beside the same step in FP32 and in BF16: what emulating FP8 costs on this machine.

    python -m dsv3_mini.bench.fp8_step       the tiny model at its recipe's first batch, in turns, each in its own process

Where there are no tensor cores for FP8 the `exact` backend rounds every operand to FP8 and multiplies in FP32: the same
products as the FP32 step, and rounding on top, which is all passes over memory. So FP8 is slower here, not faster; the bar
says how much slower it may be, for a lesson that trains with it.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass

import torch

from dsv3_mini.bench.machine import describe
from dsv3_mini.bench.race import BenchError, Lap, Side, Step, cpu_ratio, race, speed_ratio
from dsv3_mini.bench.step import trainer_for
from dsv3_mini.config import ModelConfig

PRECISIONS = ("fp32", "bf16", "fp8")
BAR = 3.0  # times the FP32 step
AGREEMENT = 0.02  # of the first loss: at the start all three see the same weights and the same tokens


@dataclass(frozen=True)
class Result:
    """laps: one for each of PRECISIONS, in that order."""

    machine: str
    model: str
    batch: int
    context: int
    laps: list[Lap]

    @property
    def cost(self) -> float:
        """The FP8 step in FP32 steps, by the clock."""
        return speed_ratio(self.laps[0], self.laps[2])


def run(
    preset: str = "tiny", batch: int = 8, context: int = 208, rounds: int = 7, threads: int | None = None
) -> Result:
    """Measure.

    Raises:
        BenchError: a side fails, or a first loss is more than 2% from FP32's.
    """
    threads = threads or torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        shape = dict(folder=folder, preset=preset, batch=batch, context=context)
        sides = [Side(name, "dsv3_mini.bench.fp8_step:step_in", {**shape, "precision": name}) for name in PRECISIONS]
        laps = race(sides, rounds, threads)
    expected = laps[0].values[0]
    for lap in laps[1:]:
        if abs(lap.values[0] - expected) > AGREEMENT * expected:
            raise BenchError(f"the first loss is {expected:.4f} in fp32 and {lap.values[0]:.4f} in {lap.name}")
    return Result(describe(threads), preset, batch, context, laps)


def render(result: Result) -> str:
    base = result.laps[0]
    lines = [
        f"Training step, {result.model}, batch {result.batch} x {result.context}",
        result.machine,
        "",
        f"{'':8}{'a step':>10}{'by the clock':>15}{'by processor time':>20}{'first loss':>13}",
    ]
    for lap in result.laps:
        lines.append(
            f"{lap.name:8}{lap.median * 1e3:7,.0f} ms{speed_ratio(base, lap):14.2f}x{cpu_ratio(base, lap):19.2f}x"
            f"{lap.values[0]:13.4f}"
        )
    verdict = "met" if result.cost <= BAR else "NOT met"
    return "\n".join([*lines, "", f"an FP8 step costs {result.cost:.2f} FP32 steps   bar {BAR:.0f}x {verdict}"])


def step_in(folder: str, preset: str, batch: int, context: int, precision: str) -> Step:
    """`Trainer.train_step` in one precision; runs in a process of its own."""
    trainer = trainer_for(f"{folder}/{precision}", ModelConfig.preset(preset), batch, context, precision)
    return lambda: trainer.train_step().loss


if __name__ == "__main__":
    print(render(run()))
