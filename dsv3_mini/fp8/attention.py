"""MLA whose queries, keys and values are not kept for backward but built again from the latents (report section 3.2.3).

    x -- q_a --> query latent    kept |
                                      |-- norms, q_b, kv_b, RoPE, attention --> o_proj, which keeps its input in E5M6
    x -- kv_a -> latent, rope    kept |        again in backward

The core of attention computes in high precision, so FP8 makes nothing of it smaller: queries, keys, values and output of all
heads, 11 times the model's width at 671B, are more than all else that a block keeps. What they are built from, two latents
and a rope part, is 0.3 times the width. The price is the up-projections and attention itself once more in each step.

Simplification: the report keeps attention's output too (in E5M6), and so runs the up-projections again, but not attention.
"""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Bool, Complex, Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dsv3_mini.model.attention import LayerCache, MultiHeadLatentAttention
from dsv3_mini.model.rope import rotate


class FP8Attention(MultiHeadLatentAttention):
    """MultiHeadLatentAttention, number for number, on FP8 projections: what differs is what is kept for backward."""

    def forward(
        self,
        x: Float[Tensor, "b s d"],
        turn: Complex[Tensor, "*b s pairs"],
        mask: Bool[Tensor, "#b s t"] | None = None,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "b s d"]:
        if cache is not None or not torch.is_grad_enabled():
            return super().forward(x, turn, mask, cache)
        query_latent = x if self._direct else self.q_proj.q_a_proj(x)
        kept = (query_latent, self.kv_a_proj_with_mqa(x), turn, mask)
        # Nothing in there is random, so there is no random state to bring back.
        return self.o_proj(checkpoint(self._from_latents, *kept, use_reentrant=False, preserve_rng_state=False))

    def absorbed(self, *inputs: Tensor) -> Float[Tensor, "b s h v"]:
        """Absorbing would multiply with W_UK and W_UV in high precision, where training has them in FP8: heads are built."""
        return self.expanded(*inputs)

    @property
    def _direct(self) -> bool:
        """Queries without a latent (q_lora_rank None) are built from x itself."""
        return isinstance(self.q_proj, nn.Linear)

    def _from_latents(
        self,
        query_latent: Float[Tensor, "b s c_q"],
        joint: Float[Tensor, "b s c_r"],
        turn: Complex[Tensor, "*b s pairs"],
        mask: Bool[Tensor, "#b s t"] | None,
    ) -> Float[Tensor, "b s h_v"]:
        """All that is as wide as all heads together: equations 2, 4, 5 and 7-11."""
        up = self.q_proj if self._direct else self.q_proj[1:]  # norm and q_b_proj
        query = rearrange(up(query_latent), "b s (h nr) -> b s h nr", h=self.heads)
        query_nope, query_rope = query.split([self.nope, self.rope], dim=-1)
        latent, key_rope = joint.split([joint.shape[-1] - self.rope, self.rope], dim=-1)
        latent, key_rope, query_rope = self.kv_a_layernorm(latent), rotate(key_rope, turn), rotate(query_rope, turn)
        mixed = self.expanded(query_nope, query_rope, latent, key_rope, mask)
        return rearrange(mixed, "b s h v -> b s (h v)")
