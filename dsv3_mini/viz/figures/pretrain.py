"""A pre-training as pictures: what changes on the way, a run on its board, what a resumed run forgot, who serves whom."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from torch import Tensor

from dsv3_mini.course.pretrain_run import apart
from dsv3_mini.train.recipe import Recipe
from dsv3_mini.train.schedules import Schedule
from dsv3_mini.viz.figures.training import smooth
from dsv3_mini.viz.style import COLOURS, DOMAIN_COLOURS, LOAD_MAP, house_style

BIAS_MAP = "PuOr"  # from below 0 to above it
PALE, HERE, OWN = "#BBBBBB", COLOURS[3], COLOURS[0]
JUDGED = ("black", COLOURS[4], COLOURS[5])
MOST_LOAD = 2.0  # even shares with the brightest colour
SETTINGS = {
    "learning_rate": "learning rate",
    "batch_size": "sequences in a batch",
    "gamma": "gamma",
    "mtp_lambda": "lambda",
}

Line = Mapping[str, Any]


# ---- schedules ---------------------------------------------------------------------------------------------------------


class Curve(NamedTuple):
    tokens: list[float]
    values: list[float]


def curve_of(schedule: Schedule, total: float, points: int = 400) -> Curve:
    """A schedule from 0 to `total` tokens. Where pieces meet it is drawn from both sides, so that a jump is upright."""
    ends = [piece.until for piece in schedule.pieces if piece.until < total]
    places = {total * i / points for i in range(points + 1)} | {
        place for end in ends for place in (end * (1 - 1e-9), end)
    }
    tokens = sorted(places)
    return Curve(tokens, [schedule(place) for place in tokens])


def schedules_figure(recipes: Mapping[str, Recipe]) -> Figure:
    """What a recipe changes on the way, a column for each recipe: learning rate, batch, gamma and lambda by tokens."""
    with house_style():
        figure = Figure(figsize=(10, 7.6))
        table = figure.subplots(len(SETTINGS), len(recipes), squeeze=False, sharex="col")
        figure.suptitle(
            "All that changes on the way is a function of the tokens seen",
            x=0.01, ha="left", fontsize=14, fontweight="bold",
        )  # fmt: skip
        for column, (colour, (name, recipe)) in enumerate(zip(COLOURS, recipes.items(), strict=False)):
            unit, word = unit_of(recipe.total_tokens)
            for row, (setting, label) in enumerate(SETTINGS.items()):
                axes = table[row, column]
                curve = curve_of(getattr(recipe, setting), recipe.total_tokens)
                axes.plot([t / unit for t in curve.tokens], curve.values, color=colour)
                axes.set_ylim(0, 1.15 * max(curve.values))
                axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                if not column:
                    axes.set_ylabel(label)
            table[0, column].set_title(f"{name}: {recipe.total_tokens / unit:g} {word} tokens", fontsize=12)
            table[-1, column].set_xlabel(f"tokens seen ({word}s)")
        figure.align_ylabels(table[:, 0])
    return figure


def unit_of(tokens: float) -> tuple[float, str]:
    """What to count so many tokens in."""
    units = ((1e12, "trillion"), (1e9, "billion"), (1e6, "million"), (1e3, "thousand"))
    return next(((unit, word) for unit, word in units if tokens >= unit), (1.0, "token"))


# ---- the board ---------------------------------------------------------------------------------------------------------


def board_figure(
    steps: Sequence[Line],
    evaluations: Sequence[Line],
    title: str,
    bias: Mapping[str, Sequence[float]] | None = None,
    at: int = -1,
    clip: float = 1.0,
    words: str = "",
) -> Figure:
    """A run at a glance, from the lines of its log.

    Args:
        steps, evaluations: lines of the two kinds. bias: layer -> the biases now; None takes those of the step shown, if it
            has them. at: the step whose load and bias are shown. clip: where gradients are cut. words: stands below.
    """
    with house_style():
        figure = Figure(figsize=(12, 6.0 if words else 5.4))
        figure.suptitle(title, x=0.01, ha="left", fontsize=14, fontweight="bold")
        top, bottom = figure.add_gridspec(2, 1, height_ratios=(20, 3 if words else 0.1))
        grid = top.subgridspec(2, 4)
        loss, bits, judged, norm, rate, load, biases, balance = (
            figure.add_subplot(grid[i // 4, i % 4]) for i in range(8)
        )
        below = figure.add_subplot(bottom)
        below.axis("off")
        total = max([line["tokens"] for line in (*steps, *evaluations)], default=0)
        unit, word = unit_of(max(total, 1000))
        tokens = [line["tokens"] / unit for line in steps]
        measured = [line["tokens"] / unit for line in evaluations]

        _draw_losses(loss, tokens, steps, measured, evaluations)
        for domain in evaluations[-1]["bits_per_byte"] if evaluations else ():
            values = [line["bits_per_byte"][domain] for line in evaluations]
            bits.plot(measured, values, marker="o", markersize=4, color=DOMAIN_COLOURS.get(domain))
        for colour, (name, points) in zip(JUDGED, judged_curves(evaluations), strict=False):
            style = {"marker": "o", "markersize": 4, "color": colour, "label": name}
            judged.plot([t / unit for t, _ in points], [100 * v for _, v in points], **style)
        norms = [line["grad_norm"] for line in steps]
        norm.plot(tokens, norms, color=PALE, linewidth=0.8)
        norm.plot(tokens, smooth(norms), color=OWN)
        norm.axhline(clip, color="black", linewidth=1)
        rate.plot(tokens, [line["learning_rate"] for line in steps], color=OWN)
        for i, (layer, points) in enumerate(by_layer(steps).items()):
            values = smooth([v for _, v in points])
            balance.plot([t / unit for t, _ in points], values, color=COLOURS[i % len(COLOURS)], label=f"layer {layer}")
        shown = steps[at] if steps else {"load": {}}
        _draw_load(figure, load, shown["load"])
        _draw_bias(figure, biases, shown.get("bias") if bias is None else bias)

        top = [line["loss"] for line in steps] + [v for line in evaluations for v in line["validation_loss"].values()]
        loss.set(title="Loss", ylabel="nats per token", ylim=(0, 1.05 * max(top, default=9)))
        bits.set(title="Held-out text", ylabel="bits per byte", ylim=(0, None))
        judged.set(title="Judged", ylabel="% right", ylim=(-3, 103))
        norm.set(title="Gradient norm", ylabel=f"before the cut at {clip:g}")
        if norms:
            norm.set_yscale("log")
            norm.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            norm.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            norm.yaxis.set_minor_formatter(NullFormatter())
        rate.set(title="Learning rate", ylim=(0, None))
        rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
        balance.set(title="Imbalance", ylabel="MaxVio (0 = even)", ylim=(0, None))
        for axes in (loss, bits, judged, norm, rate, balance):
            axes.set_xlim(0, max(total, 1000) / unit)
            axes.set_xlabel(f"tokens ({word}s)")
            if steps and at not in (-1, len(steps) - 1):
                axes.axvline(tokens[at], color=HERE, linewidth=1.5)
        handles, labels = loss.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=max(1, len(labels)), fontsize=11)
        for axes in (judged, balance):
            if axes.lines and axes.get_legend_handles_labels()[1]:
                axes.legend(fontsize=11, handlelength=1, borderpad=0.1, labelspacing=0.2)
        if words:
            said = textwrap.fill(plain(words), 125, max_lines=3, placeholder=" ...")
            below.text(0, 1, said, va="top", fontsize=11, parse_math=False, transform=below.transAxes)
    return figure


def judged_curves(evaluations: Sequence[Line]) -> list[tuple[str, list[tuple[float, float]]]]:
    """What the grammar says: name -> (tokens, share right), for what was judged at all."""
    names = {"sentences_well_formed": "sentences", "story_answers": "answers", "sum_answers": "sums"}
    found = []
    for key, name in names.items():
        points = [(e["tokens"], e["judged"][key]) for e in evaluations if key in e.get("judged", {})]
        if points:
            found.append((name, points))
    return found


def by_layer(steps: Sequence[Line]) -> dict[str, list[tuple[float, float]]]:
    """Layer -> (tokens, MaxVio) of the steps in which it ran; MTP's layer may rest at first."""
    layers = sorted({layer for line in steps for layer in line["max_vio"]}, key=int)
    return {
        layer: [(line["tokens"], line["max_vio"][layer]) for line in steps if layer in line["max_vio"]]
        for layer in layers
    }


