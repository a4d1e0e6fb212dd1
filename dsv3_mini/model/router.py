"""The gate of DeepSeekMoE: which experts a token visits, and how much each weighs (report equations 12-16).

    s    = sigmoid(W x)                        affinity, each expert on its own          (15)
    pick = top-k of s + b, in the best groups  the bias b chooses ...                    (16)
    gate = s[pick] / sum s[pick] * scale       ... and never weighs                      (13)

Everything here is FP32: affinities of neighbouring ranks differ by less than a BF16 step, and a rounding that swaps
two experts changes the output by far more than a rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange, reduce
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsv3_mini.config import ModelConfig


@dataclass(frozen=True)
class Routing:
    """One layer's routing. Shapes: scores [b s e], chosen [b s k] (best first by biased score), gates [b s k], load [e]."""

    layer: int
    scores: Float[Tensor, "b s e"]
    chosen: Int[Tensor, "b s k"]
    gates: Float[Tensor, "b s k"]
    load: Int[Tensor, " e"]

    def detach(self) -> Routing:
        return Routing(self.layer, self.scores.detach(), self.chosen, self.gates.detach(), self.load)


SCORING: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "softmax": lambda logits: logits.softmax(dim=-1),
}


class Router(nn.Module):
    """Scores experts, chooses k of them in at most `topk_group` groups, and gives their gate values."""

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.k, self.n_group, self.topk_group = cfg.num_experts_per_tok, cfg.n_group, cfg.topk_group
        self.score = SCORING[cfg.scoring_func]
        self.normalise, self.scaling = cfg.norm_topk_prob, cfg.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(cfg.n_routed_experts, cfg.hidden_size))
        # The bias is no parameter: no gradient reaches it, only the rule in train/balance.py moves it.
        bias = torch.zeros(cfg.n_routed_experts) if cfg.topk_method == "noaux_tc" else None
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, x: Float[Tensor, "b s d"]) -> Routing:
        scores = self.score(x.float() @ self.weight.float().T)
        preference = scores.detach()
        if self.e_score_correction_bias is not None:
            preference = preference + self.e_score_correction_bias
        if self.topk_group < self.n_group:
            preference = limit_to_groups(preference, self.n_group, self.topk_group)
        chosen = preference.topk(self.k, dim=-1).indices
        gates = scores.gather(-1, chosen)
        if self.normalise:
            gates = gates / (reduce(gates, "b s k -> b s 1", "sum") + 1e-20)
        return Routing(self.layer, scores, chosen, gates * self.scaling, expert_load(chosen, scores.shape[-1]))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """`model.to(torch.bfloat16)` must not round the bias: its steps (gamma 0.001) would vanish."""
        before = self.e_score_correction_bias
        super()._apply(fn, recurse)
        after = self.e_score_correction_bias
        if after is not None and after.dtype != torch.float32:
            self.e_score_correction_bias = before.to(after.device)
        return self


def limit_to_groups(preference: Float[Tensor, "b s e"], n_group: int, topk_group: int) -> Float[Tensor, "b s e"]:
    """Keep the experts of the best `topk_group` groups, and put the others at -inf.

    Groups are experts of one node; a token then travels to few nodes (report section 2.1.2, node-limited routing).
    A group's rank is the sum of its two best. -inf, not 0: where biases make all preferences negative, 0 would win.
    """
    grouped = rearrange(preference, "b s (g m) -> b s g m", g=n_group)
    rank = reduce(grouped.topk(2, dim=-1).values, "b s g two -> b s g", "sum")
    best = rank.topk(topk_group, dim=-1).indices
    outside = torch.ones_like(rank, dtype=torch.bool).scatter(-1, best, False)
    return rearrange(grouped.masked_fill(outside[..., None], -torch.inf), "b s g m -> b s (g m)")


def expert_load(chosen: Int[Tensor, "b s k"], n_experts: int) -> Int[Tensor, " e"]:
    """How many of the choices fell on each expert."""
    load = torch.zeros(n_experts, dtype=torch.long, device=chosen.device)
    picks = chosen.flatten()
    return load.scatter_add(0, picks, torch.ones_like(picks))
