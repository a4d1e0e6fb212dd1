"""The router against a brute force in plain Python, token by token, and against what must never happen."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_models import nano, random_model, random_tokens
from torch import Tensor, nn

from dsv3_mini.config import ModelConfig
from dsv3_mini.model.router import Router, Routing, limit_to_groups


def make(bias: Tensor | float | None = None, width: float = 1.0, **changes: Any) -> Router:
    router = Router(nano(**{"hidden_size": 16, **changes}), layer=1)
    with torch.no_grad():
        router.weight.normal_(0, width)
        if bias is not None:
            router.e_score_correction_bias.copy_(torch.as_tensor(bias))
    return router


def route_one(scores: list[float], bias: list[float], cfg: ModelConfig) -> dict[int, float]:
    """Equations 12, 13 and 16 for one token, by sorting: expert -> gate."""
    biased = [s + b for s, b in zip(scores, bias, strict=True)]
    size = cfg.n_routed_experts // cfg.n_group
    groups = range(cfg.n_group)

    def rank(group: int) -> float:
        return sum(sorted(biased[group * size : (group + 1) * size], reverse=True)[:2])

    best = sorted(groups, key=rank, reverse=True)[: cfg.topk_group]
    allowed = [e for e in range(cfg.n_routed_experts) if e // size in best]
    chosen = sorted(allowed, key=lambda e: biased[e], reverse=True)[: cfg.num_experts_per_tok]
    total = sum(scores[e] for e in chosen) if cfg.norm_topk_prob else 1.0
    return {e: scores[e] / total * cfg.routed_scaling_factor for e in chosen}


# ---- against the brute force -----------------------------------------------------------------------------------------


@given(
    groups=st.sampled_from([1, 2, 4, 8]),
    size=st.integers(2, 4),
    share=st.floats(0, 1),
    k=st.integers(1, 8),
    normalise=st.booleans(),
    scoring=st.sampled_from(["sigmoid", "softmax"]),
    mean=st.sampled_from([-3.0, -0.5, 0.0, 2.0]),
    seed=st.integers(0, 10**6),
)
def test_equals_the_brute_force(
    groups: int, size: int, share: float, k: int, normalise: bool, scoring: str, mean: float, seed: int
) -> None:
    kept = 1 + round(share * (groups - 1))
    changes = dict(
        hidden_size=16,
        n_routed_experts=groups * size,
        n_group=groups,
        topk_group=kept,
        num_experts_per_tok=min(k, kept * size),
        norm_topk_prob=normalise,
        scoring_func=scoring,
    )
    torch.manual_seed(seed)
    cfg = nano(**changes)
    router = make(torch.randn(cfg.n_routed_experts) * 0.3 + mean, **changes)
    x = torch.randn(2, 4, 16)
    routing = router(x)
    logits = x.double() @ router.weight.double().T
    expected_scores = logits.sigmoid() if scoring == "sigmoid" else logits.softmax(-1)
    torch.testing.assert_close(routing.scores.double(), expected_scores, rtol=1e-5, atol=1e-7)
    visits: Counter[int] = Counter()
    for b in range(2):
        for s in range(4):
            expected = route_one(routing.scores[b, s].tolist(), router.e_score_correction_bias.tolist(), cfg)
            got = dict(zip(routing.chosen[b, s].tolist(), routing.gates[b, s].tolist(), strict=True))
            assert got == pytest.approx(expected, rel=1e-5)
            visits.update(got.keys())
    assert routing.load.tolist() == [visits[e] for e in range(cfg.n_routed_experts)]


def test_a_group_is_ranked_by_its_two_best_and_not_by_its_best() -> None:
    preference = torch.tensor([[[0.9, 0.1, 0.6, 0.55, 0.5, 0.5, 0.2, 0.2]]])
    kept = limit_to_groups(preference, n_group=4, topk_group=1)
    assert kept[0, 0].isfinite().nonzero().flatten().tolist() == [2, 3]  # 0.6 + 0.55 beats 0.9 + 0.1


def test_closed_groups_lose_even_when_all_preferences_are_negative() -> None:
    """With 0 in the place of -inf, a closed group's experts would be the best of all."""
    router = make(-10.0)
    chosen = router(torch.randn(4, 64, 16)).chosen
    groups = chosen // 2
    assert all(len(set(row)) <= 2 for row in groups.flatten(0, 1).tolist())
    preference = limit_to_groups(-torch.rand(3, 5, 8) - 1, n_group=4, topk_group=2)
    assert (preference == -math.inf).sum(-1).eq(4).all() and (preference[preference.isfinite()] < 0).all()


