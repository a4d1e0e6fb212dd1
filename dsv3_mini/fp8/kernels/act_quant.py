"""Quantise activations: one E4M3 byte a number, and one FP32 scale for every 1x128 tile (report section 3.3.2).

    x     [m k]             BF16 or FP32, row after row
    scale [m ceil(k/128)]   amax / 448 of the tile, found online: nothing is remembered from earlier steps
    q     [m k]             x / scale, rounded to the nearest E4M3 number;   x is about q * scale

A program takes a strip of ROWS x 128: it reads every number once, finds each row's largest, divides, and writes. That is
3 bytes a BF16 number and a few operations, so memory decides how long it takes. Tiles at the right edge may be narrower;
what lies beyond counts as 0, which is never a tile's largest. A tile of zeros gets a tiny scale, not a division by 0.

With `power_of_two` the scale is rounded up to a power of two (up, so that nothing overflows): quantising then loses
nothing but mantissa bits, and a tensor can be re-tiled without a second rounding. FP32's bits give the power exactly:
add a mantissa of ones and cut the mantissa off. A logarithm would be off by one for some.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from dsv3_mini.fp8.formats import E4M3
from dsv3_mini.fp8.kernels.rounding import nearest_e4m3
from dsv3_mini.fp8.quantize import TILE, TINY, Quantized

ROWS = 16
"""Rows a program takes: 16 x 128 numbers are 16 for each thread of 4 warps."""


@triton.jit
def act_quant_kernel(
    x, q, scale, m, k,
    power_of_two: tl.constexpr, LARGEST: tl.constexpr, TINY: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tile = tl.program_id(1)
    col = tile * TILE + tl.arange(0, TILE)
    inside = (row < m)[:, None] & (col < k)[None, :]
    at = row[:, None] * k + col[None, :]

    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    # div_rn is the exact quotient, rounded once; `/` is an approximation on a GPU, and its last bit may differ.
    step = tl.maximum(tl.div_rn(tl.max(tl.abs(value), axis=1), LARGEST), TINY)
    if power_of_two:
        step = ((step.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    # A tile's largest may come out a hair above 448, which is still nearest to 448.
    number = nearest_e4m3(tl.div_rn(value, step[:, None]))
    # Maxima skip NaN. But 0 * x is 0 for numbers and NaN for Inf and NaN: through its scale their tile becomes NaN.
    step += tl.sum(value * 0.0, axis=1)

    tl.store(q + at, number.to(q.dtype.element_ty), mask=inside)
    tl.store(scale + row * tl.cdiv(k, TILE) + tile, step, mask=row < m)


def quantize_activations(x: Float[Tensor, "... k"], power_of_two: bool = False) -> Quantized:
    """`quantize(x, (1, 128), E4M3, power_of_two)` in one kernel, on a GPU or in the interpreter."""
    rows = rearrange(x, "... k -> (...) k").contiguous()
    m, k = rows.shape
    tiles = triton.cdiv(k, TILE)
    q = torch.empty(m, k, dtype=E4M3.dtype, device=x.device)
    scale = torch.empty(m, tiles, dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(m, ROWS), tiles)
    act_quant_kernel[grid](rows, q, scale, m, k, power_of_two, E4M3.largest, TINY, ROWS, TILE)
    return Quantized(q.view(x.shape), scale.view(*x.shape[:-1], tiles), (1, TILE), E4M3, k)
