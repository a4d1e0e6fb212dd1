"""Text on its way into rows, as pictures: the domains, how documents fill rows, and what a token in a row can see."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Int
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from dsv3_mini.data.packing import NO_DOCUMENT
from dsv3_mini.model.transformer import same_document
from dsv3_mini.viz.style import COLOURS, DOMAIN_COLOURS, house_style

DOCUMENT_COLOURS = COLOURS[:7]  # without the grey: that is near to padding's
PADDING_COLOUR = (0.88, 0.88, 0.88)
SEEN, UNSEEN = 0.6, 0.12  # how much of its document's colour a token has
LINE = 100  # characters in a line of the viewer's text


# ---- domains ---------------------------------------------------------------------------------------------------------


def samples_figure(texts: Mapping[str, str], lines: int = 9, width: int = 100) -> Figure:
    """The beginning of one document of each domain, as it is written; longer lines are wrapped."""
    shown = {domain: _wrapped(text, lines, width) for domain, text in texts.items()}
    heights = [len(each) + 2 for each in shown.values()]
    with house_style():
        figure = Figure(figsize=(10, 0.21 * sum(heights)))
        panels = figure.subplots(len(shown), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axes, (domain, each) in zip(panels, shown.items(), strict=True):
            axes.axis("off")
            axes.set_title(domain, color=_dark(DOMAIN_COLOURS.get(domain, "black")))
            axes.text(0, 1, "\n".join(each), va="top", family="monospace", fontsize=11, parse_math=False)
    return figure


def _wrapped(text: str, lines: int, width: int) -> list[str]:
    shown = [part for line in text.split("\n") for part in textwrap.wrap(line, width, replace_whitespace=False) or [""]]
    return shown if len(shown) <= lines else [*shown[: lines - 1], "..."]


def lengths_figure(lengths: Mapping[str, Sequence[int]], row_length: int) -> Figure:
    """How long the documents of each domain are, in tokens, beside the length of a row."""
    everything = [n for values in lengths.values() for n in values]
    edges = np.arange(0, max(*everything, row_length) + 10, 10)
    fits = np.mean([n <= row_length for n in everything])
    with house_style():
        figure = Figure(figsize=(9, 3.6))
        axes = figure.subplots()
        for domain, values in lengths.items():
            share = 100 * np.histogram(values, edges)[0] / len(values)
            axes.stairs(share, edges, linewidth=2, label=domain, color=DOMAIN_COLOURS.get(domain))
        axes.axvline(row_length, color="black", linestyle="--", label="a row")
        axes.set(xlabel="length of a document (tokens)", ylabel="share of documents (%)")
        axes.set_title(f"{fits:.0%} of the documents fit into a row of {row_length} tokens")
        axes.legend()
    return figure


def bits_figure(bits: Mapping[str, float]) -> Figure:
    """Bits that each byte of a domain's text needs, as bars."""
    names = list(bits)
    with house_style():
        figure = Figure(figsize=(9, 0.5 * len(names) + 1.2))
        axes = figure.subplots()
        colours = [DOMAIN_COLOURS.get(name, COLOURS[-1]) for name in names]
        bars = axes.barh(names, [bits[name] for name in names], color=colours)
        axes.bar_label(bars, fmt="%.2f", padding=4)
        axes.invert_yaxis()
        axes.set(xlabel="bits per byte, compressed", title="The freer the text, the more bits each byte needs")
    return figure


# ---- rows ------------------------------------------------------------------------------------------------------------


