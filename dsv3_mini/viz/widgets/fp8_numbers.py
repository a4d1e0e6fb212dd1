"""Widgets of lesson 15: number lines to zoom into, an outlier to drag, and sums with as many bits as one likes."""

from __future__ import annotations

from functools import cache

import ipywidgets
import torch
from matplotlib.figure import Figure
from torch import Tensor

from dsv3_mini.course.fp8_measures import (
    OPERANDS,
    WAYS,
    outlier_reach,
    sum_errors,
    with_outlier,
    zeroed,
)
from dsv3_mini.fp8.formats import E4M3, E5M2, FloatFormat
from dsv3_mini.fp8.quantize import TILE, quantize
from dsv3_mini.viz.figures.fp8_numbers import number_line_figure, outlier_figure, promotion_figure
from dsv3_mini.viz.widgets.explorer import Explorer

EIGHT_BITS = {fmt.name: fmt for fmt in (E4M3, E5M2)}
SIZES = tuple(2.0**power for power in range(0, 29, 2))  # of an outlier
INNERS = (128, 256, 512, 1024, 2048, 4096)
INTERVALS = (32, 64, 128, 256, 512, 1024, 2048)

# ---- number lines ------------------------------------------------------------------------------------------------------


def number_line_explorer() -> Explorer:
    """Where E4M3, E5M2 and E5M6 take a number, seen from as near as one likes, under a scale."""
    return Explorer(
        draw_number_line,
        "The numbers of E4M3, E5M2 and E5M6 around one number, a row of ticks for each format, with a dot where each takes "
        "the number, by how much it is off there, and the step between neighbours.",
        number=ipywidgets.FloatLogSlider(
            value=3.3, base=2, min=-12, max=18, step=0.05, readout_format=".4g", description="the number"
        ),
        zoom=ipywidgets.IntSlider(value=4, min=0, max=9, description="zoom (doublings)"),
        scale=ipywidgets.IntSlider(value=0, min=-12, max=12, description="scale: 2 to the power of"),
    )


def draw_number_line(number: float, zoom: int, scale: int) -> Figure:
    """At zoom 0 the view reaches eight times the number to both sides; each step halves it."""
    return number_line_figure(number, number * 2.0 ** (3 - zoom), 2.0**scale)


# ---- the outlier -------------------------------------------------------------------------------------------------------


def outlier_explorer() -> Explorer:
    """A matrix of normal numbers with one outlier: drag its size and its place, and see whom it spoils."""
    return Explorer(
        draw_outlier,
        "The relative error of each number of a small matrix with an outlier, as two maps: with one scale for all, and with "
        "a scale for each tile. Beside them, curves of the error of all other numbers by the size of the outlier, in FP8 and "
        "in 8-bit whole numbers.",
        size=ipywidgets.SelectionSlider(
            options=[(f"{size:,.0f}" if size < 1e6 else f"{size / 1e6:.1f}M", size) for size in SIZES],
            value=SIZES[9],
            description="the outlier",
        ),
        channel=ipywidgets.IntSlider(value=200, min=0, max=511, description="its channel"),
        token=ipywidgets.IntSlider(value=3, min=0, max=7, description="its token"),
        format=ipywidgets.Dropdown(options=list(EIGHT_BITS), value=E4M3.name, description="format"),
    )


def draw_outlier(size: float, channel: int, token: int, format: str) -> Figure:
    fmt = EIGHT_BITS[format]
    x = with_outlier(size, token, channel)
    made = {name: quantize(x, tile, fmt).dequantize() for name, tile in WAYS.items()}
    errors = {name: error_of_each(x, approximation) for name, approximation in made.items()}
    lost = {name: zeroed(x, approximation) for name, approximation in made.items()}
    whole, tiles = lost.values()
    title = f"An outlier of {size:,.0f} in {format}: one scale loses {whole:.1%} of the numbers, a scale per tile {tiles:.1%}"
    return outlier_figure(errors, _reach(fmt), SIZES, size, (token, channel), TILE, title)


def error_of_each(x: Tensor, approximation: Tensor) -> Tensor:
    """Each number's error, relative to it, at most 1."""
    return ((approximation - x).abs() / x.abs().clamp_min(torch.finfo(torch.float32).tiny)).clamp(max=1)


@cache
def _reach(fmt: FloatFormat) -> dict[str, list[float]]:
    return outlier_reach(SIZES, fmt)


# ---- adding up ---------------------------------------------------------------------------------------------------------


def accumulation_explorer() -> Explorer:
    """The error of long sums on an emulated tensor core: its bits, how often it is promoted, what is multiplied."""
    return Explorer(
        draw_accumulation,
        "The largest error of a sum by the number of its products, added up on the tensor core alone and promoted; beside it "
        "bars for all intervals of promotion at the longest sum.",
        bits=ipywidgets.IntSlider(value=14, min=8, max=18, description="bits kept of a sum"),
        every=ipywidgets.SelectionSlider(
            options=[*[(f"{each:,}", each) for each in INTERVALS], ("never", INNERS[-1])],
            value=128,
            description="promoted every",
        ),
        operands=ipywidgets.Dropdown(
            options=[(text, name) for name, text in OPERANDS.items()], value="normal", description="operands"
        ),
    )


def draw_accumulation(bits: int, every: int, operands: str) -> Figure:
    """No sum is longer than `INNERS[-1]`: promoted every so many is never promoted."""
    longest = INNERS[-1]
    curves = {"never promoted": _curve(longest, bits, operands)}
    if every < longest:
        curves[f"promoted every {every:,}"] = _curve(every, bits, operands)
    by_interval = {each: _error(longest, each, bits, operands) for each in (*INTERVALS, longest)}
    gain = by_interval[longest] / by_interval[every]
    title = f"{bits} bits: at K = {longest:,} a sum is off by up to {by_interval[longest]:.2%}; "
    title += f"promoted every {every:,}, {gain:.3g} times less" if every < longest else "nothing is promoted"
    return promotion_figure(curves, by_interval, every, longest, title)


@cache
def _error(inner: int, every: int, bits: int, operands: str) -> float:
    return float(sum_errors(inner, every, bits, operands).max())


def _curve(every: int, bits: int, operands: str) -> dict[int, float]:
    return {inner: _error(inner, every, bits, operands) for inner in INNERS}
