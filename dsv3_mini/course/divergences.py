"""Other ways to do it: where report and released code differ, and what people get wrong, made on a copy of a model.

A comparison of two models proves what its weights can show. `wake` gives a model weights that hide nothing, `DIVERGENCES`
are models that are wrong in one place, and `largest_change` says how much of it the logits show:

    model = wake(DeepSeekV3(cfg))
    largest_change(model, "gate values contain the bias", tokens)    # 0.5 or so: seen; 0.0 on a fresh model: not seen

Where a rule stands in the code, a subclass does it otherwise. Where the rule is about which number is which (RoPE's pairs,
the order in which MTP's input is joined), the weights are exchanged: reading right numbers in a wrong order and wrong
numbers in the right order are the same thing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from einops import rearrange, reduce, repeat
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn

from dsv3_mini.model import DeepSeekV3
from dsv3_mini.model.attention import MultiHeadLatentAttention
from dsv3_mini.model.norm import RMSNorm
from dsv3_mini.model.router import Router, Routing, expert_load


@torch.no_grad()
def wake(model: DeepSeekV3, seed: int = 0) -> DeepSeekV3:
    """Weights in which every rule shows: norms that are not one, decided gates, biases that are negative and spread.

    Changes the model in place and returns it. Made for models whose matrices are large enough (std near 1/sqrt(width)).
    """
    random = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.weight.uniform_(0.5, 1.5, generator=random)
        if isinstance(module, Router):
            module.weight.mul_(4)
            if module.e_score_correction_bias is not None:
                module.e_score_correction_bias.normal_(-0.8, 0.2, generator=random)
    return model


@torch.no_grad()
def largest_change(model: DeepSeekV3, name: str, tokens: Int[Tensor, "b s"]) -> float:
    """How far the logits of `model` move when it is done the other way: the largest change, over the largest logit.

    The main logits and those of MTP are measured each for itself; the larger of them counts.

    Args:
        name: one of DIVERGENCES.
    """
    right, wrong = model(tokens), altered(model, name)(tokens)
    pairs = zip([right.logits, *right.mtp_logits], [wrong.logits, *wrong.mtp_logits], strict=True)
    return max(float((after - before).abs().max() / before.abs().max()) for before, after in pairs)


def altered(model: DeepSeekV3, name: str) -> DeepSeekV3:
    """A copy of `model` that does one thing otherwise; `name` is one of DIVERGENCES."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        DIVERGENCES[name](other)
    return other


# ---- the gate ----------------------------------------------------------------------------------------------------------


class OtherRouter(Router):
    """The gate with its rules as switches. As they stand here it is the package's own."""

    precision = torch.float32
    groups_see_the_bias = True
    gates_see_the_bias = False
    outside = -torch.inf  # the preference for experts of other groups

    def forward(self, x: Float[Tensor, "b s d"]) -> Routing:
        scores = self.score(x.to(self.precision) @ self.weight.to(self.precision).T).float()
        bias = self.e_score_correction_bias
        biased = scores if bias is None else scores + bias
        preference = biased.masked_fill(~self._inside(biased if self.groups_see_the_bias else scores), self.outside)
        chosen = preference.topk(self.k, dim=-1).indices
        gates = (biased if self.gates_see_the_bias else scores).gather(-1, chosen)
        if self.normalise:
            gates = gates / (reduce(gates, "b s k -> b s 1", "sum") + 1e-20)
        return Routing(self.layer, scores, chosen, gates * self.scaling, expert_load(chosen, scores.shape[-1]))

    def _inside(self, ranked: Float[Tensor, "b s e"]) -> Tensor:
        """True for the experts of the best groups."""
        grouped = rearrange(ranked, "b s (g m) -> b s g m", g=self.n_group)
        if self.topk_group == self.n_group:
            return torch.ones_like(ranked, dtype=torch.bool)
        rank = reduce(grouped.topk(2, dim=-1).values, "b s g two -> b s g", "sum")
        best = torch.zeros_like(rank, dtype=torch.bool).scatter(-1, rank.topk(self.topk_group, dim=-1).indices, True)
        return repeat(best, "b s g -> b s (g m)", m=grouped.shape[-1])


