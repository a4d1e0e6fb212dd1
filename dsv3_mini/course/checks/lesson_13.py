"""Checks of lesson 13: a schedule in pieces, steps turned into tokens, a step of AdamW, clipping, a loss in micro-batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from dsv3_mini.course.checks.framework import Case, Exercise, Mistake, Property
from dsv3_mini.data.packing import IGNORED

Inputs = Callable[[torch.Generator], tuple[Any, ...]]
Pieces = Sequence[tuple[float, float, float, str]]

# ---- scheduled ---------------------------------------------------------------------------------------------------------

# The report's shape in small numbers: up, flat, half a cosine down, flat, and a jump to a lower level.
_PIECES: Pieces = (
    (100, 0.0, 8.0, "linear"),
    (500, 8.0, 8.0, "linear"),
    (900, 8.0, 2.0, "cosine"),
    (1000, 2.0, 2.0, "linear"),
    (1200, 0.5, 0.5, "linear"),
)


def _reference_scheduled(tokens: float, pieces: Pieces) -> float:
    """The half cosine written as the square of a sine."""
    begins = [0.0, *(until for until, *_ in pieces)]
    for begin, (until, start, end, shape) in zip(begins, pieces, strict=False):
        if begin <= tokens < until:
            share = (tokens - begin) / (until - begin)
            done = math.sin(math.pi * share / 2) ** 2 if shape == "cosine" else share
            return (1 - done) * start + done * end
    return pieces[-1][2]


def _scheduled_with(
    tokens: float,
    pieces: Pieces,
    *,
    bend: Callable[[float], float] = lambda share: (1 - math.cos(math.pi * share)) / 2,
    from_zero: bool = False,
    includes_end: bool = False,
    own_start: bool = True,
    after: Callable[[Pieces], float] = lambda pieces: pieces[-1][2],
) -> float:
    """The schedule with its mistakes as switches."""
    begin, before = 0.0, pieces[0][1]
    for until, start, end, shape in pieces:
        if tokens < until or (includes_end and tokens == until):
            share = tokens / until if from_zero else (tokens - begin) / (until - begin)
            first = start if own_start else before
            return first + (end - first) * (bend(share) if shape == "cosine" else share)
        begin, before = until, end
    return after(pieces)


def _wrong_schedule(**wrong: Any) -> Callable[..., float]:
    return lambda tokens, pieces: _scheduled_with(tokens, pieces, **wrong)


def _at(tokens: float, pieces: Pieces = _PIECES) -> Inputs:
    return lambda _: (tokens, list(pieces))


scheduled = Exercise(
    name="scheduled",
    reference=_reference_scheduled,
    cases=[
        Case("a quarter of the first piece", _at(25)),
        Case("the flat piece", _at(300)),
        Case("a quarter of the cosine", _at(600)),
        Case("three quarters of it", _at(800)),
        Case("a slope that does not begin at 0 tokens", _at(30, [(20, 1.0, 1.0, "linear"), (60, 1.0, 5.0, "linear")])),
        Case("the last level", _at(1100)),
        Case("the very token at which a level ends", _at(1000)),
        Case("after the last piece", _at(500, [(20, 1.0, 1.0, "linear"), (60, 1.0, 5.0, "linear")])),
    ],
    mistakes=[
        Mistake(
            _wrong_schedule(bend=lambda share: share),
            "the cosine piece runs in a straight line: (1 - cos(pi * share)) / 2 takes the place of the share there",
        ),
        Mistake(
            _wrong_schedule(bend=lambda share: (1 + math.cos(math.pi * share)) / 2),
            "your cosine runs backwards: at the beginning of the piece it gives the end's value. At share 0 nothing is done "
            "yet, so the factor is (1 - cos(pi * share)) / 2",
        ),
        Mistake(
            _wrong_schedule(bend=lambda share: 1 - math.cos(math.pi * share / 2)),
            "you use a quarter of a wave: it begins flat and ends steep. Half a wave, (1 - cos(pi * share)) / 2, is flat at both ends",
        ),
        Mistake(
            _wrong_schedule(bend=lambda share: (1 - math.cos(2 * math.pi * share)) / 2),
            "you use a whole wave, which comes back to where it began: half a wave is cos(pi * share)",
        ),
        Mistake(
            _wrong_schedule(from_zero=True),
            "your share of a piece counts from token 0: count from where the piece begins, which is where the one before ends",
        ),
        Mistake(
            _wrong_schedule(includes_end=True),
            "`until` belongs to the next piece: at exactly so many tokens seen, this one is over (use <, not <=)",
        ),
        Mistake(
            _wrong_schedule(own_start=False),
            "you run from the end of the piece before: each piece has a start of its own, and may begin with a jump",
        ),
        Mistake(
            _wrong_schedule(after=lambda _: 0.0),
            "after the last piece you give 0: its end value stays, for a run may go on a few tokens longer",
        ),
        Mistake(
            _wrong_schedule(after=lambda pieces: pieces[0][1]),
            "after the last piece you begin again at the first: the last end value stays",
        ),
    ],
)

# ---- tokens_after ------------------------------------------------------------------------------------------------------

Batch = Callable[[float], float]
_CONTEXT = 4


def _constant_batch(tokens: float) -> float:
    return 3.0


def _growing_batch(tokens: float) -> float:
    """2 sequences, growing to 9 over the first 20 tokens."""
    return 2 + 7 * min(tokens / 20, 1.0)


def _reference_tokens_after(steps: int, batch_size: Batch, context: int) -> int:
    return 0 if steps == 0 else _one_more(_reference_tokens_after(steps - 1, batch_size, context), batch_size, context)


def _one_more(tokens: int, batch_size: Batch, context: int) -> int:
    return tokens + context * round(batch_size(tokens))


def _tokens_with(
    steps: int,
    batch_size: Batch,
    context: int,
    *,
    asked: Callable[[int, float, int], float] = lambda step, tokens, own: tokens,
    rounded: Callable[[float], float] = round,
    more: int = 0,
) -> float:
    """The count with its mistakes as switches. `asked`: (step, tokens before it, its batch if known) -> what the schedule gets."""
    tokens = 0.0
    for step in range(steps + more):
        tokens += rounded(batch_size(asked(step, tokens, context))) * context
    return tokens


tokens_after = Exercise(
    name="tokens_after",
    reference=_reference_tokens_after,
    cases=[
        Case("5 steps of an even batch", lambda _: (5, _constant_batch, _CONTEXT)),
        Case("no step yet", lambda _: (0, _growing_batch, _CONTEXT)),
        Case("a growing batch, 4 steps", lambda _: (4, _growing_batch, _CONTEXT)),
        Case("a growing batch, 12 steps", lambda _: (12, _growing_batch, _CONTEXT)),
    ],
    mistakes=[
        Mistake(
            lambda steps, batch_size, context: steps * context * round(batch_size(0)),
            "you take the first batch for all steps: the batch grows meanwhile. Take the steps one after the other, and ask the "
            "schedule before each",
        ),
        Mistake(
            lambda steps, batch_size, context: _tokens_with(steps, batch_size, context, asked=lambda step, *_: step),
            "you ask the schedule with the number of the *step*: it is a function of the tokens seen",
        ),
        Mistake(
            lambda steps, batch_size, context: _tokens_with(steps, batch_size, context, rounded=float),
            "a batch is a whole number of sequences: round what the schedule gives, at every step",
        ),
        Mistake(
            lambda steps, batch_size, context: _tokens_with(steps, batch_size, context, rounded=math.floor),
            "you cut the batch off instead of rounding it: the schedule's 2.9 sequences are 3",
        ),
        Mistake(
            lambda steps, batch_size, context: _tokens_with(
                steps, batch_size, 1, asked=lambda _, seen, __: seen * context
            ),
            "you count sequences: each has `context` tokens",
        ),
        Mistake(
            lambda steps, batch_size, context: _tokens_with(steps, batch_size, context, more=1),
            "you take one step too many: after 0 steps no token has been seen",
        ),
        Mistake(
            lambda steps, batch_size, context: _tokens_with(
                steps, batch_size, context, asked=lambda _, tokens, own: tokens + own * round(batch_size(tokens))
            ),
            "you ask the schedule with the tokens *after* the step: before the first step none has been seen",
        ),
    ],
)

# ---- adamw -------------------------------------------------------------------------------------------------------------

Moments = tuple[Tensor, Tensor, Tensor]
_SETTINGS: dict[str, Any] = {"learning_rate": 0.1, "weight_decay": 0.4, "betas": (0.8, 0.95), "eps": 0.05}


def _adamw_inputs(step: int, *shape: int, **changes: Any) -> Inputs:
    settings = {**_SETTINGS, **changes}

    def inputs(random: torch.Generator) -> tuple[Any, ...]:
        weight, gradient, first = (torch.randn(shape, generator=random) for _ in range(3))
        second = torch.rand(shape, generator=random) + 0.1
        moments = (first, second) if step > 1 else (torch.zeros(shape), torch.zeros(shape))
        return (2 + weight, gradient, *moments, step, *settings.values())

    return inputs


def _reference_adamw(
    weight: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    step: int,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
) -> Moments:
    """torch's own optimizer, put into this state."""
    parameter = torch.nn.Parameter(weight.clone())
    decay = weight_decay if weight.ndim > 1 else 0.0
    optimizer = torch.optim.AdamW(
        [parameter], lr=learning_rate, betas=betas, eps=eps, weight_decay=decay, foreach=False
    )
    kept = {"step": torch.tensor(float(step - 1)), "exp_avg": first.clone(), "exp_avg_sq": second.clone()}
    optimizer.state[parameter] = kept
    parameter.grad = gradient.clone()
    optimizer.step()
    return parameter.detach(), kept["exp_avg"], kept["exp_avg_sq"]


