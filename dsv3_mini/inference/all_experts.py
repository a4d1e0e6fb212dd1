"""DeepSeekMoE for some tokens of a small model: all experts for all tokens, in two products.

Where the tokens together choose about as many experts as there are, to find out who visits whom costs more than to let
everybody visit everybody, with a gate of 0 where nobody was chosen:

    inner = SiLU(x W_gate) * (x W_up)          W_gate, W_up: those of all experts, shared ones last
    y     = (inner * gates) W_down             each expert's part of `inner` weighed by the token's gate for it
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from dsv3_mini.inference.few_product import PACKED, FewProduct
from dsv3_mini.model.moe import MoE

SHARE = 0.75  # choices of all tokens together for each expert, from which on all are computed
MANY = 64  # tokens: with more, the products cost more than sending does


class AllExperts:
    """`experts(normed, x, chosen, gates)` is x, to which is added, in its place, what the chosen experts and the shared ones say."""

    def __init__(self, layer: MoE) -> None:
        self.layer, self.count, self.k = layer, layer.experts.down_proj.shape[0], layer.gate.k
        self.width = layer.experts.down_proj.shape[2]  # f, of one expert
        shared = layer.shared_experts
        self.shared = 0 if shared is None else shared.down_proj.in_features // self.width
        self.small = 2 * layer.experts.down_proj.numel() < PACKED.stop
        self.least = SHARE * self.count / self.k
        self.up: FewProduct | None = None
        self.down: FewProduct | None = None

    def suits(self, tokens: int) -> bool:
        """Whether so many tokens choose most of the experts, of a model whose experts together are small."""
        return self.small and self.least <= tokens <= MANY

    def __call__(
        self,
        normed: Float[Tensor, "T d"],
        x: Float[Tensor, "T d"],
        chosen: Int[Tensor, "T k"],
        gates: Float[Tensor, "T k"],
    ) -> Float[Tensor, "T d"]:
        if self.up is None or self.down is None:
            self.up, self.down = self._side_by_side()
        tokens = len(x)
        weights = torch.ones(tokens, self.count + self.shared, dtype=x.dtype, device=x.device)
        weights[:, : self.count] = 0
        weights.scatter_(1, chosen, gates.type_as(x))
        gate, up = self.up(normed).view(tokens, -1, 2, self.width).unbind(2)
        inner = F.silu(gate).mul_(up).mul_(weights[..., None])
        return self.down.add(x, inner.flatten(1))

    def _side_by_side(self) -> tuple[FewProduct, FewProduct]:
        up, down = self.layer.experts.gate_up_proj.flatten(0, 1), self.layer.experts.down_proj
        down = rearrange(down, "e d f -> d (e f)")
        if self.shared:
            shared_up, shared_down = split_shared(self.layer, self.width)
            up, down = torch.cat([up, *shared_up]), torch.cat([down, *shared_down], dim=1)
        return FewProduct(up), FewProduct(down)


def split_shared(layer: MoE, width: int) -> tuple[list[Float[Tensor, "2f d"]], list[Float[Tensor, "d f"]]]:
    """The shared experts, one by one: in the model they are one SwiGLU of all their widths."""
    shared = layer.shared_experts
    gate, up = (half.split(width) for half in shared.gate_up_proj.weight.chunk(2))
    if len(gate) == 1:
        return [shared.gate_up_proj.weight], [shared.down_proj.weight]
    return [torch.cat(pair) for pair in zip(gate, up, strict=True)], list(shared.down_proj.weight.split(width, dim=1))
