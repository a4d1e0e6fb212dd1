"""Lesson 01's checks: right answers pass, each wrong one gets its own hint, a blank is a blank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from einops import einsum, rearrange, reduce
from torch import Tensor

from dsv3_mini.course.checks import lesson_01 as check
from dsv3_mini.course.checks.framework import Exercise, exercises_of

# ---- right ------------------------------------------------------------------------------------------------------------


def split_by_loop(x: Tensor, heads: int) -> Tensor:
    width = x.shape[-1] // heads
    return torch.stack([x[:, :, head * width : (head + 1) * width] for head in range(heads)], dim=1)


def split_by_strides(x: Tensor, heads: int) -> Tensor:
    b, s, d = x.shape
    return x.contiguous().as_strided((b, heads, s, d // heads), (s * d, d // heads, d, 1))


def ranks_by_two_maxima(preference: Tensor, n_group: int) -> Tensor:
    grouped = preference.unflatten(-1, (n_group, -1))
    best, at = grouped.max(dim=-1, keepdim=True)
    return (best + grouped.scatter(-1, at, -torch.inf).max(dim=-1, keepdim=True).values).squeeze(-1)


def ranks_by_reduce(preference: Tensor, n_group: int) -> Tensor:
    ordered = rearrange(preference, "b s (g m) -> m b s g", g=n_group).sort(dim=0, descending=True).values
    return reduce(ordered[:2], "two b s g -> b s g", "sum")


def scores_of_one_product(ql: Tensor, qr: Tensor, latent: Tensor, kr: Tensor, scale: float) -> Tensor:
    query, key = torch.cat([ql, qr], dim=-1), torch.cat([latent, kr], dim=-1)
    return torch.einsum("bshx,btx->bhst", query * scale, key)


def scores_by_loop(ql: Tensor, qr: Tensor, latent: Tensor, kr: Tensor, scale: float) -> Tensor:
    b, s, h, _ = ql.shape
    out = torch.zeros(b, h, s, latent.shape[1])
    for i, j, k, t in np.ndindex(b, h, s, latent.shape[1]):
        out[i, j, k, t] = scale * (ql[i, k, j] @ latent[i, t] + qr[i, k, j] @ kr[i, t])
    return out


def combine_by_weights(outputs: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
    weight = torch.zeros(chosen.shape[0], outputs.shape[0]).scatter(1, chosen, gates)
    return (weight.T[:, :, None] * outputs).sum(0)


def combine_by_picking(outputs: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
    return einsum(outputs[chosen, torch.arange(len(chosen))[:, None]], gates, "T k d, T k -> T d")


def keys_and_values_by_view(key_value: Tensor, heads: int, nope: int) -> tuple[Tensor, Tensor]:
    return key_value.unflatten(-1, (heads, -1)).tensor_split([nope], dim=-1)


def keys_and_values_by_index(key_value: Tensor, heads: int, nope: int) -> list[Tensor]:
    column = torch.arange(key_value.shape[-1]).reshape(heads, -1)
    return [key_value[..., column[:, :nope]], key_value[..., column[:, nope:]]]


RIGHT = [
    (check.split_heads, split_by_loop),
    (check.split_heads, split_by_strides),
    (check.group_ranks, ranks_by_two_maxima),
    (check.group_ranks, ranks_by_reduce),
    (check.latent_scores, scores_of_one_product),
    (check.latent_scores, scores_by_loop),
    (check.combine, combine_by_weights),
    (check.combine, combine_by_picking),
    (check.keys_and_values, keys_and_values_by_view),
    (check.keys_and_values, keys_and_values_by_index),
]


@pytest.mark.parametrize(("exercise", "answer"), RIGHT, ids=[answer.__name__ for _, answer in RIGHT])
def test_right_answers_pass(exercise: Exercise, answer: Callable[..., Any]) -> None:
    result = exercise.run(answer)
    assert result.state == "right", result


# ---- wrong ------------------------------------------------------------------------------------------------------------


def by_halves(kv: Tensor, heads: int, nope: int) -> list[Tensor]:
    keys, values = kv[..., : heads * nope], kv[..., heads * nope :]
    return [keys.unflatten(-1, (heads, -1)), values.unflatten(-1, (heads, -1))]


def value_first(kv: Tensor, heads: int, nope: int) -> tuple[Tensor, Tensor]:
    value, key = kv.unflatten(-1, (heads, -1)).split([kv.shape[-1] // heads - nope, nope], dim=-1)
    return key, value


def heads_fastest(kv: Tensor, heads: int, nope: int) -> tuple[Tensor, Tensor]:
    each = kv.unflatten(-1, (-1, heads)).transpose(-1, -2)
    return each[..., :nope], each[..., nope:]


def combine_sorted(y: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
    return combine_by_picking(y, chosen.sort(-1).values, gates)


def two_smallest(p: Tensor, n: int) -> Tensor:
    return p.unflatten(-1, (n, -1)).sort(-1).values[..., :2].sum(-1)


WRONG = [
    (check.split_heads, lambda x, h: x.unflatten(-1, (-1, h)).permute(0, 3, 1, 2), "say (q h)"),
    (check.split_heads, lambda x, h: x.view(x.shape[0], h, x.shape[1], -1), "only moves the brackets"),
    (check.split_heads, lambda x, h: x.unflatten(-1, (h, -1)), "stand behind the sequence"),
    (check.split_heads, lambda x, h: split_by_loop(x, h).transpose(0, 1), "before the batch"),
    (check.split_heads, lambda x, h: split_by_loop(x, h).mT, "last two axes are swapped"),
    (check.group_ranks, lambda p, n: p.unflatten(-1, (n, -1)).sum(-1), "sum all experts"),
    (check.group_ranks, lambda p, n: p.unflatten(-1, (n, -1)).amax(-1), "*two* best"),
    (check.group_ranks, lambda p, n: p.unflatten(-1, (-1, n)).topk(2, dim=-2).values.sum(-2), "say (m g)"),
    (check.group_ranks, lambda p, n: ranks_by_reduce(p, n) / 2, "the mean of the two best"),
    (check.group_ranks, two_smallest, "two smallest"),
    (check.group_ranks, lambda p, n: p.unflatten(-1, (n, -1)).topk(2).values, "one step is missing"),
    (check.group_ranks, lambda p, n: ranks_by_reduce(p.abs(), n), "without the sign"),
    (check.latent_scores, lambda ql, qr, c, kr, scale: scores_by_loop(ql, qr, c, kr, 1.0), "the scale is missing"),
    (check.latent_scores, lambda ql, qr, c, kr, a: scores_by_loop(ql / a, qr, c, kr, a), "the rope part alone"),
    (check.latent_scores, lambda ql, qr, c, kr, a: scores_by_loop(ql, qr / a, c, kr, a), "the latent part alone"),
    (check.latent_scores, lambda *inputs: scores_by_loop(*inputs).mT, "queries and keys are swapped"),
    (check.latent_scores, lambda ql, qr, c, kr, a: scores_by_loop(ql, 0 * qr, c, kr, a), "rope part is missing"),
    (check.latent_scores, lambda ql, qr, c, kr, a: scores_by_loop(0 * ql, qr, c, kr, a), "latent part is missing"),
    (check.latent_scores, lambda *inputs: scores_by_loop(*inputs).sum(1), "sums over the heads"),
    (check.latent_scores, lambda *inputs: scores_by_loop(*inputs).transpose(1, 2), "axes stand in another order"),
    (check.latent_scores, lambda *inputs: scores_by_loop(*inputs).softmax(-1), "one step too far"),
    (check.combine, lambda y, chosen, gates: combine_by_picking(y, chosen, 0 * gates + 1), "gate values are missing"),
    (check.combine, lambda y, chosen, g: combine_by_picking(y, chosen, g / g.sum(-1, True)), "normalised them already"),
    (check.combine, lambda y, chosen, g: einsum(y[: g.shape[1]], g, "k T d, T k -> T d"), "experts 0 to k-1"),
    (check.combine, lambda y, chosen, g: combine_by_picking(y, chosen, g / g.shape[1]), "weighted *sum*"),
    (check.combine, combine_sorted, "its own slot"),
    (check.combine, lambda y, chosen, g: y.sum(0), "chosen or not"),
    (check.combine, lambda y, c, g: y[c, torch.arange(len(c))[:, None]] * g[:, :, None], "the sum over k"),
    (check.keys_and_values, by_halves, "the bug itself"),
    (check.keys_and_values, lambda *inputs: keys_and_values_by_view(*inputs)[::-1], "the keys come first"),
    (check.keys_and_values, value_first, "you take the value first"),
    (check.keys_and_values, heads_fastest, "let the heads run fastest"),
]


@pytest.mark.parametrize(("exercise", "answer", "hint"), WRONG, ids=[f"{e.name}-{hint}" for e, _, hint in WRONG])
def test_each_wrong_answer_gets_its_own_hint(exercise: Exercise, answer: Callable[..., Any], hint: str) -> None:
    result = exercise.run(answer)
    assert result.state == "wrong"
    assert hint in result.lines[-1], result
    assert sum(hint in mistake.hint for mistake in exercise.mistakes) == 1  # no other mistake's words


def test_every_known_mistake_is_tried() -> None:
    for exercise in exercises_of(check).values():
        tried = [hint for other, _, hint in WRONG if other is exercise]
        for mistake in exercise.mistakes:
            assert any(hint in mistake.hint for hint in tried), mistake.hint


def test_numbers_that_change_on_the_way_are_refused() -> None:
    result = check.split_heads.run(lambda x, heads: split_by_loop(x, heads).clamp(max=50.0))
    assert result.state == "wrong"
    assert "only moves numbers" in result.lines[-1]


@pytest.mark.parametrize("exercise", exercises_of(check).values(), ids=lambda exercise: exercise.name)
def test_a_blank_is_a_blank(exercise: Exercise) -> None:
    def blank(*_: Any) -> Tensor:
        raise NotImplementedError

    assert exercise.run(blank).state == "unsolved"


def test_the_lesson_has_four_exercises_and_a_bug() -> None:
    assert list(exercises_of(check)) == ["split_heads", "group_ranks", "latent_scores", "combine", "keys_and_values"]
