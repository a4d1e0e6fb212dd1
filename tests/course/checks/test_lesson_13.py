"""Lesson 13's checks: each right answer accepted, each wrong one refused with its own hint, a blank one only noted."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from lesson_answers import (  # noqa: F401
    test_blank_is_unsolved_and_every_exercise_knows_mistakes,
    test_right_answers_are_accepted,
    test_wrong_answers_get_their_own_hint,
)
from torch import Tensor, nn

from dsv3_mini.course.checks import lesson_13 as check
from dsv3_mini.course.checks.framework import Exercise, exercises_of
from dsv3_mini.data.packing import IGNORED
from dsv3_mini.train import losses, schedules
from dsv3_mini.train.optimizer import MasterAdamW

# ---- right answers, each written in two ways ---------------------------------------------------------------------------


def scheduled_of_the_package(tokens: float, pieces: list[Any]) -> float:
    return schedules.Schedule("x", tuple(schedules.Piece(*piece) for piece in pieces))(tokens)


def scheduled_by_bisection(tokens: float, pieces: list[Any]) -> float:
    untils = [piece[0] for piece in pieces]
    index = bisect.bisect_right(untils, tokens)
    if index == len(pieces):
        return pieces[-1][2]
    until, start, end, shape = pieces[index]
    begin = untils[index - 1] if index else 0
    p = (tokens - begin) / (until - begin)
    p = 0.5 - 0.5 * math.cos(math.pi * p) if shape == "cosine" else p
    return start * (1 - p) + end * p


def tokens_of_the_package(steps: int, batch_size: Any, context: int) -> int:
    return schedules.tokens_after(steps, batch_size, schedules.constant("context", context))


def tokens_in_sequences(steps: int, batch_size: Any, context: int) -> int:
    sequences = 0
    while steps:
        sequences, steps = sequences + round(batch_size(sequences * context)), steps - 1
    return context * sequences


def adamw_in_place(w, g, m, v, t, lr, decay, betas, eps):
    w, m, v = w.clone(), m.clone(), v.clone()
    if w.dim() > 1:
        w.mul_(1 - lr * decay)
    m.lerp_(g, 1 - betas[0])
    v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
    w.addcdiv_(m / (1 - betas[0] ** t), (v / (1 - betas[1] ** t)).sqrt_().add_(eps), value=-lr)
    return w, m, v


def adamw_with_old_weight(w, g, m, v, t, lr, decay, betas, eps):
    m = betas[0] * m + (1 - betas[0]) * g
    v = betas[1] * v + (1 - betas[1]) * g.square()
    update = (m / (1 - betas[0] ** t)) / (torch.sqrt(v / (1 - betas[1] ** t)) + eps)
    return w - lr * (update + (decay * w if len(w.shape) > 1 else 0)), m, v


def clip_by_torch(gradients: list[Tensor], largest: float) -> tuple[list[Tensor], float]:
    parameters = [nn.Parameter(torch.zeros_like(g)) for g in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    norm = nn.utils.clip_grad_norm_(parameters, largest)
    return [parameter.grad for parameter in parameters], norm.item()


def clip_of_norms(gradients: list[Tensor], largest: float) -> tuple[tuple[Tensor, ...], Tensor]:
    norm = torch.stack([g.norm() for g in gradients]).norm()
    return tuple(g / torch.clamp(norm / largest, min=1.0) for g in gradients), norm


def clip_by_the_package(gradients: list[Tensor], largest: float) -> tuple[list[Tensor], float]:
    model = nn.ParameterDict({str(i): nn.Parameter(torch.zeros_like(g)) for i, g in enumerate(gradients)})
    for parameter, gradient in zip(model.values(), gradients, strict=True):
        parameter.grad = gradient.clone()
    norm = MasterAdamW(model, (0.9, 0.95), 0.1, 0.0).clip_gradients(largest)
    return [parameter.grad for parameter in model.values()], norm.item()


def parts_of_the_package(logits: Tensor, targets: Tensor, micro_batch: int) -> list[Tensor]:
    head, count = torch.eye(logits.shape[-1]), losses.kept_targets(targets)
    pairs = zip(logits.split(micro_batch), targets.split(micro_batch), strict=True)
    return [losses.cross_entropy(z, head, t, count) for z, t in pairs]


def parts_by_position(logits: Tensor, targets: Tensor, micro_batch: int) -> list[Tensor]:
    nats = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
    share = nats / (targets != IGNORED).sum()
    return [share[start : start + micro_batch].sum() for start in range(0, len(share), micro_batch)]


RIGHT: list[tuple[Exercise, Callable[..., Any]]] = [
    (check.scheduled, scheduled_of_the_package),
    (check.scheduled, scheduled_by_bisection),
    (check.tokens_after, tokens_of_the_package),
    (check.tokens_after, tokens_in_sequences),
    (check.adamw, adamw_in_place),
    (check.adamw, adamw_with_old_weight),
    (check.clip, clip_by_torch),
    (check.clip, clip_of_norms),
    (check.clip, clip_by_the_package),
    (check.part_losses, parts_of_the_package),
    (check.part_losses, parts_by_position),
]


# ---- wrong answers -----------------------------------------------------------------------------------------------------


def schedule_with(
    bend: Callable[[float], float] = lambda p: 0.5 - 0.5 * math.cos(math.pi * p),
    begins: Callable[[list[Any]], list[float]] = lambda pieces: [0, *(piece[0] for piece in pieces)],
    over: Callable[[float, float], bool] = lambda tokens, until: tokens >= until,
    starts: Callable[[list[Any]], list[float]] = lambda pieces: [piece[1] for piece in pieces],
    after: Callable[[list[Any]], float] = lambda pieces: pieces[-1][2],
) -> Callable[..., float]:
    """A schedule with one part exchanged."""

    def answer(tokens: float, pieces: list[Any]) -> float:
        for begin, start, (until, _, end, shape) in zip(begins(pieces), starts(pieces), pieces, strict=False):
            if not over(tokens, until):
                p = (tokens - begin) / (until - begin)
                return start + (end - start) * (bend(p) if shape == "cosine" else p)
        return after(pieces)

    return answer


def count_with(
    ask: Callable[[int, int], float] = lambda step, tokens: tokens,
    whole: Callable[[float], float] = round,
    off: int = 0,
) -> Callable[..., float]:
    def answer(steps: int, batch_size: Any, context: int) -> float:
        tokens = 0
        for step in range(steps + off):
            tokens += whole(batch_size(ask(step, tokens))) * context
        return tokens

    return answer


def sequences_only(steps: int, batch_size: Any, context: int) -> int:
    return tokens_in_sequences(steps, batch_size, context) // context


def asked_too_late(steps: int, batch_size: Any, context: int) -> int:
    tokens = 0
    for _ in range(steps):
        ahead = tokens + context * round(batch_size(tokens))
        tokens += context * round(batch_size(ahead))
    return tokens


def adamw_of_torch(
    kind: type[torch.optim.Optimizer] = torch.optim.AdamW, decayed: Any = None, exchanged: bool = False
) -> Any:
    """torch's optimizer under other settings."""

    def answer(w, g, m, v, t, lr, decay, betas, eps):
        parameter = nn.Parameter(w.clone())
        own = decayed(w, lr, decay) if decayed else decay if w.ndim > 1 else 0.0
        betas = tuple(reversed(betas)) if exchanged else betas
        optimizer = kind([parameter], lr=lr, betas=betas, eps=eps, weight_decay=own)
        state = {"step": torch.tensor(t - 1.0), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
        optimizer.state[parameter] = state
        parameter.grad = g.clone()
        optimizer.step()
        return parameter.detach(), state["exp_avg"], state["exp_avg_sq"]

    return answer


def adamw_by_hand(
    update: Callable[..., Tensor] = lambda g, m, v, M, V, eps: M / (V.sqrt() + eps),
    square: Callable[[Tensor], Tensor] = torch.square,
    sign: int = 1,
) -> Any:
    """`update` gets the gradient, the averages as they came in, the corrected new ones, and eps."""

    def answer(w, g, m, v, t, lr, decay, betas, eps):
        new_m, new_v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * square(g)
        c, d = 1 - betas[0] ** t, 1 - betas[1] ** t
        step = update(g, m / c, v / d, new_m / c, new_v / d, eps)
        return w * (1 - lr * decay * (w.ndim > 1)) - sign * lr * step, new_m, new_v

    return answer


def uncorrected(w, g, m, v, t, lr, decay, betas, eps):
    m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
    return w * (1 - lr * decay * (w.ndim > 1)) - lr * m / (v.sqrt() + eps), m, v


def norm_of(gradients: list[Tensor]) -> float:
    return torch.cat([g.flatten() for g in gradients]).norm().item()


def clip_with(norm: Callable[[list[Tensor]], float], told: Callable[[float, float], float] = lambda n, _: n) -> Any:
    def answer(gradients: list[Tensor], largest: float) -> tuple[list[Tensor], float]:
        own = norm(gradients)
        return [g * min(1.0, largest / own) for g in gradients], told(own, largest)

    return answer


def clip_upwards(gradients: list[Tensor], largest: float) -> tuple[list[Tensor], float]:
    return [g * largest / norm_of(gradients) for g in gradients], norm_of(gradients)


def clip_numbers(gradients: list[Tensor], largest: float) -> tuple[list[Tensor], float]:
    return [g.clip(-largest, largest) for g in gradients], norm_of(gradients)


def clip_each(gradients: list[Tensor], largest: float) -> tuple[list[Tensor], float]:
    return [clip_by_torch([g], largest)[0][0] for g in gradients], norm_of(gradients)


def parts_with(loss: Callable[..., Any]) -> Any:
    """`loss(flat logits, flat targets, all targets, rows of this part, parts)`."""

    def answer(logits: Tensor, targets: Tensor, micro_batch: int) -> list[Tensor]:
        pairs = list(zip(logits.split(micro_batch), targets.split(micro_batch), strict=True))
        return [loss(z.flatten(0, 1), t.flatten(), targets, len(t), len(pairs)) for z, t in pairs]

    return answer


def mean(z: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(z, t, ignore_index=IGNORED)


def total(z: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(z, t, ignore_index=IGNORED, reduction="sum")


def kept(t: Tensor) -> Tensor:
    return (t != IGNORED).sum()


def before_it(pieces: list[Any]) -> list[float]:
    return [pieces[0][1], *(end for (_, _, end, _), _ in pairwise(pieces))]


WRONG: list[tuple[Exercise, Callable[..., Any], str]] = [
    (check.scheduled, schedule_with(bend=lambda p: p), "in a straight line"),
    (check.scheduled, schedule_with(bend=lambda p: (1 + math.cos(math.pi * p)) / 2), "runs backwards"),
    (check.scheduled, schedule_with(bend=lambda p: 1 - math.cos(math.pi / 2 * p)), "a quarter of a wave"),
    (check.scheduled, schedule_with(bend=lambda p: 0.5 - 0.5 * math.cos(2 * math.pi * p)), "a whole wave"),
    (check.scheduled, schedule_with(begins=lambda pieces: [0] * len(pieces)), "counts from token 0"),
    (check.scheduled, schedule_with(over=lambda tokens, until: tokens > until), "use <, not <="),
    (check.scheduled, schedule_with(starts=before_it), "may begin with a jump"),
    (check.scheduled, schedule_with(after=lambda pieces: 0.0), "after the last piece you give 0"),
    (check.scheduled, schedule_with(after=lambda pieces: pieces[0][1]), "begin again at the first"),
    (check.scheduled, schedule_with(after=lambda pieces: None), "nothing (None)"),
    (check.tokens_after, lambda n, batch, s: n * s * round(batch(0)), "the first batch for all steps"),
    (check.tokens_after, count_with(ask=lambda step, tokens: step), "the number of the *step*"),
    (check.tokens_after, count_with(whole=float), "round what the schedule gives"),
    (check.tokens_after, count_with(whole=int), "instead of rounding it"),
    (check.tokens_after, count_with(off=1), "one step too many"),
    (check.tokens_after, sequences_only, "you count sequences"),
    (check.tokens_after, asked_too_late, "the tokens *after* the step"),
    (check.adamw, uncorrected, "not corrected"),
    (check.adamw, adamw_of_torch(decayed=lambda w, lr, decay: decay), "the weight of a norm decays"),
    (check.adamw, adamw_of_torch(decayed=lambda w, lr, decay: 0.0), "nothing decays"),
    (check.adamw, adamw_of_torch(decayed=lambda w, lr, decay: decay / lr * (w.ndim > 1)), "by weight_decay itself"),
    (check.adamw, adamw_of_torch(torch.optim.Adam), "Adam with an L2 penalty"),
    (check.adamw, adamw_of_torch(exchanged=True), "betas are exchanged"),
    (check.adamw, adamw_by_hand(sign=-1), "you go uphill"),
    (check.adamw, adamw_by_hand(lambda g, m, v, M, V, eps: M / (V + eps).sqrt()), "eps stands under the root"),
    (check.adamw, adamw_by_hand(lambda g, m, v, M, V, eps: M / (V + eps)), "the root is missing"),
    (check.adamw, adamw_by_hand(lambda g, m, v, M, V, eps: g / (V.sqrt() + eps)), "of this one batch"),
    (check.adamw, adamw_by_hand(lambda g, m, v, M, V, eps: m / (v.sqrt() + eps)), "update them first"),
    (check.adamw, adamw_by_hand(square=torch.abs), "gradient's *squares*"),
    (check.clip, clip_each, "each tensor by itself"),
    (check.clip, clip_upwards, "blown up to the limit"),
    (check.clip, clip_numbers, "cut every number by itself"),
    (check.clip, clip_with(lambda gs: sum(g.norm().item() for g in gs)), "add up the norms"),
    (check.clip, clip_with(lambda gs: norm_of(gs) ** 2), "the root is missing"),
    (check.clip, clip_with(norm_of, told=min), "the norm after clipping"),
    (check.clip, clip_with(lambda gs: max(g.abs().max().item() for g in gs)), "the largest number for the norm"),
    (check.part_losses, parts_with(lambda z, t, whole, rows, parts: mean(z, t) / parts), "a mean of means"),
    (check.part_losses, parts_with(lambda z, t, whole, rows, parts: mean(z, t)), "the mean over itself"),
    (check.part_losses, parts_with(lambda z, t, whole, rows, parts: total(z, t)), "these are sums"),
    (
        check.part_losses,
        parts_with(lambda z, t, whole, rows, parts: total(z, t) / whole.numel()),
        "the padded ones too",
    ),
    (
        check.part_losses,
        parts_with(lambda z, t, whole, rows, parts: mean(z, t) * rows / len(whole)),
        "number of *rows*",
    ),
    (
        check.part_losses,
        parts_with(lambda z, t, whole, rows, parts: total(z, t) / kept(whole) / parts),
        "once too often",
    ),
    (
        check.part_losses,
        parts_with(lambda z, t, whole, rows, parts: mean(z, t) * kept(t) / kept(whole)),
        "the mean of nothing, which is nan",
    ),
]


# ---- the rest ----------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_tensor_is_refused() -> None:
    answer = parts_with(lambda z, t, whole, rows, parts: (total(z, t) / kept(whole)).item())
    result = check.part_losses.run(answer)
    assert result.state == "wrong" and "a tensor of shape () is wanted" in "\n".join(result.lines)


def test_changing_the_averages_in_place_is_refused() -> None:
    def answer(w, g, m, v, *settings):
        m.mul_(0.5)
        return adamw_with_old_weight(w, g, m, v, *settings)

    assert "in place" in "\n".join(check.adamw.run(answer).lines)


def test_the_lessons_exercises_in_their_order() -> None:
    assert list(exercises_of(check)) == ["scheduled", "tokens_after", "adamw", "clip", "part_losses"]
