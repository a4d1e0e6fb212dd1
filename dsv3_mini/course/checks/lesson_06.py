"""Checks of lesson 06: heads that share keys, the latent and its rotated key, keys and values rebuilt, a latent cut, one scale."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, reduce, repeat
from torch import Generator, Tensor

from dsv3_mini.course.checks.framework import Case, Exercise, Mistake, Property
from dsv3_mini.model.rope import rotate

# ---- grouped_attention -------------------------------------------------------------------------------------------------


def _grouped_inputs(b: int, s: int, h: int, g: int, q: int, v: int) -> Callable[[Generator], tuple[Any, ...]]:
    def inputs(random: Generator) -> tuple[Any, ...]:
        query = 1.5 * torch.randn(b, s, h, q, generator=random)
        key, value = (torch.randn(b, s, g, width, generator=random) for width in (q, v))
        return query, key, value

    return inputs


def _reference_grouped(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    members = query.shape[2] // key.shape[2]
    key, value = (x.repeat_interleave(members, dim=2) for x in (key, value))
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)


def _handed_out(x: Tensor, pattern: str, heads: int) -> Tensor:
    """Keys or values [b t g x] for every head, in an order of one's own."""
    return repeat(x, f"b t g x -> b t ({pattern}) x", m=heads // x.shape[2])


def _heads_apart(
    query: Tensor, key: Tensor, value: Tensor, causal: bool = True, scale: float | None = None, dim: int = -1
) -> Tensor:
    scores = einsum(query, key, "b s h q, b t h q -> b h s t")
    scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    return einsum(scores.softmax(dim), value, "b h s t, b t h v -> b s h v")


def _shared(query: Tensor, key: Tensor, value: Tensor, **how: Any) -> Tensor:
    heads = query.shape[2]
    return _heads_apart(query, _handed_out(key, "g m", heads), _handed_out(value, "g m", heads), **how)


def _in_turn(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    heads = query.shape[2]
    return _heads_apart(query, _handed_out(key, "m g", heads), _handed_out(value, "m g", heads))


def _values_in_turn(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    heads = query.shape[2]
    return _heads_apart(query, _handed_out(key, "g m", heads), _handed_out(value, "m g", heads))


def _one_for_all(pick: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda query, key, value: _shared(query, pick(key), pick(value))


def _heads_mixed_up(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return rearrange(_shared(query, key, value), "b s (g m) v -> b s (m g) v", g=key.shape[2])


def _heads_of_a_group_averaged(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    groups = key.shape[2]
    mean = reduce(query, "b s (g m) q -> b s g q", "mean", g=groups)
    return _handed_out(_heads_apart(mean, key, value), "g m", query.shape[2])


def _a_head_reads_its_own_group_only(answer: Callable[..., Any]) -> bool:
    random = Generator().manual_seed(11)
    query, key, value = torch.randn(1, 4, 6, 3, generator=random), *torch.randn(2, 1, 4, 3, 3, generator=random)
    before = answer(query, key, value)
    key, value = key.clone(), value.clone()
    key[:, :, 1], value[:, :, 1] = 0.5, 7.0
    moved = (answer(query, key, value) - before).abs().amax((0, 1, 3)) > 1e-4
    return moved.tolist() == [False, False, True, True, False, False]


grouped_attention = Exercise(
    name="grouped_attention",
    reference=_reference_grouped,
    cases=[
        Case("6 heads in 2 groups", _grouped_inputs(2, 5, 6, 2, 4, 3)),
        Case("4 heads, one key and value for all (MQA)", _grouped_inputs(2, 4, 4, 1, 4, 6)),
        Case("3 heads, each with its own (MHA)", _grouped_inputs(1, 6, 3, 3, 5, 4)),
        Case("8 heads in 4 groups", _grouped_inputs(1, 7, 8, 4, 2, 2)),
    ],
    mistakes=[
        Mistake(
            _in_turn,
            "your heads take the groups in turn: head i reads group i modulo g. A group serves a run of neighbouring heads, so "
            "the parentheses say (g m), with the member on the right, not (m g)",
        ),
        Mistake(
            _values_in_turn,
            "keys are shared as they should be, and values are handed out in another order: head i must read key and value of "
            "the same group, (g m) for both",
        ),
        Mistake(
            _one_for_all(lambda x: x[:, :, :1]),
            "every head reads group 0: that is multi-query attention. Head i reads group i // (h / g)",
        ),
        Mistake(
            _one_for_all(lambda x: x.mean(2, keepdim=True)),
            "you average keys and values over the groups: each head reads those of its own group, as they are",
        ),
        Mistake(
            _heads_of_a_group_averaged,
            "you average the queries of a group: only keys and values are shared, each head still asks for itself",
        ),
        Mistake(
            _heads_mixed_up,
            "each head's output is right and stands at another head's place: put the heads together as you took them apart, "
            "(g m) both times",
        ),
        Mistake(
            lambda q, k, v: _shared(q, k, v, causal=False),
            "nothing is masked: a token sees the tokens after it. Keys with t > s get -inf before the softmax, as in lesson 04",
        ),
        Mistake(
            lambda q, k, v: _shared(q, k, v, scale=1.0),
            "the scale is missing: scores are divided by the root of the width of a query",
        ),
        Mistake(
            lambda q, k, v: _shared(q, k, v, scale=v.shape[-1] ** -0.5),
            "you divide by the root of the *value's* width: the dot product runs over a query and a key, so their width counts",
        ),
        Mistake(
            lambda q, k, v: _shared(q, k, v, dim=-2),
            "the softmax runs over the queries (s): each query's weights over the keys (t) are to sum to 1",
        ),
    ],
    properties=[
        Property(
            "changing one group's key and value changes its heads and no others",
            _a_head_reads_its_own_group_only,
            "with 6 heads in 3 groups, the second group belongs to heads 2 and 3 (counted from 0), and to no other head",
        )
    ],
)


# ---- compress ----------------------------------------------------------------------------------------------------------


def _compress_inputs(b: int, s: int, d: int, c: int, r: int, eps: float) -> Callable[[Generator], tuple[Any, ...]]:
    def inputs(random: Generator) -> tuple[Any, ...]:
        x, down = torch.randn(b, s, d, generator=random), torch.randn(c + r, d, generator=random) / d**0.5
        angles = torch.outer(torch.arange(3, 3 + s).float(), 0.3 + torch.rand(r // 2, generator=random))
        return x, down, 0.5 + torch.rand(c, generator=random), eps, torch.polar(torch.ones_like(angles), angles)

    return inputs


def _turned(x: Tensor, turn: Tensor) -> Tensor:
    """Rotation by sine and cosine, neighbours in pairs."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * turn.real - odd * turn.imag, even * turn.imag + odd * turn.real], dim=-1).flatten(-2)


def _turned_in_halves(x: Tensor, turn: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * turn.real - second * turn.imag, first * turn.imag + second * turn.real], dim=-1)


def _normed(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def _reference_compress(x: Tensor, down: Tensor, weight: Tensor, eps: float, turn: Tensor) -> tuple[Tensor, Tensor]:
    c = len(weight)
    return _normed(x @ down[:c].T, weight, eps), _turned(x @ down[c:].T, turn)


def _compress(
    norm: Callable[..., Tensor] = _normed,
    turned: Callable[[Tensor, Tensor], Tensor] = rotate,
    rope_norm: bool = False,
    rope_first: bool = False,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """The right steps, one of them done another way."""

    def compress(x: Tensor, down: Tensor, weight: Tensor, eps: float, turn: Tensor) -> tuple[Tensor, Tensor]:
        c, both = len(weight), x @ down.T
        latent, rope = (both[..., -c:], both[..., :-c]) if rope_first else (both[..., :c], both[..., c:])
        return norm(latent, weight, eps), turned(_normed(rope, None, eps) if rope_norm else rope, turn)

    return compress


def _norm_before_the_split(x: Tensor, down: Tensor, weight: Tensor, eps: float, turn: Tensor) -> tuple[Tensor, Tensor]:
    c, both = len(weight), x @ down.T
    both = both * torch.rsqrt(both.square().mean(-1, keepdim=True) + eps)
    return both[..., :c] * weight, rotate(both[..., c:], turn)


def _norm_of_both_for_the_latent(
    x: Tensor, down: Tensor, weight: Tensor, eps: float, turn: Tensor
) -> tuple[Tensor, Tensor]:
    c, both = len(weight), x @ down.T
    size = torch.rsqrt(both.square().mean(-1, keepdim=True) + eps)
    return both[..., :c] * size * weight, rotate(both[..., c:], turn)


def _latent_forgets_how_large_the_token_was(answer: Callable[..., Any]) -> bool:
    inputs = _compress_inputs(1, 3, 5, 4, 2, 1e-12)(Generator().manual_seed(5))
    (latent, rope), (same, larger) = answer(*inputs), answer(100 * inputs[0], *inputs[1:])
    return torch.allclose(latent, same, rtol=1e-3, atol=1e-5) and torch.allclose(
        100 * rope, larger, rtol=1e-3, atol=1e-4
    )


compress = Exercise(
    name="compress",
    reference=_reference_compress,
    cases=[
        Case("latents of 6 and rope keys of 4", _compress_inputs(2, 5, 8, 6, 4, 1e-6)),
        Case("one token, a latent of 4", _compress_inputs(1, 1, 7, 4, 2, 1e-6)),
        Case("an eps so large that it counts", _compress_inputs(2, 4, 6, 6, 2, 0.5)),
    ],
    mistakes=[
        Mistake(
            _norm_before_the_split,
            "the norm comes before the split, so the rotated key is normed with the latent: split first. Only the c numbers of "
            "the latent are normed, the r of the key are not",
        ),
        Mistake(
            _norm_of_both_for_the_latent,
            "the latent is divided by the size of all c + r numbers: its own c alone make the mean of the squares",
        ),
        Mistake(
            _compress(rope_norm=True),
            "the rotated key is normed too: it goes into the cache as large as it is, only turned",
        ),
        Mistake(
            _compress(norm=lambda latent, weight, eps: latent),
            "the norm is missing: what is cached is the latent after its RMSNorm",
        ),
        Mistake(
            _compress(norm=lambda latent, weight, eps: _normed(latent, None, eps)),
            "the norm's weight is missing: after the division every number of the latent is multiplied by its own weight",
        ),
        Mistake(
            _compress(turned=lambda rope, turn: rope),
            "the key is not turned: its positions would all be the same. rotate(key, turn)",
        ),
        Mistake(
            _compress(turned=lambda rope, turn: _turned(rope, turn.conj())),
            "the key turns the wrong way round: multiply by turn, not by its conjugate",
        ),
        Mistake(
            _compress(turned=_turned_in_halves),
            "you pair number i with number i + r/2: the released weights pair neighbours, as `rotate` does (lesson 05)",
        ),
        Mistake(
            _compress(rope_first=True),
            "you take the key from the front: the first c rows of down make the latent, the last r the key",
        ),
    ],
    properties=[
        Property(
            "a token a hundred times as large has the same latent, and a rotated key a hundred times as large",
            _latent_forgets_how_large_the_token_was,
            "the norm takes the size out of the latent, and nothing takes it out of the key",
        )
    ],
)


# ---- expand ------------------------------------------------------------------------------------------------------------


def _expand_inputs(b: int, t: int, h: int, c: int, n: int, r: int, v: int) -> Callable[[Generator], tuple[Any, ...]]:
    def inputs(random: Generator) -> tuple[Any, ...]:
        latent, key_rope = (torch.randn(b, t, width, generator=random) for width in (c, r))
        return latent, key_rope, torch.randn(h * (n + v), c, generator=random), h, n

    return inputs


def _reference_expand(latent: Tensor, key_rope: Tensor, up: Tensor, heads: int, nope: int) -> tuple[Tensor, Tensor]:
    """Head by head."""
    rows = len(up) // heads
    keys, values = [], []
    for head in range(heads):
        own = up[head * rows : (head + 1) * rows]
        keys.append(torch.cat([latent @ own[:nope].T, key_rope], dim=-1))
        values.append(latent @ own[nope:].T)
    return torch.stack(keys, dim=2), torch.stack(values, dim=2)


def _expand(
    pattern: str = "b t (h nv) -> b t h nv",
    parts: Callable[[Tensor, int], tuple[Tensor, Tensor]] = lambda both, nope: (both[..., :nope], both[..., nope:]),
    join: Callable[[Tensor, Tensor], Tensor] = lambda key, rope: torch.cat([key, rope], dim=-1),
) -> Callable[..., tuple[Tensor, Tensor]]:
    def expand(latent: Tensor, key_rope: Tensor, up: Tensor, heads: int, nope: int) -> tuple[Tensor, Tensor]:
        key, value = parts(rearrange(latent @ up.T, pattern, h=heads), nope)
        return join(key, repeat(key_rope, "b t r -> b t h r", h=heads)), value

    return expand


def _all_keys_first(latent: Tensor, key_rope: Tensor, up: Tensor, heads: int, nope: int) -> tuple[Tensor, Tensor]:
    both = latent @ up.T
    key, value = (rearrange(x, "b t (h x) -> b t h x", h=heads) for x in both.tensor_split([heads * nope], dim=-1))
    return torch.cat([key, repeat(key_rope, "b t r -> b t h r", h=heads)], dim=-1), value


def _value_rows_first(both: Tensor, nope: int) -> tuple[Tensor, Tensor]:
    return both[..., both.shape[-1] - nope :], both[..., : both.shape[-1] - nope]


def _rope_for_one_head(key: Tensor, rope: Tensor) -> Tensor:
    rope = rope.clone()
    rope[:, :, 1:] = 0
    return torch.cat([key, rope], dim=-1)


expand = Exercise(
    name="expand",
    reference=_reference_expand,
    cases=[
        Case("3 heads, n = 4, r = 2, v = 5", _expand_inputs(2, 5, 3, 6, 4, 2, 5)),
        Case("2 heads, n = v", _expand_inputs(1, 4, 2, 3, 4, 2, 4)),
        Case("one head", _expand_inputs(2, 3, 1, 5, 2, 4, 3)),
    ],
    mistakes=[
        Mistake(
            _all_keys_first,
            "you take the first h n rows of up for keys and all the rest for values: its rows are ordered by *head*, and each "
            "head has n rows for its key, then v for its value. Split the heads first",
        ),
        Mistake(
            _expand(pattern="b t (nv h) -> b t h nv"),
            "your parentheses say (nv h): that gives a head every h-th row. A head's n + v rows are neighbours: (h nv)",
        ),
        Mistake(
            _expand(parts=_value_rows_first),
            "each head's rows are taken the wrong way round: the first n make its key, the last v its value",
        ),
        Mistake(
            _expand(join=lambda key, rope: torch.cat([rope, key], dim=-1)),
            "the rotated part stands in front: a key is [from the latent ; rotated], as the query is, or their dot product "
            "pairs the wrong numbers",
        ),
        Mistake(
            _expand(join=lambda key, rope: key),
            "the rotated key is missing: every head appends the same r numbers to its own n",
        ),
        Mistake(
            _expand(join=_rope_for_one_head),
            "only head 0 has the rotated key: all heads share it, so repeat it along h",
        ),
        Mistake(
            lambda *inputs: tuple(rearrange(x, "b t h x -> b h t x") for x in _reference_expand(*inputs)),
            "the heads stand before the tokens: here it is b t h, tokens first",
        ),
        Mistake(
            lambda *inputs: _reference_expand(*inputs)[::-1],
            "keys and values have changed places: return (key, value)",
        ),
    ],
    properties=[
        Property(
            "a latent of zeros leaves the rotated key alone in the key, and nothing in the value",
            lambda answer: _only_the_rope_is_left(
                *answer(torch.zeros(1, 2, 3), torch.ones(1, 2, 2), torch.ones(10, 3), 2, 3)
            ),
            "key and value are products with the latent; the rotated key does not pass through up",
        )
    ],
)


def _only_the_rope_is_left(key: Tensor, value: Tensor) -> bool:
    return not key[..., :3].any() and bool((key[..., 3:] == 1).all()) and not value.any()


# ---- cut_latent --------------------------------------------------------------------------------------------------------


def _cut_inputs(tokens: int, o: int, c: int, rank: int) -> Callable[[Generator], tuple[Any, ...]]:
    """Latents with a mean, and directions of very different size; up stretches them otherwise."""

    def inputs(random: Generator) -> tuple[Any, ...]:
        sizes = torch.tensor([3.0, 0.3, 2.0, 0.5, 1.2, 0.8])[:c]
        latents = torch.randn(tokens, c, generator=random) * sizes + 1.5 * torch.randn(c, generator=random)
        stretched = torch.tensor([0.2, 3.0, 1.0, 2.0, 0.6, 1.4])[:c]
        return torch.randn(o, c, generator=random) * stretched, latents, rank

    return inputs


def _reference_cut(up: Tensor, latents: Tensor, rank: int) -> Tensor:
    """From the eigenvectors of keys' and values' second moments, in FP64."""
    outputs = latents.double() @ up.double().T
    _, vectors = torch.linalg.eigh(outputs.T @ outputs)  # the largest come last
    best = vectors[:, -rank:]
    return (best @ best.T @ up.double()).float()


def _projected(up: Tensor, outputs: Tensor, rank: int, last: bool = False) -> Tensor:
    directions = torch.linalg.svd(outputs, full_matrices=False).Vh
    kept = directions[-rank:] if last else directions[:rank]
    return kept.T @ kept @ up


def _best_of_the_weights(up: Tensor, latents: Tensor, rank: int) -> Tensor:
    left, sizes, right = torch.linalg.svd(up, full_matrices=False)
    return (left[:, :rank] * sizes[:rank]) @ right[:rank]


def _best_for_the_latents(up: Tensor, latents: Tensor, rank: int) -> Tensor:
    kept = torch.linalg.svd(latents, full_matrices=False).Vh[:rank]
    return up @ kept.T @ kept


def _centred(up: Tensor, latents: Tensor, rank: int) -> Tensor:
    outputs = latents @ up.T
    return _projected(up, outputs - outputs.mean(0), rank)


def _first_columns(up: Tensor, latents: Tensor, rank: int) -> Tensor:
    return torch.cat([up[:, :rank], torch.zeros_like(up[:, rank:])], dim=1)


def _no_other_is_better(answer: Callable[..., Any]) -> bool:
    up, latents, rank = _cut_inputs(60, 9, 5, 2)(Generator().manual_seed(3))
    outputs = latents @ up.T
    error = (latents @ answer(up, latents, rank).T - outputs).square().sum()
    least = torch.linalg.svdvals(outputs)[rank:].square().sum()
    return bool(error < 1.001 * least)


cut_latent = Exercise(
    name="cut_latent",
    reference=_reference_cut,
    cases=[
        Case("10 outputs from 6 numbers, cut to 2", _cut_inputs(50, 10, 6, 2)),
        Case("12 outputs from 5 numbers, cut to 3", _cut_inputs(40, 12, 5, 3)),
        Case("nothing cut", _cut_inputs(40, 8, 4, 4)),
    ],
    mistakes=[
        Mistake(
            _best_of_the_weights,
            "you cut the weights alone: that is best if latents point everywhere alike, and they do not. What is to be rebuilt "
            "are the keys and values of *these* tokens, latents @ up.T",
        ),
        Mistake(
            _best_for_the_latents,
            "you keep the directions in which the *latents* are largest: up may shrink those and stretch others. Look at what "
            "comes out, latents @ up.T",
        ),
        Mistake(
            lambda up, latents, rank: _projected(up, latents @ up.T, rank, last=True),
            "you keep the smallest directions: torch gives singular values from the largest down (and eigh gives eigenvalues "
            "from the smallest up)",
        ),
        Mistake(
            _centred,
            "you take the mean off first: then the directions are those of the differences between tokens, and up has no bias "
            "that could bring the mean back",
        ),
        Mistake(
            _first_columns,
            "you keep the first numbers of the latent: a direction need not lie along one of them",
        ),
        Mistake(
            lambda up, latents, rank: up,
            "this is up itself: project it onto the directions that you keep, directions.T @ (directions @ up)",
        ),
        Mistake(
            lambda up, latents, rank: torch.linalg.svd(latents @ up.T, full_matrices=False).Vh[:rank] @ up,
            "this has `rank` rows: it is the matrix that makes the numbers to cache. The one that is asked for also goes back "
            "to keys and values: multiply by directions.T from the left",
        ),
        Mistake(
            lambda up, latents, rank: _projected_outputs(latents @ up.T, rank),
            "these are the projected keys and values: project up itself, so that any token's latent can go through it",
        ),
    ],
    properties=[
        Property(
            "no matrix of that rank rebuilds keys and values better",
            _no_other_is_better,
            "the squared error left is the sum of the squared singular values that were cut, of latents @ up.T",
        )
    ],
    tolerance=1e-4,
)


def _projected_outputs(outputs: Tensor, rank: int) -> Tensor:
    kept = torch.linalg.svd(outputs, full_matrices=False).Vh[:rank]
    return outputs @ kept.T @ kept


# ---- scores (find the bug) ---------------------------------------------------------------------------------------------


def _score_inputs(b: int, s: int, t: int, h: int, n: int, r: int) -> Callable[[Generator], tuple[Any, ...]]:
    def inputs(random: Generator) -> tuple[Any, ...]:
        shapes = ((b, s, h, n), (b, s, h, r), (b, t, h, n), (b, t, r))
        return tuple(torch.randn(shape, generator=random) for shape in shapes)

    return inputs


def _reference_scores(query_nope: Tensor, query_rope: Tensor, key_nope: Tensor, key_rope: Tensor) -> Tensor:
    shared = key_rope[:, :, None].expand(-1, -1, key_nope.shape[2], -1)
    query, key = torch.cat([query_nope, query_rope], dim=-1), torch.cat([key_nope, shared], dim=-1)
    return query.transpose(1, 2) @ key.permute(0, 2, 3, 1) / math.sqrt(query.shape[-1])


def _scores(weigh: Callable[[Tensor, Tensor, int, int, int], Tensor]) -> Callable[..., Tensor]:
    """`weigh(content, position, n, r, h)` puts the two parts together."""

    def scores(query_nope: Tensor, query_rope: Tensor, key_nope: Tensor, key_rope: Tensor) -> Tensor:
        content = einsum(query_nope, key_nope, "b s h n, b t h n -> b h s t")
        position = einsum(query_rope, key_rope, "b s h r, b t r -> b h s t")
        return weigh(content, position, query_nope.shape[-1], query_rope.shape[-1], query_nope.shape[2])

    return scores


def _a_number_may_change_parts(answer: Callable[..., Any]) -> bool:
    """Where all heads have one key anyway, it does not matter which part of it is called what."""
    random = Generator().manual_seed(9)
    query, key = torch.randn(1, 3, 2, 8, generator=random), torch.randn(1, 4, 1, 8, generator=random).expand(1, 4, 2, 8)
    one, other = (answer(query[..., :n], query[..., n:], key[..., :n], key[:, :, 0, n:]) for n in (2, 6))
    return torch.allclose(one, other, atol=1e-5)


scores = Exercise(
    name="scores",
    reference=_reference_scores,
    cases=[
        Case("n = 6, r = 2", _score_inputs(2, 4, 5, 3, 6, 2)),
        Case("n = 4, r = 12", _score_inputs(1, 3, 3, 2, 4, 12)),
    ],
    mistakes=[
        Mistake(
            _scores(lambda content, position, n, r, h: content / n**0.5 + position / r**0.5),
            "this is still the bug: each part has a scale of its own, so the scores spread sqrt(2) times too far and a number "
            "of the narrow part counts more. It is *one* dot product over n + r numbers, with one root",
        ),
        Mistake(
            _scores(lambda content, position, n, r, h: (content / n**0.5 + position / r**0.5) / 2**0.5),
            "now the spread is right, and the weights are not: a number of the narrow part still counts more than one of the "
            "wide part. Add first, then divide once",
        ),
        Mistake(
            _scores(lambda content, position, n, r, h: (content + position) / n**0.5),
            "the sum is divided by sqrt(n): the dot product runs over n + r numbers, the rotated ones count too",
        ),
        Mistake(
            _scores(lambda content, position, n, r, h: (content + position) / r**0.5),
            "the sum is divided by sqrt(r): the dot product runs over n + r numbers",
        ),
        Mistake(
            _scores(lambda content, position, n, r, h: (content + position) / (n**0.5 + r**0.5)),
            "you add the two roots: it is the root of the sum, sqrt(n + r)",
        ),
        Mistake(
            _scores(lambda content, position, n, r, h: (content + position) / (n + r)),
            "you divide by n + r: it is by its root",
        ),
        Mistake(
            _scores(lambda content, position, n, r, h: content + position),
            "no scale at all is left: divide the sum by sqrt(n + r)",
        ),
        Mistake(
            _scores(lambda content, position, n, r, h: content / (n + r) ** 0.5 + position),
            "only the first part is divided: put the sum in parentheses",
        ),
        Mistake(
            _scores(lambda content, position, n, r, h: (content + position) / (h * (n + r)) ** 0.5),
            "you divide by the root of all heads' widths together: each head has a dot product of its own, over n + r numbers",
        ),
        Mistake(
            _scores(lambda content, position, n, r, h: content / (n + r) ** 0.5),
            "the rotated part is missing: its product is added to that of the other part",
        ),
    ],
    properties=[
        Property(
            "it does not matter which numbers of a key are called rotated",
            _a_number_may_change_parts,
            "all n + r numbers of a key weigh alike: cut a query and a key at another place, and the scores stay",
        )
    ],
)
