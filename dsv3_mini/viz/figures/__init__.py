"""Figures: pure functions from data to a matplotlib Figure. They read no files, keep no state, and show nothing.

In a notebook a Figure that ends a cell is shown as a PNG; importing this package sees to it, so that lessons need no
`%matplotlib inline` and no pyplot.
"""

from __future__ import annotations

import base64
import io
import sys

from matplotlib.figure import Figure


def png(figure: Figure) -> bytes:
    """A figure as PNG: the same figure gives the same bytes, whatever made it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _show_in_notebooks() -> None:
    if "IPython" in sys.modules:
        from IPython.core.getipython import get_ipython

        if (shell := get_ipython()) is not None and getattr(shell, "kernel", None) is not None:
            shell.display_formatter.formatters["image/png"].for_type(
                Figure, lambda figure: base64.b64encode(png(figure)).decode()
            )


_show_in_notebooks()
