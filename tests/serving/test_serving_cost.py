"""Step times against the ledger's own sums on one card, wires against counted choices, overlap against its timetable."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_mini.config import ModelConfig
from dsv3_mini.errors import ConfigError
from dsv3_mini.ledger import count_parameters, flops_per_token
from dsv3_mini.ledger.decode import Machine, decode_step
from dsv3_mini.parallel.traffic import nodes_reached
from dsv3_mini.serving.cost import UnitCost, nodes_visited
from dsv3_mini.serving.overlap import Layer, overlapped, timetable
from dsv3_mini.serving.unit import DECODE, H800_CARD, PREFILL, Unit

LARGE, SMALL = ModelConfig.preset("671b"), ModelConfig.preset("16b")
PUBLISHED = {"input": 73_700, "output": 14_800}  # tokens a second and node of 8 GPUs
ALONE = Unit("one card", nodes=1, gpus=1, tp=1, slots=SMALL.n_routed_experts, card=H800_CARD, micro_batches=1)


# ---- one card: nothing travels, and the ledger's decode step is the whole story -----------------------------------------


@pytest.mark.parametrize(
    ("rows", "context", "new"), [(1, 1, 1), (1, 4096, 1), (16, 700, 1), (512, 3000, 1), (512, 3000, 16)]
)
def test_a_decode_step_on_one_card_is_the_ledgers(rows: int, context: int, new: int) -> None:
    fp8, bf16 = (Machine("", rate, H800_CARD.memory_rate) for rate in (H800_CARD.fp8, H800_CARD.bf16))
    expected = 0.0
    for work in decode_step(SMALL, rows, context, new):
        core = work.name == "attention over the cache"
        expected += work.seconds(bf16) if core else replace(work, bytes=work.bytes / 2).seconds(fp8)
    assert UnitCost(SMALL, ALONE).decode(rows, rows * context, new) == pytest.approx(expected, rel=1e-9)


def test_prefill_on_one_card_is_the_ledgers_flops() -> None:
    """With memory so fast that it takes no time, and one rate for all products."""
    card = replace(H800_CARD, memory_rate=1e30, fp8=1e15, bf16=1e15)
    lengths = [100, 4096, 1000]
    flops = sum(n * flops_per_token(SMALL, n).forward for n in lengths)
    norms = (
        2 * sum(lengths) * (count_parameters(SMALL).activated_without_embedding - count_parameters(SMALL).multiplied)
    )
    assert UnitCost(SMALL, replace(ALONE, card=card)).prefill(lengths) == pytest.approx(
        (flops - norms) / 1e15, rel=1e-6
    )


def test_the_weights_of_all_cards_are_the_model_and_its_redundant_experts() -> None:
    parameters = count_parameters(LARGE)
    one = parameters.moe_layers * parameters.expert.total
    for unit, redundant in ((PREFILL, 32), (DECODE, 64)):
        whole = UnitCost(LARGE, replace(unit, tp=unit.n_gpus)).weights_per_gpu * unit.n_gpus
        assert whole == pytest.approx(parameters.main + redundant * one, rel=1e-9)
        assert UnitCost(LARGE, unit).weights_per_gpu > whole / unit.n_gpus  # every group has an attention of its own


def test_an_imbalance_is_paid_where_products_take_the_time() -> None:
    even, odd = (UnitCost(LARGE, replace(PREFILL, micro_batches=1, imbalance=x)) for x in (1.0, 1.5))
    tokens = 65_536
    share = LARGE.num_experts_per_tok * 2 * count_parameters(LARGE).expert.multiplied * 58 * tokens / 32 / H800_CARD.fp8
    assert odd.prefill([4096] * 16) - even.prefill([4096] * 16) == pytest.approx(share / 2, rel=1e-6)


# ---- wires ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nodes", [1, 2, 4, 8])
def test_nodes_visited_are_those_of_random_choices(nodes: int) -> None:
    torch.manual_seed(nodes)
    groups = torch.rand(40_000, LARGE.n_group).topk(LARGE.topk_group).indices
    is_open = torch.zeros(40_000, LARGE.n_group, dtype=torch.bool).scatter(1, groups, True)
    chosen = torch.rand(40_000, 256).masked_fill(~is_open.repeat_interleave(32, dim=1), -1).topk(8).indices
    counted = nodes_reached(chosen, 256, nodes).sum(1).float().mean().item()
    assert nodes_visited(LARGE, nodes) == pytest.approx(counted, abs=0.02)  # 4 standard errors are about 0.015


def test_nodes_that_groups_do_not_fill_are_visited_without_a_limit() -> None:
    torch.manual_seed(0)
    chosen = torch.rand(40_000, 256).topk(8).indices
    counted = nodes_reached(chosen, 256, 64).sum(1).float().mean().item()
    assert nodes_visited(LARGE, 64) == pytest.approx(counted, abs=0.02)


def test_copies_of_the_reports_units() -> None:
    assert UnitCost(LARGE, DECODE).copies_between_nodes == pytest.approx(8 * 39 / 40)
    prefill = UnitCost(LARGE, PREFILL).copies_between_nodes
    assert prefill <= 3 and prefill < UnitCost(LARGE, replace(PREFILL, once_per="expert")).copies_between_nodes / 2


# ---- overlap ----------------------------------------------------------------------------------------------------------

seconds = st.floats(0.01, 10)


@settings(max_examples=100, deadline=None)
@given(seconds, seconds, seconds, seconds)
def test_the_sum_is_the_end_of_the_timetable_and_within_its_limits(a: float, d: float, e: float, c: float) -> None:
    layer = Layer(a, d, e, c)
    took = overlapped(layer, 9)
    assert took == pytest.approx(max(task.end for task in timetable(layer, 9)))
    assert 9 * max(2 * layer.compute, 2 * layer.network, layer.alone) <= took * (1 + 1e-12)
    assert took <= 9 * 2 * layer.alone * (1 + 1e-12)


def test_what_overlaps_is_hidden() -> None:
    """Short trips hide behind the card but for the first and the last one; long ones hide the card."""
    assert overlapped(Layer(1.0, 0.1, 1.0, 0.2), 50) == pytest.approx(50 * 4 + 0.2)
    assert overlapped(Layer(0.1, 1.0, 0.1, 1.0), 50) == pytest.approx(50 * 4 + 0.1)


def test_in_a_timetable_nothing_is_done_twice_at_a_time() -> None:
    tasks = timetable(Layer(1.0, 0.4, 0.7, 0.9), 5)
    for wanted in ({"attention", "experts"}, {"dispatch", "combine"}):
        own = sorted((t.start, t.end) for t in tasks if t.name in wanted)
        assert all(one[1] <= two[0] + 1e-12 for one, two in zip(own, own[1:], strict=False))
    for half in "AB":
        own = [t for t in tasks if t.half == half]
        assert len(own) == 20 and all(one.end <= two.start + 1e-12 for one, two in zip(own, own[1:], strict=False))
    ends = {0.0, *(t.end for t in tasks)}
    assert all(t.start in ends for t in tasks)  # nobody waits for nothing


# ---- the published figures ----------------------------------------------------------------------------------------------


def test_the_reports_units_come_within_a_factor_of_the_published_figures() -> None:
    """At 4K of context, peak rates and even experts: faster than what was measured, and by less than half."""
    prefill, decode = UnitCost(LARGE, PREFILL), UnitCost(LARGE, DECODE)
    lengths = [4096] * 32
    read = sum(lengths) / prefill.prefill(lengths) / PREFILL.nodes
    rows = decode.cache_tokens // 4096
    written = rows / decode.decode(rows, rows * 4096) / DECODE.nodes
    assert 1 < read / PUBLISHED["input"] < 1.5
    assert 1 < written / PUBLISHED["output"] < 1.5


def test_overlap_is_what_makes_prefill_reach_them() -> None:
    lengths = [4096] * 32
    alone = UnitCost(LARGE, replace(PREFILL, micro_batches=1)).prefill(lengths)
    assert sum(lengths) / alone / PREFILL.nodes < PUBLISHED["input"]


# ---- bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slots": 255}, "slots = 255 must be divisible"),
        ({"nodes": 0}, "nodes = 0"),
        ({"tp": 5}, "tp = 5 must divide the 32 cards"),
        ({"imbalance": 0.9}, "imbalance = 0.9 must be at least 1"),
        ({"micro_batches": 3}, "micro_batches = 3"),
        ({"once_per": "rack"}, "once_per = 'rack'"),
    ],
)
def test_a_unit_that_cannot_be_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(PREFILL, **change)


def test_a_model_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="slots = 32 must be at least the 256 experts"):
        UnitCost(LARGE, replace(PREFILL, slots=32))
    with pytest.raises(ConfigError, match="hold no cache"):
        UnitCost(LARGE, replace(PREFILL, nodes=1, slots=256))
    for change in ({"memory": 0.0}, {"network": float("inf")}, {"usable": 1.1}, {"fp8": True}):
        with pytest.raises(ConfigError, match=next(iter(change))):
            replace(H800_CARD, **change)
