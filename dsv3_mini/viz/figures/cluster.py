"""Lesson 21's pictures: sizes of cluster from 8 to 16,384 GPUs, the memory of each rank, the bill, and a planned machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from dsv3_mini.ledger import TrainingCost
from dsv3_mini.parallel.dry_run.roofline import Machine
from dsv3_mini.parallel.dry_run.scaling import ScalingRow
from dsv3_mini.parallel.dry_run.sketch import Sketch
from dsv3_mini.parallel.dry_run.step import RankMemory
from dsv3_mini.viz.style import COLOURS, house_style

STATE, HELD, PASSING, LIMIT = COLOURS[0], COLOURS[1], COLOURS[2], COLOURS[3]
KINDS = {"weights, gradients, moments": STATE, "activations held": HELD, "the pass that runs": PASSING}
STAGES = {"pre-training": COLOURS[0], "context extension": COLOURS[1], "post-training": COLOURS[2]}
GB = 1e9


def scaling_figure(rows: Sequence[ScalingRow], machine: Machine) -> Figure:
    """Each size of cluster: bytes of its fullest GPU, and the bound on its MFU where it fits."""
    with house_style():
        figure = Figure(figsize=(11, 4.4))
        memory, speed = figure.subplots(1, 2)
        places = range(len(rows))
        names = [f"{row.gpus:,}" for row in rows]
        room = machine.memory - machine.reserve
        colours = [STATE if row.peak <= room else LIMIT for row in rows]
        memory.bar(places, [row.peak / GB for row in rows], color=colours)
        memory.axhline(room / GB, color="black", linestyle="--", linewidth=1.5)
        has = f"free: {room / GB:.0f} of {machine.memory / GB:.0f} GB"
        memory.text(len(rows) - 0.4, 1.12 * room / GB, has, ha="right")
        memory.set(yscale="log", ylabel="GB on the fullest GPU", ylim=(10, 4 * max(row.peak for row in rows) / GB))
        memory.legend(handles=[Patch(color=STATE, label="fits"), Patch(color=LIMIT, label="does not fit")])
        memory.set_title("Too few GPUs: no room")
        fitting = [
            (place, row) for place, row in zip(places, rows, strict=True) if row.mfu is not None and row.peak <= room
        ]
        speed.plot(
            [place for place, _ in fitting], [100 * row.mfu for _, row in fitting], "o-", color=COLOURS[2], linewidth=2
        )
        for place, row in fitting:
            speed.text(place, 100 * row.mfu + 3, f"{row.mfu:.0%}", ha="center", fontsize=11)
        speed.set(ylabel="MFU at most (%)", ylim=(0, 100))
        speed.set_title("Too many: they wait")
        speed.set_xlim(min((place for place, _ in fitting), default=0) - 0.6, len(rows) - 0.4)
        for axes, shown in ((memory, list(places)), (speed, [place for place, _ in fitting])):
            axes.set_xticks(shown, [names[place] for place in shown], rotation=45, ha="right")
            axes.set_xlabel("GPUs")
    return figure


def memory_figure(ranks: Sequence[RankMemory], machine: Machine) -> Figure:
    """What each pipeline rank holds at its fullest moment, by kind."""
    with house_style():
        figure = Figure(figsize=(11, 4.2))
        axes = figure.subplots()
        for rank in ranks:
            _stack(axes, rank.rank, (sum(rank.state.values()), sum(rank.activations.values()), rank.passing))
        fullest = max(ranks, key=lambda rank: rank.peak)
        axes.text(fullest.rank, fullest.peak / GB - 2, f"{fullest.peak / GB:.1f}", ha="center", va="top", color="white")
        axes.axhline(machine.memory / GB, color=LIMIT, linestyle="--", linewidth=2)
        axes.text(
            len(ranks) - 0.5,
            machine.memory / GB + 3,
            f"a GPU has {machine.memory / GB:.0f} GB",
            ha="right",
            va="bottom",
            color=LIMIT,
        )
        axes.set(
            xlabel="pipeline rank", ylabel="GB on one GPU", ylim=(0, 1.45 * max(machine.memory, fullest.peak) / GB)
        )
        axes.set_xticks(range(len(ranks)))
        axes.set_title(f"Rank {fullest.rank} is the fullest")
        axes.legend(
            handles=[Patch(color=colour, label=kind) for kind, colour in KINDS.items()], ncols=3, loc="upper left"
        )
    return figure


def bill_figure(costs: Mapping[str, TrainingCost], mfu: float) -> Figure:
    """GPU hours of a run's stages, and what they come to.

    Args:
        costs: of each stage, in their order; all on as many GPUs at one price. mfu: that the speed amounts to.
    """
    hours, dollars = (sum(getattr(cost, name) for cost in costs.values()) for name in ("gpu_hours", "dollars"))
    gpus = next(iter(costs.values())).gpus
    with house_style():
        figure = Figure(figsize=(11, 3.8))
        axes, legend = figure.subplots(2, 1, height_ratios=(1, 0.8))
        legend.set_axis_off()
        left = 0.0
        for (name, cost), place in zip(costs.items(), (0.15, 0.5, 0.85), strict=True):
            wide = cost.gpu_hours / 1e6
            axes.barh(0, wide, 0.5, left, color=STAGES[name], edgecolor="white", gid=name)
            amounts = f"{cost.gpu_hours / 1e3:,.0f}K GPU hours\n${cost.dollars / 1e6:,.3f}M, {cost.days:,.1f} days"
            legend.text(
                place, 0.5, f"{name}\n{amounts}", ha="center", va="center", fontsize=13,
                bbox={"facecolor": "white", "edgecolor": STAGES[name], "linewidth": 3, "boxstyle": "round,pad=0.4"},
            )  # fmt: skip
            left += wide
        axes.set(yticks=[], xlabel="million GPU hours", xlim=(0, 1.25 * left))
        axes.text(left, 0, f"  {left:,.3f}M h", va="center", fontweight="bold")
        axes.spines["left"].set_visible(False)
        axes.set_title(
            f"{left:,.3f}M GPU hours, ${dollars / 1e6:,.3f}M: {hours / gpus / 24:,.1f} days on {gpus:,} GPUs, MFU {mfu:.0%}"
        )
    return figure


def plan_figure(sketch: Sketch | None, refused: str = "") -> Figure:
    """A layout by arithmetic: memory, a micro-batch's times, how full its pipelines are. Or the rule that it breaks."""
    with house_style():
        figure = Figure(figsize=(12.5, 4.4))
        if sketch is None:
            axes = figure.subplots()
            axes.set_axis_off()
            axes.text(0.5, 0.5, refused, ha="center", va="center", fontsize=14, color=LIMIT, wrap=True)
            _verdict(figure, "No layout: this breaks a rule", LIMIT)
            return figure
        memory, times, fill = figure.subplots(1, 3, width_ratios=(1.1, 1.3, 1.1))
        _memory(memory, sketch)
        _times(times, sketch)
        _fill(fill, sketch)
        if sketch.room < 0:
            _verdict(figure, f"Does not fit: {-sketch.room / GB:,.1f} GB are missing on each GPU", LIMIT)
        elif sketch.microbatches < sketch.needed:
            _verdict(
                figure, f"Fits, but the batch fills {sketch.microbatches / sketch.needed:.0%} of the pipeline", LIMIT
            )
        else:
            _verdict(figure, f"Fits, with {sketch.room / GB:,.1f} GB to spare", "black")
    return figure