def _adamw_with(
    weight: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    step: int,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    *,
    corrected: bool = True,
    decays: Callable[[Tensor], bool] = lambda weight: weight.ndim > 1,
    by_rate: bool = True,
    into_gradient: bool = False,
    exchanged: bool = False,
    eps_inside: bool = False,
    root: bool = True,
    squared: bool = True,
    direction: str = "first",
    sign: float = -1.0,
    late: bool = False,
) -> Moments:
    """The step with its mistakes as switches."""
    one, two = reversed(betas) if exchanged else betas
    decay = weight_decay if decays(weight) else 0.0
    if into_gradient:
        gradient, decay = gradient + decay * weight, 0.0
    old_first, old_second = first, second
    first = one * first + (1 - one) * gradient
    second = two * second + (1 - two) * (gradient * gradient if squared else gradient.abs())
    used, spread = (old_first, old_second) if late else (first, second)
    used = gradient if direction == "gradient" else used
    if corrected:
        used = used if direction == "gradient" else used / (1 - one**step)
        spread = spread / (1 - two**step)
    under, beside = (eps, 0.0) if eps_inside else (0.0, eps)
    down = ((spread + under).sqrt() if root else spread) + beside
    shrunk = weight * (1 - (learning_rate if by_rate else 1.0) * decay)
    return shrunk + sign * learning_rate * used / down, first, second


