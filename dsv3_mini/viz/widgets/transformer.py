"""Widgets of lesson 04: a mask to get wrong, a stream to disturb, and a training run that draws its curve while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ipywidgets
import torch
from einops import einsum
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from dsv3_mini.course.baseline import (
    Baseline,
    BaselineBlock,
    BaselineShape,
    NoResidualBlock,
    PostNormBlock,
    Step,
    signal_by_layer,
)
from dsv3_mini.viz.figures import png
from dsv3_mini.viz.figures.transformer import RECORDED_EVERY, attention_figure, loss_figure, signal_figure
from dsv3_mini.viz.widgets.explorer import Explorer, with_picture

# ---- attention and its mask --------------------------------------------------------------------------------------------

WORDS = ("Nora", "gave", "the", "lamp", "to", "Leon", "and", "left")
MASKS = ("-inf, before the softmax", "0, before the softmax", "0, after the softmax", "no mask")


def weights_by_mask(scores: Float[Tensor, "s t"], mask: str) -> Float[Tensor, "s t"]:
    """Attention weights under one of MASKS, the right one and three that are seen in the wild."""
    later = torch.ones_like(scores, dtype=torch.bool).triu(1)
    match MASKS.index(mask):
        case 0:
            return scores.masked_fill(later, -torch.inf).softmax(-1)
        case 1:
            return scores.masked_fill(later, 0.0).softmax(-1)
        case 2:
            return scores.softmax(-1).masked_fill(later, 0.0)
        case _:
            return scores.softmax(-1)


def mask_explorer() -> Explorer:
    """One head's weights for random queries and keys: width, scale and mask to be moved."""

    def draw(width: int, scaled: bool, mask: str, query: int) -> Figure:
        random = torch.Generator().manual_seed(4)
        queries, keys = (torch.randn(len(WORDS), width, generator=random) for _ in range(2))
        scores = einsum(queries, keys, "s q, t q -> s t") * (width**-0.5 if scaled else 1.0)
        return attention_figure(WORDS, weights_by_mask(scores, mask), query - 1)

    return Explorer(
        draw,
        "A table of attention weights, one row a query, and the weights of one chosen row as bars.",
        width=ipywidgets.SelectionSlider(options=[4, 16, 64, 256], value=16, description="width of a head"),
        scaled=ipywidgets.Checkbox(value=True, description="divide by its root"),
        mask=ipywidgets.Dropdown(
            options=MASKS, value=MASKS[0], description="mask", layout=ipywidgets.Layout(width="max-content")
        ),
        query=ipywidgets.IntSlider(value=4, min=1, max=len(WORDS), description="query"),
    )


# ---- the stream --------------------------------------------------------------------------------------------------------

ARRANGEMENTS: dict[str, type[BaselineBlock]] = {
    "norm first, then add (this course)": BaselineBlock,
    "add, then norm (2017)": PostNormBlock,
    "nothing added": NoResidualBlock,
}


def stream_explorer() -> Explorer:
    """What a batch leaves in a fresh net's stream, layer by layer."""
    random = torch.Generator().manual_seed(1)
    row = torch.randint(0, 64, (2, 25), generator=random)

    def draw(arrangement: str, layers: int, scale: float) -> Figure:
        shape = BaselineShape(vocab_size=64, width=64, layers=layers, heads=4, ffn_width=160, context=24)
        signals = {}
        for name, block in ARRANGEMENTS.items():
            model = _fresh(shape, block, scale)
            signals[name] = signal_by_layer(model, row[:, :-1], row[:, 1:])
        return signal_figure(signals, arrangement)

    return Explorer(
        draw,
        "Three curves by layer: the size of the states, how alike tokens are, and the gradient that arrives.",
        arrangement=ipywidgets.Dropdown(
            options=list(ARRANGEMENTS), description="arrangement", layout=ipywidgets.Layout(width="max-content")
        ),
        layers=ipywidgets.IntSlider(value=12, min=2, max=24, step=2, description="layers"),
        scale=ipywidgets.SelectionSlider(options=[0.25, 0.5, 1.0, 2.0], value=1.0, description="first weights, times"),
    )


