"""Scaling on paper: one model on 8 to 16,384 GPUs, each time in the best of a few layouts, and what breaks where.

For each size the layouts are the report's shape as far as the GPUs go: 16 pipeline ranks or as many as there are nodes, experts
over 64 ranks or a stage's. The batch stays the report's, until a data rank would have less than two micro-batches for each stage:
from there on it has to grow, which is where scaling ends, since a larger batch learns less from each token.

What breaks is named: memory, without which nothing runs; a batch that had to grow; and of the step's time what is lost, the worst
first. Three things lose it (`Losses`): bytes on the wires, a pipeline rank with more to do than the others, and the pipeline's bubble.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from dsv3_mini.config import ModelConfig
from dsv3_mini.parallel.dry_run.roofline import Estimate, Machine, step_wires
from dsv3_mini.parallel.dry_run.step import DryRun, Job, dry_run
from dsv3_mini.parallel.dry_run.sweep import REPORT_BATCH, fits, least_state, near_batch
from dsv3_mini.parallel.plan import ParallelPlan

SIZES = tuple(2**power for power in range(3, 15))
WORTH_NAMING = 0.15  # of the step's time
INSTANT = 1e30  # bytes a second


@dataclass(frozen=True)
class Losses:
    """Shares of a time. `wires`: how much shorter the step were if bytes took no time. Of the pipeline's time without them:
    `uneven`, what ranks wait because rank `slowest` has more to do; and `bubble`, what they would wait even if all had as much.
    """

    wires: float
    uneven: float
    bubble: float
    slowest: int

    @classmethod
    def of(cls, estimate: Estimate) -> Losses:
        free = replace(estimate, machine=replace(estimate.machine, nvlink=INSTANT, ib=INSTANT))
        busy = [free.timeline.busy(rank) for rank in range(estimate.run.job.plan.pp)]
        span, most = free.timeline.span, max(busy)
        uneven = (most - sum(busy) / len(busy)) / span
        return cls(1 - free.seconds / estimate.seconds, uneven, 1 - most / span, busy.index(most))


@dataclass(frozen=True)
class ScalingRow:
    """A size: the layout, bytes of the fullest GPU and on the wires in a step, and the estimate. None where nothing was measured.

    `wires`, `uneven` and `bubble` are the step's `Losses`.
    """

    gpus: int
    pp: int
    ep: int
    batch: int
    microbatches: int
    peak: float
    inside: float | None
    network: float | None
    seconds: float | None
    mfu: float | None
    wires: float | None
    uneven: float | None
    bubble: float | None
    limit: str

    @property
    def measured(self) -> bool:
        return self.seconds is not None


def scaling_table(
    cfg: ModelConfig, machine: Machine, sizes: tuple[int, ...] = SIZES, *, schedule: str = "DualPipeV", precision: str = "fp8",
    micro_batch: int = 1, length: int = 4096,
) -> list[ScalingRow]:  # fmt: skip
    """A row for each size. Where state alone is more than a GPU has, that is the row: no step is measured."""
    return [scaling_row(cfg, machine, gpus, schedule, precision, micro_batch, length) for gpus in sizes]


def scaling_row(
    cfg: ModelConfig, machine: Machine, gpus: int, schedule: str = "DualPipeV", precision: str = "fp8", micro_batch: int = 1,
    length: int = 4096,
) -> ScalingRow:  # fmt: skip
    plan = shape(cfg, gpus, machine.node)
    batch = near_batch(plan, micro_batch)
    least = least_state(cfg, plan)
    if least > machine.memory - machine.reserve:
        limit = f"memory: weights, gradients and moments alone take {least / 1e9:,.0f} GB"
        parts = batch // (plan.data * micro_batch)
        return ScalingRow(gpus, plan.pp, plan.ep, batch, parts, least, *[None] * 7, limit)
    job = Job(cfg, plan, schedule, precision, batch, micro_batch, length)
    return row_of(dry_run(job), machine)


def row_of(run: DryRun, machine: Machine) -> ScalingRow:
    """The row of a dry run."""
    job, plan, full = run.job, run.job.plan, run.fullest
    estimate = Estimate(run, machine, fused=True)
    losses = Losses.of(estimate)
    wires = step_wires(run, full.rank, machine.node).values()
    return ScalingRow(
        plan.processes, plan.pp, plan.ep, job.batch, job.microbatches, full.peak, sum(w.inside for w in wires),
        sum(w.network for w in wires), estimate.seconds, estimate.mfu, losses.wires, losses.uneven, losses.bubble,
        limit_of(run, machine, losses),
    )  # fmt: skip


def shape(cfg: ModelConfig, gpus: int, node: int) -> ParallelPlan:
    """The report's shape on so many GPUs: as deep as it is or as there are nodes, experts as wide as it is or as a stage."""
    pp = max(1, min(16, gpus // node))
    while pp > cfg.num_hidden_layers // 2 and pp > 1:  # two stages on a rank, a layer or more in each
        pp //= 2
    data = gpus // pp
    ep = min(64, data, cfg.n_routed_experts)
    return ParallelPlan(pp=pp, dp_shard=data, ep=ep, ep_nodes=max(1, ep // node), zero=1, recompute=True)


def limit_of(run: DryRun, machine: Machine, losses: Losses) -> str:
    """What holds this size back, in words: all that does; "nothing" where nothing does."""
    named = []
    if not fits(run, machine):
        full = run.fullest
        kinds = {"state takes": sum(full.state.values()), "activations take": sum(full.activations.values())}
        largest = max(kinds, key=kinds.__getitem__)
        named.append(f"memory: {largest} {kinds[largest] / 1e9:,.0f} GB")
    if run.job.batch > 2 * REPORT_BATCH:
        named.append(f"batch: {run.job.batch / REPORT_BATCH:.1f} times the report's, to fill the pipeline")
    lost = {
        f"traffic: {losses.wires:.0%}": losses.wires,
        f"balance: {losses.uneven:.0%} is waiting for rank {losses.slowest}": losses.uneven,
        f"bubble: {losses.bubble:.0%}": losses.bubble,
    }
    named += [words for words in sorted(lost, key=lost.__getitem__, reverse=True) if lost[words] > WORTH_NAMING]
    return "; ".join(named) or "nothing"
