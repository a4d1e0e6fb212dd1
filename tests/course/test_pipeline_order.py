"""Orders of lesson 20: to a schedule and back, and what is no order."""

from __future__ import annotations

from typing import Any

import pytest

from dsv3_mini.course.pipeline_order import order_of, schedule_of
from dsv3_mini.parallel.schedule_checker import check
from dsv3_mini.parallel.schedule_ir import Schedule, ScheduleError, Slot
from dsv3_mini.parallel.schedules import make_schedule


def test_an_order_is_the_schedules_lines_without_the_stage() -> None:
    schedule = make_schedule("1F1B", 3, 4)
    order = order_of(schedule)
    assert order[1] == ["F0", "F1", "B0", "F2", "B1", "F3", "B2", "B3"]
    assert [" ".join(f"{rank}{op}" for op in ops) for rank, ops in enumerate(order)] == list(schedule.lines())


@pytest.mark.parametrize("name", ["GPipe", "1F1B", "ZB1P"])
def test_there_and_back_it_is_the_same(name: str) -> None:
    schedule = make_schedule(name, 4, 12)
    again = schedule_of(order_of(schedule), 12, name)
    check(again)
    assert again == schedule


@pytest.mark.parametrize(
    ("order", "words"),
    [
        (None, "list of ops for each rank, this is None"),
        (["F0", "B0"], "list of ops for each rank"),
        ([["F0", "B0"], ["F0", "G0"]], "rank 1, place 1: 'G0' is no op: write F, B, I or W"),
        ([["F0", 7]], "rank 0, place 1: 7 is no op"),
        ([["F", "B0"]], "rank 0, place 0: 'F' is no op"),
        ([["F0 B0"]], "rank 0, place 0: 'F0 B0' is no op"),
        ([], "rank_of must name a rank"),
    ],
)
def test_what_is_no_order_is_refused_in_a_line(order: Any, words: str) -> None:
    with pytest.raises(ScheduleError, match=words) as caught:
        schedule_of(order, 1)
    assert "\n" not in str(caught.value)


def test_schedules_that_an_order_cannot_write_are_refused() -> None:
    with pytest.raises(ScheduleError, match="interleaved: a rank holds more than one stage"):
        order_of(make_schedule("interleaved", 2, 4))
    pairs = make_schedule("1F1B", 2, 2)
    first = pairs.order[1]
    joined = Schedule(
        "own", 2, pairs.rank_of, (pairs.order[0], (first[0], Slot(first[2].ops + first[1].ops), first[3]))
    )
    with pytest.raises(ScheduleError, match="1F1&1B0 is a pair"):
        order_of(joined)
