"""FP8 training as pictures: three products and their tiles, rounding beside the noise of a batch, bytes kept, the loss gap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dsv3_mini.course.fp8_runs import LINE, Off
from dsv3_mini.viz.style import COLOURS, house_style

INK, QUIET = "#222222", "#767676"
SUMMED = "#A34700"  # the axis that a product sums over
GREY = "#444444"  # the run that the others are compared with

# ---- the three products ------------------------------------------------------------------------------------------------

WIDE = 128  # a side of a tile is 1 or this
LINES = 6  # drawn in place of the 128 that a tile has
LENGTHS = {"T": 3, "i": 2, "o": 2}  # of the drawn matrices, in tiles
GAP, ROOM = 1.8, 1.45  # beside and below a matrix, in tiles


@dataclass(frozen=True)
class Operand:
    """A matrix of a product: its two axes by letter, and which rows and columns share a scale (None: it is no FP8)."""

    name: str
    axes: tuple[str, str]
    tile: tuple[int, int] | None
    colour: str


@dataclass(frozen=True)
class Product:
    """left [m k] times right [k n], drawn as on paper, with the sum over k."""

    name: str
    formula: str
    left: Operand
    right: Operand
    result: Operand
    note: str

    @property
    def summed(self) -> str:
        return self.left.axes[1]


X, W, G, RESULT = COLOURS[0], COLOURS[2], COLOURS[1], "#DDDDDD"
PRODUCTS = (
    Product(
        "Fprop", "y = x wᵀ",
        Operand("x", ("T", "i"), (1, WIDE), X),
        Operand("wᵀ", ("i", "o"), (WIDE, WIDE), W),
        Operand("y, BF16", ("T", "o"), None, RESULT),
        "summed over the inputs i:\n128 inputs of a token share a scale",
    ),
    Product(
        "Dgrad", "dx = g w",
        Operand("g", ("T", "o"), (1, WIDE), G),
        Operand("w", ("o", "i"), (WIDE, WIDE), W),
        Operand("dx, BF16", ("T", "i"), None, RESULT),
        "summed over the outputs o:\n128 outputs of a token share a scale;\na square block of w serves both ways",
    ),
    Product(
        "Wgrad", "dw = gᵀ x",
        Operand("gᵀ", ("o", "T"), (1, WIDE), G),
        Operand("x", ("T", "i"), (WIDE, 1), X),
        Operand("dw, FP32", ("o", "i"), None, RESULT),
        "summed over the tokens T:\n128 tokens share a scale, so x and g\nneed other tiles than above",
    ),
)  # fmt: skip


def products_figure(products: Sequence[Product] = PRODUCTS) -> Figure:
    """The matrix products of a linear layer in training, with the tiles of each operand."""
    heights = [max(LENGTHS[p.left.axes[0]], LENGTHS[p.right.axes[0]]) + ROOM for p in products]
    with house_style():
        figure = Figure(figsize=(11, 0.55 * sum(heights) + 0.5))
        axes = figure.subplots()
        axes.set(xlim=(-3.0, 18.0), ylim=(sum(heights) - 0.2, -0.75), aspect="equal")
        axes.set_title("A scale is shared along the axis that is summed over")
        axes.axis("off")
        top = 0.0
        for product, height in zip(products, heights, strict=True):
            axes.text(-2.9, top + 0.55, product.name, fontsize=14, weight="bold", color=INK)
            axes.text(-2.9, top + 1.25, product.formula, fontsize=13, color=INK)
            left = 0.0
            for sign, operand in zip("·= ", (product.left, product.right, product.result), strict=True):
                _draw(axes, operand, product, left, top)
                left += LENGTHS[operand.axes[1]]
                axes.text(left + 0.55, top + 1.0, sign, ha="center", va="center", fontsize=18)
                left += GAP
            axes.text(11.6, top + 0.9, product.note, va="center", fontsize=12, color=INK, linespacing=1.4)
            top += height
    return figure


def tiles_of(operand: Operand) -> list[tuple[float, float, float, float]]:
    """Its tiles as (left, top, width, height), in tiles of 128; one for all where it has none."""
    rows, columns = (LENGTHS[letter] for letter in operand.axes)
    if operand.tile is None:
        return [(0.0, 0.0, float(columns), float(rows))]
    height, width = (1.0 if side == WIDE else 1 / LINES for side in operand.tile)
    return [
        (c * width, r * height, width, height)
        for r in range(round(rows / height))
        for c in range(round(columns / width))
    ]


def _draw(axes: Axes, operand: Operand, product: Product, left: float, top: float) -> None:
    rows, columns = (LENGTHS[letter] for letter in operand.axes)
    for x, y, width, height in tiles_of(operand):
        odd = (round(x / width) + round(y / height)) % 2
        tile = Rectangle((left + x, top + y), width, height, facecolor=operand.colour, alpha=0.85 if odd else 0.45)
        tile.set(edgecolor="white", linewidth=0.8, gid=f"{product.name} {operand.name}")
        axes.add_patch(tile)
    axes.add_patch(Rectangle((left, top), columns, rows, fill=False, edgecolor=INK, linewidth=1))
    axes.text(left + columns / 2, top - 0.1, operand.name, ha="center", va="bottom", fontsize=12, color=INK)
    for letter, start, end, place in (
        (operand.axes[1], (left, top + rows + 0.18), (left + columns, top + rows + 0.18), (columns / 2, rows + 0.28)),
        (operand.axes[0], (left - 0.18, top), (left - 0.18, top + rows), (-0.28, rows / 2)),
    ):
        summed = letter == product.summed
        colour, width = (SUMMED, 2.5) if summed else (QUIET, 1.0)
        axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": width})
        across = place[1] > rows
        axes.text(
            left + place[0], top + place[1], letter, ha="center" if across else "right", va="top" if across else "center",
            color=colour, fontsize=12, weight="bold" if summed else "normal",
        )  # fmt: skip


# ---- what rounding does, and what it costs -----------------------------------------------------------------------------


def noise_figure(rounding: Mapping[str, float], batch: Mapping[str, float], title: str) -> Figure:
    """How far a gradient is off, part by part of the model: through rounding, and because a batch is only a sample.

    Args:
        rounding, batch: part -> size of the difference, relative to the size of the gradient.
    """
    places = np.arange(len(rounding))
    with house_style():
        figure = Figure(figsize=(10, 1.6 + 0.62 * len(rounding)))
        axes = figure.subplots()
        for offset, values, colour, label in (
            (-0.2, rounding, COLOURS[0], "8 bits against 32, the same batch"),
            (0.2, batch, COLOURS[1], "one batch against the next, 32 bits"),
        ):
            bars = axes.barh(places + offset, [100 * value for value in values.values()], height=0.38, color=colour)
            bars.set_label(label)
            axes.bar_label(bars, fmt="{:.3g}%", padding=3, fontsize=11)
        axes.set_yticks(places, list(rounding))
        axes.invert_yaxis()
        axes.set(xscale="log", xlabel="difference, relative to the gradient's size (%)", title=title)
        axes.margins(x=0.15)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def layer_errors_figure(errors: Mapping[str, Mapping[str, Off]], title: str) -> Figure:
    """How far a linear layer's three results are off: variant -> result -> error and what is missing. The first one is grey."""
    results = list(next(iter(errors.values())))
    width = 0.8 / len(errors)
    with house_style():
        figure = Figure(figsize=(11.5, 4.6))
        figure.suptitle(title, x=0.01, ha="left", fontsize=14, fontweight="bold")
        error, missing = figure.subplots(1, 2)
        for number, (name, by_result) in enumerate(errors.items()):
            places = np.arange(len(results)) + (number - (len(errors) - 1) / 2) * width
            colour = GREY if number == 0 else COLOURS[number - 1]
            for axes, field, form in ((error, "error", "{:.2g}%"), (missing, "missing", "{:.2f}%")):
                values = [100 * getattr(by_result[result], field) for result in results]
                bars = axes.bar(places, values, width=0.92 * width, color=colour, label=name)
                axes.bar_label(bars, fmt=form, padding=2, fontsize=11)
        for axes, name in ((error, "Error, all of it"), (missing, "Of that, missing on average")):
            axes.set_xticks(range(len(results)), results)
            axes.set_title(name, fontsize=13)
            axes.set_ylabel("relative to the result (%)")
        error.set(yscale="log", ylim=(0.5, 300))
        error.set_yticks([1, 10, 100], ["1", "10", "100"])
        error.minorticks_off()
        missing.axhline(0, color=QUIET, linewidth=1)
        missing.margins(y=0.15)
        low, high = missing.get_ylim()
        missing.set_ylim(min(low, -5.0), max(high, 5.0))
        figure.legend(*error.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def kept_figure(kept: Mapping[str, Mapping[str, int]], title: str) -> Figure:
    """What the backward pass has to find in memory: a bar for each way, cut by the type of the numbers.

    Args:
        kept: name -> type -> bytes.
    """
    kinds = list(dict.fromkeys(kind for by_kind in kept.values() for kind in by_kind))
    with house_style():
        figure = Figure(figsize=(10, 1.9 + 0.75 * len(kept)))
        axes = figure.subplots()
        for row, by_kind in enumerate(kept.values()):
            start = 0.0
            for kind in kinds:
                size = by_kind.get(kind, 0) / 1024
                bar = axes.barh(row, size, left=start, color=COLOURS[kinds.index(kind)], edgecolor="white", height=0.6)
                if row == 0:
                    bar.set_label(kind)
                start += size
            axes.text(start, row, f" {start:,.0f} KiB", va="center", fontsize=12)
        axes.set_yticks(range(len(kept)), list(kept))
        axes.invert_yaxis()
        axes.set(xlabel="kept for the backward pass (KiB)", title=title)
        axes.margins(x=0.12)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(kinds))
    return figure


