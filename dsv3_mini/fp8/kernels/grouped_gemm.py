"""All experts of a layer in one launch: rows sorted by expert, each group times its own expert's weight.

    a    [T k]      E4M3, 1x128 tiles: the tokens' copies, sorted by expert
    b    [e n k]    E4M3, 128x128 blocks: one weight an expert
    ends [e]        expert e has the rows ends[e-1] : ends[e] of a; groups are uneven, and some are empty
    c    [T n]      c[row] = a[row] @ b[expert of row]^T

A program makes one BLOCK_M x BLOCK_N tile of c as in gemm.py, and no tile spans two experts: each group is cut into its
own tiles, the last of them ragged. How many tiles there are depends on the routing, which only the GPU knows; asking it
would make the CPU wait. So as many programs start as could ever be needed, T // BLOCK_M + e (every group has at most one
ragged tile), and each finds its expert in the running count of tiles. Programs left over stop at once.

    sizes   5 0 130 3    BLOCK_M = 64
    tiles   1 0   3 1    running count 1 1 4 5: program 0 -> expert 0;  1, 2, 3 -> expert 2;  4 -> expert 3
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from dsv3_mini.fp8.kernels.gemm import BLOCKS, LAUNCH, multiply
from dsv3_mini.fp8.kernels.rounding import store_rounded
from dsv3_mini.fp8.quantize import TILE, Quantized


@triton.jit
def grouped_gemm_kernel(
    a, scale_a, b, scale_b, c, ends, tile_ends, n, k, experts,
    BLOCK_E: tl.constexpr, B_ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """tile_ends [e]: the running count of tiles. BLOCK_E: `experts`, rounded up to a power of two."""
    tile = tl.program_id(0)
    each = tl.arange(0, BLOCK_E)
    # The experts whose tiles all come before this one are counted: that is this tile's expert.
    passed = tl.load(tile_ends + each, mask=each < experts, other=2147483647) <= tile
    expert = tl.sum(passed.to(tl.int32), axis=0)
    if expert >= experts:
        return
    # Expert 0 begins at row 0 and tile 0; every other where the one before it ends.
    begin = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    first = tl.load(tile_ends + expert - 1, mask=expert > 0, other=0)
    row = (begin + (tile - first) * BLOCK_M).to(tl.int64) + tl.arange(0, BLOCK_M)
    row_inside = row < tl.load(ends + expert)
    col = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)

    steps = tl.cdiv(k, TILE)
    expert = expert.to(tl.int64)  # a 671B layer's experts have more than 2^31 numbers
    b += expert * n * k
    scale_b += expert * tl.cdiv(n, B_ROWS) * steps
    total = multiply(
        a + row * k, scale_a + row * steps, row_inside, b + col * k, scale_b + (col // B_ROWS) * steps, col < n, k,
        BLOCK_M, BLOCK_N, TILE,
    )  # fmt: skip
    store_rounded(c + row[:, None] * n + col[None, :], total, row_inside[:, None] & (col < n)[None, :])


def grouped_gemm(
    a: Quantized, b: Quantized, ends: Int[Tensor, " e"], out_dtype: torch.dtype = torch.bfloat16
) -> Float[Tensor, "T n"]:
    """rows[ends[e-1] : ends[e]] times b[e]^T for every expert e; `ends` int32. Rows past the last end are 0."""
    (tokens, k), (experts, n, _) = a.q.shape, b.q.shape
    c = torch.zeros(tokens, n, dtype=out_dtype, device=a.q.device)
    most = tokens // BLOCKS["BLOCK_M"] + experts
    grid = (most, triton.cdiv(n, BLOCKS["BLOCK_N"]))
    operands = (a.q.contiguous(), a.scale.contiguous(), b.q.contiguous(), b.scale.contiguous())
    grouped_gemm_kernel[grid](
        *operands, c, ends, count_tiles(ends), n, k, experts,
        BLOCK_E=triton.next_power_of_2(experts), B_ROWS=b.tile[0], TILE=TILE, **BLOCKS, **LAUNCH,
    )  # fmt: skip
    return c


def count_tiles(ends: Int[Tensor, " e"]) -> Int[Tensor, " e"]:
    """The running count over the experts of their tiles of BLOCK_M rows, int32, where `ends` lies."""
    sizes = torch.diff(ends, prepend=ends.new_zeros(1))
    tiles = (sizes + BLOCKS["BLOCK_M"] - 1) // BLOCKS["BLOCK_M"]
    return tiles.cumsum(0, dtype=torch.int32)
