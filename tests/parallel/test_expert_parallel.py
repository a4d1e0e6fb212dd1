"""Experts on four processes against the same experts in one: the extremes of routing, exact, and no token dropped.

For every kind of hop. Of FP8 the reference rounds at the same places by hand: what goes out, tile after tile, to E4M3; what
comes home, each member's sum, to BF16.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import fake_deep_ep
import pytest
import torch
import torch.distributed as dist
from by_the_tile import error, rounded
from ranks import together
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dsv3_mini.config import ModelConfig
from dsv3_mini.errors import ConfigError
from dsv3_mini.fp8.convert import to_fp8
from dsv3_mini.fp8.experts import FP8GroupedExperts
from dsv3_mini.fp8.recipe import Fp8Recipe
from dsv3_mini.model.experts import Dispatched, GroupedExperts, LoopExperts
from dsv3_mini.model.moe import MoE
from dsv3_mini.parallel import deep_ep
from dsv3_mini.parallel.deep_ep import DeepEpLeg
from dsv3_mini.parallel.dispatch import DISPATCHES, dispatch
from dsv3_mini.parallel.expert_parallel import FP8ParallelExperts, Leg, ParallelExperts, legs, spread_experts
from dsv3_mini.parallel.fp8_hop import Fp8Hop, packed, unpacked
from dsv3_mini.parallel.hop import Hop
from dsv3_mini.parallel.traffic import Cluster, journey, row_bytes

CFG = ModelConfig.preset("nano", hidden_size=16, moe_intermediate_size=8, num_experts_per_tok=3)
EXPERTS, K, WIDTH, RANKS = CFG.n_routed_experts, CFG.num_experts_per_tok, CFG.hidden_size, 4


class WholeNumbers(GroupedExperts):
    """Expert i multiplies by i + 1, its gate weighs: in FP32 whole numbers add up exactly, in any order.

    In FP8, too, up to 16, and up to 256 in BF16.
    """

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


HOPS = {"plain": Hop, "fp8": Fp8Hop}
RANGE = {"plain": (8, 3), "fp8": (2, 2)}  # of whole numbers in tokens and in gradients, so that all sums are exact


def ways(rank: int) -> dict[tuple[str, str], tuple[Leg, ...]]:
    """The four processes as one node of four, and as two nodes of two, with every kind of hop."""
    alone = [dist.new_group([r]) for r in range(RANKS)][rank]
    across = [dist.new_group([0, 2]), dist.new_group([1, 3])][rank % 2]
    inside = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
    groups = {"one leg": (alone, dist.group.WORLD), "two legs": (across, inside)}
    return {(name, kind): legs(EXPERTS, *groups[name], hop) for name in groups for kind, hop in HOPS.items()}


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
        gates = torch.randint(1, 5, (tokens, K), generator=draw).float()
        exact, real = WholeNumbers(CFG), GroupedExperts(CFG)
        for parameter in (*exact.parameters(), *real.parameters()):
            parameter.data.normal_(0, 0.3, generator=draw)
        # The closed form, without any of the code that is tested: each choice multiplies by its number and its gate.
        factor = (gates * (chosen + 1)).sum(dim=1, keepdim=True)
        for (name, kind), way in way_of.items():
            where = f"{case}, {name}, {kind}, process {rank}"
            large, steep = RANGE[kind]
            whole = torch.randint(-large, large + 1, (tokens, WIDTH), generator=draw).float()
            weight = torch.randint(-steep, steep + 1, (tokens, WIDTH), generator=draw).float()
            got = run(ParallelWholeNumbers(exact, way), whole[own], chosen[own], gates[own], weight[own])
            assert torch.equal(got["out"], (whole * factor)[own]), where
            assert torch.equal(got["x"], (weight * factor)[own]), where
            assert torch.equal(got["gates"], ((whole * weight).sum(dim=1, keepdim=True) * (chosen + 1))[own]), where
            assert messages(way, chosen[own], rank) == walked(way, chosen, counts), where
            if kind == "fp8":
                rounds_where_it_should(way, exact, chosen[own], gates[own], where)
                fp8_experts_are_those_of_one_process(way, real, chosen, gates, own, where)
                continue
            parallel = ParallelExperts(real, way)
            here = slice(parallel.first, parallel.first + parallel.held)
            alone, all_tokens = (run(real, whole[s], chosen[s], gates[s], weight[s]) for s in (own, slice(None)))
            got = run(parallel, whole[own], chosen[own], gates[own], weight[own])
            for what in got:
                expected = all_tokens[what][here] if what.endswith("proj") else alone[what]
                torch.testing.assert_close(got[what], expected, rtol=1e-5, atol=1e-4, msg=f"{where}: {what}")
    bytes_on_the_wire(rank, way_of)
    deep_ep_makes_the_same_trip(rank, way_of["one leg", "fp8"])


# ---- FP8 ---------------------------------------------------------------------------------------------------------------


def home_again(x: Tensor, chosen: Tensor, factor: Tensor, nodes: int) -> Tensor:
    """What comes home if expert i multiplies by factor[:, slot]: FP32 sums on each process, BF16 on each leg.

    One token after the other, in the order in which one process adds: experts by number, processes, then nodes.
    """
    behind = EXPERTS // RANKS
    out = torch.zeros_like(x)
    for token in range(len(x)):
        slots = sorted(range(K), key=lambda slot: int(chosen[token, slot]))
        for node in range(nodes):
            total = torch.zeros(WIDTH)
            for process in range(node * RANKS // nodes, (node + 1) * RANKS // nodes):
                part = torch.zeros(WIDTH)
                for slot in slots:
                    if int(chosen[token, slot]) // behind == process:
                        part = part + x[token] * factor[token, slot]
                total = total + part.bfloat16().float()
            out[token] += total.bfloat16().float() if nodes > 1 else total
    return out


def rounds_where_it_should(
    way: tuple[Leg, ...], exact: GroupedExperts, chosen: Tensor, gates: Tensor, where: str
) -> None:
    """Bit for bit: tokens of any size, an outlier in some, experts that only multiply."""
    draw = torch.Generator().manual_seed(3)
    x, weight = (torch.randn(len(chosen), WIDTH, generator=draw) for _ in range(2))
    x[::3, 5] *= 1000
    gates = gates + 0.37
    got = run(ParallelWholeNumbers(exact, way), x, chosen, gates, weight)
    small, steep = (rounded(each, (1, 128), power_of_two=True) for each in (x, weight))
    factor = gates * (chosen + 1)
    assert torch.equal(got["out"], home_again(small, chosen, factor, len(way))), where
    assert torch.equal(got["x"], home_again(steep, chosen, factor, len(way))), where
    by_hand = (small * steep).sum(dim=1, keepdim=True) * (chosen + 1)
    torch.testing.assert_close(got["gates"], by_hand, rtol=1e-5, atol=1e-4, msg=where)


EXACT = Fp8Recipe(backend="exact")


def fp8_experts_are_those_of_one_process(
    way: tuple[Leg, ...], real: GroupedExperts, chosen: Tensor, gates: Tensor, own: slice, where: str
) -> None:
    """Experts with FP8 products behind FP8 hops, against one process that rounds tokens and gradients before its own.

    Its products round what arrives a second time, with the same scales, which changes nothing. What differs: partial sums come
    home in BF16 (2^-9 of each, at most, and by the square root of twelve less on average), and an FP32 sum in another order may
    push a number of the next product over an edge of E4M3.
    """
    draw = torch.Generator().manual_seed(4)
    x, weight = (torch.randn(len(chosen), WIDTH, generator=draw) for _ in range(2))
    small, steep = (rounded(each, (1, 128), power_of_two=True) for each in (x, weight))
    twin = GroupedExperts(CFG)
    twin.load_state_dict(real.state_dict())
    parallel = FP8ParallelExperts(to_fp8(twin, EXACT), way)
    assert parallel.recipe is EXACT
    here = slice(parallel.first, parallel.first + parallel.held)
    everything = run(twin, small, chosen, gates, steep)
    got = run(parallel, x[own], chosen[own], gates[own], weight[own])
    for what in got:
        expected = everything[what][here] if what.endswith("proj") else everything[what][own]
        if expected.any():
            assert error(got[what], expected) < 3e-3, f"{where}: {what}"
        else:
            assert not got[what].any(), f"{where}: {what}"


class Wires(TorchDispatchMode):
    """Adds up the bytes of all that is exchanged, by the type of the numbers; this process's messages to itself included."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        name = func.name()
        if name == "c10d::alltoall_base_":
            self.sent[args[1].dtype] += args[1].nbytes
        elif name == "_c10d_functional::all_to_all_single":
            self.sent[args[0].dtype] += args[0].nbytes
        return func(*args, **(kwargs or {}))


