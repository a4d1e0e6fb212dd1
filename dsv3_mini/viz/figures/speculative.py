"""Speculative decoding as pictures: the rule for drawn text, tokens per pass, what a wider pass costs, and a text's progress."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dsv3_mini.viz.style import COLOURS, house_style

MAIN, DRAFT, KEPT, FELL = COLOURS[0], COLOURS[1], COLOURS[2], COLOURS[3]
REPORTED = (0.85, 0.90)  # acceptance of the second token, by the report


def rule_figure(words: Sequence[str], p: Sequence[float], q: Sequence[float]) -> Figure:
    """Two distributions over a few tokens: what both have is kept, what q has too much falls, what it lacks replaces that.

    Args:
        p: of the main model. q: of the drafter.
    """
    x = np.arange(len(words))
    p_, q_ = np.asarray(p), np.asarray(q)
    both = np.minimum(p_, q_)
    with house_style():
        figure = Figure(figsize=(10, 4.2))
        axes = figure.subplots()
        axes.bar(x, both, 0.7, color=KEPT, label="kept: min(p, q)", gid="kept")
        falls = {"color": "white", "edgecolor": FELL, "hatch": "//", "linewidth": np.where(q_ > p_, 1.0, 0.0)}
        axes.bar(x, q_ - both, 0.7, bottom=both, label="falls: max(q - p, 0)", **falls)
        axes.bar(x, p_ - both, 0.7, bottom=both, color=MAIN, label="put in its place: max(p - q, 0)")
        axes.set_xticks(x, [word.replace("$", r"\$") for word in words])
        axes.set(ylabel="probability", title="What falls is exactly as much as what is lacking")
        axes.legend()
    return figure


def tokens_per_pass_figure(measured: Mapping[int, float], formula: Mapping[int, float]) -> Figure:
    """Tokens per pass by number of drafts: counted, and by the formula from the measured acceptances."""
    x = np.arange(len(measured))
    with house_style():
        figure = Figure(figsize=(8.5, 4))
        axes = figure.subplots()
        bars = axes.bar(x, list(measured.values()), 0.55, color=MAIN, label="counted")
        axes.bar_label(bars, fmt="%.2f", padding=9)
        axes.plot(x, list(formula.values()), "o", color=DRAFT, markersize=9, label="1 + a1 + a1 a2 + ...")
        axes.plot(x, [1 + n for n in measured], "--", color="#777777", label="if all drafts held")
        axes.set_xticks(x, [f"{n}" for n in measured])
        axes.set(xlabel="drafts a pass", ylabel="tokens a pass", title="Each further draft gives less")
        axes.legend(loc="upper left")
    return figure


def pass_cost_figure(batches: Sequence[int], costs: Mapping[str, Sequence[float]], title: str) -> Figure:
    """What a pass that verifies one draft costs, as a multiple of a plain one, by batch."""
    with house_style():
        figure = Figure(figsize=(9, 4.2))
        axes = figure.subplots()
        for (name, line), colour in zip(costs.items(), COLOURS, strict=False):
            axes.plot(batches, line, "o-", color=colour, label=name)
        axes.axhline(1, color="#777777", linewidth=1)
        axes.axhline(2, color="#777777", linewidth=1, linestyle="--")
        axes.text(batches[0], 1.96, "two passes", va="top", fontsize=11, color="#5F5F5F")
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(batches), [f"{batch:,}" for batch in batches])
        axes.set(xlabel="rows in a batch", ylabel="time of a pass over 2 tokens a row\n(plain pass = 1)", title=title)
        axes.set_ylim(0.95, 2.05)
        axes.legend(loc="lower left")
    return figure


def speed_figure(drafts: int, cost: float, acceptance: float, tokens: float) -> Figure:
    """Speed against acceptance for a number of drafts, and where a text stands."""
    with house_style():
        figure = Figure(figsize=(9.2, 3.6))
        draw_speed(figure.subplots(), drafts, cost, acceptance, tokens)
    return figure


def draw_speed(axes: Axes, drafts: int, cost: float, acceptance: float, tokens: float) -> None:
    """Curves for 1 to `drafts` drafts that all hold alike; the point is what was counted.

    Args:
        cost: of a pass with drafts, in plain passes. acceptance: share of the judged drafts that held. tokens: a pass.
    """
    a = np.linspace(0, 1, 101)
    shades = matplotlib.colormaps["Blues"]
    for count in range(1, drafts + 1):
        curve = sum(a**n for n in range(count + 1)) / cost
        label = f"{count} draft{'s' if count > 1 else ''}"
        axes.plot(
            a, curve, color=shades(0.35 + 0.6 * count / drafts), linewidth=3 if count == drafts else 1.5, label=label
        )
    axes.axhline(1, color="#777777", linewidth=1)
    axes.axvspan(*REPORTED, color="#EEEEEE", zorder=0)
    axes.text(
        sum(REPORTED) / 2,
        0.06,
        "the report",
        ha="center",
        fontsize=11,
        color="#5F5F5F",
        transform=axes.get_xaxis_transform(),
    )
    axes.plot([acceptance], [tokens / cost], "o", color=FELL, markersize=11, label="this text so far", gid="here")
    axes.set(xlim=(0, 1.01), xlabel="share of the judged drafts that hold", ylabel="speed (plain = 1)")
    axes.set_title(f"{tokens:.2f} tokens a pass at {cost:.2f} times its price: {tokens / cost:.2f} times as fast")
    axes.legend(loc="upper left")
