"""RMSNorm for a few tokens, in four calls: x / sqrt(|x|^2 + d eps) * (w sqrt(d)).

The root is the long side of a right-angled triangle, which torch gives in one call; two of the four write over what
the one before them made.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from dsv3_mini.model.norm import RMSNorm


class FewNorm:
    """`model/norm.py`, in FP32; of several norms of one width, each for its own row of the last two dimensions."""

    def __init__(self, *norms: RMSNorm) -> None:
        width, weights = norms[0].weight.shape[0], [norm.weight.detach().float() for norm in norms]
        self.weight = (torch.stack(weights) if len(norms) > 1 else weights[0]) * width**0.5
        self.leg = (width * torch.tensor([[norm.eps] for norm in norms], device=self.weight.device)).sqrt()

    def __call__(self, x: Float[Tensor, "*T d"]) -> Float[Tensor, "*T d"]:
        wide = wide_of(x)
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).hypot_(self.leg)
        normed = (wide / length).mul_(self.weight)
        return normed if wide is x else normed.type_as(x)


def wide_of(x: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """x in FP32. (To ask for a type that a tensor has is a call too, and a pass over one token asks some forty times.)"""
    return x if x.dtype == torch.float32 else x.float()
