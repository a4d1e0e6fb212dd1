"""Absorbed against expanded: the same numbers, and the faster one is the one that the count names."""

from __future__ import annotations

import statistics

import pytest
import torch

from dsv3_mini.bench import decode
from dsv3_mini.bench.decode import (
    CONTEXT,
    Seconds,
    largest_difference,
    one_layer,
    random_inputs,
    shortest_ratio,
    side_by_side,
)
from dsv3_mini.config import ModelConfig
from dsv3_mini.ledger.decode import attention_flops, crossing

RELEASED = ModelConfig.preset("671b")


def test_inputs_are_those_of_the_last_tokens() -> None:
    layer = one_layer(RELEASED, 2)
    inputs = random_inputs(layer, 3, 8)
    assert inputs.query_nope.shape == (1, 3, 2, 128) and inputs.query_rope.shape == (1, 3, 2, 64)
    assert inputs.latent.shape == (1, 8, 512) and inputs.key_rope.shape == (1, 8, 64)
    assert inputs.mask.tolist() == [[[t <= 5 + s for t in range(8)] for s in range(3)]]
    for one, other in zip(inputs.all, random_inputs(layer, 3, 8).all, strict=True):
        assert torch.equal(one, other)


def test_making_a_layer_leaves_the_readers_random_numbers_alone() -> None:
    state = torch.get_rng_state()
    one, other = one_layer(RELEASED, 2), one_layer(RELEASED, 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.kv_b_proj.weight, other.kv_b_proj.weight)


@pytest.mark.parametrize("new", [1, 2, 32, 300])
def test_both_ways_give_the_same_at_the_released_widths(new: int) -> None:
    layer = one_layer(RELEASED, 4)
    assert 0 < largest_difference(layer, random_inputs(layer, new, CONTEXT)) < 1e-5


def test_a_difference_is_seen() -> None:
    layer = one_layer(RELEASED, 2)
    inputs = random_inputs(layer, 4, 16)
    absorbed = layer.absorbed
    layer.absorbed = lambda *given: 1.01 * absorbed(*given)
    assert largest_difference(layer, inputs) == pytest.approx(0.01, rel=0.01)


def median_ratio(new: int, rounds: int = 5) -> float:
    layer = one_layer(RELEASED, 8)
    inputs = random_inputs(layer, new, CONTEXT)
    side_by_side(layer, inputs)
    return statistics.median(side_by_side(layer, inputs).ratio for _ in range(rounds))


def test_the_clock_agrees_with_the_count_on_both_sides_of_the_crossing() -> None:
    """Far enough from it (factors of 3.6 and 2.1 in FLOPs) that no machine should see it the other way round."""
    assert 32 < crossing(RELEASED, CONTEXT) < 512
    for new in (32, 512):
        flops = attention_flops(RELEASED, new, CONTEXT)
        assert (median_ratio(new) > 1) == (flops.rebuilt > flops.absorbed), f"{new} new tokens"
    assert median_ratio(1) > 3


def test_ratio_says_how_much_faster_absorbed_is() -> None:
    assert Seconds(expanded=3.0, absorbed=1.5).ratio == 2


def test_the_shortest_ratio_takes_the_best_run_of_each_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of known lengths; the first only sets up and does not count."""
    lengths = iter([Seconds(0.1, 0.01), Seconds(9.0, 3.0), Seconds(6.0, 5.0), Seconds(8.0, 2.0)])
    monkeypatch.setattr(decode, "side_by_side", lambda *_: next(lengths))
    layer = one_layer(RELEASED, 2)
    assert shortest_ratio(layer, random_inputs(layer, 1, 8), runs=3) == 3.0
