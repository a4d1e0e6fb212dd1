"""A text's way through the experts, in one still picture: the matplotlib twin of the routing explorer.

From above: the text, each token tinted by the domain that its experts serve; the marked token's experts in every sparse
layer, each with a bar of whom it serves; and for one layer the experts of all tokens, a column for each token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
import torch
from einops import einsum, rearrange, reduce
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from dsv3_mini.viz.figures.routing import COLUMNS, EDGE, GATE_MAP, IDLE, QUIET, token_places, visible
from dsv3_mini.viz.style import COLOURS, DOMAIN_COLOURS, house_style

MARK, LINK = "black", COLOURS[4]  # the token where one stands; the expert that one looks at: no domain has these
DARK = 0.4  # of the largest gate value: from here on a tile's number is white


@dataclass(frozen=True)
class Routed:
    """One text on its way through the sparse layers: each token's experts, the one with the largest gate value first."""

    words: Sequence[str]
    chosen: Int[Tensor, "s l k"]
    gates: Float[Tensor, "s l k"]


@dataclass(frozen=True)
class Profile:
    """Whom the experts serve.

    shares: of an expert's visitors, the part that comes from each domain when all domains are read equally often; sums to 1
    over the domains, and is 0 for an expert that nobody visited. often[l][e]: tokens that are often sent to that expert.
    """

    domains: Sequence[str]
    shares: Float[Tensor, "l e n"]
    often: Sequence[Sequence[Sequence[str]]]


def leaning(routed: Routed, profile: Profile) -> Float[Tensor, "s l n"]:
    """For each token and layer, whom its experts serve: their shares, weighed with the token's gate values."""
    layers = rearrange(torch.arange(routed.chosen.shape[1]), "l -> l 1")
    served = profile.shares[layers, routed.chosen]  # [s l k n]
    weight = routed.gates / reduce(routed.gates, "s l k -> s l 1", "sum")
    return einsum(weight, served, "s l k, s l k n -> s l n")


def tints(routed: Routed, profile: Profile) -> tuple[Int[Tensor, "s l"], Float[Tensor, "s l"]]:
    """The domain that a token leans to, and how strongly it is tinted: 0 where all domains are served alike, at most 0.6."""
    most = leaning(routed, profile).max(dim=-1)
    even = 1 / len(profile.domains)
    excess = ((most.values - even) / (1 - even)).clamp(min=0)
    return most.indices, (1.2 * excess).clamp(max=0.6)


def explorer_figure(
    routed: Routed, profile: Profile, at: int, row: int, n_group: int, dense: int, expert: int | None = None
) -> Figure:
    """The explorer's picture.

    Args:
        at: the marked token. row: the sparse layer (counted from 0) that tints the text and that is shown for all tokens.
        dense: how many dense layers stand below. expert: the one that is outlined, in that layer.
    """
    places = token_places(routed.words)
    n_layers, n_experts = profile.shares.shape[:2]
    heights = (0.55, 0.21 * (places[-1][0] + 1) + 0.15, 0.62 * n_layers + 0.1, 0.11 * n_experts + 0.95)
    height = sum(heights)
    bottoms = [height - sum(heights[: i + 1]) for i in range(4)]
    with house_style():
        figure = Figure(figsize=(9.2, height), layout="none")
        figure.suptitle(
            f"Layer {dense + row} sends “{visible(routed.words[at]).strip()}” to experts "
            f"{', '.join(map(str, routed.chosen[at, row].tolist()))}",
            x=0.02, y=1 - 0.12 / height, ha="left", va="top", fontsize=14, fontweight="bold", parse_math=False,
        )  # fmt: skip
        page = figure.add_axes((0.02, bottoms[1] / height, 0.96, heights[1] / height))
        _draw_text(page, routed, profile, places, at, row, expert)
        stage = figure.add_axes((0.02, bottoms[2] / height, 0.96, heights[2] / height))
        _draw_layers(stage, routed, profile, at, row, n_group, dense, expert)
        roll = figure.add_axes((0.1, 0.6 / height, 0.88, (heights[3] - 0.95) / height))
        _draw_roll(roll, routed, at, row, n_experts, n_group, dense, expert)
        names = [Rectangle((0, 0), 1, 1, facecolor=_colour(profile, i)) for i in range(len(profile.domains))]
        figure.legend(
            names, [f"serves {domain}" for domain in profile.domains], loc="lower right", ncols=len(names), fontsize=11,
            borderaxespad=0.1, columnspacing=1.2, handlelength=1.2,
        )  # fmt: skip
    return figure


def _colour(profile: Profile, domain: int) -> str:
    name = profile.domains[domain]
    return DOMAIN_COLOURS.get(name, COLOURS[domain % len(COLOURS)])


