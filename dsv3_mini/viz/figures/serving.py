"""Lesson 23's pictures: what falls on each GPU, placements as the text changes, two halves in turn, a service and its waits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from dsv3_mini.inference.placement import Placement
from dsv3_mini.serving.overlap import Task
from dsv3_mini.serving.served import Served
from dsv3_mini.viz.style import COLOURS, house_style

ONE, SEVERAL, LIMIT = COLOURS[5], COLOURS[1], COLOURS[3]
HALVES = {"A": COLOURS[0], "B": COLOURS[1]}
READABLE = 0.06  # of the tallest bar: the least height in which an expert's number can be written
QUIET = "#5F5F5F"


def placement_figure(placements: Mapping[str, Placement], load: Float[Tensor, "l e"], layer: int) -> Figure:
    """The load of each GPU under one or more placements of the same layer, expert by expert, in loads of a mean GPU."""
    with house_style():
        figure = Figure(figsize=(5.6 * len(placements), 4.4))
        panels = figure.subplots(1, len(placements), squeeze=False, sharey=True)[0]
        tallest = max(float(each.imbalance(load)[layer]) for each in placements.values())
        for axes, (name, placement) in zip(panels, placements.items(), strict=True):
            busiest = _gpu_bars(axes, placement, load, layer, READABLE * tallest)
            axes.set_title(f"{name}: busiest {busiest:.2f} means")
            axes.set(xlabel="GPU", xticks=range(placement.gpus))
        panels[0].set_ylabel("load (1 is the mean GPU)")
        handles = [
            Patch(color=ONE, label="an expert's only place"),
            Patch(color=SEVERAL, label="one of several replicas"),
        ]
        panels[-1].legend(handles=handles, loc="upper right")
        low, high = panels[0].get_ylim()
        panels[0].set_ylim(low, 1.25 * high)
    return figure


def _gpu_bars(axes: Axes, placement: Placement, load: Tensor, layer: int, readable: float) -> float:
    share = (load / placement.replicas).gather(1, placement.expert)[layer].double()
    mean = float(share.sum()) / placement.gpus
    heights = (share / mean).view(placement.gpus, -1).tolist()
    experts = placement.expert[layer].view(placement.gpus, -1).tolist()
    for gpu, (own, who) in enumerate(zip(heights, experts, strict=True)):
        bottom = 0.0
        for height, expert in zip(own, who, strict=True):
            several = int(placement.replicas[layer, expert]) > 1
            axes.bar(
                gpu, height, 0.8, bottom, color=SEVERAL if several else ONE, edgecolor="white", gid=f"{gpu}-{expert}"
            )
            if height > readable:
                axes.text(gpu, bottom + height / 2, str(expert), ha="center", va="center", fontsize=11)
            bottom += height
    busiest = max(map(sum, heights))
    axes.axhline(1, color="black", linewidth=1)
    axes.axhline(busiest, color=LIMIT, linewidth=2, linestyle="--")
    return busiest


def refresh_figure(curves: Mapping[str, Sequence[float]], texts: Sequence[str]) -> Figure:
    """The busiest GPU over the mean, batch by batch, while the text changes; `texts` names the text of each batch."""
    with house_style():
        figure = Figure(figsize=(10, 4.4))
        axes = figure.subplots()
        batches = np.arange(len(texts))
        for (name, values), colour, marker in zip(
            curves.items(), (COLOURS[7], COLOURS[3], COLOURS[2]), "sDo", strict=False
        ):
            axes.plot(batches, values, color=colour, marker=marker, linewidth=2, label=name)
        changes = [i for i in batches[1:] if texts[i] != texts[i - 1]]
        top = max(max(values) for values in curves.values())
        for start in (0, *changes):
            if start:
                axes.axvline(start - 0.5, color=QUIET, linewidth=1)
            axes.text(start, 1 + 1.08 * (top - 1), texts[start], color=QUIET)
        axes.set(xlabel="batch", ylabel="busiest GPU over the mean", ylim=(0.95, 1 + 1.2 * (top - 1)))
        axes.set_title("A placement has to follow the text")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=len(curves))
    return figure


def timetable_figure(tasks: Sequence[Task], alone: float) -> Figure:
    """Which half has the card and which the network, over some layers; `alone`: seconds without any overlap."""
    with house_style():
        figure = Figure(figsize=(11, 3.2))
        axes = figure.subplots()
        for task in tasks:
            row = task.name in ("dispatch", "combine")
            wide = 1e3 * (task.end - task.start)
            axes.barh(int(row), wide, 0.72, 1e3 * task.start, color=HALVES[task.half], edgecolor="white", gid=task.name)
            written = task.name if wide > 0.07 * 1e3 * alone else task.name[0]
            axes.text(1e3 * (task.start + task.end) / 2, int(row), written, ha="center", va="center", fontsize=11,
                      color="white" if task.half == "A" else "black")  # fmt: skip
        end = max(task.end for task in tasks)
        axes.axvline(1e3 * alone, color=LIMIT, linestyle="--", linewidth=2)
        axes.text(1e3 * alone, -0.62, "one after the other ", color=LIMIT, ha="right", va="bottom")
        axes.set(
            yticks=[0, 1],
            yticklabels=["card:\nattention, experts", "network:\ndispatch, combine"],
            xlabel="milliseconds",
            ylim=(1.6, -0.75),
        )
        axes.set_xlim(0, 1.02 * 1e3 * max(alone, end))
        axes.set_title(f"Two halves in turn: {end / alone:.0%} of the time")
        axes.legend(handles=[Patch(color=c, label=f"half {h}") for h, c in HALVES.items()], loc="center right",
                    bbox_to_anchor=(0.97, 0.5))  # fmt: skip
    return figure


def service_figure(served: Served) -> Figure:
    """How long requests waited for their first token and between tokens, and how full the two pools were."""
    gpus = served.prefill.gpus + served.decode.gpus
    first, between = 1e3 * served.time_to_first_token, 1e3 * served.time_per_output_token
    with house_style():
        figure = Figure(figsize=(12.5, 4.2))
        waits, steps, pools = figure.subplots(1, 3, width_ratios=(1.2, 1.2, 1))
        _shares(waits, first, COLOURS[0], "to the first token (ms)")
        _shares(steps, between, COLOURS[2], "per output token (ms)")
        waits.set_ylabel("share of the requests (%)")
        used = {
            "prefill\nat work": served.prefill.busy / served.prefill.units / served.seconds,
            "decode\nat work": served.decode.busy / served.decode.units / served.seconds,
            "cache\nat most": served.cache_peak / served.cache_tokens,
        }
        bars = pools.bar(
            list(used), [100 * share for share in used.values()], color=(COLOURS[0], COLOURS[2], COLOURS[7])
        )
        pools.bar_label(bars, fmt="%.0f%%")
        pools.set(ylabel="share (%)", ylim=(0, 112))
        figure.suptitle(
            f"{served.output_tokens_per_second:,.0f} tokens/s written by {gpus} GPUs: the first after "
            f"{np.median(first):,.0f} ms, then one every {np.median(between) if len(between) else 0:,.1f} ms (medians)",
            fontsize=14, fontweight="bold", x=0.01, ha="left",
        )  # fmt: skip
    return figure


def _shares(axes: Axes, values: np.ndarray, colour: str, label: str) -> None:
    """How many of the requests had to wait no longer than that."""
    axes.set(xlabel=label, ylim=(0, 104))
    if not len(values):
        return
    ordered = np.sort(values)
    axes.plot(ordered, 100 * np.arange(1, len(ordered) + 1) / len(ordered), color=colour, linewidth=2)
    for share in (0.5, 0.95):
        at = float(np.quantile(ordered, share))
        axes.plot([at], [100 * share], "o", color=colour)
        axes.annotate(f" {share:.0%}: {at:,.1f}", (at, 100 * share), va="top", fontsize=11)
    axes.set_xlim(0, 1.45 * float(ordered[int(0.99 * (len(ordered) - 1))]))
