"""Journeys and counts against walking the wires and counting on fingers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3_mini.config import ModelConfig
from dsv3_mini.errors import ConfigError
from dsv3_mini.parallel.traffic import (
    INSIDE_SPEED,
    NETWORK_SPEED,
    Cluster,
    fullest,
    journey,
    nodes_reached,
    row_bytes,
    traffic,
    wire_tables,
)

SMALL = Cluster(nodes=4, gpus=3, experts=2)
trips = given(
    home=st.integers(0, SMALL.n_gpus - 1),
    chosen=st.lists(st.integers(0, SMALL.n_experts - 1), min_size=1, max_size=8, unique=True),
)


def test_the_released_models_cluster() -> None:
    cluster, cfg = Cluster(nodes=8, gpus=8, experts=4), ModelConfig()
    assert (cluster.n_gpus, cluster.n_experts) == (64, cfg.n_routed_experts)
    assert cluster.nodes == cfg.n_group and cluster.gpus * cluster.experts == cfg.experts_per_group
    assert [cluster.gpu_of(e) for e in (0, 3, 4, 255)] == [0, 0, 1, 63]
    assert [cluster.node_of(g) for g in (0, 7, 8, 63)] == [0, 0, 1, 7]
    assert INSIDE_SPEED / NETWORK_SPEED == 3.2  # the report: 3.2 experts a node at no extra time


@pytest.mark.parametrize("wrong", [{"nodes": 0}, {"gpus": -1}, {"experts": 1.5}, {"nodes": True}])
def test_a_cluster_without_something_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))} = .* whole number of at least 1"):
        Cluster(**{"nodes": 2, "gpus": 2, "experts": 2, **wrong})


@trips
def test_once_per_node_every_expert_is_reached_and_no_wire_is_used_twice(home: int, chosen: list[int]) -> None:
    trip = journey(SMALL, chosen, home)
    reached = {home}
    for start, end in (*trip.network, *trip.inside):
        assert start in reached, "a copy leaves from where one has come"
        reached.add(end)
    assert {expert // 2 for expert in chosen} <= reached
    nodes = {expert // 6 for expert in chosen}
    assert sorted(end // 3 for _, end in trip.network) == sorted(nodes - {home // 3}), "one copy for each other node"
    assert all(start == home and end % 3 == home % 3 for start, end in trip.network)
    assert all(start // 3 == end // 3 and start != end for start, end in trip.inside)
    assert len({end for _, end in trip.inside}) == len(trip.inside)


@trips
def test_once_per_expert_each_gets_a_copy_of_its_own(home: int, chosen: list[int]) -> None:
    trip = journey(SMALL, chosen, home, once_per="expert")
    goals = sorted(expert // 2 for expert in chosen if expert // 2 != home)
    assert sorted(end for _, end in (*trip.network, *trip.inside)) == goals
    assert all(start == home for start, _ in (*trip.network, *trip.inside))
    assert all(end // 3 != home // 3 for _, end in trip.network)
    assert len(journey(SMALL, chosen, home).network) <= len(trip.network)


def test_messages_leave_in_the_order_of_the_choice() -> None:
    assert journey(SMALL, [23, 7, 12, 19], home=4).network == ((4, 10), (4, 7))  # nodes 3, own, 2, 3
    assert journey(SMALL, [7, 8, 6], home=4).inside == ((4, 3),)  # GPUs 3, 4 (home), 3
    assert journey(SMALL, [8, 9], home=4) == journey(SMALL, [8], home=4, once_per="expert")  # both at home: nothing
    assert journey(SMALL, [8], home=4).network == journey(SMALL, [8], home=4).inside == ()


@given(n_nodes=st.sampled_from([1, 2, 4, 8]), k=st.integers(1, 6), seed=st.integers(0, 999))
def test_counts_are_those_of_single_journeys(n_nodes: int, k: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    cluster = Cluster(n_nodes, gpus=16 // n_nodes, experts=1)
    chosen = torch.rand(13, 16, generator=random).topk(k).indices
    home = torch.randint(0, 16, (13,), generator=random)
    reached = nodes_reached(chosen, 16, n_nodes)
    assert reached.tolist() == [
        [any(e // (16 // n_nodes) == node for e in row) for node in range(n_nodes)] for row in chosen.tolist()
    ]
    by_hand = [[0] * n_nodes for _ in range(n_nodes)]
    for row, gpu in zip(chosen.tolist(), home.tolist(), strict=True):
        for start, end in journey(cluster, row, gpu).network:
            by_hand[cluster.node_of(start)][cluster.node_of(end)] += 1
    assert traffic(reached, home // cluster.gpus).tolist() == by_hand


def test_blind_choices_visit_as_many_nodes_as_the_formula_says() -> None:
    chosen = torch.rand(20_000, 64).topk(6).indices
    expected = 8 * (1 - math.comb(56, 6) / math.comb(64, 6))
    assert nodes_reached(chosen, 64, 8).sum(1).float().mean().item() == pytest.approx(expected, rel=0.01)


@given(shape=st.sampled_from([(4, 3, 2), (1, 4, 2), (3, 1, 4)]), k=st.integers(1, 6), seed=st.integers(0, 999))
def test_wire_tables_are_those_of_single_journeys(shape: tuple[int, int, int], k: int, seed: int) -> None:
    cluster, random = Cluster(*shape), torch.Generator().manual_seed(seed)
    chosen = torch.rand(11, cluster.n_experts, generator=random).topk(k).indices
    home = torch.randint(0, cluster.n_gpus, (11,), generator=random)
    by_hand = torch.zeros(2, cluster.n_gpus, cluster.n_gpus, dtype=torch.long)
    for row, gpu in zip(chosen.tolist(), home.tolist(), strict=True):
        trip = journey(cluster, row, gpu)
        for table, messages in zip(by_hand, (trip.network, trip.inside), strict=True):
            for start, end in messages:
                table[start, end] += 1
    network, inside = wire_tables(cluster, chosen, home)
    assert torch.equal(network, by_hand[0]) and torch.equal(inside, by_hand[1])


def test_the_fullest_sends_or_receives_most() -> None:
    assert fullest(torch.tensor([[0, 3, 1], [2, 0, 0], [9, 0, 0]])) == 11
    assert fullest(torch.tensor([[0, 3, 8], [2, 0, 0], [1, 0, 0]])) == 11


def test_bytes_of_a_row_at_the_released_width() -> None:
    """One byte a number, and 56 tiles; results in BF16."""
    assert row_bytes(7168, "plain") == (14336, 14336)
    assert row_bytes(7168, "fp8") == (7168 + 56, 14336)
    assert row_bytes(7168, "deep_ep") == (7168 + 4 * 56, 14336)
    assert row_bytes(130, "fp8") == (132, 260)
