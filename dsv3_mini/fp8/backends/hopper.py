"""The arithmetic of Hopper's tensor core in FP8, and its cure, as the report describes both (section 3.3.2, "increasing
accumulation precision").

The tensor core multiplies exactly and adds up shortly. One step takes 32 products and the running sum, shifts them all to the
exponent of the largest, cuts off what then lies below its 14 bits, and adds what is left:

    2^e <= max(|products|, |sum|) < 2^(e+1)
    grain = 2^(e - 13)                          the last of 14 bits
    sum   = grain * (trunc(sum / grain) + trunc(products / grain) added up), and of that again the first 14 bits

The larger the sum has grown, the coarser the grain for all that is still to come; and a cut, unlike a rounding, always goes
towards zero. So the error grows with K: at K = 4096 the report speaks of nearly 2%. Here, 256x256 sums of normal
numbers have a largest relative error of 2% (those that nearly cancel left out: below a quarter of the typical sum), and a
typical one of 0.13%.

The cure is promotion: every N_C = 128 elements the partial sum leaves the tensor core, is multiplied by the scales of its tiles
and added to a sum in true FP32, and the tensor core starts again from zero. N_C = 128 is four instructions; while one group of
warps promotes, another multiplies, so it costs next to no time. The 2% become 0.2%, the 0.13% become 0.013%.

What is simplified:

- what the chip does was found out by measuring; nobody has published its adder. 14, 32 and N_C are parameters here.
- the products of a step are cut one by one and then added without a further cut, whatever their order.
- without promotion, scales that change along K are multiplied into the numbers beforehand. No tensor core can do that; with one
  scale for all of K it is what they do.
"""

from __future__ import annotations

import torch
from einops import einsum, rearrange, reduce
from jaxtyping import Float, Int
from torch import Tensor

from dsv3_mini.errors import ConfigError
from dsv3_mini.fp8.gemm import Backend, groups
from dsv3_mini.fp8.quantize import Quantized

MANTISSA = 23  # of FP32
BLOCK = 2**18  # products held at one time: 1 MB, so that they stay in the cache


class Hopper(Backend):
    """The emulation. Slow, for every product is looked at: to see what FP8 training is like with and without promotion.

    Args:
        promote_every: the report's N_C, in elements of K; None adds all of K up in the tensor core.
        bits: kept of a sum, its leading one counted.
        products: added in one step.
    """

    name = "hopper"
    fp32 = True  # FP8 numbers and their products are FP32 numbers

    def __init__(self, promote_every: int | None = 128, bits: int = 14, products: int = 32) -> None:
        if promote_every is not None and promote_every < 1:
            raise ConfigError(f"promote_every = {promote_every} must be a number of products, or None for never")
        if bits < 1 or products < 1 or (products + 1) << bits > 2 ** (MANTISSA + 1):
            raise ConfigError(
                f"bits = {bits}, products = {products} must be 1 or more, and (products + 1) * 2^bits at most 2^24: a sum of so "
                "many numbers of so many bits is exact in FP32, in which it is emulated"
            )
        self.promote_every, self.bits, self.products = promote_every, bits, products

    def refuses(self, a: Quantized, b: Quantized) -> str | None:
        return None

    def gemm(self, a: Quantized, b: Quantized, out_dtype: torch.dtype) -> Float[Tensor, "m n"]:
        return self._multiply(a.numbers(), _spread(a), b.numbers(), _spread(b)).to(out_dtype)

    def grouped_gemm(
        self, a: Quantized, b: Quantized, ends: Int[Tensor, " e"], out_dtype: torch.dtype
    ) -> Float[Tensor, "T n"]:
        numbers, scale = a.numbers(), _spread(a)
        out = numbers.new_zeros(len(numbers), b.shape[-2], dtype=out_dtype)
        for expert, start, end in groups(ends):
            weight = b.matrix(expert)
            out[start:end] = self._multiply(numbers[start:end], scale[start:end], weight.numbers(), _spread(weight))
        return out

    def _multiply(
        self,
        a: Float[Tensor, "m k"],
        a_scale: Float[Tensor, "m k"],
        b: Float[Tensor, "n k"],
        b_scale: Float[Tensor, "n k"],
    ) -> Float[Tensor, "m n"]:
        """Promote once per interval of K: the partial sum times its scales, added in FP32."""
        total = a.new_zeros(len(a), len(b))
        length = self.promote_every or max(1, a.shape[-1])
        for left, left_scale, right, right_scale in zip(
            *(x.split(length, dim=-1) for x in (a, a_scale, b, b_scale)), strict=True
        ):
            left, left_scale = _common_scale(left, left_scale)
            right, right_scale = _common_scale(right, right_scale)
            total += self._tensor_core(left, right) * einsum(left_scale, right_scale, "m, n -> m n")
        return total

    def _tensor_core(self, a: Float[Tensor, "m k"], b: Float[Tensor, "n k"]) -> Float[Tensor, "m n"]:
        """The sum of one interval, from zero."""
        columns = rearrange(b, "n k -> k 1 n").contiguous()
        sums = []
        for some in a.split(max(1, BLOCK // max(1, self.products * len(b)))):
            rows = rearrange(some, "m k -> k m 1").contiguous()
            total = a.new_zeros(len(some), len(b))
            for left, right in zip(rows.split(self.products), columns.split(self.products), strict=True):
                total = self._step(total, left * right)
            sums.append(total)
        return torch.cat(sums)

    def _step(self, total: Float[Tensor, "m n"], products: Float[Tensor, "k m n"]) -> Float[Tensor, "m n"]:
        """Align all to the largest exponent, cut, add."""
        largest = torch.maximum(reduce(products.abs(), "k m n -> m n", "max"), total.abs())
        # The first bit of a number is its power of two. Where all is zero any grain will do.
        grain = _first_bits(largest, 1).clamp_min(2.0**-80) * 2.0 ** (1 - self.bits)
        # Whole numbers of grains, each below 2^bits, which FP32 adds up exactly; 1 / grain is a power of two, exact as well.
        per_grain = 1 / grain
        counts = reduce(products.mul_(per_grain).trunc_(), "k m n -> m n", "sum") + (total * per_grain).trunc_()
        return _first_bits(counts * grain, self.bits)


def _first_bits(x: Float[Tensor, " ..."], bits: int) -> Float[Tensor, " ..."]:
    """x with its first `bits` bits, the leading one counted, and zeros behind: a cut towards zero."""
    return (x.view(torch.int32) & -(1 << (MANTISSA + 1 - bits))).view(torch.float32)


def _common_scale(
    numbers: Float[Tensor, "r k"], scale: Float[Tensor, "r k"]
) -> tuple[Float[Tensor, "r k"], Float[Tensor, " r"]]:
    """One scale for each row of an interval, the largest; the numbers of other tiles change to it. In one tile none does."""
    common = reduce(scale, "r k -> r 1", "max")
    return numbers * (scale / common), rearrange(common, "r 1 -> r")


def _spread(x: Quantized) -> Float[Tensor, "r k"]:
    """The scale of every single number of [r k]."""
    (rows, columns), (p, q) = x.shape, x.tile
    # A tile larger than the matrix is all of it.
    return x.scale.repeat_interleave(min(p, rows), 0)[:rows].repeat_interleave(min(q, columns), 1)[:, :columns]
