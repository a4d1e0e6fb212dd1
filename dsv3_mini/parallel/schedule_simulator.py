"""When each slot of a schedule runs, how long ranks are idle, and how full they are: a pipeline without a cluster.

Each rank does its slots in their order. A slot begins when its rank is free and all that its ops need has been given
by slots that are done; F&B is atomic: both its needs come first, both its results when it ends. Nothing else is
decided here, so a schedule and its costs have one timeline.

    bubble of a rank   what the whole step takes, less the time that the rank computes

Whole-number costs give whole-number times, and fractions.Fraction fractions: nothing is rounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dsv3_mini.parallel.schedule_costs import PhaseCosts
from dsv3_mini.parallel.schedule_ir import Op, Result, Schedule, ScheduleError


@dataclass(frozen=True)
class Timeline:
    """`start[rank][i]` and `end[rank][i]` of each slot, in the unit of `costs`."""

    schedule: Schedule
    costs: PhaseCosts
    start: tuple[tuple[float, ...], ...]
    end: tuple[tuple[float, ...], ...]

    @property
    def span(self) -> float:
        """What the step takes: from the first slot's start to the last one's end."""
        return max(times[-1] for times in self.end if times)

    def busy(self, rank: int) -> float:
        return sum(self.costs.of(slot.kind) for slot in self.schedule.order[rank])

    def idle(self, rank: int) -> float:
        """The rank's bubble."""
        return self.span - self.busy(rank)

    @property
    def bubble(self) -> float:
        """Of the idlest rank, which is Table 2's. Ranks differ only in DualPipe, where those nearer to the turn run more
        pairs: what a pair saves is time that they have left."""
        return max(map(self.idle, range(self.schedule.n_ranks)))

    @property
    def bubble_share(self) -> float:
        """Share of all ranks' time that is idle."""
        ranks = self.schedule.n_ranks
        return sum(map(self.idle, range(ranks))) / (ranks * self.span) if self.span else 0.0

    def held_at(self, time: float) -> tuple[int, ...]:
        """Activations that each rank keeps at a moment. At the border of two slots the later one counts."""
        kept = []
        for rank in range(self.schedule.n_ranks):
            begun = sum(start <= time for start in self.start[rank])
            done = begun and self.end[rank][begun - 1] <= time
            slot = self.schedule.order[rank][begun - 1]
            freed = sum(op.phase in ("B", "W") for op in slot.ops) if done else 0
            kept.append(self.schedule.held(rank)[begun - 1] - freed if begun else 0)
        return tuple(kept)


def simulate(schedule: Schedule, costs: PhaseCosts | None = None) -> Timeline:
    """The timeline of a schedule.

    Args:
        costs: None: F, I and W take 1 each, B 2 and F&B 3.

    Raises:
        ScheduleError: ranks wait for each other for ever, or for what nobody gives; the line says who for what.
    """
    costs = PhaseCosts() if costs is None else costs
    ranks = range(schedule.n_ranks)
    given: dict[Result, float] = {}
    start: list[list[float]] = [[] for _ in ranks]
    end: list[list[float]] = [[] for _ in ranks]
    moving = True
    while moving:
        moving = False
        for rank in ranks:
            for slot in schedule.order[rank][len(end[rank]) :]:
                needs = [need for op in slot.ops for need in op.needs(schedule.n_stages)]
                if any(need not in given for need in needs):
                    break
                free = end[rank][-1] if end[rank] else 0
                start[rank].append(max([free, *(given[need] for need in needs)]))
                end[rank].append(start[rank][-1] + costs.of(slot.kind))
                for op in slot.ops:
                    if (result := op.gives) is not None:
                        given[result] = end[rank][-1]
                moving = True
    at = [len(times) for times in end]
    if any(place < len(schedule.order[rank]) for rank, place in enumerate(at)):
        raise ScheduleError(_who_waits(schedule, at, given))
    return Timeline(schedule, costs, tuple(map(tuple, start)), tuple(map(tuple, end)))


def describe(op: Op, directions: int = 1) -> str:
    """An op in words: "F of microbatch 3 at stage 2"."""
    return f"{op.phase} of microbatch {op.microbatch} at stage {op.stage}" + (
        f" in direction {op.direction}" if directions > 1 else ""
    )


def _who_waits(schedule: Schedule, at: list[int], given: Mapping[Result, float]) -> str:
    """One line for a standstill: who waits for whom, to the end or in a ring. `at[rank]`: the slot where it stands."""
    giver: dict[Result, tuple[int, int]] = {}
    for rank, slots in enumerate(schedule.order):
        for place, slot in enumerate(slots):
            giver |= {op.gives: (rank, place) for op in slot.ops if op.gives is not None}

    rank = next(rank for rank, place in enumerate(at) if place < len(schedule.order[rank]))
    links: list[str] = []
    seen: list[int] = []
    while rank not in seen:
        seen.append(rank)
        slot = schedule.order[rank][at[rank]]
        op, need = next((op, need) for op in slot.ops for need in op.needs(schedule.n_stages) if need not in given)
        wanted = f"the {need.kind} of microbatch {need.microbatch} from stage {need.stage}"
        waits = f"rank {rank} waits in slot {at[rank]} ({describe(op, schedule.directions)}) for {wanted}"
        if need not in giver:
            return f"{waits}, which no rank gives"
        rank, place = giver[need]
        links.append(f"{waits}, in slot {place} of rank {rank}")
    return "; ".join(links[seen.index(rank) :]) + ": a ring, nobody can begin"
