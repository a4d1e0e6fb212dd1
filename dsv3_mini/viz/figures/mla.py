"""Latent attention as pictures: who shares keys and values, what a smaller cache costs, and caches from tiny to 671B."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import NullFormatter, NullLocator

from dsv3_mini.course.card_race import Finish
from dsv3_mini.course.smaller_cache import Measured
from dsv3_mini.viz.figures.ledger import byte_size, short
from dsv3_mini.viz.style import COLOURS, house_style

HEAD, KEY, VALUE, LATENT, QUIET = COLOURS[0], COLOURS[1], COLOURS[5], COLOURS[2], "#777777"
KIND_COLOURS = {"MHA": COLOURS[7], "GQA": COLOURS[1], "MQA": COLOURS[3], "MLA": COLOURS[2]}
BF16 = 2  # bytes


@dataclass(frozen=True)
class Kept:
    """One kind of attention in a model.

    name: MHA, GQA, MQA or MLA. what: what is cached, in two short lines. numbers: those that a token leaves, over all layers.
    weights: parameters of one layer's attention.
    """

    name: str
    what: str
    numbers: int
    weights: int


# ---- who shares what ---------------------------------------------------------------------------------------------------


def group_of(head: int, heads: int, groups: int) -> int:
    """The group whose key and value a head reads: groups serve runs of neighbouring heads."""
    return head * groups // heads


def sharing_figure(heads: int, groups: int) -> Figure:
    """Four kinds of attention: a row of heads that ask, and below it what one token leaves for them."""
    kinds = (
        (f"MHA: {heads} keys and values", heads),
        (f"GQA: {groups} keys and values", groups),
        ("MQA: one key and value", 1),
        ("MLA: a latent and one key", 0),
    )
    with house_style():
        figure = Figure(figsize=(12.5, 3.5))
        for axes, (title, stores) in zip(figure.subplots(1, 4), kinds, strict=True):
            axes.set(xlim=(-0.8, heads - 0.2), ylim=(-0.3, 2.7))
            axes.set_title(title, fontsize=12, fontweight="normal")
            axes.axis("off")
            if stores:
                _stores(axes, heads, stores)
            else:
                _latent(axes, heads)
            axes.plot(range(heads), [2.2] * heads, "o", color=HEAD, markersize=11, zorder=3)
        keys = (
            ("a head asks", {"marker": "o", "linestyle": "", "color": HEAD, "markersize": 10}),
            ("key", {"color": KEY, "linewidth": 9}),
            ("value", {"color": VALUE, "linewidth": 9}),
            ("latent, from which each head rebuilds its own key and value", {"color": LATENT, "linewidth": 9}),
        )
        for label, look in keys:
            figure.axes[0].plot([], [], label=label, **look)
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=11)
        _headline(figure, "As many heads ask; a token leaves fewer numbers for them")
    return figure


def _stores(axes: Axes, heads: int, stores: int) -> None:
    """A key and a value for each group, and a line from every head to its group's."""
    middles = [(group + 0.5) * heads / stores - 0.5 for group in range(stores)]
    for middle in middles:
        for left, colour in ((middle - 0.38, KEY), (middle, VALUE)):
            axes.add_patch(Rectangle((left, 0), 0.38, 0.8, facecolor=colour, zorder=3))
    for head in range(heads):
        axes.plot([head, middles[group_of(head, heads, stores)]], [2.2, 0.8], color=QUIET, linewidth=1, gid="reads")


def _latent(axes: Axes, heads: int) -> None:
    middle = (heads - 1) / 2
    axes.add_patch(Rectangle((middle - 0.9, 0), 1.2, 0.8, facecolor=LATENT, zorder=3))
    axes.add_patch(Rectangle((middle + 0.5, 0), 0.38, 0.8, facecolor=KEY, zorder=3))
    for head in range(heads):
        axes.plot([head, middle - 0.3], [2.2, 0.8], color=LATENT, linewidth=1.5, gid="rebuilds")
        axes.plot([head, middle + 0.69], [2.2, 0.8], color=QUIET, linewidth=0.8, linestyle=":", gid="reads")


