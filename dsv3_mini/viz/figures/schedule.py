"""Pipeline schedules as pictures: ranks one below the other, time to the right, each slot a box with its microbatch.

A pair that overlaps (F&B) is one box with a border: its forward above, its backward below. Lighter boxes belong
to a rank's second stage or, in DualPipe, to the microbatches that come in at the other end. What stays grey is the
bubble. Beside each schedule stands how many activations a rank keeps at most.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from dsv3_mini.parallel.schedule_costs import ChunkCosts
from dsv3_mini.parallel.schedule_ir import Op, Schedule
from dsv3_mini.parallel.schedule_simulator import Timeline
from dsv3_mini.viz.style import COLOURS, house_style

PHASE_COLOURS = {"F": COLOURS[5], "B": COLOURS[1], "I": COLOURS[2], "W": COLOURS[4]}
PHASE_NAMES = {
    "F": "F, forward",
    "B": "B, backward",
    "I": "I, backward for the input",
    "W": "W, backward for the weights",
}
IDLE, BORDER, NOW, QUIET = "#ECECEC", "#1A1A1A", COLOURS[3], "#5F5F5F"
HIGH = 0.86  # of a rank's row, the rest is the gap
SMALLEST, LARGEST = 7.0, 11.0  # points, of the numbers in boxes; a box too narrow for the smallest has none
DIGIT = 0.64  # of a digit's height: its width
WIDTH, LEGEND = 13.0, 0.5  # inches: of the picture, and the height of its legend
SIDES = 3.3  # inches that the timeline leaves to the rest


def lighter(colour: str) -> str:
    """Half way to white."""
    return to_hex([(1 + part) / 2 for part in to_rgb(colour)])


@dataclass(frozen=True)
class Box:
    """An op in the picture: half as high, and lower or higher, where it overlaps with another."""

    op: Op
    rank: int
    number: int
    start: float
    end: float
    top: float
    height: float


def boxes(timeline: Timeline) -> Iterator[Box]:
    """All ops, with their places; y counts ranks, downwards."""
    for rank, slots in enumerate(timeline.schedule.order):
        for number, slot in enumerate(slots):
            height = HIGH / len(slot.ops)
            for place, op in enumerate(slot.ops):
                top = rank + (1 - HIGH) / 2 + place * height
                yield Box(op, rank, number, timeline.start[rank][number], timeline.end[rank][number], top, height)


def is_second(schedule: Schedule, op: Op) -> bool:
    """Whether the op is drawn lighter: of the other direction, or of a rank's second, fourth ... stage."""
    return bool(op.direction) or op.stage // schedule.n_ranks % 2 == 1


def colour_of(schedule: Schedule, op: Op) -> str:
    colour = PHASE_COLOURS[op.phase]
    return lighter(colour) if is_second(schedule, op) else colour


def title_of(timeline: Timeline) -> str:
    """Name and sizes; how long the step takes and how much of it is bubble; the fullest rank."""
    schedule = timeline.schedule
    return (
        f"{schedule.name}: {schedule.n_ranks} ranks, {schedule.total_microbatches} microbatches; "
        f"step {float(timeline.span):.4g}, bubble {float(timeline.bubble):.4g} ({float(timeline.bubble_share):.0%}); "
        f"at most {max(schedule.peak_activations)} activations"
    )


def schedule_figure(*timelines: Timeline, now: float | None = None) -> Figure:
    """Timelines one below the other on the same time axis.

    Args:
        now: a moment: what comes later is pale, and the bars on the right show what each rank keeps then.
    """
    longest = max(timeline.span for timeline in timelines)
    rows = [0.33 * timeline.schedule.n_ranks + 0.75 for timeline in timelines]
    phases = {op.phase for timeline in timelines for slots in timeline.schedule.order for s in slots for op in s.ops}
    with house_style():
        figure = Figure(figsize=(WIDTH, sum(rows) + LEGEND + 0.4))
        axes = figure.subplots(len(timelines), 2, squeeze=False, width_ratios=(9, 1), height_ratios=rows)
        for (times, bars), timeline in zip(axes, timelines, strict=True):
            _draw(times, timeline, longest, now)
            _keep(bars, timeline, now)
        axes[-1, 0].set_xlabel("time")
        axes[-1, 1].set_xlabel("activations")
        shown = [phase for phase in PHASE_NAMES if phase in phases]
        keys = [Patch(facecolor=PHASE_COLOURS[phase], label=PHASE_NAMES[phase]) for phase in shown]
        keys.append(Patch(facecolor=IDLE, label="idle"))
        if any(is_second(timeline.schedule, box.op) for timeline in timelines for box in boxes(timeline)):
            keys.append(Patch(facecolor=lighter(PHASE_COLOURS["F"]), label="lighter: second stage or other direction"))
        figure.legend(handles=keys, loc="outside lower left", ncols=len(keys), fontsize=11, handlelength=1.2)
    return figure


