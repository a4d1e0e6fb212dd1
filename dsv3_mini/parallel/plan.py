"""ParallelPlan: how a model and its batches are laid out on many processes, in a few numbers that must fit together.

    pp             pipeline stages, each a part of the layers
    dp_replicate   copies of all weights, each with its share of the batch: only gradients travel
    dp_shard       processes that share one copy, each with its share of the batch and of the state (`zero` says of what)
    ep             of the data processes, how many share the experts of a layer among them
    tp             processes that share a matrix; in inference only (report section 3.4)

    processes = pp x dp_replicate x dp_shard (x tp)

`schedule` is the order in which a pipeline's processes go through their micro-batches, one of torch's (torch_schedules.py).
Micro-batches have the recipe's `micro_batch` rows, or fewer where the schedule needs more micro-batches than that makes.

Expert parallelism adds no processes: a process has its own batch *and* its own experts. So the weights of a stage lie in two
ways over the same data processes. All but the experts follow (dp_replicate, dp_shard). The experts follow

    (expert_replicate, expert_shard, ep)        with the same product,

and `expert_shard` of them share, as dp_shard does, what each member of an ep group holds.

What the members of dp_shard share (ZeRO stages; here forms of FSDP2):

    zero 1   optimizer state: weights are gathered once a step, gradients summed once a step
    zero 2   and gradients: summed, and cut, with each micro-batch
    zero 3   and weights: gathered for each layer, forward and backward, and given up behind it

With pp it is zero 1, the report's: torch keeps a stage's weights and sums of gradients for all its micro-batches.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from dsv3_mini.config import ModelConfig
from dsv3_mini.errors import ConfigError
from dsv3_mini.parallel.torch_schedules import SPLIT, TORCH_SCHEDULES, stages_each

DISPATCH_NAMES = ("plain", "fp8", "deep_ep")


@dataclass(frozen=True)
class ParallelPlan:
    """The layout. Alone by default.

    `ep_nodes` is how many nodes an ep group spans: above 1, a token goes once to each node and is handed on there.
    `dispatch`: how tokens travel to their experts, one of DISPATCH_NAMES (`parallel/dispatch.py` tells of each).
    `recompute`: norms and up-projections are made again in backward, not kept.

    Raises:
        ConfigError: the numbers do not fit together; the message names the field, its value and the rule.
    """

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    ep: int = 1
    ep_nodes: int = 1
    tp: int = 1
    zero: int = 3
    dispatch: str = "plain"
    recompute: bool = False
    schedule: str = "1F1B"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "recompute":
                if not isinstance(value, bool):
                    raise ConfigError(f"recompute = {value!r} must be true or false")
            elif field.name == "schedule":
                if value not in TORCH_SCHEDULES:
                    raise ConfigError(f"schedule = {value!r} must be one of torch's: {', '.join(TORCH_SCHEDULES)}")
            elif field.name == "dispatch":
                if value not in DISPATCH_NAMES:
                    raise ConfigError(f"dispatch = {value!r} must be one of {', '.join(DISPATCH_NAMES)}")
            elif not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{field.name} = {value!r} must be a whole number of at least 1")
        _require(self.zero <= 3, "zero", self.zero, "must be 1, 2 or 3")
        _require(self.ep % self.ep_nodes == 0, "ep_nodes", self.ep_nodes,
                 f"must divide ep ({self.ep}): each node holds as many of its processes")  # fmt: skip
        if self.dp_shard > 1:
            _require(self.dp_shard % self.ep == 0, "ep", self.ep,
                     f"must divide dp_shard ({self.dp_shard}): an ep group lies within one copy of the weights")  # fmt: skip
        else:
            _require(self.dp_replicate % self.ep == 0, "ep", self.ep,
                     f"must divide dp_replicate ({self.dp_replicate}): experts are shared by processes with batches of their own")  # fmt: skip
        _require(self.tp == 1 or self.pp == 1, "tp", self.tp, f"cannot go with pp = {self.pp}: tp is for inference")
        _require(self.pp > 1 or self.schedule == "1F1B", "schedule", repr(self.schedule),
                 "is an order of pipeline stages, and pp = 1 has but one: give a pp above 1, or leave schedule out")  # fmt: skip

    @classmethod
    def preset(cls, name: str) -> ParallelPlan:
        """A named layout. `report`: 2,048 GPUs, 16 stages, experts over 64 GPUs of 8 nodes, ZeRO-1, no tp (section 3.2)."""
        if name not in PRESETS:
            raise ConfigError(f"layout {name!r} is not known: choose one of {', '.join(PRESETS)}")
        return cls(**PRESETS[name])

    @property
    def data(self) -> int:
        """Processes of one stage that have batches of their own."""
        return self.dp_replicate * self.dp_shard

    @property
    def processes(self) -> int:
        return self.pp * self.data * self.tp

    @property
    def stages(self) -> int:
        return self.pp * stages_each(self.schedule)

    @property
    def expert_shard(self) -> int:
        return max(1, self.dp_shard // self.ep)

    @property
    def expert_replicate(self) -> int:
        return self.data // (self.ep * self.expert_shard)

    def check(self, cfg: ModelConfig, processes: int) -> None:
        """Raises ConfigError unless the plan lays out this model on exactly so many processes."""
        factors = " x ".join(f"{name} {getattr(self, name)}" for name in ("pp", "dp_replicate", "dp_shard", "tp"))
        if self.processes != processes:
            raise ConfigError(
                f"the plan is for {self.processes} processes ({factors}), but {processes} were started: "
                "start as many, or change one of its factors"
            )
        experts, held = cfg.n_routed_experts, cfg.n_routed_experts // self.ep
        _require(experts % self.ep == 0, "ep", self.ep,
                 f"must divide n_routed_experts ({experts}): each process holds as many")  # fmt: skip
        if held % self.expert_shard:
            for name in ("hidden_size", "moe_intermediate_size"):
                _require(getattr(cfg, name) % self.expert_shard == 0, "dp_shard", self.dp_shard,
                         f"leaves {self.expert_shard} processes to share {held} experts (dp_shard / ep): their number must "
                         f"divide the experts, or {name} ({getattr(cfg, name)})")  # fmt: skip
        each = stages_each(self.schedule)
        _require(self.stages <= cfg.num_hidden_layers, "pp", self.pp,
                 f"must be at most num_hidden_layers ({cfg.num_hidden_layers})"
                 f"{f' / {each}, as {self.schedule} has {each} stages a process' if each > 1 else ''}: "
                 "a stage holds a layer or more")  # fmt: skip
        heads = cfg.num_attention_heads
        _require(heads % self.tp == 0, "tp", self.tp,
                 f"must divide num_attention_heads ({heads}): heads are what is shared")  # fmt: skip
        if cfg.topk_group < cfg.n_group:
            _require(cfg.n_group % self.ep_nodes == 0, "ep_nodes", self.ep_nodes,
                     f"must divide n_group ({cfg.n_group}): routing is limited to groups, so that tokens travel to few nodes")  # fmt: skip

    def check_training(self) -> None:
        """Raises ConfigError where a pipeline of this plan could be laid out, but torch does not train it."""
        if self.pp > 1 and self.dp_shard > 1:
            _require(self.zero == 1, "zero", self.zero,
                     f"cannot go with pp = {self.pp}: a stage keeps its weights and sums of gradients for all its micro-batches, "
                     "give zero = 1")  # fmt: skip
        if self.recompute:
            _require(self.schedule not in SPLIT, "schedule", repr(self.schedule),
                     "cannot go with recompute: a backward in two parts would make everything again twice, leave one of them out")  # fmt: skip


PRESETS: dict[str, dict[str, Any]] = {
    "report": dict(pp=16, dp_shard=128, ep=64, ep_nodes=8, zero=1, recompute=True),
}


def _require(holds: bool, field: str, value: int | str, rule: str) -> None:
    if not holds:
        raise ConfigError(f"{field} = {value} {rule}")
