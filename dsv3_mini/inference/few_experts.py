"""DeepSeekMoE for a few tokens: one visited expert after the other.

A handful of tokens visits few experts, and each is two small products. Sorting the tokens by expert, as `model/experts.py`
does for many, would cost more than all of the products; so which experts are visited is found in plain Python, and each of
them reads *all* of the tokens: a token that did not choose it weighs 0, and a row more in a product costs next to nothing.

    4 tokens, k = 2         expert 3    expert 7    expert 1
    gates of token a          0.8         0.2          0
                   b           0          0.5         0.5      ...

The shared experts are visited by every token with a gate of 1.
"""

from __future__ import annotations

from operator import add

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dsv3_mini.inference.all_experts import AllExperts, split_shared
from dsv3_mini.inference.few_norm import wide_of
from dsv3_mini.model.moe import MoE
from dsv3_mini.model.router import expert_load

FEW = 6  # tokens: with more, most of the experts are visited, and `model/experts.py` is quicker


class FewVisits:
    """A sparse feed-forward: `mixture(normed, x)` is x, to which is added, in its place, what the experts make of `normed`."""

    def __init__(self, layer: MoE) -> None:
        rule = layer.gate
        self.layer, self.rule, self.score = layer, rule, rule.score
        self.weight, self.bias = rule.weight.detach().float().T, rule.e_score_correction_bias
        self.biases = None if self.bias is None else self.bias.tolist()
        self.count = len(rule.weight)
        size = self.count if rule.topk_group == rule.n_group else self.count // rule.n_group
        self.groups = [range(start, start + size) for start in range(0, self.count, size)]
        self.few = FEW if rule.weight.device.type == "cpu" else 0  # elsewhere, to ask who was chosen is to wait
        up, down = list(layer.experts.gate_up_proj), list(layer.experts.down_proj)
        if layer.shared_experts is not None:
            shared_up, shared_down = split_shared(layer, down[0].shape[1])
            up, down = up + shared_up, down + shared_down
        self.shared = range(self.count, len(up))
        self.up, self.down = [matrix.T for matrix in up], [matrix.T for matrix in down]
        self.rooms: dict[tuple[int, int], _Room] = {}
        self.all = AllExperts(layer)

    def __call__(self, normed: Float[Tensor, "T d"], x: Float[Tensor, "T d"]) -> Float[Tensor, "T d"]:
        tokens = x.shape[0]
        scores = self.score(torch.mm(wide_of(normed), self.weight))
        if self.all.suits(tokens):
            return self.all(normed, x, *self.route(scores))
        if tokens > self.few:
            return self.sent(normed, x, scores)
        visits = self.visits(scores.tolist())
        room = self.room(len(visits), normed)
        for expert, place in zip(visits, room.gate_up, strict=True):
            torch.mm(normed, self.up[expert], out=place)
        torch.mul(F.silu(room.gate, inplace=True), room.up, out=room.inner)
        if tokens > 1:
            room.inner.mul_(torch.tensor(list(visits.values()), dtype=x.dtype)[..., None])
        for (expert, gates), inner in zip(visits.items(), room.inners, strict=True):
            x.addmm_(inner, self.down[expert], alpha=gates[0] if tokens == 1 else 1)
        return x

    def visits(self, scores: list[list[float]]) -> dict[int, list[float]]:
        """The visited experts, each with the gates of all tokens: the choices of `model/router.py`."""
        rule, visited = self.rule, {expert: [1.0] * len(scores) for expert in self.shared}
        for token, affinity in enumerate(scores):
            preference = affinity if self.biases is None else list(map(add, affinity, self.biases))
            chosen = sorted(self.allowed(preference), key=preference.__getitem__, reverse=True)[: rule.k]
            whole = sum(affinity[expert] for expert in chosen) + 1e-20 if rule.normalise else 1.0
            for expert in chosen:
                visited.setdefault(expert, [0.0] * len(scores))[token] = affinity[expert] / whole * rule.scaling
        return visited

    def allowed(self, preference: list[float]) -> list[int] | range:
        """The experts of the best groups: those whose two best sum to most."""
        if len(self.groups) == 1:
            return self.groups[0]
        best_two = [sum(sorted(preference[group.start : group.stop])[-2:]) for group in self.groups]
        best = sorted(range(len(best_two)), key=best_two.__getitem__, reverse=True)
        return [expert for group in best[: self.rule.topk_group] for expert in self.groups[group]]

    def room(self, visited: int, normed: Float[Tensor, "T d"]) -> _Room:
        """Memory for what is between the products, taken once for each number of visits and tokens."""
        key = visited, normed.shape[0]
        if key not in self.rooms:
            self.rooms[key] = _Room(normed.new_empty(visited, len(normed), self.up[0].shape[1]))
        return self.rooms[key]

    def sent(
        self, normed: Float[Tensor, "T d"], x: Float[Tensor, "T d"], scores: Float[Tensor, "T e"]
    ) -> Float[Tensor, "T d"]:
        """The same for more tokens: each copied to its experts, as in `model/experts.py`."""
        chosen, gates = self.route(scores)
        x = x + self.layer.experts(normed, chosen, gates.type_as(x), expert_load(chosen[None], self.count))
        shared = self.layer.shared_experts
        return x if shared is None else x + shared(normed)

    def route(self, scores: Float[Tensor, "T e"]) -> tuple[Int[Tensor, "T k"], Float[Tensor, "T k"]]:
        """The choices and gates of `model/router.py`, in FP32."""
        rule = self.rule
        preference = scores if self.bias is None else scores + self.bias
        if rule.topk_group < rule.n_group:
            grouped = preference.view(len(scores), rule.n_group, -1)
            rank = grouped.topk(2, dim=-1).values.sum(dim=-1)
            outside = torch.full_like(rank, -torch.inf)
            outside.scatter_(1, rank.topk(rule.topk_group, dim=-1).indices, 0.0)
            preference = (grouped + outside[..., None]).flatten(1)
        chosen = preference.topk(rule.k, dim=-1).indices
        gates = scores.gather(-1, chosen)
        if rule.normalise:
            gates = gates / (gates.sum(dim=-1, keepdim=True) + 1e-20)
        return chosen, gates * rule.scaling


class _Room:
    """Memory, and all views of it that a pass needs: to make one costs as much as a small product."""

    def __init__(self, hidden: Float[Tensor, "n T 2f"]) -> None:
        self.gate_up = hidden.unbind()
        self.gate, self.up = hidden.chunk(2, dim=-1)
        self.inner = torch.empty_like(self.gate, memory_format=torch.contiguous_format)  # n T f
        self.inners = self.inner.unbind()
