"""A training run as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from dsv3_mini.viz.style import COLOURS, DOMAIN_COLOURS, house_style


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
        # MTP may rest at first: its loss, and the load of its experts, begin later.
        mtp = [(line["tokens"] / 1e6, line["mtp_loss"]) for line in steps if line["mtp_loss"]]
        if mtp:
            loss.plot([x for x, _ in mtp], smooth([y for _, y in mtp]), color=COLOURS[1], label="second token (MTP)")
        loss.set(title="Loss", xlabel="tokens seen (millions)", ylabel="nats per token", ylim=(0, None))
        loss.legend()
        for domain in evaluations[-1]["bits_per_byte"] if evaluations else ():
            points = [(e["tokens"] / 1e6, e["bits_per_byte"][domain]) for e in evaluations]
            bits.plot(*zip(*points, strict=True), marker="o", label=domain, color=DOMAIN_COLOURS.get(domain))
        bits.set(title="Held-out text", xlabel="tokens seen (millions)", ylabel="bits per byte", ylim=(0, None))
        if evaluations:
            bits.legend()
        for i, layer in enumerate(steps[-1]["max_vio"] if steps else ()):
            seen = [(line["tokens"] / 1e6, line["max_vio"][layer]) for line in steps if layer in line["max_vio"]]
            values = smooth([y for _, y in seen])
            balance.plot([x for x, _ in seen], values, label=f"layer {layer}", color=COLOURS[i % len(COLOURS)])
        balance.set(title="Imbalance", xlabel="tokens seen (millions)", ylabel="MaxVio (0 = even)", ylim=(0, None))
        if steps and steps[-1]["max_vio"]:
            balance.legend()
    return figure


def smooth(values: Sequence[float], window: int = 9) -> list[float]:
    """Each value replaced by the mean of its neighbourhood, which is cut at the ends."""
    half = window // 2
    return [float(np.mean(values[max(0, i - half) : i + half + 1])) for i in range(len(values))]