def _draw(axes: Axes, timeline: Timeline, longest: float, now: float | None) -> None:
    schedule, ranks = timeline.schedule, timeline.schedule.n_ranks
    point = (WIDTH - SIDES) * 72 / longest  # about: a unit of time on paper
    for rank in range(ranks):
        axes.add_patch(Rectangle((0, rank + (1 - HIGH) / 2), timeline.span, HIGH, facecolor=IDLE, gid=f"row-{rank}"))
    for box in boxes(timeline):
        width = box.end - box.start
        axes.add_patch(
            Rectangle(
                (box.start, box.top), width, box.height, facecolor=colour_of(schedule, box.op), edgecolor="white",
                linewidth=0.6, gid=f"{box.rank}:{box.op}",
            )
        )  # fmt: skip
        size = min(LARGEST, (width * point - 1) / (DIGIT * len(str(box.op.microbatch))))
        if size >= SMALLEST:
            middle = (box.start + width / 2, box.top + box.height / 2)
            axes.text(*middle, box.op.microbatch, fontsize=size, ha="center", va="center_baseline", clip_on=True)
    for rank, slots in enumerate(schedule.order):
        for number, slot in enumerate(slots):
            start, end = timeline.start[rank][number], timeline.end[rank][number]
            if len(slot.ops) > 1:
                corner = (start, rank + (1 - HIGH) / 2)
                axes.add_patch(Rectangle(corner, end - start, HIGH, fill=False, edgecolor=BORDER, linewidth=1))
    if now is not None:
        axes.add_patch(Rectangle((now, 0), longest, ranks, facecolor="white", alpha=0.72, zorder=3.5, gid="later"))
        axes.axvline(now, color=NOW, linewidth=2, zorder=4, gid="now")
    axes.set(xlim=(0, longest * 1.002), ylim=(ranks, 0), ylabel="rank")
    axes.set_yticks([rank + 0.5 for rank in range(ranks)], [str(rank) for rank in range(ranks)])
    axes.tick_params(axis="y", length=0)
    axes.set_title(title_of(timeline), fontsize=13)


def _keep(axes: Axes, timeline: Timeline, now: float | None) -> None:
    peaks = timeline.schedule.peak_activations
    kept = peaks if now is None else timeline.held_at(now)
    places = [rank + 0.5 for rank in range(len(peaks))]
    axes.barh(places, peaks, height=HIGH, facecolor="white", edgecolor=QUIET)
    axes.barh(places, kept, height=HIGH, color=COLOURS[0])
    for place, most, count in zip(places, peaks, kept, strict=True):
        inside = count > 0.35 * max(peaks)
        x, side, colour = (count, "right", "white") if inside else (most, "left", BORDER)
        axes.text(x, place, f" {count} ", ha=side, va="center_baseline", color=colour, fontsize=11)
    axes.set(ylim=(len(peaks), 0), xlim=(0, max(peaks) * 1.2), yticks=[], xticks=[])
    axes.spines[["left", "bottom"]].set_visible(False)


def shares_figure(shares: Mapping[str, Mapping[int, float]], title: str) -> Figure:
    """How the bubble's share falls with the number of microbatches: name of a schedule -> microbatches -> share."""
    with house_style():
        figure = Figure(figsize=(9, 4.6))
        axes = figure.subplots()
        for name, colour, marker in zip(shares, COLOURS, "osD^vP", strict=False):
            axes.plot(list(shares[name]), list(shares[name].values()), color=colour, marker=marker, label=name)
        axes.set(xlabel="microbatches", ylabel="idle share of all ranks' time", ylim=(0, None), title=title)
        axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        axes.legend()
    return figure


def overlap_figure(costs: ChunkCosts) -> Figure:
    """A forward and a backward in one slot, part by part: what computes, what communicates meanwhile (Figure 4)."""
    pieces = costs.overlap()
    end = max(piece.end for piece in pieces)
    phases = costs.phases()
    alone = phases.forward + phases.backward
    with house_style():
        figure = Figure(figsize=(WIDTH, 2.6))
        axes = figure.subplots()
        for piece in pieces:
            phase = {"(F)": "F", "(B)": "I", "(W)": "W"}[piece.name[-3:]]
            row, width = (0 if piece.computes else 1), piece.end - piece.start
            axes.add_patch(
                Rectangle(
                    (piece.start, row + 0.07), width, HIGH, facecolor=PHASE_COLOURS[phase], edgecolor="white",
                    gid=f"{piece.name}-{piece.layer}",
                )
            )  # fmt: skip
            part, bracket, sense = piece.name.partition("(")
            if width * (WIDTH - 2) * 72 / end > 7.5 * len(part):  # points, of eleven-point capitals
                label = f"{part}\n{bracket}{sense}"
                axes.text(piece.start + width / 2, row + 0.5, label, ha="center", va="center", fontsize=11)
        axes.set(xlim=(0, end), ylim=(2, 0), xlabel="time", yticks=(0.5, 1.5), yticklabels=("computes", "communicates"))
        axes.tick_params(axis="y", length=0)
        axes.set_title(f"F&B takes {end:.4g}; F and B one after the other {alone:.4g}", fontsize=13)
    return figure
