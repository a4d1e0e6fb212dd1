"""Where experts lie when a model is served: copies of the busy ones, spread so that no GPU works much longer than the rest.

All GPUs of a layer wait for the busiest one. From the measured load of each expert a placement chooses two things: which
experts get more than one replica (report section 3.4: redundant experts), and which GPU holds which replicas. A GPU has as
many *slots* for replicas as any other; all slots are filled, each expert has at least one, and an expert's load is shared
evenly by its replicas.

    globally        replicas go to any GPU
    by nodes        whole groups of experts go to nodes first, so that node-limited routing keeps its meaning (section
                    2.1.2); then each node copies its own busy experts, and spreads them over its own GPUs

Both start from what sorting greedily gives and look for something better from there, so they are never worse than it:

    1. replicas: the next one always to the expert whose replicas are busiest; that makes the busiest replica as light as
       it can be
    2. bins: replicas sorted onto GPUs, then traded between them (`bins.py`)
    3. where a layer is still above the bound that no placement can beat, other counts of replicas are tried: all there are
       in a small problem; in a large one, a replica is taken from one expert and given to another, as long as that helps
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange, reduce, repeat
from jaxtyping import Float, Int
from torch import Tensor

from dsv3_mini.errors import ConfigError, DataError
from dsv3_mini.inference.bins import bin_load, exchange, sort_greedily

CLOSE_ENOUGH = 1.005  # times the bound: a layer below it is left in peace
MOST_COUNTS = 7000  # ways to share out the slots that are all tried: small problems are solved so
CANDIDATES = 3  # in large ones: experts that may give a replica, and experts that may get one, ...
MOST_CHANGES = 4  # ... so many times


@dataclass(frozen=True)
class Placement:
    """`expert[l, slot]` is the expert in a slot of layer l; slots are numbered GPU by GPU, and GPUs node by node."""

    expert: Int[Tensor, "l slots"]
    n_experts: int
    gpus: int

    @property
    def replicas(self) -> Int[Tensor, "l e"]:
        """How many slots each expert fills."""
        empty = torch.zeros(len(self.expert), self.n_experts, dtype=torch.long)
        return empty.scatter_add(1, self.expert, torch.ones_like(self.expert))

    def gpu_load(self, load: Float[Tensor, "l e"]) -> Float[Tensor, "l gpu"]:
        """What falls on each GPU, in the units of `load`, each expert's load shared evenly by its replicas.

        Raises:
            DataError: `load` is not [layers, experts] of finite numbers, none below 0.
        """
        load = _checked(load, (len(self.expert), self.n_experts))
        share = (load / self.replicas).gather(1, self.expert)
        return reduce(share, "l (gpu m) -> l gpu", "sum", gpu=self.gpus)

    def imbalance(self, load: Float[Tensor, "l e"]) -> Float[Tensor, " l"]:
        """The busiest GPU's load over the mean, for each layer: 1 is even. 1 as well where there is no load at all."""
        by_gpu = self.gpu_load(load)
        mean = by_gpu.mean(dim=1)
        return torch.where(mean > 0, by_gpu.amax(dim=1) / mean, 1.0)

    def moved(self, before: Placement) -> int:
        """Slots, of all layers, whose expert did not lie on that GPU before: what a change of placement has to load."""
        now, then = (_on_gpu(each) for each in (self, before))
        return int((now - then).clamp(min=0).sum())


def place_experts(
    load: Float[Tensor, "l e"], slots: int, gpus: int, *, nodes: int | None = None, groups: int | None = None
) -> Placement:
    """A balanced placement for a measured load.

    Args:
        load: tokens that chose each expert, by layer, in any unit.
        slots: places for replicas on all GPUs together; the slots beyond the number of experts are the redundant ones.
        nodes, groups: both given, groups of neighbouring experts stay together on a node; without them, globally.

    Raises:
        ConfigError: slots, GPUs, nodes and groups do not divide as they must, or there are too few slots.
        DataError: `load` is not [layers, experts] of finite numbers, none below 0.
    """
    load = _checked(load, None)
    experts = load.shape[1]
    if (nodes is None) != (groups is None):
        raise ConfigError(f"nodes = {nodes}, groups = {groups}: give both, to keep groups on nodes, or none of them")
    _check_division(experts, slots, gpus, nodes or 1, groups or 1)
    if nodes is None or groups is None:
        return Placement(_globally(load, slots, gpus, _bound(load, slots, gpus)).flatten(1), experts, gpus)
    by_group = reduce(load, "l (g m) -> l g", "sum", g=groups)
    sorted_groups = sort_greedily(by_group, nodes)
    found = [
        _by_nodes(load, groups_of, slots, gpus) for groups_of in (sorted_groups, exchange(by_group, sorted_groups))
    ]
    first, second = (Placement(each, experts, gpus) for each in found)
    better = second.gpu_load(load).amax(dim=1) < first.gpu_load(load).amax(dim=1)
    return Placement(torch.where(better[:, None], second.expert, first.expert), experts, gpus)


