"""GPipe: all forwards, then all backwards (arXiv 1811.06965): the pipeline that one would write first.

    rank 0   F0 F1 F2 F3 .  .  .  .  .  .  .  .  .  B0 B0 B1 B1 B2 B2 B3 B3
    rank 3   .  .  .  F0 F1 F2 F3 B0 B0 B1 B1 B2 B2 B3 B3

It idles exactly as long as 1F1B. What it costs is memory: when the last forward is done, every microbatch of the batch
is still kept on every rank.
"""

from __future__ import annotations

from dsv3_mini.parallel.schedule_ir import Phase, Schedule, require_whole, slot


def gpipe(n_ranks: int, microbatches: int) -> Schedule:
    """Stage s on rank s; a bubble of (PP - 1)(F + B), and as many activations as microbatches.

    Raises:
        ScheduleError: a number is not whole, or below 1.
    """
    require_whole("n_ranks", n_ranks)
    require_whole("microbatches", microbatches)
    order = tuple(
        tuple(slot(phase, number, rank) for phase in (Phase.FORWARD, Phase.BACKWARD) for number in range(microbatches))
        for rank in range(n_ranks)
    )
    return Schedule("GPipe", microbatches, (tuple(range(n_ranks)),), order)
