"""Lesson 18, collectives: the checks. The reader writes what one rank does; here many ranks run it, and bytes are counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Generator, Tensor

from dsv3_mini.course.checks.framework import TOLERANCE, Case, Exercise, Mistake, Result, difference
from dsv3_mini.course.checks.guard import Problem, call
from dsv3_mini.course.ranks import Ran, Rank, Stuck, run
from dsv3_mini.course.ring import all_gather, all_reduce, reduce_scatter

Columns = tuple[Sequence[Any], ...]


@dataclass(frozen=True, kw_only=True)
class Program(Exercise):
    """An exercise whose answer is what one rank does. Cases give columns, an input for each rank; `reference` is of columns.

    Args:
        most: from the columns, the most numbers (of four bytes) that a rank has to send.
        too_much: what to say to one who sends more and makes none of the known mistakes.
        stuck: what to say where nobody can go on.
    """

    most: Callable[..., int] | None = None
    too_much: str = ""
    stuck: str = "on real machines this hangs, without a message: each rank sends first, and receives then."

    def _run(self, answer: Any) -> Result:
        if not callable(answer):
            raise Problem(f"give the function itself, check.{self.name}({self.name})")
        for number, case in enumerate(self.cases):
            columns = self._inputs(case, number)
            ran = call(_ran, (answer, columns), self.seconds, blame=answer)
            if isinstance(ran, Stuck):
                raise Problem(f"with {case.what}: {ran}.\n{self.stuck}")
            for place, (now, then) in enumerate(zip(columns, self._inputs(case, number), strict=True), start=2):
                if difference(list(now), list(then), 0.0):
                    raise Problem(f"it changes its input number {place} in place: make a new tensor")
            for rank, (got, wanted) in enumerate(zip(ran.results, self.reference(*columns), strict=True)):
                if wrong := difference(got, wanted, self.tolerance):
                    raise Problem(
                        "\n".join([f"with {case.what}, rank {rank}: {wrong}", *self._like(ran, case, number, False)])
                    )
            if self.most and max(ran.sent) > (enough := 4 * self.most(*columns)):
                sent = f"rank {ran.sent.index(max(ran.sent))} sends {max(ran.sent)} bytes, and {enough} are enough"
                hint = self._like(ran, case, number, True) or [self.too_much]
                raise Problem("\n".join([f"with {case.what} the numbers are right, but {sent}.", *hint]))
        what = "; ".join(case.what for case in self.cases)
        return Result(self.name, "right", (f"{len(self.cases)} groups of ranks ran it: {what}",))

    def _like(self, ran: Ran, case: Case, number: int, by_bytes: bool) -> list[str]:
        """The hint of the mistake that gives the same numbers; or, where they are right, that sends the same bytes."""
        for mistake in self.mistakes:
            like = _ran(mistake.wrong, self._inputs(case, number), quiet=True)
            if not isinstance(like, Ran) or (by_bytes and like.sent != ran.sent):
                continue
            if not difference(ran.results, like.results, TOLERANCE):
                return [mistake.hint]
        return []


def _ran(program: Callable[..., Any], columns: Columns, quiet: bool = False) -> Ran | Stuck | None:
    try:
        return run(program, *columns)
    except Stuck as stuck:
        return stuck
    except Exception:
        if quiet:
            return None  # this mistake cannot be made with these inputs
        raise


def _rows(what: str, ranks: int, *shape: int) -> Case:
    """A tensor of random numbers for each rank."""
    return Case(what, lambda g: ([torch.randn(*shape, generator=g) for _ in range(ranks)],))


# ---- ring_all_gather ---------------------------------------------------------------------------------------------------


def _gathered(
    forward: Callable[[Tensor, Tensor], Tensor] = lambda arrived, own: arrived,
    place: Callable[[int, int, int], int] = lambda number, step, n: (number - step) % n,
    rounds: Callable[[int], int] = lambda n: n - 1,
) -> Callable[..., Tensor]:
    """A ring with something wrong: what is passed on, where an arrival is put, how many rounds."""

    def answer(me: Rank, piece: Tensor) -> Tensor:
        pieces, travels = [piece] * me.count, piece
        for step in range(1, rounds(me.count) + 1):
            me.send(travels, (me.number + 1) % me.count)
            arrived = me.receive((me.number - 1) % me.count)
            pieces[place(me.number, step, me.count)] = arrived
            travels = forward(arrived, piece)
        return torch.stack(pieces)

    return answer


def _by_way_of_zero(me: Rank, piece: Tensor) -> Tensor:
    if me.number:
        me.send(piece, 0)
        return me.receive(0)
    whole = torch.stack([piece, *(me.receive(r) for r in range(1, me.count))])
    for r in range(1, me.count):
        me.send(whole, r)
    return whole


ring_all_gather = Program(
    name="ring_all_gather",
    reference=lambda pieces: [torch.stack(list(pieces))] * len(pieces),
    cases=[
        _rows("2 ranks", 2, 3),
        _rows("4 ranks", 4, 3),
        _rows("5 ranks", 5, 2),
        _rows("one rank, which has all there is", 1, 3),
    ],
    most=lambda pieces: (len(pieces) - 1) * len(pieces[0]),
    too_much="in a ring of n ranks, n - 1 pieces leave each of them: in each round only the piece that arrived last.",
    mistakes=[
        Mistake(
            _gathered(place=lambda number, step, n: step % n),
            "your pieces stand in the order in which they came, the rank's own first: on every rank they must stand in the order "
            "of the ranks. What arrives in round 1 is the piece of rank number - 1.",
        ),
        Mistake(
            _gathered(forward=lambda arrived, own: own),
            "every rank sends its own piece again and again, so that the others only ever hear their neighbour's: pass on the "
            "piece that arrived last.",
        ),
        Mistake(
            _gathered(place=lambda number, step, n: (number + step) % n),
            "your pieces stand in the places of the wrong ranks: what comes from the left was, `step` rounds ago, that of rank "
            "number - step.",
        ),
        Mistake(
            _gathered(rounds=lambda n: n - 2),
            "one round is missing: n - 1 pieces have to arrive, one in each round.",
        ),
        Mistake(
            _gathered(rounds=lambda n: n),
            "one round too many: in the last one every rank gets back its own piece. n - 1 rounds are enough.",
        ),
        Mistake(
            _by_way_of_zero,
            "all goes by way of rank 0, whose wire carries n times what any other does, while they wait: let every rank talk to "
            "its right neighbour only.",
        ),
        Mistake(
            lambda me, piece: all_reduce(me, piece.repeat(me.count)).view(me.count, -1),
            "this is a sum of all pieces: here they are put side by side, nothing is added.",
        ),
    ],
)


# ---- ring_reduce_scatter -----------------------------------------------------------------------------------------------


def _scattered(
    start: int = -1, add: bool = True, share: Callable[[Tensor, int], Tensor] = lambda x, n: x, own: bool = False
) -> Callable[..., Tensor]:
    """A ring with something wrong: the piece that leaves first, no sum, a share of it, the own piece sent for the sum."""

    def answer(me: Rank, pieces: Tensor) -> Tensor:
        n = me.count
        partial = pieces[(me.number + start) % n]
        for step in range(1, n):
            me.send(pieces[(me.number + start - step + 1) % n] if own else partial, (me.number + 1) % n)
            arrived = me.receive((me.number - 1) % n)
            partial = arrived + pieces[(me.number + start - step) % n] if add else arrived
        return share(partial, n)

    return answer


ring_reduce_scatter = Program(
    name="ring_reduce_scatter",
    reference=lambda columns: list(torch.stack(list(columns)).sum(0)),
    cases=[
        _rows("2 ranks", 2, 2, 3),
        _rows("3 ranks", 3, 3, 4),
        _rows("5 ranks", 5, 5, 2),
        _rows("one rank, whose piece is the sum", 1, 1, 3),
    ],
    most=lambda columns: columns[0][1:].numel(),
    too_much="n - 1 pieces have to leave each rank: in each round one partial sum, of one piece.",
    mistakes=[
        Mistake(
            _scattered(start=0),
            "you end with the sum of the next rank's piece: your own piece left first. A partial sum travels n - 1 places, so "
            "what rank r sends first belongs to rank r - 1, which it reaches last.",
        ),
        Mistake(
            _scattered(start=1),
            "you end with the sum of the piece two places on: the first that leaves rank r is piece r - 1.",
        ),
        Mistake(
            _scattered(add=False),
            "what arrives is passed on as it came, and nothing is added: add your own piece of the same number to it.",
        ),
        Mistake(
            _scattered(own=True),
            "you send your own piece on, not the sum with what has arrived: so only two ranks' numbers are in the end result.",
        ),
        Mistake(
            _scattered(share=lambda x, n: x / n),
            "this is the mean: a reduce-scatter adds up. Whoever wants the mean divides afterwards.",
        ),
        Mistake(
            lambda me, pieces: pieces[me.number].clone(),
            "this is the rank's own piece, and nobody else's is in it.",
        ),
        Mistake(
            lambda me, pieces: all_reduce(me, pieces.flatten()).view_as(pieces)[me.number],
            "every rank learns the whole sum here, and throws all but a piece of it away: that is an all-reduce, of twice the "
            "bytes.",
        ),
    ],
)


# ---- sharded_step ------------------------------------------------------------------------------------------------------


def _step_of_one(
    weights: Sequence[Tensor],
    gradient: Sequence[Tensor],
    momentum: Sequence[Tensor],
    rate: Sequence[float],
    beta: Sequence[float],
) -> list[tuple[Tensor, Tensor]]:
    """One process that has it all: the big batch's gradient, all of the momentum."""
    whole = beta[0] * torch.cat(list(momentum)) + torch.stack(list(gradient)).sum(0)
    after = weights[0] - rate[0] * whole
    return [(after, piece) for piece in whole.chunk(len(weights))]