def _fresh(shape: BaselineShape, block: type[BaselineBlock], scale: float) -> Baseline:
    """The same first weights for every arrangement; the caller's random numbers stay as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Baseline(shape, block)
    with torch.no_grad():
        for parameter in model.layers.parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
    return model


# ---- a training run, live ----------------------------------------------------------------------------------------------

# The lesson's own runs (BaselineShape(), seed 0, story_batches), each number the mean of five steps: drawn behind the
# reader's curve, and the picture of a page that no kernel serves.
RECORDED = {
    "with the stream": (
        7.96, 6.07, 4.60, 4.00, 3.74, 3.40, 3.00, 2.89, 2.80, 2.67,
        2.68, 2.48, 2.39, 2.39, 2.44, 2.37, 2.31, 2.24, 2.24, 2.36,
    ),
    "without it": (
        8.17, 6.49, 5.24, 5.03, 5.16, 5.14, 5.02, 5.03, 5.03, 5.04,
        5.06, 5.00, 4.94, 5.01, 5.01, 4.95, 4.99, 4.95, 4.97, 5.03,
    ),
}  # fmt: skip
RECORDED_TEXT = "One rainy morning, Nora was in the jungle. The jungle. At that time, Delia was resting in the jungle. The jungle. The jungle"


class LiveRun:
    """A button that trains, and a curve that grows while it does.

    Its picture is an `Image` widget, redrawn in place every few steps: no Output area, nothing flickers. Several runs take
    their steps in turn, so that their curves grow side by side. Pressed again, it trains on from where it was.

    Args:
        runs: name -> what begins (and, after an interrupted step, begins again) that run.
        draw: name -> losses so far -> Figure.
        alt: what the picture shows, in a sentence.
        steps: how many steps one press takes. every: how many steps pass between two pictures.
    """

    def __init__(
        self,
        runs: Mapping[str, Callable[[], Iterator[Step]]],
        draw: Callable[[Mapping[str, Sequence[float]]], Figure],
        alt: str,
        steps: int,
        every: int = 5,
    ) -> None:
        self.runs, self.draw, self.alt, self.steps, self.every = runs, draw, alt, steps, every
        self.losses: dict[str, list[float]] = {name: [] for name in runs}
        self._running: dict[str, Iterator[Step]] = {}
        self.button = ipywidgets.Button(
            description=f"Train {steps} steps",
            button_style="primary",
            tooltip="Takes some seconds; interrupt the kernel to stop early",
            layout=ipywidgets.Layout(width="auto"),
        )
        self.button.on_click(lambda _: self.train())
        self.picture = ipywidgets.Image(format="png", layout=ipywidgets.Layout(max_width="100%"))
        self.box = ipywidgets.VBox([self.button, self.picture])
        self.refresh()

    def train(self, steps: int | None = None) -> None:
        """Press the button; or take another number of steps than it does."""
        self.button.disabled = True
        count = self.steps if steps is None else steps
        try:
            for number in range(1, count + 1):
                for name in self.runs:
                    self._step(name)
                if number % self.every == 0 and number < count:
                    self.button.description = f"Training: step {number} of {count}"
                    self.refresh()
        finally:
            self.button.disabled = False
            self.button.description = f"Train {self.steps} more steps"
            self.refresh()

    def refresh(self) -> None:
        self.picture.value = png(self.draw(self.losses))

    def _step(self, name: str) -> None:
        stepping = self._running.pop(name, None) or self.runs[name]()
        self.losses[name].append(next(stepping).loss)
        self._running[name] = stepping  # only now: a generator that was interrupted cannot go on

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        return with_picture(self.box._repr_mimebundle_(), self.alt, self.picture.value)


def first_run(
    begin: Callable[[], Iterator[Step]], write: Callable[[], str], vocab_size: int, steps: int = 100
) -> LiveRun:
    """The first training of the course: its curve over the one that was recorded, and what the model writes by now."""

    def draw(losses: Mapping[str, Sequence[float]]) -> Figure:
        done = len(losses["loss"])
        written = f"after {done} steps it writes: {write()}" if done else f"after 100 steps ours wrote: {RECORDED_TEXT}"
        title = "The loss falls as the model learns to tell a story"
        return loss_figure(losses, {"loss": RECORDED["with the stream"]}, vocab_size, steps, title, written)

    alt = "The loss of a first training run by step: from about 8.9 nats per token to about 3 in a hundred steps."
    return LiveRun({"loss": begin}, draw, alt, steps, every=10)


def residual_race(
    with_stream: Sequence[float], begin: Callable[[], Iterator[Step]], vocab_size: int, steps: int = 40
) -> LiveRun:
    """A run without the residual stream, against one with it that was made before (`with_stream`, its losses)."""

    def draw(losses: Mapping[str, Sequence[float]]) -> Figure:
        done = len(losses["without it"])
        recorded = {name: values[: steps // RECORDED_EVERY] for name, values in RECORDED.items()}
        both = {"with the stream": with_stream[:done], "without it": losses["without it"]}
        return loss_figure(both, recorded, vocab_size, steps, "Without the residual stream the same net hardly learns")

    alt = "Loss by step of two nets: with the residual stream it falls fast, without it hardly below 5 nats per token."
    return LiveRun({"without it": begin}, draw, alt, steps)
