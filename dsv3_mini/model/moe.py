"""DeepSeekMoE: shared experts that see every token, and routed experts that see the tokens sent to them (equation 12)."""

from __future__ import annotations

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from dsv3_mini.config import ModelConfig
from dsv3_mini.model.experts import GroupedExperts
from dsv3_mini.model.feed_forward import SwiGLU
from dsv3_mini.model.router import Router, Routing


class MoE(nn.Module):
    """The feed-forward of a sparse layer. S shared experts are one SwiGLU of S times the width: their sum is the same."""

    def __init__(self, cfg: ModelConfig, layer: int, experts: type[GroupedExperts] = GroupedExperts) -> None:
        super().__init__()
        self.gate = Router(cfg, layer)
        self.experts = experts(cfg)
        shared = cfg.n_shared_experts * cfg.moe_intermediate_size
        self.shared_experts = SwiGLU(cfg.hidden_size, shared) if shared else None

    def forward(self, x: Float[Tensor, "b s d"]) -> tuple[Float[Tensor, "b s d"], Routing]:
        routing = self.gate(x)
        tokens, chosen, gates = (rearrange(y, "b s x -> (b s) x") for y in (x, routing.chosen, routing.gates))
        routed = self.experts(tokens, chosen, gates, routing.load).view_as(x)
        return (routed if self.shared_experts is None else routed + self.shared_experts(x)), routing
