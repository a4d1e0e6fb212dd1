"""Lesson 19's pictures: tokens on their way to other ranks and home, wires by skew, and where an exchange waits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from dsv3_mini.parallel.exchange_time import PartTime
from dsv3_mini.parallel.traffic import nodes_reached
from dsv3_mini.viz.style import COLOURS, house_style

EVEN, WAITING = COLOURS[0], COLOURS[3]
NODES = (COLOURS[0], COLOURS[5])  # neighbours in turn
QUIET = "#5F5F5F"


def exchange_figure(chosen: Int[Tensor, "T k"], home: Int[Tensor, " T"], experts: int, ranks: int) -> Figure:
    """Where each token's vector lies before dispatch, after it, and when its result is home, in the order of memory.

    Args:
        chosen: the tokens' experts, which lie evenly on the ranks in order. home: the rank that each token lies on.
    """
    needed = nodes_reached(chosen, experts, ranks)
    here = [(home == rank).nonzero().flatten().tolist() for rank in range(ranks)]
    there = [[t for sender in here for t in sender if needed[t, rank]] for rank in range(ranks)]
    longest = max(map(len, (*here, *there)))
    titles = ("At home", "Where its experts are", "Home again")
    with house_style():
        figure = Figure(figsize=(11, 0.62 * ranks + 1.7))
        panels = figure.subplots(1, 3, sharey=True, width_ratios=[max(map(len, here)), longest, max(map(len, here))])
        for axes, title, rows in zip(panels, titles, (here, there, here), strict=True):
            _memory(axes, rows, home.tolist(), framed=title == titles[2])
            axes.set_title(title)
            axes.set_xlabel("place in memory")
        panels[0].set_ylabel("rank")
        figure.suptitle("Dispatch gives each rank what its experts need; combine gives it back", fontweight="bold")
    return figure


def _memory(axes: Axes, rows: Sequence[Sequence[int]], home: Sequence[int], framed: bool) -> None:
    """Squares, coloured by home; a result has a black frame."""
    for rank, tokens in enumerate(rows):
        for place, token in enumerate(tokens):
            frame = {"edgecolor": "black", "linewidth": 2} if framed else {"edgecolor": "white", "linewidth": 1}
            colour = COLOURS[home[token] % len(COLOURS)]
            axes.add_patch(
                Rectangle((place, rank - 0.4), 0.9, 0.8, facecolor=colour, gid=f"{rank}-{place}-{token}", **frame)
            )
            axes.text(place + 0.45, rank, str(token), ha="center", va="center", fontsize=11)
    longest = max(map(len, rows))
    axes.set(xlim=(-0.3, longest + 0.2), ylim=(len(rows) - 0.4, -0.6), yticks=range(len(rows)))
    axes.set_xticks(np.arange(0, longest, 2) + 0.45, [str(place) for place in range(0, longest, 2)])
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)


def skew_figure(skews: Sequence[float], curves: Mapping[str, Sequence[float]], ceiling: float) -> Figure:
    """The fullest over the mean, by how unequal the experts' popularity is.

    Args:
        curves: by name, one number for each skew. ceiling: what the network cannot exceed.
    """
    with house_style():
        figure = Figure(figsize=(9, 4.4))
        axes = figure.subplots()
        for (name, values), colour, marker in zip(curves.items(), COLOURS[3::-1], "sDo", strict=False):
            axes.plot(skews, values, color=colour, marker=marker, linewidth=2, label=name)
        axes.axhline(ceiling, color=QUIET, linestyle="--")
        axes.text(skews[-1], 1.06 * ceiling, "ceiling: every token to the same nodes", color=QUIET, ha="right")
        axes.set(
            xlabel="skew (spread of popularity, in spreads of preference)", ylabel="fullest over mean", yscale="log"
        )
        ticks = [1, 2, 5, 10, 20, 50]
        axes.set_yticks([t for t in ticks if t <= 1.5 * max(map(max, curves.values()))])
        axes.set_yticklabels([str(t) for t in ticks if t <= 1.5 * max(map(max, curves.values()))])
        axes.minorticks_off()
        axes.set_title("A skewed choice fills GPUs sooner than the network")
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def wires_figure(received: Float[Tensor, " gpus"], gpus: int, times: Mapping[str, PartTime], title: str) -> Figure:
    """What each GPU gets over the network in dispatch, and how long dispatch and combine take.

    Args:
        received: bytes. gpus: in a node; nodes have two colours in turn. times: of each part.
    """
    megabytes = received.numpy() / 1e6
    with house_style():
        figure = Figure(figsize=(11, 4.4))
        bars, clock = figure.subplots(1, 2, width_ratios=[1.1, 1])
        colours = [NODES[gpu // gpus % 2] for gpu in range(len(megabytes))]
        bars.bar(range(len(megabytes)), megabytes, color=colours, width=0.85)
        bars.axhline(megabytes.mean(), color="black", linewidth=1.5)
        bars.axhline(megabytes.max(), color=WAITING, linewidth=2, linestyle="--")
        bars.set(xlabel="GPU (neighbours of one colour: a node)", ylabel="received over the network (MB)")
        bars.set_xticks(range(0, len(megabytes), gpus))
        bars.set_ylim(0, 1.15 * max(megabytes.max(), 1e-9))
        bars.set_title("Line: the mean. Dashed: the fullest")
        names = list(times)
        even = [1e3 * time.even for time in times.values()]
        waiting = [1e3 * time.waiting for time in times.values()]
        clock.barh(names, even, color=EVEN, label="if all were even")
        clock.barh(
            names, waiting, left=even, color=WAITING, hatch="//", edgecolor="white", label="waiting for the fullest"
        )
        clock.invert_yaxis()
        clock.set(xlabel="time (milliseconds a layer)", ylabel="part of the exchange")
        clock.set_xlim(0, 1.05 * max(map(sum, zip(even, waiting, strict=True))))
        clock.xaxis.set_major_locator(MaxNLocator(5))
        clock.set_title("When everyone is done")
        clock.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
        figure.suptitle(title, fontweight="bold")
    return figure
