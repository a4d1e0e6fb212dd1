"""Can this schedule be run? Each op once and in its place, no ring of waiting ranks, and room for the activations.

A schedule says only what each rank does and in which order; this file says whether that is a step of training:

    form       a slot holds one op, or F and B of two microbatches overlapped: a rank computes one thing at a time
    place      an op stands on the rank that holds its stage
    once       each microbatch goes through each stage once: one F, and one B or an I with its W
    order      on a rank: F before its backward, I before its W
    waiting    across ranks: there is always one that can go on, so the step comes to its end
    room       no rank keeps more activations than `activations`

Problems are told in this order, each in one line that names rank, slot, microbatch and phase. `check_timeline` asks
the same of start and end times, and knows nothing of how they were computed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from itertools import product

from dsv3_mini.parallel.schedule_ir import Op, Phase, Schedule, ScheduleError
from dsv3_mini.parallel.schedule_simulator import Timeline, describe, simulate

Where = tuple[int, int]  # rank, slot
ROUNDING = 1e-9  # of floating-point times, as a share of the whole step


def check(schedule: Schedule, activations: int | None = None) -> None:
    """Say what is wrong with a schedule, or nothing.

    Args:
        activations: how many a rank has room for, each of one microbatch at one stage; None: any number.

    Raises:
        ScheduleError: the first problem.
    """
    for problem in problems(schedule, activations):
        raise ScheduleError(problem)


def problems(schedule: Schedule, activations: int | None = None) -> Iterator[str]:
    """All problems, of one kind: whether there are any of the next kind is asked once there are none of this one."""
    for kind in (_form_and_place, _once, _order, _waiting):
        found = list(kind(schedule))
        yield from found
        if found:
            return
    if activations is not None:
        yield from _room(schedule, activations)


def _form_and_place(schedule: Schedule) -> Iterator[str]:
    for rank, slots in enumerate(schedule.order):
        for number, slot in enumerate(slots):
            here = f"rank {rank}, slot {number}"
            if not slot.ops:
                yield f"{here} is empty: take it out, idle time is not written down"
            for op in slot.ops:
                if (wrong := _misplaced(schedule, rank, op)) is not None:
                    yield f"{here}: {describe(op, schedule.directions)}: {wrong}"
            if len(slot.ops) > 1:
                ops = " and ".join(describe(op, schedule.directions) for op in slot.ops)
                if slot.kind != "F&B":
                    yield (
                        f"{here} holds {ops} at once: a rank computes one thing at a time, and only a forward with a "
                        f"full backward behind it (F&B) overlap"
                    )
                elif slot.ops[0][1:] == slot.ops[1][1:]:
                    yield f"{here} holds {ops} at once: a backward cannot overlap with the forward that it needs"


def _misplaced(schedule: Schedule, rank: int, op: Op) -> str | None:
    if op.phase not in list(Phase):
        return f"{op.phase!r} is no phase: write F, B, I or W"
    for name, value, size in (
        ("direction", op.direction, schedule.directions),
        ("microbatch", op.microbatch, schedule.microbatches),
        ("stage", op.stage, schedule.n_stages),
    ):
        if not 0 <= value < size:
            return f"there is no {name} {value}, they are numbered 0 to {size - 1}"
    holder = schedule.rank_of[op.direction][op.stage]
    return None if holder == rank else f"that stage lies on rank {holder}"


def _once(schedule: Schedule) -> Iterator[str]:
    places = _places(schedule)
    for op, found in places.items():
        if len(found) > 1:
            slots = " and ".join(str(number) for _, number in found)
            yield f"rank {found[0][0]}: {describe(op, schedule.directions)} stands {len(found)} times, in slots {slots}"
    everything = product(range(schedule.directions), range(schedule.n_stages), range(schedule.microbatches))
    for direction, stage, microbatch in everything:
        rank = schedule.rank_of[direction][stage]
        forward, full, inputs, weights = (Op(phase, microbatch, stage, direction) for phase in Phase)
        name = {op: describe(op, schedule.directions) for op in (forward, full, inputs, weights)}
        if forward not in places:
            yield f"rank {rank} never runs {name[forward]}"
        if full in places:
            for part in (inputs, weights):
                if part in places:
                    yield f"rank {rank} runs {name[full]} and {part.phase} besides: B is I and W already"
        elif inputs not in places and weights not in places:
            yield f"rank {rank} never runs {name[full]}, nor I and W instead"
        elif inputs not in places:
            yield f"rank {rank} runs {name[weights]} but never its I: what W needs is not there"
        elif weights not in places:
            yield f"rank {rank} runs {name[inputs]} but never its W: the weights miss that gradient"


def _order(schedule: Schedule) -> Iterator[str]:
    places = _places(schedule)
    for op, ((rank, number),) in places.items():
        earlier = {Phase.BACKWARD: Phase.FORWARD, Phase.INPUT: Phase.FORWARD, Phase.WEIGHT: Phase.INPUT}.get(op.phase)
        if earlier is None:
            continue
        ((_, before),) = places[op._replace(phase=earlier)]
        if before > number:
            yield (
                f"rank {rank}: {describe(op, schedule.directions)} stands in slot {number}, "
                f"before its {earlier} in slot {before}"
            )


def _waiting(schedule: Schedule) -> Iterator[str]:
    try:
        simulate(schedule)
    except ScheduleError as standstill:
        yield str(standstill)


def _room(schedule: Schedule, activations: int) -> Iterator[str]:
    for rank, most in enumerate(schedule.peak_activations):
        if most > activations:
            number = schedule.held(rank).index(most)
            op = schedule.order[rank][number].ops[0]
            yield (
                f"rank {rank} keeps {most} activations in slot {number} ({describe(op, schedule.directions)}) and has "
                f"room for {activations}: let a backward come first"
            )


def _places(schedule: Schedule) -> dict[Op, list[Where]]:
    places = defaultdict(list)
    for rank, slots in enumerate(schedule.order):
        for number, slot in enumerate(slots):
            for op in slot.ops:
                places[op].append((rank, number))
    return dict(places)


def check_timeline(timeline: Timeline) -> None:
    """Are these times possible? Slots as long as they cost, one at a time on a rank, none before what it needs.

    Raises:
        ScheduleError: the schedule is not valid, or its times are not.
    """
    schedule = timeline.schedule
    check(schedule)
    for problem in _times(timeline):
        raise ScheduleError(problem)


def _times(timeline: Timeline) -> Iterator[str]:
    schedule, costs = timeline.schedule, timeline.costs
    sizes = [len(slots) for slots in schedule.order]
    for name, times in (("start", timeline.start), ("end", timeline.end)):
        if [len(row) for row in times] != sizes:
            yield f"{name} has {[len(row) for row in times]} times and the schedule {sizes} slots: one for each"
            return
    slack = ROUNDING * float(max(end for row in timeline.end for end in row))
    ready = {
        op.gives: (float(timeline.end[rank][number]), rank)
        for rank, slots in enumerate(schedule.order)
        for number, slot in enumerate(slots)
        for op in slot.ops
    }
    for rank, slots in enumerate(schedule.order):
        before = 0.0
        for number, slot in enumerate(slots):
            start, end = float(timeline.start[rank][number]), float(timeline.end[rank][number])
            name, cost = describe(slot.ops[0], schedule.directions), float(costs.of(slot.kind))
            if start < before - slack:
                what = f"slot {number - 1} runs until {before:g}" if number else "the step begins at 0"
                yield f"rank {rank} starts slot {number} ({name}) at {start:g}, and {what}"
            if abs(end - start - cost) > slack:
                yield f"rank {rank}, slot {number} ({name}) runs from {start:g} to {end:g}: {slot.kind} takes {cost:g}"
            for op in slot.ops:
                for given, giver, need in ((*ready[need], need) for need in op.needs(schedule.n_stages)):
                    if start < given - slack:
                        yield (
                            f"rank {rank} starts {describe(op, schedule.directions)} at {start:g}, and rank {giver} "
                            f"gives the {need.kind} of stage {need.stage} at {given:g}"
                        )
            before = end
