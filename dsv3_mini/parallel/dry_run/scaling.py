"""Scaling on paper: one model on 8 to 16,384 GPUs, each time in the best of a few layouts, and what breaks where.

For each size the layouts are the report's shape as far as the GPUs go: 16 pipeline ranks or as many as there are nodes, experts
over 64 ranks or a stage's. The batch stays the report's, until a data rank would have less than two micro-batches for each stage:
from there on it has to grow, which is where scaling ends, since a larger batch learns less from each token.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsv3_mini.config import ModelConfig
from dsv3_mini.parallel.dry_run.roofline import Estimate, Machine, step_wires
from dsv3_mini.parallel.dry_run.step import Job, dry_run
from dsv3_mini.parallel.dry_run.sweep import REPORT_BATCH, fits, least_state, near_batch
from dsv3_mini.parallel.plan import ParallelPlan

SIZES = tuple(2**power for power in range(3, 15))


@dataclass(frozen=True)
class ScalingRow:
    """A size: the layout, bytes of the fullest GPU and on the wires in a step, and the estimate. None where nothing was measured."""

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
    rows = []
    for gpus in sizes:
        plan = shape(cfg, gpus, machine.node)
        batch = near_batch(plan, micro_batch)
        least = least_state(cfg, plan)
        if least > machine.memory - machine.reserve:
            limit = "memory: weights, gradients and moments alone"
            rows.append(ScalingRow(gpus, plan.pp, plan.ep, batch, batch // plan.data, least, *[None] * 5, limit))
            continue
        job = Job(cfg, plan, schedule, precision, batch, micro_batch, length)
        run = dry_run(job)
        estimate = Estimate(run, machine, fused=True)
        rank = run.fullest.rank
        wires = step_wires(run, rank, machine.node)
        inside, network = (sum(getattr(w, name) for w in wires.values()) for name in ("inside", "network"))
        rows.append(
            ScalingRow(
                gpus,
                plan.pp,
                plan.ep,
                batch,
                job.microbatches,
                run.fullest.peak,
                inside,
                network,
                estimate.seconds,
                estimate.mfu,
                estimate.bubble,
                limit_of(estimate),
            )  # fmt: skip
        )
    return rows


def shape(cfg: ModelConfig, gpus: int, node: int) -> ParallelPlan:
    """The report's shape on so many GPUs: as deep as it is or as there are nodes, experts as wide as it is or as a stage."""
    pp = max(1, min(16, gpus // node))
    while pp > cfg.num_hidden_layers // 2 and pp > 1:  # two stages on a rank, a layer or more in each
        pp //= 2
    data = gpus // pp
    ep = min(64, data, cfg.n_routed_experts)
    return ParallelPlan(pp=pp, dp_shard=data, ep=ep, ep_nodes=max(1, ep // node), zero=1, recompute=True)


def limit_of(estimate: Estimate) -> str:
    """What holds this size back, in words."""
    run, machine = estimate.run, estimate.machine
    if not fits(run, machine):
        rank = run.fullest
        largest = max(
            ("state", sum(rank.state.values())), ("activations", sum(rank.activations.values())), key=lambda x: x[1]
        )
        return f"memory: {largest[0]} take {largest[1] / 1e9:.0f} GB"
    if run.job.batch > 2 * REPORT_BATCH:
        return f"batch: {run.job.batch / REPORT_BATCH:.0f} times the report's, to fill the pipeline"
    if estimate.bubble > 0.25:
        return f"pipeline: {estimate.bubble:.0%} of the time is bubble"
    return "none"
