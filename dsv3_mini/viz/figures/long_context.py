"""A context that is stretched, as pictures: angles never seen, frequencies before and after, needles found by depth and length."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from dsv3_mini.evaluate.needle import NeedleGrid
from dsv3_mini.viz.style import COLOURS, LOAD_MAP, house_style

SEEN, UNSEEN, QUIET = COLOURS[0], COLOURS[3], "#777777"
WAYS = {"as trained": QUIET, "position interpolation": COLOURS[1], "YaRN": COLOURS[0]}
MARKS = dict(zip(WAYS, "so^", strict=True))


def angles_figure(frequencies: Sequence[float], trained: int, context: int) -> Figure:
    """Of every pair: the part of the circle that distances up to `trained` reach, and the part that only `context` reaches.

    Args:
        frequencies: radians per position of each pair, fastest first.
    """
    with house_style():
        figure = Figure(figsize=(9, 0.34 * len(frequencies) + 1.7))
        axes = figure.subplots()
        for pair, w in enumerate(frequencies):
            before, after = (min(length * w / (2 * math.pi), 1.0) for length in (trained, context))
            axes.barh(pair, 360 * before, color=SEEN, gid=f"seen-{pair}")
            axes.barh(pair, 360 * (after - before), left=360 * before, color=UNSEEN, hatch="//", edgecolor="white",
                      gid=f"unseen-{pair}")  # fmt: skip
        axes.set(xlim=(0, 360), xlabel="angle between query and key (degrees)", ylabel="pair of dimensions")
        axes.set_xticks(range(0, 361, 60))
        axes.set_yticks(range(len(frequencies)))
        axes.invert_yaxis()
        axes.set_title("The slow pairs would meet angles that training never showed", x=0, ha="left")
        labels = [
            Patch(color=SEEN, label=f"within {trained:,} tokens"),
            Patch(facecolor=UNSEEN, hatch="//", edgecolor="white", label=f"only within {context:,}"),
        ]
        figure.legend(handles=labels, loc="outside lower center", ncols=2)
    return figure


def stretch_figure(ways: Mapping[str, Sequence[float]], trained: int, low: int, high: int) -> Figure:
    """How much slower each pair turns, for each way to stretch, over how often it turned within the trained context.

    Args:
        ways: name (of `WAYS`) -> frequencies in radians per position; the first are those of training.
        low, high: the pairs between which YaRN's ramp runs.
    """
    plain = next(iter(ways.values()))
    pairs = range(len(plain))
    with house_style():
        figure = Figure(figsize=(9, 4.6))
        axes = figure.subplots()
        axes.axvspan(low, min(high, len(plain) - 1), color="#EEEEEE", zorder=0, gid="ramp")
        for name, frequencies in ways.items():
            kept = [w / v for w, v in zip(frequencies, plain, strict=True)]
            axes.plot(pairs, kept, marker=MARKS[name], color=WAYS[name], label=name, gid=name)
        axes.set(ylim=(0, 1.08), ylabel="speed, of what it was in training")
        step = max(1, len(plain) // 8)
        turns = [trained * w / (2 * math.pi) for w in plain]
        axes.set_xticks(pairs[::step], [f"{i}\n{_short(turns[i])}" for i in pairs[::step]])
        axes.set_xlabel(f"pair of dimensions, and its turns within the trained {trained:,} tokens")
        axes.set_title("YaRN keeps what turned often and slows what never came round", x=0, ha="left")
        axes.legend(loc="upper right", bbox_to_anchor=(1.0, 0.95))
    return figure


def needle_figure(grids: Mapping[str, NeedleGrid], trained: int) -> Figure:
    """A heat map for each model: the share of needles answered, by length of the text and depth of the needle."""
    columns = 2 if len(grids) > 1 else 1
    rows = math.ceil(len(grids) / columns)
    with house_style():
        figure = Figure(figsize=(5.2 * columns, 2.9 * rows + 0.8))
        for axes, (name, grid) in zip(figure.subplots(rows, columns, squeeze=False).flat, grids.items(), strict=False):
            shares = [list(column) for column in zip(*grid.shares(), strict=True)]  # [depth][length]
            image = axes.imshow(shares, vmin=0, vmax=1, cmap=LOAD_MAP, aspect="auto", gid=name)
            for i, row in enumerate(shares):
                for j, share in enumerate(row):
                    axes.text(j, i, f"{100 * share:.0f}", ha="center", va="center", fontsize=11,
                              color="black" if share > 0.5 else "white", gid=f"{name}-{i}-{j}")  # fmt: skip
            beyond = sum(length <= trained for length in grid.lengths) - 0.5
            axes.axvline(beyond, color="white", linewidth=3)
            axes.axvline(beyond, color="black", linestyle="--", linewidth=1.5, gid=f"trained-{name}")
            axes.set_xticks(range(len(grid.lengths)), [f"{length:,}" for length in grid.lengths])
            axes.set_yticks(range(len(grid.depths)), [f"{depth:g}" for depth in grid.depths])
            axes.set(xlabel="length of the text (tokens)", ylabel="depth")
            axes.set_title(name, fontsize=12, fontweight="normal")
            axes.spines[:].set_visible(False)
        for axes in figure.axes[len(grids) :]:
            axes.set_visible(False)
        figure.colorbar(image, ax=figure.axes, label="needles answered", pad=0.02)
        figure.suptitle(f"Needles answered, in percent; dashed: the trained {trained:,} tokens",
                        x=0.01, ha="left", fontsize=14, fontweight="bold")  # fmt: skip
    return figure


def _short(turns: float) -> str:
    return f"{turns:,.0f}" if turns >= 10 else f"{turns:.2g}"
