"""Lesson 09's checks: each right answer accepted, each wrong one refused with its own hint, a blank one only noted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from lesson_answers import (  # noqa: F401
    test_right_answers_are_accepted,
)
from torch import Tensor

from dsv3_mini.course.balance_runs import recorded
from dsv3_mini.course.checks import lesson_09 as check
from dsv3_mini.course.checks.framework import Exercise, exercises_of
from dsv3_mini.train.balance import max_violation
from dsv3_mini.train.losses import sequence_balance_loss

Answer = Callable[..., Any]

# ---- right answers, each written in two ways ---------------------------------------------------------------------------


def vio_by_shares(load: Tensor) -> float:
    share = load / load.sum()
    return (share.max() * len(load)).item() - 1


def moves_by_loop(bias: Tensor, load: Tensor, gamma: float) -> Tensor:
    moved, mean = bias.clone(), load.sum().item() / len(load)
    for expert, count in enumerate(load.tolist()):
        if count > mean:
            moved[expert] -= gamma
        if count < mean:
            moved[expert] += gamma
    return moved


def moves_by_two_masks(bias: Tensor, load: Tensor, gamma: float) -> Tensor:
    even = load.double().mean()
    return bias + gamma * ((load < even).float() - (load > even).float())


def balance_by_one_hot(scores: Tensor, k: int) -> Tensor:
    picks = F.one_hot(scores.topk(k).indices, scores.shape[-1]).sum(-2).float()
    f = picks.mean(dim=1) * scores.shape[-1] / k
    p = F.normalize(scores, p=1, dim=-1).mean(dim=1)
    return torch.einsum("be,be->b", f, p).mean()


def move_after_the_sum(bias: Tensor, loads: Tensor, gamma: float) -> Tensor:
    load = reduce(loads, "m e -> e", "sum").float()
    return bias + gamma * torch.sign(load.mean() - load)


def move_by_counter(bias: Tensor, loads: Tensor, gamma: float) -> Tensor:
    counter: Counter[int] = Counter()
    for load in loads.tolist():
        counter.update(dict(enumerate(load)))
    return moves_by_loop(bias, torch.tensor([counter[e] for e in range(len(bias))]), gamma)


def good_gammas() -> list[float]:
    return [gamma for gamma in recorded().gammas if recorded().reaches(gamma)]


RIGHT: list[tuple[Exercise, Answer]] = [
    (check.max_vio, max_violation),
    (check.max_vio, vio_by_shares),
    (check.move_biases, moves_by_loop),
    (check.move_biases, moves_by_two_masks),
    (check.balance_loss, sequence_balance_loss),
    (check.balance_loss, balance_by_one_hot),
    (check.my_gamma, lambda: good_gammas()[0]),
    (check.my_gamma, lambda: torch.tensor(good_gammas()[-1], dtype=torch.float64)),
    (check.one_move, move_after_the_sum),
    (check.one_move, move_by_counter),
]


# ---- wrong answers -----------------------------------------------------------------------------------------------------


def signs(load: Tensor) -> Tensor:
    return torch.sign(load.float().mean() - load)


def vote(bias: Tensor, loads: Tensor, gamma: float) -> Tensor:
    return bias + gamma * torch.sign(torch.stack([signs(load) for load in loads]).sum(0))


def loop(bias: Tensor, loads: Tensor, gamma: float) -> Tensor:
    for load in loads:
        bias = moves_by_loop(bias, load, gamma)
    return bias


def of_shares(bias: Tensor, loads: Tensor, gamma: float) -> Tensor:
    return bias + gamma * signs((loads / loads.sum(1, keepdim=True)).mean(0))


def chosen_only(scores: Tensor, k: int) -> Tensor:
    best = scores.topk(k)
    kept = torch.zeros_like(scores).scatter(-1, best.indices, best.values / best.values.sum(-1, keepdim=True))
    picks = (kept > 0).float()
    return (picks.mean(1) * kept.mean(1)).sum(-1).mean() * scores.shape[-1] / k


def balance(scores: Tensor, k: int, f: Callable[[Tensor], Tensor], p: Callable[[Tensor], Tensor]) -> Tensor:
    picks = torch.zeros_like(scores).scatter(-1, scores.topk(k).indices, 1.0)
    return (f(picks).mean(1) * p(scores).mean(1)).sum(-1).mean()


def normal(scores: Tensor) -> Tensor:
    return scores / scores.sum(-1, keepdim=True)


WRONG: list[tuple[Exercise, Answer, str]] = [
    (check.max_vio, lambda load: (load / load.float().mean()).max(), "the 1 is missing"),
    (check.max_vio, lambda load: (load / load.sum()).max(), "by the *sum* of the load"),
    (check.max_vio, lambda load: float(max(load)) - float(sum(load)) / len(load), "excess in visits"),
    (check.max_vio, lambda load: float(max(load)) / float(min(load)) - 1 if min(load) else float("inf"), "the idlest"),
    (check.max_vio, lambda load: 1 - load.min() * len(load) / load.sum(), "how far the *idlest*"),
    (check.max_vio, lambda load: (load / load.float().mean() - 1).abs().max(), "on either side"),
    (check.max_vio, lambda load: load.float().std() / load.float().mean(), "spread of all experts"),
    (check.max_vio, lambda load: (load.max() - load.float().mean()) / load.max(), "the mean is below the line"),
    (check.move_biases, lambda b, load, g: b - g * signs(load), "the sign is turned round"),
    (check.move_biases, lambda b, load, g: b + g * (1 - load / load.float().mean()), "in proportion"),
    (check.move_biases, lambda b, load, g: b + g * (load.float().mean() - load), "number of visits too many"),
    (check.move_biases, lambda b, load, g: b + signs(load), "gamma is missing"),
    (check.move_biases, lambda b, load, g: b + g * torch.sign(load.median() - load), "compare with the median"),
    (check.move_biases, lambda b, load, g: b - g * (load > 0), "compare the load with 0"),
    (check.move_biases, lambda b, load, g: torch.where(load > load.float().mean(), b - g, b), "leave the others"),
    (check.move_biases, lambda b, load, g: torch.where(load < load.float().mean(), b + g, b), "leave the busy"),
    (check.move_biases, lambda b, load, g: b + g - 2 * g * (load > load.float().mean()), "moves up here"),
    (check.move_biases, lambda b, load, g: b - g + 2 * g * (load < load.float().mean()), "moves down here"),
    (check.move_biases, lambda b, load, g: g * signs(load), "the move alone"),
    (check.move_biases, lambda b, load, g: b + b * g * signs(load), "you scale the bias"),
    (check.balance_loss, lambda s, k: balance(s, k, lambda f: f * s.shape[-1] / k, torch.clone), "raw scores"),
    (check.balance_loss, chosen_only, "over the chosen experts only"),
    (check.balance_loss, lambda s, k: balance(s, k, lambda f: f * s.shape[-1] / k, lambda x: x.softmax(-1)), "softmax"),
    (check.balance_loss, lambda s, k: balance(s, k, lambda f: f * s.shape[-1] / k, lambda x: x / x.sum(1, True)),
     "the sum over the *tokens*"),
    (check.balance_loss, lambda s, k: balance(s, k, torch.clone, normal), "factor e / k"),
    (check.balance_loss, lambda s, k: balance(s, k, lambda f: f * s.shape[-1], normal), "k times too large"),
    (check.balance_loss, lambda s, k: sequence_balance_loss(s, k) * len(s), "you add the sequences up"),
    (check.balance_loss, lambda s, k: sequence_balance_loss(s, k) / s.shape[-1], "equation 17 is a sum"),
    (check.balance_loss, lambda s, k: sequence_balance_loss(rearrange(s, "b s e -> 1 (b s) e"), k), "batch-wise loss"),
    (check.balance_loss, lambda s, k: (normal(s).mean(1).square() * s.shape[-1]).sum(-1).mean(), "f is made of the scores"),
    (check.balance_loss, lambda s, k: sequence_balance_loss(s, 1) / k, "the best expert of each token only"),
    (check.balance_loss, lambda s, k: sequence_balance_loss(s, k).detach(), "must be differentiable"),
    (check.my_gamma, lambda: 0.0123, "a number that the slider shows"),
    (check.my_gamma, lambda: 0.0, "no bias ever moves"),
    (check.my_gamma, lambda: recorded().gammas[1], "too small"),
    (check.my_gamma, lambda: recorded().gammas[-1], "too large"),
    (check.one_move, loop, "still the bug"),
    (check.one_move, lambda b, loads, g: loop(b, loads, g / len(loads)), "gamma is shared"),
    (check.one_move, vote, "micro-batches vote"),
    (check.one_move, lambda b, loads, g: moves_by_loop(b, loads[-1], g), "only the last"),
    (check.one_move, lambda b, loads, g: moves_by_loop(b, loads[0], g), "only the first"),
    (check.one_move, of_shares, "average each micro-batch's *shares*"),
    (check.one_move, lambda b, loads, g: 2 * b - moves_by_loop(b, loads.sum(0), g), "the wrong way"),
    (check.one_move, lambda b, loads, g: b - g, "an even share of *one* of them"),
    (check.one_move, lambda b, loads, g: moves_by_loop(b, loads.sum(0), g * len(loads)), "a move for each micro-batch"),
]  # fmt: skip


@pytest.mark.parametrize("exercise, answer, hint", WRONG, ids=[f"{e.name}: {hint}" for e, _, hint in WRONG])
def test_wrong_answers_get_their_own_hint(exercise: Exercise, answer: Answer, hint: str) -> None:
    result = exercise.run(answer)
    assert result.state == "wrong"
    assert hint in "\n".join(result.lines), result
    known = [each.hint for each in (*exercise.mistakes, *exercise.properties)]
    assert sum(hint in each for each in known) == 1, "no other hint has these words"


def test_the_callers_biases_are_left_alone() -> None:
    def in_place(bias: Tensor, load: Tensor, gamma: float) -> Tensor:
        bias += gamma * signs(load)
        return bias

    assert "changes its input number 1 in place" in "\n".join(check.move_biases.run(in_place).lines)


def test_a_whole_numbers_mean_is_refused_by_torch_in_words() -> None:
    lines = "\n".join(check.max_vio.run(lambda load: load.max() / load.mean() - 1).lines)
    assert "RuntimeError" in lines and "dtype" in lines


@pytest.mark.parametrize("exercise", exercises_of(check).values(), ids=lambda e: e.name)
def test_blank_is_unsolved_and_every_exercise_knows_mistakes(exercise: Exercise) -> None:
    def blank(*_: Any) -> Tensor:
        raise NotImplementedError

    assert exercise.run(blank).state == "unsolved"
    hints = [each.hint for each in (*exercise.mistakes, *exercise.properties)]
    assert len(hints) >= 3 and len(set(hints)) == len(hints)


def test_the_lessons_exercises_in_their_order() -> None:
    assert list(exercises_of(check)) == ["max_vio", "move_biases", "balance_loss", "my_gamma", "one_move"]


def test_some_gammas_are_too_small_some_right_and_some_too_large() -> None:
    good, known = good_gammas(), recorded().gammas
    assert good and known[1] < good[0] <= good[-1] < known[-1]
    assert good == [gamma for gamma in known if good[0] <= gamma <= good[-1]]
