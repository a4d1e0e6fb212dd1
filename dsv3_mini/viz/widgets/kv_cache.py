"""Widgets of lesson 07: a stopwatch for absorbed against expanded attention, and the roofline of a decode step."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ipywidgets
from matplotlib.figure import Figure

from dsv3_mini.bench.decode import CONTEXT, HEADS, NEW, Seconds, one_layer, random_inputs, side_by_side
from dsv3_mini.config import ModelConfig
from dsv3_mini.ledger.decode import H800, WAYS, Machine, attention_flops, crossing, decode_step
from dsv3_mini.viz.figures import png
from dsv3_mini.viz.figures.kv_cache import crossing_figure, roofline_figure
from dsv3_mini.viz.widgets.explorer import Explorer, with_picture

# ---- measuring ---------------------------------------------------------------------------------------------------------

# Printed by `python -m dsv3_mini.bench.decode`: 671b's widths with 8 heads over 1,024 tokens, one core. Drawn in grey behind the
# reader's own, and the picture of a page that no kernel serves.
RECORDED: dict[int, float] = {1: 14.0, 8: 7.2, 32: 3.0, 128: 1.2, 512: 0.56, 1024: 0.39}


class Stopwatch:
    """A button that times both ways side by side, and the picture in which the times meet the count.

    Each press adds rounds; what is drawn is the median ratio over all rounds so far.

    Args:
        run: new tokens -> seconds of both ways, run once, one right after the other.
        counted: new tokens -> FLOPs of expanded over those of absorbed. crosses: where that is 1. context: cached tokens.
        rounds: how many one press adds.
    """

    def __init__(
        self,
        run: Callable[[int], Seconds],
        counted: Mapping[int, float],
        crosses: float,
        context: int,
        new: Sequence[int] = NEW,
        rounds: int = 3,
    ) -> None:
        self.run, self.counted, self.crosses, self.context, self.rounds = run, counted, crosses, context, rounds
        self.ratios: dict[int, list[float]] = {count: [] for count in new}
        self.button = ipywidgets.Button(
            description=f"Measure {rounds} rounds here",
            button_style="primary",
            tooltip="Takes some seconds",
            layout=ipywidgets.Layout(width="auto"),
        )
        self.button.on_click(lambda _: self.measure())
        self.picture = ipywidgets.Image(format="png", layout=ipywidgets.Layout(max_width="100%"))
        self.box = ipywidgets.VBox([self.button, self.picture])
        self.refresh()

    @property
    def rounds_done(self) -> int:
        return min(map(len, self.ratios.values()))

    @property
    def measured(self) -> dict[int, float]:
        """New tokens -> how many times faster absorbed is, the median of all rounds so far."""
        return {count: statistics.median(ratios) for count, ratios in self.ratios.items() if ratios}

    def measure(self, rounds: int | None = None) -> dict[int, float]:
        """Press the button, or take another number of rounds; returns `measured`."""
        self.button.disabled = True
        try:
            if not self.rounds_done:
                for count in self.ratios:
                    self.run(count)  # the first run of a shape also sets up what later ones find ready
            for _ in range(rounds or self.rounds):
                for count, ratios in self.ratios.items():
                    ratios.append(self.run(count).ratio)
                self.refresh()
        finally:
            self.button.disabled = False
        return self.measured

    def refresh(self) -> None:
        curves: dict[str, Mapping[int, float]] = {"measured on our server, one core": RECORDED}
        if self.rounds_done:
            curves[f"measured here, median of {self.rounds_done}"] = self.measured
        self.picture.value = png(crossing_figure(self.counted, self.crosses, self.context, curves))

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        alt = (
            "How many times faster absorbed attention is than expanded attention, by how many tokens are new: a counted "
            "curve that falls through 1, and measured points beside it."
        )
        return with_picture(self.box._repr_mimebundle_(), alt, self.picture.value)


def stopwatch(cfg: ModelConfig | None = None, context: int = CONTEXT, rounds: int = 3) -> Stopwatch:
    """One attention layer of cfg's widths (the released ones, without another) and `HEADS` heads, over random latents."""
    cfg = cfg or ModelConfig.preset("671b")
    layer = one_layer(cfg, HEADS)
    inputs = {new: random_inputs(layer, new, context) for new in NEW if new <= context}
    return Stopwatch(
        lambda new: side_by_side(layer, inputs[new]),
        counted_ratios(cfg, context),
        crossing(cfg, context),
        context,
        tuple(inputs),
        rounds,
    )


def counted_ratios(cfg: ModelConfig, context: int) -> dict[int, float]:
    """New tokens -> FLOPs of expanded attention over those of absorbed, from 1 to the whole context."""
    points = sorted({*range(1, 33), *(round(2 ** (step / 4)) for step in range(20, 4 * context.bit_length())), context})
    ratios = {}
    for new in (point for point in points if point <= context):
        flops = attention_flops(cfg, new, context)
        ratios[new] = flops.rebuilt / flops.absorbed
    return ratios


# ---- roofline ----------------------------------------------------------------------------------------------------------

BATCHES = tuple(2**power for power in range(13))  # 1 to 4,096
CONTEXTS = tuple(2**power for power in range(8, 18))  # 256 to 131,072
NEW_PER_STEP = (1, 2, 4)

ALT = (
    "Left, a roofline: four parts of a decode step as points under a roof that first rises with FLOPs per byte and then is "
    "level. Right, the time of each part as a bar, with what it waits for, memory or compute."
)


def roofline_explorer(cfg: ModelConfig | None = None, machine: Machine = H800) -> Explorer:
    """The roofline of a decode step; `set(batch=..., context=..., way=..., new=...)` moves it."""
    cfg = cfg or ModelConfig.preset("671b")

    def draw(batch: int, context: int, way: str, new: int) -> Figure:
        heading = f"Batch {batch:,}, {context:,} tokens each, {way}"
        return roofline_figure(decode_step(cfg, batch, context, new, way), machine, batch * new, heading)

    def slider(name: str, options: Sequence[int], value: int) -> ipywidgets.SelectionSlider:
        return ipywidgets.SelectionSlider(
            options=[(f"{option:,}", option) for option in options],
            value=value,
            description=name,
            continuous_update=False,
        )

    return Explorer(
        draw,
        ALT,
        batch=slider("batch (rows)", BATCHES, 1),
        context=slider("context (tokens)", CONTEXTS, 4096),
        way=ipywidgets.Dropdown(options=WAYS, value=WAYS[0], description="attention"),
        new=slider("new tokens a row", NEW_PER_STEP, 1),
    )
