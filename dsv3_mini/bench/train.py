"""`dsv3 bench train`: our training step beside transformers', from the same weights on the same batches.

One model, one machine, one run, in turns, FP32. Each side does a whole optimizer step, as its users run it:

    ours           Trainer.train_step, one micro-batch: cross-entropy and balance loss, backward, clip at 1.0, fused
                   AdamW, the moving average of the weights, the gate biases, the report of the step; freed memory
                   is kept between steps (train/allocator.py)
    transformers   DeepseekV3ForCausalLM from the same folder: model(input_ids, labels=...), loss.backward(), clip at 1.0,
                   torch.optim.AdamW(model.parameters()), zero_grad; no balance loss, no moving average, no biases

MTP is left out, since transformers does not train it. Before any step is timed the two first losses have to agree. The
bar is against transformers as it comes; beside it stand other settings that it offers, to show its best.

Tokens per second become a share of the machine's GEMM limit by the ledger's count: 6N + causal attention per token,
which is the same for all sides, whatever they compute on top.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from dsv3_mini.bench.machine import describe, gemm_limit
from dsv3_mini.bench.race import BenchError, Lap, Side, Step, cpu_ratio, race, speed_ratio
from dsv3_mini.bench.step import Rows, trainer_for
from dsv3_mini.config import ModelConfig
from dsv3_mini.hub import from_pretrained, save_pretrained
from dsv3_mini.ledger import flops_per_token
from dsv3_mini.model import DeepSeekV3

SPEED_BAR, SPEED_AIM, MEMORY_BAR = 1.6, 2.0, 0.8
AGREEMENT = 1e-5

THEIRS: dict[str, dict[str, Any]] = {
    "transformers": {},
    "fused AdamW": dict(fused=True),
    "fused AdamW, eager attention": dict(fused=True, attn_implementation="eager"),
    "fused AdamW, eager experts": dict(fused=True, experts_implementation="eager"),
}
"""transformers' settings: as it comes (scaled_dot_product_attention, grouped_mm, plain AdamW) first, then others.

Its `batched_mm` copies an expert's weights for every token: 10 GB at the default batch, so it is no candidate.
"""


@dataclass(frozen=True)
class Result:
    """laps: ours, transformers as it comes, then its other settings; flops are those of one trained token."""

    machine: str
    model: str
    batch: int
    context: int
    laps: list[Lap]
    gemm_limit: float
    flops: int

    @property
    def ours(self) -> Lap:
        return self.laps[0]

    @property
    def default(self) -> Lap:
        return self.laps[1]

    @property
    def best(self) -> Lap:
        """The fastest of transformers' settings."""
        return min(self.laps[1:], key=lambda lap: lap.median)

    @property
    def speed(self) -> float:
        """Ours over transformers as it comes, in tokens per second."""
        return speed_ratio(self.ours, self.default)

    @property
    def memory(self) -> float:
        """Ours over transformers as it comes, peak memory above the size before the first step."""
        return self.ours.above / self.default.above

    def tokens_per_second(self, lap: Lap) -> float:
        return self.batch * self.context / lap.median

    def share(self, lap: Lap) -> float:
        """Of the GEMM limit."""
        return self.tokens_per_second(lap) * self.flops / self.gemm_limit


