"""Lesson 07's checks: each right answer accepted, each wrong one refused with its own hint, a blank one only noted."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lesson_answers import (  # noqa: F401
    test_blank_is_unsolved_and_every_exercise_knows_mistakes,
    test_right_answers_are_accepted,
    test_wrong_answers_get_their_own_hint,
)
from torch import Tensor, einsum
from torch.utils.flop_counter import FlopCounterMode

from dsv3_mini.course.checks import lesson_07 as check
from dsv3_mini.course.checks.framework import Exercise, exercises_of

# ---- right answers, each written in two ways ---------------------------------------------------------------------------


def visible_by_positions(seen: int, new: int) -> Tensor:
    return torch.arange(seen + new)[None, :] <= torch.arange(seen, seen + new)[:, None]


def visible_by_parts(seen: int, new: int) -> Tensor:
    return torch.cat([torch.ones(new, seen), torch.tril(torch.ones(new, new))], dim=1) > 0


def write_in_a_loop(read: Any, prompt: Tensor, new_tokens: int) -> Tensor:
    """Reads the last new token too, which is not needed and not wrong."""
    text, newest = [], prompt
    for _ in range(new_tokens):
        newest = read(newest)[:, -1].argmax(dim=-1).unsqueeze(1)
        text.append(newest)
    read(newest)
    return torch.cat(text, dim=-1)


def write_by_stacking(read: Any, prompt: Tensor, new_tokens: int) -> Tensor:
    logits, new = read(prompt), []
    for step in range(new_tokens):
        new.append(torch.max(logits[:, -1], dim=-1).indices)
        if step < new_tokens - 1:
            logits = read(new[-1][:, None])
    return torch.stack(new, dim=1)


def absorbed_in_loops(qn: Tensor, qr: Tensor, c: Tensor, kr: Tensor, uk: Tensor, uv: Tensor, scale: float, mask: Tensor) -> Tensor:  # fmt: skip
    rows, length, heads, _ = qn.shape
    out = torch.zeros(rows, length, heads, uv.shape[1])
    for b in range(rows):
        for s in range(length):
            for h in range(heads):
                scores = scale * (c[b] @ (uk[h].T @ qn[b, s, h]) + kr[b] @ qr[b, s, h])
                share = torch.where(mask[b, s], scores, -math.inf).softmax(0)
                out[b, s, h] = uv[h] @ (share @ c[b])
    return out


def absorbed_as_one_wide_key(qn: Tensor, qr: Tensor, c: Tensor, kr: Tensor, uk: Tensor, uv: Tensor, scale: float, mask: Tensor) -> Tensor:  # fmt: skip
    query = torch.cat([einsum("bshn,hnc->bhsc", qn, uk), qr.transpose(1, 2)], dim=-1)
    key = torch.cat([c, kr], dim=-1)[:, None]
    scores = (query @ key.mT * scale).masked_fill(mask[:, None].logical_not(), float("-inf"))
    return (scores.softmax(-1) @ c[:, None] @ uv.mT).transpose(1, 2)


def flops_by_hand(s: int, t: int, h: int, n: int, r: int, v: int, c: int) -> tuple[int, int]:
    build, fold = 2 * t * h * c * n + 2 * t * h * c * v, 2 * s * h * n * c + 2 * s * h * c * v
    return build + 2 * s * t * h * (n + r) + 2 * s * t * h * v, fold + 2 * s * t * h * (c + r) + 2 * s * t * h * c


def flops_by_torch(s: int, t: int, h: int, n: int, r: int, v: int, c: int) -> list[int]:
    """What torch counts when the einsums run."""

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, device="meta")

    with FlopCounterMode(display=False) as expanded:
        keys = torch.cat([einsum("tc,hnc->htn", zeros(t, c), zeros(h, n, c)), zeros(h, t, r)], dim=-1)
        values = einsum("tc,hvc->htv", zeros(t, c), zeros(h, v, c))
        _ = zeros(h, s, n + r) @ keys.mT @ values
    with FlopCounterMode(display=False) as absorbed:
        query = torch.cat([einsum("shn,hnc->hsc", zeros(s, h, n), zeros(h, n, c)), zeros(h, s, r)], dim=-1)
        mixed = query @ zeros(h, c + r, t) @ zeros(h, t, c)
        _ = einsum("hsc,hvc->hsv", mixed, zeros(h, v, c))
    return [expanded.get_total_flops(), absorbed.get_total_flops()]


def view_by_positions(lengths: Tensor, padded: int, new: int) -> tuple[Tensor, Tensor]:
    """Each slot's position in the text, -1 for padding; then who stands not later than whom."""
    slots = torch.arange(padded + new)
    place = torch.where(slots >= padded, lengths[:, None] + slots - padded, slots)
    place = torch.where((slots >= lengths[:, None]) & (slots < padded), -1, place)
    queries = place[:, padded:]
    return (place[:, None] >= 0) & (place[:, None] <= queries[..., None]), queries