class AffinityRanksGroups(OtherRouter):
    groups_see_the_bias = False


class BiasWeighs(OtherRouter):
    gates_see_the_bias = True


class ZeroOutside(OtherRouter):
    outside = 0.0


class Bf16Gate(OtherRouter):
    precision = torch.bfloat16


def _gate(kind: type[OtherRouter]) -> Callable[[DeepSeekV3], None]:
    def change(model: DeepSeekV3) -> None:
        for module in model.modules():
            if isinstance(module, Router):
                module.__class__ = kind

    return change


def _no_scaling(model: DeepSeekV3) -> None:
    for module in model.modules():
        if isinstance(module, Router):
            module.scaling = 1.0


# ---- attention ---------------------------------------------------------------------------------------------------------


class UnturnedQueries(MultiHeadLatentAttention):
    """Keys are turned by their position, queries are not."""

    def _queries(
        self, x: Float[Tensor, "b s d"], turn: Complex[Tensor, "*b s pairs"]
    ) -> tuple[Float[Tensor, "b s h n"], Float[Tensor, "b s h r"]]:
        return super()._queries(x, torch.ones_like(turn))


def _attentions(model: DeepSeekV3) -> list[MultiHeadLatentAttention]:
    return [module for module in model.modules() if isinstance(module, MultiHeadLatentAttention)]


def _query_rows(attention: MultiHeadLatentAttention) -> Float[Tensor, "h nr i"]:
    """A view of the last query projection, head by head."""
    last = attention.q_proj[-1] if isinstance(attention.q_proj, nn.Sequential) else attention.q_proj
    return last.weight.view(attention.heads, attention.nope + attention.rope, -1)


def _pairs_apart(model: DeepSeekV3) -> None:
    """RoPE turns dimension i with i + r/2, on weights made for neighbours: the same as neighbours on exchanged rows."""
    for attention in _attentions(model):
        key = attention.kv_a_proj_with_mqa.weight[-attention.rope :]
        key.copy_(rearrange(key.clone(), "(two p) i -> (p two) i", two=2))
        query = _query_rows(attention)[:, attention.nope :]
        query.copy_(rearrange(query.clone(), "h (two p) i -> h (p two) i", two=2))


def _queries_unturned(model: DeepSeekV3) -> None:
    for attention in _attentions(model):
        attention.__class__ = UnturnedQueries


def _two_roots(model: DeepSeekV3) -> None:
    """The part without position over sqrt(n) and the turned one over sqrt(r), not their sum over sqrt(n + r)."""
    for attention in _attentions(model):
        whole, rows = attention.nope + attention.rope, _query_rows(attention)
        rows[:, : attention.nope].mul_((whole / attention.nope) ** 0.5)
        rows[:, attention.nope :].mul_((whole / attention.rope) ** 0.5)


def _no_mscale(model: DeepSeekV3) -> None:
    for attention in _attentions(model):
        attention.scale = model.cfg.qk_head_dim**-0.5


# ---- multi-token prediction --------------------------------------------------------------------------------------------


def _state_first(model: DeepSeekV3) -> None:
    for module in model.mtp:
        weight = module.eh_proj.weight
        weight.copy_(torch.cat(weight.chunk(2, dim=1)[::-1], dim=1))


def _no_head_norm(model: DeepSeekV3) -> None:
    for module in model.mtp:
        module.norm = nn.Identity()


# name -> what makes a model so. The order is that of the lesson: gate, attention, MTP.
DIVERGENCES: dict[str, Callable[[DeepSeekV3], None]] = {
    "gate values not multiplied": _no_scaling,
    "groups ranked without the bias": _gate(AffinityRanksGroups),
    "other groups at 0, not -inf": _gate(ZeroOutside),
    "gate values contain the bias": _gate(BiasWeighs),
    "gate computed in BF16": _gate(Bf16Gate),
    "RoPE pairs i with i + r/2": _pairs_apart,
    "queries not turned": _queries_unturned,
    "a root for each part": _two_roots,
    "no YaRN factor on the softmax": _no_mscale,
    "MTP joins state, then embedding": _state_first,
    "MTP without its last norm": _no_head_norm,
}
