"""Widgets of lesson 21: the bill of a training run, and a machine to plan."""

from __future__ import annotations

from collections.abc import Mapping

import ipywidgets
from matplotlib.figure import Figure

from dsv3_mini.config import ModelConfig
from dsv3_mini.errors import ConfigError
from dsv3_mini.ledger import H800_PEAK, REPORT_RUN, TrainingCost, flops_per_token, sustained_flops, training_cost
from dsv3_mini.parallel.dry_run.roofline import Machine
from dsv3_mini.parallel.dry_run.sketch import Kept, Sketch, lay_out, sketch
from dsv3_mini.viz.figures.cluster import bill_figure, plan_figure
from dsv3_mini.viz.widgets.explorer import Explorer

SIZES = tuple(2**power for power in range(3, 15))
POWERS = tuple(2**power for power in range(9))


def bill(tokens: int, gpus: int, hours_per_trillion: float, dollars: float) -> dict[str, TrainingCost]:
    """The report's three stages. What follows pre-training takes as long as the report says, at another speed in proportion."""
    stages = {"pre-training": training_cost(hours_per_trillion, tokens=tokens, gpus=gpus, dollars_per_hour=dollars)}
    later = {"context extension": REPORT_RUN.context_extension_hours, "post-training": REPORT_RUN.post_training_hours}
    for name, hours in later.items():
        worth = round(1e12 * hours / REPORT_RUN.hours_per_trillion)  # in tokens of pre-training
        stages[name] = training_cost(hours_per_trillion, tokens=worth, gpus=gpus, dollars_per_hour=dollars)
    return stages


def bill_explorer() -> Explorer:
    """Tokens, GPUs, speed and price; it begins with the report's own."""
    flops = flops_per_token(ModelConfig.preset("671b")).train

    def draw(tokens: float, gpus: int, thousand_hours: int, dollars: float) -> Figure:
        hours = 1000 * thousand_hours
        mfu = sustained_flops(flops, hours) / H800_PEAK
        return bill_figure(bill(round(1e12 * tokens), gpus, hours, dollars), mfu)

    return Explorer(
        draw,
        "A bar of GPU hours in three parts, pre-training, context extension and post-training, each with its hours, dollars and "
        "days; the title has their sum.",
        tokens=_slider(14.8, 0.2, 30.0, 0.2, "trillion tokens"),
        gpus=_one_of(REPORT_RUN.gpus, SIZES, "GPUs"),
        thousand_hours=ipywidgets.IntSlider(
            180, 75, 600, 5, description="thousand GPU hours per trillion", continuous_update=False
        ),
        dollars=_slider(2.0, 0.25, 6.0, 0.25, "dollars an hour"),
    )


class Planner(Explorer):
    """Plan a machine: `sketch` is what the picture shows, None where a rule forbids the layout.

    Args:
        kept: for each preset, what a micro-batch leaves behind.
    """

    def __init__(self, kept: Mapping[str, Kept]) -> None:
        self.kept = kept
        self.sketch: Sketch | None = None
        super().__init__(
            self._plan,
            "Bars for one GPU of a planned cluster: its memory by kind against what it has, the milliseconds of a micro-batch in "
            "arithmetic and on the wires, and the micro-batches that a pipeline gets and needs. A title says whether it fits.",
            model=ipywidgets.Dropdown(
                options=tuple(kept), description="model", layout=ipywidgets.Layout(width="max-content")
            ),
            gpus=_one_of(256, SIZES, "GPUs"),
            pp=_one_of(16, POWERS[:6], "pipeline ranks"),
            ep=_one_of(16, POWERS, "GPUs that share experts"),
            memory=_one_of(80, (40, 80, 141, 192, 288), "GB of a GPU"),
            network=_one_of(50, (12, 25, 50, 100, 200), "network (GB/s a GPU)"),
            batch=_one_of(15360, (480, 1920, 3840, 7680, 15360, 30720), "sequences in a batch"),
        )

    def _plan(self, model: str, gpus: int, pp: int, ep: int, memory: int, network: int, batch: int) -> Figure:
        cfg = ModelConfig.preset(model)
        machine = Machine(memory=1e9 * memory, ib=1e9 * network)
        try:
            plan = lay_out(cfg, gpus, pp, ep)
        except ConfigError as rule:
            self.sketch = None
            return plan_figure(None, str(rule))
        self.sketch = sketch(cfg, plan, self.kept[model], machine, batch)
        return plan_figure(self.sketch)


def _slider(value: float, least: float, most: float, step: float, description: str) -> ipywidgets.FloatSlider:
    return ipywidgets.FloatSlider(value, min=least, max=most, step=step, description=description, continuous_update=False,
                                  readout_format=".1f" if step == 0.2 else ".2f")  # fmt: skip


def _one_of(value: int, options: tuple[int, ...], description: str) -> ipywidgets.SelectionSlider:
    return ipywidgets.SelectionSlider(
        options=[(f"{option:,}", option) for option in options],
        value=value,
        description=description,
        continuous_update=False,
    )