def view_by_parts(lengths: Tensor, padded: int, new: int) -> list[Tensor]:
    rows = [
        torch.cat([(torch.arange(padded) < n).repeat(new, 1), torch.ones(new, new).tril() > 0], dim=1)
        for n in lengths.tolist()
    ]
    return [torch.stack(rows), torch.stack([torch.arange(n, n + new) for n in lengths.tolist()])]


RIGHT: list[tuple[Exercise, Callable[..., Any]]] = [
    (check.visible, visible_by_positions),
    (check.visible, visible_by_parts),
    (check.write, write_in_a_loop),
    (check.write, write_by_stacking),
    (check.absorbed, absorbed_in_loops),
    (check.absorbed, absorbed_as_one_wide_key),
    (check.count_flops, flops_by_hand),
    (check.count_flops, flops_by_torch),
    (check.batch_view, view_by_positions),
    (check.batch_view, view_by_parts),
]


# ---- wrong answers -----------------------------------------------------------------------------------------------------


def loop(feed: Callable[[Tensor, list[Tensor]], Tensor], place: int = -1, start: bool = True) -> Callable[..., Tensor]:
    """A decode loop that reads `feed(prompt, new tokens)` in each step; with `start` false the prefill is left out."""

    def answer(read: Any, prompt: Tensor, new_tokens: int) -> Tensor:
        new = [read(prompt)[:, place].argmax(-1)[:, None]] if start else []
        while len(new) < new_tokens:
            new.append(read(feed(prompt, new))[:, -1].argmax(-1)[:, None])
        return torch.cat(new, dim=1)

    return answer


def newest(prompt: Tensor, new: list[Tensor]) -> Tensor:
    return new[-1]


def read_twice(read: Any, prompt: Tensor, new_tokens: int) -> Tensor:
    read(prompt)
    return loop(lambda prompt, new: new[-1] if new else prompt[:, -1:], start=False)(read, prompt, new_tokens)


def after_the_first(read: Any, prompt: Tensor, new_tokens: int) -> Tensor:
    return loop(newest)(read, prompt, new_tokens + 1)[:, 1:]


def token_by_token(read: Any, prompt: Tensor, new_tokens: int) -> Tensor:
    for i in range(prompt.shape[1]):
        logits = read(prompt[:, i : i + 1])
    new = [logits[:, -1:].argmax(-1)]
    for _ in range(new_tokens - 1):
        new.append(read(new[-1])[:, -1:].argmax(-1))
    return torch.cat(new, dim=1)


def on_latents(
    weigh: Callable[[Tensor, Tensor, float, Tensor], Tensor],
    finish: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
) -> Callable[..., Tensor]:
    def answer(qn: Tensor, qr: Tensor, c: Tensor, kr: Tensor, uk: Tensor, uv: Tensor, scale: float, mask: Tensor) -> Tensor:  # fmt: skip
        content = einsum("bshn,hnc,btc->bhst", qn, uk, c)
        rope = einsum("bshr,btr->bhst", qr, kr)
        mixed = einsum("bhst,btc->bshc", weigh(content, rope, scale, mask[:, None]), c)
        return einsum("bshc,hvc->bshv", mixed, uv) if finish is None else finish(mixed, uk, uv)

    return answer


def own_scale(width_of: Callable[[Tensor, Tensor], int]) -> Callable[..., Tensor]:
    def answer(*given: Any) -> Tensor:
        width = width_of(given[2], given[3])
        return absorbed_as_one_wide_key(*given[:6], width**-0.5, given[7])

    return answer


def seen(scores: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, scores, -math.inf)


def right(content: Tensor, rope: Tensor, scale: float, mask: Tensor) -> Tensor:
    return seen((content + rope) * scale, mask).softmax(-1)


def naive(qn: Tensor, qr: Tensor, c: Tensor, kr: Tensor, uk: Tensor, uv: Tensor, scale: float, mask: Tensor) -> Tensor:
    """The right numbers by the long way."""
    keys = torch.cat([einsum("btc,hnc->bhtn", c, uk), kr[:, None].expand(-1, len(uk), -1, -1)], dim=-1)
    values = einsum("btc,hvc->bhtv", c, uv)
    query = torch.cat([qn, qr], dim=-1).transpose(1, 2)
    return F.scaled_dot_product_attention(query, keys, values, mask[:, None], scale=scale).transpose(1, 2)


def flops(expanded: Any = None, absorbed: Any = None) -> Callable[..., tuple[int, int]]:
    def answer(s: int, t: int, h: int, n: int, r: int, v: int, c: int) -> tuple[int, int]:
        one, other = flops_by_hand(s, t, h, n, r, v, c)
        return (
            2 * h * expanded(s, t, n, r, v, c) if expanded else one,
            2 * h * absorbed(s, t, n, r, v, c) if absorbed else other,
        )

    return answer


