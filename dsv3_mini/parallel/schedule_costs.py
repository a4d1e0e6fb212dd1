"""What a slot of a schedule costs: from the parts of a layer to the times of F, B, I, W and F&B (report section 3.2.1).

A layer has two parts that compute, attention and MLP (the experts), and two that communicate, dispatch (tokens
to their experts) and combine (results home). With experts on many machines communication takes about as long as
computation, which is why the report overlaps a whole forward with a whole backward. Its Figure 4, for one layer of
each; time runs to the right:

    computes       MLP(B)        MLP(W)    MLP(F)        ATTN(B)    ATTN(W)   ATTN(F)
    communicates   DISPATCH(F)   DISPATCH(B)             COMBINE(F)           COMBINE(B)

A forward layer goes attention, dispatch, MLP, combine; a backward layer the other way. The gradient of a combine
travels as a dispatch does (a token to its experts), that of a dispatch as a combine: the times of the two change
places.

Simplifications: all stages cost the same; a message from rank to rank takes no time; communication takes nothing from
computation (in the report it takes 20 of 132 SMs).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from dsv3_mini.parallel.schedule_ir import ScheduleError


@dataclass(frozen=True)
class PhaseCosts:
    """Times of a stage's ops on one microbatch, in any unit. Whole numbers stay whole in everything computed from them.

    Args:
        forward, input, weight: F, I and W. overlapped: F&B; None means that nothing is hidden, F + I + W.

    Raises:
        ScheduleError: a time is no number of at least 0.
    """

    forward: float = 1
    input: float = 1
    weight: float = 1
    overlapped: float | None = None

    def __post_init__(self) -> None:
        for name in ("forward", "input", "weight", "overlapped"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ScheduleError(f"{name} = {value!r} must be a time of at least 0")

    @property
    def backward(self) -> float:
        return self.input + self.weight

    @property
    def both(self) -> float:
        """F&B."""
        return self.forward + self.backward if self.overlapped is None else self.overlapped

    def of(self, kind: str) -> float:
        """Of a slot's kind: "F", "B", "I", "W" or "F&B"."""
        return {
            "F": self.forward,
            "B": self.backward,
            "I": self.input,
            "W": self.weight,
            "F&B": self.both,
        }[kind]

    def scaled(self, share: float) -> PhaseCosts:
        """Of a stage that is larger or smaller."""
        overlapped = None if self.overlapped is None else self.overlapped * share
        return PhaseCosts(self.forward * share, self.input * share, self.weight * share, overlapped)


class Part(NamedTuple):
    """A part that computes: its times forward, backward for the input and backward for the weights."""

    forward: float
    input: float
    weight: float


class Piece(NamedTuple):
    """One part of one layer in an overlapped pair: "MLP(B)" and so on, and when it runs."""

    name: str
    layer: int
    computes: bool
    start: float
    end: float


@dataclass(frozen=True)
class ChunkCosts:
    """A stage of `layers` equal layers, by the times of a layer's parts."""

    attention: Part
    mlp: Part
    dispatch: float
    combine: float
    layers: int = 1

    @property
    def communication(self) -> float:
        """A layer's, in one pass: forward and backward take the same."""
        return self.dispatch + self.combine

    def overlap(self) -> tuple[Piece, ...]:
        """Figure 4 with its waiting times: one stage's forward and another's backward, all layers, on two streams.

        Each stream keeps its order; a piece waits for the one before it on its stream, and in its layer.
        """
        free = {True: 0, False: 0}  # when each stream has time again, computing or communicating
        done: dict[tuple[str, int], float] = {}
        pieces = []

        def run(name: str, layer: int, time: float, after: str | None = None, of: int | None = None) -> None:
            computes = name.startswith(("ATTN", "MLP"))
            start = max(free[computes], 0 if after is None else done[after, layer if of is None else of])
            free[computes] = done[name, layer] = start + time
            pieces.append(Piece(name, layer, computes, start, start + time))

        # Layers are counted in the order in which they come, so the backward's layer 0 is the stage's last.
        run("COMBINE(B)", 0, self.dispatch)
        run("ATTN(F)", 0, self.attention.forward)
        for layer in range(self.layers):
            run("DISPATCH(F)", layer, self.dispatch, after="ATTN(F)")
            run("MLP(B)", layer, self.mlp.input, after="COMBINE(B)")
            run("DISPATCH(B)", layer, self.combine, after="MLP(B)")
            run("MLP(W)", layer, self.mlp.weight)
            run("MLP(F)", layer, self.mlp.forward, after="DISPATCH(F)")
            run("COMBINE(F)", layer, self.combine, after="MLP(F)")
            run("ATTN(B)", layer, self.attention.input, after="DISPATCH(B)")
            run("ATTN(W)", layer, self.attention.weight)
            if layer + 1 < self.layers:
                run("COMBINE(B)", layer + 1, self.dispatch, after="ATTN(B)", of=layer)
                run("ATTN(F)", layer + 1, self.attention.forward, after="COMBINE(F)", of=layer)
        return tuple(pieces)

    def phases(self) -> PhaseCosts:
        """Times of a stage's ops: alone they wait for their communication, in F&B most of it is hidden."""
        return PhaseCosts(
            forward=self.layers * (self.attention.forward + self.mlp.forward + self.communication),
            input=self.layers * (self.attention.input + self.mlp.input + self.communication),
            weight=self.layers * (self.attention.weight + self.mlp.weight),
            overlapped=max(piece.end for piece in self.overlap()),
        )
