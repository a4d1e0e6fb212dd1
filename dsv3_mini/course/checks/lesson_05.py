"""Checks of lesson 05: turns, the rotation of pairs, the other layout, decoupled scores, and positions with a cache."""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable
from typing import Any

import torch
from einops import einsum, rearrange
from torch import Tensor

from dsv3_mini.course.checks.framework import Case, Exercise, Mistake, Property

# ---- turns -------------------------------------------------------------------------------------------------------------


def _reference_turns(positions: Tensor, width: int, theta: float) -> Tensor:
    """One complex number at a time, in Python's own arithmetic."""
    pairs = width // 2
    turns = [cmath.exp(1j * p * theta ** (-j / pairs)) for p in positions.flatten().tolist() for j in range(pairs)]
    return torch.tensor(turns, dtype=torch.complex64).view(*positions.shape, pairs)


def _turns_by(frequency: Callable[[Tensor, int, float], Tensor], sign: float = 1.0) -> Callable[..., Tensor]:
    """Turns with frequencies of one's own: `frequency(numbers of the pairs, how many, theta)`."""

    def turns(positions: Tensor, width: int, theta: float) -> Tensor:
        pairs = width // 2
        angles = sign * positions[..., None] * frequency(torch.arange(pairs), pairs, theta)
        return torch.polar(torch.ones_like(angles), angles)

    return turns


def _right_frequency(j: Tensor, pairs: int, theta: float) -> Tensor:
    return theta ** (-j / pairs)


