"""The routed experts against a brute force that visits one token and one expert at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import nano
from torch import Tensor
from torch.nn import functional as F

from dsv3_mini.model.experts import GroupedExperts, LoopExperts
from dsv3_mini.model.feed_forward import SwiGLU
from dsv3_mini.model.moe import MoE
from dsv3_mini.model.router import expert_load

E, D, W = 6, 16, 8  # experts, model width, expert width


def make(kind: type[GroupedExperts] = GroupedExperts) -> GroupedExperts:
    experts = kind(nano(n_routed_experts=E, n_group=1, topk_group=1, hidden_size=D, moe_intermediate_size=W))
    torch.manual_seed(3)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return experts


def brute_force(experts: GroupedExperts, x: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
    """Equation 12 as it is written, in FP64."""
    rows = []
    for t, token in enumerate(x.double()):
        total = torch.zeros(D, dtype=torch.float64)
        for slot, e in enumerate(chosen[t].tolist()):
            gate, up = experts.gate_up_proj[e].double()[:W], experts.gate_up_proj[e].double()[W:]
            inner = (gate @ token) * torch.sigmoid(gate @ token) * (up @ token)
            total = total + gates[t, slot].double() * (experts.down_proj[e].double() @ inner)
        rows.append(total)
    return torch.stack(rows)


CHOICES = {
    "all experts": torch.stack([torch.randperm(E, generator=torch.Generator().manual_seed(t))[:3] for t in range(20)]),
    "empty experts": torch.tensor([[1, 4]] * 9 + [[4, 2]] * 3),
    "one expert takes all": torch.full((7, 1), 5),
    "the first and the last are empty": torch.tensor([[1, 2, 3, 4]] * 5),
    "one token": torch.tensor([[3, 0]]),
}


@pytest.mark.parametrize("kind", [GroupedExperts, LoopExperts])
@pytest.mark.parametrize("name", CHOICES)
def test_forward_and_backward_equal_the_brute_force(kind: type[GroupedExperts], name: str) -> None:
    chosen = CHOICES[name]
    experts, twin = make(kind), make()
    x, gates = torch.randn(len(chosen), D), torch.rand(chosen.shape)
    inputs = [tensor.clone().requires_grad_() for tensor in (x, gates)]
    twin_inputs = [tensor.clone().requires_grad_() for tensor in (x, gates)]
    out = experts(inputs[0], chosen, inputs[1], expert_load(chosen, E))
    expected = brute_force(twin, twin_inputs[0], chosen, twin_inputs[1])
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)

    upstream = torch.randn_like(out)
    (out * upstream).sum().backward()
    (expected * upstream).sum().backward()
    pairs = zip([*inputs, *experts.parameters()], [*twin_inputs, *twin.parameters()], strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    unused = [e for e in range(E) if e not in chosen]
    assert (experts.gate_up_proj.grad[unused] == 0).all() and (experts.down_proj.grad[unused] == 0).all()


@settings(max_examples=20)
@given(tokens=st.integers(1, 30), k=st.integers(1, E), seed=st.integers(0, 10**6))
def test_dispatch_sends_every_choice_once_sorted_by_expert(tokens: int, k: int, seed: int) -> None:
    noise = torch.rand(tokens, E, generator=torch.Generator().manual_seed(seed))
    chosen = noise.topk(k).indices
    x = torch.arange(tokens)[:, None].expand(tokens, D).float()
    sent = make().dispatch(x, chosen, expert_load(chosen, E))
    experts = torch.arange(E).repeat_interleave(sent.load)  # of each row
    pairs = list(zip(sent.token.tolist(), experts.tolist(), strict=True))
    assert sorted(pairs) == sorted((t, e) for t in range(tokens) for e in chosen[t].tolist())
    assert sent.rows[:, 0].tolist() == sent.token.tolist()
    assert chosen.flatten()[sent.slot].tolist() == experts.tolist()


def test_bf16_stays_close_to_fp32() -> None:
    chosen = CHOICES["all experts"]
    x, gates, load = torch.randn(20, D), torch.rand(20, 3), expert_load(chosen, E)
    for kind in (GroupedExperts, LoopExperts):
        exact = make(kind)(x, chosen, gates, load)
        out = make(kind).bfloat16()(x.bfloat16(), chosen, gates, load)
        assert out.dtype == torch.bfloat16
        assert (out.float() - exact).norm() / exact.norm() < 0.01


def test_s_shared_experts_are_one_of_s_times_the_width() -> None:
    """The sum of separate shared experts, as the report writes it, is the one wide SwiGLU that is stored."""
    wide, x = SwiGLU(D, 3 * W), torch.randn(2, 5, D)
    gate, up = wide.gate_up_proj.weight.chunk(2)
    total = torch.zeros_like(x)
    for s in range(3):
        part = slice(s * W, (s + 1) * W)
        total = total + (F.silu(x @ gate[part].T) * (x @ up[part].T)) @ wide.down_proj.weight[:, part].T
    torch.testing.assert_close(wide(x), total, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shared", [0, 1, 2])
def test_a_sparse_layer_is_shared_plus_gated_routed_experts(shared: int) -> None:
    moe = MoE(nano(n_shared_experts=shared, n_routed_experts=E, n_group=1, topk_group=1, hidden_size=D), layer=1)
    assert sum(p.numel() for n, p in moe.named_parameters() if n.startswith("shared")) == shared * 3 * 32 * D
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 6, D)
    out, routing = moe(x)
    for b in range(2):
        for s in range(6):
            expected = torch.zeros(D) if moe.shared_experts is None else moe.shared_experts(x[b, s])
            for e, gate in zip(routing.chosen[b, s].tolist(), routing.gates[b, s], strict=True):
                inner = moe.experts.gate_up_proj[e] @ x[b, s]
                expected = expected + gate * (moe.experts.down_proj[e] @ (F.silu(inner[:32]) * inner[32:]))
            torch.testing.assert_close(out[b, s], expected, rtol=1e-4, atol=1e-5)
