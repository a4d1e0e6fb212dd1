"""The plain transformer as pictures: its map, who attends to whom, what flows through the stream, and its loss."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from matplotlib.ticker import LogLocator
from torch import Tensor

from dsv3_mini.course.baseline import Signal
from dsv3_mini.viz.style import COLOURS, house_style

STREAM, PART, NORM, QUIET = COLOURS[0], COLOURS[1], COLOURS[5], "#777777"
RECORDED_EVERY = 5  # steps that one number of a recorded curve is the mean of


def decoder_figure(layers: int, width: int) -> Figure:
    """The map of a decoder: a stream that runs through, and two parts a layer that read it and add to it."""
    with house_style():
        figure = Figure(figsize=(11, 3.6))
        axes = figure.subplots()
        axes.set(xlim=(0, 11.4), ylim=(0, 3.5), title="A stream runs through; every part reads it and adds to it")
        axes.axis("off")
        axes.annotate("", (11.0, 0.8), (1.2, 0.8), arrowprops={"arrowstyle": "-|>", "color": STREAM, "linewidth": 5})
        _box(axes, 0.1, 0.4, 1.2, 0.8, "embedding", STREAM)
        for left, name, job in (
            (2.3, "attention", "tokens look at earlier ones"),
            (5.3, "SwiGLU", "each token by itself"),
        ):
            _box(axes, left, 2.0, 0.9, 0.7, "norm", NORM)
            _box(axes, left + 1.15, 2.0, 1.2, 0.7, name, PART)
            axes.text(left + 1.15, 2.85, job, ha="center", color=QUIET)
            _arrow(axes, (left + 0.45, 0.85), (left + 0.45, 2.0))
            _arrow(axes, (left + 0.9, 2.35), (left + 1.15, 2.35))
            _arrow(axes, (left + 1.75, 2.0), (left + 1.75, 1.02))
            axes.plot(left + 1.75, 0.8, "o", markersize=20, color="white", markeredgecolor=STREAM, markeredgewidth=2)
            axes.text(left + 1.75, 0.8, "+", ha="center", va="center", fontsize=16)
        axes.add_patch(Rectangle((2.1, 0.15), 5.85, 3.05, fill=False, linestyle="--", edgecolor=QUIET))
        axes.text(8.05, 2.9, f"× {layers} layers", fontsize=13)
        axes.text(8.05, 1.15, f"{width} numbers\nfor each token", color=STREAM)
        _box(axes, 9.5, 0.45, 0.7, 0.7, "norm", NORM)
        _box(axes, 10.3, 0.45, 0.7, 0.7, "head", STREAM)
    return figure


def attention_figure(words: Sequence[str], weights: Float[Tensor, "s t"], query: int) -> Figure:
    """Who looks at whom: one head's weights, and the row of one query as bars."""
    table = weights.numpy()
    row, late = table[query], float(table[query, query + 1 :].sum())
    with house_style():
        figure = Figure(figsize=(11, 4.4))
        whole, one = figure.subplots(1, 2)
        image = whole.imshow(table, cmap="Blues", vmin=0, vmax=1, interpolation="none")
        whole.add_patch(Rectangle((-0.5, query - 0.5), len(words), 1, fill=False, edgecolor=COLOURS[3], linewidth=3))
        whole.set_xticks(range(len(words)), words, rotation=60, ha="right")
        whole.set_yticks(range(len(words)), words)
        whole.set(title="Each row looks along its columns", xlabel="key (t)", ylabel="query (s)")
        figure.colorbar(image, ax=whole, label="weight")
        colours = [STREAM if t <= query else COLOURS[3] for t in range(len(words))]
        one.bar(range(len(words)), row, color=colours)
        one.set_xticks(range(len(words)), words, rotation=60, ha="right")
        one.set(ylim=(0, 1), ylabel="weight", xlabel="key (t)")
        one.set_title(f"{words[query]!r}: sum {row.sum():.2f}, {late:.2f} on later words")
    return figure


