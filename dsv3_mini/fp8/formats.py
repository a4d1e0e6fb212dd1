"""Four small floating-point formats, from their definition: E4M3, E5M2, E5M6 and E8M0 (report section 3.3).

A code is a sign, E bits of exponent and M bits of mantissa. It stands for

    +- 2^(exponent - bias) * (1 + mantissa / 2^M)       exponent > 0: a normal number
    +- 2^(1 - bias)        * (0 + mantissa / 2^M)       exponent = 0: a subnormal number, without the leading one

so the numbers of one exponent stand on an even grid, one step = 2^(exponent - bias - M) apart, and the subnormal numbers go
on in the smallest normal step down to zero. Rounding to the nearest is then a division, and so is finding the code:

    steps = round(|x| / step)                           half-way cases go to the even one
    code  = (exponent - 1) * 2^M + steps                a carry into the next power of two is a carry in the code, too

| format | bits  | largest | smallest normal, subnormal | too large becomes | what for                                    |
|--------|-------|---------|----------------------------|-------------------|---------------------------------------------|
| E4M3   | 1+4+3 | 448     | 2^-6, 2^-9                 | 448, having no Inf | every operand of every GEMM                |
| E5M2   | 1+5+2 | 57344   | 2^-14, 2^-16               | Inf               | gradients, elsewhere; here an ablation      |
| E5M6   | 1+5+6 | 65024   | 2^-14, 2^-20               | Inf               | what the linear after attention keeps       |
| E8M0   | 8     | 2^127   | 2^-127                     | NaN               | scales: an exponent alone, no sign, no zero |

E4M3 gives its top exponent to numbers and keeps one code, all ones, for NaN. E5M2 and E5M6 are cut as IEEE's numbers are:
the top exponent is Inf and NaN. The report names E5M6 and does not define it; this is half precision less four bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int, Int16, UInt8
from torch import Tensor


@dataclass(frozen=True)
class FloatFormat:
    """`largest` is the largest finite number, `dtype` torch's own type of this format, None where it has none."""

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    largest: float
    finite_only: bool
    dtype: torch.dtype | None

    @property
    def bits(self) -> int:
        return self.exponent_bits + self.mantissa_bits + (1 if self.mantissa_bits else 0)

    @property
    def smallest_normal(self) -> float:
        """Numbers below it have fewer bits the smaller they are. E8M0 has none such."""
        return 2.0 ** (1 - self.bias) if self.mantissa_bits else 2.0**-self.bias

    @property
    def smallest(self) -> float:
        """The smallest number above zero, and the step between all below `smallest_normal`."""
        return 2.0**-self.mantissa_bits * self.smallest_normal


E4M3 = FloatFormat("E4M3", 4, 3, bias=7, largest=448.0, finite_only=True, dtype=torch.float8_e4m3fn)
E5M2 = FloatFormat("E5M2", 5, 2, bias=15, largest=57344.0, finite_only=False, dtype=torch.float8_e5m2)
E5M6 = FloatFormat("E5M6", 5, 6, bias=15, largest=65024.0, finite_only=False, dtype=None)
E8M0 = FloatFormat("E8M0", 8, 0, bias=127, largest=2.0**127, finite_only=True, dtype=torch.float8_e8m0fnu)


def encode(x: Float[Tensor, " ..."], fmt: FloatFormat) -> Int[Tensor, " ..."]:
    """The code of the nearest number, ties to the even code: uint8, or int16 for the 12 bits of E5M6.

    Equal to torch's cast bit for bit, where there is one. What is too large becomes Inf, or `largest` where there is no
    Inf (E4M3); NaN stays NaN. To E8M0 ties go up, and a sign is dropped.
    """
    x = x.float()
    if fmt.mantissa_bits == 0:
        return _encode_power(x)
    # Infinity becomes the largest FP32, which is too large for every format here; NaN is put back at the end.
    magnitude = x.abs().nan_to_num(nan=0.0)
    exponent = _exponent(magnitude).clamp(min=1 - fmt.bias)
    steps = torch.round(magnitude / _power_of_two(exponent - fmt.mantissa_bits))  # torch.round is half to even
    code = ((exponent + fmt.bias - 1) << fmt.mantissa_bits) + steps.int()
    code = code.clamp(max=_ceiling(fmt)).masked_fill(x.isnan(), _all_ones(fmt))
    code = code + (x.signbit().int() << (fmt.bits - 1))
    return code.to(torch.uint8 if fmt.bits == 8 else torch.int16)


def decode(codes: Int[Tensor, " ..."], fmt: FloatFormat) -> Float[Tensor, " ..."]:
    """The FP32 number that each code stands for, exactly."""
    codes = codes.int()
    if fmt.mantissa_bits == 0:
        return _decode_power(codes)
    exponent = (codes >> fmt.mantissa_bits) & (2**fmt.exponent_bits - 1)
    mantissa = codes & (2**fmt.mantissa_bits - 1)
    steps = mantissa + ((exponent > 0).int() << fmt.mantissa_bits)
    value = steps * _power_of_two(exponent.clamp(min=1) - fmt.bias - fmt.mantissa_bits)
    magnitude = codes & _all_ones(fmt)
    if not fmt.finite_only:
        value = value.masked_fill(magnitude == _ceiling(fmt), torch.inf)
    value = value.masked_fill(magnitude > _ceiling(fmt), torch.nan)
    return torch.where(codes > _all_ones(fmt), -value, value)


