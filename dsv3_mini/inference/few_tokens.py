"""The model arranged for passes of few tokens: the same numbers as `model/` gives, from fewer kernels.

A pass that reads one token of one row does so little arithmetic that it costs what its calls cost: each kernel has to
be asked for, and given its memory, whether it then multiplies ten numbers or ten thousand. `model/` is
written to be read, and to be quick where many tokens are read at once. Here the same equations stand with as few calls as
they can be had in, one token or a handful of a row at a time, after a cache:

    attention     always absorbed: all heads' queries meet one row of latents and rope keys, in one fused kernel, whose values
                  are the keys themselves (the rope part of the result is dropped)
    rotations     of queries and keys together, from a table
    norms         x / sqrt(|x|^2 + d eps) * (w sqrt(d)): the root is the long side of a right-angled triangle, one call
    experts       where few are visited, and small, their weights are brought side by side, always to the same place in
                  memory: then two products are all of a token's experts. Else as in `model/experts.py`

No weight is copied or changed, so there is nothing to keep up to date. `fits` says which models this stands for: one
whose parts are the package's own. Others (quantised, spread over processes, watched by hooks) are run as they are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Bool, Complex, Float, Int
from torch import Tensor, nn

from dsv3_mini.inference.cache import LatentCache
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.model.attention import MultiHeadLatentAttention
from dsv3_mini.model.block import Block
from dsv3_mini.model.experts import GroupedExperts
from dsv3_mini.model.feed_forward import SwiGLU
from dsv3_mini.model.moe import MoE
from dsv3_mini.model.mtp import MTPModule
from dsv3_mini.model.norm import RMSNorm
from dsv3_mini.model.rope import rotations
from dsv3_mini.model.router import Router, expert_load
from dsv3_mini.model.transformer import visible

PARTS = (
    DeepSeekV3, Block, MultiHeadLatentAttention, MoE, GroupedExperts, Router, SwiGLU, MTPModule, RMSNorm,
    nn.Linear, nn.Embedding, nn.ModuleList, nn.Sequential,
)  # fmt: skip
GATHERED = 2**19  # numbers of the experts' weights at most that are brought side by side: 2 MB stay near a core


def fits(model: DeepSeekV3) -> bool:
    """Whether all parts are the package's own and nobody watches them: then they may be computed here."""
    return all(type(part) in PARTS and not (part._forward_hooks or part._forward_pre_hooks) for part in model.modules())


class FewTokens:
    """`main_states` and the MTP modules' states of a model that `fits`, for a few tokens of each row, after a cache."""

    @torch.no_grad()
    def __init__(self, model: DeepSeekV3) -> None:
        self.model, self.cfg = model, model.cfg
        self.layers = [_Layer(block) for block in model.layers]
        self.norm = _Norm(model.norm)
        self.mtp = [_Module(module) for module in model.mtp]
        weight = model.lm_head.weight
        self.table = rotations(self.cfg, torch.arange(0, device=weight.device))
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
        self, depth: int, tokens: Int[Tensor, "b s"], beside: Float[Tensor, "b s d"], cache: LatentCache
    ) -> Float[Tensor, "b s d"]:
        """Those of one MTP module (the first is 0), ready for the head."""
        at, module = _Place(self, tokens, cache), self.mtp[depth]
        embedding = F.embedding(tokens, self.model.embed_tokens.weight)
        joined = torch.cat([module.enorm(embedding), module.hnorm(beside)], dim=-1)
        x = module.layer(F.linear(joined, module.join).flatten(0, 1), at, cache)
        return module.norm(x).view(at.rows, at.new, -1)

    def turns(self, end: int) -> Complex[Tensor, "t pairs"]:
        """The rotations of the positions up to `end` at least: a table that is made longer as texts get longer."""
        if end > len(self.table):
            self.table = rotations(self.cfg, torch.arange(2 * end, device=self.table.device))
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
        self.feed = _Mixture(block.mlp) if isinstance(block.mlp, MoE) else _Dense(block.mlp)

    def __call__(self, x: Float[Tensor, "T d"], at: _Place, cache: LatentCache) -> Float[Tensor, "T d"]:
        x = self.attention(self.before(x), at, cache, x)
        return self.feed(self.between(x), x)


