"""FP8Linear: a linear whose three matrix products multiply FP8 numbers (report section 3.3.1, figure 6).

                        x BF16                              dy BF16
                          |                                   |
            to E4M3, 1x128 along i               to E4M3, 1x128 along o     to E4M3, 128x1 along T
             |            |                                   |                         |
             |     Fprop: y = x W^T  -> BF16       Dgrad: dx = dy W -> BF16    Wgrad: dW = dy^T x -> FP32
             |            |                                   |                         |
             |        W to E4M3, 128x128               the same, turned            the kept x, re-tiled
             +--- kept for backward, 1 byte a number ------------------------------- to 128x1 along T

    W    stays FP32 and is the optimizer's master itself; it is rounded to E4M3 for each product and never to BF16
    dW   FP32, so that micro-batches add up in FP32
    x    is kept in FP8 alone, never in BF16; behind attention in E5M6, since that x also serves attention's backward

Kept x is read along T in Wgrad: it is dequantised and quantised again in tiles of 128x1. Where its scales are powers of two
the second rounding does nothing (but underflow); elsewhere it is a second rounding, as in the report.

Errors to expect. E4M3 has a mantissa of 3 bits: a number is at most 2^-4 = 6.25% off, and about 2.5% in root mean square (step
1/8 over sqrt(12) for numbers just above a power of two, half of that just below the next). Operands round independently, so
y and dx are sqrt(2) x 2.5% = 3.5% off, relative to their norm; dW is sqrt(3) x 2.5% = 4.3% off, as x was rounded twice, and
3.5% behind attention. A sum over many terms is neither better nor worse: errors grow as the terms do.

Simplification: W is quantised anew in backward instead of being kept in FP8 through the step. That costs little, and what is
kept for backward is activations alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dsv3_mini.fp8.gemm import gemm
from dsv3_mini.fp8.quantize import Quantized
from dsv3_mini.fp8.recipe import REPORT, Fp8Recipe


class Fp32Weights(nn.Module):
    """A module whose own weights stay FP32 in `model.to(torch.bfloat16)`: they are masters, and BF16 would lose updates."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Fp32Weights:
        masters = {n: p.data for n, p in self.named_parameters(recurse=False) if p.dtype == torch.float32}
        super()._apply(fn, recurse)
        for name, data in masters.items():
            parameter = self._parameters[name]
            if parameter.dtype != torch.float32:
                parameter.data = data.to(parameter.device)
        return self


class FP8Linear(Fp32Weights, nn.Linear):
    """y = x W^T in FP8. `weight` [o i] is that of nn.Linear; there is no bias. y has x's dtype.

    Attributes:
        recipe: how it quantises.
        after_attention: True keeps x for backward in E5M6.
    """

    recipe: Fp8Recipe = REPORT
    after_attention: bool = False

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Float[Tensor, "... i"]) -> Float[Tensor, "... o"]:
        rows = rearrange(x, "... i -> (...) i")
        y = _Linear.apply(rows, self.weight, self.recipe, self.after_attention)
        return y.view(*x.shape[:-1], y.shape[-1])


class _Linear(torch.autograd.Function):
    """The three products of the figure, for one matrix of rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, recipe: Fp8Recipe, after_attention: bool) -> Tensor:
        rows = recipe.activation(x, kept=not after_attention)
        kept = recipe.after_attention(x) if after_attention else rows
        ctx.save_for_backward(kept.q, kept.scale, weight)
        ctx.kept_as, ctx.recipe = (kept.tile, kept.fmt, kept.columns), recipe
        return fprop(rows, weight, recipe, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None, None]:
        q, scale, weight = ctx.saved_tensors
        x = Quantized(q, scale, *ctx.kept_as).dequantize()
        dx = dgrad(dy, weight, ctx.recipe, dy.dtype)
        dw = wgrad(dy, x, ctx.recipe, power_of_two=True)
        return dx, dw.to(weight.dtype), None, None


def fprop(x: Quantized, weight: Float[Tensor, "o i"], recipe: Fp8Recipe, dtype: torch.dtype) -> Float[Tensor, "T o"]:
    """y = x W^T."""
    return gemm(x, recipe.weight(weight), recipe.backend, dtype)


def dgrad(
    dy: Float[Tensor, "T o"], weight: Float[Tensor, "o i"], recipe: Fp8Recipe, dtype: torch.dtype
) -> Float[Tensor, "T i"]:
    """dx = dy W."""
    return gemm(recipe.gradient(dy), recipe.weight(weight).transpose(), recipe.backend, dtype)


def wgrad(
    dy: Float[Tensor, "T o"], x: Float[Tensor, "T i"], recipe: Fp8Recipe, power_of_two: bool = False
) -> Float[Tensor, "o i"]:
    """dW = dy^T x, in FP32. `power_of_two`: of x's scales; for numbers that were FP8 already, rounding them least."""
    return gemm(recipe.gradient_columns(dy), recipe.columns(x, power_of_two), recipe.backend, torch.float32)
