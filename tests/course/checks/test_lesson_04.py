"""Lesson 04's checks: each right answer accepted, each wrong one refused with its own hint, a blank one only noted."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from lesson_answers import (  # noqa: F401
    test_blank_is_unsolved_and_every_exercise_knows_mistakes,
    test_right_answers_are_accepted,
    test_wrong_answers_get_their_own_hint,
)
from torch import Tensor, einsum

from dsv3_mini.course.checks import lesson_04 as check
from dsv3_mini.course.checks.framework import Exercise, exercises_of
from dsv3_mini.data.packing import IGNORED

# ---- right answers, each written in two ways ---------------------------------------------------------------------------


def norm_by_power(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.pow(torch.mean(x**2, dim=-1, keepdim=True) + eps, 0.5) * weight


def norm_in_loops(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    rows = [
        [n / math.sqrt(sum(m * m for m in row) / len(row) + eps) * w for n, w in zip(row, weight.tolist(), strict=True)]
        for row in x.reshape(-1, x.shape[-1]).tolist()
    ]
    return torch.tensor(rows).view(x.shape)


def swiglu_by_linear(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def swiglu_by_transposes(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    opening = x @ gate.T
    return ((x @ up.T) * opening / (1 + (-opening).exp())) @ down.transpose(0, 1)


def attention_in_loops(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    rows, length, heads, width = query.shape
    out = torch.zeros(rows, length, heads, value.shape[-1])
    for b in range(rows):
        for h in range(heads):
            for s in range(length):
                scores = torch.stack([query[b, s, h] @ key[b, t, h] for t in range(s + 1)]) / width**0.5
                out[b, s, h] = scores.softmax(0) @ value[b, : s + 1, h]
    return out


def attention_by_matmul(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    q, k, v = (x.permute(0, 2, 1, 3) for x in (query, key, value))
    scores = (q / q.shape[-1] ** 0.5) @ k.mT
    shut = torch.full(scores.shape[-2:], -math.inf).triu(diagonal=1)
    return ((scores + shut).softmax(-1) @ v).permute(0, 2, 1, 3)


def loss_by_logsumexp(logits: Tensor, targets: Tensor) -> Tensor:
    kept = targets.ne(IGNORED)
    right = logits.gather(-1, targets.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return ((logits.logsumexp(-1) - right) * kept).sum() / kept.sum()


def loss_in_loops(logits: Tensor, targets: Tensor) -> Tensor:
    costs = []
    for row, wanted in zip(logits.double().flatten(0, 1).tolist(), targets.flatten().tolist(), strict=True):
        if wanted != IGNORED:
            largest = max(row)
            costs.append(largest + math.log(sum(math.exp(z - largest) for z in row)) - row[wanted])
    return torch.tensor(sum(costs) / len(costs))


def block_in_names(x: Tensor, norm_1: Any, attend: Any, norm_2: Any, feed: Any) -> Tensor:
    seen = attend(norm_1(x))
    with_context = seen + x
    return feed(norm_2(with_context)) + with_context


def block_on_a_copy(x: Tensor, norm_1: Any, attend: Any, norm_2: Any, feed: Any) -> Tensor:
    stream = x.clone()
    for norm, part in ((norm_1, attend), (norm_2, feed)):
        stream += part(norm(stream))
    return stream


RIGHT: list[tuple[Exercise, Callable[..., Tensor]]] = [
    (check.rms_norm, norm_by_power),
    (check.rms_norm, norm_in_loops),
    (check.swiglu, swiglu_by_linear),
    (check.swiglu, swiglu_by_transposes),
    (check.causal_attention, attention_in_loops),
    (check.causal_attention, attention_by_matmul),
    (check.cross_entropy, loss_by_logsumexp),
    (check.cross_entropy, loss_in_loops),
    (check.block, block_in_names),
    (check.block, block_on_a_copy),
]


# ---- wrong answers -----------------------------------------------------------------------------------------------------


def norm_of(
    mean: Callable[[Tensor], Tensor], weight_of: Callable[[Tensor], Tensor] = lambda w: w
) -> Callable[..., Tensor]:
    """x divided by the root of mean(x) + eps, for a mean of one's own."""
    return lambda x, weight, eps: weight_of(weight) * x / torch.sqrt(mean(x) + eps)


def square_mean(x: Tensor) -> Tensor:
    return (x * x).mean(-1, keepdim=True)