class _Attention:
    """`MultiHeadLatentAttention.absorbed`, and what comes before and after it."""

    def __init__(self, layer: MultiHeadLatentAttention) -> None:
        self.absorbs, self.scale = layer.absorbs, layer.scale
        self.heads, self.nope, self.rope = layer.heads, layer.nope, layer.rope
        self.latent = layer.kv_b_proj.in_features
        compressed = isinstance(layer.q_proj, nn.Sequential)
        self.query_down = layer.q_proj.q_a_proj.weight if compressed else None
        self.query_norm = _Norm(layer.q_proj.q_a_layernorm) if compressed else None
        self.query_up = layer.q_proj.q_b_proj.weight if compressed else layer.q_proj.weight
        self.down, self.norm = layer.kv_a_proj_with_mqa.weight, _Norm(layer.kv_a_layernorm)
        up = rearrange(layer.kv_b_proj.weight, "(h nv) c -> h nv c", h=self.heads)
        self.up_key, self.up_value = up[:, : self.nope], up[:, self.nope :].transpose(1, 2)
        self.out = layer.o_proj.weight.T

    def __call__(
        self, normed: Float[Tensor, "T d"], at: _Place, cache: LatentCache, x: Float[Tensor, "T d"]
    ) -> Float[Tensor, "T d"]:
        """x, and added to it what attention makes of `normed`."""
        query_latent = normed if self.query_down is None else self.query_norm(F.linear(normed, self.query_down))
        query = F.linear(query_latent, self.query_up).view(len(x), self.heads, -1)  # T h (n + r)
        down = F.linear(normed, self.down)  # T (c + r)
        roped = torch.cat([query[..., self.nope :], down[:, None, self.latent :]], dim=1)  # the key as one head more
        pairs = torch.view_as_complex(roped.float().view(len(x), self.heads + 1, -1, 2))
        roped = torch.view_as_real(pairs * at.turn).flatten(-2).type_as(normed)
        new = torch.cat([self.norm(down[:, : self.latent]), roped[:, -1]], dim=-1)
        kept = cache.append(new.view(at.rows, at.new, -1))[:, None]  # b 1 t (c + r)
        query = torch.cat(
            [torch.bmm(query[..., : self.nope].transpose(0, 1), self.up_key).transpose(0, 1), roped[:, :-1]], dim=-1
        )
        query = query.view(at.rows, 1, at.new * self.heads, -1)
        mixed = F.scaled_dot_product_attention(query, kept, kept, at.mask, scale=self.scale)
        mixed = mixed.view(len(x), self.heads, -1)[..., : self.latent].transpose(0, 1)  # h T c
        heads = torch.bmm(mixed, self.up_value).transpose(0, 1).flatten(1)
        return torch.addmm(x, heads, self.out)


class _Dense:
    """A SwiGLU."""

    def __init__(self, layer: SwiGLU) -> None:
        self.gate_up, self.down = layer.gate_up_proj.weight, layer.down_proj.weight.T

    def __call__(self, normed: Float[Tensor, "T d"], x: Float[Tensor, "T d"]) -> Float[Tensor, "T d"]:
        gate, up = F.linear(normed, self.gate_up).chunk(2, dim=-1)
        return torch.addmm(x, F.silu(gate) * up, self.down)


class _Mixture:
    """DeepSeekMoE: shared experts, and routed ones."""

    def __init__(self, layer: MoE) -> None:
        self.shared = _Dense(layer.shared_experts) if layer.shared_experts is not None else None
        self.router, self.experts = layer.gate, layer.experts
        gate_up, down = layer.experts.gate_up_proj, layer.experts.down_proj
        self.n_experts, self.size = len(down), gate_up[0].numel() + down[0].numel()
        self.score, self.weight = layer.gate.score, layer.gate.weight.detach().float()
        self.bias = layer.gate.e_score_correction_bias
        self.gate_up, self.down = gate_up, down
        self.room: tuple[Tensor, Tensor] | None = None

    def __call__(self, normed: Float[Tensor, "T d"], x: Float[Tensor, "T d"]) -> Float[Tensor, "T d"]:
        if self.shared is not None:
            x = self.shared(normed, x)
        chosen, gates = self.route(normed)
        tokens, k = chosen.shape
        if tokens * k * self.size > GATHERED:
            return x + self.experts(normed, chosen, gates, expert_load(chosen[None], self.n_experts))
        gate_up, down = self.brought(chosen.flatten())
        gate_up = gate_up.view(tokens, -1, normed.shape[-1])  # T (k 2f) d
        gate, up = torch.bmm(gate_up, normed[..., None]).view(tokens * k, -1).chunk(2, dim=-1)
        inner = (F.silu(gate) * up).mul_(gates.view(-1, 1))
        routed = torch.bmm(inner[:, None], down.transpose(1, 2))  # (T k) 1 d
        return x + routed.view(tokens, k, -1).sum(dim=1)

    def brought(self, visited: Int[Tensor, " Tk"]) -> tuple[Float[Tensor, "Tk 2f d"], Float[Tensor, "Tk d f"]]:
        """Copies of the visited experts' matrices. The place for them is taken once: for new memory, the system's
        first writes to it cost as much as the products."""
        if self.room is None or len(self.room[0]) != len(visited):
            self.room = tuple(each.new_empty(len(visited), *each.shape[1:]) for each in (self.gate_up, self.down))
        gate_up, down = self.room
        return (
            torch.index_select(self.gate_up, 0, visited, out=gate_up),
            torch.index_select(self.down, 0, visited, out=down),
        )

    def route(self, normed: Float[Tensor, "T d"]) -> tuple[Int[Tensor, "T k"], Float[Tensor, "T k"]]:
        """The choices and gates of `model/router.py`, in FP32."""
        rule = self.router
        scores = self.score(F.linear(normed.float(), self.weight))
        preference = scores if self.bias is None else scores + self.bias
        if rule.topk_group < rule.n_group:
            grouped = preference.view(len(normed), rule.n_group, -1)
            rank = grouped.topk(2, dim=-1).values.sum(dim=-1)
            outside = torch.full_like(rank, -torch.inf)
            outside.scatter_(1, rank.topk(rule.topk_group, dim=-1).indices, 0.0)
            preference = (grouped + outside[..., None]).flatten(1)
        chosen = preference.topk(rule.k, dim=-1).indices
        gates = scores.gather(-1, chosen)
        if rule.normalise:
            gates = gates / (gates.sum(dim=-1, keepdim=True) + 1e-20)
        return chosen, gates * rule.scaling


class _Module:
    """An MTP module."""

    def __init__(self, module: MTPModule) -> None:
        self.enorm, self.hnorm, self.norm = _Norm(module.enorm), _Norm(module.hnorm), _Norm(module.norm)
        self.join, self.layer = module.eh_proj.weight, _Layer(module.block)
