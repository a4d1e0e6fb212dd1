"""The GEMM with the mistake: the tensor core's own sum runs along the whole of k. Compiled beside the right ones, so that
a test can see that it would be found out. One scale for each row, as a sum over all of k leaves no room for more.
"""

from __future__ import annotations

import sys
from pathlib import Path

import triton
import triton.language as tl

from dsv3_mini.fp8.kernels import compile as ahead
from dsv3_mini.fp8.kernels.gemm import BLOCKS, LAUNCH
from dsv3_mini.fp8.quantize import TILE


@triton.jit
def never_promoted_kernel(
    a, scale_a, b, scale_b, c, m, n, k, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILE: tl.constexpr
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    along = tl.arange(0, TILE)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(tl.cdiv(k, TILE)):
        at = step * TILE + along
        x = tl.load(a + row[:, None] * k + at[None, :], mask=(row < m)[:, None] & (at < k)[None, :], other=0.0)
        w = tl.load(b + col[None, :] * k + at[:, None], mask=(at < k)[:, None] & (col < n)[None, :], other=0.0)
        total = tl.dot(x, w, total)
    of_x = tl.load(scale_a + row, mask=row < m, other=0.0)
    of_w = tl.load(scale_b + col, mask=col < n, other=0.0)
    total = total * of_x[:, None] * of_w[None, :]
    inside = (row < m)[:, None] & (col < n)[None, :]
    tl.store(c + row[:, None] * n + col[None, :], total.to(c.dtype.element_ty), mask=inside)


if __name__ == "__main__":
    ahead.KERNELS["never_promoted"] = ahead.Kernel(never_promoted_kernel, ahead.GEMM, {**BLOCKS, "TILE": TILE}, LAUNCH)
    ahead.main(Path(sys.argv[1]))
