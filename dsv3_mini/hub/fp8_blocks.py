"""FP8 weights with one scale per 128x128 block, as the released checkpoint stores them (report section 3.3.2).

    q [o i]                         E4M3, largest number 448
    scale [ceil(o/128) ceil(i/128)] FP32, the file's `weight_scale_inv`
    W = q * scale                   the "inv" is the file's: it multiplies

A matrix whose sides are no multiples of 128 has narrower blocks at its right and lower edge; they have a scale like any.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor

BLOCK = 128
E4M3_MAX = 448.0  # torch.finfo(torch.float8_e4m3fn).max


@dataclass(frozen=True)
class Fp8Weight:
    """A weight as it is stored: `q` [o i] in E4M3 and `scale` [ceil(o/128) ceil(i/128)] in FP32."""

    q: Float[Tensor, "o i"]
    scale: Float[Tensor, "block_o block_i"]

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "o i"]:
        """q * scale, computed in FP32, then rounded once to `dtype`."""
        rows, columns = self.q.shape
        scale = self.scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
        return scale.mul_(self.q.float()).to(dtype)


def quantise_blocks(weight: Float[Tensor, "o i"]) -> Fp8Weight:
    """The nearest E4M3 numbers under scale = amax / 448 per block, so that each block's largest number is exactly 448.

    The padding at ragged edges is zeros, which never are a block's largest.
    """
    rows, columns = weight.shape
    padded = F.pad(weight.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = rearrange(padded, "(a p) (b q) -> a p b q", p=BLOCK, q=BLOCK)
    amax = reduce(blocks.abs(), "a p b q -> a b", "max")
    # A block of zeros would divide 0 by 0.
    scale = (amax / E4M3_MAX).clamp_min(torch.finfo(torch.float32).tiny)
    q = rearrange(blocks / rearrange(scale, "a b -> a 1 b 1"), "a p b q -> (a p) (b q)")
    return Fp8Weight(q[:rows, :columns].to(torch.float8_e4m3fn).contiguous(), scale)
