"""A widget of lesson 10: full experts, dropped choices, empty places, by capacity factor."""

from __future__ import annotations

from collections.abc import Mapping

import ipywidgets
from jaxtyping import Int
from matplotlib.figure import Figure
from torch import Tensor

from dsv3_mini.course.capacity import capacity_for
from dsv3_mini.viz.figures.node_limited import capacity_figure
from dsv3_mini.viz.widgets.explorer import Explorer


def dropped_and_empty(load: Int[Tensor, " e"], factor: float) -> tuple[float, float]:
    """The share of the choices that find no place, and the share of the places that stay empty."""
    choices, experts = int(load.sum()), len(load)
    capacity = capacity_for(factor, choices, experts)
    dropped = int((load - capacity).clamp(min=0).sum())
    return dropped / choices, 1 - (choices - dropped) / (capacity * experts)


def capacity_explorer(loads: Mapping[str, Int[Tensor, " e"]]) -> Explorer:
    """Move the capacity factor over one of several loads (name -> choices on each expert)."""

    def draw(batch: str, factor: float) -> Figure:
        load = loads[batch]
        dropped, empty = dropped_and_empty(load, factor)
        title = f"Factor {factor:.2f}: {dropped:.0%} of the choices dropped, {empty:.0%} of the places empty"
        return capacity_figure(load, capacity_for(factor, int(load.sum()), len(load)), title)

    return Explorer(
        draw,
        "Bars of the choices that fell on each expert, cut off by a line at its capacity: what is above it is dropped.",
        batch=ipywidgets.Dropdown(options=list(loads), description="batch"),
        factor=ipywidgets.FloatSlider(value=1.0, min=0.5, max=4.0, step=0.25, description="capacity factor"),
    )
