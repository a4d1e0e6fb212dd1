"""The report's Table 2, counted and simulated; schedules against torch's, each other and ones written by hand."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_mini.parallel.schedule_checker import check, check_timeline
from dsv3_mini.parallel.schedule_costs import PhaseCosts
from dsv3_mini.parallel.schedule_ir import Schedule, ScheduleError
from dsv3_mini.parallel.schedule_simulator import simulate
from dsv3_mini.parallel.schedules import SCHEDULES, bubble_formula, make_schedule
from dsv3_mini.parallel.schedules.dualpipe import dualpipe, dualpipev
from dsv3_mini.parallel.schedules.from_torch import from_torch
from dsv3_mini.parallel.schedules.gpipe import gpipe
from dsv3_mini.parallel.schedules.interleaved import interleaved
from dsv3_mini.parallel.schedules.one_f_one_b import one_f_one_b
from dsv3_mini.parallel.schedules.zero_bubble import zb1p
from dsv3_mini.parallel.torch_schedules import ONE_STAGE, TORCH_SCHEDULES

# Fractions: sums are exact, so bubbles are compared with ==.
times = st.fractions(Fraction(1, 10), 10, max_denominator=60)
few = settings(max_examples=30)  # each makes, runs and checks a schedule of up to thousands of slots


def idle(schedule: Schedule, costs: PhaseCosts | None = None) -> set[float]:
    """The bubbles of all ranks, in a timeline that has been checked."""
    timeline = simulate(schedule, costs)
    check_timeline(timeline)
    return {timeline.idle(rank) for rank in range(schedule.n_ranks)}


# ---- Table 2: bubbles --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pp", [1, 2, 3, 5, 8, 16])
@pytest.mark.parametrize("microbatches", [1, 2, 7, 16, 33])
def test_gpipe_and_1f1b_idle_as_the_table_says(pp: int, microbatches: int) -> None:
    for costs in (PhaseCosts(1, 1, 1), PhaseCosts(3, 4, 2), PhaseCosts(5, 1, 1)):
        for make in (gpipe, one_f_one_b):
            assert idle(make(pp, microbatches), costs) == {(pp - 1) * (costs.forward + costs.backward)}


@few
@given(pp=st.integers(1, 9), more=st.integers(0, 20), forward=times, inputs=times, part=st.fractions(0, 1))
def test_zb1p_idles_as_the_table_says(pp: int, more: int, forward: Fraction, inputs: Fraction, part: Fraction) -> None:
    weight = part * min(forward, inputs)  # the table's premise: a W is the shortest of the three
    formula = (pp - 1) * (forward + (inputs + weight) - 2 * weight)
    assert idle(zb1p(pp, pp + more), PhaseCosts(forward, inputs, weight)) == {formula}


@pytest.mark.parametrize(("pp", "bubble"), [(2, 0), (4, 2), (6, 4), (8, 6), (10, 8), (16, 14)])
@pytest.mark.parametrize("extra", [0, 2, 4, 14, 60])
def test_dualpipe_idles_as_the_table_says_whatever_the_number_of_microbatches(pp: int, bubble: int, extra: int) -> None:
    """F = I = W = 1, so B = 2 and an atomic F&B 3: (PP/2 - 1)(3 + 2 - 3)."""
    assert idle(dualpipe(pp, 2 * pp + extra)) == {bubble}
    assert idle(dualpipev(pp // 2, pp + extra // 2)) == {bubble}
    assert idle(from_torch("DualPipeV", pp // 2, pp + extra // 2)) == {bubble}


@few
@given(
    turn=st.integers(1, 8), extra=st.integers(0, 6), forward=times, part=st.fractions(0, 1), gain=st.fractions(0, 1),
    two=st.booleans(),
)  # fmt: skip
def test_pairs_that_hide_something_idle_as_the_table_says(
    turn: int, extra: int, forward: Fraction, part: Fraction, gain: Fraction, two: bool
) -> None:
    """The table's premise: I takes as long as F, W no longer, and a pair no less than its backward alone.

    It is the idlest ranks' bubble, the two at the turn: the others run fewer pairs and are busy for longer.
    """
    weight = part * forward
    backward = forward + weight
    costs = PhaseCosts(forward, forward, weight, backward + gain * forward)
    make, sides = (dualpipe, 2) if two else (dualpipev, 1)
    timeline = simulate(make(sides * turn, sides * (2 * turn + extra)), costs)
    check_timeline(timeline)
    assert timeline.bubble == (turn - 1) * (costs.both + backward - 3 * weight)
    assert timeline.idle(turn - 1) == timeline.bubble
    assert (min(map(timeline.idle, range(turn))) < timeline.bubble) == (turn > 2 and gain < 1)


@few
@given(ranks=st.integers(1, 6), rounds=st.integers(1, 4), levels=st.integers(1, 4), forward=times, inputs=times)
def test_interleaving_idles_as_long_as_1f1b_with_smaller_stages(
    ranks: int, rounds: int, levels: int, forward: Fraction, inputs: Fraction
) -> None:
    costs = PhaseCosts(forward, inputs, Fraction(1))
    assert idle(interleaved(ranks, rounds * ranks, levels), costs) == {(ranks - 1) * (forward + inputs + 1)}


@pytest.mark.parametrize("name", SCHEDULES)
def test_formulas_are_those_of_the_simulation(name: str) -> None:
    costs = PhaseCosts()
    for ranks in (2, 4, 8):
        for times_ranks in (2, 3, 5):
            schedule = make_schedule(name, ranks, times_ranks * ranks)
            assert idle(schedule, costs) == {bubble_formula(schedule, costs)}
    stranger = Schedule("own", 1, ((0,),), one_f_one_b(1, 1).order)
    assert bubble_formula(stranger, costs) is None


# ---- Table 2: memory ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pp", [2, 4, 8, 16])
@pytest.mark.parametrize("times_pp", [2, 3])
def test_activations_and_parameters_are_those_of_the_table(pp: int, times_pp: int) -> None:
    microbatches = times_pp * pp
    for schedule, activations, parameters in (
        (gpipe(pp, microbatches), [microbatches] * pp, 1),
        (one_f_one_b(pp, microbatches), list(range(pp, 0, -1)), 1),
        (zb1p(pp, microbatches), [pp] * pp, 1),
        (dualpipe(pp, microbatches), [pp + 1] * pp, 2),
        (dualpipev(pp // 2, microbatches), [pp + 1] * (pp // 2), 2),
    ):
        assert schedule.n_stages == pp, "the table's PP"
        assert list(schedule.peak_activations) == activations
        assert {len(schedule.stages_on(rank)) for rank in range(schedule.n_ranks)} == {parameters}
    ranks, levels = pp, 3
    schedule = interleaved(ranks, microbatches, levels)
    most = 2 * (ranks - 1) + (levels - 1) * ranks + 1
    assert max(schedule.peak_activations) == schedule.peak_activations[0] == most
    assert len(schedule.stages_on(0)) == levels


# ---- the orders themselves ---------------------------------------------------------------------------------------------


def test_small_ones_are_those_written_by_hand() -> None:
    assert one_f_one_b(3, 4).lines() == (
        "0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3",
        "1F0 1F1 1B0 1F2 1B1 1F3 1B2 1B3",
        "2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3",
    )
    assert zb1p(3, 4).lines() == (
        "0F0 0F1 0F2 0I0 0W0 0F3 0I1 0W1 0I2 0W2 0I3 0W3",
        "1F0 1F1 1I0 1F2 1I1 1W0 1F3 1I2 1W1 1I3 1W2 1W3",
        "2F0 2I0 2F1 2I1 2F2 2I2 2W0 2F3 2I3 2W1 2W2 2W3",
    )
    assert interleaved(2, 2, 2).lines() == (
        "0F0 0F1 2F0 2F1 2B0 2B1 0B0 0B1",
        "1F0 1F1 3F0 3B0 3F1 3B1 1B0 1B1",
    )
    assert dualpipe(4, 8).lines()[:2] == (
        "0F0 0F1 0F2 3F0' 3I0' 3W0' 3F1' 0F3&3B1' 3F2'&0B0 3B2' 3F3'&0B1 3B3' 0I2 0W2 0I3 0W3",
        "1F0 2F0' 1F1 2F1' 1F2 2B0' 2F2'&1B0 1F3&2B1' 2F3'&1B1 2B2' 1B2 2I3' 1I3 2W3' 1W3",
    )


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("rounds", [2, 3, 5])
def test_four_of_them_are_torchs_to_the_slot(ranks: int, rounds: int) -> None:
    microbatches = rounds * ranks
    assert gpipe(ranks, microbatches).lines() == from_torch("GPipe", ranks, microbatches).lines()
    assert one_f_one_b(ranks, microbatches).lines() == from_torch("1F1B", ranks, microbatches).lines()
    assert dualpipev(ranks, microbatches).lines() == from_torch("DualPipeV", ranks, microbatches).lines()
    for levels in (2, 3):
        theirs = from_torch("Interleaved1F1B", ranks, microbatches, levels)
        assert interleaved(ranks, microbatches, levels).lines() == theirs.lines()


@pytest.mark.parametrize(("half", "microbatches"), [(1, 2), (2, 5), (3, 6), (4, 10), (8, 20)])
def test_dualpipe_is_two_folded_vs(half: int, microbatches: int) -> None:
    """Each half of the ranks does what the V's ranks do; the directions swap where the V turns."""
    two, one = dualpipe(2 * half, 2 * microbatches), dualpipev(half, microbatches)
    assert two.rank_of == (tuple(range(2 * half)), tuple(reversed(range(2 * half))))
    for rank in range(half):
        for mirrored, here in ((0, rank), (1, 2 * half - 1 - rank)):
            alike = [
                [(op.phase, op.microbatch, op.stage, (op.direction ^ mirrored)) for op in slot.ops]
                for slot in two.order[here]
            ]
            assert alike == [
                [(op.phase, op.microbatch, op.stage, int(op.stage >= half)) for op in slot.ops]
                for slot in one.order[rank]
            ]
    assert simulate(two).end[:half] == simulate(one).end


