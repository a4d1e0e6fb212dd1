"""The map of the course: DeepSeek-V3 as a picture, with every lesson at the part that it builds."""

from __future__ import annotations

from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from dsv3_mini.config import ModelConfig
from dsv3_mini.viz.style import COLOURS, house_style

WIDTH, HEIGHT = 124, 84  # of the drawing, in tenths of an inch
PILL = 3.4  # height of a lesson's label
_RELEASED = ModelConfig()  # the 671B model
INK, PANEL, BOX, EDGE = "#222222", "#F6F6F6", "#FFFFFF", "#8C8C8C"


@dataclass(frozen=True)
class Lesson:
    """A lesson on the map: its part of the course, and the lower left corner and width of its label."""

    number: int
    name: str
    part: str
    x: float
    y: float
    width: float


PARTS = ("foundations", "architecture", "training", "scale", "inference", "post-training")
PART_COLOURS = dict(zip(PARTS, (COLOURS[7], *COLOURS[:5]), strict=True))

_MODEL = [  # number, name, part, x, y, width: at their place in the model
    (0, "the tour", "foundations", 3, 77, 14),
    (1, "shapes, einops", "foundations", 43, 4.6, 20),
    (2, "tokenizer", "foundations", 5, 4.6, 15),
    (3, "data", "foundations", 22, 4.6, 11),
    (4, "transformer", "foundations", 55.5, 54, 15.5),
    (5, "RoPE", "architecture", 7, 34.4, 12),
    (6, "latent attention", "architecture", 7, 30.2, 23),
    (7, "KV cache", "architecture", 20, 34.4, 15),
    (8, "DeepSeekMoE", "architecture", 7, 52.2, 20),
    (9, "load balance", "architecture", 28.5, 52.2, 18.5),
    (10, "node-limited routing", "architecture", 7, 48, 28),
    (11, "multi-token prediction", "architecture", 42, 67.2, 28),
    (12, "whole model", "architecture", 56, 77, 17),
]
_AROUND = {  # what is done with the model, from the top of the right column down
    "training": ("Training", ["pre-training", "ablations", "FP8 numbers", "FP8 training", "long context"], 13),
    "scale": ("Scale", ["collectives", "expert parallelism", "DualPipe", "cluster"], 18),
    "inference": ("Inference", ["speculative decoding", "serving"], 22),
    "post-training": ("After training", ["SFT", "GRPO", "distillation", "evaluation", "capstone"], 24),
}
_COLUMN, _PILL_WIDTH = 77, 21.9
_STEP, _HEAD, _GAP = 4.8, 5.0, 4.0  # between labels, above them, between panels


def _around() -> tuple[list[Lesson], list[tuple[str, float, float]]]:
    """The right column's lessons, and its panels as (title, y, height)."""
    lessons, panels, top = [], [], HEIGHT - 3.0
    for part, (title, names, first) in _AROUND.items():
        rows = (len(names) + 1) // 2
        height = _HEAD + rows * _STEP + 0.8
        panels.append((title, top - height, height))
        for i, name in enumerate(names):
            x, y = _COLUMN + 1 + (i % 2) * (_PILL_WIDTH + 0.5), top - _HEAD - (i // 2 + 1) * _STEP + 0.5
            lessons.append(Lesson(first + i, name, part, x, y, _PILL_WIDTH))
        top -= height + _GAP
    return lessons, panels


_OUTSIDE, _PANELS = _around()
LESSONS = tuple(sorted([*(Lesson(*each) for each in _MODEL), *_OUTSIDE], key=lambda lesson: lesson.number))


def map_figure(here: int | None = None) -> Figure:
    """The model from its tokens (below) to its predictions (above), and what is done with it, with the lessons' numbers.

    Args:
        here: the number of a lesson to mark.
    """
    with house_style():
        figure = Figure(figsize=(WIDTH / 10, HEIGHT / 10), layout="none")
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
        axes.axis("off")
        _draw_model(axes)
        for title, y, height in _PANELS:
            _box(axes, _COLUMN - 1, y, WIDTH - _COLUMN, height, PANEL)
            _say(axes, _COLUMN + 1, y + height - 2.8, title, weight="bold")
        for lesson in LESSONS:
            _pill(axes, lesson, lesson.number == here)
    return figure


def _draw_model(axes: Axes) -> None:
    _box(axes, 1, 1, 74, HEIGHT - 4, PANEL)
    _say(axes, 20, 78.7, "DeepSeek-V3, lesson by lesson", weight="bold", size=14)
    _box(axes, 3, 3, 36, 9.4, BOX)
    _say(axes, 5, 10.2, "text becomes tokens")
    _say(axes, 43, 10.2, "the language of all of it")
    _box(axes, 3, 15, 36, 4.2, BOX)
    _say(axes, 5, 17.1, "embedding: a vector for each token")

    _box(axes, 3, 22, 70, 39, "#ECECEC")
    _say(axes, 5, 25.1, f"a layer, {_RELEASED.num_hidden_layers} times over")
    _box(axes, 5, 28.4, 48, 14, BOX)
    _say(axes, 7, 40, "attention: each token reads the earlier ones")
    _box(axes, 5, 46, 48, 13.6, BOX)
    _say(axes, 7, 57.6, "feed-forward: each token visits its experts")
    _say(axes, 56, 52, "both read a norm\nof one stream of\nvectors, and add\nto it", va="top")
    _say(
        axes,
        56,
        41,
        f"the first {_RELEASED.first_k_dense_replace} layers\nhave one plain\nfeed-forward in\nplace of experts",
        va="top",
    )
    _box(axes, 3, 64, 36, 8.4, BOX)
    _say(axes, 5, 68.2, "output head: the next token")
    _box(axes, 40, 64, 33, 8.4, BOX)
    _say(axes, 42, 65.6, "and the one after it")
    for x, low, high in ((21, 12.4, 15), (21, 19.2, 22), (29, 42.4, 46), (21, 61, 64), (56.5, 61, 64)):
        axes.annotate("", (x, high), (x, low), arrowprops={"arrowstyle": "-|>", "color": INK, "linewidth": 1.4})


def _pill(axes: Axes, lesson: Lesson, here: bool) -> None:
    colour = PART_COLOURS[lesson.part]
    # The part's own colour as the edge, and a tint of it below dark words, so that all six read equally well.
    _box(axes, lesson.x, lesson.y, lesson.width, PILL, "#FFFFFF", edge=colour, line=2.6 if here else 1.4)
    _box(axes, lesson.x, lesson.y, lesson.width, PILL, colour, edge="none", alpha=0.6 if here else 0.22)
    words = f"{lesson.number:02d} {lesson.name}"
    _say(
        axes,
        lesson.x + 0.7,
        lesson.y + PILL / 2 - 0.1,
        words,
        weight="bold" if here else "normal",
        gid=f"lesson-{lesson.number:02d}",
    )


def _box(
    axes: Axes,
    x: float,
    y: float,
    width: float,
    height: float,
    face: str,
    edge: str = EDGE,
    line: float = 1.0,
    alpha: float | None = None,
) -> None:
    shape = "round,pad=0,rounding_size=0.8"
    axes.add_patch(
        FancyBboxPatch(
            (x, y), width, height, boxstyle=shape, facecolor=face, edgecolor=edge, linewidth=line, alpha=alpha
        )
    )


def _say(
    axes: Axes,
    x: float,
    y: float,
    words: str,
    size: int = 11,
    va: str = "center",
    weight: str = "normal",
    gid: str = "",
) -> None:
    axes.text(x, y, words, fontsize=size, va=va, color=INK, fontweight=weight, gid=gid)
