"""Lesson 20, DualPipe: the checks. Start times are compared with the package's simulator; the reader's schedulers are run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from dsv3_mini.course.checks.framework import Case, Exercise, Mistake, Property, Result, difference
from dsv3_mini.course.checks.guard import Problem, call
from dsv3_mini.course.pipeline_order import Order, order_of, schedule_of
from dsv3_mini.parallel.schedule_checker import problems
from dsv3_mini.parallel.schedule_costs import PhaseCosts
from dsv3_mini.parallel.schedule_ir import ScheduleError
from dsv3_mini.parallel.schedule_simulator import simulate
from dsv3_mini.parallel.schedules import make_schedule

# ---- start_times -------------------------------------------------------------------------------------------------------


def _start_times(order: Order, forward: int, backward: int) -> list[list[int]]:
    microbatches = len(order[0]) // 2
    timeline = simulate(schedule_of(order, microbatches), PhaseCosts(forward, backward, 0))
    return [list(times) for times in timeline.start]


def _waits(op: str, rank: int, last: int) -> list[tuple[str, int]]:
    """What an op needs, as (op, rank)."""
    if op[0] == "F":
        return [(op, rank - 1)] if rank else []
    return [(op, rank + 1)] if rank < last else [("F" + op[1:], rank)]


def _simulated(
    needs: Callable[[str, int, int], list[tuple[str, int]]] = _waits, alone: bool = True, equal: bool = False,
    finish: bool = False,
) -> Callable[..., list[list[int]]]:  # fmt: skip
    """A simulator with something wrong: other needs, a rank that does several things at once, B as long as F, ends."""

    def answer(order: Order, forward: int, backward: int) -> list[list[int]]:
        time = {"F": forward, "B": forward if equal else backward}
        end: dict[tuple[str, int], int] = {}
        start: list[list[int]] = [[] for _ in order]
        free = [0] * len(order)
        for _ in range(sum(map(len, order))):
            for rank, ops in enumerate(order):
                for op in ops[len(start[rank]) :]:
                    wants = needs(op, rank, len(order) - 1)
                    if any(want not in end for want in wants):
                        break
                    begins = max([free[rank] if alone else 0, *(end[want] for want in wants)])
                    start[rank].append(begins)
                    free[rank] = end[op, rank] = begins + time[op[0]]
        if finish:
            return [[end[op, rank] for op in ops] for rank, ops in enumerate(order)]
        return start

    return answer


def _own_only(op: str, rank: int, last: int) -> list[tuple[str, int]]:
    return [] if op[0] == "F" else [("F" + op[1:], rank)]


def _backward_from_own(op: str, rank: int, last: int) -> list[tuple[str, int]]:
    return _waits(op, rank, last) if op[0] == "F" else [("F" + op[1:], rank)]


def _backward_from_above(op: str, rank: int, last: int) -> list[tuple[str, int]]:
    return [(op, rank - 1)] if rank else _own_only(op, rank, last)


def _in_step(order: Order, forward: int, backward: int) -> list[list[int]]:
    """As if all ranks changed their slot at the same tick."""
    ticks = _simulated()(order, 1, 1)
    return [[tick * max(forward, backward) for tick in row] for row in ticks]


def _whole(order: Order, forward: int, backward: int) -> int:
    ends = _simulated(finish=True)(order, forward, backward)
    return max(map(max, ends))


def _order(what: str, name: str, ranks: int, microbatches: int) -> Case:
    def inputs(g: Generator) -> tuple[Order, int, int]:
        forward, more = (int(torch.randint(2, 9, (), generator=g)) for _ in range(2))
        return order_of(make_schedule(name, ranks, microbatches)), forward, forward + more

    return Case(what, inputs)


def _as_given(answer: Callable[..., Any]) -> bool:
    """Ops count by their place in the order, not by their number."""
    order = [["F1", "F0", "B1", "B0"], ["F1", "B1", "F0", "B0"], ["F1", "B1", "F0", "B0"]]
    return not difference(answer([list(ops) for ops in order], 2, 3), _start_times(order, 2, 3), 0)


start_times = Exercise(
    name="start_times",
    reference=_start_times,
    cases=[
        _order("one microbatch on 3 ranks", "GPipe", 3, 1),
        _order("GPipe, 4 microbatches on 2 ranks", "GPipe", 2, 4),
        _order("1F1B, 6 microbatches on 4 ranks", "1F1B", 4, 6),
        _order("1F1B, 12 microbatches on 8 ranks", "1F1B", 8, 12),
    ],
    mistakes=[
        Mistake(
            _simulated(_own_only),
            "your ranks never wait for each other: F needs the activation that the rank above gives (rank - 1), and B the "
            "gradient from the rank below (rank + 1).",
        ),
        Mistake(
            _simulated(_backward_from_own),
            "a backward starts here as soon as its own forward is done: it also needs the gradient, which comes from the rank "
            "*below*. Only on the last rank is its own F all that it needs.",
        ),
        Mistake(
            _simulated(_backward_from_above),
            "your backwards travel down the ranks as the forwards do: gradients go *up*. B on a rank waits for B on rank + 1.",
        ),
        Mistake(
            _simulated(alone=False),
            "several ops of one rank run at the same time: an op also waits until the op before it on its own rank is done.",
        ),
        Mistake(
            _simulated(finish=True),
            "these are the times at which the ops *end*: an op starts when the last of what it waits for has ended.",
        ),
        Mistake(
            _simulated(equal=True),
            "your backwards are as long as forwards: an op that begins with B takes `backward`.",
        ),
        Mistake(
            _in_step,
            "your ranks march in step, all of them in slots of the same length: a rank starts its next op as soon as it is "
            "free and what it needs is there, and asks nobody else.",
        ),
        Mistake(_whole, "this is when the whole step is over: a start for each op is wanted, in a list for each rank."),
    ],
    properties=[
        Property(
            "microbatches in another order",
            _as_given,
            "microbatch 1 came first here, on all ranks: take the ops as the order gives them, not by their numbers.",
        )
    ],
)


# ---- most_kept ---------------------------------------------------------------------------------------------------------


def _most_kept(ops: list[str]) -> int:
    """At each op, by definition: begun there, and its B or W not done before."""
    kept = []
    for place in range(1, len(ops) + 1):
        begun = {op[1:] for op in ops[:place] if op[0] == "F"}
        gone = {op[1:] for op in ops[: place - 1] if op[0] in "BW"}
        kept.append(len(begun - gone))
    return max(kept)


def _counted(frees: str) -> Callable[[list[str]], int]:
    def answer(ops: list[str]) -> int:
        kept = most = 0
        for op in ops:
            kept += (op[0] == "F") - (op[0] in frees)
            most = max(most, kept)
        return most

    return answer


def _row(what: str, name: str, ranks: int, microbatches: int, rank: int) -> Case:
    return Case(what, lambda g: (order_of(make_schedule(name, ranks, microbatches))[rank],))


most_kept = Exercise(
    name="most_kept",
    reference=_most_kept,
    cases=[
        Case(
            "an order of its own", lambda g: (["F0", "I0", "F1", "I1", "F2", "F3", "W0", "W1", "B2", "F4", "B3", "B4"],)
        ),
        _row("GPipe, 5 microbatches", "GPipe", 3, 5, 0),
        _row("1F1B, rank 1 of 4", "1F1B", 4, 9, 1),
        _row("1F1B, the last rank", "1F1B", 4, 9, 3),
        _row("a backward in two parts, rank 0 of 4", "ZB1P", 4, 9, 0),
        _row("a backward in two parts, rank 3 of 4", "ZB1P", 4, 9, 3),
    ],
    mistakes=[
        Mistake(
            _counted("BI"),
            "you free an activation after I: the weights' gradient needs it too. It goes when its B or its W is done.",
        ),
        Mistake(
            _counted("B"),
            "nothing is freed where the backward comes in two parts: W frees the activation, as B does.",
        ),
        Mistake(
            lambda ops: sum(op[0] == "F" for op in ops),
            "this is how many activations the rank makes in all: those whose backward is done are gone. Wanted is the most "
            "at one time.",
        ),
        Mistake(
            lambda ops: sum((op[0] == "F") - (op[0] in "BW") for op in ops),
            "this is what is left at the end, and that is nothing: remember the most on the way.",
        ),
        Mistake(
            lambda ops: _counted("BW")(ops) - 1,
            "one too few: while a forward runs, its own activation is there already.",
        ),
        Mistake(
            lambda ops: next((n for n, op in enumerate(ops) if op[0] != "F"), len(ops)),
            "you count the forwards before the first backward: later in the row there may be more at one time.",
        ),
    ],
)


# ---- schedulers: judged by being run -----------------------------------------------------------------------------------

UNIT = PhaseCosts(1, 1, 1)
COSTS = (UNIT, PhaseCosts(3, 3, 2), PhaseCosts(4, 4, 1))


@dataclass(frozen=True, kw_only=True)
class Scheduler(Exercise):
    """An exercise whose answer, from ranks and microbatches, is an order. It is run, not compared: others may do as well.

    Args:
        bubble: from ranks and costs, the longest that a rank may idle.
        room: from ranks, microbatches and a rank, the most activations that it may keep.
    """

    bubble: Callable[[int, PhaseCosts], float]
    room: Callable[[int, int, int], int]

    def _run(self, answer: Any) -> Result:
        if not callable(answer):
            raise Problem(f"give the function itself, check.{self.name}({self.name})")
        for number, case in enumerate(self.cases):
            ranks, microbatches = self._inputs(case, number)
            got = call(answer, (ranks, microbatches), self.seconds)
            if wrong := self.wrong(got, ranks, microbatches):
                raise Problem("\n".join([f"with {case.what}: {wrong}", *self._hint(got, case, number)]))
        return Result(self.name, "right", (f"{len(self.cases)} orders run: " + "; ".join(c.what for c in self.cases),))

    def wrong(self, order: Any, ranks: int, microbatches: int) -> str:
        """What is wrong with an order, in a line; empty where nothing is."""
        if order is None:
            return "it returned nothing (None): is there a `return`?"
        if isinstance(order, list) and len(order) != ranks:
            return f"there are {len(order)} lists of ops, and {ranks} ranks"
        try:
            schedule = schedule_of(order, microbatches)
        except ScheduleError as no_order:
            return str(no_order)
        if problem := next(problems(schedule), None):
            return problem
        for rank, most in enumerate(schedule.peak_activations):
            if most > (room := self.room(ranks, microbatches, rank)):
                return f"rank {rank} keeps {most} activations at one time, and has room for {room}"
        for costs in COSTS:
            idle, target = simulate(schedule, costs).bubble, self.bubble(ranks, costs)
            if idle > target:
                took = f"F = {costs.forward}, I = {costs.input}, W = {costs.weight}, B = I + W"
                return f"a rank idles for {idle:g}, and {target:g} can be reached ({took})"
        return ""


def _sizes(*sizes: tuple[int, int]) -> Sequence[Case]:
    return [Case(f"{r} rank{'s' * (r > 1)} and {m} microbatches", lambda g, size=(r, m): size) for r, m in sizes]


# ---- one_forward_one_backward ------------------------------------------------------------------------------------------


def _alternating(first: Callable[[int, int], int]) -> Callable[[int, int], Order]:
    """1F1B with `first(ranks, rank)` forwards before the first backward."""

    def answer(ranks: int, microbatches: int) -> Order:
        order = []
        for rank in range(ranks):
            ahead = max(0, min(microbatches, first(ranks, rank)))
            ops = [f"F{m}" for m in range(ahead)]
            for m in range(microbatches):
                ops += [f"F{ahead + m}"] * (ahead + m < microbatches) + [f"B{m}"]
            order.append(ops)
        return order

    return answer


def _short_of_backwards(ranks: int, microbatches: int) -> Order:
    return [
        ops[: -(ranks - 1 - rank)] if rank < ranks - 1 else ops for rank, ops in enumerate(_1f1b(ranks, microbatches))
    ]


def _too_far(ranks: int, microbatches: int) -> Order:
    order = []
    for rank in range(ranks):
        ahead = ranks - 1 - rank
        ops = [f"F{m}" for m in range(ahead)]
        for m in range(microbatches):
            ops += [f"F{ahead + m}", f"B{m}"]
        order.append(ops)
    return order


def _backward_first(ranks: int, microbatches: int) -> Order:
    order = []
    for rank in range(ranks):
        ahead = min(microbatches, ranks - 1 - rank)
        ops = [f"F{m}" for m in range(ahead)]
        for m in range(microbatches):
            ops += [f"B{m}"] + [f"F{ahead + m}"] * (ahead + m < microbatches)
        order.append(ops)
    return order


_1f1b = _alternating(lambda ranks, rank: ranks - 1 - rank)


one_forward_one_backward = Scheduler(
    name="one_forward_one_backward",
    reference=_1f1b,
    cases=_sizes((3, 5), (2, 2), (4, 8), (8, 20), (5, 2), (1, 3)),
    bubble=lambda ranks, costs: (ranks - 1) * (costs.forward + costs.backward),
    room=lambda ranks, microbatches, rank: min(microbatches, ranks - rank),
    mistakes=[
        Mistake(
            lambda ranks, m: order_of(make_schedule("GPipe", ranks, m)),
            "this is GPipe: all forwards come first, so that every microbatch is kept. Let the backwards begin as soon as the "
            "first one can.",
        ),
        Mistake(
            _alternating(lambda ranks, rank: 0),
            "every rank runs F and B in turn from the start: rank 0 then waits for the way down and up again before its second "
            "forward. It should run as many forwards ahead as there are ranks below it.",
        ),
        Mistake(
            _alternating(lambda ranks, rank: rank),
            "your last rank runs the most forwards ahead, and waits for microbatches that the first one holds back: count the "
            "ranks *below*, ranks - 1 - rank.",
        ),
        Mistake(
            _alternating(lambda ranks, rank: ranks - rank),
            "one forward too many comes before the first backward: as many as there are ranks below, ranks - 1 - rank. The "
            "next F and its B are the first pair of the alternation.",
        ),
        Mistake(
            _alternating(lambda ranks, rank: ranks - 1),
            "all ranks run the same number of forwards ahead: the last rank need not wait for anybody, so that it can begin "
            "with F0 B0. As many as there are ranks below.",
        ),
        Mistake(
            _alternating(lambda ranks, rank: ranks - 2 - rank),
            "one forward too few is run ahead, and the rank waits in each turn: as many as there are ranks below, "
            "ranks - 1 - rank.",
        ),
        Mistake(
            _short_of_backwards,
            "the last backwards are missing: when the forwards are used up, as many backwards are still to come as forwards "
            "were run ahead.",
        ),
        Mistake(
            _too_far,
            "after the last microbatch your forwards go on counting: at the end only backwards are left. (And a small batch "
            "may have fewer microbatches than there are ranks.)",
        ),
        Mistake(
            _backward_first,
            "in each turn B comes before F here: on the last rank that is B0 before F0. First F, then B.",
        ),
    ],
)


# ---- zero_bubble -------------------------------------------------------------------------------------------------------


def _cut(waiting: Callable[[int, int], int], weight_first: bool = False) -> Callable[[int, int], Order]:
    """1F1B with its backward cut, `waiting(ranks, rank)` of the W put off."""

    def answer(ranks: int, microbatches: int) -> Order:
        order = []
        for rank, row in enumerate(_1f1b(ranks, microbatches)):
            ops, late = [], min(microbatches, max(0, waiting(ranks, rank)))
            for op in row:
                if op[0] == "F":
                    ops.append(op)
                    continue
                m = int(op[1:])
                pair = [f"I{m}"] + [f"W{m - late}"] * (m >= late)
                ops += reversed(pair) if weight_first else pair
            order.append(ops + [f"W{m}" for m in range(microbatches - late, microbatches)])
        return order

    return answer


def _weights_forgotten(ranks: int, microbatches: int) -> Order:
    return [[op for op in ops if op[0] != "W"] for ops in _cut(lambda ranks, rank: 0)(ranks, microbatches)]


def _late_ones_forgotten(ranks: int, microbatches: int) -> Order:
    order = []
    for rank, ops in enumerate(_cut(lambda ranks, rank: rank)(ranks, microbatches)):
        order.append(ops[: len(ops) - min(rank, microbatches)])
    return order


zero_bubble = Scheduler(
    name="zero_bubble",
    reference=_cut(lambda ranks, rank: rank),
    cases=_sizes((3, 5), (2, 2), (4, 8), (8, 20), (1, 3)),
    bubble=lambda ranks, costs: (ranks - 1) * (costs.forward + costs.backward - 2 * costs.weight),
    room=lambda ranks, microbatches, rank: min(microbatches, ranks),
    mistakes=[
        Mistake(
            _1f1b,
            "the backward is still in one piece: write I and W in B's place, so that W can wait.",
        ),
        Mistake(
            _cut(lambda ranks, rank: 0),
            "each W follows its I at once: the rank above starts earlier, but at the end there is nothing left to fill the "
            "time with. Let rank r keep r of them for the end.",
        ),
        Mistake(
            _cut(lambda ranks, rank: 10**6),
            "all W come at the end: until then every activation of the batch is kept. Only r of rank r's may wait at a time.",
        ),
        Mistake(
            _cut(lambda ranks, rank: ranks - 1 - rank),
            "rank 0 lets the most W wait: it keeps the most activations already. The *last* ranks have room, and are idle at the "
            "end: rank r lets r of them wait.",
        ),
        Mistake(
            _cut(lambda ranks, rank: rank - 1),
            "one W too few waits on each rank: rank r lets r of them wait.",
        ),
        Mistake(
            _cut(lambda ranks, rank: rank + 1),
            "one W too many waits on each rank: rank r lets r of them wait, so that rank 0 runs each W at once.",
        ),
        Mistake(
            _weights_forgotten,
            "there is no W at all: somebody has to make the weights' gradients.",
        ),
        Mistake(
            _late_ones_forgotten,
            "the W that waited are never run: when the loop is over, rank r has r of them left.",
        ),
        Mistake(
            _cut(lambda ranks, rank: rank, weight_first=True),
            "W comes before I in each turn: I first, for the rank above waits for it and nobody waits for W.",
        ),
    ],
)


# ---- split_backward ----------------------------------------------------------------------------------------------------


def _split_backward(weight: Tensor, inputs: list[Tensor], output_grads: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """By autograd, through all microbatches."""
    weight = weight.detach().requires_grad_()
    leaves = [x.detach().requires_grad_() for x in inputs]
    loss = sum((x @ weight.T * grad).sum() for x, grad in zip(leaves, output_grads, strict=True))
    *input_grads, weight_grad = torch.autograd.grad(loss, [*leaves, weight])
    return input_grads, weight_grad


def _with_weights(weight_grad: Callable[[list[Tensor], list[Tensor]], Any]) -> Callable[..., tuple[list[Tensor], Any]]:
    """The inputs' gradients right, the weights' as given."""
    return lambda weight, inputs, grads: ([grad @ weight for grad in grads], weight_grad(inputs, grads))


def _linear(what: str, n: int, tokens: int, d: int, f: int) -> Case:
    def make(g: Generator) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        weight = torch.randn(f, d, generator=g)
        inputs = [torch.randn(tokens, d, generator=g) for _ in range(n)]
        return weight, inputs, [torch.randn(tokens, f, generator=g) for _ in range(n)]

    return Case(what, make)


split_backward = Exercise(
    name="split_backward",
    reference=_split_backward,
    cases=[
        _linear("4 microbatches of 6 tokens", 4, 6, 5, 3),
        _linear("one microbatch", 1, 4, 3, 7),
        _linear("9 microbatches of one token", 9, 1, 4, 4),
    ],
    mistakes=[
        Mistake(
            _with_weights(lambda xs, grads: len(xs) * grads[-1].T @ xs[-1]),
            "this is still the bug: every W that waits computes the *last* microbatch, for a lambda looks its names up when it "
            "runs and not when it is written.",
        ),
        Mistake(
            _with_weights(lambda xs, grads: grads[-1].T @ xs[-1]),
            "only the last microbatch's weight gradient is there: they are summed over all microbatches.",
        ),
        Mistake(
            _with_weights(lambda xs, grads: grads[0].T @ xs[0] * len(xs)),
            "every W computes the *first* microbatch: each has an input and a gradient of its own.",
        ),
        Mistake(
            _with_weights(lambda xs, grads: sum(g.T @ x for x, g in zip(xs, reversed(grads), strict=True))),
            "inputs and gradients of different microbatches are multiplied: what is put in the queue first is taken out first, "
            "or the two must wait together.",
        ),
        Mistake(
            _with_weights(lambda xs, grads: sum(g.T @ x for x, g in zip(xs, grads, strict=True)) / len(xs)),
            "you take the mean over the microbatches: gradients add up. (Where a mean is wanted, it is in the loss.)",
        ),
        Mistake(
            _with_weights(lambda xs, grads: [g.T @ x for x, g in zip(xs, grads, strict=True)]),
            "the weights have one gradient, the sum over all microbatches: here is a list of them.",
        ),
        Mistake(
            _with_weights(lambda xs, grads: sum(x.T @ g for x, g in zip(xs, grads, strict=True))),
            "the weights' gradient lies on its side: it has the weights' own shape, [f d].",
        ),
    ],
)