@few
@given(
    name=st.sampled_from([*SCHEDULES]), ranks=st.integers(1, 5).map(lambda n: 2 * n), times_ranks=st.integers(2, 4),
    forward=times, inputs=times, weight=times, gain=st.fractions(0, 1),
)  # fmt: skip
def test_all_of_them_can_be_run_at_any_cost(
    name: str, ranks: int, times_ranks: int, forward: Fraction, inputs: Fraction, weight: Fraction, gain: Fraction
) -> None:
    schedule = make_schedule(name, ranks, times_ranks * ranks)
    alone = forward + inputs + weight
    costs = PhaseCosts(forward, inputs, weight, alone - gain * min(forward, inputs + weight))
    check(schedule, activations=max(schedule.peak_activations))
    check_timeline(simulate(schedule, costs))


@few
@given(ranks=st.integers(1, 6), microbatches=st.integers(1, 12))
def test_any_number_of_microbatches_can_be_run(ranks: int, microbatches: int) -> None:
    for make in (one_f_one_b, zb1p):
        schedule = make(ranks, microbatches)
        check(schedule, activations=min(ranks, microbatches))
        check_timeline(simulate(schedule))


# ---- torch's -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TORCH_SCHEDULES)
@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 2), (2, 4), (2, 6), (4, 8), (4, 20), (8, 16), (8, 24)])
def test_torchs_schedules_are_valid(name: str, ranks: int, microbatches: int) -> None:
    schedule = from_torch(name, ranks, microbatches)
    check_timeline(simulate(schedule))
    assert schedule.n_ranks == ranks and schedule.n_stages == ranks * (1 if name in ONE_STAGE else 2)
    assert schedule.name == f"torch {name}" and schedule.total_microbatches == microbatches
    kinds = {slot.kind for slots in schedule.order for slot in slots}
    assert (
        kinds
        <= {
            "GPipe": {"F", "B"},
            "1F1B": {"F", "B"},
            "Interleaved1F1B": {"F", "B"},
            "InterleavedZeroBubble": {"F", "I", "W"},
            "ZBVZeroBubble": {"F", "I", "W"},
            "DualPipeV": {"F", "B", "I", "W", "F&B"},
        }[name]
    )
    assert ("F&B" in kinds) == (name == "DualPipeV")


