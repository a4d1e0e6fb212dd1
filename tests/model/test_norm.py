"""RMSNorm's hand-written derivatives against torch's own, and against a formula in FP64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_mini.model.norm import RMSNorm

EPS = 1e-2  # large enough to be seen in every number


def by_formula(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output and gradients in FP64, by autograd through the definition."""
    x, weight = (t.detach().double().requires_grad_() for t in (x, weight))
    y = x / (x.square().mean(dim=-1, keepdim=True) + EPS).sqrt() * weight
    return (y.detach(), *torch.autograd.grad(y, (x, weight), grad.double()))


def by_torch(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = (t.detach().clone().requires_grad_() for t in (x, weight))
    y = F.rms_norm(x, weight.shape, weight, EPS)
    return (y.detach(), *torch.autograd.grad(y, (x, weight), grad))


@pytest.mark.parametrize("shape", [(5, 24), (2, 7, 24), (2, 3, 4, 24), (24,)])
@pytest.mark.parametrize("size", [1.0, 1e-3, 1e3])  # far above, at and far below where eps matters
def test_output_and_gradients_are_those_of_the_definition(shape: tuple[int, ...], size: float) -> None:
    norm = RMSNorm(24, EPS)
    with torch.no_grad():
        norm.weight.uniform_(-1.5, 1.5)
    x, grad = (size * torch.randn(shape)).requires_grad_(), torch.randn(shape)
    y = norm(x)
    ours = (y, *torch.autograd.grad(y, (x, norm.weight), grad))
    for mine, exact, theirs in zip(ours, by_formula(x, norm.weight, grad), by_torch(x, norm.weight, grad), strict=True):
        assert mine.shape == exact.shape
        limit = 4 * (theirs - exact).abs().max() + 1e-6 * exact.abs().max()  # as exact as torch's own
        assert (mine - exact).abs().max() <= limit


def test_bf16_goes_in_and_out_and_all_between_is_fp32() -> None:
    norm = RMSNorm(24, EPS).bfloat16()
    x, grad = torch.randn(6, 24).bfloat16().requires_grad_(), torch.randn(6, 24).bfloat16()
    y = norm(x)
    ours = (y, *torch.autograd.grad(y, (x, norm.weight), grad))
    for mine, exact in zip(ours, by_formula(x, norm.weight, grad), strict=True):
        assert mine.dtype == torch.bfloat16
        torch.testing.assert_close(mine, exact.bfloat16(), rtol=2**-7, atol=1e-6)  # one rounding, at the end


def test_a_strided_input_and_a_frozen_weight() -> None:
    norm = RMSNorm(8, EPS)
    norm.weight.requires_grad_(False)
    wide = torch.randn(3, 5, 20, requires_grad=True)
    part = wide[..., 4:12]
    grad = torch.randn(3, 5, 8)
    (mine,) = torch.autograd.grad(norm(part), wide, grad)
    _, exact, _ = by_formula(part, norm.weight, grad)
    assert (mine[..., 4:12] - exact).abs().max() < 1e-5 and mine[..., :4].abs().max() == 0
