"""Widgets of lesson 16: one layer under each ablation, recorded trainings under each ablation, and a race of two, trained live."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle

import ipywidgets
from matplotlib.figure import Figure

from dsv3_mini.course.fp8_runs import (
    BASE,
    LINE,
    REPORTS,
    SIZES,
    WAYS,
    YARDSTICK,
    Recording,
    Step,
    fresh_model,
    layer_errors,
    recorded,
    relative_gap,
    training_batches,
    training_steps,
)
from dsv3_mini.fp8.recipe import ABLATIONS
from dsv3_mini.viz.figures.fp8_training import gap_figure, layer_errors_figure
from dsv3_mini.viz.widgets.explorer import Explorer
from dsv3_mini.viz.widgets.transformer import LiveRun

# ---- one layer ---------------------------------------------------------------------------------------------------------

OUTLIERS = (1, 10, 100, 1_000, 10_000, 100_000, 1_000_000)
CHANGED = [name for name in ABLATIONS if name != "the report's"]


def ablation_explorer() -> Explorer:
    """One linear layer with loud tokens: the errors of its three results under the report's recipe, and under a changed one."""

    def draw(changed: str, outlier: int) -> Figure:
        errors = {name: layer_errors(ABLATIONS[name], float(outlier)) for name in ("the report's", changed)}
        return layer_errors_figure(errors, f"One token in 64 is {outlier:,} times as loud: {changed}")

    return Explorer(
        draw,
        "Bars of the error of a layer's three results, and of what is missing from them, under the report's recipe and "
        "under one with a choice turned round.",
        changed=ipywidgets.Dropdown(options=CHANGED, description="changed"),
        outlier=ipywidgets.SelectionSlider(
            options=[(f"{size:,}", size) for size in OUTLIERS],
            value=10_000,
            description="loud tokens, times",
            continuous_update=False,
        ),
    )


# ---- whole trainings ---------------------------------------------------------------------------------------------------


def gap_explorer(recording: Recording | None = None) -> Explorer:
    """A recorded training's distance from BF16, beside that of FP32: which run, which ablation, how smooth.

    Args:
        recording: the runs to choose from; without it, those that ship with the course.
    """
    runs = recorded() if recording is None else recording
    places = [(f"{size}, seed {seed}", (size, seed)) for size in reversed(runs.sizes) for seed in runs.seeds(size)]
    everywhere = [way for way in dict.fromkeys(way for size in runs.sizes for way in runs.ways(size)) if way != BASE]

    def draw(run: tuple[str, int], way: str, window: int) -> Figure:
        size, seed = run
        losses = runs.losses(size, seed)
        steps = len(losses[BASE])
        before = {name: losses[name] for name in (BASE, YARDSTICK)}
        if way not in losses:
            return gap_figure({BASE: losses[BASE]}, before, window, steps, f"{way} was not recorded for {size}")
        gap = runs.gap(size, way, seed)
        verdict = "inside" if abs(gap) < LINE else "outside"
        title = f"{way}: {gap:+.2%} over the last third, {verdict} the report's 0.25%"
        return gap_figure({BASE: losses[BASE], way: losses[way]}, before, window, steps, title)

    return Explorer(
        draw,
        "Two panels by step: the losses of a training in BF16 and of another way, and their relative distance beside a band "
        "of 0.25%.",
        run=ipywidgets.Dropdown(options=places, description="run"),
        way=ipywidgets.Dropdown(
            options=everywhere,
            value=REPORTS if REPORTS in everywhere else everywhere[0],
            description="way",
            layout=ipywidgets.Layout(width="max-content"),
        ),
        window=ipywidgets.SelectionSlider(
            options=[1, 5, 15, 30, 50], value=30, description="mean of steps", continuous_update=False
        ),
    )


WINDOW = 30  # steps that a point of the race's curves is the mean of


class PrecisionRace(LiveRun):
    """Nano in BF16 and in FP8, from the same weights on the same text, each a step in turn, with a picture that grows.

    Behind them, pale, how the same runs went when the lesson was written.
    """

    def __init__(self, names: Sequence[str] = (BASE, REPORTS), steps: int = 40, seed: int = 0) -> None:
        self.seed = seed
        losses = recorded().losses("nano", seed)
        before = {name: losses[name] for name in names}

        def draw(curves: Mapping[str, Sequence[float]]) -> Figure:
            done = len(curves[REPORTS])
            title = "Two trainings that differ in arithmetic alone"
            if done:
                title = f"After {done} steps: {self.gap:+.2%} over the last third"
            return gap_figure(curves, before, WINDOW, steps, title)

        super().__init__(
            {name: lambda name=name: self._begin(name) for name in names},
            draw,
            f"Losses by step of {len(names)} trainings, {' and '.join(names)}, and their relative distance.",
            steps,
            every=20,
        )

    @property
    def gap(self) -> float:
        """FP8's relative distance from BF16 over the last third of the steps so far."""
        return relative_gap(self.losses[REPORTS], self.losses[BASE])

    def _begin(self, name: str) -> Iterator[Step]:
        size, batches = SIZES["nano"], cycle(training_batches("nano", SIZES["nano"].steps, self.seed))
        model, start = fresh_model("nano", name, self.seed)
        yield from training_steps(model, start, batches, size.recipe, WAYS[name].moments)
