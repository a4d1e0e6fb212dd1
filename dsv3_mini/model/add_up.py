"""Rows added up per token, without keeping the rows: what their gradient needs of them is which token each belongs to."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable


def add_up(rows: Float[Tensor, "rows d"], token: Int[Tensor, " rows"], tokens: int) -> Float[Tensor, "T d"]:
    """The sum of the rows of each of `tokens` tokens; row i is token[i]'s. It can be differentiated once."""
    return _AddUp.apply(rows, token, tokens)


class _AddUp(torch.autograd.Function):
    """Torch's index_add keeps the rows for backward, and uses nothing of them but their shape."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, token: Tensor, tokens: int) -> Tensor:
        ctx.save_for_backward(token)
        return rows.new_zeros(tokens, *rows.shape[1:]).index_add_(0, token, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (token,) = ctx.saved_tensors
        return grad.index_select(0, token), None, None
