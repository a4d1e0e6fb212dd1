"""SwiGLU and the routed experts in FP8 against the same steps by hand, one expert after the other, tile after tile."""

from __future__ import annotations

import pytest
import torch
from by_the_tile import RMS, error, rounded
from random_models import nano
from torch import Tensor

from dsv3_mini.fp8.convert import from_fp8, to_fp8
from dsv3_mini.fp8.experts import FP8GroupedExperts
from dsv3_mini.fp8.kept import bytes_kept
from dsv3_mini.fp8.recipe import Fp8Recipe
from dsv3_mini.fp8.swiglu import FP8SwiGLU
from dsv3_mini.model.experts import GroupedExperts, gated
from dsv3_mini.model.feed_forward import SwiGLU, swiglu
from dsv3_mini.model.moe import MoE
from dsv3_mini.model.router import expert_load

EXACT = Fp8Recipe(backend="exact")
ROW, COLUMN, BLOCK = (1, 128), (128, 1), (128, 128)
E = 6
WIDTHS = {"ragged": (144, 40), "whole tiles": (128, 64)}  # model width, expert width

CHOICES = {
    "all experts": torch.stack([torch.randperm(E, generator=torch.Generator().manual_seed(t))[:3] for t in range(160)]),
    "empty experts": torch.tensor([[1, 4]] * 9 + [[4, 2]] * 3),
    "one expert takes all": torch.full((150, 1), 5),
    "the first and the last are empty": torch.tensor([[1, 2, 3, 4]] * 5),
    "one token": torch.tensor([[3, 0]]),
}


def experts_of(widths: tuple[int, int], twin: bool) -> GroupedExperts:
    width, inner = widths
    cfg = nano(n_routed_experts=E, n_group=1, topk_group=1, hidden_size=width, moe_intermediate_size=inner)
    experts = GroupedExperts(cfg)
    torch.manual_seed(3)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return to_fp8(experts, EXACT) if twin else experts


