"""A widget of lesson 19: what dispatch and combine weigh, and how long they wait, by skew, node limit and format."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import ipywidgets
from jaxtyping import Int
from matplotlib.figure import Figure
from torch import Tensor

from dsv3_mini.parallel.exchange_time import exchange_times
from dsv3_mini.parallel.traffic import Cluster, row_bytes, wire_tables
from dsv3_mini.viz.figures.expert_parallel import wires_figure
from dsv3_mini.viz.widgets.explorer import Explorer

FORMATS = {"BF16": "plain", "FP8": "fp8"}


def wires_explorer(
    cluster: Cluster, route: Callable[[float, int], Int[Tensor, "T k"]], home: Int[Tensor, " T"], width: int
) -> Explorer:
    """Move the routing's skew, the node limit and what tokens travel as.

    Args:
        route: from skew and limit, all tokens' experts. home: each token's GPU. width: of a token's vector.
    """
    chosen_for = cache(route)

    def draw(skew: float, limit: int, tokens_in: str) -> Figure:
        chosen, kind = chosen_for(skew, limit), FORMATS[tokens_in]
        network, _ = wire_tables(cluster, chosen, home)
        received = network.sum(dim=0) * row_bytes(width, kind)[0]
        times = exchange_times(cluster, chosen, home, width, kind)
        total, even = (sum(getattr(part, what) for part in times.values()) for what in ("seconds", "even"))
        title = (
            f"Skew {skew:g}, at most {limit} node{'s' * (limit > 1)}, tokens in {tokens_in}: "
            f"{1e3 * total:.1f} ms, {1 - even / total:.0%} of it waiting"
        )
        return wires_figure(received.double(), cluster.gpus, times, title)

    return Explorer(
        draw,
        "Bars of what each GPU receives over the network in dispatch, with a line at the mean and one at the fullest; beside "
        "them the times of dispatch and combine, over the network and inside nodes, each cut into the time of an even load "
        "and waiting.",
        skew=ipywidgets.FloatSlider(value=0.5, min=0.0, max=3.0, step=0.25, description="skew"),
        limit=ipywidgets.IntSlider(value=4, min=1, max=cluster.nodes, description="nodes at most (M)"),
        tokens_in=ipywidgets.Dropdown(options=list(FORMATS), value="FP8", description="tokens travel in"),
    )
