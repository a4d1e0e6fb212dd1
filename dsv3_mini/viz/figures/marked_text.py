"""A text whose tokens say where they came from: given, drafted and accepted, refused, or the main model's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from matplotlib.figure import Figure

from dsv3_mini.viz.figures.routing import COLUMNS, token_places
from dsv3_mini.viz.figures.tokens import shown
from dsv3_mini.viz.style import house_style

Kind = Literal["given", "own", "drafted", "refused"]
INK: dict[Kind, str] = {"given": "#5F5F5F", "own": "black", "drafted": "black", "refused": "#A34700"}
PAPER: dict[Kind, str] = {"given": "white", "own": "#F8E2B3", "drafted": "#B3E2D4", "refused": "#FFFFFF"}
_LINE = 0.27  # inches
MEANS: dict[Kind, str] = {
    "given": "given",
    "own": "the main model's own token, one a pass",
    "drafted": "drafted, and accepted",
    "refused": "drafted, and refused",
}


def marked_text_figure(words: Sequence[str], kinds: Sequence[Kind], title: str) -> Figure:
    """Tokens one after the other in lines; a colour behind each says where it came from, and a key what the colours mean."""
    with house_style():
        figure = Figure(figsize=(9.2, marked_height(words, kinds)), layout="none")
        draw_marked_text(figure, words, kinds, title)
    return figure


def marked_height(words: Sequence[str], kinds: Sequence[Kind]) -> float:
    """Inches that such a text takes, with title and key."""
    return 1.0 + _LINE * (_placed(words, kinds)[1][-1][0] + 1)


def draw_marked_text(
    figure: Figure, words: Sequence[str], kinds: Sequence[Kind], title: str, bottom: float = 0.0
) -> None:
    """The same at the top of a figure; `bottom` is how many inches below stay free."""
    whole = figure.get_figheight()
    drawn, places = _placed(words, kinds)
    lines = places[-1][0] + 1
    figure.suptitle(title, x=0.02, y=1 - 0.1 / whole, ha="left", va="top", fontsize=12.5, fontweight="bold")
    page = figure.add_axes((0.02, (bottom + 0.45) / whole, 0.96, _LINE * lines / whole))
    page.set(xlim=(0, COLUMNS + 4), ylim=(lines - 0.4, -0.6))
    page.axis("off")
    for number, (word, kind, (line, column)) in enumerate(zip(drawn, kinds, places, strict=True)):
        page.text(
            column, line, word.replace("$", r"\$"), family="monospace", fontsize=11, va="center",
            color=INK[kind], gid=f"{kind}-{number}", bbox={"facecolor": PAPER[kind], "edgecolor": "none", "pad": 1.2},
        )  # fmt: skip
        if kind == "refused":
            page.plot((column, column + len(word)), (line, line), color=INK[kind], linewidth=1.2, zorder=5)
    key = figure.add_axes((0.02, bottom / whole, 0.96, 0.4 / whole))
    key.set(xlim=(0, COLUMNS + 4), ylim=(0, 1))
    key.axis("off")
    column = 0.5
    for kind in (kind for kind in MEANS if kind in kinds):
        key.text(
            column, 0.5, MEANS[kind], fontsize=11, va="center", color=INK[kind],
            bbox={"facecolor": PAPER[kind], "edgecolor": "#BDBDBD", "pad": 2},
        )  # fmt: skip
        column += 0.87 * len(MEANS[kind]) + 4


def _placed(words: Sequence[str], kinds: Sequence[Kind]) -> tuple[list[str], list[tuple[int, int]]]:
    """Tokens as they can be drawn, and their lines and columns. A refused token never came to be: its line break breaks none."""
    drawn = [shown(word.encode()).replace("·", " ").replace("↵", "¶") for word in words]
    breaks = ["\n" in word and kind != "refused" for word, kind in zip(words, kinds, strict=True)]
    return drawn, token_places([word + "\n" * end for word, end in zip(drawn, breaks, strict=True)])
