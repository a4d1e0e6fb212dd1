"""Timelines against the longest path, costs against two streams walked by hand; what the IR counts."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_mini.parallel.schedule_checker import check, check_timeline
from dsv3_mini.parallel.schedule_costs import ChunkCosts, Part, PhaseCosts
from dsv3_mini.parallel.schedule_ir import Op, Phase, Schedule, ScheduleError, Slot, slot
from dsv3_mini.parallel.schedule_simulator import simulate
from dsv3_mini.parallel.schedules import SCHEDULES, make_schedule
from dsv3_mini.parallel.schedules.dualpipe import dualpipe, dualpipev
from dsv3_mini.parallel.schedules.one_f_one_b import one_f_one_b

# ---- when things run ---------------------------------------------------------------------------------------------------


def longest_paths(schedule: Schedule, costs: PhaseCosts) -> dict[tuple[int, int], float]:
    """End of each slot (rank, number) by another way: write down the edges, grow lengths until none grows any more."""
    nodes, of = {}, {}
    for rank, line in enumerate(schedule.lines()):
        for number, text in enumerate(line.split()):
            ops = []
            for part in text.split("&"):
                way, bare = part.count("'"), part.rstrip("'")
                letter = next(c for c in bare if c.isalpha())
                stage, microbatch = map(int, bare.split(letter))
                ops.append((letter, stage, microbatch, way))
                of[letter, stage, microbatch, way] = (rank, number)
            nodes[rank, number] = ops
    edges = defaultdict(list)
    for (rank, number), ops in nodes.items():
        if number:
            edges[rank, number].append((rank, number - 1))
        for letter, stage, microbatch, way in ops:
            key = (microbatch, way)
            if letter == "F":
                wanted = [("F", stage - 1, *key)]
            elif letter == "W":
                wanted = [("I", stage, *key)]
            else:
                wanted = [("F", stage, *key), ("B", stage + 1, *key), ("I", stage + 1, *key)]
            edges[rank, number] += [of[one] for one in wanted if one in of]
    length = {node: {1: costs.of(ops[0][0]), 2: costs.both}[len(ops)] for node, ops in nodes.items()}
    ends, grown = dict(length), True
    while grown:
        grown = False
        for node, before in edges.items():
            end = length[node] + max((ends[one] for one in before), default=0)
            if end > ends[node]:
                ends[node], grown = end, True
    return ends


@pytest.mark.parametrize("name", SCHEDULES)
def test_nothing_waits_longer_than_the_longest_path(name: str) -> None:
    pick = random.Random(0)
    for ranks, rounds in ((2, 2), (4, 3), (6, 2)):
        schedule = make_schedule(name, ranks, rounds * ranks)
        forward, inputs, weight = (Fraction(pick.randint(1, 40), 8) for _ in range(3))
        costs = PhaseCosts(forward, inputs, weight, forward + inputs + weight - Fraction(1, 16))
        timeline = simulate(schedule, costs)
        found = {(rank, i): end for rank, row in enumerate(timeline.end) for i, end in enumerate(row)}
        assert found == longest_paths(schedule, costs)
        assert timeline.span == max(found.values())
        computed = [
            end - start
            for rows in zip(timeline.start, timeline.end, strict=True)
            for start, end in zip(*rows, strict=True)
        ]
        assert sum(computed) == sum(timeline.busy(rank) for rank in range(ranks))


def test_a_small_one_is_as_drawn_by_hand() -> None:
    """Two ranks, two microbatches, F = 1, B = 2:

    rank 0   F0 F1 .  .  B0 B0 .  B1 B1
    rank 1   .  F0 B0 B0 F1 B1 B1 .  .
    """
    timeline = simulate(one_f_one_b(2, 2))
    assert timeline.start == ((0, 1, 4, 7), (1, 2, 4, 5))
    assert timeline.end == ((1, 2, 6, 9), (2, 4, 5, 7))
    assert (timeline.span, timeline.bubble, timeline.idle(0), timeline.busy(1)) == (9, 3, 3, 6)
    assert timeline.bubble_share == pytest.approx(3 / 9)
    assert [timeline.held_at(time) for time in (-1, 0, 1, 1.5, 2, 4, 6, 7, 8.9, 9)] == [
        (0, 0), (1, 0), (2, 1), (2, 1), (2, 1), (2, 1), (1, 1), (1, 0), (1, 0), (0, 0),
    ]  # fmt: skip


def test_overlap_is_atomic() -> None:
    """A pair begins when both halves can, and gives both results at its end."""
    timeline = simulate(dualpipev(2, 4), PhaseCosts(1, 1, 1, 10))
    schedule = timeline.schedule
    pairs = [
        (rank, number) for rank, row in enumerate(schedule.order) for number, one in enumerate(row) if one.kind == "F&B"
    ]
    assert pairs
    for rank, number in pairs:
        assert timeline.end[rank][number] - timeline.start[rank][number] == 10
    check_timeline(timeline)


def test_a_cheaper_overlap_makes_the_step_shorter_by_what_it_hides() -> None:
    """In the long middle of DualPipe every slot is a pair: one more microbatch each way costs two pairs."""
    for both in (3, Fraction(5, 2), 2):
        costs = PhaseCosts(1, 1, 1, both)
        spans = [simulate(dualpipe(8, microbatches), costs).span for microbatches in (24, 26, 28)]
        assert spans[1] - spans[0] == spans[2] - spans[1] == 2 * both


def test_a_standstill_is_told() -> None:
    plain = one_f_one_b(2, 2)
    hole = replace(plain, order=(plain.order[0][1:], plain.order[1]))
    with pytest.raises(ScheduleError, match=r"rank 0 waits in slot 1 \(B of microbatch 0 at stage 0\) for the activation of "
                       "microbatch 0 from stage 0, which no rank gives"):  # fmt: skip
        simulate(hole)


# ---- what it costs -----------------------------------------------------------------------------------------------------


def test_costs_of_a_stage_add_up() -> None:
    costs = PhaseCosts(2, 3, 1)
    assert [costs.of(kind) for kind in ("F", "I", "W", "B", "F&B")] == [2, 3, 1, 4, 6]
    assert costs.scaled(0.5) == PhaseCosts(1, 1.5, 0.5)
    assert PhaseCosts(2, 3, 1, 5).scaled(2) == PhaseCosts(4, 6, 2, 10)
    for name in ("forward", "input", "weight", "overlapped"):
        for value in (-1, float("nan"), float("inf")):
            with pytest.raises(ScheduleError, match=f"{name} = .* must be a time of at least 0"):
                PhaseCosts(**{name: value})


def test_without_communication_nothing_is_hidden() -> None:
    costs = ChunkCosts(Part(1, 2, 3), Part(4, 5, 6), 0, 0, layers=3).phases()
    assert (costs.forward, costs.input, costs.weight, costs.both) == (15, 21, 27, 63)


def test_overlap_of_one_layer_is_as_drawn_by_hand() -> None:
    """Attention 2, 2, 1 and MLP 3, 3, 2; dispatch 2, combine 4 (and the other way round going back).

    computes      ATTN(F) 0-2   MLP(B) 2-5   MLP(W) 5-7   MLP(F) 7-10   ATTN(B) 10-12   ATTN(W) 12-13
    communicates  COMBINE(B) 0-2   DISPATCH(F) 2-4   DISPATCH(B) 5-9   COMBINE(F) 10-14
    """
    chunk = ChunkCosts(Part(2, 2, 1), Part(3, 3, 2), dispatch=2, combine=4)
    assert {piece.name: (piece.start, piece.end) for piece in chunk.overlap()} == {
        "ATTN(F)": (0, 2), "MLP(B)": (2, 5), "MLP(W)": (5, 7), "MLP(F)": (7, 10), "ATTN(B)": (10, 12), "ATTN(W)": (12, 13),
        "COMBINE(B)": (0, 2), "DISPATCH(F)": (2, 4), "DISPATCH(B)": (5, 9), "COMBINE(F)": (10, 14),
    }  # fmt: skip
    costs = chunk.phases()
    assert (costs.forward, costs.input, costs.weight, costs.both) == (11, 11, 3, 14)


sizes = st.integers(0, 12)


@given(
    attention=st.tuples(sizes, sizes, sizes), mlp=st.tuples(sizes, sizes, sizes), dispatch=sizes, combine=sizes,
    layers=st.integers(1, 4),
)  # fmt: skip
def test_overlap_keeps_every_layers_order_and_both_streams(
    attention: tuple[int, int, int], mlp: tuple[int, int, int], dispatch: int, combine: int, layers: int
) -> None:
    chunk = ChunkCosts(Part(*attention), Part(*mlp), dispatch, combine, layers)
    pieces = {(piece.name, piece.layer): piece for piece in chunk.overlap()}
    assert len(pieces) == len(chunk.overlap()) == 10 * layers
    for chain in (
        ["ATTN(F)", "DISPATCH(F)", "MLP(F)", "COMBINE(F)"],
        ["COMBINE(B)", "MLP(B)", "DISPATCH(B)", "ATTN(B)"],
    ):
        way = [pieces[name, layer] for layer in range(layers) for name in chain]
        assert all(first.end <= then.start for first, then in zip(way, way[1:], strict=False))
    for name, after in (("MLP(W)", "MLP(B)"), ("ATTN(W)", "ATTN(B)")):
        assert all(pieces[name, layer].start >= pieces[after, layer].end for layer in range(layers))
    for computes in (True, False):
        stream = sorted((p.start, p.end) for p in pieces.values() if p.computes == computes and p.end > p.start)
        assert all(end <= start for (_, end), (start, _) in zip(stream, stream[1:], strict=False))
    costs = chunk.phases()
    assert costs.forward == layers * (attention[0] + mlp[0] + dispatch + combine)
    assert costs.backward == layers * (sum(attention[1:]) + sum(mlp[1:]) + dispatch + combine)
    streams = (sum(attention) + sum(mlp), 2 * (dispatch + combine))
    longest = max(costs.forward, costs.input, *(layers * stream for stream in streams))
    assert longest <= costs.both <= costs.forward + costs.backward


def test_as_much_communication_as_computation_is_hidden() -> None:
    """The report's case: all-to-all about as long as computation. Alone it doubles F; in pairs it vanishes."""
    part = Part(1, 1, 1)
    for layers in (4, 40):
        costs = ChunkCosts(part, part, 1, 1, layers).phases()
        computing = layers * 6
        assert costs.forward == layers * 4 and costs.forward + costs.backward == layers * 10
        assert costs.both == computing


