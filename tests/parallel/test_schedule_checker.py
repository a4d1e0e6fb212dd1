"""Schedules and timelines with one thing wrong: each is refused in words of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from dsv3_mini.parallel.schedule_checker import check, check_timeline, problems
from dsv3_mini.parallel.schedule_ir import Op, Phase, Schedule, ScheduleError, Slot, slot
from dsv3_mini.parallel.schedule_simulator import Timeline, simulate
from dsv3_mini.parallel.schedules.dualpipe import dualpipe
from dsv3_mini.parallel.schedules.one_f_one_b import one_f_one_b
from dsv3_mini.parallel.schedules.zero_bubble import zb1p

F, B, W = Phase.FORWARD, Phase.BACKWARD, Phase.WEIGHT
Row = list[Slot]

# 0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3      the slots of each, in their order (proven in test_schedule_generators.py)
# 1F0 1F1 1B0 1F2 1B1 1F3 1B2 1B3
# 2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3
PLAIN = one_f_one_b(3, 4)
# 1F0 1F1 1I0 1F2 1I1 1W0 ...          rank 1
CUT = zb1p(3, 4)
# 0F0 0F1 0F2 3F0' 3I0' 3W0' 3F1' 0F3&3B1' ...
TWO = dualpipe(4, 8)


def put(number: int, *ops: Op) -> Callable[[Row], None]:
    """Other ops in a slot."""

    def change(row: Row) -> None:
        row[number] = Slot(ops)

    return change


def insert(number: int, what: Slot) -> Callable[[Row], None]:
    return lambda row: row.insert(number, what)


def take(number: int) -> Callable[[Row], None]:
    return lambda row: row.__delitem__(number)


def move(number: int, to: int) -> Callable[[Row], None]:
    return lambda row: row.insert(to, row.pop(number))


def swap(one: int, other: int) -> Callable[[Row], None]:
    def change(row: Row) -> None:
        row[one], row[other] = row[other], row[one]

    return change


def join(number: int) -> Callable[[Row], None]:
    """A slot and the next in one."""

    def change(row: Row) -> None:
        row[number : number + 2] = [Slot(row[number].ops + row[number + 1].ops)]

    return change


def corrupted(schedule: Schedule, changes: dict[int, Callable[[Row], None]]) -> Schedule:
    rows = [list(row) for row in schedule.order]
    for rank, change in changes.items():
        change(rows[rank])
    return replace(schedule, order=tuple(map(tuple, rows)))


CORRUPTED = {
    # form
    "an empty slot": (PLAIN, {1: put(2)}, "rank 1, slot 2 is empty: take it out"),
    "two forwards at once": (
        PLAIN,
        {0: put(0, Op(F, 0, 0), Op(F, 1, 0))},
        "rank 0, slot 0 holds F of microbatch 0 at stage 0 and F of microbatch 1 at stage 0 at once: a rank computes one thing",
    ),
    "a forward under an input's backward": (
        CUT,
        {1: put(2, Op(F, 2, 1), Op(Phase.INPUT, 0, 1))},
        "rank 1, slot 2 holds F of microbatch 2 at stage 1 and I of microbatch 0 at stage 1 at once",
    ),
    "three at once": (
        TWO,
        {0: put(7, Op(F, 3, 0, 0), Op(B, 1, 3, 1), Op(W, 0, 3, 1))},
        "rank 0, slot 7 holds F .* and B .* and W of microbatch 0 at stage 3 in direction 1 at once",
    ),
    "an overlap written backward first": (
        TWO,
        {0: put(7, Op(B, 1, 3, 1), Op(F, 3, 0, 0))},
        "slot 7 holds B of microbatch 1 at stage 3 in direction 1 and F of microbatch 3 at stage 0 in direction 0 at once",
    ),
    "a forward and its own backward": (
        PLAIN,
        {2: put(0, Op(F, 0, 2), Op(B, 0, 2))},
        "rank 2, slot 0 holds .* a backward cannot overlap with the forward that it needs",
    ),
    "an unknown phase": (
        PLAIN,
        {0: put(3, Op("X", 0, 0))},
        "rank 0, slot 3: X of microbatch 0 at stage 0: 'X' is no phase",
    ),
    # place
    "a microbatch too many": (
        PLAIN,
        {0: put(0, Op(F, 4, 0))},
        "rank 0, slot 0: F of microbatch 4 at stage 0: there is no microbatch 4, they are numbered 0 to 3",
    ),
    "a negative microbatch": (PLAIN, {2: put(1, Op(B, -1, 2))}, "rank 2, slot 1: B .* there is no microbatch -1"),
    "a stage too many": (PLAIN, {2: put(0, Op(F, 0, 3))}, "there is no stage 3, they are numbered 0 to 2"),
    "a direction too many": (PLAIN, {1: put(0, Op(F, 0, 1, 1))}, "there is no direction 1, they are numbered 0 to 0"),
    "another rank's stage": (
        PLAIN,
        {1: put(1, Op(F, 1, 2))},
        "rank 1, slot 1: F of microbatch 1 at stage 2: that stage lies on rank 2",
    ),
    "the other direction's stage": (
        TWO,
        {0: put(0, Op(F, 0, 0, 1))},
        "rank 0, slot 0: F of microbatch 0 at stage 0 in direction 1: that stage lies on rank 3",
    ),
    # once
    "a forward twice": (
        PLAIN,
        {0: insert(4, slot(F, 1, 0))},
        "rank 0: F of microbatch 1 at stage 0 stands 2 times, in slots 1 and 4",
    ),
    "weights twice": (CUT, {0: insert(12, slot(W, 3, 0))}, "rank 0: W of microbatch 3 .* in slots 11 and 12"),
    "a forward forgotten": (PLAIN, {1: take(5)}, "rank 1 never runs F of microbatch 3 at stage 1"),
    "a backward forgotten": (
        PLAIN,
        {2: take(7)},
        "rank 2 never runs B of microbatch 3 at stage 2, nor I and W instead",
    ),
    "weights forgotten": (CUT, {2: take(11)}, "rank 2 runs I of microbatch 3 at stage 2 but never its W"),
    "an input's backward forgotten": (CUT, {1: take(2)}, "rank 1 runs W of microbatch 0 at stage 1 but never its I"),
    "a full backward and the input's": (
        CUT,
        {0: put(4, Op(B, 0, 0))},
        "rank 0 runs B of microbatch 0 at stage 0 and I besides: B is I and W already",
    ),
    "a full backward and the weights'": (
        PLAIN,
        {0: insert(8, slot(W, 2, 0))},
        "rank 0 runs B of microbatch 2 .* and W besides",
    ),
    # order on a rank
    "a backward first": (
        PLAIN,
        {2: swap(2, 3)},
        "rank 2: B of microbatch 1 at stage 2 stands in slot 2, before its F in slot 3",
    ),
    "an input's backward first": (CUT, {2: swap(0, 1)}, "rank 2: I of microbatch 0 .* slot 0, before its F in slot 1"),
    "weights before the input": (
        CUT,
        {0: swap(3, 4)},
        "rank 0: W of microbatch 0 at stage 0 stands in slot 3, before its I in slot 4",
    ),
    # waiting across ranks
    "a ring of two": (
        PLAIN,
        {2: move(4, 1)},
        r"^rank 1 waits in slot 2 \(B of microbatch 0 at stage 1\) for the gradient of microbatch 0 from stage 2, in slot 2 of "
        r"rank 2; rank 2 waits in slot 1 \(F of microbatch 2 at stage 2\) for the activation of microbatch 2 from stage 1, in "
        r"slot 3 of rank 1: a ring, nobody can begin$",
    ),
    "an overlap that waits for itself": (
        one_f_one_b(2, 3),  # 0F0 0F1&0B0 ..., and rank 1 wants 1F1 before 1B0
        {0: join(1), 1: swap(1, 2)},
        r"^rank 0 waits in slot 1 \(B of microbatch 0 at stage 0\) .* rank 1; rank 1 waits in slot 1 \(F of .* in slot 1 of rank 0: ",
    ),
}


@pytest.mark.parametrize("schedule", [PLAIN, CUT, TWO, one_f_one_b(2, 3)], ids=lambda schedule: schedule.name)
def test_what_they_were_made_from_is_fine(schedule: Schedule) -> None:
    check(schedule)
    assert list(problems(schedule, max(schedule.peak_activations))) == []


@pytest.mark.parametrize("name", CORRUPTED)
def test_a_corrupted_schedule_is_refused(name: str) -> None:
    schedule, changes, words = CORRUPTED[name]
    with pytest.raises(ScheduleError, match=words) as caught:
        check(corrupted(schedule, changes))
    assert "\n" not in str(caught.value)


def test_each_has_words_of_its_own() -> None:
    said = [next(problems(corrupted(schedule, changes))) for schedule, changes, _ in CORRUPTED.values()]
    assert len(set(said)) == len(said) >= 20


def test_all_problems_of_a_kind_are_told_and_none_of_the_next() -> None:
    wrong = corrupted(PLAIN, {0: put(0, Op(F, 9, 0)), 1: take(0), 2: put(3)})
    assert len(list(problems(wrong))) == 2
    wrong = corrupted(PLAIN, {0: take(0), 1: take(0)})
    assert [line[:22] for line in problems(wrong)] == ["rank 0 never runs F of", "rank 1 never runs F of"]


def test_other_orders_that_can_be_run_are_not_refused() -> None:
    """Slower ones, and ones that keep more, are still schedules."""
    late = corrupted(CUT, {1: swap(4, 5)})
    check(late)
    early = corrupted(PLAIN, {0: move(4, 3)})  # 0F3 before 0B0
    check(early)
    assert early.peak_activations == (4, 2, 1)
    patient = corrupted(PLAIN, {1: swap(1, 2)})  # 1F0 1B0 1F1
    check(patient)
    assert simulate(patient).span > simulate(PLAIN).span


def test_a_rank_has_only_so_much_room() -> None:
    check(PLAIN, activations=3)
    with pytest.raises(
        ScheduleError, match=r"rank 0 keeps 3 activations in slot 2 \(F of microbatch 2 at stage 0\) and has room for 2"
    ):
        check(PLAIN, activations=2)
    check(TWO, activations=5)
    assert len(list(problems(TWO, 4))) == 4, "PP + 1 on each of the four ranks"


# ---- times -------------------------------------------------------------------------------------------------------------

TIMES = simulate(PLAIN)


def moved(timeline: Timeline, rank: int, number: int, start: float = 0, end: float = 0) -> Timeline:
    """A slot that begins and ends so much later."""
    starts, ends = ([list(row) for row in rows] for rows in (timeline.start, timeline.end))
    starts[rank][number] += start
    ends[rank][number] += end
    return replace(timeline, start=tuple(map(tuple, starts)), end=tuple(map(tuple, ends)))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (moved(TIMES, 0, 0, -1, -1), r"rank 0 starts slot 0 \(F of microbatch 0 at stage 0\) at -1, and the step begins at 0"),
        (
            moved(TIMES, 0, 1, -0.5, -0.5),
            r"rank 0 starts slot 1 \(F of microbatch 1 at stage 0\) at 0.5, and slot 0 runs until 1",
        ),
        (
            moved(TIMES, 1, 0, -0.25, -0.25),
            "rank 1 starts F of microbatch 0 at stage 1 at 0.75, and rank 0 gives the activation of stage 0 at 1",
        ),
        (
            moved(TIMES, 0, 3, -1, -1),
            "rank 0 starts B of microbatch 0 at stage 0 at 6, and rank 1 gives the gradient of stage 1 at 7",
        ),
        (moved(TIMES, 0, 7, 0, 1), r"rank 0, slot 7 \(B of microbatch 3 at stage 0\) runs from 16 to 19: B takes 2"),
        (replace(TIMES, start=(TIMES.start[0][1:], *TIMES.start[1:])), r"start has \[7, 8, 8\] times and the schedule \[8, 8, 8\]"),
        (replace(TIMES, end=TIMES.end[:2]), r"end has \[8, 8\] times and the schedule"),
        (replace(TIMES, schedule=corrupted(PLAIN, {1: take(5)})), "rank 1 never runs F of microbatch 3"),
    ],
)  # fmt: skip
def test_times_that_cannot_be_are_refused(wrong: Timeline, words: str) -> None:
    check_timeline(TIMES)
    with pytest.raises(ScheduleError, match=words) as caught:
        check_timeline(wrong)
    assert "\n" not in str(caught.value)


def test_waiting_longer_than_needed_is_no_error() -> None:
    check_timeline(moved(TIMES, 0, 7, 5, 5))
