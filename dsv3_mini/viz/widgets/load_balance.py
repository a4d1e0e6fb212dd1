"""Widgets of lesson 09: the load balance player, a recorded training as a film; and the race of three runs, trained live.

The player's half in the page is load_balance.js. It gets all films at once and draws by itself: sliders, hover and play ask
Python nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import anywidget
import matplotlib
import torch
import traitlets
from einops import reduce
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from dsv3_mini.course.balance_runs import (
    EVERY,
    MOST,
    RACE,
    SHAPE,
    STEPS,
    WAYS,
    Film,
    Frame,
    Recording,
    balance_steps,
    fresh_model,
    recorded,
    training_batches,
    violations,
)
from dsv3_mini.errors import UserError
from dsv3_mini.viz.figures import png
from dsv3_mini.viz.figures.load_balance import Curve, player_figure, race_figure
from dsv3_mini.viz.style import COLOURS, LOAD_MAP
from dsv3_mini.viz.widgets.explorer import with_picture
from dsv3_mini.viz.widgets.page import save_page
from dsv3_mini.viz.widgets.transformer import LiveRun

MODULE = Path(__file__).with_suffix(".js")
SHADES = 64  # of the load colours

# ---- the player --------------------------------------------------------------------------------------------------------


class LoadBalancePlayer(anywidget.AnyWidget):
    """Controls: gamma and alpha (which choose among recorded runs), the layer, and the moment, by step, slider or play.

    Args:
        recording: the runs to choose from; without it, those that ship with the course.
    """

    _esm = MODULE
    films = traitlets.List(help="every run: gamma, alpha, score, loss, load and moves of the biases").tag(sync=True)
    facts = traitlets.Dict(help="what all films share: gammas, alphas, layers, every, most, losses").tag(sync=True)
    colours = traitlets.List(help="of the experts").tag(sync=True)
    ramp = traitlets.List(help="colours from no load to the largest").tag(sync=True)
    gamma_at = traitlets.Int(0, help="place of the chosen gamma in facts.gammas").tag(sync=True)
    alpha_at = traitlets.Int(0, help="place of the chosen alpha in facts.alphas").tag(sync=True)
    layer_at = traitlets.Int(0, help="place of the chosen layer in facts.layers").tag(sync=True)
    frame = traitlets.Int(0, help="where the film stands").tag(sync=True)

    def __init__(self, recording: Recording | None = None) -> None:
        self.recording = recorded() if recording is None else recording
        shades, films = matplotlib.colormaps[LOAD_MAP], self.recording.films
        layers = range(films[0].load.shape[1])
        super().__init__(
            films=[film.to_record() for film in films],
            facts={
                "gammas": self.recording.gammas,
                "alphas": self.recording.alphas,
                "layers": [SHAPE.first_k_dense_replace + layer for layer in layers],
                "every": EVERY,
                "most": MOST,
                "losses": list(loss_range(films)),
            },
            colours=list(COLOURS),
            ramp=[to_hex(shades(i / (SHADES - 1))) for i in range(SHADES)],
            frame=len(films[0]) - 1,
        )

    @property
    def film(self) -> Film:
        """The run that the sliders choose."""
        return self.recording.film(self.facts["gammas"][self.gamma_at], self.facts["alphas"][self.alpha_at])

    @property
    def max_vio(self) -> float:
        """At the moment and in the layer that are shown."""
        return float(self.film.max_vio[self.frame, self.layer_at])

    def set(
        self, gamma: float | None = None, alpha: float | None = None, layer: int | None = None, frame: int | None = None
    ) -> None:
        """Move the controls, as a reader would. `layer` is the model's number of it; a negative `frame` counts from the end.

        Raises:
            UserError: it was not recorded.
        """
        for name, value, known in (
            ("gamma", gamma, self.facts["gammas"]),
            ("alpha", alpha, self.facts["alphas"]),
            ("layer", layer, self.facts["layers"]),
        ):
            if value is not None and value not in known:
                raise UserError(f"{name} = {value:g} was not recorded: choose {', '.join(f'{one:g}' for one in known)}")
            if value is not None:
                setattr(self, f"{name}_at", known.index(value))
        if frame is not None:
            if not -len(self.film) <= frame < len(self.film):
                raise UserError(f"frame = {frame}: the film has {len(self.film)} frames, from 0")
            self.frame = frame % len(self.film)

    @property
    def alt(self) -> str:
        """The picture in a sentence."""
        film = self.film
        return (
            f"Load balance player, gamma {film.gamma:g} and alpha {film.alpha:g}: load and bias of "
            f"{film.load.shape[-1]} experts in layer {self.facts['layers'][self.layer_at]} at step "
            f"{(self.frame + 1) * EVERY}, and MaxVio and loss of the whole run beside those of a run left alone."
        )

    def figure(self) -> Figure:
        """The same picture without a browser."""
        name = f"layer {self.facts['layers'][self.layer_at]}"
        losses = tuple(self.facts["losses"])
        return player_figure(self.film, self.recording.film(0.0), self.layer_at, name, self.frame, MOST, losses)

    def _repr_mimebundle_(self, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        return with_picture(super()._repr_mimebundle_(**options), self.alt, png(self.figure()))

    def save_html(self, path: str | Path) -> Path:
        """Write the player as one page that needs nothing else: no kernel, no network. Returns the path."""
        state = {
            name: getattr(self, name)
            for name in ("films", "facts", "colours", "ramp", "gamma_at", "alpha_at", "layer_at", "frame")
        }
        return save_page(path, MODULE, "Load balance player", self.alt, state)


def loss_range(films: Sequence[Film]) -> tuple[float, float]:
    """An axis that holds the losses of all films, so that two of them can be compared."""
    losses = torch.cat([film.loss for film in films])
    return round(float(losses.min()) - 0.1, 1), round(float(losses.max()) + 0.1, 1)


# ---- the race ----------------------------------------------------------------------------------------------------------

WINDOW = 8  # steps that a point of a curve is made of


class BalanceRace(LiveRun):
    """Three runs from the same weights on the same text, each a step in turn, with a picture that grows.

    models: name -> the model as it is now. frames: name -> its steps so far.
    """

    def __init__(self, names: Sequence[str] = RACE, steps: int = 40, seed: int = 0) -> None:
        self.models = {name: fresh_model(seed) for name in names}
        self.frames: dict[str, list[Frame]] = {name: [] for name in names}
        self.seed = seed
        before = {
            name: curve_of(film.loss, film.load, WINDOW // EVERY, EVERY)
            for name, film in ((name, recorded().film(WAYS[name].gamma, WAYS[name].alpha)) for name in names)
        }

        def draw(_: Mapping[str, Sequence[float]]) -> Figure:
            curves = {name: curve_of_frames(frames) for name, frames in self.frames.items()}
            return race_figure(curves, before, STEPS, MOST - 1)

        super().__init__(
            {name: lambda name=name: self._begin(name) for name in names},
            draw,
            f"MaxVio and loss by step of {len(names)} runs: {', '.join(names)}.",
            steps,
            every=20,
        )

    def _begin(self, name: str) -> Iterator[Frame]:
        batches = cycle(training_batches(seed=self.seed))
        for frame in balance_steps(self.models[name], batches, WAYS[name]):
            self.frames[name].append(frame)
            yield frame


def balance_race() -> BalanceRace:
    """The lesson's three ways, not yet begun; behind them the recorded runs."""
    return BalanceRace()


def curve_of(loss: torch.Tensor, load: torch.Tensor, window: int, every: int) -> Curve:
    """Points of `window` frames: their mean loss, and MaxVio of their load together. loss [frames], load [frames l e]."""
    points = len(loss) // window
    if not points:
        return Curve([], [], [])
    loss, load = loss[: points * window], load[: points * window]
    together = reduce(load, "(points w) l e -> points l e", "sum", w=window)
    return Curve(
        [(i + 0.5) * window * every for i in range(points)],
        violations(together).mean(-1).tolist(),
        reduce(loss, "(points w) -> points", "mean", w=window).tolist(),
    )


def curve_of_frames(frames: Sequence[Frame]) -> Curve:
    """The same of single steps."""
    if not frames:
        return Curve([], [], [])
    losses = torch.tensor([frame.loss for frame in frames])
    return curve_of(losses, torch.stack([frame.load for frame in frames]), WINDOW, 1)
