"""Checks of lesson 09: MaxVio, the move of the biases, the sequence-wise loss, a tuned gamma, and one move a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dsv3_mini.course.balance_runs import PRICE, TARGET, recorded
from dsv3_mini.course.checks.framework import Case, Exercise, Mistake, Property

Inputs = Callable[[torch.Generator], tuple[Any, ...]]

# ---- max_vio -----------------------------------------------------------------------------------------------------------


def _reference_max_vio(load: Tensor) -> float:
    counts = load.tolist()
    return max(counts) * len(counts) / sum(counts) - 1


def _counts(*shape: int, most: int = 40) -> Callable[[torch.Generator], Tensor]:
    return lambda random: torch.randint(1, most, shape, generator=random)


def _an_even_load_is_zero(answer: Callable[..., Any]) -> bool:
    return all(abs(float(answer(torch.full((experts,), 7)))) < 1e-6 for experts in (1, 4, 9))


def _twice_the_text_is_as_even(answer: Callable[..., Any]) -> bool:
    load = torch.tensor([3, 9, 6, 2, 10])
    return abs(float(answer(load)) - float(answer(2 * load))) < 1e-5


max_vio = Exercise(
    name="max_vio",
    reference=_reference_max_vio,
    cases=[
        Case("six experts", lambda _: (torch.tensor([9, 3, 20, 8, 14, 6]),)),
        Case("one expert that hardly works", lambda _: (torch.tensor([13, 1, 11, 12, 12, 11]),)),
        Case("collapse onto one of eight", lambda _: (torch.tensor([0, 0, 64, 0, 0, 0, 0, 0]),)),
    ],
    mistakes=[
        Mistake(
            lambda load: float(load.max() / load.float().mean()),
            "the 1 is missing: what an even share would be is no violation. With an even load MaxVio is 0",
        ),
        Mistake(
            lambda load: float(load.max() / load.sum()),
            "you divide by the *sum* of the load, so your number shrinks when there are more experts; an even share is the mean",
        ),
        Mistake(
            lambda load: float(load.max() - load.float().mean()),
            "this is the excess in visits: twice the tokens would give twice as much. Divide it by the even share",
        ),
        Mistake(
            lambda load: float(load.max() / load.min().float() - 1),
            "you compare the busiest expert with the idlest: compare it with an even share, the mean. (An expert that nobody "
            "visits would make yours infinite.)",
        ),
        Mistake(
            lambda load: float((load - load.float().mean()).abs().max() / load.float().mean()),
            "you take whichever expert is farthest from an even share, on either side: an idle one costs no time, so that "
            "MaxVio asks for the busiest only",
        ),
        Mistake(
            lambda load: float(1 - load.min() / load.float().mean()),
            "you measure how far the *idlest* expert lies below an even share. A step waits for the busiest",
        ),
        Mistake(
            lambda load: float(load.float().std() / load.float().mean()),
            "this is the spread of all experts (std / mean): MaxVio is about one, the busiest",
        ),
        Mistake(
            lambda load: float(1 - load.float().mean() / load.max()),
            "you divide by the busiest expert's load: the excess is counted in even shares, so the mean is below the line",
        ),
    ],
    properties=[
        Property("an even load gives 0", _an_even_load_is_zero, "max / mean - 1 is 0 where all are alike"),
        Property(
            "twice the text with the same shares gives the same",
            _twice_the_text_is_as_even,
            "MaxVio is a ratio: how many tokens there were must cancel",
        ),
    ],
)


# ---- move_biases -------------------------------------------------------------------------------------------------------


def _reference_move(bias: Tensor, load: Tensor, gamma: float) -> Tensor:
    total, experts, moved = int(load.sum()), len(load), []
    for b, count in zip(bias.tolist(), load.tolist(), strict=True):
        over, under = count * experts > total, count * experts < total
        moved.append(b - gamma if over else b + gamma if under else b)
    return torch.tensor(moved)


def _move_inputs(load: list[int] | None, experts: int = 6, gamma: float = 0.125) -> Inputs:
    def inputs(random: torch.Generator) -> tuple[Any, ...]:
        bias = torch.randn(experts, generator=random)
        return bias, _counts(experts)(random) if load is None else torch.tensor(load), gamma

    return inputs


def _mean(load: Tensor) -> Tensor:
    return load.float().mean()


move_biases = Exercise(
    name="move_biases",
    reference=_reference_move,
    cases=[
        Case("one expert far too busy", _move_inputs([30, 4, 8, 6, 10, 2])),
        Case("one with exactly an even share", _move_inputs([3, 9, 6, 6, 2, 10])),
        Case("all alike", _move_inputs([5] * 6)),
        Case("eight experts, a smaller gamma", _move_inputs(None, 8, 0.001)),
    ],
    mistakes=[
        Mistake(
            lambda bias, load, gamma: bias + gamma * torch.sign(load - _mean(load)),
            "the sign is turned round: a busy expert becomes *more* attractive. Lower the bias of those with more than an even "
            "share, raise the others",
        ),
        Mistake(
            lambda bias, load, gamma: bias + gamma * (_mean(load) - load) / _mean(load),
            "you move in proportion to how far the load is off. The rule looks at the sign alone: every move is gamma",
        ),
        Mistake(
            lambda bias, load, gamma: bias + gamma * (_mean(load) - load),
            "you move by gamma times the number of visits too many. The rule looks at the sign alone: every move is gamma",
        ),
        Mistake(
            lambda bias, load, gamma: bias + torch.sign(_mean(load) - load),
            "gamma is missing: biases move by 1, and scores lie between 0 and 1",
        ),
        Mistake(
            lambda bias, load, gamma: bias + gamma * torch.sign(load.float().median() - load),
            "you compare with the median: half of the experts lie below it however uneven the load is. An even share is the mean",
        ),
        Mistake(
            lambda bias, load, gamma: bias - gamma * torch.sign(load.float()),
            "you compare the load with 0, so every expert that is visited at all is lowered. Compare it with the mean",
        ),
        Mistake(
            lambda bias, load, gamma: bias - gamma * (load > _mean(load)),
            "you lower the busy ones and leave the others: those with less than an even share are raised by gamma",
        ),
        Mistake(
            lambda bias, load, gamma: bias + gamma * (load < _mean(load)),
            "you raise the idle ones and leave the busy: those with more than an even share are lowered by gamma",
        ),
        Mistake(
            lambda bias, load, gamma: torch.where(load > _mean(load), bias - gamma, bias + gamma),
            "an expert with exactly an even share moves up here; it should stay. torch.sign has a third value, 0",
        ),
        Mistake(
            lambda bias, load, gamma: torch.where(load < _mean(load), bias + gamma, bias - gamma),
            "an expert with exactly an even share moves down here; it should stay. torch.sign has a third value, 0",
        ),
        Mistake(
            lambda bias, load, gamma: gamma * torch.sign(_mean(load) - load),
            "this is the move alone: add it to the bias, which remembers all moves before",
        ),
        Mistake(
            lambda bias, load, gamma: bias * (1 + gamma * torch.sign(_mean(load) - load)),
            "you scale the bias: it starts at 0 and would stay there. Add gamma, or take it away",
        ),
    ],
)


# ---- balance_loss ------------------------------------------------------------------------------------------------------


def _reference_balance(scores: Tensor, k: int) -> Tensor:
    """One sequence and one expert at a time."""
    experts, total = scores.shape[-1], torch.zeros(())
    for sequence in scores:
        for expert in range(experts):
            visits = sum(expert in row.argsort(descending=True)[:k].tolist() for row in sequence)
            f = visits * experts / (k * len(sequence))
            p = torch.stack([row[expert] / row.sum() for row in sequence]).mean()
            total = total + f * p
    return total / len(scores)


def _score_inputs(b: int, s: int, e: int, k: int) -> Inputs:
    # A preference for the first experts, so that no two ways of counting agree by chance.
    return lambda random: (
        torch.sigmoid(torch.randn(b, s, e, generator=random) + torch.linspace(1.5, -1.5, e)),
        k,
    )


def _picked(scores: Tensor, k: int) -> Tensor:
    return torch.zeros_like(scores).scatter(-1, scores.topk(k, dim=-1).indices, 1.0)


def _even(scores: Tensor, dim: int = -1) -> Tensor:
    return scores / scores.sum(dim, keepdim=True)


def _loss(f_of: Callable[[Tensor, int], Tensor], p_of: Callable[[Tensor, int], Tensor]) -> Callable[..., Tensor]:
    """A balance loss with a part of one's own: f_of and p_of give [b s e], averaged over each sequence."""

    def loss(scores: Tensor, k: int) -> Tensor:
        f, p = f_of(scores, k).mean(1) * scores.shape[-1] / k, p_of(scores, k).mean(1)
        return (f * p).sum(-1).mean()

    return loss


