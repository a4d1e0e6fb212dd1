"""SwiGLU: the feed-forward of the dense layers and, narrower, of every expert."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def swiglu(gate_up: Float[Tensor, "... 2f"]) -> Float[Tensor, "... f"]:
    """silu(gate) * up, for the two halves of one projection."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)). Gate and up share one matrix, so that x is read by one GEMM and not by two."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        return self.down_proj(swiglu(self.gate_up_proj(x)))
