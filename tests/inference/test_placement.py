"""Placements against sorting greedily, written again in plain Python, and against the best of all placements."""

from __future__ import annotations

import heapq
import itertools
import math
import random
import time

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import dsv3_mini as dsv3
from dsv3_mini.errors import ConfigError, DataError
from dsv3_mini.inference.live_load import LoadWindow
from dsv3_mini.inference.placement import Placement, place_experts, refresh, replicate

# ---- sorting greedily, in plain Python --------------------------------------------------------------------------------


def greedy_counts(load: list[float], slots: int) -> list[int]:
    busiest = [(-each, expert, 1) for expert, each in enumerate(load)]
    heapq.heapify(busiest)
    counts = [1] * len(load)
    for _ in range(slots - len(load)):
        _, expert, count = heapq.heappop(busiest)
        counts[expert] = count + 1
        heapq.heappush(busiest, (-load[expert] / (count + 1), expert, count + 1))
    return counts


def greedy_bins(weights: list[float], bins: int) -> list[list[int]]:
    held: list[list[int]] = [[] for _ in range(bins)]
    for item in sorted(range(len(weights)), key=lambda item: -weights[item]):
        room = [bin for bin in held if len(bin) < len(weights) // bins]
        min(room, key=lambda bin: sum(weights[i] for i in bin)).append(item)
    return held


def greedy_peak(load: list[float], slots: int, gpus: int) -> float:
    shares = [x / count for x, count in zip(load, greedy_counts(load, slots), strict=True) for _ in range(count)]
    return max(sum(shares[i] for i in held) for held in greedy_bins(shares, gpus))


def greedy_peak_by_nodes(load: list[float], slots: int, gpus: int, nodes: int, groups: int) -> float:
    size = len(load) // groups
    parts = [load[i * size : (i + 1) * size] for i in range(groups)]
    held = greedy_bins([sum(part) for part in parts], nodes)
    return max(greedy_peak([x for g in own for x in parts[g]], slots // nodes, gpus // nodes) for own in held)


def best_peak(load: list[float], slots: int, gpus: int) -> float:
    """The lightest busiest GPU of all counts and all ways to lay them out."""
    experts, room, best = len(load), slots // gpus, math.inf

    def lay_out(left: tuple[int, ...], peak: float) -> None:
        nonlocal best
        if peak >= best:
            return
        first = next((e for e in range(experts) if left[e]), None)
        if first is None:
            best = peak
            return
        # The next GPU takes the first expert that is left, and anything beside it.
        for others in set(itertools.combinations([e for e in range(experts) for _ in range(left[e])][1:], room - 1)):
            taken = [left[e] - (e == first) - others.count(e) for e in range(experts)]
            lay_out(tuple(taken), max(peak, shares[first] + sum(shares[e] for e in others)))

    for cuts in itertools.combinations(range(1, slots), experts - 1):
        counts = [b - a for a, b in itertools.pairwise((0, *cuts, slots))]
        shares = [x / count for x, count in zip(load, counts, strict=True)]
        if max(shares) < best:
            lay_out(tuple(counts), 0.0)
    return best


# ---- properties -------------------------------------------------------------------------------------------------------

loads = st.floats(0, 1e6) | st.integers(0, 5).map(float) | st.floats(-3, 3).map(lambda x: math.exp(3 * x))


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[list[float]], int, int, int, int]:
    """Loads of some layers, slots, GPUs, nodes, groups."""
    nodes, per_node = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    groups = nodes * draw(st.integers(1, 3))
    experts = groups * draw(st.integers(1, 4))
    gpus = nodes * per_node
    slots = gpus * draw(st.integers(math.ceil(experts / gpus), math.ceil(experts / gpus) + 3))
    layers = draw(st.lists(st.lists(loads, min_size=experts, max_size=experts), min_size=1, max_size=3))
    return layers, slots, gpus, nodes, groups


def peaks(placement: Placement, load: Tensor) -> list[float]:
    """The busiest GPU, in plain Python."""
    found = []
    for row, weights in zip(placement.expert.tolist(), load.tolist(), strict=True):
        room, share = len(row) // placement.gpus, [weights[e] / row.count(e) for e in row]
        found.append(max(sum(share[i : i + room]) for i in range(0, len(row), room)))
    return found


def tensor(layers: list[list[float]]) -> Tensor:
    return torch.tensor(layers, dtype=torch.float64)


@settings(max_examples=120, deadline=None)
@given(problems())
def test_never_worse_than_sorting_greedily(problem: tuple[list[list[float]], int, int, int, int]) -> None:
    layers, slots, gpus, nodes, groups = problem
    load = tensor(layers)
    everywhere = peaks(place_experts(load, slots, gpus), load)
    by_nodes = peaks(place_experts(load, slots, gpus, nodes=nodes, groups=groups), load)
    for row, anywhere, at_nodes in zip(layers, everywhere, by_nodes, strict=True):
        assert anywhere <= greedy_peak(row, slots, gpus) * (1 + 1e-9)
        assert at_nodes <= greedy_peak_by_nodes(row, slots, gpus, nodes, groups) * (1 + 1e-9)


@settings(max_examples=80, deadline=None)
@given(problems())
def test_replicas_are_exact(problem: tuple[list[list[float]], int, int, int, int]) -> None:
    layers, slots, gpus, nodes, groups = problem
    load = tensor(layers)
    experts = load.shape[1]
    for placement in (place_experts(load, slots, gpus), place_experts(load, slots, gpus, nodes=nodes, groups=groups)):
        assert placement.expert.shape == (len(layers), slots)
        for row, counts in zip(placement.expert.tolist(), placement.replicas.tolist(), strict=True):
            assert [row.count(e) for e in range(experts)] == counts and min(counts) >= 1 and sum(counts) == slots
        by_gpu = placement.gpu_load(load)
        assert by_gpu.amax(1).tolist() == pytest.approx(peaks(placement, load), rel=1e-9, abs=1e-9)
        assert by_gpu.sum(1).tolist() == pytest.approx(load.sum(1).tolist(), rel=1e-9, abs=1e-9)
    for row in placement.expert.tolist():  # by nodes: the groups of each node are no other node's
        own = [
            {e // (experts // groups) for e in row[n * slots // nodes : (n + 1) * slots // nodes]} for n in range(nodes)
        ]
        assert sum(map(len, own)) == groups and all(len(each) == groups // nodes for each in own)


@settings(max_examples=60, deadline=None)
@given(problems())
def test_the_busiest_replica_is_as_light_as_counts_can_make_it(
    problem: tuple[list[list[float]], int, int, int, int],
) -> None:
    """A limit x can be kept if and only if the experts' ceil(load / x) fit into the slots."""
    layers, slots, *_ = problem
    for row, counts in zip(layers, replicate(tensor(layers), slots).tolist(), strict=True):
        peak = max(x / count for x, count in zip(row, counts, strict=True))
        assume(peak > 1e-9)
        lower = peak * (1 - 1e-6)
        assert sum(max(1, math.ceil(x / lower)) for x in row) > slots


def test_small_cases_are_within_five_percent_of_the_best() -> None:
    draw, worst = random.Random(7), 1.0
    for _ in range(150):
        gpus, room = draw.choice([(2, 2), (2, 3), (2, 4), (3, 2), (3, 3), (4, 2), (4, 1)])
        slots = gpus * room
        experts = draw.randint(2, min(slots, 6))
        power = draw.choice([0.3, 1, 3])
        load = [draw.expovariate(1) ** power for _ in range(experts)]
        found, best = peaks(place_experts(tensor([load]), slots, gpus), tensor([load]))[0], best_peak(load, slots, gpus)
        assert found >= best * (1 - 1e-9)  # or the search for the best missed something
        worst = max(worst, found / best)
    assert worst <= 1.05


def test_the_released_model_takes_less_than_two_seconds() -> None:
    g = torch.Generator().manual_seed(0)
    popular = torch.randn(58, 256, generator=g).exp()
    zipf = 1 / (1 + torch.rand(58, 256, generator=g).argsort(dim=1))
    for load in (popular, zipf):
        for gpus, nodes in ((320, None), (64, None), (40, None), (64, 8), (32, None)):
            began = time.process_time()
            placement = place_experts(load, 320, gpus, nodes=nodes, groups=nodes and 8)
            assert time.process_time() - began < 2
            assert placement.expert.shape == (58, 320)


def test_evener_nodes_are_not_taken_where_they_make_a_busier_gpu() -> None:
    """Groups traded between nodes make the nodes even here, and the experts of one of them fit its GPUs badly."""
    load = [3, 1, 13, 3, 1, 20, 20, 9, 13, 1, 13, 13]
    placed = place_experts(tensor([load]), 12, 6, nodes=2, groups=6)
    greedy = greedy_peak_by_nodes([float(x) for x in load], 12, 6, nodes=2, groups=6)
    assert placed.gpu_load(tensor([load])).max() <= greedy == 22


def test_a_layer_is_placed_as_if_it_were_alone() -> None:
    load = torch.randn(6, 32, generator=torch.Generator().manual_seed(1)).exp()
    together = place_experts(load, 40, 8, nodes=2, groups=4)
    alone = [place_experts(row[None], 40, 8, nodes=2, groups=4).expert[0] for row in load]
    assert torch.equal(together.expert, torch.stack(alone))


# ---- refreshing -------------------------------------------------------------------------------------------------------


def test_a_refresh_changes_only_the_layers_that_gain_enough() -> None:
    even, odd = torch.ones(2, 8), torch.ones(2, 8)
    odd[1, :2] = 20.0
    before = place_experts(even, 8, 4)
    after = refresh(before, place_experts(odd, 8, 4), odd)
    assert torch.equal(after.expert[0], before.expert[0])
    assert after.imbalance(odd)[1] <= before.imbalance(odd)[1]
    slightly = odd.clone()
    slightly[:, 0] *= 1.02
    assert torch.equal(refresh(after, place_experts(slightly, 8, 4), slightly).expert, after.expert)


def test_a_refresh_never_makes_the_busiest_gpu_busier() -> None:
    g = torch.Generator().manual_seed(3)
    current = place_experts(torch.rand(20, 16, generator=g), 20, 4)
    for _ in range(5):
        load = torch.rand(20, 16, generator=g) ** 2
        after = refresh(current, place_experts(load, 20, 4), load)
        assert (after.gpu_load(load).amax(1) <= current.gpu_load(load).amax(1)).all()
        current = after


def test_moves_are_counted_by_gpu_not_by_slot() -> None:
    def placed(*experts: int) -> Placement:
        return Placement(torch.tensor([experts]), 4, 2)

    assert placed(0, 1, 2, 3).moved(placed(1, 0, 3, 2)) == 0
    assert placed(0, 1, 2, 3).moved(placed(2, 1, 0, 3)) == 2
    assert Placement(torch.tensor([[0, 0, 1, 2]]), 3, 2).moved(Placement(torch.tensor([[0, 1, 0, 2]]), 3, 2)) == 2


def test_the_window_sums_the_last_batches_of_a_model() -> None:
    torch.manual_seed(0)
    model = dsv3.DeepSeekV3(dsv3.ModelConfig.preset("nano")).eval()
    window, batches = LoadWindow(batches=2), [torch.randint(0, 64, (2, n)) for n in (5, 9, 7)]
    with torch.no_grad():
        for tokens in batches:
            window.add(model(tokens).routing)
        layers = [
            torch.cat([model(tokens).routing[i].chosen.flatten() for tokens in batches[1:]])
            for i in range(len(window.load))
        ]
    for load, chosen in zip(window.load, layers, strict=True):
        assert load.tolist() == [int((chosen == e).sum()) for e in range(len(load))]


# ---- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"slots": 7, "gpus": 1}, "slots = 7 must be at least the 8 experts"),
        ({"slots": 10, "gpus": 4}, "slots = 10 must be divisible by gpus = 4"),
        ({"slots": 8, "gpus": 0}, "gpus = 0 must be a whole number"),
        ({"slots": 8.0, "gpus": 2}, "slots = 8.0 must be a whole number"),
        ({"slots": 8, "gpus": 4, "nodes": 2}, "give both"),
        ({"slots": 8, "gpus": 4, "nodes": 2, "groups": 3}, "experts = 8 must be divisible by groups = 3"),
        ({"slots": 8, "gpus": 4, "nodes": 4, "groups": 2}, "groups = 2 must be divisible by nodes = 4"),
        ({"slots": 12, "gpus": 6, "nodes": 4, "groups": 4}, "gpus = 6 must be divisible by nodes = 4"),
    ],
)
def test_what_does_not_divide_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        place_experts(torch.ones(2, 8), **arguments)


@pytest.mark.parametrize(
    "load",
    [torch.ones(8), torch.ones(2, 0), -torch.ones(2, 8), torch.full((2, 8), torch.nan), torch.full((2, 8), torch.inf)],
)
def test_a_load_that_is_none_is_refused(load: Tensor) -> None:
    with pytest.raises(DataError, match="load"):
        place_experts(load, 8, 2)


def test_a_load_of_another_model_is_refused() -> None:
    placement = place_experts(torch.ones(2, 8), 8, 2)
    with pytest.raises(DataError, match=r"must be \[2, 8\]"):
        placement.gpu_load(torch.ones(2, 9))
    assert placement.imbalance(torch.zeros(2, 8)).tolist() == [1.0, 1.0]


def test_a_window_without_batches_says_so() -> None:
    with pytest.raises(ConfigError, match="batches = 0"):
        LoadWindow(0)
    with pytest.raises(DataError, match="no batch was added"):
        _ = LoadWindow(3).load
    with pytest.raises(DataError, match="no layers"):
        LoadWindow(3).add([])