def glu(act: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda x, gate, up, down: (act(x @ gate.mT) * (x @ up.mT)) @ down.mT


def attention_with(
    weigh: Callable[[Tensor, Tensor], Tensor], scale: Callable[[int], float] = lambda width: 1 / math.sqrt(width)
) -> Callable[..., Tensor]:
    def answer(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = einsum("bshq,bthq->bhst", query, key) * scale(query.shape[-1])
        length = query.shape[1]
        seen = torch.tril(torch.ones(length, length, dtype=torch.bool))
        return einsum("bhst,bthv->bshv", weigh(scores, seen), value)

    return answer


def shut(scores: Tensor, seen: Tensor) -> Tensor:
    return torch.where(seen, scores, -math.inf)


def loss_of(reduction: str, **options: Any) -> Callable[..., Tensor]:
    return lambda logits, targets: F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction=reduction, **options
    )


def exp_first(logits: Tensor, targets: Tensor) -> Tensor:
    p = torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True)
    kept = targets != IGNORED
    return -torch.log(p[kept].gather(-1, targets[kept][:, None])).mean()


def python_index(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten() % logits.shape[-1])


def rows_first(logits: Tensor, targets: Tensor) -> Tensor:
    costs = [F.cross_entropy(x, t, ignore_index=IGNORED) for x, t in zip(logits, targets, strict=True)]
    return torch.stack(costs).mean()


def over_tokens(logits: Tensor, targets: Tensor) -> Tensor:
    kept = targets != IGNORED
    return F.nll_loss(logits.log_softmax(1)[kept], targets[kept])


def no_logsumexp(logits: Tensor, targets: Tensor) -> Tensor:
    kept = targets != IGNORED
    return F.nll_loss(logits[kept], targets[kept])


def probabilities(logits: Tensor, targets: Tensor) -> Tensor:
    kept = targets != IGNORED
    return F.nll_loss(logits[kept].softmax(-1), targets[kept])


def bug(x: Tensor, norm_1: Any, attend: Any, norm_2: Any, feed: Any) -> Tensor:
    x = norm_1(x)
    x = x + attend(x)
    x = norm_2(x)
    return x + feed(x)


def half_cured(x: Tensor, norm_1: Any, attend: Any, norm_2: Any, feed: Any) -> Tensor:
    x = norm_2(x + attend(norm_1(x)))
    return x + feed(x)


