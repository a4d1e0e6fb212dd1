"""A product of a few rows with a weight matrix, at the price of one row.

A row times a matrix takes as long as it takes to read the matrix, and four rows need to read it no more often. But the library
that torch's `mm` asks on a CPU takes longer with each of them; oneDNN, which packs a weight once into the order in which it reads
it, takes for a few rows about as long as for one. That is worth its time where several tokens of a text are read in each pass: to judge
drafts, or for the rows of a batch. (`dsv3 bench generate` prints what a pass over drafts costs, and what a batch of 16 gives.)
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

PACKED = range(2**17, 2**23)
"""Numbers in a matrix that is packed. A smaller one is read sooner than oneDNN is asked; a larger one comes from memory and not
from a cache, at the same speed in any order, and would be held twice."""


class FewProduct:
    """`product(x)` is x @ weight.T for x of few rows; `product.add(total, x)` adds that to `total`, in its place."""

    def __init__(self, weight: Float[Tensor, "out in"]) -> None:
        self.weight = weight.T
        on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
        self.packs = on_cpu and weight.numel() in PACKED and torch.backends.mkldnn.is_available()
        self.packed: Tensor | None = None  # a text that is read token by token never asks for it

    def __call__(self, x: Float[Tensor, "T in"]) -> Float[Tensor, "T out"]:
        return self._by_onednn(x) if self.packs and len(x) > 1 else torch.mm(x, self.weight)

    def add(self, total: Float[Tensor, "T out"], x: Float[Tensor, "T in"]) -> Float[Tensor, "T out"]:
        if self.packs and len(x) > 1:
            return total.add_(self._by_onednn(x))
        return total.addmm_(x, self.weight)

    def _by_onednn(self, x: Float[Tensor, "T in"]) -> Float[Tensor, "T out"]:
        # The operators that torch's own compiler calls for a linear layer whose weight stays as it is.
        if self.packed is None:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.T, len(x))
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")
