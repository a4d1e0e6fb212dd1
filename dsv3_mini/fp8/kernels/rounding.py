"""Round FP32 to fewer bits, to nearest and ties to even, so that the cast that follows has nothing left to round.

A Hopper rounds right when it casts. Triton's interpreter does not: it cuts FP32 to BF16 off, and forgets the carry on
the way to FP8 (124.3 becomes 64). So the kernels round first, in FP32, by the rule itself. Where the memory's speed
decides, a handful of integer operations more cost nothing, and the same bits come out on every machine.

FP32 is sign, 8 bits of exponent, 23 of mantissa. Read as an integer its numbers stand in order, so adding just under
half of what is dropped (and one more where the last kept bit is odd) and cutting off rounds to nearest even. A carry out
of the mantissa goes into the exponent, where it belongs.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def keep_mantissa(x, bits: tl.constexpr):
    """x FP32 with `bits` of its 23 mantissa bits, nearest even. Infinity and NaN stay."""
    dropped: tl.constexpr = 23 - bits
    # A GPU's NaN is all ones: rounded up, it would run over into -0, and hide.
    code = tl.where(x == x, x, 0.0).to(tl.int32, bitcast=True)
    odd = (code >> dropped) & 1
    code = ((code + (2 ** (dropped - 1) - 1) + odd) >> dropped) << dropped
    return tl.where(x == x, code.to(tl.float32, bitcast=True), x)


@triton.jit
def nearest_e4m3(x):
    """x FP32 -> the nearest number that E4M3 has, as FP32; |x| at most 448, or so little above that it rounds to 448.

    E4M3 keeps 3 mantissa bits down to 2^-6. Below, its subnormals lie 2^-9 apart: adding and subtracting 1.5 * 2^14,
    where FP32's own numbers lie 2^-9 apart, rounds to them.
    """
    subnormal = (x + 24576.0) - 24576.0
    return tl.where(tl.abs(x) < 0.015625, subnormal, keep_mantissa(x, 3))


@triton.jit
def store_rounded(where, x, mask):
    """Store x FP32 as `where` points to it, BF16 or FP32, rounded once."""
    if where.dtype.element_ty == tl.bfloat16:
        x = keep_mantissa(x, 7)
    tl.store(where, x.to(where.dtype.element_ty), mask=mask)
