"""Interleaved 1F1B: several small stages on each rank instead of a large one (Megatron-LM, arXiv 2104.04473).

Stage s lies on rank s modulo ranks, so a microbatch goes round the ranks once for every stage that a rank holds. A
rank works in rounds: as many microbatches as there are ranks at its first stage, the same ones at its second, and so
on; then the next. Filling the pipeline takes (PP - 1) stages as in 1F1B, but a stage is smaller: with v of them on a
rank the bubble is v times shorter, for v times as many messages and a few more activations kept.
"""

from __future__ import annotations

from itertools import chain

from dsv3_mini.parallel.schedule_ir import Phase, Schedule, ScheduleError, Slot, require_whole, slot


def interleaved(n_ranks: int, microbatches: int, stages_per_rank: int = 2) -> Schedule:
    """A bubble of (ranks - 1)(F + B), where F and B are those of one of the small stages.

    Raises:
        ScheduleError: a number is not whole or below 1, or microbatches do not fill whole rounds.
    """
    require_whole("n_ranks", n_ranks)
    require_whole("microbatches", microbatches)
    require_whole("stages_per_rank", stages_per_rank)
    if microbatches % n_ranks:
        raise ScheduleError(
            f"microbatches = {microbatches} must be a multiple of n_ranks ({n_ranks}): interleaved 1F1B works in rounds"
        )
    work = microbatches * stages_per_rank  # forwards of a rank, and as many backwards

    def order(rank: int) -> tuple[Slot, ...]:
        def nth(number: int, phase: Phase) -> Slot:
            turn, place = divmod(number, n_ranks)  # a turn: a round's microbatches at one of the rank's stages
            rounds, level = divmod(turn, stages_per_rank)
            level = level if phase == Phase.FORWARD else stages_per_rank - 1 - level
            return slot(phase, rounds * n_ranks + place, level * n_ranks + rank)

        first = min(work, 2 * (n_ranks - 1 - rank) + (stages_per_rank - 1) * n_ranks)
        forwards = [nth(number, Phase.FORWARD) for number in range(work)]
        backwards = [nth(number, Phase.BACKWARD) for number in range(work)]
        in_turn = chain.from_iterable(zip(forwards[first:], backwards, strict=False))
        return (*forwards[:first], *in_turn, *backwards[work - first :])

    rank_of = tuple(stage % n_ranks for stage in range(n_ranks * stages_per_rank))
    return Schedule("interleaved", microbatches, (rank_of,), tuple(map(order, range(n_ranks))))
