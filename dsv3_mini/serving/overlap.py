"""Two halves of a batch in turn: one computes while the other one's vectors are on their way (report section 3.4).

A layer is four tasks, one after the other: attention and experts need the card, dispatch and combine need the network. Both
card and network serve the two halves A and B alternately, A first, in the order of the layer.
"""

from __future__ import annotations

from dataclasses import dataclass

TASKS = ("attention", "dispatch", "experts", "combine")
NETWORK = ("dispatch", "combine")


@dataclass(frozen=True)
class Layer:
    """Seconds of one half in one layer."""

    attention: float
    dispatch: float
    experts: float
    combine: float

    @property
    def compute(self) -> float:
        return self.attention + self.experts

    @property
    def network(self) -> float:
        return self.dispatch + self.combine

    @property
    def alone(self) -> float:
        """One after the other, nothing at the same time."""
        return self.compute + self.network


@dataclass(frozen=True)
class Task:
    """One bar of the timetable, in seconds."""

    half: str
    layer: int
    name: str
    start: float
    end: float


def overlapped(layer: Layer, layers: int) -> float:
    """Seconds of `layers` equal layers for both halves together: the end of their `timetable`."""
    card = network = a = b = 0.0
    for _ in range(layers):
        a = card = max(card, a) + layer.attention
        b = card = max(card, b) + layer.attention
        a = network = max(network, a) + layer.dispatch
        b = network = max(network, b) + layer.dispatch
        a = card = max(card, a) + layer.experts
        b = card = max(card, b) + layer.experts
        a = network = max(network, a) + layer.combine
        b = network = max(network, b) + layer.combine
    return b


def timetable(layer: Layer, layers: int) -> list[Task]:
    """When each task of both halves begins and ends, `layers` equal layers long."""
    free = {"card": 0.0, "network": 0.0}
    ready = {"A": 0.0, "B": 0.0}
    tasks = []
    for number in range(layers):
        for name in TASKS:
            wire = "network" if name in NETWORK else "card"
            for half in ready:
                start = max(free[wire], ready[half])
                end = start + getattr(layer, name)
                free[wire] = ready[half] = end
                tasks.append(Task(half, number, name, start, end))
    return tasks
