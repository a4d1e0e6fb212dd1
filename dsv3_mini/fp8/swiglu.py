"""SwiGLU in FP8: what it reads is kept in FP8, what it writes is computed again (report section 3.3.3).

    gate_up = x W_gu^T                        an FP8Linear, which keeps x
    hidden  = silu(gate) * up
    y       = hidden W_down^T

BF16 keeps gate_up, silu(gate) and hidden for backward: 2f + f + f numbers of two bytes. Here gate_up is kept in E4M3 and the
others are functions of it: 2f numbers of one byte, a quarter. Derivatives are taken at the kept, rounded gate_up; y is that of
the numbers before rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv3_mini.fp8.linear import dgrad, fprop, wgrad
from dsv3_mini.fp8.quantize import Quantized
from dsv3_mini.fp8.recipe import REPORT, Fp8Recipe
from dsv3_mini.model.feed_forward import SwiGLU, swiglu


class FP8SwiGLU(SwiGLU):
    """down(silu(gate(x)) * up(x)); both projections are FP8Linears."""

    recipe: Fp8Recipe = REPORT

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        rows = rearrange(self.gate_up_proj(x), "... f -> (...) f")
        return _Down.apply(rows, self.down_proj.weight, self.recipe).view_as(x)


class _Down(torch.autograd.Function):
    """y = swiglu(gate_up) W^T, of which gate_up alone is kept."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, weight: Tensor, recipe: Fp8Recipe) -> Tensor:
        kept = recipe.activation(gate_up, kept=True)
        ctx.save_for_backward(kept.q, kept.scale, weight)
        ctx.kept_as, ctx.recipe = (kept.tile, kept.fmt, kept.columns), recipe
        return fprop(recipe.activation(swiglu(gate_up)), weight, recipe, gate_up.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        q, scale, weight = ctx.saved_tensors
        with torch.enable_grad():
            gate_up = Quantized(q, scale, *ctx.kept_as).dequantize().requires_grad_()
            hidden = swiglu(gate_up)
        d_hidden = dgrad(dy, weight, ctx.recipe, torch.float32)
        d_weight = wgrad(dy, hidden.detach(), ctx.recipe).to(weight.dtype)
        (d_gate_up,) = torch.autograd.grad(hidden, gate_up, d_hidden)
        return d_gate_up.to(dy.dtype), d_weight, None
