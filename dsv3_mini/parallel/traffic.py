"""Which machines a token's copies travel to: counted here, sent by expert parallelism (report sections 2.1.2 and 3.2.2).

The experts of a layer are spread over a cluster: nodes (machines) of several GPUs, and on each GPU a few experts. Two kinds
of wire carry a token from its own GPU to those of its experts:

    network    between nodes (InfiniBand), slow: a token goes once to each node that it needs ...
    inside     between the GPUs of one node (NVLink), fast: ... and is handed on from there

A copy arrives on the GPU that has the sender's place in its node. Simplifications: experts lie in the order of their numbers,
one layer is looked at, and results, which travel back the same way, are not counted.

`wire_tables` counts the copies of a whole batch, GPU by GPU, `row_bytes` says what one of them weighs, and `fullest` how many
the busiest GPU has to send or to receive: an exchange is over when that one is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dsv3_mini.errors import ConfigError
from dsv3_mini.fp8.quantize import TILE

NETWORK_SPEED, INSIDE_SPEED = 50e9, 160e9  # bytes a second and GPU: InfiniBand and NVLink of the report's cluster

Message = tuple[int, int]  # from a GPU, to a GPU
OncePer = Literal["node", "expert"]


@dataclass(frozen=True)
class Cluster:
    """`nodes` machines of `gpus` GPUs each, with `experts` experts of a layer on each GPU.

    GPUs are numbered through the whole cluster, node by node, and experts GPU by GPU.

    Raises:
        ConfigError: one of the three is no whole number of at least 1.
    """

    nodes: int
    gpus: int
    experts: int

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus", "experts"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} = {value!r} must be a whole number of at least 1")

    @property
    def n_gpus(self) -> int:
        return self.nodes * self.gpus

    @property
    def n_experts(self) -> int:
        return self.n_gpus * self.experts

    def node_of(self, gpu: int) -> int:
        return gpu // self.gpus

    def gpu_of(self, expert: int) -> int:
        return expert // self.experts


@dataclass(frozen=True)
class Journey:
    """The messages that bring one token to its experts, each a pair (from GPU, to GPU)."""

    network: tuple[Message, ...]
    inside: tuple[Message, ...]


def journey(cluster: Cluster, chosen: Sequence[int], home: int, once_per: OncePer = "node") -> Journey:
    """How a token reaches its experts.

    Args:
        chosen: its experts, the best first: messages leave in this order. home: the GPU that it lies on.
        once_per: "node" sends one copy to each node and hands it on inside. "expert" sends each expert a copy of its own,
            straight from home, which is what one does without thinking of the wires.
    """
    goals = [cluster.gpu_of(expert) for expert in chosen]
    own = cluster.node_of(home)
    if once_per == "expert":
        return Journey(
            network=tuple((home, gpu) for gpu in goals if cluster.node_of(gpu) != own),
            inside=tuple((home, gpu) for gpu in goals if cluster.node_of(gpu) == own and gpu != home),
        )
    # On the token's own node the landing place is home itself.
    landing = {node: node * cluster.gpus + home % cluster.gpus for node in map(cluster.node_of, goals)}
    steps = [(landing[cluster.node_of(gpu)], gpu) for gpu in dict.fromkeys(goals)]
    return Journey(
        network=tuple((home, gpu) for node, gpu in landing.items() if node != own),
        inside=tuple((start, end) for start, end in steps if start != end),
    )


def nodes_reached(chosen: Int[Tensor, "T k"], n_experts: int, n_nodes: int) -> Bool[Tensor, "T g"]:
    """True where node `g` holds at least one of a token's experts; the experts lie evenly on the nodes, in order."""
    reached = torch.zeros(len(chosen), n_nodes, dtype=torch.bool, device=chosen.device)
    return reached.scatter(1, chosen // (n_experts // n_nodes), True)


def traffic(reached: Bool[Tensor, "T g"], home: Int[Tensor, " T"]) -> Int[Tensor, "sender receiver"]:
    """Messages from each node to each other node, one for every token and node that it reaches.

    Args:
        home: the node that each token lies on. What stays on it is no message: the diagonal is 0.
    """
    nodes = reached.shape[1]
    sent = torch.zeros(nodes, nodes, dtype=torch.long, device=reached.device).index_add(0, home, reached.long())
    return sent.fill_diagonal_(0)


def wire_tables(
    cluster: Cluster, chosen: Int[Tensor, "T k"], home: Int[Tensor, " T"]
) -> tuple[Int[Tensor, "sender receiver"], Int[Tensor, "sender receiver"]]:
    """Copies from each GPU to each other one, over the network and inside nodes: all tokens' journeys, once per node.

    Args:
        home: the GPU that each token lies on.
    """
    gpus, of = cluster.n_gpus, cluster.gpus
    needed = nodes_reached(chosen, cluster.n_experts, gpus)  # [T gpu]
    tables = torch.zeros(2, gpus, gpus, dtype=torch.long, device=chosen.device)
    token, goal = needed.nonzero(as_tuple=True)
    landing = goal // of * of + home[token] % of
    tables[1].view(-1).index_add_(0, landing * gpus + goal, torch.ones_like(goal))
    token, node = nodes_reached(chosen, cluster.n_experts, cluster.nodes).nonzero(as_tuple=True)
    landing = node * of + home[token] % of
    tables[0].view(-1).index_add_(0, home[token] * gpus + landing, torch.ones_like(node))
    network, inside = tables
    return network.fill_diagonal_(0), inside.fill_diagonal_(0)


def fullest(table: Int[Tensor, "sender receiver"]) -> int:
    """The most that any one sends, or receives: wires work both ways at once."""
    return max(int(table.sum(dim=0).max()), int(table.sum(dim=1).max()))


SCALE_BYTES = {"fp8": 1, "deep_ep": 4}  # of 128 numbers


def row_bytes(width: int, dispatch: str) -> tuple[int, int]:
    """Bytes of one copy of a token's vector, on its way there and of its result on the way back.

    Args:
        dispatch: as in a ParallelPlan. `plain` is that of a model that computes in BF16. A copy's choices and gates, 12 bytes
            for each expert, are left out.
    """
    back = 2 * width
    return (back if dispatch == "plain" else width + SCALE_BYTES[dispatch] * -(-width // TILE)), back
