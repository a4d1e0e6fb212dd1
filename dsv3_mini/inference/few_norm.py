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
    """`model/norm.py`, in FP32."""

    def __init__(self, norm: RMSNorm) -> None:
        width = norm.weight.shape[0]
        self.weight = norm.weight.detach().float() * width**0.5
        self.leg = torch.full((1,), (width * norm.eps) ** 0.5, device=norm.weight.device)

    def __call__(self, x: Float[Tensor, "*T d"]) -> Float[Tensor, "*T d"]:
        wide = wide_of(x)
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).hypot_(self.leg)
        normed = (wide / length).mul_(self.weight)
        return normed if wide is x else normed.type_as(x)


def wide_of(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """x in FP32. (To ask for a type that a tensor has is a call too, and a pass over one token asks some forty times.)"""
    return x if x.dtype == torch.float32 else x.float()
