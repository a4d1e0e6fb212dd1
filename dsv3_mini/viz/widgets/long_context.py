"""Widget of lesson 17: the stretch explorer."""

from __future__ import annotations

import ipywidgets
from matplotlib.figure import Figure

from dsv3_mini.config import ModelConfig, RopeScaling
from dsv3_mini.model.rope import correction_range, frequencies
from dsv3_mini.viz.figures.long_context import stretch_figure
from dsv3_mini.viz.widgets.explorer import Explorer

MODELS = {"tiny (16 dimensions)": 16, "released (64 dimensions)": 64}
CONTEXTS = (64, 208, 832, 4_096, 16_384)
FACTORS = (1, 2, 4, 8, 16, 40)


def stretch_explorer(width: int = 16, trained: int = 208, factor: int = 4) -> Explorer:
    """How fast every pair turns after position interpolation and after YaRN, and where YaRN's ramp lies."""
    return Explorer(
        draw_stretch,
        "The speed of each pair of dimensions after stretching, as a share of its speed in training: position interpolation "
        "slows all alike, YaRN keeps the fast ones and slows the slow ones, with a shaded ramp between.",
        width=ipywidgets.Dropdown(options=MODELS, value=width, description="model"),
        trained=ipywidgets.SelectionSlider(
            options=[(f"{tokens:,}", tokens) for tokens in CONTEXTS], value=trained, description="trained (tokens)"
        ),
        factor=ipywidgets.SelectionSlider(options=FACTORS, value=factor, description="factor"),
        # Steps of four, so that each moves the ramp, whose end is a whole pair: two of eight pairs lie that far apart.
        fast=ipywidgets.SelectionSlider(options=(2, 8, 32), value=32, description="kept from (turns)"),
        slow=ipywidgets.FloatSlider(value=1.0, min=0.25, max=1.75, step=0.25, description="slowed below (turns)"),
    )


def draw_stretch(width: int, trained: int, factor: int, fast: int, slow: float) -> Figure:
    """The figure for a RoPE of this width, theta 10,000, stretched by `factor` from `trained` tokens."""
    scaling = RopeScaling(
        factor=float(factor), original_max_position_embeddings=trained, beta_fast=float(fast), beta_slow=slow
    )
    cfg = ModelConfig.preset(
        "nano", qk_rope_head_dim=width, max_position_embeddings=trained * factor, rope_scaling=scaling
    )
    plain = frequencies(cfg.replace(rope_scaling=None))
    ways = {"as trained": plain, "position interpolation": [w / factor for w in plain], "YaRN": frequencies(cfg)}
    return stretch_figure(ways, trained, *correction_range(cfg, scaling))
