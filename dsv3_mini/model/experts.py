"""The routed experts: many small SwiGLUs, of which each token visits k. No token is ever dropped.

The work is three steps, and each is a method that a parallel or low-precision variant overrides:

    dispatch   copy each token once per chosen expert, sorted by expert
    compute    every expert on its own rows, each row weighed with its gate
    combine    add the results up per token                                                (equation 12)

A gate is a number per row, so it may be multiplied in anywhere behind the nonlinearity: here it is before the down
projection, where a row is f wide and not d (a third, in our presets), forward, backward and in what is kept for it.

`GroupedExperts` does `compute` in one grouped GEMM; `LoopExperts` is the same in a plain loop, to read and to check.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsv3_mini.config import ModelConfig
from dsv3_mini.model.feed_forward import swiglu


@dataclass(frozen=True)
class Dispatched:
    """Rows sorted by expert: `rows` [T*k d], where row i came from token `token[i]` as its `slot[i]`-th flat choice."""

    rows: Float[Tensor, "Tk d"]
    token: Int[Tensor, " Tk"]
    slot: Int[Tensor, " Tk"]
    load: Int[Tensor, " e"]


class GroupedExperts(nn.Module):
    """All routed experts of a layer, their weights stacked along `e`; gate and up projections side by side."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        experts, width, inner = cfg.n_routed_experts, cfg.hidden_size, cfg.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, inner))

    def forward(
        self,
        x: Float[Tensor, "T d"],
        chosen: Int[Tensor, "T k"],
        gates: Float[Tensor, "T k"],
        load: Int[Tensor, " e"],
    ) -> Float[Tensor, "T d"]:
        sent = self.dispatch(x, chosen, load)
        weight = gates.flatten().index_select(0, sent.slot)
        return self.combine(x, self.compute(sent, weight), sent)

    def dispatch(self, x: Float[Tensor, "T d"], chosen: Int[Tensor, "T k"], load: Int[Tensor, " e"]) -> Dispatched:
        slot = chosen.flatten().argsort(stable=True)
        token = slot // chosen.shape[1]
        return Dispatched(x.index_select(0, token), token, slot, load)

    def compute(self, sent: Dispatched, weight: Float[Tensor, " Tk"]) -> Float[Tensor, "Tk d"]:
        ends = sent.load.cumsum(0).to(torch.int32)
        gate_up = grouped_gemm(sent.rows, rearrange(self.gate_up_proj, "e f d -> e d f"), ends)
        return grouped_gemm(gated(gate_up, weight), rearrange(self.down_proj, "e d f -> e f d"), ends)

    def combine(
        self, x: Float[Tensor, "T d"], results: Float[Tensor, "Tk d"], sent: Dispatched
    ) -> Float[Tensor, "T d"]:
        return torch.zeros_like(x).index_add_(0, sent.token, results)


class LoopExperts(GroupedExperts):
    """One expert after the other."""

    def compute(self, sent: Dispatched, weight: Float[Tensor, " Tk"]) -> Float[Tensor, "Tk d"]:
        load, results = sent.load.tolist(), []
        for rows, gates, gate_up, down in zip(
            sent.rows.split(load), weight.split(load), self.gate_up_proj, self.down_proj, strict=True
        ):
            results.append(gated(rows @ gate_up.T, gates) @ down.T)
        return torch.cat(results)


def gated(gate_up: Float[Tensor, "T 2f"], weight: Float[Tensor, " T"]) -> Float[Tensor, "T f"]:
    """The SwiGLU of every row, times the row's gate value."""
    return swiglu(gate_up) * rearrange(weight, "T -> T 1").type_as(gate_up)


def grouped_gemm(
    rows: Float[Tensor, "T i"], weights: Float[Tensor, "e i o"], ends: Int[Tensor, " e"]
) -> Float[Tensor, "T o"]:
    """rows[start_e : end_e] @ weights[e] for every expert e in one call; `ends` are int32, empty groups are allowed."""
    if rows.is_meta:
        # On meta torch's own shape function knows BF16 only; any one expert's GEMM has the shape.
        return rows @ weights[0]
    return F.grouped_mm(rows, weights, offs=ends)
