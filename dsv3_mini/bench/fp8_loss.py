"""The loss of FP8 training beside BF16's: the same model, the same seeds, the same tokens, step by step (report appendix B.1).

    python -m dsv3_mini.bench.fp8_loss --steps 300

Four runs take every batch in turn:

    bf16         what FP8 is held against
    fp8          the report's recipe
    per tensor   FP8 with one scale for a whole tensor, as it was done before
    fp32         no FP8 at all: what a mere other rounding does to a run, which is the noise that a gap has to be seen in

The gap is the relative difference of two losses, each the mean over the last third of the steps. All runs see the same
tokens, so what is hard or easy about a batch cancels. Beside it stands the largest gap of running means in that third.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from dsv3_mini.bench.machine import describe
from dsv3_mini.config import ModelConfig
from dsv3_mini.data.stream import TokenStream
from dsv3_mini.data.tokenizer import Tokenizer
from dsv3_mini.fp8.convert import to_fp8
from dsv3_mini.fp8.recipe import ABLATIONS
from dsv3_mini.train.recipe import Recipe
from dsv3_mini.train.trainer import Trainer

BAR = 0.0025
WINDOW = 25  # steps of a running mean
RUNS = {"bf16": "bf16", "fp8": "fp8", "per tensor": "fp8", "fp32": "fp32"}
"""Name -> precision; the first is what the others are held against."""


@dataclass(frozen=True)
class Result:
    machine: str
    model: str
    losses: dict[str, list[float]]

    def last_third(self, name: str) -> float:
        """The mean loss of a run's last third, in nats per token."""
        losses = self.losses[name]
        end = losses[len(losses) * 2 // 3 :]
        return sum(end) / len(end)

    def gap(self, name: str) -> float:
        """How much higher a run's last third is than BF16's, as a share of BF16's."""
        return self.last_third(name) / self.last_third("bf16") - 1

    def largest_gap(self, name: str) -> float:
        """The largest gap, either way, of running means over WINDOW steps that end in the last third."""
        own, base = (running_means(self.losses[which]) for which in (name, "bf16"))
        first = len(own) * 2 // 3
        return max(abs(a / b - 1) for a, b in zip(own[first:], base[first:], strict=True))


def running_means(values: list[float], window: int = WINDOW) -> list[float]:
    """At each place the mean of the last `window` values up to it; of fewer, near the beginning."""
    parts = [values[max(0, end - window) : end] for end in range(1, len(values) + 1)]
    return [sum(part) / len(part) for part in parts]


def run(preset: str = "tiny", steps: int = 300, threads: int | None = None) -> Result:
    """Train all four side by side from the beginning of the preset's own recipe."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    cfg, recipe, tokenizer = ModelConfig.preset(preset), Recipe.preset(preset), Tokenizer.shipped()
    stream = TokenStream(tokenizer, round(recipe.context(0)), recipe.mixture, seed=recipe.seed)
    drawn: list[Tensor] = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            trainers = {
                name: Trainer(
                    Path(folder) / name,
                    cfg,
                    recipe.replace(precision=precision),
                    tokenizer,
                    open_stream=lambda _: _Reader(stream, drawn),
                )  # fmt: skip
                for name, precision in RUNS.items()
            }
            to_fp8(trainers["per tensor"].model, ABLATIONS["per-tensor scaling"])
            losses: dict[str, list[float]] = {name: [] for name in RUNS}
            for _ in range(steps):
                for name, trainer in trainers.items():
                    losses[name].append(trainer.train_step().loss)
    finally:
        stream.close()
        torch.set_num_threads(before)
    return Result(describe(threads or before), preset, losses)


def render(result: Result) -> str:
    steps = len(result.losses["bf16"])
    lines = [
        f"Loss of {result.model} over {steps} steps, the same tokens for all; last third: {steps - steps * 2 // 3} steps",
        result.machine,
        "",
        f"{'':12}{'first':>9}{'last third':>12}{'gap to bf16':>13}{'largest of running means':>26}",
    ]
    for name, losses in result.losses.items():
        gaps = "" if name == "bf16" else f"{result.gap(name):+13.3%}{result.largest_gap(name):26.3%}"
        lines.append(f"{name:12}{losses[0]:9.4f}{result.last_third(name):12.4f}{gaps}")
    verdict = "met" if abs(result.gap("fp8")) < BAR else "NOT met"
    return "\n".join([*lines, "", f"fp8 is {abs(result.gap('fp8')):.3%} from bf16   bar {BAR:.2%} {verdict}"])


class _Reader:
    """One run's view of a stream that several read: each gets every batch, and it is made once."""

    def __init__(self, stream: TokenStream, drawn: list[Tensor]) -> None:
        self.stream, self.drawn, self.read = stream, drawn, 0
        self.seq_len = stream.seq_len

    def next_batch(self, batch_size: int) -> Int[Tensor, "b s1"]:
        if self.read == len(self.drawn):
            self.drawn.append(self.stream.next_batch(batch_size))
        self.read += 1
        return self.drawn[self.read - 1]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m dsv3_mini.bench.fp8_loss", description="FP8's loss beside BF16's.")
    parser.add_argument("--preset", choices=["nano", "tiny"], default="tiny", help="model and recipe (default: tiny)")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps (default: 300)")
    parser.add_argument("--threads", type=int, default=None, help="torch's threads (default: as torch chooses)")
    args = parser.parse_args()
    print(render(run(args.preset, args.steps, args.threads)))


if __name__ == "__main__":
    main()
