"""Where each weight of a model lies on a mesh: what this process holds of it, who holds the same, how it is put together.

A layout does not depend on how training shares the work: optimizer state lies as its weight does, and a weight that is put
together is the same under every plan, which is what lets a checkpoint of one plan be read under another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from dsv3_mini.config import ModelConfig
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.model.experts import GroupedExperts
from dsv3_mini.parallel.mesh import Mesh


@dataclass(frozen=True)
class Layout:
    """One weight: its shape when whole, and how the dimensions of `mesh` cut it.

    Only places on the mesh are asked for, so that it is the CPU's whatever trains: what is saved and loaded lies there.
    """

    shape: torch.Size
    mesh: DeviceMesh
    placements: tuple[Placement, ...]

    @property
    def copies(self) -> int:
        """How many processes hold the same piece."""
        sizes = zip(self.mesh.shape, self.placements, strict=True)
        return math.prod(size for size, placement in sizes if placement.is_replicate())

    def piece(self, rank: int) -> tuple[slice, ...]:
        """What a process holds, along each dimension. Cut as torch.chunk cuts: where it is uneven the last get less."""
        place = (self.mesh.mesh == rank).nonzero()[0].tolist()
        starts, sizes = [0] * len(self.shape), list(self.shape)
        for coordinate, parts, placement in zip(place, self.mesh.shape, self.placements, strict=True):
            if isinstance(placement, Shard):
                size = sizes[placement.dim]
                step = -(-size // parts)
                skipped = min(coordinate * step, size)
                starts[placement.dim] += skipped
                sizes[placement.dim] = min(step, size - skipped)
        return tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))

    @property
    def own_shape(self) -> torch.Size:
        """Of this process's piece."""
        return torch.Size(s.stop - s.start for s in self.piece(dist.get_rank()))

    def spread(self, own: Tensor) -> DTensor:
        """The whole weight as a distributed tensor, of which `own` is this process's piece."""
        stride = torch.empty(self.shape, device="meta").stride()
        return DTensor.from_local(own, self.mesh, self.placements, run_check=False, shape=self.shape, stride=stride)

    def together(self, own: Tensor, group: dist.ProcessGroup) -> Tensor | None:
        """The whole weight in the group's first process, None in the others; all of the group call this together.

        DTensor's own `full_tensor` gathers to all, and on a mesh whose processes are not in the order of their ranks, as the
        experts' is, one that was told of a flattened dimension puts pieces in the wrong order.
        """
        if own.shape == self.shape:
            return own
        ranks = dist.get_process_group_ranks(group)
        pieces = {rank: self.piece(rank) for rank in ranks}
        shapes = {rank: [s.stop - s.start for s in piece] for rank, piece in pieces.items()}
        message = own.new_zeros(max(map(math.prod, shapes.values())))
        message[: own.numel()] = own.flatten()
        first = dist.get_rank() == ranks[0]
        arrived = [torch.empty_like(message) for _ in ranks] if first else None
        dist.gather(message, arrived, ranks[0], group)
        if arrived is None:
            return None
        whole = own.new_empty(self.shape)
        for rank, flat in zip(ranks, arrived, strict=True):
            whole[pieces[rank]] = flat[: math.prod(shapes[rank])].view(shapes[rank])
        return whole


def layouts(cfg: ModelConfig, mesh: Mesh) -> dict[str, Layout]:
    """The layout of every weight, by the name that it has in the model."""
    with torch.device("meta"):
        model = DeepSeekV3(cfg)
    experts = {f"{name}." for name, module in model.named_modules() if isinstance(module, GroupedExperts)}
    dense_mesh = on_cpu(mesh.dense["dp_replicate", "dp_shard"])
    expert_mesh = on_cpu(mesh.experts["expert_replicate", "ep_node", "ep_place", "expert_shard"])
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


def on_cpu(mesh: DeviceMesh) -> DeviceMesh:
    """The same places, without process groups."""
    return DeviceMesh("cpu", mesh.mesh, mesh_dim_names=mesh.mesh_dim_names, _init_backend=False)
