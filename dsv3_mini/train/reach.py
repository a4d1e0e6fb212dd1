"""Which tensors a loss trains: an audit, for a model with several losses (report section 2.2 adds one for each depth).

A tensor that no loss reaches keeps its first random values for ever, and no error says so.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor


def unreached(loss: Float[Tensor, ""], parameters: Mapping[str, Tensor]) -> list[str]:
    """Names of the parameters that get nothing from `loss`: it does not depend on them, or their gradient is 0 throughout.

    The graph stays, so that several losses of one pass can be audited. `.grad` is neither read nor written.

    Args:
        parameters: name -> tensor that requires a gradient, as `dict(model.named_parameters())`.
    """
    gradients = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
    return [name for name, g in zip(parameters, gradients, strict=True) if g is None or not g.any()]