def round_to(x: Float[Tensor, " ..."], fmt: FloatFormat) -> Float[Tensor, " ..."]:
    """The nearest number of a format, in FP32; beyond the largest it is the largest, never Inf. NaN stays NaN."""
    return decode(encode(x.float().clamp(-fmt.largest, fmt.largest), fmt), fmt)


def power_of_two_at_least(x: Float[Tensor, " ..."]) -> Float[Tensor, " ..."]:
    """The smallest power of two >= x, for x > 0; never below 2^-126, the smallest normal FP32.

    On the bits: with any mantissa bit set, adding all mantissa bits carries into the exponent. A ceil(log2(x)) would ask for a
    logarithm that is right to the last bit near every power of two, and none is.
    """
    x = x.float()
    rounded = (x.view(torch.int32) + (2**23 - 1)) & -(2**23)
    return torch.where(x.isnan(), x, rounded.view(torch.float32))


def round_in_place(x: Float[Tensor, " ..."], fmt: FloatFormat) -> Float[Tensor, " ..."]:
    """`round_to` for FP32 numbers that the format reaches, without codes: in four passes; the sign of a zero is lost.

    FP32 has no bits behind the 24th. Adding 1.5 * 2^(23 - M) times a number's power of two leaves of it what a mantissa of M bits
    holds, rounded half to even, and taking the same away gives it back.
    """
    power = x.view(torch.int32).bitwise_and(255 << 23).view(torch.float32).clamp_(min=fmt.smallest_normal)
    shift = 1.5 * 2.0 ** (23 - fmt.mantissa_bits)
    return x.add_(power, alpha=shift).sub_(power, alpha=shift)


def encode_e5m6(x: Float[Tensor, " ..."]) -> Int16[Tensor, " ..."]:
    """`encode(x, E5M6)` for FP32 numbers of at most 65024, ten times as fast; the sign of a zero is lost.

    Rounded to E5M6, they fit half precision with four bits to spare.
    """
    return (round_in_place(x.clone(), E5M6).half().view(torch.int16) >> 4).bitwise_and_(0xFFF)


def decode_e5m6(codes: Int16[Tensor, " ..."]) -> Float[Tensor, " ..."]:
    """`decode(codes, E5M6)`: half precision with four zeros behind."""
    return (codes << 4).view(torch.float16).float()


def pack_e5m6(codes: Int16[Tensor, "... n"]) -> UInt8[Tensor, "... three_halves_n"]:
    """Two codes of 12 bits in three bytes: aaaaaaaa bbbbaaaa bbbbbbbb, low bits first. n must be even."""
    first, second = rearrange(codes.contiguous().int() & 0xFFF, "... (n two) -> two ... n", two=2)
    joined = first | (second << 12)
    four = rearrange(joined.view(torch.uint8), "... (n four) -> ... n four", four=4)
    return rearrange(four[..., :3], "... n three -> ... (n three)")


def unpack_e5m6(packed: UInt8[Tensor, "... three_halves_n"]) -> Int16[Tensor, "... n"]:
    """The codes that `pack_e5m6` packed."""
    three = rearrange(packed, "... (n three) -> ... n three", three=3)
    joined = F.pad(three, (0, 1)).view(torch.int32)
    pairs = (joined & 0xFFF) | ((joined & 0xFFF000) << 4)
    return rearrange(pairs.view(torch.int16), "... n two -> ... (n two)")


# ---- codes and FP32's own bits -----------------------------------------------------------------------------------------


def _all_ones(fmt: FloatFormat) -> int:
    """The code without sign whose bits are all set: a NaN in every format, and E4M3's only one."""
    return 2 ** (fmt.exponent_bits + fmt.mantissa_bits) - 1


def _ceiling(fmt: FloatFormat) -> int:
    """The code that is given to what is too large: the last number before NaN, or Inf."""
    return _all_ones(fmt) - 1 if fmt.finite_only else (2**fmt.exponent_bits - 1) << fmt.mantissa_bits


def _exponent(magnitude: Float[Tensor, " ..."]) -> Int[Tensor, " ..."]:
    """floor(log2(magnitude)) of positive normal FP32 numbers, read off their bits; -127 of zero and of subnormal ones."""
    return (magnitude.view(torch.int32) >> 23) - 127


def _power_of_two(exponent: Int[Tensor, " ..."]) -> Float[Tensor, " ..."]:
    """2^exponent, written into the bits, as torch.exp2 need not be exact. -126 to 127."""
    return ((exponent + 127) << 23).view(torch.float32)


def _encode_power(x: Float[Tensor, " ..."]) -> UInt8[Tensor, " ..."]:
    # A mantissa of one half or more carries into the exponent; without a leading one (2^-127 and less) only more than it.
    bits = x.abs().view(torch.int32)
    code = (bits + (2**22 - 1) + (bits >= 2**23).int()) >> 23
    return code.masked_fill(~x.isfinite(), 255).to(torch.uint8)


def _decode_power(codes: Int[Tensor, " ..."]) -> Float[Tensor, " ..."]:
    # 2^-127 is a subnormal FP32, which has no exponent of its own to write.
    half = 1.0 - 0.5 * (codes == 0).float()
    return (_power_of_two((codes - 127).clamp(min=-126)) * half).masked_fill(codes == 255, torch.nan)
