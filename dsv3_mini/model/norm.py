"""RMSNorm: divide by the root mean square, multiply by a learned weight. No mean, no bias."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight, over the last dimension.

    Computed in FP32 whatever the input's dtype: squaring a BF16 number leaves 8 bits of a mean that everything
    downstream is scaled by (report section 3.3.1 keeps the norms in high precision).
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).type_as(x)
