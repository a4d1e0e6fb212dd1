"""The ledger as a picture: what a model of each size holds, remembers and costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dsv3_mini.ledger import Ledger
from dsv3_mini.viz.style import COLOURS, house_style

PALE = 0.3  # opacity of the models that are not marked


def ledger_figure(books: Mapping[str, Ledger], marked: str, context: int) -> Figure:
    """Three views of every model, one of them marked: parameters, the cache of one sequence, the cost of training.

    Args:
        books: the ledger of each model by its name, all at the same context, tokens, GPUs and price.
        marked: the name of the model whose numbers are written out. context: tokens in a sequence.
    """
    book, cost = books[marked], books[marked].cost
    with house_style():
        figure = Figure(figsize=(12.5, 4.8))
        parameters, cache, dollars = figure.subplots(1, 3)
        counts = {
            "all": [each.parameters.main for each in books.values()],
            "activated for a token": [each.parameters.activated for each in books.values()],
        }
        _bars(parameters, list(books), marked, counts, (COLOURS[0], COLOURS[1]), short)
        parameters.set(ylabel="parameters", ylim=(1e5, 1e14))
        kept = {
            "keys and values of all heads": [context * each.cache.bytes("mha") for each in books.values()],
            "the latent of MLA": [context * each.cache.bytes("mla") for each in books.values()],
        }
        _bars(cache, list(books), marked, kept, (COLOURS[7], COLOURS[2]), byte_size)
        cache.set(ylabel="bytes (BF16)", ylim=(1e4, 1e14))
        cache.set_xlabel(f"{marked} reads {book.cfg.max_position_embeddings:,} tokens at most")
        price = {"": [each.cost.dollars for each in books.values()]}
        _bars(dollars, list(books), marked, price, (COLOURS[3],), lambda value: f"${short(value)}")
        dollars.set(ylabel=f"dollars, at ${cost.dollars_per_hour:g} an H800 hour", ylim=(30, 1e10))
        for axes, title in (
            (parameters, "Parameters"),
            (cache, f"Cache of {context:,} tokens"),
            (dollars, f"Training on {cost.tokens / 1e12:g} trillion tokens"),
        ):
            axes.set_title(title, fontsize=12, fontweight="normal")
        share = book.parameters.activated / book.parameters.main
        figure.suptitle(
            f"{marked}: {short(book.parameters.main)} parameters, {share:.0%} of them at work for a token, "
            f"which leaves {book.cache.bytes('mla'):,} bytes in the cache",
            fontsize=14, fontweight="bold", x=0.01, ha="left",
        )  # fmt: skip
    return figure


def short(value: float) -> str:
    """A number as one reads it: 671026419200 -> 671B, 15.2M, 970."""
    return _scaled(value, "TBMk") or (f"{value:.0f}" if value >= 10 else f"{value:.2g}")


def byte_size(value: float) -> str:
    """9210692224 -> 9.2 GB, in decimal units."""
    scaled = _scaled(value, "TGMk")
    return f"{scaled[:-1]} {scaled[-1]}B" if scaled else f"{value:.0f} B"


def _scaled(value: float, units: str) -> str:
    """The number in the largest of the four units that fits (10^12, 10^9, 10^6, 10^3); empty where none does."""
    for unit, size in zip(units, (1e12, 1e9, 1e6, 1e3), strict=True):
        if value >= size:
            return f"{value / size:.0f}{unit}" if value / size >= 99.95 else f"{value / size:.1f}{unit}"
    return ""


def _bars(
    axes: Axes,
    names: Sequence[str],
    marked: str,
    kinds: Mapping[str, Sequence[float]],
    colours: Sequence[str],
    written: Callable[[float], str],
) -> None:
    """Bars side by side for each model on a logarithmic axis; the marked model's are full, and carry their numbers."""
    width = 0.8 / len(kinds)
    sides = ("center",) if len(kinds) == 1 else ("right", "left")  # so that two numbers of one height stay apart
    for k, ((kind, values), colour, side) in enumerate(zip(kinds.items(), colours, sides, strict=True)):
        for i, (name, value) in enumerate(zip(names, values, strict=True)):
            middle = i - 0.4 + (k + 0.5) * width
            axes.bar(middle, value, width, color=colour, alpha=1.0 if name == marked else PALE, gid=f"{kind}-{name}")
            if name == marked:
                at = {"center": middle, "right": i - 0.02, "left": i + 0.02}[side]
                axes.annotate(written(value), (at, value), (0, 3), textcoords="offset points", ha=side, fontsize=11,
                              fontweight="bold")  # fmt: skip
        axes.plot([], color=colour, linewidth=8, label=kind)
    axes.set_yscale("log")
    axes.set_xlim(-0.75, len(names) - 0.25)
    axes.set_xticks(range(len(names)), names)
    if any(kinds):
        axes.legend(loc="upper left", fontsize=11)
