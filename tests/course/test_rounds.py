"""Films of collectives: where they end, and that their messages are those of the programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch

from dsv3_mini.course import ring
from dsv3_mini.course.ranks import run
from dsv3_mini.course.rounds import FILMS, Piece

PROGRAMS: dict[str, Callable] = {
    "broadcast": ring.broadcast_tree,
    "all-gather": ring.all_gather,
    "reduce-scatter": ring.reduce_scatter,
    "all-reduce": ring.all_reduce,
    "all-reduce by way of rank 0": ring.all_reduce_at_zero,
    "all-to-all": ring.all_to_all,
}
SIZES = pytest.mark.parametrize("n", [2, 3, 4, 5, 8])


@SIZES
def test_films_end_where_collectives_do(n: int) -> None:
    everybody = tuple(range(n))
    for name, film in ((name, make(n)) for name, make in FILMS.items()):
        end = film.state(len(film.rounds))
        for rank, row in enumerate(end):
            wanted = {
                "broadcast": [Piece(j, (0,)) for j in range(n)],
                "all-gather": [Piece(j, (j,)) for j in range(n)],
                "reduce-scatter": [Piece(j, everybody if j == rank else ()) for j in range(n)],
                "all-to-all": [Piece(rank, (j,)) for j in range(n)],
            }.get(name, [Piece(j, everybody) for j in range(n)])
            assert list(row) == wanted, (name, rank)


@SIZES
def test_their_messages_are_the_programs(n: int) -> None:
    """Who sends how many pieces to whom, in all."""
    for name, program in PROGRAMS.items():
        film = FILMS[name](n)
        table = name in ("reduce-scatter", "all-to-all")
        inputs = [torch.ones((n, 3) if table else (3 if name == "all-gather" else 3 * n)) for _ in range(n)]
        sent = Counter()
        for message in run(program, inputs).messages:
            sent[message.source, message.target] += message.bytes // 12
        assert sent == Counter((m.source, m.target) for moves in film.rounds for m in moves), name


@SIZES
def test_a_rank_sends_to_one_and_hears_one_in_a_round(n: int) -> None:
    for name, make in FILMS.items():
        for moves in make(n).rounds:
            pairs = {(m.source, m.target) for m in moves}
            assert len({s for s, _ in pairs}) == len(pairs) == len({t for _, t in pairs}), name


def test_a_round_lasts_as_long_as_its_largest_message() -> None:
    assert FILMS["all-reduce"](4).lengths == [1] * 6
    assert FILMS["all-reduce by way of rank 0"](4).lengths == [4] * 6
    assert FILMS["broadcast"](8).lengths == [8] * 3
    assert FILMS["all-reduce"](4).sent(4) == [4] * 4
