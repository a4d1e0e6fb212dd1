"""How long dispatch and combine of a batch take on a cluster's wires, and how much of that is waiting for the fullest.

Nobody has finished an exchange before the last message has arrived: it takes as long as the busiest GPU needs for what it
sends, or for what it gets. On an even load it would take the mean; what is above it is waiting.

    dispatch    network, then inside: `there` bytes for each copy
    combine     inside, then network: the same wires the other way, `back` bytes for each copy

Simplifications: a wire runs at its full rate; the four parts follow each other, where the report's kernels hand on what has
come while the rest still comes. Counting waits for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

from dsv3_mini.parallel.traffic import INSIDE_SPEED, NETWORK_SPEED, Cluster, fullest, row_bytes, wire_tables

PARTS = ("dispatch, network", "dispatch, inside", "combine, inside", "combine, network")


@dataclass(frozen=True)
class PartTime:
    """Seconds of one part: as it is, and if every GPU had the mean of its load."""

    seconds: float
    even: float

    @property
    def waiting(self) -> float:
        return self.seconds - self.even


def exchange_times(
    cluster: Cluster, chosen: Int[Tensor, "T k"], home: Int[Tensor, " T"], width: int, dispatch: str
) -> dict[str, PartTime]:
    """Each of PARTS for one layer forward. Backward has the same parts in the other order: gradients of results are
    dispatched, those of tokens combined.

    Args:
        chosen: of a whole batch on all GPUs. home: the GPU that each token lies on. width: of a token's vector.
        dispatch: what tokens travel as: "plain" is BF16.
    """
    network, inside = wire_tables(cluster, chosen, home)
    there, back = row_bytes(width, dispatch)

    def part(table: Tensor, size: int, speed: float) -> PartTime:
        return PartTime(fullest(table) * size / speed, int(table.sum()) / cluster.n_gpus * size / speed)

    return dict(
        zip(
            PARTS,
            (
                part(network, there, NETWORK_SPEED),
                part(inside, there, INSIDE_SPEED),
                part(inside, back, INSIDE_SPEED),
                part(network, back, NETWORK_SPEED),
            ),
            strict=True,
        )
    )