def _wrong_adamw(**wrong: Any) -> Callable[..., Moments]:
    return lambda *inputs: _adamw_with(*inputs, **wrong)


adamw = Exercise(
    name="adamw",
    reference=_reference_adamw,
    cases=[
        Case("the first step of a matrix", _adamw_inputs(1, 3, 4)),
        Case("step 7 of a matrix", _adamw_inputs(7, 3, 4)),
        Case("step 7 of a norm's weight, which has one axis", _adamw_inputs(7, 6)),
        Case("another speed, and no decay", _adamw_inputs(3, 2, 5, learning_rate=0.3, weight_decay=0.0)),
        Case("three axes, as stacked experts have", _adamw_inputs(2, 2, 3, 4)),
    ],
    mistakes=[
        Mistake(
            _wrong_adamw(corrected=False),
            "the two averages are not corrected: they began at zero and are too small at first. Divide them by 1 - beta ** step",
        ),
        Mistake(
            _wrong_adamw(decays=lambda _: True),
            "the weight of a norm decays: only what has more than one axis does",
        ),
        Mistake(
            _wrong_adamw(decays=lambda _: False),
            "nothing decays: a weight of more than one axis is multiplied by 1 - learning_rate * weight_decay",
        ),
        Mistake(
            _wrong_adamw(by_rate=False),
            "the weights decay by weight_decay itself: it is learning_rate * weight_decay, a little at each step",
        ),
        Mistake(
            _wrong_adamw(into_gradient=True),
            "the decay goes into the gradient, and from there into the averages: that is Adam with an L2 penalty. The W in AdamW "
            "says that it acts on the weight alone",
        ),
        Mistake(
            _wrong_adamw(exchanged=True),
            "the two betas are exchanged: the first is for the average of gradients, the second for that of their squares",
        ),
        Mistake(
            _wrong_adamw(eps_inside=True),
            "eps stands under the root: it is added to the root",
        ),
        Mistake(
            _wrong_adamw(root=False),
            "the root is missing: divide by the root of the second average, plus eps",
        ),
        Mistake(
            _wrong_adamw(squared=False),
            "the second average is of the gradient's *squares*",
        ),
        Mistake(
            _wrong_adamw(direction="gradient"),
            "you step along the gradient of this one batch: step along its average, `first`",
        ),
        Mistake(
            _wrong_adamw(sign=1.0),
            "you go uphill: the step is subtracted",
        ),
        Mistake(
            _wrong_adamw(late=True),
            "you step with the averages as they came in: update them first, with this gradient in them",
        ),
    ],
)

