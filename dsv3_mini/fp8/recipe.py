"""What is quantised how: the report's choices as defaults, and the ablations of them (section 3.3 and appendix B).

A linear y = x W^T costs three matrix products in training, and each of them multiplies FP8 numbers:

    Fprop   y  = x  W^T    sums over i    x  in tiles of 1x128, along i    W in blocks of 128x128
    Dgrad   dx = dy W      sums over o    dy in tiles of 1x128, along o    the same blocks, turned over
    Wgrad   dW = dy^T x    sums over T    dy and x in tiles of 128x1: along the tokens

A scale can be taken out of a sum only where all that is summed shares it. So every tile lies along the dimension that its
product sums over, and x, which is read along i going forward and along T going backward, is tiled twice. A tile is as
small as a GEMM allows, because one outlier takes the range from all that share its scale: 127 others, not a whole tensor.

E4M3 everywhere, also for gradients: what E5M2's extra exponent bit is for, the tiles do already, and its missing mantissa
bit doubles every rounding error. Two things get scales that are powers of two: what the linear behind attention keeps
for backward (in E5M6, 12 bits a number), and the rows that are dispatched to experts. To change such a scale is exact, so
tiling them a second time rounds nothing a second time.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from dsv3_mini.errors import ConfigError
from dsv3_mini.fp8.backends.hopper import Hopper
from dsv3_mini.fp8.formats import E4M3, E5M2, E5M6, FloatFormat
from dsv3_mini.fp8.gemm import Backend, in_fp32
from dsv3_mini.fp8.quantize import Quantized, quantize

Tile = tuple[int, int]


@dataclass(frozen=True)
class Fp8Recipe:
    """How the three products of every linear are quantised, and who multiplies. A tile of None is the whole matrix.

    Args:
        activation_tile: of x in Fprop. In Wgrad both operands have it turned over.
        weight_tile: of W, in Fprop and Dgrad.
        gradient_tile: of dy in Dgrad.
        gradient_format: of dy, in Dgrad and Wgrad: E4M3 or E5M2.
        backend: a name that `gemm` knows, or a backend of one's own.

    Raises:
        ConfigError: a tile that is no pair of sizes, or a format that no tensor core multiplies.
    """

    activation_tile: Tile | None = (1, 128)
    weight_tile: Tile | None = (128, 128)
    gradient_tile: Tile | None = (1, 128)
    gradient_format: FloatFormat = E4M3
    backend: str | Backend = "auto"

    def __post_init__(self) -> None:
        for name in ("activation_tile", "weight_tile", "gradient_tile"):
            tile = getattr(self, name)
            sizes = tile if isinstance(tile, tuple) else ()
            if tile is not None and (len(sizes) != 2 or not all(type(size) is int and size > 0 for size in sizes)):
                raise ConfigError(f"{name} = {tile!r} must be two sizes, as in (1, 128), or None for the whole matrix")
        if self.gradient_format not in (E4M3, E5M2):
            raise ConfigError(f"gradient_format = {self.gradient_format!r} must be E4M3 or E5M2: these are multiplied")

    @property
    def tokens_of_a_tile(self) -> int:
        """Tokens that share a scale in Wgrad; 1 where all of a matrix do, as one token more or less makes no difference."""
        return self.activation_tile[1] if self.activation_tile else 1

    @property
    def in_fp32(self) -> bool:
        """Whether operands are held in FP32 between quantising and multiplying: what the backend would make of them anyway."""
        return in_fp32(self.backend)

    def activation(self, x: Float[Tensor, "T i"], power_of_two: bool = False, kept: bool = False) -> Quantized:
        """x for Fprop. `kept` for backward, too: then in one byte a number."""
        return quantize(x, _tile(self.activation_tile, x), E4M3, power_of_two, self.in_fp32 and not kept)

    def after_attention(self, x: Float[Tensor, "T i"]) -> Quantized:
        """x of the linear behind attention, as it is kept for backward: 12 bits a number."""
        return quantize(x, _tile(self.activation_tile, x), E5M6, power_of_two=True)

    def weight(self, weight: Float[Tensor, "... o i"]) -> Quantized:
        """One weight [o i], or a stack of them [e o i]; `transpose()` is what Dgrad reads."""
        return quantize(weight, _tile(self.weight_tile, weight), E4M3, in_fp32=self.in_fp32)

    def gradient(self, dy: Float[Tensor, "T o"], power_of_two: bool = False) -> Quantized:
        """dy for Dgrad."""
        return quantize(dy, _tile(self.gradient_tile, dy), self.gradient_format, power_of_two, self.in_fp32)

    def gradient_columns(self, dy: Float[Tensor, "T o"]) -> Quantized:
        """dy^T [o T] for Wgrad, tiled along the tokens."""
        tile = _tile(_turned(self.activation_tile), dy)
        return quantize(dy, tile, self.gradient_format, in_fp32=self.in_fp32).transpose()

    def columns(self, x: Float[Tensor, "T i"], power_of_two: bool = False) -> Quantized:
        """x^T [i T] for Wgrad, tiled along the tokens. Of what was kept, give the dequantised numbers."""
        return quantize(x, _tile(_turned(self.activation_tile), x), E4M3, power_of_two, self.in_fp32).transpose()


def _tile(tile: Tile | None, x: Tensor) -> Tile:
    return (max(1, x.shape[-2]), max(1, x.shape[-1])) if tile is None else tile


def _turned(tile: Tile | None) -> Tile | None:
    return None if tile is None else (tile[1], tile[0])


REPORT = Fp8Recipe()

ABLATIONS: dict[str, Fp8Recipe] = {
    "the report's": REPORT,
    "per-tensor scaling": Fp8Recipe(activation_tile=None, weight_tile=None, gradient_tile=None),
    "E5M2 gradients": Fp8Recipe(gradient_format=E5M2),
    "no promotion": Fp8Recipe(backend=Hopper(promote_every=None)),
    "block-wise Dgrad": Fp8Recipe(gradient_tile=(128, 128)),
}
"""What lesson 16 compares. Block-wise gradients in Dgrad are what diverged at 16B (report appendix B.2)."""
