"""Dropping: who finds a place, by a count in plain Python; and a model that drops, beside itself without."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_models import nano, random_model, random_tokens

from dsv3_mini.course.capacity import capacity_for, dropping, within_capacity


@given(tokens=st.integers(1, 20), k=st.integers(1, 4), capacity=st.integers(0, 8), seed=st.integers(0, 999))
def test_the_first_come_find_a_place(tokens: int, k: int, capacity: int, seed: int) -> None:
    chosen = torch.rand(tokens, 5, generator=torch.Generator().manual_seed(seed)).topk(k).indices
    seen: Counter[int] = Counter()
    expected = []
    for expert in chosen.flatten().tolist():
        seen[expert] += 1
        expected.append(seen[expert] <= capacity)
    assert within_capacity(chosen, 5, capacity).flatten().tolist() == expected


@pytest.mark.parametrize(("factor", "places"), [(1.0, 4), (1.25, 5), (1.1, 5), (4.0, 16), (0.5, 2)])
def test_capacity_is_rounded_up(factor: float, places: int) -> None:
    assert capacity_for(factor, choices=32, n_experts=8) == places


def test_a_model_drops_what_its_loads_say_and_only_inside() -> None:
    model = random_model(nano()).eval()
    tokens = random_tokens(model.cfg)
    with torch.no_grad():
        before = model(tokens)
        first = before.routing[0]
        with dropping(model, 1.0) as shares:
            dropped = model(tokens)
        with dropping(model, float(model.cfg.n_routed_experts)) as none:
            roomy = model(tokens)
        after = model(tokens)
    places = capacity_for(1.0, first.chosen.numel(), model.cfg.n_routed_experts)
    lost = (first.load - places).clamp(min=0).sum().item()
    assert lost > 0 and len(shares) == len(before.routing)
    assert shares[0] == pytest.approx(lost / first.chosen.numel())
    gates = dropped.routing[0].gates
    assert (gates == 0).sum().item() == lost and torch.equal(gates[gates != 0], first.gates[gates != 0])
    assert not torch.equal(dropped.logits, before.logits)
    assert none == [0.0] * len(none) and torch.equal(roomy.logits, before.logits)
    assert torch.equal(after.logits, before.logits)


def test_the_switch_is_put_back_after_an_error() -> None:
    model = random_model(nano()).eval()
    with pytest.raises(RuntimeError, match="stop"), dropping(model, 1.0):
        raise RuntimeError("stop")
    assert not any(module._forward_hooks for module in model.modules())
