"""Lesson 20's checks: each right answer accepted, each wrong one refused with its own hint, a blank one only noted."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any

import pytest
import torch
from lesson_answers import (  # noqa: F401
    test_blank_is_unsolved_and_every_exercise_knows_mistakes,
    test_right_answers_are_accepted,
    test_wrong_answers_get_their_own_hint,
)
from torch import Tensor

from dsv3_mini.course.checks import lesson_20 as check
from dsv3_mini.course.checks.framework import Exercise, exercises_of
from dsv3_mini.course.pipeline_order import order_of
from dsv3_mini.parallel.schedules import make_schedule
from dsv3_mini.parallel.schedules.from_torch import from_torch

Order = list[list[str]]

# ---- right answers, each written in two ways ---------------------------------------------------------------------------


def _need(op: str, rank: int, ranks: int) -> tuple[str, int] | None:
    if op[0] == "F":
        return (op, rank - 1) if rank > 0 else None
    return (op, rank + 1) if rank < ranks - 1 else ("F" + op[1:], rank)


def times_by_recursion(order: Order, forward: int, backward: int) -> list[list[int]]:
    """An op ends when it has waited for the one before and the one it needs, each asked in the same way."""
    known: dict[tuple[str, int], int] = {}

    def start(op: str, rank: int) -> int:
        place = order[rank].index(op)
        before = end(order[rank][place - 1], rank) if place else 0
        need = _need(op, rank, len(order))
        return max(before, end(*need) if need else 0)

    def end(op: str, rank: int) -> int:
        if (op, rank) not in known:
            known[op, rank] = start(op, rank) + (forward if op[0] == "F" else backward)
        return known[op, rank]

    return [[start(op, rank) for op in ops] for rank, ops in enumerate(order)]


def times_by_relaxing(order: Order, forward: int, backward: int) -> list[tuple[int, ...]]:
    """All at 0 first; then every start is moved to what it waits for, until nothing moves."""
    cost = {"F": forward, "B": backward}
    start = {(op, rank): 0 for rank, ops in enumerate(order) for op in ops}
    moved = True
    while moved:
        moved = False
        for (op, rank), now in list(start.items()):
            place, need = order[rank].index(op), _need(op, rank, len(order))
            waits = [(order[rank][place - 1], rank)] * (place > 0) + ([need] if need else [])
            later = max([now, *(start[each] + cost[each[0][0]] for each in waits)])
            moved |= later > now
            start[op, rank] = later
    return [tuple(start[op, rank] for op in ops) for rank, ops in enumerate(order)]


def kept_by_set(ops: list[str]) -> int:
    here, most = set(), 0
    for op in ops:
        if op[0] == "F":
            here.add(op[1:])
        most = max(most, len(here))
        if op[0] == "B" or op[0] == "W":
            here.remove(op[1:])
    return most


def kept_by_sums(ops: list[str]) -> int:
    return max(accumulate({"F": 1, "B": -1, "W": -1, "I": 0}[op[0]] for op in ops))


def package(name: str) -> Callable[[int, int], Order]:
    return lambda ranks, microbatches: order_of(make_schedule(name, ranks, microbatches))


def alternating_by_queue(ranks: int, microbatches: int) -> Order:
    """A rank runs a forward while it has room, and else a backward."""
    order = []
    for rank in range(ranks):
        ops, coming, here = [], deque(range(microbatches)), deque()
        while coming or here:
            if coming and len(here) < ranks - rank:
                here.append(coming.popleft())
                ops.append(f"F{here[-1]}")
            else:
                ops.append(f"B{here.popleft()}")
        order.append(ops)
    return order


def last_w_first(ranks: int, microbatches: int) -> Order:
    """ZB1P that takes the youngest waiting W instead of the oldest."""
    order = []
    for rank, row in enumerate(alternating_by_queue(ranks, microbatches)):
        ops, late = [], []
        for op in row:
            ops.append(op.replace("B", "I"))
            if op[0] == "B":
                late.append(f"W{op[1:]}")
                if len(late) > rank:
                    ops.append(late.pop())
        order.append(ops + late[::-1])
    return order


def split_by_queue(weight: Tensor, inputs: list[Tensor], grads: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    later = [partial(torch.einsum, "Tf,Td->fd", grad, x) for x, grad in zip(inputs, grads, strict=True)]
    return [grad @ weight for grad in grads], sum(run() for run in later)


def split_as_one(weight: Tensor, inputs: list[Tensor], grads: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    return [torch.einsum("Tf,fd->Td", grad, weight) for grad in grads], torch.cat(grads).T @ torch.cat(inputs)


RIGHT: list[tuple[Exercise, Callable[..., Any]]] = [
    (check.start_times, times_by_recursion),
    (check.start_times, times_by_relaxing),
    (check.most_kept, kept_by_set),
    (check.most_kept, kept_by_sums),
    (check.one_forward_one_backward, package("1F1B")),
    (check.one_forward_one_backward, alternating_by_queue),
    (check.zero_bubble, package("ZB1P")),
    (check.zero_bubble, last_w_first),
    (check.split_backward, split_by_queue),
    (check.split_backward, split_as_one),
]


# ---- wrong answers -----------------------------------------------------------------------------------------------------


def times_with(
    need: Callable[[str, int, int], tuple[str, int] | None] = _need, queue: bool = True, as_long: bool = False
) -> Callable[..., list[list[int]]]:
    """By relaxing, with other needs, no queue on a rank, or B as long as F."""

    def answer(order: Order, forward: int, backward: int) -> list[list[int]]:
        cost = {"F": forward, "B": forward if as_long else backward}
        start = {(op, rank): 0 for rank, ops in enumerate(order) for op in ops}
        for _ in start:
            for op, rank in start:
                place = order[rank].index(op)
                waits = [(order[rank][place - 1], rank)] * (queue and place > 0)
                waits += [wanted] if (wanted := need(op, rank, len(order))) else []
                start[op, rank] = max([0, *(start[each] + cost[each[0][0]] for each in waits)])
        return [[start[op, rank] for op in ops] for rank, ops in enumerate(order)]

    return answer


def ends(order: Order, forward: int, backward: int) -> list[list[int]]:
    cost = {"F": forward, "B": backward}
    starts = times_by_recursion(order, forward, backward)
    return [[t + cost[op[0]] for t, op in zip(row, ops, strict=True)] for row, ops in zip(starts, order, strict=True)]


def own_forward(op: str, rank: int, ranks: int) -> tuple[str, int] | None:
    return _need(op, rank, ranks) if op[0] == "F" else ("F" + op[1:], rank)


def from_above(op: str, rank: int, ranks: int) -> tuple[str, int] | None:
    return (op, rank - 1) if rank else own_forward(op, rank, ranks)


def in_step(order: Order, forward: int, backward: int) -> list[list[int]]:
    ticks = times_by_recursion(order, 1, 1)
    return [[max(forward, backward) * tick for tick in row] for row in ticks]


def by_number(order: Order, forward: int, backward: int) -> list[list[int]]:
    """Right as long as every kind's microbatches come in the order of their numbers."""
    tidy = []
    for ops in order:
        numbers = {kind: iter(sorted(int(op[1:]) for op in ops if op[0] == kind)) for kind in "FB"}
        tidy.append([f"{op[0]}{next(numbers[op[0]])}" for op in ops])
    starts = times_by_recursion(tidy, forward, backward)
    return [[row[names.index(op)] for op in ops] for row, names, ops in zip(starts, tidy, order, strict=True)]


