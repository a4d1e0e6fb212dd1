"""Dequantise weights: q * scale, one FP32 scale for every 128x128 block, as the released checkpoint stores them.

    q     [... r c]                       E4M3
    scale [... ceil(r/128) ceil(c/128)]   FP32
    W     [... r c]                       q * scale in FP32, rounded once to BF16 or FP32

A program takes one block: it reads one scale and 128 x 128 bytes, and writes as many numbers. Leading axes (the experts
of a layer) are the grid's third. Blocks at the right and lower edge may be narrower, and have a scale like any.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from dsv3_mini.errors import ConfigError
from dsv3_mini.fp8.kernels.rounding import store_rounded
from dsv3_mini.fp8.quantize import TILE, Quantized


@triton.jit
def weight_dequant_kernel(q, scale, w, r, c, TILE: tl.constexpr):
    block_row = tl.program_id(0)
    block_col = tl.program_id(1)
    expert = tl.program_id(2).to(tl.int64)
    row = block_row * TILE + tl.arange(0, TILE)
    col = block_col * TILE + tl.arange(0, TILE)
    inside = (row < r)[:, None] & (col < c)[None, :]
    # 64 bits wide: the experts of one 671B layer have more than 2^31 numbers.
    at = (expert * r + row)[:, None] * c + col[None, :]

    factor = tl.load(scale + (expert * tl.cdiv(r, TILE) + block_row) * tl.cdiv(c, TILE) + block_col)
    value = tl.load(q + at, mask=inside, other=0.0).to(tl.float32) * factor
    store_rounded(w + at, value, inside)


def dequantize_weight(weight: Quantized, dtype: torch.dtype = torch.bfloat16) -> Float[Tensor, "... r c"]:
    """`weight.dequantize(dtype)` in one kernel, on a GPU or in the interpreter; `dtype` BF16 or FP32.

    Raises:
        ConfigError: the weight's tile is not (128, 128), or a number has not 8 bits.
    """
    if weight.tile != (TILE, TILE) or weight.fmt.bits != 8:
        raise ConfigError(
            f"a weight is stored in {weight.fmt.name} with tiles {weight.tile}: this kernel reads 8 bits and "
            f"({TILE}, {TILE}), so use weight.dequantize()"
        )
    q = rearrange(weight.q, "... r c -> (...) r c").contiguous()
    scale = rearrange(weight.scale, "... r c -> (...) r c").contiguous()
    experts, r, c = q.shape
    w = torch.empty(q.shape, dtype=dtype, device=q.device)
    grid = (triton.cdiv(r, TILE), triton.cdiv(c, TILE), experts)
    weight_dequant_kernel[grid](q, scale, w, r, c, TILE, num_warps=8)
    return w.view(weight.q.shape)
