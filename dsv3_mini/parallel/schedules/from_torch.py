"""Torch's own pipeline schedules (torch.distributed.pipelining), read into the IR: no process group, no model, no GPU.

Torch writes a schedule as a table, for each rank a list of actions such as 2F5 or, overlapped, (2F5;1B3)OVERLAP_F_B,
with None where it thinks that the rank is idle. `get_schedule_ops` makes the table from torch's schedule class and a
stand-in for the stage. Idle places are dropped: here the order says all. So are the actions that compute nothing.

    GPipe, 1F1B             stage s on rank s
    Interleaved1F1B         several stages a rank, in rounds
    InterleavedZeroBubble   the same, with the backward cut in two
    ZBVZeroBubble           a V of two stages a rank, everything cut in two
    DualPipeV               a V, overlapped

Torch 2.13 writes the last rank of 1F1B wrongly: forwards 1 to m where it runs 0 to m - 1. The reader puts them right.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch.distributed.pipelining import _schedule_visualizer

from dsv3_mini.parallel.schedule_ir import Op, Phase, Schedule, ScheduleError, Slot, require_whole
from dsv3_mini.parallel.torch_schedules import TORCH_SCHEDULES, V_SHAPED, stages_each

OVERLAPPED = "OVERLAP_F_B"


def from_torch(name: str, n_ranks: int, microbatches: int, stages_per_rank: int | None = None) -> Schedule:
    """Torch's schedule of that name.

    Args:
        stages_per_rank: 1 for GPipe and 1F1B, exactly 2 for a V; None is 1 or 2.

    Raises:
        ScheduleError: there is no such schedule, or torch makes none of that size (its own words say why).
    """
    if name not in TORCH_SCHEDULES:
        raise ScheduleError(f"{name!r} is none of torch's schedules: choose one of {', '.join(TORCH_SCHEDULES)}")
    require_whole("n_ranks", n_ranks)
    require_whole("microbatches", microbatches)
    levels = stages_per_rank or stages_each(name)
    try:
        rows = _schedule_visualizer.get_schedule_ops(name, n_ranks, microbatches, levels)
    except (ValueError, AssertionError) as error:
        reason = " ".join(str(error).split())
        size = f"{n_ranks} ranks and {microbatches} microbatches"
        raise ScheduleError(f"torch makes no {name} of {size}: {reason}") from error
    return read_actions(f"torch {name}", rows, microbatches, placement(n_ranks, levels, name in V_SHAPED))


def read_actions(name: str, rows: Iterable[Iterable[Any]], microbatches: int, rank_of: tuple[int, ...]) -> Schedule:
    """A table of torch's actions, a row for each rank: of a schedule object, the values of its `pipeline_order`.

    Args:
        rank_of: for each stage the rank that holds it.
    """
    order = [list(_slots(row)) for row in rows]
    order[-1] = _from_zero(order[-1], microbatches, rank_of.index(len(order) - 1))
    return Schedule(name, microbatches, (rank_of,), tuple(map(tuple, order)))


def placement(n_ranks: int, levels: int, v_shaped: bool) -> tuple[int, ...]:
    """Rank of each stage: always down the ranks, or (a V) down and up in turn."""
    down = tuple(range(n_ranks))
    return tuple(rank for level in range(levels) for rank in (down[::-1] if v_shaped and level % 2 else down))


def _slots(row: Iterable[Any]) -> Iterator[Slot]:
    for action in row:
        if action is None:
            continue
        parts = action.sub_actions if action.computation_type.value == OVERLAPPED else (action,)
        phases = [part.computation_type.value for part in parts]
        if set(phases) <= set(Phase):
            yield Slot(
                tuple(
                    Op(Phase(phase), part.microbatch_index, part.stage_index)
                    for phase, part in zip(phases, parts, strict=True)
                )
            )


def _from_zero(slots: Sequence[Slot], microbatches: int, stage: int) -> list[Slot]:
    """The last rank's slots with forwards that count 0 to m - 1 where torch counted 1 to m."""
    forwards = [op.microbatch for slot in slots for op in slot.ops if (op.phase, op.stage) == (Phase.FORWARD, stage)]
    if sorted(forwards) != list(range(1, microbatches + 1)):
        return list(slots)
    return [
        Slot(tuple(op._replace(microbatch=op.microbatch - (op.phase == Phase.FORWARD)) for op in slot.ops))
        for slot in slots
    ]