# ---- two trainings -----------------------------------------------------------------------------------------------------


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Means over `window` neighbouring values, as many as fit; of all of them where there are fewer."""
    if not len(values):
        return []
    window = min(window, len(values))
    return (np.convolve(values, np.ones(window), mode="valid") / window).tolist()


def gap_of(losses: Sequence[float], base: Sequence[float], window: int) -> list[float]:
    """(loss - base) / base, both smoothed, over the steps that both have."""
    both = min(len(losses), len(base))
    pairs = zip(running_mean(losses[:both], window), running_mean(base[:both], window), strict=True)
    return [own / other - 1 for own, other in pairs]


def gap_figure(
    losses: Mapping[str, Sequence[float]],
    before: Mapping[str, Sequence[float]],
    window: int,
    steps: int,
    title: str,
) -> Figure:
    """Losses of trainings on the same text, and each one's relative distance from the first, beside the report's 0.25%.

    Args:
        losses: name -> loss of each step so far (nats per token), drawn bold. The first is what the others are compared with.
        before: the same of recorded runs, drawn pale. It has that first name too.
        window: steps that a point is the mean of. steps: how long the axis is at least.
    """
    base, names = next(iter(losses)), list(dict.fromkeys([*losses, *before]))
    colours = {base: GREY} | dict(zip([n for n in names if n != base], COLOURS, strict=False))
    longest = max([steps, *(len(values) for values in (*losses.values(), *before.values()))])
    with house_style():
        figure = Figure(figsize=(11.5, 4.5))
        figure.suptitle(title, x=0.01, ha="left", fontsize=14, fontweight="bold")
        loss, gap = figure.subplots(1, 2)
        gap.axhspan(-100 * LINE, 100 * LINE, color="#E3F1EB", zorder=0)
        for side in (-LINE, LINE):
            gap.axhline(100 * side, color=QUIET, linestyle="--", linewidth=1)
        for runs, style in ((before, {"alpha": 0.4, "linewidth": 4}), (losses, {"linewidth": 1.8})):
            for name, values in runs.items():
                points = running_mean(values, window)
                first = min(window, len(values))
                label = name if style.get("alpha") is None else f"{name}, recorded"
                loss.plot(range(first, first + len(points)), points, color=colours[name], label=label, **style)
                if name != base:
                    away = [100 * value for value in gap_of(values, runs[base], window)]
                    gap.plot(range(first, first + len(away)), away, color=colours[name], **style)
        seen = [abs(y) for line in gap.lines[2:] for y in line.get_ydata()]
        reach = max(4 * 100 * LINE, 1.1 * float(np.percentile(seen, 98)) if seen else 0.0)
        gap.set(ylim=(-reach, reach), ylabel="relative to the first run (%)")
        gap.text(longest, 100 * LINE, "0.25% ", ha="right", va="bottom", color=QUIET, fontsize=11)
        loss.set(ylabel="loss (nats per token)")
        for axes, name in ((loss, "Loss"), (gap, "Distance of the losses")):
            axes.set(xlabel=f"step (means of {window})", xlim=(0, longest * 1.01))
            axes.set_title(name, fontsize=13)
        figure.legend(*loss.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure
