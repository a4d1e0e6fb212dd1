"""Rotary positions as pictures: hands that turn, two layouts, scores by place, and what each frequency tells apart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, FancyBboxPatch, Patch
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from dsv3_mini.viz.style import COLOURS, house_style

HAND, QUIET = COLOURS[0], "#777777"
# What a pair of dimensions sees of a context, with its colour.
ROUND, PART, STILL = "comes round", "part of a turn", "hardly moves"
KINDS = {ROUND: COLOURS[0], PART: COLOURS[1], STILL: "#BBBBBB"}
SHORTEST, LONGEST = 0.05, 1e7  # ends of the explorer's axis, in positions: they stay while its controls move
DECADES = {0.1: "0.1", 1: "1", 10: "10", 100: "100", 1e3: "1k", 1e4: "10k", 1e5: "100k", 1e6: "1M", 1e7: "10M"}
LEAST_CHANGE = 1e-7  # a change of nothing has no place on a logarithmic axis


def clocks_figure(frequencies: Sequence[float], pairs: Sequence[int], positions: Sequence[int]) -> Figure:
    """A dial for each of some pairs (rows) at some positions (columns).

    Args:
        frequencies: radians per position of every pair. pairs: which of them to draw.
    """
    with house_style():
        figure = Figure(figsize=(0.7 * len(positions) + 1.8, 0.7 * len(pairs) + 0.9))
        axes = figure.subplots()
        axes.set(xlim=(-2.5, len(positions) - 0.4), ylim=(0.5 - len(pairs), 1.0), aspect="equal")
        axes.set_title("Each pair is a hand that turns at its own speed")
        axes.axis("off")
        axes.text(-2.5, 0.65, "position", va="center", color=QUIET)
        for column, position in enumerate(positions):
            axes.text(column, 0.65, f"{position:,}", ha="center", va="center", color=QUIET)
        for row, pair in enumerate(pairs):
            wavelength = 2 * math.pi / frequencies[pair]
            axes.text(-2.5, -row, f"pair {pair}\nround in {wavelength:,.0f}", va="center")
            for column, position in enumerate(positions):
                angle = position * frequencies[pair]
                x, y = column + 0.36 * math.cos(angle), -row + 0.36 * math.sin(angle)
                axes.add_patch(Circle((column, -row), 0.4, facecolor="white", edgecolor=QUIET))
                axes.plot([column, x], [-row, y], color=HAND, linewidth=2.5, gid=f"hand-{pair}-{position}")
    return figure


def stripes_figure(tables: Mapping[str, Float[Tensor, "s t"]]) -> Figure:
    """The score of one query vector at each place with one key vector at each place, a table for each kind of position."""
    largest = max(float(table.abs().max()) for table in tables.values())
    with house_style():
        figure = Figure(figsize=(10, 4.4))
        figure.suptitle("Turned vectors see the distance alone: every diagonal has one colour",
                        x=0.01, ha="left", fontsize=14, fontweight="bold")  # fmt: skip
        for axes, (name, table) in zip(figure.subplots(1, len(tables), squeeze=False)[0], tables.items(), strict=True):
            image = axes.imshow(table.numpy(), cmap="PuOr", vmin=-largest, vmax=largest, interpolation="none")
            axes.set(xlabel="position of the key (t)", ylabel="position of the query (s)")
            axes.set_title(name, fontsize=12, fontweight="normal")
        figure.colorbar(image, ax=figure.axes, label="score", pad=0.01)
    return figure


def layout_figure(width: int) -> Figure:
    """Both orders of the same dimensions, a colour for each pair, and a line from every old place to its new one."""
    orders = {"neighbours": list(range(width)), "halves": [*range(0, width, 2), *range(1, width, 2)]}
    with house_style():
        figure = Figure(figsize=(8, 2.6))
        axes = figure.subplots()
        axes.set(xlim=(-2.2, width - 0.4), ylim=(-0.3, 1.4), title="The same pairs of dimensions in two orders")
        axes.axis("off")
        for y, (name, dimensions) in zip((1, 0), orders.items(), strict=True):
            axes.text(-2.2, y, name, va="center")
            for place, dimension in enumerate(dimensions):
                colour = COLOURS[dimension // 2 % len(COLOURS)]
                box = FancyBboxPatch((place - 0.33, y - 0.2), 0.66, 0.4, boxstyle="round,pad=0,rounding_size=0.08")
                box.set(facecolor="white", edgecolor=colour, linewidth=3, gid=f"{name}-{place}")
                axes.add_patch(box)
                axes.text(place, y, str(dimension), ha="center", va="center", gid=f"{name}-number-{place}")
                if name == "halves":
                    axes.plot([dimension, place], [0.78, 0.22], color=colour, linewidth=2, gid=f"move-{dimension}")
    return figure


def cost_figure(costs: Mapping[str, float]) -> Figure:
    """What each way to place the tokens costs a trained model; the first is as it was trained."""
    names = list(costs)
    with house_style():
        figure = Figure(figsize=(9, 0.45 * len(names) + 1.5))
        axes = figure.subplots()
        axes.barh(names, list(costs.values()), color=[COLOURS[2], *[COLOURS[0]] * (len(names) - 1)])
        axes.axvline(costs[names[0]], color=QUIET, linestyle=":")
        for row, value in enumerate(costs.values()):
            axes.text(value, row, f" {value:.2f}", va="center")
        axes.invert_yaxis()
        axes.set(xlabel="loss on stories it never saw (nats per token)", xlim=(0, 1.15 * max(costs.values())))
        axes.set_title("A shift is free; a change of distances or layout is not", x=0, ha="left")
    return figure


def shift_figure(shifts: Sequence[int], changes: Mapping[str, Sequence[float]]) -> Figure:
    """How much a common shift of all positions changes a trained model's logits, for each precision of the angles."""
    with house_style():
        figure = Figure(figsize=(9, 4))
        axes = figure.subplots()
        for marker, (name, values) in zip("os^", changes.items(), strict=False):
            axes.plot(shifts, np.maximum(values, LEAST_CHANGE), marker=marker, label=name)
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="all positions shifted by (tokens)",
            ylabel="mean change of a logit",
            title="A shift changes nothing, as far as the numbers reach",
        )
        axes.set_xticks(list(shifts), [DECADES.get(shift, f"{shift:,}") for shift in shifts])
        axes.minorticks_off()
        axes.legend()
    return figure