def _over_the_batch(scores: Tensor, k: int) -> Tensor:
    f = _picked(scores, k).mean((0, 1)) * scores.shape[-1] / k
    return (f * _even(scores).mean((0, 1))).sum()


def _only_the_scores_learn(answer: Callable[..., Any]) -> bool:
    """Downhill, the scores of the experts that are used too much go down against the others."""
    logits = torch.zeros(1, 4, 4) + torch.tensor([2.0, 1.0, 0.0, -1.0])
    logits.requires_grad_()
    loss = answer(torch.sigmoid(logits), 1)
    if not getattr(loss, "requires_grad", False):
        return False
    (gradient,) = torch.autograd.grad(loss, logits)
    return bool((gradient[..., 0] > 0).all() and (gradient[..., 1:] < 0).all())


def _even_is_one_and_narrow_is_more(answer: Callable[..., Any]) -> bool:
    circle = torch.eye(4)[None] * 0.98 + 0.01  # token i likes expert i: all are used alike
    narrow = torch.eye(4)[:1].expand(1, 4, 4) * 0.999999 + 1e-7  # all like expert 0 alone
    return abs(float(answer(circle, 1)) - 1) < 1e-3 and abs(float(answer(narrow, 1)) - 4) < 1e-3


balance_loss = Exercise(
    name="balance_loss",
    reference=_reference_balance,
    cases=[
        Case("3 sequences of 5 tokens, 6 experts, k = 2", _score_inputs(3, 5, 6, 2)),
        Case("2 sequences of 8 tokens, 5 experts, k = 3", _score_inputs(2, 8, 5, 3)),
        Case("one token, 4 experts, k = 1", _score_inputs(1, 1, 4, 1)),
    ],
    mistakes=[
        Mistake(
            _loss(_picked, lambda scores, k: scores),
            "P is the mean of the raw scores: divide each token's scores by their sum over *all* experts first, or lowering "
            "every score would look like balance",
        ),
        Mistake(
            _loss(_picked, lambda scores, k: _even(scores * _picked(scores, k))),
            "P is normalised over the chosen experts only, as gate values are: here the sum runs over all experts",
        ),
        Mistake(
            _loss(_picked, lambda scores, k: scores.softmax(-1)),
            "you take a softmax of the scores: they are sigmoids already, P only divides by their sum",
        ),
        Mistake(
            _loss(_picked, lambda scores, k: _even(scores, 1)),
            "you divide by the sum over the *tokens*: s' is normalised over the experts of one token",
        ),
        Mistake(
            lambda scores, k: _loss(_picked, lambda s, _: _even(s))(scores, k) * k / scores.shape[-1],
            "the factor e / k of f is missing: f is how often an expert is chosen in *even shares*, 1 where all are alike",
        ),
        Mistake(
            lambda scores, k: _loss(_picked, lambda s, _: _even(s))(scores, k) * k,
            "f is k times too large: a token makes k choices, so that an even share is k / e of the tokens",
        ),
        Mistake(
            lambda scores, k: _loss(_picked, lambda s, _: _even(s))(scores, k) * len(scores),
            "you add the sequences up: the loss is their mean, or a larger batch would pull harder",
        ),
        Mistake(
            lambda scores, k: _loss(_picked, lambda s, _: _even(s))(scores, k) / scores.shape[-1],
            "you take the mean over the experts: equation 17 is a sum",
        ),
        Mistake(
            _over_the_batch,
            "f and P are taken over the whole batch at once: that is the batch-wise loss. Here each sequence is to be even by "
            "itself, so average over its tokens only, multiply, and average over the sequences last",
        ),
        Mistake(
            _loss(lambda scores, k: _even(scores) * k, lambda scores, k: _even(scores)),
            "f is made of the scores, like P: it is a count, of the tokens that have the expert among their best k",
        ),
        Mistake(
            _loss(lambda scores, _: _picked(scores, 1), lambda scores, _: _even(scores)),
            "f counts the best expert of each token only: count all of its best k",
        ),
    ],
    properties=[
        Property(
            "an even sequence costs 1, one that uses a single expert of four costs 4",
            _even_is_one_and_narrow_is_more,
            "with k = 1 and all tokens on one expert f is e there, and P is 1",
        ),
        Property(
            "its gradient lowers the scores of the expert that is used too much",
            _only_the_scores_learn,
            "the loss must be differentiable by the scores: no .item(), no .detach() of P, no counts in its place",
        ),
    ],
)