def bytes_on_the_wire(rank: int, way_of: dict[tuple[str, str], tuple[Leg, ...]]) -> None:
    """Copies as many as the routing says, and each as many bytes as `row_bytes` says, there and home, forward and backward."""
    cfg = CFG.replace(hidden_size=160)  # a tile of 128 and a ragged one
    torch.manual_seed(5)
    chosen = torch.stack([torch.randperm(EXPERTS)[:K] for _ in range(10)])
    x, gates = torch.randn(10, 160, dtype=torch.bfloat16), torch.rand(10, K)
    experts = GroupedExperts(cfg).bfloat16()
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.1)
    for (name, kind), way in way_of.items():
        copies = 0  # that leave this process, and that it gets
        back = 0
        for leg, choices in zip(way, arriving(way, chosen), strict=True):
            hop = Hop(leg.group, leg.needed(choices))
            copies, back = copies + sum(hop.leaving), back + sum(hop.arriving)
        there, home = row_bytes(160, kind)
        with Wires() as wires:
            run(ParallelExperts(experts, way), x, chosen, gates, torch.ones_like(x))
        where = f"{name}, {kind}, process {rank}"
        out, in_bf16 = (
            2 * copies * there,
            2 * back * home,
        )  # tokens and gradients of results; results and gradients of tokens
        if kind == "plain":
            assert wires.sent[torch.bfloat16] == out + in_bf16 and not wires.sent[torch.uint8], where
        else:
            assert (wires.sent[torch.uint8], wires.sent[torch.bfloat16]) == (out, in_bf16), where
            assert 0.5 < there / home < 0.51, where


