"""A hop whose vectors travel in FP8: out as E4M3 with a scale for 128 numbers, home in BF16 (report sections 3.2.2 and 3.3.3).

                 there (dispatch)                             back (combine)
    forward      tokens in E4M3, 1 + 1/128 bytes a number     results in BF16, 2 bytes, added up in FP32
    backward     gradients of the tokens: BF16, added up      gradients of the results: in E4M3

Whatever goes *out* to experts, tokens forward and the gradients of their results backward, is about to be an operand of an FP8
product, which would round it anyway: it may as well travel rounded. What comes *home* is added up, and a sum of rounded
numbers would be worse than a rounded sum. So each direction of a hop is the other's backward pass:

    _Out     forward `scatter`, backward `gather`
    _Home    forward `gather`, backward `scatter`

Rounding has no useful derivative; gradients pass it as if it were not there (straight-through).

Scales are powers of two, so that one byte, the exponent, is a scale. And what was rounded once rounds no further: neither on a
second leg, nor where an expert quantises what has arrived, nor when that is re-tiled for Wgrad (but for underflow). A row of
width d is a message of d + ceil(d / 128) bytes: at d = 7168 7,224, against 14,336 in BF16.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv3_mini.fp8.formats import E4M3, E8M0, decode, encode
from dsv3_mini.fp8.quantize import TILE, Quantized, quantize
from dsv3_mini.parallel.hop import Hop


class Fp8Hop(Hop):
    """A hop out in FP8 and home in BF16, whatever the type of the numbers at both ends."""

    def rows_there(self, x: Float[Tensor, "T d"]) -> Float[Tensor, "arrived d"]:
        return _Out.apply(x, self)

    def back(self, results: Float[Tensor, "arrived d"]) -> Float[Tensor, "T d"]:
        return _Home.apply(results, self)

    def scatter(self, x: Float[Tensor, "T d"]) -> Float[Tensor, "arrived d"]:
        """Each token, quantised once, to all that need it."""
        message = packed(x).index_select(0, self.sender_row)
        return unpacked(self._send(message, self.leaving, self.arriving), x.shape[1], x.dtype)

    def gather(self, rows: Float[Tensor, "arrived d"]) -> Float[Tensor, "T d"]:
        """What became of each token's copies, added up."""
        returned = self._send(rows.bfloat16(), self.arriving, self.leaving).float()
        total = returned.new_zeros(self.tokens, rows.shape[1]).index_add_(0, self.sender_row, returned)
        return total.to(rows.dtype)

    def _send(self, rows: Tensor, leaving: list[int], arriving: list[int]) -> Tensor:
        received = rows.new_empty(sum(arriving), rows.shape[1])
        dist.all_to_all_single(received, rows.contiguous(), arriving, leaving, self.group)
        return received


def packed(x: Float[Tensor, "T d"]) -> UInt8[Tensor, "T bytes"]:
    """Each row as the bytes that travel: its numbers in E4M3, then the exponent of each tile's scale (E8M0)."""
    small = quantize(x, (1, TILE), power_of_two=True)
    return torch.cat([small.q.view(torch.uint8), encode(small.scale, E8M0)], dim=1)


def unpacked(message: UInt8[Tensor, "T bytes"], width: int, dtype: torch.dtype) -> Float[Tensor, "T d"]:
    """The rows that `packed` packed. E4M3 times a power of two is a number of BF16 and of FP32: nothing is rounded."""
    numbers, exponents = message[:, :width].contiguous(), message[:, width:]
    small = Quantized(numbers.view(torch.float8_e4m3fn), decode(exponents, E8M0), (1, TILE), E4M3, width)
    return small.dequantize(dtype)


class _Out(torch.autograd.Function):
    """Dispatch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, hop: Fp8Hop) -> Tensor:
        ctx.hop = hop
        return hop.scatter(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.hop.gather(grad), None


class _Home(torch.autograd.Function):
    """Combine."""

    @staticmethod
    def forward(ctx: Any, results: Tensor, hop: Fp8Hop) -> Tensor:
        ctx.hop = hop
        return hop.gather(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.hop.scatter(grad), None
