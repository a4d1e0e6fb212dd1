"""The cache as pictures: what a step reads anew, where brackets stand, who is faster for how many new tokens, a roofline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from dsv3_mini.ledger.decode import Machine, Work
from dsv3_mini.viz.style import COLOURS, house_style

ABSENT, KEPT, COMPUTED = 0, 1, 2
CELL_COLOURS = ("#FFFFFF", "#BBD9EC", COLOURS[0])
CELL_NAMES = ("not written yet", "kept from before", "computed now")
INK, QUIET = "#222222", "#767676"
MARKERS = ("o", "s", "^", "D")
INTENSITIES = (0.3, 3e4)  # FLOP per byte, the roofline's axis
BOUND_COLOURS = {"memory": COLOURS[0], "compute": COLOURS[3]}


# ---- prefill and decode ------------------------------------------------------------------------------------------------


def cells_of(prompt: int, new: int, cached: bool) -> np.ndarray:
    """[step position]: what a position costs in each step of writing `new` tokens after `prompt` of them."""
    table = np.full((new, prompt + new - 1), ABSENT)
    for step in range(new):
        there = prompt + step
        table[step, :there] = COMPUTED
        if cached and step:
            table[step, : there - 1] = KEPT
    return table


def steps_figure(prompt: int, new: int) -> Figure:
    """A row for each step, a column for each position: without a cache, and with one."""
    with house_style():
        figure = Figure(figsize=(11, 4.4))
        panels = figure.subplots(1, 2, sharey=True)
        for axes, cached, name in zip(panels, (False, True), ("without a cache", "with a cache"), strict=True):
            table = cells_of(prompt, new, cached)
            axes.imshow(table, cmap=ListedColormap(CELL_COLOURS), vmin=0, vmax=2, aspect="auto", interpolation="none")
            for edge in range(table.shape[1] + 1):
                axes.axvline(edge - 0.5, color="white", linewidth=1.5)
            for edge in range(new + 1):
                axes.axhline(edge - 0.5, color="white", linewidth=1.5)
            count = int((table == COMPUTED).sum())
            axes.set_title(f"{name}: {count} positions computed", fontsize=12, fontweight="normal")
            axes.set(xlabel="position in the text", xticks=range(0, table.shape[1], 2))
            axes.set_yticks(range(new), [str(step + 1) for step in range(new)])
        panels[0].set_ylabel("step")
        panels[1].add_patch(Rectangle((-0.5, -0.5), prompt, 1, fill=False, edgecolor=COLOURS[1], linewidth=3, zorder=3))
        panels[1].text(prompt - 0.2, 0, "prefill", va="center", color=INK)
        panels[1].text(prompt + 1.8, 2, "decode", va="center", color=INK)
        handles = [
            Patch(facecolor=colour, edgecolor=QUIET, label=name)
            for colour, name in zip(CELL_COLOURS, CELL_NAMES, strict=True)
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=3)
        figure.suptitle("With a cache every token is read once", fontsize=14, fontweight="bold", x=0.01, ha="left")
    return figure


# ---- brackets ----------------------------------------------------------------------------------------------------------


def brackets_figure(nope: int, latent: int, tokens: int) -> Figure:
    """One head's score of one query with `tokens` cached latents, with the brackets in two places; matrices to scale."""
    thin = max(latent, nope) / 22  # how thick a vector is drawn
    gap = 75.0
    q, matrix, cache = ("q", 1, nope), ("W_UK", nope, latent), ("C", latent, tokens)
    rows = (
        ("q (W_UK C): keys first", q, "·", "(", matrix, "·", cache, "=", ("keys", nope, tokens), ")",
         nope * latent * tokens + nope * tokens),
        ("(q W_UK) C: query first", "(", q, "·", matrix, "=", ("q'", 1, latent), ")", "·", cache,
         nope * latent + latent * tokens),
    )  # fmt: skip
    with house_style():
        figure = Figure(figsize=(11, 5.2))
        for axes, (name, *pieces, products) in zip(figure.subplots(2, 1), rows, strict=True):
            x = 0.0
            for piece in pieces:
                if isinstance(piece, str):
                    axes.text(x, 0, piece, ha="center", va="center", fontsize=44 if piece in "()" else 22)
                    x += gap * (1.6 if piece == "(" else 1)
                    continue
                label, height, width = piece
                tall = max(height, thin)
                made = label in ("keys", "q'")
                axes.add_patch(
                    Rectangle(
                        (x, -tall / 2), width, tall, facecolor=COLOURS[1] if made else "#D9E8F2",
                        edgecolor=COLOURS[3] if made else COLOURS[0], linewidth=1.5, gid=f"{name}: {label}",
                    )
                )  # fmt: skip
                where = tall / 2 + latent * 0.05
                axes.text(x + width / 2, where, f"{label}  {height} × {width:,}", ha="center", va="bottom", fontsize=11)
                x += width + gap
            axes.set(xlim=(-60, nope + latent + 2 * tokens + 10 * gap), ylim=(-0.55 * latent, 0.72 * latent))
            axes.set_title(f"{name}, {products:,} multiplications", fontsize=12, fontweight="normal")
            axes.set_aspect("equal")
            axes.axis("off")
        figure.suptitle(
            "The same scores: what is built on the way (orange) is large or small",
            fontsize=14, fontweight="bold", x=0.01, ha="left",
        )  # fmt: skip
    return figure


# ---- the crossing ------------------------------------------------------------------------------------------------------