def plain(text: str) -> str:
    """Text that every font can show: line breaks as pilcrows, and what is not ASCII as a dot."""
    return "".join(c if c.isascii() and c.isprintable() or c == "¶" else "·" for c in text.replace("\n", "¶"))


def _draw_losses(
    axes: Axes, tokens: Sequence[float], steps: Sequence[Line], measured: Sequence[float], evaluations: Sequence[Line]
) -> None:
    """Training loss, MTP's where it ran, and the held-out loss of each domain."""
    losses = [line["loss"] for line in steps]
    axes.plot(tokens, losses, color=PALE, linewidth=0.8)
    axes.plot(tokens, smooth(losses), color="black", label="training")
    mtp = [(t, line["mtp_loss"]) for t, line in zip(tokens, steps, strict=True) if line["mtp_loss"]]
    axes.plot(
        [t for t, _ in mtp], smooth([v for _, v in mtp]), color="black", linestyle=":", label="second token (MTP)"
    )
    for domain in evaluations[-1]["validation_loss"] if evaluations else ():
        values = [line["validation_loss"][domain] for line in evaluations]
        axes.plot(measured, values, marker="o", markersize=4, color=DOMAIN_COLOURS.get(domain), label=domain)


def _draw_load(figure: Figure, axes: Axes, load: Mapping[str, Sequence[float]]) -> None:
    axes.set_title("Load (1 = even)")
    if not load:
        axes.axis("off")
        return
    layers = sorted(load, key=int)
    table = np.array([load[layer] for layer in layers], dtype=float)
    share = table / np.maximum(table.mean(axis=1, keepdims=True), 1e-9)
    image = axes.imshow(share, aspect="auto", cmap=LOAD_MAP, vmin=0, vmax=MOST_LOAD, interpolation="none")
    _name_cells(axes, layers, share.shape[1])
    figure.colorbar(image, ax=axes, pad=0.02, ticks=[0, 1, 2])


