"""The audit of gradients against finite changes: a tensor is unreached where a change of it leaves the loss to the bit."""

from __future__ import annotations

import pytest
import torch
from random_models import nano, random_model, random_tokens
from torch import Tensor

from dsv3_mini.model import DeepSeekV3
from dsv3_mini.train.losses import cross_entropy, training_losses
from dsv3_mini.train.reach import unreached


def loss_of(model: DeepSeekV3, tokens: Tensor, depth: int) -> Tensor:
    states = model.hidden_states(tokens[:, :-1])
    return cross_entropy([states.main, *states.mtp][depth], model.lm_head.weight, tokens[:, 1 + depth :])


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_what_is_unreached_can_be_changed_and_nothing_else_can(depth: int) -> None:
    model = random_model(nano(num_nextn_predict_layers=2))
    tokens = random_tokens(model.cfg, rows=4, length=33)
    idle = unreached(loss_of(model, tokens, depth), dict(model.named_parameters()))
    with torch.no_grad():
        before = loss_of(model, tokens, depth)
        for name, parameter in model.named_parameters():
            kept = parameter.clone()
            parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
            changed = not torch.equal(loss_of(model, tokens, depth), before)
            parameter.copy_(kept)
            assert changed == (name not in idle), name
    deeper = {f"mtp.{j}" for j in range(depth, 2)}
    assert {".".join(name.split(".")[:2]) for name in idle} == deeper


def test_the_whole_loss_of_training_reaches_every_parameter() -> None:
    model = random_model(nano(num_nextn_predict_layers=2))
    tokens = random_tokens(model.cfg, rows=4, length=33)
    parameters = dict(model.named_parameters())
    whole = training_losses(model, tokens[:, :-1], tokens[:, 1:], mtp_weight=0.3, balance_weight=0.0)
    assert unreached(whole.total, parameters) == []
    without = training_losses(model, tokens[:, :-1], tokens[:, 1:], mtp_weight=0.0, balance_weight=0.0)
    assert unreached(without.total, parameters) == [name for name in parameters if name.startswith("mtp")]


def test_zeros_count_as_nothing_one_entry_as_something_and_grad_is_left_alone() -> None:
    a, b, c, d = (torch.ones(3, requires_grad=True) for _ in range(4))
    b.grad = torch.ones(3)
    loss = a[1] + (0 * c).sum() + d[0] - d[1]
    for _ in range(2):  # the graph stays
        assert unreached(loss, {"a": a, "b": b, "c": c, "d": d}) == ["b", "c"]
    assert a.grad is None and torch.equal(b.grad, torch.ones(3))
