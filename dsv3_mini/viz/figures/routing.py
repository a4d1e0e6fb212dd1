"""Routing as pictures: which experts a token visits, who works for which domain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from dsv3_mini.viz.style import COLOURS, LOAD_MAP, house_style

GATE_MAP = "viridis_r"  # light: a small gate value, dark: a large one
IDLE, EDGE, QUIET = "#F4F4F4", "#BDBDBD", "#5F5F5F"
COLUMNS = 92  # characters in a line of the writer's text


def routing_figure(
    words: Sequence[str],
    chosen: Int[Tensor, "s k"],
    gates: Float[Tensor, "s k"],
    n_experts: int,
    n_group: int,
    layer: int,
) -> Figure:
    """Which experts each token of one text visits in one layer, and with what weight.

    Args:
        words: the text of each token. chosen: the experts of each token. gates: their gate values.
    """
    weight = np.full((n_experts, len(words)), np.nan)
    columns = np.arange(len(words))[:, None]
    weight[chosen.numpy(), columns] = gates.numpy()
    with house_style():
        figure = Figure(figsize=(max(7.0, 0.32 * len(words) + 2), 5.2))
        axes = figure.subplots()
        image = axes.imshow(weight, aspect="auto", cmap=GATE_MAP, vmin=0, origin="lower", interpolation="none")
        for group in range(1, n_group):
            axes.axhline(group * n_experts / n_group - 0.5, color="black", linewidth=0.8)
        axes.set_xticks(range(len(words)), [repr(word)[1:-1] for word in words], rotation=90, fontsize=11)
        axes.set_yticks(range(0, n_experts, max(1, n_experts // 8)))
        axes.set_ylabel("expert (lines part the groups)")
        axes.set_title(f"Layer {layer}: each token's experts")
        figure.colorbar(image, ax=axes, label="gate value", pad=0.01)
    return figure


def load_figure(shares: Mapping[str, Float[Tensor, " e"]], layer: int) -> Figure:
    """How the tokens of each domain spread over the experts of one layer; 1 is an even share."""
    names = list(shares)
    table = np.stack([shares[name].numpy() for name in names])
    with house_style():
        figure = Figure(figsize=(9, 0.6 * len(names) + 2))
        axes = figure.subplots()
        image = axes.imshow(table, aspect="auto", cmap=LOAD_MAP, vmin=0, interpolation="none")
        axes.set_yticks(range(len(names)), names)
        axes.set_xticks(range(table.shape[1]))
        axes.set_xlabel("expert")
        axes.set_title(f"Layer {layer}: who works for which domain")
        figure.colorbar(image, ax=axes, label="load (1 = even)", pad=0.01)
    return figure


def visit_figure(
    words: Sequence[str],
    given: int,
    at: int,
    chosen: Int[Tensor, "l k"],
    gates: Float[Tensor, "l k"],
    n_experts: int,
    n_group: int,
    dense: int,
    following: Sequence[tuple[str, float]] = (),
    largest: float | None = None,
) -> Figure:
    """A text, one of its tokens marked, and the experts that this token visits in each sparse layer.

    Args:
        words: the text of each token. given: how many of them the model was given. at: the marked token.
        chosen, gates: of the marked token, a row for each sparse layer. dense: how many dense layers stand below them.
        following: the likeliest next tokens with their probabilities.
        largest: the gate value that has the darkest colour; None: the largest here.
    """
    places = token_places(words)
    n_lines, n_layers = places[-1][0] + 1, chosen.shape[0]
    text_height, stage_height = 0.21 * n_lines + 0.15, 0.5 * (n_layers + 2) + 0.35
    height = 0.5 + text_height + stage_height
    with house_style():
        figure = Figure(figsize=(9.2, height), layout="none")
        figure.suptitle(
            f"“{visible(words[at])}” visits {chosen.shape[1]} of {n_experts} experts in each sparse layer",
            x=0.02, y=1 - 0.1 / height, ha="left", va="top", fontsize=14, fontweight="bold",
        )  # fmt: skip
        page = figure.add_axes((0.02, stage_height / height, 0.96, text_height / height))
        page.set(xlim=(0, COLUMNS + 4), ylim=(n_lines - 0.3, -0.7))
        page.axis("off")
        for i, (word, (line, column)) in enumerate(zip(words, places, strict=True)):
            mark = {"bbox": {"facecolor": COLOURS[1], "edgecolor": "none", "pad": 1.5}} if i == at else {}
            page.text(column, line, visible(word), family="monospace", fontsize=11, va="center",
                      color=QUIET if i < given else "black", gid=f"token-{i}", **mark)  # fmt: skip
        stage = figure.add_axes((0.02, 0, 0.96, stage_height / height))
        _draw_stage(stage, chosen, gates, n_experts, n_group, dense, following, largest)
    return figure


def visible(word: str) -> str:
    """A token as it can be shown in one line: its line breaks as pilcrows."""
    return word.replace("\n", "¶")


def token_places(words: Sequence[str]) -> list[tuple[int, int]]:
    """Line and column of each token in lines of `COLUMNS` characters; a line break ends a line."""
    line = column = 0
    places = []
    for word in words:
        if column and column + len(word) > COLUMNS:
            line, column = line + 1, 0
        places.append((line, column))
        column += len(word)
        if "\n" in word:
            line, column = line + 1, 0
    return places


def _draw_stage(
    axes: Axes,
    chosen: Int[Tensor, "l k"],
    gates: Float[Tensor, "l k"],
    n_experts: int,
    n_group: int,
    dense: int,
    following: Sequence[tuple[str, float]],
    largest: float | None,
) -> None:
    """Layers from below: the dense ones as a bar, each sparse one as a row of experts with gaps between groups."""
    n_layers = chosen.shape[0]
    colours, top = matplotlib.colormaps[GATE_MAP], largest or float(gates.max())
    axes.set(xlim=(0, 100.5), ylim=(-0.15, n_layers + 2))
    axes.axis("off")
    axes.text(0, 0.35, f"layers 0-{dense - 1}" if dense > 1 else "layer 0", va="center", fontsize=11)
    axes.add_patch(Rectangle((14, 0), 86, 0.7, facecolor=IDLE, edgecolor=EDGE))
    axes.text(57, 0.35, "dense: every token passes through all of it", ha="center", va="center", fontsize=11)
    width = (86 - 1.5 * (n_group - 1)) / n_experts
    for row in range(n_layers):
        weight = dict(zip(chosen[row].tolist(), gates[row].tolist(), strict=True))
        axes.text(0, row + 1.35, f"layer {dense + row}", va="center", fontsize=11)
        for expert in range(n_experts):
            left = 14 + expert * width + 1.5 * (expert // (n_experts // n_group))
            lit = colours(weight[expert] / top) if expert in weight else IDLE
            axes.add_patch(Rectangle((left, row + 1), 0.92 * width, 0.7, facecolor=lit, edgecolor=EDGE,
                                     gid=f"layer-{dense + row}-expert-{expert}"))  # fmt: skip
            if n_experts <= 32:
                dark = expert in weight and weight[expert] / top > 0.4
                axes.text(left + 0.46 * width, row + 1.35, expert, ha="center", va="center", fontsize=11,
                          color="white" if dark else "black" if expert in weight else QUIET)  # fmt: skip
    likely = "    ".join(f"“{visible(word)}” {share:.0%}" for word, share in following)
    axes.text(0, n_layers + 1.35, f"next token    {likely}    (dark: a large gate value)", va="center", fontsize=11)
