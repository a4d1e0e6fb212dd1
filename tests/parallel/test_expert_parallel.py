"""Experts on four processes against the same experts in one: the extremes of routing, exact, and no token dropped."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from ranks import together
from torch import Tensor

from dsv3_mini.config import ModelConfig
from dsv3_mini.model.experts import Dispatched, GroupedExperts
from dsv3_mini.parallel.expert_parallel import Leg, ParallelExperts, legs
from dsv3_mini.parallel.hop import Hop
from dsv3_mini.parallel.traffic import Cluster, journey

CFG = ModelConfig.preset("nano", hidden_size=16, moe_intermediate_size=8, num_experts_per_tok=3)
EXPERTS, K, WIDTH, RANKS = CFG.n_routed_experts, CFG.num_experts_per_tok, CFG.hidden_size, 4


class WholeNumbers(GroupedExperts):
    """Expert i multiplies by i + 1, its gate weighs: in FP32 whole numbers add up exactly, in any order."""

    def compute(self, sent: Dispatched, weight: Tensor) -> Tensor:
        first = getattr(self, "first", 0)
        number = torch.arange(first, first + len(sent.load)).repeat_interleave(sent.load) + 1
        return sent.rows * (weight * number)[:, None]


class ParallelWholeNumbers(WholeNumbers, ParallelExperts):
    """The same, on processes."""


def extremes() -> dict[str, tuple[Tensor, list[int]]]:
    """Choices [T k], and how many of the tokens each process has."""
    draw = torch.Generator().manual_seed(1)
    scattered = torch.stack([torch.randperm(EXPERTS, generator=draw)[:K] for _ in range(23)])
    one_expert = torch.full((9, K), 5)  # not even different: all choices of all tokens fall on one expert
    last = torch.tensor([[7, 6, 7]] * 12)
    return {
        "scattered": (scattered, [6, 6, 6, 5]),
        "all to one expert": (one_expert, [3, 2, 2, 2]),
        "all to the last process": (last, [3, 3, 3, 3]),
        "only one process has tokens": (scattered, [0, 0, 23, 0]),
        "one token each": (scattered[:4], [1, 1, 1, 1]),
        "one token in all": (scattered[:1], [0, 1, 0, 0]),
        "no token at all": (scattered[:0], [0, 0, 0, 0]),
    }


def ways(rank: int) -> dict[str, tuple[Leg, ...]]:
    """The four processes as one node of four, and as two nodes of two."""
    alone = [dist.new_group([r]) for r in range(RANKS)][rank]
    across = [dist.new_group([0, 2]), dist.new_group([1, 3])][rank % 2]
    inside = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
    return {"one leg": legs(EXPERTS, alone, dist.group.WORLD), "two legs": legs(EXPERTS, across, inside)}


def run(experts: GroupedExperts, x: Tensor, chosen: Tensor, gates: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """Output and all gradients of sum(weight * experts(x))."""
    x, gates = x.clone().requires_grad_(), gates.clone().requires_grad_()
    experts.zero_grad()
    out = experts(x, chosen, gates, chosen.flatten().bincount(minlength=EXPERTS))
    (out * weight).sum().backward()
    return {"out": out.detach(), "x": x.grad, "gates": gates.grad} | {n: p.grad for n, p in experts.named_parameters()}


def four_processes(rank: int, folder: Path) -> None:
    way_of = ways(rank)
    for case, (chosen, counts) in extremes().items():
        own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        draw = torch.Generator().manual_seed(2)
        tokens = len(chosen)
        whole = torch.randint(-8, 9, (tokens, WIDTH), generator=draw).float()
        gates = torch.randint(1, 5, (tokens, K), generator=draw).float()
        weight = torch.randint(-3, 4, (tokens, WIDTH), generator=draw).float()
        exact, real = WholeNumbers(CFG), GroupedExperts(CFG)
        for parameter in (*exact.parameters(), *real.parameters()):
            parameter.data.normal_(0, 0.3, generator=draw)
        # The closed form, without any of the code that is tested: each choice multiplies by its number and its gate.
        factor = (gates * (chosen + 1)).sum(dim=1, keepdim=True)
        for name, way in way_of.items():
            where = f"{case}, {name}, process {rank}"
            got = run(ParallelWholeNumbers(exact, way), whole[own], chosen[own], gates[own], weight[own])
            assert torch.equal(got["out"], (whole * factor)[own]), where
            assert torch.equal(got["x"], (weight * factor)[own]), where
            assert torch.equal(got["gates"], ((whole * weight).sum(dim=1, keepdim=True) * (chosen + 1))[own]), where

            parallel = ParallelExperts(real, way)
            here = slice(parallel.first, parallel.first + parallel.held)
            alone, all_tokens = (run(real, whole[s], chosen[s], gates[s], weight[s]) for s in (own, slice(None)))
            got = run(parallel, whole[own], chosen[own], gates[own], weight[own])
            for what in got:
                expected = all_tokens[what][here] if what.endswith("proj") else alone[what]
                torch.testing.assert_close(got[what], expected, rtol=1e-5, atol=1e-4, msg=f"{where}: {what}")
            assert messages(way, chosen[own], rank) == walked(way, chosen, counts), where


def messages(way: tuple[Leg, ...], chosen: Tensor, rank: int) -> list[Counter]:
    """Of each leg, how many tokens all processes send to each other: {(from, to): tokens}."""
    totals = []
    for leg in way:
        hop = Hop(leg.group, leg.needed(chosen))
        chosen = hop.there(chosen)
        sent: list[int] = [0] * RANKS
        for to, count in zip(dist.get_process_group_ranks(leg.group), hop.leaving, strict=True):
            sent[to] = count
        table = torch.zeros(RANKS, RANKS, dtype=torch.long)
        table[rank] = torch.tensor(sent)
        dist.all_reduce(table)
        table.fill_diagonal_(0)
        totals.append(Counter({(i, j): int(table[i, j]) for i, j in table.nonzero().tolist()}))
    return totals


def walked(way: tuple[Leg, ...], chosen: Tensor, counts: list[int]) -> list[Counter]:
    """The same, each token followed on its own by `traffic.journey`."""
    cluster = Cluster(nodes=2 if len(way) == 2 else 1, gpus=4 // len(way), experts=2)
    homes = [rank for rank, count in enumerate(counts) for _ in range(count)]
    trips = [journey(cluster, token, home) for token, home in zip(chosen.tolist(), homes, strict=True)]
    inside = Counter(message for trip in trips for message in trip.inside)
    return [Counter(message for trip in trips for message in trip.network), inside][-len(way) :]


def test_routing_extremes_are_exact_and_no_token_is_dropped(tmp_path: Path) -> None:
    together(RANKS, four_processes, tmp_path)
