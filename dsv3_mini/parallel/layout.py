"""Where each weight of a model lies on a mesh: what this process holds of it, who holds the same, how it is put together.

A layout does not depend on how training shares the work: optimizer state lies as its weight does, and a weight that is put
together is the same under every plan, which is what lets a checkpoint of one plan be read under another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from dsv3_mini.config import ModelConfig
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.model.experts import GroupedExperts
from dsv3_mini.parallel.mesh import Mesh


@dataclass(frozen=True)
class Layout:
    """One weight: its shape when whole, and how the dimensions of `mesh` cut it."""

    shape: torch.Size
    mesh: DeviceMesh
    placements: tuple[Placement, ...]

    @property
    def copies(self) -> int:
        """How many processes hold the same piece."""
        sizes = zip(self.mesh.shape, self.placements, strict=True)
        return math.prod(size for size, placement in sizes if placement.is_replicate())

    def own(self, whole: Tensor) -> Tensor:
        """This process's piece of a whole weight."""
        sizes, starts = compute_local_shape_and_global_offset(self.shape, self.mesh, self.placements)
        return whole[tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))]

    def spread(self, own: Tensor) -> DTensor:
        """The whole weight as a distributed tensor, of which `own` is this process's piece."""
        stride = torch.empty(self.shape, device="meta").stride()
        return DTensor.from_local(own, self.mesh, self.placements, run_check=False, shape=self.shape, stride=stride)

    def whole(self, own: Tensor) -> Tensor:
        """The whole weight in every process; all that share it call this together."""
        return self.spread(own).full_tensor()


def layouts(cfg: ModelConfig, mesh: Mesh) -> dict[str, Layout]:
    """The layout of every weight, by the name that it has in the model."""
    with torch.device("meta"):
        model = DeepSeekV3(cfg)
    experts = {f"{name}." for name, module in model.named_modules() if isinstance(module, GroupedExperts)}
    dense_mesh = mesh.dense["dp_replicate", "dp_shard"]
    expert_mesh = mesh.experts["expert_replicate", "ep_node", "ep_place", "expert_shard"]
    found = {}
    for name, weight in model.named_parameters():
        if name.rpartition(".")[0] + "." in experts:
            cut = Shard(expert_dimension(len(weight), mesh))
            found[name] = Layout(weight.shape, expert_mesh, (Replicate(), Shard(0), Shard(0), cut))
        else:
            found[name] = Layout(weight.shape, dense_mesh, (Replicate(), Shard(0)))
    return found


def expert_dimension(experts: int, mesh: Mesh) -> int:
    """Along what `expert_shard` cuts an ep member's experts: by expert where that comes out even, else through each."""
    return 0 if experts // mesh.plan.ep % mesh.plan.expert_shard == 0 else 1
