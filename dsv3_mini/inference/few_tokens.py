"""The model arranged for passes of few tokens: the same numbers as `model/` gives, from fewer kernels.

A pass that reads one token of one row does so little arithmetic that it costs what its calls cost: each kernel has to
be asked for, and given its memory, whether it then multiplies ten numbers or ten thousand. `model/` is
written to be read, and to be quick where many tokens are read at once. Here the same equations stand with as few calls as
they can be had in, one token or a handful of a row at a time, after a cache:

    attention     always absorbed: all heads' queries meet one row of latents and rope keys, in one fused kernel, whose values
                  are the keys themselves. Where they are small, W_UK is multiplied into W_UQ before, and W_O into W_UV
    rotations     of queries and the new key together, from a table
    norms         x / sqrt(|x|^2 + d eps) * (w sqrt(d)): the root is the long side of a right-angled triangle, one call
    experts       one after the other those that are visited: `few_experts.py`

All is made anew for each text (`writing.py`): what was folded is as new as the model. `fits` says which models this stands for: one
whose parts are the package's own. Others (quantised, spread over processes, watched by hooks) are run as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from jaxtyping import Bool, Complex, Float, Int
from torch import Tensor, nn

from dsv3_mini.inference.cache import LatentCache
from dsv3_mini.inference.few_experts import FewVisits
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.model.attention import MultiHeadLatentAttention
from dsv3_mini.model.block import Block
from dsv3_mini.model.experts import GroupedExperts
from dsv3_mini.model.feed_forward import SwiGLU
from dsv3_mini.model.moe import MoE
from dsv3_mini.model.mtp import MTPModule
from dsv3_mini.model.norm import RMSNorm
from dsv3_mini.model.rope import rotations
from dsv3_mini.model.router import Router
from dsv3_mini.model.transformer import visible

PARTS = (
    DeepSeekV3, Block, MultiHeadLatentAttention, MoE, GroupedExperts, Router, SwiGLU, MTPModule, RMSNorm,
    nn.Linear, nn.Embedding, nn.ModuleList, nn.Sequential,
)  # fmt: skip
FOLDED = 2**18  # numbers at most in a layer's folded matrices: larger ones cost more to read than calls cost


def fits(model: DeepSeekV3) -> bool:
    """Whether all parts are the package's own and nobody watches them: then they may be computed here.

    (The latent has to be of even width: it passes through the rotation in pairs.)
    """
    return model.cfg.kv_lora_rank % 2 == 0 and all(
        type(part) in PARTS and not (part._forward_hooks or part._forward_pre_hooks) for part in model.modules()
    )


class FewTokens:
    """`main_states` and the MTP modules' states of a model that `fits`, for a few tokens of each row, after a cache."""

    @torch.no_grad()
    def __init__(self, model: DeepSeekV3) -> None:
        self.model, self.cfg = model, model.cfg
        self.layers = [_Layer(block) for block in model.layers]
        self.norm = _Norm(model.norm)
        self.mtp = [_Module(module) for module in model.mtp]
        weight = model.lm_head.weight
        self.table = torch.empty(0, device=weight.device)
        self.zero = torch.zeros((), dtype=weight.dtype, device=weight.device)
        self.hidden: dict[int, Float[Tensor, "1 1 sh t"]] = {}

    def absorbs(self, new: int, context: int) -> bool:
        """Whether so many new tokens are few: absorbed attention is what this is about."""
        return self.layers[0].attention.absorbs(new, context)

    def main_states(self, tokens: Int[Tensor, "b s"], cache: list[LatentCache]) -> Float[Tensor, "b s d"]:
        """The main model's states, after its final norm."""
        at = _Place(self, tokens, cache[0])
        x = F.embedding(tokens, self.model.embed_tokens.weight).flatten(0, 1)
        for layer, kept in zip(self.layers, cache, strict=True):
            x = layer(x, at, kept)
        return self.norm(x).view(at.rows, at.new, -1)

    def mtp_states(
        self,
        depth: int,
        tokens: Int[Tensor, "b s"],
        beside: Float[Tensor, "b s d"],
        cache: LatentCache,
        places: Sequence[int] | None = None,
    ) -> Float[Tensor, "b s_or_1 d"]:
        """Those of one MTP module (the first is 0), ready for the head; or only that at one place of each row.

        Of the other tokens the module then keeps latents and no more: they do not pass through its experts.
        """
        at, module = _Place(self, tokens, cache), self.mtp[depth]
        embedding = F.embedding(tokens, self.model.embed_tokens.weight)
        joined = torch.cat([module.enorm(embedding), module.hnorm(beside)], dim=-1)
        x = module.layer(F.linear(joined, module.join).flatten(0, 1), at, cache, places)
        return module.norm(x).view(at.rows, at.new if places is None else 1, -1)

    def turns(self, end: int) -> Complex[Tensor, "t pairs"]:
        """The rotations of the positions up to `end` at least, as (c + r) / 2 pairs: those of the latent part are by nothing.

        The table is made longer as texts get longer.
        """
        if end > len(self.table):
            turn = rotations(self.cfg, torch.arange(2 * end, device=self.table.device))
            self.table = torch.cat([turn.new_ones(2 * end, self.cfg.kv_lora_rank // 2), turn], dim=1)
        return self.table

    def causal(self, new: int, end: int) -> Float[Tensor, "1 1 sh t"]:
        """What `new` queries (a row for each head) may see of `end` keys, the last of them their own: 0, or -inf.

        Only the last columns have anything to hide, so every mask is the end of one that is long enough.
        """
        longest = self.hidden.get(new)
        if longest is None or longest.shape[-1] < end:
            queries = torch.arange(2 * end - new, 2 * end, device=self.zero.device)[None]
            longest = self.hidden[new] = self.mask(visible(queries, 2 * end))
        return longest[..., -end:]

    def mask(self, seen: Bool[Tensor, "#b s t"]) -> Float[Tensor, "#b 1 sh t"]:
        """As torch's attention adds it to the scores: the same for each head of a query."""
        seen = repeat(seen, "b s t -> b 1 (s h) t", h=self.cfg.num_attention_heads)
        return torch.where(seen, self.zero, -torch.inf)


def at_places(x: Float[Tensor, "b s d"], places: Sequence[int]) -> Float[Tensor, "b d"]:
    """Of each row the entry at its own place."""
    if len(set(places)) == 1:
        return x[:, places[0]]
    return x[torch.arange(len(x), device=x.device), torch.tensor(places, device=x.device)]


class _Place:
    """Where a pass's tokens stand, for all layers alike: their rotations, and which cached keys each may see."""

    def __init__(self, step: FewTokens, tokens: Int[Tensor, "b s"], cache: LatentCache) -> None:
        (self.rows, self.new), start = tokens.shape, cache.length
        end = start + self.new
        table = step.turns(end)
        self.mask: Float[Tensor, "#b 1 sh t"] | None = None
        if cache.even:
            turn = table[start:end]
            self.turn = (turn if self.rows == 1 else turn.repeat(self.rows, 1))[:, None]
            if self.new > 1:  # a single token may see all
                self.mask = step.causal(self.new, end)
        else:
            positions = cache.positions(self.new)
            self.turn = table[positions.flatten()][:, None]
            self.mask = step.mask(visible(positions, end))


class _Norm:
    """RMSNorm of `model/norm.py`, in FP32."""

    def __init__(self, norm: RMSNorm) -> None:
        width = norm.weight.shape[0]
        self.weight = norm.weight.detach().float() * width**0.5
        self.leg = torch.full((1,), (width * norm.eps) ** 0.5, device=norm.weight.device)

    def __call__(self, x: Float[Tensor, "*T d"]) -> Float[Tensor, "*T d"]:
        wide = x.float()
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        return (wide / torch.hypot(length, self.leg) * self.weight).type_as(x)


class _Layer:
    """A block: attention, then a dense or a sparse feed-forward."""

    def __init__(self, block: Block) -> None:
        self.attention = _Attention(block.self_attn)
        self.before, self.between = _Norm(block.input_layernorm), _Norm(block.post_attention_layernorm)
        self.feed = FewVisits(block.mlp) if isinstance(block.mlp, MoE) else _Dense(block.mlp)

    def __call__(
        self, x: Float[Tensor, "T d"], at: _Place, cache: LatentCache, places: Sequence[int] | None = None
    ) -> Float[Tensor, "T_or_b d"]:
        x = self.attention(self.before(x), at, cache, x)
        if places is not None:
            x = at_places(x.view(at.rows, at.new, -1), places)
        return self.feed(self.between(x), x)


class _Attention:
    """`MultiHeadLatentAttention.absorbed`, and what comes before and after it."""

    def __init__(self, layer: MultiHeadLatentAttention) -> None:
        self.absorbs, self.scale, self.heads = layer.absorbs, layer.scale, layer.heads
        self.latent, self.rope = layer.kv_b_proj.in_features, layer.rope
        compressed = isinstance(layer.q_proj, nn.Sequential)
        self.query_norm = _Norm(layer.q_proj.q_a_layernorm) if compressed else None
        self.query_width = layer.q_proj.q_a_proj.out_features if compressed else 0
        self.norm = _Norm(layer.kv_a_layernorm)
        self.products = _Folded(layer) if _Folded.size(layer) <= FOLDED else _Products(layer)

    def __call__(
        self, normed: Float[Tensor, "T d"], at: _Place, cache: LatentCache, x: Float[Tensor, "T d"]
    ) -> Float[Tensor, "T d"]:
        """x, and added to it what attention makes of `normed`."""
        down = self.products.down(normed)  # T (q + c + r)
        query_latent = normed if self.query_norm is None else self.query_norm(down[:, : self.query_width])
        latent = self.norm(down[:, self.query_width : -self.rope])
        # The new key stands beside the queries as one head more: all are turned at once, latent parts by nothing.
        rows = torch.cat([self.products.queries(query_latent), latent, down[:, -self.rope :]], dim=1)
        pairs = torch.view_as_complex(rows.float().view(len(x), self.heads + 1, -1, 2)) * at.turn
        turned = torch.view_as_real(pairs).flatten(2).type_as(x)  # T (h + 1) (c + r)
        kept = cache.append(turned[:, self.heads].view(at.rows, at.new, -1))[:, None]  # b 1 t (c + r)
        query = turned[:, : self.heads].reshape(at.rows, 1, at.new * self.heads, -1)
        mixed = F.scaled_dot_product_attention(query, kept, kept, at.mask, scale=self.scale)
        return self.products.add(x, mixed.reshape(len(x), -1))


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
        """x, and added to it what the heads' mixed latents say."""
        mixed = mixed.view(len(x), self.heads, -1)[..., : self.latent].transpose(0, 1)
        return torch.addmm(x, torch.bmm(mixed, self.up_value).transpose(0, 1).flatten(1), self.out)


class _Folded:
    """The same from three matrices: W_DQ beside W_DKV, W_UK behind W_UQ, and W_O behind W_UV.

    A few more multiplications, and fewer calls: worth it where the matrices are small.
    """

    def __init__(self, layer: MultiHeadLatentAttention) -> None:
        query_down, query_up = _query_weights(layer)
        key_down = layer.kv_a_proj_with_mqa.weight
        self.all_down = key_down if query_down is None else torch.cat([query_down, key_down])
        up_key, up_value = (weight.float() for weight in _key_value_weights(layer))
        query_nope, query_rope = rearrange(query_up, "(h nr) q -> h nr q", h=layer.heads).split(
            [layer.nope, layer.rope], dim=1
        )
        absorbed = einsum(query_nope.float(), up_key, "h n q, h n c -> h c q").type_as(query_rope)
        self.query = torch.cat([absorbed, query_rope], dim=1).flatten(0, 1)
        out = rearrange(layer.o_proj.weight, "d (h v) -> h v d", h=layer.heads)
        back = einsum(up_value, out.float(), "h v c, h v d -> h c d").type_as(out)
        self.back = F.pad(back, (0, 0, 0, layer.rope)).flatten(0, 1)  # zeros: a value has no rope part

    @staticmethod
    def size(layer: MultiHeadLatentAttention) -> int:
        """Numbers in the two folded matrices."""
        inputs = _query_weights(layer)[1].shape[1] + layer.o_proj.out_features
        return layer.heads * layer.kv_b_proj.in_features * inputs

    def down(self, normed: Float[Tensor, "T d"]) -> Float[Tensor, "T qcr"]:
        return F.linear(normed, self.all_down)

    def queries(self, query_latent: Float[Tensor, "T q"]) -> Float[Tensor, "T hcr"]:
        return F.linear(query_latent, self.query)

    def add(self, x: Float[Tensor, "T d"], mixed: Float[Tensor, "T hcr"]) -> Float[Tensor, "T d"]:
        return torch.addmm(x, mixed, self.back)


def _query_weights(layer: MultiHeadLatentAttention) -> tuple[Float[Tensor, "q d"] | None, Float[Tensor, "hnr q"]]:
    """W_DQ (none where queries are not compressed) and W_UQ."""
    if isinstance(layer.q_proj, nn.Sequential):
        return layer.q_proj.q_a_proj.weight, layer.q_proj.q_b_proj.weight
    return None, layer.q_proj.weight


def _key_value_weights(layer: MultiHeadLatentAttention) -> tuple[Float[Tensor, "h n c"], Float[Tensor, "h v c"]]:
    """W_UK and W_UV, head by head."""
    up = rearrange(layer.kv_b_proj.weight, "(h nv) c -> h nv c", h=layer.heads)
    return up[:, : layer.nope], up[:, layer.nope :]


class _Dense:
    """A SwiGLU."""

    def __init__(self, layer: SwiGLU) -> None:
        self.gate_up, self.down = layer.gate_up_proj.weight, layer.down_proj.weight.T

    def __call__(self, normed: Float[Tensor, "T d"], x: Float[Tensor, "T d"]) -> Float[Tensor, "T d"]:
        gate, up = F.linear(normed, self.gate_up).chunk(2, dim=-1)
        return torch.addmm(x, F.silu(gate) * up, self.down)


class _Module:
    """An MTP module."""

    def __init__(self, module: MTPModule) -> None:
        self.enorm, self.hnorm, self.norm = _Norm(module.enorm), _Norm(module.hnorm), _Norm(module.norm)
        self.join, self.layer = module.eh_proj.weight, _Layer(module.block)