def rows_figure(ways: Mapping[str, Int[Tensor, "rows s"]]) -> Figure:
    """The same documents laid into rows in several ways.

    Args:
        ways: for each way by name, the number of the document that stands at each place; -1 for padding. A label such
            as "3.." is a piece of document 3 that goes on in another row, "..3" one that began in another.
    """
    with house_style():
        figure = Figure(figsize=(11, sum(0.34 * len(rows) + 0.75 for rows in ways.values())))
        heights = [len(rows) + 1 for rows in ways.values()]
        panels = figure.subplots(len(ways), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axes, (name, rows) in zip(panels, ways.items(), strict=True):
            _draw_rows(axes, rows.numpy(), np.full(rows.shape, SEEN), torn=True)
            filled = float((rows != NO_DOCUMENT).float().mean())
            torn, count = torn_documents(rows)
            axes.set_title(f"{name}: {torn} of {count} documents torn, {filled:.0%} filled")
        panels[-1].set_xlabel("place in the row (tokens)")
    return figure


def torn_documents(rows: Int[Tensor, "rows s"]) -> tuple[int, int]:
    """How many documents stand in more than one row, and how many there are."""
    homes: dict[int, set[int]] = {}
    for r, row in enumerate(rows.tolist()):
        for document in set(row) - {NO_DOCUMENT}:
            homes.setdefault(document, set()).add(r)
    return sum(len(at) > 1 for at in homes.values()), len(homes)


def packing_cost_figure(
    row_lengths: Sequence[int], torn: Mapping[str, Sequence[float]], padding: Mapping[str, Sequence[float]]
) -> Figure:
    """What each way of filling rows costs at each row length: shares (0 to 1) of torn documents and of padding."""
    looks = {name: (COLOURS[i], "os^D"[i % 4]) for i, name in enumerate(dict.fromkeys([*torn, *padding]))}
    with house_style():
        figure = Figure(figsize=(11, 3.8))
        titles = "Documents torn apart", "Places that hold padding"
        for axes, title, shares in zip(figure.subplots(1, 2), titles, (torn, padding), strict=True):
            for name, values in shares.items():
                colour, marker = looks[name]
                axes.plot(row_lengths, [100 * v for v in values], marker=marker, label=name, color=colour)
            axes.set_xscale("log", base=2)
            axes.set_xticks(row_lengths, [str(n) for n in row_lengths])
            axes.set(title=title, xlabel="length of a row (tokens)", ylabel="share (%)", ylim=(-2, None))
            axes.legend()
    return figure


# ---- what a token sees -----------------------------------------------------------------------------------------------


def mask_figure(masks: Mapping[str, Bool[Tensor, "s t"]], document_ids: Int[Tensor, " s"]) -> Figure:
    """Who sees whom in one row: a square is coloured, as its key's document, where the query may look."""
    ids = document_ids.numpy()
    keys = np.stack([_colour(document, SEEN) for document in ids])
    borders = np.flatnonzero(np.diff(ids)) + 0.5
    with house_style():
        figure = Figure(figsize=(4.9 * len(masks), 4.9))
        panels = figure.subplots(1, len(masks), squeeze=False)[0]
        for axes, (name, mask) in zip(panels, masks.items(), strict=True):
            axes.imshow(np.where(mask.numpy()[..., None], keys[None], 1.0), interpolation="none")
            for border in borders:
                axes.axhline(border, color="black", linewidth=0.6)
                axes.axvline(border, color="black", linewidth=0.6)
            axes.set(title=f"{name}: {int(mask.sum())} pairs", xlabel="key: the token that is seen")
        panels[0].set_ylabel("query: the token that looks")
    return figure


def packing_figure(
    words: Sequence[Sequence[str]], document_ids: Int[Tensor, "rows s"], row: int, query: int, masked: bool
) -> Figure:
    """Packed rows, and what one token of them can see: full colour is seen, pale is not, grey is padding.

    Args:
        words: the text of each token, row by row; special tokens under names of your choice.
        document_ids: of `PackedBlock`. row, query: the token that looks; a row's last token is a target only.
        masked: whether attention keeps to one document (fine-tuning) or crosses into others (pre-training).
    """
    visible = visible_from(document_ids[row], query, masked)
    ids = document_ids.numpy()
    is_seen = np.zeros(ids.shape, dtype=bool)
    is_seen[row] = visible.numpy()
    padding = float((document_ids == NO_DOCUMENT).float().mean())
    with house_style():
        figure = Figure(figsize=(11, 5.6))
        rows, text = figure.subplots(2, 1, height_ratios=(3, 2))
        _draw_rows(rows, ids, np.where(is_seen, SEEN, UNSEEN), torn=False)
        outline = dict(fill=False, edgecolor="black", linewidth=2.5, zorder=4, clip_on=False)
        rows.add_patch(Rectangle((query - 0.5, row - 0.5), 1, 1, gid="looks", **outline))
        rows.set_title(f"{ids.shape[0]} rows: {1 - padding:.1%} filled, {padding:.1%} padding")
        rows.set(xlabel="place in the row (tokens)", ylabel="row")
        _draw_text(text, [_label(word) for word in words[row]], ids[row], visible.numpy(), query)
        text.set_title(_what_it_sees(words[row], ids[row], visible.numpy(), row, query))
    return figure


def visible_from(document_ids: Int[Tensor, " s"], query: int, masked: bool) -> Bool[Tensor, " t"]:
    """Which tokens of a row the token at `query` can see."""
    ids = document_ids if masked else document_ids.new_zeros(document_ids.shape)
    return same_document(ids[None])[0, query]


def _what_it_sees(words: Sequence[str], ids: np.ndarray, visible: np.ndarray, row: int, query: int) -> str:
    documents = len(set(ids[visible]) - {NO_DOCUMENT})
    target = "padding, ignored" if ids[query + 1] == NO_DOCUMENT else f"'{_label(words[query + 1])}'"
    sees = f"sees {_count(int(visible.sum()), 'token')} of {_count(documents, 'document')}"
    return f"Row {row}, place {query}: '{_label(words[query])}' {sees}; its target: {target}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


# ---- drawing ---------------------------------------------------------------------------------------------------------


def _draw_rows(axes: Axes, ids: np.ndarray, strength: np.ndarray, torn: bool) -> None:
    """Rows as strips, each document in its colour and under its number; padding hatched.

    torn: whether equal numbers in two rows are pieces of one document, to be marked so.
    """
    pairs = zip(ids.flat, strength.flat, strict=True)
    colours = np.array([_colour(document, amount) for document, amount in pairs]).reshape(*ids.shape, 3)
    axes.imshow(colours, aspect="auto", interpolation="none")
    last_row = {document: r for r, row in enumerate(ids) for document in row}
    first_row = {document: r for r, row in reversed(list(enumerate(ids))) for document in row}
    for r, row in enumerate(ids):
        starts = [0, *(np.flatnonzero(np.diff(row)) + 1), len(row)]
        for start, end in zip(starts, starts[1:], strict=False):
            document, middle = row[start], (start + end - 1) / 2
            if document == NO_DOCUMENT:
                place = (start - 0.5, r - 0.5)
                axes.add_patch(Rectangle(place, end - start, 1, fill=False, hatch="////", edgecolor="0.6", linewidth=0))
            else:
                before, after = (torn and first_row[document] < r) * "..", (torn and last_row[document] > r) * ".."
                axes.text(middle, r, f"{before}{document}{after}", ha="center", va="center", fontsize=11)
            axes.plot([end - 0.5, end - 0.5], [r - 0.5, r + 0.5], color="black", linewidth=0.8)
    for border in range(1, len(ids)):
        axes.axhline(border - 0.5, color="white", linewidth=3)
    axes.set_yticks(range(0, len(ids), 1 + len(ids) // 9))
    axes.tick_params(left=False)
    axes.set(xlim=(-0.5, ids.shape[1] - 0.5), ylim=(len(ids) - 0.5, -0.5))


def _draw_text(axes: Axes, labels: Sequence[str], ids: np.ndarray, visible: np.ndarray, query: int) -> None:
    """One row's tokens as text, a box for each, wrapped to the figure's width."""
    column, line = 0.0, 0
    for place, (label, document) in enumerate(zip(labels, ids, strict=True)):
        width = len(label) + 0.6
        if column + width > LINE:
            column, line = 0.0, line + 1
        looks = place == query
        box = Rectangle(
            (column, line - 0.38), width, 0.76, facecolor=_colour(document, SEEN if visible[place] else UNSEEN)
        )
        box.set(edgecolor="black" if looks else "none", linewidth=2.5 if looks else 0, gid=f"token {place}")
        axes.add_patch(box)
        ink = "black" if visible[place] else "0.42"
        style = dict(ha="center", va="center", family="monospace", fontsize=11, color=ink, parse_math=False)
        axes.text(column + width / 2, line, label, **style)
        column += width + 0.4
    axes.set(xlim=(-0.5, LINE + 4), ylim=(max(line, 4) + 0.6, -0.6))
    axes.axis("off")


def _label(word: str) -> str:
    """A token as it is printed: a space is a dot, a line break is spelled."""
    return word.replace(" ", "·").replace("\n", "\\n")


def _colour(document: int, strength: float) -> tuple[float, ...]:
    """A document's colour on white; padding is grey, seen or not."""
    if document == NO_DOCUMENT:
        return PADDING_COLOUR
    full = to_rgb(DOCUMENT_COLOURS[document % len(DOCUMENT_COLOURS)])
    return tuple(1 - strength * (1 - channel) for channel in full)


def _dark(colour: str) -> tuple[float, ...]:
    """A colour dark enough for letters on white."""
    return tuple(0.7 * channel for channel in to_rgb(colour))
