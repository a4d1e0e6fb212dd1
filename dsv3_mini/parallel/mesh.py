"""The processes of a plan, as two meshes over the same processes: one that dense weights follow, and one for the experts.

Processes are numbered stage by stage, and in a stage copy by copy. Those of an ep group are neighbours, and so are those of one
of its nodes: where a node's processes are numbered in a row, as torchrun does, what is called inside a node lies inside one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dsv3_mini.config import ModelConfig
from dsv3_mini.errors import ConfigError
from dsv3_mini.parallel.dispatch import dispatch
from dsv3_mini.parallel.expert_parallel import Stretch
from dsv3_mini.parallel.plan import ParallelPlan


@dataclass(frozen=True)
class Mesh:
    """dense: (pp, dp_replicate, dp_shard). experts: (pp, expert_replicate, ep_node, ep_place, expert_shard)."""

    plan: ParallelPlan
    dense: DeviceMesh
    experts: DeviceMesh
    data: dist.ProcessGroup  # all processes of this stage

    @classmethod
    def join(cls, plan: ParallelPlan, cfg: ModelConfig, device: str = "cpu") -> Mesh:
        """The meshes, once the processes have met (`init_process_group`); all of them call this together.

        Raises:
            ConfigError: the plan does not fit the model or the number of processes, has tp, or a dispatch that cannot run here.
        """
        plan.check(cfg, dist.get_world_size())
        dispatch(plan.dispatch)
        if plan.tp > 1:
            raise ConfigError(f"tp = {plan.tp} is for inference: train with pp, dp_replicate, dp_shard and ep")
        shape = (plan.pp, plan.dp_replicate, plan.dp_shard)
        dense = init_device_mesh(device, shape, mesh_dim_names=("pp", "dp_replicate", "dp_shard"))
        places = plan.ep // plan.ep_nodes
        ranks = torch.arange(plan.processes)
        ranks = ranks.view(plan.pp, plan.expert_replicate, plan.expert_shard, plan.ep_nodes, places)
        # A weight is cut along a mesh's dimensions from left to right: first among the ep group, then among expert_shard.
        names = ("pp", "expert_replicate", "ep_node", "ep_place", "expert_shard")
        experts = DeviceMesh(device, ranks.permute(0, 1, 3, 4, 2), mesh_dim_names=names)
        data = dense["dp_replicate", "dp_shard"]._flatten("data").get_group()
        return cls(plan, dense, experts, data)

    def way(self, experts: int) -> tuple[Stretch, ...]:
        """How this process's tokens reach each of a layer's `experts`. All processes call this together."""
        nodes, inside = self.experts.get_group("ep_node"), self.experts.get_group("ep_place")
        return dispatch(self.plan.dispatch).way(experts, nodes, inside, self._ep_group)

    def _ep_group(self) -> dist.ProcessGroup:
        return self.experts["ep_node", "ep_place"]._flatten("ep").get_group()
