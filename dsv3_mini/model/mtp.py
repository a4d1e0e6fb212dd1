"""Multi-token prediction (report section 2.2, equations 21-25).

Module number j looks one token further than the one before it: at position i it joins the previous depth's hidden state
with the embedding of token i + j, runs one block of its own, and the main model's head reads token i + j + 1 from the
result. Depths form a chain, so each keeps the whole causal past.

Where report and released weights differ, this follows the weights: the embedding comes first in `eh_proj`'s input.
The state handed from depth to depth is the normed one (the main model's after its final norm), as the released model is
served.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Complex, Float
from torch import Tensor, nn

from dsv3_mini.config import ModelConfig
from dsv3_mini.model.attention import LayerCache
from dsv3_mini.model.block import Block
from dsv3_mini.model.experts import GroupedExperts
from dsv3_mini.model.norm import RMSNorm
from dsv3_mini.model.router import Routing


class MTPModule(nn.Module):
    """One depth of the chain. Embedding and head are the main model's, and come in as tensors: nothing is held twice."""

    def __init__(self, cfg: ModelConfig, layer: int, experts: type[GroupedExperts] = GroupedExperts) -> None:
        super().__init__()
        self.enorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.hnorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * cfg.hidden_size, cfg.hidden_size, bias=False)
        self.block = Block(cfg, layer, experts)
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)  # shared_head.norm in the checkpoint

    def forward(
        self,
        embedding: Float[Tensor, "b s d"],
        hidden: Float[Tensor, "b s d"],
        turn: Complex[Tensor, "*b s pairs"],
        mask: Bool[Tensor, "#b s t"] | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[Float[Tensor, "b s d"], Routing | None]:
        """The next depth's hidden states, ready for the head.

        Args:
            embedding: of the tokens one further than those that `hidden` has read.
            hidden: the normed states of the depth before.
            cache: the module's own, when drafting: it holds the positions before these.
        """
        joined = self.eh_proj(torch.cat([self.enorm(embedding), self.hnorm(hidden)], dim=-1))
        deeper, routing = self.block(joined, turn, mask, cache)
        return self.norm(deeper), routing
