"""1F1B: one forward, one backward (PipeDream-Flush; the first row of the report's Table 2).

    rank 0   F0 F1 F2 F3 .  .  .  .  .  .  B0 B0 F4 B1 B1 ...
    rank 3   .  .  .  F0 B0 B0 F1 B1 B1 F2 B2 B2 F3 B3 B3 ...

A rank first runs as many forwards as there are ranks below it, then one forward and one backward in turn: a backward
follows as early as it can, so that no rank keeps more activations than there are ranks, however many microbatches a
batch has.
"""

from __future__ import annotations

from itertools import chain

from dsv3_mini.parallel.schedule_ir import Phase, Schedule, Slot, require_whole, slot


def one_f_one_b(n_ranks: int, microbatches: int) -> Schedule:
    """Stage s on rank s; a bubble of (PP - 1)(F + B) for any number of microbatches.

    Raises:
        ScheduleError: a number is not whole, or below 1.
    """
    require_whole("n_ranks", n_ranks)
    require_whole("microbatches", microbatches)

    def order(rank: int) -> tuple[Slot, ...]:
        first = min(microbatches, n_ranks - 1 - rank)
        forwards = [slot(Phase.FORWARD, number, rank) for number in range(microbatches)]
        backwards = [slot(Phase.BACKWARD, number, rank) for number in range(microbatches)]
        in_turn = chain.from_iterable(zip(forwards[first:], backwards, strict=False))
        return (*forwards[:first], *in_turn, *backwards[microbatches - first :])

    ranks = range(n_ranks)
    return Schedule("1F1B", microbatches, (tuple(ranks),), tuple(map(order, ranks)))
