"""Expert parallelism: the experts of a layer lie on several processes, and tokens travel to them (report section 3.2.2).

A group of `ep` processes shares all experts of a layer: process r holds experts r e/ep to (r + 1) e/ep - 1. Each process
routes its own tokens, sends each of them with its choices and gates to the processes that hold its experts, and gets back
the weighed sum of what they made of it. What travels between is a `Hop`:

    one leg     to each *process* once, however many of its experts there were chosen
    two legs    to each *node* once over the slow network, to the process that has the sender's place there; from there
                over the fast wires inside to each process that holds an expert. On the way back results are added up where
                they meet, so that the network carries one row for each token and node

Which experts are reached is the same either way, and `parallel/traffic.py` counts what each leg carries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dsv3_mini.model.experts import Dispatched, GroupedExperts
from dsv3_mini.model.moe import MoE
from dsv3_mini.parallel.hop import Hop


@dataclass(frozen=True)
class Leg:
    """A part of the way to an expert, between the members of `group`: expert i lies behind member i // block.

    `block` is how many experts in a row lie behind one member. Only experts from `first` on, one block for each member,
    are reached by this leg.
    """

    group: dist.ProcessGroup
    block: int
    first: int = 0

    def needed(self, chosen: Int[Tensor, "T k"]) -> Bool[Tensor, "T members"]:
        members = self.group.size()
        behind = (chosen - self.first).div(self.block, rounding_mode="floor")
        reached = (behind >= 0) & (behind < members)
        table = torch.zeros(len(chosen), members + 1, dtype=torch.bool, device=chosen.device)
        return table.scatter(1, behind.where(reached, members), True)[:, :members]


def legs(experts: int, nodes: dist.ProcessGroup, inside: dist.ProcessGroup) -> tuple[Leg, ...]:
    """The way from any process to every expert.

    Args:
        experts: of a layer, in all.
        nodes: the processes that have this one's place on the nodes of its expert-parallel group, one on each.
        inside: the group's processes on this node. A node that is the whole group is one leg.
    """
    behind_node = experts // nodes.size()
    within = Leg(inside, behind_node // inside.size(), first=nodes.rank() * behind_node)
    return (within,) if nodes.size() == 1 else (Leg(nodes, behind_node), within)


class ParallelExperts(GroupedExperts):
    """A process's own experts, in the place of `whole`. Tokens and load are the process's own, choices number all experts."""

    def __init__(self, whole: GroupedExperts, way: tuple[Leg, ...]) -> None:
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
        hops: list[Hop] = []
        for leg in self.way:
            hop = Hop(leg.group, leg.needed(chosen))
            x, chosen, gates = hop.there(x), hop.there(chosen), hop.there(gates)
            hops.append(hop)
        own = chosen - self.first
        elsewhere = (own < 0) | (own >= self.held)
        own = own.masked_fill(elsewhere, self.held)  # sorts behind all that lie here
        results = super().forward(x, own, gates, own.flatten().bincount(minlength=self.held + 1)[: self.held])
        for hop in reversed(hops):
            results = hop.back(results)
        return results

    def dispatch(self, x: Float[Tensor, "T d"], chosen: Int[Tensor, "T k"], load: Int[Tensor, " e"]) -> Dispatched:
        """The rows of the experts that lie here; a token's other choices are computed elsewhere."""
        slot = chosen.flatten().argsort(stable=True)[: int(load.sum())]
        token = slot // chosen.shape[1]
        return Dispatched(x.index_select(0, token), token, slot, load)


def spread_experts(model: nn.Module, way: tuple[Leg, ...]) -> None:
    """Replace the experts of every sparse layer by those that this process holds."""
    for module in list(model.modules()):
        if isinstance(module, MoE):
            module.experts = ParallelExperts(module.experts, way)
