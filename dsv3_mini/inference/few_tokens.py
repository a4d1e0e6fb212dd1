"""The model arranged for passes of few tokens: the same numbers as `model/` gives, from fewer kernels.

A pass that reads one token of one row does so little arithmetic that it costs what its calls cost: each kernel has to
be asked for, and given its memory, whether it then multiplies ten numbers or ten thousand. `model/` is
written to be read, and to be quick where many tokens are read at once. Here the same equations stand with as few calls as
they can be had in, one token or a handful of a row at a time, after a cache:

    attention     always absorbed: `few_attention.py`
    rotations     of queries and the new key together, from a table
    norms         in four calls: `few_norm.py`
    experts       one after the other those that are visited: `few_experts.py`

The states of the tokens are one piece of memory from the first layer to the last: what a layer has to add, it adds there.

All is made anew for each text (`writing.py`): what was folded is as new as the model. `fits` says which models this stands for: one
whose parts are the package's own. Others (quantised, spread over processes, watched by hooks) are run as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import repeat
from jaxtyping import Bool, Complex, Float, Int
from torch import Tensor, nn

from dsv3_mini.inference.cache import LatentCache
from dsv3_mini.inference.few_attention import FewAttention
from dsv3_mini.inference.few_experts import FewVisits
from dsv3_mini.inference.few_norm import FewNorm
from dsv3_mini.inference.few_product import FewProduct
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
        self.norm = FewNorm(model.norm)
        self.mtp = [_Module(module) for module in model.mtp]
        weight = model.lm_head.weight
        self.head = FewProduct(weight)
        self.table = torch.empty(0, device=weight.device)
        self.zero = torch.zeros((), dtype=weight.dtype, device=weight.device)
        self.hidden: dict[int, Float[Tensor, "1 1 sh t"]] = {}

    def absorbs(self, new: int, context: int) -> bool:
        """Whether so many new tokens are few: absorbed attention is what this is about."""
        return self.layers[0].attention.absorbs(new, context)

    def main_states(self, tokens: Int[Tensor, "b s"], cache: list[LatentCache]) -> Float[Tensor, "b s d"]:
        """The main model's states, after its final norm."""
        at = _Place(self, tokens, cache[0])
        x = F.embedding(tokens.flatten(), self.model.embed_tokens.weight)
        for layer, kept in zip(self.layers, cache, strict=True):
            x = layer(x, at, kept)
        return self.norm(x).view(at.rows, at.new, -1)

    def logits(self, states: Float[Tensor, "b s d"]) -> Float[Tensor, "b s v"]:
        """What the head says, in FP32."""
        return self.head(states.flatten(0, 1)).view(*states.shape[:2], -1).float()

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
        beside = beside.flatten(0, 1)
        embedding = F.embedding(tokens.flatten(), self.model.embed_tokens.weight)
        pairs = torch.cat([embedding, beside], dim=1).view(len(beside), 2, -1)
        x = module.layer(torch.mm(module.pair_norm(pairs).flatten(1), module.join), at, cache, places)
        return module.norm(x).view(at.rows, at.new if places is None else 1, -1)

    def turns(self, end: int) -> Complex[Tensor, "t 1 pairs"]:
        """The rotations of the positions up to `end` at least, as (c + r) / 2 pairs: those of the latent part are by nothing.

        The table is made longer as texts get longer. The empty dimension is the heads': all are turned alike.
        """
        if end > self.table.shape[0]:
            turn = rotations(self.cfg, torch.arange(2 * end, device=self.table.device))
            self.table = torch.cat([turn.new_ones(2 * end, self.cfg.kv_lora_rank // 2), turn], dim=1)[:, None]
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
            self.turn = turn if self.rows == 1 else turn.repeat(self.rows, 1, 1)
            if self.new > 1:  # a single token may see all
                self.mask = step.causal(self.new, end)
        else:
            positions = cache.positions(self.new)
            self.turn = table[positions.flatten()]
            self.mask = step.mask(visible(positions, end))


class _Layer:
    """A block: attention, then a dense or a sparse feed-forward."""

    def __init__(self, block: Block) -> None:
        self.attention = FewAttention(block.self_attn)
        self.before, self.between = FewNorm(block.input_layernorm), FewNorm(block.post_attention_layernorm)
        self.feed = FewVisits(block.mlp) if isinstance(block.mlp, MoE) else _Dense(block.mlp)

    def __call__(
        self, x: Float[Tensor, "T d"], at: _Place, cache: LatentCache, places: Sequence[int] | None = None
    ) -> Float[Tensor, "T_or_b d"]:
        x = self.attention(self.before(x), at.turn, at.mask, cache, x)
        if places is not None:
            x = at_places(x.view(at.rows, at.new, -1), places)
        return self.feed(self.between(x), x)


class _Dense:
    """A SwiGLU."""

    def __init__(self, layer: SwiGLU) -> None:
        self.gate_up, self.down = FewProduct(layer.gate_up_proj.weight), FewProduct(layer.down_proj.weight)

    def __call__(self, normed: Float[Tensor, "T d"], x: Float[Tensor, "T d"]) -> Float[Tensor, "T d"]:
        gate, up = self.gate_up(normed).chunk(2, dim=-1)
        return self.down.add(x, F.silu(gate).mul_(up))


class _Module:
    """An MTP module. The norms of a token's embedding and of the state beside it are one, with two rows of weights."""

    def __init__(self, module: MTPModule) -> None:
        self.pair_norm, self.norm = FewNorm(module.enorm, module.hnorm), FewNorm(module.norm)
        self.join, self.layer = module.eh_proj.weight.T, _Layer(module.block)
