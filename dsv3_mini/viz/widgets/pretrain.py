"""Widgets of lesson 13: a training board, live, with pause; and experts by domain, before and after a training.

The board's half in the page is pretrain.js. Python trains, on a thread of its own while the reader looks on, and sends what
was logged; the page draws, and asks Python nothing but to train, to pause, to take one step or to begin again.
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import anywidget
import ipywidgets
import matplotlib
import torch
import traitlets
from jaxtyping import Float
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from torch import Tensor

from dsv3_mini.config import ModelConfig
from dsv3_mini.course.pretrain_run import SHAPE, TOKENS, Scores, read_by_grammar, run_recipe, thinned
from dsv3_mini.data.tokenizer import Tokenizer
from dsv3_mini.errors import UserError
from dsv3_mini.train.balance import routers
from dsv3_mini.train.recipe import Recipe
from dsv3_mini.train.trainer import Observer, StepReport, Trainer
from dsv3_mini.viz.figures import png
from dsv3_mini.viz.figures.pretrain import (
    BIAS_MAP,
    MOST_LOAD,
    board_figure,
    specialisation_figure,
    unit_of,
)
from dsv3_mini.viz.style import COLOURS, DOMAIN_COLOURS, LOAD_MAP
from dsv3_mini.viz.widgets.explorer import Explorer, with_picture
from dsv3_mini.viz.widgets.page import save_page

MODULE = Path(__file__).with_suffix(".js")
POINTS = 200  # of a curve, at most
SHADES = 32  # of the load and bias colours
BETWEEN = 0.4  # seconds from one message to the page to the next
LENGTHS = (1, 10, 50)  # times the run of `TOKENS`: half a minute, minutes, half an hour
SHOWN = ("lines", "measured", "sample", "facts", "colours", "load_ramp", "bias_ramp", "at", "status", "note")
KEPT = (
    "step", "tokens", "loss", "mtp_loss", "grad_norm", "learning_rate", "batch_size", "gamma", "mtp_lambda", "load",
    "max_vio", "bias",
)  # fmt: skip


class TrainingBoard(anywidget.AnyWidget):
    """`board = TrainingBoard()` shows a run that has not begun; its buttons train, pause, step and begin again.

    Without a browser: `board.train(steps=20)` trains here and now, `board.train()` to the end of the recipe; `board.start()`
    trains on a thread until `board.pause()`. However it was cut into slices, the same steps give the same weights.

    Args:
        tokens: how long the run is; its schedules are stretched to it.
        cfg, recipe: another model, and another recipe than `run_recipe(tokens)`.
        tokenizer: what reads the text; the one that ships, by default.
    """

    _esm = MODULE
    lines = traitlets.List(help="steps, as the log has them, thinned").tag(sync=True)
    measured = traitlets.List(help="evaluations: tokens, loss and bits per byte by domain, judged share").tag(sync=True)
    sample = traitlets.List(help="sentences that the model wrote last, and whether the grammar has each").tag(sync=True)
    facts = traitlets.Dict(
        help="of the run: total tokens, clip, lengths to choose from, the load of the last colour"
    ).tag(sync=True)
    colours = traitlets.Dict(help="of domains, and of layers").tag(sync=True)
    load_ramp = traitlets.List(help="colours from no load to the most").tag(sync=True)
    bias_ramp = traitlets.List(help="colours from the lowest bias to the highest").tag(sync=True)
    at = traitlets.Int(-1, help="the line that the reader stands on; -1: the last").tag(sync=True)
    status = traitlets.Unicode("paused", help="training, paused or ended").tag(sync=True)
    speed = traitlets.Float(0.0, help="tokens a second, now").tag(sync=True)
    note = traitlets.Unicode("", help="what stopped the run, if something did").tag(sync=True)

    def __init__(
        self,
        tokens: int = TOKENS,
        cfg: ModelConfig = SHAPE,
        recipe: Recipe | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self.cfg, self.recipe = cfg, recipe or run_recipe(tokens)
        self.tokenizer = tokenizer or Tokenizer.shipped()
        self.scores = Scores(list(self.recipe.mixture), self.tokenizer, round(self.recipe.context(0)))
        self.trainer: Trainer | None = None
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        load, bias = matplotlib.colormaps[LOAD_MAP], matplotlib.colormaps[BIAS_MAP]
        super().__init__(
            colours={"domains": dict(DOMAIN_COLOURS), "layers": list(COLOURS)},
            load_ramp=[to_hex(load(i / (SHADES - 1))) for i in range(SHADES)],
            bias_ramp=[to_hex(bias(i / (SHADES - 1))) for i in range(SHADES)],
        )
        self.reset()
        self.on_msg(self._asked)

    # ---- what a reader does ------------------------------------------------------------------------------------------

    def train(self, steps: int | None = None) -> None:
        """Train here and now: so many steps, or to the recipe's end. A run on the thread is paused first."""
        self.pause()
        last = None if steps is None else self.trainer.step + steps
        self.status, self.at = "training", -1
        self._run(lambda: last is not None and self.trainer.step >= last)

    def start(self) -> None:
        """Train on a thread until `pause` or the end; a run that has ended begins again."""
        if self.training:
            return
        if self.ended:
            self.reset()
        self._stop.clear()
        self.status, self.at = "training", -1
        threads = torch.get_num_threads()

        def work() -> None:
            torch.set_num_threads(threads)  # which a new thread does not inherit
            self._run(self._breathe)

        self._thread = threading.Thread(target=work, name="training-board", daemon=True)
        self._thread.start()

    def pause(self) -> None:
        """Stop after the step that is being taken. The run is saved, and goes on from here."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def step(self) -> None:
        """One step, and pause."""
        if not self.ended:
            self.train(steps=1)

    def reset(self) -> None:
        """Begin again: the first weights, the first text."""
        self.pause()
        if self.trainer is not None:
            self.trainer.stream.close()
            self._folder.cleanup()
        self._folder = tempfile.TemporaryDirectory(prefix="dsv3-board-")
        self._begin()
        self._lines: list[Mapping[str, Any]] = []
        self._measured: list[Mapping[str, Any]] = []
        self.note, self.at, self.speed = "", -1, 0.0
        first = {"kind": "evaluation", "step": 0, "tokens": 0, **self.scores.evaluate(self.trainer)}
        self._measured.append(first)
        self.facts = {
            "total": self.recipe.total_tokens,
            "clip": self.recipe.clip_norm,
            "lengths": [times * TOKENS for times in LENGTHS],
            "most": MOST_LOAD,
        }
        self.status = "paused"
        self._tell()

    def set(self, step: int | None = None, tokens: int | None = None) -> None:
        """Move the controls, as a reader would.

        Args:
            step: stand on the line nearest to this step; -1 is the last one. tokens: another length, for which the run
                begins again with stretched schedules.

        Raises:
            UserError: nothing was trained yet, or there is no such step. ConfigError: no such length.
        """
        if tokens is not None:
            self.recipe = self.recipe.replace(
                total_tokens=tokens,
                evaluate_every=max(1, tokens // 7),
                checkpoint_every=max(1, tokens // 4),
            )
            self.reset()
        if step is None:
            return
        last = self.trainer.step
        if step != -1 and not 1 <= step <= last:
            raise UserError(
                f"step {step} is not there: steps 1 to {last} were taken" if last else "nothing was trained yet"
            )
        near = min(range(len(self.lines)), key=lambda i: abs(self.lines[i]["step"] - step), default=-1)
        self.at = -1 if step == -1 else near

    # ---- what it is --------------------------------------------------------------------------------------------------

    @property
    def training(self) -> bool:
        """Whether the thread trains now."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def ended(self) -> bool:
        """Whether the recipe has come to its end."""
        return self.trainer.tokens >= self.recipe.total_tokens

    @property
    def history(self) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
        """All steps so far and all evaluations, as the log has them; step 0's evaluation is the first."""
        return list(self._lines), list(self._measured)

    @property
    def alt(self) -> str:
        """The picture in a sentence."""
        taken = self.trainer.step
        return (
            f"Training board of a run, after {taken:,} steps: losses and bits per byte by domain, what the grammar says of a "
            f"sample, gradient norm, learning rate, load and bias of {self.cfg.n_routed_experts} experts by layer, and MaxVio."
        )

    def figure(self) -> Figure:
        """The same picture without a browser, and without what a clock says."""
        last = self._lines[-1] if self._lines else None
        unit, word = unit_of(max(self.recipe.total_tokens, 1000))
        done, total = (tokens / unit for tokens in (self.trainer.tokens, self.recipe.total_tokens))
        title = f"Step {self.trainer.step:,}: {done:.3g} of {total:.3g} {word} tokens"
        if last:
            title += f", {last['batch_size']} sequences a batch, gamma {last['gamma']:g}, lambda {last['mtp_lambda']:g}"
        words = "It writes: " + " ".join(
            text + {True: " (right)", False: " (wrong)", None: " ..."}[ok] for text, ok in self.sample
        )
        return board_figure(self.lines, self.measured, title, at=self.at, clip=self.recipe.clip_norm, words=words)

    def _repr_mimebundle_(self, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        return with_picture(super()._repr_mimebundle_(**options), self.alt, png(self.figure()))

    def save_html(self, path: str | Path) -> Path:
        """Write the board as it is now as one page that needs nothing else: no kernel, no network. Returns the path."""
        state = {name: getattr(self, name) for name in SHOWN}
        return save_page(path, MODULE, "Training board", self.alt, {**state, "speed": 0.0})

    # ---- training ----------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """The run in this board's folder: from its beginning, or from its last checkpoint."""
        with torch.random.fork_rng(devices=[]):
            self.trainer = Trainer(Path(self._folder.name) / "run", self.cfg, self.recipe, self.tokenizer)

    def _run(self, should_stop: Callable[[], bool]) -> None:
        try:
            self.trainer.run([_Watcher(self), self.scores], should_stop)
        except BaseException as error:
            # Stopped within a step, with half of a gradient there. As after a kill, go on from the last checkpoint.
            self.trainer.stream.close()
            self._begin()
            self._lines = [line for line in self._lines if line["step"] <= self.trainer.step]
            self._measured = [line for line in self._measured if line["step"] <= self.trainer.step]
            if not isinstance(error, UserError):
                raise
            self.note = str(error)
        finally:
            self.speed = 0.0
            self.status = "ended" if self.ended else "paused"
            self._tell()

    def _breathe(self) -> bool:
        """Between two steps on the thread: whoever else has something to do in this process does it now."""
        time.sleep(0.001)
        return self._stop.is_set()

    def _took(self, report: StepReport) -> None:
        biases = {router.layer: router.e_score_correction_bias for router in routers(self.trainer.model)}
        bias = {layer: [round(b, 4) for b in values.tolist()] for layer, values in biases.items() if values is not None}
        line = {name: value for name, value in {**report.to_log(), "bias": bias}.items() if name in KEPT}
        self._lines.append({"kind": "step", **json.loads(json.dumps(line))})
        self._speed += (0.2 if self._speed else 1.0) * (report.tokens_per_second - self._speed)
        if time.monotonic() - self._sent >= BETWEEN:
            self._tell()

    def _scored(self, scores: Mapping[str, Any]) -> None:
        now = {"kind": "evaluation", "step": self.trainer.step, "tokens": self.trainer.tokens}
        self._measured.append({**now, **scores})

    def _tell(self) -> None:
        with self.hold_sync():
            self.lines, self.measured = thinned(self._lines, POINTS), list(self._measured)
            self.sample = [[text, ok] for text, ok in read_by_grammar(self._measured[-1]["sample"])]
            if self.status == "training":
                self.speed = self._speed
        self._sent = time.monotonic()

    _sent = 0.0  # when the page was told last
    _speed = 0.0

    def _asked(self, _: Any, content: Any, buffers: Any) -> None:
        """The page asks. An error in here would show nowhere, so that it becomes the note."""
        wishes = {"train": self.start, "pause": self.pause, "step": self.step, "reset": self.reset}
        try:
            match content:
                case {"do": str(wish)} if wish in wishes:
                    wishes[wish]()
                case {"tokens": int(tokens)}:
                    self.set(tokens=tokens)
        except UserError as error:
            self.note = str(error)


class _Watcher(Observer):
    """Tells a board of what its trainer does."""

    def __init__(self, board: TrainingBoard) -> None:
        self.board = board

    def on_step(self, report: StepReport) -> None:
        self.board._took(report)

    def on_evaluation(self, scores: dict[str, Any]) -> None:
        self.board._scored(scores)


# ---- who serves whom ---------------------------------------------------------------------------------------------------


def specialisation_explorer(
    loads: Mapping[str, Float[Tensor, "n l e"]], domains: Sequence[str], first_layer: int
) -> Explorer:
    """Experts by domain at two moments of a training. `set(layer=..., sort=...)` moves it.

    Args:
        loads: moment -> the load that each domain brings to each sparse layer. first_layer: the number of the first of them.
    """
    count = next(iter(loads.values())).shape[1]

    def draw(layer: int, sort: bool) -> Figure:
        own = {moment: load[:, layer - first_layer] for moment, load in loads.items()}
        return specialisation_figure(own, domains, layer, sort)

    return Explorer(
        draw,
        "Before and after training: how the tokens of each domain spread over the experts of a layer, and whom each serves.",
        layer=ipywidgets.IntSlider(
            value=first_layer + count - 1, min=first_layer, max=first_layer + count - 1, description="layer"
        ),
        sort=ipywidgets.Checkbox(value=True, description="experts by favourite domain"),
    )