def _memory(axes: Axes, sketch: Sketch) -> None:
    parts = (sketch.state, sketch.activations, sketch.passing)
    _stack(axes, 0, parts)
    top = 1.7 * max(sketch.machine.memory, sketch.peak) / GB
    handles = [
        Patch(color=colour, label=f"{kind}: {size / GB:,.1f}")
        for (kind, colour), size in zip(KINDS.items(), parts, strict=True)
    ]
    axes.legend(handles=handles[::-1], loc="upper left", fontsize=11)
    axes.axhline(sketch.machine.memory / GB, color=LIMIT, linestyle="--", linewidth=2)
    axes.text(
        1.4, sketch.machine.memory / GB, f"{sketch.machine.memory / GB:.0f} GB ", ha="right", va="bottom", color=LIMIT
    )
    axes.set(xlim=(-0.8, 1.4), xticks=[], ylabel="GB on one GPU", ylim=(0, top))
    axes.set_title("Memory")


def _times(axes: Axes, sketch: Sketch) -> None:
    machine, wires = sketch.machine, sketch.wires
    seconds = {
        "arithmetic": sketch.arithmetic, "NVLink": wires.inside / machine.nvlink, "InfiniBand": wires.network / machine.ib,
    }  # fmt: skip
    colours = (COLOURS[7], COLOURS[5], COLOURS[4])
    bars = axes.barh(list(seconds), [1e3 * s for s in seconds.values()], color=colours)
    axes.bar_label(bars, fmt=" %.0f")
    axes.invert_yaxis()
    axes.set(xlabel="ms for a micro-batch on a rank", xlim=(0, 1.25e3 * max(seconds.values())))
    axes.set_title("Time")


def _fill(axes: Axes, sketch: Sketch) -> None:
    counts = {"each pipeline\ngets": sketch.microbatches, "needs": sketch.needed}
    colours = (COLOURS[2] if sketch.microbatches >= sketch.needed else LIMIT, COLOURS[7])
    bars = axes.bar(list(counts), list(counts.values()), 0.6, color=colours)
    axes.bar_label(bars, fmt="%.4g")
    axes.set(ylabel="micro-batches in a step", ylim=(0, 1.15 * max(counts.values())))
    axes.set_title("Batch")


def _stack(axes: Axes, place: float, sizes: Sequence[float]) -> None:
    bottom = 0.0
    for (kind, colour), size in zip(KINDS.items(), sizes, strict=True):
        axes.bar(place, size / GB, 0.8, bottom / GB, color=colour, edgecolor="white", gid=f"{place}-{kind}")
        bottom += size


def _verdict(figure: Figure, words: str, colour: str) -> None:
    figure.suptitle(words, fontsize=14, fontweight="bold", x=0.01, ha="left", color=colour)
