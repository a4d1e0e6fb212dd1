"""The search for a layout: every plan of so many GPUs that the rules allow, measured on paper and listed by its time.

What is tried: pipeline ranks and expert-parallel ranks in powers of two, with ZeRO-1, norms and up-projections made again. Of these
the plans that cannot fit are left out before they are measured: weights, gradients and moments alone, by arithmetic, fill a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dsv3_mini.config import ModelConfig
from dsv3_mini.errors import ConfigError
from dsv3_mini.ledger import count_parameters
from dsv3_mini.parallel.dry_run.roofline import Estimate, Machine
from dsv3_mini.parallel.dry_run.step import DryRun, Job, dry_run
from dsv3_mini.parallel.plan import ParallelPlan
from dsv3_mini.parallel.schedule_ir import ScheduleError

REPORT_BATCH = 15360


@dataclass(frozen=True)
class Candidate:
    """A layout; its dry run, or why there is none."""

    plan: ParallelPlan
    run: DryRun | None
    estimate: Estimate | None
    refused: str = ""

    def to_dict(self) -> dict[str, Any]:
        plan = {"pp": self.plan.pp, "dp_shard": self.plan.dp_shard, "ep": self.plan.ep, "ep_nodes": self.plan.ep_nodes}
        if self.run is None or self.estimate is None:
            return {**plan, "refused": self.refused}
        return {
            **plan, "peak_bytes": self.run.fullest.peak, "fits": fits(self.run, self.estimate.machine),
            "seconds": self.estimate.seconds, "hours_per_trillion": self.estimate.hours_per_trillion, "mfu": self.estimate.mfu, "bubble": self.estimate.bubble,
        }  # fmt: skip


def sweep(
    cfg: ModelConfig, gpus: int, machine: Machine, *, batch: int | None = None, schedule: str, precision: str,
    micro_batch: int, length: int, most: int = 12,
) -> list[Candidate]:  # fmt: skip
    """Candidates: those that fit first, the fastest first among them; then the others; then the refused.

    Args:
        batch: sequences in a step; None: near the report's. most: plans to measure, those nearest to the report's shape first.
    """
    measured, refused = [], []
    for plan in plans(cfg, gpus, machine.node):
        try:
            job = Job(cfg, plan, schedule, precision, batch or near_batch(plan, micro_batch), micro_batch, length)
            job.order  # noqa: B018 (a schedule that cannot be made says so here)
        except (ConfigError, ScheduleError) as error:
            refused.append(Candidate(plan, None, None, str(error)))
            continue
        least = least_state(cfg, plan)
        if least > machine.memory - machine.reserve:
            why = f"weights, gradients and moments alone take {least / 1e9:,.0f} GB"
            refused.append(Candidate(plan, None, None, why))
        elif len(measured) >= most:
            refused.append(Candidate(plan, None, None, f"not measured: {most} plans were"))
        else:
            run = dry_run(job)
            measured.append(Candidate(plan, run, Estimate(run, machine, fused=True)))
    measured.sort(key=lambda c: (not fits(c.run, machine), c.estimate.seconds / c.run.job.tokens))
    return measured + refused


def plans(cfg: ModelConfig, gpus: int, node: int) -> list[ParallelPlan]:
    """All that are tried, the deepest pipelines first. An expert-parallel group lies on whole nodes, or inside one."""
    found = []
    for pp in _powers(cfg.num_hidden_layers):
        data = gpus // pp
        if gpus % pp:
            continue
        for ep in _powers(min(data, cfg.n_routed_experts)):
            nodes = max(1, ep // node)
            try:
                plan = ParallelPlan(pp=pp, dp_shard=data, ep=ep, ep_nodes=nodes, zero=1, recompute=True)
                plan.check(cfg, gpus)
            except ConfigError:
                continue
            found.append(plan)
    return sorted(found, key=lambda plan: (abs(plan.pp - 16), abs(plan.ep - 64)))


def least_state(cfg: ModelConfig, plan: ParallelPlan) -> int:
    """Bytes of state that an average GPU cannot do without under ZeRO-1: BF16 weights and FP32 gradients of its stage and its
    experts, FP32 masters and BF16 moments of its pieces."""
    counted = count_parameters(cfg)
    sparse = counted.moe_layers + counted.mtp_modules
    experts = sparse * sum(t.total for t in counted.moe_layer.tensors if t.name.startswith("routed "))
    others = counted.live_trainable - experts
    held = (others + experts // plan.ep) // plan.pp
    return 6 * held + 8 * counted.live_trainable // (plan.pp * plan.dp_shard)


def near_batch(plan: ParallelPlan, micro_batch: int, batch: int = REPORT_BATCH) -> int:
    """The batch nearest to the report's that the plan's ranks can share evenly, with micro-batches enough to fill the pipeline."""
    share = plan.data * micro_batch
    parts = max(2 * plan.pp, round(batch / share), 1)
    return share * (parts + parts % 2)


def fits(run: DryRun, machine: Machine) -> bool:
    return run.fullest.peak + machine.reserve <= machine.memory


def _powers(most: int) -> list[int]:
    return [2**power for power in range(most.bit_length()) if 2**power <= most]