def replicate(load: Float[Tensor, "l e"], slots: int) -> Int[Tensor, "l e"]:
    """How many replicas each expert gets: one, and of the rest the next one always to the expert of the busiest replicas."""
    replicas, row = torch.ones_like(load, dtype=torch.long), torch.arange(len(load))
    for _ in range(slots - load.shape[1]):
        replicas[row, (load / replicas).argmax(dim=1)] += 1
    return replicas


def refresh(current: Placement, found: Placement, load: Float[Tensor, "l e"], gain: float = 0.05) -> Placement:
    """`current`, and `found` in the layers where that makes the busiest GPU's load smaller by more than a share `gain`.

    Moving an expert costs bandwidth, and a measured load is only a sample: a small gain is not worth a move.
    """
    now, then = found.gpu_load(load).amax(dim=1), current.gpu_load(load).amax(dim=1)
    return Placement(
        torch.where((now < (1 - gain) * then)[:, None], found.expert, current.expert), current.n_experts, current.gpus
    )


def _by_nodes(load: Tensor, groups_of: Int[Tensor, "l node m"], slots: int, gpus: int) -> Int[Tensor, "l slots"]:
    """Each node is a small problem of its own: its groups' experts on its share of the slots and GPUs."""
    layers, nodes, _ = groups_of.shape
    groups = groups_of.shape[1] * groups_of.shape[2]
    members = rearrange(torch.arange(load.shape[1]), "(g m) -> g m", g=groups)
    own = rearrange(members[groups_of], "l node g m -> (l node) (g m)")
    own_load = repeat(load, "l e -> (l node) e", node=nodes).gather(1, own)
    bound = reduce(_bound(own_load, slots // nodes, gpus // nodes), "(l node) -> l", "max", node=nodes)
    busiest = repeat(bound, "l -> (l node)", node=nodes)  # no node has to do better than the busiest one can
    held = _globally(own_load, slots // nodes, gpus // nodes, busiest).flatten(1)
    return rearrange(own.gather(1, held), "(l node) slots -> l (node slots)", node=nodes)


def _bound(load: Tensor, slots: int, gpus: int) -> Float[Tensor, " l"]:
    """What the busiest GPU has at least: the mean, and the busiest replica, which `replicate` makes as light as can be."""
    return torch.maximum(load.sum(dim=1) / gpus, (load / replicate(load, slots)).amax(dim=1))


def _globally(load: Tensor, slots: int, gpus: int, bound: Float[Tensor, " l"]) -> Int[Tensor, "l gpu m"]:
    """Experts by slot, each row of `load` on its own, searched until the busiest GPU is close to the bound."""
    replicas, goal = replicate(load, slots), CLOSE_ENOUGH * bound
    held, peak = _fill(load, replicas, gpus, goal)
    rows, all_counts = torch.arange(len(load)), _all_counts(slots, load.shape[1])
    for _ in range(MOST_CHANGES if all_counts is None else 1):
        rows = rows[peak[rows] > goal[rows]]
        if not len(rows):
            break
        if all_counts is None:
            tried = _other_counts(load[rows], replicas[rows])
        else:
            tried = repeat(all_counts, "c e -> l c e", l=len(rows))
        better = torch.zeros(len(rows), dtype=torch.bool)
        for some in torch.arange(len(rows)).split(
            max(1, MOST_COUNTS // tried.shape[1])
        ):  # as many as memory is meant for
            own, ways = rows[some], tried[some].flatten(0, 1)
            several, goals = (repeat(each[own], "l ... -> (l c) ...", c=tried.shape[1]) for each in (load, goal))
            filled, peaks = _fill(several, ways, gpus, goals)
            best_peak, best = peaks.view(len(own), -1).min(dim=1)
            helps, choice = best_peak < peak[own], torch.arange(len(own)) * tried.shape[1] + best
            better[some], own, choice = helps, own[helps], choice[helps]
            held[own], peak[own], replicas[own] = filled[choice], best_peak[helps], ways[choice]
        rows = rows[better]
    return held


def _fill(
    load: Tensor, replicas: Tensor, gpus: int, goal: Tensor
) -> tuple[Int[Tensor, "l gpu m"], Float[Tensor, " l"]]:
    """The replicas sorted and traded onto the GPUs, and the load of the busiest GPU."""
    rows, experts = load.shape
    expert = torch.repeat_interleave(torch.arange(experts).repeat(rows), replicas.flatten()).view(rows, -1)
    share = (load / replicas).gather(1, expert)
    held = exchange(share, sort_greedily(share, gpus), goal)
    return expert.gather(1, held.flatten(1)).view(held.shape), bin_load(share, held).amax(dim=1)


def _all_counts(slots: int, experts: int) -> Int[Tensor, "c e"] | None:
    """Every way to give all experts at least one of the slots; None where there are too many ways."""
    if math.comb(slots - 1, experts - 1) > MOST_COUNTS:
        return None
    ends = [(0, *cuts, slots) for cuts in itertools.combinations(range(1, slots), experts - 1)]
    return torch.tensor(ends).diff(dim=1)


def _other_counts(load: Tensor, replicas: Tensor) -> Int[Tensor, "l c e"]:
    """Counts with one replica taken from an expert that misses it least and given to one that wants it most."""
    most = min(CANDIDATES, load.shape[1])
    without = torch.where(replicas > 1, load / (replicas - 1).clamp(min=1), torch.inf)
    givers = without.topk(most, dim=1, largest=False).indices
    takers = (load / replicas).topk(most, dim=1).indices
    can = torch.isfinite(without.gather(1, givers)).long()
    one = torch.eye(load.shape[1], dtype=torch.long)
    change = rearrange(one[takers], "l t e -> l 1 t e") - rearrange(one[givers], "l g e -> l g 1 e")
    change = change * rearrange(can, "l g -> l g 1 1")
    return rearrange(replicas, "l e -> l 1 e") + rearrange(change, "l g t e -> l (g t) e")


def _on_gpu(placement: Placement) -> Int[Tensor, "l gpu e"]:
    """How many replicas of each expert lie on each GPU."""
    by_gpu = rearrange(placement.expert, "l (gpu m) -> l gpu m", gpu=placement.gpus)
    empty = torch.zeros(*by_gpu.shape[:2], placement.n_experts, dtype=torch.long)
    return empty.scatter_add(2, by_gpu, torch.ones_like(by_gpu))


def _checked(load: Tensor, shape: Sequence[int] | None) -> Float[Tensor, "l e"]:
    """The load as float64, in which shares of whole numbers of tokens are told apart."""
    if load.ndim != 2 or 0 in load.shape or (shape is not None and tuple(load.shape) != tuple(shape)):
        raise DataError(
            f"load of shape {tuple(load.shape)} must be {'[layers, experts]' if shape is None else list(shape)}"
        )
    load = load.detach().cpu().double()
    if not bool(torch.isfinite(load).all()) or bool((load < 0).any()):
        raise DataError("load has numbers that are below 0 or not finite: give counts of tokens for each expert")
    return load


def _check_division(experts: int, slots: int, gpus: int, nodes: int, groups: int) -> None:
    for name, value in (("slots", slots), ("gpus", gpus), ("nodes", nodes), ("groups", groups)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{name} = {value!r} must be a whole number of at least 1")
    if slots < experts:
        raise ConfigError(f"slots = {slots} must be at least the {experts} experts: each needs a place")
    for one, size, other, parts in (
        ("slots", slots, "gpus", gpus),
        ("gpus", gpus, "nodes", nodes),
        ("experts", experts, "groups", groups),
        ("groups", groups, "nodes", nodes),
    ):
        if size % parts and parts > 1:
            raise ConfigError(f"{one} = {size} must be divisible by {other} = {parts}: all get the same number")