def _draw_bias(figure: Figure, axes: Axes, bias: Mapping[str, Sequence[float]] | None) -> None:
    axes.set_title("Bias on the score")
    if not bias:
        axes.text(0.5, 0.5, "not logged", ha="center", transform=axes.transAxes)
        axes.axis("off")
        return
    layers = sorted(bias, key=int)
    table = np.array([bias[layer] for layer in layers], dtype=float)
    reach = max(float(np.abs(table).max()), 0.01)
    image = axes.imshow(table, aspect="auto", cmap=BIAS_MAP, vmin=-reach, vmax=reach, interpolation="none")
    _name_cells(axes, layers, table.shape[1])
    figure.colorbar(image, ax=axes, pad=0.02, ticks=[-reach, 0, reach], format="%.2g")


def _name_cells(axes: Axes, layers: Sequence[str], experts: int) -> None:
    axes.set(xlabel="expert", ylabel="layer", yticks=range(len(layers)), yticklabels=layers)
    axes.set_xticks([0, experts - 1])


# ---- resuming ----------------------------------------------------------------------------------------------------------


def resume_figure(unbroken: Sequence[float], resumed: Mapping[str, Sequence[float]], stopped: int) -> Figure:
    """Losses of runs that went on after step `stopped`, as differences from the run that never stopped."""
    steps = range(stopped + 1, len(unbroken) + 1)
    with house_style():
        figure = Figure(figsize=(10, 3.6))
        axes = figure.subplots()
        for colour, (name, losses) in zip(COLOURS, resumed.items(), strict=False):
            apart = [own - whole for own, whole in zip(losses, unbroken[stopped:], strict=True)]
            axes.plot(steps, apart, color=colour, marker="o", markersize=4, label=name)
        axes.axhline(0, color="black", linewidth=1)
        axes.set(
            title="Forget anything, and another run goes on",
            xlabel="step",
            ylabel="loss - that of the unbroken\nrun (nats per token)",
        )
        axes.set_xticks(steps[:: max(1, len(steps) // 12)])
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")
    return figure


# ---- who serves whom ---------------------------------------------------------------------------------------------------


def specialisation_figure(
    loads: Mapping[str, Float[Tensor, "n e"]], domains: Sequence[str], layer: int, by_favourite: bool
) -> Figure:
    """Experts of one layer at two moments: the load of each domain, and of each expert's visitors the part from each.

    Args:
        loads: moment -> the load that each domain brings, in even shares. by_favourite: experts stand in the order of the
            domain that they serve most, and of how much; otherwise by their number.
    """
    distances = [apart(load[:, None]).item() for load in loads.values()]
    with house_style():
        figure = Figure(figsize=(11, 5.0))
        title = f"Layer {layer}: training has {'parted' if distances[-1] > distances[0] else 'mixed'} the domains"
        figure.suptitle(title, x=0.01, ha="left", fontsize=14, fontweight="bold")
        table = figure.subplots(2, len(loads), squeeze=False)
        for (above, below), (moment, load), distance in zip(table.T, loads.items(), distances, strict=True):
            shares = (load / load.sum(0).clamp(min=1e-9)).numpy()  # [n e]
            order = favourites(shares) if by_favourite else list(range(shares.shape[1]))
            image = above.imshow(
                load.numpy()[:, order], aspect="auto", cmap=LOAD_MAP, vmin=0, vmax=3, interpolation="none"
            )
            above.set(yticks=range(len(domains)), yticklabels=domains, xticks=[])
            above.set_title(f"{moment}: two domains are {distance:.0%} apart", fontsize=12, fontweight="normal")
            bottom = np.zeros(len(order))
            for domain, share in zip(domains, shares[:, order], strict=True):
                colour = DOMAIN_COLOURS.get(domain)
                below.bar(range(len(order)), 100 * share, bottom=bottom, color=colour, width=0.9, label=domain)
                bottom += 100 * share
            below.set(xticks=range(len(order)), xlabel="expert", ylabel="% of its visitors", ylim=(0, 100))
            below.set_xticklabels(order, fontsize=11)
        figure.colorbar(image, ax=list(table[0]), label="load (1 = even)", pad=0.01)
        figure.legend(*table[1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(domains))
    return figure


def favourites(shares: Float[np.ndarray, "n e"]) -> list[int]:
    """Experts ordered by the domain that they serve most, and within it the most devoted first."""
    best = shares.argmax(axis=0)
    return sorted(range(shares.shape[1]), key=lambda e: (best[e], -shares[best[e], e], e))