def inputs(chosen: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(7)
    tokens = len(chosen)
    return (
        torch.randn(tokens, width, generator=random),
        torch.rand(chosen.shape, generator=random) + 0.5,
        torch.randn(tokens, width, generator=random),
    )


def backward_by_hand(
    rows: Tensor, gates: Tensor, w_gate_up: Tensor, w_down: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One expert: its result, and the gradients of rows, gates and both weights, from operands rounded by hand."""
    x, w_gu, w_d = rounded(rows, ROW, power_of_two=True), rounded(w_gate_up, BLOCK), rounded(w_down, BLOCK)
    gate_up = x @ w_gu.T
    y = rounded(gated(gate_up, gates), ROW) @ w_d.T
    kept, weigh = rounded(gate_up, ROW).requires_grad_(), gates.clone().requires_grad_()
    hidden = gated(kept, weigh)
    d_down = rounded(dy, COLUMN).T @ rounded(hidden.detach(), COLUMN)
    d_hidden = rounded(dy, ROW, power_of_two=True) @ w_d
    d_gate_up, d_gates = torch.autograd.grad(hidden, (kept, weigh), d_hidden)
    d_rows = rounded(d_gate_up, ROW) @ w_gu
    return y, d_rows, d_gates, rounded(d_gate_up, COLUMN).T @ rounded(x, COLUMN, power_of_two=True), d_down


@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("name", CHOICES)
def test_experts_are_each_experts_own_products(widths: tuple[int, int], name: str) -> None:
    chosen, experts = CHOICES[name], experts_of(widths, twin=True)
    assert type(experts) is FP8GroupedExperts
    x, gates, upstream = inputs(chosen, widths[0])
    tokens, weights = x.clone().requires_grad_(), gates.clone().requires_grad_()
    out = experts(tokens, chosen, weights, expert_load(chosen, E))
    out.backward(upstream)

    expected = [torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(gates)]
    for e in range(E):
        token, slot = (chosen == e).nonzero(as_tuple=True)
        w_gate_up, w_down = experts.gate_up_proj[e].detach(), experts.down_proj[e].detach()
        if not len(token):
            assert not experts.gate_up_proj.grad[e].any() and not experts.down_proj.grad[e].any()
            continue
        y, d_rows, d_gates, d_gate_up_proj, d_down_proj = backward_by_hand(
            x[token], gates[token, slot], w_gate_up, w_down, upstream[token]
        )
        expected[0].index_add_(0, token, y)
        expected[1].index_add_(0, token, d_rows)
        expected[2][token, slot] = d_gates
        # FP32 sums in another order may round an operand the other way in FP8; more than one in a thousand is a mistake.
        assert error(experts.gate_up_proj.grad[e], d_gate_up_proj) < 3e-3
        assert error(experts.down_proj.grad[e], d_down_proj) < 3e-3
    for got, by_hand in zip((out.detach(), tokens.grad, weights.grad), expected, strict=True):
        assert error(got, by_hand) < 3e-3


def test_experts_are_as_far_from_fp32_as_their_roundings_add_up_to() -> None:
    """Independent roundings add up in squares, one RMS each. Into `hidden` go x and W_gu, and both twice over: gate and up
    share x's errors but not W's, and silu(gate) changes by 1 to 2 times as much as gate, relatively: 2 to 5 in all. Then
    hidden's own and W_down: y has 4 to 7. Backward adds dy, W_down, kept gate_up, d_gate_up, W_gu to the derivative's own.
    """
    chosen = CHOICES["all experts"]
    x, gates, upstream = inputs(chosen, 144)
    found = []
    for twin in (False, True):
        experts = experts_of((144, 40), twin)
        tokens, weights = x.clone().requires_grad_(), gates.clone().requires_grad_()
        out = experts(tokens, chosen, weights, expert_load(chosen, E))
        out.backward(upstream)
        found.append([out.detach(), tokens.grad, weights.grad, experts.gate_up_proj.grad, experts.down_proj.grad])
    errors = [error(mine, exact) for exact, mine in zip(*found, strict=True)]
    assert 1.8 < errors[0] / RMS < 3.0, errors
    assert all(1.8 < other / RMS < 4.0 for other in errors[1:]), errors


def test_experts_keep_rows_and_gate_up_in_fp8() -> None:
    chosen = CHOICES["all experts"]
    experts = experts_of((128, 64), twin=True).bfloat16()
    assert all(parameter.dtype == torch.float32 for parameter in experts.parameters())
    x, gates, _ = inputs(chosen, 128)
    load = expert_load(chosen, E)
    tokens = x.bfloat16().requires_grad_()
    kept = bytes_kept(lambda: experts(tokens, chosen, gates, load), experts.parameters())
    rows = chosen.numel()
    assert kept[torch.float8_e4m3fn] == rows * 128 + rows * 2 * 64
    assert kept[torch.float32] == 4 * rows * (1 + 1) + 4 * rows  # a scale a row of each, and the gates
    assert torch.bfloat16 not in kept


@pytest.mark.parametrize("widths", [(144, 40), (128, 128), (256, 200)])
@pytest.mark.parametrize("tokens", [1, 130])
def test_swiglu_is_its_products_by_hand(widths: tuple[int, int], tokens: int) -> None:
    layer = SwiGLU(*widths)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    assert type(to_fp8(layer, EXACT)) is FP8SwiGLU
    x, dy = torch.randn(tokens, widths[0]), torch.randn(tokens, widths[0])
    w_gate_up, w_down = layer.gate_up_proj.weight.detach(), layer.down_proj.weight.detach()

    x8, w_gu, w_d = rounded(x, ROW), rounded(w_gate_up, BLOCK), rounded(w_down, BLOCK)
    gate_up = x8 @ w_gu.T
    y = rounded(swiglu(gate_up), ROW) @ w_d.T
    kept = rounded(gate_up, ROW).requires_grad_()
    hidden = swiglu(kept)
    d_down = rounded(dy, COLUMN).T @ rounded(hidden.detach(), COLUMN)
    (d_gate_up,) = torch.autograd.grad(hidden, kept, rounded(dy, ROW) @ w_d)
    d_gate_up_proj = rounded(d_gate_up, COLUMN).T @ rounded(x8, COLUMN, power_of_two=True)

    mine = x.clone().requires_grad_()
    out = layer(mine)
    out.backward(dy)
    got = (out.detach(), mine.grad, layer.gate_up_proj.weight.grad, layer.down_proj.weight.grad)
    for one, other in zip(got, (y, rounded(d_gate_up, ROW) @ w_gu, d_gate_up_proj, d_down), strict=True):
        assert error(one, other) < 3e-3


def test_swiglu_keeps_its_input_and_gate_up_in_fp8() -> None:
    layer = to_fp8(SwiGLU(128, 256), EXACT).bfloat16()
    x = torch.randn(2, 50, 128).bfloat16().requires_grad_()
    kept = bytes_kept(lambda: layer(x), layer.parameters())
    assert kept == {torch.float8_e4m3fn: 100 * (128 + 512), torch.float32: 4 * 100 * (1 + 4)}


def test_fp8_experts_leave_the_routing_to_fp32() -> None:
    moe = MoE(nano(hidden_size=128), layer=1)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x = torch.randn(2, 40, 128)
    out, routing = moe(x)
    twin_out, twin_routing = to_fp8(moe, EXACT)(x)
    assert torch.equal(twin_routing.chosen, routing.chosen) and torch.equal(twin_routing.gates, routing.gates)
    assert RMS < error(twin_out, out) < 4 * RMS
    back, _ = from_fp8(moe)(x)
    assert torch.equal(back, out)