# ---- the frequency explorer --------------------------------------------------------------------------------------------


def reach(
    frequencies: Sequence[float], degrees: float
) -> tuple[Float[np.ndarray, " pairs"], Float[np.ndarray, " pairs"]]:
    """Between which distances, in positions, each pair tells places apart.

    Returns the step that turns the pair by `degrees`, and its wavelength, after which it reads the same again.
    """
    wavelength = 2 * np.pi / np.asarray(frequencies, dtype=np.float64)
    return wavelength * degrees / 360, wavelength


def kinds(frequencies: Sequence[float], context: int, degrees: float) -> list[str]:
    """For each pair: it comes round within the context, it makes part of a turn, or less than `degrees` of one."""
    return [
        ROUND if wavelength <= context else PART if step <= context else STILL
        for step, wavelength in zip(*reach(frequencies, degrees), strict=True)
    ]


def frequency_figure(frequencies: Sequence[float], context: int, degrees: float, pair: int) -> Figure:
    """Which distances every pair of dimensions tells apart, one pair from near, and all of them together.

    Args:
        frequencies: radians per position of each pair, fastest first.
        context: tokens. degrees: the smallest turn that counts as a difference. pair: the one shown from near.
    """
    names = kinds(frequencies, context, degrees)
    with house_style():
        figure = Figure(figsize=(10, 4.9))
        grid = figure.add_gridspec(2, 2, width_ratios=(6, 5))
        _ruler(figure.add_subplot(grid[:, 0]), frequencies, names, context, degrees, pair)
        _one_pair(figure.add_subplot(grid[0, 1]), frequencies[pair], names[pair], context, pair)
        _all_pairs(figure.add_subplot(grid[1, 1]), frequencies, context)
        counts = {kind: names.count(kind) for kind in KINDS}
        figure.suptitle(
            f"Of {len(names)} pairs, {counts[ROUND]} come round within {context:,} tokens; "
            f"{counts[PART]} make part of a turn, {counts[STILL]} hardly move",
            x=0.01, ha="left", fontsize=13, fontweight="bold",
        )  # fmt: skip
        labels = [
            *[Patch(color=colour, label=kind) for kind, colour in KINDS.items()],
            Line2D([], [], color="black", linestyle=":", label="the next token"),
            Line2D([], [], color="black", linestyle="--", label="the context"),
        ]
        figure.legend(handles=labels, loc="outside lower center", ncols=len(labels))
    return figure


def _ruler(
    axes: Axes, frequencies: Sequence[float], names: Sequence[str], context: int, degrees: float, pair: int
) -> None:
    """A bar for each pair, from the smallest step that it shows to the distance at which it reads the same again."""
    step, wavelength = reach(frequencies, degrees)
    for row, kind in enumerate(names):
        edge = {"edgecolor": "black", "linewidth": 2} if row == pair else {}
        axes.barh(row, wavelength[row] - step[row], 0.8, step[row], color=KINDS[kind], gid=f"pair-{row}", **edge)
    axes.axvline(1, color="black", linestyle=":", zorder=0)
    axes.axvline(context, color="black", linestyle="--", zorder=0)
    axes.set(xscale="log", xlim=(SHORTEST, LONGEST), ylim=(len(names) - 0.4, -0.6))
    axes.set(xlabel="distance (tokens)", ylabel="pair of dimensions")
    axes.set_xticks(list(DECADES), list(DECADES.values()))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))  # there is no pair 0.5
    axes.set_title(f"Told apart: from a turn of {degrees:g}° to a whole one", fontsize=12, fontweight="normal")
    axes.minorticks_off()


def _one_pair(axes: Axes, frequency: float, kind: str, context: int, pair: int) -> None:
    wavelength = 2 * math.pi / frequency
    distance = np.linspace(0, min(context, 3 * wavelength), 400)
    colour = KINDS[kind] if kind != STILL else QUIET
    axes.plot(distance, np.cos(distance * frequency), color=colour, linewidth=2, gid="one pair")
    seen = (
        f"the same again after {wavelength:,.0f} tokens" if kind == ROUND else f"{context / wavelength:.0%} of a turn"
    )
    axes.set(xlabel="distance (tokens)", ylabel="cosine", ylim=(-1.1, 1.1))
    axes.set_title(f"Pair {pair}: {seen}", fontsize=12, fontweight="normal")


def _all_pairs(axes: Axes, frequencies: Sequence[float], context: int) -> None:
    distance = np.unique(np.geomspace(1, context, 240).round())
    score = np.cos(np.outer(distance, frequencies)).mean(axis=1)
    axes.plot(distance, score, color="black", linewidth=1.2, gid="all pairs")
    axes.axhline(0, color=QUIET, linewidth=0.8)
    axes.set(xscale="log", xlabel="distance (tokens)", ylabel="mean cosine", ylim=(-1.1, 1.1))
    within = {place: name for place, name in DECADES.items() if 1 <= place <= context}
    axes.set_xticks(list(within), list(within.values()))
    axes.set_title("All pairs: a key equal to the query", fontsize=12, fontweight="normal")
    axes.minorticks_off()