def test_torchs_v_without_bubble_has_none_where_all_phases_take_the_same() -> None:
    """arXiv 2401.10241, section 6: ZB-V idles only while ranks wait for their first microbatch."""
    for ranks in (2, 4, 8):
        timeline = simulate(from_torch("ZBVZeroBubble", ranks, 4 * ranks))
        assert timeline.bubble == ranks - 1


def test_torchs_1f1b_is_put_right_on_the_last_rank() -> None:
    from torch.distributed.pipelining import _schedule_visualizer

    raw = _schedule_visualizer.get_schedule_ops("1F1B", 4, 8)
    assert [str(a) for a in raw[-1] if a is not None][:2] == ["3F1", "3B0"], (
        "torch has mended it: the reader's care may go"
    )
    last = from_torch("1F1B", 4, 8).lines()[-1]
    assert last == " ".join(f"3F{number} 3B{number}" for number in range(8))


# ---- sizes that cannot be ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "sizes", "words"),
    [
        (one_f_one_b, (0, 4), "n_ranks = 0 must be a whole number of at least 1"),
        (one_f_one_b, (4, 0), "microbatches = 0 must be"),
        (zb1p, (2.0, 4), "n_ranks = 2.0 must be a whole number"),
        (zb1p, (2, True), "microbatches = True must be"),
        (interleaved, (4, 6), "microbatches = 6 must be a multiple of n_ranks .4."),
        (interleaved, (4, 8, 0), "stages_per_rank = 0 must be"),
        (dualpipev, (4, 7), "microbatches = 7 must be a whole number of at least 8: DualPipeV needs"),
        (dualpipe, (4, 6), "microbatches = 6 must be a whole number of at least 8: DualPipe needs two"),
        (dualpipe, (5, 20), "n_ranks = 5 must be even"),
        (dualpipe, (4, 9), "microbatches = 9 must be even"),
        (from_torch, ("DualPipe", 2, 4), "'DualPipe' is none of torch's schedules: choose one of GPipe, 1F1B, "),
        (from_torch, ("1F1B", 4, 3), r"torch makes no 1F1B of 4 ranks and 3 microbatches: .*\(3\)"),
        (from_torch, ("DualPipeV", 4, 7), "torch makes no DualPipeV .* at least as many microbatches as stages"),
        (from_torch, ("ZBVZeroBubble", 4, 8, 3), "torch makes no ZBVZeroBubble .* exactly 2 stages"),
        (from_torch, ("DualPipeV", 0, 7), "n_ranks = 0 must be"),
        (make_schedule, ("2F2B", 4, 8), "'2F2B' is no schedule here: choose one of GPipe, 1F1B, interleaved, ZB1P"),
    ],
)
def test_what_cannot_be_made_is_refused(make: object, sizes: tuple[object, ...], words: str) -> None:
    with pytest.raises(ScheduleError, match=words) as caught:
        make(*sizes)
    assert "\n" not in str(caught.value)