def heads_forgotten(s: int, t: int, h: int, n: int, r: int, v: int, c: int) -> tuple[int, int]:
    return flops_by_hand(s, t, h, n, r, v, c)[0], 2 * s * c * h * (n + v) + 2 * s * t * (2 * c + r)


def view(
    see: Callable[[Tensor, Tensor, Tensor, int], Tensor] | None = None,
    place: Callable[[Tensor, Tensor, int], Tensor] | None = None,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """`see` gets slots [t], new tokens [s 1], lengths [b 1 1]; `place` gets lengths [b 1], new tokens [s]."""

    def answer(lengths: Tensor, padded: int, new: int) -> tuple[Tensor, Tensor]:
        mask, positions = view_by_positions(lengths, padded, new)
        s = torch.arange(new)
        if see:
            mask = see(torch.arange(padded + new), s[:, None], lengths[:, None, None], padded) & torch.ones_like(mask)
        if place:
            positions = place(lengths[:, None], s, padded) + torch.zeros_like(positions)
        return mask, positions

    return answer


def written(t: Tensor, s: Tensor, padded: int) -> Tensor:
    return (t >= padded) & (t - padded <= s)


def broken_view(lengths: Tensor, padded: int, new: int) -> tuple[Tensor, Tensor]:
    """The lesson's."""
    places = torch.arange(padded, padded + new)
    mask = places[:, None] >= torch.arange(padded + new)
    return mask.expand(len(lengths), -1, -1), places.expand(len(lengths), -1)


WRONG: list[tuple[Exercise, Callable[..., Any], str]] = [
    (check.visible, lambda seen, new: torch.tril(torch.ones(new, seen + new)) > 0, "starts at the first key"),
    (check.visible, lambda seen, new: visible_by_positions(seen, new) & (torch.arange(seen + new) != torch.arange(seen, seen + new)[:, None]), "does not see itself"),
    (check.visible, lambda seen, new: torch.ones(new, seen + new).tril(seen + 1) > 0, "one key too many"),
    (check.visible, lambda seen, new: torch.full((new, seen + new), True), "everything is visible"),
    (check.visible, lambda seen, new: (torch.arange(seen + new) < seen).repeat(new, 1), "see the cache only"),
    (check.visible, lambda seen, new: visible_by_positions(seen, new).logical_not(), "the wrong way round"),
    (check.visible, lambda seen, new: visible_by_positions(seen, new).T, "axes have changed places"),
    (check.visible, lambda seen, new: visible_by_positions(0, new), "no columns"),
    (check.write, loop(lambda prompt, new: torch.cat([prompt, *new], dim=1)), "the whole text to read"),
    (check.write, loop(lambda prompt, new: torch.cat(new, dim=1)), "hands over all new tokens"),
    (check.write, loop(lambda prompt, new: prompt), "reads the prompt again"),
    (check.write, read_twice, "is read twice"),
    (check.write, loop(lambda prompt, new: new[-1] if new else prompt[:, -1:], start=False), "prefill first"),
    (check.write, loop(newest, place=0), "the logits of the first position"),
    (check.write, after_the_first, "the token that the prefill chose is missing"),
    (check.write, lambda read, p, n: torch.cat([p, loop(newest)(read, p, n)], dim=1), "the prompt stands in front"),
    (check.write, lambda read, p, n: loop(newest)(read, p, n + 1), "one token too many"),
    (check.write, lambda read, p, n: loop(newest)(read, p, n).T, "rows and tokens have changed places"),
    (check.write, token_by_token, "read the whole prompt in one call"),
    (check.absorbed, own_scale(lambda c, kr: c.shape[-1]), "1 / sqrt(c):"),
    (check.absorbed, own_scale(lambda c, kr: c.shape[-1] + kr.shape[-1]), "1 / sqrt(c + r)"),
    (check.absorbed, on_latents(lambda a, p, scale, mask: right(a, 0 * p, scale, mask)), "the rope part is missing"),
    (check.absorbed, on_latents(lambda a, p, scale, mask: right(a * scale, p, 1.0, mask)), "only the content part is scaled"),
    (check.absorbed, on_latents(lambda a, p, scale, mask: right(a, p, 1.0, mask)), "the scale is missing"),
    (check.absorbed, on_latents(lambda a, p, scale, mask: ((a + p) * scale).softmax(-1)), "the mask is not used"),
    (check.absorbed, on_latents(lambda a, p, scale, mask: torch.where(mask, (a + p) * scale, 0).softmax(-1)), "e^0 = 1"),
    (check.absorbed, on_latents(lambda a, p, scale, mask: right(a, p, scale, mask.logical_not())), "the wrong way round"),
    (check.absorbed, on_latents(lambda a, p, scale, mask: seen((a + p) * scale, mask).softmax(1)), "over the heads"),
    (check.absorbed, on_latents(right, lambda mixed, uk, uv: mixed), "you return the mixed latents"),
    (check.absorbed, on_latents(right, lambda mixed, uk, uv: einsum("bshc,hnc->bshn", mixed, uk)), "go through W_UK"),
    (check.absorbed, on_latents(right, lambda mixed, uk, uv: einsum("bsc,hvc->bshv", mixed.mean(2), uv)), "averaged over the heads"),
    (check.absorbed, naive, "still built for every cached token"),
    (check.count_flops, lambda *sizes: tuple(x // 2 for x in flops_by_hand(*sizes)), "two FLOPs"),
    (check.count_flops, lambda *sizes: flops_by_hand(*sizes)[::-1], "expanded first"),
    (check.count_flops, flops(expanded=lambda s, t, n, r, v, c: s * t * (n + r + v)), "W_UK and W_UV are missing"),
    (check.count_flops, flops(expanded=lambda s, t, n, r, v, c: s * (c * (n + v) + t * (n + r + v))), "of the s new tokens only"),
    (check.count_flops, flops(expanded=lambda s, t, n, r, v, c: t * (c + s) * (n + r + v)), "not built from the latent"),
    (check.count_flops, flops(expanded=lambda s, t, n, r, v, c: t * (c + s) * (n + v)), "a query and a key meet in n + r"),
    (check.count_flops, flops(absorbed=lambda s, t, n, r, v, c: s * t * (2 * c + r)), "two folds are missing"),
    (check.count_flops, flops(absorbed=lambda s, t, n, r, v, c: t * (c * (n + v) + s * (2 * c + r))), "once for each of the t keys"),
    (check.count_flops, flops(absorbed=lambda s, t, n, r, v, c: s * c * (n + v + 2 * t)), "a query meets a latent"),
    (check.count_flops, flops(absorbed=lambda s, t, n, r, v, c: s * (c * (n + v) + 2 * t * (c + r))), "mixes latents only"),
    (check.count_flops, heads_forgotten, "the heads are missing"),
    (check.count_flops, flops(absorbed=lambda s, t, n, r, v, c: s * (c * (n + v) + t * (c + r))), "weighted sum of the latents"),
    (check.batch_view, broken_view, "this is still the bug"),
    (check.batch_view, view(place=lambda n, s, padded: padded + s), "still count the padding"),
    (check.batch_view, view(see=lambda t, s, n, padded: t <= padded + s), "the padding is still visible"),
    (check.batch_view, view(see=lambda t, s, n, padded: t <= n + s), "slots and positions are mixed up"),
    (check.batch_view, view(see=lambda t, s, n, padded: t < n), "see the prompt only"),
    (check.batch_view, view(see=lambda t, s, n, padded: (t < n) | (t >= padded)), "whatever their order"),
    (check.batch_view, view(see=lambda t, s, n, padded: (t < n) | written(t, s - 1, padded)), "does not see itself"),
    (check.batch_view, view(see=lambda t, s, n, padded: ~((t < n) | written(t, s, padded))), "the wrong way round"),
    (check.batch_view, view(see=lambda t, s, n, padded: written(t, s, padded)), "the prompts are gone"),
    (check.batch_view, view(place=lambda n, s, padded: n + s + 1), "one too high"),
    (check.batch_view, view(place=lambda n, s, padded: n), "get the same position"),
    (check.batch_view, view(place=lambda n, s, padded: s), "count from 0"),
]  # fmt: skip


def test_the_lessons_exercises_in_their_order() -> None:
    assert list(exercises_of(check)) == ["visible", "write", "absorbed", "count_flops", "batch_view"]


def test_a_reader_of_the_check_is_a_model_with_a_cache() -> None:
    """In pieces or at once, it says the same; another order, another text."""
    text = torch.tensor([[3, 1, 4, 1, 5, 9, 2], [2, 7, 1, 8, 2, 8, 1]])
    whole, pieces = check.Reader(31)(text), check.Reader(31)
    assert torch.equal(torch.cat([pieces(part) for part in text.split([3, 1, 1, 2], dim=1)], dim=1), whole)
    assert whole.shape == (2, 7, 31)
    assert not torch.equal(check.Reader(31)(text.flip(1))[:, -1], whole[:, -1])


@pytest.mark.parametrize("given", [torch.tensor([1, 2]), 7, torch.zeros(1, 2)])
def test_a_reader_says_what_it_wants(given: Any) -> None:
    result = check.write.run(lambda read, prompt, new_tokens: read(given))
    assert result.state == "wrong" and "read wants token ids [b s]" in "\n".join(result.lines)
