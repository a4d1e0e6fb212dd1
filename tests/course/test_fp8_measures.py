"""Lesson 15's measurements: operands are those of the three GEMMs, errors are what their names say."""

from __future__ import annotations

import math

import pytest
import torch
from random_models import nano, random_model, random_tokens

from dsv3_mini.course.fp8_measures import (
    OUTPUTS,
    WAYS,
    error_curves,
    integers,
    operands_of,
    outlier_reach,
    relative_error,
    sum_errors,
    with_outlier,
    zeroed,
)
from dsv3_mini.fp8.formats import E4M3, E5M2


def test_operands_are_those_of_the_weight_gradient() -> None:
    """What a layer read and the gradient of what it wrote make, multiplied, the gradient of its weight: autograd's own."""
    model, tokens = random_model(nano()), random_tokens(nano(), rows=2, length=20)
    targets = tokens.roll(-1, 1)
    targets[0, :5] = -100
    found = operands_of(model, tokens, targets)
    assert all(parameter.grad is None for parameter in model.parameters())
    loss = torch.nn.functional.cross_entropy(
        model.lm_head(model.main_states(tokens)[0]).flatten(0, 1), targets.flatten()
    )
    loss.backward()
    modules = dict(model.layers.named_modules())
    assert len(found) == sum(isinstance(module, torch.nn.Linear) for module in modules.values()) > 0
    for name, operands in found.items():
        assert operands.weight is not modules[name].weight and torch.equal(operands.weight, modules[name].weight)
        assert not operands.activation.requires_grad and len(operands.activation) == len(operands.gradient) == 40
        wanted = modules[name].weight.grad
        torch.testing.assert_close(operands.gradient.T @ operands.activation, wanted, rtol=1e-3, atol=1e-6)
    assert not any(module._forward_hooks for module in model.modules())


def test_errors_by_their_definitions() -> None:
    x = torch.tensor([3.0, -4.0, 0.0])
    assert relative_error(x, x) == 0 and relative_error(x, 0 * x) == 1
    assert relative_error(x, torch.tensor([3.0, -4.0, 2.5])) == pytest.approx(0.5)
    assert zeroed(x, torch.tensor([0.0, -4.0, 0.0])) == 0.5, "a zero that stays zero does not count"


def test_the_outlier_is_where_it_is_asked_for_and_nothing_else_moves() -> None:
    x, y = with_outlier(1000.0, 2, 77), with_outlier(5.0, 2, 77)
    assert x[2, 77] == 1000 and y[2, 77] == 5 and int((x != y).sum()) == 1
    assert 0.9 < float(y.std()) < 1.1


def test_whole_numbers_go_in_equal_steps() -> None:
    x = torch.tensor([127.0, 0.6, -3.4, 0.4])
    assert integers(x).tolist() == [127.0, 1.0, -3.0, 0.0]


def test_an_outlier_spoils_what_shares_its_scale_once_the_others_fall_among_subnormals() -> None:
    sizes = [1.0, 2.0**10, 2.0**24]
    reach = outlier_reach(sizes, E4M3)
    whole, tiles, eight_bit_integers = (reach[name] for name in (*WAYS, "whole numbers, one scale"))
    # From one power of two to the next an E4M3 number is off by at most half of 1/8 of it: evenly spread, about 2.6%.
    assert all(0.02 < each < 0.032 for each in (*whole[:2], *tiles[:2]))
    assert whole[2] == pytest.approx(1, abs=0.01), "all others became zero"
    # The outlier's tile is 128 of 4,096 numbers: it is lost, and no other.
    assert tiles[2] == pytest.approx(math.sqrt(128 / 4096), rel=0.1)
    assert eight_bit_integers[1] == pytest.approx(1, abs=0.01), "whole numbers have no small steps for small numbers"
    assert outlier_reach([1.0], E5M2)["one scale for all"][0] > 1.5 * whole[0], "one bit of mantissa less"


@pytest.mark.parametrize("operands", ["normal", "positive"])
def test_with_many_bits_little_is_lost(operands: str) -> None:
    errors = sum_errors(256, 128, bits=18, operands=operands)
    assert errors.shape == (OUTPUTS, OUTPUTS) and float(errors.max()) < 2e-4
    assert torch.equal(errors, sum_errors(256, 128, bits=18, operands=operands)), "the same each time"


def test_each_bit_less_doubles_the_error_and_promotion_cures() -> None:
    eight, ten = (float(sum_errors(1024, None, bits).square().mean().sqrt()) for bits in (8, 10))
    assert 2.5 < eight / ten < 6, "a factor of 4, give or take the luck of 4,096 sums"
    assert sum_errors(1024, None, 10).max() > 2 * sum_errors(1024, 128, 10).max()
    assert torch.equal(sum_errors(128, 128, 10), sum_errors(128, None, 10)), "nothing to promote within 128"


def test_sums_without_signs_lose_more() -> None:
    """They grow with K and not with its root, and every cut goes the same way."""
    assert sum_errors(1024, None, 12, "positive").max() > 2 * sum_errors(1024, None, 12).max()


def test_curves_are_the_largest_errors() -> None:
    curves = error_curves([128, 256], {"a": None, "b": 64}, bits=10)
    assert curves["a"] == {k: float(sum_errors(k, None, 10).max()) for k in (128, 256)}
    assert curves["b"][256] == float(sum_errors(256, 64, 10).max())
