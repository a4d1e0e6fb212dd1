"""Bins of one size: n items into bins that hold n / bins items each, so that the heaviest bin is as light as it gets.

Every function takes many rows at once, one problem each (a layer, or a node of a layer), and loops over items or trades,
never over rows. `sort_greedily` is the usual rule. `exchange` starts from any filling and trades items between two bins as
long as the heaviest bin gets lighter by it: its result is never worse than what it was given.
"""

from __future__ import annotations

import itertools
import math

import torch
from einops import rearrange, reduce, repeat
from jaxtyping import Float, Int
from torch import Tensor

MOST_DEALS = 70  # ways to deal the items of two bins that are all tried: up to four items in each
SLACK = 1e-9  # of the heaviest bin: a gain below it is rounding


def sort_greedily(weight: Float[Tensor, "l n"], bins: int) -> Int[Tensor, "l bins m"]:
    """The items of each bin: the heaviest item first, each into the lightest bin that still has room."""
    rows, items = weight.shape
    room, row = items // bins, torch.arange(rows)
    held = torch.zeros(rows, bins, room, dtype=torch.long)
    load, filled = torch.zeros(rows, bins, dtype=weight.dtype), torch.zeros(rows, bins, dtype=torch.long)
    for item in weight.argsort(dim=1, descending=True, stable=True).unbind(dim=1):
        lightest = load.argmin(dim=1)
        held[row, lightest, filled[row, lightest]] = item
        filled[row, lightest] += 1
        after = load[row, lightest] + weight[row, item]
        load[row, lightest] = torch.where(
            filled[row, lightest] == room, torch.inf, after
        )  # a full bin is never lightest
    return held


def exchange(
    weight: Float[Tensor, "l n"], held: Int[Tensor, "l bins m"], goal: Float[Tensor, " l"] | None = None
) -> Int[Tensor, "l bins m"]:
    """Trade items of the heaviest bin with other bins until it is no heavier than `goal`, or no trade makes it lighter.

    One item for one, as long as that helps; then the heaviest bin and one other are dealt anew, where there are few enough
    ways to try them all. A trade leaves both bins lighter than the heaviest was, so there is an end to it.
    """
    held, rows = held.clone(), torch.arange(len(held))
    _, bins, room = held.shape
    goal = torch.zeros(len(held)) if goal is None else goal
    few = math.comb(2 * room, room) <= MOST_DEALS
    while bins > 1:
        rows = rows[bin_load(weight[rows], held[rows]).amax(dim=1) > goal[rows]]
        if not len(rows):
            break
        before = held[rows]
        after = _trade(weight[rows], before)
        stuck = (after == before).flatten(1).all(dim=1)
        if few and bool(stuck.any()):
            after[stuck] = _deal(weight[rows[stuck]], before[stuck])
        held[rows] = after
        rows = rows[(after != before).flatten(1).any(dim=1)]
    return held


def bin_load(weight: Float[Tensor, "l n"], held: Int[Tensor, "l bins m"]) -> Float[Tensor, "l bins"]:
    """What each bin weighs."""
    return reduce(_weights(weight, held), "l bins m -> l bins", "sum")


def _weights(weight: Tensor, held: Tensor) -> Float[Tensor, "l bins m"]:
    return weight.gather(1, held.flatten(1)).view(held.shape)


def _trade(weight: Tensor, held: Tensor) -> Int[Tensor, "l bins m"]:
    """One item of the heaviest bin for one of another: the trade that leaves the heavier of the two lightest, if it helps."""
    rows, bins, room = held.shape
    row, each = torch.arange(rows), _weights(weight, held)
    load = reduce(each, "l bins m -> l bins", "sum")
    most, heaviest = load.max(dim=1)
    given, taken = each[row, heaviest], rearrange(each, "l bins m -> l (bins m)")
    moved = rearrange(given, "l m -> l m 1") - rearrange(taken, "l n -> l 1 n")
    theirs = repeat(load, "l bins -> l 1 (bins m)", m=room) + moved
    peak, best = torch.maximum(rearrange(most, "l -> l 1 1") - moved, theirs).flatten(1).min(dim=1)
    out, into = heaviest * room + best // (bins * room), best % (bins * room)
    flat = held.flatten(1).clone()
    flat[row, out], flat[row, into] = flat[row, into].clone(), flat[row, out].clone()
    return torch.where((peak < most * (1 - SLACK))[:, None], flat, held.flatten(1)).view(held.shape)


def _deal(weight: Tensor, held: Tensor) -> Int[Tensor, "l bins m"]:
    """The items of the heaviest bin and of one other, dealt to the two in the best of all ways, if it helps."""
    rows, bins, room = held.shape
    row, each = torch.arange(rows), _weights(weight, held)
    load = reduce(each, "l bins m -> l bins", "sum")
    most, heaviest = load.max(dim=1)
    ways = torch.tensor(list(itertools.combinations(range(2 * room), room)))
    both = torch.cat((repeat(each[row, heaviest], "l m -> l bins m", bins=bins), each), dim=-1)
    first = reduce(both[..., ways], "l bins ways m -> l bins ways", "sum")
    peak = torch.maximum(first, rearrange(both.sum(dim=-1), "l bins -> l bins 1") - first)
    peak[row, heaviest] = torch.inf  # with itself a bin has nothing to trade
    peak, best = peak.flatten(1).min(dim=1)
    other, way = best // len(ways), ways[best % len(ways)]
    pool = torch.cat((held[row, heaviest], held[row, other]), dim=1)
    kept = torch.zeros_like(pool, dtype=torch.bool).scatter(1, way, True)
    after = held.clone()
    after[row, heaviest], after[row, other] = pool[kept].view(rows, room), pool[~kept].view(rows, room)
    return torch.where(rearrange(peak < most * (1 - SLACK), "l -> l 1 1"), after, held)
