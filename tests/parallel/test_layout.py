"""The pieces of every process together are the model, each number as often as the plan says."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from dsv3_mini.config import ModelConfig
from dsv3_mini.ledger import count_parameters
from dsv3_mini.parallel.layout import layouts
from dsv3_mini.parallel.mesh import Mesh
from dsv3_mini.parallel.plan import ParallelPlan

# 50 is no multiple of the processes, 6 experts leave 3 for two: both are cut unevenly or through.
ODD = ModelConfig.preset("nano", vocab_size=50, n_routed_experts=6, n_group=1, topk_group=1)


@contextmanager
def pretend(plan: ParallelPlan, cfg: ModelConfig, rank: int = 0) -> Iterator[Mesh]:
    """A mesh of processes that are not there: where things lie needs no messages."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=plan.processes)
    try:
        yield Mesh.join(plan, cfg)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "fields",
    [
        {"dp_replicate": 2, "dp_shard": 3},
        {"dp_shard": 4, "ep": 2},
        {"dp_shard": 8, "ep": 2, "ep_nodes": 2},
        {"dp_replicate": 2, "dp_shard": 4, "ep": 2},
        {"dp_replicate": 6, "ep": 3},
    ],
    ids=str,
)
def test_pieces_cover_each_weight_evenly(fields: dict[str, int]) -> None:
    plan = ParallelPlan(**fields)
    with pretend(plan, ODD) as mesh:
        for name, layout in layouts(ODD, mesh).items():
            held = torch.zeros(layout.shape, dtype=torch.long)
            for rank in range(plan.processes):
                held[layout.piece(rank)] += 1
            assert (held == layout.copies).all(), name
            shared = plan.dp_shard if "experts." not in name or "shared" in name else plan.ep * plan.expert_shard
            assert layout.copies == plan.data // shared, name


def test_the_report_has_all_of_the_released_model() -> None:
    """One stage's 128 processes, were there but one stage: what they hold adds up to the ledger, to the parameter."""
    cfg, plan = ModelConfig.preset("671b"), ParallelPlan(dp_shard=128, ep=64, ep_nodes=8, zero=1)
    held: Counter[int] = Counter()
    with pretend(plan, cfg) as mesh:
        alike = Counter(layouts(cfg, mesh).values())
        for layout, tensors in alike.items():
            for rank in range(plan.processes):
                held[rank] += tensors * math.prod(s.stop - s.start for s in layout.piece(rank))
    biases = (cfg.num_hidden_layers - cfg.first_k_dense_replace + cfg.num_nextn_predict_layers) * cfg.n_routed_experts
    assert held.total() == count_parameters(cfg).live - biases  # no weights: every process has them all
    assert max(held.values()) < 1.01 * min(held.values())


def test_expert_parallel_processes_of_a_node_are_neighbours() -> None:
    plan = ParallelPlan(dp_shard=16, ep=8, ep_nodes=2)
    cfg = ModelConfig.preset("nano")
    for rank, nodes, inside in [(0, [0, 4], [0, 1, 2, 3]), (6, [2, 6], [4, 5, 6, 7]), (13, [9, 13], [12, 13, 14, 15])]:
        with pretend(plan, cfg, rank) as mesh:
            over, within = (dist.get_process_group_ranks(leg.group) for leg in mesh.way(cfg.n_routed_experts))
            assert (over, within) == (nodes, inside)
            assert mesh.way(8)[-1].first == 4 * (rank % 8 // 4)