def _angles(positions: Tensor, width: int, theta: float) -> Tensor:
    return positions[..., None] * _right_frequency(torch.arange(width // 2), width // 2, theta)


def _positions(*shape: int, first: int = 0, width: int = 8, theta: float = 10_000.0) -> Callable[..., tuple[Any, ...]]:
    def inputs(random: torch.Generator) -> tuple[Any, ...]:
        count = math.prod(shape)
        return torch.arange(first, first + count).view(shape), width, theta

    return inputs


def _turns_add(answer: Callable[..., Any]) -> bool:
    three, four, seven = (answer(torch.tensor([p]), 6, 50.0) for p in (3, 4, 7))
    return torch.allclose(three * four, seven, atol=1e-4)


turns = Exercise(
    name="turns",
    reference=_reference_turns,
    cases=[
        Case("positions 0 to 4, three pairs, theta 100", _positions(5, width=6, theta=100.0)),
        Case("two rows of positions, theta 10,000", _positions(2, 4, width=8)),
        Case("positions from 90 on", _positions(6, first=90, width=16)),
    ],
    mistakes=[
        Mistake(
            _turns_by(lambda j, pairs, theta: theta ** (-j / (2 * pairs))),
            "your exponent is -j/r: there are r/2 pairs, so it is -j/(r/2), which papers also write -2j/r. Yours slow down "
            "half as fast, and none comes near a wavelength of 2 pi theta",
        ),
        Mistake(
            _turns_by(lambda j, pairs, theta: theta ** (-2 * j / pairs)),
            "your exponent is -2j/(r/2): the 2 is in r/2 already. It is -j/(r/2), or -2j/r",
        ),
        Mistake(
            _turns_by(lambda j, pairs, theta: theta ** (j / pairs)),
            "your pairs turn faster and faster: the exponent is negative, so that pair 0 is the fastest",
        ),
        Mistake(
            _turns_by(_right_frequency, sign=-1.0),
            "your hands turn backwards: it is e to the power of +i p w. (A mirror image of RoPE: scores among your own "
            "vectors come out, those with released weights do not)",
        ),
        Mistake(
            _turns_by(lambda j, pairs, theta: 2 * math.pi * _right_frequency(j, pairs, theta)),
            "you count in whole turns: w is in radians per position, so that pair 0 needs 2 pi positions to come round",
        ),
        Mistake(
            _turns_by(lambda j, pairs, theta: theta ** (-(j + 1) / pairs)),
            "you count the pairs from 1: the first is number 0 and turns by one radian a position",
        ),
        Mistake(
            _turns_by(lambda j, pairs, theta: theta ** (-j / max(pairs - 1, 1))),
            "your slowest pair has the frequency 1/theta itself: the exponents run from 0 in steps of 1/(r/2), and the last "
            "one stays short of 1",
        ),
        Mistake(
            _turns_by(lambda j, pairs, theta: torch.ones(pairs)),
            "all pairs turn alike: each has its own frequency w_j = theta to the power of -j/(r/2)",
        ),
        Mistake(
            lambda positions, width, theta: _reference_turns(
                torch.arange(positions.shape[-1]).expand(positions.shape), width, theta
            ),
            "you count the tokens from 0 instead of asking where they stand: use the positions that are given",
        ),
        Mistake(
            lambda positions, width, theta: _angles(positions, width, theta).cos().to(torch.complex64),
            "this is the cosine alone, the real part: cos + i sin is wanted, as one complex number (torch.polar)",
        ),
        Mistake(
            lambda positions, width, theta: torch.polar(
                _angles(positions, width, theta), torch.ones_like(_angles(positions, width, theta))
            ),
            "torch.polar takes the length first and the angle second; a turn has length 1",
        ),
        Mistake(
            lambda positions, width, theta: _angles(positions, width, theta).to(torch.complex64),
            "these are the angles: the turn is the complex number of length 1 that has the angle, torch.polar(ones, angles)",
        ),
    ],
    properties=[
        Property(
            "a turn by 3 positions and one by 4 are one by 7",
            _turns_add,
            "angles add when turns are multiplied: is the angle of a pair its frequency times the position?",
        )
    ],
    tolerance=5e-5,  # FP32 angles near 90 radians
)


# ---- rotate_pairs ------------------------------------------------------------------------------------------------------


def _reference_rotate(x: Tensor, turn: Tensor) -> Tensor:
    """With cosine and sine: (a cos - b sin, a sin + b cos) for each pair (a, b) of neighbours."""
    cos, sin = turn.real[:, None], turn.imag[:, None]
    first, second = x[..., 0::2], x[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = first * cos - second * sin
    out[..., 1::2] = first * sin + second * cos
    return out


def _joined(first: Tensor, second: Tensor) -> Tensor:
    """Neighbours again: first 0, second 0, first 1, ..."""
    return torch.stack([first, second], dim=-1).flatten(-2)


def _by_parts(combine: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
    """A rotation of neighbours by a formula of one's own: `combine(first, second, cos, sin)`."""

    def rotate(x: Tensor, turn: Tensor) -> Tensor:
        return _joined(*combine(x[..., 0::2], x[..., 1::2], turn.real[:, None], turn.imag[:, None]))

    return rotate


def _halves(x: Tensor, turn: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    turned = torch.complex(first, second) * turn[:, None]
    return torch.cat([turned.real, turned.imag], dim=-1)


def _mixed(x: Tensor, turn: Tensor) -> Tensor:
    """Angles laid out for neighbours, partners taken from the other half."""
    cos, sin = (part[:, None].repeat_interleave(2, dim=-1) for part in (turn.real, turn.imag))
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def _without_head_axis(x: Tensor, turn: Tensor) -> Tensor:
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)


def _overwritten(first: Tensor, second: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    first = first * cos - second * sin
    return first, first * sin + second * cos


def _vectors(b: int, s: int, h: int, r: int) -> Callable[[torch.Generator], tuple[Any, ...]]:
    def inputs(random: torch.Generator) -> tuple[Any, ...]:
        angles = 6 * torch.rand(s, r // 2, generator=random)
        return torch.randn(b, s, h, r, generator=random), torch.polar(torch.ones_like(angles), angles)

    return inputs


def _lengths_stay(answer: Callable[..., Any]) -> bool:
    x, turn = _vectors(2, 3, 2, 6)(torch.Generator().manual_seed(3))
    return torch.allclose(answer(x, turn).norm(dim=-1), x.norm(dim=-1), rtol=1e-4)


def _scores_see_distances(answer: Callable[..., Any]) -> bool:
    query, key = torch.randn(2, 1, 4, 2, 6, generator=torch.Generator().manual_seed(5))
    tables = []
    for first in (0, 11):
        turn = _reference_turns(torch.arange(first, first + 4), 6, 30.0)
        tables.append(einsum(answer(query, turn), answer(key, turn), "b s h r, b t h r -> b h s t"))
    return torch.allclose(*tables, atol=1e-3)


rotate_pairs = Exercise(
    name="rotate_pairs",
    reference=_reference_rotate,
    cases=[
        Case("2 rows of 4 tokens with 4 heads, three pairs", _vectors(2, 4, 4, 6)),
        Case("5 tokens with 2 heads, four pairs", _vectors(1, 5, 2, 8)),
        Case("one pair", _vectors(2, 3, 1, 2)),
    ],
    mistakes=[
        Mistake(
            _halves,
            "you pair dimension j with j + r/2, the half layout: here the pairs are neighbours, (0, 1), (2, 3), and so on, as "
            "in the released weights",
        ),
        Mistake(
            _by_parts(lambda a, b, cos, sin: (a * cos + b * sin, b * cos - a * sin)),
            "your pairs turn backwards: it is (a cos - b sin, a sin + b cos), the product (a + ib)(cos + i sin)",
        ),
        Mistake(
            _without_head_axis,
            "each *head* gets a turn here, and each token should: turn is [s pairs], so it needs an axis for the heads, "
            "turn[:, None]. torch did not complain because there are as many heads as tokens",
        ),
        Mistake(
            lambda x, turn: torch.cat(
                [_reference_rotate(x, turn)[..., 0::2], _reference_rotate(x, turn)[..., 1::2]], -1
            ),
            "the turn is right, and the numbers come back in another order: first numbers of all pairs, then second ones. "
            "Put each pair back to where it stood, side by side",
        ),
        Mistake(
            _mixed,
            "you mix two layouts: your angles are laid out for neighbours, and the partner of a number comes from the other "
            "half. Such a product is no rotation at all",
        ),
        Mistake(
            _by_parts(lambda a, b, cos, sin: (a * cos, b * cos)),
            "the sine is missing: both numbers of a pair shrink by the cosine, and nothing turns",
        ),
        Mistake(
            _by_parts(lambda a, b, cos, sin: (a * cos + b * sin, a * sin + b * cos)),
            "a sign is missing: the first number is a cos - b sin, for i times i is -1",
        ),
        Mistake(
            _by_parts(_overwritten),
            "the second number is made from the first one's new value: both come from the old pair",
        ),
    ],
    properties=[
        Property("lengths stay as they are", _lengths_stay, "a turn changes directions only: cos and sin of one angle"),
        Property(
            "scores see the distance alone",
            _scores_see_distances,
            "with all positions shifted by 11 the scores changed: is each token turned by its own position?",
        ),
    ],
)


# ---- to_halves ---------------------------------------------------------------------------------------------------------


def _reference_to_halves(weight: Tensor, heads: int, rope: int) -> Tensor:
    """Row by row."""
    width = weight.shape[0] // heads
    rows: list[int] = []
    for start in range(0, heads * width, width):
        first = start + width - rope
        rows += [*range(start, first), *range(first, start + width, 2), *range(first + 1, start + width, 2)]
    return weight[rows]


def _reordered(pattern: str, rows: Callable[[int, int], slice]) -> Callable[..., Tensor]:
    """A pattern applied to some rows of every head: `rows(width of a head, rope)`."""

    def reorder(weight: Tensor, heads: int, rope: int) -> Tensor:
        out = weight.clone().unflatten(0, (heads, -1))
        chosen = rows(out.shape[1], rope)
        out[:, chosen] = rearrange(out[:, chosen].clone(), pattern, two=2)
        return out.flatten(0, 1)

    return reorder


def _last(width: int, rope: int) -> slice:
    return slice(width - rope, width)


_SPLIT = "h (pairs two) c -> h (two pairs) c"


def _last_rows_of_all(weight: Tensor, heads: int, rope: int) -> Tensor:
    return torch.cat([weight[:-rope], weight[-rope::2], weight[weight.shape[0] - rope + 1 :: 2]])


def _second_numbers_first(weight: Tensor, heads: int, rope: int) -> Tensor:
    out = _reference_to_halves(weight, heads, rope).unflatten(0, (heads, -1))
    width = out.shape[1]
    return torch.cat([out[:, : width - rope], out[:, width - rope :].roll(rope // 2, dims=1)], dim=1).flatten(0, 1)


def _heads_fastest(weight: Tensor, heads: int, rope: int) -> Tensor:
    rows = rearrange(weight, "(nr h) c -> h nr c", h=heads)
    rows = torch.cat([rows[:, :-rope], rearrange(rows[:, -rope:], _SPLIT, two=2)], dim=1)
    return rearrange(rows, "h nr c -> (nr h) c")


def _projection(heads: int, nope: int, rope: int, c: int) -> Callable[[torch.Generator], tuple[Any, ...]]:
    # rope of at least 6: with 4 dimensions the way there is its own way back.
    return lambda random: (torch.randn(heads * (nope + rope), c, generator=random), heads, rope)


def _scores_stay(answer: Callable[..., Any]) -> bool:
    random = torch.Generator().manual_seed(9)
    heads, rope, c = 2, 6, 5
    turn = _reference_turns(torch.arange(4), rope, 30.0)
    x = torch.randn(1, 4, c, generator=random)
    tables = []
    weights = [torch.randn(heads * rope, c, generator=random) for _ in range(2)]
    for rotate, change in ((_reference_rotate, lambda w: w), (_halves, lambda w: answer(w, heads, rope))):
        query, key = (rotate((x @ change(w).T).unflatten(-1, (heads, rope)), turn) for w in weights)
        tables.append(einsum(query, key, "b s h r, b t h r -> b h s t"))
    return torch.allclose(*tables, atol=1e-4)


to_halves = Exercise(
    name="to_halves",
    reference=_reference_to_halves,
    cases=[
        Case("2 heads with 6 plain and 6 rotated rows", _projection(2, 6, 6, 6)),
        Case("3 heads with 10 plain and 8 rotated rows", _projection(3, 10, 8, 4)),
        Case("one head, all of it rotated", _projection(1, 0, 6, 2)),
    ],
    mistakes=[
        Mistake(
            _reordered("h (two pairs) c -> h (pairs two) c", _last),
            "this is the way back: the old rows are (pairs two), numbers of a pair side by side, and the new ones (two "
            "pairs), all first numbers and then all second ones",
        ),
        Mistake(
            _reordered(_SPLIT, lambda width, rope: slice(0, width)),
            "you order all rows of a head anew: the first ones carry no position and stay; only the last `rope` move",
        ),
        Mistake(
            _reordered(_SPLIT, lambda width, rope: slice(0, rope)),
            "you move the first `rope` rows of each head: the rotated ones are the last",
        ),
        Mistake(
            _last_rows_of_all,
            "you move the last rows of the whole matrix, those of the last head: every head has rotated rows, give the heads "
            "an axis first",
        ),
        Mistake(
            lambda w, heads, rope: rearrange(w, "(pairs two) c -> (two pairs) c", two=2),
            "you order the rows of the whole matrix at once, across the heads: give the heads an axis first, and move only "
            "the last `rope` rows of each",
        ),
        Mistake(
            lambda w, heads, rope: rearrange(w, "o (pairs two) -> o (two pairs)", two=2),
            "you move the columns: those are the input, and a weight is [out, in]",
        ),
        Mistake(
            lambda w, heads, rope: w.clone(),
            "nothing has moved: the rotated rows of each head still stand pair by pair",
        ),
        Mistake(
            _second_numbers_first,
            "the second numbers stand before the first ones: such a pair turns backwards in the other program",
        ),
        Mistake(
            _heads_fastest,
            "you take every h-th row for a head: a head's rows are neighbours, (h nr)",
        ),
    ],
    properties=[
        Property(
            "scores stay the same with the other layout's rotation",
            _scores_stay,
            "queries and keys made with your rows and rotated by halves have other scores than before",
        )
    ],
)


# ---- decoupled_scores --------------------------------------------------------------------------------------------------


def _reference_decoupled(
    query_nope: Tensor, query_rope: Tensor, key_nope: Tensor, key_rope: Tensor, turn: Tensor
) -> Tensor:
    """Whole queries and keys, [nope ; rope], and one product."""
    query = torch.cat([query_nope, _reference_rotate(query_rope, turn)], dim=-1).transpose(1, 2)
    shared = _reference_rotate(key_rope[:, :, None], turn).expand(-1, -1, query_nope.shape[2], -1)
    key = torch.cat([key_nope, shared], dim=-1).transpose(1, 2)
    return query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])


def _scores_with(
    content_scale: Callable[[int, int], float] = lambda n, r: (n + r) ** -0.5,
    position_scale: Callable[[int, int], float] = lambda n, r: (n + r) ** -0.5,
    query_turn: Callable[[Tensor], Tensor] = lambda turn: turn,
    key_turn: Callable[[Tensor], Tensor] = lambda turn: turn,
    nope_turn: Callable[[Tensor], Tensor] = torch.ones_like,
) -> Callable[..., Tensor]:
    def scores(query_nope: Tensor, query_rope: Tensor, key_nope: Tensor, key_rope: Tensor, turn: Tensor) -> Tensor:
        n, r = query_nope.shape[-1], query_rope.shape[-1]
        if n == r:
            query_nope, key_nope = (_reference_rotate(x, nope_turn(turn)) for x in (query_nope, key_nope))
        query_rope = _reference_rotate(query_rope, query_turn(turn))
        key_rope = _reference_rotate(key_rope[:, :, None], key_turn(turn))[:, :, 0]
        content = einsum(query_nope, key_nope, "b s h n, b t h n -> b h s t")
        position = einsum(query_rope, key_rope, "b s h r, b t r -> b h s t")
        return content_scale(n, r) * content + position_scale(n, r) * position

    return scores


def _unturned(turn: Tensor) -> Tensor:
    return torch.ones_like(turn)


def _both(scale: Callable[[int, int], float]) -> Callable[..., Tensor]:
    return _scores_with(content_scale=scale, position_scale=scale)


def _decoupled_inputs(b: int, s: int, h: int, n: int, r: int) -> Callable[[torch.Generator], tuple[Any, ...]]:
    def inputs(random: torch.Generator) -> tuple[Any, ...]:
        shapes = ((b, s, h, n), (b, s, h, r), (b, s, h, n), (b, s, r))
        parts = (torch.randn(shape, generator=random) for shape in shapes)
        return (*parts, _reference_turns(torch.arange(2, s + 2), r, 100.0))

    return inputs


def _shift_changes_nothing(answer: Callable[..., Any]) -> bool:
    *parts, turn = _decoupled_inputs(1, 4, 2, 6, 4)(torch.Generator().manual_seed(4))
    further = turn * _reference_turns(torch.tensor([50]), 4, 100.0)
    return torch.allclose(answer(*parts, turn), answer(*parts, further), atol=1e-3)


decoupled_scores = Exercise(
    name="decoupled_scores",
    reference=_reference_decoupled,
    cases=[
        Case("4 tokens, 2 heads, both parts 6 wide", _decoupled_inputs(1, 4, 2, 6, 6)),
        Case("2 rows of 5 tokens, 3 heads, parts of 6 and 4", _decoupled_inputs(2, 5, 3, 6, 4)),
        Case("one head, parts of 4 and 8", _decoupled_inputs(2, 3, 1, 4, 8)),
    ],
    mistakes=[
        Mistake(
            _scores_with(query_turn=_unturned),
            "only the keys are turned: their scores then tell where the key stands, and not how far it is from the query. "
            "The queries' rope part is turned too",
        ),
        Mistake(
            _scores_with(key_turn=_unturned),
            "only the queries are turned: turn the shared key as well, then their angles subtract to the distance",
        ),
        Mistake(
            _scores_with(query_turn=_unturned, key_turn=_unturned),
            "nothing is turned, so no score depends on where the tokens stand: rotate both rope parts first",
        ),
        *[
            Mistake(
                wrong,
                "your scale is made from the width of one part: both sums together are one dot product of n + r numbers, with "
                "one scale, 1/sqrt(n + r)",
            )
            for wrong in (
                _scores_with(content_scale=lambda n, r: n**-0.5, position_scale=lambda n, r: r**-0.5),
                _both(lambda n, r: n**-0.5),
                _both(lambda n, r: r**-0.5),
            )
        ],
        Mistake(_both(lambda n, r: 1.0), "the scale is missing: divide the sum of both parts by sqrt(n + r)"),
        Mistake(_both(lambda n, r: 1 / (n + r)), "you divide by n + r: it is by its root"),
        Mistake(
            _scores_with(nope_turn=lambda turn: turn),
            "the part without position is turned as well: then no matrix can be folded into the query any more, which is what "
            "the two parts are for",
        ),
        Mistake(
            _scores_with(key_turn=torch.conj_physical),
            "the keys turn backwards: the product already takes the difference of the two angles, so both are turned forwards "
            "(yours sees s + t)",
        ),
        Mistake(
            _scores_with(position_scale=lambda n, r: 0.0),
            "the rope part is missing: a score is the sum of both products",
        ),
        Mistake(
            _scores_with(content_scale=lambda n, r: 0.0),
            "the part without position is missing: a score is the sum of both products",
        ),
    ],
    properties=[
        Property(
            "the same scores with every token 50 places further",
            _shift_changes_nothing,
            "scores are to see distances alone: is anything turned on one side only?",
        )
    ],
)


# ---- read_on (find the bug) --------------------------------------------------------------------------------------------


def _rope(x: Tensor, first: int | Tensor, w: Tensor) -> Tensor:
    """x [b s r], its tokens at the positions first, first + 1, ... (or at those of a tensor [s])."""
    positions = first + torch.arange(x.shape[1]) if isinstance(first, int) else first
    angles = positions[:, None] * w
    return _reference_rotate(x[:, :, None], torch.polar(torch.ones_like(angles), angles))[:, :, 0]


def _reference_read_on(kept: Tensor, query: Tensor, key: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Token by token."""
    keys, rows = kept, []
    for s in range(query.shape[1]):
        place = kept.shape[1] + s
        keys = torch.cat([keys, _rope(key[:, s : s + 1], place, w)], dim=1)
        rows.append(_rope(query[:, s : s + 1], place, w))
    return torch.cat(rows, dim=1) @ keys.transpose(-1, -2), keys


def _read_from(
    query_at: Callable[[int, int], int | Tensor], key_at: Callable[[int, int], int | Tensor]
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Reading on with positions of one's own: `query_at(tokens kept, tokens new)` is where the first one stands."""

    def read(kept: Tensor, query: Tensor, key: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        t, s = kept.shape[1], key.shape[1]
        keys = torch.cat([kept, _rope(key, key_at(t, s), w)], dim=1)
        return einsum(_rope(query, query_at(t, s), w), keys, "b s r, b t r -> b s t"), keys

    return read


def _all_turned_again(kept: Tensor, query: Tensor, key: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    keys = _rope(torch.cat([kept, key], dim=1), 0, w)
    return einsum(_rope(query, kept.shape[1], w), keys, "b s r, b t r -> b s t"), keys


def _kept_unturned(kept: Tensor, query: Tensor, key: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    keys = torch.cat([kept, key], dim=1)
    return einsum(_rope(query, kept.shape[1], w), keys, "b s r, b t r -> b s t"), keys


def _next_tokens(b: int, t: int, s: int, r: int) -> Callable[[torch.Generator], tuple[Any, ...]]:
    def inputs(random: torch.Generator) -> tuple[Any, ...]:
        w = 50.0 ** (-torch.arange(r // 2) / (r // 2))
        kept, query, key = (torch.randn(b, length, r, generator=random) for length in (t, s, s))
        return _rope(kept, 0, w), query, key, w

    return inputs


def _all_at_once_is_one_by_one(answer: Callable[..., Any]) -> bool:
    _, query, key, w = _next_tokens(1, 0, 6, 8)(torch.Generator().manual_seed(6))
    whole, _ = answer(torch.zeros(1, 0, 8), query, key, w)
    keys, rows = torch.zeros(1, 0, 8), []
    for s in range(6):
        scores, keys = answer(keys, query[:, s : s + 1], key[:, s : s + 1], w)
        rows.append(torch.allclose(scores[0, 0], whole[0, s, : s + 1], atol=1e-4))
    return all(rows)


read_on = Exercise(
    name="read_on",
    reference=_reference_read_on,
    cases=[
        Case("an empty cache and 3 tokens", _next_tokens(1, 0, 3, 6)),
        Case("5 tokens kept and 1 new", _next_tokens(2, 5, 1, 6)),
        Case("4 tokens kept and 3 new", _next_tokens(2, 4, 3, 8)),
    ],
    mistakes=[
        Mistake(
            _read_from(lambda t, s: 0, lambda t, s: 0),
            "this is still the bug: the new tokens are counted from 0, as if the cache were empty. The first of them stands "
            "where the kept ones end",
        ),
        Mistake(
            _read_from(lambda t, s: t, lambda t, s: 0),
            "the queries stand right, the new keys are still counted from 0: both of a token stand at its position",
        ),
        Mistake(
            _read_from(lambda t, s: 0, lambda t, s: t),
            "the new keys stand right, the queries are still counted from 0: both of a token stand at its position",
        ),
        Mistake(
            _read_from(lambda t, s: t + 1, lambda t, s: t + 1),
            "all new tokens stand one place too far: the kept ones have the positions 0 to t - 1, so the next is t",
        ),
        Mistake(
            _read_from(
                lambda t, s: torch.full((s,), t + s - 1),
                lambda t, s: torch.full((s,), t + s - 1),
            ),
            "all new tokens stand at the position of the last one: each has its own",
        ),
        Mistake(
            _read_from(lambda t, s: torch.full((s,), t), lambda t, s: torch.full((s,), t)),
            "all new tokens stand at one position: each has its own, t, t + 1, and so on",
        ),
        Mistake(
            _all_turned_again,
            "the kept keys are turned a second time: they were turned when they came, and stay as they are",
        ),
        Mistake(
            _kept_unturned,
            "the new keys go into the cache without their turn: a key is turned once, by its own position, and then kept",
        ),
    ],
    properties=[
        Property(
            "one by one gives what all at once gives",
            _all_at_once_is_one_by_one,
            "read a text in one piece, or token by token with what was kept: the scores must be the same",
        )
    ],
)
