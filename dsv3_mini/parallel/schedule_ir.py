"""Pipeline schedules as data: which rank computes what, and in which order (report section 3.2.1, Figure 5).

A model is cut into stages (consecutive layers) that lie on different ranks, a batch into microbatches. What is done
with one microbatch at one stage is an op:

    F   forward: takes the activation that the stage before gives, and gives its own
    B   full backward: takes the gradient that the stage behind gives, gives its own, and makes the weights' gradients
    I   backward for the input alone, which is all that the stage before waits for ...
    W   ... and backward for the weights, which nobody waits for: it fills a gap later.  B is I and W in one piece

A slot is what a rank does at one time: one op, or a forward and a full backward of two microbatches which hide each
other's communication (F&B). A schedule says for each rank its slots in their order, and no more. When a slot begins
follows from what it waits for (schedule_simulator.py); whether all of it can be done is another file's question
(schedule_checker.py).

Where a stage lies is `rank_of[direction][stage]`:

    1F1B, ZB1P    stage s on rank s
    interleaved   stage s on rank s modulo ranks: a rank holds several stages, round after round
    DualPipeV     down the ranks and up again, like the letter: rank r holds stages r and 2 ranks - 1 - r
    DualPipe      two directions: half of the microbatches enter at the last rank and run against the others; each
                  stage lies on two ranks, once for each direction

Activations of a microbatch are kept at a stage from its F until its B or W is done. (An I could free a part of them:
what only the input's gradient needs. The report's Table 2 does not count so finely, and neither does this file.)
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Literal, NamedTuple

from dsv3_mini.errors import UserError


class ScheduleError(UserError, ValueError):
    """A schedule that cannot be made, or cannot be run; one line that names rank, microbatch and phase."""


class Phase(StrEnum):
    """The letters of the module's docstring."""

    FORWARD = "F"
    BACKWARD = "B"
    INPUT = "I"
    WEIGHT = "W"


class Result(NamedTuple):
    """What an op leaves behind for others: a stage's activation or, on the way back, its gradient."""

    kind: Literal["activation", "gradient"]
    microbatch: int
    stage: int
    direction: int


class Op(NamedTuple):
    """One microbatch, counted from 0 in each direction, at one stage. Text: "2F5", in the other direction "2F5'"."""

    phase: Phase
    microbatch: int
    stage: int
    direction: int = 0

    def __str__(self) -> str:
        return f"{self.stage}{self.phase}{self.microbatch}" + "'" * self.direction

    @property
    def gives(self) -> Result | None:
        """Weights' gradients stay where they are: W gives nothing."""
        if self.phase == Phase.WEIGHT:
            return None
        return self._result("activation" if self.phase == Phase.FORWARD else "gradient", self.stage)

    def needs(self, n_stages: int) -> tuple[Result, ...]:
        """What has to be there before it starts, its own rank's earlier work included."""
        if self.phase == Phase.FORWARD:
            return (self._result("activation", self.stage - 1),) if self.stage > 0 else ()
        if self.phase == Phase.WEIGHT:
            return (self._result("gradient", self.stage),)
        own = self._result("activation", self.stage)
        return (own, self._result("gradient", self.stage + 1)) if self.stage < n_stages - 1 else (own,)

    def _result(self, kind: Literal["activation", "gradient"], stage: int) -> Result:
        return Result(kind, self.microbatch, stage, self.direction)


@dataclass(frozen=True)
class Slot:
    """What a rank does at one time: one op, or (F, B) overlapped. Text: "2F5", "2F5&1B3"."""

    ops: tuple[Op, ...]

    @property
    def kind(self) -> str:
        """The letters of its ops: F, B, I, W, or F&B."""
        return "&".join(op.phase for op in self.ops)

    def __str__(self) -> str:
        return "&".join(map(str, self.ops))


@dataclass(frozen=True)
class Schedule:
    """A step of training: `order[rank]` are the rank's slots.

    Args:
        microbatches: in each direction.
        rank_of: for each direction (one, or two), for each stage the rank that holds it.

    Raises:
        ScheduleError: the sizes do not agree. Whether the order can be run is asked with schedule_checker.check.
    """

    name: str
    microbatches: int
    rank_of: tuple[tuple[int, ...], ...]
    order: tuple[tuple[Slot, ...], ...]

    def __post_init__(self) -> None:
        require_whole("microbatches", self.microbatches)
        if not self.rank_of or not self.rank_of[0] or len({len(stages) for stages in self.rank_of}) > 1:
            raise ScheduleError("rank_of must name a rank for every stage, and as many stages in each direction")
        named = {rank for stages in self.rank_of for rank in stages}
        if named != set(range(self.n_ranks)):
            raise ScheduleError(
                f"rank_of names ranks {sorted(named)} and order has {self.n_ranks} rows: each of ranks 0 to "
                f"{self.n_ranks - 1} must hold a stage, and no other"
            )

    @property
    def n_ranks(self) -> int:
        return len(self.order)

    @property
    def n_stages(self) -> int:
        return len(self.rank_of[0])

    @property
    def directions(self) -> int:
        return len(self.rank_of)

    @property
    def total_microbatches(self) -> int:
        return self.microbatches * self.directions

    def stages_on(self, rank: int) -> tuple[tuple[int, int], ...]:
        """(stage, direction) of what a rank holds; their number is what Table 2 calls parameters, in stages."""
        return tuple(
            (stage, direction)
            for direction, ranks in enumerate(self.rank_of)
            for stage, holder in enumerate(ranks)
            if holder == rank
        )

    def held(self, rank: int) -> tuple[int, ...]:
        """During each slot of a rank: how many activations (of one microbatch at one stage) it keeps."""
        counts, kept = [], 0
        for slot in self.order[rank]:
            kept += sum(op.phase == Phase.FORWARD for op in slot.ops)
            counts.append(kept)
            kept -= sum(op.phase in (Phase.BACKWARD, Phase.WEIGHT) for op in slot.ops)
        return tuple(counts)

    @cached_property
    def peak_activations(self) -> tuple[int, ...]:
        """The high-water mark of each rank, in activations of one microbatch at one stage."""
        return tuple(max(self.held(rank), default=0) for rank in range(self.n_ranks))

    def lines(self) -> tuple[str, ...]:
        """A line of text for each rank, slots in their order: "0F0 0F1 0B0 0B1"."""
        return tuple(" ".join(map(str, slots)) for slots in self.order)


def slot(phase: Phase, microbatch: int, stage: int, direction: int = 0) -> Slot:
    """A slot of one op."""
    return Slot((Op(phase, microbatch, stage, direction),))


def require_whole(name: str, value: int, least: int = 1, because: str = "") -> None:
    """Refuse a number that is not whole, or too small.

    Raises:
        ScheduleError: `value` is no whole number of at least `least`.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ScheduleError(f"{name} = {value!r} must be a whole number of at least {least}{because}")