# ---- the data itself ---------------------------------------------------------------------------------------------------


def test_a_schedule_counts_what_it_keeps() -> None:
    plain, two = one_f_one_b(2, 3), dualpipe(4, 8)
    assert plain.held(0) == (1, 2, 2, 2, 2, 1) and plain.held(1) == (1, 1, 1, 1, 1, 1)
    assert plain.peak_activations == (2, 1)
    assert two.held(0) == (1, 2, 3, 4, 4, 4, 4, 5, 5, 4, 4, 3, 2, 2, 1, 1)
    assert two.stages_on(1) == ((1, 0), (2, 1)) and two.total_microbatches == 8 and two.directions == 2
    assert dualpipev(3, 6).stages_on(0) == ((0, 0), (5, 0))


def test_ops_have_letters_as_torch_writes_them_and_a_stroke_for_the_other_direction() -> None:
    assert str(Op(Phase.FORWARD, 12, 3)) == "3F12" and str(Op(Phase.WEIGHT, 0, 7, 1)) == "7W0'"
    pair = Slot((Op(Phase.FORWARD, 3, 0), Op(Phase.BACKWARD, 1, 3, 1)))
    assert (str(pair), pair.kind, slot(Phase.INPUT, 1, 2).kind) == ("0F3&3B1'", "F&B", "I")