# ---- clip --------------------------------------------------------------------------------------------------------------

Clipped = tuple[list[Tensor], float]


def _gradients(*sizes: float) -> Callable[[torch.Generator], list[Tensor]]:
    shapes = [(3, 4), (5,), (2, 2, 2)]
    return lambda random: [
        size * torch.randn(shape, generator=random) for size, shape in zip(sizes, shapes, strict=False)
    ]


def _reference_clip(gradients: list[Tensor], largest: float) -> Clipped:
    flat = torch.cat([gradient.flatten() for gradient in gradients]).double()
    norm = float((flat * flat).sum()) ** 0.5
    return [gradient * min(1.0, largest / norm) for gradient in gradients], norm


def _size(gradient: Tensor) -> float:
    return float(gradient.square().sum()) ** 0.5


def _scaled(gradients: list[Tensor], factor: float, norm: float) -> Clipped:
    return [gradient * factor for gradient in gradients], norm


def _each_alone(gradients: list[Tensor], largest: float) -> Clipped:
    each = [gradient * min(1.0, largest / _size(gradient)) for gradient in gradients]
    return each, _reference_clip(gradients, largest)[1]


def _leaves_directions(answer: Callable[..., Any]) -> bool:
    gradients = _gradients(3.0, 0.1, 1.0)(torch.Generator().manual_seed(2))
    clipped, _ = answer([g.clone() for g in gradients], 0.5)
    one, other = (torch.cat([g.flatten() for g in each]) for each in (gradients, clipped))
    return float(F.cosine_similarity(one, other, dim=0)) > 0.9999


clip = Exercise(
    name="clip",
    reference=_reference_clip,
    cases=[
        Case("three large tensors", lambda random: (_gradients(3.0, 2.0, 1.0)(random), 1.0)),
        Case("gradients that are small enough", lambda random: (_gradients(0.01, 0.02, 0.01)(random), 1.0)),
        Case("one large among small ones", lambda random: (_gradients(0.05, 4.0, 0.05)(random), 1.5)),
    ],
    mistakes=[
        Mistake(
            _each_alone,
            "you clip each tensor by itself: that turns the step into another direction. One norm for all of them together, one "
            "factor for all",
        ),
        Mistake(
            lambda gradients, largest: _scaled(
                gradients, largest / _reference_clip(gradients, 1.0)[1], _reference_clip(gradients, 1.0)[1]
            ),
            "small gradients are blown up to the limit: the factor is at most 1",
        ),
        Mistake(
            lambda gradients, largest: (
                [gradient.clamp(-largest, largest) for gradient in gradients],
                _reference_clip(gradients, 1.0)[1],
            ),
            "you cut every number by itself: that changes the direction. Scale all of them by one factor",
        ),
        Mistake(
            lambda gradients, largest: _scaled(
                gradients, min(1.0, largest / sum(map(_size, gradients))), sum(map(_size, gradients))
            ),
            "you add up the norms of the tensors: add up their squares, and take the root of that",
        ),
        Mistake(
            lambda gradients, largest: _scaled(
                gradients,
                min(1.0, largest / _reference_clip(gradients, 1.0)[1] ** 2),
                _reference_clip(gradients, 1.0)[1] ** 2,
            ),
            "the root is missing: the norm is the root of the sum of squares",
        ),
        Mistake(
            lambda gradients, largest: (
                _reference_clip(gradients, largest)[0],
                min(largest, _reference_clip(gradients, 1.0)[1]),
            ),
            "you give the norm after clipping: give the one before, it is what tells you that a run is about to break",
        ),
        Mistake(
            lambda gradients, largest: _scaled(
                gradients,
                min(1.0, largest / max(float(g.abs().max()) for g in gradients)),
                max(float(g.abs().max()) for g in gradients),
            ),
            "you take the largest number for the norm: it is the root of the sum of all squares",
        ),
    ],
    properties=[
        Property(
            "clipping leaves the direction as it is",
            _leaves_directions,
            "every number of every tensor is multiplied by the same factor",
        )
    ],
)

