"""The look of every figure: sizes that read on a projector, colours that the colour-blind can tell apart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib

# Okabe and Ito's palette, black left out: it is the text's.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#999999")
DOMAIN_COLOURS = dict(zip(("stories", "sums", "code", "prose"), COLOURS, strict=False))
LOAD_MAP = "cividis"  # dark to light, the same order for every kind of sight

RC = {
    "figure.dpi": 100,
    "savefig.dpi": 100,
    "font.size": 12,
    "axes.titlesize": 14,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": matplotlib.cycler(color=COLOURS),
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


@contextmanager
def house_style() -> Iterator[None]:
    """Figures made inside look alike; matplotlib's settings outside stay as they were."""
    with matplotlib.rc_context(RC):
        yield
