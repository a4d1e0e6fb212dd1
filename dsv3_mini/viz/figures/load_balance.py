"""Load balance as pictures: how load spreads over a training, what each way of balancing costs, one moment of a film."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor

from dsv3_mini.course.balance_runs import EVERY, Film
from dsv3_mini.viz.style import COLOURS, LOAD_MAP, house_style

OWN, PLAIN = COLOURS[0], "#999999"
EDGE = "#555555"  # around bars: yellow on white would be lost


class Curve(NamedTuple):
    """A run over its steps: MaxVio (mean of the sparse layers) and loss (nats per token)."""

    steps: Sequence[float]
    max_vio: Sequence[float]
    loss: Sequence[float]


def strips_figure(shares: Mapping[str, Float[Tensor, "frames e"]], most: float, title: str) -> Figure:
    """Load over a training, a strip for each run: expert by step, bright where it is busy.

    Args:
        shares: the name of a run -> load of one layer in even shares (1 = as much as all others). most: brightest share.
    """
    with house_style():
        figure = Figure(figsize=(10, 1.9 * len(shares) + 1.0))
        figure.suptitle(title, x=0.01, ha="left", fontsize=14, fontweight="bold")
        column = figure.subplots(len(shares), 1, squeeze=False, sharex=True)[:, 0]
        for axes, (name, share) in zip(column, shares.items(), strict=True):
            image = _strip(axes, share, most)
            axes.set_title(name, fontsize=12, fontweight="normal")
        column[-1].set_xlabel("step")
        figure.colorbar(image, ax=list(column), label="load (1 = even share)", pad=0.01)
    return figure


def race_figure(curves: Mapping[str, Curve], recorded: Mapping[str, Curve], steps: int, most: float) -> Figure:
    """Balance and loss of several runs: bold what was measured here, pale how it went when the lesson was written.

    Args:
        steps: how long the axis is at least. most: the largest MaxVio that there can be.
    """
    longest = max([steps, *(curve.steps[-1] for curve in curves.values() if curve.steps)])
    with house_style():
        figure = Figure(figsize=(11, 4.4))
        balance, loss = figure.subplots(1, 2)
        for colour, name in zip(COLOURS, recorded, strict=False):
            for axes, field in ((balance, "max_vio"), (loss, "loss")):
                before, own = recorded[name], curves.get(name, Curve([], [], []))
                axes.plot(before.steps, getattr(before, field), color=colour, alpha=0.35, linewidth=5)
                axes.plot(own.steps, getattr(own, field), color=colour, linewidth=1.8, label=name)
        balance.set(title="Balance is what differs ...", ylabel="MaxVio (0 = even)", ylim=(0, most))
        loss.set(title="... the loss hardly does", ylabel="loss (nats per token)")
        for axes in (balance, loss):
            axes.set(xlabel="step", xlim=(0, longest * 1.01))
        figure.legend(*balance.get_legend_handles_labels(), loc="outside lower center", ncols=len(recorded))
    return figure


def sequences_figure(loads: Mapping[str, Float[Tensor, "b e"]], title: str) -> Figure:
    """How the tokens of single sequences spread over the experts: one row a sequence, below them the row of all."""
    with house_style():
        figure = Figure(figsize=(11, 4.8))
        figure.suptitle(title, x=0.01, ha="left", fontsize=14, fontweight="bold")
        axes_by_run = figure.subplots(2, len(loads), squeeze=False, sharex=True, height_ratios=(9, 1))
        most = max(float((load / load.mean(-1, keepdim=True)).max()) for load in loads.values())
        for (above, below), (name, load) in zip(axes_by_run.T, loads.items(), strict=True):
            share, whole = load / load.mean(-1, keepdim=True), load.sum(0)
            style = {"cmap": LOAD_MAP, "vmin": 0, "vmax": most, "aspect": "auto", "interpolation": "none"}
            image = above.imshow(share.numpy(), **style)
            below.imshow((whole / whole.mean())[None].numpy(), **style)
            above.set_title(name, fontsize=12, fontweight="normal")
            above.set_ylabel("sequence")
            below.set(yticks=[0], yticklabels=["all"], xticks=range(load.shape[1]), xlabel="expert")
        figure.colorbar(image, ax=list(axes_by_run.flat), label="load (1 = even share)", pad=0.01)
    return figure


def player_figure(
    film: Film, plain: Film, layer: int, name: str, frame: int, most: float, losses: tuple[float, float]
) -> Figure:
    """One moment of a film: load and bias of every expert, and where that is in the whole run.

    Args:
        plain: the run that nothing balances, drawn grey. layer: which of the film's sparse layers, from 0; name: what it
            is called. most: the load of an expert that every token visits. losses: the loss's axis.
    """
    share, vio, experts = film.share[:, layer], film.max_vio[:, layer], film.load.shape[-1]
    bars = {"color": [COLOURS[e % len(COLOURS)] for e in range(experts)], "edgecolor": EDGE}
    step, steps = (frame + 1) * EVERY, (np.arange(len(film)) + 1) * EVERY
    with house_style():
        figure = Figure(figsize=(11, 6.6))
        moment = f"gamma = {film.gamma:g}, alpha = {film.alpha:g}, {name}, step {step}: MaxVio {vio[frame]:.2f}"
        figure.suptitle(moment, x=0.01, ha="left", fontsize=14, fontweight="bold")
        left, right = figure.add_gridspec(1, 2, width_ratios=(4, 5))
        load, bias = left.subgridspec(2, 1, height_ratios=(6, 5)).subplots()
        strip, balance, loss = right.subgridspec(3, 1).subplots(sharex=True)
        load.bar(range(experts), share[frame].numpy(), **bars)
        load.axhline(1, color="black", linewidth=1)
        load.set(title="Load", ylabel="1 = even share", ylim=(0, most), xticks=range(experts))
        bias.bar(range(experts), film.bias[frame, layer].numpy(), **bars)
        bias.axhline(0, color="black", linewidth=1)
        reach = bias_reach(film)
        bias.set(
            title="Bias", ylabel="added to the score", ylim=(-reach, reach), xticks=range(experts), xlabel="expert"
        )
        _strip(strip, share, most)
        for colour, run, label in ((PLAIN, plain, "left alone"), (OWN, film, "this run")):
            balance.plot(steps, run.max_vio[:, layer].numpy(), color=colour)
            loss.plot(steps, run.loss.numpy(), color=colour, label=label)
        balance.set_ylim(0, most - 1)
        loss.legend(loc="upper right", ncols=2)  # a loss falls: here no line runs through the words
        loss.set(xlabel="step", ylim=losses, xlim=(0, steps[-1]))
        titles = ("Load of the whole run", "MaxVio (0 = even)", "Loss (nats per token)")
        for axes, title in zip((strip, balance, loss), titles, strict=True):
            axes.set_title(title, fontsize=13)
            axes.axvline(step - EVERY / 2, color=COLOURS[3], linewidth=2)
    return figure


def bias_reach(film: Film) -> float:
    """The end of the axis of biases: a little beyond the farthest, and something to see where none moves."""
    return 1.1 * (float(film.bias.abs().max()) or 0.01)


def _strip(axes: Axes, share: Float[Tensor, "frames e"], most: float) -> AxesImage:
    frames, experts = share.shape
    image = axes.imshow(
        share.T.numpy(), aspect="auto", cmap=LOAD_MAP, vmin=0, vmax=most, origin="lower", interpolation="none",
        extent=(0, frames * EVERY, -0.5, experts - 0.5),
    )  # fmt: skip
    axes.set(ylabel="expert", yticks=range(0, experts, max(1, experts // 4)))
    return image
