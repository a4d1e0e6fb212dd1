"""The routed experts in FP8: three grouped GEMMs forward and backward, and one small GEMM per expert for its weights.

    rows    [Tk d]  what dispatch sent: quantised with power-of-two scales, as it travels between machines
    gate_up = rows W_gu[e]^T          grouped: rows of expert e by weights of expert e
    hidden  = gate * swiglu(gate_up)
    results = hidden W_down[e]^T      grouped; BF16, as `combine` adds them up

Tiles of 1x128 lie within a row, so it makes no difference whether rows are quantised before they are sent or after. Rows and
gate_up are kept for backward, both in E4M3; hidden is computed again (`swiglu.py`). Quantised are also the gradients that come
back to the experts, which travel the same way.

Wgrad sums over an expert's own rows: its tiles of 128 tokens begin with them. An expert that no token chose has a gradient of
zeros.

Simplification: gradients of weights are quantised for all experts at once, but multiplied in a loop over them, where kernels
for Hopper take all groups in one launch.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv3_mini.fp8.gemm import grouped_gemm, grouped_wgrad
from dsv3_mini.fp8.linear import Fp32Weights
from dsv3_mini.fp8.quantize import Quantized
from dsv3_mini.fp8.recipe import REPORT, Fp8Recipe
from dsv3_mini.model.add_up import add_up
from dsv3_mini.model.experts import Dispatched, GroupedExperts, gated


class FP8GroupedExperts(Fp32Weights, GroupedExperts):
    """All routed experts of a layer; the parameters of GroupedExperts, FP32 as masters are."""

    recipe: Fp8Recipe = REPORT

    def compute(self, sent: Dispatched, weight: Float[Tensor, " Tk"]) -> Float[Tensor, "Tk d"]:
        ends = sent.load.cumsum(0).to(torch.int32)
        return _Experts.apply(sent.rows, weight, self.gate_up_proj, self.down_proj, ends, self.recipe)

    def combine(
        self, x: Float[Tensor, "T d"], results: Float[Tensor, "Tk d"], sent: Dispatched
    ) -> Float[Tensor, "T d"]:
        return add_up(results, sent.token, len(x))  # which keeps no results, in BF16, for backward


class _Experts(torch.autograd.Function):
    """results of rows and gates, with rows and gate_up kept in FP8."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, gates: Tensor, w_gate_up: Tensor, w_down: Tensor, ends: Tensor, recipe: Fp8Recipe
    ) -> Tensor:
        x = recipe.activation(rows, power_of_two=True, kept=True)
        gate_up = grouped_gemm(x, recipe.weight(w_gate_up), ends, recipe.backend, rows.dtype)
        kept = recipe.activation(gate_up, kept=True)
        hidden = recipe.activation(gated(gate_up, gates))
        ctx.save_for_backward(x.q, x.scale, kept.q, kept.scale, gates, w_gate_up, w_down, ends)
        ctx.x_as, ctx.kept_as = ((one.tile, one.fmt, one.columns) for one in (x, kept))
        ctx.recipe = recipe
        return grouped_gemm(hidden, recipe.weight(w_down), ends, recipe.backend, rows.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x_q, x_scale, kept_q, kept_scale, gates, w_gate_up, w_down, ends = ctx.saved_tensors
        recipe, backend = ctx.recipe, ctx.recipe.backend
        with torch.enable_grad():
            gate_up = Quantized(kept_q, kept_scale, *ctx.kept_as).dequantize().requires_grad_()
            weigh = gates.detach().requires_grad_()
            hidden = gated(gate_up, weigh)
        d_hidden = grouped_gemm(
            recipe.gradient(dy, power_of_two=True), recipe.weight(w_down).transpose(), ends, backend, torch.float32
        )
        d_down = wgrad_by_expert(dy, hidden.detach(), ends, recipe)
        d_gate_up, d_gates = torch.autograd.grad(hidden, (gate_up, weigh), d_hidden)
        dx = grouped_gemm(recipe.gradient(d_gate_up), recipe.weight(w_gate_up).transpose(), ends, backend, dy.dtype)
        rows = Quantized(x_q, x_scale, *ctx.x_as).dequantize()
        d_gate_up_weight = wgrad_by_expert(d_gate_up, rows, ends, recipe, power_of_two=True)
        return dx, d_gates, d_gate_up_weight.to(w_gate_up.dtype), d_down.to(w_down.dtype), None, None


def wgrad_by_expert(
    dy: Float[Tensor, "T o"],
    x: Float[Tensor, "T i"],
    ends: Int[Tensor, " e"],
    recipe: Fp8Recipe,
    power_of_two: bool = False,
) -> Float[Tensor, "e o i"]:
    """dW[e] = dy^T x over the rows of expert e, in FP32; zeros where it has none.

    Both are quantised for all experts at once. So each expert's rows are moved to where a tile begins, and rows of zeros fill up
    its last one: they change neither a scale nor a sum.
    """
    load = torch.diff(ends, prepend=ends.new_zeros(1))
    room = -(-load // recipe.tokens_of_a_tile) * recipe.tokens_of_a_tile
    ends_apart = room.cumsum(0)
    place = torch.arange(len(dy), device=dy.device) + (ends_apart - room - ends + load).repeat_interleave(load)

    def apart(rows: Float[Tensor, "T c"]) -> Float[Tensor, "T_apart c"]:
        return rows.new_zeros(int(ends_apart[-1]), rows.shape[1]).index_copy_(0, place, rows)

    dy_columns, x_columns = recipe.gradient_columns(apart(dy)), recipe.columns(apart(x), power_of_two)
    return grouped_wgrad(dy_columns, x_columns, ends_apart, recipe.backend)