# ---- measured ----------------------------------------------------------------------------------------------------------


def cut_figure(curves: Mapping[str, Mapping[int, float]], whole: float, title: str) -> Figure:
    """Loss of a trained model by how many numbers it caches.

    Args:
        curves: way of making the cache smaller -> numbers cached per token and layer -> loss in nats per token.
        whole: the loss of the model as it is.
    """
    with house_style():
        figure = Figure(figsize=(9.5, 4.6))
        axes = figure.subplots()
        _curves(axes, curves)
        axes.axhline(whole, color=QUIET, linestyle=":", linewidth=1, gid="whole")
        axes.annotate(
            "the model as it is", (0.99, whole), (0, -5), xycoords=("axes fraction", "data"),
            textcoords="offset points", ha="right", va="top", color=QUIET,
        )  # fmt: skip
        axes.set(xlabel="numbers cached per token and layer", ylabel="loss (nats per token)", title=title)
        low, high = axes.get_ylim()
        axes.set_ylim(low - 0.08 * (high - low), high)
        axes.legend(loc="upper right")
    return figure


def _curves(axes: Axes, curves: Mapping[str, Mapping[int, float]]) -> None:
    looks = (("o", "-"), ("s", "--"), ("^", ":"), ("D", "-."))
    colours = (LATENT, COLOURS[0], QUIET, KEY)
    for (name, points), (marker, dashes), colour in zip(curves.items(), looks, colours, strict=False):
        cached = sorted(points)
        losses = [points[x] for x in cached]
        axes.plot(cached, losses, marker=marker, linestyle=dashes, color=colour, linewidth=2, label=name)


def race_figure(finishes: Sequence[Finish], title: str) -> Figure:
    """Right answers by cached numbers: a point for every attention, a line for each of the two kinds of cache."""
    with house_style():
        figure = Figure(figsize=(9.5, 4.6))
        axes = figure.subplots()
        latents = sorted((f for f in finishes if f.shape.latent is not None), key=lambda f: f.shape.cached)
        others = sorted((f for f in finishes if f.shape.latent is None), key=lambda f: f.shape.cached)
        for run, marker, colour, label in (
            (others, "s", KEY, "keys and values of groups"),
            (latents, "o", LATENT, "a latent (MLA)"),
        ):
            cached, right = [f.shape.cached for f in run], [100 * f.right for f in run]
            axes.plot(cached, right, marker=marker, markersize=9, color=colour, linewidth=1.5, label=label)
            for f in run:
                groups = f.shape.latent is None  # below their line, the latents above theirs
                axes.annotate(
                    f.shape.name, (f.shape.cached, 100 * f.right), (10, -14) if groups else (-10, 8),
                    textcoords="offset points", ha="left" if groups else "right", fontsize=11, color=QUIET,
                )  # fmt: skip
        axes.set_xscale("log", base=2)
        ticks = sorted({f.shape.cached for f in finishes})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set(xlim=(ticks[0] / 2.2, ticks[-1] * 2.2), ylim=(0, 115), yticks=range(0, 101, 20))
        axes.set(xlabel="numbers cached per card", ylabel="facts answered rightly (%)", title=title)
        axes.legend(loc="lower right")
    return figure


# ---- from tiny to 671B -------------------------------------------------------------------------------------------------


