"""The two orders in which rotated dimensions stand, and the way from one to the other.

The released weights pair neighbours: (0, 1), (2, 3), ... Many other programs pair dimension j with j + r/2, and read the
first numbers of all pairs in one run and the second ones in another. Both compute the same scores, each with its own
weights; with the other's they run and are wrong. A checkpoint changes over by putting the rows of two projections of
every attention layer in another order: the rope rows of each head in the queries' (`q_b_proj`, or `q_proj`), and the
last r rows of `kv_a_proj_with_mqa`, which is one head here. Nothing else of the model knows the order.
"""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from dsv3_mini.errors import CheckpointError


def neighbours_to_halves(weight: Float[Tensor, "h_nr c"], heads: int, rope: int) -> Float[Tensor, "h_nr c"]:
    """A projection for a program that pairs j with j + r/2, from one whose pairs are neighbours.

    Args:
        weight: [out, in]; of each head's rows the last `rope` are rotated, the others stay where they are.

    Raises:
        CheckpointError: the rows do not divide into such heads, or `rope` is odd.
    """
    return _reorder(weight, heads, rope, "h (pairs two) c -> h (two pairs) c")


def halves_to_neighbours(weight: Float[Tensor, "h_nr c"], heads: int, rope: int) -> Float[Tensor, "h_nr c"]:
    """The way back; same arguments and errors."""
    return _reorder(weight, heads, rope, "h (two pairs) c -> h (pairs two) c")


def _reorder(weight: Tensor, heads: int, rope: int, order: str) -> Tensor:
    if weight.ndim != 2 or heads < 1 or weight.shape[0] % heads:
        raise CheckpointError(
            f"a weight of shape {list(weight.shape)} has no {heads} heads of rows: give [heads * width, in]"
        )
    width = weight.shape[0] // heads
    if rope < 2 or rope % 2 or rope > width:
        raise CheckpointError(f"rope = {rope} must be even, at least 2, and at most the {width} rows of a head")
    rows = rearrange(weight, "(h nr) c -> h nr c", h=heads)
    plain, rotated = rows.split([width - rope, rope], dim=1)
    return rearrange(torch.cat([plain, rearrange(rotated, order, two=2)], dim=1), "h nr c -> (h nr) c")
