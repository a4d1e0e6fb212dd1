"""Ranks in one process: their messages, their clocks, who is stuck; and the collectives that they run."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv3_mini.course import ring
from dsv3_mini.course.ranks import Message, Rank, Stuck, Wires, on_ranks, run

ALPHA, SPEED, INSIDE = 1e-5, 50e9, 160e9


def tensors(ranks: int, *shape: int, seed: int = 0) -> list[Tensor]:
    """Whole numbers, so that sums in any order are the same."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(-99, 99, shape, generator=draw).float() for _ in range(ranks)]


# ---- collectives, by their definitions ---------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(n=st.integers(1, 9), m=st.integers(1, 5), seed=st.integers(0, 99))
def test_collectives_do_what_their_names_say(n: int, m: int, seed: int) -> None:
    rows = tensors(n, n, m, seed=seed)
    table = torch.stack(rows)  # sender, piece, number
    total, whole = table.sum(0), [row.flatten() for row in rows]
    cases: list[tuple[Callable[..., Tensor], list[Tensor], list[Tensor]]] = [
        (ring.all_gather, [row[0] for row in rows], [table[:, 0]] * n),
        (ring.reduce_scatter, rows, list(total)),
        (ring.all_reduce, whole, [total.flatten()] * n),
        (ring.all_reduce_at_zero, whole, [total.flatten()] * n),
        (ring.all_to_all, rows, list(table.transpose(0, 1))),
        (ring.broadcast_tree, whole, [whole[0]] * n),
    ]
    for program, inputs, wanted in cases:
        for got, right in zip(run(program, inputs).results, wanted, strict=True):
            assert torch.equal(got, right), program.__name__


@pytest.mark.parametrize("n", [1, 2, 4, 8, 16])
def test_other_ways_to_the_same_sum(n: int) -> None:
    xs = tensors(n, 16)
    for way in (ring.all_reduce_by_doubling, lambda me, x: ring.all_reduce_in_nodes(me, x, min(4, n))):
        assert all(torch.equal(result, sum(xs)) for result in run(way, xs).results)


def test_bytes_are_those_of_the_textbook() -> None:
    for n in (2, 3, 8):
        xs = tensors(n, 6 * n)
        size = 4 * 6 * n
        ran = run(ring.all_reduce, xs)
        assert set(ran.sent) == set(ran.received) == {2 * (n - 1) * size // n}
        assert {(m.source, m.target) for m in ran.messages} == {(r, (r + 1) % n) for r in range(n)}
        assert run(ring.all_reduce_at_zero, xs).sent == [(n - 1) * size, *[size] * (n - 1)]


# ---- clocks ------------------------------------------------------------------------------------------------------------


def test_a_message_takes_latency_and_its_bytes_and_wires_carry_one_at_a_time() -> None:
    def program(me: Rank, x: Tensor) -> None:
        if me.number == 0:
            me.send(x, 1)
            me.send(x, 2)
        elif me.number == 2:
            me.send(x, 1)
            me.receive(0)
        else:
            me.receive(0)
            me.receive(2)

    wires = Wires(latency=1.0, speed=4.0)
    ran = run(program, [torch.zeros(2)] * 3, wires=wires)  # 8 bytes, 2 seconds
    found = {(m.source, m.target): (m.start, m.end) for m in ran.messages}
    assert found == {(0, 1): (0, 3), (0, 2): (2, 5), (2, 1): (0, 5)}, "out of 0 one by one, into 1 one by one"
    assert ran.seconds == 5
    assert ran.messages[0] == Message(0, 0, 1, 8, 0, 3)


@pytest.mark.parametrize("size", [2**8, 2**16, 2**26])
def test_times_are_those_of_the_formulas(size: int) -> None:
    wires, n = Wires(ALPHA, SPEED), 8
    xs = [torch.empty(size // 4, device="meta")] * n
    for way, time in (
        (ring.all_reduce, 2 * (n - 1) * (ALPHA + size / n / SPEED)),
        (ring.all_reduce_by_doubling, 3 * (ALPHA + size / SPEED)),
        (ring.all_reduce_at_zero, 2 * ALPHA + 2 * (n - 1) * size / SPEED),
    ):
        assert run(way, xs, wires=wires).seconds == pytest.approx(time, rel=1e-9), way.__name__
    nodes = Wires(ALPHA, SPEED, node=4, inside=INSIDE)
    inside, across = 2 * 3 * (ALPHA + size / 4 / INSIDE), 2 * (ALPHA + size / 8 / SPEED)
    ran = run(lambda me, x: ring.all_reduce_in_nodes(me, x, 4), xs, wires=nodes)
    assert ran.seconds == pytest.approx(inside + across, rel=1e-9)
    assert math.isclose(sum(m.bytes for m in ran.messages if not nodes.same_node(m.source, m.target)), 2 * size)


# ---- what goes wrong ---------------------------------------------------------------------------------------------------


def in_a_ring(me: Rank, x: Tensor) -> Tensor:
    return me.receive((me.number + 1) % me.count)


def waits_for_one_that_ended(me: Rank, x: Tensor) -> Tensor | None:
    return me.receive(2) if me.number < 2 else None


def sends_too_much(me: Rank, x: Tensor) -> None:
    me.send(x, (me.number + 1) % me.count)


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (in_a_ring, "rank 0 waits for rank 1; rank 1 waits for rank 2; rank 2 waits for rank 0"),
        (waits_for_one_that_ended, "rank 0 waits for rank 2, which has ended; rank 1 waits for rank 2, which"),
        (sends_too_much, "rank 0 sent rank 1 a message that it never received"),
    ],
)
def test_the_stuck_are_named(program: Callable[..., None], words: str) -> None:
    with pytest.raises(Stuck, match=words):
        run(program, tensors(3, 2))


def test_an_error_of_one_rank_ends_all() -> None:
    def program(me: Rank, x: Tensor) -> Tensor:
        if me.number == 1:
            raise ZeroDivisionError("here")
        return me.receive(1)

    before = threading.active_count()
    with pytest.raises(ZeroDivisionError, match="here"):
        run(program, tensors(4, 2))
    with pytest.raises(ValueError, match="itself"):
        run(lambda me, x: me.send(x, me.number), tensors(2, 2))
    assert threading.active_count() == before


def test_a_message_is_what_it_was_when_it_was_sent() -> None:
    def program(me: Rank, x: Tensor) -> Tensor:
        x = x.clone()
        me.send(x, 1 - me.number)
        x.zero_()
        return me.receive(1 - me.number)

    xs = tensors(2, 3)
    assert torch.equal(run(program, xs).results[0], xs[1])


def test_groups_have_numbers_of_their_own() -> None:
    def program(me: Rank, x: Tensor) -> Tensor:
        column = me.among(range(me.number % 3, 6, 3))
        assert (column.number, column.count) == (me.number // 3, 2)
        return ring.all_reduce(column, x)

    xs = tensors(6, 4)
    for number, result in enumerate(on_ranks(program)(xs)):
        assert torch.equal(result, xs[number % 3] + xs[number % 3 + 3])
    assert on_ranks(program).__name__ == "program"
