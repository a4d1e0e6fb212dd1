"""The ledger explorer: slide from a model that trains in seconds to the released one."""

from __future__ import annotations

import functools

from ipywidgets import SelectionSlider
from matplotlib.figure import Figure

from dsv3_mini.config import PRESETS, ModelConfig
from dsv3_mini.ledger import Ledger, ledger
from dsv3_mini.viz.figures.ledger import ledger_figure
from dsv3_mini.viz.widgets.explorer import Explorer

CONTEXTS = tuple(2**power for power in range(8, 18))  # 256 to 131,072


def ledger_explorer(preset: str = "tiny", context: int = 4096) -> Explorer:
    """Parameters, cache and cost of every preset; `set(preset=..., context=...)` moves it."""
    return Explorer(
        draw_ledger,
        "Bars on logarithmic axes for five models from nano to 671b: all and activated parameters, the cache of one "
        "sequence under MHA and MLA, and the dollars of training on the report's tokens.",
        preset=SelectionSlider(options=tuple(PRESETS), value=preset, description="model", continuous_update=False),
        context=SelectionSlider(
            options=[(f"{tokens:,}", tokens) for tokens in CONTEXTS],
            value=context,
            description="context (tokens)",
            continuous_update=False,
        ),
    )


def draw_ledger(preset: str, context: int) -> Figure:
    """The figure with one preset marked, at one context."""
    return ledger_figure(books(context), preset, context)


@functools.cache
def books(context: int) -> dict[str, Ledger]:
    """The ledgers of all presets at one context."""
    return {name: ledger(ModelConfig.preset(name), context) for name in PRESETS}