def ahead(first: Callable[[int, int], int]) -> Callable[[int, int], Order]:
    """A queue with room for `first(ranks, rank)` and one more."""

    def answer(ranks: int, microbatches: int) -> Order:
        order = []
        for rank in range(ranks):
            lead = min(microbatches, max(0, first(ranks, rank)))
            ops = [f"F{m}" for m in range(lead)]
            for m in range(microbatches):
                if m + lead < microbatches:
                    ops.append(f"F{m + lead}")
                ops.append(f"B{m}")
            order.append(ops)
        return order

    return answer


def endless(ranks: int, microbatches: int) -> Order:
    order = []
    for rank in range(ranks):
        lead = ranks - 1 - rank
        order.append(
            [f"F{m}" for m in range(lead)] + [f"{x}{m + lead * (x == 'F')}" for m in range(microbatches) for x in "FB"]
        )
    return order


def without_the_last(ranks: int, microbatches: int) -> Order:
    order = []
    for rank, ops in enumerate(alternating_by_queue(ranks, microbatches)):
        order.append(ops[: len(ops) - (ranks - 1 - rank)])
    return order


def turned(ranks: int, microbatches: int) -> Order:
    order = []
    for rank in range(ranks):
        lead = min(microbatches, ranks - 1 - rank)
        ops = [f"F{m}" for m in range(lead)]
        for m in range(microbatches):
            ops.append(f"B{m}")
            if m + lead < microbatches:
                ops.append(f"F{m + lead}")
        order.append(ops)
    return order


