"""A matrix as small numbers and one FP32 scale per tile (report section 3.3.2).

    scale = largest magnitude of the tile / largest number of the format         "online": of these numbers, now
    q     = nearest number of the format to x / scale
    x    ~= q * scale

One outlier spoils the numbers that share its scale: the smaller the tile, the fewer. The report's tiles, of [r c]:

    (1, 128)     activations: 128 channels of one token, along the contraction of Fprop
    (128, 128)   weights: 128 input by 128 output channels
    (128, 1)     activations and gradients for Wgrad, which contracts over tokens: 128 tokens of one channel
    (r, c)       the whole matrix, as FP8 training used to do; an ablation here

The tiles at the right and lower edge may be narrower; they have a scale like any. Scales may be rounded *up* to powers of two
(down, and the largest number would not fit): a change of tiles then changes exponents and leaves mantissas alone.

Inf or NaN anywhere makes its tile NaN: a run that goes wrong shows it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from jaxtyping import Float, Float64, Int16
from torch import Tensor

from dsv3_mini.errors import ConfigError
from dsv3_mini.fp8.formats import (
    E4M3,
    FloatFormat,
    decode_e5m6,
    encode_e5m6,
    pack_e5m6,
    power_of_two_at_least,
    round_in_place,
    unpack_e5m6,
)

TILE = 128
"""The report's tile: it is also how often partial sums leave the tensor core, so that a scale meets them on their way."""

TINY = torch.finfo(torch.float32).tiny  # a tile of zeros gets this scale: it may be divided by, and is a power of two