# ---- my_gamma ----------------------------------------------------------------------------------------------------------


def _good() -> list[float]:
    return [gamma for gamma in recorded().gammas if recorded().reaches(gamma)]


def _is_on_the_slider(answer: Callable[..., Any]) -> bool:
    return float(answer()) in recorded().gammas


def _moves_at_all(answer: Callable[..., Any]) -> bool:
    return float(answer()) > 0


def _arrives(answer: Callable[..., Any]) -> bool:
    return float(answer()) >= min(_good())


def _comes_to_rest(answer: Callable[..., Any]) -> bool:
    return float(answer()) <= max(_good())


def _is_good(answer: Callable[..., Any]) -> bool:
    return float(answer()) in _good()


my_gamma = Exercise(
    name="my_gamma",
    reference=lambda: _good()[0],
    cases=[],
    properties=[
        Property("it is one of the player's gammas", _is_on_the_slider, "return a number that the slider shows"),
        Property(
            "the biases move at all", _moves_at_all, "with gamma = 0 no bias ever moves: this is the run left alone"
        ),
        Property(
            "the biases arrive before the run ends",
            _arrives,
            "this gamma is too small: a bias moves by gamma a step, and must cross the gap between the scores of the busy and "
            "the idle experts. Play the film: the biases still grow when it ends",
        ),
        Property(
            "the biases come to rest",
            _comes_to_rest,
            "this gamma is too large: one move is wider than the gap that is left, so an expert is overrun in one step and "
            "deserted in the next. Look at the strip: it flickers to the end",
        ),
        Property(
            f"MaxVio is at most {TARGET:g} at the end, for at most {PRICE:.0%} of the loss",
            _is_good,
            "read the line below the player: both numbers of it have to hold",
        ),
    ],
)


