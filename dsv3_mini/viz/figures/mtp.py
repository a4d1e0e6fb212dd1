"""Multi-token prediction as pictures: the chain of depths, what each depth believes, who knows what, who trains whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from dsv3_mini.viz.style import COLOURS, house_style

STATE, READ, RIGHT, WRONG, QUIET = COLOURS[0], COLOURS[1], COLOURS[2], COLOURS[3], "#777777"
READ_TEXT, WRONG_TEXT = "#7A5200", "#A34700"  # darker, so that letters can be read on white
COLUMNS = 10  # tokens of the text that the ladder shows at a time
LONGEST = 11  # characters of a token that fit a column


@dataclass(frozen=True)
class Rung:
    """What one depth says along a text. Number i of both lists is said at position i, about token i + depth + 1.

    guesses: its likeliest token. right: the probability that it gives to the token which really came.
    """

    depth: int
    guesses: Sequence[str]
    right: Sequence[float]


def depth_name(depth: int) -> str:
    """Depth 0 is the main model."""
    return f"depth {depth}" if depth else "main model"


def chain_figure(words: Sequence[str], depths: int) -> Figure:
    """The chain: a row of boxes for the main model, and above it a shorter one for each depth.

    The box at position i of depth j goes on from the state below it, reads word i + j and predicts word i + j + 1.
    """
    with house_style():
        figure = Figure(figsize=(11, 1.5 + 1.05 * (depths + 1)))
        axes = figure.subplots()
        for j in range(depths + 1):
            for i in range(len(words) - 1 - j):
                _box(axes, i, j)
                axes.text(i, j + 0.13, f"→ {words[i + j + 1]}", ha="center", va="center", color=STATE, weight="bold")
                axes.text(i, j - 0.15, f"reads: {words[i + j]}", ha="center", va="center", color=READ_TEXT, fontsize=11)
                if j:
                    arrow = {"arrowstyle": "-|>", "color": QUIET, "linewidth": 1.5}
                    axes.annotate("", (i, j - 0.34), (i, j - 0.66), arrowprops=arrow)
        axes.set_xticks(range(len(words) - 1), [f"{i}" for i in range(len(words) - 1)])
        axes.set_yticks(range(depths + 1), [depth_name(j) for j in range(depths + 1)])
        axes.set(xlim=(-0.55, len(words) - 1.45), ylim=(-0.5, depths + 0.5), xlabel="position i in the text")
        axes.set_title("Each depth reads one token further, and predicts the one after that")
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
    return figure


def ladder_figure(
    words: Sequence[str],
    rungs: Sequence[Rung],
    position: int,
    read: str,
    best: Sequence[Sequence[tuple[str, float]]],
) -> Figure:
    """The prediction ladder: above, every depth's guess under the token it is about; below, one position's beliefs.

    Args:
        words: the tokens of the text.
        rungs: what each depth says, the main model (depth 0) first.
        position: the position whose predictions are framed. It has room for all depths: position + len(rungs) < len(words).
        read: the token that depth 1 is told to be the next at that position.
        best: for each depth its likeliest tokens there with their probabilities, best first.
    """
    last = min(len(words), max(COLUMNS, position + COLUMNS - 3)) - 1
    first = max(0, last - COLUMNS + 1)
    with house_style():
        figure = Figure(figsize=(12, 3.9 + 0.75 * len(rungs)))
        # Margins by hand: fitting them to so many texts would take longer than drawing does.
        figure.set_layout_engine("none")
        margins = {"left": 0.155, "right": 0.985, "bottom": 0.1, "top": 0.94, "hspace": 0.46, "wspace": 0.42}
        grid = figure.add_gridspec(2, len(rungs), height_ratios=(1.1 + 0.75 * len(rungs), 2.1), **margins)
        axes = figure.add_subplot(grid[0, :])
        _draw_ladder(axes, words, rungs, range(first, last + 1))
        for row in range(len(rungs) + 1):
            place = (position + row - 0.5, -row - 0.5)
            axes.add_patch(Rectangle(place, 1, 1, fill=False, edgecolor="black", linewidth=3, zorder=4, gid="frame"))
        if read != words[position + 1]:
            axes.text(
                position + 1, -0.32, f"read: {_clip(read)}", ha="center", va="center", color=READ_TEXT, fontsize=11
            )
        axes.set_title(f"The ladder from position {position}: each depth says one token further")
        context = f"after {_clip(words[position])}"
        for j, likely in enumerate(best):
            panel = figure.add_subplot(grid[1, j])
            if j:
                context += f" {_clip(read if j == 1 else words[position + j])}"
            _draw_beliefs(panel, likely, words[position + 1 + j])
            panel.set_title(f"{depth_name(j)}, {context}", fontsize=12)
    return figure


def readers_figure(nats: Mapping[str, float], title: str) -> Figure:
    """How surprised several readers are by the same tokens."""
    with house_style():
        figure = Figure(figsize=(10, 1.5 + 0.5 * len(nats)))
        axes = figure.subplots()
        bars = axes.barh(range(len(nats)), list(nats.values()), color=[STATE, STATE] + [QUIET] * (len(nats) - 2))
        axes.bar_label(bars, fmt="%.2f", padding=4)
        axes.set_yticks(range(len(nats)), list(nats))
        axes.invert_yaxis()
        axes.set(xlabel="surprise by the same tokens (nats per token)", title=title)
        axes.set_xlim(0, 1.12 * max(nats.values()))
    return figure


def reach_figure(reached: Mapping[str, Mapping[str, tuple[int, int]]]) -> Figure:
    """Who trains whom: loss -> part of the model -> (tensors that get a gradient, tensors that the part has)."""
    parts = list(next(iter(reached.values())))
    with house_style():
        figure = Figure(figsize=(1.8 + 1.5 * len(parts), 1.6 + 0.6 * len(reached)))
        axes = figure.subplots()
        for y, counts in enumerate(reached.values()):
            for x, part in enumerate(parts):
                got, of = counts[part]
                fill = STATE if got == of else READ if got else "#EEEEEE"
                axes.add_patch(Rectangle((x - 0.48, y - 0.45), 0.96, 0.9, facecolor=fill))
                colour = "white" if got == of else "black"
                axes.text(x, y, f"{got} of {of}", ha="center", va="center", color=colour)
        axes.set_xticks(range(len(parts)), parts)
        axes.set_yticks(range(len(reached)), list(reached))
        axes.set(xlim=(-0.55, len(parts) - 0.45), ylim=(len(reached) - 0.45, -0.55), ylabel="loss of")
        axes.set(xlabel="tensors that get a gradient", title="A depth trains all that stands before it")
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
    return figure


# ---- parts -------------------------------------------------------------------------------------------------------------


def _box(axes: Axes, x: float, y: float) -> None:
    patch = FancyBboxPatch((x - 0.42, y - 0.32), 0.84, 0.64, boxstyle="round,pad=0,rounding_size=0.08")
    patch.set(facecolor="white", edgecolor=STATE, linewidth=2)
    axes.add_patch(patch)


def _draw_ladder(axes: Axes, words: Sequence[str], rungs: Sequence[Rung], columns: range) -> None:
    """A row for the text and one for each depth; what a depth says stands under the token that it is about."""
    blues = matplotlib.colormaps["Blues"]
    for column in columns:
        axes.text(column, 0, _clip(words[column]), ha="center", va="center", weight="bold", gid="word")
        for row, rung in enumerate(rungs, start=1):
            said_at = column - 1 - rung.depth
            if not 0 <= said_at < len(rung.right):
                continue
            share, guess = rung.right[said_at], rung.guesses[said_at]
            cell = Rectangle((column - 0.5, -row - 0.5), 1, 1, facecolor=blues(0.9 * share), edgecolor="white")
            cell.set_gid(f"depth {rung.depth} about {column}")
            axes.add_patch(cell)
            ink = "white" if share > 0.6 else "black" if guess == words[column] else WRONG_TEXT
            axes.text(column, -row + 0.18, _clip(guess), ha="center", va="center", color=ink, fontsize=11)
            axes.text(column, -row - 0.2, f"{share:.2f}", ha="center", va="center", color=ink, fontsize=11)
    names = [f"{depth_name(r.depth)}, {r.depth + 1} back" for r in rungs]
    axes.set_yticks(range(0, -len(rungs) - 1, -1), ["the text", *names])
    axes.set_xticks(list(columns))
    axes.set(xlim=(columns[0] - 0.55, columns[-1] + 0.55), ylim=(-len(rungs) - 0.6, 0.65))
    axes.set_xlabel("position in the text · in a cell: the guess, and the probability given to the token that came")
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _draw_beliefs(axes: Axes, likely: Sequence[tuple[str, float]], came: str) -> None:
    """Bars of the likeliest tokens; the one that came in green."""
    shares = [share for _, share in likely]
    axes.barh(range(len(likely)), shares, color=[RIGHT if token == came else QUIET for token, _ in likely])
    axes.set_yticks(range(len(likely)), [_clip(token) for token, _ in likely])
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel=f"probability (green: {_clip(came)}, which came)")


def _clip(token: str) -> str:
    """A token as far as it fits a column, <|a_special_one|> by its first word. A dollar sign would begin a formula."""
    if token.startswith("<|"):
        token = f"<{token.strip('<|>').split('_')[0]}>"
    token = token if len(token) <= LONGEST else token[: LONGEST - 1] + "…"
    return token.replace("$", r"\$")