def arriving(way: tuple[Leg, ...], chosen: Tensor) -> list[Tensor]:
    """The choices that stand before each leg."""
    found = []
    for leg in way:
        found.append(chosen)
        chosen = Hop(leg.group, leg.needed(chosen)).there(chosen)
    return found


# ---- DeepEP ------------------------------------------------------------------------------------------------------------


def deep_ep_makes_the_same_trip(rank: int, way: tuple[Leg, ...]) -> None:
    """With the package's stand-in, whose combine sums in FP32 and rounds once to BF16: the model computes in BF16, too."""
    sys.modules["deep_ep"] = fake_deep_ep
    experts = GroupedExperts(CFG.replace(hidden_size=256))
    torch.manual_seed(6)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.1)
    experts, leg = experts.bfloat16(), DeepEpLeg(EXPERTS, dist.group.WORLD)
    for case, (chosen, counts) in extremes().items():
        own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        x, weight = (torch.randn(len(chosen), 256, dtype=torch.bfloat16)[own] for _ in range(2))
        gates = torch.rand(len(chosen), K)[own]
        fake_deep_ep.Buffer.calls.clear()
        ours, theirs = (run(ParallelExperts(experts, each), x, chosen[own], gates, weight) for each in (way, (leg,)))
        for what in ours:
            assert torch.equal(theirs[what], ours[what]), f"{case}, process {rank}: {what}"
        once = ("dispatch", "combine", "combine, weights", "dispatch, known")
        assert fake_deep_ep.Buffer.calls == dict.fromkeys(once, 1)
    assert fake_deep_ep.Buffer.made == 1, "one buffer for all layers and steps"


def test_deep_ep_says_why_it_cannot_run_and_what_to_use(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="dispatch 'deep_ep' cannot run here: .*: use 'fp8'$"):
        dispatch("deep_ep")
    monkeypatch.setattr(deep_ep, "no_hopper", lambda: None)
    monkeypatch.setitem(sys.modules, "deep_ep", None)
    monkeypatch.setattr(deep_ep.importlib.util, "find_spec", lambda name: None)
    assert deep_ep.missing() == (
        "the package deep_ep is not installed: use 'fp8', or install github.com/deepseek-ai/DeepEP"
    )
    monkeypatch.setattr(deep_ep.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(deep_ep, "_package", lambda: fake_deep_ep)
    assert deep_ep.missing() is None and dispatch("deep_ep") is DISPATCHES["deep_ep"]
    monkeypatch.delattr(fake_deep_ep.Buffer, "combine")
    assert deep_ep.missing() == "the installed deep_ep has no Buffer.combine: install a release that has, or use 'fp8'"
    with pytest.raises(ConfigError, match="dispatch 'smoke' is not known: choose one of plain, fp8, deep_ep"):
        dispatch("smoke")


def test_deep_ep_takes_widths_of_whole_tiles() -> None:
    alone = SimpleNamespace(size=lambda: 1)
    with pytest.raises(
        ConfigError, match=r"hidden_size = 192 must be a multiple of 128 for DeepEP: use dispatch 'fp8'"
    ):
        DeepEpLeg(8, alone).buffer(192)


# ---- by itself ---------------------------------------------------------------------------------------------------------


def test_a_message_is_its_numbers_and_exponents_and_changes_nothing_the_second_time() -> None:
    x = torch.randn(7, 300) * torch.exp2(torch.randint(-20, 20, (7, 1)).float())
    x[2], x[3, 5] = 0, torch.nan
    message = packed(x)
    assert message.dtype == torch.uint8 and message.shape == (7, row_bytes(300, "fp8")[0])
    once = unpacked(message, 300, torch.float32)
    assert torch.equal(once[:3], rounded(x[:3], (1, 128), power_of_two=True))
    assert once[3, :128].isnan().all() and not once[3, 128:].isnan().any(), (
        "a tile with a NaN is NaN, and the others are not"
    )
    assert torch.equal(unpacked(packed(once), 300, torch.float32)[:3], once[:3])
    assert torch.equal(unpacked(message, 300, torch.bfloat16).float()[:3], once[:3]), "BF16 holds them exactly"


def test_experts_of_an_unknown_kind_are_not_spread() -> None:
    moe = nn.ModuleDict({"layer": MoE(CFG, layer=1, experts=LoopExperts)})
    with pytest.raises(ConfigError, match="layer.experts: LoopExperts cannot be spread"):
        spread_experts(moe, ())
    assert isinstance(to_fp8(MoE(CFG, layer=1)).experts, FP8GroupedExperts)


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
