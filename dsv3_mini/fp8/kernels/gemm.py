"""Multiply FP8 by FP8 with a scale per tile: c = a @ b^T, in FP32 where it matters (report section 3.3.2).

    a [m k] E4M3, scale_a [m ceil(k/128)]             activations, a scale per 1x128 tile
    b [n k] E4M3, scale_b [ceil(n/128) ceil(k/128)]   weights, a scale per 128x128 block
               or scale_b [n ceil(k/128)]             a scale per 1x128 tile, for the weight's gradient
    c [m n] BF16 or FP32

A program makes one BLOCK_M x BLOCK_N tile of c, and walks along k in steps of 128:

    partial = a_block @ b_block^T                      tensor core, FP8 in, about 14 bits kept in its sums
    total  += partial * scale_a[:, None] * scale_b     ordinary FP32

The second line is where the scales come in, as they change every 128 products; and because `partial` begins at 0 in each
step, the tensor core never adds up more than 128 products by itself. That is the report's promotion: its short sums end
after N_C = 128, and FP32 carries them on. (`tl.dot(x, w, total)` would be shorter, and is the mistake: then the tensor
core's own short accumulator would run along the whole of k.)

Rows, columns and the tail of k beyond the edge are read as 0 and add nothing. A k that is no multiple of 16 is right, and
slow: its rows begin at any byte, so they are fetched byte by byte. A model's widths are multiples of 128; of tokens, which
the weight's gradient sums over, send a multiple of 16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from dsv3_mini.fp8.kernels.rounding import store_rounded
from dsv3_mini.fp8.quantize import TILE, Quantized

BLOCKS = {"BLOCK_M": 64, "BLOCK_N": 128}
LAUNCH = {"num_warps": 4, "num_stages": 4}
"""Four steps of k in flight: 4 x (64 + 128) x 128 bytes = 96 KB of a Hopper SM's 227, so that two programs share one."""


@triton.jit
def multiply(
    a, scale_a, row_inside, b, scale_b, col_inside, k, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILE: tl.constexpr
):
    """One tile [BLOCK_M BLOCK_N] of a @ b^T in FP32, promoted after every TILE products.

    a, scale_a: pointers [BLOCK_M] to where each row of a, and of its scales, begins; b, scale_b [BLOCK_N] likewise.
    """
    along = tl.arange(0, TILE)
    a = a[:, None] + along[None, :]
    b = b[None, :] + along[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(tl.cdiv(k, TILE)):
        inside = along < k - step * TILE
        x = tl.load(a, mask=row_inside[:, None] & inside[None, :], other=0.0)
        w = tl.load(b, mask=inside[:, None] & col_inside[None, :], other=0.0)
        partial = tl.dot(x, w)
        of_x = tl.load(scale_a + step, mask=row_inside, other=0.0)
        of_w = tl.load(scale_b + step, mask=col_inside, other=0.0)
        total += partial * of_x[:, None] * of_w[None, :]
        a += TILE
        b += TILE
    return total


@triton.jit
def gemm_kernel(
    a, scale_a, b, scale_b, c, m, n, k,
    B_ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """B_ROWS rows of b share a scale. Offsets are 64 bits wide: m * k passes 2^31 for long batches."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    steps = tl.cdiv(k, TILE)
    total = multiply(
        a + row * k, scale_a + row * steps, row < m, b + col * k, scale_b + (col // B_ROWS) * steps, col < n, k,
        BLOCK_M, BLOCK_N, TILE,
    )  # fmt: skip
    store_rounded(c + row[:, None] * n + col[None, :], total, (row < m)[:, None] & (col < n)[None, :])


def gemm(a: Quantized, b: Quantized, out_dtype: torch.dtype = torch.bfloat16) -> Float[Tensor, "m n"]:
    """a [m k], tiles 1x128, times b [n k]^T, blocks 128x128 or tiles 1x128; `out_dtype` BF16 or FP32."""
    (m, k), n = a.q.shape, b.q.shape[0]
    c = torch.empty(m, n, dtype=out_dtype, device=a.q.device)
    grid = (triton.cdiv(m, BLOCKS["BLOCK_M"]), triton.cdiv(n, BLOCKS["BLOCK_N"]))
    # Rows follow each other without a gap: the kernel counts with k and n alone, and takes no strides.
    operands = (a.q.contiguous(), a.scale.contiguous(), b.q.contiguous(), b.scale.contiguous())
    gemm_kernel[grid](*operands, c, m, n, k, B_ROWS=b.tile[0], TILE=TILE, **BLOCKS, **LAUNCH)
    return c
