"""Lesson 18's pictures: what each collective does, a moment of its rounds, times by size, and the memory of ZeRO's stages.

A rank is a row of places, a colour is a rank's numbers: a place with several stripes holds a sum, an empty one nothing. The
digit is the number of the piece.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from dsv3_mini.course.rounds import Film, Piece, State
from dsv3_mini.viz.style import COLOURS, house_style

EMPTY, EDGE, INK, QUIET = "#FFFFFF", "#B8B8B8", "#1A1A1A", "#5F5F5F"
GAP = 0.1  # between two places, of a place


def collectives_figure(films: Sequence[Film]) -> Figure:
    """Each collective in a column: what the ranks hold before, and what they hold afterwards."""
    with house_style():
        figure = Figure(figsize=(12.5, 5.6))
        axes = figure.subplots(2, len(films), squeeze=False)
        for column, film in zip(axes.T, films, strict=True):
            for each, state in zip(column, (film.start, film.state(len(film.rounds))), strict=True):
                draw_state(each, state)
            column[0].set_title(film.name, fontsize=13)
        for row, when in zip(axes, ("before", "after"), strict=True):
            row[0].set_ylabel(when, fontsize=14, fontweight="bold")
            row[0].set_yticks([r + 0.5 for r in range(films[0].ranks)], [f"rank {r}" for r in range(films[0].ranks)])
        figure.suptitle("Five ways to talk to all: a colour for each rank's numbers, stripes where they are added up, digits for pieces",
                        fontsize=14, fontweight="bold", x=0.01, ha="left")  # fmt: skip
    return figure


def moment_figure(film: Film, number: int) -> Figure:
    """What the ranks hold after `number` rounds, with arrows for the next round's messages; and what each has sent."""
    state, sent, most = film.state(number), film.sent(number), max(film.sent(len(film.rounds)))
    with house_style():
        figure = Figure(figsize=(11, 0.62 * film.ranks + 1.5))
        places, bars = figure.subplots(1, 2, width_ratios=(3, 2))
        draw_state(places, state)
        places.set_yticks([r + 0.5 for r in range(film.ranks)], [f"rank {r}" for r in range(film.ranks)])
        if number < len(film.rounds):
            for move in film.rounds[number]:
                ends = ((move.piece + 0.5, move.source + 0.5), (move.place + 0.5, move.target + 0.5))
                places.add_patch(
                    FancyArrowPatch(
                        *ends,
                        arrowstyle="-|>",
                        mutation_scale=13,
                        shrinkA=11,
                        shrinkB=11,
                        color=INK,
                        linewidth=1.6,
                        zorder=5,
                    )
                )
        places.set_title(f"{film.name}: after round {number} of {len(film.rounds)}", fontsize=13)
        bars.barh([r + 0.5 for r in range(film.ranks)], [count / film.ranks for count in sent], 0.7, color=COLOURS[0])
        bars.set(ylim=(film.ranks, 0), xlim=(0, most / film.ranks * 1.06), yticks=[])
        bars.set_xlabel("sent so far, in sizes of a rank's tensor")
    return figure


def draw_state(axes: Axes, state: State) -> None:
    """Rows of places; a place has a stripe for each rank that is in it."""
    for rank, row in enumerate(state):
        for place, piece in enumerate(row):
            corner, size = (place + GAP / 2, rank + GAP / 2), 1 - GAP
            for stripe, colour in enumerate(stripes(piece)):
                wide = size / len(piece.ranks)
                axes.add_patch(
                    Rectangle(
                        (corner[0] + stripe * wide, corner[1]), wide, size, facecolor=colour, gid=f"{rank}:{place}"
                    )
                )
            edge = QUIET if piece.ranks else EDGE
            axes.add_patch(Rectangle(corner, size, size, fill=False, edgecolor=edge, linewidth=0.8))
            if piece.ranks:
                box = {"boxstyle": "circle,pad=0.12", "facecolor": "white", "edgecolor": "none"}
                middle = (place + 0.5, rank + 0.5)
                axes.text(*middle, piece.number, ha="center", va="center", fontsize=11, color=INK, bbox=box)
    axes.set(xlim=(0, len(state[0])), ylim=(len(state), 0), xticks=[], yticks=[], aspect="equal")
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)


def stripes(piece: Piece) -> list[str]:
    return [COLOURS[rank % len(COLOURS)] for rank in piece.ranks]


def times_figure(times: Mapping[str, Mapping[int, float]], title: str) -> Figure:
    """Seconds by bytes, for each way: name -> bytes -> seconds."""
    with house_style():
        figure = Figure(figsize=(9.5, 4.6))
        axes = figure.subplots()
        for (name, curve), colour, marker in zip(times.items(), COLOURS, "osD^vP", strict=False):
            microseconds = [1e6 * seconds for seconds in curve.values()]
            axes.loglog(list(curve), microseconds, color=colour, marker=marker, label=name)
        axes.set(xlabel="bytes of each rank's tensor", ylabel="time (µs)", title=title)
        axes.legend()
    return figure


def memory_figure(held: Mapping[str, Mapping[str, float]], room: float, title: str) -> Figure:
    """Stacked bars: stage -> kind -> bytes on a GPU. `room`: what a GPU has."""
    with house_style():
        figure = Figure(figsize=(9.5, 4.4))
        axes = figure.subplots()
        kinds = list(next(iter(held.values())))
        start = dict.fromkeys(held, 0.0)
        for kind, colour in zip(kinds, (COLOURS[0], COLOURS[1], COLOURS[2]), strict=False):
            widths = [held[stage][kind] / 1e9 for stage in held]
            axes.barh(list(held), widths, left=[start[stage] for stage in held], color=colour, label=kind, height=0.66)
            start = {stage: start[stage] + width for stage, width in zip(held, widths, strict=True)}
        for number, total in enumerate(start.values()):
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}  # the line of the room stays behind it
            axes.text(total + 0.01 * room / 1e9, number, f"{total:.1f} GB", va="center", bbox=box, zorder=5)
        axes.axvline(room / 1e9, color=COLOURS[3], linewidth=2, linestyle="--")
        axes.text(room / 1e9, -0.62, f" a GPU has {room / 1e9:.0f} GB", color="#A34700", va="bottom")
        axes.set(
            xlabel="memory on each GPU (GB)",
            ylim=(len(held) - 0.5, -0.95),
            xlim=(0, max(1.15 * max(start.values()), 1.4 * room / 1e9)),
        )
        axes.set_title(title)
        axes.legend(loc="lower right")
    return figure