def signal_figure(signals: Mapping[str, Signal], shown: str) -> Figure:
    """Size, likeness and gradient of the stream, layer by layer, in a net that has not learnt yet.

    Args:
        signals: arrangement -> what was measured. shown: the one to draw boldly; the others stay grey behind it.
    """
    panels = (
        ("size", "Size of the states", "root mean square", "log"),
        ("likeness", "How alike tokens are", "mean cosine (1 = all the same)", "linear"),
        ("gradient", "Gradient that arrives", "root mean square", "log"),
    )
    chosen_last = sorted(signals.items(), key=lambda item: item[0] == shown)
    with house_style():
        figure = Figure(figsize=(12, 4.6))
        for axes, (field, title, unit, scale) in zip(figure.subplots(1, 3), panels, strict=True):
            for dashes, (name, signal) in zip(("--", ":", "-"), chosen_last, strict=False):
                values = getattr(signal, field)
                quiet = {"color": "#999999", "linestyle": dashes, "label": name}
                bold = {"color": STREAM, "linewidth": 2.5, "marker": "o", "markersize": 4, "label": name}
                axes.plot(range(len(values)), values, **(bold if name == shown else quiet))
            axes.set(xlabel="after layer", ylabel=unit, yscale=scale)
            axes.set_title(title, fontsize=13)
            axes.minorticks_off()
            if field == "size":
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            if field == "likeness":
                axes.set_ylim(-0.1, 1.05)
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def loss_figure(
    curves: Mapping[str, Sequence[float]],
    recorded: Mapping[str, Sequence[float]],
    vocab_size: int,
    steps: int,
    title: str,
    written: str = "",
) -> Figure:
    """Loss by step: bold what was measured here, pale how it went when the lesson was written.

    Args:
        curves: name -> loss of each step so far, in nats per token.
        recorded: name -> such a run's loss, each number the mean of `RECORDED_EVERY` steps.
        steps: how long the axis is at least. written: a text to print below, what the model writes.
    """
    longest = max([steps, *(len(losses) for losses in curves.values())])
    with house_style():
        figure = Figure(figsize=(9, 5.2 if written else 4.2))
        axes, *below = figure.subplots(2, 1, height_ratios=(5, 1)) if written else [figure.subplots()]
        nothing = math.log(vocab_size)
        axes.axhline(nothing, color=QUIET, linestyle=":", linewidth=1)
        axes.text(
            longest, nothing + 0.1, f"all tokens as likely: ln {vocab_size:,} = {nothing:.1f}", ha="right", color=QUIET
        )
        for colour, name in zip(COLOURS, {**recorded, **curves}, strict=False):
            before = recorded.get(name, ())
            middles = [RECORDED_EVERY * (i + 0.5) for i in range(len(before))]
            axes.plot(middles, before, color=colour, alpha=0.35, linewidth=5, label=f"{name}: as it went for us")
            losses = curves.get(name, ())
            axes.plot(
                range(1, len(losses) + 1),
                losses,
                color=colour,
                linewidth=1.5,
                label=f"{name}: yours, step {len(losses)}",
            )
        axes.set(
            xlim=(0, longest * 1.01),
            ylim=(0, nothing + 1.2),
            xlabel="step",
            ylabel="loss (nats per token)",
            title=title,
        )
        axes.legend(loc="lower left")
        for place in below:
            place.axis("off")
            text = "\n".join(textwrap.wrap(written, 88)[:3])
            place.text(
                0, 1, text, transform=place.transAxes, va="top", fontsize=11, family="monospace", in_layout=False
            )
    return figure


def _box(axes: Axes, x: float, y: float, width: float, height: float, text: str, colour: str) -> None:
    patch = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.02,rounding_size=0.1", facecolor="white")
    patch.set(edgecolor=colour, linewidth=2.5, zorder=3)
    axes.add_patch(patch)
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", zorder=4)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.annotate(
        "", end, start, arrowprops={"arrowstyle": "-|>", "color": np.array([0.3, 0.3, 0.3]), "linewidth": 1.5}
    )
