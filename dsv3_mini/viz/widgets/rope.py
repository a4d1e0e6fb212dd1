"""Widget of lesson 05: the frequency explorer."""

from __future__ import annotations

import ipywidgets
from matplotlib.figure import Figure

from dsv3_mini.config import ModelConfig
from dsv3_mini.model.rope import frequencies
from dsv3_mini.viz.figures.rope import frequency_figure
from dsv3_mini.viz.widgets.explorer import Explorer

THETAS = (100.0, 1_000.0, 10_000.0, 100_000.0, 1_000_000.0)
WIDTHS = (8, 16, 32, 64, 128)
CONTEXTS = (128, 512, 2_048, 4_096, 16_384, 65_536, 163_840)


def frequency_explorer(width: int = 64, context: int = 4096) -> Explorer:
    """Which distances each pair of dimensions tells apart; it begins with the released model's theta."""
    widths = ipywidgets.SelectionSlider(options=WIDTHS, value=width, description="dimensions")
    pair = ipywidgets.IntSlider(value=min(8, width // 2 - 1), min=0, max=width // 2 - 1, description="pair from near")
    # Before the explorer draws: fewer dimensions have fewer pairs to stand on.
    widths.observe(lambda change: setattr(pair, "max", change["new"] // 2 - 1), names="value")
    return Explorer(
        draw_frequencies,
        "A bar for each pair of dimensions from the smallest distance that it shows to its wavelength, on a logarithmic "
        "axis with the context marked; beside it the cosine of one pair by distance, and the mean over all pairs.",
        theta=ipywidgets.SelectionSlider(
            options=[(f"{theta:,.0f}", theta) for theta in THETAS], value=10_000.0, description="theta"
        ),
        width=widths,
        context=ipywidgets.SelectionSlider(
            options=[(f"{tokens:,}", tokens) for tokens in CONTEXTS], value=context, description="context (tokens)"
        ),
        degrees=ipywidgets.IntSlider(
            value=10, min=5, max=90, step=5, description="smallest turn that counts (degrees)"
        ),
        pair=pair,
    )


def draw_frequencies(theta: float, width: int, context: int, degrees: int, pair: int) -> Figure:
    """The figure for a RoPE of this base and width, not stretched."""
    cfg = ModelConfig.preset("nano", rope_theta=theta, qk_rope_head_dim=width, rope_scaling=None)
    return frequency_figure(frequencies(cfg), context, degrees, pair)
