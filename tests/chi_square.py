"""Whether a sample can come from a distribution, as a chance and not as a tolerance that somebody liked."""

from __future__ import annotations

import torch
from torch import Tensor


def p_value(counts: Tensor, shares: Tensor) -> float:
    """Pearson's chi-square: the chance that a sample of these shares lies at least so far off.

    Its approximation wants 5 expected in each class, so that is asserted.
    """
    expected = shares.double() * counts.sum()
    assert expected.min() >= 5, "too few samples for this distribution"
    chi2 = ((counts - expected).square() / expected).sum()
    freedom = torch.tensor((len(shares) - 1) / 2, dtype=torch.float64)
    return 1 - torch.special.gammainc(freedom, chi2 / 2).item()
