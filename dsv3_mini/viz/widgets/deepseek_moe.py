"""Widget of lesson 08 beside the routing explorer: affinities by softmax and by sigmoid, to be pulled at."""

from __future__ import annotations

import ipywidgets
import torch
from matplotlib.figure import Figure

from dsv3_mini.viz.figures.deepseek_moe import gates_figure
from dsv3_mini.viz.widgets.explorer import Explorer

LOGITS = (1.2, 0.3, -0.5, 0.8, -1.5, 0.1, -0.9, 0.5)  # of one token for eight experts
PULLED = 2  # the expert whose logit the reader moves


def logits_with(pulled: float, shift: float) -> torch.Tensor:
    """LOGITS with the pulled expert's replaced, and `shift` added to all."""
    logits = torch.tensor(LOGITS)
    logits[PULLED] = pulled
    return logits + shift


def gate_explorer() -> Explorer:
    """Controls: `pulled` (the logit of expert 2), `shift` (added to all logits), `k` (experts chosen)."""

    def draw(pulled: float, shift: float, k: int) -> Figure:
        return gates_figure(logits_with(pulled, shift), k)

    return Explorer(
        draw,
        "Three bar charts over eight experts: affinities by softmax, by sigmoid, and the gate values of the chosen from each.",
        pulled=ipywidgets.FloatSlider(
            value=LOGITS[PULLED], min=-4, max=4, step=0.5, description=f"logit of expert {PULLED}"
        ),
        shift=ipywidgets.FloatSlider(value=0.0, min=-4, max=4, step=0.5, description="added to all logits"),
        k=ipywidgets.IntSlider(value=3, min=1, max=6, description="experts chosen"),
    )
