"""Team: the processes of a plan, in the trainer's eyes. The trainer's step is the same page for one process and for many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from dsv3_mini.config import ModelConfig
from dsv3_mini.errors import ConfigError
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.parallel.checkpoint import Scribe, load_pieces, save_pieces
from dsv3_mini.parallel.expert_parallel import spread_experts
from dsv3_mini.parallel.layout import Layout, layouts
from dsv3_mini.parallel.mesh import Mesh
from dsv3_mini.parallel.plan import ParallelPlan
from dsv3_mini.parallel.recompute import recompute
from dsv3_mini.parallel.sharding import before_micro_batch, gather_once, shard
from dsv3_mini.train.checkpoint import Checkpoint
from dsv3_mini.train.optimizer import MasterAdamW
from dsv3_mini.train.replicas import Replicas


@dataclass(frozen=True, kw_only=True)
class Team(Replicas):
    """Processes that share the weights, the experts and each batch as a plan says. Make one with `Team.join`."""

    mesh: Mesh
    layouts: Mapping[str, Layout]
    scribe: Scribe = field(default_factory=Scribe)

    @classmethod
    def join(cls, plan: ParallelPlan, cfg: ModelConfig, device: str = "cpu") -> Team:
        """This process's place in a plan without pipeline stages; `pipeline_team.join` takes any plan.

        Once the processes have met, all of them call this together.

        Raises:
            ConfigError: the plan does not fit the model or the number of processes, or has pipeline stages or tp.
        """
        if plan.pp > 1:
            raise ConfigError(f"pp = {plan.pp} has stages: join as a PipelineTeam")
        mesh = Mesh.join(plan, cfg, device)
        return cls(rank=dist.get_rank(), count=plan.data, mesh=mesh, layouts=layouts(cfg, mesh))

    # ---- a step ----------------------------------------------------------------------------------------------------

    def divide(
        self, model: DeepSeekV3, dtype: torch.dtype, micro_batch: int = 1
    ) -> tuple[DeepSeekV3, dict[str, Tensor]]:
        plan = self.mesh.plan
        if plan.recompute:
            recompute(model)
        if plan.ep > 1:
            spread_experts(model, self.mesh.way(model.cfg.n_routed_experts))
        if plan.dp_shard == 1:
            return super().divide(model, dtype, micro_batch)
        shard(model, self.mesh, dtype)
        gather_once(model)
        return model, {}  # its weights are FP32, whatever it computes in

    def own_parts(self, rows: Shaped[Tensor, "b s"], micro_batch: int) -> Sequence[Shaped[Tensor, "part s"]]:
        """As many parts in every process, as each of them is an exchange that all take part in.

        Where a batch does not come out even some parts are a row shorter. Where that would leave a process without a row for
        its last part (micro-batches of one row, or nearly), all have one part less and some a row more.
        """
        fewest, most = len(rows) // self.count, -(-len(rows) // self.count)
        parts = min(fewest, -(-most // micro_batch))
        return self.own_rows(rows).tensor_split(parts)

    def before_micro_batch(self, model: DeepSeekV3, last: bool) -> None:
        if self.mesh.plan.dp_shard > 1:
            before_micro_batch(model, self.mesh.plan.zero, last)

    def sum_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        if self.mesh.plan.dp_shard > 1:
            return  # FSDP did, in backward
        # An expert has seen the tokens of its whole ep group: what is missing are those of the other groups.
        experts = [g for name, g in gradients.items() if self._cut(name)]
        others = [g for name, g in gradients.items() if not self._cut(name)]
        self.add_up(others, self.mesh.data)
        if experts and self.mesh.plan.expert_replicate > 1:
            self.add_up(experts, self.mesh.experts.get_group("expert_replicate"))

    def clip_gradients(self, optimizer: MasterAdamW, clip_norm: float) -> Float[Tensor, ""]:
        """As one process does. Each adds up the squares of what it holds, and what several hold counts once."""
        optimizer.collect_gradients()
        masters = optimizer.masters.items()
        shares = [m.grad.square().sum() / self.layouts[n].copies for n, m in masters if m.grad is not None]
        squares = torch.stack(shares).sum()
        dist.all_reduce(squares)
        norm = squares.sqrt()
        if clip_norm < norm < torch.inf:
            nn.utils.clip_grads_with_norm_([master for _, master in masters], clip_norm, norm)
        return norm

    # ---- putting together and taking apart -------------------------------------------------------------------------

    def whole(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        put_together = {name: self.layouts[name].together(piece, self.mesh.data) for name, piece in own.items()}
        return {name: tensor for name, tensor in put_together.items() if tensor is not None}

    def save(self, run: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        copies = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
        self.scribe.start(lambda group: save_pieces(run, step, copies, state, self.layouts, group))

    def settle(self) -> None:
        self.scribe.wait()

    def load(self, folder: Path) -> Checkpoint:
        return load_pieces(folder, self.layouts)

    def _cut(self, name: str) -> bool:
        return self.layouts[name].copies < self.mesh.plan.data
