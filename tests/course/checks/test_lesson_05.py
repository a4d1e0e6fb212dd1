"""Lesson 05's checks: each right answer accepted, each wrong one refused with its own hint, a blank one only noted."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lesson_answers import (  # noqa: F401
    test_right_answers_are_accepted,
    test_wrong_answers_get_their_own_hint,
)
from torch import Tensor, einsum

from dsv3_mini.course.checks import lesson_05 as check
from dsv3_mini.course.checks.framework import Exercise, exercises_of
from dsv3_mini.model.rope import rotate

# ---- right answers, each written in two ways ---------------------------------------------------------------------------


def turns_by_euler(positions: Tensor, width: int, theta: float) -> Tensor:
    w = 1.0 / theta ** (torch.arange(0, width, 2).float() / width)
    angles = positions.unsqueeze(-1).double() * w
    return torch.complex(angles.cos(), angles.sin()).to(torch.complex64)


def turns_by_exp(positions: Tensor, width: int, theta: float) -> Tensor:
    w = torch.exp(-math.log(theta) * torch.arange(width // 2) / (width // 2))
    return torch.exp(1j * positions[..., None] * w)


def rotate_by_formula(x: Tensor, turn: Tensor) -> Tensor:
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = turn.real.unsqueeze(1), turn.imag.unsqueeze(1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)


def rotate_in_loops(x: Tensor, turn: Tensor) -> Tensor:
    out = x.clone()
    for s in range(x.shape[1]):
        for j in range(turn.shape[1]):
            matrix = torch.tensor([[turn[s, j].real, -turn[s, j].imag], [turn[s, j].imag, turn[s, j].real]])
            out[:, s, :, 2 * j : 2 * j + 2] = x[:, s, :, 2 * j : 2 * j + 2] @ matrix.T
    return out


def halves_by_index(weight: Tensor, heads: int, rope: int) -> Tensor:
    width = weight.shape[0] // heads
    order = [*range(width - rope), *range(width - rope, width, 2), *range(width - rope + 1, width, 2)]
    return weight.view(heads, width, -1)[:, order].reshape(weight.shape)


def halves_in_a_loop(weight: Tensor, heads: int, rope: int) -> Tensor:
    parts = []
    for head in weight.chunk(heads):
        plain, rotated = head[: len(head) - rope], head[len(head) - rope :]
        parts += [plain, rotated[0::2], rotated[1::2]]
    return torch.cat(parts)


def scores_in_one_product(qn: Tensor, qr: Tensor, kn: Tensor, kr: Tensor, turn: Tensor) -> Tensor:
    query = torch.cat([qn, rotate(qr, turn)], dim=-1)
    key = torch.cat([kn, rotate(kr, turn)[:, :, None].expand_as(qr)], dim=-1)
    return einsum("bshq,bthq->bhst", query, key) / query.shape[-1] ** 0.5


def scores_turned_by_the_distance(qn: Tensor, qr: Tensor, kn: Tensor, kr: Tensor, turn: Tensor) -> Tensor:
    """Only the query is turned, for every key by its distance."""
    q, k = (torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) for x in (qr, kr))
    apart = turn[:, None] * turn.conj()[None]
    position = torch.einsum("bshp,stp,btp->bhst", q, apart, k.conj()).real
    return (einsum("bshn,bthn->bhst", qn, kn) + position) * (qn.shape[-1] + qr.shape[-1]) ** -0.5


def roped(x: Tensor, places: Tensor, w: Tensor) -> Tensor:
    return rotate(x, torch.exp(1j * places[:, None] * w))


def read_by_length(kept: Tensor, query: Tensor, key: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    places = torch.arange(kept.size(1) + key.size(1))[-key.size(1) :]
    keys = torch.cat((kept, roped(key, places, w)), 1)
    return roped(query, places, w) @ keys.mT, keys


def read_one_by_one(kept: Tensor, query: Tensor, key: Tensor, w: Tensor) -> list[Tensor]:
    rows = []
    for s in range(key.shape[1]):
        place = torch.tensor([kept.shape[1]])
        kept = torch.cat([kept, roped(key[:, s : s + 1], place, w)], dim=1)
        rows.append((place, s))
    return [torch.cat([roped(query[:, s : s + 1], place, w) @ kept.mT for place, s in rows], dim=1), kept]


RIGHT: list[tuple[Exercise, Callable[..., Any]]] = [
    (check.turns, turns_by_euler),
    (check.turns, turns_by_exp),
    (check.rotate_pairs, rotate_by_formula),
    (check.rotate_pairs, rotate_in_loops),
    (check.to_halves, halves_by_index),
    (check.to_halves, halves_in_a_loop),
    (check.decoupled_scores, scores_in_one_product),
    (check.decoupled_scores, scores_turned_by_the_distance),
    (check.read_on, read_by_length),
    (check.read_on, read_one_by_one),
]


# ---- wrong answers -----------------------------------------------------------------------------------------------------


def turns_of(exponent: Callable[[int, int], float], factor: complex = 1j) -> Callable[..., Tensor]:
    """Turns with an exponent of one's own: `exponent(pair, pairs)`."""

    def answer(positions: Tensor, width: int, theta: float) -> Tensor:
        w = torch.tensor([theta ** exponent(j, width // 2) for j in range(width // 2)])
        return torch.exp(factor * positions[..., None] * w)

    return answer


def rightly(j: int, pairs: int) -> float:
    return -j / pairs


def from_zero(positions: Tensor, width: int, theta: float) -> Tensor:
    return turns_by_exp(torch.arange(positions.shape[-1]).expand_as(positions), width, theta)


def angles_alone(positions: Tensor, width: int, theta: float) -> Tensor:
    return positions[..., None] * theta ** (-torch.arange(width // 2) / (width // 2))


def rotate_llama(x: Tensor, turn: Tensor) -> Tensor:
    cos, sin = (torch.cat([part, part], dim=-1)[:, None] for part in (turn.real, turn.imag))
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


def rotate_two_layouts(x: Tensor, turn: Tensor) -> Tensor:
    cos, sin = (part.repeat_interleave(2, -1)[:, None] for part in (turn.real, turn.imag))
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


def rotate_heads(x: Tensor, turn: Tensor) -> Tensor:
    return torch.view_as_real(torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * turn).flatten(-2)


def rotate_and_part(x: Tensor, turn: Tensor) -> Tensor:
    out = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * turn[:, None]
    return torch.cat([out.real, out.imag], dim=-1)


def rotate_in_place(x: Tensor, turn: Tensor) -> Tensor:
    a, b = x[..., 0::2].clone(), x[..., 1::2].clone()
    a = a * turn.real[:, None] - b * turn.imag[:, None]
    b = a * turn.imag[:, None] + b * turn.real[:, None]
    return torch.stack([a, b], dim=-1).flatten(-2)


def parts(x: Tensor, turn: Tensor, second_sign: float, cross: float = 1.0) -> Tensor:
    a, b = x[..., 0::2], x[..., 1::2]
    cos, sin = turn.real[:, None], cross * turn.imag[:, None]
    return torch.stack([a * cos + second_sign * b * sin, a * sin + b * cos], dim=-1).flatten(-2)


def rows_of(order: Callable[[int, int], list[int]]) -> Callable[..., Tensor]:
    """Each head's rows in an order of one's own: `order(rows of a head, rope)`."""

    def answer(weight: Tensor, heads: int, rope: int) -> Tensor:
        width = weight.shape[0] // heads
        return weight.reshape(heads, width, -1)[:, order(width, rope)].reshape(weight.shape)

    return answer


def there(first: int, end: int) -> list[int]:
    return [*range(first, end, 2), *range(first + 1, end, 2)]


def back(width: int, rope: int) -> list[int]:
    first = width - rope
    return [*range(first), *[first + j // 2 + (j % 2) * rope // 2 for j in range(rope)]]


def last_head_only(weight: Tensor, heads: int, rope: int) -> Tensor:
    return weight[[*range(len(weight) - rope), *there(len(weight) - rope, len(weight))]]


def scores_of(
    scale: Callable[[int, int], tuple[float, float]] = lambda n, r: ((n + r) ** -0.5,) * 2,
    query: Callable[[Tensor], Tensor] = lambda turn: turn,
    key: Callable[[Tensor], Tensor] = lambda turn: turn,
    content: Callable[[Tensor, Tensor], Tensor] = lambda x, turn: x,
) -> Callable[..., Tensor]:
    def answer(qn: Tensor, qr: Tensor, kn: Tensor, kr: Tensor, turn: Tensor) -> Tensor:
        first, second = scale(qn.shape[-1], qr.shape[-1])
        what = einsum("bshn,bthn->bhst", content(qn, turn), content(kn, turn))
        where = einsum("bshr,btr->bhst", rotate(qr, query(turn)), rotate(kr, key(turn)))
        return first * what + second * where

    return answer


def placed(query: Callable[[int, int], Tensor], key: Callable[[int, int], Tensor]) -> Callable[..., Any]:
    def answer(kept: Tensor, q: Tensor, k: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        t, s = kept.shape[1], k.shape[1]
        keys = torch.cat([kept, roped(k, key(t, s), w)], dim=1)
        return roped(q, query(t, s), w) @ keys.mT, keys

    return answer


def on(t: int, s: int) -> Tensor:
    return torch.arange(t, t + s)


def anew(t: int, s: int) -> Tensor:
    return torch.arange(s)


def turned_again(kept: Tensor, q: Tensor, k: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    keys = torch.cat([kept, k], dim=1)
    keys = roped(keys, torch.arange(keys.shape[1]), w)
    return roped(q, on(kept.shape[1], k.shape[1]), w) @ keys.mT, keys


def kept_bare(kept: Tensor, q: Tensor, k: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    keys = torch.cat([kept, k], dim=1)
    return roped(q, on(kept.shape[1], k.shape[1]), w) @ keys.mT, keys


still = torch.ones_like

WRONG: list[tuple[Exercise, Callable[..., Any], str]] = [
    (check.turns, turns_of(lambda j, pairs: -j / (2 * pairs)), "your exponent is -j/r"),
    (check.turns, turns_of(lambda j, pairs: -2 * j / pairs), "the 2 is in r/2 already"),
    (check.turns, turns_of(lambda j, pairs: j / pairs), "faster and faster"),
    (check.turns, turns_of(rightly, factor=-1j), "turn backwards"),
    (check.turns, turns_of(rightly, factor=2j * math.pi), "in whole turns"),
    (check.turns, turns_of(lambda j, pairs: -(j + 1) / pairs), "count the pairs from 1"),
    (check.turns, turns_of(lambda j, pairs: -j / (pairs - 1)), "stays short of 1"),
    (check.turns, turns_of(lambda j, pairs: 0.0), "all pairs turn alike"),
    (check.turns, from_zero, "instead of asking where they stand"),
    (check.turns, lambda p, width, theta: turns_by_exp(p, width, theta).real, "cosine alone"),
    (check.turns, lambda p, width, theta: torch.polar(a := angles_alone(p, width, theta), torch.ones_like(a)), "length first"),
    (check.turns, angles_alone, "these are the angles"),
    (check.rotate_pairs, rotate_llama, "the half layout"),
    (check.rotate_pairs, lambda x, turn: rotate(x, turn.conj()), "turn backwards"),
    (check.rotate_pairs, rotate_heads, "needs an axis for the heads"),
    (check.rotate_pairs, rotate_and_part, "come back in another order"),
    (check.rotate_pairs, rotate_two_layouts, "mix two layouts"),
    (check.rotate_pairs, lambda x, turn: parts(x, turn, -1, cross=0), "the sine is missing"),
    (check.rotate_pairs, lambda x, turn: parts(x, turn, 1), "a sign is missing"),
    (check.rotate_pairs, rotate_in_place, "new value"),
    (check.to_halves, rows_of(back), "the way back"),
    (check.to_halves, rows_of(lambda width, rope: there(0, width)), "all rows of a head"),
    (check.to_halves, rows_of(lambda width, rope: [*there(0, rope), *range(rope, width)]), "rotated ones are the last"),
    (check.to_halves, last_head_only, "those of the last head"),
    (check.to_halves, lambda w, heads, rope: w[there(0, len(w))], "across the heads"),
    (check.to_halves, lambda w, heads, rope: w[:, there(0, w.shape[1])], "columns"),
    (check.to_halves, lambda w, heads, rope: w.clone(), "nothing has moved"),
    (check.to_halves, rows_of(lambda width, rope: [*range(width - rope), *range(width - rope + 1, width, 2),
                                                   *range(width - rope, width, 2)]), "second numbers stand before"),
    (check.decoupled_scores, scores_of(query=still), "only the keys are turned"),
    (check.decoupled_scores, scores_of(key=still), "only the queries are turned"),
    (check.decoupled_scores, scores_of(query=still, key=still), "nothing is turned"),
    (check.decoupled_scores, scores_of(lambda n, r: (n**-0.5, r**-0.5)), "the width of one part"),
    (check.decoupled_scores, scores_of(lambda n, r: (n**-0.5,) * 2), "the width of one part"),
    (check.decoupled_scores, scores_of(lambda n, r: (r**-0.5,) * 2), "the width of one part"),
    (check.decoupled_scores, scores_of(lambda n, r: (1.0, 1.0)), "scale is missing"),
    (check.decoupled_scores, scores_of(lambda n, r: (1 / (n + r),) * 2), "by its root"),
    (check.decoupled_scores, scores_of(content=lambda x, turn: rotate(x, turn)), "without position is turned as well"),
    (check.decoupled_scores, scores_of(key=torch.conj), "the keys turn backwards"),
    (check.decoupled_scores, scores_of(lambda n, r: ((n + r) ** -0.5, 0.0)), "the rope part is missing"),
    (check.decoupled_scores, scores_of(lambda n, r: (0.0, (n + r) ** -0.5)), "the part without position is missing"),
    (check.read_on, placed(anew, anew), "this is still the bug"),
    (check.read_on, placed(on, anew), "the queries stand right"),
    (check.read_on, placed(anew, on), "the new keys stand right"),
    (check.read_on, placed(lambda t, s: on(t + 1, s), lambda t, s: on(t + 1, s)), "one place too far"),
    (check.read_on, placed(lambda t, s: torch.full((s,), t), lambda t, s: torch.full((s,), t)), "at one position"),
    (check.read_on, placed(lambda t, s: torch.full((s,), t + s - 1), lambda t, s: torch.full((s,), t + s - 1)),
     "position of the last one"),
    (check.read_on, turned_again, "turned a second time"),
    (check.read_on, kept_bare, "without their turn"),
]  # fmt: skip


def test_heads_that_run_fastest_are_told() -> None:
    def every_third_row(weight: Tensor, heads: int, rope: int) -> Tensor:
        width = weight.shape[0] // heads
        rows = weight.view(width, heads, -1)
        order = [*range(width - rope), *there(width - rope, width)]
        return rows[order].reshape(weight.shape)

    assert "every h-th row" in "\n".join(check.to_halves.run(every_third_row).lines)


@pytest.mark.parametrize("exercise", exercises_of(check).values(), ids=lambda e: e.name)
def test_blank_is_unsolved_and_every_exercise_knows_mistakes(exercise: Exercise) -> None:
    def blank(*_: Any) -> Tensor:
        raise NotImplementedError

    assert exercise.run(blank).state == "unsolved"
    assert len({mistake.hint for mistake in exercise.mistakes}) >= 3


@pytest.mark.parametrize("exercise", exercises_of(check).values(), ids=lambda e: e.name)
def test_every_known_mistake_is_one_and_meets_its_own_hint(exercise: Exercise) -> None:
    """No hint stands in the shadow of another that gives the same numbers in the case where both fail."""
    for mistake in exercise.mistakes:
        result = exercise.run(mistake.wrong)
        assert result.state == "wrong" and mistake.hint in "\n".join(result.lines), mistake.hint


def test_the_lessons_exercises_in_their_order() -> None:
    assert list(exercises_of(check)) == ["turns", "rotate_pairs", "to_halves", "decoupled_scores", "read_on"]


def test_properties_catch_what_the_cases_do_not() -> None:
    """Each answer is right on the cases' sizes and wrong elsewhere."""

    def shrinks(x: Tensor, turn: Tensor) -> Tensor:
        return rotate_by_formula(x, turn) * (0.5 if x.shape[1] == 3 and x.shape[2] == 2 else 1.0)

    def absolute(qn: Tensor, qr: Tensor, kn: Tensor, kr: Tensor, turn: Tensor) -> Tensor:
        right = scores_in_one_product(qn, qr, kn, kr, turn)
        return right + turn.real.sum() if qn.shape[-1] == 6 and qr.shape[-1] == 4 and qn.shape[0] == 1 else right

    def tired(kept: Tensor, query: Tensor, key: Tensor, w: Tensor) -> Any:
        return read_by_length(kept if kept.shape[1] < 5 or kept.shape[2] == 6 else 2 * kept, query, key, w)

    for exercise, answer, hint in (
        (check.rotate_pairs, shrinks, "directions only"),
        (check.decoupled_scores, absolute, "on one side only"),
        (check.read_on, tired, "in one piece, or token by token"),
    ):
        result = exercise.run(answer)
        assert result.state == "wrong" and hint in "\n".join(result.lines), result