WRONG: list[tuple[Exercise, Callable[..., Tensor], str]] = [
    (check.rms_norm, lambda x, w, eps: F.layer_norm(x, x.shape[-1:], w, eps=eps), "that is LayerNorm"),
    (check.rms_norm, lambda x, w, eps: norm_of(square_mean)(x, w, eps) - w * x.mean(-1, True)
     / torch.sqrt(square_mean(x) + eps), "takes no mean off at all"),
    (check.rms_norm, norm_of(square_mean, torch.ones_like), "the weight is missing"),
    (check.rms_norm, norm_of(lambda x: (x * x).sum(-1, keepdim=True)), "it is the root of their *mean*"),
    (check.rms_norm, lambda x, w, eps: w * x / (square_mean(x) + eps), "without its root"),
    (check.rms_norm, lambda x, w, eps: w * x / (square_mean(x) ** 0.5 + eps), "eps stands outside the root"),
    (check.rms_norm, lambda x, w, eps: w * x / square_mean(x) ** 0.5, "eps is missing"),
    (check.rms_norm, norm_of(lambda x: (x * x).mean(-2, keepdim=True)), "over the tokens"),
    (check.rms_norm, norm_of(lambda x: (x * x).mean()), "one mean over everything"),
    (check.rms_norm, norm_of(square_mean, lambda w: w + 1), "1 + weight"),
    (check.swiglu, lambda x, gate, up, down: swiglu_by_linear(x, up, gate, down), "silu stands on the wrong half"),
    (check.swiglu, glu(torch.sigmoid), "the factor z is missing"),
    (check.swiglu, glu(F.gelu), "GeGLU"),
    (check.swiglu, glu(F.relu), "your gate is a ReLU"),
    (check.swiglu, glu(torch.clone), "only multiplied"),
    (check.swiglu, lambda x, gate, up, down: F.silu(x @ gate.mT) @ down.mT, "up is missing"),
    (check.swiglu, lambda x, gate, up, down: F.silu((x @ up.mT) * (x @ gate.mT)) @ down.mT, "silu comes too late"),
    (check.swiglu, lambda x, gate, up, down: (F.silu(x @ gate.mT) + x @ up.mT) @ down.mT, "a gate multiplies"),
    (check.causal_attention, attention_with(lambda z, seen: z.softmax(-1)), "nothing is masked"),
    (check.causal_attention, attention_with(lambda z, seen: (z * seen).softmax(-1)), "e^0 = 1"),
    (check.causal_attention, attention_with(lambda z, seen: z.softmax(-1) * seen), "the mask comes after the softmax"),
    (check.causal_attention, attention_with(lambda z, seen: shut(z, seen).softmax(-2)), "runs over the queries"),
    (check.causal_attention, attention_with(lambda z, seen: shut(z, seen).softmax(1)), "runs over the heads"),
    (check.causal_attention, attention_with(lambda z, seen: shut(z, seen).softmax(-1), lambda w: 1), "scale is missing"),
    (check.causal_attention, attention_with(lambda z, seen: shut(z, seen).softmax(-1), lambda w: 1 / w), "by its root"),
    (check.causal_attention, attention_with(lambda z, seen: shut(z, seen).softmax(-1), math.sqrt), "you multiply"),
    (check.causal_attention, attention_with(lambda z, seen: shut(z, seen.T).softmax(-1)), "turned around"),
    (check.causal_attention, attention_with(lambda z, seen: shut(z, seen.tril(-1)).softmax(-1)), "does not see itself"),
    (check.causal_attention, attention_with(lambda z, seen: shut(z, seen).softmax(-1).mT), "over the wrong axis"),
    (check.causal_attention, lambda q, k, v: (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v, "heads of one token"),
    (check.cross_entropy, exp_first, "is infinite"),
    (check.cross_entropy, loss_of("sum"), "this is the sum"),
    (check.cross_entropy, lambda z, y: loss_of("none")(z, y).mean(), "padding is counted in the mean"),
    (check.cross_entropy, lambda z, y: loss_of("mean")(z, y) / math.log(2), "in bits"),
    (check.cross_entropy, lambda z, y: -loss_of("mean")(z, y), "sign"),
    (check.cross_entropy, no_logsumexp, "normalisation is missing"),
    (check.cross_entropy, probabilities, "minus the mean probability"),
    (check.cross_entropy, lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten().clamp(0)), "clamped to token 0"),
    (check.cross_entropy, over_tokens, "over the tokens"),
    (check.cross_entropy, rows_first, "average each row"),
    (check.block, bug, "this is still the bug"),
    (check.block, half_cured, "the first half is right"),
    (check.block, lambda x, n1, attend, n2, feed: (y := n1(x + attend(x)), n2(y + feed(y)))[1], "after the addition"),
    (check.block, lambda x, n1, attend, n2, feed: feed(n2(attend(n1(x)))), "nothing is added"),
    (check.block, lambda x, n1, attend, n2, feed: feed(n2(x + attend(n1(x)))), "output replaces the stream"),
    (check.block, lambda x, n1, attend, n2, feed: feed(n2(x)) + x + attend(n1(x)), "as it came in"),
    (check.block, lambda x, n1, attend, n2, feed: (y := x + attend(n1(x))) + feed(n1(y)), "a norm of its own"),
    (check.block, lambda x, n1, attend, n2, feed: (y := x + attend(x)) + feed(y), "the norms are gone"),
]  # fmt: skip


def turned_matrices(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Runs where d = f, so that einsum's or matmul's error does not tell."""
    return (F.silu(x @ gate) * (x @ up)) @ down


def test_matrices_used_the_wrong_way_round_are_told_by_torch_or_by_a_hint() -> None:
    lines = check.swiglu.run(turned_matrices).lines
    assert "RuntimeError" in lines[0] and "x @ gate" in "\n".join(lines)
    only_square = Exercise("swiglu", check.swiglu.reference, check.swiglu.cases[2:], check.swiglu.mistakes)
    assert "[out, in]" in "\n".join(only_square.run(turned_matrices).lines)


def test_a_hundred_is_an_index_from_the_end_only_in_python() -> None:
    """-100 wrapped round to some token is refused, if without a hint of its own; -1's token has one."""
    assert check.cross_entropy.run(python_index).state == "wrong"

    def last(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(
            logits.flatten(0, 1), targets.flatten().masked_fill(targets.flatten() < 0, logits.shape[-1] - 1)
        )

    assert "as if it were a token" in "\n".join(check.cross_entropy.run(last).lines)


def test_the_lessons_exercises_in_their_order() -> None:
    assert list(exercises_of(check)) == ["rms_norm", "swiglu", "causal_attention", "cross_entropy", "block"]


def test_an_answer_that_looks_ahead_by_other_means_is_caught_by_the_property() -> None:
    """Right on every case's numbers, but it centres the values by the mean of the whole row, future included."""

    def centred(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = attention_by_matmul(query, key, value)
        return out + 1e-9 if query.shape[1] != 6 else out + value.mean(1, keepdim=True)

    result = check.causal_attention.run(centred)
    assert result.state == "wrong" and "something from the future" in "\n".join(result.lines)