# ---- part_losses (the bug) ---------------------------------------------------------------------------------------------


def _part_inputs(rows: int, positions: int, micro_batch: int, kept: Sequence[int]) -> Inputs:
    """`kept`: targets that count in each row, the rest is padding."""

    def inputs(random: torch.Generator) -> tuple[Any, ...]:
        logits = 2 * torch.randn(rows, positions, 7, generator=random)
        targets = torch.randint(0, 7, (rows, positions), generator=random)
        for row, count in enumerate(kept):
            targets[row, count:] = IGNORED
        return logits, targets, micro_batch

    return inputs


def _nats(logits: Tensor, targets: Tensor) -> Tensor:
    flat, wanted = rearrange(logits, "b s v -> (b s) v"), rearrange(targets, "b s -> (b s)")
    return F.cross_entropy(flat, wanted, ignore_index=IGNORED, reduction="sum")


def _kept(targets: Tensor) -> int:
    return int((targets != IGNORED).sum())


def _parts(logits: Tensor, targets: Tensor, micro_batch: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(logits.split(micro_batch), targets.split(micro_batch), strict=True))


def _reference_part_losses(logits: Tensor, targets: Tensor, micro_batch: int) -> list[Tensor]:
    """Row by row."""
    rows = [
        -(z.log_softmax(-1)[t != IGNORED].gather(-1, t[t != IGNORED][:, None]).sum())
        for z, t in zip(logits, targets, strict=True)
    ]
    summed = torch.stack(rows) / _kept(targets)
    return [part.sum() for part in summed.split(micro_batch)]


def _wrong_parts(weigh: Callable[[Tensor, Tensor, int], float]) -> Callable[..., list[Tensor]]:
    """`weigh(targets of a part, all targets, parts)`: what a part's summed nats are multiplied by."""

    def answer(logits: Tensor, targets: Tensor, micro_batch: int) -> list[Tensor]:
        parts = _parts(logits, targets, micro_batch)
        return [_nats(z, t) * weigh(t, targets, len(parts)) for z, t in parts]

    return answer


part_losses = Exercise(
    name="part_losses",
    reference=_reference_part_losses,
    cases=[
        Case("two full rows, one at a time", _part_inputs(2, 5, 1, (5, 5))),
        Case("five rows, two at a time", _part_inputs(5, 4, 2, (4, 1, 3, 2, 4))),
        Case("a full row and a nearly empty one", _part_inputs(2, 6, 1, (6, 1))),
        Case("a micro-batch that is all padding", _part_inputs(3, 4, 1, (4, 0, 2))),
        Case("everything at once", _part_inputs(3, 4, 3, (4, 2, 1))),
    ],
    mistakes=[
        Mistake(
            _wrong_parts(lambda part, whole, parts: 1 / max(1, _kept(part)) / parts),
            "still a mean of means: a micro-batch with few targets weighs as much as a full one. Divide the sum of each by the "
            "number of targets that count in the *whole* batch",
        ),
        Mistake(
            _wrong_parts(lambda part, whole, parts: 1 / _kept(whole) if _kept(part) else math.nan),
            "a micro-batch that is all padding has the mean of nothing, which is nan, and nan times 0 is nan too: take sums "
            '(reduction="sum") and divide them',
        ),
        Mistake(
            _wrong_parts(lambda part, whole, parts: 1 / max(1, _kept(part))),
            "each part is the mean over itself, and their sum grows with the number of parts: divide by the targets of the *whole* batch",
        ),
        Mistake(
            _wrong_parts(lambda part, whole, parts: 1.0),
            "these are sums: divide by how many targets of the whole batch count, or the gradient grows with the batch",
        ),
        Mistake(
            _wrong_parts(lambda part, whole, parts: 1 / whole.numel()),
            "you divide by all places, the padded ones too: only targets that are not IGNORED count",
        ),
        Mistake(
            _wrong_parts(lambda part, whole, parts: len(part) / len(whole) / max(1, _kept(part))),
            "you weigh the means with the number of *rows*: a row that is mostly padding has less to say. Count targets",
        ),
        Mistake(
            _wrong_parts(lambda part, whole, parts: 1 / _kept(whole) / parts),
            "you divide once too often: the parts are added up, so the number of parts has no say",
        ),
    ],
)
