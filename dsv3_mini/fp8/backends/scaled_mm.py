"""torch's own FP8 GEMM on Hopper: `torch.nn.functional.scaled_mm` with a scale per tile, computed by cuBLAS.

What it asks for, and how it is met here. Numbers and scales of what is filled up are zeros, and the result is cut to size:

    a [m k] row-major, b [k n] column-major       b.T of our [n k] is that: nothing is copied
    m a multiple of 4, n and k of 16              zero rows and columns; no ragged *tile* needs filling up
    scales of tiles 1x128: [rows, k/128], but the rows one after the other in memory (stride 1, rows)
    scales of blocks 128x128: [k/128, n/128], k first in memory, and k/128 filled up to a multiple of 4

The last rule is cuBLAS's: where torch did not check it yet, other paddings gave wrong numbers and no error.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dsv3_mini.fp8.formats import E5M2
from dsv3_mini.fp8.gemm import Backend
from dsv3_mini.fp8.quantize import TILE, Quantized

HOPPER = (9, 0)


class ScaledMM(Backend):
    name = "scaled_mm"

    def missing(self) -> str | None:
        if reason := no_hopper():
            return f"{reason}: use 'exact'"
        if torch.version.cuda is None or tuple(map(int, torch.version.cuda.split(".")[:2])) < (12, 9):
            return f"this torch is built for CUDA {torch.version.cuda}, tiles need 12.9 or newer: use 'triton'"
        return None

    def refuses(self, a: Quantized, b: Quantized) -> str | None:
        if a.fmt == b.fmt == E5M2:
            return "cuBLAS multiplies E5M2 by E4M3, not by E5M2"
        return super().refuses(a, b)

    def gemm(self, a: Quantized, b: Quantized, out_dtype: torch.dtype) -> Float[Tensor, "m n"]:
        (m, k), n = a.shape, b.shape[0]
        rows, columns, inner = up(max(m, 1), 4), up(n, 16), up(k, 16)
        blocks = up(b.scale.shape[1], 4)
        if b.tile == (TILE, TILE):
            recipe, scale = F.ScalingType.BlockWise128x128, filled(b.scale, b.scale.shape[0], blocks).T
        else:
            recipe, scale = F.ScalingType.BlockWise1x128, outer_first(b.scale, columns)
        out = F.scaled_mm(
            filled(a.q, rows, inner),
            filled(b.q, columns, inner).T,
            outer_first(a.scale, rows),
            F.ScalingType.BlockWise1x128,
            scale,
            recipe,
            output_dtype=out_dtype,
        )
        return out[:m, :n]


def no_hopper() -> str | None:
    """Why no Hopper GPU can be used, in some words, or None."""
    if torch.version.hip or not torch.cuda.is_available():
        return "torch finds no CUDA device here"
    if torch.cuda.get_device_capability() != HOPPER:
        return f"{torch.cuda.get_device_name()} is no Hopper GPU (compute capability 9.0)"
    return None


def up(size: int, multiple: int) -> int:
    """The next multiple of it."""
    return -(-size // multiple) * multiple


def filled(x: Tensor, rows: int, columns: int) -> Tensor:
    """x [r c] with zeros up to [rows columns]; itself where it has that size, and is laid out row by row."""
    if x.shape == (rows, columns) and x.is_contiguous():
        return x
    larger = torch.zeros(rows, columns, dtype=x.dtype, device=x.device)
    larger[: x.shape[0], : x.shape[1]] = x
    return larger


def outer_first(scale: Float[Tensor, "r c"], rows: int) -> Float[Tensor, "rows c"]:
    """The same scales with zeros down to `rows`, and neighbours in memory where they are neighbours in a column."""
    turned = scale.new_zeros(scale.shape[1], rows)  # always new: of a single column torch does not keep the stride
    turned[:, : scale.shape[0]] = scale.T
    return turned.T
