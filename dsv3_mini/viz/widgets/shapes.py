"""The shape microscope: pick an einops pattern, and watch each element travel from its place before to its place after.

The page's half is shapes.js. It draws the places, labels and arrows that figures/shapes.py computes, so that the moving
picture and the still one agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from dsv3_mini.errors import UserError
from dsv3_mini.viz.figures import png
from dsv3_mini.viz.figures.shapes import Move, Side, extent, ink, labels, places, shape_figure, trace
from dsv3_mini.viz.style import COLOURS
from dsv3_mini.viz.widgets.explorer import with_picture
from dsv3_mini.viz.widgets.page import save_page

MODULE = Path(__file__).with_name("shapes.js")


@dataclass(frozen=True)
class Specimen:
    """A pattern to look at: its name, the pattern, every letter's length, and the letter that gives the colours."""

    name: str
    pattern: str
    sizes: dict[str, int]
    colour: str

    @property
    def move(self) -> Move:
        return trace(self.pattern, **self.sizes)


SPECIMENS = (
    Specimen("split heads", "s (h q) -> h s q", {"s": 3, "h": 2, "q": 4}, "h"),
    Specimen("split heads, letters swapped", "s (q h) -> h s q", {"s": 3, "h": 2, "q": 4}, "h"),
    Specimen("merge heads", "h s v -> s (h v)", {"h": 2, "s": 3, "v": 4}, "h"),
    Specimen("transpose", "s d -> d s", {"s": 3, "d": 5}, "s"),
    Specimen("rows of a batch to one row of tokens", "b s d -> (b s) d", {"b": 2, "s": 3, "d": 4}, "b"),
    Specimen("sum over the experts of a group", "s (g m) -> s g", {"s": 3, "g": 3, "m": 3}, "g"),
    Specimen("sum over all tokens", "s e -> e", {"s": 4, "e": 6}, "e"),
    Specimen("one rope key for all heads", "t r -> t h r", {"t": 3, "r": 4, "h": 2}, "t"),
    Specimen("rope pairs: neighbours to halves", "t (p two) -> t (two p)", {"t": 2, "p": 4, "two": 2}, "two"),
    Specimen("keys and values, by head", "t (h two n) -> two t h n", {"t": 2, "h": 2, "two": 2, "n": 3}, "h"),
    Specimen("keys and values, by halves", "t (two h n) -> two t h n", {"t": 2, "h": 2, "two": 2, "n": 3}, "h"),
)


class ShapeMicroscope(anywidget.AnyWidget):
    """Controls: the pattern, the letter that colours, and how many elements have moved (by step, slider or play).

    Args:
        specimens: the patterns to choose from; without them, those that attention and the mixture of experts need.
    """

    _esm = MODULE
    scenes = traitlets.List().tag(sync=True)
    palette = traitlets.List().tag(sync=True)
    chosen = traitlets.Int(0).tag(sync=True)
    colour = traitlets.Unicode("").tag(sync=True)
    moved = traitlets.Int(0).tag(sync=True)

    def __init__(self, specimens: Sequence[Specimen] = SPECIMENS) -> None:
        if not specimens:
            raise UserError("the microscope has no pattern to show: give it one Specimen or more")
        self.specimens = tuple(specimens)
        first = self.specimens[0]
        super().__init__(
            scenes=[scene(specimen) for specimen in self.specimens],
            palette=[[colour, ink(colour)] for colour in COLOURS],
            colour=first.colour,
            moved=first.move.before.count,
        )

    @property
    def specimen(self) -> Specimen:
        return self.specimens[self.chosen]

    @property
    def move(self) -> Move:
        """Where the elements of the chosen pattern go."""
        return self.specimen.move

    def set(self, pattern: str | None = None, colour: str | None = None, moved: int | None = None) -> None:
        """Move the controls, as a reader would: `pattern` by its name in the list, or as the pattern itself.

        Raises:
            UserError: the microscope has no such pattern, letter, or number of elements.
        """
        if pattern is not None:
            known = [key for specimen in self.specimens for key in (specimen.name, specimen.pattern)]
            if pattern not in known:
                raise UserError(f"pattern {pattern!r} is not in the list: choose one of {', '.join(known[::2])}")
            self.chosen = known.index(pattern) // 2
        if colour is not None:
            self.colour = colour
        if moved is not None:
            self.moved = moved

    @traitlets.validate("colour")
    def _known_letter(self, proposal: Any) -> str:
        letters = self.move.letters
        if proposal["value"] not in letters:
            raise UserError(f"colour {proposal['value']!r} is no letter before the arrow: choose {', '.join(letters)}")
        return proposal["value"]

    @traitlets.validate("moved")
    def _within(self, proposal: Any) -> int:
        count = self.move.before.count
        if not 0 <= proposal["value"] <= count:
            raise UserError(f"moved = {proposal['value']}: this pattern has {count} elements to move")
        return proposal["value"]

    @traitlets.observe("chosen")
    def _from_the_start(self, _: Any) -> None:
        self.moved, self.colour = 0, self.specimen.colour

    @property
    def alt(self) -> str:
        """The picture in a sentence."""
        move, name = self.move, self.specimen.name
        count = move.before.count
        done = f"all {count}" if self.moved == count else f"{self.moved} of {count}"
        return (
            f"Shape microscope, {name}: {move.operation} {move.pattern!r} takes {_lengths(move.before)} to "
            f"{_lengths(move.after)}; {done} elements have moved."
        )

    def png(self) -> bytes:
        """The still picture of what the controls say."""
        title = f"{self.specimen.name}:  {self.specimen.pattern}"
        return png(shape_figure(self.move, title, self.colour, self.moved))

    def _repr_mimebundle_(self, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        return with_picture(super()._repr_mimebundle_(**options), self.alt, self.png())

    def save_html(self, path: str | Path) -> Path:
        """Write the microscope as one page that needs nothing else: no kernel, no network. Returns the path."""
        state = {name: getattr(self, name) for name in ("scenes", "palette", "chosen", "colour", "moved")}
        return save_page(path, MODULE, "Shape microscope", self.alt, state)


def scene(specimen: Specimen) -> dict[str, Any]:
    """What shapes.js draws, as plain numbers."""
    move = specimen.move
    return {
        "name": specimen.name,
        "pattern": specimen.pattern,
        "operation": move.operation,
        "colour": specimen.colour,
        "before": _array(move.before),
        "after": _array(move.after),
        "arrows": [list(arrow) for arrow in move.arrows],
        "letters": {letter: list(index) for letter, index in move.letters.items()},
    }


def _array(side: Side) -> dict[str, Any]:
    return {
        "places": places(side).tolist(),
        "index": [list(side.index(element)) for element in range(side.count)],
        "extent": list(extent(side)),
        "labels": [{"text": label.text, "x": label.x, "y": label.y, "anchor": label.anchor} for label in labels(side)],
    }


def _lengths(side: Side) -> str:
    return f"[{' '.join(f'{name}={length}' for name, length in zip(side.names, side.lengths, strict=True))}]"
