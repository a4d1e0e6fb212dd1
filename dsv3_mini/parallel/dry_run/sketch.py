"""A layout by arithmetic alone: what a GPU holds, sends and computes, in formulas that fit on the back of an envelope.

    state         6 bytes of every parameter that lies on the GPU (BF16 weight, FP32 gradient), and 8 of those in its share of
                  the optimizer (FP32 master, two BF16 moments): `least_state`
    activations   what a micro-batch leaves behind in the whole model, and half a rank's share more: under DualPipeV a rank has
                  2 pp + 1 chunks of 1 / (2 pp) of the layers in flight, however deep the pipeline
    wires         a micro-batch's vectors to their experts and back, forward and backward
    arithmetic    the ledger's FLOPs at the machine's rates
    fill          micro-batches that each pipeline gets, and the 2 pp that it needs

What a micro-batch leaves behind, and what the running pass needs, are measured once by a dry run (`Kept`). The dry run follows
every stage, and is right where this is only near: a sketch takes all ranks to be alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dsv3_mini.config import ModelConfig
from dsv3_mini.errors import ConfigError
from dsv3_mini.ledger import flops_per_token
from dsv3_mini.model.router import Router
from dsv3_mini.parallel.dry_run.exchanges import Wires
from dsv3_mini.parallel.dry_run.paper import even_choice
from dsv3_mini.parallel.dry_run.roofline import Machine
from dsv3_mini.parallel.dry_run.step import DryRun
from dsv3_mini.parallel.dry_run.sweep import least_state
from dsv3_mini.parallel.plan import ParallelPlan

PASSES = 4  # a vector's ways: to its experts and home, forward and backward


@dataclass(frozen=True)
class Kept:
    """Bytes of a micro-batch of one sequence: `activations` between its passes over all layers, `passing` besides while one runs."""

    activations: float
    passing: float

    @classmethod
    def of(cls, run: DryRun) -> Kept:
        """From the fullest rank. Of its 2 pp + 1 chunks two are in the passes that run, and counted with them."""
        full, pp = run.fullest, run.job.plan.pp
        if pp == 1:
            whole = sum(sum(stage.kept.values()) for stage in run.stages.values())
            return cls(whole, full.passing - whole)
        whole = sum(full.activations.values()) * 2 * pp / (2 * pp - 1)
        return cls(whole, full.passing - whole / pp)


@dataclass(frozen=True)
class Sketch:
    """`state`, `activations`, `passing` in bytes; `wires` in bytes and `arithmetic` in seconds of a micro-batch on a rank."""

    plan: ParallelPlan
    machine: Machine
    state: int
    activations: float
    passing: float
    wires: Wires
    arithmetic: float
    microbatches: float

    @property
    def peak(self) -> float:
        return self.state + self.activations + self.passing

    @property
    def room(self) -> float:
        """Bytes to spare; below 0 it does not fit."""
        return self.machine.memory - self.machine.reserve - self.peak

    @property
    def travel(self) -> float:
        """Seconds that a micro-batch's vectors are on the wires, of which the slower one counts."""
        return self.machine.sending(self.wires)

    @property
    def needed(self) -> int:
        """Micro-batches that fill the pipeline."""
        return 2 * self.plan.pp if self.plan.pp > 1 else 1


def lay_out(cfg: ModelConfig, gpus: int, pp: int, ep: int, node: int = 8) -> ParallelPlan:
    """The plan of so many GPUs, in the report's manner: ZeRO-1, recomputation, two stages on a rank.

    Raises:
        ConfigError: there is no such layout; the line names the rule.
    """
    if gpus % pp:
        raise ConfigError(f"pp = {pp} must divide the {gpus:,} GPUs")
    if pp > 1 and 2 * pp > cfg.num_hidden_layers:
        raise ConfigError(
            f"pp = {pp}: two stages on a rank make {2 * pp}, and there are {cfg.num_hidden_layers} layers"
        )
    if gpus // pp < ep:
        raise ConfigError(f"ep = {ep}: a pipeline rank has only {gpus // pp:,} GPUs to share its experts")
    plan = ParallelPlan(pp=pp, dp_shard=gpus // pp, ep=ep, ep_nodes=max(1, ep // node), zero=1, recompute=True)
    plan.check(cfg, gpus)
    return plan


def sketch(
    cfg: ModelConfig,
    plan: ParallelPlan,
    kept: Kept,
    machine: Machine | None = None,
    batch: int = 15360,
    length: int = 4096,
) -> Sketch:
    """A step of `batch` sequences, in micro-batches of one."""
    machine = machine or Machine()
    flops = flops_per_token(cfg, length)
    seconds = length * (flops.train_linear / machine.fp8 + flops.train_attention / machine.bf16) / plan.pp
    layers = (cfg.num_hidden_layers - cfg.first_k_dense_replace + cfg.num_nextn_predict_layers) / plan.pp
    nodes, gpus = reached(cfg, plan.ep, machine.node)
    row = PASSES * layers * length * 2 * cfg.hidden_size  # BF16
    near = min(machine.node, plan.ep)
    wires = Wires(row * gpus * (1 - 1 / near), row * nodes * (1 - 1 / plan.ep_nodes))
    chunks = 1 + 1 / (2 * plan.pp) if plan.pp > 1 else 1
    return Sketch(
        plan,
        machine,
        least_state(cfg, plan),
        kept.activations * chunks,
        kept.passing,
        wires,
        seconds,
        batch / plan.data,
    )


def reached(cfg: ModelConfig, ep: int, node: int = 8, tokens: int = 1024) -> tuple[float, float]:
    """How many nodes and how many GPUs hold a token's experts, in the mean over tokens with even choices."""
    with torch.device("meta"):
        router = Router(cfg, cfg.first_k_dense_replace)
    gpu = even_choice(router, tokens, cfg.n_routed_experts) // (cfg.n_routed_experts // ep)
    return tuple(sum(len(set(row)) for row in places.tolist()) / tokens for places in (gpu // node, gpu))  # type: ignore[return-value]
