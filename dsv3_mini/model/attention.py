"""Multi-head latent attention (report section 2.1.1, equations 1-11).

Keys and values of all heads are rebuilt from one small latent per token (kv_lora_rank wide). The latent, and one rotated
key that all heads share, are all that a decoder must keep: 576 numbers a token and layer at 671B, where multi-head
attention keeps 40,960.

    latent   = norm(W_DKV x)              cached     c
    key_rope = RoPE(W_KR x)               cached     r, shared by all heads
    key      = [W_UK latent ; key_rope]              h (n + r)
    value    = W_UV latent                           h v
    query    = [W_UQ q_latent ; RoPE(W_QR q_latent)] h (n + r),  q_latent = norm(W_DQ x)

Two ways to the same output stand below: `expanded` builds every head's keys and values (training, prefill); `absorbed`
folds W_UK into the query and W_UV into the output, and attends to the latents themselves (decoding). `absorbs` counts which
of the two takes fewer products.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from jaxtyping import Bool, Complex, Float, Int
from torch import Tensor, nn

from dsv3_mini.config import ModelConfig
from dsv3_mini.model.norm import RMSNorm
from dsv3_mini.model.rope import rotate, softmax_scale


class LayerCache(Protocol):
    """What the model asks of a cache: keep the new tokens' latents, give back all; and where new tokens will stand.

    Slot t of a row holds the row's token at position t. `length` is that of the longest row.
    """

    @property
    def length(self) -> int: ...

    def positions(self, new: int) -> Int[Tensor, "#b new"]: ...

    def extend(
        self, latent: Float[Tensor, "b s c"], key_rope: Float[Tensor, "b s r"]
    ) -> tuple[Float[Tensor, "b t c"], Float[Tensor, "b t r"]]: ...


class MultiHeadLatentAttention(nn.Module):
    """MLA with the names of the released checkpoint. `q_lora_rank = None` projects queries directly."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.heads = cfg.num_attention_heads
        self.nope, self.rope, self.value = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim
        self.scale = softmax_scale(cfg)
        query_width = self.heads * cfg.qk_head_dim
        if cfg.q_lora_rank is None:
            self.q_proj = nn.Linear(cfg.hidden_size, query_width, bias=False)
        else:
            self.q_proj = nn.Sequential()
            self.q_proj.add_module("q_a_proj", nn.Linear(cfg.hidden_size, cfg.q_lora_rank, bias=False))
            self.q_proj.add_module("q_a_layernorm", RMSNorm(cfg.q_lora_rank, cfg.rms_norm_eps))
            self.q_proj.add_module("q_b_proj", nn.Linear(cfg.q_lora_rank, query_width, bias=False))
        self.kv_a_proj_with_mqa = nn.Linear(cfg.hidden_size, cfg.kv_lora_rank + self.rope, bias=False)
        self.kv_a_layernorm = RMSNorm(cfg.kv_lora_rank, cfg.rms_norm_eps)
        self.kv_b_proj = nn.Linear(cfg.kv_lora_rank, self.heads * (self.nope + self.value), bias=False)
        self.o_proj = nn.Linear(self.heads * self.value, cfg.hidden_size, bias=False)

    def forward(
        self,
        x: Float[Tensor, "b s d"],
        turn: Complex[Tensor, "*b s pairs"],
        mask: Bool[Tensor, "#b s t"] | None = None,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "b s d"]:
        """Attention of x to itself, and to what the cache holds.

        Args:
            turn: the rotation of each of x's positions (`rope.rotations`).
            mask: true where a query may see a key; None means causal, and needs an empty cache.
            cache: this layer's cache; it is extended by x's latents.
        """
        query_nope, query_rope = self._queries(x, turn)
        latent, key_rope = self._latents(x, turn)
        if cache is not None:
            latent, key_rope = cache.extend(latent, key_rope)
        attend = self.absorbed if self.absorbs(x.shape[1], latent.shape[1]) else self.expanded
        mixed = attend(query_nope, query_rope, latent, key_rope, mask)
        return self.o_proj(rearrange(mixed, "b s h v -> b s (h v)"))

    def absorbs(self, new: int, context: int) -> bool:
        """Whether `absorbed` takes fewer products than `expanded`, for `new` queries over `context` keys, the new ones included.

        Building a key and a value costs up = c (n + v) multiplications in a head, for each cached token; folding costs as
        many, for each new one. In exchange a query meets a key in 2c + r numbers on the latents, in n + r + v on the heads.
        Where nothing was cached, expanded: all keys are new, and torch's causal kernel wants them built.
        """
        latent = self.kv_a_layernorm.weight.shape[0]
        up, wider = latent * (self.nope + self.value), 2 * latent - self.nope - self.value
        return new < context and new * (up + context * wider) < context * up

    def expanded(
        self,
        query_nope: Float[Tensor, "b s h n"],
        query_rope: Float[Tensor, "b s h r"],
        latent: Float[Tensor, "b t c"],
        key_rope: Float[Tensor, "b t r"],
        mask: Bool[Tensor, "#b s t"] | None,
    ) -> Float[Tensor, "b s h v"]:
        """Every head's keys and values are built, then plain attention (equations 2, 4, 5, 9-11)."""
        key_value = rearrange(self.kv_b_proj(latent), "b t (h nv) -> b t h nv", h=self.heads)
        key_nope, value = key_value.split([self.nope, self.value], dim=-1)
        query = torch.cat([query_nope, query_rope], dim=-1)
        key = torch.cat([key_nope, repeat(key_rope, "b t r -> b t h r", h=self.heads)], dim=-1)
        return attention(query, key, value, self.scale, mask)

    def absorbed(
        self,
        query_nope: Float[Tensor, "b s h n"],
        query_rope: Float[Tensor, "b s h r"],
        latent: Float[Tensor, "b t c"],
        key_rope: Float[Tensor, "b t r"],
        mask: Bool[Tensor, "#b s t"] | None,
    ) -> Float[Tensor, "b s h v"]:
        """The same numbers without building keys or values: q (W_UK c) = (q W_UK) c, and sum(p W_UV c) = W_UV sum(p c).

        All heads read one latent per token, so memory traffic is that of multi-query attention.
        """
        weight = rearrange(self.kv_b_proj.weight, "(h nv) c -> h nv c", h=self.heads)
        up_key, up_value = weight.split([self.nope, self.value], dim=1)
        query_latent = einsum(query_nope, up_key, "b s h n, h n c -> b s h c")
        scores = einsum(query_latent, latent, "b s h c, b t c -> b h s t")
        scores = (scores + einsum(query_rope, key_rope, "b s h r, b t r -> b h s t")).float() * self.scale
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], -torch.inf)
        share = scores.softmax(dim=-1).type_as(latent)
        mixed_latent = einsum(share, latent, "b h s t, b t c -> b s h c")
        return einsum(mixed_latent, up_value, "b s h c, h v c -> b s h v")

    def _queries(
        self, x: Float[Tensor, "b s d"], turn: Complex[Tensor, "*b s pairs"]
    ) -> tuple[Float[Tensor, "b s h n"], Float[Tensor, "b s h r"]]:
        """Equations 6-9. The queries' rope part is rotated as the keys' is."""
        query = rearrange(self.q_proj(x), "b s (h nr) -> b s h nr", h=self.heads)
        query_nope, query_rope = query.split([self.nope, self.rope], dim=-1)
        return query_nope, rotate(query_rope, turn)

    def _latents(
        self, x: Float[Tensor, "b s d"], turn: Complex[Tensor, "*b s pairs"]
    ) -> tuple[Float[Tensor, "b s c"], Float[Tensor, "b s r"]]:
        """Equations 1 and 3: what a decoder caches."""
        latent, key_rope = self.kv_a_proj_with_mqa(x).split([self.kv_a_layernorm.weight.shape[0], self.rope], dim=-1)
        return self.kv_a_layernorm(latent), rotate(key_rope, turn)


def attention(
    query: Float[Tensor, "b s h q"],
    key: Float[Tensor, "b t h q"],
    value: Float[Tensor, "b t h v"],
    scale: float,
    mask: Bool[Tensor, "#b s t"] | None,
) -> Float[Tensor, "b s h v"]:
    """softmax(scale * query key^T) value; `mask` None means causal.

    Values are narrower than keys in MLA, and torch's kernel that never writes the s x t scores to memory wants equal
    widths: zeros are appended to the narrower one and cut off again. `dsv3 bench attention` prints what that gains.
    """
    width, dtype = value.shape[-1], value.dtype
    if query.device.type == "cpu":
        # torch's CPU kernel goes through BF16 backward at a third of its FP32 speed; FP32 in and out is also more exact.
        query, key, value = query.float(), key.float(), value.float()
    extra = query.shape[-1] - width
    if extra > 0:
        value = F.pad(value, (0, extra))
    elif extra < 0:
        query, key = F.pad(query, (0, -extra)), F.pad(key, (0, -extra))
    query, key, value = (rearrange(x, "b s h x -> b h s x") for x in (query, key, value))
    heads_mask = None if mask is None else mask[:, None]
    mixed = F.scaled_dot_product_attention(query, key, value, heads_mask, is_causal=mask is None, scale=scale)
    return rearrange(mixed[..., :width].to(dtype), "b h s v -> b s h v")
