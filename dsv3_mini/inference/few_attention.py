"""Absorbed attention for a few tokens: the equations of `model/attention.py` from few calls.

All heads' queries meet one row of latents and rope keys, in one fused kernel, whose values are the keys themselves. Where
they are small, W_UK is multiplied into W_UQ before, and W_O into W_UV: a layer is then three products and the kernel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Complex, Float
from torch import Tensor, nn

from dsv3_mini.inference.cache import LatentCache
from dsv3_mini.inference.few_norm import FewNorm, wide_of
from dsv3_mini.model.attention import MultiHeadLatentAttention

FOLDED = 2**18  # numbers at most in a layer's folded matrices: larger ones cost more to read than calls cost


class FewAttention:
    """`MultiHeadLatentAttention.absorbed`, and what comes before and after it."""

    def __init__(self, layer: MultiHeadLatentAttention) -> None:
        self.absorbs, self.scale, self.heads = layer.absorbs, layer.scale, layer.heads
        self.latent, self.rope = layer.kv_b_proj.in_features, layer.rope
        compressed = isinstance(layer.q_proj, nn.Sequential)
        self.query_norm = FewNorm(layer.q_proj.q_a_layernorm) if compressed else None
        self.widths = [layer.q_proj.q_a_proj.out_features if compressed else 0, self.latent, self.rope]
        self.norm = FewNorm(layer.kv_a_layernorm)
        self.products = _Folded(layer) if _Folded.size(layer) <= FOLDED else _Products(layer)

    def __call__(
        self,
        normed: Float[Tensor, "T d"],
        turn: Complex[Tensor, "T 1 pairs"],
        mask: Float[Tensor, "#b 1 sh t"] | None,
        cache: LatentCache,
        x: Float[Tensor, "T d"],
    ) -> Float[Tensor, "T d"]:
        """x, to which is added, in its place, what attention makes of `normed`."""
        query_down, latent, rope = self.products.down(normed).split_with_sizes(self.widths, 1)
        query_latent = normed if self.query_norm is None else self.query_norm(query_down)
        # The new key stands beside the queries as one head more: all are turned at once, latent parts by nothing.
        joined = torch.cat([self.products.queries(query_latent), self.norm(latent), rope], dim=1)  # T (h + 1) (c + r)
        wide, (tokens, rows), width = wide_of(joined), (x.shape[0], len(cache.lengths)), self.latent + self.rope
        torch.view_as_complex(wide.view(tokens, self.heads + 1, -1, 2)).mul_(turn)
        turned = joined if wide is joined else wide.type_as(x)
        kept = cache.append(turned[:, -width:].view(rows, -1, width))[:, None]  # b 1 t (c + r)
        query = turned[:, :-width].reshape(rows, 1, -1, width)  # b 1 (s h) (c + r)
        mixed = F.scaled_dot_product_attention(query, kept, kept, mask, scale=self.scale)
        return self.products.add(x, mixed.reshape(tokens, -1))


class _Products:
    """The matrices of an attention layer, one product after the other."""

    def __init__(self, layer: MultiHeadLatentAttention) -> None:
        self.heads, self.nope, self.latent = layer.heads, layer.nope, layer.kv_b_proj.in_features
        self.query_down, self.query_up = _query_weights(layer)
        self.key_down = layer.kv_a_proj_with_mqa.weight
        self.up_key, up_value = _key_value_weights(layer)
        self.up_value, self.out = up_value.transpose(1, 2), layer.o_proj.weight.T

    def down(self, normed: Float[Tensor, "T d"]) -> Float[Tensor, "T qcr"]:
        """What queries are made of (nothing where they are not compressed), the latent and the rope key, side by side."""
        key = F.linear(normed, self.key_down)
        return key if self.query_down is None else torch.cat([F.linear(normed, self.query_down), key], dim=1)

    def queries(self, query_latent: Float[Tensor, "T q"]) -> Float[Tensor, "T hcr"]:
        """All heads' queries, as they meet latents and rope keys."""
        query = F.linear(query_latent, self.query_up).view(len(query_latent), self.heads, -1)
        absorbed = torch.bmm(query[..., : self.nope].transpose(0, 1), self.up_key).transpose(0, 1)
        return torch.cat([absorbed, query[..., self.nope :]], dim=-1).flatten(1)

    def add(self, x: Float[Tensor, "T d"], mixed: Float[Tensor, "T hcr"]) -> Float[Tensor, "T d"]:
        """x, to which is added what the heads' mixed latents say."""
        mixed = mixed.view(len(x), self.heads, -1)[..., : self.latent].transpose(0, 1)
        return x.addmm_(torch.bmm(mixed, self.up_value).transpose(0, 1).flatten(1), self.out)


class _Folded:
    """The same from three matrices: W_DQ beside W_DKV, W_UK behind W_UQ, and W_O behind W_UV.

    A few more multiplications, and fewer calls: worth it where the matrices are small.
    """

    def __init__(self, layer: MultiHeadLatentAttention) -> None:
        query_down, query_up = _query_weights(layer)
        key_down = layer.kv_a_proj_with_mqa.weight
        self.all_down = (key_down if query_down is None else torch.cat([query_down, key_down])).T.contiguous()
        up_key, up_value = (weight.float() for weight in _key_value_weights(layer))
        query_nope, query_rope = rearrange(query_up, "(h nr) q -> h nr q", h=layer.heads).split(
            [layer.nope, layer.rope], dim=1
        )
        absorbed = einsum(query_nope.float(), up_key, "h n q, h n c -> h c q").type_as(query_rope)
        self.query = torch.cat([absorbed, query_rope], dim=1).flatten(0, 1).T.contiguous()
        out = rearrange(layer.o_proj.weight, "d (h v) -> h v d", h=layer.heads)
        back = einsum(up_value, out.float(), "h v c, h v d -> h c d").type_as(out)
        self.back = F.pad(back, (0, 0, 0, layer.rope)).flatten(0, 1)  # zeros: a value has no rope part

    @staticmethod
    def size(layer: MultiHeadLatentAttention) -> int:
        """Numbers in the two folded matrices."""
        inputs = _query_weights(layer)[1].shape[1] + layer.o_proj.out_features
        return layer.heads * layer.kv_b_proj.in_features * inputs

    def down(self, normed: Float[Tensor, "T d"]) -> Float[Tensor, "T qcr"]:
        return torch.mm(normed, self.all_down)

    def queries(self, query_latent: Float[Tensor, "T q"]) -> Float[Tensor, "T hcr"]:
        return torch.mm(query_latent, self.query)

    def add(self, x: Float[Tensor, "T d"], mixed: Float[Tensor, "T hcr"]) -> Float[Tensor, "T d"]:
        return x.addmm_(mixed, self.back)


def _query_weights(layer: MultiHeadLatentAttention) -> tuple[Float[Tensor, "q d"] | None, Float[Tensor, "hnr q"]]:
    """W_DQ (none where queries are not compressed) and W_UQ."""
    if isinstance(layer.q_proj, nn.Sequential):
        return layer.q_proj.q_a_proj.weight, layer.q_proj.q_b_proj.weight
    return None, layer.q_proj.weight


def _key_value_weights(layer: MultiHeadLatentAttention) -> tuple[Float[Tensor, "h n c"], Float[Tensor, "h v c"]]:
    """W_UK and W_UV, head by head."""
    up = rearrange(layer.kv_b_proj.weight, "(h nv) c -> h nv c", h=layer.heads)
    return up[:, : layer.nope], up[:, layer.nope :]
