"""FP8 numbers as pictures: which numbers there are, where one goes, what a scale does, how far an outlier reaches, and what is
lost in adding up."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import NullLocator
from torch import Tensor

from dsv3_mini.fp8.formats import E4M3, E5M2, E5M6, FloatFormat, decode
from dsv3_mini.viz.style import COLOURS, LOAD_MAP, house_style

FORMATS = (E4M3, E5M2, E5M6)
COLOUR = dict(zip((fmt.name for fmt in FORMATS), COLOURS, strict=False))
QUIET, NUMBER = "#777777", "#1a1a1a"
PALE = 0.35  # opacity of the subnormal numbers
MOST_TICKS = 400  # in one row: more are one band
LINES = {"linewidth": 2.2, "markersize": 7}
MARKS = ("o-", "s--", "^:", "D-.")

# ---- which numbers there are -------------------------------------------------------------------------------------------


@cache
def positive_numbers(fmt: FloatFormat) -> Float[np.ndarray, " numbers"]:
    """All finite numbers above zero, smallest first."""
    codes = torch.arange(2 ** (fmt.bits - 1), dtype=torch.uint8 if fmt.bits == 8 else torch.int16)
    values = decode(codes, fmt).double().numpy()
    return np.sort(values[np.isfinite(values) & (values > 0)])


def formats_figure(formats: Sequence[FloatFormat] = FORMATS, unit: float = 2.0) -> Figure:
    """Left the reach of each format on a logarithmic axis, right every number that it has between 0 and `unit`."""
    with house_style():
        figure = Figure(figsize=(12.5, 3.4))
        figure.suptitle("Bits of exponent buy reach, bits of mantissa buy density", x=0.01, ha="left",
                        fontsize=14, fontweight="bold")  # fmt: skip
        reach, near = figure.subplots(1, 2, width_ratios=(5, 6))
        for row, fmt in enumerate(formats):
            colour = COLOUR[fmt.name]
            edges = np.log2([fmt.smallest, fmt.smallest_normal, fmt.largest])
            for low, high, alpha, kind in zip(edges, edges[1:], (PALE, 1.0), ("subnormal", "normal"), strict=False):
                reach.barh(row, high - low, 0.42, low, color=colour, alpha=alpha, gid=f"{fmt.name}-{kind}")
            end = f"{fmt.largest:,.0f}"
            reach.text(edges[-1] + 0.4, row, end, va="center")
            numbers = positive_numbers(fmt)
            within = np.concatenate([[0.0], numbers[numbers <= unit]])
            _ticks(near, within, row, fmt, f"numbers-{fmt.name}")
            near.text(1.02 * unit, row, f"{2 * len(numbers) + 1:,}\nin all", va="center", fontsize=11)
        powers = range(-20, 21, 5)
        reach.set_xticks(powers, [power_of_two(power) for power in powers])
        reach.set(xlim=(-21.5, 22), xlabel="size of a number (logarithmic; pale: subnormal)")
        near.set(xlim=(-0.02 * unit, 1.16 * unit), xlabel=f"every number between 0 and {unit:g} (linear)")
        near.set_xticks(np.linspace(0, unit, 5))
        for axes in (reach, near):
            _rows(axes, [fmt.name for fmt in formats])
    return figure


def power_of_two(exponent: int) -> str:
    return f"$2^{{{exponent}}}$" if exponent else "1"


def _rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names, fontsize=13)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def _ticks(axes: Axes, numbers: Float[np.ndarray, " n"], row: float, fmt: FloatFormat, gid: str) -> None:
    width = 1.6 if len(numbers) < 150 else 0.6
    axes.vlines(numbers, row - 0.28, row + 0.28, color=COLOUR[fmt.name], linewidth=width, gid=gid)


# ---- where one number goes ---------------------------------------------------------------------------------------------


def nearest(number: float, grid: Float[np.ndarray, " n"]) -> float:
    """The nearest of a grid of positive numbers (zero and the negative ones belong to it, too), ties to the even place."""
    whole = np.concatenate([[0.0], grid])  # its places are the codes
    place = int(np.searchsorted(whole, abs(number)))
    if place == len(whole):
        return math.copysign(whole[-1], number)
    below = max(place - 1, 0)
    nearer = min((below, place), key=lambda i: (abs(whole[i] - abs(number)), i % 2))
    return math.copysign(whole[nearer], number)


def number_line_figure(
    number: float, half_width: float, scale: float = 1.0, formats: Sequence[FloatFormat] = FORMATS
) -> Figure:
    """The grids of some formats around one number, and where each takes it.

    Args:
        number: above zero. half_width: how far the view reaches to both sides of it. scale: numbers are divided by it before
            they are rounded and multiplied by it afterwards, so that it stretches the grids.
    """
    low, high = number - half_width, number + half_width
    made = {}
    with house_style():
        figure = Figure(figsize=(12.5, 4.4))
        axes = figure.subplots()
        for row, fmt in enumerate(formats):
            grid = positive_numbers(fmt) * scale
            made[fmt.name] = goes_to = nearest(number, grid)
            _grid(axes, np.concatenate([-grid[::-1], [0.0], grid]), low, high, row, fmt)
            if low <= goes_to <= high:
                axes.plot(goes_to, row, "o", color=NUMBER, markersize=10, zorder=4, gid=f"to-{fmt.name}")
            axes.text(1.01, row, _fate(number, goes_to, grid), transform=axes.get_yaxis_transform(), va="center",
                      gid=f"fate-{fmt.name}")  # fmt: skip
        axes.axvline(number, color=NUMBER, linestyle="--", linewidth=1.5, gid="number")
        axes.set_xlim(low, high)
        axes.set(xlabel="value; the dashed line is the number, a dot where it goes")
        axes.xaxis.get_major_formatter().set_useOffset(False)
        _rows(axes, [fmt.name for fmt in formats])
        under = "" if scale == 1 else f" under a scale of {power_of_two(round(math.log2(scale)))}"
        goes = ", ".join(f"{name} {value:.5g}" for name, value in made.items())
        axes.set_title(f"{number:.5g}{under} becomes: {goes}", x=0, ha="left")
    return figure


def _grid(axes: Axes, grid: Float[np.ndarray, " n"], low: float, high: float, row: float, fmt: FloatFormat) -> None:
    seen = grid[(grid >= low) & (grid <= high)]
    if len(seen) <= MOST_TICKS:
        _ticks(axes, seen, row, fmt, f"grid-{fmt.name}")
        return
    band = Rectangle((seen[0], row - 0.28), seen[-1] - seen[0], 0.56, color=COLOUR[fmt.name], gid=f"band-{fmt.name}")
    axes.add_patch(band)
    axes.text((seen[0] + seen[-1]) / 2, row + 0.12, f"{len(seen):,} numbers", ha="center", color="white", fontsize=11)


def _fate(number: float, goes_to: float, grid: Float[np.ndarray, " n"]) -> str:
    """What a row says at its end."""
    if abs(number) > grid[-1]:
        return f"overflow:\nstops at {goes_to:.5g}"
    if goes_to == 0:
        return f"underflow: zero\nsmallest {grid[0]:.3g}"
    place = int(np.searchsorted(grid, abs(goes_to)))
    step = grid[place] - (grid[place - 1] if place else 0.0)
    return f"off by {(goes_to - number) / number:+.2%}\nstep {step:.4g}"


# ---- what a scale does -------------------------------------------------------------------------------------------------


def sizes_figure(
    table: Mapping[str, Mapping[str, Float[Tensor, "*shape"]]],
    title: str,
    formats: Sequence[FloatFormat] = (E4M3, E5M2),
) -> Figure:
    """How large the numbers of some tensors are, against what formats can hold.

    Args:
        table: a row for each kind of tensor -> a column for each treatment -> its numbers.
    """
    columns = len(next(iter(table.values())))
    with house_style():
        figure = Figure(figsize=(12.5, 1.9 * len(table) + 1.2))
        figure.suptitle(title, x=0.01, ha="left", fontsize=14, fontweight="bold")
        grid = figure.subplots(len(table), columns, squeeze=False, sharex=True, sharey="row")
        for axes, column in zip(grid[0], next(iter(table.values())), strict=True):
            axes.set_title(column, fontsize=12, fontweight="normal")
        for line, (row, treatments) in zip(grid, table.items(), strict=True):
            for axes, numbers in zip(line, treatments.values(), strict=True):
                _sizes(axes, numbers, formats)
            line[0].set_ylabel(f"{row}\n(% of them)")
        powers = range(-32, 17, 8)
        for axes in grid[-1]:
            axes.set_xticks(powers, [power_of_two(power) for power in powers])
            axes.set_xlabel("size of a number")
        spans = [Patch(color=COLOUR[fmt.name], alpha=0.3, label=f"{fmt.name} can hold") for fmt in formats]
        figure.legend(handles=spans, loc="outside lower center", ncols=len(spans))
    return figure


def shares(numbers: Float[Tensor, "*shape"], fmt: FloatFormat) -> tuple[float, float]:
    """Of the numbers that are not zero: which share rounds to zero, and which is beyond the largest."""
    size = numbers[numbers != 0].abs()
    # Half of the smallest number is a tie, and goes to zero, which is even. A tile's largest, divided by its scale, may come
    # out a last bit above what fits; that is not meant.
    return float((size <= fmt.smallest / 2).float().mean()), float((size > 1.000001 * fmt.largest).float().mean())


def _sizes(axes: Axes, numbers: Float[Tensor, "*shape"], formats: Sequence[FloatFormat]) -> None:
    size = np.log2(numbers[numbers != 0].abs().double().numpy())
    counts, edges = np.histogram(size.clip(-35, 18), bins=np.arange(-36, 20))
    axes.bar(edges[:-1], 100 * counts / len(size), 1.0, align="edge", color="#444444", gid="sizes")
    top = 1.0
    for fmt in formats:
        # One band above the other, so that both can be seen; each is a part of the height.
        low, high = math.log2(fmt.smallest), math.log2(fmt.largest)
        axes.axvspan(low, high, top - 1 / len(formats), top, color=COLOUR[fmt.name], alpha=0.3, gid=f"holds-{fmt.name}")
        top -= 1 / len(formats)
    lost, beyond = shares(numbers, formats[0])
    said = f"{formats[0].name}: {lost:.1%} to zero" + (f", {beyond:.1%} too large" if beyond else "")
    axes.text(0.01, 0.97, said, transform=axes.transAxes, va="top", fontsize=11, fontweight="bold", gid="said")
    axes.set(xlim=(-36, 19))
    axes.set_ylim(0, max(axes.get_ylim()[1], 130 * counts.max() / len(size)))


def tiles_figure(rows: int = 4, blocks: int = 3, columns: int = 2, chosen: int = 1) -> Figure:
    """Who shares a scale in a @ b^T: 1x128 tiles of a, 128x128 blocks of b, and one block of K in both.

    Args:
        rows: tokens that are drawn. blocks: of K. columns: blocks of b's rows. chosen: the block of K in colour.
    """
    with house_style():
        figure = Figure(figsize=(12.5, 3.3))
        axes = figure.subplots()
        axes.set(xlim=(-0.9, 2.35 * blocks + 5.2), ylim=(rows + 0.9, -1.1))
        axes.axis("off")
        axes.set_title(
            "One block of K, one scale of a, one of b: a partial sum takes both on its way out", x=0, ha="left"
        )
        _tiles(axes, "a", 0.0, (rows, 1.0), blocks, chosen, COLOURS[0])
        _tiles(axes, "b", blocks + 1.6, (columns, rows / columns), blocks, chosen, COLOURS[1])
        axes.text(-0.12, rows / 2, "tokens", rotation=90, ha="right", va="center")
        axes.text(blocks + 1.48, rows / 2, "outputs", rotation=90, ha="right", va="center")
        axes.text(
            blocks / 2, rows + 0.5, "a: a scale for each 1x128 tile", ha="center", color=COLOURS[0], fontweight="bold"
        )
        axes.text(
            1.5 * blocks + 1.6,
            rows + 0.5,
            "b: one for each 128x128 block",
            ha="center",
            color="#8a5f00",
            fontweight="bold",
        )
        axes.text(2 * blocks + 1.9, rows / 2, "total += partial · scale of a · scale of b", va="center", fontsize=13)
    return figure


def _tiles(axes: Axes, name: str, left: float, rows: tuple[int, float], blocks: int, chosen: int, colour: str) -> None:
    """One matrix: `rows` are how many tiles stand below each other, and how high each is."""
    count, high = rows
    for block in range(blocks):
        axes.text(left + block + 0.5, -0.18, "128 of K", ha="center", fontsize=11, color=QUIET)
        for row in range(count):
            tile = Rectangle((left + block, row * high), 1, high, edgecolor="#333333", linewidth=1.5)
            tile.set(facecolor=colour if block == chosen else "white", gid=f"{name}-{row}-{block}")
            axes.add_patch(tile)


# ---- how far an outlier reaches ----------------------------------------------------------------------------------------


def outlier_figure(
    errors: Mapping[str, Float[Tensor, "r c"]],
    curves: Mapping[str, Sequence[float]],
    sizes: Sequence[float],
    size: float,
    place: tuple[int, int],
    tile: int,
    title: str,
) -> Figure:
    """What one large number does to the others, for each way to scale.

    Args:
        errors: way -> the relative error of each number of a small matrix, 0 to 1. place: of its outlier (row, column).
        curves: way -> the error of all others, for outliers of all `sizes`. size: the one that `errors` has.
        tile: columns of a tile.
    """
    with house_style():
        figure = Figure(figsize=(13, 4.7))
        figure.suptitle(title, x=0.01, ha="left", fontsize=14, fontweight="bold")
        left, right = figure.add_gridspec(1, 2, width_ratios=(6, 5))
        maps = left.subgridspec(len(errors), 1).subplots(sharex=True, squeeze=False)[:, 0]
        for axes, (name, error) in zip(maps, errors.items(), strict=True):
            image = axes.imshow(
                error.numpy(), cmap=LOAD_MAP, vmin=0, vmax=1, aspect="auto", interpolation="nearest", gid="errors"
            )
            for edge in range(tile, error.shape[1], tile):
                axes.axvline(edge - 0.5, color="white", linewidth=1)
            axes.plot(place[1], place[0], "o", markersize=13, markerfacecolor="none", markeredgecolor="#D55E00",
                      markeredgewidth=2.5, gid="outlier")  # fmt: skip
            axes.set_ylabel("token")
            axes.set_title(name, fontsize=12, fontweight="normal")
        maps[-1].set_xticks([*range(0, errors[next(iter(errors))].shape[1], tile)])
        maps[-1].set_xlabel("channel; the ring is the outlier, lines are edges of tiles")
        figure.colorbar(
            image, ax=list(maps), label="error of each number", pad=0.01, ticks=[0, 0.5, 1]
        ).ax.set_yticklabels(["0", "50%", "lost"])
        _reach(figure.add_subplot(right), curves, sizes, size)
    return figure


def _reach(axes: Axes, curves: Mapping[str, Sequence[float]], sizes: Sequence[float], size: float) -> None:
    for (name, values), mark, colour in zip(curves.items(), MARKS, (COLOURS[3], COLOURS[2], QUIET), strict=False):
        axes.plot(
            sizes,
            [100 * value for value in values],
            mark,
            color=colour,
            label=name,
            gid=name,
            markersize=4,
            linewidth=2,
        )
    axes.axvline(size, color=NUMBER, linestyle="--", linewidth=1.2, gid="size")
    axes.set(xscale="log", yscale="log", ylim=(0.5, 200), xlabel="size of the outlier (the others have size 1)")
    axes.set_ylabel("error of all other numbers (%)")
    axes.set_yticks([1, 10, 100], ["1", "10", "100"])
    axes.minorticks_off()
    axes.legend(loc="upper left", fontsize=11)
    axes.set_ylim(0.5, 900)


# ---- adding up ---------------------------------------------------------------------------------------------------------


def sums_figure(curves: Mapping[str, Mapping[int, float]], title: str, mark: float | None = 0.02) -> Figure:
    """The largest error of a sum by how many products it has.

    Args:
        curves: way of adding up -> K -> error, relative to the size of such sums. mark: an error to draw a line at.
    """
    with house_style():
        figure = Figure(figsize=(10, 4.8))
        axes = figure.subplots()
        colours = (COLOURS[3], COLOURS[2], COLOURS[0], QUIET)
        for (name, points), style, colour in zip(curves.items(), MARKS, colours, strict=False):
            inners = sorted(points)
            axes.plot(
                inners, [100 * points[inner] for inner in inners], style, color=colour, label=name, gid=name, **LINES
            )
        ticks = sorted({inner for points in curves.values() for inner in points})
        if mark is not None:
            axes.axhline(100 * mark, color=QUIET, linestyle=":", linewidth=1.5, gid="mark")
            axes.text(ticks[0], 106 * mark, f"{mark:.0%}", va="bottom", color=QUIET)
        axes.set(
            xscale="log", yscale="log", xlabel="K, products in a sum", ylabel="largest error of a sum (%)", title=title
        )
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.legend(loc="upper left")
        low, high = axes.get_ylim()
        axes.set_ylim(low, high * 6)  # room for the legend
    return figure


def promotion_figure(
    curves: Mapping[str, Mapping[int, float]], by_interval: Mapping[int, float], chosen: int, inner: int, title: str
) -> Figure:
    """Left as `sums_figure`; right the error at one K by how often partial sums are promoted.

    Args:
        by_interval: N_C -> error at K = `inner`; N_C = K is never. chosen: the N_C to mark.
    """
    with house_style():
        figure = Figure(figsize=(13, 4.8))
        figure.suptitle(title, x=0.01, ha="left", fontsize=14, fontweight="bold")
        left, right = figure.subplots(1, 2, width_ratios=(6, 5))
        for (name, points), style, colour in zip(curves.items(), MARKS, (COLOURS[3], COLOURS[2]), strict=False):
            inners = sorted(points)
            left.plot(inners, [100 * points[k] for k in inners], style, color=colour, label=name, gid=name, **LINES)
        left.set(xscale="log", yscale="log", xlabel="K, products in a sum", ylabel="largest error of a sum (%)")
        left.set_xticks(inners, [f"{k:,}" for k in inners], fontsize=11)
        left.legend(loc="upper left")
        intervals = sorted(by_interval)
        for place, each in enumerate(intervals):
            lit = each == chosen
            colour = COLOURS[3] if each == inner else COLOURS[2]
            right.bar(
                place, 100 * by_interval[each], 0.7, color=colour, alpha=1.0 if lit else 0.45, gid=f"every-{each}"
            )
            right.annotate(f"{100 * by_interval[each]:.2g}%", (place, 100 * by_interval[each]), (0, 3),
                           textcoords="offset points", ha="center", fontsize=11)  # fmt: skip
        names = [f"{each:,}" if each < inner else "never" for each in intervals]
        right.set_xticks(range(len(intervals)), names)
        right.set(yscale="log", xlabel="promoted every N_C products")
        right.set_title(f"At K = {inner:,}", fontsize=12, fontweight="normal")
        for axes in (left, right):
            axes.xaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.set_ylim(1e-3, 300)
        right.yaxis.set_minor_locator(NullLocator())
    return figure
