"""Pictures of lesson 08: a feed-forward cut into experts, affinities and gate values, the sort, and the race."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from dsv3_mini.course.next_byte import Arrangement
from dsv3_mini.viz.figures.routing import EDGE, IDLE, QUIET
from dsv3_mini.viz.figures.training import smooth
from dsv3_mini.viz.style import COLOURS, house_style

VISITED, SHARED = COLOURS[0], COLOURS[2]
DENSE = "#555555"
SCORING_COLOURS = {"softmax": COLOURS[1], "sigmoid": COLOURS[0]}
SMOOTHED = 25  # steps that a point of the race's curves is the mean of


def ladder_figure(arrangements: Sequence[Arrangement]) -> Figure:
    """Feed-forwards as rows of experts, as wide as they are: what works for one token is coloured."""
    unit = 100 / max(arrangement.total for arrangement in arrangements)
    alike = len({arrangement.activated for arrangement in arrangements}) == 1
    title = "The same width works for a token; what differs is the choice" if alike else "What works for one token"
    with house_style():
        figure = Figure(figsize=(11, 0.85 * len(arrangements) + 1.1))
        axes = figure.subplots()
        axes.set(xlim=(0, 184), ylim=(len(arrangements) - 0.1, -0.25), title=title)
        axes.axis("off")
        for row, arrangement in enumerate(arrangements):
            axes.text(38, row + 0.35, arrangement.name, ha="right", va="center", fontsize=12)
            visited = set(random.Random(3).sample(range(arrangement.routed), arrangement.k))
            width = arrangement.expert * unit
            for place in range(arrangement.shared + arrangement.routed):
                expert = place - arrangement.shared  # below 0: a shared one
                colour = SHARED if expert < 0 else VISITED if expert in visited else IDLE
                box = Rectangle((41 + place * width, row), 0.9 * width, 0.7, facecolor=colour, edgecolor=EDGE)
                box.set_gid(f"{arrangement.name}-{place}")
                axes.add_patch(box)
            ways = f"{arrangement.combinations:,} ways to choose" if arrangement.routed else "no choice"
            axes.text(144, row + 0.35, ways, va="center", fontsize=12)
        labels = {"works for every token": SHARED, "chosen for this token": VISITED, "idle for this token": IDLE}
        handles = [Rectangle((0, 0), 1, 1, facecolor=colour, edgecolor=EDGE) for colour in labels.values()]
        figure.legend(handles, list(labels), loc="outside lower center", ncols=3)
    return figure


def gates_figure(logits: Float[Tensor, " e"], k: int) -> Figure:
    """The affinities of one token by softmax and by sigmoid, and the gate values that the k best get from each."""
    experts, best = range(len(logits)), logits.topk(k).indices
    chosen = torch.zeros_like(logits).scatter(0, best, 1.0)
    affinities = {"softmax": logits.softmax(-1), "sigmoid": logits.sigmoid()}
    with house_style():
        figure = Figure(figsize=(11.5, 3.7))
        *panels, last = figure.subplots(1, 3)
        for axes, place, (name, affinity) in zip(panels, (-0.2, 0.2), affinities.items(), strict=True):
            colour = SCORING_COLOURS[name]
            colours = [colour if picked else "#D9D9D9" for picked in chosen.tolist()]
            axes.bar(experts, affinity.tolist(), color=colours, edgecolor=EDGE)
            axes.set(title=f"{name}: sum {float(affinity.sum()):.2f}", xlabel="expert", ylabel="affinity", ylim=(0, 1))
            gates = affinity * chosen / (affinity * chosen).sum()
            last.bar(np.arange(len(logits)) + place, gates.tolist(), width=0.4, color=colour, label=name)
        last.set(title="gate values: sum 1", xlabel="expert", ylabel="gate value", ylim=(0, 1))
        last.legend(loc="upper right")
        for axes in (*panels, last):
            axes.set_xticks(experts)
    return figure


def sort_figure(chosen: Int[Tensor, "T k"], n_experts: int) -> Figure:
    """Each token's choices in the order of the tokens, and again sorted by expert: where each of them goes."""
    experts, k = chosen.flatten().tolist(), chosen.shape[1]
    order = sorted(range(len(experts)), key=experts.__getitem__)  # Python's sort leaves ties in their order
    with house_style():
        figure = Figure(figsize=(11, 3.4))
        axes = figure.subplots()
        axes.set(xlim=(-2.2, len(experts)), ylim=(-0.9, 3.1))
        axes.set_title("Sorted by expert, the rows of each expert lie side by side")
        axes.axis("off")
        for place, slot in enumerate(order):
            axes.plot([slot + 0.45, place + 0.45], [2.2, 0.8], color=COLOURS[experts[slot]], linewidth=2)
        for y, slots, name in ((2.2, range(len(experts)), "by token"), (0.0, order, "by expert")):
            axes.text(-0.2, y + 0.4, name, ha="right", va="center", fontsize=12)
            for place, slot in enumerate(slots):
                axes.add_patch(Rectangle((place, y), 0.9, 0.8, facecolor=COLOURS[experts[slot]], edgecolor="black"))
                axes.text(place + 0.45, y + 0.4, f"{slot // k}", ha="center", va="center", fontsize=12,
                          bbox={"facecolor": "white", "edgecolor": "none", "pad": 2}, gid=f"{name}-{place}")  # fmt: skip
        start = 0
        for expert in range(n_experts):
            count = experts.count(expert)
            said = f"expert {expert}" if count else f"expert {expert}: nobody"
            axes.text(start + count / 2 - 0.05, -0.15 if count else -0.5, said, ha="center", va="top", fontsize=11)
            start += count
    return figure


def race_figure(
    losses: Mapping[str, Sequence[float]], held_out: Mapping[str, Mapping[str, float]], dense: str
) -> Figure:
    """Training loss by step, and what each arrangement saves on held-out text of each domain.

    Args:
        losses: arrangement -> bits per byte of each step. held_out: arrangement -> domain -> bits per byte.
        dense: the arrangement that the others are compared with.
    """
    others = [name for name in losses if name != dense]
    colours = {dense: DENSE, **dict(zip(others, COLOURS, strict=False))}
    domains = list(held_out[dense])
    with house_style():
        figure = Figure(figsize=(12, 4.4))
        curves, saved = figure.subplots(1, 2)
        for name, values in losses.items():
            points = smooth(values, SMOOTHED)
            curves.plot(range(1, len(points) + 1), points, color=colours[name], label=name, linewidth=2)
        early = losses[dense][len(losses[dense]) // 4]  # the first steep part would hide the rest
        curves.set(title="In training", xlabel="step", ylabel="loss (bits per byte)", ylim=(None, early))
        for place, name in enumerate(others):
            gains = [held_out[dense][domain] - held_out[name][domain] for domain in domains]
            offset = (place - (len(others) - 1) / 2) * 0.25
            saved.bar(np.arange(len(domains)) + offset, gains, width=0.25, color=colours[name])
        saved.axhline(0, color=QUIET, linewidth=1)
        saved.set_xticks(range(len(domains)), domains)
        saved.set(title=f"Saved against {dense}, on text never seen", ylabel="bits per byte")
        figure.legend(*curves.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure
