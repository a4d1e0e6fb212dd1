"""Orders as lesson 20 writes them, and the package's schedules: one stage a rank, an op is a letter and a microbatch.

[["F0", "F1", "B0", "B1"],      rank 0
 ["F0", "B0", "F1", "B1"]]      rank 1
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from dsv3_mini.parallel.schedule_ir import Phase, Schedule, ScheduleError, Slot, slot

Order = list[list[str]]


def order_of(schedule: Schedule) -> Order:
    """A schedule with one stage a rank, and one op a slot, as lists of texts.

    Raises:
        ScheduleError: its stages lie otherwise, or its ops overlap: a letter and a number would not say which.
    """
    if schedule.rank_of != (tuple(range(schedule.n_ranks)),):
        raise ScheduleError(f"{schedule.name}: a rank holds more than one stage, an op's text would not name it")
    return [[_text(each) for each in slots] for slots in schedule.order]


def schedule_of(order: Any, microbatches: int, name: str = "yours") -> Schedule:
    """A schedule from lists of texts: whether it can be run is another question (schedule_checker.check).

    Raises:
        ScheduleError: this is no list of lists of ops.
    """
    if not isinstance(order, (list, tuple)) or not all(isinstance(ops, (list, tuple)) for ops in order):
        raise ScheduleError(f"an order is a list with a list of ops for each rank, this is {_short(order)}")
    ranks = tuple(range(len(order)))
    return Schedule(name, microbatches, (ranks,), tuple(_slots(rank, ops) for rank, ops in enumerate(order)))


def _slots(rank: int, ops: Sequence[Any]) -> tuple[Slot, ...]:
    found = [re.fullmatch(r"([FBIW])(\d+)", op) if isinstance(op, str) else None for op in ops]
    if None in found:
        place = found.index(None)
        raise ScheduleError(
            f"rank {rank}, place {place}: {_short(ops[place])} is no op: write F, B, I or W and the microbatch, 'F3'"
        )
    return tuple(slot(Phase(match[1]), int(match[2]), rank) for match in found if match)


def _text(each: Slot) -> str:
    if len(each.ops) > 1:
        raise ScheduleError(f"{each} is a pair: in an order each op stands alone")
    return f"{each.ops[0].phase}{each.ops[0].microbatch}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
