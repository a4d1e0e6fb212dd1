"""One transformer block: attention and feed-forward, each behind a norm and beside the residual stream."""

from __future__ import annotations

from jaxtyping import Bool, Complex, Float
from torch import Tensor, nn

from dsv3_mini.config import ModelConfig
from dsv3_mini.model.attention import LayerCache, MultiHeadLatentAttention
from dsv3_mini.model.experts import GroupedExperts
from dsv3_mini.model.feed_forward import SwiGLU
from dsv3_mini.model.moe import MoE
from dsv3_mini.model.norm import RMSNorm
from dsv3_mini.model.router import Routing


class Block(nn.Module):
    """Layer number `layer`: dense below `first_k_dense_replace`, a mixture of experts from there on."""

    def __init__(self, cfg: ModelConfig, layer: int, experts: type[GroupedExperts] = GroupedExperts) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = MultiHeadLatentAttention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        sparse = cfg.is_moe_layer(layer)
        self.mlp = MoE(cfg, layer, experts) if sparse else SwiGLU(cfg.hidden_size, cfg.intermediate_size)

    def forward(
        self,
        x: Float[Tensor, "b s d"],
        turn: Complex[Tensor, "*b s pairs"],
        mask: Bool[Tensor, "#b s t"] | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[Float[Tensor, "b s d"], Routing | None]:
        """The block's output, and how its tokens were routed (None for a dense layer)."""
        x = x + self.self_attn(self.input_layernorm(x), turn, mask, cache)
        fed = self.mlp(self.post_attention_layernorm(x))
        fed, routing = fed if isinstance(fed, tuple) else (fed, None)
        return x + fed, routing
