"""DualPipe and DualPipeV: forwards and backwards that hide each other's communication (report section 3.2.1, Figure 5).

A rank holds two stages. When microbatches pass through them in opposite senses, a forward at one and a backward at the
other can share a slot (F&B): while one sends its tokens to experts on other machines, the other computes.

    DualPipeV   two stages of one V: rank r of P holds stages r (side 0, going down) and 2P - 1 - r (side 1, coming up)
    DualPipe    two directions: the lower half of the ranks does what the upper half does, mirrored. Seen from rank r of
                the upper half, side 0 is its own direction's stage r, side 1 the other direction's stage PP - 1 - r

Folded in the middle, DualPipe is two DualPipeVs whose halves have changed partners, so one rule writes both: eight
phases, whose lengths depend on `inner`, the ranks between this one and the turn of the V (or the middle of DualPipe),
and `outer`, this one and those beyond it.

    1  2 inner times    F0                        fill
    2  outer times      F0 F1
    3  inner times      I1 W1 F1                  the first backwards are cut, so that the rank above waits less
    4  m - 2P + outer   F0&B1 F1&B0               the long middle; m microbatches come in at side 0
    5  inner times      B1 F1&B0                  nothing more comes in
    6  outer times      B1 B0                     the second half of these is cut: I now, W later
    7  inner times      W  I0
    8  outer times      W                         drain
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import count

from dsv3_mini.parallel.schedule_ir import Op, Phase, Schedule, ScheduleError, Slot, require_whole

F, B = Phase.FORWARD, Phase.BACKWARD
Place = tuple[int, int]  # stage, direction


def dualpipev(n_ranks: int, microbatches: int) -> Schedule:
    """The V: twice as many stages as ranks, so Table 2's PP is 2 n_ranks.

    Raises:
        ScheduleError: fewer microbatches than stages.
    """
    require_whole("n_ranks", n_ranks)
    require_whole("microbatches", microbatches, 2 * n_ranks, ": DualPipeV needs one for each of its stages, two a rank")
    turn = 2 * n_ranks - 1
    order = tuple(
        _eight_phases(n_ranks - 1 - rank, rank + 1, microbatches, ((rank, 0), (turn - rank, 0)))
        for rank in range(n_ranks)
    )
    rank_of = (*range(n_ranks), *reversed(range(n_ranks)))
    return Schedule("DualPipeV", microbatches, (rank_of,), order)


def dualpipe(n_ranks: int, microbatches: int) -> Schedule:
    """The report's schedule: PP = n_ranks stages, each on two ranks; half of the microbatches come in at each end.

    Args:
        microbatches: of both directions together.

    Raises:
        ScheduleError: an odd number of ranks or microbatches, or fewer than two microbatches for each rank.
    """
    require_whole("n_ranks", n_ranks, 2)
    require_whole("microbatches", microbatches, 2 * n_ranks, ": DualPipe needs two for each rank")
    for name, value in (("n_ranks", n_ranks), ("microbatches", microbatches)):
        if value % 2:
            raise ScheduleError(f"{name} = {value} must be even: half of them go each way")
    last, half = n_ranks - 1, n_ranks // 2

    def order(rank: int) -> tuple[Slot, ...]:
        down, up = (rank, 0), (last - rank, 1)
        depth = min(rank, last - rank)
        sides = (down, up) if rank < half else (up, down)
        return _eight_phases(half - 1 - depth, depth + 1, microbatches // 2, sides)

    ranks = tuple(range(n_ranks))
    return Schedule("DualPipe", microbatches // 2, (ranks, ranks[::-1]), tuple(map(order, ranks)))


def _eight_phases(inner: int, outer: int, microbatches: int, sides: Sequence[Place]) -> tuple[Slot, ...]:
    """One rank's slots, as the module's docstring lists them. `sides` are its two places."""
    forwards, backwards = (count(), count()), (count(), count())  # the next microbatch at each side
    waiting: deque[Op] = deque()  # weights' gradients that are put off, the oldest first
    slots: list[Slot] = []

    def op(phase: Phase, side: int) -> Op:
        numbers = forwards if phase == F else backwards
        return Op(phase, next(numbers[side]), *sides[side])

    def run(*what: tuple[Phase, int]) -> None:
        slots.append(Slot(tuple(op(phase, side) for phase, side in what)))

    def cut(side: int) -> None:
        one = op(Phase.INPUT, side)
        slots.append(Slot((one,)))
        waiting.append(one._replace(phase=Phase.WEIGHT))

    def weights() -> None:
        slots.append(Slot((waiting.popleft(),)))

    for _ in range(2 * inner):  # 1
        run((F, 0))
    for _ in range(outer):  # 2
        run((F, 0))
        run((F, 1))
    for _ in range(inner):  # 3
        cut(1)
        weights()
        run((F, 1))
    for number in range(microbatches - 2 * (inner + outer) + outer):  # 4
        if number == 0 and inner == 0:  # at the turn, F0 need not wait for the gradient that B1 waits for
            run((F, 0))
            run((B, 1))
        else:
            run((F, 0), (B, 1))
        run((F, 1), (B, 0))
    for _ in range(inner):  # 5
        run((B, 1))
        run((F, 1), (B, 0))
    for number in range(2 * outer):  # 6
        side = 1 - number % 2
        if number < outer:
            run((B, side))
        else:
            cut(side)
    for _ in range(inner):  # 7
        weights()
        cut(0)
    for _ in range(outer):  # 8
        weights()
    return tuple(slots)