def _sharded(
    of: Callable[[Rank, Tensor], Tensor] = reduce_scatter,
    own: Callable[[Rank], int] = lambda me: me.number,
    keep: bool = True,
    remember: bool = True,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """A step with something wrong: how gradients are summed, which piece is stepped, whether momentum is used."""

    def answer(
        me: Rank, weights: Tensor, gradient: Tensor, momentum: Tensor, rate: float, beta: float
    ) -> tuple[Tensor, Tensor]:
        gradients, pieces = (rearrange(x, "(n m) -> n m", n=me.count) for x in (gradient, weights))
        momentum = (beta * momentum if remember else 0) + of(me, gradients)
        piece = pieces[own(me)] - rate * momentum
        if keep:
            return rearrange(all_gather(me, piece), "n m -> (n m)"), momentum
        mixed = pieces.clone()
        mixed[own(me)] = piece
        return mixed.flatten(), momentum

    return answer


def _descent_without_momentum(
    me: Rank, weights: Tensor, gradient: Tensor, momentum: Tensor, rate: float, beta: float
) -> Any:
    own = reduce_scatter(me, rearrange(gradient, "(n m) -> n m", n=me.count))
    piece = rearrange(weights, "(n m) -> n m", n=me.count)[me.number] - rate * own
    return rearrange(all_gather(me, piece), "n m -> (n m)"), beta * momentum + own


def _step(what: str, ranks: int, size: int) -> Case:
    def inputs(g: Generator) -> Columns:
        weights = torch.randn(ranks * size, generator=g)
        gradients = [torch.randn(ranks * size, generator=g) for _ in range(ranks)]
        momentum = [torch.randn(size, generator=g) for _ in range(ranks)]
        return [weights.clone() for _ in range(ranks)], gradients, momentum, [0.5] * ranks, [0.8] * ranks

    return Case(what, inputs)


sharded_step = Program(
    name="sharded_step",
    reference=_step_of_one,
    cases=[_step("2 ranks", 2, 3), _step("4 ranks", 4, 2), _step("3 ranks", 3, 5), _step("one rank alone", 1, 4)],
    most=lambda weights, *_: 2 * (len(weights) - 1) * len(weights[0]) // len(weights),
    too_much="one reduce-scatter of the gradients and one all-gather of the stepped pieces are enough.",
    mistakes=[
        Mistake(
            _sharded(of=lambda me, pieces: pieces[me.number]),
            "each piece is stepped with this rank's own gradient only: the gradients of all ranks have to be added up, by "
            "reduce_scatter.",
        ),
        Mistake(
            _sharded(of=lambda me, pieces: reduce_scatter(me, pieces) / me.count),
            "this takes the mean of the ranks' gradients: they are shares of the whole batch's gradient here, so add them up.",
        ),
        Mistake(
            _sharded(keep=False),
            "every rank has stepped its own piece and keeps the old weights of all others: gather the pieces.",
        ),
        Mistake(
            _sharded(remember=False),
            "the old momentum is lost: the new one is beta times the old, plus the gradient.",
        ),
        Mistake(
            _descent_without_momentum,
            "the weights follow the gradient itself: they are to follow the momentum, which it is added to.",
        ),
        Mistake(
            _sharded(own=lambda me: (me.number + 1) % me.count),
            "the piece of weights is the neighbour's, the gradient your own: rank r steps piece r.",
        ),
        Mistake(
            _sharded(of=lambda me, pieces: all_reduce(me, pieces.flatten()).view_as(pieces)[me.number]),
            "all ranks learn the whole gradient, and each uses a piece of it: reduce_scatter gives each rank just its piece, for "
            "half of the bytes.",
        ),
    ],
)


# ---- bytes_per_rank ----------------------------------------------------------------------------------------------------

STATE = {"weights": 2, "gradients": 2, "optimizer": 4 + 4 + 4}  # bytes of a parameter
STAGES = (0, 1, 2, 3)


def _bytes(shared: Callable[[int], Sequence[str]]) -> Callable[[int, int, int], int]:
    def answer(parameters: int, ranks: int, stage: int) -> int:
        share = shared(stage)
        return sum(size * parameters // (ranks if name in share else 1) for name, size in STATE.items())

    return answer


_ORDER = ("optimizer", "gradients", "weights")

bytes_per_rank = Exercise(
    name="bytes_per_rank",
    reference=_bytes(lambda stage: _ORDER[:stage]),
    cases=[
        Case(f"stage {stage}, {ranks} ranks", lambda g, s=stage, n=ranks: (1000 * 3 * n, n, s))
        for stage in STAGES
        for ranks in (4, 64)
    ]
    + [Case("one rank, stage 3", lambda g: (5000, 1, 3))],
    mistakes=[
        Mistake(
            _bytes(lambda stage: _ORDER if stage else ()),
            "from stage 1 on you share everything: stage 1 shares the optimizer's state only, stage 2 the gradients as well, and "
            "stage 3 the weights too.",
        ),
        Mistake(
            _bytes(lambda stage: _ORDER[::-1][:stage]),
            "you share the weights first: it is the optimizer's state that goes first, as it is the largest and is needed once a "
            "step.",
        ),
        Mistake(
            _bytes(lambda stage: _ORDER[stage - 1 : stage] if stage else ()),
            "a stage shares what the stages before it share, too: at stage 2 the optimizer's state stays shared.",
        ),
        Mistake(
            lambda parameters, ranks, stage: (
                (4 if stage < 3 else 4 / ranks) * parameters + (12 / ranks if stage else 12) * parameters
            ),
            "gradients stay whole until stage 3 in yours: stage 2 shares them.",
        ),
        Mistake(
            _bytes(lambda stage: _ORDER[: max(0, stage - 1)]),
            "you are one stage behind: stage 1 shares the optimizer's state already. Stage 0 is plain data parallelism.",
        ),
        Mistake(
            lambda parameters, ranks, stage: sum(
                size * parameters // (ranks if name in _ORDER[:stage] else 1)
                for name, size in {"weights": 2, "gradients": 2, "optimizer": 8}.items()
            ),
            "the FP32 master copy is missing: with Adam's two moments the optimizer keeps 12 bytes a parameter.",
        ),
    ],
)


# ---- step_gradient, the bug --------------------------------------------------------------------------------------------


def _reduced_each_time(me: Rank, gradients: list[Tensor]) -> Tensor:
    total = torch.zeros_like(gradients[0])
    for gradient in gradients:
        total = all_reduce(me, total + gradient)
    return total


def _micro(what: str, *counts: int) -> Case:
    """counts[r] micro-batches on rank r."""
    size = 2 * len(counts)
    return Case(what, lambda g: ([[torch.randn(size, generator=g) for _ in range(count)] for count in counts],))


step_gradient = Program(
    name="step_gradient",
    reference=lambda ranks: [torch.stack([g for own in ranks for g in own]).sum(0)] * len(ranks),
    cases=[
        _micro("2 ranks and 1 micro-batch", 1, 1),
        _micro("2 ranks and 3 micro-batches", 3, 3),
        _micro("3 ranks and 2 micro-batches", 2, 2, 2),
        _micro("ranks with 3, 2, 3 and 2 micro-batches", 3, 2, 3, 2),
        _micro("one rank alone", 3),
    ],
    stuck="some ranks have one micro-batch more: they enter an all-reduce to which the others never come, and wait for ever. "
    "Let every rank enter it just once, when all its own gradients are added up.",
    most=lambda ranks: 2 * (len(ranks) - 1) * len(ranks[0][0]) // len(ranks),
    too_much="an all-reduce for each micro-batch is not needed: add up on the rank first, and send once.",
    mistakes=[
        Mistake(
            _reduced_each_time,
            "the sum of all ranks is reduced again with the next micro-batch, so the earlier gradients are counted by all ranks, "
            "again and again: reduce once, after the loop.",
        ),
        Mistake(
            lambda me, gradients: sum(all_reduce(me, gradient) for gradient in gradients),
            "every micro-batch's gradient is reduced on its own. The numbers are right, and every one of them crosses the wires: "
            "add up on the rank first, and reduce once.",
        ),
        Mistake(
            lambda me, gradients: sum(gradients),
            "no rank hears of the others: the all-reduce is missing.",
        ),
        Mistake(
            lambda me, gradients: all_reduce(me, gradients[-1]),
            "only the last micro-batch is in the sum: add them up before the all-reduce.",
        ),
        Mistake(
            lambda me, gradients: all_reduce(me, sum(gradients)) / me.count,
            "this is the mean over the ranks: the gradients are shares of the whole batch's, so their sum is wanted.",
        ),
        Mistake(
            lambda me, gradients: all_reduce(me, sum(gradients) / len(gradients)),
            "each rank divides by the number of its own micro-batches: the gradients are shares of the whole batch's already.",
        ),
    ],
)
