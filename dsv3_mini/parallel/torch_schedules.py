"""Torch's pipeline schedules by name, and what of each a plan must know. What they do tells schedules/from_torch.py.

    GPipe, 1F1B             one stage a process
    Interleaved1F1B         two, in rounds: stage s on process s mod pp
    InterleavedZeroBubble   the same, with the backward cut in two
    ZBVZeroBubble           two, in a V: down the processes and up again; everything cut in two
    DualPipeV               a V, forwards beside backwards, some of them cut in two

Names alone: nothing here waits for torch's own module of pipelines.
"""

from __future__ import annotations

ONE_STAGE = ("GPipe", "1F1B")
V_SHAPED = ("ZBVZeroBubble", "DualPipeV")
SPLIT = ("InterleavedZeroBubble", *V_SHAPED)  # backward for the inputs first, and for the weights later
TORCH_SCHEDULES = (*ONE_STAGE, "Interleaved1F1B", *SPLIT)


def stages_each(schedule: str) -> int:
    """Stages of one process."""
    return 1 if schedule in ONE_STAGE else 2
