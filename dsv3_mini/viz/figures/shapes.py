"""The shape microscope's pictures: where each element of a small tensor goes under an einops pattern.

The tensor counts 0, 1, 2, ... in the order in which its elements stand in memory. `trace` finds where each of them goes
by asking einops itself: it moves a tensor that is one at a single element and zero elsewhere, for every element at once.
The widget in viz/widgets/shapes.py draws the same arrays, from the same places and labels, and lets the elements travel.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod
from typing import Literal

import numpy as np
import torch
from einops import EinopsError, rearrange, reduce, repeat
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dsv3_mini.errors import UserError
from dsv3_mini.viz.style import COLOURS, house_style

MOST = 48  # elements that can still be told apart
GAP = 1.0  # cells between two blocks
LEFT, TOP, BETWEEN, BELOW = 2.4, 1.0, 3.6, 1.2  # cells around the two arrays, for their labels

Operation = Literal["rearrange", "reduce", "repeat"]


@dataclass(frozen=True)
class Side:
    """A tensor before or after: its axes as the pattern writes them, with their lengths."""

    names: tuple[str, ...]
    lengths: tuple[int, ...]

    @property
    def count(self) -> int:
        return prod(self.lengths)

    def index(self, element: int) -> tuple[int, ...]:
        """Where an element (its number in memory order) stands, an index per axis."""
        return tuple(int(i) for i in np.unravel_index(element, self.lengths)) if self.lengths else ()


@dataclass(frozen=True)
class Label:
    """A text beside an array; x and y in cells from the array's upper left corner, y down."""

    text: str
    x: float
    y: float
    anchor: Literal["center", "right"]


@dataclass(frozen=True)
class Move:
    """What a pattern does. `arrows` are (element before, element after), ordered by the first.

    `letters` says for each single axis before (h and q, where the pattern has (h q)) which index each element has on it.
    """

    pattern: str
    operation: Operation
    before: Side
    after: Side
    arrows: tuple[tuple[int, int], ...]
    letters: dict[str, tuple[int, ...]]

    def targets(self, element: int) -> list[tuple[int, ...]]:
        """The indices after, of one element before. `repeat` gives several."""
        return [self.after.index(target) for source, target in self.arrows if source == element]

    def sources(self, target: int, arrived: int | None = None) -> list[int]:
        """The elements that end in one place after, of those below `arrived`. `reduce` gives several."""
        limit = self.before.count if arrived is None else arrived
        return [source for source, to in self.arrows if to == target and source < limit]


def trace(pattern: str, **sizes: int) -> Move:
    """Follow every element through `rearrange`, `reduce` (a sum) or `repeat`; which of them, the pattern itself says.

    Args:
        pattern: such as "s (h q) -> h s q".
        sizes: the length of every letter in it.

    Raises:
        UserError: the pattern is none that einops knows, a length is missing, or the tensor is too large to be drawn.
    """
    left, arrow, right = (part.strip() for part in pattern.partition("->"))
    if not arrow:
        raise UserError(f"pattern {pattern!r} has no arrow: write it as 'before -> after'")
    before, after = _side(left, sizes, pattern), _side(right, sizes, pattern)
    if max(before.count, after.count) > MOST:
        raise UserError(f"pattern {pattern!r} moves {max(before.count, after.count)} elements: {MOST} can be shown")
    operation, letters = operation_of(pattern), re.findall(r"[A-Za-z]\w*", left)
    used = {name: sizes[name] for name in re.findall(r"[A-Za-z]\w*", pattern)}
    # Row i of `ones` is the tensor with a one at element i: all elements travel at once, each in a row of its own.
    ones = torch.eye(before.count).reshape(before.count, *before.lengths)
    widened = f"element {left} -> element {right}"
    try:
        if operation == "reduce":
            moved = reduce(ones, widened, "sum", **used)
        else:
            moved = (repeat if operation == "repeat" else rearrange)(ones, widened, **used)
    except EinopsError as error:
        raise UserError(f"pattern {pattern!r}: {str(error).strip().splitlines()[-1].strip()}") from None
    arrows = tuple((int(i), int(j)) for i, j in moved.reshape(before.count, -1).nonzero())
    grid = np.indices([sizes[name] for name in letters]).reshape(len(letters), -1)
    index = {name: tuple(int(i) for i in row) for name, row in zip(letters, grid, strict=True)}
    return Move(pattern, operation, before, after, arrows, index)


def operation_of(pattern: str) -> Operation:
    """Letters that appear are repeated, letters that vanish are reduced, else everything is only rearranged."""
    left, _, right = pattern.partition("->")
    old, new = (set(re.findall(r"[A-Za-z]\w*", side)) for side in (left, right))
    return "repeat" if new - old else "reduce" if old - new else "rearrange"


def places(side: Side) -> Float[np.ndarray, "count 2"]:
    """x and y of every element, in cells. The last axis runs right, the one before it down; further axes make blocks."""
    outer, blocks, rows, columns = _four(side)
    grid = np.indices((outer, blocks, rows, columns)).reshape(4, -1)
    return np.stack([grid[1] * (columns + GAP) + grid[3], grid[0] * (rows + GAP) + grid[2]], axis=1)


def extent(side: Side) -> tuple[float, float]:
    """Width and height of the whole array, in cells."""
    outer, blocks, rows, columns = _four(side)
    return blocks * (columns + GAP) - GAP, outer * (rows + GAP) - GAP


