"""The token explorer: type a text, choose two tokenizers, see where each of them cuts."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import ipywidgets
from matplotlib.figure import Figure

from dsv3_mini.viz.figures.tokens import tokens_figure
from dsv3_mini.viz.widgets.explorer import Explorer

Cutter = Callable[[str], list[bytes]]


def token_explorer(cutters: Mapping[str, Cutter], text: str, first: str = "", second: str = "") -> Explorer:
    """A text box and two choices of tokenizer, above the text as each of the two cuts it.

    Args:
        cutters: name -> a function from text to the bytes of its tokens, in order.
        text: what stands in the box at first.
        first, second: the tokenizers chosen at first; without them the first and the last of `cutters`.
    """
    names = list(cutters)

    def draw(text: str, first: str, second: str) -> Figure:
        again = f"{second}, again" if second == first else second  # a dict holds a name once
        return tokens_figure({first: cutters[first](text), again: cutters[second](text)})

    return Explorer(
        draw,
        "A text coloured by its tokens, in two rows: one for each of two tokenizers, with the number of tokens beside.",
        text=ipywidgets.Textarea(
            text, description="text", continuous_update=False, layout=ipywidgets.Layout(width="640px", height="70px")
        ),
        first=ipywidgets.Dropdown(options=names, value=first or names[0], description="first"),
        second=ipywidgets.Dropdown(options=names, value=second or names[-1], description="second"),
    )
