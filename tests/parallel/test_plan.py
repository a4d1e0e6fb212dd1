"""Which layouts are accepted, and what is said of the others."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from dsv3_mini.config import ModelConfig
from dsv3_mini.errors import ConfigError
from dsv3_mini.parallel.dispatch import DISPATCHES
from dsv3_mini.parallel.plan import DISPATCH_NAMES, ParallelPlan

NANO, RELEASED = ModelConfig.preset("nano"), ModelConfig.preset("671b")


def test_the_reports_layout() -> None:
    """Section 3.2: 2,048 GPUs, 16 stages, experts over 64 GPUs of 8 nodes, ZeRO-1, no tensor parallelism."""
    plan = ParallelPlan.preset("report")
    plan.check(RELEASED, 2048)
    assert (plan.pp, plan.ep, plan.ep_nodes, plan.zero, plan.tp) == (16, 64, 8, 1, 1)
    assert plan.data == 2048 // 16
    assert RELEASED.n_routed_experts // plan.ep == 4
    assert plan.expert_shard == plan.data // plan.ep == 2  # ZeRO-1 shares the state of an expert between its two GPUs


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ep": 0}, "ep = 0 must be a whole number of at least 1"),
        ({"pp": True}, "pp = True must be a whole number of at least 1"),
        ({"dp_shard": 2.0}, "dp_shard = 2.0 must be a whole number of at least 1"),
        ({"zero": 4}, "zero = 4 must be 1, 2 or 3"),
        ({"recompute": 1}, "recompute = 1 must be true or false"),
        ({"dispatch": "fp4"}, "dispatch = 'fp4' must be one of plain, fp8, deep_ep"),
        ({"dispatch": 8}, "dispatch = 8 must be one of plain, fp8, deep_ep"),
        ({"dp_shard": 4, "ep": 3}, r"ep = 3 must divide dp_shard \(4\)"),
        ({"dp_shard": 4, "dp_replicate": 2, "ep": 8}, r"ep = 8 must divide dp_shard \(4\)"),
        ({"dp_replicate": 4, "ep": 8}, r"ep = 8 must divide dp_replicate \(4\)"),
        ({"dp_shard": 4, "ep": 4, "ep_nodes": 3}, r"ep_nodes = 3 must divide ep \(4\)"),
        (
            {"pp": 2, "schedule": "DualPipe"},
            "schedule = 'DualPipe' must be one of torch's: GPipe, 1F1B, Interleaved1F1B, ",
        ),
        (
            {"schedule": "DualPipeV"},
            "schedule = 'DualPipeV' is an order of pipeline stages, and pp = 1 has but one: give a pp",
        ),
        ({"pp": 2, "tp": 2}, "tp = 2 cannot go with pp = 2: tp is for inference"),
    ],
)
def test_numbers_that_do_not_fit_together(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        ParallelPlan(**fields)


@pytest.mark.parametrize(
    ("fields", "changes", "processes", "message"),
    [
        ({"dp_shard": 4, "pp": 2}, {}, 4, r"the plan is for 8 processes \(pp 2 x dp_replicate 1 x dp_shard 4 x tp 1\), but 4 were started"),
        ({"dp_shard": 16, "ep": 16}, {}, 16, r"ep = 16 must divide n_routed_experts \(8\)"),
        ({"dp_shard": 24, "ep": 8}, {}, 24, r"dp_shard = 24 leaves 3 processes to share 1 experts .* hidden_size \(64\)"),
        ({"pp": 4}, {}, 4, r"pp = 4 must be at most num_hidden_layers \(3\)"),
        ({"pp": 2, "schedule": "DualPipeV"}, {}, 2,
         r"pp = 2 must be at most num_hidden_layers \(3\) / 2, as DualPipeV has 2 stages a process: a stage holds"),
        ({"tp": 8}, {}, 8, r"tp = 8 must divide num_attention_heads \(4\)"),
        ({"dp_shard": 8, "ep": 8, "ep_nodes": 8}, {}, 8, r"ep_nodes = 8 must divide n_group \(4\)"),
    ],
)  # fmt: skip
def test_plans_that_do_not_fit_the_model(fields: dict, changes: dict, processes: int, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        ParallelPlan(**fields).check(NANO.replace(**changes), processes)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"pp": 2, "dp_shard": 2},
            "zero = 3 cannot go with pp = 2: a stage keeps its weights and sums .* give zero = 1",
        ),
        ({"pp": 2, "dp_shard": 2, "zero": 2}, "zero = 2 cannot go with pp = 2"),
        (
            {"pp": 2, "schedule": "ZBVZeroBubble", "recompute": True},
            "schedule = 'ZBVZeroBubble' cannot go with recompute: ",
        ),
    ],
)
def test_plans_that_torch_does_not_train(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        ParallelPlan(**fields).check_training()
    for good in ({"pp": 2}, {"pp": 2, "dp_shard": 2, "zero": 1}, {"dp_shard": 2}, {"pp": 2, "recompute": True}):
        ParallelPlan(**good).check_training()
    ParallelPlan.preset("report").check_training()


def test_both_ways_to_lie_use_every_process_once() -> None:
    """All plans of up to 8 in each number: the experts' three numbers multiply to the data processes, too."""
    seen = 0
    for replicate, shard, ep in product(range(1, 9), repeat=3):
        try:
            plan = ParallelPlan(dp_replicate=replicate, dp_shard=shard, ep=ep)
        except ConfigError:
            assert (shard if shard > 1 else replicate) % ep
            continue
        seen += 1
        assert plan.expert_replicate * plan.expert_shard * ep == plan.data == plan.processes
        # No process holds of an expert what is not in its own copy of the other weights.
        assert plan.expert_shard * ep == shard or shard == 1
    assert seen > 100


def test_a_plan_knows_every_dispatch() -> None:
    assert tuple(DISPATCHES) == DISPATCH_NAMES
    assert [ParallelPlan(dispatch=name).dispatch for name in DISPATCHES] == ["plain", "fp8", "deep_ep"]


def test_an_unknown_layout() -> None:
    with pytest.raises(ConfigError, match="layout 'reprot' is not known: choose one of report"):
        ParallelPlan.preset("reprot")