def run(
    preset: str = "tiny", batch: int = 16, context: int = 256, rounds: int = 7, threads: int | None = None,
    settings: bool = True,
) -> Result:  # fmt: skip
    """Measure. `settings` adds transformers' other settings to its default.

    Raises:
        BenchError: transformers is not installed, a side fails, or the first losses differ by more than 1e-5.
    """
    if find_spec("transformers") is None:
        raise BenchError("bench train compares with transformers, which is not installed: pip install transformers")
    threads = threads or torch.get_num_threads()
    cfg = ModelConfig.preset(preset, num_nextn_predict_layers=0)
    if batch < 1 or not 2 <= context <= cfg.max_position_embeddings:
        raise BenchError(
            f"batch = {batch}, context = {context}: batch must be at least 1, context between 2 and "
            f"{cfg.max_position_embeddings} (max_position_embeddings of {preset})"
        )
    theirs = THEIRS if settings else dict(list(THEIRS.items())[:1])
    with tempfile.TemporaryDirectory() as temporary:
        folder = str(Path(temporary) / "model")
        torch.manual_seed(0)
        save_pretrained(DeepSeekV3(cfg), folder, dtype=torch.float32)
        shape = dict(folder=folder, batch=batch, context=context)
        sides = [Side("dsv3_mini", f"{__name__}:our_step", shape)]
        sides += [Side(name, f"{__name__}:their_step", {**shape, **options}) for name, options in theirs.items()]
        laps = race(sides, rounds, threads)
    for lap in laps[1:]:
        ours, other = laps[0].values[0], lap.values[0]
        if abs(ours - other) > AGREEMENT * abs(ours):
            raise BenchError(f"the first loss is {ours:.7f} here and {other:.7f} with {lap.name}: not the same model")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    limit = gemm_limit()
    torch.set_num_threads(before)
    model = f"{preset} without MTP"
    return Result(describe(threads), model, batch, context, laps, limit, flops_per_token(cfg, context).train)


def render(result: Result) -> str:
    ours, default, best = result.ours, result.default, result.best
    lines = [
        f"Training step, {result.model}, batch {result.batch} x {result.context}, FP32",
        f"{result.machine}; best FP32 GEMM {result.gemm_limit / 1e9:.0f} GFLOP/s",
        "",
        f"{'':30}{'tokens/s':>10}{'GEMM limit':>12}{'peak memory of the steps':>26}{'of the process':>16}",
    ]
    for lap in result.laps:
        lines.append(
            f"{lap.name:30}{result.tokens_per_second(lap):10,.0f}{result.share(lap):12.0%}"
            f"{lap.above / 1e6:23,.0f} MB{lap.peak / 1e6:13,.0f} MB"
        )
    lines += [
        "",
        f"first loss {ours.values[0]:.6f} and {default.values[0]:.6f}: the same model",
        f"speed   {result.speed:.2f}x transformers as it comes ({cpu_ratio(ours, default):.2f}x by processor time)"
        f"   bar {SPEED_BAR}x {_verdict(result.speed >= SPEED_BAR)}, aim {SPEED_AIM:.0f}x",
        f"memory  {result.memory:.2f}x of the steps' peak, {ours.peak / default.peak:.2f}x of the process's"
        f"   bar {MEMORY_BAR}x {_verdict(result.memory <= MEMORY_BAR)}",
    ]
    if best is not default:
        lines.append(f"its best ({best.name}): we are {speed_ratio(ours, best):.2f}x as fast in"
                     f" {ours.above / best.above:.2f}x the memory")  # fmt: skip
    return "\n".join(lines)


def _verdict(met: bool) -> str:
    return "met" if met else "NOT met"


# ---- the sides; each runs in a process of its own ----------------------------------------------------------------------


def our_step(folder: str, batch: int, context: int) -> Step:
    """`Trainer.train_step` itself, on rows that are here already, in a process set up as `dsv3 train` sets it up."""
    from dsv3_mini.hub.names import released_tensors

    weights = from_pretrained(folder)
    trainer = trainer_for(str(Path(folder).parent / "run"), weights.cfg, batch, context)
    with torch.no_grad():
        views = released_tensors(weights)
        for name, parameter in released_tensors(trainer.model).items():
            parameter.copy_(views[name])
    return lambda: trainer.train_step().loss


def their_step(folder: str, batch: int, context: int, fused: bool | None = None, **options: str) -> Step:
    """transformers, as its documentation trains a causal language model."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    rows = Rows(model.config.vocab_size, batch, context)

    def step() -> float:
        tokens = rows.next()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step