# ---- one_move (the bug) ------------------------------------------------------------------------------------------------


def _reference_one_move(bias: Tensor, loads: Tensor, gamma: float) -> Tensor:
    return _reference_move(bias, torch.tensor([sum(column) for column in zip(*loads.tolist(), strict=True)]), gamma)


def _loads_inputs(loads: list[list[int]] | None, gamma: float = 0.125) -> Inputs:
    def inputs(random: torch.Generator) -> tuple[Any, ...]:
        counts = _counts(5, 6)(random) if loads is None else torch.tensor(loads)
        return torch.randn(counts.shape[1], generator=random), counts, gamma

    return inputs


def _a_move_each(bias: Tensor, loads: Tensor, gamma: float) -> Tensor:
    for load in loads:
        bias = bias + gamma * torch.sign(_mean(load) - load)
    return bias


def _votes(loads: Tensor) -> Tensor:
    return torch.sign(loads.float().mean(-1, keepdim=True) - loads)


one_move = Exercise(
    name="one_move",
    reference=_reference_one_move,
    cases=[
        Case("three micro-batches that disagree", _loads_inputs([[9, 1, 5, 5, 5], [8, 7, 4, 3, 3], [9, 6, 7, 2, 1]])),
        Case("a short last micro-batch", _loads_inputs([[28, 22, 10, 20], [30, 10, 20, 20], [1, 0, 4, 3]])),
        Case("five micro-batches, six experts", _loads_inputs(None, 0.01)),
    ],
    mistakes=[
        Mistake(
            _a_move_each,
            "this is still the bug: the biases move once for every micro-batch. Add the loads up first, then move once",
        ),
        Mistake(
            lambda bias, loads, gamma: _a_move_each(bias, loads, gamma / len(loads)),
            "gamma is shared among the micro-batches, and each still moves by itself: where they disagree the moves cancel to "
            "less than gamma. Add the loads up, then move once",
        ),
        Mistake(
            lambda bias, loads, gamma: bias + gamma * torch.sign(_votes(loads).sum(0)),
            "the micro-batches vote, one voice each, whatever they hold: a narrow majority beats a large excess. Add the counts "
            "up",
        ),
        Mistake(
            lambda bias, loads, gamma: bias + gamma * torch.sign(_mean(loads[-1]) - loads[-1]),
            "only the last micro-batch is looked at: the rule wants the load of the whole batch",
        ),
        Mistake(
            lambda bias, loads, gamma: bias + gamma * torch.sign(_mean(loads[0]) - loads[0]),
            "only the first micro-batch is looked at: the rule wants the load of the whole batch",
        ),
        Mistake(
            lambda bias, loads, gamma: (
                bias + gamma * torch.sign(1 / loads.shape[1] - (loads / loads.sum(-1, keepdim=True)).mean(0))
            ),
            "you average each micro-batch's *shares*: a short one then counts as much as a long one. Add up counts, not shares",
        ),
        Mistake(
            lambda bias, loads, gamma: bias + gamma * torch.sign(loads.sum(0) - loads.sum(0).float().mean()),
            "one move a step, but the wrong way: the busy ones go down",
        ),
        Mistake(
            lambda bias, loads, gamma: bias + gamma * torch.sign(loads.float().mean() - loads.sum(0)),
            "you compare the sum of all micro-batches with an even share of *one* of them: every expert looks overloaded",
        ),
        Mistake(
            lambda bias, loads, gamma: bias + len(loads) * gamma * torch.sign(_mean(loads.sum(0)) - loads.sum(0)),
            "one decision a step, but a move for each micro-batch: it is one move of gamma",
        ),
    ],
)