def labels(side: Side) -> list[Label]:
    """The names of the axes: columns below, rows on the left, and on each block where it stands."""
    outer, blocks, rows, columns = _four(side)
    names = side.names
    below = [Label(f"{names[-1]}: {columns}", columns / 2, extent(side)[1] + 0.55, "center")] if names else []
    left = [Label(f"{names[-2]}: {rows}", -0.25, rows / 2, "right")] if len(names) > 1 else []
    above = [
        Label(
            ", ".join(f"{name}={i}" for name, i in zip(names[:-2], (w, z)[4 - len(names) :], strict=True)),
            z * (columns + GAP) + columns / 2,
            w * (rows + GAP) - 0.4,
            "center",
        )
        for w in range(outer)
        for z in range(blocks)
        if len(names) > 2
    ]
    return [*below, *left, *above]


def ink(colour: str) -> str:
    """Black or white, whichever reads better on a colour (WCAG's relative luminance)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "black" if (luminance + 0.05) ** 2 > 1.05 * 0.05 else "white"


def shape_figure(move: Move, title: str, colour_by: str, moved: int | None = None) -> Figure:
    """The tensor before on the left, after on the right; the first `moved` elements have arrived (None: all).

    Args:
        colour_by: one of `move.letters`; elements with the same index on that axis have the same colour.
    """
    arrived = move.before.count if moved is None else moved
    colours = [COLOURS[i % len(COLOURS)] for i in move.letters[colour_by]]
    (width, height), (width_after, height_after) = extent(move.before), extent(move.after)
    tall = max(height, height_after)
    across = LEFT + width + BETWEEN + width_after + 0.6
    with house_style():
        figure = Figure(figsize=(max(6.5, 0.42 * across), 0.42 * (TOP + tall + BELOW) + 0.6))
        axes = figure.subplots()
        start = (LEFT, (tall - height) / 2)
        end = (LEFT + width + BETWEEN, (tall - height_after) / 2)
        for element, colour in enumerate(colours):
            place = places(move.before)[element] + start
            _cell(axes, place, str(element), f"before-{element}", colour, 0.22 if element < arrived else 1.0)
        for target in range(move.after.count):
            from_ = move.sources(target, arrived)
            colour = colours[from_[-1]] if from_ else None
            _cell(axes, places(move.after)[target] + end, str(sum(from_)) if from_ else "", f"after-{target}", colour)
        for side, corner in ((move.before, start), (move.after, end)):
            for label in labels(side):
                at = (corner[0] + label.x, corner[1] + label.y)
                axes.text(*at, label.text, ha=label.anchor, va="center", fontsize=12, gid="label")
        if 0 < arrived < move.before.count:
            _arrows(axes, move, arrived - 1, start, end)
        axes.set(xlim=(0, across), ylim=(tall + BELOW, -TOP), aspect="equal", title=title)
        axes.axis("off")
    return figure


def _cell(
    axes: Axes, place: Float[np.ndarray, " 2"], text: str, name: str, colour: str | None, strength: float = 1.0
) -> None:
    """A square with its number. No colour: a place that is still empty. A weak one: an element that has left."""
    full = colour is not None and strength == 1.0
    face = (*to_rgb(colour), strength) if colour is not None else "none"
    line = {"edgecolor": "#555555", "linewidth": 0.8, "linestyle": "-" if colour is not None else ":"}
    axes.add_patch(Rectangle((place[0] + 0.04, place[1] + 0.04), 0.92, 0.92, facecolor=face, gid=name, **line))
    colour_of_text = ink(colour) if full else "#333333"
    middle = (place[0] + 0.5, place[1] + 0.5)
    axes.text(*middle, text, ha="center", va="center", fontsize=12, color=colour_of_text, gid=f"text-{name}")


def _arrows(axes: Axes, move: Move, element: int, start: tuple[float, float], end: tuple[float, float]) -> None:
    """From the element that moved last to where it went."""
    origin = places(move.before)[element] + start + 0.5
    for target in (to for source, to in move.arrows if source == element):
        arrow = {"arrowstyle": "-|>", "color": "black", "linewidth": 1.6, "shrinkA": 6, "shrinkB": 6}
        tip = places(move.after)[target] + end + 0.5
        axes.annotate("", tip, origin, arrowprops={**arrow, "connectionstyle": "arc3,rad=-0.12"}, gid="arrow")


def _side(text: str, sizes: dict[str, int], pattern: str) -> Side:
    if "..." in text:
        raise UserError(f"pattern {pattern!r}: the microscope draws every axis: give each of '...' a letter")
    names = tuple(re.findall(r"\([^()]*\)|[^\s()]+", text))
    for letter in (letter for name in names for letter in name.strip("()").split()):
        if letter != "1" and letter not in sizes:
            raise UserError(f"pattern {pattern!r}: the microscope needs the length of {letter!r}: add {letter}=2")
    lengths = tuple(prod(sizes.get(letter, 1) for letter in name.strip("()").split()) for name in names)
    if len(names) > 4:
        raise UserError(f"pattern {pattern!r} has a side of {len(names)} axes: the microscope draws up to 4")
    return Side(names, lengths)


def _four(side: Side) -> tuple[int, int, int, int]:
    """The lengths with ones in front, four in all."""
    return (*(1,) * (4 - len(side.lengths)), *side.lengths)