def _draw_text(
    axes: Axes,
    routed: Routed,
    profile: Profile,
    places: Sequence[tuple[int, int]],
    at: int,
    row: int,
    expert: int | None,
) -> None:
    """Monospaced lines, a tint behind each token; those that visit the outlined expert are underlined."""
    axes.set(xlim=(0, COLUMNS + 4), ylim=(places[-1][0] + 0.7, -0.7))
    axes.axis("off")
    for i, (word, (line, column)) in enumerate(zip(routed.words, places, strict=True)):
        # A text for each token, not for each line: the advance of a glyph is rounded to pixels, and a line would drift.
        said = axes.text(column, line, visible(word), family="monospace", fontsize=11, va="center", parse_math=False)
        said.set(gid=f"token-{i}", zorder=2)
    domains, strengths = (x[:, row].tolist() for x in tints(routed, profile))
    colours = [to_rgba(_colour(profile, d), s) for d, s in zip(domains, strengths, strict=True)]
    boxes = [
        _box(column, line - 0.42, len(word), 0.84) for word, (line, column) in zip(routed.words, places, strict=True)
    ]
    axes.add_collection(PolyCollection(boxes, facecolors=colours, zorder=1, gid="tints"), autolim=False)
    line, column = places[at]
    here = Rectangle((column, line - 0.44), len(routed.words[at]), 0.88, fill=False, edgecolor=MARK, linewidth=2.5)
    here.set(gid="marked", zorder=3)
    axes.add_patch(here)
    visits = [
        _box(column, line + 0.36, len(word), 0.14)
        for (word, (line, column)), chosen in zip(
            zip(routed.words, places, strict=True), routed.chosen[:, row].tolist(), strict=True
        )
        if expert in chosen
    ]
    axes.add_collection(PolyCollection(visits, facecolors=LINK, zorder=2, gid="visits"), autolim=False)


def _draw_layers(
    axes: Axes,
    routed: Routed,
    profile: Profile,
    at: int,
    row: int,
    n_group: int,
    dense: int,
    expert: int | None,
) -> None:
    """A row of experts for each sparse layer, the lowest layer below; under each expert a bar of whom it serves."""
    n_layers, n_experts = profile.shares.shape[:2]
    ramp, top = matplotlib.colormaps[GATE_MAP], float(routed.gates.max())
    axes.set(xlim=(0, 100.5), ylim=(-0.1, n_layers))
    axes.axis("off")
    step = (90 - 1.2 * (n_group - 1)) / n_experts
    lefts = [10 + e * step + 1.2 * (e // (n_experts // n_group)) for e in range(n_experts)]
    wide = 0.92 * step
    for layer in range(n_layers):
        weight = dict(zip(routed.chosen[at, layer].tolist(), routed.gates[at, layer].tolist(), strict=True))
        bold = "bold" if layer == row else "normal"
        axes.text(0, layer + 0.55, f"layer {dense + layer}", va="center", fontsize=11, fontweight=bold)
        faces = [ramp(weight[e] / top) if e in weight else IDLE for e in range(n_experts)]
        tiles = [_box(left, layer + 0.27, wide, 0.58) for left in lefts]
        name = f"experts-{dense + layer}"
        axes.add_collection(PolyCollection(tiles, facecolors=faces, edgecolors=EDGE, gid=name), autolim=False)
        for e, left in enumerate(lefts if n_experts <= 32 else ()):
            said = f"{e}\n{weight[e]:.2f}" if e in weight and n_experts <= 16 else f"{e}"
            ink = QUIET if e not in weight else "white" if weight[e] / top > DARK else "black"
            axes.text(
                left + wide / 2, layer + 0.56, said, ha="center", va="center", fontsize=11, color=ink, linespacing=0.95
            )
        shares = profile.shares[layer]
        starts = (shares.cumsum(dim=-1) - shares).tolist()
        bars = [
            _box(left + wide * start, layer + 0.08, wide * share, 0.13)
            for left, begins, parts in zip(lefts, starts, shares.tolist(), strict=True)
            for start, share in zip(begins, parts, strict=True)
        ]
        paints = [_colour(profile, domain) for domain in range(len(profile.domains))] * n_experts
        axes.add_collection(PolyCollection(bars, facecolors=paints, gid=f"serves-{dense + layer}"), autolim=False)
    if expert is not None:
        outline = Rectangle((lefts[expert], row + 0.27), wide, 0.58, fill=False, edgecolor=LINK, linewidth=3)
        outline.set_gid("looked-at")
        axes.add_patch(outline)


def _draw_roll(
    axes: Axes, routed: Routed, at: int, row: int, n_experts: int, n_group: int, dense: int, expert: int | None
) -> None:
    """One layer, a column for each token and a row for each expert, coloured by gate value."""
    weight = np.full((n_experts, len(routed.words)), np.nan)
    weight[routed.chosen[:, row].numpy(), np.arange(len(routed.words))[:, None]] = routed.gates[:, row].numpy()
    top = float(routed.gates.max())
    axes.imshow(weight, aspect="auto", cmap=GATE_MAP, vmin=0, vmax=top, interpolation="none", origin="upper")
    for group in range(1, n_group):
        axes.axhline(group * n_experts / n_group - 0.5, color=QUIET, linewidth=0.8)
    if expert is not None:
        lane = Rectangle((-0.5, expert - 0.5), len(routed.words), 1, fill=False, edgecolor=LINK, linewidth=2.5)
        lane.set_gid("lane")
        axes.add_patch(lane)
    axes.add_patch(Rectangle((at - 0.5, -0.5), 1, n_experts, fill=False, edgecolor=MARK, linewidth=2, gid="here"))
    axes.set_yticks(range(0, n_experts, max(1, n_experts // n_group)))
    axes.set(xlabel="token", ylabel=f"expert, layer {dense + row}")
    axes.xaxis.set_label_coords(0.0, -0.14 if n_experts >= 16 else -0.2)
    axes.xaxis.label.set_horizontalalignment("left")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_tick_params(labelsize=11)


def _box(x: float, y: float, width: float, height: float) -> list[tuple[float, float]]:
    """The corners of a rectangle."""
    return [(x, y), (x + width, y), (x + width, y + height), (x, y + height)]
