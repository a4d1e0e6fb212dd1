"""Collectives as films: what each rank holds, and round by round which piece goes where (lesson 18).

A rank's tensor is a row of n pieces, numbered. A piece also says the ranks whose numbers are in it: (2,) is rank 2's own,
(0, 1, 2) a sum of three, () a place that holds nothing yet, or no more. In a round all moves happen at the same time, and a rank sends
to one other at most, so that a round lasts as long as its largest message.

These are the same messages as those of the programs in `ring.py`, all-to-all's in the order that swaps them in place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple


class Piece(NamedTuple):
    """What lies in a place: which piece of a tensor, and whose numbers are in it."""

    number: int
    ranks: tuple[int, ...]


State = tuple[tuple[Piece, ...], ...]  # by rank, by place


@dataclass(frozen=True)
class Move:
    """A piece from place `piece` of rank `source` to place `place` of rank `target`.

    adds: it is added to what lies there. leaves: the source's own place is empty afterwards.
    """

    source: int
    piece: int
    target: int
    place: int
    adds: bool = False
    leaves: bool = False


@dataclass(frozen=True)
class Film:
    """A collective on so many ranks, from its first state on."""

    name: str
    start: State
    rounds: tuple[tuple[Move, ...], ...]

    @property
    def ranks(self) -> int:
        return len(self.start)

    def state(self, number: int) -> State:
        """What each rank holds after so many rounds."""
        state = self.start
        for moves in self.rounds[:number]:
            state = after(state, moves)
        return state

    def sent(self, number: int) -> list[int]:
        """Pieces that each rank has sent after so many rounds."""
        moves = [move for each in self.rounds[:number] for move in each]
        return [sum(move.source == rank for move in moves) for rank in range(self.ranks)]

    @property
    def lengths(self) -> list[int]:
        """How many pieces the largest message of each round has."""
        return [
            max(sum(m.source == s and m.target == t for m in moves) for s, t in {(m.source, m.target) for m in moves})
            for moves in self.rounds
        ]


def after(state: State, moves: Sequence[Move]) -> State:
    """The state when all these moves, made at the same time, are over."""
    rows = [list(row) for row in state]
    for move in moves:
        if move.leaves:
            rows[move.source][move.piece] = Piece(move.piece, ())
    for move in moves:
        came = state[move.source][move.piece]
        here = state[move.target][move.place].ranks if move.adds else ()
        rows[move.target][move.place] = Piece(came.number, tuple(sorted({*came.ranks, *here})))
    return tuple(map(tuple, rows))


def _full(n: int) -> State:
    return tuple(tuple(Piece(place, (rank,)) for place in range(n)) for rank in range(n))


def _own_piece(n: int) -> State:
    return tuple(tuple(Piece(place, (rank,) if place == rank else ()) for place in range(n)) for rank in range(n))


def _row(source: int, target: int, n: int, adds: bool = False) -> tuple[Move, ...]:
    return tuple(Move(source, place, target, place, adds) for place in range(n))


def _gather(n: int) -> tuple[tuple[Move, ...], ...]:
    return tuple(tuple(Move(r, (r - step) % n, (r + 1) % n, (r - step) % n) for r in range(n)) for step in range(n - 1))


def _scatter(n: int) -> tuple[tuple[Move, ...], ...]:
    return tuple(
        tuple(Move(r, (r - step) % n, (r + 1) % n, (r - step) % n, adds=True, leaves=True) for r in range(n))
        for step in range(1, n)
    )


def broadcast(n: int) -> Film:
    """Those who have it double with each round."""
    rounds, reach = [], 1
    while reach < n:
        rounds.append(tuple(move for r in range(min(reach, n - reach)) for move in _row(r, r + reach, n)))
        reach *= 2
    start = tuple(tuple(Piece(place, () if rank else (0,)) for place in range(n)) for rank in range(n))
    return Film("broadcast", start, tuple(rounds))


def all_gather(n: int) -> Film:
    return Film("all-gather", _own_piece(n), _gather(n))


def reduce_scatter(n: int) -> Film:
    return Film("reduce-scatter", _full(n), _scatter(n))


def all_reduce(n: int) -> Film:
    return Film("all-reduce", _full(n), _scatter(n) + _gather(n))


def all_reduce_at_zero(n: int) -> Film:
    """By way of rank 0, which can hear one at a time."""
    there = tuple(_row(r, 0, n, adds=True) for r in range(1, n))
    return Film("all-reduce by way of rank 0", _full(n), there + tuple(_row(0, r, n) for r in range(1, n)))


def all_to_all(n: int) -> Film:
    """Ranks r and c - r swap their pieces for each other, for every c."""
    swaps = (((r, (c - r) % n) for r in range(n)) for c in range(n))
    rounds = (tuple(Move(r, other, other, r) for r, other in pairs if r != other) for pairs in swaps)
    return Film("all-to-all", _full(n), tuple(filter(None, rounds)))


FILMS: Mapping[str, Callable[[int], Film]] = MappingProxyType(
    {
        "broadcast": broadcast,
        "all-gather": all_gather,
        "reduce-scatter": reduce_scatter,
        "all-reduce": all_reduce,
        "all-reduce by way of rank 0": all_reduce_at_zero,
        "all-to-all": all_to_all,
    }
)
