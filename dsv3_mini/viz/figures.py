"""Figures: pure functions from data to a matplotlib Figure. They read no files, keep no state, and show nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from torch import Tensor

from dsv3_mini.viz.style import COLOURS, DOMAIN_COLOURS, LOAD_MAP, house_style


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
        image = axes.imshow(weight, aspect="auto", cmap="viridis_r", vmin=0, origin="lower", interpolation="none")
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


def training_figure(lines: Sequence[Mapping[str, Any]]) -> Figure:
    """A run from its log: loss, bits per byte by domain, and how uneven the experts' load was."""
    steps = [line for line in lines if line["kind"] == "step"]
    evaluations = [line for line in lines if line["kind"] == "evaluation"]
    millions = [line["tokens"] / 1e6 for line in steps]
    with house_style():
        figure = Figure(figsize=(13, 4))
        loss, bits, balance = figure.subplots(1, 3)
        loss.plot(millions, [line["loss"] for line in steps], color=COLOURS[0], alpha=0.35, linewidth=0.8)
        loss.plot(millions, smooth([line["loss"] for line in steps]), color=COLOURS[0], label="next token")
        loss.plot(millions, smooth([line["mtp_loss"] for line in steps]), color=COLOURS[1], label="second token (MTP)")
        loss.set(title="Loss", xlabel="tokens seen (millions)", ylabel="nats per token", ylim=(0, None))
        loss.legend()
        for domain in evaluations[-1]["bits_per_byte"] if evaluations else ():
            points = [(e["tokens"] / 1e6, e["bits_per_byte"][domain]) for e in evaluations]
            bits.plot(*zip(*points, strict=True), marker="o", label=domain, color=DOMAIN_COLOURS.get(domain))
        bits.set(title="Held-out text", xlabel="tokens seen (millions)", ylabel="bits per byte", ylim=(0, None))
        if evaluations:
            bits.legend()
        for i, layer in enumerate(steps[-1]["max_vio"] if steps else ()):
            values = smooth([line["max_vio"][layer] for line in steps])
            balance.plot(millions, values, label=f"layer {layer}", color=COLOURS[i % len(COLOURS)])
        balance.set(title="Imbalance", xlabel="tokens seen (millions)", ylabel="MaxVio (0 = even)", ylim=(0, None))
        if steps and steps[-1]["max_vio"]:
            balance.legend()
    return figure


def smooth(values: Sequence[float], window: int = 9) -> list[float]:
    """Each value replaced by the mean of its neighbourhood, which is cut at the ends."""
    half = window // 2
    return [float(np.mean(values[max(0, i - half) : i + half + 1])) for i in range(len(values))]
