"""Quantising as one would by hand: tile after tile in a loop, with torch's own cast. The oracle of what trains in FP8."""

from __future__ import annotations

import math

import torch
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
RMS = 0.025
"""Of the relative error of a number in E4M3. Its step is 2^-3 of the power of two below, an error is anything within half a
step, so its mean square is 2^-6 / 12 beside a number's own, which is 1 to 4: 7/3 on average where all are equally likely,
2.16 where all ratios are. The roots are 2.36% and 2.45%; normal numbers lie between, and few small ones are subnormal."""


def rounded(x: Tensor, tile: tuple[int, int] | None, dtype: torch.dtype = E4M3, power_of_two: bool = False) -> Tensor:
    """x [r c] after a journey through FP8 and back, with a scale for each tile; None is one scale for all."""
    height, width = tile or x.shape
    result = torch.empty_like(x, dtype=torch.float32)
    for r in range(0, x.shape[0], height):
        for c in range(0, x.shape[1], width):
            block = x[r : r + height, c : c + width].float()
            scale = torch.tensor(block.abs().max().item() / torch.finfo(dtype).max).item()  # an FP32 number
            if power_of_two and scale > 0:
                mantissa, exponent = math.frexp(scale)  # scale = mantissa 2^exponent, 0.5 <= mantissa < 1
                scale = 2.0 ** (exponent - (mantissa == 0.5))
            scale = torch.tensor(scale or 1.0)
            result[r : r + height, c : c + width] = (block / scale).to(dtype).float() * scale
    return result


def error(got: Tensor, expected: Tensor) -> float:
    """How far two tensors are apart, relative to the norm of the second."""
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()
