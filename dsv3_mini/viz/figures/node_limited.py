"""Lesson 10's curves: messages by limit, ranks of groups, what a trained model loses, and queues before full experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int
from matplotlib.figure import Figure
from torch import Tensor

from dsv3_mini.viz.style import COLOURS, house_style

MEAN, WORST, LOST, ROOM = COLOURS[0], COLOURS[3], COLOURS[3], "#E4E4E4"
QUIET = "#5F5F5F"


@dataclass(frozen=True)
class Counted:
    """Messages of a batch under one limit: the mean over the tokens, the most of any token, and the share of a free
    choice's advantage over chance that is left."""

    mean: float
    worst: int
    kept: float


def messages_figure(counted: Mapping[int, Counted], once_per_expert: float) -> Figure:
    """What a limit of M nodes saves in messages, and what it costs in preference.

    Args:
        counted: by M. once_per_expert: messages of a token that sends a copy to each expert.
    """
    limits = list(counted)
    with house_style():
        figure = Figure(figsize=(11, 4.2))
        saved, cost = figure.subplots(1, 2)
        saved.bar(limits, [c.mean for c in counted.values()], color=MEAN, label="mean over the tokens")
        saved.plot(
            limits, [c.worst for c in counted.values()], "D", color=WORST, markersize=9, label="any token's most"
        )
        saved.axhline(once_per_expert, color=QUIET, linestyle="--")
        saved.text(limits[0] - 0.4, once_per_expert + 0.12, "a copy for each expert", color=QUIET)
        saved.set(xlabel="nodes that a token may visit (M)", ylabel="messages per token", xticks=limits)
        saved.set_title("The limit bounds the worst token")
        saved.set_ylim(0, max(once_per_expert, *(c.worst for c in counted.values())) + 1.6)
        saved.legend(loc="upper left", ncols=2)
        cost.plot(limits, [100 * c.kept for c in counted.values()], "o-", color=COLOURS[2], linewidth=2)
        cost.set(xlabel="nodes that a token may visit (M)", ylabel="advantage over chance kept (%)", ylim=(0, 105))
        cost.set_xticks(limits)
        cost.set_title("The choice gets a little worse")
    return figure


def rank_figure(kept: Mapping[int, Sequence[float]], k: int) -> Figure:
    """How good a choice is left when groups are ranked by the sum of their j best.

    Args:
        kept: by limit M, the share of the free choice's advantage for j = 1, 2, ... k: number of chosen experts.
    """
    with house_style():
        figure = Figure(figsize=(8, 4.2))
        axes = figure.subplots()
        for colour, marker, (limit, shares) in zip(COLOURS, "osD^v", kept.items(), strict=False):
            best, rule = int(np.argmax(shares)), k // limit - 1
            places = np.arange(1, len(shares) + 1)
            axes.plot(places, [100 * share for share in shares], color=colour, marker=marker, linewidth=2,
                      label=f"M = {limit}: K/M = {k // limit}, best at j = {best + 1}")  # fmt: skip
            axes.plot(rule + 1, 100 * shares[rule], "o", markersize=17, markerfacecolor="none", color="black",
                      gid=f"rule-{limit}")  # fmt: skip
        axes.set(xlabel="j, the experts that a node's rank sums", ylabel="advantage over chance kept (%)")
        axes.set_title("Circled: the report's rule, K/M experts")
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def price_figure(
    by_limit: Mapping[int, float], by_factor: Mapping[float, tuple[float, float]], untouched: float, trained_with: int
) -> Figure:
    """What a trained model pays for another limit, and for dropping.

    Args:
        by_limit: M -> loss. by_factor: capacity factor -> (loss, share of choices dropped). untouched: the loss with the
            limit that it was trained with, nothing dropped. All in nats per token.
    """
    with house_style():
        figure = Figure(figsize=(11, 4.2))
        limit, drop = figure.subplots(1, 2)
        colours = [COLOURS[1] if m == trained_with else COLOURS[0] for m in by_limit]
        limit.bar([str(m) for m in by_limit], [loss - untouched for loss in by_limit.values()], color=colours)
        limit.axhline(0, color="black", linewidth=0.8)
        limit.set(xlabel="nodes that a token may visit (M)", ylabel="extra loss (nats per token)")
        limit.set_title(f"Another limit than M = {trained_with}")
        names = [f"{factor:g}\n({share:.1%})" for factor, (_, share) in by_factor.items()]
        drop.bar(names, [loss - untouched for loss, _ in by_factor.values()], color=LOST)
        drop.axhline(0, color="black", linewidth=0.8)
        drop.set(xlabel="capacity factor (share of choices dropped)", ylabel="extra loss (nats per token)")
        drop.set_title("Dropping what finds no place")
    return figure


def capacity_figure(load: Int[Tensor, " e"], capacity: int, title: str) -> Figure:
    """The choices that fell on each expert, the places that it has, and what does not fit."""
    counts = load.numpy()
    kept, lost = np.minimum(counts, capacity), np.maximum(counts - capacity, 0)
    with house_style():
        figure = Figure(figsize=(9, 4.4))
        axes = figure.subplots()
        experts = np.arange(len(counts))
        axes.bar(experts, np.full(len(counts), capacity), color=ROOM, label="empty places")
        axes.bar(experts, kept, color=MEAN, label="kept")
        axes.bar(experts, lost, bottom=kept, color=LOST, hatch="//", edgecolor="white", label="dropped")
        axes.axhline(capacity, color="black", linewidth=1.5)
        axes.set(xlabel="expert", ylabel="choices in the batch", xticks=experts, title=title)
        axes.set_ylim(0, 1.25 * max(counts.max(), capacity))
        axes.legend(loc="upper right", ncols=3)
    return figure
