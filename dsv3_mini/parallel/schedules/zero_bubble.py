"""ZB1P: 1F1B with the backward cut in two (arXiv 2401.10241, there ZB-H1; the second row of the report's Table 2).

Only the gradient for the input is waited for by another rank, so I runs where B ran and the next rank starts
earlier. W may come whenever there is time: rank r lets r of them wait and runs them at the end, where 1F1B would be
idle. More must not wait, for an activation is kept until its W is done: each rank holds PP of them, as 1F1B's fullest
rank does.
"""

from __future__ import annotations

from dsv3_mini.parallel.schedule_ir import Phase, Schedule, Slot, require_whole, slot


def zb1p(n_ranks: int, microbatches: int) -> Schedule:
    """Stage s on rank s; a bubble of (PP - 1)(F + B - 2W), from PP microbatches on, where W is no longer than F and I.

    Raises:
        ScheduleError: a number is not whole, or below 1.
    """
    require_whole("n_ranks", n_ranks)
    require_whole("microbatches", microbatches)

    def order(rank: int) -> tuple[Slot, ...]:
        first = min(microbatches, n_ranks - 1 - rank)
        slots = [slot(Phase.FORWARD, number, rank) for number in range(first)]
        for number in range(microbatches):
            if first + number < microbatches:
                slots.append(slot(Phase.FORWARD, first + number, rank))
            slots.append(slot(Phase.INPUT, number, rank))
            if number >= rank:
                slots.append(slot(Phase.WEIGHT, number - rank, rank))
        late = range(max(0, microbatches - rank), microbatches)
        return (*slots, *(slot(Phase.WEIGHT, number, rank) for number in late))

    ranks = range(n_ranks)
    return Schedule("ZB1P", microbatches, (tuple(ranks),), tuple(map(order, ranks)))
