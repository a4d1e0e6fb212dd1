"""Schedules: every setting that changes during training is a function of the tokens seen, and of nothing else.

So a run can be stopped, resumed, or continued with another batch size, and its settings are those of an unbroken run.
A schedule is a chain of pieces, each running from a start value to an end value until a number of tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from dsv3_mini.errors import ConfigError


@dataclass(frozen=True)
class Piece:
    """From the end of the piece before `until` tokens: from `start` to `end`, in a straight line or half a cosine."""

    until: float
    start: float
    end: float
    shape: str = "linear"

    def at(self, share: float) -> float:
        """The value when `share` (0 to 1) of the piece is done."""
        if self.shape == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return self.start + (self.end - self.start) * share


@dataclass(frozen=True)
class Schedule:
    """Pieces in order of `until`; after the last one its end value stays.

    Raises:
        ConfigError: no pieces, pieces out of order, a shape that is not known, or a value that is not finite.
    """

    name: str
    pieces: tuple[Piece, ...]

    def __post_init__(self) -> None:
        if not self.pieces:
            raise ConfigError(f"{self.name} has no pieces: give at least one")
        before = 0.0
        for piece in self.pieces:
            if not piece.until > before:
                raise ConfigError(
                    f"{self.name}: a piece until {piece.until:g} tokens must end after {before:g}, in order"
                )
            if piece.shape not in ("linear", "cosine"):
                raise ConfigError(f"{self.name}: shape {piece.shape!r} must be 'linear' or 'cosine'")
            if not (math.isfinite(piece.start) and math.isfinite(piece.end)):
                raise ConfigError(f"{self.name}: a piece from {piece.start} to {piece.end} must have finite values")
            before = piece.until

    def __call__(self, tokens: float) -> float:
        """The value once `tokens` tokens have been seen."""
        begin = 0.0
        for piece in self.pieces:
            if tokens < piece.until:
                return piece.at((tokens - begin) / (piece.until - begin))
            begin = piece.until
        return self.pieces[-1].end

    def stretched(self, factor: float) -> Schedule:
        """The same values over `factor` times the tokens."""
        return replace(self, pieces=tuple(replace(piece, until=piece.until * factor) for piece in self.pieces))


def constant(name: str, value: float) -> Schedule:
    return Schedule(name, (Piece(math.inf, value, value),))


def steps(name: str, first: float, *changes: tuple[float, float]) -> Schedule:
    """`first`, and from each (tokens, value) of `changes` on that value."""
    untils = [tokens for tokens, _ in changes] + [math.inf]
    values = [first] + [value for _, value in changes]
    return Schedule(name, tuple(Piece(until, v, v) for until, v in zip(untils, values, strict=True)))


def tokens_after(steps_done: int, batch_size: Schedule, context: Schedule) -> int:
    """Tokens seen after some optimizer steps, by taking them: turns 'the first 2000 steps' into tokens."""
    tokens = 0
    for _ in range(steps_done):
        tokens += round(batch_size(tokens)) * round(context(tokens))
    return tokens
