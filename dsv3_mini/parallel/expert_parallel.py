"""Expert parallelism: the experts of a layer lie on several processes, and tokens travel to them (report section 3.2.2).

A group of `ep` processes shares all experts of a layer: process r holds experts r e/ep to (r + 1) e/ep - 1. Each process
routes its own tokens, sends each of them with its choices and gates to the processes that hold its experts, and gets back
the weighed sum of what they made of it. What travels between is a `Hop`:

    one leg     to each *process* once, however many of its experts there were chosen
    two legs    to each *node* once over the slow network, to the process that has the sender's place there; from there
                over the fast wires inside to each process that holds an expert. On the way back results are added up where
                they meet, so that the network carries one row for each token and node

Which experts are reached is the same either way, and `parallel/traffic.py` counts what each leg carries. What the vectors
travel as is the hop's own affair: as they are (`hop.py`), or in FP8 (`fp8_hop.py`). A way may also be a single leg in other
hands (`deep_ep.py`). `parallel/dispatch.py` knows them by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dsv3_mini.errors import ConfigError
from dsv3_mini.fp8.experts import FP8GroupedExperts
from dsv3_mini.model.experts import Dispatched, GroupedExperts
from dsv3_mini.model.moe import MoE
from dsv3_mini.parallel.hop import Hop


class Trip(Protocol):
    """One exchange that has begun: there with `carry`, and home with `back`. A `Hop` is one."""

    def carry(
        self, x: Float[Tensor, "T d"], chosen: Int[Tensor, "T k"], gates: Float[Tensor, "T k"]
    ) -> tuple[Float[Tensor, "arrived d"], Int[Tensor, "arrived k"], Float[Tensor, "arrived k"]]: ...

    def back(self, results: Float[Tensor, "arrived d"]) -> Float[Tensor, "T d"]: ...


class Stretch(Protocol):
    """A part of the way to an expert, between the members of `group`, each of which has `block` experts in a row behind it."""

    @property
    def group(self) -> dist.ProcessGroup: ...

    @property
    def block(self) -> int: ...

    @property
    def first(self) -> int:
        """The first expert that it leads to."""
        ...

    def depart(self, chosen: Int[Tensor, "T k"]) -> Trip:
        """Begin an exchange for tokens with these choices; all members do it together."""
        ...


@dataclass(frozen=True)
class Leg:
    """A part of the way to an expert, between the members of `group`: expert i lies behind member i // block.

    `block` is how many experts in a row lie behind one member. Only experts from `first` on, one block for each member,
    are reached by this leg. `hop` is what its exchanges are.
    """

    group: dist.ProcessGroup
    block: int
    first: int = 0
    hop: type[Hop] = Hop

    def depart(self, chosen: Int[Tensor, "T k"]) -> Hop:
        return self.hop(self.group, self.needed(chosen))

    def needed(self, chosen: Int[Tensor, "T k"]) -> Bool[Tensor, "T members"]:
        members = self.group.size()
        behind = (chosen - self.first).div(self.block, rounding_mode="floor")
        reached = (behind >= 0) & (behind < members)
        table = torch.zeros(len(chosen), members + 1, dtype=torch.bool, device=chosen.device)
        return table.scatter(1, behind.where(reached, members), True)[:, :members]


def legs(experts: int, nodes: dist.ProcessGroup, inside: dist.ProcessGroup, hop: type[Hop] = Hop) -> tuple[Leg, ...]:
    """The way from any process to every expert.

    Args:
        experts: of a layer, in all.
        nodes: the processes that have this one's place on the nodes of its expert-parallel group, one on each.
        inside: the group's processes on this node. A node that is the whole group is one leg.
        hop: how tokens travel on each leg.
    """
    behind_node = experts // nodes.size()
    within = Leg(inside, behind_node // inside.size(), nodes.rank() * behind_node, hop)
    return (within,) if nodes.size() == 1 else (Leg(nodes, behind_node, hop=hop), within)


class ParallelExperts(GroupedExperts):
    """A process's own experts, in the place of `whole`. Tokens and load are the process's own, choices number all experts."""

    def __init__(self, whole: GroupedExperts, way: tuple[Stretch, ...]) -> None:
        nn.Module.__init__(self)
        last = way[-1]
        self.way, self.held = way, last.block
        self.first = last.first + last.group.rank() * last.block
        own = slice(self.first, self.first + self.held)
        self.gate_up_proj = nn.Parameter(whole.gate_up_proj.detach()[own].clone())
        self.down_proj = nn.Parameter(whole.down_proj.detach()[own].clone())

    def forward(
        self,
        x: Float[Tensor, "T d"],
        chosen: Int[Tensor, "T k"],
        gates: Float[Tensor, "T k"],
        load: Int[Tensor, " e"],
    ) -> Float[Tensor, "T d"]:
        trips: list[Trip] = []
        for leg in self.way:
            trip = leg.depart(chosen)
            x, chosen, gates = trip.carry(x, chosen, gates)
            trips.append(trip)
        own = chosen - self.first
        elsewhere = (own < 0) | (own >= self.held)
        own = own.masked_fill(elsewhere, self.held)  # sorts behind all that lie here
        results = super().forward(x, own, gates, own.flatten().bincount(minlength=self.held + 1)[: self.held])
        for trip in reversed(trips):
            results = trip.back(results)
        return results

    def dispatch(self, x: Float[Tensor, "T d"], chosen: Int[Tensor, "T k"], load: Int[Tensor, " e"]) -> Dispatched:
        """The rows of the experts that lie here; a token's other choices are computed elsewhere."""
        slot = chosen.flatten().argsort(stable=True)[: int(load.sum())]
        token = slot // chosen.shape[1]
        return Dispatched(x.index_select(0, token), token, slot, load)


class FP8ParallelExperts(ParallelExperts, FP8GroupedExperts):
    """The same with FP8 products; what travels is the way's affair, and is quantised anew where it arrived in BF16."""

    def __init__(self, whole: FP8GroupedExperts, way: tuple[Stretch, ...]) -> None:
        super().__init__(whole, way)
        self.recipe = whole.recipe


ON_PROCESSES: dict[type[GroupedExperts], type[ParallelExperts]] = {
    GroupedExperts: ParallelExperts,
    FP8GroupedExperts: FP8ParallelExperts,
}


def spread_experts(model: nn.Module, way: tuple[Stretch, ...]) -> None:
    """Replace the experts of every sparse layer by those that this process holds.

    Raises:
        ConfigError: experts of a kind that cannot be spread: they would be computed as another kind, and nobody would notice.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, MoE):
            kind = type(module.experts)
            if kind not in ON_PROCESSES:
                raise ConfigError(
                    f"{name}.experts: {kind.__name__} cannot be spread: build the model with GroupedExperts"
                )
            module.experts = ON_PROCESSES[kind](module.experts, way)
