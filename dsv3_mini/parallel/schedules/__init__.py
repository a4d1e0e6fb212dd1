"""The pipeline schedules of the report's Table 2, and interleaved 1F1B; torch's own are read by from_torch.py.

What the table says of each, in times of a stage (B is a full backward, F&B an overlapped pair), and counted in stages
on a rank and in activations of one microbatch at one stage. PP is the number of stages:

    schedule        bubble                        parameters   activations
    GPipe           (PP - 1)(F + B)               1            all microbatches (not in the table)
    1F1B            (PP - 1)(F + B)               1            PP
    ZB1P            (PP - 1)(F + B - 2W)          1            PP
    DualPipe, V     (PP/2 - 1)(F&B + B - 3W)      2            PP + 1
    interleaved     (ranks - 1)(F + B)            v            2(ranks - 1) + (v - 1) ranks + 1, and v = stages a rank

The bubbles are exact where F = I, no W is longer than that, and F&B takes no less than B alone and no more than F + B
(GPipe, 1F1B and interleaved: at any cost). Nowhere does the number of microbatches stand: more of them make the same bubble
a smaller share of the step. Two things to know before comparing rows: with PP stages DualPipeV has half as many ranks,
and interleaved 1F1B's stages are v times smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from dsv3_mini.parallel.schedule_costs import PhaseCosts
from dsv3_mini.parallel.schedule_ir import Schedule, ScheduleError
from dsv3_mini.parallel.schedules.dualpipe import dualpipe, dualpipev
from dsv3_mini.parallel.schedules.gpipe import gpipe
from dsv3_mini.parallel.schedules.interleaved import interleaved
from dsv3_mini.parallel.schedules.one_f_one_b import one_f_one_b
from dsv3_mini.parallel.schedules.zero_bubble import zb1p

# Each takes ranks and microbatches (of both directions together).
SCHEDULES: Mapping[str, Callable[[int, int], Schedule]] = MappingProxyType(
    {
        "GPipe": gpipe,
        "1F1B": one_f_one_b,
        "interleaved": interleaved,
        "ZB1P": zb1p,
        "DualPipeV": dualpipev,
        "DualPipe": dualpipe,
    }
)


def make_schedule(name: str, n_ranks: int, microbatches: int) -> Schedule:
    """A schedule by its name.

    Raises:
        ScheduleError: there is none of that name, or none of that size.
    """
    if name not in SCHEDULES:
        raise ScheduleError(f"{name!r} is no schedule here: choose one of {', '.join(SCHEDULES)}")
    return SCHEDULES[name](n_ranks, microbatches)


def bubble_formula(schedule: Schedule, costs: PhaseCosts) -> float | None:
    """What the table says that a rank is idle; None for a schedule that it does not know."""
    stages, ranks = schedule.n_stages, schedule.n_ranks
    forward, backward, weight = costs.forward, costs.backward, costs.weight
    match schedule.name:
        case "GPipe" | "1F1B" | "interleaved":
            return (ranks - 1) * (forward + backward)
        case "ZB1P":
            return (stages - 1) * (forward + backward - 2 * weight)
        case "DualPipe" | "DualPipeV":
            return (stages // 2 - 1) * (costs.both + backward - 3 * weight)
    return None
