"""Tokens as pictures: a text coloured by its tokens, bytes per token by vocabulary, the token-boundary bias."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from matplotlib.ft2font import FT2Font
from matplotlib.patches import Rectangle

from dsv3_mini.viz.style import COLOURS, DOMAIN_COLOURS, house_style

FONT = "DejaVu Sans Mono"  # comes with matplotlib
COLUMNS = 60  # characters in a line
MAX_LINES = 9  # of one cut; what is longer is cut off, and said so
TINTS = ("#B3D5E8", "#F8E2B3", "#B3E2D4", "#F0D7E4")  # pale blue, orange, green and pink of the palette
VISIBLE = {" ": "·", "\n": "↵", "\t": "→"}  # what else would not be seen

_POINTS = 13
_CHARACTER = 0.602 * _POINTS / 72  # inches; the font's advance is 0.602 of its size
_LINE = 0.31  # inches
_COUNTS = 17  # columns that the counts take, beside the text


@dataclass(frozen=True)
class Box:
    """One token, or a part of one that is longer than a line, at its place in the picture."""

    line: int
    column: int
    text: str
    token: int


def shown(token: bytes) -> str:
    """A token as text to draw: blanks and breaks made visible, bytes that are no drawable character as `\\xE4`."""
    drawn = []
    for character in token.decode("utf-8", "surrogateescape"):
        if character in VISIBLE:
            drawn.append(VISIBLE[character])
        elif character.isprintable() and ord(character) in _characters():
            drawn.append(character)
        else:
            drawn += [f"\\x{byte:02X}" for byte in character.encode("utf-8", "surrogateescape")]
    return "".join(drawn)


def lay_out(tokens: Sequence[bytes], columns: int = COLUMNS) -> list[Box]:
    """Place tokens one after the other in lines of `columns` characters.

    A token that does not fit goes to the next line, whole where it can be; after a line break of the text the line ends.
    """
    boxes, line, column = [], 0, 0
    for number, token in enumerate(tokens):
        text = shown(token)
        for start in range(0, len(text), columns):
            part = text[start : start + columns]
            if column and column + len(part) > columns:
                line, column = line + 1, 0
            boxes.append(Box(line, column, part, number))
            column += len(part)
        if token.endswith(b"\n"):
            line, column = line + 1, 0
    return boxes


def tokens_figure(cuts: Mapping[str, Sequence[bytes]], title: str = "") -> Figure:
    """A text, cut in several ways; each token has a box, neighbours differ in colour, counts stand beside.

    Args:
        cuts: name of the way -> the bytes of its tokens.
        title: without one the title says the counts.
    """
    placed = [[box for box in lay_out(tokens) if box.line < MAX_LINES] for tokens in cuts.values()]
    tops, height = [], 1.5  # in lines; the title takes the first
    for boxes in placed:
        tops.append(height)
        height += 1 + max([box.line + 1 for box in boxes] + [2]) + 0.5  # the name, at least two lines, and air
    width = COLUMNS + _COUNTS + 2
    with house_style():
        figure = Figure(figsize=(width * _CHARACTER, height * _LINE), layout="none")
        axes = figure.add_axes((0, 0, 1, 1), xlim=(-1, width - 1), ylim=(height, 0))
        axes.axis("off")
        axes.text(0, 0.75, title or _counted(cuts), fontsize=14, fontweight="bold", va="center", parse_math=False)
        for name, tokens, boxes, top in zip(cuts, cuts.values(), placed, tops, strict=True):
            axes.text(0, top + 0.5, name, fontsize=12, va="center", color=COLOURS[0], parse_math=False)
            for box in boxes:
                corner = (box.column, top + 1.05 + box.line)
                tint = TINTS[box.token % len(TINTS)]
                axes.add_patch(Rectangle(corner, len(box.text), 0.9, facecolor=tint, edgecolor="white", linewidth=1.2))
                place = (box.column, top + 1.5 + box.line)
                axes.text(*place, box.text, family=FONT, fontsize=_POINTS, va="center_baseline", parse_math=False)
            for line, words in enumerate(_beside(tokens, len({box.token for box in boxes}))):
                axes.text(COLUMNS + 2, top + 1.5 + line, words, fontsize=12, va="center")
    return figure


def vocabulary_figure(sizes: Sequence[int], bytes_per_token: Mapping[str, Sequence[float]]) -> Figure:
    """How many bytes a token holds, by the size of the vocabulary, one line for each kind of text."""
    others = iter(COLOURS[len(DOMAIN_COLOURS) :])
    colours = {name: DOMAIN_COLOURS.get(name) or next(others) for name in bytes_per_token}
    top = 1.05 * max(max(values) for values in bytes_per_token.values())
    with house_style():
        figure = Figure(figsize=(8, 4.2))
        axes = figure.subplots()
        height = -1.0
        for name, values in sorted(bytes_per_token.items(), key=lambda item: item[1][-1]):
            axes.plot(sizes, values, marker="o", color=colours[name])
            height = max(values[-1], height + 0.065 * top)  # names keep apart where lines end side by side
            axes.text(1.07 * sizes[-1], height, name, color=colours[name], va="center")
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(sizes), [f"{size:,}" for size in sizes])
        axes.minorticks_off()
        axes.set(xlabel="vocabulary (tokens)", ylabel="bytes per token", ylim=(0, top))
        axes.set_xlim(sizes[0] * 0.9, sizes[-1] * 1.5)  # room for the names
        axes.set_title("A larger vocabulary packs more into a token")
    return figure


def boundary_figure(truth: float, measured: Mapping[float, float]) -> Figure:
    """How often a line break follows a bare full stop in training data, by the share of joined tokens that is split.

    Args:
        truth: the share of all sentence ends that are line ends.
        measured: split rate -> share of bare full stops before a break.
    """
    rates = [i / 200 for i in range(201)]
    with house_style():
        figure = Figure(figsize=(8, 4))
        axes = figure.subplots()
        axes.axhline(truth, color="black", linestyle="--", linewidth=1)
        axes.annotate("line ends among all sentence ends", (0, truth), xytext=(4, 5), textcoords="offset points")
        axes.plot(rates, [boundary_share(truth, rate) for rate in rates], color=COLOURS[0], label="predicted")
        axes.plot(*zip(*measured.items(), strict=True), "o", color=COLOURS[3], markersize=8, label="counted")
        axes.set(xlabel="share of joined tokens that is split", ylabel="share before a line break")
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.03 * truth, 1.25 * truth))
        axes.legend(loc="lower right")
        axes.set_title("Few splits, few breaks after a bare full stop")
    return figure


def belief_figure(by_bytes: Sequence[float], by_tokens: Sequence[float], rate: float) -> Figure:
    """A model's belief in a line break after a full stop, asked in two ways, with what a split rate lets us expect.

    Args:
        by_bytes: the belief before the full stop was written, one for each place. by_tokens: the belief after it.
        rate: the share of joined tokens that were split in training.
    """
    grid = [i / 200 for i in range(201)]
    with house_style():
        figure = Figure(figsize=(6.4, 4.6))
        axes = figure.subplots()
        axes.plot(grid, grid, color="black", linestyle="--", linewidth=1, label="no bias")
        axes.plot(grid, [boundary_share(p, rate) for p in grid], color=COLOURS[0], label=f"the formula, r = {rate:g}")
        axes.plot(by_bytes, by_tokens, "o", color=COLOURS[3], markersize=5, alpha=0.6, label="the model")
        axes.set(xlabel="P(line break), asked by bytes", ylabel="P(line break), asked by tokens")
        axes.set(xlim=(0, 1), ylim=(0, 1))
        axes.legend(loc="upper left")
        axes.set_title("Its tokens keep the model from saying what it knows")
    return figure


def boundary_share(truth: float, rate: float) -> float:
    """P(break | bare full stop) where the share `truth` of sentence ends are line ends and `rate` of those are split."""
    return rate * truth / (rate * truth + 1 - truth)


def _counted(cuts: Mapping[str, Sequence[bytes]]) -> str:
    """The numbers of tokens, in words: "59 bytes of text in 59 or 33 tokens"."""
    numbers = [f"{len(tokens):,}" for tokens in cuts.values()]
    n_bytes = sum(map(len, next(iter(cuts.values()))))
    listed = " or ".join([", ".join(numbers[:-1]), numbers[-1]]) if len(numbers) > 1 else numbers[0]
    return f"{n_bytes:,} bytes of text in {listed} tokens"


def _beside(tokens: Sequence[bytes], drawn: int) -> list[str]:
    lines = [f"{len(tokens):,} token" + "s" * (len(tokens) != 1)]
    lines += [f"{sum(map(len, tokens)) / len(tokens):.2f} bytes each"] if tokens else []
    return lines + ([f"{len(tokens) - drawn:,} not drawn"] if drawn < len(tokens) else [])


@cache
def _characters() -> frozenset[int]:
    """The code points that the font can draw."""
    return frozenset(FT2Font(findfont(FONT)).get_charmap())
