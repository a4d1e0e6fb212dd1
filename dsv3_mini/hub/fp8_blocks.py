"""FP8 weights with one scale per 128x128 block, as the released checkpoint stores them (report section 3.3.2).

    q [o i]                         E4M3, largest number 448
    scale [ceil(o/128) ceil(i/128)] FP32, the file's `weight_scale_inv`
    W = q * scale                   the "inv" is the file's: it multiplies

A matrix whose sides are no multiples of 128 has narrower blocks at its right and lower edge; they have a scale like any.
How numbers and scales are found is in fp8/quantize.py: a weight of FP8 training is a weight of the file.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dsv3_mini.fp8.quantize import quantize

BLOCK = 128


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
    """The nearest E4M3 numbers under scale = amax / 448 per block, so that each block's largest number is exactly 448."""
    blocks = quantize(weight, tile=(BLOCK, BLOCK))
    return Fp8Weight(blocks.q, blocks.scale)
