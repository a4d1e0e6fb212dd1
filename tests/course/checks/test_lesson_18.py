"""Lesson 18's checks: each right answer accepted, each wrong one refused with its own hint, a blank one only noted."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lesson_answers import (  # noqa: F401
    test_blank_is_unsolved_and_every_exercise_knows_mistakes,
    test_right_answers_are_accepted,
    test_wrong_answers_get_their_own_hint,
)
from torch import Tensor

from dsv3_mini.course.checks import lesson_18 as check
from dsv3_mini.course.checks.framework import Exercise
from dsv3_mini.course.ranks import Rank
from dsv3_mini.course.ring import all_gather, all_reduce, reduce_scatter

# ---- right answers, each written in two ways ---------------------------------------------------------------------------


def gather_to_the_left(me: Rank, piece: Tensor) -> Tensor:
    """The ring the other way round."""
    found = {me.number: piece}
    for step in range(me.count - 1):
        me.send(found[(me.number + step) % me.count], to=(me.number - 1) % me.count)
        found[(me.number + step + 1) % me.count] = me.receive((me.number + 1) % me.count)
    return torch.stack([found[r] for r in range(me.count)])


def gather_from_everybody(me: Rank, piece: Tensor) -> Tensor:
    """No ring: everybody to everybody, as many bytes."""
    others = [r for r in range(me.count) if r != me.number]
    for other in others:
        me.send(piece, other)
    rows = torch.empty(me.count, *piece.shape)
    rows[me.number] = piece
    for other in others:
        rows[other] = me.receive(other)
    return rows


def scatter_directly(me: Rank, pieces: Tensor) -> Tensor:
    for r in range(me.count):
        if r != me.number:
            me.send(pieces[r], r)
    return pieces[me.number] + sum(me.receive(r) for r in range(me.count) if r != me.number)


def scatter_to_the_left(me: Rank, pieces: Tensor) -> Tensor:
    travels = pieces[(me.number + 1) % me.count]
    for step in range(1, me.count):
        me.send(travels, (me.number - 1) % me.count)
        travels = me.receive((me.number + 1) % me.count) + pieces[(me.number + 1 + step) % me.count]
    return travels


def step_by_chunks(me: Rank, weights: Tensor, gradient: Tensor, momentum: Tensor, rate: float, beta: float) -> Any:
    momentum = momentum * beta + scatter_directly(me, gradient.view(me.count, -1))
    return gather_from_everybody(me, weights.chunk(me.count)[me.number] - rate * momentum).flatten(), momentum


def step_of_differences(me: Rank, weights: Tensor, gradient: Tensor, momentum: Tensor, rate: float, beta: float) -> Any:
    """Gathers what is to be taken off, not the weights."""
    momentum = torch.add(reduce_scatter(me, gradient.reshape(me.count, -1)), momentum, alpha=beta)
    return weights - rate * all_gather(me, momentum).reshape(-1), momentum


def bytes_by_table(parameters: int, ranks: int, stage: int) -> float:
    whole, shared = {0: (16, 0), 1: (4, 12), 2: (2, 14), 3: (0, 16)}[stage]
    return parameters * (whole + shared / ranks)


def bytes_by_sums(parameters: int, ranks: int, stage: int) -> int:
    share = parameters // ranks
    total = 12 * (share if stage >= 1 else parameters)
    total += 2 * (share if stage >= 2 else parameters)
    return total + 2 * (share if stage == 3 else parameters)


def one_sum_then_reduce(me: Rank, gradients: list[Tensor]) -> Tensor:
    return all_reduce(me, torch.stack(gradients).sum(0))


def one_sum_in_two_parts(me: Rank, gradients: list[Tensor]) -> Tensor:
    own = reduce_scatter(me, sum(gradients).view(me.count, -1))
    return all_gather(me, own).view(-1)


RIGHT: list[tuple[Exercise, Callable[..., Any]]] = [
    (check.ring_all_gather, gather_to_the_left),
    (check.ring_all_gather, gather_from_everybody),
    (check.ring_reduce_scatter, scatter_directly),
    (check.ring_reduce_scatter, scatter_to_the_left),
    (check.sharded_step, step_by_chunks),
    (check.sharded_step, step_of_differences),
    (check.bytes_per_rank, bytes_by_table),
    (check.bytes_per_rank, bytes_by_sums),
    (check.step_gradient, one_sum_then_reduce),
    (check.step_gradient, one_sum_in_two_parts),
]


# ---- wrong answers -----------------------------------------------------------------------------------------------------


def in_order_of_arrival(me: Rank, piece: Tensor) -> Tensor:
    pieces = [piece]
    while len(pieces) < me.count:
        me.send(pieces[-1], (me.number + 1) % me.count)
        pieces.append(me.receive((me.number - 1) % me.count))
    return torch.stack(pieces)


def its_own_each_time(me: Rank, piece: Tensor) -> Tensor:
    rows = torch.stack([piece] * me.count)
    for step in range(1, me.count):
        me.send(piece, (me.number + 1) % me.count)
        rows[(me.number - step) % me.count] = me.receive((me.number - 1) % me.count)
    return rows


def ring_by(me: Rank, piece: Tensor, sign: int = -1, rounds: int | None = None) -> Tensor:
    rows = torch.stack([piece] * me.count)
    for step in range(1, (me.count if rounds is None else me.count + rounds)):
        me.send(piece, (me.number + 1) % me.count)
        piece = me.receive((me.number - 1) % me.count)
        rows[(me.number + sign * step) % me.count] = piece
    return rows


def all_it_knows(me: Rank, piece: Tensor) -> Tensor:
    """A tensor that grows from round to round."""
    known = piece[None]
    for _ in range(me.count - 1):
        me.send(known, (me.number + 1) % me.count)
        known = torch.cat([me.receive((me.number - 1) % me.count), piece[None]])
    return known.roll(me.number + 1, dims=0)


def waits_first(me: Rank, piece: Tensor) -> Tensor:
    rows = torch.stack([piece] * me.count)
    for step in range(1, me.count):
        rows[(me.number - step) % me.count] = me.receive((me.number - 1) % me.count)
        me.send(piece, (me.number + 1) % me.count)
    return rows


def gather_through_zero(me: Rank, piece: Tensor) -> Tensor:
    if me.number == 0:
        rows = torch.stack([piece] + [me.receive(r) for r in range(1, me.count)])
        [me.send(rows, r) for r in range(1, me.count)]
        return rows
    me.send(piece, 0)
    return me.receive(0)


def scatter_from(me: Rank, pieces: Tensor, first: int, adds: bool = True) -> Tensor:
    at = (me.number + first) % me.count
    travels = pieces[at]
    for _ in range(me.count - 1):
        me.send(travels, (me.number + 1) % me.count)
        at = (at - 1) % me.count
        travels = me.receive((me.number - 1) % me.count) + adds * pieces[at]
    return travels


def own_instead_of_sum(me: Rank, pieces: Tensor) -> Tensor:
    result = pieces[(me.number - 1) % me.count]
    for step in range(1, me.count):
        me.send(pieces[(me.number - step) % me.count], (me.number + 1) % me.count)
        result = me.receive((me.number - 1) % me.count) + pieces[(me.number - step - 1) % me.count]
    return result


def step_with(me: Rank, w: Tensor, g: Tensor, m: Tensor, rate: float, beta: float, wrong: str) -> Any:
    n = me.count
    rows = g.view(n, -1)
    own = {"alone": lambda: rows[me.number], "whole": lambda: all_reduce(me, g).view(n, -1)[me.number]}.get(
        wrong, lambda: reduce_scatter(me, rows)
    )()
    own = own / n if wrong == "mean" else own
    m = own if wrong == "forgets" else beta * m + own
    piece = w.view(n, -1)[(me.number + (wrong == "neighbour")) % n] - rate * (own if wrong == "plain" else m)
    if wrong == "keeps":
        return torch.cat([piece if r == me.number else w.view(n, -1)[r] for r in range(n)]), m
    return all_gather(me, piece).flatten(), m


def stepping(wrong: str) -> Callable[..., Any]:
    return lambda *args: step_with(*args, wrong=wrong)


def bytes_with(*stages: tuple[int, int]) -> Callable[[int, int, int], float]:
    """stages[s]: bytes of a parameter that are whole, and that are shared."""
    return lambda parameters, ranks, stage: parameters * (stages[stage][0] + stages[stage][1] / ranks)


def reduces_each_time(me: Rank, gradients: list[Tensor]) -> Tensor:
    total = gradients[0] * 0
    for each in gradients:
        total = total + each
        total = all_reduce(me, total)
    return total


WRONG: list[tuple[Exercise, Callable[..., Any], str]] = [
    (check.ring_all_gather, in_order_of_arrival, "in which they came"),
    (check.ring_all_gather, its_own_each_time, "sends its own piece again and again"),
    (check.ring_all_gather, lambda me, x: ring_by(me, x, sign=1), "places of the wrong ranks"),
    (check.ring_all_gather, lambda me, x: ring_by(me, x, rounds=-1), "one round is missing"),
    (check.ring_all_gather, lambda me, x: ring_by(me, x, rounds=1), "one round too many"),
    (check.ring_all_gather, gather_through_zero, "by way of rank 0"),
    (check.ring_all_gather, all_it_knows, "only the piece that arrived last"),
    (check.ring_all_gather, waits_first, "each rank sends first"),
    (check.ring_all_gather, lambda me, x: ring_by(me, x).sum(0).repeat(me.count, 1), "nothing is added"),
    (check.ring_reduce_scatter, lambda me, x: scatter_from(me, x, 0), "next rank's piece"),
    (check.ring_reduce_scatter, lambda me, x: scatter_from(me, x, 1), "two places on"),
    (check.ring_reduce_scatter, lambda me, x: scatter_from(me, x, -1, adds=False), "nothing is added"),
    (check.ring_reduce_scatter, own_instead_of_sum, "only two ranks' numbers"),
    (check.ring_reduce_scatter, lambda me, x: scatter_from(me, x, -1) / me.count, "this is the mean"),
    (check.ring_reduce_scatter, lambda me, x: x[me.number] * 1, "nobody else's"),
    (check.ring_reduce_scatter, lambda me, x: all_reduce(me, x.view(-1)).view_as(x)[me.number], "twice the bytes"),
    (check.sharded_step, stepping("alone"), "own gradient only"),
    (check.sharded_step, stepping("mean"), "mean of the ranks' gradients"),
    (check.sharded_step, stepping("keeps"), "old weights of all others"),
    (check.sharded_step, stepping("forgets"), "old momentum is lost"),
    (check.sharded_step, stepping("plain"), "follow the gradient itself"),
    (check.sharded_step, stepping("neighbour"), "piece of weights is the neighbour's"),
    (check.sharded_step, stepping("whole"), "half of the bytes"),
    (check.bytes_per_rank, bytes_with((16, 0), (0, 16), (0, 16), (0, 16)), "share everything"),
    (check.bytes_per_rank, bytes_with((16, 0), (14, 2), (12, 4), (0, 16)), "weights first"),
    (check.bytes_per_rank, bytes_with((16, 0), (4, 12), (14, 2), (14, 2)), "stays shared"),
    (check.bytes_per_rank, bytes_with((16, 0), (16, 0), (4, 12), (2, 14)), "one stage behind"),
    (check.bytes_per_rank, bytes_with((16, 0), (4, 12), (4, 12), (0, 16)), "gradients stay whole"),
    (check.bytes_per_rank, bytes_with((12, 0), (4, 8), (2, 10), (0, 12)), "master copy is missing"),
    (check.step_gradient, reduces_each_time, "reduced again with the next"),
    (check.step_gradient, lambda me, gs: sum(all_reduce(me, g) for g in gs), "every one of them crosses"),
    (check.step_gradient, lambda me, gs: torch.stack(gs).sum(0), "all-reduce is missing"),
    (check.step_gradient, lambda me, gs: all_reduce(me, gs[-1]), "only the last micro-batch"),
    (check.step_gradient, lambda me, gs: all_reduce(me, sum(gs)) / me.count, "mean over the ranks"),
    (check.step_gradient, lambda me, gs: all_reduce(me, torch.stack(gs).mean(0)), "number of its own micro-batches"),
]


def test_a_reduce_for_every_micro_batch_hangs_where_counts_differ() -> None:
    """Bytes aside: with other numbers of micro-batches the same program never ends, and the check says who waits."""
    uneven = Exercise.__new__(check.Program)
    for name, value in vars(check.step_gradient).items():
        object.__setattr__(uneven, name, value)
    object.__setattr__(uneven, "cases", check.step_gradient.cases[3:4])
    result = uneven.run(lambda me, gs: sum(all_reduce(me, g) for g in gs))
    assert result.state == "wrong"
    assert "waits for rank" in result.lines[0] and "to which the others never come" in result.lines[1]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda me, x: None, "it returned nothing"),
        (lambda me, x: me.receive(9), "there are ranks 0 to 1"),
        (lambda me, x: x.add_(1), "changes its input number 2 in place"),
        (lambda me, x: me.send(x, 1 - me.number) or torch.stack([x, x]), "a message that it never received"),
        (lambda me, x: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_what_goes_wrong_is_said(answer: Callable[..., Any], words: str) -> None:
    result = check.ring_all_gather.run(answer)
    assert result.state == "wrong" and words in "\n".join(result.lines)


def test_a_rank_that_never_ends_is_stopped() -> None:
    def forever(me: Rank, x: Tensor) -> Tensor:
        while me.number >= 0:
            pass
        return x

    quick = Exercise.__new__(check.Program)
    for name, value in vars(check.ring_all_gather).items():
        object.__setattr__(quick, name, value)
    object.__setattr__(quick, "seconds", 0.3)
    start = time.monotonic()
    assert "had not returned after 0.3 seconds" in quick.run(forever).lines[0]
    assert time.monotonic() - start < 10
    assert check.ring_all_gather.run(gather_to_the_left).passed, "and the next run is as any other"