def test_needs_and_gifts_fit_together() -> None:
    first, last, stages = Op(Phase.FORWARD, 5, 0), Op(Phase.INPUT, 5, 3), 4
    assert first.needs(stages) == () and [need.kind for need in last.needs(stages)] == ["activation"]
    assert Op(Phase.FORWARD, 5, 1).needs(stages) == (first.gives,)
    assert Op(Phase.BACKWARD, 5, 2).needs(stages) == (Op(Phase.FORWARD, 5, 2).gives, last.gives)
    assert Op(Phase.WEIGHT, 5, 3).needs(stages) == (last.gives,) and Op(Phase.WEIGHT, 5, 3).gives is None
    assert Op(Phase.INPUT, 5, 3, 1).gives != last.gives, "directions do not help each other"


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"microbatches": 0}, "microbatches = 0 must be a whole number of at least 1"),
        ({"rank_of": ()}, "rank_of must name a rank for every stage"),
        ({"rank_of": ((0, 1), (0,))}, "as many stages in each direction"),
        (
            {"rank_of": ((0, 2),)},
            r"rank_of names ranks \[0, 2\] and order has 2 rows: each of ranks 0 to 1 must hold a stage",
        ),
        ({"rank_of": ((0, 0),)}, r"rank_of names ranks \[0\]"),
    ],
)
def test_sizes_that_do_not_agree_are_refused(wrong: dict[str, object], words: str) -> None:
    with pytest.raises(ScheduleError, match=words):
        replace(one_f_one_b(2, 2), **wrong)


def test_own_schedules_are_checked_like_any() -> None:
    """A reader's: all forwards, then all backwards (GPipe). As fast as 1F1B, but nothing is freed in between."""
    ranks, microbatches = 3, 7
    order = tuple(
        tuple(slot(phase, number, rank) for phase in (Phase.FORWARD, Phase.BACKWARD) for number in range(microbatches))
        for rank in range(ranks)
    )
    own = Schedule("GPipe", microbatches, (tuple(range(ranks)),), order)
    check(own)
    assert simulate(own).span == simulate(one_f_one_b(ranks, microbatches)).span
    assert own.peak_activations == (7, 7, 7)