@dataclass(frozen=True)
class Quantized:
    """A matrix [... r c] of the format `fmt`, with a scale for each tile: value = q * scale.

    q: [... r c] in torch's type of the format; for E5M6, which torch does not have, its bytes [... r 3c/2] (c odd: one more).
        Or the same numbers in FP32, where they are multiplied in FP32 at once (`quantize(..., in_fp32=True)`).
    scale: FP32 [... ceil(r / tile_r) ceil(c / tile_c)].
    """

    q: Tensor
    scale: Float[Tensor, "... tiles_r tiles_c"]
    tile: tuple[int, int]
    fmt: FloatFormat
    columns: int

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.q.shape[:-1], self.columns))

    @property
    def in_fp32(self) -> bool:
        """Whether q holds FP32."""
        return self.q.dtype == torch.float32

    @property
    def nbytes(self) -> int:
        """What it takes to keep: numbers and scales."""
        return self.q.nbytes + self.scale.nbytes

    def numbers(self) -> Float[Tensor, "... r c"]:
        """q in FP32, not scaled; q itself where it is FP32."""
        if self.in_fp32:
            return self.q
        if not self.fmt.dtype:
            return decode_e5m6(self._codes())
        if self.q.is_cuda:
            return self.q.float()
        # A CPU converts FP8 one number at a time. To look two up at once, as one number of 8 bytes, is many times faster.
        codes = self.q.reshape(-1).view(torch.uint8)
        if len(codes) % 2 or codes.storage_offset() % 2:
            codes = torch.cat([codes, codes.new_zeros(len(codes) % 2)])
        pairs = _all_pairs(self.fmt.dtype).to(codes.device).index_select(0, codes.view(torch.uint16).int())
        return pairs.view(torch.float32)[: self.q.numel()].view(self.q.shape)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "... r c"]:
        """q * scale, computed in FP32, then rounded once to `dtype`."""
        numbers = self.numbers()
        values = torch.empty_like(numbers) if self.in_fp32 else numbers  # in place, but where `numbers` is q itself
        for place, tiles, (p, q) in _whole_tiles(self.shape, self.tile):
            part, scaled = (rearrange(x[place], "... (a p) (b q) -> ... a p b q", p=p, q=q) for x in (numbers, values))
            torch.mul(part, rearrange(self.scale[tiles], "... a b -> ... a 1 b 1"), out=scaled)
        return values.to(dtype)

    def transpose(self) -> Quantized:
        """The same numbers as [... c r]; a tile (1, 128) is then (128, 1). FP32 is seen turned over, all else laid out anew."""
        if self.in_fp32:
            q = self.q.mT
        elif self.fmt.dtype:
            q = self.q.mT.contiguous()
        else:
            q = _packed(self._codes().mT)
        return Quantized(q, self.scale.mT.contiguous(), self.tile[::-1], self.fmt, self.q.shape[-2])

    def rows(self, start: int, end: int) -> Quantized:
        """Rows start:end of [r c]; its tiles must be one row high."""
        if self.tile[0] != 1:
            raise ConfigError(f"rows of tiles {self.tile} cannot be taken apart: they share scales; dequantize first")
        return replace(self, q=self.q[start:end], scale=self.scale[start:end])

    def matrix(self, index: int) -> Quantized:
        """One matrix [r c] of a stack [e r c]."""
        return replace(self, q=self.q[index], scale=self.scale[index])

    def along(self, start: int, end: int) -> Quantized:
        """Columns start:end of [r c], whole tiles or within one. Not of E5M6, which is packed."""
        width = self.tile[1]
        whole = start % width == 0 and (end % width == 0 or end == self.columns)
        if not (whole or start // width == (end - 1) // width) or not self.fmt.dtype:
            raise ConfigError(
                f"columns {start}:{end} of {self.fmt.name} cut through tiles {width} wide: they share scales"
            )
        scale = self.scale[:, start // width : -(-end // width)]
        return replace(self, q=self.q[:, start:end], scale=scale, columns=end - start)

    def _codes(self) -> Int16[Tensor, "... r c"]:
        return unpack_e5m6(self.q)[..., : self.columns]


@torch.no_grad()
def quantize(
    x: Float[Tensor, "... r c"],
    tile: tuple[int, int] = (1, TILE),
    fmt: FloatFormat = E4M3,
    power_of_two: bool = False,
    in_fp32: bool = False,
) -> Quantized:
    """The nearest numbers of `fmt` under scales that make each tile's largest magnitude the largest that fits.

    Args:
        tile: rows and columns that share a scale. Larger than the matrix means all of it.
        power_of_two: round each scale up to a power of two; up to one bit of range is then unused.
        in_fp32: hold the numbers in FP32, for those who multiply in FP32 and would only read back what is made small.

    Raises:
        ConfigError: a tile of no rows or columns, or a format without mantissa.
    """
    if min(tile) < 1 or not fmt.mantissa_bits:
        raise ConfigError(f"tile = {tile} in {fmt.name} cannot hold numbers: use (1, 128) or (128, 128) in E4M3")
    x = x.float()
    *lead, rows, columns = x.shape
    scale = x.new_empty(*lead, -(-rows // tile[0]), -(-columns // tile[1]))
    scaled = torch.empty(x.shape, device=x.device)
    for place, tiles, (p, q) in _whole_tiles(x.shape, tile):
        part, here = (rearrange(of[place], "... (a p) (b q) -> ... a p b q", p=p, q=q) for of in (x, scaled))
        # The largest magnitude from the largest and the smallest number: |x| of everything would be a copy of the matrix.
        most, least = (reduce(part, "... a p b q -> ... a 1 b 1", which) for which in ("max", "min"))
        amax = torch.maximum(most, -least)
        divisor = (amax / fmt.largest).clamp_min_(TINY)
        if power_of_two:
            divisor = power_of_two_at_least(divisor)
        scale[tiles] = rearrange(divisor, "... a 1 b 1 -> ... a b")
        torch.div(part, divisor, out=here)
    # Three ways to the same numbers (tests say so), each the fastest to its kind. Nothing is beyond the largest but NaN.
    if in_fp32:
        q = round_in_place(scaled, fmt)
    elif fmt.dtype:
        q = scaled.to(fmt.dtype)
    else:
        q = _packed(encode_e5m6(scaled))
    return Quantized(q, scale, tile, fmt, columns)


def retile(x: Quantized, tile: tuple[int, int], power_of_two: bool = True, fmt: FloatFormat | None = None) -> Quantized:
    """The same values under other tiles, such as 1x128 -> 128x1 for Wgrad.

    Where the old scales are powers of two and the new ones too, nothing is rounded again: q * 2^i becomes q * 2^(i - j) * 2^j.
    The exception is underflow. What is small beside the largest of its *new* tile falls among the subnormal numbers, on the
    grid of 2^-9 of E4M3, and may lose bits there. With other scales every number is rounded a second time.

    Args:
        fmt: of the result; None keeps it. What was kept in E5M6 is multiplied in E4M3.
    """
    return quantize(x.dequantize(), tile, fmt or x.fmt, power_of_two)


@functools.cache
def _all_pairs(dtype: torch.dtype) -> Float64[Tensor, " pairs"]:
    """For each two bytes, read as one number: what they are as FP8, as two FP32 side by side."""
    two_bytes = torch.arange(2**16, dtype=torch.int32).to(torch.uint16)
    return two_bytes.view(dtype).float().view(torch.float64)


def _packed(codes: Int16[Tensor, "... c"]) -> Tensor:
    """Two in three bytes; an odd row gets a zero to go with its last."""
    return pack_e5m6(F.pad(codes, (0, 1)) if codes.shape[-1] % 2 else codes)


def _whole_tiles(
    shape: torch.Size, tile: tuple[int, int]
) -> Iterator[tuple[tuple[object, ...], tuple[object, ...], tuple[int, int]]]:
    """Cut [... r c] into at most four rectangles of equal tiles: the body, and the ragged edges, whose tiles are narrower.

    Yields where in the matrix, where among the scales, and the tile. So no edge needs padding, which would copy the matrix.
    """
    for rows, tile_rows, p in _spans(shape[-2], tile[0]):
        for columns, tile_columns, q in _spans(shape[-1], tile[1]):
            yield (..., rows, columns), (..., tile_rows, tile_columns), (p, q)


def _spans(size: int, tile: int) -> Iterator[tuple[slice, slice, int]]:
    whole, rest = divmod(size, tile)
    if whole:
        yield slice(0, whole * tile), slice(0, whole), tile
    if rest:
        yield slice(whole * tile, size), slice(whole, whole + 1), rest