def cut(waiting: Callable[[int, int], int], turn: bool = False, rest: bool = True) -> Callable[[int, int], Order]:
    def answer(ranks: int, microbatches: int) -> Order:
        order = []
        for rank, row in enumerate(alternating_by_queue(ranks, microbatches)):
            ops, late = [], deque()
            for op in row:
                if op[0] == "F":
                    ops.append(op)
                    continue
                late.append(f"W{op[1:]}")
                now = [late.popleft()] if len(late) > waiting(ranks, rank) else []
                ops += [*now, f"I{op[1:]}"] if turn else [f"I{op[1:]}", *now]
            order.append(ops + list(late) * rest)
        return order

    return answer


def no_w(ranks: int, microbatches: int) -> Order:
    return [[op.replace("B", "I") for op in ops] for ops in alternating_by_queue(ranks, microbatches)]


def by_lambdas(weight: Tensor, inputs: list[Tensor], grads: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    back, later = [], []
    for x, grad in zip(inputs, grads, strict=True):
        back.append(grad @ weight)
        later.append(lambda: grad.T @ x)  # noqa: B023
    return back, sum(run() for run in later)


def weights_as(weight_grad: Callable[[list[Tensor], list[Tensor]], Any]) -> Callable[..., Any]:
    return lambda weight, inputs, grads: ([grad @ weight for grad in grads], weight_grad(inputs, grads))


def pairs(inputs: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    return [grad.T @ x for x, grad in zip(inputs, grads, strict=True)]


WRONG: list[tuple[Exercise, Callable[..., Any], str]] = [
    (check.start_times, times_with(lambda op, rank, n: None if op[0] == "F" else ("F" + op[1:], rank)), "never wait"),
    (check.start_times, times_with(own_forward), "it also needs the gradient"),
    (check.start_times, times_with(from_above), "gradients go *up*"),
    (check.start_times, times_with(queue=False), "run at the same time"),
    (check.start_times, ends, "the times at which the ops *end*"),
    (check.start_times, times_with(as_long=True), "as long as forwards"),
    (check.start_times, in_step, "march in step"),
    (check.start_times, lambda o, f, b: max(map(max, ends(o, f, b))), "when the whole step is over"),
    (check.start_times, by_number, "take the ops as the order gives them"),
    (check.most_kept, lambda ops: kept_by_sums([op.replace("W", "x").replace("I", "W").replace("x", "I") for op in ops]),
     "you free an activation after I"),
    (check.most_kept, lambda ops: kept_by_sums([op.replace("W", "I") for op in ops]), "nothing is freed"),
    (check.most_kept, lambda ops: kept_by_sums([op.replace("I", "W") for op in ops]), "you free an activation after I"),
    (check.most_kept, lambda ops: len([op for op in ops if "F" in op]), "how many activations the rank makes in all"),
    (check.most_kept, lambda ops: 0, "what is left at the end"),
    (check.most_kept, lambda ops: kept_by_set(ops) - 1, "one too few"),
    (check.most_kept, lambda ops: [op[0] != "F" for op in ops].index(True), "before the first backward"),
    (check.one_forward_one_backward, package("GPipe"), "this is GPipe"),
    (check.one_forward_one_backward, ahead(lambda ranks, rank: 0), "F and B in turn from the start"),
    (check.one_forward_one_backward, ahead(lambda ranks, rank: rank), "count the ranks *below*"),
    (check.one_forward_one_backward, ahead(lambda ranks, rank: ranks - rank), "one forward too many"),
    (check.one_forward_one_backward, ahead(lambda ranks, rank: ranks - 1), "all ranks run the same number"),
    (check.one_forward_one_backward, ahead(lambda ranks, rank: ranks - rank - 2), "one forward too few"),
    (check.one_forward_one_backward, without_the_last, "the last backwards are missing"),
    (check.one_forward_one_backward, endless, "your forwards go on counting"),
    (check.one_forward_one_backward, turned, "B comes before F"),
    (check.zero_bubble, package("1F1B"), "still in one piece"),
    (check.zero_bubble, cut(lambda ranks, rank: 0), "each W follows its I at once"),
    (check.zero_bubble, cut(lambda ranks, rank: 99), "all W come at the end"),
    (check.zero_bubble, cut(lambda ranks, rank: ranks - 1 - rank), "rank 0 lets the most W wait"),
    (check.zero_bubble, cut(lambda ranks, rank: max(0, rank - 1)), "one W too few"),
    (check.zero_bubble, cut(lambda ranks, rank: rank + 1), "one W too many"),
    (check.zero_bubble, no_w, "there is no W at all"),
    (check.zero_bubble, cut(lambda ranks, rank: rank, rest=False), "the W that waited are never run"),
    (check.zero_bubble, cut(lambda ranks, rank: rank, turn=True), "W comes before I"),
    (check.split_backward, by_lambdas, "this is still the bug"),
    (check.split_backward, weights_as(lambda xs, gs: pairs(xs, gs)[-1]), "only the last microbatch's"),
    (check.split_backward, weights_as(lambda xs, gs: len(xs) * pairs(xs, gs)[0]), "computes the *first*"),
    (check.split_backward, weights_as(lambda xs, gs: sum(pairs(xs[::-1], gs))), "different microbatches are multiplied"),
    (check.split_backward, weights_as(lambda xs, gs: torch.stack(pairs(xs, gs)).mean(0)), "gradients add up"),
    (check.split_backward, weights_as(pairs), "here is a list of them"),
    (check.split_backward, weights_as(lambda xs, gs: sum(pairs(gs, xs))), "lies on its side"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("order", "words"),
    [
        (None, "is there a `return`"),
        ([["F0", "B0"]], "there are 1 lists of ops, and 2 ranks"),
        ("F0 B0", "an order is a list with a list of ops"),
        ([["F0", "B0"], ["F0", "X0"]], "rank 1, place 1: 'X0' is no op"),
        ([["F0", "F1", "B0", "B1"], ["F0", "F0", "B0", "B1"]], "rank 1: F of microbatch 0 at stage 1 stands 2 times"),
        ([["F0", "B0", "F1", "B1"], ["F0", "F1", "B0", "B1"]], "a ring, nobody can begin"),
        ([["F0", "B0", "F1", "B1"], ["F0", "B0", "F1", "B1"]], "a rank idles for 6, and 3 can be reached"),
        ([["F0", "F1", "B0", "B1"], ["F0", "F1", "B0", "B1"]], "rank 1 keeps 2 activations at one time, and has room for 1"),
    ],
)  # fmt: skip
def test_an_order_is_judged_by_running_it(order: Any, words: str) -> None:
    assert words in check.one_forward_one_backward.wrong(order, 2, 2)


def test_torchs_own_order_is_accepted() -> None:
    result = check.one_forward_one_backward.run(
        lambda r, m: order_of(from_torch("1F1B", r, m)) if m >= r else package("1F1B")(r, m)
    )
    assert result.passed, result


def test_the_lessons_exercises_in_their_order() -> None:
    names = ["start_times", "most_kept", "one_forward_one_backward", "zero_bubble", "split_backward"]
    assert list(exercises_of(check)) == names
