"""Widget of lesson 12: the parameters of any config as a map of areas."""

from __future__ import annotations

from collections.abc import Mapping

import ipywidgets
from matplotlib.figure import Figure

from dsv3_mini.config import PRESETS, ModelConfig
from dsv3_mini.viz.figures.whole_model import COUNTED, GROUPINGS, treemap_figure
from dsv3_mini.viz.widgets.explorer import Explorer


def treemap_explorer(configs: Mapping[str, ModelConfig] | None = None, model: str | None = None) -> Explorer:
    """Where the parameters of a model are, by part or by layer, all of them or those at work for one token.

    Args:
        configs: configs of your own by name; they stand in the list before the presets.
        model: the name to begin with; the first of your own, or 671b.
    """
    known = {**(configs or {}), **{name: ModelConfig.preset(name) for name in PRESETS if name not in (configs or {})}}
    first = model or next(iter(configs or {}), "671b")

    def draw(model: str, by: str, counted: str, mtp: bool) -> Figure:
        return treemap_figure(model, known[model], by, counted, mtp)

    room = ipywidgets.Layout(width="max-content")
    return Explorer(
        draw,
        "Rectangles whose areas are the parameters of a model, by part or by layer, with the sum of each part beside them.",
        model=ipywidgets.Dropdown(options=tuple(known), value=first, description="model", layout=room),
        by=ipywidgets.Dropdown(options=GROUPINGS, value=GROUPINGS[0], description="by", layout=room),
        counted=ipywidgets.Dropdown(options=COUNTED, value=COUNTED[0], description="parameters", layout=room),
        mtp=ipywidgets.Checkbox(value=False, description="with multi-token prediction"),
    )
