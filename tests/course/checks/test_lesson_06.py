"""Lesson 06's checks: each right answer accepted, each wrong one refused with its own hint, a blank one only noted."""

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

from dsv3_mini.course.checks import lesson_06 as check
from dsv3_mini.course.checks.framework import Exercise, exercises_of

# ---- right answers, each written in two ways ---------------------------------------------------------------------------


def grouped_in_loops(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    rows, length, heads, width = query.shape
    each = heads // key.shape[2]
    out = torch.zeros(rows, length, heads, value.shape[-1])
    for b in range(rows):
        for h in range(heads):
            for s in range(length):
                scores = key[b, : s + 1, h // each] @ query[b, s, h] / math.sqrt(width)
                out[b, s, h] = scores.softmax(0) @ value[b, : s + 1, h // each]
    return out


def grouped_by_copies(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    each, length = query.shape[2] // key.shape[2], query.shape[1]
    key, value = (torch.stack([x] * each, dim=3).flatten(2, 3) for x in (key, value))
    shut = torch.full((length, length), -math.inf).triu(1)
    scores = einsum("bshq,bthq->bhst", query / query.shape[-1] ** 0.5, key) + shut
    return einsum("bhst,bthv->bshv", scores.softmax(-1), value)


def compress_by_complex(x: Tensor, down: Tensor, weight: Tensor, eps: float, turn: Tensor) -> tuple[Tensor, Tensor]:
    c = weight.numel()
    latent, key = F.linear(x, down[:c]), F.linear(x, down[c:])
    pairs = torch.complex(key[..., 0::2].contiguous(), key[..., 1::2].contiguous()) * turn
    normed = latent * torch.rsqrt(latent.pow(2).mean(-1, keepdim=True) + eps) * weight
    return normed, torch.view_as_real(pairs).flatten(-2)


def compress_in_loops(x: Tensor, down: Tensor, weight: Tensor, eps: float, turn: Tensor) -> tuple[Tensor, Tensor]:
    latents, keys = [], []
    for row in x:
        for s, token in enumerate(row):
            both = down @ token
            latent, key = both[: len(weight)], both[len(weight) :]
            latents.append(latent / math.sqrt(float(latent @ latent) / len(latent) + eps) * weight)
            z = [complex(key[2 * i], key[2 * i + 1]) * complex(turn[s, i]) for i in range(turn.shape[1])]
            keys.append(torch.tensor([part for number in z for part in (number.real, number.imag)]))
    return torch.stack(latents).view(*x.shape[:2], -1), torch.stack(keys).view(*x.shape[:2], -1)


def expand_by_einsum(latent: Tensor, key_rope: Tensor, up: Tensor, heads: int, nope: int) -> tuple[Tensor, Tensor]:
    by_head = up.unflatten(0, (heads, -1))
    key = einsum("btc,hnc->bthn", latent, by_head[:, :nope])
    value = einsum("btc,hvc->bthv", latent, by_head[:, nope:])
    return torch.cat([key, key_rope.unsqueeze(2).expand(-1, -1, heads, -1)], dim=3), value


def expand_with_views(latent: Tensor, key_rope: Tensor, up: Tensor, heads: int, nope: int) -> tuple[Tensor, Tensor]:
    both = F.linear(latent, up).view(*latent.shape[:2], heads, -1)
    key = both.new_zeros(*both.shape[:3], nope + key_rope.shape[-1])
    key[..., :nope] = both[..., :nope]
    key[..., nope:] = key_rope[:, :, None]
    return key, both[..., nope:]


def cut_by_eigenvectors(up: Tensor, latents: Tensor, rank: int) -> Tensor:
    outputs = latents @ up.mT
    vectors = torch.linalg.eigh(outputs.mT @ outputs).eigenvectors.flip(-1)[:, :rank]
    return vectors @ vectors.mT @ up


def cut_by_least_squares(up: Tensor, latents: Tensor, rank: int) -> Tensor:
    left, sizes, right = torch.linalg.svd((latents @ up.mT).double(), full_matrices=False)
    nearest = (left[:, :rank] * sizes[:rank]) @ right[:rank]
    return torch.linalg.lstsq(latents.double(), nearest).solution.mT.float()


def scores_of_whole_vectors(query_nope: Tensor, query_rope: Tensor, key_nope: Tensor, key_rope: Tensor) -> Tensor:
    heads = [
        torch.cat([query_nope[:, :, h], query_rope[:, :, h]], -1) @ torch.cat([key_nope[:, :, h], key_rope], -1).mT
        for h in range(query_nope.shape[2])
    ]
    return torch.stack(heads, 1) * (query_nope.shape[-1] + query_rope.shape[-1]) ** -0.5


def scores_of_scaled_queries(query_nope: Tensor, query_rope: Tensor, key_nope: Tensor, key_rope: Tensor) -> Tensor:
    root = math.sqrt(query_nope.shape[-1] + query_rope.shape[-1])
    content = einsum("bshn,bthn->bhst", query_nope / root, key_nope)
    return content + einsum("bshr,btr->bhst", query_rope / root, key_rope)


RIGHT: list[tuple[Exercise, Callable[..., Any]]] = [
    (check.grouped_attention, grouped_in_loops),
    (check.grouped_attention, grouped_by_copies),
    (check.compress, compress_by_complex),
    (check.compress, compress_in_loops),
    (check.expand, expand_by_einsum),
    (check.expand, expand_with_views),
    (check.cut_latent, cut_by_eigenvectors),
    (check.cut_latent, cut_by_least_squares),
    (check.scores, scores_of_whole_vectors),
    (check.scores, scores_of_scaled_queries),
]


# ---- wrong answers -----------------------------------------------------------------------------------------------------


def tiled(x: Tensor, heads: int) -> Tensor:
    """Groups in turn: 0 1 0 1 ..."""
    return x.repeat(1, 1, heads // x.shape[2], 1)


def in_runs(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[2], dim=2)


def grouped(
    keys: Callable[[Tensor, int], Tensor] = in_runs,
    values: Callable[[Tensor, int], Tensor] | None = None,
    causal: bool = True,
    scale: Callable[[Tensor, Tensor], float] = lambda query, value: query.shape[-1] ** -0.5,
    dim: int = -1,
) -> Callable[..., Tensor]:
    def answer(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        heads, root = query.shape[2], scale(query, value)
        key, value = keys(key, heads), (values or keys)(value, heads)
        scores = einsum("bshq,bthq->bhst", query, key) * root
        if causal:
            scores = scores + torch.full(scores.shape[-2:], -math.inf).triu(1)
        return einsum("bhst,bthv->bshv", scores.softmax(dim), value)

    return answer


def first_group(x: Tensor, heads: int) -> Tensor:
    return x[:, :, :1].expand(-1, -1, heads, -1)


def mean_group(x: Tensor, heads: int) -> Tensor:
    return x.mean(2, keepdim=True).expand(-1, -1, heads, -1)


def one_question_a_group(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    heads, groups = query.shape[2], key.shape[2]
    return in_runs(grouped()(query.unflatten(2, (groups, -1)).mean(3), key, value), heads)


def shuffled_heads(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    out = grouped()(query, key, value).unflatten(2, (key.shape[2], -1))
    return out.transpose(2, 3).flatten(2, 3)


def halves(key: Tensor, turn: Tensor) -> Tensor:
    first, second = key.chunk(2, -1)
    z = torch.complex(first.contiguous(), second.contiguous()) * turn
    return torch.cat([z.real, z.imag], -1)


def neighbours(key: Tensor, turn: Tensor) -> Tensor:
    z = torch.complex(key[..., 0::2].contiguous(), key[..., 1::2].contiguous()) * turn
    return torch.view_as_real(z).flatten(-2)


def size(x: Tensor, eps: float) -> Tensor:
    return (x.square().mean(-1, keepdim=True) + eps).sqrt()


def compressed(
    latent_of: Callable[[Tensor, Tensor, float], Tensor] = lambda z, w, eps: z / size(z, eps) * w,
    key_of: Callable[[Tensor, Tensor, float], Tensor] = lambda k, turn, eps: neighbours(k, turn),
    key_first: bool = False,
) -> Callable[..., tuple[Tensor, Tensor]]:
    def answer(x: Tensor, down: Tensor, weight: Tensor, eps: float, turn: Tensor) -> tuple[Tensor, Tensor]:
        both, r = x @ down.mT, 2 * turn.shape[-1]
        latent, key = (both[..., r:], both[..., :r]) if key_first else (both[..., :-r], both[..., -r:])
        return latent_of(latent, weight, eps), key_of(key, turn, eps)

    return answer


def normed_together(x: Tensor, down: Tensor, weight: Tensor, eps: float, turn: Tensor) -> tuple[Tensor, Tensor]:
    both = x @ down.mT
    both = both / size(both, eps)
    return both[..., : len(weight)] * weight, neighbours(both[..., len(weight) :], turn)


def size_of_both(x: Tensor, down: Tensor, weight: Tensor, eps: float, turn: Tensor) -> tuple[Tensor, Tensor]:
    both = x @ down.mT
    return (both / size(both, eps))[..., : len(weight)] * weight, neighbours(both[..., len(weight) :], turn)


def keys_then_values(latent: Tensor, key_rope: Tensor, up: Tensor, heads: int, nope: int) -> tuple[Tensor, Tensor]:
    key, value = (latent @ up[: heads * nope].mT), (latent @ up[heads * nope :].mT)
    shared = key_rope.unsqueeze(2).expand(-1, -1, heads, -1)
    return torch.cat([key.unflatten(-1, (heads, -1)), shared], -1), value.unflatten(-1, (heads, -1))


def every_hth_row(latent: Tensor, key_rope: Tensor, up: Tensor, heads: int, nope: int) -> tuple[Tensor, Tensor]:
    return expand_by_einsum(latent, key_rope, up.unflatten(0, (-1, heads)).transpose(0, 1).flatten(0, 1), heads, nope)


def value_first(latent: Tensor, key_rope: Tensor, up: Tensor, heads: int, nope: int) -> tuple[Tensor, Tensor]:
    both = (latent @ up.mT).unflatten(-1, (heads, -1))
    return torch.cat([both[..., -nope:], key_rope[:, :, None].expand(-1, -1, heads, -1)], -1), both[..., :-nope]


def rope_in_front(*inputs: Any) -> tuple[Tensor, Tensor]:
    key, value = expand_by_einsum(*inputs)
    return key.roll(inputs[1].shape[-1], -1), value


def without_rope(*inputs: Any) -> tuple[Tensor, Tensor]:
    key, value = expand_by_einsum(*inputs)
    return key[..., : inputs[-1]], value


def rope_for_the_first(*inputs: Any) -> tuple[Tensor, Tensor]:
    key, value = expand_by_einsum(*inputs)
    key[:, :, 1:, inputs[-1] :] = 0
    return key, value


def cut_along(
    seen: Callable[[Tensor, Tensor], Tensor], smallest: bool = False
) -> Callable[[Tensor, Tensor, int], Tensor]:
    def answer(up: Tensor, latents: Tensor, rank: int) -> Tensor:
        d = torch.linalg.svd(seen(up, latents), full_matrices=False).Vh
        d = d[-rank:] if smallest else d[:rank]
        return d.mT @ d @ up

    return answer


def outputs_of(up: Tensor, latents: Tensor) -> Tensor:
    return latents @ up.mT


def nearest_weights(up: Tensor, latents: Tensor, rank: int) -> Tensor:
    d = torch.linalg.svd(up, full_matrices=False).U[:, :rank]
    return d @ d.mT @ up


def largest_latents(up: Tensor, latents: Tensor, rank: int) -> Tensor:
    d = torch.linalg.svd(latents, full_matrices=False).Vh[:rank]
    return up @ (d.mT @ d)


def first_numbers(up: Tensor, latents: Tensor, rank: int) -> Tensor:
    return up * (torch.arange(up.shape[1]) < rank)


def half_way(up: Tensor, latents: Tensor, rank: int) -> Tensor:
    return torch.linalg.svd(latents @ up.mT, full_matrices=False).Vh[:rank] @ up


def projected_tokens(up: Tensor, latents: Tensor, rank: int) -> Tensor:
    d = torch.linalg.svd(latents @ up.mT, full_matrices=False).Vh[:rank]
    return latents @ up.mT @ d.mT @ d


def parts(weigh: Callable[[Tensor, Tensor, int, int], Tensor]) -> Callable[..., Tensor]:
    def answer(query_nope: Tensor, query_rope: Tensor, key_nope: Tensor, key_rope: Tensor) -> Tensor:
        content = einsum("bshn,bthn->bhst", query_nope, key_nope)
        position = einsum("bshr,btr->bhst", query_rope, key_rope)
        return weigh(content, position, query_nope.shape[-1], query_rope.shape[-1])

    return answer


WRONG: list[tuple[Exercise, Callable[..., Any], str]] = [
    (check.grouped_attention, grouped(tiled), "in turn"),
    (check.grouped_attention, grouped(in_runs, tiled), "values are handed out in another order"),
    (check.grouped_attention, grouped(first_group), "every head reads group 0"),
    (check.grouped_attention, grouped(mean_group), "you average keys and values over the groups"),
    (check.grouped_attention, one_question_a_group, "you average the queries"),
    (check.grouped_attention, shuffled_heads, "stands at another head's place"),
    (check.grouped_attention, grouped(causal=False), "nothing is masked"),
    (check.grouped_attention, grouped(scale=lambda q, v: 1.0), "the scale is missing"),
    (check.grouped_attention, grouped(scale=lambda q, v: v.shape[-1] ** -0.5), "root of the *value's* width"),
    (check.grouped_attention, grouped(dim=-2), "runs over the queries"),
    (check.compress, normed_together, "the norm comes before the split"),
    (check.compress, size_of_both, "the size of all c + r numbers"),
    (check.compress, compressed(key_of=lambda k, turn, eps: neighbours(k / size(k, eps), turn)), "key is normed too"),
    (check.compress, compressed(lambda z, w, eps: z), "the norm is missing"),
    (check.compress, compressed(lambda z, w, eps: z / size(z, eps)), "the norm's weight is missing"),
    (check.compress, compressed(key_of=lambda k, turn, eps: k), "the key is not turned"),
    (check.compress, compressed(key_of=lambda k, turn, eps: neighbours(k, turn.conj())), "the wrong way round"),
    (check.compress, compressed(key_of=lambda k, turn, eps: halves(k, turn)), "pair neighbours"),
    (check.compress, compressed(key_first=True), "you take the key from the front"),
    (check.expand, keys_then_values, "ordered by *head*"),
    (check.expand, every_hth_row, "every h-th row"),
    (check.expand, value_first, "taken the wrong way round"),
    (check.expand, rope_in_front, "stands in front"),
    (check.expand, without_rope, "the rotated key is missing"),
    (check.expand, rope_for_the_first, "only head 0"),
    (check.expand, lambda *inputs: tuple(x.transpose(1, 2) for x in expand_by_einsum(*inputs)), "heads stand before"),
    (check.expand, lambda *inputs: expand_with_views(*inputs)[::-1], "changed places"),
    (check.cut_latent, nearest_weights, "you cut the weights alone"),
    (check.cut_latent, largest_latents, "in which the *latents* are largest"),
    (check.cut_latent, cut_along(outputs_of, smallest=True), "you keep the smallest"),
    (check.cut_latent, cut_along(lambda up, z: outputs_of(up, z - z.mean(0))), "you take the mean off"),
    (check.cut_latent, first_numbers, "need not lie along one of them"),
    (check.cut_latent, lambda up, latents, rank: up.clone(), "this is up itself"),
    (check.cut_latent, half_way, "also goes back to keys and values"),
    (check.cut_latent, projected_tokens, "these are the projected keys and values"),
    (check.scores, parts(lambda x, y, n, r: x / n**0.5 + y / r**0.5), "this is still the bug"),
    (check.scores, parts(lambda x, y, n, r: (x / n**0.5 + y / r**0.5) / 2**0.5), "now the spread is right"),
    (check.scores, parts(lambda x, y, n, r: (x + y) / n**0.5), "the rotated ones count too"),
    (check.scores, parts(lambda x, y, n, r: (x + y) / r**0.5), "divided by sqrt(r)"),
    (check.scores, parts(lambda x, y, n, r: (x + y) / (n**0.5 + r**0.5)), "you add the two roots"),
    (check.scores, parts(lambda x, y, n, r: (x + y) / (n + r)), "it is by its root"),
    (check.scores, parts(lambda x, y, n, r: x + y), "no scale at all"),
    (check.scores, parts(lambda x, y, n, r: x / (n + r) ** 0.5 + y), "only the first part is divided"),
    (check.scores, parts(lambda x, y, n, r: x / (n + r) ** 0.5), "the rotated part is missing"),
]  # fmt: skip


def test_a_scale_by_all_heads_widths_is_told() -> None:
    def all_heads(query_nope: Tensor, *others: Tensor) -> Tensor:
        return scores_of_whole_vectors(query_nope, *others) / query_nope.shape[2] ** 0.5

    assert "each head has a dot product of its own" in "\n".join(check.scores.run(all_heads).lines)


def test_heads_without_the_property_are_caught() -> None:
    """Right on the cases' numbers, and wrong where the property looks: 6 heads in 3 groups."""

    def answer(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (grouped(tiled) if key.shape[2] == 3 and query.shape[2] == 6 else grouped())(query, key, value)

    result = check.grouped_attention.run(answer)
    assert result.state == "wrong" and "heads 2 and 3" in "\n".join(result.lines)


def test_the_lessons_exercises_in_their_order() -> None:
    assert list(exercises_of(check)) == ["grouped_attention", "compress", "expand", "cut_latent", "scores"]