def crossing_figure(
    counted: Mapping[int, float],
    crossing: float,
    context: int,
    measured: Mapping[str, Mapping[int, float]] | None = None,
) -> Figure:
    """How many times cheaper absorbed is than expanded, by how many tokens are new.

    Args:
        counted: new tokens -> FLOPs of expanded over those of absorbed.
        crossing: where the count is 1. context: tokens in the cache.
        measured: name -> new tokens -> seconds of expanded over those of absorbed.
    """
    with house_style():
        figure = Figure(figsize=(9, 4.6))
        axes = figure.subplots()
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.axhspan(1, 1e4, color=COLOURS[2], alpha=0.10, linewidth=0)
        axes.axhline(1, color=INK, linewidth=1)
        axes.plot(list(counted), list(counted.values()), color=COLOURS[0], linewidth=2.5, label="counted in FLOPs")
        axes.vlines(crossing, 0.2, 1, color=COLOURS[0], linestyle=":", linewidth=1.5)
        marks = zip((measured or {}).items(), (QUIET, COLOURS[3], COLOURS[4]), ("o", "s", "^"), strict=False)
        for (name, ratios), colour, marker in marks:
            axes.plot(list(ratios), list(ratios.values()), marker, color=colour, markersize=9, label=name)
        axes.set(xlim=(0.9, 1.1 * context), ylim=(0.2, 300))
        axes.annotate(
            f"{crossing:.0f} new tokens", (crossing, 0.2), (6, 4), textcoords="offset points", color=COLOURS[0]
        )
        axes.text(1, 1.15, "absorbed is faster", color=INK)
        axes.text(1, 0.87, "expanded is faster", color=INK, va="top")
        ticks = [2**power for power in range(0, context.bit_length(), 2) if 2**power <= context]
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.set_yticks([0.3, 1, 3, 10, 30, 100], ["0.3", "1", "3", "10", "30", "100"])
        axes.minorticks_off()
        axes.set(xlabel=f"new tokens in a step ({context:,} in the cache)", ylabel="expanded / absorbed (times)")
        axes.set_title("Few new tokens: absorb. A large chunk: expand")
        axes.legend(loc="upper right")
    return figure


# ---- the roofline ------------------------------------------------------------------------------------------------------


def roofline_figure(parts: Sequence[Work], machine: Machine, tokens: int, heading: str) -> Figure:
    """The parts of a step under a machine's roof, and how long each of them takes.

    Args:
        parts: what a step consists of. tokens: how many new tokens the step gives or reads.
        heading: what kind of step it is, for the title.
    """
    seconds = [part.seconds(machine) for part in parts]
    longest = max(range(len(parts)), key=seconds.__getitem__)
    with house_style():
        figure = Figure(figsize=(12.5, 5))
        roof, times = figure.subplots(1, 2, width_ratios=(1.15, 1))
        _draw_roof(roof, parts, machine)
        milliseconds = [1e3 * each for each in seconds]
        for i, (part, taken) in enumerate(zip(parts, milliseconds, strict=True)):
            limit = part.limit(machine)
            times.barh(i, taken, color=COLOURS[i], gid=part.name)
            times.text(taken, i, f" {_brief(taken)} ms, {limit}", va="center", ha="left")
        times.set_yticks(range(len(parts)), [part.name for part in parts])
        times.invert_yaxis()
        times.xaxis.set_major_locator(MaxNLocator(4))
        times.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        times.set(xlim=(0, 1.7 * max(milliseconds)), xlabel="time (ms), and what it waits for")
        times.set_title(
            f"{_brief(sum(milliseconds))} ms a step, {tokens / sum(seconds):,.0f} tokens/s",
            fontsize=12, fontweight="normal",
        )  # fmt: skip
        share = seconds[longest] / sum(seconds)
        figure.suptitle(
            f"{heading}: {share:.0%} of the time goes to {parts[longest].name}",
            fontsize=14, fontweight="bold", x=0.01, ha="left",
        )  # fmt: skip
    return figure


def _draw_roof(axes: Axes, parts: Sequence[Work], machine: Machine) -> None:
    across = np.geomspace(*INTENSITIES, 200)
    axes.plot(across, [machine.reached(x) for x in across], color=INK, linewidth=2, gid="roof")
    axes.axvline(machine.ridge, color=QUIET, linestyle=":", linewidth=1.5)
    low = machine.reached(INTENSITIES[0]) / 3
    axes.text(machine.ridge * 0.9, low * 1.3, "waits for memory", ha="right", color=QUIET)
    axes.text(machine.ridge * 1.1, low * 1.3, "waits for compute", ha="left", color=QUIET)
    axes.annotate(
        f"{machine.ridge:.0f}", (machine.ridge, machine.flops_per_second), (-4, 5), textcoords="offset points",
        ha="right", color=QUIET,
    )  # fmt: skip
    # Parts of one intensity lie on one spot: rings of different sizes, so that each can be seen.
    for i, part in enumerate(parts):
        size = 24 - 5.5 * i
        axes.plot(
            part.intensity, machine.reached(part.intensity), MARKERS[i], color=COLOURS[i], markersize=size,
            markeredgecolor="white", label=part.name, gid=part.name, zorder=3 + i, clip_on=False,
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlim=INTENSITIES, ylim=(low, 3 * machine.flops_per_second))
    axes.set(xlabel="intensity (FLOP per byte)", ylabel="FLOP/s within reach")
    axes.set_title(f"{machine.name}: under the roof", fontsize=12, fontweight="normal")
    proxies = [
        Line2D([], [], color=COLOURS[i], marker=MARKERS[i], linestyle="", markersize=9, label=part.name)
        for i, part in enumerate(parts)
    ]
    axes.legend(handles=proxies, loc="upper left", fontsize=11)
    axes.minorticks_off()


def _brief(number: float) -> str:
    """Three digits at most: 0.012, 1.2, 35, 1,240."""
    if number >= 10:
        return f"{number:,.0f}"
    return f"{number:.1f}" if number >= 1 else f"{number:.2g}"