def cache_figure(
    kinds: Sequence[Kept], context: int, title: str, measured: Measured, rank: float, groups: int
) -> Figure:
    """Cache and weights of four kinds of attention in a model; beside them, what such a cut cost the trained tiny model.

    Args:
        kinds: of the model shown. context: tokens that are cached.
        measured: the tiny model's losses. rank: the width of its latent to mark. groups: its groups to mark.
    """
    with house_style():
        figure = Figure(figsize=(13, 4.8))
        cache, weights, loss = figure.subplots(1, 3)
        sizes = [context * BF16 * kind.numbers for kind in kinds]
        _bars(cache, kinds, sizes, [byte_size(size) for size in sizes])
        labels = [f"{kind.name}\n{kind.what}\n{byte_size(BF16 * kind.numbers)}" for kind in kinds]
        cache.set_xticks(range(len(kinds)), labels, fontsize=11)
        cache.set(ylabel="bytes (BF16)", xlabel="last line: what one token leaves, in all layers")
        cache.set_title(f"Cache of {context:,} tokens", fontsize=12, fontweight="normal")
        _bars(weights, kinds, [kind.weights for kind in kinds], [short(kind.weights) for kind in kinds])
        weights.set_xticks(range(len(kinds)), [kind.name for kind in kinds])
        weights.set(ylabel="parameters")
        weights.set_title("Weights of one layer's attention", fontsize=12, fontweight="normal")
        _tiny(loss, measured, rank, groups)
        _headline(figure, title)
    return figure


def extra_loss(measured: Measured, rank: float) -> float:
    """What a latent of that width cost, in nats per token, between two measured widths along a straight line."""
    widths = sorted(measured.cuts)
    losses = [measured.cuts[width] for width in widths]
    return float(np.interp(rank, widths, losses)) - measured.cuts[widths[-1]]


def _tiny(axes: Axes, measured: Measured, rank: float, groups: int) -> None:
    cfg, widths = measured.cfg, sorted(measured.cuts)
    whole = measured.cuts[widths[-1]]
    pair = cfg.qk_head_dim + cfg.v_head_dim
    heads = sorted(measured.averaged)
    cut = [(width + cfg.qk_rope_head_dim, measured.cuts[width] - whole) for width in widths]
    averaged = [(g * pair, measured.averaged[g] - whole) for g in heads]
    axes.plot(
        *zip(*averaged, strict=True), "s--", color=KIND_COLOURS["GQA"], label="heads averaged (GQA)", gid="averaged"
    )
    axes.plot(*zip(*cut, strict=True), "o-", color=LATENT, label="latent cut (MLA)", gid="cut")
    ring = {"marker": "o", "markersize": 17, "markerfacecolor": "none", "markeredgewidth": 2.5, "linestyle": ""}
    here = (rank + cfg.qk_rope_head_dim, extra_loss(measured, rank))
    there = (groups * pair, measured.averaged[groups] - whole)
    axes.plot(*here, color=LATENT, gid="rank", **ring)
    axes.plot(*there, color=KIND_COLOURS["GQA"], gid="groups", **ring)
    for (x, y), name in ((here, "latent"), (there, "heads")):
        axes.annotate(
            f"{name}: +{max(y, 0):.2f}", (x, y), (13, 0), textcoords="offset points", va="center", fontsize=11,
            fontweight="bold",
        )  # fmt: skip
    axes.set(xlabel="numbers cached per token and layer", ylabel="loss added (nats per token)")
    most = max(y for _, y in (*cut, *averaged))
    axes.margins(x=0.15)
    axes.set_ylim(-0.12 * most, 1.45 * most)  # room for the legend
    axes.set_title("The same cut of tiny, not trained again", fontsize=12, fontweight="normal")
    axes.legend(loc="upper right", fontsize=11)


def _bars(axes: Axes, kinds: Sequence[Kept], values: Sequence[float], written: Sequence[str]) -> None:
    for i, (kind, value, text) in enumerate(zip(kinds, values, written, strict=True)):
        axes.bar(i, value, 0.7, color=KIND_COLOURS[kind.name], gid=kind.name)
        axes.annotate(text, (i, value), (0, 3), textcoords="offset points", ha="center", fontsize=11, fontweight="bold")
    axes.set_yscale("log")
    axes.yaxis.set_minor_formatter(NullFormatter())  # the bars carry their numbers
    axes.set_ylim(min(values) / 6, max(values) * 4)


def _headline(figure: Figure, title: str) -> None:
    figure.suptitle(title, fontsize=14, fontweight="bold", x=0.01, ha="left")