def test_a_token_visits_different_experts_in_few_groups() -> None:
    router = make(torch.randn(32) * 0.3, n_routed_experts=32, n_group=8, topk_group=3, num_experts_per_tok=7)
    chosen = router(torch.randn(8, 50, 16)).chosen.flatten(0, 1)
    assert all(len(set(row)) == 7 for row in chosen.tolist())
    reached = {len(set(row)) for row in (chosen // 4).tolist()}
    assert max(reached) == 3 and reached <= {2, 3}


# ---- the bias chooses and never weighs -------------------------------------------------------------------------------


def test_the_bias_reaches_choices_and_not_gates() -> None:
    router = make(0.0, n_group=1, topk_group=1, num_experts_per_tok=3)
    x = torch.randn(1, 40, 16)
    plain = router(x)
    router.e_score_correction_bias.fill_(-5.0)  # all alike: the same choice
    shifted = router(x)
    assert torch.equal(plain.chosen, shifted.chosen) and torch.equal(plain.gates, shifted.gates)
    router.e_score_correction_bias[2] += 100.0  # expert 2 always
    forced = router(x)
    assert (forced.chosen == 2).any(-1).all() and not (plain.chosen == 2).any(-1).all()
    scores = forced.scores.gather(-1, forced.chosen)
    torch.testing.assert_close(forced.gates, scores / scores.sum(-1, keepdim=True) * 2.5)
    torch.testing.assert_close(forced.gates.sum(-1), torch.full((1, 40), 2.5))
    assert torch.equal(forced.scores, plain.scores)


def test_gradients_flow_through_the_scores_alone() -> None:
    router = make(torch.randn(8) - 1)
    x = torch.randn(1, 6, 16)
    routing = router(x)
    upstream = torch.randn_like(routing.gates)
    (routing.gates * upstream).sum().backward()
    weight = router.weight.detach().clone().requires_grad_()
    scores = (x @ weight.T).sigmoid().gather(-1, routing.chosen)
    (scores / scores.sum(-1, keepdim=True) * 2.5 * upstream).sum().backward()
    torch.testing.assert_close(router.weight.grad, weight.grad)
    assert router.e_score_correction_bias.grad is None and not router.e_score_correction_bias.requires_grad
    assert not routing.detach().gates.requires_grad and not routing.detach().scores.requires_grad


def test_gates_not_normalised_are_scaled_scores() -> None:
    router = make(0.0, norm_topk_prob=False, routed_scaling_factor=1.5)
    routing = router(torch.randn(2, 9, 16))
    torch.testing.assert_close(routing.gates, 1.5 * routing.scores.gather(-1, routing.chosen))


def test_the_auxiliary_loss_variant_has_no_bias() -> None:
    router = make(topk_method="aux_loss", scoring_func="softmax", n_group=1, topk_group=1, num_experts_per_tok=3)
    assert "e_score_correction_bias" not in router.state_dict()
    routing = router(torch.randn(2, 9, 16))
    torch.testing.assert_close(routing.scores.sum(-1), torch.ones(2, 9))
    assert torch.equal(routing.chosen, routing.scores.topk(3).indices)
    assert make(topk_method="aux_loss").bfloat16()(torch.randn(1, 2, 16)).gates.isfinite().all()


# ---- FP32 ------------------------------------------------------------------------------------------------------------

CASTS = {
    "to(bfloat16)": lambda m: m.to(torch.bfloat16),
    "bfloat16()": nn.Module.bfloat16,
    "half()": nn.Module.half,
    "double()": nn.Module.double,
    "to(float16), to(float32)": lambda m: m.to(torch.float16).to(torch.float32),
    "to('cpu', bfloat16)": lambda m: m.to("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("cast", CASTS)
def test_casting_leaves_the_bias_bit_for_bit(cast: str) -> None:
    model = random_model(nano())
    biases = {n: b.clone() for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")}
    assert len(biases) == 3 and all((b.bfloat16().float() != b).all() for b in biases.values())
    CASTS[cast](model)
    for name, bias in biases.items():
        assert model.get_buffer(name).dtype == torch.float32
        assert torch.equal(model.get_buffer(name), bias)


def test_the_bias_is_a_saved_buffer_and_no_parameter() -> None:
    model = random_model(nano())
    names = [name for name in model.state_dict() if name.endswith("e_score_correction_bias")]
    assert names == [
        "layers.1.mlp.gate.e_score_correction_bias",
        "layers.2.mlp.gate.e_score_correction_bias",
        "mtp.0.block.mlp.gate.e_score_correction_bias",
    ]
    assert not {n for n, _ in model.named_parameters()} & set(names)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    before = {name: model.get_buffer(name).clone() for name in names}
    model(random_tokens(model.cfg)).logits.square().mean().backward()
    optimizer.step()
    assert all(torch.equal(model.get_buffer(name), before[name]) for name in names)


def test_scores_are_fp32_inside_a_bf16_model() -> None:
    """From the same BF16 numbers, with FP32 products and sums: equal to FP64 at 1e-6, where a BF16 gate is off by 1e-3."""
    router = make(torch.randn(8), width=0.3).bfloat16()
    x = torch.randn(4, 100, 16).bfloat16()
    routing = router(x)
    exact = (x.double() @ router.weight.double().T).sigmoid()
    assert (routing.scores.double() - exact).abs().max() < 1e-6
    assert ((x @ router.weight.T).sigmoid().double() - exact).abs().max() > 1e-4
    assert routing.gates.dtype == routing.scores.dtype == torch.float32


def test_a_routing_knows_its_layer() -> None:
    model = random_model(nano(num_nextn_predict_layers=2))
    routing = model(random_tokens(model.cfg)).routing
    assert [r.layer for r in routing] == [1, 2, 3, 4]
    assert all(isinstance(r, Routing) and not r.gates.requires_grad for r in routing)
    assert [r.load.sum().item() for r in routing] == [2 * n * 2 for n in (48, 48, 47, 46)]
